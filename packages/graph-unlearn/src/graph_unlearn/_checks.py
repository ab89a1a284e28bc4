"""Argument checks shared by the package."""

from __future__ import annotations

import difflib
import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor

TASKS = ("node", "edge", "feature")


def check_choice(name: str, value: str, accepted: Collection[str]) -> None:
    """Raise ValueError unless `value` is one of `accepted`; the message lists them and names the nearest."""
    if value in accepted:
        return
    nearest = difflib.get_close_matches(str(value), list(accepted), n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"unknown {name} {value!r}; accepted: {', '.join(sorted(accepted))}{hint}")


def check_number(name: str, value: float, *, low: float, open_low: bool = False, high: float = math.inf) -> None:
    """Raise ValueError unless `value` is a finite number in [low, high], or in (low, high] with `open_low`."""
    inside = isinstance(value, (int, float)) and math.isfinite(value) and low <= value <= high
    if not inside or (open_low and value == low):
        upper = "" if math.isinf(high) else f" and <= {high:g}"
        raise ValueError(f"{name} must be a finite number {'>' if open_low else '>='} {low:g}{upper}, got {value!r}")


def check_count(name: str, value: int, *, low: int) -> None:
    """Raise ValueError unless `value` is an integer >= low."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")


def check_integers(name: str, ids: Tensor, ndim: int) -> None:
    """Raise ValueError unless `ids` is an integer tensor with `ndim` dimensions (an edge list with two rows if 2)."""
    shape = "(2, E)" if ndim == 2 else "(n,)"
    if not isinstance(ids, torch.Tensor):
        raise ValueError(f"{name} must be an integer tensor of shape {shape}, got {type(ids).__name__}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name} must hold integers, got dtype {ids.dtype}")
    if ids.ndim != ndim or (ndim == 2 and ids.shape[0] != 2):
        raise ValueError(f"{name} must have shape {shape}, got {tuple(ids.shape)}")


def check_ids(name: str, ids: Tensor, count: int, what: str = "node") -> None:
    """Raise ValueError unless all `ids` lie in [0, count)."""
    wrong = ids[(ids < 0) | (ids >= count)]
    if wrong.numel():
        raise ValueError(f"{name} is out of range: {what} {int(wrong.flatten()[0])}, accepted are 0 to {count - 1}")


def check_edge_index(edge_index: Tensor, num_nodes: int) -> None:
    """Raise ValueError unless `edge_index` is an integer (2, E) tensor of nodes in [0, num_nodes)."""
    check_integers("edge_index", edge_index, 2)
    check_ids("edge_index", edge_index, num_nodes)


def check_mask(name: str, mask: Any, num_nodes: int) -> None:
    """Raise ValueError unless `mask` is a bool tensor over the nodes that is True somewhere."""
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.shape != (num_nodes,):
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"{name} must be a bool tensor of shape ({num_nodes},), got {got}")
    if not bool(mask.any()):
        raise ValueError(f"{name} selects no node: at least one entry must be True")


def check_data(data: Any) -> None:
    """Raise ValueError unless `data` has x, edge_index, y and train_mask that fit together, and x is finite."""
    missing = [name for name in ("x", "edge_index", "y") if getattr(data, name, None) is None]
    if missing:
        raise ValueError(f"data must have x, edge_index and y, it has no {' and no '.join(missing)}")
    if data.x.ndim != 2 or not data.x.is_floating_point():
        raise ValueError(f"data.x must be a floating tensor of shape (N, F), got {data.x.dtype} {tuple(data.x.shape)}")
    num_nodes = data.x.shape[0]
    check_edge_index(data.edge_index, num_nodes)
    if data.y.ndim != 1 or data.y.shape[0] != num_nodes or data.y.is_floating_point():
        raise ValueError(
            f"data.y must be integer labels of shape ({num_nodes},), got {data.y.dtype} {tuple(data.y.shape)}"
        )
    if getattr(data, "train_mask", None) is None:
        raise ValueError("data has no train_mask: it says which nodes' labels the model was trained on")
    check_mask("train_mask", data.train_mask, num_nodes)
    values = data.x if data.x.layout == torch.strided else sparse_values(data.x)
    if not bool(values.isfinite().all()):
        raise ValueError("data.x must be finite, it holds infinite or NaN values")


def sparse_values(x: Tensor) -> Tensor:
    """Return the stored values of a sparse tensor in any of torch's layouts that this package meets."""
    if x.layout == torch.sparse_coo:
        return x._values() if not x.is_coalesced() else x.values()
    return x.values()


def check_undirected(edge_index: Tensor, num_nodes: int) -> None:
    """Raise ValueError if an edge is present in one direction only."""
    codes, reverse = edge_index[0] * num_nodes + edge_index[1], edge_index[1] * num_nodes + edge_index[0]
    if torch.equal(codes.sort().values, reverse.sort().values):
        return
    lonely = ~torch.isin(reverse, codes)  # copies of an edge may differ in number
    if bool(lonely.any()):
        a, b = edge_index[:, lonely][:, 0].tolist()
        raise ValueError(
            f"the graph must be undirected: edge ({a}, {b}) is present in one direction only; "
            "pass directed=True, or torch_geometric.utils.to_undirected(edge_index)"
        )
