"""Train the embedded tiny text-to-image model from nothing: data, autoencoder, latents, UNet, export.

    python demo/train_tiny.py all --comfyui PATH_TO_COMFYUI --work demo_training

Every stage is resumable: finished ones are skipped, ``unet`` continues from its last checkpoint. The UNet's schedule is
measured in minutes of training (not steps), so it suits any machine: 16x16 latents first, then 32x32. The result is one
checkpoint that ComfyUI's stock "Load Checkpoint" reads once the demo pack is loaded.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from testing import scenes  # noqa: E402
from testing.tiny import model as tiny_model  # noqa: E402

# Scene seeds. Tests and benchmarks use seeds from scenes' other ranges (see testing/splits.py), never these.
FIRST_TRAINING_SEED = 0
SIZES = (scenes.SIZE // 2, scenes.SIZE)


def log(work: Path, message: str) -> None:
    line = f"{time.strftime('%H:%M:%S')} {message}"
    with open(work / "log.txt", "a", encoding="utf-8") as file:
        file.write(line + "\n")
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


# ---------------------------------------------------------------------------------------------------------------- data


def _render_chunk(job: tuple[str, int, int, int]) -> list[str]:
    path, start, stop, total = job
    size = scenes.SIZE
    images = np.memmap(path, dtype=np.uint8, mode="r+", shape=(total, size, size, 3))
    captions = []
    for i in range(start, stop):
        scene = scenes.render(scenes.DOMAINS[i % 3], FIRST_TRAINING_SEED + i // 3)
        images[i] = scene.image
        captions.append(scene.caption)
    images.flush()
    return captions


def make_data(work: Path, count: int, workers: int) -> None:
    if (work / "captions.json").exists():
        return
    path = work / "images.u8"
    size = scenes.SIZE
    np.memmap(path, dtype=np.uint8, mode="w+", shape=(count, size, size, 3)).flush()
    jobs = [(str(path), i, min(i + 300, count), count) for i in range(0, count, 300)]
    captions: list[str] = []
    start = time.time()
    with ProcessPoolExecutor(workers) as pool:
        for chunk in pool.map(_render_chunk, jobs):
            captions += chunk
    (work / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    log(work, f"data: {count} scenes in {time.time() - start:.0f} s")


def open_images(work: Path) -> np.memmap:
    size = scenes.SIZE
    count = len(json.loads((work / "captions.json").read_text(encoding="utf-8")))
    return np.memmap(work / "images.u8", dtype=np.uint8, mode="r", shape=(count, size, size, 3))


# --------------------------------------------------------------------------------------------------------- autoencoder


def train_autoencoder(work: Path, minutes: float, device: torch.device, batch: int = 16, crop: int = 128) -> None:
    """L1 reconstruction of random crops, latents kept near zero mean, unit variance and uncorrelated."""
    if (work / "autoencoder.pt").exists():
        return
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    images = open_images(work)
    encoder, decoder = tiny_model.narrow_encoder(), tiny_model.narrow_decoder()
    model = nn.ModuleList([encoder, decoder]).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    eye = torch.eye(tiny_model.LATENT_CHANNELS, device=device)
    start, step, running = time.time(), 0, 0.0
    while True:
        progress = (time.time() - start) / (60 * minutes)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 100) * (0.5 * (1 + math.cos(math.pi * progress)) + 0.01)
        picks = rng.integers(len(images), size=batch)
        y, x = rng.integers(scenes.SIZE - crop + 1, size=2)
        pixels = np.stack([images[i, y : y + crop, x : x + crop] for i in picks])
        target = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float().div(255)
        with torch.autocast(device.type, torch.bfloat16):
            latents = encoder(target).float()
            noisy = latents + 0.05 * torch.randn_like(latents)
            output = decoder(noisy).float()
        flat = latents.permute(1, 0, 2, 3).reshape(tiny_model.LATENT_CHANNELS, -1)
        mean = flat.mean(1)
        covariance = (flat - mean[:, None]) @ (flat - mean[:, None]).T / flat.shape[1]
        error = output - target
        edges = (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2
        loss = error.abs().mean() + edges + 0.02 * (mean.square().mean() + (covariance - eye).square().mean())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        squared = float(error.detach().square().mean())
        running = 0.98 * running + 0.02 * squared if step > 1 else squared
        if step % 200 == 0:
            log(work, f"autoencoder: step {step} PSNR {-10 * math.log10(running):.2f} dB {time.time() - start:.0f} s")
    torch.save({"encoder": encoder.state_dict(), "decoder": decoder.state_dict()}, work / "autoencoder.pt")
    log(work, f"autoencoder: done, {step} steps, PSNR {-10 * math.log10(running):.2f} dB")


def load_autoencoder(work: Path) -> tuple[nn.Sequential, nn.Sequential]:
    state = torch.load(work / "autoencoder.pt", weights_only=True)
    encoder, decoder = tiny_model.narrow_encoder(), tiny_model.narrow_decoder()
    encoder.load_state_dict(state["encoder"])
    decoder.load_state_dict(state["decoder"])
    return encoder.eval(), decoder.eval()


@torch.inference_mode()
def encode_latents(work: Path, device: torch.device, batch: int = 32) -> None:
    """Latents of every image at both sizes, as it is and mirrored: float16 [2, N, 4, s/8, s/8]."""
    images = open_images(work)
    encoder = load_autoencoder(work)[0].to(device, memory_format=torch.channels_last)
    for size in SIZES:
        path = work / f"latents_{size // 8}.npy"
        if path.exists():
            continue
        start = time.time()
        side = size // tiny_model.DOWNSCALE
        result = np.zeros((2, len(images), tiny_model.LATENT_CHANNELS, side, side), np.float16)
        for i in range(0, len(images), batch):
            pixels = (
                torch.from_numpy(np.ascontiguousarray(images[i : i + batch]))
                .to(device)
                .permute(0, 3, 1, 2)
                .float()
                .div(255)
            )
            if size != scenes.SIZE:
                pixels = nn.functional.avg_pool2d(pixels, scenes.SIZE // size)
            for mirrored in (0, 1):
                with torch.autocast(device.type, torch.bfloat16):
                    latents = encoder(
                        (pixels.flip(-1) if mirrored else pixels).contiguous(memory_format=torch.channels_last)
                    )
                result[mirrored, i : i + batch] = latents.float().cpu().numpy()
        np.save(path, result)
        log(
            work,
            f"latents {side}: std {result.std(dtype=np.float64):.3f} {time.time() - start:.0f} s",
        )


# ---------------------------------------------------------------------------------------------------------------- UNet


def import_comfyui(path: str) -> None:
    sys.path.insert(0, path)
    import comfy.options  # noqa: F401
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()


def initialise(model: nn.Module) -> None:
    """PyTorch's default initialisation, which ComfyUI's layers leave out; zero layers as in latent diffusion."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.Linear.reset_parameters(module)
        elif isinstance(module, nn.Conv2d):
            nn.Conv2d.reset_parameters(module)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm) and module.weight is not None:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if "out_layers.3." in name or "proj_out." in name or name.startswith("out.2."):
            nn.init.zeros_(parameter)


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, causal: bool = False) -> Tensor:
    """[B, L, heads * D] of each. Not ComfyUI's, whose kernels and mask on CUDA gave gradients that are no numbers."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


class TextToImage(nn.Module):
    """ComfyUI's own UNet and CLIP classes, with the token table cut to the words that captions use."""

    def __init__(self, vocabulary: list[int]) -> None:
        super().__init__()
        import comfy.ops
        from comfy.clip_model import CLIPTextModel
        from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

        operations = comfy.ops.disable_weight_init
        self.unet = UNetModel(**tiny_model.UNET_CONFIG, device="cpu", dtype=torch.float32, operations=operations)
        self.text = CLIPTextModel(tiny_model.CLIP_CONFIG, torch.float32, "cpu", operations)
        initialise(self)
        self.text.text_model.embeddings.token_embedding = nn.Identity()
        self.tokens = nn.Embedding(len(vocabulary), tiny_model.CONTEXT_DIM)
        nn.init.normal_(self.tokens.weight, std=0.2)
        nn.init.normal_(self.text.text_model.embeddings.position_embedding.weight, std=0.1)
        self.vocabulary = vocabulary

    def encode_text(self, tokens: Tensor) -> Tensor:
        """CLIP's text model, [B, L] -> [B, L, D]; ComfyUI's own forward adds in place, which autograd refuses."""
        text = self.text.text_model
        x = self.tokens(tokens) + text.embeddings.position_embedding.weight[: tokens.shape[1]]
        for layer in text.encoder.layers:
            x = x + layer.self_attn(layer.layer_norm1(x), None, lambda *args: attention(*args[:4], causal=True))
            x = x + layer.mlp(layer.layer_norm2(x))
        return text.final_layer_norm(x)

    def forward(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """noisy [B, 4, h, w], timesteps [B], tokens [B, L] as positions in the vocabulary -> v [B, 4, h, w]."""
        return self.denoise(noisy, timesteps, self.encode_text(tokens))

    def denoise(
        self, noisy: Tensor, timesteps: Tensor, context: Tensor, options: dict[str, Any] | None = None
    ) -> Tensor:
        """The same from encoded text [B, L, D]; ``options`` are further transformer options of ComfyUI's."""
        override = {"optimized_attention_override": lambda _f, *args, **_: attention(*args[:4])}
        return self.unet(noisy, timesteps, context=context, transformer_options=override | (options or {}))


def tokenize(comfyui: str, captions: list[str]) -> np.ndarray:
    """CLIP token ids [N, 77], padded with the end token as Stable Diffusion 1.x does."""
    return np.array(_tokenizer(comfyui)(captions, padding="max_length", max_length=77, truncation=True)["input_ids"])


@functools.cache
def _tokenizer(comfyui: str) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(Path(comfyui) / "comfy" / "sd1_tokenizer"))


