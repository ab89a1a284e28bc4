from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ballast_testing.losses import check_loss
from recsys_losses.baselines import bpr_loss
from recsys_losses.ssm import SSMLoss, in_batch_ssm_loss, sampled_softmax_loss, ssm_loss

F64 = torch.float64
score = st.floats(-20.0, 20.0)


def _rng(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _similarity(u, v, similarity):
    product = sum(float(a) * float(b) for a, b in zip(u, v, strict=True))
    if similarity == "dot":
        return product
    length = math.sqrt(sum(float(a) ** 2 for a in u)) * math.sqrt(sum(float(b) ** 2 for b in v))
    return product / length if length > 0 else 0.0


def _row(pos, negatives, include_positive=True):
    denominator = sum(math.exp(n) for n in negatives) + (math.exp(pos) if include_positive else 0.0)
    return -math.log(math.exp(pos) / denominator)


def _reduced(rows, reduction):
    loss = np.array(rows)
    return loss if reduction == "none" else getattr(np, reduction)(loss)


def in_batch_reference(user, pos, log_q=None, item_id=None, *, temperature, similarity="cosine", reduction="mean"):
    rows = []
    for b in range(len(user)):
        logit = [
            _similarity(user[b], pos[c], similarity) / temperature - (0.0 if log_q is None else log_q[c])
            for c in range(len(pos))
        ]
        keep = [c for c in range(len(pos)) if c != b and (item_id is None or item_id[c] != item_id[b])]
        rows.append(_row(logit[b], [logit[c] for c in keep]))
    return _reduced(rows, reduction)


def sampled_reference(
    user, pos, neg, pos_q=None, neg_q=None, mask=None, *, temperature, similarity="cosine", reduction="mean"
):
    rows = []
    for b in range(len(user)):
        own = neg if neg.ndim == 2 else neg[b]
        q = None if neg_q is None else (neg_q if neg_q.ndim == 1 else neg_q[b])
        logit = [
            _similarity(user[b], own[j], similarity) / temperature - (0.0 if q is None else q[j])
            for j in range(len(own))
            if mask is None or mask[b, j]
        ]
        positive = _similarity(user[b], pos[b], similarity) / temperature - (0.0 if pos_q is None else pos_q[b])
        rows.append(_row(positive, logit))
    return _reduced(rows, reduction)


def scores_reference(pos, neg, mask=None, *, temperature, include_positive=True, reduction="mean"):
    rows = []
    for b in range(len(pos)):
        negatives = [neg[b, j] / temperature for j in range(neg.shape[1]) if mask is None or mask[b, j]]
        rows.append(_row(pos[b] / temperature, negatives, include_positive))
    return _reduced(rows, reduction)


# --- the battery --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_battery_in_batch(similarity):
    params = {"temperature": 0.3, "similarity": similarity}
    check_loss(
        in_batch_ssm_loss, [_rng(5, 4), _rng(5, 4, seed=1)], params, in_batch_reference, module=SSMLoss(**params)
    )


def test_battery_in_batch_with_corrections():
    def fn(user, pos, log_q, item_id, **options):
        return in_batch_ssm_loss(user, pos, log_q=log_q, item_id=item_id, **options)

    inputs = [_rng(6, 4), _rng(6, 4, seed=1), _rng(6, seed=2), torch.tensor([9, 2, 9, 4, 2, 7])]
    check_loss(fn, inputs, {"temperature": 0.3}, in_batch_reference, extreme_inputs=(0, 1))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("shape", [(7, 4), (5, 7, 4)])
def test_battery_sampled(similarity, shape):
    params = {"temperature": 0.3, "similarity": similarity}
    inputs = [_rng(5, 4), _rng(5, 4, seed=1), _rng(*shape, seed=2)]
    check_loss(ssm_loss, inputs, params, sampled_reference, module=SSMLoss(**params))


@pytest.mark.parametrize(("shape", "q_shape"), [((7, 4), (7,)), ((7, 4), (5, 7)), ((5, 7, 4), (5, 7))])
def test_battery_sampled_with_corrections(shape, q_shape):
    def fn(user, pos, neg, pos_q, neg_q, mask, **options):
        return ssm_loss(user, pos, neg, pos_log_q=pos_q, neg_log_q=neg_q, neg_mask=mask, **options)

    mask = _rng(5, 7, seed=5) > 0
    mask[3] = False  # a row without negatives has loss 0
    inputs = [_rng(5, 4), _rng(5, 4, seed=1), _rng(*shape, seed=2), _rng(5, seed=3), _rng(*q_shape, seed=4), mask]
    check_loss(fn, inputs, {"temperature": 0.3}, sampled_reference, extreme_inputs=(0, 1, 2))


@pytest.mark.parametrize("include_positive", [True, False])
def test_battery_scores(include_positive):
    def fn(pos, neg, mask, **options):
        return sampled_softmax_loss(pos, neg, neg_mask=mask, **options)

    mask = _rng(5, 7, seed=2) > 0
    mask[:, 3] = True
    params = {"temperature": 0.3, "include_positive": include_positive}
    check_loss(fn, [_rng(5), _rng(5, 7, seed=1), mask], params, scores_reference)
    check_loss(fn, [_rng(5), _rng(5, 7, seed=1), None], params, scores_reference)


# --- relations and limits -----------------------------------------------------------------------------------------


def test_in_batch_equals_cross_entropy():
    user, pos = _rng(9, 4), _rng(9, 4, seed=1)
    dot = in_batch_ssm_loss(user, pos, temperature=0.7, similarity="dot")
    torch.testing.assert_close(dot, F.cross_entropy(user @ pos.T / 0.7, torch.arange(9)))
    cosine = in_batch_ssm_loss(user, pos, temperature=0.1)
    logits = F.normalize(user, dim=1) @ F.normalize(pos, dim=1).T / 0.1
    torch.testing.assert_close(cosine, F.cross_entropy(logits, torch.arange(9)))


def test_in_batch_equals_sampled_with_the_other_rows():
    user, pos = _rng(5, 4), _rng(5, 4, seed=1)
    others = torch.stack([torch.cat([pos[:b], pos[b + 1 :]]) for b in range(5)])
    torch.testing.assert_close(in_batch_ssm_loss(user, pos), ssm_loss(user, pos, others))
    torch.testing.assert_close(in_batch_ssm_loss(user, pos), ssm_loss(user, pos, pos, neg_mask=~torch.eye(5).bool()))


def test_shared_negatives_equal_the_same_negatives_per_row():
    user, pos, neg = _rng(5, 4), _rng(5, 4, seed=1), _rng(6, 4, seed=2)
    torch.testing.assert_close(ssm_loss(user, pos, neg), ssm_loss(user, pos, neg.expand(5, 6, 4)))


@given(pos=score, negatives=st.lists(score, min_size=1, max_size=6), shift=score, temperature=st.floats(0.05, 5.0))
@settings(derandomize=True, deadline=None, max_examples=200)
def test_scores_value_and_gradient_ignore_a_row_constant(pos, negatives, shift, temperature):
    def value_and_gradients(constant):
        p = torch.tensor([pos + constant], dtype=F64, requires_grad=True)
        n = (torch.tensor([negatives], dtype=F64) + constant).requires_grad_()
        loss = sampled_softmax_loss(p, n, temperature=temperature)
        return torch.cat([loss.detach()[None], *(g.flatten() for g in torch.autograd.grad(loss, (p, n)))])

    plain = value_and_gradients(0.0)
    torch.testing.assert_close(value_and_gradients(shift), plain, rtol=1e-8, atol=1e-9)
    assert plain[0] >= 0
    assert plain[0] >= (max(negatives) - pos) / temperature - 1e-9
    assert plain[1:].sum().item() == pytest.approx(0.0, abs=1e-9)  # the gradients of a row sum to 0


@given(scale=st.lists(st.floats(1e-3, 1e3), min_size=8, max_size=8))
@settings(derandomize=True, deadline=None, max_examples=100)
def test_cosine_ignores_positive_rescaling_of_rows(scale):
    factor = torch.tensor(scale, dtype=F64)[:, None]
    user, pos, neg = _rng(4, 3), _rng(4, 3, seed=1), _rng(4, 2, 3, seed=2)
    torch.testing.assert_close(
        in_batch_ssm_loss(user * factor[:4], pos * factor[4:]), in_batch_ssm_loss(user, pos), rtol=1e-9, atol=1e-12
    )
    scaled = ssm_loss(user * factor[:4], pos * factor[4:], neg * factor[:4, None])
    torch.testing.assert_close(scaled, ssm_loss(user, pos, neg), rtol=1e-9, atol=1e-12)


def test_cosine_gradient_is_orthogonal_to_the_row():
    emb = [_rng(5, 4).requires_grad_(), _rng(5, 4, seed=1).requires_grad_(), _rng(5, 6, 4, seed=2).requires_grad_()]
    for gradient, row in zip(torch.autograd.grad(ssm_loss(*emb, temperature=1.0), emb), emb, strict=True):
        assert (gradient * row).sum(-1).abs().max() < 1e-12
        assert gradient.norm(dim=-1).min() > 1e-4


def test_one_negative_is_softplus():
    pos, neg = _rng(6), _rng(6, 1, seed=1)
    loss = sampled_softmax_loss(pos, neg, temperature=0.3)
    torch.testing.assert_close(loss, F.softplus((neg[:, 0] - pos) / 0.3).mean())
    torch.testing.assert_close(loss, bpr_loss(pos / 0.3, neg[:, 0] / 0.3))


def test_large_temperature_weighs_all_columns_the_same():
    pos, neg = _rng(1).requires_grad_(), _rng(1, 4, seed=1).requires_grad_()
    temperature = 1e6
    loss = sampled_softmax_loss(pos, neg, temperature=temperature)
    assert loss.item() == pytest.approx(math.log(5.0), rel=1e-5)
    loss.backward()
    torch.testing.assert_close(temperature * neg.grad, torch.full((1, 4), 0.2, dtype=F64), rtol=1e-4, atol=0)
    assert (temperature * pos.grad).item() == pytest.approx(-0.8, rel=1e-4)
    user, item = _rng(5, 3), _rng(5, 3, seed=1)
    assert in_batch_ssm_loss(user, item, temperature=temperature).item() == pytest.approx(math.log(5.0), rel=1e-5)


def test_small_temperature_is_the_hinge_on_the_hardest_negative():
    pos, neg = _rng(8), _rng(8, 5, seed=1)
    loss = 1e-4 * sampled_softmax_loss(pos, neg, temperature=1e-4, reduction="none")
    torch.testing.assert_close(loss, (neg.amax(1) - pos).clamp_min(0.0), rtol=0, atol=1e-3)


@given(scores=st.lists(score, min_size=2, max_size=12), temperature=st.floats(0.05, 1.0))
@settings(derandomize=True, deadline=None, max_examples=200)
def test_full_softmax_bounds_the_log_rank(scores, temperature):
    pos, neg = torch.tensor(scores[:1], dtype=F64), torch.tensor([scores[1:]], dtype=F64)
    rank = sum(s >= scores[0] for s in scores)
    assert sampled_softmax_loss(pos, neg, temperature=temperature).item() >= math.log(rank) - 1e-9


def test_harder_negatives_weigh_more():
    neg = torch.tensor([[0.9, 0.5, -0.2, 0.7]], dtype=F64, requires_grad=True)
    sampled_softmax_loss(torch.tensor([0.6], dtype=F64), neg, temperature=0.1).backward()
    weight = neg.grad[0]
    assert weight.argsort().tolist() == [2, 1, 3, 0]
    assert (weight[3] / weight[1]).item() == pytest.approx(math.exp(0.2 / 0.1))


def test_gradient_of_a_hard_negative_peaks_below_cosine_one():
    # paper eq. 13: the share of a negative in the user's gradient grows like sqrt(1 - x^2) exp(x / t)
    temperature = 0.1
    cosine = torch.linspace(-0.99, 0.999, 400, dtype=F64)
    length = []
    for x in cosine:
        user = torch.tensor([[1.0, 0.0, 0.0]], dtype=F64, requires_grad=True)
        pos = torch.tensor([[1.0, 0.0, 0.0]], dtype=F64)  # its own gradient with respect to the user is 0
        neg = torch.stack([torch.stack([x, (1 - x * x).sqrt(), x * 0])])
        loss = ssm_loss(user, pos, neg, temperature=temperature)
        denominator = math.exp(1 / temperature) + math.exp(x / temperature)
        length.append(torch.autograd.grad(loss, user)[0].norm() * denominator)
    peak = cosine[torch.stack(length).argmax()].item()
    assert peak == pytest.approx((math.sqrt(temperature**2 + 4) - temperature) / 2, abs=0.006)


def test_in_batch_degenerate_cases():
    user, pos = _rng(1, 4).requires_grad_(), _rng(1, 4, seed=1).requires_grad_()
    loss = in_batch_ssm_loss(user, pos)
    assert loss.item() == 0
    assert all(not g.any() for g in torch.autograd.grad(loss, (user, pos)))
    same = torch.ones(7, 3)
    assert in_batch_ssm_loss(same, same).item() == pytest.approx(math.log(7.0), rel=1e-6)


@pytest.mark.parametrize("neg_ndim", [0, 2, 3])
def test_zero_vector_has_score_zero(neg_ndim):
    emb = [torch.zeros(3, 4, requires_grad=True) for _ in range(2)]
    if neg_ndim == 0:
        loss, columns = in_batch_ssm_loss(*emb), 3
    else:
        emb.append(torch.zeros((5, 4) if neg_ndim == 2 else (3, 5, 4), requires_grad=True))
        loss, columns = ssm_loss(*emb), 6
    assert loss.item() == pytest.approx(math.log(columns), rel=1e-6)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, emb))


