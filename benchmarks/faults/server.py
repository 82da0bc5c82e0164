"""Test a running server: interrupts, kills, a long queue, and every flag that a CPU allows."""

from __future__ import annotations

import http.client
import io
import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from demo.run import put_example, put_image
from slime import load_embeddings, save_embeddings
from slime.files import SCRATCH
from slime.parts.palette import default_palette
from testing import scenes, splits
from testing.server import MODEL, ComfyServer, WorkflowFailed
from testing.toy import all_vectors
from testing.workflows import Prompt, PromptBuilder

from .trials import Trials

GROWTH = 300e6  # bytes of resident memory that the second half of the interrupts may add
LEARNED, OTHER_MODEL, LORA = "standing", "other.safetensors", "noise.safetensors"
SMALL: dict[str, Any] = {"preset": "instant", "views": 4}
EXACT = ("--cache-none", "--cache-lru 10", "--disable-smart-memory", "--deterministic")
ROUNDED = ("--fp16-unet", "--bf16-unet", "--fp8_e4m3fn-unet")
SAME, ALIKE = 1.0, 0.9  # share of pixels with the same label as without flags


Link = list[str | int]
Start = dict[str, str]  # arguments of :meth:`Client.start`


class Client:
    """Client that runs prompts on the tiny model.

    No prompt is answered from the cache: its image or latent passes through a node that takes the first of a batch of
    one, with another length every time.
    """

    def __init__(self, server: ComfyServer) -> None:
        self.server = server
        self.info = server.get("/object_info")
        self._lengths = itertools.product(range(1, 60), range(1, 60))
        self.shot = put_example(server, "standing", splits.example("car", splits.EXAMPLES))
        self.picture = put_image(server, "standing_test.png", scenes.render("car", splits.TEST).image)

    def start(self, checkpoint: str = MODEL.name, lora: str = "") -> tuple[PromptBuilder, Link]:
        """Return a builder whose node 1 is the loader, and the output that the model comes from."""
        builder = PromptBuilder.of_checkpoint(checkpoint)
        if not lora:
            return builder, ["1", 0]
        patched = builder.add("LoraLoaderModelOnly", model=["1", 0], lora_name=lora, strength_model=1.0)
        return builder, [patched, 0]

    def _fresh(self, builder: PromptBuilder, kind: str, socket: str, source: str) -> str:
        for length in next(self._lengths):
            source = builder.add(kind, **{socket: [source, 0]}, batch_index=0, length=length)
        return source

    def sampled(self, start: Start | None = None) -> Tensor:
        """Run KSampler and return its latents [1, 4, 32, 32]."""
        builder, model = self.start(**(start or {}))
        latent = builder.add("EmptyLatentImage", width=256, height=256, batch_size=1)
        latent = self._fresh(builder, "LatentFromBatch", "samples", latent)
        sampler = builder.add_sampling("a red car on sand", "", latent, seed=3, steps=3, model=model)
        saved = builder.add("SaveLatent", samples=[sampler, 0], filename_prefix="latents/sample")
        item = self.server.run(builder.prompt)[saved]["latents"][0]
        return load_file(str(self.server.base / "output" / item["subfolder"] / item["filename"]))["latent_tensor"]

    def segmented(self, start: Start | None = None) -> np.ndarray:
        """Segment with the saved embeddings and return the colours of the label map."""
        builder, parts = self.segment(start=start)
        drawn = builder.add("SLiMeOverlay", parts=[parts, 0], opacity=1.0, legend=False)
        shown = builder.add("PreviewImage", images=[drawn, 1])
        return self.pixels(self.server.run(builder.prompt)[shown]["images"][0])

    def pixels(self, item: dict[str, str]) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(self.server.output_image(item))).convert("RGB"))

    def segment(
        self, batch: int = 1, more: dict[str, int] | None = None, start: Start | None = None
    ) -> tuple[PromptBuilder, str]:
        """Return a builder, and its node that outputs the parts."""
        builder, model = self.start(**(start or {}))
        image = self._fresh(builder, "ImageFromBatch", "image", builder.add("LoadImage", image=self.picture))
        if batch > 1:
            image = builder.add("RepeatImageBatch", image=[image, 0], amount=batch)
        loaded = builder.add("SLiMeLoadEmbeddings", filename=f"{LEARNED}.safetensors")
        links: dict[str, Link] = {"model": model, "vae": ["1", 2], "embeddings": [loaded, 0], "image": [image, 0]}
        parts = builder.add("SLiMeSegment", **links, refine="fast", seed=0, **(more or {}))
        return builder, parts

    def training(
        self, name: str, start: Start | None = None, preset: str = "instant", seed: int = 0, **settings: Any
    ) -> Prompt:
        """Return a prompt that trains on one example and saves the embeddings."""
        builder, model = self.start(**(start or {}))
        examples = builder.add_examples(self.shot.image, self.shot.masks)
        links = {"model": model, "vae": ["1", 2], "clip": ["1", 1], "examples": examples}
        train = builder.add("SLiMeTrain", **links, seed=seed)
        builder.set_training(train, preset, **settings)
        builder.add("SLiMeSaveEmbeddings", embeddings=[train, 0], filename=name, overwrite=True)
        return builder.prompt

    def learn(self) -> None:
        """Train and save the embeddings that the client segments with."""
        self.server.run(self.training(LEARNED, preset="instant", views=8))

    def complete(self, prompt: Prompt) -> Prompt:
        """Set every widget that is not named to its default."""
        for node in prompt.values():
            for name, spec in self.info[node["class_type"]]["input"].get("required", {}).items():
                if len(spec) > 1 and "default" in spec[1]:
                    node["inputs"].setdefault(name, spec[1]["default"])
        return prompt


