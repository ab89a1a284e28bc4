"""pytest plug-in: one thread per process, the data-root fixture, skips with a reason for missing hardware.

Every run of the workspace loads this module, so it imports nothing but pytest and the standard library.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# Two threads on a busy two-core machine were twenty times slower than one. This reaches every library that is loaded
# later, and child processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def find_data_root(start: Path | None = None) -> Path | None:
    """Return the folder of the real data sets, or None.

    Args:
        start: Where the upward search for `shared/data` begins; the current directory by default.

    Returns:
        `$BALLAST_DATA` if set, else the first `shared/data` in `start` or one of its parents, else None.
    """
    named = os.environ.get("BALLAST_DATA")
    if named:
        return Path(named)
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / "shared" / "data").is_dir():
            return folder / "shared" / "data"
    return None


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the switch for tests that need the internet."""
    group = parser.getgroup("ballast")
    group.addoption(
        "--network", action="store_true", help="run tests marked network (default: skip, unless -m names it)"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers, for packages that are tested outside the workspace."""
    config.addinivalue_line("markers", "gpu: needs CUDA; skipped, with the reason, where there is none")
    config.addinivalue_line("markers", "network: needs the internet; skipped unless --network or -m network")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what can't run here, each with its reason."""
    network = config.getoption("--network") or "network" in (config.getoption("-m", default="") or "")
    gpu_reason: str | None = None
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            # Asked once, and only if there is such a test: torch is slow to import.
            gpu_reason = _why_no_gpu() if gpu_reason is None else gpu_reason
            if gpu_reason:
                item.add_marker(pytest.mark.skip(reason=gpu_reason))
        if not network and item.get_closest_marker("network") is not None:
            item.add_marker(pytest.mark.skip(reason="needs the internet; run with --network"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Hold torch to one thread, if collecting the tests has imported it."""
    del session
    _one_torch_thread()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    _one_torch_thread()


def _one_torch_thread() -> None:
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


def _why_no_gpu() -> str:
    """Return why a GPU test can't run, or the empty string."""
    try:
        import torch
    except ImportError:
        return "needs CUDA; torch is not installed"
    return "" if torch.cuda.is_available() else "needs CUDA; torch.cuda.is_available() is False"


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder with the real data sets; the test is skipped, with the reason, where it is absent."""
    root = find_data_root()
    if root is None or not root.is_dir():
        pytest.skip(f"real data not found (BALLAST_DATA={os.environ.get('BALLAST_DATA')!r}, no shared/data above)")
    return root
