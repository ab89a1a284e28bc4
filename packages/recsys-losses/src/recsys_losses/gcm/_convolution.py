"""Encoder and context-aware graph convolution."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F

from recsys_losses._checks import check_choice, upcast
from recsys_losses.baselines import result_dtype
from recsys_losses.gcm._graph import ContextGraph, Propagate, SparseMap, check_edges, check_indices, sum_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

Norm = Literal["left-single", "left-double", "right-single", "right-double", "both"]
Merge = Literal["sum", "product", "mlp"]
Pooling = Literal["mean", "sum"]

MERGES = ("sum", "product", "mlp")
SLOPE = 0.2
"""Slope of the leaky ReLU below zero."""


class MergeWeights(NamedTuple):
    r"""Weights of one layer with `merge="mlp"`: $\mathrm{LeakyReLU}_{0.2}(W[\text{neighbour};\bar e_c]+b)$ per side.

    Args:
        user_weight: W of the messages that users receive, shape `(d, 2d)`; its first d columns meet the item.
        user_bias: Their b, shape `(d,)`.
        item_weight: W of the messages that items receive, shape `(d, 2d)`.
        item_bias: Their b, shape `(d,)`.
    """

    user_weight: Tensor
    user_bias: Tensor
    item_weight: Tensor
    item_bias: Tensor


def gcm_encode(
    id_embedding: Tensor,
    feature_embedding: Tensor | None,
    features: Tensor | None,
    *,
    pooling: Pooling = "mean",
) -> Tensor:
    r"""Pool the id vector of every node with the vectors of its static features.

    $$p_u^0=\frac{1}{1+f}\Big(e_u+\sum_{j=1}^f x_{f_{uj}}\Big)\quad(\text{mean}),\qquad
    p_u^0=e_u+\sum_j x_{f_{uj}}\quad(\text{sum})$$

    Args:
        id_embedding: $e$, shape `(n, d)`, floating.
        feature_embedding: $x$, shape `(F, d)`; None where there are no features.
        features: Feature ids of each node, LongTensor `(n, f)` with values in [0, F); None where there are none.
        pooling: `"mean"` (with graph layers) or `"sum"` (without, so that the model is a factorisation machine).

    Returns:
        Shape `(n, d)`, in the promoted dtype; half precision is pooled in float32.

    Raises:
        ValueError: If the shapes don't fit, an index is out of range, only one of the feature arguments is None, or
            `pooling` is unknown.

    Reference: Wu et al., 2020, section 3.2 (encoder); the sum without layers is that of the authors' code.

    Examples:
        >>> import torch
        >>> gcm_encode(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]]), torch.tensor([[0, 0]]))
        tensor([[0.3333, 2.0000]])
    """
    check_choice("pooling", pooling, ("mean", "sum"))
    if (feature_embedding is None) != (features is None):
        raise ValueError("feature_embedding and features must both be given or both be None")
    if feature_embedding is None or features is None:
        result_dtype(id_embedding=id_embedding)
        return id_embedding
    if id_embedding.ndim != 2 or features.ndim != 2 or len(features) != len(id_embedding):
        raise ValueError(
            f"expected id_embedding (n, d) and features (n, f), "
            f"got {tuple(id_embedding.shape)} and {tuple(features.shape)}"
        )
    if feature_embedding.ndim != 2 or feature_embedding.shape[1] != id_embedding.shape[1]:
        raise ValueError(
            f"feature_embedding must be (F, {id_embedding.shape[1]}), got {tuple(feature_embedding.shape)}"
        )
    check_indices("features", features, len(feature_embedding))
    dtype = result_dtype(id_embedding=id_embedding, feature_embedding=feature_embedding)
    return encode(upcast(id_embedding), upcast(feature_embedding), features, pooling).to(dtype)


def encode(id_embedding: Tensor, feature_embedding: Tensor | None, features: Tensor | None, pooling: str) -> Tensor:
    """`gcm_encode` without checks."""
    if feature_embedding is None or features is None:
        return id_embedding
    total = id_embedding + sum_rows(feature_embedding, features)
    return total / (1 + features.shape[1]) if pooling == "mean" else total


def gcm_convolve(
    user0: Tensor,
    item0: Tensor,
    context: Tensor,
    train_users: Tensor,
    train_items: Tensor,
    train_contexts: Tensor,
    *,
    num_layers: int,
    norm: Norm = "left-single",
    merge: Merge = "sum",
    layer_weights: Sequence[float] | None = None,
    merge_weights: Sequence[MergeWeights] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Convolve over the interactions, whose contexts are part of the messages, and combine the layers.

    $$p_u^{l+1}=\frac{1}{\sqrt{|N_u|}}\sum_{m:\,u_m=u}\big(q_{i_m}^l+\bar e_{c_m}\big),\qquad
    q_i^{l+1}=\frac{1}{\sqrt{|N_i|}}\sum_{m:\,i_m=i}\big(p_{u_m}^l+\bar e_{c_m}\big),\qquad
    p_u=\sum_{l=0}^L\beta_l p_u^l$$

    Every interaction is an edge, repetitions included, and $|N|$ counts them. A node without interactions is 0 in all
    layers but the first. With `merge="sum"` a layer is one sparse product, and what the contexts add is computed once
    for all layers; the other merges gather the messages of all M interactions.

    Args:
        user0: $p^0$, shape `(U, d)`, floating.
        item0: $q^0$ of the graph items, shape `(I, d)`.
        context: Context vectors $\bar e$, shape `(C, d)`.
        train_users: Users of the interactions, LongTensor `(M,)`.
        train_items: Items, LongTensor `(M,)`.
        train_contexts: Contexts, LongTensor `(M,)`.
        num_layers: L >= 0.
        norm: What a node does with its $|N|$. `"left-single"`: scale what it receives by $|N|^{-1/2}$;
            `"left-double"`: by $|N|^{-1}$; `"right-single"`, `"right-double"`: scale what it sends (not the context)
            instead; `"both"`: $|N|^{-1/2}$ on either side.
        merge: Message from the sender's vector x and the context: `"sum"` $x+\bar e$, `"product"`
            $x\odot\bar e/\lVert\bar e\rVert$ (0 for $\bar e=0$), `"mlp"` $\mathrm{LeakyReLU}_{0.2}(W[x;\bar e]+b)$.
        layer_weights: $\beta$, L + 1 numbers; None is $1/(L+1)$ each.
        merge_weights: Weights of the L layers; needed for `merge="mlp"` and for it alone.

    Returns:
        `(p, q)` of shapes `(U, d)` and `(I, d)`, in the promoted dtype; half precision is computed in float32.

    Raises:
        ValueError: If shapes don't fit, an index is out of range, the three vectors of interactions haven't the same
            length, `layer_weights` hasn't L + 1 finite values, or an option is unknown.

    Reference: Wu et al., 2020, section 3.3; norms and merges are those of the authors' code.

    Examples:
        >>> import torch
        >>> user, item, context = torch.tensor([[1.0]]), torch.tensor([[2.0], [4.0]]), torch.tensor([[0.5]])
        >>> edges = torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([0, 0])
        >>> gcm_convolve(user, item, context, *edges, num_layers=1, layer_weights=[0.0, 1.0])
        (tensor([[4.9497]]), tensor([[1.5000],
                [1.5000]]))
    """
    weights = check_options(num_layers, merge, layer_weights)
    for name, table in (("user0", user0), ("item0", item0), ("context", context)):
        if table.ndim != 2 or table.shape[1] != user0.shape[-1]:
            raise ValueError(f"{name} must be (n, d) with the d of user0, got {tuple(table.shape)}")
    dtype = result_dtype(user0=user0, item0=item0, context=context)
    check_edges((train_users, train_items, train_contexts), (len(user0), len(item0), len(context)))
    merge_weights = check_merge_weights(merge_weights, merge, num_layers, user0.shape[1])
    user0, item0, context = (upcast(table.to(dtype)) for table in (user0, item0, context))
    graph = ContextGraph(train_users, train_items, train_contexts, len(user0), len(item0), norm=norm, dtype=user0.dtype)
    if merge == "sum":
        user, item = convolve_sum(graph, user0, item0, graph.context_map(len(context)), context, weights)
    else:
        user, item = convolve_edges(graph, user0, item0, context, weights, merge_weights)
    return user.to(dtype), item.to(dtype)


