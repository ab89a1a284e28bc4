"""A cell as a child process: start, poll, time limit, outcome. Both executors use it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ballast_bench.cell import tail

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType
    from typing import Self

__all__ = ["CellProcess", "local", "run_one", "specification"]

# One thread per process: on a busy 2-core machine two threads were measured 20 times slower.
_ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)
_POLL_SECONDS = 0.05


def specification(cell: Any, data_root: Path | None) -> dict[str, Any]:
    """Return what a cell process needs to know about `cell`, as JSON values."""
    return {
        "run": cell.case.run,
        "case": cell.case.name,
        "dataset": cell.case.dataset,
        "method": cell.method,
        "settings": dict(cell.settings),
        "seed": cell.seed,
        "metrics": [metric.name for metric in cell.case.metrics],
        "data_root": None if data_root is None else str(data_root),
        "budget": cell.case.budget,
    }


class CellProcess:
    """A running cell; use as a context manager, which kills it when it is left early.

    Args:
        spec: From `specification`.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self._spec = spec
        self._folder = tempfile.TemporaryDirectory(prefix="ballast-cell-", ignore_cleanup_errors=True)
        folder = Path(self._folder.name)
        self._result, self._log = folder / "result.json", folder / "log.txt"
        self._start = time.monotonic()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", "ballast_bench.cell", str(self._result)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **_ONE_THREAD, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # Ctrl-C reaches the runner only, which then ends its cells
            )
        stdin = self._process.stdin
        if stdin is None:
            raise RuntimeError("the cell process has no standard input")
        with contextlib.suppress(BrokenPipeError):  # it died at once: `poll` tells why
            stdin.write(json.dumps(spec).encode() + b"\n")
            stdin.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def poll(self) -> dict[str, Any] | None:
        """Return the outcome, or None while the cell runs. A cell over its budget is killed."""
        code = self._process.poll()
        elapsed = time.monotonic() - self._start
        if code is None and elapsed <= self._spec["budget"]:
            return None
        if code is None:
            self._kill()
            return self._failure("timeout", f"killed after {elapsed:.0f} s, the budget is {self._spec['budget']:g} s")
        try:
            outcome: dict[str, Any] = json.loads(self._result.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return self._failure("failed", _ending(code))
        if outcome["status"] == "failed" and outcome["error"] is None:
            outcome["error"] = self._tail()
        outcome["process_seconds"] = elapsed
        return outcome

    def close(self) -> None:
        """End the process if it still runs, and remove its scratch folder."""
        self._kill()
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        self._folder.cleanup()

    def _kill(self) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _failure(self, status: str, reason: str) -> dict[str, Any]:
        log = self._tail()
        return {
            "status": status,
            "metrics": {},
            "history": [],
            "info": {},
            "error": f"{reason}\n{log}".strip(),
            "seconds": time.monotonic() - self._start,
            "cpu_seconds": None,
            "start_mib": None,
            "peak_mib": None,
            "process_seconds": time.monotonic() - self._start,
        }

    def _tail(self) -> str:
        try:
            return tail(self._log.read_text(encoding="utf-8", errors="replace"))
        except OSError:
            return ""


def run_one(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Run one cell to its end in a child process and return the outcome."""
    with CellProcess(spec) as process:
        while (outcome := process.poll()) is None:
            time.sleep(_POLL_SECONDS)
        return outcome


def local(specs: Sequence[Mapping[str, Any]], jobs: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Run cells on this machine, `jobs` at a time; yield (index, outcome) as they end.

    Closing the generator (or an exception in it) ends the running cells.
    """
    waiting = list(range(len(specs)))[::-1]
    running: dict[int, CellProcess] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                index = waiting.pop()
                running[index] = CellProcess(specs[index])
            ended = [(index, outcome) for index, cell in running.items() if (outcome := cell.poll()) is not None]
            for index, outcome in ended:
                running.pop(index).close()
                yield index, outcome
            if not ended:
                time.sleep(_POLL_SECONDS)
    finally:
        for cell in running.values():
            cell.close()


def _ending(code: int) -> str:
    if code >= 0:
        return f"the cell process ended with exit code {code} and no result"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = str(-code)
    return f"the cell process was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
