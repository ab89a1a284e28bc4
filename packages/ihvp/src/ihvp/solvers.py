r"""Solvers for a damped Hessian system, with diagnostics that say when not to trust the answer.

Given products with the Hessian $H$ of a trained model and a right-hand side $b$ (a difference of gradients), find

$$(H+\lambda I)\,x=b$$

without forming $H$. Conjugate gradients need the fewest products and notice negative curvature. The Neumann series, its
stochastic form LiSSA and gradient descent on the quadratic are what published programs use. The direct solver is exact.

References: M. R. Hestenes, E. Stiefel, *Methods of Conjugate Gradients for Solving Linear Systems*, J. Res. Nat. Bur.
Stand. 49(6), 1952. N. Agarwal, B. Bullins, E. Hazan, *Second-Order Stochastic Optimization for Machine Learning in
Linear Time*, arXiv:1602.03943. P. W. Koh, P. Liang, *Understanding Black-box Predictions via Influence Functions*, ICML
2017, arXiv:1703.04730. Documentation: `docs/papers/ihvp/solvers.md`.
"""

from __future__ import annotations

import inspect
import math
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from ihvp._system import System, check_count, check_number, refuse_stochastic
from ihvp._trees import Pytree, all_finite, dot, norm
from ihvp.spectrum import lanczos_basis, power_iteration

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ihvp._system import Operator

__all__ = [
    "ConvergenceWarning",
    "SolveResult",
    "cg",
    "direct",
    "lanczos",
    "lissa",
    "neumann",
    "quadratic_sgd",
    "solve",
]

GROWTH, GROWTH_STEPS = 10.0, 5


class ConvergenceWarning(UserWarning):
    """A solver's result is not the solution that was asked for; the message names the residual and what to change."""


@dataclass(frozen=True)
class SolveResult:
    r"""What a solver returns.

    With $b=0$ both relative residuals are the norm of the residual itself.

    Attributes:
        x: The solution, a pytree like `b`, without a graph; float32 where `b` is in half precision.
        converged: Whether the true residual meets the tolerance.
        num_iter: Steps taken (repeats of LiSSA together).
        num_hvp: Products with the operator, including those for diagnostics and for an estimated scale.
        residual_norm: $\|b-(H+\lambda I)x\|$, from one product with the returned $x$.
        relative_residual: The same divided by $\|b\|$.
        undamped_relative_residual: $\|b-Hx\|/\|b\|$: how far $x$ is from inverting $H$ itself. A damped system is
            easily solved; only this figure compares solvers or dampings.
        negative_curvature: A direction of curvature <= 0 of the damped operator was met.
        diverged: The iteration grew; $x$ is its last finite state.
        history: The recursion's own relative residual at its steps.
    """

    x: Pytree
    converged: bool
    num_iter: int
    num_hvp: int
    residual_norm: float
    relative_residual: float
    undamped_relative_residual: float
    negative_curvature: bool = False
    diverged: bool = False
    history: tuple[float, ...] = field(default=(), repr=False)


def solve(A: Operator, b: Pytree, *, method: str = "cg", damping: float = 0.0, **method_args: Any) -> SolveResult:
    r"""Solve the damped system with the solver of a name.

    $$(A+\lambda I)\,x=b$$

    Args:
        A: A symmetric matrix (p, p), or a function from a pytree to a pytree (`make_hvp`, `DataHVP`, `StochasticHVP`).
        b: Right-hand side, a tensor, or a dict, list or tuple of tensors. It is detached.
        method: `"cg"`, `"neumann"`, `"lissa"`, `"sgd"` (`quadratic_sgd`), `"direct"` or `"lanczos"`.
        damping: $\lambda\ge0$; for `"neumann"` and `"lissa"` it is relative to the scale, $\lambda=ds$.
        **method_args: Further arguments of the solver.

    Returns:
        The solution with its diagnostics.

    Raises:
        ValueError: If `method` is unknown, or for the reasons that the solver gives.

    Examples:
        >>> import torch
        >>> A, b = torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.tensor([2.0, 4.0])
        >>> result = solve(A, b, method="cg")
        >>> result.x, result.converged, result.num_iter
        (tensor([1.0000, 1.0000]), True, 2)
    """
    if method not in SOLVERS:
        raise ValueError(f"method must be one of {', '.join(map(repr, SOLVERS))}, got {method!r}")
    return SOLVERS[method](A, b, damping=damping, **method_args)