@contextmanager
def client(base: Path, *options: str) -> Iterator[Client]:
    """Yield a client of a new server, which has embeddings trained with the preset instant."""
    with ComfyServer(base=base, options=options) as server:
        made = Client(server)
        made.learn()
        yield made


def interrupts(trials: Trials, count: int, rng: random.Random, folder: Path) -> None:
    """Interrupt every node at random moments; sampling and segmentation must give the same results afterwards."""
    with client(folder) as at:
        interrupt(trials, count, rng, at)


def interrupt(trials: Trials, count: int, rng: random.Random, at: Client) -> None:
    """Run the trials of :func:`interrupts` on a server that is already running."""
    seeds = itertools.count(1)

    def training(**widgets: Any) -> Callable[[], Prompt]:
        return lambda: at.training("interrupted", seed=next(seeds), **widgets)

    def segmenting(batch: int, *nodes: str, **more: int) -> Callable[[], Prompt]:
        def make() -> Prompt:
            builder, parts = at.segment(batch, more)
            for node in nodes:
                follow(builder, node, parts)
            builder.add("MaskPreview", mask=[parts, 1])
            return at.complete(builder.prompt)

        return make

    outputs = ("SLiMePartMask", "SLiMePartList", "SLiMePartBoxes", "SLiMePartSegs", "SLiMeOverlay", "SLiMeEvaluate")
    jobs = {
        "train instant": training(preset="instant", views=16),
        "train instant, auto": training(preset="instant", views=4, read_layers="auto"),
        "train paper": training(preset="paper", steps=8, views=4),
        "train paper, checkpointing": training(preset="paper", steps=4, views=2, checkpointing=True),
        "segment": segmenting(3),
        "segment, zoom and crops": segmenting(1, closeups=1, tiles=2),
        "smooth": segmenting(6, "SLiMeSteadyParts"),
        "masks, lists, boxes, segs, overlay, evaluate": segmenting(2, *outputs),
    }
    jobs = {name: jobs[name] for name in rng.sample(list(jobs), min(count, len(jobs)))}
    sampled, segmented = at.sampled(), at.segmented()
    lasting = {}
    for name, make in jobs.items():
        start = time.monotonic()
        at.server.run(make())
        lasting[name] = time.monotonic() - start
    half = 0.0
    for index in range(count):
        name = list(jobs)[index % len(jobs)]
        moment = rng.uniform(0, lasting[name])
        prompt_id = at.server.queue(jobs[name]())
        time.sleep(moment)
        trials.count += 1
        at.server.interrupt()
        ended = at.server.wait(prompt_id)["status"]
        kinds = [kind for kind, _ in ended["messages"]]
        trials.refused += "execution_interrupted" in kinds
        what = f"{name} after {moment:.2f} s"
        trials.check(f"{what}: {ended['messages'][-1]}", "execution_error" not in kinds)
        off = float((at.sampled() - sampled).abs().max())
        trials.check(f"{what}: KSampler differs by {off:.1e}", off == 0)
        trials.check(f"{what}: segmentation differs", np.array_equal(at.segmented(), segmented))
        if index == count // 2:
            half = at.server.resident_bytes()
    growth = at.server.resident_bytes() - half
    trials.remark = f"{trials.refused} stopped in time; second half added {growth / 1e6:.0f} MB"
    trials.check(f"memory grew by {growth / 1e6:.0f} MB", growth < GROWTH)


