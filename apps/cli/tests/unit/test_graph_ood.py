from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ballast_cli.graph_ood import graph_ood_app
from graph_ood.training import load_model

if TYPE_CHECKING:
    from pathlib import Path

DATA = ["--data", "good-motif:base:concept", "--num-data", "60"]
SMALL = ["--hidden", "8", "--layers", "2", "--batch-size", "16"]
METHODS = ["cal", "aia", "infoigl", "erm", "irm", "vrex", "group-dro", "mixup", "drop-edge"]
KEYS = {"train_accuracy", "id_val_accuracy", "id_test_accuracy", "val_accuracy", "test_accuracy"}


def run(*words: str) -> Any:
    return graph_ood_app(list(words), exit_on_error=False, print_error=False, result_action="return_value")


def train(
    capsys: pytest.CaptureFixture[str], output: Path, method: str, *words: str, epochs: int = 2
) -> dict[str, Any]:
    data = [] if "--data" in words else DATA
    run("train", "--method", method, *data, *SMALL, "--epochs", str(epochs), "--output", str(output), "--json", *words)
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("method", METHODS)
def test_train_and_evaluate(tmp_path, capsys, method):
    result = train(capsys, tmp_path, method)
    assert result.keys() > KEYS
    assert all(0 <= result[key] <= 1 for key in KEYS)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert [record["epoch"] for record in json.loads((tmp_path / "history.json").read_text())] == [0, 1]
    assert f"method: {method}" in (tmp_path / "config.yaml").read_text()
    assert (tmp_path / "checkpoint.safetensors").is_file()

    for split in ("test", "id_test"):
        run("evaluate", "--run", str(tmp_path), "--split", split, "--output", str(tmp_path / "test.json"), "--json")
        evaluated = json.loads(capsys.readouterr().out)
        assert evaluated["accuracy"] == result[f"{split}_accuracy"]
        assert json.loads((tmp_path / "test.json").read_text()) == evaluated
    assert 1 / 3 <= evaluated["majority"] < 1


@pytest.mark.parametrize("method", ["cal", "aia", "infoigl"])
def test_explain(tmp_path, capsys, method):
    train(capsys, tmp_path, method, epochs=1)
    run("explain", "--run", str(tmp_path), "--graphs", "0", "3", "--json")
    result = json.loads(capsys.readouterr().out)
    assert 0 < result["node_auc"] < 1
    assert 0 < result["edge_auc"] < 1
    assert result["picture"] == str(tmp_path / "explain.svg")
    assert (tmp_path / "explain.svg").read_text().count("true motif") == 1
    run("explain", "--run", str(tmp_path), "--output", str(tmp_path / "one.png"), "--graphs", "1", "--split", "train")
    assert (tmp_path / "one.png").stat().st_size > 1000
    assert "node_auc" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["cal", "aia", "infoigl", "group-dro"])
def test_an_interrupted_run_continues_to_the_same_result(tmp_path, capsys, monkeypatch, method):
    whole = train(capsys, tmp_path / "whole", method, epochs=3)

    class Interrupt(Exception):
        pass

    def stop(progress: Any, record: dict[str, float]) -> None:
        if record["epoch"] == 1:
            raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr("ballast_cli.graph_ood.EpochProgress.update", stop)
        with pytest.raises(Interrupt):
            train(capsys, tmp_path / "cut", method, epochs=3)
    assert not (tmp_path / "cut" / "result.json").exists()
    resumed = train(capsys, tmp_path / "cut", method, epochs=3)
    assert {key: resumed[key] for key in KEYS} == {key: whole[key] for key in KEYS}
    ours, other = (load_model(tmp_path / name / "model.safetensors")[0] for name in ("cut", "whole"))
    assert all(torch.equal(ours[key], other[key]) for key in other)


