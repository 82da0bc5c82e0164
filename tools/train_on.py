"""Train the tiny model on, from a checkpoint, until its attention behaves as Stable Diffusion's does.

    python -m tools.train_on train --work FOLDER --minutes 7 --batch 256 --workers 12     (a large GPU)
    python -m tools.train_on train --work FOLDER --minutes 300                            (two CPU cores)
    python -m tools.train_on export --work FOLDER
    python -m tools.train_on samples --source CHECKPOINT --output samples.jpg

Scenes of the natural world are rendered while it trains; training continues from its last checkpoint. Losses join the
usual one:

- attention of the cross-attention layers is charged for padding, and at first for words, so that a place asks for words
  only where they pay: the start token becomes the sink that stands for the background;
- every scene comes as a pair, the second a crop of the same shapes in other colours, place and light, and the decoder's
  queries at the same spot of both are to be alike and to fall into the same cluster, for which a row of text stands
  (:class:`tools.places.Places`). What a place is, whatever its colour, and words for it, Stable Diffusion learns from
  its billions of images and captions; minutes on rendered scenes do not. No masks are used.

Some contexts hold such rows in place of a caption, so that the UNet bears rows that no caption has.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
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
from tools.places import FED, Places, Watch
from tools.train_tiny import (
    TextToImage,
    alphas_cumprod,
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
FED_SHARE = 0.25  # of the images whose caption gives way to rows of clusters
WEIGHTS = (0.02, 0.05, 0.1)  # of the clusters, of their rows, and of how unlike the queries of one place are
CLUSTER_NOISE = 600  # timesteps above are too noisy to tell what is where
FASTER = 10  # places learn
SINK_WEIGHT = 0.004  # .02 at first; kept up, it silences the words
SINK_SHARE = 0.78  # of the start token, all contexts, from which on words are not charged; .6 left own captions .26
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

    A thread fills it from :meth:`begin` on. Latents float16 [size, 4, 32, 32], tokens [size, 77], boxes [size / 2, 4],
    on the device.
    """

    def __init__(self, source: Scenes, workers: int, encoder: nn.Sequential, size: int, device: torch.device) -> None:
        self._batches = iter(DataLoader(source, batch_size=None, num_workers=workers))
        side = scenes.SIZE // tiny_model.DOWNSCALE
        size -= size % CHUNK
        self.latents = torch.zeros(size, 4, side, side, dtype=torch.float16, device=device)
        self.tokens = torch.zeros(size, 77, dtype=torch.long, device=device)
        self.boxes = torch.zeros(size // 2, 4, device=device)
        self.size, self.made = size, 0
        self._encoder = encoder.to(device)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._fill, daemon=True)

    def begin(self) -> None:
        self._thread.start()

    @torch.inference_mode()
    def _fill(self) -> None:
        device = self.latents.device
        # Copies on the training's own stream would wait for the steps that are queued there.
        stream = torch.cuda.Stream() if device.type == "cuda" else None
        for pixels, tokens, boxes in self._batches:
            if self._done.is_set():
                return
            start = self.made % self.size
            place = slice(start, start + len(pixels))
            with torch.cuda.stream(stream):
                image = pixels.to(device).permute(0, 3, 1, 2).float().div(255)
                self.latents[place] = self._encoder(image).half()
                self.tokens[place] = tokens.to(device)
                self.boxes[start // 2 : start // 2 + len(boxes)] = boxes.to(device)
            if stream is not None:
                stream.synchronize()
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


class Step:
    """One step of training, and what changes by it. Its inputs stay where they are, so that CUDA can replay it.

    Attributes:
        means: running means of the loss, start token's share, share of what ends and pads, clusters, rows, unlikeness.
    """

    def __init__(self, model: TextToImage, batch: int, weights: tuple[float, float, float]) -> None:
        device = model.tokens.weight.device
        side = scenes.SIZE // tiny_model.DOWNSCALE
        self.model, self.batch, self.weights = model, batch, weights
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        self.places = Places(model).to(device)
        self.rate, self.fast = torch.zeros((2,), device=device).unbind()  # of learning; the second of the places' rows
        self.latents = torch.zeros(batch, 4, side, side, device=device)
        self.tokens = torch.zeros(batch, 77, dtype=torch.long, device=device)
        self.boxes = torch.full((batch // 2, 4), 0.5, device=device)
        self.means = torch.full((6,), torch.inf, device=device)
        self._watch, self._abar = Watch(), alphas_cumprod().to(device)
        position = {token: place for place, token in enumerate(model.vocabulary)}
        self._end, self._empty = position[49407], torch.full((77,), position[49407], device=device)
        self._empty[0] = position[49406]
        self._level = torch.arange(batch, device=device) // 2  # the images of a pair are about as noisy
        self._clear = math.ceil(batch // 2 * CLUSTER_NOISE / 1000)  # of the pairs, the first, are less noisy
        decay = [p for p in model.parameters() if p.ndim > 1]
        rest = [p for p in model.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
        groups.append({"params": list(self.places.parameters()), "weight_decay": 0.0, "lr": self.fast})
        cuda = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, self.rate, betas=(0.9, 0.98), fused=True, capturable=cuda)

    @torch.no_grad()
    def seed(self, draw: Callable[[int], tuple[Tensor, Tensor, Tensor]], batches: int = 8) -> None:
        """Let the clusters begin where the queries are."""
        looks, watch = [], Watch()
        for _ in range(batches):
            latents = draw(self.batch // 2)[0]
            steps = torch.full((self.batch,), 100, device=latents.device)
            noisy = noised(latents, steps, self._abar)[0]
            self.model.denoise(
                noisy, steps, self.model.encode_text(self._empty.expand(self.batch, -1)), watch.options()
            )
            looks.append(watch.queries)
        self.places.seed(looks)

    def set_rate(self, rate: float) -> None:
        self.rate.fill_(rate)
        self.fast.fill_(FASTER * rate)

    def _chance(self, share: float) -> Tensor:
        return torch.rand(self.batch, 1, device=self.rate.device) < share

    def __call__(self) -> None:
        fed = self._chance(FED_SHARE)
        tokens = torch.where(self._chance(DROPPED) | fed, self._empty, self.tokens)
        steps = (self._level + torch.rand(self.batch, device=self.rate.device)) / (self.batch // 2) * 1000
        noisy, velocity = noised(self.latents, steps.long().clamp(max=999), self._abar)
        row = torch.arange(77, device=self.rate.device)
        ends = (tokens == self._end) & (~fed | (row > FED))
        kind = self.rate.device.type  # bfloat16 is slower than float32 on many CPUs
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda", cache_enabled=False):
            context = self.model.encode_text(tokens)
            context = torch.where(fed[..., None], self.places.feed(context), context)
            self._watch.ends, self._watch.fed = ends, fed[:, 0]
            self._watch.hidden = self._chance(WITHOUT_PADDING) & ends & (ends.cumsum(1) > 1)
            predicted = self.model.denoise(noisy, steps.long().clamp(max=999), context, self._watch.options())
        loss = (predicted.float() - velocity).square().mean()
        elsewhere, ended = torch.stack(self._watch.shares).mean(0)
        queries = {name: query[: 2 * self._clear] for name, query in self._watch.queries.items()}
        told, asked, unlike = self.places(queries, self.boxes[: self._clear], context[0, 0].float())
        now = torch.stack([loss, 1 - elsewhere, ended, told, asked, unlike]).detach()
        self.means.copy_(torch.where(self.means.isinf(), now, self.means.lerp(now, 0.01)))
        charge = SINK_WEIGHT * (self.means[1] < SINK_SHARE) * elsewhere + PADDING_WEIGHT * ended
        clusters, rows, alike = self.weights
        self.optimizer.zero_grad(set_to_none=True)
        (loss + charge + clusters * told + rows * asked + alike * unlike).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def captured(self) -> Callable[[], None]:
        """The step as one CUDA graph: the GPU no longer waits for Python, which is most of a small model's time."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self()
        torch.cuda.current_stream().wait_stream(stream)
        self._watch.options()  # drops what holds the last step's graph
        self.means.fill_(torch.inf)
        for kept in self.optimizer.state.values():
            for value in kept.values():
                value.zero_()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self()
        return graph.replay

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "places": self.places.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, saved: dict[str, Any]) -> None:
        for part in (self.model, self.ema, self.places, self.optimizer):
            name = next(key for key, value in vars(self).items() if value is part)
            part.load_state_dict(saved[name])
        for group, rate in zip(self.optimizer.param_groups, (self.rate, self.rate, self.fast), strict=True):
            group["lr"] = rate


def train(work: Path, comfyui: str, source: Path, options: argparse.Namespace) -> None:
    import_comfyui(comfyui)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # whose gradients are no numbers (H100, cuDNN 9.19)
    checkpoint = load_weights(source)
    model, vocabulary = start_model(checkpoint, comfyui)
    saved_at, state = work / "train_on.pt", {"step": 0, "elapsed": 0.0, "images": 0}
    saved = torch.load(saved_at, weights_only=True, map_location="cpu") if saved_at.exists() else None
    if saved:
        state = saved["state"]
    rendered = Scenes(comfyui, vocabulary, int(state["images"]))
    pool = Pool(rendered, options.workers, narrow(checkpoint, "encoder"), options.pool, device)
    del checkpoint
    step = Step(model.to(device), options.batch, options.weights)
    if saved:
        step.load(saved)
        log(work, f"continuing at step {state['step']}")
    take = step.captured() if device.type == "cuda" and not options.eager else step
    pool.begin()  # not before: nothing else may use the device while a graph is captured

    def save() -> None:
        state["images"] = pool.made + rendered.first
        torch.save(step.state() | {"state": state, "vocabulary": vocabulary}, saved_at.with_suffix(".tmp"))
        saved_at.with_suffix(".tmp").replace(saved_at)

    torch.manual_seed(int(state["step"]))
    limit = 60 * options.minutes
    pool.wait(min(pool.size, FEWEST))
    if not saved:
        step.seed(pool.draw)
    last_save = last_log = time.time()
    seen = 0
    while state["elapsed"] < limit:
        began, progress = time.time(), state["elapsed"] / limit
        warm = min(1.0, (state["step"] + 1) / 100)
        step.set_rate(options.rate * warm * (0.5 * (1 + math.cos(math.pi * progress)) + 0.01))
        for place, drawn in zip((step.latents, step.tokens, step.boxes), pool.draw(options.batch // 2), strict=True):
            place.copy_(drawn)
        take()
        follow(step.ema, step.model, int(state["step"]))
        state["step"] += 1
        seen += options.batch
        if state["step"] % 10 == 0 and device.type == "cuda":
            torch.cuda.synchronize()
        if state["step"] % 50 == 0 and not step.means.isfinite().all():
            raise FloatingPointError(f"not finite at step {state['step']}: {step.means.tolist()}")
        state["elapsed"] += min(time.time() - began, 20.0)  # a suspended process does not train
        if time.time() - last_log > 30:
            what = "loss {:.4f} start token {:.3f} padding {:.3f} clusters {:.3f} rows {:.3f} unlike {:.4f}"
            speed = seen / (time.time() - last_log)
            minutes = f"{state['elapsed'] / 60:.1f} min {speed:.1f} images/s, {pool.made} rendered"
            log(work, f"step {state['step']} {what.format(*step.means.tolist())} {minutes}")
            last_log, seen = time.time(), 0
        if time.time() - last_save > 300:
            save()
            last_save = time.time()
    pool.close()
    save()


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
    parser.add_argument("--eager", action="store_true", help="on CUDA, without a graph")
    parser.add_argument("--workers", type=int, default=1, help="processes that render")
    parser.add_argument("--pool", type=int, default=120_000, help="images that are kept for training")
    parser.add_argument("--weights", type=float, nargs=3, default=WEIGHTS, metavar=("CLUSTERS", "ROWS", "ALIKE"))
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
