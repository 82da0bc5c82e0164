"""The mesh nodes on ComfyUI's MESH: absent where its meshes have no colours."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from slime import Example, SlimeError
from slime.parts.maps import HardMaps, PartMaps
from slime.parts.palette import default_palette
from testing import glb, meshes

NAMES = meshes.PARTS["car"]


@pytest.fixture
def nodes(extension, monkeypatch) -> Any:
    from slime_extension.nodes import mesh

    if not mesh.meshes_have_colors():
        pytest.skip("the meshes of this ComfyUI have no colours")
    monkeypatch.setattr(mesh.SLiMePartsToMesh, "hidden", type("Hidden", (), {"unique_id": None}), raising=False)
    return mesh


def test_the_nodes_are_where_meshes_have_colors(extension) -> None:
    from slime_extension.nodes import extension as listed
    from slime_extension.nodes.files import register_folder
    from slime_extension.nodes.mesh import meshes_have_colors

    register_folder()
    ids = {node.define_schema().node_id for node in asyncio.run(listed.SlimeExtension().get_node_list())}
    assert ({"SLiMeMeshViews", "SLiMePartsToMesh"} <= ids) == meshes_have_colors()


def test_a_mesh_goes_through_both_nodes_and_save_glb(nodes, in_inference_mode, tmp_path) -> None:
    from comfy_api.latest import Types
    from comfy_extras.nodes_save_3d import get_mesh_batch_item, save_glb
    from slime_extension.nodes.common import Parts

    surface, truth = meshes.build("car", 5)
    colors = surface.colors.flatten(0, 1) ** 2.2
    mesh = Types.MESH(surface.vertices[None], surface.faces[None], vertex_colors=colors[None])
    images, first, views = nodes.SLiMeMeshViews.execute(mesh, 6, 96).args
    assert images.shape == (6, 96, 96, 3) and torch.equal(first[0], images[0])
    assert torch.allclose(views.surface.colors, surface.colors, atol=1e-3)
    labels = torch.where(views.faces >= 0, truth[views.faces.long().clamp(min=0)], 0).byte()
    maps = PartMaps(HardMaps(labels, 5), NAMES, tuple(default_palette(4)), torch.ones(6, 4))
    whole, pieces, texture, names = nodes.SLiMePartsToMesh.execute(Parts(maps, images), views).args
    assert names == ", ".join(NAMES) and len(pieces) == 4 and texture.shape == (1, 64, 64, 3)
    assert sum(piece.faces.shape[1] for piece in pieces) == whole.faces.shape[1] == len(surface)
    vertices, faces, linear, _, _ = get_mesh_batch_item(whole, 0)
    save_glb(vertices, faces, str(tmp_path / "x.glb"), vertex_colors=linear)
    assert (tmp_path / "x.glb").read_bytes()[:4] == b"glTF"
    shown = torch.unique((linear ** (1 / 2.2) * 255).round().long(), dim=0)
    assert {tuple(color) for color in shown.tolist()} <= {(150, 150, 150), *maps.palette}

    bytes_ = (views.images[0] * 255).round() / 255  # as an image that was saved and loaded
    example = Example.from_label_map(bytes_, labels[0].long(), NAMES)
    painted = nodes.painted_views(views, [example], NAMES)
    assert list(painted) == [0] and torch.equal(painted[0], labels[0].long())
    nothing = PartMaps(HardMaps(torch.zeros_like(labels), 5), NAMES, maps.palette, torch.ones(6, 4))
    with pytest.raises(SlimeError, match="None of these parts is found on the mesh: body, wheel, window, light"):
        nodes.SLiMePartsToMesh.execute(Parts(nothing, images), views)


def test_batches_of_meshes_of_different_sizes(nodes, in_inference_mode) -> None:
    from comfy_api.latest import Types

    vertices, faces = torch.rand(2, 5, 3), torch.zeros(2, 3, 3, dtype=torch.long)
    faces[0, :2] = torch.tensor([[0, 1, 2], [0, 2, 3]])
    faces[1, :1] = torch.tensor([[2, 1, 0]])
    counts = {"vertex_counts": torch.tensor([4, 3]), "face_counts": torch.tensor([2, 1])}
    mesh = Types.MESH(vertices, faces, **counts)
    assert [len(nodes.surface_of(mesh, index)) for index in (0, 1)] == [2, 1]
    with pytest.raises(SlimeError, match="holds 2 meshes: 0 to 1"):
        nodes.surface_of(mesh, 2)
    textured = Types.MESH(vertices, faces, uvs=torch.rand(2, 5, 2), texture=torch.rand(1, 8, 8, 3), **counts)
    assert nodes.surface_of(textured, 1).texture.shape == (8, 8, 3)


def test_glb_files_of_load_3d(nodes, in_inference_mode, tmp_path) -> None:
    """As a file on disk, and in memory as Create 3D File gives it; what core writes is read back."""
    from io import BytesIO

    from comfy_api.latest import Types
    from comfy_extras.nodes_save_3d import mesh_item_to_glb_bytes

    surface, _ = meshes.build("car", 5)
    path = tmp_path / "car.glb"
    path.write_bytes(glb.colored(surface))
    found = nodes.surface_of(Types.File3D(str(path)), 0)
    assert torch.allclose(found.vertices[found.faces], surface.vertices[surface.faces], atol=1e-6)
    mesh = nodes.colored_mesh(surface, surface.colors[:, 0])
    again = nodes.surface_of(Types.File3D(BytesIO(mesh_item_to_glb_bytes(mesh, 0)), "glb"), 0)
    assert torch.allclose(again.vertices[again.faces], surface.vertices[surface.faces], atol=1e-6)
    assert torch.allclose(again.colors, surface.colors, atol=0.06)
    with pytest.raises(SlimeError, match="from GLB files, not obj"):
        nodes.surface_of(Types.File3D(BytesIO(b""), "obj"), 0)
    with pytest.raises(SlimeError, match="Choose a GLB file in Load 3D"):
        nodes.surface_of(None, 0)
