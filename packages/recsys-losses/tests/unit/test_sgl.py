from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from recsys_losses import baselines, models
from recsys_losses.data import InteractionData, hold_out_validation, load_dataset
from recsys_losses.metrics import evaluate_full_ranking, item_group_recall
from recsys_losses.models import LightGCN
from recsys_losses.sgl import (
    SGL,
    BPRSampler,
    SGLLoss,
    _losses,
    add_noise,
    bpr_loss,
    drop_edges,
    drop_nodes,
    fit,
    normalized_adjacency,
    propagate,
    random_walk_views,
    recall_ndcg_at_k,
    sgl_loss,
    ssl_loss,
)
from recsys_losses.training import evaluate, load_model, save_model

if TYPE_CHECKING:
    from pathlib import Path

F64 = torch.float64
U, I, DIM = 11, 9, 4


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=generator(seed))


def some_edges(count: int = 45, seed: int = 0) -> torch.Tensor:
    """Distinct pairs; the last user and the last item have none."""
    user = torch.randint(U - 1, (count,), generator=generator(seed))
    item = torch.randint(I - 1, (count,), generator=generator(seed + 100))
    return torch.unique(torch.stack([user, item]), dim=1)


def dense_adjacency(edges: torch.Tensor) -> torch.Tensor:
    """The definition, entry by entry."""
    plain = torch.zeros(U + I, U + I, dtype=F64)
    for user, item in edges.T.tolist():
        plain[user, U + item] = plain[U + item, user] = 1
    degree = plain.sum(1)
    scale = torch.where(degree > 0, degree.clamp(min=1).rsqrt(), 0.0)
    return scale[:, None] * plain * scale


def reference_ssl(u1, u2, i1, i2, users, items, *, temperature, mode="both_side", negatives="all"):
    """The definition with whole logit matrices, one entry of the batch at a time."""

    def side(first, second, entries, candidates):
        a, b = F.normalize(first, dim=1), F.normalize(second, dim=1)
        total = first.new_zeros(())
        for entry in entries:
            logits = (b[candidates] @ a[entry]) / temperature
            total = total + torch.logsumexp(logits, 0) - (a[entry] @ b[entry]) / temperature
        return total

    if mode == "merge":
        nodes = sorted(set(users.tolist())) + [len(u1) + i for i in sorted(set(items.tolist()))]
        return side(torch.cat([u1, i1]), torch.cat([u2, i2]), nodes, nodes)
    total = u1.new_zeros(())
    if mode != "item_side":
        total = total + side(u1, u2, users.tolist(), users if negatives == "batch" else torch.arange(len(u1)))
    if mode != "user_side":
        total = total + side(i1, i2, items.tolist(), items if negatives == "batch" else torch.arange(len(i1)))
    return total


def tables(seed: int = 0, dtype: torch.dtype = F64) -> tuple[torch.Tensor, ...]:
    return tuple(randn(rows, DIM, seed=seed + n, dtype=dtype).requires_grad_() for n, rows in enumerate((U, U, I, I)))


BATCH = torch.tensor([0, 3, 3, 7, 10]), torch.tensor([1, 1, 5, 8, 1])
NEGATIVE = torch.tensor([2, 4, 0, 2, 6])


# --- graph --------------------------------------------------------------------------------------------------------


