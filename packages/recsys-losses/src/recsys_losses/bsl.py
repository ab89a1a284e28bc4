r"""BSL: bilateral softmax loss.

The softmax loss is robust to wrong negatives because its negative part is a log-expectation-exp. BSL gives the positives
the same form, over the rows of one user in the batch: positives that fit badly, and may be mis-clicks, lose weight.
Without rows of the same user in a batch, or a power other than 1, it is the plain softmax loss.

$$
\mathcal{L}(u)=-\tau_1\log\mathbb{E}_{i\sim P_u}\,e^{f(u,i)/\tau_1}+\tau_2\log\mathbb{E}_{j\sim N_u}\,e^{f(u,j)/\tau_2}
$$

Reference: J. Wu, J. Chen, J. Wu, W. Shi, J. Zhang, X. Wang, *BSL: Understanding and Improving Softmax Loss for
Recommendation*, ICDE 2024, arXiv:2312.12882, eq. 18 (`bilateral_softmax_loss`); the authors' code uses one temperature
and a free power instead (`bsl_loss`). Documentation: `docs/papers/recsys-losses/bsl.md`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import nn

from recsys_losses._checks import (
    SIMILARITIES,
    check_choice,
    check_finite,
    check_positive,
    check_reduction,
    check_scores,
    reduce,
    upcast,
)
from recsys_losses.baselines import result_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from recsys_losses._checks import Reduction, Similarity

__all__ = [
    "BSLLoss",
    "BilateralSoftmaxLoss",
    "bilateral_softmax_loss",
    "bsl_loss",
    "grouped_log_mean_exp",
    "in_batch_scores",
]

Mode = Literal["multi", "reweight", "single"]

MODES = ("multi", "reweight", "single")


def bsl_loss(
    pos_score: Tensor,
    neg_scores: Tensor,
    user: Tensor | None = None,
    *,
    temperature: float,
    power: float = 1.0,
    mode: Mode = "multi",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""BSL as in the authors' code: one temperature and a free power of the negative part.

    $$
    \begin{aligned}
    \text{multi: } & -\log\operatorname*{mean}_{b':\,u_{b'}=u_b}e^{p_{b'}/\tau}
        +r\log\operatorname*{mean}_j e^{n_{bj}/\tau}\\
    \text{single: } & -p_b/\tau+\log\operatorname*{mean}_j e^{n_{bj}/\tau}\\
    \text{reweight: } & -p_b/\tau+r\log\textstyle\sum_j e^{n_{bj}/\tau}
    \end{aligned}
    $$

    The positive isn't in the denominator, so the loss may be negative. With $r\neq1$ it isn't invariant to a constant
    added to all scores. `"multi"` with all users distinct and $r=1$ equals `"single"`; `"single"` ignores `power`.

    Args:
        pos_score: Scores $p$ of the observed items, shape `(B,)`, floating; not yet divided by the temperature.
        neg_scores: Scores $n$ of the negatives, shape `(B, N)`.
        user: User ids, shape `(B,)`, integer, in any order and range. Needed for mode `"multi"`, ignored otherwise.
        temperature: $\tau>0$; the published values lie between 0.08 and 0.3 (cosine).
        power: $r$, any finite number; the published values lie between 0.8 and 1.32.
        mode: `"multi"`, `"reweight"` or `"single"`.
        reduction: `"none"` gives shape `(B,)`, `"mean"` and `"sum"` a scalar.

    Returns:
        The loss in the promoted dtype of the scores; half precision is computed in float32.

    Raises:
        ValueError: If the shapes don't fit, B or N is 0, a dtype is wrong, `user` is missing in mode `"multi"`,
            `temperature` isn't a positive finite number, `power` isn't finite, or `mode` or `reduction` is unknown.

    Examples:
        >>> import torch
        >>> pos, neg = torch.tensor([0.4, 0.4]), torch.full((2, 3), 0.4)
        >>> bsl_loss(pos, neg, torch.tensor([7, 7]), temperature=0.1, power=1.5)  # equal scores s: (r - 1) s / tau
        tensor(2.)
    """
    _check_bsl(temperature, power, mode, reduction)
    check_scores(pos_score, neg_scores)
    dtype = result_dtype(pos_score=pos_score, neg_scores=neg_scores)
    if mode == "multi" and user is None:
        raise ValueError("mode 'multi' needs `user`")
    pos = upcast(pos_score) / temperature
    neg = (upcast(neg_scores) / temperature).logsumexp(1)
    if mode == "reweight":
        return reduce(power * neg - pos, reduction, dtype)
    neg = neg - math.log(neg_scores.shape[1])
    if user is None or mode == "single":
        return reduce(neg - pos, reduction, dtype)
    return reduce(power * neg - grouped_log_mean_exp(pos, user), reduction, dtype)


