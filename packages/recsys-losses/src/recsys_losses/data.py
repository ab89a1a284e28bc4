"""Data of implicit feedback: readers, filters, splits, the known data sets, and generated data.

An edge list is a LongTensor (2, E): row 0 users, row 1 items, both 0-based. Nothing is downloaded: real data sets are
read from a folder given at run time.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from recsys_losses._checks import check_choice
from recsys_losses._interactions import InteractionData
from recsys_losses._readers import read_inter, read_lightgcn, read_movielens, read_pairs, warn_overlap
from recsys_losses._splits import (
    hold_out_validation,
    inject_false_positives,
    k_core,
    reindex,
    split_ratio,
    unbiased_split,
)
from recsys_losses.synthetic import SyntheticFeedback, synthetic_feedback

if TYPE_CHECKING:
    import os

    from torch import Tensor

__all__ = [
    "DATASETS",
    "DataFile",
    "DatasetInfo",
    "FileCheck",
    "InteractionData",
    "SyntheticFeedback",
    "check_dataset",
    "hold_out_validation",
    "inject_false_positives",
    "k_core",
    "load_dataset",
    "read_inter",
    "read_lightgcn",
    "read_movielens",
    "read_pairs",
    "reindex",
    "split_ratio",
    "synthetic_feedback",
    "unbiased_split",
]

SPLITS = ("standard", "unbiased")

_MOVIELENS_LICENCE = (
    "GroupLens usage licence: research use, acknowledgement required, no redistribution and no commercial use "
    "without separate permission"
)


@dataclass(frozen=True)
class DataFile:
    """A file of a data set: path below the `recsys` folder and SHA-256 of its content."""

    path: str
    sha256: str


@dataclass(frozen=True)
class DatasetInfo:
    """What is known about a data set: name, description, files, licence, where the files come from."""

    name: str
    description: str
    files: tuple[DataFile, ...]
    licence: str
    source: str


@dataclass(frozen=True)
class FileCheck:
    """Outcome of checking one file: `status` is "ok", "missing" or "changed"; `path` is where it was looked for."""

    path: Path
    status: Literal["ok", "missing", "changed"]

    @property
    def ok(self) -> bool:
        """Whether the file is there with the expected content."""
        return self.status == "ok"


DATASETS = (
    DatasetInfo(
        name="gowalla",
        description="29,858 users, 40,981 items, 810,128 train and 217,242 test pairs: check-ins, as supplied",
        files=(
            DataFile("gowalla/train.txt.xz", "0b73100be11b2ca84951c44d14b825bf3425cb2ac8e8ad9cf9a1088f0b50da1b"),
            DataFile("gowalla/test.txt.xz", "34fffe44d363ba1149a0c3fc8f9578ba1570c426216b6bc3b2003f7aba9db3bb"),
        ),
        licence="not stated by LightGCN-PyTorch; derived from the SNAP Gowalla check-ins",
        source="gusye1234/LightGCN-PyTorch@947ca2b3, data/gowalla (train rebuilt from s_adj_mat.npz)",
    ),
    DatasetInfo(
        name="lastfm",
        description="1,892 users, 4,489 items, 42,135 train and 10,533 test pairs: artists listened to, as supplied",
        files=(
            DataFile("lastfm/data1.txt.gz", "384372b86632cf28c6f5d30f9af9b10dd47fabc1a37624537586bf8be02c2eb3"),
            DataFile("lastfm/test1.txt.gz", "7ac7c7be784ed5bf9363f8bb8301afb550a3bc5b6dd7b12ca3606c716883a092"),
        ),
        licence="derived from HetRec 2011 Last.fm-2K (GroupLens, Last.fm): non-commercial research use",
        source="gusye1234/LightGCN-PyTorch@947ca2b3, data/lastfm",
    ),
    DatasetInfo(
        name="ml-100k",
        description="943 users, 1,682 items, ratings of at least 4: 44,679 train and 10,696 test pairs, own split",
        files=(DataFile("ml-100k/u.data.gz", "a1ea6990f589929750a50baa2ac95642f9439e35f7cf771c313ab13886c1a227"),),
        licence=_MOVIELENS_LICENCE,
        source="MovieLens 100K as in RUCAIBox/RecBole@7b02be5e, dataset/ml-100k",
    ),
    DatasetInfo(
        name="ml-1m",
        description="6,022 users, 3,043 items, 796,244 train and 99,455 test pairs: MovieLens 1M, as supplied",
        files=(
            DataFile("ml-1m/train.txt.xz", "b3a461e2ea852eb86001d4ed188240051e2c17f5fc433248672c7a1d9dce0d9b"),
            DataFile("ml-1m/test.txt.xz", "a68bfd0f0feb594939323a446fff6ae8181af0e6f88f8fe05e467094bc89ae98"),
        ),
        licence=_MOVIELENS_LICENCE,
        source="junkangwu/Adap_tau@9328cf66, data/ml_dataset.tar.gz",
    ),
    DatasetInfo(
        name="synthetic",
        description="generated clicks with known preferences and a known exposure bias; needs no files",
        files=(),
        licence="generated, none needed",
        source="recsys_losses.data.synthetic_feedback",
    ),
)
"""Data sets that `load_dataset` knows, in alphabetical order."""

_BY_NAME = {info.name: info for info in DATASETS}

_LASTFM_USERS, _LASTFM_ITEMS = 1892, 4489
_ML_100K_SPLIT_SEED = 2024


def load_dataset(
    name: str, root: str | os.PathLike[str] | None, *, split: str = "standard", seed: int = 0
) -> InteractionData:
    r"""Load a known data set.

    `split="standard"`: lastfm, gowalla and ml-1m as supplied; ml-100k has ratings of at least 4 as positives, and of
    the n pairs of each user floor(n/5) are test pairs, drawn once for all by numpy's generator with seed 2024 (users in
    ascending order, `permutation(n)` over the ascending items). No validation pairs: see `hold_out_validation`.

    `split="unbiased"`: all pairs (train and test of the standard split together) are split again by `unbiased_split`
    with 30 % held out, 2/3 of it test, cap = 1 / (median count of the items that have pairs). Users and items are
    renumbered by first appearance in train; those without any pair disappear (lastfm: users and items only counted by
    the fixed sizes; ml-100k: one user and 235 items without a rating of at least 4).

    "synthetic" generates `synthetic_feedback(seed=seed)`; its test pairs are unbiased, whatever `split`.

    Args:
        name: "gowalla", "lastfm", "ml-100k", "ml-1m" or "synthetic".
        root: Folder that contains `recsys/`, or the folder `recsys` itself; not used by "synthetic".
        split: "standard" or "unbiased".
        seed: Seed of the unbiased split and of the generated data.

    Returns:
        The data set.

    Raises:
        ValueError: Unknown name or split (the message lists the known ones and the nearest), root None for data on
            disk, or a malformed file.
        FileNotFoundError: A file is absent; the message says what was looked for.

    Source: protocol of the package, section 9; unbiased split: CPR (arXiv 2204.12176), section 5.1.

    Examples:
        >>> load_dataset("synthetic", None).num_items
        400
    """
    check_choice("data set", name, _BY_NAME)
    check_choice("split", split, SPLITS)
    if name == "synthetic":
        return synthetic_feedback(seed=seed).data
    data = _load_standard(name, _recsys_folder(name, root))
    return data if split == "standard" else _split_unbiased(data, seed)


def check_dataset(name: str, root: str | os.PathLike[str] | None) -> tuple[FileCheck, ...]:
    """Compare the files of a known data set with their checksums.

    Args:
        name: Name in `DATASETS`.
        root: Folder that contains `recsys/`, or the folder `recsys` itself; not used by "synthetic".

    Returns:
        One outcome per file, in the order of `DatasetInfo.files`; empty for generated data.

    Raises:
        ValueError: Unknown name, or root None for data on disk.

    Examples:
        >>> [check.status for check in check_dataset("lastfm", "/nowhere")]
        ['missing', 'missing']
    """
    check_choice("data set", name, _BY_NAME)
    if name == "synthetic":
        return ()
    folder = _recsys_folder(name, root)
    return tuple(_check_file(folder / file.path, file.sha256) for file in _BY_NAME[name].files)


def _check_file(path: Path, sha256: str) -> FileCheck:
    if not path.is_file():
        return FileCheck(path, "missing")
    with path.open("rb") as file:
        same = hashlib.file_digest(file, "sha256").hexdigest() == sha256
    return FileCheck(path, "ok" if same else "changed")


def _recsys_folder(name: str, root: str | os.PathLike[str] | None) -> Path:
    if root is None:
        raise ValueError(
            f"data set {name!r} is read from disk: root must be the folder that contains recsys/, got None"
        )
    folder = Path(root)
    return folder / "recsys" if (folder / "recsys").is_dir() else folder


def _load_standard(name: str, folder: Path) -> InteractionData:
    if name == "ml-100k":
        edges, users, items = read_movielens(folder / "ml-100k" / "u.data", min_rating=4)
        train, test = _split_ml_100k(edges)
        return InteractionData(len(users), len(items), train=train, test=test)
    if name == "lastfm":
        train, test = (read_pairs(folder / "lastfm" / file, sep="\t", base=1) for file in ("data1.txt", "test1.txt"))
        data = InteractionData(_LASTFM_USERS, _LASTFM_ITEMS, train=train, test=test)
        warn_overlap(data, "data1.txt", "test1.txt")
        return data
    return read_lightgcn(folder / name / "train.txt", folder / name / "test.txt")


def _split_ml_100k(edges: Tensor) -> tuple[Tensor, Tensor]:
    """Return the train and test pairs of the protocol: per user, the first n // 5 of the permuted ascending items."""
    rng = np.random.default_rng(_ML_100K_SPLIT_SEED)
    user, item = edges.numpy()
    order = np.lexsort((item, user))
    is_test = np.zeros(order.size, dtype=np.bool_)
    for rows in np.split(order, np.flatnonzero(np.diff(user[order])) + 1):
        is_test[rows[rng.permutation(rows.size)[: rows.size // 5]]] = True
    chosen = torch.from_numpy(is_test)
    return edges[:, ~chosen], edges[:, chosen]


def _split_unbiased(data: InteractionData, seed: int) -> InteractionData:
    edges = torch.cat((data.train, data.test), dim=1)
    count = torch.bincount(edges[1]).double()
    cap = 1 / float(count[count > 0].quantile(0.5))
    parts = unbiased_split(edges, heldout=0.3, cap=cap, generator=torch.Generator().manual_seed(seed))
    (train, valid, test), user_ids, item_ids = reindex(*parts)
    return InteractionData(user_ids.numel(), item_ids.numel(), train=train, valid=valid, test=test)
