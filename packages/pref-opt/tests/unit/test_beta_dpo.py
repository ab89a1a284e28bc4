from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ballast_testing.distributed import gathered, run_gloo
from pref_opt.baselines import DPOLoss, dpo_loss, reward_gap
from pref_opt.beta_dpo import (
    BetaDPOLoss,
    beta_dpo_loss,
    dynamic_beta,
    filter_weights,
    num_keep,
    sample_keep_mask,
)
from pref_opt.losses import Logps, LossContext, make_loss

F64 = torch.float64
TRAIN, EVAL = LossContext(), LossContext(training=False)


def _rng(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _logps(n: int, seed: int = 0, spread: float = 4.0, dtype: torch.dtype = F64) -> Logps:
    """A micro-batch of sums of about -60 nats, its policy side with gradient."""
    chosen, rejected, ref_chosen, ref_rejected = (-60 + spread * _rng(4, n, seed=seed)).to(dtype)
    return Logps(chosen.requires_grad_(), rejected.requires_grad_(), ref_chosen, ref_rejected)


def _four(logps: Logps) -> tuple[torch.Tensor, ...]:
    assert logps.ref_chosen is not None
    assert logps.ref_rejected is not None
    return logps.chosen, logps.rejected, logps.ref_chosen, logps.ref_rejected


def _grads(loss: torch.Tensor, logps: Logps) -> torch.Tensor:
    return torch.stack(torch.autograd.grad(loss, (logps.chosen, logps.rejected)))


def _with_gap(gap: torch.Tensor) -> Logps:
    zero = torch.zeros_like(gap)
    return Logps(gap.clone().requires_grad_(), zero.clone().requires_grad_(), zero, zero)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the functions ------------------------------------------------------------------------------------------------


def test_without_scale_and_filter_it_is_dpo():
    logps = _logps(9)
    ours = beta_dpo_loss(*_four(logps), keep_mask=torch.ones(9, dtype=torch.bool), beta=0.2, scale=0.0, gap_mean=3.0)
    dpo = dpo_loss(*_four(logps), beta=0.2)
    torch.testing.assert_close(ours, dpo, rtol=1e-12, atol=0)
    torch.testing.assert_close(_grads(ours, logps), _grads(dpo, logps), rtol=1e-12, atol=0)


def test_the_loss_is_the_mean_over_kept_pairs_at_a_constant_beta():
    logps = _logps(6)
    keep = torch.tensor([True, False, True, True, False, True])
    gap = reward_gap(*_four(logps)).detach()
    mean = float(gap[keep].mean()) - 0.7
    beta = torch.tensor(0.1 * (1 + 0.6 * 0.7), dtype=F64)
    loss = beta_dpo_loss(*_four(logps), keep_mask=keep, beta=0.1, scale=0.6, gap_mean=mean)
    torch.testing.assert_close(loss, -torch.nn.functional.logsigmoid(beta * gap[keep]).mean())
    slope = torch.where(keep, beta * torch.sigmoid(-beta * gap) / 4, 0.0)
    torch.testing.assert_close(_grads(loss, logps), torch.stack([-slope, slope]))


def test_a_batch_without_kept_pairs_gives_zero_with_a_graph():
    logps = _logps(3)
    loss = beta_dpo_loss(*_four(logps), keep_mask=torch.zeros(3, dtype=torch.bool), beta=0.1, scale=0.6, gap_mean=1.0)
    assert loss.item() == 0.0
    assert torch.equal(_grads(loss, logps), torch.zeros(2, 3, dtype=F64))


def test_what_the_filter_drops_does_not_matter_even_if_infinite():
    gap = torch.tensor([1.0, 2.0, math.inf], dtype=F64)
    keep = torch.tensor([True, True, False])
    logps = _with_gap(gap)
    loss = beta_dpo_loss(*_four(logps), keep_mask=keep, beta=0.1, scale=0.6, gap_mean=1.0)
    assert loss.isfinite()
    assert _grads(loss, logps).isfinite().all()


def test_beta_rises_with_the_kept_mean_and_stops_at_its_minimum():
    keep = torch.tensor([True, True, True, False])
    shifts = torch.linspace(-8, 8, 33, dtype=F64)
    gap = torch.tensor([0.5, -0.5, 0.0, 99.0], dtype=F64)
    betas = torch.stack([dynamic_beta(gap + s, keep, beta=0.1, scale=0.6, gap_mean=0.0) for s in shifts])
    assert (betas.diff() >= 0).all()
    assert (betas >= 1e-3).all()
    assert (betas[:10] == 1e-3).all()
    assert (betas[16:].diff() > 0).all()
    torch.testing.assert_close(betas[16], torch.tensor(0.1, dtype=F64))
    mean, learnt = torch.zeros((), dtype=F64, requires_grad=True), gap.requires_grad_()
    assert not dynamic_beta(learnt, keep, beta=0.1, scale=0.6, gap_mean=mean).requires_grad
    assert not filter_weights(learnt, gap_mean=mean, gap_std=1.0).requires_grad


def test_permuting_pairs_permutes_gradients():
    logps, order = _logps(8), torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    keep = torch.tensor([True] * 5 + [False] * 3)
    options = {"beta": 0.1, "scale": 0.6, "gap_mean": 0.5}
    gradients = _grads(beta_dpo_loss(*_four(logps), keep_mask=keep, **options), logps)
    moved = Logps(*(t.detach()[order].requires_grad_(t.requires_grad) for t in _four(logps)))
    permuted = _grads(beta_dpo_loss(*_four(moved), keep_mask=keep[order], **options), moved)
    torch.testing.assert_close(permuted, gradients[:, order])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    half = _logps(8, dtype=dtype)
    wide = Logps(*(t.detach().float() for t in _four(half)))
    options = {"keep_mask": torch.ones(8, dtype=torch.bool), "beta": 0.1, "scale": 0.6, "gap_mean": 0.5}
    loss = beta_dpo_loss(*_four(half), **options)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, beta_dpo_loss(*_four(wide), **options))


