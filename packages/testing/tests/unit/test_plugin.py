from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from ballast_testing.plugin import find_data_root

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ["pytester"]

GPU = "import pytest\n@pytest.mark.gpu\ndef test_gpu():\n    raise AssertionError('ran')\ndef test_plain():\n    pass\n"
NETWORK = GPU.replace("gpu", "network").replace("raise AssertionError('ran')", "pass")


OURS = ("-p", "ballast_testing.plugin")


@pytest.fixture(autouse=True)
def _only_our_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading every installed plugin anew takes seconds per inner run."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


def test_gpu_tests_are_skipped_with_a_reason(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pytester.makepyfile(GPU)
    result = pytester.runpytest_inprocess(*OURS, "-rs")
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines("*needs CUDA; torch.cuda.is_available() is False*")


def test_gpu_tests_run_where_there_is_one(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    pytester.makepyfile(GPU)
    pytester.runpytest_inprocess(*OURS).assert_outcomes(passed=1, failed=1)


def test_network_tests_run_only_when_asked(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(NETWORK)
    result = pytester.runpytest_inprocess(*OURS, "-rs")
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines("*needs the internet; run with --network*")
    pytester.runpytest_inprocess(*OURS, "--network").assert_outcomes(passed=2)
    pytester.runpytest_inprocess(*OURS, "-m", "network").assert_outcomes(passed=1, deselected=1)
    pytester.runpytest_inprocess(*OURS, "-m", "not network").assert_outcomes(passed=1, deselected=1)


def test_torch_gets_one_thread(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        "import torch\ntorch.set_num_threads(2)\ndef test_one():\n    assert torch.get_num_threads() == 1\n"
    )
    pytester.runpytest_inprocess(*OURS).assert_outcomes(passed=1)


def test_torch_is_not_imported_for_those_who_need_none(tmp_path: Path) -> None:
    (tmp_path / "test_lean.py").write_text(
        "import os, sys\n"
        "def test_lean():\n"
        "    assert not {'torch', 'numpy'} & set(sys.modules)\n"
        "    assert os.environ['OMP_NUM_THREADS'] == '1'\n"
    )
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "ballast_testing.plugin", "--rootdir", ".", "test_lean.py"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_data_root_is_searched_upwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BALLAST_DATA", raising=False)
    (tmp_path / "shared" / "data").mkdir(parents=True)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert find_data_root(tmp_path / "a" / "b") == tmp_path / "shared" / "data"
    monkeypatch.setenv("BALLAST_DATA", str(tmp_path / "elsewhere"))
    assert find_data_root(tmp_path) == tmp_path / "elsewhere"


def test_data_root_skips_with_a_reason(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BALLAST_DATA", str(pytester.path / "nowhere"))
    pytester.makepyfile("def test_data(data_root):\n    raise AssertionError('ran')\n")
    result = pytester.runpytest_inprocess(*OURS, "-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines("*real data not found*nowhere*")
