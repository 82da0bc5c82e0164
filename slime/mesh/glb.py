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
from scipy.spatial.transform import Rotation

from ..errors import SlimeError
from .surface import MOST_FACES, Surface

COMPONENTS = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}
TRIANGLES, STRIP, FAN = 4, 5, 6
TRANSFORM, WEBP = "KHR_texture_transform", "EXT_texture_webp"
# Extensions that a file may require; others change the data itself.
READABLE = (TRANSFORM, WEBP, "KHR_mesh_quantization", "KHR_materials_", "KHR_lights_")
COMPRESSED = ("KHR_draco_mesh_compression", "EXT_meshopt_compression", "KHR_texture_basisu")
CLAMPED = 33071  # coordinates beyond a texture take its border; else the texture repeats
DAMAGE = (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, OSError)
GAMMA = 2.2  # colours of vertices and materials are linear, those of textures are not
TEXTURE_SIDE = 4096  # most of a texture, or of several side by side
HEAD, CHUNK = struct.Struct("<4sII"), struct.Struct("<I4s")


@dataclass(frozen=True)
class Piece:
    """Triangles of one material: arrays of n vertices, and faces int64 [m, 3]."""

    vertices: np.ndarray
    faces: np.ndarray
    colors: np.ndarray | None  # [n, 3], linear
    uvs: np.ndarray | None  # [n, 2] in [0, 1], but where a face shows a texture more than once
    texture: int | None
    factor: np.ndarray  # [3], linear, of the texture


def read_glb(data: bytes) -> Surface:
    """Return the meshes of a GLB file's scene as one mesh; animation and skins are left out.

    If any material has a texture, vertex colours are left out; several textures become one, side by side.

    Raises:
        SlimeError: another format, a damaged file, data in other files, compression, no triangles, too many.
    """
    document, binary = _chunks(data)
    try:
        for extension in document.get("extensionsRequired", []):
            if not extension.startswith(READABLE):
                cure = "without compression" if extension in COMPRESSED else "without it"
                raise SlimeError(f"The GLB file needs {extension}, which SLiMe cannot read. Export it {cure}.")
        reader, pieces, count = _Reader(document, binary), [], 0
        for mesh, matrix in reader.placed_meshes():
            for piece in reader.pieces(mesh, matrix):
                pieces.append(piece)
                count += len(piece.faces)
                if count > MOST_FACES:
                    raise SlimeError(f"The GLB file has more than {MOST_FACES} faces. Decimate the mesh first.")
        if not count:
            raise SlimeError("The GLB file has no triangles. Is it a point cloud or a set of lines?")
        return _joined(reader, pieces)
    except SlimeError:
        raise
    except Image.DecompressionBombError as error:
        raise SlimeError(f"A texture of the GLB file is too large ({error}). Make it smaller.") from error
    except DAMAGE as error:
        raise SlimeError(f"The GLB file is damaged ({type(error).__name__}: {error}). Export it again.") from error


