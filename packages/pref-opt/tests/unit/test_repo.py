from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ballast_testing.losses import check_loss
from pref_opt.baselines import simpo_loss, slic_loss
from pref_opt.losses import Logps, LossContext, make_loss
from pref_opt.repo import (
    LinearMarginSchedule,
    RePOLoss,
    RePOPlusPlusLoss,
    filtered_fraction,
    repo_loss,
    repo_plus_plus_loss,
)

F64 = torch.float64
CHOSEN = torch.tensor([-1.1, -0.4, -2.0, -0.9, -1.3], dtype=F64)
REJECTED = torch.tensor([-1.0, -1.9, -2.3, -1.7, -0.6], dtype=F64)
GAMMAS = torch.tensor([0.5, -0.2, 0.1, 2.0, 0.4], dtype=F64)


def _reference(plus_plus: bool):
    def loss(chosen, rejected, *, gamma, beta=1.0, reduction="mean"):
        gammas = np.broadcast_to(np.asarray(gamma), chosen.shape)
        short = [max(0.0, g - (c - r)) for c, r, g in zip(chosen, rejected, gammas, strict=True)]
        rows = np.array([math.log(1 + math.exp(beta * x)) if plus_plus else x for x in short])
        return rows.mean() if reduction == "mean" else rows

    return loss


@pytest.mark.parametrize("gamma", [0.5, 0.0, -0.3])
@pytest.mark.parametrize("plus_plus", [False, True])
def test_battery(plus_plus, gamma):
    check_loss(
        repo_plus_plus_loss if plus_plus else repo_loss,
        [CHOSEN, REJECTED],
        {"gamma": gamma, **({"beta": 2.0} if plus_plus else {})},
        _reference(plus_plus),
        # half precision gives float32, which has a test of its own
        dtypes={"float32": 1e-5},
        reductions=("none", "mean"),
    )


