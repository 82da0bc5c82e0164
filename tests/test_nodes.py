"""Nodes called in this process: masks, names, and errors that name the node, the value and the cure."""

from __future__ import annotations

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def nodes(extension):
    import slime_extension.nodes.extension as module

    return module


@pytest.fixture(autouse=True)
def silent_previews(nodes, monkeypatch):
    """Previews write files into a running server's folders; here there is none."""
    for name in ("example", "segment", "part_mask", "overlay"):
        owner = __import__(f"slime_extension.nodes.{name}", fromlist=["ui"])
        monkeypatch.setattr(owner.ui, "PreviewImage", lambda *a, **k: None)
        monkeypatch.setattr(owner.ui, "PreviewMask", lambda *a, **k: None)


def parts(labels: torch.Tensor, count: int = 2):
    from slime_extension.nodes.common import Parts

    from slime.embeddings import default_palette
    from slime.segment import PartMaps

    one_hot = torch.nn.functional.one_hot(labels, count + 1).movedim(-1, 1).float()
    names = ("wheel", "window", "door")[:count]
    probabilities = one_hot * 0.8 + 0.2 / (count + 1)
    maps = PartMaps(probabilities, names, default_palette(count), probabilities[:, 1:].amax((2, 3)))
    return Parts(maps, torch.rand(*labels.shape, 3))


def square(size: int = 32) -> torch.Tensor:
    labels = torch.zeros(2, size, size, dtype=torch.int64)
    labels[0, 8:20, 8:20] = 1
    labels[0, 24:28, 24:28] = 2
    return labels


def mask_of(nodes, labels=None, **options) -> torch.Tensor:
    return nodes.SLiMePartMask.execute(parts(square() if labels is None else labels), **options).args[0]


def test_mask_contract(nodes) -> None:
    """[B, H, W] float32, exactly 0 or 1, and zeros, never zero-length, where nothing is found."""
    for options in ({}, {"mode": "threshold"}, {"grow": 3}, {"names": "wheel", "fill_holes": True, "minimum_area": 5}):
        mask = mask_of(nodes, **options)
        assert mask.shape == (2, 32, 32) and mask.dtype == torch.float32
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        assert not mask[1].any() and mask[0].any()
    empty = mask_of(nodes, labels=torch.zeros(1, 32, 32, dtype=torch.int64), names="window", grow=5, feather=3)
    assert empty.shape == (1, 32, 32) and not empty.any()
    full = mask_of(nodes, labels=torch.ones(1, 32, 32, dtype=torch.int64), grow=-2)
    assert full.all(), "shrinking has no border to shrink from where everything is inside"


def test_names_select_parts(nodes) -> None:
    labels = square()
    assert torch.equal(mask_of(nodes, names="wheel").bool(), labels == 1)
    assert torch.equal(mask_of(nodes, names="wheel, window").bool(), labels > 0)
    assert torch.equal(mask_of(nodes, names="").bool(), labels > 0)
    assert torch.equal(mask_of(nodes, names="background").bool(), labels == 0)
    assert torch.equal(mask_of(nodes, names="window", invert=True).bool(), labels != 2)


def test_grow_is_a_disc_and_shrink_its_inverse(nodes) -> None:
    grown = mask_of(nodes, names="wheel", grow=4)[0].bool()
    y, x = np.mgrid[0:32, 0:32]
    outside = np.hypot(np.maximum(0, np.maximum(8 - y, y - 19)), np.maximum(0, np.maximum(8 - x, x - 19)))
    assert np.array_equal(grown.numpy(), outside <= 4)
    shrunk = mask_of(nodes, names="wheel", grow=-3)[0]
    assert shrunk.sum() == 6 * 6 and shrunk[11:17, 11:17].all()


def test_feather_holes_and_specks(nodes) -> None:
    labels = square()
    labels[0, 12:14, 12:14] = 0
    assert mask_of(nodes, labels, names="wheel")[0, 13, 13] == 0
    assert mask_of(nodes, labels, names="wheel", fill_holes=True)[0, 13, 13] == 1
    assert mask_of(nodes, labels, minimum_area=17)[0, 25, 25] == 0
    soft = mask_of(nodes, feather=4)
    assert 0 < float(soft[0, 8, 14]) < 1 and float(soft.max()) <= 1
    probability = mask_of(nodes, mode="soft", names="wheel")
    assert probability[0, 10, 10] == pytest.approx(0.8 + 0.2 / 3)
    filled = mask_of(nodes, labels, mode="soft", names="wheel", fill_holes=True)
    assert filled[0, 13, 13] == 1 and filled[0, 10, 10] == pytest.approx(0.8 + 0.2 / 3), (
        "a hole is filled, the rest kept"
    )


def test_unknown_part_names_what_there_is(nodes) -> None:
    with pytest.raises(ValueError, match="SLiMe Part Mask: there is no part tail; these were learned: wheel, window"):
        mask_of(nodes, names="tail")


