from __future__ import annotations

import gc
import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ballast_testing.losses import check_loss
from graph_ood.infoigl import (
    InfoIGLState,
    _other_members,
    infoigl_loss,
    instance_loss,
    semantic_loss,
    update_prototypes,
)

F64 = torch.float64


def _rng(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def _cos(a, b):
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def prototypes_reference(z, y, old, temperature=5.0):
    new = old.copy()
    for c in range(len(old)):
        members = z[y == c]
        if len(members):
            new[c] = _softmax(np.array([_cos(row, old[c]) for row in members]) / temperature) @ members
    return new


def semantic_reference(z, y, w, *, variant="official", tau=1.0):
    rows = []
    for row, label in zip(z, y, strict=True):
        scores = w @ row / tau if variant == "paper" else _softmax(np.array([_cos(row, other) for other in w]) / tau)
        rows.append(-np.log(_softmax(scores)[label]))
    return np.mean(rows)


def negatives_reference(mixed, y, w, bank, variant):
    """What each class present in the batch is contrasted with, one class at a time."""
    size, found = bank.shape[1], bank.copy()
    for c in np.unique(y):
        others = np.concatenate([np.flatnonzero(y == other) for other in np.unique(y) if other != c] or [[]]).astype(
            int
        )
        if len(others) >= size:
            score = mixed[others] @ w[c]
            found[c] = mixed[others[np.argsort(-score if variant == "paper" else score)[:size]]]
        else:
            found[c] = np.concatenate([bank[c][: size - len(others)], mixed[others]])
    return found


def instance_reference(z, y, w, bank, *, variant="official", lambda_c=0.7, num_negatives=10, tau=1.0, partner=None):
    mixed = lambda_c * z + (1 - lambda_c) * w[y]
    negatives = negatives_reference(mixed, y, w, bank, variant)
    rows = []
    for i, c in enumerate(y):
        positive = mixed[np.flatnonzero(y == c)[0]] if partner is None else mixed[partner[i]]
        scores = np.concatenate([[mixed[i] @ positive], negatives[c] @ mixed[i]]) / tau
        rows.append(-np.log(_softmax(_softmax(scores) if variant == "official" else scores)[0]))
    return np.mean(rows), negatives


# --- prototypes ---------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(2, 5), st.integers(1, 4), st.integers(0, 10**6))
def test_prototypes_equal_the_loop(batch, classes, dim, seed):
    z, w = _rng(batch, dim, seed=seed), _rng(classes, dim, seed=seed + 1)
    y = torch.randint(classes, (batch,), generator=_gen(seed))
    want = prototypes_reference(z.numpy(), y.numpy(), w.numpy())
    torch.testing.assert_close(update_prototypes(z, y, w), torch.from_numpy(want))


def test_first_prototypes_are_means_and_random_rows_for_missing_classes():
    z, y = _rng(4, 200), torch.tensor([0, 0, 2, 0])
    w = update_prototypes(z, y, None, num_classes=3, generator=_gen(1))
    torch.testing.assert_close(w[0], z[y == 0].mean(0))
    torch.testing.assert_close(w[2], z[2])
    assert abs(w[1].std() - 1) < 0.2
    assert torch.equal(w, update_prototypes(z, y, None, num_classes=3, generator=_gen(1)))


def test_prototypes_are_constants():
    z, y = _rng(4, 3).requires_grad_(), torch.tensor([0, 0, 1, 2])
    first = update_prototypes(z, y, None, num_classes=3)
    then = update_prototypes(z, y, first.requires_grad_())
    assert not then.requires_grad
    assert not update_prototypes(z, y, None, num_classes=3).requires_grad


def test_prototypes_of_a_high_temperature_are_means_and_of_a_low_one_the_nearest():
    z, y, w = _rng(6, 3), torch.tensor([0, 0, 0, 1, 1, 1]), _rng(2, 3, seed=1)
    hot, cold = (update_prototypes(z, y, w, temperature=t) for t in (1e6, 1e-6))
    torch.testing.assert_close(hot, torch.stack([z[:3].mean(0), z[3:].mean(0)]), rtol=1e-4, atol=1e-4)
    nearest = [int(torch.cosine_similarity(z[part], w[c : c + 1]).argmax()) for c, part in enumerate((y == 0, y == 1))]
    torch.testing.assert_close(cold, torch.stack([z[:3][nearest[0]], z[3:][nearest[1]]]))


# --- semantic loss ------------------------------------------------------------------------------------------------

Y = torch.tensor([0, 2, 1, 2, 0, 2, 2])


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_battery_semantic(variant):
    inputs = [_rng(7, 4), Y, _rng(3, 4, seed=1)]
    check_loss(semantic_loss, inputs, {"variant": variant, "tau": 0.7}, semantic_reference, reductions=(), rows=(0, 1))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 20), st.floats(1e-3, 1e3), st.integers(0, 10**6))
