from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ballast_testing.losses import check_loss
from recsys_losses.bsl import (
    BilateralSoftmaxLoss,
    BSLLoss,
    bilateral_softmax_loss,
    bsl_loss,
    grouped_log_mean_exp,
    in_batch_scores,
)
from recsys_losses.ssm import in_batch_ssm_loss

F64 = torch.float64
USER = torch.tensor([10**12, -3, 7, -3, 10**12, -3])  # neither dense nor sorted: two groups and one row alone


def _rng(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _lme(values, tau):
    return math.log(sum(math.exp(v / tau) for v in values) / len(values))


def _reduced(rows, reduction):
    loss = np.array(rows)
    return loss if reduction == "none" else getattr(np, reduction)(loss)


def bsl_reference(pos, neg, user=None, *, temperature, power=1.0, mode="multi", reduction="mean"):
    rows = []
    for b in range(len(pos)):
        mean = _lme(neg[b], temperature)
        if mode == "single":
            rows.append(-pos[b] / temperature + mean)
        elif mode == "reweight":
            rows.append(-pos[b] / temperature + power * (mean + math.log(len(neg[b]))))
        else:
            group = [pos[c] for c in range(len(pos)) if user[c] == user[b]]
            rows.append(-_lme(group, temperature) + power * mean)
    return _reduced(rows, reduction)


def bilateral_reference(pos, neg, user=None, *, tau_pos, tau_neg, reduction="mean"):
    rows = []
    for b in range(len(pos)):
        group = [pos[c] for c in range(len(pos)) if c == b or (user is not None and user[c] == user[b])]
        rows.append(-tau_pos * _lme(group, tau_pos) + tau_neg * _lme(neg[b], tau_neg))
    return _reduced(rows, reduction)


# --- the battery --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["multi", "reweight", "single"])
def test_battery_bsl(mode):
    params = {"temperature": 0.3, "power": 1.2, "mode": mode}
    check_loss(bsl_loss, [_rng(6), _rng(6, 5, seed=1), USER], params, bsl_reference, module=BSLLoss(**params))


@pytest.mark.parametrize("user", [USER, None])
def test_battery_bilateral(user):
    params = {"tau_pos": 0.4, "tau_neg": 0.25}
    inputs = [_rng(6), _rng(6, 5, seed=1), user]
    check_loss(bilateral_softmax_loss, inputs, params, bilateral_reference, module=BilateralSoftmaxLoss(**params))


def test_battery_grouped_log_mean_exp():
    def reference(x, group):
        return np.array([_lme(x[group == g], 1.0) for g in group])

    check_loss(grouped_log_mean_exp, [_rng(6), USER], {}, reference, reductions=())
    x = _rng(6).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda v: grouped_log_mean_exp(v, USER), (x,))


# --- grouped log-mean-exp -----------------------------------------------------------------------------------------


