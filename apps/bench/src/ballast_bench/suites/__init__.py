"""The suites: what `--suite NAME` runs.

One module per package, or per method where the cases differ in kind; each has one function per suite that returns a tuple of cases. A suite may also be named by
reference ("my_cases.py:quick" or "module:function"), which needs no entry here.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib
from typing import TYPE_CHECKING

from ballast_bench.case import Case, resolve
from ballast_bench.errors import UsageError, unknown

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ballast_bench.case import Cell

__all__ = ["MODULES", "SUITES", "load_suite", "select_cells"]

SUITES = {
    "quick": "generated data only, three to four minutes on 2 cores",
    "cpu": "real data, up to 75 minutes per package on 2 cores",
    "gpu": "full-size runs on a CUDA device",
}
MODULES = tuple(
    f"ballast_bench.suites.{name}"
    for name in (
        "recsys_losses",
        "recsys_adnce",
        "recsys_sgl",
        "recsys_gcm",
        "recsys_dsl",
        "recsys_raremed",
        "recsys_mcrl",
        "recsys_if_dfm",
        "graph_unlearn",
        "graph_unlearn_attacks",
        "graph_ood_cal",
        "graph_ood_aia",
        "graph_ood_infoigl",
        "graph_ood_asrc",
        "graph_ood_motif",
        "ihvp",
        "pref_opt_pairs",
        "pref_opt_lists",
        "pref_opt_bandit",
    )
)


def load_suite(name: str) -> tuple[Case, ...]:
    """Return the cases of a suite.

    Args:
        name: "quick", "cpu", "gpu", or a reference "module:function" or "file.py:function".

    Raises:
        UsageError: If the suite does not exist, is empty, or names a case twice.
    """
    if ":" in name:
        cases = tuple(resolve(name)())
    elif name in SUITES:
        modules = [importlib.import_module(module) for module in MODULES]
        cases = tuple(case for module in modules if hasattr(module, name) for case in getattr(module, name)())
    else:
        raise unknown("suite", name, SUITES)
    if not cases:
        raise UsageError(f"suite {name!r} has no cases")
    if not all(isinstance(case, Case) for case in cases):
        raise UsageError(f"suite {name!r} must return a tuple of Case objects")
    ids = [case.id for case in cases]
    twice = sorted({case_id for case_id in ids if ids.count(case_id) > 1})
    if twice:
        raise UsageError(f"suite {name!r} names a case twice: {', '.join(twice)}")
    return cases


def select_cells(cases: Iterable[Case], only: str | None = None, seeds: tuple[int, ...] | None = None) -> list[Cell]:
    """Return the cells of `cases`, narrowed.

    Args:
        cases: The cases of a suite.
        only: Part of "package/case/method/seed", or a shell pattern for the whole of it; case-insensitive.
        seeds: Seeds to use instead of the cases' own.

    Raises:
        UsageError: If nothing matches; the message lists the known cases and the nearest.
    """
    cases = list(cases)
    if seeds is not None:
        cases = [dataclasses.replace(case, seeds=seeds) for case in cases]
    cells = [cell for position, case in enumerate(cases) for cell in case.cells(position)]
    if only is None:
        return cells
    pattern = only.lower()
    if not any(character in pattern for character in "*?["):
        pattern = f"*{pattern}*"
    chosen = [cell for cell in cells if fnmatch.fnmatchcase(cell.label.lower(), pattern)]
    if not chosen:
        raise unknown("case or method", only, {case.name for case in cases} | {cell.method for cell in cells})
    return chosen
