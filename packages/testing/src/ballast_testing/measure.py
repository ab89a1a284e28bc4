"""What the scripts in `packages/*/benchmarks` share: interleaved timing, peak memory, a description of the machine."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all scripts know."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--repetitions", type=int, default=7, help="measured runs of every side (default: 7)")
    options.add_argument("--warmup", type=int, default=1, help="runs of every side before measuring (default: 1)")
    options.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output", type=Path, help="also write the JSON object to this file")
    options.add_argument("--memory-of", help=argparse.SUPPRESS)  # a worker measures one side in its own process
    return options


def machine(device: str = "cpu") -> dict[str, Any]:
    """Return where and with what the figures were taken."""
    import torch

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def interleaved(
    sides: dict[str, Callable[[], object]],
    *,
    repetitions: int,
    warmup: int = 1,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Time every side once per round, so that all see the same disturbances.

    Args:
        sides: What is compared, by name.
        repetitions: Measured rounds.
        warmup: Rounds before them.
        device: "cpu", or "cuda" to wait for the device before the clock is read.
        clock: `time.perf_counter`, or `time.process_time` where other work runs beside the measurement.

    Returns:
        Seconds of every side: median, lowest, and the quartiles.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warmup + repetitions):
        for name, run in sides.items():
            _finish(device)
            start = clock()
            run()
            _finish(device)
            if number >= warmup:
                seconds[name].append(clock() - start)
    return {name: _summary(values) for name, values in seconds.items()}


def _finish(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def _summary(values: list[float]) -> dict[str, float]:
    low, _middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median_s": statistics.median(values), "min_s": min(values), "q25_s": low, "q75_s": high}


def peak_extra_bytes(run: Callable[[], object], device: str = "cpu") -> int | None:
    """Return by how much `run` raises the memory of this process (resident set, or CUDA allocations) at its peak.

    On Linux the kernel's high-water mark is reset first. Elsewhere the result is None. Call it in a fresh process:
    memory that an earlier run left with the allocator would not be seen again.
    """
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _status_bytes(status, "VmRSS")
    run()
    return _status_bytes(status, "VmHWM") - before


def _status_bytes(status: Path, field: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def in_worker(side: str, arguments: list[str]) -> int | None:
    """Run this script again for the memory of one side, and return the bytes that it prints."""
    command = [sys.executable, sys.argv[0], *arguments, "--memory-of", side]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603  # this very script
    value: int | None = json.loads(out.splitlines()[-1])["peak_extra_bytes"]
    return value


def ratio(a: float | None, b: float | None) -> float | None:
    """Return a / b, or None where one was not measured."""
    return None if a is None or not b else a / b


def emit(result: dict[str, Any], output: Path | None) -> None:
    """Print the result as one JSON object and write it to `output` if given."""
    given = [word for word in sys.argv[1:] if output is None or word not in ("--output", str(output))]
    script = Path(sys.argv[0]).resolve()
    command = " ".join([f"python packages/{script.parents[1].name}/benchmarks/{script.name}", *given])
    text = json.dumps({"command": command, **result}, indent=2)
    sys.stdout.write(text + "\n")
    if output is not None:
        output.write_text(text + "\n")
