from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ballast_testing.distributed import gathered, run_gloo
from ballast_testing.losses import check_loss
from pref_opt.alpha_dpo import AlphaDPOLoss, adaptive_margin, alpha_dpo_loss, alpha_dpo_rewards
from pref_opt.baselines import SimPOLoss, reward_gap, simpo_loss
from pref_opt.losses import Logps, LossContext, make_loss

F64 = torch.float64
TRAIN, EVAL = LossContext(), LossContext(training=False)
OPTIONS = {"beta": 2.5, "gamma_beta_ratio": 0.3, "alpha": 0.2, "gap_mean": 0.1, "gap_std": 0.25}


def _rng(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _logps(n: int, seed: int = 0, dtype: torch.dtype = F64) -> Logps:
    """A micro-batch of means of about -1.5 nats per token, its policy side with gradient."""
    chosen, rejected, ref_chosen, ref_rejected = (-1.5 + 0.3 * _rng(4, n, seed=seed)).to(dtype)
    return Logps(chosen.requires_grad_(), rejected.requires_grad_(), ref_chosen, ref_rejected)


def _four(logps: Logps) -> tuple[torch.Tensor, ...]:
    assert logps.ref_chosen is not None
    assert logps.ref_rejected is not None
    return logps.chosen, logps.rejected, logps.ref_chosen, logps.ref_rejected


def _grads(loss: torch.Tensor, logps: Logps) -> torch.Tensor:
    return torch.stack(torch.autograd.grad(loss, (logps.chosen, logps.rejected)))


# --- the functions ------------------------------------------------------------------------------------------------


def _reference(chosen, rejected, ref_chosen, ref_rejected, *, beta, gamma_beta_ratio, alpha, gap_mean, gap_std, **rest):
    gap = chosen - rejected - (ref_chosen - ref_rejected)
    margin = gamma_beta_ratio + alpha * (gap - gap_mean) / gap_std
    z = beta * (chosen - rejected - margin)
    e = rest.get("label_smoothing", 0.0)
    rows = (1 - e) * np.logaddexp(0, -z) + e * np.logaddexp(0, z)
    return rows if rest.get("reduction") == "none" else rows.mean()


def _slopes(chosen, rejected, ref_chosen, ref_rejected, *, beta, gamma_beta_ratio, alpha, gap_mean, gap_std, **rest):
    """Gradients of the rows' sum with the margin held; finite differences would see it move."""
    gap = chosen - rejected - (ref_chosen - ref_rejected)
    z = beta * (chosen - rejected - gamma_beta_ratio - alpha * (gap - gap_mean) / gap_std)
    e = rest.get("label_smoothing", 0.0)
    slope = beta * (e / (1 + np.exp(-z)) - (1 - e) / (1 + np.exp(z)))
    if rest.get("reduction", "mean") == "mean":
        slope /= len(slope)
    return slope, -slope, None, None


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_battery(label_smoothing):
    check_loss(
        alpha_dpo_loss,
        [t.detach() for t in _four(_logps(6))],
        {**OPTIONS, "label_smoothing": label_smoothing},
        _reference,
        gradient=_slopes,
        detached=(2, 3),
        dtypes={"float32": 1e-5},  # half precision comes back in float32 here, see below
        reductions=("none", "mean"),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    half = _logps(8, dtype=dtype)
    wide = [t.detach().float() for t in _four(half)]
    loss = alpha_dpo_loss(*_four(half), **OPTIONS)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, alpha_dpo_loss(*wide, **OPTIONS))
    margin_options = {key: value for key, value in OPTIONS.items() if key != "beta"}
    assert adaptive_margin(*_four(half), **margin_options).dtype == torch.float32
    rewards = alpha_dpo_rewards(*_four(half), beta=2.5, alpha=0.2)
    assert all(r.dtype == torch.float32 for r in rewards)


def test_alpha_zero_is_simpo_exactly():
    logps = _logps(7)
    for label_smoothing in (0.0, 0.2):
        simpo = simpo_loss(
            logps.chosen, logps.rejected, beta=2.5, gamma_beta_ratio=0.3, label_smoothing=label_smoothing
        )
        ours = alpha_dpo_loss(*_four(logps), **{**OPTIONS, "alpha": 0.0}, label_smoothing=label_smoothing)
        assert torch.equal(ours, simpo)
        assert torch.equal(_grads(ours, logps), _grads(simpo, logps))


def test_a_wide_spread_tends_to_simpo():
    logps = _logps(7)
    simpo = simpo_loss(logps.chosen, logps.rejected, beta=2.5, gamma_beta_ratio=0.3, reduction="none")
    ours = alpha_dpo_loss(*_four(logps), **{**OPTIONS, "gap_std": 1e9}, reduction="none")
    torch.testing.assert_close(ours, simpo, rtol=0, atol=1e-8)


def test_the_margin_has_no_gradient():
    logps = _logps(5)
    refs = [t.clone().requires_grad_() for t in _four(logps)[2:]]
    mean, std = (torch.tensor(x, dtype=F64, requires_grad=True) for x in (0.1, 0.25))
    options = {"gamma_beta_ratio": 0.3, "alpha": 0.2, "gap_mean": mean, "gap_std": std}
    assert not adaptive_margin(logps.chosen, logps.rejected, *refs, **options).requires_grad
    loss = alpha_dpo_loss(logps.chosen, logps.rejected, *refs, beta=2.5, **options)
    assert torch.autograd.grad(loss, [*refs, mean, std], allow_unused=True) == (None, None, None, None)


@given(
    gap=st.lists(st.floats(-5, 5), min_size=2, max_size=12, unique=True),
    alpha=st.floats(0.01, 1.0),
    shift=st.floats(-100, 100),
)
@settings(derandomize=True, deadline=None, max_examples=100)
def test_margins_rise_with_the_gap_and_ignore_a_shift_of_the_reference(gap, alpha, shift):
    values = torch.tensor(sorted(gap), dtype=F64)
    zero = torch.zeros_like(values)
    options = {"gamma_beta_ratio": 0.3, "gap_mean": 0.4, "gap_std": 0.5}
    margin = adaptive_margin(values, zero, zero, zero, alpha=alpha, **options)
    assert (margin.diff() >= 0).all()
    assert margin[-1] > margin[0] or values[-1] - values[0] < 1e-12  # nearer gaps vanish in the rounding
    reverse = adaptive_margin(values, zero, zero, zero, alpha=-alpha, **options)
    torch.testing.assert_close(margin + reverse, torch.full_like(margin, 0.6))
    shifted = adaptive_margin(values, zero, zero + shift, zero + shift, alpha=alpha, **options)
    torch.testing.assert_close(shifted, margin, rtol=1e-9, atol=1e-9)


def test_without_spread_at_the_mean_the_margin_is_gamma():
    same = -_rng(4).abs()
    margin = adaptive_margin(same, same, same, same, gamma_beta_ratio=0.3, alpha=0.2, gap_mean=0.0, gap_std=0.0)
    assert torch.equal(margin, torch.full((4,), 0.3, dtype=F64))


def test_rewards():
    chosen, rejected, ref_chosen, ref_rejected = (torch.tensor([x], dtype=F64) for x in (-1.0, -2.0, -1.5, -1.0))
    rewards = alpha_dpo_rewards(chosen.requires_grad_(), rejected, ref_chosen, ref_rejected, beta=2.0, alpha=0.1)
    assert [r.item() for r in rewards] == pytest.approx([2 * (-1.0 - 0.05), 2 * (-2.0 + 0.1)])
    assert not any(r.requires_grad for r in rewards)


def test_gaps_of_thousands_are_finite_in_float32():
    chosen = torch.tensor([4000.0, -4000.0, 0.0], requires_grad=True)
    zero = torch.zeros(3)
    loss = alpha_dpo_loss(chosen, zero, zero, zero, **OPTIONS)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, chosen)[0].isfinite().all()


