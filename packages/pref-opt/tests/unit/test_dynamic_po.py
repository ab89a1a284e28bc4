from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ballast_testing.losses import check_loss
from pref_opt.baselines import dmpo_loss, dpo_loss, mppo_loss, sdpo_loss
from pref_opt.dynamic_po import (
    DynamicPOLoss,
    boundary_mask,
    dual_margin_beta,
    dynamic_po_loss,
    optimal_kmeans_1d,
)
from pref_opt.losses import Logps, LossContext, make_loss

F64 = torch.float64


def _rng(*shape: int, seed: int = 0, loc: float = 0.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64) + loc


def _cost(row, labels):
    return sum(((row[labels == label] - row[labels == label].mean()) ** 2).sum() for label in np.unique(labels))


# --- clusters ----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(-4, 4), min_size=1, max_size=5),
    st.integers(1, 3),
)
@settings(deadline=None, max_examples=40)
def test_kmeans_is_optimal(values, clusters):
    row = np.array(values, dtype=float)
    labels = optimal_kmeans_1d(torch.tensor([values], dtype=F64), clusters)[0].numpy()
    assert len(np.unique(labels)) == min(clusters, len(set(values)))
    best = min(_cost(row, np.array(other)) for other in itertools.product(range(clusters), repeat=len(values)))
    assert _cost(row, labels) == pytest.approx(best, abs=1e-12)
    means = [row[labels == label].mean() for label in range(labels.max() + 1)]
    assert means == sorted(set(means))  # every label is used, in the order of the means
    assert all(len(set(labels[row == value])) == 1 for value in row)


def test_kmeans_never_costs_more_than_scikit_learn():
    from sklearn.cluster import KMeans

    rows = _rng(50, 15).numpy()
    ours = optimal_kmeans_1d(torch.from_numpy(rows), 3).numpy()
    worse = 0
    for row, labels in zip(rows, ours, strict=True):
        fitted = KMeans(3, n_init=1, random_state=42).fit(row[:, None])
        assert _cost(row, labels) <= fitted.inertia_ + 1e-12
        worse += _cost(row, labels) < fitted.inertia_ - 1e-9
    assert worse > 5  # k-means with one start often misses the optimum


def test_kmeans_of_a_batch_is_that_of_its_rows():
    values = _rng(64, 19).float()
    together = optimal_kmeans_1d(values, 3)
    apart = torch.cat([optimal_kmeans_1d(row[None], 3) for row in values])
    assert torch.equal(together, apart)


def test_kmeans_of_tiny_differences():
    values = torch.tensor([[-300.0, -300.0 + 1e-4, -299.0, -299.0 + 1e-4]])
    assert optimal_kmeans_1d(values, 2).tolist() == [[0, 0, 1, 1]]


def test_ties_give_the_longest_top_cluster():
    assert optimal_kmeans_1d(torch.tensor([[0.0, 1.0, 2.0]]), 2).tolist() == [[0, 1, 1]]


# --- boundary ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clustering", ["exact", "sklearn"])
def test_violations_are_the_boundary_and_otherwise_the_top_cluster(clustering):
    chosen = torch.tensor([-5.0, -5.0, -5.0])
    rejected = torch.tensor(
        [
            [-5.0, -4.0, -5.1, -20.0],  # equal counts as a violation; the near miss doesn't
            [-6.0, -12.0, -6.2, -20.0],
            [-7.0, -7.0, -7.0, -7.0],
        ]
    )
    expected = [[True, True, False, False], [True, False, True, False], [True, True, True, True]]
    assert boundary_mask(chosen, rejected, clustering=clustering).tolist() == expected


@given(st.integers(1, 4), st.sampled_from([1, 2, 3, 19]), st.integers(1, 5), st.integers(0, 10**6))
@settings(deadline=None, max_examples=25)
def test_every_row_has_a_boundary_and_betas_in_range(batch, num, clusters, seed):
    chosen, rejected = _rng(batch, seed=seed), _rng(batch, num, seed=seed + 1, loc=-0.5) * 3
    mask = boundary_mask(chosen, rejected, num_clusters=clusters)
    assert mask.any(1).all()
    betas = dual_margin_beta(chosen, rejected, mask, beta=2.0, margin=1.0)
    assert ((betas[mask] >= 1.0) & (betas[mask] <= 3.0)).all()
    assert (betas[~mask] == 0).all()


