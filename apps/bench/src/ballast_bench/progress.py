"""Progress of a run on standard error: a bar on a terminal, plain lines elsewhere; both with rate and ETA."""

from __future__ import annotations

import sys
import time
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ballast_bench.case import Cell

__all__ = ["Eta", "Progress", "make_progress"]


class Eta:
    """Expected remaining wall-clock time from the times of finished cells.

    A waiting cell is expected to take as long as the finished ones of its method and case, else as the case says, scaled
    by how far the finished cells were off.

    Args:
        cells: The cells of the run.
        jobs: How many run at a time.
    """

    def __init__(self, cells: Sequence[Cell], jobs: int) -> None:
        self._left = list(cells)
        self._jobs = jobs
        self._seen: dict[tuple[str, str], list[float]] = {}
        self._ratios: list[float] = []

    def finished(self, cell: Cell, seconds: float) -> None:
        """Note that `cell` took `seconds`."""
        self._left.remove(cell)
        self._seen.setdefault((cell.case.id, cell.method), []).append(seconds)
        self._ratios.append(seconds / cell.case.expected)

    def seconds(self) -> float:
        """Return the expected seconds until the end."""
        scale = median(self._ratios) if self._ratios else 1.0
        work = 0.0
        for cell in self._left:
            seen = self._seen.get((cell.case.id, cell.method))
            work += median(seen) if seen else cell.case.expected * scale
        return work / self._jobs


class Progress(Protocol):
    """What the runner tells while it works."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *details: object) -> None: ...
    def finished(self, cell: Cell, status: str, seconds: float, headline: str) -> None:
        """A cell ended."""


def make_progress(cells: Sequence[Cell], jobs: int) -> Progress:
    """Return a bar when standard error is a terminal, otherwise plain lines."""
    eta = Eta(cells, jobs)
    return _Bar(len(cells), eta) if sys.stderr.isatty() else _Lines(len(cells), eta)


class _Lines:
    def __init__(self, total: int, eta: Eta) -> None:
        self._total, self._eta, self._done, self._start = total, eta, 0, time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        pass

    def finished(self, cell: Cell, status: str, seconds: float, headline: str) -> None:
        self._done += 1
        self._eta.finished(cell, seconds)
        rate = 60 * self._done / max(time.monotonic() - self._start, 1e-9)
        mark = headline if status == "ok" else status.upper()
        print(
            f"[{self._done}/{self._total}] {cell.label}: {mark} in {seconds:.1f} s"
            f" ({rate:.1f} cells/min, {clock(self._eta.seconds())} left)",
            file=sys.stderr,
            flush=True,
        )


class _Bar:
    def __init__(self, total: int, eta: Eta) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        self._eta = eta
        self._bar: Any = RichProgress(
            SpinnerColumn(),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[rate]}  {task.fields[left]} left  [dim]{task.description}"),
            console=Console(stderr=True),
        )
        self._start = time.monotonic()
        self._done = 0
        self._task = self._bar.add_task("", total=total, rate="", left=clock(eta.seconds()))

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._bar.stop()

    def finished(self, cell: Cell, status: str, seconds: float, headline: str) -> None:
        from rich.markup import escape

        self._done += 1
        self._eta.finished(cell, seconds)
        rate = 60 * self._done / max(time.monotonic() - self._start, 1e-9)
        if status not in ("ok", "skipped"):
            self._bar.console.print(f"[red]{status}[/] {escape(cell.label)}")
        self._bar.update(
            self._task,
            advance=1,
            description=escape(f"{cell.label} {headline}"),
            rate=f"{rate:.1f} cells/min",
            left=clock(self._eta.seconds()),
        )


def clock(seconds: float) -> str:
    """Return seconds as m:ss or h:mm:ss.

    Examples:
        >>> clock(65), clock(3725)
        ('1:05', '1:02:05')
    """
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
