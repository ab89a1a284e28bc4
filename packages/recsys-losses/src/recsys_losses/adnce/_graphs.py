"""Contrastive graph classification as in GraphCL: TU data, augmentations, a GIN encoder, evaluation with an SVM."""

from __future__ import annotations

import contextlib
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from recsys_losses._checks import check_choice, check_positive
from recsys_losses._epochs import EpochRun, EpochsResult
from recsys_losses.adnce._losses import ADNCELoss

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from torch import Tensor

# What each name chooses from, per graph and step.
GRAPH_AUGMENTATIONS = {
    "random2": ("nodes", "subgraph"),
    "random3": ("nodes", "subgraph", "edges"),
    "random4": ("nodes", "subgraph", "edges", "features"),
}

_SHARES = {"nodes": 0.1, "subgraph": 0.2, "edges": 0.1, "features": 0.1}
_NEEDED = ("A", "graph_indicator", "graph_labels")
_C_GRID = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)
_CHECKPOINT = "recsys_losses adnce graph checkpoint"


@dataclass(frozen=True)
class GraphContrast:
    """A trained graph encoder.

    Args:
        encoder: The encoder with its projection head, in evaluation mode.
        epochs: What the run over epochs did.
    """

    encoder: GINEncoder
    epochs: EpochsResult


class SVMAccuracy(NamedTuple):
    """Accuracy of a support vector machine over the folds of a cross-validation.

    Args:
        mean: Mean over the folds, in [0, 1].
        folds: Accuracy of every fold.
    """

    mean: float
    folds: tuple[float, ...]


class GINEncoder(nn.Module):
    r"""Graph isomorphism network with the sums of all layers as embedding, and GraphCL's projection head.

    $$h_v\leftarrow\mathrm{BN}\big(\mathrm{ReLU}\big(\mathrm{MLP}\big(h_v+\textstyle\sum_{u\in N(v)}h_u\big)\big)\big),\qquad
      e_G=\big[\textstyle\sum_vh^{(1)}_v,\dots,\sum_vh^{(L)}_v\big]$$

    Args:
        in_features: Width of the node features, >= 1.
        hidden: Width of every layer, >= 1.
        num_layers: L >= 1; the embedding has `num_layers * hidden` entries.
        generator: Source of the initial values, a CPU generator; None takes torch's default generator.

    Raises:
        ValueError: If a size is below 1.

    Reference: Wu et al., 2023, section 5 (graph); Y. You et al., *Graph Contrastive Learning with Augmentations*, NeurIPS
    2020, arXiv:2010.13902.

    Examples:
        >>> import torch
        >>> encoder = GINEncoder(2, hidden=4, num_layers=3)
        >>> ring = torch.tensor([[0, 1, 2, 1, 2, 0], [1, 2, 0, 0, 1, 2]])
        >>> encoder(torch.ones(3, 2), ring, torch.zeros(3, dtype=torch.long), num_graphs=1).shape
        torch.Size([1, 12])
    """

    def __init__(
        self, in_features: int, hidden: int = 32, num_layers: int = 3, *, generator: torch.Generator | None = None
    ) -> None:
        from torch_geometric.nn import GINConv  # type: ignore[import-untyped]

        super().__init__()
        for name, value in (("in_features", in_features), ("hidden", hidden), ("num_layers", num_layers)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value!r}")
        width = num_layers * hidden
        with torch.random.fork_rng(devices=[]):  # the values that torch draws are replaced
            widths = [in_features] + [hidden] * num_layers
            self.convs = nn.ModuleList(
                GINConv(nn.Sequential(nn.Linear(before, hidden), nn.ReLU(), nn.Linear(hidden, hidden)))
                for before in widths[:-1]
            )
            self.projector = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in range(num_layers))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, num_graphs: int) -> Tensor:
        """Return the embeddings `(num_graphs, L * hidden)` of nodes `(n, in_features)` that belong to graphs `(n,)`."""
        from torch_geometric.nn import global_add_pool

        sums = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x, edge_index).relu())
            sums.append(global_add_pool(x, batch, size=num_graphs))
        return torch.cat(sums, 1)


