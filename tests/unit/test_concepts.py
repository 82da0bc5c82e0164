"""Concepts for a promptable detector, refinement by a mask decoder, and tracks; without SAM3 itself."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from slime import Example, SlimeError, load_embeddings, save_embeddings
from slime.concepts.detection import Detections, detection_losses, instances
from slime.concepts.refine import RefineSettings, refine_parts
from slime.concepts.train import ConceptSettings, concept_limits, concept_map, concept_tokens, train_concepts
from slime.edit import change_parts, describe, merge_embeddings
from slime.embedding_files import to_text
from slime.examples import merge_examples
from slime.parts.maps import DenseMaps, HardMaps, PartMaps
from slime.parts.palette import default_palette
from slime.parts.tracks import track_seeds, tracked_maps

GRID = 32


class ToyDetector:
    """Two queries, whose masks are the likeness of every pixel's colour to the mean of the concept's tokens."""

    id, side, mask_side, token_width, device = "toy-detector", 64, GRID, 4, torch.device("cpu")

    def __init__(self) -> None:
        self.encoded = 0

    def encode(self, image):
        self.encoded += 1
        small = torch.nn.functional.interpolate(image.movedim(-1, 1), (GRID, GRID), mode="area")
        return torch.cat([small, torch.ones(1, 1, GRID, GRID)], 1)

    def prepare(self, encoded):
        return encoded

    def detect(self, encoded, tokens):
        logits = 8 * torch.einsum("bchw,c->bhw", encoded, tokens.mean(0))[:, None]
        masks = torch.cat([logits, -logits], 1)
        scores = torch.stack([logits.amax((1, 2, 3)), -logits.amax((1, 2, 3))], 1)
        boxes = torch.tensor([[[0.25, 0.25, 0.75, 0.75], [0.0, 0.0, 1.0, 1.0]]])
        return Detections(boxes, scores, masks, scores[:, :1])

    @contextmanager
    def differentiable(self):
        with torch.enable_grad():
            yield


def colored_example(second: str = "blue") -> Example:
    image, labels = torch.full((64, 64, 3), 0.5), torch.zeros(64, 64, dtype=torch.int64)
    for label, (rows, color) in enumerate([(slice(8, 28), (1.0, 0.1, 0.1)), (slice(36, 56), (0.1, 0.1, 1.0))], 1):
        image[rows, 16:48], labels[rows, 16:48] = torch.tensor(color), label
    return Example.from_label_map(image, labels, ["red", second])


def test_concepts_are_learned_for_each_part_alone() -> None:
    toy, losses, previews = ToyDetector(), [], []

    def on_step(report) -> None:
        losses.append(report.losses.get("loss"))
        previews.append(report.preview)

    settings = ConceptSettings(views=4, steps=120, learning_rate=0.1)
    learned = train_concepts(toy, [colored_example()], settings, on_step=on_step)
    assert learned.names == ("red", "blue") and learned.losses[-1] < 0.3 * learned.losses[0]
    assert toy.encoded == 4 and any(preview is not None and preview[1].shape == (3, GRID, GRID) for preview in previews)
    encoded = toy.encode(colored_example().image[None])
    maps = torch.stack([concept_map(toy.detect(encoded, tokens)) for tokens in concept_tokens(learned)])
    truth = torch.stack([torch.from_numpy((colored_example().labels == k).numpy()[1::2, 1::2]) for k in (1, 2)])
    assert ((maps > 0.5) & truth).sum() / ((maps > 0.5) | truth).sum() > 0.8
    again = train_concepts(ToyDetector(), [colored_example()], settings)
    assert again.losses == learned.losses


def test_concepts_continue_are_saved_renamed_and_merged(tmp_path) -> None:
    settings = ConceptSettings(views=1, steps=3)
    learned = train_concepts(ToyDetector(), [colored_example()], settings)
    loaded = load_embeddings(save_embeddings(learned, tmp_path / "x.safetensors"))
    assert torch.equal(concept_tokens(loaded), concept_tokens(learned)) and concept_limits(loaded) == [1, 1]
    assert "SAM3 concepts, 8 tokens" in describe(loaded) and "prompt" not in describe(loaded)
    further = train_concepts(ToyDetector(), [colored_example()], settings, init=loaded)
    assert further.losses[0] < learned.losses[0]
    one = change_parts(loaded, "blue = drop\nred = wheel")
    assert one.names == ("wheel",) and torch.equal(concept_tokens(one)[0], concept_tokens(learned)[0])
    both = merge_embeddings(loaded, one)
    assert both.names == ("red", "blue", "wheel") and len(concept_tokens(both)) == 3
    unknown = merge_embeddings(replace(loaded, example_confidence=0.8), replace(one, example_confidence=0.0))
    assert unknown.example_confidence == 0  # which means unknown
    with pytest.raises(SlimeError, match="no text form"):
        to_text(learned)
    with pytest.raises(SlimeError, match="to continue from have the parts red, blue"):
        train_concepts(ToyDetector(), [colored_example("green")], settings, init=learned)


def test_words_are_where_training_starts() -> None:
    word = torch.arange(12.0).reshape(3, 4) / 12
    seen = []

    class Watching(ToyDetector):
        def detect(self, encoded, tokens):
            seen.append(tokens.detach().clone())
            return super().detect(encoded, tokens)

    train_concepts(Watching(), [colored_example()], ConceptSettings(views=1, steps=1), words=[word, word])
    assert torch.equal(seen[0], word[[0, 1, 2, 2, 2, 2, 2, 2]])


def test_bad_examples_of_concepts() -> None:
    with pytest.raises(SlimeError, match="There is no example"):
        train_concepts(ToyDetector(), [], ConceptSettings())
    with pytest.raises(SlimeError, match="must name the same parts"):
        train_concepts(ToyDetector(), [colored_example(), colored_example("green")], ConceptSettings())
    labels = torch.zeros(640, 640, dtype=torch.int64)
    labels[100, 100] = 1
    speck = Example.from_label_map(torch.rand(640, 640, 3), labels, ["speck"])
    with pytest.raises(SlimeError, match="speck: smaller than a cell"):
        train_concepts(ToyDetector(), [speck], ConceptSettings(views=1, smallest_crop=1.0))
    with pytest.raises(SlimeError, match="learning_rate is 5; it must be from 1e-05 to 1"):
        ConceptSettings(learning_rate=5)

    class Broken(ToyDetector):
        def detect(self, encoded, tokens):
            return super().detect(encoded, tokens)._replace(scores=tokens.mean() * torch.full((1, 2), torch.nan))

    with pytest.raises(SlimeError, match="NaN"):
        train_concepts(Broken(), [colored_example()], ConceptSettings(views=1, steps=2))


def test_views_of_any_aspect_lie_under_their_labels() -> None:
    """The image is the part's mask: what a view shows and what its labels say are the same."""
    from slime.concepts.train import _encode_views

    labels = torch.zeros(100, 300, dtype=torch.int64)
    labels[30:80, 60:90], labels[20:60, 180:260] = 1, 1
    example = Example.from_label_map((labels > 0).float()[..., None].expand(-1, -1, 3), labels, ["part"])
    settings = ConceptSettings(views=12, blur=0.0, instances=False)
    for view in _encode_views(ToyDetector(), [example], settings, GRID, lambda report: None):
        shown, (target,) = view.image[..., 0] > 0.5, view.targets
        truth = target.masks[0] if len(target.masks) else torch.zeros_like(shown)
        assert (shown & truth).sum() / (shown | truth).sum().clamp(min=1) > 0.8


