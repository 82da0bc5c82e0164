"""Edit embeddings: merge, rename, drop, recolour, describe."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch

from .embeddings import CONCEPT, CONTEXT, LINEAR, PartEmbeddings
from .errors import SlimeError
from .examples import check_known, check_names
from .parts.palette import PALETTE

DROP = "drop"
_COLOR = re.compile(r"^#([0-9a-fA-F]{6})$")


def merge_embeddings(first: PartEmbeddings, second: PartEmbeddings) -> PartEmbeddings:
    """Put the parts of both into one softmax. Colours of the second that the first has too are changed.

    Raises:
        SlimeError: different families, conditions, layers, timesteps or groups; embeddings of the preset paper; or
            names that occur in both.
    """
    if first.backbone != second.backbone:
        raise SlimeError(
            f'The embeddings belong to different model families ("{first.backbone}" and "{second.backbone}") and '
            "cannot be merged. Use one SLiMe Segment for each."
        )
    if CONTEXT in (first.mode, second.mode):
        raise SlimeError(
            "Embeddings of the preset paper were learned together in one text and do not work apart. Merge "
            "embeddings of the preset instant, or segment with each separately."
        )
    if (first.condition is None) != (second.condition is None):
        raise SlimeError(
            "One of the two was loaded from a text, which lacks the text conditioning. Use the .safetensors file "
            "of both."
        )
    if first.vectors.keys() != second.vectors.keys() or first.extraction_key() != second.extraction_key():
        raise SlimeError(
            "The two were trained with other settings (prompt, layers, timestep or size) and cannot be merged. Train "
            "both with the same settings, or use one SLiMe Segment for each."
        )
    names = check_names([*first.names, *second.names])
    a, b = len(first.names), len(second.names)
    known = first.example_confidence > 0 and second.example_confidence > 0
    confidence = (a * first.example_confidence + b * second.example_confidence) / (a + b)
    vectors = {name: torch.cat([vector, second.vectors[name]]) for name, vector in first.vectors.items()}
    taken = set(first.palette)
    spare = [color for color in PALETTE if color not in taken and color not in second.palette]
    palette = list(first.palette)
    for color in second.palette:
        palette.append(spare.pop(0) if color in taken and spare else color)
    return replace(
        first,
        names=names,
        vectors=vectors,
        palette=tuple(palette),
        example_confidence=confidence if known else 0.0,
        settings={"merged": [first.settings, second.settings]},
        losses=(),
    )


def change_parts(embeddings: PartEmbeddings, text: str) -> PartEmbeddings:
    """Apply lines such as ``wheel = tyre`` (rename), ``wheel = drop`` (remove) and ``wheel = #ff8800`` (recolour).

    Raises:
        SlimeError: a line that is none of these, an unknown part, or a result without parts or with double names.
    """
    names, colors = list(embeddings.names), list(embeddings.palette)
    dropped: set[int] = set()
    for line in filter(None, (line.strip() for line in text.splitlines())):
        name, value = _change(line, embeddings.names)
        check_known([name], embeddings.names)
        index, color = embeddings.names.index(name), _COLOR.match(value)
        if color:
            colors[index] = tuple(bytes.fromhex(color[1]))  # type: ignore[assignment]
        elif value.startswith("#"):
            raise SlimeError(f'"{value}" is not a colour; write six hexadecimal digits, for example #ff8800.')
        elif value == DROP:
            dropped.add(index)
        else:
            names[index] = value
    parts = [index for index in range(len(names)) if index not in dropped]
    if dropped and embeddings.mode == CONTEXT:
        raise SlimeError("Parts of the preset paper were learned together in one text: none can be dropped.")
    if not parts:
        raise SlimeError("All parts are dropped. Keep at least one.")
    kept = check_names([names[index] for index in parts])
    palette = tuple(colors[index] for index in parts)
    vectors = {name: vector[parts] for name, vector in embeddings.vectors.items()}
    return replace(embeddings, names=kept, palette=palette, vectors=vectors)


def _change(line: str, known: Sequence[str]) -> tuple[str, str]:
    """Split "wheel = tyre"; a known name may hold an equals sign itself."""
    pieces = line.split("=")
    splits = [("=".join(pieces[:i]).strip(), "=".join(pieces[i:]).strip()) for i in range(1, len(pieces))]
    name, value = next((split for split in splits if split[0] in known), splits[0] if splits else ("", ""))
    if not value:
        raise SlimeError(f'"{line}" is not a change; write for example: wheel = tyre')
    return name, value


def describe(embeddings: PartEmbeddings) -> str:
    """Return a readable text: parts, kind of model, training."""
    shapes = ", ".join(f"{name} ({vector.shape[1]})" for name, vector in embeddings.vectors.items())
    lines = [f"parts ({len(embeddings.names)}): {', '.join(embeddings.names)}", f"model family: {embeddings.backbone}"]
    if embeddings.mode == CONCEPT:
        tokens = sum(name.startswith("token.") for name in embeddings.vectors)
        lines.append(f"SAM3 concepts, {tokens} tokens for each part, trained at {embeddings.side} pixels")
    else:
        kind = "linear probe" if embeddings.mode == LINEAR else "token embeddings in the text"
        prompt = embeddings.prompt or "(empty)"
        lines.append(f"{kind}, width by feature group: {shapes}")
        lines.append(f"features: timestep {embeddings.timestep}, {embeddings.side} pixels, prompt: {prompt}")
    settings = embeddings.settings
    if "preset" in settings:
        known = [f"{key} {settings[key]}" for key in ("steps", "views", "seed") if key in settings]
        lines.append(f"trained with: {settings['preset']}" + "".join(f", {item}" for item in known))
    if (check := settings.get("color_check")) is not None:
        lines.append(f"colours: {check['found']}")
    if embeddings.losses:
        lines.append(f"loss: {embeddings.losses[0]:.4f} at the start, {embeddings.losses[-1]:.4f} at the end")
    return "\n".join(lines)
