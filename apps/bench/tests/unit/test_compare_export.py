from __future__ import annotations

import csv
import json

import duckdb
import pytest

from ballast_bench.aggregate import aggregate
from ballast_bench.compare import compare
from ballast_bench.export import export_json
from ballast_bench.query import query


def levels(toys, **changes):
    methods = {name: {**settings, **changes.get(name, {})} for name, settings in toys.case().methods.items()}
    return toys.case(methods=methods)


def verdicts(before, after):
    difference = compare(aggregate(before.latest()), aggregate(after.latest()))
    return {(change.method, change.metric.name): change.verdict for change in difference.changes}, difference


def test_a_loss_is_a_regression_and_a_gain_is_not(toys, measured):
    before = measured(levels(toys), name="a")
    after = measured(levels(toys, SSM={"level": 0.2}, CPR={"level": 0.3}), name="b")
    found, difference = verdicts(before, after)
    assert found["SSM", "recall@20"] == "regression"
    assert found["SSM", "arp@20"] == "improvement"  # lower is better
    assert found["CPR", "recall@20"] == "improvement"
    assert found["CPR", "arp@20"] == "regression"
    assert found["BPR", "recall@20"] == "same"
    assert difference.settings == ["toys/toy/SSM", "toys/toy/CPR"]


def test_a_change_within_the_tolerance_is_none(toys, measured):
    found, _ = verdicts(measured(levels(toys), name="a"), measured(levels(toys, SSM={"level": 0.249}), name="b"))
    assert found["SSM", "recall@20"] == "same"


def test_missing_methods_are_named(toys, measured):
    less = toys.case(methods={"BPR": {"level": 0.2}, "new": {"level": 0.2}})
    _, difference = verdicts(measured(toys.case(), name="a"), measured(less, name="b"))
    assert difference.only_before == ["toys/toy/SSM", "toys/toy/CPR"]
    assert difference.only_after == ["toys/toy/new"]


def test_the_command_marks_regressions_and_exits_1(toys, measured, bench, capsys):
    before = measured(levels(toys), name="a")
    after = measured(levels(toys, SSM={"level": 0.2}), name="b")
    assert bench("compare", before.path, after.path) == 1
    out = capsys.readouterr().out
    assert "▼ regression" in out
    assert "1 regressions, 1 improvements" in out
    assert bench("compare", before.path, before.path) == 0
    capsys.readouterr()
    assert bench("compare", before.path, after.path, "--json") == 1
    assert json.loads(capsys.readouterr().out)["regressions"] == 1


def test_an_export_is_the_same_bytes_each_time(toys, measured, tmp_path):
    store = measured(*toys.wide())
    export_json(store, tmp_path / "1.json")
    export_json(store, tmp_path / "2.json")
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()


def test_an_export_has_means_values_and_origin(toys, measured, bench, tmp_path):
    store = measured(*toys.wide())
    target = tmp_path / "docs" / "results" / "toys.json"
    assert bench("export", store.path, "--output", target) == 0
    content = json.loads(target.read_text())
    assert [case["id"] for case in content["cases"]] == ["toys/toy", "toys/noise-0", "toys/noise-20", "toys/noise-40"]
    case = content["cases"][0]
    assert [method["name"] for method in case["methods"]] == ["BPR", "SSM", "CPR"]
    recall = case["methods"][1]["metrics"]["recall@20"]
    assert recall["n"] == 3
    assert recall["mean"] == pytest.approx(sum(recall["values"].values()) / 3, rel=1e-5)
    assert recall["versus_baseline"]["verdict"] == "better"
    assert content["environments"][0]["packages"]["numpy"]
    assert case["published"][0]["source"] == "Toy paper, Table 2"
    assert case["methods"][0]["curve"][0][0] == 1


def test_csv_and_parquet_hold_one_row_per_cell_and_metric(toys, measured, bench, tmp_path):
    store = measured(toys.case())
    for kind in ("csv", "parquet"):
        assert bench("export", store.path, "--output", tmp_path / f"x.{kind}", "--format", kind) == 0
    with (tmp_path / "x.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 27
    assert {row["method"] for row in rows} == {"BPR", "SSM", "CPR"}
    select = "SELECT count(*), avg(value) FROM read_parquet(?) WHERE metric = 'recall@20'"
    (read,) = duckdb.connect().execute(select, [f"{tmp_path}/x.parquet"]).fetchall()
    expected = [float(row["value"]) for row in rows if row["metric"] == "recall@20"]
    assert read == (9, pytest.approx(sum(expected) / 9))
    before = (tmp_path / "x.csv").read_bytes()
    assert bench("export", store.path, "--output", tmp_path / "x.csv", "--format", "csv") == 0
    assert (tmp_path / "x.csv").read_bytes() == before


def test_sql_sees_cells_metrics_and_history(toys, measured):
    store = measured(toys.case(seeds=(0,)))
    measured(toys.case(seeds=(0,), methods={**toys.case().methods, "SSM": {"level": 0.4}}))
    assert query(store, "SELECT count(*), sum(latest::int) FROM cells")[1] == [(4, 3)]
    names, rows = query(store, "SELECT method, value FROM metrics WHERE metric = 'recall@20' AND latest ORDER BY value")
    assert names == ["method", "value"]
    assert [row[0] for row in rows] == ["BPR", "CPR", "SSM"]
    assert query(store, "SELECT max(epoch) FROM history WHERE metric = 'loss'")[1] == [(4,)]


def test_sql_over_an_empty_store(tmp_path, measured):
    store = measured()
    assert query(store, "SELECT count(*) FROM metrics")[1] == [(0,)]
