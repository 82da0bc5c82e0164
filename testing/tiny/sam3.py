"""A tiny SAM3: the detector of ComfyUI's own classes in a narrow configuration, trained on scenes with part names.

    python -m testing.tiny.sam3 [--minutes 30]

A table of tokens, one entry per part name, stands in for the text encoder, and is trained with the detector. All of a
part is one instance. Goes on from the file where there is one. Needs a ComfyUI with SAM3 (COMFYUI_DIR). Its tracker is
left untrained.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slime.concepts.detection import Detections, Target, detection_losses, instances
from testing import scenes, splits

from ..inprocess import import_comfyui
from ..server import MODEL

FILE = MODEL.parent / "tiny_sam3.safetensors"
SIDE, PATCH, MASKS = 1008, 63, 64  # pixels of an image and of a patch, cells of a mask
WIDTH, MODEL_WIDTH, TOKENS = 128, 64, 4
TEXTS = "texts."  # begins the names of the tokens
NAMES = tuple(name for parts in scenes.PARTS.values() for name in parts)
BATCH, PROMPTS, RENDERED = 4, 2, 3000  # images a step, prompts an image, scenes


def build(seed: int = 0) -> Any:
    """Return a SAM3 model with random weights."""
    trunk = {"patch_size": PATCH, "depth": 4, "global_att_blocks": (1, 3), "pretrain_img_size": SIDE}
    return _build(seed, "SAM3", MODEL_WIDTH, **trunk)


def build_tracker(seed: int = 0) -> Any:
    """Return a SAM3.1 model with random weights and the grid and width for which ComfyUI's tracker is made."""
    return _build(seed, "SAM31", 256, depth=1, global_att_blocks=(0,))


def _build(seed: int, kind: str, width: int, **trunk: Any) -> Any:
    import_comfyui()
    import comfy.ops
    from comfy.ldm.sam3.detector import GeometryEncoder, SAM3Model, Transformer

    torch.manual_seed(seed)
    sizes = {"d_model": width, "operations": comfy.ops.manual_cast}
    model = SAM3Model(image_model=kind, embed_dim=WIDTH, num_queries=8, mlp_ratio=2.0, window_size=8, **sizes, **trunk)
    model.detector.transformer = Transformer(dim_ff=256, enc_layers=2, dec_layers=2, num_queries=8, **sizes)
    model.detector.geometry_encoder = GeometryEncoder(num_layers=1, **sizes)
    initialise(model)
    return model


def as_model(sam3: Any) -> Any:
    """Return a MODEL of a SAM3 model, as ComfyUI's Load Checkpoint gives it."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SAM3({"image_model": "SAM3", "embed_dim": 64, "d_model": 16, "depth": 1})
    config.set_inference_dtype(torch.float32, None)
    base = config.get_model({}, device=torch.device("cpu"))
    base.diffusion_model = sam3
    sam3.dtype = torch.float32
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(base, load_device=device, offload_device=torch.device("cpu"))


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Initialise weights, which ComfyUI's layers leave undefined, as PyTorch does."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if "Norm" in type(module).__name__:
                nn.init.ones_(weight) if name == "weight" else nn.init.zeros_(weight)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(weight, std=1.0)
            elif weight.ndim >= 2:
                nn.init.xavier_uniform_(weight) if name == "weight" else nn.init.normal_(weight, std=0.02)
            else:
                nn.init.zeros_(weight)


def load() -> tuple[Any, dict[str, Tensor]]:
    """Return the trained model, and the tokens [TOKENS, WIDTH] of every part name it knows."""
    model, state = build(), load_file(str(FILE))
    texts = {name.removeprefix(TEXTS): state.pop(name).float() for name in list(state) if name.startswith(TEXTS)}
    model.detector.load_state_dict({name: weight.float() for name, weight in state.items()})
    return model.eval(), texts


def save(model: Any, texts: dict[str, Tensor]) -> None:
    state = {name: weight.half() for name, weight in model.detector.state_dict().items()}
    save_file(state | {TEXTS + name: tokens.half() for name, tokens in texts.items()}, str(FILE))


def detect(model: Any, features: Any, tokens: Tensor) -> Detections:
    """Detect in backbone features of B images by tokens [B, T, WIDTH]."""
    resized = model.detector.backbone["language_backbone"]["resizer"](tokens)
    mask = torch.ones(resized.shape[:2], dtype=torch.bool)
    boxes, scores, masks, decoded = model.detector._detect(*features, resized, mask)
    return Detections(boxes, scores, masks, decoded["presence"])


def features_of(model: Any, pixels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    features, positions, _, _ = model.detector.backbone["vision_backbone"](pixels)
    return features, positions


class Scenes:
    """Rendered training scenes, kept as bytes: pixels [3, SIDE, SIDE] and label maps on the mask grid."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[str, np.ndarray, np.ndarray]] = {}

    def __call__(self, number: int) -> tuple[str, Tensor, Tensor]:
        number %= RENDERED
        if number not in self._kept:
            domain = scenes.DOMAINS[number % len(scenes.DOMAINS)]
            scene = scenes.render(domain, splits.TRAINING + number, style=scenes.NATURAL)
            self._kept[number] = (domain, scene.image, scene.labels)
        domain, image, labels = self._kept[number]
        pixels = torch.from_numpy(image).float().movedim(-1, 0)[None] / 255
        label_map = torch.from_numpy(labels)[None, None].float()
        pixels = nn.functional.interpolate(pixels, (SIDE, SIDE), mode="bilinear")[0]
        return domain, pixels, nn.functional.interpolate(label_map, (MASKS, MASKS), mode="nearest")[0, 0].long()