def convolve_sum(
    graph: ContextGraph,
    user0: Tensor,
    item0: Tensor,
    contexts_to_nodes: SparseMap,
    table: Tensor,
    weights: tuple[float, ...],
) -> tuple[Tensor, Tensor]:
    """Convolve with summed messages; `contexts_to_nodes` maps `table` to what the contexts add to every node."""
    nodes = torch.cat([user0, item0])
    sums = contexts_to_nodes(table) if len(weights) > 1 else torch.zeros_like(nodes)
    matrix, transposed = graph.neighbours.matrix(), graph.neighbours.transposed()
    total: Tensor = Propagate.apply(nodes, sums, matrix, transposed, weights)
    return total[: graph.num_users], total[graph.num_users :]


def convolve_edges(
    graph: ContextGraph,
    user: Tensor,
    item: Tensor,
    context: Tensor,
    weights: tuple[float, ...],
    merge_weights: Sequence[MergeWeights] | None,
) -> tuple[Tensor, Tensor]:
    """Convolve edge by edge, with products (no `merge_weights`) or a layer of neurons."""
    split = [graph.num_users, graph.num_items]
    user_receive, item_receive = torch.split(graph.receive, split)
    user_send, item_send = torch.split(graph.send, split)
    if merge_weights is None:
        context = _unit(context)[graph.contexts]
    user_sum, item_sum = weights[0] * user, weights[0] * item
    for layer, weight in enumerate(weights[1:]):
        sent_user, sent_item = user_send * user, item_send * item
        if merge_weights is None:
            to_user = sent_item.index_select(0, graph.items) * context
            to_item = sent_user.index_select(0, graph.users) * context
        else:
            layer_weights = merge_weights[layer]
            to_user = _neurons(sent_item, graph.items, context, graph.contexts, *layer_weights[:2])
            to_item = _neurons(sent_user, graph.users, context, graph.contexts, *layer_weights[2:])
        user = user_receive * torch.zeros_like(user).index_add(0, graph.users, to_user)
        item = item_receive * torch.zeros_like(item).index_add(0, graph.items, to_item)
        user_sum, item_sum = user_sum + weight * user, item_sum + weight * item
    return user_sum, item_sum


