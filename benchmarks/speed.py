"""Measure time and memory beside the official procedure and the bare UNet, on the same weights in one process.

    python dev.py benchmark speed [--quick] [--json FILE] [--models tiny sd1 sd2 sdxl FILE] [--tasks ...]

Every figure is also a ratio to a bound that is timed in the same run: a training step to the bare UNet's forward and
backward pass of the same size, the instant preset to the VAE encodings and UNet forward passes of its views, a
segmentation to one VAE encoding and one UNet forward pass per image. sd1, sd2 and sdxl are full-size models with random
weights. With ``--dtype`` our code and the bounds run in that precision, as ComfyUI loads models on most GPUs; the
reference stays in float32, as the official code runs. Bytes are the maximum held at once beyond the weights: on CUDA as
the allocator counts them, on the CPU the sum of the living tensors, counted operation by operation in a separate run.
"""

from __future__ import annotations

import argparse
import platform
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from slime import Example, PartEmbeddings, SegmentSettings, StepReport, preset, segment, train
from slime.backbones.text import Context, TextConditioned
from slime.parts.metrics import evaluate
from slime.settings import TrainSettings
from slime.training.cache import clear_caches
from testing import splits
from testing.inprocess import load_backbone
from testing.random_models import LAYOUTS, random_backbone
from testing.server import EXTENSION, MODEL, ComfyServer

from .live_bytes import LiveBytes
from .reference import Reference, dense_attention
from .rows import Row, say_row, say_table, write_rows
from .sources import as_tensor, scene_set

TASKS = ("step", "memory", "iou", "training", "segment", "parts", "examples", "side", "batch", "files", "import")
PAPER_STEPS = 200
IOU_STEPS = 100  # a trainer that has not reached the training IoU by then is stopped
TRAINING_IOU = 0.5


