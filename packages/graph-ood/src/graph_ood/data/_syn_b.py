"""SYN-b, the generated benchmark of CAL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from graph_ood._checks import check_choice, check_count, check_fraction
from graph_ood.data._shapes import CAL_BASES, CAL_MOTIFS, Template, cal_template, cal_tree_template
from graph_ood.data._tables import Sample, Table, TableDataset, build_table, finish_sample

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from torch import Tensor
    from torch_geometric.data import Data  # type: ignore[import-untyped]

SynSplit = Literal["train", "val", "test"]

SYN_SPLITS = ("train", "val", "test")
_SPLIT_IDS = {split: number for number, split in enumerate(SYN_SPLITS)}
# Behind the ids of the splits: the generator that shuffles a split is none of those that make its graphs.
_SHUFFLE = 1000

TREE_HEIGHT, TREE_BRANCHING = 2, 15
BA_NODES = 225

Counts = dict[str, dict[str, dict[str, int]]]


def syn_b_counts(bias: float, total: int = 8000, split: tuple[float, float, float] = (7, 1, 2)) -> Counts:
    r"""Number of graphs of SYN-b per split, class and base.

    In training and validation a share $b$ of the houses and a share $1-b$ of the three other classes has a tree for a
    base, the rest a Barabási-Albert graph; in the test half of every class has. Shares are cut to whole
    numbers, in floating point as in the authors' code: at $b=0.9$ there are 1,260 + 139 training graphs per class, not 1,400.

    Args:
        bias: $b$ in [0, 1].
        total: Graphs in all splits together, at least 40.
        split: Parts of training, validation and test, at least 0.

    Returns:
        `{split: {class: {"tree": count, "ba": count}}}`.

    Raises:
        ValueError: If `bias` is outside [0, 1], `total` below 40, or `split` isn't three parts with a positive sum.

    Reference: Sui et al., 2022, section 4.1; cuts as in the authors' code.

    Examples:
        >>> syn_b_counts(0.9)["train"]["house"], syn_b_counts(0.9)["train"]["grid"]
        ({'tree': 1260, 'ba': 139}, {'tree': 139, 'ba': 1260})
    """
    check_fraction("bias", bias)
    check_count("total", total, 40)
    parts = tuple(split)
    if len(parts) != 3 or not all(part >= 0 for part in parts) or not 0 < sum(parts) < float("inf"):
        raise ValueError(f"split must be three parts >= 0 with a positive sum, got {split!r}")
    per_class = [total * (part / sum(parts)) / len(CAL_MOTIFS) for part in parts]
    counts: Counts = {}
    for name, number in zip(SYN_SPLITS, per_class, strict=True):
        counts[name] = {}
        for motif in CAL_MOTIFS:
            tree = 0.5 if name == "test" else bias if motif == "house" else 1 - bias
            counts[name][motif] = {"tree": int(number * tree), "ba": int(number * (1 - tree))}
    return counts


class SynB(TableDataset):
    r"""SYN-b, one split of it: four motifs on two bases, with a bias $b$ between class and base.

    A graph is a tree (241 nodes, every inner node with 15 children) or a Barabási-Albert graph (225 nodes, two edges per
    new node), one of the motifs house 0, cycle 1, grid 2 and diamond 3, the edge between them, and noise edges
    anywhere. See `syn_b_counts` for the bias; $b=0.5$ is none. The test split is balanced for every $b$.

    Fields of a graph: `x`, the degree one-hot, `[n, max_degree]`; `edge_index`, `y`, `node_gt` and `edge_gt` as in
    `GoodMotif`; `base_id` and `env_id` (tree 0, ba 1) and `motif_id`, int64 `[1]`.

    Args:
        root: Folder to keep the graphs in, as one safetensors file per split; None keeps them in memory only.
        bias: $b$ in [0, 1].
        split: `"train"`, `"val"` or `"test"`, with 70, 10 and 20 % of the graphs.
        total: Graphs in all splits together; a little less remains where shares are cut.
        max_degree: Number of features D, at least 1; degrees from D-1 on share the last one.
        noise: Number of noise edges as a share of the edges, in [0, 1].
        seed: Seed, at least 0.
        transform: Applied to every graph on access.

    Raises:
        ValueError: If a name is unknown, a number out of range, the split is empty, or a file in `root` is damaged.

    Reference: Y. Sui, X. Wang, J. Wu, M. Lin, X. He, T.-S. Chua, *Causal Attention for Interpretable and Generalizable
    Graph Classification*, KDD 2022, arXiv:2112.15089, section 4.1; sizes as in the authors' code.

    Examples:
        >>> train = SynB(bias=0.9, split="train", total=400)
        >>> len(train), train.num_classes, train.num_features
        (276, 4, 10)
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        bias: float = 0.9,
        split: SynSplit = "train",
        total: int = 8000,
        max_degree: int = 10,
        noise: float = 0.1,
        seed: int = 0,
        transform: Callable[[Data], Data] | None = None,
    ) -> None:
        counts = syn_b_counts(bias, total)
        check_choice("split", split, SYN_SPLITS)
        check_count("max_degree", max_degree)
        check_fraction("noise", noise)
        check_count("seed", seed, 0)
        order = _order(counts[split], split, seed)
        if not order:
            raise ValueError(f"split {split!r} is empty at total={total} and bias={bias}; take a larger total")
        about = {
            "name": "syn_b",
            "bias": float(bias),
            "split": split,
            "total": total,
            "max_degree": max_degree,
            "noise": float(noise),
            "seed": seed,
        }

        def make() -> Table:
            samples = (syn_sample(i, base, motif, split, seed, noise) for i, (base, motif) in enumerate(order))
            return build_table(samples, lambda degree: degree_one_hot(degree, max_degree))

        super().__init__(root, make, about, len(CAL_MOTIFS), transform)


