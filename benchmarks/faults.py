"""Nothing breaks it: hostile files, errors in the middle of every node, two savers, a full disk.

    python dev.py benchmark faults [--quick] [--seed 0] [--json FILE] [--tasks files texts paintings official errors
        savers disk]

Each trial must end in success or in a SlimeError within 2 s and 200 MB, and leave everything as it was. Exits 1 and
names every trial that did not. With ``--quick`` a tenth of the trials; the test suite runs a part of them.
"""

from __future__ import annotations

import argparse
import json
import pickle
import random
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from slime import SlimeError, from_text, load_embeddings, preset, save_embeddings, to_text, train
from slime.official_files import import_official
from testing import splits
from testing.inprocess import NAME, load_backbone
from testing.server import MODEL
from testing.toy_unet import ToyUNet

from .rows import Row, say_row, say_table, write_rows

SECONDS, BYTES = 2.0, 200e6
SHARE = 6  # nodes of a run with one error each
TRIALS = {"files": 10_000, "texts": 3_000, "paintings": 1_000, "official": 100, "errors": 50, "savers": 20, "disk": 20}


class Trials:
    """Counts trials, the slowest and the largest, and keeps what went wrong."""

    def __init__(self, task: str) -> None:
        self.task, self.count, self.refused, self.slowest, self.largest = task, 0, 0, 0.0, 0
        self.failures: list[str] = []

    def run(self, name: str, work: Callable[[], Any]) -> None:
        """One trial; ``name`` finds it again."""
        self.count += 1
        tracemalloc.start()
        start = time.monotonic()
        try:
            work()
        except SlimeError:
            self.refused += 1
        except Exception as error:
            self.failures.append(f"{self.task} {name}: {type(error).__name__}: {str(error)[:200]}")
        seconds, peak = time.monotonic() - start, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        if seconds > SECONDS or peak > BYTES:
            self.failures.append(f"{self.task} {name}: {seconds:.1f} s, {peak / 1e6:.0f} MB")
        self.slowest, self.largest = max(self.slowest, seconds), max(self.largest, peak)

    def check(self, name: str, holds: bool) -> None:
        """Something that must hold after a trial."""
        if not holds:
            self.failures.append(f"{self.task} {name}")

    def row(self) -> Row:
        return {
            "task": self.task,
            "trials": self.count,
            "refused": self.refused,
            "failures": len(self.failures),
            "slowest_s": self.slowest,
            "largest_MB": self.largest / 1e6,
        }


