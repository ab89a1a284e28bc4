"""Sums over weighted edges, the operation under every convolution of this package.

Gathering a message per edge and scattering it moves m x d numbers several times. On a CPU a product with sparse rows needs
no messages; the edges are sorted once per batch for all layers that share them. On a GPU, and for half precision, messages
are gathered and scattered.
"""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor


class Routes(NamedTuple):
    """The edges of a batch in the order of their targets and, for the gradient, of their sources."""

    order: Tensor
    pointer: Tensor
    source: Tensor
    back_order: Tensor
    back_pointer: Tensor
    target: Tensor


def edge_routes(edge_index: Tensor, x: Tensor) -> Routes | None:
    """Sort the edges of a batch; None where sparse products don't exist.

    Args:
        edge_index: Edges, int64 [2, m].
        x: Node features [n, ...]; device, dtype and n are used.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return None
    n = len(x)
    source, target = edge_index
    order = target.argsort(stable=True)
    source, target = source[order], target[order]
    back = source.argsort(stable=True)
    return Routes(order, _pointer(target, n), source, back, _pointer(source, n), target[back])


def propagate(x: Tensor, edge_index: Tensor, weight: Tensor | None, routes: Routes | None) -> Tensor:
    """Sum w_ij x_i over the edges i -> j at j.

    Args:
        x: [n, d].
        edge_index: Edges, int64 [2, m].
        weight: [m], or None for ones.
        routes: `edge_routes` of the same edges.

    Returns:
        [n, d].
    """
    if routes is not None:
        ordered = x.new_ones(edge_index.shape[1]) if weight is None else weight.index_select(0, routes.order)
        return _WeightedSum.apply(x, ordered, routes)  # type: ignore[no-any-return]
    source, target = edge_index
    message = x.index_select(0, source)  # x[source] takes a slower path
    if weight is not None:
        message = message * weight.unsqueeze(-1)
    at = target.unsqueeze(-1).expand_as(message)
    return message.new_zeros(x.shape).scatter_add(0, at, message)


def propagate_relu(x: Tensor, edge_index: Tensor, weight: Tensor | None, routes: Routes | None) -> Tensor:
    """Sum relu(w_ij x_i) over the edges i -> j at j; arguments as for `propagate`."""
    if weight is None:
        return propagate(x.relu(), edge_index, None, routes)
    # relu(w x) is w relu(x) for w >= 0 and -w relu(-x) below, so that no message has to be written down
    out = propagate(x.relu(), edge_index, weight.relu(), routes)
    if weight.device.type == "cpu" and not bool((weight < 0).any()):
        return out
    return out + propagate((-x).relu(), edge_index, (-weight).relu(), routes)


def _pointer(index: Tensor, num_nodes: int) -> Tensor:
    return F.pad(torch.bincount(index, minlength=num_nodes).cumsum(0), (1, 0))


@functools.cache
def _consume_notice() -> None:
    """Torch says once per process that its sparse rows are in beta; a user can do nothing about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.zeros(2, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0))


def _csr(pointer: Tensor, column: Tensor, value: Tensor) -> Tensor:
    _consume_notice()
    n = len(pointer) - 1
    return torch.sparse_csr_tensor(pointer, column, value, (n, n), check_invariants=False)


class _WeightedSum(torch.autograd.Function):
    """The product with sparse rows; the weights are in the order of `routes`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, routes: Routes) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.routes = routes
        return torch.sparse.mm(_csr(routes.pointer, routes.source, weight), x, "sum")  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, weight), routes = ctx.saved_tensors, ctx.routes
        grad = grad.contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            back = _csr(routes.back_pointer, routes.target, weight.index_select(0, routes.back_order))
            grad_x = torch.sparse.mm(back, grad, "sum")
        if ctx.needs_input_grad[1]:
            pattern = _csr(routes.pointer, routes.source, torch.zeros_like(weight))
            grad_weight = torch.sparse.sampled_addmm(pattern, grad, x.T, beta=0.0).values()
        return grad_x, grad_weight, None