def _masked_log_mean_exp(x: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """The authors' way: a (B, B) mask of equal users."""
    same = group[:, None] == group
    return x.expand(len(x), -1).masked_fill(~same, -torch.inf).logsumexp(1) - same.sum(1).to(x.dtype).log()


@given(
    rows=st.lists(st.tuples(st.floats(-100, 100), st.integers(-4, 4)), min_size=1, max_size=40),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
)
@settings(derandomize=True, deadline=None, max_examples=200)
def test_grouped_equals_the_dense_mask_and_lies_between_mean_and_maximum(rows, scale):
    x = torch.tensor([value for value, _ in rows], dtype=F64) * scale
    group = torch.tensor([g for _, g in rows])
    x.requires_grad_()
    got, want = grouped_log_mean_exp(x, group), _masked_log_mean_exp(x, group)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    upstream = torch.arange(1.0, len(rows) + 1, dtype=F64)
    gradients = [torch.autograd.grad(y @ upstream, x)[0] for y in (got, want)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-9)
    for g in group.unique():
        inside = x.detach()[group == g]
        tolerance = 1e-9 * (1.0 + inside.abs().max())
        assert (got[group == g] >= inside.mean() - tolerance).all()
        assert (got[group == g] <= inside.max() + tolerance).all()


def test_grouped_keeps_small_spreads_in_float32():
    # x / tau with tau = 1e6: log(mean(exp)) in float32 would be off by 6 % of the mean of x.
    x = torch.tensor([0.9, -0.4, 0.1, 0.3])
    got = 1e6 * grouped_log_mean_exp(x / 1e6, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(got, x.mean().expand(4), rtol=1e-5, atol=0)


def test_grouped_with_wide_spreads_in_float32():
    x = torch.tensor([0.0, -500.0, -1.0e4, 3.0], requires_grad=True)
    out = grouped_log_mean_exp(x, torch.tensor([1, 1, 1, 0]))
    torch.testing.assert_close(out.detach(), torch.tensor([-math.log(3.0)] * 3 + [3.0]))
    assert torch.autograd.grad(out.sum(), x)[0].tolist() == [3.0, 0.0, 0.0, 1.0]


def test_grouped_infinite_and_nan_values_stay_in_their_group():
    x = torch.tensor([-math.inf, -math.inf, 1.0, math.nan, 0.5, math.inf, 2.0])
    out = grouped_log_mean_exp(x, torch.tensor([0, 0, 1, 2, 2, 3, 3]))
    assert out[:3].tolist() == [-math.inf, -math.inf, 1.0]
    assert out[3:5].isnan().all()
    assert out[5:].tolist() == [math.inf, math.inf]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_grouped_accepts_every_integer_dtype(dtype):
    group = torch.tensor([3, 1, 3, 9], dtype=dtype)
    torch.testing.assert_close(grouped_log_mean_exp(_rng(4), group), grouped_log_mean_exp(_rng(4), group.long()))


def test_grouped_memory_is_linear():
    # A (B, B) mask would hold 40 GB here.
    group = torch.randint(0, 50_000, (200_000,), generator=torch.Generator().manual_seed(0))
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(1))
    out = grouped_log_mean_exp(x, group)
    member = group == group[17]
    torch.testing.assert_close(out[17], x[member].logsumexp(0) - math.log(int(member.sum())))


# --- relations and limits -----------------------------------------------------------------------------------------


def test_multi_with_distinct_users_is_single():
    pos, neg = _rng(6), _rng(6, 5, seed=1)
    single = bsl_loss(pos, neg, temperature=0.2, mode="single", reduction="none")
    multi = bsl_loss(pos, neg, torch.randperm(6), temperature=0.2, reduction="none")
    torch.testing.assert_close(multi, single)


def test_reweight_is_single_plus_log_n_and_has_its_gradient():
    pos, neg = _rng(6).requires_grad_(), _rng(6, 5, seed=1).requires_grad_()
    single = bsl_loss(pos, neg, temperature=0.2, mode="single")
    reweight = bsl_loss(pos, neg, temperature=0.2, mode="reweight")
    torch.testing.assert_close(reweight, single + math.log(5.0))
    for a, b in zip(torch.autograd.grad(single, (pos, neg)), torch.autograd.grad(reweight, (pos, neg)), strict=True):
        torch.testing.assert_close(a, b)


def test_multi_is_bilateral_divided_by_the_common_temperature():
    pos, neg = _rng(6), _rng(6, 5, seed=1)
    multi = bsl_loss(pos, neg, USER, temperature=0.2, reduction="none")
    bilateral = bilateral_softmax_loss(pos, neg, USER, tau_pos=0.2, tau_neg=0.2, reduction="none")
    torch.testing.assert_close(multi, bilateral / 0.2)


@pytest.mark.parametrize("user", [None, torch.arange(6)])
def test_ungrouped_bilateral_does_not_depend_on_tau_pos(user):
    pos, neg = _rng(6), _rng(6, 5, seed=1)
    losses = [bilateral_softmax_loss(pos, neg, user, tau_pos=t, tau_neg=0.1) for t in (0.01, 1.0, 50.0)]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[2], losses[1])


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_large_tau_pos_is_the_group_mean(dtype):
    pos, neg = _rng(6).to(dtype), _rng(6, 5, seed=1).to(dtype)
    mean = torch.stack([pos[u == USER].mean() for u in USER])
    loss = bilateral_softmax_loss(pos, neg, USER, tau_pos=1e6, tau_neg=0.1, reduction="none")
    ungrouped = bilateral_softmax_loss(pos, neg, tau_pos=1.0, tau_neg=0.1, reduction="none")
    torch.testing.assert_close(loss, ungrouped + pos - mean, rtol=1e-5, atol=1e-5)