def cg(
    A: Operator,
    b: Pytree,
    *,
    damping: float = 0.0,
    rtol: float = 1e-4,
    atol: float = 0.0,
    max_iter: int = 100,
    x0: Pytree | None = None,
    preconditioner: Pytree | None = None,
) -> SolveResult:
    r"""Conjugate gradients.

    $$
    \alpha=\frac{r^\top z}{p^\top(A+\lambda I)p},\quad x\leftarrow x+\alpha p,\quad r\leftarrow r-\alpha(A+\lambda I)p,
    \quad p\leftarrow z+\frac{r_{\text{new}}^\top z_{\text{new}}}{r^\top z}\,p,\qquad z=M^{-1}r
    $$

    The error falls by $2\big((\sqrt\kappa-1)/(\sqrt\kappa+1)\big)^t$ with the condition number $\kappa$. A direction with
    $p^\top(A+\lambda I)p\le0$ ends the run: the present iterate is returned, or at the first step the right-hand side
    divided by its curvature, with the flag `negative_curvature`. When the recursion reports convergence the residual is
    formed anew; if rounding has spoilt it, the iteration starts again from there.

    Args:
        A: A symmetric matrix (p, p) or a function from a pytree to a pytree; the same in every call.
        b: Right-hand side.
        damping: $\lambda\ge0$; above the most negative eigenvalue's size for a model that isn't convex.
        rtol: Stop at $\|r\|\le\max(\text{rtol}\,\|b\|,\text{atol})$, >= 0. Float32 supports about 1e-7 times the
            condition number, 1e-6 at best.
        atol: See `rtol`, >= 0.
        max_iter: Largest number of steps, >= 0.
        x0: Start, like `b`; None means zero.
        preconditioner: Diagonal of $M^{-1}$, like `b`, positive: the inverse of an estimate of the diagonal of
            $A+\lambda I$.

    Returns:
        The solution with its diagnostics.

    Raises:
        ValueError: If `A` is stochastic, not symmetric or returns another structure than `b`; `x0` or `preconditioner`
            have another structure; `b`, the first product or one of these isn't finite; `damping` or a tolerance is
            negative; `max_iter` < 0; or the preconditioner isn't positive.

    Examples:
        >>> import torch
        >>> A = lambda v: {"w": 2 * v["w"]}
        >>> cg(A, {"w": torch.tensor([1.0, 3.0])}, damping=0.5).x
        {'w': tensor([0.4000, 1.2000])}
    """
    refuse_stochastic(A, "cg")
    check_number("damping", damping, low=0)
    check_number("rtol", rtol, low=0)
    check_number("atol", atol, low=0)
    check_count("max_iter", max_iter, low=0)
    system = System(A, b)
    inverse = None if preconditioner is None else _preconditioner(system, preconditioner)
    x = system.zeros() if x0 is None else [leaf.clone() for leaf in system.like_b(x0, "x0")]
    if system.norm_b == 0.0:
        return _finish("cg", system, system.zeros(), damping, tolerance=atol, num_iter=0, advice="")
    tolerance = max(rtol * system.norm_b, atol)
    run = _ConjugateGradients(system, damping, tolerance, max_iter, inverse)
    flags = run.solve(x, [leaf.clone() for leaf in system.b] if x0 is None else None)
    advice = "max_iter or damping" if run.num_iter >= max_iter else "rtol (rounding limits this dtype) or damping"
    return _finish(
        "cg",
        system,
        x,
        damping,
        tolerance=tolerance,
        num_iter=run.num_iter,
        advice=advice,
        history=run.history,
        **flags,
    )


