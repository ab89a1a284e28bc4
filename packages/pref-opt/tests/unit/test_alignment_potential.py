from __future__ import annotations

import json
import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from pref_opt.alignment_potential import (
    DEFAULT_STRATEGIES,
    TransformersGenerator,
    alignment_potential,
    best_worst_pair,
    build_self_play_pairs,
    completion_logps,
    evolve_and_select,
    evolve_prompts,
    score_preferences,
    select_top,
)
from pref_opt.baselines import simpo_loss
from pref_opt.scoring import classifier_reward, likelihood_reward
from pref_opt.tiny import tiny_causal_lm, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

F64 = torch.float64
MARGINS = st.lists(st.tuples(st.floats(-50, 50), st.floats(-50, 50)), min_size=2, max_size=40)


def margins(rows: list[tuple[float, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    explicit, implicit = torch.tensor(rows, dtype=F64).round(decimals=3).T
    return explicit, implicit


# --- the score -----------------------------------------------------------------------------------------------------


@given(rows=MARGINS, weight=st.floats(0, 5), scale=st.floats(0.01, 100), shift=st.floats(0, 10))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_standardised_scores_do_not_depend_on_units(rows, weight, scale, shift):
    explicit, implicit = (values.abs() for values in margins(rows))
    score = alignment_potential(explicit, implicit, implicit_weight=weight)
    other = alignment_potential(scale * explicit + shift, implicit / scale + shift, implicit_weight=weight)
    torch.testing.assert_close(score, other, rtol=1e-6, atol=1e-6)
    assert score.isfinite().all()
    assert abs(score.mean()) < 1e-9


@given(rows=MARGINS, weight=st.floats(0, 5), signed=st.booleans())
@settings(derandomize=True, deadline=None, max_examples=40)
def test_both_forms_against_numpy(rows, weight, signed):
    explicit, implicit = (values.numpy() if signed else np.abs(values.numpy()) for values in margins(rows))

    def z(v):
        return (v - v.mean()) / v.std() if np.ptp(v) else 0 * v

    raw = alignment_potential(*margins(rows), implicit_weight=weight, normalize="none", signed=signed)
    np.testing.assert_allclose(raw.numpy(), explicit - weight * implicit, rtol=1e-12, atol=1e-12)
    score = alignment_potential(*margins(rows), implicit_weight=weight, signed=signed)
    np.testing.assert_allclose(score.numpy(), z(explicit) - weight * z(implicit), rtol=1e-7, atol=1e-7)


@given(rows=MARGINS, ratio=st.floats(0, 1))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_selection_is_the_head_of_the_order(rows, ratio):
    explicit, implicit = margins(rows)
    score = alignment_potential(explicit, implicit)
    chosen = select_top(explicit, implicit, select_ratio=ratio)
    assert len(chosen) == math.floor(ratio * len(rows))
    assert chosen.tolist() == np.argsort(-score.numpy(), kind="stable")[: len(chosen)].tolist()


@given(rows=MARGINS)
@settings(derandomize=True, deadline=None, max_examples=25)
def test_limits_of_the_weight(rows):
    explicit, implicit = margins(rows)
    by_explicit = select_top(explicit, implicit, metric="explicit", select_ratio=1.0)
    assert torch.equal(
        select_top(explicit, implicit, implicit_weight=0, select_ratio=1.0, normalize="none"), by_explicit
    )
    by_implicit = select_top(explicit, implicit, metric="implicit", select_ratio=1.0)
    heavy = select_top(explicit, implicit, implicit_weight=1e9, select_ratio=1.0, normalize="none")
    assert torch.equal(implicit.abs()[heavy], implicit.abs()[by_implicit])


def test_standardised_and_printed_form_select_the_same():
    explicit, implicit = torch.randn(2, 60, dtype=F64, generator=torch.Generator().manual_seed(0)).abs()
    printed = explicit / explicit.std(correction=0) - 2.5 * implicit / implicit.std(correction=0)
    order = select_top(explicit, implicit, implicit_weight=2.5, select_ratio=1.0)
    assert torch.equal(order, printed.argsort(descending=True))


def test_edges_of_the_ratio():
    explicit, implicit = [0.3, 0.1, 0.2], [0.1, 0.1, 0.3]
    for metric in ("alignment_potential", "explicit", "implicit", "random"):
        empty = select_top(explicit, implicit, metric=metric, select_ratio=0)
        assert (empty.dtype, len(empty)) == (torch.int64, 0)
        assert sorted(select_top(explicit, implicit, metric=metric, select_ratio=1).tolist()) == [0, 1, 2]


@pytest.mark.parametrize("value", [0.1, 1e9 + 0.1, 0.0])
def test_a_constant_margin_counts_as_zero(value):
    # Rounding gives 0.1 repeated three times a mean other than 0.1: only comparing the extremes finds it constant.
    other = torch.tensor([1.0, 2.0, 4.0], dtype=F64)
    z = (other - other.mean()) / other.std(correction=0)
    constant = torch.full((3,), value, dtype=F64)
    torch.testing.assert_close(alignment_potential(constant, other, implicit_weight=2.0), -2 * z)
    torch.testing.assert_close(alignment_potential(other, constant), z)


def test_huge_and_tiny_margins_stay_finite():
    for scale in (1e-320, 1e300):
        score = alignment_potential([scale, 3 * scale, 9 * scale], [0.0, 1.0, 5.0])
        assert score.isfinite().all()
        assert score.abs().max() < 3


def test_a_wrongly_ranked_pair_scores_high_only_with_signs():
    explicit, implicit = [1.0, 1.0, 1.0], [0.0, -2.0, 2.0]
    absolute = alignment_potential(explicit, implicit)
    assert absolute[1] == absolute[2] < absolute[0]
    signed = alignment_potential(explicit, implicit, signed=True)
    assert signed[2] < signed[0] < signed[1]
    assert select_top(explicit, implicit, metric="implicit", signed=True, select_ratio=0.4).tolist() == [1]


def test_arrays_tensors_and_lists_are_computed_in_double_precision():
    explicit, implicit = np.array([1.0, 2.0, 4.0], dtype=np.float32), torch.tensor([3, 1, 2])
    score = alignment_potential(explicit, implicit)
    assert score.dtype == F64
    torch.testing.assert_close(score, alignment_potential([1.0, 2.0, 4.0], [3.0, 1.0, 2.0]), rtol=1e-14, atol=1e-14)
    half = alignment_potential(torch.tensor([1.0, 2.0, 4.0], dtype=torch.bfloat16, requires_grad=True), implicit)
    assert not half.requires_grad
    assert torch.equal(half, score)


def test_random_order_comes_from_the_generator_alone():
    data = torch.arange(50.0), torch.arange(50.0)

    def draw(generator=None):
        return select_top(*data, metric="random", generator=generator).tolist()

    torch.manual_seed(1)
    first = draw()
    torch.manual_seed(2)
    assert draw() == first
    assert draw(torch.Generator().manual_seed(0)) == first
    assert draw(torch.Generator().manual_seed(1)) != first
    assert len(set(first)) == 20


BAD = {
    "lengths": (([1.0], [1.0, 2.0]), {}, "same length, got 1 and 2"),
    "empty": (([], []), {}, "explicit_margin is empty"),
    "nan": (([1.0, math.nan, math.nan], [1.0] * 3), {}, "explicit_margin must be finite, got nan at index 1"),
    "inf": (([1.0, 2.0], [1.0, -math.inf]), {}, "implicit_margin must be finite, got -inf at index 1"),
    "matrix": (([[1.0]], [1.0]), {}, r"explicit_margin must be a vector \[N\], got shape \(1, 1\)"),
    "weight": (([1.0], [1.0]), {"implicit_weight": -1.0}, "implicit_weight must be a finite number >= 0, got -1.0"),
    "normalize": (([1.0], [1.0]), {"normalize": "zscor"}, "did you mean 'zscore'"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("function", [alignment_potential, select_top])
def test_bad_margins(function, case):
    data, options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        function(*data, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "explict"}, "did you mean 'explicit'"),
        ({"select_ratio": 1.1}, r"select_ratio must be in \[0, 1\], got 1.1"),
        ({"select_ratio": math.nan}, "select_ratio"),
    ],
)
def test_bad_selections(options, message):
    with pytest.raises(ValueError, match=message):
        select_top([1.0, 2.0], [1.0, 2.0], **options)


# --- best and worst ------------------------------------------------------------------------------------------------


def test_best_and_worst_answer():
    choice = best_worst_pair(torch.tensor([0.5, 0.9, 0.1, 0.9, 0.1]), np.array([-1.0, -2.0, -1.5, 0.0, 0.0]))
    assert choice[:2] == (1, 2)  # the first of equal ones
    assert choice.explicit_margin == pytest.approx(0.8)
    assert choice.implicit_margin == -0.5


@pytest.mark.parametrize(
    ("rewards", "logps", "message"),
    [
        ([1.0], [1.0], "at least 2 answers, got 1"),
        ([1.0, 2.0], [1.0], "same length, got 2 and 1"),
        ([1.0, 1.0], [1.0, 2.0], "rewards must differ"),
        ([1.0, math.nan], [1.0, 2.0], "rewards must be finite, got nan at index 1"),
    ],
)
def test_bad_answers(rewards, logps, message):
    with pytest.raises(ValueError, match=message):
        best_worst_pair(rewards, logps)


# --- scoring -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(["yes no maybe so, the sum of two and two is four"] * 2)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_causal_lm(tokenizer, hidden=32)


def rows(count: int, *, chat: bool = False) -> list[dict[str, Any]]:
    out = []
    for i in range(count):
        prompt, chosen, rejected = "the sum of " * (i % 4) + f"{i} is", " four" * (i % 3 + 1), f" {'no ' * (i % 5)}{i}"
        row: dict[str, Any] = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        if chat:
            row = {
                name: [{"role": "user" if name == "prompt" else "assistant", "content": text}]
                for name, text in row.items()
            }
        out.append({**row, "rm_margin": float(i % 7), "id": i})
    return out


def dense(model, tokenizer, prompt: Any, answer: Any) -> tuple[float, int]:
    """Sum of log-probabilities and number of tokens, one sequence at a time with all its logits."""
    if isinstance(prompt, str):
        start = len(tokenizer(prompt)["input_ids"])
        ids = tokenizer(prompt + answer)["input_ids"] + [tokenizer.eos_token_id]
    else:
        start = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"])
        ids = tokenizer.apply_chat_template(prompt + answer, return_dict=True)["input_ids"]
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits.double().log_softmax(-1)[0]
    return sum(float(logps[t - 1, ids[t]]) for t in range(start, len(ids))), len(ids) - start


@pytest.mark.parametrize("chat", [False, True])
def test_scores_are_those_of_a_dense_model(model, tokenizer, chat):
    data = rows(9, chat=chat)
    scored = score_preferences(model, Dataset.from_list(data), tokenizer, batch_size=3, max_length=128)
    assert scored.column_names[:5] == ["prompt", "chosen", "rejected", "id", "idx"]
    for row, got in zip(data, scored, strict=True):
        (chosen, size), (rejected, other_size) = (
            dense(model, tokenizer, row["prompt"], row[k]) for k in ("chosen", "rejected")
        )
        assert got["chosen_logps"] == pytest.approx(chosen, abs=1e-4)
        assert got["rejected_logps"] == pytest.approx(rejected, abs=1e-4)
        assert got["chosen_logps_norm"] == pytest.approx(chosen / size, abs=1e-5)
        margin = chosen / size - rejected / other_size
        assert got["logp_margin_norm"] == pytest.approx(margin, abs=1e-5)
        assert got["logp_margin_norm_abs"] == pytest.approx(abs(margin), abs=1e-5)
        assert got["logp_margin"] == pytest.approx(chosen - rejected, abs=1e-4)
        assert got["logp_margin_abs"] == abs(got["logp_margin"])
        assert (got["idx"], got["rm_margin"]) == (row["id"], row["rm_margin"])


def test_padding_does_not_change_scores(model, tokenizer):
    one, eight = (score_preferences(model, rows(20), tokenizer, batch_size=size) for size in (1, 8))
    for name in ("chosen_logps_norm", "rejected_logps_norm"):
        np.testing.assert_allclose(one[name], eight[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("chat", [False, True])
def test_scores_are_those_of_the_trainer(model, tokenizer, tmp_path, chat):
    from trl import DPOConfig, DPOTrainer

    limit = 32 if chat else 15  # cuts the end of some answers, and leaves every prompt
    data = Dataset.from_list(rows(8, chat=chat)).remove_columns(["rm_margin", "id"])
    args = DPOConfig(
        str(tmp_path), per_device_train_batch_size=8, max_length=limit, bf16=False, use_cpu=True, report_to="none",
        gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    reference = tiny_causal_lm(tokenizer, hidden=32)
    trainer = DPOTrainer(model, reference, args, train_dataset=data, processing_class=tokenizer)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
    sums = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    lengths = batch["completion_mask"][:, 1:].sum(1).chunk(2)
    scored = score_preferences(reference, data, tokenizer, batch_size=3, max_length=limit)
    assert len(scored) == 8
    assert batch["input_ids"].shape[1] == limit
    for name, total, count in zip(("chosen", "rejected"), sums, lengths, strict=True):
        np.testing.assert_allclose(scored[f"{name}_logps"], total.tolist(), atol=1e-4, rtol=0)
        np.testing.assert_allclose(scored[f"{name}_logps_norm"], (total / count).tolist(), atol=1e-5, rtol=0)


HEADS = {
    "gemma2": ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8}),
    "granite": ("Granite", {"logits_scaling": 0.25}),
    "cohere": ("Cohere", {"logit_scale": 4.0}),
}


@pytest.mark.parametrize("name", HEADS)
def test_models_that_change_their_logits(tokenizer, name):
    import transformers

    family, options = HEADS[name]
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**sizes, **options, initializer_range=0.3)
    ).eval()
    row = rows(3)[2]
    got = completion_logps(model, tokenizer, [row["prompt"]], [[row["chosen"], row["rejected"]]])
    for k, text in enumerate((row["chosen"], row["rejected"])):
        assert got.sums[0][k] == pytest.approx(dense(model, tokenizer, row["prompt"], text)[0], abs=1e-4)


def test_adapters_count_and_learned_prompts_are_refused(tokenizer):
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    row = rows(3)[2]
    base = tiny_causal_lm(tokenizer, hidden=32)
    before = completion_logps(base, tokenizer, [row["prompt"]], [[row["chosen"]]]).sums[0]
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    after = completion_logps(adapted, tokenizer, [row["prompt"]], [[row["chosen"]]]).sums[0]
    assert abs(after - before) > 1e-3
    assert after.item() == pytest.approx(dense(adapted, tokenizer, row["prompt"], row["chosen"])[0], abs=1e-4)
    tuned = get_peft_model(
        tiny_causal_lm(tokenizer, hidden=32), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(ValueError, match="learned prompt"):
        completion_logps(tuned, tokenizer, ["a"], [["b"]])


def test_dropout_is_off_while_scoring(tokenizer):
    model = tiny_causal_lm(tokenizer, hidden=32)
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    quiet = score_preferences(model, rows(3), tokenizer)["chosen_logps"][:]
    model.train()
    model.model.norm.eval()  # a part that somebody keeps frozen
    assert score_preferences(model, rows(3), tokenizer)["chosen_logps"][:] == quiet
    assert model.training
    assert model.model.layers[0].training
    assert not model.model.norm.training


def test_several_completions_of_a_prompt(model, tokenizer):
    sums, lengths = completion_logps(
        model, tokenizer, ["yes", "no"], [[" so", " maybe", " no"], [" yes"]], batch_size=2
    )
    assert [len(part) for part in sums] == [3, 1]
    assert (lengths[0] >= 2).all()
    assert sums[0][1] == pytest.approx(dense(model, tokenizer, "yes", " maybe")[0], abs=1e-4)
    assert completion_logps(model, tokenizer, ["yes"], [[" so"]], max_length=1).lengths[0].tolist() == [0]
    with pytest.raises(ValueError, match="equally many, got 1 and 2"):
        completion_logps(model, tokenizer, ["a"], [["b"], ["c"]])
    with pytest.raises(ValueError, match="must all be texts, or all be lists of messages"):
        completion_logps(model, tokenizer, ["a"], [[[{"role": "assistant", "content": "b"}]]])
    with pytest.raises(ValueError, match="max_length must be an integer >= 1, got 0"):
        completion_logps(model, tokenizer, ["a"], [["b"]], max_length=0)
    assert completion_logps(model, tokenizer, [], []) == ([], [])
    assert [len(part) for part in completion_logps(model, tokenizer, ["a", "b"], [[], ["c"]]).sums] == [0, 1]


def test_sources_of_the_explicit_margin(model, tokenizer):
    base = {"prompt": "two", "chosen": " four", "rejected": " no"}
    data = [base | {"all_rm_scores": [0.1, 0.9, 0.4]}, base | {"rm_margin": -2.0}, base]
    assert score_preferences(model, data, tokenizer)["rm_margin"][:] == [0.8, -2.0, None]

    def length(prompts, responses):
        assert prompts == ["two"] * 6
        return torch.tensor([float(len(text)) for text in responses])

    assert score_preferences(model, data, tokenizer, reward=length)["rm_margin"][:] == [2.0] * 3


class Stop(Exception):
    pass


def test_a_stream_is_read_once(model, tokenizer):
    data = rows(70)
    scored = score_preferences(model, (row for row in data), tokenizer, batch_size=1)
    assert scored.to_list() == score_preferences(model, Dataset.from_list(data), tokenizer, batch_size=1).to_list()
    stream = Dataset.from_list(data).to_iterable_dataset()
    assert score_preferences(model, stream, tokenizer, batch_size=1).to_list() == scored.to_list()
    with pytest.warns(UserWarning, match=r"1 of 4 rows left out \(first: row 0\)"):
        kept = score_preferences(model, iter(rows(4)[::-1]), tokenizer, max_length=12)
    assert (kept["id"][:], kept["idx"][:]) == ([2, 1, 0], [1, 2, 3])


def test_an_interrupted_scoring_continues(model, tokenizer, tmp_path, monkeypatch):
    data, out = rows(150), tmp_path / "scores.jsonl"
    whole = score_preferences(model, data, tokenizer, batch_size=1)

    def cut():
        yield from data[:100]
        raise Stop

    with pytest.raises(Stop):
        score_preferences(model, cut(), tokenizer, batch_size=1, output=out)
    kept = out.read_text().splitlines()
    assert len(kept) == 1 + 96  # windows of 32 rows
    out.write_text("\n".join(kept) + '\n{"idx": 96, "chos')  # a torn last line
    forwards, seen = [], []
    monkeypatch.setattr(model, "forward", None)  # the head must not run
    handle = model.model.register_forward_hook(lambda *_: forwards.append(1))
    resumed = score_preferences(model, data, tokenizer, batch_size=1, output=out, on_progress=seen.append)
    handle.remove()
    assert len(forwards) == 150 - 96
    assert seen[-1] == 150
    assert resumed.to_list() == whole.to_list()
    assert score_preferences(model, data, tokenizer, batch_size=1, output=out).to_list() == whole.to_list()


def test_a_file_of_something_else_is_not_continued(model, tokenizer, tmp_path):
    out = tmp_path / "scores.jsonl"
    score_preferences(model, rows(4), tokenizer, output=out)
    before = out.read_text()
    with pytest.raises(ValueError, match="max_length = 2048, asked for is 64"):
        score_preferences(model, rows(4), tokenizer, max_length=64, output=out)
    with pytest.raises(ValueError, match="was written with model"):
        score_preferences(tiny_causal_lm(tokenizer, hidden=32, seed=1), rows(4), tokenizer, output=out)
    with pytest.raises(ValueError, match="row 3 differs"):
        score_preferences(model, [*rows(3), rows(5)[4]], tokenizer, output=out)
    with pytest.raises(ValueError, match="row 2 differs"):
        score_preferences(model, [*rows(2), {**rows(3)[2], "rm_margin": 9.0}, rows(4)[3]], tokenizer, output=out)
    with pytest.raises(ValueError, match="reward = False, asked for is True"):
        score_preferences(model, rows(4), tokenizer, output=out, reward=lambda prompts, texts: torch.zeros(len(texts)))
    assert out.read_text() == before
    for text in ("notes\n", '{"a": 1}\n', '{"settings": 1}\n', '{"prompt": "one line"}'):
        (tmp_path / "notes").write_text(text)
        with pytest.raises(ValueError, match="notes is not a file of finished rows"):
            score_preferences(model, rows(4), tokenizer, output=tmp_path / "notes")
        assert (tmp_path / "notes").read_text() == text
    out.write_text(before.replace('"idx": 1', '"idx" 1'))
    with pytest.raises(ValueError, match=r"scores.jsonl:3: not valid JSON"):
        score_preferences(model, rows(4), tokenizer, output=out)
    out.write_text(before.replace('"idx": 1', '"i": 1'))
    with pytest.raises(ValueError, match=r"scores.jsonl:3: not a finished row"):
        score_preferences(model, rows(4), tokenizer, output=out)


def test_a_file_that_was_never_finished_is_started_again(model, tokenizer, tmp_path):
    out = tmp_path / "scores.jsonl"
    for torn in ("", "{", '{"settings": {"ki'):
        out.write_text(torn)
        score_preferences(model, rows(2), tokenizer, output=out)
        assert len(out.read_text().splitlines()) == 3


def test_a_foreign_file_with_a_torn_last_line_is_left_alone(model, tokenizer, tmp_path):
    out = tmp_path / "scores.jsonl"
    score_preferences(model, rows(4), tokenizer, output=out)
    torn = out.read_text()[:-9]
    out.write_text(torn)
    with pytest.raises(ValueError, match="max_length = 2048, asked for is 64"):
        score_preferences(model, rows(4), tokenizer, max_length=64, output=out)
    assert out.read_text() == torn


def test_rows_without_room_for_an_answer_are_left_out(model, tokenizer, tmp_path):
    data = Dataset.from_list([{**row, "prompt": "no " * (40 if i == 2 else 2)} for i, row in enumerate(rows(5))])
    for _ in range(2):  # fresh, and from the file
        with pytest.warns(UserWarning, match=r"1 of 5 rows left out \(first: row 2\)"):
            scored = score_preferences(model, data, tokenizer, max_length=24, output=tmp_path / "scores.jsonl")
        assert scored["idx"][:] == scored["id"][:] == [0, 1, 3, 4]
    with pytest.raises(ValueError, match="5 of 5 rows left out"):
        score_preferences(model, data, tokenizer, max_length=1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "row 1: no column rejected; got chosen, prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "row 1: chosen and rejected are identical: 'b'"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "row 1: rejected is empty"),
        (
            {"prompt": "a", "chosen": "b", "rejected": ["c", "d"]},
            "row 1: rejected must be a text or a list of messages, got a list of completions",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "all_rm_scores": [1.0]}, "row 1: all_rm_scores"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "rm_margin": math.inf},
            "row 1: the reward margin must be finite",
        ),
    ],
)
def test_bad_rows_are_named(model, tokenizer, row, message):
    with pytest.raises(ValueError, match=message):
        score_preferences(model, [rows(1)[0], row], tokenizer)


