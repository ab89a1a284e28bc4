"""Right-hand side, curvature products, solver and updater, on models small enough to check densely."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix, hstack
from sklearn.linear_model import LogisticRegression
from torch import nn

from ihvp import ConvergenceWarning
from recsys_losses.if_dfm import (
    Clicks,
    DelayedClicks,
    InfluenceUpdater,
    build_model,
    choose_damping,
    cvr_metrics,
    hessian_vector_product,
    influence_rhs,
    logistic_influence_update,
    make_delayed_clicks,
    predict,
    relative_improvement,
    solve_influence,
)
from recsys_losses.if_dfm._influence import _Curvature

F64 = torch.float64


def _randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Net(nn.Module):
    """An embedding, a dropout that must be off, and a smooth layer; its last parameter isn't trained."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 2)
        self.one = nn.Linear(4, 3)
        self.drop = nn.Dropout(0.5)
        self.two = nn.Linear(3, 1)
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x, code):
        hidden = self.drop(torch.tanh(self.one(torch.cat([x, self.table(code)], 1))))
        return self.frozen * self.two(hidden).squeeze(1)


@pytest.fixture
def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().double()


def _batch(n=8, seed=1, codes=5):
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(n) % 2
    return _randn(n, 2, seed=seed), torch.randint(0, codes, (n,), generator=generator), label.double()


def _flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])


def _loss(model, batch, kind="bce"):
    *inputs, label = batch
    logits = model(*inputs)
    if kind == "squared":
        return 0.5 * (logits - label).square().mean()
    return F.binary_cross_entropy_with_logits(logits, label)


def _gradient(model, batch, kind="bce"):
    trained = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(_loss(model, batch, kind), trained)])


def _dense(product, size):
    return torch.stack([product(row) for row in torch.eye(size, dtype=F64)])


def _move(model, delta):
    moved = copy.deepcopy(model)
    at = 0
    with torch.no_grad():
        for p in moved.parameters():
            if p.requires_grad:
                p += delta[at : at + p.numel()].reshape(p.shape)
                at += p.numel()
    return moved


# --- right-hand side ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bce", "squared"])
def test_rhs_is_the_difference_of_summed_gradients(net, kind):
    x, code, _ = _batch()
    zeros, ones = torch.zeros(8, dtype=F64), torch.ones(8, dtype=F64)
    added = _batch(5, seed=2)
    by_two_passes = 8 * _gradient(net, (x, code, zeros), kind) - 8 * _gradient(net, (x, code, ones), kind)
    want = (by_two_passes - 5 * _gradient(net, added, kind)) / 100
    net.train()
    halves = [(x[:3], code[:3], zeros[:3]), (x[3:], code[3:], zeros[3:])]
    got = influence_rhs(net, halves, [added], 100, loss=kind)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
    assert net.training
    assert net.drop.training
    assert all(p.grad is None for p in net.parameters())


def test_flipping_back_is_the_negative(net):
    # the other direction written out: labels 1 that turn out to be 0
    x, code, _ = _batch()
    zeros, ones = torch.zeros(8, dtype=F64), torch.ones(8, dtype=F64)
    back = 8 * _gradient(net, (x, code, ones)) - 8 * _gradient(net, (x, code, zeros))
    torch.testing.assert_close(influence_rhs(net, [(x, code, zeros)], [], 8), -back / 8, rtol=1e-10, atol=1e-14)


def test_empty_rhs_is_zero(net):
    assert not influence_rhs(net, [], [], 10).any()


# --- curvature ------------------------------------------------------------------------------------------------------


def test_hessian_product_against_finite_differences(net):
    batch, v = _batch(), _randn(len(_flat(net)), seed=4)
    got = hessian_vector_product(net, batch, v)
    eps = 1e-5
    numeric = (_gradient(_move(net, eps * v), batch) - _gradient(_move(net, -eps * v), batch)) / (2 * eps)
    torch.testing.assert_close(got, numeric, rtol=1e-4, atol=1e-8)


