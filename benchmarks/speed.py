"""Time and memory beside the official procedure and beside the bare UNet, on the same weights in one process.

    python dev.py benchmark speed [--quick] [--json FILE] [--models tiny FILE] [--tasks ...]

Every figure is also a ratio to a bound timed in the same run: a training step to the bare UNet's forward and backward
of the same size, the instant preset to the VAE encodes and UNet forwards of its views, a segmentation to one VAE encode
and one UNet forward an image. Bytes: on CUDA the allocator's peak beyond what was held before; on the CPU, for
training, the tensors that autograd saves, and otherwise the growth of the resident set.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from demo import splits
from demo.inprocess import load_denoiser
from demo.server import MODEL
from slime import Example, PartEmbeddings, SegmentSettings, preset, segment, train
from slime.denoiser import Context

from .reference import Reference, dense_attention
from .sources import as_tensor, scene_set

TASKS = ("step", "training", "segment", "parts", "examples", "side", "batch", "files", "import")
PAPER_STEPS = 200
IMPORT = """
import time, torch, demo.inprocess as inprocess
inprocess.import_comfyui()
import nodes, comfy_api.latest
start = time.perf_counter()
inprocess.load_extension()
print(time.perf_counter() - start, torch.cuda.is_initialized())
"""


class Bench:
    """One model, its denoiser, and the rows measured on it."""

    def __init__(self, name: str, denoiser: Any, repeats: int, report: Callable[[dict[str, Any]], None]) -> None:
        self.name, self.denoiser, self.repeats, self.report = name, denoiser, repeats, report
        self.side = denoiser.family.working_side
        self.example = splits.example("car", splits.TEACH)
        self.images = as_tensor(scene_set("car", "plain", 64, "test").images)

    def row(self, task: str, preset_name: str, ours: Measured, reference: Measured | None, bound: float) -> None:
        self.report(
            {
                "model": self.name,
                "task": task,
                "preset": preset_name,
                "ours_s": ours.seconds,
                "reference_s": reference.seconds if reference else None,
                "bound_s": bound,
                "ours_bytes": ours.bytes,
                "reference_bytes": reference.bytes if reference else None,
            }
        )

    # ---------------------------------------------------------------------------------------------------- bounds

    def encode(self, count: int = 1) -> float:
        pixels = torch.rand(count, self.side, self.side, 3)
        with torch.inference_mode():
            return self.time(lambda: self.denoiser.encode_images(pixels))

    def forward(self, count: int = 1, side: int | None = None) -> float:
        """Seconds of bare UNet forwards, without capture, of the working size."""
        latents, context = self.latents(count, side), self.denoiser.encode_prompt("")
        size = (latents.shape[2] * 8, latents.shape[3] * 8)
        with torch.inference_mode():
            return self.time(lambda: self.denoiser.predict_noise(latents, 100, context, None, size))

    def forward_backward(self) -> Measured:
        """The bare UNet's forward and backward to its context, batch 1."""
        with self.denoiser.differentiable(False):
            latents = self.latents(1).clone()
            rows = self.denoiser.encode_prompt("")
            learned = rows.rows.to(self.denoiser.device).clone().requires_grad_(True)

            def step() -> None:
                context = Context(learned, rows.pooled)
                self.denoiser.predict_noise(
                    latents, 50, context, None, (self.side, self.side)
                ).square().mean().backward()

            return self.measure(step, training=True)

    def latents(self, count: int, side: int | None = None) -> Tensor:
        cells = (side or self.side) // 8
        return torch.randn(count, 4, cells, cells, device=self.denoiser.device)

    # ----------------------------------------------------------------------------------------------------- tasks

    def step(self) -> None:
        """Seconds a training step at paper-equivalent settings, and memory beyond the weights."""
        bound = self.forward_backward()
        references = {}
        for crops in (1, 2):
            labels = torch.nn.functional.interpolate(
                self.example.labels[None, None].float(), (self.side // 8, self.side // 8)
            )[0, 0].long()
            with self.denoiser.differentiable(False):
                reference = Reference(self.denoiser, len(self.example.names), crops)
                image = self.example.image[None].clone()
                references[crops] = self.measure(lambda: reference.step(image, labels), training=True)  # noqa: B023
        ours = self.steps("paper")
        with self.denoiser.differentiable(False), torch.no_grad(), dense_attention(self.denoiser):
            dense = self.forward()
        for crops, measured in references.items():
            self.report(
                {
                    "model": self.name,
                    "task": f"reference step with {crops} x {crops} crops, in its own dense UNet forwards",
                    "preset": "reference",
                    "forwards": measured.seconds / dense,
                }
            )
            self.row(f"training step, reference with {crops} x {crops} crops", "paper", ours, measured, bound.seconds)
        self.row("training step, checkpointing", "paper", self.steps("paper", checkpointing=True), None, bound.seconds)
        self.row("bare forward and backward", "-", bound, None, bound.seconds)

    def steps(self, name: str, **changes: Any) -> Measured:
        """One step of ours: a whole training, with everything it encodes and predicts, over its steps. As in the
        preset, every step has a view of its own."""
        steps = 10 * self.repeats
        settings = preset(name, self.denoiser.family, views=steps, steps=steps, **changes)
        with torch.inference_mode(), memory(training=True) as used:
            synchronize()
            start = time.perf_counter()
            train(self.denoiser, [self.example], settings, on_step=lambda report: used.next_step())
            synchronize()
            seconds = (time.perf_counter() - start) / steps
        return Measured(seconds, used.bytes)

    def training(self) -> None:
        """Whole trainings. The reference's is its measured step times the paper's 200."""
        labels = torch.zeros(self.side // 8, self.side // 8, dtype=torch.long)
        labels[4:12, 4:12] = 1
        with self.denoiser.differentiable(False):
            reference = Reference(self.denoiser, len(self.example.names))
            image = self.example.image[None].clone()
            step = self.measure(lambda: reference.step(image, labels), training=True)
        whole = Measured(step.seconds * PAPER_STEPS, step.bytes)
        for name, changes in (("instant", {}), ("instant, 16 views", {"views": 16})):
            settings = preset("instant", self.denoiser.family, **changes)
            ours = self.measure(lambda: self.learn(settings), once=True)  # noqa: B023
            whole.bytes = 0  # another measure than ours, which holds no graph
            bound = settings.views * (self.encode() + self.forward())
            self.row("training", name, ours, whole, bound)

    def learn(self, settings: Any, examples: Sequence[Example] | None = None) -> PartEmbeddings:
        with torch.inference_mode():
            return train(self.denoiser, examples or [self.example], settings)

    def quick_embeddings(self, examples: Sequence[Example] | None = None) -> PartEmbeddings:
        return self.learn(preset("instant", self.denoiser.family, views=2, steps=5), examples)

    def segment(self) -> None:
        """Segmenting 1, 8 and 64 images; profile of one."""
        embeddings = self.quick_embeddings()
        with self.denoiser.differentiable(False):
            reference = Reference(self.denoiser, len(self.example.names))
            one = self.measure(lambda: reference.infer(self.images[:1].clone()))
        for count in (1, 8, 64):
            ours = self.measure(lambda: self.find(embeddings, self.images[:count]), once=count > 8)  # noqa: B023
            bound = count * (self.encode() + self.forward())
            self.row(f"segment {count}", "default", ours, Measured(one.seconds * count, one.bytes), bound)
        shares = {"VAE": self.encode(), "UNet": self.forward()}
        total = self.time(lambda: self.find(embeddings, self.images[:1]))
        shares["ours"] = max(total - sum(shares.values()), 0.0)
        self.report(
            {"model": self.name, "task": "profile of one segmentation", "preset": "default", "shares_s": shares}
        )

    def find(self, embeddings: Any, images: Tensor, **changes: Any) -> Any:
        with torch.inference_mode():
            return segment(self.denoiser, images, embeddings, SegmentSettings(**changes))

    def files(self) -> None:
        """Reading 8 embeddings of one image against reading one: read-outs only, no further pass."""
        several = [self.quick_embeddings()] * 8
        one = self.time(lambda: self.find(several[:1], self.images[:1]))
        self.row(
            "segment 1 with 8 files", "default", self.measure(lambda: self.find(several, self.images[:1])), None, one
        )

    def parts(self) -> None:
        for count in (1, 4, 16, 32):
            stripes = torch.arange(256).div(256 / (count + 1), rounding_mode="floor").expand(256, 256)
            example = Example.from_label_map(self.example.image, stripes, [f"part {i}" for i in range(count)])
            settings = preset("instant", self.denoiser.family, views=4, steps=20)
            ours = self.measure(lambda: self.learn(settings, [example]), once=True)  # noqa: B023
            self.row(f"learn {count} parts, 4 views", "instant", ours, None, 4 * (self.encode() + self.forward()))
            embeddings = self.quick_embeddings([example])
            ours = self.measure(lambda: self.find(embeddings, self.images[:1]))  # noqa: B023
            self.row(f"segment 1, {count} parts", "default", ours, None, self.encode() + self.forward())

    def examples(self) -> None:
        for count in (1, 5, 10):
            examples = [splits.example("car", splits.TEACH + i) for i in range(count)]
            settings = preset("instant", self.denoiser.family, views=20, steps=20)
            ours = self.measure(lambda: self.learn(settings, examples), once=True)  # noqa: B023
            self.row(
                f"learn from {count} examples, 20 views", "instant", ours, None, 20 * (self.encode() + self.forward())
            )

    def side_(self) -> None:
        embeddings = self.quick_embeddings()
        for side in (256, 512, 1024, 2048):
            image = torch.nn.functional.interpolate(self.images[:1].movedim(-1, 1), (side, side)).movedim(1, -1)
            ours = self.measure(lambda: self.find(embeddings, image))  # noqa: B023
            self.row(f"segment 1 of {side} x {side}", "default", ours, None, self.encode() + self.forward())

    def batch(self) -> None:
        embeddings = self.quick_embeddings()
        for size in (1, 2, 4, 8, 16):
            ours = self.measure(lambda: self.find(embeddings, self.images[:16], batch_size=size), once=True)  # noqa: B023
            self.row(f"segment 16, {size} at once", "default", ours, None, 16 * (self.encode() + self.forward()))

    def import_(self) -> None:
        """What importing the extension adds to ComfyUI's start, and whether it touches a GPU."""
        done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
        seconds, gpu = done.stdout.strip().splitlines()[-1].split()
        place = {"model": "-", "task": "import", "preset": "-"}
        self.report(place | {"ours_s": float(seconds), "gpu_touched": gpu == "True"})

    # ------------------------------------------------------------------------------------------------- measuring

    def time(self, work: Callable[[], Any]) -> float:
        return self.measure(work).seconds

    def measure(self, work: Callable[[], Any], training: bool = False, once: bool = False) -> Measured:
        """Median seconds of some runs after a first one, and the first one's bytes."""
        with memory(training) as used, torch.inference_mode(torch.is_inference_mode_enabled()):
            synchronize()
            start = time.perf_counter()
            work()
            synchronize()
            first = time.perf_counter() - start
        if once:
            return Measured(first, used.bytes)
        seconds = []
        for _ in range(self.repeats):
            start = time.perf_counter()
            work()
            synchronize()
            seconds.append(time.perf_counter() - start)
        return Measured(statistics.median(seconds), used.bytes)


class Measured:
    """Seconds and peak bytes; saved tensors are counted step by step."""

    def __init__(self, seconds: float = 0.0, bytes: int = 0) -> None:
        self.seconds, self.bytes = seconds, bytes
        self.step: dict[int, int] = {}  # storage -> bytes, of the present step

    def next_step(self) -> None:
        self.bytes = max(self.bytes, sum(self.step.values()))
        self.step = {}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def memory(training: bool) -> Iterator[Measured]:
    """Bytes beyond those held before, see the module's text."""
    used = Measured()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield used
        used.bytes = torch.cuda.max_memory_allocated() - before
    elif training:

        def pack(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                storage = tensor.untyped_storage()
                used.step[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield used
        used.next_step()
    else:
        process, done = psutil.Process(), threading.Event()
        before = process.memory_info().rss

        def watch() -> None:
            while not done.wait(0.005):
                used.bytes = max(used.bytes, process.memory_info().rss - before)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield used
        finally:
            done.set()
            watcher.join()


def make_denoiser(name: str) -> Any:
    return load_denoiser(MODEL if name == "tiny" else Path(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny"], help="tiny, or checkpoint files")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="the tiny model, fewer repeats, no growth tables")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.models, options.repeats, options.tasks = ["tiny"], 2, ["step", "training", "segment", "files", "import"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.processor() or 'CPU'}"
    rows: list[dict[str, Any]] = []

    def report(row: dict[str, Any]) -> None:
        rows.append(row)
        sys.stdout.write(f"{json.dumps(row)}\n")
        sys.stdout.flush()
        if options.json:
            options.json.write_text(json.dumps({"device": device, "rows": rows}, indent=1), encoding="utf-8")

    for name in options.models:
        bench = Bench(name, make_denoiser(name), options.repeats, report)
        for task in options.tasks:
            getattr(bench, {"side": "side_", "import": "import_"}.get(task, task))()
    summarise(device, rows)


def summarise(device: str, rows: Sequence[dict[str, Any]]) -> None:
    sys.stdout.write(
        f"\n{device}, {torch.get_num_threads()} threads\n\n"
        "| model | task | preset | ours, s | reference, s | times faster | x bound | ours, MB | reference, MB |\n"
        f"|{'---|' * 9}\n"
    )
    for row in rows:
        if "bound_s" not in row:
            continue
        ours, reference, bound = row["ours_s"], row["reference_s"], row["bound_s"]
        cells = [row["model"], row["task"], row["preset"], f"{ours:.3f}"]
        cells += [f"{reference:.3f}", f"{reference / ours:.1f}"] if reference else ["", ""]
        cells.append(f"{ours / bound:.2f}")
        cells += [f"{row[key] / 1e6:.0f}" if row[key] else "" for key in ("ours_bytes", "reference_bytes")]
        sys.stdout.write(f"| {' | '.join(cells)} |\n")


if __name__ == "__main__":
    main()
