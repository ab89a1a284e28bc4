"""`ballast pref` as a person meets it: files in, files out, exit codes and messages."""

from __future__ import annotations

import json
import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path
from typing import Any

import pytest
import yaml

from ballast_cli.main import main
from ballast_cli.pref_train import draw_curves

SHORT = ("--per_device_train_batch_size", "4", "--max_length", "128", "--logging_steps", "1")
PAIR = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    code = main(["pref", *map(str, words), "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    code = main(["pref", *map(str, words)])
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert "Traceback" not in captured.err
    assert not captured.out
    return captured.err


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files in the forms that are converted."""
    folder = tmp_path_factory.mktemp("raw")
    problems = [
        {"question": f"What is {n} and {n + 1}?", "answer": f"{n}+{n + 1}=<<{n}>>{2 * n + 1}\n#### {2 * n + 1}"}
        for n in range(11, 51)
    ]
    lines(folder / "gsm8k.jsonl", problems)
    names = [f"Artist {letter}" for letter in "ABCDEFGH"]
    heard = [
        {
            "historyList": "::".join((names + names)[i % 8 : i % 8 + 1 + i // 8]),
            "itemList": names,
            "trueSelection": name,
        }
        for i, name in enumerate(names * 4)
    ]
    (folder / "lastfm.json").write_text(json.dumps(heard))
    opening = "\n\nHuman: 1+1?\n\nAssistant:"
    dialogues = [{"chosen": opening + " 2", "rejected": opening + end} for end in (" 3", " 2 ", " 4")]
    lines(folder / "hh.jsonl", dialogues)
    return folder


@pytest.fixture
def pairs(raw, tmp_path, capsys) -> Path:
    words = ("--no-solutions", "--held-out", "0.2", "--flip-rate", "0.2", "--output", tmp_path / "pairs")
    run(capsys, "convert", "gsm8k", "--source", raw / "gsm8k.jsonl", *words)
    return tmp_path / "pairs"


# --- convert ---------------------------------------------------------------------------------------------------------


def test_gsm8k_pairs_have_the_flip_rate_and_a_clean_rest(raw, tmp_path, capsys):
    words = ("gsm8k", "--source", raw / "gsm8k.jsonl", "--flip-rate", "0.2", "--held-out", "0.25")
    shown = run(capsys, "convert", *words, "--output", tmp_path)
    assert (shown["train_rows"], shown["held_out_rows"], shown["flipped"]) == (30, 10, 6)
    train, rest = read(tmp_path / "train.jsonl"), read(tmp_path / "held_out.jsonl")
    assert sum(row["flipped"] for row in train) == 6
    assert not any(row["flipped"] for row in rest)
    for row in train + rest:
        right = row["rejected" if row["flipped"] else "chosen"]
        first, second = row["prompt"].removeprefix("What is ").removesuffix("?\n").split(" and ")
        assert right == f"{first}+{second}={int(first) + int(second)}\n#### {int(first) + int(second)}"
    assert json.loads((tmp_path / "convert.json").read_text())["train_rows"] == 30


def test_lastfm_lists_and_pairs(raw, tmp_path, capsys):
    source = ("lastfm", "--source", raw / "lastfm.json", "--output", tmp_path)
    run(capsys, "convert", *source, "--negatives", "3")
    rows = read(tmp_path / "train.jsonl")
    assert {len(row["rejected"]) for row in rows} == {3}
    run(capsys, "convert", *source)
    assert {len(row["rejected"]) for row in read(tmp_path / "train.jsonl")} == {7}
    run(capsys, "convert", *source, "--negatives", "0", "--conversational")
    assert read(tmp_path / "train.jsonl")[0]["rejected"][0]["role"] == "assistant"


def test_hh_says_what_it_left_out(raw, tmp_path, capsys):
    shown = run(capsys, "convert", "hh", "--source", raw / "hh.jsonl", "--output", tmp_path)
    assert (shown["train_rows"], shown["dropped: equal answers"]) == (2, 1)


def test_real_files_are_found_below_the_data_root(data_root, tmp_path, capsys):
    shown = run(capsys, "convert", "lastfm", "--root", data_root, "--negatives", "5", "--output", tmp_path)
    assert shown["train_rows"] == 2767


BAD_CONVERSIONS = {
    "option of another kind": (("hh", "--flip-rate", "0.1"), "--flip-rate is an option of gsm8k, not of hh"),
    "flip rate": (("gsm8k", "--flip-rate", "1.5"), "rate must be in [0, 1], got 1.5"),
    "held out": (("gsm8k", "--held-out", "1"), "--held-out must be in [0, 1), got 1.0"),
    "negatives": (("lastfm", "--negatives", "8"), "num_negatives=8, but only 7 other candidates"),
    "vectors of pairs": (("lastfm", "--negatives", "0", "--user-vectors"), "--user-vectors is for lists"),
    "other file": (("gsm8k", "--source", "{raw}/hh.jsonl"), "hh.jsonl:1: question must be a text"),
    "no file": (("gsm8k", "--source", "{raw}/none.jsonl"), "no such file"),
    "no source": (("hh",), "hh needs --source FILE"),
    "unknown kind": (("hhh",), 'Invalid value "hhh"'),
}


@pytest.mark.parametrize("case", BAD_CONVERSIONS)
def test_bad_conversions(raw, tmp_path, capsys, case):
    (kind, *words), message = BAD_CONVERSIONS[case]
    if case not in ("other file", "no file", "no source", "unknown kind"):
        suffix = "json" if kind == "lastfm" else "jsonl"
        words += ["--source", str(raw / f"{kind}.{suffix}")]
    words = [word.format(raw=raw) for word in words]
    assert message in refused(capsys, "convert", kind, *words, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the whole way on pairs ------------------------------------------------------------------------------------------


def test_train_evaluate_score_select_and_train_again(pairs, tmp_path, capsys):
    held_out = pairs / "held_out.jsonl"
    words = ("--method", "simpo", "--data", pairs / "train.jsonl", "--eval-data", held_out, "--tiny", *SHORT)
    first = run(capsys, "train", *words, "--max_steps", "6", "--output", tmp_path / "simpo")
    assert (first["method"], first["steps"], first["rows"]) == ("simpo", 6, 32)
    history = json.loads((tmp_path / "simpo" / "history.json").read_text())
    assert [record["step"] for record in history if "loss" in record] == [1, 2, 3, 4, 5, 6]
    assert first["loss"] == [record["loss"] for record in history if "loss" in record][-1]
    curves = (tmp_path / "simpo" / "curves.svg").read_text()
    assert all(f">{label}</text>" in curves for label in ("loss", "margin", "accuracy", "simpo on train.jsonl"))
    assert {**first} == json.loads((tmp_path / "simpo" / "result.json").read_text())

    # What the command says of the written model is what the trainer said of it: SimPO's reward is 2.5 times the mean.
    found = run(capsys, "evaluate", "--data", held_out, "--model", tmp_path / "simpo", "--average")
    assert found["accuracy"] == pytest.approx(first["eval_rewards/accuracies"])
    assert 2 * found["margin"] == pytest.approx(first["eval_rewards/margins"], rel=1e-4)
    assert (found["rows"], found["left_out"], found["by_chance"]) == (8, 0, 0.5)

    # Another model of transformers, trained by an adapter, with the first as its reference; then both as judges.
    dpo = ("--method", "dpo", "--option", "beta=0.2", "--data", pairs / "train.jsonl", "--eval-data", held_out, *SHORT)
    small = ("--model", tmp_path / "simpo", "--use_peft", "--max_steps", "2", "--learning_rate", "0.01")
    second = run(capsys, "train", *dpo, *small, "--output", tmp_path / "dpo")
    found = run(capsys, "evaluate", "--data", held_out, "--model", tmp_path / "dpo", "--reference", tmp_path / "simpo")
    assert found["accuracy"] == pytest.approx(second["eval_rewards/accuracies"])
    assert 0.2 * found["margin"] == pytest.approx(second["eval_rewards/margins"], rel=1e-3)

    scoring = ("--data", pairs / "train.jsonl", "--model", tmp_path / "dpo", "--reward-model", tmp_path / "simpo")
    scored = run(capsys, "score", *scoring, "--output", tmp_path / "scored.jsonl")
    rows = read(tmp_path / "scored.jsonl")
    assert scored["rows"] == len(rows) == 32
    assert scored["implicit_margin"] == pytest.approx(sum(row["logp_margin_norm_abs"] for row in rows) / 32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dpo", "pairs", "scored.jsonl", "simpo"]

    chosen = run(capsys, "select", "--data", tmp_path / "scored.jsonl", "--ratio", "0.4", "--output", tmp_path / "best")
    best = read(tmp_path / "best")
    assert chosen["selected"] == len(best) == 12
    assert {row["idx"] for row in best} < {row["idx"] for row in rows}
    assert chosen["selected_explicit_margin"] > chosen["explicit_margin"]
    (tmp_path / "best").rename(tmp_path / "best.jsonl")
    words = ("--method", "dr_dpo", "--data", tmp_path / "best.jsonl", "--tiny", *SHORT, "--max_steps", "1")
    assert run(capsys, "train", *words, "--output", tmp_path / "dr_dpo")["rows"] == 12


def test_a_classifier_is_a_reward_model(pairs, tmp_path, capsys):
    import torch
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    from pref_opt.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    judge = Qwen2ForSequenceClassification(config).eval()
    judge.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    words = ("--data", pairs / "held_out.jsonl", "--tiny", "--batch-size", "3", "--output", tmp_path / "scored.jsonl")
    run(capsys, "score", *words, "--reward-model", tmp_path / "judge")
    for row in read(tmp_path / "scored.jsonl"):
        with torch.no_grad():
            said = [
                judge(**tokenizer(row["prompt"] + row[name], return_tensors="pt")).logits.item()
                for name in ("chosen", "rejected")
            ]
        assert row["rm_margin"] == pytest.approx(said[0] - said[1], abs=1e-5)


def test_an_interrupted_run_ends_as_an_uninterrupted_one(pairs, tmp_path, capsys, monkeypatch):
    from safetensors.torch import load_file

    words = ("train", "--method", "beta_dpo", "--data", pairs / "train.jsonl", "--tiny", *SHORT, "--max_steps", "5")
    whole = run(capsys, *words, "--output", tmp_path / "whole")
    reach = "ballast_cli.pref_train.CountProgress.reach"

    def interrupt(self: Any, done: int, *_: Any, line: bool = True) -> None:
        if done == 3 and not line:  # at the end of the step, not again where it is logged
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(reach, interrupt)
        assert main(["pref", *map(str, words), "--output", str(tmp_path / "cut")]) == 130
    assert "what was finished before is kept" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (tmp_path / "cut" / "result.json").exists()
    resumed = run(capsys, *words, "--output", tmp_path / "cut")
    same = {name: value for name, value in whole.items() if name not in ("seconds", "output")}
    assert same.items() <= resumed.items()
    assert "beta_used" in same
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(first[name].equal(second[name]) for name in first)

    # The same command once more says the same; another method is told apart, and --fresh starts over.
    again = run(capsys, *words, "--output", tmp_path / "cut")
    assert same.items() <= again.items()
    other = ("train", "--method", "ipo", *words[3:], "--output", tmp_path / "cut")
    assert "checkpoints of a run with method = 'beta_dpo', asked for is 'ipo'" in refused(capsys, *other)
    # What an interruption left without the state of the loss isn't resumed from.
    (tmp_path / "cut" / "checkpoint-5" / "preference_loss.safetensors").unlink()
    (tmp_path / "cut" / "checkpoint-3" / "preference_loss.safetensors").unlink()
    assert run(capsys, *other[:-1], tmp_path / "cut", "--max_steps", "1")["steps"] == 1


def test_logs_go_where_report_to_says(pairs, tmp_path, capsys, monkeypatch):
    from transformers import TrainerCallback
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    seen: list[dict[str, Any]] = []

    class Recorder(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.append(dict(logs))

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "recorder", Recorder)
    config = tmp_path / "trainer.yaml"
    config.write_text("max_steps: 2\nlearning_rate: 1e-5\nper_device_train_batch_size: 3\n")
    words = ("--data", pairs / "train.jsonl", "--tiny", "--report_to", "recorder", "--logging_steps", "1")
    more = ("--method", "repo", "--option", "gamma=0.4", "--trainer-config", config, "--output", tmp_path / "out")
    shown = run(capsys, "train", *words, *more)
    logged = [record for record in seen if "loss" in record]
    assert len(logged) == 2
    assert logged[0]["learning_rate"] == 1e-5
    assert shown["filtered_fraction"] == logged[-1]["filtered_fraction"]
    stored = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert (stored["method"], stored["options"], stored["model"]) == ("repo", {"gamma": 0.4}, "tiny")


# --- several negatives -----------------------------------------------------------------------------------------------


def test_lists_of_negatives(raw, tmp_path, capsys):
    source = ("lastfm", "--source", raw / "lastfm.json", "--negatives", "3", "--no-candidates")
    run(capsys, "convert", *source, "--user-vectors", "--held-out", "0.25", "--output", tmp_path)
    train, rest = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    words = ("--tiny", *SHORT, "--max_steps", "2")
    for method in ("napo", "dynamic_po"):
        shown = run(capsys, "train", "--method", method, "--data", train, *words, "--output", tmp_path / method)
        assert shown["steps"] == 2
    assert {"beta/mean", "boundary/fraction"} <= shown.keys()
    assert ">filtered fraction</text>" in (tmp_path / "dynamic_po" / "curves.svg").read_text()
    shown = run(
        capsys, "train", "--method", "sdpo", "--data", train, "--eval-data", rest, *words, "--output", tmp_path / "sdpo"
    )
    reference = ("--reference", tmp_path / "sdpo" / "tiny", "--output", tmp_path / "evaluated.json")
    found = run(capsys, "evaluate", "--data", rest, "--model", tmp_path / "sdpo", *reference)
    assert found["hit_ratio@1"] == pytest.approx(shown["eval_rewards/accuracies"])
    assert (found["negatives"], found["by_chance"]) == (3, 0.25)
    assert json.loads((tmp_path / "evaluated.json").read_text())["hit_ratio@1"] == found["hit_ratio@1"]
    assert "scores are made of pairs" in refused(capsys, "score", "--data", rest, "--tiny")
    assert "method dpo needs one completion as rejected" in refused(capsys, "train", "--data", train, "--tiny")


# --- bad input -------------------------------------------------------------------------------------------------------

BAD_ROWS = {
    "missing column": ([{"prompt": "a", "chosen": "b"}], "row 0: no column rejected"),
    "empty chosen": ([PAIR, PAIR | {"chosen": ""}], "row 1: chosen is empty"),
    "empty rejected": ([PAIR, PAIR | {"rejected": " "}], "row 1: rejected is empty"),
    "identical": ([PAIR, PAIR | {"rejected": "2"}], "row 1: chosen and rejected are identical: '2'"),
    "other number of negatives": (
        [PAIR | {"rejected": ["3", "4"]}, PAIR | {"rejected": ["3"]}],
        "row 1: 1 rejected, row 0 has 2; all rows must have equally many",
    ),
    "no rows": ([], "dataset is empty"),
    "no objects": (["abc"], "rows.jsonl:1: expected a JSON object, got str"),
}


@pytest.mark.parametrize("command", ["train", "evaluate", "score", "select"])
@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows(tmp_path, capsys, command, case):
    rows, message = BAD_ROWS[case]
    path = lines(tmp_path / "rows.jsonl", rows)
    model = () if command == "select" else ("--tiny",)
    error = refused(capsys, command, "--data", path, *model, "--output", tmp_path / "out")
    assert message in error
    assert "rows.jsonl" in error
    assert not (tmp_path / "out").exists()


BAD_TRAINING = {
    "unknown method": (("--method", "beta_dop"), "got 'beta_dop'; did you mean 'beta_dpo'?"),
    "beta": (("--option", "beta=0"), "beta must be positive and finite, got 0"),
    "option of another method": (("--option", "gamma=1"), "method 'dpo' doesn't accept {'gamma': 1}"),
    "option": (("--option", "beta"), "--option must be NAME=VALUE, got 'beta'"),
    "beta as an argument of TRL": (("--beta", "0.2"), "beta isn't an argument of the trainer here: use --option beta="),
    "output of TRL": (("--output-dir", "x"), "output-dir isn't an argument of the trainer here: use --output"),
    "unknown flag": (
        ("--methd", "dpo"),
        "neither this command nor the trainer knows '--methd'; did you mean --method?",
    ),
    "unknown argument": (("--max_stesp", "3"), "knows '--max_stesp'; did you mean --max_steps?"),
    "value": (("--max_steps", "three"), "arguments of the trainer: argument --max_steps"),
    "report": (("--report_to", "nowhere"), "--report_to nowhere"),
    "two models": (("--model", "x"), "give either --model FOLDER_OR_NAME or --tiny"),
    "no trainer file": (("--trainer-config", "none.yaml"), "--trainer-config: no such file: none.yaml"),
    "prompt fills max_length": (("--max_length", "3"), "the prompts of 4 of 4 rows are not shorter than max_length=3"),
    "reference": (("--method", "simpo", "--precompute_ref_log_probs"), "method 'simpo' needs no reference"),
    "pairs for lists": (("--method", "sdpo"), "method sdpo needs a list of completions as rejected"),
}


@pytest.mark.parametrize("case", BAD_TRAINING)
def test_bad_training(tmp_path, capsys, case):
    words, message = BAD_TRAINING[case]
    path = lines(tmp_path / "rows.jsonl", [PAIR] * 4)
    output = tmp_path / "out"
    assert message in refused(capsys, "train", "--data", path, "--tiny", "--output", output, *words)
    assert not list(output.glob("checkpoint-*"))


def test_long_prompts_are_cut_where_that_is_asked_for(tmp_path, capsys):
    path = lines(tmp_path / "rows.jsonl", [PAIR | {"prompt": "x" * 30 + str(n)} for n in range(4)])
    words = ("train", "--data", path, "--tiny", "--output", tmp_path / "out", "--max_length", "12", "--max_steps", "1")
    assert run(capsys, *words, "--max-prompt-length", "6")["prompts_cut"] in (0, 4)
    lists = lines(
        tmp_path / "lists.jsonl", [PAIR | {"prompt": f"{n} is odd: ", "rejected": ["3", "4"]} for n in range(4)]
    )
    error = refused(capsys, "train", "--method", "sdpo", "--data", lists, "--tiny", "--max_length", "3")
    assert "row 0: a prompt of" in error
    assert "max_length=3" in error


def test_own_names_in_a_trainer_file(tmp_path, capsys):
    path = lines(tmp_path / "rows.jsonl", [PAIR] * 4)
    for text, message in (
        ("seed: 3", "seed isn't an argument of the trainer here: use --seed"),
        ("- a", "expected a mapping of trainer arguments, got list"),
        ("max_stesp: 3", "knows '--max_stesp'"),
        ("a: [", "trainer.yaml"),
    ):
        (tmp_path / "trainer.yaml").write_text(text)
        words = ("--data", path, "--tiny", "--trainer-config", tmp_path / "trainer.yaml", "--output", tmp_path / "out")
        assert message in refused(capsys, "train", *words)


def test_bad_scores(tmp_path, capsys):
    rows = lines(tmp_path / "rows.jsonl", [PAIR] * 4)
    select = ("select", "--data", rows, "--output", tmp_path / "out.jsonl")
    assert "row 0: no rm_margin, got None; `ballast pref score` with --reward-model" in refused(capsys, *select)
    assert "no logp_margin_norm" in refused(capsys, *select, "--metric", "implicit")
    assert "select_ratio must be in [0, 1], got 2.0" in refused(capsys, *select, "--metric", "random", "--ratio", "2")
    assert "selects none of 4 pairs" in refused(capsys, *select, "--metric", "random", "--ratio", "0.2")
    assert 'Invalid value "best"' in refused(capsys, *select, "--metric", "best")
    score = ("score", "--data", rows, "--tiny", "--output", tmp_path / "out.jsonl")
    assert "batch_size must be an integer >= 1, got 0" in refused(capsys, *score, "--batch-size", "0")
    assert "fills max_length=2" in refused(capsys, *score, "--max-length", "2")
    assert "model nowhere/at-all can't be loaded" in refused(capsys, *score, "--reward-model", "nowhere/at-all")
    lines(tmp_path / "rows.jsonl", [PAIR | {"rm_margin": float(n), "logp_margin_norm": 0.1 * n} for n in range(4)])
    assert run(capsys, *select, "--ratio", "0.5", "--implicit-weight", "0")["selected_explicit_margin"] == 2.5
    assert [row["rm_margin"] for row in read(tmp_path / "out.jsonl")] == [3.0, 2.0]


def test_bad_models(tmp_path, capsys):
    import torch

    from pref_opt.tiny import tiny_causal_lm, tiny_tokenizer

    rows = lines(tmp_path / "rows.jsonl", [PAIR] * 4)
    evaluate = ("evaluate", "--data", rows)
    assert "give either --model" in refused(capsys, *evaluate)
    assert f"model {tmp_path} can't be loaded" in refused(capsys, *evaluate, "--model", tmp_path)
    assert "every prompt fills --max-length 2" in refused(capsys, *evaluate, "--tiny", "--max-length", "2")
    broken = tiny_causal_lm(tiny_tokenizer(), hidden=16, layers=1)
    broken.model.embed_tokens.weight.data[:] = torch.nan
    broken.save_pretrained(tmp_path / "broken")
    tiny_tokenizer().save_pretrained(tmp_path / "broken")
    for words in (evaluate, ("score", "--data", rows, "--output", tmp_path / "out.jsonl")):
        error = refused(capsys, *words, "--model", tmp_path / "broken")
        assert "row 0" in error
        assert "nan" in error


# --- pictures --------------------------------------------------------------------------------------------------------


def test_curves_show_what_was_logged():
    history = [{"step": step, "loss": 1 / step, "kept_fraction": 0.75, "beta_used": 0.1} for step in (1, 2, 3)]
    picture = draw_curves([*history, {"step": 3, "eval_loss": 0.2}, {"step": 3, "train_runtime": 1.0}], "beta_dpo on x")
    for label in ("loss", "eval_loss", "beta", "filtered fraction", "1 - kept_fraction", "beta_dpo on x"):
        assert f">{label}</text>" in picture
    assert ">margin</text>" not in picture
    assert picture == draw_curves([*history, {"step": 3, "eval_loss": 0.2}], "beta_dpo on x")
    assert "<svg" in draw_curves([], "nothing")


# --- real data -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_tiny_model_learns_from_real_pairs(data_root, tmp_path, capsys):
    words = ("gsm8k", "--root", data_root, "--no-solutions", "--held-out", "0.1", "--output", tmp_path)
    run(capsys, "convert", *words)
    held_out = ("--eval-data", tmp_path / "held_out.jsonl", "--tiny", "--max_steps", "40", "--output", tmp_path / "out")
    shown = run(capsys, "train", "--method", "simpo", "--data", tmp_path / "train.jsonl", *held_out)
    assert shown["rows"] == 7473 - 747
    # By chance 0.5, with a standard error of 0.02; wrong numbers look a little different from right ones.
    assert shown["eval_rewards/accuracies"] > 0.58