class TestGraph:
    @pytest.mark.parametrize("layout", ["csr", "coo"])
    def test_adjacency_equals_the_definition(self, layout: Any) -> None:
        matrix = normalized_adjacency(some_edges(), U, I, dtype=F64, layout=layout)
        assert matrix.layout == (torch.sparse_csr if layout == "csr" else torch.sparse_coo)
        torch.testing.assert_close(matrix.to_dense(), dense_adjacency(some_edges()), rtol=1e-12, atol=0)

    @pytest.mark.parametrize("layout", ["csr", "coo"])
    def test_propagate_is_the_mean_of_the_hops(self, layout: Any) -> None:
        edges, x = some_edges(), randn(U + I, DIM)
        matrix = dense_adjacency(edges)
        want = (x + matrix @ x + matrix @ (matrix @ x)) / 3
        torch.testing.assert_close(propagate(x, normalized_adjacency(edges, U, I, dtype=F64, layout=layout), 2), want)
        assert torch.equal(propagate(x, [], 0), x)

    def test_propagate_through_one_matrix_per_hop_and_its_gradient(self) -> None:
        views = random_walk_views(some_edges(), 0.3, 3, generator=generator())
        x = randn(U + I, 2).requires_grad_()
        hop, want = x, x
        for view in views:
            hop = dense_adjacency(view) @ hop
            want = want + hop
        adj = [normalized_adjacency(view, U, I, dtype=F64) for view in views]
        torch.testing.assert_close(propagate(x, adj, 3), want / 4)
        assert torch.autograd.gradcheck(lambda t: propagate(t, adj, 3), (x,))

    def test_half_precision_propagates_in_float32(self) -> None:
        adj, x = normalized_adjacency(some_edges(), U, I), randn(U + I, DIM, dtype=torch.float32)
        assert torch.equal(propagate(x.half(), adj, 2), propagate(x.half().float(), adj, 2).half())

    @given(total=st.integers(1, 300), ratio=st.floats(0, 0.99), seed=st.integers(0, 99))
    @settings(max_examples=60, deadline=None)
    def test_edge_dropout_keeps_the_exact_number(self, total: int, ratio: float, seed: int) -> None:
        edges = torch.arange(2 * total).view(2, total)
        kept = drop_edges(edges, ratio, generator=generator(seed))
        assert kept.shape[1] == int(total * (1 - ratio)) == len(torch.unique(kept[0]))
        assert torch.equal(kept[0] + total, kept[1])

    @given(users=st.integers(1, 60), items=st.integers(1, 60), ratio=st.floats(0, 0.99), seed=st.integers(0, 99))
    @settings(max_examples=60, deadline=None)
    def test_node_dropout_removes_the_exact_number(self, users: int, items: int, ratio: float, seed: int) -> None:
        full = torch.cartesian_prod(torch.arange(users), torch.arange(items)).T  # every node has edges
        left = drop_nodes(full, users, items, ratio, generator=generator(seed))
        kept_users, kept_items = users - int(users * ratio), items - int(items * ratio)
        assert len(torch.unique(left[0])) == kept_users
        assert len(torch.unique(left[1])) == kept_items
        assert left.shape[1] == kept_users * kept_items

    def test_edges_are_kept_alike(self) -> None:
        source = generator()
        often = sum(torch.bincount(drop_edges(torch.arange(20).view(2, 10), 0.4, generator=source)[0], minlength=10)
                    for _ in range(2000))  # fmt: skip
        # Binomial(2000, 0.6): four deviations are 88.
        assert bool(((often - 1200).abs() < 88).all())

    def test_a_seed_determines_the_views_and_two_differ(self) -> None:
        edges = some_edges()
        for draw in (
            lambda g: drop_edges(edges, 0.3, generator=g),
            lambda g: drop_nodes(edges, U, I, 0.3, generator=g),
            lambda g: torch.cat(random_walk_views(edges, 0.3, 3, generator=g)),
        ):
            first, source = draw(generator(5)), generator(5)
            assert torch.equal(first, draw(source))
            second = draw(source)
            assert first.shape != second.shape or not torch.equal(first, second)

    def test_random_walk_with_one_hop_is_edge_dropout(self) -> None:
        edges = some_edges()
        [view] = random_walk_views(edges, 0.3, 1, generator=generator(2))
        assert torch.equal(view, drop_edges(edges, 0.3, generator=generator(2)))
        batch = (*BATCH, NEGATIVE)
        user, item = randn(U, DIM), randn(I, DIM, seed=1)
        as_list = sgl_loss(user, item, edges, [view], [edges], *batch, num_layers=1)
        as_one = sgl_loss(user, item, edges, view, edges, *batch, num_layers=1)
        assert as_list == as_one


class TestNoise:
    def data(self) -> InteractionData:
        edges = some_edges()
        return InteractionData(U, I, train=edges[:, ::2], test=edges[:, 1::4], valid=edges[:, 3::4])

    def test_adds_the_exact_number_of_new_pairs(self) -> None:
        data = self.data()
        noisy = add_noise(data, 0.5, generator=generator())
        number = data.train.shape[1]
        assert noisy.train.shape[1] == number + int(0.5 * number)
        assert torch.equal(noisy.train[:, :number], data.train)
        everything = torch.cat([noisy.train, noisy.test, noisy.valid], dim=1)
        assert torch.unique(everything, dim=1).shape == everything.shape

    def test_can_fill_every_free_cell_and_no_more(self) -> None:
        data = self.data()
        free = U * I - some_edges().shape[1]
        ratio = (free + 0.5) / data.train.shape[1]
        filled = add_noise(data, ratio, generator=generator())
        assert filled.train.shape[1] == data.train.shape[1] + free
        with pytest.raises(ValueError, match="ratio"):
            add_noise(data, ratio + 1)
        with pytest.raises(ValueError, match="ratio"):
            add_noise(data, -0.1)

    def test_is_uniform_over_the_free_pairs(self) -> None:
        data, source = self.data(), generator()
        count = torch.zeros(U * I)
        for _ in range(1000):
            new = add_noise(data, 0.3, generator=source).train[:, data.train.shape[1] :]
            count[new[0] * I + new[1]] += 1
        free = count > 0
        expected = count.sum() / free.sum()
        assert int(free.sum()) == U * I - some_edges().shape[1]
        assert float((count[free] - expected).abs().max()) < 5 * math.sqrt(float(expected))


# --- losses -------------------------------------------------------------------------------------------------------


MODES = [
    *itertools.product(("both_side", "user_side", "item_side"), ("all", "batch")),
    ("merge", "batch"),
]