def test_other_bad_input_of_scoring(model, tokenizer):
    with pytest.raises(ValueError, match=r"got a dict of \['train'\]"):
        score_preferences(model, DatasetDict({"train": Dataset.from_list(rows(2))}), tokenizer)
    with pytest.raises(ValueError, match="dataset is empty"):
        score_preferences(model, [], tokenizer)
    with pytest.raises(ValueError, match=r"reward must return shape \[4\], got \(2,\)"):
        score_preferences(model, rows(2), tokenizer, reward=lambda prompts, responses: torch.zeros(2))
    with pytest.raises(ValueError, match="reward must be finite, got nan"):
        score_preferences(model, rows(2), tokenizer, reward=lambda prompts, texts: torch.full((len(texts),), math.nan))
    broken = tiny_causal_lm(tokenizer, hidden=32)
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="row 0: log-probability of chosen is nan"):
        score_preferences(broken, rows(2), tokenizer)


# --- generation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
def test_log_probabilities_of_answers_are_untempered(tokenizer, chat):
    model = tiny_causal_lm(tokenizer, hidden=32, seed=3)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20)  # far from uniform, so that tempering matters
    prompt: Any = [{"role": "user", "content": "two"}] if chat else "two"
    generate = TransformersGenerator(model, tokenizer)
    answers = generate([prompt], n=4, temperature=0.8, top_p=1.0, max_tokens=6, seed=7)[0]

    ids = (
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        if chat
        else tokenizer(prompt)["input_ids"]
    )
    torch.manual_seed(7)
    out = model.generate(
        torch.tensor([ids]), do_sample=True, temperature=0.8, top_k=0, max_new_tokens=6, num_return_sequences=4,
        output_logits=True, output_scores=True, return_dict_in_generate=True, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    tokens = out.sequences[:, len(ids) :]
    for k, (text, logp) in enumerate(answers):
        end = (tokens[k] == tokenizer.eos_token_id).nonzero()
        size = int(end[0, 0]) + 1 if len(end) else tokens.shape[1]
        raw, tempered = (
            np.mean([float(step[k].log_softmax(-1)[tokens[k, t]]) for t, step in enumerate(steps[:size])])
            for steps in (out.logits, out.scores)
        )
        assert text == tokenizer.decode(tokens[k, :size], skip_special_tokens=True)
        assert logp == pytest.approx(raw, abs=1e-4)
        assert abs(logp - tempered) > 0.01


def test_generation_depends_on_its_seed_alone(model, tokenizer):
    generate = TransformersGenerator(model, tokenizer, batch_size=4)
    options: dict[str, Any] = {"n": 2, "temperature": 1.0, "top_p": 0.9, "max_tokens": 5}
    prompts = ["yes", "no no no maybe", "so"]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = generate(prompts, **options, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert generate(prompts, **options, seed=1) == first
    assert generate(prompts, **options, seed=2) != first
    assert [len(row) for row in first] == [2, 2, 2]


def test_answers_stop_at_the_end_token(tokenizer):
    model = tiny_causal_lm(tokenizer, hidden=32)
    head = torch.nn.Linear(32, len(tokenizer))
    torch.nn.init.zeros_(head.weight)
    with torch.no_grad():
        head.bias.fill_(0.0)[tokenizer.eos_token_id] = 30.0
    model.set_output_embeddings(head)
    answer = TransformersGenerator(model, tokenizer)(["yes"], 1, 1.0, 1.0, 5, 0)[0][0]
    assert answer == ("", pytest.approx(0.0, abs=1e-6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_tokens": 0}, "max_tok"),
    ],
)
def test_bad_generation(model, tokenizer, options, message):
    good = {"n": 1, "temperature": 1.0, "top_p": 1.0, "max_tokens": 2, "seed": 0}
    with pytest.raises(ValueError, match=message):
        TransformersGenerator(model, tokenizer)(["a"], **(good | options))
    with pytest.raises(ValueError, match=r"prompts\[1\] has no tokens"):
        TransformersGenerator(model, tokenizer)(["a", ""], **good)


# --- self-play -----------------------------------------------------------------------------------------------------


class Echo:
    """Answers a prompt with itself and a number, and remembers what it was asked."""

    def __init__(self, stop_after: int = 10**9) -> None:
        self.calls: list[tuple[int, int]] = []
        self.stop_after = stop_after

    def __call__(self, prompts, n, temperature, top_p, max_tokens, seed):
        if len(self.calls) == self.stop_after:
            raise Stop
        self.calls.append((len(prompts), seed))
        texts = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
        random = np.random.default_rng(seed)
        return [
            [(f"{text[-40:]} {random.integers(10**6)}{k}", float(-random.random())) for k in range(n)] for text in texts
        ]


def last_number(prompts, responses):
    return torch.tensor([float(text.split()[-1]) for text in responses])


def test_pairs_from_several_answers():
    answers = {
        "good": [("a 1", -1.0), ("a 3", -2.0), ("a 2", -3.0)],
        "empty": [("a 1", -1.0), ("  ", -2.0), ("a 2", -3.0)],
        "equal rewards": [("a 1", -1.0), ("b 1", -2.0), ("c 1", -3.0)],
        "equal texts": [("a 1", -1.0), ("a 1", -2.0), ("a 1", -3.0)],
    }
    seen = []

    def reward(prompts, responses):
        seen.extend(zip(prompts, responses, strict=True))
        noise = torch.arange(len(responses)) * torch.tensor([float(p == "equal texts") for p in prompts])
        return torch.tensor([float(text.split()[-1]) if text.strip() else 0.0 for text in responses]) + noise

    pairs = build_self_play_pairs(
        list(answers), lambda prompts, **_: [answers[p] for p in prompts], reward, num_responses=3
    )
    assert pairs.to_list() == [
        {
            "idx": 0, "prompt": "good", "chosen": "a 3", "rejected": "a 1", "rm_margin": 2.0, "chosen_logps_norm": -2.0,
            "rejected_logps_norm": -1.0, "logp_margin_norm": -1.0, "logp_margin_norm_abs": 1.0,
            "all_generated_responses": ["a 1", "a 3", "a 2"], "all_rm_scores": [1.0, 3.0, 2.0],
        }
    ]  # fmt: skip
    assert {prompt for prompt, _ in seen} == set(answers) - {"empty"}
    with pytest.raises(ValueError, match="none of 1 prompts gave a pair: 1 with an empty answer"):
        build_self_play_pairs(["empty"], lambda prompts, **_: [answers[p] for p in prompts], reward, num_responses=3)


def test_what_gave_no_pair_is_counted(caplog):
    def generate(prompts, **_):
        return [[("1", -1.0), ("1" if p == "same" else "2", -1.0)] for p in prompts]

    with caplog.at_level(logging.INFO, "pref_opt.alignment_potential"):
        build_self_play_pairs(["a", "same"], generate, last_number, num_responses=2)
    assert "1 of 2 prompts gave no pair: 1 with equal rewards" in caplog.text
    with pytest.raises(ValueError, match="none of 1 prompts gave a pair: 1 with equal rewards"):
        build_self_play_pairs(["same"], generate, last_number, num_responses=2)


def test_interrupted_self_play_continues(tmp_path):
    prompts = [f"p{i}" for i in range(10)]
    whole = build_self_play_pairs(prompts, Echo(), last_number, chunk_size=3)
    with pytest.raises(Stop):
        build_self_play_pairs(prompts, Echo(stop_after=2), last_number, chunk_size=3, output=tmp_path / "pairs.jsonl")
    text = (tmp_path / "pairs.jsonl").read_text().splitlines()
    (tmp_path / "pairs.jsonl").write_text("\n".join(text[:-1]) + "\n" + text[-1][:20])
    echo, seen = Echo(), []
    resumed = build_self_play_pairs(
        prompts, echo, last_number, chunk_size=3, output=tmp_path / "pairs.jsonl", on_progress=seen.append
    )
    assert echo.calls == [(3, 45), (3, 48), (1, 51)]  # the second chunk had lost a row
    assert seen[-1] == 10
    assert resumed.to_list() == whole.to_list()
    with pytest.raises(ValueError, match="was written with seed = 42, asked for is 1"):
        build_self_play_pairs(prompts, Echo(), last_number, chunk_size=3, seed=1, output=tmp_path / "pairs.jsonl")


def test_conversations_stay_conversations():
    prompt = [{"role": "system", "content": "S"}, {"role": "user", "content": "hello there"}]
    pairs = evolve_and_select([prompt], Echo(), last_number, num_select=2, seed=0)
    base, evolved = pairs[0], pairs[1]
    assert base["prompt"] == prompt
    assert base["chosen"][0]["role"] == "assistant"
    assert evolved["prompt"][0] == prompt[0]
    assert evolved["prompt"][1]["content"] != "hello there"


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
BAD_PLAY = {
    "no prompts": ([], {}, "prompts is empty"),
    "one text": ("Add 2 and 2.", {}, "prompts must be a sequence of prompts, got the text 'Add 2 and 2.'"),
    "number": (["a", 2], {}, r"prompts\[1\] must be a text or a list of messages, got 2"),
    "answered": ([[USER, ANSWER]], {}, r"prompts\[0\] must be a text or a list of messages"),
    "mixed": (["a", [USER]], {}, r"prompts must all be texts or all be conversations; prompts\[1\] differs"),
    "empty": (["a", " "], {}, r"prompts\[1\] is empty"),
    "responses": (["a"], {"num_responses": 1}, "num_responses must be an integer >= 2"),
    "chunks": (["a"], {"chunk_size": 0}, "chunk_size must be an integer >= 1"),
    "short": (["a", "b"], {"generator": lambda prompts, **_: [[("x 1", -1.0)] * 5]}, "one list per prompt, 2, got 1"),
    "few": (["a"], {"generator": lambda prompts, **_: [[("x 1", -1.0)]]}, "n=5 answers per prompt, got 1 for prompt 0"),
    "nan": (
        ["a"],
        {"generator": lambda prompts, **_: [[("x 1", math.nan)] * 5]},
        "log-probability of nan for prompt 0",
    ),
    "texts alone": (
        ["a"],
        {"generator": lambda prompts, **_: [["x 1"] * 5]},
        "must return texts with average log-prob",
    ),
    "no text": (["a"], {"generator": lambda prompts, **_: [[(1, -1.0)] * 5]}, r"got \(1, -1.0\)"),
    "no number": (["a"], {"generator": lambda prompts, **_: [[("x", None)] * 5]}, r"got \('x', None\)"),
}


@pytest.mark.parametrize("case", BAD_PLAY)
def test_bad_self_play(case):
    prompts, options, message = BAD_PLAY[case]
    with pytest.raises(ValueError, match=message):
        build_self_play_pairs(prompts, **({"generator": Echo(), "reward": last_number} | options))


# --- evolution -----------------------------------------------------------------------------------------------------

WRAPPED = {
    '"Add 2 and 3."': "Add 2 and 3.",
    "Here is the rewritten task:\nAdd 2 and 3.": "Add 2 and 3.",
    "Sure! Here's a new prompt for you: “Add 2 and 3.”": "Add 2 and 3.",
    "**New task:** Add 2 and 3.": "Add 2 and 3.",
    "Task: Add 2 and 3.": "Add 2 and 3.",
    'Say "yes" or "no"': 'Say "yes" or "no"',
    '"Yes" and "no"': '"Yes" and "no"',
    "Here is a list of numbers: 1, 2. Add them.": "Here is a list of numbers: 1, 2. Add them.",
    "Write a new function that does this: add.": "Write a new function that does this: add.",
}


@pytest.mark.parametrize("answer", WRAPPED)
def test_wrappers_are_removed(answer):
    evolved = evolve_prompts(["Add two and two."], lambda prompts, **_: [[(answer, -1.0)]], ["Rewrite {prompt}"])
    assert evolved == [[WRAPPED[answer]]]


def test_evolved_prompts_are_filtered():
    base = "x" * 10
    answers = ["", '""', base, "y" * 51, "y", "z" * 50, "zz", "z" * 50, "w" * 20]

    def generate(prompts, n, **_):
        assert n == 1
        assert prompts == [f"{k} {base} {{}}" for k in range(len(answers))]
        return [[(text, -1.0)] for text in answers]

    templates = [f"{k} {{prompt}} {{}}" for k in range(len(answers))]
    # '""' has no inside, and two characters are just within a factor of five
    assert evolve_prompts([base], generate, templates) == [['""', "z" * 50, "zz", "w" * 20]]
    kept = evolve_prompts([base], generate, templates, length_factor=2, fits=lambda text: "w" not in text)
    assert kept == [[]]


def test_strategies():
    assert len(DEFAULT_STRATEGIES) == 5
    asked: list[str] = []
    evolve_prompts(["Add {a}."], lambda prompts, **_: asked.extend(prompts) or [[("b", 0.0)] for _ in prompts])
    assert len(set(asked)) == 5
    assert all("Add {a}." in text and "{prompt}" not in text for text in asked)
    for wrong, message in ((["no place"], "must contain '{prompt}', got 'no place'"), ([], "strategies is empty")):
        with pytest.raises(ValueError, match=message):
            evolve_prompts(["a"], Echo(), wrong)
    with pytest.raises(ValueError, match=r"length_factor must be >= 1, got 0.5"):
        evolve_prompts(["a"], Echo(), length_factor=0.5)


def test_the_best_evolved_pairs_follow_the_base_pairs(tmp_path):
    prompts = [f"prompt number {i}" for i in range(8)]
    pairs = evolve_and_select(prompts, Echo(), last_number, num_select=6, implicit_weight=2.5, seed=3)
    assert pairs["origin"][:] == ["base"] * 8 + ["evolved"] * 6
    base = build_self_play_pairs(prompts, Echo(), last_number, seed=3)
    assert pairs["chosen"][:8] == base["chosen"][:]
    new = [text for texts in evolve_prompts(prompts, Echo(), seed=4) for text in texts]
    evolved = build_self_play_pairs(new, Echo(), last_number, seed=5)
    score = alignment_potential(evolved["rm_margin"][:], evolved["logp_margin_norm"][:], implicit_weight=2.5)
    best = score.argsort(descending=True, stable=True)[:6].tolist()
    assert pairs["chosen"][8:] == [evolved["chosen"][i] for i in best]

    both = evolve_and_select(prompts, Echo(), last_number, num_select=20, seed=3, pool="combined")
    assert len(both) == 20
    assert set(both["origin"]) == {"base", "evolved"}


class Interrupted(Echo):
    """The same, with Ctrl-C in the call after so many."""

    def __call__(self, *args, **kwargs):
        if len(self.calls) == self.stop_after:
            raise KeyboardInterrupt
        return super().__call__(*args, **kwargs)


@pytest.mark.parametrize("stop", range(9))
def test_self_play_goes_on_after_ctrl_c(tmp_path, stop):
    options: dict[str, Any] = {"num_select": 6, "seed": 3, "chunk_size": 7}
    prompts = [f"prompt number {i}" for i in range(8)]  # 2 chunks, 2 of the evolution, and 6 of 40 new prompts
    whole = evolve_and_select(prompts, Echo(), last_number, **options)
    with pytest.raises(KeyboardInterrupt):
        evolve_and_select(prompts, Interrupted(stop), last_number, output=tmp_path, **options)
    echo, seen = Echo(), []
    resumed = evolve_and_select(
        prompts, echo, last_number, output=tmp_path, on_progress=lambda *now: seen.append(now), **options
    )
    assert len(echo.calls) == 10 - stop  # finished chunks aren't made again
    assert resumed.to_list() == whole.to_list()
    assert seen[:3] == [("base", 7, 8), ("base", 8, 8), ("evolve", 7, 8)]
    assert seen[-1] == ("evolved", 40, 40)
    assert (
        evolve_and_select(prompts, Interrupted(0), last_number, output=tmp_path, **options).to_list() == whole.to_list()
    )


def test_a_round_is_not_continued_with_the_model_of_another(tokenizer, tmp_path):
    def play(model, folder):
        generate = TransformersGenerator(model, tokenizer)
        return evolve_and_select(
            ["yes", "no"], generate, lambda prompts, texts: torch.tensor([float(len(set(text))) for text in texts]),
            num_select=1, seed=0, num_responses=3, temperature=1.0, max_tokens=4, length_factor=100, output=folder,
        ).to_list()  # fmt: skip

    model = tiny_causal_lm(tokenizer, hidden=32)
    first = play(model, tmp_path / "1")
    assert play(tiny_causal_lm(tokenizer, hidden=32), tmp_path / "1") == first  # the same model in a new process
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(3)  # a training step
    with pytest.raises(ValueError, match=r"base.jsonl was written with generator = .* name another output"):
        play(model, tmp_path / "1")
    second = play(model, tmp_path / "2")
    assert second != first
    assert play(model, tmp_path / "2") == second


def test_odd_numbers_of_selected_pairs():
    prompts = ["prompt number 1", "prompt number 2"]
    assert evolve_and_select(prompts, Echo(), last_number, num_select=0, seed=0)["origin"][:] == ["base"] * 2
    with pytest.warns(UserWarning, match="num_select=1000, but only 10 pairs"):
        assert len(evolve_and_select(prompts, Echo(), last_number, num_select=1000, seed=0)) == 12
    with pytest.raises(ValueError, match="num_select"):
        evolve_and_select(prompts, Echo(), last_number, num_select=-1, seed=0)
    with pytest.raises(ValueError, match="pool must be one of"):
        evolve_and_select(prompts, Echo(), last_number, num_select=1, seed=0, pool="all")
    with pytest.raises(ValueError, match="no prompt evolved"):
        evolve_and_select(["a"], lambda prompts, n, **_: [[(f"a {k}", -1.0) for k in range(n)] for _ in prompts],
                          last_number, num_select=1, seed=0, fits=lambda text: False)  # fmt: skip


# --- the whole loop ------------------------------------------------------------------------------------------------


def _train(model, tokenizer, pairs, *, steps: int, seed: int) -> None:
    """SimPO in a plain loop; every text is one token per letter, so that all sequences of a batch have one length."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    order = torch.Generator().manual_seed(seed)
    ids = {k: torch.tensor([tokenizer(p + t)["input_ids"] for p, t in zip(pairs["prompt"], pairs[k], strict=True)])
           for k in ("chosen", "rejected")}  # fmt: skip
    start = len(tokenizer(pairs["prompt"][0])["input_ids"])
    model.train()
    for _ in range(steps):
        batch = torch.randperm(len(pairs), generator=order)[:32]
        both = torch.cat([ids["chosen"][batch], ids["rejected"][batch]])
        logps = model(both).logits[:, start - 1 : -1].log_softmax(-1).gather(2, both[:, start:, None]).mean((1, 2))
        loss = simpo_loss(*logps.chunk(2), beta=2.5, gamma_beta_ratio=0.4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.slow
def test_selected_pairs_teach_at_least_as_much_as_random_ones():
    """Texts of eight letters; what counts is their number of a's, which the reward model sees through noise."""
    tokenizer = tiny_tokenizer()
    accuracies: dict[Any, list[float]] = {"alignment_potential": [], "random": []}
    for seed in range(5):
        random = np.random.default_rng(seed)

        def texts(count, random=random):
            return ["".join(random.choice(list("abcdefgh"), 8, p=[0.3, *[0.1] * 7])) for _ in range(count)]

        def true(prompts, responses):
            return torch.tensor([float(text.count("a")) for text in responses])

        def noisy(prompts, responses, random=random):
            return true(prompts, responses) + torch.tensor(random.normal(0, 2, len(responses)))

        def generate(prompts, n, texts=texts, tokenizer=tokenizer, seed=seed, **_):
            answers = [texts(n) for _ in prompts]
            sums = completion_logps(
                tiny_causal_lm(tokenizer, hidden=32, layers=1, seed=seed), tokenizer, prompts, answers
            )
            means = [s / k for s, k in zip(*sums, strict=True)]
            return [list(zip(row, mean.tolist(), strict=True)) for row, mean in zip(answers, means, strict=True)]

        pairs = build_self_play_pairs(["> "] * 300, generate, noisy, num_responses=2)
        held_out = build_self_play_pairs(["> "] * 300, generate, true, num_responses=2)
        explicit, implicit = np.array(pairs["rm_margin"]), np.array(pairs["logp_margin_norm"])
        chosen = {}
        for metric, reached in accuracies.items():
            chosen[metric] = select_top(
                explicit, implicit, metric=metric, generator=torch.Generator().manual_seed(seed)
            )
            model = tiny_causal_lm(tokenizer, hidden=32, layers=1, seed=seed)
            _train(model, tokenizer, pairs.select(chosen[metric].tolist()), steps=60, seed=seed)
            margin = np.array(score_preferences(model, held_out, tokenizer, batch_size=64)["logp_margin"])
            reached.append(float((margin > 0).mean()))
        best, drawn = chosen["alignment_potential"].numpy(), chosen["random"].numpy()
        assert explicit[best].mean() > explicit[drawn].mean()
        assert np.abs(implicit[best]).mean() < np.abs(implicit[drawn]).mean()
    # Measured: 0.86 and 0.77; always preferring one answer gives 0.5.
    assert np.mean(accuracies["alignment_potential"]) > np.mean(accuracies["random"]) + 0.02
    assert np.mean(accuracies["random"]) > 0.65


def test_rows_of_the_file_are_plain_json(model, tokenizer, tmp_path):
    score_preferences(model, rows(2), tokenizer, output=tmp_path / "scores.jsonl")
    head, *kept = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert head["settings"]["kind"] == "score_preferences"
    assert [row["idx"] for row in kept] == [0, 1]


# --- rewards from models ---------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "1+1?"}]


def test_a_language_model_rewards_what_it_finds_probable():
    tokenizer = tiny_tokenizer()
    model = tiny_causal_lm(tokenizer)
    answers = ["2", "three", "11"]
    sums, lengths = completion_logps(model, tokenizer, ["1+1="], [answers])
    for batch_size in (1, 8):
        rewards = likelihood_reward(model, tokenizer, batch_size=batch_size)(["1+1="] * 3, answers)
        torch.testing.assert_close(rewards, sums[0] / lengths[0], rtol=1e-6, atol=0)
    said = [[{"role": "assistant", "content": text}] for text in answers]
    sums, lengths = completion_logps(model, tokenizer, [CHAT], [said])
    rewards = likelihood_reward(model, tokenizer)([CHAT] * 3, answers)
    torch.testing.assert_close(rewards, sums[0] / lengths[0], rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1"):
        likelihood_reward(model, tokenizer, batch_size=0)


def classifier(tokenizer, num_labels):
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_labels=num_labels,
    )
    return Qwen2ForSequenceClassification(config)


@pytest.mark.parametrize("prompt", ["1+1=", CHAT], ids=["text", "conversation"])
def test_a_classifier_rewards_by_its_output(prompt):
    tokenizer = tiny_tokenizer()
    model = classifier(tokenizer, 1).train()
    answers = ["2", "three and more", "11"]
    rewards = classifier_reward(model, tokenizer, batch_size=8)([prompt] * 3, answers)
    assert model.training  # as it was
    one_by_one = classifier_reward(model, tokenizer, batch_size=1)([prompt] * 3, answers)
    torch.testing.assert_close(rewards, one_by_one, rtol=1e-5, atol=1e-6)
    for answer, reward in zip(answers, rewards, strict=True):
        if isinstance(prompt, str):
            ids = tokenizer(prompt + answer, return_tensors="pt")["input_ids"]
        else:
            whole = [*prompt, {"role": "assistant", "content": answer}]
            ids = tokenizer.apply_chat_template(whole, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            assert float(reward) == pytest.approx(float(model.eval()(input_ids=ids).logits), abs=1e-5)


def test_a_classifier_of_several_outputs_is_no_reward_model():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="model must have one output to be a reward model, got 2"):
        classifier_reward(classifier(tokenizer, 2), tokenizer)
