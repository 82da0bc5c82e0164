"""Learned part embeddings."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from .backbones.base import TOGETHER, Backbone, Plan
from .backbones.layers import LayerChoice
from .errors import SlimeError
from .examples import check_names
from .parts.palette import Color, default_palette
from .read_out import Propagated, ReadOut

KEYS, CONTEXT = "keys", "context"
SHARED = "shared"


@dataclass(frozen=True)
class PartEmbeddings:
    """What one training run learned.

    Attributes:
        names: part names.
        rows: float32 [G, P, D]; G is 1, or the number of groups of features (:attr:`row_groups`). In "keys" mode
            offsets from the background, in "context" mode text rows (without a condition offsets from its first row).
        condition: what the backbone runs on beside the image, or None in the compact form until :meth:`completed`.
        prompt: the text that the condition was made of.
        backbone: id of the kind of model the rows belong to.
        mode: "keys" (the backbone runs on its own condition, the rows only score its features) or "context" (the rows
            replace rows 1.. of the text context, as in the paper).
        row_groups: what G counts: "shared", "resolution" or "layer".
        layers: layers that are read.
        timestep, side: noise level and image size of the features.
        read_out: how maps are made.
        palette: one RGB colour a part.
        sureness: mean peak of the part maps on the examples themselves, 0 where unknown: what a found object is
            compared with, see :attr:`slime.parts.maps.PartMaps.confidence`.
        settings, losses: of the training, for information.
    """

    names: tuple[str, ...]
    rows: Tensor
    condition: Mapping[str, Tensor] | None
    prompt: str
    backbone: str
    layers: LayerChoice
    timestep: int
    side: int
    mode: str = KEYS
    row_groups: str = "resolution"
    read_out: ReadOut = Propagated()
    palette: tuple[Color, ...] = ()
    sureness: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    losses: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_names(self.names)
        if self.rows.ndim != 3 or self.rows.shape[1] != len(self.names):
            raise SlimeError(f"Rows of shape {list(self.rows.shape)} do not belong to {len(self.names)} parts.")
        if not self.palette:
            object.__setattr__(self, "palette", default_palette(len(self.names)))

    def check_model(self, backbone: Backbone) -> None:
        """Raises SlimeError when the embeddings were learned on another kind of model, or read layers it lacks."""
        if self.backbone != backbone.info.id:
            raise SlimeError(
                f'These embeddings ({", ".join(self.names)}) were learned on a "{self.backbone}" model, but the '
                f'connected model is "{backbone.info.id}". {_what_to_do(self.backbone, backbone.info.id)}'
            )
        known = {layer.name for layer in backbone.layers}
        missing = [name for name in (*self.layers.read, *self.layers.propagate) if name not in known]
        if missing or not self.layers.read:
            raise SlimeError(
                f"These embeddings read the layers {', '.join(missing) or '(none)'}, which the connected model lacks. "
                "Ask their author for a new file."
            )

    def plan(self) -> Plan:
        """The pass these embeddings are read from.

        Raises:
            SlimeError: in the compact form.
        """
        if self.condition is None:
            raise SlimeError("These embeddings came in the compact form, without their text context: connect a CLIP.")
        condition = dict(self.condition)
        if self.mode == CONTEXT:
            rows = condition["context"].float().clone()
            rows[1 : len(self.names) + 1] = self.rows[0].to(rows)
            condition["context"] = rows
        return Plan(self.layers, condition, self.timestep, self._grouping)

    @property
    def _grouping(self) -> str:
        return "resolution" if self.row_groups == SHARED else self.row_groups

    def pass_digest(self) -> str:
        """Embeddings of equal digests are read from the same pass; the compact form goes by its prompt."""
        read = (self.layers, self.timestep, self.side, self._grouping, self.read_out.kind)
        seen: tuple[object, ...] = (self.backbone, *read)
        digest = hashlib.sha256(repr(seen if self.condition is not None else (*seen, self.prompt)).encode())
        for name, tensor in sorted(self.plan().condition.items() if self.condition is not None else ()):
            digest.update(name.encode() + tensor.cpu().numpy().tobytes())
        return digest.hexdigest()

    def completed(self, backbone: Backbone) -> PartEmbeddings:
        """The compact form completed by encoding its prompt; unchanged when complete."""
        if self.condition is not None:
            return self
        condition = backbone.condition(self.prompt)
        rows = self.rows + condition["context"][0].float() if self.mode == CONTEXT else self.rows
        return replace(self, rows=rows, condition=condition)


def _what_to_do(learned: str, connected: str) -> str:
    """Ids of several that look together are joined by :data:`TOGETHER`."""
    wanted, there = (name.split(TOGETHER) for name in (learned, connected))
    lacking = [name for name in wanted if name not in there]
    spare = [name for name in there if name not in wanted]
    if lacking and not spare:
        return f"Connect {' and '.join(lacking)} as well."
    if spare and not lacking:
        return f"Disconnect {' and '.join(spare)}."
    return "Load a model of the same family, or train on this one."
