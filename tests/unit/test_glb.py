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


def test_mirrored_nodes_keep_their_outside_out() -> None:
    document = scene([{"attributes": {"POSITION": 0}, "indices": 1}], [{"mesh": 0, "scale": [-1, 1, 1]}])
    assert read_glb(pack(document, [SQUARE, TWO])).normals[:, 2].tolist() == [1, 1]


def test_nodes_without_a_scene_are_placed() -> None:
    document = scene([{"attributes": {"POSITION": 0}}], [{"mesh": 0, "scale": [5, 5, 5]}])
    del document["scenes"]
    assert read_glb(pack(document, [SQUARE])).vertices.max() == 5


@pytest.mark.parametrize(
    ("mode", "faces"), [(4, [[0, 1, 2]]), (5, [[0, 1, 2], [1, 3, 2]]), (6, [[0, 1, 2], [0, 2, 3]])]
)
def test_lists_strips_and_fans(mode, faces) -> None:
    found = read_glb(pack(scene([{"attributes": {"POSITION": 0}, "mode": mode}]), [SQUARE]))
    assert found.faces.tolist() == faces


def test_a_mesh_without_colors_is_grey_as_a_mesh_of_comfyui() -> None:
    found = read_glb(pack(scene([{"attributes": {"POSITION": 0}}]), [SQUARE]))
    assert torch.equal(found.colors, torch.full((1, 3, 3), 0.7))


MATERIALS = [
    {"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}, "baseColorFactor": [1, 0, 1, 1]}},
    {"pbrMetallicRoughness": {"baseColorTexture": {"index": 1}}},
    {"pbrMetallicRoughness": {"baseColorFactor": [0, 1, 0, 1]}},
]


def textured(count, uvs, *images, sampler=None, info=None):
    """Return a mesh of squares with a material each."""
    attributes = {"POSITION": 0, "TEXCOORD_0": 1}
    primitives = [{"attributes": attributes, "indices": 2, "material": number} for number in range(count)]
    textures = [{"source": 0, "sampler": 0}, {"source": min(1, len(images) - 1), "sampler": 0}]
    materials = MATERIALS[:count]
    if info is not None:
        materials = [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0} | info}}]
    document = {"materials": materials, "textures": textures, "samplers": [sampler or {}]}
    return read_glb(pack(scene(primitives, **document), [SQUARE, uvs.astype(np.float32), TWO], images))


def seen(surface) -> torch.Tensor:
    """Return the colours [8, 8, 3] of a square from the front, as bright as they are."""
    views = render_views(surface, [Camera(0, 0)], 64)
    faces = views.faces[0]
    rows, columns = (faces >= 0).any(1).nonzero().flatten(), (faces >= 0).any(0).nonzero().flatten()
    shown = views.images[0][rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    shown = shown / shown.amax(2, keepdim=True)
    return torch.nn.functional.interpolate(shown.movedim(-1, 0)[None], (8, 8), mode="area")[0].movedim(0, -1).round()


def test_a_texture_with_its_factor_and_several_as_one() -> None:
    images = [picture((255, 255, 255)), picture((0, 0, 255))]
    one = textured(1, UVS, *images)
    assert one.texture.shape == (8, 8, 3) and one.texture.amax((0, 1)).tolist() == [1, 0, 1]
    several = textured(3, UVS, *images)
    for face, color in enumerate([[1, 0, 1], [1, 0, 1], [0, 0, 1], [0, 0, 1], [0, 1, 0], [0, 1, 0]]):
        for corner in several.uvs[several.faces[face]]:  # to the very corners: no neighbour shines in
            u, v = corner * (several.texture.shape[0])
            assert several.texture[int(v - 0.01), int(u - 0.01)].tolist() == color


def checker() -> bytes:
    target = io.BytesIO()
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4, :4], pixels[:4, 4:], pixels[4:, :4], pixels[4:, 4:] = (
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (255, 255, 0),
    )
    Image.fromarray(pixels).save(target, "PNG")
    return target.getvalue()


