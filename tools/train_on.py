"""Train the tiny model on, from a checkpoint, until its attention behaves as Stable Diffusion's does.

    python -m tools.train_on data --work FOLDER --shards 8
    python -m tools.train_on train --work FOLDER --minutes 25 100
    python -m tools.train_on export --work FOLDER
    python -m tools.train_on samples --source CHECKPOINT --output samples.jpg

Scenes of the natural world are rendered and encoded in shards; training takes whatever shards there are, first on
latents of 16 x 16, then of 32 x 32, and continues from its last checkpoint. Two losses join the usual one:

- attention of the cross-attention layers is charged for every row but the start token's, so that a place asks for words
  only where they pay: the start token becomes the sink that stands for the background;
- every scene comes as a pair, the second a crop of the same shapes in other colours, place and light, and the decoder's
  queries at the same spot of both are to fall into the same cluster (:class:`Clusters`). What a place is, whatever its
  colour, Stable Diffusion learns from its billions of images; minutes on rendered scenes do not. No masks are used.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from testing import scenes
from testing.server import MODEL
from testing.tiny import model as tiny_model
from tools.train_tiny import TextToImage, alphas_cumprod, import_comfyui, log, paint, tokenize

SHARD = 1500
FIRST_SEED = 20_000  # of every domain; below 500,000, where validation begins
SIDES = (16, 32)
DROPPED = 0.25  # of the captions
WITHOUT_PADDING = 0.5  # of the batches
CLUSTERS, POINTS = 128, 512  # of the decoder's queries, and points of a pair that are compared
CLUSTER_WEIGHT, ALIKE_WEIGHT = 0.05, 1.0
CLUSTER_NOISE = 600  # timesteps above are too noisy to tell what is where
SINK_WEIGHT = 0.004  # .02 at first; kept up, it silences the words
SINK_SHARE = 0.7  # of the start token, from which on nothing is charged
CLIP = "cond_stage_model.transformer."
TOKENS = "tokens"
UNET = "model.diffusion_model."
TABLE = "text_model.embeddings.token_embedding.weight"


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


@torch.inference_mode()
def make_shard(work: Path, index: int, encoder: nn.Sequential) -> None:
    """Latents float16 [N, 4, 32, 32] and [N, 4, 16, 16] of natural scenes, their captions, and the boxes [N / 2, 4].

    Scenes come in pairs, the second the box of the first in other colours.
    """
    target = work / f"shard_{index:03d}.npz"
    if target.exists():
        return
    start, captions, boxes = time.time(), [], []
    latents: dict[int, list[np.ndarray]] = {side: [] for side in SIDES}
    pending: list[np.ndarray] = []
    for number in range(index * SHARD // 2, (index + 1) * SHARD // 2):
        rng = np.random.default_rng([number, 7])
        domain, seed = scenes.DOMAINS[number % 3], FIRST_SEED + number // 3
        changed = variation(rng)
        scene = scenes.render(domain, seed, changed, style="natural")
        other = scenes.render(domain, seed, changed, style="natural", repaint=number)
        boxes.append(crop_box(rng))
        captions += [scene.caption, other.caption]
        pending += [scene.image, cut(other.image, boxes[-1])]
        if len(pending) == 20:
            pixels = torch.from_numpy(np.stack(pending)).permute(0, 3, 1, 2).float().div(255)
            pending = []
            for side in SIDES:
                small = pixels if side == 32 else nn.functional.avg_pool2d(pixels, 2)
                latents[side].append(encoder(small.contiguous(memory_format=torch.channels_last)).half().numpy())
    scratch = target.with_suffix(".tmp.npz")
    arrays = {f"side_{side}": np.concatenate(latents[side]) for side in SIDES}
    arrays["boxes"] = np.array(boxes, np.float32)
    np.savez(scratch, captions=np.array(json.dumps(captions)), **arrays)  # type: ignore[arg-type]
    os.replace(scratch, target)
    log(work, f"shard {index}: {time.time() - start:.0f} s")


class Shards:
    """All shards that are there; new ones are picked up."""

    def __init__(self, work: Path, side: int) -> None:
        self.work, self.side = work, side
        self.latents: list[np.ndarray] = []
        self.boxes: list[np.ndarray] = []
        self.captions: list[str] = []
        self._read: set[str] = set()
        self.refresh()

    def refresh(self) -> None:
        for path in sorted(self.work.glob("shard_[0-9][0-9][0-9].npz")):
            if path.name not in self._read:
                with np.load(path) as data:
                    self.latents.append(data[f"side_{self.side}"])
                    self.boxes.append(data["boxes"])
                    self.captions += json.loads(str(data["captions"]))
                self._read.add(path.name)

    def draw(self, rng: np.random.Generator, pairs: int) -> tuple[Tensor, list[str], Tensor]:
        """Latents [2 P, 4, h, w] and captions of P pairs, one after the other, and the boxes [P, 4]."""
        picks = rng.integers(len(self.captions) // 2, size=pairs)
        images = [image for pick in picks for image in (2 * pick, 2 * pick + 1)]
        clean = np.stack([self.latents[i // SHARD][i % SHARD] for i in images]).astype(np.float32)
        boxes = np.stack([self.boxes[2 * i // SHARD][i % (SHARD // 2)] for i in picks])
        return torch.from_numpy(clean), [self.captions[i] for i in images], torch.from_numpy(boxes)


def words_of_world() -> list[str]:
    """Every word that captions may use, as one caption each."""
    from testing.scenes.natural import PALETTE

    names = [word for parts in scenes.PARTS.values() for part in parts for word in part.split("+")]
    more = ["a photo of the part, parts of a thing on with", *scenes.DOMAINS, *scenes.PLACES, *PALETTE]
    return [*names, *scenes.PLURAL.values(), *more, "neck+torso"]


def load_source(path: Path) -> dict[str, Tensor]:
    """A checkpoint, or a warm start, which brings what was trained and takes the rest from the demo's checkpoint."""
    state = load_file(str(path))
    if TOKENS not in state:
        return state
    with safe_open(str(path), framework="pt") as file:
        vocabulary = json.loads(file.metadata()["vocabulary"])
    base = load_file(str(MODEL)) | {name: weight for name, weight in state.items() if name != TOKENS}
    table = torch.zeros(base[CLIP + TABLE].shape, dtype=torch.float16)
    table[vocabulary] = state[TOKENS]
    return base | {CLIP + TABLE: table}


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
    """The decoder's queries, and the mean share of cross-attention, computed openly, that leaves the start token."""

    def __init__(self) -> None:
        self.shares: list[Tensor] = []
        self.queries: dict[str, Tensor] = {}  # [B, h * w, D]

    def options(self) -> dict[str, Any]:
        from comfy.ldm.modules.attention import attention_pytorch

        decoder = [("output", n) for n in range(3, 12)]
        places = [("input", n) for n in (1, 2, 4, 5, 7, 8)] + [("middle", 0), *decoder]
        self.shares, self.queries = [], {}
        return {
            "optimized_attention_override": lambda _f, *args, **kwargs: attention_pytorch(*args, **kwargs),
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
        self.shares.append(1 - shares[..., 0].float().mean())
        return (shares.to(v.dtype) @ v).transpose(1, 2).flatten(2)

    def _self(self, place: tuple[str, int], query: Tensor, key: Tensor, value: Tensor, extra: dict[str, Any]) -> Tensor:
        from comfy.ldm.modules.attention import attention_pytorch

        self.queries[f"self{place[1]}"] = query
        return attention_pytorch(query, key, value, extra["n_heads"])


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
        spots = torch.rand(len(boxes), POINTS, 2)  # of the second image
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


def train(work: Path, comfyui: str, source: Path, minutes: tuple[float, ...], batches: tuple[int, ...]) -> None:
    import_comfyui(comfyui)
    torch.manual_seed(1)
    checkpoint = load_source(source)
    model, vocabulary = start_model(checkpoint, comfyui)
    del checkpoint
    position = {token: place for place, token in enumerate(vocabulary)}
    cache: dict[str, list[int]] = {}

    tokenizer = _tokenizer(comfyui)

    def ids_of(captions: list[str]) -> Tensor:
        fresh = [caption for caption in dict.fromkeys(captions) if caption not in cache]
        if fresh:
            rows = tokenizer(fresh, padding="max_length", max_length=77, truncation=True)["input_ids"]
            cache.update({c: [position[i] for i in row] for c, row in zip(fresh, rows, strict=True)})
        return torch.tensor([cache[caption] for caption in captions])

    end = position[49407]
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    watch = Watch()
    clusters = Clusters(decoder_widths(model, watch))
    decay = [p for p in (*model.parameters(), *clusters.parameters()) if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98))
    abar = alphas_cumprod()
    state: dict[str, Any] = {"step": 0, "elapsed": [0.0] * len(SIDES), "phase": 0}
    saved_at = work / "train_on.pt"
    if saved_at.exists():
        saved = torch.load(saved_at, weights_only=True)
        model.load_state_dict(saved["model"])
        clusters.load_state_dict(saved["clusters"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
        log(work, f"continuing at step {state['step']}")

    def save() -> None:
        states: dict[str, Any] = {
            "model": model.state_dict(),
            "ema": ema.state_dict(),
            "clusters": clusters.state_dict(),
        }
        states |= {"optimizer": optimizer.state_dict(), "state": state, "vocabulary": vocabulary}
        torch.save(states, saved_at.with_suffix(".tmp"))
        saved_at.with_suffix(".tmp").replace(saved_at)

    rng = np.random.default_rng(state["step"])
    torch.manual_seed(state["step"])
    for phase in range(state["phase"], len(SIDES)):
        shards, limit, batch, peak = (
            Shards(work, SIDES[phase]),
            60 * minutes[phase],
            batches[phase],
            (6e-4, 5e-4)[phase],
        )
        mean_loss = mean_share = mean_told = mean_unlike = None
        last_save = last_log = time.time()
        seen = 0
        while state["elapsed"][phase] < limit:
            began, progress = time.process_time(), state["elapsed"][phase] / limit
            warm = min(1.0, (state["step"] + 1) / 100)
            shape = 1 - 0.3 * progress if phase == 0 else 0.5 * (1 + math.cos(math.pi * progress)) + 0.01
            for group in optimizer.param_groups:
                group["lr"] = peak * warm * shape
            clean, captions, boxes = shards.draw(rng, batch // 2)
            captions = ["" if rng.random() < DROPPED else caption for caption in captions]
            tokens = ids_of(captions)
            if rng.random() < WITHOUT_PADDING:
                longest = int((tokens != end).sum(1).max()) + 1
                tokens = tokens[:, :longest]
            strata = torch.arange(batch) // 2  # the images of a pair are about as noisy
            t = ((strata + torch.rand(batch)) / (batch // 2) * 1000).long().clamp(max=999)
            noise = torch.randn_like(clean)
            a, s = abar[t].sqrt()[:, None, None, None], (1 - abar[t]).sqrt()[:, None, None, None]
            context = encode_text(model, tokens)
            noisy = a * clean + s * noise
            with torch.autocast("cpu", torch.bfloat16):
                predicted = model.unet(noisy, t, context=context, transformer_options=watch.options())
            loss = (predicted.float() - (a * noise - s * clean)).square().mean()
            share = torch.stack(watch.shares).mean()
            clear = t.view(-1, 2).amax(1) < CLUSTER_NOISE
            told, unlike = clusters({n: q[clear.repeat_interleave(2)] for n, q in watch.queries.items()}, boxes[clear])
            optimizer.zero_grad(set_to_none=True)
            charge = SINK_WEIGHT if mean_share is None or mean_share < SINK_SHARE else 0.0
            (loss + charge * share + CLUSTER_WEIGHT * told + ALIKE_WEIGHT * unlike).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate = min(0.999, (1 + state["step"]) / (10 + state["step"]))
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - rate)
            state["step"] += 1
            state["elapsed"][phase] += time.process_time() - began
            seen += batch
            mean_loss = _running(mean_loss, float(loss.detach()))
            mean_share = _running(mean_share, 1 - float(share.detach()))
            mean_told = _running(mean_told, float(told.detach()))
            mean_unlike = _running(mean_unlike, float(unlike.detach()))
            if time.time() - last_log > 60:
                speed = seen / (time.time() - last_log)
                log(
                    work,
                    f"{SIDES[phase]}x{SIDES[phase]} step {state['step']} loss {mean_loss:.4f} start token "
                    f"{mean_share:.3f} clusters {mean_told:.3f} unlike {mean_unlike:.3f} "
                    f"{state['elapsed'][phase] / 60:.1f} min {speed:.1f} images/s",
                )
                last_log, seen = time.time(), 0
            if time.time() - last_save > 300:
                save()
                shards.refresh()
                last_save = time.time()
        state["phase"] = phase + 1
        save()


@torch.no_grad()
def decoder_widths(model: TextToImage, watch: Watch) -> dict[str, int]:
    """Width of the queries of every layer that ``watch`` sees."""
    latents, context = torch.zeros(1, 4, 16, 16), torch.zeros(1, 1, tiny_model.CONTEXT_DIM)
    model.unet(latents, torch.zeros(1), context=context, transformer_options=watch.options())
    return {name: query.shape[-1] for name, query in watch.queries.items()}


def _tokenizer(comfyui: str) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(Path(comfyui) / "comfy" / "sd1_tokenizer"))


def _running(mean: float | None, value: float) -> float:
    return value if mean is None else 0.99 * mean + 0.01 * value


def encode_text(model: TextToImage, tokens: Tensor) -> Tensor:
    """As :meth:`TextToImage.encode_text`, for fewer than 77 tokens too."""
    from comfy.ldm.modules.attention import attention_pytorch

    text = model.text.text_model
    length = tokens.shape[1]
    x = model.tokens(tokens) + text.embeddings.position_embedding.weight[:length]
    causal = torch.full((length, length), -torch.finfo(x.dtype).max).triu_(1)
    for layer in text.encoder.layers:
        x = x + layer.self_attn(layer.layer_norm1(x), causal, attention_pytorch)
        x = x + layer.mlp(layer.layer_norm2(x))
    return text.final_layer_norm(x)


def export(work: Path, comfyui: str, source: Path, target: Path, warm: bool) -> None:
    """The source checkpoint with the trained UNet and text encoder in place, half precision; or these alone.

    Where nothing was trained the source itself: a warm start becomes a whole checkpoint.
    """
    if not (work / "train_on.pt").exists():
        save_file(load_source(source), str(target))
        return
    import_comfyui(comfyui)
    saved = torch.load(work / "train_on.pt", weights_only=True)
    model = TextToImage(saved["vocabulary"])
    model.load_state_dict(saved["ema"])
    state = {} if warm else load_source(source)
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
    checkpoint = load_source(source)
    captions = [scenes.render(d, 900_000 + i, style="natural").caption for d in scenes.DOMAINS for i in range(4)]
    model = start_model(checkpoint, comfyui)[0].eval()
    paint(model, narrow(checkpoint, "decoder"), comfyui, captions, 4).save(target, quality=90)
    sys.stdout.write("\n".join(captions) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["data", "train", "export", "samples"])
    parser.add_argument("--comfyui", default=os.environ.get("COMFYUI_DIR"))
    parser.add_argument("--work", type=Path, default=Path("demo_training/on"))
    parser.add_argument("--source", type=Path, default=MODEL)
    parser.add_argument("--output", type=Path, default=Path("demo_training/slime_tiny_on.safetensors"))
    parser.add_argument("--warm", action="store_true", help="export a warm start: what was trained alone")
    parser.add_argument("--shards", type=int, nargs="+", default=[0, 8], metavar=("FIRST", "END"))
    parser.add_argument("--minutes", type=float, nargs=2, default=(25, 100), metavar=("SMALL", "FULL"))
    parser.add_argument("--batches", type=int, nargs=2, default=(24, 12), metavar=("SMALL", "FULL"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.stage == "data":
        encoder = narrow(load_source(options.source), "encoder")
        for index in range(*options.shards):
            make_shard(options.work, index, encoder)
    elif options.stage == "train":
        train(options.work, options.comfyui, options.source, tuple(options.minutes), tuple(options.batches))
    elif options.stage == "samples":
        samples(options.comfyui, options.source, options.output)
    else:
        export(options.work, options.comfyui, options.source, options.output, options.warm)


if __name__ == "__main__":
    main()
