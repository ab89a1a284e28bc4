"""The process that runs cells: `python -m ballast_bench.cell`, requests on standard input, one JSON object a line.

It imports what the cells need once (torch and its kin take seconds) and then forks a fresh process for every cell, so
that a cell has its own memory, a crash loses one cell, and none inherits anything from the one before. The runner keeps
the pipe open: when it closes, because the runner ended in whatever way (kill -9 included), both processes end, and no
orphan keeps a core busy.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from ballast_bench.case import CellInput, CellOutput, SkipCell, resolve

__all__ = ["main", "peak_mib"]


def main() -> int:
    """Serve requests until standard input closes; returns the exit code.

    A request names the cell (`specification`), modules to `preload`, and the files for its `log`, `result` (written by
    the cell, absent when it crashed) and `code` (written last: the exit code of the cell's process).
    """
    while line := sys.stdin.buffer.readline():
        request = json.loads(line)
        for module in request["preload"]:
            with contextlib.suppress(ImportError):  # the cell itself says what is missing
                importlib.import_module(module)
        child = os.fork()
        if child == 0:
            _serve_one(request)
        _, status = os.waitpid(child, 0)
        _write(Path(request["code"]), str(os.waitstatus_to_exitcode(status)))
    return 0


def _serve_one(request: dict[str, Any]) -> NoReturn:
    code = 1
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        threading.Thread(target=_end_with_parent, daemon=True).start()
        outcome = run_cell(request["specification"])
        _write(Path(request["result"]), json.dumps(outcome, allow_nan=False))
        code = 0
    except BaseException:  # noqa: BLE001 - the log is all that is left to tell
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def run_cell(specification: dict[str, Any]) -> dict[str, Any]:
    """Run the function that the specification names and return the outcome: status, metrics, times, memory."""
    function = resolve(specification["run"])
    given = CellInput(
        case=specification["case"],
        dataset=specification["dataset"],
        method=specification["method"],
        settings=specification["settings"],
        seed=specification["seed"],
        data_root=Path(specification["data_root"]) if specification["data_root"] else None,
    )
    outcome: dict[str, Any] = {"status": "failed", "metrics": {}, "history": [], "info": {}, "error": None}
    start, cpu_start, base = time.perf_counter(), time.process_time(), peak_mib()
    try:
        output: CellOutput = function(given)
        outcome["metrics"] = _checked(output, specification["metrics"])
        outcome["history"] = [_finite(row) for row in output.history]
        outcome["info"] = output.info
        outcome["status"] = "ok"
    except SkipCell as reason:
        outcome.update(status="skipped", error=str(reason))
    except Exception:  # noqa: BLE001 - whatever a method raises is its result
        outcome["error"] = tail(traceback.format_exc())
    outcome["seconds"] = time.perf_counter() - start
    outcome["cpu_seconds"] = time.process_time() - cpu_start
    outcome["start_mib"] = base
    outcome["peak_mib"] = peak_mib()
    return outcome


def peak_mib() -> float:
    """Return the peak resident memory of this process in MiB.

    Linux keeps the larger of parent and child in `ru_maxrss` across fork, hence VmHWM where it exists.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / 1024


def tail(text: str, limit: int = 4000) -> str:
    """Return the last `limit` characters of `text`."""
    return text if len(text) <= limit else "..." + text[-limit:]


def _checked(output: CellOutput, names: list[str]) -> dict[str, float]:
    missing = [name for name in names if name not in output.metrics]
    if missing:
        raise ValueError(f"the cell returned no {', '.join(missing)}; it returned {', '.join(output.metrics) or '-'}")
    bad = {name: value for name, value in output.metrics.items() if not math.isfinite(value)}
    if bad:
        raise ValueError(f"metrics must be finite, got {bad}")
    return {name: float(value) for name, value in output.metrics.items()}


def _finite(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if isinstance(value, int | float) and math.isfinite(value)}


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
