"""Graphs joined to long arrays: how the generated data is put together, kept on disk and shown to PyG."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch_geometric.data import Data, InMemoryDataset  # type: ignore[import-untyped]

from graph_ood._storage import read_tensors, write_tensors

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor

    from graph_ood.data._shapes import Ints, Template

KIND = "graphs"
VERSION = 1

_NODE_FIELDS = ("x", "node_gt")
_EDGE_FIELDS = ("edge_index", "edge_gt")
_NODE_SLICE, _EDGE_SLICE = "slice.node", "slice.edge"


class Sample(NamedTuple):
    """One generated graph: the motif has the nodes from `num_base` on; `edge_index` holds both directions, sorted."""

    num_nodes: int
    num_base: int
    edge_index: Ints
    labels: dict[str, int]


@dataclass(frozen=True)
class Table:
    """All graphs of a data set in one tensor per field, and where each graph begins."""

    tensors: dict[str, Tensor]
    node_slice: Tensor
    edge_slice: Tensor

    def __len__(self) -> int:
        return len(self.node_slice) - 1

    def slices(self) -> dict[str, Tensor]:
        """Return the slices of every field as `InMemoryDataset` wants them."""
        each = torch.arange(len(self) + 1)
        kinds = {**dict.fromkeys(_NODE_FIELDS, self.node_slice), **dict.fromkeys(_EDGE_FIELDS, self.edge_slice)}
        return {name: kinds.get(name, each) for name in self.tensors}


def finish_sample(
    template: Template,
    attach_to: int,
    rng: np.random.Generator,
    tries: Callable[[int], int],
    labels: dict[str, int],
    *,
    roles: bool,
) -> Sample:
    """Join base and motif, add the noise edges, and write every edge in both directions.

    Args:
        template: Base and motif.
        attach_to: Node of the base that the motif is joined to.
        rng: Source of the noise.
        tries: Gives the number of noise edges to draw for a number of edges.
        labels: What is known about the graph.
        roles: Whether a drawn edge is dropped unless one of its ends has role 0.
    """
    n = template.num_nodes
    low, high = template.joined(attach_to)
    role = template.role if roles else None
    extra = _new_edges(rng, n, low * n + high, high * n + low, tries(len(low)), role)
    if extra:
        noise = np.asarray(extra, dtype=np.int64)
        low, high = np.concatenate([low, noise[:, 0]]), np.concatenate([high, noise[:, 1]])
    keys = np.concatenate([low * n + high, high * n + low])
    keys.sort()
    return Sample(n, template.num_base, np.stack(np.divmod(keys, n)), labels)


def _new_edges(
    rng: np.random.Generator, n: int, forward: Ints, backward: Ints, tries: int, role: tuple[int, ...] | None
) -> list[tuple[int, int]]:
    """Draw `tries` pairs that are not joined yet; keep those with an end of role 0, or all without roles."""
    if not tries:
        return []
    taken = {*forward.tolist(), *backward.tolist()}
    kept: list[tuple[int, int]] = []
    while tries:
        for u, v in rng.integers(n, size=(tries, 2)).tolist():
            if u == v or u * n + v in taken:
                continue
            tries -= 1
            if role is not None and role[u] and role[v]:
                continue
            kept.append((u, v))
            taken.update((u * n + v, v * n + u))
    return kept


def build_table(samples: Iterable[Sample], features: Callable[[Tensor], Tensor]) -> Table:
    """Put the graphs one behind the other.

    Args:
        samples: The graphs, at least one.
        features: Node features from the degree of every node.
    """
    graphs = list(samples)
    nodes = np.array([g.num_nodes for g in graphs])
    edges = np.array([g.edge_index.shape[1] for g in graphs])
    node_slice, edge_slice = _starts(nodes), _starts(edges)
    edge_index = np.concatenate([g.edge_index for g in graphs], axis=1)
    everywhere = edge_index + np.repeat(node_slice[:-1], edges)
    first_motif_node = node_slice[:-1] + np.array([g.num_base for g in graphs])
    node_gt = np.arange(node_slice[-1]) >= np.repeat(first_motif_node, nodes)
    degree = np.bincount(everywhere[0], minlength=len(node_gt))
    tensors = {
        "x": features(torch.from_numpy(degree)),
        "edge_index": torch.from_numpy(edge_index),
        "node_gt": torch.from_numpy(node_gt),
        "edge_gt": torch.from_numpy(node_gt[everywhere[0]] & node_gt[everywhere[1]]),
    }
    labels = {name: torch.tensor([g.labels[name] for g in graphs]) for name in graphs[0].labels}
    return Table(tensors | labels, torch.from_numpy(node_slice), torch.from_numpy(edge_slice))


def _starts(sizes: Ints) -> Ints:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes, dtype=np.int64)])


def write_table(path: Path, table: Table, about: Mapping[str, Any]) -> None:
    """Write the graphs to a safetensors file."""
    tensors = {**table.tensors, _NODE_SLICE: table.node_slice, _EDGE_SLICE: table.edge_slice}
    write_tensors(path, tensors, {"kind": KIND, "version": VERSION, "about": dict(about)})


def read_table(path: Path, about: Mapping[str, Any]) -> Table:
    """Read graphs that were written with the same `about`.

    Raises:
        ValueError: If the file is damaged or holds something else.
    """
    tensors, metadata = read_tensors(path, KIND)
    found = (metadata.get("version"), metadata.get("about"))
    if found != (VERSION, dict(about)):
        raise ValueError(
            f"{path} holds graphs of another kind ({found[1]}, version {found[0]}); delete it and try again"
        )
    return Table(tensors, tensors.pop(_NODE_SLICE), tensors.pop(_EDGE_SLICE))


class TableDataset(InMemoryDataset):  # type: ignore[misc]
    """Graphs of a table as a PyG data set; read from `root` where they lie there, else made and written there."""

    def __init__(
        self,
        root: str | os.PathLike[str] | None,
        make: Callable[[], Table],
        about: dict[str, Any],
        num_classes: int | None,
        transform: Callable[[Data], Data] | None,
    ) -> None:
        self.about = about
        root = None if root is None else str(Path(root).expanduser())
        # Without a `process` method PyG writes nothing itself: its own files are pickles.
        super().__init__(root, transform)
        if root is None:
            table = make()
        else:
            path = Path(root) / (file_name(about) + ".safetensors")
            if not path.is_file():
                write_table(path, make(), about)
            table = read_table(path, about)
        self._data = Data(**table.tensors)
        self.slices = table.slices()
        self._num_classes = int(table.tensors["y"].max()) + 1 if num_classes is None else num_classes

    @property
    def num_classes(self) -> int:
        """Number of classes of the task, also where a split lacks one."""
        return self._num_classes


def file_name(about: Mapping[str, Any]) -> str:
    """Return a name that tells these data from others of the same kind."""
    words = [str(about["name"]), *(f"{key}={value}" for key, value in about.items() if key != "name")]
    return "-".join(words)
