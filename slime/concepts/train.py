"""Learn a concept per part: tokens that a frozen detector takes as if they were the encoding of a text.

As in M2C (arXiv 2606.26711) the detector's own losses are minimised over the tokens alone. Unlike there the views are
augmented crops of one or a few examples, and there are several concepts, each learned by itself.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..backbones.layers import LayerChoice
from ..embeddings import CONCEPT, PartEmbeddings
from ..errors import SlimeError
from ..examples import Example, common_names
from ..images import resize_image, soft_labels, working_size
from ..settings import ViewSettings, check_settings
from ..training.augment import augmented_image, augmented_labels
from ..training.progress import OnStep, StepReport
from .detection import Detections, Target, detection_losses, instances

TOKENS = 8  # of a concept; a text of SAM3 has up to 32, a word takes three with its start and end
MASK_SIDE = 288  # cells of the grid on which masks are compared, unless the detector's own is smaller
REPORT_STEPS = 5
LEAST_SCORE = 0.5  # of an instance that counts
TOKEN, MOST = "token.{}", "max_detections"  # names of the vectors of the concepts, and of their limits


@dataclass(frozen=True)
class ConceptSettings(ViewSettings):
    """Settings of the training of concepts.

    Attributes:
        steps: optimiser steps; each shows all parts one view.
        learning_rate: of Adam, of tokens whose entries are about 1.
        instances: connected regions of a part are instances of the concept; else a part is one.
    """

    steps: int = 200
    learning_rate: float = 0.02
    instances: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, steps=(1, 100_000), learning_rate=(1e-5, 1.0))


class ConceptDetector(Protocol):
    """A frozen detector that is prompted by text tokens."""

    @property
    def id(self) -> str:
        """The kind of model, stored in embeddings."""
        ...

    @property
    def side(self) -> int:
        """Side of the square to which images are resized, in pixels."""
        ...

    @property
    def mask_side(self) -> int:
        """Side of its masks, in cells."""
        ...

    @property
    def token_width(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def encode(self, image: Tensor) -> Tensor:
        """Return what the image encoder makes of an image [1, side, side, 3], before the first use of a text."""
        ...

    def prepare(self, encoded: Tensor) -> Any:
        """Return what all concepts share in one encoded image."""
        ...

    def detect(self, prepared: Any, tokens: Tensor) -> Detections:
        """Detect one concept of tokens [T, D] in one prepared image."""
        ...

    def differentiable(self) -> AbstractContextManager[None]:
        """Let gradients reach the tokens of :meth:`detect`, and no weight; :meth:`encode` is not called within."""
        ...


class _View(NamedTuple):
    encoded: Tensor
    targets: tuple[Target | None, ...]  # one per part; None where it is not known whether the part is there
    image: Tensor


def train_concepts(
    detector: ConceptDetector,
    examples: Sequence[Example],
    settings: ConceptSettings,
    words: Sequence[Tensor] | None = None,
    init: PartEmbeddings | None = None,
    on_step: OnStep = lambda report: None,
) -> PartEmbeddings:
    """Learn one concept per part of the examples.

    Args:
        detector: a frozen detector.
        examples: labelled images with the same part names.
        settings: of the views and of the optimiser.
        words: encoding [n, D] of each part's name, to start from; else tokens start from seeded noise.
        init: concepts of the same parts to continue from.
        on_step: progress callback; an exception from it ends the training.

    Raises:
        SlimeError: no examples, differing names, parts that no view shows, or a loss that is not finite.
    """
    names = common_names(*examples)
    side = min(MASK_SIDE, detector.mask_side)
    views = _encode_views(detector, examples, settings, side, on_step)
    _check_visible(names, views)
    start = _start(detector, names, settings.seed, words, init).to(detector.device)
    plain = views[: len(examples)]
    most = torch.tensor([[_most_instances(plain, part)] for part in range(len(names))], dtype=torch.float32)
    template = _template(detector, names, settings, most)
    history: list[float] = []
    with detector.differentiable():
        tokens = [start[part].clone().requires_grad_(True) for part in range(len(names))]  # [T, D] each
        optimizer = torch.optim.Adam(tokens, lr=settings.learning_rate, betas=(0.9, 0.95))

        def embeddings() -> PartEmbeddings:
            learned = torch.stack([concept.detach().float().cpu() for concept in tokens], 1)  # [T, P, D]
            vectors = {TOKEN.format(number): token.contiguous() for number, token in enumerate(learned)}
            return replace(template, vectors=vectors | {MOST: most}, losses=tuple(history))

        rng = random.Random(settings.seed)
        order: list[int] = []
        for step in range(1, settings.steps + 1):
            order = order or rng.sample(range(len(views)), len(views))
            view = views[order.pop()]
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _decay(step, settings.steps)
            optimizer.zero_grad()
            due = step % REPORT_STEPS == 1 or step == settings.steps
            loss, maps = _backward(detector, view, tokens, due)
            gradients = [concept.grad for concept in tokens if concept.grad is not None]
            if not math.isfinite(loss) or not all(bool(gradient.isfinite().all()) for gradient in gradients):
                raise SlimeError(  # before the step: the tokens so far are sound, and are saved
                    "The loss or its gradients became NaN or infinite: they overflow in this precision. Start ComfyUI "
                    "with --bf16-unet or --force-fp32."
                )
            optimizer.step()
            history.append(loss)
            shown = (view.image, _with_background(torch.stack(maps))) if len(maps) == len(names) else None
            on_step(StepReport("train", step, settings.steps, {"loss": history[-1]}, embeddings, shown))
        return embeddings()


def _backward(
    detector: ConceptDetector, view: _View, tokens: Sequence[Tensor], with_maps: bool
) -> tuple[float, list[Tensor]]:
    """Add the gradients of every concept's losses on a view; return the mean loss and, if wanted, the maps [h, w]."""
    prepared = detector.prepare(view.encoded)
    terms: list[Tensor] = []
    maps: list[Tensor] = []
    for concept, target in zip(tokens, view.targets, strict=True):
        if target is not None:
            detections = detector.detect(prepared, concept)
            term = torch.stack(list(detection_losses(detections, target).values())).sum()
            term.backward()
            terms.append(term.detach())
            if with_maps:
                maps.append(concept_map(detections))
    return float(torch.stack(terms).mean()) if terms else 0.0, maps


