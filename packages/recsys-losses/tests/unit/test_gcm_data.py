"""The data of GCM: files of the authors' format, negatives, the leave-one-out protocol, and generated data."""

from __future__ import annotations

import gzip
import math
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_losses.gcm import ContextDataset, make_context_data

if TYPE_CHECKING:
    from pathlib import Path

YELP_HEADER = (
    "user_id,item_id,c_city-c_year-c_month-c_day-c_hour-c_minute-c_DoW-c_last,"
    "u_yelping_year-u_stars,i_city-i_stars-i_is_open"
)
YELP_TRAIN = [
    "0,1,1-3-5-7-9-11-13-0,0-2,1-2-4",
    "0,0,1-3-5-8-9-12-13-1,0-2,0-3-4",
    "1,1,2-3-6-7-10-11-14-3,1-2,1-2-4",
    "0,1,1-4-5-7-9-12-13-0,0-2,1-2-4",
]
YELP_TEST = ["0,2,2-4-6-8-10-12-13-1,0-2,1-3-5", "1,0,1-3-5-7-9-11-13-1,1-2,0-3-4"]
AMAZON_HEADER = "user_id,item_id,c_year-c_month-c_day-c_DOW-c_last,i_price-i_brand"


def _write(folder: Path, header: str, train: list[str], test: list[str], users: str, items: str) -> Path:
    for name, lines in (("train.dat", train), ("test.dat", test)):
        (folder / name).write_text("\n".join([header, *lines]) + "\n")
    (folder / "userid_dict.txt").write_text(users)
    (folder / "itemid_dict.txt").write_text(items)
    return folder


def _yelp(folder: Path, **change: object) -> Path:
    parts = {
        "header": YELP_HEADER,
        "train": YELP_TRAIN,
        "test": YELP_TEST,
        "users": "{'abc': 0, 'x-y': 1}",
        "items": "{'p': 0, 'q': 1, 'r': 2, 'only last': 3}\n",
    }
    return _write(folder, **{**parts, **change})


def _line(lines: list[str], number: int, text: str) -> list[str]:
    return [text if n == number else line for n, line in enumerate(lines)]


# --- files --------------------------------------------------------------------------------------------------------


def test_yelp_files(tmp_path):
    data = ContextDataset.from_files(_yelp(tmp_path))
    assert (data.num_users, data.num_items, data.num_graph_items) == (2, 4, 3)
    assert data.context_fields == ("c_city", "c_month", "c_hour", "c_DoW", "c_last")
    assert data.user_features.tolist() == [[0, 2], [1, 2]]
    assert data.item_features.tolist() == [[0, 3, 4], [1, 2, 4], [1, 3, 5]]
    # ids are global within a group: DoW, the last field before c_last, holds the largest
    assert (data.num_user_features, data.num_item_features, data.num_context_features) == (3, 6, 15)
    assert data.train[:2].tolist() == [[0, 0, 1, 0], [1, 0, 1, 1]]
    contexts = data.context_features[data.train[2]].tolist()
    assert contexts == [[1, 5, 9, 13, 0], [1, 5, 9, 13, 1], [2, 6, 10, 14, 3], [1, 5, 9, 13, 0]]
    assert data.context_features[data.test[2]].tolist() == [[2, 6, 10, 13, 1], [1, 5, 9, 13, 1]]
    assert len(data.context_features) == 4  # without year, day and minute some are the same, also across the files
    assert data.train[2, 0] == data.train[2, 3]
    assert data.train[2, 1] == data.test[2, 1]


def test_amazon_files_have_no_user_features(tmp_path):
    train, test = ["0,0,0-3-5-9-1,0-4", "1,1,1-4-6-10-0,2-3"], ["0,1,0-3-5-10-0,2-3"]
    data = ContextDataset.from_files(_write(tmp_path, AMAZON_HEADER, train, test, "{1: 0, 2: 1}", "{1: 0, 2: 1}"))
    assert data.user_features is None
    assert data.num_user_features == 0
    assert data.context_fields == ("c_year", "c_month", "c_day", "c_DOW", "c_last")
    assert data.item_features.tolist() == [[0, 4], [2, 3]]


