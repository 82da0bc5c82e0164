"""Nothing breaks it: hostile files, faults in the middle, a result that is never lost. One test for every way found."""

from __future__ import annotations

import ast
import json
import os
import random
import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch.utils.checkpoint import checkpoint

from benchmarks import faults
from benchmarks.faults.trials import Trials
from slime import Example, PaperSettings, SlimeError, load_embeddings, preset, save_embeddings, segment, train
from slime.files import SCRATCH
from slime.paper.files import import_official
from testing.code import imported, sources
from testing.nodes import train_settings
from testing.toy import ToyUNet, all_vectors, toy_example


@pytest.fixture(scope="module")
def learned():
    return train(ToyUNet(), [toy_example(0)], preset("instant", views=2))


@pytest.fixture(scope="module")
def raw(learned, tmp_path_factory) -> bytes:
    return save_embeddings(learned, tmp_path_factory.mktemp("raw") / "a.safetensors").read_bytes()


def changed(raw: bytes, change, tensors=None) -> bytes:
    """The file with its JSON body changed."""
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    body = json.loads(header["embeddings"])
    change(body)
    return save_bytes(load_bytes(raw) | (tensors or {}), metadata=header | {"embeddings": json.dumps(body)})


def test_a_loaded_file_may_change_afterwards(learned, tmp_path) -> None:
    path = save_embeddings(learned, tmp_path / "a.safetensors")
    loaded = load_embeddings(path)
    with open(path, "r+b") as file:  # in place: memory-mapped tensors would change, or kill the process
        file.truncate(0)
    assert torch.equal(all_vectors(loaded), all_vectors(learned))


HOSTILE = {
    "temperature": lambda b: b["decoder"].update(temperature=10**9),
    "temperature NaN": lambda b: b["decoder"].update(temperature=float("nan")),
    "kind": lambda b: b["decoder"].update(kind="magic"),
    "side": lambda b: b.update(side=20_000),
    "side text": lambda b: b.update(side="512"),
    "timestep": lambda b: b.update(timestep=-1),
    "timestep infinite": lambda b: b.update(timestep=float("inf")),
    "names": lambda b: b.update(names=["a\nb", "c"]),
    "names number": lambda b: b.update(names=[1, 2]),
    "names missing": lambda b: b.pop("names"),
    "palette": lambda b: b.update(palette=[[300, 0, 0]]),
    "palette short": lambda b: b.update(palette=[[0, 0]]),
    "layers form": lambda b: b["layers"].update(read=["../../etc"]),
    "layers many": lambda b: b["layers"].update(read=["output.3.0"] * 5000),
    "layers text": lambda b: b.update(layers="output"),
    "mode": lambda b: b.update(mode="other"),
    "grouping": lambda b: b.update(grouping="head"),
    "prompt": lambda b: b.update(prompt="x" * 100_000),
    "example confidence": lambda b: b.update(example_confidence=float("inf")),
    "losses": lambda b: b.update(losses=["a"]),
    "settings": lambda b: b.update(settings=3),
    "backbone": lambda b: b.update(backbone=None),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_fields_are_refused_at_load_by_name(raw, tmp_path, name) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(changed(raw, HOSTILE[name]))
    start = time.monotonic()
    with pytest.raises(SlimeError, match="damaged at"):
        load_embeddings(path)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("vectors/stride2", torch.full((2, 12), torch.nan)),
        ("vectors/stride2", torch.zeros(5, 12)),
        ("vectors/stride2", torch.zeros(12)),
        ("condition/context", torch.zeros(77, 13)),
        ("condition/context", torch.zeros(77)),
        ("condition/context", torch.zeros(0, 12)),
        ("condition/context", torch.full((77, 12), torch.inf)),
        ("condition/context", torch.zeros(77, 12, dtype=torch.int64)),
        ("condition/pooled", torch.zeros(2, 2)),
    ],
)
def test_hostile_tensors_are_refused_at_load(raw, tmp_path, name, tensor) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(changed(raw, lambda body: None, {name: tensor}))
    with pytest.raises(SlimeError, match=f'damaged at "({name.split("/")[-1]}|vectors)"'):
        load_embeddings(path)


@pytest.mark.parametrize("header", ["[" * 100_000, '"x"', "[]", "{", '{"__metadata__": 3}'])
def test_hostile_headers_are_refused(tmp_path, header) -> None:
    path = tmp_path / "a.safetensors"
    data = header.encode()
    path.write_bytes(len(data).to_bytes(8, "little") + data)
    with pytest.raises(SlimeError):
        load_embeddings(path)


@pytest.mark.parametrize("version", ["\u00b2", "", "-1", "1e3", "9" * 5000])
def test_odd_versions_are_refused(raw, tmp_path, version) -> None:
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    (tmp_path / "a.safetensors").write_bytes(save_bytes(load_bytes(raw), metadata=header | {"version": version}))
    with pytest.raises(SlimeError, match="update SLiMe"):
        load_embeddings(tmp_path / "a.safetensors")