def _order(counts: dict[str, dict[str, int]], split: SynSplit, seed: int) -> list[tuple[int, int]]:
    """Return base and class of every graph of a split, shuffled."""
    drawn = [
        (base, motif)
        for motif, name in enumerate(CAL_MOTIFS)
        for base, base_name in enumerate(CAL_BASES)
        for _ in range(counts[name][base_name])
    ]
    rng = np.random.default_rng([seed, _SHUFFLE + _SPLIT_IDS[split]])
    return [drawn[i] for i in rng.permutation(len(drawn)).tolist()]


def syn_sample(index: int, base: int, motif: int, split: SynSplit, seed: int, noise: float) -> Sample:
    """Make one graph of SYN-b."""
    rng = np.random.default_rng([seed, _SPLIT_IDS[split], index])
    name = CAL_MOTIFS[motif]
    template = cal_tree_template(TREE_HEIGHT, TREE_BRANCHING, name) if base == 0 else _ba_template(rng, name)
    labels = {"y": motif, "env_id": base, "base_id": base, "motif_id": motif}
    attach_to = int(rng.integers(template.num_base))
    return finish_sample(template, attach_to, rng, lambda num_edges: int(noise * num_edges), labels, roles=False)


def _ba_template(rng: np.random.Generator, motif: str) -> Template:
    """Return a Barabási-Albert graph beside a motif: each new node joins two earlier ones, chosen by degree."""
    ends = [0, 1, 0, 2]  # a star of three nodes; every edge adds both of its ends, so a draw from here is by degree
    new = range(3, BA_NODES)
    draws = rng.integers(np.arange(4, 4 * len(new) + 1, 4)[:, None], size=(len(new), 2)).tolist()
    for node, (first, second) in zip(new, draws, strict=True):
        a, b = ends[first], ends[second]
        while b == a:
            b = ends[int(rng.integers(4 * (node - 2)))]
        ends += (a, node, b, node)
    return cal_template(BA_NODES, np.array(ends), motif)


def degree_one_hot(degree: Tensor, width: int) -> Tensor:
    """Return rows of zeros with a one at the degree, or at the last place for a larger one."""
    return torch.nn.functional.one_hot(degree.clamp(max=width - 1), width).float()


def load_syn_b(
    root: str | os.PathLike[str] | None = None,
    bias: float = 0.9,
    total: int = 8000,
    max_degree: int = 10,
    noise: float = 0.1,
    seed: int = 0,
    transform: Callable[[Data], Data] | None = None,
) -> dict[str, SynB]:
    """All splits of SYN-b.

    Args:
        root: As in `SynB`, as are the others.
        bias: In [0, 1].
        total: Graphs in all splits together.
        max_degree: Number of features.
        noise: Number of noise edges as a share of the edges.
        seed: Seed, at least 0.
        transform: Applied to every graph on access.

    Returns:
        Train, val and test.

    Raises:
        ValueError: As `SynB`.

    Examples:
        >>> {name: len(split) for name, split in load_syn_b(bias=0.5, total=400).items()}
        {'train': 280, 'val': 40, 'test': 80}
    """
    return {
        split: SynB(root, bias, split, total, max_degree, noise, seed, transform)  # type: ignore[arg-type]
        for split in SYN_SPLITS
    }