def test_large_tau_neg_is_the_mean_of_the_negatives():
    pos, neg = _rng(6), _rng(6, 5, seed=1)
    loss = bilateral_softmax_loss(pos, neg, tau_pos=1.0, tau_neg=1e6)
    torch.testing.assert_close(loss, neg.mean() - pos.mean(), rtol=0, atol=1e-5)


def test_small_temperatures_pick_the_extremes():
    pos, neg = _rng(6), _rng(6, 5, seed=1)
    best = torch.stack([pos[u == USER].max() for u in USER])
    loss = bilateral_softmax_loss(pos, neg, USER, tau_pos=1e-4, tau_neg=1e-4, reduction="none")
    torch.testing.assert_close(loss, neg.amax(1) - best, rtol=0, atol=1e-3)


def test_positive_part_is_at_most_the_softmax_loss_s():
    # Jensen: a log-mean-exp is at least the mean
    pos, neg = _rng(6), _rng(6, 5, seed=1)
    grouped = bilateral_softmax_loss(pos, neg, USER, tau_pos=0.3, tau_neg=0.1)
    assert grouped < bilateral_softmax_loss(pos, neg, tau_pos=0.3, tau_neg=0.1)


def test_negative_part_adds_the_variance():
    # paper eq. 13: tau log E exp(f / tau) = E f + Var f / (2 tau) + O(tau^-2)
    neg, pos = _rng(1, 2000), torch.zeros(1, dtype=F64)
    for tau in (20.0, 200.0):
        loss = bilateral_softmax_loss(pos, neg, tau_pos=1.0, tau_neg=tau)
        expansion = neg.mean() + neg.var(correction=0) / (2 * tau)
        assert (loss - expansion).abs().item() < 2.0 / tau**2


@given(shift=st.floats(-3, 3), power=st.floats(-2, 2), mode=st.sampled_from(["multi", "reweight", "single"]))
@settings(derandomize=True, deadline=None, max_examples=200)
def test_a_constant_moves_the_loss_by_power_minus_one(shift, power, mode):
    pos, neg = _rng(6), _rng(6, 5, seed=1)
    options = {"temperature": 0.2, "power": power, "mode": mode}
    moved = bsl_loss(pos + shift, neg + shift, USER, **options) - bsl_loss(pos, neg, USER, **options)
    excess = 0.0 if mode == "single" else power - 1.0
    assert moved.item() == pytest.approx(excess * shift / 0.2, abs=1e-9)


@given(labels=st.permutations(list(range(6))))
@settings(derandomize=True, deadline=None, max_examples=50)
def test_relabelling_users_changes_nothing(labels):
    pos, neg = _rng(6), _rng(6, 5, seed=1)
    dense = torch.tensor([0, 1, 2, 1, 0, 1])
    renamed = torch.tensor(labels)[dense] * 1_000_003 - 7
    torch.testing.assert_close(bsl_loss(pos, neg, renamed, temperature=0.2), bsl_loss(pos, neg, dense, temperature=0.2))


def test_users_do_not_interact():
    mine = USER == -3
    gradients = []
    for shift in (0.0, 40.0):
        pos = (_rng(6) + shift * ~mine).requires_grad_()
        gradients.append(torch.autograd.grad(bsl_loss(pos, _rng(6, 5, seed=1), USER, temperature=0.2), pos)[0][mine])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["multi", "reweight"])
def test_gradients_of_a_row_sum_to_power_over_temperature(mode):
    pos, neg = _rng(6).requires_grad_(), _rng(6, 5, seed=1).requires_grad_()
    bsl_loss(pos, neg, USER, temperature=0.2, power=1.3, mode=mode).backward()
    torch.testing.assert_close(neg.grad.sum(1), torch.full((6,), 1.3 / 0.2 / 6, dtype=F64))
    assert pos.grad.sum().item() == pytest.approx(-1 / 0.2)
    if mode == "multi":  # a user's total weight is his number of rows, shared out by softmax(p / t)
        weight = torch.softmax(pos.detach()[USER == -3] / 0.2, 0) * 3 / 6 / 0.2
        torch.testing.assert_close(pos.grad[USER == -3], -weight)


