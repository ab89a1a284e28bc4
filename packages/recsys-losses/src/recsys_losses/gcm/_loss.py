"""The loss of GCM: cross-entropy of the decoded scores, and the squared norms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F

from recsys_losses._checks import check_choice, check_reduction, upcast
from recsys_losses.baselines import result_dtype
from recsys_losses.gcm._convolution import (
    Merge,
    MergeWeights,
    Norm,
    check_merge_weights,
    check_options,
    convolve_edges,
    convolve_sum,
    encode,
)
from recsys_losses.gcm._decoders import DECODERS, check_decoder_weights, mlp_decode
from recsys_losses.gcm._graph import ContextGraph, SparseMap, check_edges, check_indices, sum_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from recsys_losses._checks import Reduction

Decoder = Literal["fm", "inner_product", "mlp"]


class GCMLoss(NamedTuple):
    r"""What `gcm_loss` returns.

    Args:
        loss: `bce + l2_weight * l2`.
        bce: Cross-entropy, reduced.
        l2: Half of the squared norms (of the whole batch; divided by B unless the reduction is `"sum"`).
        logits: Scores $\hat y$ of the batch, shape `(B,)`.
        user: Combined vectors p of all users, shape `(U, d)`.
        item: Combined vectors q of all graph items, shape `(I, d)`.
    """

    loss: Tensor
    bce: Tensor
    l2: Tensor
    logits: Tensor
    user: Tensor
    item: Tensor


class Tables(NamedTuple):
    """The parameters; ids and features of a side are None where it has no features."""

    user: Tensor
    user_feature: Tensor | None
    item: Tensor
    item_feature: Tensor | None
    context_feature: Tensor
    user_bias: Tensor
    item_bias: Tensor
    context_bias: Tensor
    global_bias: Tensor
    merge: Sequence[MergeWeights] | None = None
    decoder: Sequence[Tensor] | None = None

    def context_table(self) -> Tensor:
        """Return the rows of which contexts are made, (F_c + items, d): the last field's are those of the items."""
        return torch.cat([self.context_feature, self.item])

    def context_bias_table(self) -> Tensor:
        """Return their biases, (F_c + items,)."""
        return torch.cat([self.context_bias.flatten(), self.item_bias.flatten()])


@dataclass(frozen=True)
class Structure:
    """What doesn't learn: features, contexts, the graph, and the options of the layers.

    Args:
        user_features: (U, f) or None.
        item_features: (graph items, f) or None.
        graph: The interactions.
        context_rows: Rows of the context table of each context, (C, k).
        feature_map: From the context table to the nodes; None where messages aren't sums.
        weights: Weights of the layers.
    """

    user_features: Tensor | None
    item_features: Tensor | None
    graph: ContextGraph
    context_rows: Tensor
    feature_map: SparseMap | None
    weights: tuple[float, ...]


def node_vectors(tables: Tables, structure: Structure, context_table: Tensor) -> tuple[Tensor, Tensor]:
    """Encode and convolve: the combined vectors of all users and graph items."""
    pooling = "mean" if len(structure.weights) > 1 else "sum"
    items = tables.item[: structure.graph.num_items]
    user0 = encode(tables.user, tables.user_feature, structure.user_features, pooling)
    item0 = encode(items, tables.item_feature, structure.item_features, pooling)
    graph, weights = structure.graph, structure.weights
    if structure.feature_map is not None:
        return convolve_sum(graph, user0, item0, structure.feature_map, context_table, weights)
    context = sum_rows(context_table, structure.context_rows) / structure.context_rows.shape[1]
    return convolve_edges(graph, user0, item0, context, weights, tables.merge)


def decode(
    tables: Tables, decoder: str, user: Tensor, item: Tensor, users: Tensor, items: Tensor, rows: Tensor, table: Tensor
) -> Tensor:
    """Score a batch: `rows` (B, k) are rows of the context table `table`."""
    p, q = user.index_select(0, users), item.index_select(0, items)
    if decoder == "inner_product":
        return (p * q).sum(1)
    if decoder == "mlp":
        return mlp_decode(p, q, F.embedding(rows, table), tables.decoder or ())
    return _factorisation_machine(tables, p, q, users, items, rows, table)