def test_official_semantic_loss_has_bounds(classes, scale, seed):
    z, w = scale * _rng(5, 3, seed=seed), _rng(classes, 3, seed=seed + 1)
    loss = float(semantic_loss(z, torch.randint(classes, (5,), generator=_gen(seed)), w))
    high = math.log(math.e + classes - 1)
    assert high - 1 - 1e-9 <= loss <= high + 1e-9


def test_official_semantic_loss_reaches_its_lower_bound_with_separated_classes_and_a_small_tau():
    z, y = torch.eye(4, dtype=F64), torch.arange(4)
    assert float(semantic_loss(z, y, torch.eye(4, dtype=F64), tau=1e-3)) == pytest.approx(math.log(math.e + 3) - 1)


def test_paper_semantic_loss_vanishes_with_tau():
    z, y = torch.eye(4, dtype=F64), torch.arange(4)
    losses = [float(semantic_loss(z, y, torch.eye(4, dtype=F64), variant="paper", tau=tau)) for tau in (1.0, 0.1, 0.01)]
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < 1e-12


def test_a_class_without_members_still_counts_as_a_wrong_answer():
    z, y, w = _rng(3, 4), torch.tensor([0, 0, 0]), _rng(3, 4, seed=1)
    for variant in ("official", "paper"):
        assert semantic_loss(z, y, w, variant=variant) != semantic_loss(z, y, w[:2], variant=variant)


# --- instance loss ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 14), st.integers(2, 4), st.integers(1, 6), st.floats(0, 1), st.integers(0, 10**6))
def test_official_instance_loss_equals_the_loop(batch, classes, size, lambda_c, seed):
    z, w, bank = _rng(batch, 3, seed=seed), _rng(classes, 3, seed=seed + 1), _rng(classes, size, 3, seed=seed + 2)
    y = torch.randint(classes, (batch,), generator=_gen(seed))
    params = {"lambda_c": lambda_c, "num_negatives": size, "tau": 0.8}
    loss, new = instance_loss(z, y, w, bank, **params)
    # with lambda_c at 0 all members of a class are equal, and which of them are taken does not matter
    want, want_bank = instance_reference(*(x.numpy() for x in (z, y, w, bank)), **params)
    assert float(loss) == pytest.approx(want, rel=1e-9)
    torch.testing.assert_close(new, torch.from_numpy(want_bank), rtol=1e-7, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 10**6))
def test_paper_instance_loss_equals_the_loop(pairs, size, seed):
    """With two members per class the other one is the positive, whatever is drawn."""
    y = torch.randperm(2 * pairs, generator=_gen(seed)) // 2
    partner = [next(j for j in range(len(y)) if j != i and y[j] == y[i]) for i in range(len(y))]
    classes = max(pairs, 2)
    z, w, bank = _rng(len(y), 3, seed=seed), _rng(classes, 3, seed=seed + 1), _rng(classes, size, 3, seed=seed + 2)
    params = {"variant": "paper", "num_negatives": size, "tau": 1.3}
    loss, new = instance_loss(z, y, w, bank, **params)
    want, want_bank = instance_reference(*(x.numpy() for x in (z, y, w, bank)), partner=partner, **params)
    assert float(loss) == pytest.approx(want, rel=1e-9)
    torch.testing.assert_close(new, torch.from_numpy(want_bank))


