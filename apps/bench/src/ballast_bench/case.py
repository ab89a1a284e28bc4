"""What is measured: a case, its metrics, and the cells it is made of.

A *case* is a comparison on one data set: some methods (name -> settings), one of them the baseline, a few seeds and the
metrics to look at. A *cell* is one (case, method, seed); it runs in a process of its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ballast_bench.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Case", "Cell", "CellInput", "CellOutput", "Metric", "Published", "SkipCell", "Sweep", "resolve"]


class SkipCell(Exception):
    """Raised by a cell that cannot run here (data absent, no GPU); the message is recorded as the reason."""


@dataclass(frozen=True)
class Metric:
    """A figure that every cell of a case returns.

    Args:
        name: Key in the cell's metrics, e.g. "recall@20".
        better: Whether "higher" or "lower" values are better.
        label: Heading in tables; the name when empty.
        digits: Decimals shown.
        tested: Whether differences to the baseline are tested (times are not).
        tolerance: Relative change below which `compare` does not call a difference a regression.
    """

    name: str
    better: Literal["higher", "lower"] = "higher"
    label: str = ""
    digits: int = 4
    tested: bool = True
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        if self.better not in ("higher", "lower"):
            raise ValueError(f"better of metric {self.name!r} must be 'higher' or 'lower', got {self.better!r}")
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance of metric {self.name!r} must be >= 0, got {self.tolerance!r}")

    @property
    def sign(self) -> int:
        """+1 when higher is better, otherwise -1."""
        return 1 if self.better == "higher" else -1


@dataclass(frozen=True)
class Published:
    """A figure somebody else reports for a method of a case.

    Args:
        method: Name of the method in the case.
        metric: Name of the metric.
        value: The figure.
        source: Where it is printed (paper and table, log, README).
        note: What differs from our run, empty when nothing is known to.
    """

    method: str
    metric: str
    value: float
    source: str
    note: str = ""


@dataclass(frozen=True)
class Sweep:
    """Position of a case on a numeric axis; cases with the same group are drawn as one curve.

    Args:
        group: Name shared by the cases of the sweep.
        label: Axis label with its unit.
        x: Position of this case.
    """

    group: str
    label: str
    x: float


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison: methods x seeds on one data set.

    Args:
        package: Import name of the package that is measured.
        name: Unique within the package; part of file names.
        title: One line for people.
        dataset: Name of the data set.
        run: The function that measures one cell, as "module:function" or "/path/file.py:function"; it takes a
            `CellInput`, returns a `CellOutput`, and raises `SkipCell` where it cannot run.
        methods: Settings per method, JSON values only. They are part of a cell's key.
        baseline: The method that the others are compared with.
        seeds: Distinct seeds; methods are paired by seed.
        metrics: What each cell returns, the most important first.
        budget: Wall-clock limit per cell in seconds; a cell over it is killed and recorded.
        expected: Rough seconds per cell, for the order of execution and the first ETA.
        published: Figures of others for methods of this case.
        sweep: Position on a numeric axis, if any.
        tradeoff: Names of two metrics (x, y) to draw against each other.
        preload: Modules that the cells need and that are slow to import; imported once per job instead of once per cell.
            They must not start threads or touch a GPU when they are imported.
        note: A paragraph for the report: protocol, what was chosen how.
    """

    package: str
    name: str
    title: str
    dataset: str
    run: str
    methods: Mapping[str, Mapping[str, Any]]
    baseline: str
    seeds: tuple[int, ...]
    metrics: tuple[Metric, ...]
    budget: float = 600.0
    expected: float = 10.0
    published: tuple[Published, ...] = ()
    sweep: Sweep | None = None
    tradeoff: tuple[str, str] | None = None
    preload: tuple[str, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        if self.baseline not in self.methods:
            raise ValueError(f"case {self.name!r}: baseline {self.baseline!r} is not among {', '.join(self.methods)}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"case {self.name!r}: seeds must be distinct and not empty, got {self.seeds!r}")
        if not self.metrics:
            raise ValueError(f"case {self.name!r} has no metrics")
        if not self.budget > 0:
            raise ValueError(f"case {self.name!r}: budget must be > 0 seconds, got {self.budget!r}")
        if not self.expected > 0:
            raise ValueError(f"case {self.name!r}: expected must be > 0 seconds, got {self.expected!r}")
        json.dumps(self.methods, allow_nan=False)

    @property
    def id(self) -> str:
        """Package and name, unique over all suites."""
        return f"{self.package}/{self.name}"

    def description(self) -> dict[str, Any]:
        """What reports need beside methods and seeds, as JSON values; stored with each cell so that a store explains itself."""
        fields = dataclasses.asdict(self)
        for key in ("methods", "seeds", "preload"):
            del fields[key]
        return json.loads(json.dumps(fields))  # type: ignore[no-any-return]

    def cells(self, position: int = 0) -> tuple[Cell, ...]:
        """All cells: seeds outermost, so that an interrupted run has every method at some seeds.

        Args:
            position: Place of the case in its suite; reports keep that order.
        """
        return tuple(
            Cell(self, method, seed, settings, position)
            for seed in self.seeds
            for method, settings in self.methods.items()
        )


@dataclass(frozen=True)
class Cell:
    """One (case, method, seed) with the settings of the method, and the place of the case in its suite."""

    case: Case
    method: str
    seed: int
    settings: Mapping[str, Any]
    position: int = 0

    @property
    def key(self) -> str:
        """Content address: SHA-256 over case, method, seed and settings, 24 hex digits."""
        return cell_key(self.case.package, self.case.name, self.case.dataset, self.method, self.seed, self.settings)

    @property
    def label(self) -> str:
        """Package, case, method and seed for messages and for `--only`."""
        return f"{self.case.id}/{self.method}/{self.seed}"


def cell_key(package: str, case: str, dataset: str, method: str, seed: int, settings: Mapping[str, Any]) -> str:
    """Return the content address of a cell."""
    content = [package, case, dataset, method, seed, settings]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@dataclass(frozen=True)
class CellInput:
    """What a cell function receives.

    Args:
        case: Name of the case.
        dataset: Name of the data set.
        method: Name of the method.
        settings: Settings of the method.
        seed: Seed of this cell.
        data_root: Folder of the real data, None when there is none on this machine.
    """

    case: str
    dataset: str
    method: str
    settings: dict[str, Any]
    seed: int
    data_root: Path | None


@dataclass(frozen=True)
class CellOutput:
    """What a cell function returns.

    Args:
        metrics: The figures of the case's metrics, finite numbers.
        history: One dict per evaluated epoch, ideally with "epoch", "seconds" and metric names.
        info: Facts worth keeping: device, data set hash and sizes.
    """

    metrics: dict[str, float]
    history: tuple[dict[str, float], ...] = ()
    info: dict[str, Any] = dataclasses.field(default_factory=dict)


def resolve(reference: str) -> Callable[..., Any]:
    """Import the function that "module:function" or "file.py:function" names.

    Raises:
        UsageError: If the reference has another form, or the module or function does not exist.

    Examples:
        >>> resolve("math:sqrt")(9.0)
        3.0
    """
    where, colon, name = reference.rpartition(":")
    if not colon or not where or not name:
        raise UsageError(f"expected 'module:function' or 'file.py:function', got {reference!r}")
    module = _load_file(Path(where)) if where.endswith(".py") else _load_module(where)
    try:
        return getattr(module, name)  # type: ignore[no-any-return]
    except AttributeError:
        raise UsageError(f"{where} has no function {name!r}") from None


def _load_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise  # a dependency of the module is missing: that is the message to show
        raise UsageError(f"there is no module {name!r}") from None


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    name = "ballast_bench_file_" + hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
