from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ballast_testing.distributed import gathered, run_gloo
from ballast_testing.losses import check_loss
from pref_opt.baselines import sdpo_loss, simpo_loss
from pref_opt.losses import Logps, LossContext, make_loss
from pref_opt.napo import (
    NAPOLoss,
    SASRec,
    annotate_dataset,
    dynamic_reward_margin,
    hit_ratio_at_1,
    napo_loss,
    popularity_bias,
    shared_negative_index,
    train_sasrec,
)

F64 = torch.float64


def _rng(*shape: int, seed: int = 0, loc: float = 0.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64) + loc


def _batch(users=4, negatives=3, seed=0):
    return (
        _rng(users, seed=seed, loc=-5),
        _rng(users, negatives, seed=seed + 1, loc=-7),
        {
            "user_embeddings": _rng(users, 4, seed=seed + 2),
            "avg_item_embeddings": _rng(users, 2, seed=seed + 3),
            "negative_scores": _rng(users, negatives, seed=seed + 4, loc=2),
            "ids": torch.arange(users) + 100,
        },
    )


# --- sharing -----------------------------------------------------------------------------------------------------------


def test_the_nearest_users_by_hand():
    users = torch.tensor([[1.0, 0.0], [0.8, 0.1], [-1.0, 0.0], [0.0, 5.0]])
    index = shared_negative_index(users, torch.tensor([7, 3, 9, 1]), share_ratio=0.7)
    # dot products with user 0: 0.8, -1, 0; with user 1: 0.8, -0.8, 0.5; user 2: -1, -0.8, 0; user 3: 0, 0.5, 0
    assert index.tolist() == [[1, 3], [0, 3], [3, 1], [1, 0]]
    assert torch.equal(shared_negative_index(users, share_ratio=0.7, rows=torch.tensor([2, 3])), index[2:])


@pytest.mark.parametrize(("ratio", "count"), [(0.0, 0), (0.09, 0), (0.1, 1), (0.3, 3), (0.7, 7), (0.99, 9), (1.0, 10)])
def test_number_of_shared_users(ratio, count):
    index = shared_negative_index(_rng(11, 3), share_ratio=ratio)
    assert index.shape == (11, count)
    assert all(row not in others for row, others in enumerate(index.tolist()))


def test_one_user_shares_with_nobody():
    assert shared_negative_index(_rng(1, 3), torch.tensor([5]), share_ratio=1.0).shape == (1, 0)


def test_duplicate_examples():
    ids = torch.tensor([4, 8, 4])
    with pytest.raises(ValueError, match="duplicate example ids: 4"):
        shared_negative_index(_rng(3, 2), ids, share_ratio=0.7)
    assert shared_negative_index(_rng(3, 2), ids, share_ratio=0.0).shape == (3, 0)


# --- loss --------------------------------------------------------------------------------------------------------------


def _reference(c, n, u, *, beta=1.0, gamma=1.0, share_ratio=0.7, negative_grad="all", reduction="mean"):
    del negative_grad
    losses = []
    for i in range(len(c)):
        others = sorted((h for h in range(len(c)) if h != i), key=lambda h: -float(u[i] @ u[h]))
        pool = np.concatenate([n[i], *(n[h] for h in others[: int(share_ratio * (len(c) - 1) + 1e-9)])])
        losses.append(np.logaddexp(0, gamma + np.logaddexp.reduce(beta * (pool - c[i]))))
    return np.array(losses) if reduction == "none" else np.mean(losses)


def test_battery():
    chosen, rejected, features = _batch(5)
    check_loss(
        napo_loss,
        [chosen, rejected, features["user_embeddings"]],
        {"beta": 0.8, "gamma": 0.4, "share_ratio": 0.5},
        _reference,
        detached=(2,),
        extreme_inputs=(0, 1),
        dtypes={"float32": 1e-5},  # rounded user vectors may have other neighbours
        reductions=("none", "mean"),
    )


