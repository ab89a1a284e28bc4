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
from pref_opt import baselines
from pref_opt.baselines import (
    CPOLoss,
    DPOLoss,
    IPOLoss,
    KTOPairLoss,
    ORPOLoss,
    SDPOLoss,
    SimPOLoss,
    SLiCLoss,
    chosen_nll,
    cpo_loss,
    dmpo_loss,
    dpo_loss,
    ipo_loss,
    kto_pair_loss,
    mppo_loss,
    orpo_odds_loss,
    reward_gap,
    robust_dpo_loss,
    sdpo_loss,
    sequence_logps,
    simpo_loss,
    slic_loss,
)
from pref_opt.losses import Logps, LossContext, make_loss

F64 = torch.float64
REFERENCE_FREE = ("simpo", "cpo", "slic", "orpo", "mppo")
MANY = ("sdpo", "dmpo", "mppo")
FUNCTIONS = {
    "dpo": (dpo_loss, {"beta": 0.3}),
    "cdpo": (dpo_loss, {"beta": 0.3, "label_smoothing": 0.2}),
    "robust_dpo": (robust_dpo_loss, {"beta": 0.3, "label_smoothing": 0.2}),
    "ipo": (ipo_loss, {"beta": 0.3}),
    "kto_pair": (kto_pair_loss, {"beta": 0.3}),
    "simpo": (simpo_loss, {"beta": 2.0, "gamma_beta_ratio": 0.4, "label_smoothing": 0.1}),
    "slic": (slic_loss, {"beta": 0.8}),
    "cpo": (cpo_loss, {"beta": 0.3, "label_smoothing": 0.1}),
    "orpo": (orpo_odds_loss, {"beta": 0.7}),
    "sdpo": (sdpo_loss, {"beta": 0.9}),
    "dmpo": (dmpo_loss, {"beta": 0.9}),
    "mppo": (mppo_loss, {"beta": 0.9}),
}


def _logps(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    return -3 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) - 0.05