def test_a_margin_per_pair():
    for reduction in ("none", "mean"):
        got = repo_loss(CHOSEN, REJECTED, gamma=GAMMAS, reduction=reduction)
        want = _reference(False)(CHOSEN.numpy(), REJECTED.numpy(), gamma=GAMMAS.numpy(), reduction=reduction)
        torch.testing.assert_close(got, torch.as_tensor(want))
    got = repo_plus_plus_loss(CHOSEN, REJECTED, beta=3.0, gamma=GAMMAS)
    want = _reference(True)(CHOSEN.numpy(), REJECTED.numpy(), gamma=GAMMAS.numpy(), beta=3.0)
    torch.testing.assert_close(got, torch.as_tensor(want))
    gamma = torch.tensor(0.5, dtype=F64, requires_grad=True)
    repo_loss(CHOSEN, REJECTED, gamma=gamma).backward()
    assert gamma.grad.item() == pytest.approx(3 / 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    half = [x.to(dtype).requires_grad_() for x in (CHOSEN, REJECTED)]
    for loss, exact in (
        (repo_loss(*half, gamma=0.5), repo_loss(*[x.detach().double() for x in half], gamma=0.5)),
        (
            repo_plus_plus_loss(*half, beta=2.0, gamma=0.5),
            repo_plus_plus_loss(*[x.detach().double() for x in half], beta=2.0, gamma=0.5),
        ),
    ):
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
        loss.backward()
    assert all(x.grad.dtype == dtype for x in half)


def _gradients(loss_of, *tensors):
    leaves = [x.clone().requires_grad_() for x in tensors]
    return torch.autograd.grad(loss_of(*leaves), leaves)


def test_gradient_is_minus_one_over_all_pairs_or_nothing():
    up, down = _gradients(lambda c, r: repo_loss(c, r, gamma=0.5), CHOSEN, REJECTED)
    assert up.tolist() == [-0.2, 0.0, -0.2, 0.0, -0.2]
    assert down.tolist() == [0.2, -0.0, 0.2, -0.0, 0.2]


def test_all_pairs_filtered_is_a_loss_with_a_graph():
    chosen, rejected = torch.zeros(3, requires_grad=True), torch.full((3,), -1.0, requires_grad=True)
    loss = repo_loss(chosen, rejected, gamma=1.0)  # exactly at the threshold
    loss.backward()
    assert loss.item() == 0.0
    assert not chosen.grad.any()
    assert not rejected.grad.any()
    assert filtered_fraction(chosen, rejected, gamma=1.0).item() == 1.0


@given(
    pairs=st.lists(st.tuples(st.floats(-5, 0), st.floats(-5, 0)), min_size=1, max_size=20),
    gamma=st.floats(-1, 2),
    beta=st.sampled_from([1.0, 10.0, 1e4]),
)
@settings(derandomize=True, deadline=None, max_examples=100)
def test_simpo_over_its_slope_lies_log_two_above(pairs, gamma, beta):
    chosen, rejected = (torch.tensor(x, dtype=F64) for x in zip(*pairs, strict=True))
    simpo = simpo_loss(chosen, rejected, beta=beta, gamma_beta_ratio=gamma, reduction="none") / beta
    above = simpo - repo_loss(chosen, rejected, gamma=gamma, reduction="none")
    assert (above >= -1e-12).all()
    assert (above <= math.log(2) / beta + 1e-12).all()


def test_repo_plus_plus_is_simpo_on_unfiltered_pairs():
    below = (CHOSEN - REJECTED) < 0.5
    plus_plus = repo_plus_plus_loss(CHOSEN, REJECTED, beta=2.0, gamma=0.5, reduction="none")
    simpo = simpo_loss(CHOSEN, REJECTED, beta=2.0, gamma_beta_ratio=0.5, reduction="none")
    torch.testing.assert_close(plus_plus[below], simpo[below])
    torch.testing.assert_close(plus_plus[~below], torch.full_like(plus_plus[~below], math.log(2)))
    got, _ = _gradients(lambda c, r: repo_plus_plus_loss(c, r, beta=2.0, gamma=0.5), CHOSEN, REJECTED)
    # the other reading of the method: SimPO's loss times an indicator without gradient
    want, _ = _gradients(
        lambda c, r: (below * simpo_loss(c, r, beta=2.0, gamma_beta_ratio=0.5, reduction="none")).mean(),
        CHOSEN,
        REJECTED,
    )
    torch.testing.assert_close(got, want)


def test_a_hinge_with_beta_is_repo_times_beta():
    beta = 2.5
    torch.testing.assert_close(
        slic_loss(CHOSEN, REJECTED, beta=beta), beta * repo_loss(CHOSEN, REJECTED, gamma=1 / beta)
    )


def test_filtered_fraction_counts_the_threshold():
    chosen = torch.tensor([-1.0, -1.0, -1.0, -1.0], requires_grad=True)
    fraction = filtered_fraction(chosen, torch.tensor([-1.5, -1.25, -2.0, -0.5]), gamma=0.5)
    assert fraction.item() == 0.5
    assert not fraction.requires_grad
    assert filtered_fraction(CHOSEN, REJECTED, gamma=GAMMAS).item() == pytest.approx(2 / 5)


# --- schedule ---------------------------------------------------------------------------------------------------------


def test_schedule_is_linear_and_stays():
    schedule = LinearMarginSchedule(2.0, 0.5, 3)
    assert [schedule(step) for step in (0, 1, 2, 3, 10)] == [2.0, 1.5, 1.0, 0.5, 0.5]


def test_a_scheduled_object_advances_in_training_only_and_resumes():
    logps = Logps(torch.zeros(2), torch.full((2,), -0.7))
    loss = make_loss("repo", gamma_schedule={"start": 2.0, "end": 0.0, "total_steps": 4})
    gammas = [loss(logps, LossContext(training=training)).metrics["gamma"].item() for training in (1, 0, 1, 0, 1)]
    assert gammas == [2.0, 1.5, 1.5, 1.0, 1.0]
    assert loss.state_dict() == {"num_updates": 3}
    twin = RePOLoss(gamma_schedule=LinearMarginSchedule(2.0, 0.0, 4))
    twin.load_state_dict(loss.state_dict())
    for _ in range(3):
        assert twin(logps, LossContext()).loss == loss(logps, LossContext()).loss
    assert loss(logps, LossContext()).loss.item() == 0.0
    assert RePOLoss(gamma_schedule=lambda step: 0.1 * step)(logps, LossContext()).metrics["gamma"].item() == 0.0


def test_state_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"state of RePOLoss must have \[\], got \['num_updates'\]"):
        RePOLoss().load_state_dict({"num_updates": 3})
    with pytest.raises(ValueError, match=r"state of RePOLoss must have \['num_updates'\], got \[\]"):
        RePOLoss(gamma_schedule=LinearMarginSchedule(1.0, 0.5, 5)).load_state_dict({})


# --- objects ----------------------------------------------------------------------------------------------------------


def test_objects():
    logps = Logps(CHOSEN.clone().requires_grad_(), REJECTED)
    out = RePOLoss(gamma=0.5)(logps, LossContext())
    torch.testing.assert_close(out.loss, repo_loss(logps.chosen, REJECTED, gamma=0.5))
    torch.testing.assert_close(out.chosen_rewards, CHOSEN)
    gap = CHOSEN - REJECTED
    assert out.metrics["filtered_fraction"].item() == pytest.approx(2 / 5)
    torch.testing.assert_close(out.metrics["M/mean"], gap.mean())
    torch.testing.assert_close(out.metrics["M/std"], gap.std(correction=0))
    assert not any(value.requires_grad for value in (*out.metrics.values(), out.chosen_rewards, out.rejected_rewards))
    assert set(out.metrics) == {"filtered_fraction", "M/mean", "M/std"}
    out = RePOPlusPlusLoss(beta=2.0, gamma=0.5)(logps, LossContext())
    torch.testing.assert_close(out.loss, repo_plus_plus_loss(logps.chosen, REJECTED, beta=2.0, gamma=0.5))
    torch.testing.assert_close(out.rejected_rewards, 2 * REJECTED)
    for loss in (RePOLoss(), RePOPlusPlusLoss()):
        assert (loss.requires_reference, loss.length_normalized, loss.couples_pairs) == (False, True, False)
        assert loss.state_dict() == {}


