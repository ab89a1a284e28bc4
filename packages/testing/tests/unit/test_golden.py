from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from ballast_testing.golden import (
    GoldenCase,
    MissingFunctionError,
    UnhandledFormError,
    check_case,
    golden_cases,
    main,
    run_directory,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TOY = """
from __future__ import annotations
from typing import NamedTuple, Sequence
import warnings
import torch
from torch import Tensor

class Parts(NamedTuple):
    loss: Tensor
    l2: Tensor
    index: Tensor

def squared(x: Tensor, weight: Tensor | float = 1.0, *, reduction: str = "mean") -> Tensor:
    loss = weight * x.square()
    return loss if reduction == "none" else getattr(loss, reduction)()

def doubled(x: Tensor) -> Tensor:
    return 2 * x

def parts(x: Tensor, index: Tensor, *, l2_weight: float = 0.5) -> Parts:
    return Parts(x.sum() + l2_weight * x.square().sum(), x.square().sum(), index.flip(0))

def pair(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.sum(), x.max()

def by_name(x: Tensor) -> dict[str, Tensor]:
    return {"sum": x.sum(), "recall@5": x.max()}

def nested(state: dict[str, Tensor], layers: Sequence[Tensor]) -> Tensor:
    assert all(isinstance(layer, Tensor) for layer in layers)
    return sum(v.square().sum() for v in state.values()) + sum(layer.sum() for layer in layers)

def typed(rows: list[list[int]], ids: Sequence[int], words: list[str], x: Tensor, flags: Tensor, maybe, scale: Tensor):
    assert rows == [[1], [2]] and ids == [] and words == ["a"] and maybe == [1.0, None]
    assert x.dtype == torch.float64 and flags.dtype == torch.bool and scale.shape == ()
    return {"ok": True, "text": "done", "none": None, "ragged": [[1.0], [2.0, 3.0]]}

def empty_index(edge_index: Tensor) -> Tensor:
    assert edge_index.dtype == torch.int64 and edge_index.shape == (2, 0)
    return edge_index.sum()

def warns(x: Tensor) -> Tensor:
    warnings.warn("did not converge")
    return x.sum()

def nan(x: Tensor) -> Tensor:
    return x.sum() * float("nan")

def raises(x: Tensor) -> Tensor:
    raise ValueError("x is bad")

def detached(x: Tensor, y: Tensor) -> Tensor:
    return (x.detach() * y).sum()

constant = 3
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `toy_pkg` on the path and an empty folder of vectors."""
    package = tmp_path / "src" / "toy_pkg"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "losses.py").write_text(TOY)
    (package / "broken.py").write_text("import a_module_that_does_not_exist\n")
    monkeypatch.syspath_prepend(str(tmp_path / "src"))
    yield tmp_path / "golden"
    for name in [name for name in sys.modules if name.split(".")[0] == "toy_pkg"]:
        del sys.modules[name]


def vector(function: str, inputs: Any, expected: Any, **case: Any) -> dict[str, Any]:
    return {
        "function": f"toy_pkg.{function}",
        "cases": [{"name": "one", "inputs": inputs, "expected": expected, **case}],
    }


def write(folder: Path, data: Any, name: str = "file.json", package: str = "toy-pkg") -> None:
    (folder / package).mkdir(parents=True, exist_ok=True)
    (folder / package / name).write_text(data if isinstance(data, str) else json.dumps(data))


def run(folder: Path, data: Any) -> Any:
    write(folder, data)
    (report,) = run_directory(folder)
    return report