def _inputs(name: str, batch: int = 6, dtype: torch.dtype = F64) -> list[torch.Tensor]:
    rejected = (batch, 3) if name in MANY else (batch,)
    shapes = [(batch,), rejected] if name in REFERENCE_FREE else [(batch,), rejected, (batch,), rejected]
    return [_logps(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


# --- values and gradients against plain loops --------------------------------------------------------------------------


def _s(z):
    return 1 / (1 + math.exp(-z))


def _smooth(z, eps):
    return -(1 - eps) * math.log(_s(z)) - eps * math.log(_s(-z))


def _row(name, b, c, r, ref_c=None, ref_r=None, beta=None, label_smoothing=0.0, gamma_beta_ratio=0.0):
    if name in ("sdpo", "dmpo"):
        ratio = c[b] - ref_c[b]
        others = [r[b][j] - ref_r[b][j] for j in range(len(r[b]))]
        if name == "dmpo":
            return _smooth(beta * (ratio - sum(others) / len(others)), 0.0)
        return -math.log(_s(-math.log(sum(math.exp(beta * (n - ratio)) for n in others))))
    if name == "mppo":
        return _smooth(beta * sum(math.exp(c[b]) - math.exp(x) for x in r[b]), 0.0)
    diff = c[b] - r[b]
    if name == "orpo":
        odds = (math.exp(c[b]) / (1 - math.exp(c[b]))) / (math.exp(r[b]) / (1 - math.exp(r[b])))
        return -beta * math.log(_s(math.log(odds)))
    if name == "slic":
        return max(0.0, 1 - beta * diff)
    if name in ("simpo", "cpo"):
        return _smooth(beta * diff - beta * gamma_beta_ratio, label_smoothing)
    gap = diff - (ref_c[b] - ref_r[b])
    if name == "ipo":
        return (gap - 0.5 / beta) ** 2
    if name == "robust_dpo":
        eps = label_smoothing
        return (-(1 - eps) * math.log(_s(beta * gap)) + eps * math.log(_s(-beta * gap))) / (1 - 2 * eps)
    return _smooth(beta * gap, label_smoothing)


def _kto(c, r, ref_c, ref_r, beta):
    a, b = c - ref_c, r - ref_r
    first = [1 - _s(beta * (x - max(0.0, sum(b) / len(b)))) for x in a]
    return first + [1 - _s(beta * (max(0.0, sum(a) / len(a)) - x)) for x in b]


def _reference(name):
    def loss(*arrays, reduction="mean", **params):
        if name == "kto_pair":
            rows = np.array(_kto(*arrays, **params))
        else:
            rows = np.array([_row(name, b, *arrays, **params) for b in range(len(arrays[0]))])
        return rows.mean() if reduction == "mean" else rows

    return loss


@pytest.mark.parametrize("name", FUNCTIONS)
def test_battery(name):
    fn, params = FUNCTIONS[name]
    check_loss(
        fn,
        _inputs(name),
        params,
        _reference(name),
        # half precision gives float32, which has a test of its own
        dtypes={"float32": 1e-5},
        reductions=("none", "mean"),
        # paired KTO returns two losses per pair, see its own test
        permutation=name != "kto_pair",
    )


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(name, dtype):
    fn, params = FUNCTIONS[name]
    half = [x.to(dtype).requires_grad_() for x in _inputs(name)]
    exact = fn(*[x.detach().double() for x in half], **params)
    loss = fn(*half, **params)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    loss.backward()
    assert all(x.grad.dtype == dtype and x.grad.isfinite().all() for x in half)


def test_mixed_dtypes_are_computed_in_the_widest():
    chosen, rejected, ref_chosen, ref_rejected = _inputs("dpo")
    mixed = dpo_loss(chosen.bfloat16(), rejected.float(), ref_chosen, ref_rejected.half())
    want = dpo_loss(chosen.bfloat16().double(), rejected.float().double(), ref_chosen, ref_rejected.half().double())
    assert mixed.dtype == F64
    torch.testing.assert_close(mixed, want)


def test_sums_keep_small_gaps_in_float32():
    # The step of bfloat16 at 300 is 2: nothing of these gaps would be left.
    chosen, rejected = torch.tensor([-300.0]), torch.tensor([-300.5])
    assert dpo_loss(chosen, rejected, chosen, chosen, beta=1.0).item() == pytest.approx(math.log1p(math.exp(-0.5)))


# --- identities -------------------------------------------------------------------------------------------------------


def test_gradients_of_the_card():
    chosen, rejected, *refs = (x.requires_grad_() for x in _inputs("dpo"))
    gap = reward_gap(chosen, rejected, *refs).detach()
    up, down = torch.autograd.grad(
        dpo_loss(chosen, rejected, *refs, beta=0.4, reduction="none").sum(), (chosen, rejected)
    )
    torch.testing.assert_close(up, -0.4 * torch.sigmoid(-0.4 * gap))
    torch.testing.assert_close(down, -up)
    at_margin = torch.tensor([-1.0], dtype=F64, requires_grad=True)
    simpo_loss(at_margin, torch.tensor([-1.4], dtype=F64), beta=3.0, gamma_beta_ratio=0.4).backward()
    assert at_margin.grad.item() == pytest.approx(-1.5)


def test_gradient_of_sdpo_is_a_softmax_over_negatives():
    chosen, rejected, ref_chosen, ref_rejected = _inputs("sdpo")
    rejected.requires_grad_()
    grad = torch.autograd.grad(sdpo_loss(chosen, rejected, ref_chosen, ref_rejected, reduction="none").sum(), rejected)[
        0
    ]
    margin = (rejected - ref_rejected) - (chosen - ref_chosen)[:, None]
    torch.testing.assert_close(grad, margin.softmax(1) * margin.logsumexp(1).sigmoid()[:, None])


def test_identities_between_losses():
    pair = _inputs("dpo")
    dpo = dpo_loss(*pair, beta=0.7)
    listed = [x[:, None] if i % 2 else x for i, x in enumerate(pair)]
    for same in (
        sdpo_loss(*listed, beta=0.7),
        dmpo_loss(*listed, beta=0.7),
        robust_dpo_loss(*pair, beta=0.7, label_smoothing=0.0),
        dpo_loss(*pair, beta=0.7, label_smoothing=0.0),
    ):
        torch.testing.assert_close(same, dpo)
    chosen, rejected = pair[:2]
    no_reference = dpo_loss(chosen, rejected, torch.zeros_like(chosen), torch.zeros_like(chosen), beta=0.7)
    torch.testing.assert_close(simpo_loss(chosen, rejected, beta=0.7, gamma_beta_ratio=0.0), no_reference)
    torch.testing.assert_close(cpo_loss(chosen, rejected, beta=0.7), no_reference)


def test_a_margin_per_pair_equals_pairs_one_by_one():
    chosen, rejected = _inputs("simpo")
    margins = torch.linspace(-0.5, 1.0, len(chosen), dtype=F64)
    together = simpo_loss(chosen, rejected, gamma_beta_ratio=margins, reduction="none")
    for i, margin in enumerate(margins):
        alone = simpo_loss(chosen[i : i + 1], rejected[i : i + 1], gamma_beta_ratio=margin.item())
        torch.testing.assert_close(together[i], alone)
    scalar = torch.tensor(0.3, dtype=F64)
    torch.testing.assert_close(
        simpo_loss(chosen, rejected, gamma_beta_ratio=scalar), simpo_loss(chosen, rejected, gamma_beta_ratio=0.3)
    )


def test_robust_dpo_is_unbiased_under_flips():
    pair = _inputs("dpo")
    flipped = [pair[1], pair[0], pair[3], pair[2]]
    kept = robust_dpo_loss(*pair, beta=0.5, label_smoothing=0.3)
    mixed = 0.7 * kept + 0.3 * robust_dpo_loss(*flipped, beta=0.5, label_smoothing=0.3)
    torch.testing.assert_close(mixed, dpo_loss(*pair, beta=0.5))


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - {"orpo", "kto_pair", "mppo"}))
@given(shift=st.floats(-50, 50))
@settings(derandomize=True, deadline=None, max_examples=25)
def test_a_common_shift_changes_nothing(name, shift):
    fn, params = FUNCTIONS[name]
    inputs = _inputs(name)
    moved = [inputs[0] + shift, inputs[1] + shift, *inputs[2:]]
    torch.testing.assert_close(fn(*moved, **params), fn(*inputs, **params), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["orpo", "kto_pair", "mppo"])
