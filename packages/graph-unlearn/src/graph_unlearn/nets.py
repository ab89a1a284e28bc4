r"""The four networks of the GIF paper, for node classification, and the products with sparse matrices under them.

Two layers each. GCN and SGC propagate with $S=D^{-1/2}AD^{-1/2}$; weights are applied before $S$, which is the same and
cheaper. Node features may be dense or sparse (`x.to_sparse()`): bags of words are a few percent dense, and a sparse product
is then some twenty times faster. The normalised matrix of a graph doesn't depend on weights: it is built once and kept for
the last few graphs.

Reference: J. Wu, Y. Yang, Y. Qian, Y. Sui, X. Wang, X. He, *GIF: A General Graph Unlearning Strategy via Influence
Function*, WWW 2023, arXiv:2304.02835, section 4.1 (sizes from the authors' code). Documentation:
`docs/papers/graph-unlearn/gif.md`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch_geometric.nn import GATConv  # type: ignore[import-untyped]
from torch_geometric.nn.conv.gcn_conv import gcn_norm  # type: ignore[import-untyped]

from graph_unlearn._checks import check_choice, check_count

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

__all__ = ["GAT", "GCN", "GIN", "MODELS", "SGC", "build_model", "propagate", "two_layer_logits"]

_KEPT = 4
# What is kept must not belong to a transform of torch.func that happens to be running.
_PLAIN: Any = getattr(torch._C, "_DisableFuncTorch", contextlib.nullcontext)


@dataclass(frozen=True)
class _Pair:
    """A sparse matrix in CSR form, its transpose, and where the values of the transpose come from.

    No tuple: transforms of torch.func would look for tensors inside, and they can't hold sparse ones.
    """

    matrix: Tensor
    transposed: Tensor
    order: Tensor

    def with_values(self, values: Tensor) -> _Pair:
        return _Pair(_with_values(self.matrix, values), _with_values(self.transposed, values[self.order]), self.order)

    def flipped(self) -> _Pair:
        return _Pair(self.transposed, self.matrix, self.order)


class _Product(torch.autograd.Function):
    """Constant sparse matrix times dense matrix, differentiable in the second any number of times, in both modes."""

    @staticmethod
    def forward(pair: _Pair, h: Tensor) -> Tensor:
        return pair.matrix @ h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[_Pair, Tensor], output: Tensor) -> None:
        ctx.pair = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[None, Tensor]:
        return None, _product(ctx.pair.flipped(), grad[0])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return _product(ctx.pair, tangents[1])


def _product(pair: _Pair, h: Tensor) -> Tensor:
    out: Tensor = _Product.apply(pair, h.contiguous())
    return out


class _Recent:
    """What was built from the last few tensors. The tensors are held, so that their addresses stay theirs."""

    def __init__(self) -> None:
        self.entries: OrderedDict[tuple[Any, ...], tuple[Tensor, _Pair]] = OrderedDict()

    def get(self, tensor: Tensor, key: tuple[Any, ...], build: Callable[[], _Pair]) -> _Pair:
        part = tensor if tensor.layout == torch.strided else _values(tensor)
        if part.is_inference():  # has no version counter: a change in place would go unseen
            return build()
        full = (part.data_ptr(), part._version, tuple(part.shape), part.stride(), part.device, *key)
        if full not in self.entries:
            with _PLAIN():
                self.entries[full] = (tensor.detach(), build())
            while len(self.entries) > _KEPT:
                self.entries.popitem(last=False)
        self.entries.move_to_end(full)
        return self.entries[full][1]


_GRAPHS, _FEATURES = _Recent(), _Recent()


def propagate(
    h: Tensor, edge_index: Tensor, *, self_loops: bool = False, norm: Literal["gcn", "sum"] = "gcn"
) -> Tensor:
    r"""Sum over incoming edges, by default with the symmetric normalisation.

    $$\big(D^{-1/2}AD^{-1/2}h\big)_i=\sum_{j\to i}\frac{h_j}{\sqrt{d_jd_i}}\quad\text{(gcn)},\qquad\sum_{j\to i}h_j\quad\text{(sum)}$$

    Args:
        h: Node rows, shape `(N, d)`, floating, dense.
        edge_index: Edges, shape `(2, E)`, integer, from row 0 to row 1.
        self_loops: Add a loop to every node that has none.
        norm: `"gcn"` or `"sum"`.

    Returns:
        Shape `(N, d)`; a node without incoming edges has a row of zeros.

    Examples:
        >>> import torch
        >>> propagate(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[0, 1], [1, 0]]))
        tensor([[2.],
                [1.],
                [0.]])
    """
    num_nodes = h.shape[0]

    def build() -> _Pair:
        index, weight = edge_index, torch.ones(edge_index.shape[1], dtype=h.dtype, device=h.device)
        if norm == "gcn":
            index, weight = gcn_norm(edge_index, None, num_nodes, False, self_loops, "source_to_target", h.dtype)
        return _pair(index[1], index[0], weight, (num_nodes, num_nodes))

    pair = _GRAPHS.get(edge_index, (num_nodes, h.dtype, self_loops, norm), build)
    return _product(pair, h)


def two_layer_logits(
    weights: Sequence[Tensor],
    x: Tensor,
    edge_index: Tensor,
    *,
    model: Literal["gcn", "sgc"] = "gcn",
    self_loops: bool = False,
) -> Tensor:
    r"""The two-layer networks without bias as a function of their weights.

    $$\text{gcn: }S\,\text{relu}(SXW_1^\top)W_2^\top,\qquad\text{sgc: }S^2XW_1^\top W_2^\top$$

    Args:
        weights: $W_1$ of shape `(hidden, F)` and $W_2$ of shape `(C, hidden)`.
        x: Features, shape `(N, F)`, dense or sparse.
        edge_index: Edges, shape `(2, E)`.
        model: `"gcn"` or `"sgc"`.
        self_loops: Add self loops.

    Returns:
        Logits, shape `(N, C)`.

    Raises:
        ValueError: If `model` is unknown.

    Examples:
        >>> import torch
        >>> w = [torch.eye(2), torch.eye(2)]
        >>> two_layer_logits(w, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0, 1], [1, 0]]))
        tensor([[1., 0.],
                [0., 1.]])
    """
    check_choice("model", model, ("gcn", "sgc"))
    h = propagate(_times(x, weights[0].T), edge_index, self_loops=self_loops)
    if model == "gcn":
        return propagate(F.relu(h) @ weights[1].T, edge_index, self_loops=self_loops)
    return propagate(h @ weights[1].T, edge_index, self_loops=self_loops)


class GCN(nn.Module):
    r"""Two-layer GCN without bias: $S\,\text{relu}(SXW_1)W_2$, dropout between the layers.

    Args:
        in_channels: F.
        num_classes: C.
        hidden: Width of the layer between.
        dropout: Probability of the dropout.
        self_loops: Add self loops before normalising; the authors' code doesn't.

    Examples:
        >>> import torch
        >>> GCN(4, 3)(torch.ones(2, 4), torch.tensor([[0, 1], [1, 0]])).shape
        torch.Size([2, 3])
    """

    num_layers = 2

    def __init__(
        self, in_channels: int, num_classes: int, hidden: int = 16, *, dropout: float = 0.5, self_loops: bool = False
    ) -> None:
        super().__init__()
        _check_sizes(in_channels, num_classes, hidden)
        self.lin1 = _Linear(in_channels, hidden)
        self.lin2 = _Linear(hidden, num_classes)
        self.dropout = dropout
        self.self_loops = self_loops
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights (Glorot, as PyG's GCNConv)."""
        for lin in (self.lin1, self.lin2):
            nn.init.xavier_uniform_(lin.weight)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h = F.relu(propagate(self.lin1(x), edge_index, self_loops=self.self_loops))
        h = F.dropout(h, self.dropout, self.training)
        return F.log_softmax(propagate(self.lin2(h), edge_index, self_loops=self.self_loops), dim=-1)


