"""CPR: the loss, its module and the sampler of cycles."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from ballast_testing.losses import check_loss
from recsys_losses import cpr
from recsys_losses.cpr import CPRLoss, CPRSampler, cpr_batch_sizes, cpr_loss, cpr_scores, filter_cpr_candidates


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_edges(num_users=40, num_items=50, share=0.1, seed=0):
    return (torch.rand(num_users, num_items, generator=torch.Generator().manual_seed(seed)) < share).nonzero().T


def random_batch(num_users=9, num_items=11, sizes=(5, 4), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        k: (
            torch.randint(num_users, (k, n), generator=generator),
            torch.randint(num_items, (k, n), generator=generator),
        )
        for k, n in enumerate(sizes, start=2)
    }


def reference_loss(pos, neg, *, keep=None, reduction="mean"):
    margin = sorted(float(p - n) for p, n in zip(pos, neg, strict=True))
    if keep is None:
        margin = [float(p - n) for p, n in zip(pos, neg, strict=True)]
    rows = np.array([math.log1p(math.exp(-m)) for m in margin[: keep or len(margin)]])
    return rows if reduction == "none" else getattr(rows, reduction)()


# --- loss and scores ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [None, 1, 4, 8])
def test_loss_battery(keep):
    check_loss(cpr_loss, [normal(9), normal(9, seed=1)], {"keep": keep}, reference_loss)


def test_loss_is_log_two_for_equal_scores():
    assert cpr_loss(torch.ones(3), torch.ones(3)).item() == pytest.approx(math.log(2), rel=1e-6)


@settings(derandomize=True, deadline=None)
@given(st.lists(st.floats(-30, 30), min_size=2, max_size=12))
def test_keeping_more_never_raises_the_loss(values):
    pos = torch.tensor(values, dtype=torch.float64)
    neg = pos.flip(0) / 3
    by_keep = [cpr_loss(pos, neg, keep=keep).item() for keep in range(1, len(values) + 1)]
    assert by_keep[0] == cpr_loss(pos, neg, reduction="none").max().item()
    assert by_keep[-1] == pytest.approx(cpr_loss(pos, neg).item(), rel=1e-12)
    assert all(a >= b * (1 - 1e-12) for a, b in itertools.pairwise(by_keep))


def test_only_the_kept_samples_get_a_gradient():
    pos, neg = normal(6).requires_grad_(), normal(6, seed=1).requires_grad_()
    cpr_loss(pos, neg, keep=2).backward()
    margin = (pos - neg).detach()
    kept = margin.argsort()[:2]
    want = torch.zeros(6, dtype=torch.float64)
    want[kept] = -torch.sigmoid(-margin[kept]) / 2
    torch.testing.assert_close(pos.grad, want)
    torch.testing.assert_close(neg.grad, -want)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_scores_equal_the_definition(k):
    user, item = normal(k, 4, 3), normal(k, 4, 3, seed=1)
    pos, neg = cpr_scores(user, item)
    for n in range(4):
        same = sum(float(user[j, n] @ item[j, n]) for j in range(k)) / k
        crossed = sum(float(user[j, n] @ item[(j + 1) % k, n]) for j in range(k)) / k
        assert pos[n].item() == pytest.approx(same, rel=1e-12)
        assert neg[n].item() == pytest.approx(crossed, rel=1e-12)
    half = cpr_scores(user.bfloat16(), item.bfloat16())
    assert half[0].dtype == half[1].dtype == torch.bfloat16
    torch.testing.assert_close(half[0].double(), pos, rtol=5e-2, atol=5e-2)


def test_two_pairs_see_differences_only():
    user, item = normal(2, 7, 3), normal(2, 7, 3, seed=1)
    margin = ((user[0] - user[1]) * (item[0] - item[1])).sum(1) / 2
    got = cpr_loss(*cpr_scores(user, item), reduction="none")
    torch.testing.assert_close(got, F.softplus(-margin), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cpr_loss(torch.zeros(3), torch.zeros(4)), r"expected pos_score \(S,\) and neg_score \(S,\)"),
        (lambda: cpr_loss(torch.zeros(3, 1), torch.zeros(3, 1)), r"expected pos_score \(S,\)"),
        (lambda: cpr_loss(torch.zeros(0), torch.zeros(0)), "with S >= 1"),
        (lambda: cpr_loss(torch.zeros(3), torch.zeros(3), keep=4), "keep=4 exceeds the number of samples 3"),
        (lambda: cpr_loss(torch.zeros(3), torch.zeros(3), keep=0), "keep must be >= 1, got 0"),
        (lambda: cpr_loss(torch.zeros(3), torch.zeros(3), reduction="max"), "unknown reduction 'max'"),
        (lambda: cpr_scores(torch.zeros(1, 3, 2), torch.zeros(1, 3, 2)), "a cycle needs k >= 2 pairs, got k=1"),
        (lambda: cpr_scores(torch.zeros(2, 3, 2), torch.zeros(2, 3, 3)), r"expected user_emb and item_emb \(k, n, d\)"),
        (lambda: cpr_scores(torch.zeros(2, 3), torch.zeros(2, 3)), r"got \(2, 3\) and \(2, 3\)"),
    ],
)
def test_loss_and_scores_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- the module -----------------------------------------------------------------------------------------------------


def all_scores(batch, user_emb, item_emb):
    pairs = [cpr_scores(user_emb[users], item_emb[items]) for users, items in batch.values()]
    return tuple(torch.cat(parts) for parts in zip(*pairs, strict=True))


@pytest.mark.parametrize("keep", [None, 1, 6, 12])
@pytest.mark.parametrize("sizes", [(12,), (5, 7), (4, 3, 5)])
def test_module_equals_the_loss_of_all_scores(keep, sizes):
    batch = random_batch(sizes=sizes)
    tables = normal(9, 4).requires_grad_(), normal(11, 4, seed=1).requires_grad_()
    got = CPRLoss(keep)(batch, *tables)
    got_grad = torch.autograd.grad(got, tables)
    want = cpr_loss(*all_scores(batch, *tables), keep=keep)
    want_grad = torch.autograd.grad(want, tables)
    assert got.item() == pytest.approx(want.item(), rel=1e-12)
    for a, b in zip(got_grad, want_grad, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_module_keeps_the_graph_of_the_kept_samples_only():
    batch = random_batch(num_users=400, num_items=400, sizes=(300, 300))
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: stored.append(x.numel()) or x, lambda x: x):
        CPRLoss(keep=10)(batch, normal(400, 4).requires_grad_(), normal(400, 4).requires_grad_())
    # Vectors of 10 samples, not of 600.
    assert 0 < max(stored) <= 3 * 10 * 4


def test_module_accepts_any_score():
    batch = random_batch(sizes=(5, 7))
    user_emb, item_emb = normal(9, 4), normal(11, 4, seed=1)
    head = torch.nn.Linear(4, 1, dtype=torch.float64)
    with torch.no_grad():
        head.weight.fill_(0.7)

    def score(user, item):
        return head(user * item).squeeze(-1)

    got = CPRLoss(keep=6)(batch, user_emb, item_emb, score)
    got.backward()
    # The head is a dot product times 0.7, plus a bias that cancels.
    want = cpr_loss(*all_scores(batch, 0.7 * user_emb, item_emb), keep=6)
    assert got.item() == pytest.approx(want.item(), rel=1e-12)
    assert head.weight.grad.abs().min() > 0
    assert head.bias.grad.abs().item() < 1e-15


@pytest.mark.parametrize("keep", [None, 6])
def test_additive_user_and_item_terms_change_nothing(keep):
    batch = random_batch(sizes=(5, 7))
    tables = normal(9, 4).requires_grad_(), normal(11, 4, seed=1).requires_grad_()
    bias_u, bias_i = (5 * normal(9, 1, seed=2)).requires_grad_(), (5 * normal(11, 1, seed=3)).requires_grad_()

    def biased(user, item):
        return (user[..., :4] * item[..., :4]).sum(-1) + user[..., 4] + item[..., 4]

    plain = CPRLoss(keep)(batch, *tables)
    with_bias = CPRLoss(keep)(batch, torch.cat([tables[0], bias_u], 1), torch.cat([tables[1], bias_i], 1), biased)
    assert with_bias.item() == pytest.approx(plain.item(), rel=1e-12)
    plain_grad = torch.autograd.grad(plain, tables)
    *grads, grad_u, grad_i = torch.autograd.grad(with_bias, (*tables, bias_u, bias_i))
    for a, b in zip(grads, plain_grad, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)
    assert grad_u.abs().max() < 1e-15
    assert grad_i.abs().max() < 1e-15


def test_module_does_not_wait_for_the_device_and_keeps_the_dtype():
    # On the meta device every read of a value raises.
    batch = {k: (users.to("meta"), items.to("meta")) for k, (users, items) in random_batch(sizes=(5, 7)).items()}
    tables = torch.zeros(9, 4, device="meta").requires_grad_(), torch.zeros(11, 4, device="meta").requires_grad_()
    CPRLoss(keep=6)(batch, *tables).backward()
    tables = normal(9, 4), normal(11, 4, seed=1)
    exact = CPRLoss(keep=6)(random_batch(), *tables)
    half = CPRLoss(keep=6)(random_batch(), *(table.bfloat16() for table in tables))
    assert half.dtype == torch.bfloat16
    assert half.item() == pytest.approx(exact.item(), rel=5e-2)


def test_module_refuses():
    table = torch.zeros(9, 2)
    with pytest.raises(ValueError, match="keep must be >= 1, got 0"):
        CPRLoss(0)
    with pytest.raises(ValueError, match="keep=10 exceeds the number of samples 9"):
        CPRLoss(10)(random_batch(9, 9), table, table)
    with pytest.raises(ValueError, match="batch holds no samples"):
        CPRLoss()({}, table, table)
    users = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"k=3: expected users and items \(3, n\), got \(2, 3\)"):
        CPRLoss()({3: (users, users)}, table, table)
    with pytest.raises(ValueError, match="a cycle needs k >= 2"):
        CPRLoss()({1: (users[:1], users[:1])}, table, table)


# --- sizes and candidates -------------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None)
@given(st.integers(10, 5000), st.floats(1, 9), st.integers(2, 5))
def test_batch_sizes_add_up_and_fall(batch_size, ratio, max_k):
    sizes = cpr_batch_sizes(batch_size, ratio, max_k)
    assert len(sizes) == max_k - 1
    assert sum(sizes) == batch_size
    assert all(a >= b - max_k for a, b in itertools.pairwise(sizes))
    assert cpr_batch_sizes(batch_size, ratio, max_k, 2.5) == [math.ceil(2.5 * size) for size in sizes]


def test_batch_sizes_may_skip_a_k():
    assert cpr_batch_sizes(1, 3.0, 3) == [1, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"sample_ratio": 0.0}, "sample_ratio must be a positive finite number"),
        ({"sample_ratio": math.nan}, "sample_ratio must be a positive finite number"),
        ({"max_k": 1}, "max_k must be >= 2, got 1"),
        ({"sample_rate": 0.5}, "sample_rate must be a finite number >= 1, got 0.5"),
        ({"fixed_k": 4}, r"fixed_k must be in \[2, max_k=3\], got 4"),
        ({"fixed_k": 1}, r"fixed_k must be in \[2, max_k=3\]"),
        ({"batch_size": 3, "sample_ratio": 1.0, "max_k": 6}, "batch_size=3 is too small for max_k=6"),
    ],
)
def test_batch_sizes_refuse(change, message):
    with pytest.raises(ValueError, match=message):
        cpr_batch_sizes(**{"batch_size": 10, **change})


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("num_samples", [1, 7, 10_000])
def test_filter_is_a_scan_in_order(k, num_samples):
    edges = random_edges(12, 14, share=0.25)
    candidates = torch.randint(edges.shape[1], (k, 300), generator=torch.Generator().manual_seed(1))
    observed = {(int(u), int(i)) for u, i in edges.T}
    users, items = [], []
    for c in range(300):
        cycle = [(int(edges[0, e]), int(edges[1, e])) for e in candidates[:, c]]
        if all((cycle[j][0], cycle[(j + 1) % k][1]) not in observed for j in range(k)) and len(users) < num_samples:
            users.append([u for u, _ in cycle])
            items.append([i for _, i in cycle])
    got_users, got_items = filter_cpr_candidates(edges, candidates, num_samples=num_samples)
    assert len(users) > 0
    assert got_users.T.tolist() == users
    assert got_items.T.tolist() == items


def test_filter_accepts_nothing_and_takes_no_candidates():
    edges = torch.tensor([[0, 0], [0, 1]])
    users, items = filter_cpr_candidates(edges, torch.tensor([[0, 1, 0], [1, 0, 0]]), num_samples=2)
    assert users.shape == items.shape == (2, 0)
    users, _ = filter_cpr_candidates(edges, torch.zeros(3, 0, dtype=torch.int64), num_samples=2)
    assert users.shape == (3, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edge_index": torch.zeros(3, 2, dtype=torch.int64)}, "edge_index must be an int64 tensor"),
        ({"candidates": torch.zeros(2, 3)}, r"candidates must be int64 \(k, C\)"),
        ({"candidates": torch.zeros(1, 3, dtype=torch.int64)}, "a cycle needs k >= 2"),
        ({"candidates": torch.tensor([[0], [2]])}, r"candidates must be in \[0, E=2\), got numbers from 0 to 2"),
        ({"candidates": torch.tensor([[0], [-1]])}, r"candidates must be in \[0, E=2\)"),
        ({"num_samples": 0}, "num_samples must be >= 1, got 0"),
    ],
)
def test_filter_refuses(change, message):
    good = {
        "edge_index": torch.tensor([[0, 1], [0, 1]]),
        "candidates": torch.tensor([[0], [1]]),
        "num_samples": 1,
    }
    with pytest.raises(ValueError, match=message):
        filter_cpr_candidates(**{**good, **change})


# --- the sampler ----------------------------------------------------------------------------------------------------


def sampler(edges, *, seed=0, num_users=40, num_items=50, **changes):
    generator = torch.Generator().manual_seed(seed)
    return CPRSampler(edges, num_users, num_items, generator=generator, **changes)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.4])
@pytest.mark.parametrize("block", [1, 500, 1 << 18])
def test_sampler_yields_cycles_of_the_right_number(monkeypatch, share, block):
    monkeypatch.setattr(cpr, "_BLOCK_EDGES", block)
    edges = random_edges(share=share)
    drawn = sampler(edges, batch_size=16, max_k=4, sample_rate=1.5)
    sizes = dict(enumerate(cpr_batch_sizes(16, 3.0, 4, 1.5), start=2))
    observed = torch.zeros(40, 50, dtype=torch.bool)
    observed[edges[0], edges[1]] = True
    batches = list(drawn)
    assert len(batches) == len(drawn) == edges.shape[1] // 16
    for batch in batches:
        assert {k: users.shape for k, (users, _) in batch.items()} == {k: (k, n) for k, n in sizes.items()}
        for users, items in batch.values():
            following = items.roll(-1, 0)
            assert observed[users, items].all()
            assert not observed[users, following].any()
            assert (users != users.roll(-1, 0)).all()
            assert (items != following).all()
    assert any(not torch.equal(batches[0][2][0], batch[2][0]) for batch in batches[1:])


def test_sampler_is_determined_by_its_generator(monkeypatch):
    monkeypatch.setattr(cpr, "_BLOCK_EDGES", 2000)  # several blocks, so that acceptance rates are learnt on the way
    edges = random_edges(share=0.3)
    first = sampler(edges, batch_size=32)
    state = first.generator.get_state()
    one, two = list(first), list(first)
    first.generator.set_state(state)
    again = list(first)
    fresh = list(sampler(edges, batch_size=32))
    for a, b, c in zip(one, again, fresh, strict=True):
        for k in a:
            assert torch.equal(a[k][0], b[k][0])
            assert torch.equal(a[k][1], c[k][1])
    assert not torch.equal(one[0][2][0], two[0][2][0])


@pytest.mark.parametrize("k", [2, 3])
def test_accepted_cycles_are_uniform_among_the_acceptable_ones(k, monkeypatch):
    stats = pytest.importorskip("scipy.stats")
    edges = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 3], [0, 1, 2, 0, 3, 3, 4, 5]])
    observed = {tuple(pair) for pair in edges.T.tolist()}
    acceptable = {
        cycle
        for cycle in itertools.product(range(8), repeat=k)
        if all((int(edges[0, a]), int(edges[1, b])) not in observed for a, b in zip(cycle, cycle[1:] + cycle[:1]))  # noqa: B905
    }
    assert (
        10 < len(acceptable) < 8**k * 0.7
    )  # so the official 2 n candidates wouldn't be far off, but rejection matters
    monkeypatch.setattr(cpr, "_BLOCK_EDGES", 3000)
    drawn = sampler(edges, num_users=4, num_items=6, batch_size=1, fixed_k=k, sample_rate=500.0)
    number = {pair: e for e, pair in enumerate(map(tuple, edges.T.tolist()))}
    counts = dict.fromkeys(acceptable, 0)
    first = torch.zeros(8)
    for batch in itertools.chain(*(drawn for _ in range(8))):
        users, items = (x.T.tolist() for x in batch[k])
        for u, i in zip(users, items, strict=True):
            cycle = tuple(number[pair] for pair in zip(u, i, strict=True))
            counts[cycle] += 1
            first[cycle[0]] += 1
    total = 8 * 8 * 500
    assert sum(counts.values()) == total
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3
    expected = torch.tensor([sum(cycle[0] == e for cycle in acceptable) for e in range(8)]).double()
    seen = expected > 0
    expected = expected / expected.sum() * total
    assert first[~seen].sum() == 0
    assert stats.chisquare(first[seen].double().numpy(), expected[seen].numpy()).pvalue > 1e-3


@pytest.mark.parametrize(
    ("edges", "what"),
    [
        (torch.stack([torch.zeros(60, dtype=torch.int64), torch.arange(60) % 50]), "one user"),
        (torch.cartesian_prod(torch.arange(10), torch.arange(12)).T, "complete bipartite"),
    ],
)
@pytest.mark.filterwarnings("ignore:edge_index. .*duplicate")
def test_sampler_gives_up_where_there_are_no_cycles(edges, what):
    drawn = sampler(edges, batch_size=8)
    with pytest.raises(RuntimeError, match=r"k=2: only 0 of \d+ cycles found in 20 rounds.*rate 0\.0000.*lower max_k"):
        next(iter(drawn))


def test_sampler_names_the_k_that_fails():
    # Two users with one own item each: cycles of two, but none of three, whose users would all have to differ.
    edges = torch.stack([torch.arange(2), torch.arange(2)])
    drawn = sampler(edges, num_users=2, num_items=2, batch_size=1, fixed_k=3, max_rounds=3)
    with pytest.raises(RuntimeError, match="k=3: only 0 of 6 cycles found in 3 rounds"):
        next(iter(drawn))
    assert len(list(sampler(edges, num_users=2, num_items=2, batch_size=1, fixed_k=2))) == 2


def test_sampler_redraws_where_few_candidates_pass():
    # 3 of 4 pairs observed: the official budget of two candidates per sample is far too small.
    edges = random_edges(share=0.75)
    drawn = sampler(edges, batch_size=64, max_k=3, max_rounds=200)
    users, items = next(iter(drawn))[3]
    assert users.shape == items.shape == (3, 48)


def test_sampler_removes_duplicates_with_a_warning():
    edges = random_edges()
    doubled = torch.cat([edges, edges[:, :7]], dim=1)
    with pytest.warns(UserWarning, match="edge_index: 7 duplicate pairs removed") as caught:
        once = CPRSampler(doubled, 40, 50, batch_size=16, generator=torch.Generator().manual_seed(0))
    assert caught[0].filename == __file__
    assert torch.equal(once.edge_index, edges)


def test_sampler_skips_a_k_without_samples_and_feeds_a_data_loader():
    drawn = sampler(random_edges(), batch_size=1, sample_rate=4.0)
    batches = list(DataLoader(drawn, batch_size=None))
    assert len(batches) == len(drawn)
    assert list(batches[0]) == [2]
    assert batches[0][2][0].shape == (2, 4)


def test_sampler_without_a_generator_follows_the_default_one():
    edges = random_edges()
    state = torch.random.get_rng_state()
    first = next(iter(CPRSampler(edges, 40, 50, batch_size=16)))
    torch.random.set_rng_state(state)
    again = next(iter(CPRSampler(edges, 40, 50, batch_size=16)))
    assert torch.equal(first[2][0], again[2][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edge_index": torch.zeros(2, 3)}, "edge_index must be an int64 tensor"),
        ({"num_users": 4}, "num_users=4"),
        ({"num_items": 4}, "num_items=4"),
        ({"batch_size": 7}, "batch_size=7 exceeds the number of distinct edges 6"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"sample_rate": 0.9}, "sample_rate must be a finite number >= 1"),
        ({"fixed_k": 5}, "fixed_k must be in"),
        ({"max_rounds": 0}, "max_rounds must be >= 1, got 0"),
        ({"edge_index": torch.zeros(2, 0, dtype=torch.int64)}, "exceeds the number of distinct edges 0"),
    ],
)
def test_sampler_refuses(change, message):
    good = {"edge_index": torch.arange(6).repeat(2, 1), "num_users": 6, "num_items": 6, "batch_size": 2}
    with pytest.raises(ValueError, match=message):
        CPRSampler(**{**good, **change})


# --- what it is for -------------------------------------------------------------------------------------------------


def biased_world(seed):
    """Relevance with three directions of taste, and one click per pair under exposure p_u p_i with p_i from 0.02 to 1."""
    generator = torch.Generator().manual_seed(seed)
    taste, kind = torch.randn(300, 3, generator=generator), torch.randn(150, 3, generator=generator)
    relevance = torch.sigmoid(4 * taste @ kind.T / math.sqrt(3) - 1)
    p_item = 0.02 ** torch.rand(150, generator=generator)
    p_user = 0.7 + 0.3 * torch.rand(300, generator=generator)
    clicked = torch.rand(300, 150, generator=generator) < p_user[:, None] * p_item * relevance
    return relevance, p_item, clicked.nonzero().T


def train(method, edges, *, decay, seed=0, epochs=20, batch_size=256, dim=8):
    """Train MF with dot products; both methods share everything but batches and loss."""
    generator = torch.Generator().manual_seed(seed)
    user, item = ((torch.rand(n, dim, generator=generator) * 0.2 - 0.1).requires_grad_() for n in (300, 150))
    optimizer = torch.optim.Adam([user, item], lr=0.01)
    cycles = CPRSampler(edges, 300, 150, batch_size=batch_size, generator=generator)
    loss_of = CPRLoss(keep=batch_size)

    def losses():
        if method == "cpr":
            for batch in cycles:
                yield loss_of(batch, user, item)
            return
        for part in torch.randperm(edges.shape[1], generator=generator).split(batch_size):
            u, i = edges[:, part]
            j = torch.randint(150, (len(part),), generator=generator)
            vector = F.embedding(u, user)
            yield F.softplus((vector * (F.embedding(j, item) - F.embedding(i, item))).sum(1)).mean()

    for _ in range(epochs):
        for loss in losses():
            optimizer.zero_grad()
            (loss + decay * torch.cat([user, item]).square().sum(1).mean()).backward()
            optimizer.step()
    return (user @ item.T).detach()


def spearman(a, b):
    ranks = [x.argsort(-1).argsort(-1).double() for x in (a, b)]
    a, b = (x - x.mean(-1, keepdim=True) for x in ranks)
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def test_cpr_recovers_preferences_from_biased_clicks_better_than_bpr():
    """Baseline: BPR at the better of two weight decays, chosen on the truth; CPR has one setting.

    Measured on five seeds: rank correlation with the relevance within users 0.60 to 0.64 against 0.36 to 0.48, of the
    mean score of an item with its exposure -0.15 to -0.01 against 0.94 to 0.96.
    """
    relevance, p_item, edges = biased_world(seed=0)
    bpr = max(
        (train("bpr", edges, decay=decay) for decay in (0.03, 0.1)), key=lambda s: spearman(s, relevance).mean().item()
    )
    ours = train("cpr", edges, decay=0.1)
    assert spearman(ours, relevance).mean() > spearman(bpr, relevance).mean() + 0.12
    popularity_bpr = spearman(bpr.mean(0), p_item)
    assert popularity_bpr > 0.8
    assert spearman(ours.mean(0), p_item).abs() < popularity_bpr - 0.5