class _ConjugateGradients:
    """The loop of `cg`; works on x in place."""

    def __init__(
        self, system: System, damping: float, tolerance: float, max_iter: int, inverse: list[Tensor] | None
    ) -> None:
        self.system, self.damping, self.tolerance = system, damping, tolerance
        self.max_iter, self.inverse = max_iter, inverse
        self.num_iter = 0
        self.history: list[float] = []
        # Below rounding the recursion means nothing, even where the tolerance is 0.
        self.floor = max(tolerance, 0.01 * torch.finfo(system.b[0].dtype).eps * system.norm_b)

    def solve(self, x: list[Tensor], r: list[Tensor] | None) -> dict[str, Any]:
        """Iterate from x until the true residual is small, or nothing is gained any more."""
        before = math.inf
        while True:
            if r is None:
                r = _residual(self.system.b, self.damped(x), x, 0.0)
            size = norm(r)
            stuck = not size < 0.5 * before
            if size <= self.tolerance or self.num_iter >= self.max_iter or stuck:
                return {"residual": r}
            before = size
            ended = self.descend(x, r)
            if ended:
                return ended
            r = None

    def descend(self, x: list[Tensor], r: list[Tensor]) -> dict[str, Any]:
        """One run of the recursion; returns flags when the operator rules out going on."""
        z = self.precondition(r)
        p = [leaf.clone() for leaf in z]
        rz = dot(r, z)
        while self.num_iter < self.max_iter:
            Ap = self.damped(p)
            curvature = dot(p, Ap)
            if not math.isfinite(curvature):
                return {"diverged": True}
            if curvature <= 0:
                if not any(bool(leaf.any()) for leaf in x):
                    _add(x, p, _step_without_minimum(curvature, p))
                return {"negative_curvature": True}
            alpha = rz / curvature
            _add(x, p, alpha)
            _add(r, Ap, -alpha)
            self.num_iter += 1
            size = norm(r)
            self.history.append(size / self.system.norm_b)
            if size <= self.floor:
                return {}
            z = self.precondition(r)
            rz, last = dot(r, z), rz
            for direction, leaf in zip(p, z, strict=True):
                direction.mul_(rz / last).add_(leaf)
        return {}

    def damped(self, v: list[Tensor]) -> list[Tensor]:
        out = self.system.product(v)
        return [h.add(leaf, alpha=self.damping) for h, leaf in zip(out, v, strict=True)] if self.damping else out

    def precondition(self, r: list[Tensor]) -> list[Tensor]:
        return r if self.inverse is None else [m * leaf for m, leaf in zip(self.inverse, r, strict=True)]


def neumann(
    A: Operator,
    b: Pytree,
    *,
    scale: float | None = None,
    damping: float = 0.0,
    num_iter: int = 100,
    rtol: float | None = None,
) -> SolveResult:
    r"""Neumann series: LiSSA without subsampling, as GIF uses it.

    $$h_0=b,\qquad h_t=b+(1-d)\,h_{t-1}-\tfrac1sAh_{t-1},\qquad x=h_T/s=\tfrac1s\sum_{t=0}^T\big((1-d)I-A/s\big)^tb$$

    The limit is $(A+dsI)^{-1}b$: the damping is relative to the scale. It converges where $0<d+\mu/s<2$ for every
    eigenvalue $\mu$ of $A$; the error along $\mu$ after $T$ steps is $|1-d-\mu/s|^{T+1}$, so a direction with
    $\mu\ll s/T$ is multiplied by $(T+1)/s$ rather than inverted.

    Args:
        A: A symmetric matrix (p, p) or a function from a pytree to a pytree; the same in every call.
        b: Right-hand side.
        scale: $s>0$, at least half the largest eigenvalue; None takes 1.1 times an estimate by power iteration, whose
            products are counted.
        damping: $d\ge0$, relative to `scale`.
        num_iter: $T\ge0$; 0 gives $b/s$.
        rtol: Stop when the relative residual is this small, or when it grows; None takes exactly `num_iter` steps unless
            values overflow, and counts a residual of 1e-4 as converged.

    Returns:
        The iterate with its diagnostics; `diverged` when the residual was over 10 times the first for 5 steps, or
        overflowed.

    Raises:
        ValueError: If `A` is stochastic, not symmetric or returns another structure than `b`; `b` or the first product
            isn't finite; `scale` is <= 0 or can't be estimated; `damping` or `rtol` is negative; or `num_iter` < 0.

    Examples:
        >>> import torch
        >>> result = neumann(torch.diag(torch.tensor([1.0, 2.0])), torch.tensor([1.0, 1.0]), scale=2.5, num_iter=50)
        >>> result.x, result.num_hvp
        (tensor([1.0000, 0.5000]), 51)
    """
    refuse_stochastic(A, "neumann")
    check_number("damping", damping, low=0)
    check_count("num_iter", num_iter, low=0)
    if rtol is not None:
        check_number("rtol", rtol, low=0)
    if scale is not None:
        check_number("scale", scale, low=0, open_low=True)
    system = System(A, b)
    tolerance = (1e-4 if rtol is None else rtol) * system.norm_b
    if system.norm_b == 0.0:
        return _finish("neumann", system, system.zeros(), 0.0, tolerance=0.0, num_iter=0, advice="")
    scale = _estimated_scale(system) if scale is None else scale
    x, steps, diverged, history = _series(system, scale, damping, num_iter, rtol, stop_on_growth=rtol is not None)
    return _finish(
        "neumann",
        system,
        x,
        damping * scale,
        tolerance=tolerance,
        num_iter=steps,
        advice="scale" if diverged else "num_iter or damping",
        diverged=diverged,
        history=history,
    )


