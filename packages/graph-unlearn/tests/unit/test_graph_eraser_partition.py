"""Partitions of GraphEraser against plain sequential programs."""

from __future__ import annotations

from collections import Counter, deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graph_unlearn.graph_eraser import _move, balanced_assign, balanced_kmeans, balanced_lpa, shard_cap


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def undirected(pairs: list[tuple[int, int]]) -> torch.Tensor:
    edges = torch.tensor(pairs).T
    return torch.cat([edges, edges.flip(0)], 1)


def communities(count: int, size: int) -> torch.Tensor:
    """Disjoint complete graphs."""
    pairs = [(c * size + i, c * size + j) for c in range(count) for i in range(size) for j in range(i)]
    return undirected(pairs)


def move_one_by_one(order: list[tuple[int, int]], shard: list[int], num_shards: int, cap: int) -> list[int]:
    """The published procedure: move, or queue; when a place gets free, the head of its queue moves."""
    shard, size = list(shard), Counter(shard)
    queues = {s: deque[int]() for s in range(num_shards)}

    def move(node: int, to: int) -> None:
        left = shard[node]
        shard[node] = to
        size[left] -= 1
        size[to] += 1
        if queues[left] and size[left] < cap:
            move(queues[left].popleft(), left)

    for node, wanted in order:
        if size[wanted] < cap:
            move(node, wanted)
        else:
            queues[wanted].append(node)
    return shard


