from __future__ import annotations

import gzip
import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from pref_opt.data import (
    check_preferences,
    gsm8k_preferences,
    hh_preferences,
    lastfm_lists,
    lastfm_pairs,
    read_preferences,
    split_rows,
    truncate_prompts,
    write_preferences,
)
from pref_opt.tiny import tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

PAIR = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
CHAT = {
    "prompt": [{"role": "user", "content": "1+1?"}],
    "chosen": [{"role": "assistant", "content": "2"}],
    "rejected": [{"role": "assistant", "content": "3"}],
}
LISTS = {"prompt": "1+1=", "chosen": "2", "rejected": ["3", "4"]}
CHAT_LISTS = CHAT | {"rejected": [[{"role": "assistant", "content": text}] for text in ("3", "4")]}


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- check ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [PAIR, CHAT, LISTS, CHAT_LISTS])
def test_good_rows_pass_as_rows_and_as_dataset(row):
    check_preferences([row, row])
    check_preferences(Dataset.from_list([row, row]))


BAD = {
    "no rejected": ({"prompt": "a", "chosen": "b"}, "row 1: no column rejected; got chosen, prompt"),
    "null": (PAIR | {"chosen": None}, "row 1: no column chosen"),
    "empty chosen": (PAIR | {"chosen": " "}, "row 1: chosen is empty"),
    "empty rejected": (PAIR | {"rejected": ""}, "row 1: rejected is empty"),
    "identical": (PAIR | {"rejected": "2"}, "row 1: chosen and rejected are identical: '2'"),
    "number": (PAIR | {"chosen": 2}, "row 1: chosen must be text"),
    "half a conversation": (PAIR | {"chosen": CHAT["chosen"]}, "row 1: chosen must be text"),
    "other form": (CHAT, "row 1: holds conversations, row 0 texts"),
}


@pytest.mark.parametrize("case", BAD)
def test_the_first_bad_row_is_named(case):
    row, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        check_preferences([PAIR, row, row])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (LISTS | {"rejected": ["3"]}, "row 1: 1 rejected, row 0 has 2"),
        (LISTS | {"rejected": ["3", "2"]}, "row 1: chosen and rejected are identical"),
        (LISTS | {"rejected": ["3", ""]}, "row 1: rejected is empty"),
        (LISTS | {"rejected": []}, "row 1: rejected is empty"),
    ],
)
def test_bad_lists_of_negatives(row, message):
    with pytest.raises(ValueError, match=message):
        check_preferences([LISTS, row])


def test_bad_conversations_and_sets():
    with pytest.raises(ValueError, match="row 0: chosen must be a list of messages"):
        check_preferences([CHAT | {"chosen": [{"role": "assistant"}]}])
    with pytest.raises(ValueError, match="row 0: chosen is empty"):
        check_preferences([CHAT | {"chosen": [{"role": "assistant", "content": ""}]}])
    with pytest.raises(ValueError, match="dataset is empty"):
        check_preferences([])
    with pytest.raises(ValueError, match=r"dict of \['test', 'train'\]"):
        check_preferences(DatasetDict({"train": Dataset.from_list([PAIR]), "test": Dataset.from_list([PAIR])}))


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [PAIR, CHAT, LISTS, CHAT_LISTS])
def test_written_rows_are_read_again(tmp_path, row):
    rows = [row, row | {"chosen": row["chosen"] if row in (CHAT, CHAT_LISTS) else "zwei ü\u2028"}]
    write_preferences(rows, tmp_path / "a" / "rows.jsonl")
    assert read_preferences(tmp_path / "a" / "rows.jsonl").to_list() == rows
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["rows.jsonl"]


def test_other_kinds_of_files(tmp_path):
    data = Dataset.from_list([PAIR])
    data.save_to_disk(str(tmp_path / "folder"))
    data.to_parquet(str(tmp_path / "rows.parquet"))
    (tmp_path / "rows.json").write_text(json.dumps([PAIR]))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(json.dumps(PAIR).encode()))
    for name in ("folder", "rows.parquet", "rows.json", "rows.jsonl.gz"):
        assert read_preferences(tmp_path / name).to_list() == [PAIR]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = lines(tmp_path / "rows.jsonl", [PAIR])
    with pytest.raises(ValueError, match="row 1 can't be written"):
        write_preferences([PAIR, PAIR | {"score": float("nan")}], path)
    assert read_preferences(path).to_list() == [PAIR]
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.jsonl"]