def lissa(
    sample_hvp: Operator,
    b: Pytree,
    *,
    scale: float,
    damping: float = 0.0,
    depth: int = 1000,
    repeats: int = 1,
    rtol: float = 1e-2,
    generator: torch.Generator | None = None,
) -> SolveResult:
    r"""LiSSA: the Neumann series with the Hessian of a fresh random batch in every step, averaged over repeats.

    $$h_t=b+(1-d)\,h_{t-1}-\tfrac1s\hat A_th_{t-1},\qquad x=\frac1R\sum_{r=1}^R\frac{h_T^{(r)}}s$$

    Unbiased for the Neumann series if every $\hat A_t$ is drawn independently with mean $A$. The variance falls with the
    batch size and with $R$. `scale` has to hold for the batch Hessians, whose eigenvalues are larger than those of the
    mean.

    Args:
        sample_hvp: A `StochasticHVP`, or any function from a pytree to a pytree that draws a batch per call. An
            attribute `exact`, as `StochasticHVP` has, is used for the final residual; without it that residual is an
            estimate from one more draw.
        b: Right-hand side.
        scale: $s>0$.
        damping: $d\ge0$, relative to `scale`: the limit is $(A+dsI)^{-1}b$.
        depth: $T\ge0$, steps of every repeat.
        repeats: $R\ge1$.
        rtol: Relative residual that counts as converged, >= 0.
        generator: Passed on as `sample_hvp(v, generator=generator)`; None lets `sample_hvp` use its own.

    Returns:
        The average with its diagnostics. `history` holds the noisy residuals of all repeats in turn.

    Raises:
        ValueError: If the product has another structure than `b`, `b` or the first product isn't finite, `scale` is
            <= 0, or another number is out of range.

    Examples:
        >>> import torch
        >>> H = torch.diag(torch.tensor([1.0, 2.0]))
        >>> noise = torch.Generator().manual_seed(0)
        >>> draw = lambda v: H @ v * (1 + 0.1 * torch.randn((), generator=noise))
        >>> lissa(draw, torch.tensor([1.0, 1.0]), scale=5.0, depth=200, repeats=4, rtol=0.2).x.round(decimals=1)
        tensor([1.0000, 0.5000])
    """
    check_number("scale", scale, low=0, open_low=True)
    check_number("damping", damping, low=0)
    check_number("rtol", rtol, low=0)
    check_count("depth", depth, low=0)
    check_count("repeats", repeats, low=1)
    system = System(sample_hvp, b)
    if system.norm_b == 0.0:
        return _finish("lissa", system, system.zeros(), 0.0, tolerance=0.0, num_iter=0, advice="")
    mean, steps, any_diverged = system.zeros(), 0, False
    history: list[float] = []
    options = {} if generator is None else {"generator": generator}
    for _ in range(repeats):
        x, taken, diverged, residuals = _series(system, scale, damping, depth, None, stop_on_growth=True, **options)
        _add(mean, x, 1.0 / repeats)
        steps += taken
        any_diverged |= diverged
        history += residuals
        if any_diverged:
            mean = x
            break
    return _finish(
        "lissa",
        system,
        mean,
        damping * scale,
        tolerance=rtol * system.norm_b,
        num_iter=steps,
        advice="scale" if any_diverged else "depth, repeats, the batch size or damping",
        diverged=any_diverged,
        history=history,
        exact=getattr(sample_hvp, "exact", None),
    )


