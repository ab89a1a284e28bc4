from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ballast_testing.losses import check_loss
from recsys_losses.baselines import BCELoss, BPRLoss, SoftmaxLoss, bce_loss, bpr_loss, softmax_loss
from recsys_losses.bsl import bsl_loss
from recsys_losses.ssm import sampled_softmax_loss

score = st.floats(-50.0, 50.0)


def _rng(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _reduced(rows: list[float], reduction: str) -> np.ndarray:
    loss = np.array(rows)
    return loss if reduction == "none" else getattr(np, reduction)(loss)


def bpr_reference(pos, neg, *, reduction="mean"):
    return _reduced([math.log1p(math.exp(n - p)) for p, n in zip(pos, neg, strict=True)], reduction)


def bce_reference(pos, neg, *, reduction="mean"):
    rows = []
    for p, negatives in zip(pos, neg, strict=True):
        wrong = [-math.log(1.0 - 1.0 / (1.0 + math.exp(-n))) for n in negatives]
        rows.append(-math.log(1.0 / (1.0 + math.exp(-p))) + sum(wrong) / len(wrong))
    return _reduced(rows, reduction)


def softmax_reference(pos, neg, *, temperature, reduction="mean"):
    rows = []
    for p, negatives in zip(pos, neg, strict=True):
        rows.append(-math.log(math.exp(p / temperature) / sum(math.exp(n / temperature) for n in negatives)))
    return _reduced(rows, reduction)


def test_battery_bpr():
    check_loss(bpr_loss, [_rng(5), _rng(5, seed=1)], {}, bpr_reference, module=BPRLoss())


def test_battery_bce():
    check_loss(bce_loss, [_rng(5), _rng(5, 7, seed=1)], {}, bce_reference, module=BCELoss())


def test_battery_softmax():
    params = {"temperature": 0.2}
    check_loss(softmax_loss, [_rng(5), _rng(5, 7, seed=1)], params, softmax_reference, module=SoftmaxLoss(0.2))


def test_bpr_known_values():
    loss = bpr_loss(torch.tensor([0.0, 100.0, -1000.0]), torch.tensor([0.0, 0.0, 1000.0]), reduction="none")
    torch.testing.assert_close(loss, torch.tensor([math.log(2.0), 0.0, 2000.0]))


def test_bpr_keeps_its_gradient_on_misordered_pairs():
    # An epsilon inside the logarithm, as in other libraries, makes this gradient vanish.
    pos = torch.tensor([-80.0], requires_grad=True)
    bpr_loss(pos, torch.tensor([80.0])).backward()
    assert pos.grad.item() == pytest.approx(-1.0)


def test_small_losses_are_exact_to_rounding():
    # softplus(-x) is about exp(-x); a logarithm of 1 + exp(-x) would give 0 here.
    loss = bpr_loss(torch.tensor([30.0]), torch.tensor([0.0]))
    assert loss.item() == pytest.approx(math.exp(-30.0), rel=1e-5)


def test_bce_with_one_repeated_negative_does_not_depend_on_n():
    pos, neg = _rng(4), _rng(4, 1, seed=1)
    torch.testing.assert_close(bce_loss(pos, neg), bce_loss(pos, neg.expand(4, 9)))


def test_bce_splits_into_two_bpr_like_halves():
    # softplus(-p) is BPR against a score of 0, softplus(n) is BPR of 0 against n.
    pos, neg, zero = _rng(4), _rng(4, 1, seed=1), torch.zeros(4, dtype=torch.float64)
    torch.testing.assert_close(bce_loss(pos, neg), bpr_loss(pos, zero) + bpr_loss(zero, neg[:, 0]))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_softmax_equals_bsl_reweight_and_ssm_without_positive(reduction):
    pos, neg = _rng(6), _rng(6, 9, seed=1)
    want = softmax_loss(pos, neg, temperature=0.11, reduction=reduction)
    reweight = bsl_loss(pos, neg, temperature=0.11, power=1.0, mode="reweight", reduction=reduction)
    without = sampled_softmax_loss(pos, neg, temperature=0.11, include_positive=False, reduction=reduction)
    torch.testing.assert_close(reweight, want)
    torch.testing.assert_close(without, want)


@given(pos=score, neg=score, shift=score)
@settings(derandomize=True, deadline=None, max_examples=200)
def test_bpr_is_shift_invariant_positive_and_above_the_margin(pos, neg, shift):
    p, n = torch.tensor([pos], dtype=torch.float64), torch.tensor([neg], dtype=torch.float64)
    loss = bpr_loss(p, n)
    torch.testing.assert_close(bpr_loss(p + shift, n + shift), loss, rtol=1e-9, atol=1e-12)
    assert loss.item() > 0
    assert loss.item() >= neg - pos


@given(
    pos=score,
    negatives=st.lists(score, min_size=1, max_size=8),
    temperature=st.floats(0.01, 10.0),
    shift=st.floats(-5, 5),
)
@settings(derandomize=True, deadline=None, max_examples=200)
def test_softmax_is_shift_invariant_and_bounded_by_the_hardest_negative(pos, negatives, temperature, shift):
    p, n = torch.tensor([pos], dtype=torch.float64), torch.tensor([negatives], dtype=torch.float64)
    loss = softmax_loss(p, n, temperature=temperature).item()
    hardest = (max(negatives) - pos) / temperature
    tolerance = 1e-9 * (1.0 + 100.0 / temperature)
    assert softmax_loss(p + shift, n + shift, temperature=temperature).item() == pytest.approx(loss, abs=tolerance)
    assert hardest - tolerance <= loss <= hardest + math.log(len(negatives)) + tolerance


def test_half_precision_is_reduced_in_float32():
    # 4,096 equal row losses of log 2: a bfloat16 sum would stop growing long before.
    pos = torch.zeros(4096, dtype=torch.bfloat16)
    loss = bpr_loss(pos, pos.clone(), reduction="sum")
    assert loss.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(4096 * math.log(2.0), rel=1e-2)


@pytest.mark.parametrize(
    ("pos_dtype", "neg_dtype", "want"),
    [
        (torch.float32, torch.float64, torch.float64),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float16, torch.float16),
    ],
)
def test_result_has_the_promoted_dtype(pos_dtype, neg_dtype, want):
    pos, neg = torch.zeros(2, dtype=pos_dtype), torch.zeros(2, 3, dtype=neg_dtype)
    assert bpr_loss(pos, neg[:, 0]).dtype == want
    assert bce_loss(pos, neg).dtype == want
    assert softmax_loss(pos, neg, temperature=0.5).dtype == want


