"""PartEmbeddings: file, compact text, and what is refused."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from slime import from_text, load_embeddings, save_embeddings, to_text
from slime.backbones.layers import Layer, LayerChoice
from slime.backbones.text import Context
from slime.embeddings import PartEmbeddings
from slime.errors import SlimeError
from slime.official_files import import_official
from slime.parts.palette import default_palette
from slime.read_out import Official, Propagated
from tests.toy import ToyUNet

GOLDEN = Path(__file__).with_name("golden")


def embeddings(parts: int = 2, dim: int = 768, groups: int = 2, **changes) -> PartEmbeddings:
    g = torch.Generator().manual_seed(0)
    values = {
        "names": tuple(f"part {i}" for i in range(parts)),
        "rows": torch.randn(groups, parts, dim, generator=g),
        "condition": {"context": torch.randn(77, dim, generator=g).half()},
        "prompt": "part",
        "backbone": "sd1",
        "layers": LayerChoice(("output.3.0",), ("output.9.0",)),
        "timestep": 80,
        "side": 512,
        "read_out": Propagated(2, 0.25),
        "losses": (1.0, 0.5),
    }
    return PartEmbeddings(**(values | changes))


def test_file_round_trip(tmp_path) -> None:
    before = embeddings()
    before = replace(before, condition={**before.condition, "pooled": torch.randn(1280).half()})
    after = load_embeddings(save_embeddings(before, tmp_path / "a.safetensors"))
    assert torch.equal(after.rows, before.rows) and after.condition.keys() == before.condition.keys()
    assert all(torch.equal(after.condition[name], tensor) for name, tensor in before.condition.items())
    for name in (
        "names",
        "prompt",
        "backbone",
        "mode",
        "layers",
        "timestep",
        "side",
        "row_groups",
        "read_out",
        "palette",
        "losses",
    ):
        assert getattr(after, name) == getattr(before, name), name


def test_file_is_small_and_readable_without_us(tmp_path) -> None:
    path = save_embeddings(embeddings(5), tmp_path / "a.safetensors")
    assert path.stat().st_size < 300_000
    with safe_open(str(path), framework="np") as file:
        assert set(file.keys()) == {"rows", "context"}
        assert file.get_tensor("rows").dtype == "float32" and file.get_tensor("context").dtype == "float16"
        assert json.loads(file.metadata()["embeddings"])["names"] == [f"part {i}" for i in range(5)]


def test_never_overwrites_silently_and_leaves_no_scratch(tmp_path) -> None:
    path = save_embeddings(embeddings(), tmp_path / "a.safetensors")
    with pytest.raises(SlimeError, match="exists already"):
        save_embeddings(embeddings(), path)
    save_embeddings(embeddings(3), path, overwrite=True)
    assert len(load_embeddings(path).names) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_compact_text_travels_and_is_completed(tmp_path) -> None:
    toy = ToyUNet()
    full = embeddings(dim=12, backbone="toy", condition=toy.condition("part"))
    text = to_text(full)
    assert text.startswith("slime1:") and len(text) < 4000
    back = from_text(f"  {text}\n")
    assert back.condition is None
    with pytest.raises(SlimeError, match="connect a CLIP"):
        back.plan()
    completed = back.completed(toy)
    assert torch.equal(completed.condition["context"], full.condition["context"])
    torch.testing.assert_close(completed.rows, full.rows, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "damage", [lambda t: t[:-9], lambda t: t[:60] + "?" + t[61:], lambda t: t[7:], lambda t: "slime1:" + "A" * 500_000]
)
def test_damaged_text_is_refused(damage) -> None:
    with pytest.raises(SlimeError):
        from_text(damage(to_text(embeddings(dim=12))))


def test_foreign_truncated_newer_missing_files(tmp_path) -> None:
    path = save_embeddings(embeddings(), tmp_path / "a.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SlimeError, match="truncated"):
        load_embeddings(tmp_path / "cut.safetensors")
    save_file({"x": torch.zeros(2)}, str(tmp_path / "foreign.safetensors"))
    with pytest.raises(SlimeError, match="not one of SLiMe"):
        load_embeddings(tmp_path / "foreign.safetensors")
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() | {"version": "3"}
    save_file({"rows": torch.zeros(1, 2, 3)}, str(tmp_path / "newer.safetensors"), metadata=metadata)
    with pytest.raises(SlimeError, match="update SLiMe"):
        load_embeddings(tmp_path / "newer.safetensors")
    save_file({"context": torch.zeros(2)}, str(tmp_path / "torn.safetensors"), metadata=metadata | {"version": "2"})
    with pytest.raises(SlimeError, match="damaged"):
        load_embeddings(tmp_path / "torn.safetensors")
    with pytest.raises(SlimeError, match="no file"):
        load_embeddings(tmp_path / "none.safetensors")


def test_another_family_is_refused_by_name() -> None:
    with pytest.raises(SlimeError, match='"sd1" model, but the connected model is "toy"'):
        embeddings().check_model(ToyUNet())
    embeddings(backbone="toy").check_model(ToyUNet())


def test_context_mode_puts_the_rows_behind_the_start_token() -> None:
    item = embeddings(groups=1, mode="context")
    rows, context = item.plan().condition["context"], item.condition["context"].float()
    assert torch.equal(rows[1:3], item.rows[0])
    assert torch.equal(rows[0], context[0]) and torch.equal(rows[3:], context[3:])


def test_digests_say_what_shares_a_pass() -> None:
    item = embeddings()
    assert replace(item, rows=2 * item.rows, palette=()).pass_digest() == item.pass_digest()
    other = {"context": item.condition["context"] + 1}
    for change in ({"timestep": 5}, {"side": 256}, {"row_groups": "layer"}, {"condition": other}, {"condition": None}):
        assert replace(item, **change).pass_digest() != item.pass_digest(), change
    texts = [replace(item, condition=None, prompt=prompt).pass_digest() for prompt in ("a", "a", "b")]
    assert texts[0] == texts[1] != texts[2]


def test_files_of_version_1_are_read() -> None:
    """Written by version 1 on the tiny model; its rows had the background row in them."""
    item = load_embeddings(GOLDEN / "version1_instant.safetensors")
    with safe_open(str(GOLDEN / "version1_instant.safetensors"), framework="pt") as file:
        rows, context = file.get_tensor("rows"), file.get_tensor("context")
    assert torch.equal(item.rows, rows - context[0].float()) and torch.equal(item.condition["context"], context)
    assert item.names == ("body", "light", "plate", "wheel", "window") and item.backbone == "tiny" and item.side == 256
    assert item.layers.read[0] == "output.3.0" and len(item.layers.read) == 9 and item.row_groups == "layer"
    assert isinstance(item.read_out, Propagated) and 1 < item.read_out.sharpen < 2 and 0.5 < item.sureness < 1
    text = from_text((GOLDEN / "version1_instant.txt").read_text(encoding="utf-8"))
    torch.testing.assert_close(text.rows, item.rows, rtol=1e-3, atol=1e-4)
    paper = load_embeddings(GOLDEN / "version1_paper.safetensors")
    assert paper.mode == "context" and paper.read_out == Official() and paper.rows.shape == (1, 5, 96)


def test_files_of_version_2_are_read_unknown_keys_included(tmp_path) -> None:
    item, old = (load_embeddings(GOLDEN / f"version{v}_instant.safetensors") for v in (2, 1))
    assert torch.equal(item.rows, old.rows) and torch.equal(item.condition["context"], old.condition["context"])
    assert item.condition.keys() == old.condition.keys()
    rest = [field.name for field in fields(item) if field.name not in ("rows", "condition")]
    assert [getattr(item, name) for name in rest] == [getattr(old, name) for name in rest]
    with safe_open(str(GOLDEN / "version2_instant.safetensors"), framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    body = json.loads(metadata["embeddings"]) | {"later": 1}
    body["read_out"]["later"] = 2
    save_file(tensors, str(tmp_path / "a.safetensors"), metadata=metadata | {"embeddings": json.dumps(body)})
    assert torch.equal(load_embeddings(tmp_path / "a.safetensors").rows, item.rows)


def test_palette_is_distinct() -> None:
    assert len(set(default_palette(76))) == 76


def test_official_files_are_read_weights_only(tmp_path) -> None:
    class SD2(ToyUNet):
        def __init__(self) -> None:
            super().__init__("sd2")
            self.layers = tuple(Layer(f"output.{block}.0", 1) for block in range(3, 12))
            self.family = replace(self.family, context_dim=1024)

        def encode_prompt(self, prompt: str) -> Context:
            assert prompt == "part part part"
            return Context(torch.zeros(77, 1024))

    for index in (0, 1):
        torch.save(torch.full((1, 1, 1024), float(index + 1)), tmp_path / f"embedding_{index}.pth")
    item = import_official(tmp_path, ["body", "wheel"], SD2())
    assert item.mode == "context" and item.rows.shape == (1, 2, 1024) and item.rows[0, 1].eq(2).all()
    with pytest.raises(SlimeError, match="2 embedding files but 3 names"):
        import_official(tmp_path, ["a", "b", "c"], SD2())
    torch.save({"evil": ToyUNet()}, tmp_path / "embedding_1.pth")
    with pytest.raises(SlimeError, match="cannot be read"):
        import_official(tmp_path, ["a", "b"], SD2())
