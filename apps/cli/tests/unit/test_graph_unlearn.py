from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from ballast_cli.graph_unlearn import graph_unlearn_app

if TYPE_CHECKING:
    from pathlib import Path

SHORT = ("--epochs", "15")


def call(*words: str) -> Any:
    return graph_unlearn_app(list(words), exit_on_error=False, print_error=False, result_action="return_value")


def summary(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    call(*words, *SHORT, "--json")
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("task", ["node", "edge", "feature"])
def test_run(tmp_path, capsys, task):
    out = tmp_path / "out.json"
    shown = summary(capsys, "run", "--task", task, "--runs", "2", "--output", str(out))
    stored = json.loads(out.read_text())
    assert stored["settings"]["task"] == task
    assert [entry["key"] for entry in stored["runs"]] == [[0], [1]]
    rows = [row for entry in stored["runs"] for row in entry["rows"]]
    assert shown["runs"] == 2
    assert shown["refused"] == 0
    assert shown["updated"] == pytest.approx(sum(row["updated"] for row in rows) / 2)
    for row in rows:
        assert 0 < row["residual"] < 1e-3 < row["undamped_residual"] < 1
        assert row["damping"] == 10
        assert row["step_norm"] > 0
        assert {"original", "no_update", "updated", "retrain"} <= row.keys()
    assert {**stored["summary"], "output": str(out)} == shown


def test_solvers_and_options_reach_the_library(capsys):
    published = summary(capsys, "run", "--solver", "neumann", "--num-iter", "20")
    assert published["damping"] == 0
    assert published["products"] >= 20
    automatic = summary(capsys, "run", "--damping", "auto", "--hessian", "after", "--graph", "full", "--self-loops")
    assert automatic["damping"] not in (0, 10)
    assert summary(capsys, "run", "--damping", "1000")["step_norm"] < automatic["step_norm"]


def test_a_refused_step_is_recorded(capsys):
    shown = summary(capsys, "run", "--solver", "neumann", "--scale", "0.01")
    assert shown["refused"] == 1
    assert "updated" not in shown
    assert {"no_update", "retrain"} <= shown.keys()


def test_labels_of_test_nodes_are_let_in_with_a_warning(capsys):
    with pytest.warns(UserWarning, match="restrict_to_train=False"):
        summary(capsys, "run", "--no-restrict-to-train")


def test_efficacy(tmp_path, capsys):
    out = tmp_path / "out.json"
    words = ("efficacy", "--ratios", "0.5", "1.0", "--updates", "gif_cg", "--runs", "2", "--output", str(out))
    shown = summary(capsys, *words)
    stored = json.loads(out.read_text())
    assert [entry["key"] for entry in stored["runs"]] == [[0.5, 0], [0.5, 1], [1.0, 0], [1.0, 1]]
    rows = [row for entry in stored["runs"] for row in entry["rows"]][2:]
    assert shown["1 gif_cg"] == pytest.approx(sum(row["gif_cg"] for row in rows) / 2)
    assert shown["1 gain gif_cg"] == pytest.approx(shown["1 gif_cg"] - shown["1 no_update"])
    assert shown["0.5 refused"] == 0
    assert "0.5 if" not in shown


def test_mia(capsys):
    shown = summary(capsys, "mia", "--ratio", "0.2", "--updates", "gif_cg", "--hidden", "8", "--dropout", "0")
    assert shown["no_update l2"] == 0.5
    assert shown["gif_cg l2"] != 0.5
    assert 0 < shown["retrain loss"] < 1
    assert shown["refused"] == shown["shortened"] == 0


@pytest.mark.parametrize("command", ["run", "efficacy", "mia"])
def test_an_interrupted_command_continues(tmp_path, capsys, monkeypatch, command):
    more = {"run": (), "mia": ("--updates", "gif_cg"), "efficacy": ("--updates", "gif_cg", "--ratios", "0.5")}
    words = (command, "--runs", "3", *more[command])
    whole = summary(capsys, *words)
    out = str(tmp_path / "cut.json")

    class Interrupt(Exception):
        pass

    done = []

    def stop(self: Any) -> None:
        done.append(1)
        if len(done) == 2:
            raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr("ballast_cli.graph_unlearn._RunProgress.advance", stop)
        with pytest.raises(Interrupt):
            summary(capsys, *words, "--output", out)
    kept = json.loads((tmp_path / "cut.json").read_text())["runs"]
    assert len(kept) == 2
    resumed = summary(capsys, *words, "--output", out)
    after = json.loads((tmp_path / "cut.json").read_text())["runs"]
    assert after[:2] == kept  # not computed again: times would differ
    same = {key: value for key, value in whole.items() if "seconds" not in key}
    assert {key: value for key, value in resumed.items() if "seconds" not in key and key != "output"} == same


def test_a_file_with_other_settings_is_not_continued(tmp_path, capsys):
    out = tmp_path / "out.json"
    summary(capsys, "run", "--output", str(out))
    before = out.read_text()
    with pytest.raises(ValueError, match=r"step.damping = 10.0, asked for is 20.0"):
        summary(capsys, "run", "--damping", "20", "--output", str(out))
    with pytest.raises(ValueError, match="command"):
        summary(capsys, "mia", "--output", str(out))
    assert out.read_text() == before
    summary(capsys, "run", "--damping", "20", "--output", str(out), "--fresh")
    assert json.loads(out.read_text())["settings"]["step"]["damping"] == 20


@pytest.mark.parametrize("text", ["hello", "[1, 2]", "{}", '{"runs": 3}'])
def test_another_file_is_not_overwritten(tmp_path, text):
    (tmp_path / "notes").write_text(text)
    with pytest.raises(ValueError, match="notes is not a file of runs"):
        call("run", "--output", str(tmp_path / "notes"))
    assert (tmp_path / "notes").read_text() == text


def test_plain_lines_when_not_a_terminal(capsys):
    call("run", "--runs", "2", *SHORT)
    shown = capsys.readouterr()
    assert "run 2/2" in shown.err
    assert "no_update" in shown.out


BAD = {
    "ratio": (("run", "--ratio", "1.5"), "ratio"),
    "damping": (("run", "--damping", "-1"), "damping"),
    "runs": (("run", "--runs", "0"), "runs"),
    "self loops": (("run", "--model", "gat", "--self-loops"), "gcn and sgc"),
    "no pairs": (("efficacy", "--ratios", "1000"), "pairs of different label"),
    "nothing deleted": (("mia", "--ratio", "0.0001"), "deletes none"),
    "epochs": (("run", "--epochs", "-1"), "epochs"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    words, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call(*words)


def test_missing_files(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="cora"):
        call("run", "--data", "cora", "--root", str(tmp_path))
    monkeypatch.delenv("BALLAST_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="--data synthetic"):
        call("mia", "--data", "cora")


def test_real_data(data_root: Path, capsys):
    shown = summary(capsys, "run", "--data", "cora", "--root", str(data_root), "--task", "edge")
    by_chance = 0.31  # the largest class
    assert shown["no_update"] > by_chance + 0.3
