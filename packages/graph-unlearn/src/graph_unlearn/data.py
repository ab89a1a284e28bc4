r"""Graphs: the citation graphs of the paper through PyG, a generated one, and batches of exact or sampled neighbourhoods.

`load_graph` reads Planetoid and CitationFull raw files with PyG's own classes, `synthetic_graph` draws a stochastic block
model, `Neighborhoods` cuts out what a network of $k$ layers sees around some nodes, so that a graph that doesn't fit in
memory as a whole can be worked through in parts.

Documentation: `docs/papers/graph-unlearn/gif.md`.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch_geometric.data import Data  # type: ignore[import-untyped]
from torch_geometric.utils import coalesce, remove_self_loops, to_undirected  # type: ignore[import-untyped]

from graph_unlearn._checks import check_choice, check_count, check_edge_index, check_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["DATASETS", "Neighborhoods", "load_graph", "synthetic_graph", "training_graph"]

DATASETS = {
    "cora": ("planetoid", "Cora", "Cora"),
    "citeseer": ("planetoid", "CiteSeer", "CiteSeer"),
    "cora_ml": ("citation_full", "cora_ml", "Cora_ML"),
}
"""Name to folder of the collection, folder of the data set, and PyG's name."""


def load_graph(
    name: str, root: str | Path, *, cache: str | Path | None = None, seed: int = 100, test_size: float = 0.1
) -> Data:
    r"""Load a citation graph as the paper prepares it.

    Rows of the features sum to 1; edges are undirected, without self loops and duplicates. The split is that of the
    authors' program: `train_test_split(arange(N), test_size=0.1, random_state=100)`.

    Args:
        name: `"cora"`, `"citeseer"` or `"cora_ml"`.
        root: Folder with the raw files: `<root>/planetoid/Cora/raw` and the like, also below `<root>/graph` or
            `<root>/data/graph`. Nothing is written there, and nothing is downloaded.
        cache: Folder where PyG may keep what it has prepared; None prepares anew each time (about a second).
        seed: Of the split.
        test_size: Part of the nodes for testing, in (0, 1).

    Returns:
        `x` float32 `(N, F)`, `edge_index` int64 `(2, E)`, `y` int64 `(N,)`, bool masks `train_mask` and `test_mask`,
        and `num_classes`.

    Raises:
        ValueError: If `name` is unknown or `test_size` is out of range.
        FileNotFoundError: If the raw files aren't below `root`.

    Examples:
        >>> load_graph("cora", "/nowhere")
        Traceback (most recent call last):
        ...
        FileNotFoundError: no raw files of 'cora' below /nowhere: expected /nowhere/planetoid/Cora/raw
    """
    check_choice("graph", name, DATASETS)
    check_number("test_size", test_size, low=0, high=1, open_low=True)
    source = _raw_folder(name, Path(root))
    if cache is None:
        with tempfile.TemporaryDirectory() as folder:
            data = _read(name, source, Path(folder))
    else:
        data = _read(name, source, _prepared(name, source, Path(cache)))
    x = data.x / data.x.sum(1, keepdim=True).clamp(min=1.0)
    edge_index = to_undirected(coalesce(remove_self_loops(data.edge_index)[0]), num_nodes=len(x))
    y = data.y.long()
    return Data(
        x=x, edge_index=edge_index, y=y, num_classes=int(y.max()) + 1, **_split(len(x), seed=seed, test_size=test_size)
    )


def training_graph(data: Data) -> Data:
    """The graph that a model is trained on: edges between training nodes only. Ids don't change.

    Args:
        data: A graph with `edge_index` and `train_mask`.

    Returns:
        A copy with fewer edges, which shares the other tensors.

    Raises:
        ValueError: If there is no `train_mask`.

    Examples:
        >>> import torch
        >>> from torch_geometric.data import Data  # type: ignore[import-untyped]
        >>> edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
        >>> training_graph(Data(edge_index=edges, train_mask=torch.tensor([True, True, False]))).edge_index
        tensor([[0, 1],
                [1, 0]])
    """
    if getattr(data, "train_mask", None) is None:
        raise ValueError("data has no train_mask")
    out = data.__copy__()
    out.edge_index = data.edge_index[:, data.train_mask[data.edge_index].all(0)]
    return out


