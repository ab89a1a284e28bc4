from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ballast_testing.losses import check_loss
from recsys_losses.mcrl import (
    MCRLLoss,
    conservative_loss,
    contrastive_reward_loss,
    contrastive_transition_loss,
    double_q_target,
    mcrl_loss,
    next_item_metrics,
    sample_negative_actions,
    td_loss,
)

F64 = torch.float64
B, I, K, D = 5, 7, 3, 4
ACTION = torch.tensor([0, 6, 3, 3, 2])
DONE = torch.tensor([False, True, False, False, True])


def _rng(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _inputs() -> dict[str, torch.Tensor]:
    return {
        "q": _rng(B, I),
        "q_next_online": _rng(B, I, seed=1),
        "q_next_target": _rng(B, I, seed=2),
        "action": ACTION,
        "reward": torch.tensor([0.2, 1.0, 0.2, 0.2, 1.0], dtype=F64),
        "done": DONE,
        "reward_pos": _rng(B, seed=3),
        "reward_neg": _rng(B, K, seed=4),
        "trans_pos": _rng(B, D, seed=5),
        "trans_neg": _rng(B, K, D, seed=6),
        "next_state": _rng(B, D, seed=7),
    }


def _reduced(rows, reduction):
    loss = np.array(rows)
    return loss if reduction == "none" else getattr(np, reduction)(loss)


def _softmax_loss(logits):
    return math.log(sum(math.exp(x - max(logits)) for x in logits)) + max(logits) - logits[0]


def td_reference(q, action, target, *, reduction="mean"):
    return _reduced([0.5 * (q[b, action[b]] - target[b]) ** 2 for b in range(len(q))], reduction)


def conservative_reference(q, action, *, temperature=1.0, reduction="mean"):
    rows = []
    for row, a in zip(q, action, strict=True):
        order = [row[a], *np.delete(row, a)]
        rows.append(temperature * _softmax_loss([x / temperature for x in order]))
    return _reduced(rows, reduction)


def reward_reference(pos, neg, weight=None, *, temperature, reduction="mean"):
    rows = [_softmax_loss([p / temperature, *(n / temperature)]) for p, n in zip(pos, neg, strict=True)]
    return _reduced(rows if weight is None else weight * rows, reduction)


def transition_reference(pos, neg, state, *, temperature, reduction="mean"):
    def cos(a, b):
        return a @ b / np.sqrt((a @ a) * (b @ b))

    rows = [_softmax_loss([cos(x, state[b]) / temperature for x in (pos[b], *neg[b])]) for b in range(len(pos))]
    return _reduced(rows, reduction)


# --- the battery --------------------------------------------------------------------------------------------------


def test_battery_td():
    check_loss(td_loss, [_rng(B, I), ACTION, _rng(B, seed=1)], {}, td_reference, detached=(2,))


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_battery_conservative(temperature):
    # A difference of two values 1e4 apart keeps few digits of the small one: the rows are only compared in float64.
    check_loss(conservative_loss, [_rng(B, I), ACTION], {"temperature": temperature}, conservative_reference)


@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 2.0, 0.1, 1.0, 1.4], dtype=F64)])
def test_battery_reward(weight):
    def loss(pos, neg, weight=None, **params):
        return contrastive_reward_loss(pos, neg, weight=weight, **params)

    inputs = [_rng(B), _rng(B, K, seed=1), weight]
    detached = () if weight is None else (2,)
    check_loss(loss, inputs, {"temperature": 0.5}, reward_reference, detached=detached, extreme_inputs=(0, 1))


def test_battery_transition():
    inputs = [_rng(B, D), _rng(B, K, D, seed=1), _rng(B, D, seed=2)]
    params = {"temperature": 0.5}
    check_loss(contrastive_transition_loss, inputs, params, transition_reference, detached=(2,))


