"""What every command prints and writes: results on standard output, progress on standard error, files atomically."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ballast_bench.store import write_atomic

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file, and the folders above it, so that a crash leaves the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def print_result(result: Mapping[str, Any], *, as_json: bool) -> None:
    """Print a result for a person (one line per entry) or, with `as_json`, as one JSON object."""
    if as_json:
        sys.stdout.write(json.dumps(result, allow_nan=False) + "\n")
        return
    console = Console(highlight=False, soft_wrap=True)
    width = max((len(key) for key in result), default=0)
    for key, value in result.items():
        shown = f"{value:.4f}" if isinstance(value, float) else str(value)
        console.print(f"{key:<{width}}  {shown}", markup=False)


class EpochProgress:
    """Progress over epochs on standard error: a bar with rate and time left, or plain lines when not a terminal."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._total = total
        self._quiet = quiet
        self._bar: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if not self._quiet and self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            times = (TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn())
            self._bar = Progress(*columns, *times, console=self._console)
            self._task = self._bar.add_task("epoch", total=self._total, rate="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, record: Mapping[str, Any]) -> None:
        """Show one finished epoch: `record` is an entry of the training history."""
        epoch, loss, seconds = record["epoch"] + 1, record["loss"], record["seconds"]
        rate = f"{1 / seconds:.1f} epochs/s" if seconds > 0 else ""
        metrics = {k: v for k, v in record.items() if isinstance(v, float) and "@" in k}
        if self._bar is not None:
            shown = " ".join(f"{k} {v:.4f}" for k, v in metrics.items())
            self._bar.update(self._task, completed=epoch, rate=rate, description=f"loss {loss:.4f} {shown}")
        elif not self._quiet and (metrics or epoch == self._total):
            left = (self._total - epoch) * seconds
            shown = " ".join(f"{k}={v:.4f}" for k, v in metrics.items())
            self._console.print(
                f"epoch {epoch}/{self._total} loss={loss:.4f} {shown} {rate} eta={left:.0f}s", markup=False
            )