def test_gauss_newton_is_the_weighted_outer_product(net):
    x, code, label = batch = _batch()
    net.eval()
    rows = []
    for i in range(8):
        f = net(x[i : i + 1], code[i : i + 1]).sum()
        gradients = torch.autograd.grad(f, [p for p in net.parameters() if p.requires_grad])
        rows.append(torch.cat([g.reshape(-1) for g in gradients]))
    jacobian = torch.stack(rows)
    for loss in ("bce", "squared"):
        p = net(x, code).detach().sigmoid()
        weight = p * (1 - p) if loss == "bce" else torch.ones_like(p)
        want = jacobian.T @ (jacobian * weight.unsqueeze(1)) / 8
        got = _dense(lambda v, loss=loss: hessian_vector_product(net, batch, v, kind="ggn", loss=loss), len(want))
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12)
        assert torch.linalg.eigvalsh(got)[0] > -1e-12
    assert len(label) == 8


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("cache", [False, True])
def test_a_pass_over_batches_is_the_mean_over_rows(net, kind, cache):
    x, code, y = whole = _batch(9)
    parts = [tuple(t[rows] for t in whole) for rows in (slice(0, 4), slice(4, 6), slice(6, 9))]
    size = len(_flat(net))
    v = _randn(size, seed=5)
    want = hessian_vector_product(net, whole, v, kind=kind) + 0.3 * v
    curvature = _Curvature(net, parts, kind, "bce", 0.3, cache=cache)
    for _ in range(2):
        torch.testing.assert_close(curvature(v), want, rtol=1e-9, atol=1e-12)
    u = _randn(size, seed=6)
    torch.testing.assert_close(u @ curvature(v), v @ curvature(u))
    assert len(x) == len(code) == len(y) == 9


def test_an_unused_parameter_has_no_curvature(net):
    net.idle = nn.Parameter(torch.ones(2, dtype=F64))
    size = len(_flat(net))
    for kind in ("hessian", "ggn"):
        product = hessian_vector_product(net, _batch(), torch.ones(size, dtype=F64), kind=kind)
        names = [name for name, p in net.named_parameters() if p.requires_grad]
        at = sum(dict(net.named_parameters())[name].numel() for name in names[: names.index("idle")])
        assert not product[at : at + 2].any()


# --- solver ---------------------------------------------------------------------------------------------------------


def _spd(n=6):
    a = _randn(n, n)
    return a @ a.T + torch.eye(n, dtype=F64)


def test_the_three_methods_agree():
    A, b = _spd(), _randn(6, seed=7)
    want = torch.linalg.solve(0.7 * A + 0.2 * torch.eye(6, dtype=F64), b)

    def run(method, **options):
        return solve_influence(lambda v: A @ v, b, damping=0.2, method=method, curvature_scale=0.7, **options)

    for method, options in (("cg", {"tol": 1e-10}), ("direct", {}), ("adam", {"max_iter": 4000, "lr": 0.01})):
        solve = run(method, **options)
        rtol, atol = (1e-2, 1e-3) if method == "adam" else (1e-8, 1e-9)
        torch.testing.assert_close(solve.x, want, rtol=rtol, atol=atol)
        assert solve.converged
        residual = (b - 0.7 * A @ solve.x - 0.2 * solve.x).norm() / b.norm()
        assert solve.residual == pytest.approx(float(residual), abs=1e-12)
        undamped = (b - 0.7 * A @ solve.x).norm() / b.norm()
        assert solve.undamped_residual == pytest.approx(float(undamped), abs=1e-12)


def test_adam_starts_where_it_is_told():
    A, b = _spd(), torch.ones(6, dtype=F64)
    with pytest.warns(ConvergenceWarning):
        start = solve_influence(lambda v: A @ v, b, damping=0.0, method="adam", max_iter=0, init=0.25)
    assert start.x.tolist() == [0.25] * 6


