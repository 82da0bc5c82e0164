"""Labelled images: an image with a label map and the names of its parts."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import SlimeError
from .images import as_rgb, check_images

logger = logging.getLogger(__name__)

BACKGROUND = "background"
MAX_PARTS = 76  # more colours cannot be told apart, and more parts cannot be painted
MAX_NAME = 200  # characters
CONTROL = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
SEPARATORS = re.compile("[,;\n\u060c\u061b\u3001\uff0c\uff1b]")  # commas and semicolons of any script
IGNORE = 255  # label of pixels that count neither in training nor in evaluation


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return stripped part names; raise SlimeError for none, empty, duplicate or too many names, or "background"."""
    cleaned = tuple(name.strip() for name in names)
    if not cleaned:
        raise SlimeError('No part names given; write at least one, for example "wheel, window".')
    if any(not name for name in cleaned):
        raise SlimeError(
            f"Part {cleaned.index('') + 1} of {len(cleaned)} has an empty name; names are separated by commas."
        )
    duplicates = sorted({name for name in cleaned if cleaned.count(name) > 1})
    if duplicates:
        raise SlimeError(f"Part names must differ; given more than once: {', '.join(duplicates)}.")
    odd = next((name for name in cleaned if len(name) > MAX_NAME or CONTROL.search(name)), None)
    if odd is not None:
        raise SlimeError(
            f"The part name {odd[:40]!r} has line breaks, control characters or more than {MAX_NAME} characters."
        )
    separated = next((name for name in cleaned if SEPARATORS.search(name)), None)
    if separated is not None:
        raise SlimeError(f'The part name "{separated}" has a comma or semicolon, which separates names. Use a slash.')
    if BACKGROUND in (name.lower() for name in cleaned):
        raise SlimeError('"background" is not a part: it is everything without a mask. Remove it from the names.')
    if len(cleaned) > MAX_PARTS:
        raise SlimeError(f"{len(cleaned)} parts given; at most {MAX_PARTS} fit in one set of embeddings.")
    return cleaned


