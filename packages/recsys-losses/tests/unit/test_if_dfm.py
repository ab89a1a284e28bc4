"""Losses of the delayed-feedback methods and the closed-form update."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ballast_testing.losses import check_loss
from recsys_losses.if_dfm import (
    defer_loss,
    dfm_loss,
    es_dfm_loss,
    es_dfm_pretrain_loss,
    fnc_calibrate,
    fnw_loss,
    fsiw_loss,
    logistic_influence_update,
    ulc_loss,
)

F64 = torch.float64
LABEL = torch.tensor([1, 0, 0, 1, 1, 0, 0])


def _randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


X, A, B = (_randn(7, seed=s) for s in range(3))


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _softplus(x):
    return np.logaddexp(0, x)


def _reduced(rows, reduction):
    return rows if reduction == "none" else getattr(np, reduction)(rows)


# --- the battery: value, gradient, dtypes, extremes, reductions -----------------------------------------------------
# Weights are constants: the gradient is weight x (p - y), which finite differences of the whole loss don't show.


def _weighted(positive, negative):
    """Reference value and gradient of a weighted cross-entropy; the weights are functions of everything given."""

    def value(x, *rest, reduction="mean", **_):
        y, w1, w0 = _split(x, rest)
        return _reduced(y * w1 * _softplus(-x) + (1 - y) * w0 * _softplus(x), reduction)

    def gradient(x, *rest, **_):
        y, w1, w0 = _split(x, rest)
        grad = -y * w1 * _sigmoid(-x) + (1 - y) * w0 * _sigmoid(x)
        return [grad / len(x), *[None] * len(rest)]

    def _split(x, rest):
        y = next(r for r in rest if r.dtype.kind == "i")
        others = [r for r in rest if r.dtype.kind == "f"]
        return y, positive(x, *others), negative(x, *others)

    return value, gradient


def test_battery_fnw():
    value, gradient = _weighted(lambda x: 1 + _sigmoid(x), lambda x: _sigmoid(-x) * (1 + _sigmoid(x)))
    check_loss(fnw_loss, [X, LABEL], {}, value, gradient=gradient)


def test_battery_es_dfm():
    value, gradient = _weighted(lambda x, tn, dp: 1 + _sigmoid(dp), lambda x, tn, dp: (1 + _sigmoid(dp)) * _sigmoid(tn))
    check_loss(es_dfm_loss, [X, LABEL, A, B], {}, value, gradient=gradient, detached=(2, 3))


def test_battery_fsiw():
    value, gradient = _weighted(lambda x, l0, l1: 1 / (_sigmoid(l1) + 1e-3), lambda x, l0, l1: _sigmoid(l0))
    # The inverse weight of a conversion that can't have been seen yet reaches 1 / eps.
    check_loss(fsiw_loss, [X, LABEL, A, B], {"eps": 1e-3}, value, gradient=gradient, detached=(2, 3))


def test_battery_defer():
    def share(x, dp):
        return 0.5 * np.minimum(_sigmoid(dp), _sigmoid(x))

    value, gradient = _weighted(
        lambda x, dp: _sigmoid(x) / (_sigmoid(x) - share(x, dp)),
        lambda x, dp: _sigmoid(-x) / (_sigmoid(-x) + share(x, dp)),
    )
    check_loss(defer_loss, [X, A, LABEL], {}, value, gradient=gradient, detached=(1,))


def test_battery_ulc():
    def target(y, c):
        return np.where(y == 1, 1.0, _sigmoid(c))

    def value(x, y, c, reduction="mean"):
        t = target(y, c)
        return _reduced(t * _softplus(-x) + (1 - t) * _softplus(x), reduction)

    def gradient(x, y, c):
        return [(_sigmoid(x) - target(y, c)) / len(x), None, None]

    check_loss(ulc_loss, [X, LABEL, A], {}, value, gradient=gradient, detached=(2,))


def test_battery_dfm():
    def value(x, r, y, e, reduction="mean"):
        rate, p = _softplus(r), _sigmoid(x)
        converted = _softplus(-x) - np.log(rate) + rate * e
        return _reduced(np.where(y == 1, converted, -np.log(1 - p + p * np.exp(-rate * e))), reduction)

    check_loss(dfm_loss, [X, A, LABEL, B.abs()], {}, value, extreme_inputs=(0, 1))


def test_battery_es_dfm_pretrain():
    delayed = torch.tensor([1, 0, 0, 0, 1, 0, 0])

    def value(tn, dp, c, d):
        mask = (1 - c) + d
        real = mask * (c * _softplus(tn) + (1 - c) * _softplus(-tn))
        return real.sum() / mask.sum() + (d * _softplus(-dp) + (1 - d) * _softplus(dp)).mean()

    check_loss(es_dfm_pretrain_loss, [A, B, LABEL, delayed], {}, value, reductions=())


# --- limits and relations -------------------------------------------------------------------------------------------


def _bce(x, y=LABEL):
    return F.binary_cross_entropy_with_logits(x, y.to(x.dtype))


def test_no_delay_is_plain_cross_entropy():
    never, always = torch.full((7,), -800.0, dtype=F64), torch.full((7,), 800.0, dtype=F64)
    plain = _bce(X)
    torch.testing.assert_close(es_dfm_loss(X, LABEL, always, never), plain)
    torch.testing.assert_close(fsiw_loss(X, LABEL, always, always), plain, rtol=1e-7, atol=0)
    torch.testing.assert_close(defer_loss(X, never, LABEL), plain)
    torch.testing.assert_close(ulc_loss(X, LABEL, never), plain)


def test_dfm_between_zero_and_infinite_age():
    waiting = torch.zeros(7)
    old = dfm_loss(X, A, waiting, torch.full((7,), 1e6, dtype=F64))
    torch.testing.assert_close(old, _bce(X, waiting))
    x, r = X.clone().requires_grad_(), A.clone().requires_grad_()
    new = dfm_loss(x, r, waiting, torch.zeros(7), reduction="none")
    assert new.abs().max() < 1e-15
    assert torch.cat(torch.autograd.grad(new.sum(), (x, r))).abs().max() < 1e-15


@given(age=st.floats(0, 100), later=st.floats(0, 100), x=st.floats(-20, 20), r=st.floats(-20, 20))
@settings(derandomize=True, deadline=None, max_examples=100)
def test_dfm_of_a_waiting_click_grows_with_its_age(age, later, x, r):
    rows = [torch.full((2,), value, dtype=F64) for value in (x, r)]
    loss = dfm_loss(*rows, torch.zeros(2), torch.tensor([age, age + later], dtype=F64), reduction="none")
    assert 0 <= loss[0] <= loss[1] + 1e-12
    assert loss[1] <= F.softplus(rows[0][0]) + 1e-9


def test_dfm_of_a_slow_conversion_stays_finite():
    # softplus(-120) is 0 in float32, its logarithm is -120
    x = torch.zeros(1, requires_grad=True)
    rate = torch.tensor([-120.0], requires_grad=True)
    loss = dfm_loss(x, rate, torch.ones(1), torch.ones(1))
    assert loss.item() == pytest.approx(math.log(2) + 120)
    assert torch.autograd.grad(loss, rate)[0].item() == pytest.approx(-1.0)


def test_dfm_recovers_probability_and_rate():
    # What nobody can read off the observed labels: 60 % convert, but only half of them within a day.
    generator = torch.Generator().manual_seed(0)
    converts = torch.rand(20_000, generator=generator) < 0.6
    delay = -torch.rand(20_000, generator=generator).log() / 0.7
    label = converts & (delay < 1.0)
    elapsed = torch.where(label, delay, 1.0)
    theta = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = dfm_loss(*(t.expand(20_000) for t in theta), label, elapsed)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert theta[0].sigmoid().item() == pytest.approx(0.6, abs=0.05)
    assert F.softplus(theta[1]).item() == pytest.approx(0.7, abs=0.1)
    assert label.float().mean() < 0.35


def _expected_gradient(p, loss, *shares):
    """Gradient, at the true probability, of the mean loss over a stream with the given shares of labels."""
    x = torch.tensor([p], dtype=F64).logit().requires_grad_()
    total = sum(share * loss(x, torch.tensor([label])) for label, share in shares)
    return torch.autograd.grad(total, x)[0].item()


@given(p=st.floats(0.02, 0.9), late=st.floats(0.0, 1.0))
@settings(derandomize=True, deadline=None, max_examples=30)
def test_streams_are_weighted_back_to_the_true_probability(p, late):
    """With weights that know the truth, the expected gradient over the stream vanishes at the true conversion rate."""
    dp = p * late  # converts after the window
    real = torch.tensor([(1 - p) / (1 - p + dp)], dtype=F64).logit(1e-15)
    delayed = torch.tensor([dp], dtype=F64).logit(1e-15)
    streams = {
        # every click once with the label of the window, delayed conversions once more
        "es-dfm": (lambda x, y: es_dfm_loss(x, y, real, delayed), (1, p), (0, 1 - p + dp)),
        # every click twice: at the window and at the end
        "defer": (lambda x, y: defer_loss(x, delayed, y), (1, p - dp + p), (0, 1 - p + dp + 1 - p)),
        # every click as 0 at once, conversions again as 1
        "fnw": (fnw_loss, (1, p), (0, 1.0)),
    }
    for name, (loss, *shares) in streams.items():
        assert abs(_expected_gradient(p, loss, *shares)) < 1e-9, name
        plain = _expected_gradient(p, lambda x, y: F.binary_cross_entropy_with_logits(x, y.double()), *shares)
        assert plain > 0.99 * p * dp - 1e-12, name  # unweighted, the stream teaches too little


def test_fnc_inverts_the_share_of_the_stream():
    p = torch.linspace(0, 0.99, 50, dtype=F64)
    torch.testing.assert_close(fnc_calibrate(p / (1 + p)), p, rtol=1e-6, atol=0)
    assert fnc_calibrate(torch.tensor([0.7])).item() == 1.0
    assert fnc_calibrate(torch.tensor([0.7]), clip=False).item() == pytest.approx(0.7 / 0.3)
    assert fnc_calibrate(torch.tensor([0.2], dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_pretraining_ignores_conversions_inside_the_window():
    tn, dp = A.clone().requires_grad_(), B.clone()
    nothing = torch.zeros(7)
    es_dfm_pretrain_loss(tn, dp, torch.ones(7), nothing).backward()
    assert not tn.grad.any()


# --- bad input ------------------------------------------------------------------------------------------------------

Z = torch.zeros(3)
BAD = [
    (lambda: fnw_loss(Z, torch.tensor([0, 1, 2])), "label must hold 0 and 1 only"),
    (lambda: fnw_loss(Z, torch.tensor([0.0, 0.5, 1.0])), "label must hold 0 and 1 only"),
    (lambda: fnw_loss(Z, torch.zeros(2)), r"label \(2,\), logits \(3,\)"),
    (lambda: fnw_loss(Z[:0], Z[:0]), "empty batch"),
    (lambda: fnw_loss(Z.long(), Z), "logits must be a floating-point tensor"),
    (lambda: fnw_loss(Z, Z, "avg"), "unknown reduction 'avg'"),
    (lambda: fnc_calibrate(Z, eps=0.0), "eps must be a positive finite number, got 0.0"),
    (lambda: fnc_calibrate(Z.long()), "biased_probability must be a floating-point tensor"),
    (lambda: dfm_loss(Z, Z, Z, torch.tensor([0.0, -1.0, 1.0])), "elapsed must be finite times >= 0"),
    (lambda: dfm_loss(Z, Z, Z, torch.full((3,), math.nan)), "elapsed must be finite"),
    (lambda: dfm_loss(Z, Z, Z, torch.zeros(2)), r"expected elapsed \(3,\), got \(2,\)"),
    (lambda: es_dfm_loss(Z, Z, Z, torch.zeros(3, 1)), r"dp_logits \(3, 1\)"),
    (lambda: es_dfm_pretrain_loss(Z, Z, Z, torch.ones(3)), "delayed must be 0 where converted is 0"),
    (lambda: es_dfm_pretrain_loss(Z, Z, Z + 2, Z), "converted must hold 0 and 1 only"),
    (lambda: fsiw_loss(Z, Z, Z, Z, eps=-1.0), "eps must be a positive finite number"),
    (lambda: defer_loss(Z, Z[:2], Z), r"dp_logits \(2,\)"),
    (lambda: ulc_loss(Z, Z - 1, Z), "label must hold 0 and 1 only"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=range(len(BAD)))
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_values_are_not_looked_at_without_validation():
    wrong = torch.full((3,), 2.0)
    for loss in (
        fnw_loss(Z, wrong, validate=False),
        dfm_loss(Z, Z, Z, wrong, validate=False),
        ulc_loss(Z, wrong, Z, validate=False),
    ):
        assert loss.isfinite()


# --- logistic regression --------------------------------------------------------------------------------------------


def _problem(n=60, d=3, seed=0):
    x = _randn(n, d, seed=seed)
    y = (x @ torch.ones(d, dtype=F64) + _randn(n, seed=seed + 1) > 0.5).double()
    return x, y


def _fit(x, y, l2):
    """Newton's minimiser of the mean cross-entropy plus l2 / 2 |theta|^2, bias last."""
    rows = torch.cat([x, torch.ones(len(x), 1, dtype=F64)], 1)
    theta = torch.zeros(rows.shape[1], dtype=F64)
    for _ in range(50):
        p = (rows @ theta).sigmoid()
        gradient = rows.T @ (p - y) / len(y) + l2 * theta
        hessian = rows.T @ (rows * (p * (1 - p)).unsqueeze(1)) / len(y) + l2 * torch.eye(len(theta), dtype=F64)
        theta = theta - torch.linalg.solve(hessian, gradient)
    return theta


