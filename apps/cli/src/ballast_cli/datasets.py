"""How a command is told which interactions to read: a known data set, or a folder that `ballast data prepare` wrote."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cyclopts import Parameter

from ballast_bench.meta import find_data_root

if TYPE_CHECKING:
    from recsys_losses.data import InteractionData


@Parameter(name="*")
@dataclass(frozen=True)
class DataOptions:
    """The interactions to work on."""

    data: str
    "A known data set (`ballast data list`), `synthetic`, or a folder with train.txt, test.txt and perhaps valid.txt."
    data_root: Path | None = None
    "Folder of the known data sets; $BALLAST_DATA or `shared/data` above the current folder by default."
    split: Literal["standard", "unbiased"] = "standard"
    "How a known data set is split; `unbiased` flattens item popularity in the held-out part."
    data_seed: int = 0
    "Seed of the unbiased split and of the synthetic data."

    def load(self) -> InteractionData:
        """Read the interactions.

        Raises:
            ValueError: An unknown data set (known ones and the nearest are listed), or a malformed file.
            FileNotFoundError: A missing file or data root.
        """
        from recsys_losses.data import DATASETS, load_dataset

        folder = Path(self.data)
        if folder.is_dir():
            return read_folder(folder)
        names = [dataset.name for dataset in DATASETS]
        if self.data not in names:
            nearest = difflib.get_close_matches(self.data, names, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"{self.data!r} is neither a folder nor a known data set ({', '.join(names)}){hint}")
        root = None if self.data == "synthetic" else find_data_root(self.data_root)
        if root is None and self.data != "synthetic":
            raise FileNotFoundError(
                f"--data {self.data}: no data root; name it with --data-root or BALLAST_DATA, or use --data synthetic"
            )
        return load_dataset(self.data, root, split=self.split, seed=self.data_seed)


def read_folder(folder: Path) -> InteractionData:
    """Read train.txt, test.txt and, where it is there, valid.txt (plain, .gz or .xz) in the LightGCN text format."""
    import dataclasses

    from recsys_losses.data import read_lightgcn

    data = read_lightgcn(folder / "train.txt", folder / "test.txt")
    if not any((folder / f"valid.txt{suffix}").exists() for suffix in ("", ".gz", ".xz")):
        return data
    both = read_lightgcn(folder / "train.txt", folder / "valid.txt")
    return dataclasses.replace(
        data,
        num_users=max(data.num_users, both.num_users),
        num_items=max(data.num_items, both.num_items),
        valid=both.test,
    )