def test_an_easy_negative_leaves_the_boundary_alone():
    chosen, rejected = torch.tensor([-5.0]), torch.tensor([[-6.0, -6.1, -12.0, -12.1, -20.0]])
    before = boundary_mask(chosen, rejected)
    after = boundary_mask(chosen, torch.cat([rejected, torch.tensor([[-60.0]])], 1), num_clusters=4)
    assert after.tolist() == [[*before[0].tolist(), False]]


def test_beta_by_hand():
    chosen, rejected = torch.tensor([-2.0], dtype=F64), torch.tensor([[-6.0, -5.0, -9.0, -11.0]], dtype=F64)
    mask = torch.tensor([[True, True, False, False]])
    betas = dual_margin_beta(chosen, rejected, mask, beta=2.0, margin=1.0)
    # d = -10: p = 4, q = 4 and p = 3, q = 5
    expected = [2 * (1 + 0.5 * math.tanh(-1 / 8)), 2 * (1 + 0.5 * math.tanh(-3 / 8)), 0, 0]
    torch.testing.assert_close(betas, torch.tensor([expected], dtype=F64))


def test_beta_of_equal_log_probabilities():
    same, all_same, mask = torch.tensor([-3.0]), torch.full((1, 2), -3.0), torch.ones(1, 2, dtype=torch.bool)
    assert dual_margin_beta(same, all_same, mask, margin=6.0).tolist() == [[0.5, 0.5]]
    assert dual_margin_beta(same, all_same, mask, margin=0.0).tolist() == [[1.0, 1.0]]


def test_a_margin_of_minus_infinity_is_one_and_a_half_betas():
    chosen, rejected = _rng(3), _rng(3, 5, loc=-4)
    mask = boundary_mask(chosen, rejected)
    assert (dual_margin_beta(chosen, rejected, mask, margin=-1e9)[mask] == 1.5).all()


# --- loss --------------------------------------------------------------------------------------------------------------


def _loop(c, n, c_ref=None, n_ref=None, *, base, beta=1.0, margin=6.0, reduction="mean"):
    """One row at a time; the boundary is the violations, or the best of all partitions of the sorted negatives."""
    losses = []
    for i in range(len(c)):
        size = n.shape[1]
        kept = [j for j in range(size) if n[i, j] >= c[i]]
        if not kept:
            order = np.argsort(n[i])
            cuts = [cut for r in range(3) for cut in itertools.combinations(range(1, size), r)]
            parts = [np.split(order, cut) for cut in cuts]
            best = min(parts, key=lambda part: sum(((n[i, p] - n[i, p].mean()) ** 2).sum() for p in part))
            kept = list(best[-1])
        easy = [j for j in range(size) if j not in kept] or kept
        d = np.mean(n[i, easy])
        terms, weights = [], []
        for j in kept:
            p, q = c[i] - n[i, j], n[i, j] - d
            weights.append(beta * (1 + 0.5 * math.tanh((p - q - margin) / (abs(p) + abs(q)))))
            if base == "mppo":
                terms.append(math.exp(c[i]) - math.exp(n[i, j]))
            else:
                terms.append((c[i] - c_ref[i]) - (n[i, j] - n_ref[i, j]))
        products = np.array(weights) * np.array(terms)
        if base == "sdpo":
            losses.append(math.log1p(np.exp(-products).sum()))
        else:
            z = products.mean() if base == "dmpo" else products.sum()
            losses.append(math.log1p(math.exp(-z)))
    return np.array(losses) if reduction == "none" else np.mean(losses)