class SGC(nn.Module):
    r"""Two linear maps on propagated features, without nonlinearity: $S^2XW_1W_2$, dropout between the layers.

    Args:
        in_channels: F.
        num_classes: C.
        hidden: Width between the maps; 0 means a single map, which makes training with an l2 term strictly convex.
        dropout: Probability of the dropout.
        self_loops: Add self loops before normalising.

    Examples:
        >>> import torch
        >>> SGC(4, 3)(torch.ones(2, 4), torch.tensor([[0, 1], [1, 0]])).shape
        torch.Size([2, 3])
    """

    num_layers = 2

    def __init__(
        self, in_channels: int, num_classes: int, hidden: int = 16, *, dropout: float = 0.5, self_loops: bool = False
    ) -> None:
        super().__init__()
        _check_sizes(in_channels, num_classes, max(hidden, 1))
        self.lin1 = _Linear(in_channels, hidden or num_classes)
        self.lin2: nn.Module = _Linear(hidden, num_classes) if hidden else nn.Identity()
        self.dropout = dropout if hidden else 0.0
        self.self_loops = self_loops
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights (Glorot)."""
        for weight in self.parameters():
            nn.init.xavier_uniform_(weight)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h = propagate(self.lin1(x), edge_index, self_loops=self.self_loops)
        h = F.dropout(h, self.dropout, self.training)
        return F.log_softmax(propagate(self.lin2(h), edge_index, self_loops=self.self_loops), dim=-1)


class GAT(nn.Module):
    """Two GAT layers: 8 heads of 8, then one head of C; dropout 0.6 on inputs and attention, self loops.

    Args:
        in_channels: F.
        num_classes: C.
        hidden: Width of a head.
        heads: Heads of the first layer.
        dropout: Probability of every dropout.

    Examples:
        >>> import torch
        >>> GAT(4, 3)(torch.ones(2, 4), torch.tensor([[0, 1], [1, 0]])).shape
        torch.Size([2, 3])
    """

    num_layers = 2

    def __init__(
        self, in_channels: int, num_classes: int, hidden: int = 8, *, heads: int = 8, dropout: float = 0.6
    ) -> None:
        super().__init__()
        _check_sizes(in_channels, num_classes, hidden)
        self.conv1 = GATConv(in_channels, hidden, heads=heads, dropout=dropout)
        # The same map of the features, for sparse ones too.
        self.conv1.lin = _Linear(in_channels, hidden * heads)
        self.conv2 = GATConv(hidden * heads, num_classes, heads=1, concat=False, dropout=dropout)
        self.dropout = dropout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights (Glorot) and set biases to zero."""
        self.conv1.reset_parameters()
        self.conv2.reset_parameters()

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h = F.relu(self.conv1(_dropout(x, self.dropout, self.training), edge_index))
        h = self.conv2(F.dropout(h, self.dropout, self.training), edge_index)
        return F.log_softmax(h, dim=-1)