SQUARED = vector("losses.squared", {"x": [1.0, 2.0]}, {"loss": 2.5, "grad_x": [1.0, 2.0]}, params={"reduction": "mean"})
GOOD = [
    SQUARED,
    vector("losses.squared", {"x": [1.0, 2.0]}, {"loss": 2.5, "losses": [1.0, 4.0], "grad_x": [1.0, 2.0]}),
    vector("losses.squared", {"x": [3.0], "weight": 2.0}, {"loss": 18.0, "grad_weight": 9.0, "grad_x": [12.0]}),
    vector("losses.squared", {"x": [2, 2]}, {"output": 4.0, "grad_x": [2.0, 2.0]}),
    vector("losses.doubled", {"x": [1.0, 2.0]}, {"mask": [2.0, 4.0]}),
    vector("losses.doubled", {"x": [1.0, 2.0]}, {"y": [2.0, 4.0], "grad_x": [2.0, 6.0]}, upstream={"y": [1.0, 3.0]}),
    vector("losses.doubled", {"x": [1.0, 2.0]}, {"y": [2.0, 4.0], "grad_x_of_sum": [2.0, 2.0]}),
    vector(
        "losses.doubled",
        {"x": [1.0, 2.0]},
        {"out": [2.0, 4.0], "cotangent_used_for_grads": [1.0, 3.0], "grad_x": [2.0, 6.0]},
    ),
    vector(
        "losses.parts",
        {"x": [1.0, 2.0], "index": [1, 2]},
        {"loss": 5.5, "l2_weighted": 2.5, "index": [2, 1], "grad_x": [2.0, 3.0]},
    ),
    vector(
        "losses.parts",
        {"x": [1.0, 2.0], "index": [1, 2]},
        {"loss": 8.0, "l2_weighted": 5.0},
        params={"l2_weight": 1.0},
    ),
    vector("losses.pair", {"x": [1.0, 2.0]}, {"total": 3.0, "largest": 2.0}),
    vector(
        "losses.pair",
        {"x": [1.0, 2.0]},
        {"total": 3.0, "largest": 2.0, "grad_x": [2.0, 5.0]},
        upstream={"total": 2.0, "largest": 3.0},
    ),
    vector("losses.by_name", {"x": [1.0, 2.0]}, {"recall@5": 2.0}),
    vector("losses.by_name", {"x": [1.0, 2.0]}, {"output": {"recall@5": 2.0, "sum": 3.0}}),
    vector(
        "losses.nested",
        {"state": {"w": [[1.0, 2.0]], "b": [3.0]}, "layers": [[[1.0]], [[1.0, 1.0]]]},
        {
            "loss": 17.0,
            "grad_state": {"w": [[2.0, 4.0]], "b": [6.0]},
            "grad_layers": [[[1.0]], [[1.0, 1.0]]],
        },
    ),
    vector(
        "losses.typed",
        {
            "rows": [[1], [2]],
            "ids": [],
            "words": ["a"],
            "x": [1.5],
            "flags": [True],
            "maybe": [1.0, None],
            "scale": 2.0,
        },
        {"ok": True, "text": "done", "none": None, "ragged": [[1.0], [2.0, 3.0]]},
    ),
    vector("losses.empty_index", {"edge_index": [[], []]}, {"output": 0}),
    vector("losses.warns", {"x": [1.0]}, {"output": 1.0}),
    vector("losses.detached", {"x": [1.0], "y": [2.0]}, {"loss": 2.0, "grad_x": [0.0], "grad_y": [1.0]}),
]


@pytest.mark.parametrize("data", GOOD, ids=[f"{i}-{v['function'].split('.')[-1]}" for i, v in enumerate(GOOD)])
def test_every_form_passes_and_every_corruption_fails(toy: Path, data: dict[str, Any]) -> None:
    report = run(toy, data)
    assert (report.passed, report.total, report.ok) == (1, 1, True), report.line()
    for path in number_paths(data["cases"][0]["expected"]):
        bad = copy.deepcopy(data)
        corrupt(bad["cases"][0]["expected"], path)
        report = run(toy, bad)
        assert not report.ok, f"{path} was changed and the case still passed"
        assert report.failed == 1


