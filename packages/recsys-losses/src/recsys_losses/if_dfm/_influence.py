"""The influence update of any model with logits: right-hand side, Hessian products, solver, and the updater."""

from __future__ import annotations

import math
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import nn

from ihvp import ConvergenceWarning, DataHVP, extreme_eigenvalues, make_hvp, module_loss, solvers
from ihvp.hvp import hvp as exact_product
from recsys_losses._checks import check_choice, check_positive
from recsys_losses.if_dfm._data import Clicks
from recsys_losses.if_dfm._losses import check_binary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor

Curvature = Literal["hessian", "ggn"]
Method = Literal["cg", "adam", "direct"]
Loss = Literal["bce", "squared"]

CURVATURES = ("hessian", "ggn")
METHODS = ("cg", "adam", "direct")
LOSSES = ("bce", "squared")


@dataclass(frozen=True)
class Solve:
    r"""Solution of $(cA+\lambda I)x=b$.

    Args:
        x: The solution, `(p,)`.
        residual: $\lVert b-(cA+\lambda I)x\rVert/\lVert b\rVert$, formed anew.
        iterations: Steps of the solver; 0 for a direct one.
        converged: Whether the residual meets the tolerance.
        undamped_residual: The same without $\lambda$: how far x is from the update itself.
        products: Products with the operator, the residual's included.
        negative_curvature: Whether the damped operator has a negative direction: the solution is no minimum then.
    """

    x: Tensor
    residual: float
    iterations: int
    converged: bool
    undamped_residual: float
    products: int
    negative_curvature: bool = False


@dataclass(frozen=True)
class Update:
    """Influence update of a model.

    Args:
        delta: Change of the parameters, `(p,)`, in the order of `model.parameters()`.
        info: `n`, `flipped` and `added` (rows), `rhs_norm`, `delta_norm`, `residual`, `undamped_residual`, `iterations`,
            `products`, `converged`, `negative_curvature` (see `Solve`), `damping`, `seconds`.
    """

    delta: Tensor
    info: dict[str, float]


def influence_rhs(
    model: nn.Module,
    flipped_batches: Iterable[Sequence[Tensor]],
    added_batches: Iterable[Sequence[Tensor]],
    n: int,
    *,
    loss: Loss = "bce",
) -> Tensor:
    r"""Right-hand side of the influence system.

    $$b=\frac1n\Bigl[\sum_{j\in J}\bigl(\nabla\ell(x_j,0)-\nabla\ell(x_j,1)\bigr)-\sum_{k\in K}\nabla\ell(x_k,y_k)\Bigr]
    =\frac1n\Bigl[\sum_{j\in J}\nabla f(x_j)-\sum_{k\in K}\nabla\ell(x_k,y_k)\Bigr]$$

    The difference of the two losses is the logit itself, so the flips need one gradient each instead of two. The model is
    in evaluation mode meanwhile.

    Args:
        model: Called with the inputs of a batch, returns logits `(B,)`; what has `requires_grad` takes part.
        flipped_batches: Batches (inputs of the model, then old labels, which are 0) of the training rows that convert.
        added_batches: Batches of new rows with their labels.
        n: Number of training rows, the divisor of both parts.
        loss: `"bce"`, or `"squared"`: $\tfrac12(f-y)^2$.

    Returns:
        b, `(p,)`, in the order of `model.parameters()`.

    Raises:
        ValueError: If a flipped row is already positive, a label isn't 0 or 1, n < 1, or the logits have a wrong shape.

    Examples:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Flatten(0))
        >>> influence_rhs(model, [(torch.tensor([[3.0], [1.0]]), torch.zeros(2))], [], n=4)
        tensor([1.0000, 0.5000])
    """
    check_choice("loss", loss, LOSSES)
    if not n >= 1:
        raise ValueError(f"n must be >= 1, got {n!r}")
    parameters = _parameters(model)
    total = torch.zeros_like(_flat(parameters))
    with _evaluating(model):
        for *inputs, label in flipped_batches:
            check_binary("labels", label)
            if bool((label == 1).any()):
                raise ValueError("a flipped row is already positive; flipped batches hold the old labels, which are 0")
            total += _gradient(_logits(model, inputs, label).sum(), parameters)
        for *inputs, label in added_batches:
            check_binary("labels", label)
            total -= _gradient(_summed(_logits(model, inputs, label), label, loss), parameters)
    return total / n


