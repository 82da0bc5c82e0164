"""Measure your GPU for an issue report: one command, under ten minutes, one table.

    python dev.py benchmark device [--quick] [--json FILE]

It runs the parity tests, every node and preset on the tiny model, and random models in the full shapes of SD1.5, SD2.1
and SDXL in float16 and bfloat16. It measures the time against the bare passes in the same run, the peak memory beyond
the weights, how often a training step waits for the device (CUDA's own check), and a model of which only a part is
loaded. ``--quick`` runs the tiny model alone, which needs no GPU. The program exits with 1 if something failed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from slime import preset
from testing.inprocess import import_comfyui, load_backbone, load_extension
from testing.random_models import LAYOUTS, random_backbone
from testing.server import MODEL, ROOT

from .faults.nodes import node_works, quiet_nodes
from .rows import Row, say_row, say_table, write_rows
from .speed import Bench, Measured, memory, synchronize

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
VIEWS, STEPS = 8, 10  # of the timed trainings


def about() -> Row:
    """Return the machine and its software."""
    comfyui = import_module("comfyui_version").__version__
    row = {"torch": torch.__version__, "ComfyUI": comfyui, "Python": platform.python_version()}
    row |= {"system": platform.platform(terse=True)}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return {"device": torch.cuda.get_device_name(), "GB": f"{total / 1e9:.1f} ({free / 1e9:.1f} free)"} | row
    if torch.backends.mps.is_available():
        return {"device": f"Apple {platform.machine()}, MPS"} | row
    return {"device": f"CPU, {torch.get_num_threads()} threads"} | row


def parity() -> str:
    """Run the tests that compare ComfyUI's and diffusers' passes, on this device in float32; return their counts."""
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/comfy/test_parity.py"]
    done = subprocess.run(
        line, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"SLIME_FLOAT32": "1"}
    )
    counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", done.stdout.strip().splitlines()[-1])
    return ", ".join(counts) or done.stdout[-200:]


def every_node(backbone: Any, report: Callable[[Row], None]) -> None:
    """Run each node and preset once on the tiny model."""
    with tempfile.TemporaryDirectory() as folder, quiet_nodes(Path(folder)) as nodes, torch.inference_mode():
        works, _ = node_works(nodes, backbone)
        for name, work in works.items():
            start = time.perf_counter()
            try:
                work()
                synchronize()
                report({"model": "tiny", "what": name, "s": time.perf_counter() - start})
            except Exception as error:
                report({"model": "tiny", "what": name, "failed": f"{type(error).__name__}: {str(error)[:150]}"})


def costs(label: str, backbone: Any, report: Callable[[Row], None]) -> None:
    """Measure the time and memory of one model."""
    bench = Bench(label, backbone, backbone, 1, lambda row: None, 0)
    images = bench.images[:1]

    def note(what: str, ours: Measured, bound: float | None = None) -> None:
        row: Row = {"model": label, "what": what, "s": ours.seconds}
        row |= {"x_bound": ours.seconds / bound} if bound else {}
        report(row | ({"GB": ours.bytes / 1e9} if ours.bytes is not None else {}))

    def attempt(what: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            report({"model": label, "what": what, "failed": f"{type(error).__name__}: {str(error)[:150]}"})

    def learn_and_find() -> None:
        bare = bench.bare()
        note("VAE encode and UNet forward", Measured(bare))
        instant = preset("instant", backbone.info, views=VIEWS)
        note(
            f"instant, {VIEWS} views", bench.measure(lambda: bench.learn(instant), once=True, count=True), VIEWS * bare
        )
        embeddings = bench.quick_embeddings()
        note("segment 1", bench.measure(lambda: bench.find(embeddings, images), count=True), bare)
        four = bench.measure(lambda: bench.find(embeddings, bench.images[:4]), count=True)
        note("segment 4", four, 4 * bare)

    def paper(checkpointing: bool) -> Callable[[], None]:
        def work() -> None:
            loop = bench.steps(checkpointing)[1]
            with memory() as used:
                bench.learn(preset("paper", views=1, steps=1, checkpointing=checkpointing))
            both = sorted(bench.forward_backward())[1]
            note("paper, a step" + ", checkpointing" * checkpointing, Measured(loop.seconds, used.bytes), both)

        return work

    def waits() -> None:
        count = waits_in(lambda steps: bench.learn(preset("paper", views=1, steps=steps)))
        report({"model": label, "what": f"waits in {STEPS} further steps", "count": count})

    def in_part() -> None:
        embeddings = bench.quick_embeddings()
        whole = bench.find(embeddings, images)[0]
        with loaded_in_part(backbone.model):
            ours = bench.measure(lambda: bench.find(embeddings, images), once=True, count=True)
            same = float((bench.find(embeddings, images)[0] == whole).float().mean())
        note(f"segment 1, half of the model loaded, {same:.3f} of the pixels alike", ours)

    attempt("instant and segment", learn_and_find)
    attempt("paper", paper(False))
    attempt("paper, checkpointing", paper(True))
    if torch.cuda.is_available():
        attempt("waits", waits)
        attempt("loaded in part", in_part)


def waits_in(train_steps: Callable[[int], Any]) -> int:
    """Return how often the host waits for the device in STEPS further steps."""
    counts = []
    for steps in (STEPS, 2 * STEPS):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                train_steps(steps)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(one.message) for one in said))
    return counts[1] - counts[0]


@contextmanager
def loaded_in_part(patcher: Any) -> Iterator[None]:
    """Load a model as on a card that holds half of it: the rest is loaded layer by layer."""
    import comfy.model_management as management

    management.unload_all_models()
    reserved = management.EXTRA_RESERVED_VRAM
    free = management.get_free_memory(management.get_torch_device())
    wanted = management.minimum_inference_memory() + patcher.model_size() / 2
    management.EXTRA_RESERVED_VRAM = max(0, int(free - wanted))
    try:
        yield
    finally:
        management.EXTRA_RESERVED_VRAM = reserved
        management.unload_all_models()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the demo model alone, no parity tests")
    parser.add_argument("--models", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["float16", "bfloat16"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import_comfyui()
    load_extension()
    start, head, rows = time.perf_counter(), about(), []
    if not torch.cuda.is_available() and not options.quick:
        parser.error("there is no CUDA device; --quick runs the demo model on what there is.")

    def report(row: Row) -> None:
        rows.append(row)
        say_row(row)
        write_rows(options.json, rows, **head)

    tiny = load_backbone(MODEL)
    every_node(tiny, report)
    costs("tiny", tiny, report)
    if not options.quick:
        counts = parity()
        failed = {"failed": counts} if re.search("failed|error", counts) else {}
        report({"model": "random", "what": f"parity tests: {counts}"} | failed)
        for dtype, name in itertools.product(options.dtypes, options.models):
            costs(f"{name}, {dtype}", random_backbone(name, DTYPES[dtype]), report)
            torch.cuda.empty_cache()
    lines = [
        [row["model"], row["what"], *(f"{row[k]:.3g}" if k in row else "" for k in ("s", "x_bound", "GB", "count")),
         row.get("failed", "")]
        for row in rows
    ]  # fmt: skip
    title = ", ".join(f"{name} {value}" for name, value in head.items()) + f"; {time.perf_counter() - start:.0f} s"
    say_table(["model", "", "s", "x bare passes", "GB beyond the weights", "count", "failed"], lines, title)
    raise SystemExit(1 if any("failed" in row for row in rows) else 0)


if __name__ == "__main__":
    main()
