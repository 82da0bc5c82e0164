"""Views of a mesh, and the parts of its faces from the parts of its views."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from slime import SlimeError
from slime.examples import IGNORE
from slime.mesh.parts import VoteSettings, face_probabilities, label_texture
from slime.mesh.surface import Surface
from slime.mesh.views import Camera, cameras_around, rasterise, render_views
from slime.parts.maps import HardMaps, PartMaps
from slime.parts.palette import default_palette
from testing import meshes


def seen(views, labels: torch.Tensor, count: int) -> PartMaps:
    maps = torch.where(views.faces >= 0, labels[views.faces.long().clamp(min=0)], 0).byte()
    names, peaks = tuple("abcd"[:count]), torch.ones(len(maps), count)
    return PartMaps(HardMaps(maps, count + 1), names, default_palette(count), peaks)


def test_the_nearest_face_is_seen_and_its_pixels_are_exact() -> None:
    far = torch.tensor([[[0.0, 0.0], [16.0, 0.0], [0.0, 16.0]]])
    near = torch.tensor([[[4.0, 4.0], [8.0, 4.0], [4.0, 8.0]]])
    corners = torch.cat([far, near, torch.tensor([[[1.0, 1.0], [5.0, 5.0], [9.0, 9.0]]])])  # and a degenerate one
    inverse = torch.tensor([[0.25], [0.5], [0.9]]).expand(3, 3)
    faces, weights = rasterise(corners, inverse, (16, 16))
    y, x = torch.meshgrid(torch.arange(16) + 0.5, torch.arange(16) + 0.5, indexing="ij")
    inside = (x > 4) & (y > 4) & (x + y <= 12)
    assert torch.equal(faces == 1, inside) and torch.equal(faces >= 0, x + y <= 16) and not (faces == 2).any()
    assert torch.allclose(weights[faces >= 0].sum(1), torch.ones(int((faces >= 0).sum())), atol=1e-5)


def test_large_and_outlying_faces_are_cut_to_the_image(monkeypatch) -> None:
    monkeypatch.setattr("slime.mesh.views.CANDIDATES", 100)
    huge = [[-1000.0, -1000.0], [3000.0, -1000.0], [-1000.0, 3000.0]]
    corners = torch.tensor([huge, [[50.0, 50.0], [60.0, 50.0], [50.0, 60.0]]])
    faces, _ = rasterise(corners, torch.ones(2, 3), (32, 32))
    assert (faces == 0).all()


def test_views_show_the_mesh_from_where_the_camera_stands() -> None:
    builder = meshes.Builder(np.random.default_rng(0))
    for part, axis in ((1, 2), (2, 0)):  # a box at +z and one at +x
        low, high = [-0.2, -0.2, -0.2], [0.2, 0.2, 0.2]
        low[axis], high[axis] = 0.6, 1.0
        builder.box(low, high, part, torch.ones(3), 2)
    surface, truth = builder.surface()
    views = render_views(surface, [Camera(0.0, 0.0), Camera(90.0, 0.0)], 64)
    labels = torch.where(views.faces >= 0, truth[views.faces.long().clamp(min=0)], 0)
    for label_map, nearer in zip(labels, (1, 2), strict=True):
        columns = [(label_map == part).nonzero()[:, 1].float().mean() for part in (1, 2)]
        assert columns[0] < 28 and columns[1] > 36  # +z to the left of +x, seen from the front and from the right
        assert (label_map == nearer).sum() > (label_map == 3 - nearer).sum() > 0
    above = render_views(surface, [Camera(0.0, 60.0)], 64)
    assert (above.faces[0] >= 0).any() and above.images.shape == (1, 64, 64, 3)
    assert len(cameras_around(5, Camera(10.0))) == 5 and cameras_around(5, Camera(10.0))[0] == Camera(10.0)


@pytest.mark.parametrize("domain", meshes.DOMAINS)
def test_true_views_give_the_true_parts(domain) -> None:
    surface, truth = meshes.build(domain, 1)
    count = len(meshes.PARTS[domain])
    views = render_views(surface, cameras_around(12, Camera(30.0)), 128)
    found = face_probabilities(views, seen(views, truth, count), VoteSettings()).argmax(1)
    assert surface.areas[found == truth].sum() / surface.areas.sum() > 0.95
    turned = Surface.of(surface.vertices, surface.faces.flip(1), surface.colors)  # inside out
    images = [render_views(mesh, [Camera(30.0)], 64).images for mesh in (surface, turned)]
    assert (images[0] - images[1]).abs().max() < 0.02


def test_what_was_painted_counts_more_than_what_was_found() -> None:
    surface, truth = meshes.build("car", 2)
    views = render_views(surface, cameras_around(4, Camera(30.0)), 96)
    wrong = seen(views, torch.full_like(truth, 1), 4)
    right = seen(views, truth, 4).label_map[0].long()
    painted = face_probabilities(views, wrong, VoteSettings(smoothing=0), {0: right}).argmax(1)
    shown = views.faces[0][views.facing[0] > 0.3].long().unique()
    assert (painted[shown] == truth[shown]).float().mean() > 0.95
    ignored = face_probabilities(views, wrong, VoteSettings(smoothing=0), {0: torch.full_like(right, IGNORE)})
    assert (ignored.argmax(1)[shown] == 1).all()


def test_a_sure_vote_outweighs_unsure_ones_and_smoothing_stops_at_creases() -> None:
    vertices = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [2, 0, 0], [2, 1, 0], [1, 0, 1], [1, 1, 1]])
    flat = Surface.of(vertices, torch.tensor([[0, 1, 2], [0, 2, 3], [1, 4, 5], [1, 5, 2]]))
    bent = Surface.of(vertices, torch.tensor([[0, 1, 2], [0, 2, 3], [1, 6, 7], [1, 7, 2]]))
    assert len(flat.neighbours.first) == len(bent.neighbours.first) == 3
    from slime.mesh.parts import _smooth

    values = torch.tensor([[1.0, 0.0]] * 2 + [[0.0, 1.0]] * 2)
    seen_by = torch.ones(4)
    settings = VoteSettings(smoothing=4)
    mixed, kept = (_smooth(mesh, values, seen_by, settings, lambda: None)[:, 0] for mesh in (flat, bent))
    assert mixed[0] < 0.9 and kept[0] > 0.99
    blade = vertices.clone()
    blade[6:, :2] -= torch.tensor([0.98, 0.0])  # the second pair of faces lies almost on the first
    blade[6:, 2] = 0.05
    sharp = Surface.of(blade, torch.tensor([[0, 1, 2], [0, 2, 3], [1, 6, 7], [1, 7, 2]]))
    assert _smooth(sharp, values, seen_by, settings, lambda: None)[0, 0] > 0.99
    turned = Surface.of(vertices, torch.tensor([[0, 1, 2], [0, 2, 3], [5, 4, 1], [2, 5, 1]]))  # other side out
    assert torch.allclose(_smooth(turned, values, seen_by, settings, lambda: None)[0, 0], mixed[0], atol=1e-4)


def test_stray_vertices_scale_and_poles_change_nothing() -> None:
    surface, truth = meshes.build("car", 4)
    stray = torch.cat([surface.vertices, torch.tensor([[1000.0, 0, 0], [math.nan, 0, 0]])])
    wanted = render_views(surface, [Camera(30.0)], 64).faces
    for vertices in (stray, surface.vertices * 1e19, surface.vertices * 1e-19):
        found = render_views(Surface.of(vertices, surface.faces, surface.colors), [Camera(30.0)], 64).faces
        assert ((found >= 0) == (wanted >= 0)).float().mean() > 0.99
    assert all(abs(camera.elevation) < 90 for camera in cameras_around(6, Camera(0.0, 80.0)))
    views = render_views(surface, cameras_around(4, Camera(30.0)), 64)
    unsure = seen(views, truth, 4)
    unsure.peaks.zero_()
    assert (face_probabilities(views, unsure, VoteSettings()).argmax(1) == truth).float().mean() > 0.7
    nan = Surface.of(surface.vertices, surface.faces, torch.full_like(surface.colors, math.nan))
    assert render_views(nan, [Camera(30.0)], 32).images.isfinite().all()


def test_faces_that_nobody_saw_take_their_neighbours_parts() -> None:
    surface, truth = meshes.build("horse", 3)
    views = render_views(surface, [Camera(90.0)], 128)
    found = face_probabilities(views, seen(views, truth, 4), VoteSettings()).argmax(1)
    assert (found > 0).float().mean() > 0.9  # hardly a face is without a part, though one side alone was seen


def test_labels_on_the_texture() -> None:
    vertices = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]])
    faces, uvs = torch.tensor([[0, 1, 2], [0, 2, 3]]), vertices[:, :2]
    texture = torch.zeros(8, 8, 3)
    texture[:, 4:] = torch.tensor([1.0, 0.0, 0.0])
    surface = Surface.of(vertices, faces, uvs=uvs, texture=texture)
    image = label_texture(surface, torch.tensor([1, 2]), 16)
    assert image[2, 12] == 1 and image[12, 2] == 2
    seen_texture = render_views(surface, [Camera(0.0, 0.0)], 64).images[0]
    assert seen_texture[32, 26, 0] < 0.2 and seen_texture[32, 38, 0] > 0.6
    with pytest.raises(SlimeError, match="no texture coordinates"):
        label_texture(Surface.of(vertices, faces), torch.tensor([1, 2]))


BAD = {
    "has no faces": (torch.rand(4, 3), torch.zeros(0, 3, dtype=torch.long)),
    "NaN or infinite": (torch.full((3, 3), math.nan), torch.tensor([[0, 1, 2]])),
    "but there are 3": (torch.rand(3, 3), torch.tensor([[0, 1, 3]])),
    "in one place": (torch.ones(3, 3), torch.tensor([[0, 1, 2]])),
    "do not form a triangle mesh": (torch.rand(4, 3), torch.tensor([[0, 1, 2, 3]])),
    "Decimate": (torch.rand(3, 3), torch.tensor([[0, 1, 2]]).expand(4_000_001, 3)),
    "texture coordinates of the shape": (torch.rand(3, 3), torch.tensor([[0, 1, 2]]), None, torch.zeros(2, 2)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_meshes_are_refused(message) -> None:
    with pytest.raises(SlimeError, match=message):
        Surface.of(*BAD[message])


def test_odd_meshes_are_answered() -> None:
    """Three faces at one edge, degenerate faces, a piece that no camera sees."""
    vertices = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0.5, 0.01, 0.01]])
    faces = torch.tensor([[0, 1, 2], [0, 1, 3], [0, 1, 4], [1, 1, 2], [5, 5, 5]])
    surface = Surface.of(vertices, faces)
    assert len(surface.neighbours.first) >= 2
    views = render_views(surface, cameras_around(3, Camera(0.0)), 64)
    found = face_probabilities(views, seen(views, torch.tensor([1, 1, 2, 1, 1]), 2), VoteSettings())
    assert found.isfinite().all() and found.shape == (5, 3)
    one = seen(render_views(surface, [Camera(0.0)], 64), torch.ones(5).long(), 2)
    with pytest.raises(SlimeError, match="are of 1 images"):
        face_probabilities(views, one, VoteSettings())