# --- corrections --------------------------------------------------------------------------------------------------


def test_constant_log_q_has_no_effect():
    user, pos, neg = _rng(5, 4), _rng(5, 4, seed=1), _rng(6, 4, seed=2)
    constant = torch.full((6,), -3.7, dtype=F64)
    torch.testing.assert_close(in_batch_ssm_loss(user, pos, log_q=constant[:5]), in_batch_ssm_loss(user, pos))
    corrected = ssm_loss(user, pos, neg, pos_log_q=constant[:5], neg_log_q=constant)
    torch.testing.assert_close(corrected, ssm_loss(user, pos, neg))


def test_log_q_takes_the_sampling_law_out():
    # Items drawn twice as often count half: three copies of item 0 (q = 3/4) and one of item 1 equal one copy of each.
    user, pos, items = _rng(3, 4), _rng(3, 4, seed=1), _rng(2, 4, seed=2)
    zero = torch.zeros(3, dtype=F64)
    often = ssm_loss(
        user, pos, items[[0, 0, 0, 1]], pos_log_q=zero, neg_log_q=torch.tensor([3.0, 3.0, 3.0, 1.0], dtype=F64).log()
    )
    torch.testing.assert_close(often, ssm_loss(user, pos, items))


def test_distinct_item_ids_have_no_effect_and_equal_ones_leave_nothing():
    user, pos = _rng(5, 4), _rng(5, 4, seed=1).requires_grad_()
    distinct = in_batch_ssm_loss(user, pos, item_id=torch.tensor([8, 3, 0, 11, -2]))
    torch.testing.assert_close(distinct, in_batch_ssm_loss(user, pos))
    equal = in_batch_ssm_loss(user, pos, item_id=torch.full((5,), 3))
    assert equal.item() == 0
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
        assert not torch.autograd.grad(equal, pos)[0].any()


