"""Meshes from GLB files."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from slime import SlimeError
from slime.mesh.glb import read_glb
from slime.mesh.views import Camera, render_views
from testing import meshes
from testing.glb import colored, pack

SQUARE = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], np.float32)
UVS = np.array([[0, 1], [1, 1], [1, 0], [0, 0]], np.float32)
TWO = np.array([[0], [1], [2], [0], [2], [3]], np.uint16)


def scene(primitives, nodes=None, **more):
    """Return a document with one mesh, in the scene's first node unless nodes are given."""
    nodes = nodes or [{"mesh": 0}]
    return {"scenes": [{"nodes": [0]}], "nodes": nodes, "meshes": [{"primitives": primitives}]} | more


def picture(color) -> bytes:
    target = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(target, "PNG")
    return target.getvalue()


def test_a_mesh_with_colors_comes_back() -> None:
    surface, _ = meshes.build("car", 5)
    found = read_glb(colored(surface))
    assert torch.allclose(found.vertices[found.faces], surface.vertices[surface.faces], atol=1e-6)
    assert torch.allclose(found.colors, surface.colors, atol=0.06)  # linear bytes are coarse in the dark
    before, after = (render_views(mesh, [Camera(30, 15)], 64) for mesh in (surface, found))
    assert torch.allclose(before.images, after.images, atol=0.06)


def test_nodes_place_their_meshes() -> None:
    turned = {"rotation": [0, 0, 2**-0.5, 2**-0.5], "scale": [2, 2, 2], "translation": [10, 0, 0], "children": [1]}
    shifted = {"mesh": 0, "matrix": [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 5, 1]}
    found = read_glb(pack(scene([{"attributes": {"POSITION": 0}, "indices": 1}], [turned, shifted]), [SQUARE, TWO]))
    expected = torch.tensor([[10.0, 0, 10], [10, 2, 10], [8, 2, 10], [8, 0, 10]])
    assert torch.allclose(found.vertices, expected, atol=1e-5)
    assert found.faces.tolist() == [[0, 1, 2], [0, 2, 3]]


@pytest.mark.parametrize(
    ("mode", "faces"), [(4, [[0, 1, 2]]), (5, [[0, 1, 2], [1, 2, 3]]), (6, [[0, 1, 2], [0, 2, 3]])]
)
def test_lists_strips_and_fans(mode, faces) -> None:
    found = read_glb(pack(scene([{"attributes": {"POSITION": 0}, "mode": mode}]), [SQUARE]))
    assert found.faces.tolist() == faces


def test_a_texture_with_its_factor_and_several_as_one() -> None:
    materials = [
        {"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}, "baseColorFactor": [1, 0, 1, 1]}},
        {"pbrMetallicRoughness": {"baseColorTexture": {"index": 1}}},
        {"pbrMetallicRoughness": {"baseColorFactor": [0, 1, 0, 1]}},
    ]
    attributes = {"POSITION": 0, "TEXCOORD_0": 1}
    primitives = [{"attributes": attributes, "indices": 2, "material": number} for number in range(3)]
    document = {"materials": materials, "textures": [{"source": 0}, {"source": 1}]}
    images = [picture((255, 255, 255)), picture((0, 0, 255))]
    arrays = [SQUARE, UVS, TWO]
    one = read_glb(pack(scene(primitives[:1], **document), arrays, images))
    assert one.texture.shape == (8, 8, 3) and one.texture.amax((0, 1)).tolist() == [1, 0, 1]
    assert torch.equal(one.uvs, torch.from_numpy(UVS))
    several = read_glb(pack(scene(primitives, **document), arrays, images))
    seen = [several.texture[int(v * 16), int(u * 16)] for u, v in several.uvs.view(3, 4, 2).mean(1).tolist()]
    assert torch.stack(seen).round().tolist() == [[1, 0, 1], [0, 0, 1], [0, 1, 0]]
    far = read_glb(pack(scene(primitives[:1], **document), [SQUARE, UVS + 3.25, TWO], images))
    assert 0 <= far.uvs.min() and far.uvs.max() <= 1  # textures repeat


WHOLE = pack(scene([{"attributes": {"POSITION": 0}, "indices": 1}]), [SQUARE, TWO])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"solid x", "no GLB file. Export the mesh as GLB"),
        (b"", "no GLB file"),
        (WHOLE[:-20], "is cut off"),
        (WHOLE[:40], "is cut off"),
        (WHOLE[:12], "no readable description"),
        (pack(scene([{"attributes": {"POSITION": 0}, "mode": 0}]), [SQUARE]), "has no triangles"),
        (pack(scene([{"attributes": {"POSITION": 7}}]), [SQUARE]), "is damaged"),
        (pack(scene([{"attributes": {"POSITION": 0}, "indices": 1}]), [SQUARE, TWO + 9]), "is damaged"),
        (pack(scene([], [{"children": [0]}]), []), "is damaged: node 0"),
        (WHOLE.replace(b'"count": 4', b'"count":-4'), "is damaged"),
        (WHOLE.replace(b'"count": 6', b'"count":9e'), "no readable description"),
        (pack({"extensionsRequired": ["KHR_draco_mesh_compression"]}, []), "KHR_draco.*without compression"),
        (pack(scene([{"attributes": {"POSITION": 0}}], buffers=[{"uri": "mesh.bin"}]), [SQUARE]), "in other files"),
    ],
)
def test_what_cannot_be_read_says_so(data, message) -> None:
    with pytest.raises(SlimeError, match=message):
        read_glb(data)


def test_damaged_files_never_crash() -> None:
    """Bytes of the description and of the data changed at random: a mesh or a SlimeError."""
    rng = np.random.default_rng(3)
    refused = 0
    for _ in range(400):
        data = bytearray(WHOLE)
        for place in rng.integers(12, len(data), rng.integers(1, 4)):
            data[place] = rng.integers(256)
        try:
            read_glb(bytes(data))
        except SlimeError:
            refused += 1
    assert 0 < refused < 400