def test_kept_context_fields_in_the_order_of_the_file(tmp_path):
    data = ContextDataset.from_files(_yelp(tmp_path), keep_context=["last", "c_minute", "city"])
    assert data.context_fields == ("c_city", "c_minute", "c_last")
    assert data.context_features[data.train[2, 1]].tolist() == [1, 12, 1]
    assert data.num_context_features == 15  # the ids stay global
    only = ContextDataset.from_files(tmp_path, keep_context=["c_last"])
    assert only.context_features.tolist() == [[0], [1], [3]]


def test_compressed_files_and_missing_last_line_end(tmp_path):
    want = ContextDataset.from_files(_yelp(tmp_path))
    text = (tmp_path / "train.dat").read_text().rstrip("\n").replace("\n", "\r\n")
    (tmp_path / "train.dat.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "train.dat").unlink()
    got = ContextDataset.from_files(tmp_path)
    assert torch.equal(got.train, want.train)
    assert torch.equal(got.context_features, want.context_features)


BAD_FILES = [
    ({"train": _line(YELP_TRAIN, 1, "0,0,1-3-5-8-9-12-13,0-2,0-3-4")}, r"train\.dat:3: expected integers joined as in"),
    ({"train": _line(YELP_TRAIN, 2, "1,1-2,3-3-6-7-10-11-14-3,1-2,1-2-4")}, r"train\.dat:4: expected integers joined"),
    ({"train": _line(YELP_TRAIN, 2, "")}, r"train\.dat:4: expected integers joined as in the header"),
    ({"test": _line(YELP_TEST, 1, "1,x,1-3-5-7-9-11-13-1,1-2,0-3-4")}, r"test\.dat:3: expected integers.*'x'"),
    ({"train": _line(YELP_TRAIN, 3, "2,1,1-4-5-7-9-12-13-0,0-2,1-2-4")}, r"train\.dat:5: user_id 2 .*userid_dict.txt"),
    ({"train": _line(YELP_TRAIN, 0, "0,4,1-3-5-7-9-11-13-0,0-2,1-2-4")}, r"train\.dat:2: item_id 4 is out of range"),
    ({"test": _line(YELP_TEST, 0, "0,2,2-4-6-8-10-12-13-4,0-2,1-3-5")}, r"test\.dat:2: c_last 4 is out of range"),
    (
        {"train": _line(YELP_TRAIN, 3, "0,1,1-4-5-7-9-12-13-0,1-2,1-2-4")},
        r"train\.dat:5: the features of user 0 differ",
    ),
    ({"test": _line(YELP_TEST, 1, "1,0,1-3-5-7-9-11-13-1,1-2,0-3-5")}, r"test\.dat:3: the features of item 0 differ"),
    ({"header": "user,item,c_last"}, r"train\.dat:1: expected a header that starts with user_id,item_id"),
    ({"header": YELP_HEADER.replace("c_day", "x_day")}, r"train\.dat:1: expected one group of names with the prefix"),
    (
        {"header": YELP_HEADER.replace("-c_last", "-c_next")},
        r"train\.dat:1: expected context fields that end with c_last",
    ),
    ({"header": YELP_HEADER.replace("c_day", "c_year")}, r"train\.dat:1: a name occurs twice"),
    ({"train": []}, "train.dat holds no interactions"),
    ({"users": "{'a': 0,\n 'b': }"}, r"userid_dict\.txt:2: expected a Python dictionary of literals \(SyntaxError\)"),
    ({"users": "dict(a=0)"}, r"userid_dict\.txt:1: expected a Python dictionary of literals \(ValueError\)"),
    ({"items": "[0, 1]"}, r"itemid_dict\.txt:1: expected a non-empty Python dictionary, got list"),
    ({"items": ""}, "itemid_dict.txt is empty"),
    ({"users": "{'a': 0, 'b': 1, 'c': 2}"}, r"user 2 of userid_dict.txt has no row in train.dat or test.dat"),
]


@pytest.mark.parametrize(("change", "message"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_bad_files_are_named_with_their_line(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        ContextDataset.from_files(_yelp(tmp_path, **change))


def test_dictionaries_are_not_executed(tmp_path):
    target = tmp_path / "touched"
    attack = f"{{'a': __import__('pathlib').Path({str(target)!r}).touch()}}"
    with pytest.raises(ValueError, match=r"userid_dict\.txt:1: expected a Python dictionary of literals"):
        ContextDataset.from_files(_yelp(tmp_path, users=attack))
    assert not target.exists()


def test_headers_must_agree_and_files_exist(tmp_path):
    _yelp(tmp_path)
    (tmp_path / "test.dat").write_text(AMAZON_HEADER + "\n0,0,0-3-5-9-1,0-4\n")
    with pytest.raises(ValueError, match=r"test\.dat:1: the header differs from that of train\.dat"):
        ContextDataset.from_files(tmp_path)
    (tmp_path / "itemid_dict.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"itemid_dict\.txt"):
        ContextDataset.from_files(tmp_path)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (["c_city"], "keep_context must contain c_last"),
        (["c_town", "c_last"], "unknown context field in keep_context 'c_town'; accepted: c_DoW, c_city, c_day"),
        ("c_last", "must be a sequence of names, got the string"),
    ],
)
def test_bad_selections_of_context_fields(tmp_path, keep, message):
    with pytest.raises(ValueError, match=message):
        ContextDataset.from_files(_yelp(tmp_path), keep_context=keep)


# --- container ----------------------------------------------------------------------------------------------------


def _data(train: list[list[int]], test: list[list[int]], *, items: int = 5, contexts: int = 3) -> ContextDataset:
    """Rows are interactions (user, item, context); contexts have one feature and a last item."""
    rows = torch.tensor([[n, n % items] for n in range(contexts)])
    events = (torch.tensor(part, dtype=torch.long).reshape(-1, 3).T.contiguous() for part in (train, test))
    return ContextDataset(3, items, items, None, None, rows, *events)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([[3, 0, 0]], "train users holds 3, which is out of range"),
        ([[0, 5, 0]], "train items holds 5, which is out of range"),
        ([[0, 0, 3]], "train contexts holds 3, which is out of range"),
    ],
)
def test_interactions_out_of_range(train, message):
    with pytest.raises(ValueError, match=message):
        _data(train, [])


def test_wrong_shapes_and_sizes():
    data = _data([[0, 0, 0]], [])
    contexts = data.context_features
    with pytest.raises(ValueError, match=r"train must be \(3, n\)"):
        ContextDataset(3, 5, 5, None, None, contexts, data.train[:2], data.test)
    with pytest.raises(ValueError, match="num_graph_items=6"):
        ContextDataset(3, 5, 6, None, None, contexts, data.train, data.test)
    with pytest.raises(ValueError, match="out of range"):
        ContextDataset(3, 5, 5, None, None, contexts, data.train, data.test, num_context_features=2)
    with pytest.raises(ValueError, match=r"context_features must be \(C, k\)"):
        ContextDataset(3, 5, 5, None, None, contexts[:, 0], data.train, data.test)


def test_last_train_interaction_of_every_user_is_held_out():
    data = _data([[1, 0, 0], [0, 1, 1], [1, 2, 2], [0, 3, 0], [0, 2, 1], [2, 4, 0]], [[0, 0, 0]])
    held = data.hold_out_last()
    assert held.valid.T.tolist() == [[1, 2, 2], [0, 2, 1]]  # user 2 has a single one
    assert held.train.T.tolist() == [[1, 0, 0], [0, 1, 1], [0, 3, 0], [2, 4, 0]]
    assert held.test is data.test
    with pytest.raises(ValueError, match="validation interactions already"):
        held.hold_out_last()


# --- negatives ----------------------------------------------------------------------------------------------------


@given(
    events=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=12),
    seed=st.integers(0, 10),
)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_negatives_are_items_not_taken_in_this_context(events, seed):
    taken = set(events)
    data = _data([list(event) for event in events], [])
    if any(all((u, i, c) in taken for i in range(5)) for u, _, c in events):
        with pytest.raises(ValueError, match="no negative can be drawn"):
            data.sample_epoch(3, torch.Generator().manual_seed(seed))
        return
    samples = data.sample_epoch(3, torch.Generator().manual_seed(seed))
    drawn = list(zip(*(column.tolist() for column in samples), strict=True))
    positives = [row[:3] for row in drawn if row[3] == 1]
    negatives = [row[:3] for row in drawn if row[3] == 0]
    assert sorted(positives) == sorted(events)
    assert not taken & set(negatives)
    assert sorted((u, c) for u, _, c in negatives) == sorted((u, c) for u, _, c in events * 3)