def test_other_settings_do_not_continue_a_run(tmp_path, capsys):
    train(capsys, tmp_path, "vrex", epochs=1)
    with pytest.raises(ValueError, match=r"other settings: .*num_data \(was 60, is 90\).*--fresh starts over"):
        train(capsys, tmp_path, "vrex", "--num-data", "90", "--data", "good-motif:base:concept", epochs=1)
    with pytest.raises(ValueError, match=r"options \(was {}, is {'strength': 3.0}\)"):
        train(capsys, tmp_path, "vrex", "--strength", "3", epochs=1)
    result = train(capsys, tmp_path, "vrex", "--strength", "3", "--fresh", epochs=1)
    assert result["best_epoch"] == 0


@pytest.mark.parametrize("net", ["cal", "infoigl", "aia"])
@pytest.mark.parametrize("encoder", ["gcn", "gin", "gat"])
def test_baselines_take_the_network_of_the_method_that_they_are_compared_with(tmp_path, capsys, net, encoder):
    options = ["--net", net, "--encoder", encoder]
    baseline = train(capsys, tmp_path / "erm", "erm", *options, epochs=1)
    method = train(capsys, tmp_path / "method", net, "--encoder", encoder, epochs=1)
    assert baseline["parameters"] < method["parameters"]
    ours, other = (load_model(tmp_path / name / "model.safetensors")[0] for name in ("erm", "method"))
    shapes = [sorted(v.shape for k, v in state.items() if ".convs." in f".{k}") for state in (ours, other)]
    assert shapes[0]
    for shape in shapes[0]:  # every convolution of the baseline is one of the method's
        shapes[1].remove(shape)


def test_method_options_arrive(tmp_path, capsys):
    plain = train(capsys, tmp_path / "a", "cal", epochs=1)
    history = [json.loads((tmp_path / "a" / "history.json").read_text())]
    train(capsys, tmp_path / "b", "cal", "--lambda-unif", "0", "--lambda-caus", "0", epochs=1)
    history.append(json.loads((tmp_path / "b" / "history.json").read_text()))
    assert history[1][0]["loss"] == pytest.approx(history[1][0]["loss_sup"])
    assert history[0][0]["loss"] > history[0][0]["loss_sup"]
    assert plain["best_epoch"] == 0
    few = train(
        capsys,
        tmp_path / "c",
        "aia",
        "--stable-ratio",
        "0.2",
        "--gamma",
        "1",
        "--adv-lr",
        "1e-3",
        "--warmup-select",
        "1",
    )
    assert few["best_epoch"] == 1
    train(capsys, tmp_path / "d", "infoigl", "--variant", "paper", "--lambda-s", "0.1", "--min-lr", "1e-3", epochs=1)


@pytest.mark.parametrize("data", ["syn-b:0.9", "spurious-motif:0.7", "good-motif:size:covariate"])
def test_generated_data(tmp_path, capsys, data):
    result = train(
        capsys, tmp_path / "run", "erm", "--data", data, "--num-data", "80", "--root", str(tmp_path / "kept")
    )
    assert 0 <= result["test_accuracy"] <= 1
    assert list((tmp_path / "kept").glob("*.safetensors"))
    run("evaluate", "--run", str(tmp_path / "run"), "--json")
    assert json.loads(capsys.readouterr().out)["accuracy"] == result["test_accuracy"]


def test_evaluate_on_other_data(tmp_path, capsys):
    train(capsys, tmp_path, "erm")
    run("evaluate", "--run", str(tmp_path), "--data", "good-motif:size:covariate", "--num-data", "90", "--json")
    result = json.loads(capsys.readouterr().out)
    assert (result["data"], result["graphs"]) == ("good-motif:size:covariate", 9)
    with pytest.raises(ValueError, match=r"has 10 features and 4 classes, the model 1 and 3"):
        run("evaluate", "--run", str(tmp_path), "--data", "syn-b:0.5", "--num-data", "80")


