"""Cells as child processes: start, poll, time limit, outcome. Both executors use it."""

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

__all__ = ["Worker", "failure", "local", "run_one", "specification"]

# One thread per process: on a busy 2-core machine two threads were measured 20 times slower.
_ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)
_POLL_SECONDS = 0.05
# Libraries of Hugging Face look for a newer file, or report their use, wherever they aren't told to stay here.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


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
        "preload": list(cell.case.preload),
    }


class Worker:
    """A child process that runs cells one after the other, each in a process forked from it.

    Use as a context manager, which ends it.

    Args:
        preload: Modules it imports before the first cell.
    """

    def __init__(self, preload: Sequence[str] = ()) -> None:
        self.preload = tuple(preload)
        self._folder = tempfile.TemporaryDirectory(prefix="ballast-cell-", ignore_cleanup_errors=True)
        self._log = Path(self._folder.name) / "log.txt"
        self._result = self._log.with_name("result.json")
        self._code = self._log.with_name("code.txt")
        self._spec: Mapping[str, Any] = {}
        self._start = 0.0
        self._ended = False
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ballast_bench.cell"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **_ONE_THREAD, **_OFFLINE, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # Ctrl-C reaches the runner only, which then ends its cells
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether it can take another cell."""
        return self._process.poll() is None

    def submit(self, spec: Mapping[str, Any]) -> None:
        """Start a cell; the one before must have ended.

        Args:
            spec: From `specification`.
        """
        for file in (self._result, self._code):
            file.unlink(missing_ok=True)
        self._log.write_bytes(b"")
        self._spec, self._start = spec, time.monotonic()
        request = {
            "specification": spec,
            "preload": self.preload,
            "log": str(self._log),
            "result": str(self._result),
            "code": str(self._code),
        }
        stdin = self._process.stdin
        if stdin is None:
            raise RuntimeError("the worker has no standard input")
        with contextlib.suppress(BrokenPipeError):  # it died: `poll` tells why
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()

    def poll(self) -> dict[str, Any] | None:
        """Return the outcome of the cell, or None while it runs. A cell over its budget is killed with its worker."""
        elapsed = time.monotonic() - self._start
        dead = self._process.poll()
        if self._code.exists():
            return self._outcome(int(self._code.read_text(encoding="utf-8")), elapsed)
        if dead is not None:
            return self._failure("failed", _ending(dead))
        if elapsed > self._spec["budget"]:
            self._kill()
            return self._failure("timeout", f"killed after {elapsed:.0f} s, the budget is {self._spec['budget']:g} s")
        return None

    def close(self) -> None:
        """End the process and its cell, if they still run, and remove the scratch folder."""
        self._kill()
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        self._folder.cleanup()

    def _outcome(self, code: int, elapsed: float) -> dict[str, Any]:
        try:
            outcome: dict[str, Any] = json.loads(self._result.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return self._failure("failed", _ending(code))
        outcome["process_seconds"] = elapsed
        return outcome

    def _kill(self) -> None:
        if self._ended:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):  # the cell may outlive its worker
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._ended = True

    def _failure(self, status: str, reason: str) -> dict[str, Any]:
        log = self._tail()
        seconds = time.monotonic() - self._start
        return failure(status, f"{reason}\n{log}".strip(), seconds)

    def _tail(self) -> str:
        try:
            return tail(self._log.read_text(encoding="utf-8", errors="replace"))
        except OSError:
            return ""


def failure(status: str, reason: str, seconds: float) -> dict[str, Any]:
    """Return the outcome of a cell that left none itself."""
    return {
        "status": status,
        "metrics": {},
        "history": [],
        "info": {},
        "error": reason,
        "seconds": seconds,
        "cpu_seconds": None,
        "start_mib": None,
        "peak_mib": None,
        "process_seconds": seconds,
    }


def run_one(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Run one cell to its end in a worker of its own and return the outcome."""
    with Worker(spec["preload"]) as worker:
        worker.submit(spec)
        while (outcome := worker.poll()) is None:
            time.sleep(_POLL_SECONDS)
        return outcome


def local(specs: Sequence[Mapping[str, Any]], jobs: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Run cells on this machine, `jobs` at a time; yield (index, outcome) as they end.

    Closing the generator (or an exception in it) ends the running cells.
    """
    waiting = list(range(len(specs)))[::-1]
    idle: list[Worker] = []
    running: dict[int, Worker] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                index = waiting.pop()
                worker = _worker(idle, specs[index]["preload"])
                running[index] = worker
                worker.submit(specs[index])
            ended = [(index, outcome) for index, worker in running.items() if (outcome := worker.poll()) is not None]
            for index, outcome in ended:
                idle.append(running.pop(index))
                yield index, outcome
            if not ended:
                time.sleep(_POLL_SECONDS)
    finally:
        for worker in (*idle, *running.values()):
            worker.close()


def _worker(idle: list[Worker], preload: Sequence[str]) -> Worker:
    """Return an idle worker with these modules; those with others are ended, their memory is needed."""
    for worker in [worker for worker in idle if not worker.alive or worker.preload != tuple(preload)]:
        idle.remove(worker)
        worker.close()
    return idle.pop() if idle else Worker(preload)


def _ending(code: int) -> str:
    if code >= 0:
        return f"the cell process ended with exit code {code} and no result"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = str(-code)
    return f"the cell process was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