@pytest.mark.parametrize("base", ["dmpo", "mppo", "sdpo"])
def test_battery(base):
    chosen, rejected = _rng(5, loc=-2.0), _rng(5, 6, seed=1, loc=-4.0) * 1.5
    inputs = [chosen, rejected]
    if base != "mppo":
        inputs += [_rng(5, seed=2, loc=-2.5), _rng(5, 6, seed=3, loc=-5.0)]

    def gradient(*arrays, **params):
        tensors = [torch.from_numpy(array).requires_grad_() for array in arrays]
        c, n = tensors[:2]
        mask = boundary_mask(c, n)
        betas = dual_margin_beta(c, n, mask, beta=params["beta"])
        if base == "mppo":
            slope = torch.sigmoid(-(betas * (c.exp()[:, None] - n.exp())).sum(1))[:, None] * betas
            return -(slope * c.exp()[:, None]).sum(1).detach() / len(c), (slope * n.exp()).detach() / len(c)
        gap = (c - tensors[2])[:, None] - (n - tensors[3])
        if base == "dmpo":
            slope = betas / mask.sum(1, keepdim=True) * torch.sigmoid(-(betas * gap).sum(1) / mask.sum(1))[:, None]
        else:
            odds = torch.where(mask, (-betas * gap).exp(), 0.0)
            slope = betas * odds / (1 + odds.sum(1, keepdim=True))
        g_n, g_c = slope.detach() / len(c), -slope.sum(1).detach() / len(c)
        return g_c, g_n, -g_c, -g_n

    check_loss(
        dynamic_po_loss,
        inputs,
        {"base": base, "beta": 0.7},
        lambda *arrays, **params: _loop(*arrays, **params),
        gradient=gradient,  # selection and betas are constants, which finite differences don't see
        extreme=1e3 if base != "mppo" else None,  # probabilities of 1000 nats don't exist
        dtypes={"float32": 1e-4},  # rounding to bfloat16 moves negatives across the boundary
        reductions=("none", "mean"),
    )


def test_only_the_boundary_gets_a_gradient():
    chosen, rejected = _rng(4, loc=-3), (_rng(4, 9, seed=1) * 4 - 9).requires_grad_()
    dynamic_po_loss(chosen, rejected, chosen, _rng(4, 9, seed=2, loc=-9)).backward()
    mask = boundary_mask(chosen, rejected)
    assert not mask.all()
    assert ((rejected.grad != 0) == mask).all()


@pytest.mark.parametrize("base", ["dmpo", "mppo", "sdpo"])
def test_permuted_negatives(base):
    chosen, rejected, ref = _rng(3, loc=-2), _rng(3, 7, seed=1, loc=-5) * 2, _rng(3, 7, seed=2, loc=-5)
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    refs = () if base == "mppo" else (chosen, ref)
    permuted = () if base == "mppo" else (chosen, ref[:, order])
    torch.testing.assert_close(
        dynamic_po_loss(chosen, rejected[:, order], *permuted, base=base),
        dynamic_po_loss(chosen, rejected, *refs, base=base),
    )


def test_all_negatives_with_one_beta_give_the_base_losses():
    chosen, ref_chosen, ref_rejected = _rng(3, loc=-5), _rng(3, seed=1, loc=-5), _rng(3, 4, seed=2, loc=-5)
    rejected = chosen[:, None] + _rng(3, 4, seed=3).abs()  # all violate
    options = {"margin": 1e9, "beta": 1.4}  # so that every beta is half of it
    refs = (ref_chosen, ref_rejected)
    for base, loss in (("dmpo", dmpo_loss), ("sdpo", sdpo_loss)):
        ours = dynamic_po_loss(chosen, rejected, *refs, base=base, **options)
        torch.testing.assert_close(ours, loss(chosen, rejected, *refs, beta=0.7))
    ours = dynamic_po_loss(chosen, rejected, base="mppo", **options)
    torch.testing.assert_close(ours, mppo_loss(chosen, rejected, beta=0.7))


@pytest.mark.parametrize("base", [dmpo_loss, sdpo_loss])
def test_base_losses_with_one_negative_are_dpo(base):
    c, n, rc, rn = _rng(4), _rng(4, 1, seed=1), _rng(4, seed=2), _rng(4, 1, seed=3)
    torch.testing.assert_close(base(c, n, rc, rn, beta=0.3), dpo_loss(c, n[:, 0], rc, rn[:, 0], beta=0.3))


