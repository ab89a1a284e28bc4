"""The influence update in closed form for logistic regression."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ihvp.solvers import direct
from recsys_losses.baselines import result_dtype
from recsys_losses.if_dfm._losses import check_binary

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True)
class LogisticUpdate:
    """Influence update of a logistic regression.

    Args:
        rhs: Right-hand side b of the system, shape `(d + 1,)`, the bias last.
        delta_weight: Change of the weights, shape `(d,)`.
        delta_bias: Change of the bias, a scalar.
        new_weight: Weights after the update.
        new_bias: Bias after the update.
    """

    rhs: Tensor
    delta_weight: Tensor
    delta_bias: Tensor
    new_weight: Tensor
    new_bias: Tensor


def logistic_influence_update(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: float | Tensor,
    flipped: Sequence[int],
    added_features: Tensor | None = None,
    added_labels: Tensor | None = None,
    *,
    damping: float = 0.0,
    curvature_scale: float = 1.0,
    include_added_in_hessian: bool = False,
) -> LogisticUpdate:
    r"""Influence update of a logistic regression with mean cross-entropy, by a dense solve.

    With $\tilde x=(x,1)$, $p=\sigma(\tilde x^\top\theta)$, J the flipped rows and K the added ones

    $$(cH+\lambda I)\,\delta=b,\qquad b=\frac1n\Bigl[\sum_{j\in J}\tilde x_j-\sum_{k\in K}(p_k-y_k)\tilde x_k\Bigr],\qquad
    H=\frac1n\sum_ip_i(1-p_i)\tilde x_i\tilde x_i^\top$$

    An L2 term $\tfrac\mu2\lVert\theta\rVert^2$ of the training objective, bias included, is a damping of $\mu$ (with c = 1).

    Args:
        features: Training rows $x$, shape `(n, d)`, floating.
        labels: Labels the model was trained with, 0 or 1, shape `(n,)`.
        weight: Fitted weights, shape `(d,)`.
        bias: Fitted bias, a number or a scalar tensor.
        flipped: Rows whose label turns out to be 1; their label is 0 in `labels`.
        added_features: New rows, shape `(m, d)`, or None.
        added_labels: Their labels, 0 or 1, shape `(m,)`.
        damping: $\lambda\ge0$.
        curvature_scale: $c>0$: 1 is the method; 0.5 is what the authors' optimiser converges to, twice the step at
            $\lambda=0$.
        include_added_in_hessian: Add $\frac1n\sum_Kp(1-p)\tilde x\tilde x^\top$ to $H$; better where K is a large part of n.

    Returns:
        Right-hand side, change and new parameters. Without flips and additions the change is zero.

    Raises:
        ValueError: If shapes don't fit, a label isn't 0 or 1, a flipped row is out of range, repeated or already
            positive, `damping` or `curvature_scale` is out of range, or the system is singular (raise `damping`).

    Source: Ding et al., *Delayed Feedback Modeling with Influence Functions*, arXiv:2502.01669; Koh and Liang, ICML 2017.

    Examples:
        >>> import torch
        >>> x, y = torch.tensor([[-1.0], [1.0], [1.0], [-1.0]]), torch.tensor([0.0, 1.0, 0.0, 1.0])
        >>> update = logistic_influence_update(x, y, torch.zeros(1), 0.0, [2])  # one of two negatives converts
        >>> update.new_weight, update.new_bias
        (tensor([1.]), tensor(1.))
    """
    dtype = result_dtype(features=features, weight=weight)
    _check(features, labels, weight, flipped, added_features, added_labels)
    if not (damping >= 0 and math.isfinite(damping)):
        raise ValueError(f"damping must be a finite number >= 0, got {damping!r}")
    if not (curvature_scale > 0 and math.isfinite(curvature_scale)):
        raise ValueError(f"curvature_scale must be a positive finite number, got {curvature_scale!r}")
    n = features.shape[0]
    theta = torch.cat([weight.to(dtype), torch.as_tensor(bias, dtype=dtype, device=weight.device).reshape(1)]).detach()
    rows = _with_ones(features.detach().to(dtype))
    rhs = rows[torch.as_tensor(flipped, dtype=torch.long, device=rows.device)].sum(0)
    new = rows[:0] if added_features is None else _with_ones(added_features.detach().to(dtype))
    if added_labels is not None:
        rhs = rhs - new.T @ ((new @ theta).sigmoid() - added_labels.to(dtype))
    rhs = rhs / n
    if len(flipped) == 0 and len(new) == 0:
        return _moved(rhs, torch.zeros_like(theta), theta)
    curvature = _curvature(rows, theta)
    if include_added_in_hessian and len(new):
        curvature = curvature + _curvature(new, theta)
    delta = direct(curvature_scale / n * curvature, rhs, damping=damping).x
    return _moved(rhs, delta.to(dtype), theta)


def _moved(rhs: Tensor, delta: Tensor, theta: Tensor) -> LogisticUpdate:
    new = theta + delta
    return LogisticUpdate(rhs, delta[:-1], delta[-1], new[:-1], new[-1])


def _with_ones(features: Tensor) -> Tensor:
    return torch.cat([features, features.new_ones(len(features), 1)], 1)


def _curvature(rows: Tensor, theta: Tensor) -> Tensor:
    p = (rows @ theta).sigmoid()
    half = rows * (p * (1 - p)).sqrt().unsqueeze(1)
    return half.T @ half


def _check(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    flipped: Sequence[int],
    added_features: Tensor | None,
    added_labels: Tensor | None,
) -> None:
    if (
        features.ndim != 2
        or not len(features)
        or labels.shape != features.shape[:1]
        or weight.shape != features.shape[1:]
    ):
        shapes = f"{tuple(features.shape)}, {tuple(labels.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"expected features (n, d), labels (n,) and weight (d,) with n >= 1, got {shapes}")
    check_binary("labels", labels)
    if (added_features is None) != (added_labels is None):
        raise ValueError("added_features and added_labels belong together; one of them is None")
    if added_features is not None and added_labels is not None:
        if (
            added_features.ndim != 2
            or added_features.shape != (len(added_labels), len(weight))
            or added_labels.ndim != 1
        ):
            shapes = f"{tuple(added_features.shape)} and {tuple(added_labels.shape)}"
            raise ValueError(f"expected added_features (m, {len(weight)}) and added_labels (m,), got {shapes}")
        check_binary("added_labels", added_labels)
    if len(set(flipped)) != len(flipped):
        raise ValueError("flipped names a row twice")
    for row in flipped:
        if not 0 <= row < len(labels):
            raise ValueError(f"flipped must lie in 0..{len(labels) - 1}, got {row!r}")
        if labels[row] == 1:
            raise ValueError(f"flipped row {row} is already positive")
