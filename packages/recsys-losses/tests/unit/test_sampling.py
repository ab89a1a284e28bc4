"""Negative samplers: law of the draws (chi-square with fixed seeds), exclusion, shapes, determinism, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from recsys_losses.sampling import (
    EdgeSet,
    PopularityNegativeSampler,
    UniformNegativeSampler,
    in_batch_log_q,
    item_counts,
)

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def frequencies(items: torch.Tensor, num_items: int) -> list[float]:
    return torch.bincount(items.reshape(-1), minlength=num_items).double().tolist()


@st.composite
def bipartite(draw: st.DrawFn) -> tuple[set[tuple[int, int]], int, int]:
    num_users, num_items = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    pair = st.tuples(st.integers(0, num_users - 1), st.integers(0, num_items - 1))
    return draw(st.sets(pair, max_size=40)), num_users, num_items


def edges_of(pairs: set[tuple[int, int]]) -> torch.Tensor:
    return torch.tensor(sorted(pairs), dtype=torch.long).reshape(-1, 2).T


class TestEdgeSet:
    @PROPERTY
    @given(bipartite())
    def test_equals_a_python_set(self, case):
        pairs, num_users, num_items = case
        edges = EdgeSet(edges_of(pairs), num_items)
        users = torch.arange(num_users + 2)
        items = torch.arange(-1, num_items + 2).expand(num_users + 2, -1)
        found = edges.contains(users, items)
        expected = [[(u, i) in pairs for i in items[0].tolist()] for u in users.tolist()]
        assert found.tolist() == expected
        assert len(edges) == len(pairs)

    def test_same_shape_pairs_and_broadcast(self):
        edges = EdgeSet(torch.tensor([[0, 1, 1], [2, 0, 0]]), 3)
        assert edges.contains(torch.tensor([0, 1, 0]), torch.tensor([2, 0, 0])).tolist() == [True, True, False]
        assert edges.contains(torch.tensor([[0], [1]]), torch.tensor([[0, 2]])).tolist() == [
            [False, True],
            [True, False],
        ]
        assert len(edges) == 2

    def test_square_rows_are_per_user_not_aligned(self):
        edges = EdgeSet(torch.tensor([[0], [1]]), 2)
        assert edges.contains(torch.tensor([0, 1]), torch.tensor([[1, 1], [1, 1]])).tolist() == [
            [True, True],
            [False, False],
        ]

    def test_to_same_device_is_itself(self):
        edges = EdgeSet(torch.tensor([[0], [1]]), 2)
        assert edges.to("cpu") is edges

    @pytest.mark.parametrize(
        ("edge_index", "num_items", "match"),
        [
            (torch.tensor([[0], [3]]), 3, "item id 3, which is not below num_items=3"),
            (torch.tensor([[-1], [0]]), 3, "negative user id -1"),
            (torch.tensor([[0, 1]]), 3, r"shape \(2, E\)"),
            (torch.tensor([[0.0], [1.0]]), 3, "int64"),
            (torch.tensor([[0], [0]]), 0, "num_items must be at least 1, got 0"),
            (torch.tensor([[2**31], [0]]), 3, "2147483648"),
        ],
    )
    def test_bad_edges(self, edge_index, num_items, match):
        with pytest.raises(ValueError, match=match):
            EdgeSet(edge_index, num_items)

    def test_bad_shapes(self):
        with pytest.raises(ValueError, match="do not broadcast"):
            EdgeSet(torch.tensor([[0], [0]]), 1).contains(torch.zeros(2).long(), torch.zeros(3).long())


class TestUniform:
    def test_uniform_law_and_shapes(self):
        sampler = UniformNegativeSampler(13, generator=generator())
        items = sampler.sample(torch.zeros(400, dtype=torch.long), 25)
        assert items.shape == (400, 25)
        assert items.dtype == torch.int64
        assert chisquare(frequencies(items, 13)).pvalue > 1e-3

    def test_shared_draws_one_set(self):
        sampler = UniformNegativeSampler(13, shared=True, generator=generator())
        items = sampler.sample(torch.zeros(4, dtype=torch.long), 5000)
        assert items.shape == (5000,)
        assert chisquare(frequencies(items, 13)).pvalue > 1e-3

    def test_excluded_law_is_uniform_over_the_free_items(self):
        positives = [0, 1, 4, 5, 9]
        exclude = torch.tensor([[0] * 5 + [1] + [2] * 9, [*positives, 7, *range(1, 10)]])
        items = UniformNegativeSampler(10, exclude=exclude, generator=generator()).sample(
            torch.tensor([0, 1, 2, 3]), 9000
        )
        for user, taken in enumerate([set(positives), {7}, set(range(1, 10)), set()]):
            counts = frequencies(items[user], 10)
            assert all(counts[i] == 0 for i in taken)
            assert chisquare([c for i, c in enumerate(counts) if i not in taken]).pvalue > 1e-3 or len(taken) == 9

    @PROPERTY
    @given(bipartite())
    def test_never_a_positive_and_every_free_item_reachable(self, case):
        pairs, num_users, num_items = case
        free = [sorted(set(range(num_items)) - {i for u, i in pairs if u == user}) for user in range(num_users + 1)]
        users = torch.tensor([u for u, items in enumerate(free) if items])
        sampler = UniformNegativeSampler(num_items, exclude=edges_of(pairs), generator=generator())
        drawn = sampler.sample(users, 300)
        for user, row in zip(users.tolist(), drawn.tolist(), strict=True):
            assert set(row) == set(free[user])

    def test_dense_user_at_catalogue_scale(self):
        num_items = 200_000
        exclude = torch.stack((torch.full((num_items - 1,), 3), torch.arange(1, num_items)))
        sampler = UniformNegativeSampler(num_items, exclude=exclude, generator=generator())
        assert sampler.sample(torch.tensor([3]), 50).eq(0).all()

    def test_repeated_pairs_count_once(self):
        exclude = torch.tensor([[0, 0, 0], [0, 0, 0]])
        drawn = UniformNegativeSampler(2, exclude=exclude, generator=generator()).sample(torch.tensor([0]), 20)
        assert drawn.eq(1).all()

    def test_a_user_with_all_items_is_named(self):
        exclude = torch.tensor([[0, 5, 5], [0, 0, 1]])
        sampler = UniformNegativeSampler(2, exclude=exclude, generator=generator())
        assert sampler.sample(torch.tensor([0]), 1).tolist() == [[1]]
        with pytest.raises(ValueError, match="user 5 has interacted with all items"):
            sampler.sample(torch.tensor([0, 5]), 1)

    @pytest.mark.parametrize("exclude", [None, torch.tensor([[0, 1], [3, 4]])])
    def test_same_generator_state_same_stream(self, exclude):
        users = torch.arange(6)
        streams = []
        for seed in (7, 7, 8):
            sampler = UniformNegativeSampler(50, exclude=exclude, generator=generator(seed))
            streams.append(torch.cat([sampler.sample(users, 9) for _ in range(3)]))
        assert torch.equal(streams[0], streams[1])
        assert not torch.equal(streams[0], streams[2])

    def test_int32_users(self):
        exclude = torch.tensor([[0], [0]])
        drawn = UniformNegativeSampler(2, exclude=exclude).sample(torch.zeros(3, dtype=torch.int32), 2)
        assert drawn.eq(1).all()

    def test_bad_construction(self):
        with pytest.raises(ValueError, match="num_items must be at least 1, got 0"):
            UniformNegativeSampler(0)
        with pytest.raises(ValueError, match="shared=True cannot be combined with exclude"):
            UniformNegativeSampler(3, exclude=torch.tensor([[0], [0]]), shared=True)


@pytest.mark.parametrize(
    "sampler",
    [UniformNegativeSampler(3), PopularityNegativeSampler(torch.ones(3))],
    ids=["uniform", "popularity"],
)
@pytest.mark.parametrize(
    ("user", "n", "match"),
    [
        (torch.zeros(2, 2, dtype=torch.long), 1, r"user must have shape \(B,\), got \(2, 2\)"),
        (torch.zeros(2, dtype=torch.long), 0, "n must be at least 1, got 0"),
        (torch.zeros(2), 1, "int64 or int32"),
        (torch.tensor([0, -4]), 1, "negative id -4"),
    ],
)
def test_bad_requests(sampler, user, n, match):
    with pytest.raises(ValueError, match=match):
        sampler.sample(user, n)


class TestPopularity:
    COUNT = torch.tensor([0, 1, 2, 0, 8, 3, 0])

    @pytest.mark.parametrize("beta", [0.25, 0.75, 1.0, 2.0])
    def test_law_is_count_to_the_beta(self, beta):
        sampler = PopularityNegativeSampler(self.COUNT, beta=beta, shared=False, generator=generator())
        items = sampler.sample(torch.arange(100), 200)
        assert items.shape == (100, 200)
        counts = frequencies(items, 7)
        weight = [c**beta if c else 0.0 for c in self.COUNT.tolist()]
        assert all(counts[i] == 0 for i in (0, 3, 6))
        expected = [20_000 * w / sum(weight) for w in weight if w]
        assert chisquare([counts[i] for i in (1, 2, 4, 5)], expected).pvalue > 1e-3
        log_prob = sampler.log_prob(torch.tensor([1, 4]))
        assert log_prob.tolist() == pytest.approx([math.log(weight[i] / sum(weight)) for i in (1, 4)], rel=1e-6)
        assert log_prob.dtype == torch.get_default_dtype()
        assert sampler.log_prob(torch.tensor([[3]])).tolist() == [[-math.inf]]

    def test_beta_zero_is_uniform_over_all_items(self):
        sampler = PopularityNegativeSampler(self.COUNT, beta=0.0, generator=generator())
        items = sampler.sample(torch.zeros(1, dtype=torch.long), 7000)
        assert items.shape == (7000,)
        assert chisquare(frequencies(items, 7)).pvalue > 1e-3
        assert sampler.log_prob(torch.arange(7)).tolist() == pytest.approx([-math.log(7)] * 7)

    def test_beta_one_is_the_in_batch_law(self):
        sampler = PopularityNegativeSampler(self.COUNT)
        assert torch.equal(sampler.log_prob(torch.arange(7)), in_batch_log_q(self.COUNT))

    def test_probabilities_sum_to_one_for_a_large_catalogue_and_large_powers(self):
        count = torch.randint(0, 100_000, (300_000,), generator=generator())
        for beta in (0.5, 1.0, 80.0):
            sampler = PopularityNegativeSampler(count, beta=beta, generator=generator())
            total = sampler.log_prob(torch.arange(count.numel())).double().exp().sum()
            assert float(total) == pytest.approx(1.0, abs=1e-4)
            assert (count[sampler.sample(torch.tensor([0]), 1000)] > 0).all()

    def test_same_generator_state_same_stream(self):
        draws = [
            PopularityNegativeSampler(self.COUNT, generator=generator(s)).sample(torch.tensor([0]), 40)
            for s in (3, 3, 4)
        ]
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])

    @pytest.mark.parametrize(
        ("count", "beta", "match"),
        [
            (torch.tensor([0, 0]), 1.0, "only zeros"),
            (torch.tensor([1, -1]), 1.0, "finite numbers of at least 0"),
            (torch.tensor([1.0, math.nan]), 1.0, "finite numbers of at least 0"),
            (torch.tensor([1.0, math.inf]), 1.0, "finite numbers of at least 0"),
            (torch.ones(2, 2), 1.0, "non-empty vector"),
            (torch.ones(0), 1.0, "non-empty vector"),
            (torch.ones(2), -0.5, "beta must be a finite number of at least 0, got -0.5"),
            (torch.ones(2), math.nan, "beta"),
            (torch.ones(2), math.inf, "beta"),
        ],
    )
    def test_bad_construction(self, count, beta, match):
        with pytest.raises(ValueError, match=match):
            PopularityNegativeSampler(count, beta=beta)

    def test_bad_items(self):
        sampler = PopularityNegativeSampler(self.COUNT)
        with pytest.raises(ValueError, match="id 7, which is not below 7"):
            sampler.log_prob(torch.tensor([0, 7]))
        with pytest.raises(ValueError, match="negative id -1"):
            sampler.log_prob(torch.tensor([-1]))


def test_item_counts():
    edges = torch.tensor([[0, 1, 2], [1, 1, 3]])
    assert item_counts(edges, 5).tolist() == [0, 2, 0, 1, 0]
    with pytest.raises(ValueError, match="not below num_items=3"):
        item_counts(edges, 3)
    with pytest.raises(ValueError, match=r"shape \(2, E\)"):
        item_counts(edges[0], 5)


def test_in_batch_log_q_is_the_law_of_items_drawn_through_edges():
    edges = torch.stack((torch.arange(60), torch.arange(60) % 7 % 4))
    picked = edges[1, torch.randint(60, (20_000,), generator=generator())]
    expected = in_batch_log_q(item_counts(edges, 4)).double().exp() * 20_000
    assert chisquare(frequencies(picked, 4), (expected * 20_000 / expected.sum()).tolist()).pvalue > 1e-3