class GIN(nn.Module):
    """Two GIN layers (MLPs in-32-32) with batch norm, then 32-32-C; dropout 0.5.

    Args:
        in_channels: F.
        num_classes: C.
        hidden: Width of all layers.
        dropout: Probability of both dropouts.

    Examples:
        >>> import torch
        >>> GIN(4, 3)(torch.ones(2, 4), torch.tensor([[0, 1], [1, 0]])).shape
        torch.Size([2, 3])
    """

    num_layers = 2

    def __init__(self, in_channels: int, num_classes: int, hidden: int = 32, *, dropout: float = 0.5) -> None:
        super().__init__()
        _check_sizes(in_channels, num_classes, hidden)
        self.conv1 = _GINLayer(in_channels, hidden)
        self.bn1 = nn.BatchNorm1d(hidden)
        self.conv2 = _GINLayer(hidden, hidden)
        self.bn2 = nn.BatchNorm1d(hidden)
        self.fc1 = nn.Linear(hidden, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)
        self.dropout = dropout

    def reset_parameters(self) -> None:
        """Draw all weights anew, those of batch norm and of the last layers included."""
        for part in (self.conv1.lin1, self.conv1.lin2, self.conv2.lin1, self.conv2.lin2, self.fc1, self.fc2):
            part.reset_parameters()
        self.bn1.reset_parameters()
        self.bn2.reset_parameters()

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h = F.dropout(F.relu(self.conv1(x, edge_index)), self.dropout, self.training)
        h = F.relu(self.conv2(self.bn1(h), edge_index))
        h = F.dropout(F.relu(self.fc1(self.bn2(h))), self.dropout, self.training)
        return F.log_softmax(self.fc2(h), dim=-1)


