"""A triangle mesh, checked, and its neighbouring faces."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import SlimeError

MOST_FACES = 4_000_000
PLACES = 2**19  # per radius of the mesh; corners in one of these places are one vertex


class Neighbours(NamedTuple):
    """Pairs of faces int64 [E], and bool [E] whether both have the same side out."""

    first: Tensor
    second: Tensor
    consistent: Tensor


@dataclass(frozen=True)
class Surface:
    """A triangle mesh.

    Attributes:
        vertices: float32 [N, 3].
        faces: int64 [M, 3]; degenerate ones are kept, and seen from nowhere.
        colors: float32 [M, 3, 3] in [0, 1], sRGB colour of every corner of every face.
        uvs: float32 [N, 2] in 0..1 from the top left, or None.
        texture: float32 [H, W, 3] in [0, 1] that gives the colours instead, or None.
    """

    vertices: Tensor
    faces: Tensor
    colors: Tensor
    uvs: Tensor | None = None
    texture: Tensor | None = None

    @classmethod
    def of(
        cls,
        vertices: Tensor,
        faces: Tensor,
        colors: Tensor | None = None,
        uvs: Tensor | None = None,
        texture: Tensor | None = None,
    ) -> Surface:
        """Check a mesh; without colours it is grey.

        Raises:
            SlimeError: no faces, too many, vertices that are not finite or all in one place, faces of missing vertices.
        """
        vertices, faces = vertices.detach().cpu().float(), faces.detach().cpu().long()
        if faces.ndim != 2 or faces.shape[-1] != 3 or vertices.ndim != 2 or vertices.shape[-1] != 3:
            raise SlimeError(
                f"Vertices of the shape {list(vertices.shape)} and faces of {list(faces.shape)} do not form a triangle "
                "mesh. Triangulate it first."
            )
        if not len(faces):
            raise SlimeError("The mesh has no faces. Is it a point cloud? Make a surface of it first.")
        if len(faces) > MOST_FACES:
            raise SlimeError(f"The mesh has {len(faces)} faces; at most {MOST_FACES} are possible. Decimate it first.")
        low, high = int(faces.min()), int(faces.max())
        if low < 0 or high >= len(vertices):
            raise SlimeError(
                f"The faces refer to vertices {low} to {high}, but there are {len(vertices)}. Export it again."
            )
        if uvs is not None and uvs.shape != (len(vertices), 2):
            raise SlimeError(
                f"The mesh has texture coordinates of the shape {list(uvs.shape)} for {len(vertices)} vertices. "
                "Export it again."
            )
        used = vertices[faces.unique()]  # others may be anywhere
        if not bool(used.isfinite().all()):
            raise SlimeError("The mesh has NaN or infinite vertices. Repair it first.")
        if not bool((used.amax(0) - used.amin(0)).any()):
            raise SlimeError("All vertices of the mesh are in one place. Check its scale.")
        grey = torch.full((len(faces), 3, 3), 0.7)
        colors = grey if colors is None else colors.detach().cpu().float().nan_to_num().clamp(0, 1)
        uvs, texture = (None if given is None else given.detach().cpu().float() for given in (uvs, texture))
        return cls(vertices, faces, colors, uvs, texture if uvs is not None else None)

    def to(self, device: torch.device | str) -> Surface:
        """Return the mesh on another device."""
        uvs, texture = (None if given is None else given.to(device) for given in (self.uvs, self.texture))
        return Surface(self.vertices.to(device), self.faces.to(device), self.colors.to(device), uvs, texture)

    def __len__(self) -> int:
        return len(self.faces)

    @cached_property
    def corners(self) -> Tensor:
        """float32 [M, 3, 3], the corners of every face, centred and scaled so that all lie within the unit sphere."""
        corners = self.vertices[self.faces].double()
        low, high = corners.amin((0, 1)), corners.amax((0, 1))
        centred = (corners - (low + high) / 2) / (high - low).max()  # first to about 1: squares may overflow
        return (centred / centred.norm(dim=2).max()).float()

    @cached_property
    def normals(self) -> Tensor:
        """float32 [M, 3], unit normals; zero for degenerate faces."""
        first, second, third = self.corners.unbind(1)
        return torch.nn.functional.normalize(torch.linalg.cross(second - first, third - first), dim=1, eps=1e-12)

    @cached_property
    def areas(self) -> Tensor:
        """float32 [M]."""
        first, second, third = self.corners.unbind(1)
        return torch.linalg.cross(second - first, third - first).norm(dim=1) / 2

    @cached_property
    def neighbours(self) -> Neighbours:
        """Pairs of faces that share an edge; corners in one place count as one vertex.

        Where more than two faces meet at an edge, each is paired with the next.
        """
        places = ((self.corners.flatten(0, 1) + 1) * PLACES).round().long()
        packed = (places[:, 0] << 42) | (places[:, 1] << 21) | places[:, 2]
        triangles = torch.unique(packed, return_inverse=True)[1].view(-1, 3)
        starts, ends = triangles.T.flatten(), triangles.roll(-1, 1).T.flatten()
        owners, forwards = torch.arange(len(self)).repeat(3), starts < ends
        keys = torch.where(forwards, starts << 32 | ends, ends << 32 | starts)
        keys, order = keys[starts != ends].sort()
        owners, forwards = owners[starts != ends][order], forwards[starts != ends][order]
        shared = (keys[1:] == keys[:-1]).nonzero().flatten()
        return Neighbours(owners[shared], owners[shared + 1], forwards[shared] != forwards[shared + 1])