# --- the loss object ----------------------------------------------------------------------------------------------


def test_the_object_updates_its_statistics_before_use():
    loss, mean, std = AlphaDPOLoss(beta=2.5, gamma_beta_ratio=0.4, alpha=0.2, label_smoothing=0.1), 0.0, 0.0
    for step in range(4):
        logps = _logps(8, seed=step)
        gap = reward_gap(*_four(logps)).detach()
        mean, std = 0.9 * mean + 0.1 * gap.mean(), 0.9 * std + 0.1 * gap.std()
        out = loss(logps, TRAIN)
        options = {"gamma_beta_ratio": 0.4, "alpha": 0.2, "gap_mean": mean, "gap_std": std}
        expected = alpha_dpo_loss(*_four(logps), beta=2.5, label_smoothing=0.1, **options)
        torch.testing.assert_close(out.loss, expected)
        torch.testing.assert_close(_grads(out.loss, logps), _grads(expected, logps))
        margin = adaptive_margin(*_four(logps), **options)
        wanted = {
            "margin/mean": margin.mean(),
            "margin/min": margin.min(),
            "margin/max": margin.max(),
            "margin/std": margin.std(correction=0),
            "gap_mean": mean,
            "gap_std": std,
        }
        assert set(out.metrics) == set(wanted)
        for name, value in wanted.items():
            torch.testing.assert_close(out.metrics[name], value)
        rewards = alpha_dpo_rewards(*_four(logps), beta=2.5, alpha=0.2)
        assert torch.equal(out.chosen_rewards, rewards[0])
        assert torch.equal(out.rejected_rewards, rewards[1])
    assert loss.state_dict()["num_updates"] == 4


