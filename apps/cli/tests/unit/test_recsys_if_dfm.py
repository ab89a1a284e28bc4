"""`ballast recsys if-dfm` on few generated clicks."""

from __future__ import annotations

import json

import pytest
from cyclopts import CycloptsError

from ballast_cli.recsys_if_dfm import if_dfm_app

CLICKS = ["--per-day", "60", "--data-seed", "1"]
SMALL = ["--model", "logistic", "--epochs", "2", "--lr", "0.02", "--batch-size", "256"]


def run(*words):
    return if_dfm_app(
        [str(word) for word in words], exit_on_error=False, print_error=False, result_action="return_value"
    )


def result(capsys, *words):
    run(*words, "--json")
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for method in ("vanilla", "retrain", "fnc", "dfm"):
        run("train", *CLICKS, *SMALL, "--method", method, "--output", folder / method, "--json")
    return {path.name: path / "model.safetensors" for path in folder.iterdir()}


def test_train_writes_what_it_says(models, capsys, tmp_path):
    found = result(capsys, "train", *CLICKS, *SMALL, "--output", tmp_path / "run")
    assert found["method"] == "vanilla"
    assert 0 < found["auc"] < 1
    assert json.loads((tmp_path / "run/metrics.json").read_text()) == found
    history = json.loads((tmp_path / "run/history.json").read_text())
    assert [record["epoch"] for record in history[0]] == [0, 1]
    assert (tmp_path / "run/model.safetensors").read_bytes() == models["vanilla"].read_bytes()


def test_the_same_command_continues_and_fresh_starts_over(capsys, tmp_path):
    words = ["train", *CLICKS, *SMALL, "--output", tmp_path]
    first = result(capsys, *words)
    longer = ["train", *CLICKS, "--model", "logistic", "--epochs", "4", "--lr", "0.02", "--batch-size", "256"]
    result(capsys, *longer, "--output", tmp_path)
    assert len(json.loads((tmp_path / "history.json").read_text())[0]) == 4
    with pytest.raises(ValueError, match="other settings: lr"):
        run("train", *CLICKS, *SMALL[:4], "--lr", "0.5", "--batch-size", "256", "--output", tmp_path, "--json")
    again = result(capsys, *words, "--fresh")
    assert again["auc"] == first["auc"]


def test_update_then_evaluate(models, capsys, tmp_path):
    found = result(
        capsys, "update", "--model", models["vanilla"], *CLICKS, "--output", tmp_path, "--diagnose", "--damping", "0.1"
    )
    assert found["converged"] == 1
    assert found["largest"] > 0
    assert found["flipped"] > 0
    assert found["added"] > 0
    assert json.loads((tmp_path / "update.json").read_text()) == found
    updated = tmp_path / "model.safetensors"
    metrics = result(capsys, "evaluate", "--model", updated, *CLICKS, "--output", tmp_path / "test.json")
    assert metrics == {name: pytest.approx(found[name]) for name in ("auc", "prauc", "log_loss")}
    assert json.loads((tmp_path / "test.json").read_text()) == metrics
    ends = ["--vanilla", models["vanilla"], "--retrain", models["retrain"]]
    assert result(capsys, "evaluate", "--model", models["retrain"], *CLICKS, *ends)["ri_log_loss"] == 100
    stale = result(capsys, "evaluate", "--model", models["vanilla"], *CLICKS)
    assert stale["auc"] == pytest.approx(found["auc_before"])


def test_update_chooses_among_dampings_on_a_sample(models, capsys, tmp_path):
    words = ["--no-added", "--damping", "1.0", "0.01", "--curvature-rows", "300"]
    found = result(capsys, "update", "--model", models["vanilla"], *CLICKS, "--output", tmp_path, *words)
    assert found["damping"] in (1.0, 0.01)
    assert found["added"] == 0
    with pytest.raises(ValueError, match=r"--curvature-rows must be >= 1"):
        run("update", "--model", models["vanilla"], *CLICKS, "--curvature-rows", "0")


def test_every_method_that_predicts_otherwise_is_evaluated_alike(models, capsys):
    for method in ("fnc", "dfm"):
        metrics = result(capsys, "evaluate", "--model", models[method], *CLICKS)
        written = json.loads((models[method].parent / "metrics.json").read_text())
        assert metrics["log_loss"] == pytest.approx(written["log_loss"])


def test_a_file_in_the_format_of_the_log(capsys, tmp_path):
    path = tmp_path / "clicks.txt.gz"
    made = result(capsys, "make-synthetic", "--output", path, "--per-day", "60", "--seed", "1")
    assert made["clicks"] == 1800
    out = tmp_path / "run"
    result(capsys, "train", "--data", path, *SMALL, "--output", out)
    found = result(capsys, "update", "--model", out / "model.safetensors", "--data", path, "--output", tmp_path / "new")
    assert found["n"] > 0
    with pytest.raises(ValueError, match="was trained on other features"):
        run("evaluate", "--model", out / "model.safetensors", *CLICKS)


def test_bad_input(models, tmp_path):
    with pytest.raises(ValueError, match="an update needs 'vanilla'"):
        run("update", "--model", models["fnc"], *CLICKS)
    with pytest.raises(ValueError, match="belong together"):
        run("evaluate", "--model", models["fnc"], *CLICKS, "--vanilla", models["vanilla"])
    with pytest.raises(FileNotFoundError):
        run("train", "--data", tmp_path / "absent.txt", "--output", tmp_path)
    with pytest.raises(CycloptsError):
        run("train", "--method", "esdfm")
    with pytest.raises(ValueError, match="no clicks in the valid period"):
        run("train", *CLICKS, *SMALL, "--gap", "30", "--output", tmp_path)