def _update(x, y, theta, flipped, **options):
    return logistic_influence_update(x, y, theta[:-1], float(theta[-1]), flipped, **options)


def _delta(update):
    return torch.cat([update.delta_weight, update.delta_bias.reshape(1)])


def _negatives(y, count):
    return (y == 0).nonzero().squeeze(1)[:count].tolist()


@pytest.mark.parametrize("count", [1, 2])
def test_a_flip_moves_towards_the_refitted_model(count):
    x, y = _problem(n=400)
    theta, flipped = _fit(x, y, 0.01), _negatives(y, count)
    corrected = y.clone()
    corrected[flipped] = 1.0
    exact = _fit(x, corrected, 0.01) - theta
    update = _update(x, y, theta, flipped, damping=0.01)
    assert (_delta(update) - exact).norm() < 0.1 * exact.norm()
    torch.testing.assert_close(update.new_weight, theta[:-1] + update.delta_weight)
    torch.testing.assert_close(update.new_bias, theta[-1] + update.delta_bias)


def test_the_error_of_one_flip_is_second_order():
    # Twice the data, half the part that flips, a quarter of the error.
    errors = []
    x, y = _problem(n=100)
    for copies in (1, 2, 4):
        rows, labels = x.repeat(copies, 1), y.repeat(copies)
        theta, flipped = _fit(rows, labels, 0.01), _negatives(y, 1)
        corrected = labels.clone()
        corrected[flipped] = 1.0
        errors.append(
            (_delta(_update(rows, labels, theta, flipped, damping=0.01)) - (_fit(rows, corrected, 0.01) - theta)).norm()
        )
    assert errors[0] / errors[1] > 3
    assert errors[1] / errors[2] > 3