def mutated(data: bytes, rng: random.Random, within: int) -> bytes:
    """A few bytes changed, cut out, doubled, or everything after a place cut off."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(min(len(changed), within) or 1)
        length = rng.randint(1, 40)
        action = rng.randrange(5)
        if action == 0 and changed:
            changed[at] = rng.randrange(256)
        elif action == 1:
            del changed[at : at + length]
        elif action == 2:
            changed[at:at] = changed[at : at + length]
        elif action == 3:
            changed[at:at] = rng.choice(
                [b"1e999", b"-1", b"null", b"[[[[", b"{}", b'"x"', b"99999999999", b"NaN", b"\\u0000"]
            )
        elif rng.random() < 0.1:
            del changed[at:]
    return bytes(changed)


def small_embeddings() -> Any:
    """Of a toy, in a moment."""
    labels = torch.zeros(64, 64, dtype=torch.int64)
    labels[20:40, 20:40] = 1
    from slime import Example

    example = Example.from_label_map(torch.rand(64, 64, 3), labels, ["square"])
    return train(ToyUNet(), [example], preset("instant", views=1, steps=2))


def files(trials: Trials, count: int, rng: random.Random, folder: Path) -> None:
    """Mutated embeddings files; half of the changes lie in the JSON."""
    path = folder / "a.safetensors"
    raw = save_embeddings(small_embeddings(), path).read_bytes()
    header = int.from_bytes(raw[:8], "little")
    for index in range(count):
        data = mutated(raw, rng, 8 + header if index % 2 else len(raw))
        if index % 4 == 1:  # keep the header's length true, so that its content is reached
            body = mutated(raw[8 : 8 + header], rng, header)
            data = len(body).to_bytes(8, "little") + body + raw[8 + header :]
        path.write_bytes(data)
        trials.run(str(index), lambda: load_embeddings(path))


def texts(trials: Trials, count: int, rng: random.Random, folder: Path) -> None:
    """Mutated texts, of which some unpack."""
    import base64
    import zlib

    text = to_text(small_embeddings())
    packed = zlib.decompress(base64.b64decode(text[7:]))
    for index in range(count):
        if index % 2:
            inner = zlib.compress(mutated(packed, rng, len(packed)))
            changed = text[:7] + base64.b64encode(inner).decode()
        else:
            changed = mutated(text.encode(), rng, len(text)).decode("utf-8", "replace")
        trials.run(str(index), lambda: from_text(changed))  # noqa: B023


def paintings(trials: Trials, count: int, rng: random.Random, folder: Path) -> None:
    """Mutated texts of the painter, read as the node does."""
    from importlib import import_module

    painter = import_module(f"{NAME}.nodes.painter")
    parts = [{"name": "wheel", "color": "#e6194b"}, {"name": "window", "color": "#3cb44b"}]
    image = {"subfolder": "slime", "name": "car.png", "type": "input"}
    saved = {"version": 1, "image": image, "parts": parts, "width": 60, "height": 40, "runs": "AIACAYAEAOAM"}
    text = json.dumps(saved).encode()
    sizes = (0, 1, -5, 10**6, 10**12, 50_000, 60_000, 1.5, "7", None)
    for index in range(count):
        changed = mutated(text, rng, len(text)).decode("utf-8", "replace")
        if index % 3 == 0:
            changed = json.dumps(saved | {"width": rng.choice(sizes), "height": rng.choice(sizes)})

        def read(changed: str = changed) -> None:
            painter.SLiMePartPainter.fingerprint_inputs(changed)
            painter.Painting.parse(changed)

        trials.run(str(index), read)


def official(trials: Trials, count: int, rng: random.Random, folder: Path) -> None:
    """Files named as the official code names its rows, with anything in them."""
    good = folder / "good.pth"
    torch.save(torch.zeros(1, 1, 1024), good)
    raw = good.read_bytes()
    contents = [
        {"a": 1},
        "text",
        3,
        [torch.zeros(2)],
        torch.zeros(0),
        torch.zeros(1024).to_sparse(),
        torch.ones(5).bool(),
    ]
    for index in range(count):
        path = folder / "embedding_0.pth"
        if index % 3 == 0:
            torch.save(contents[index // 3 % len(contents)], path)
        else:
            path.write_bytes(mutated(raw, rng, len(raw)) if index % 3 == 1 else pickle.dumps(contents[0]))
        trials.run(str(index), lambda: import_official(folder, ["wheel"], ToyUNet("sd2")))


class Injected(RuntimeError):
    """The error that is put into the middle of something."""


class RaiseAt(TorchDispatchMode):
    """Raises at the operation of this number; with none it counts."""

    def __init__(self, number: int | None = None) -> None:
        super().__init__()
        self.number, self.count = number, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.number:
            raise Injected(f"at operation {self.number}, {func}")
        return func(*args, **(kwargs or {}))


@contextmanager
def quiet_nodes(folder: Path) -> Iterator[dict[str, Any]]:
    """The nodes' classes, callable here: previews go to a folder of their own."""
    from importlib import import_module
    from types import SimpleNamespace

    import folder_paths

    folder_paths.set_temp_directory(str(folder))
    folder_paths.set_output_directory(str(folder))
    import_module(f"{NAME}.nodes.files").register_folder()
    folder_paths.folder_names_and_paths["slime"] = ([str(folder)], {".safetensors"})
    module = import_module(f"{NAME}.nodes.extension")
    module.SLiMeTrain.hidden = SimpleNamespace(unique_id=None, prompt=None, extra_pnginfo=None)
    yield vars(module)


