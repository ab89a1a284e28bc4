"""Full-ranking metrics against golden vectors, a naive loop and torch_geometric."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from recsys_losses.metrics import (
    METRICS,
    evaluate_full_ranking,
    item_group_recall,
    item_popularity_groups,
    metrics_from_hits,
    topk_items,
)


def naive_topk(user: Tensor, item: Tensor, exclude: set[tuple[int, int]], k: int) -> list[list[int]]:
    """Rank item by item in Python: higher score first, then lower id; -1 where nothing is left."""
    ranking = []
    for u in range(len(user)):
        scores = [(-float(user[u].double() @ item[i].double()), i) for i in range(len(item)) if (u, i) not in exclude]
        best = [i for _, i in sorted(scores)[:k]]
        ranking.append(best + [-1] * (k - len(best)))
    return ranking


def naive_metrics(
    ranking: list[list[int]], relevant: dict[int, set[int]], count: list[int], k: int
) -> dict[str, float]:
    """Literal translation of the definitions, user by user."""
    total = dict.fromkeys(METRICS, 0.0)
    for u, items in relevant.items():
        top = ranking[u][:k]
        ranks = [r for r, i in enumerate(top, start=1) if i in items]
        total["recall"] += len(ranks) / len(items)
        total["precision"] += len(ranks) / k
        total["ndcg"] += sum(1 / math.log2(r + 1) for r in ranks) / sum(
            1 / math.log2(r + 1) for r in range(1, min(k, len(items)) + 1)
        )
        total["hit_ratio"] += bool(ranks)
        total["mrr"] += 1 / ranks[0] if ranks else 0.0
        given = [count[i] for i in top if i >= 0]
        total["arp"] += sum(given) / max(len(given), 1)
    return {name: value / len(relevant) for name, value in total.items()}


def integer_case(
    users: int, items: int, *, seed: int, dim: int = 4, density: float = 0.2
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Integer-valued embeddings: float32 scores are exact, and ties abound."""
    generator = torch.Generator().manual_seed(seed)
    user = torch.randint(-3, 4, (users, dim), generator=generator).float()
    item = torch.randint(-3, 4, (items, dim), generator=generator).float()
    draw = torch.rand(users, items, generator=generator)
    train = (draw < density).nonzero().T
    test = (draw > 1 - density).nonzero().T
    return user, item, train, test


def pairs(edge_index: Tensor) -> set[tuple[int, int]]:
    return {(int(u), int(i)) for u, i in edge_index.T}


# Shapes on both sides of the limits inside: few items (ranked directly), many (tiles), last block short or full.
SHAPES = [(5, 7, 3), (9, 130, 1), (4, 700, 5), (3, 2048, 4), (3, 2049, 2), (2, 4500, 20)]


@pytest.mark.parametrize(("users", "items", "k"), SHAPES)
@pytest.mark.parametrize("item_block", [None, 1, 64, 1000])
def test_topk_equals_naive_ranking_with_ties(users: int, items: int, k: int, item_block: int | None) -> None:
    if item_block == 1 and items > 700:
        item_block = 3
    user, item, train, _ = integer_case(users, items, seed=items)
    top = topk_items(user, item, train, k=k, batch_size=2, item_block=item_block, deterministic=True)
    assert top.tolist() == naive_topk(user, item, pairs(train), k)


