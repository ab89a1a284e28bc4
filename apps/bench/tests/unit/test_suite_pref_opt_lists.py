import dataclasses
from pathlib import Path

import pytest

from ballast_bench.case import CellInput, SkipCell, resolve
from ballast_bench.suites import pref_opt_lists as cases
from pref_opt.losses import make_loss
from pref_opt.multi_negative import tokenize_lists

ROWS = [
    {"history": ["a", "b", "c"], "chosen": "d e", "rejected": ["f", "g"]},
    {"history": ["a", "b", "c", "d e"], "chosen": "g", "rejected": ["f", "h"]},
    {"history": ["b", "h", "f"], "chosen": "a", "rejected": ["c", "g"]},
]
ITEMS = ["a", "b", "c", "d e", "f", "g", "h"]


def cell(method="S-DPO", root=None):
    (case,) = cases.quick()
    return CellInput(case.name, case.dataset, method, dict(case.methods[method]), 0, root)


@pytest.mark.parametrize("case", [case for suite in ("quick", "cpu", "gpu") for case in getattr(cases, suite)()])
def test_a_case_is_complete(case):
    assert callable(resolve(case.run))
    for settings in case.methods.values():
        if settings["method"] not in ("sft", "popularity"):
            assert settings["lr"] > 0
            assert make_loss(settings["method"], **settings["options"]).multi_negative


def test_expected_times_keep_the_budgets():
    def seconds(suite):
        return sum(one.case.expected for case in suite for one in case.cells())

    assert seconds(cases.quick()) <= 12
    assert seconds(cases.cpu()) <= 70 * 60


def test_methods_of_a_case_differ_in_the_method_alone():
    for case in cases.cpu():
        own = {"method", "options", "lr", "sft_epochs"}
        rest = [{key: value for key, value in settings.items() if key not in own} for settings in case.methods.values()]
        assert all(settings == rest[0] for settings in rest)


def test_an_item_is_one_token_and_texts_keep_their_order():
    tokenizer = cases._tokenizer(ITEMS)
    rows = tokenize_lists(cases._dataset(ROWS, ITEMS, None, 0), tokenizer, features=())
    assert rows[0]["prompt_ids"] == tokenizer.convert_tokens_to_ids(["a", "b", "c"])
    end = tokenizer.eos_token_id
    assert rows[0]["answer_ids"] == [[tokenizer.convert_tokens_to_ids(name), end] for name in ("d e", "f", "g")]


def test_negatives_are_drawn_once_by_seed_and_go_with_their_numbers():
    made = [cases._dataset(ROWS * 20, ITEMS, 1, seed).to_list() for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]
    for row, source in zip(made[0], ROWS * 20, strict=True):
        assert row["rejected"][0] in source["rejected"]
        assert [ITEMS[i] for i in row["rejected_items"]] == row["rejected"]
        assert [ITEMS[i] for i in row["history_items"]] == source["history"]


def test_consecutive_rows_of_a_user_stay_together():
    assert [len(rows) for rows in cases._by_user(ROWS)] == [2, 1]


def test_popularity_counts_each_item_of_a_user_once_and_ties_against_the_right_item():
    # a: 2 users; b: 2; c, d e, g, h, f: 1 each
    test = [
        {"history": ["b"], "chosen": "a", "rejected": ["c", "h"]},
        {"history": ["b"], "chosen": "c", "rejected": ["g", "h"]},
    ]
    found = cases._popular(cases.Lists(ROWS, test, ITEMS))
    assert found["hr@1"] == 0.5
    assert found["ndcg"] == pytest.approx((1 + 0.5) / 2)


def test_generated_lists_have_the_right_item_among_twenty():
    lists = cases._generate(40, 50, 0)
    for row in (*lists.train, *lists.test):
        assert len({row["chosen"], *row["rejected"], *row["history"]}) == 20 + len(row["history"])
        assert (int(row["chosen"]) - int(row["history"][-1])) % 40 in (1, 2)


def test_a_cell_trains_tests_and_repeats():
    given = cell()
    given = dataclasses.replace(given, settings={**given.settings, "sft_epochs": 2, "epochs": 1})
    out, again = cases.generated(given), cases.generated(given)
    names = {metric.name for metric in cases.quick()[0].metrics}
    assert set(out.metrics) == names
    assert {**out.metrics, "train_seconds": 0} == {**again.metrics, "train_seconds": 0}
    assert out.metrics["hr@1"] != out.info["sft_hr@1"]
    sft = cases.generated(dataclasses.replace(given, settings={**given.settings, "method": "sft"}))
    assert sft.metrics["hr@1"] == out.info["sft_hr@1"]  # all methods of a seed start at the same model


@pytest.mark.parametrize("root", [None, Path("/nowhere")])
def test_absent_data_is_a_reason_to_skip(root):
    with pytest.raises(SkipCell, match="data set 'lastfm-sdpo' is not here"):
        cases.lastfm(cell(root=root))


def test_an_absent_gpu_is_a_reason_to_skip(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = cell()
    with pytest.raises(SkipCell, match="needs CUDA"):
        cases.generated(dataclasses.replace(given, settings={**given.settings, "device": "cuda"}))


def test_real_lists(data_root):
    lists = cases._read(data_root)
    assert (len(lists.train), len(lists.test), len(lists.items)) == (2767, 2495, 4606)
    held = cases._read(data_root, held_out=True)
    assert len(held.train) + len(held.test) == 2767
    assert held.items == lists.items
    users, tested = cases._by_user(lists.train), cases._by_user(held.test)
    assert len(users) == 122  # as many as there are histories of three, where all start
    assert all(len(rows[0]["history"]) == 3 for rows in users)
    assert tested == users[::5]
    seen = {item for row in lists.train for item in (*row["history"], row["chosen"])}
    unseen = sum(row["chosen"] not in seen for row in lists.test) / len(lists.test)
    assert unseen == pytest.approx(0.35, abs=0.005)  # the note says so