# --- object ------------------------------------------------------------------------------------------------------------


def test_loss_object():
    chosen, rejected = _rng(4, loc=-4).requires_grad_(), _rng(4, 6, seed=1, loc=-6) * 1.5
    refs = (_rng(4, seed=2, loc=-4), _rng(4, 6, seed=3, loc=-6))
    loss = make_loss("dynamic_po", base="sdpo", beta=0.5, margin=2.0)
    out = loss(Logps(chosen, rejected, *refs), LossContext())
    torch.testing.assert_close(out.loss, dynamic_po_loss(chosen, rejected, *refs, base="sdpo", beta=0.5, margin=2.0))
    mask = boundary_mask(chosen, rejected)
    betas = dual_margin_beta(chosen, rejected, mask, beta=0.5, margin=2.0)[mask]
    expected = {
        "boundary/fraction": mask.double().mean(),
        "boundary/violation_rate": (rejected >= chosen[:, None]).double().mean(),
        "beta/mean": betas.mean(),
        "beta/min": betas.min(),
        "beta/max": betas.max(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(out.metrics[name], value.detach())
    assert not any(value.requires_grad for value in (*out.metrics.values(), out.chosen_rewards, out.rejected_rewards))
    gaps = (chosen - refs[0])[:, None] - (rejected - refs[1])
    torch.testing.assert_close(out.metrics["rewards/accuracy_all"], (gaps.amin(1) > 0).double().mean())
    torch.testing.assert_close(out.metrics["rewards/margin"], (0.5 * gaps.mean()).detach())
    assert loss.state_dict() == {}


def test_which_bases_need_a_reference():
    assert [DynamicPOLoss(base).requires_reference for base in ("dmpo", "mppo", "sdpo")] == [True, False, True]
    assert DynamicPOLoss.multi_negative


def test_half_precision_is_computed_in_float32():
    chosen, rejected = _rng(3, loc=-30).bfloat16(), _rng(3, 4, seed=1, loc=-40).bfloat16()
    out = make_loss("dynamic_po", base="sdpo")(Logps(chosen, rejected, chosen, rejected), LossContext())
    assert out.loss.dtype == torch.float32
    exact = dynamic_po_loss(*(x.double() for x in (chosen, rejected, chosen, rejected)), base="sdpo")
    torch.testing.assert_close(out.loss.double(), exact, rtol=1e-6, atol=0)


# --- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["dmpo", "sdpo"])
def test_missing_references(base):
    with pytest.raises(ValueError, match=f"base='{base}' needs ref_chosen_logps and ref_rejected_logps"):
        dynamic_po_loss(torch.zeros(2), torch.zeros(2, 3), base=base)


def test_references_that_are_not_used():
    zero, zeros = torch.zeros(2), torch.zeros(2, 3)
    with pytest.warns(UserWarning, match="base='mppo' uses no reference"):
        loss = dynamic_po_loss(zero, zeros, zero, zeros, base="mppo")
    assert loss.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "dmpoo"}, "did you mean 'dmpo'"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"margin": float("nan")}, "margin must be a finite number"),
        ({"num_clusters": 0}, "num_clusters must be an integer >= 1"),
        ({"clustering": "optics"}, "clustering must be one of"),
        ({"reduction": "sum"}, "reduction must be one of"),
    ],
)
def test_bad_options(options, message):
    zero, zeros = torch.zeros(2), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=message):
        dynamic_po_loss(zero, zeros, zero, zeros, **options)
    if "reduction" not in options:
        with pytest.raises(ValueError, match=message):
            DynamicPOLoss(**options)


