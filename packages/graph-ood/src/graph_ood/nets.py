r"""Convolutions with edge weights, encoders and heads that the methods of this package share.

A soft subgraph is a graph with weights on nodes and edges. PyG's convolutions either take no edge weights or sum the
degree at the target, which is wrong for weights that differ by direction, so the three convolutions that the methods need
stand here: `weighted_gcn_conv` (CAL, InfoIGL), `weighted_gin_conv` (AIA) and `WeightedGATConv`. The encoders are the two
skeletons of the published programs: `ProjectedEncoder` (CAL) and `ConvStack` (AIA, InfoIGL).
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch_geometric.nn import GATConv, global_add_pool, global_mean_pool  # type: ignore[import-untyped]
from torch_geometric.utils import softmax as segment_softmax  # type: ignore[import-untyped]

from graph_ood._checks import check_choice, check_count, check_edges, check_fraction, check_matrix
from graph_ood._sparse import Routes, edge_routes, propagate, propagate_relu

if TYPE_CHECKING:
    from torch import Tensor
    from torch_geometric.data import Data  # type: ignore[import-untyped]

__all__ = [
    "ConvStack",
    "GraphClassifier",
    "ProjectedEncoder",
    "SoftSplit",
    "WeightedGATConv",
    "WeightedGCNConv",
    "WeightedGINConv",
    "attention_split",
    "graph_index",
    "loop_routes",
    "pool",
    "readout_head",
    "weighted_gcn_conv",
    "weighted_gcn_norm",
    "weighted_gin_conv",
]

Pool = Literal["sum", "mean"]
Normalised = tuple["Tensor", "Tensor"]


def graph_index(data: Data) -> tuple[Tensor, int]:
    """Return the graph of every node, int64 [n], and the number of graphs B of a batch or of a single graph.

    Examples:
        >>> from torch_geometric.data import Data
        >>> graph_index(Data(x=torch.ones(3, 1)))
        (tensor([0, 0, 0]), 1)
    """
    index = getattr(data, "batch", None)
    if index is None:
        return torch.zeros(data.num_nodes, dtype=torch.int64, device=data.x.device), 1
    return index, data.num_graphs


def pool(h: Tensor, index: Tensor, num_graphs: int, how: Pool = "sum") -> Tensor:
    """Sum or average node embeddings per graph.

    Args:
        h: Node embeddings [n, d].
        index: Graph of every node, int64 [n].
        num_graphs: Number of graphs B.
        how: "sum" or "mean"; an empty graph gives zeros.

    Returns:
        Graph embeddings [B, d].

    Raises:
        ValueError: If `how` is neither.

    Examples:
        >>> pool(torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([0, 0, 1]), 2, "mean")
        tensor([[1.5000],
                [5.0000]])
    """
    check_choice("pool", how, ("sum", "mean"))
    return (global_add_pool if how == "sum" else global_mean_pool)(h, index, size=num_graphs)  # type: ignore[no-any-return]


def loop_routes(edge_index: Tensor, x: Tensor) -> Routes | None:
    """`edge_routes` of the edges and one self loop per node, as `weighted_gcn_norm` returns them."""
    return edge_routes(_with_loops(edge_index, len(x)), x)


def _with_loops(edge_index: Tensor, num_nodes: int) -> Tensor:
    nodes = torch.arange(num_nodes, device=edge_index.device)
    return torch.cat([edge_index, nodes.expand(2, -1)], 1)


def weighted_gcn_norm(edge_index: Tensor, edge_weight: Tensor | None, num_nodes: int, dtype: torch.dtype) -> Normalised:
    r"""Edges without self loops plus one loop of weight 1 per node, and their normalised weights.

    $$\text{norm}_{i\to j}=d_i^{-1/2}\,w_{ij}\,d_j^{-1/2},\qquad d_i=1+\sum_{j:(i,j)\in E}w_{ij}$$

    The degree sums over edges whose source is $i$: attention weights differ by direction, and PyG's `gcn_norm`, which sums
    at the target, gives other numbers.

    Args:
        edge_index: Edges, int64 [2, m].
        edge_weight: Weight of every edge, >= 0, [m]; None stands for ones.
        num_nodes: Number of nodes n.
        dtype: Of the result where there are no weights.

    Returns:
        Edges [2, m' + n] and their weights [m' + n].

    Raises:
        ValueError: If shapes do not fit.

    Examples:
        >>> edges, norm = weighted_gcn_norm(torch.tensor([[0, 1], [1, 0]]), None, 2, torch.float32)
        >>> norm
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    check_edges(edge_index, edge_weight)
    source, target = edge_index
    weight = edge_index.new_ones(edge_index.shape[1], dtype=dtype) if edge_weight is None else edge_weight
    # A self loop keeps its place with weight 0: to drop it, its position would have to be known on the host.
    weight = weight * (source != target)
    edges = _with_loops(edge_index, num_nodes)
    weight = torch.cat([weight, weight.new_ones(num_nodes)])
    degree = weight.new_zeros(num_nodes).scatter_add(0, edges[0], weight)
    scale = degree.rsqrt()
    return edges, scale.index_select(0, edges[0]) * weight * scale.index_select(0, edges[1])


