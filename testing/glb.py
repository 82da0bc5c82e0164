"""Write GLB files: for tests, and the mesh of a template."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from slime.mesh.glb import COMPONENTS, GAMMA, WIDTHS
from slime.mesh.surface import Surface

CODES = {np.dtype(kind): code for code, kind in COMPONENTS.items()}
KINDS = {width: name for name, width in WIDTHS.items()}


def pack(document: dict[str, Any], arrays: Sequence[np.ndarray], images: Sequence[bytes] = ()) -> bytes:
    """Return a GLB file. Array i [n, width] is accessor i, unsigned bytes normalised; image i is image i."""
    views, accessors, binary = [], [], b""
    for data in [*(array.tobytes() for array in arrays), *images]:
        views.append({"buffer": 0, "byteOffset": len(binary), "byteLength": len(data)})
        binary += data + bytes(-len(data) % 4)
    for number, array in enumerate(arrays):
        accessor = {"bufferView": number, "componentType": CODES[array.dtype], "count": len(array)}
        accessors.append(accessor | {"type": KINDS[array.shape[1]], "normalized": array.dtype == np.uint8})
        if array.shape[1] == 3 and array.dtype == np.float32:
            accessors[-1] |= {"min": array.min(0).tolist(), "max": array.max(0).tolist()}
    sources = [{"bufferView": len(arrays) + number, "mimeType": "image/png"} for number in range(len(images))]
    made = {"asset": {"version": "2.0"}, "buffers": [{"byteLength": len(binary)}], "bufferViews": views}
    text = json.dumps(made | {"accessors": accessors} | ({"images": sources} if images else {}) | document).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(binary), b"BIN\0") + binary
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks


def colored(surface: Surface) -> bytes:
    """Return a GLB file of a mesh with vertex colours; corners with the same place and colour are one vertex."""
    linear = (surface.colors.numpy() ** GAMMA * 255).round()
    corners = np.concatenate([surface.vertices[surface.faces].numpy(), linear], -1).reshape(-1, 6)
    unique, order = np.unique(corners.astype(np.float32), axis=0, return_inverse=True)
    colors = np.concatenate([unique[:, 3:], np.full((len(unique), 1), 255)], 1).astype(np.uint8)
    indices = order.reshape(-1, 1).astype(np.uint16 if len(unique) < 2**16 else np.uint32)
    primitive = {"attributes": {"POSITION": 0, "COLOR_0": 1}, "indices": 2, "material": 0}
    rough = {"pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 0.8}, "doubleSided": True}
    scene = {"scenes": [{"nodes": [0]}], "scene": 0, "nodes": [{"mesh": 0}], "materials": [rough]}
    document = scene | {"meshes": [{"primitives": [primitive]}]}
    return pack(document, [np.ascontiguousarray(unique[:, :3]), colors, indices])
