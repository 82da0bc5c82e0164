"""Scores and WAS maps against a dense numpy implementation of the paper's equations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slime.backbones.attention import Attention, attend_and_propagate, cross_scores, propagate, score_features, was_maps
from slime.images import resize_maps
from slime.paper.decoder import official_maps, token_maps


def attention(heads=3, head_dim=8, height=5, width=4, tokens=None, batch=2, seed=0) -> Attention:
    g = torch.Generator().manual_seed(seed)
    n = height * width
    q = torch.randn(batch, n, heads * head_dim, generator=g)
    k = torch.randn(batch, tokens or n, heads * head_dim, generator=g)
    return Attention(q, k, heads, height, width)


def dense_scores(a: Attention) -> np.ndarray:
    """Per-head Q K^T / sqrt(d): [B, heads, N, T]."""
    b, n, inner = a.query.shape
    d = inner // a.heads
    q = a.query.numpy().reshape(b, n, a.heads, d)
    k = a.key.numpy().reshape(b, -1, a.heads, d)
    return np.einsum("bnhd,bthd->bhnt", q, k) / np.sqrt(d)


def test_cross_scores_are_the_mean_over_heads() -> None:
    a = attention(tokens=7)
    expected = dense_scores(a).mean(1)[:, :, :4].transpose(0, 2, 1).reshape(2, 4, 5, 4)
    np.testing.assert_allclose(cross_scores(a, 4).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_score_features_are_linear_in_the_row() -> None:
    g = torch.Generator().manual_seed(1)
    rows, w_k = torch.randn(6, 10, generator=g), torch.randn(10, 24, generator=g)
    a = attention(tokens=6)._replace(key=(rows @ w_k)[None].expand(2, -1, -1))
    scores = torch.einsum("bdhw,kd->bkhw", score_features(a, w_k), rows)
    np.testing.assert_allclose(scores.numpy(), cross_scores(a, 6).numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("classes", [1, 3, 8, 11])
def test_was_is_self_attention_times_the_map(classes: int) -> None:
    """S = A w with A the softmax over keys, averaged over heads; also with more maps than the head is wide."""
    a = attention()
    maps = torch.rand(2, classes, 5, 4, generator=torch.Generator().manual_seed(2))
    scores = dense_scores(a)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    matrix = (weights / weights.sum(-1, keepdims=True)).mean(1)
    expected = np.einsum("bnm,bkm->bkn", matrix, maps.numpy().reshape(2, classes, 20)).reshape(2, classes, 5, 4)
    np.testing.assert_allclose(propagate(a, maps).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_order_two_propagates_twice_and_layers_are_averaged() -> None:
    first, second = attention(seed=4), attention(seed=5)
    maps = torch.rand(2, 3, 5, 4)
    once = (propagate(first, maps) + propagate(second, maps)) / 2
    twice = (propagate(first, once) + propagate(second, once)) / 2
    torch.testing.assert_close(was_maps([first, second], maps, 1), once)
    torch.testing.assert_close(was_maps([first, second], maps, 2), twice)
    assert was_maps([], maps, 2) is maps


def test_propagation_keeps_probabilities() -> None:
    maps = torch.rand(2, 5, 5, 4).softmax(1)
    out = propagate(attention(), maps)
    torch.testing.assert_close(out.sum(1), torch.ones(2, 5, 4), rtol=1e-4, atol=1e-4)


def test_one_call_attends_and_propagates() -> None:
    a, maps, values = attention(), torch.rand(2, 5, 10, 8).softmax(1), torch.randn(2, 20, 24)
    own, spread = attend_and_propagate(a, values, maps)
    torch.testing.assert_close(spread, propagate(a, maps), rtol=1e-4, atol=1e-5)
    matrix = torch.from_numpy(dense_scores(a)).float().softmax(-1)
    expected = (matrix @ values.unflatten(-1, (3, 8)).transpose(1, 2)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


def test_official_read_out_by_hand() -> None:
    """All-token softmax per head, gate 0.2, first passed class above its mean, WAS stretched to the map's range by its
    own range at eight times the size."""
    cross, self_ = attention(tokens=6, batch=1, seed=8), attention(batch=1, seed=9)
    sharp = cross._replace(query=cross.query * 3)
    scores = dense_scores(sharp)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    probabilities = (weights / weights.sum(-1, keepdims=True)).mean(1)[0].T[:4]
    matrix_scores = dense_scores(self_)
    matrix = np.exp(matrix_scores - matrix_scores.max(-1, keepdims=True))
    matrix = (matrix / matrix.sum(-1, keepdims=True)).mean(1)[0]
    expected = np.zeros((4, 20))
    first = True
    for index, values in enumerate(probabilities):
        if values.max() < 0.2:
            continue
        kept = np.where(values > values.mean(), values, 0) if first else values
        first = False
        was = matrix @ kept
        full = resize_maps(torch.from_numpy(was.reshape(1, 1, 5, 4)), (40, 32)).numpy()
        expected[index] = (was - full.min()) / (full.max() - full.min()) * (values.max() - values.min()) + values.min()
    found = official_maps(token_maps([sharp], 4, (5, 4)), [self_])[0].reshape(4, 20).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    faint = sharp._replace(query=sharp.query * 0)
    assert not official_maps(token_maps([faint], 4, (5, 4)), [self_]).any(), "1/6 everywhere is below the gate"


def test_no_square_tensor_is_formed() -> None:
    """64 x 64 positions: a dense attention matrix of one head would take 64 MiB; autograd may save no such thing."""
    a = attention(heads=2, head_dim=8, height=64, width=64, batch=1)
    maps = torch.rand(1, 3, 64, 64, requires_grad=True)
    largest = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        propagate(a, maps).sum().backward()
    assert 0 < largest <= 4096 * 16 * 2