class Bench:
    """One model: its backbone, the float32 backbone of the reference, and the rows measured on them."""

    def __init__(
        self,
        name: str,
        backbone: TextConditioned,
        official: TextConditioned,
        repeats: int,
        report: Callable[[Row], None],
        crops: int,
    ) -> None:
        self.name, self.backbone, self.official = name, backbone, official
        self.repeats, self.report, self.crops = repeats, report, crops
        self.side = backbone.info.side
        self.cells = self.side // backbone.info.cell
        self.example = splits.example("car", splits.EXAMPLES)
        self.images = as_tensor(scene_set("car", "plain", 64, "test").images)

    def note(self, task: str, preset_name: str, **figures: Any) -> None:
        self.report({"model": self.name, "task": task, "preset": preset_name} | figures)

    def row(self, task: str, preset_name: str, ours: Measured, bound: float, reference: Measured | None = None) -> None:
        figures = {"ours_s": ours.seconds, "reference_s": reference and reference.seconds, "bound_s": bound}
        figures |= {"ours_bytes": ours.bytes, "reference_bytes": reference and reference.bytes}
        self.note(task, preset_name, **{name: value for name, value in figures.items() if value is not None})

    # ---------------------------------------------------------------------------------------------------- bounds

    def bare(self) -> float:
        """Measure the seconds of a VAE encoding and a UNet forward pass of one image."""
        return self.encode() + self.forward()

    def encode(self) -> float:
        pixels = torch.rand(1, self.side, self.side, 3)
        with torch.inference_mode():
            return self.time(lambda: self.backbone.encode_images(pixels))

    def forward(self, backbone: TextConditioned | None = None) -> float:
        """Measure the seconds of a bare UNet forward pass of the working size, without capture."""
        backbone = backbone or self.backbone
        latents, context = self.latents(), backbone.encode_prompt("")
        with torch.inference_mode():
            return self.time(lambda: backbone.predict_noise(latents, 100, context, None))

    def forward_backward(self) -> list[float]:
        """Measure the seconds of several forward and backward passes of the bare UNet to its context, batch 1."""
        with self.backbone.differentiable(False):
            latents = self.latents().clone()
            prompt = self.backbone.encode_prompt("")
            learned = prompt.tokens.to(self.backbone.device).clone().requires_grad_(True)

            def step() -> None:
                predicted = self.backbone.predict_noise(latents, 50, Context(learned, prompt.pooled), None)
                if predicted is not None:
                    predicted.square().mean().backward()

            step()
            return [self.measure(step, once=True).seconds for _ in range(max(self.repeats, 3))]

    def grid_labels(self) -> Tensor:
        """Return the example's label map on the latent grid, as the official code takes it."""
        labels = self.example.labels[None, None].float()
        return torch.nn.functional.interpolate(labels, (self.cells, self.cells))[0, 0].long()

    def latents(self) -> Tensor:
        return torch.randn(1, 4, self.cells, self.cells, device=self.backbone.device)

    # ----------------------------------------------------------------------------------------------------- tasks

    def step(self) -> None:
        """Measure the seconds per training step at settings equivalent to the paper's."""
        bare = self.forward_backward()
        references = {crops: self.reference(crops) for crops in range(1, self.crops + 1)}
        with self.official.differentiable(False), torch.no_grad(), dense_attention(self.official):
            dense = self.forward(self.official)
        prepare, loop = self.steps()
        bound = statistics.median(bare + self.forward_backward())  # before and after: machines have slow moments
        every = Measured(prepare.seconds + loop.seconds)
        reused = Measured(prepare.seconds / 5 + loop.seconds)
        for crops, measured in references.items():
            task = f"reference step with {crops} x {crops} crops, in its own dense UNet forwards"
            self.note(task, "reference", forwards=measured.seconds / dense)
        rivals: list[tuple[str, Measured | None]]
        rivals = [(f", reference with {crops} x {crops} crops", one) for crops, one in references.items()]
        for beside, rival in rivals or [("", None)]:
            self.row(f"training step{beside}", "paper", loop, bound, rival)
            self.row(f"and its view every 5 steps{beside}", "paper", reused, bound, rival)
            self.row(f"and its view every step{beside}", "paper", every, bound, rival)
        encode, forward = self.encode(), self.forward()
        self.row("prepare a view", "paper", prepare, encode + forward)
        shares = {"UNet forward and backward": bound, "ours": max(loop.seconds - bound, 0.0)}
        shares |= {"VAE encode of a view": encode, "unconditional UNet forward of a view": forward}
        self.note("profile of one training step", "paper", shares_s=shares)
        self.row("training step, checkpointing", "paper", self.steps(checkpointing=True)[1], bound)

    def reference(self, crops: int) -> Measured:
        """Measure a step of the official procedure."""
        labels = self.grid_labels()
        with self.official.differentiable(False):
            reference = Reference(self.official, len(self.example.names), crops)
            image = self.example.image[None].clone()
            return self.measure(lambda: reference.step(image, labels))

    def steps(self, checkpointing: bool = False) -> tuple[Measured, Measured]:
        """Measure the preparation of a view, and one of our training steps with everything that belongs to it.

        Every step of this training has a view of its own.
        """
        count = 10 * max(self.repeats, 1)
        settings = preset("paper", views=count, steps=count, checkpointing=checkpointing)
        times: dict[str, list[float]] = defaultdict(list)

        def clock(report: StepReport) -> None:
            synchronize()
            times[report.stage].append(time.perf_counter())

        start = time.perf_counter()
        with torch.inference_mode():
            train(self.backbone, [self.example], settings, on_step=clock)
        prepared, first, last = times["features"][-1], times["train"][0], times["train"][-1]
        return Measured((prepared - start) / count), Measured((last - first) / (count - 1))

    def memory(self) -> None:
        """Measure the peak bytes of a training step beyond the weights."""
        reference = self.reference_bytes()
        for name, checkpointing in (("", False), (", checkpointing", True)):
            settings = preset("paper", views=1, steps=1, checkpointing=checkpointing)
            with memory() as used:
                self.learn(settings)
            held = {"ours_bytes": used.bytes, "reference_bytes": reference, "weights_bytes": self.weights()}
            self.note(f"memory of a training step{name}", "paper", **held)

    def reference_bytes(self) -> int | None:
        if not self.crops:
            return None
        with self.official.differentiable(False):
            reference = Reference(self.official, len(self.example.names))
            with memory() as used:
                reference.step(self.example.image[None].clone(), self.grid_labels())
        return used.bytes

    def weights(self) -> int:
        """Return the bytes of the UNet's weights, as ComfyUI counts them."""
        patcher = getattr(self.backbone, "model", None)
        return int(patcher.model_size()) if patcher is not None else 0

    def iou(self) -> None:
        """Measure the seconds until the example itself is segmented with a mean IoU of TRAINING_IOU."""
        task, classes, truth = f"training IoU {TRAINING_IOU}", len(self.example.names) + 1, self.example.labels.numpy()
        several = {"instant": {}, "paper": {"steps": IOU_STEPS, "views": IOU_STEPS}}
        for name, changes in several.items():
            clock = _IouClock(self.backbone, self.example)
            settings = preset(name, self.backbone.info, **changes)
            clear_caches()
            with torch.inference_mode(), suppress(_Reached):
                clock.start()
                train(self.backbone, [self.example], settings, on_step=clock)
            self.note(task, name, ours_s=clock.seconds, best_iou=clock.best)
        labels, best, start = self.grid_labels(), 0.0, time.perf_counter()
        seconds = None
        with self.official.differentiable(False):
            reference = Reference(self.official, len(self.example.names))
            image = self.example.image[None].clone()
            for _ in range(IOU_STEPS):
                found = reference.step(image, labels).labels[None, None].float()
                full = torch.nn.functional.interpolate(found, truth.shape)[0, 0].byte().numpy()
                best = max(best, evaluate([full], [truth], classes).miou)
                if best >= TRAINING_IOU:
                    seconds = time.perf_counter() - start
                    break
        self.note(task, "reference", ours_s=seconds, best_iou=best)

    def training(self) -> None:
        """Measure whole trainings; the reference's time is its measured step times the paper's 200."""
        whole = Measured(self.reference(1).seconds * PAPER_STEPS) if self.crops else None
        for name, changes in (("instant", {}), ("instant, 16 views", {"views": 16}))[0 if self.repeats else 1 :]:
            settings = preset("instant", self.backbone.info, **changes)
            ours = self.measure(lambda: self.learn(settings), once=True)  # noqa: B023
            self.row("training", name, ours, settings.views * self.bare(), whole)

    def learn(self, settings: TrainSettings, examples: Sequence[Example] | None = None) -> PartEmbeddings:
        clear_caches()
        with torch.inference_mode():
            return train(self.backbone, examples or [self.example], settings)

    def quick_embeddings(self, examples: Sequence[Example] | None = None) -> PartEmbeddings:
        return self.learn(preset("instant", self.backbone.info, views=2), examples)

    def segment(self) -> None:
        """Measure the segmentation of 1, 8 and 64 images, and profile that of one."""
        embeddings = self.quick_embeddings()
        one = None
        if self.crops:
            with self.official.differentiable(False):
                reference = Reference(self.official, len(self.example.names))
                one = self.measure(lambda: reference.infer(self.images[:1].clone()))
        for count in (1, 8, 64)[: 3 if self.repeats else 2]:
            ours = self.measure(partial(self.find, embeddings, self.images[:count]), once=count > 8, count=count == 1)
            theirs = Measured(one.seconds * count, one.bytes) if one else None
            self.row(f"segment {count}", "default", ours, count * self.bare(), theirs)
        shares = {"VAE": self.encode(), "UNet": self.forward()}
        total = self.time(lambda: self.find(embeddings, self.images[:1]))
        shares["ours"] = max(total - sum(shares.values()), 0.0)
        self.note("profile of one segmentation", "default", shares_s=shares)

    def find(
        self, embeddings: PartEmbeddings | Sequence[PartEmbeddings], images: Tensor, batch_size: int = 0
    ) -> list[Tensor]:
        """Return label maps; the full-size pixels are computed when they are requested."""
        with torch.inference_mode():
            found = segment(self.backbone, images, embeddings, SegmentSettings(batch_size=batch_size))
            return [maps.label_map for maps in found]

    def files(self) -> None:
        """Measure the segmentation of one image with 8 embeddings against one: more decoding, but no further pass."""
        several = [self.quick_embeddings()] * 8
        one = self.time(lambda: self.find(several[:1], self.images[:1]))
        ours = self.measure(lambda: self.find(several, self.images[:1]))
        self.row("segment 1 with 8 files", "default", ours, one)

    def parts(self) -> None:
        for count in (1, 4, 16, 32):
            stripes = torch.arange(256).div(256 / (count + 1), rounding_mode="floor").expand(256, 256)
            example = Example.from_label_map(self.example.image, stripes, [f"part {i}" for i in range(count)])
            settings = preset("instant", self.backbone.info, views=4)
            ours = self.measure(partial(self.learn, settings, [example]), once=True, count=True)
            self.row(f"learn {count} parts, 4 views", "instant", ours, 4 * self.bare())
            embeddings = self.quick_embeddings([example])
            ours = self.measure(lambda: self.find(embeddings, self.images[:1]), count=True)  # noqa: B023
            self.row(f"segment 1, {count} parts", "default", ours, self.bare())

    def examples(self) -> None:
        for count in (1, 5, 10):
            examples = [splits.example("car", splits.EXAMPLES + i) for i in range(count)]
            settings = preset("instant", self.backbone.info, views=20)
            ours = self.measure(partial(self.learn, settings, examples), once=True, count=True)
            self.row(f"learn from {count} examples, 20 views", "instant", ours, 20 * self.bare())

    def side_(self) -> None:
        embeddings = self.quick_embeddings()
        for side in (256, 512, 1024, 2048):
            image = torch.nn.functional.interpolate(self.images[:1].movedim(-1, 1), (side, side)).movedim(1, -1)
            ours = self.measure(lambda: self.find(embeddings, image), count=True)  # noqa: B023
            self.row(f"segment 1 of {side} x {side}", "default", ours, self.bare())
        with torch.inference_mode():
            found = segment(self.backbone, image, embeddings)[0]
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                _ = found.label_map
        times = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
        first = sorted(times, key=lambda name: -times[name])[:6]
        self.note(
            f"profile of the pixels of {side} x {side}",
            "default",
            shares={n: times[n] / sum(times.values()) for n in first},
        )

    def batch(self) -> None:
        embeddings = self.quick_embeddings()
        for size in (1, 2, 4, 8, 16):
            work = partial(self.find, embeddings, self.images[:16], batch_size=size)
            ours = self.measure(work, once=True, count=True)
            self.row(f"segment 16, {size} at once", "default", ours, 16 * self.bare())

    def import_(self) -> None:
        """Take the time that ComfyUI says the extension adds to its start."""
        with ComfyServer() as server:
            (seconds,) = re.findall(rf"([0-9.]+) seconds: .*{EXTENSION}$", server.log(), re.MULTILINE)
        self.report({"model": "-", "task": "import", "preset": "-", "ours_s": float(seconds)})

    # ------------------------------------------------------------------------------------------------- measuring

    def time(self, work: Callable[[], Any]) -> float:
        return self.measure(work).seconds

    def measure(self, work: Callable[[], Any], once: bool = False, count: bool = False) -> Measured:
        """Return the median seconds of several runs after a first one, or those of a single run.

        With ``count`` it also returns the bytes of one more run, which is not timed.
        """

        def seconds() -> float:
            synchronize()
            start = time.perf_counter()
            work()
            synchronize()
            return time.perf_counter() - start

        first = seconds()
        times = [first] if once or not self.repeats else [seconds() for _ in range(self.repeats)]
        if not count:
            return Measured(statistics.median(times))
        with memory() as used:
            work()
        return Measured(statistics.median(times), used.bytes)