def test_a_common_shift_changes_the_others(name):
    fn, params = FUNCTIONS[name]
    inputs = _inputs(name)
    moved = [inputs[0] - 1, inputs[1] - 1, *inputs[2:]]
    assert abs(fn(*moved, **params) - fn(*inputs, **params)) > 1e-3


def test_kto_pairs_follow_a_permutation():
    inputs = _inputs("kto_pair")
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    moved = kto_pair_loss(*[x[order] for x in inputs], reduction="none")
    both = torch.cat([order, order + 6])
    torch.testing.assert_close(moved, kto_pair_loss(*inputs, reduction="none")[both])


# --- edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [4000.0, -4000.0])
def test_huge_gaps(gap):
    chosen = torch.tensor([gap], requires_grad=True)
    zero = torch.zeros(1)
    loss = dpo_loss(chosen, zero, zero, zero, beta=0.5)
    loss.backward()
    assert loss.item() == (0.0 if gap > 0 else 2000.0)
    assert chosen.grad.item() == (0.0 if gap > 0 else -0.5)
    many = sdpo_loss(zero, torch.full((1, 2), -gap), zero, torch.zeros(1, 2))
    assert many.item() == pytest.approx(0.0 if gap > 0 else 4000.0 + math.log(2))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("near_one", [0.0, -1e-30, -1e-12, -1e-8])