def test_added_rows_in_the_hessian_come_closer_to_retraining():
    x, y = _problem(n=300)
    old, new = slice(0, 200), slice(200, 300)
    theta = _fit(x[old], y[old], 0.01)
    # n stays that of the training rows: the objective is the sum over all rows divided by it
    exact = _fit(x, y, 0.01 * 200 / 300) - theta
    errors = {
        include: (
            _delta(
                logistic_influence_update(
                    x[old],
                    y[old],
                    theta[:-1],
                    float(theta[-1]),
                    [],
                    x[new],
                    y[new],
                    damping=0.01,
                    include_added_in_hessian=include,
                )
            )
            - exact
        ).norm()
        for include in (False, True)
    }
    assert errors[True] < 0.5 * errors[False]


def test_scaled_curvature_and_damping():
    x, y = _problem()
    theta, flipped = _fit(x, y, 0.0), _negatives(y, 3)
    full, half = (_delta(_update(x, y, theta, flipped, curvature_scale=c)) for c in (1.0, 0.5))
    torch.testing.assert_close(half, 2 * full)
    heavy = _update(x, y, theta, flipped, damping=1e9)
    torch.testing.assert_close(_delta(heavy), heavy.rhs / 1e9, rtol=1e-6, atol=0)


def test_flips_add_up_and_nothing_changes_nothing():
    x, y = _problem()
    theta, flipped = _fit(x, y, 0.01), _negatives(y, 4)
    parts = [_delta(_update(x, y, theta, [row], damping=0.01)) for row in flipped]
    torch.testing.assert_close(_delta(_update(x, y, theta, flipped, damping=0.01)), sum(parts))
    nothing = _update(torch.zeros(60, 3, dtype=F64), y, theta, [])  # a singular system that nobody solves
    assert not _delta(nothing).any()
    torch.testing.assert_close(nothing.new_weight, theta[:-1])