class TestSSL:
    @pytest.mark.parametrize(("mode", "negatives"), MODES)
    @pytest.mark.parametrize("chunk_size", [None, 1, 3, 1000])
    def test_equals_the_definition_with_its_gradients(self, mode: Any, negatives: Any, chunk_size: Any) -> None:
        inputs = tables()
        options = {"temperature": 0.3, "mode": mode, "negatives": negatives}
        got = ssl_loss(*inputs, *BATCH, chunk_size=chunk_size, **options)
        want = reference_ssl(*inputs, *BATCH, **options)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        for ours, theirs in zip(
            torch.autograd.grad(got, inputs, allow_unused=True, materialize_grads=True),
            torch.autograd.grad(want, inputs, allow_unused=True, materialize_grads=True),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)

    @given(
        users=st.lists(st.integers(0, U - 1), min_size=1, max_size=8),
        seed=st.integers(0, 50),
        mode=st.sampled_from(MODES),
        temperature=st.floats(0.05, 5),
    )
    @settings(max_examples=40, deadline=None)
    def test_equals_the_definition_for_any_batch(self, users, seed, mode, temperature) -> None:  # type: ignore[no-untyped-def]
        user = torch.tensor(users)
        item = (user * 5 + seed) % I
        options = {"temperature": temperature, "mode": mode[0], "negatives": mode[1]}
        torch.testing.assert_close(
            ssl_loss(*tables(seed), user, item, **options), reference_ssl(*tables(seed), user, item, **options)
        )

    @pytest.mark.parametrize(("mode", "negatives"), MODES)
    def test_without_looking_for_repetitions(self, mode: Any, negatives: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        # What a GPU does: its batches aren't made distinct.
        options = {"temperature": 0.3, "mode": mode, "negatives": negatives}
        want = ssl_loss(*tables(), *BATCH, **options)
        monkeypatch.setattr(_losses, "_distinct", lambda ids: (ids, None))
        torch.testing.assert_close(ssl_loss(*tables(), *BATCH, **options), want, rtol=1e-12, atol=1e-12)

    def test_ignores_the_length_of_rows(self) -> None:
        inputs = tables()
        scaled = [table * torch.rand(len(table), 1, dtype=F64, generator=generator(9)).add(0.1) for table in inputs]
        torch.testing.assert_close(ssl_loss(*scaled, *BATCH), ssl_loss(*inputs, *BATCH))

    def test_ignores_the_order_of_nodes(self) -> None:
        user_order, item_order = torch.randperm(U, generator=generator(1)), torch.randperm(I, generator=generator(2))
        u1, u2, i1, i2 = tables()
        users, items = torch.argsort(user_order)[BATCH[0]], torch.argsort(item_order)[BATCH[1]]
        shuffled = ssl_loss(u1[user_order], u2[user_order], i1[item_order], i2[item_order], users, items)
        torch.testing.assert_close(shuffled, ssl_loss(u1, u2, i1, i2, *BATCH))

    def test_limits(self) -> None:
        u1, u2, i1, i2 = tables()
        rows = len(BATCH[0])
        # One direction only: both sides approach log of the number of nodes.
        hot = ssl_loss(u1, u2, i1, i2, *BATCH, temperature=1e6).item()
        assert hot == pytest.approx(rows * (math.log(U) + math.log(I)), rel=1e-5)
        ones = torch.ones(U, DIM, dtype=F64), torch.ones(I, DIM, dtype=F64)
        equal = ssl_loss(ones[0], ones[0], ones[1], ones[1], *BATCH, temperature=0.1).item()
        assert equal == pytest.approx(rows * (math.log(U) + math.log(I)))
        # Equal views: the positive cosine is exactly 1, what is left is the spread of the nodes.
        unit = F.normalize(u1, dim=1)
        spread = torch.logsumexp((unit @ unit.T)[BATCH[0]] / 0.2, 1) - 5
        torch.testing.assert_close(ssl_loss(u1, u1, i1, i1, *BATCH, mode="user_side"), spread.sum())

    def test_gradient(self) -> None:
        inputs = tables()
        assert torch.autograd.gradcheck(lambda *t: ssl_loss(*t, *BATCH, temperature=0.5), inputs)

    @pytest.mark.parametrize("temperature", [0.01, 0.005])
    def test_sharp_temperature_in_float32(self, temperature: float) -> None:
        wide = tables()
        narrow = tuple(table.detach().float().requires_grad_() for table in wide)
        want, got = (ssl_loss(*t, *BATCH, temperature=temperature) for t in (wide, narrow))
        assert got.item() == pytest.approx(want.item(), rel=1e-4)
        for ours, theirs in zip(torch.autograd.grad(got, narrow), torch.autograd.grad(want, wide), strict=True):
            assert bool(ours.isfinite().all())
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_computed_in_float32(self, dtype: torch.dtype) -> None:
        inputs = [table.to(dtype) for table in tables()]
        got = ssl_loss(*inputs, *BATCH)
        assert got.dtype == dtype
        assert torch.equal(got, ssl_loss(*(table.float() for table in inputs), *BATCH).to(dtype))

    def test_zero_rows_are_finite(self) -> None:
        zero = torch.zeros(U, DIM, requires_grad=True)
        loss = ssl_loss(zero, zero, zero, zero, *BATCH)
        assert bool(torch.autograd.grad(loss, zero)[0].isfinite().all())
        assert loss.item() == pytest.approx(2 * len(BATCH[0]) * math.log(U))

    def test_mean_divides_the_sum_by_the_batch(self) -> None:
        for mode, negatives in MODES:
            total = ssl_loss(*tables(), *BATCH, mode=mode, negatives=negatives)
            mean = ssl_loss(*tables(), *BATCH, mode=mode, negatives=negatives, reduction="mean")
            torch.testing.assert_close(mean, total / 5)

    def test_chunks_change_memory_and_not_the_result(self) -> None:
        nodes, batch = 3000, 400
        inputs = [randn(nodes, 8, seed=n, dtype=torch.float32).requires_grad_() for n in range(4)]
        ids = torch.randperm(nodes, generator=generator())[:batch]
        found = {}
        for chunk in (100, nodes):
            with _LargestTensor() as seen:
                loss = ssl_loss(*inputs, ids, ids, chunk_size=chunk)
                grads = torch.autograd.grad(loss, inputs)
            found[chunk] = loss, grads, seen.elements
        torch.testing.assert_close(found[100][0], found[nodes][0], rtol=1e-6, atol=0)
        for ours, whole in zip(found[100][1], found[nodes][1], strict=True):
            torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-6)
        assert found[nodes][2] >= batch * nodes
        assert found[100][2] <= max(batch * 100, nodes * 8)

    def test_memory_is_bounded_by_default(self) -> None:
        nodes, batch = 20_000, 600
        inputs = [randn(nodes, 4, seed=n, dtype=torch.float32).requires_grad_() for n in range(4)]
        ids = torch.arange(batch)
        with _LargestTensor() as seen:
            ssl_loss(*inputs, ids, ids).backward()
        assert seen.elements < batch * nodes / 10


