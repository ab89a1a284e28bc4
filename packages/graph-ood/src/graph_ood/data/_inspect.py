"""Checks of a data set before it is trained on, and its environments."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch_geometric.data import Data, Dataset  # type: ignore[import-untyped]

_CHUNK = 2048


def check_graphs(
    dataset: Dataset | Sequence[Data],
    *,
    num_classes: int | None = None,
    allow_edgeless: bool = False,
    allow_isolated: bool = True,
) -> None:
    """Refuse a data set that a graph classifier can't be trained or evaluated on.

    Every graph needs `x`, a finite float matrix with the same number of columns everywhere and at least one row;
    `edge_index`, int64 `[2, m]`, with nodes of this graph; and `y`, one int64 class.

    Args:
        dataset: PyG data set, or a list of `Data`.
        num_classes: Number of classes C; labels then lie in [0, C). None asks for labels of at least 0.
        allow_edgeless: Whether a graph may have no edge at all; edge masks have nothing to choose from there.
        allow_isolated: Whether a node may have no edge.

    Raises:
        ValueError: For the first graph that doesn't fit; the message names its index and the field. Also if there are
            no graphs.

    Examples:
        >>> import torch
        >>> from torch_geometric.data import Data
        >>> graph = Data(x=torch.ones(2, 1), edge_index=torch.tensor([[0, 1], [1, 0]]), y=torch.tensor([0]))
        >>> check_graphs([graph, graph], num_classes=2)
        >>> graph.x[1] = torch.nan
        >>> check_graphs([graph])
        Traceback (most recent call last):
        ValueError: graph 0: x has an entry that isn't finite, in row 1
    """
    if len(dataset) == 0:
        raise ValueError("the data set has no graphs")
    # Indexing, not iterating: it goes through the cache of the data set and its transform.
    columns = None
    for start in range(0, len(dataset), _CHUNK):
        graphs = [dataset[i] for i in range(start, min(start + _CHUNK, len(dataset)))]
        for i, graph in enumerate(graphs, start):
            columns = _check_form(i, graph, columns, allow_edgeless=allow_edgeless)
        _check_values(start, graphs, num_classes, allow_isolated=allow_isolated)


def _check_form(i: int, graph: Data, columns: int | None, *, allow_edgeless: bool) -> int:
    """Check types and shapes, and return the number of columns of x."""
    x, edge_index, y = (graph.get(name) for name in ("x", "edge_index", "y"))
    if not isinstance(x, Tensor) or x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"graph {i}: x must be a float matrix [nodes, features], got {_describe(x)}")
    if len(x) == 0:
        raise ValueError(f"graph {i}: x has no rows, so the graph has no nodes")
    if x.shape[1] == 0:
        raise ValueError(f"graph {i}: x has no columns")
    if columns is not None and x.shape[1] != columns:
        raise ValueError(f"graph {i}: x has {x.shape[1]} columns, the graphs before it {columns}")
    if not _is_int64(edge_index) or edge_index.ndim != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"graph {i}: edge_index must be int64 [2, m], got {_describe(edge_index)}")
    if not allow_edgeless and edge_index.shape[1] == 0:
        raise ValueError(f"graph {i}: edge_index has no edges")
    if not _is_int64(y) or y.numel() != 1:
        raise ValueError(f"graph {i}: y must be one int64 class, got {_describe(y)}")
    return int(x.shape[1])


def _check_values(start: int, graphs: list[Data], num_classes: int | None, *, allow_isolated: bool) -> None:
    """Check the entries of many graphs at once."""
    nodes = torch.tensor([len(graph.x) for graph in graphs])
    edges = torch.tensor([graph.edge_index.shape[1] for graph in graphs])
    edge_index = torch.cat([graph.edge_index for graph in graphs], dim=1).cpu()
    graph_of_edge = torch.repeat_interleave(edges)
    y = torch.cat([graph.y.view(1) for graph in graphs]).cpu()

    outside = ((edge_index < 0) | (edge_index >= nodes[graph_of_edge])).any(0)
    if (i := _first(outside)) is not None:
        g = int(graph_of_edge[i])
        raise ValueError(
            f"graph {start + g}: edge_index has nodes outside [0, {int(nodes[g])}): {edge_index[:, i].tolist()}"
        )
    wrong = (y < 0) | (y >= (num_classes if num_classes is not None else y + 1))
    if (i := _first(wrong)) is not None:
        accepted = f"in [0, {num_classes})" if num_classes is not None else ">= 0"
        raise ValueError(f"graph {start + i}: y must be {accepted}, got {int(y[i])}")

    first_node = nodes.cumsum(0) - nodes
    graph_of_node = torch.repeat_interleave(nodes)
    finite = torch.cat([graph.x for graph in graphs]).isfinite().all(1).cpu()
    if (i := _first(~finite)) is not None:
        g = int(graph_of_node[i])
        raise ValueError(f"graph {start + g}: x has an entry that isn't finite, in row {i - int(first_node[g])}")
    if allow_isolated:
        return
    touched = torch.zeros(len(graph_of_node), dtype=torch.bool)
    touched[(edge_index + first_node[graph_of_edge]).flatten()] = True
    if (i := _first(~touched)) is not None:
        g = int(graph_of_node[i])
        raise ValueError(f"graph {start + g}: edge_index leaves node {i - int(first_node[g])} without an edge")


def _first(where: Tensor) -> int | None:
    return int(where.nonzero()[0]) if bool(where.any()) else None


def _is_int64(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.int64


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return "nothing" if value is None else type(value).__name__


def environment_ids(
    dataset: Dataset | Sequence[Data],
    *,
    field: str = "env_id",
    every_class: bool = False,
    num_classes: int | None = None,
) -> Tensor:
    """Environment of every graph, numbered from 0 without gaps, for methods that need environments.

    Args:
        dataset: PyG data set, or a list of `Data`.
        field: Field of a graph that names its environment, an integer of at least 0.
        every_class: Whether each environment has to hold each class. A method that compares the classes within an
            environment needs that, and a missing class would make its penalty meaningless.
        num_classes: Number of classes for `every_class`; None takes those that occur.

    Returns:
        int64 of shape `(len(dataset),)`, in the order of the data set.

    Raises:
        ValueError: If there are no graphs, a graph lacks the field or has no environment (a negative id), or an
            environment lacks a class.

    Examples:
        >>> from graph_ood.data import GoodMotif
        >>> train = GoodMotif(shift="concept", split="train", num_data=300)
        >>> environment_ids(train, every_class=True).bincount()
        tensor([42, 42, 42])
    """
    if len(dataset) == 0:
        raise ValueError("the data set has no graphs")
    graphs = [dataset[i] for i in range(len(dataset))]
    found = _column(graphs, field)
    if (i := _first(found < 0)) is not None:
        raise ValueError(f"graph {i}: {field} is {int(found[i])}, so its environment is unknown")
    names: Tensor
    env_id: Tensor
    names, env_id = torch.unique(found, return_inverse=True)
    if every_class:
        missing = (environment_counts(env_id, _column(graphs, "y"), num_classes) == 0).nonzero().tolist()
        if missing:
            env, label = missing[0]
            raise ValueError(f"environment {int(names[env])} ({field}) has no graph of class {label}")
    return env_id


def _column(graphs: Iterable[Data], field: str) -> Tensor:
    values: list[Tensor] = []
    for i, graph in enumerate(graphs):
        value = graph.get(field)
        if isinstance(value, int):
            value = torch.tensor([value])
        if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.numel() != 1:
            raise ValueError(f"graph {i}: {field} must be one int64 number, got {_describe(value)}")
        values.append(value.view(1))
    return torch.cat(values).cpu()


def environment_counts(env_id: Tensor, y: Tensor, num_classes: int | None = None) -> Tensor:
    """Number of graphs of every class in every environment.

    Args:
        env_id: Environments, int64 `(N,)`, at least 0.
        y: Classes, int64 `(N,)`, at least 0.
        num_classes: C; None takes the largest class plus one.

    Returns:
        Counts of shape `(E, C)`, with E the largest environment plus one.

    Raises:
        ValueError: If shapes or dtypes don't fit, nothing is given, a number is negative, or a class is C or more.

    Examples:
        >>> import torch
        >>> environment_counts(torch.tensor([0, 0, 1]), torch.tensor([1, 1, 0]))
        tensor([[0, 2],
                [1, 0]])
    """
    for name, value in {"env_id": env_id, "y": y}.items():
        if not _is_int64(value) or value.ndim != 1 or len(value) == 0 or len(value) != len(env_id):
            raise ValueError(f"{name} must be int64 (N,) with N >= 1, got {_describe(value)}")
        if int(value.min()) < 0:
            raise ValueError(f"{name} must be >= 0, got {int(value.min())}")
    classes = int(y.max()) + 1 if num_classes is None else num_classes
    if int(y.max()) >= classes:
        raise ValueError(f"y must be in [0, {classes}), got {int(y.max())}")
    environments = int(env_id.max()) + 1
    return (env_id * classes + y).bincount(minlength=environments * classes).view(environments, classes)
