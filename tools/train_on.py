"""Train the tiny model on, from a checkpoint, until its attention behaves as Stable Diffusion's does.

    python -m tools.train_on data --work FOLDER --shards 8
    python -m tools.train_on train --work FOLDER --minutes 25 100
    python -m tools.train_on export --work FOLDER

Scenes of the natural world are rendered and encoded in shards; training takes whatever shards there are, first on
latents of 16 x 16, then of 32 x 32, and continues from its last checkpoint. Beside the usual loss, attention of the
cross-attention layers is charged for every row but the start token's, so that a place asks for words only where they
pay: the start token becomes the sink that stands for the background.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from testing import scenes
from testing.server import MODEL
from testing.tiny import model as tiny_model
from tools.train_tiny import TextToImage, alphas_cumprod, import_comfyui, log, tokenize

SHARD = 1500
FIRST_SEED = 20_000  # of every domain; below 500,000, where validation begins
SIDES = (16, 32)
DROPPED = 0.25  # of the captions
WITHOUT_PADDING = 0.5  # of the batches
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


def narrow_encoder(checkpoint: dict[str, Tensor]) -> nn.Sequential:
    """The narrow encoder that was written zero-padded into the checkpoint."""
    encoder = tiny_model.narrow_encoder()
    prefix = "first_stage_model.taesd_encoder."
    state = {}
    for name, weight in encoder.state_dict().items():
        wide = checkpoint[prefix + name].float()
        state[name] = wide[tuple(slice(0, size) for size in weight.shape)]
    encoder.load_state_dict(state)
    return encoder.eval()


@torch.inference_mode()
def make_shard(work: Path, index: int, encoder: nn.Sequential) -> None:
    """Latents float16 [N, 4, 32, 32] and [N, 4, 16, 16] of natural scenes, and their captions."""
    target = work / f"shard_{index:03d}.npz"
    if target.exists():
        return
    start, captions = time.time(), []
    latents: dict[int, list[np.ndarray]] = {side: [] for side in SIDES}
    pending: list[np.ndarray] = []
    for number in range(index * SHARD, (index + 1) * SHARD):
        rng = np.random.default_rng([number, 7])
        domain, seed = scenes.DOMAINS[number % 3], FIRST_SEED + number // 3
        scene = scenes.render(domain, seed, variation(rng), natural=True)
        captions.append(scene.caption)
        pending.append(scene.image)
        if len(pending) == 20:
            pixels = torch.from_numpy(np.stack(pending)).permute(0, 3, 1, 2).float().div(255)
            pending = []
            for side in SIDES:
                small = pixels if side == 32 else nn.functional.avg_pool2d(pixels, 2)
                latents[side].append(encoder(small.contiguous(memory_format=torch.channels_last)).half().numpy())
    scratch = target.with_suffix(".tmp.npz")
    arrays = {f"side_{side}": np.concatenate(latents[side]) for side in SIDES}
    np.savez(scratch, captions=np.array(json.dumps(captions)), **arrays)  # type: ignore[arg-type]
    os.replace(scratch, target)
    log(work, f"shard {index}: {time.time() - start:.0f} s")


class Shards:
    """All shards that are there; new ones are picked up."""

    def __init__(self, work: Path, side: int) -> None:
        self.work, self.side = work, side
        self.latents: list[np.ndarray] = []
        self.captions: list[str] = []
        self._read: set[str] = set()
        self.refresh()

    def refresh(self) -> None:
        for path in sorted(self.work.glob("shard_[0-9][0-9][0-9].npz")):
            if path.name not in self._read:
                with np.load(path) as data:
                    self.latents.append(data[f"side_{self.side}"])
                    self.captions += json.loads(str(data["captions"]))
                self._read.add(path.name)

    def draw(self, rng: np.random.Generator, batch: int) -> tuple[Tensor, list[str]]:
        picks = rng.integers(len(self.captions), size=batch)
        clean = np.stack([self.latents[i // SHARD][i % SHARD] for i in picks]).astype(np.float32)
        return torch.from_numpy(clean), [self.captions[i] for i in picks]


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


class Sink:
    """Cross-attention computed openly, with the mean share of attention that does not go to the start token."""

    def __init__(self) -> None:
        self.shares: list[Tensor] = []

    def options(self) -> dict[str, Any]:
        from comfy.ldm.modules.attention import attention_pytorch

        places = [("input", n) for n in (1, 2, 4, 5, 7, 8)] + [("middle", 0)] + [("output", n) for n in range(3, 12)]
        self.shares = []
        return {
            "optimized_attention_override": lambda _f, *args, **kwargs: attention_pytorch(*args, **kwargs),
            "patches_replace": {"attn2": {place: self._attend for place in places}},
        }

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, extra: dict[str, Any]) -> Tensor:
        heads = extra["n_heads"]
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
        shares = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)
        self.shares.append(1 - shares[..., 0].mean())
        return (shares @ v).transpose(1, 2).flatten(2)


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
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98))
    abar = alphas_cumprod()
    state: dict[str, Any] = {"step": 0, "elapsed": [0.0] * len(SIDES), "phase": 0}
    saved_at = work / "train_on.pt"
    if saved_at.exists():
        saved = torch.load(saved_at, weights_only=True)
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
        log(work, f"continuing at step {state['step']}")

    def save() -> None:
        states = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(states | {"state": state, "vocabulary": vocabulary}, saved_at.with_suffix(".tmp"))
        saved_at.with_suffix(".tmp").replace(saved_at)

    rng = np.random.default_rng(state["step"])
    torch.manual_seed(state["step"])
    sink = Sink()
    for phase in range(state["phase"], len(SIDES)):
        shards, limit, batch, peak = (
            Shards(work, SIDES[phase]),
            60 * minutes[phase],
            batches[phase],
            (6e-4, 5e-4)[phase],
        )
        mean_loss = mean_share = None
        last_save = last_log = time.time()
        seen = 0
        while state["elapsed"][phase] < limit:
            began, progress = time.process_time(), state["elapsed"][phase] / limit
            warm = min(1.0, (state["step"] + 1) / 100)
            shape = 1 - 0.3 * progress if phase == 0 else 0.5 * (1 + math.cos(math.pi * progress)) + 0.01
            for group in optimizer.param_groups:
                group["lr"] = peak * warm * shape
            clean, captions = shards.draw(rng, batch)
            captions = ["" if rng.random() < DROPPED else caption for caption in captions]
            tokens = ids_of(captions)
            if rng.random() < WITHOUT_PADDING:
                longest = int((tokens != end).sum(1).max()) + 1
                tokens = tokens[:, :longest]
            t = ((torch.arange(batch) + torch.rand(batch)) / batch * 1000).long().clamp(max=999)
            noise = torch.randn_like(clean)
            a, s = abar[t].sqrt()[:, None, None, None], (1 - abar[t]).sqrt()[:, None, None, None]
            context = encode_text(model, tokens)
            noisy = a * clean + s * noise
            predicted = model.unet(noisy, t, context=context, transformer_options=sink.options())
            loss = (predicted - (a * noise - s * clean)).square().mean()
            share = torch.stack(sink.shares).mean()
            optimizer.zero_grad(set_to_none=True)
            charge = SINK_WEIGHT if mean_share is None or mean_share < SINK_SHARE else 0.0
            (loss + charge * share).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate = min(0.999, (1 + state["step"]) / (10 + state["step"]))
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - rate)
            state["step"] += 1
            state["elapsed"][phase] += time.process_time() - began
            seen += batch
            mean_loss = _running(mean_loss, float(loss))
            mean_share = _running(mean_share, 1 - float(share))
            if time.time() - last_log > 60:
                speed = seen / (time.time() - last_log)
                log(
                    work,
                    f"{SIDES[phase]}x{SIDES[phase]} step {state['step']} loss {mean_loss:.4f} start token "
                    f"{mean_share:.3f} {state['elapsed'][phase] / 60:.1f} min {speed:.1f} images/s",
                )
                last_log, seen = time.time(), 0
            if time.time() - last_save > 300:
                save()
                shards.refresh()
                last_save = time.time()
        state["phase"] = phase + 1
        save()


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["data", "train", "export"])
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
        encoder = narrow_encoder(load_source(options.source))
        for index in range(*options.shards):
            make_shard(options.work, index, encoder)
    elif options.stage == "train":
        train(options.work, options.comfyui, options.source, tuple(options.minutes), tuple(options.batches))
    else:
        export(options.work, options.comfyui, options.source, options.output, options.warm)


if __name__ == "__main__":
    main()