def test_likelihood_term_keeps_filtered_pairs_alive():
    chosen = torch.tensor([-0.1, -0.2], requires_grad=True)
    out = RePOLoss(gamma=0.1, sft_weight=0.5)(Logps(chosen, torch.tensor([-3.0, -3.0])), LossContext())
    out.loss.backward()
    assert out.metrics["nll"].item() == pytest.approx(0.15)
    assert out.loss.item() == pytest.approx(0.075)
    assert chosen.grad.tolist() == [-0.25, -0.25]


def test_one_pair_has_a_spread_of_zero():
    out = RePOLoss()(Logps(CHOSEN[:1], REJECTED[:1]), LossContext())
    assert out.metrics["M/std"].item() == 0.0


# --- bad input --------------------------------------------------------------------------------------------------------

BAD = [
    (lambda: repo_loss(CHOSEN, REJECTED, gamma=math.nan), r"gamma must be a finite number, got nan"),
    (lambda: repo_loss(CHOSEN, REJECTED, gamma=torch.zeros(4)), r"gamma must be a number or .* \(5,\), got .* \(4,\)"),
    (lambda: repo_loss(CHOSEN, REJECTED, gamma=torch.tensor(math.inf)), r"gamma contains non-finite values"),
    (lambda: repo_loss(CHOSEN, REJECTED[:4], gamma=0.5), r"must have the same shape, got \(5,\) and \(4,\)"),
    (lambda: repo_loss(CHOSEN[:0], REJECTED[:0], gamma=0.5), r"empty batch"),
    (lambda: repo_loss(CHOSEN, REJECTED, gamma=0.5, reduction="sum"), r"reduction must be one of 'mean', 'none'"),
    (lambda: repo_plus_plus_loss(CHOSEN, REJECTED, beta=0.0, gamma=0.5), r"beta must be positive and finite, got 0\.0"),
    (lambda: repo_plus_plus_loss(CHOSEN, REJECTED, beta=1.0, gamma=math.inf), r"gamma must be a finite number"),
    (lambda: filtered_fraction(CHOSEN, REJECTED, gamma=math.nan), r"gamma must be a finite number"),
    (lambda: filtered_fraction(CHOSEN[:, None], REJECTED, gamma=0.1), r"chosen_logps: expected 1-D"),
    (lambda: RePOLoss(gamma=math.inf), r"gamma must be a finite number, got inf"),
    (lambda: RePOLoss(sft_weight=-0.1), r"sft_weight must be a finite number >= 0, got -0\.1"),
    (lambda: RePOLoss(gamma_schedule=0.5), r"gamma_schedule must be a function of the step or a mapping .* got 0\.5"),
    (lambda: RePOLoss(gamma_schedule={"start": 1.0}), r"a mapping with \['end', 'start', 'total_steps'\]"),
    (lambda: RePOPlusPlusLoss(beta=-1.0), r"beta must be positive and finite, got -1\.0"),
    (lambda: LinearMarginSchedule(1.0, 0.5, 0), r"total_steps must be an integer >= 1, got 0"),
    (lambda: LinearMarginSchedule(math.nan, 0.5, 5), r"start must be a finite number, got nan"),
    (lambda: LinearMarginSchedule(1.0, math.inf, 5), r"end must be a finite number, got inf"),
    (lambda: LinearMarginSchedule(1.0, 0.5, 5)(-1), r"step must be an integer >= 0, got -1"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=range(len(BAD)))
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- learning ---------------------------------------------------------------------------------------------------------


def test_training_filters_more_and_more_of_a_separable_set():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(256, 4, generator=generator)
    better = (features[:, 0] > 0).long()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    loss = RePOLoss(gamma=0.5)
    losses, filtered = [], []
    for _ in range(200):
        log_probs = F.log_softmax(policy(features), 1)
        chosen, rejected = (log_probs.gather(1, answer[:, None])[:, 0] for answer in (better, 1 - better))
        out = loss(Logps(chosen, rejected), LossContext())
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
        filtered.append(out.metrics["filtered_fraction"].item())
    assert filtered[0] < 0.3
    assert filtered[-1] > 0.95
    assert losses[-1] < 0.02 * losses[0]