def follow(builder: PromptBuilder, node: str, parts: str) -> None:
    """Add a node that takes the parts, and an output node that makes the server run it."""
    links: dict[str, object] = {"parts": [parts, 0]}
    match node:
        case "SLiMePartMask":
            links |= {"names": "wheel", "mode": "soft", "grow": 2, "feather": 2}
        case "SLiMeEvaluate":
            links |= {"ground_truth": [parts, 1], "names": "wheel"}
    made = builder.add(node, **links)
    match node:
        case "SLiMePartMask" | "SLiMePartList":
            builder.add("MaskPreview", mask=[made, 0])
        case "SLiMeOverlay":
            builder.add("PreviewImage", images=[made, 0])
        case "SLiMeSteadyParts":
            builder.add("MaskPreview", mask=[made, 1])
        case "SLiMeEvaluate":
            builder.add("PreviewImage", images=[made, 2])
        case _:
            builder.add("PreviewAny", source=[made, 0])


def kills(trials: Trials, count: int, rng: random.Random, folder: Path) -> None:
    """Kill a server while it overwrites a file.

    The file must be the old one or the new one, and the next server must work.
    """
    with client(folder):
        pass
    saved = folder / "models" / "slime"
    small = load_embeddings(saved / f"{LEARNED}.safetensors")
    # As large as a file can get, so that writing takes its time.
    times = 76 // len(small.names)
    wide, names = (
        {name: vector.repeat(times, 1) for name, vector in small.vectors.items()},
        tuple(f"part {n}" for n in range(times * len(small.names))),
    )
    versions = [
        replace(
            small,
            vectors={name: vector + sign for name, vector in wide.items()},
            names=names,
            palette=default_palette(len(names)),
        )
        for sign in (0, 1)
    ]
    for number, version in enumerate(versions):
        save_embeddings(version, saved / f"version_{number}.safetensors")
    target, left = saved / "target.safetensors", 0
    save_embeddings(versions[0], target)
    for index in range(count):
        with ComfyServer(base=folder) as server:
            # Half of the kills happen at a random moment, half as soon as a half-written file is seen.
            moment = rng.uniform(0.05, 0.6) if index % 2 else 5.0
            killer = threading.Thread(target=_kill, args=(server, saved, moment, index % 2 == 0))
            killer.start()
            for turn in range(200):
                builder = PromptBuilder({})
                loaded = builder.add("SLiMeLoadEmbeddings", filename=f"version_{(index + turn) % 2}.safetensors")
                builder.add("SLiMeSaveEmbeddings", embeddings=[loaded, 0], filename="target", overwrite=True)
                try:
                    server.queue(builder.prompt)
                except (OSError, http.client.HTTPException):  # the server is dead
                    break
            killer.join()
        trials.count += 1
        for scratch in saved.glob(f".*{SCRATCH}"):
            scratch.unlink()
            left += 1
        found = all_vectors(load_embeddings(target))
        known = any(torch.equal(found, all_vectors(version)) for version in versions)
        trials.check(f"kill {index}: the file is damaged", known)
    with client(folder) as at:
        trials.check("the server does not segment any more", bool(at.segmented().any()))
    trials.remark = f"{left} of the kills came in the middle of a write"