def use_plain_attention() -> None:
    """Make ComfyUI compute attention and rotary positions as PyTorch does, with gradients."""
    import comfy.ldm.sam3.detector
    import comfy.ldm.sam3.sam
    import comfy.model_management
    from comfy.ldm.modules.attention import attention_pytorch

    comfy.model_management.in_training = True
    for module in (comfy.ldm.sam3.detector, comfy.ldm.sam3.sam):
        module.optimized_attention = attention_pytorch


def train(minutes: float) -> None:
    """Train for a while; each step shows BATCH scenes with PROMPTS of their parts, now and then foreign ones."""
    rng, shown = random.Random(0), Scenes()  # noqa: S311
    model, table = load() if FILE.is_file() else (build(), {name: torch.randn(TOKENS, WIDTH) for name in NAMES})
    model.train()
    use_plain_attention()
    texts = nn.ParameterDict(table)
    unused = ("geometry_encoder.points", "geometry_encoder.boxes", "sam2_convs", "semantic_seg_head", "img_pre_norm")
    weights = [p for name, p in model.detector.named_parameters() if not any(word in name for word in unused)]
    optimizer = torch.optim.AdamW([*weights, *texts.values()], lr=1.0, weight_decay=1e-4)
    everywhere = torch.ones(MASKS, MASKS, dtype=torch.bool)
    started, step, mean = time.monotonic(), 0, 0.0
    while (done := (time.monotonic() - started) / 60 / minutes) < 1:
        rate = 4e-4 * min(1.0, step / 200) * min(1.0, (1 - done) * 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        images = [shown(rng.randrange(RENDERED)) for _ in range(BATCH)]
        batch = [image for image in images for _ in range(PROMPTS)]
        names = [rng.choice(NAMES if rng.random() < 0.15 else scenes.PARTS[domain]) for domain, _, _ in batch]
        targets = [
            instances(labels, scenes.PARTS[domain].index(name) + 1, everywhere, split=False)
            if name in scenes.PARTS[domain]
            else Target(torch.zeros(0, 4), torch.zeros(0, MASKS, MASKS, dtype=torch.bool), everywhere)
            for (domain, _, labels), name in zip(batch, names, strict=True)
        ]
        features = [
            [level.repeat_interleave(PROMPTS, 0) for level in levels]
            for levels in features_of(model, torch.stack([pixels for _, pixels, _ in images]))
        ]
        result = detect(model, features, torch.stack([texts[name] for name in names]))
        alone = [Detections(*(tensor[i : i + 1] for tensor in result)) for i in range(len(targets))]
        terms = [detection_losses(one, target) for one, target in zip(alone, targets, strict=True)]
        loss = torch.stack([term for losses in terms for term in losses.values()]).sum() / len(targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        mean = float(loss.detach()) if not step else 0.99 * mean + 0.01 * float(loss.detach())
        step += 1
        if step % 50 == 0:
            sys.stdout.write(f"step {step}, {100 * done:.0f} %, loss {mean:.3f}\n")
            sys.stdout.flush()
        if step % 500 == 0:
            save(model, {name: tokens.detach() for name, tokens in texts.items()})
    save(model, {name: tokens.detach() for name, tokens in texts.items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    train(parser.parse_args().minutes)