@pytest.mark.parametrize("negative_grad", ["all", "own", "none"])
def test_where_gradients_go(negative_grad):
    chosen, rejected, features = _batch()
    chosen.requires_grad_()
    rejected.requires_grad_()
    loss = napo_loss(chosen, rejected, features["user_embeddings"], share_ratio=1.0, negative_grad=negative_grad)
    loss.backward()
    slope = torch.sigmoid(1 + (rejected.flatten() - chosen[:, None]).logsumexp(1)) / 4
    torch.testing.assert_close(chosen.grad, -slope)
    shares = slope[:, None] * (rejected.flatten() - chosen[:, None]).softmax(1)
    by_user = shares.detach().view(4, 4, 3)  # [user, whose negative, which]
    if negative_grad == "none":
        assert rejected.grad is None
    else:
        expected = by_user.sum(0) if negative_grad == "all" else by_user.diagonal().T
        torch.testing.assert_close(rejected.grad, expected)


def test_without_sharing_it_is_s_dpo_without_a_reference():
    chosen, rejected, features = _batch()
    zero, zeros = torch.zeros_like(chosen), torch.zeros_like(rejected)
    ours = napo_loss(chosen, rejected, features["user_embeddings"], beta=0.5, gamma=0.0, share_ratio=0.0)
    torch.testing.assert_close(ours, sdpo_loss(chosen, rejected, zero, zeros, beta=0.5))
    # the margin adds to the log-sum-exp, as a higher log-probability of every negative does
    shifted = napo_loss(chosen, rejected, features["user_embeddings"], beta=0.5, gamma=0.3, share_ratio=0.0)
    torch.testing.assert_close(shifted, sdpo_loss(chosen, rejected + 0.6, zero, zeros, beta=0.5))


def test_with_one_negative_it_is_simpo_on_sums():
    chosen, rejected, features = _batch(negatives=1)
    ours = napo_loss(chosen, rejected, features["user_embeddings"], beta=0.5, gamma=0.2, share_ratio=0.0)
    torch.testing.assert_close(ours, simpo_loss(chosen, rejected[:, 0], beta=0.5, gamma_beta_ratio=0.4))


def test_two_users_double_their_negatives():
    chosen, rejected, features = _batch(2)
    both = rejected.flatten().expand(2, -1)
    users = features["user_embeddings"]
    torch.testing.assert_close(
        napo_loss(chosen, rejected, users, share_ratio=1.0), napo_loss(chosen, both, users, share_ratio=0.0)
    )


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.4, 1.0]))
@settings(deadline=None, max_examples=20)
def test_loss_rises_with_every_negative(seed, ratio):
    chosen, rejected, features = _batch(seed=seed)
    rejected.requires_grad_()
    napo_loss(chosen, rejected, features["user_embeddings"], share_ratio=ratio).backward()
    assert (rejected.grad > 0).all()


def test_permuted_users():
    chosen, rejected, features = _batch(5)
    order = torch.tensor([3, 0, 4, 1, 2])

    def grads(*tensors):
        c, n = (x.clone().requires_grad_() for x in tensors[:2])
        return torch.autograd.grad(napo_loss(c, n, tensors[2], share_ratio=0.5), (c, n))

    straight = grads(chosen, rejected, features["user_embeddings"])
    permuted = grads(chosen[order], rejected[order], features["user_embeddings"][order])
    for a, b in zip(straight, permuted, strict=True):
        torch.testing.assert_close(a[order], b)


# --- margin ------------------------------------------------------------------------------------------------------------


def test_usual_scores_leave_the_margin_alone():
    gamma, ema = dynamic_reward_margin(torch.full((2, 6), 1.7), gamma0=0.8, score_ema=1.7)
    assert gamma.item() == pytest.approx(0.8)
    assert ema.item() == pytest.approx(1.7)


def test_high_scores_lower_the_margin():
    high, _ = dynamic_reward_margin(torch.full((2, 6), 2.7), score_ema=1.7)
    low, _ = dynamic_reward_margin(torch.full((2, 6), 0.7), score_ema=1.7)
    assert high < 1 < low
    assert high.item() == pytest.approx(1 - 0.3 * 0.9)  # the average moves before it is used


# --- object ------------------------------------------------------------------------------------------------------------


