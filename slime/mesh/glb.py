"""Read the mesh of a GLB file (glTF 2.0): triangles in place, colours and base colour textures.

Source: Khronos Group, glTF 2.0 specification, https://registry.khronos.org/glTF/specs/2.0/glTF-2.0.html
"""

from __future__ import annotations

import io
import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import SlimeError
from .surface import Surface

COMPONENTS = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}
TRIANGLES, STRIP, FAN = 4, 5, 6
READABLE = {"KHR_mesh_quantization", "KHR_materials_unlit", "EXT_texture_webp"}  # of the extensions that are required
DAMAGE = (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, OSError, Image.DecompressionBombError)
GAMMA = 2.2  # colours of vertices and materials are linear, those of textures are not
ATLAS_SIDE = 4096  # of several textures side by side


@dataclass(frozen=True)
class Piece:
    """Triangles of one material: arrays of n vertices, and faces int64 [m, 3]."""

    vertices: np.ndarray
    faces: np.ndarray
    colors: np.ndarray  # [n, 3], linear
    uvs: np.ndarray | None
    texture: int | None
    factor: np.ndarray  # [3], linear, of the texture


def read_glb(data: bytes) -> Surface:
    """Return the meshes of a GLB file's scene as one mesh; animation and skins are left out.

    Where there is a texture, vertex colours are left out; several textures become one, side by side.

    Raises:
        SlimeError: another format, a damaged file, data in other files, compression, no triangles.
    """
    document, binary = _chunks(data)
    for extension in document.get("extensionsRequired", []):
        if extension not in READABLE:
            raise SlimeError(f"The GLB file needs {extension}. Export it without compression.")
    try:
        reader = _Reader(document, binary)
        pieces = [piece for mesh, matrix in reader.placed_meshes() for piece in reader.pieces(mesh, matrix)]
        if not pieces:
            raise SlimeError("The GLB file has no triangles. Is it a point cloud or a set of lines?")
        return _joined(reader, pieces)
    except DAMAGE as error:
        raise SlimeError(f"The GLB file is damaged: {error!r}. Export it again.") from error


