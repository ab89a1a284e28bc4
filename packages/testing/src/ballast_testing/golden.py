"""The golden runner: every vector of a directory against the installed packages.

`python -m ballast_testing.golden DIR [--package P] [--only-existing]` prints one line per file and exits 1 if anything
failed, 2 if it could not read what it was asked to read. Nothing is skipped silently: a function that doesn't exist,
a form the runner doesn't know and a directory without vectors are failures.

The format is described in this package's README.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ballast_testing._golden_values import (
    compare,
    is_tensor,
    kind_of,
    parameters_of,
    takes_only_tensor,
    tensors_in,
    to_argument,
    wanted,
)
from ballast_testing.golden_adapters import Adapter, adapter_for

if TYPE_CHECKING:
    import inspect
    from collections.abc import Iterator, Sequence

    from _pytest.mark import ParameterSet

__all__ = [
    "CaseFailure",
    "FileReport",
    "GoldenCase",
    "MissingFunctionError",
    "UnhandledFormError",
    "check_case",
    "golden_cases",
    "main",
    "run_directory",
]

_COTANGENT = "cotangent_used_for_grads"
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_DTYPES = ("float64", "float32")


class MissingFunctionError(LookupError):
    """The vector's function does not exist (yet)."""


class UnhandledFormError(ValueError):
    """The vector has a form that the runner does not understand; always a failure."""


@dataclass(frozen=True)
class GoldenCase:
    """One case of a golden file.

    Attributes:
        package: Distribution name, the folder of the file.
        file: Path of the file relative to the directory that was run.
        name: Name of the case.
        function: Dotted name, the case's own or else the file's.
        inputs: JSON inputs by argument name.
        params: JSON hyper-parameters by argument name.
        expected: JSON results by key.
        cotangents: Per output, the factor under the sum whose gradient is expected; None if the file gives none.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        dtype: dtype of floating inputs.
        kinds: Kind of the leaves that each input has in the function's other cases; types empty lists.
    """

    package: str
    file: str
    name: str
    function: str
    inputs: Mapping[str, Any]
    params: Mapping[str, Any]
    expected: Mapping[str, Any]
    cotangents: Mapping[str, Any] | None = None
    rtol: float = 1e-6
    atol: float = 1e-8
    dtype: str = "float64"
    kinds: Mapping[str, str] = field(default_factory=dict)

    @property
    def outputs(self) -> list[str]:
        """Expected keys that name outputs, in the order of the file."""
        return [key for key in self.expected if key != _COTANGENT and self.gradient_input(key) is None]

    def gradient_input(self, key: str) -> str | None:
        """Return the input whose gradient an expected key holds, or None if the key names an output."""
        if not key.startswith("grad_"):
            return None
        name = key.removeprefix("grad_")
        return name if name in self.inputs or name in self.params else name.removesuffix("_of_sum")


@dataclass(frozen=True)
class CaseFailure:
    """One failed case: its name, the first key that differs ("" if it did not get that far) and why."""

    case: str
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.case}: {self.key + ': ' if self.key else ''}{self.message}"


@dataclass
class FileReport:
    """What happened to the cases of one file.

    Attributes:
        package: Distribution name.
        file: Path relative to the directory.
        passed: Number of cases that passed.
        missing: Names of the functions that don't exist, by case.
        failures: Cases that failed.
        error: Why the file could not be read, or None.
        reference_only: Expected keys that were not compared, with the reason.
        missing_is_failure: Whether missing functions make the file fail.
    """

    package: str
    file: str
    passed: int = 0
    missing: dict[str, str] = field(default_factory=dict)
    failures: list[CaseFailure] = field(default_factory=list)
    error: str | None = None
    reference_only: dict[str, str] = field(default_factory=dict)
    missing_is_failure: bool = True

    @property
    def failed(self) -> int:
        """Number of cases that failed; missing functions are counted apart."""
        return len(self.failures)

    @property
    def total(self) -> int:
        """Number of cases in the file."""
        return self.passed + self.failed + len(self.missing)

    @property
    def ok(self) -> bool:
        """Whether the file counts as passed."""
        return not (self.error or self.failures or (self.missing and self.missing_is_failure)) and self.total > 0

    def line(self) -> str:
        """Return the line that the command prints."""
        if self.error:
            return f"ERROR   {self.file}: {self.error}"
        status = "ok" if self.ok and not self.missing else "missing" if not self.failures else "FAILED"
        counts = f"{self.passed} passed, {self.failed} failed, {len(self.missing)} missing, {self.total} total"
        text = f"{status:<7} {self.file}: {counts}"
        if self.failures:
            text += f"; first failure: {self.failures[0]}"
        if self.missing:
            text += f"; no function {', '.join(sorted(set(self.missing.values())))}"
        if self.reference_only:
            reasons = "; ".join(f"{key} ({reason})" for key, reason in self.reference_only.items())
            text += f"; not compared: {reasons}"
        return text


