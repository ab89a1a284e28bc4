"""The loss of SGL and its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from recsys_losses import baselines
from recsys_losses._checks import check_choice, upcast
from recsys_losses.baselines import result_dtype
from recsys_losses.blocked import blocked_scores
from recsys_losses.sgl._graph import check_range, normalized_adjacency, propagate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from recsys_losses._checks import Reduction

Mode = Literal["both_side", "user_side", "item_side", "merge"]
Negatives = Literal["all", "batch"]
BatchReduction = Literal["sum", "mean"]

MODES = ("both_side", "user_side", "item_side", "merge")
NEGATIVES = ("all", "batch")
BATCH_REDUCTIONS = ("sum", "mean")


class SGLLoss(NamedTuple):
    """The loss of a batch and its parts, scalars.

    Attributes:
        loss: bpr + ssl_weight * ssl + l2_weight * l2, what is minimised.
        bpr: The ranking loss.
        ssl: The agreement of the two views, without its weight.
        l2: Half the squared norms, without their weight.
    """

    loss: Tensor
    bpr: Tensor
    ssl: Tensor
    l2: Tensor


@dataclass(frozen=True)
class Objective:
    """What the loss is made of; checked when it is built."""

    temperature: float
    ssl_weight: float
    l2_weight: float
    mode: Mode
    negatives: Negatives
    reduction: BatchReduction
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        _check_ssl(self.temperature, self.mode, self.negatives, self.reduction, self.chunk_size)
        for name in ("ssl_weight", "l2_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a finite number >= 0, got {getattr(self, name)!r}")

    def __call__(
        self,
        table: Tensor,
        num_users: int,
        encoded: Tensor,
        views: tuple[Tensor, Tensor] | None,
        users: Tensor,
        pos_items: Tensor,
        neg_items: Tensor,
    ) -> SGLLoss:
        """Return the loss of a batch, given the tables of layer 0, of the full graph and of the two views (N, d)."""
        rows = torch.cat([users, pos_items + num_users, neg_items + num_users])
        user, pos, neg = encoded.index_select(0, rows).chunk(3)
        bpr = bpr_loss((user * pos).sum(1), (user * neg).sum(1), self.reduction)
        l2 = table.index_select(0, rows).square().sum() / (2 if self.reduction == "sum" else 2 * len(users))
        ssl = torch.zeros_like(bpr)
        if views is not None:
            sides = [part for view in views for part in (view[:num_users], view[num_users:])]
            user1, item1, user2, item2 = sides
            total = _ssl_sum(
                user1,
                user2,
                item1,
                item2,
                users,
                pos_items,
                self.temperature,
                self.mode,
                self.negatives,
                self.chunk_size,
            )
            ssl = total if self.reduction == "sum" else total / len(users)
        return SGLLoss(bpr + self.ssl_weight * ssl + self.l2_weight * l2, bpr, ssl, l2)


def bpr_loss(pos_score: Tensor, neg_score: Tensor, reduction: Reduction = "sum") -> Tensor:
    r"""Bayesian personalised ranking loss, summed over the batch.

    $$\ell_b=\operatorname{softplus}(-(\hat y_{ui}-\hat y_{uj}))$$

    It is `recsys_losses.baselines.bpr_loss` with another default: SGL's weights belong to sums.

    Args:
        pos_score: Scores of the observed items, shape `(B,)`, floating.
        neg_score: Scores of the sampled items, shape `(B,)`.
        reduction: `"sum"`, `"mean"` or `"none"`.

    Returns:
        Scalar, or `(B,)` with `"none"`; half precision is computed in float32.

    Raises:
        ValueError: If the shapes differ or aren't `(B,)` with B >= 1, or `reduction` is unknown.

    Reference: Wu et al., 2021, eq. (3).

    Examples:
        >>> import torch
        >>> bpr_loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
        tensor(1.3863)
    """
    return baselines.bpr_loss(pos_score, neg_score, reduction=reduction)


def ssl_loss(
    user_view1: Tensor,
    user_view2: Tensor,
    item_view1: Tensor,
    item_view2: Tensor,
    users: Tensor,
    pos_items: Tensor,
    *,
    temperature: float = 0.2,
    mode: Mode = "both_side",
    negatives: Negatives = "all",
    reduction: BatchReduction = "sum",
    chunk_size: int | None = None,
) -> Tensor:
    r"""Self-discrimination loss: a node's two embeddings must agree more than those of different nodes.

    $$\ell(a)=\log\sum_{v\in\mathcal V}e^{\cos(z'_a,z''_v)/\tau}-\cos(z'_a,z''_a)/\tau$$

    summed over the users and the positive items of the batch. $\mathcal V$ are all nodes of the side, the node itself
    included; view 1 is compared with view 2 and not the other way round. An entry that occurs twice counts twice.
    The logits are made in chunks and again in the backward pass, each distinct entry once (on a CPU): memory doesn't
    grow with the batch times the nodes.

    Args:
        user_view1: Users in view 1, not normalised, shape `(U, d)`, floating.
        user_view2: Users in view 2, shape `(U, d)`.
        item_view1: Items in view 1, shape `(I, d)`.
        item_view2: Items in view 2, shape `(I, d)`.
        users: Users of the batch, LongTensor `(B,)`.
        pos_items: Positive items of the batch, LongTensor `(B,)`.
        temperature: $\tau>0$; smaller values weigh similar nodes more. 0.1 to 0.5 is usual.
        mode: `"both_side"`, `"user_side"` or `"item_side"`; `"merge"` puts the distinct users and items of the batch into
            one list and compares each with all of it.
        negatives: `"all"`: $\mathcal V$ is the whole side; `"batch"`: the entries of the batch, repetitions included.
        reduction: `"sum"`, or `"mean"`: the sum divided by B.
        chunk_size: Nodes per chunk; None takes what suits the device. It changes memory and time, not the result.

    Returns:
        Scalar in the promoted dtype of the tables; half precision is computed in float32.

    Raises:
        ValueError: If shapes don't fit, an id is out of range (noticed on a CPU), `temperature` or `chunk_size` isn't
            positive, an option is unknown, or `mode` is `"merge"` with `negatives="all"`.

    Reference: Wu et al., 2021, eq. (10); `merge` and batch negatives: the authors' code.

    Examples:
        >>> import torch
        >>> user, item = torch.eye(2), torch.ones(3, 2)
        >>> ssl_loss(user, user, item, item, torch.tensor([0]), torch.tensor([1]), temperature=1.0)
        tensor(1.4119)
    """
    _check_ssl(temperature, mode, negatives, reduction, chunk_size)
    _check_tables("user_view1 and user_view2", user_view1, user_view2)
    _check_tables("item_view1 and item_view2", item_view1, item_view2)
    check_batch(len(user_view1), len(item_view1), users=users, pos_items=pos_items)
    dtype = result_dtype(user_view1=user_view1, user_view2=user_view2, item_view1=item_view1, item_view2=item_view2)
    total = _ssl_sum(
        user_view1, user_view2, item_view1, item_view2, users, pos_items, temperature, mode, negatives, chunk_size
    )
    return (total if reduction == "sum" else total / len(users)).to(dtype)


def sgl_loss(
    user_embedding: Tensor,
    item_embedding: Tensor,
    edge_index: Tensor,
    view1_edge_index: Tensor | Sequence[Tensor],
    view2_edge_index: Tensor | Sequence[Tensor],
    users: Tensor,
    pos_items: Tensor,
    neg_items: Tensor,
    *,
    num_layers: int = 3,
    temperature: float = 0.2,
    ssl_weight: float = 0.1,
    l2_weight: float = 1e-4,
    mode: Mode = "both_side",
    negatives: Negatives = "all",
    reduction: BatchReduction = "sum",
) -> SGLLoss:
    r"""The loss of a batch from the tables and the three graphs.

    $$\mathcal L=\mathcal L_{\mathrm{bpr}}+\lambda_1\mathcal L_{\mathrm{ssl}}+\lambda_2\mathcal R$$

    BPR scores pairs by the full graph; `ssl_loss` compares the two views; $\mathcal R$ is half the squared norms of the
    batch's rows before propagation, repetitions included. The graphs are normalised in every call; in training take
    `SGL`, which does it once per epoch.

    Args:
        user_embedding: User table, shape `(U, d)`, floating.
        item_embedding: Item table, shape `(I, d)`.
        edge_index: Training pairs, LongTensor `(2, E)`, items not offset.
        view1_edge_index: Pairs of view 1, `(2, E')`, or one such tensor for every hop (random walk).
        view2_edge_index: Pairs of view 2, alike.
        users: Users of the batch, LongTensor `(B,)`.
        pos_items: Their positive items, LongTensor `(B,)`.
        neg_items: Their negative items, LongTensor `(B,)`.
        num_layers: Number of hops L >= 0.
        temperature: $\tau>0$.
        ssl_weight: $\lambda_1\ge0$; 0 is LightGCN with BPR.
        l2_weight: $\lambda_2\ge0$.
        mode: As in `ssl_loss`.
        negatives: As in `ssl_loss`.
        reduction: `"sum"`, or `"mean"`: all three parts divided by B.

    Returns:
        `SGLLoss(loss, bpr, ssl, l2)`, the parts without their weights; half precision is computed in float32.

    Raises:
        ValueError: If an id is out of range, a list of views has another length than `num_layers`, or an argument is out
            of range (see `ssl_loss`).

    Reference: Wu et al., 2021, eq. (12).

    Examples:
        >>> import torch
        >>> edges = torch.tensor([[0, 0, 1], [0, 1, 1]])
        >>> u, i, j = torch.tensor([0]), torch.tensor([0]), torch.tensor([2])
        >>> loss = sgl_loss(torch.eye(2), torch.ones(3, 2), edges, edges, edges[:, :2], u, i, j, num_layers=1)
        >>> bool(loss.loss == loss.bpr + 0.1 * loss.ssl + 1e-4 * loss.l2)
        True
    """
    objective = Objective(temperature, ssl_weight, l2_weight, mode, negatives, reduction)
    _check_tables("user_embedding and item_embedding", user_embedding, item_embedding, rows=False)
    num_users, num_items = len(user_embedding), len(item_embedding)
    check_batch(num_users, num_items, users=users, pos_items=pos_items, neg_items=neg_items)
    dtype = result_dtype(user_embedding=user_embedding, item_embedding=item_embedding)
    table = upcast(torch.cat([user_embedding, item_embedding]))

    def encode(edges: Tensor | Sequence[Tensor], name: str) -> Tensor:
        if isinstance(edges, torch.Tensor):
            return propagate(table, normalized_adjacency(edges, num_users, num_items, dtype=table.dtype), num_layers)
        if len(edges) != num_layers:
            raise ValueError(f"{name} holds {len(edges)} views, but num_layers is {num_layers}: one per hop is needed")
        hops = [normalized_adjacency(hop, num_users, num_items, dtype=table.dtype) for hop in edges]
        return propagate(table, hops, num_layers)

    views = encode(view1_edge_index, "view1_edge_index"), encode(view2_edge_index, "view2_edge_index")
    parts = objective(table, num_users, encode(edge_index, "edge_index"), views, users, pos_items, neg_items)
    return SGLLoss(*(part.to(dtype) for part in parts))


def _ssl_sum(
    user1: Tensor,
    user2: Tensor,
    item1: Tensor,
    item2: Tensor,
    users: Tensor,
    pos_items: Tensor,
    temperature: float,
    mode: str,
    negatives: str,
    chunk_size: int | None,
) -> Tensor:
    """Return the sum of the losses of the batch's entries, in float32 at least."""
    if mode == "merge":
        user, item = torch.unique(users), torch.unique(pos_items)
        first = torch.cat([user1.index_select(0, user), item1.index_select(0, item)])
        second = torch.cat([user2.index_select(0, user), item2.index_select(0, item)])
        return _disagreement(
            first, second, torch.arange(len(first), device=first.device), None, temperature, chunk_size
        )
    sides = []
    if mode != "item_side":
        sides.append((user1, user2, users))
    if mode != "user_side":
        sides.append((item1, item2, pos_items))
    return torch.stack([_side_sum(*side, temperature, negatives, chunk_size) for side in sides]).sum()


def _side_sum(
    view1: Tensor, view2: Tensor, ids: Tensor, temperature: float, negatives: str, chunk_size: int | None
) -> Tensor:
    """Return the sum of the losses of the entries of one side."""
    rows, count = _distinct(ids)
    first = view1.index_select(0, rows)
    if negatives == "all":
        return _disagreement(first, view2, rows, count, temperature, chunk_size)
    second = view2.index_select(0, rows)
    target = torch.arange(len(rows), device=rows.device)
    return _disagreement(first, second, target, count, temperature, chunk_size, repeated=True)


def _disagreement(
    first: Tensor,
    second: Tensor,
    target: Tensor,
    count: Tensor | None,
    temperature: float,
    chunk_size: int | None,
    *,
    repeated: bool = False,
) -> Tensor:
    """Return the sum of log-sum-exp minus positive over the rows of `first`, `target` being their place in `second`.

    A row counts `count` times; with `repeated`, so do the rows of `second` in the sum under the logarithm.
    """
    weight = None if count is None else count.to(upcast(first).dtype)
    bias = weight.log() if repeated and weight is not None else None
    lse, score = blocked_scores(
        first, second, target, temperature=temperature, similarity="cosine", item_bias=bias, block_size=chunk_size
    )
    loss = lse - score / temperature
    return loss.sum() if weight is None else loss @ weight


def _distinct(ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the distinct ids and how often each occurs.

    Away from the CPU it returns all of them, None: their number would have to be waited for, and rows are cheap there.
    """
    if ids.device.type != "cpu":
        return ids, None
    rows: Tensor
    rows, count = torch.unique(ids, return_counts=True)
    return rows, count


def _check_ssl(temperature: float, mode: str, negatives: str, reduction: str, chunk_size: int | None) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature!r}")
    check_choice("mode", mode, MODES)
    check_choice("negatives", negatives, NEGATIVES)
    check_choice("reduction", reduction, BATCH_REDUCTIONS)
    if mode == "merge" and negatives == "all":
        raise ValueError("merge uses batch negatives: mode='merge' needs negatives='batch', got 'all'")
    if chunk_size is not None and not chunk_size >= 1:
        raise ValueError(f"chunk_size must be >= 1 or None, got {chunk_size!r}")


def _check_tables(names: str, first: Tensor, second: Tensor, *, rows: bool = True) -> None:
    fits = first.ndim == 2 and second.ndim == 2 and first.shape[1] == second.shape[1]
    if not fits or 0 in first.shape or 0 in second.shape or (rows and len(first) != len(second)):
        shape = "the same shape (rows, d)" if rows else "shapes (U, d) and (I, d)"
        raise ValueError(f"{names} must have {shape}, got {tuple(first.shape)} and {tuple(second.shape)}")


def check_batch(num_users: int, num_items: int, **ids: Tensor) -> None:
    """Raise ValueError unless all are int64 (B,), and on a CPU in range: elsewhere the values would be waited for."""
    size = len(ids["users"]) if ids["users"].ndim == 1 else 0
    for name, values in ids.items():
        if values.dtype != torch.int64 or values.shape != (size,) or size == 0:
            raise ValueError(f"{name} must be int64 (B,) like users, B >= 1, got {values.dtype} {tuple(values.shape)}")
        if values.device.type == "cpu":
            check_range(name, values, num_users if name == "users" else num_items)