def test_loss_object_over_two_batches():
    loss = make_loss("napo", beta=0.7, gamma0=0.9, alpha=0.4, share_ratio=0.4, momentum=0.8)
    ema = 0.0
    for seed in (0, 10):
        chosen, rejected, features = _batch(seed=seed)
        users, scores = features["user_embeddings"], features["negative_scores"]
        index = shared_negative_index(users, share_ratio=0.4)
        pool = torch.cat([scores, scores[index].flatten(1)], 1)
        gamma, ema = dynamic_reward_margin(pool, gamma0=0.9, alpha=0.4, score_ema=ema, momentum=0.8)
        out = loss(Logps(chosen, rejected, features=features), LossContext())
        torch.testing.assert_close(out.loss, napo_loss(chosen, rejected, users, beta=0.7, gamma=gamma, share_ratio=0.4))
        torch.testing.assert_close(out.metrics["margin/gamma"], gamma)
        torch.testing.assert_close(out.metrics["scores/ema"], ema)
        torch.testing.assert_close(out.metrics["scores/mean"], pool.mean())
        assert out.metrics["negatives/pool"] == 6
        torch.testing.assert_close(out.rejected_rewards, 0.7 * rejected)
    assert loss.state_dict()["num_updates"] == 2


def test_evaluation_changes_nothing_and_gathers_nothing():
    def gather(values):
        raise AssertionError("gathered in evaluation")

    loss = NAPOLoss()
    chosen, rejected, features = _batch()
    logps = Logps(chosen, rejected, features=features)
    loss(logps, LossContext())
    before = dict(loss.state_dict())
    out = loss(logps, LossContext(training=False, gather=gather, world_size=2, process_index=1))
    assert loss.state_dict() == before
    gamma = 1 - 0.3 * (out.metrics["scores/mean"] - before["score_ema"])
    torch.testing.assert_close(out.metrics["margin/gamma"], gamma)


def test_state_is_restored():
    first, second = NAPOLoss(debias=True), NAPOLoss(debias=True)
    for seed in (0, 10, 20):
        chosen, rejected, features = _batch(seed=seed)
        logps = Logps(chosen, rejected, features=features)
        if seed == 20:
            second.load_state_dict(first.state_dict())
            assert first(logps, LossContext()).loss == second(logps, LossContext()).loss
        else:
            first(logps, LossContext())
    with pytest.raises(ValueError, match="written by another method"):
        second.load_state_dict({"mean": 0.0})


def test_debias_starts_at_gamma0():
    chosen, rejected, features = _batch()
    logps = Logps(chosen, rejected, features=features)
    assert make_loss("napo")(logps, LossContext()).metrics["margin/gamma"] < 0.6
    for training in (False, True):
        out = make_loss("napo", debias=True)(logps, LossContext(training=training))
        assert out.metrics["margin/gamma"].item() == pytest.approx(1.0)


def test_similarity_of_items_uses_their_vectors():
    chosen, rejected, features = _batch()
    out = NAPOLoss(similarity="item", alpha=0, share_ratio=0.4)(
        Logps(chosen, rejected, features=features), LossContext()
    )
    torch.testing.assert_close(out.loss, napo_loss(chosen, rejected, features["avg_item_embeddings"], share_ratio=0.4))


def test_items_that_the_user_has_seen_are_not_borrowed():
    chosen, rejected, features = _batch(2)
    items = {
        "chosen_items": torch.tensor([5, 6]),
        "rejected_items": torch.tensor([[5, 1, 2], [5, 3, -1]]),
        "history_items": torch.tensor([[8, 3, -1], [9, -1, -1]]),
    }
    logps = Logps(chosen, rejected, features=features | items)
    out = NAPOLoss(share_ratio=1.0)(logps, LossContext())
    # user 0 borrows neither 5 (positive) nor 3 (history), but the -1; user 1 borrows all three; own negatives always stay
    kept = [torch.cat([rejected[0], rejected[1, 2:]]), torch.cat([rejected[1], rejected[0]])]
    scores = features["negative_scores"]
    pool = torch.cat([scores[0], scores[1, 2:], scores[1], scores[0]])
    gamma = 1 - 0.3 * 0.9 * pool.mean()
    expected = [torch.nn.functional.softplus(gamma + (n - c).logsumexp(0)) for n, c in zip(kept, chosen, strict=True)]
    torch.testing.assert_close(out.loss, torch.stack(expected).mean())
    assert out.metrics["negatives/pool"] == 5
    assert out.metrics["negatives/excluded"].item() == pytest.approx(1 / 3)
    everything = NAPOLoss(share_ratio=1.0, exclude_items=False)(logps, LossContext())
    assert everything.metrics["negatives/pool"] == 6


def test_what_is_not_used_need_not_be_given():
    chosen, rejected, _ = _batch()
    out = NAPOLoss(share_ratio=0, alpha=0, gamma0=0)(Logps(chosen, rejected), LossContext())
    torch.testing.assert_close(
        out.loss, sdpo_loss(chosen, rejected, torch.zeros_like(chosen), torch.zeros_like(rejected), beta=1.0)
    )


