"""The parts of a mesh's faces from the part maps of its views, by votes of the pixels that show them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor
from torch.nn.functional import one_hot

from ..errors import SlimeError
from ..examples import IGNORE
from ..parts.maps import PartMaps
from ..settings import check_settings
from .surface import Surface
from .views import MeshViews, rasterise

CheckCancelled = Callable[[], None]
PAINTED_WEIGHT = 10.0  # of a pixel that was painted, against one that was found
LEAST_FACING = 0.1  # cosine; pixels of faces that are seen from their edge do not vote
CONFIDENCE_POWER, LEAST_CONFIDENCE = 2.0, 0.05


@dataclass(frozen=True)
class VoteSettings:
    """How pixels vote on the parts of faces.

    Attributes:
        weighted: a vote counts by the confidence of its view and of its pixel, and by how squarely the face is seen;
            else all alike.
        smoothing: steps of averaging along the surface.
        crease: degrees; neighbours whose normals differ by more count little.
    """

    weighted: bool = True
    smoothing: int = 3
    crease: float = 30.0

    def __post_init__(self) -> None:
        check_settings(self, smoothing=(0, 100), crease=(1, 180))


def face_probabilities(
    views: MeshViews,
    maps: PartMaps,
    settings: VoteSettings,
    painted: Mapping[int, Tensor] | None = None,
    check_cancelled: CheckCancelled = lambda: None,
) -> Tensor:
    """Return the probabilities float32 [M, K] of the background and the parts for every face.

    The background of a view counts only where it lies on the mesh: there it means no part.

    Args:
        views: of the mesh.
        maps: of the images of the views.
        settings: of the votes.
        painted: label maps [S, S] of views that were painted, by their number, instead of what was found in them.
        check_cancelled: called again and again; an exception from it ends the work.

    Raises:
        SlimeError: maps of other images than the views.
    """
    if len(maps) != len(views.cameras) or maps.size != tuple(views.faces.shape[1:]):
        raise SlimeError(
            f"The parts are of {len(maps)} images of {maps.size[1]}x{maps.size[0]}, the views are "
            f"{len(views.cameras)} of {views.faces.shape[2]}x{views.faces.shape[1]}. Segment the images of SLiMe Mesh "
            "Views as they are."
        )
    classes = maps.source.shape[1]
    votes, weight_sum = torch.zeros(len(views.surface), classes), torch.zeros(len(views.surface))
    sure = maps.confidence.clamp(LEAST_CONFIDENCE, 1) ** CONFIDENCE_POWER
    number = 0
    for chunk, probabilities in maps.chunks():
        for faces, facing, found in zip(views.faces[chunk], views.facing[chunk], probabilities, strict=True):
            labels = (painted or {}).get(number)
            shown = found if labels is None else _painted_over(found, labels)
            hit = (faces >= 0) & (facing > LEAST_FACING)
            face, values = faces[hit].long(), shown[:, hit].T  # [n, K]
            weight = torch.ones(len(face))
            if settings.weighted:
                weight = facing[hit].float() * values.amax(1) ** CONFIDENCE_POWER * sure[number]
            if labels is not None:
                weight = PAINTED_WEIGHT * facing[hit].float()
            number += 1
            check_cancelled()
            votes.index_add_(0, face, values * weight[:, None])
            weight_sum.index_add_(0, face, weight)
    known = weight_sum > 0
    if not bool(known.any()):
        raise SlimeError("No face of the mesh is seen in any view. Render more views.")
    votes[known] /= weight_sum[known, None]
    filled = _spread(views.surface, votes, known, check_cancelled)
    return _smooth(views.surface, filled, weight_sum, settings, check_cancelled)


def _painted_over(found: Tensor, labels: Tensor) -> Tensor:
    """Return probabilities [K, H, W] that are certain of a label map [H, W], and as found where pixels are ignored."""
    certain = one_hot(torch.where(labels == IGNORE, 0, labels).long(), len(found)).movedim(-1, 0).float()
    return torch.where(labels == IGNORE, found, certain)


def _spread(surface: Surface, values: Tensor, known: Tensor, check_cancelled: CheckCancelled) -> Tensor:
    """Give faces that nobody saw the mean of their neighbours' values, step by step over the surface."""
    values, known = values.clone(), known.clone()
    first, second, _ = surface.neighbours
    source, target = torch.cat([first, second]), torch.cat([second, first])
    while True:
        open_ = ~known[target]
        source, target = source[open_], target[open_]
        useful = known[source]
        reached, where = target[useful].unique(return_inverse=True)
        if not len(reached):
            break
        total = torch.zeros(len(reached), values.shape[1]).index_add_(0, where, values[source[useful]])
        values[reached], known[reached] = total / where.bincount()[:, None], True
        check_cancelled()
    if not bool(known.all()):  # pieces of which nothing was seen: the nearest face that was
        centres = np.asarray(surface.corners.mean(1))
        lost, there = (~known).nonzero().flatten(), known.nonzero().flatten()
        nearest = np.atleast_1d(cKDTree(centres[there.numpy()]).query(centres[lost.numpy()])[1])
        values[lost] = values[there[torch.from_numpy(nearest)]]
    return values


def _smooth(
    surface: Surface, values: Tensor, seen: Tensor, settings: VoteSettings, check_cancelled: CheckCancelled
) -> Tensor:
    """Average along the surface; less across creases, and less for faces that many pixels voted on."""
    first, second, consistent = surface.neighbours
    cosine = (surface.normals[first] * surface.normals[second]).sum(1)
    angle = torch.acos(torch.where(consistent, cosine, -cosine).clamp(-1.0, 1.0))
    weight = torch.exp(-((angle / torch.deg2rad(torch.tensor(settings.crease))) ** 2))
    inertia = 1 + seen / seen[seen > 0].median()
    for _ in range(settings.smoothing):
        total, count = values * inertia[:, None], inertia.clone()
        for source, target in ((first, second), (second, first)):
            total.index_add_(0, target, values[source] * weight[:, None])
            count.index_add_(0, target, weight)
        values = total / count[:, None]
        check_cancelled()
    return values


def label_texture(surface: Surface, labels: Tensor, side: int = 1024) -> Tensor:
    """Return the labels uint8 [side, side] of faces int64 [M] on the mesh's texture, 0 where no face lies.

    Raises:
        SlimeError: a mesh without texture coordinates.
    """
    if surface.uvs is None:
        raise SlimeError("The mesh has no texture coordinates (UVs), so there is no texture to label. Unwrap it first.")
    corners = surface.uvs[surface.faces] * side
    faces, _ = rasterise(corners, torch.ones(len(surface), 3), (side, side))
    return torch.where(faces >= 0, labels[faces.long().clamp(min=0)], 0).to(torch.uint8)