def test_gaps_of_thousands_of_nats_are_finite():
    logps = _with_gap(torch.tensor([4000.0, -4000.0, 0.0]))
    loss = beta_dpo_loss(*_four(logps), keep_mask=torch.ones(3, dtype=torch.bool), beta=0.1, scale=0.0, gap_mean=0.0)
    torch.testing.assert_close(loss, torch.tensor((400 + math.log(2)) / 3))
    assert _grads(loss, logps).isfinite().all()


# --- the filter ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pairs", "ratio", "kept"), [(8, 0.2, 6), (2, 0.2, 1), (1, 0.2, 0), (5, 0.0, 5), (10, 0.9, 0)])
def test_num_keep_rounds_down(pairs, ratio, kept):
    assert num_keep(pairs, ratio) == kept


@given(
    gap=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40),
    std=st.sampled_from([0.0, 1e-9, 1e-3, 1.0, 1e4]),
    ratio=st.sampled_from([0.0, 0.2, 0.5, 0.9]),
    dtype=st.sampled_from([torch.float32, F64]),
)
@settings(derandomize=True, deadline=None, max_examples=150)
def test_the_mask_always_has_the_right_number(gap, std, ratio, dtype):
    values = torch.tensor(gap, dtype=dtype)
    mask = sample_keep_mask(values, gap_mean=0.0, gap_std=std, filter_ratio=ratio, generator=_generator(0))
    assert mask.dtype == torch.bool
    assert int(mask.sum()) == num_keep(len(gap), ratio)


def test_one_pair_is_kept_with_probability_proportional_to_its_weight():
    gap = torch.tensor([0.0, 0.5, 1.0, 1.8], dtype=F64)
    weights = filter_weights(gap, gap_mean=0.0, gap_std=1.0)
    generator, draws = _generator(0), 4000
    kept = sum(
        sample_keep_mask(gap, gap_mean=0.0, gap_std=1.0, filter_ratio=0.75, generator=generator).to(F64)
        for _ in range(draws)
    )
    expected = weights / weights.sum()
    assert ((kept / draws - expected).abs() < 5 * (expected * (1 - expected) / draws).sqrt()).all()