def test_half_precision_is_computed_in_float32():
    chosen, rejected, features = _batch()
    halves = {name: value.bfloat16() if value.is_floating_point() else value for name, value in features.items()}
    out = NAPOLoss()(Logps(chosen.bfloat16(), rejected.bfloat16(), features=halves), LossContext())
    assert out.loss.dtype == torch.float32


# --- several processes -------------------------------------------------------------------------------------------------

MODES = ("all", "own", "none")


def _two_steps(rank, world_size):
    """Loss, gradient (with respect to both) and state of every mode; two micro-batches of 8 users in all."""
    found = {}
    for mode in MODES:
        loss = NAPOLoss(share_ratio=0.5, negative_grad=mode)
        for seed in (0, 20):
            chosen, rejected, features = _batch(8, seed=seed)
            features["rejected_items"] = torch.arange(24).view(8, 3) % 7
            features["chosen_items"] = torch.arange(8)
            own = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
            chosen, rejected = chosen[own].requires_grad_(), rejected[own].requires_grad_()
            logps = Logps(chosen, rejected, features={name: value[own] for name, value in features.items()})
            context = (
                LossContext(gather=gathered, world_size=world_size, process_index=rank)
                if world_size > 1
                else LossContext()
            )
            out = loss(logps, context)
            out.loss.backward()
            zeros = torch.zeros_like(rejected)
            grads = (chosen.grad, zeros if rejected.grad is None else rejected.grad)
            found[f"{mode}/{seed}"] = (
                out.loss.detach(),
                *grads,
                loss.state_dict()["score_ema"],
                out.metrics["margin/gamma"],
            )
    return found


def test_two_processes_equal_one():
    joint = _two_steps(0, 1)
    ranks = run_gloo(_two_steps, 2)
    for name, (value, *grads, ema, gamma) in joint.items():
        for rank, found in enumerate(ranks):
            loss, *own_grads, own_ema, own_gamma = found[name]
            torch.testing.assert_close(loss, value)
            torch.testing.assert_close(own_ema, ema)
            torch.testing.assert_close(own_gamma, gamma)
            for got, whole in zip(own_grads, grads, strict=True):
                # averaging over two processes halves what each contributes
                torch.testing.assert_close(got / 2, whole[rank * 4 : rank * 4 + 4])