def synthetic_graph(
    num_nodes: int = 300,
    num_features: int = 32,
    num_classes: int = 3,
    *,
    num_edges: int | None = None,
    homophily: float = 0.8,
    signal: float = 1.0,
    locality: int | None = None,
    test_size: float = 0.1,
    seed: int = 0,
) -> Data:
    r"""Draw a graph with classes for tests and quick comparisons; needs O(N F + E) time and memory.

    An edge joins two nodes of one class with probability `homophily`, otherwise any two. Features are a normal vector per
    class times `signal` plus a standard normal one, divided by $\sqrt F$.

    Args:
        num_nodes: N >= 2.
        num_features: F.
        num_classes: C.
        num_edges: Undirected edges drawn; loops and duplicates among them are dropped. None means 2 N.
        homophily: In [0, 1].
        signal: Distance of the classes, >= 0.
        locality: Draw the second end of an edge at most so many ids away (and any class): neighbourhoods then stay
            small, as in road or citation graphs sorted by place. None means anywhere.
        test_size: Part of the nodes for testing, in (0, 1).
        seed: Of everything.

    Returns:
        As `load_graph`.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> synthetic_graph(50, 8, 2).x.shape
        torch.Size([50, 8])
    """
    check_count("num_nodes", num_nodes, low=2)
    check_count("num_features", num_features, low=1)
    check_count("num_classes", num_classes, low=1)
    check_number("homophily", homophily, low=0, high=1)
    check_number("signal", signal, low=0)
    check_number("test_size", test_size, low=0, high=1, open_low=True)
    count = 2 * num_nodes if num_edges is None else num_edges
    check_count("num_edges", count, low=0)
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, size: int) -> Tensor:
        return torch.randint(high, (size,), generator=generator)

    y = integers(num_classes, num_nodes)
    source, target = integers(num_nodes, count), integers(num_nodes, count)
    if locality is not None:
        check_count("locality", locality, low=1)
        target = (source + 1 + integers(locality, count)) % num_nodes
    else:
        order, starts = y.argsort(stable=True), torch.zeros(num_classes + 1, dtype=torch.long)
        starts[1:] = torch.bincount(y, minlength=num_classes).cumsum(0)
        size = starts.diff()[y[source]]
        alike = order[starts[y[source]] + (torch.rand(count, generator=generator) * size).long().clamp_max(size - 1)]
        target = torch.where(torch.rand(count, generator=generator) < homophily, alike, target)
    edge_index = to_undirected(remove_self_loops(torch.stack([source, target]))[0], num_nodes=num_nodes)
    centres = signal * torch.randn(num_classes, num_features, generator=generator)
    x = torch.randn(num_nodes, num_features, generator=generator).add_(centres[y]).div_(num_features**0.5)
    return Data(
        x=x, edge_index=edge_index, y=y, num_classes=num_classes, **_split(num_nodes, seed=seed, test_size=test_size)
    )


