r"""Masks as explanations: PyG's `Explanation`, agreement with the true motif, a picture.

CAL, AIA and InfoIGL score every node and directed edge of a batch. Here the scores become one `Explanation` per graph,
`mask_auc` says how well they rank a known motif first, and `draw_split` draws the causal and the trivial part.

$$\text{AUC}=P(m_+>m_-)+\tfrac12P(m_+=m_-)$$

Reference: M. Fey, J. E. Lenssen, *Fast Graph Representation Learning with PyTorch Geometric*, RLGM at ICLR 2019,
arXiv:1903.02428 (`Explanation`); the layout minimises the stress of T. Kamada, S. Kawai, *An algorithm for drawing general
undirected graphs*, 1989, by the majorisation of E. R. Gansner, Y. Koren, S. North, *Graph Drawing by Stress
Majorization*, GD 2004. Documentation: `docs/guides/graph-distribution-shift.md`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch_geometric.data import Batch  # type: ignore[import-untyped]
from torch_geometric.explain import Explanation  # type: ignore[import-untyped]

from graph_ood._checks import check_count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor
    from torch_geometric.data import Data

__all__ = ["draw_split", "explanations", "graph_layout", "mask_auc"]

# Trivial, undecided, causal: a blue and an orange that the common colour blindnesses tell apart, and a grey between them.
# All three, and the text, have a contrast of about 3 or more against white and against a dark page.
_COLORS = ("#0072b2", "#858585", "#d55e00")
_INK = "#808080"
_SIZE = 3.2  # inches per panel
_FORMATS = {".svg": {"Date": None}, ".png": {"Software": None}}


def explanations(data: Data, *, node_mask: Tensor | None = None, edge_mask: Tensor | None = None) -> list[Explanation]:
    """Turn the masks of a batch into one explanation per graph.

    Args:
        data: A batch, or a single graph; its tensors are kept, `node_gt` and `edge_gt` included.
        node_mask: Score of every node, shape `(n,)`; the higher, the more causal.
        edge_mask: Score of every directed edge, shape `(m,)`.

    Returns:
        Explanations on the CPU, in the order of the batch, with `node_mask` `(n_g, 1)` and `edge_mask` `(m_g,)`, detached.

    Raises:
        ValueError: If both masks are missing, or one doesn't fit the graphs.

    Reference: `torch_geometric.explain.Explanation`.

    Examples:
        >>> import torch
        >>> from torch_geometric.data import Batch, Data
        >>> pair = Data(x=torch.ones(2, 1), edge_index=torch.tensor([[0, 1], [1, 0]]))
        >>> found = explanations(Batch.from_data_list([pair, pair]), node_mask=torch.tensor([0.1, 0.9, 0.4, 0.6]))
        >>> found[1].node_mask.flatten()
        tensor([0.4000, 0.6000])
    """
    if node_mask is None and edge_mask is None:
        raise ValueError("expected node_mask, edge_mask or both, got neither")
    graphs: list[Data] = data.to_data_list() if isinstance(data, Batch) else [data]
    result = [Explanation.from_dict(graph.detach().cpu().to_dict()) for graph in graphs]
    for name, mask, sizes in (
        ("node_mask", node_mask, [graph.num_nodes for graph in graphs]),
        ("edge_mask", edge_mask, [graph.num_edges for graph in graphs]),
    ):
        if mask is None:
            continue
        if mask.shape != (sum(sizes),) or not mask.is_floating_point():
            raise ValueError(f"{name} must be a float tensor ({sum(sizes)},), got {mask.dtype} {tuple(mask.shape)}")
        for explanation, part in zip(result, torch.split(mask.detach().cpu(), sizes), strict=True):
            explanation[name] = part[:, None] if name == "node_mask" else part
    for explanation in result:
        explanation.validate(raise_on_error=True)
    return result


def mask_auc(mask: Tensor, truth: Tensor, graph_index: Tensor | None = None) -> float:
    r"""Area under the ROC curve of a mask against the true motif: 1 if the motif is ranked first, 0.5 by chance.

    $$\text{AUC}=P(m_+>m_-)+\tfrac12P(m_+=m_-)$$

    Works on nodes and on edges alike.

    Args:
        mask: Score of every node or edge, shape `(K,)`.
        truth: Whether it belongs to the motif (`node_gt` or `edge_gt`), bool, shape `(K,)`.
        graph_index: Graph of every element, integer, shape `(K,)` (for edges: `batch[edge_index[0]]`). The result is then
            the mean over graphs, without those whose elements are all in the motif or all outside; None ranks the elements
            of all graphs together.

    Returns:
        The area, in [0, 1].

    Raises:
        ValueError: If the shapes don't fit, `mask` has NaN, `truth` isn't bool, or it lacks one of the two classes (in
            every graph, with `graph_index`).

    Reference: `sklearn.metrics.roc_auc_score`.

    Examples:
        >>> import torch
        >>> mask_auc(torch.tensor([0.9, 0.2, 0.4]), torch.tensor([True, False, True]))
        1.0
    """
    from sklearn.metrics import roc_auc_score  # type: ignore[import-untyped]

    if mask.ndim != 1 or truth.shape != mask.shape or truth.dtype != torch.bool:
        raise ValueError(
            f"expected mask (K,) and bool truth (K,), got {tuple(mask.shape)} and {truth.dtype} {tuple(truth.shape)}"
        )
    if bool(mask.isnan().any()):
        raise ValueError("mask must be numbers, got NaN")
    groups = torch.zeros(mask.shape, dtype=torch.int64) if graph_index is None else graph_index.detach().cpu()
    if groups.shape != mask.shape:
        raise ValueError(f"expected graph_index ({mask.numel()},), got {tuple(groups.shape)}")
    order = groups.argsort(stable=True)
    sizes = torch.unique_consecutive(groups[order], return_counts=True)[1].tolist()
    scores, labels = (torch.split(value.detach().cpu()[order], sizes) for value in (mask.double(), truth))
    areas = [
        float(roc_auc_score(y, m)) for m, y in zip(scores, labels, strict=True) if bool(y.any()) and not bool(y.all())
    ]
    if not areas:
        raise ValueError("truth must hold motif and other elements; one of the two classes is missing")
    return sum(areas) / len(areas)


def graph_layout(edge_index: Tensor, num_nodes: int, *, iterations: int = 200) -> NDArray[np.float64]:
    r"""Positions for a drawing: distances on the page like distances in the graph, the same on every call.

    $$\min_X\sum_{i<j}d_{ij}^{-2}\,(\|X_i-X_j\|-d_{ij})^2$$

    Nodes start on a circle in the order of their ids. Parts that aren't connected are kept one step apart more than the
    largest distance.

    Args:
        edge_index: Edges, shape `(2, m)`, directions don't matter.
        num_nodes: n; time and memory grow with its square.
        iterations: Steps of the majorisation.

    Returns:
        Positions, shape `(n, 2)`, centred.

    Raises:
        ValueError: If `edge_index` isn't `(2, m)`, names a node outside [0, n), or n isn't positive.

    Reference: Kamada and Kawai, 1989, eq. 3; Gansner, Koren, North, 2004, section 2.

    Examples:
        >>> import torch
        >>> xy = graph_layout(torch.tensor([[0, 1], [1, 2]]), 3)  # a path: its ends are two steps apart
        >>> float(np.hypot(*(xy[0] - xy[2])).round(1))
        2.0
    """
    check_count("num_nodes", num_nodes)
    if edge_index.ndim != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"edge_index must have shape (2, m), got {tuple(edge_index.shape)}")
    edges = edge_index.detach().cpu().numpy()
    if edges.size and not 0 <= edges.min() <= edges.max() < num_nodes:
        raise ValueError(f"edge_index must name nodes in [0, {num_nodes}), got {edges.min()} to {edges.max()}")
    if num_nodes == 1:
        return np.zeros((1, 2))
    distance = _distances(edges, num_nodes)
    np.fill_diagonal(distance, 1.0)  # never used: its weight is 0
    weight = distance**-2
    np.fill_diagonal(weight, 0.0)
    inverse = np.linalg.pinv(np.diag(weight.sum(1)) - weight)
    angle = 2 * np.pi * np.arange(num_nodes) / num_nodes
    xy: NDArray[np.float64] = distance.max() / 2 * np.stack([np.cos(angle), np.sin(angle)], 1)
    for _ in range(iterations):
        gap = np.sqrt(np.square(xy[:, None] - xy[None]).sum(-1))
        pull = weight * distance / np.maximum(gap, 1e-9)
        xy = inverse @ (pull.sum(1)[:, None] * xy - pull @ xy)
    centred: NDArray[np.float64] = xy - xy.mean(0)
    return centred


def draw_split(
    graphs: Explanation | Sequence[Explanation],
    path: str | os.PathLike[str],
    *,
    titles: Sequence[str] | None = None,
    columns: int = 3,
) -> Path:
    """Draw graphs with their causal parts in orange and their trivial parts in blue; rings mark the true motif.

    The colours of a graph span its own scores: grey is the middle between its lowest and its highest. An edge has the mean
    score of its two directions. What has no mask is grey. Nodes with `node_gt` get a ring, edges with `edge_gt` a band.
    The background is transparent; the same input gives the same bytes.

    Args:
        graphs: One or several results of `explanations`.
        path: SVG or PNG file to write, as a whole or not at all.
        titles: One line above each graph.
        columns: Graphs per row.

    Returns:
        The path.

    Raises:
        ValueError: If there is no graph, the number of titles differs, `columns` isn't positive, or the file name ends
            with something else than `.svg` or `.png`.
        ImportError: If matplotlib isn't installed.

    Examples:
        >>> import tempfile, torch
        >>> from torch_geometric.data import Data
        >>> edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
        >>> path = Data(x=torch.ones(3, 1), edge_index=edges, node_gt=torch.tensor([True, True, False]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = draw_split(explanations(path, node_mask=torch.tensor([0.9, 0.6, 0.1])), Path(folder) / "path.svg")
        ...     file.read_text().startswith("<?xml")
        True
    """
    graphs = [graphs] if isinstance(graphs, Explanation) else list(graphs)
    path = Path(path)
    if not graphs:
        raise ValueError("graphs must hold at least one explanation")
    if titles is not None and len(titles) != len(graphs):
        raise ValueError(f"expected {len(graphs)} titles, got {len(titles)}")
    check_count("columns", columns)
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"path must end with .svg or .png, got {str(path)!r}")
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "draw_split needs matplotlib, which the extra `draw` installs: pip install matplotlib"
        ) from error
    columns = min(columns, len(graphs))
    rows = -(-len(graphs) // columns)
    # Ids in an SVG come from a salt: without it they differ from run to run.
    with mpl.rc_context({"svg.hashsalt": "graph_ood"}):
        figure = Figure(figsize=(_SIZE * columns, _SIZE * rows + 0.4), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis in axes:
            axis.set_axis_off()
        for number, (axis, graph) in enumerate(zip(axes, graphs, strict=False)):
            _draw(axis, graph)
            if titles is not None:
                axis.set_title(titles[number], color=_INK, fontsize=9)
        _legend(figure, with_truth=any("node_gt" in graph for graph in graphs))
        _save(figure, path)
    return path


def _distances(edges: NDArray[np.int64], num_nodes: int) -> NDArray[np.float64]:
    from scipy.sparse import coo_array  # type: ignore[import-untyped]
    from scipy.sparse.csgraph import shortest_path  # type: ignore[import-untyped]

    start, end = edges.astype(np.int32)  # scipy before 1.13 takes 32-bit places only
    adjacency = coo_array((np.ones(edges.shape[1]), (start, end)), shape=(num_nodes, num_nodes)).tocsr()
    distance: NDArray[np.float64] = shortest_path(adjacency, directed=False, unweighted=True)
    apart = np.isinf(distance)
    distance[apart] = distance[~apart].max() + 1
    return distance


def _draw(axis: Any, graph: Explanation) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("split", _COLORS)
    edge_index, node_mask, edge_mask = graph.edge_index, graph.get("node_mask"), graph.get("edge_mask")
    xy = graph_layout(edge_index, graph.num_nodes)
    pairs, scores, in_motif = _undirected(edge_index, edge_mask, graph.get("edge_gt"))
    lines: Any = xy[pairs]
    axis.add_collection(LineCollection(lines[in_motif], colors=_INK, linewidths=7, alpha=0.45, zorder=1))
    axis.add_collection(LineCollection(lines, colors=colors(_spread(scores, len(lines))), linewidths=1.6, zorder=2))
    nodes = None if node_mask is None else node_mask.double().mean(1).numpy()
    area = 1800 / (graph.num_nodes + 10)
    axis.scatter(*xy.T, s=area, c=colors(_spread(nodes, len(xy))), linewidths=0, zorder=3, clip_on=False)
    truth = graph.get("node_gt")
    if truth is not None:
        ringed = xy[truth.bool().numpy()]
        axis.scatter(
            *ringed.T, s=2.6 * area, facecolors="none", edgecolors=_INK, linewidths=1.4, zorder=4, clip_on=False
        )
    axis.set_aspect("equal")
    axis.margins(0.08)


def _undirected(
    edge_index: Tensor, edge_mask: Tensor | None, edge_gt: Tensor | None
) -> tuple[NDArray[np.int64], NDArray[np.float64] | None, NDArray[np.bool_]]:
    """Return each edge once, the mean score of its directions, and whether the motif holds it."""
    both = np.sort(edge_index.numpy().T, axis=1)
    pairs, place, count = np.unique(both, axis=0, return_inverse=True, return_counts=True)
    place = place.reshape(-1)
    scores = None if edge_mask is None else np.bincount(place, edge_mask.double().numpy(), len(pairs)) / count
    in_motif = np.zeros(len(pairs), bool)
    if edge_gt is not None:
        in_motif[place[edge_gt.bool().numpy()]] = True
    return pairs, scores, in_motif


def _spread(scores: NDArray[np.float64] | None, size: int) -> NDArray[np.float64]:
    """Map scores to [0, 1]; 0.5 where they are missing or all equal."""
    if scores is None or size == 0 or scores.max() - scores.min() < 1e-12:
        return np.full(size, 0.5)
    return (scores - scores.min()) / (scores.max() - scores.min())  # type: ignore[no-any-return]


def _legend(figure: Any, *, with_truth: bool) -> None:
    from matplotlib.lines import Line2D

    shared = {"color": "none", "marker": "o", "markersize": 7, "markeredgewidth": 0}
    entries = [
        Line2D([], [], **{**shared, "markerfacecolor": color, "label": label})  # type: ignore[arg-type]
        for label, color in (("causal", _COLORS[2]), ("trivial", _COLORS[0]))
    ]
    if with_truth:
        ring = {"markerfacecolor": "none", "markeredgecolor": _INK, "markersize": 10, "markeredgewidth": 1.4}
        entries.append(Line2D([], [], **{**shared, **ring, "label": "true motif"}))  # type: ignore[arg-type]
    figure.legend(handles=entries, loc="outside lower center", ncols=3, frameon=False, labelcolor=_INK, fontsize=9)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    suffix = path.suffix.lower()
    try:
        figure.savefig(temporary, format=suffix[1:], transparent=True, dpi=150, metadata=_FORMATS[suffix])
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