def test_what_does_not_converge_warns_or_raises():
    A, b = torch.diag(torch.logspace(0, 6, 6, dtype=F64)), torch.ones(6, dtype=F64)
    with pytest.warns(ConvergenceWarning, match="residual"):
        solve = solve_influence(lambda v: A @ v, b, damping=0.0, max_iter=2)
    assert not solve.converged
    with pytest.raises(ValueError, match=r"did not converge: relative residual .* raise damping"):
        solve_influence(lambda v: A @ v, b, damping=0.0, max_iter=2, strict=True)
    with pytest.raises(ValueError, match="negative curvature"):
        solve_influence(lambda v: -v, b, damping=0.5, strict=True)
    with pytest.raises(ValueError, match="damping"):
        solve_influence(lambda v: 0 * v, b, damping=0.0, method="direct")


# --- updater --------------------------------------------------------------------------------------------------------


class Line(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.linear = nn.Linear(width, 1).double()

    def forward(self, x):
        return self.linear(x).squeeze(1)


def _line_problem(n=50):
    x = _randn(n, 3, seed=11)
    y = (x.sum(1) + _randn(n, seed=12) > 0.3).double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Line(), x, y


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("hessian", ["hessian", "ggn"])
def test_the_updater_of_a_linear_model_is_the_closed_form(include, scale, hessian):
    model, x, y = _line_problem()
    flipped = (y == 0).nonzero().squeeze(1)[:4]
    new = _randn(20, 3, seed=13), (torch.arange(20) % 2).double()
    closed = logistic_influence_update(
        x,
        y,
        model.linear.weight[0].detach(),
        model.linear.bias.detach(),
        flipped.tolist(),
        *new,
        damping=0.05,
        curvature_scale=scale,
        include_added_in_hessian=include,
    )
    updater = InfluenceUpdater(
        model,
        [(x[:30], y[:30]), (x[30:], y[30:])],
        damping=0.05,
        tol=1e-12,
        curvature_scale=scale,
        include_added_in_hessian=include,
        hessian=hessian,
    )
    update = updater.update([(x[flipped], y[flipped])], [new])
    want = torch.cat([closed.delta_weight, closed.delta_bias.reshape(1)])
    torch.testing.assert_close(update.delta, want, rtol=1e-8, atol=1e-12)
    assert (update.info["n"], update.info["flipped"], update.info["added"]) == (50, 4, 20)


def _least_squares(x, y, l2):
    rows = torch.cat([x, torch.ones(len(x), 1, dtype=F64)], 1)
    return torch.linalg.solve(rows.T @ rows / len(y) + l2 * torch.eye(4, dtype=F64), rows.T @ y / len(y))


def test_a_quadratic_loss_is_updated_to_the_retrained_optimum():
    model, x, y = _line_problem()
    flipped = (y == 0).nonzero().squeeze(1)[:10]
    corrected = y.index_fill(0, flipped, 1.0)
    theta = _least_squares(x, y, 0.01)
    with torch.no_grad():
        model.linear.weight.copy_(theta[:3])
        model.linear.bias.copy_(theta[3:])
    updater = InfluenceUpdater(model, [(x, y)], loss="squared", damping=0.0, l2=0.01, tol=1e-12)
    updater.update([(x[flipped], y[flipped])])
    updater.apply()
    torch.testing.assert_close(_flat(model), _least_squares(x, corrected, 0.01), rtol=1e-9, atol=1e-12)
    assert updater.diagnose()["gradient_norm"] > 1e-3


def test_correcting_for_stationarity_finishes_training():
    # From anywhere: with a quadratic loss one step reaches the minimum of the corrected problem.
    model, x, y = _line_problem()
    flipped = (y == 0).nonzero().squeeze(1)[:5]
    updater = InfluenceUpdater(
        model, [(x, y)], loss="squared", damping=0.0, l2=0.1, tol=1e-12, correct_stationarity=True
    )
    updater.update([(x[flipped], y[flipped])])
    updater.apply()
    want = _least_squares(x, y.index_fill(0, flipped, 1.0), 0.1)
    torch.testing.assert_close(_flat(model), want, rtol=1e-9, atol=1e-12)


def test_unused_embeddings_stay_bit_for_bit(net):
    train, flipped, added = _batch(16, codes=3), _batch(4, seed=9, codes=3), _batch(4, seed=10, codes=4)
    flipped = (*flipped[:2], torch.zeros(4, dtype=F64))
    added[1][0] = 3
    for options in (
        {"correct_stationarity": True},
        {"method": "adam", "max_iter": 50, "tol": 10.0},
        {"method": "direct"},
        {"hessian": "ggn"},
    ):
        before = net.table.weight.detach().clone()
        updater = InfluenceUpdater(net, [train], damping=1.0, l2=0.1, **options)
        updater.update([flipped], [added])
        updater.apply()
        changed = (net.table.weight != before).any(1)
        assert changed.tolist() == [True, True, True, True, False, False]
        updater.revert()
        assert torch.equal(net.table.weight, before)


def test_apply_revert_keep(net):
    train, flipped = _batch(16), (*_batch(4, seed=9)[:2], torch.zeros(4, dtype=F64))
    updater = InfluenceUpdater(net, [train], damping=1.0)
    with pytest.raises(ValueError, match="no update to apply"):
        updater.apply()
    with pytest.raises(ValueError, match="no update is applied"):
        updater.revert()
    net.train()
    update = updater.update([flipped])
    assert net.training
    assert all(p.grad is None for p in net.parameters())
    before = copy.deepcopy(net.state_dict())
    updater.apply()
    torch.testing.assert_close(_flat(net), _flat(_restored(net, before)) + update.delta)
    assert net.frozen.item() == 1
    with pytest.raises(ValueError, match="applied already"):
        updater.apply()
    updater.revert()
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    updater.apply()
    updater.keep()
    second = updater.update([flipped])
    assert not torch.equal(second.delta, update.delta)  # linearised where the model is now
    bad = type(update)(torch.full_like(update.delta, math.nan), {})
    with pytest.raises(ValueError, match="not finite"):
        updater.apply(bad)


def _restored(net, state):
    copied = copy.deepcopy(net)
    copied.load_state_dict(state)
    return copied


def test_nothing_to_update_is_zero(net):
    updater = InfluenceUpdater(net, [_batch()], damping=0.0, correct_stationarity=True)
    update = updater.update([], [])
    assert not update.delta.any()
    assert update.info["converged"]


def test_flips_add_up_to_first_order(net):
    train = _batch(40)
    flips = [(*_batch(3, seed=s)[:2], torch.zeros(3, dtype=F64)) for s in (20, 21)]
    updater = InfluenceUpdater(net, [train], damping=1.0, tol=1e-10)
    together = updater.update(flips).delta
    apart = [updater.update([flip]).delta for flip in flips]
    torch.testing.assert_close(together, apart[0] + apart[1], rtol=1e-6, atol=1e-10)


def test_diagnose_brackets_the_spectrum(net):
    train = _batch(16)
    updater = InfluenceUpdater(net, [train], damping=1.0)
    facts = updater.diagnose(num_steps=200)
    size = len(_flat(net))
    values = torch.linalg.eigvalsh(_dense(lambda v: hessian_vector_product(net, train, v), size))
    assert facts["smallest"] == pytest.approx(float(values[0]), abs=1e-6)
    assert facts["largest"] == pytest.approx(float(values[-1]), rel=1e-6)
    assert facts["gradient_norm"] == pytest.approx(float(_gradient(net, train).norm()))


def test_choosing_a_damping_looks_at_the_score_and_restores(net):
    train, flipped = _batch(16), (*_batch(4, seed=9)[:2], torch.zeros(4, dtype=F64))
    updater = InfluenceUpdater(net, [train], damping=9.0)
    start = _flat(net)
    asked = []

    def score(model):
        asked.append(float((_flat(model) - start).norm()))
        return -abs(asked[-1] - asked[0] * 0.5)

    damping, update = choose_damping(updater, iter([flipped]), None, (1.0, 2.0, 40.0), score)
    assert damping == updater.damping == 2.0
    assert updater.last is update
    assert len(asked) == 3
    assert torch.equal(_flat(net), start)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="negative curvature"):
            choose_damping(updater, [flipped], None, (0.0,), score)
    with pytest.raises(ValueError, match="dampings is empty"):
        choose_damping(updater, [flipped], None, (), score)


