"""Hostile files and texts, simultaneous saves, and a full disk."""

from __future__ import annotations

import base64
import json
import pickle
import random
import subprocess
import sys
import zlib
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from slime import Example, from_text, load_embeddings, preset, save_embeddings, to_text, train
from slime.paper.files import import_official
from testing.inprocess import NAME
from testing.toy import ToyUNet, all_vectors

from .trials import Trials


def mutated(data: bytes, rng: random.Random, within: int) -> bytes:
    """Return data with a few bytes changed, cut out, doubled or inserted, or with everything after a place cut off."""
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
    """Train embeddings on a toy model in a moment."""
    labels = torch.zeros(64, 64, dtype=torch.int64)
    labels[20:40, 20:40] = 1
    example = Example.from_label_map(torch.rand(64, 64, 3), labels, ["square"])
    return train(ToyUNet(), [example], preset("instant", views=1))


def files(trials: Trials, count: int, rng: random.Random, folder: Path) -> None:
    """Load mutated embeddings files; half of the changes are in the JSON header."""
    path = folder / "a.safetensors"
    raw = save_embeddings(small_embeddings(), path).read_bytes()
    header = int.from_bytes(raw[:8], "little")
    for index in range(count):
        data = mutated(raw, rng, 8 + header if index % 2 else len(raw))
        if index % 4 == 1:  # keep the header's length valid, so that its content is parsed
            body = mutated(raw[8 : 8 + header], rng, header)
            data = len(body).to_bytes(8, "little") + body + raw[8 + header :]
        path.write_bytes(data)
        trials.run(str(index), lambda: load_embeddings(path))


def texts(trials: Trials, count: int, rng: random.Random, folder: Path) -> None:
    """Load mutated texts, some of which can be decompressed."""
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
    """Parse mutated texts of the painter, as the node does."""
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
    """Import files with the names of the official code's token embeddings and arbitrary content."""
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


def savers(trials: Trials, count: int, rng: random.Random, folder: Path) -> None:
    """Save the same file from several processes at once."""
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
    trials.check("the file is damaged", torch.equal(all_vectors(load_embeddings(path)), all_vectors(learned)))
    trials.check("scratch is left", len(list(folder.iterdir())) == 2)


def disk(trials: Trials, count: int, rng: random.Random, folder: Path) -> None:
    """Save beyond a limit on the size of files: the old file must stay, and nothing else may be left."""
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
