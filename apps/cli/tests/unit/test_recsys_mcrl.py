"""`ballast recsys mcrl` as a person meets it."""

from __future__ import annotations

import json

import pytest

from ballast_cli.recsys_mcrl import mcrl_app

SMALL = ["--hidden", "8", "--state-size", "5", "--batch-size", "64", "--ks", "10", "--monitor", "ndcg_purchase@10"]


def run(capsys, *words):
    mcrl_app([str(word) for word in words], exit_on_error=False, print_error=False, result_action="return_value")
    return json.loads(capsys.readouterr().out)


def train(capsys, output, *words, epochs=2):
    return run(capsys, "train", *SMALL, "--epochs", epochs, "--output", output, "--json", *words)


def test_simulate_train_evaluate(tmp_path, capsys):
    made = run(capsys, "simulate", "--output", tmp_path / "events.csv", "--sessions", 150, "--json")
    assert made["sessions"] < 150
    assert made["events"] >= 3 * made["sessions"]
    trained = train(capsys, tmp_path / "run", "--data", tmp_path / "events.csv", "--backbone", "sasrec")
    assert trained["train_sessions"] + trained["test_sessions"] < made["sessions"]
    assert trained["backbone"] == "sasrec"
    assert 0 <= trained["hr_purchase@10"] <= 1
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert written == {
        "checkpoint.safetensors", "history.json", "items.json", "metrics.json", "model.safetensors"
    }  # fmt: skip
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == trained
    tested = run(
        capsys, "evaluate", "--model", tmp_path / "run" / "model.safetensors", "--data", tmp_path / "events.csv",
        "--rollouts", 20, "--ks", 10, "--output", tmp_path / "tested.json", "--json",
    )  # fmt: skip
    assert {"hr_click@10", "discounted_return", "total_return"} < set(tested)
    assert 0 < tested["discounted_return"] < tested["total_return"] <= 6
    assert json.loads((tmp_path / "tested.json").read_text()) == tested


def test_interrupted_run_continues_to_the_same_result(tmp_path, capsys):
    words = ["--sessions", "120"]
    whole = train(capsys, tmp_path / "whole", *words, epochs=3)
    train(capsys, tmp_path / "cut", *words, epochs=1)
    resumed = train(capsys, tmp_path / "cut", *words, epochs=3)
    for key in whole.keys() - {"seconds", "output"}:
        assert resumed[key] == whole[key], key
    assert len(json.loads((tmp_path / "cut" / "history.json").read_text())) == 3


def test_evaluation_of_the_test_sessions_repeats_training(tmp_path, capsys):
    """Ids of a file may be anything; the model's items are found again by name."""
    rows = [(s, f"item-{(s * 7 + t) % 11}", int(t == 2), t) for s in range(60) for t in range(4)]
    path = tmp_path / "events.csv"
    header = "session_id,item_id,is_purchase,timestamp\n"
    path.write_text(header + "".join(f"{s},{i},{b},{t}\n" for s, i, b, t in rows))
    train(capsys, tmp_path / "run", "--data", path)
    assert json.loads((tmp_path / "run" / "items.json").read_text())[0] == "item-0"
    model = tmp_path / "run" / "model.safetensors"
    tested = run(capsys, "evaluate", "--model", model, "--data", path, "--ks", 10, "--json")
    assert tested["hr_click@10"] > 0.5  # ten of eleven items
    with pytest.raises(ValueError, match="simulated sessions"):
        run(capsys, "evaluate", "--model", model, "--rollouts", 5, "--json")
    path.write_text(header + "1,item-0,0,1\n1,item-99,0,2\n1,item-0,0,3\n")
    with pytest.raises(ValueError, match="item-99"):
        run(capsys, "evaluate", "--model", model, "--data", path, "--json")


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["train", "--gamma", "2"], ValueError, "gamma"),
        (["train", "--data", "absent.csv"], FileNotFoundError, "absent.csv"),
        (["evaluate", "--model", "absent.safetensors"], ValueError, "nothing to evaluate"),
        (["evaluate", "--model", "absent.safetensors", "--rollouts", "1"], FileNotFoundError, "absent.safetensors"),
    ],
)
def test_bad_input_is_told(tmp_path, capsys, monkeypatch, words, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        run(capsys, *words)


def test_items_must_belong_to_the_model(tmp_path, capsys):
    train(capsys, tmp_path, "--sessions", 60, epochs=1)
    for text, message in (("[1, 2]", "must hold a list"), ("[1,\n2", "items.json:2")):
        (tmp_path / "items.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            run(capsys, "evaluate", "--model", tmp_path / "model.safetensors", "--rollouts", 1)