def test_textures_lie_as_the_file_says() -> None:
    """Of a square with four colours: upright; almost, by rounding; shifted by whole textures; twice; clamped; moved."""
    plain = {"info": {}}
    upright = seen(textured(1, UVS, checker(), **plain))
    assert upright[0, 0].tolist() == [1, 0, 0] and upright[0, 7].tolist() == [0, 1, 0]
    assert upright[7, 0].tolist() == [0, 0, 1] and upright[7, 7].tolist() == [1, 1, 0]
    for other in (UVS * 1.001, UVS - 0.001, UVS + 3, UVS - 2):
        assert torch.equal(seen(textured(1, other, checker(), **plain)), upright)
    twice = seen(textured(1, UVS * 2, checker(), **plain))
    assert torch.equal(twice[:4, :4], twice[4:, 4:]) and twice[0, 0].tolist() == [1, 0, 0] != twice[0, 2].tolist()
    clamped = seen(textured(1, UVS * 1.01, checker(), sampler={"wrapS": 33071, "wrapT": 33071}, **plain))
    assert torch.equal(clamped, upright)
    moved = {"extensions": {"KHR_texture_transform": {"scale": [0.5, 0.5], "offset": [0.5, 0]}}}
    assert (seen(textured(1, UVS, checker(), info=moved))[:7, 1:] == torch.tensor([0.0, 1, 0])).all()


WHOLE = pack(scene([{"attributes": {"POSITION": 0}, "indices": 1}]), [SQUARE, TWO])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"solid x", "This is not a GLB file. Export the mesh as GLB"),
        (b"", "This is not a GLB file"),
        (WHOLE[:-20], "is cut off"),
        (WHOLE[:40], "is cut off"),
        (WHOLE[:12], "is cut off"),
        (WHOLE[:8] + (12).to_bytes(4, "little"), "damaged: its JSON header cannot be read"),
        (WHOLE[:4] + (1).to_bytes(4, "little") + WHOLE[8:], "The file is glTF 1"),
        (pack(scene([{"attributes": {"POSITION": 0}, "mode": 0}]), [SQUARE]), "^The GLB file has no triangles"),
        (pack(scene([{"attributes": {"POSITION": 0}}]), [SQUARE * np.float32(np.nan)]), "^The mesh has NaN"),
        (pack({"extensionsRequired": [5]}, []), "is damaged"),
        (pack({"extensionsRequired": ["XYZ_odd"]}, []), "needs XYZ_odd, which SLiMe cannot read. Export it without it"),
        (pack(scene([{"attributes": {"POSITION": 7}}]), [SQUARE]), "is damaged"),
        (pack(scene([{"attributes": {"POSITION": 0}, "indices": 1}]), [SQUARE, TWO + 9]), "is damaged"),
        (pack(scene([], [{"children": [0]}]), []), "^The GLB file is damaged: node 0"),
        (WHOLE.replace(b'"count": 4', b'"count":-4'), "is damaged"),
        (WHOLE.replace(b'"count": 6', b'"count":9e'), "its JSON header cannot be read"),
        (pack({"extensionsRequired": ["KHR_draco_mesh_compression"]}, []), "KHR_draco.*without compression"),
        (
            pack(scene([{"attributes": {"POSITION": 0}}], buffers=[{"uri": "mesh.bin"}]), [SQUARE]),
            "^The GLB file keeps its data in other files",
        ),
    ],
)
def test_what_cannot_be_read_says_so(data, message) -> None:
    with pytest.raises(SlimeError, match=message):
        read_glb(data)


def test_many_nodes_on_one_mesh_are_counted_before_they_are_built(monkeypatch) -> None:
    monkeypatch.setattr("slime.mesh.glb.MOST_FACES", 1000)
    nodes = [{"children": list(range(1, 2000))}, *({"mesh": 0} for _ in range(1999))]
    with pytest.raises(SlimeError, match="more than 1000 faces. Decimate"):
        read_glb(pack(scene([{"attributes": {"POSITION": 0}, "indices": 1}], nodes), [SQUARE, TWO]))


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