def test_bad_tensors():
    zero, zeros = torch.zeros(2), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="rejected_logps must have shape"):
        boundary_mask(zero, torch.zeros(2, 0))
    with pytest.raises(ValueError, match=r"rejected_logps contains non-finite values, the first at \[1, 2\]"):
        boundary_mask(zero, torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -2.0, float("nan")]]))
    with pytest.raises(ValueError, match="mask must be boolean"):
        dual_margin_beta(zero, zeros, zeros)
    with pytest.raises(ValueError, match="got none in row 1"):
        dual_margin_beta(zero, zeros, torch.tensor([[True, False, False], [False, False, False]]))
    with pytest.raises(ValueError, match="values must be a non-empty floating matrix"):
        optimal_kmeans_1d(torch.zeros(3), 2)


# --- does it do what it is for ------------------------------------------------------------------------------------------


def _catalogue(loss, seed):
    """HR@1 among the hard candidates, and the boundary's share of the gradient's norm.

    A linear model on 50 items and five groups of users; each row has two ordinary negatives and thirteen that nobody would
    take, whose reference log-probability is 12 nats lower.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    centres = draw(5, 16)
    items = centres[torch.arange(50) % 5] + 0.7 * draw(50, 16)

    def sample(count, negatives):
        users = centres[torch.randint(5, (count,), generator=generator)] + 0.7 * draw(count, 16)
        positive = torch.multinomial((0.7 * users @ items.T).softmax(1), 1, generator=generator)
        others = torch.ones(count, 50).scatter(1, positive, 0.0)
        return users, positive[:, 0], torch.multinomial(others, negatives, generator=generator)

    users, positive, hard = sample(600, 2)
    negatives = torch.cat([hard, 50 + draw(600, 30).argsort(1)[:, :13]], 1)
    weight = (0.03 * draw(16, 80)).requires_grad_()
    start, bias = weight.detach().clone(), torch.tensor([0.0] * 50 + [-12.0] * 30)
    optimizer, shares = torch.optim.Adam([weight], lr=0.02), []
    for _ in range(60):
        rows = torch.randint(600, (16,), generator=generator)
        columns = torch.cat([positive[rows, None], negatives[rows]], 1)
        logps, refs = ((users[rows] @ w + bias).log_softmax(1).gather(1, columns) for w in (weight, start))
        value = loss(logps[:, 0], logps[:, 1:], refs[:, 0], refs[:, 1:])
        (slope,) = torch.autograd.grad(value, logps, retain_graph=True)
        boundary = boundary_mask(logps[:, 0], logps[:, 1:])
        shares.append((slope[:, 1:][boundary].norm() / slope[:, 1:].norm()).item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    users, positive, hard = sample(1000, 19)
    scores = (users @ weight + bias).detach()
    hits = (scores.gather(1, positive[:, None]) > scores.gather(1, hard)).all(1).double().mean().item()
    return hits, np.mean(shares)


def test_the_boundary_gets_all_of_the_gradient_and_ranking_is_not_worse():
    """Three seeds: two of fifteen negatives matter. DMPO gives the boundary a third of the gradient, DynamicPO all of it."""
    base, ours = (np.mean([_catalogue(loss, seed) for seed in range(3)], 0) for loss in (dmpo_loss, dynamic_po_loss))
    assert ours[0] > base[0] - 0.03
    assert ours[0] > 0.4  # by chance 0.05
    assert ours[1] == pytest.approx(1.0)
    assert base[1] < 0.5


def test_hard_negatives_fall_faster_than_with_the_mean_of_all():
    """Two hard and thirteen easy negatives, one logit each; where a mean over all of them dilutes the two."""

    def gap_of_hard(loss):
        logits = torch.cat([torch.zeros(3), torch.full((13,), -12.0)]).requires_grad_()
        reference = logits.detach().log_softmax(0)
        optimizer = torch.optim.SGD([logits], lr=0.5)
        for _ in range(40):
            optimizer.zero_grad()
            logps = logits.log_softmax(0)
            loss(logps[:1], logps[None, 1:], reference[:1], reference[None, 1:]).backward()
            optimizer.step()
        logps = logits.detach().log_softmax(0)
        return (logps[0] - logps[1:3]).min().item()

    assert gap_of_hard(dynamic_po_loss) > 1.2 * gap_of_hard(dmpo_loss) > 0