@pytest.mark.parametrize("size", [2, 10])
def test_battery_official_instance(size):
    def fn(*args, **params):
        return instance_loss(*args, **params)[0]

    def reference(*args, **params):
        return instance_reference(*args, **params)[0]

    inputs = [_rng(7, 4), Y, _rng(3, 4, seed=1), _rng(3, size, 4, seed=2)]
    # the loss depends on which member of a class comes first; the memory is a constant
    check_loss(
        fn, inputs, {"num_negatives": size}, reference, reductions=(), permutation=False, detached=(3,), rows=(0, 1)
    )


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_instance_gradient(variant):
    w, bank = _rng(3, 4, seed=1), _rng(3, 5, 4, seed=2)

    def loss(z):
        return instance_loss(z, Y, w, bank, variant=variant, num_negatives=5, generator=_gen())[0]

    assert torch.autograd.gradcheck(loss, (_rng(7, 4).requires_grad_(),))


def test_order_of_the_batch_matters_to_the_official_form_through_first_members_only():
    y = torch.randint(3, (30,), generator=_gen())
    z, w, bank = _rng(30, 4), _rng(3, 4, seed=1), _rng(3, 5, 4, seed=2)
    first = [int((y == c).nonzero()[0]) for c in range(3)]
    rest = torch.tensor([i for i in range(30) if i not in first])
    shuffled = rest[torch.randperm(len(rest), generator=_gen())]
    same, other = torch.cat([torch.tensor(first), shuffled]), torch.cat([shuffled, torch.tensor(first)])
    before, moved, changed = (
        instance_loss(z[order], y[order], w, bank, num_negatives=5)[0] for order in (torch.arange(30), same, other)
    )
    torch.testing.assert_close(before, moved)
    assert abs(before - changed) > 1e-6


def test_order_of_the_batch_does_not_matter_to_the_paper_form():
    y = torch.randint(3, (30,), generator=_gen())
    z, w, bank = _rng(30, 4), _rng(3, 4, seed=1), _rng(3, 5, 4, seed=2)
    losses = []
    for order in (torch.arange(30), torch.randperm(30, generator=_gen(1)), torch.randperm(30, generator=_gen(2))):
        args = (z[order], y[order], w, bank)
        losses.append(instance_loss(*args, variant="paper", num_negatives=5, generator=_gen(7))[0])
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])
    other = instance_loss(z, y, w, bank, variant="paper", num_negatives=5, generator=_gen(8))[0]
    assert abs(other - losses[0]) > 1e-6


def test_paper_positives_are_uniform_over_the_other_members():
    y, draws = torch.tensor([0, 1, 0, 2, 0, 2, 0]), 4000
    similarity, generator = _rng(3, 7), _gen()
    counts = torch.zeros(7, 7)
    for _ in range(draws):
        counts[torch.arange(7), _other_members(y, similarity, 3, generator)] += 1
    other = (y[:, None] == y) & ~torch.eye(7, dtype=torch.bool)
    other[1, 1] = True  # alone
    want = other / other.sum(1, keepdim=True)
    assert torch.all((counts / draws - want).abs() < 4 * (want * (1 - want) / draws).sqrt() + 1e-9)


def test_a_member_that_is_alone_is_its_own_positive():
    z, y, w = _rng(2, 3), torch.tensor([0, 1]), torch.zeros(2, 3, dtype=F64)
    loss, _ = instance_loss(z, y, w, _rng(2, 1, 3, seed=2), variant="paper", lambda_c=1.0, num_negatives=1)
    own, cross = (z * z).sum(1), (z[0] @ z[1]).expand(2)
    torch.testing.assert_close(loss, torch.nn.functional.softplus(cross - own).mean())


def test_the_forms_take_opposite_negatives():
    z = torch.tensor([[5.0, 0], [1, 0], [2, 0], [3, 0]], dtype=F64)
    y, w, bank = (
        torch.tensor([0, 1, 1, 1]),
        torch.tensor([[1.0, 0], [0, 1]], dtype=F64),
        torch.zeros(2, 2, 2, dtype=F64),
    )
    kept = {
        variant: instance_loss(z, y, w, bank, variant=variant, lambda_c=1.0, num_negatives=2)[1][0, :, 0].tolist()
        for variant in ("official", "paper")
    }
    assert kept == {"official": [1.0, 2.0], "paper": [3.0, 2.0]}