def _template(
    detector: ConceptDetector, names: tuple[str, ...], settings: ConceptSettings, most: Tensor
) -> PartEmbeddings:
    """Return the embeddings without what is learned."""
    return PartEmbeddings(
        names=names,
        vectors={MOST: most},
        condition={},
        prompt="",
        backbone=detector.id,
        layers=LayerChoice((), ()),
        timestep=0,
        side=detector.side,
        mode=CONCEPT,
        settings={"preset": CONCEPT} | asdict(settings),
    )


def _decay(step: int, steps: int) -> float:
    """Return the cosine decay of the learning rate, to a twentieth."""
    return 0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2


def concept_tokens(embeddings: PartEmbeddings) -> Tensor:
    """Return the tokens [P, T, D] of learned concepts.

    Raises:
        SlimeError: embeddings of another trainer.
    """
    if embeddings.mode != CONCEPT:
        raise SlimeError(
            "These embeddings were learned by SLiMe Train, and are for SLiMe Segment. Learn a concept with SLiMe Learn "
            "SAM3 Concept."
        )
    count = sum(name != MOST for name in embeddings.vectors)  # a file does not keep their order
    return torch.stack([embeddings.vectors[TOKEN.format(index)] for index in range(count)], 1)


def concept_limits(embeddings: PartEmbeddings) -> list[int]:
    """Return for each part the largest number of its instances in one view: what a detector may return at most."""
    return [max(1, int(limit)) for limit in embeddings.vectors[MOST].flatten().tolist()]


@torch.no_grad()
def concept_map(detections: Detections) -> Tensor:
    """Return the map [h, w] of one prompt: the highest probability of the instances whose score is high enough.

    Where there is none, the map of the query of the highest score counts by it.
    """
    scores, masks = detections.scores[0].sigmoid().float(), detections.masks[0].sigmoid().float()
    kept = scores > LEAST_SCORE
    if not bool(kept.any()):
        best = int(scores.argmax())
        return (masks[best] * scores[best]).cpu()
    return masks[kept].amax(0).cpu()