def test_an_outlying_positive_loses_its_weight():
    pos = torch.tensor([0.8, 0.8, 0.8, -0.2], dtype=F64, requires_grad=True)
    neg, user, temperature = _rng(4, 5), torch.zeros(4, dtype=torch.long), 0.2
    gradient = torch.autograd.grad(bsl_loss(pos, neg, user, temperature=temperature), pos)[0]
    assert (gradient[3] / gradient[0]).item() == pytest.approx(math.exp(-1.0 / temperature))
    plain = torch.autograd.grad(bsl_loss(pos, neg, temperature=temperature, mode="single"), pos)[0]
    torch.testing.assert_close(plain, plain[0].expand(4))


def test_equal_scores():
    pos, neg, user = torch.full((4,), 0.3, dtype=F64), torch.full((4, 3), 0.3, dtype=F64), torch.tensor([1, 1, 2, 2])
    excess = (1.5 - 1) * 0.3 / 0.2
    assert bsl_loss(pos, neg, temperature=0.2, power=1.5, mode="single").item() == pytest.approx(0.0, abs=1e-12)
    assert bsl_loss(pos, neg, user, temperature=0.2, power=1.5).item() == pytest.approx(excess)
    reweight = bsl_loss(pos, neg, temperature=0.2, power=1.5, mode="reweight")
    assert reweight.item() == pytest.approx(excess + 1.5 * math.log(3.0))


# --- numerics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["multi", "reweight", "single"])
def test_float32_with_a_sharp_temperature_equals_float64(mode):
    # With these scores the authors' code has a zero gradient at t = 0.02 and NaN at t = 0.015 in float32.
    pos, neg = torch.tensor([-0.5, 0.3, 0.35]), torch.tensor([[0.95, -0.2], [0.1, 0.09], [-0.9, 0.4]])
    user = torch.tensor([1, 1, 1])

    def run(dtype):
        p, n = pos.to(dtype).requires_grad_(), neg.to(dtype).requires_grad_()
        loss = bsl_loss(p, n, user, temperature=0.01, power=1.1, mode=mode)
        return loss.item(), torch.autograd.grad(loss, (p, n))

    (loss, gradients), (want, exact) = run(torch.float32), run(F64)
    assert loss == pytest.approx(want, rel=1e-4)
    for got, reference in zip(gradients, exact, strict=True):
        assert (got.double() - reference).norm() / reference.norm() < 1e-4
    assert gradients[1][0, 0].item() > 30  # r / (B t) on the hardest negative


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_float32(dtype):
    pos, neg = torch.zeros(3000, dtype=dtype), torch.zeros(3000, 40, dtype=dtype)
    loss = bsl_loss(pos, neg, torch.zeros(3000, dtype=torch.long), temperature=0.1, mode="reweight")
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(math.log(40.0), rel=1e-2)
    grouped = grouped_log_mean_exp(pos, torch.zeros(3000, dtype=torch.long))
    assert grouped.dtype == dtype
    assert not grouped.any()


def test_nan_stays_in_its_group():
    pos, neg = _rng(6), _rng(6, 5, seed=1)
    pos[0] = math.nan
    loss = bsl_loss(pos, neg, USER, temperature=0.2, reduction="none")
    assert loss.isnan().tolist() == [True, False, False, False, True, False]


def test_vmap_equals_a_loop():
    pos, neg = _rng(3, 4), _rng(3, 4, 5, seed=1)
    user = torch.tensor([[1, 1, 2, 2], [5, 1, 5, 5], [0, 1, 2, 3]])

    def multi(p, n, u):
        return bsl_loss(p, n, u, temperature=0.2, power=1.1)

    def bilateral(p, n, u):
        return bilateral_softmax_loss(p, n, u, tau_pos=0.4, tau_neg=0.2)

    for fn in (multi, bilateral):
        want = torch.stack([fn(*row) for row in zip(pos, neg, user, strict=True)])
        torch.testing.assert_close(torch.vmap(fn)(pos, neg, user), want)


