"""Adap-tau: the loss, the Lambert function, both temperatures and their schedule."""

from __future__ import annotations

import lzma
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ballast_testing.distributed import run_gloo
from ballast_testing.losses import check_loss
from recsys_losses import adap_tau
from recsys_losses.adap_tau import (
    AdaptiveTemperature,
    adap_tau_loss,
    estimate_inverse_temperature,
    lambertw0,
    unit_temperature_loss,
    user_inverse_temperature,
    warmup_inverse_temperature,
)
from recsys_losses.bsl import bsl_loss


def scores(rows=5, negatives=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pos = torch.rand(rows, generator=generator, dtype=torch.float64) * 2 - 1
    neg = torch.rand(rows, negatives, generator=generator, dtype=torch.float64) * 2 - 1
    return pos, neg


def graph(num_users=30, num_items=40, dim=6, seed=0):
    """Users with 1..8 items each, and tables in which observed pairs score above the average."""
    rng = np.random.default_rng(seed)
    user_emb = rng.normal(size=(num_users, dim))
    item_emb = rng.normal(size=(num_items, dim))
    pairs = []
    for u in range(num_users):
        best = np.argsort(-(item_emb @ user_emb[u]))[:12]
        pairs += [(u, int(i)) for i in rng.permutation(best)[: 1 + u % 8]]
    edges = torch.from_numpy(np.array(pairs).T.copy())
    return torch.from_numpy(user_emb), torch.from_numpy(item_emb), edges


def reference_loss(pos, neg, inv_tau_neg, *, inv_tau_pos, reduction="mean"):
    weight = np.broadcast_to(inv_tau_neg, pos.shape)
    rows = []
    for b in range(len(pos)):
        logits = [weight[b] * value for value in neg[b]]
        top = max(logits)
        rows.append(-inv_tau_pos * pos[b] + top + math.log(math.fsum(math.exp(x - top) for x in logits)))
    rows = np.array(rows)
    return rows if reduction == "none" else getattr(rows, reduction)()


def reference_estimate(user_emb, item_emb, edges, quantile=0.2):
    user = user_emb / np.linalg.norm(user_emb, axis=1, keepdims=True)
    item = item_emb / np.linalg.norm(item_emb, axis=1, keepdims=True)
    degree = np.zeros(len(user))
    for u in edges[0]:
        degree[u] += 1
    kept = degree > np.quantile(degree, quantile)
    cosine = user @ item.T
    positive = [cosine[u, i] for u, i in edges.T if kept[u]]
    gap = np.mean(positive) - cosine[kept].mean()
    return math.log(0.5 * kept.sum() * len(item) / len(positive)) / gap


# --- the loss -------------------------------------------------------------------------------------------------------


def test_loss_battery():
    pos, neg = scores()
    inv_tau = torch.tensor([13.1, 14.2, 0.0, 12.8, 25.0], dtype=torch.float64)
    check_loss(adap_tau_loss, [pos, neg, inv_tau], {"inv_tau_pos": 9.18}, reference_loss, detached=[2])
    check_loss(adap_tau_loss, [pos, neg, 7.5], {"inv_tau_pos": 9.18}, reference_loss)


def test_unit_temperature_loss_is_the_row_loss_at_temperature_one_without_a_graph():
    pos, neg = scores()
    pos.requires_grad_()
    loss = unit_temperature_loss(pos, neg)
    assert not loss.requires_grad
    want = reference_loss(pos.detach().numpy(), neg.numpy(), 1.0, inv_tau_pos=1.0, reduction="none")
    np.testing.assert_allclose(loss.numpy(), want, rtol=1e-12)
    half = unit_temperature_loss(pos.bfloat16(), neg.bfloat16())
    assert half.dtype == torch.bfloat16
    np.testing.assert_allclose(half.double().numpy(), want, rtol=2e-2)


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_equal_temperatures_are_softmax_loss(temperature):
    pos, neg = scores()
    got = adap_tau_loss(pos, neg, torch.full((5,), 1 / temperature), inv_tau_pos=1 / temperature)
    want = bsl_loss(pos, neg, temperature=temperature, mode="reweight", power=1.0)
    # The temperatures per row are float32 here, on purpose: what the schedule hands out.
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    exact = adap_tau_loss(pos, neg, 1 / temperature, inv_tau_pos=torch.tensor(1 / temperature, dtype=torch.float64))
    assert exact.item() == pytest.approx(want.item(), rel=1e-12)


def test_zero_temperatures_give_log_of_the_number_of_negatives():
    pos, neg = scores(negatives=7)
    assert adap_tau_loss(pos, neg, 0.0, inv_tau_pos=0.0).item() == pytest.approx(math.log(7), rel=1e-12)


def test_gradients_are_those_of_the_card():
    pos, neg = scores()
    weight = torch.tensor([3.0, 5.0, 8.0, 13.0, 21.0], dtype=torch.float64)
    pos.requires_grad_()
    neg.requires_grad_()
    adap_tau_loss(pos, neg, weight, inv_tau_pos=4.0).backward()
    torch.testing.assert_close(pos.grad, torch.full_like(pos, -4.0 / 5))
    torch.testing.assert_close(neg.grad, weight[:, None] / 5 * (weight[:, None] * neg.detach()).softmax(dim=1))


def test_temperatures_are_constants():
    pos, neg = scores()
    weight = torch.full((5,), 3.0, requires_grad=True)
    w0 = torch.tensor(2.0, requires_grad=True)
    adap_tau_loss(pos.requires_grad_(), neg, weight, inv_tau_pos=w0).backward()
    assert weight.grad is None
    assert w0.grad is None


def test_sharp_temperatures_keep_their_gradient_in_float32():
    # exp, divide, log lose it here: w (2 f_neg - f_pos) is far above 88.
    pos = torch.tensor([-0.9], requires_grad=True)
    neg = torch.tensor([[0.99, 0.2]], requires_grad=True)
    adap_tau_loss(pos, neg, 300.0, inv_tau_pos=300.0).backward()
    torch.testing.assert_close(neg.grad, torch.tensor([[300.0, 0.0]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pos_score": torch.zeros(3, 1)}, r"expected pos_score \(B,\) and neg_scores \(B, N\)"),
        ({"neg_scores": torch.zeros(2, 4)}, r"expected pos_score \(B,\) and neg_scores \(B, N\)"),
        ({"neg_scores": torch.zeros(3, 0)}, "no columns"),
        ({"inv_tau_neg": torch.ones(4)}, r"inv_tau_neg must have shape \(\) or \(3,\), got \(4,\)"),
        ({"inv_tau_neg": float("nan")}, "inv_tau_neg must be a finite number >= 0, got nan"),
        ({"inv_tau_neg": -1.0}, "inv_tau_neg must be a finite number >= 0"),
        ({"inv_tau_pos": torch.ones(3)}, r"inv_tau_pos must have shape \(\), got \(3,\)"),
        ({"inv_tau_pos": float("inf")}, "inv_tau_pos must be a finite number >= 0"),
        ({"reduction": "avg"}, "unknown reduction 'avg'"),
    ],
)
def test_loss_refuses(change, message):
    good = {
        "pos_score": torch.zeros(3),
        "neg_scores": torch.zeros(3, 4),
        "inv_tau_neg": torch.ones(3),
        "inv_tau_pos": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        adap_tau_loss(**{**good, **change})


# --- Lambert W ------------------------------------------------------------------------------------------------------


def test_lambertw0_inverts_w_exp_w():
    left = torch.linspace(-0.3678, 1.0, 20_001, dtype=torch.float64)
    near_branch = -0.36787944117144233 + torch.logspace(-16, -3, 2_001, dtype=torch.float64)
    x = torch.cat([left[left != 0], torch.logspace(0, 6, 5_001, dtype=torch.float64), near_branch])
    w = lambertw0(x)
    assert ((w * w.exp() - x) / x).abs().max() < 1e-12
    assert (w >= -1).all()


def test_lambertw0_equals_scipy_and_is_increasing():
    scipy_special = pytest.importorskip("scipy.special")
    x = torch.cat(
        [
            torch.linspace(-0.3678, 5, 5_001, dtype=torch.float64),
            torch.tensor([1e-300, 1e-12, -1e-9, 1e10, 1e300], dtype=torch.float64),
        ]
    )
    np.testing.assert_allclose(lambertw0(x).numpy(), scipy_special.lambertw(x.numpy(), 0).real, rtol=1e-12, atol=0)
    near = -0.36787944117144233 + torch.logspace(-15, -4, 3_001, dtype=torch.float64)
    assert (lambertw0(near).diff() >= 0).all()


def test_lambertw0_special_values():
    x = torch.tensor([-1 / math.e, 0.0, math.e, -0.5, -math.inf, math.inf], dtype=torch.float64, requires_grad=True)
    w = lambertw0(x)
    assert not w.requires_grad
    assert w.tolist() == [-1.0, 0.0, 1.0, -1.0, -1.0, math.inf]
    assert lambertw0(torch.tensor([math.nan])).isnan().all()
    assert lambertw0(torch.tensor([1.0], dtype=torch.bfloat16)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"x must be a floating tensor, got torch\.int64"):
        lambertw0(torch.tensor([1]))


# --- temperature per user -------------------------------------------------------------------------------------------

losses = st.lists(st.floats(-5, 20), min_size=1, max_size=20)
rules = st.sampled_from([("mean", None), ("quantile", 0.9), ("quantile", 0.0), ("quantile", 0.5)])


@settings(derandomize=True, deadline=None)
@given(losses, rules, st.floats(0.05, 50), st.floats(0.1, 30))
def test_user_temperatures_fall_with_the_loss_within_their_range(values, rule, beta, inv_tau0):
    center, quantile = rule
    loss = torch.tensor(values, dtype=torch.float64)
    w = user_inverse_temperature(loss, inv_tau0=inv_tau0, beta=beta, center=center, quantile=quantile)
    assert (w > 0).all()
    assert (w <= math.e * inv_tau0 * (1 + 1e-12)).all()
    assert (w[loss.argsort()].diff() <= 1e-12 * inv_tau0).all()
    middle = loss.mean() if center == "mean" else loss.quantile(quantile)
    assert ((w <= inv_tau0 * (1 + 1e-9)) | (loss < middle)).all()
    assert ((w >= inv_tau0 * (1 - 1e-9)) | (loss > middle)).all()


@settings(derandomize=True, deadline=None)
@given(losses, rules, st.floats(-100, 100))
def test_user_temperatures_ignore_a_constant_added_to_all_losses(values, rule, shift):
    center, quantile = rule
    loss = torch.tensor(values, dtype=torch.float64)
    # The root at the branch point magnifies rounding of z there, hence sqrt(eps).
    torch.testing.assert_close(
        user_inverse_temperature(loss + shift, inv_tau0=9.0, center=center, quantile=quantile),
        user_inverse_temperature(loss, inv_tau0=9.0, center=center, quantile=quantile),
        rtol=1e-6,
        atol=0,
    )


def test_user_temperatures_at_the_centre_and_for_large_beta():
    loss = torch.tensor([5.0, 6.0, 7.0], dtype=torch.float64)
    assert user_inverse_temperature(loss, inv_tau0=9.18)[1].item() == 9.18
    quantile = user_inverse_temperature(loss, inv_tau0=9.18, center="quantile", quantile=1.0)
    assert quantile[2].item() == 9.18
    flat = user_inverse_temperature(loss, inv_tau0=9.18, beta=1e12)
    torch.testing.assert_close(flat, torch.full_like(loss, 9.18), rtol=1e-10, atol=0)
    assert user_inverse_temperature(torch.tensor([3.0]), inv_tau0=2.0).tolist() == [2.0]


def test_user_temperatures_are_clipped_on_both_sides():
    scipy_special = pytest.importorskip("scipy.special")
    loss = torch.tensor([0.0, 1e3, 1e6, 1e9], dtype=torch.float64)
    w = user_inverse_temperature(loss, inv_tau0=2.0, beta=1.0, center="quantile", quantile=1 / 3)
    lowest = 2.0 * math.exp(-scipy_special.lambertw(1000.0).real)
    np.testing.assert_allclose(w.numpy(), [2.0 * math.e, 2.0, lowest, lowest], rtol=1e-6)


def test_user_temperatures_minimise_the_superloss():
    # sigma = w_u / w0 makes sigma (l - c) / beta + (log sigma)^2 / 2 stationary.
    loss = torch.tensor([5.9, 6.0, 6.4, 8.0], dtype=torch.float64)
    beta = 2.0
    sigma = user_inverse_temperature(loss, inv_tau0=1.0, beta=beta)
    z = (loss - loss.mean()) / beta
    inside = z > -1 / math.e
    assert inside.sum() >= 3
    torch.testing.assert_close((z * sigma + sigma.log())[inside], torch.zeros(4, dtype=torch.float64)[inside])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_loss": torch.zeros(2, 2)}, r"user_loss must be floating \(U,\)"),
        ({"user_loss": torch.zeros(0)}, r"user_loss must be floating \(U,\)"),
        ({"user_loss": torch.tensor([1, 2])}, r"user_loss must be floating \(U,\)"),
        ({"user_loss": torch.tensor([1.0, math.nan])}, "user_loss must be finite"),
        ({"inv_tau0": 0.0}, "inv_tau0 must be a positive finite number"),
        ({"beta": 0.0}, "beta must be a positive finite number, got 0.0"),
        ({"beta": math.nan}, "beta must be a positive finite number"),
        ({"center": "median"}, "unknown center 'median'; accepted: mean, quantile"),
        ({"center": "quantile"}, r"quantile must be in \[0, 1\] with center='quantile', got None"),
        ({"center": "quantile", "quantile": 1.5}, r"quantile must be in \[0, 1\]"),
    ],
)
def test_user_temperatures_refuse(change, message):
    with pytest.raises(ValueError, match=message):
        user_inverse_temperature(**{"user_loss": torch.zeros(3), "inv_tau0": 1.0, **change})


# --- global temperature ---------------------------------------------------------------------------------------------


def test_warmup_is_the_closed_form():
    got = warmup_inverse_temperature(100, 300, 1000, gap=0.7)
    assert got == pytest.approx(math.log(0.5 * 100 * 300 / 1000) / 0.7, rel=1e-14)
    # What makes it the right one: with this gap the observed pairs hold half of the softmax mass.
    assert 1000 * math.exp(got * 0.7) == pytest.approx(0.5 * 100 * 300, rel=1e-12)


def test_warmup_on_gowalla_is_the_value_in_the_authors_log(data_root):
    path = data_root / "recsys" / "gowalla" / "train.txt.xz"
    if not path.is_file():
        pytest.skip(f"{path} not found")
    users, items = [], []
    with lzma.open(path, "rt") as lines:
        for line in lines:
            user, *row = (int(word) for word in line.split())
            users += [user] * len(row)
            items += row
    edges = torch.tensor([users, items])
    temperature = AdaptiveTemperature(edges, num_users=29_858, num_items=40_981)
    temperature.start_epoch(0, torch.ones(29_858, 1), torch.ones(40_981, 1))
    assert temperature.inv_tau0.item() == pytest.approx(9.17942388767301, rel=1e-7)
    direct = warmup_inverse_temperature(temperature.kept_users.numel(), 40_981, temperature.kept_edges.shape[1])
    assert direct == pytest.approx(9.179424, rel=1e-6)


@pytest.mark.parametrize(
    ("args", "gap", "message"),
    [
        ((0, 10, 1), 0.7, "num_users must be >= 1, got 0"),
        ((10, 10, 0), 0.7, "num_interactions must be >= 1"),
        ((10, 10, 50), 0.7, r"less than half of all pairs must be observed: .* got 100 and 100"),
        ((10, 10, 1), 0.0, "gap must be a positive finite number"),
    ],
)
def test_warmup_refuses(args, gap, message):
    with pytest.raises(ValueError, match=message):
        warmup_inverse_temperature(*args, gap=gap)


@pytest.mark.parametrize("quantile", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_estimate_equals_the_definition(monkeypatch, quantile, chunk):
    monkeypatch.setattr(adap_tau, "_CHUNK_EDGES", chunk)
    user, item, edges = graph()
    got = estimate_inverse_temperature(user, item, edges, user_quantile=quantile)
    assert got == pytest.approx(reference_estimate(user.numpy(), item.numpy(), edges.numpy(), quantile), rel=1e-12)
    single = estimate_inverse_temperature(user.float(), item.float(), edges, user_quantile=quantile)
    assert single == pytest.approx(got, rel=1e-5)
    half = estimate_inverse_temperature(user.bfloat16(), item.bfloat16(), edges, user_quantile=quantile)
    assert half == pytest.approx(got, rel=5e-2)


def test_estimate_ignores_lengths_and_names():
    user, item, edges = graph()
    want = estimate_inverse_temperature(user, item, edges)
    generator = torch.Generator().manual_seed(1)
    scale_u = torch.rand(30, 1, generator=generator, dtype=torch.float64) * 10 + 0.1
    scale_i = torch.rand(40, 1, generator=generator, dtype=torch.float64) * 10 + 0.1
    assert estimate_inverse_temperature(user * scale_u, item * scale_i, edges) == pytest.approx(want, rel=1e-12)
    order_u, order_i = torch.randperm(30, generator=generator), torch.randperm(40, generator=generator)
    renamed = torch.stack([order_u.argsort()[edges[0]], order_i.argsort()[edges[1]]])
    assert estimate_inverse_temperature(user[order_u], item[order_i], renamed) == pytest.approx(want, rel=1e-12)


def test_quantile_equals_numpy_and_has_no_size_limit():
    values = torch.rand(101, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for q in (0.0, 0.2, 0.37, 0.5, 0.999, 1.0):
        assert adap_tau._quantile(values, q).item() == pytest.approx(np.quantile(values.numpy(), q), rel=1e-14)
    # torch.quantile refuses this length.
    assert adap_tau._quantile(torch.zeros(17_000_000), 0.2).item() == 0.0


def test_estimate_refuses():
    user, item, edges = graph()
    with pytest.raises(ValueError, match=r"mean positive score -?[\d.]+ is not above mean score"):
        estimate_inverse_temperature(-user, item, edges)
    equal = torch.stack([torch.arange(30), torch.arange(30)])
    with pytest.raises(ValueError, match="no user above the degree quantile"):
        estimate_inverse_temperature(user, item, equal)
    with pytest.raises(ValueError, match="must be finite, got NaN"):
        estimate_inverse_temperature(user * math.nan, item, edges)
    with pytest.raises(ValueError, match=r"item id 39.*num_items=39"):
        estimate_inverse_temperature(user, item[:39], torch.tensor([[0, 0], [1, 39]]))
    with pytest.raises(ValueError, match=r"expected user_emb \(U, d\)"):
        estimate_inverse_temperature(user[:, :2], item, edges)
    with pytest.raises(ValueError, match="edge_index has no pairs"):
        estimate_inverse_temperature(user, item, edges[:, :0])
    with pytest.raises(ValueError, match=r"user_quantile must be in \[0, 1\), got 1"):
        estimate_inverse_temperature(user, item, edges, user_quantile=1)


# --- the schedule ---------------------------------------------------------------------------------------------------


def schedule(**changes):
    user, item, edges = graph()
    return AdaptiveTemperature(edges, 30, 40, **{"warmup_epochs": 2, **changes}), user, item


def rows(num_users, seed, count=64):
    generator = torch.Generator().manual_seed(seed)
    user = torch.randint(num_users, (count,), generator=generator)
    return user, torch.rand(count, generator=generator), torch.rand(count, 5, generator=generator)


def test_schedule_follows_the_functions():
    temperature, user, item = schedule(beta=0.5, center="quantile", quantile=0.7)
    temperature.start_epoch(0, user, item)
    warm = warmup_inverse_temperature(temperature.kept_users.numel(), 40, temperature.kept_edges.shape[1])
    assert temperature.inv_tau0.item() == pytest.approx(warm, rel=1e-12)
    torch.testing.assert_close(temperature(torch.arange(30)), torch.full((30,), warm))

    total, count = np.zeros(30), np.zeros(30)
    for seed in range(3):
        batch = rows(20, seed)  # users 20..29 have no rows
        temperature.observe(*batch)
        for u, loss in zip(batch[0].tolist(), unit_temperature_loss(*batch[1:]).tolist(), strict=True):
            total[u] += loss
            count[u] += 1
    temperature.start_epoch(2, user, item)
    w0 = reference_estimate(user.numpy(), item.numpy(), graph()[2].numpy())
    assert temperature.inv_tau0.item() == pytest.approx(w0, rel=1e-12)
    want = user_inverse_temperature(
        torch.from_numpy(total[:20] / count[:20]), inv_tau0=w0, beta=0.5, center="quantile", quantile=0.7
    )
    torch.testing.assert_close(temperature(torch.arange(20)), want.float())
    torch.testing.assert_close(temperature(torch.arange(20, 30)), torch.full((10,), w0).float())
    assert want.unique().numel() > 5

    temperature.start_epoch(3, user, item)  # nothing was observed since
    torch.testing.assert_close(temperature(torch.arange(30)), torch.full((30,), w0).float())


def test_order_and_size_of_batches_do_not_matter():
    one, user, item = schedule()
    many, *_ = schedule()
    batch = rows(30, 0, count=200)
    one.observe(*batch)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    for part in order.split(7):
        many.observe(*(x[part] for x in batch))
    for temperature in (one, many):
        temperature.start_epoch(1, user, item)
    torch.testing.assert_close(one.inv_tau, many.inv_tau, rtol=1e-6, atol=0)


def test_not_personalised_gives_everyone_the_global_value():
    temperature, user, item = schedule(personalised=False)
    temperature.observe(*rows(30, 0))
    temperature.start_epoch(5, user, item)
    torch.testing.assert_close(temperature.inv_tau, temperature.inv_tau0.float().expand(30))
    assert temperature.inv_tau0.item() == pytest.approx(
        reference_estimate(user.numpy(), item.numpy(), graph()[2].numpy()), rel=1e-12
    )


def test_no_gradient_flows_through_the_temperatures():
    temperature, user, item = schedule(warmup_epochs=0)
    user.requires_grad_()
    item.requires_grad_()
    edges = graph()[2]

    def backward(w0, w):
        pos = F.cosine_similarity(user[edges[0]], item[edges[1]])
        neg = F.normalize(user[edges[0]]) @ F.normalize(item).T
        user.grad = item.grad = None
        temperature.observe(edges[0], pos, neg)
        adap_tau_loss(pos, neg, w, inv_tau_pos=w0).backward()
        return user.grad.clone(), item.grad.clone()

    temperature.start_epoch(0, user, item)
    backward(1.0, 1.0)
    temperature.start_epoch(1, user, item)
    w = temperature(edges[0])
    assert not w.requires_grad
    assert not temperature.inv_tau0.requires_grad
    assert w.unique().numel() > 5
    got = backward(temperature.inv_tau0, w)
    want = backward(temperature.inv_tau0.item(), torch.tensor(w.tolist()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_state_dict_resumes_in_the_middle_of_an_epoch():
    straight, user, item = schedule()
    straight.start_epoch(0, user, item)
    straight.observe(*rows(30, 0))
    resumed, *_ = schedule()
    state = {name: value.clone() for name, value in straight.state_dict().items()}
    assert set(state) == {"inv_tau0", "inv_tau", "pending", "observed"}
    resumed.load_state_dict(state)
    torch.testing.assert_close(resumed(torch.arange(30)), straight(torch.arange(30)), rtol=0, atol=0)
    for temperature in (straight, resumed):
        temperature.observe(*rows(30, 1))
        temperature.start_epoch(2, user, item)
    for name, value in straight.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0)
    assert straight.inv_tau.unique().numel() > 5


def test_previous_temperature_stays_when_positives_do_not_score_above_the_rest():
    temperature, user, item = schedule()
    temperature.start_epoch(2, user, item)
    before = temperature.inv_tau0.item()
    with pytest.warns(RuntimeWarning, match=r"mean positive score .* is not above .* stays") as caught:
        temperature.start_epoch(3, -user, item)
    assert caught[0].filename == __file__
    assert temperature.inv_tau0.item() == before
    with pytest.raises(ValueError, match="must be finite, got NaN"):
        temperature.start_epoch(4, user * math.nan, item)


def test_dense_data_keeps_the_start_value_with_a_warning():
    edges = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 2, 0, 1, 0]])
    temperature = AdaptiveTemperature(edges, 3, 3)
    with pytest.warns(RuntimeWarning, match="half or more of all pairs are observed: .* stays 10"):
        temperature.start_epoch(0, torch.eye(3), torch.eye(3))
    assert temperature.inv_tau.tolist() == [10.0] * 3


def test_equal_degrees_keep_all_users_with_a_warning():
    edges = torch.stack([torch.arange(5), torch.arange(5)])
    with pytest.warns(RuntimeWarning, match="no user above the degree quantile 0.2: all users count"):
        temperature = AdaptiveTemperature(edges, 5, 50)
    temperature.start_epoch(0, torch.eye(5), torch.eye(50)[:, :5])
    assert temperature.inv_tau0.item() == pytest.approx(warmup_inverse_temperature(5, 50, 5), rel=1e-12)


def test_hot_path_does_not_wait_for_the_device():
    # On the meta device every read of a value raises.
    temperature, *_ = schedule()
    temperature = temperature.to("meta")
    user, pos, neg = (x.to("meta") for x in rows(30, 0))
    temperature.observe(user, pos, neg)
    loss = adap_tau_loss(pos, neg, temperature(user), inv_tau_pos=temperature.inv_tau0)
    assert loss.shape == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": -1.0}, "beta must be a positive"),
        ({"gap": 0.0}, "gap must be a positive"),
        ({"center": "none"}, "unknown center 'none'"),
        ({"center": "quantile", "quantile": None}, "quantile must be in"),
        ({"warmup_epochs": -1}, "warmup_epochs must be >= 0, got -1"),
        ({"user_quantile": 1.0}, r"user_quantile must be in \[0, 1\)"),
        ({"num_users": 3}, "num_users=3"),
        ({"num_items": 3}, "num_items=3"),
        ({"edge_index": torch.zeros(2, 3)}, "edge_index must be an int64 tensor"),
    ],
)
def test_schedule_refuses_arguments(change, message):
    good = {"edge_index": graph()[2], "num_users": 30, "num_items": 40}
    with pytest.raises(ValueError, match=message):
        AdaptiveTemperature(**{**good, **change})