class _LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


class TestSGLLoss:
    def inputs(self, dtype: torch.dtype = F64) -> tuple[torch.Tensor, ...]:
        edges = some_edges()
        views = (drop_edges(edges, 0.4, generator=generator(n)) for n in (1, 2))
        user, item = randn(U, DIM, dtype=dtype).requires_grad_(), randn(I, DIM, seed=1, dtype=dtype).requires_grad_()
        return user, item, edges, *views, *BATCH, NEGATIVE

    def test_is_the_sum_of_its_parts(self) -> None:
        user, item, edges, view1, view2, users, pos, neg = self.inputs()
        table = torch.cat([user, item])
        full, first, second = (
            (table + dense_adjacency(g) @ table + dense_adjacency(g) @ (dense_adjacency(g) @ table)) / 3
            for g in (edges, view1, view2)
        )
        score = (full[users] * full[U + pos]).sum(1) - (full[users] * full[U + neg]).sum(1)
        bpr = torch.log1p(torch.exp(-score)).sum()
        ssl = reference_ssl(first[:U], second[:U], first[U:], second[U:], users, pos, temperature=0.3)
        l2 = 0.5 * sum((t[ids] ** 2).sum() for t, ids in ((user, users), (item, pos), (item, neg)))
        want = SGLLoss(bpr + 0.7 * ssl + 0.01 * l2, bpr, ssl, l2)
        got = sgl_loss(*self.inputs(), num_layers=2, temperature=0.3, ssl_weight=0.7, l2_weight=0.01)
        torch.testing.assert_close(tuple(got), tuple(want))
        mean = sgl_loss(*self.inputs(), num_layers=2, temperature=0.3, ssl_weight=0.7, l2_weight=0.01, reduction="mean")
        torch.testing.assert_close(tuple(mean), tuple(part / 5 for part in want))

    def test_gradient(self) -> None:
        user, item, *rest = self.inputs()
        assert torch.autograd.gradcheck(
            lambda u, i: sgl_loss(u, i, *rest, num_layers=2, temperature=0.5, l2_weight=0.1).loss, (user, item)
        )

    @pytest.mark.parametrize("dtype", [torch.float32, F64])
    def test_without_ssl_it_is_lightgcn_with_bpr_bit_for_bit(self, dtype: torch.dtype) -> None:
        user, item, edges, view1, view2, users, pos, neg = self.inputs(dtype)
        got = sgl_loss(user, item, edges, view1, view2, users, pos, neg, ssl_weight=0.0)
        table = torch.cat([user, item])
        rows = torch.cat([users, U + pos, U + neg])
        u, i, j = propagate(table, models.normalized_adjacency(edges, U, I, dtype=dtype), 3)[rows].chunk(3)
        bpr = baselines.bpr_loss((u * i).sum(1), (u * j).sum(1), reduction="sum")
        want = bpr + 1e-4 * (table[rows].square().sum() / 2)
        assert torch.equal(got.loss, want)
        for ours, theirs in zip(
            torch.autograd.grad(got.loss, (user, item)), torch.autograd.grad(want, (user, item)), strict=True
        ):
            assert torch.equal(ours, theirs)

    def test_isolated_nodes_are_finite(self) -> None:
        user, item, edges, _view1, _view2, users, pos, neg = self.inputs()
        nothing = edges[:, :0]
        loss = sgl_loss(user, item, edges, nothing, edges[:, :2], users, pos, neg)
        assert all(bool(part.isfinite()) for part in loss)
        assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(loss.loss, (user, item)))

    def test_half_precision_is_computed_in_float32(self) -> None:
        user, item, *rest = self.inputs()
        halves = [table.detach().bfloat16() for table in (user, item)]
        got = sgl_loss(*halves, *rest)
        want = sgl_loss(*(table.float() for table in halves), *rest)
        assert got.loss.dtype == torch.bfloat16
        assert torch.equal(got.loss, want.loss.bfloat16())

    def test_bpr_sums_by_default(self) -> None:
        pos, neg = randn(5), randn(5, seed=1)
        assert bpr_loss(pos, neg) == baselines.bpr_loss(pos, neg, reduction="sum")
        assert bpr_loss(pos, neg, "mean") == baselines.bpr_loss(pos, neg)