def test_gradient_of_the_sum():
    fixed = {"action", "reward", "done", "q_next_online", "q_next_target", "next_state"}
    inputs = _inputs()
    names = [name for name in inputs if name not in fixed]
    learned = [inputs[name].requires_grad_() for name in names]

    def loss(*tensors):
        return mcrl_loss(**{**inputs, **dict(zip(names, tensors, strict=True))}, cql_temperature=0.7).loss

    assert torch.autograd.gradcheck(loss, learned)


# --- double Q -----------------------------------------------------------------------------------------------------


def test_target_selects_with_one_network_and_evaluates_with_the_other():
    online = torch.tensor([[0.0, 2.0, 1.0], [5.0, 0.0, 1.0]])
    target = torch.tensor([[9.0, 3.0, 9.0], [4.0, 9.0, 9.0]])
    reward = torch.tensor([1.0, 0.2])
    y = double_q_target(online, target, reward, torch.tensor([0, 1]), 0.5)
    torch.testing.assert_close(y, torch.tensor([2.5, 0.2]))


def test_target_takes_the_lowest_index_of_ties():
    online = torch.tensor([[1.0, 4.0, 4.0, 4.0]])
    y = double_q_target(online, torch.tensor([[0.0, 1.0, 2.0, 3.0]]), torch.zeros(1), torch.zeros(1), 1.0)
    assert y.item() == 1.0


def test_target_at_the_end_is_the_reward_even_where_q_is_infinite():
    q = torch.full((2, 3), torch.inf)
    y = double_q_target(q, q, torch.tensor([0.2, 1.0]), torch.ones(2, dtype=torch.bool), 0.5)
    torch.testing.assert_close(y, torch.tensor([0.2, 1.0]))


def test_gamma_zero_does_not_look_ahead():
    inputs = _inputs()
    other = {**inputs, "q_next_online": _rng(B, I, seed=8), "q_next_target": _rng(B, I, seed=9)}
    assert torch.equal(mcrl_loss(**inputs, gamma=0.0).loss, mcrl_loss(**other, gamma=0.0).loss)
    assert not torch.equal(mcrl_loss(**inputs, gamma=0.5).loss, mcrl_loss(**other, gamma=0.5).loss)


def test_no_gradient_into_what_is_ahead():
    inputs = _inputs()
    for name in ("q", "q_next_online", "q_next_target", "next_state", "reward"):
        inputs[name].requires_grad_()
    mcrl_loss(**inputs).loss.backward()
    assert all(inputs[name].grad is None for name in ("q_next_online", "q_next_target", "next_state", "reward"))
    assert inputs["q"].grad is not None


# --- the sum ------------------------------------------------------------------------------------------------------


def test_conservative_weight_alone_is_cross_entropy():
    inputs = _inputs()
    weights = {"td_weight": 0.0, "reward_weight": 0.0, "transition_weight": 0.0}
    q = inputs["q"].requires_grad_()
    loss = mcrl_loss(**inputs, **weights).loss
    torch.testing.assert_close(loss, F.cross_entropy(q, ACTION))
    (gradient,) = torch.autograd.grad(loss, q)
    (expected,) = torch.autograd.grad(F.cross_entropy(q, ACTION), q)
    torch.testing.assert_close(gradient, expected)


def test_sum_is_weighted_and_its_parts_are_not():
    inputs = _inputs()
    out = mcrl_loss(**inputs, td_weight=2.0, cql_weight=0.1, reward_weight=0.3, transition_weight=0.7)
    assert isinstance(out, MCRLLoss)
    torch.testing.assert_close(out.loss, 2 * out.td + 0.1 * out.conservative + 0.3 * out.reward + 0.7 * out.transition)
    rows = mcrl_loss(**inputs, reduction="none")
    assert rows.loss.shape == (B,)
    torch.testing.assert_close(rows.transition.mean(), out.transition)
    target = double_q_target(inputs["q_next_online"], inputs["q_next_target"], inputs["reward"], DONE, 0.5)
    torch.testing.assert_close(out.td, td_loss(inputs["q"], ACTION, target))


