from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from cyclopts import App

from ballast_cli.graph_ood_cluster import cluster

app = App(name="graph-ood")
app.command(cluster)


def run(*words: object) -> Any:
    return app(["cluster", *map(str, words)], exit_on_error=False, print_error=False, result_action="return_value")


def blobs(n=60):
    truth = np.arange(n) % 3
    return np.eye(3, 8)[truth] + 0.05 * np.random.default_rng(0).standard_normal((n, 8)), truth


@pytest.mark.parametrize(
    ("method", "words"),
    [("asrc", ["--epochs", "1"]), ("rcc", ["--threshold", "2"]), ("kmeans", ["--num-clusters", "3"])],
)
def test_clusters_a_file_and_scores_it(tmp_path, capsys, method, words):
    points, truth = blobs()
    np.save(tmp_path / "x.npy", points)
    np.savetxt(tmp_path / "y.csv", truth, fmt="%d")
    out = tmp_path / "out"
    run(
        "--data",
        tmp_path / "x.npy",
        "--labels",
        tmp_path / "y.csv",
        "--method",
        method,
        "--output",
        out,
        "--json",
        *words,
    )
    printed = json.loads(capsys.readouterr().out)
    assert printed.pop("output") == str(out)
    assert json.loads((out / "result.json").read_text()) == printed
    assert printed["acc"] == 1.0
    assert printed["num_clusters"] == 3
    labels = np.loadtxt(out / "labels.csv", dtype=int)
    assert len({(a, b) for a, b in zip(labels.tolist(), truth.tolist(), strict=True)}) == 3


def test_no_labels_no_scores(tmp_path, capsys):
    points, _ = blobs()
    np.savetxt(tmp_path / "x.csv", points, delimiter=",")
    run("--data", tmp_path / "x.csv", "--method", "rcc", "--output", tmp_path / "out")
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert "nmi" not in result
    assert result["points"] == 60
    assert "num_clusters" in capsys.readouterr().out


def test_mat_file_with_classes(tmp_path, capsys):
    from scipy.io import savemat

    points, truth = blobs()
    folder = tmp_path / "graph" / "clustering"
    folder.mkdir(parents=True)
    savemat(folder / "JAFFE.mat", {"X": points, "Y": truth[:, None] + 5})
    words = ("--method", "kmeans", "--num-clusters", "3", "--output", tmp_path / "out", "--json")
    run("--data", "mat:JAFFE", "--root", tmp_path, *words)
    first = json.loads(capsys.readouterr().out)
    run("--data", folder / "JAFFE.mat", *words)
    second = json.loads(capsys.readouterr().out)
    assert first["nmi"] == second["nmi"] == pytest.approx(1.0)


def test_plain_progress(tmp_path, capsys):
    np.save(tmp_path / "x.npy", blobs()[0])
    run("--data", tmp_path / "x.npy", "--epochs", "1", "--output", tmp_path / "out")
    assert "epoch 1/1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--data", "nowhere.npy"], FileNotFoundError, "no such file"),
        (["--data", "mat:COIL"], ValueError, "did you mean 'COIL20'"),
        (["--data", "mat:COIL20", "--root", "ROOT"], FileNotFoundError, "COIL20"),
        (["--data", "digits", "--method", "kmeans"], ValueError, "needs --num-clusters"),
        (["--data", "digits", "--num-clusters", "3"], ValueError, "leave out --num-clusters"),
        (["--data", "GOOD", "--labels", "SHORT"], ValueError, "60 integers"),
        (["--data", "GOOD", "--labels", "none.csv"], FileNotFoundError, "none.csv"),
        (["--data", "WORDS"], ValueError, "can't be read"),
        (["--data", "NAN"], ValueError, "finite"),
        (["--data", "TXT"], ValueError, "a .npy, .csv or .mat file"),
        (["--data", "MAT"], ValueError, "MATLAB"),
        (["--data", "GOOD", "--method", "kmeans", "--num-clusters", "61"], ValueError, r"in \[1, 60\]"),
        (["--data", "GOOD", "--neighbors", "60"], ValueError, "k must be"),
    ],
)
def test_bad_input(tmp_path, words, error, message):
    np.save(tmp_path / "good.npy", blobs()[0])
    np.save(tmp_path / "nan.npy", np.full((5, 2), np.nan))
    (tmp_path / "short.csv").write_text("0\n1\n")
    for name in ("words.csv", "x.txt", "x.mat"):
        (tmp_path / name).write_text("a,b\nc,d\n")
    files = {
        "ROOT": tmp_path,
        "GOOD": tmp_path / "good.npy",
        "SHORT": tmp_path / "short.csv",
        "WORDS": tmp_path / "words.csv",
        "NAN": tmp_path / "nan.npy",
        "TXT": tmp_path / "x.txt",
        "MAT": tmp_path / "x.mat",
    }
    with pytest.raises(error, match=message):
        run(*(files.get(word, word) for word in words), "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()