class TestMetrics:
    def test_equal_those_of_the_package(self) -> None:
        user, item, edges = randn(U, DIM), randn(I, DIM, seed=1), some_edges()
        train, test = edges[:, ::2], edges[:, 1::2]
        mask = torch.zeros(U, I, dtype=torch.bool)
        mask[train[0], train[1]] = True
        lists = [test[1][test[0] == u] for u in range(U)]
        got = recall_ndcg_at_k(user @ item.T, mask, lists, k=4)
        want = evaluate_full_ranking(user, item, train, test, ks=(4,))
        assert {f"{name}@4": value for name, value in got.items()} == pytest.approx(want)

    def test_a_known_test_item_is_no_hit_and_ties_go_to_the_lower_id(self) -> None:
        scores, mask = torch.zeros(1, 3), torch.tensor([[1, 0, 0]])
        assert recall_ndcg_at_k(scores, mask, [[0, 1]], k=3)["recall"] == 0.5
        assert recall_ndcg_at_k(scores, mask, [[1]], k=1)["recall"] == 1
        assert recall_ndcg_at_k(scores, mask, [[2]], k=1)["recall"] == 0


# --- model --------------------------------------------------------------------------------------------------------


def planted(seed: int = 0, num_users: int = 60, num_items: int = 40) -> InteractionData:
    """Three groups of users, each with items of its own, and a little noise."""
    chance = torch.where(torch.arange(num_users)[:, None] % 3 == torch.arange(num_items) % 3, 0.5, 0.04)
    chance[-1] = 0  # a user without any pair
    edges = (torch.rand(chance.shape, generator=generator(seed)) < chance).nonzero().T
    held = torch.rand(edges.shape[1], generator=generator(seed + 1)) < 0.3
    return InteractionData(num_users, num_items, train=edges[:, ~held], test=edges[:, held])


def small_model(data: InteractionData, **options: Any) -> SGL:
    return SGL(data.num_users, data.num_items, data.train, embed_dim=8, num_layers=2, seed=0, **options)


class TestModel:
    @pytest.mark.parametrize("aug", ["nd", "ed", "rw"])
    def test_equals_the_loss_of_its_views(self, aug: Any) -> None:
        edges = some_edges()
        model = SGL(U, I, edges, DIM, 3, aug, 0.3, 0.25, 0.4, 0.02, seed=0).double()
        model.refresh_views(generator(7))
        source = generator(7)

        def view() -> Any:
            if aug == "nd":
                return drop_nodes(edges, U, I, 0.3, generator=source)
            if aug == "ed":
                return drop_edges(edges, 0.3, generator=source)
            return random_walk_views(edges, 0.3, 3, generator=source)

        options = {"num_layers": 3, "temperature": 0.25, "ssl_weight": 0.4, "l2_weight": 0.02}
        got = model(*BATCH, NEGATIVE)
        want = sgl_loss(
            *(t.detach() for t in model.backbone.base_embeddings()), edges, view(), view(), *BATCH, NEGATIVE, **options
        )
        torch.testing.assert_close(tuple(got), tuple(want), rtol=1e-6, atol=1e-7)  # weights were rounded to float32

    def test_tables_are_drawn_one_by_one(self) -> None:
        model = SGL(400, 100, torch.tensor([[0], [0]]), seed=0)
        for table in model.backbone.base_embeddings():
            bound = math.sqrt(6 / (len(table) + 64))
            assert bound * 0.99 < float(table.detach().abs().max()) <= bound

    def test_views_come_from_the_seed_and_move_with_the_model(self) -> None:
        data = planted()
        batch = next(iter(BPRSampler(data)))
        one, other = small_model(data), small_model(data)
        assert one(*batch) == other(*batch)  # drawn by the first forward
        before = one(*batch)
        copied = copy.deepcopy(one)
        assert copied(*batch) == before
        torch.testing.assert_close(copied.double()(*batch).loss, before.loss.double())
        one.refresh_views()
        assert one(*batch).ssl != before.ssl
        assert one(*batch).bpr == before.bpr

    def test_replaced_edges_replace_the_views(self) -> None:
        data = planted()
        model = small_model(data)
        model.refresh_views()
        model.replace_edges(data.test)
        fresh = SGL(data.num_users, data.num_items, data.test, 8, 2, seed=0)
        fresh.load_state_dict(model.state_dict())
        batch = next(iter(BPRSampler(data)))
        for each in (model, fresh):
            each.refresh_views(generator(3))
        assert model(*batch) == fresh(*batch)

    def test_without_ssl_training_is_lightgcn_with_bpr_bit_for_bit(self) -> None:
        data = planted()
        model = small_model(data, ssl_weight=0.0, l2_weight=0.01)
        plain = LightGCN(data.num_users, data.num_items, data.train, 8, 2, generator=generator())
        assert torch.equal(*(m.embeddings()[0] for m in (model, plain)))
        fit(model, BPRSampler(data, batch_size=64, seed=3), 3, lr=0.01, select_on="none")
        optimizer = torch.optim.Adam(plain.parameters(), lr=0.01, fused=True)
        sampler = BPRSampler(data, batch_size=64, seed=3)
        for users, pos, neg in (batch for _ in range(3) for batch in sampler):
            rows = torch.cat([users, data.num_users + pos, data.num_users + neg])
            u, i, j = torch.cat(plain.embeddings())[rows].chunk(3)
            base = torch.cat(plain.base_embeddings())[rows]
            loss = baselines.bpr_loss((u * i).sum(1), (u * j).sum(1), reduction="sum")
            optimizer.zero_grad()
            (loss + 0.01 * (base.square().sum() / 2)).backward()
            optimizer.step()
        assert torch.equal(*(torch.cat(m.embeddings()) for m in (model, plain)))

    def test_recommends_what_isnt_known(self) -> None:
        data = planted()
        model = small_model(data)
        users = torch.tensor([4, 0])
        scores, items = model.recommend(users, 40)
        user, item = model.embeddings()
        for row, u in enumerate(users.tolist()):
            known = set(data.train[1][data.train[0] == u].tolist())
            ranked = [i for i in (user[u] @ item.T).argsort(descending=True).tolist() if i not in known]
            assert items[row].tolist() == ranked + [-1] * len(known)
            torch.testing.assert_close(scores[row, : len(ranked)], (item[ranked] @ user[u]).detach())
            assert bool((scores[row, len(ranked) :] == -torch.inf).all())
        assert bool((model.recommend(users, 40, exclude_train=False)[1] >= 0).all())

    def test_is_evaluated_and_saved_by_the_package(self, tmp_path: Path) -> None:
        data = planted()
        model = small_model(data)
        metrics = evaluate(model, data, ks=(5,), metrics=("recall",))  # type: ignore[arg-type]
        save_model(model.backbone, tmp_path / "model.safetensors")
        again = load_model(tmp_path / "model.safetensors", data)
        assert evaluate(again, data, ks=(5,), metrics=("recall",)) == metrics

    def test_shows_its_options(self) -> None:
        assert "aug='ed', ssl_ratio=0.1, temperature=0.2, ssl_weight=0.1" in repr(small_model(planted()))


