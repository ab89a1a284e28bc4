"""`ballast recsys adnce tu` on a tiny generated data set."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from cyclopts import CycloptsError

from ballast_cli.recsys_adnce import adnce_app

if TYPE_CHECKING:
    from pathlib import Path

SMALL = ["--epochs", "3", "--seeds", "2", "--hidden", "4", "--folds", "5", "--batch-size", "16"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Rings of class 0 and stars of class 1 in the TU text format."""
    edges, owner, labels, first = [], [], [], 1
    for number in range(40):
        size = 5 + number % 6
        for i in range(size):
            other = (i + 1) % size if number % 2 else 0
            if i != other:
                edges += [(first + i, first + other), (first + other, first + i)]
        owner += [number + 1] * size
        labels.append(number % 2)
        first += size
    raw = tmp_path / "root" / "TOY" / "raw"
    raw.mkdir(parents=True)
    (raw / "TOY_A.txt").write_text("".join(f"{a}, {b}\n" for a, b in sorted(set(edges))))
    (raw / "TOY_graph_indicator.txt").write_text("".join(f"{graph}\n" for graph in owner))
    (raw / "TOY_graph_labels.txt").write_text("".join(f"{label}\n" for label in labels))
    return tmp_path / "root"


def run(*words: Any) -> None:
    adnce_app([str(word) for word in words], exit_on_error=False, print_error=False, result_action="return_value")


def tu(capsys: pytest.CaptureFixture[str], root: Path, output: Path, *words: str) -> dict[str, Any]:
    run("tu", "--dataset", "TOY", "--root", root, "--output", output, *SMALL, *words, "--json")
    return json.loads(capsys.readouterr().out)


def test_tu_trains_and_writes_what_it_says(root, tmp_path, capsys):
    before = sorted(root.rglob("*"))
    result = tu(capsys, root, tmp_path / "out", "--mu", ".7", "--sigma", "1")
    assert sorted(root.rglob("*")) == before
    assert (result["loss"], result["graphs"], result["largest_class"]) == ("adnce", 40, 0.5)
    assert len(result["per_seed"]) == 2
    assert result["accuracy"] > 0.7
    assert json.loads((tmp_path / "out" / "TOY" / "result.json").read_text()) == result
    assert (tmp_path / "out" / "TOY" / "seed-1.safetensors").is_file()
    plain = tu(capsys, root, tmp_path / "plain")
    assert plain["loss"] == "infonce"


def test_tu_continues_an_interrupted_run(root, tmp_path, capsys, monkeypatch):
    import recsys_losses.adnce as module

    whole = tu(capsys, root, tmp_path / "whole", "--aug", "random4")
    evaluate = module.evaluate_svm

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if options["seed"] == 1:
            raise RuntimeError("cut off")
        return evaluate(*arguments, **options)

    monkeypatch.setattr(module, "evaluate_svm", interrupted)
    with pytest.raises(RuntimeError, match="cut off"):
        tu(capsys, root, tmp_path / "cut", "--aug", "random4")
    capsys.readouterr()
    seeds: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        seeds.append(options["seed"])
        return evaluate(*arguments, **options)

    monkeypatch.setattr(module, "evaluate_svm", counted)
    cut = tu(capsys, root, tmp_path / "cut", "--aug", "random4")
    assert seeds == [1]  # seed 0 was finished
    assert cut["per_seed"] == whole["per_seed"]
    seeds.clear()
    assert tu(capsys, root, tmp_path / "cut", "--aug", "random4", "--fresh")["per_seed"] == whole["per_seed"]
    assert seeds == [0, 1]
    with pytest.raises(ValueError, match=r"other settings: augmentation"):
        tu(capsys, root, tmp_path / "cut")


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--mu", "0.5"], ValueError, "mu and sigma"),
        (["--temperature", "0"], ValueError, "temperature must be a positive"),
        (["--seeds", "0"], ValueError, "seeds must be >= 1"),
        (["--dataset", "TOYS"], FileNotFoundError, "data sets in .*: TOY"),
        (["--folds", "30"], ValueError, "at least two classes of at least 30 rows"),
        (["--aug", "random9"], CycloptsError, "random9"),
    ],
)
def test_bad_input(root, tmp_path, words, error, message):
    with pytest.raises(error, match=message):
        run("tu", "--root", root, "--output", tmp_path, *(["--dataset", "TOY"] * ("--dataset" not in words)), *words)
