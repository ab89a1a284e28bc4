"""Data sets of the TU collection with the features of CAL, and a split by graph size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch_geometric.io import read_tu_data  # type: ignore[import-untyped]
from torch_geometric.utils import degree  # type: ignore[import-untyped]

from graph_ood._checks import check_choice, check_count, check_edges
from graph_ood.data._syn_b import degree_one_hot
from graph_ood.data._tables import Table, TableDataset

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from torch_geometric.data import Data, Dataset  # type: ignore[import-untyped]

FEATURES = ("cal", "raw")
SIZE_MODES = ("sl", "ls")

_BELOW = ("", "tu", "graph/tu")


def cal_features(x: Tensor | None, edge_index: Tensor, num_nodes: int, *, max_degree: int = 100) -> Tensor:
    r"""Node features as CAL builds them: what is known about a node, its degree, and the degree one-hot.

    $$[\,x_i\;\Vert\;d_i\;\Vert\;\text{one-hot}(\min(d_i,D))\,]$$

    with a one for $x_i$ where nothing is known.

    Args:
        x: Node labels and attributes, shape `(n, F)`, floating; None for none.
        edge_index: Edges, shape `(2, m)`; $d_i$ counts those that start at node i.
        num_nodes: n.
        max_degree: $D\ge1$; larger degrees share the last place.

    Returns:
        The features, float32, shape `(n, F + D + 2)`, with F = 1 without `x`.

    Raises:
        ValueError: If shapes don't fit or `max_degree` is below 1.

    Reference: Sui et al., 2022; as in the authors' code.

    Examples:
        >>> import torch
        >>> cal_features(None, torch.tensor([[0, 0, 1], [1, 2, 0]]), 3, max_degree=2)
        tensor([[1., 2., 0., 0., 1.],
                [1., 1., 0., 1., 0.],
                [1., 0., 1., 0., 0.]])
    """
    check_count("num_nodes", num_nodes)
    check_count("max_degree", max_degree)
    check_edges(edge_index)
    if x is not None and (x.ndim != 2 or len(x) != num_nodes):
        raise ValueError(f"x must have shape [{num_nodes}, F], got {tuple(x.shape)}")
    known = torch.ones(num_nodes, 1) if x is None else x.float()
    count = degree(edge_index[0], num_nodes, dtype=torch.long)
    return torch.cat([known, count[:, None].float(), degree_one_hot(count, max_degree + 1)], dim=1)


class TUGraphs(TableDataset):
    """A data set of the TU collection, as `load_tu` reads it."""

    def __repr__(self) -> str:
        return f"{self.about['name']}({len(self)})"


def load_tu(
    name: str,
    root: str | os.PathLike[str],
    *,
    features: Literal["cal", "raw"] = "cal",
    cache: str | os.PathLike[str] | None = None,
    transform: Callable[[Data], Data] | None = None,
) -> TUGraphs:
    r"""Graphs of the TU collection from files on disk; nothing is downloaded, and nothing is written into `root`.

    The text files are parsed by PyG, as its `TUDataset` does with `use_node_attr=True`. Self-loops and repeated edges
    are dropped, so are edge labels and attributes. Classes are numbered from 0.

    Args:
        name: Name of the data set, such as `"MUTAG"`.
        root: Folder with `<name>/raw/<name>_A.txt` and the others, or one above it that has them in `tu/` or
            `graph/tu/`.
        features: `"cal"`, see `cal_features` (degrees are cut at 100, for REDDIT and DD at 10), or `"raw"`, the
            attributes and one-hot labels of the files; ones where they bring none.
        cache: Folder to keep the parsed graphs in, as a safetensors file; None parses the text every time.
        transform: Applied to every graph on access.

    Returns:
        The graphs, with `x`, `edge_index` and `y`.

    Raises:
        FileNotFoundError: If the files are not there.
        ValueError: If `features` is unknown, the files can't be read, or the cached file is damaged.

    Reference: C. Morris et al., *TUDataset: A collection of benchmark datasets for learning with graphs*, 2020,
    arXiv:2007.08663.

    Examples:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     raw = Path(folder) / "TOY" / "raw"
        ...     raw.mkdir(parents=True)
        ...     for field, text in {"A": "1, 2\n2, 1\n3, 4\n4, 3\n", "graph_indicator": "1\n1\n2\n2\n"}.items():
        ...         _ = (raw / f"TOY_{field}.txt").write_text(text)
        ...     _ = (raw / "TOY_graph_labels.txt").write_text("-1\n1\n")
        ...     graphs = load_tu("TOY", folder)
        >>> graphs, graphs.num_features, graphs.y.tolist()
        (TOY(2), 103, [0, 1])
    """
    check_choice("features", features, FEATURES)
    if not name or Path(name).name != name:
        raise ValueError(f"name must be the name of a TU data set, got {name!r}")
    folder = _tu_folder(name, Path(root).expanduser())
    # The size tells a cached file of other text apart.
    size = sum(file.stat().st_size for file in folder.glob(f"{name}_*.txt"))
    about: dict[str, Any] = {"name": name, "features": features, "bytes": size}
    return TUGraphs(cache, lambda: _read_tu(name, folder, features), about, None, transform)


def _tu_folder(name: str, root: Path) -> Path:
    for below in _BELOW:
        folder = root / below / name / "raw"
        if (folder / f"{name}_A.txt").is_file():
            missing = [
                file.name
                for field in ("graph_indicator", "graph_labels")
                if not (file := folder / f"{name}_{field}.txt").is_file()
            ]
            if missing:
                raise FileNotFoundError(f"{folder} has no {' and no '.join(missing)}")
            return folder
    places = ", ".join(str(root / below / name / "raw") for below in _BELOW)
    raise FileNotFoundError(f"no file {name}_A.txt in any of {places}")


def _read_tu(name: str, folder: Path, features: str) -> Table:
    num_nodes = len((folder / f"{name}_graph_indicator.txt").read_text().split())
    try:
        data, slices, _sizes = read_tu_data(str(folder), name)
    except (ValueError, IndexError, RuntimeError) as error:
        raise ValueError(f"can't read the files of {name} in {folder}: {error}") from error
    node_slice = slices["x"] if data.x is not None else _starts(data._num_nodes)
    # PyG leaves out the graphs without edges at the end.
    edge_slice = torch.nn.functional.pad(slices["edge_index"], (0, len(node_slice) - len(slices["edge_index"])))
    edge_slice = edge_slice.cummax(0).values
    described = num_nodes if data.x is None else len(data.x)
    if not int(node_slice[-1]) == described == num_nodes or len(data.y) != len(node_slice) - 1:
        raise ValueError(
            f"the files of {name} in {folder} don't fit: {num_nodes} nodes in {len(node_slice) - 1} graphs, "
            f"labels or attributes of {described} nodes, {len(data.y)} graph labels"
        )
    if features == "cal":
        everywhere = data.edge_index + torch.repeat_interleave(node_slice[:-1], edge_slice.diff())
        x = cal_features(data.x, everywhere, num_nodes, max_degree=10 if name.startswith(("REDDIT", "DD")) else 100)
    else:
        x = torch.ones(num_nodes, 1) if data.x is None else data.x
    return Table({"x": x, "edge_index": data.edge_index.contiguous(), "y": data.y}, node_slice, edge_slice)


def _starts(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0)


def size_split(
    dataset: Dataset, *, held_out: float = 0.2, mode: Literal["sl", "ls"] = "sl", seed: int = 0
) -> dict[str, Dataset]:
    """Split by the number of nodes: train on small graphs, validate and test on large ones, or the other way round.

    Graphs are sorted by size, equal ones by their place in the data set. The extreme ones are shuffled; half of them
    validates, half tests. Validation is thus out of distribution, like the test; for selection in distribution hold
    out a part of the training graphs.

    Args:
        dataset: PyG data set.
        held_out: Share of the graphs for validation and test together, in (0, 1).
        mode: `"sl"` trains on the small graphs, `"ls"` on the large ones.
        seed: Seed of the shuffle, at least 0.

    Returns:
        Train, val and test, as subsets of the data set.

    Raises:
        ValueError: If `mode` is unknown, `held_out` outside (0, 1), or a split would be empty.

    Reference: W. Mao, J. Wu, H. Liu, Y. Sui, X. Wang, *Invariant Graph Learning Meets Information Bottleneck for
    Out-of-Distribution Generalization*, 2026, arXiv:2408.01697, whose code cuts ogbg-molbbbp this way.

    Examples:
        >>> from graph_ood.data import GoodMotif
        >>> splits = size_split(GoodMotif(domain="size", num_data=300))
        >>> {name: len(split) for name, split in splits.items()}
        {'train': 144, 'val': 18, 'test': 18}
        >>> max(g.num_nodes for g in splits["train"]) <= min(g.num_nodes for g in splits["test"])
        True
    """
    check_choice("mode", mode, SIZE_MODES)
    check_count("seed", seed, 0)
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be in (0, 1), got {held_out!r}")
    order = torch.tensor([data.num_nodes for data in dataset]).argsort(stable=True, descending=mode == "ls")
    number = round(held_out * len(order))
    if number < 2 or number >= len(order):
        raise ValueError(f"held_out={held_out} of {len(order)} graphs leaves an empty split")
    extreme = order[len(order) - number :]
    extreme = extreme[torch.randperm(number, generator=torch.Generator().manual_seed(seed))]
    parts = {"train": order[:-number].sort().values, "val": extreme[: number // 2], "test": extreme[number // 2 :]}
    return {split: dataset[index] for split, index in parts.items()}
