from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ballast_testing.distributed import gathered, run_gloo
from ballast_testing.losses import check_loss
from pref_opt.baselines import dpo_loss, simpo_loss
from pref_opt.gamma_po import (
    GammaPOLoss,
    RewardGapQueue,
    dynamic_margins,
    gamma_dpo_loss,
    gamma_simpo_loss,
)
from pref_opt.losses import Logps, LossContext, make_loss

F64 = torch.float64


def _randn(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _margins_by_loops(gaps, gamma0, tau, num_iters=20, eps=1e-10):
    """The updates as printed: exponentials and a division, no logarithms of shares."""
    n = len(gaps)
    p, eta = [1 / n] * n, min(0.5 / tau, 1.0)
    for _ in range(num_iters):
        gamma = [gamma0 * n * x for x in p]
        g = [
            tau * (1 + math.log(n * (x + eps))) + gamma0 / (1 + math.exp(r - m))
            for x, m, r in zip(p, gamma, gaps, strict=True)
        ]
        new = [x * math.exp(-eta * y) for x, y in zip(p, g, strict=True)]
        p = [x / sum(new) for x in new]
    return np.array(gamma)


# --- margins ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.3, 1.0, 10.0])
@pytest.mark.parametrize("num_iters", [1, 2, 20])
def test_margins_follow_the_printed_updates(tau, num_iters):
    gaps = _randn(7, scale=3)
    got = dynamic_margins(gaps[:5], gaps[5:], gamma0=2.0, tau=tau, num_iters=num_iters)
    want = _margins_by_loops(gaps.tolist(), 2.0, tau, num_iters)[:5]
    torch.testing.assert_close(got, torch.as_tensor(want), rtol=1e-10, atol=1e-12)
    if num_iters == 1:  # nothing is applied before the margins are read
        torch.testing.assert_close(got, torch.full_like(got, 2.0))


def _optimum(gaps: np.ndarray, gamma0: float, tau: float) -> np.ndarray:
    """Newton's method on the simplex: the Hessian is diagonal, the step keeps the sum, backtracking the positivity."""
    n = len(gaps)
    p = np.full(n, 1 / n)

    def value(q):
        return np.mean(np.logaddexp(0, gamma0 * n * q - gaps)) + tau * np.sum(q * np.log(n * q))

    for _ in range(100):
        s = 1 / (1 + np.exp(gaps - gamma0 * n * p))
        gradient = gamma0 * s + tau * (1 + np.log(n * p))
        curvature = n * gamma0**2 * s * (1 - s) + tau / p
        multiplier = np.sum(gradient / curvature) / np.sum(1 / curvature)
        direction = (multiplier - gradient) / curvature
        size = 1.0
        while (p + size * direction).min() <= 0 or value(p + size * direction) > value(p) + 1e-15:
            size /= 2
            if size < 1e-12:
                return gamma0 * n * p
        p = p + size * direction
    return gamma0 * n * p


@pytest.mark.parametrize("tau", [1.0, 3.0, 10.0, 20.0])
def test_margins_solve_the_convex_problem(tau):
    gaps = _randn(40, seed=3, scale=2)
    gamma0 = 1.0
    got = dynamic_margins(gaps, gamma0=gamma0, tau=tau)
    np.testing.assert_allclose(got.numpy(), _optimum(gaps.numpy(), gamma0, tau), atol=1e-4)
    residual = tau * (got / gamma0).log() + gamma0 * torch.sigmoid(got - gaps)
    assert residual.max() - residual.min() < 1e-4 * gamma0


@given(
    gaps=st.lists(st.floats(-30, 30), min_size=1, max_size=30),
    gamma0=st.sampled_from([0.375, 1.0, 4.0]),
    tau=st.sampled_from([0.3, 1.0, 10.0]),
)
@settings(derandomize=True, deadline=None, max_examples=100)
def test_margins_share_out_the_total(gaps, gamma0, tau):
    r = torch.tensor(gaps, dtype=F64)
    margins = dynamic_margins(r, gamma0=gamma0, tau=tau)
    assert margins.mean().item() == pytest.approx(gamma0, abs=1e-12)
    assert (margins >= 0).all()
    assert (margins <= len(gaps) * gamma0 * (1 + 1e-12)).all()
    order = torch.randperm(len(gaps), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(dynamic_margins(r[order], gamma0=gamma0, tau=tau), margins[order], rtol=1e-9, atol=1e-12)
    if tau >= 1:  # converged, so the optimum's own properties hold
        by_gap = margins[r.argsort()]
        assert (by_gap[1:] >= by_gap[:-1] * (1 - 1e-5)).all()
        assert margins.max() / margins.min() <= math.exp(gamma0 / tau) * (1 + 1e-5)


def test_a_clear_pair_gets_strictly_more():
    margins = dynamic_margins(torch.tensor([-1.0, 0.0, 1.0], dtype=F64), gamma0=1.0, tau=1.0)
    assert margins[0] < margins[1] - 0.05
    assert margins[1] < margins[2] - 0.05


def test_ties_and_a_single_pair():
    tied = dynamic_margins(
        torch.tensor([0.7, -2.0, 0.7], dtype=F64), torch.tensor([0.7], dtype=F64), gamma0=1.5, tau=2.0
    )
    assert tied[0] == tied[2]
    equal = dynamic_margins(torch.full((5,), 3.0, dtype=F64), gamma0=1.5, tau=2.0)
    torch.testing.assert_close(equal, torch.full_like(equal, 1.5))
    for history in (None, torch.zeros(0)):
        assert dynamic_margins(torch.tensor([-3.0]), history, gamma0=1.5, tau=0.1).item() == pytest.approx(1.5)


def test_saturated_gaps_have_equal_margins():
    margins = dynamic_margins(torch.tensor([800.0, 900.0, -800.0], dtype=F64), gamma0=4.0, tau=10.0)
    torch.testing.assert_close(margins[0], margins[1])
    assert margins[2] < margins[0]


def test_small_tau_gives_the_margin_to_the_clearest():
    margins = dynamic_margins(torch.tensor([0.0, 1.0, 5.0], dtype=F64), gamma0=2.0, tau=0.01, num_iters=2000)
    assert margins[2] > 0.95 * 6.0 - 2.0
    assert margins[2] > margins[1] > margins[0]
    assert dynamic_margins(torch.tensor([1.0, 2.0]), gamma0=0.0, tau=1.0).tolist() == [0.0, 0.0]


def test_float32_follows_float64():
    gaps, history = _randn(16, scale=3), _randn(240, seed=1, scale=3)
    for gamma0, tau in ((4.0, 10.0), (0.375, 10.0), (3.0, 3.0), (1.0, 1.0)):
        exact = dynamic_margins(gaps, history, gamma0=gamma0, tau=tau)
        single = dynamic_margins(gaps.float(), history.float(), gamma0=gamma0, tau=tau)
        torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-5)
    assert dynamic_margins(gaps.bfloat16(), gamma0=1.0, tau=1.0).dtype == torch.float32


# --- losses -----------------------------------------------------------------------------------------------------------


def _reduce(rows, reduction):
    return np.mean(rows) if reduction == "mean" else np.array(rows)


def simpo_reference(chosen, rejected, history, *, beta, gamma_beta_ratio, tau, reduction="mean"):
    r = beta * (chosen - rejected)
    margins = _margins_by_loops([*r, *history], beta * gamma_beta_ratio, tau)
    return _reduce([math.log(1 + math.exp(m - x)) for x, m in zip(r, margins, strict=False)], reduction)


def dpo_reference(c, r, rc, rr, history, *, beta, gamma_beta_ratio, tau, label_smoothing=0.0, reduction="mean"):
    gaps, gamma0 = beta * ((c - r) - (rc - rr)), beta * gamma_beta_ratio
    z = gaps - (_margins_by_loops([*gaps, *history], gamma0, tau)[: len(gaps)] - gamma0)
    rows = [(1 - label_smoothing) * math.log1p(math.exp(-x)) + label_smoothing * math.log1p(math.exp(x)) for x in z]
    return _reduce(rows, reduction)


def test_battery_simpo():
    params = {"beta": 2.0, "gamma_beta_ratio": 0.5, "tau": 1.0}

    def gradient(chosen, rejected, history, **_):
        r = 2.0 * (chosen - rejected)
        weight = 1 / (1 + np.exp(r - _margins_by_loops([*r, *history], 1.0, 1.0)[: len(r)]))
        return -2.0 * weight / len(r), 2.0 * weight / len(r), None

    check_loss(
        gamma_simpo_loss,
        [_randn(6), _randn(6, seed=1), _randn(4, seed=2)],
        params,
        simpo_reference,
        gradient=gradient,  # finite differences would see the margins, which are constants
        detached=[2],
        dtypes={"float32": 1e-5},  # half precision gives float32
        reductions=("none", "mean"),
        rows=[0, 1],
    )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_battery_dpo(label_smoothing):
    params = {"beta": 0.5, "gamma_beta_ratio": 2.0, "tau": 1.0, "label_smoothing": label_smoothing}

    def gradient(c, r, rc, rr, history, **_):
        gaps = 0.5 * ((c - r) - (rc - rr))
        z = gaps - (_margins_by_loops([*gaps, *history], 1.0, 1.0)[: len(gaps)] - 1.0)
        slope = -0.5 * ((1 - label_smoothing) / (1 + np.exp(z)) - label_smoothing / (1 + np.exp(-z))) / len(z)
        return slope, -slope, -slope, slope, None

    check_loss(
        gamma_dpo_loss,
        [*(_randn(6, seed=seed, scale=3) for seed in range(4)), _randn(4, seed=5)],
        params,
        dpo_reference,
        gradient=gradient,  # finite differences would see the margins, which are constants
        detached=[4],
        dtypes={"float32": 1e-5},  # half precision gives float32
        reductions=("none", "mean"),
        rows=[0, 1, 2, 3],
    )


def test_equal_margins_give_simpo_and_dpo():
    chosen, rejected, ref_chosen, ref_rejected = (_randn(6, seed=seed) for seed in range(4))
    options = {"beta": 2.0, "gamma_beta_ratio": 0.4}
    got = gamma_simpo_loss(chosen, rejected, _randn(9, seed=7), **options, tau=1e6)
    torch.testing.assert_close(got, simpo_loss(chosen, rejected, **options), rtol=1e-6, atol=1e-6)
    pairs = (chosen, rejected, ref_chosen, ref_rejected)
    for eps in (0.0, 0.1):
        got = gamma_dpo_loss(*pairs, _randn(9, seed=7), **options, tau=1e6, label_smoothing=eps)
        torch.testing.assert_close(got, dpo_loss(*pairs, beta=2.0, label_smoothing=eps), rtol=1e-6, atol=1e-6)


def test_margins_feed_other_losses():
    chosen, rejected = _randn(6), _randn(6, seed=1)
    margins = dynamic_margins(2.0 * (chosen - rejected), gamma0=0.8, tau=1.0)
    torch.testing.assert_close(
        simpo_loss(chosen, rejected, beta=2.0, gamma_beta_ratio=margins / 2.0),
        gamma_simpo_loss(chosen, rejected, beta=2.0, gamma_beta_ratio=0.4, tau=1.0),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    options = {"beta": 2.0, "gamma_beta_ratio": 0.4, "tau": 1.0}
    half = [_randn(6, seed=seed).to(dtype).requires_grad_() for seed in range(4)]
    exact = [x.detach().double() for x in half]
    for fn, count in ((gamma_simpo_loss, 2), (gamma_dpo_loss, 4)):
        loss = fn(*half[:count], **options)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(fn(*exact[:count], **options).item(), rel=1e-5)
        loss.backward()
    assert all(x.grad.dtype == dtype for x in half)


# --- queue ------------------------------------------------------------------------------------------------------------


def test_queue_is_first_in_first_out_and_bounded():
    queue = RewardGapQueue(max_size=5, pool_size=100, init_size=2)
    first = queue.state_dict()["history"][0]
    queue.push(torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(queue.state_dict()["history"][0], torch.cat([first, torch.tensor([1.0, 2.0])]))
    queue.push(torch.tensor([3.0, 4.0]))
    assert queue.state_dict()["history"][0, 1:].tolist() == [1.0, 2.0, 3.0, 4.0]
    queue.push(torch.arange(10.0))
    assert queue.state_dict()["history"].tolist() == [[5.0, 6.0, 7.0, 8.0, 9.0]]
    assert len(queue) == 5
    queue = RewardGapQueue()
    assert len(queue) == 8
    for _ in range(50):
        queue.push(torch.randn(64, generator=torch.Generator().manual_seed(0)))
    assert len(queue) == 2048


def test_samples_are_without_replacement_and_fill_the_pool():
    queue = RewardGapQueue(max_size=100, pool_size=16, init_size=0)
    assert queue.sample(4).shape == (0,)
    queue.push(torch.arange(10.0))
    assert sorted(queue.sample(4).tolist()) == list(range(10))
    queue.push(torch.arange(10.0, 40.0))
    drawn = queue.sample(4).tolist()
    assert len(drawn) == len(set(drawn)) == 12
    assert set(drawn) <= set(range(40))
    assert queue.sample(16).shape == queue.sample(40).shape == (0,)
    counts = torch.zeros(40)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        counts[queue.sample(4, generator).long()] += 1
    # each of 40 is drawn with probability 0.3; six standard deviations
    assert (counts / 2000 - 0.3).abs().max() < 6 * math.sqrt(0.3 * 0.7 / 2000)


def test_samples_depend_on_seed_and_pushes_only():
    queues = [RewardGapQueue(seed=seed, pool_size=16) for seed in (0, 0, 1)]
    for queue in queues:
        queue.push(torch.arange(100.0))
    torch.manual_seed(5)
    first = queues[0].sample(4)
    torch.manual_seed(6)
    assert torch.equal(first, queues[1].sample(4))
    assert torch.equal(first, queues[0].sample(4))
    assert not torch.equal(first, queues[2].sample(4))
    queues[0].push(torch.zeros(1))
    assert not torch.equal(first, queues[0].sample(4))


def test_rows_belong_to_processes():
    queue = RewardGapQueue(init_size=1, pool_size=100)
    start = queue.sample(1).tolist()
    queue.push(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert sorted(queue.sample(1, process=0).tolist()) == sorted([*start, 1.0, 2.0])
    assert sorted(queue.sample(1, process=1).tolist()) == sorted([*start, 3.0, 4.0])
    # half as many processes, or twice as many, after a resume
    smaller, larger = RewardGapQueue(init_size=1), RewardGapQueue(init_size=1)
    for other in (smaller, larger):
        other.load_state_dict(queue.state_dict())
    smaller.push(torch.tensor([9.0]))
    assert smaller.state_dict()["history"].tolist() == [[*start, 1.0, 2.0, 9.0]]
    larger.push(torch.full((3, 1), 9.0))
    assert larger.state_dict()["history"][2].tolist() == [*start, 1.0, 2.0, 9.0]


# --- loss object ------------------------------------------------------------------------------------------------------


def _pair_logps(batch: int, seed: int) -> Logps:
    values = [_randn(batch, seed=10 * seed + i) for i in range(4)]
    return Logps(values[0].requires_grad_(), values[1].requires_grad_(), values[2], values[3])


def test_object_is_the_function_with_a_sample_of_its_past():
    for base, options in (
        ("simpo", {"beta": 2.0, "gamma_beta_ratio": 0.4}),
        ("dpo", {"beta": 0.5, "gamma_beta_ratio": 2.0}),
    ):
        loss = GammaPOLoss(base, **options, tau=1.0, seed=3)
        twin = RewardGapQueue(seed=3)
        for seed in range(4):
            logps = _pair_logps(5, seed)
            out = loss(logps, LossContext())
            refs = (logps.ref_chosen, logps.ref_rejected) if base == "dpo" else ()
            fn = gamma_dpo_loss if base == "dpo" else gamma_simpo_loss
            history = twin.sample(5)
            want = fn(logps.chosen, logps.rejected, *refs, history, **options, tau=1.0)
            torch.testing.assert_close(out.loss, want)
            gaps = out.chosen_rewards - out.rejected_rewards
            margins = dynamic_margins(gaps, history, gamma0=math.prod(options.values()), tau=1.0)
            for name in ("mean", "min", "max"):
                torch.testing.assert_close(out.metrics[f"margin/{name}"], getattr(margins, name)())
            assert out.metrics["margin/pool_size"].item() == 5 + len(history)
            twin.push(gaps)
            assert not any(value.requires_grad for value in out.metrics.values())
        assert len(loss.queue) == 28


def test_label_smoothing_is_around_the_shifted_argument():
    logps = Logps(torch.tensor([-1.0]), torch.tensor([-1.5]))
    loss = GammaPOLoss(beta=2.0, gamma_beta_ratio=0.25, pool="gathered", label_smoothing=0.1)
    # one pair alone has the whole margin of 0.5
    want = 0.9 * math.log1p(math.exp(-0.5)) + 0.1 * math.log1p(math.exp(0.5))
    assert loss(logps, LossContext()).loss.item() == pytest.approx(want)


def test_evaluation_leaves_the_queue():
    def gather(values: torch.Tensor) -> torch.Tensor:
        raise AssertionError("gathered in evaluation")

    loss = GammaPOLoss()
    loss(_pair_logps(5, 0), LossContext())
    before = loss.state_dict()
    context = LossContext(training=False, gather=gather, world_size=2, process_index=1)
    first = loss(_pair_logps(5, 1), context).loss
    assert torch.equal(first, loss(_pair_logps(5, 1), context).loss)
    after = loss.state_dict()
    assert torch.equal(before["history"], after["history"])
    assert before["num_pushes"] == after["num_pushes"] == 1
    GammaPOLoss(pool="gathered")(_pair_logps(5, 1), context)


def test_resume_is_exact():
    loss = GammaPOLoss(tau=1.0)
    for seed in range(60):
        loss(_pair_logps(5, seed), LossContext())
    twin = GammaPOLoss(tau=1.0)
    twin.load_state_dict(loss.state_dict())
    for seed in range(60, 64):
        assert torch.equal(
            loss(_pair_logps(5, seed), LossContext()).loss, twin(_pair_logps(5, seed), LossContext()).loss
        )
    other = GammaPOLoss(tau=1.0)
    assert not torch.equal(loss(_pair_logps(5, 64), LossContext()).loss, other(_pair_logps(5, 64), LossContext()).loss)


def test_defaults_by_form():
    simpo, dpo = GammaPOLoss(), GammaPOLoss("dpo")
    assert (simpo.beta, simpo.gamma0, simpo.tau) == (2.5, 0.75, 10.0)
    assert (dpo.beta, dpo.gamma0) == (0.1, 1.0)
    assert (simpo.requires_reference, simpo.length_normalized) == (False, True)
    assert (dpo.requires_reference, dpo.length_normalized) == (True, False)
    assert make_loss("gamma_po", pool="gathered").state_dict() == {}
    assert simpo.couples_pairs


# --- two processes ----------------------------------------------------------------------------------------------------


def _features() -> tuple[torch.Tensor, torch.Tensor]:
    return _randn(3, 8, 3, seed=1), _randn(3, 8, 3, seed=2)


def _steps(pool: str, rows: slice, context: LossContext) -> tuple[list[torch.Tensor], list[torch.Tensor], dict]:
    loss = GammaPOLoss(beta=2.0, gamma_beta_ratio=0.5, tau=1.0, pool=pool)
    weight = torch.tensor([0.3, -0.2, 0.5], dtype=F64, requires_grad=True)
    losses, gradients = [], []
    for x_chosen, x_rejected in zip(*_features(), strict=True):
        out = loss(Logps(x_chosen[rows] @ weight, x_rejected[rows] @ weight), context)
        losses.append(out.loss.detach())
        gradients.append(torch.autograd.grad(out.loss, weight)[0])
    return losses, gradients, loss.state_dict()


def steps_on_ranks(rank: int, world_size: int) -> dict:
    context = LossContext(gather=gathered, world_size=world_size, process_index=rank)
    out = {}
    for pool in ("gathered", "queue"):
        losses, gradients, state = _steps(pool, slice(4 * rank, 4 * rank + 4), context)
        for values in (*losses, *gradients):
            if pool == "gathered":
                torch.distributed.all_reduce(values)
                values /= world_size
        out[pool] = (losses, gradients, state)
    return out


def test_two_processes():
    ranks = run_gloo(steps_on_ranks, 2)
    losses, gradients, _ = _steps("gathered", slice(None), LossContext())
    for rank in ranks:
        torch.testing.assert_close(rank["gathered"][:2], (losses, gradients))
    apart = _steps("gathered", slice(4), LossContext())[1]
    assert not torch.allclose(apart[0], ranks[0]["gathered"][1][0])
    # Each process draws from its own past, and both hold the pasts of both.
    states = [rank["queue"][2] for rank in ranks]
    assert torch.equal(states[0]["history"], states[1]["history"])
    for index, rank in enumerate(ranks):
        losses, gradients, state = _steps("queue", slice(4 * index, 4 * index + 4), LossContext())
        torch.testing.assert_close(rank["queue"][:2], (losses, gradients))
        torch.testing.assert_close(state["history"][0], states[0]["history"][index])
        assert state["num_pushes"] == states[0]["num_pushes"] == 3


# --- bad input --------------------------------------------------------------------------------------------------------

GAPS = torch.tensor([0.5, -0.5])
OPTIONS = {"beta": 2.0, "gamma_beta_ratio": 0.4, "tau": 1.0}
NAN = torch.tensor([0.0, math.nan])

BAD = [
    (lambda: dynamic_margins(GAPS, gamma0=1.0, tau=0.0), r"tau must be positive and finite, got 0\.0"),
    (lambda: dynamic_margins(GAPS, gamma0=-1.0, tau=1.0), r"gamma0 must be a finite number >= 0, got -1\.0"),
    (lambda: dynamic_margins(GAPS, gamma0=1.0, tau=1.0, num_iters=0), r"num_iters must be an integer >= 1, got 0"),
    (lambda: dynamic_margins(GAPS, gamma0=1.0, tau=1.0, eps=-1.0), r"eps must be a finite number >= 0, got -1\.0"),
    (
        lambda: dynamic_margins(NAN, gamma0=1.0, tau=1.0),
        r"reward_gaps contains non-finite values, the first at \[1\]: nan",
    ),
    (lambda: dynamic_margins(GAPS, NAN, gamma0=1.0, tau=1.0), r"history contains non-finite values"),
    (lambda: dynamic_margins(GAPS[:0], gamma0=1.0, tau=1.0), r"reward_gaps: empty batch"),
    (lambda: dynamic_margins(GAPS[:, None], gamma0=1.0, tau=1.0), r"reward_gaps: expected 1-D"),
    (lambda: dynamic_margins(GAPS.long(), gamma0=1.0, tau=1.0), r"reward_gaps must be a floating-point tensor"),
    (lambda: dynamic_margins(GAPS, GAPS[:, None], gamma0=1.0, tau=1.0), r"history: expected 1-D"),
    (lambda: gamma_simpo_loss(GAPS, GAPS[:1], **OPTIONS), r"chosen_logps and rejected_logps must have the same shape"),
    (lambda: gamma_simpo_loss(GAPS, NAN, **OPTIONS), r"reward_gaps contains non-finite values"),
    (lambda: gamma_simpo_loss(GAPS, GAPS, **{**OPTIONS, "beta": 0.0}), r"beta must be positive"),
    (
        lambda: gamma_simpo_loss(GAPS, GAPS, **{**OPTIONS, "gamma_beta_ratio": -0.1}),
        r"gamma_beta_ratio must be .* >= 0",
    ),
    (lambda: gamma_simpo_loss(GAPS, GAPS, **OPTIONS, reduction="sum"), r"reduction must be one of 'mean', 'none'"),
    (lambda: gamma_dpo_loss(GAPS, GAPS, GAPS, GAPS[:1], **OPTIONS), r"must have the same shape"),
    (lambda: gamma_dpo_loss(*[GAPS] * 4, **OPTIONS, label_smoothing=0.5), r"label_smoothing must be in \[0, 0\.5\)"),
    (lambda: GammaPOLoss("orpo"), r"base must be one of 'dpo', 'simpo', got 'orpo'"),
    (lambda: GammaPOLoss(pool="que"), r"pool must be one of .*; did you mean 'queue'\?"),
    (lambda: GammaPOLoss(tau=-1.0), r"tau must be positive and finite, got -1\.0"),
    (lambda: GammaPOLoss(num_iters=0), r"num_iters must be an integer >= 1"),
    (lambda: GammaPOLoss(beta=0.0), r"beta must be positive and finite, got 0\.0"),
    (lambda: GammaPOLoss("dpo")(Logps(GAPS, GAPS), LossContext()), r"this loss needs a reference"),
    (lambda: GammaPOLoss()(Logps(GAPS, GAPS[:, None]), LossContext()), r"rejected_logps: expected 1-D"),
    (lambda: RewardGapQueue(max_size=0), r"max_size must be an integer >= 1, got 0"),
    (lambda: RewardGapQueue(pool_size=0), r"pool_size must be an integer >= 1, got 0"),
    (lambda: RewardGapQueue(max_size=4), r"init_size must be at most max_size = 4, got 8"),
    (lambda: RewardGapQueue().push(NAN), r"gaps contains non-finite values, the first at \[0, 1\]: nan"),
    (lambda: RewardGapQueue().push(torch.zeros(1, 1, 1)), r"gaps must be floating, \(B,\) or \(W, B\)"),
    (lambda: RewardGapQueue().push(torch.zeros(0)), r"gaps must be floating"),
    (lambda: RewardGapQueue().sample(0), r"batch_size must be an integer >= 1, got 0"),
    (lambda: GammaPOLoss().load_state_dict({"history": torch.zeros(1, 3000), "num_pushes": 1}), r"max_size = 2048"),
    (lambda: GammaPOLoss().load_state_dict({"mean": 0.0}), r"written by another method"),
    (lambda: GammaPOLoss(pool="gathered").load_state_dict({"mean": 0.0}), r"written by another method"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=range(len(BAD)))
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_refused_batch_leaves_no_trace():
    loss = GammaPOLoss()
    before = loss.state_dict()
    with pytest.raises(ValueError, match="non-finite"):
        loss(Logps(NAN, GAPS), LossContext())
    assert torch.equal(loss.state_dict()["history"], before["history"])
    assert loss.state_dict()["num_pushes"] == 0


# --- learning ---------------------------------------------------------------------------------------------------------


def test_flipped_pairs_get_smaller_margins():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 5, generator=generator)
    better = (features[:, 0] + 0.5 * features[:, 1] > 0).long()
    flipped = torch.rand(400, generator=generator) < 0.2
    preferred = torch.where(flipped, 1 - better, better)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = torch.nn.Sequential(torch.nn.Linear(5, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)

    def pairs(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        log_probs = F.log_softmax(policy(features[rows]), 1)
        return tuple(log_probs.gather(1, answer[rows, None])[:, 0] for answer in (preferred, 1 - preferred))

    def step(loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for _ in range(60):  # warm start: likelihood of the labels as they are
        step(-pairs(torch.randint(0, 400, (32,), generator=generator))[0].mean())
    loss = GammaPOLoss(beta=2.5, gamma_beta_ratio=0.4, tau=1.0)
    for _ in range(100):
        step(loss(Logps(*pairs(torch.randint(0, 400, (32,), generator=generator))), LossContext()).loss)
    with torch.no_grad():
        chosen, rejected = pairs(torch.arange(400))
    margins = dynamic_margins(2.5 * (chosen - rejected), gamma0=1.0, tau=1.0)
    # without the method both means are 1
    assert margins[flipped].mean() < margins[~flipped].mean() - 0.1


@pytest.mark.slow
@pytest.mark.compile
def test_margins_compile_into_one_graph():
    def margins(gaps: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
        return dynamic_margins(gaps, history, gamma0=1.0, tau=2.0, num_iters=3)

    inputs = _randn(4).float(), _randn(5, seed=1).float()
    torch.testing.assert_close(torch.compile(margins, fullgraph=True)(*inputs), margins(*inputs))