DAMAGED = {
    "json": ("rows.jsonl", b'{"prompt": "a"}\n{"prompt": \n', r"rows.jsonl:2: not valid JSON"),
    "no object": ("rows.jsonl", b"\n[1]\n", r"rows.jsonl:2: expected a JSON object, got list"),
    "list": ("rows.json", b'{"a": 1}', "expected a JSON list of objects, got dict"),
    "json list": ("rows.json", b'[{"a": 1},\n oops]', "rows.json:2: not valid JSON"),
    "gzip": ("rows.jsonl.gz", b"plain", "is damaged"),
    "cut gzip": ("rows.jsonl.gz", gzip.compress(b"x" * 99)[:-9], "is damaged"),
    "encoding": ("rows.jsonl", b"\xff\xfe", "is damaged"),
    "kind": ("rows.txt", b"", r"expected .jsonl, .json"),
    "parquet": ("rows.parquet", b"PAR?", "is not a preference set"),
    "row": ("rows.jsonl", b'{"prompt": "a", "chosen": "b"}\n', "rows.jsonl: row 0: no column rejected"),
    "mixed": ("rows.jsonl", b'{"prompt": "a"}\n{"prompt": {"a": 1}}\n', "values of different kinds"),
    "empty": ("rows.jsonl", b"", "rows.jsonl: dataset is empty"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files(tmp_path, case):
    name, content, message = DAMAGED[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_preferences(tmp_path / name)


def test_missing_files_and_folders(tmp_path):
    for read in (read_preferences, hh_preferences, gsm8k_preferences, lastfm_lists):
        with pytest.raises(FileNotFoundError, match=r"no such file: .*none.jsonl"):
            read(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="is not a preference set"):
        read_preferences(tmp_path)


# --- HH ------------------------------------------------------------------------------------------------------------

OPENING = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: 1+1?\n\nAssistant:"


def test_hh_dialogues(tmp_path):
    rows = [
        {"chosen": OPENING + " 2", "rejected": OPENING + " 3"},
        {"chosen": OPENING + " 2", "rejected": "\n\nHuman: Bye\n\nAssistant: 3"},
        {"chosen": OPENING + " 2", "rejected": OPENING + " 2 "},
        {"chosen": OPENING + " 2", "rejected": OPENING + " "},
        # the rejected dialogue goes on: the prompt is still that of the chosen one
        {"chosen": OPENING + " 4", "rejected": OPENING + " 5\n\nHuman: Sure?\n\nAssistant: Yes"},
    ]
    data, dropped = hh_preferences(lines(tmp_path / "hh.jsonl", rows))
    assert dropped == {"other prompt": 1, "equal answers": 1, "empty answer": 1}
    assert data["prompt"] == [OPENING, OPENING]
    assert data["chosen"] == [" 2", " 4"]
    assert data["rejected"][0] == " 3"
    chats = hh_preferences(tmp_path / "hh.jsonl", conversational=True).dataset
    assert [turn["role"] for turn in chats[0]["prompt"]] == ["user", "assistant", "user"]
    assert chats[0]["prompt"][2]["content"] == "1+1?"
    assert chats[0]["chosen"] == [{"role": "assistant", "content": "2"}]
    check_preferences(data)
    check_preferences(chats)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"chosen": OPENING}], "hh.jsonl:1: rejected must be a text, got None"),
        ([{"chosen": "Hello", "rejected": "Hello"}], "hh.jsonl:1: chosen has no 'Assistant:'"),
        ([{"chosen": OPENING + " 2", "rejected": OPENING + " 2"}], "no pairs; left out: {'equal answers': 1}"),
        ([], "no pairs"),
    ],
)
def test_bad_hh_files(tmp_path, rows, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        hh_preferences(lines(tmp_path / "hh.jsonl", rows))


def test_hh_conversations_start_with_the_user(tmp_path):
    row = {"chosen": "What?\n\nAssistant: 2", "rejected": "What?\n\nAssistant: 3"}
    path = lines(tmp_path / "hh.jsonl", [row])
    assert hh_preferences(path).dataset["prompt"] == ["What?\n\nAssistant:"]
    with pytest.raises(ValueError, match=r"hh\.jsonl:1: a dialogue must start with 'Human:'"):
        hh_preferences(path, conversational=True)


# --- GSM8K ---------------------------------------------------------------------------------------------------------


def problem(number: str) -> dict[str, str]:
    return {"question": "How many?", "answer": f"It is <<{number}>>{number}.\n#### {number}"}


@pytest.mark.parametrize("number", ["0", "7", "10", "72", "1,000", "-3", "11"])
def test_corrupted_answers_look_like_answers(tmp_path, number):
    path = lines(tmp_path / "train.jsonl", [problem(number)] * 200)
    data = gsm8k_preferences(path)
    assert set(data["chosen"]) == {f"It is {number}.\n#### {number}"}
    wrong = {text.split("#### ")[1] for text in data["rejected"]}
    assert number not in wrong
    assert len(wrong) > 5
    for text in wrong:
        assert text.startswith("-") == number.startswith("-")
        assert text == (f"{int(text.replace(',', '')):,}" if "," in number else str(int(text)))
    assert {text.split("#### ")[0] for text in data["rejected"]} == {f"It is {number}.\n"}


@given(rate=st.floats(0, 1), seed=st.integers(0, 1000), rows=st.integers(1, 30))
@settings(derandomize=True, deadline=None, max_examples=10)
def test_exactly_the_flip_rate_is_exchanged(tmp_path_factory, rate, seed, rows):
    path = lines(tmp_path_factory.mktemp("gsm8k") / "train.jsonl", [problem(str(n)) for n in range(rows)])
    clean, noisy = (gsm8k_preferences(path, flip_rate=r, seed=seed) for r in (0, rate))
    assert sum(noisy["flipped"]) == round(rate * rows)
    for before, after in zip(clean, noisy, strict=True):
        pair = (before["chosen"], before["rejected"])
        assert (after["chosen"], after["rejected"]) == (pair[::-1] if after["flipped"] else pair)


def test_gsm8k_options(tmp_path):
    path = lines(tmp_path / "train.jsonl", [problem("72")] * 9)
    assert set(gsm8k_preferences(path, solutions=False)["chosen"]) == {"72"}
    assert gsm8k_preferences(path, seed=1)["rejected"] != gsm8k_preferences(path, seed=2)["rejected"]
    assert gsm8k_preferences(path, seed=1)["rejected"] == gsm8k_preferences(path, seed=1)["rejected"]
    chats = gsm8k_preferences(path, conversational=True)
    assert chats[0]["prompt"] == [{"role": "user", "content": "How many?"}]
    check_preferences(chats)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a"}, "train.jsonl:1: answer must be a text"),
        ({"question": "a", "answer": "72"}, "train.jsonl:1: answer must end with a line '#### NUMBER', got '72'"),
        ({"question": "a", "answer": "#### 1.5"}, "must end with"),
    ],
)
def test_bad_gsm8k_files(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        gsm8k_preferences(lines(tmp_path / "train.jsonl", [row]))
    with pytest.raises(ValueError, match=r"flip_rate must be in \[0, 1\], got 1.5"):
        gsm8k_preferences(lines(tmp_path / "train.jsonl", [problem("1")]), flip_rate=1.5)


def test_real_gsm8k(data_root):
    data = gsm8k_preferences(data_root / "math" / "gsm8k" / "train.jsonl.gz", flip_rate=0.2)
    assert len(data) == 7473
    assert sum(data["flipped"]) == round(0.2 * 7473)
    check_preferences(data)
    right = [row["rejected" if row["flipped"] else "chosen"] for row in data]
    assert sum("," in text.split("#### ")[1] for text in right) == 79
    assert sum(text.split("#### ")[1].startswith("-") for text in right) == 3
    assert not any("<<" in text for text in right)


# --- LastFM --------------------------------------------------------------------------------------------------------

HEARD = {"historyList": "A::B::C", "itemList": ["W", "X", "Y", "Z"], "trueSelection": "Y"}


def test_lists_of_candidates(tmp_path):
    (tmp_path / "l.json").write_text(json.dumps([HEARD] * 50))
    full = lastfm_lists(tmp_path / "l.json")
    assert full["ids"] == list(range(50))
    assert full[0]["rejected"] == ["W", "X", "Z"]
    assert full[0]["chosen"] == "Y"
    assert full[0]["prompt"].index("A\nB\nC") < full[0]["prompt"].index("W\nX\nY\nZ")
    drawn = lastfm_lists(tmp_path / "l.json", num_negatives=2, seed=1)
    assert {len(set(row)) for row in drawn["rejected"]} == {2}
    assert len({tuple(row) for row in drawn["rejected"]}) == 3
    chats = lastfm_lists(tmp_path / "l.json", conversational=True)
    assert chats[0]["rejected"][1] == [{"role": "assistant", "content": "X"}]
    check_preferences(chats)
    # A to C and W to Z have the numbers 0 to 6.
    assert full[0]["chosen_items"] == 5
    assert full[0]["rejected_items"] == [3, 4, 6]
    assert full[0]["history_items"] == [0, 1, 2] + [-1] * 7
    for row in drawn:
        assert ["ABCWXYZ"[item] for item in row["rejected_items"]] == row["rejected"]
    short = lastfm_lists(tmp_path / "l.json", show_candidates=False, max_history=2)[0]["prompt"]
    assert "A" not in short.splitlines()
    assert {"B", "C"} <= set(short.splitlines())
    assert not {"W", "X", "Y", "Z"} & set(short.splitlines())


def test_pairs_of_candidates(tmp_path):
    (tmp_path / "l.json").write_text(json.dumps([HEARD] * 60))
    pairs = lastfm_pairs(tmp_path / "l.json")
    assert set(pairs["rejected"]) == {"W", "X", "Z"}
    assert pairs["rejected"] != lastfm_pairs(tmp_path / "l.json", seed=1)["rejected"]
    check_preferences(pairs)
    check_preferences(lastfm_pairs(tmp_path / "l.json", conversational=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trueSelection": "V"}, "l.json:2: trueSelection 'V' is not in itemList"),
        ({"itemList": ["Y", "Y"]}, "l.json:2: itemList must have at least 2 different names"),
        ({"itemList": "Y"}, "l.json:2: itemList must be a list of texts"),
        ({"historyList": None}, "l.json:2: historyList must be a text"),
        ({"itemList": ["Y", "Z"]}, "l.json:2: num_negatives=3, but only 1 other candidates"),
    ],
)
def test_bad_candidate_lists(tmp_path, change, message):
    (tmp_path / "l.json").write_text(json.dumps([HEARD, HEARD | change]))
    with pytest.raises(ValueError, match=message):
        lastfm_lists(tmp_path / "l.json", num_negatives=3)


def test_real_lastfm(data_root):
    folder = data_root / "pref" / "lastfm-sdpo"
    lists = lastfm_lists(folder / "lastfm-val.json.gz")
    assert len(lists) == 2767
    assert {len(row) for row in lists["rejected"]} == {19}
    check_preferences(lists)
    pairs = lastfm_pairs(folder / "lastfm-test.json.gz")
    assert len(pairs) == 2495
    check_preferences(pairs)


# --- splitting and cutting -----------------------------------------------------------------------------------------


@given(rows=st.integers(2, 60), fraction=st.floats(0.01, 0.99), seed=st.integers(0, 99))
@settings(derandomize=True, deadline=None, max_examples=30)
def test_a_split_is_a_partition(rows, fraction, seed):
    train, held = split_rows(Dataset.from_dict({"i": range(rows)}), fraction=fraction, seed=seed)
    assert sorted([*train["i"], *held["i"]]) == list(range(rows))
    assert list(train["i"]) == sorted(train["i"])
    assert len(held) == min(max(1, round(fraction * rows)), rows - 1)


def test_groups_stay_together():
    data = Dataset.from_dict({"prompt": [str(i // 5) for i in range(50)], "i": range(50)})
    train, held = split_rows(data, fraction=0.3, group_by="prompt")
    assert not set(train["prompt"]) & set(held["prompt"])
    assert len(held) == 15
    assert split_rows(data, seed=0)[1]["i"] != split_rows(data, seed=1)[1]["i"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, "fraction must be in"),
        ({"group_by": "promt"}, "group_by must be one of the columns prompt, got 'promt'"),
        ({"group_by": "prompt"}, "at least 2 different values of prompt, got 1"),
    ],
)
def test_bad_splits(options, message):
    with pytest.raises(ValueError, match=message):
        split_rows(Dataset.from_dict({"prompt": ["a", "a"]}), **options)


@pytest.fixture(scope="module")
def merging():
    return tiny_tokenizer(["ab ab\n aab ba"] * 3)


@given(
    text=st.text(st.sampled_from("ab é漢\n"), min_size=1, max_size=40),
    limit=st.integers(4, 30),
)
@settings(derandomize=True, deadline=None, max_examples=40)
def test_cut_prompts_end_as_they_did_and_fit(merging, text, limit):
    tokenizer = merging
    data = Dataset.from_list([{"prompt": text, "chosen": "1", "rejected": "22"}])
    result = truncate_prompts(data, tokenizer, max_prompt_length=limit, max_length=None)
    prompt = result.dataset[0]["prompt"]
    size = len(tokenizer(text)["input_ids"])
    assert text.endswith(prompt)
    assert len(tokenizer(prompt)["input_ids"]) <= limit
    assert result.cut == (size > limit)
    assert (prompt == text) == (size <= limit)


def test_only_what_does_not_fit_is_cut():
    tokenizer = tiny_tokenizer()
    rows = [
        {"prompt": "x" * 8, "chosen": "1", "rejected": "2"},
        {"prompt": "x" * 8, "chosen": "1", "rejected": "333333"},
    ]
    result = truncate_prompts(Dataset.from_list(rows), tokenizer, max_prompt_length=4, max_length=10)
    assert result.dataset["prompt"] == ["x" * 8, "x" * 4]  # 8 + 1 + the end token, and 8 + 6 + 1
    assert result.cut == 1
    assert result.dataset.column_names == ["prompt", "chosen", "rejected"]
    lists = Dataset.from_list([{"prompt": "x" * 8, "chosen": "1", "rejected": ["2", "333333"]}])
    assert truncate_prompts(lists, tokenizer, max_prompt_length=4, max_length=10).cut == 1


def test_conversations_lose_their_oldest_turns():
    tokenizer = tiny_tokenizer()
    system = {"role": "system", "content": "S"}
    turns = [{"role": role, "content": f"{role} says " + "x" * 30} for role in ("user", "assistant", "user")]
    row = CHAT | {"prompt": [system, *turns]}

    def size(messages: Any) -> int:
        return len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])

    limit = size([system, turns[2]])
    kept = truncate_prompts(Dataset.from_list([row]), tokenizer, max_prompt_length=limit, max_length=None).dataset
    assert kept[0]["prompt"] == [system, turns[2]]
    less = truncate_prompts(Dataset.from_list([row]), tokenizer, max_prompt_length=limit - 5, max_length=None).dataset
    assert less[0]["prompt"] == [system, turns[2] | {"content": turns[2]["content"][5:]}]
    assert size(less[0]["prompt"]) == limit - 5
    with pytest.raises(ValueError, match="row 0: the prompt can't be cut"):
        truncate_prompts(Dataset.from_list([row]), tokenizer, max_prompt_length=10, max_length=None)


def test_bad_limits():
    data = Dataset.from_list([PAIR])
    with pytest.raises(ValueError, match="max_length must be above max_prompt_length=8, got 8"):
        truncate_prompts(data, tiny_tokenizer(), max_prompt_length=8, max_length=8)
    with pytest.raises(ValueError, match="max_prompt_length"):
        truncate_prompts(data, tiny_tokenizer(), max_prompt_length=0)
