"""PartEmbeddings: file, compact text, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from slime.embeddings import PartEmbeddings, default_palette
from slime.errors import SlimeError
from slime.layers import FAMILIES, Family, LayerChoice, LayerKey
from slime.official_files import import_official
from slime.read import ReadOut
from tests.toy import ToyDenoiser


def embeddings(parts: int = 2, dim: int = 768, groups: int = 2, **changes) -> PartEmbeddings:
    g = torch.Generator().manual_seed(0)
    values = {
        "names": tuple(f"part {i}" for i in range(parts)),
        "rows": torch.randn(groups, parts, dim, generator=g),
        "context": torch.randn(77, dim, generator=g).half(),
        "prompt": "part",
        "family": "sd1",
        "prediction": "eps",
        "layers": LayerChoice((LayerKey("output", 3, 0),), (LayerKey("output", 9, 0),)),
        "timestep": 80,
        "working_side": 512,
        "read_out": ReadOut(2, 0.25),
        "losses": (1.0, 0.5),
    }
    return PartEmbeddings(**(values | changes))


def test_file_round_trip(tmp_path) -> None:
    before = embeddings(pooled=torch.randn(1280).half())
    after = PartEmbeddings.load(before.save(tmp_path / "a.safetensors"))
    assert torch.equal(after.rows, before.rows) and torch.equal(after.context, before.context)
    assert torch.equal(after.pooled, before.pooled)
    for name in (
        "names",
        "prompt",
        "family",
        "prediction",
        "mode",
        "layers",
        "timestep",
        "working_side",
        "read_out",
        "palette",
        "losses",
    ):
        assert getattr(after, name) == getattr(before, name), name


def test_file_is_small_and_readable_without_us(tmp_path) -> None:
    path = embeddings(5).save(tmp_path / "a.safetensors")
    assert path.stat().st_size < 300_000
    with safe_open(str(path), framework="np") as file:
        assert set(file.keys()) == {"rows", "context"}
        assert file.get_tensor("rows").dtype == "float32" and file.get_tensor("context").dtype == "float16"
        assert json.loads(file.metadata()["embeddings"])["names"] == [f"part {i}" for i in range(5)]


def test_never_overwrites_silently_and_leaves_no_scratch(tmp_path) -> None:
    path = embeddings().save(tmp_path / "a.safetensors")
    with pytest.raises(SlimeError, match="exists already"):
        embeddings().save(path)
    embeddings(3).save(path, overwrite=True)
    assert len(PartEmbeddings.load(path).names) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_compact_text_travels_and_is_completed(tmp_path) -> None:
    toy = ToyDenoiser()
    full = embeddings(dim=12, family="toy", context=toy.encode_prompt("part").rows.half())
    text = full.to_compact()
    assert text.startswith("slime1:") and len(text) < 4000
    back = PartEmbeddings.from_compact(f"  {text}\n")
    assert back.context is None
    with pytest.raises(SlimeError, match="connect a CLIP"):
        back.base_context()
    completed = back.with_context(toy)
    assert torch.equal(completed.context, full.context)
    torch.testing.assert_close(completed.rows, full.rows, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "damage", [lambda t: t[:-9], lambda t: t[:60] + "?" + t[61:], lambda t: t[7:], lambda t: "slime1:" + "A" * 500_000]
)
def test_damaged_text_is_refused(damage) -> None:
    with pytest.raises(SlimeError):
        PartEmbeddings.from_compact(damage(embeddings(dim=12).to_compact()))


def test_foreign_truncated_newer_missing_files(tmp_path) -> None:
    path = embeddings().save(tmp_path / "a.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SlimeError, match="truncated"):
        PartEmbeddings.load(tmp_path / "cut.safetensors")
    save_file({"x": torch.zeros(2)}, str(tmp_path / "foreign.safetensors"))
    with pytest.raises(SlimeError, match="not one of SLiMe"):
        PartEmbeddings.load(tmp_path / "foreign.safetensors")
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() | {"version": "2"}
    save_file({"rows": torch.zeros(1, 2, 3)}, str(tmp_path / "newer.safetensors"), metadata=metadata)
    with pytest.raises(SlimeError, match="update SLiMe"):
        PartEmbeddings.load(tmp_path / "newer.safetensors")
    save_file({"context": torch.zeros(2)}, str(tmp_path / "torn.safetensors"), metadata=metadata | {"version": "1"})
    with pytest.raises(SlimeError, match="damaged"):
        PartEmbeddings.load(tmp_path / "torn.safetensors")
    with pytest.raises(SlimeError, match="no file"):
        PartEmbeddings.load(tmp_path / "none.safetensors")


def test_another_family_is_refused_by_name() -> None:
    with pytest.raises(SlimeError, match='"sd1" model with 768-wide.*"sdxl" with 2048'):
        embeddings().check_model(FAMILIES["sdxl"])
    embeddings().check_model(FAMILIES["sd1"])


def test_context_mode_puts_the_rows_behind_the_start_token() -> None:
    item = embeddings(groups=1, mode="context")
    rows = item.base_context().rows
    assert torch.equal(rows[1:3], item.rows[0])
    assert torch.equal(rows[0], item.context[0].float()) and torch.equal(rows[3:], item.context[3:].float())


def test_palette_is_distinct() -> None:
    assert len(set(default_palette(76))) == 76


def test_official_files_are_read_weights_only(tmp_path) -> None:
    class SD2(ToyDenoiser):
        def __init__(self) -> None:
            super().__init__()
            self.family = Family("sd2", 1024, 512)

        def encode_prompt(self, prompt):
            assert prompt == "part part part"
            return type(super().encode_prompt(prompt))(torch.zeros(77, 1024))

    for index in (0, 1):
        torch.save(torch.full((1, 1, 1024), float(index + 1)), tmp_path / f"embedding_{index}.pth")
    item = import_official(tmp_path, ["body", "wheel"], SD2())
    assert item.mode == "context" and item.rows.shape == (1, 2, 1024) and item.rows[0, 1].eq(2).all()
    with pytest.raises(SlimeError, match="2 embedding files but 3 names"):
        import_official(tmp_path, ["a", "b", "c"], SD2())
    torch.save({"evil": ToyDenoiser()}, tmp_path / "embedding_1.pth")
    with pytest.raises(SlimeError, match="cannot be read"):
        import_official(tmp_path, ["a", "b"], SD2())