@dataclass
class Measured:
    """Seconds and, if they were counted, peak bytes."""

    seconds: float = 0.0
    bytes: int | None = None


class _Reached(Exception):  # a signal
    pass


class _IouClock:
    """Callback that stops a training when its example is segmented well; its own segmentation is not timed."""

    def __init__(self, backbone: TextConditioned, example: Example) -> None:
        self.backbone, self.example, self.best = backbone, example, 0.0
        self.seconds: float | None = None

    def start(self) -> None:
        self.spent, self.since = 0.0, time.perf_counter()

    def __call__(self, report: StepReport) -> None:
        if report.stage != "done" and (report.stage != "train" or report.step % 10):
            return
        embeddings = report.embeddings()
        if embeddings is None:
            return
        synchronize()
        self.spent += time.perf_counter() - self.since
        with torch.inference_mode(), torch.no_grad():
            maps = segment(self.backbone, self.example.image[None], embeddings)[0]
        found, truth = maps.label_map[0].numpy(), self.example.labels.numpy()
        self.best = max(self.best, evaluate([found], [truth], len(self.example.names) + 1).miou)
        if self.best >= TRAINING_IOU:
            self.seconds = self.spent
            raise _Reached
        self.since = time.perf_counter()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def memory() -> Iterator[Measured]:
    """Measure the bytes beyond those held before; see the module's docstring."""
    used = Measured()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield used
        used.bytes = torch.cuda.max_memory_allocated() - before
    else:
        with LiveBytes() as living:
            yield used
        used.bytes = living.peak


