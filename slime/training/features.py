"""Extract features of augmented views, each once."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from ..backbones.base import Backbone, Features, seeded_noise
from ..batches import check_finite, in_batches
from ..embeddings import PartEmbeddings
from ..examples import Example
from ..images import resize_image, resize_maps
from ..settings import InstantSettings
from .augment import flip_allowed
from .cache import ViewCache, cache_of, digest_of
from .progress import OnStep, StepReport
from .views import VIEW_BATCH, EncodedView, encode_views, resize_labels, view_labels, view_place, view_seed, view_size

ViewId = tuple[int, float]  # number of a view, and the strength of its colour changes


class ViewFeatures:
    """Features and labels of the views of the examples.

    The first views are the examples as they are. Features are kept for this training, and where the backbone allows it
    for later ones: by image, view and model, for recoloured views by labels too.

    Args:
        backbone: the model.
        examples: labelled images.
        settings: of the views; ``recolor`` does not count.
        template: says what is extracted.
        on_step: called after each view that is encoded or extracted.
        expected: number of views of the whole training, for reports.
    """

    def __init__(
        self,
        backbone: Backbone,
        examples: Sequence[Example],
        settings: InstantSettings,
        template: PartEmbeddings,
        on_step: OnStep,
        expected: int,
    ) -> None:
        self._backbone, self._examples, self._settings = backbone, examples, settings
        self._spec = template.extraction_spec().to(backbone.device)
        self._on_step, self._expected, self._done = on_step, expected, 0
        self._views: dict[ViewId, Features] = {}
        self._cache, self._state = cache_of(backbone) or (ViewCache(0), None)
        values = [getattr(settings, name) for name in ("seed", "smallest_crop", "rotation", "blur")]
        spec = template.extraction_key()
        self._images = [
            digest_of(example.image, values, flip_allowed(settings, example.names), spec) for example in examples
        ]
        self._labelled: list[str] = []

    def get(self, wanted: Sequence[ViewId]) -> list[Features]:
        """Return the features of views on the model's device; those that are not known are extracted."""
        wanted = [(number, 0.0 if number < len(self._examples) else strength) for number, strength in wanted]
        new = [view for view in dict.fromkeys(wanted) if not self._is_known(view)]
        self._extract(sorted(new, key=lambda view: view[1]))
        return [self._views[view] for view in wanted]

    def stacked(self, wanted: Sequence[ViewId]) -> tuple[dict[str, Tensor], Tensor]:
        """Return features [V, D, h, w] by group and soft labels [V, K, H, W] of views, for a fit.

        Views of another aspect are resized to the first one's grid: the loss takes single positions only.

        Raises:
            SlimeError: values that are not finite.
        """
        views = self.get(wanted)
        first = views[0]
        features = {
            group: torch.cat([resize_maps(view.groups[group], (m.shape[2], m.shape[3])) for view in views])
            for group, m in first.groups.items()
        }
        check_finite(features.values())
        truth = torch.stack([resize_labels(self.labels(number), first.grid) for number, _ in wanted])
        return features, truth.to(next(iter(features.values())))

    def labels(self, number: int) -> Tensor:
        """Return the soft labels [K, h, w] of a view on the grid of its features."""
        known = next(view for (other, _), view in self._views.items() if other == number)
        labels = view_labels(self._examples, self._settings, self._backbone.info, len(self._examples), number)
        return resize_labels(labels, known.grid)

    def first_image(self) -> Tensor:
        """Return the first example, [h, w, 3], at the size at which it is encoded."""
        example = self._examples[0]
        return resize_image(example.image[None], view_size(example, self._backbone.info))[0]

    def _is_known(self, view: ViewId) -> bool:
        if view not in self._views and (cached := self._cache.get(self._key(view))) is not None:
            self._views[view] = cached.to(self._backbone.device)
        return view in self._views

    def _key(self, view: ViewId) -> Hashable:
        number, strength = view
        count = len(self._examples)
        if strength and not self._labelled:
            self._labelled = [digest_of(example.labels.to(torch.uint8)) for example in self._examples]
        labels = self._labelled[number % count] if strength else ""
        place = view_place(self._settings, count, number) if number >= count else "as it is"
        return (
            self._state,
            self._images[number % count],
            labels,
            place,
            view_seed(self._settings, count, number),
            strength,
        )

    def _extract(self, new: Sequence[ViewId]) -> None:
        """Encode all views before any pass: on a small card the VAE and the UNet take turns in memory."""
        encoded: list[tuple[ViewId, EncodedView]] = []
        plain = len(self._examples)
        for strength, wanted in groupby(new, key=lambda view: view[1]):
            settings = replace(self._settings, recolor=strength)
            numbers = [number for number, _ in wanted]
            for view in encode_views(self._backbone, self._examples, settings, numbers, plain):
                encoded.append(((view.number, strength), view))
                first = len(encoded) == 1 and not self._views
                self._report("views", len(encoded), (view.image(), view.labels) if first else None)
        done = 0
        for features in self._passes([view for _, view in encoded]):
            size = len(next(iter(features.groups.values())))
            for index, (key, view) in enumerate(encoded[done : done + size]):
                found = features.of_image(index)
                self._views[key] = found if view.number < plain else replace(found, attention=())
                if self._cache.limit:
                    self._cache.put(self._key(key), self._views[key])
            done += size
            self._report("features", done)
        self._done += len(new)

    def _report(self, stage: str, done: int, preview: tuple[Tensor, Tensor] | None = None) -> None:
        step = self._done + done
        self._on_step(StepReport(stage, step, max(step, self._expected), preview=preview))

    def _passes(self, views: Sequence[EncodedView]) -> Iterator[Features]:
        """Yield features of the views in order, in batches of neighbours of one size; every view has its own noise."""
        for _, group in groupby(views, key=lambda view: view.size):
            neighbours = list(group)
            latents = torch.cat([view.latents for view in neighbours])
            seeds = [view_seed(self._settings, len(self._examples), view.number) for view in neighbours]
            noise = torch.cat([seeded_noise(latents[:1].shape, seed, latents.device) for seed in seeds])

            def extract(chunk: slice, latents: Tensor = latents, noise: Tensor = noise) -> Features:
                return self._backbone.extract(latents[chunk], self._spec, noise[chunk])

            yield from in_batches(len(latents), VIEW_BATCH, extract)