def test_part_of_weight_zero_may_be_infinite():
    inputs = _inputs()
    inputs["q_next_target"] = torch.full((B, I), torch.inf, dtype=F64)
    out = mcrl_loss(**inputs, td_weight=0.0)
    assert out.td.isinf()
    assert out.loss.isfinite()


# --- contrastive parts --------------------------------------------------------------------------------------------


def test_one_negative_is_the_logistic_loss_of_the_difference():
    pos, neg = _rng(B), _rng(B, 1, seed=1)
    loss = contrastive_reward_loss(pos, neg, 0.2)
    torch.testing.assert_close(loss, F.softplus((neg[:, 0] - pos) / 0.2).mean())


@given(order=st.permutations(range(K)))
@settings(deadline=None, max_examples=10)
def test_order_of_negatives_does_not_matter(order):
    inputs = _inputs()
    shuffled = {**inputs, **{name: inputs[name][:, list(order)] for name in ("reward_neg", "trans_neg")}}
    torch.testing.assert_close(mcrl_loss(**inputs), mcrl_loss(**shuffled))


def test_transition_loss_knows_directions_only_and_survives_zero_vectors():
    pos, neg, state = _rng(B, D), _rng(B, K, D, seed=1), _rng(B, D, seed=2)
    loss = contrastive_transition_loss(pos, neg, state, 0.2)
    torch.testing.assert_close(loss, contrastive_transition_loss(3 * pos, 0.1 * neg, 7 * state, 0.2))
    zero = torch.zeros(B, D, dtype=F64).requires_grad_()
    loss = contrastive_transition_loss(zero, torch.zeros(B, K, D, dtype=F64), state, 0.2)
    torch.testing.assert_close(loss, torch.tensor(math.log(1 + K), dtype=F64))
    loss.backward()
    assert zero.grad.isfinite().all()


def test_small_temperature_becomes_a_hard_maximum():
    q = torch.tensor([[1.0, 3.0, 2.0]], dtype=F64)
    torch.testing.assert_close(conservative_loss(q, torch.tensor([0]), 1e-6), torch.tensor(2.0, dtype=F64))


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gamma": -0.1}, "gamma"),
        ({"gamma": float("nan")}, "gamma"),
        ({"temperature": 0.0}, "temperature"),
        ({"cql_temperature": -1.0}, "cql_temperature"),
        ({"td_weight": float("inf")}, "td_weight"),
        ({"reduction": "average"}, "reduction"),
        ({"action": torch.tensor([0, 7, 3, 3, 2])}, r"action must be in \[0, 6\]"),
        ({"action": torch.tensor([0, -1, 3, 3, 2])}, "action"),
        ({"action": torch.zeros(B)}, "integers"),
        ({"reward_neg": _rng(B, 0)}, "at least one negative"),
        ({"trans_neg": _rng(B, 0, D)}, "at least one negative"),
        ({"reward": torch.zeros(B + 1)}, "reward"),
        ({"done": torch.zeros(B, 1)}, "done"),
        ({"q_next_online": _rng(B, I + 1)}, "q_next_online"),
        ({"q_next_target": _rng(B + 1, I)}, "q_next_target"),
        ({"next_state": _rng(B, D + 1)}, "next_state"),
        ({"reward_pos": _rng(B + 1), "reward_neg": _rng(B + 1, K)}, "reward_pos"),
        ({"trans_pos": _rng(2, D), "trans_neg": _rng(2, K, D), "next_state": _rng(2, D)}, "trans_pos"),
        ({"q": torch.zeros(B, I, dtype=torch.int64)}, "q must be a floating"),
        ({"q": _rng(0, I)}, "q must be"),
    ],
)
def test_bad_input(change, words):
    with pytest.raises(ValueError, match=words):
        mcrl_loss(**{**_inputs(), **change})


# --- negatives ----------------------------------------------------------------------------------------------------