def test_inclusion_rises_with_the_weight_and_far_outliers_are_dropped():
    gap = torch.cat([torch.linspace(-2, 2, 31, dtype=F64), torch.tensor([20.0], dtype=F64)])  # N = 32, m = 0, s = 1
    generator = _generator(1)
    masks = torch.stack(
        [sample_keep_mask(gap, gap_mean=0.0, gap_std=1.0, generator=generator).to(F64) for _ in range(1000)]
    )
    inclusion = masks.mean(0)
    assert (masks.sum(1) == 25).all()
    assert inclusion[-1] < 0.01
    groups = [inclusion[gap.abs() < 0.7], inclusion[(gap.abs() >= 0.7) & (gap.abs() < 1.4)], inclusion[[0, 1, 29, 30]]]
    means = [float(group.mean()) for group in groups]
    assert means[0] > means[1] + 0.02
    assert means[1] > means[2] + 0.05


def test_where_all_weights_underflow_the_draw_still_follows_them():
    # exp(-z^2 / 2) is 0 in float32 for all; the first is e^200 times as likely as the second.
    gap = torch.tensor([20.0, 28.3, 400.0, 500.0])
    assert torch.equal(filter_weights(gap, gap_mean=0.0, gap_std=1.0)[2:], torch.zeros(2))
    for seed in range(20):
        options = {"gap_mean": 0.0, "gap_std": 1.0, "filter_ratio": 0.5, "generator": _generator(seed)}
        assert sample_keep_mask(gap, **options).tolist() == [True, True, False, False]


@pytest.mark.parametrize("std", [0.0, 1e-7, torch.tensor(0.0)])
def test_without_spread_the_filter_is_uniform(std):
    gap = torch.tensor([0.0, 0.0, 5.0, 0.0])
    assert torch.equal(filter_weights(gap, gap_mean=0.0, gap_std=std), torch.ones(4))
    generator = _generator(0)
    kept = sum(
        sample_keep_mask(gap, gap_mean=0.0, gap_std=std, filter_ratio=0.5, generator=generator).float()
        for _ in range(1000)
    )
    assert ((kept / 1000 - 0.5).abs() < 0.08).all()


def test_equal_generators_draw_equal_masks_in_both_precisions():
    gap = 3 * _rng(50)
    single, double = (
        sample_keep_mask(values, gap_mean=0.1, gap_std=2.0, generator=_generator(5)) for values in (gap.float(), gap)
    )
    assert torch.equal(single, double)


# --- the loss object ----------------------------------------------------------------------------------------------


def test_the_object_updates_then_draws_then_sets_beta():
    loss, mean, std = BetaDPOLoss(beta=0.1, scale=0.6, filter_ratio=0.25), 0.0, 0.0
    for step in range(4):
        logps = _logps(8, seed=step)
        gap = reward_gap(*_four(logps)).detach()
        mean, std = 0.9 * mean + 0.1 * gap.mean(), 0.9 * std + 0.1 * gap.std()
        out = loss(logps, TRAIN)
        torch.testing.assert_close(out.metrics["gap_mean"], mean)
        torch.testing.assert_close(out.metrics["gap_std"], std)
        gradients = _grads(out.loss, logps)
        keep = gradients[0] != 0
        assert int(keep.sum()) == 6
        beta = dynamic_beta(gap, keep, beta=0.1, scale=0.6, gap_mean=mean)
        torch.testing.assert_close(out.metrics["beta_used"], beta)
        expected = beta_dpo_loss(*_four(logps), keep_mask=keep, beta=0.1, scale=0.6, gap_mean=mean)
        torch.testing.assert_close(out.loss, expected)
        torch.testing.assert_close(gradients, _grads(expected, logps))
        assert out.metrics["kept_fraction"] == 0.75
        assert out.metrics["gap/max"] == gap.max()
        torch.testing.assert_close(out.chosen_rewards, 0.1 * (logps.chosen - logps.ref_chosen).detach())
        torch.testing.assert_close(out.rejected_rewards, 0.1 * (logps.rejected - logps.ref_rejected).detach())
    assert loss.state_dict()["num_updates"] == 4