def test_parts_of_several_examples_are_learned_from_the_one_that_labels_them() -> None:
    whole = colored_example()
    red = Example.from_label_map(whole.image, torch.where(whole.labels == 1, 1, 0), ["red"])
    other = Example.from_label_map(whole.image * 0.9, torch.where(whole.labels == 2, 1, 0), ["blue"])
    examples = merge_examples(merge_examples((), red), other)
    toy, settings = ToyDetector(), ConceptSettings(views=4, steps=150, learning_rate=0.1)
    learned = train_concepts(toy, examples, settings)
    encoded = toy.encode(whole.image[None])
    for part, tokens in enumerate(concept_tokens(learned), start=1):
        found, truth = concept_map(toy.detect(encoded, tokens)) > 0.5, (whole.labels == part)[1::2, 1::2]
        assert (found & truth).sum() / (found | truth).sum() > 0.7
    with pytest.raises(SlimeError, match="no pixel is known not to be"):
        train_concepts(toy, [replace(red, unlabelled="ignore")], settings)


def test_a_gradient_that_is_no_number_loses_nothing() -> None:
    class Overflowing(ToyDetector):
        def detect(self, encoded, tokens):
            found = super().detect(encoded, tokens)
            self.encoded += 1
            if self.encoded > 4:
                tokens.register_hook(lambda gradient: gradient * torch.nan)
            return found

    last = []
    with pytest.raises(SlimeError, match="gradients became NaN"):
        train_concepts(Overflowing(), [colored_example()], ConceptSettings(views=1, steps=9), on_step=last.append)
    assert concept_tokens(last[-1].embeddings()).isfinite().all()


def test_losses_are_least_at_the_truth() -> None:
    labels = torch.zeros(16, 16, dtype=torch.int64)
    labels[2:6, 2:6], labels[9:15, 8:15] = 1, 1
    target = instances(labels, 1, torch.ones(16, 16, dtype=torch.bool))
    assert target.boxes.tolist() == [[8 / 16, 9 / 16, 15 / 16, 15 / 16], [2 / 16, 2 / 16, 6 / 16, 6 / 16]]
    masks = torch.cat([target.masks.flip(0), torch.zeros(1, 16, 16)]).float() * 20 - 10
    boxes = torch.cat([target.boxes.flip(0), torch.tensor([[0.1, 0.1, 0.2, 0.2]])])
    right = Detections(boxes[None], torch.tensor([[8.0, 8.0, -8.0]]), masks[None], torch.tensor([[8.0]]))
    least = detection_losses(right, target)
    assert sum(least.values()) < 0.02
    for wrong in (
        right._replace(scores=torch.tensor([[8.0, -8.0, 8.0]])),
        right._replace(masks=-right.masks),
        right._replace(boxes=right.boxes * 0.5),
        right._replace(presence=-right.presence),
    ):
        assert sum(detection_losses(wrong, target).values()) > sum(least.values()) + 0.1
    absent = instances(labels, 2, torch.ones(16, 16, dtype=torch.bool))
    assert set(detection_losses(right, absent)) == {"score", "presence"}


