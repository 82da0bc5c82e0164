"""SLiMe Track Seeds and SLiMe Tracks to Parts: follow the parts of a video with ComfyUI's Run SAM3 Video Track."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..slime.errors import SlimeError
from ..slime.parts.tracks import track_seeds, tracked_maps
from .common import SAM3, Parts, PartsSocket, named_errors, parts_outputs, parts_result, schema, to_core

TrackDataSocket = io.Custom("SAM3_TRACK_DATA")


class SLiMeTrackSeeds(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeTrackSeeds",
            category=SAM3,
            is_experimental=True,
            display_name="SLiMe Track Seeds",
            description="Selects the frame in which the parts are found best. Run SAM3 Video Track starts there: once "
            "forwards, once backwards.",
            search_aliases="sam3, video track, initial mask, seed masks, propagate",
            inputs=[
                PartsSocket.Input("parts", tooltip="From SLiMe Segment, of the frames of a video as one batch."),
                io.Int.Input(
                    "frame",
                    default=-1,
                    min=-1,
                    max=1_000_000,
                    tooltip="Frame to start from; -1 = the one that shows the most parts with the highest confidence.",
                ),
            ],
            outputs=[
                io.Mask.Output(display_name="initial_mask", tooltip="One mask per part, in the order of the names."),
                io.Image.Output(display_name="forwards", tooltip="The frames from the start to the end."),
                io.Image.Output(display_name="backwards", tooltip="The frames from the start back to the first."),
                io.Int.Output(display_name="frame", tooltip="Index of the start frame, counted from 0."),
                io.String.Output(display_name="names", tooltip="The part names, separated by commas."),
            ],
        )

    @classmethod
    def execute(cls, parts: Parts, frame: int = -1) -> io.NodeOutput:
        with named_errors("SLiMe Track Seeds"):
            start, masks = track_seeds(parts.maps, None if frame < 0 else frame)
        forwards, backwards = parts.images[start:], parts.images[: start + 1].flip(0)
        names = ", ".join(parts.maps.names)
        return io.NodeOutput(to_core(masks), to_core(forwards), to_core(backwards), start, names)


class SLiMeTracksToParts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SLiMeTracksToParts",
            category=SAM3,
            is_experimental=True,
            is_output_node=True,
            display_name="SLiMe Tracks to Parts",
            description="Puts the tracks of Run SAM3 Video Track back together as the parts of every frame.",
            search_aliases="sam3, track to mask, video parts",
            inputs=[
                PartsSocket.Input("parts", tooltip="The same parts that are connected to SLiMe Track Seeds."),
                TrackDataSocket.Input("forwards", tooltip="From Run SAM3 Video Track over the frames forwards."),
                TrackDataSocket.Input(
                    "backwards", optional=True, tooltip="From Run SAM3 Video Track over the frames backwards."
                ),
            ],
            outputs=parts_outputs(),
        )

    @classmethod
    def execute(cls, parts: Parts, forwards: Any, backwards: Any = None) -> io.NodeOutput:
        size, count = parts.maps.size, len(parts.images)
        with named_errors("SLiMe Tracks to Parts"):
            before = None if backwards is None else _packed(backwards).flip(0)[:-1]  # the start is in both
            packed = [_packed(forwards)] if before is None else [before, _packed(forwards)]
            frames = sum(map(len, packed))
            if frames != count:
                raise SlimeError(
                    f"The tracks have {frames} frames together, the video {count}. Connect one Run SAM3 Video Track "
                    "for each output of SLiMe Track Seeds, forwards and backwards."
                )
            masks = (_unpacked(frame, size) for track in packed for frame in track)
            maps = tracked_maps(masks, parts.maps.names, parts.maps.palette)
        return parts_result(cls, maps, parts.images)


def _packed(track: dict[str, Any]) -> Tensor:
    """Return the masks uint8 [B, P, h, w / 8] of SAM3_TRACK_DATA, eight pixels to a byte."""
    packed: Tensor | None = track.get("packed_masks")
    if packed is None:
        raise SlimeError("Nothing was tracked. Connect initial_mask of SLiMe Track Seeds to Run SAM3 Video Track.")
    return packed.cpu()


def _unpacked(frame: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the masks bool [P, H, W] of a frame [P, h, w / 8]."""
    masks = (frame[..., None] & (2 ** torch.arange(8)).to(torch.uint8)).bool().flatten(-2).float()
    return torch.nn.functional.interpolate(masks[None], size, mode="bilinear")[0] > 0.5
