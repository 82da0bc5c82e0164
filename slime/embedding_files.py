"""Save part embeddings as a ``.safetensors`` file, or as a text that is shared inside a workflow.

Both hold tensors ("vectors/GROUP", "condition/NAME") and a JSON body, whose fields are those of
:class:`slime.embeddings.PartEmbeddings`.
"""

from __future__ import annotations

import base64
import json
import os
import re
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

from .backbones.base import halved
from .backbones.layers import LayerChoice
from .embeddings import CONCEPT, CONTEXT, DECODERS, LINEAR, Decoder, PartEmbeddings
from .errors import SlimeError
from .examples import MAX_PARTS
from .files import SCRATCH, write_whole
from .settings import GROUPINGS, SHARED

FORMAT = "slime-part-embeddings"
VERSION = 1
VECTORS, CONDITION = "vectors/", "condition/"  # begin the names of tensors
COMPACT_PREFIX = "slime1:"
COMPACT_LIMIT = 400_000  # characters; a workflow JSON should stay readable
FILE_LIMIT = 64 * 2**20  # bytes; three times the largest there can be
BODY_LIMIT = 2**20  # characters of JSON
LAYERS_LIMIT = 512
DTYPES = (torch.float16, torch.float32, torch.float64)
TEXT_LIMIT = 10_000
ABANDONED_SECONDS = 3600.0
_LAYER = re.compile(r"([\w.+-]{1,64}:)?[a-z_]{1,32}(\.\d{1,4}){1,3}")