def _factorisation_machine(
    tables: Tables, p: Tensor, q: Tensor, users: Tensor, items: Tensor, rows: Tensor, table: Tensor
) -> Tensor:
    """`fm_decode` from the sum of the context fields; their squares and biases are summed up as two more columns."""
    norms = table.square().sum(1, keepdim=True)
    columns = torch.cat([table, tables.context_bias_table()[:, None], norms], 1)
    sums = sum_rows(columns, rows)
    total, rest = sums[:, :-2], sums[:, -2] - sums[:, -1] / 2
    products = torch.addcmul(p * (q + total), total, torch.add(q, total, alpha=0.5)).sum(1)
    rest = rest + tables.global_bias.flatten()
    for bias, index in ((tables.user_bias, users), (tables.item_bias, items)):
        rest = rest + bias.flatten().index_select(0, index)
    return products + rest


def batch_loss(
    tables: Tables,
    structure: Structure,
    decoder: str,
    users: Tensor,
    items: Tensor,
    rows: Tensor,
    labels: Tensor,
    *,
    l2_weight: float,
    reduction: str,
) -> GCMLoss:
    """`gcm_loss` without checks, on tables of one dtype."""
    context_table = tables.context_table()
    user, item = node_vectors(tables, structure, context_table)
    logits = decode(tables, decoder, user, item, users, items, rows, context_table)
    bce = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction=reduction)
    l2 = _squares_of_rows(tables.user, users) + _squares_of_rows(tables.item, items)
    for table in (tables.user_feature, tables.item_feature, tables.context_feature):
        if table is not None:
            l2 = l2 + table.square().sum()
    l2 = l2 / 2 if reduction == "sum" else l2 / (2 * len(users))
    return GCMLoss(bce + l2_weight * l2, bce, l2, logits, user, item)


def _squares_of_rows(table: Tensor, rows: Tensor) -> Tensor:
    """Return the squares of the rows, repetitions included, without gathering them."""
    count = table.new_zeros(len(table)).index_add_(0, rows, table.new_ones(len(rows)))
    return (table.square().sum(1) * count).sum()