def _chunks(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the JSON and the binary chunk."""
    if data[:4] != b"glTF":
        raise SlimeError("The file is no GLB file. Export the mesh as GLB.")
    chunks: dict[bytes, bytes] = {}
    start = 12
    while start + 8 <= len(data):
        length, kind = struct.unpack_from("<I4s", data, start)
        chunks.setdefault(kind, data[start + 8 : start + 8 + length])
        start += 8 + length
    if start > len(data):
        raise SlimeError("The GLB file is cut off. Download or export it again.")
    try:
        document = json.loads(chunks[b"JSON"])
        return document if isinstance(document, dict) else {}, chunks.get(b"BIN\0", b"")
    except (KeyError, ValueError, RecursionError) as error:
        raise SlimeError("The GLB file is damaged: it has no readable description. Export it again.") from error


class _Reader:
    def __init__(self, document: dict[str, Any], binary: bytes) -> None:
        self._document = document
        self._binary = binary

    def view(self, index: int) -> tuple[bytes, int]:
        """Return the bytes of a buffer view, and its stride or 0."""
        view = self._document["bufferViews"][index]
        if self._document["buffers"][view["buffer"]].get("uri") is not None:
            raise SlimeError("The GLB file keeps its data in other files. Export it as one GLB file.")
        start = view.get("byteOffset", 0)
        return self._binary[start : start + view["byteLength"]], view.get("byteStride", 0)

    def accessor(self, index: int) -> np.ndarray:
        """Return an array [n, width]; normalised integers become floats."""
        accessor = self._document["accessors"][index]
        if "sparse" in accessor or "bufferView" not in accessor:
            raise SlimeError("The GLB file has sparse arrays, which are not read. Export it again with Blender.")
        data, stride = self.view(accessor["bufferView"])
        kind, width = np.dtype(COMPONENTS[accessor["componentType"]]), WIDTHS[accessor["type"]]
        strides = (stride or kind.itemsize * width, kind.itemsize)
        values = np.ndarray((accessor["count"], width), kind, data, accessor.get("byteOffset", 0), strides)
        if accessor.get("normalized") and kind.kind in "iu":
            return np.maximum(values / np.float32(np.iinfo(kind).max), np.float32(-1))
        return values

    def placed_meshes(self) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """Yield the meshes of the scene with their matrices [4, 4]; without a scene all meshes."""
        nodes, meshes = self._document.get("nodes", []), self._document.get("meshes", [])
        scenes = self._document.get("scenes", [])
        if not scenes or not nodes:
            yield from ((mesh, np.eye(4)) for mesh in meshes)
            return
        waiting = [(index, np.eye(4)) for index in scenes[self._document.get("scene", 0)].get("nodes", [])]
        seen = set()
        while waiting:
            index, above = waiting.pop()
            if index in seen:
                raise SlimeError(f"The GLB file is damaged: node {index} is below two others. Export it again.")
            seen.add(index)
            matrix = above @ _matrix(nodes[index])
            if "mesh" in nodes[index]:
                yield meshes[nodes[index]["mesh"]], matrix
            waiting += [(child, matrix) for child in nodes[index].get("children", [])]

    def pieces(self, mesh: dict[str, Any], matrix: np.ndarray) -> Iterator[Piece]:
        """Yield the triangles of a mesh; points and lines are left out."""
        for primitive in mesh["primitives"]:
            mode = primitive.get("mode", TRIANGLES)
            if mode not in (TRIANGLES, STRIP, FAN):
                continue
            attributes = primitive["attributes"]
            vertices = self.accessor(attributes["POSITION"]) @ matrix[:3, :3].T + matrix[:3, 3]
            if "indices" in primitive:
                order = self.accessor(primitive["indices"]).ravel().astype(np.int64)
            else:
                order = np.arange(len(vertices))
            factor, texture, coordinates = self.material(primitive.get("material"))
            uvs = attributes.get(f"TEXCOORD_{coordinates}")
            colors = np.broadcast_to(factor, vertices.shape)
            if "COLOR_0" in attributes:
                colors = colors * self.accessor(attributes["COLOR_0"])[:, :3]
            uvs = None if uvs is None else self.accessor(uvs).astype(np.float32)
            texture = None if uvs is None else texture
            yield Piece(vertices, _triangles(order, mode), colors, uvs, texture, factor)

    def material(self, index: int | None) -> tuple[np.ndarray, int | None, int]:
        """Return the base colour, and the image and the set of coordinates of its texture."""
        material = {} if index is None else self._document["materials"][index]
        base = material.get("pbrMetallicRoughness", {})
        factor = np.array(base.get("baseColorFactor", (1, 1, 1, 1))[:3], np.float32)
        reference = base.get("baseColorTexture")
        if reference is None:
            return factor, None, 0
        texture = self._document["textures"][reference["index"]]
        webp = texture.get("extensions", {}).get("EXT_texture_webp", {})
        return factor, webp.get("source", texture.get("source")), reference.get("texCoord", 0)

    def image(self, index: int) -> Image.Image:
        image = self._document["images"][index]
        if "bufferView" not in image:
            raise SlimeError("The GLB file keeps a texture in another file. Export it as one GLB file.")
        return Image.open(io.BytesIO(self.view(image["bufferView"])[0])).convert("RGB")


def _matrix(node: dict[str, Any]) -> np.ndarray:
    """Return the matrix [4, 4] of a node."""
    if "matrix" in node:
        return np.array(node["matrix"], float).reshape(4, 4).T
    x, y, z, w = node.get("rotation", (0, 0, 0, 1))
    turn = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(turn) * node.get("scale", (1, 1, 1))
    matrix[:3, 3] = node.get("translation", (0, 0, 0))
    return matrix


def _triangles(order: np.ndarray, mode: int) -> np.ndarray:
    """Return faces int64 [m, 3]."""
    if mode == TRIANGLES:
        return order[: len(order) // 3 * 3].reshape(-1, 3)
    if mode == STRIP:
        return np.stack([order[:-2], order[1:-1], order[2:]], 1)
    return np.stack([np.full(len(order) - 2, order[0]), order[1:-1], order[2:]], 1)


def _joined(reader: _Reader, pieces: list[Piece]) -> Surface:
    starts = np.cumsum([0, *(len(piece.vertices) for piece in pieces)])
    for piece in pieces:
        if piece.faces.size and piece.faces.max() >= len(piece.vertices):
            raise ValueError(f"vertex {piece.faces.max()} of {len(piece.vertices)}")
    faces = np.concatenate([piece.faces + start for piece, start in zip(pieces, starts, strict=False)])
    vertices = torch.from_numpy(np.concatenate([piece.vertices for piece in pieces]))
    if all(piece.texture is None for piece in pieces):
        colors = np.concatenate([piece.colors for piece in pieces]).clip(0, 1) ** (1 / GAMMA)
        return Surface.of(vertices, torch.from_numpy(faces), torch.from_numpy(colors)[torch.from_numpy(faces)])
    uvs, texture = _atlas(reader, pieces)
    return Surface.of(vertices, torch.from_numpy(faces), None, torch.from_numpy(uvs), torch.from_numpy(texture))


def _atlas(reader: _Reader, pieces: list[Piece]) -> tuple[np.ndarray, np.ndarray]:
    """Return the coordinates of all vertices, and one texture with a tile for every material.

    A material without a texture is a tile of its mean colour.
    """
    looks = [(p.texture, tuple(p.colors.mean(0) if p.texture is None else p.factor)) for p in pieces]
    kinds = list(dict.fromkeys(looks))
    images = [None if texture is None else reader.image(texture) for texture, _ in kinds]
    across = math.ceil(math.sqrt(len(kinds)))
    side = min(max(max(image.size) for image in images if image is not None), ATLAS_SIDE // across)
    sides = images[0].size if across == 1 and images[0] is not None else (across * side, across * side)
    atlas = np.zeros((sides[1], sides[0], 3), np.float32)
    for number, (image, (_, color)) in enumerate(zip(images, kinds, strict=True)):
        tile = Image.new("RGB", (side, side), "white") if image is None else image
        pixels = np.asarray(tile if across == 1 else tile.resize((side, side)), np.float32) / 255
        top, left = number // across * side, number % across * side
        atlas[top : top + len(pixels), left : left + pixels.shape[1]] = pixels * np.clip(color, 0, 1) ** (1 / GAMMA)
    uvs = []
    for piece, look in zip(pieces, looks, strict=True):
        number = kinds.index(look)
        own = piece.uvs
        if own is None or piece.texture is None:
            own = np.full((len(piece.vertices), 2), 0.5, np.float32)
        own = np.where((own >= 0) & (own <= 1), own, own - np.floor(own))  # textures repeat
        uvs.append((own + (number % across, number // across)) / across)
    return np.concatenate(uvs).astype(np.float32), atlas