def _neurons(sender: Tensor, index: Tensor, context: Tensor, contexts: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LeakyReLU(W [sender; context] + b) per edge; W meets every node and context once instead of every edge."""
    dim = sender.shape[1]
    from_sender = F.linear(sender, weight[:, :dim]).index_select(0, index)
    from_context = F.linear(context, weight[:, dim:], bias).index_select(0, contexts)
    return F.leaky_relu(from_sender + from_context, SLOPE)


def _unit(vectors: Tensor) -> Tensor:
    # The bound is TensorFlow's; a zero vector stays zero, with a finite gradient.
    return vectors * vectors.square().sum(1, keepdim=True).clamp_min(1e-12).rsqrt()


def check_options(num_layers: int, merge: str, layer_weights: Sequence[float] | None) -> tuple[float, ...]:
    """Raise ValueError for options out of range; return the weights of the layers."""
    if not num_layers >= 0:
        raise ValueError(f"num_layers must be >= 0, got {num_layers!r}")
    check_choice("merge", merge, MERGES)
    if layer_weights is None:
        return (1 / (num_layers + 1),) * (num_layers + 1)
    weights = tuple(float(weight) for weight in layer_weights)
    if len(weights) != num_layers + 1 or not all(map(math.isfinite, weights)):
        raise ValueError(f"layer_weights must be num_layers + 1 = {num_layers + 1} finite numbers, got {weights}")
    return weights


def check_merge_weights(
    merge_weights: Sequence[MergeWeights] | None, merge: str, num_layers: int, dim: int
) -> list[MergeWeights] | None:
    """Raise ValueError unless there are weights of the right shapes exactly where they are used."""
    if (merge_weights is not None) != (merge == "mlp"):
        raise ValueError(f"merge_weights are needed for merge='mlp' and not accepted for others, merge is {merge!r}")
    if merge_weights is None:
        return None
    if len(merge_weights) != num_layers:
        raise ValueError(f"merge_weights must hold one entry per layer ({num_layers}), got {len(merge_weights)}")
    wanted = [(dim, 2 * dim), (dim,)] * 2
    for layer, entry in enumerate(merge_weights):
        shapes = [tuple(tensor.shape) for tensor in entry]
        if shapes != wanted:
            raise ValueError(f"merge_weights[{layer}] must have the shapes {wanted}, got {shapes}")
    return [MergeWeights(*entry) for entry in merge_weights]