def _kill(server: ComfyServer, saved: Path, seconds: float, at_sight: bool) -> None:
    """Kill the server after ``seconds``, or as soon as a half-written file is seen."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if at_sight and any(name.endswith(SCRATCH) for name in os.listdir(saved)):
            break
        time.sleep(0 if at_sight else 0.01)
    server.kill()


def queue(trials: Trials, count: int, rng: random.Random, folder: Path) -> None:
    """Run prompts of all kinds in one queue, with two checkpoints and a LoRA.

    Each must give the result that it gave the first time.
    """
    with client(folder) as at:
        state = load_file(str(MODEL))
        generator = torch.Generator().manual_seed(0)
        lora = {}
        for name, weight in state.items():
            if name.startswith("model.diffusion_model.") and name.endswith(".attn2.to_k.weight"):
                key = "diffusion_model." + name.removeprefix("model.diffusion_model.").removesuffix(".weight")
                lora[f"{key}.lora_A.weight"] = torch.randn(4, weight.shape[1], generator=generator) * 0.2
                lora[f"{key}.lora_B.weight"] = torch.randn(weight.shape[0], 4, generator=generator) * 0.2
                state[name] = weight * 1.05
        save_file(state, str(folder / "models" / "checkpoints" / OTHER_MODEL))
        save_file(lora, str(folder / "models" / "loras" / LORA))
        starts: tuple[Start, ...] = ({}, {"checkpoint": OTHER_MODEL}, {"lora": LORA})

        def trained(start: Start) -> Tensor:
            at.server.run(at.training("queued", start, **SMALL))
            return all_vectors(load_embeddings(folder / "models" / "slime" / "queued.safetensors"))

        works: list[tuple[Callable[[Start], np.ndarray | Tensor], Start]] = [
            (work, start) for start in starts for work in (at.sampled, at.segmented, trained)
        ]
        first = [np.asarray(work(start)) for work, start in works]
        trials.check("the LoRA changes nothing", not np.array_equal(first[0], first[6]))
        for index in range(count):
            place = rng.randrange(len(works))
            work, start = works[place]
            trials.count += 1
            try:
                trials.check(f"{index}, {work.__name__} {start}: differs", np.array_equal(work(start), first[place]))
            except WorkflowFailed as error:
                trials.failures.append(f"queue {index}, {work.__name__} {start}: {error}")


def flags(trials: Trials, count: int, rng: random.Random, folder: Path) -> None:
    """Start the server with each of its options.

    Training and segmentation must work, and KSampler must give the same before and after.
    """
    del count, rng
    with client(folder / "plain") as at:
        sampled, segmented = at.sampled(), at.segmented()
        known = (at.server.comfyui / "comfy" / "cli_args.py").read_text(encoding="utf-8")
    remarks = []
    for flag in (*EXACT, *ROUNDED):
        if f'"{flag.split()[0]}"' not in known:
            remarks.append(f"no {flag} here")
            continue
        trials.count += 1
        try:
            with client(folder / flag.split()[0].strip("-"), *flag.split()) as at:
                before = at.sampled()
                at.server.run(at.training("paper", preset="paper", steps=3, views=2))
                share = float((at.segmented() == segmented).all(-1).mean())
                trials.check(f"{flag}: KSampler differs afterwards", torch.equal(at.sampled(), before))
                if flag in EXACT:
                    trials.check(f"{flag}: KSampler differs from a plain server's", torch.equal(before, sampled))
                wanted = SAME if flag in EXACT else ALIKE
                trials.check(f"{flag}: {share:.3f} of the pixels as without", share >= wanted)
                remarks.append(f"{flag} {share:.3f}")
        except WorkflowFailed as error:
            trials.failures.append(f"flags {flag}: {error}")
    trials.remark = "pixels as without: " + ", ".join(remarks)
