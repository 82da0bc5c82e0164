"""Train a tiny flow transformer of SD3's shape on the demo model's scenes and captions, by rectified flow.

    python -m tools.train_flow train --work FOLDER --minutes 30
    python -m tools.train_flow export --work FOLDER
    python -m tools.train_flow samples --output samples.jpg

It looks through the demo model's autoencoder and reads its text encoder, both as they are; the file holds the
transformer alone, for the node Load Diffusion Model. Training continues from its last checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from demo.pack.shapes import CONTEXT_DIM, FLOW_CONFIG
from testing import scenes
from testing.server import FLOW, MODEL
from testing.tiny import model as tiny_model
from testing.tiny.weights import load_weights
from tools.train_on import narrow, start_model
from tools.train_tiny import attention, follow, import_comfyui, initialise, log, tokenize

WORDS = 32  # rows of text in training: captions are short
DROPPED = 0.2  # of the captions
RATE = 1e-3


def make_transformer() -> nn.Module:
    """ComfyUI's own class, with its fixed positions filled in."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules import mmdit

    text = {"in_features": CONTEXT_DIM, "out_features": 64 * FLOW_CONFIG["depth"]}
    context = {"target": "torch.nn.Linear", "params": text}
    made = mmdit.OpenAISignatureMMDITWrapper(
        **FLOW_CONFIG,
        context_embedder_config=context,
        device="cpu",
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )
    initialise(made)
    for name, parameter in made.named_parameters():
        if "adaLN_modulation" in name or "final_layer.linear" in name:
            nn.init.zeros_(parameter)
        elif "ln_q" in name or "ln_k" in name:
            nn.init.ones_(parameter)
    side = FLOW_CONFIG["pos_embed_max_size"]
    made.pos_embed.copy_(positions(64 * FLOW_CONFIG["depth"], side)[None])
    return made


