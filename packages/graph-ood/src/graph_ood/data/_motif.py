"""GOOD-Motif and Spurious-Motif, generated from seeds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from graph_ood._checks import check_choice, check_count, check_fraction
from graph_ood.data._shapes import GOOD_BASES, GOOD_MOTIFS, good_template
from graph_ood.data._tables import Sample, Table, TableDataset, build_table, finish_sample

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from torch import Tensor
    from torch_geometric.data import Data  # type: ignore[import-untyped]

Domain = Literal["base", "size"]
Shift = Literal["covariate", "concept", "no_shift"]
Split = Literal["train", "id_val", "id_test", "val", "test"]

DOMAINS = ("base", "size")
SHIFTS = ("covariate", "concept", "no_shift")
SPLITS = ("train", "id_val", "id_test", "val", "test")
_SPLIT_IDS = {split: number for number, split in enumerate(SPLITS)}
_ID_SPLITS = ("train", "id_val", "id_test")

LEAST_DATA = 30
NOISE = 0.05
WIDTH, SPREAD = 10, 5

_COVARIATE_WIDTHS = (6, 10, 15, 30, 70)
_CONCEPT_WIDTHS = (10, 40, 70)
_SPURIOUS_RATIO = (0.99, 0.97, 0.95)
_HELD_OUT_RATIO = {"val": 0.3, "test": 0.0}

_SPURIOUS_BASES = ("tree", "ladder", "wheel")
_SPURIOUS_MOTIFS = ("cycle", "house", "crane")
_SPURIOUS_SPLITS = ("train", "id_val", "val", "test")


def good_motif_split_sizes(num_data: int, shift: Shift) -> dict[str, int]:
    r"""Number of graphs in every split of GOOD-Motif; both domains have the same.

    Of $n$ graphs, covariate shift gives 60/10/10/10/10 % to train, id_val, id_test, val and test, concept shift
    42/9/9/20/20 %, no shift 60/20/20 % to train, val and test. Fractions are cut, not rounded.

    Args:
        num_data: $n$, at least 30.
        shift: `"covariate"`, `"concept"` or `"no_shift"`.

    Returns:
        The size of every split that the shift has.

    Raises:
        ValueError: If `num_data` is below 30 or `shift` unknown.

    Reference: Gui et al., 2022; cuts as in the authors' code.

    Examples:
        >>> good_motif_split_sizes(30000, "covariate")
        {'train': 18000, 'id_val': 3000, 'id_test': 3000, 'val': 3000, 'test': 3000}
    """
    check_count("num_data", num_data, LEAST_DATA)
    check_choice("shift", shift, SHIFTS)
    if shift == "covariate":
        held_out = int(num_data * 0.1)
        train = int(num_data * 0.8) - 2 * held_out
        return {"train": train, **dict.fromkeys(("id_val", "id_test", "val", "test"), held_out)}
    if shift == "concept":
        pool = 3 * (int(num_data * 0.6) // 3)
        in_domain, held_out = int(pool * 0.15), int(num_data * 0.2)
        return {
            "train": pool - 2 * in_domain,
            **dict.fromkeys(("id_val", "id_test"), in_domain),
            **dict.fromkeys(("val", "test"), held_out),
        }
    pool = 3 * (num_data // 3)
    train, until_val = int(pool * 0.6), int(pool * (0.6 + 0.2))
    return {"train": 3 * (train // 3), "val": until_val - train, "test": pool - until_val}


class GoodMotif(TableDataset):
    r"""GOOD-Motif, one split of it: which motif hangs on a base graph, under shift of the base or of its size.

    A graph is a base of some width, a motif, the edge between them, and noise edges: 5 % of the number of edges are
    drawn, those with an end of role 0 stay (see `motif_graph`). The motif is the class: house 0, cycle 1, crane 2. With
    probability `label_noise` the label is drawn anew from all three, so at 0.1 the best possible accuracy is 93.3 %.

    | domain, shift | training | validation | test |
    |---|---|---|---|
    | base, covariate | wheel, tree, ladder | star | path |
    | base, concept | base = motif in 99, 97, 95 % | 30 % | 0 % |
    | size, covariate | widths 6, 10, 15 | 30 | 70 |
    | size, concept | width class = motif in 99, 97, 95 % | 30 % | 0 % |
    | no_shift | five bases | the same | the same |

    In the other cases of a concept shift, base or width class are uniform over three. Widths vary by up to five. Splits
    `"id_val"` and `"id_test"` are distributed as `"train"`; without shift there are none.

    Fields of a graph: `x` ones `[n, 1]`; `edge_index` with both directions, sorted; `y`, `env_id`, `base_id`
    (wheel, tree, ladder, star, path) and `motif_id`, int64 `[1]`; `width_id` in the size domain; `node_gt` bool `[n]`
    and `edge_gt` bool `[m]`, what belongs to the motif. `env_id` is the base or width class under covariate shift, the
    spurious ratio (0, 1, 2) under concept shift, and arbitrary without shift (0, 1, 2 in training, 3, 4 after it).
    Validation and test of a concept shift have no environment: -1.

    Every graph has its own generator, seeded by `seed`, split and index: the same seed gives the same graphs, and a
    larger data set begins with those of a smaller one. The published files were made without seeds, so these
    graphs have their distribution, not their edges.

    Args:
        root: Folder to keep the graphs in, as one safetensors file per split; None keeps them in memory only.
        domain: `"base"` or `"size"`.
        shift: `"covariate"`, `"concept"` or `"no_shift"`.
        split: `"train"`, `"id_val"`, `"id_test"`, `"val"` or `"test"`.
        num_data: Graphs in all splits together, at least 30.
        seed: Seed, at least 0.
        label_noise: Probability in [0, 1] that a label is drawn anew.
        transform: Applied to every graph on access.

    Raises:
        ValueError: If a name is unknown or a number out of range, or a file in `root` is damaged.

    Reference: S. Gui, X. Li, L. Wang, S. Ji, *GOOD: A Graph Out-of-Distribution Benchmark*, NeurIPS 2022 (data sets and
    benchmarks), arXiv:2206.08452.

    Examples:
        >>> train = GoodMotif(domain="base", shift="covariate", split="train", num_data=300)
        >>> train
        GoodMotif(180)
        >>> train.num_classes, sorted(train.base_id.unique().tolist())
        (3, [0, 1, 2])
        >>> train[0].is_undirected(), int(train[0].node_gt.sum())
        (True, 5)
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        domain: Domain = "base",
        shift: Shift = "covariate",
        split: Split = "train",
        num_data: int = 30000,
        seed: int = 0,
        label_noise: float = 0.1,
        transform: Callable[[Data], Data] | None = None,
    ) -> None:
        check_choice("domain", domain, DOMAINS)
        sizes = good_motif_split_sizes(num_data, shift)
        check_choice("split", split, sizes)
        check_count("seed", seed, 0)
        check_fraction("label_noise", label_noise)
        about = {
            "name": "good_motif",
            "domain": domain,
            "shift": shift,
            "split": split,
            "num_data": num_data,
            "seed": seed,
            "label_noise": float(label_noise),
        }

        def make() -> Table:
            samples = (good_sample(i, domain, shift, split, seed, label_noise) for i in range(sizes[split]))
            return build_table(samples, ones)

        super().__init__(root, make, about, len(GOOD_MOTIFS), transform)