def make_backbone(name: str, dtype: torch.dtype) -> Any:
    if name in LAYOUTS:
        return random_backbone(name, dtype=dtype)
    return load_backbone(MODEL if name == "tiny" else Path(name), dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=["tiny"], help=f"tiny, {', '.join(LAYOUTS)}, or checkpoint files"
    )
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="of ours and the bounds"
    )
    parser.add_argument("--crops", type=int, default=2, help="crops of the reference a side, at most; 0 leaves it out")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed runs after a first one; 0: the first, no long tasks"
    )
    parser.add_argument("--quick", action="store_true", help="the tiny model, fewer repeats, no growth tables")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.models, options.repeats, options.tasks = (
            ["tiny"],
            2,
            ["step", "memory", "iou", "training", "segment", "files", "import"],
        )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.processor() or 'CPU'}"
    rows: list[Row] = []

    def report(row: Row) -> None:
        rows.append(row)
        say_row(row)
        write_rows(options.json, rows, device=device)

    for name in options.models:
        backbone = make_backbone(name, getattr(torch, options.dtype))
        half = options.dtype != "float32"
        official = make_backbone(name, torch.float32) if half and options.crops else backbone
        label = f"{name}, {options.dtype}" if half else name
        bench = Bench(label, backbone, official, options.repeats, report, options.crops)
        for task in options.tasks:
            getattr(bench, {"side": "side_", "import": "import_"}.get(task, task))()
    summarise(device, rows)


def summarise(device: str, rows: Sequence[Row]) -> None:
    head = [
        "model",
        "task",
        "preset",
        "ours, s",
        "reference, s",
        "times faster",
        "x bound",
        "ours, MB",
        "reference, MB",
    ]
    lines = []
    for row in rows:
        ours, reference, bound = (row.get(key) for key in ("ours_s", "reference_s", "bound_s"))
        cells = [_number(ours, 3), _number(reference, 3), _ratio(reference, ours, 1), _ratio(ours, bound, 2)]
        cells += [_ratio(row.get(key), 1e6, 0) for key in ("ours_bytes", "reference_bytes")]
        if any(cells):
            lines.append([row["model"], row["task"], row["preset"], *cells])
    say_table(head, lines, f"{device}, {torch.get_num_threads()} threads")


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _ratio(value: float | None, unit: float | None, digits: int) -> str:
    return "" if value is None or not unit else f"{value / unit:.{digits}f}"


if __name__ == "__main__":
    main()