def test_odds_of_probability_one_stay_finite(dtype, near_one):
    for pair in ([near_one, -1.0], [-1.0, near_one], [near_one, near_one]):
        chosen, rejected = (torch.tensor([x], dtype=dtype, requires_grad=True) for x in pair)
        loss = orpo_odds_loss(chosen, rejected, beta=1.0)
        loss.backward()
        assert loss.isfinite()
        assert chosen.grad.isfinite()
        assert rejected.grad.isfinite()
    assert orpo_odds_loss(torch.tensor([near_one]), torch.tensor([-1.0]), beta=1.0) < 1e-6


@pytest.mark.parametrize("x", [-1e-6, -0.1, -math.log(2) + 1e-6, -math.log(2) - 1e-6, -3.0, -80.0])
def test_odds_keep_their_digits_in_float32(x):
    pair = torch.tensor([x]), torch.tensor([-0.5])
    want = orpo_odds_loss(*[value.double() for value in pair], beta=1.0)
    assert orpo_odds_loss(*pair, beta=1.0).item() == pytest.approx(want.item(), rel=1e-5)


def test_vanished_probabilities_have_no_gradient():
    chosen = torch.tensor([-400.0], requires_grad=True)
    loss = mppo_loss(chosen, torch.full((1, 3), -500.0))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert chosen.grad.item() == 0.0


# --- sequences --------------------------------------------------------------------------------------------------------


def test_sequence_logps_sum_the_shifted_tokens():
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=F64)
    labels = torch.tensor([[-100, -100, 3, 6, 0], [2, -100, 5, -100, -100]])
    log_probs = logits.log_softmax(-1)
    want = torch.stack([log_probs[0, 1, 3] + log_probs[0, 2, 6] + log_probs[0, 3, 0], log_probs[1, 1, 5]])
    torch.testing.assert_close(sequence_logps(logits, labels), want)
    torch.testing.assert_close(sequence_logps(logits, labels, average=True), want / torch.tensor([3, 1]))
    moved = torch.where(labels == -100, 1, labels)
    torch.testing.assert_close(sequence_logps(logits, moved, ignore_index=1), want)
    assert torch.autograd.gradcheck(lambda x: sequence_logps(x, labels, average=True), (logits.requires_grad_(),))