def test_nothing_waits_for_the_device():
    # A meta tensor holds no data, so whatever would read a value on the host fails here.
    user_emb, item_emb = (torch.zeros(6, 3, device="meta", requires_grad=True) for _ in range(2))
    pos, neg = in_batch_scores(user_emb, item_emb)
    user = USER.to("meta")
    loss = bsl_loss(pos, neg, user, temperature=0.1) + bilateral_softmax_loss(pos, neg, user, tau_pos=1.0, tau_neg=1.0)
    assert [g.shape for g in torch.autograd.grad(loss, (user_emb, item_emb))] == [(6, 3), (6, 3)]


# --- in-batch scores ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_in_batch_scores_are_the_diagonal_and_the_rest(similarity, batch):
    user, item = _rng(batch, 4), _rng(batch, 4, seed=1)
    pos, neg = in_batch_scores(user, item, similarity=similarity)
    scores = user @ item.T
    if similarity == "cosine":
        scores = scores / (user.norm(dim=1)[:, None] * item.norm(dim=1))
    torch.testing.assert_close(pos, scores.diagonal())
    rest = [[scores[b, c] for c in range(batch) if c != b] for b in range(batch)]
    torch.testing.assert_close(neg, torch.tensor(rest, dtype=F64).reshape(batch, batch - 1))


