r"""Embedding recommenders: matrix factorisation and LightGCN.

Both hold a table of users and one of items and score a pair by the product of its rows. LightGCN averages the tables over
the hops of a propagation through the bipartite graph of the training pairs,

$$E=\frac1{L+1}\sum_{l=0}^{L}\hat A^lE^{(0)},\qquad
\hat A=D^{-1/2}\begin{pmatrix}0&R\\R^\top&0\end{pmatrix}D^{-1/2},$$

with degree 0 giving 0 instead of infinity. It wraps `torch_geometric.nn.LightGCN`, whose layers normalise the graph anew
in every layer of every step and propagate edge by edge. Here the graph is normalised once and kept in sparse rows, and as
$\hat A$ is symmetric the backward pass is the same product, without a transposed copy.

Reference: X. He et al., *LightGCN: Simplifying and Powering Graph Convolution Network for Recommendation*, SIGIR 2020,
arXiv:2002.02126, eq. (3), (4) and (8).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from recsys_losses._bipartite import Propagate, SparseRows, SymmetricProduct, normalized_rows, sorted_pairs
from recsys_losses._checks import check_choice
from recsys_losses._interactions import check_edges

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MODELS", "LightGCN", "MatrixFactorization", "Recommender", "normalized_adjacency"]

Init = Literal["xavier", "normal", "xavier-joint"]
Layout = Literal["csr", "coo"]

MODELS = ("mf", "lightgcn")
_INITS = ("xavier", "normal", "xavier-joint")
_LAYOUTS = ("csr", "coo")


def normalized_adjacency(
    edge_index: Tensor,
    num_users: int,
    num_items: int,
    *,
    dtype: torch.dtype = torch.float32,
    layout: Layout = "csr",
) -> Tensor:
    r"""Return the symmetrically normalised adjacency of the bipartite graph, without self loops.

    $$\hat A_{vw}=\frac{1}{\sqrt{\deg v\,\deg w}}\ \text{for an edge},\qquad 0\ \text{otherwise}$$

    Args:
        edge_index: Pairs (user, item), items not offset, LongTensor `(2, E)`; repeated pairs count once.
        num_users: U; nodes 0..U-1 are the users.
        num_items: I; nodes U..U+I-1 are the items.
        dtype: Dtype of the weights.
        layout: `"csr"` (sparse rows, the faster product) or `"coo"` (coalesced coordinates).

    Returns:
        Sparse tensor `(U + I, U + I)` on the device of `edge_index`. A node without an edge has an empty row.

    Raises:
        ValueError: If `edge_index` isn't an int64 `(2, E)` tensor of known users and items, or `layout` is unknown.

    Reference: He et al., 2020, eq. (7).

    Examples:
        >>> import torch
        >>> normalized_adjacency(torch.tensor([[0, 0], [0, 1]]), 1, 2).to_dense()
        tensor([[0.0000, 0.7071, 0.7071],
                [0.7071, 0.0000, 0.0000],
                [0.7071, 0.0000, 0.0000]])
    """
    check_choice("layout", layout, _LAYOUTS)
    check_edges("edge_index", edge_index, num_users, num_items)
    rows = normalized_rows(sorted_pairs(edge_index, num_items), num_users, num_items, dtype).matrix()
    return rows if layout == "csr" else rows.to_sparse(layout=torch.sparse_coo)


class MatrixFactorization(nn.Module):
    r"""Matrix factorisation: one free vector per user and per item, $s_{ui}=u\cdot i$.

    Args:
        num_users: U.
        num_items: I.
        dim: Width d of the embeddings.
        init: `"xavier"`: uniform within $\pm\sqrt{6/(\mathrm{rows}+d)}$, each table by its own rows;
            `"xavier-joint"`: the same with the U + I rows of one table, as PyG and CPR do; `"normal"`: $N(0, 0.1^2)$.
        user_dropout: Share of the entries of a user's vector dropped in training, in [0, 1).
        generator: Source of the initial values, a CPU generator.
        seed: Seeds a generator of its own instead; with neither, torch's default generator is used.

    Raises:
        ValueError: If a size is below 1, `init` is unknown, the dropout is out of range, or both `generator` and `seed`
            are given.

    Examples:
        >>> model = MatrixFactorization(3, 5, dim=8, seed=0)
        >>> [tuple(table.shape) for table in model.embeddings()]
        [(3, 8), (5, 8)]
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        dim: int = 64,
        *,
        init: Init = "xavier",
        user_dropout: float = 0.0,
        generator: torch.Generator | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(num_users=num_users, num_items=num_items, dim=dim)
        _check_dropout("user_dropout", user_dropout)
        self.num_users, self.num_items, self.dim = num_users, num_items, dim
        self.user_dropout = user_dropout
        table = _initial_table(num_users, num_items, dim, init, _source(generator, seed))
        self.user_embedding = nn.Parameter(table[:num_users].clone())
        self.item_embedding = nn.Parameter(table[num_users:].clone())

    def base_embeddings(self) -> tuple[Tensor, Tensor]:
        """Return the user table `(U, d)` and the item table `(I, d)`."""
        return self.user_embedding, self.item_embedding

    def embeddings(self) -> tuple[Tensor, Tensor]:
        """Return the tables that score, here the same as `base_embeddings`."""
        return self.user_embedding, self.item_embedding

    def training_embeddings(self, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return the tables of one training step."""
        return self.embeddings()

    def user_keep_mask(self, rows: int, generator: torch.Generator | None = None) -> Tensor | None:
        """Return the scaled dropout mask `(rows, d)` of the users of a training step, None without dropout."""
        if self.user_dropout == 0:
            return None
        return _keep_mask((rows, self.dim), self.user_dropout, self.user_embedding, generator)

    def options(self) -> dict[str, Any]:
        """Return the options that rebuild the model, JSON values."""
        return {"model": "mf", "dim": self.dim, "user_dropout": self.user_dropout}

    def extra_repr(self) -> str:
        return (
            f"num_users={self.num_users}, num_items={self.num_items}, dim={self.dim}, user_dropout={self.user_dropout}"
        )


class LightGCN(nn.Module):
    r"""LightGCN: the tables averaged over the hops of a propagation through the graph of the training pairs.

    `backbone` is `torch_geometric.nn.LightGCN` and `adjacency` the normalised graph it accepts:
    `model.backbone.get_embedding(model.adjacency)` gives the same tables as `embeddings`, which only propagate faster.

    Args:
        num_users: U.
        num_items: I.
        train_edge_index: Training pairs (user, item), items not offset, LongTensor `(2, E)`. Users and items without a
            pair keep their own vector, divided by the number of hops plus one.
        dim: Width d of the embeddings.
        num_layers: Number of hops L; with 0 the model is matrix factorisation.
        message_dropout: Share of the entries dropped after every hop in training, in [0, 1).
        init: As in `MatrixFactorization`.
        generator: As in `MatrixFactorization`.
        seed: As in `MatrixFactorization`.

    Raises:
        ValueError: If an argument is out of range (see `MatrixFactorization` and `normalized_adjacency`).

    Reference: He et al., 2020.

    Examples:
        >>> import torch
        >>> model = LightGCN(2, 3, torch.tensor([[0, 1], [2, 0]]), dim=8, num_layers=2, seed=0)
        >>> [tuple(table.shape) for table in model.embeddings()]
        [(2, 8), (3, 8)]
    """

    _pointer: Tensor
    _column: Tensor
    _weight: Tensor

    def __init__(
        self,
        num_users: int,
        num_items: int,
        train_edge_index: Tensor,
        dim: int = 64,
        num_layers: int = 3,
        *,
        message_dropout: float = 0.0,
        init: Init = "xavier",
        generator: torch.Generator | None = None,
        seed: int | None = None,
    ) -> None:
        from torch_geometric.nn import LightGCN as Backbone  # type: ignore[import-untyped]

        super().__init__()
        _check_sizes(num_users=num_users, num_items=num_items, dim=dim)
        if not num_layers >= 0:
            raise ValueError(f"num_layers must be >= 0, got {num_layers!r}")
        _check_dropout("message_dropout", message_dropout)
        self.num_users, self.num_items, self.dim = num_users, num_items, dim
        self.num_layers, self.message_dropout = num_layers, message_dropout
        table = _initial_table(num_users, num_items, dim, init, _source(generator, seed))
        with torch.random.fork_rng(devices=[]):  # the values that PyG draws are replaced
            self.backbone = Backbone(num_users + num_items, dim, num_layers, normalize=False)
        with torch.no_grad():
            self.backbone.embedding.weight.copy_(table)
        # Three plain buffers rather than a sparse one, which can't be deep-copied or shared with other processes.
        for name in ("_pointer", "_column", "_weight"):
            self.register_buffer(name, torch.empty(0), persistent=False)
        self.replace_edges(train_edge_index)

    @property
    def adjacency(self) -> Tensor:
        """The normalised graph, sparse CSR `(U + I, U + I)`; see `normalized_adjacency`."""
        return SparseRows(self._pointer, self._column, self._weight).matrix()

    def base_embeddings(self) -> tuple[Tensor, Tensor]:
        """Return the user table `(U, d)` and the item table `(I, d)` before propagation."""
        return self._divide(self.backbone.embedding.weight)

    def embeddings(self) -> tuple[Tensor, Tensor]:
        """Return the propagated tables, without dropout, `(U, d)` and `(I, d)`."""
        table = self.backbone.embedding.weight
        return self._divide(Propagate.apply(table, self.adjacency, self.num_layers))

    def training_embeddings(self, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return the propagated tables of one training step, with message dropout."""
        if self.message_dropout == 0 or self.num_layers == 0:
            return self.embeddings()
        adjacency = self.adjacency
        hop = total = self.backbone.embedding.weight
        for _ in range(self.num_layers):
            hop = SymmetricProduct.apply(adjacency, hop)
            hop = hop * _keep_mask(tuple(hop.shape), self.message_dropout, hop, generator)
            total = total + hop
        return self._divide(total / (self.num_layers + 1))

    def user_keep_mask(self, rows: int, generator: torch.Generator | None = None) -> Tensor | None:
        """Return None: LightGCN drops messages, not users."""
        return None

    def edge_index(self) -> Tensor:
        """Return the distinct pairs of the graph, LongTensor `(2, E)`, sorted by user and item."""
        degree = self._pointer[: self.num_users + 1].long().diff()
        user = torch.repeat_interleave(torch.arange(self.num_users, device=degree.device), degree)
        return torch.stack([user, self._column[: len(user)].long() - self.num_users])

    def replace_edges(self, train_edge_index: Tensor) -> None:
        """Propagate through the graph of other pairs, LongTensor `(2, E)`, from now on."""
        table = self.backbone.embedding.weight
        adjacency = normalized_adjacency(
            train_edge_index.to(table.device), self.num_users, self.num_items, dtype=table.dtype
        )
        self._pointer, self._column = adjacency.crow_indices(), adjacency.col_indices()
        self._weight = adjacency.values()

    def options(self) -> dict[str, Any]:
        """Return the options that rebuild the model from its edges, JSON values."""
        return {
            "model": "lightgcn",
            "dim": self.dim,
            "num_layers": self.num_layers,
            "message_dropout": self.message_dropout,
        }

    def extra_repr(self) -> str:
        return (
            f"num_users={self.num_users}, num_items={self.num_items}, dim={self.dim}, num_layers={self.num_layers}, "
            f"message_dropout={self.message_dropout}"
        )

    def _divide(self, table: Tensor) -> tuple[Tensor, Tensor]:
        return table[: self.num_users], table[self.num_users :]


Recommender = MatrixFactorization | LightGCN


def _initial_table(num_users: int, num_items: int, dim: int, init: str, generator: torch.Generator | None) -> Tensor:
    """Return the initial values of users and items, (U + I, d)."""
    check_choice("init", init, _INITS)
    table = torch.empty(num_users + num_items, dim)
    if init == "normal":
        return table.normal_(0, 0.1, generator=generator)
    parts = (table,) if init == "xavier-joint" else (table[:num_users], table[num_users:])
    for part in parts:
        bound = math.sqrt(6 / (part.shape[0] + dim))
        part.uniform_(-bound, bound, generator=generator)
    return table


def _keep_mask(shape: tuple[int, ...], dropout: float, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return 1 / (1 - p) where an entry is kept and 0 where it is dropped."""
    source = like.device if generator is None else generator.device
    kept = torch.rand(shape, generator=generator, device=source).to(like.device) >= dropout
    return kept.to(like.dtype) / (1 - dropout)


def _source(generator: torch.Generator | None, seed: int | None) -> torch.Generator | None:
    if generator is not None and seed is not None:
        raise ValueError("give either generator or seed, not both")
    return generator if seed is None else torch.Generator().manual_seed(seed)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if not size >= 1:
            raise ValueError(f"{name} must be at least 1, got {size!r}")


def _check_dropout(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}")
