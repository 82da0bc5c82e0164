"""The same weights through ComfyUI and through diffusers give the same scores, WAS maps and gradients.

Tolerance: 2e-4 of the largest value (float32; the two differ in the order of operations and in how the noise level is
turned into the network's input).
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from slime.backbones.single_file import schedule
from testing import splits
from testing.inprocess import load_backbone
from testing.models import LAYOUTS, comfy_patcher, diffusers_unet
from testing.server import MODEL
from testing.tiny.diffusers import load_tiny

pytestmark = pytest.mark.long

TOLERANCE = 2e-4
KINDS = {"eps": "epsilon", "v": "v_prediction"}
SIDE = {"sd1": 16, "sd2": 16, "sdxl": 16}


@pytest.fixture(scope="module", params=[("sd1", "eps"), ("sd2", "eps"), ("sd2", "v"), ("sdxl", "eps")], ids="-".join)
def pair(request, extension):
    from slime_extension.nodes.comfy_unet import ComfyUNet

    from slime.backbones.hf_unet import DiffusersUNet

    layout, prediction = request.param
    patcher = comfy_patcher(layout, prediction)
    with torch.inference_mode():
        ours = ComfyUNet(patcher)
    unet = diffusers_unet(layout, patcher.model.diffusion_model.state_dict()).to(here())
    return layout, ours, DiffusersUNet(unet, None, [], [], schedule(KINDS[prediction]))


def inputs(layout: str):
    side = SIDE[layout]
    generator = torch.Generator().manual_seed(1)
    noisy = randn(2, 4, side, side, generator=generator)
    rows = randn(77, LAYOUTS[layout]["context_dim"], generator=generator) * 0.5
    pooled = randn(32, generator=generator) if layout == "sdxl" else None
    return noisy, rows, pooled


def here() -> torch.device:
    """The device that ComfyUI computes on."""
    import comfy.model_management

    return comfy.model_management.get_torch_device()


def randn(*shape: int, generator: torch.Generator) -> torch.Tensor:
    """The same numbers on every device."""
    return torch.randn(shape, generator=generator).to(here())


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).abs().max()) <= TOLERANCE * float(b.abs().max())


def test_layers_agree(pair) -> None:
    _, ours, theirs = pair
    assert [(layer.name, layer.stride) for layer in ours.layers] == [
        (layer.name, layer.stride) for layer in theirs.layers
    ]
    assert ours.info.id == theirs.info.id and ours.prediction == theirs.prediction
    assert torch.allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-5)


def test_scores_was_and_gradients_agree(pair) -> None:
    from slime.backbones.attention import cross_scores, was_maps
    from slime.backbones.base import choose_layers
    from slime.backbones.text import Capture, Context

    layout, *denoisers = pair
    noisy, rows, pooled = inputs(layout)
    results = []
    for denoiser in denoisers:
        choice = choose_layers(denoiser)
        with denoiser.differentiable(checkpointing=False):
            learned = rows[1:4].clone().requires_grad_(True)
            context = Context(torch.cat([rows[:1].clone(), learned, rows[4:].clone()]), pooled)
            capture = Capture(choice)
            noise = denoiser.predict_noise(noisy.clone(), 60, context, capture)
            layers = [
                torch.nn.functional.interpolate(cross_scores(a, 4), (16, 16), mode="bilinear")
                for a in capture.cross.values()
            ]
            scores = torch.stack(layers).mean(0)
            was = was_maps(list(capture.self_.values()), scores.softmax(1))
            (noise.square().mean() + scores.square().mean() + 10 * was.square().mean()).backward()
        results.append((noise.detach(), scores.detach(), was.detach(), learned.grad))
    for name, a, b in zip(("noise", "scores", "was", "gradient"), *results, strict=True):
        assert close(a, b), f"{name}: {float((a - b).abs().max()):.2e} of {float(b.abs().max()):.2e}"


def test_features_agree_and_are_linear_in_the_tokens(pair) -> None:
    """The features of both hosts agree, and phi . e is the score that the layers themselves give for e."""
    from slime.backbones.attention import cross_scores
    from slime.backbones.base import ExtractionSpec, choose_layers
    from slime.backbones.text import Context, capture_attention

    layout, *denoisers = pair
    latents, rows, pooled = inputs(layout)
    noise = randn(*latents.shape, generator=torch.Generator().manual_seed(2))
    found = []
    for denoiser in denoisers:
        choice = choose_layers(denoiser)
        with torch.inference_mode():
            seen = denoiser.extract(latents, ExtractionSpec(choice, condition(rows, pooled), 60), noise)
            layers = capture_attention(denoiser, latents, 60, noise, Context(rows, pooled), choice).cross.values()
        found.append(list(seen.groups.values()))
        for size_group in seen.groups.values():
            direct = sum(cross_scores(a, 77) for a in layers if (a.height, a.width) == tuple(size_group.shape[-2:]))
            assert close(torch.einsum("bdhw,kd->bkhw", size_group, rows), direct / len(choice.read))
    for a, b in zip(*found, strict=True):
        assert close(a, b)


def condition(rows: torch.Tensor, pooled: torch.Tensor | None) -> dict[str, torch.Tensor]:
    return {"context": rows} | ({} if pooled is None else {"pooled": pooled})


def test_extra_tokens_are_scored_and_attended_by_nothing(pair) -> None:
    """Tokens behind the context get keys from every host's own layers, and change no prediction."""
    from slime.backbones.attention import was_maps
    from slime.backbones.base import ExtractionSpec, choose_layers
    from slime.backbones.text import Capture, Context
    from slime.decode.linear import part_logits

    layout, *denoisers = pair
    noisy, rows, pooled = inputs(layout)
    found = []
    for denoiser in denoisers:
        choice = choose_layers(denoiser)
        plain, extra = Context(rows, pooled), Context(rows, pooled, rows[5:9] * 3)
        with torch.inference_mode():
            captures = [Capture(choice) for _ in range(2)]
            first, second = (
                denoiser.predict_noise(noisy, 60, context, capture)
                for context, capture in zip((plain, extra), captures, strict=True)
            )
            assert close(first, second)
            for name in choice.read:
                assert captures[1].cross[name].key.shape[1] == len(rows) + 4
            plan = ExtractionSpec(choice, condition(rows, pooled), 60)
            noise = randn(*noisy.shape, generator=torch.Generator().manual_seed(2))
            features = denoiser.extract(noisy, plan, noise)
            offsets = {name: rows[i : i + 3] - rows[0] for i, name in enumerate(features.groups, start=1)}
            scored = denoiser.score_parts(noisy, plan, noise, [offsets])
            (logits,) = scored.logits
            assert bool(scored.propagated) == (denoiser is denoisers[0] and layout != "sdxl")
            for was in scored.propagated:
                assert close(was, was_maps(scored.attention, logits.softmax(1)))
            assert close(logits, part_logits(features, offsets))
        found.append(logits)
    assert close(*found)


