"""Numbers that the official code gave on the demo model's weights, replayed (see tools/official_numbers.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from slime.backbones.sd_unet import PAPER_LAYERS
from slime.backbones.text import Capture, Context, add_noise
from slime.images import resize_maps
from slime.paper.decoder import official_maps, token_maps
from slime.paper.losses import sd_loss
from slime.paper.train import GUIDANCE, SD_WEIGHT, _was_maps, loss_terms, mean_scores, part_prompt
from testing.inprocess import load_backbone
from testing.server import MODEL
from tools.official_numbers import SIDE, STRIDE, TARGET, TEST_TIMESTEP, TIMESTEP

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not (MODEL.is_file() and Path(TARGET).is_file()), reason="the tiny model is not there"),
]


@pytest.fixture(scope="module")
def replay(extension):
    """Backbone, the official numbers, labels [1, K, 64, 64] and a pass on the learned rows."""
    backbone, official = load_backbone(MODEL), load_file(str(TARGET))
    parts = len(official["rows"])
    labels = F.one_hot(official["labels"].long(), parts + 1).movedim(-1, 0)[None].float()
    prompt = backbone.encode_prompt(part_prompt([""] * parts)).tokens

    def run_unet(rows, timestep):
        capture = Capture(PAPER_LAYERS)
        noisy = add_noise(backbone, official["latents"].float(), official["noise"].float(), timestep)
        context = Context(torch.cat([prompt[:1], rows, prompt[parts + 1 :]]))
        return capture, backbone.predict_noise(noisy, timestep, context, capture)

    return backbone, official, labels, run_unet


def test_a_step_of_the_paper_is_the_official_codes(replay) -> None:
    backbone, official, labels, run_unet = replay
    latents, noise = official["latents"].float(), official["noise"].float()
    empty = backbone.encode_prompt("")
    with torch.no_grad():
        noisy = add_noise(backbone, latents, noise, TIMESTEP)
        unconditional = backbone.predict_noise(noisy, TIMESTEP, empty, None)
    with backbone.differentiable(False):
        rows = official["rows"].clone().requires_grad_(True)
        capture, predicted = run_unet(rows, TIMESTEP)
        scores = mean_scores(capture, len(rows) + 1, labels)
        terms = loss_terms(scores, capture, labels)
        sd = sd_loss(predicted, unconditional.clone(), noise, GUIDANCE)
        loss = sum(terms.values()) + SD_WEIGHT * sd
        loss.backward()
        was = _was_maps(capture, scores.softmax(1))
    cross, steps = official["cross"].float(), official["losses"]
    assert (scores[0] - cross).abs().max() < 2e-3 * cross.abs().max()
    assert (was[0] - official["was"].float()).abs().max() < 2e-3
    for name, ours, theirs in zip(
        ("CE", "WAS", "SD", "all"), (terms["ce"], terms["was"], sd, loss), steps, strict=True
    ):
        assert float(ours.detach()) == pytest.approx(float(theirs), rel=2e-3), name
    gradient, wanted = rows.grad.flatten(), official["gradient"].flatten()
    assert torch.cosine_similarity(gradient, wanted, 0) > 0.9999
    assert float(gradient.norm()) == pytest.approx(float(wanted.norm()), rel=5e-3)


def test_the_official_decoder_gives_the_official_label_map(replay) -> None:
    _, official, labels, run_unet = replay
    with torch.no_grad():
        capture, _ = run_unet(official["rows"], TEST_TIMESTEP)
        maps = token_maps(list(capture.cross.values()), labels.shape[1], labels.shape[-2:])
        found = resize_maps(official_maps(maps, list(capture.self_.values())), (SIDE, SIDE))[0].argmax(0)
    assert len(official["mask"].unique()) > 1
    assert (found[::STRIDE, ::STRIDE] == official["mask"]).float().mean() > 0.999
