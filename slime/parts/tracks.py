"""Start tracks of the parts of a video, and put finished tracks back together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..errors import SlimeError
from .maps import PartMaps
from .palette import Color


def track_seeds(maps: PartMaps, frame: int | None = None) -> tuple[int, Tensor]:
    """Return where tracks start: the index of a frame, and its masks float32 [P, H, W] in the order of the names.

    By default it is the frame that shows the most parts, and of those the surest.

    Raises:
        SlimeError: a frame that there is not, or one without any part.
    """
    count, labels = len(maps.names), maps.label_map
    if frame is None:
        shown = torch.stack([(labels == part).flatten(1).any(1) for part in range(1, count + 1)]).sum(0)
        best = (shown == shown.max()).nonzero().flatten()
        frame = int(best[maps.confidence[best].argmax()])
    if not 0 <= frame < len(labels):
        raise SlimeError(f"frame is {frame}; the video has the frames 0 to {len(labels) - 1}.")
    masks = torch.stack([(labels[frame] == part).float() for part in range(1, count + 1)])
    if not bool(masks.any()):
        raise SlimeError(
            f"No part is found in frame {frame}. Choose a frame that shows the object, or lower min_confidence."
        )
    return frame, masks


def tracked_maps(tracks: Iterable[Tensor], names: Sequence[str], palette: Sequence[Color]) -> PartMaps:
    """Return the parts of the masks bool [P, H, W] of frames, which are taken one at a time.

    Where masks overlap, the smaller part of the frame wins.

    Raises:
        SlimeError: another number of masks than of names.
    """
    frames = []
    for masks in tracks:
        if len(masks) != len(names):
            raise SlimeError(
                f"The tracks have {len(masks)} objects, but there are {len(names)} parts: {', '.join(names)}. Connect "
                "the masks of SLiMe Track Seeds as initial_mask, and no conditioning."
            )
        labels = torch.zeros(masks.shape[1:], dtype=torch.uint8)
        for part in masks.flatten(1).sum(1).argsort(descending=True).tolist():
            labels[masks[part]] = part + 1
        frames.append(labels)
    return PartMaps.of_labels(torch.stack(frames), names, palette)
