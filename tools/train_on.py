"""Train the tiny model on, from a checkpoint, until its attention behaves as Stable Diffusion's does.

    python -m tools.train_on train --work FOLDER --minutes 7 --batch 256 --workers 12     (a large GPU)
    python -m tools.train_on train --work FOLDER --minutes 300                            (two CPU cores)
    python -m tools.train_on export --work FOLDER
    python -m tools.train_on samples --source CHECKPOINT --output samples.jpg

Scenes of the natural world are rendered while it trains; training continues from its last checkpoint. Two losses join
the usual one:

- attention of the cross-attention layers is charged for padding, and at first for words, so that a place asks for words
  only where they pay: the start token becomes the sink that stands for the background;
- every scene comes as a pair, the second a crop of the same shapes in other colours, place and light, and the decoder's
  queries at the same spot of both are to be alike and to fall into the same cluster (:class:`Clusters`). What a place
  is, whatever its colour, Stable Diffusion learns from its billions of images; minutes on rendered scenes do not. No
  masks are used.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from testing import scenes
from testing.server import MODEL
from testing.tiny import model as tiny_model
from testing.tiny.weights import CLIP, TABLE, TOKENS, load_weights
from tools.train_tiny import (
    TextToImage,
    alphas_cumprod,
    attention,
    follow,
    import_comfyui,
    log,
    noised,
    paint,
    tokenize,
)

FIRST_SEED, LAST_SEED = 20_000, 500_000  # of every domain; there validation begins
FEWEST = 3_000  # images to begin with
CHUNK = 20  # images that are rendered at once
DROPPED = 0.25  # of the captions
WITHOUT_PADDING = 0.5  # of the batches
CLUSTERS, POINTS = 128, 512  # of the decoder's queries, and points of a pair that are compared
WEIGHTS = (0.05, 1.0)  # of the clusters and of how unlike the queries of one place are
CLUSTER_NOISE = 600  # timesteps above are too noisy to tell what is where
SINK_WEIGHT = 0.004  # .02 at first; kept up, it silences the words
SINK_SHARE = 0.6  # of the start token, from which on words are not charged
PADDING_WEIGHT = 0.02  # of attention to the rows that end and pad a text
UNET = "model.diffusion_model."


def variation(rng: np.random.Generator) -> scenes.Variation:
    """Several sizes, some occluders, some camouflage."""
    scale = float(np.exp(rng.uniform(np.log(0.4), 0))) if rng.random() < 0.35 else 1.0
    return scenes.Variation(scale, bool(rng.random() < 0.12), bool(rng.random() < 0.05))


def narrow(checkpoint: dict[str, Tensor], half: str) -> nn.Sequential:
    """The narrow "encoder" or "decoder" that was written zero-padded into the checkpoint."""
    model = tiny_model.narrow_encoder() if half == "encoder" else tiny_model.narrow_decoder()
    prefix, state = f"first_stage_model.taesd_{half}.", {}
    for name, weight in model.state_dict().items():
        wide = checkpoint[prefix + name].float()
        state[name] = wide[tuple(slice(0, size) for size in weight.shape)]
    model.load_state_dict(state)
    return model.eval()


def crop_box(rng: np.random.Generator) -> tuple[float, float, float, bool]:
    """Left, top and side of a square as shares of the image, and whether it is mirrored."""
    side = float(rng.uniform(0.5, 1))
    left, top = rng.uniform(0, 1 - side, 2)
    return float(left), float(top), side, bool(rng.random() < 0.5)


def cut(image: np.ndarray, box: tuple[float, float, float, bool]) -> np.ndarray:
    """The box of an image, at the image's size."""
    size, (left, top, side, mirrored) = len(image), box
    edges = (size * left, size * top, size * (left + side), size * (top + side))
    found = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, edges))
    return found[:, ::-1].copy() if mirrored else found