def gcm_loss(
    user_embedding: Tensor,
    user_feature_embedding: Tensor | None,
    item_embedding: Tensor,
    item_feature_embedding: Tensor | None,
    context_feature_embedding: Tensor,
    user_bias: Tensor,
    item_bias: Tensor,
    context_feature_bias: Tensor,
    global_bias: Tensor,
    user_features: Tensor | None,
    item_features: Tensor | None,
    context_features: Tensor,
    train_users: Tensor,
    train_items: Tensor,
    train_contexts: Tensor,
    users: Tensor,
    items: Tensor,
    contexts: Tensor,
    labels: Tensor,
    *,
    num_layers: int = 2,
    norm: Norm = "left-single",
    merge: Merge = "sum",
    layer_weights: Sequence[float] | None = None,
    decoder: Decoder = "fm",
    l2_weight: float = 1e-3,
    reduction: Reduction = "sum",
    num_graph_items: int | None = None,
    merge_weights: Sequence[MergeWeights] | None = None,
    decoder_weights: Sequence[Tensor] | None = None,
) -> GCMLoss:
    r"""Encode, convolve, decode a batch, and compare with its labels.

    $$L=\sum_b\mathrm{BCE}(\hat y_b,y_b)+\frac\lambda2\Big(\sum_b\lVert e_{u_b}\rVert^2+\sum_b\lVert e_{i_b}\rVert^2+
      \lVert X_{\text{user}}\rVert^2+\lVert X_{\text{item}}\rVert^2+\lVert X_{\text{context}}\rVert^2\Big)$$

    The tables of features count whole in every batch, biases don't. The graph is built anew in every call; for
    training take `GCM`, which builds it once.

    Args:
        user_embedding: Ids of the users, shape `(U, d)`, floating.
        user_feature_embedding: User features, shape `(F_u, d)`, or None.
        item_embedding: Ids of the items, shape `(I_all, d)`. The first I are graph items; further ones occur only as a
            last item.
        item_feature_embedding: Item features, shape `(F_i, d)`, or None.
        context_feature_embedding: Context features, shape `(F_c, d)`, of all fields but the last item.
        user_bias: Shape `(U, 1)` or `(U,)`.
        item_bias: Shape `(I_all, 1)` or `(I_all,)`; also that of the last item.
        context_feature_bias: Shape `(F_c, 1)` or `(F_c,)`.
        global_bias: One number, any shape.
        user_features: Feature ids of the users, LongTensor `(U, f)`, or None.
        item_features: Feature ids of the graph items, LongTensor `(I, f)`, or None.
        context_features: Contexts, LongTensor `(C, k)`: the last column is an item, the others are context features.
        train_users: Users of the interactions, LongTensor `(M,)`.
        train_items: Their items.
        train_contexts: Their contexts.
        users: Users of the batch, LongTensor `(B,)`.
        items: Their items, below I.
        contexts: Their contexts.
        labels: 1 for interactions and 0 for negatives, shape `(B,)`.
        num_layers: L >= 0. With 0 the encoder sums instead of averaging, and the model is a factorisation machine.
        norm: As in `gcm_convolve`.
        merge: As in `gcm_convolve`.
        layer_weights: As in `gcm_convolve`.
        decoder: `"fm"`, `"inner_product"` $p\cdot q$ or `"mlp"` (see `fm_decode`, `mlp_decode`).
        l2_weight: $\lambda\ge0$.
        reduction: `"sum"`; `"mean"` divides it all by B; `"none"` gives one loss per row, of the same sum.
        num_graph_items: I; None is the number of rows of `item_features`, or I_all where there are none.
        merge_weights: Needed for `merge="mlp"`.
        decoder_weights: Needed for `decoder="mlp"`.

    Returns:
        Loss, its parts, logits and node vectors, in the promoted dtype of the tables; half precision is computed in float32.

    Raises:
        ValueError: If shapes don't fit, an index is out of range, the interactions haven't the same length, an option
            is unknown or out of range, or weights are missing.

    Reference: Wu et al., 2020, eq. (3)-(9); what the regulariser counts is taken from the authors' code.

    Examples:
        >>> import torch
        >>> one, zero = torch.ones(1, 2), torch.zeros(1, 1)
        >>> index = torch.zeros(1, dtype=torch.long)
        >>> tables = (one, None, one, None, one, zero, zero, zero, zero, None, None, torch.zeros(1, 2, dtype=torch.long))
        >>> out = gcm_loss(*tables, index, index, index, index, index, index, torch.ones(1), num_layers=1)
        >>> out.user, out.logits  # (p + q + e) / 2 on both sides; 6 products of vectors
        (tensor([[1.5000, 1.5000]]), tensor([18.5000]))
    """
    weights = check_options(num_layers, merge, layer_weights)
    check_choice("decoder", decoder, DECODERS)
    check_reduction(reduction)
    if not 0 <= l2_weight < math.inf:
        raise ValueError(f"l2_weight must be a finite number >= 0, got {l2_weight!r}")
    tables = Tables(
        user_embedding,
        user_feature_embedding,
        item_embedding,
        item_feature_embedding,
        context_feature_embedding,
        user_bias,
        item_bias,
        context_feature_bias,
        global_bias,
        check_merge_weights(merge_weights, merge, num_layers, user_embedding.shape[-1]),
        decoder_weights,
    )
    graph_items = check_tables(tables, user_features, item_features, context_features, num_graph_items)
    if (decoder_weights is not None) != (decoder == "mlp"):
        raise ValueError(f"decoder_weights are needed for decoder='mlp' and for no other, decoder is {decoder!r}")
    if decoder_weights is not None:
        check_decoder_weights(decoder_weights, user_embedding.shape[1], context_features.shape[1])
    sizes = (len(user_embedding), graph_items, len(context_features))
    check_edges((train_users, train_items, train_contexts), sizes)
    check_batch(users, items, contexts, labels, sizes)
    tables, dtype = _in_one_dtype(tables)
    structure = make_structure(
        user_features,
        item_features,
        context_features,
        (train_users, train_items, train_contexts),
        (len(user_embedding), graph_items, len(item_embedding), len(context_feature_embedding)),
        norm=norm,
        merge=merge,
        weights=weights,
        dtype=tables.user.dtype,
    )
    rows = structure.context_rows[contexts]
    parts = batch_loss(tables, structure, decoder, users, items, rows, labels, l2_weight=l2_weight, reduction=reduction)
    return GCMLoss(*(part.to(dtype) for part in parts))


def make_structure(
    user_features: Tensor | None,
    item_features: Tensor | None,
    context_features: Tensor,
    interactions: tuple[Tensor, Tensor, Tensor],
    sizes: tuple[int, int, int, int],
    *,
    norm: str,
    merge: str,
    weights: tuple[float, ...],
    dtype: torch.dtype,
) -> Structure:
    """Build graph and maps; `sizes` are users, graph items, all items and context features."""
    num_users, graph_items, num_items, num_context_features = sizes
    graph = ContextGraph(*interactions, num_users, graph_items, norm=norm, dtype=dtype)
    rows = context_rows(context_features, num_context_features)
    feature_map = graph.feature_map(rows, num_context_features + num_items) if merge == "sum" else None
    return Structure(user_features, item_features, graph, rows, feature_map, weights)