def alphas_cumprod() -> Tensor:
    """Stable Diffusion's "scaled linear" schedule, [1000]."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def noised(clean: Tensor, timesteps: Tensor, abar: Tensor) -> tuple[Tensor, Tensor]:
    """Latents with fresh noise, and the velocity that is to be predicted from them."""
    noise = torch.randn_like(clean)
    a, s = abar[timesteps].sqrt()[:, None, None, None], (1 - abar[timesteps]).sqrt()[:, None, None, None]
    return a * clean + s * noise, a * noise - s * clean


@torch.no_grad()
def follow(ema: nn.Module, model: nn.Module, step: int) -> None:
    """Move the running mean of the weights."""
    rate = min(0.999, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - rate)


def train_unet(
    work: Path, comfyui: str, minutes: tuple[float, float], device: torch.device, batches: tuple[int, int]
) -> None:
    """v-prediction, uniform timesteps, 10 % of captions dropped, AdamW with cosine decay, EMA."""
    import_comfyui(comfyui)
    captions = json.loads((work / "captions.json").read_text(encoding="utf-8"))
    ids = tokenize(comfyui, [*captions, ""])
    vocabulary, compact = np.unique(ids, return_inverse=True)
    tokens = torch.from_numpy(compact.reshape(ids.shape))
    empty = tokens[-1]
    torch.manual_seed(1)
    model = TextToImage(vocabulary.tolist()).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), fused=True)
    abar = alphas_cumprod().to(device)
    state = {"step": 0, "elapsed": [0.0, 0.0], "phase": 0}
    checkpoint = work / "unet.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location="cpu")
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
        log(work, f"unet: continuing at step {state['step']}")
    else:
        log(work, f"unet: {sum(p.numel() for p in model.unet.parameters()) / 1e6:.2f} M parameters")

    def save() -> None:
        saved = {
            "model": model.state_dict(),
            "ema": ema.state_dict(),
            "optimizer": optimizer.state_dict(),
            "state": state,
        }
        torch.save(saved | {"vocabulary": vocabulary.tolist()}, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)

    rng = np.random.default_rng(state["step"])
    for phase in range(state["phase"], 2):
        side = SIZES[phase] // tiny_model.DOWNSCALE
        latents = np.load(work / f"latents_{side}.npy", mmap_mode="r" if phase == 0 else None)
        limit, batch, peak = 60 * minutes[phase], batches[phase], (1.5e-3, 1.0e-3)[phase]
        running, last_save, last_log, seen = None, time.time(), time.time(), 0
        while state["elapsed"][phase] < limit:
            began = time.time()
            progress = state["elapsed"][phase] / limit
            warm = min(1.0, (state["step"] + 1) / 200)
            # The first phase ends at 60 % of its peak, the second decays to zero.
            shape = 1 - 0.4 * progress if phase == 0 else 0.5 * (1 + math.cos(math.pi * progress)) + 0.01
            for group in optimizer.param_groups:
                group["lr"] = peak * warm * shape
            picks = rng.integers(latents.shape[1], size=batch)
            mirrored = rng.integers(2, size=batch)
            clean = torch.from_numpy(latents[mirrored, picks].astype(np.float32)).to(device)
            words = tokens[torch.from_numpy(picks)].clone()
            words[torch.from_numpy(rng.random(batch) < 0.1)] = empty
            # Stratified timesteps: the loss of a small batch is far less noisy.
            spread = (torch.arange(batch) + torch.rand(batch)) / batch
            t = (spread * 1000).long().clamp(max=999).to(device)
            noisy, velocity = noised(clean, t, abar)
            with torch.autocast(device.type, torch.bfloat16):
                predicted = model(noisy, t, words.to(device))
            loss = (predicted.float() - velocity).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            follow(ema, model, state["step"])
            state["step"] += 1
            # A suspended process does not train.
            state["elapsed"][phase] += min(time.time() - began, 5.0)
            seen += batch
            running = float(loss) if running is None else 0.98 * running + 0.02 * float(loss)
            if time.time() - last_log > 60:
                log(
                    work,
                    f"unet: {side}x{side} step {state['step']} loss {running:.4f} "
                    f"{state['elapsed'][phase] / 60:.1f} min {seen / (time.time() - last_log):.1f} images/s",
                )
                last_log, seen = time.time(), 0
            if time.time() - last_save > 240:
                save()
                last_save = time.time()
        state["phase"] = phase + 1
        save()
        log(work, f"unet: phase {side}x{side} done at step {state['step']}")


# -------------------------------------------------------------------------------------------------------------- export


def export(work: Path, comfyui: str, target: Path) -> None:
    """Write one half-precision checkpoint in Stable Diffusion 1.x's key layout with a TAESD autoencoder."""
    from safetensors.torch import save_file

    import_comfyui(comfyui)
    saved = torch.load(work / "unet.pt", weights_only=True, map_location="cpu")
    model = TextToImage(saved["vocabulary"])
    model.load_state_dict(saved["ema"])
    state = {f"model.diffusion_model.{k}": v for k, v in model.unet.state_dict().items()}
    prefix = "cond_stage_model.transformer."
    for k, v in model.text.state_dict().items():
        if not k.startswith("text_projection"):
            state[prefix + k] = v
    table = torch.zeros(49408, tiny_model.CONTEXT_DIM)
    table[saved["vocabulary"]] = model.tokens.weight.detach()
    state[prefix + "text_model.embeddings.token_embedding.weight"] = table
    encoder, decoder = load_autoencoder(work)
    state |= {f"first_stage_model.taesd_encoder.{k}": v for k, v in tiny_model.widen(encoder).items()}
    state |= {f"first_stage_model.taesd_decoder.{k}": v for k, v in tiny_model.widen(decoder).items()}
    state["first_stage_model.vae_scale"] = torch.tensor(tiny_model.LATENT_SCALE)
    state["first_stage_model.vae_shift"] = torch.tensor(0.0)
    half = {k: v.detach().to(torch.float16).contiguous() for k, v in state.items()}
    metadata = {"modelspec.title": "SLiMe tiny demo model", "steps": str(saved["state"]["step"])}
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(half, str(target), metadata=metadata)
    log(work, f"export: {target.name} {target.stat().st_size / 1e6:.1f} MB after {saved['state']['step']} steps")