def _write_tu(root: Path) -> None:
    """Forty rings of 3 to 6 nodes, class 1 where the size is even."""
    raw = root / "RINGS" / "raw"
    raw.mkdir(parents=True)
    edges, indicator, labels, first = [], [], [], 1
    for i in range(40):
        n = 3 + i % 4
        for k in range(n):
            a, b = first + k, first + (k + 1) % n
            edges += [f"{a}, {b}", f"{b}, {a}"]
        indicator += [str(i + 1)] * n
        labels.append(str(n % 2))
        first += n
    for name, lines in {"A": edges, "graph_indicator": indicator, "graph_labels": labels}.items():
        (raw / f"RINGS_{name}.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(("data", "sizes"), [("tu:RINGS", (4, 4)), ("tu:RINGS:size", (4, 4))])
def test_tu_data(tmp_path, capsys, data, sizes):
    _write_tu(tmp_path / "data")
    result = train(capsys, tmp_path / "run", "cal", "--data", data, "--root", str(tmp_path / "data"))
    assert result.keys() >= {"train_accuracy", "val_accuracy", "test_accuracy"}
    for split, size in zip(("val", "test"), sizes, strict=True):
        run("evaluate", "--run", str(tmp_path / "run"), "--split", split, "--json")
        assert json.loads(capsys.readouterr().out)["graphs"] == size
    run("explain", "--run", str(tmp_path / "run"), "--json")
    explained = json.loads(capsys.readouterr().out)
    assert explained["node_auc"] is None
    assert explained["edge_auc"] is None


def test_tu_without_environments(tmp_path):
    _write_tu(tmp_path)
    with pytest.raises(ValueError, match="env_id"):
        run(
            "train", "--method", "irm", "--data", "tu:RINGS", "--root", str(tmp_path), "--output", str(tmp_path / "run")
        )


TRAIN = ["train", "--method", "erm"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*TRAIN, "--data", "good-motif"], "accepted are good-motif:base"),
        ([*TRAIN, "--data", "good-motif:base:covariat"], "did you mean 'covariate'"),
        ([*TRAIN, "--data", "syn-b:x"], "the bias must be a number, got 'x'"),
        ([*TRAIN, "--data", "syn-b:1.5"], "bias"),
        ([*TRAIN, "--data", "tu:MUTAG:random"], "accepted are good-motif:base"),
        (
            [*TRAIN, "--data", "syn-b:0.9", "--num-data", "80", "--select-on", "id_val"],
            "only the splits train, val, test",
        ),
        ([*TRAIN, *DATA, "--gamma", "1"], "--gamma is an option of aia, not of erm"),
        ([*TRAIN, *DATA, "--strength", "1"], "--strength is an option of irm, vrex.*not of erm"),
        ([*TRAIN, *DATA, "--dropout", "0.5"], "--dropout is not an option of the network of cal"),
        ([*TRAIN, *DATA, "--hidden", "0"], "hidden must be an integer >= 1, got 0"),
        ([*TRAIN, *DATA, "--epochs", "0"], "epochs must be an integer >= 1, got 0"),
        (["train", "--method", "cal", *DATA, "--dropout", "0.5"], "--dropout is an option of aia"),
        (["train", "--method", "aia", *DATA, "--layers", "1"], "--layers must be at least 2 for aia, got 1"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        run(*words)
    assert not (tmp_path / "runs" / "graph-ood" / "result.json").exists()


def test_missing_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BALLAST_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="--root or BALLAST_DATA"):
        run(*TRAIN, "--data", "tu:MUTAG")
    with pytest.raises(FileNotFoundError, match=r"MUTAG_A\.txt"):
        run(*TRAIN, "--data", "tu:MUTAG", "--root", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run("evaluate", "--run", str(tmp_path / "nowhere"))


def test_bad_explanations(tmp_path, capsys):
    train(capsys, tmp_path / "erm", "erm", epochs=1)
    with pytest.raises(ValueError, match="is a run of erm; only cal, aia, infoigl have masks"):
        run("explain", "--run", str(tmp_path / "erm"))
    train(capsys, tmp_path / "cal", "cal", epochs=1)
    with pytest.raises(ValueError, match=r"--graphs must name graphs in \[0, 12\) of split test, got \[0, 99\]"):
        run("explain", "--run", str(tmp_path / "cal"), "--graphs", "0", "99")
    with pytest.raises(ValueError, match="has the splits train, id_val"):
        run("explain", "--run", str(tmp_path / "cal"), "--split", "tset")
    with pytest.raises(ValueError, match=r"\.svg or \.png"):
        run("explain", "--run", str(tmp_path / "cal"), "--output", str(tmp_path / "a.pdf"))
