"""Losses, metrics and fairness of RAREMed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ballast_testing.losses import check_loss
from recsys_losses.raremed import (
    ddi_loss,
    ddi_rate,
    jaccard_per_visit,
    medication_loss,
    multilabel_margin,
    multilabel_metrics,
    rarity_fairness,
    smp_loss,
    sr_loss,
    visit_rarity,
)

F64 = torch.float64
PROPERTY = settings(derandomize=True, deadline=None, max_examples=100)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def labels(visits: int, drugs: int, seed: int = 1) -> torch.Tensor:
    return (draw(visits, drugs, seed=seed) > 0.3).long()


def interactions(drugs: int, seed: int = 2) -> torch.Tensor:
    upper = torch.triu(draw(drugs, drugs, seed=seed) > 0.5, diagonal=1)
    return (upper | upper.T).long()


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def terms(x, y, adjacency, scale):
    """The three terms of one visit, with loops over drugs and pairs."""
    size = len(x)
    s = [sigmoid(value) for value in x]
    bce = sum(max(v, 0) - v * t + math.log1p(math.exp(-abs(v))) for v, t in zip(x, y, strict=True)) / size
    pairs = [(j, k) for j in range(size) for k in range(size) if y[j] == 1 and y[k] == 0]
    margin = sum(max(0.0, 1 - (s[j] - s[k])) for j, k in pairs) / size
    ddi = scale * sum(adjacency[j][k] * s[j] * s[k] for j in range(size) for k in range(size))
    return bce, margin, ddi


def reduced(rows, reduction):
    rows = np.array(rows)
    return rows if reduction == "none" else getattr(np, reduction)(rows)


# --- the medication loss ----------------------------------------------------------------------------------------------


def medication_only(logits, target, adjacency, **params):
    return medication_loss(logits, target, adjacency, **params).loss


def medication_reference(
    logits, target, adjacency, *, margin_weight=0.005, ddi_weight=0.1, ddi_scale=5e-4, reduction="sum"
):
    rows = []
    for x, y in zip(logits, target, strict=True):
        bce, margin, ddi = terms(x, y, adjacency, ddi_scale)
        rows.append((1 - margin_weight) * bce + margin_weight * margin + ddi_weight * ddi)
    return reduced(rows, reduction)


@pytest.mark.parametrize("weights", [{}, {"margin_weight": 0.4, "ddi_weight": 2.0, "ddi_scale": 0.1}])
def test_battery_medication_loss(weights):
    inputs = [draw(5, 7), labels(5, 7), interactions(7)]
    check_loss(medication_only, inputs, weights, medication_reference, rows=(0, 1))


def test_battery_ddi_loss():
    def reference(logits, adjacency, *, scale=5e-4, reduction="sum"):
        return reduced([terms(x, [0] * len(x), adjacency, scale)[2] for x in logits], reduction)

    check_loss(ddi_loss, [draw(5, 7), interactions(7)], {"scale": 0.3}, reference, rows=(0,))


def test_battery_multilabel_margin():
    def reference(prob, target, *, reduction="mean"):
        rows = []
        for s, y in zip(prob, target, strict=True):
            pairs = [1 - (s[j] - s[k]) for j in range(len(s)) for k in range(len(s)) if y[j] == 1 and y[k] == 0]
            rows.append(sum(max(0.0, pair) for pair in pairs) / len(s))
        return reduced(rows, reduction)

    prob = torch.sigmoid(draw(5, 7))
    check_loss(multilabel_margin, [prob, labels(5, 7)], {}, reference, extreme=None)  # probabilities have a range


@PROPERTY
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.1, 3.0, 30.0]))
def test_margin_is_the_one_of_torch(seed, scale):
    prob, target = torch.sigmoid(scale * draw(3, 6, seed=seed)), labels(3, 6, seed=seed + 1)
    lists = torch.full((3, 6), -1)
    for row, y in enumerate(target):
        positive = torch.nonzero(y).flatten()
        lists[row, : positive.numel()] = positive
    want = F.multilabel_margin_loss(prob, lists, reduction="none")
    torch.testing.assert_close(multilabel_margin(prob, target, "none"), want, rtol=1e-10, atol=1e-12)


def test_parts_are_unweighted_and_add_up():
    x, y, adjacency = draw(4, 6), labels(4, 6), interactions(6)
    loss = medication_loss(x, y, adjacency, margin_weight=0.2, ddi_weight=3.0, ddi_scale=0.5)
    torch.testing.assert_close(loss.loss, 0.8 * loss.bce + 0.2 * loss.margin + 3.0 * loss.ddi)
    torch.testing.assert_close(loss.ddi, ddi_loss(x, adjacency, scale=0.5))
    torch.testing.assert_close(loss.margin, multilabel_margin(torch.sigmoid(x), y, "sum"))


def test_every_visit_of_a_batch_counts():
    # The authors' margin term keeps the last visit only, and their interaction term is a matrix product over the batch.
    x, y, adjacency = draw(4, 6), labels(4, 6), interactions(6)
    whole = medication_loss(x, y, adjacency, margin_weight=0.5, ddi_weight=1.0, ddi_scale=1.0)
    rows = [
        medication_loss(x[[i]], y[[i]], adjacency, margin_weight=0.5, ddi_weight=1.0, ddi_scale=1.0) for i in range(4)
    ]
    for name in ("loss", "bce", "margin", "ddi"):
        torch.testing.assert_close(getattr(whole, name), sum(getattr(row, name) for row in rows))
    mean = medication_loss(x, y, adjacency, margin_weight=0.5, ddi_weight=1.0, ddi_scale=1.0, reduction="mean")
    torch.testing.assert_close(mean.loss, whole.loss / 4)


def test_without_interactions_the_term_and_its_weight_vanish():
    x, y = draw(4, 6), labels(4, 6)
    with_weight = medication_loss(x, y, torch.zeros(6, 6), ddi_weight=50.0)
    assert with_weight.ddi.item() == 0.0
    assert with_weight.loss.item() == medication_loss(x, y, torch.zeros(6, 6), ddi_weight=0.0).loss.item()


@pytest.mark.parametrize("value", [0, 1])
def test_margin_of_labels_of_one_kind_is_zero(value):
    target = torch.full((2, 5), value)
    assert medication_loss(draw(2, 5), target, interactions(5)).margin.item() == 0.0


def test_the_paper_form_is_reached_through_the_arguments():
    # eq. 9: (1 - beta) [(1 - alpha) sum BCE + alpha margin] + beta s'As
    alpha, beta, drugs = 0.03, 0.7, 8
    x, y, adjacency = draw(3, drugs).requires_grad_(), labels(3, drugs), interactions(drugs)
    parts = medication_loss(x, y, adjacency, ddi_scale=1.0)
    paper = (1 - beta) * ((1 - alpha) * drugs * parts.bce + alpha * parts.margin) + beta * parts.ddi
    odds = alpha / ((1 - alpha) * drugs)
    a = odds / (1 + odds)
    b = (1 - a) * beta / ((1 - beta) * (1 - alpha) * drugs)
    ours = medication_loss(x, y, adjacency, margin_weight=a, ddi_weight=b, ddi_scale=1.0).loss
    gradients = [torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in (paper, ours)]
    torch.testing.assert_close(gradients[0] / gradients[0].norm(), gradients[1] / gradients[1].norm())


def test_confidently_wrong_drugs_have_a_finite_loss_in_float32():
    x = torch.tensor([[120.0, -120.0, 0.0]], requires_grad=True)
    loss = medication_loss(x, torch.tensor([[0, 1, 1]]), torch.zeros(3, 3))
    assert loss.bce.item() == pytest.approx((120 + 120 + math.log(2)) / 3)
    assert torch.autograd.grad(loss.loss, x)[0].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ddi_adj": torch.tensor([[0, 1], [0, 0]])}, "symmetric"),
        ({"ddi_adj": torch.zeros(2, 3)}, "square"),
        ({"ddi_adj": torch.zeros(3, 3)}, "2 medications"),
        ({"ddi_adj": torch.full((2, 2), 0.5)}, "binary"),
        ({"target": torch.tensor([[0.5, 1.0]])}, "binary"),
        ({"target": torch.tensor([[1.0]])}, "target"),
        ({"logits": torch.zeros(1, 2, dtype=torch.long)}, "floating"),
        ({"logits": torch.zeros(0, 2), "target": torch.zeros(0, 2)}, "empty batch"),
        ({"margin_weight": 1.5}, "margin_weight"),
        ({"margin_weight": math.nan}, "margin_weight"),
        ({"ddi_weight": -1.0}, "ddi_weight"),
        ({"ddi_scale": math.inf}, "ddi_scale"),
        ({"reduction": "average"}, "reduction"),
    ],
)
def test_medication_loss_refuses(change, message):
    arguments = {"logits": torch.zeros(1, 2), "target": torch.tensor([[0, 1]]), "ddi_adj": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match=message):
        medication_loss(**{**arguments, **change})


def test_margin_refuses_what_is_no_probability():
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        multilabel_margin(torch.tensor([[1.2, 0.0]]), torch.tensor([[1, 0]]))
    with pytest.raises(ValueError, match="binary"):
        multilabel_margin(torch.tensor([[0.2, 0.0]]), torch.tensor([[2, 0]]))


# --- pre-training losses ----------------------------------------------------------------------------------------------


def test_smp_bce_is_the_mean_over_both():
    pos, neg = 0.7, -0.2
    want = (math.log1p(math.exp(-pos)) + math.log1p(math.exp(neg))) / 2
    assert smp_loss(torch.tensor([pos, neg], dtype=F64), torch.tensor([1, 0])).item() == pytest.approx(want)


def test_smp_pairwise_is_bounded():
    target = torch.tensor([1, 0])
    best = smp_loss(torch.tensor([80.0, -80.0], dtype=F64), target, form="pairwise_softmax")
    worst = smp_loss(torch.tensor([-80.0, 80.0], dtype=F64), target, form="pairwise_softmax")
    assert best.item() == pytest.approx(math.log1p(math.exp(-1)))
    assert worst.item() == pytest.approx(math.log1p(math.e))


@pytest.mark.parametrize("form", ["bce", "pairwise_softmax"])
def test_smp_gradient_and_half_precision(form):
    x, target = draw(6).requires_grad_(), torch.tensor([1, 0] * 3)
    assert torch.autograd.gradcheck(lambda v: smp_loss(v, target, form=form), (x,))
    half = smp_loss(x.detach().bfloat16(), target, form=form)
    assert half.dtype == torch.bfloat16
    assert half.item() == pytest.approx(smp_loss(x, target, form=form).item(), rel=0.05)


@pytest.mark.parametrize(
    ("logits", "target", "form", "message"),
    [
        ([0.0, 0.0, 0.0], [1, 0, 1], "pairwise_softmax", "odd"),
        ([0.0, 0.0], [0, 1], "pairwise_softmax", "pairs"),
        ([0.0, 0.0], [1, 2], "bce", "binary"),
        ([0.0, 0.0], [1], "bce", "target"),
        ([], [], "bce", "empty batch"),
        ([0.0], [1], "bcee", "did you mean 'bce'"),
    ],
)
def test_smp_refuses(logits, target, form, message):
    with pytest.raises(ValueError, match=message):
        smp_loss(torch.tensor(logits), torch.tensor(target), form=form)


def test_sr_is_bce_with_the_multi_hot():
    logits = draw(2, 5).requires_grad_()
    hot = torch.tensor([[1, 0, 1, 0, 1], [0, 1, 0, 0, 0]], dtype=F64)
    loss = sr_loss(logits, [[2, 0], [1]], [[1], []], num_diagnoses=3, num_procedures=2)
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, hot))
    assert torch.autograd.gradcheck(
        lambda x: sr_loss(x, [[2, 0], [1]], [[1], []], num_diagnoses=3, num_procedures=2), (logits,)
    )


@pytest.mark.parametrize(
    ("diagnoses", "procedures", "message"),
    [
        ([[]], [[0]], "no diagnoses"),
        ([[3]], [[0]], "diagnosis id 3 is out of range"),
        ([[0]], [[-1]], "procedure id -1 is out of range"),
        ([[0], [0]], [[0]], "as many lists"),
    ],
)
def test_sr_refuses(diagnoses, procedures, message):
    with pytest.raises(ValueError, match=message):
        sr_loss(torch.zeros(1, 5), diagnoses, procedures, num_diagnoses=3, num_procedures=2)


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_are_those_of_scikit_learn():
    from sklearn.metrics import average_precision_score, f1_score, jaccard_score, precision_score, recall_score

    target, prob = labels(40, 12).numpy(), torch.sigmoid(draw(40, 12, seed=5)).numpy()
    target[:, 0] = 1
    got, chosen = multilabel_metrics(target, prob), (prob >= 0.5).astype(int)
    named = {"jaccard": jaccard_score, "precision": precision_score, "recall": recall_score, "f1": f1_score}
    for name, score in named.items():
        assert got[name] == pytest.approx(score(target, chosen, average="samples", zero_division=0.0)), name
    assert got["prauc"] == pytest.approx(average_precision_score(target, prob, average="samples"))
    assert got["num_med"] == pytest.approx(chosen.sum(1).mean())


def test_empty_sets_count_as_zero():
    metrics = multilabel_metrics([[0, 0], [1, 0]], [[0.1, 0.2], [0.1, 0.2]])
    assert metrics == {"jaccard": 0.0, "prauc": 0.25, "precision": 0.0, "recall": 0.0, "f1": 0.0, "num_med": 0.0}
    assert multilabel_metrics([[0, 0]], [[0.9, 0.2]])["prauc"] == 0.0


def test_the_threshold_itself_recommends():
    assert multilabel_metrics([[1]], [[0.5]])["jaccard"] == 1.0
    assert multilabel_metrics([[1]], [[0.5]], threshold=0.51)["jaccard"] == 0.0


def test_jaccard_per_visit_averages_to_the_metric():
    target, prob = labels(9, 6), torch.sigmoid(draw(9, 6, seed=5))
    assert jaccard_per_visit(target, prob).mean() == pytest.approx(multilabel_metrics(target, prob)["jaccard"])


@pytest.mark.parametrize(
    ("target", "probability", "threshold", "message"),
    [
        ([[1, 0]], [[0.5, 0.5]], 0.0, "threshold"),
        ([[1, 0]], [[0.5, 0.5]], 1.0, "threshold"),
        ([[1, 2]], [[0.5, 0.5]], 0.5, "binary"),
        ([[1, 0]], [[0.5, 1.5]], 0.5, "probability"),
        ([[1, 0]], [[0.5, math.nan]], 0.5, "probability"),
        ([[1, 0]], [[0.5]], 0.5, "target"),
        ([], [], 0.5, "target"),
    ],
)
def test_metrics_refuse(target, probability, threshold, message):
    with pytest.raises(ValueError, match=message):
        multilabel_metrics(target, probability, threshold=threshold)


@PROPERTY
@given(sets=st.lists(st.sets(st.integers(0, 6)), max_size=8), seed=st.integers(0, 1000))
def test_ddi_rate_is_the_share_of_pairs(sets, seed):
    adjacency = interactions(7, seed=seed)
    pairs = [(j, k) for chosen in sets for j in chosen for k in chosen if j < k]
    want = sum(int(adjacency[j, k]) for j, k in pairs) / len(pairs) if pairs else 0.0
    assert ddi_rate([list(chosen) for chosen in sets], adjacency) == pytest.approx(want)


@pytest.mark.parametrize(
    ("predictions", "adjacency", "message"),
    [
        ([[0, 2]], [[0, 1], [1, 0]], "out of range"),
        ([[0, 0]], [[0, 1], [1, 0]], "repeated"),
        ([[0]], [[0, 1], [0, 0]], "symmetric"),
        ([[0]], [[0, 1]], "square"),
    ],
)
def test_ddi_rate_refuses(predictions, adjacency, message):
    with pytest.raises(ValueError, match=message):
        ddi_rate(predictions, adjacency)


# --- rarity and fairness ----------------------------------------------------------------------------------------------


@PROPERTY
@given(visits=st.lists(st.sets(st.integers(0, 9), min_size=1), min_size=1, max_size=20))
def test_weights_average_one_over_the_occurrences(visits):
    diagnoses = [sorted(codes) for codes in visits]
    mean = visit_rarity(diagnoses, reduce="mean")
    sizes = np.array([len(codes) for codes in diagnoses])
    assert (mean * sizes).sum() / sizes.sum() == pytest.approx(1.0)
    assert (visit_rarity(diagnoses) >= mean - 1e-12).all()


def test_counts_of_the_whole_data_set():
    part = visit_rarity([[0], [2]], counts=[6, 0, 2])  # two codes, 8 occurrences: mean 4
    assert part.tolist() == [4 / 6, 2.0]


def test_a_repeated_diagnosis_counts_once():
    assert visit_rarity([[0, 0, 1], [0]]).tolist() == visit_rarity([[0, 1], [0]]).tolist()


@pytest.mark.parametrize(
    ("diagnoses", "options", "message"),
    [
        ([], {}, "no visits"),
        ([[0], []], {}, "visit 1 has no diagnoses"),
        ([[-1]], {}, "out of range"),
        ([[3]], {"counts": [1, 1]}, "out of range"),
        ([[0]], {"counts": [0, 1]}, "out of range"),
        ([[0]], {"counts": [math.nan]}, "finite"),
        ([[0]], {"reduce": "median"}, "reduce"),
    ],
)
def test_rarity_refuses(diagnoses, options, message):
    with pytest.raises(ValueError, match=message):
        visit_rarity(diagnoses, **options)


def test_signs_on_a_falling_score():
    rarity = np.arange(1.0, 51.0)
    falling = rarity_fairness(1 - rarity / 100, rarity)
    assert falling.neg_pearson > 0.99
    assert falling.neg_slope > 0
    rising = rarity_fairness(rarity / 100, rarity)
    assert rising.neg_pearson == pytest.approx(-falling.neg_pearson)
    assert rising.weighted_mean > rarity_fairness(rarity[::-1] / 100, rarity).weighted_mean


def test_equally_spaced_groups_have_correlation_one():
    # n = 14, five groups of 3 (the last of 2)
    score = np.repeat([0.9, 0.8, 0.7, 0.6, 0.5], 3)[:14]
    fairness = rarity_fairness(score, np.arange(1, 15))
    assert fairness.neg_pearson == pytest.approx(1.0)
    assert fairness.neg_slope == pytest.approx(0.1)
    assert fairness.gap == pytest.approx(0.4)
    assert fairness.group_std == pytest.approx(np.std([0.9, 0.8, 0.7, 0.6, 0.5]))


@pytest.mark.parametrize(
    ("means", "sigma"),
    [
        ([0.4719, 0.4666, 0.4534, 0.4475, 0.4410], 0.01157),  # Table 4, without pre-training
        ([0.4773, 0.4702, 0.4592, 0.4544, 0.4521], 0.00962),  # Table 4, RAREMed
    ],
)
def test_sigma_is_the_one_of_the_paper(means, sigma):
    fairness = rarity_fairness(np.repeat(means, 2)[:9], np.arange(1, 10))
    assert fairness.group_means == pytest.approx(means)
    assert round(fairness.group_std, 5) == sigma


def test_equal_groups_have_no_trend():
    fairness = rarity_fairness([0.3] * 9, list(range(1, 10)))
    assert (fairness.neg_pearson, fairness.neg_slope, fairness.gap, fairness.group_std) == (0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("score", "rarity", "groups", "message"),
    [
        ([0.1] * 5, [1.0] * 5, 5, "too few"),
        ([0.1, 0.2], [1.0], 2, "rarity"),
        ([0.1] * 9, [0.0] * 9, 2, "positive"),
        ([math.nan] * 9, [1.0] * 9, 2, "finite"),
        ([0.1] * 9, [1.0] * 9, 1, "num_groups"),
    ],
)
def test_fairness_refuses(score, rarity, groups, message):
    with pytest.raises(ValueError, match=message):
        rarity_fairness(score, rarity, num_groups=groups)
