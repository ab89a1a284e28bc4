from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ballast_cli.recsys_dsl import dsl_app
from recsys_losses.dsl import load_backbone, load_compressed

if TYPE_CHECKING:
    from pathlib import Path

SIZES = {
    "lightgcn": ["--dim", "8", "--layers", "1", "--batch-size", "4096"],
    "neumf": ["--dim", "4", "--batch-size", "4096"],
    "multvae": ["--dim", "4", "--batch-size", "256"],
}


def run(*words: str) -> Any:
    return dsl_app(list(words), exit_on_error=False, print_error=False, result_action="return_value")


def train(capsys: pytest.CaptureFixture[str], output: Path, model: str, *words: str, epochs: int = 2) -> dict[str, Any]:
    shared = ["--data", "synthetic", "--density", "0.25", "--interval", "2", "--init", "exact", "--epochs", str(epochs)]
    run("train", "--model", model, *shared, *SIZES[model], "--output", str(output), "--json", *words)
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("model", SIZES)
def test_train_and_export(tmp_path, capsys, model):
    result = train(capsys, tmp_path, model)
    assert 0 < result["recall@20"] < 1
    assert json.loads((tmp_path / "metrics.json").read_text()) == result
    assert [record["epoch"] for record in json.loads((tmp_path / "history.json").read_text())] == [0, 1]
    assert "density: 0.25" in (tmp_path / "config.yaml").read_text()

    run(
        "export", "--model", str(tmp_path / "model.safetensors"), "--output", str(tmp_path / "out" / "sparse"), "--json"
    )
    exported = json.loads(capsys.readouterr().out)
    backbone, masked = load_backbone(tmp_path / "model.safetensors")
    tables = load_compressed(tmp_path / "out" / "sparse")
    assert exported["tables"] == len(masked) > 0
    assert exported["bytes"] == (tmp_path / "out" / "sparse").stat().st_size < exported["dense_bytes"]
    for name, tensor in backbone.state_dict().items():
        assert (tables[name].layout == torch.sparse_csr) == (name in masked)
        assert torch.equal(tables[name].to_dense(), tensor)
    budget = sum(round(0.25 * backbone.get_parameter(name).numel()) for name in masked)
    assert budget / 2 < exported["nonzero"] <= budget


def test_an_interrupted_run_continues_to_the_same_result(tmp_path, capsys, monkeypatch):
    whole = train(capsys, tmp_path / "whole", "lightgcn", epochs=4)

    class Interrupt(Exception):
        pass

    def stop(progress: Any, record: dict[str, float]) -> None:
        if record["epoch"] == 1:
            raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr("ballast_cli.recsys_dsl.EpochProgress.update", stop)
        with pytest.raises(Interrupt):
            train(capsys, tmp_path / "cut", "lightgcn", epochs=4)
    assert not (tmp_path / "cut" / "metrics.json").exists()
    resumed = train(capsys, tmp_path / "cut", "lightgcn", epochs=4)
    for key in ("recall@20", "ndcg@20", "nonzero", "explored", "best_epoch"):
        assert resumed[key] == whole[key]


def test_dense_training_for_comparison(tmp_path, capsys):
    result = train(capsys, tmp_path, "neumf", "--dense")
    assert result["ratio"] == 1
    assert load_backbone(tmp_path / "model.safetensors")[1] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--data", "lastfn"], "did you mean 'lastfm'"),
        (["train", "--data", "synthetic", "--density", "1.5"], "density"),
        (["train", "--data", "synthetic", "--interval", "0"], "update_interval"),
        (["train", "--data", "synthetic", "--monitor", "recal@20"], "recall"),
        (["train", "--data", "synthetic", "--ks", "100000"], "100000"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        run(*words)


def test_export_of_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run("export", "--model", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out"))
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="text"):
        run("export", "--model", str(tmp_path / "text"), "--output", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