def hessian_vector_product(
    model: nn.Module, batch: Sequence[Tensor], v: Tensor, *, kind: Curvature = "hessian", loss: Loss = "bce"
) -> Tensor:
    r"""Product of a batch's curvature with a vector, in evaluation mode.

    $$\text{hessian: }\frac1B\sum_i\nabla^2\ell(z_i)\,v,\qquad
    \text{ggn: }\frac1B\sum_ip_i(1-p_i)\,\nabla f(x_i)\nabla f(x_i)^\top v$$

    Args:
        model: Called with the inputs of the batch, returns logits `(B,)`.
        batch: Inputs of the model, then labels 0 or 1.
        v: The vector, `(p,)`, in the order of `model.parameters()`.
        kind: `"hessian"`, or `"ggn"`, which is positive semi-definite.
        loss: `"bce"`, or `"squared"` (then the factor $p(1-p)$ is 1).

    Returns:
        The product, `(p,)`.

    Raises:
        ValueError: If `kind` or `loss` is unknown, or v or the logits have a wrong shape.

    Examples:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Flatten(0))
        >>> _ = torch.nn.init.zeros_(model[0].weight)
        >>> hessian_vector_product(model, (torch.tensor([[2.0]]), torch.tensor([1.0])), torch.ones(1))
        tensor([1.])
    """
    check_choice("kind", kind, CURVATURES)
    check_choice("loss", loss, LOSSES)
    parameters = _parameters(model)
    if v.shape != (size := sum(p.numel() for p in parameters.values()),):
        raise ValueError(f"v must have the shape ({size},) of the flat parameters, got {tuple(v.shape)}")
    if kind == "ggn":
        return _GaussNewton(model, batch, loss)(v)
    loss_fn, values = module_loss(model, _mean_loss(loss), *batch)
    return _flat(exact_product(loss_fn, values, _named(v, values)))


def solve_influence(
    hvp: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    damping: float,
    method: Method = "cg",
    curvature_scale: float = 1.0,
    tol: float = 1e-3,
    max_iter: int = 500,
    lr: float = 1e-4,
    init: float = 0.0,
    strict: bool = False,
) -> Solve:
    r"""Solve $(cA+\lambda I)x=b$ for a curvature that is known by its products, with the solvers of `ihvp`.

    Args:
        hvp: $v\mapsto Av$ on flat vectors. For `"adam"` it may be random (a new batch at every call); an attribute `exact`
            then gives the product that the residual is formed with.
        b: Right-hand side, `(p,)`.
        damping: $\lambda\ge0$.
        method: `"cg"` (conjugate gradients), `"direct"` (forms the matrix, for some thousand parameters) or `"adam"`, the
            authors' way: Adam on $\tfrac12x^\top(cA+\lambda I)x-b^\top x$, here with its true gradient.
        curvature_scale: $c>0$; 0.5 is the fixed point of the authors' loop.
        tol: Relative residual that counts as converged.
        max_iter: Steps of `"cg"` at most, of `"adam"` exactly.
        lr: Learning rate of `"adam"`.
        init: Start of `"adam"`, the same number everywhere.
        strict: Raise instead of warning when the result isn't a solution.

    Returns:
        The solution with its residual.

    Raises:
        ValueError: If an argument is out of range or unknown, `method="direct"` meets a singular system (raise `damping`),
            or, with `strict`, the solver did not converge or met negative curvature.

    Examples:
        >>> import torch
        >>> solve_influence(lambda v: 2 * v, torch.tensor([1.0, 3.0]), damping=0.0).x
        tensor([0.5000, 1.5000])
    """
    check_choice("method", method, METHODS)
    check_positive("curvature_scale", curvature_scale)
    operator = _Scaled(hvp, curvature_scale)
    options: dict[str, Any] = {"damping": damping}
    if method == "cg":
        options |= {"rtol": tol, "max_iter": max_iter}
    elif method == "adam":
        options |= {"method": "sgd", "optimizer": "adam", "rtol": tol, "num_iter": max_iter, "lr": lr, "x0": init}
    with warnings.catch_warnings():
        if strict:
            warnings.simplefilter("ignore", ConvergenceWarning)
        result = solvers.solve(operator, b, **{"method": method, **options})
    if strict and (result.negative_curvature or not result.converged):
        what = "met negative curvature" if result.negative_curvature else "did not converge"
        raise ValueError(
            f"{method} {what}: relative residual {result.relative_residual:.2e} after {result.num_iter} steps; "
            "raise damping or max_iter"
        )
    return Solve(
        x=result.x,
        residual=result.relative_residual,
        iterations=result.num_iter,
        converged=result.converged,
        undamped_residual=result.undamped_relative_residual,
        products=result.num_hvp,
        negative_curvature=result.negative_curvature,
    )