def test_schedule_refuses_calls():
    temperature, user, item = schedule()
    with pytest.raises(ValueError, match="epoch must be >= 0"):
        temperature.start_epoch(-1, user, item)
    with pytest.raises(ValueError, match=r"expected user_emb \(30, d\) and item_emb \(40, d\), got \(29, 6\)"):
        temperature.start_epoch(0, user[:29], item)
    users, pos, neg = rows(30, 0)
    with pytest.raises(ValueError, match=r"expected user \(64,\) like pos_score, got \(63,\)"):
        temperature.observe(users[1:], pos, neg)


def three_epochs(rank, world_size):
    """What a rank that sees its share of every batch has learnt at the start of each epoch."""
    generator = torch.Generator().manual_seed(0)
    user_emb, item_emb, edges = graph()
    temperature = AdaptiveTemperature(edges, 30, 40, warmup_epochs=1)
    seen = []
    for epoch in range(3):
        temperature.start_epoch(epoch, user_emb, item_emb)
        seen.append(torch.cat([temperature.inv_tau0[None], temperature.inv_tau]))
        for step in range(4):
            user = torch.randint(30, (10,), generator=generator)
            pos, neg = torch.rand(10, generator=generator), torch.rand(10, 4, generator=generator)
            part = slice(rank * 10 // world_size, (rank + 1) * 10 // world_size)
            temperature.observe(user[part], pos[part], neg[part])
            if step == 1:  # as before a checkpoint in the middle of an epoch
                temperature.synchronize()
    return torch.stack(seen)


def test_two_processes_agree_with_one():
    alone = three_epochs(0, 1)
    first, second = run_gloo(three_epochs, 2)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, alone, rtol=1e-6, atol=0)
    assert alone[2].unique().numel() > 10