def test_sequence_logps_of_nothing_and_of_half_precision():
    logits = torch.randn(1, 4, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert sequence_logps(logits, torch.full((1, 4), -100), average=True).item() == 0.0
    labels = torch.tensor([[-100, 1, 2, 8]])
    got = sequence_logps(logits, labels)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(sequence_logps(logits.double(), labels).item(), rel=1e-6)


def test_nll_counts_completions_and_not_tokens():
    sums = torch.tensor([-6.0, -4.0, -0.0], dtype=F64)
    lengths = torch.tensor([3, 1, 0])
    assert chosen_nll(Logps(sums, sums, chosen_lengths=lengths), length_normalized=False).item() == 2.0
    assert chosen_nll(Logps(sums, sums), length_normalized=True).item() == pytest.approx(10 / 3)
    with pytest.raises(ValueError, match=r"chosen_lengths must have shape \(3,\) for a term per token, got None"):
        chosen_nll(Logps(sums, sums), length_normalized=False)
    with pytest.raises(ValueError, match=r"chosen_lengths must have shape \(3,\) .* got \(2,\)"):
        chosen_nll(Logps(sums, sums, chosen_lengths=lengths[:2]), length_normalized=False)


# --- loss objects -----------------------------------------------------------------------------------------------------

OBJECTS = {
    "dpo": ({"beta": 0.3}, "dpo", False),
    "cdpo": ({"beta": 0.3, "label_smoothing": 0.2}, "cdpo", False),
    "robust_dpo": ({"beta": 0.3, "label_smoothing": 0.2}, "robust_dpo", False),
    "dpo_norm": ({"beta": 0.3}, "dpo", True),
    "ipo": ({"beta": 0.3}, "ipo", False),
    "kto_pair": ({"beta": 0.3}, "kto_pair", False),
    "simpo": ({"beta": 2.0, "gamma_beta_ratio": 0.4, "label_smoothing": 0.1}, "simpo", True),
    "slic": ({"beta": 0.8}, "slic", True),
    "cpo": ({"beta": 0.3, "cpo_alpha": 0.0, "label_smoothing": 0.1}, "cpo", False),
    "sdpo": ({"beta": 0.9}, "sdpo", False),
    "dmpo": ({"beta": 0.9}, "dmpo", False),
    "mppo": ({"beta": 0.9}, "mppo", False),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", OBJECTS)
def test_objects_compute_their_function(name, training):
    options, function, normalized = OBJECTS[name]
    loss = make_loss(name, **options)
    fn, params = FUNCTIONS[function]
    inputs = [x.requires_grad_() for x in _inputs(function)]
    out = loss(Logps(*inputs), LossContext(training=training))
    torch.testing.assert_close(out.loss, fn(*inputs, **params))
    assert loss.length_normalized is normalized
    assert loss.requires_reference is (function not in REFERENCE_FREE)
    assert loss.multi_negative is (function in MANY)
    chosen, rejected = inputs[:2] if len(inputs) == 2 else (inputs[0] - inputs[2], inputs[1] - inputs[3])
    torch.testing.assert_close(out.chosen_rewards, options["beta"] * chosen.detach())
    torch.testing.assert_close(out.rejected_rewards, options["beta"] * rejected.detach())
    assert not out.chosen_rewards.requires_grad
    assert not out.rejected_rewards.requires_grad
    assert loss.state_dict() == {}
    assert not loss.wants_window


def test_cpo_and_orpo_add_the_likelihood():
    chosen, rejected = _inputs("cpo")
    lengths = torch.arange(1, 7)
    out = CPOLoss(beta=0.3, cpo_alpha=0.5)(Logps(chosen, rejected, chosen_lengths=lengths), LossContext())
    nll = -(chosen / lengths).mean()
    torch.testing.assert_close(out.loss, cpo_loss(chosen, rejected, beta=0.3) + 0.5 * nll)
    torch.testing.assert_close(out.metrics["nll"], nll)
    out = ORPOLoss(beta=0.3)(Logps(chosen.requires_grad_(), rejected), LossContext())
    torch.testing.assert_close(out.loss, orpo_odds_loss(chosen, rejected, beta=0.3) - chosen.mean())
    assert not out.metrics["nll"].requires_grad
    with pytest.raises(ValueError, match="chosen_lengths"):
        CPOLoss()(Logps(chosen, rejected), LossContext())


def test_convention_is_an_option_where_codes_differ():
    assert (IPOLoss().length_normalized, IPOLoss(length_normalized=True).length_normalized) == (False, True)
    assert (SLiCLoss().length_normalized, SLiCLoss(length_normalized=False).length_normalized) == (True, False)


def test_half_precision_objects_return_float32():
    chosen, rejected, *refs = (x.bfloat16() for x in _inputs("dpo"))
    out = DPOLoss()(Logps(chosen, rejected, *refs), LossContext())
    assert {out.loss.dtype, out.chosen_rewards.dtype, out.rejected_rewards.dtype} == {torch.float32}


# --- two processes ----------------------------------------------------------------------------------------------------


def _batch(rows: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(4, rows, 3, generator=generator, dtype=F64)
    return features[0], features[1], features[2, :, 0], features[3, :, 0]


def _kto_gradient(weight: torch.Tensor, rows: slice, context: LossContext) -> tuple[torch.Tensor, torch.Tensor]:
    weight = weight.clone().requires_grad_()
    x_chosen, x_rejected, ref_chosen, ref_rejected = (values[rows] for values in _batch(8))
    # A head start makes both KL terms positive, so that their gradients count.
    logps = Logps(x_chosen @ weight + 2, x_rejected @ weight + 2, ref_chosen, ref_rejected)
    loss = KTOPairLoss(beta=0.5)(logps, context).loss
    return loss.detach(), torch.autograd.grad(loss, weight)[0]


def kto_on_ranks(rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    context = LossContext(gather=gathered, world_size=world_size, process_index=rank)
    weight = torch.tensor([0.3, -0.2, 0.5], dtype=F64)
    loss, gradient = _kto_gradient(weight, slice(4 * rank, 4 * rank + 4), context)
    torch.distributed.all_reduce(gradient)
    return loss, gradient / world_size


def test_kto_on_two_processes_is_kto_on_the_joint_batch():
    weight = torch.tensor([0.3, -0.2, 0.5], dtype=F64)
    loss, gradient = _kto_gradient(weight, slice(None), LossContext())
    alone, _ = _kto_gradient(weight, slice(4), LossContext())
    assert abs(alone - loss) > 1e-3
    for rank_loss, rank_gradient in run_gloo(kto_on_ranks, 2):
        torch.testing.assert_close(rank_loss, loss)
        torch.testing.assert_close(rank_gradient, gradient)


def test_kto_in_evaluation_gathers_nothing():
    def gather(values: torch.Tensor) -> torch.Tensor:
        raise AssertionError("gathered in evaluation")

    inputs = _inputs("kto_pair")
    out = KTOPairLoss(0.3)(Logps(*inputs), LossContext(training=False, gather=gather, world_size=2))
    torch.testing.assert_close(out.loss, kto_pair_loss(*inputs, beta=0.3))


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bad_options(name):
    fn, params = FUNCTIONS[name]
    inputs = _inputs(name)
    for beta in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"beta must be positive and finite, got {beta!r}"):
            fn(*inputs, **{**params, "beta": beta})
        with pytest.raises(ValueError, match="beta must be positive"):
            make_loss(name, beta=beta)
    with pytest.raises(ValueError, match=r"reduction must be one of 'mean', 'none', got 'avg'"):
        fn(*inputs, **params, reduction="avg")
    if "label_smoothing" in params:
        for eps in (-0.1, 0.5, math.nan):
            with pytest.raises(ValueError, match=rf"label_smoothing must be in \[0, 0.5\), got {eps!r}"):
                fn(*inputs, **{**params, "label_smoothing": eps})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bad_tensors(name):
    fn, params = FUNCTIONS[name]
    inputs = _inputs(name)
    empty = [x[:0] for x in inputs]
    with pytest.raises(ValueError, match=r"empty batch"):
        fn(*empty, **params)
    with pytest.raises(
        ValueError, match=r"chosen_logps: expected 1-D per-sequence log-probabilities, got shape \(6, 1\)"
    ):
        fn(inputs[0][:, None], *inputs[1:], **params)
    with pytest.raises(ValueError, match=r"chosen_logps must be a floating-point tensor, got torch.int64"):
        fn(inputs[0].long(), *inputs[1:], **params)
    with pytest.raises(ValueError, match=r"rejected_logps must have"):
        fn(inputs[0], inputs[1][:3], *inputs[2:], **params)


def test_different_shapes_are_named():
    chosen, rejected = _inputs("simpo")
    message = r"chosen_logps and rejected_logps must have the same shape, got \(6,\) and \(5,\)"
    with pytest.raises(ValueError, match=message):
        simpo_loss(chosen, rejected[:5])
    with pytest.raises(ValueError, match=r"chosen_logps and ref_rejected_logps must have the same shape"):
        dpo_loss(chosen, rejected, chosen, rejected[:1])


BAD_MARGINS = [
    (math.nan, "gamma_beta_ratio must be a finite number, got nan"),
    (math.inf, "gamma_beta_ratio must be a finite number, got inf"),
    (
        torch.zeros(5),
        r"gamma_beta_ratio must be a number or .* shape \(\) or \(6,\), got torch.float32 of shape \(5,\)",
    ),
    (torch.zeros(6, dtype=torch.long), r"gamma_beta_ratio must be a number or .* got torch.int64"),
    (torch.tensor([0.0, 1.0, math.nan, 0.0, 0.0, 0.0]), r"gamma_beta_ratio contains non-finite values, .* \[2\]: nan"),
]


@pytest.mark.parametrize(("margin", "message"), BAD_MARGINS)
def test_bad_margins(margin, message):
    with pytest.raises(ValueError, match=message):
        simpo_loss(*_inputs("simpo"), gamma_beta_ratio=margin)


BAD_SEQUENCES = [
    (torch.zeros(2, 3), torch.zeros(2, 3).long(), r"expected logits \(B, T, V\) and labels \(B, T\), got \(2, 3\)"),
    (torch.zeros(2, 3, 4), torch.zeros(2, 4).long(), r"got \(2, 3, 4\) and \(2, 4\)"),
    (torch.zeros(2, 3, 4), torch.zeros(2, 3), "logits must be floating and labels integer"),
    (torch.zeros(0, 3, 4), torch.zeros(0, 3).long(), "empty batch"),
    (torch.zeros(1, 1, 4), torch.zeros(1, 1).long(), "fewer than 2 positions"),
    (torch.zeros(2, 3, 4), torch.tensor([[0, 1, 2], [0, 1, 4]]), r"labels must be in \[0, 4\) or -100, got 4 in row 1"),
    (torch.zeros(1, 3, 4), torch.tensor([[0, -1, 2]]), r"got -1 in row 0"),
]


@pytest.mark.parametrize(("logits", "labels", "message"), BAD_SEQUENCES)
def test_bad_sequences(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        sequence_logps(logits, labels)


def test_bad_objects():
    chosen, rejected = _inputs("simpo")
    with pytest.raises(ValueError, match="this loss needs a reference, got None"):
        DPOLoss()(Logps(chosen, rejected), LossContext())
    with pytest.raises(ValueError, match=r"rejected_logps must have shape \[B, K\]"):
        SDPOLoss()(Logps(chosen, rejected, chosen, rejected), LossContext())
    with pytest.raises(ValueError, match="rejected_logps: expected 1-D"):
        SimPOLoss()(Logps(chosen, rejected[:, None]), LossContext())
    with pytest.raises(ValueError, match=r"cpo_alpha must be a finite number >= 0, got -1\.0"):
        CPOLoss(cpo_alpha=-1.0)
    with pytest.raises(ValueError, match="gamma_beta_ratio must be a finite number, got nan"):
        SimPOLoss(gamma_beta_ratio=math.nan)


def test_every_public_name_exists():
    assert all(hasattr(baselines, name) for name in baselines.__all__)
    assert sorted(baselines.__all__) == sorted(set(baselines.__all__))


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dpo", "ipo", "kto_pair", "simpo", "slic", "cpo", "orpo"])
def test_a_policy_learns_a_rule_of_preference(name):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 6, generator=generator)
    better = (features[:, 0] * features[:, 1] > 0).long()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3))
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    loss = make_loss(name, beta={"ipo": 0.2, "simpo": 2.0}.get(name, 1.0))
    with torch.no_grad():
        start = F.log_softmax(policy(features), 1)

    def pairs(log_probs: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(log_probs.gather(1, answer[rows, None])[:, 0] for answer in (better, 1 - better))

    for _ in range(300):
        rows = torch.randint(0, 300, (64,), generator=generator)
        log_probs = F.log_softmax(policy(features[rows]), 1)
        refs = pairs(start[rows], rows) if loss.requires_reference else (None, None)
        out = loss(Logps(*pairs(log_probs, rows), *refs, chosen_lengths=torch.ones(64)), LossContext())
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    held_out = torch.arange(300, 400)
    with torch.no_grad():
        chosen, rejected = pairs(F.log_softmax(policy(features[held_out]), 1), held_out)
    # guessing gives 0.5
    assert (chosen > rejected).float().mean() > 0.85