def test_negatives_are_uniform_over_the_others():
    action = torch.tensor([2]).repeat(4000)
    drawn = sample_negative_actions(action, 5, 3, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn.flatten(), minlength=5)
    assert counts[2] == 0
    # 12,000 draws over four items: 3,000 each, standard deviation 47
    assert (counts[[0, 1, 3, 4]] - 3000).abs().max() < 5 * 47


@given(
    excluded=st.lists(st.integers(-2, 8), max_size=6),
    action=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60)
def test_excluded_items_are_never_drawn_and_the_others_all_are(excluded, action, seed):
    permitted = set(range(6)) - set(excluded) - {action}
    exclude = torch.tensor([excluded], dtype=torch.int64).view(1, -1)
    generator = torch.Generator().manual_seed(seed)
    if not permitted:
        with pytest.raises(ValueError, match="no item remains"):
            sample_negative_actions(torch.tensor([action]), 6, 2, exclude=exclude, generator=generator)
        return
    drawn = sample_negative_actions(torch.tensor([action]), 6, 300, exclude=exclude, generator=generator)
    assert set(drawn.flatten().tolist()) == permitted


def test_excluding_is_uniform_too():
    exclude = torch.tensor([[0, 3, 3, 9]]).repeat(4000, 1)
    generator = torch.Generator().manual_seed(1)
    drawn = sample_negative_actions(torch.full((4000,), 1), 6, 3, exclude=exclude, generator=generator)
    counts = torch.bincount(drawn.flatten(), minlength=6)
    assert counts[[0, 1, 3]].sum() == 0
    assert (counts[[2, 4, 5]] - 4000).abs().max() < 5 * 52


def test_negatives_repeat_under_a_seed():
    one, two = (sample_negative_actions(ACTION, I, K, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 0}, "at least one negative"),
        ({"num_items": 1}, "num_items"),
        ({"action": torch.tensor([7])}, "action"),
        ({"exclude": torch.zeros(3, 2, dtype=torch.int64)}, "exclude"),
    ],
)
def test_bad_negatives(options, words):
    arguments = {"action": torch.tensor([0]), "num_items": 4, "k": 2, **options}
    with pytest.raises(ValueError, match=words):
        sample_negative_actions(**arguments)


# --- metrics ------------------------------------------------------------------------------------------------------


def test_metrics_count_strictly_higher_scores():
    scores = torch.tensor([[3.0, 2.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0], [4.0, 3.0, 2.0, 1.0]])
    target, bought = torch.tensor([2, 3, 3]), torch.tensor([True, True, False])
    out = next_item_metrics(scores, target, bought, k=2)  # ranks 2, 1, 4
    assert out == pytest.approx(
        {"hr_click": 0.0, "ndcg_click": 0.0, "hr_purchase": 1.0, "ndcg_purchase": (1 / math.log2(3) + 1) / 2}
    )
    assert next_item_metrics(scores, target, bought, k=4)["hr_click"] == 1.0


def test_metrics_of_an_absent_type_are_zero():
    out = next_item_metrics(torch.eye(2), torch.tensor([0, 1]), torch.zeros(2), k=1)
    assert out["hr_purchase"] == out["ndcg_purchase"] == 0.0
    assert out["hr_click"] == 1.0


def test_metrics_refuse_what_would_mislead():
    nan = torch.tensor([[torch.nan, 0.0]])
    with pytest.raises(ValueError, match="NaN"):
        next_item_metrics(nan, torch.tensor([0]), torch.zeros(1), k=1)
    for scores, target, k in ((torch.eye(2), [0, 2], 1), (torch.eye(2), [0, 1], 0), (torch.ones(2), [0, 1], 1)):
        with pytest.raises(ValueError, match=r"target|k must|scores"):
            next_item_metrics(scores, torch.tensor(target), torch.zeros(2), k=k)
    with pytest.raises(ValueError, match="is_purchase"):
        next_item_metrics(torch.eye(2), torch.tensor([0, 1]), torch.zeros(3), k=1)