class Scenes(IterableDataset[tuple[Tensor, Tensor, Tensor]]):
    """Pairs of natural scenes without end, ten at a time, the second of a pair the box of the first in other colours.

    Pixels uint8 [20, H, W, 3], tokens [20, 77] as positions in the vocabulary, boxes [10, 4]. Workers share the pairs.
    """

    def __init__(self, comfyui: str, vocabulary: list[int], first: int) -> None:
        self.comfyui, self.vocabulary, self.first = comfyui, vocabulary, first

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        share, of = (worker.id, worker.num_workers) if worker else (0, 1)
        position = {token: place for place, token in enumerate(self.vocabulary)}
        for number in itertools.count(self.first // CHUNK + share, of):
            images, captions, boxes = [], [], []
            for pair in range(CHUNK // 2 * number, CHUNK // 2 * (number + 1)):
                rng = np.random.default_rng([pair, 7])
                domain, seed = scenes.DOMAINS[pair % 3], FIRST_SEED + pair // 3
                if seed >= LAST_SEED:
                    return
                changed = variation(rng)
                scene = scenes.render(domain, seed, changed, style="natural")
                other = scenes.render(domain, seed, changed, style="natural", repaint=pair)
                boxes.append(crop_box(rng))
                captions += [scene.caption, other.caption]
                images += [scene.image, cut(other.image, boxes[-1])]
            ids = [[position[int(token)] for token in row] for row in tokenize(self.comfyui, captions)]
            yield torch.from_numpy(np.stack(images)), torch.tensor(ids), torch.tensor(boxes)


class Pool:
    """The scenes that were rendered and encoded so far, at most ``size`` images; new ones replace the oldest.

    A thread fills it. Latents float16 [size, 4, 32, 32], tokens [size, 77], boxes [size / 2, 4], on the device.
    """

    def __init__(self, source: DataLoader[Any], encoder: nn.Sequential, size: int, device: torch.device) -> None:
        side = scenes.SIZE // tiny_model.DOWNSCALE
        size -= size % CHUNK
        self.latents = torch.zeros(size, 4, side, side, dtype=torch.float16, device=device)
        self.tokens = torch.zeros(size, 77, dtype=torch.long, device=device)
        self.boxes = torch.zeros(size // 2, 4, device=device)
        self.size, self.made = size, 0
        self._encoder = encoder.to(device)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(iter(source),), daemon=True)
        self._thread.start()

    @torch.inference_mode()
    def _fill(self, batches: Iterator[tuple[Tensor, Tensor, Tensor]]) -> None:
        device = self.latents.device
        for pixels, tokens, boxes in batches:
            if self._done.is_set():
                return
            start = self.made % self.size
            place = slice(start, start + len(pixels))
            image = pixels.to(device).permute(0, 3, 1, 2).float().div(255)
            self.latents[place] = self._encoder(image).half()
            self.tokens[place] = tokens.to(device)
            self.boxes[start // 2 : start // 2 + len(boxes)] = boxes.to(device)
            self.made += len(pixels)

    def wait(self, least: int) -> None:
        while self.made < least:
            if not self._thread.is_alive():
                raise RuntimeError("scenes are no longer rendered; the reason is above")
            time.sleep(1)

    def close(self) -> None:
        self._done.set()
        self._thread.join()

    def draw(self, pairs: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [2 P, 4, h, w] and tokens [2 P, 77] of P pairs, one after the other, and the boxes [P, 4]."""
        picks = torch.randint(min(self.made, self.size) // 2, (pairs,), device=self.latents.device)
        images = torch.stack([2 * picks, 2 * picks + 1], 1).flatten()
        return self.latents[images].float(), self.tokens[images], self.boxes[picks]


def words_of_world() -> list[str]:
    """Every word that captions may use, as one caption each."""
    from testing.scenes.natural import PALETTE

    names = [word for parts in scenes.PARTS.values() for part in parts for word in part.split("+")]
    more = ["a photo of the part, parts of a thing on with", *scenes.DOMAINS, *scenes.PLACES, *PALETTE]
    return [*names, *scenes.PLURAL.values(), *more, "neck+torso"]


def start_model(checkpoint: dict[str, Tensor], comfyui: str) -> tuple[TextToImage, list[int]]:
    """The checkpoint's UNet and text encoder; words it never met get embeddings of their own."""
    ids = tokenize(comfyui, words_of_world())
    table = checkpoint[CLIP + TABLE].float()
    known = set(table.abs().sum(1).nonzero()[:, 0].tolist())
    vocabulary = sorted(known | set(ids.ravel().tolist()))
    model = TextToImage(vocabulary)
    model.unet.load_state_dict({k.removeprefix(UNET): v.float() for k, v in checkpoint.items() if k.startswith(UNET)})
    text = {k.removeprefix(CLIP): v.float() for k, v in checkpoint.items() if k.startswith(CLIP)}
    del text[TABLE]
    missing = model.text.load_state_dict(text, strict=False).unexpected_keys
    if missing:
        raise ValueError(f"unexpected: {missing}")
    with torch.no_grad():
        spread = table[sorted(known)].std()
        for place, token in enumerate(vocabulary):
            if token in known:
                model.tokens.weight[place] = table[token]
            else:
                model.tokens.weight[place] = torch.randn(table.shape[1]) * spread
    return model, vocabulary


class Watch:
    """The decoder's queries, and what cross-attention, computed openly, does not give to start token and words."""

    def __init__(self) -> None:
        self.ends: Tensor | None = None  # bool [B, L], rows that end and pad a text
        self.shares: list[Tensor] = []  # by layer: not to the start token, to rows that end and pad
        self.queries: dict[str, Tensor] = {}  # [B, h * w, D]

    def options(self) -> dict[str, Any]:
        decoder = [("output", n) for n in range(3, 12)]
        places = [("input", n) for n in (1, 2, 4, 5, 7, 8)] + [("middle", 0), *decoder]
        self.shares, self.queries = [], {}
        return {
            "patches_replace": {
                "attn2": {place: functools.partial(self._cross, place) for place in places},
                "attn1": {place: functools.partial(self._self, place) for place in decoder},
            },
        }

    def _cross(
        self, place: tuple[str, int], query: Tensor, key: Tensor, value: Tensor, extra: dict[str, Any]
    ) -> Tensor:
        if place[0] == "output":
            self.queries[f"cross{place[1]}"] = query
        heads = extra["n_heads"]
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
        shares = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)
        rows = shares.float().mean((1, 2))  # [B, L]
        ended = rows.new_zeros(()) if self.ends is None else (rows * self.ends).sum(1).mean()
        self.shares.append(torch.stack([1 - rows[:, 0].mean(), ended]))
        return (shares.to(v.dtype) @ v).transpose(1, 2).flatten(2)

    def _self(self, place: tuple[str, int], query: Tensor, key: Tensor, value: Tensor, extra: dict[str, Any]) -> Tensor:
        self.queries[f"self{place[1]}"] = query
        return attention(query, key, value, extra["n_heads"])


class Clusters(nn.Module):
    """Swapped prediction (SwAV, Caron et al. 2020) of clusters of single places, from every layer's queries.

    A place's cluster is found from all layers together, balanced over the batch by Sinkhorn's iterations, and must be
    told by each layer's queries at the same place of the pair's other image.
    """

    def __init__(self, widths: dict[str, int]) -> None:
        super().__init__()
        self.centres = nn.ParameterDict({name: 0.1 * torch.randn(CLUSTERS, width) for name, width in widths.items()})

    def forward(self, queries: dict[str, Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of queries [2 P, h * w, D] of P pairs whose second images are the boxes [P, 4] of the first.

        And how unlike the queries of one place are, relative to how all queries vary, mean over layers: near 0
        where the place says all, 1 where it says nothing.
        """
        spots = torch.rand(len(boxes), POINTS, 2, device=boxes.device)  # of the second image
        within = torch.where(boxes[:, None, 3:] > 0, torch.stack([1 - spots[..., 0], spots[..., 1]], -1), spots)
        first = boxes[:, None, :2] + within * boxes[:, None, 2:3]
        likeness, unlike = {}, []
        for name, query in queries.items():
            side = math.isqrt(query.shape[1])
            maps = query.float().transpose(1, 2).unflatten(2, (side, side))
            pair = [sample(maps[0::2], first), sample(maps[1::2], spots)]
            centres = nn.functional.normalize(self.centres[name], dim=1)
            likeness[name] = [nn.functional.normalize(one, dim=-1).flatten(0, 1) @ centres.T for one in pair]
            both = torch.stack(pair).flatten(1, 2)  # [2, P * N, D]
            unlike.append((both[0] - both[1]).square().sum() / (both - both.mean((0, 1))).square().sum())
        with torch.no_grad():
            joint = [torch.stack([pair[view] for pair in likeness.values()]).mean(0) for view in (0, 1)]
            targets = [sinkhorn(one) for one in joint]
        losses = [
            -(targets[1 - view] * (pair[view] / 0.1).log_softmax(1)).sum(1).mean()
            for pair in likeness.values()
            for view in (0, 1)
        ]
        return torch.stack(losses).mean(), torch.stack(unlike).mean()


def sample(maps: Tensor, spots: Tensor) -> Tensor:
    """Maps [P, D, h, w] at spots [P, N, 2], x and y in 0..1, as [P, N, D]."""
    found = nn.functional.grid_sample(maps, 2 * spots[:, :, None] - 1, align_corners=False, padding_mode="border")
    return found[..., 0].transpose(1, 2)


def sinkhorn(likeness: Tensor, rounds: int = 3) -> Tensor:
    """Soft clusters [N, K] of likeness [N, K]: every row sums to 1, all clusters are of like size."""
    shares = (likeness / 0.05).exp()
    for _ in range(rounds):
        shares = shares / shares.sum(0, keepdim=True)
        shares = shares / shares.sum(1, keepdim=True)
    return shares


def train(work: Path, comfyui: str, source: Path, options: argparse.Namespace) -> None:
    import_comfyui(comfyui)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(1)
    checkpoint = load_weights(source)
    model, vocabulary = start_model(checkpoint, comfyui)
    saved_at, state = work / "train_on.pt", {"step": 0, "elapsed": 0.0, "images": 0}
    saved = torch.load(saved_at, weights_only=True, map_location="cpu") if saved_at.exists() else None
    if saved:
        state = saved["state"]
    rendered = Scenes(comfyui, vocabulary, int(state["images"]))
    loader = DataLoader(rendered, batch_size=None, num_workers=options.workers)
    pool = Pool(loader, narrow(checkpoint, "encoder"), options.pool, device)
    del checkpoint
    position = {token: place for place, token in enumerate(vocabulary)}
    end, empty = position[49407], torch.full((77,), position[49407], device=device)
    empty[0] = position[49406]
    model.to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    watch = Watch()
    clusters = Clusters(decoder_widths(model, watch)).to(device)
    decay = [p for p in (*model.parameters(), *clusters.parameters()) if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), fused=True)
    abar = alphas_cumprod().to(device)
    if saved:
        model.load_state_dict(saved["model"])
        clusters.load_state_dict(saved["clusters"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        log(work, f"continuing at step {state['step']}")

    def save() -> None:
        states: dict[str, Any] = {"model": model.state_dict(), "ema": ema.state_dict()}
        states |= {"clusters": clusters.state_dict(), "optimizer": optimizer.state_dict()}
        state["images"] = pool.made + rendered.first
        torch.save(states | {"state": state, "vocabulary": vocabulary}, saved_at.with_suffix(".tmp"))
        saved_at.with_suffix(".tmp").replace(saved_at)

    torch.manual_seed(int(state["step"]))
    batch, limit = options.batch, 60 * options.minutes
    clear = math.ceil(batch // 2 * CLUSTER_NOISE / 1000)  # of the pairs, the first, are less noisy
    level = torch.arange(batch, device=device) // 2  # the images of a pair are about as noisy
    means: Tensor | None = None
    pool.wait(min(pool.size, FEWEST))
    last_save = last_log = time.time()
    seen = 0
    while state["elapsed"] < limit:
        began, progress = time.time(), state["elapsed"] / limit
        for group in optimizer.param_groups:
            warm = min(1.0, (state["step"] + 1) / 100)
            group["lr"] = options.rate * warm * (0.5 * (1 + math.cos(math.pi * progress)) + 0.01)
        clean, tokens, boxes = pool.draw(batch // 2)
        tokens = torch.where(torch.rand(batch, 1, device=device) < DROPPED, empty, tokens)
        if float(torch.rand(())) < WITHOUT_PADDING:
            tokens = tokens[:, : int((tokens != end).sum(1).max()) + 1]
        t = ((level + torch.rand(batch, device=device)) / (batch // 2) * 1000).long().clamp(max=999)
        noisy, velocity = noised(clean, t, abar)
        watch.ends = tokens == end
        with torch.autocast(device.type, torch.bfloat16):
            predicted = model(noisy, t, tokens, watch.options())
        loss = (predicted.float() - velocity).square().mean()
        elsewhere, ended = torch.stack(watch.shares).mean(0)
        told, unlike = clusters({name: query[: 2 * clear] for name, query in watch.queries.items()}, boxes[:clear])
        now = torch.stack([loss, 1 - elsewhere, ended, told, unlike])
        means = now.detach() if means is None else means.lerp(now.detach(), 0.01)
        charge = SINK_WEIGHT * (means[1] < SINK_SHARE) * elsewhere + PADDING_WEIGHT * ended
        optimizer.zero_grad(set_to_none=True)
        (loss + charge + options.weights[0] * told + options.weights[1] * unlike).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        follow(ema, model, int(state["step"]))
        state["step"] += 1
        seen += batch
        if state["step"] % 10 == 0 and device.type == "cuda":
            torch.cuda.synchronize()
        state["elapsed"] += min(time.time() - began, 20.0)  # a suspended process does not train
        if time.time() - last_log > 30:
            what = "loss {:.4f} start token {:.3f} padding {:.3f} clusters {:.3f} unlike {:.4f}"
            speed = seen / (time.time() - last_log)
            minutes = f"{state['elapsed'] / 60:.1f} min {speed:.1f} images/s, {pool.made} rendered"
            if not means.isfinite().all():
                raise FloatingPointError(f"not finite at step {state['step']}: {means.tolist()}")
            log(work, f"step {state['step']} {what.format(*means.tolist())} {minutes}")
            last_log, seen = time.time(), 0
        if time.time() - last_save > 300:
            save()
            last_save = time.time()
    pool.close()
    save()


@torch.no_grad()
def decoder_widths(model: TextToImage, watch: Watch) -> dict[str, int]:
    """Width of the queries of every layer that ``watch`` sees."""
    device = model.tokens.weight.device
    latents, context = torch.zeros(1, 4, 16, 16), torch.zeros(1, 1, tiny_model.CONTEXT_DIM)
    options = watch.options()
    model.unet(latents.to(device), torch.zeros(1).to(device), context=context.to(device), transformer_options=options)
    return {name: query.shape[-1] for name, query in watch.queries.items()}


def export(work: Path, comfyui: str, source: Path, target: Path, warm: bool) -> None:
    """The source checkpoint with the trained UNet and text encoder in place, half precision; or these alone.

    Where nothing was trained the source itself: a warm start becomes a whole checkpoint.
    """
    if not (work / "train_on.pt").exists():
        save_file(load_weights(source), str(target))
        return
    import_comfyui(comfyui)
    saved = torch.load(work / "train_on.pt", weights_only=True, map_location="cpu")
    model = TextToImage(saved["vocabulary"])
    model.load_state_dict(saved["ema"])
    state = {} if warm else load_weights(source)
    state |= {UNET + name: weight.half().contiguous() for name, weight in model.unet.state_dict().items()}
    for name, weight in model.text.state_dict().items():
        if CLIP + name in state or (warm and not name.startswith("text_projection")):
            state[CLIP + name] = weight.half().contiguous()
    if warm:
        state[TOKENS] = model.tokens.weight.detach().half()
    else:
        state[CLIP + TABLE] = torch.zeros(state[CLIP + TABLE].shape, dtype=torch.float16)
        state[CLIP + TABLE][saved["vocabulary"]] = model.tokens.weight.detach().half()
    steps = str(saved["state"]["step"])
    metadata = {
        "modelspec.title": "SLiMe tiny demo model",
        "steps_on": steps,
        "vocabulary": json.dumps(saved["vocabulary"]),
    }
    save_file(state, str(target), metadata=metadata)
    log(work, f"export: {target.name} {target.stat().st_size / 1e6:.1f} MB after {steps} further steps")


def samples(comfyui: str, source: Path, target: Path) -> None:
    """What a checkpoint paints for captions of natural scenes it has not seen: four of every domain."""
    import_comfyui(comfyui)
    checkpoint = load_weights(source)
    captions = [scenes.render(d, 900_000 + i, style="natural").caption for d in scenes.DOMAINS for i in range(4)]
    model = start_model(checkpoint, comfyui)[0].eval()
    paint(model, narrow(checkpoint, "decoder"), comfyui, captions, 4).save(target, quality=90)
    sys.stdout.write("\n".join(captions) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["train", "export", "samples"])
    parser.add_argument("--comfyui", default=os.environ.get("COMFYUI_DIR"))
    parser.add_argument("--work", type=Path, default=Path("demo_training/on"))
    parser.add_argument("--source", type=Path, default=MODEL)
    parser.add_argument("--output", type=Path, default=Path("demo_training/slime_tiny_on.safetensors"))
    parser.add_argument("--warm", action="store_true", help="export a warm start: what was trained alone")
    parser.add_argument("--minutes", type=float, default=300, help="of training in all")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--rate", type=float, default=5e-4, help="of learning, at its peak")
    parser.add_argument("--workers", type=int, default=1, help="processes that render")
    parser.add_argument("--pool", type=int, default=120_000, help="images that are kept for training")
    parser.add_argument("--weights", type=float, nargs=2, default=WEIGHTS, metavar=("CLUSTERS", "ALIKE"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.stage == "train":
        train(options.work, options.comfyui, options.source, options)
    elif options.stage == "samples":
        samples(options.comfyui, options.source, options.output)
    else:
        export(options.work, options.comfyui, options.source, options.output, options.warm)


if __name__ == "__main__":
    main()
