from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric.nn import GCNConv

from graph_ood.cal import attention_split, cal_loss, intervene, prototype_loss, update_prototypes, weighted_gcn_conv

F64 = torch.float64


def rng(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def log_softmax(z):
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def loss_reference(trivial, causal, mixed, y, sup, unif, caus):
    rows = np.arange(len(y))
    l_sup = -log_softmax(causal)[rows, y].mean()
    l_caus = -log_softmax(mixed)[rows, y].mean()
    classes = trivial.shape[1]
    p = np.exp(log_softmax(trivial))
    l_unif = (np.log(1 / classes / p) / classes).sum(1).mean()
    return sup * l_sup + unif * l_unif + caus * l_caus, l_sup, l_unif, l_caus


def logits(seed=0, batch=5, classes=3):
    return tuple(rng(batch, classes, seed=10 * seed + i) for i in range(3))


TARGET = torch.tensor([0, 2, 1, 1, 0])


def test_loss_is_the_reference_with_each_weight_in_its_place():
    weights = (0.7, 0.2, 1.9)
    found = cal_loss(*logits(), TARGET, lambda_sup=0.7, lambda_unif=0.2, lambda_caus=1.9)
    wanted = loss_reference(*(z.numpy() for z in logits()), TARGET.numpy(), *weights)
    np.testing.assert_allclose([float(x) for x in found], wanted, rtol=1e-12)


def test_loss_has_the_right_gradient():
    inputs = tuple(z.requires_grad_() for z in logits())
    assert torch.autograd.gradcheck(lambda *z: cal_loss(*z, TARGET).loss, inputs)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_an_undecided_trivial_head_costs_nothing_and_has_no_gradient(classes):
    trivial = torch.full((2, classes), 3.0, dtype=F64, requires_grad=True)
    other = rng(2, classes)
    unif = cal_loss(trivial, other, other, torch.tensor([0, 1])).loss_unif
    assert unif.item() == pytest.approx(0, abs=1e-15)
    assert torch.autograd.grad(unif, trivial)[0].abs().max() < 1e-15


def test_uniform_term_grows_linearly_with_a_decided_head_and_stays_finite():
    other, y = torch.zeros(1, 4), torch.tensor([0])
    for size in (1e3, 1e6, 1e30):
        trivial = torch.tensor([[size, 0.0, 0.0, 0.0]])
        # the largest logit minus the mean
        assert float(cal_loss(trivial, other, other, y).loss_unif) == pytest.approx(0.75 * size, rel=2e-3)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.floats(-50, 50), st.floats(0.01, 30))
