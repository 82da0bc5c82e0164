"""Part embeddings as a ``.safetensors`` file, and as a text that travels inside a workflow.

Both hold tensors ("rows", and the condition's by their names) and a JSON body, whose fields are those of
:class:`slime.embeddings.PartEmbeddings`. Files of every version so far are read.
"""

from __future__ import annotations

import base64
import json
import os
import re
import tempfile
import time
import zlib
from collections.abc import Callable
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
from .embeddings import CONTEXT, KEYS, SHARED, PartEmbeddings
from .errors import SlimeError
from .examples import MAX_PARTS
from .read_out import KINDS, ReadOut
from .settings import ROW_GROUPS

FORMAT = "slime-part-embeddings"
VERSION = 2
COMPACT_PREFIX = "slime1:"
COMPACT_LIMIT = 400_000  # characters; a workflow JSON should stay readable
FILE_LIMIT = 64 * 2**20  # bytes; three times the largest there can be
BODY_LIMIT = 2**20  # characters of JSON
LAYERS_LIMIT = 512
TEXT_LIMIT = 10_000
SCRATCH = ".slime-partial"
LEFT_SECONDS = 3600.0
_LAYER = re.compile(r"[a-z_]{1,32}(\.\d{1,4}){1,3}")


def save_embeddings(embeddings: PartEmbeddings, path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Write one file: rows in float32, the condition in float16 where it fits, the rest as JSON in the metadata.

    Raises:
        SlimeError: the file exists and ``overwrite`` is False, or the system refuses to write it.
    """
    target = Path(os.path.realpath(path))  # a link stays one
    if target.exists() and not overwrite:
        raise SlimeError(f'"{target.name}" exists already; choose another name or allow overwriting.')
    tensors = {"rows": embeddings.rows.detach().float().cpu().contiguous()}
    for name, tensor in (embeddings.condition or {}).items():
        tensors[name] = halved(tensor)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _replace(target, save_bytes(tensors, metadata=_metadata(embeddings, brief=False)))
    except OSError as error:
        raise SlimeError(
            f'"{target.name}" could not be written: {error.strerror or error}. Check the free space and the rights of '
            f"{target.parent}; Windows refuses paths beyond 259 characters (this one has {len(str(target))})."
        ) from error
    return target


def _replace(target: Path, data: bytes) -> None:
    """Write a file under another name first: a half-written one never bears the real name. Two savers do not meet."""
    for left in target.parent.glob(f"*{SCRATCH}"):
        with suppress(FileNotFoundError):  # another saver's, done in the meantime
            if time.time() - left.stat().st_mtime > LEFT_SECONDS:  # of a save that was killed
                left.unlink()
    handle, scratch = tempfile.mkstemp(SCRATCH, dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(scratch, 0o644)  # scratch files are made for their owner alone
        os.replace(scratch, target)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def load_embeddings(path: str | os.PathLike[str]) -> PartEmbeddings:
    """Read a file written by :func:`save_embeddings`, into memory of its own: the file may change afterwards.

    Raises:
        SlimeError: missing, truncated, foreign or newer file; the message says which.
    """
    source = Path(path)
    if not source.is_file():
        raise SlimeError(f'There is no file "{source.name}". Refresh the node list, or check the folder models/slime.')
    if source.stat().st_size > FILE_LIMIT:
        raise SlimeError(f'"{source.name}" is far too large for SLiMe embeddings. Choose another file.')
    try:
        return _unpack(source.read_bytes(), f'"{source.name}"')
    except (SafetensorError, OSError) as error:
        raise SlimeError(
            f'"{source.name}" cannot be read: it is truncated or not a .safetensors file ({error}).'
        ) from error


def to_text(embeddings: PartEmbeddings) -> str:
    """A text without the condition, short enough to travel inside a workflow.

    The rows are kept in float16 as offsets: the background row's large entries would cost precision.

    Raises:
        SlimeError: it would be too long.
    """
    rows = embeddings.rows
    if embeddings.mode == CONTEXT and embeddings.condition is not None:
        rows = rows - embeddings.condition["context"][0].float()
    tensors = {"rows": rows.detach().half().cpu().contiguous()}
    packed = zlib.compress(save_bytes(tensors, metadata=_metadata(embeddings, brief=True)), 9)
    text = COMPACT_PREFIX + base64.b64encode(packed).decode("ascii")
    if len(text) > COMPACT_LIMIT:
        raise SlimeError(
            f"These embeddings take {len(text)} characters; at most {COMPACT_LIMIT} travel inline. Save a file."
        )
    return text


def from_text(text: str) -> PartEmbeddings:
    """Read :func:`to_text`'s text.

    Raises:
        SlimeError: not such a text, cut off, or too long.
    """
    text = text.strip()
    if not text.startswith(COMPACT_PREFIX) or len(text) > COMPACT_LIMIT:
        raise SlimeError(f'This is not a SLiMe embeddings text: it must start with "{COMPACT_PREFIX}".')
    try:
        packed = base64.b64decode(text[len(COMPACT_PREFIX) :], validate=True)
        return _unpack(zlib.decompressobj().decompress(packed, 8 * COMPACT_LIMIT), "the embeddings text")
    except (ValueError, zlib.error, SafetensorError) as error:
        if isinstance(error, SlimeError):
            raise
        raise SlimeError(f"The SLiMe embeddings text is cut off or changed ({error}); copy it again.") from error


class _Field(NamedTuple):
    """How a field stands in JSON, and how it is read from there; ``default`` where it may be missing."""

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
        return tuple(read(one) for one in value)

    return read_all


def _color(value: Any) -> tuple[int, int, int]:
    r, g, b = _list_of(_whole(0, 255), 3)(value)
    return r, g, b


def _layer(value: Any) -> str:
    if not _LAYER.fullmatch(_text(value)):
        raise ValueError(f"{value!r} is not the name of a layer")
    return str(value)


def _write_read_out(read_out: ReadOut) -> dict[str, Any]:
    return {"kind": read_out.kind} | asdict(read_out)


def _read_read_out(value: dict[str, Any]) -> ReadOut:
    kind = KINDS[_one_of(*KINDS)(value["kind"])]
    limits: dict[str, Callable[[Any], Any]] = {
        "order": _whole(0, 4),
        "mix": _number(0, 1),
        "sharpen": _number(0.01, 100),
    }
    return kind(**{one.name: limits[one.name](value[one.name]) for one in fields(kind) if one.name in value})


def _read_layers(value: dict[str, Any]) -> LayerChoice:
    return LayerChoice(*(_list_of(_layer, LAYERS_LIMIT)(value[part]) for part in LayerChoice._fields))


_FIELDS = {
    "names": _Field(list, _list_of(_text, MAX_PARTS)),
    "prompt": _Field(str, _text),
    "backbone": _Field(str, _text),
    "mode": _Field(str, _one_of(KEYS, CONTEXT)),
    "row_groups": _Field(str, _one_of(SHARED, *ROW_GROUPS)),
    "layers": _Field(LayerChoice._asdict, _read_layers),
    "timestep": _Field(int, _whole(0, 100_000)),
    "side": _Field(int, _whole(64, 4096)),
    "read_out": _Field(_write_read_out, _read_read_out),
    "palette": _Field(list, _list_of(_color, MAX_PARTS)),
    "sureness": _Field(float, _number(0, 1)),
    "settings": _Field(dict, dict, {}),
    "losses": _Field(list, _list_of(_number(-1e9, 1e9), 1_000_000), ()),
}


def _metadata(embeddings: PartEmbeddings, brief: bool) -> dict[str, str]:
    left_out = ("settings", "losses") if brief else ()
    body = {name: one.write(getattr(embeddings, name)) for name, one in _FIELDS.items() if name not in left_out}
    body["compact"] = brief or embeddings.condition is None
    return {"format": FORMAT, "version": str(VERSION), "embeddings": json.dumps(body)}


def _unpack(raw: bytes, name: str) -> PartEmbeddings:
    """Embeddings from safetensors bytes; fields that this version does not know are left alone."""
    tensors, field = load_bytes(raw), "header"
    try:
        metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]).get("__metadata__", {})
        if metadata.get("format") != FORMAT:
            raise SlimeError(f"{name} is a .safetensors file, but not one of SLiMe embeddings. Choose another file.")
        version = metadata.get("version", "")
        if not re.fullmatch("[0-9]{1,9}", version) or int(version) > VERSION:
            raise SlimeError(
                f"{name} has format version {version[:20]}, this SLiMe reads up to {VERSION}: update SLiMe."
            )
        if len(metadata["embeddings"]) > BODY_LIMIT:
            raise ValueError("it is too long")
        body = json.loads(metadata["embeddings"])
        if int(version) == 1:
            body, tensors = _from_version_1(body, tensors)
        values = {}
        for field, one in _FIELDS.items():
            values[field] = one.default if one.default is not None and field not in body else one.read(body[field])
        field = "rows"
        rows = tensors.pop("rows").float()
        embeddings = PartEmbeddings(rows=rows, condition=None if body["compact"] else tensors, **values)
        for field, tensor in {"rows": rows, **tensors}.items():
            _check_tensor(field, tensor, embeddings)
        return embeddings
    except SlimeError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise SlimeError(
            f'{name} is damaged at "{field}": {str(error)[:200]}. Ask its author for a new copy.'
        ) from error


def _check_tensor(name: str, tensor: Tensor, embeddings: PartEmbeddings) -> None:
    """Raises ValueError where a tensor is not finite, or its shape does not fit the rows."""
    if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()) or tensor.numel() == 0:
        raise ValueError("it holds no finite numbers")
    if name == "context":
        needed = len(embeddings.names) + 1 if embeddings.mode == CONTEXT else 1
        if tensor.ndim != 2 or tensor.shape[1] != embeddings.rows.shape[2] or len(tensor) < needed:
            raise ValueError(f"shape {list(tensor.shape)} beside rows {list(embeddings.rows.shape)}")
    elif name != "rows" and tensor.ndim > (1 if "pooled" in name else 2):
        raise ValueError(f"shape {list(tensor.shape)}")


def _from_version_1(body: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Version 1 kept rows with the background row in them, layers in two lists, and one read-out for both kinds."""
    if body["row_groups"] == "head" or tensors["rows"].ndim != 3 or tensors["rows"].shape[1] != len(body["names"]):
        raise SlimeError("These embeddings were learned with a trial setting that was dropped. Train them again.")
    if body["mode"] == KEYS and "context" in tensors:
        tensors["rows"] = tensors["rows"].float() - tensors["context"][0].float()
    kind = "official" if body["read_out"]["official"] else "propagated"
    moved = {
        "backbone": body["family"],
        "side": body["working_side"],
        "layers": {"read": body["cross_layers"], "propagate": body["self_layers"]},
        "read_out": body["read_out"] | {"kind": kind},
        "sureness": body.get("sureness", 0.0),
        "compact": "context" not in tensors,
    }
    return body | moved, tensors