def errors(trials: Trials, count: int, rng: random.Random, folder: Path) -> None:
    """An error at random operations of every node; afterwards the model is as it was, and works."""
    backbone = load_backbone(MODEL)
    model, vae, clip = backbone.model, backbone.vae, backbone.clip
    example = splits.example("car", splits.TEACH)
    image = splits.example("car", splits.TEST).image[None]
    with quiet_nodes(folder) as nodes, torch.inference_mode():

        def teach(name: str, **more: Any) -> Any:
            widgets = {"steps": 2, "learning_rate": 0.0, "seed": 0, "views": 2} | more
            return nodes["SLiMeTrain"].execute(model, vae, clip, (example,), name, **widgets).args

        learned = teach("instant", views=8, steps=30)[0]
        parts = nodes["SLiMeSegment"].execute(model, vae, learned, image).args[0]
        look = nodes["SLiMeLook"].execute(model, vae, learned, image).args[0]
        truth = (example.labels == 4).float()[None]
        works: dict[str, Callable[[], Any]] = {
            "train instant": lambda: teach("instant"),
            "train instant, auto": lambda: teach("instant", cross_layers="auto"),
            "train paper": lambda: teach("paper"),
            "train paper, checkpointing": lambda: teach("paper", checkpointing=True),
            "segment": lambda: nodes["SLiMeSegment"].execute(model, vae, learned, image),
            "segment, zoom": lambda: nodes["SLiMeSegment"].execute(model, vae, learned, image, zoom=1),
            "look": lambda: nodes["SLiMeLook"].execute(model, vae, learned, image),
            "read parts": lambda: nodes["SLiMeReadParts"].execute(look, learned),
            "part mask": lambda: nodes["SLiMePartMask"].execute(parts, "wheel", "soft", grow=3, feather=2),
            "part list": lambda: nodes["SLiMePartList"].execute(parts),
            "part boxes": lambda: nodes["SLiMePartBoxes"].execute(parts),
            "part segs": lambda: nodes["SLiMePartSegs"].execute(parts),
            "overlay": lambda: nodes["SLiMeOverlay"].execute(parts),
            "steady": lambda: nodes["SLiMeSteadyParts"].execute(parts),
            "evaluate": lambda: nodes["SLiMeEvaluate"].execute(parts, truth, "wheel"),
            "example": lambda: nodes["SLiMeExample"].execute(image, truth, "wheel"),
            "save": lambda: nodes["SLiMeSaveEmbeddings"].execute(learned, "x", True),
            "to text": lambda: nodes["SLiMeEmbeddingsToText"].execute(learned),
            "merge": lambda: nodes["SLiMeEmbeddingsMerge"].execute(learned, None, "wheel = tyre"),
        }
        if count == 1:  # the test suite's share
            works = {name: works[name] for name in rng.sample(list(works), SHARE)}
        before = _state(backbone)
        labels = parts.maps.label_map.clone()
        for name, work in works.items():
            with RaiseAt() as counting:
                work()
            numbers = range(1, counting.count + 1)
            for number in sorted(rng.sample(numbers, min(count, len(numbers)))):
                trials.count += 1
                try:
                    with RaiseAt(number):
                        work()
                except (Injected, SlimeError):
                    trials.refused += 1
                except Exception as error:
                    trials.failures.append(f"errors {name} at {number}: {type(error).__name__}: {str(error)[:200]}")
                trials.check(f"{name} at {number}: the model is not as it was", _state(backbone) == before)
            again = nodes["SLiMeSegment"].execute(model, vae, learned, image).args[0].maps.label_map
            trials.check(f"after {name}: segmentation differs", torch.equal(again, labels))


