"""Training again extracts only views that are new, and learns the same to the bit."""

from __future__ import annotations

import gc

import torch

from slime import preset, train
from slime.embeddings import PartEmbeddings
from slime.examples import Example
from slime.training import cache
from slime.training.instant import _batch_size, _to_extract
from testing.toy import ToyUNet, all_vectors, toy_example


class Known(ToyUNet):
    """A toy that says what it is."""

    state = 0

    def cache_key(self):
        return self, self.state


def learned(backbone: ToyUNet, examples: list[Example], **changes) -> tuple[PartEmbeddings, int]:
    """Return the embeddings, and how many images were encoded for them."""
    before = backbone.encoded
    embeddings = train(backbone, examples, preset("instant", **{"views": 12, "steps": 5} | changes))
    return embeddings, backbone.encoded - before


def test_only_new_views_are_extracted_and_nothing_changes() -> None:
    known, plain = Known(), ToyUNet()
    one, two = toy_example(0), toy_example(1)
    assert learned(known, [one])[1] == 12
    again, count = learned(known, [one])
    assert count == 4 and torch.equal(all_vectors(again), all_vectors(learned(plain, [one])[0]))
    both, count = learned(known, [one, two])
    fresh, all_of_them = learned(plain, [one, two])
    assert count == 8 and all_of_them == 12  # six new ones, and two of the first batch, which is looked at again
    assert torch.equal(all_vectors(both), all_vectors(fresh))
    for views in (10, 11, 3):  # passes keep the size they always have, whatever is known
        assert torch.equal(
            all_vectors(learned(known, [one, two], views=views)[0]),
            all_vectors(learned(plain, [one, two], views=views)[0]),
        )
    corrected = Example.from_label_map(two.image, two.labels.roll(3, 1), two.names)
    assert learned(known, [one, corrected])[1] == 8


def test_passes_keep_the_size_they_always_have() -> None:
    """The result of a pass depends on its size in the last bits, so sizes must not depend on the cache."""
    for count in (3, 8, 10, 11):
        for known in (set(), {4}, {5, 7, 9}, set(range(count)), set(range(4, count))):
            looked = _to_extract(count, known)
            assert len(set(looked)) == len(looked) and set(range(count)) - known <= set(looked)
            assert set(range(min(4, count))) <= set(looked)
            passes = [looked[start : start + 4] for start in range(0, len(looked), 4)]
            sizes = [len(one) for one in passes for _ in one]
            assert sizes == [_batch_size(count, number) for number in looked], (count, known, looked)


def test_another_state_setting_or_mask_is_looked_at_anew() -> None:
    known, example = Known(), toy_example(0)
    learned(known, [example])
    assert learned(known, [example], seed=1)[1] == 12
    assert learned(known, [example], timestep=50)[1] == 12
    assert learned(known, [example], steps=6)[1] == 4  # what only the fit uses
    known.state = 1
    assert learned(known, [example])[1] == 12


def test_memory_is_bounded_and_ends_with_the_model(monkeypatch) -> None:
    known, example = Known(), toy_example(0)
    cache.clear_caches()
    learned(known, [example])
    (store,) = cache._caches.values()
    one = next(iter(store._views.values())).size
    monkeypatch.setattr(store, "limit", 5 * one)
    learned(known, [toy_example(1)])
    assert len(store._views) == 5 and store._size == 5 * one
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