@pytest.mark.parametrize("item_block", [None, 333, 5000])
def test_topk_without_ties_needs_no_deterministic_mode(item_block: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    user = torch.randn(20, 8, generator=generator, dtype=torch.float64)
    item = torch.randn(6000, 8, generator=generator, dtype=torch.float64)
    train = torch.stack((torch.arange(20).repeat(50), torch.randint(6000, (1000,), generator=generator)))
    score = user @ item.T
    score[train[0], train[1]] = -torch.inf
    expected = score.topk(10).indices
    assert torch.equal(topk_items(user, item, train, k=10, batch_size=7, item_block=item_block), expected)


def test_all_scores_equal_gives_lowest_ids() -> None:
    top = topk_items(torch.ones(2, 3), torch.ones(5000, 3), torch.tensor([[0, 1], [0, 2]]), k=4, deterministic=True)
    assert top.tolist() == [[1, 2, 3, 4], [0, 1, 3, 4]]


def test_users_can_be_chosen_repeated_and_reordered() -> None:
    user, item, train, _ = integer_case(6, 300, seed=3)
    everyone = topk_items(user, item, train, k=4, deterministic=True)
    chosen = torch.tensor([5, 0, 5, 2])
    assert torch.equal(
        topk_items(user, item, train, k=4, users=chosen, batch_size=3, deterministic=True), everyone[chosen]
    )


def test_no_exclusion_and_order_of_pairs() -> None:
    user, item, train, _ = integer_case(6, 300, seed=4)
    plain = topk_items(user, item, None, k=3, deterministic=True)
    assert plain.tolist() == naive_topk(user, item, set(), 3)
    shuffled = torch.cat((train, train), 1)[:, torch.randperm(2 * train.shape[1], generator=torch.Generator())]
    assert torch.equal(
        topk_items(user, item, shuffled, k=3, deterministic=True),
        topk_items(user, item, train, k=3, deterministic=True),
    )


def test_user_with_too_few_items_gets_minus_one_and_no_hit_for_it() -> None:
    user, item = torch.ones(2, 1), torch.tensor([[3.0], [2.0], [1.0]])
    train = torch.tensor([[0, 0, 1], [0, 1, 0]])
    assert topk_items(user, item, train, k=3).tolist() == [[2, -1, -1], [1, 2, -1]]
    # user 0's missing items must not be taken for the last item of the user before, nor its train item for a hit
    test = torch.tensor([[0, 0, 1], [0, 2, 2]])
    value = evaluate_full_ranking(user, item, train, test, ks=(3,), metrics=("recall", "precision", "arp"))
    assert value == pytest.approx({"recall@3": 0.75, "precision@3": 1 / 3, "arp@3": (0 + 0.5) / 2})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_rank_like_float32(dtype: torch.dtype) -> None:
    user, item, train, test = integer_case(8, 400, seed=5)  # small integers are exact in every dtype
    value = evaluate_full_ranking(user.to(dtype), item.to(dtype), train, test, metrics=METRICS, deterministic=True)
    assert value == evaluate_full_ranking(user, item, train, test, metrics=METRICS, deterministic=True)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    users=st.integers(1, 7),
    items=st.integers(5, 400),
    k=st.integers(1, 5),
    seed=st.integers(0, 10_000),
    batch_size=st.integers(1, 8),
    item_block=st.one_of(st.none(), st.integers(1, 500)),
)
def test_all_metrics_equal_naive_loops(
    users: int, items: int, k: int, seed: int, batch_size: int, item_block: int | None
) -> None:
    user, item, train, test = integer_case(users, items, seed=seed)
    if test.shape[1] == 0:
        test = torch.tensor([[0], [items - 1]])
    relevant: dict[int, set[int]] = {}
    for u, i in sorted(pairs(test)):
        relevant.setdefault(u, set()).add(i)
    count = torch.bincount(train[1], minlength=items).tolist()
    ranking = naive_topk(user, item, pairs(train), k)
    value = evaluate_full_ranking(
        user,
        item,
        train,
        test,
        ks=(1, k),
        batch_size=batch_size,
        metrics=METRICS,
        item_block=item_block,
        deterministic=True,
    )
    for cutoff in (1, k):
        expected = naive_metrics(ranking, relevant, count, cutoff)
        for name in METRICS:
            assert value[f"{name}@{cutoff}"] == pytest.approx(expected[name], abs=1e-12)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_equals_torch_geometric_metrics(k: int) -> None:
    from torch_geometric import metrics as pyg

    generator = torch.Generator().manual_seed(k)
    user, item = torch.randn(50, 16, generator=generator), torch.randn(3000, 16, generator=generator)
    draw = torch.rand(50, 3000, generator=generator)
    train, test = (draw < 0.01).nonzero().T, (draw > 0.995).nonzero().T
    test = test[:, (test[0] % 5) != 0]  # users without a test item
    train = train[:, train[0] != 7]  # a user without a train item
    value = evaluate_full_ranking(user, item, train, test, ks=(k,), batch_size=16, metrics=METRICS)

    score = user @ item.T
    score[train[0], train[1]] = -torch.inf
    evaluated, row = torch.unique(test[0], return_inverse=True)
    top = score[evaluated].topk(k).indices
    degree = torch.bincount(train[1], minlength=3000)
    independent = {
        "recall": pyg.LinkPredRecall(k),
        "ndcg": pyg.LinkPredNDCG(k),
        "precision": pyg.LinkPredPrecision(k),
        "mrr": pyg.LinkPredMRR(k),
    }
    if hasattr(pyg, "LinkPredHitRatio"):  # the lowest supported torch-geometric, 2.6, lacks these two
        independent |= {
            "hit_ratio": pyg.LinkPredHitRatio(k),
            "arp": pyg.LinkPredAveragePopularity(k, popularity=degree),
        }
    for name, metric in independent.items():
        metric.update(top, torch.stack((row, test[1])))
        assert value[f"{name}@{k}"] == pytest.approx(float(metric.compute()), rel=1e-6, abs=1e-8), name