def weighted_gcn_conv(
    x: Tensor, edge_index: Tensor, edge_weight: Tensor | None, weight: Tensor, bias: Tensor | None
) -> Tensor:
    r"""Graph convolution with edge weights that may differ by direction.

    $$\text{out}_j=\sum_i\text{norm}_{i\to j}\,(xW)_i+b$$

    with the normalisation of `weighted_gcn_norm`. CAL (KDD 2022), read from its program.

    Args:
        x: Node features [n, F].
        edge_index: Edges, int64 [2, m]; self loops are replaced by one of weight 1 per node.
        edge_weight: Weight of every edge, >= 0, [m]; None stands for ones.
        weight: W, [F, d].
        bias: b, [d], or None.

    Returns:
        [n, d].

    Raises:
        ValueError: If shapes do not fit, or `edge_weight` is negative (checked on CPU only: no wait for a GPU).

    Examples:
        >>> edges = torch.tensor([[0, 1], [1, 0]])
        >>> weighted_gcn_conv(torch.tensor([[1.0], [3.0]]), edges, None, torch.eye(1), None).round(decimals=3)
        tensor([[2.],
                [2.]])
    """
    check_matrix("x", x)
    if weight.ndim != 2 or weight.shape[0] != x.shape[1]:
        raise ValueError(f"weight must have shape [{x.shape[1]}, d], got {tuple(weight.shape)}")
    check_edges(edge_index, edge_weight)
    if edge_weight is not None and edge_weight.device.type == "cpu" and bool((edge_weight < 0).any()):
        raise ValueError(f"edge_weight must be >= 0, got {float(edge_weight.min())}")
    edges, norm = weighted_gcn_norm(edge_index, edge_weight, x.shape[0], x.dtype)
    out = propagate(x @ weight, edges, norm, edge_routes(edges, x))
    return out if bias is None else out + bias


