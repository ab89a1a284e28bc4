"""A linear operator as solvers see it: checked, counted, on lists of leaves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from ihvp._trees import Pytree, all_finite, leaves_like, leaves_of, norm, rebuild, working

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Operator = Tensor | Callable[[Pytree], Pytree]

SYMMETRY = 1e-6


class System:
    r"""The operator $A$ beside a vector that fixes structure and dtype.

    Args:
        A: A symmetric matrix, or a function from a pytree to a pytree.
        b: The vector. It is detached; half precision becomes float32.
        name: What the vector is called in messages.

    Raises:
        ValueError: If a matrix isn't square, symmetric and of the size of `b`, or `b` isn't finite.
    """

    def __init__(self, A: Operator, b: Pytree, name: str = "b") -> None:
        self.shape = b
        self.b = [working(leaf) for leaf in leaves_of(b, name)]
        self.products = 0
        self.call: Callable[..., Pytree] = _matrix(A, self.b, name) if isinstance(A, torch.Tensor) else A
        if not all_finite(self.b):
            raise ValueError(f"{name} must be finite, it holds infinite or NaN values")
        self.norm_b = norm(self.b)

    def product(self, v: list[Tensor], **options: Any) -> list[Tensor]:
        """Return $Av$; the first one is checked for structure and finite values."""
        out = self.call(rebuild(self.shape, v), **options)
        leaves = leaves_like(self.shape, out, "the product A(v)", "b")
        found = [h.detach().to(x) for h, x in zip(leaves, v, strict=True)]
        if self.products == 0 and not all_finite(found):
            raise ValueError("the first product A(v) is not finite: check the loss, its data and the parameters")
        self.products += 1
        return found

    def zeros(self) -> list[Tensor]:
        return [torch.zeros_like(leaf) for leaf in self.b]

    def like_b(self, tree: Pytree, name: str) -> list[Tensor]:
        """Return the leaves of another pytree in the dtype of the system.

        Raises:
            ValueError: If it hasn't the structure of b or isn't finite.
        """
        leaves = leaves_like(self.shape, tree, name, "b")
        found = [leaf.detach().to(like) for leaf, like in zip(leaves, self.b, strict=True)]
        if not all_finite(found):
            raise ValueError(f"{name} must be finite, it holds infinite or NaN values")
        return found

    def build(self, leaves: list[Tensor]) -> Pytree:
        return rebuild(self.shape, leaves)


def refuse_stochastic(A: Operator, method: str) -> None:
    """Raise ValueError for an operator that changes from call to call."""
    if getattr(A, "stochastic", False):
        raise ValueError(
            f"{method} needs the same Hessian in every product and A is stochastic: "
            'give it a DataHVP, or use method "lissa" or "sgd"'
        )


def check_number(name: str, value: float, *, low: float, open_low: bool = False) -> None:
    """Raise ValueError unless `value` is a finite number >= low (> low with `open_low`)."""
    if not math.isfinite(value) or value < low or (open_low and value == low):
        raise ValueError(f"{name} must be a finite number {'>' if open_low else '>='} {low:g}, got {value!r}")


def check_count(name: str, value: int, *, low: int) -> None:
    """Raise ValueError unless `value` is an integer >= low."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")


def _matrix(A: Tensor, b: list[Tensor], name: str) -> Callable[[Tensor], Tensor]:
    if A.ndim != 2 or A.shape[0] != A.shape[1] or len(b) != 1 or b[0].shape != A.shape[:1]:
        shapes = f"A {tuple(A.shape)} and {name} {[tuple(leaf.shape) for leaf in b]}"
        raise ValueError(f"a dense A must be (p, p) and fit the structure of {name}, one tensor (p,): got {shapes}")
    matrix = A.detach().to(b[0])
    if not bool(matrix.isfinite().all()):
        raise ValueError("A must be finite, it holds infinite or NaN values")
    gap, largest = float((matrix - matrix.T).abs().max()), float(matrix.abs().max())
    if gap > SYMMETRY * largest:
        raise ValueError(f"A must be symmetric to {SYMMETRY:g} of its largest entry, found {gap / largest:.1e}")
    return lambda v: matrix @ v
