"""Putting a solution to use."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ihvp._trees import Pytree, all_finite, leaves_like, leaves_of, norm, rebuild

if TYPE_CHECKING:
    from torch import Tensor


def apply_delta(params: Pytree, delta: Pytree, *, max_norm: float | None = None) -> Pytree:
    r"""Add an update to parameters, out of place, with an optional limit on its length.

    $$\theta_{\text{new}}=\theta+\delta\cdot\min\big(1,\ \text{max\_norm}/\|\delta\|\big)$$

    Args:
        params: $\theta$: a tensor, or a dict, list or tuple of tensors.
        delta: $\delta$, same structure, for instance `SolveResult.x`.
        max_norm: Trust region: largest Euclidean length of the update over all tensors, > 0. None means no limit.

    Returns:
        New tensors without a graph, in the dtype of `params`; the sum is made in the wider dtype. With a dict of a
        module's parameters, `module.load_state_dict(new, strict=False)` takes them over.

    Raises:
        ValueError: If the structures differ, `delta` is not finite or `max_norm` is not positive.

    Examples:
        >>> import torch
        >>> apply_delta(torch.tensor([1.0, 1.0]), torch.tensor([3.0, 4.0]), max_norm=1.0)
        tensor([1.6000, 1.8000])
    """
    if max_norm is not None and not (max_norm > 0 and math.isfinite(max_norm)):
        raise ValueError(f"max_norm must be a positive finite number, got {max_norm!r}")
    theta = leaves_of(params, "params")
    step = [leaf.detach() for leaf in leaves_like(params, delta, "delta", "params")]
    if not all_finite(step):
        raise ValueError("delta must be finite, it holds infinite or NaN values")
    length = norm(step)
    factor = max_norm / length if max_norm is not None and length > max_norm else 1.0
    return rebuild(params, [_moved(p.detach(), d, factor) for p, d in zip(theta, step, strict=True)])


def _moved(p: Tensor, d: Tensor, factor: float) -> Tensor:
    return (p + factor * d.to(p.device)).to(p.dtype)
