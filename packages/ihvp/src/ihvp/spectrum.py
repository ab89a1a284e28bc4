r"""Extreme eigenvalues of a Hessian, to choose damping and scale by.

Lanczos with full reorthogonalisation: after k products the largest and the smallest eigenvalue of the tridiagonal matrix
$T_k=Q_k^\top HQ_k$ lie inside the spectrum of $H$ and close to its ends.

Reference: C. Lanczos, *An Iteration Method for the Solution of the Eigenvalue Problem of Linear Differential and
Integral Operators*, J. Res. Nat. Bur. Stand. 45(4), 1950. Documentation: `docs/papers/ihvp/solvers.md`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ihvp._system import System, check_count, check_number, refuse_stochastic
from ihvp._trees import Pytree, dot, leaves_of, norm, random_like, rebuild, working

if TYPE_CHECKING:
    from torch import Tensor

    from ihvp._system import Operator

__all__ = ["extreme_eigenvalues", "largest_eigenvalue"]


def extreme_eigenvalues(
    A: Operator, like: Pytree, *, num_steps: int = 30, generator: torch.Generator | None = None
) -> tuple[float, float]:
    r"""Estimate the smallest and the largest eigenvalue of a symmetric operator.

    $$\lambda_{\min}(T_k)\ge\mu_{\min}(A),\qquad\lambda_{\max}(T_k)\le\mu_{\max}(A)$$

    Both estimates err to the inside, so a damping has to be chosen somewhat above $-\lambda_{\min}(T_k)$. Needs
    `num_steps` products and as many vectors of memory.

    Args:
        A: $A$: a symmetric matrix (p, p), or a function from a pytree to a pytree, the same in every call.
        like: Pytree that gives structure, shapes and dtype, for instance the parameters; its values don't matter.
        num_steps: $k\ge1$; 20 to 50 are usual. Fewer are taken when the Krylov space is exhausted.
        generator: Source of the random start; None means a fixed one.

    Returns:
        `(smallest, largest)`.

    Raises:
        ValueError: If `A` is stochastic, not symmetric, or does not fit the structure of `like`, its first product is
            not finite, or `num_steps` < 1.

    Examples:
        >>> import torch
        >>> low, high = extreme_eigenvalues(torch.diag(torch.tensor([-1.0, 2.0, 5.0])), torch.zeros(3))
        >>> round(low, 4), round(high, 4)
        (-1.0, 5.0)
    """
    refuse_stochastic(A, "extreme_eigenvalues")
    check_count("num_steps", num_steps, low=1)
    system = System(A, _zeros(like), "like")
    _, tridiagonal = lanczos_basis(system, random_like(system.b, generator), num_steps)
    values = torch.linalg.eigvalsh(tridiagonal)
    return float(values[0]), float(values[-1])


def largest_eigenvalue(
    A: Operator,
    like: Pytree,
    *,
    max_iter: int = 30,
    rtol: float = 0.01,
    generator: torch.Generator | None = None,
) -> float:
    r"""Estimate the largest absolute eigenvalue by power iteration, from below.

    $$v\leftarrow Av/\|Av\|,\qquad|\mu|_{\max}\approx\|Av\|\quad\text{for }\|v\|=1$$

    Needs three vectors of memory.

    Args:
        A: $A$: a symmetric matrix (p, p), or a function from a pytree to a pytree.
        like: Pytree that gives structure, shapes and dtype.
        max_iter: Largest number of products, >= 1.
        rtol: Stop when the estimate grows by less than this part, > 0.
        generator: Source of the random start; None means a fixed one.

    Returns:
        The estimate, 0 for a zero operator.

    Raises:
        ValueError: If `A` is stochastic, not symmetric, or does not fit the structure of `like`, its first product is
            not finite, or a number is out of range.

    Examples:
        >>> import torch
        >>> round(largest_eigenvalue(torch.diag(torch.tensor([-8.0, 1.0, 2.0])), torch.zeros(3)), 1)
        8.0
    """
    refuse_stochastic(A, "largest_eigenvalue")
    check_count("max_iter", max_iter, low=1)
    check_number("rtol", rtol, low=0, open_low=True)
    system = System(A, _zeros(like), "like")
    return power_iteration(system, max_iter=max_iter, rtol=rtol, generator=generator)


def power_iteration(
    system: System, *, max_iter: int = 30, rtol: float = 0.01, generator: torch.Generator | None = None
) -> float:
    """`largest_eigenvalue` on a system, whose products it counts."""
    v = random_like(system.b, generator)
    length, found = norm(v), 0.0
    for _ in range(max_iter):
        v = system.product([leaf / length for leaf in v])
        length = norm(v)
        if length == 0.0:
            return 0.0
        if length <= found * (1 + rtol):
            return max(length, found)
        found = length
    return found


def lanczos_basis(system: System, start: list[Tensor], num_steps: int) -> tuple[list[Tensor], Tensor]:
    """Orthonormal basis of the Krylov space and the operator inside it.

    Args:
        system: The operator.
        start: First direction, not zero.
        num_steps: Largest number of steps, >= 1.

    Returns:
        Per leaf the basis, shape `(k, numel)`, and the tridiagonal matrix, shape `(k, k)`, float64 on the CPU, with
        k <= `num_steps` the dimension that was reached.
    """
    num_steps = min(num_steps, sum(leaf.numel() for leaf in start))
    length = norm(start)
    q = [leaf.reshape(-1) / length for leaf in start]
    basis = [leaf.new_empty(num_steps, leaf.numel()) for leaf in q]
    alphas: list[float] = []
    betas: list[float] = []
    largest = 0.0
    for k in range(num_steps):
        for rows, leaf in zip(basis, q, strict=True):
            rows[k] = leaf
        shaped = [leaf.reshape(like.shape) for leaf, like in zip(q, start, strict=True)]
        w = [leaf.reshape(-1) for leaf in system.product(shaped)]
        alphas.append(dot(q, w))
        largest = max(largest, norm(w))
        if not math.isfinite(alphas[-1]):
            raise ValueError("the products of A are not finite")
        # Twice is enough (Parlett): the second pass removes what rounding left of the first.
        for _ in range(2):
            w = _orthogonal_to(basis, k + 1, w)
        length = norm(w)
        # Below rounding what is left is noise: the space is invariant.
        if k + 1 == num_steps or not length > 100 * torch.finfo(w[0].dtype).eps * largest:
            break
        betas.append(length)
        q = [leaf / length for leaf in w]
    size = len(alphas)
    tridiagonal = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    off = torch.tensor(betas[: size - 1], dtype=torch.float64)
    tridiagonal += torch.diag(off, 1) + torch.diag(off, -1)
    return [rows[:size] for rows in basis], tridiagonal


def _orthogonal_to(basis: list[Tensor], size: int, w: list[Tensor]) -> list[Tensor]:
    part = torch.stack([rows[:size] @ leaf for rows, leaf in zip(basis, w, strict=True)]).sum(0)
    return [leaf - part @ rows[:size] for rows, leaf in zip(basis, w, strict=True)]


def _zeros(like: Pytree) -> Pytree:
    return rebuild(like, [torch.zeros_like(working(leaf)) for leaf in leaves_of(like, "like")])