@settings(deadline=None, max_examples=150)
@given(
    num_shards=st.integers(2, 5),
    n=st.integers(5, 40),
    slack=st.integers(0, 3),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_moves_of_all_shards_at_once_are_those_of_the_queues(num_shards, n, slack, seed, data):
    cap = -(-n // num_shards) + slack
    start = [i % num_shards for i in torch.randperm(n, generator=generator(seed)).tolist()]
    movers = data.draw(st.permutations(range(n)))[: data.draw(st.integers(0, n))]
    wanted = [(start[i] + data.draw(st.integers(1, num_shards - 1))) % num_shards for i in movers]
    expected = move_one_by_one(list(zip(movers, wanted, strict=True)), start, num_shards, cap)

    shard = torch.tensor(start)
    size = shard.bincount(minlength=num_shards)
    moved = _move(torch.tensor(movers, dtype=torch.int64), torch.tensor(wanted, dtype=torch.int64), shard, size, cap)
    assert shard.tolist() == expected
    assert torch.equal(size, shard.bincount(minlength=num_shards))
    assert moved == (expected != start)
    assert int(size.max()) <= cap


def test_lpa_finds_communities():
    edges = communities(4, 10)
    shard = balanced_lpa(edges, 40, 4, shard_cap(40, 4, 0.1), generator=generator())
    same = (shard[edges[0]] == shard[edges[1]]).double().mean()
    by_chance = 0.25
    assert same > by_chance + 0.4


@settings(deadline=None, max_examples=40)
@given(n=st.integers(4, 50), num_shards=st.integers(1, 4), edges=st.integers(0, 120), seed=st.integers(0, 10**6))
def test_lpa_respects_the_cap_and_its_seed(n, num_shards, edges, seed):
    pairs = torch.randint(n, (2, edges), generator=generator(seed))
    cap = shard_cap(n, num_shards)
    shard = balanced_lpa(pairs, n, num_shards, cap, generator=generator(seed))
    assert shard.shape == (n,)
    assert 0 <= int(shard.min()) <= int(shard.max()) < num_shards
    assert int(shard.bincount().max()) <= cap
    assert torch.equal(shard, balanced_lpa(pairs, n, num_shards, cap, generator=generator(seed)))


def test_isolated_nodes_level_the_shards_instead_of_filling_the_first():
    edges = communities(3, 4)  # nodes 0 to 11; 12 to 29 are alone
    shard = balanced_lpa(edges, 30, 3, 15, generator=generator())
    assert shard.bincount().tolist() == [10, 10, 10]
    alone = balanced_lpa(torch.empty(2, 0, dtype=torch.int64), 11, 4, 3, generator=generator())
    assert sorted(alone.bincount().tolist()) == [2, 3, 3, 3]


def test_one_round_depends_on_the_neighbours_only():
    # A star: the leaves want the shard of the centre; with room for all, all of them get there.
    edges = undirected([(0, i) for i in range(1, 8)])
    shard = balanced_lpa(edges, 8, 2, 8, max_rounds=1, generator=generator(3))
    start = balanced_lpa(edges, 8, 2, 8, max_rounds=0, generator=generator(3))
    assert torch.equal(shard[1:], start[0].expand(7))


def greedy(distance: torch.Tensor, cap: int) -> list[int]:
    num_shards, n = distance.shape
    shard, size = [-1] * n, [0] * num_shards
    for d, s, i in sorted((float(distance[s, i]), s, i) for s in range(num_shards) for i in range(n)):
        del d
        if shard[i] < 0 and size[s] < cap:
            shard[i] = s
            size[s] += 1
    return shard


@settings(deadline=None, max_examples=150)
@given(
    n=st.integers(1, 30),
    num_shards=st.integers(1, 6),
    slack=st.integers(0, 3),
    ties=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_assignment_is_that_of_the_sorted_pairs(n, num_shards, slack, ties, seed):
    num_shards = min(num_shards, n)
    cap = -(-n // num_shards) + slack
    distance = torch.rand(num_shards, n, generator=generator(seed), dtype=torch.float64)
    distance = (4 * distance).round() if ties else distance
    assert balanced_assign(distance, cap).tolist() == greedy(distance, cap)


def test_kmeans_finds_clusters_and_repeats_itself():
    torch.manual_seed(0)
    centre = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = (centre[:, None] + 0.1 * torch.randn(3, 8, 2)).reshape(24, 2)
    best = min(
        (balanced_kmeans(points, 3, 8, generator=generator(seed)) for seed in range(5)),
        key=lambda shard: sum(float(points[shard == s].var(0).sum()) for s in range(3)),
    )
    assert all(len(set(best[8 * c : 8 * c + 8].tolist())) == 1 for c in range(3))
    assert torch.equal(
        balanced_kmeans(points, 3, 9, generator=generator(1)), balanced_kmeans(points, 3, 9, generator=generator(1))
    )


def test_kmeans_keeps_the_cap_where_all_points_are_one():
    shard = balanced_kmeans(torch.zeros(10, 3), 5, 2, generator=generator())
    assert shard.bincount().tolist() == [2, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("n", "shards", "delta", "cap"), [(2437, 20, 0.005, 134), (10, 5, 0, 2), (10, 1, 0.5, 10), (7, 2, 0, 4)]
)
def test_cap(n, shards, delta, cap):
    assert shard_cap(n, shards, delta) == cap


BAD = {
    "more shards than nodes": (lambda: shard_cap(5, 6), "num_shards"),
    "no shard": (lambda: shard_cap(5, 0), "num_shards"),
    "negative delta": (lambda: shard_cap(5, 2, -0.1), "cap_delta"),
    "lpa, node id": (lambda: balanced_lpa(torch.tensor([[0], [9]]), 5, 2, 3), "out of range"),
    "lpa, shape": (lambda: balanced_lpa(torch.tensor([0, 1]), 5, 2, 3), r"\(2, E\)"),
    "lpa, cap": (lambda: balanced_lpa(torch.tensor([[0], [1]]), 5, 2, 2), "cap must be at least 3"),
    "lpa, rounds": (lambda: balanced_lpa(torch.tensor([[0], [1]]), 5, 2, 3, max_rounds=-1), "max_rounds"),
    "assign, cap": (lambda: balanced_assign(torch.zeros(2, 5), 2), "cap must be at least 3"),
    "assign, infinite": (lambda: balanced_assign(torch.full((2, 2), torch.inf), 2), "finite"),
    "assign, shape": (lambda: balanced_assign(torch.zeros(2), 2), r"\(S, n\)"),
    "kmeans, shards": (lambda: balanced_kmeans(torch.zeros(4, 2), 5, 4), "num_shards"),
    "kmeans, nan": (lambda: balanced_kmeans(torch.full((4, 2), torch.nan), 2, 4), "finite"),
    "kmeans, integer": (lambda: balanced_kmeans(torch.zeros(4, 2, dtype=torch.int64), 2, 4), "floating"),
    "kmeans, rounds": (lambda: balanced_kmeans(torch.zeros(4, 2), 2, 4, max_rounds=0), "max_rounds"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
