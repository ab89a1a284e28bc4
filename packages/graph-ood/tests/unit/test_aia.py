"""AIA: mask combination, regulariser, objectives and the shift measure against loops, limits and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from graph_ood.aia import combine_masks, graph_covariate_shift, mask_regularizer, objectives

F64 = torch.float64
UNIT = st.floats(0, 1)


def _rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def regularizer_reference(mask, index, num_graphs, ratio, count_term):
    total, graphs = 0.0, 0
    for g in range(num_graphs):
        values = [m for m, i in zip(mask.tolist(), index.tolist(), strict=True) if i == g]
        if not values:
            continue
        kept, left = sum(values) + 1e-8, sum(1 - v for v in values) + 1e-8
        total += abs(kept / (kept + left) - ratio)
        total += (sum(v > 0 for v in values) / len(values) - ratio) if count_term else 0.0
        graphs += 1
    return total / max(graphs, 1)


# --- combination ---------------------------------------------------------------------------------------------------


@given(pairs=st.lists(st.tuples(UNIT, UNIT), min_size=1, max_size=20))
@settings(derandomize=True, deadline=None, max_examples=100)
def test_the_combined_mask_keeps_what_is_stable(pairs):
    stable, adversarial = torch.tensor(pairs, dtype=F64).T
    mask = combine_masks(stable, adversarial)
    assert ((mask >= stable - 1e-15) & (mask <= 1 + 1e-15)).all()
    assert (mask >= adversarial - 1e-15).all()  # 1 - mask = (1 - stable)(1 - adversarial)
    torch.testing.assert_close(1 - mask, (1 - stable) * (1 - adversarial))
    assert torch.equal(combine_masks(torch.zeros_like(stable), adversarial), adversarial)
    assert torch.equal(combine_masks(torch.ones_like(stable), adversarial), torch.ones_like(stable))


def test_both_masks_get_gradients():
    assert torch.autograd.gradcheck(combine_masks, (_rand(5).requires_grad_(), _rand(5, seed=1).requires_grad_()))


# --- regulariser ---------------------------------------------------------------------------------------------------


@given(
    elements=st.lists(st.tuples(UNIT, st.integers(0, 4)), max_size=30),
    ratio=st.floats(0.01, 1.0),
    count_term=st.booleans(),
)
@settings(derandomize=True, deadline=None, max_examples=150)
def test_regularizer_equals_a_loop_over_graphs(elements, ratio, count_term):
    mask = torch.tensor([m for m, _ in elements], dtype=F64)
    index = torch.tensor([g for _, g in elements], dtype=torch.long)
    got = mask_regularizer(mask, index, num_graphs=5, ratio=ratio, count_term=count_term)
    assert got.item() == pytest.approx(regularizer_reference(mask, index, 5, ratio, count_term), abs=1e-12)


def test_regularizer_has_no_gradient_at_the_exact_ratio():
    mask = torch.full((6,), 0.5, dtype=F64, requires_grad=True)
    mask_regularizer(mask, torch.tensor([0, 0, 0, 1, 1, 1]), num_graphs=2, ratio=0.5).backward()
    assert not mask.grad.any()


def test_count_term_is_a_constant():
    mask, index = _rand(7).requires_grad_(), torch.tensor([0, 0, 1, 1, 1, 2, 2])
    with_term, without = (mask_regularizer(mask, index, num_graphs=3, ratio=0.4, count_term=c) for c in (True, False))
    assert (with_term - without).item() == pytest.approx(0.6)
    torch.testing.assert_close(torch.autograd.grad(with_term, mask), torch.autograd.grad(without, mask))


def test_graphs_without_elements_do_not_count():
    mask, index = _rand(4), torch.tensor([0, 0, 3, 3])
    dense = mask_regularizer(mask, torch.tensor([0, 0, 1, 1]), num_graphs=2, ratio=0.7)
    assert torch.equal(mask_regularizer(mask, index, num_graphs=6, ratio=0.7), dense)
    none = torch.empty(0, dtype=F64, requires_grad=True)
    loss = mask_regularizer(none, torch.empty(0, dtype=torch.long), num_graphs=3, ratio=0.7)
    loss.backward()
    assert loss.item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_float32(dtype):
    # 5,000 halves summed in half precision would stall far below 2,500
    loss = mask_regularizer(
        torch.full((5000,), 0.5, dtype=dtype),
        torch.zeros(5000, dtype=torch.long),
        num_graphs=1,
        ratio=0.5,
        count_term=False,
    )
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(0.0, abs=1e-5)


def test_regularizer_gradcheck():
    index = torch.tensor([0, 0, 1, 2, 2])
    assert torch.autograd.gradcheck(
        lambda m: mask_regularizer(m, index, num_graphs=4, ratio=0.9), (_rand(5).mul(0.5).requires_grad_(),)
    )


# --- objectives ----------------------------------------------------------------------------------------------------


def _inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    logits = {n: _rand(4, 3, seed=seed + i) for i, n in enumerate(("logits_stable", "logits_augmented", "logits_adv"))}
    regs = {"reg_stable": torch.tensor(0.3, dtype=F64), "reg_adv": torch.tensor(0.7, dtype=F64)}
    embeddings = {"h_adv": _rand(4, 5, seed=seed + 7), "h_orig": _rand(4, 5, seed=seed + 8)}
    return {**logits, **embeddings, **regs, "target": torch.tensor([0, 2, 1, 1])}


def test_objectives_are_the_weighted_sums():
    x = _inputs()
    got = objectives(**x, cau_reg=0.5, adv_dis=2.0, adv_reg=0.25)
    cost = ((x["h_adv"] - x["h_orig"]) ** 2).sum() / 20
    ce = {n: F.cross_entropy(x[f"logits_{n}"], x["target"]) for n in ("stable", "augmented", "adv")}
    torch.testing.assert_close(got.transport_cost, cost)
    torch.testing.assert_close(got.loss_stable_step, ce["stable"] + ce["augmented"] + 0.5 * 0.3)
    torch.testing.assert_close(got.loss_adv_step_minimised, -ce["adv"] + 2.0 * cost + 0.25 * 0.7)


def test_the_attacker_gains_from_wrong_predictions_and_pays_for_distance():
    x = _inputs()
    right = F.one_hot(x["target"], 3).double() * 9

    def minimised(**changes):
        options = {"cau_reg": 1.0, "adv_dis": 0.2, "adv_reg": 0.5}
        return objectives(**{**x, **changes}, **options).loss_adv_step_minimised

    assert minimised(logits_adv=-right) < minimised() < minimised(logits_adv=right)
    assert minimised(h_adv=x["h_orig"]) < minimised() < minimised(h_adv=x["h_orig"] + 3)


def test_the_stable_loss_ignores_the_attack():
    x = _inputs()
    leaves = {n: x[n].requires_grad_() for n in ("logits_stable", "logits_augmented", "logits_adv", "h_adv", "h_orig")}
    loss = objectives(**{**x, **leaves}, cau_reg=1, adv_dis=0.2, adv_reg=0.5).loss_stable_step
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    assert [g is not None for g in found] == [True, True, False, False, False]


def test_binary_labels_that_are_missing_have_no_influence():
    x = _inputs()
    y = torch.tensor([[1, math.nan, 0], [math.nan] * 3, [0, 1, 1], [1, 1, math.nan]], dtype=F64)
    options = {"cau_reg": 0.0, "adv_dis": 0.0, "adv_reg": 0.0, "task": "binary"}
    got = objectives(**{**x, "target": y}, **options)
    known = ~y.isnan()
    want = sum(F.binary_cross_entropy_with_logits(x[f"logits_{n}"][known], y[known]) for n in ("stable", "augmented"))
    torch.testing.assert_close(got.loss_stable_step, want)
    nothing = objectives(**{**x, "target": torch.full_like(y, math.nan)}, **options)
    assert nothing.loss_stable_step.item() == 0.0


def test_objectives_in_half_precision_are_computed_in_float32():
    x = _inputs()
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in x.items()}
    full = {k: v.float() if v.is_floating_point() else v for k, v in half.items()}
    options = {"cau_reg": 1.0, "adv_dis": 0.2, "adv_reg": 0.5}
    torch.testing.assert_close(
        objectives(**half, **options).transport_cost, objectives(**full, **options).transport_cost
    )


# --- shift measure -------------------------------------------------------------------------------------------------


def _normal(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("dim", [1, 4, 16])
@pytest.mark.parametrize("size", [150, 600])
def test_shift_of_equal_and_of_separate_distributions(dim, size):
    p, q = _normal(400, dim, 0), _normal(size, dim, 1)
    assert graph_covariate_shift(p, q, generator=_generator()) < 0.15
    assert graph_covariate_shift(p, q + 30, generator=_generator()) > 0.85


def test_shift_grows_with_the_share_that_is_outside():
    p = _normal(500, 2, 0)
    q = _normal(500, 2, 1)
    values = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        moved = torch.where(torch.arange(500)[:, None] < 500 * share, q + 40, q)
        values.append(graph_covariate_shift(p, moved, generator=_generator(), eps=1e-5))
    assert values == sorted(values)
    # a half of q, where p is 0, is a quarter of |p - q| over both
    assert values[2] == pytest.approx(0.25, abs=0.05)


@given(scale=st.floats(0.01, 100), shift=st.floats(-50, 50))
@settings(derandomize=True, deadline=None, max_examples=20)
def test_shift_does_not_depend_on_units_and_lies_between_0_and_1(scale, shift):
    p, q = _normal(60, 2, 0).double(), _normal(40, 2, 1).double() + 3
    plain = graph_covariate_shift(p, q, generator=_generator(), num_samples=200)
    moved = graph_covariate_shift(p * scale + shift, q * scale + shift, generator=_generator(), num_samples=200)
    assert 0 <= plain <= 1
    assert moved == pytest.approx(plain, abs=0.02)


def test_shift_is_symmetric_up_to_sampling_and_repeatable():
    p, q = _normal(300, 3, 0), _normal(300, 3, 1) + 4
    there = graph_covariate_shift(p, q, generator=_generator())
    assert graph_covariate_shift(p, q, generator=_generator()) == there
    assert graph_covariate_shift(q, p, generator=_generator()) == pytest.approx(there, abs=0.05)


def test_constant_features_are_left_out():
    p, q = _normal(100, 2, 0), _normal(100, 2, 1) + 2
    padded = [torch.cat([x, torch.full((100, 3), 7.0)], 1) for x in (p, q)]
    got = graph_covariate_shift(*padded, generator=_generator())
    assert got == pytest.approx(graph_covariate_shift(p, q, generator=_generator()), abs=1e-6)


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask": torch.tensor([0.2, 1.5, 0.1])}, r"mask.*\[0, 1\].*1.5"),
        ({"mask": torch.tensor([0.2, -0.1, 0.1])}, r"mask.*\[0, 1\].*-0.1"),
        ({"mask": torch.tensor([0.2, math.nan, 0.1])}, "mask.*NaN"),
        ({"mask": torch.tensor([0, 1, 1])}, "mask must be floating"),
        ({"mask": torch.rand(3, 1)}, "mask must be floating of shape"),
        ({"graph_index": torch.tensor([0, 1, 2])}, r"graph_index.*\[0, 2\).*2"),
        ({"graph_index": torch.tensor([0, -1, 1])}, "graph_index.*-1"),
        ({"graph_index": torch.tensor([0, 1])}, "graph_index must be integer of the shape"),
        ({"graph_index": torch.tensor([0.0, 1.0, 1.0])}, "graph_index must be integer"),
        ({"ratio": 0.0}, r"ratio.*\(0, 1\].*0.0"),
        ({"ratio": 1.2}, "ratio"),
        ({"ratio": math.nan}, "ratio"),
        ({"num_graphs": 0}, "num_graphs"),
    ],
)
def test_regularizer_refuses(changes, words):
    good = {"mask": torch.rand(3), "graph_index": torch.tensor([0, 1, 1]), "num_graphs": 2, "ratio": 0.5}
    with pytest.raises(ValueError, match=words):
        mask_regularizer(**{**good, **changes})


def test_combine_refuses():
    with pytest.raises(ValueError, match="one shape"):
        combine_masks(torch.rand(3), torch.rand(4))
    for bad in (math.nan, 1.01, -0.01):
        with pytest.raises(ValueError, match="mask_adv"):
            combine_masks(torch.rand(1), torch.tensor([bad]))
        with pytest.raises(ValueError, match="mask_stable"):
            combine_masks(torch.tensor([bad]), torch.rand(1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": torch.tensor([0, 1, 3, 1])}, r"target.*\[0, 3\).*3"),
        ({"target": torch.tensor([0, -1, 2, 1])}, "target.*-1"),
        ({"target": torch.tensor([0, 1])}, "target"),
        ({"target": torch.rand(4)}, "target"),
        ({"target": torch.full((4, 3), 0.5), "task": "binary"}, "target.*0, 1 or NaN"),
        ({"task": "binary"}, "target.*floating"),
        ({"task": "regression"}, "unknown task"),
        ({"logits_adv": torch.rand(4, 2)}, "logits_adv"),
        ({"h_adv": torch.rand(4, 2)}, "h_adv and h_orig"),
        ({"adv_dis": -0.1}, "adv_dis.*>= 0"),
        ({"cau_reg": math.nan}, "cau_reg"),
        ({"adv_reg": math.inf}, "adv_reg"),
    ],
)
def test_objectives_refuse(changes, words):
    with pytest.raises(ValueError, match=words):
        objectives(**{**_inputs(), "cau_reg": 1.0, "adv_dis": 0.2, "adv_reg": 0.5, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"feats_p": torch.rand(5)}, "feats_p must have shape"),
        ({"feats_q": torch.rand(0, 2)}, "feats_q must have shape"),
        ({"feats_q": torch.rand(5, 3)}, "same d"),
        ({"feats_p": torch.tensor([[1.0, math.inf]])}, "feats_p must be finite"),
        ({"feats_p": torch.ones(5, 2), "feats_q": torch.ones(3, 2)}, "constant"),
        ({"num_samples": 0}, "num_samples"),
        ({"eps": -1.0}, "eps"),
        ({"bandwidth": 0.0}, "bandwidth"),
        ({"bandwidth": "scot"}, "did you mean 'scott'"),
    ],
)
def test_shift_refuses(changes, words):
    with pytest.raises(ValueError, match=words):
        graph_covariate_shift(**{"feats_p": torch.rand(5, 2), "feats_q": torch.rand(5, 2), **changes})