def check_known(names: Iterable[str], known: Sequence[str]) -> None:
    """Raise SlimeError for names that are not among those of the trained parts."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SlimeError(
            f"There is no part {', '.join(unknown)}. The trained parts are: "
            f"{', '.join(name for name in known if name != BACKGROUND)}."
        )


def check_image(image: Tensor) -> Tensor:
    """Return a copy of an image as float32 [H, W, 3] in [0, 1] on the CPU.

    Raises:
        SlimeError: wrong shape, too small, NaN or infinite pixels, or values far outside [0, 1].
    """
    if image.ndim != 3:
        raise SlimeError(f"An image must be [H, W, 3]; got {list(image.shape)}.")
    check_images(image[None])
    return as_rgb(image.to("cpu")).clone()


@dataclass(frozen=True)
class Example:
    """One labelled image.

    Attributes:
        image: float32 [H, W, 3] in [0, 1], CPU.
        labels: int64 [H, W]; 0 background, k the part ``names[k - 1]``, 255 ignored.
        names: part names.
        unlabelled: meaning of label 0: "background", "ignore" (not trained on: there may be parts), or "auto": ignored
            if other examples label parts that this one does not.
        labelled: the names that were labelled here; others come from further examples. None means all.
    """

    image: Tensor
    labels: Tensor
    names: tuple[str, ...]
    unlabelled: str = "auto"
    labelled: frozenset[str] | None = None

    def with_ignored_pixels(self) -> Example:
        """Return the example with label 255 where its pixels are ignored, see ``unlabelled``."""
        partial = self.labelled is not None and not self.labelled >= set(self.names)
        if self.unlabelled == "background" or (self.unlabelled == "auto" and not partial):
            return self
        labels = torch.where(self.labels == 0, IGNORE, self.labels)
        return replace(self, labels=labels, unlabelled="background")

    @classmethod
    def from_label_map(cls, image: Tensor, labels: Tensor, names: Sequence[str]) -> Example:
        """Make an example from an integer label map [H, W] of the image's size.

        Raises:
            SlimeError: for bad names or images, another size, labels out of range, or a map without any part.
        """
        names = check_names(names)
        image = check_image(image)
        labels = labels.detach().to("cpu", torch.int64).clone()
        if labels.shape != image.shape[:2]:
            raise SlimeError(
                f"The label map is {_size(labels)} but the image is {_size(image)}. Resize the label map to the image."
            )
        present = set(labels.unique().tolist()) - {0, IGNORE}
        unknown = sorted(label for label in present if not 1 <= label <= len(names))
        if unknown:
            raise SlimeError(f"Labels {unknown} have no name; {len(names)} parts are named: {', '.join(names)}.")
        if not present:
            raise SlimeError("The mask is empty: no pixel belongs to any part. Paint a mask, or connect another one.")
        return cls(image, labels, names)

    @classmethod
    def from_masks(cls, image: Tensor, masks: Mapping[str, Tensor]) -> Example:
        """Make an example from one mask [H, W] per part, which is where it is above 0.5; later masks lie on top.

        Raises:
            SlimeError: for bad names or images, masks of another size, empty, weak or with NaN, naming the part.
        """
        names = check_names(list(masks))
        image = check_image(image)
        labels = torch.zeros(image.shape[:2], dtype=torch.int64)
        for index, (name, mask) in enumerate(zip(names, masks.values(), strict=True), start=1):
            mask = mask.detach().to("cpu", torch.float32)
            inside, most = mask > 0.5, float(mask.max()) if mask.numel() else 0.0
            if not mask.isfinite().all():
                raise SlimeError(f'The mask of "{name}" has NaN or infinite values. Check the node that made it.')
            if 0 < most <= 0.5:
                raise SlimeError(
                    f'The mask of "{name}" reaches only {most:.2f}, but a pixel belongs to a part only above 0.5. '
                    "Paint it at full strength, or threshold the mask."
                )
            if not inside.any():
                raise SlimeError(
                    f'Nothing is painted: the mask of "{name}" is empty. Paint the part (right-click Load Image, Open '
                    "in MaskEditor), or remove its name."
                )
            if mask.shape != image.shape[:2]:
                raise SlimeError(
                    f'The mask of "{name}" is {_size(mask)} but the image is {_size(image)}. Resize the mask to the '
                    "image."
                )
            overlap = int((inside & (labels > 0)).sum())
            if overlap:
                logger.warning('SLiMe: %d pixels of "%s" were masked before; the later part keeps them.', overlap, name)
            labels[inside] = index
        missing = [name for index, name in enumerate(names, start=1) if not (labels == index).any()]
        if missing:
            raise SlimeError(
                f"Nothing is left of {', '.join(missing)}: masks further down the list cover it. Change the order of "
                "the masks, the largest part first."
            )
        return cls(image, labels, names)

    @classmethod
    def from_colors(cls, image: Tensor, colored: Tensor, colors: Mapping[str, tuple[int, int, int]]) -> Example:
        """Make an example from an image [H, W, 3] in [0, 1] with each part in its own colour (0..255).

        A pixel belongs to the nearest colour within 10 levels per channel; other colours are background.

        Raises:
            SlimeError: as :meth:`from_label_map`, and when a named colour does not occur.
        """
        names = check_names(list(colors))
        levels = (check_image(colored) * 255).round()
        labels = torch.zeros(levels.shape[:2], dtype=torch.int64)
        best = torch.full(levels.shape[:2], 10.5)
        for index, color in enumerate(colors.values(), start=1):
            distance = (levels - torch.tensor(color, dtype=torch.float32)).abs().amax(-1)
            nearer = distance < best
            labels[nearer], best[nearer] = index, distance[nearer]
        missing = [n for i, n in enumerate(names, start=1) if not (labels == i).any()]
        if missing:
            raise SlimeError(f"No pixel has the colour of: {', '.join(missing)}. Check the colours of the label image.")
        return cls.from_label_map(image, labels, names)


def merge_examples(previous: Sequence[Example], new: Example) -> tuple[Example, ...]:
    """Add an example: the same image again adds parts to it, another image is a further shot.

    All examples get the union of the names, in order of first appearance. The one added or changed comes last.
    """
    names = list(dict.fromkeys([*(name for example in previous for name in example.names), *new.names]))
    check_names(names)
    merged = [_rename(example, names) for example in previous]
    new = _rename(new, names)
    for index, example in enumerate(merged):
        if example.image.shape == new.image.shape and torch.equal(example.image, new.image):
            painted = (new.labels > 0) & (new.labels != IGNORE)
            overlap = int((painted & (example.labels > 0) & (example.labels != IGNORE)).sum())
            if overlap:
                logger.warning("SLiMe: %d pixels were labelled before; the later example keeps them.", overlap)
            labels = torch.where(painted | (example.labels == 0), new.labels, example.labels)
            choices = {example.unlabelled, new.unlabelled}
            unlabelled = next(choice for choice in ("ignore", "background", "auto") if choice in choices)
            joined = replace(new, labels=labels, unlabelled=unlabelled, labelled=_labelled(example) | _labelled(new))
            return (*merged[:index], *merged[index + 1 :], joined)
    return (*merged, new)


def common_names(*examples: Example) -> tuple[str, ...]:
    """Return the part names of the examples; raise SlimeError where there is none, or they differ."""
    if not examples:
        raise SlimeError("There is no example: connect at least one SLiMe Example.")
    names = dict.fromkeys(example.names for example in examples)
    if len(names) > 1:
        raise SlimeError(f"All examples must name the same parts; got {' / '.join(map(', '.join, sorted(names)))}.")
    return examples[0].names


def _labelled(example: Example) -> frozenset[str]:
    return frozenset(example.names) if example.labelled is None else example.labelled


def _rename(example: Example, names: Sequence[str]) -> Example:
    table = torch.arange(IGNORE + 1)
    for index, name in enumerate(example.names, start=1):
        table[index] = names.index(name) + 1
    return replace(example, labels=table[example.labels], names=tuple(names), labelled=_labelled(example))


def _size(tensor: Tensor) -> str:
    return f"{tensor.shape[1]}x{tensor.shape[0]}" if tensor.ndim >= 2 else str(list(tensor.shape))