class WeightedGCNConv(nn.Module):
    """`weighted_gcn_conv` with its parameters: W glorot, bias zero.

    Args:
        in_channels: F.
        out_channels: d.

    Raises:
        ValueError: If a size is not a positive integer.

    Examples:
        >>> conv = WeightedGCNConv(3, 2)
        >>> conv(torch.ones(2, 3), torch.tensor([[0, 1], [1, 0]]), torch.tensor([0.5, 0.1])).shape
        torch.Size([2, 2])
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        check_count("in_channels", in_channels)
        check_count("out_channels", out_channels)
        self.weight = nn.Parameter(torch.empty(in_channels, out_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.xavier_uniform_(self.weight)

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor,
        edge_weight: Tensor | None = None,
        *,
        normalised: Normalised | None = None,
        routes: Routes | None = None,
    ) -> Tensor:
        """Convolve; `weighted_gcn_norm` and `loop_routes` may be passed where several layers share them."""
        edges, norm = normalised or weighted_gcn_norm(edge_index, edge_weight, x.shape[0], x.dtype)
        h = x @ self.weight
        return propagate(h, edges, norm, routes or edge_routes(edges, h)) + self.bias


def weighted_gin_conv(
    x: Tensor,
    edge_index: Tensor,
    edge_weight: Tensor | None,
    eps: float | Tensor,
    lin1_weight: Tensor,
    lin1_bias: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    bn_mean: Tensor,
    bn_var: Tensor,
    lin2_weight: Tensor,
    lin2_bias: Tensor,
    *,
    bn_eps: float = 1e-5,
) -> Tensor:
    r"""GIN layer with edge weights and a ReLU on each message, batch norm in evaluation mode.

    $$\text{out}_j=\text{MLP}\Big((1+\varepsilon)x_j+\sum_{i\to j}\text{relu}(w_{ij}x_i)\Big),\qquad
    \text{MLP}=\text{Linear}\circ\text{relu}\circ\text{BN}\circ\text{Linear}$$

    AIA (NeurIPS 2023), read from its program; PyG's `GINConv` has neither weights nor the ReLU.

    Args:
        x: Node features [n, F].
        edge_index: Edges, int64 [2, m].
        edge_weight: Weight of every edge [m], or None for ones; the ReLU acts either way.
        eps: Weight of the node itself, minus 1.
        lin1_weight: [2d, F].
        lin1_bias: [2d].
        bn_weight: Scale of the batch norm [2d].
        bn_bias: Shift of the batch norm [2d].
        bn_mean: Running mean [2d].
        bn_var: Running variance [2d].
        lin2_weight: [d, 2d].
        lin2_bias: [d].
        bn_eps: Added to the variance.

    Returns:
        [n, d].

    Raises:
        ValueError: If shapes do not fit.

    Examples:
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> x, edges = torch.tensor([[1.0], [2.0]]), torch.tensor([[0], [1]])
        >>> weighted_gin_conv(x, edges, None, 0.0, torch.eye(1), zero, one, zero, zero, one, torch.eye(1), zero, bn_eps=0.0)
        tensor([[1.],
                [3.]])
    """
    check_matrix("x", x, lin1_weight.shape[-1])
    check_edges(edge_index, edge_weight)
    h = (1 + eps) * x + propagate_relu(x, edge_index, edge_weight, edge_routes(edge_index, x))
    h = F.batch_norm(F.linear(h, lin1_weight, lin1_bias), bn_mean, bn_var, bn_weight, bn_bias, eps=bn_eps)
    return F.linear(h.relu(), lin2_weight, lin2_bias)


class WeightedGINConv(nn.Module):
    """GIN layer with optional edge weights: (1 + eps) x_j plus the sum of messages through an MLP in-2d-d.

    Args:
        in_channels: F.
        out_channels: d.
        message_relu: ReLU on each message, and a learnable eps that starts at 0, as in AIA; False is the plain layer of
            PyG's `GINConv` with eps 0.

    Raises:
        ValueError: If a size is not a positive integer.

    Examples:
        >>> conv = WeightedGINConv(3, 2)
        >>> conv(torch.ones(2, 3), torch.tensor([[0, 1], [1, 0]]), torch.tensor([0.5, 0.1])).shape
        torch.Size([2, 2])
    """

    def __init__(self, in_channels: int, out_channels: int, *, message_relu: bool = True) -> None:
        super().__init__()
        check_count("in_channels", in_channels)
        check_count("out_channels", out_channels)
        self.message_relu = message_relu
        self.eps = nn.Parameter(torch.zeros(1), requires_grad=message_relu)
        self.mlp = nn.Sequential(
            nn.Linear(in_channels, 2 * out_channels),
            nn.BatchNorm1d(2 * out_channels),
            nn.ReLU(),
            nn.Linear(2 * out_channels, out_channels),
        )

    def forward(
        self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None, *, routes: Routes | None = None
    ) -> Tensor:
        """Convolve; `edge_routes` may be passed where several layers share them."""
        total = propagate_relu if self.message_relu else propagate
        messages = total(x, edge_index, edge_weight, routes or edge_routes(edge_index, x))
        return self.mlp((1 + self.eps) * x + messages)  # type: ignore[no-any-return]


class WeightedGATConv(nn.Module):
    """Graph attention whose coefficients are multiplied by edge weights; self loops have weight 1.

    Args:
        in_channels: F.
        out_channels: d, over all heads.
        heads: Attention heads; must divide d.
        dropout: On the coefficients, in [0, 1].

    Raises:
        ValueError: If `heads` does not divide `out_channels`.

    Examples:
        >>> conv = WeightedGATConv(3, 4, heads=2)
        >>> conv(torch.ones(2, 3), torch.tensor([[0, 1], [1, 0]]), torch.tensor([0.5, 0.1])).shape
        torch.Size([2, 4])
    """

    def __init__(self, in_channels: int, out_channels: int, *, heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        check_count("heads", heads)
        check_fraction("dropout", dropout)
        if out_channels % heads:
            raise ValueError(f"heads must divide out_channels {out_channels}, got {heads}")
        self.heads, self.dropout = heads, dropout
        self.linear = nn.Linear(in_channels, out_channels, bias=False)
        self.att_source = nn.Parameter(torch.empty(heads, out_channels // heads))
        self.att_target = nn.Parameter(torch.empty(heads, out_channels // heads))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        for parameter in (self.linear.weight, self.att_source, self.att_target):
            nn.init.xavier_uniform_(parameter)

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        check_edges(edge_index, edge_weight)
        n = x.shape[0]
        nodes = torch.arange(n, device=x.device)
        source, target = torch.cat([edge_index, nodes.expand(2, -1)], 1)
        h = self.linear(x).view(n, self.heads, -1)
        score = (h * self.att_source).sum(-1)[source] + (h * self.att_target).sum(-1)[target]
        alpha = segment_softmax(F.leaky_relu(score, 0.2), target, num_nodes=n)
        alpha = F.dropout(alpha, self.dropout, self.training)
        if edge_weight is not None:
            alpha = alpha * torch.cat([edge_weight, edge_weight.new_ones(n)]).unsqueeze(-1)
        messages = (h.index_select(0, source) * alpha.unsqueeze(-1)).flatten(1)
        out = messages.new_zeros(n, messages.shape[1])
        return out.scatter_add(0, target.unsqueeze(-1).expand_as(messages), messages) + self.bias  # type: ignore[no-any-return]


def attention_split(
    h: Tensor, edge_index: Tensor, node_weight: Tensor, node_bias: Tensor, edge_weight: Tensor, edge_bias: Tensor
) -> dict[str, Tensor]:
    r"""Split nodes and directed edges into a trivial and a causal share.

    $$\alpha_i=\text{softmax}(W_nh_i+b_n),\qquad\beta_{ij}=\text{softmax}(W_e[h_i\,\|\,h_j]+b_e)$$

    Column 0 is the trivial share, column 1 the causal one. CAL (KDD 2022), equations 7 and 8.

    Args:
        h: Node embeddings [n, d].
        edge_index: Edges i -> j, int64 [2, m].
        node_weight: [2, d].
        node_bias: [2].
        edge_weight: [2, 2d].
        edge_bias: [2].

    Returns:
        `node_trivial` and `node_causal` [n], `edge_trivial` and `edge_causal` [m]; each pair sums to 1.

    Raises:
        ValueError: If shapes do not fit.

    Examples:
        >>> split = attention_split(
        ...     torch.ones(2, 1),
        ...     torch.tensor([[0], [1]]),
        ...     torch.zeros(2, 1),
        ...     torch.zeros(2),
        ...     torch.zeros(2, 2),
        ...     torch.zeros(2),
        ... )
        >>> split["edge_causal"]
        tensor([0.5000])
    """
    check_matrix("h", h)
    check_edges(edge_index)
    d = h.shape[1]
    for name, value, shape in (
        ("node_weight", node_weight, (2, d)),
        ("node_bias", node_bias, (2,)),
        ("edge_weight", edge_weight, (2, 2 * d)),
        ("edge_bias", edge_bias, (2,)),
    ):
        if value.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    # A softmax over two is a sigmoid of their difference, and W [h_i || h_j] = W_left h_i + W_right h_j: one thin product
    # over nodes in place of one over nodes and one over edges.
    node_row, edge_row = node_weight[1] - node_weight[0], edge_weight[1] - edge_weight[0]
    node, left, right = (h @ torch.stack([node_row, edge_row[:d], edge_row[d:]], 1)).unbind(1)
    node = node + (node_bias[1] - node_bias[0])
    edge = left.index_select(0, edge_index[0]) + right.index_select(0, edge_index[1]) + (edge_bias[1] - edge_bias[0])
    return {
        "node_trivial": (-node).sigmoid(),
        "node_causal": node.sigmoid(),
        "edge_trivial": (-edge).sigmoid(),
        "edge_causal": edge.sigmoid(),
    }


class SoftSplit(nn.Module):
    """`attention_split` with its parameters; a switched-off part gives 0.5 to every node or edge.

    Args:
        hidden: d.
        node: Whether nodes are scored.
        edge: Whether edges are scored.

    Examples:
        >>> split = SoftSplit(4, node=False)(torch.ones(2, 4), torch.tensor([[0], [1]]))
        >>> split["node_causal"]
        tensor([0.5000, 0.5000])
    """

    def __init__(self, hidden: int, *, node: bool = True, edge: bool = True) -> None:
        super().__init__()
        check_count("hidden", hidden)
        self.node = nn.Linear(hidden, 2)
        self.edge = nn.Linear(2 * hidden, 2)
        self.node_on, self.edge_on = node, edge

    def forward(self, h: Tensor, edge_index: Tensor) -> dict[str, Tensor]:
        split = attention_split(h, edge_index, self.node.weight, self.node.bias, self.edge.weight, self.edge.bias)
        off = {"node": not self.node_on, "edge": not self.edge_on}
        return {k: torch.full_like(v, 0.5) if off[k.partition("_")[0]] else v for k, v in split.items()}


def _batch_norm(channels: int) -> nn.BatchNorm1d:
    """As all batch norms of CAL's program: scale 1, shift 1e-4."""
    norm = nn.BatchNorm1d(channels)
    nn.init.constant_(norm.bias, 1e-4)
    return norm


