"""`ballast data`: what is known and where it is, preparing files for training, checking checksums."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from ballast_bench.meta import find_data_root
from ballast_cli.datasets import DataOptions
from ballast_cli.output import print_result, write_json, write_text

if TYPE_CHECKING:
    from torch import Tensor

    from recsys_losses.data import InteractionData

data_app = App(name="data", help="Data sets: list, prepare, check.")

Format = Literal["pairs", "lightgcn", "inter", "movielens"]


@data_app.command(name="list")
def list_datasets(*, data_root: Path | None = None, json: bool = False) -> None:
    """List the known data sets, whether they are on this machine, and their licences.

    Examples:
        ballast data list

        ballast data list --data-root ../shared/data --json

    Args:
        data_root: Folder of the data sets; $BALLAST_DATA or `shared/data` above the current folder by default.
        json: Print one JSON object.
    """
    from recsys_losses.data import DATASETS, check_dataset

    root = find_data_root(data_root)
    rows = []
    for dataset in DATASETS:
        checks = () if root is None else check_dataset(dataset.name, root)
        present = not dataset.files or (bool(checks) and all(check.status != "missing" for check in checks))
        rows.append(
            {
                "name": dataset.name,
                "present": present,
                "path": str(checks[0].path.parent) if checks and present else None,
                "description": dataset.description,
                "licence": dataset.licence,
                "source": dataset.source,
            }
        )
    if json:
        print_result({"data_root": None if root is None else str(root), "datasets": rows}, as_json=True)
        return
    table = Table("name", "here", "what", "licence", title=f"data root: {root or 'not found'}", show_lines=True)
    for dataset, row in zip(DATASETS, rows, strict=True):
        table.add_row(dataset.name, "yes" if row["present"] else "no", dataset.description, dataset.licence)
    Console().print(table)


@data_app.command
def check(name: str | None = None, *, data_root: Path | None = None, json: bool = False) -> int:
    """Compare the files of the known data sets with their checksums.

    Examples:
        ballast data check lastfm

    Args:
        name: One data set; all by default.
        data_root: Folder of the data sets.
        json: Print one JSON object.

    Returns:
        Exit code: 0 all files match, 1 a file is missing or differs.
    """
    from recsys_losses.data import DATASETS, check_dataset

    root = find_data_root(data_root)
    if root is None:
        raise FileNotFoundError("no data root: name it with --data-root or BALLAST_DATA")
    names = [dataset.name for dataset in DATASETS if dataset.files] if name is None else [name]
    checks = [check for each in names for check in check_dataset(each, root)]
    print_result({str(check.path): check.status for check in checks}, as_json=json)
    return 0 if all(check.ok for check in checks) else 1


@Parameter(name="*")
@dataclass(frozen=True)
class SplitOptions:
    """How prepared interactions are filtered and split."""

    k_core: int = 0
    "Keep users and items with at least this many interactions, repeatedly."
    test: float = 0.2
    "Share of each user's pairs that is held out for testing."
    valid: float = 0.1
    "Share of each user's pairs that is held out for choosing the epoch."
    unbiased: bool = False
    "Hold out pairs with nearly uniform item popularity instead (30 %, a third of it for validation)."
    cap: float | None = None
    "Unbiased split: largest sampling weight of a pair; 1 / median item count by default."
    seed: int = 0
    "Seed of the split."


@data_app.command
def prepare(
    source: str,
    *,
    output: Path,
    format: Format | None = None,  # noqa: A002 - the flag is --format
    min_rating: float | None = None,
    base: Literal[0, 1] = 0,
    split: SplitOptions = SplitOptions(),
    data_root: Path | None = None,
    json: bool = False,
) -> None:
    """Read interactions, filter and split them, and write train.txt, valid.txt, test.txt and ids.json.

    A known data set keeps its own split.

    Examples:
        ballast data prepare lastfm --output prepared/lastfm

        ballast data prepare ratings.dat --format movielens --min-rating 4 --k-core 5 --output prepared/ml

        ballast data prepare clicks.csv --format pairs --base 0 --unbiased --output prepared/clicks

    Args:
        source: A known data set, or a file (plain, .gz or .xz).
        output: Folder to write.
        format: Format of the file: pairs (`user item` per line), lightgcn (`user item item ...`), inter (RecBole) or
            movielens (`u.data`, `ratings.dat`).
        min_rating: Keep interactions rated at least this (inter, movielens).
        base: Smallest id in a `pairs` file.
        split: How the interactions are filtered and split.
        data_root: Folder of the known data sets.
        json: Print the result as one JSON object.
    """
    import torch

    if Path(source).is_file():
        data, ids = _read_and_split(Path(source), format, min_rating, base, split)
    else:
        data, ids = DataOptions(source, data_root=data_root).load(), None
    for name, edges in (("train", data.train), ("valid", data.valid), ("test", data.test)):
        if edges is not None:
            write_text(output / f"{name}.txt", _lightgcn_text(edges))
    if ids is not None:
        write_json(output / "ids.json", ids)
    summary = {
        "users": data.num_users,
        "items": data.num_items,
        "train": data.train.shape[1],
        "valid": 0 if data.valid is None else data.valid.shape[1],
        "test": data.test.shape[1],
        "users without train pairs": data.num_users - int(torch.unique(data.train[0]).numel()),
        "output": str(output),
    }
    print_result(summary, as_json=json)


def _read_and_split(
    path: Path,
    file_format: Format | None,
    min_rating: float | None,
    base: int,
    split: SplitOptions,
) -> tuple[InteractionData, dict[str, list[str]]]:
    """Read one file, filter it, number users and items densely, and split it."""
    import torch

    from recsys_losses.data import InteractionData, k_core, split_ratio, unbiased_split

    if file_format is None:
        raise ValueError("--format is needed for a file: pairs, lightgcn, inter or movielens")
    edges, users, items = _read_file(path, file_format, min_rating, base)
    if split.k_core:
        edges = k_core(edges, min_user=split.k_core, min_item=split.k_core)
    if edges.shape[1] == 0:
        raise ValueError(f"{path}: no interaction is left after filtering")
    kept = [torch.unique(row, return_inverse=True) for row in edges]
    edges = torch.stack([inverse for _, inverse in kept])
    ids = {
        name: [str(names[i]) if names else str(i) for i in old.tolist()]
        for name, (old, _), names in (("users", kept[0], users), ("items", kept[1], items))
    }
    generator = torch.Generator().manual_seed(split.seed)
    if not split.unbiased:
        return split_ratio(edges, test=split.test, valid=split.valid, generator=generator), ids
    cap = split.cap if split.cap is not None else 1 / float(torch.bincount(edges[1]).double().median())
    train, valid, test = unbiased_split(edges, cap=cap, generator=generator)
    sizes = (int(edges[0].max()) + 1, int(edges[1].max()) + 1)
    return InteractionData(*sizes, train=train, test=test, valid=valid), ids


def _read_file(
    path: Path,
    file_format: Format,
    min_rating: float | None,
    base: int,
) -> tuple[Tensor, tuple[str, ...] | None, tuple[str, ...] | None]:
    """Pairs of one file with the original names of users and items, None where they are numbers already."""
    from recsys_losses.data import read_inter, read_movielens, read_pairs

    if min_rating is not None and file_format not in ("inter", "movielens"):
        raise ValueError(f"--min-rating needs a format with ratings (inter, movielens), got {file_format}")
    if file_format == "pairs":
        return read_pairs(path, base=base), None, None
    if file_format == "lightgcn":
        from recsys_losses.data import read_lightgcn

        return read_lightgcn(path, path).train, None, None
    reader = read_inter if file_format == "inter" else read_movielens
    edges, users, items = reader(path, min_rating=min_rating)
    return edges, tuple(users), tuple(items)


def _lightgcn_text(edges: Tensor) -> str:
    """The pairs as lines `user item item ...`, users and items ascending."""
    lines: dict[int, list[int]] = {}
    for user, item in sorted(zip(*edges.tolist(), strict=True)):
        lines.setdefault(user, []).append(item)
    return "".join(f"{user} {' '.join(map(str, items))}\n" for user, items in lines.items())
