"""Generated implicit feedback with known preferences and a known exposure bias, for examples, tests and benchmarks.

A user clicks an item that was shown to him and that he likes; both are drawn from known probabilities, and the test
pairs are drawn from what he likes whether it was shown or not. What a method loses to exposure bias is therefore
measured exactly, which no click log allows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from recsys_losses._checks import check_positive
from recsys_losses._interactions import InteractionData
from recsys_losses._splits import hold_out_validation, inject_false_positives

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["SyntheticFeedback", "synthetic_feedback"]


@dataclass(frozen=True, eq=False)
class SyntheticFeedback:
    """Generated feedback together with what generated it.

    Args:
        data: Clicks split into train and validation pairs (both biased by exposure), and the unbiased test pairs.
        relevance: (U, I) float64, probability that the user likes the item.
        relevant: BoolTensor (U, I), whether he does; the test pairs are a uniform sample of these.
        exposure: (U, I) float64, probability that the item is shown to the user: the product of the next two, at most 1.
        user_activity: (U,) float64, log-normal.
        item_exposure: (I,) float64, power law over the items in random order, largest value 1.
    """

    data: InteractionData
    relevance: Tensor
    relevant: Tensor
    exposure: Tensor
    user_activity: Tensor
    item_exposure: Tensor

    def __repr__(self) -> str:
        return f"SyntheticFeedback({self.data})"


def synthetic_feedback(
    *,
    num_users: int = 1000,
    num_items: int = 400,
    dim: int = 3,
    density: float = 0.2,
    sharpness: float = 3.0,
    quality_spread: float = 0.3,
    exposure_power: float = 0.9,
    exposure_share: float = 0.2,
    activity_spread: float = 0.4,
    test_share: float = 0.2,
    valid_share: float = 0.1,
    noise_rate: float = 0.0,
    seed: int = 0,
) -> SyntheticFeedback:
    r"""Generate clicks with known preferences and a known exposure bias.

    Preferences: user and item factors $\theta_u, \phi_i \sim N(0, 1_d)$, item quality $q_i \sim N(0, 1)$,
    $$r_{ui} = \sigma\big(\text{sharpness}\; \theta_u^\top \phi_i / \sqrt{d} + \text{quality\_spread}\; q_i + b\big),$$
    b such that the mean of r is `density`. Exposure: $e_{ui} = \min(1, a_u p_i)$ with $p_i$ = rank^(-exposure_power) for
    ranks in random order, $a_u$ log-normal with deviation `activity_spread`, scaled so that the mean of e is
    `exposure_share`. Independent draws then decide
    $$R_{ui} \sim r_{ui}, \qquad T_{ui} \sim \text{test\_share}, \qquad O_{ui} \sim e_{ui}.$$
    Test pairs are R and T: uniform over what a user likes, independent of exposure. Clicks are R, O and not T; a share of
    them is validation. Where e < 1, clicks follow the exposure model of CPR with alpha = 0.

    The defaults give about 12 train clicks and 16 test pairs per user, popularity counts spread over two orders of
    magnitude, and few enough clicks per preference that ranking by click probability is clearly worse than ranking by
    relevance. Memory and time grow with U * I: meant for up to some 10^7 cells.

    Args:
        num_users: Number of users U, at least 1.
        num_items: Number of items I, at least 1.
        dim: Number of factors d, at least 1.
        density: Mean relevance, in (0, 1).
        sharpness: Scale of the preferences, at least 0; large values make r nearly 0 or 1.
        quality_spread: Scale of what all users agree on, at least 0.
        exposure_power: Exponent of the power law, at least 0; 0 shows all items alike.
        exposure_share: Mean exposure, in (0, 1).
        activity_spread: Standard deviation of log activity, at least 0.
        test_share: Probability that a relevant pair is a test pair, in (0, 1).
        valid_share: Share of each user's clicks (floor) that is validation, in (0, 1).
        noise_rate: False positives per click, at least 0: items that are not clicked and not in test, see
            `inject_false_positives`; validation pairs are drawn after they are added.
        seed: Seed of everything.

    Returns:
        The feedback and what generated it.

    Raises:
        ValueError: An argument out of range, or so few cells that no click or no test pair is drawn.

    Examples:
        >>> feedback = synthetic_feedback(num_users=50, num_items=40)
        >>> feedback.relevance.shape
        torch.Size([50, 40])
        >>> bool(feedback.relevant[feedback.data.test[0], feedback.data.test[1]].all())
        True
    """
    for name, size in (("num_users", num_users), ("num_items", num_items), ("dim", dim)):
        if not size >= 1:
            raise ValueError(f"{name} must be at least 1, got {size!r}")
    for name, share in (
        ("density", density),
        ("exposure_share", exposure_share),
        ("test_share", test_share),
        ("valid_share", valid_share),
    ):
        if not 0 < share < 1:
            raise ValueError(f"{name} must be between 0 and 1 (both excluded), got {share!r}")
    for name, scale in (
        ("sharpness", sharpness),
        ("quality_spread", quality_spread),
        ("exposure_power", exposure_power),
        ("activity_spread", activity_spread),
        ("noise_rate", noise_rate),
    ):
        if scale != 0:
            check_positive(name, scale)
    generator = torch.Generator().manual_seed(seed)
    affinity = _normal(generator, num_users, dim) @ _normal(generator, dim, num_items) / dim**0.5
    logits = sharpness * affinity + quality_spread * _normal(generator, num_items)
    relevance = torch.sigmoid(logits + _solve(lambda b: torch.sigmoid(logits + b), density))
    activity = activity_spread * _normal(generator, num_users)
    item_exposure = (1 + torch.randperm(num_items, generator=generator)).double() ** -exposure_power
    log_product = activity.unsqueeze(1) + item_exposure.log()
    scale = _solve(lambda c: (log_product + c).clamp(max=0).exp(), exposure_share)
    exposure = (log_product + scale).clamp(max=0).exp()

    relevant = _happens(relevance, generator)
    is_test = relevant & _happens(torch.full_like(relevance, test_share), generator)
    clicked = relevant & ~is_test & _happens(exposure, generator)
    return SyntheticFeedback(
        data=_assemble(clicked, is_test, valid_share, noise_rate, generator),
        relevance=relevance,
        relevant=relevant,
        exposure=exposure,
        user_activity=(activity + scale).exp(),
        item_exposure=item_exposure,
    )


def _assemble(
    clicked: Tensor, is_test: Tensor, valid_share: float, noise_rate: float, generator: torch.Generator
) -> InteractionData:
    num_users, num_items = clicked.shape
    train, test = (mask.nonzero().T.contiguous() for mask in (clicked, is_test))
    if train.shape[1] == 0 or test.shape[1] == 0:
        raise ValueError(
            f"{num_users} x {num_items} cells gave {train.shape[1]} clicks and {test.shape[1]} test pairs; "
            "raise num_users, num_items, density or exposure_share"
        )
    data = InteractionData(num_users, num_items, train=train, test=test)
    if noise_rate > 0:
        data = inject_false_positives(data, noise_rate, generator)
    return hold_out_validation(data, share=valid_share, generator=generator)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def _happens(probability: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(probability.shape, dtype=torch.float64, generator=generator) < probability


def _solve(increasing: Callable[[float], Tensor], target: float) -> float:
    """Return x at which the mean of an increasing function equals the target, by bisection."""
    low, high = -1000.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float(increasing(middle).mean()) < target else (low, middle)
    return (low + high) / 2