def test_object_with_alpha_zero_is_the_simpo_object():
    ours, simpo = make_loss("alpha_dpo", beta=2.0, gamma_beta_ratio=0.5, alpha=0.0), SimPOLoss(2.0, 0.5)
    assert ours.length_normalized
    assert ours.requires_reference
    for step in range(3):
        logps = _logps(7, seed=step)
        a, b = ours(logps, TRAIN), simpo(logps, TRAIN)
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(_grads(a.loss, logps), _grads(b.loss, logps), rtol=1e-12, atol=0)


@pytest.mark.parametrize("debias", [False, True])
def test_the_first_step_is_simpo_also_with_rounding_noise(debias):
    loss = AlphaDPOLoss(beta=10.0, gamma_beta_ratio=0.4, alpha=0.2, debias=debias)
    for noise in (0.0, 1e-8):
        logps = _logps(8)
        equal = Logps(logps.chosen, logps.rejected, logps.chosen.detach() + noise * _rng(8), logps.rejected.detach())
        out = loss(equal, TRAIN)
        simpo = simpo_loss(logps.chosen, logps.rejected, beta=10.0, gamma_beta_ratio=0.4)
        torch.testing.assert_close(out.loss, simpo, rtol=1e-12, atol=0)
        assert out.metrics["margin/min"] == out.metrics["margin/max"] == 0.4
    moved = loss(_logps(8, seed=3), EVAL)  # still no spread seen: a gap of 0.5 isn't half a million deviations
    assert moved.metrics["margin/min"] == moved.metrics["margin/max"] == 0.4


def test_over_its_own_batch_the_standardised_gap_has_mean_0_and_deviation_1():
    out = AlphaDPOLoss(gamma_beta_ratio=0.3, alpha=0.2, momentum=0.0)(_logps(9), TRAIN)
    assert out.metrics["margin/mean"] == pytest.approx(0.3, abs=1e-12)
    assert out.metrics["margin/std"] * math.sqrt(9 / 8) == pytest.approx(0.2, abs=1e-12)


def test_debias_starts_at_the_batch_itself():
    out = AlphaDPOLoss(gamma_beta_ratio=0.3, alpha=0.2, debias=True)(_logps(9), TRAIN)
    assert out.metrics["margin/mean"] == pytest.approx(0.3, abs=1e-12)
    plain = AlphaDPOLoss(gamma_beta_ratio=0.3, alpha=0.2)(_logps(9), TRAIN)
    assert plain.metrics["margin/std"] == pytest.approx(10 * float(out.metrics["margin/std"]))


def test_evaluation_changes_nothing():
    loss = AlphaDPOLoss(alpha=0.2)
    for step in range(3):
        loss(_logps(8, seed=step), TRAIN)
    before = dict(loss.state_dict())

    def refuse(values):
        raise AssertionError("gathered in evaluation")

    logps = _logps(3, seed=7)
    out = loss(logps, LossContext(training=False, gather=refuse, world_size=2))
    statistics = {"gap_mean": before["mean"], "gap_std": before["std"]}
    expected = alpha_dpo_loss(*_four(logps), beta=2.5, gamma_beta_ratio=0.3, alpha=0.2, **statistics)
    torch.testing.assert_close(out.loss, expected)
    loss(_logps(1), EVAL)  # a single pair is fine here
    assert loss.state_dict() == before


