"""The battery that every loss of the workspace runs through.

One call checks the value against an independent reference, the gradient against finite differences, the half-precision
behaviour, extreme inputs, purity, the Module, the reductions and the order of the rows. torch and numpy are imported
when the battery runs, because this package depends on pytest alone.
"""

from __future__ import annotations

import copy
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch
    from torch import Tensor

__all__ = ["check_loss"]


def check_loss(
    fn: Callable[..., Any],
    inputs: Sequence[Any],
    params: Mapping[str, Any],
    reference: Callable[..., Any],
    *,
    module: torch.nn.Module | None = None,
    rtol: float = 1e-10,
    atol: float = 1e-12,
    gradient: bool | Callable[..., Sequence[Any]] = True,
    detached: Sequence[int] = (),
    gradcheck_atol: float = 1e-5,
    dtypes: Mapping[str, float] | None = None,
    extreme: float | None = 1e4,
    extreme_inputs: Sequence[int] | None = None,
    reductions: Sequence[str] = ("none", "sum", "mean"),
    rows: Sequence[int] | None = None,
    permutation: bool = True,
) -> None:
    r"""Run one loss through the battery; the first thing that is wrong raises.

    What is checked, in this order: (1) the inputs are unchanged by the call, and (2) the value equals `reference`, which
    gets numpy arrays and the same `params`; (3) the gradient; (4) each of `dtypes` gives the value of the rounded inputs
    within its tolerance, keeps the dtype and has finite gradients; (5) inputs times `extreme` give a finite loss and
    finite gradients in float32; (6) `module(*inputs)` equals the function, also after `deepcopy`, pickle and a
    `state_dict` round trip; (7) the reductions agree; (8) a permutation of the rows changes nothing. `fn` only ever
    gets copies.

    Every switch below exists for losses that *by their definition* can't satisfy a point; use it with a comment.

    Args:
        fn: The loss, called as `fn(*inputs, **params)`; returns one tensor.
        inputs: Positional arguments in order. Floating tensors are cast (float64 for the value and the gradient);
            integer and boolean tensors, None and Python values are passed as they are.
        params: Keyword arguments.
        reference: Independent numpy implementation, called as `reference(*arrays, **params)`.
        module: A module in its initial state with `module(*inputs)` = `fn(*inputs, **params)`. Every call runs on
            a fresh copy, so a module with state is fine.
        rtol: Relative tolerance of the float64 value.
        atol: Absolute tolerance of the float64 value.
        gradient: True runs `torch.autograd.gradcheck`. A callable gives the expected gradients of the summed output
            instead (`gradient(*arrays, **params)`, one array or None per input), for losses with a detached branch.
            False leaves the gradient out, for functions that aren't differentiable.
        detached: Positions of floating inputs that must get no gradient (None or exactly zero).
        gradcheck_atol: Absolute tolerance of the finite differences.
        dtypes: dtype name to relative tolerance; default `{"float32": 1e-5, "bfloat16": 5e-2}`. An empty mapping
            leaves the check out.
        extreme: Factor of the extreme inputs; None leaves the check out.
        extreme_inputs: Positions of the floating inputs that are scaled; default all of them. Weights or
            probabilities, which have a bounded range, are left out here.
        reductions: What the `reduction` argument accepts; `()` if the loss has none.
        rows: Positions of the inputs whose first dimension is the row; default: the tensors whose first dimension
            has the length of the first tensor's.
        permutation: False if the loss depends on the order of its rows.

    Raises:
        AssertionError: If a check fails; the message names the check.
        ValueError: If there is no tensor among `inputs`, or `reductions` names an unknown reduction.

    Examples:
        >>> import numpy as np, torch
        >>> def squared(x, *, reduction="mean"):
        ...     loss = x.square()
        ...     return loss if reduction == "none" else getattr(loss, reduction)()
        >>> def reference(x, *, reduction="mean"):
        ...     return x**2 if reduction == "none" else getattr(np, reduction)(x**2)
        >>> check_loss(squared, [torch.tensor([1.0, -2.0])], {}, reference)
    """
    import torch

    unknown = sorted(set(reductions) - {"none", "sum", "mean"})
    if unknown:
        raise ValueError(f"reductions must be among 'none', 'sum', 'mean', got {unknown!r}")
    tensors = [i for i, value in enumerate(inputs) if isinstance(value, torch.Tensor)]
    if not tensors:
        raise ValueError(f"inputs must contain a tensor, got {[type(value).__name__ for value in inputs]}")
    floats = [i for i in tensors if inputs[i].is_floating_point()]
    learned = [i for i in floats if i not in detached]

    modes = [{**params, "reduction": reduction} for reduction in reductions] or [dict(params)]
    if reductions and "reduction" not in params:
        modes.append(dict(params))
    for mode in modes:
        _check_value(fn, inputs, mode, reference, rtol, atol)
    if gradient is not False:
        _check_gradient(fn, inputs, dict(params), gradient, learned, detached, gradcheck_atol)
    differentiable = learned if gradient is not False else []
    for name, tolerance in ({"float32": 1e-5, "bfloat16": 5e-2} if dtypes is None else dtypes).items():
        _check_dtype(fn, inputs, modes, name, tolerance, differentiable)
    if extreme is not None:
        scaled = floats if extreme_inputs is None else extreme_inputs
        _check_extreme(fn, inputs, modes, extreme, scaled, differentiable)
    if module is not None:
        _check_module(fn, inputs, dict(params), module, floats)
    row_inputs = [i for i in tensors if _row_like(inputs, i, tensors[0])] if rows is None else list(rows)
    if reductions:
        _check_reductions(fn, inputs, dict(params), reductions)
    if permutation:
        _check_permutation(fn, inputs, modes, row_inputs)


