"""Run the missing cells of a suite and write one record per cell."""

from __future__ import annotations

import contextlib
import signal
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ballast_bench.errors import unknown
from ballast_bench.meta import environment, now
from ballast_bench.process import local, specification
from ballast_bench.progress import make_progress
from ballast_bench.ray_executor import on_ray
from ballast_bench.store import SCHEMA, Record, Store

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ballast_bench.case import Cell

__all__ = ["EXECUTORS", "RunSummary", "run_cells"]

EXECUTORS = {"local": local, "ray": on_ray}


@dataclass
class RunSummary:
    """What a run did: numbers of cells by outcome, and warnings for people."""

    kept: int = 0
    measured: int = 0
    failed: int = 0
    skipped: int = 0
    warnings: list[str] = field(default_factory=list)


def run_cells(
    store: Store,
    cells: Sequence[Cell],
    *,
    jobs: int,
    executor: str = "local",
    data_root: Path | None = None,
    command: str = "",
    rerun: bool = False,
) -> RunSummary:
    """Measure the cells that the store has no successful record of; each finished cell is on disk before the next.

    Args:
        store: Where the records go; locked for the duration.
        cells: The cells wanted.
        jobs: Processes at a time, >= 1.
        executor: "local" or "ray".
        data_root: Folder of the real data.
        command: The command, for the records.
        rerun: Measure all cells again; older records stay and are superseded.

    Returns:
        Counts and warnings.

    Raises:
        UsageError: If the executor is unknown or not installed.
        ValueError: If `jobs` < 1.
        StoreError: If the store is locked or has another schema.
        OSError: If a record cannot be written; the cells that had finished are kept, the running ones ended.
    """
    if executor not in EXECUTORS:
        raise unknown("executor", executor, EXECUTORS)
    if jobs < 1:
        raise ValueError(f"jobs must be >= 1, got {jobs}")
    with store.lock():
        done = store.done()
        summary = RunSummary()
        summary.warnings = [f"unreadable record {path} ({why}); measured again" for path, why in store.unreadable]
        store.set_unreadable_aside()
        meta = environment()
        missing = [cell for cell in cells if rerun or cell.key not in done]
        summary.kept = len(cells) - len(missing)
        stale = {done[cell.key].meta_info.get("commit") for cell in cells if cell.key in done and not rerun}
        stale -= {meta["commit"]}
        if stale:
            commits = ", ".join(sorted(str(commit)[:10] for commit in stale))
            summary.warnings.append(
                f"kept cells were measured at other commits ({commits}); --rerun measures all again"
            )
        # The longest first: the last cells then end together.
        missing.sort(key=lambda cell: -cell.case.expected)
        _measure(store, missing, summary, jobs, executor, data_root, command, meta)
    return summary


def _measure(
    store: Store,
    cells: Sequence[Cell],
    summary: RunSummary,
    jobs: int,
    executor: str,
    data_root: Path | None,
    command: str,
    meta: dict[str, Any],
) -> None:
    if not cells:
        return
    specs = [specification(cell, data_root) for cell in cells]
    outcomes = EXECUTORS[executor](specs, jobs)
    with make_progress(cells, jobs) as progress, contextlib.closing(outcomes):  # type: ignore[type-var]
        for index, outcome in outcomes:
            cell = cells[index]
            record = _record(cell, outcome, command, meta)
            with _interrupts_held():
                store.append(record)
            summary.measured += record.status == "ok"
            summary.skipped += record.status == "skipped"
            summary.failed += record.status in ("failed", "timeout")
            progress.finished(cell, record.status, outcome["process_seconds"], _headline(cell, outcome))


def _record(cell: Cell, outcome: dict[str, Any], command: str, meta: dict[str, Any]) -> Record:
    info = dict(outcome["info"])
    case = cell.case.description()
    case["id"] = cell.case.id
    run_info = {
        "case": case,
        "method": cell.method,
        "case_order": cell.position,
        "method_order": list(cell.case.methods).index(cell.method),
        "seed": cell.seed,
        "settings": dict(cell.settings),
        "command": command,
        "finished": now(),
    }
    fields = ("status", "metrics", "history", "seconds", "cpu_seconds", "process_seconds", "start_mib", "peak_mib")
    train_info = {name: outcome[name] for name in (*fields, "error")}
    meta_info = {**meta, "device": info.pop("device", "cpu"), "data_sha256": info.pop("data_sha256", None)}
    train_info["info"] = info
    return Record(SCHEMA, cell.key, run_info, train_info, meta_info)


def _headline(cell: Cell, outcome: dict[str, Any]) -> str:
    metric = cell.case.metrics[0]
    value = outcome["metrics"].get(metric.name)
    return "" if value is None else f"{metric.name} {value:.{metric.digits}f}"


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back while a finished cell is written; it is delivered right afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