def test_golden_hits() -> None:
    # junkangwu/BSL utils/evaluate.py, case "few_relevant": fewer relevant items than ranks
    hits = torch.zeros(5, 8, dtype=torch.bool)
    hits[0, [3, 6]] = hits[2, 6] = hits[3, 4] = True
    value = metrics_from_hits(hits, torch.tensor([2, 1, 2, 2, 2]))
    assert value["recall"].tolist() == pytest.approx([0, 0, 0, 0.1, 0.2, 0.2, 0.4, 0.4])
    assert value["precision"].tolist() == pytest.approx([0, 0, 0, 0.05, 0.08, 0.2 / 3, 0.8 / 7, 0.1])
    assert value["ndcg"].tolist() == pytest.approx(
        [
            0,
            0,
            0,
            0.052813624514518175,
            0.10025316706837742,
            0.10025316706837742,
            0.18200612610377187,
            0.18200612610377187,
        ]
    )


def test_known_ranking() -> None:
    # the train item 0 is skipped, so the one relevant item is at rank 2
    user, item = torch.ones(1, 1), torch.tensor([[4.0], [3.0], [2.0], [1.0]])
    train, test = torch.tensor([[0], [0]]), torch.tensor([[0], [2]])
    value = evaluate_full_ranking(user, item, train, test, ks=(1, 3))
    assert value == pytest.approx(
        {
            "recall@1": 0.0,
            "ndcg@1": 0.0,
            "precision@1": 0.0,
            "recall@3": 1.0,
            "ndcg@3": 1 / math.log2(3),
            "precision@3": 1 / 3,
        }
    )


def test_ideal_gain_counts_all_relevant_items_not_the_retrieved_ones() -> None:
    # One hit at rank 1 of 2, three relevant: the wrong (NGCF) NDCG would be 1.
    value = metrics_from_hits(torch.tensor([[True, False]]), torch.tensor([3]))
    assert value["ndcg"].tolist() == pytest.approx([1.0, 1 / (1 + 1 / math.log2(3))])


def test_hits_accept_zero_and_one() -> None:
    hits = torch.tensor([[0, 1, 1], [1, 0, 0]])
    a, b = metrics_from_hits(hits, torch.tensor([2, 1])), metrics_from_hits(hits.bool(), torch.tensor([2, 1]))
    assert all(torch.equal(a[name], b[name]) for name in a)


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def test_memory_is_bounded_by_batch_and_item_block() -> None:
    user, item, train, test = integer_case(64, 8000, seed=6, density=0.001)
    with Watch() as whole:
        evaluate_full_ranking(user, item, train, test, batch_size=64)
    assert whole.largest >= 64 * 8000
    with Watch() as watch:
        evaluate_full_ranking(user, item, train, test, batch_size=8, item_block=2048)
    assert watch.largest <= max(8 * 2048, item.numel())


@settings(derandomize=True, deadline=None, max_examples=60)
@given(count=st.lists(st.integers(0, 50), min_size=1, max_size=60), num_groups=st.integers(1, 12))
def test_popularity_groups(count: list[int], num_groups: int) -> None:
    if sum(count) == 0:
        count[0] = 1
    group = item_popularity_groups(torch.tensor(count), num_groups).tolist()
    assert all(0 <= g < num_groups for g in group)
    ordered = sorted(range(len(count)), key=lambda i: (count[i], i))
    assert [group[i] for i in ordered] == sorted(group)  # never a more popular item in a lower group
    for g in set(group):  # a group holds its share, give or take one item
        inside = [count[i] for i in range(len(count)) if group[i] == g]
        assert sum(inside) <= sum(count) / num_groups + max(inside)


def test_equal_counts_make_equal_groups() -> None:
    assert torch.bincount(item_popularity_groups(torch.full((100,), 3), 10)).tolist() == [10] * 10
    assert item_popularity_groups(torch.tensor([5, 0, 1]), 1).tolist() == [0, 0, 0]


def test_group_recall_sums_to_recall_and_equals_loop() -> None:
    user, item, train, test = integer_case(12, 200, seed=8)
    groups = item_group_recall(user, item, train, test, k=9, num_groups=4, deterministic=True)
    recall = evaluate_full_ranking(user, item, train, test, ks=(9,), deterministic=True)["recall@9"]
    assert groups.shape == (4,)
    assert float(groups.sum()) == pytest.approx(recall, rel=1e-12)
    of = item_popularity_groups(torch.bincount(train[1], minlength=200), 4).tolist()
    expected = [0.0] * 4
    ranking, known = naive_topk(user, item, pairs(train), 9), pairs(test)
    users = sorted({u for u, _ in known})
    for u in users:
        mine = {i for v, i in known if v == u}
        for i in ranking[u]:
            if i in mine:
                expected[of[i]] += 1 / len(mine) / len(users)
    assert groups.tolist() == pytest.approx(expected)


