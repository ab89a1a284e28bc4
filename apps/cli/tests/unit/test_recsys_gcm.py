"""`ballast recsys gcm` as a person meets it: files, numbers that repeat, and runs that continue."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from ballast_cli.recsys_gcm import gcm_app

if TYPE_CHECKING:
    from pathlib import Path


def run(*words: object) -> Any:
    return gcm_app([str(word) for word in words], exit_on_error=False, print_error=False, result_action="return_value")


def results(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    run(*words, "--json")
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    run("make-synthetic", "--output", tmp_path / "data", "--users", 40, "--items", 80, "--interactions", 800)
    capsys.readouterr()
    return tmp_path / "data"


class CutError(Exception):
    """What ends a run halfway."""


SMALL = ("--dim", 8, "--layers", 1, "--batch-size", 512, "--lr", 0.01)


def test_make_synthetic_writes_the_four_files_and_says_what_can_be_reached(tmp_path, capsys):
    words = ("make-synthetic", "--output", tmp_path / "a", "--users", 40, "--items", 80, "--interactions", 800)
    summary = results(capsys, *words)
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"train.dat", "test.dat", "userid_dict.txt", "itemid_dict.txt"}
    assert summary["users"] == summary["test"] == 40
    assert len((tmp_path / "a" / "train.dat").read_text().splitlines()) == summary["train"] + 1
    loose = results(capsys, *words, "--no-mask-target")
    assert loose["true_scores_hr@10"] > summary["true_scores_hr@10"] > 0


def test_train_writes_what_it_says_and_evaluate_repeats_it(folder, tmp_path, capsys):
    output = tmp_path / "run"
    trained = results(capsys, "train", "--data", folder, "--output", output, *SMALL, "--epochs", 3, "--ks", 5, 10)
    assert 0 < trained["hr@10"] <= 1
    assert json.loads((output / "metrics.json").read_text()) == trained
    history = json.loads((output / "history.json").read_text())
    assert [record["epoch"] for record in history] == [0, 1, 2]
    assert max(history, key=lambda r: r["hr@10+ndcg@10"])["epoch"] == trained["best_epoch"]
    assert yaml.safe_load((output / "config.yaml").read_text())["layers"] == 1
    model = output / "model.safetensors"
    again = results(capsys, "evaluate", "--model", model, "--data", folder, "--ks", 5, 10)
    assert again == {name: trained[name] for name in again}
    target = tmp_path / "metrics.json"
    loose = results(capsys, "evaluate", "--model", model, "--data", folder, "--no-mask-target", "--output", target)
    assert loose["hr@10"] >= again["hr@10"]
    assert json.loads(target.read_text()) == loose


def test_every_option_of_the_card_is_taken(folder, tmp_path, capsys):
    words = ("--layers", 2, "--norm", "both", "--decoder", "inner_product", "--merge", "product", "--negatives", 2)
    more = ("--reg", 1e-2, "--layer-weights", 0.5, 0.3, 0.2, "--keep-context", "f0", "last", "--select-on", "none")
    output = tmp_path / "run"
    base = ("train", "--data", folder, "--output", output, "--dim", 8, "--epochs", 1)
    assert results(capsys, *base, *words, *more)["best_epoch"] == 0
    config = yaml.safe_load((output / "config.yaml").read_text())
    assert config["layer_weights"] == [0.5, 0.3, 0.2]
    assert config["keep_context"] == ["f0", "last"]
    assert config["norm"] == "both"
    # another selection of fields numbers the contexts otherwise
    with pytest.raises(ValueError, match="contexts are numbered otherwise"):
        run("evaluate", "--model", output / "model.safetensors", "--data", folder)


def test_the_same_command_continues_an_interrupted_run(folder, tmp_path, capsys, monkeypatch):
    from ballast_cli import recsys_gcm

    words = ("train", "--data", folder, *SMALL, "--epochs", 5, "--output")
    whole = results(capsys, *words, tmp_path / "whole")

    class Cut(recsys_gcm.EpochProgress):
        def update(self, record: Any) -> None:
            if record["epoch"] == 1:
                raise CutError

    with monkeypatch.context() as patch:
        patch.setattr(recsys_gcm, "EpochProgress", Cut)
        with pytest.raises(CutError):
            run(*words, tmp_path / "cut", "--json")
    capsys.readouterr()
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    continued = results(capsys, *words, tmp_path / "cut")
    for name in set(whole) - {"seconds", "output"}:
        assert continued[name] == whole[name], name


def test_bad_input_is_named(folder, tmp_path, capsys):
    train = ("train", "--data", folder, "--output", tmp_path / "run", "--epochs", 1)
    with pytest.raises(ValueError, match="keep_context must contain c_last"):
        run(*train, "--keep-context", "f0")
    with pytest.raises(ValueError, match="k must be in 1"):
        run(*train, "--ks", 81)
    with pytest.raises(ValueError, match="layer_weights must be"):
        run(*train, "--layer-weights", 1.0)
    text = (folder / "train.dat").read_text().splitlines()
    (folder / "train.dat").write_text("\n".join([*text[:3], text[3] + "-7", *text[4:]]))
    with pytest.raises(ValueError, match=r"train\.dat:4: expected integers joined as in the header"):
        run(*train)
    with pytest.raises(FileNotFoundError, match=r"userid_dict\.txt"):
        run("train", "--data", tmp_path / "nothing")
