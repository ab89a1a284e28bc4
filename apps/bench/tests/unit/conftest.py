from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ballast_bench.app import app
from ballast_bench.case import resolve
from ballast_bench.runner import run_cells
from ballast_bench.store import Store
from ballast_bench.suites import select_cells

if TYPE_CHECKING:
    from collections.abc import Callable

TOY_FILE = Path(__file__).with_name("toy_suite.py")


@pytest.fixture(scope="session")
def toy_file() -> Path:
    return TOY_FILE


@pytest.fixture(scope="session")
def toys() -> Any:
    """The toy suite as a module."""
    import sys

    return sys.modules[resolve(f"{TOY_FILE}:toy").__module__]


@pytest.fixture
def bench() -> Callable[..., int]:
    """Run `ballast bench ...` in this process and return its exit code."""

    def call(*words: object) -> int:
        try:
            app([str(word) for word in words])
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return call


@pytest.fixture
def measured(tmp_path: Path) -> Callable[..., Store]:
    """Measure cases into a new store and return it."""

    def measure(*cases: Any, name: str = "store") -> Store:
        store = Store(tmp_path / name, create=True)
        run_cells(store, select_cells(cases), jobs=2)
        return store

    return measure