def test_nan_stays_visible():
    pos, neg = torch.tensor([0.0, math.nan]), torch.zeros(2, 3)
    for loss in (
        bpr_loss(pos, neg[:, 0], reduction="none"),
        bce_loss(pos, neg, reduction="none"),
        softmax_loss(pos, neg, temperature=1.0, reduction="none"),
    ):
        assert loss.isnan().tolist() == [False, True]


def test_vmap_equals_a_loop():
    pos, neg = _rng(3, 4), _rng(3, 4, 5, seed=1)
    for fn in (lambda p, n: bpr_loss(p, n[:, 0]), bce_loss, lambda p, n: softmax_loss(p, n, temperature=0.1)):
        torch.testing.assert_close(
            torch.vmap(fn)(pos, neg), torch.stack([fn(p, n) for p, n in zip(pos, neg, strict=True)])
        )


def test_nothing_waits_for_the_device():
    # A meta tensor holds no data, so whatever would read a value on the host fails here.
    pos = torch.zeros(4, device="meta", requires_grad=True)
    neg = torch.zeros(4, 6, device="meta", requires_grad=True)
    for loss in (bpr_loss(pos, neg[:, 0]), bce_loss(pos, neg), softmax_loss(pos, neg, temperature=0.1)):
        assert [g.shape for g in torch.autograd.grad(loss, (pos, neg))] == [pos.shape, neg.shape]


@pytest.mark.parametrize("temperature", [0.0, -0.1, math.nan, math.inf])
def test_bad_temperature(temperature):
    message = r"temperature must be a positive finite number, got"
    with pytest.raises(ValueError, match=message):
        softmax_loss(torch.zeros(2), torch.zeros(2, 3), temperature=temperature)
    with pytest.raises(ValueError, match=message):
        SoftmaxLoss(temperature)


def test_bad_shapes():
    with pytest.raises(ValueError, match=r"pos_score \(B,\) and neg_score \(B,\), got \(4,\) and \(8,\)"):
        bpr_loss(torch.zeros(4), torch.zeros(8))
    with pytest.raises(ValueError, match="empty batch"):
        bpr_loss(torch.zeros(0), torch.zeros(0))
    for fn in (bce_loss, lambda p, n: softmax_loss(p, n, temperature=1.0)):
        with pytest.raises(ValueError, match=r"got \(4,\) and \(3, 5\)"):
            fn(torch.zeros(4), torch.zeros(3, 5))
        with pytest.raises(ValueError, match="empty batch"):
            fn(torch.zeros(0), torch.zeros(0, 5))
        with pytest.raises(ValueError, match="no columns"):
            fn(torch.zeros(4), torch.zeros(4, 0))


def test_bad_dtype_and_reduction():
    with pytest.raises(ValueError, match=r"neg_score must be a floating-point tensor, got dtype torch.int64"):
        bpr_loss(torch.zeros(2), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"pos_score must be a floating-point tensor"):
        bce_loss(torch.zeros(2, dtype=torch.bool), torch.zeros(2, 1))
    for build in (
        lambda: bpr_loss(torch.zeros(2), torch.zeros(2), reduction="avg"),
        lambda: bce_loss(torch.zeros(2), torch.zeros(2, 1), reduction="avg"),
        lambda: softmax_loss(torch.zeros(2), torch.zeros(2, 1), temperature=1.0, reduction="avg"),
        lambda: BPRLoss(reduction="avg"),
        lambda: BCELoss(reduction="avg"),
        lambda: SoftmaxLoss(0.1, reduction="avg"),
    ):
        with pytest.raises(ValueError, match=r"unknown reduction 'avg'; accepted: mean, none, sum"):
            build()


def test_modules_show_their_options():
    assert repr(SoftmaxLoss(0.2)) == "SoftmaxLoss(temperature=0.2, reduction='mean')"
    assert repr(BPRLoss(reduction="sum")) == "BPRLoss(reduction='sum')"
    assert repr(BCELoss()) == "BCELoss(reduction='mean')"


@pytest.mark.slow
@pytest.mark.compile
def test_compiles_into_one_graph():
    pos, neg = _rng(4), _rng(4, 6, seed=1)

    def all_three(p, n):
        return bpr_loss(p, n[:, 0]) + bce_loss(p, n) + softmax_loss(p, n, temperature=0.2)

    compiled = torch.compile(all_three, fullgraph=True)
    torch.testing.assert_close(compiled(pos, neg), all_three(pos, neg))
