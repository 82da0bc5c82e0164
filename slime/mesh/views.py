"""Render a mesh from cameras around it, with a depth buffer in plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .surface import Surface

CANDIDATES = 2**22  # pairs of a face and a pixel in its box that are tested at once
DISTANCE, FIELD = 3.0, 40.0  # of the camera from the centre in radii of the mesh, and its field of view in degrees
AMBIENT, BACKGROUND = 0.45, 1.0
NOTHING = -1
BESIDE = 2e-3  # coordinates so little beyond a texture are on its border
MOST_ELEVATION = 85.0  # beyond the pole the image is upside down


class Camera(NamedTuple):
    """A camera that looks at the centre of a mesh, in degrees; azimuth 0 looks along -z, y is up."""

    azimuth: float
    elevation: float = 15.0


def cameras_around(count: int, first: Camera) -> list[Camera]:
    """Return cameras all around; the first is the given one, the others alternate between three elevations."""
    elevations = [min(max(first.elevation + more, -MOST_ELEVATION), MOST_ELEVATION) for more in (0.0, 25.0, -20.0)]
    return [Camera(first.azimuth + 360.0 * index / count, elevations[index % 3]) for index in range(count)]


@dataclass(frozen=True)
class MeshViews:
    """Views of a mesh.

    Attributes:
        surface: the mesh.
        cameras: one per view.
        images: float32 [V, S, S, 3] in [0, 1].
        faces: int32 [V, S, S], the face that each pixel shows, -1 for none.
        facing: float16 [V, S, S], cosine of the angle between the face and the ray, 0 for none.
    """

    surface: Surface
    cameras: tuple[Camera, ...]
    images: Tensor
    faces: Tensor
    facing: Tensor


def render_views(
    surface: Surface,
    cameras: Sequence[Camera],
    side: int = 512,
    on_view: Callable[[int, int], None] = lambda done, total: None,
    device: torch.device | str = "cpu",
) -> MeshViews:
    """Render square images of a mesh, lit from the camera and from above; both sides of a face are seen.

    ``device`` computes; the views are on the CPU.
    """
    rendered, placed = [], surface.to(device)
    for index, camera in enumerate(cameras):
        rendered.append([tensor.cpu() for tensor in _render(placed, camera, side)])
        on_view(index + 1, len(cameras))
    images, faces, facing = (torch.stack(list(parts)) for parts in zip(*rendered, strict=True))
    return MeshViews(surface, tuple(cameras), images, faces, facing)


def _render(surface: Surface, camera: Camera, side: int) -> tuple[Tensor, Tensor, Tensor]:
    device = surface.vertices.device
    rotation = _rotation(camera).to(device)
    seen = surface.corners @ rotation.T  # x right, y up, z towards the camera
    distance = DISTANCE - seen[..., 2]
    focal = 1 / math.tan(math.radians(FIELD / 2))
    pixels = torch.stack([1 + focal * seen[..., 0] / distance, 1 - focal * seen[..., 1] / distance], -1) * side / 2
    faces, weights = rasterise(pixels, 1 / distance, (side, side))
    hit = faces >= 0
    shown = faces[hit].long()
    normals = surface.normals[shown] @ rotation.T
    centre = (seen[shown] * weights[hit][..., None]).sum(1)
    ray = torch.nn.functional.normalize(torch.tensor([0.0, 0.0, DISTANCE]).to(device) - centre, dim=1)
    cosine = (normals * ray).sum(1)
    normals, cosine = normals * torch.where(cosine < 0, -1.0, 1.0)[:, None], cosine.abs()  # inside-out faces too
    above = torch.nn.functional.normalize(torch.tensor([0.3, 0.8, 0.5]).to(device), dim=0)
    light = AMBIENT + 0.35 * cosine + 0.3 * (normals @ above).clamp(min=0)
    image = torch.full((side, side, 3), BACKGROUND, device=device)
    image[hit] = (_colors(surface, shown, weights[hit]) * light[:, None]).clamp(0, 1)
    facing = torch.zeros(side, side, dtype=torch.float16, device=device)
    facing[hit] = cosine.half()
    return image, faces, facing


def _colors(surface: Surface, faces: Tensor, weights: Tensor) -> Tensor:
    """Return the colours [n, 3] at barycentric weights [n, 3] of faces [n]."""
    if surface.texture is None or surface.uvs is None:
        return (surface.colors[faces] * weights[..., None]).sum(1)
    where = (surface.uvs[surface.faces[faces]] * weights[..., None]).sum(1)
    inside = where.clamp(0, 1)
    where = torch.where((where - inside).abs() < BESIDE, inside, where - where.floor()) * 2 - 1  # textures repeat
    texture = surface.texture[..., :3].movedim(-1, 0)[None]
    sampled = torch.nn.functional.grid_sample(texture, where[None, None], padding_mode="border", align_corners=False)
    return sampled[0, :, 0].T


def _rotation(camera: Camera) -> Tensor:
    """Return the matrix from the mesh's axes to the camera's."""
    a, e = math.radians(camera.azimuth), math.radians(camera.elevation)
    turn = torch.tensor([[math.cos(a), 0.0, -math.sin(a)], [0.0, 1.0, 0.0], [math.sin(a), 0.0, math.cos(a)]])
    tilt = torch.tensor([[1.0, 0.0, 0.0], [0.0, math.cos(e), -math.sin(e)], [0.0, math.sin(e), math.cos(e)]])
    return tilt @ turn


def rasterise(corners: Tensor, inverse: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Find the nearest face of every pixel.

    Args:
        corners: [M, 3, 2], x and y of every corner in pixels.
        inverse: [M, 3], 1 / depth of every corner, above 0.
        size: height and width.

    Returns:
        Faces int32 [H, W], -1 for none; perspective-correct barycentric weights [H, W, 3].
    """
    (height, width), device = size, corners.device
    low = (corners.amin(1) - 0.5).ceil().long().clamp(min=0)
    high = (corners.amax(1) - 0.5).floor().long()
    high = torch.minimum(high, torch.tensor([width - 1, height - 1]).to(device))
    spans = (high - low + 1).clamp(min=0)
    counts = spans[:, 0] * spans[:, 1]
    (first, second, third) = corners.unbind(1)
    area = _cross(second - first, third - first)
    counts = torch.where(area.abs() > 1e-9, counts, 0)  # degenerate faces
    best = torch.full((height * width,), torch.iinfo(torch.int64).max, device=device)
    chosen = counts.nonzero().flatten()
    ends = counts[chosen].cumsum(0)
    start = 0
    while start < len(chosen):  # a batch of faces at a time, at least one
        limit = CANDIDATES + (int(ends[start - 1]) if start else 0)
        stop = max(start + 1, int(torch.searchsorted(ends, limit, right=True)))
        for face, pixel, _, depth in _hits(chosen[start:stop], corners, inverse, low, spans, counts, area, width):
            key = depth.float().view(torch.int32).long() << 32 | face  # positive floats sort as their bits do
            best.scatter_reduce_(0, pixel, key, "amin")
        start = stop
    hit = best != torch.iinfo(torch.int64).max
    faces = torch.where(hit, best & 0xFFFFFFFF, NOTHING).to(torch.int32)
    weights = torch.zeros(height * width, 3, device=device)
    pixel = hit.nonzero().flatten()
    face = faces[pixel].long()
    flat = _barycentric(_centres(pixel, width), corners[face], area[face])
    scaled = flat * inverse[face]
    weights[pixel] = scaled / scaled.sum(1, keepdim=True)
    return faces.view(height, width), weights.view(height, width, 3)