def test_float32_stays_float32():
    x, y = _problem()
    theta = _fit(x, y, 0.01)
    exact = _update(x, y, theta, _negatives(y, 2), damping=0.01)
    single = _update(x.float(), y.float(), theta.float(), _negatives(y, 2), damping=0.01)
    assert single.delta_weight.dtype == single.new_bias.dtype == torch.float32
    torch.testing.assert_close(single.delta_weight.double(), exact.delta_weight, rtol=1e-3, atol=1e-6)


LX, LY, LT = *_problem(n=6), torch.zeros(4, dtype=F64)
LY[0], LY[1] = 0.0, 1.0
BAD_LOGISTIC = [
    (lambda: _update(LX, LY, LT, [1]), "row 1 is already positive"),
    (lambda: _update(LX, LY, LT, [6]), r"flipped must lie in 0..5, got 6"),
    (lambda: _update(LX, LY, LT, [-1]), r"flipped must lie in 0..5, got -1"),
    (lambda: _update(LX, LY, LT, [0, 0]), "names a row twice"),
    (lambda: _update(LX, LY + 1, LT, [0]), "labels must hold 0 and 1 only"),
    (lambda: _update(LX, LY[:5], LT, [0]), r"got \(6, 3\), \(5,\) and \(3,\)"),
    (lambda: _update(LX.repeat(1, 2), LY, torch.zeros(7, dtype=F64), [0]), "singular.*damping"),
    (lambda: _update(LX, LY, LT, [0], damping=-1.0), "damping must be a finite number >= 0, got -1.0"),
    (lambda: _update(LX, LY, LT, [0], curvature_scale=0.0), "curvature_scale must be a positive finite number"),
    (lambda: _update(LX, LY, LT, [0], added_features=LX), "belong together"),
    (lambda: _update(LX, LY, LT, [0], added_features=LX, added_labels=LY[:2]), r"expected added_features \(m, 3\)"),
    (lambda: _update(LX, LY, LT, [0], added_features=LX, added_labels=LY - 1), "added_labels must hold 0 and 1"),
]


@pytest.mark.parametrize(("call", "message"), BAD_LOGISTIC, ids=range(len(BAD_LOGISTIC)))
def test_bad_logistic_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