def load_tu_graphs(root: str | os.PathLike[str], name: str) -> list[Any]:
    """Read a data set in the TU text format, without downloading and without writing into its folder.

    Args:
        root: Folder that holds `<name>/raw/<name>_A.txt`, `_graph_indicator.txt`, `_graph_labels.txt` and, if there
            are any, `_node_labels.txt`.
        name: Name of the data set, such as "MUTAG".

    Returns:
        One `torch_geometric.data.Data` per graph with `x` (node labels one-hot, otherwise a single 1 per node),
        `edge_index` (both directions) and `y`, the class from 0.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file can't be parsed.
    """
    from torch_geometric.datasets import TUDataset  # type: ignore[import-untyped]

    raw = Path(root) / name / "raw"
    missing = [path for part in _NEEDED if not (path := raw / f"{name}_{part}.txt").is_file()]
    if missing:
        here = sorted(path.parent.name for path in Path(root).glob("*/raw"))
        known = f"; data sets in {root}: {', '.join(here)}" if here else ""
        raise FileNotFoundError(f"no file {missing[0]}{known}")
    with tempfile.TemporaryDirectory(prefix="ballast-tu-") as processed:

        class Reader(TUDataset):  # type: ignore[misc]
            """Writes what PyG caches beside the raw files to a folder that goes away."""

            @property
            def processed_dir(self) -> str:
                return processed

        try:
            with contextlib.redirect_stderr(io.StringIO()):  # PyG announces that it processes
                dataset = Reader(str(root), name)
        except (ValueError, IndexError, RuntimeError) as error:
            raise ValueError(f"cannot read the TU files in {raw}: {error}") from error
        graphs = [dataset[i] for i in range(len(dataset))]
    for graph in graphs:
        if graph.x is None or graph.x.shape[1] == 0:
            graph.x = torch.ones(graph.num_nodes, 1)
    return graphs


def augment_graphs(batch: Any, augmentation: str = "random2", *, generator: torch.Generator | None = None) -> Any:
    r"""Return a randomly changed view of every graph of a batch (GraphCL).

    Each graph gets one of the changes that the name stands for, chosen anew per call:

    | change | what | in |
    |---|---|---|
    | nodes | 10 % of the nodes lose all edges | random2, random3, random4 |
    | subgraph | only one random node and 20 % of the nodes, reached over edges from it, keep the edges among them | random2, random3, random4 |
    | edges | 10 % of the edges go | random3, random4 |
    | features | 10 % of the nodes get features from $N(0.5, 0.5^2)$ | random4 |

    Then all nodes without an edge are removed; one node always stays. Shares are rounded down.

    Args:
        batch: A `torch_geometric.data.Batch` with `x` `(n, F)`, floating, and `edge_index` without self loops, both
            directions of every edge. Unchanged.
        augmentation: `"random2"`, `"random3"` or `"random4"`.
        generator: Source of the random numbers, a CPU generator; None takes torch's default generator.

    Returns:
        A `torch_geometric.data.Data` with `x`, `edge_index` and `batch`, the graphs in their order.

    Raises:
        ValueError: If `augmentation` is unknown.

    Examples:
        >>> import torch
        >>> from torch_geometric.data import Batch, Data
        >>> ring = Data(x=torch.ones(3, 1), edge_index=torch.tensor([[0, 1, 2, 1, 2, 0], [1, 2, 0, 0, 1, 2]]))
        >>> view = augment_graphs(Batch.from_data_list([ring, ring]), generator=torch.Generator().manual_seed(0))
        >>> view.batch.unique()
        tensor([0, 1])
    """
    from torch_geometric.data import Data  # type: ignore[import-untyped]

    check_choice("augmentation", augmentation, GRAPH_AUGMENTATIONS)
    kinds = GRAPH_AUGMENTATIONS[augmentation]
    graph, x, (source, target) = batch.batch, batch.x, batch.edge_index
    number = batch.num_graphs
    choice = torch.randint(len(kinds), (number,), generator=generator)
    size = torch.bincount(graph, minlength=number)
    rank = _rank_in_group(graph, size, generator)
    last = rank == size[graph] - 1  # stays whatever happens; the first node of a subgraph

    def picked(kind: str) -> Tensor:
        """Tell for every graph whether it gets this change."""
        return choice == kinds.index(kind) if kind in kinds else torch.zeros_like(choice, dtype=torch.bool)

    def first_share(kind: str) -> Tensor:
        """Tell for every node whether it is in the changed share of its graph."""
        return picked(kind)[graph] & (rank < (size * _SHARES[kind]).long()[graph])

    wanted = torch.where(picked("subgraph"), (size * _SHARES["subgraph"]).long() + 1, 0)
    outside = picked("subgraph")[graph] & ~_grow(last, source, target, graph, wanted, generator)
    keep = ~(first_share("nodes") | outside)
    kept_edge = keep[source] & keep[target]
    if "edges" in kinds:
        of_edge = graph[source]
        edges = torch.bincount(of_edge, minlength=number)
        edge_rank = _rank_in_group(of_edge, edges, generator)
        kept_edge &= ~(picked("edges")[of_edge] & (edge_rank < (edges * _SHARES["edges"]).long()[of_edge]))
    if "features" in kinds:
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype) * 0.5 + 0.5
        x = torch.where(first_share("features")[:, None], noise, x)
    source, target = source[kept_edge], target[kept_edge]
    alive = torch.zeros_like(keep)
    alive[source] = alive[target] = True
    empty = torch.bincount(graph[alive], minlength=number) == 0
    alive |= last & empty[graph]
    position = alive.cumsum(0) - 1
    return Data(x=x[alive], edge_index=torch.stack([position[source], position[target]]), batch=graph[alive])