# --- training -----------------------------------------------------------------------------------------------------


class TestSampler:
    @pytest.mark.parametrize("sampling", ["user", "edge"])
    def test_triples(self, sampling: Any) -> None:
        data = planted()
        sampler = BPRSampler(data, batch_size=50, sampling=sampling, seed=1)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert [len(b.users) for b in batches[:-1]] == [50] * (len(batches) - 1)
        users, pos, neg = (torch.cat(part) for part in zip(*batches, strict=True))
        assert len(users) == data.train.shape[1] == sampler.num_triples
        known = {tuple(pair) for pair in data.train.T.tolist()}
        assert all(pair in known for pair in zip(users.tolist(), pos.tolist(), strict=True))
        assert not any(pair in known for pair in zip(users.tolist(), neg.tolist(), strict=True))
        assert data.num_users - 1 not in users
        if sampling == "edge":
            assert torch.equal(torch.unique(users * 100 + pos), torch.unique(data.train[0] * 100 + data.train[1]))

    def test_users_are_uniform_whatever_their_activity(self) -> None:
        train = torch.tensor([[0] * 9 + [2], [*range(9), 3]])  # user 1 has none
        sampler = BPRSampler(InteractionData(3, 10, train=train, test=train[:, :0]), seed=0)
        drawn = torch.cat([b.users for _ in range(400) for b in sampler])
        assert abs(float((drawn == 0).double().mean()) - 0.5) < 4 * 0.5 / math.sqrt(4000)
        items = torch.cat([b.pos_items for _ in range(400) for b in sampler])
        assert set(items.tolist()) == set(range(9))

    def test_every_epoch_is_new_and_a_seed_determines_them(self) -> None:
        data = planted()
        one, other = (BPRSampler(data, seed=4) for _ in range(2))
        first, second = (torch.cat(next(iter(one))) for _ in range(2))
        assert not torch.equal(first, second)
        assert torch.equal(first, torch.cat(next(iter(other))))

    def test_draws_in_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("recsys_losses.sgl._training._DRAWN_AT_ONCE", 64)
        data = planted()
        for sampling in ("user", "edge"):
            sizes = [len(b.users) for b in BPRSampler(data, batch_size=30, sampling=sampling)]  # type: ignore[arg-type]
            assert sizes[:-1] == [30] * (len(sizes) - 1)
            assert sum(sizes) == data.train.shape[1]


