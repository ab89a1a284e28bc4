from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ballast_testing.distributed import gathered, run_gloo
from ballast_testing.losses import check_loss
from pref_opt.baselines import DPOLoss, dpo_loss, ipo_loss, simpo_loss
from pref_opt.dr_dpo import DrDPOLoss, dr_aggregate, dr_dpo_loss, dr_weights, flip_preferences
from pref_opt.losses import Logps, LossContext, LossOutput, make_loss

F64 = torch.float64
TRAIN, EVAL = LossContext(), LossContext(training=False)


def _rng(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _logps(n: int, seed: int = 0, dtype: torch.dtype = F64) -> Logps:
    """A micro-batch of sums of about -60 nats, its policy side with gradient."""
    chosen, rejected, ref_chosen, ref_rejected = (-60 + 6 * _rng(4, n, seed=seed)).to(dtype)
    return Logps(chosen.requires_grad_(), rejected.requires_grad_(), ref_chosen, ref_rejected)


def _four(logps: Logps) -> tuple[torch.Tensor, ...]:
    assert logps.ref_chosen is not None
    assert logps.ref_rejected is not None
    return logps.chosen, logps.rejected, logps.ref_chosen, logps.ref_rejected


def _grads(loss: torch.Tensor, logps: Logps) -> torch.Tensor:
    return torch.stack(torch.autograd.grad(loss, (logps.chosen, logps.rejected)))


# --- the aggregate ------------------------------------------------------------------------------------------------


def _reference(losses, *, beta_prime):
    return -beta_prime * (np.logaddexp.reduce(-losses / beta_prime) - math.log(len(losses)))


@pytest.mark.parametrize("beta_prime", [0.3, 1.0, 40.0])
def test_battery(beta_prime):
    check_loss(
        dr_aggregate,
        [_rng(7).abs()],
        {"beta_prime": beta_prime},
        _reference,
        dtypes={"float32": 1e-5},  # half precision comes back in float32 here, see below
        reductions=(),
    )
    assert torch.autograd.gradgradcheck(lambda x: dr_aggregate(x, beta_prime=beta_prime), (_rng(5).requires_grad_(),))


@given(
    losses=st.lists(st.floats(0, 50), min_size=1, max_size=20),
    beta_prime=st.sampled_from([1e-3, 0.1, 1.0, 10.0, 1e4, math.inf]),
    dtype=st.sampled_from([torch.float32, F64]),
)
@settings(derandomize=True, deadline=None, max_examples=200)
def test_between_minimum_and_mean_and_the_gradient_sums_to_one(losses, beta_prime, dtype):
    x = torch.tensor(losses, dtype=dtype, requires_grad=True)
    value = dr_aggregate(x, beta_prime=beta_prime)
    slack = 1e-5 if dtype == torch.float32 else 1e-10
    assert x.min() - slack * (1 + x.max()) <= value <= x.mean() + slack * (1 + x.max())
    above = beta_prime * math.log(len(losses)) if len(losses) > 1 else 0.0
    assert value <= x.min() + above + slack * (1 + x.max())
    (gradient,) = torch.autograd.grad(value, x)
    assert (gradient >= 0).all()
    torch.testing.assert_close(gradient.sum(), torch.ones((), dtype=dtype), rtol=slack, atol=slack)
    weights = dr_weights(x, beta_prime=beta_prime)
    assert not weights.requires_grad
    torch.testing.assert_close(
        weights / len(losses), gradient, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=slack
    )


def test_the_weights_of_the_papers_example():
    weights = dr_weights(torch.tensor([0.1, 1.0], dtype=F64), beta_prime=0.1)
    torch.testing.assert_close(weights, torch.tensor([1.99975, 0.00025], dtype=F64), rtol=0, atol=5e-6)


def test_weight_ratio_of_two_pairs():
    weights = dr_weights(torch.tensor([0.1, 5.0], dtype=F64), beta_prime=1.0)
    assert float(weights[1] / weights[0]) == pytest.approx(math.exp(-4.9))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_large_beta_prime_is_the_mean(dtype):
    losses = 3 * _rng(9).abs().to(dtype)
    # In float32 log-sum-exp minus log B alone would be off by a tenth at 1e6.
    mean = losses.mean()
    torch.testing.assert_close(
        dr_aggregate(losses, beta_prime=1e6), mean - losses.var(correction=0) / 2e6, rtol=1e-6, atol=0
    )
    assert torch.equal(dr_aggregate(losses, beta_prime=math.inf), mean)
    assert torch.equal(dr_weights(losses, beta_prime=math.inf), torch.ones(9, dtype=dtype))


def test_a_small_beta_prime_is_the_minimum():
    losses = 3 * _rng(9).abs()
    torch.testing.assert_close(dr_aggregate(losses, beta_prime=1e-6), losses.min(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("beta_prime", [1e-20, 0.01, 1.0, math.inf])
def test_one_loss_and_equal_losses_stay_themselves(beta_prime):
    one = torch.tensor([0.7])
    assert torch.equal(dr_aggregate(one, beta_prime=beta_prime), one[0])
    equal = torch.full((5,), 0.7)
    torch.testing.assert_close(dr_aggregate(equal, beta_prime=beta_prime), one[0])
    torch.testing.assert_close(dr_weights(equal, beta_prime=beta_prime), torch.ones(5))


@pytest.mark.parametrize("beta_prime", [1e-20, 0.01, 1.0, 1e6])
def test_losses_of_ten_thousand_are_finite_in_float32(beta_prime):
    losses = torch.tensor([1e4, 1.2e4, 3e4], requires_grad=True)
    value = dr_aggregate(losses, beta_prime=beta_prime)
    assert value.isfinite()
    assert value >= 1e4
    assert torch.autograd.grad(value, losses)[0].isfinite().all()
    assert dr_weights(losses, beta_prime=beta_prime).isfinite().all()


def test_one_very_bad_pair_hardly_moves_the_others():
    losses = _rng(8).abs().requires_grad_()
    without = torch.autograd.grad(dr_aggregate(losses), losses)[0]
    more = torch.cat([losses.detach(), torch.tensor([60.0], dtype=F64)]).requires_grad_()
    with_it = torch.autograd.grad(dr_aggregate(more), more)[0]
    ratio = with_it[:-1] / without
    assert ((ratio <= 9 / 8) & (ratio >= 8 / 9)).all()
    assert with_it[-1] < 1e-20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    losses = _rng(8).abs().to(dtype)
    for fn in (dr_aggregate, dr_weights):
        assert fn(losses).dtype == torch.float32
        assert torch.equal(fn(losses), fn(losses.float()))
    assert dr_dpo_loss(*_four(_logps(8, dtype=dtype))).dtype == torch.float32


# --- the loss of a batch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "base"),
    [
        (
            {"beta": 0.2, "label_smoothing": 0.1},
            lambda *t: dpo_loss(*t, beta=0.2, label_smoothing=0.1, reduction="none"),
        ),
        ({"beta": 0.3, "base": "ipo_sum"}, lambda *t: ipo_loss(*t, beta=0.3, reduction="none")),
    ],
)
def test_the_base_losses(options, base):
    tensors = _four(_logps(6))
    expected = dr_aggregate(base(*tensors), beta_prime=2.0)
    assert torch.equal(dr_dpo_loss(*tensors, beta_prime=2.0, **options), expected)
    assert torch.equal(dr_dpo_loss(*tensors, beta_prime=2.0, base=base), expected)


def test_infinity_is_dpo():
    logps = _logps(6)
    dpo, ours = dpo_loss(*_four(logps), beta=0.2), dr_dpo_loss(*_four(logps), beta=0.2, beta_prime=math.inf)
    assert torch.equal(dpo, ours)
    expected = _grads(dpo, logps)
    assert torch.equal(_grads(ours, logps), expected)
    nearly = dr_dpo_loss(*_four(logps), beta=0.2, beta_prime=1e6)
    torch.testing.assert_close(nearly, dpo, rtol=1e-6, atol=0)
    torch.testing.assert_close(_grads(nearly, logps), expected, rtol=1e-5, atol=0)


def test_with_beta_prime_one_the_weight_is_the_models_belief_in_the_label():
    logps = _logps(6)
    gap = (logps.chosen - logps.rejected - logps.ref_chosen + logps.ref_rejected).detach()
    belief = torch.sigmoid(0.1 * gap)
    slope = 0.1 * torch.sigmoid(-0.1 * gap) * belief / belief.sum()
    torch.testing.assert_close(_grads(dr_dpo_loss(*_four(logps)), logps), torch.stack([-slope, slope]))


# --- the loss object ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["local", "global"])
def test_the_object_is_the_function(group):
    loss = make_loss("dr_dpo", beta=0.2, beta_prime=0.7, group=group)
    logps = _logps(8)
    out, expected = loss(logps, TRAIN), dr_dpo_loss(*_four(logps), beta=0.2, beta_prime=0.7)
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(_grads(out.loss, logps), _grads(expected, logps), rtol=1e-10, atol=1e-14)
    losses = dpo_loss(*_four(logps), beta=0.2, reduction="none").detach()
    weights = dr_weights(losses, beta_prime=0.7)
    wanted = {
        "loss/dr": expected.detach(),
        "loss/mean": losses.mean(),
        "weights/min": weights.min(),
        "weights/max": weights.max(),
        "weights/ess": 1 / (8 * (weights / 8).square().sum()),
        "weights/group_size": torch.tensor(8.0, dtype=F64),
    }
    assert set(out.metrics) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(out.metrics[name], value)
        assert not out.metrics[name].requires_grad
    torch.testing.assert_close(out.chosen_rewards, 0.2 * (logps.chosen - logps.ref_chosen).detach())
    assert loss.state_dict() == {}


def test_evaluation_is_the_plain_mean_with_the_soft_minimum_beside_it():
    def refuse(values):
        raise AssertionError("gathered in evaluation")

    logps = _logps(8)
    for group in ("local", "global", "step"):
        out = DrDPOLoss(beta=0.2, group=group)(logps, LossContext(training=False, gather=refuse, world_size=2))
        assert torch.equal(out.loss, dpo_loss(*_four(logps), beta=0.2))
        assert torch.equal(out.metrics["loss/dr"], dr_dpo_loss(*_four(logps), beta=0.2).detach())


def test_any_loss_of_pairs_can_be_the_base():
    def simpo(chosen, rejected, *_):
        return simpo_loss(chosen, rejected, beta=2.0, gamma_beta_ratio=0.25, reduction="none")

    loss = DrDPOLoss(beta=2.0, base=simpo)
    loss.requires_reference, loss.length_normalized = False, True
    logps = _logps(6)
    out = loss(Logps(logps.chosen, logps.rejected), TRAIN)
    torch.testing.assert_close(out.loss, dr_aggregate(simpo(logps.chosen, logps.rejected)))
    assert torch.equal(out.chosen_rewards, 2.0 * logps.chosen.detach())


def _last(loss: DrDPOLoss, logps: Logps, calls: int) -> LossOutput:
    return [loss(logps, TRAIN) for _ in range(calls)][-1]


@pytest.mark.parametrize("group", ["local", "global"])
def test_a_group_of_one_pair_is_dpo_and_says_so_once(group):
    loss = DrDPOLoss(beta=0.2, group=group)
    logps = _logps(1)
    with pytest.warns(UserWarning, match="per_device_train_batch_size") as caught:
        out = _last(loss, logps, 2)
    assert len(caught) == 1
    dpo = DPOLoss(beta=0.2)(logps, TRAIN)
    torch.testing.assert_close(out.loss, dpo.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(_grads(out.loss, logps), _grads(dpo.loss, logps), rtol=1e-12, atol=0)
    loss(logps, EVAL)


def test_a_beta_prime_far_below_the_spread_warns_once():
    loss = DrDPOLoss(beta=0.2, beta_prime=1e-3)
    logps = _logps(16)
    with pytest.warns(UserWarning, match=r"beta_prime=0\.001 is small beside the spread") as caught:
        _last(loss, logps, 100)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        healthy = DrDPOLoss(beta=0.2, beta_prime=1.0)
        _last(healthy, logps, 50)


# --- windows and processes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[4, 4], [3, 3, 2], [8]])
def test_a_window_of_micro_batches_is_one_big_batch(sizes):
    big, small = DrDPOLoss(beta=0.2), DrDPOLoss(beta=0.2, group="step")
    assert small.wants_window
    assert not big.wants_window
    for step in range(2):
        logps = _logps(8, seed=step)
        whole = big(logps, TRAIN)
        parts = [Logps(*parts) for parts in zip(*(t.split(sizes) for t in _four(logps)), strict=True)]
        small.prepare_window([Logps(*(t.detach() for t in _four(part))) for part in parts], TRAIN)
        outs = [small(part, TRAIN) for part in parts]
        small(_logps(2, seed=99), EVAL)  # an evaluation in between doesn't disturb
        loss = sum(out.loss for out in outs) / len(outs)
        torch.testing.assert_close(loss, whole.loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(_grads(loss, logps), _grads(whole.loss, logps), rtol=1e-10, atol=1e-14)
        assert all(out.metrics["weights/group_size"] == 8 for out in outs)


def test_a_step_window_has_to_be_prepared_in_training_only():
    loss = DrDPOLoss(group="step")
    loss(_logps(4), EVAL)
    loss.prepare_window([_logps(4)], EVAL)
    with pytest.raises(RuntimeError, match="needs prepare_window"):
        loss(_logps(4), TRAIN)
    loss.prepare_window([_logps(4), _logps(4)], TRAIN)
    with pytest.raises(RuntimeError, match="in order"):
        loss(_logps(3), TRAIN)


FEATURES, TARGETS = 5, 8


def trained(rank, world_size, options, micro_batches):
    """Two steps of a linear policy; every process holds its part of the same 8 pairs per step."""
    context = LossContext(gather=gathered, world_size=world_size, process_index=rank)
    loss, theta = DrDPOLoss(**options), torch.full((FEATURES,), 0.1, dtype=F64)
    gradients, values = [], []
    for step in range(2):
        chosen, rejected = 6 * _rng(2, TARGETS, FEATURES, seed=step)
        mine = slice(rank * TARGETS // world_size, (rank + 1) * TARGETS // world_size)
        parts = list(zip(chosen[mine].chunk(micro_batches), rejected[mine].chunk(micro_batches), strict=True))
        theta = theta.detach().requires_grad_()
        zero = torch.zeros(len(parts[0][0]), dtype=F64)
        window = [Logps(c @ theta, r @ theta, zero, zero) for c, r in parts]
        if loss.wants_window:
            loss.prepare_window([Logps(w.chosen.detach(), w.rejected.detach(), zero, zero) for w in window], context)
        total = sum(loss(logps, context).loss for logps in window) / len(window)
        (gradient,) = torch.autograd.grad(total, theta)
        if world_size > 1:
            torch.distributed.all_reduce(gradient)
        gradient /= world_size
        gradients.append(gradient)
        values.append(total.detach())
        theta = theta - 0.3 * gradient
    return torch.stack(gradients), torch.stack(values)


VARIANTS = [
    ({"beta": 0.3, "group": "global"}, 1),
    ({"beta": 0.1, "beta_prime": 50.0, "base": "ipo_sum", "group": "global"}, 1),
    ({"beta": 0.3, "beta_prime": 0.5, "group": "step"}, 2),
]


def trained_variants(rank, world_size, variants):
    return [trained(rank, world_size, options, micro_batches) for options, micro_batches in variants]


def test_two_processes_equal_one_with_the_joint_batch():
    first, second = run_gloo(trained_variants, 2, VARIANTS)
    for (options, _), mine, other in zip(VARIANTS, first, second, strict=True):
        alone = trained(0, 1, options, 1)
        for a, b, c in zip(alone, mine, other, strict=True):
            torch.testing.assert_close(b, c, rtol=1e-12, atol=0)
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)


def test_local_groups_do_not_see_the_other_process():
    def refuse(values):
        raise AssertionError("gathered for a local group")

    logps = _logps(4)
    out = DrDPOLoss(beta=0.2)(logps, LossContext(gather=refuse, world_size=2, process_index=1))
    torch.testing.assert_close(out.loss, dr_dpo_loss(*_four(logps), beta=0.2))


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta_prime", [0.0, -1.0, math.nan, 1e-40])
def test_beta_prime_must_be_positive(beta_prime):
    for call in (
        lambda: dr_aggregate(torch.ones(2), beta_prime=beta_prime),
        lambda: dr_weights(torch.ones(2), beta_prime=beta_prime),
        lambda: DrDPOLoss(beta_prime=beta_prime),
    ):
        with pytest.raises(ValueError, match=r"beta_prime must be positive .* infinity means plain DPO"):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta must be positive"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0\.5\)"),
        ({"base": "sigmod"}, "did you mean 'sigmoid'"),
        ({"base": "ipo_sum", "label_smoothing": 0.1}, "label_smoothing needs base='sigmoid'"),
        ({"group": "globl"}, "did you mean 'global'"),
    ],
)
def test_constructor_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        DrDPOLoss(**options)


def test_calls_refuse_bad_input():
    with pytest.raises(ValueError, match="losses: empty batch"):
        dr_aggregate(torch.zeros(0))
    with pytest.raises(ValueError, match="losses: expected 1-D"):
        dr_weights(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="must have the same shape"):
        dr_dpo_loss(torch.zeros(2), torch.zeros(3), torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="ref_chosen and ref_rejected"):
        DrDPOLoss()(Logps(torch.zeros(4), torch.zeros(4)), TRAIN)
    with pytest.raises(ValueError, match=r"base must return losses of shape \(4,\), got \(\)"):
        dr_dpo_loss(*(torch.zeros(4) for _ in range(4)), base=lambda *t: t[0].sum())


# --- flipped labels -----------------------------------------------------------------------------------------------


def _rows(n: int) -> list[dict[str, object]]:
    return [
        {
            "prompt": f"p{i}",
            "chosen": [{"role": "assistant", "content": f"c{i}"}],
            "rejected": [{"role": "assistant", "content": f"r{i}"}],
            "score_chosen": float(i),
            "score_rejected": -float(i),
            "chosen_length": i,  # without a partner: stays
        }
        for i in range(n)
    ]


def _check_flipped(before, after, rate):
    flips = [row["flipped"] for row in after]
    assert len(after) == len(before)
    assert abs(sum(flips) / len(flips) - rate) < 4 * math.sqrt(rate * (1 - rate) / len(flips)) + 1e-12
    for old, new in zip(before, after, strict=True):
        swap = {"chosen": "rejected", "rejected": "chosen"} if new["flipped"] else {}
        for side in ("chosen", "rejected"):
            assert new[side] == old[swap.get(side, side)]
            assert new[f"score_{side}"] == old[f"score_{swap.get(side, side)}"]
        assert new["prompt"] == old["prompt"]
        assert new["chosen_length"] == old["chosen_length"]
    return flips


@pytest.mark.parametrize("kind", ["list", "dataset", "selected"])
def test_flips_swap_both_sides(kind):
    datasets = pytest.importorskip("datasets")
    before = _rows(400)
    data = before if kind == "list" else datasets.Dataset.from_list(before)
    if kind == "selected":
        order = list(range(399, -1, -2))
        data, before = data.select(order), [before[i] for i in order]
    names = list(before[0])
    found = {}
    for rate in (0.0, 0.2, 0.4):
        after = flip_preferences(data, rate, seed=3)
        assert list(after[0]) == [*names, "flipped"]
        found[rate] = _check_flipped(before, list(after), rate)
    assert all(high for low, high in zip(found[0.2], found[0.4], strict=True) if low)
    assert found[0.4] != [row["flipped"] for row in flip_preferences(data, 0.4, seed=4)]
    assert found[0.4] == [row["flipped"] for row in flip_preferences(data, 0.4, seed=3)]
    assert "flipped" not in data[0]
    assert list(data) == before


@pytest.mark.parametrize("as_dataset", [False, True])
@pytest.mark.parametrize("has_target", [False, True])
def test_the_target_of_supervised_training(as_dataset, has_target):
    datasets = pytest.importorskip("datasets")
    rows = [
        {"chosen": f"c{i}", "rejected": f"r{i}"} | ({"sft_target": f"c{i}"} if has_target else {}) for i in range(50)
    ]
    data = datasets.Dataset.from_list(rows) if as_dataset else rows
    noisy = list(flip_preferences(data, 0.4, seed=0))
    assert any(row["flipped"] for row in noisy)
    if has_target:
        assert all(row["sft_target"] == row["chosen"] for row in noisy)
    else:
        assert "sft_target" not in noisy[0]
    clean = list(flip_preferences(data, 0.4, seed=0, flip_sft_target=False))
    assert [row["sft_target"] for row in clean] == [f"c{i}" for i in range(50)]
    assert [row["flipped"] for row in clean] == [row["flipped"] for row in noisy]


def test_list_and_dataset_flip_the_same_pairs():
    datasets = pytest.importorskip("datasets")
    rows = _rows(60)
    assert list(flip_preferences(datasets.Dataset.from_list(rows), 0.3, seed=5)) == flip_preferences(rows, 0.3, seed=5)
    assert flip_preferences([], 0.3, seed=5) == []


def test_flip_refuses_bad_input():
    datasets = pytest.importorskip("datasets")
    rows = _rows(3)
    for rate in (-0.1, 0.51, math.nan):
        with pytest.raises(ValueError, match=r"rate must be in \[0, 0\.5\]"):
            flip_preferences(rows, rate, seed=0)
    with pytest.raises(ValueError, match="seed must be an integer >= 0, got -1"):
        flip_preferences(rows, 0.2, seed=-1)
    for data in ([{"chosen": "a"}], datasets.Dataset.from_list([{"chosen": "a"}])):
        with pytest.raises(ValueError, match=r"must have columns 'chosen' and 'rejected', got \['chosen'\]"):
            flip_preferences(data, 0.2, seed=0)
    for data in (rows, datasets.Dataset.from_list(rows)):
        with pytest.raises(ValueError, match="already has a column 'flipped'"):
            flip_preferences(flip_preferences(data, 0.2, seed=0), 0.2, seed=0)
    with pytest.raises(TypeError, match=r"datasets\.Dataset or a list of dicts, got IterableDataset"):
        flip_preferences(datasets.Dataset.from_list(rows).to_iterable_dataset(), 0.2, seed=0)


# --- a run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.2, 0.4])
def test_flipped_pairs_lose_weight_in_a_warm_started_policy(rate):
    """A linear policy that leans the right way, and pairs of which some are flipped."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(16, generator=generator)
    theta = 0.3 * direction + 0.3 * torch.randn(16, generator=generator)
    warm = theta.clone()
    loss, weights = DrDPOLoss(beta=0.1, beta_prime=1.0), {True: [], False: []}
    for _ in range(150):
        difference = 3 * torch.randn(32, 16, generator=generator)
        difference *= torch.sign(difference @ direction)[:, None]
        flipped = torch.rand(32, generator=generator) < rate
        difference[flipped] *= -1
        theta = theta.detach().requires_grad_()
        zero = torch.zeros(32)
        # The reference here is the uniform policy, so that the warm start shows in the gaps from the first step.
        logps = Logps(difference @ theta, zero, zero, zero)
        (gradient,) = torch.autograd.grad(loss(logps, TRAIN).loss, theta)
        theta = theta - 0.1 * gradient
        found = dr_weights(dpo_loss(*_four(logps), beta=0.1, reduction="none"))
        for is_flipped, means in weights.items():
            means.append(found[flipped == is_flipped].mean())
    assert torch.stack(weights[True]).nanmean() < torch.stack(weights[False]).nanmean() - 0.1
    assert not torch.equal(theta, warm)
