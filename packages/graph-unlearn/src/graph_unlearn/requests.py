r"""Deletion requests: what goes from a graph, what is left, and which nodes feel it.

$$
N_k(v)=\{u:1\le\text{SPD}(v,u)\le k\},\qquad
\text{node: }\bigcup_v N_{k+1}(v),\quad\text{edge: }\bigcup_{(a,b)}N_k(a)\cup N_k(b)\cup\{a,b\},\quad
\text{feature: }\bigcup_v N_k(v)
$$

for a network of $k$ message-passing layers: a deleted node changes the degrees of its neighbours, so its influence reaches
one hop further.

Reference: J. Wu, Y. Yang, Y. Qian, Y. Sui, X. Wang, X. He, *GIF: A General Graph Unlearning Strategy via Influence
Function*, WWW 2023, arXiv:2304.02835, Lemma 3. Documentation: `docs/papers/graph-unlearn/gif.md`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from graph_unlearn._checks import (
    TASKS,
    check_choice,
    check_count,
    check_edge_index,
    check_ids,
    check_integers,
    check_number,
    check_undirected,
    sparse_values,
)

if TYPE_CHECKING:
    from torch import Tensor
    from torch_geometric.data import Data  # type: ignore[import-untyped]

__all__ = [
    "AffectedNodes",
    "EdgeRequest",
    "FeatureRequest",
    "NodeRequest",
    "Request",
    "Task",
    "affected_nodes",
    "apply_request",
    "check_request",
    "draw_request",
    "k_hop_nodes",
    "remove_edges",
    "remove_nodes",
    "request_nodes",
    "task_of",
]

Task = Literal["node", "edge", "feature"]


@dataclass(frozen=True)
class NodeRequest:
    """Delete nodes with all their edges.

    Args:
        nodes: Node ids, shape `(R,)`, integer; they may repeat.

    Raises:
        ValueError: If `nodes` isn't an integer vector.

    Examples:
        >>> import torch
        >>> NodeRequest(torch.tensor([3, 5])).nodes
        tensor([3, 5])
    """

    nodes: Tensor

    def __post_init__(self) -> None:
        check_integers("nodes", self.nodes, 1)


@dataclass(frozen=True)
class EdgeRequest:
    """Delete edges; in an undirected graph one direction names both.

    Args:
        edges: Endpoints, shape `(2, R)`, integer.

    Raises:
        ValueError: If `edges` isn't an integer tensor of two rows.

    Examples:
        >>> import torch
        >>> EdgeRequest(torch.tensor([[0], [1]])).edges.shape
        torch.Size([2, 1])
    """

    edges: Tensor

    def __post_init__(self) -> None:
        check_integers("edges", self.edges, 2)


@dataclass(frozen=True)
class FeatureRequest:
    """Set features of nodes to zero.

    Args:
        nodes: Node ids, shape `(R,)`, integer.
        columns: Feature columns, shape `(C,)`, integer; None means all of them.

    Raises:
        ValueError: If `nodes` or `columns` isn't an integer vector.

    Examples:
        >>> import torch
        >>> FeatureRequest(torch.tensor([2])).columns is None
        True
    """

    nodes: Tensor
    columns: Tensor | None = None

    def __post_init__(self) -> None:
        check_integers("nodes", self.nodes, 1)
        if self.columns is not None:
            check_integers("columns", self.columns, 1)


Request = NodeRequest | EdgeRequest | FeatureRequest


class AffectedNodes(NamedTuple):
    """Whom a request touches; sorted node ids without duplicates.

    Attributes:
        deleted: Deleted nodes (node requests).
        feature: Nodes whose features go (feature requests).
        influenced: Nodes whose output may change, without the two above; for an edge request with the endpoints.
    """

    deleted: Tensor
    feature: Tensor
    influenced: Tensor


def task_of(request: Request) -> Task:
    """Return `"node"`, `"edge"` or `"feature"`.

    Args:
        request: Any request.

    Returns:
        The kind of the request.

    Raises:
        ValueError: If `request` isn't one of the three kinds.

    Examples:
        >>> import torch
        >>> task_of(EdgeRequest(torch.zeros(2, 0, dtype=torch.long)))
        'edge'
    """
    if isinstance(request, NodeRequest):
        return "node"
    if isinstance(request, EdgeRequest):
        return "edge"
    if isinstance(request, FeatureRequest):
        return "feature"
    raise ValueError(f"request must be a NodeRequest, EdgeRequest or FeatureRequest, got {type(request).__name__}")


def request_nodes(request: Request) -> Tensor:
    """Return the node ids that a request names: for an edge request the endpoints, sorted and without duplicates.

    Args:
        request: Any request.

    Returns:
        Node ids, sorted, int64.

    Raises:
        ValueError: If `request` isn't one of the three kinds.

    Examples:
        >>> import torch
        >>> request_nodes(EdgeRequest(torch.tensor([[4, 0], [1, 4]])))
        tensor([0, 1, 4])
    """
    ids = request.edges.flatten() if task_of(request) == "edge" else request.nodes  # type: ignore[union-attr]
    nodes: Tensor = torch.unique(ids.long())
    return nodes


def k_hop_nodes(edge_index: Tensor, nodes: Tensor, num_hops: int, num_nodes: int) -> Tensor:
    r"""Nodes within `num_hops` steps from source to target, the start included.

    Args:
        edge_index: Edges, shape `(2, E)`, integer, followed from row 0 to row 1.
        nodes: Start, shape `(R,)`, integer.
        num_hops: Steps, >= 0.
        num_nodes: N.

    Returns:
        Bool mask of shape `(N,)`.

    Examples:
        >>> import torch
        >>> k_hop_nodes(torch.tensor([[0, 1, 2], [1, 2, 3]]), torch.tensor([0]), 2, 4)
        tensor([ True,  True,  True, False])
    """
    reached = torch.zeros(num_nodes, dtype=torch.bool, device=edge_index.device)
    reached[nodes.to(edge_index.device)] = True
    source, target = edge_index
    for _ in range(num_hops):
        reached[target[reached[source]]] = True
    return reached


def affected_nodes(
    task: Task, edge_index: Tensor, request: Tensor, num_nodes: int, num_layers: int = 2
) -> AffectedNodes:
    r"""The nodes that a request deletes, strips or influences (GIF, Lemma 3).

    $$\text{node: }\bigcup_v N_{k+1}(v),\quad\text{edge: }\bigcup_v N_k(v)\cup\{v\},\quad\text{feature: }\bigcup_v N_k(v)$$

    Neighbourhoods are those of the graph before the request.

    Args:
        task: `"node"`, `"edge"` or `"feature"`.
        edge_index: Edges before the request, shape `(2, E)`, integer.
        request: Node ids; for an edge request the endpoints. Shape `(R,)`, integer, may be empty.
        num_nodes: N.
        num_layers: $k\ge1$, message-passing layers of the network.

    Returns:
        Sorted ids, int64.

    Raises:
        ValueError: If an id is out of range, `task` is unknown, `num_layers` < 1 or a shape is wrong.

    Examples:
        >>> import torch
        >>> path = torch.tensor([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]])
        >>> affected_nodes("node", path, torch.tensor([0]), 4, num_layers=1)
        AffectedNodes(deleted=tensor([0]), feature=tensor([], dtype=torch.int64), influenced=tensor([1, 2]))
    """
    check_choice("task", task, TASKS)
    check_count("num_layers", num_layers, low=1)
    check_edge_index(edge_index, num_nodes)
    check_integers("request", request, 1)
    check_ids("request", request, num_nodes)
    named = torch.unique(request.to(edge_index.device).long())
    reached = k_hop_nodes(edge_index, named, num_layers + (task == "node"), num_nodes)
    if task != "edge":
        reached[named] = False
    none = named.new_empty(0)
    return AffectedNodes(
        deleted=named if task == "node" else none,
        feature=named if task == "feature" else none,
        influenced=reached.nonzero().flatten(),
    )


def remove_edges(edge_index: Tensor, edges: Tensor, *, directed: bool = False) -> Tensor:
    """Drop edges; the order of the others is kept.

    Args:
        edge_index: Edges, shape `(2, E)`, integer.
        edges: What goes, shape `(2, R)`, integer. Every copy of it goes; pairs that aren't there are ignored
            (`check_request` finds them).
        directed: Keep the opposite direction of a named edge.

    Returns:
        The remaining edges, shape `(2, E')`.

    Raises:
        ValueError: If a shape or dtype is wrong.

    Examples:
        >>> import torch
        >>> remove_edges(torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]), torch.tensor([[1], [0]]))
        tensor([[1, 2],
                [2, 1]])
    """
    check_integers("edge_index", edge_index, 2)
    check_integers("edges", edges, 2)
    edges = edges.to(edge_index)
    if edges.numel() == 0 or edge_index.numel() == 0:
        return edge_index.clone()
    base = int(torch.maximum(edge_index.max(), edges.max())) + 1
    wanted = edges[0] * base + edges[1]
    if not directed:
        wanted = torch.cat([wanted, edges[1] * base + edges[0]])
    return edge_index[:, ~torch.isin(edge_index[0] * base + edge_index[1], wanted)]


def remove_nodes(edge_index: Tensor, nodes: Tensor) -> Tensor:
    """Drop every edge with an endpoint among `nodes`; node ids are not renumbered.

    Args:
        edge_index: Edges, shape `(2, E)`, integer.
        nodes: Node ids, shape `(R,)`, integer.

    Returns:
        The remaining edges in their order, shape `(2, E')`.

    Raises:
        ValueError: If a shape or dtype is wrong.

    Examples:
        >>> import torch
        >>> remove_nodes(torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]), torch.tensor([0]))
        tensor([[1, 2],
                [2, 1]])
    """
    check_integers("edge_index", edge_index, 2)
    check_integers("nodes", nodes, 1)
    if edge_index.numel() == 0 or nodes.numel() == 0:
        return edge_index.clone()
    gone = torch.zeros(
        int(torch.maximum(edge_index.max(), nodes.max())) + 1, dtype=torch.bool, device=edge_index.device
    )
    gone[nodes.to(edge_index.device).long()] = True
    return edge_index[:, ~(gone[edge_index[0]] | gone[edge_index[1]])]


def check_request(request: Request, data: Data, *, directed: bool = False) -> None:
    """Refuse a request that doesn't fit its graph. An empty request fits.

    Args:
        request: The request.
        data: The graph, with `x` and `edge_index`.
        directed: Whether the edges of the graph have a direction.

    Raises:
        ValueError: If a node or column is out of range; an edge is not in the graph (the first such pair is named); or
            the graph is not undirected and `directed` is False.

    Examples:
        >>> import torch
        >>> from torch_geometric.data import Data
        >>> graph = Data(x=torch.ones(3, 1), edge_index=torch.tensor([[0, 1], [1, 0]]))
        >>> check_request(EdgeRequest(torch.tensor([[1], [2]])), graph)
        Traceback (most recent call last):
        ...
        ValueError: edge not in graph: (1, 2) is the first of 1 missing pairs
    """
    task = task_of(request)
    num_nodes, edge_index = data.x.shape[0], data.edge_index
    check_edge_index(edge_index, num_nodes)
    if not directed:
        check_undirected(edge_index, num_nodes)
    if isinstance(request, EdgeRequest):
        check_ids("edges", request.edges, num_nodes)
        _check_present(request.edges.to(edge_index), edge_index, num_nodes)
        return
    check_ids(f"nodes of the {task} request", request.nodes, num_nodes)
    if isinstance(request, FeatureRequest) and request.columns is not None:
        check_ids("columns", request.columns, data.x.shape[1], "column")


def apply_request(request: Request, data: Data, *, directed: bool = False) -> Data:
    """Return the remaining graph: a copy of `data` without what the request names.

    A deleted node keeps its row, without edges and outside every mask, so that ids stay valid; `data` isn't changed.

    Args:
        request: The request. Pairs that aren't edges are ignored (see `check_request`).
        data: The graph, with `x` and `edge_index`; attributes named `*_mask` are bool masks over the nodes.
        directed: Keep the opposite direction of a named edge.

    Returns:
        The graph after the request. It shares tensors with `data` where nothing changes.

    Raises:
        ValueError: If `request` isn't one of the three kinds.

    Examples:
        >>> import torch
        >>> from torch_geometric.data import Data
        >>> graph = Data(x=torch.ones(2, 1), edge_index=torch.tensor([[0, 1], [1, 0]]), train_mask=torch.ones(2) > 0)
        >>> after = apply_request(NodeRequest(torch.tensor([1])), graph)
        >>> after.edge_index.shape, after.train_mask
        (torch.Size([2, 0]), tensor([ True, False]))
    """
    task_of(request)
    after = data.__copy__()
    if isinstance(request, EdgeRequest):
        after.edge_index = remove_edges(data.edge_index, request.edges, directed=directed)
        return after
    nodes = request.nodes.to(data.edge_index)
    if isinstance(request, FeatureRequest):
        after.x = _without_features(data.x, nodes, request.columns)
        return after
    after.edge_index = remove_nodes(data.edge_index, nodes)
    for name in data.keys():  # noqa: SIM118
        if name.endswith("_mask"):
            mask = data[name].clone()
            mask[nodes] = False
            after[name] = mask
    return after


def draw_request(task: Task, data: Data, ratio: float, generator: torch.Generator | None = None) -> Request:
    r"""Draw a request at random, as the paper's experiments do.

    Node and feature requests take $\lfloor\rho n\rfloor$ training nodes, edge requests $\lfloor\rho m\rfloor$ undirected
    edges, each without replacement.

    Args:
        task: `"node"`, `"edge"` or `"feature"`.
        data: The training graph, with `edge_index` and `train_mask`.
        ratio: $\rho$ in [0, 1]; the paper uses 0.05 to 0.5.
        generator: Source of the draw, on the CPU; None means one seeded with 0.

    Returns:
        The request, sorted.

    Raises:
        ValueError: If `task` is unknown, `ratio` is outside [0, 1] or `train_mask` selects nothing.

    Examples:
        >>> import torch
        >>> from torch_geometric.data import Data
        >>> graph = Data(edge_index=torch.zeros(2, 0, dtype=torch.long), train_mask=torch.ones(10) > 0)
        >>> draw_request("node", graph, 0.2).nodes.shape
        torch.Size([2])
    """
    check_choice("task", task, TASKS)
    check_number("ratio", ratio, low=0, high=1)
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    if task == "edge":
        once = data.edge_index[:, data.edge_index[0] < data.edge_index[1]]
        return EdgeRequest(once[:, _sample(once.shape[1], ratio, generator).to(once.device)])
    if getattr(data, "train_mask", None) is None or not bool(data.train_mask.any()):
        raise ValueError("train_mask is missing or selects no node to draw from")
    nodes = data.train_mask.nonzero().flatten()
    chosen = nodes[_sample(len(nodes), ratio, generator).to(nodes.device)]
    return NodeRequest(chosen) if task == "node" else FeatureRequest(chosen)


def _sample(count: int, ratio: float, generator: torch.Generator) -> Tensor:
    return torch.randperm(count, generator=generator)[: int(ratio * count)].sort().values


def _check_present(edges: Tensor, edge_index: Tensor, num_nodes: int) -> None:
    missing = ~torch.isin(edges[0] * num_nodes + edges[1], edge_index[0] * num_nodes + edge_index[1])
    if bool(missing.any()):
        a, b = edges[:, missing][:, 0].tolist()
        raise ValueError(f"edge not in graph: ({a}, {b}) is the first of {int(missing.sum())} missing pairs")


def _without_features(x: Tensor, nodes: Tensor, columns: Tensor | None) -> Tensor:
    rows = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    rows[nodes] = True
    chosen = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
    if columns is not None:
        chosen = torch.zeros_like(chosen)
        chosen[columns.to(x.device).long()] = True
    if x.layout == torch.strided:
        return x.masked_fill(rows[:, None] & chosen, 0.0)
    if x.layout == torch.sparse_coo:
        x = x.coalesce()
        row, column = x.indices()
        values = sparse_values(x).masked_fill(rows[row] & chosen[column], 0.0)
        return torch.sparse_coo_tensor(x.indices(), values, x.shape, is_coalesced=True, check_invariants=False)
    row = torch.repeat_interleave(torch.arange(x.shape[0], device=x.device), x.crow_indices().diff())
    values = x.values().masked_fill(rows[row] & chosen[x.col_indices()], 0.0)
    return torch.sparse_csr_tensor(x.crow_indices(), x.col_indices(), values, x.shape, check_invariants=False)
