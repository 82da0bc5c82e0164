"""The paper's metric on label maps worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from slime.parts.metrics import boundary_f, evaluate

TRUTH_A = np.array([[0, 0, 1, 1], [0, 0, 1, 1]])
FOUND_A = np.array([[0, 0, 0, 1], [0, 0, 1, 1]])  # class 0: 4/5, class 1: 3/4
TRUTH_B = np.array([[0, 0, 0, 0], [2, 2, 2, 2]])
FOUND_B = np.array([[0, 0, 0, 1], [2, 2, 0, 0]])  # class 0: 3/6, class 2: 2/4, class 1 absent and skipped


def test_per_image_and_class_absent_skipped() -> None:
    scores = evaluate([FOUND_A, FOUND_B], [TRUTH_A, TRUTH_B], 3)
    np.testing.assert_allclose(scores.per_class, [(4 / 5 + 3 / 6) / 2, 3 / 4, 2 / 4])
    assert scores.part_miou == pytest.approx((3 / 4 + 2 / 4) / 2)
    assert scores.miou == pytest.approx(((4 / 5 + 3 / 6) / 2 + 3 / 4 + 2 / 4) / 3)


def test_pooled_counts_false_positives_of_absent_classes() -> None:
    scores = evaluate([FOUND_A, FOUND_B], [TRUTH_A, TRUTH_B], 3)
    np.testing.assert_allclose(scores.pooled, [(4 + 3) / (5 + 6), 3 / (4 + 1), 2 / 4])


def test_ignored_pixels_do_not_count() -> None:
    truth = np.array([[0, 255, 1, 1]])
    scores = evaluate([np.array([[0, 1, 1, 0]])], [truth], 2)
    np.testing.assert_allclose(scores.per_class, [1 / 2, 1 / 2])


def test_class_that_never_occurs_is_nan_and_left_out() -> None:
    scores = evaluate([np.zeros((2, 2), int)], [np.zeros((2, 2), int)], 3)
    assert scores.per_class[0] == 1 and np.isnan(scores.per_class[1:]).all()
    assert scores.miou == 1


def test_boundary_f_counts_hits_within_the_tolerance() -> None:
    truth = np.zeros((100, 100), int)
    truth[20:60, 20:60] = 1
    shifted = np.roll(truth, 1, axis=1)
    assert boundary_f(truth, truth, 2) == 1
    assert boundary_f(shifted, truth, 2) == 1, "one pixel is within 1 % of the diagonal, 1.41 pixels"
    far = boundary_f(np.roll(truth, 10, axis=1), truth, 2)
    assert 0.2 < far < 0.6, "the horizontal edges still meet, the vertical ones do not"
    assert boundary_f(np.zeros_like(truth), truth, 2) == 0
    assert np.isnan(boundary_f(truth, np.zeros_like(truth), 2))


def test_mismatch_is_refused() -> None:
    with pytest.raises(ValueError, match="differ in size"):
        evaluate([np.zeros((2, 2))], [np.zeros((2, 3))], 2)
    with pytest.raises(ValueError, match="1 predictions for 2 truths"):
        evaluate([np.zeros((2, 2))], [np.zeros((2, 2))] * 2, 2)