def test_checkpointing_gives_the_same_gradient(pair) -> None:
    from slime.backbones.attention import cross_scores
    from slime.backbones.base import choose_layers
    from slime.backbones.text import Capture, Context

    layout, *denoisers = pair
    noisy, rows, pooled = inputs(layout)
    for denoiser in denoisers:
        choice = choose_layers(denoiser)
        gradients = []
        for checkpointing in (False, True):
            with denoiser.differentiable(checkpointing):
                learned = rows.clone().requires_grad_(True)
                capture = Capture(choice)
                noise = denoiser.predict_noise(noisy.clone(), 60, Context(learned, pooled), capture)
                loss = noise.square().mean() + sum(cross_scores(a, 4).square().mean() for a in capture.cross.values())
                loss.backward()
                gradients.append(learned.grad)
        assert close(gradients[1], gradients[0])


def test_maps_propagated_in_the_pass_have_the_same_gradient(pair) -> None:
    """WAS by the layers' own attention calls, where the host offers it, and by calls of its own afterwards."""
    from slime.backbones.base import choose_layers
    from slime.backbones.text import Capture, Context
    from slime.paper.train import _maps, _was_maps, mean_scores

    layout, *denoisers = pair
    noisy, rows, pooled = inputs(layout)
    labels = torch.rand(2, 4, 16, 16, generator=torch.Generator().manual_seed(4)).to(here())
    weights = randn(*labels.shape, generator=torch.Generator().manual_seed(5))
    for denoiser, offers in zip(denoisers, (layout != "sdxl", False), strict=True):
        choice = choose_layers(denoiser)
        found = []
        for maps in (None, partial(_maps, labels)):
            with denoiser.differentiable(False):
                learned = rows.clone().requires_grad_(True)
                capture = Capture(choice, make_maps=maps)
                noise = denoiser.predict_noise(noisy.clone(), 60, Context(learned, pooled), capture)
                was = _was_maps(capture, mean_scores(capture, 4, labels).softmax(1))
                (noise.square().mean() + (weights * was).sum()).backward()
                found.append((noise.detach(), was.detach(), learned.grad))
        assert set(capture.propagated) == (set(choice.propagate) if offers else set())
        for plain, fused in zip(*found, strict=True):
            assert close(fused, plain)


