r"""Products of a Hessian with vectors, exact and without the matrix.

$$Hv=\frac{\partial}{\partial\epsilon}\nabla R(\theta+\epsilon v)\Big|_{\epsilon=0}=\nabla_\theta\big(\nabla R(\theta)^\top v\big)$$

Forward over reverse takes the first form, one pass without a graph that stays. Reverse over reverse takes the second:
the graph of the gradient is built once and serves every further vector. Both agree to rounding.

Reference: B. A. Pearlmutter, *Fast Exact Multiplication by the Hessian*, Neural Computation 6(1), 1994.
Documentation: `docs/papers/ihvp/solvers.md`.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ihvp._trees import Pytree, leaves_like, leaves_of, map_tensors, rebuild, working

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

__all__ = ["Mode", "hvp", "make_hvp", "module_loss"]

Mode = Literal["auto", "fwd-rev", "rev-rev"]
"""How a product is formed; `"auto"` takes the other way where an operation knows only one."""

MODES = ("auto", "fwd-rev", "rev-rev")
# What torch says when an operation lacks a forward-mode formula, a second derivative, or a form for torch.func.
MISSING = ("not implemented", "does not support", "functorch transforms")


def hvp(loss_fn: Callable[[Pytree], Tensor], params: Pytree, v: Pytree, *, mode: Mode = "auto") -> Pytree:
    r"""One Hessian-vector product.

    $$Hv,\qquad H=\nabla^2_\theta R(\theta)$$

    For many products at the same parameters and data use `make_hvp`.

    Args:
        loss_fn: $R$: takes a pytree like `params` and returns a scalar. It must be deterministic: no dropout, batch norm
            in evaluation mode (`module_loss` sees to it).
        params: $\theta$: a tensor, or a dict, list or tuple of tensors, floating. Half precision is copied to float32.
        v: The vector, same structure and shapes.
        mode: `"fwd-rev"` needs a forward-mode formula for every operation, `"rev-rev"` a second derivative. `"auto"`
            tries the first and then the second.

    Returns:
        $Hv$ as a pytree like `params`, without a graph, in the dtype of the parameters or float32 for half precision.

    Raises:
        ValueError: If `v` and `params` differ in structure, a leaf isn't floating, the loss isn't a scalar, an operation
            of the loss supports no mode that was asked for, or `mode` is unknown.

    Examples:
        >>> import torch
        >>> hvp(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))  # H = diag(6 x)
        tensor([ 6., 12.])
    """
    _check_mode(mode)
    theta = [working(leaf) for leaf in leaves_of(params, "params")]
    return rebuild(params, _once(loss_fn, params, theta, _vector(params, theta, v), mode))


def make_hvp(
    loss_fn: Callable[[Pytree], Tensor], params: Pytree, *, mode: Mode = "auto", l2: float = 0.0
) -> Callable[[Pytree], Pytree]:
    r"""The Hessian at fixed parameters and data as a function.

    $$v\mapsto\big(\nabla^2_\theta R(\theta)+l_2I\big)v$$

    In mode `"rev-rev"` the graph of the gradient is built at the first product and reused: about one backward pass of
    that graph per product, at the price of keeping it, some three forward passes of memory. The parameters are copied,
    so the operator stays the Hessian at their present values.

    Args:
        loss_fn: $R$: takes a pytree like `params` and returns a scalar; deterministic, as in `hvp`.
        params: $\theta$: a tensor, or a dict, list or tuple of tensors. Half precision is copied to float32.
        mode: `"auto"` tries `"rev-rev"`, the faster one on a CPU even for a single product, and then `"fwd-rev"`, which
            keeps nothing between products and needs less memory.
        l2: Weight decay that training had and `loss_fn` leaves out, >= 0, in the reduction of the loss (for a sum over n
            samples, n times the optimiser's weight decay of the mean).

    Returns:
        A function from a pytree to a pytree, both like `params`; results carry no graph.

    Raises:
        ValueError: If a leaf isn't floating, `l2` is negative or `mode` is unknown; at a product, see `hvp`.

    Examples:
        >>> import torch
        >>> H = make_hvp(lambda p: (p["w"] ** 4).sum(), {"w": torch.tensor([1.0, 2.0])}, l2=0.5)
        >>> H({"w": torch.tensor([1.0, 0.0])}), H({"w": torch.tensor([0.0, 1.0])})
        ({'w': tensor([12.5000,  0.0000])}, {'w': tensor([ 0.0000, 48.5000])})
    """
    _check_mode(mode)
    if not (l2 >= 0 and l2 < float("inf")):
        raise ValueError(f"l2 must be a finite number >= 0, got {l2!r}")
    theta = [working(leaf).clone() for leaf in leaves_of(params, "params")]
    shape = rebuild(params, theta)
    graph: _GradientGraph | None = None
    forward = mode == "fwd-rev"

    def product(v: Pytree) -> Pytree:
        nonlocal graph, forward
        vector = _vector(shape, theta, v)
        if forward:
            out = _once(loss_fn, shape, theta, vector, "fwd-rev")
        else:
            try:
                with _explained("rev-rev"):
                    graph = graph or _GradientGraph(loss_fn, shape, theta)
                    out = graph.product(vector)
            except (RuntimeError, _NoFormula) as error:
                if mode == "rev-rev" or isinstance(error, torch.OutOfMemoryError):
                    raise
                out = _once(loss_fn, shape, theta, vector, "fwd-rev")
                forward, graph = True, None
        return rebuild(shape, [h.add(x, alpha=l2) if l2 else h for h, x in zip(out, vector, strict=True)])

    return product


def module_loss(
    module: nn.Module, loss: Callable[..., Tensor], *args: Any
) -> tuple[Callable[[Pytree], Tensor], dict[str, Tensor]]:
    r"""A module's loss as a function of its trainable parameters, as `hvp` and `make_hvp` take it.

    Every call evaluates `loss(module, *args)` with the given parameters in place of the module's own, in evaluation mode
    (dropout off, batch norm with its running statistics), and puts the mode of every submodule back. The module's
    parameters, their `.grad` and `requires_grad` are never touched.

    Args:
        module: Any module; what has `requires_grad` takes part, the rest is constant.
        loss: Called as `loss(module, *args)`; returns a scalar, with the reduction (sum or mean) that the right-hand side
            uses as well.
        *args: Passed on, for instance inputs and targets. Floating half-precision tensors are copied to float32.

    Returns:
        The loss as a function of a dict of parameters (all of them or some: the others keep the module's values), and
        that dict: name to detached tensor, half precision as float32 copies.

    Raises:
        ValueError: If no parameter of the module requires a gradient.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.eye(2), torch.zeros(2, 1)
        >>> R, params = module_loss(model, lambda m, x, y: ((m(x) - y) ** 2).sum(), x, y)
        >>> hvp(R, params, {"weight": torch.tensor([[1.0, 3.0]])})
        {'weight': tensor([[2., 6.]])}
    """
    params = {name: working(p) for name, p in module.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("no parameter of the module has requires_grad=True")
    called = _Called(module, loss)
    constants = _half_constants(module, params)
    args = tuple(map_tensors(working, arg) for arg in args)

    def loss_fn(values: Pytree) -> Tensor:
        unknown = values.keys() - params.keys()
        if unknown:
            raise ValueError(f"params must have the structure of the module's: unknown {sorted(unknown)}")
        swapped = {f"module.{name}": value for name, value in {**constants, **values}.items()}
        with evaluation_mode(module):
            out: Tensor = torch.func.functional_call(called, swapped, args)
        return out

    return loss_fn, params


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode and restore the mode of every submodule afterwards."""
    before = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


class _Called(nn.Module):
    """A loss whose call can be given other parameters: inside it the module itself holds them, attributes included."""

    def __init__(self, module: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.module = module
        self.loss = loss

    def forward(self, *args: Any) -> Tensor:
        return self.loss(self.module, *args)


class _GradientGraph:
    """The gradient at fixed parameters with its graph, which every product walks backwards once."""

    def __init__(self, loss_fn: Callable[[Pytree], Tensor], shape: Pytree, theta: list[Tensor]) -> None:
        self.leaves = [leaf.detach().requires_grad_() for leaf in theta]
        with torch.enable_grad():
            value = _value(loss_fn, rebuild(shape, self.leaves))
            gradient: tuple[Tensor | None, ...] = (None,)
            if value.requires_grad:
                gradient = torch.autograd.grad(value, self.leaves, create_graph=True, allow_unused=True)
        if all(g is None for g in gradient):
            raise ValueError("loss_fn does not depend on params: it must compute with the pytree that it is given")
        # What the gradient doesn't reach is constant, and so is a gradient without a graph: both have no row in H.
        self.curved = [(i, g) for i, g in enumerate(gradient) if g is not None and g.requires_grad]

    def product(self, v: list[Tensor]) -> list[Tensor]:
        if not self.curved:
            return [torch.zeros_like(leaf) for leaf in self.leaves]
        outputs = [g for _, g in self.curved]
        rows = [v[i] for i, _ in self.curved]
        found = torch.autograd.grad(
            outputs, self.leaves, rows, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return [h.detach() for h in found]


def _once(
    loss_fn: Callable[[Pytree], Tensor], shape: Pytree, theta: list[Tensor], v: list[Tensor], mode: Mode
) -> list[Tensor]:
    """One product, without anything that outlives it."""
    if mode != "rev-rev":
        try:
            with _explained("fwd-rev"):
                return _forward_over_reverse(loss_fn, shape, theta, v)
        except (RuntimeError, _NoFormula) as error:
            if mode == "fwd-rev" or isinstance(error, torch.OutOfMemoryError):
                raise
    with _explained("rev-rev"):
        return _GradientGraph(loss_fn, shape, theta).product(v)


def _forward_over_reverse(
    loss_fn: Callable[[Pytree], Tensor], shape: Pytree, theta: list[Tensor], v: list[Tensor]
) -> list[Tensor]:
    gradient = torch.func.grad(lambda leaves: _value(loss_fn, rebuild(shape, leaves)))
    with torch.no_grad():
        out = torch.func.jvp(gradient, (theta,), (v,))[1]
    return [h.detach() for h in out]


def _value(loss_fn: Callable[[Pytree], Tensor], params: Pytree) -> Tensor:
    # The fused attention kernels have no second derivative; the plain one has both forms.
    with sdpa_kernel(SDPBackend.MATH):
        value = loss_fn(params)
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"loss_fn must return a scalar tensor, got {got}")
    return value.reshape(())


class _NoFormula(ValueError):
    """An operation of the loss can't be differentiated in the way that was asked for."""


@contextmanager
def _explained(mode: str) -> Iterator[None]:
    """Turn torch's report of a missing formula into advice; any other error is the caller's own."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, NotImplementedError) and not any(part in text for part in MISSING):
            raise
        other = "rev-rev" if mode == "fwd-rev" else "fwd-rev"
        raise _NoFormula(
            f"mode {mode!r} does not work for an operation of loss_fn; try {other!r}, or for fused attention "
            f'attn_implementation="eager": {text}'
        ) from error


def _vector(shape: Pytree, theta: list[Tensor], v: Pytree) -> list[Tensor]:
    leaves = leaves_like(shape, v, "v", "params")
    return [leaf.detach().to(like) for leaf, like in zip(leaves, theta, strict=True)]


def _half_constants(module: nn.Module, params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Float32 copies of frozen parameters and buffers in half precision, which couldn't meet float32 parameters."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: working(t) for name, t in named if name not in params and working(t).dtype != t.dtype}


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