def test_training_with_the_schedule_settles_and_separates():
    """Short real run: MF with cosine scores and uniform negatives on a graph of four communities."""
    generator = torch.Generator().manual_seed(0)
    group_u, group_i = torch.arange(120) % 4, torch.arange(200) % 4
    chance = torch.where(group_u[:, None] == group_i[None, :], 0.3, 0.01)
    edges = (torch.rand(120, 200, generator=generator) < chance).nonzero().T
    user = (torch.randn(120, 16, generator=generator) * 0.1).requires_grad_()
    item = (torch.randn(200, 16, generator=generator) * 0.1).requires_grad_()
    optimizer = torch.optim.Adam([user, item], lr=0.01)
    temperature = AdaptiveTemperature(edges, 120, 200, warmup_epochs=5)
    history = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # positives score above the rest from the end of the warm-up on
        for epoch in range(25):
            temperature.start_epoch(epoch, user, item)
            history.append(temperature.inv_tau0.item())
            for part in torch.randperm(edges.shape[1], generator=generator).split(256):
                u, i = edges[:, part]
                j = torch.randint(200, (len(part), 32), generator=generator)
                vector = F.normalize(user[u], dim=1)
                pos = (vector * F.normalize(item[i], dim=1)).sum(1)
                neg = torch.einsum("bd,bnd->bn", vector, F.normalize(item[j], dim=2))
                temperature.observe(u, pos, neg)
                loss = adap_tau_loss(pos, neg, temperature(u), inv_tau_pos=temperature.inv_tau0)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    assert history[:5] == [history[0]] * 5
    assert max(abs(a / b - 1) for a, b in zip(history[-3:], history[-4:-1], strict=True)) < 0.01
    cosine = (F.normalize(user) @ F.normalize(item).T).detach()
    same = group_u[:, None] == group_i[None, :]
    assert cosine[same].mean() > cosine[~same].mean() + 0.3
    assert temperature.inv_tau.unique().numel() > 100