def good_sample(index: int, domain: Domain, shift: Shift, split: Split, seed: int, label_noise: float) -> Sample:
    """Make one graph of GOOD-Motif."""
    rng = np.random.default_rng([seed, _SPLIT_IDS[split], index])
    motif = int(rng.integers(len(GOOD_MOTIFS)))
    label = int(rng.integers(len(GOOD_MOTIFS))) if rng.random() < label_noise else motif
    width = WIDTH
    labels = {"y": label, "env_id": -1, "base_id": 0, "motif_id": motif}
    if domain == "size":
        labels["width_id"] = 0
    if shift == "no_shift":
        labels["base_id"] = int(rng.integers(len(GOOD_BASES)))
        labels["env_id"] = {"train": index % 3, "val": 3, "test": 4}[split]
    else:
        shifted = _shifted(rng, index, shift, split, motif)
        labels["env_id"] = shifted if shift == "covariate" else index % 3 if split in _ID_SPLITS else -1
        labels["base_id" if domain == "base" else "width_id"] = shifted
        if domain == "size":
            labels["base_id"] = int(rng.integers(len(GOOD_BASES)))
            width = (_COVARIATE_WIDTHS if shift == "covariate" else _CONCEPT_WIDTHS)[shifted]
    return _sample(rng, GOOD_BASES[labels["base_id"]], GOOD_MOTIFS[motif], width, labels)


def _shifted(rng: np.random.Generator, index: int, shift: Shift, split: Split, motif: int) -> int:
    """Draw what the shift is about: the base, or the class of widths."""
    if shift == "covariate":
        return int(rng.integers(3)) if split in _ID_SPLITS else {"val": 3, "test": 4}[split]
    ratio = _SPURIOUS_RATIO[index % 3] if split in _ID_SPLITS else _HELD_OUT_RATIO[split]
    return motif if rng.random() < ratio else int(rng.integers(3))


def _sample(rng: np.random.Generator, base: str, motif: str, width: int, labels: dict[str, int]) -> Sample:
    width += int(rng.integers(-SPREAD, SPREAD + 1))
    template = good_template(base, width, motif)
    attach_to = int(rng.integers(template.num_base))
    return finish_sample(template, attach_to, rng, _good_tries, labels, roles=True)


def _good_tries(num_edges: int) -> int:
    return int(NOISE * num_edges)


def ones(degree: Tensor) -> Tensor:
    """Return the feature of a graph that has none."""
    return torch.ones(len(degree), 1)