def sample_grid(work: Path, comfyui: str, target: Path, device: torch.device) -> None:
    """What the trained model paints for captions of scenes it has not seen."""
    import_comfyui(comfyui)
    saved = torch.load(work / "unet.pt", weights_only=True, map_location="cpu")
    model = TextToImage(saved["vocabulary"])
    model.load_state_dict(saved["ema"])
    captions = [scenes.render(d, 900_000 + i).caption for d in scenes.DOMAINS for i in range(4)]
    paint(model.to(device), load_autoencoder(work)[1].to(device), comfyui, captions, 4).save(target)
    log(work, "samples: " + " | ".join(captions))


@torch.inference_mode()
def paint(
    model: TextToImage,
    decoder: nn.Module,
    comfyui: str,
    captions: list[str],
    columns: int,
    steps: int = 30,
    guidance: float = 3.0,
) -> Image.Image:
    """A picture a caption, by DDIM with guidance, in rows of ``columns``."""
    device = model.tokens.weight.device
    index = {token: i for i, token in enumerate(model.vocabulary)}
    ids = tokenize(comfyui, [*captions, *[""] * len(captions)])
    tokens = torch.tensor([[index[int(i)] for i in row] for row in ids], device=device)
    abar = alphas_cumprod().to(device)
    x = torch.randn(len(captions), 4, 32, 32, generator=torch.Generator().manual_seed(7)).to(device)
    times = torch.linspace(999, 0, steps + 1).long().tolist()
    for now, following in zip(times[:-1], times[1:], strict=True):
        a, s = abar[now].sqrt(), (1 - abar[now]).sqrt()
        t = torch.full((2 * len(captions),), now, device=device)
        v_cond, v_free = model(torch.cat([x, x]), t, tokens).chunk(2)
        v = v_free + guidance * (v_cond - v_free)
        clean, noise = a * x - s * v, s * x + a * v
        x = abar[following].sqrt() * clean + (1 - abar[following]).sqrt() * noise
    pixels = decoder(x).clamp(0, 1).mul(255).byte().permute(0, 2, 3, 1).cpu().numpy()
    rows = [np.hstack(list(pixels[i : i + columns])) for i in range(0, len(captions), columns)]
    return Image.fromarray(np.vstack(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["all", "data", "autoencoder", "latents", "unet", "export", "samples"])
    parser.add_argument("--comfyui", required=True, help="folder of a ComfyUI installation")
    parser.add_argument("--work", type=Path, default=Path("demo_training"))
    parser.add_argument("--output", type=Path, default=Path("demo/models/slime_tiny.safetensors"))
    parser.add_argument("--scenes", type=int, default=36_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--autoencoder-minutes", type=float, default=6)
    parser.add_argument("--unet-minutes", type=float, nargs=2, default=(22, 70), metavar=("SMALL", "FULL"))
    parser.add_argument("--batches", type=int, nargs=2, default=(32, 16), metavar=("SMALL", "FULL"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    everything = options.stage == "all"
    if everything or options.stage == "data":
        make_data(options.work, options.scenes, options.workers)
    if everything or options.stage == "autoencoder":
        train_autoencoder(options.work, options.autoencoder_minutes, device)
    if everything or options.stage == "latents":
        encode_latents(options.work, device)
    if everything or options.stage == "unet":
        train_unet(options.work, options.comfyui, tuple(options.unet_minutes), device, tuple(options.batches))
    if everything or options.stage == "export":
        export(options.work, options.comfyui, options.output)
    if everything or options.stage == "samples":
        sample_grid(options.work, options.comfyui, options.work / "samples.png", device)


if __name__ == "__main__":
    main()