def _chunks(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the JSON and the binary chunk."""
    if data[:4] != b"glTF":
        raise SlimeError("This is not a GLB file. Export the mesh as GLB.")
    if len(data) >= HEAD.size and HEAD.unpack_from(data)[1] != 2:
        raise SlimeError(f"The file is glTF {HEAD.unpack_from(data)[1]}. Export the mesh as glTF 2.0 (GLB).")
    chunks: dict[bytes, bytes] = {}
    start = HEAD.size
    end = HEAD.unpack_from(data)[2] if len(data) >= start else start
    while start + CHUNK.size <= min(end, len(data)):
        length, chunk_type = CHUNK.unpack_from(data, start)
        start += CHUNK.size
        chunks.setdefault(chunk_type, data[start : start + length])
        start += length
    if max(start, end) > len(data):
        raise SlimeError("The GLB file is cut off. Download or export it again.")
    try:
        document = json.loads(chunks[b"JSON"])
        return document if isinstance(document, dict) else {}, chunks.get(b"BIN\0", b"")
    except (KeyError, ValueError, RecursionError) as error:
        raise SlimeError("The GLB file is damaged: its JSON header cannot be read. Export it again.") from error


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
            raise SlimeError(
                "The GLB file has sparse arrays, which SLiMe cannot read. Apply shape keys, and export it again."
            )
        data, stride = self.view(accessor["bufferView"])
        dtype, width = np.dtype(COMPONENTS[accessor["componentType"]]), WIDTHS[accessor["type"]]
        strides = (stride or dtype.itemsize * width, dtype.itemsize)
        values = np.ndarray((accessor["count"], width), dtype, data, accessor.get("byteOffset", 0), strides)
        if accessor.get("normalized") and dtype.kind in "iu":
            return np.maximum(values / np.float32(np.iinfo(dtype).max), np.float32(-1))
        return values

    def placed_meshes(self) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """Yield the meshes of the scene with their matrices [4, 4]; without a scene of all nodes, or all meshes."""
        nodes, meshes = self._document.get("nodes", []), self._document.get("meshes", [])
        scenes = self._document.get("scenes", [])
        if not nodes:
            yield from ((mesh, np.eye(4)) for mesh in meshes)
            return
        below = {child for node in nodes for child in node.get("children", [])}
        roots = [index for index in range(len(nodes)) if index not in below]
        roots = scenes[self._document.get("scene", 0)].get("nodes", []) if scenes else roots
        waiting = [(index, np.eye(4)) for index in roots]
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
            faces = _triangles(order, mode)
            if faces.size and not 0 <= faces.min() <= faces.max() < len(vertices):
                raise ValueError(f"faces of the vertices {faces.min()} to {faces.max()} of {len(vertices)}")
            if np.linalg.det(matrix[:3, :3]) < 0:
                faces = faces[:, ::-1]  # mirrored
            material = {} if "material" not in primitive else self._document["materials"][primitive["material"]]
            base = material.get("pbrMetallicRoughness", {})
            factor = np.array(base.get("baseColorFactor", (1, 1, 1, 1))[:3], np.float32)
            colors = np.broadcast_to(factor, vertices.shape) if "baseColorFactor" in base else None
            if "COLOR_0" in attributes:
                colors = factor * self.accessor(attributes["COLOR_0"])[:, :3]
            texture, uvs = self.texture(base.get("baseColorTexture"), attributes)
            if uvs is None:
                yield Piece(vertices, faces, colors, None, None, factor)
            else:  # no face shares a vertex: each is moved to where the texture is
                corners, uvs = faces.ravel(), uvs[faces.ravel()]
                faces = np.arange(len(corners)).reshape(-1, 3)
                yield Piece(vertices[corners], faces, None, uvs, texture, factor)

    def texture(self, info: dict[str, Any] | None, attributes: dict[str, int]) -> tuple[int | None, np.ndarray | None]:
        """Return the image and the coordinates of a texture, or None where there is none."""
        transform = (info or {}).get("extensions", {}).get(TRANSFORM, {})
        name = f"TEXCOORD_{transform.get('texCoord', (info or {}).get('texCoord', 0))}"
        if info is None or name not in attributes:
            return None, None
        uvs = self.accessor(attributes[name]).astype(np.float32)
        if len(uvs) != self._document["accessors"][attributes["POSITION"]]["count"]:
            raise ValueError(f"{len(uvs)} coordinates of a texture")
        angle, offset = transform.get("rotation", 0.0), transform.get("offset", (0, 0))
        turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        uvs = (uvs * transform.get("scale", (1, 1))) @ turn.T + offset
        texture = self._document["textures"][info["index"]]
        sampler = self._document["samplers"][texture["sampler"]] if "sampler" in texture else {}
        for axis, key in enumerate(("wrapS", "wrapT")):
            if sampler.get(key) == CLAMPED:
                uvs[:, axis] = uvs[:, axis].clip(0, 1)
        webp = texture.get("extensions", {}).get(WEBP, {})
        return webp.get("source", texture.get("source")), uvs

    def image(self, index: int) -> Image.Image:
        """Return an image of at most TEXTURE_SIDE."""
        image = self._document["images"][index]
        if "bufferView" not in image:
            raise SlimeError("The GLB file keeps a texture in another file. Export it as one GLB file.")
        picture: Image.Image = Image.open(io.BytesIO(self.view(image["bufferView"])[0]))
        if picture.mode.startswith("I"):  # 16 bits
            picture = Image.fromarray((np.asarray(picture) / 257).astype(np.uint8))
        picture.thumbnail((TEXTURE_SIDE, TEXTURE_SIDE))
        return picture.convert("RGB")


def _matrix(node: dict[str, Any]) -> np.ndarray:
    """Return the matrix [4, 4] of a node."""
    if "matrix" in node:
        return np.array(node["matrix"], float).reshape(4, 4).T
    rotation = node.get("rotation", (0, 0, 0, 1))
    turn = Rotation.from_quat(rotation).as_matrix() if any(rotation) else np.eye(3)
    matrix = np.eye(4)
    matrix[:3, :3] = turn * node.get("scale", (1, 1, 1))
    matrix[:3, 3] = node.get("translation", (0, 0, 0))
    return matrix


def _triangles(order: np.ndarray, mode: int) -> np.ndarray:
    """Return faces int64 [m, 3]."""
    if mode == TRIANGLES or len(order) < 3:
        return order[: len(order) // 3 * 3].reshape(-1, 3)
    if mode == STRIP:
        faces = np.stack([order[:-2], order[1:-1], order[2:]], 1)
        faces[1::2] = faces[1::2, [0, 2, 1]]
        return faces
    return np.stack([np.full(len(order) - 2, order[0]), order[1:-1], order[2:]], 1)


def _joined(reader: _Reader, pieces: list[Piece]) -> Surface:
    starts = np.cumsum([0, *(len(piece.vertices) for piece in pieces)])
    faces = torch.from_numpy(np.concatenate([p.faces + start for p, start in zip(pieces, starts, strict=False)]))
    vertices = torch.from_numpy(np.concatenate([piece.vertices for piece in pieces]))
    if any(piece.texture is not None for piece in pieces):
        uvs, texture = _atlas(reader, pieces)
        return Surface.of(vertices, faces, None, torch.from_numpy(uvs), torch.from_numpy(texture))
    if all(piece.colors is None for piece in pieces):
        return Surface.of(vertices, faces)
    plain = [np.ones_like(piece.vertices) if piece.colors is None else piece.colors for piece in pieces]
    colors = torch.from_numpy(np.concatenate(plain).clip(0, 1) ** (1 / GAMMA)).float()
    return Surface.of(vertices, faces, colors[faces])


def _atlas(reader: _Reader, pieces: list[Piece]) -> tuple[np.ndarray, np.ndarray]:
    """Return the coordinates of all vertices, and one texture with a tile for every material.

    A material without a texture is a tile of its mean colour. Among several tiles no face can show one twice.
    """
    looks = [(p.texture, tuple(_mean_color(p) if p.texture is None else p.factor)) for p in pieces]
    kinds = list(dict.fromkeys(looks))
    across = math.ceil(math.sqrt(len(kinds)))
    images = [None if texture is None else reader.image(texture) for texture, _ in kinds]
    side = min(max(max(image.size) for image in images if image is not None), TEXTURE_SIDE // across)
    sides = images[0].size if across == 1 and images[0] is not None else (across * side, across * side)
    atlas = np.zeros((sides[1], sides[0], 3), np.float32)
    for number, (image, (_, color)) in enumerate(zip(images, kinds, strict=True)):
        tile = Image.new("RGB", (side, side), "white") if image is None else image
        if across > 1:
            larger = max(tile.size) <= side
            tile = tile.resize((side, side), Image.Resampling.NEAREST if larger else Image.Resampling.BOX)
        pixels = np.asarray(tile, np.float32) / 255
        top, left = number // across * side, number % across * side
        atlas[top : top + len(pixels), left : left + pixels.shape[1]] = pixels * np.clip(color, 0, 1) ** (1 / GAMMA)
    uvs = []
    for piece, look in zip(pieces, looks, strict=True):
        number = kinds.index(look)
        own = np.full((len(piece.vertices), 2), 0.5) if piece.uvs is None else _within(piece.uvs)
        if across > 1:  # half a pixel inside of the tile, so that no neighbour shines in
            own = (own.clip(0, 1) * (side - 1) + 0.5) / side
            own = (own + (number % across, number // across)) / across
        uvs.append(own)
    return np.concatenate(uvs).astype(np.float32), atlas


def _mean_color(piece: Piece) -> np.ndarray:
    return np.ones(3) if piece.colors is None or not len(piece.colors) else piece.colors.mean(0)


def _within(uvs: np.ndarray) -> np.ndarray:
    """Move faces, three coordinates [n, 2] each, to the texture that they show, as it repeats."""
    corners = uvs.reshape(-1, 3, 2)
    return (corners - np.floor(corners.mean(1, keepdims=True))).reshape(-1, 2)