BATCH = _batch()
BAD = [
    (lambda m: InfluenceUpdater(m, [BATCH], "hinge"), "unknown loss 'hinge'"),
    (lambda m: InfluenceUpdater(m, [BATCH], method="lissa"), "unknown method 'lissa'"),
    (lambda m: InfluenceUpdater(m, [BATCH], hessian="fisher"), "unknown hessian 'fisher'"),
    (lambda m: InfluenceUpdater(m, [BATCH], damping=-1.0), "damping must be a finite number >= 0"),
    (lambda m: InfluenceUpdater(m, [BATCH], l2=math.inf), "l2 must be a finite number >= 0"),
    (lambda m: InfluenceUpdater(m, [BATCH], curvature_scale=0.0), "curvature_scale must be a positive"),
    (lambda m: InfluenceUpdater(nn.Identity(), [BATCH]), "no parameter of the model"),
    (lambda m: InfluenceUpdater(m, []).update([BATCH]), "train_loader yields no rows"),
    (lambda m: InfluenceUpdater(m, [BATCH]).update([BATCH]), "already positive"),
    (lambda m: influence_rhs(m, [], [(*BATCH[:2], BATCH[2] + 1)], 3), "labels must hold 0 and 1 only"),
    (lambda m: influence_rhs(m, [], [BATCH], 0), "n must be >= 1, got 0"),
    (lambda m: influence_rhs(nn.Linear(2, 2).double(), [], [(BATCH[0], BATCH[2])], 3), "one logit per row"),
    (lambda m: hessian_vector_product(m, BATCH, torch.ones(3)), r"v must have the shape \(\d+,\)"),
    (lambda m: hessian_vector_product(m, BATCH, torch.ones(3), kind="fisher"), "unknown kind 'fisher'"),
    (lambda m: solve_influence(lambda v: v, torch.ones(2), damping=0.0, method="sgd"), "unknown method 'sgd'"),
    (lambda m: solve_influence(lambda v: v, torch.ones(2), damping=-1.0), "damping"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=range(len(BAD)))
def test_bad_arguments(net, call, message):
    with pytest.raises(ValueError, match=message):
        call(net)


# --- backbones ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["logistic", "mlp", "deepfm", "autoint", "dcnv2"])
def test_every_backbone_has_curvature_and_an_update(name):
    data = make_delayed_clicks(per_day=20, days=30, seed=1, num_numeric=2, num_categorical=2, cardinality=8)
    parts = data.window(15, 14, 10)
    model = build_model(name, 2, data.cardinalities, seed=4).double()
    if name == "logistic":
        nn.init.normal_(model.first.numeric, generator=torch.Generator().manual_seed(0))
    batch = next(iter(parts["train"].loader(16)))
    v = _randn(len(_flat(model)), seed=5)
    got = hessian_vector_product(model, batch, v)
    eps = 1e-6
    batch = tuple(batch)
    batch = (*batch[:2], batch[2].double())
    numeric = (_gradient(_move(model, eps * v), batch) - _gradient(_move(model, -eps * v), batch)) / (2 * eps)
    assert (got - numeric).norm() < 1e-3 * numeric.norm() + 1e-6  # kinks of the leaky ReLU
    updater = InfluenceUpdater(model, parts["train"].loader(), damping=1.0, hessian="ggn", correct_stationarity=True)
    # The model isn't trained: with its gradient the update is a step down the corrected loss.
    corrected = next(iter(parts["train"].corrected(parts["flipped"]).loader(10_000)))
    corrected = (*corrected[:2], corrected[2].double())
    before = _loss(model, corrected)
    update = updater.update(parts["flipped"].loader(7))
    torch.testing.assert_close(updater.update(parts["flipped"]).delta, update.delta)
    updater.apply()
    assert _loss(model, corrected) < before


# --- the comparison of the paper, on generated clicks ---------------------------------------------------------------


def _fitted(data: DelayedClicks, clicks: Clicks, l2):
    """The logistic backbone at the minimum of mean cross-entropy plus l2 / 2 |theta|^2, by scikit-learn."""
    model = build_model("logistic", data.x_num.shape[1], data.cardinalities).double()
    n, fields = clicks.x_cat.shape
    columns = (clicks.x_cat + model.first.offsets).flatten().numpy()
    codes = csr_matrix(
        (np.ones(n * fields), columns, np.arange(0, n * fields + 1, fields)), (n, sum(data.cardinalities))
    )
    rows = hstack([codes, clicks.x_num.double().numpy(), np.ones((n, 1))]).tocsr()
    solver = LogisticRegression(C=1 / (l2 * n), solver="newton-cg", fit_intercept=False, tol=1e-9, max_iter=500)
    theta = torch.from_numpy(solver.fit(rows, clicks.label.numpy()).coef_[0])
    parts = theta.split([sum(data.cardinalities), data.x_num.shape[1], 1])
    with torch.no_grad():
        for name, part in zip(("table.weight", "numeric", "bias"), parts, strict=True):
            p = model.first.get_parameter(name)
            p.copy_(part.reshape(p.shape))
    return model


def _comparison(data: DelayedClicks, l2=1e-4):
    parts = data.window(15, 14, 10, 1)
    stale, renewed = (
        _fitted(data, clicks, l2) for clicks in (parts["train"], parts["train"].corrected(parts["flipped"]))
    )
    metrics = {"vanilla": stale, "retrain": renewed}
    test = parts["test"]
    out = {name: cvr_metrics(test.label, predict(model, test)) for name, model in metrics.items()}
    gap = (_flat(renewed) - _flat(stale)).norm()
    for name, scale in (("if", 1.0), ("halved", 0.5)):
        updater = InfluenceUpdater(
            stale, parts["train"].loader(), damping=0.0, l2=l2, hessian="ggn", curvature_scale=scale, cache=True
        )
        updater.update(parts["flipped"].loader())
        updater.apply()
        out[name] = cvr_metrics(test.label, predict(stale, test))
        out[name]["distance"] = float((_flat(renewed) - _flat(stale)).norm() / gap)
        updater.revert()
    for name in ("if", "halved"):
        for metric in ("auc", "log_loss"):
            out[name][f"ri_{metric}"] = relative_improvement(
                out[name][metric], out["vanilla"][metric], out["retrain"][metric]
            )
    return out


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_update_closes_the_gap_to_retraining(seed):
    out = _comparison(make_delayed_clicks(seed=seed))
    assert out["retrain"]["auc"] - out["vanilla"]["auc"] > 0.003
    assert out["if"]["ri_auc"] >= 80
    assert out["if"]["ri_log_loss"] >= 90
    assert out["if"]["distance"] < 0.3
    assert out["halved"]["ri_log_loss"] < out["if"]["ri_log_loss"] - 15
    assert out["halved"]["distance"] > 1


def test_the_update_closes_the_gap_on_fewer_clicks():
    out = _comparison(make_delayed_clicks(per_day=600, num_categorical=3, seed=0), l2=1e-3)
    assert out["if"]["ri_log_loss"] >= 80
    assert out["if"]["distance"] < 0.4
    assert out["halved"]["ri_log_loss"] < out["if"]["ri_log_loss"]
    assert out["halved"]["distance"] > 0.8