def number_paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every number of an expected value, but the cotangent, which is an input."""
    if isinstance(value, dict):
        for key, entry in value.items():
            if key != "cotangent_used_for_grads":
                yield from number_paths(entry, (*path, key))
    elif isinstance(value, list):
        for i, entry in enumerate(value):
            yield from number_paths(entry, (*path, i))
    else:
        yield path


def corrupt(expected: Any, path: tuple[Any, ...]) -> None:
    for key in path[:-1]:
        expected = expected[key]
    old = expected[path[-1]]
    if old is None or isinstance(old, str):
        expected[path[-1]] = "other"
    elif isinstance(old, bool):
        expected[path[-1]] = not old
    else:
        expected[path[-1]] = old + 1e-4


def test_the_first_failing_key_is_named(toy: Path) -> None:
    data = copy.deepcopy(SQUARED)
    data["cases"][0]["expected"]["grad_x"][1] = 2.001
    report = run(toy, data)
    assert report.failures[0].key == "grad_x"
    assert "one: grad_x: got 2.0, expected 2.001 at [1]" in report.line()
    assert "0 passed, 1 failed, 0 missing, 1 total" in report.line()


def test_tolerances_of_the_case_hold(toy: Path) -> None:
    data = copy.deepcopy(SQUARED)
    data["cases"][0] |= {"rtol": 1e-2, "expected": {"loss": 2.51}}
    assert run(toy, data).ok
    data["cases"][0]["rtol"] = 1e-3
    assert not run(toy, data).ok
    data["cases"][0]["rtol"] = -1
    assert "'rtol' must be" in run(toy, data).failures[0].message


def test_nan_never_equals_anything(toy: Path) -> None:
    data = vector("losses.nan", {"x": [1.0]}, {"loss": 1.0})
    assert not run(toy, data).ok
    text = json.dumps(vector("losses.nan", {"x": [1.0]}, {"loss": float("nan")}))
    assert "NaN" in text
    assert not run(toy, text).ok
    assert not run(toy, vector("losses.nan", {"x": [1.0]}, {"loss": None})).ok


BAD = [
    (vector("losses.doubled", {"x": [1.0]}, {"output": [[2.0]]}), "shape"),
    (vector("losses.doubled", {"x": [1.0]}, {"output": [2.0, 2.0]}), "shape"),
    (vector("losses.doubled", {"x": [1.0]}, {"output": 2.0}), "expected the number"),
    (vector("losses.doubled", {"x": [1.0]}, {"output": [True]}), "expected booleans"),
    (vector("losses.doubled", {"x": [1.0]}, {"a": [2.0], "b": [2.0]}), r"no output for \['a', 'b'\]"),
    (vector("losses.pair", {"x": [1.0]}, {"a": 1.0, "b": 1.0, "c": 1.0}), "a tuple of 2"),
    (vector("losses.by_name", {"x": [1.0]}, {"recall@7": 1.0}), r"no output for \['recall@7'\]"),
    (vector("losses.parts", {"x": [1.0], "index": [1]}, {"loss": 1.5, "count": 0}), r"no output for \['count'\]"),
    (vector("losses.doubled", {"x": [1.0]}, {"output": [2.0], "grad_x": [2.0]}), "gradients need a scalar"),
    (vector("losses.squared", {"x": [1.0]}, {"loss": 1.0, "grad_z": [2.0]}), "gradient of 'z'"),
    (vector("losses.detached", {"x": [1.0], "y": "z"}, {"loss": 1.0, "grad_y": [1.0]}), ""),
    (
        vector("losses.doubled", {"x": [1.0]}, {"y": [2.0], "grad_x": [2.0]}, upstream={"z": [1.0]}),
        "names the output 'z'",
    ),
    (vector("losses.doubled", {"x": [1.0]}, {"y": [2.0], "grad_x": [2.0]}, upstream={"y": [1.0, 1.0]}), "shape"),
    (vector("losses.raises", {"x": [1.0]}, {"loss": 1.0}), "ValueError: x is bad"),
    (vector("losses.doubled", {"wrong": [1.0]}, {"output": [2.0]}), "TypeError"),
    (vector("losses.doubled", {"x": [1.0]}, {"output": [2.0]}, params={"x": 1}), "both inputs and params"),
    (vector("losses.doubled", {"x": [1.0]}, {}), "'expected' is empty"),
    (vector("losses.doubled", [1.0], {"output": [2.0]}), "'inputs' must be an object"),
    (vector("losses.doubled", {"x": [1.0]}, [2.0]), "'expected' must be an object"),
    (vector("losses.doubled", {"x": [1.0]}, {"output": [2.0]}, dtype="int8"), "'dtype' must be one of"),
    (vector("losses.constant", {}, {"output": 3}), "isn't callable"),
    (vector("broken.f", {}, {"output": 3}), "a_module_that_does_not_exist"),
    (
        {"function": "os.getcwd", "cases": [{"name": "one", "inputs": {}, "expected": {"output": 1}}]},
        "isn't in the package",
    ),
    (
        {"function": "toy_pkg.a or b", "cases": [{"name": "one", "inputs": {}, "expected": {"output": 1}}]},
        "dotted name",
    ),
    ({"cases": [{"name": "one", "inputs": {}, "expected": {"output": 1}}]}, "'function' must be a dotted name"),
    ({"function": "toy_pkg.losses.doubled", "cases": ["case"]}, "a case must be an object"),
]


@pytest.mark.parametrize(("data", "message"), BAD, ids=range(len(BAD)))
def test_bad_vectors_fail_with_a_clear_message(toy: Path, data: dict[str, Any], message: str) -> None:
    report = run(toy, data)
    assert not report.ok
    assert report.failed == report.total == 1
    assert re.search(message, str(report.failures[0])), report.failures[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not readable as JSON"), ("[]", "a list 'cases'"), ('{"cases": 3}', "'cases'"), ('{"cases": []}', "empty")],
)
def test_unreadable_files_are_errors(toy: Path, text: str, message: str) -> None:
    report = run(toy, text)
    assert not report.ok
    assert message in (report.error or "")


def test_missing_functions_fail_unless_only_existing(toy: Path) -> None:
    data = copy.deepcopy(SQUARED)
    data["cases"].append({**data["cases"][0], "name": "two", "function": "toy_pkg.later.loss"})
    write(toy, data)
    (report,) = run_directory(toy)
    assert not report.ok
    assert (report.passed, report.failed, len(report.missing), report.total) == (1, 0, 1, 2)
    (report,) = run_directory(toy, only_existing=True)
    assert report.ok
    assert "1 missing" in report.line()
    assert "toy_pkg.later.loss" in report.line()


def test_a_failure_beside_a_missing_function_still_fails(toy: Path) -> None:
    data = copy.deepcopy(SQUARED)
    data["cases"].append({**data["cases"][0], "name": "two", "function": "toy_pkg.later.loss"})
    data["cases"][0]["expected"]["loss"] = 3.0
    write(toy, data)
    (report,) = run_directory(toy, only_existing=True)
    assert not report.ok
    assert main([str(toy), "--only-existing"]) == 1


def test_empty_lists_take_the_kind_of_the_other_cases(toy: Path) -> None:
    (toy.parent / "src" / "toy_pkg" / "kinds.py").write_text(
        "def kind(a, b, c):\n    return f'{str(a.dtype)} {str(b.dtype)} {c!r}'\n"
    )
    data = vector("kinds.kind", {"a": [], "b": [], "c": []}, {"output": "torch.int64 torch.bool []"})
    data["cases"].append(
        {
            "name": "two",
            "inputs": {"a": [1], "b": [True], "c": ["x"]},
            "expected": {"output": "torch.int64 torch.bool ['x']"},
        }
    )
    assert run(toy, data).passed == 2


def test_run_directory_refuses_nothing_to_do(toy: Path) -> None:
    with pytest.raises(ValueError, match="not a directory"):
        run_directory(toy)
    toy.mkdir()
    with pytest.raises(ValueError, match="no golden vectors"):
        run_directory(toy)
    write(toy, SQUARED)
    with pytest.raises(ValueError, match=r"'toy-pgk'.*did you mean 'toy-pkg'"):
        run_directory(toy, package="toy-pgk")


def test_golden_cases_for_a_package(toy: Path) -> None:
    toy.mkdir()
    (toy / "copied.json").write_text(json.dumps(SQUARED))
    (parameter,) = golden_cases(toy)
    assert parameter.id == "copied::one"
    (case,) = parameter.values
    assert isinstance(case, GoldenCase)
    assert case.package == "toy-pkg"
    assert check_case(case) == {}
    with pytest.raises(AssertionError, match="loss"):
        check_case(GoldenCase(**{**vars(case), "expected": {"loss": 9.0}}))
    with pytest.raises(MissingFunctionError):
        check_case(GoldenCase(**{**vars(case), "function": "toy_pkg.none.none"}))
    with pytest.raises(UnhandledFormError):
        check_case(GoldenCase(**{**vars(case), "expected": {"loss": 2.5, "other": 1.0}}))
    (toy / "copied.json").write_text("{")
    with pytest.raises(ValueError, match="not readable"):
        golden_cases(toy)


def test_exit_codes(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(toy, SQUARED)
    assert main([str(toy)]) == 0
    out = capsys.readouterr().out
    assert "ok      toy-pkg/file.json: 1 passed, 0 failed, 0 missing, 1 total" in out
    assert "golden: 1 passed, 0 failed, 0 missing, 1 total in 1 files" in out
    write(toy, vector("later.f", {}, {"output": 1}), "later.json")
    assert main([str(toy)]) == 1
    assert main([str(toy), "--only-existing"]) == 0
    write(toy, "{", "broken.json")
    assert main([str(toy), "--only-existing"]) == 2
    assert "ERROR   toy-pkg/broken.json" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main([str(toy), "--package", "nope"])
    assert caught.value.code == 2
    assert "no vectors for the package 'nope'" in capsys.readouterr().err


def test_command_line(toy: Path) -> None:
    """Once through a real process: what CI runs."""
    environment = {**os.environ, "PYTHONPATH": str(toy.parent / "src")}
    command = [sys.executable, "-m", "ballast_testing.golden"]

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments], capture_output=True, text=True, timeout=120, check=False, env=environment
        )

    (toy.parent / "src" / "toy_pkg" / "plain.py").write_text("def twice(x):\n    return 2 * x\n")
    write(toy, vector("plain.twice", {"x": 2.0}, {"output": 4.1}))
    done = call(str(toy))
    assert done.returncode == 1
    assert "FAILED  toy-pkg/file.json" in done.stdout
    assert "output: got 4.0, expected 4.1" in done.stdout
    write(toy, vector("plain.twice", {"x": 2.0}, {"output": 4.0}))
    assert call(str(toy), "--package", "toy-pkg").returncode == 0
    empty = toy.parent / "empty"
    empty.mkdir()
    done = call(str(empty))
    assert done.returncode == 1
    assert "no golden vectors" in done.stderr
    assert call(str(toy / "nowhere")).returncode == 2