def quadratic_sgd(
    sample_hvp: Operator,
    b: Pytree,
    *,
    lr: float | None = None,
    num_iter: int = 1000,
    momentum: float = 0.0,
    damping: float = 0.0,
    x0: float | Pytree = 0.0,
    optimizer: Literal["sgd", "adam"] = "sgd",
    compat_half_gradient: bool = False,
    rtol: float = 1e-2,
) -> SolveResult:
    r"""Gradient descent on the quadratic whose minimiser is the solution, as LLMEraser and IF-DFM do it.

    $$\min_x\tfrac12x^\top(A+\lambda I)x-b^\top x,\qquad\text{gradient}=\hat Ax+\lambda x-b$$

    with $\hat A$ the operator of a random batch, or $A$ itself. Plain SGD with a constant rate is a Neumann series with
    scale 1/lr. The gradient is set explicitly: the programs of both papers differentiate
    $\tfrac12x^\top\mathrm{const}(\hat Ax)-b^\top x$ instead, whose gradient $\hat Ax/2-b$ leads to twice the solution.

    Args:
        sample_hvp: A symmetric matrix (p, p), or a function from a pytree to a pytree, random or not; with an attribute
            `exact` (`StochasticHVP` has it) the final residual is exact, otherwise from one more call.
        b: Right-hand side.
        lr: Learning rate > 0. None takes 1 / (1.1 |mu|_max + damping) by power iteration, for `"sgd"` on an operator
            that isn't stochastic.
        num_iter: Steps, >= 0.
        momentum: Of SGD, in [0, 1).
        damping: $\lambda\ge0$; the programs call it weight decay or x_adjust.
        x0: Start: a number for every element, or a pytree like `b`. IF-DFM starts at 1e-3.
        optimizer: `"sgd"` or `"adam"` (torch's, default betas).
        compat_half_gradient: Use $\hat Ax/2+\lambda x-b$ to reproduce figures of those programs; the residual still is
            that of the true system.
        rtol: Relative residual that counts as converged, >= 0.

    Returns:
        The last iterate with its diagnostics. `history` holds the norm of the gradient before every step, relative to b.

    Raises:
        ValueError: If the product or `x0` has another structure than `b`, `b`, `x0` or the first product isn't finite,
            a number is out of range, `lr` is missing where it can't be estimated, or `optimizer` is unknown.

    Examples:
        >>> import torch
        >>> A, b = torch.diag(torch.tensor([1.0, 2.0])), torch.tensor([1.0, 1.0])
        >>> quadratic_sgd(A, b, lr=0.5, num_iter=50).x
        tensor([1.0000, 0.5000])
        >>> import warnings
        >>> with warnings.catch_warnings(action="ignore"):
        ...     print(quadratic_sgd(A, b, lr=0.5, num_iter=99, compat_half_gradient=True).x)
        tensor([2.0000, 1.0000])
    """
    check_number("damping", damping, low=0)
    check_number("rtol", rtol, low=0)
    check_count("num_iter", num_iter, low=0)
    if optimizer not in ("sgd", "adam"):
        raise ValueError(f"optimizer must be 'sgd' or 'adam', got {optimizer!r}")
    if not 0 <= momentum < 1 or (optimizer == "adam" and momentum):
        raise ValueError(f"momentum must lie in [0, 1), and be 0 for adam, got {momentum!r}")
    if lr is not None:
        check_number("lr", lr, low=0, open_low=True)
    elif optimizer == "adam" or getattr(sample_hvp, "stochastic", False):
        raise ValueError("lr must be given for adam and for a stochastic operator, got None")
    system = System(sample_hvp, b)
    tolerance = rtol * system.norm_b
    if system.norm_b == 0.0:
        return _finish("quadratic_sgd", system, system.zeros(), damping, tolerance=0.0, num_iter=0, advice="")
    rate = 1.0 / (_estimated_scale(system) + damping) if lr is None else lr
    start = (
        [torch.full_like(leaf, x0) for leaf in system.b] if isinstance(x0, (int, float)) else system.like_b(x0, "x0")
    )
    x, steps, diverged, history = _descend(
        system, start, rate, num_iter, momentum, damping, optimizer, 0.5 if compat_half_gradient else 1.0
    )
    advice = "num_iter or damping"
    if compat_half_gradient:
        advice += " (compat_half_gradient aims at twice the solution)"
    return _finish(
        "quadratic_sgd",
        system,
        x,
        damping,
        tolerance=tolerance,
        num_iter=steps,
        advice="damping, or lower lr" if diverged else advice,
        diverged=diverged,
        history=history,
        exact=getattr(sample_hvp, "exact", None),
    )


def direct(A: Operator, b: Pytree, *, damping: float = 0.0, max_size: int = 10_000) -> SolveResult:
    r"""Form the matrix and factorise it: the reference for small models.

    $$x=(A+\lambda I)^{-1}b$$

    Takes p products, $p^2$ numbers in float64 and $p^3/3$ operations; sensible to some 4000 parameters. Cholesky where
    the matrix is positive definite, otherwise through its eigenvalues, with the flag `negative_curvature`: the solution
    then is exact, but a saddle point of the quadratic and not its minimum.

    Args:
        A: A symmetric matrix (p, p) or a function from a pytree to a pytree; the same in every call.
        b: Right-hand side.
        damping: $\lambda\ge0$.
        max_size: Refuse more elements than this, >= 1, instead of running out of memory.

    Returns:
        The solution with its diagnostics.

    Raises:
        ValueError: If the damped matrix is singular (raise `damping`); `A` is stochastic, not symmetric or returns
            another structure than `b`; `b` or a product isn't finite; `damping` is negative; or b is larger than
            `max_size`.

    Examples:
        >>> import torch
        >>> direct(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([3.0, 3.0])).x
        tensor([1., 1.])
    """
    refuse_stochastic(A, "direct")
    check_number("damping", damping, low=0)
    check_count("max_size", max_size, low=1)
    system = System(A, b)
    size = sum(leaf.numel() for leaf in system.b)
    if size > max_size:
        raise ValueError(f"direct forms a ({size}, {size}) matrix, above max_size {max_size}: use method 'cg'")
    matrix = _dense(system)
    if not bool(matrix.isfinite().all()):
        raise ValueError("the products of A are not finite")
    gap, largest = float((matrix - matrix.T).abs().max()), float(matrix.abs().max())
    if gap > 1e-3 * largest:
        raise ValueError(f"A is not symmetric: entries differ by {gap / largest:.1e} of the largest")
    matrix = 0.5 * (matrix + matrix.T)
    matrix.diagonal().add_(damping)
    flat = torch.cat([leaf.reshape(-1) for leaf in system.b])
    solution, lowest = _factorised(matrix, flat.double(), torch.finfo(flat.dtype).eps)
    x = [part.reshape(like.shape).to(like) for part, like in zip(_split(solution, system.b), system.b, strict=True)]
    return _finish(
        "direct",
        system,
        x,
        damping,
        tolerance=max(1e-4, torch.finfo(flat.dtype).eps ** 0.5) * system.norm_b,
        num_iter=0,
        advice="damping" if lowest is None else f"damping by more than {-lowest:.3g}",
        negative_curvature=lowest is not None,
    )