def _state(backbone: Any) -> tuple[Any, ...]:
    """Identity of every weight, of every function that may be replaced, and torch's modes."""
    modules = list(backbone.model.model.modules())
    weights = tuple(
        (id(p), p.requires_grad) for module in modules for p in module._parameters.values() if p is not None
    )
    replaced = tuple(name for module in modules for name in vars(module) if name == "forward")
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return weights, replaced, hooks is None, torch.is_inference_mode_enabled(), torch.is_grad_enabled()


def savers(trials: Trials, count: int, rng: random.Random, folder: Path) -> None:
    """Processes that save the same file at once."""
    path = folder / "a.safetensors"
    learned = small_embeddings()
    save_embeddings(learned, path)
    (folder / "source.safetensors").write_bytes(path.read_bytes())
    code = (
        "import sys; from slime import load_embeddings, save_embeddings; e = load_embeddings(sys.argv[1]);"
        "[save_embeddings(e, sys.argv[2], overwrite=True) for _ in range(int(sys.argv[3]))]"
    )
    line = [sys.executable, "-c", code, str(folder / "source.safetensors"), str(path), str(count)]
    running = [subprocess.Popen(line, stderr=subprocess.PIPE) for _ in range(2)]
    for index, process in enumerate(running):
        said = process.communicate()[1].decode()
        trials.count += count
        trials.check(f"saver {index}: {said[-200:]}", process.returncode == 0)
    trials.check("the file is damaged", torch.equal(load_embeddings(path).rows, learned.rows))
    trials.check("scratch is left", len(list(folder.iterdir())) == 2)


def disk(trials: Trials, count: int, rng: random.Random, folder: Path) -> None:
    """A limit on the size of files, which a save runs into: the old file stays, and nothing else is left."""
    if sys.platform == "win32":
        return
    path = folder / "a.safetensors"
    learned = small_embeddings()
    raw = save_embeddings(learned, path).read_bytes()
    code = (
        "import resource, signal, sys; from slime import load_embeddings, save_embeddings; "
        "e = load_embeddings(sys.argv[1]); signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2); "
        "save_embeddings(e, sys.argv[1], overwrite=True)"
    )
    for _ in range(count):
        limit = rng.randrange(len(raw))
        done = subprocess.run(
            [sys.executable, "-c", code, str(path), str(limit)], capture_output=True, text=True, check=False
        )
        trials.count += 1
        trials.check(f"limit {limit}: no error", "File too large" in done.stderr)
        trials.check(f"limit {limit}: the old file is not there", path.read_bytes() == raw)
        trials.check(f"limit {limit}: scratch is left", [p.name for p in folder.iterdir()] == ["a.safetensors"])


TASKS: dict[str, Callable[[Trials, int, random.Random, Path], None]] = {
    "files": files,
    "texts": texts,
    "paintings": paintings,
    "official": official,
    "errors": errors,
    "savers": savers,
    "disk": disk,
}


def run(task: str, count: int, seed: int = 0) -> Trials:
    """All trials of a task, in a folder of its own."""
    trials = Trials(task)
    with tempfile.TemporaryDirectory() as folder:
        TASKS[task](trials, count, random.Random(f"{task}/{seed}"), Path(folder))  # noqa: S311
    return trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--quick", action="store_true", help="a tenth of the trials")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from testing.inprocess import import_comfyui, load_extension

    import_comfyui()
    load_extension()
    rows, failures = [], []
    for task in options.tasks:
        trials = run(task, max(1, TRIALS[task] // (10 if options.quick else 1)), options.seed)
        rows.append(trials.row())
        say_row(rows[-1])
        failures += trials.failures
        write_rows(options.json, rows)
    head = ["task", "trials", "refused", "failures", "slowest, s", "largest, MB"]
    say_table(head, [[str(v) if isinstance(v, str | int) else f"{v:.2f}" for v in row.values()] for row in rows])
    for failure in failures:
        sys.stdout.write(f"failed: {failure}\n")
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
