"""Compute cross-attention scores and weighted accumulated self-attention (WAS) from captured queries and keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..images import resize_maps


class Attention(NamedTuple):
    """Inputs of one attention layer: ``query`` [B, N, heads*d], ``key`` [B, T, heads*d], N = height*width.

    In cross-attention T includes a context's extra tokens, in self-attention it is N.
    """

    query: Tensor
    key: Tensor
    heads: int
    height: int
    width: int

    def to(self, device: torch.device | str, copy: bool = False) -> Attention:
        """Return the inputs on another device, as tensors of their own with ``copy``."""
        return self._replace(
            query=self.query.detach().to(device, copy=copy), key=self.key.detach().to(device, copy=copy)
        )

    def of_image(self, index: int) -> Attention:
        """Return the inputs of one image, as a batch of one."""
        return self._replace(query=self.query[index, None], key=self.key[index, None])

    @property
    def nbytes(self) -> int:
        """Bytes of query and key."""
        return self.query.nbytes + self.key.nbytes


def cross_scores(attention: Attention, count: int, first: int = 0) -> Tensor:
    """Return scores Q K^T / sqrt(d) of ``count`` tokens from ``first``, mean over heads: [B, count, h, w] (eq. 1).

    The mean over heads of per-head products is the product over all channels divided by the number of heads.
    """
    query, key = attention.query.float(), attention.key[:, first : first + count].float()
    scores = query @ key.transpose(1, 2) * _score_factor(attention)
    return scores.transpose(1, 2).unflatten(2, (attention.height, attention.width))


def score_features(attention: Attention, key_projection: Tensor) -> Tensor:
    """Return the linear feature map phi with score_k = phi . e_k for any token embedding e_k: [B, D, h, w].

    Args:
        attention: a captured cross-attention layer.
        key_projection: the layer's W_K^T, [D, heads*d].
    """
    features = attention.query.float() @ key_projection.float().T * _score_factor(attention)
    return features.transpose(1, 2).unflatten(2, (attention.height, attention.width))


def _score_factor(attention: Attention) -> float:
    head_dim = attention.query.shape[-1] // attention.heads
    return head_dim**-0.5 / attention.heads


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Disable cuDNN's attention: some versions of it return NaN gradients."""
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        yield


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Compute plain attention of query [B, N, heads*d], key and value [B, T, heads*d]: [B, N, heads*d]."""
    query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def propagate(attention: Attention, maps: Tensor) -> Tensor:
    """Compute the WAS maps of one layer: A w for every map, A the self-attention averaged over heads (paper eq. 3).

    This is ordinary scaled-dot-product attention with the maps as values, so no N x N tensor is formed. The fused
    kernels need queries, keys and values of one width, a multiple of 8; they are padded with zeros.

    Args:
        attention: a captured self-attention layer, N = h*w.
        maps: [B, K, h', w'], resized to the layer's h x w first.

    Returns:
        [B, K, h, w].
    """
    heads, count = attention.heads, maps.shape[1]
    query, key = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (attention.query, attention.key))
    head_dim = query.shape[-1]
    width = max(head_dim, -(-count // 8) * 8)
    if width > head_dim:
        query, key = (F.pad(t, (0, width - head_dim)) for t in (query, key))
    out = F.scaled_dot_product_attention(query, key, _columns(attention, maps, width), scale=head_dim**-0.5)
    return _mean_of_heads(attention, out[..., :count])


def attend_and_propagate(attention: Attention, values: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the layer's own output [B, N, heads*d] and :func:`propagate` of the maps, in one call instead of two.

    The maps are further columns of the layer's values [B, N, heads*d], so the attention matrix is computed once.
    """
    heads, count = attention.heads, maps.shape[1]
    query, key, values = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (*attention[:2], values))
    head_dim, more = query.shape[-1], -(-count // 8) * 8
    query, key = (F.pad(t, (0, more)) for t in (query, key))
    values = torch.cat([values, _columns(attention, maps, more)], -1)
    out = F.scaled_dot_product_attention(query, key, values, scale=head_dim**-0.5)
    own = out[..., :head_dim].transpose(1, 2).flatten(2)
    return own, _mean_of_heads(attention, out[..., head_dim : head_dim + count])


def _columns(attention: Attention, maps: Tensor, width: int) -> Tensor:
    """Return maps [B, K, h', w'] as values [B, heads, N, width] of the layer, padded with zeros."""
    columns = resize_maps(maps, (attention.height, attention.width)).flatten(2).transpose(1, 2)
    columns = F.pad(columns.to(attention.query.dtype), (0, width - maps.shape[1]))
    return columns[:, None].expand(-1, attention.heads, -1, -1)


def _mean_of_heads(attention: Attention, out: Tensor) -> Tensor:
    """Average [B, heads, N, K] over the heads: [B, K, h, w]."""
    return out.float().mean(1).transpose(1, 2).unflatten(2, (attention.height, attention.width))


def was_maps(attentions: Sequence[Attention], maps: Tensor, order: int = 1) -> Tensor:
    """Apply the mean over layers of :func:`propagate` ``order`` times to maps [B, K, h, w]."""
    size = (maps.shape[-2], maps.shape[-1])
    for _ in range(order if attentions else 0):
        maps = torch.stack([resize_maps(propagate(attention, maps), size) for attention in attentions]).mean(0)
    return maps