def lanczos(
    A: Operator,
    b: Pytree,
    *,
    damping: float = 0.0,
    num_steps: int = 50,
    rank: int | None = None,
    tol: float = 1e-6,
    rtol: float = 1e-4,
) -> SolveResult:
    r"""Invert inside the Krylov space of the right-hand side, on all or on the largest of its eigenpairs.

    $$x=\|b\|\,Q_kV\Theta^{-1}V^\top e_1,\qquad Q_k^\top AQ_k+\lambda I=V\Theta V^\top$$

    With all pairs this is the Galerkin solution: the iterate of `cg` after the same number of products, but with a full
    orthogonalisation, and defined for an indefinite operator as well. With `rank` it is the low-rank inverse that other
    libraries offer, and biased: what lies outside the pairs that are kept, the directions of small curvature, is not
    updated at all. The residual shows by how much. Needs `num_steps` vectors of memory.

    Args:
        A: A symmetric matrix (p, p) or a function from a pytree to a pytree; the same in every call.
        b: Right-hand side, the first direction of the space.
        damping: $\lambda\ge0$.
        num_steps: $k\ge1$, dimension of the space.
        rank: Keep only so many pairs, those of largest $|\theta|$, >= 1; None keeps all.
        tol: Drop pairs with $|\theta|$ at most this part of the largest, >= 0.
        rtol: Relative residual that counts as converged, >= 0.

    Returns:
        The solution with its diagnostics; `negative_curvature` when a damped eigenvalue in the space is negative.

    Raises:
        ValueError: If `A` is stochastic, not symmetric or returns another structure than `b`, `b` or the first product
            isn't finite, a number is out of range, or no pair is left ("damping").

    Examples:
        >>> import torch
        >>> A, b = torch.diag(torch.tensor([1.0, 10.0])), torch.tensor([1.0, 1.0])
        >>> lanczos(A, b).x
        tensor([1.0000, 0.1000])
        >>> lanczos(A, b, rank=1, rtol=0.9).x.abs().round(decimals=3)  # the direction of curvature 1 is left out
        tensor([0.0000, 0.1000])
    """
    refuse_stochastic(A, "lanczos")
    check_number("damping", damping, low=0)
    check_number("tol", tol, low=0)
    check_number("rtol", rtol, low=0)
    check_count("num_steps", num_steps, low=1)
    if rank is not None:
        check_count("rank", rank, low=1)
    system = System(A, b)
    if system.norm_b == 0.0:
        return _finish("lanczos", system, system.zeros(), damping, tolerance=0.0, num_iter=0, advice="")
    basis, tridiagonal = lanczos_basis(system, system.b, num_steps)
    values, vectors = torch.linalg.eigh(tridiagonal)
    values = values + damping
    order = values.abs().argsort(descending=True)[:rank]
    order = order[values[order].abs() > tol * values.abs().max()]
    if not len(order):
        raise ValueError("A is zero in the Krylov space of b: raise damping")
    kept, pairs = values[order], vectors[:, order]
    weights = system.norm_b * (pairs @ (pairs[0] / kept))
    x = [(weights.to(rows) @ rows).reshape(like.shape) for rows, like in zip(basis, system.b, strict=True)]
    return _finish(
        "lanczos",
        system,
        x,
        damping,
        tolerance=rtol * system.norm_b,
        num_iter=len(values),
        advice="num_steps, rank or damping" if rank is not None else "num_steps or damping",
        negative_curvature=bool((values < 0).any()),
    )