def train_graph_encoder(
    graphs: Sequence[Any],
    *,
    temperature: float,
    mu: float | None = None,
    sigma: float | None = None,
    augmentation: str = "random2",
    epochs: int = 20,
    batch_size: int = 128,
    lr: float = 0.01,
    hidden: int = 32,
    num_layers: int = 3,
    seed: int = 0,
    device: str = "cpu",
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = True,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> GraphContrast:
    """Train a GIN encoder without labels on graphs and their augmented views with `adnce_loss`, variant "graphcl".

    As in the authors' code, the first view is the graph itself with a self loop at every node, the second one its
    augmentation without self loops; the graphs are shuffled once, the batches are the same in every epoch.

    Args:
        graphs: `torch_geometric.data.Data` objects with `x` and `edge_index` (see `load_tu_graphs`), two or more.
        temperature: Temperature of the loss, > 0.
        mu: `mu` of the loss; without `mu` and `sigma` it is InfoNCE.
        sigma: `sigma` of the loss.
        augmentation: `"random2"`, `"random3"` or `"random4"`; see `augment_graphs`.
        epochs: Passes over the graphs, >= 1, those of the checkpoint included.
        batch_size: Graphs per step, >= 2; a last batch of one graph joins the one before.
        lr: Learning rate of Adam.
        hidden: Width of the encoder.
        num_layers: Layers of the encoder.
        seed: Seed of initial values, order and augmentations.
        device: Torch device.
        checkpoint: File that is replaced after every epoch; a run with it continues exactly.
        resume: Whether to continue from `checkpoint` if it is there.
        on_epoch: Called with the record of every finished epoch.

    Returns:
        The encoder after the last epoch and the history; nothing is selected, so no label is looked at.

    Raises:
        ValueError: If an argument is out of range, or the checkpoint was written with other settings.
    """
    if len(graphs) < 2:
        raise ValueError(f"at least two graphs are needed, got {len(graphs)}")
    if batch_size < 2:
        raise ValueError(f"batch_size must be at least two, got {batch_size!r}")
    if epochs < 1:
        raise ValueError(f"epochs must be >= 1, got {epochs!r}")
    check_positive("lr", lr)
    check_choice("augmentation", augmentation, GRAPH_AUGMENTATIONS)
    loss = ADNCELoss(temperature, mu, sigma, "graphcl")
    generator = torch.Generator().manual_seed(seed)
    encoder = GINEncoder(graphs[0].x.shape[1], hidden, num_layers, generator=generator).to(device)
    batches = _batches(graphs, torch.randperm(len(graphs), generator=generator).tolist(), batch_size)
    views = [_with_self_loops(batch).to(device) for batch in batches]
    optimizer = torch.optim.Adam(encoder.parameters(), lr=lr)
    settings = {
        "temperature": temperature,
        "mu": mu,
        "sigma": sigma,
        "augmentation": augmentation,
        "batch_size": batch_size,
        "lr": lr,
        "hidden": hidden,
        "num_layers": num_layers,
        "seed": seed,
        "graphs": len(graphs),
        "nodes": sum(batch.num_nodes for batch in batches),
    }
    run = EpochRun(_CHECKPOINT, encoder, optimizer, generator, settings=settings)
    run.load_if_there(checkpoint, resume=resume)

    def train(_epoch: int) -> dict[str, float]:
        encoder.train()
        total = 0.0
        for batch, view in zip(batches, views, strict=True):
            changed = augment_graphs(batch, augmentation, generator=generator).to(device)
            optimizer.zero_grad()
            z1, z2 = (encoder.projector(encoder(v.x, v.edge_index, v.batch, batch.num_graphs)) for v in (view, changed))
            value = loss(z1, z2)
            value.backward()
            optimizer.step()
            total += float(value.detach()) * batch.num_graphs
        return {"loss": total / len(graphs)}

    result = run.run(epochs, train, checkpoint=checkpoint, on_epoch=on_epoch)
    return GraphContrast(encoder.eval(), result)


@torch.no_grad()
def embed_graphs(encoder: GINEncoder, graphs: Sequence[Any], *, batch_size: int = 512) -> Tensor:
    """Return the embeddings of graphs before the projection head, with self loops as in training.

    Args:
        encoder: A trained encoder, in evaluation mode.
        graphs: `torch_geometric.data.Data` objects.
        batch_size: Graphs per pass.

    Returns:
        Tensor `(len(graphs), num_layers * hidden)` on the CPU.
    """
    device = next(encoder.parameters()).device
    parts = []
    for batch in _batches(graphs, list(range(len(graphs))), batch_size):
        view = _with_self_loops(batch).to(device)
        parts.append(encoder(view.x, view.edge_index, view.batch, batch.num_graphs).cpu())
    return torch.cat(parts)


def evaluate_svm(embeddings: Tensor, labels: Tensor, *, folds: int = 10, seed: int = 0) -> SVMAccuracy:
    """Return the cross-validated accuracy of an RBF support vector machine on embeddings.

    In every fold C is chosen from 0.001, 0.01, ..., 1000 by a cross-validation with 5 folds inside the training part.

    Args:
        embeddings: Shape `(n, d)`.
        labels: Classes, shape `(n,)`, integer.
        folds: Folds, >= 2; stratified and shuffled.
        seed: Seed of the folds.

    Returns:
        Mean and accuracies of the folds.

    Raises:
        ValueError: If the shapes don't fit, there is one class only, or a class is too small for the folds.

    Examples:
        >>> import torch
        >>> x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
        >>> evaluate_svm(x, (x[:, 0] > 0).long(), folds=5).mean > 0.85
        True
    """
    from sklearn.model_selection import (  # type: ignore[import-untyped]
        GridSearchCV,
        StratifiedKFold,
        cross_val_score,
    )
    from sklearn.svm import SVC  # type: ignore[import-untyped]

    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        shapes = f"{tuple(embeddings.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"expected embeddings (n, d) and labels (n,), got {shapes}")
    if folds < 2:
        raise ValueError(f"folds must be >= 2, got {folds!r}")
    sizes = torch.unique(labels, return_counts=True)[1].tolist()
    if len(sizes) < 2 or min(sizes) < max(folds, 7):
        needed = f"at least two classes of at least {max(folds, 7)} rows are needed for {folds} folds"
        raise ValueError(f"{needed}, got classes of {sizes}")
    outer = StratifiedKFold(folds, shuffle=True, random_state=seed)
    search = GridSearchCV(SVC(), {"C": list(_C_GRID)}, cv=5)
    scores = cross_val_score(search, embeddings.numpy(), labels.numpy(), cv=outer)
    return SVMAccuracy(float(scores.mean()), tuple(float(score) for score in scores))


def _batches(graphs: Sequence[Any], order: list[int], batch_size: int) -> list[Any]:
    """Collate the graphs in this order; a last batch of one graph would have no negatives."""
    from torch_geometric.data import Batch, Data

    starts = list(range(0, len(order), batch_size))
    if len(order) - starts[-1] == 1 and len(starts) > 1:
        starts.pop()
    plain = [Data(x=graphs[i].x, edge_index=graphs[i].edge_index) for i in order]  # other attributes may differ
    ends = [*starts[1:], len(order)]
    return [Batch.from_data_list(plain[start:end]) for start, end in zip(starts, ends, strict=True)]


def _with_self_loops(batch: Any) -> Any:
    from torch_geometric.data import Data
    from torch_geometric.utils import add_self_loops  # type: ignore[import-untyped]

    edge_index = add_self_loops(batch.edge_index, num_nodes=batch.num_nodes)[0]
    return Data(x=batch.x, edge_index=edge_index, batch=batch.batch)


def _rank_in_group(group: Tensor, size: Tensor, generator: torch.Generator | None) -> Tensor:
    """Number the members of every group in a random order, from 0; groups (n,) are numbered and have these sizes (G,)."""
    shuffled = torch.randperm(len(group), generator=generator)
    order = shuffled[group[shuffled].argsort(stable=True)]
    start = size.cumsum(0) - size
    rank = torch.empty_like(group)
    rank[order] = torch.arange(len(group)) - start[group[order]]
    return rank


def _grow(
    seeds: Tensor, source: Tensor, target: Tensor, graph: Tensor, wanted: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Grow a set of nodes (n,) in every graph from its seed, one random neighbour of the set per round."""
    inside = seeds.clone()
    number = len(wanted)
    for _ in range(int(wanted.max()) - 1):
        reached = torch.zeros_like(inside)
        reached[target[inside[source]]] = True
        growing = torch.bincount(graph[inside], minlength=number) < wanted
        frontier = reached & ~inside & growing[graph]
        if not bool(frontier.any()):
            break
        key = torch.rand(len(graph), generator=generator, dtype=torch.float64).masked_fill(~frontier, -1.0)
        best = torch.full((number,), -2.0, dtype=torch.float64).scatter_reduce(0, graph, key, "amax")
        inside |= frontier & (key == best[graph])
    return inside