def test_a_resumed_run_repeats_its_losses_exactly():
    def run(loss, steps):
        return [loss(_logps(8, seed=step), TRAIN).loss.item() for step in steps]

    whole = run(AlphaDPOLoss(alpha=0.2, debias=True), range(6))
    loss = AlphaDPOLoss(alpha=0.2, debias=True)
    run(loss, range(3))
    resumed = AlphaDPOLoss(alpha=0.2, debias=True)
    resumed.load_state_dict(loss.state_dict())
    assert run(resumed, range(3, 6)) == whole[3:]
    fresh = AlphaDPOLoss(alpha=0.2, debias=True)
    assert run(fresh, range(3, 6)) != whole[3:]


# --- windows and processes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[4, 4], [3, 3, 2], [8]])
def test_a_window_of_micro_batches_is_one_big_batch(sizes):
    big, small = AlphaDPOLoss(alpha=0.2), AlphaDPOLoss(alpha=0.2, stats_window="step")
    assert small.wants_window
    assert not big.wants_window
    for step in range(3):
        logps = _logps(8, seed=step)
        whole = big(logps, TRAIN)
        parts = [Logps(*parts) for parts in zip(*(t.split(sizes) for t in _four(logps)), strict=True)]
        small.prepare_window([Logps(*(t.detach() for t in _four(part))) for part in parts], TRAIN)
        outs = [small(part, TRAIN) for part in parts]
        small(_logps(2, seed=99), EVAL)  # an evaluation in between doesn't disturb
        loss = sum(out.loss for out in outs) / len(outs)
        torch.testing.assert_close(loss, whole.loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(_grads(loss, logps), _grads(whole.loss, logps), rtol=1e-12, atol=0)
    assert small.state_dict() == big.state_dict()


def test_a_step_window_has_to_be_prepared_in_training_only():
    loss = AlphaDPOLoss(stats_window="step")
    loss(_logps(4), EVAL)
    loss.prepare_window([_logps(4)], EVAL)
    assert loss.state_dict()["num_updates"] == 0
    with pytest.raises(RuntimeError, match="needs prepare_window"):
        loss(_logps(4), TRAIN)
    loss.prepare_window([_logps(4), _logps(4)], TRAIN)
    with pytest.raises(RuntimeError, match="in order"):
        loss(_logps(3), TRAIN)


FEATURES, TARGETS = 5, 8


def trained(rank, world_size, options, micro_batches):
    """Three steps of a linear policy; every process holds its part of the same 8 pairs per step."""
    context = LossContext(gather=gathered, world_size=world_size, process_index=rank)
    loss, theta = AlphaDPOLoss(**options), torch.full((FEATURES,), 0.1, dtype=F64)
    gradients = []
    for step in range(3):
        chosen, rejected = _rng(2, TARGETS, FEATURES, seed=step)
        mine = slice(rank * TARGETS // world_size, (rank + 1) * TARGETS // world_size)
        parts = list(zip(chosen[mine].chunk(micro_batches), rejected[mine].chunk(micro_batches), strict=True))
        theta = theta.detach().requires_grad_()
        zero = torch.zeros(len(parts[0][0]), dtype=F64)
        window = [Logps(c @ theta, r @ theta, zero, zero) for c, r in parts]
        if loss.wants_window:
            loss.prepare_window([Logps(w.chosen.detach(), w.rejected.detach(), zero, zero) for w in window], context)
        outs = [loss(logps, context) for logps in window]
        (gradient,) = torch.autograd.grad(sum(out.loss for out in outs) / len(outs), theta)
        if world_size > 1:
            torch.distributed.all_reduce(gradient)
        gradient /= world_size
        gradients.append(gradient)
        theta = theta - 0.3 * gradient
    state = loss.state_dict()
    return torch.stack(gradients), torch.stack([state["mean"], state["std"]])


VARIANTS = [
    ({"alpha": 0.2}, 1),
    ({"alpha": 0.2, "debias": True, "label_smoothing": 0.1}, 1),
    ({"alpha": 0.5, "stats_window": "step"}, 2),
]


def trained_variants(rank, world_size, variants):
    return [trained(rank, world_size, options, micro_batches) for options, micro_batches in variants]


def test_two_processes_equal_one_with_the_joint_batch():
    first, second = run_gloo(trained_variants, 2, VARIANTS)
    for (options, _), mine, other in zip(VARIANTS, first, second, strict=True):
        alone = trained(0, 1, options, 1)
        for a, b, c in zip(alone, mine, other, strict=True):
            assert torch.equal(b, c)
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, r"beta must be positive .* got 0\.0"),
        ({"gamma_beta_ratio": math.nan}, "gamma_beta_ratio must be a finite number"),
        ({"alpha": math.inf}, "alpha must be a finite number"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0\.5\), got 0\.5"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"stats_window": "steps"}, "did you mean 'step'"),
    ],
)
def test_constructor_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        AlphaDPOLoss(**options)


