"""A triangle mesh, checked, and its neighbouring faces."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import SlimeError

MOST_FACES = 4_000_000


@dataclass(frozen=True)
class Surface:
    """A triangle mesh on the CPU.

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
                f"Vertices of the shape {list(vertices.shape)} and faces of {list(faces.shape)} are no triangle mesh."
            )
        if not len(faces):
            raise SlimeError("The mesh has no faces. Is it a point cloud? Make a surface of it first.")
        if len(faces) > MOST_FACES:
            raise SlimeError(f"The mesh has {len(faces)} faces; at most {MOST_FACES} are possible. Decimate it first.")
        if not bool(vertices.isfinite().all()):
            raise SlimeError("The mesh has NaN or infinite vertices. Repair it first.")
        low, high = int(faces.min()), int(faces.max())
        if low < 0 or high >= len(vertices):
            raise SlimeError(f"The mesh's faces name the vertices {low} to {high}, but there are {len(vertices)}.")
        if not bool((vertices.amax(0) - vertices.amin(0)).any()):
            raise SlimeError("All vertices of the mesh are in one place.")
        grey = torch.full((len(faces), 3, 3), 0.7)
        colors = grey if colors is None else colors.detach().cpu().float().clamp(0, 1)
        uvs, texture = (None if given is None else given.detach().cpu().float() for given in (uvs, texture))
        return cls(vertices, faces, colors, uvs, texture if uvs is not None else None)

    def __len__(self) -> int:
        return len(self.faces)

    @cached_property
    def corners(self) -> Tensor:
        """float32 [M, 3, 3], the corners of every face, centred and scaled so that all lie within the unit sphere."""
        centre = (self.vertices.amax(0) + self.vertices.amin(0)) / 2
        radius = (self.vertices - centre).norm(dim=1).max()
        return ((self.vertices - centre) / radius)[self.faces]

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
    def neighbours(self) -> Tensor:
        """int64 [2, E], pairs of faces that share an edge; corners in one place count as one vertex.

        Where more than two faces meet at an edge, each is paired with the next.
        """
        _, merged = torch.unique((self.corners.flatten(0, 1) * 1e5).round().long(), dim=0, return_inverse=True)
        triangles = merged.view(-1, 3)
        edges = torch.cat([triangles[:, [0, 1]], triangles[:, [1, 2]], triangles[:, [2, 0]]]).sort(1).values
        owners = torch.arange(len(self)).repeat(3)
        proper = edges[:, 0] != edges[:, 1]
        keys, owners = edges[proper, 0] * (int(merged.max()) + 1) + edges[proper, 1], owners[proper]
        order = keys.argsort()
        keys, owners = keys[order], owners[order]
        shared = (keys[1:] == keys[:-1]).nonzero().flatten()
        return torch.stack([owners[shared], owners[shared + 1]])