# --- reading -----------------------------------------------------------------------------------------------------------


def _vector_files(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise ValueError(f"not a directory: {directory}")
    return sorted(path for path in directory.rglob("*.json") if path.is_file())


def _package_of(directory: Path, path: Path) -> str | None:
    """Return the distribution that a file belongs to: its folder, or for files in the root whatever they name."""
    parts = path.relative_to(directory).parts
    return parts[0] if len(parts) > 1 else None


def _read_file(directory: Path, path: Path, missing_is_failure: bool = True) -> tuple[FileReport, list[GoldenCase]]:
    """Parse one file; cases that are malformed are failures of the report already."""
    relative = path.relative_to(directory).as_posix()
    report = FileReport(_package_of(directory, path) or "", relative, missing_is_failure=missing_is_failure)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        report.error = f"not readable as JSON: {error}"
        return report, []
    if not isinstance(data, dict) or not isinstance(data.get("cases"), list):
        report.error = "expected an object with a list 'cases'"
        return report, []
    if not data["cases"]:
        report.error = "'cases' is empty"
        return report, []
    cases = []
    for i, raw in enumerate(data["cases"]):
        try:
            cases.append(_read_case(raw, data, report))
        except UnhandledFormError as error:
            name = raw.get("name", f"case {i}") if isinstance(raw, dict) else f"case {i}"
            report.failures.append(CaseFailure(str(name), "", f"unhandled form: {error}"))
    return report, cases


def _read_case(raw: Any, data: dict[str, Any], report: FileReport) -> GoldenCase:
    if not isinstance(raw, dict):
        raise UnhandledFormError(f"a case must be an object, got {type(raw).__name__}")
    for key in ("inputs", "params", "expected"):
        if not isinstance(raw.get(key, {} if key == "params" else None), dict):
            raise UnhandledFormError(f"{key!r} must be an object, got {raw.get(key)!r:.80}")
    if not raw["expected"]:
        raise UnhandledFormError("'expected' is empty")
    function = raw.get("function", data.get("function"))
    if not isinstance(function, str):
        raise UnhandledFormError(f"'function' must be a dotted name, got {function!r}")
    dtype = raw.get("dtype", data.get("dtype", "float64"))
    if dtype not in _DTYPES:
        raise UnhandledFormError(f"'dtype' must be one of {_DTYPES}, got {dtype!r}")
    report.package = report.package or function.split(".")[0].replace("_", "-")
    tolerances = {key: raw.get(key, data.get(key, default)) for key, default in (("rtol", 1e-6), ("atol", 1e-8))}
    for key, value in tolerances.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise UnhandledFormError(f"{key!r} must be a finite number >= 0, got {value!r}")
    return GoldenCase(
        package=report.package,
        file=report.file,
        name=str(raw.get("name", "unnamed")),
        function=function,
        inputs=raw["inputs"],
        params=raw.get("params", {}),
        expected=raw["expected"],
        cotangents=_cotangents(raw, data),
        dtype=dtype,
        kinds=_kinds(function, data),
        **tolerances,
    )


def _cotangents(raw: dict[str, Any], data: dict[str, Any]) -> dict[str, Any] | None:
    """Collect `upstream` (by output) or `cotangent_used_for_grads` (for the only output)."""
    upstream = raw.get("upstream", data.get("upstream"))
    single = raw["expected"].get(_COTANGENT, raw.get(_COTANGENT))
    if upstream is not None and single is not None:
        raise UnhandledFormError(f"both 'upstream' and {_COTANGENT!r} are given")
    if single is not None:
        return single if isinstance(single, dict) else {"": single}
    if upstream is None or isinstance(upstream, dict):
        return upstream
    return {"": upstream}


def _kinds(function: str, data: dict[str, Any]) -> dict[str, str]:
    """Find what the inputs of a function hold where they aren't empty."""
    kinds: dict[str, str] = {}
    for raw in data["cases"]:
        inputs = raw.get("inputs") if isinstance(raw, dict) else None
        if not isinstance(inputs, dict) or raw.get("function", data.get("function")) != function:
            continue
        for name, value in inputs.items():
            kind = kind_of(value) if isinstance(value, list) else None
            if kind is not None:
                kinds[name] = "float" if {kind, kinds.get(name)} == {"int", "float"} else kind
    return kinds


# --- running one case --------------------------------------------------------------------------------------------------


def _resolve(name: str, package: str) -> Any:
    """Import what a dotted name of a package refers to."""
    if not _DOTTED.fullmatch(name):
        raise UnhandledFormError(f"{name!r} isn't a dotted name")
    root = package.replace("-", "_")
    parts = name.split(".")
    if parts[0] != root:
        raise UnhandledFormError(f"{name!r} isn't in the package {root!r}")
    found = None
    depth = 0
    for i in range(1, len(parts)):
        module = ".".join(parts[:i])
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            # Another module that is missing is a broken import of an existing one: a failure, not a missing function.
            if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
                raise
            break
        depth = i
    if found is None:
        raise MissingFunctionError(name)
    for part in parts[depth:]:
        if not hasattr(found, part):
            raise MissingFunctionError(name)
        found = getattr(found, part)
    if not callable(found):
        raise UnhandledFormError(f"{name!r} isn't callable")
    return found


class _MismatchError(AssertionError):
    """A key that differs."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}")
        self.key = key
        self.message = message


def check_case(case: GoldenCase) -> dict[str, str]:
    """Run one case.

    Args:
        case: The case, from `golden_cases`.

    Returns:
        Expected keys that are not compared, with the reason (empty for nearly all functions).

    Raises:
        AssertionError: If a key differs.
        MissingFunctionError: If the function does not exist.
        UnhandledFormError: If the runner does not understand the case.
    """
    adapter = adapter_for(case.function)

    def resolve(name: str) -> Any:
        return _resolve(name, case.package)

    # What a function warns about (no convergence, say) is checked through the numbers.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if adapter.run is not None:
            arguments = _arguments(case, {}, adapter)
            results = adapter.run(case, arguments, resolve)
        else:
            function = resolve(case.function)
            arguments = _arguments(case, parameters_of(function), adapter)
            results = _call(case, function, arguments, adapter, resolve)
    for key, expected in case.expected.items():
        if key == _COTANGENT or key in adapter.reference_only:
            continue
        if key not in results:
            raise UnhandledFormError(f"nothing was returned for {key!r}; there is {sorted(results)}")
        _compare_key(case, adapter, key, results[key], expected)
    return {key: reason for key, reason in adapter.reference_only.items() if key in case.expected}


def _compare_key(case: GoldenCase, adapter: Adapter, key: str, actual: Any, expected: Any) -> None:
    if expected is None and adapter.null_is_nan:
        number = float(actual)
        if number == number:  # noqa: PLR0124 (NaN is the only number unequal to itself)
            raise _MismatchError(key, f"got {number!r}, expected NaN")
        return
    canonical = adapter.canonical.get(key)
    if canonical is not None:
        actual, expected = canonical(actual), canonical(expected)
    message = compare(actual, expected, case.rtol, case.atol)
    if message:
        raise _MismatchError(key, message)


def _arguments(case: GoldenCase, parameters: Mapping[str, inspect.Parameter], adapter: Adapter) -> dict[str, Any]:
    """Convert inputs and params to the arguments of the call."""
    learned = {case.gradient_input(key) for key in case.expected}
    both = sorted(set(case.inputs) & set(case.params))
    if both:
        raise UnhandledFormError(f"{both} are both inputs and params")
    arguments: dict[str, Any] = {}
    for name, value in case.inputs.items():
        parameter = parameters.get(name)
        want = wanted(parameter)
        if want == "auto" or (want == "python" and name in learned):
            want = adapter.want.get(name, "auto")
        needs_tensor = name in learned or (isinstance(value, (int, float)) and takes_only_tensor(parameter))
        if needs_tensor and isinstance(value, (int, float)) and name not in learned:
            arguments[name] = to_argument(name, [value], "tensor", dtype=case.dtype).squeeze(0)
            continue
        kind = case.kinds.get(name)
        arguments[name] = to_argument(name, value, want, kind=kind, dtype=case.dtype, learned=name in learned)
    for name, value in case.params.items():
        parameter = parameters.get(name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name in learned:
            arguments[name] = to_argument(name, value, "tensor", dtype=case.dtype, learned=True)
        elif takes_only_tensor(parameter) and (number or isinstance(value, list)):
            tensor = to_argument(name, [value] if number else value, "tensor", dtype=case.dtype)
            arguments[name] = tensor.squeeze(0) if number else tensor
        else:
            arguments[name] = value
    return adapter.arguments(arguments, case) if adapter.arguments else arguments


def _call(
    case: GoldenCase,
    function: Callable[..., Any],
    arguments: dict[str, Any],
    adapter: Adapter,
    resolve: Callable[[str], Any],
) -> dict[str, Any]:
    """Call the function; return outputs and gradients by expected key."""
    result = function(**arguments)
    outputs = _name_outputs(case, function, result, adapter)
    if {"loss", "losses"} <= set(case.outputs) and _is_plain(result) and "reduction" in parameters_of(function):
        # pref-opt card: "losses" is the value with reduction="none"
        outputs["losses"] = function(**{**arguments, "reduction": "none"})
    if adapter.finish is not None:
        outputs = adapter.finish(case, {**outputs, "output": outputs.get("output", result)}, arguments, resolve)
    absent = [key for key in case.outputs if key not in outputs and key not in adapter.reference_only]
    if absent:
        raise UnhandledFormError(f"no output for {absent}: {function.__name__} returned {_describe(result)}")
    return {**outputs, **_gradients(case, outputs, arguments, adapter)}


def _is_plain(result: Any) -> bool:
    """Tell single values from containers of named outputs."""
    if result is None or isinstance(result, (bool, int, float, str, list)) or is_tensor(result):
        return True
    return type(result).__module__ == "numpy"


def _describe(result: Any) -> str:
    if isinstance(result, Mapping):
        return f"a mapping with the keys {sorted(map(str, result))}"
    if isinstance(result, tuple) and not hasattr(result, "_fields"):
        return f"a tuple of {len(result)}"
    return f"one {type(result).__name__}"


def _name_outputs(case: GoldenCase, function: Callable[..., Any], result: Any, adapter: Adapter) -> dict[str, Any]:
    """Give the expected keys their values; keys that the result doesn't have are left out."""
    keys = case.outputs
    if _is_plain(result):
        if len(keys) == 1:
            return {keys[0]: result}
        return {"loss" if "loss" in keys or not keys else "output": result}
    if isinstance(result, tuple) and not hasattr(result, "_fields"):
        if len(adapter.names) == len(result):
            return dict(zip(adapter.names, result, strict=True))
        if len(keys) == 1:
            return {keys[0]: result}
        # A tuple without names: the order of the expected keys that are not gradients.
        return dict(zip(keys, result, strict=True)) if len(keys) == len(result) else {}
    outputs = {}
    for key in keys:
        name, scale = key, None
        if key.endswith("_weighted") and not _has(result, key):
            # sgl and gcm cards: the weight times the field
            name = key.removesuffix("_weighted")
            scale = _parameter(case, function, f"{name}_weight")
        if _has(result, name):
            value = _get(result, name)
            outputs[key] = value if scale is None else scale * value
        elif key == "output":
            outputs[key] = result
    return outputs


def _has(result: Any, name: str) -> bool:
    if isinstance(result, Mapping):
        return name in result
    if hasattr(result, "_fields"):  # a named tuple also has methods called index and count
        return name in result._fields
    return hasattr(result, name) and not callable(getattr(result, name))


def _get(result: Any, name: str) -> Any:
    return result[name] if isinstance(result, Mapping) else getattr(result, name)


def _parameter(case: GoldenCase, function: Callable[..., Any], name: str) -> Any:
    if name in case.params:
        return case.params[name]
    parameter = parameters_of(function).get(name)
    if parameter is None or parameter.default is parameter.empty:
        raise UnhandledFormError(f"the case has no {name!r}")
    return parameter.default


# --- gradients ---------------------------------------------------------------------------------------------------------


def _gradients(
    case: GoldenCase, outputs: dict[str, Any], arguments: dict[str, Any], adapter: Adapter
) -> dict[str, Any]:
    keys = [key for key in case.expected if case.gradient_input(key) is not None and key != _COTANGENT]
    gradients: dict[str, Any] = {}
    for key in keys:
        name = case.gradient_input(key)
        if name not in arguments:
            raise UnhandledFormError(f"{key!r} asks for the gradient of {name!r}, which isn't an argument")
        leaves = tensors_in(arguments[name])
        if not leaves or not all(leaf.requires_grad for leaf in leaves):
            raise UnhandledFormError(f"{key!r} asks for the gradient of {name!r}, which holds no floating tensor")
        scalar = _scalar(case, outputs, adapter, of_sum=key != f"grad_{name}")
        gradients[key] = _nest(arguments[name], iter(_gradient(scalar, leaves)))
    return gradients


def _gradient(scalar: Any, leaves: list[Any]) -> list[Any]:
    """Return one gradient per leaf; what the scalar does not depend on has gradient zero."""
    import torch

    if not scalar.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(scalar, leaves, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]


def _nest(argument: Any, gradients: Iterator[Any]) -> Any:
    if isinstance(argument, Mapping):
        return {key: _nest(entry, gradients) for key, entry in argument.items()}
    if isinstance(argument, (list, tuple)):
        return [_nest(entry, gradients) for entry in argument]
    return next(gradients)


def _scalar(case: GoldenCase, outputs: dict[str, Any], adapter: Adapter, *, of_sum: bool) -> Any:
    """Build the scalar whose gradient the case expects."""
    if case.cotangents is not None:
        return _contracted(case, outputs)
    if adapter.gradient_of is not None:
        scalar = adapter.gradient_of(outputs)
    elif of_sum:
        scalar = outputs[case.outputs[0]].sum()
    elif "loss" in outputs:
        scalar = outputs["loss"]
    elif len(case.outputs) == 1:
        scalar = outputs[case.outputs[0]]
    else:
        raise UnhandledFormError("gradients are expected, but there is no 'loss', 'upstream' or cotangent")
    if not is_tensor(scalar) or scalar.ndim != 0:
        shape = tuple(scalar.shape) if is_tensor(scalar) else type(scalar).__name__
        raise UnhandledFormError(f"gradients need a scalar tensor, got {shape}, and the case gives no cotangent")
    return scalar


def _contracted(case: GoldenCase, outputs: dict[str, Any]) -> Any:
    """Return sum over outputs of sum(output * cotangent)."""
    total: Any = 0.0
    for name, factor in (case.cotangents or {}).items():
        if name == "" and len(case.outputs) != 1:
            raise UnhandledFormError(f"a cotangent without a name needs one output, there are {case.outputs}")
        key = name or case.outputs[0]
        if key not in outputs:
            raise UnhandledFormError(f"the cotangent names the output {key!r}, there is {sorted(outputs)}")
        value = outputs[key]
        weight = to_argument(key, factor, "tensor", kind="float", dtype=case.dtype)
        if not is_tensor(value) or (is_tensor(weight) and weight.shape != value.shape and weight.numel()):
            raise _MismatchError(key, "shape differs from the shape of its cotangent")
        total = total + (value * (weight if not is_tensor(weight) or weight.numel() else 0.0)).sum()
    return total


# --- running a directory -----------------------------------------------------------------------------------------------


def run_directory(
    path: str | os.PathLike[str], package: str | None = None, only_existing: bool = False
) -> list[FileReport]:
    """Run every vector under a directory.

    Args:
        path: The directory; vectors are `<package>/<file>.json`, files in its root belong to the package they name.
        package: Run only the files of this distribution.
        only_existing: Missing functions are reported and counted, but don't make a file fail.

    Returns:
        One report per file, in the order of their paths.

    Raises:
        ValueError: If `path` is no directory, holds no vectors, or none of `package`.
    """
    directory = Path(path)
    return [_run_file(*read) for read in _selected(directory, package, only_existing)]


def _selected(directory: Path, package: str | None, only_existing: bool) -> list[tuple[FileReport, list[GoldenCase]]]:
    read = [_read_file(directory, file, not only_existing) for file in _vector_files(directory)]
    if not read:
        raise ValueError(f"no golden vectors (*.json) under {directory}")
    if package is None:
        return read
    chosen = [(report, cases) for report, cases in read if report.package == package]
    if not chosen:
        known = sorted({report.package for report, _ in read if report.package})
        near = difflib.get_close_matches(package, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no vectors for the package {package!r} under {directory}{hint} (there are: {known})")
    return chosen


def _run_file(report: FileReport, cases: list[GoldenCase]) -> FileReport:
    for case in cases:
        try:
            report.reference_only.update(check_case(case))
        except MissingFunctionError as error:
            report.missing[_unique(report.missing, case.name)] = str(error)
        except UnhandledFormError as error:
            report.failures.append(CaseFailure(case.name, "", f"unhandled form: {error}"))
        except _MismatchError as error:
            report.failures.append(CaseFailure(case.name, error.key, error.message))
        except Exception as error:  # noqa: BLE001 (whatever the product raises is this case's failure, not the run's)
            report.failures.append(CaseFailure(case.name, "", f"{type(error).__name__}: {error}"))
        else:
            report.passed += 1
    return report


def _unique(taken: Mapping[str, Any], name: str) -> str:
    while name in taken:
        name += "'"
    return name


def golden_cases(directory: str | os.PathLike[str], package: str | None = None) -> list[ParameterSet]:
    """Return the cases of a directory as pytest parameters, for a package's copies of its vectors.

    ```text
    @pytest.mark.parametrize("case", golden_cases(Path(__file__).parent))
    def test_golden(case):
        check_case(case)
    ```

    Args:
        directory: Folder with `<file>.json` or `<package>/<file>.json`.
        package: Take only the cases of this distribution.

    Returns:
        One `pytest.param(case, id="file::case")` per case.

    Raises:
        ValueError: If there are no vectors, or a file or a case can't be read.
    """
    import pytest

    parameters = []
    for report, cases in _selected(Path(directory), package, only_existing=False):
        if report.error or report.failures:
            raise ValueError(f"{report.file}: {report.error or report.failures[0]}")
        taken: dict[str, GoldenCase] = {}
        for case in cases:
            taken[_unique(taken, f"{report.file.removesuffix('.json')}::{case.name}")] = case
        parameters += [pytest.param(case, id=name) for name, case in taken.items()]
    return parameters


# --- command -----------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 all passed, 1 something failed, 2 something could not be read."""
    # Before torch is imported: two threads on a busy two-core machine were twenty times slower than one.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(
        prog="python -m ballast_testing.golden",
        description="Run golden vectors against the installed packages.",
        epilog="exit codes: 0 all passed; 1 a failure, a missing function, an unhandled form or no vectors; "
        "2 bad arguments, no such directory or package, broken JSON",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="folder with <package>/<file>.json")
    parser.add_argument("--package", metavar="P", help="only this distribution, e.g. recsys-losses")
    parser.add_argument(
        "--only-existing", action="store_true", help="report functions that don't exist yet without failing"
    )
    arguments = parser.parse_args(argv)
    directory: Path = arguments.directory
    if not directory.is_dir():
        parser.error(f"not a directory: {directory}")
    if not _vector_files(directory):
        sys.stderr.write(f"no golden vectors (*.json) under {directory}\n")
        return 1
    try:
        selected = _selected(directory, arguments.package, arguments.only_existing)
    except ValueError as error:
        parser.error(str(error))
    reports = []
    for report, cases in selected:
        reports.append(_run_file(report, cases))
        sys.stdout.write(reports[-1].line() + "\n")
        sys.stdout.flush()
    return _summarise(reports)


def _summarise(reports: list[FileReport]) -> int:
    passed, failed = sum(r.passed for r in reports), sum(r.failed for r in reports)
    missing, broken = sum(len(r.missing) for r in reports), sum(r.error is not None for r in reports)
    total = passed + failed + missing
    counts = f"{passed} passed, {failed} failed, {missing} missing, {total} total in {len(reports)} files"
    sys.stdout.write(f"golden: {counts}{f', {broken} unreadable' if broken else ''}\n")
    if not passed and not failed and not broken:
        sys.stdout.write("golden: nothing ran, none of the functions exists\n")
    if broken:
        return 2
    return 0 if all(report.ok for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
