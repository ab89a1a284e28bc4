"""Where a figure comes from: versions, commit, machine."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["cpu_count", "environment", "find_data_root", "now"]

_PACKAGES = (
    "ballast-bench",
    "recsys-losses",
    "torch",
    "torch-geometric",
    "numpy",
    "scipy",
)


def now() -> str:
    """Return the time in UTC, ISO 8601 with microseconds: it sorts as text."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="microseconds")


def cpu_count() -> int:
    """Return the number of CPUs this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def environment() -> dict[str, Any]:
    """Return versions, git commit, and the machine as JSON values; imports nothing heavy."""
    commit, dirty = _git_state()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cpu_count": cpu_count(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
        "commit": commit,
        "dirty": dirty,
    }


def find_data_root(given: Path | None) -> Path | None:
    """Return the folder of the real data: given, else BALLAST_DATA, else `shared/data` in a parent folder, else None.

    Raises:
        FileNotFoundError: If the folder was named (argument or variable) and does not exist.
    """
    named = given or (Path(value) if (value := os.environ.get("BALLAST_DATA")) else None)
    if named is not None:
        if not named.is_dir():
            raise FileNotFoundError(f"data root {named} does not exist or is not a folder")
        return named.resolve()
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "shared" / "data").is_dir():
            return folder / "shared" / "data"
    return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state() -> tuple[str | None, bool | None]:
    folder = Path(__file__).resolve().parent
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None, None
    # A wheel inside somebody's repository (site-packages in .venv) must not report that repository's commit.
    if _git(folder, "ls-files", "--error-unmatch", "errors.py") is None and "site-packages" in folder.parts:
        return None, None
    status = _git(folder, "status", "--porcelain", "--untracked-files=normal", ":/")
    return commit, None if status is None else bool(status)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(  # noqa: S603
            ["git", "-C", str(folder), *arguments],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
