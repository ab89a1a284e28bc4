"""Bipartite graphs in sparse rows, and products with them whose backward pass needs no transposed copy.

Users are the nodes 0..U-1 and items the nodes U..U+I-1. A graph is kept as its pairs sorted by user and, through a
permutation, by item: leaving out pairs keeps both orders, so that a thinned graph costs no sorting.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class SparseRows(NamedTuple):
    """The parts of a square CSR matrix. They can be copied and moved, which sparse tensors can't everywhere."""

    pointer: Tensor
    column: Tensor
    weight: Tensor

    def matrix(self) -> Tensor:
        """Return the sparse CSR tensor, without copying."""
        size = (len(self.pointer) - 1, len(self.pointer) - 1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*Sparse CSR tensor support is in beta.*")
            # The invariants hold by construction; checking them would cost a pass over the graph in every step.
            return torch.sparse_csr_tensor(self.pointer, self.column, self.weight, size, check_invariants=False)


class SortedPairs(NamedTuple):
    """Distinct pairs of a bipartite graph: user and item (E,) sorted by user, then item, and the order by item."""

    user: Tensor
    item: Tensor
    by_item: Tensor


def sorted_pairs(edge_index: Tensor, num_items: int) -> SortedPairs:
    """Sort the pairs (2, E) and drop repetitions."""
    pairs = torch.unique(edge_index[0] * num_items + edge_index[1])
    user, item = pairs // num_items, pairs % num_items
    return SortedPairs(user, item, torch.argsort(item, stable=True))


def normalized_rows(
    pairs: SortedPairs, num_users: int, num_items: int, dtype: torch.dtype, keep: Tensor | None = None
) -> SparseRows:
    """Return the symmetrically normalised adjacency of the pairs, or of those whose `keep` (E,) is set."""
    user, item, by_item = pairs
    kept, order = slice(None) if keep is None else keep, by_item if keep is None else by_item[keep[by_item]]
    # Users' rows come first.
    row = torch.cat([user[kept], item[order] + num_users])
    column = torch.cat([item[kept] + num_users, user[order]])
    degree = torch.bincount(row, minlength=num_users + num_items)
    weight = degree.to(dtype).clamp_min(1).rsqrt()
    pointer = torch.cat([degree.new_zeros(1), degree.cumsum(0)])
    # 32-bit positions are what MKL takes; with 64 bits torch converts them in every product.
    index = torch.int32 if row.numel() < 2**31 else torch.int64
    return SparseRows(pointer.to(index), column.to(index), weight[row] * weight[column])


class Propagate(torch.autograd.Function):
    """Mean over the hops 0..L of a propagation through one symmetric matrix, or one per hop.

    As the matrices are symmetric, the gradient is propagated through them in reverse.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, adjacency: Tensor | Sequence[Tensor], num_layers: int) -> Tensor:
        ctx.hops = [adjacency] * num_layers if isinstance(adjacency, torch.Tensor) else list(adjacency)
        if all(matrix is ctx.hops[0] for matrix in ctx.hops):
            return _nested(table, ctx.hops)
        hop = total = table.contiguous()
        for matrix in ctx.hops:
            hop = matrix @ hop
            total = total + hop
        return total / (num_layers + 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _nested(grad, ctx.hops[::-1]), None, None


def _nested(table: Tensor, hops: Sequence[Tensor]) -> Tensor:
    """Return (x + A_L(x + ... A_1(x))) / (L + 1), Horner's scheme: a product and a sum in one pass."""
    total = table = table.contiguous()
    for matrix in hops:
        total = torch.addmm(table, matrix, total)
    return total / (len(hops) + 1)


class SymmetricProduct(torch.autograd.Function):
    """Product with a symmetric sparse matrix."""

    @staticmethod
    def forward(ctx: Any, adjacency: Tensor, table: Tensor) -> Tensor:
        ctx.adjacency = adjacency
        return adjacency @ table

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, ctx.adjacency @ grad.contiguous()