def test_item_id_hides_exactly_the_accidental_hits():
    user, pos = _rng(4, 3), _rng(4, 3, seed=1)
    loss = in_batch_ssm_loss(user, pos, item_id=torch.tensor([5, 1, 5, 2]), reduction="none")
    mask = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 0]]).bool()
    torch.testing.assert_close(loss, ssm_loss(user, pos, pos, neg_mask=mask, reduction="none"))


def test_masked_negatives_get_no_gradient_even_if_nan():
    pos, neg = _rng(3), _rng(3, 4, seed=1)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[:, 2] = False
    neg[:, 2] = math.nan
    neg.requires_grad_()
    loss = sampled_softmax_loss(pos, neg, neg_mask=mask)
    torch.testing.assert_close(loss, sampled_softmax_loss(pos, neg[:, [0, 1, 3]]))
    gradient = torch.autograd.grad(loss, neg)[0]
    assert gradient[:, 2].tolist() == [0.0, 0.0, 0.0]
    assert gradient.isfinite().all()


# --- numerics -----------------------------------------------------------------------------------------------------


def test_float32_with_a_sharp_temperature_equals_float64():
    # The authors' sampled variants overflow in float32 below t = 0.0114.
    user, pos, neg = _rng(16, 8).float(), _rng(16, 8, seed=1).float(), _rng(40, 8, seed=2).float()
    for fn in (in_batch_ssm_loss, lambda u, p, **k: ssm_loss(u, p, neg.to(u.dtype), **k)):
        single = [x.clone().requires_grad_() for x in (user, pos)]
        double = [x.double().requires_grad_() for x in (user, pos)]
        got, want = fn(*single, temperature=0.005), fn(*double, temperature=0.005)
        assert got.item() == pytest.approx(want.item(), rel=1e-4)
        for g, w in zip(torch.autograd.grad(got, single), torch.autograd.grad(want, double), strict=True):
            assert (g.double() - w).norm() / w.norm() < 1e-4


