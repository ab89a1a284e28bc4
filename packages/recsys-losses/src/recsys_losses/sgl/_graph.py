"""The graph, its thinned copies, and the propagation through them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from recsys_losses import models
from recsys_losses._bipartite import Propagate
from recsys_losses._checks import upcast
from recsys_losses._interactions import edge_keys

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from recsys_losses._interactions import InteractionData
    from recsys_losses.models import Layout


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

    A thinned graph is normalised by its own degrees. It is `recsys_losses.models.normalized_adjacency`.

    Args:
        edge_index: Pairs (user, item), items not offset, LongTensor `(2, E)`; repeated pairs count once.
        num_users: U; nodes 0..U-1 are the users.
        num_items: I; nodes U..U+I-1 are the items.
        dtype: Dtype of the weights.
        layout: `"csr"` (sparse rows, the faster product) or `"coo"`.

    Returns:
        Sparse tensor `(U + I, U + I)`. A node without an edge has an empty row.

    Raises:
        ValueError: If `edge_index` isn't an int64 `(2, E)` tensor, an id is out of range, or `layout` is unknown.

    Reference: Wu et al., 2021, section 2.1.

    Examples:
        >>> import torch
        >>> normalized_adjacency(torch.tensor([[0, 0], [0, 1]]), 1, 2).to_dense()[0]
        tensor([0.0000, 0.7071, 0.7071])
    """
    check_pairs("edge_index", edge_index, num_users, num_items)
    return models.normalized_adjacency(edge_index, num_users, num_items, dtype=dtype, layout=layout)


def propagate(embedding: Tensor, adj: Tensor | Sequence[Tensor], num_layers: int) -> Tensor:
    r"""Return the mean of the embeddings over the hops 0..L.

    $$Z=\frac1{L+1}\sum_{l=0}^{L}X_l,\qquad X_{l}=\hat A_lX_{l-1}$$

    Args:
        embedding: $X_0$, users first, shape `(N, d)`, floating.
        adj: Symmetric sparse matrix `(N, N)`, or one per hop (random walk). The backward pass takes the symmetry for
            granted.
        num_layers: Number of hops L >= 0.

    Returns:
        Shape `(N, d)`, in the dtype of `embedding`; half precision is computed in float32.

    Raises:
        ValueError: If a matrix doesn't fit, or there isn't one per hop.

    Reference: Wu et al., 2021, section 2.1 (the encoder of LightGCN).

    Examples:
        >>> import torch
        >>> adj = normalized_adjacency(torch.tensor([[0], [0]]), 1, 1)
        >>> propagate(torch.tensor([[1.0], [3.0]]), adj, 1)
        tensor([[2.],
                [2.]])
    """
    if not num_layers >= 0:
        raise ValueError(f"num_layers must be >= 0, got {num_layers!r}")
    single = isinstance(adj, torch.Tensor)
    matrices: list[Tensor] = [adj] if isinstance(adj, torch.Tensor) else list(adj)
    if not single and len(matrices) != num_layers:
        raise ValueError(f"adj holds {len(matrices)} matrices, but num_layers is {num_layers}: one per hop is needed")
    wide = upcast(embedding)
    for matrix in matrices:
        if embedding.ndim != 2 or matrix.shape != (len(embedding), len(embedding)) or matrix.dtype != wide.dtype:
            raise ValueError(
                f"expected embedding (N, d) and adj (N, N) of dtype {wide.dtype}, "
                f"got {tuple(embedding.shape)} and {tuple(matrix.shape)} {matrix.dtype}"
            )
    result: Tensor = Propagate.apply(wide, matrices[0] if single else matrices, num_layers)
    return result.to(embedding.dtype)