def test_layers_timesteps_and_widths_that_the_model_lacks_are_named(learned) -> None:
    toy, image = ToyUNet(), toy_example(1).image[None]
    other = replace(learned, layers=learned.layers._replace(read=("output.99.0",)))
    with pytest.raises(SlimeError, match="output.99.0, which the connected model lacks"):
        segment(toy, image, other)
    for wrong in (replace(learned, timestep=5000), replace(learned, condition={"context": torch.zeros(77, 20)})):
        with pytest.raises(SlimeError, match="does not fit this model"):
            segment(toy, image, wrong)


@pytest.mark.parametrize(
    ("task", "count"), [("files", 300), ("texts", 100), ("paintings", 200), ("official", 20), ("disk", 2)]
)
@pytest.mark.long
def test_the_standing_proof_in_short(extension, task, count) -> None:
    """Of ``benchmark faults``: no other exception than ours, nothing slow or large, nothing left behind."""
    trials = faults.run(task, count)
    assert not trials.failures and trials.count >= count


@pytest.mark.long
def test_interrupts_of_a_server_leave_everything_as_it_was(server) -> None:
    at = faults.server.Client(server)
    at.learn()
    trials = Trials("interrupts")
    faults.server.interrupt(trials, 2, random.Random(0), at)
    assert not trials.failures and trials.count == 2 and trials.refused


@pytest.mark.long
def test_an_error_in_the_middle_of_any_node_leaves_the_model_as_it_was(extension) -> None:
    trials = faults.run("errors", 1)
    assert not trials.failures and trials.count == trials.refused == len(faults.nodes.QUICK)


def test_an_interrupted_checkpointed_step_leaves_no_hooks_behind() -> None:
    class Interrupted(ToyUNet):
        broken = True

        def predict_noise(self, noisy, timestep, context, capture):
            def inner(x: torch.Tensor) -> torch.Tensor:
                if self.broken:
                    raise KeyboardInterrupt
                return x

            if noisy.requires_grad or context.tokens.requires_grad:
                noisy = checkpoint(inner, noisy, use_reentrant=False)
            return super().predict_noise(noisy, timestep, context, capture)

    toy, settings = Interrupted(), PaperSettings(views=1, steps=2, checkpointing=True)
    with torch.inference_mode():
        with pytest.raises(KeyboardInterrupt) as held:
            train(toy, [toy_example(0)], settings)
        assert held.tb is not None  # a debugger, a log or ComfyUI's history holds it just so
        toy.broken = False
        assert torch.isfinite(all_vectors(train(toy, [toy_example(0)], settings))).all()


def test_out_of_memory_before_the_first_pass_is_named() -> None:
    class Full(ToyUNet):
        def predict_noise(self, *args):
            raise torch.OutOfMemoryError("no memory")

    with pytest.raises(SlimeError, match="Out of GPU memory"):
        train(Full(), [toy_example(0)], preset("instant", views=2))


def test_images_of_another_range_are_refused_everywhere(learned) -> None:
    toy, bright = ToyUNet(), toy_example(1).image[None] * 255
    for call in (
        lambda: segment(toy, bright, learned),
        lambda: Example.from_label_map(bright[0], toy_example(1).labels, ["a", "b"]),
    ):
        with pytest.raises(SlimeError, match=r"must lie in \[0, 1\]; got"):
            call()


def test_two_savers_a_killed_one_and_a_link(learned, tmp_path) -> None:
    path, errors = tmp_path / "a.safetensors", []
    (tmp_path / "mine.partial").write_text("a user's own")
    left = tmp_path / f".killed{SCRATCH}"
    left.write_text("half")
    os.utime(left, (1, 1))

    def save() -> None:
        try:
            for _ in range(10):
                save_embeddings(learned, path, overwrite=True)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=save) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and torch.equal(all_vectors(load_embeddings(path)), all_vectors(learned))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "mine.partial"]
    link = tmp_path / "link.safetensors"
    try:
        link.symlink_to(path)
    except OSError:
        pytest.skip("no rights for links")
    save_embeddings(learned, link, overwrite=True)
    assert link.is_symlink() and torch.equal(all_vectors(load_embeddings(path)), all_vectors(learned))