# --- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1.0}, "beta must be positive"),
        ({"share_ratio": 1.1}, r"share_ratio must be in \[0, 1\]"),
        ({"negative_grad": "al"}, "did you mean 'all'"),
        ({"gamma0": math.inf}, "gamma0 must be a finite number"),
        ({"alpha": -0.1}, "alpha must be a finite number >= 0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"similarity": "seqq"}, "did you mean 'seq'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        NAPOLoss(**options)
    if set(options) & {"beta", "share_ratio", "negative_grad"}:
        with pytest.raises(ValueError, match=message):
            napo_loss(torch.zeros(2), torch.zeros(2, 3), torch.eye(2), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_embeddings": None}, "needs the feature 'user_embeddings' unless share_ratio=0"),
        ({"negative_scores": None}, "needs the feature 'negative_scores' unless alpha=0"),
        ({"user_embeddings": _rng(3, 4)}, r"user_embeddings must be floating of shape \(4, d\)"),
        ({"negative_scores": _rng(4, 2)}, r"negative_scores must have shape \(4, 3\), got \(4, 2\)"),
        ({"negative_scores": _rng(4, 3) * math.nan}, "negative_scores contains non-finite values"),
        ({"ids": torch.zeros(4, dtype=torch.long)}, "duplicate example ids: 0"),
        ({"ids": torch.zeros(4)}, "ids must be integers"),
        (
            {"chosen_items": torch.zeros(4), "rejected_items": torch.zeros(4, 2)},
            r"rejected_items must have shape \(4, 3\)",
        ),
    ],
)
def test_bad_features(change, message):
    chosen, rejected, features = _batch()
    features = {name: value for name, value in (features | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        NAPOLoss()(Logps(chosen, rejected, features=features), LossContext())


def test_bad_tensors():
    users = torch.eye(2)
    with pytest.raises(ValueError, match="rejected_logps must have shape"):
        napo_loss(torch.zeros(2), torch.zeros(2), users)
    with pytest.raises(ValueError, match=r"user_embeddings must be floating of shape \(2, d\)"):
        napo_loss(torch.zeros(2), torch.zeros(2, 3), torch.eye(3))
    with pytest.raises(ValueError, match=r"chosen_logps contains non-finite values, the first at \[1\]"):
        napo_loss(torch.tensor([0.0, math.nan]), torch.zeros(2, 3), users)
    with pytest.raises(ValueError, match="gamma must be a number or a scalar"):
        napo_loss(torch.zeros(2), torch.zeros(2, 3), users, gamma=torch.ones(2))
    with pytest.raises(ValueError, match="negative_scores must be a non-empty floating matrix"):
        dynamic_reward_margin(torch.zeros(3))


# --- the small recommender ---------------------------------------------------------------------------------------------


def test_padding_and_the_future_do_not_reach_a_user():
    torch.manual_seed(0)
    model = SASRec(9, hidden=8, max_length=5, num_blocks=2, num_heads=2).eval()
    alone = model(model.pad([[3, 1]])[:, :2])
    torch.testing.assert_close(model(model.pad([[3, 1], [2, 3, 4, 5, 6]]))[:1], alone)
    states = model.hidden_states(model.pad([[3, 1, 7, 7]]))
    torch.testing.assert_close(states[:, 1], alone)
    assert model.pad([[0, 1, 2, 3, 4, 5, 6]]).tolist() == [[2, 3, 4, 5, 6]]


def test_sasrec_learns_a_cycle_and_is_deterministic():
    generator = np.random.default_rng(0)
    sequences = [[int((start + i) % 12) for i in range(6)] for start in generator.integers(0, 12, 60)]
    state = torch.random.get_rng_state()
    model = train_sasrec(sequences, 12, hidden=16, epochs=30, batch_size=32, learning_rate=1e-2)
    assert torch.equal(state, torch.random.get_rng_state())
    users = model(model.pad([[i, (i + 1) % 12] for i in range(12)]))
    hits = (model.scores(users).argmax(1) == (torch.arange(12) + 2) % 12).float().mean()
    assert hits > 0.9  # by chance 1 / 12
    again = train_sasrec(sequences, 12, hidden=16, epochs=30, batch_size=32, learning_rate=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    other = train_sasrec(sequences, 12, hidden=16, epochs=1, batch_size=32, seed=1)
    assert not torch.equal(model.output.weight, other.output.weight)


def test_annotations():
    from datasets import Dataset

    torch.manual_seed(0)
    model = SASRec(9, hidden=8, max_length=3)
    rows = [
        {"history_items": [1, 2, 3, 4], "chosen_items": 5, "rejected_items": [6, 7]},
        {"history_items": [8], "chosen_items": 0, "rejected_items": [2, 1]},
        {"history_items": [0, 1], "chosen_items": 2, "rejected_items": [4, 4]},
    ]
    annotated = annotate_dataset(Dataset.from_list(rows), model, batch_size=2)
    assert model.training  # left as it was
    assert annotated["ids"][:] == [0, 1, 2]
    assert annotated["history_items"][:] == [[2, 3, 4], [8, -1, -1], [0, 1, -1]]
    model.eval()
    users = model(model.pad([[2, 3, 4], [8], [0, 1]]))
    torch.testing.assert_close(torch.tensor(annotated["user_embeddings"][:]), users)
    scores = model.scores(users)
    expected = torch.stack([scores[i, row["rejected_items"]] for i, row in enumerate(rows)])
    torch.testing.assert_close(torch.tensor(annotated["negative_scores"][:]), expected)
    average = model.item_embedding.weight[[2, 3, 4]].mean(0)
    torch.testing.assert_close(torch.tensor(annotated[0]["avg_item_embeddings"]), average)
    twice = annotate_dataset(annotated, model)  # what is there already is replaced, ids stay
    assert twice["history_items"][:] == annotated["history_items"][:]
    with pytest.raises(ValueError, match=r"dataset must have the columns \['chosen_items'\]"):
        annotate_dataset(annotated.remove_columns("chosen_items"), model)
    with pytest.raises(ValueError, match=r"rejected_items must be ids in \[0, 9\), got 9 in row 0"):
        annotate_dataset(Dataset.from_list([{"history_items": [1], "chosen_items": 5, "rejected_items": [9]}]), model)


def test_bad_sequences():
    with pytest.raises(ValueError, match="at least 2 items each, got 1 in sequence 1"):
        train_sasrec([[0, 1], [2]], 3)
    with pytest.raises(ValueError, match=r"items must be ids in \[0, 3\), at least one per sequence, got 3 in row 0"):
        train_sasrec([[0, 3]], 3)
    with pytest.raises(ValueError, match="hidden must be a multiple of num_heads=3"):
        SASRec(5, hidden=8, num_heads=3)
    with pytest.raises(ValueError, match="got an empty sequence in row 0"):
        SASRec(5, hidden=8).pad([[]])


# --- evaluation --------------------------------------------------------------------------------------------------------


def test_hit_ratio():
    candidates = [["Air", "Airbag", "Blur"]] * 6
    outputs = ["Blur", " Air ", "Airbag", "I like Blur.", "none", "Air or Blur"]
    targets = ["Blur", "Air", "Airbag", "Blur", "Air", "Air"]
    assert hit_ratio_at_1(outputs, candidates, targets) == {"hit_ratio": 3 / 6, "valid_ratio": 3 / 6}
    exact = hit_ratio_at_1(outputs, candidates, targets, match="exact")
    assert exact == {"hit_ratio": 3 / 6, "valid_ratio": 3 / 6}
    assert hit_ratio_at_1(["Blur"], candidates[:1], ["Air"]) == {"hit_ratio": 0.0, "valid_ratio": 1.0}
    with pytest.raises(ValueError, match="targets must be among the candidates, got 'Pulp' in row 0"):
        hit_ratio_at_1(["Blur"], candidates[:1], ["Pulp"])
    with pytest.raises(ValueError, match="same length of at least 1, got 0, 0 and 0"):
        hit_ratio_at_1([], [], [])


def test_popularity():
    assert popularity_bias([1, 2], [[0], [0, 1]], {0: 1, 1: 3, 2: 5}) == {
        "mean_popularity": 4.0,
        "popularity_ratio": 4.0 / 1.5,
    }
    with pytest.raises(ValueError, match="popularity must have every item, got none for 7"):
        popularity_bias([7], [[0]], {0: 1})
    with pytest.raises(ValueError, match="histories must have at least one item"):
        popularity_bias([0], [[]], {0: 1})
    with pytest.raises(ValueError, match="must be above 0"):
        popularity_bias([0], [[0]], {0: 0})


# --- does it do what it is for ------------------------------------------------------------------------------------------


def _catalogue_hits(seed, share_ratio, negative_grad):
    """HR@1 among 20 candidates of a linear model on 50 items and five groups of users, after 60 steps."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    centres = draw(5, 16)
    items = centres[torch.arange(50) % 5] + 0.7 * draw(50, 16)

    def sample(count, negatives):
        users = centres[torch.randint(5, (count,), generator=generator)] + 0.7 * draw(count, 16)
        positive = torch.multinomial((0.7 * users @ items.T).softmax(1), 1, generator=generator)
        others = torch.ones(count, 50).scatter(1, positive, 0.0)
        return users, positive[:, 0], torch.multinomial(others, negatives, generator=generator)

    train, test = sample(600, 3), sample(1000, 19)
    weight = (0.25 * draw(16, 50)).requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=0.02)
    for _ in range(60):
        rows = torch.randint(600, (16,), generator=generator)
        users, positive, negatives = (part[rows] for part in train)
        logps = (users @ weight).log_softmax(1)
        optimizer.zero_grad()
        napo_loss(
            logps.gather(1, positive[:, None])[:, 0],
            logps.gather(1, negatives),
            users,
            share_ratio=share_ratio,
            negative_grad=negative_grad,
        ).backward()
        optimizer.step()
    users, positive, negatives = test
    scores = (users @ weight).detach()
    return (scores.gather(1, positive[:, None]) > scores.gather(1, negatives)).all(1).double().mean().item()


def test_shared_negatives_help_where_they_are_constants():
    """Three seeds at equal cost. With a gradient through borrowed negatives the gain is gone, but nothing is lost."""
    means = {
        (ratio, mode): np.mean([_catalogue_hits(seed, ratio, mode) for seed in range(3)])
        for ratio, mode in ((0.0, "own"), (0.7, "own"), (0.7, "all"))
    }
    assert means[0.7, "own"] > means[0.0, "own"] + 0.02
    assert means[0.7, "all"] > means[0.0, "own"] - 0.02
