"""Learned part embeddings and their file."""

from __future__ import annotations

import base64
import json
import os
import zlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from safetensors.torch import save_file
from torch import Tensor

from .denoiser import Context, Denoiser
from .errors import SlimeError
from .examples import check_names
from .features import FeaturePlan
from .layers import Family, LayerChoice, LayerKey
from .read import ReadOut

FORMAT = "slime-part-embeddings"
VERSION = 1
COMPACT_PREFIX = "slime1:"
COMPACT_LIMIT = 400_000  # characters; a workflow JSON should stay readable

PALETTE: tuple[tuple[int, int, int], ...] = (
    (230, 25, 75),
    (60, 180, 75),
    (255, 225, 25),
    (0, 130, 200),
    (245, 130, 48),
    (145, 30, 180),
    (70, 240, 240),
    (240, 50, 230),
    (210, 245, 60),
    (250, 190, 212),
    (0, 128, 128),
    (220, 190, 255),
    (170, 110, 40),
    (255, 250, 200),
    (128, 0, 0),
    (170, 255, 195),
    (128, 128, 0),
    (255, 215, 180),
    (0, 0, 128),
    (128, 128, 128),
)


def default_palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """``count`` distinct colours; the first twenty are hand-picked, further ones are darker variants of them."""
    colors = []
    for index in range(count):
        r, g, b = PALETTE[index % len(PALETTE)]
        shade = 1.0 - 0.23 * (index // len(PALETTE))
        colors.append((int(r * shade), int(g * shade), int(b * shade)))
    return tuple(colors)


@dataclass(frozen=True)
class PartEmbeddings:
    """What one training run learned.

    Attributes:
        names: part names.
        rows: float32 [G, P + E, D], as offsets from the background row while there is no context; G is 1 (one row a
            part), the number of feature resolutions, layers, or heads. The E last rows stand for the background too.
        context: the frozen base context [T, D], or None in the compact form until :meth:`with_context`.
        pooled: SDXL's pooled text embedding [X], or None.
        prompt: text of the base context.
        family, prediction: kind of model the rows belong to.
        mode: "keys" (the UNet runs on the base context, the rows are extra keys only) or "context" (the rows replace
            rows 1.. of the context, as in the paper).
        row_groups: what G counts: "shared", "resolution", "layer" or "head".
        layers: layers that are read.
        timestep, working_side: noise level and image size of the features.
        read_out: how maps are made.
        palette: one RGB colour a part.
        sureness: mean peak of the part maps on the examples themselves, 0 where unknown: what a found object is
            compared with, see :attr:`slime.segment.PartMaps.confidence`.
        settings, losses: of the training, for information.
    """

    names: tuple[str, ...]
    rows: Tensor
    context: Tensor | None
    prompt: str
    family: str
    prediction: str
    layers: LayerChoice
    timestep: int
    working_side: int
    pooled: Tensor | None = None
    mode: str = "keys"
    row_groups: str = "resolution"
    read_out: ReadOut = ReadOut()
    palette: tuple[tuple[int, int, int], ...] = ()
    sureness: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    losses: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_names(self.names)
        if self.rows.ndim != 3 or self.rows.shape[1] < len(self.names):
            raise SlimeError(f"Rows of shape {list(self.rows.shape)} do not belong to {len(self.names)} parts.")
        if not self.palette:
            object.__setattr__(self, "palette", default_palette(len(self.names)))

    @property
    def context_dim(self) -> int:
        return self.rows.shape[-1]

    def check_model(self, family: Family) -> None:
        """Raises SlimeError when the embeddings were learned on another kind of model."""
        if self.family != family.name or self.context_dim != family.context_dim:
            raise SlimeError(
                f'These embeddings ({", ".join(self.names)}) were learned on a "{self.family}" model with '
                f'{self.context_dim}-wide text rows, but the connected model is "{family.name}" with '
                f"{family.context_dim}. Load a checkpoint of the same family, or train on this one."
            )

    def base_context(self) -> Context:
        """Context the UNet runs on: the base one, or in "context" mode the base one with the rows in place."""
        if self.context is None:
            raise SlimeError("These embeddings came in the compact form, without their text context: connect a CLIP.")
        rows = self.context.float().clone()
        if self.mode == "context":
            rows[1 : len(self.names) + 1] = self.rows[0].to(rows)
        return Context(rows, self.pooled)

    def plan(self) -> FeaturePlan:
        """The UNet pass these embeddings are read from."""
        tokens = self.read_out.official and self.read_out.all_tokens
        grouping = "resolution" if self.row_groups == "shared" else self.row_groups
        return FeaturePlan(self.layers, self.base_context(), self.timestep, grouping, tokens)

    @property
    def background(self) -> Tensor:
        """The frozen start-token row [D], which stands for the background."""
        return self.base_context().rows[0]

    def with_context(self, denoiser: Denoiser) -> PartEmbeddings:
        """The compact form completed by encoding its prompt; unchanged when complete."""
        if self.context is not None:
            return self
        context = denoiser.encode_prompt(self.prompt)
        rows = context.rows.cpu().half()
        return replace(self, rows=self.rows + rows[0].float(), context=rows, pooled=context.pooled)

    # ------------------------------------------------------------------------------------------------------- files

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> Path:
        """Write one ``.safetensors``: rows in float32, context in float16, the rest as JSON in the metadata.

        Raises:
            SlimeError: the file exists and ``overwrite`` is False.
        """
        target = Path(path)
        if target.exists() and not overwrite:
            raise SlimeError(f'"{target.name}" exists already; choose another name or allow overwriting.')
        target.parent.mkdir(parents=True, exist_ok=True)
        # The scratch file keeps a half-written file from ever bearing the real name.
        scratch = target.with_suffix(".partial")
        save_file(self._tensors(with_context=True), str(scratch), metadata=self._metadata())
        os.replace(scratch, target)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PartEmbeddings:
        """Read a file written by :meth:`save`.

        Raises:
            SlimeError: missing, truncated, foreign or newer file; the message says which.
        """
        name = Path(path).name
        if not Path(path).is_file():
            raise SlimeError(f'There is no file "{name}". Refresh the node list, or check the folder models/slime.')
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
        except (SafetensorError, OSError) as error:
            raise SlimeError(
                f'"{name}" cannot be read: it is truncated or not a .safetensors file ({error}).'
            ) from error
        return cls._build(tensors, metadata, name)

    def to_compact(self) -> str:
        """A text without the base context, short enough to travel inside a workflow.

        The rows are kept in float16 as offsets from the background row, whose large entries would cost precision.
        """
        offsets = self.rows if self.context is None else self.rows - self.context[0].float()
        tensors = self._tensors(with_context=False) | {"rows": offsets.half()}
        packed = zlib.compress(save_bytes(tensors, metadata=self._metadata(brief=True)), 9)
        text = COMPACT_PREFIX + base64.b64encode(packed).decode("ascii")
        if len(text) > COMPACT_LIMIT:
            raise SlimeError(
                f"These embeddings take {len(text)} characters; at most {COMPACT_LIMIT} travel inline. Save a file."
            )
        return text

    @classmethod
    def from_compact(cls, text: str) -> PartEmbeddings:
        """Read :meth:`to_compact`'s text.

        Raises:
            SlimeError: not such a text, cut off, or too long.
        """
        text = text.strip()
        if not text.startswith(COMPACT_PREFIX) or len(text) > COMPACT_LIMIT:
            raise SlimeError(f'This is not a SLiMe embeddings text: it must start with "{COMPACT_PREFIX}".')
        try:
            unpacker = zlib.decompressobj()
            raw = unpacker.decompress(base64.b64decode(text[len(COMPACT_PREFIX) :], validate=True), 8 * COMPACT_LIMIT)
            tensors = load_bytes(raw)
            size = int.from_bytes(raw[:8], "little")
            metadata = json.loads(raw[8 : 8 + size]).get("__metadata__", {})
        except (ValueError, zlib.error, SafetensorError) as error:
            raise SlimeError(f"The SLiMe embeddings text is cut off or changed ({error}); copy it again.") from error
        return cls._build(tensors, metadata, "the embeddings text")

    def _tensors(self, with_context: bool) -> dict[str, Tensor]:
        tensors = {"rows": self.rows.detach().float().cpu().contiguous()}
        if with_context and self.context is not None:
            tensors["context"] = self.context.detach().half().cpu().contiguous()
            if self.pooled is not None:
                tensors["pooled"] = self.pooled.detach().half().cpu().contiguous()
        return tensors

    def _metadata(self, brief: bool = False) -> dict[str, str]:
        body = {
            "names": self.names,
            "prompt": self.prompt,
            "family": self.family,
            "prediction": self.prediction,
            "mode": self.mode,
            "row_groups": self.row_groups,
            "cross_layers": [str(key) for key in self.layers.cross],
            "self_layers": [str(key) for key in self.layers.self_],
            "timestep": self.timestep,
            "working_side": self.working_side,
            "read_out": asdict(self.read_out),
            "palette": self.palette,
            "sureness": self.sureness,
        }
        if not brief:
            body |= {"settings": self.settings, "losses": list(self.losses)}
        return {"format": FORMAT, "version": str(VERSION), "embeddings": json.dumps(body)}

    @classmethod
    def _build(cls, tensors: dict[str, Tensor], metadata: dict[str, str], name: str) -> PartEmbeddings:
        if metadata.get("format") != FORMAT:
            raise SlimeError(f'"{name}" is a .safetensors file, but not one of SLiMe embeddings. Choose another file.')
        version = metadata.get("version", "")
        if not version.isdigit() or int(version) > VERSION:
            raise SlimeError(f'"{name}" has format version {version}, this SLiMe reads up to {VERSION}: update SLiMe.')
        try:
            body = json.loads(metadata["embeddings"])
            return cls(
                names=tuple(body["names"]),
                rows=tensors["rows"].float(),
                context=tensors.get("context"),
                pooled=tensors.get("pooled"),
                prompt=str(body["prompt"]),
                family=str(body["family"]),
                prediction=str(body["prediction"]),
                mode=str(body["mode"]),
                row_groups=str(body["row_groups"]),
                layers=LayerChoice(_keys(body["cross_layers"]), _keys(body["self_layers"])),
                timestep=int(body["timestep"]),
                working_side=int(body["working_side"]),
                read_out=ReadOut(**body["read_out"]),
                palette=tuple((int(r), int(g), int(b)) for r, g, b in body["palette"]),
                sureness=float(body.get("sureness", 0.0)),
                settings=dict(body.get("settings", {})),
                losses=tuple(float(loss) for loss in body.get("losses", ())),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise SlimeError(f'"{name}" is damaged: {error!r}. Ask its author for a new copy.') from error


def _keys(texts: list[str]) -> tuple[LayerKey, ...]:
    keys = []
    for text in texts:
        place, number, depth = text.split(".")
        keys.append(LayerKey(place, int(number), int(depth)))
    return tuple(keys)
