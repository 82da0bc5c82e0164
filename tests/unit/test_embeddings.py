"""PartEmbeddings: file, compact text, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from slime import from_text, load_embeddings, save_embeddings, to_text
from slime.backbones.layers import Layer, LayerChoice
from slime.backbones.text import Context
from slime.decode.linear import LinearDecoder
from slime.embeddings import PartEmbeddings
from slime.errors import SlimeError
from slime.paper.files import import_official
from slime.parts.palette import default_palette
from testing.toy import ToyUNet, all_vectors

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def embeddings(parts: int = 2, dim: int = 768, groups: int = 2, **changes) -> PartEmbeddings:
    g = torch.Generator().manual_seed(0)
    values = {
        "names": tuple(f"part {i}" for i in range(parts)),
        "vectors": {name: torch.randn(parts, dim, generator=g) for name in ("stride4", "stride2")[:groups]},
        "condition": {"context": torch.randn(77, dim, generator=g).half()},
        "prompt": "part",
        "backbone": "sd1",
        "layers": LayerChoice(("output.3.0",), ("output.9.0",)),
        "timestep": 80,
        "side": 512,
        "decoder": LinearDecoder(0.25),
        "losses": (1.0, 0.5),
    }
    return PartEmbeddings(**(values | changes))


def test_file_round_trip(tmp_path) -> None:
    before = embeddings()
    before = replace(before, condition={**before.condition, "pooled": torch.randn(1280).half()})
    after = load_embeddings(save_embeddings(before, tmp_path / "a.safetensors"))
    assert (
        list(after.vectors)
        and torch.equal(all_vectors(after), all_vectors(before))
        and after.condition.keys() == before.condition.keys()
    )
    assert all(torch.equal(after.condition[name], tensor) for name, tensor in before.condition.items())
    for name in (
        "names",
        "prompt",
        "backbone",
        "mode",
        "layers",
        "timestep",
        "side",
        "grouping",
        "decoder",
        "palette",
        "losses",
    ):
        assert getattr(after, name) == getattr(before, name), name


def test_file_is_small_and_readable_without_us(tmp_path) -> None:
    path = save_embeddings(embeddings(5), tmp_path / "a.safetensors")
    assert path.stat().st_size < 300_000
    with safe_open(str(path), framework="np") as file:
        assert set(file.keys()) == {"vectors/stride4", "vectors/stride2", "condition/context"}
        assert file.get_tensor("vectors/stride4").dtype == "float32"
        assert file.get_tensor("condition/context").dtype == "float16"
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
    with pytest.raises(SlimeError, match="connect the CLIP"):
        back.extraction_spec()
    completed = back.completed(toy)
    assert torch.equal(completed.condition["context"], full.condition["context"])
    torch.testing.assert_close(all_vectors(completed), all_vectors(full), rtol=1e-3, atol=1e-3)


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
        metadata = file.metadata() | {"version": "2"}
    save_file({"rows": torch.zeros(1, 2, 3)}, str(tmp_path / "newer.safetensors"), metadata=metadata)
    with pytest.raises(SlimeError, match="update SLiMe"):
        load_embeddings(tmp_path / "newer.safetensors")
    save_file({"context": torch.zeros(2)}, str(tmp_path / "torn.safetensors"), metadata=metadata | {"version": "1"})
    with pytest.raises(SlimeError, match="damaged"):
        load_embeddings(tmp_path / "torn.safetensors")
    with pytest.raises(SlimeError, match="no file"):
        load_embeddings(tmp_path / "none.safetensors")
    for header, message in (
        ('{"__metadata__":null,"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "not one of SLiMe"),
        ('{"a":{"dtype":"F8_E8M0","shape":[4],"data_offsets":[0,4]}}', "not one of SLiMe|of the type"),
    ):
        raw = len(header).to_bytes(8, "little") + header.encode() + bytes(4)
        (tmp_path / "odd.safetensors").write_bytes(raw)
        with pytest.raises(SlimeError, match=message):
            load_embeddings(tmp_path / "odd.safetensors")
    tensors = load_file(str(path))
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.int64):
        other = tensors | {"condition/context": tensors["condition/context"].to(dtype)}
        save_file(other, str(tmp_path / "type.safetensors"), metadata=metadata | {"version": "1"})
        with pytest.raises(SlimeError, match=f"damaged at .context.: its type is {dtype}"):
            load_embeddings(tmp_path / "type.safetensors")


def test_another_family_is_refused_by_name() -> None:
    with pytest.raises(SlimeError, match='"sd1" model, but the connected model is "toy"'):
        embeddings().check_model(ToyUNet())
    embeddings(backbone="toy").check_model(ToyUNet())


def test_context_mode_puts_the_vectors_behind_the_start_token() -> None:
    item = embeddings(mode="context", vectors={"shared": torch.randn(2, 768)})
    tokens, context = item.extraction_spec().condition["context"], item.condition["context"].float()
    assert torch.equal(tokens[1:3], item.vectors["shared"])
    assert torch.equal(tokens[0], context[0]) and torch.equal(tokens[3:], context[3:])


def test_digests_say_what_shares_a_pass() -> None:
    item = embeddings()
    assert (
        replace(item, vectors={name: 2 * vector for name, vector in item.vectors.items()}, palette=()).extraction_key()
        == item.extraction_key()
    )
    other = {"context": item.condition["context"] + 1}
    for change in ({"timestep": 5}, {"side": 256}, {"grouping": "layer"}, {"condition": other}, {"condition": None}):
        assert replace(item, **change).extraction_key() != item.extraction_key(), change
    texts = [replace(item, condition=None, prompt=prompt).extraction_key() for prompt in ("a", "a", "b")]
    assert texts[0] == texts[1] != texts[2]


def test_the_released_version_is_read_unknown_keys_included(tmp_path) -> None:
    """A file of the tiny model, written by the version that will be released."""
    golden = GOLDEN / "version1_instant.safetensors"
    item = load_embeddings(golden)
    assert item.names == ("body", "light", "plate", "wheel", "window") and item.backbone == "tiny" and item.side == 256
    assert item.grouping == "layer" and set(item.vectors) == set(item.layers.read) and len(item.vectors) == 9
    assert item.condition["context"].shape == (77, 96) and all(v.shape == (5, 96) for v in item.vectors.values())
    assert isinstance(item.decoder, LinearDecoder) and 0.1 < item.decoder.temperature <= 1
    assert 0.5 < item.example_confidence < 1 and item.settings["preset"] == "instant" and item.losses
    with safe_open(str(golden), framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    body = json.loads(metadata["embeddings"]) | {"later": 1}
    body["decoder"]["later"] = 2
    save_file(tensors, str(tmp_path / "a.safetensors"), metadata=metadata | {"embeddings": json.dumps(body)})
    assert torch.equal(all_vectors(load_embeddings(tmp_path / "a.safetensors")), all_vectors(item))


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
    assert (
        item.mode == "context" and item.vectors["shared"].shape == (2, 1024) and item.vectors["shared"][1].eq(2).all()
    )
    with pytest.raises(SlimeError, match="2 embedding files but 3 names"):
        import_official(tmp_path, ["a", "b", "c"], SD2())
    torch.save({"evil": ToyUNet()}, tmp_path / "embedding_1.pth")
    with pytest.raises(SlimeError, match="cannot be read"):
        import_official(tmp_path, ["a", "b"], SD2())
