"""The loss that keeps queries of the test bed from varying in one direction alone."""

from __future__ import annotations

import torch

from tools.places import spread_alike


def test_agreement_in_every_direction_is_best() -> None:
    generator = torch.Generator().manual_seed(0)
    features, others = torch.randn(2, 4000, 16, generator=generator)
    apart = float(spread_alike(features, features))
    assert apart < 0.05 and float(spread_alike(features, others)) > 0.9
    stretched = features * torch.linspace(-4, 4, 16).exp()  # one direction outgrows the others
    repeated = features[:, :1] + 0.01 * features  # all dimensions say the same
    assert float(spread_alike(stretched, stretched)) > 2 * apart and float(spread_alike(repeated, repeated)) > 2 * apart