def test_gowalla_popularity_groups_match_the_paper(data_root) -> None:  # type: ignore[no-untyped-def]
    import lzma

    path = data_root / "recsys" / "gowalla" / "train.txt.xz"
    if not path.is_file():
        pytest.skip(f"{path} not found")
    with lzma.open(path, "rt") as lines:
        items = torch.tensor([int(i) for line in lines for i in line.split()[1:]])
    group = item_popularity_groups(torch.bincount(items, minlength=40981), 10)
    share = torch.bincount(group, minlength=10) / 40981
    # SSM paper, section 4.2: group 1 holds 25.5 % of Gowalla's items, group 10 holds 0.65 %
    assert float(share[0]) == pytest.approx(0.255, abs=5e-4)
    assert float(share[9]) == pytest.approx(0.0065, abs=5e-5)


GOOD = {
    "user_emb": torch.ones(3, 2),
    "item_emb": torch.ones(4, 2),
    "train_edge_index": torch.tensor([[0], [1]]),
    "test_edge_index": torch.tensor([[0, 2], [2, 3]]),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ks": (5,)}, r"k must be an integer in 1\.\.4 \(the number of items\), got 5"),
        ({"ks": (0,)}, "k must be an integer in"),
        ({"ks": (-1,)}, "k must be an integer in"),
        ({"ks": (2.0,)}, "k must be an integer in"),
        ({"ks": ()}, "ks is empty"),
        ({"metrics": ("recal",)}, "unknown metric 'recal'.*did you mean 'recall'"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"item_block": 0}, "item_block must be >= 1 or None, got 0"),
        ({"user_emb": torch.full((3, 2), torch.nan)}, "user_emb contains NaN"),
        ({"item_emb": torch.tensor([[0.0, torch.nan]]).expand(4, 2)}, "item_emb contains NaN"),
        ({"item_emb": torch.full((4, 2), torch.inf)}, "infinite or so large"),
        ({"user_emb": torch.full((3, 2), 1e30), "item_emb": torch.full((4, 2), 1e30)}, "infinite or so large"),
        ({"user_emb": torch.ones(3, 3)}, r"\(3, 3\) and \(4, 2\)"),
        ({"user_emb": torch.ones(3, 2, dtype=torch.int64)}, "must be floating"),
        ({"item_emb": torch.ones(0, 2)}, "item_emb is empty"),
        ({"train_edge_index": torch.tensor([[3], [0]])}, r"train_edge_index holds the user id 3"),
        ({"train_edge_index": torch.tensor([[0], [-1]])}, r"train_edge_index holds the negative item id -1"),
        ({"test_edge_index": torch.tensor([[0], [4]])}, r"test_edge_index holds the item id 4"),
        ({"test_edge_index": torch.tensor([0, 1])}, r"test_edge_index must be an int64 tensor of shape \(2, E\)"),
        ({"test_edge_index": torch.ones(2, 1)}, "must be an int64"),
        ({"test_edge_index": torch.empty(2, 0, dtype=torch.int64)}, "no user has a test item"),
    ],
)
def test_bad_arguments(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_full_ranking(**{"ks": (1,), **GOOD, **change})  # type: ignore[arg-type]


def test_bad_topk_arguments() -> None:
    user, item = torch.ones(3, 2), torch.ones(4, 2)
    with pytest.raises(ValueError, match="k must be an integer"):
        topk_items(user, item, None, k=5)
    with pytest.raises(ValueError, match="users holds the user id 3"):
        topk_items(user, item, None, k=1, users=torch.tensor([3]))
    with pytest.raises(ValueError, match="exclude_edge_index holds the item id 4"):
        topk_items(user, item, torch.tensor([[0], [4]]), k=1)


def test_bad_hits() -> None:
    with pytest.raises(ValueError, match="user without relevant items: row 1"):
        metrics_from_hits(torch.zeros(2, 3, dtype=torch.bool), torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="more hits than num_relevant"):
        metrics_from_hits(torch.ones(1, 3, dtype=torch.bool), torch.tensor([2]))
    with pytest.raises(ValueError, match="num_relevant"):
        metrics_from_hits(torch.zeros(2, 3, dtype=torch.bool), torch.tensor([1]))


@pytest.mark.parametrize(
    ("count", "groups", "message"),
    [
        (torch.tensor([0, 0]), 2, "zero for every item"),
        (torch.tensor([1, -1]), 2, "negative"),
        (torch.tensor([1.0]), 2, "integer"),
        (torch.tensor([1]), 0, "num_groups must be >= 1"),
    ],
)
def test_bad_groups(count: Tensor, groups: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        item_popularity_groups(count, groups)
