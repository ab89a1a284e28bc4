from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ballast_cli.recsys_sgl import sgl_app
from recsys_losses.data import read_lightgcn


def run(*words: str) -> Any:
    return sgl_app(words, exit_on_error=False, print_error=False, result_action="return_value")


def result(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    run(*words, "--json")
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Three groups of users and items, in the LightGCN format."""
    generator = torch.Generator().manual_seed(0)
    chance = torch.where(torch.arange(40)[:, None] % 3 == torch.arange(90) % 3, 0.6, 0.03)
    pairs = torch.rand(chance.shape, generator=generator) < chance
    held = torch.rand(chance.shape, generator=generator) < 0.3
    for name, mask in (("train", pairs & ~held), ("test", pairs & held)):
        lines = [" ".join(map(str, [user, *row.nonzero().squeeze(1).tolist()])) for user, row in enumerate(mask)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return ["--train", str(tmp_path / "train.txt"), "--test", str(tmp_path / "test.txt")]


SMALL = ("--dim", "8", "--layers", "2", "--batch-size", "64", "--lr", "0.01", "--ks", "5", "--monitor", "recall@5")


def test_trains_evaluates_and_continues(capsys, tmp_path, files):
    out = tmp_path / "run"
    words = ("train", *files, *SMALL, "--output", str(out), "--patience", "50")
    first = result(capsys, *words, "--epochs", "2")
    assert set(first) >= {"recall@5", "ndcg@5", "tail_recall@5", "best_epoch"}
    assert first["tail_recall@5"] <= first["recall@5"]
    assert {path.name for path in out.iterdir()} == {
        "model.safetensors", "metrics.json", "history.json", "config.yaml", "checkpoint.safetensors"
    }  # fmt: skip
    longer = result(capsys, *words, "--epochs", "4")
    assert len(json.loads((out / "history.json").read_text())) == 4
    again = result(capsys, *words, "--epochs", "4", "--fresh")
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in longer.items() if k != "seconds"}
    tested = result(capsys, "evaluate", "--model", str(out / "model.safetensors"), *files, "--ks", "5",
                    "--output", str(tmp_path / "m.json"))  # fmt: skip
    assert tested == {k: v for k, v in longer.items() if k in tested}
    assert json.loads((tmp_path / "m.json").read_text()) == tested


def test_progress_and_plain_result(capsys, tmp_path, files):
    run("train", *files, *SMALL, "--epochs", "1", "--output", str(tmp_path / "run"), "--aug", "rw", "--ssl-reg", "0")
    printed = capsys.readouterr()
    assert "epoch 1/1" in printed.err
    assert "lightgcn" in printed.out


@pytest.mark.parametrize("file_format", ["lightgcn", "pairs"])
def test_adds_noise(capsys, tmp_path, files, file_format):
    data = read_lightgcn(files[1], files[3])
    number = data.train.shape[1]
    if file_format == "pairs":
        for path, edges in ((files[1], data.train), (files[3], data.test)):
            Path(path).write_text("".join(f"{user},{item}\n" for user, item in edges.T.tolist()))
    out = tmp_path / "noisy.txt"
    shown = result(capsys, "add-noise", *files, "--ratio", "0.1", "--output", str(out), "--file-format", file_format)
    assert shown["added"] == int(0.1 * number)
    text = [line.replace(",", " ").split() for line in out.read_text().splitlines()]
    pairs = {(int(user), int(item)) for user, *items in text for item in items}
    assert len(pairs) == shown["pairs"] == number + shown["added"]
    assert pairs > {tuple(pair) for pair in data.train.T.tolist()}
    assert not pairs & {tuple(pair) for pair in data.test.T.tolist()}
    trained = result(capsys, "train", "--train", str(out), *files[2:], "--file-format", file_format, *SMALL,
                     "--epochs", "1", "--output", str(tmp_path / "run"))  # fmt: skip
    assert trained["recall@5"] >= 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "give --train and --test, or --data alone"),
        (["train", "--data", "lastfn"], "did you mean 'lastfm'"),
        (["train", "FILES", "--ssl-temp", "0"], "temperature must be positive"),
        (["train", "FILES", "--ssl-ratio", "1"], "ssl_ratio"),
        (["train", "FILES", "--mode", "merge"], "merge uses batch negatives"),
        (["train", "FILES", "--file-format", "pairs"], "train.txt"),
        (["train", "FILES", "--data", "synthetic"], "--data alone"),
        (["add-noise", "FILES", "--ratio", "-1", "--output", "x"], "ratio"),
    ],
)
def test_bad_input(words, message, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [word for part in words for word in (files if part == "FILES" else [part])]
    with pytest.raises(ValueError, match=message):
        run(*words)
    assert not (tmp_path / "x").exists()


def test_a_missing_file_is_named(files):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run("evaluate", "--model", "/nowhere.safetensors", *files)