def test_without_own_share_nothing_is_learned():
    z = _rng(7, 4).requires_grad_()
    loss, _ = instance_loss(z, Y, _rng(3, 4, seed=1), _rng(3, 10, 4, seed=2), lambda_c=0.0)
    assert not torch.autograd.grad(loss, z)[0].any()


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_memory_keeps_nothing_of_earlier_batches(variant):
    state = InfoIGLState.start(3, 4, generator=_gen())
    alive = []
    for step in range(50):
        weight = _rng(7, 4, seed=step).float().requires_grad_()
        z = weight * 2
        parts = infoigl_loss(torch.zeros(7, 3), z, Y, state, variant=variant)
        parts.loss.backward()
        alive.append(weakref.ref(z))
        state = parts.state
        assert state.prototypes is not None
        assert not any(x.requires_grad for x in state)
    del z, weight, parts
    gc.collect()
    assert not any(ref() is not None for ref in alive)


def test_memory_is_kept_where_a_class_is_missing():
    bank = _rng(3, 2, 4, seed=2)
    _, new = instance_loss(_rng(4, 4), torch.tensor([0, 1, 0, 1]), _rng(3, 4, seed=1), bank, num_negatives=2)
    assert torch.equal(new[2], bank[2])
    assert not torch.isclose(new[:2], bank[:2]).any()


def test_inputs_stay_as_they_are():
    z, w, bank = _rng(7, 4), _rng(3, 4, seed=1), _rng(3, 5, 4, seed=2)
    copies = [x.clone() for x in (z, w, bank)]
    instance_loss(z, Y, w, bank, num_negatives=5)
    update_prototypes(z, Y, w)
    for x, copy in zip((z, w, bank), copies, strict=True):
        assert torch.equal(x, copy)


# --- the whole ----------------------------------------------------------------------------------------------------