def _hits(
    faces: Tensor,
    corners: Tensor,
    inverse: Tensor,
    low: Tensor,
    spans: Tensor,
    counts: Tensor,
    area: Tensor,
    width: int,
) -> Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return faces, pixels, barycentric weights and depths of all pixels that lie inside of one of the faces."""
    results = []
    # A single face may fill the image: its pixels are cut into pieces as well.
    most = int(counts[faces].max())
    for offset in range(0, most, CANDIDATES):
        left = (counts[faces] - offset).clamp(min=0, max=CANDIDATES)
        owner = faces.repeat_interleave(left)
        before = (left.cumsum(0) - left).repeat_interleave(left)
        number = torch.arange(len(owner), device=faces.device) - before + offset
        x = low[owner, 0] + number % spans[owner, 0]
        y = low[owner, 1] + number // spans[owner, 0]
        pixel = y * width + x
        weights = _barycentric(_centres(pixel, width), corners[owner], area[owner])
        inside = (weights >= -1e-6).all(1)
        owner, pixel, weights = owner[inside], pixel[inside], weights[inside]
        results.append((owner, pixel, weights, 1 / (weights * inverse[owner]).sum(1)))
    return results


def _centres(pixel: Tensor, width: int) -> Tensor:
    return torch.stack([pixel % width, pixel // width], 1) + 0.5


def _barycentric(points: Tensor, corners: Tensor, area: Tensor) -> Tensor:
    first, second, third = corners.unbind(1)
    a = _cross(second - points, third - points) / area
    b = _cross(third - points, first - points) / area
    return torch.stack([a, b, 1 - a - b], 1)


def _cross(first: Tensor, second: Tensor) -> Tensor:
    return first[..., 0] * second[..., 1] - first[..., 1] * second[..., 0]
