"""Measure flicker and IoU on rendered moving scenes: each frame by itself, and smoothed.

    python dev.py benchmark video [--clips 4] [--frames 12] [--strengths 0.5 0.7 0.9]
    python dev.py benchmark video --stream 3000

A clip is a scene seen by a moving camera, with sensor noise. Flicker is the share of pixels whose label changes from
one frame to the next although the true label does not. "In a stream" averages with the frames before alone, as SLiMe
Segment Video does; a part of the clips has an object that moves before a place that stands still.

With ``--stream`` a video of that many frames of 1920 x 1080 pixels goes through SLiMe Segment Video's reader, label
frames and overlay, with a threshold in place of a model: the peak of main memory is printed, and the frames a second.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from slime import SegmentSettings, segment
from slime.parts.metrics import evaluate
from slime.parts.video import smooth_video_parts
from testing import scenes, splits
from testing.clips import clip
from testing.tiny.weights import TESTBED

from .methods import Variant, trained
from .rows import say_table


def flicker(found: np.ndarray, truth: np.ndarray) -> float:
    """Return the share of changed labels [T, H, W] among the pixels whose true label stays."""
    still = truth[1:] == truth[:-1]
    return float((found[1:] != found[:-1])[still].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=TESTBED)
    parser.add_argument("--clips", type=int, default=4, help="of every domain")
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--shots", type=int, default=10)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    options = parser.parse_args()
    backbone = trained(options.checkpoint)
    rows: dict[str, list[tuple[float, float]]] = {}

    def note(name: str, found: Sequence[np.ndarray], truth: np.ndarray, classes: int) -> None:
        iou = evaluate(list(found), list(truth), classes).part_miou
        rows.setdefault(name, []).append((flicker(np.stack(list(found)), truth), iou))

    for domain in scenes.DOMAINS:
        examples = [splits.example(domain, splits.EXAMPLES + i, style=scenes.NATURAL) for i in range(options.shots)]
        embeddings = Variant("instant").fit(backbone, examples, 0)
        classes = len(scenes.PARTS[domain]) + 1
        for seed in range(options.clips):
            frames, truth = clip(domain, seed, options.frames, style=scenes.NATURAL)
            with torch.inference_mode():
                alone = [
                    segment(backbone, frame[None], embeddings, SegmentSettings(seed=i))[0].label_map[0].numpy()
                    for i, frame in enumerate(frames)
                ]
                together = segment(backbone, frames, embeddings)[0]
            note("each frame with noise of its own", alone, truth, classes)
            note("one noise for all frames", list(together.label_map.numpy()), truth, classes)
            for strength in options.strengths:
                steadied = smooth_video_parts(together, frames, strength)
                note(f"one noise, steadied by {strength}", list(steadied.label_map.numpy()), truth, classes)
    means = [(name, *np.mean(values, 0)) for name, values in rows.items()]
    head = ["method", "flicker, % of still pixels", "part mIoU"]
    say_table(head, ([name, f"{100 * shaky:.2f}", f"{iou:.3f}"] for name, shaky, iou in means))


if __name__ == "__main__":
    main()
