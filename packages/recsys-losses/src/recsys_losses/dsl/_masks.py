"""Masks of sparse tensors: how they are drawn, and how an update moves their non-zeros."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
import torch

from recsys_losses._checks import upcast

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    Array = NDArray[Any]


class DSLUpdate(NamedTuple):
    """What `dsl_update_mask` returns.

    Args:
        mask: The new mask, bool, of the shape of the weights, with as many ones as the old one.
        weight: The weights times the new mask; positions that were inactive start at 0.
        num_pruned: How many positions were pruned, and as many grown; a position may be both.
        num_nonzero: Number of ones in the mask.
    """

    mask: Tensor
    weight: Tensor
    num_pruned: int
    num_nonzero: int


@overload
def cosine_update_ratio(step: int, total_steps: int, initial: float = ..., minimum: float = ...) -> float: ...
@overload
def cosine_update_ratio(step: Tensor, total_steps: int, initial: float = ..., minimum: float = ...) -> Tensor: ...
@overload
def cosine_update_ratio(step: Array, total_steps: int, initial: float = ..., minimum: float = ...) -> Array: ...
def cosine_update_ratio(
    step: int | Tensor | Array, total_steps: int, initial: float = 0.5, minimum: float = 0.005
) -> float | Tensor | Array:
    r"""Return the share of the non-zeros that the mask update of a step prunes.

    $$r_t=r_{\min}+\tfrac12(r_0-r_{\min})\Big(1+\cos\frac{\pi t}{T}\Big)$$

    Args:
        step: $t$ in 0..T, an integer, or a tensor or numpy array of them.
        total_steps: $T\ge1$.
        initial: $r_0$ in [0, 1].
        minimum: $r_{\min}$ in [0, 1], reached at $t=T$; the paper's eq. (2) has 0, the code 0.005.

    Returns:
        A number, or a float64 tensor or array of the shape of `step`.

    Raises:
        ValueError: If a ratio is outside [0, 1], `total_steps` below 1 or a step outside 0..T.

    Reference: the cosine decay of the authors' code.

    Examples:
        >>> cosine_update_ratio(0, 100), cosine_update_ratio(100, 100)
        (0.5, 0.005)
    """
    check_ratio("initial ratio", initial)
    check_ratio("minimum ratio", minimum)
    check_count("total_steps", total_steps)
    if isinstance(step, np.ndarray):
        return cosine_update_ratio(torch.as_tensor(step), total_steps, initial, minimum).numpy()
    if isinstance(step, torch.Tensor):
        if step.numel() and not (step.min() >= 0 and step.max() <= total_steps):
            raise ValueError(f"step must be in 0..{total_steps} (total_steps), got {step.min()} to {step.max()}")
        return minimum + 0.5 * (initial - minimum) * (1 + torch.cos(math.pi * step.double() / total_steps))
    if not 0 <= step <= total_steps:
        raise ValueError(f"step must be in 0..{total_steps} (total_steps), got {step!r}")
    return minimum + 0.5 * (initial - minimum) * (1 + math.cos(math.pi * step / total_steps))


def random_mask(
    shape: Sequence[int], density: float, *, exact: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    r"""Draw a random mask.

    Args:
        shape: Shape of the mask.
        density: $\rho$ in (0, 1].
        exact: Draw exactly `round(density * n)` ones; otherwise every element is one with probability $\rho$, as in the
            authors' code.
        generator: Source of randomness, which also says on which device; None uses torch's default CPU generator.

    Returns:
        Bool tensor.

    Raises:
        ValueError: If `density` isn't in (0, 1].

    Examples:
        >>> int(random_mask((10, 8), 0.3, exact=True).sum())
        24
    """
    check_density(density)
    device = "cpu" if generator is None else generator.device
    if not exact:
        return torch.rand(tuple(shape), generator=generator, device=device) < density
    mask = torch.zeros(tuple(shape), dtype=torch.bool, device=device)
    order = torch.randperm(mask.numel(), generator=generator, device=device)
    mask.view(-1)[order[: round(density * mask.numel())]] = True
    return mask


def magnitude_masks(named_weights: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    r"""Keep the largest weights of all tensors together, so that densities may differ between tensors.

    Args:
        named_weights: Weights by name, on one device.
        density: $\rho$ in (0, 1] of all elements together.

    Returns:
        A bool mask for every name, with `round(density * n)` ones in all. Of equal magnitudes the first are kept, in
        the order of the names and of the flat index.

    Raises:
        ValueError: If `density` isn't in (0, 1] or there are no weights.

    Examples:
        >>> import torch
        >>> masks = magnitude_masks({"a": torch.tensor([3.0, -4.0]), "b": torch.tensor([1.0, 0.5])}, density=0.5)
        >>> masks["a"].tolist(), masks["b"].tolist()
        ([True, True], [False, False])
    """
    check_density(density)
    if not named_weights:
        raise ValueError("named_weights is empty: there is nothing to mask")
    weights = [weight.detach() for weight in named_weights.values()]
    magnitude = torch.cat([upcast(weight).abs().flatten() for weight in weights])
    chosen = largest(magnitude, round(density * magnitude.numel()))
    parts = torch.split(chosen, [weight.numel() for weight in weights])
    return {name: part.view(weight.shape) for name, part, weight in zip(named_weights, parts, weights, strict=True)}


def magnitude_prune(weight: Tensor, mask: Tensor, ratio: float) -> tuple[Tensor, int]:
    r"""Deactivate the smallest active weights.

    With k active positions and $p=\lceil r k\rceil$, every active weight whose magnitude isn't above the p-th smallest
    active magnitude goes. Ties at the threshold go as well, so more than p may; weights grown at 0 that haven't moved
    go first.

    Args:
        weight: Weights, floating, any shape; values at inactive positions are ignored.
        mask: Active positions, bool or 0/1, of the same shape.
        ratio: $r$ in [0, 1]; with 0 nothing is pruned.

    Returns:
        The new mask (bool) and the number of pruned positions.

    Raises:
        ValueError: If the ratio is outside [0, 1], the shapes differ or the mask isn't binary.

    Examples:
        >>> import torch
        >>> magnitude_prune(torch.tensor([0.3, -0.1, 0.0, 0.9]), torch.tensor([True, True, False, True]), 0.5)
        (tensor([False, False, False,  True]), 2)
    """
    check_ratio("ratio", ratio)
    active = as_mask(mask, weight.shape).clone(memory_format=torch.contiguous_format)
    flat = active.view(-1)
    position = flat.nonzero().squeeze(1)
    count = math.ceil(ratio * position.numel())
    if count == 0:
        return active, 0
    magnitude = upcast(weight.detach().reshape(-1)[position]).abs_()
    pruned = position[magnitude <= magnitude.kthvalue(count).values]
    flat[pruned] = False
    return active, pruned.numel()


def gradient_grow(grad: Tensor, mask: Tensor, num_grow: int) -> Tensor:
    r"""Activate the inactive positions whose gradients are largest.

    Only inactive positions are candidates, also where their gradients are 0: the mask has exactly `num_grow` ones more
    than before.

    Args:
        grad: Gradient of the loss with respect to the weights, floating; a sparse one counts as 0 elsewhere.
        mask: Active positions, bool or 0/1, of the same shape.
        num_grow: How many positions to activate, at most as many as are inactive.

    Returns:
        The new mask (bool). Of equal magnitudes the positions of the lowest flat index are taken.

    Raises:
        ValueError: If the shapes differ, the mask isn't binary, `num_grow` doesn't fit, or a gradient is NaN.

    Examples:
        >>> import torch
        >>> mask = torch.tensor([True, False, False, False])
        >>> gradient_grow(torch.tensor([9.0, 0.1, -0.5, 0.1]), mask, 2)
        tensor([ True,  True,  True, False])
    """
    active, candidate = _candidates(as_mask(mask, grad.shape), num_grow)
    if num_grow == 0:
        return active
    dense = grad.detach() if grad.layout == torch.strided else grad.detach().to_dense()
    magnitude = upcast(dense.reshape(-1)[candidate]).abs_()
    if bool(magnitude.isnan().any()):
        raise ValueError("grad holds NaN; no positions can be chosen by it")
    active.view(-1)[candidate[largest(magnitude, num_grow)]] = True
    return active


def random_grow(mask: Tensor, num_grow: int, generator: torch.Generator | None = None) -> Tensor:
    """Activate inactive positions at random, exactly `num_grow` of them.

    Args:
        mask: Active positions, bool or 0/1.
        num_grow: How many positions to activate, at most as many as are inactive.
        generator: Source of randomness; None uses torch's default generator.

    Returns:
        The new mask (bool).

    Raises:
        ValueError: If the mask isn't binary or `num_grow` doesn't fit.

    Examples:
        >>> import torch
        >>> int(random_grow(torch.tensor([True, False, False, False]), 2).sum())
        3
    """
    active, candidate = _candidates(as_mask(mask, mask.shape), num_grow)
    source = active.device if generator is None else generator.device
    order = torch.randperm(candidate.numel(), generator=generator, device=source)[:num_grow]
    active.view(-1)[candidate[order.to(active.device)]] = True
    return active


def dsl_update_mask(weight: Tensor, mask: Tensor, grad: Tensor, *, ratio: float) -> DSLUpdate:
    r"""Move the non-zeros of one tensor: prune the smallest weights, grow where the gradient is largest.

    $$M'=M\odot\mathbb 1\big[|W|>\theta\big],\qquad
    M_{\text{new}}=M'+\text{top}_{c}\big(|G|\odot(1-M')\big),\qquad c=\textstyle\sum M-\sum M'$$

    Just pruned positions are candidates too ("regret"); one that is grown again keeps its value.

    Args:
        weight: Weights, floating, any shape, 0 at inactive positions.
        mask: Active positions, bool or 0/1, of the same shape.
        grad: Dense gradient at the weights, of the same shape.
        ratio: Share $r$ in [0, 1] of the active positions to prune, rounded up; see `magnitude_prune`.

    Returns:
        The new mask and weights; the inputs stay as they are.

    Raises:
        ValueError: If the ratio is outside [0, 1], shapes differ, the mask isn't binary or a gradient is NaN.

    Reference: Wang et al., 2024, algorithm 1; the order of operations is that of the authors' code.

    Examples:
        >>> import torch
        >>> weight, mask = torch.tensor([0.2, -1.0, 0.0]), torch.tensor([True, True, False])
        >>> update = dsl_update_mask(weight, mask, torch.tensor([0.1, 0.0, 0.7]), ratio=0.5)
        >>> update.mask, update.weight
        (tensor([False,  True,  True]), tensor([ 0., -1.,  0.]))
    """
    if grad.shape != weight.shape:
        raise ValueError(f"grad {tuple(grad.shape)} and weight {tuple(weight.shape)} have different shapes")
    kept, num_pruned = magnitude_prune(weight, mask, ratio)
    new = gradient_grow(grad, kept, num_pruned)
    return DSLUpdate(new, torch.where(new, weight, 0), num_pruned, int(new.count_nonzero()))


def largest(values: Tensor, count: int) -> Tensor:
    """Mark exactly `count` of the largest values (n,), none NaN; of equal ones the first."""
    if count >= values.numel():
        return torch.ones_like(values, dtype=torch.bool)
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    threshold = values.kthvalue(values.numel() - count + 1).values
    chosen = values > threshold
    tied = (values == threshold).nonzero().squeeze(1)
    chosen[tied[: count - int(chosen.count_nonzero())]] = True
    return chosen


def as_mask(mask: Tensor, shape: torch.Size) -> Tensor:
    """Return the mask as bool, after checking its shape and, unless it's bool already, its values."""
    if mask.shape != shape:
        raise ValueError(f"mask {tuple(mask.shape)} and tensor {tuple(shape)} have different shapes")
    if mask.dtype == torch.bool:
        return mask
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("mask must be binary: bool, or 0 and 1 only")
    return mask != 0


def check_density(density: float) -> None:
    """Raise ValueError unless the density is in (0, 1]."""
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density!r}")


def check_ratio(name: str, ratio: float) -> None:
    """Raise ValueError unless the ratio is in [0, 1]."""
    if not 0 <= ratio <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {ratio!r}")


def check_count(name: str, value: int) -> None:
    """Raise ValueError unless the count is at least 1."""
    if not value >= 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")


def _candidates(active: Tensor, num_grow: int) -> tuple[Tensor, Tensor]:
    """Return a contiguous copy of the mask and the flat positions where it's off."""
    active = active.clone(memory_format=torch.contiguous_format)
    candidate = (~active).view(-1).nonzero().squeeze(1)
    if not 0 <= num_grow <= candidate.numel():
        raise ValueError(f"num_grow must be in 0..{candidate.numel()} (the inactive positions), got {num_grow!r}")
    return active, candidate
