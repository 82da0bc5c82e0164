"""SLiMe Instant Settings and SLiMe Paper Settings: settings of SLiMe Train, one node per preset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io

from ..slime.errors import SlimeError
from ..slime.settings import InstantSettings, PaperSettings, TrainSettings
from .common import ADVANCED, schema

FLIP = {"auto": None, "on": True, "off": False}
RECOLOR = {"auto": None, "off": 0.0, "strong": 1.0}  # None: found out on the examples


@dataclass(frozen=True)
class TrainSettingsValue:
    """Value of a settings socket: the preset and its settings."""

    preset: str
    values: dict[str, Any]

    def for_preset(self, preset: str) -> dict[str, Any]:
        """Return the settings.

        Raises:
            SlimeError: they are another preset's.
        """
        if preset != self.preset:
            raise SlimeError(
                f"preset is {preset}, but the connected settings are for {self.preset}. Choose {self.preset}, or "
                f"connect SLiMe {preset.capitalize()} Settings."
            )
        return self.values


SettingsSocket = io.Custom("SLIME_TRAIN_SETTINGS")


class _Settings(io.ComfyNode):
    """Base class of the settings nodes."""

    PRESET: str

    @classmethod
    def execute(cls, flip: str = "auto", recolor: str = "auto", **plain: Any) -> io.NodeOutput:
        values = {**plain, "flip": FLIP[flip]}
        if RECOLOR[recolor] is not None:
            values["recolor"] = RECOLOR[recolor]
        if values.get("timestep") == -1:
            del values["timestep"]
        if values.get("views") == 0:
            del values["views"]
        return io.NodeOutput(TrainSettingsValue(cls.PRESET, values))


class SLiMeInstantSettings(_Settings):
    PRESET = "instant"

    @classmethod
    def define_schema(cls) -> io.Schema:
        defaults = InstantSettings()
        return _schema(
            "SLiMeInstantSettings",
            "SLiMe Instant Settings",
            "Settings of SLiMe Train with the preset instant.",
            [
                *_view_inputs(defaults),
                io.Combo.Input(
                    "recolor",
                    options=list(RECOLOR),
                    default="auto",
                    tooltip="Change the colours of every part in the views, so that colour is not learned. auto: only "
                    "if the parts can no longer be found after a change of colour; the node says what it found.",
                ),
                io.Int.Input(
                    "timestep",
                    default=-1,
                    min=-1,
                    max=999,
                    tooltip="Noise level of the features; -1 = the model's own. Vision encoders have none.",
                ),
                *_model_inputs("If empty, the empty prompt is used.", "output.3-5 or, for Flux, single.9"),
            ],
        )


class SLiMePaperSettings(_Settings):
    PRESET = "paper"

    @classmethod
    def define_schema(cls) -> io.Schema:
        defaults = PaperSettings()
        return _schema(
            "SLiMePaperSettings",
            "SLiMe Paper Settings",
            "Settings of SLiMe Train with the preset paper.",
            [
                io.Int.Input(
                    "steps",
                    default=defaults.steps,
                    min=1,
                    max=100_000,
                    tooltip="Number of training steps (Adam optimiser).",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=defaults.learning_rate,
                    min=0.0001,
                    max=10.0,
                    step=0.0001,
                    tooltip="Learning rate of Adam. A smaller one needs more steps.",
                ),
                *_view_inputs(defaults),
                io.Boolean.Input("checkpointing", default=False, tooltip="Less memory, more time."),
                *_model_inputs(
                    'If empty, the word "part" is used once for the background and once for every part.', "output.3-5"
                ),
            ],
        )


def _schema(node_id: str, title: str, description: str, inputs: Sequence[Any]) -> io.Schema:
    return schema(
        node_id=node_id,
        category=ADVANCED,
        display_name=title,
        description=description,
        inputs=[_optional(item) for item in inputs],
        outputs=[SettingsSocket.Output(display_name="settings", tooltip="For SLiMe Train.")],
    )


def _optional(item: Any) -> Any:
    item.optional = True
    return item


def _view_inputs(defaults: TrainSettings) -> list[Any]:
    instant = isinstance(defaults, InstantSettings)
    return [
        io.Int.Input(
            "views",
            default=0 if instant else defaults.views,
            min=0 if instant else 1,
            max=1000,
            tooltip="Number of augmented views of the examples; 0 = the model's own (24; SDXL and flow models 16). "
            "More views take longer and made no measurable difference in our tests."
            if instant
            else "Number of augmented views of the examples; used again if there are fewer than steps.",
        ),
        io.Float.Input(
            "smallest_crop",
            default=defaults.smallest_crop,
            min=0.1,
            max=1.0,
            step=0.05,
            tooltip="Smallest side of a random crop, relative to the image; 1 = no crops.",
        ),
        io.Float.Input(
            "rotation",
            default=defaults.rotation,
            min=0.0,
            max=180.0,
            step=1.0,
            tooltip="Largest random rotation in degrees.",
        ),
        io.Combo.Input(
            "flip",
            options=list(FLIP),
            default="auto",
            tooltip="Mirror half of the views; auto does not if a part name says left or right.",
        ),
    ]


def _model_inputs(empty: str, layers: str) -> list[Any]:
    return [
        io.String.Input(
            "prompt",
            default="",
            tooltip=f"Prompt for the passes through the model, for example: a photo of a car. {empty}",
        ),
        io.String.Input(
            "read_layers",
            default="",
            tooltip=f"Layers to read features from, such as {layers}. Empty: the default "
            "layers, or as auto if the model has none. auto: chosen on the examples, in about the time of an instant "
            "training.",
        ),
        io.String.Input(
            "propagate_layers",
            default="",
            tooltip="Layers whose self-attention propagates the masks, such as output.9-11. Empty: the default layers, "
            "or as auto if the model has none. auto: chosen on the examples.",
        ),
    ]