SOLVERS: dict[str, Callable[..., SolveResult]] = {
    "cg": cg,
    "neumann": neumann,
    "lissa": lissa,
    "sgd": quadratic_sgd,
    "direct": direct,
    "lanczos": lanczos,
}


def _finish(
    method: str,
    system: System,
    x: list[Tensor],
    damping: float,
    *,
    tolerance: float,
    num_iter: int,
    advice: str,
    negative_curvature: bool = False,
    diverged: bool = False,
    history: list[float] | None = None,
    residual: list[Tensor] | None = None,
    exact: Callable[[Pytree], Pytree] | None = None,
) -> SolveResult:
    """Form the true residuals of x, and warn once where it isn't the solution that was asked for."""
    if not any(bool(leaf.any()) for leaf in x):
        size = undamped = norm(system.b)
    elif residual is not None:
        size, undamped = norm(residual), norm([r.add(leaf, alpha=damping) for r, leaf in zip(residual, x, strict=True)])
    else:
        if exact is not None:
            system.call = exact
        Ax = system.product(x)
        size = norm(_residual(system.b, Ax, x, damping))
        undamped = norm(_residual(system.b, Ax, x, 0.0))
    size, undamped = (value if math.isfinite(value) else math.inf for value in (size, undamped))
    by = system.norm_b or 1.0
    result = SolveResult(
        x=system.build(x),
        converged=size <= tolerance and not diverged,
        num_iter=num_iter,
        num_hvp=system.products,
        residual_norm=size,
        relative_residual=size / by,
        undamped_relative_residual=undamped / by,
        negative_curvature=negative_curvature,
        diverged=diverged,
        history=tuple(history or ()),
    )
    _warn(method, result, advice)
    return result


def _warn(method: str, result: SolveResult, advice: str) -> None:
    if result.negative_curvature:
        what, advice = "met negative curvature", advice if advice.startswith("damping by") else "damping"
    elif result.diverged:
        what = "diverged"
    elif not result.converged:
        what = "did not converge"
    else:
        return
    text = (
        f"{method} {what} after {result.num_iter} steps: relative residual {result.relative_residual:.2e} "
        f"(undamped {result.undamped_relative_residual:.2e}); raise (increase) {advice}"
    )
    level, frame = 1, inspect.currentframe()
    while frame is not None and str(frame.f_globals.get("__name__")).startswith("ihvp."):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, ConvergenceWarning, stacklevel=level)  # at the line that called the package


def _series(
    system: System,
    scale: float,
    damping: float,
    num_iter: int,
    rtol: float | None,
    *,
    stop_on_growth: bool,
    **options: Any,
) -> tuple[list[Tensor], int, bool, list[float]]:
    """Neumann recursion for x = h / s, which reads: add the residual divided by s."""
    x = [leaf / scale for leaf in system.b]
    last = x
    watch = _Growth(system.norm_b)
    for t in range(num_iter):
        r = _residual(system.b, system.product(x, **options), x, damping * scale)
        if not watch.finite(norm(r)):
            return last, max(t - 1, 0), True, watch.history
        last, x = x, [leaf.add(step, alpha=1.0 / scale) for leaf, step in zip(x, r, strict=True)]
        if rtol is not None and watch.history[-1] <= rtol:
            return x, t + 1, False, watch.history
        if watch.growing and stop_on_growth:
            return last, t, True, watch.history
    if not all_finite(x):
        return last, num_iter - 1, True, watch.history
    return x, num_iter, watch.growing, watch.history


def _descend(
    system: System,
    start: list[Tensor],
    lr: float,
    num_iter: int,
    momentum: float,
    damping: float,
    optimizer: str,
    factor: float,
) -> tuple[list[Tensor], int, bool, list[float]]:
    """`quadratic_sgd` on leaves; torch's optimiser makes the step, the gradient is written here."""
    x = [leaf.clone().requires_grad_() for leaf in start]
    stepper: torch.optim.Optimizer = (
        torch.optim.Adam(x, lr=lr) if optimizer == "adam" else torch.optim.SGD(x, lr=lr, momentum=momentum)
    )
    last = [leaf.detach().clone() for leaf in x]
    watch = _Growth(system.norm_b)
    steps = 0
    for steps in range(1, num_iter + 1):
        values = [leaf.detach() for leaf in x]
        for leaf, value, b, Ax in zip(x, values, system.b, system.product(values), strict=True):
            leaf.grad = (factor * Ax).add_(value, alpha=damping).sub_(b)
        if not watch.finite(norm([leaf.grad for leaf in x if leaf.grad is not None])):
            return last, steps - 1, True, watch.history
        for kept, value in zip(last, values, strict=True):
            kept.copy_(value)
        stepper.step()
        # Adam's steps are bounded: its residual may rise for long and still come down.
        if watch.growing and optimizer == "sgd":
            break
    final = [leaf.detach() for leaf in x]
    return (final, steps, watch.growing, watch.history) if all_finite(final) else (last, steps, True, watch.history)