class TestFit:
    def run(self, epochs: int, data: InteractionData | None = None, **options: Any) -> tuple[SGL, Any]:
        data = planted() if data is None else data
        model = small_model(data, aug=options.pop("aug", "ed"))
        sampler = BPRSampler(data, batch_size=64, seed=5)
        return model, fit(model, sampler, epochs, lr=0.02, **{"ks": (5,), "monitor": "recall@5", **options})

    def test_learns_the_groups(self) -> None:
        model, result = self.run(30)
        losses = [record["loss"] for record in result.history]
        assert losses[-1] < 0.9 * losses[0]
        data = planted()
        untrained = evaluate(small_model(data), data, ks=(5,), metrics=("recall",))["recall@5"]  # type: ignore[arg-type]
        trained = evaluate(model, data, ks=(5,), metrics=("recall",))["recall@5"]  # type: ignore[arg-type]
        assert trained > untrained + 0.07

    def test_records_the_parts_per_triple(self) -> None:
        model, result = self.run(1, select_on="none")
        record = result.history[0]
        total = record["bpr"] + model.objective.ssl_weight * record["ssl"] + model.objective.l2_weight * record["l2"]
        assert record["loss"] == pytest.approx(total)
        assert 0.6 < record["bpr"] < 0.7  # log 2 at the start
        assert 0 < record["ssl"] < math.log(60 * 40)  # two sides, each below log of its number of nodes

    def test_mean_records_the_same_scale(self) -> None:
        data = planted()
        sums, means = (
            fit(small_model(data, reduction=r), BPRSampler(data, batch_size=64), 1, lr=1e-9, select_on="none").history[
                0
            ]
            for r in ("sum", "mean")
        )
        assert {k: v for k, v in sums.items() if k != "seconds"} == pytest.approx(
            {k: v for k, v in means.items() if k != "seconds"}, rel=1e-5
        )

    @pytest.mark.parametrize("aug", ["nd", "ed", "rw"])
    def test_a_resumed_run_is_the_run(self, aug: str, tmp_path: Path) -> None:
        whole, expected = self.run(4, aug=aug)
        self.run(2, aug=aug, checkpoint=tmp_path / "c")
        resumed, result = self.run(4, aug=aug, checkpoint=tmp_path / "c")
        assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))
        for ours, theirs in zip(result.history, expected.history, strict=True):
            assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
        assert (result.best_epoch, result.best) == (expected.best_epoch, expected.best)

    def test_another_setting_is_refused(self, tmp_path: Path) -> None:
        self.run(1, checkpoint=tmp_path / "c")
        with pytest.raises(ValueError, match=r"model.aug \(was 'ed', is 'rw'\)"):
            self.run(2, aug="rw", checkpoint=tmp_path / "c")
        self.run(1, aug="rw", checkpoint=tmp_path / "c", resume=False)

    def test_held_out_pairs_are_in_neither_graph_nor_triples(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []
        original = SGL.forward
        monkeypatch.setattr(SGL, "forward", lambda self, *batch: seen.append(batch) or original(self, *batch))
        model, result = self.run(1)
        data = planted()
        held = hold_out_validation(data, generator=generator(5))
        assert torch.equal(model.backbone.edge_index(), torch.unique(held.train, dim=1))
        drawn = torch.stack([torch.cat([b[0] for b in seen]), torch.cat([b[1] for b in seen])])
        assert not torch.isin(drawn[0] * 100 + drawn[1], held.valid[0] * 100 + held.valid[1]).any()
        want = evaluate_full_ranking(*model.embeddings(), held.train, held.valid, ks=(5,))
        assert result.best["recall@5"] == pytest.approx(want["recall@5"])

    def test_given_validation_pairs_select(self) -> None:
        data = hold_out_validation(planted(), share=0.2, generator=generator(1))
        model, result = self.run(6, data=data, eval_every=2)
        assert [("recall@5" in r) for r in result.history] == [False, True] * 3
        assert torch.equal(model.backbone.edge_index(), torch.unique(data.train, dim=1))
        assert result.best["recall@5"] == max(r["recall@5"] for r in result.history if "recall@5" in r)

    def test_selection_on_test_warns(self) -> None:
        with pytest.warns(UserWarning, match="test-set leak"):
            self.run(1, select_on="test")

    def test_stops_early(self) -> None:
        _, result = self.run(50, patience=1)
        assert result.stopped_early
        assert len(result.history) < 50


# --- bad input ----------------------------------------------------------------------------------------------------

EDGES = some_edges()
TABLES = [table.detach() for table in tables()]
LOSS = (TABLES[0], TABLES[2], EDGES, EDGES, EDGES, *BATCH, NEGATIVE)
HIGH = torch.tensor([0, 1, 2, 3, 99])
DATA = planted()

BAD_ARGUMENTS = [
    (lambda: ssl_loss(*TABLES, *BATCH, temperature=0.0), r"temperature must be positive.*got 0\.0"),
    (lambda: sgl_loss(*LOSS, temperature=-1.0), "temperature must be positive"),
    (lambda: ssl_loss(*TABLES, *BATCH, temperature=math.nan), "temperature must be positive"),
    (lambda: SGL(U, I, EDGES, temperature=0), "temperature must be positive"),
    (lambda: ssl_loss(*TABLES, HIGH, BATCH[1]), r"users is out of range: ids 0\.\.99, expected 0\.\.10"),
    (lambda: ssl_loss(*TABLES, BATCH[0], HIGH), r"pos_items is out of range"),
    (lambda: sgl_loss(*LOSS[:-1], HIGH), r"neg_items is out of range"),
    (lambda: sgl_loss(*LOSS[:-1], NEGATIVE - 5), r"neg_items is out of range: ids -5"),
    (lambda: SGL(U, I, EDGES)(HIGH, *BATCH), r"users is out of range"),
    (lambda: SGL(3, I, EDGES), r"edge_index\[0\] is out of range"),
    (lambda: normalized_adjacency(EDGES, U, 3), r"edge_index\[1\] is out of range"),
    (lambda: drop_nodes(EDGES, U, 3, 0.1), "out of range"),
    (lambda: normalized_adjacency(EDGES.float(), U, I), "int64"),
    (lambda: normalized_adjacency(EDGES, U, I, layout="csc"), "unknown layout 'csc'; accepted: coo, csr"),
    (lambda: drop_edges(EDGES, 1.0), r"ratio must be in \[0, 1\), got 1\.0"),
    (lambda: drop_nodes(EDGES, U, I, -0.1), "ratio"),
    (lambda: random_walk_views(EDGES, math.nan, 2), "ratio"),
    (lambda: SGL(U, I, EDGES, ssl_ratio=1.0), "ssl_ratio"),
    (lambda: random_walk_views(EDGES, 0.1, -1), "num_layers"),
    (lambda: sgl_loss(*LOSS[:3], [EDGES], *LOSS[4:], num_layers=3), "view1_edge_index holds 1 views, but num_layers is 3"),
    (lambda: sgl_loss(*LOSS[:4], [EDGES] * 4, *LOSS[5:], num_layers=3), "view2_edge_index holds 4 .* num_layers is 3"),
    (lambda: propagate(torch.ones(U + I, 2), [], 1), "num_layers is 1"),
    (lambda: propagate(torch.ones(3, 2), normalized_adjacency(EDGES, U, I), 1), r"got \(3, 2\) and \(20, 20\)"),
    (lambda: propagate(torch.ones(U + I, 2), normalized_adjacency(EDGES, U, I, dtype=F64), 1), "float32"),
    (lambda: propagate(torch.ones(U + I, 2), normalized_adjacency(EDGES, U, I), -1), "num_layers must be >= 0"),
    (lambda: sgl_loss(*LOSS, mode="both"), "unknown mode 'both'; accepted: both_side, item_side, merge, user_side"),
    (lambda: ssl_loss(*TABLES, *BATCH, negatives="some"), "unknown negatives 'some'; accepted: all, batch"),
    (lambda: ssl_loss(*TABLES, *BATCH, reduction="none"), "unknown reduction 'none'; accepted: mean, sum"),
    (lambda: SGL(U, I, EDGES, aug="rv"), "unknown aug 'rv'; accepted: ed, nd, rw"),
    (lambda: ssl_loss(*TABLES, *BATCH, mode="merge"), "merge uses batch negatives"),
    (lambda: SGL(U, I, EDGES, mode="merge"), "merge uses batch negatives"),
    (lambda: ssl_loss(*TABLES, *BATCH, chunk_size=0), "chunk_size must be >= 1"),
    (lambda: SGL(U, I, EDGES, ssl_weight=-1), "ssl_weight"),
    (lambda: sgl_loss(*LOSS, l2_weight=math.inf), "l2_weight"),
    (lambda: ssl_loss(TABLES[0], TABLES[2], *TABLES[2:], *BATCH), r"user_view1 and user_view2 .*\(11, 4\) and \(9, 4\)"),
    (lambda: ssl_loss(*TABLES, BATCH[0], BATCH[1][:3]), r"pos_items must be int64 \(B,\).*\(3,\)"),
    (lambda: ssl_loss(*TABLES, BATCH[0][:0], BATCH[1][:0]), "B >= 1"),
    (lambda: ssl_loss(*TABLES, BATCH[0].int(), BATCH[1]), "users must be int64"),
    (lambda: recall_ndcg_at_k(torch.ones(1, 3), torch.zeros(1, 3), [[0]], k=4), r"k must be in 1\.\.3"),
    (lambda: recall_ndcg_at_k(torch.ones(1, 3), torch.zeros(1, 3), [[3]], k=1), "out of range"),
    (lambda: recall_ndcg_at_k(torch.ones(1, 3), torch.zeros(1, 3), [[]], k=1), "empty for every user"),
    (lambda: recall_ndcg_at_k(torch.ones(1, 3), torch.zeros(3), [[1]], k=1), r"train_mask \(U, I\)"),
    (lambda: BPRSampler(DATA, batch_size=0), "batch_size"),
    (lambda: BPRSampler(DATA, sampling="item"), "unknown sampling 'item'; accepted: edge, user"),
    (lambda: BPRSampler(dataclasses.replace(DATA, train=DATA.train[:, :0])), "data.train is empty"),
    (
        lambda: BPRSampler(InteractionData(1, 1, train=torch.zeros(2, 1).long(), test=torch.zeros(2, 1).long())),
        "user 0 has interacted with all items",
    ),
    (lambda: fit(SGL(U, I, EDGES), BPRSampler(DATA), 1), "the model has 11 users and 9 items"),
    (lambda: fit(small_model(DATA), BPRSampler(DATA), 0), "epochs must be >= 1"),
    (lambda: fit(small_model(DATA), BPRSampler(DATA), 1, lr=0), "lr must be"),
    (lambda: fit(small_model(DATA), BPRSampler(DATA), 1, monitor="recall@10"), "needs its cut-off among ks"),
    (lambda: fit(small_model(DATA), BPRSampler(DATA), 1, monitor="recal@20"), "did you mean 'recall'"),
    (lambda: fit(small_model(DATA), BPRSampler(DATA), 1, ks=(41,)), r"k must be in 1\.\.40"),
    (lambda: fit(small_model(DATA), BPRSampler(DATA), 1, select_on="train"), "unknown select_on"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), BAD_ARGUMENTS, ids=range(len(BAD_ARGUMENTS)))
def test_bad_arguments(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_too_large_a_step_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="loss of epoch"):
        fit(small_model(DATA), BPRSampler(DATA), 3, lr=1e30, select_on="none")


# --- real data ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_lastfm_sgl_learns_faster_and_reaches_the_tail(data_root: Path) -> None:
    """Card, section 11.9: at epoch 15, 3 seeds, at least half of +0.02 recall and +0.03 recall from tail items."""
    data = dataclasses.replace(load_dataset("lastfm", data_root), valid=None)

    def run(seed: int, weight: float) -> tuple[float, float]:
        model = SGL(data.num_users, data.num_items, data.train, num_layers=2, ssl_weight=weight, seed=seed)
        fit(model, BPRSampler(data, seed=seed), 15, lr=1e-2, select_on="none")
        with torch.no_grad():
            groups = item_group_recall(*model.embeddings(), data.train, data.test)
        return float(groups.sum()), float(groups[:8].sum())

    gains = [[ours - base for ours, base in zip(run(seed, 0.1), run(seed, 0.0), strict=True)] for seed in range(3)]
    assert all(gain > 0 for pair in gains for gain in pair)
    recall, tail = (sum(column) / 3 for column in zip(*gains, strict=True))
    assert recall > 0.01
    assert tail > 0.015