def one_part(side: int = 64) -> tuple[PartMaps, torch.Tensor, torch.Tensor]:
    """A part found coarsely within a larger object, the image, and where the object is."""
    inside = torch.zeros(side, side, dtype=torch.bool)
    inside[24:40, 24:40] = True
    probabilities = torch.stack([torch.where(inside, 0.2, 0.9), torch.where(inside, 0.8, 0.1)])[None]
    whole = torch.zeros(side, side, dtype=torch.bool)
    whole[8:56, 8:56] = True
    maps = PartMaps(DenseMaps(probabilities), ("part",), default_palette(1), torch.ones(1, 1))
    return maps, torch.rand(1, side, side, 3), whole


def test_a_better_border_is_taken_and_the_whole_object_is_not() -> None:
    maps, images, _ = one_part()

    def sharper(image, logits):
        assert image.shape[:2] == logits.shape and float(logits.max()) > 0
        result = torch.full(logits.shape, -6.0)
        result[9:-9, 7:-7] = 6.0  # a pixel less above and below, one more on each side
        return result

    result = refine_parts(maps, images, sharper, RefineSettings())
    assert (result.refined, result.refused) == (1, 0)
    rows, columns = result.maps.label_map[0].nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (25, 38, 23, 40)
    assert torch.allclose(result.maps.probabilities.sum(1), torch.ones(1, 64, 64), atol=1e-2)

    before = maps.label_map
    everything = refine_parts(maps, images, lambda image, logits: torch.full(logits.shape, 9.0), RefineSettings())
    assert everything.refused == 1 and torch.equal(everything.maps.label_map, before)
    cut = refine_parts(maps, images, lambda image, logits: torch.full(logits.shape, 9.0), RefineSettings(min_iou=0.0))
    grown = cut.maps.label_map[0].nonzero()
    assert cut.refined == 1 and int(grown.min()) >= 24 - 2 and int(grown.max()) <= 39 + 2
    broken = refine_parts(maps, images, lambda image, logits: logits * torch.nan, RefineSettings())
    assert broken.refused == 1 and torch.equal(broken.maps.label_map, before)


def test_refined_parts_still_compete_for_pixels() -> None:
    labels = torch.zeros(1, 64, 64, dtype=torch.uint8)
    labels[0, 16:48, 8:32], labels[0, 16:48, 32:56] = 1, 2
    maps = PartMaps(HardMaps(labels, 3), ("left", "right"), default_palette(2), torch.ones(1, 2))
    images = torch.rand(1, 64, 64, 3)
    result = refine_parts(maps, images, lambda image, logits: logits + 4, RefineSettings(min_iou=0.0)).maps
    assert {int(label) for label in result.label_map.unique()} == {0, 1, 2}
    assert (result.label_map[0, 20:40, 10:28] == 1).all() and (result.label_map[0, 20:40, 36:54] == 2).all()
    empty = replace(maps, source=HardMaps(torch.zeros_like(labels), 3))
    assert refine_parts(empty, images, lambda image, logits: logits, RefineSettings()).refined == 0


def test_tracks_start_where_most_parts_are_and_come_back_by_name() -> None:
    labels = torch.zeros(4, 8, 8, dtype=torch.uint8)
    labels[1, 2:4], labels[2, 2:4], labels[2, 5:6], labels[3, 2:4], labels[3, 5:6] = 1, 1, 2, 1, 2
    peaks = torch.tensor([[0.0, 0.0], [0.9, 0.9], [0.4, 0.4], [0.6, 0.6]])
    maps = PartMaps(HardMaps(labels, 3), ("a", "b"), default_palette(2), peaks)
    start, masks = track_seeds(maps)
    assert start == 3 and masks.shape == (2, 8, 8) and masks.sum((1, 2)).tolist() == [16, 8]
    assert track_seeds(maps, 1)[1][1].sum() == 0
    with pytest.raises(SlimeError, match="No part is found in frame 0"):
        track_seeds(maps, 0)
    with pytest.raises(SlimeError, match="frames 0 to 3"):
        track_seeds(maps, 4)

    tracks = torch.stack([labels == 1, labels == 2], 1)
    tracks[2, 0] = True  # all of the frame: the smaller part wins
    found = tracked_maps(tracks, maps.names, maps.palette)
    assert torch.equal(found.label_map[3], labels[3]) and (found.label_map[2, 5] == 2).all()
    assert found.probabilities.shape == (4, 3, 8, 8) and found.peaks.tolist()[0] == [0, 0]
    with pytest.raises(SlimeError, match="2 objects, but there are 1 parts"):
        tracked_maps(tracks, ("a",), maps.palette[:1])