def positions(width: int, side: int) -> Tensor:
    """Sines and cosines of the places of a square of cells, [side * side, width]."""
    frequencies = 1 / 10000 ** (torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies
    one = torch.cat([angles.sin(), angles.cos()], 1)  # [side, width / 2]
    rows, columns = one[:, None].expand(-1, side, -1), one[None].expand(side, -1, -1)
    return torch.cat([columns, rows], 2).flatten(0, 1)


def attend(_function: Any, query: Tensor, key: Tensor, value: Tensor, heads: int, **_: Any) -> Tensor:
    """An attention that autograd knows; SD3 hands over values by head."""
    return attention(query, key, value.flatten(2), heads)


def velocity(model: nn.Module, noisy: Tensor, sigmas: Tensor, context: Tensor) -> Tensor:
    """noise - image, predicted from their mixture [B, C, h, w] at sigmas [B]."""
    predicted: Tensor = model(
        noisy, 1000 * sigmas, context=context, transformer_options={"optimized_attention_override": attend}
    )
    return predicted


def make_data(work: Path, comfyui: str, count: int) -> None:
    """Latents float16 [N, 4, 32, 32] and the text encoder's rows float16 [N + 1, WORDS, D], the last of no text."""
    if (work / "data.safetensors").exists():
        return
    checkpoint = load_weights(MODEL)
    encoder = narrow(checkpoint, "encoder")
    text, vocabulary = start_model(checkpoint, comfyui)
    position = {token: place for place, token in enumerate(vocabulary)}
    latents, captions = [], []
    with torch.inference_mode():
        for number in range(count):
            scene = scenes.render(scenes.DOMAINS[number % 3], number // 3)
            pixels = torch.from_numpy(scene.image).movedim(-1, 0)[None].float() / 255
            latents.append(encoder(pixels).half())
            captions.append(scene.caption)
            if number % 1000 == 999:
                log(work, f"data: {number + 1} scenes")
        ids = [[position[int(token)] for token in row[:WORDS]] for row in tokenize(comfyui, [*captions, ""])]
        rows = torch.cat([text.encode_text(part).half() for part in torch.tensor(ids).split(256)])
    kept = {"latents": torch.cat(latents).contiguous(), "rows": rows.contiguous()}
    save_file(kept, str(work / "data.safetensors"))


def train(work: Path, comfyui: str, minutes: float, count: int, batch: int) -> None:
    import_comfyui(comfyui)
    make_data(work, comfyui, count)
    data = load_file(str(work / "data.safetensors"))
    torch.manual_seed(1)
    model = make_transformer()
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    state = {"step": 0, "elapsed": 0.0}
    parts: dict[str, Any] = {"model": model, "ema": ema, "optimizer": optimizer}
    saved_at = work / "flow.pt"
    if saved_at.exists():
        saved = torch.load(saved_at, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        state = saved["state"]
    log(work, f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, step {state['step']}")

    def save() -> None:
        torch.save({name: part.state_dict() for name, part in parts.items()} | {"state": state}, saved_at)

    torch.manual_seed(int(state["step"]))
    limit, mean, shown = 60 * minutes, math.nan, time.time()
    while state["elapsed"] < limit:
        began, progress = time.time(), state["elapsed"] / limit
        warm = min(1.0, (state["step"] + 1) / 200)
        for group in optimizer.param_groups:
            group["lr"] = RATE * warm * (0.5 * (1 + math.cos(math.pi * progress)) + 0.01)
        picks = torch.randint(len(data["latents"]), (batch,))
        clean = data["latents"][picks].float()
        picks[torch.rand(batch) < DROPPED] = len(data["rows"]) - 1
        sigmas = (torch.arange(batch) + torch.rand(batch)) / batch
        noise, mix = torch.randn_like(clean), sigmas[:, None, None, None]
        predicted = velocity(model, (1 - mix) * clean + mix * noise, sigmas, data["rows"][picks].float())
        loss = (predicted - (noise - clean)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        follow(ema, model, int(state["step"]))
        state["step"] += 1
        state["elapsed"] += min(time.time() - began, 20.0)  # a suspended process does not train
        now = float(loss.detach())
        mean = now if math.isnan(mean) else 0.98 * mean + 0.02 * now
        if time.time() - shown > 60:
            log(work, f"step {state['step']} loss {mean:.4f} {state['elapsed'] / 60:.1f} min")
            shown = time.time()
            save()
    save()


def export(work: Path, comfyui: str, target: Path) -> None:
    """The running mean of the weights, half precision, under the names that ComfyUI's loader knows."""
    import_comfyui(comfyui)
    saved = torch.load(work / "flow.pt", weights_only=True)
    model = make_transformer()
    model.load_state_dict(saved["ema"])
    state = {name: weight.half().contiguous() for name, weight in model.state_dict().items()}
    metadata = {"modelspec.title": "SLiMe tiny flow model", "steps": str(saved["state"]["step"])}
    save_file(state, str(target), metadata=metadata)
    log(work, f"export: {target.name} {target.stat().st_size / 1e6:.1f} MB after {saved['state']['step']} steps")


@torch.inference_mode()
def samples(comfyui: str, source: Path, target: Path, steps: int = 30, guidance: float = 3.0) -> None:
    """What a file paints for captions of scenes it has not seen, four of every domain, by Euler's method."""
    import_comfyui(comfyui)
    checkpoint = load_weights(MODEL)
    text, vocabulary = start_model(checkpoint, comfyui)
    position = {token: place for place, token in enumerate(vocabulary)}
    captions = [scenes.render(d, 900_000 + i).caption for d in scenes.DOMAINS for i in range(4)]
    ids = tokenize(comfyui, [*captions, *[""] * len(captions)])[:, :WORDS]
    rows = text.encode_text(torch.tensor([[position[int(token)] for token in row] for row in ids]))
    model = make_transformer()
    model.load_state_dict({name: weight.float() for name, weight in load_file(str(source)).items()})
    side = scenes.SIZE // tiny_model.DOWNSCALE
    x = torch.randn(len(captions), 4, side, side, generator=torch.Generator().manual_seed(0))
    for step in range(steps):
        sigma = 1 - step / steps
        told, untold = velocity(model, x.repeat(2, 1, 1, 1), torch.full((len(rows),), sigma), rows).chunk(2)
        x = x - (untold + guidance * (told - untold)) / steps
    pixels = narrow(checkpoint, "decoder")(x).clamp(0, 1)
    tiles = (pixels.movedim(1, -1) * 255).byte().numpy().reshape(3, 4, scenes.SIZE, scenes.SIZE, 3)
    Image.fromarray(np.concatenate([np.concatenate(list(row), 1) for row in tiles])).save(target, quality=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["train", "export", "samples"])
    parser.add_argument("--comfyui", default=os.environ.get("COMFYUI_DIR"))
    parser.add_argument("--work", type=Path, default=Path("demo_training/flow"))
    parser.add_argument("--source", type=Path, default=FLOW)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--minutes", type=float, default=30, help="of training in all")
    parser.add_argument("--scenes", type=int, default=9000)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    if options.stage == "samples":
        samples(options.comfyui, options.source, options.output or Path("samples.jpg"))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    if options.stage == "train":
        train(options.work, options.comfyui, options.minutes, options.scenes, options.batch)
    else:
        export(options.work, options.comfyui, options.output or FLOW)


if __name__ == "__main__":
    main()
