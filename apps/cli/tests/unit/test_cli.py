"""The command line as a person meets it: exit codes, messages, configuration files, output files."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ballast_cli.main import main, split_config

SMALL = ["--data", "synthetic", "--dim", "8", "--batch-size", "2048"]


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def train(capsys: pytest.CaptureFixture[str], output: Path, *words: str, epochs: int = 2) -> dict[str, object]:
    more = ["--epochs", str(epochs), "--output", str(output), "--json", *words]
    code, out, err = run(capsys, "recsys", "train", *SMALL, *more)
    assert code == 0, err
    return json.loads(out)


def test_train_writes_what_it_says(tmp_path, capsys):
    result = train(capsys, tmp_path, "--loss", "bpr")
    assert result["output"] == str(tmp_path)
    assert 0 < result["recall@20"] < 1
    assert json.loads((tmp_path / "metrics.json").read_text())["recall@20"] == result["recall@20"]
    assert [record["epoch"] for record in json.loads((tmp_path / "history.json").read_text())] == [0, 1]
    assert (tmp_path / "model.safetensors").is_file()
    assert "loss: bpr" in (tmp_path / "config.yaml").read_text()


def test_evaluate_repeats_the_test_metrics(tmp_path, capsys):
    trained = train(capsys, tmp_path, "--loss", "ssm", "--negatives", "in-batch", "--logq", "--temperature", "0.2")
    code, out, err = run(
        capsys, "recsys", "evaluate", "--model", str(tmp_path / "model.safetensors"), "--data", "synthetic", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["recall@20"] == pytest.approx(trained["recall@20"], abs=1e-12)


@pytest.mark.parametrize("model", ["mf", "lightgcn"])
def test_recommend_leaves_out_training_items(tmp_path, capsys, model):
    from recsys_losses.data import load_dataset

    train(capsys, tmp_path, "--loss", "bpr", "--model", model)
    target = tmp_path / "recommendations.jsonl"
    model_file = str(tmp_path / "model.safetensors")
    code, _, err = run(
        capsys, "recsys", "recommend", "--model", model_file, "--data", "synthetic", "--users", "3", "5",
        "--k", "7", "--output", str(target),
    )  # fmt: skip
    assert code == 0, err
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["user"] for row in rows] == [3, 5]
    data = load_dataset("synthetic", None)
    for row in rows:
        seen = set(data.train[1, data.train[0] == row["user"]].tolist())
        assert len(set(row["items"])) == 7
        assert not seen & set(row["items"])


def test_interrupted_training_continues_to_the_same_result(tmp_path, capsys):
    words = ["--loss", "bpr", "--patience", "50"]
    whole = train(capsys, tmp_path / "whole", *words, epochs=30)
    command = [sys.executable, "-m", "ballast_cli.main", "recsys", "train", *SMALL, *words, "--epochs", "30"]
    output = tmp_path / "cut"
    child = subprocess.Popen([*command, "--output", str(output)], env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while not (output / "checkpoint.safetensors").exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait(timeout=30)
    assert not (output / "metrics.json").exists(), "the run was over before it could be killed"
    resumed = train(capsys, output, *words, epochs=30)
    assert resumed["recall@20"] == whole["recall@20"]
    assert resumed["best_epoch"] == whole["best_epoch"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recsys", "train", "--data", "lastfn"], "did you mean 'lastfm'"),
        (["recsys", "train", "--data", "synthetic", "--loss", "smm"], "ssm"),
        (["recsys", "train", "--data", "synthetic", "--loss", "ssm", "--temperature", "0"], "temperature must be"),
        (["recsys", "train", "--data", "synthetic", "--loss", "bpr", "--ks", "100000"], "100000"),
        (["recsys", "train", "--data", "synthetic", "--temperatur", "1"], "--temperatur"),
        (["recsys", "trian"], "trian"),
        (["recsys", "train", "--data", "synthetic", "--epochs", "many"], "epochs"),
        (["recsys", "evaluate", "--model", "/nowhere.safetensors", "--data", "synthetic"], "/nowhere.safetensors"),
        (["data", "check", "lastfn", "--data-root", "."], "did you mean 'lastfm'"),
        (["data", "prepare", "/nowhere.txt", "--output", "out"], "/nowhere.txt"),
        (["recsys", "train", "--config"], "--config needs a YAML file"),
        (["recsys", "train", "--config", "/nowhere.yaml"], "/nowhere.yaml"),
    ],
)
def test_bad_input_is_exit_code_2_with_a_message(tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *words)
    assert code == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err


def test_flags_win_over_the_file(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("data: synthetic\nloss: bpr\nepochs: 1\ndim: 4\n")
    out = tmp_path / "out"
    code, text, err = run(
        capsys, "recsys", "train", "--config", str(config), "--dim", "8", "--output", str(out), "--json"
    )
    assert code == 0, err
    assert json.loads(text)["loss"] == "bpr"
    assert len(json.loads((out / "history.json").read_text())) == 1
    assert "dim: 8" in (out / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("los: bpr\ndata: synthetic\n", "los"),
        ("data: [unclosed\n", "run.yaml:2"),
        ("- just\n- a list\n", "expected a mapping"),
        ("data: synthetic\nepochs: many\n", "epochs"),
    ],
)
def test_a_wrong_configuration_file_is_named(tmp_path, capsys, text, message):
    config = tmp_path / "run.yaml"
    config.write_text(text)
    code, _, err = run(capsys, "recsys", "train", "--config", str(config), "--output", str(tmp_path / "out"))
    assert code == 2
    assert message in " ".join(err.split())


@settings(derandomize=True, deadline=None, max_examples=100)
@given(words=st.lists(st.sampled_from(["recsys", "--data", "x", "--seed", "3"])), at=st.integers(0, 5))
def test_taking_out_the_configuration_file_keeps_the_other_words(words, at):
    at = min(at, len(words))
    for given_words in (["--config", "f.yaml"], ["--config=f.yaml"]):
        rest, path = split_config([*words[:at], *given_words, *words[at:]])
        assert rest == words
        assert path == Path("f.yaml")
    assert split_config(words) == (words, None)


def test_prepare_then_train_on_the_prepared_folder(tmp_path, capsys):
    rows = [f"u{u}\ti{(u * 7 + k * 3) % 23}\t{1 + (u + k) % 5}\t0" for u in range(40) for k in range(12)]
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    source = tmp_path / "clicks.inter.gz"
    with gzip.open(source, "wt") as file:
        file.write("\n".join([header, *rows]) + "\n")
    folder = tmp_path / "prepared"
    code, out, err = run(
        capsys, "data", "prepare", str(source), "--format", "inter", "--min-rating", "2", "--k-core", "3",
        "--output", str(folder), "--json",
    )  # fmt: skip
    assert code == 0, err
    summary = json.loads(out)
    assert summary["train"] > summary["test"] > 0
    ids = json.loads((folder / "ids.json").read_text())
    assert len(ids["users"]) == summary["users"]
    assert ids["users"][0].startswith("u")
    code, out, err = run(
        capsys, "recsys", "train", "--data", str(folder), "--loss", "bpr", "--epochs", "1", "--dim", "4", "--ks", "5",
        "--monitor", "recall@5", "--output", str(tmp_path / "run"), "--json",
    )  # fmt: skip
    assert code == 0, err
    assert "recall@5" in json.loads(out)


def test_prepare_names_file_and_line(tmp_path, capsys):
    source = tmp_path / "pairs.txt"
    source.write_text("0 1\n1 two\n")
    code, _, err = run(capsys, "data", "prepare", str(source), "--format", "pairs", "--output", str(tmp_path / "out"))
    assert code == 2
    assert "pairs.txt:2" in err
    assert not (tmp_path / "out").exists()


def test_list_and_check_tell_what_is_there(tmp_path, capsys):
    (tmp_path / "recsys" / "lastfm").mkdir(parents=True)
    (tmp_path / "recsys" / "lastfm" / "data1.txt.gz").write_bytes(b"not the file")
    code, out, _ = run(capsys, "data", "list", "--data-root", str(tmp_path), "--json")
    present = {row["name"]: row["present"] for row in json.loads(out)["datasets"]}
    assert code == 0
    assert present["synthetic"]
    assert not present["lastfm"]
    code, out, _ = run(capsys, "data", "check", "lastfm", "--data-root", str(tmp_path), "--json")
    assert code == 1
    assert sorted(json.loads(out).values()) == ["changed", "missing"]


def test_known_data_sets_match_their_checksums(data_root, capsys):
    code, out, err = run(capsys, "data", "check", "--data-root", str(data_root), "--json")
    assert code == 0, err
    assert set(json.loads(out).values()) == {"ok"}


@pytest.mark.parametrize(
    "command",
    [
        ["recsys", "train"],
        ["recsys", "evaluate"],
        ["recsys", "recommend"],
        ["data", "prepare"],
        ["data", "list"],
        ["bench", "run"],
    ],
)
def test_help_has_an_example(capsys, command):
    code, out, _ = run(capsys, *command, "--help")
    assert code == 0
    assert f"ballast {' '.join(command)}" in " ".join(out.split())