def test_both_switches_off_are_dpo():
    ours, dpo = make_loss("beta_dpo", beta=0.3, scale=0.0, filter_ratio=0.0), DPOLoss(beta=0.3)
    for step in range(3):
        logps = _logps(7, seed=step)
        a, b = ours(logps, TRAIN), dpo(logps, TRAIN)
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(_grads(a.loss, logps), _grads(b.loss, logps), rtol=1e-12, atol=0)
        torch.testing.assert_close(a.chosen_rewards, b.chosen_rewards)


def test_the_first_step_has_policy_and_reference_equal():
    values = _logps(8).chosen.detach().float()
    kept = torch.zeros(8)
    for seed in range(200):
        logps = Logps(values.clone().requires_grad_(), values.clone().requires_grad_(), values, values)
        out = BetaDPOLoss(filter_ratio=0.5, seed=seed)(logps, TRAIN)
        assert out.loss.item() == pytest.approx(math.log(2), rel=1e-6)
        kept += _grads(out.loss, logps)[0] != 0
    assert ((kept / 200 - 0.5).abs() < 0.18).all()


def test_draws_differ_between_updates_and_seeds_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()

    def masks(seed):
        loss, found = BetaDPOLoss(filter_ratio=0.5, momentum=0.0, seed=seed), []
        for _ in range(3):
            logps = _logps(12, seed=9)
            found.append(tuple((_grads(loss(logps, TRAIN).loss, logps)[0] != 0).tolist()))
        return found

    assert masks(0) == masks(0)
    assert len(set(masks(0) + masks(1))) == 6
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_changes_nothing_and_filters_nothing():
    loss = BetaDPOLoss(beta=0.2)
    for step in range(3):
        loss(_logps(8, seed=step), TRAIN)
    before = dict(loss.state_dict())

    def refuse(values):
        raise AssertionError("gathered in evaluation")

    logps = _logps(3, seed=7)
    out = loss(logps, LossContext(training=False, gather=refuse, world_size=2))
    torch.testing.assert_close(out.loss, dpo_loss(*_four(logps), beta=0.2))
    assert out.metrics["kept_fraction"] == 1
    assert out.metrics["beta_used"] == pytest.approx(0.2)
    loss(_logps(1), EVAL)  # a single pair is fine here
    assert loss.state_dict() == before
    twin = BetaDPOLoss(beta=0.2)
    twin.load_state_dict(before)
    assert torch.equal(loss(_logps(8, seed=8), TRAIN).loss, twin(_logps(8, seed=8), TRAIN).loss)


