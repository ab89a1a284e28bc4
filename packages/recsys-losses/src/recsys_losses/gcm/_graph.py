"""The user-item graph whose edges carry contexts, as fixed sparse matrices.

A convolution with summed messages is linear: the messages of the neighbours are one sparse product, and what the
contexts add to a node doesn't change from layer to layer. Both products are kept in sparse rows together with their
transposes, so that neither a training step nor its backward pass builds anything.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from recsys_losses._checks import check_choice

if TYPE_CHECKING:
    from torch import Tensor

NORMS = ("left-single", "left-double", "right-single", "right-double", "both")

# Powers of the degree with which a node scales what it receives and what it sends.
_POWERS = {
    "left-single": (-0.5, 0.0),
    "left-double": (-1.0, 0.0),
    "right-single": (0.0, -0.5),
    "right-double": (0.0, -1.0),
    "both": (-0.5, -0.5),
}


def check_indices(name: str, index: Tensor, size: int) -> None:
    """Raise ValueError unless `index` is an integer tensor with values in [0, size)."""
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise ValueError(f"{name} must hold integers, got dtype {index.dtype}")
    if index.numel() == 0:
        return
    low, high = (int(x) for x in index.aminmax())
    if low < 0 or high >= size:
        raise ValueError(f"{name} holds {low if low < 0 else high}, which is out of range [0, {size})")


def check_edges(
    events: tuple[Tensor, Tensor, Tensor],
    sizes: tuple[int, int, int],
    names: tuple[str, str, str] = ("train_users", "train_items", "train_contexts"),
) -> None:
    """Raise ValueError unless users, items and contexts are vectors of one length with indices below `sizes`."""
    if any(index.ndim != 1 for index in events) or len({len(index) for index in events}) != 1:
        shapes = ", ".join(str(tuple(index.shape)) for index in events)
        raise ValueError(f"{names[0]}, {names[1]} and {names[2]} must be vectors of the same length, got {shapes}")
    for name, index, size in zip(names, events, sizes, strict=True):
        check_indices(name, index, size)


class SparseMap(nn.Module):
    """A fixed sparse matrix that multiplies tables of embeddings, with the transpose for the backward pass.

    Args:
        row: Rows of the entries, LongTensor (n,); entries of one place are added up.
        column: Columns, LongTensor (n,).
        value: Entries (n,).
        shape: Number of rows and columns.
    """

    pointer: Tensor
    column: Tensor
    value: Tensor
    pointer_t: Tensor
    column_t: Tensor
    value_t: Tensor

    def __init__(self, row: Tensor, column: Tensor, value: Tensor, shape: tuple[int, int]) -> None:
        super().__init__()
        key, place = torch.unique(row * shape[1] + column, return_inverse=True)
        value = value.new_zeros(len(key)).index_add_(0, place, value)
        row, column = key // max(shape[1], 1), key % max(shape[1], 1)
        by_column = torch.argsort(column, stable=True)
        self.shape = shape
        # Three plain buffers rather than a sparse one, which can't be deep-copied or shared with other processes.
        for name, tensor in (
            ("pointer", _pointer(row, shape[0])),
            ("column", _index(column)),
            ("value", value),
            ("pointer_t", _pointer(column, shape[1])),
            ("column_t", _index(row[by_column])),
            ("value_t", value[by_column]),
        ):
            self.register_buffer(name, tensor, persistent=False)

    def matrix(self) -> Tensor:
        """Return the matrix, sparse CSR, without copying."""
        return _sparse_rows(self.pointer, self.column, self.value, self.shape)

    def transposed(self) -> Tensor:
        """Return the transpose, sparse CSR, without copying."""
        return _sparse_rows(self.pointer_t, self.column_t, self.value_t, (self.shape[1], self.shape[0]))

    def forward(self, table: Tensor) -> Tensor:
        """Return the product with a table (columns, d), (rows, d)."""
        out: Tensor = _Product.apply(table, self.matrix(), self.transposed())
        return out


class ContextGraph(nn.Module):
    """The interactions as a graph over users (first) and graph items, with the factors of a norm.

    Args:
        users: Users of the M interactions, LongTensor (M,), in range.
        items: Their items.
        contexts: Their contexts.
        num_users: U.
        num_items: Number of graph items.
        norm: One of `NORMS`.
        dtype: Dtype of the factors.
    """

    users: Tensor
    items: Tensor
    contexts: Tensor
    receive: Tensor
    send: Tensor

    def __init__(
        self,
        users: Tensor,
        items: Tensor,
        contexts: Tensor,
        num_users: int,
        num_items: int,
        *,
        norm: str,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_choice("norm", norm, NORMS)
        self.num_users, self.num_items = num_users, num_items
        nodes = num_users + num_items
        user, item = users, items + num_users
        receiver, sender = torch.cat([user, item]), torch.cat([item, user])
        degree = torch.bincount(receiver, minlength=nodes).clamp_min(1).to(dtype)
        receive, send = (degree**power for power in _POWERS[norm])
        for name, tensor in (
            ("users", users),
            ("items", items),
            ("contexts", contexts),
            ("receive", receive[:, None]),
            ("send", send[:, None]),
        ):
            self.register_buffer(name, tensor, persistent=False)
        self.neighbours = SparseMap(receiver, sender, receive[receiver] * send[sender], (nodes, nodes))

    def context_map(self, num_contexts: int) -> SparseMap:
        """Return the map from context vectors (C, d) to what they add to the nodes in every layer, receiving factor included."""
        receiver = torch.cat([self.users, self.items + self.num_users])
        return SparseMap(
            receiver, self.contexts.repeat(2), self.receive[receiver, 0], (len(self.receive), num_contexts)
        )

    def feature_map(self, context_rows: Tensor, num_rows: int) -> SparseMap:
        """Return the same map, from the rows of which context vectors are means.

        It needs no context vectors, of which there may be as many as interactions.

        Args:
            context_rows: Rows of each context in one table, LongTensor (C, k).
            num_rows: Rows of the table.
        """
        fields = context_rows.shape[1]
        receiver = torch.cat([self.users, self.items + self.num_users]).repeat_interleave(fields)
        row = context_rows[self.contexts].flatten().repeat(2)
        value = self.receive[receiver, 0] / fields
        return SparseMap(receiver, row, value, (len(self.receive), num_rows))


def sum_rows(table: Tensor, rows: Tensor) -> Tensor:
    """Return the sums of the rows of a table (n, d) that `rows` (B, k) names, (B, d)."""
    out: Tensor = _SumRows.apply(table, rows)
    return out


class _SumRows(torch.autograd.Function):
    """`embedding_bag`, whose own backward pass sorts the indices and takes several times as long on a CPU."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor) -> Tensor:
        ctx.size = table.shape
        ctx.save_for_backward(rows)
        return F.embedding_bag(rows, table, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        total = grad.new_zeros(ctx.size)
        for column in rows.unbind(1):
            total.index_add_(0, column, grad)
        return total, None


class _Product(torch.autograd.Function):
    """Sparse product whose backward pass multiplies with the given transpose."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, matrix: Tensor, transposed: Tensor) -> Tensor:
        ctx.transposed = transposed
        return matrix @ table.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.transposed @ grad.contiguous(), None, None


class Propagate(torch.autograd.Function):
    r"""Weighted sum of the layers $h^{l+1}=Wh^l+s$, by Horner's scheme: one product per layer in either direction."""

    @staticmethod
    def forward(
        ctx: Any, nodes: Tensor, sums: Tensor, matrix: Tensor, transposed: Tensor, weights: tuple[float, ...]
    ) -> Tensor:
        ctx.transposed, ctx.weights = transposed, weights
        total = weights[-1] * nodes
        for layer in reversed(range(len(weights) - 1)):
            base = torch.add(weights[layer] * nodes, sums, alpha=sum(weights[layer + 1 :]))
            total = torch.addmm(base, matrix, total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        weights = ctx.weights
        hop = grad.contiguous()
        nodes, sums = weights[0] * hop, sum(weights[1:]) * hop
        for layer in range(1, len(weights)):
            hop = ctx.transposed @ hop
            nodes.add_(hop, alpha=weights[layer])
            sums.add_(hop, alpha=sum(weights[layer + 1 :]))
        return nodes, sums, None, None, None


def _pointer(sorted_or_not: Tensor, size: int) -> Tensor:
    count = torch.bincount(sorted_or_not, minlength=size)
    return _index(torch.cat([count.new_zeros(1), count.cumsum(0)]), entries=len(sorted_or_not))


def _index(index: Tensor, entries: int = 0) -> Tensor:
    # 32-bit positions are what MKL takes; with 64 bits torch converts them in every product.
    return index.to(torch.int32 if max(len(index), entries) < 2**31 else torch.int64)


def _sparse_rows(pointer: Tensor, column: Tensor, value: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Sparse CSR tensor support is in beta.*")
        # The invariants hold by construction; checking them would cost a pass over the graph in every step.
        return torch.sparse_csr_tensor(pointer, column, value, shape, check_invariants=False)