def test_uniform_term_is_not_negative_and_does_not_see_a_shift(seed, shift, scale):
    trivial = scale * rng(4, 3, seed=seed)
    other, y = rng(4, 3), torch.tensor([0, 1, 2, 0])
    unif = cal_loss(trivial, other, other, y).loss_unif
    assert float(unif) >= -1e-12
    assert float(cal_loss(trivial + shift, other, other, y).loss_unif) == pytest.approx(float(unif), abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_reduced_in_float32(dtype):
    half = tuple(z.to(dtype) for z in logits())
    found = cal_loss(*half, TARGET)
    wanted = cal_loss(*(z.double() for z in half), TARGET)
    assert found.loss.dtype == dtype
    torch.testing.assert_close(found.loss.double(), wanted.loss, rtol=torch.finfo(dtype).eps, atol=0)


def test_intervention_moves_trivial_parts_and_leaves_causal_parts_in_their_rows():
    trivial, causal = rng(4, 3), rng(4, 3, seed=1)
    perm = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(intervene(trivial, causal, perm), trivial[perm] + causal)
    both = intervene(trivial, causal, perm, mode="cat")
    torch.testing.assert_close(both, torch.cat([trivial[perm], causal], 1))


def test_a_drawn_intervention_is_a_permutation_that_the_generator_decides():
    trivial, causal = rng(50, 1), torch.zeros(50, 1, dtype=F64)
    mixed = [intervene(trivial, causal, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(mixed[0], mixed[1])
    assert not torch.equal(mixed[0], mixed[2])
    assert not torch.equal(mixed[0], trivial)
    assert torch.equal(mixed[0].sort(0).values, trivial.sort(0).values)


def prototypes_reference(h, y, prototypes, seen, tau):
    new, known = prototypes.copy(), seen.copy()
    for c in range(len(prototypes)):
        members = h[y == c]
        if len(members) == 0:
            continue
        weight = np.ones(len(members))
        if seen[c]:
            lengths = np.linalg.norm(members, axis=1) * np.linalg.norm(prototypes[c])
            weight = np.exp(members @ prototypes[c] / lengths / tau)
        new[c], known[c] = (weight / weight.sum()) @ members, True
    return new, known


@pytest.mark.parametrize("tau", [0.1, 2.0])
def test_prototypes_are_the_reference(tau):
    h, y = rng(7, 4), torch.tensor([0, 0, 2, 2, 2, 3, 0])
    prototypes, seen = rng(5, 4, seed=1), torch.tensor([True, True, True, False, False])
    found = update_prototypes(h, y, prototypes, seen, tau=tau)
    wanted = prototypes_reference(h.numpy(), y.numpy(), prototypes.numpy(), seen.numpy(), tau)
    np.testing.assert_allclose(found[0].numpy(), wanted[0], rtol=1e-12)
    assert found[1].tolist() == wanted[1].tolist() == [True, True, True, True, False]


def test_prototypes_are_constants():
    h = rng(2, 3).requires_grad_()
    prototypes = rng(2, 3, seed=1).requires_grad_()
    y, seen = torch.tensor([0, 1]), torch.ones(2, dtype=torch.bool)
    new, _ = update_prototypes(h, y, prototypes, seen)
    assert not new.requires_grad
    prototype_loss(h, y, prototypes).backward()
    assert h.grad is not None
    assert prototypes.grad is None


def test_prototype_loss_is_cross_entropy_over_the_classes_that_have_a_prototype():
    h, y, prototypes = rng(3, 4), torch.tensor([0, 2, 2]), rng(3, 4, seed=1)
    scores = (h @ prototypes.T).numpy()
    wanted = -log_softmax(scores)[[0, 1, 2], y.numpy()].mean()
    assert float(prototype_loss(h, y, prototypes)) == pytest.approx(wanted, rel=1e-12)
    without = -log_softmax(scores[:, [0, 2]])[[0, 1, 2], [0, 1, 1]].mean()
    assert float(prototype_loss(h, y, prototypes, torch.tensor([True, False, True]))) == pytest.approx(
        without, rel=1e-12
    )


EDGES = torch.tensor([[0, 1, 1, 2, 2, 3, 0, 3], [1, 0, 2, 1, 3, 2, 3, 0]])


def test_weights_of_one_are_no_weights():
    x, weight, bias = rng(4, 3), rng(3, 2), rng(2)
    ones = torch.ones(8, dtype=F64)
    torch.testing.assert_close(
        weighted_gcn_conv(x, EDGES, ones, weight, bias), weighted_gcn_conv(x, EDGES, None, weight, bias)
    )


def test_symmetric_weights_give_the_layer_of_pyg():
    x, weight, bias = rng(4, 3), rng(3, 2), rng(2)
    each = torch.tensor([0.3, 0.3, 0.9, 0.9, 0.1, 0.1, 0.6, 0.6], dtype=F64)
    conv = GCNConv(3, 2).double()
    with torch.no_grad():
        conv.lin.weight.copy_(weight.T)
        conv.bias.copy_(bias)
        torch.testing.assert_close(
            weighted_gcn_conv(x, EDGES, each, weight, bias), conv(x, EDGES, each), rtol=1e-6, atol=1e-6
        )


def test_the_two_halves_of_the_attention_add_up_to_one():
    split = attention_split(5 * rng(4, 3), EDGES, rng(2, 3), rng(2), rng(2, 6), rng(2))
    for what, size in (("node", 4), ("edge", 8)):
        torch.testing.assert_close(split[f"{what}_trivial"] + split[f"{what}_causal"], torch.ones(size, dtype=F64))
    # directed: the two directions of an edge have scores of their own
    assert split["edge_causal"][0] != split["edge_causal"][1]


ZERO = torch.zeros(2, 3)
Y = torch.tensor([0, 1])
SEEN = torch.ones(3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: cal_loss(ZERO, ZERO, ZERO, torch.tensor([0, 3])), r"target.*\[0, 3\).*0 to 3"),
        (lambda: cal_loss(ZERO, ZERO, ZERO, torch.tensor([-1, 0])), "target.*-1"),
        (lambda: cal_loss(ZERO, ZERO, ZERO, torch.tensor([0.0, 1.0])), "target.*float"),
        (lambda: cal_loss(ZERO, ZERO, ZERO, torch.tensor([0])), r"target.*\(1,\)"),
        (lambda: cal_loss(ZERO[:1], ZERO, ZERO, Y), r"logits_trivial.*\(2, 3\).*\(1, 3\)"),
        (lambda: cal_loss(ZERO, ZERO, ZERO[:, :2], Y), "logits_intervened"),
        (lambda: cal_loss(ZERO, ZERO, ZERO, Y, lambda_unif=-0.1), "lambda_unif.*-0.1"),
        (lambda: cal_loss(ZERO, ZERO, ZERO, Y, lambda_caus=float("nan")), "lambda_caus"),
        (lambda: intervene(ZERO, ZERO, torch.tensor([0, 0])), r"perm.*\[0, 0\]"),
        (lambda: intervene(ZERO, ZERO, torch.tensor([0, 2])), r"perm.*\[0, 2\]"),
        (lambda: intervene(ZERO, ZERO, torch.tensor([0])), r"perm.*\(1,\)"),
        (lambda: intervene(ZERO, ZERO, torch.tensor([0.0, 1.0])), "perm.*float"),
        (lambda: intervene(ZERO, ZERO, mode="sum"), "mode 'sum'"),
        (lambda: intervene(ZERO, ZERO[:1]), "one shape"),
        (lambda: intervene(Y, Y), "h_trivial"),
        (
            lambda: weighted_gcn_conv(torch.zeros(4, 3), EDGES, torch.ones(3), torch.zeros(3, 2), None),
            r"edge_weight.*\(3,\)",
        ),
        (
            lambda: weighted_gcn_conv(torch.zeros(4, 3), EDGES, -torch.ones(8), torch.zeros(3, 2), None),
            "edge_weight.*-1",
        ),
        (lambda: update_prototypes(ZERO, Y, torch.zeros(3, 3), SEEN, tau=0.0), "tau"),
        (lambda: update_prototypes(ZERO, Y, torch.zeros(3, 2), SEEN), "prototypes"),
        (lambda: update_prototypes(ZERO, Y + 2, torch.zeros(3, 3), SEEN), r"y must be in \[0, 3\)"),
        (lambda: prototype_loss(ZERO, Y[:1], torch.zeros(3, 3)), "y must"),
        (lambda: prototype_loss(ZERO, Y, torch.zeros(3, 3), SEEN[:2]), "seen"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