def test_a_full_disk_leaves_the_old_file_and_no_scratch(learned, tmp_path, monkeypatch) -> None:
    path = save_embeddings(learned, tmp_path / "a.safetensors")

    def full(*_args) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SlimeError, match="could not be written: No space"):
        save_embeddings(learned, path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"] and load_embeddings(path).names == learned.names


class SD2(ToyUNet):
    def __init__(self) -> None:
        super().__init__("sd2")


@pytest.mark.parametrize(
    "content", [{"a": 1}, "text", [1.0], torch.full((1, 1, 1024), torch.nan), torch.zeros(1024).to_sparse(), 3]
)
def test_official_files_of_any_other_content_are_refused(tmp_path, content) -> None:
    torch.save(content, tmp_path / "embedding_0.pth")
    with pytest.raises(SlimeError, match="embedding_0.pth"):
        import_official(tmp_path, ["wheel"], SD2())


def test_official_files_of_odd_names_do_not_count(tmp_path) -> None:
    torch.save(torch.zeros(1024), tmp_path / "embedding_x.pth")
    with pytest.raises(SlimeError, match="0 embedding files but 1 names"):
        import_official(tmp_path, ["wheel"], SD2())


def test_a_layer_that_overflows_is_not_chosen() -> None:
    class Overflowing(ToyUNet):
        def __init__(self) -> None:
            super().__init__()
            self.w_q["output.3.0"] = self.w_q["output.3.0"] * torch.inf

    auto = preset("instant", views=4, read_layers="auto")
    assert "output.3.0" not in train(Overflowing(), [toy_example(0)], auto).layers.read

    class Broken(ToyUNet):
        def __init__(self) -> None:
            super().__init__()
            self.w_q = {name: weight * torch.nan for name, weight in self.w_q.items()}

    with pytest.raises(SlimeError, match="NaN or infinite"):
        train(Broken(), [toy_example(0)], auto)


def test_a_mask_that_covers_everything_says_so() -> None:
    example = Example.from_masks(toy_example(0).image, {"all": torch.ones(128, 128)})
    with pytest.raises(SlimeError, match="Every pixel of the examples belongs to a part"):
        train(ToyUNet(), [example])


# ------------------------------------------------------------------------------------------------------------- nodes


@pytest.fixture
def nodes(extension, monkeypatch):
    import slime_extension.nodes.train as module
    from comfy_api.latest import ui

    monkeypatch.setattr(ui, "PreviewImage", lambda *a, **k: None)
    monkeypatch.setattr(module, "build_backbone", lambda *a: ToyUNet())
    monkeypatch.setattr(module.SLiMeTrain, "hidden", type("Hidden", (), {"unique_id": "1"}), raising=False)
    return module


def run(nodes, **widgets):
    chosen = widgets.pop("preset", "instant")
    values = {"views": 2} | ({"steps": 5} if chosen == "paper" else {})
    values |= {name: widgets.pop(name) for name in ("steps", "views") if name in widgets}
    settings = train_settings(chosen, **values)
    return nodes.SLiMeTrain.execute((toy_example(0),), chosen, settings=settings, **widgets)


def broken(*_args, **_kwargs):
    raise RuntimeError("no picture")


def test_a_preview_that_fails_costs_no_training(nodes, monkeypatch, caplog) -> None:
    for name, chosen in (("refine_maps", "instant"), ("segment", "paper")):
        monkeypatch.setattr(nodes, name, broken)
        embeddings, _, preview = run(nodes, preset=chosen).args
        assert embeddings.names == ("red", "blue") and torch.allclose(preview[0], toy_example(0).image, atol=1 / 255)
    assert "training succeeded, but the preview failed" in caplog.text


def test_cancel_in_the_preview_saves_what_was_learned(nodes, monkeypatch, tmp_path) -> None:
    import comfy.model_management as management

    def cancelled(*_args, **_kwargs):
        raise management.InterruptProcessingException

    said: list[str] = []
    monkeypatch.setattr(nodes, "refine_maps", cancelled)
    monkeypatch.setattr(nodes, "autosave_path", lambda names: tmp_path / "auto.safetensors")
    monkeypatch.setattr(nodes.TrainingProgress, "show_text", lambda self, text: said.append(text))
    with pytest.raises(management.InterruptProcessingException):
        run(nodes)
    assert said[0].startswith("Encoding") and said[-1].endswith("auto.safetensors")
    assert load_embeddings(tmp_path / "auto.safetensors").names == ("red", "blue")


def test_a_preview_that_cannot_be_shown_saves_what_was_learned(nodes, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(nodes.TrainingProgress, "show", broken)
    monkeypatch.setattr(nodes, "autosave_path", lambda names: tmp_path / "auto.safetensors")
    with pytest.raises(RuntimeError, match="no picture"):
        run(nodes)
    assert load_embeddings(tmp_path / "auto.safetensors").names == ("red", "blue")


def test_an_autosave_that_fails_does_not_hide_the_outcome(nodes, monkeypatch) -> None:
    monkeypatch.setattr(nodes, "save_embeddings", broken)

    def stop(*_args) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(nodes, "_preview", stop)
    with pytest.raises(KeyboardInterrupt):
        run(nodes)


@pytest.mark.parametrize("name", ["CON", "nul.safetensors", "com1", "x" * 200, "a\ud800", "trailing."])
def test_file_names_that_some_system_refuses(nodes, name) -> None:
    from slime_extension.nodes import files

    with pytest.raises(SlimeError, match="file name"):
        files.save_path(name, overwrite=False)


def test_autosave_names_are_short_in_any_script(nodes, monkeypatch, tmp_path) -> None:
    from slime_extension.nodes import files

    monkeypatch.setattr(files, "_folder", lambda: tmp_path)
    path = files.autosave_path(["\u8f6e\u5b50" * 50, "b"])
    assert len(path.name.encode()) < 130


def painting(width, height, runs="AAAA", **more) -> str:
    return json.dumps({"version": 1, "image": None, "parts": [{"name": "a", "color": "#112233"}], "width": width,
                       "height": height, "runs": runs} | more)  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        painting(50_000, 60_000, "AIC8g6AL"),
        painting(30_000, 30_000, "AYDSk60D"),
        painting(10**6, 10**6),
        painting(-1, 5),
        painting(4.5, 2),
        painting("4", 4),
        painting(4, 4, "AP//////////////////////////"),
        painting(4, 4, parts=[{"name": 3, "color": "#112233"}]),
        painting(4, 4, parts=[{"name": "a", "color": "#11223"}]),
        painting(4, 4, parts=[{"name": "a", "color": "#112233"}] * 256),
        painting(4, 4, image={"subfolder": 1, "name": [], "type": {}}),
        painting(4, 4, image={"subfolder": "", "name": "a\0.png", "type": "input"}),
        "[" * 100_000,
        painting(4, 4, "A" * 2**25),
    ],
)
def test_hostile_paintings_are_refused_before_anything_is_made(extension, text) -> None:
    import tracemalloc

    from slime_extension.nodes import painter

    painter.SLiMePartPainter.fingerprint_inputs(text)
    tracemalloc.start()
    start = time.monotonic()
    with pytest.raises(SlimeError):
        painter.Painting.parse(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.monotonic() - start < 2 and peak < 50e6


def test_the_painter_keeps_to_comfyuis_folders(extension, tmp_path, monkeypatch) -> None:
    import folder_paths
    from slime_extension.nodes import painter

    private, inside = tmp_path / "private", tmp_path / "input"
    private.mkdir()
    inside.mkdir()
    Image.new("RGB", (40, 40)).save(private / "secret.png")
    (inside / "text.png").write_text("no image")
    (inside / "folder.png").mkdir()
    monkeypatch.setattr(folder_paths, "input_directory", str(inside))
    escapes = ["../private/secret.png"]
    try:
        (inside / "link.png").symlink_to(private / "secret.png")
        escapes.append("link.png")
    except OSError:
        pass
    for name in escapes:
        with pytest.raises((SlimeError, ValueError), match="outside|invalid|[Pp]ath"):
            painter.image_file(f"{name} [input]")
    for name, message in (("text.png", "cannot be read as an image"), ("folder.png", "no longer exists")):
        saved = painting(4, 4, "", image={"subfolder": "", "name": name, "type": "input"})
        with pytest.raises(SlimeError, match=message):
            painter.SLiMePartPainter.execute(saved)


def test_the_extension_neither_connects_nor_runs_commands() -> None:
    """Of what is published, no module imports what could; of aiohttp only what answers ComfyUI's own page."""
    forbidden = {
        "subprocess",
        "socket",
        "urllib",
        "requests",
        "http",
        "httpx",
        "aiohttp",
        "ctypes",
        "pickle",
        "marshal",
    }
    for folder in ("slime", "nodes"):
        for path, tree in sources(folder):
            # urllib.parse takes addresses apart, and opens none.
            names = {name.split(".")[0] for name in imported(tree) if not name.startswith("urllib.parse")} & forbidden
            answers = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "aiohttp"]
            assert names <= {"aiohttp"} and all([a.name for a in node.names] == ["web"] for node in answers), path
            assert ("aiohttp" in names) == bool(answers) and (not answers or path == "nodes/routes.py"), path
            calls = {
                node.func.id
                for node in ast.walk(tree)
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            }
            assert not calls & {"eval", "exec", "compile", "__import__"}, path
            attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            assert not attributes & {"system", "popen"}, path


def test_every_promise_names_a_test_that_is_there() -> None:
    root = Path(__file__).resolve().parents[1]
    documents = ("SECURITY.md", "docs/claims.md")
    text = "".join((root.parent / document).read_text(encoding="utf-8") for document in documents)
    promised = set(re.findall(r"`(test_\w+)`", text))
    written = "\n".join(path.read_text(encoding="utf-8") for path in root.rglob("test_*.py"))
    assert len(promised) > 10 and all(f"def {name}(" in written for name in promised)