def load_good_motif(
    root: str | os.PathLike[str] | None = None,
    domain: Domain = "base",
    shift: Shift = "covariate",
    num_data: int = 30000,
    seed: int = 0,
    label_noise: float = 0.1,
    transform: Callable[[Data], Data] | None = None,
) -> dict[str, GoodMotif]:
    """All splits of GOOD-Motif under the names that GOOD gives them.

    Args:
        root: As in `GoodMotif`, as are the others.
        domain: `"base"` or `"size"`.
        shift: `"covariate"`, `"concept"` or `"no_shift"`.
        num_data: Graphs in all splits together, at least 30.
        seed: Seed, at least 0.
        label_noise: Probability in [0, 1] that a label is drawn anew.
        transform: Applied to every graph on access.

    Returns:
        Train, id_val, id_test, val and test; without shift train, val and test.

    Raises:
        ValueError: As `GoodMotif`.

    Examples:
        >>> {name: len(split) for name, split in load_good_motif(shift="concept", num_data=300).items()}
        {'train': 126, 'id_val': 27, 'id_test': 27, 'val': 60, 'test': 60}
    """
    return {
        split: GoodMotif(root, domain, shift, split, num_data, seed, label_noise, transform)  # type: ignore[arg-type]
        for split in good_motif_split_sizes(num_data, shift)
    }


class _SpuriousMotif(TableDataset):
    """One split of Spurious-Motif; `spurious_motif` makes all."""

    def __init__(
        self,
        root: str | os.PathLike[str] | None,
        bias: float,
        split: str,
        size: int,
        seed: int,
        transform: Callable[[Data], Data] | None,
    ) -> None:
        about: dict[str, Any] = {
            "name": "spurious_motif",
            "bias": float(bias),
            "split": split,
            "size": size,
            "seed": seed,
        }
        followed = bias if split in ("train", "id_val") else 1 / 3

        def make() -> Table:
            return build_table((_spurious_sample(i, followed, split, seed) for i in range(size)), ones)

        super().__init__(root, make, about, len(_SPURIOUS_MOTIFS), transform)

    def __repr__(self) -> str:
        return f"SpuriousMotif({len(self)})"


def _spurious_sample(index: int, bias: float, split: str, seed: int) -> Sample:
    rng = np.random.default_rng([seed, _SPLIT_IDS[split], index])
    motif = index % 3
    base = motif if rng.random() < bias else (motif + 1 + int(rng.integers(2))) % 3
    labels = {"y": motif, "env_id": base, "base_id": base, "motif_id": motif}
    return _sample(rng, _SPURIOUS_BASES[base], _SPURIOUS_MOTIFS[motif], WIDTH, labels)


def spurious_motif(
    bias: float,
    root: str | os.PathLike[str] | None = None,
    num_data: int = 18000,
    seed: int = 0,
    transform: Callable[[Data], Data] | None = None,
) -> dict[str, TableDataset]:
    r"""Spurious-Motif with bias $b$: the base tells the motif in training, and nothing in the test.

    $$P(\text{base}=\text{motif})=b,\qquad P(\text{base}=k)=\tfrac{1-b}{2}\quad\text{for the other two}$$

    Bases are tree 0, ladder 1 and wheel 2, classes are cycle 0, house 1 and crane 2, all classes equally frequent and no
    label wrong. Splits `"train"` and `"id_val"` follow the bias, in `"val"` and `"test"` the bases are uniform; they hold
    a half, a twelfth, a twelfth and a third of the graphs. Widths, noise edges and fields are those of `GoodMotif`, with
    the base as `env_id`; the test graphs are not larger than the others.

    Args:
        bias: $b$ in [0, 1]; published values lie between 1/3 (no bias) and 0.9.
        root: Folder to keep the graphs in; None keeps them in memory only.
        num_data: Graphs in all splits together, at least 30.
        seed: Seed, at least 0.
        transform: Applied to every graph on access.

    Returns:
        The four splits.

    Raises:
        ValueError: If `bias` is outside [0, 1], `num_data` below 30 or `seed` negative.

    Reference: Y. Wu, X. Wang, A. Zhang, X. He, T.-S. Chua, *Discovering Invariant Rationales for Graph Neural Networks*,
    ICLR 2022, arXiv:2201.12872.

    Examples:
        >>> splits = spurious_motif(0.9, num_data=360)
        >>> {name: len(split) for name, split in splits.items()}
        {'train': 180, 'id_val': 30, 'val': 30, 'test': 120}
        >>> agree = splits["train"].base_id == splits["train"].motif_id
        >>> 0.85 < agree.float().mean() < 0.95
        tensor(True)
    """
    check_fraction("bias", bias)
    check_count("num_data", num_data, LEAST_DATA)
    check_count("seed", seed, 0)
    parts = dict(zip(_SPURIOUS_SPLITS, (num_data // 2, num_data // 12, num_data // 12, num_data // 3), strict=True))
    return {split: _SpuriousMotif(root, bias, split, size, seed, transform) for split, size in parts.items()}
