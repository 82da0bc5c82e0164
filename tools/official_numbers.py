"""Write the numbers that the official code gives on the tiny model for one fixed input; a parity test replays them.

    git clone https://github.com/aliasgharkhani/SLiMe FOLDER
    python -m tools.official_numbers --official FOLDER

It runs the official ``StableDiffusion.get_attention_map``, ``StableDiffusion.train_step``, ``Slime.training_step`` and
``Slime.get_patched_masks`` as they are, on the tiny model's UNet in diffusers' classes. It supplies what they cannot
have here: the model (instead of a download), latents (instead of their autoencoder), noise (instead of random noise),
and the attention scores, which their patched diffusers returns. The tiny model predicts v; its prediction is converted
to noise.

Only these numbers are kept of the official code: tests/golden/official_numbers.safetensors.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from slime.paper.train import part_prompt
from testing import scenes, splits
from testing.server import MODEL, ROOT
from testing.tiny.diffusers import load_tiny

TARGET = ROOT / "tests" / "golden" / "official_numbers.safetensors"
TIMESTEP, TEST_TIMESTEP = 60, 100
SIDE, CELLS, STRIDE = 512, 64, 4  # every 4th pixel of the label map is kept
# The paper's layers, as diffusers names them (official src/arguments.py).
CROSS = [
    f"up_blocks[{b}].attentions[{a}].transformer_blocks[0].attn2" for b, a in ((1, 0), (1, 1), (1, 2), (2, 0), (2, 1))
]
SELF = [f"up_blocks[3].attentions[{a}].transformer_blocks[0].attn1" for a in (0, 1, 2)]


class Scores:
    """Attention processor of diffusers that stores the scores of all heads where the official hooks store them."""

    def __init__(self, kept: dict[str, Tensor], name: str) -> None:
        self.kept, self.name = kept, name

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        parts = (attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source))
        query, key, value = (attn.head_to_batch_dim(part) for part in parts)
        scores = query @ key.transpose(1, 2) * attn.scale
        self.kept[self.name] = scores
        out = attn.batch_to_head_dim(scores.softmax(-1) @ value)
        result: Tensor = attn.to_out[1](attn.to_out[0](out))
        return result


def import_official(folder: Path) -> tuple[Any, Any]:
    """Import its two modules; stand-ins replace imports that only training loops and files need."""
    lightning = ModuleType("pytorch_lightning")
    lightning.LightningModule = nn.Module  # type: ignore[attr-defined]
    import diffusers  # noqa: F401  before the stand-ins, which it would look for
    import transformers  # noqa: F401

    sys.modules |= {"pytorch_lightning": lightning, "cv2": ModuleType("cv2")}
    sys.path.insert(0, str(folder))
    return import_module("src.slime"), import_module("src.stable_difusion")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, default=MODEL)
    options = parser.parse_args()
    slime, stable = import_official(options.official)
    tiny = load_tiny(options.checkpoint, Path(os.environ["COMFYUI_DIR"]) / "comfy" / "sd1_tokenizer")
    scene = scenes.render("car", splits.VALIDATION_EXAMPLES)
    image = torch.from_numpy(scene.image).float()[None] / 255
    large = nn.functional.interpolate(image.movedim(-1, 1), (SIDE, SIDE), mode="bilinear").movedim(1, -1)
    with torch.no_grad():
        latents = tiny.encode_images(large).half().float()
    labels = nn.functional.interpolate(torch.from_numpy(scene.labels)[None, None].float(), CELLS)[0, 0]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)).half().float()
    names = scenes.PARTS["car"]
    empty, prompt = (tiny.encode_prompt(text).tokens[None] for text in ("", part_prompt(names)))
    rows = prompt[:, 1 : len(names) + 1] + 2.0 * torch.randn(
        1, len(names), prompt.shape[-1], generator=torch.Generator().manual_seed(2)
    )

    sd = stable.StableDiffusion.__new__(stable.StableDiffusion)
    nn.Module.__init__(sd)
    shared: dict[str, Tensor] = {}
    sd.attention_maps, sd.device, sd.device1 = shared, "cpu", "cpu"
    for name in (*CROSS, *SELF):
        tiny.unet.get_submodule(name.replace("[", ".").replace("]", "")).processor = Scores(sd.attention_maps, name)
    abar = tiny.alphas_cumprod.float()
    sd.scheduler = SimpleNamespace(
        add_noise=lambda clean, noise, t: abar[t].sqrt() * clean + (1 - abar[t]).sqrt() * noise
    )

    def unet(noisy: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> Any:
        sd.attention_maps.clear()
        v = tiny.unet(noisy, t, encoder_hidden_states=encoder_hidden_states).sample
        return SimpleNamespace(sample=abar[t].sqrt() * v + (1 - abar[t]).sqrt() * noisy)

    sd.unet, sd.encode_imgs = unet, lambda images: latents
    torch.randn_like = lambda like, **_: noise  # type: ignore[assignment]
    found: dict[str, Tensor] = {}

    def spied(*args: Any, **more: Any) -> Any:
        # The official code drops its maps after every step; the dictionary of the processors must stay the same one.
        result = stable.StableDiffusion.train_step(sd, *args, **more)
        sd.attention_maps = shared
        if more.get("train"):
            found["cross"], found["self"] = result[2].detach(), result[3].detach()
        return result

    config = SimpleNamespace(
        train_t=[TIMESTEP, TIMESTEP], test_t=[TEST_TIMESTEP], train_mask_size=CELLS, part_names=["background", *names],
        sd_loss_coef=0.005, self_attention_loss_coef=1.0, patch_size=SIDE, num_patchs_per_side=1, patch_threshold=0.2,
    )  # fmt: skip
    learned = [row.clone().requires_grad_(True) for row in rows.split(1, 1)]
    logged: dict[str, float] = {}
    me = SimpleNamespace(
        config=config, num_parts=len(names) + 1, device="cpu", token_ids=list(range(len(names) + 1)),
        text_embedding=prompt, uncond_embedding=empty, embeddings_to_optimize=learned,
        stable_diffusion=SimpleNamespace(train_step=spied),
        log=lambda name, value, **_: logged.update({name: float(value)}),
    )  # fmt: skip
    me.get_patched_masks = lambda image, size: slime.Slime.get_patched_masks(me, image, size)
    loss = slime.Slime.training_step(me, (torch.zeros(1, 3, SIDE, SIDE), labels[None]), 0)
    loss.backward()
    with torch.no_grad():
        mask = slime.Slime.get_patched_masks(me, torch.zeros(1, 3, SIDE, SIDE), SIDE)[::STRIDE, ::STRIDE]
    small = found["cross"].softmax(0)
    was = (found["self"][None] * small.flatten(1, 2)[..., None, None]).sum(1)  # as in its training step
    save_file(
        {
            "latents": latents.half().contiguous(),
            "noise": noise.half().contiguous(),
            "labels": labels.to(torch.uint8).contiguous(),
            "rows": rows[0].contiguous(),
            "cross": found["cross"].half().contiguous(),
            "was": was.half().contiguous(),
            "losses": torch.tensor([logged["loss1"], logged["loss2"], logged["sd_loss"], float(loss.detach())]),
            "gradient": torch.cat([one.grad for one in learned], 1)[0],  # type: ignore[misc]
            "mask": mask.to(torch.uint8).contiguous(),
        },
        str(TARGET),
        metadata={"made by": "tools/official_numbers.py", "model": options.checkpoint.name},
    )
    sys.stdout.write(f"{TARGET.name}: {TARGET.stat().st_size / 1e3:.0f} KB; {logged}\n")


if __name__ == "__main__":
    main()
