"""`ballast recsys raremed`, as a person meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cyclopts import CycloptsError

from ballast_cli.recsys_raremed import raremed_app

NETWORK = ["--embed-dim", "16", "--num-layers", "1", "--num-heads", "2", "--ff-dim", "32", "--lr", "1e-3"]


def run(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, object]:
    raremed_app([*map(str, words), "--json"], exit_on_error=False, print_error=False, result_action="return_value")
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ehr")
    raremed_app(["make-synthetic", "--num-patients", "60", "--output", str(folder)], result_action="return_value")
    return folder


def test_make_synthetic_writes_a_data_set(tmp_path, capsys):
    from recsys_losses.raremed import EHRDataset

    result = run(
        capsys, "make-synthetic", "--num-patients", 30, "--seed", 2, "--ddi-format", "csv", "--output", tmp_path
    )
    assert result["patients"] == 30
    assert 0.5 < result["bayes_optimal_jaccard"] < 0.9
    data = EHRDataset.from_jsonl(tmp_path)
    assert len(data) == result["visits"]
    assert data.visits == EHRDataset.synthetic(num_patients=30, seed=2).visits


def test_prepare_mimic_on_the_demo(data_root, tmp_path, capsys):
    demo = data_root / "recsys" / "mimic-iii-demo"
    result = run(capsys, "prepare-mimic", demo, "--min-admissions", 1, "--min-occurrences", 1, "--output", tmp_path)
    assert result["visits"] == 107
    assert len((tmp_path / "visits.jsonl").read_text().splitlines()) == 107


def test_from_pretraining_to_evaluation(data, tmp_path, capsys):
    before, after = tmp_path / "pretrain", tmp_path / "finetune"
    pretraining = ["--smp-epochs", 1, "--sr-epochs", 2, "--different-patient"]
    first = run(capsys, "pretrain", "--data", data, "--output", before, *NETWORK, *pretraining, "--seed", 3)
    assert 0 < first["smp_accuracy"] <= 1
    assert first["sr_loss"] > 0
    words = ["finetune", "--data", data, "--pretrained", before, "--epochs", 2, "--output", after]
    tuned = run(capsys, *words)
    assert 0 <= tuned["jaccard"] <= 1
    assert json.loads((after / "metrics.json").read_text()) == tuned
    assert json.loads((after / "config.json").read_text())["seed"] == 3
    found = run(capsys, "evaluate", "--model", after / "model.safetensors", "--data", data)
    assert found["jaccard"] == pytest.approx(tuned["jaccard"])
    assert {"ddi_rate", "prauc", "gap", "group_std", "group_5"} <= found.keys()


def test_the_pretrained_weights_are_the_start(data, tmp_path, capsys):
    from recsys_losses.raremed import load_raremed

    before = tmp_path / "pretrain"
    run(capsys, "pretrain", "--data", data, "--output", before, *NETWORK, "--smp-epochs", 0, "--sr-epochs", 1)
    words = ["finetune", "--data", data, "--pretrained", before, "--epochs", 1, "--output", tmp_path / "a"]
    run(capsys, *words)
    run(capsys, "finetune", "--data", data, *NETWORK, "--epochs", 1, "--output", tmp_path / "b")
    start, tuned, scratch = (
        load_raremed(path / "model.safetensors").sr.weight for path in (before, tmp_path / "a", tmp_path / "b")
    )
    assert (start == tuned).all()  # fine-tuning doesn't touch the head of pre-training
    assert (start != scratch).any()


def test_the_same_command_continues(data, tmp_path, capsys):
    words = ["finetune", "--data", data, *NETWORK]
    run(capsys, *words, "--epochs", 1, "--output", tmp_path / "cut")
    resumed = run(capsys, *words, "--epochs", 3, "--output", tmp_path / "cut")
    whole = run(capsys, *words, "--epochs", 3, "--output", tmp_path / "whole")
    for name in ("jaccard", "prauc", "best_epoch"):
        assert resumed[name] == whole[name]
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["make-synthetic", "--num-patients", "0"], "num_patients must be at least 1"),
        (["prepare-mimic", "/nowhere"], "no folder /nowhere"),
        (["pretrain", "--data", "/nowhere"], "/nowhere"),
        (["pretrain", "--data", "DATA", "--smp-epochs", "0", "--sr-epochs", "0"], "one of them above"),
        (["finetune", "--data", "DATA", "--pretrained", "/nowhere"], "pretrain"),
        (["finetune", "--data", "DATA", "--pretrained", "/nowhere", "--lr", "1e-3"], "come from --pretrained"),
        (["finetune", "--data", "DATA", "--embed-dim", "15"], "divisible"),
        (["finetune", "--data", "DATA", "--embed-dim", "16", "--ddi-weight", "-1"], "ddi_weight"),
        (["finetune", "--data", "DATA", "--embed-dim", "16", "--threshold", "1"], "threshold"),
        (["evaluate", "--model", "/nowhere.safetensors", "--data", "DATA"], "/nowhere.safetensors"),
    ],
)
def test_bad_input_says_what_is_wrong(data, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    words = [str(data) if word == "DATA" else word for word in words]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        raremed_app(words, exit_on_error=False, print_error=False, result_action="return_value")


@pytest.mark.parametrize("words", [["finetune"], ["finetune", "--data", "x", "--relevance", "rnk"], ["train"]])
def test_unknown_words_are_refused(words):
    with pytest.raises(CycloptsError):
        raremed_app(words, exit_on_error=False, print_error=False, result_action="return_value")