MODELS: dict[str, type[GCN | SGC | GAT | GIN]] = {"gcn": GCN, "sgc": SGC, "gat": GAT, "gin": GIN}
"""Name to class of the networks of the paper."""


def build_model(name: str, in_channels: int, num_classes: int, **options: Any) -> nn.Module:
    """Build a network by name.

    Args:
        name: `"gcn"`, `"sgc"`, `"gat"` or `"gin"`.
        in_channels: F.
        num_classes: C.
        **options: Passed on to the class.

    Returns:
        The network, with weights from torch's global generator.

    Raises:
        ValueError: If `name` is unknown or a size is < 1.

    Examples:
        >>> build_model("sgc", 4, 3).num_layers
        2
    """
    check_choice("model", name, MODELS)
    return MODELS[name](in_channels, num_classes, **options)


class _Linear(nn.Linear):
    """A linear map without bias for dense or sparse rows."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, bias=False)

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return _times(x, self.weight.T)


class _GINLayer(nn.Module):
    """GINConv with an MLP of two layers. The first map comes before the sum: the same, in far fewer dimensions."""

    def __init__(self, in_channels: int, hidden: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(in_channels, hidden)
        self.lin2 = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h = _times(x, self.lin1.weight.T)
        out: Tensor = self.lin2(F.relu(h + propagate(h, edge_index, norm="sum") + self.lin1.bias))
        return out


def _times(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight` for dense or sparse x; only the weight gets a gradient from the sparse product."""
    if x.layout == torch.strided:
        return x @ weight
    pair = _sparse_pair(x)
    return _product(pair, weight)


def _dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout; a zero stays zero, so that of a sparse tensor is the dropout of its values."""
    if x.layout == torch.strided or not training or p == 0:
        return F.dropout(x, p, training) if x.layout == torch.strided else x
    return _Dropped(_sparse_pair(x), p).tensor


class _Dropped:
    """A sparse tensor with dropped values, remembered with its transpose for the one product that follows."""

    def __init__(self, pair: _Pair, p: float) -> None:
        dropped = pair.with_values(F.dropout(pair.matrix.values(), p))
        self.tensor = dropped.matrix
        _FEATURES.get(dropped.matrix, (), lambda: dropped)


def _sparse_pair(x: Tensor) -> _Pair:
    def build() -> _Pair:
        entries = (x if x.layout == torch.sparse_coo else x.to_sparse_coo()).coalesce()  # type: ignore[no-untyped-call]
        row, column = entries.indices()
        return _pair(row, column, entries.values(), (x.shape[0], x.shape[1]))

    return _FEATURES.get(x, (), build)


def _pair(row: Tensor, column: Tensor, values: Tensor, shape: tuple[int, int]) -> _Pair:
    """Build a matrix and its transpose from entries in any order; duplicates stay, and add up in products."""
    by_row = torch.argsort(row * shape[1] + column, stable=True)
    row, column, values = row[by_row], column[by_row], values[by_row]
    order = torch.argsort(column, stable=True)
    matrix = _csr(row, column, values, shape)
    return _Pair(matrix, _csr(column[order], row[order], values[order], (shape[1], shape[0])), order)


def _csr(row: Tensor, column: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    starts = torch.zeros(shape[0] + 1, dtype=torch.long, device=row.device)
    starts[1:] = torch.bincount(row, minlength=shape[0]).cumsum(0)
    return _csr_tensor(starts, column, values, shape)


def _csr_tensor(starts: Tensor, column: Tensor, values: Tensor, shape: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(starts, column, values.detach(), shape, check_invariants=False)


def _with_values(matrix: Tensor, values: Tensor) -> Tensor:
    return _csr_tensor(matrix.crow_indices(), matrix.col_indices(), values, matrix.shape)


def _values(x: Tensor) -> Tensor:
    return x._values() if x.layout == torch.sparse_coo else x.values()


def _check_sizes(in_channels: int, num_classes: int, hidden: int) -> None:
    check_count("in_channels", in_channels, low=1)
    check_count("num_classes", num_classes, low=1)
    check_count("hidden", hidden, low=1)