def test_negatives_are_uniform_over_what_is_left():
    # In context 0 the user took items 0 and 1; item 2, taken in context 1, is as legal as items 3 and 4.
    data = _data([[0, 0, 0], [0, 1, 0], [0, 2, 1]], [])
    samples = data.sample_epoch(6000, torch.Generator().manual_seed(0))
    share = torch.bincount(samples.items[(samples.labels == 0) & (samples.contexts == 0)], minlength=5) / 12000
    assert share[:2].tolist() == [0, 0]
    assert (share[2:] - 1 / 3).abs().max() < 0.02
    order = samples.labels.nonzero().flatten()
    assert order.max() > 3  # shuffled: the three positives aren't at the front


def test_epochs_follow_the_generator():
    data = make_context_data(num_users=20, num_items=30, num_interactions=200).data
    one, again, other = (data.sample_epoch(2, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one.items, other.items)
    generator = torch.Generator().manual_seed(0)
    kept = data.sample_epoch(2, generator, sampler=data.sampler(generator))
    assert all(torch.equal(a, b) for a, b in zip(one, kept, strict=True))
    with pytest.raises(ValueError, match="num_negatives must be >= 1, got 0"):
        data.sample_epoch(0)


# --- leave-one-out ------------------------------------------------------------------------------------------------


def _by_hand(data: ContextDataset, scores: torch.Tensor, k: int, *, mask_target: bool) -> tuple[float, float, float]:
    hits = []
    seen = {(u, i) for part in (data.train, data.valid) if part is not None for u, i, _ in part.T.tolist()}
    for n, (user, target, _) in enumerate(data.test.T.tolist()):
        if (user, target) in seen and mask_target:
            hits.append(math.inf)
            continue
        ranked = [i for i in range(scores.shape[1]) if (user, i) not in seen or i == target]
        ranked.sort(key=lambda i: (-scores[n, i].item(), i))
        hits.append(ranked.index(target) + 1)
    inside = [rank if rank <= k else math.inf for rank in hits]
    mean = [sum(f(r) for r in inside) / len(inside) for f in (lambda r: r < math.inf, lambda r: 1 / math.log2(r + 1))]
    return mean[0], mean[1], sum(1 / r for r in inside) / len(inside)


@pytest.mark.parametrize("mask_target", [True, False])
@pytest.mark.parametrize("with_valid", [True, False])
def test_metrics_equal_a_loop(mask_target, with_valid):
    data = make_context_data(num_users=40, num_items=25, num_interactions=400, seed=2).data
    data = data.hold_out_last() if with_valid else data
    # A few equal scores; several test items repeat train items.
    scores = torch.randint(12, (40, data.num_graph_items), generator=torch.Generator().manual_seed(0)).double()
    row = {(u, c): n for n, (u, _, c) in enumerate(data.test.T.tolist())}

    def score(users, contexts):
        return scores[[row[key] for key in zip(users.tolist(), contexts.tolist(), strict=True)]]

    got = data.leave_one_out_metrics(score, ks=(3, 10), mask_target=mask_target, batch_size=7)
    for k in (3, 10):
        want = _by_hand(data, scores, k, mask_target=mask_target)
        assert (got[f"hr@{k}"], got[f"ndcg@{k}"], got[f"mrr@{k}"]) == pytest.approx(want)


def test_a_repeated_item_cannot_be_hit_unless_asked_for():
    data = _data([[0, 2, 0], [0, 3, 0]], [[0, 2, 1]])

    def score(users, contexts):
        return torch.tensor([[1.0, 2.0, 9.0, 8.0, 0.0]])

    assert data.leave_one_out_metrics(score, ks=(5,))["hr@5"] == 0
    assert data.leave_one_out_metrics(score, ks=(1,), mask_target=False)["hr@1"] == 1


def test_bad_evaluations():
    data = _data([[0, 2, 0]], [[0, 1, 1]])
    for call, message in (
        (lambda: data.leave_one_out_metrics(lambda u, c: torch.zeros(1, 4)), r"k must be in 1..5"),
        (
            lambda: data.leave_one_out_metrics(lambda u, c: torch.zeros(1, 4), ks=(1,)),
            r"must return \(1, 5\).*got \(1, 4\)",
        ),
        (lambda: data.leave_one_out_metrics(lambda u, c: torch.full((1, 5), math.nan), ks=(1,)), "aren't finite"),
        (lambda: data.leave_one_out_metrics(lambda u, c: torch.zeros(1, 5), ks=(1,), split="valid"), "no such"),
        (lambda: data.leave_one_out_metrics(lambda u, c: torch.zeros(1, 5), ks=(1,), split="dev"), "unknown split"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# --- generated data -----------------------------------------------------------------------------------------------


def test_generated_interactions_follow_the_recipe():
    made = make_context_data(num_users=300, num_items=80, num_interactions=4500, seed=1)
    data = made.data
    count = torch.bincount(torch.cat([data.train[0], data.test[0]]), minlength=300)
    assert count.min() >= 5
    assert count.float().mean().item() == pytest.approx(15, rel=0.05)
    assert data.test[0].tolist() == list(range(300))
    assert (data.num_context_features, data.num_user_features, data.num_item_features) == (63, 13, 17)
    assert data.context_features[:, :4].min(0).values.ge(torch.tensor([0, 20, 32, 56])).all()
    assert data.context_features[:, :4].max(0).values.lt(torch.tensor([20, 32, 56, 63])).all()
    # c_last is the item before, and the test event's is the last train item
    last = data.context_features[:, -1]
    for user in (0, 17, 299):
        own = data.train[:, data.train[0] == user]
        assert last[own[2, 1:]].tolist() == own[1, :-1].tolist()
        assert last[data.test[2, user]] == own[1, -1]
    assert made.test_scores.shape == (300, data.num_graph_items)
    # a user has a few favourite values (Dirichlet 0.3) of the 20 of the first field, not all alike
    values = data.context_features[data.train[2], 0]
    distinct = [len(set(values[data.train[0] == user].tolist())) for user in range(300)]
    assert sum(distinct) / 300 < 7
    assert len(set(values.tolist())) == 20


def test_generated_data_are_seeded_and_the_true_scores_rank_best():
    made, again, other = (make_context_data(num_users=200, num_items=100, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(made.data.train, again.data.train)
    assert made.data.digest() == again.data.digest() != other.data.digest()
    bayes = made.bayes_metrics(mask_target=False)
    count = torch.bincount(made.data.train[1], minlength=made.data.num_graph_items).double()
    popular = made.data.leave_one_out_metrics(lambda u, c: count.expand(len(u), -1), mask_target=False)
    assert bayes["hr@10"] > 0.6
    assert popular["hr@10"] < bayes["hr@10"] - 0.2


def test_generated_files_read_back_equal(tmp_path):
    made = make_context_data(num_users=30, num_items=60, num_interactions=300, user_cards=(), seed=3)
    assert made.data.num_graph_items < 60  # some items are never taken
    data = ContextDataset.from_files(made.write(tmp_path / "new" / "folder"))
    for name in ("item_features", "context_features", "train", "test"):
        assert torch.equal(getattr(data, name), getattr(made.data, name)), name
    assert (data.num_users, data.num_items, data.num_graph_items) == (30, 60, made.data.num_graph_items)
    assert data.user_features is None
    assert data.context_fields == made.data.context_fields


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_users": 0}, "num_users must be at least 1, got 0"),
        ({"num_items": 1}, "num_items must be at least 2, got 1"),
        ({"context_cards": (3, 0)}, "context_cards must be at least 1, got 0"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
    ],
)
def test_bad_generator_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        make_context_data(**change)
