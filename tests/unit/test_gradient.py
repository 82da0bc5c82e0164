"""Training through the model where numbers give out."""

from __future__ import annotations

import pytest
import torch

from slime import SlimeError, preset, train
from slime.paper import train as paper_train
from slime.training.progress import StepReport
from testing.toy import ToyUNet, all_vectors, toy_example


def test_a_loss_that_is_no_number_ends_the_training_with_the_last_good_rows(monkeypatch) -> None:
    monkeypatch.setattr(paper_train, "GRADIENT_SCALE", float("inf"))
    reports: list[StepReport] = []
    with pytest.raises(SlimeError, match="became NaN or infinite.*--bf16-unet"):
        train(ToyUNet(), [toy_example(0)], preset("paper", steps=30, views=2), on_step=reports.append)
    kept = reports[-1].embeddings()
    assert reports[-1].step == 10 and kept is not None and all_vectors(kept).isfinite().all()


def test_training_through_the_model_keeps_cudnns_attention_out() -> None:
    """Its gradients in half precision were no numbers on an H100 with cuDNN 9.19 (benchmarks/RESULTS.md)."""
    seen = []

    def watch(report: StepReport) -> None:
        if report.stage == "train":
            seen.append(torch.backends.cuda.cudnn_sdp_enabled())

    train(ToyUNet(), [toy_example(0)], preset("paper", steps=2, views=1), on_step=watch)
    assert seen == [False, False] and torch.backends.cuda.cudnn_sdp_enabled()
