from __future__ import annotations

import pytest

from ballast_bench.case import Metric, cell_key, resolve
from ballast_bench.errors import UsageError
from ballast_bench.suites import load_suite, select_cells

BASE = {"package": "p", "case": "c", "dataset": "d", "method": "m", "seed": 0, "settings": {"a": 1, "b": 2}}


def test_key_ignores_the_order_of_settings():
    assert cell_key(**BASE) == cell_key(**{**BASE, "settings": {"b": 2, "a": 1}})


@pytest.mark.parametrize(
    "change",
    [{"package": "q"}, {"case": "x"}, {"dataset": "e"}, {"method": "n"}, {"seed": 1}, {"settings": {"a": 1, "b": 3}}],
)
def test_key_changes_with_every_part(change):
    assert cell_key(**BASE) != cell_key(**{**BASE, **change})


def test_cells_cover_methods_and_seeds(toys):
    cells = toys.case().cells()
    assert len({cell.key for cell in cells}) == len(cells) == 9
    assert [cell.seed for cell in cells[:3]] == [0, 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baseline": "nobody"}, "baseline 'nobody' is not among BPR, SSM, CPR"),
        ({"seeds": ()}, "seeds must be distinct and not empty"),
        ({"seeds": (1, 1)}, "seeds must be distinct and not empty"),
        ({"metrics": ()}, "has no metrics"),
        ({"budget": float("nan")}, "budget must be > 0"),
        ({"expected": 0.0}, "expected must be > 0"),
    ],
)
def test_a_wrong_case_is_refused(toys, change, message):
    with pytest.raises(ValueError, match=message):
        toys.case(**change)


def test_metric_needs_a_direction():
    with pytest.raises(ValueError, match="must be 'higher' or 'lower', got 'up'"):
        Metric("x", better="up")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nothing", "expected 'module:function'"),
        ("no_such_module_anywhere:f", "there is no module"),
        ("math:no_such_function", "has no function"),
        ("absent.py:f", "there is no file absent.py"),
    ],
)
def test_a_wrong_reference_is_a_usage_error(reference, message):
    with pytest.raises(UsageError, match=message):
        resolve(reference)


def test_unknown_suite_names_the_known_and_the_nearest():
    with pytest.raises(UsageError, match=r"unknown suite 'quik'; known: cpu, gpu, quick; did you mean 'quick'\?"):
        load_suite("quik")


def test_a_suite_that_names_a_case_twice_is_refused(tmp_path, toy_file):
    file = tmp_path / "twice.py"
    file.write_text(
        f"from ballast_bench.case import resolve\ncase = resolve('{toy_file}:case')\ndef s(): return (case(), case())\n"
    )
    with pytest.raises(UsageError, match="names a case twice: toys/toy"):
        load_suite(f"{file}:s")


def test_only_takes_parts_and_patterns(toys):
    cases = toys.wide()
    assert {cell.method for cell in select_cells(cases, "ssm")} == {"SSM"}
    assert {cell.case.name for cell in select_cells(cases, "toys/noise-?0/BPR/1")} == {"noise-20", "noise-40"}
    assert len(select_cells(cases, "toys/toy/SSM/1")) == 1


def test_only_without_a_match_names_the_nearest(toys):
    with pytest.raises(UsageError, match=r"unknown case or method 'SSN'.*did you mean 'SSM'\?"):
        select_cells(toys.toy(), "SSN")


def test_seeds_replace_those_of_the_suite(toys):
    assert {cell.seed for cell in select_cells(toys.toy(), None, (5, 6))} == {5, 6}