def test_a_resumed_run_repeats_beta_and_masks_exactly():
    def run(loss, steps):
        found = []
        for step in steps:
            logps = _logps(8, seed=step)
            out = loss(logps, TRAIN)
            found.append((out.metrics["beta_used"], out.loss.detach(), _grads(out.loss, logps)))
        return found

    options = {"debias": True, "filter_ratio": 0.4}
    whole = run(BetaDPOLoss(**options), range(6))
    loss = BetaDPOLoss(**options)
    run(loss, range(3))
    resumed = BetaDPOLoss(**options)
    resumed.load_state_dict(loss.state_dict())
    for expected, got in zip(whole[3:], run(resumed, range(3, 6)), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_debias_and_first_batch_start_at_the_batch_itself():
    gap = torch.tensor([2.0, 4.0, 6.0, 8.0], dtype=F64)
    for options in ({"debias": True}, {"init_from_first_batch": True}):
        out = BetaDPOLoss(filter_ratio=0.0, **options)(_with_gap(gap), TRAIN)
        torch.testing.assert_close(out.metrics["gap_mean"], gap.mean())
        torch.testing.assert_close(out.metrics["gap_std"], gap.std())
        torch.testing.assert_close(out.metrics["beta_used"], torch.tensor(0.1, dtype=F64))


def test_the_first_batch_is_the_first_with_any_spread():
    loss = BetaDPOLoss(init_from_first_batch=True)
    gap = torch.tensor([2.0, 4.0, 6.0, 8.0], dtype=F64)
    loss(_with_gap(torch.zeros(4, dtype=F64)), TRAIN)
    torch.testing.assert_close(loss(_with_gap(gap), TRAIN).metrics["gap_mean"], gap.mean())
    third = loss(_with_gap(gap + 1), TRAIN).metrics
    torch.testing.assert_close(third["gap_mean"], gap.mean() + 0.1)
    torch.testing.assert_close(third["gap_std"], gap.std())


# --- windows and processes ----------------------------------------------------------------------------------------


def _split(logps: Logps, sizes: list[int]) -> list[Logps]:
    return [Logps(*parts) for parts in zip(*(t.split(sizes) for t in _four(logps)), strict=True)]


@pytest.mark.parametrize("sizes", [[4, 4], [3, 3, 2], [8]])
@pytest.mark.parametrize("normalization", ["global", "local"])
def test_a_window_of_micro_batches_is_one_big_batch(sizes, normalization):
    options = {"filter_ratio": 0.25, "normalization": normalization}
    big, small = BetaDPOLoss(**options), BetaDPOLoss(window="step", **options)
    assert small.wants_window
    assert not big.wants_window
    for step in range(3):
        logps = _logps(8, seed=step)
        whole = big(logps, TRAIN)
        parts = _split(logps, sizes)
        small.prepare_window([Logps(*(t.detach() for t in _four(part))) for part in parts], TRAIN)
        outs = [small(part, TRAIN) for part in parts]
        small(_logps(2, seed=99), EVAL)  # an evaluation in between doesn't disturb
        loss = sum(out.loss for out in outs) / len(outs)
        torch.testing.assert_close(loss, whole.loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(_grads(loss, logps), _grads(whole.loss, logps), rtol=1e-12, atol=0)
        assert {float(out.metrics["beta_used"]) for out in outs} == {float(whole.metrics["beta_used"])}
    assert small.state_dict() == big.state_dict()


def test_a_step_window_has_to_be_prepared_in_training_only():
    loss = BetaDPOLoss(window="step")
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
    loss, theta = BetaDPOLoss(**options), torch.zeros(FEATURES, dtype=F64)
    gradients, betas = [], []
    for step in range(3):
        chosen, rejected = 6 * _rng(2, TARGETS, FEATURES, seed=step)
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
        betas.append(torch.stack([out.metrics["beta_used"] for out in outs]).unique())
        theta = theta - 0.3 * gradient
    state = loss.state_dict()
    return torch.stack(gradients), torch.cat(betas), torch.stack([state["mean"], state["std"]])


VARIANTS = [
    ({"filter_ratio": 0.25}, 1),
    ({"filter_ratio": 0.25, "debias": True, "seed": 3}, 1),
    ({"filter_ratio": 0.4, "window": "step"}, 2),
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
        assert alone[0].abs().min() > 0


def test_local_normalisation_averages_each_process_alone():
    """What two processes would get, without starting them: the gathered batch is known beforehand."""
    whole = _logps(8)
    gaps = reward_gap(*_four(whole)).detach()
    gradients = {}
    for normalization in ("global", "local"):
        parts = []
        for rank, part in enumerate(_split(whole, [4, 4])):
            context = LossContext(gather=lambda _: gaps, world_size=2, process_index=rank)
            loss = BetaDPOLoss(scale=0.0, filter_ratio=0.4, momentum=0.0, normalization=normalization, seed=0)
            parts.append(loss(part, context).loss)
        gradients[normalization] = _grads(sum(parts) / 2, whole)[0]
    keep = gradients["global"] != 0
    counts = keep.view(2, 4).sum(1)
    assert counts.tolist() in ([1, 3], [3, 1])  # 4 of 8 pairs, unequal on the processes
    slope = -0.1 * torch.sigmoid(-0.1 * gaps) * keep
    torch.testing.assert_close(gradients["global"], slope / 4)
    torch.testing.assert_close(gradients["local"], slope / (2 * counts.repeat_interleave(4)))


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, r"beta must be positive .* got 0\.0"),
        ({"scale": -0.1}, r"scale must be a finite number >= 0, got -0\.1"),
        ({"filter_ratio": 1.0}, r"filter_ratio must be in \[0, 1\), got 1\.0"),
        ({"filter_ratio": -0.1}, r"filter_ratio must be in \[0, 1\)"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"beta_min": 0.0}, "beta_min must be positive"),
        ({"normalization": "locl"}, "did you mean 'local'"),
        ({"window": "steps"}, "did you mean 'step'"),
        ({"seed": -1}, "seed must be an integer >= 0"),
        ({"debias": True, "init_from_first_batch": True}, "choose one"),
    ],
)
def test_constructor_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        BetaDPOLoss(**options)


