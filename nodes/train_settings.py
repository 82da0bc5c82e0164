"""Settings of SLiMe Train: a node for each preset, whose numbers mean themselves. Without one the preset counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io

from ..slime.errors import SlimeError
from ..slime.settings import InstantSettings, PaperSettings, TrainSettings
from .common import EXPERTS, schema

FLIP = {"auto": None, "on": True, "off": False}
RECOLOR = {"auto": None, "off": 0.0, "mild": 0.3, "strong": 1.0}  # None: as the preset does on the model
LAYERS = {"cross_layers": "read_layers", "self_layers": "propagate_layers"}  # what they are called in slime.settings


@dataclass(frozen=True)
class Chosen:
    """What a settings node says: the preset and its settings."""

    preset: str
    values: dict[str, Any]

    def of(self, preset: str) -> dict[str, Any]:
        """The settings, for this preset.

        Raises:
            SlimeError: they are another one's.
        """
        if preset != self.preset:
            raise SlimeError(f"The settings that are connected are for the preset {self.preset}; it says {preset}.")
        return self.values


SettingsSocket = io.Custom("SLIME_TRAIN_SETTINGS")


class _Settings(io.ComfyNode):
    """A settings node."""

    PRESET: str

    @classmethod
    def execute(cls, flip: str, recolor: str = "auto", **plain: Any) -> io.NodeOutput:
        values = {LAYERS.get(name, name): value for name, value in plain.items()} | {"flip": FLIP[flip]}
        if RECOLOR[recolor] is not None:
            values["recolor"] = RECOLOR[recolor]
        if values.get("timestep") == -1:
            del values["timestep"]
        return io.NodeOutput(Chosen(cls.PRESET, values))


class SLiMeInstantSettings(_Settings):
    PRESET = "instant"

    @classmethod
    def define_schema(cls) -> io.Schema:
        usual = InstantSettings()
        return _schema(
            "SLiMeInstantSettings",
            "SLiMe Instant Settings",
            "Settings of SLiMe Train's preset instant.",
            [
                *_views(usual),
                io.Int.Input("steps", default=usual.steps, min=1, max=100_000, tooltip="Steps of the fit, at most."),
                io.Combo.Input(
                    "recolor",
                    options=list(RECOLOR),
                    default="auto",
                    tooltip="Copies with other colours in every part, so that colours are not learned. auto leaves it "
                    "off for Stable Diffusion.",
                ),
                io.Int.Input(
                    "timestep",
                    default=-1,
                    min=-1,
                    max=999,
                    tooltip="Noise level of the features; -1 takes the model's own. Vision encoders have none.",
                ),
                *_looking(),
            ],
        )


class SLiMePaperSettings(_Settings):
    PRESET = "paper"

    @classmethod
    def define_schema(cls) -> io.Schema:
        usual = PaperSettings()
        return _schema(
            "SLiMePaperSettings",
            "SLiMe Paper Settings",
            "Settings of SLiMe Train's preset paper.",
            [
                io.Int.Input("steps", default=usual.steps, min=1, max=100_000, tooltip="Steps of Adam."),
                io.Float.Input(
                    "learning_rate",
                    default=usual.learning_rate,
                    min=0.0001,
                    max=10.0,
                    step=0.0001,
                    tooltip="Of Adam. Smaller ones need more steps.",
                ),
                *_views(usual),
                io.Boolean.Input("checkpointing", default=False, tooltip="Needs less memory and more time."),
                *_looking(),
            ],
        )


def _schema(node_id: str, title: str, description: str, inputs: Sequence[Any]) -> io.Schema:
    return schema(
        node_id=node_id,
        category=EXPERTS,
        display_name=title,
        description=description,
        inputs=list(inputs),
        outputs=[SettingsSocket.Output(display_name="settings", tooltip="For SLiMe Train.")],
    )


def _views(usual: TrainSettings) -> list[Any]:
    return [
        io.Int.Input(
            "views",
            default=usual.views,
            min=1,
            max=1000,
            tooltip="Augmented copies of the examples. Time grows with them, accuracy a little.",
        ),
        io.Float.Input(
            "crop", default=usual.crop, min=0.1, max=1.0, step=0.05, tooltip="Smallest random crop; 1 for none."
        ),
        io.Float.Input(
            "rotation",
            default=usual.rotation,
            min=0.0,
            max=180.0,
            step=1.0,
            tooltip="Largest random rotation in degrees.",
        ),
        io.Combo.Input(
            "flip",
            options=list(FLIP),
            default="auto",
            tooltip="Mirrored copies; auto switches them off when a part name says left or right.",
        ),
    ]


def _looking() -> list[Any]:
    return [
        io.String.Input(
            "prompt",
            default="",
            tooltip="Text the model sees while it looks, for example: a photo of a car. Empty is fine.",
        ),
        io.String.Input(
            "cross_layers",
            default="",
            tooltip="Cross-attention layers to read, as output.3-5, output.6.0. Empty: the model's table. auto: a "
            "probe on the examples chooses, for about the time of an instant training.",
        ),
        io.String.Input(
            "self_layers",
            default="",
            tooltip="Self-attention layers to read, as output.9-11. Empty: the model's table. auto: chosen by the "
            "probe.",
        ),
    ]