class Neighborhoods:
    r"""What a network of $k$ layers sees around some nodes, as graphs of their own.

    Takes every edge into a node at most $k$ steps away. Outputs of the first `batch_size` nodes are then those on the whole
    graph, normalisation by degree included, for every network of at most $k$ layers that passes messages from source to
    target; what mixes all nodes (such as a graph norm) is not exact. With `fanout` at most so many edges into each
    node are taken, at random: bounded in every graph, and an estimate.

    Args:
        data: The graph, with `x`, `edge_index` and `y`; `x` dense.
        num_layers: $k\ge1$.
        fanout: Edges kept per node and step; None keeps all.
        seed: Of the sampling; the same nodes always get the same neighbourhood.

    Raises:
        ValueError: If a number or an edge is out of range, or `x` is sparse.

    Examples:
        >>> import torch
        >>> from torch_geometric.data import Data  # type: ignore[import-untyped]
        >>> path = Data(x=torch.eye(4), edge_index=torch.tensor([[0, 1, 2], [1, 2, 3]]), y=torch.arange(4))
        >>> batch = Neighborhoods(path, num_layers=1).batch(torch.tensor([3]))
        >>> batch.n_id, batch.batch_size
        (tensor([3, 2, 1]), 1)
    """

    def __init__(self, data: Data, num_layers: int, *, fanout: int | None = None, seed: int = 0) -> None:
        check_count("num_layers", num_layers, low=1)
        if fanout is not None:
            check_count("fanout", fanout, low=1)
        if data.x.layout != torch.strided:
            raise ValueError("batches of neighbourhoods need dense features: pass data.x.to_dense()")
        self.data, self.num_layers, self.fanout, self.seed = data, num_layers, fanout, seed
        num_nodes = data.x.shape[0]
        check_edge_index(data.edge_index, num_nodes)
        source, target = data.edge_index
        self.source = source[target.argsort(stable=True)]
        self.starts = torch.zeros(num_nodes + 1, dtype=torch.long, device=source.device)
        self.starts[1:] = torch.bincount(target, minlength=num_nodes).cumsum(0)
        self.place = torch.full((num_nodes,), -1, dtype=torch.long, device=source.device)

    def batch(self, nodes: Tensor) -> Data:
        """Cut out the neighbourhood of some nodes.

        Args:
            nodes: Distinct node ids, shape `(n,)`, integer.

        Returns:
            Data with `x`, `edge_index`, `y`, `n_id` (the ids in the whole graph, `nodes` first) and `batch_size` = n, as
            PyG's NeighborLoader yields it.
        """
        nodes = nodes.to(self.place.device)
        generator = torch.Generator().manual_seed(self.seed)
        self.place[nodes] = torch.arange(len(nodes), device=nodes.device)
        n_id, frontier = [nodes], nodes
        count, sources, targets = len(nodes), [], []
        # One step more than there are layers: degrees of the nodes k steps away come into the normalisation.
        for _ in range(self.num_layers + 1):
            into, entry = self._incoming(frontier, generator)
            source = self.source[entry]
            fresh = source[self.place[source] < 0].unique()
            self.place[fresh] = torch.arange(count, count + len(fresh), device=nodes.device)
            sources.append(self.place[source])
            targets.append(self.place[frontier[into]])
            n_id.append(fresh)
            count, frontier = count + len(fresh), fresh
        ids = torch.cat(n_id)
        self.place[ids] = -1
        return Data(
            x=self.data.x[ids],
            edge_index=torch.stack([torch.cat(sources), torch.cat(targets)]),
            y=self.data.y[ids],
            n_id=ids,
            batch_size=len(nodes),
        )

    def _incoming(self, nodes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return for every edge into `nodes` the position of its target there, and its own place in the list."""
        degree = self.starts[nodes + 1] - self.starts[nodes]
        kept = degree if self.fanout is None else degree.clamp_max(self.fanout)
        into = torch.repeat_interleave(torch.arange(len(nodes), device=nodes.device), kept)
        rank = torch.arange(len(into), device=nodes.device) - (kept.cumsum(0) - kept)[into]
        if self.fanout is not None:
            # Every degree / kept-th edge from a random first one: distinct, and each edge equally likely.
            shift = torch.rand(len(nodes), generator=generator).to(nodes.device)
            step = degree.double() / kept.clamp_min(1)
            rank = ((rank + shift.double()[into]) * step[into]).long().clamp_max(degree[into] - 1)
        return into, self.starts[nodes][into] + rank


def _split(num_nodes: int, *, seed: int, test_size: float) -> dict[str, Tensor]:
    import numpy as np
    from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]

    if test_size >= 1:
        raise ValueError(f"test_size must be < 1, got {test_size!r}")
    train, test = train_test_split(np.arange(num_nodes), test_size=test_size, random_state=seed)
    masks = {"train_mask": train, "test_mask": test}
    out = {}
    for key, ids in masks.items():
        out[key] = torch.zeros(num_nodes, dtype=torch.bool)
        out[key][torch.from_numpy(ids)] = True
    return out


def _raw_folder(name: str, root: Path) -> Path:
    collection, folder, _ = DATASETS[name]
    places: Sequence[Path] = (root, root / "graph", root / "data" / "graph", root / "shared" / "data" / "graph")
    for place in places:
        if (place / collection / folder / "raw").is_dir():
            return place / collection / folder / "raw"
    raise FileNotFoundError(f"no raw files of {name!r} below {root}: expected {root / collection / folder / 'raw'}")


def _prepared(name: str, source: Path, cache: Path) -> Path:
    """Return a folder where PyG has finished its work; filled elsewhere and renamed, so that it is whole or absent."""
    final = cache / DATASETS[name][0]
    if (final / DATASETS[name][1] / "processed").is_dir():
        return final
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        _read(name, source, Path(folder))
        final.mkdir(exist_ok=True)
        # Another process may have been first: its result is as good.
        with contextlib.suppress(OSError):
            (Path(folder) / DATASETS[name][1]).rename(final / DATASETS[name][1])
    return final


def _read(name: str, source: Path, folder: Path) -> Any:
    from torch_geometric.datasets import CitationFull, Planetoid  # type: ignore[import-untyped]

    _, inner, title = DATASETS[name]
    raw = folder / inner / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if not (raw / file.name).exists():
            (raw / file.name).symlink_to(file.resolve())
    dataset = CitationFull if name == "cora_ml" else Planetoid
    with Path(os.devnull).open("w") as silence, contextlib.redirect_stderr(silence):  # PyG announces its work
        return dataset(root=str(folder), name=title)[0]