def test_total_is_the_weighted_sum_of_the_parts():
    logits, z = _rng(7, 3).requires_grad_(), _rng(7, 4, seed=1).requires_grad_()
    state = InfoIGLState(_rng(3, 4, seed=2), _rng(3, 5, 4, seed=3))
    parts = infoigl_loss(logits, z, Y, state, lambda_s=0.3, lambda_i=0.2, lambda_c=0.4, pred_weight=0.5)
    w = update_prototypes(z, Y, state.prototypes)
    sem = semantic_loss(z, Y, w)
    ins, bank = instance_loss(z, Y, w, state.memory_bank, lambda_c=0.4, num_negatives=5)
    want = 0.5 * torch.nn.functional.cross_entropy(logits, Y) + 0.3 * sem + 0.2 * ins
    torch.testing.assert_close(parts.loss, want)
    torch.testing.assert_close((parts.state.prototypes, parts.state.memory_bank), (w, bank))
    for ours, theirs in zip(*(torch.autograd.grad(x, (logits, z)) for x in (parts.loss, want)), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not any(x.requires_grad for x in (parts.loss_pred, parts.loss_sem, parts.loss_ins))


def test_contrast_pulls_classes_together():
    """Gradient descent on free vectors: classes become compact and apart, in both forms."""
    for variant in ("official", "paper"):
        z = _rng(24, 4).requires_grad_()
        y = torch.arange(24) % 3
        state = InfoIGLState.start(3, 4, generator=_gen())
        optimizer = torch.optim.Adam([z], lr=0.05)
        first, last = math.inf, math.inf
        for step in range(150):
            optimizer.zero_grad()
            parts = infoigl_loss(torch.zeros(24, 3), z, y, state, variant=variant, generator=_gen(step))
            parts.loss.backward()
            optimizer.step()
            state, last = parts.state, parts.loss.item()
            first = last if step == 0 else first
        assert last < first - 0.3
        directions = torch.nn.functional.normalize(z.detach(), dim=1)
        similarity = directions @ directions.T
        same = y[:, None] == y
        assert similarity[same].mean() > similarity[~same].mean() + 0.8


def test_half_precision_state_and_losses():
    z = _rng(7, 4).bfloat16()
    parts = infoigl_loss(torch.zeros(7, 3).bfloat16(), z, Y, InfoIGLState.start(3, 4, generator=_gen()))
    assert parts.state.prototypes.dtype == parts.state.memory_bank.dtype == torch.float32
    exact = infoigl_loss(torch.zeros(7, 3), z.float(), Y, InfoIGLState.start(3, 4, generator=_gen()))
    torch.testing.assert_close(parts.loss.float(), exact.loss, rtol=1e-2, atol=1e-2)


# --- bad input ----------------------------------------------------------------------------------------------------

Z, W, BANK = torch.zeros(7, 4), torch.ones(3, 4), torch.zeros(3, 10, 4)
STATE = InfoIGLState(None, BANK)

BAD = [
    (lambda: update_prototypes(Z, Y, None), r"num_classes is needed where prototypes is None"),
    (lambda: update_prototypes(Z, Y, None, num_classes=1), r"num_classes must be an integer >= 2, got 1"),
    (lambda: update_prototypes(Z, Y, W, num_classes=4), r"num_classes must be the rows of prototypes, 3, got 4"),
    (lambda: update_prototypes(Z, Y, W[:, :3]), r"prototypes must have shape \[rows, 4\], got \(3, 3\)"),
    (lambda: update_prototypes(Z, Y, W, temperature=0.0), r"temperature must be a positive finite number, got 0.0"),
    (lambda: update_prototypes(Z, Y, W[:2]), r"y must be in \[0, 2\), got values from 0 to 2"),
    (lambda: update_prototypes(Z, -Y, None, num_classes=3), r"y must be in \[0, 3\), got values from -2 to 0"),
    (lambda: update_prototypes(Z, Y.float(), W), r"y must be an int64 tensor of shape \[7\], got torch.float32"),
    (lambda: update_prototypes(Z, Y[:3], W), r"y must be an int64 tensor of shape \[7\], got torch.int64 \(3,\)"),
    (lambda: update_prototypes(Z[:0], Y[:0], W), r"z must have at least one row"),
    (lambda: update_prototypes(Z.long(), Y, W), r"z must be a float tensor, got torch.int64"),
    (lambda: semantic_loss(Z, Y, None), r"prototypes must be a \[C, d\] tensor, got None"),
    (lambda: semantic_loss(Z, Y, W[:2]), r"y must be in \[0, 2\)"),
    (lambda: semantic_loss(Z, Y * 0, W[:1]), r"prototypes must have a row for each of 2 or more classes, got 1"),
    (lambda: semantic_loss(Z, Y, W, tau=-1.0), r"tau must be a positive finite number, got -1.0"),
    (lambda: semantic_loss(Z, Y, W, variant="offical"), r"unknown variant 'offical'; .* did you mean 'official'\?"),
    (lambda: instance_loss(Z, Y, None, BANK), r"prototypes must be a \[C, d\] tensor, got None"),
    (lambda: instance_loss(Z, Y, W, BANK[:2]), r"memory_bank must be .* \(3, 10, 4\), got \(2, 10, 4\)"),
    (lambda: instance_loss(Z, Y, W, BANK, num_negatives=9), r"memory_bank must be .* \(3, 9, 4\), got \(3, 10, 4\)"),
    (lambda: instance_loss(Z, Y, W, BANK, num_negatives=0), r"num_negatives must be an integer >= 1, got 0"),
    (lambda: instance_loss(Z, Y, W, BANK, lambda_c=1.1), r"lambda_c must be in \[0, 1\], got 1.1"),
    (lambda: instance_loss(Z, Y, W, BANK, lambda_c=math.nan), r"lambda_c must be in \[0, 1\], got nan"),
    (lambda: instance_loss(Z, Y, W, BANK, variant="both"), r"unknown variant 'both'; accepted: official, paper"),
    (lambda: infoigl_loss(torch.zeros(7, 2), Z, Y, STATE), r"logits must be \(B, C\) = \(7, 3\), got \(7, 2\)"),
    (lambda: infoigl_loss(torch.zeros(7, 3), Z, Y, STATE, lambda_s=-1.0), r"lambda_s must be a finite number >= 0"),
    (lambda: infoigl_loss(torch.zeros(7, 3), Z, Y, STATE, lambda_i=math.inf), r"lambda_i must be a finite number"),
    (lambda: infoigl_loss(torch.zeros(7, 3), Z, Y, STATE, pred_weight=-0.5), r"pred_weight must be a finite number"),
    (lambda: InfoIGLState.start(1, 4), r"num_classes must be an integer >= 2, got 1"),
    (lambda: InfoIGLState.start(3, 4, num_negatives=0), r"num_negatives must be an integer >= 1, got 0"),
    (lambda: InfoIGLState.start(3, 4, prototypes=W[:2]), r"prototypes must be \(3, 4\), got \(2, 4\)"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=range(len(BAD)))
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
