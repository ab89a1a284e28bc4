from __future__ import annotations

import json

import pytest


def test_run_ends_with_the_table_and_the_report(toy_file, tmp_path, bench, capsys):
    assert bench("run", "--suite", f"{toy_file}:toy", "--output", tmp_path / "s", "--jobs", 2) == 0
    captured = capsys.readouterr()
    assert "0.2530 ± 0.0030" in captured.out
    assert captured.out.rstrip().endswith(f"report: {tmp_path / 's' / 'report.html'}")
    assert (tmp_path / "s" / "report.html").exists()
    assert "[9/9] toys/toy" in captured.err
    assert "9 measured, 0 kept" in captured.err


def test_json_is_all_that_standard_output_gets(toy_file, tmp_path, bench, capsys):
    words = (
        "run",
        "--suite",
        f"{toy_file}:toy",
        "--output",
        tmp_path / "s",
        "--seeds",
        "0-1",
        "--only",
        "SSM",
        "--json",
    )
    assert bench(*words) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["run"]["measured"] == 2
    assert content["cases"][0]["seeds"] == [0, 1]
    assert content["commands"][0].startswith("ballast bench run --suite")
    assert "--only SSM --seeds 0-1" in content["commands"][0]


def test_failed_cells_make_exit_code_1_and_keep_the_rest(toy_file, tmp_path, bench, capsys):
    words = ("run", "--suite", f"{toy_file}:troubled", "--output", tmp_path / "s")
    assert bench(*words, "--only", "raise") == 1
    assert "the toy method fell over" in capsys.readouterr().out
    assert bench(*words, "--only", "skip") == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--suite", "quik"), "did you mean 'quick'?"),
        (("--suite", "{toy}:nothing"), "has no function 'nothing'"),
        (("--suite", "{toy}:toy", "--only", "SSN"), "did you mean 'SSM'?"),
        (("--suite", "{toy}:toy", "--seeds", "a,b"), "--seeds must look like '0,1,2' or '0-4', got 'a,b'"),
        (("--suite", "{toy}:toy", "--seeds", "1,1"), "distinct seeds"),
        (("--suite", "{toy}:toy", "--seeds", "4-0"), "distinct seeds"),
        (("--suite", "{toy}:toy", "--jobs", "0"), "--jobs must be at least 1, got 0"),
        (("--suite", "{toy}:toy", "--data-root", "/no/such/folder"), "does not exist"),
    ],
)
def test_a_wrong_request_is_a_message_and_exit_code_2(words, message, toy_file, tmp_path, bench, capsys):
    words = [word.replace("{toy}", str(toy_file)) for word in words]
    assert bench("run", *words, "--output", tmp_path / "s") == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("command", ["report", "export", "compare"])
def test_a_folder_that_is_no_store_is_exit_code_2(command, tmp_path, bench, capsys):
    extra = {"export": ("--output", tmp_path / "x.json"), "compare": (tmp_path,)}.get(command, ())
    assert bench(command, tmp_path, *extra) == 2
    assert "is not a results store" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "report", "export", "compare"])
def test_an_older_schema_is_exit_code_2_with_file_and_versions(
    command, toy_file, toys, measured, bench, capsys, tmp_path
):
    store = measured(toys.case(seeds=(0,)))
    path = store.latest()[0].path
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 0', 1))
    words = {
        "run": ("run", "--suite", f"{toy_file}:toy", "--output", store.path),
        "report": ("report", store.path),
        "export": ("export", store.path, "--output", tmp_path / "x.json"),
        "compare": ("compare", store.path, store.path),
    }[command]
    assert bench(*words) == 2
    error = capsys.readouterr().err
    assert path.name in error
    assert "older schema version (0)" in error
    assert "reads version 1" in error


def test_report_warns_of_unreadable_records(toys, measured, bench, capsys):
    store = measured(toys.case(seeds=(0,)))
    store.latest()[0].path.write_text("{")
    assert bench("report", store.path) == 0
    assert "warning: unreadable record" in capsys.readouterr().err


def test_list_names_cases_and_methods(toy_file, bench, capsys):
    assert bench("list", "--suite", f"{toy_file}:wide") == 0
    out = capsys.readouterr().out
    assert "toys/noise-20" in out
    assert "BPR, SSM, CPR" in out
    assert bench("list", "--json") == 0
    assert set(json.loads(capsys.readouterr().out)) == {"quick", "cpu", "gpu"}


def test_query_prints_rows(toys, measured, bench, capsys):
    store = measured(toys.case(seeds=(0,)))
    assert bench("query", store.path, "SELECT method FROM cells ORDER BY 1", "--json") == 0
    assert json.loads(capsys.readouterr().out) == [{"method": "BPR"}, {"method": "CPR"}, {"method": "SSM"}]
    assert bench("query", store.path, "SELCT") == 2
    assert "the query failed" in capsys.readouterr().err