def test_calls_refuse_bad_input():
    loss = BetaDPOLoss()
    with pytest.raises(ValueError, match="at least 2 pairs per \\(global\\) micro-batch, got 1"):
        loss(_logps(1), TRAIN)
    with pytest.raises(ValueError, match=r"filter_ratio=0\.9 keeps none of the 4 pairs"):
        BetaDPOLoss(filter_ratio=0.9)(_logps(4), TRAIN)
    with pytest.raises(ValueError, match="ref_chosen and ref_rejected"):
        loss(Logps(torch.zeros(4), torch.zeros(4)), TRAIN)
    gap = torch.tensor([0.0, math.nan, 1.0, 2.0])
    with pytest.raises(ValueError, match=r"gap contains non-finite values, the first at \[1\]"):
        loss(_with_gap(gap), TRAIN)
    assert loss.state_dict() == BetaDPOLoss().state_dict()
    with pytest.raises(ValueError, match="written by another method"):
        loss.load_state_dict({"queue": torch.zeros(3)})


@pytest.mark.parametrize(
    "keep", [torch.ones(3, dtype=torch.bool), torch.ones(4), torch.ones(4, 1, dtype=torch.bool), torch.ones(4).long()]
)
def test_functions_refuse_other_masks(keep):
    with pytest.raises(ValueError, match=r"keep_mask must be boolean of shape \(4,\)"):
        beta_dpo_loss(*_four(_logps(4)), keep_mask=keep, beta=0.1, scale=0.6, gap_mean=0.0)


def test_functions_refuse_bad_numbers():
    gap, keep = torch.zeros(4), torch.ones(4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"filter_ratio must be in \[0, 1\)"):
        sample_keep_mask(gap, gap_mean=0.0, gap_std=1.0, filter_ratio=1.0)
    with pytest.raises(ValueError, match="gap_std must be a finite number >= 0, got -1"):
        filter_weights(gap, gap_mean=0.0, gap_std=-1.0)
    with pytest.raises(ValueError, match="gap: empty batch"):
        filter_weights(torch.zeros(0), gap_mean=0.0, gap_std=1.0)
    with pytest.raises(ValueError, match="scale must be"):
        dynamic_beta(gap, keep, beta=0.1, scale=-1.0, gap_mean=0.0)
    with pytest.raises(ValueError, match="num_pairs must be an integer >= 1, got 0"):
        num_keep(0, 0.2)


# --- a run --------------------------------------------------------------------------------------------------------


def test_outliers_are_dropped_more_often_than_clean_pairs():
    """A linear policy; a fifth of the pairs has features eight times as long, whose gaps run away from the others'."""
    generator = _generator(0)
    direction, theta = torch.randn(16, generator=generator), torch.zeros(16)
    loss, kept = BetaDPOLoss(scale=0.6, filter_ratio=0.3), {True: [], False: []}
    for step in range(100):
        difference = torch.randn(32, 16, generator=generator)
        difference *= torch.sign(difference @ direction)[:, None]
        outlier = torch.arange(32) % 5 == 0
        difference[outlier] *= 8
        theta = theta.detach().requires_grad_()
        logps = _with_gap(difference.new_zeros(32))
        logps = Logps(difference @ theta, logps.rejected.detach(), logps.ref_chosen, logps.ref_rejected)
        gradient, theta_gradient = torch.autograd.grad(loss(logps, TRAIN).loss, (logps.chosen, theta))
        theta = theta - 0.5 * theta_gradient
        if step >= 50:
            for is_outlier, found in kept.items():
                found.append((gradient[outlier == is_outlier] != 0).float().mean())
    assert torch.stack(kept[True]).mean() < torch.stack(kept[False]).mean() - 0.2
    assert ((difference @ theta) > 0).float().mean() > 0.9