def test_in_batch_scores_gradient():
    inputs = (_rng(4, 3).requires_grad_(), _rng(4, 3, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(in_batch_scores, inputs)


def test_in_batch_scores_give_the_in_batch_loss():
    user, item = _rng(6, 4), _rng(6, 4, seed=1)
    pos, neg = in_batch_scores(user, item)
    joined = torch.cat([pos[:, None], neg], 1)
    torch.testing.assert_close(
        bsl_loss(pos, joined, temperature=0.1, mode="reweight"), in_batch_ssm_loss(user, item, temperature=0.1)
    )


def test_in_batch_scores_dtype_and_zero_rows():
    zero = torch.zeros(3, 4, dtype=torch.bfloat16)
    pos, neg = in_batch_scores(zero, zero)
    assert pos.dtype == neg.dtype == torch.bfloat16
    assert not pos.any()
    assert not neg.any()


def test_in_batch_scores_under_vmap():
    user, item = _rng(3, 4, 5), _rng(3, 4, 5, seed=1)
    pos, neg = torch.vmap(in_batch_scores)(user, item)
    for row in range(3):
        want = in_batch_scores(user[row], item[row])
        torch.testing.assert_close((pos[row], neg[row]), want)


# --- bad input ----------------------------------------------------------------------------------------------------

P, N, G = torch.zeros(4), torch.zeros(4, 5), torch.arange(4)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_bad_temperatures(value):
    for name, call in (
        ("temperature", lambda: bsl_loss(P, N, G, temperature=value)),
        ("temperature", lambda: BSLLoss(value)),
        ("tau_pos", lambda: bilateral_softmax_loss(P, N, tau_pos=value, tau_neg=0.1)),
        ("tau_neg", lambda: bilateral_softmax_loss(P, N, tau_pos=0.1, tau_neg=value)),
        ("tau_pos", lambda: BilateralSoftmaxLoss(value, 0.1)),
        ("tau_neg", lambda: BilateralSoftmaxLoss(0.1, value)),
    ):
        with pytest.raises(ValueError, match=rf"{name} must be a positive finite number, got {value!r}"):
            call()


@pytest.mark.parametrize("power", [math.nan, math.inf, -math.inf])
def test_bad_power(power):
    with pytest.raises(ValueError, match=rf"power must be a finite number, got {power!r}"):
        bsl_loss(P, N, G, temperature=0.1, power=power)
    with pytest.raises(ValueError, match=r"power must be a finite number"):
        BSLLoss(0.1, power)


BAD_ARGUMENTS = [
    (lambda: bsl_loss(P, N, temperature=0.1), r"mode 'multi' needs `user`"),
    (lambda: BSLLoss(0.1)(P, N), r"mode 'multi' needs `user`"),
    (
        lambda: bsl_loss(P, N, G, temperature=0.1, mode="mutli"),
        r"unknown mode 'mutli'; accepted: multi, reweight, single; did you mean 'multi'\?",
    ),
    (lambda: BSLLoss(0.1, mode="both"), r"unknown mode 'both'; accepted: multi, reweight, single"),
    (lambda: bsl_loss(P, N, G, temperature=0.1, reduction="avg"), r"unknown reduction 'avg'"),
    (lambda: bilateral_softmax_loss(P, N, tau_pos=1.0, tau_neg=1.0, reduction="avg"), r"unknown reduction 'avg'"),
    (lambda: bsl_loss(P, N[:3], G, temperature=0.1), r"got \(4,\) and \(3, 5\)"),
    (lambda: bsl_loss(P[:0], N[:0], G[:0], temperature=0.1), "empty batch"),
    (lambda: bsl_loss(P, N[:, :0], G, temperature=0.1), "no columns"),
    (lambda: bilateral_softmax_loss(P, N[:, :0], tau_pos=1.0, tau_neg=1.0), "no columns"),
    (lambda: bsl_loss(P, N, G[:3], temperature=0.1), r"got \(4,\) and \(3,\)"),
    (lambda: bsl_loss(P, N, G.float(), temperature=0.1), r"group ids must be integers, got dtype torch.float32"),
    (lambda: bsl_loss(P.long(), N, G, temperature=0.1), r"pos_score must be a floating-point tensor"),
    (lambda: grouped_log_mean_exp(P[:0], G[:0]), "empty batch"),
    (lambda: grouped_log_mean_exp(N, G), r"got \(4, 5\) and \(4,\)"),
    (lambda: grouped_log_mean_exp(P, G > 1), r"group ids must be integers, got dtype torch.bool"),
    (lambda: in_batch_scores(N, N[:, :3]), r"got \(4, 5\) and \(4, 3\)"),
    (lambda: in_batch_scores(N[:0], N[:0]), "empty batch"),
    (lambda: in_batch_scores(N, N, similarity="l2"), r"unknown similarity 'l2'; accepted: cosine, dot"),
    (lambda: in_batch_scores(N, N.long()), r"pos_emb must be a floating-point tensor"),
]


@pytest.mark.parametrize(("call", "message"), BAD_ARGUMENTS, ids=range(len(BAD_ARGUMENTS)))
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_user_is_ignored_outside_multi():
    for mode in ("single", "reweight"):
        with_user = bsl_loss(_rng(6), _rng(6, 5, seed=1), USER, temperature=0.1, mode=mode)
        assert with_user == bsl_loss(_rng(6), _rng(6, 5, seed=1), temperature=0.1, mode=mode)


# --- module -------------------------------------------------------------------------------------------------------


def test_modules_show_their_options():
    assert repr(BSLLoss(0.1, 1.1)) == "BSLLoss(temperature=0.1, power=1.1, mode='multi', reduction='mean')"
    assert repr(BilateralSoftmaxLoss(0.2, 0.1)) == "BilateralSoftmaxLoss(tau_pos=0.2, tau_neg=0.1, reduction='mean')"


def test_gradient_steps_fit_the_clean_positives_and_give_up_the_noisy_one():
    # One user, three positives along an axis and one against it; negatives are fixed.
    item = F.normalize(torch.tensor([[1.0, 0.1], [1.0, -0.1], [1.0, 0.0], [-1.0, 0.2]], dtype=F64), dim=1)
    neg = F.normalize(_rng(20, 2), dim=1)
    fitted = {}
    for mode in ("multi", "single"):
        user = torch.tensor([0.1, 1.0], dtype=F64, requires_grad=True)
        optimiser = torch.optim.Adam([user], lr=0.05)
        for _ in range(200):
            optimiser.zero_grad()
            direction = F.normalize(user, dim=0)
            scores = (neg @ direction).expand(4, -1)
            loss = bsl_loss(item @ direction, scores, torch.zeros(4, dtype=torch.long), temperature=0.5, mode=mode)
            loss.backward()
            optimiser.step()
        fitted[mode] = (item[:3] @ F.normalize(user.detach(), dim=0)).mean().item()
    assert fitted["multi"] > fitted["single"]


@pytest.mark.slow
@pytest.mark.compile
def test_compiles_into_one_graph():
    def both(p, n):
        return bsl_loss(p, n, USER, temperature=0.2, power=1.1) + bilateral_softmax_loss(
            p, n, USER, tau_pos=0.3, tau_neg=0.2
        )

    pos, neg = _rng(6), _rng(6, 5, seed=1)
    torch.testing.assert_close(torch.compile(both, fullgraph=True)(pos, neg), both(pos, neg))