def _with_background(maps: Tensor) -> Tensor:
    """Return part maps [P + 1, h, w] with the background before maps [P, h, w]."""
    return torch.cat([1 - maps.amax(0, keepdim=True), maps])


def _encode_views(
    detector: ConceptDetector, examples: Sequence[Example], settings: ConceptSettings, grid: int, on_step: OnStep
) -> list[_View]:
    """Encode the views, the first of every example unaugmented; nothing of the encoder depends on the concepts."""
    count = max(settings.views, len(examples))
    square, views = (detector.side, detector.side), []
    for index in range(count):
        example = examples[index % len(examples)]
        seed = f"{settings.seed}/{index}"
        if index < len(examples):
            image = example.image
            labels = soft_labels(example.labels, len(example.names) + 1, (grid, grid))
        else:
            # Rotated at its own aspect, as the labels are, and only then squashed to the detector's square.
            size = working_size(example.labels.shape[0], example.labels.shape[1], detector.side, 1)
            image = augmented_image(example, settings, random.Random(seed), size)
            labels = augmented_labels(example, settings, random.Random(seed), (grid, grid))
        image = resize_image(image[None], square)[0]
        targets = tuple(_target(example, labels, part, settings.instances) for part in range(1, len(labels)))
        small = torch.nn.functional.interpolate(image.movedim(-1, 0)[None], (grid, grid), mode="area")[0]
        views.append(_View(detector.encode(image[None]), targets, small.movedim(0, -1)))
        preview = (views[0].image, labels) if not index else None
        on_step(StepReport("views", index + 1, count, preview=preview))
    return views


def _target(example: Example, labels: Tensor, part: int, split: bool) -> Target | None:
    """Return a part's instances in a view with soft labels [K, h, w]; None where it is not known where the part is.

    Where an example labels a part, its other pixels are not that part, even if further parts were not labelled.
    """
    valid = labels.sum(0) > 0.5
    label_map = torch.where(valid, labels.argmax(0), 0)
    if example.unlabelled == "ignore":
        valid = valid & (label_map > 0)
    target = instances(label_map, part, valid, split)
    labelled = example.labelled is None or example.names[part - 1] in example.labelled
    known = len(target.boxes) > 0 or (labelled and example.unlabelled != "ignore")
    return target if known else None


def _check_visible(names: Sequence[str], views: Sequence[_View]) -> None:
    hidden = [
        name
        for part, name in enumerate(names)
        if not any((target := view.targets[part]) is not None and len(target.boxes) for view in views)
    ]
    if hidden:
        raise SlimeError(
            f"{', '.join(hidden)}: smaller than a cell of the model's masks, so there is nothing to learn from. Crop "
            "the example around its parts."
        )
    alone = [name for part, name in enumerate(names) if not any(_has_negatives(view.targets[part]) for view in views)]
    if alone:
        raise SlimeError(
            f"{', '.join(alone)}: no pixel is known not to be this part, because unlabelled pixels are ignored. "
            "Label all parts in one of the images. With SLiMe Example you can also set its advanced input unlabelled "
            'to "background".'
        )


def _has_negatives(target: Target | None) -> bool:
    return target is not None and bool((target.valid & ~target.masks.any(0)).any())


def _most_instances(views: Sequence[_View], part: int) -> int:
    """Return the largest number of instances of a part; augmented views show some twice, mirrored at the border."""
    return max([1, *(len(target.boxes) for view in views if (target := view.targets[part]) is not None)])


def _start(
    detector: ConceptDetector,
    names: tuple[str, ...],
    seed: int,
    words: Sequence[Tensor] | None,
    init: PartEmbeddings | None,
) -> Tensor:
    """Return the tokens [P, TOKENS, D] to start from."""
    if init is not None:
        if init.names != names or init.backbone != detector.id:
            raise SlimeError(
                f"The embeddings to continue from have the parts {', '.join(init.names)} of a {init.backbone} model, "
                f"the examples {', '.join(names)} for {detector.id}. Use the same, or disconnect init_embeddings."
            )
        return concept_tokens(init)
    if words is not None:  # of a short name the last token is repeated, of a long one the first are taken
        return torch.stack([word[[min(index, len(word) - 1) for index in range(TOKENS)]].float() for word in words])
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(names), TOKENS, detector.token_width, generator=generator)
