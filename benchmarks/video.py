"""Measure flicker and IoU on rendered moving scenes: each frame by itself, and smoothed.

    python dev.py benchmark video [--clips 4] [--frames 12] [--strengths 0.5 0.7 0.9]
    python dev.py benchmark video --stream 1000

A clip is a scene seen by a moving camera, with sensor noise. Flicker is the share of pixels whose label changes from
one frame to the next although the true label does not. A part of the clips has an object that moves before a place that
stands still.

With ``--stream`` a video of that many frames of 1920 x 1080 pixels goes through SLiMe Segment Video's reader, label
frames and overlay, with a threshold in place of a model: the peak of main memory is printed, and the frames a second.
"""

from __future__ import annotations

import argparse
import importlib
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch

from slime import SegmentSettings, segment
from slime.parts.maps import DenseMaps, PartMaps
from slime.parts.metrics import evaluate
from slime.parts.palette import default_palette
from slime.parts.video import smooth_video_parts
from slime.parts.video_stream import LabelFrames, segment_stream
from testing import scenes, splits
from testing.clips import clip, moving_clip
from testing.inprocess import NAME, import_comfyui, load_extension
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
    parser.add_argument("--stream", type=int, default=0, help="frames of a video that goes through in constant memory")
    options = parser.parse_args()
    if options.stream:
        measure_stream(options.stream)
        return
    backbone = trained(options.checkpoint)
    rows: dict[tuple[str, str], list[tuple[float, float]]] = {}

    def note(name: tuple[str, str], found: Sequence[np.ndarray], truth: np.ndarray, classes: int) -> None:
        iou = evaluate(list(found), list(truth), classes).part_miou
        rows.setdefault(name, []).append((flicker(np.stack(list(found)), truth), iou))

    for domain in scenes.DOMAINS:
        examples = [splits.example(domain, splits.EXAMPLES + i, style=scenes.NATURAL) for i in range(options.shots)]
        embeddings = Variant("instant").fit(backbone, examples, 0)
        classes = len(scenes.PARTS[domain]) + 1
        for seed, (kind, make) in product(range(options.clips), (("camera", clip), ("object", moving_clip))):
            frames, truth = make(domain, seed, options.frames, style=scenes.NATURAL)
            with torch.inference_mode():
                alone = [
                    segment(backbone, frame[None], embeddings, SegmentSettings(seed=i))[0].label_map[0].numpy()
                    for i, frame in enumerate(frames)
                ]
                together = segment(backbone, frames, embeddings)[0]
            note((kind, "each frame with noise of its own"), alone, truth, classes)
            note((kind, "one noise for all frames"), list(together.label_map.numpy()), truth, classes)
            for strength in options.strengths:
                smooth = smooth_video_parts(together, frames, strength)
                note((kind, f"smoothed by {strength}"), list(smooth.label_map.numpy()), truth, classes)
    head = ["moves", "method", "flicker, % of still pixels", "part mIoU"]
    means = [(*name, *np.mean(values, 0)) for name, values in sorted(rows.items(), key=lambda item: item[0][0])]
    say_table(head, ([kind, name, f"{100 * shaky:.2f}", f"{iou:.3f}"] for kind, name, shaky, iou in means))


def measure_stream(count: int) -> None:
    """Print the peak of main memory above the start, for a video of ``count`` frames of 1920 x 1080 pixels."""
    import_comfyui()
    load_extension()
    import av
    from comfy_api.latest import InputImpl

    reader_of = importlib.import_module(f"{NAME}.nodes.segment_video").VideoReader
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=30, options={"preset": "ultrafast"})
            stream.width, stream.height, stream.pix_fmt = 1920, 1080, "yuv420p"
            for number in range(count):
                image = np.full((1080, 1920, 3), 40, np.uint8)
                image[300:700, (7 * number) % 1500 :][:, :400] = 220
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
        reader = reader_of(InputImpl.VideoFromFile(str(path)))
        labels = LabelFrames.create(Path(folder) / "labels", ["bright"], default_palette(1))

        def found(frames: torch.Tensor) -> PartMaps:
            inside = (frames[..., 0] > 0.5).float()
            maps = DenseMaps(torch.stack([1 - inside, inside], 1))
            return PartMaps(maps, labels.names, labels.palette, torch.ones(len(frames), 1))

        def tensors(first: int) -> Iterator[torch.Tensor]:
            return (torch.from_numpy(image).float() / 255 for image, _ in reader.frames(first))

        before, peaks, start = resident(), [0.0], time.monotonic()

        def watch(done: int) -> None:
            peaks.append(resident())

        done = segment_stream(tensors, found, labels, 0.7, watch)
        middle = time.monotonic()
        reader.write_overlay(Path(folder) / "overlay.mp4", labels, lambda done: None)
        peaks.append(resident())
        rates = done / (middle - start), done / (time.monotonic() - middle)
        early = max(peaks[: count // 10 + 1])
        say_table(
            ["frames", "memory after a tenth, MB", "peak, MB", "label frames a second", "overlay frames a second"],
            [[str(done), f"{early - before:.0f}", f"{max(peaks) - before:.0f}", *(f"{rate:.1f}" for rate in rates)]],
        )


def resident() -> float:
    """Return the main memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