def bilateral_softmax_loss(
    pos_score: Tensor,
    neg_scores: Tensor,
    user: Tensor | None = None,
    *,
    tau_pos: float,
    tau_neg: float,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Bilateral softmax loss with two temperatures (Wu et al., 2024, eq. 18).

    $$
    \ell_b=-\tau_+\log\operatorname*{mean}_{b':\,u_{b'}=u_b}e^{p_{b'}/\tau_+}
      +\tau_-\log\operatorname*{mean}_j e^{n_{bj}/\tau_-}
    $$

    The group of a row, the rows of its user in the batch, stands for the user's positives. A group of one row doesn't
    depend on $\tau_+$. With $\tau_+\to\infty$ the positive part is the plain mean. Equal temperatures give $\tau$ times
    `bsl_loss` in mode `"multi"` with power 1.

    Args:
        pos_score: Scores $p$ of the observed items, shape `(B,)`, floating.
        neg_scores: Scores $n$ of the negatives, shape `(B, N)`.
        user: User ids, shape `(B,)`, integer, in any order and range; None makes every row its own group.
        tau_pos: $\tau_+>0$; smaller values discount badly fitting positives more.
        tau_neg: $\tau_->0$; smaller values weigh hard negatives more. Float32 rounding grows with it, to about
            $10^{-6}\tau_-$.
        reduction: `"none"` gives shape `(B,)`, `"mean"` and `"sum"` a scalar.

    Returns:
        The loss in the promoted dtype of the scores; half precision is computed in float32.

    Raises:
        ValueError: If the shapes don't fit, B or N is 0, a dtype is wrong, a temperature isn't a positive finite
            number, or `reduction` is unknown.

    Examples:
        >>> import torch
        >>> pos, neg = torch.tensor([0.5, 0.5]), torch.full((2, 3), 0.25)
        >>> bilateral_softmax_loss(pos, neg, torch.tensor([7, 7]), tau_pos=0.2, tau_neg=0.1)
        tensor(-0.2500)
    """
    _check_taus(tau_pos, tau_neg, reduction)
    check_scores(pos_score, neg_scores)
    dtype = result_dtype(pos_score=pos_score, neg_scores=neg_scores)
    pos = upcast(pos_score)
    if user is not None:
        pos = tau_pos * grouped_log_mean_exp(pos / tau_pos, user)
    neg = (upcast(neg_scores) / tau_neg).logsumexp(1) - math.log(neg_scores.shape[1])
    return reduce(tau_neg * neg - pos, reduction, dtype)


def grouped_log_mean_exp(x: Tensor, group: Tensor) -> Tensor:
    r"""Log of the mean exponential over the group of each element.

    $$y_b=\log\frac{1}{|G_b|}\sum_{b'\in G_b}e^{x_{b'}},\qquad G_b=\{b':g_{b'}=g_b\}$$

    Needs O(B) memory and one sort of the ids, no `(B, B)` mask, and doesn't wait for the device.

    Args:
        x: Values, shape `(B,)`, floating.
        group: Group ids, shape `(B,)`, integer; they need not be sorted or dense.

    Returns:
        Shape `(B,)`, in the dtype of `x`; half precision is computed in float32.

    Raises:
        ValueError: If the shapes aren't both `(B,)` with B >= 1, `x` isn't floating or `group` isn't integer.

    Examples:
        >>> import torch
        >>> grouped_log_mean_exp(torch.tensor([0.0, 5.0, 0.0]), torch.tensor([30, 2, 30]))
        tensor([0., 5., 0.])
    """
    if x.ndim != 1 or group.shape != x.shape:
        raise ValueError(f"expected (B,) values and (B,) group ids, got {tuple(x.shape)} and {tuple(group.shape)}")
    if x.shape[0] == 0:
        raise ValueError("empty batch: no values to group")
    if group.is_floating_point() or group.is_complex() or group.dtype == torch.bool:
        raise ValueError(f"group ids must be integers, got dtype {group.dtype}")
    dtype = result_dtype(x=x)
    x = upcast(x)
    segment = _segments(group)
    zeros = torch.zeros_like(x)
    size = zeros.index_add(0, segment, torch.ones_like(x))[segment]
    # The shift cancels in the result, so it carries no gradient; infinite values can't be shifted.
    shift = torch.full_like(x, -torch.inf).scatter_reduce(0, segment, x.detach(), "amax")[segment]
    below = x - torch.where(shift.isfinite(), shift, 0.0)
    mean = zeros.index_add(0, segment, below.exp())[segment] / size
    mean_m1 = zeros.index_add(0, segment, below.expm1())[segment] / size
    # Values close together, as with a large temperature, need log1p; values far apart would lose digits in it.
    log_mean = torch.where(mean_m1 > -0.5, mean_m1.clamp_min(-0.5).log1p(), mean.log())
    return (log_mean + torch.where(shift.isfinite(), shift, 0.0)).to(dtype)


def _segments(group: Tensor) -> Tensor:
    """Number the distinct ids from 0; `torch.unique` would wait for the device to learn how many there are."""
    ids, order = group.sort()
    first = torch.zeros_like(order[:1])
    number = torch.cat([first, (ids[1:] != ids[:-1]).cumsum(0)])
    return torch.zeros_like(order).scatter(0, order, number)


def in_batch_scores(user_emb: Tensor, pos_emb: Tensor, *, similarity: Similarity = "cosine") -> tuple[Tensor, Tensor]:
    r"""Scores of a batch whose negatives are the items of the other rows, as the losses of this module take them.

    Args:
        user_emb: User embeddings, shape `(B, d)`, floating.
        pos_emb: Embeddings of the observed items, shape `(B, d)`.
        similarity: `"cosine"` (a zero vector has score 0) or `"dot"`.

    Returns:
        `(pos_score, neg_scores)` of shapes `(B,)` and `(B, B - 1)`, in the promoted dtype of the embeddings. Row b of
        `neg_scores` holds the other columns in their order, duplicates of the row's item included. With B = 1 there
        are no negatives, which the losses reject.

    Raises:
        ValueError: If the shapes don't fit, B is 0, a dtype isn't floating, or `similarity` is unknown.

    Examples:
        >>> import torch
        >>> pos, neg = in_batch_scores(torch.eye(3), torch.eye(3))
        >>> pos, neg.shape
        (tensor([1., 1., 1.]), torch.Size([3, 2]))
    """
    check_choice("similarity", similarity, SIMILARITIES)
    if user_emb.ndim != 2 or pos_emb.shape != user_emb.shape:
        shapes = f"{tuple(user_emb.shape)} and {tuple(pos_emb.shape)}"
        raise ValueError(f"expected user_emb (B, d) and pos_emb (B, d), got {shapes}")
    batch = user_emb.shape[0]
    if batch == 0:
        raise ValueError("empty batch: user_emb has no rows")
    dtype = result_dtype(user_emb=user_emb, pos_emb=pos_emb)
    user, item = upcast(user_emb.to(dtype)), upcast(pos_emb.to(dtype))
    if similarity == "cosine":
        user, item = F.normalize(user, dim=-1), F.normalize(item, dim=-1)
    scores = (user @ item.T).to(dtype)
    # Without its first element the flat matrix is B - 1 runs of B off-diagonal scores, each followed by a diagonal one.
    others = scores.flatten()[1:].view(batch - 1, batch + 1)[:, :-1].reshape(batch, batch - 1)
    return scores.diagonal(), others


class BSLLoss(nn.Module):
    r"""Module form of `bsl_loss`.

    Args:
        temperature: $\tau>0$.
        power: $r$, any finite number.
        mode: `"multi"`, `"reweight"` or `"single"`.
        reduction: `"none"`, `"mean"` or `"sum"`.

    Raises:
        ValueError: If an option is out of range.

    Examples:
        >>> import torch
        >>> loss = BSLLoss(temperature=0.1, power=1.5)
        >>> loss(torch.tensor([0.4, 0.4]), torch.full((2, 3), 0.4), torch.tensor([7, 7]))
        tensor(2.)
    """

    def __init__(
        self, temperature: float, power: float = 1.0, mode: Mode = "multi", *, reduction: Reduction = "mean"
    ) -> None:
        super().__init__()
        _check_bsl(temperature, power, mode, reduction)
        self.temperature = temperature
        self.power = power
        self.mode = mode
        self.reduction = reduction

    def forward(self, pos_score: Tensor, neg_scores: Tensor, user: Tensor | None = None) -> Tensor:
        return bsl_loss(
            pos_score,
            neg_scores,
            user,
            temperature=self.temperature,
            power=self.power,
            mode=self.mode,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        options = f"temperature={self.temperature}, power={self.power}, mode={self.mode!r}"
        return f"{options}, reduction={self.reduction!r}"


class BilateralSoftmaxLoss(nn.Module):
    r"""Module form of `bilateral_softmax_loss`.

    Args:
        tau_pos: $\tau_+>0$ of the positives.
        tau_neg: $\tau_->0$ of the negatives.
        reduction: `"none"`, `"mean"` or `"sum"`.

    Raises:
        ValueError: If an option is out of range.

    Examples:
        >>> import torch
        >>> loss = BilateralSoftmaxLoss(tau_pos=0.2, tau_neg=0.1)
        >>> loss(torch.tensor([0.5, 0.5]), torch.full((2, 3), 0.25), torch.tensor([7, 7]))
        tensor(-0.2500)
    """

    def __init__(self, tau_pos: float, tau_neg: float, *, reduction: Reduction = "mean") -> None:
        super().__init__()
        _check_taus(tau_pos, tau_neg, reduction)
        self.tau_pos = tau_pos
        self.tau_neg = tau_neg
        self.reduction = reduction

    def forward(self, pos_score: Tensor, neg_scores: Tensor, user: Tensor | None = None) -> Tensor:
        return bilateral_softmax_loss(
            pos_score, neg_scores, user, tau_pos=self.tau_pos, tau_neg=self.tau_neg, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        return f"tau_pos={self.tau_pos}, tau_neg={self.tau_neg}, reduction={self.reduction!r}"


def _check_bsl(temperature: float, power: float, mode: str, reduction: str) -> None:
    check_positive("temperature", temperature)
    check_finite("power", power)
    check_choice("mode", mode, MODES)
    check_reduction(reduction)


def _check_taus(tau_pos: float, tau_neg: float, reduction: str) -> None:
    check_positive("tau_pos", tau_pos)
    check_positive("tau_neg", tau_neg)
    check_reduction(reduction)