class ProjectedEncoder(nn.Module):
    """CAL's encoder: batch norm, linear and ReLU, then convolutions with their own norms.

    Args:
        in_channels: F.
        hidden: d; with "gat" divisible by 4.
        num_layers: Convolutions after the linear layer.
        conv: "gcn", "gin" or "gat".

    Raises:
        ValueError: If a size or `conv` is not accepted.

    Examples:
        >>> encoder = ProjectedEncoder(3, 8, 2, "gin")
        >>> encoder(torch.randn(4, 3), torch.tensor([[0, 1], [1, 0]])).shape
        torch.Size([4, 8])
    """

    def __init__(
        self, in_channels: int, hidden: int = 128, num_layers: int = 3, conv: Literal["gcn", "gin", "gat"] = "gcn"
    ) -> None:
        super().__init__()
        check_choice("conv", conv, ("gcn", "gin", "gat"))
        for name, value in (("in_channels", in_channels), ("hidden", hidden), ("num_layers", num_layers)):
            check_count(name, value)
        if conv == "gat" and hidden % 4:
            raise ValueError(f"hidden must be divisible by the 4 heads of conv 'gat', got {hidden}")
        self.hidden, self.conv = hidden, conv
        self.input_norm = _batch_norm(in_channels)
        self.project = nn.Linear(in_channels, hidden)
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)
        self.norms = nn.ModuleList(nn.Identity() if conv == "gin" else _batch_norm(hidden) for _ in range(num_layers))
        self.convs = nn.ModuleList(self._layer(hidden) for _ in range(num_layers))

    def _layer(self, hidden: int) -> nn.Module:
        if self.conv == "gcn":
            return WeightedGCNConv(hidden, hidden)
        if self.conv == "gat":
            return GATConv(hidden, hidden // 4, heads=4, dropout=0.2)  # type: ignore[no-any-return]
        return _CALGINConv(hidden)

    def forward(self, x: Tensor, edge_index: Tensor, *, loops: Routes | None = None) -> Tensor:
        """Return node embeddings [n, d]; a caller that has `loop_routes` already may pass them."""
        h = self.project(self.input_norm(x)).relu()
        shared = _shared(self.conv, h, edge_index, None, loops)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            h = conv(norm(h), edge_index, **shared).relu()
        return h  # type: ignore[no-any-return]


def _shared(
    conv: str, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None, loops: Routes | None = None
) -> dict[str, Any]:
    """What all layers of an encoder compute from the edges alone."""
    if conv == "gat":
        return {}
    if conv == "gcn":
        normalised = weighted_gcn_norm(edge_index, edge_weight, len(x), x.dtype)
        return {"normalised": normalised, "routes": loops or edge_routes(normalised[0], x)}
    return {"routes": edge_routes(edge_index, x)}


class _CALGINConv(nn.Module):
    """PyG's GINConv with CAL's MLP d-d-d, eps 0."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(hidden, hidden), _batch_norm(hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        )

    def forward(self, x: Tensor, edge_index: Tensor, *, routes: Routes | None) -> Tensor:
        return self.mlp(x + propagate(x, edge_index, None, routes))  # type: ignore[no-any-return]


class ConvStack(nn.Module):
    """The encoder of AIA and InfoIGL: convolution, batch norm, ReLU (not after the last layer), dropout.

    Args:
        in_channels: F.
        hidden: d; with "gat" divisible by 4.
        num_layers: Convolutions. A single one is followed by its batch norm only.
        conv: "gin" (PyG's plain layer), "weighted_gin" (AIA's, with a ReLU on messages), "gcn" or "gat"; all take edge
            weights.
        dropout: In [0, 1].

    Raises:
        ValueError: If a size, `conv` or `dropout` is not accepted.

    Examples:
        >>> encoder = ConvStack(3, 8, 2, "weighted_gin")
        >>> encoder(torch.randn(4, 3), torch.tensor([[0, 1], [1, 0]]), torch.tensor([0.5, 0.2])).shape
        torch.Size([4, 8])
    """

    def __init__(
        self,
        in_channels: int,
        hidden: int = 128,
        num_layers: int = 3,
        conv: Literal["gin", "weighted_gin", "gcn", "gat"] = "gin",
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        check_choice("conv", conv, ("gin", "weighted_gin", "gcn", "gat"))
        for name, value in (("in_channels", in_channels), ("hidden", hidden), ("num_layers", num_layers)):
            check_count(name, value)
        check_fraction("dropout", dropout)
        self.hidden, self.conv, self.dropout = hidden, conv, dropout
        sizes = [in_channels, *[hidden] * num_layers]
        self.convs = nn.ModuleList(self._layer(*pair) for pair in itertools.pairwise(sizes))
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in range(num_layers))

    def _layer(self, in_channels: int, out_channels: int) -> nn.Module:
        if self.conv == "gcn":
            return WeightedGCNConv(in_channels, out_channels)
        if self.conv == "gat":
            return WeightedGATConv(in_channels, out_channels)
        return WeightedGINConv(in_channels, out_channels, message_relu=self.conv == "weighted_gin")

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        """Return node embeddings [n, d]."""
        shared = _shared(self.conv, x, edge_index, edge_weight)
        last = len(self.convs) - 1
        h = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            h = norm(conv(h, edge_index, edge_weight, **shared))
            if i < last:
                h = h.relu()
            if last > 0:
                h = F.dropout(h, self.dropout, self.training)
        return h


def readout_head(
    hidden: int, num_classes: int, *, in_channels: int | None = None, dropout: float = 0.0
) -> nn.Sequential:
    """Return the head of CAL's program: batch norm, linear, ReLU, batch norm, (dropout,) linear.

    Args:
        hidden: d.
        num_classes: C.
        in_channels: Size of the graph embedding; d by default.
        dropout: Before the last layer, in [0, 1].

    Returns:
        A module from graph embeddings [B, in_channels] to logits [B, C].

    Raises:
        ValueError: If a size or `dropout` is not accepted.

    Examples:
        >>> readout_head(8, 3)(torch.randn(5, 8)).shape
        torch.Size([5, 3])
    """
    width = hidden if in_channels is None else in_channels
    for name, value in (("hidden", hidden), ("num_classes", num_classes), ("in_channels", width)):
        check_count(name, value)
    check_fraction("dropout", dropout)
    layers = [_batch_norm(width), nn.Linear(width, hidden), nn.ReLU(), _batch_norm(hidden)]
    layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(hidden, num_classes))


class GraphClassifier(nn.Module):
    """An encoder, pooling and a head: what empirical risk minimisation trains.

    Args:
        encoder: Module (x, edge_index) -> node embeddings [n, d] with an attribute `hidden` = d.
        num_classes: C.
        pool: "sum" or "mean".
        head: Module [B, d] -> [B, C]; `readout_head` by default.

    Raises:
        ValueError: If `pool` is not accepted.

    Examples:
        >>> from torch_geometric.data import Batch, Data
        >>> graph = Data(x=torch.randn(3, 2), edge_index=torch.tensor([[0, 1], [1, 2]]))
        >>> model = GraphClassifier(ConvStack(2, 8), 4)
        >>> model(Batch.from_data_list([graph, graph])).shape
        torch.Size([2, 4])
    """

    def __init__(
        self, encoder: nn.Module, num_classes: int, *, pool: Pool = "sum", head: nn.Module | None = None
    ) -> None:
        super().__init__()
        check_choice("pool", pool, ("sum", "mean"))
        check_count("num_classes", num_classes)
        self.encoder, self.pool, self.num_classes = encoder, pool, num_classes
        self.head = readout_head(int(encoder.hidden), num_classes) if head is None else head  # type: ignore[arg-type]

    def embed(self, data: Data) -> Tensor:
        """Return graph embeddings [B, d]."""
        index, num_graphs = graph_index(data)
        return pool(self.encoder(data.x, data.edge_index), index, num_graphs, self.pool)

    def forward(self, data: Data) -> Tensor:
        """Return logits [B, C] of a batch of graphs."""
        return self.head(self.embed(data))  # type: ignore[no-any-return]