def test_weights_are_restored(extension, comfy_path) -> None:
    """After lending, every parameter is the very object it was, and nothing requires a gradient anew."""
    from slime_extension.nodes.comfy_unet import ComfyUNet

    patcher = comfy_patcher("sd1")
    with torch.inference_mode():
        denoiser = ComfyUNet(patcher)
        patcher.model.to("cpu")
    before = {name: (id(p), p.requires_grad) for name, p in patcher.model.named_parameters()}
    forwards = [dict(vars(m)).get("forward") for m in patcher.model.modules()]
    with pytest.raises(KeyboardInterrupt), torch.inference_mode(), denoiser.differentiable(checkpointing=True):
        assert not torch.is_inference_mode_enabled()
        raise KeyboardInterrupt
    assert before == {name: (id(p), p.requires_grad) for name, p in patcher.model.named_parameters()}
    assert forwards == [dict(vars(m)).get("forward") for m in patcher.model.modules()]


def test_offloaded_weights_with_lora_learn_the_same_tokens(extension) -> None:
    """A partially loaded model, whose LoRA is applied on the fly, gives the features and gradients of a full one."""
    from slime_extension.nodes.comfy_unet import ComfyUNet

    from slime.backbones.attention import cross_scores
    from slime.backbones.base import choose_layers
    from slime.backbones.text import Capture, Context

    noisy, rows, _ = inputs("sd1")
    generator = torch.Generator().manual_seed(7)
    results = []
    for memory in (1e32, 2e5):
        with torch.inference_mode():
            patcher = comfy_patcher("sd1").clone()
            lora = {}
            generator.manual_seed(7)
            for name, weight in patcher.model.state_dict().items():
                if name.endswith(("to_q.weight", "to_k.weight")):
                    up = torch.randn(weight.shape[0], 4, generator=generator)
                    down = torch.randn(4, weight.shape[1], generator=generator)
                    lora[name] = ("diff", (0.05 * up @ down,))
            assert len(patcher.add_patches(lora, 1.0)) == len(lora)
            patcher.patch_model(here(), lowvram_model_memory=int(memory) if memory < 1e30 else 0)
            on_the_fly = sum(bool(getattr(m, "weight_function", None)) for m in patcher.model.modules())
            assert (on_the_fly > 0) == (memory < 1e30)
            denoiser = ComfyUNet(patcher)
        choice = choose_layers(denoiser)
        denoiser._in_training = True
        from slime_extension.nodes.comfy_autograd import trainable

        with trainable(patcher):
            learned = rows.clone().requires_grad_(True)
            capture = Capture(choice)
            denoiser.predict_noise(noisy.clone(), 60, Context(learned), capture)
            sum(cross_scores(a, 4).square().mean() for a in capture.cross.values()).backward()
        results.append((torch.cat([a.query.detach().flatten() for a in capture.cross.values()]), learned.grad))
    for full, paged in zip(*results, strict=True):
        assert close(paged, full)


def test_tiny_model_in_both_hosts(extension, comfy_path) -> None:
    """Text, latents, training and segmentation of the tiny checkpoint agree from end to end."""
    from pathlib import Path

    from slime import preset, segment, train

    ours, theirs = load_backbone(MODEL), load_tiny(MODEL, Path(comfy_path) / "comfy" / "sd1_tokenizer")
    example = splits.example("face", splits.EXAMPLES)
    image = splits.example("face", splits.TEST).image[None]
    found, learned = [], []
    for denoiser in (ours, theirs):
        with torch.inference_mode():
            prompt = denoiser.encode_prompt("a red car with blue windows on sand").tokens
            latents = denoiser.encode_images(image)
            learned.append(train(denoiser, [example], preset("instant", denoiser.info, views=6)))
            # What one host learned, both segment with.
            found.append((prompt, latents, segment(denoiser, image, learned[0])[0].label_map))
    assert close(found[0][0], found[1][0]) and close(found[0][1].cpu(), found[1][1].cpu())
    assert (found[0][2].cpu() == found[1][2].cpu()).float().mean() > 0.995
    torch.testing.assert_close(
        torch.tensor(learned[0].losses[:5]), torch.tensor(learned[1].losses[:5]), rtol=1e-3, atol=0
    )


def test_weights_move_in_inference_mode(extension, monkeypatch) -> None:
    """Where a model is loaded outside of it, as plain Python may, ComfyUI would move its weights to no use."""
    import comfy.model_management
    from slime_extension.nodes.comfy_unet import ComfyUNet

    from slime.backbones.text import Context

    modes: list[bool] = []
    monkeypatch.setattr(
        comfy.model_management, "load_models_gpu", lambda *_, **__: modes.append(torch.is_inference_mode_enabled())
    )
    noisy, rows, _ = inputs("sd1")
    denoiser = ComfyUNet(comfy_patcher("sd1"))
    with torch.no_grad():
        denoiser.predict_noise(noisy, 60, Context(rows), None)
    with denoiser.differentiable(checkpointing=False):
        pass
    assert modes == [True, True]
