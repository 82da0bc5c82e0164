"""Training again extracts only views that are new; after a correction none, unless views are recoloured."""

from __future__ import annotations

import gc

import pytest
import torch

from slime import SegmentSettings, preset, segment, train
from slime.embeddings import PartEmbeddings
from slime.examples import Example
from slime.training import cache
from testing.toy import ToyUNet, all_vectors, toy_example


class Known(ToyUNet):
    """A toy that says what it is."""

    state = 0

    def cache_key(self):
        return self, self.state


def learned(backbone: ToyUNet, examples: list[Example], **changes) -> tuple[PartEmbeddings, int]:
    """Return the embeddings, and how many images were encoded for them."""
    before = backbone.encoded
    settings = {"views": 12, "recolor": 0.0} | changes
    embeddings = train(backbone, examples, preset("instant", **settings))
    return embeddings, backbone.encoded - before


def same(one: PartEmbeddings, other: PartEmbeddings) -> bool:
    return torch.allclose(all_vectors(one), all_vectors(other), rtol=1e-3, atol=1e-4)


def test_only_new_views_are_extracted_and_nothing_changes() -> None:
    known, plain = Known(), ToyUNet()
    one, two = toy_example(0), toy_example(1)
    assert learned(known, [one])[1] == 12
    again, count = learned(known, [one])
    assert count == 0 and same(again, learned(plain, [one])[0])
    both, count = learned(known, [one, two])
    fresh, all_of_them = learned(plain, [one, two])
    assert count == 6 and all_of_them == 12 and same(both, fresh)
    assert learned(known, [one, two], views=20)[1] == 4, "of the first one there are eleven already"


def test_a_correction_extracts_nothing_unless_views_are_recoloured() -> None:
    known, plain, one = Known(), ToyUNet(), toy_example(0)
    corrected = Example.from_label_map(one.image, one.labels.roll(3, 1), one.names)
    learned(known, [one])
    embeddings, count = learned(known, [corrected])
    assert count == 0 and same(embeddings, learned(plain, [corrected])[0])
    renamed = Example.from_label_map(one.image, one.labels, ("a", "b"))
    assert learned(known, [renamed])[1] == 0
    assert learned(known, [one], recolor=1.0)[1] == 11, "the example as it is was seen"
    assert learned(known, [corrected], recolor=1.0)[1] == 11
    sided = Example.from_label_map(one.image, one.labels, ("left wheel", "b"))
    assert learned(known, [sided])[1] == 12, "views that may not be mirrored are others"


def test_a_run_that_was_stopped_does_not_repeat_its_views() -> None:
    known, example = Known(), toy_example(0)

    def stop(report) -> None:
        if report.stage == "features" and report.step >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(known, [example], preset("instant", views=12, recolor=0.0), on_step=stop)
    assert learned(known, [example])[1] <= 8


def test_another_state_setting_or_image_is_looked_at_anew() -> None:
    known, example = Known(), toy_example(0)
    learned(known, [example])
    assert learned(known, [example], seed=1)[1] == 12
    assert learned(known, [example], timestep=50)[1] == 12
    changed = Example.from_label_map(example.image.flip(0), example.labels, example.names)
    assert learned(known, [changed])[1] == 12
    known.state = 1
    assert learned(known, [example])[1] == 12


def test_memory_is_bounded_and_ends_with_the_model(monkeypatch) -> None:
    known, example = Known(), toy_example(0)
    cache.clear_caches()
    learned(known, [example])
    (store,) = cache._caches.values()
    half = sum(view.nbytes for view in store._views.values()) // 2
    monkeypatch.setattr(store, "limit", half)
    learned(known, [toy_example(1)])
    assert 1 < len(store._views) < 12 and store._size == sum(view.nbytes for view in store._views.values()) <= half
    del known, store
    gc.collect()
    assert not cache._caches


def test_comfyui_models_are_told_apart(comfy_path) -> None:
    from testing.inprocess import load_backbone
    from testing.server import MODEL

    backbone = load_backbone(MODEL)
    owner, state = backbone.cache_key()
    assert backbone.cache_key() == (owner, state)
    patched = backbone.model.clone()
    patched.add_patches({next(iter(patched.model.state_dict())): (torch.zeros(1),)})
    assert type(backbone)(patched, backbone.vae).cache_key()[1] != state
    hooked = backbone.model.clone()
    hooked.set_model_attn1_patch(lambda q, k, v, extra: (q, k, v))
    assert type(backbone)(hooked, backbone.vae).cache_key() is None  # who knows what it does


def test_features_of_the_last_images_serve_other_embeddings_and_decoding(extension) -> None:
    from slime_extension.nodes.feature_cache import MOST_BATCHES, MOST_IMAGES, segment_cached

    known, images = Known(), toy_example(5).image[None]
    one, other = (train(ToyUNet(), [toy_example(seed)], preset("instant", views=2)) for seed in (0, 1))

    def passes(embeddings: PartEmbeddings, given: torch.Tensor = images, **settings) -> int:
        """Return how many passes it took; the result is that of segmenting anew."""
        before, chosen = known.passes, SegmentSettings(**settings)
        found = segment_cached(known, given, embeddings, chosen, lambda done, total: None)
        wanted = segment(ToyUNet(), given, embeddings, chosen)[0]
        assert torch.equal(found.label_map, wanted.label_map)
        return known.passes - before

    assert passes(one) >= 1  # the first pass of a model is preceded by one for the keys of its layers
    assert passes(other) == passes(one, refine="off") == passes(one, min_confidence=1.0) == 0
    assert passes(one, seed=1) == 1 and passes(one, noise_samples=2) == passes(one, average_flip=True) == 2
    assert passes(one, images.flip(1)) == 1 and passes(one) == 0
    assert passes(one, tiles=2) == passes(one, tiles=2) == 4
    many = images.repeat(MOST_IMAGES + 1, 1, 1, 1)
    assert passes(one, many) == passes(one, many) > 0
    known.state = 1
    assert passes(one) == 1
    for seed in range(MOST_BATCHES):
        passes(one, seed=seed + 2)
    assert passes(one) == 1, "the oldest went"