def drop_nodes(
    edge_index: Tensor, num_users: int, num_items: int, ratio: float, *, generator: torch.Generator | None = None
) -> Tensor:
    r"""Leave out the edges of int(ratio U) users and int(ratio I) items, drawn without replacement (ND).

    Args:
        edge_index: Pairs (user, item), LongTensor `(2, E)`.
        num_users: U.
        num_items: I.
        ratio: $\rho$ in [0, 1).
        generator: Source of the draw; None uses torch's default generator.

    Returns:
        LongTensor `(2, E')` of the edges left, in their order.

    Raises:
        ValueError: If an id is out of range or `ratio` isn't in [0, 1).

    Reference: Wu et al., 2021, eq. (6).

    Examples:
        >>> import torch
        >>> drop_nodes(torch.tensor([[0, 1], [0, 0]]), 2, 1, 0.5, generator=torch.Generator().manual_seed(0))
        tensor([[0],
                [0]])
    """
    check_pairs("edge_index", edge_index, num_users, num_items)
    check_ratio("ratio", ratio)
    return edge_index[:, kept_by_nodes(edge_index[0], edge_index[1], num_users, num_items, ratio, generator)]


def drop_edges(edge_index: Tensor, ratio: float, *, generator: torch.Generator | None = None) -> Tensor:
    r"""Keep int(E (1 - ratio)) edges, drawn without replacement (ED).

    Args:
        edge_index: Pairs (user, item), LongTensor `(2, E)`.
        ratio: $\rho$ in [0, 1).
        generator: Source of the draw; None uses torch's default generator.

    Returns:
        LongTensor `(2, E')` of the edges kept, in their order.

    Raises:
        ValueError: If `edge_index` isn't an int64 `(2, E)` tensor or `ratio` isn't in [0, 1).

    Reference: Wu et al., 2021, eq. (7).

    Examples:
        >>> import torch
        >>> drop_edges(torch.arange(20).view(2, 10), 0.3).shape
        torch.Size([2, 7])
    """
    check_pairs("edge_index", edge_index)
    check_ratio("ratio", ratio)
    return edge_index[:, kept_edges(edge_index.shape[1], ratio, generator, edge_index.device)]


def random_walk_views(
    edge_index: Tensor, ratio: float, num_layers: int, *, generator: torch.Generator | None = None
) -> list[Tensor]:
    r"""Draw one view for every hop, each as `drop_edges` does (RW). With one hop it is edge dropout.

    Args:
        edge_index: Pairs (user, item), LongTensor `(2, E)`.
        ratio: $\rho$ in [0, 1).
        num_layers: Number of hops L >= 0.
        generator: Source of the draws; None uses torch's default generator.

    Returns:
        L tensors `(2, E')`: one view of the graph, hop by hop. Call it twice for two views.

    Raises:
        ValueError: If `edge_index` isn't an int64 `(2, E)` tensor, `ratio` isn't in [0, 1), or `num_layers` is negative.

    Reference: Wu et al., 2021, eq. (8).

    Examples:
        >>> import torch
        >>> [tuple(view.shape) for view in random_walk_views(torch.arange(20).view(2, 10), 0.1, 3)]
        [(2, 9), (2, 9), (2, 9)]
    """
    if not num_layers >= 0:
        raise ValueError(f"num_layers must be >= 0, got {num_layers!r}")
    check_pairs("edge_index", edge_index)
    check_ratio("ratio", ratio)
    return [drop_edges(edge_index, ratio, generator=generator) for _ in range(num_layers)]