class _Growth:
    """Relative residuals of a recursion, and whether they say that it diverges."""

    def __init__(self, norm_b: float) -> None:
        self.norm_b = norm_b
        self.history: list[float] = []
        self.above = 0

    @property
    def growing(self) -> bool:
        """Whether the last steps all lie far above the first."""
        return self.above >= GROWTH_STEPS

    def finite(self, size: float) -> bool:
        """Note a residual; False where it overflowed."""
        if not math.isfinite(size):
            return False
        self.history.append(size / self.norm_b)
        self.above = self.above + 1 if self.history[-1] > GROWTH * self.history[0] else 0
        return True


def _residual(b: list[Tensor], Ax: list[Tensor], x: list[Tensor], damping: float) -> list[Tensor]:
    return [c.sub(h).sub_(leaf, alpha=damping) for c, h, leaf in zip(b, Ax, x, strict=True)]


def _add(x: list[Tensor], step: list[Tensor], alpha: float) -> None:
    for leaf, change in zip(x, step, strict=True):
        leaf.add_(change, alpha=alpha)


def _step_without_minimum(curvature: float, p: list[Tensor]) -> float:
    """Length along a first direction that has no minimum: that of a minimum with the opposite curvature."""
    return dot(p, p) / -curvature if curvature < 0 else 1.0


def _estimated_scale(system: System) -> float:
    largest = power_iteration(system)
    if not (largest > 0 and math.isfinite(largest)):
        raise ValueError(f"scale can't be estimated: the largest eigenvalue of A seems to be {largest!r}; pass scale")
    return 1.1 * largest


def _preconditioner(system: System, tree: Pytree) -> list[Tensor]:
    inverse = system.like_b(tree, "preconditioner")
    if not all(bool((leaf > 0).all()) for leaf in inverse):
        raise ValueError("preconditioner must be positive: the diagonal of an inverse")
    return inverse


def _dense(system: System) -> Tensor:
    """The matrix, column by column, in float64."""
    size = sum(leaf.numel() for leaf in system.b)
    out = torch.empty(size, size, dtype=torch.float64, device=system.b[0].device)
    unit = torch.zeros(size, dtype=system.b[0].dtype, device=system.b[0].device)
    for i in range(size):
        unit[i] = 1.0
        v = [part.reshape(like.shape).to(like) for part, like in zip(_split(unit, system.b), system.b, strict=True)]
        out[i] = torch.cat([leaf.reshape(-1).double() for leaf in system.product(v)])
        unit[i] = 0.0
    return out


def _split(flat: Tensor, like: list[Tensor]) -> tuple[Tensor, ...]:
    return flat.split_with_sizes([leaf.numel() for leaf in like])


def _factorised(matrix: Tensor, b: Tensor, eps: float) -> tuple[Tensor, float | None]:
    """Return the solution, and the smallest eigenvalue where it is negative."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    # The products are exact to eps of their dtype, the float64 arithmetic here to more.
    noise = 10 * max(eps, len(b) ** 0.5 * torch.finfo(torch.float64).eps)
    if int(info) == 0 and _smallest(factor) > noise * float(torch.linalg.matrix_norm(matrix, 1)):
        return torch.cholesky_solve(b.unsqueeze(1), factor).squeeze(1), None
    values, vectors = torch.linalg.eigh(matrix)
    sizes = values.abs()
    if not float(sizes.min()) > noise * float(sizes.max()):
        raise ValueError(
            f"the damped matrix is singular: eigenvalues from {float(values[0]):.3g} to {float(values[-1]):.3g}, the "
            f"smallest size {float(sizes.min()):.1e}; raise damping"
        )
    lowest = float(values[0])
    return vectors @ ((vectors.T @ b) / values), lowest if lowest < 0 else None


def _smallest(factor: Tensor) -> float:
    """Smallest eigenvalue from a Cholesky factor by a few inverse iterations, which meet it at once if it is tiny."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(len(factor), 1, dtype=factor.dtype, generator=generator).to(factor.device)
    size = math.inf
    for _ in range(4):
        v = torch.cholesky_solve(v / v.norm(), factor)
        size = float(v.norm())
        if not math.isfinite(size):
            return 0.0
    return 1.0 / size