def test_calls_refuse_bad_input():
    loss = AlphaDPOLoss()
    with pytest.raises(ValueError, match="at least 2 pairs per \\(global\\) micro-batch, got 1"):
        loss(_logps(1), TRAIN)
    with pytest.raises(ValueError, match="ref_chosen and ref_rejected"):
        loss(Logps(torch.zeros(4), torch.zeros(4)), TRAIN)
    broken = torch.tensor([0.0, 0.0, math.nan])
    with pytest.raises(ValueError, match=r"non-finite values, the first at \[2\]"):
        loss(Logps(broken, torch.zeros(3), torch.zeros(3), torch.zeros(3)), TRAIN)
    assert loss.state_dict() == AlphaDPOLoss().state_dict()
    with pytest.raises(ValueError, match="written by another method"):
        loss.load_state_dict({"queue": torch.zeros(3)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": -1.0}, "beta must be positive"),
        ({"gap_std": -0.1}, r"gap_std must be a finite number >= 0, got -0\.1"),
        ({"label_smoothing": 0.5}, "label_smoothing must be"),
        ({"reduction": "sum"}, "reduction must be one of"),
        ({"eps": -1.0}, "eps must be positive"),
    ],
)
def test_function_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        alpha_dpo_loss(*_four(_logps(4)), **{**OPTIONS, **change})


def test_shapes_are_named():
    good, short = torch.zeros(4), torch.zeros(3)
    with pytest.raises(ValueError, match="chosen_logps and rejected_logps must have the same shape"):
        alpha_dpo_loss(good, short, good, good, **OPTIONS)
    with pytest.raises(ValueError, match="must have the same shape"):
        alpha_dpo_rewards(good, good, good, short, beta=1.0, alpha=0.1)


# --- a run --------------------------------------------------------------------------------------------------------


def test_a_run_adapts_its_margins_and_learns_like_simpo():
    """A linear policy on pairs whose order a hidden direction decides."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(16, generator=generator)
    test = torch.randn(2000, 16, generator=generator)
    test *= torch.sign(test @ direction)[:, None]
    accuracy, spreads = {}, []
    for loss in (AlphaDPOLoss(beta=2.5, gamma_beta_ratio=0.4, alpha=0.05), SimPOLoss(beta=2.5, gamma_beta_ratio=0.4)):
        draws = torch.Generator().manual_seed(1)
        theta = torch.zeros(16)
        for step in range(150):
            difference = torch.randn(32, 16, generator=draws)
            difference *= torch.sign(difference @ direction)[:, None]
            theta = theta.detach().requires_grad_()
            zero = torch.zeros(32)
            out = loss(Logps(difference @ theta, zero, zero, zero), TRAIN)
            (gradient,) = torch.autograd.grad(out.loss, theta)
            theta = theta - 0.05 * gradient
            if step >= 30 and isinstance(loss, AlphaDPOLoss):
                spreads.append(out.metrics["margin/std"])
        accuracy[type(loss)] = float(((test @ theta) > 0).float().mean())
    assert torch.stack(spreads).mean() == pytest.approx(0.05, rel=0.25)
    assert accuracy[AlphaDPOLoss] > 0.9
    assert abs(accuracy[AlphaDPOLoss] - accuracy[SimPOLoss]) < 0.03