def context_rows(context_features: Tensor, num_context_features: int) -> Tensor:
    """Return the rows of the context table: the last column, an item, comes behind the context features."""
    shift = torch.zeros_like(context_features[:1])
    shift[:, -1] = num_context_features
    return context_features + shift


def check_tables(
    tables: Tables,
    user_features: Tensor | None,
    item_features: Tensor | None,
    context_features: Tensor,
    num_graph_items: int | None,
) -> int:
    """Raise ValueError unless the tables fit each other and their indices; return the number of graph items."""
    dim = tables.user.shape[-1]
    for name, table in (
        ("user_embedding", tables.user),
        ("user_feature_embedding", tables.user_feature),
        ("item_embedding", tables.item),
        ("item_feature_embedding", tables.item_feature),
        ("context_feature_embedding", tables.context_feature),
    ):
        if table is not None and (table.ndim != 2 or table.shape[1] != dim):
            raise ValueError(f"{name} must be (n, d) with the d = {dim} of user_embedding, got {tuple(table.shape)}")
    for name, bias, size in (
        ("user_bias", tables.user_bias, len(tables.user)),
        ("item_bias", tables.item_bias, len(tables.item)),
        ("context_feature_bias", tables.context_bias, len(tables.context_feature)),
        ("global_bias", tables.global_bias, 1),
    ):
        if bias.numel() != size:
            raise ValueError(f"{name} must hold {size} values, got {tuple(bias.shape)}")
    if num_graph_items is None:
        num_graph_items = len(tables.item) if item_features is None else len(item_features)
    if not 1 <= num_graph_items <= len(tables.item):
        raise ValueError(f"num_graph_items must be between 1 and {len(tables.item)}, got {num_graph_items!r}")
    for side, features, table, rows in (
        ("user", user_features, tables.user_feature, len(tables.user)),
        ("item", item_features, tables.item_feature, num_graph_items),
    ):
        check_features(side, features, None if table is None else len(table), rows)
    check_contexts(context_features, len(tables.context_feature), len(tables.item))
    return num_graph_items


def check_features(side: str, features: Tensor | None, size: int | None, rows: int) -> None:
    """Raise ValueError unless features and their table (of `size` rows) are both there or both absent, and fit."""
    if (features is None) != (size is None):
        raise ValueError(f"{side}_features and {side}_feature_embedding must both be given or both be None")
    if features is None or size is None:
        return
    if features.ndim != 2 or len(features) != rows:
        raise ValueError(f"{side}_features must be ({rows}, f), got {tuple(features.shape)}")
    check_indices(f"{side}_features", features, size)


def check_contexts(context_features: Tensor, num_context_features: int, num_items: int) -> None:
    """Raise ValueError unless `context_features` is (C, k), k >= 1, with indices in range."""
    if context_features.ndim != 2 or context_features.shape[1] == 0:
        raise ValueError(f"context_features must be (C, k) with k >= 1, got {tuple(context_features.shape)}")
    check_indices("context_features (all columns but the last)", context_features[:, :-1], num_context_features)
    check_indices("context_features (last column, items)", context_features[:, -1], num_items)


def check_batch(users: Tensor, items: Tensor, contexts: Tensor, labels: Tensor, sizes: tuple[int, int, int]) -> None:
    """Raise ValueError unless the four are vectors of one length, not empty, with indices below `sizes`."""
    shapes = [tuple(x.shape) for x in (users, items, contexts, labels)]
    if users.ndim != 1 or len(set(shapes)) != 1:
        raise ValueError(f"users, items, contexts and labels must be vectors of the same length, got {shapes}")
    if len(users) == 0:
        raise ValueError("empty batch: users has no rows")
    for name, index, size in zip(("users", "items", "contexts"), (users, items, contexts), sizes, strict=True):
        check_indices(name, index, size)


def _in_one_dtype(tables: Tables) -> tuple[Tables, torch.dtype]:
    """Return the tables in the dtype that is computed in, and their promoted dtype."""
    named = {name: x for name, x in tables._asdict().items() if x is not None and name not in ("merge", "decoder")}
    dtype = result_dtype(**named)

    def cast(x: Tensor) -> Tensor:
        return upcast(x.to(dtype))

    merge = None if tables.merge is None else [MergeWeights(*map(cast, layer)) for layer in tables.merge]
    decoder = None if tables.decoder is None else [cast(x) for x in tables.decoder]
    converted = {name: cast(x) for name, x in named.items()}
    return Tables(**{**tables._asdict(), **converted, "merge": merge, "decoder": decoder}), dtype