def test_small_in_batch_losses_keep_relative_precision():
    # Logits of 20 on the diagonal and 0 elsewhere: lse - positive would round 3 exp(-20) = 6e-9 away.
    user = torch.eye(4) * 20
    loss = in_batch_ssm_loss(user, torch.eye(4), temperature=1.0, similarity="dot")
    assert loss.item() == pytest.approx(3 * math.exp(-20.0), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_float32(dtype):
    pos, neg = torch.zeros(2, dtype=dtype), torch.zeros(2, 5000, dtype=dtype)
    loss = sampled_softmax_loss(pos, neg)
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(math.log(5001.0), rel=1e-2)


def test_result_has_the_promoted_dtype():
    user, pos, neg = _rng(3, 4), _rng(3, 4, seed=1), _rng(5, 4, seed=2)
    assert in_batch_ssm_loss(user.float(), pos).dtype == F64
    assert in_batch_ssm_loss(user.bfloat16(), pos.float()).dtype == torch.float32
    assert ssm_loss(user.float(), pos.float(), neg.bfloat16()).dtype == torch.float32
    # corrections don't raise the precision of the result
    assert in_batch_ssm_loss(user.float(), pos.float(), log_q=torch.zeros(3, dtype=F64)).dtype == torch.float32


def test_nan_stays_visible():
    user, pos = _rng(3, 4), _rng(3, 4, seed=1)
    user[1, 0] = math.nan
    assert in_batch_ssm_loss(user, pos, reduction="none").isnan().tolist() == [False, True, False]
    assert ssm_loss(user, pos, pos, reduction="none").isnan().tolist() == [False, True, False]


def test_vmap_equals_a_loop():
    user, pos, neg, q = _rng(3, 4, 5), _rng(3, 4, 5, seed=1), _rng(3, 6, 5, seed=2), _rng(3, 4, seed=3)
    ids = torch.tensor([[0, 1, 0, 2], [3, 3, 3, 3], [1, 2, 3, 4]])

    def in_batch(u, p, n, q, i):
        return in_batch_ssm_loss(u, p, log_q=q, item_id=i)

    def sampled(u, p, n, q, i):
        return ssm_loss(u, p, n, pos_log_q=q)

    def unmasked(u, p, n, q, i):
        return sampled_softmax_loss(q, p, neg_mask=p > 0, include_positive=False, validate=False, reduction="none")

    for fn in (in_batch, sampled, unmasked):
        want = torch.stack([fn(*row) for row in zip(user, pos, neg, q, ids, strict=True)])
        torch.testing.assert_close(torch.vmap(fn)(user, pos, neg, q, ids), want)


def test_nothing_waits_for_the_device():
    # A meta tensor holds no data, so whatever would read a value on the host fails here.
    meta = {"device": "meta"}
    user, pos, neg = (torch.zeros(n, 3, requires_grad=True, **meta) for n in (4, 4, 5))
    q, ids, mask = torch.zeros(5, **meta), torch.zeros(4, dtype=torch.long, **meta), torch.ones(4, 5, **meta).bool()
    in_batch_ssm_loss(user, pos, log_q=q[:4], item_id=ids).backward()
    ssm_loss(user, pos, neg, pos_log_q=q[:4], neg_log_q=q, neg_mask=mask).backward()
    scores = user @ neg.T
    sampled_softmax_loss(scores[:, 0], scores, neg_mask=mask, include_positive=False).backward()
    assert user.grad.shape == user.shape


def test_gradients_under_torch_func():
    user, pos = _rng(4, 3), _rng(4, 3, seed=1).requires_grad_()
    got = torch.func.grad(lambda p: in_batch_ssm_loss(user, p))(pos.detach())
    torch.testing.assert_close(got, torch.autograd.grad(in_batch_ssm_loss(user, pos), pos)[0])


# --- bad input ----------------------------------------------------------------------------------------------------

U, N = torch.zeros(4, 3), torch.zeros(5, 3)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_bad_temperature(temperature):
    for call in (
        lambda: in_batch_ssm_loss(U, U, temperature=temperature),
        lambda: ssm_loss(U, U, N, temperature=temperature),
        lambda: sampled_softmax_loss(torch.zeros(4), torch.zeros(4, 5), temperature=temperature),
        lambda: SSMLoss(temperature),
    ):
        with pytest.raises(ValueError, match=rf"temperature must be a positive finite number, got {temperature!r}"):
            call()


BAD_ARGUMENTS = [
    (lambda: in_batch_ssm_loss(U, U, similarity="cos"), r"unknown similarity 'cos'; accepted: cosine, dot"),
    (lambda: SSMLoss(similarity="euclid"), r"unknown similarity 'euclid'; accepted: cosine, dot"),
    (lambda: ssm_loss(U, U, N, reduction="avg"), r"unknown reduction 'avg'; accepted: mean, none, sum"),
    (lambda: SSMLoss(reduction="avg"), r"unknown reduction 'avg'; accepted: mean, none, sum"),
    (lambda: in_batch_ssm_loss(U, U[:3]), r"got \(4, 3\) and \(3, 3\)"),
    (lambda: in_batch_ssm_loss(U[0], U[0]), r"got \(3,\) and \(3,\)"),
    (lambda: in_batch_ssm_loss(U[:0], U[:0]), "empty batch"),
    (lambda: ssm_loss(U[:0], U[:0], N), "empty batch"),
    (lambda: ssm_loss(U, U, N[:0]), "neg_emb holds no negatives"),
    (lambda: ssm_loss(U, U, N[:, :2]), r"expected neg_emb .* got \(5, 2\) with user_emb \(4, 3\)"),
    (lambda: ssm_loss(U, U, torch.zeros(5, 2, 3)), r"expected neg_emb .* got \(5, 2, 3\) with user_emb \(4, 3\)"),
    (lambda: ssm_loss(U, U, torch.zeros(3)), r"expected neg_emb"),
    (lambda: sampled_softmax_loss(torch.zeros(4), torch.zeros(20)), r"got \(4,\) and \(20,\)"),
    (lambda: sampled_softmax_loss(torch.zeros(0), torch.zeros(0, 2)), "empty batch"),
    (lambda: sampled_softmax_loss(torch.zeros(2), torch.zeros(2, 0)), "no columns"),
    (lambda: in_batch_ssm_loss(U, U, log_q=torch.zeros(5)), r"log_q must have shape \(B,\) = \(4,\), got \(5,\)"),
    (
        lambda: in_batch_ssm_loss(U, U, item_id=torch.zeros(4)),
        r"item_id must hold integers, got dtype torch.float32",
    ),
    (lambda: in_batch_ssm_loss(U, U, item_id=torch.arange(3)), r"item_id must have shape \(B,\) = \(4,\)"),
    (lambda: ssm_loss(U, U, N, pos_log_q=torch.zeros(5)), r"pos_log_q must have shape \(B,\) = \(4,\), got \(5,\)"),
    (
        lambda: ssm_loss(U, U, N, neg_log_q=torch.zeros(4)),
        r"neg_log_q must have shape \(N,\) = \(5,\) or \(B, N\) = \(4, 5\), got \(4,\)",
    ),
    (lambda: ssm_loss(U, U, N, neg_mask=torch.ones(5).bool()), r"neg_mask must have shape \(B, N\) = \(4, 5\)"),
    (lambda: ssm_loss(U, U, N, neg_mask=torch.ones(4, 5)), r"neg_mask must be boolean .* got dtype torch.float32"),
    (lambda: in_batch_ssm_loss(U.long(), U), r"user_emb must be a floating-point tensor, got dtype torch.int64"),
    (lambda: ssm_loss(U, U, N.long()), r"neg_emb must be a floating-point tensor"),
    (lambda: SSMLoss()(U, U, N, item_id=torch.arange(4)), r"item_id can't be used with sampled negatives"),
    (lambda: SSMLoss()(U, U, neg_log_q=torch.zeros(5)), r"neg_log_q can't be used with in-batch negatives"),
]


@pytest.mark.parametrize(("call", "message"), BAD_ARGUMENTS, ids=range(len(BAD_ARGUMENTS)))
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_row_without_a_valid_negative():
    pos, neg, mask = torch.zeros(3), torch.zeros(3, 2), torch.tensor([[True, False], [False, False], [True, True]])
    for validate in (None, True):
        with pytest.raises(ValueError, match="row 1 has no valid negative"):
            sampled_softmax_loss(pos, neg, neg_mask=mask, include_positive=False, validate=validate)
    unchecked = sampled_softmax_loss(
        pos, neg, neg_mask=mask, include_positive=False, validate=False, temperature=1.0, reduction="none"
    )
    assert unchecked.tolist() == pytest.approx([0.0, -math.inf, math.log(2.0)])
    included = sampled_softmax_loss(pos, neg, neg_mask=mask, temperature=1.0, reduction="none")
    assert included.tolist() == pytest.approx([math.log(2.0), 0.0, math.log(3.0)])


# --- module -------------------------------------------------------------------------------------------------------


def test_module_passes_its_corrections_on():
    user, pos, neg = _rng(4, 3), _rng(4, 3, seed=1), _rng(5, 3, seed=2)
    q, ids, mask = _rng(5, seed=3), torch.tensor([1, 1, 2, 3]), _rng(4, 5, seed=4) > 0
    options = {"temperature": 0.3, "similarity": "dot", "reduction": "sum"}
    loss = SSMLoss(0.3, "dot", reduction="sum")
    torch.testing.assert_close(
        loss(user, pos, log_q=q[:4], item_id=ids), in_batch_ssm_loss(user, pos, log_q=q[:4], item_id=ids, **options)
    )
    torch.testing.assert_close(
        loss(user, pos, neg, pos_log_q=q[:4], neg_log_q=q, neg_mask=mask),
        ssm_loss(user, pos, neg, pos_log_q=q[:4], neg_log_q=q, neg_mask=mask, **options),
    )
    assert repr(loss) == "SSMLoss(temperature=0.3, similarity='dot', reduction='sum')"


def test_gradient_steps_lift_the_positives_above_the_negatives():
    user, item = _rng(12, 6).requires_grad_(), _rng(12, 6, seed=1).requires_grad_()
    optimiser = torch.optim.Adam([user, item], lr=0.05)
    before = in_batch_ssm_loss(user, item).item()
    for _ in range(60):
        optimiser.zero_grad()
        in_batch_ssm_loss(user, item).backward()
        optimiser.step()
    cosine = F.normalize(user, dim=1) @ F.normalize(item, dim=1).T
    assert in_batch_ssm_loss(user, item).item() < 0.1 * before
    assert cosine.argmax(1).tolist() == list(range(12))


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:.*torch._prims_common.check:FutureWarning")  # from torch's own lowering of diagonal
def test_compiles_into_one_graph():
    user, pos, neg, ids = _rng(4, 3), _rng(4, 3, seed=1), _rng(5, 3, seed=2), torch.tensor([1, 1, 2, 3])

    def both(u, p, n):
        return in_batch_ssm_loss(u, p, item_id=ids) + ssm_loss(u, p, n)

    torch.testing.assert_close(torch.compile(both, fullgraph=True)(user, pos, neg), both(user, pos, neg))