IMAGE = torch.rand(1, 40, 48, 3)
GOOD = torch.zeros(1, 40, 48)
GOOD[:, 5:20, 5:20] = 1


@pytest.mark.parametrize(
    ("image", "mask", "names", "message"),
    [
        (IMAGE, torch.zeros(1, 64, 64), "wheel", "64x64 but the image is 48x40"),
        (IMAGE, torch.zeros(1, 40, 48), "wheel", '"wheel" is empty'),
        (IMAGE, GOOD, " , ", "No part names"),
        (IMAGE, GOOD, "wheel, window", "1 masks for 2 names"),
        (IMAGE, GOOD.repeat(2, 1, 1), "wheel, wheel", "more than once: wheel"),
        (IMAGE.repeat(3, 1, 1, 1), GOOD, "wheel", "batch of 3 images"),
        (torch.rand(1, 1, 1, 3), torch.ones(1, 1, 1), "wheel", "1x1"),
        (torch.full((1, 40, 48, 3), torch.nan), GOOD, "wheel", "NaN"),
    ],
)
def test_bad_examples_name_node_value_and_cure(nodes, image, mask, names, message) -> None:
    with pytest.raises(ValueError, match=f"^SLiMe Example: .*{message}"):
        nodes.SLiMeExample.execute(image, mask, names)


def test_example_takes_what_other_nodes_hand_over(nodes) -> None:
    for image, mask in (
        (torch.rand(1, 40, 48, 4), GOOD),
        (IMAGE[0], GOOD[0]),
        (IMAGE, GOOD[:, None]),
        (IMAGE.half(), GOOD.half()),
    ):
        examples, preview = nodes.SLiMeExample.execute(image, mask, "wheel").args
        assert examples[0].names == ("wheel",) and preview.shape == (1, 40, 48, 3)


def test_overlay_and_label_map(nodes) -> None:
    item = parts(square())
    tinted, colored = nodes.SLiMeOverlay.execute(item, 0.5, False).args
    assert tinted.shape == colored.shape == (2, 32, 32, 3)
    assert torch.equal((colored[0, 10, 10] * 255).round().int(), torch.tensor(item.maps.palette[0]).int())


@pytest.mark.parametrize("name", ["../evil", "a/b", "a\\b", "C:x", "", "...", "a\x00b"])
def test_file_names_cannot_leave_the_folder(nodes, tmp_path, monkeypatch, name) -> None:
    from slime_extension.nodes import files

    monkeypatch.setattr(files, "_folder", lambda: tmp_path)
    with pytest.raises(ValueError, match="file"):
        files.save_path(name, overwrite=False)


def test_saving_adds_a_number_instead_of_overwriting(nodes, tmp_path, monkeypatch) -> None:
    from slime_extension.nodes import files

    monkeypatch.setattr(files, "_folder", lambda: tmp_path)
    assert files.save_path("car.safetensors", False).name == "car.safetensors"
    (tmp_path / "car.safetensors").touch()
    assert files.save_path("car", False).name == "car_2.safetensors"
    assert files.save_path("car", True).name == "car.safetensors"


def test_wrong_models_are_refused(extension) -> None:
    from types import SimpleNamespace

    from slime_extension.nodes.comfy_denoiser import ComfyDenoiser

    from tests.models import comfy_patcher

    with pytest.raises(ValueError, match="another kind of model"):
        ComfyDenoiser(SimpleNamespace(model=SimpleNamespace(diffusion_model=torch.nn.Identity())))
    patcher = comfy_patcher("sd1")
    first = patcher.model.diffusion_model.input_blocks[0][0]
    with torch.inference_mode():
        first.weight = torch.nn.Parameter(torch.zeros(32, 9, 3, 3), requires_grad=False)
    with pytest.raises(ValueError, match="9 input channels.*text-to-image checkpoint"):
        ComfyDenoiser(patcher)
    clip = SimpleNamespace(
        tokenize=lambda t: t, encode_from_tokens=lambda t, return_pooled: (torch.zeros(1, 77, 1024), None)
    )
    with pytest.raises(ValueError, match="1024 wide, the model needs 768"):
        ComfyDenoiser(comfy_patcher("sd1"), None, clip).encode_prompt("x")


def test_import_is_light(extension, comfy_path) -> None:
    """kornia and scipy.ndimage users aside, importing the entry point loads no diffusers and touches no GPU."""
    import subprocess
    import sys
    from pathlib import Path

    root = Path(__file__).resolve().parent.parent
    code = (
        f"import importlib.util, sys; s = importlib.util.spec_from_file_location('p', r'{root}/__init__.py', "
        f"submodule_search_locations=[r'{root}']); m = importlib.util.module_from_spec(s); sys.modules['p'] = m; "
        "s.loader.exec_module(m); print([n for n in ('torch', 'kornia', 'diffusers') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