def save_embeddings(embeddings: PartEmbeddings, path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Write one file: vectors in float32, the condition in float16 where it fits, the rest as JSON metadata.

    Raises:
        SlimeError: the file exists and ``overwrite`` is False, or the system refuses to write it.
    """
    target = Path(os.path.realpath(path))  # a link stays one
    if target.exists() and not overwrite:
        raise SlimeError(f'"{target.name}" exists already; choose another name or allow overwriting.')
    tensors = {VECTORS + name: _contiguous(vector.float()) for name, vector in embeddings.vectors.items()}
    tensors |= {CONDITION + name: halved(tensor) for name, tensor in (embeddings.condition or {}).items()}
    try:
        _drop_abandoned(target.parent)
        write_whole(target, save_bytes(tensors, metadata=_metadata(embeddings, brief=False)))
    except OSError as error:
        raise SlimeError(
            f'"{target.name}" could not be written: {error.strerror or error}. Check the free space and the '
            f"permissions of {target.parent}; Windows refuses paths beyond 259 characters (this one has "
            f"{len(str(target))})."
        ) from error
    return target


def _drop_abandoned(folder: Path) -> None:
    """Delete half-written files whose process was killed."""
    for abandoned in folder.glob(f"*{SCRATCH}"):
        with suppress(FileNotFoundError):  # another process has just finished it
            if time.time() - abandoned.stat().st_mtime > ABANDONED_SECONDS:
                abandoned.unlink()


def load_embeddings(path: str | os.PathLike[str]) -> PartEmbeddings:
    """Read a file written by :func:`save_embeddings` into memory; the file may change afterwards.

    Raises:
        SlimeError: missing, truncated, foreign or newer file; the message says which.
    """
    source = Path(path)
    if not source.is_file():
        raise SlimeError(f'There is no file "{source.name}" in {source.parent}. Check the name; in ComfyUI press R.')
    if source.stat().st_size > FILE_LIMIT:
        raise SlimeError(f'"{source.name}" is far too large for SLiMe embeddings. Choose another file.')
    try:
        return _unpack(source.read_bytes(), f'"{source.name}"')
    except OSError as error:
        raise SlimeError(f'"{source.name}" cannot be opened: {error.strerror or error}.') from error
    except SafetensorError as error:
        raise SlimeError(
            f'"{source.name}" cannot be read: it is truncated or not a .safetensors file ({error}).'
        ) from error


def to_text(embeddings: PartEmbeddings) -> str:
    """Return a text without the condition, short enough to be stored inside a workflow.

    Vectors are kept in float16 as offsets: the large entries of the background's token would cost precision.

    Raises:
        SlimeError: it would be too long.
    """
    if embeddings.mode == CONCEPT:
        raise SlimeError("SAM3 concepts have no text form. Share the file instead.")
    vectors = embeddings.vectors
    if embeddings.mode == CONTEXT and embeddings.condition is not None:
        vectors = {name: vector - embeddings.condition["context"][0].float() for name, vector in vectors.items()}
    tensors = {VECTORS + name: _contiguous(vector.half()) for name, vector in vectors.items()}
    packed = zlib.compress(save_bytes(tensors, metadata=_metadata(embeddings, brief=True)), 9)
    text = COMPACT_PREFIX + base64.b64encode(packed).decode("ascii")
    if len(text) > COMPACT_LIMIT:
        raise SlimeError(
            f"These embeddings take {len(text)} characters; a workflow can hold at most {COMPACT_LIMIT}. Share the "
            "file instead."
        )
    return text


def from_text(text: str) -> PartEmbeddings:
    """Read a text written by :func:`to_text`.

    Raises:
        SlimeError: not such a text, cut off, or too long.
    """
    text = text.strip()
    if not text.startswith(COMPACT_PREFIX) or len(text) > COMPACT_LIMIT:
        raise SlimeError(f'This is not a SLiMe embeddings text: it must start with "{COMPACT_PREFIX}". Copy all of it.')
    try:
        packed = base64.b64decode(text[len(COMPACT_PREFIX) :], validate=True)
        return _unpack(zlib.decompressobj().decompress(packed, 8 * COMPACT_LIMIT), "the embeddings text")
    except (ValueError, zlib.error, SafetensorError) as error:
        if isinstance(error, SlimeError):
            raise
        raise SlimeError(f"The SLiMe embeddings text is cut off or changed ({error}); copy it again.") from error


class _Field(NamedTuple):
    """How a field is written to JSON and read from it; ``default`` where it may be missing."""

    write: Callable[[Any], Any]
    read: Callable[[Any], Any]
    default: Any = None


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > TEXT_LIMIT:
        raise ValueError(f"{str(value)[:40]!r} is not a text of at most {TEXT_LIMIT} characters")
    return value


def _number(low: float, high: float) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ValueError(f"{value!r} is not a number from {low} to {high}")
        return float(value)

    return read


def _whole(low: int, high: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if _number(low, high)(value) != int(value):
            raise ValueError(f"{value!r} is not a whole number")
        return int(value)

    return read


def _one_of(*known: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in known:
            raise ValueError(f"{value!r} is none of {', '.join(known)}")
        return str(value)

    return read


def _list_of(read: Callable[[Any], Any], most: int) -> Callable[[Any], tuple[Any, ...]]:
    def read_all(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) > most:
            raise ValueError(f"it is not a list of at most {most}")
        return tuple(read(item) for item in value)

    return read_all


def _color(value: Any) -> tuple[int, int, int]:
    r, g, b = _list_of(_whole(0, 255), 3)(value)
    return r, g, b


def _layer(value: Any) -> str:
    if not _LAYER.fullmatch(_text(value)):
        raise ValueError(f"{value!r} is not the name of a layer")
    return str(value)


def _write_decoder(decoder: Decoder) -> dict[str, Any]:
    return {"kind": decoder.kind} | asdict(decoder)


def _read_decoder(value: dict[str, Any]) -> Decoder:
    kind = DECODERS[_one_of(*DECODERS)(value["kind"])]
    return kind(**{field.name: _number(0.01, 100)(value[field.name]) for field in fields(kind)})


def _read_layers(value: dict[str, Any]) -> LayerChoice:
    return LayerChoice(*(_list_of(_layer, LAYERS_LIMIT)(value[field]) for field in LayerChoice._fields))


_FIELDS = {
    "names": _Field(list, _list_of(_text, MAX_PARTS)),
    "prompt": _Field(str, _text),
    "backbone": _Field(str, _text),
    "mode": _Field(str, _one_of(LINEAR, CONTEXT, CONCEPT)),
    "grouping": _Field(str, _one_of(*GROUPINGS)),
    "layers": _Field(LayerChoice._asdict, _read_layers),
    "timestep": _Field(int, _whole(0, 100_000)),
    "side": _Field(int, _whole(64, 4096)),
    "decoder": _Field(_write_decoder, _read_decoder),
    "palette": _Field(list, _list_of(_color, MAX_PARTS)),
    "example_confidence": _Field(float, _number(0, 1)),
    "settings": _Field(dict, dict, {}),
    "losses": _Field(list, _list_of(_number(-1e9, 1e9), 1_000_000), ()),
}


def _metadata(embeddings: PartEmbeddings, brief: bool) -> dict[str, str]:
    left_out = ("settings", "losses") if brief else ()
    body = {name: field.write(getattr(embeddings, name)) for name, field in _FIELDS.items() if name not in left_out}
    body["compact"] = brief or embeddings.condition is None
    return {"format": FORMAT, "version": str(VERSION), "embeddings": json.dumps(body)}


def _unpack(raw: bytes, name: str) -> PartEmbeddings:
    """Read embeddings from safetensors bytes; unknown fields are ignored."""
    try:
        tensors, current = load_bytes(raw), "header"
    except KeyError as error:  # a type of numbers that the header may name and PyTorch lacks
        raise SlimeError(f"{name} holds numbers of the type {error}, as no SLiMe embeddings do.") from error
    metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]).get("__metadata__") or {}
    if metadata.get("format") != FORMAT:
        raise SlimeError(f"{name} is a .safetensors file, but not one of SLiMe embeddings. Choose another file.")
    version = metadata.get("version", "")
    if not re.fullmatch("[0-9]{1,9}", version) or int(version) > VERSION:
        raise SlimeError(f"{name} has format version {version[:20]}, this SLiMe reads up to {VERSION}: update SLiMe.")
    try:
        if len(metadata["embeddings"]) > BODY_LIMIT:
            raise ValueError("it is too long")
        body = json.loads(metadata["embeddings"])
        values = {}
        for current, field in _FIELDS.items():
            missing = field.default is not None and current not in body
            values[current] = field.default if missing else field.read(body[current])
        current = "vectors"
        vectors = {key: vector.float() for key, vector in _named(tensors, VECTORS).items()}
        condition = None if body["compact"] else _named(tensors, CONDITION)
        embeddings = PartEmbeddings(vectors=vectors, condition=condition, **values)
        if embeddings.mode == CONTEXT and set(vectors) != {SHARED}:
            raise ValueError(f"it holds {', '.join(vectors)} instead of {SHARED}")
        for current, tensor in (vectors | dict(condition or {})).items():
            _check_tensor(current, tensor, embeddings)
        return embeddings
    except (SlimeError, KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise SlimeError(
            f'{name} is damaged at "{current}": {str(error)[:200]}. Ask its author for a new copy.'
        ) from error


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, by the rest of their names, in the order of the file."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _check_tensor(name: str, tensor: Tensor, embeddings: PartEmbeddings) -> None:
    """Raise ValueError where a tensor is not finite, or its shape does not fit the vectors."""
    if tensor.dtype not in DTYPES:
        raise ValueError(f"its type is {tensor.dtype}")
    if not bool(torch.isfinite(tensor).all()) or tensor.numel() == 0:
        raise ValueError("it holds no finite numbers")
    if name in embeddings.vectors:
        return
    if name == "context":
        (width,) = {vector.shape[1] for vector in embeddings.vectors.values()}
        needed = len(embeddings.names) + 1 if embeddings.mode == CONTEXT else 1
        if tensor.ndim != 2 or tensor.shape[1] != width or len(tensor) < needed:
            raise ValueError(f"shape {list(tensor.shape)} beside vectors {width} wide")
    elif tensor.ndim > (1 if "pooled" in name else 2):
        raise ValueError(f"shape {list(tensor.shape)}")