class InfluenceUpdater:
    r"""Moves a trained model to where training with corrected labels and new rows would have led, to first order.

    $$(cH+\lambda I)\,\delta=b,\qquad\theta_\text{new}=\hat\theta+\delta$$

    H is the curvature of the mean training loss at the present parameters, over the original rows and labels, plus the L2
    term that training had. Every pass has the model in evaluation mode. Rows of embedding tables that no training,
    flipped or added row uses stay exactly as they are.

    Args:
        model: The trained model: called with the inputs of a batch, returns logits `(B,)`.
        train_loader: The training rows with the labels of training, as batches (inputs, then labels) that can be
            iterated again and again, such as `Clicks.loader()` or a DataLoader; or `Clicks`.
        loss: `"bce"` or `"squared"`; the mean over rows is what training minimised.
        damping: $\lambda\ge0$. A neural network needs more than the size of its most negative curvature (`diagnose`);
            choose it on validation clicks (`choose_damping`).
        method: `"cg"`, `"direct"` or `"adam"`, see `solve_influence`.
        hessian: `"hessian"`, or `"ggn"`, which has no negative curvature.
        l2: Weight of $\tfrac{l_2}2\lVert\theta\rVert^2$ in training (Adam's `weight_decay`), >= 0.
        curvature_loader: A random part of the training rows to estimate H with, the same in every pass; None takes them
            all. The time of an update then doesn't grow with the training set.
        cache: Keep the graphs of the curvature rows between products: nearly twice as fast, for the memory of some three
            forward passes over them.
        curvature_scale: $c>0$; 0.5 is what the authors' loop converges to.
        include_added_in_hessian: Add the curvature of the added rows; closer to retraining where they are many.
        correct_stationarity: Subtract the gradient of the objective from b, for a model that training left away from its
            minimum: the update then takes the rest of the way as well. Costs a pass over the training rows.
        tol: Relative residual at which the solver stops.
        max_iter: Its largest number of steps.
        lr: Learning rate of `"adam"`.
        strict: Raise instead of warning when the solver did not converge.

    Raises:
        ValueError: If an option is out of range or unknown, or no parameter requires a gradient.

    Source: Ding et al., *Delayed Feedback Modeling with Influence Functions*, AAAI 2026, arXiv:2502.01669.

    Examples:
        >>> import torch
        >>> from recsys_losses.if_dfm import DelayedClicks, build_model
        >>> data = DelayedClicks.synthetic(per_day=50, days=30)
        >>> parts = data.window(T=15, duration=14, gap=10)
        >>> model = build_model("logistic", data.x_num.shape[1], data.cardinalities)
        >>> updater = InfluenceUpdater(model, parts["train"], damping=0.1)
        >>> update = updater.update(parts["flipped"], parts["added"])
        >>> updater.apply()
        >>> updater.revert()  # bit for bit
    """

    def __init__(
        self,
        model: nn.Module,
        train_loader: Iterable[Sequence[Tensor]] | Clicks,
        loss: Loss = "bce",
        damping: float = 1e-3,
        method: Method = "cg",
        hessian: Curvature = "hessian",
        *,
        l2: float = 0.0,
        curvature_loader: Iterable[Sequence[Tensor]] | Clicks | None = None,
        cache: bool = False,
        curvature_scale: float = 1.0,
        include_added_in_hessian: bool = False,
        correct_stationarity: bool = False,
        tol: float = 1e-3,
        max_iter: int = 500,
        lr: float = 1e-4,
        strict: bool = False,
    ) -> None:
        check_choice("loss", loss, LOSSES)
        check_choice("method", method, METHODS)
        check_choice("hessian", hessian, CURVATURES)
        check_positive("curvature_scale", curvature_scale)
        for name, value in (("damping", damping), ("l2", l2)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
        _parameters(model)
        self.model = model
        self.train_loader = _loader(train_loader)
        self.loss: Loss = loss
        self.damping = damping
        self.method: Method = method
        self.hessian: Curvature = hessian
        self.l2 = l2
        self.curvature_loader = self.train_loader if curvature_loader is None else _loader(curvature_loader)
        self.cache = cache
        self.include_added_in_hessian = include_added_in_hessian
        self.correct_stationarity = correct_stationarity
        self.solver: dict[str, Any] = {
            "curvature_scale": curvature_scale,
            "tol": tol,
            "max_iter": max_iter,
            "lr": lr,
            "strict": strict,
        }
        self.last: Update | None = None
        self._before: list[Tensor] | None = None

    def update(
        self, flipped: Iterable[Sequence[Tensor]] | Clicks, added: Iterable[Sequence[Tensor]] | Clicks | None = None
    ) -> Update:
        """Compute the update at the present parameters; `apply` makes it.

        Args:
            flipped: Batches (inputs, then the old labels, 0) of the training rows that converted since, or `Clicks`.
            added: Batches of new rows with the labels known by now, or None.

        Returns:
            The change and what there is to know about it. Without flipped and added rows the change is zero.

        Raises:
            ValueError: If a flipped row is already positive, a label isn't 0 or 1, a loader yields nothing to train on, the
                system is singular, or, with `strict`, the solver did not converge.
        """
        start = time.perf_counter()
        old, new = list(_loader(flipped)), [] if added is None else list(_loader(added))
        n = self._rows()
        b = influence_rhs(self.model, old, new, n, loss=self.loss)
        facts: dict[str, float] = {"n": n, "flipped": _count(old), "added": _count(new), "rhs_norm": float(b.norm())}
        if self.correct_stationarity and (old or new):
            b = b - self._gradient()
        solve = Solve(torch.zeros_like(b), 0.0, 0, True, 0.0, 0)
        if bool(b.any()):
            operator = self._operator(new if self.include_added_in_hessian else [], n)
            solve = solve_influence(operator, b, damping=self.damping, method=self.method, **self.solver)
        delta = solve.x.to(b.dtype)
        facts |= {name: float(value) for name, value in vars(solve).items() if name != "x"}
        facts |= {
            "damping": self.damping,
            "delta_norm": float(delta.norm()),
            "seconds": time.perf_counter() - start,
        }
        self.last = Update(delta, facts)
        return self.last

    def apply(self, update: Update | None = None) -> None:
        """Add the update, by default the last one, to the parameters; `revert` takes it back.

        Raises:
            ValueError: If there is no update, it isn't finite, or one is applied already.
        """
        update = self.last if update is None else update
        if update is None:
            raise ValueError("there is no update to apply; call update() first")
        if self._before is not None:
            raise ValueError("an update is applied already; revert() or keep() it first")
        if not bool(update.delta.isfinite().all()):
            raise ValueError("the update is not finite; raise damping")
        parameters = _parameters(self.model)
        self._before = [p.detach().clone() for p in parameters.values()]
        with torch.no_grad():
            for p, change in zip(parameters.values(), _split(update.delta, parameters), strict=True):
                p.add_(change)

    def revert(self) -> None:
        """Put back the parameters of before `apply`, bit for bit.

        Raises:
            ValueError: If no update is applied.
        """
        if self._before is None:
            raise ValueError("no update is applied")
        with torch.no_grad():
            for p, value in zip(_parameters(self.model).values(), self._before, strict=True):
                p.copy_(value)
        self._before = None

    def keep(self) -> None:
        """Make the applied update permanent, so that the next one starts from the present parameters."""
        self._before = None

    def diagnose(self, num_steps: int = 30) -> dict[str, float]:
        """Say what to expect of an update at the present parameters.

        Args:
            num_steps: Lanczos steps, >= 1; each is a product with the curvature.

        Returns:
            `gradient_norm` of the training objective (far from 0: training stopped early, see `correct_stationarity`),
            `smallest` and `largest` eigenvalue of the undamped curvature, estimated; the damping has to exceed the size
            of a negative one.
        """
        like = _flat(_parameters(self.model))
        low, high = extreme_eigenvalues(self._operator([], 1), like, num_steps=num_steps)
        return {"gradient_norm": float(self._gradient().norm()), "smallest": low, "largest": high}

    def _rows(self) -> int:
        """Number of training rows; their labels are checked on the way."""
        n = 0
        for *_, label in self.train_loader:
            check_binary("labels", label)
            n += len(label)
        if n == 0:
            raise ValueError("train_loader yields no rows; an iterator can be used up: pass a loader or a list")
        return n

    def _gradient(self) -> Tensor:
        """Gradient of the training objective, 0 for embeddings that training doesn't use."""
        parameters = _parameters(self.model)
        total, n = torch.zeros_like(_flat(parameters)), 0
        with _evaluating(self.model), _UsedRows(self.model) as used:
            for *inputs, label in self.train_loader:
                total += _gradient(_summed(_logits(self.model, inputs, label), label, self.loss), parameters)
                n += len(label)
        return total / n + self.l2 * _flat(parameters) * used.mask(parameters)

    def _operator(self, added: list[Sequence[Tensor]], n: int) -> Callable[[Tensor], Tensor]:
        full = _Curvature(self.model, self.curvature_loader, self.hessian, self.loss, self.l2, cache=self.cache)
        operator: Callable[[Tensor], Tensor] = _OneBatch(full) if self.method == "adam" else full
        if not added:
            return operator
        more = _Curvature(self.model, added, self.hessian, self.loss, 0.0, cache=self.cache)
        return _Sum(operator, more, _count(added) / n)


def choose_damping(
    updater: InfluenceUpdater,
    flipped: Iterable[Sequence[Tensor]] | Clicks,
    added: Iterable[Sequence[Tensor]] | Clicks | None,
    dampings: Sequence[float],
    score: Callable[[nn.Module], float],
) -> tuple[float, Update]:
    """Compute the update with several dampings and return the one whose model scores best.

    The model is left as it was; `updater.damping` and `updater.last` are those of the best.

    Args:
        updater: The updater.
        flipped: See `InfluenceUpdater.update`.
        added: See `InfluenceUpdater.update`.
        dampings: What to try, from large to small; the first of equals wins.
        score: Judges the updated model, higher is better: on validation clicks, never on test clicks.

    Returns:
        The damping and its update.

    Raises:
        ValueError: If there is nothing to try, or for the reasons of `update`.
    """
    if not dampings:
        raise ValueError("dampings is empty")
    old, new = list(_loader(flipped)), None if added is None else list(_loader(added))
    best: tuple[float, float, Update] | None = None
    for damping in dampings:
        updater.damping = damping
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a damping that is too small is one to discard
            update = updater.update(old, new)
        if update.info["negative_curvature"] or not bool(update.delta.isfinite().all()):
            continue
        updater.apply(update)
        value = score(updater.model)
        updater.revert()
        if best is None or value > best[0]:
            best = (value, damping, update)
    if best is None:
        raise ValueError(f"all dampings of {list(dampings)} met negative curvature; raise damping or use hessian='ggn'")
    _, updater.damping, updater.last = best
    return updater.damping, updater.last


class _Curvature:
    """Curvature of the mean loss over a loader, on flat vectors; every product is one pass."""

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Sequence[Tensor]],
        kind: Curvature,
        loss: Loss,
        l2: float,
        *,
        cache: bool = False,
    ) -> None:
        self.model, self.loader, self.kind, self.loss, self.l2, self.cache = model, loader, kind, loss, l2, cache
        self.parts: list[tuple[int, Callable[[Tensor], Tensor]]] = []
        self.full = DataHVP(model, _mean_loss(loss), loader, l2=l2, size=lambda batch: len(batch[-1]))

    def __call__(self, v: Tensor) -> Tensor:
        if self.kind == "hessian" and not self.cache:
            return _flat(self.full(_named(v, self.full.params)))
        total, rows = torch.zeros_like(v), 0
        for count, product in self.products():
            total += count * product(v)
            rows += count
        return total / rows + self.l2 * v

    def products(self) -> Iterable[tuple[int, Callable[[Tensor], Tensor]]]:
        """Rows and product of every batch."""
        if not self.cache:
            return ((len(batch[-1]), partial(self.of_batch, batch)) for batch in self.loader)
        if not self.parts:
            self.parts = [(len(batch[-1]), self.kept(batch)) for batch in self.loader]
        return self.parts

    def kept(self, batch: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
        """The product of one batch with a graph that stays."""
        if self.kind == "ggn":
            return _GaussNewton(self.model, batch, self.loss)
        loss_fn, values = module_loss(self.model, _mean_loss(self.loss), *batch)
        product = make_hvp(loss_fn, values)
        return lambda v: _flat(product(_named(v, values)))

    def of_batch(self, batch: Sequence[Tensor], v: Tensor) -> Tensor:
        """The product of one batch, nothing kept."""
        return hessian_vector_product(self.model, batch, v, kind=self.kind, loss=self.loss)


class _GaussNewton:
    """Gauss-Newton product of a batch: forward along v, the loss's second derivative, and back.

    The forward part is the derivative of the backward one by its cotangent, so that one graph serves both.
    """

    def __init__(self, model: nn.Module, batch: Sequence[Tensor], loss: Loss) -> None:
        *inputs, label = batch
        self.values = {name: p.detach().requires_grad_() for name, p in _parameters(model).items()}
        with torch.enable_grad(), _evaluating(model):
            self.f = _shaped(torch.func.functional_call(model, self.values, tuple(inputs)), label)
            self.cotangent = torch.zeros_like(self.f, requires_grad=True)
            back = self._backward(self.cotangent, create_graph=True)
        self.back = [(number, g) for number, g in enumerate(back) if g.requires_grad]  # the rest isn't used
        f = self.f.detach()
        self.weight = (torch.ones_like(f) if loss == "squared" else f.sigmoid() * (-f).sigmoid()) / len(label)

    def __call__(self, v: Tensor) -> Tensor:
        parts = _split(v, self.values)
        (along,) = torch.autograd.grad(
            [g for _, g in self.back], self.cotangent, [parts[number] for number, _ in self.back], retain_graph=True
        )
        return torch.cat([g.reshape(-1) for g in self._backward(self.weight * along, create_graph=False)])

    def _backward(self, cotangent: Tensor, *, create_graph: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            self.f,
            list(self.values.values()),
            cotangent,
            create_graph=create_graph,
            retain_graph=True,
            materialize_grads=True,
        )


class _OneBatch:
    """Curvature of one batch per call, the loader's batches in turn: for Adam alone."""

    stochastic = True

    def __init__(self, full: _Curvature) -> None:
        self.exact = full
        self.batches: Iterator[Sequence[Tensor]] = iter(())

    def __call__(self, v: Tensor) -> Tensor:
        batch = next(self.batches, None)
        if batch is None:
            self.batches = iter(self.exact.loader)
            batch = next(self.batches)
        return self.exact.of_batch(batch, v) + self.exact.l2 * v


class _Scaled:
    """An operator times a number, with the attributes that the solvers look at."""

    def __init__(self, hvp: Callable[[Tensor], Tensor], factor: float) -> None:
        self.hvp, self.factor = hvp, factor
        self.stochastic = getattr(hvp, "stochastic", False)
        whole = getattr(hvp, "exact", None)
        self.exact = None if whole is None else lambda v: factor * whole(v)

    def __call__(self, v: Tensor) -> Tensor:
        return self.factor * self.hvp(v)


class _Sum:
    """One operator plus a share of another."""

    def __init__(self, first: Callable[[Tensor], Tensor], second: _Curvature, share: float) -> None:
        self.first, self.second, self.share = first, second, share
        self.stochastic = getattr(first, "stochastic", False)
        whole = getattr(first, "exact", first)
        self.exact = lambda v: whole(v) + share * second(v)

    def __call__(self, v: Tensor) -> Tensor:
        return self.first(v) + self.share * self.second(v)


class _UsedRows:
    """Notes which rows of the model's embedding tables are looked up."""

    def __init__(self, model: nn.Module) -> None:
        self.tables = {
            f"{name}.weight" if name else "weight": part
            for name, part in model.named_modules()
            if isinstance(part, (nn.Embedding, nn.EmbeddingBag))
        }
        self.rows = {name: torch.zeros(len(part.weight), dtype=torch.bool) for name, part in self.tables.items()}

    def __enter__(self) -> Self:
        self.handles = [part.register_forward_pre_hook(self._note(name)) for name, part in self.tables.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _note(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.rows[name][inputs[0].detach().reshape(-1).cpu()] = True

        return note

    def mask(self, parameters: dict[str, Tensor]) -> Tensor:
        """1 for every flat parameter but those of the rows that weren't."""
        parts = []
        for name, p in parameters.items():
            part = torch.ones_like(p)
            if name in self.rows:
                part *= self.rows[name].to(p.device).unsqueeze(1)
            parts.append(part.reshape(-1))
        return torch.cat(parts)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, with the mode of every submodule restored afterwards."""
    before = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


def _mean_loss(loss: Loss) -> Callable[..., Tensor]:
    def mean_loss(model: nn.Module, *batch: Tensor) -> Tensor:
        *inputs, label = batch
        return _summed(_logits(model, inputs, label), label, loss) / len(label)

    return mean_loss


def _logits(model: nn.Module, inputs: Sequence[Tensor], label: Tensor) -> Tensor:
    return _shaped(model(*inputs), label)


def _shaped(logits: Any, label: Tensor) -> Tensor:
    if not isinstance(logits, torch.Tensor) or logits.shape != label.shape or label.ndim != 1:
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(
            f"the model must return one logit per row and labels be (B,), got {got} and {tuple(label.shape)}"
        )
    return logits


def _summed(logits: Tensor, label: Tensor, loss: Loss) -> Tensor:
    y = label.to(logits.dtype)
    if loss == "squared":
        return 0.5 * (logits - y).square().sum()
    return F.binary_cross_entropy_with_logits(logits, y, reduction="sum")


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError("no parameter of the model has requires_grad=True")
    return found


def _gradient(value: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return torch.cat([g.reshape(-1) for g in found])


def _flat(tree: dict[str, Tensor]) -> Tensor:
    return torch.cat([x.detach().reshape(-1) for x in tree.values()])


def _split(flat: Tensor, like: dict[str, Tensor]) -> list[Tensor]:
    parts = torch.split(flat, [p.numel() for p in like.values()])
    return [part.reshape(p.shape) for part, p in zip(parts, like.values(), strict=True)]


def _named(flat: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(like, _split(flat, like), strict=True))


def _loader(batches: Iterable[Sequence[Tensor]] | Clicks) -> Iterable[Sequence[Tensor]]:
    return batches.loader() if isinstance(batches, Clicks) else batches


def _count(batches: Iterable[Sequence[Tensor]]) -> int:
    return sum(len(batch[-1]) for batch in batches)