def add_noise(data: InteractionData, ratio: float, *, generator: torch.Generator | None = None) -> InteractionData:
    r"""Add int(ratio E) false training pairs, drawn uniformly from the pairs that are nowhere in the data.

    `recsys_losses.data.inject_false_positives` gives every user his share instead; here active and inactive users get
    alike many.

    Args:
        data: Clean data with E training pairs; validation and test pairs stay as they are.
        ratio: False pairs per training pair, at least 0.
        generator: CPU generator; None uses torch's default generator.

    Returns:
        The data with the longer training set, new pairs last.

    Raises:
        ValueError: If `ratio` is negative or not finite, or there are not enough free pairs.

    Reference: Wu et al., 2021, section 4.3.2 (robustness to noise).

    Examples:
        >>> import torch
        >>> from recsys_losses.data import InteractionData
        >>> train = torch.stack((torch.zeros(10, dtype=torch.long), torch.arange(10)))
        >>> add_noise(InteractionData(1, 50, train=train, test=torch.tensor([[0], [10]])), 0.2)
        InteractionData(num_users=1, num_items=50, train=12, valid=none, test=1)
    """
    if not 0 <= ratio < float("inf"):
        raise ValueError(f"ratio must be a finite number >= 0, got {ratio!r}")
    wanted = int(ratio * data.train.shape[1])
    cells = data.num_users * data.num_items
    parts = [edge_keys(part, data.num_items) for part in (data.train, data.valid, data.test) if part is not None]
    known = torch.unique(torch.cat(parts))
    if wanted > cells - len(known):
        raise ValueError(f"ratio {ratio!r} asks for {wanted} pairs, but only {cells - len(known)} are free")
    noise = known.new_empty(0)
    while len(noise) < wanted:
        drawn = torch.randint(cells, (2 * (wanted - len(noise)),), generator=generator)
        # Sorted first so that `unique` doesn't prefer low ids when more are drawn than needed.
        drawn = torch.unique(drawn[~torch.isin(drawn, torch.cat([known, noise]))])
        chosen = torch.randperm(len(drawn), generator=generator)[: wanted - len(noise)]
        noise = torch.cat([noise, drawn[chosen]])
    new = torch.stack([noise // data.num_items, noise % data.num_items])
    return dataclasses.replace(data, train=torch.cat([data.train, new], dim=1))


def kept_edges(total: int, ratio: float, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Return a mask (total,) that keeps int(total * (1 - ratio)) edges."""
    return _mask(total, int(total * (1 - ratio)), generator, device)


def kept_by_nodes(
    user: Tensor, item: Tensor, num_users: int, num_items: int, ratio: float, generator: torch.Generator | None
) -> Tensor:
    """Return a mask (E,) of the edges between nodes that are kept."""
    users = _mask(num_users, num_users - int(num_users * ratio), generator, user.device)
    items = _mask(num_items, num_items - int(num_items * ratio), generator, user.device)
    return users[user] & items[item]


def _mask(total: int, count: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Return a mask (total,) with `count` entries set, drawn where the generator lives."""
    source = device if generator is None else generator.device
    mask = torch.zeros(total, dtype=torch.bool, device=source)
    mask[torch.randperm(total, generator=generator, device=source)[:count]] = True
    return mask.to(device)


def check_ratio(name: str, ratio: float) -> None:
    """Raise ValueError unless the ratio is in [0, 1)."""
    if not 0 <= ratio < 1:
        raise ValueError(f"{name} must be in [0, 1), got {ratio!r}")


def check_pairs(name: str, edge_index: Tensor, num_users: int | None = None, num_items: int | None = None) -> None:
    """Raise ValueError unless `edge_index` is an int64 (2, E) tensor of ids in the tables."""
    if edge_index.ndim != 2 or edge_index.shape[0] != 2 or edge_index.dtype != torch.int64:
        raise ValueError(
            f"{name} must be an int64 tensor of shape (2, E), got {edge_index.dtype} {tuple(edge_index.shape)}"
        )
    check_range(f"{name}[0]", edge_index[0], num_users)
    check_range(f"{name}[1]", edge_index[1], num_items)


def check_range(name: str, ids: Tensor, size: int | None) -> None:
    """Raise ValueError unless all ids are in 0..size-1."""
    if ids.numel() == 0:
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or (size is not None and high >= size):
        raise ValueError(f"{name} is out of range: ids {low}..{high}, expected 0..{'' if size is None else size - 1}")
