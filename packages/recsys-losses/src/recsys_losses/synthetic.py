"""Generated implicit feedback with known preferences and a known exposure bias, for examples, tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from recsys_losses._interactions import InteractionData
from recsys_losses._splits import hold_out_validation, inject_false_positives

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


@dataclass(frozen=True, eq=False)
class SyntheticFeedback:
    """Generated feedback together with what generated it.

    Args:
        data: Clicks split into train and validation pairs (both biased by exposure), and the unbiased test pairs.
        relevance: (U, I) float64, probability that the user likes the item.
        relevant: BoolTensor (U, I), whether he does; the test pairs are a uniform sample of these.
        exposure: (U, I) float64, probability that the item was shown to the user: min(1, activity * item exposure).
        item_exposure: (I,) float64, power law over the items in random order.
        user_activity: (U,) float64, log-normal.
    """

    data: InteractionData
    relevance: Tensor
    relevant: Tensor
    exposure: Tensor
    item_exposure: Tensor
    user_activity: Tensor


def synthetic_feedback(
    *,
    num_users: int = 600,
    num_items: int = 800,
    dim: int = 6,
    density: float = 0.1,
    sharpness: float = 4.0,
    quality_spread: float = 0.5,
    exposure_power: float = 0.9,
    exposure_share: float = 0.35,
    activity_spread: float = 0.4,
    test_share: float = 0.2,
    valid_share: float = 0.1,
    noise_rate: float = 0.0,
    seed: int = 0,
) -> SyntheticFeedback:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    def happens(probability: Tensor) -> Tensor:
        return torch.rand(probability.shape, dtype=torch.float64, generator=generator) < probability

    affinity = normal(num_users, dim) @ normal(dim, num_items) / dim**0.5
    logits = sharpness * affinity + quality_spread * normal(num_items)
    relevance = torch.sigmoid(logits + _solve(lambda x: torch.sigmoid(logits + x).mean(), density, -100.0, 100.0))
    user_activity = torch.exp(activity_spread * normal(num_users))
    rank = torch.randperm(num_items, generator=generator) + 1
    item_exposure = rank.double() ** -exposure_power
    product = torch.outer(user_activity, item_exposure)
    scale = torch.exp(torch.tensor(_solve(lambda x: (product * torch.tensor(x).exp()).clamp(max=1).mean(), exposure_share, -50.0, 50.0)))
    user_activity = user_activity * scale
    exposure = (product * scale).clamp(max=1)
    relevant = happens(relevance)
    is_test = relevant & happens(torch.full_like(relevance, test_share))
    clicked = relevant & ~is_test & happens(exposure)
    data = InteractionData(num_users, num_items, train=clicked.nonzero().T.contiguous(), test=is_test.nonzero().T.contiguous())
    data = hold_out_validation(data, share=valid_share, generator=generator)
    return SyntheticFeedback(data, relevance, relevant, exposure, item_exposure, user_activity)


def _solve(f, target: float, low: float, high: float) -> float:
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) < target else (low, middle)
    return (low + high) / 2