def _fail(check: str, message: str) -> None:
    raise AssertionError(f"check_loss, {check}: {message}")


def _row_like(inputs: Sequence[Any], index: int, first: int) -> bool:
    value = inputs[index]
    return bool(value.ndim and inputs[first].ndim and value.shape[0] == inputs[first].shape[0])


def _cast(inputs: Sequence[Any], dtype: torch.dtype, learned: Sequence[int] = ()) -> list[Any]:
    """Return fresh leaves: floating tensors in `dtype`, the positions in `learned` with gradients."""
    import torch

    out: list[Any] = []
    for i, value in enumerate(inputs):
        if not isinstance(value, torch.Tensor):
            out.append(value)
        elif value.is_floating_point():
            out.append(value.detach().to(dtype, copy=True).requires_grad_(i in learned))
        else:
            out.append(value.detach().clone())
    return out


def _close(check: str, got: Tensor, want: Any, rtol: float, atol: float) -> None:
    """Compare shapes and numbers; NaN equals nothing."""
    import torch

    expected = torch.as_tensor(want, dtype=torch.float64)
    actual = got.detach().to("cpu", torch.float64)
    if actual.shape != expected.shape:
        _fail(check, f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    bad = ~((actual == expected) | ((actual - expected).abs() <= atol + rtol * expected.abs()))
    if bool(bad.any()):
        where = tuple(int(k) for k in bad.nonzero()[0])
        _fail(check, f"{actual[where].item()!r} instead of {expected[where].item()!r} at {where} (rtol={rtol})")


def _numpy(values: Sequence[Any]) -> list[Any]:
    import torch

    return [value.detach().cpu().numpy().copy() if isinstance(value, torch.Tensor) else value for value in values]


def _check_value(
    fn: Callable[..., Any],
    inputs: Sequence[Any],
    params: dict[str, Any],
    reference: Callable[..., Any],
    rtol: float,
    atol: float,
) -> None:
    import torch

    values = _cast(inputs, torch.float64)
    before = _cast(inputs, torch.float64)
    out = fn(*values, **params)
    _check_unchanged(values, before)
    if not isinstance(out, torch.Tensor):
        _fail("value", f"the loss must return one tensor, got {type(out).__name__}")
    _close(f"value {params}", out, reference(*_numpy(before), **params), rtol, atol)


def _check_gradient(
    fn: Callable[..., Any],
    inputs: Sequence[Any],
    params: dict[str, Any],
    gradient: bool | Callable[..., Sequence[Any]],
    learned: Sequence[int],
    detached: Sequence[int],
    atol: float,
) -> None:
    import torch

    if not learned and not callable(gradient):
        _fail("gradient", "no floating input to differentiate; pass gradient=False")
    if detached:
        values = _cast(inputs, torch.float64, [*learned, *detached])
        out = fn(*values, **params).sum()
        if out.requires_grad:
            out.backward()
        for i in detached:
            if values[i].grad is not None and bool(values[i].grad.any()):
                _fail("gradient", f"input {i} must get no gradient, got {values[i].grad}")
    values = _cast(inputs, torch.float64, learned)
    if callable(gradient):
        fn(*values, **params).sum().backward()
        for i, want in enumerate(gradient(*_numpy(values), **params)):
            if want is not None:
                got = values[i].grad
                _close(f"gradient of input {i}", torch.zeros_like(values[i]) if got is None else got, want, 1e-7, atol)
        return

    def of_learned(*leaves: Tensor) -> Any:
        arguments = list(values)
        for i, leaf in zip(learned, leaves, strict=True):
            arguments[i] = leaf
        return fn(*arguments, **params)

    try:
        torch.autograd.gradcheck(of_learned, tuple(values[i] for i in learned), atol=atol, rtol=1e-3)
    except RuntimeError as error:  # GradcheckError, or an output without a graph
        raise AssertionError(f"check_loss, gradient: {error}") from error


def _backward(check: str, out: Tensor, values: Sequence[Any], learned: Sequence[int]) -> None:
    """Demand finite values and finite gradients."""
    import torch

    if not bool(out.isfinite().all()):
        _fail(check, f"loss is not finite: {out.detach()}")
    if not learned:
        return
    torch.autograd.backward(out.sum())
    for i in learned:
        grad = values[i].grad
        if grad is not None and not bool(grad.isfinite().all()):
            _fail(check, f"gradient of input {i} is not finite: {grad}")


def _check_dtype(
    fn: Callable[..., Any],
    inputs: Sequence[Any],
    modes: Sequence[dict[str, Any]],
    name: str,
    tolerance: float,
    learned: Sequence[int],
) -> None:
    import torch

    dtype = getattr(torch, name)
    for params in modes:
        check = f"{name} {params}"
        values = _cast(inputs, dtype, learned)
        out = fn(*values, **params)
        if out.dtype != dtype:
            _fail(check, f"result has dtype {out.dtype}")
        # The inputs are rounded first, so that only the arithmetic of the loss is judged.
        exact = fn(*_cast(values, torch.float64), **params).detach()
        _close(check, out, exact, tolerance, tolerance * max(1.0, float(exact.abs().mean())))
        _backward(check, out, values, learned)
        for i in learned:
            if values[i].grad is not None and values[i].grad.dtype != dtype:
                _fail(check, f"gradient of input {i} has dtype {values[i].grad.dtype}")


def _check_extreme(
    fn: Callable[..., Any],
    inputs: Sequence[Any],
    modes: Sequence[dict[str, Any]],
    factor: float,
    scaled: Sequence[int],
    learned: Sequence[int],
) -> None:
    import torch

    large = [value.detach() * factor if i in scaled else value for i, value in enumerate(inputs)]
    for params in modes:
        values = _cast(large, torch.float32, learned)
        _backward(f"inputs x {factor:g} {params}", fn(*values, **params), values, learned)


def _check_unchanged(inputs: Sequence[Any], before: Sequence[Any]) -> None:
    import torch

    for i, (value, old) in enumerate(zip(inputs, before, strict=True)):
        same = torch.equal(value.detach(), old) if isinstance(value, torch.Tensor) else value == old
        if not same:
            _fail("inputs unchanged", f"input {i} was modified")


def _check_module(
    fn: Callable[..., Any],
    inputs: Sequence[Any],
    params: dict[str, Any],
    module: torch.nn.Module,
    floats: Sequence[int],
) -> None:
    import torch

    want = fn(*_cast(inputs, torch.float64), **params).detach()
    for name, twin in _twins(module):
        values = _cast(inputs, torch.float64, floats)
        out = twin(*values)
        if not isinstance(out, torch.Tensor):
            _fail(name, f"the module must return one tensor, got {type(out).__name__}")
        _close(name, out, want, 1e-12, 1e-14)


def _twins(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield copies of the module in its initial state, each made another way."""
    import pickle

    import torch

    yield "Module", copy.deepcopy(module)
    yield "Module after two deep copies", copy.deepcopy(copy.deepcopy(module))
    # Written and read in this process: a module that can't be pickled can't be sent to a spawned worker either.
    yield "Module after pickle", pickle.loads(pickle.dumps(module))  # noqa: S301
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    twin = copy.deepcopy(module)
    twin.load_state_dict(torch.load(buffer, weights_only=True), strict=True)  # bytes from two lines above
    yield "Module after state_dict", twin


def _check_reductions(
    fn: Callable[..., Any], inputs: Sequence[Any], params: dict[str, Any], reductions: Sequence[str]
) -> None:
    import torch

    values = _cast(inputs, torch.float64)
    out = {name: fn(*values, **{**params, "reduction": name}) for name in reductions}
    for name in ("sum", "mean"):
        if name in out and out[name].ndim != 0:
            _fail("reductions", f"{name!r} has shape {tuple(out[name].shape)}, expected a scalar")
        if name in out and "none" in out:
            _close(f"reductions, {name!r} against 'none'", out[name], getattr(out["none"], name)(), 1e-10, 1e-12)


def _check_permutation(
    fn: Callable[..., Any], inputs: Sequence[Any], modes: Sequence[dict[str, Any]], rows: Sequence[int]
) -> None:
    import torch

    if not rows:
        _fail("row permutation", "no input has rows; pass rows= or permutation=False")
    values = _cast(inputs, torch.float64)
    count = values[rows[0]].shape[0]
    for order in (torch.arange(count).roll(1), torch.arange(count).flip(0)):
        moved = [value[order] if i in rows else value for i, value in enumerate(values)]
        for params in modes:
            straight, permuted = fn(*values, **params), fn(*moved, **params)
            want = straight[order] if straight.ndim and straight.shape[0] == count else straight
            _close(f"row permutation {params}", permuted, want.detach(), 1e-9, 1e-12)
