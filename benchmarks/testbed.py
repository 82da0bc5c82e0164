"""Check whether a tiny model has what SLiMe relies on in Stable Diffusion, on natural validation scenes.

    python dev.py benchmark testbed [--checkpoint FILE] [--scenes 12] [--json FILE]

The criteria were fixed before any model was trained for them, and are never to be changed in favour of a method:

1. the start token's mean share of the decoder's cross-attention is at least .5, on the scenes' own captions and on the
   empty prompt, since it is the background class;
2. queries of the layers that the paper reads change by at most 40 % between the empty prompt and "part" repeated;
3. the paper's recipe with the official decoder, from one example: background IoU at least .7, and part mIoU above
   feature neighbours and above the mean mask, on every domain.

The program exits with 1 and names each criterion that is missed. Other figures, on which no criterion depends, show
where the third one fails: in how many directions the queries of the read layers vary; part mIoU of paper on its own
example, and of a convex fit to the same example with the same layers ("one view": instant without any augmentation), on
the test scenes and on that example.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slime.backbones.base import seeded_noise
from slime.backbones.layers import LayerChoice
from slime.backbones.text import Context, TextConditioned, capture_attention, text_conditioned
from slime.parts.metrics import evaluate
from testing import scenes, splits
from testing.baselines import mean_mask
from testing.inprocess import load_backbone
from testing.recipes import PAPER_LAYERS
from testing.tiny.weights import TESTBED

from .feature_baselines import Bank, FeatureChoice, best_feature_choices
from .methods import Variant
from .rows import Row, say_row, say_table, write_rows
from .sources import as_tensor

SHARE, CHANGE, BACKGROUND = 0.5, 0.4, 0.7
TIMESTEPS = (100, 400, 800)
WORDS = 6  # repetitions of "part", as for five parts
ONE_VIEW = {"views": 1, "flip": False, "smallest_crop": 1.0, "rotation": 0.0, "blur": 0.0, "recolor": 0.0}


@torch.inference_mode()
def start_shares(backbone: TextConditioned, tests: Sequence[scenes.Scene], prompt: str | None) -> float:
    """Return the start token's mean share of the decoder's cross-attention.

    ``prompt`` is None for each scene's own caption.
    """
    names = tuple(layer.name for layer in backbone.layers if layer.name.startswith("output."))
    shares = []
    for index, scene in enumerate(tests):
        context = backbone.encode_prompt(scene.caption if prompt is None else prompt)
        for timestep in TIMESTEPS:
            seen = _look(backbone, scene, timestep, index, context, names)
            for attention in seen.cross.values():
                q, k = (t.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for t in attention[:2])
                scores = q.float() @ k.float().transpose(2, 3) * q.shape[-1] ** -0.5
                shares.append(float(scores.softmax(-1)[..., 0].mean()))
    return float(np.mean(shares))


@torch.inference_mode()
def query_change(backbone: TextConditioned, tests: Sequence[scenes.Scene]) -> float:
    """Return the largest mean change of a read layer's queries by the paper's prompt, relative to their length."""
    names, changes = backbone.default_layers().read, []
    prompts = [backbone.encode_prompt(text) for text in ("", " ".join(["part"] * WORDS))]
    for index, scene in enumerate(tests):
        empty, part = (_look(backbone, scene, backbone.info.timestep, index, one, names).cross for one in prompts)
        changes.append([float((part[n].query - empty[n].query).norm() / empty[n].query.norm()) for n in names])
    return float(np.mean(changes, 0).max())


@torch.inference_mode()
def query_directions(backbone: TextConditioned, tests: Sequence[scenes.Scene]) -> float:
    """Return the number of directions in which the queries of a read layer vary over these scenes, mean over layers.

    The number is the participation ratio of the covariance's eigenvalues: 1 if they vary in one direction only.
    """
    names, found = backbone.default_layers().read, []
    context = backbone.encode_prompt("")
    seen = [_look(backbone, s, backbone.info.timestep, i, context, names).cross for i, s in enumerate(tests)]
    for name in names:
        queries = torch.cat([cross[name].query[0].float() for cross in seen])
        covariance = torch.cov(queries.T)
        found.append(float(covariance.trace() ** 2 / covariance.square().sum()))
    return float(np.mean(found))


def _look(backbone: TextConditioned, scene: scenes.Scene, timestep: int, seed: int, context: Context, names):  # type: ignore[no-untyped-def]
    latents = backbone.encode_images(_image(scene)[None].to(backbone.device))
    noise = seeded_noise(latents.shape, seed, latents.device)
    return capture_attention(backbone, latents, timestep, noise, context, LayerChoice(tuple(names), ()))


def _image(scene: scenes.Scene) -> Tensor:
    return torch.from_numpy(scene.image).float() / 255


def one_shot(
    backbone: TextConditioned, domain: str, tests: Sequence[scenes.Scene], steps: int, chosen: dict[str, FeatureChoice]
) -> Row:
    """Measure the paper's recipe, and baselines that are not trained, with one example."""
    classes, truths = len(scenes.PARTS[domain]) + 1, [scene.labels for scene in tests]
    example = splits.example(domain, splits.VALIDATION_EXAMPLES, style=scenes.NATURAL)
    method = Variant("paper", {"steps": steps, "views": steps})
    pixels = np.stack([scene.image for scene in tests])
    learned = method.fit(backbone, [example], 0)
    paper = evaluate(method.find(backbone, learned, pixels, 0), truths, classes)
    row: Row = {"background": float(paper.per_class[0]), "paper": paper.part_miou}
    own, own_labels = np.round(example.image.numpy() * 255).astype(np.uint8)[None], [example.labels.numpy()]
    row["paper, own example"] = evaluate(method.find(backbone, learned, own, 0), own_labels, classes).part_miou
    convex = Variant("instant", PAPER_LAYERS | ONE_VIEW)
    fitted = convex.fit(backbone, [example], 0)
    row["one view"] = evaluate(convex.find(backbone, fitted, pixels, 0), truths, classes).part_miou
    row["one view, own example"] = evaluate(convex.find(backbone, fitted, own, 0), own_labels, classes).part_miou
    bank = Bank(backbone, [example], list(dict.fromkeys(chosen.values())))
    rivals = {pair[0]: maps for pair, maps in bank.find(as_tensor(pixels), list(chosen.items())).items()}
    rivals["mean mask"] = [mean_mask([example])] * len(tests)
    return row | {name: evaluate(maps, truths, classes).part_miou for name, maps in rivals.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=TESTBED)
    parser.add_argument("--scenes", type=int, default=12, help="of every domain")
    parser.add_argument("--steps", type=int, default=200, help="of the paper's recipe")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    backbone = text_conditioned(load_backbone(options.checkpoint), "This benchmark")
    tests = {
        domain: [scenes.render(domain, splits.VALIDATION + i, style=scenes.NATURAL) for i in range(options.scenes)]
        for domain in scenes.DOMAINS
    }
    some = [scene for found in tests.values() for scene in found[:4]]
    figures: dict[str, float] = {
        "start token, own captions": start_shares(backbone, some, None),
        "start token, empty prompt": start_shares(backbone, some, ""),
        "change of queries": query_change(backbone, some),
        "directions of queries": query_directions(backbone, some),
    }
    rows: list[Row] = [dict(figures)]
    say_row(figures)
    shares = {name: value for name, value in figures.items() if name.startswith("start")}
    missed = [f"{name} {value:.3f}, at least {SHARE}" for name, value in shares.items() if value < SHARE]
    if figures["change of queries"] > CHANGE:
        missed.append(f"change of queries {figures['change of queries']:.3f}, at most {CHANGE}")
    chosen = best_feature_choices(backbone, scenes.NATURAL)
    for domain, found in tests.items():
        row: Row = {"domain": domain} | one_shot(backbone, domain, found, options.steps, chosen)
        say_row(row)
        rows.append(row)
        if row["background"] < BACKGROUND:
            missed.append(f"{domain}: background IoU of paper {row['background']:.3f}, at least {BACKGROUND}")
        for rival in ("feature neighbours", "mean mask"):
            if row["paper"] <= row[rival]:
                missed.append(f"{domain}: part mIoU of paper {row['paper']:.3f}, above {rival}'s {row[rival]:.3f}")
    write_rows(options.json, rows)
    say_table(
        ("domain", *list(rows[1])[1:]), [[r["domain"], *(f"{v:.3f}" for v in list(r.values())[1:])] for r in rows[1:]]
    )
    for text in missed:
        sys.stdout.write(f"missed: {text}\n")
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
