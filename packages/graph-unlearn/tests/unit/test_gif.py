from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch_geometric.data import Data
from torch_geometric.nn import APPNP, GCNConv, SGConv
from torch_geometric.nn import GAT as PyGGAT
from torch_geometric.nn import GCN as PyGGCN
from torch_geometric.nn import GIN as PyGGIN

import ihvp
from graph_unlearn.data import load_graph, synthetic_graph, training_graph
from graph_unlearn.gif import (
    DampingWarning,
    UnstableStepError,
    affected_nodes,
    auto_damping,
    count_layers,
    gif_delta,
    gif_rhs,
    influence_masks,
    unlearn,
)
from graph_unlearn.nets import GCN, MODELS, SGC, build_model, two_layer_logits
from graph_unlearn.requests import EdgeRequest, FeatureRequest, NodeRequest, apply_request, draw_request
from graph_unlearn.training import TrainConfig, accuracy, retrain, train

F64 = torch.float64
TASKS = ("node", "edge", "feature")
PUBLISHED = {"solver": "neumann", "scale": 500.0, "num_iter": 100, "damping": 0.0}


def _data(n=80, f=8, classes=3, seed=0, **options):
    data = synthetic_graph(n, f, classes, seed=seed, **options)
    data.x = data.x.double()
    return data


def _trained(data, name="gcn", epochs=30, seed=0, **options):
    return retrain(
        lambda: build_model(name, data.x.shape[1], data.num_classes, **options).double(),
        data,
        data.train_mask,
        TrainConfig(epochs=epochs, lr=0.02, seed=seed),
    )


def _request(task, data, ratio=0.1, seed=0):
    return draw_request(task, data, ratio, torch.Generator().manual_seed(seed))


def _same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def _flat(delta):
    return torch.cat([leaf.flatten() for leaf in delta.values()])


def _quiet(run):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ihvp.ConvergenceWarning)
        warnings.simplefilter("ignore", DampingWarning)
        return run()


# --- the right-hand side ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gif", "if"])
@pytest.mark.parametrize("task", TASKS)
def test_right_hand_side_node_by_node(task, method):
    """b against gradients taken one node at a time, the masks written out as the paper has them."""
    data = _data(40)
    model, request = _trained(data), _request(task, data)
    after = apply_request(request, data)
    named = request.edges.flatten().unique() if task == "edge" else request.nodes
    reached = affected_nodes(task, data.edge_index, named, 40, 2).influenced
    if method == "if":
        before_nodes, after_nodes = named, named[:0] if task == "node" else named
    elif task == "node":
        before_nodes, after_nodes = torch.cat([reached, named]), reached
    else:
        before_nodes = after_nodes = torch.cat([reached, named]).unique()
    expected = [torch.zeros_like(p) for p in model.parameters()]
    for sign, graph, nodes in ((1, data, before_nodes), (-1, after, after_nodes)):
        for i in nodes.tolist():
            if data.train_mask[i]:
                loss = F.nll_loss(model(graph.x, graph.edge_index)[i : i + 1], data.y[i : i + 1])
                for leaf, g in zip(expected, torch.autograd.grad(loss, list(model.parameters())), strict=True):
                    leaf.add_(g, alpha=sign)
    result = unlearn(model, data, request, method=method, solver="direct", damping=50.0)
    hessian, params = _hessian(model, data)
    got = _flat(hessian(result.solve.x)) + 50.0 * _flat(result.solve.x)
    wanted = torch.cat([leaf.flatten() for leaf in expected])
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-9)
    assert result.rhs_norm == pytest.approx(float(wanted.norm()))
    assert params.keys() == result.delta.keys()


def _hessian(model, data, l2=0.0):
    nodes = data.train_mask.nonzero().flatten()

    def loss(m):
        return F.cross_entropy(m(data.x, data.edge_index)[nodes], data.y[nodes], reduction="sum")

    loss_fn, params = ihvp.module_loss(model, loss)
    return ihvp.make_hvp(loss_fn, params, l2=l2), params


def test_right_hand_sides_of_distant_nodes_add_up():
    n = 60  # a ring: the neighbourhoods of 5 and 35 share nothing
    ring = torch.stack([torch.arange(n), (torch.arange(n) + 1) % n])
    data = _data(n)
    data.edge_index = torch.cat([ring, ring.flip(0)], 1)
    model = _trained(data, epochs=5)

    def b(nodes):
        request = NodeRequest(torch.tensor(nodes))
        after, touched = (
            apply_request(request, data),
            affected_nodes("node", data.edge_index, request.nodes, n),
        )
        masks = influence_masks("node", touched, request.nodes, n)
        weights = [p.detach() for p in model.parameters()]
        return gif_rhs(lambda w, x, e: two_layer_logits(w, x, e), weights, data, after, *masks)

    for both, left, right in zip(b([5, 35]), b([5]), b([35]), strict=True):
        torch.testing.assert_close(both, left + right)
    assert any(
        not torch.allclose(x, y) for x, y in zip(b([5, 6]), map(sum, zip(b([5]), b([6]), strict=True)), strict=True)
    )


def test_gif_is_the_classical_function_for_an_isolated_node():
    data = _data(40)
    node = int(data.train_mask.nonzero()[3])
    data.edge_index = data.edge_index[:, (data.edge_index != node).all(0)]
    model = _trained(data)
    request = NodeRequest(torch.tensor([node]))
    gif, classical = (unlearn(model, data, request, method=m, damping=20.0) for m in ("gif", "if"))
    assert gif.affected.influenced.numel() == 0
    assert torch.equal(_flat(gif.delta), _flat(classical.delta))
    # Without a self loop the row of an isolated node is constant: its loss has no gradient.
    assert gif.rhs_norm == 0.0
    looped = _trained(data, self_loops=True)
    gif, classical = (unlearn(looped, data, request, method=m, damping=20.0) for m in ("gif", "if"))
    assert torch.equal(_flat(gif.delta), _flat(classical.delta))
    assert gif.rhs_norm > 0


def test_one_layer_closed_form_in_two_classes():
    """Theorem 7 leaves out the class cross terms; with one weight vector (two classes, tied) it is the Newton step."""

    class Binary(nn.Module):
        num_layers = 1

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(4, dtype=F64))

        def forward(self, x, edge_index):
            score = torch.zeros_like(x).index_add(0, edge_index[1], x[edge_index[0]]) @ self.w
            return torch.stack([torch.zeros_like(score), score], 1)

    data = _data(30, 4, 2)
    model = train(Binary(), data, TrainConfig(epochs=50))
    request = _request("node", data, 0.1)
    result = unlearn(model, data, request, damping=1.0, solver="direct")
    after = result.data_after

    def rows(graph):
        return torch.zeros_like(graph.x).index_add(0, graph.edge_index[1], graph.x[graph.edge_index[0]])

    h, h_after = rows(data), rows(after)
    p, p_after = (h @ model.w).sigmoid(), (h_after @ model.w).sigmoid()
    train_rows, touched = data.train_mask, torch.zeros(30, dtype=torch.bool)
    touched[result.affected.influenced] = True
    touched &= data.train_mask
    removed = torch.zeros(30, dtype=torch.bool)
    removed[request.nodes] = True
    e, e_after = p - data.y, p_after - data.y
    b = (e[:, None] * h)[touched | removed].sum(0) - (e_after[:, None] * h_after)[touched].sum(0)
    hessian = (h * (p * (1 - p))[:, None])[train_rows].T @ h[train_rows] + torch.eye(4, dtype=F64)
    torch.testing.assert_close(result.solve.x["w"], torch.linalg.solve(hessian, b).detach())


# --- the functional reference ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gcn", "sgc"])
@pytest.mark.parametrize("task", TASKS)
def test_unlearn_reproduces_the_published_recursion(task, name):
    data = _data(60)
    model, request = _trained(data, name), _request(task, data)
    result = _quiet(lambda: unlearn(model, data, request, max_loss_rise=None, **{**PUBLISHED, "scale": 100.0}))
    after, named = result.data_after, request.edges.flatten() if task == "edge" else request.nodes
    before_mask, after_mask = influence_masks(task, result.affected, named, 60)
    reference = gif_delta(
        [p.detach() for p in model.parameters()],
        data.x,
        data.edge_index,
        after.x,
        after.edge_index,
        data.y,
        data.train_mask,
        before_mask & data.train_mask,
        after_mask & data.train_mask,
        model=name,
        scale=100.0,
    )
    for ours, theirs in zip(result.delta.values(), reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert result.solve.num_hvp == 101


def test_the_slip_of_the_program_changes_the_result():
    weights = [torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(i)) for i in range(1)]
    weights.append(torch.randn(2, 4, dtype=F64, generator=torch.Generator().manual_seed(5)))
    data = _data(20, 3, 2)
    mask = data.train_mask
    args = (weights, data.x, data.edge_index, data.x * 0.5, data.edge_index, data.y, mask, mask, mask)
    clean, slip = gif_delta(*args, num_iter=3), gif_delta(*args, num_iter=3, detach_rhs=False)
    assert not torch.allclose(clean[0], slip[0])
    assert torch.equal(gif_delta(*args, num_iter=0)[0], gif_delta(*args, num_iter=0, detach_rhs=False)[0])
    for wrong in ({"scale": 0.0}, {"damping": -1.0}, {"num_iter": -1}, {"method": "gf"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            gif_delta(*args, **wrong)


# --- solvers, damping, curvature --------------------------------------------------------------------------------------


def test_solvers_agree_and_report_both_residuals():
    data = _data(60)
    model, request = _trained(data), _request("edge", data)
    exact = unlearn(model, data, request, solver="direct", damping=10.0)
    assert exact.solve.relative_residual < 1e-9
    assert exact.solve.undamped_relative_residual > 0.05
    b_norm = exact.rhs_norm
    hessian, _ = _hessian(model, data)
    options = {
        "cg": {"rtol": 1e-10},
        "neumann": {"num_iter": 300},
        "sgd": {"num_iter": 300},
        "lanczos": {},
        "lissa": {"scale": 100.0, "depth": 300},
    }
    for solver, args in options.items():
        found = _quiet(
            lambda solver=solver, args=args: unlearn(model, data, request, solver=solver, damping=10.0, **args)
        )
        gap = (_flat(found.delta) - _flat(exact.delta)).norm() / _flat(exact.delta).norm()
        assert gap < (0.2 if solver == "lanczos" else 1e-3), solver
        assert found.damping == 10.0
        x = found.solve.x
        left = _exact_b(hessian, exact) - _flat(hessian(x))
        assert found.solve.undamped_relative_residual == pytest.approx(float(left.norm()) / b_norm, rel=1e-6)


def _exact_b(hessian, exact):
    return _flat(hessian(exact.solve.x)) + exact.damping * _flat(exact.solve.x)


def test_l2_and_hessian_after_enter_the_system():
    data = _data(60)
    model, request = _trained(data), _request("node", data)
    after = apply_request(request, data)
    for which, graph in (("before", data), ("after", after)):
        result = unlearn(model, data, request, hessian=which, l2=7.0, damping=3.0, solver="direct")
        hessian, _ = _hessian(model, graph, l2=7.0)
        plain = unlearn(model, data, request, damping=30.0, solver="direct")
        b = _exact_b(_hessian(model, data)[0], plain)
        torch.testing.assert_close(
            _flat(hessian(result.solve.x)) + 3.0 * _flat(result.solve.x), b, rtol=1e-7, atol=1e-8
        )


def _saddle():
    """A model at a saddle: the loss curves down along one weight."""

    class Saddle(nn.Module):
        num_layers = 1

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.3, 0.2], dtype=F64))

        def forward(self, x, edge_index):
            return x * self.w

    data = Data(
        x=torch.ones(6, 2, dtype=F64),
        edge_index=torch.tensor([[0, 1], [1, 0]]),
        y=torch.zeros(6, dtype=torch.long),
        train_mask=torch.ones(6, dtype=torch.bool),
    )

    def loss(out, y):
        return (out[:, 0] ** 2 - 0.5 * out[:, 1] ** 2 + out[:, 1]).sum()

    return Saddle(), data, NodeRequest(torch.tensor([2])), loss


def test_negative_curvature_is_refused_raised_or_said():
    model, data, request, loss = _saddle()
    before = copy.deepcopy(model)
    options = {"loss": loss, "max_loss_rise": None}
    for damping in (0.0, 5.0):
        with pytest.raises(UnstableStepError, match="negative curvature; nothing was applied: raise damping"):
            unlearn(model, data, request, **options, damping=damping)
    with pytest.raises(UnstableStepError, match="negative curvature"):
        unlearn(model, data, request, **options, damping=0.0, solver="direct")
    with pytest.raises(UnstableStepError, match="negative curvature"):  # only along its solution
        unlearn(model, data, request, **options, solver="neumann", scale=100.0, num_iter=20, damping=0.0)
    assert unlearn(model, data, request, **options, damping=7.0).damping == 7.0
    with pytest.warns(DampingWarning, match="negative curvature at damping 5: it was raised to"):
        raised = unlearn(model, data, request, **options, damping=5.0, on_negative_curvature="increase")
    assert raised.damping > 6.0
    assert raised.damping_increases == 1
    assert raised.solve.converged
    auto = unlearn(model, data, request, **options, damping="auto")
    assert auto.damping == pytest.approx(12.0, rel=1e-3)  # twice the curvature of -6
    with pytest.warns(DampingWarning, match="applied all the same"):
        applied = unlearn(model, data, request, **options, damping=0.0, on_negative_curvature="warn")
    assert applied.solve.negative_curvature
    assert _same(model, before)


def test_divergence_is_refused():
    data = _data(60)
    model, request = _trained(data), _request("edge", data)
    with pytest.raises(UnstableStepError, match="raise scale"):
        unlearn(model, data, request, solver="neumann", scale=0.5, num_iter=2000, damping=0.0)


def test_backtracking_halves_until_the_retained_loss_is_kept():
    model, data, request, _ = _saddle()
    model.w.data = torch.tensor([1.0, 1.0], dtype=F64)
    data.x[2] = torch.tensor([2.0, 1.0], dtype=F64)  # the deleted node fought the others

    def loss(out, y):  # tiny curvature, steep beyond: the quadratic model is wrong by far
        return (0.01 * (out - 1) ** 2 + (out - 1) ** 4).sum()

    options = {"loss": loss, "damping": 0.1}
    whole = unlearn(model, data, request, max_loss_rise=None, hessian="after", **options)
    assert math.isnan(whole.loss_after)
    with pytest.warns(DampingWarning, match="of it was applied"):
        halved = unlearn(model, data, request, max_loss_rise=0.1, hessian="after", **options)
    assert halved.backtracked
    assert 0 < halved.step_factor < 1
    torch.testing.assert_close(halved.delta["w"], halved.step_factor * whole.delta["w"])
    assert halved.loss_after <= halved.loss_before + 0.1
    doubled = copy.deepcopy(model)
    doubled.w.data += 2 * halved.delta["w"]
    kept = loss(
        doubled.requires_grad_(False)(result_x := halved.data_after.x[halved.data_after.train_mask], None), None
    ) / len(result_x)
    assert float(kept) > halved.loss_before + 0.1  # the largest power of a half
    assert halved.step_norm == pytest.approx(float(halved.delta["w"].norm()))


def test_auto_damping_is_twice_the_most_negative_curvature():
    matrix = torch.diag(torch.tensor([-3.0, 0.5, 100.0], dtype=F64))
    assert auto_damping(matrix, torch.zeros(3, dtype=F64)) == pytest.approx(6.001)
    assert auto_damping(matrix.abs(), torch.zeros(3, dtype=F64)) == pytest.approx(1e-3)
    assert auto_damping(0 * matrix, torch.zeros(3, dtype=F64)) == 0.0


# --- invariants -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_",
    [
        NodeRequest(torch.zeros(0, dtype=torch.long)),
        EdgeRequest(torch.zeros(2, 0, dtype=torch.long)),
        FeatureRequest(torch.zeros(0, dtype=torch.long)),
        FeatureRequest(torch.tensor([1]), torch.zeros(0, dtype=torch.long)),
    ],
    ids=["node", "edge", "feature", "columns"],
)
def test_an_empty_request_changes_nothing_and_solves_nothing(request_, monkeypatch):
    data = _data(40)
    model = _trained(data)
    monkeypatch.setattr(ihvp, "solve", lambda *_a, **_k: pytest.fail("solved"))
    result = unlearn(model, data, request_)
    assert result.model is not model
    assert _same(model, result.model)
    assert not any(leaf.any() for leaf in result.delta.values())
    assert result.solve.num_hvp == 0
    assert torch.equal(result.data_after.edge_index, data.edge_index)


def test_an_isolated_test_node_changes_nothing():
    data = _data(40)
    node = int(data.test_mask.nonzero()[0])
    data.edge_index = data.edge_index[:, (data.edge_index != node).all(0)]
    model = _trained(data, self_loops=True)
    result = unlearn(model, data, NodeRequest(torch.tensor([node])))
    assert _same(model, result.model)
    assert result.solve.num_hvp == 0
    assert not result.data_after.test_mask[node]


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("task", TASKS)
def test_input_is_untouched_and_labels_of_test_nodes_dont_count(task, name):
    data = _data(60)
    model = _trained(data, name, epochs=10)
    model.train()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before, state = copy.deepcopy(model), torch.get_rng_state()
    kept = {key: data[key].clone() for key in ("x", "edge_index", "y", "train_mask")}
    request = _request(task, data)
    first = _quiet(lambda: unlearn(model, data, request, on_negative_curvature="increase", damping="auto"))
    assert _same(model, before)
    assert model.training
    assert first.model.training
    assert torch.equal(next(model.parameters()).grad, torch.ones_like(next(model.parameters())))
    assert next(first.model.parameters()).grad is None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(data[key], value) for key, value in kept.items())
    assert not _same(model, first.model)
    for p, q, d in zip(model.parameters(), first.model.parameters(), first.delta.values(), strict=True):
        torch.testing.assert_close(p + d, q)
    data.y = torch.where(data.train_mask, data.y, (data.y + 1) % 3)
    second = _quiet(lambda: unlearn(model, data, request, on_negative_curvature="increase", damping="auto"))
    assert torch.equal(_flat(first.delta), _flat(second.delta))


def test_test_labels_enter_only_with_a_warning():
    data = _data(60)
    model, request = _trained(data), _request("edge", data)
    closed = unlearn(model, data, request)
    with pytest.warns(UserWarning, match="labels of [0-9]+ nodes outside train_mask"):
        leaky = unlearn(model, data, request, restrict_to_train=False)
    assert not torch.allclose(_flat(closed.delta), _flat(leaky.delta))


@given(seed=st.integers(0, 50), task=st.sampled_from(TASKS), ratio=st.floats(0.02, 0.9))
@settings(derandomize=True, deadline=None, max_examples=15)
def test_a_heavily_damped_step_is_the_gradient_over_the_damping(seed, task, ratio):
    data = _data(30, seed=seed)
    torch.manual_seed(seed)
    model, request = GCN(8, 3).double(), _request(task, data, ratio, seed)
    result = unlearn(model, data, request, damping=1e8, rtol=1e-12)
    assert result.step_norm == pytest.approx(result.rhs_norm / 1e8, rel=1e-3, abs=1e-20)


def test_all_training_nodes_deleted():
    data = _data(30)
    model, request = _trained(data), NodeRequest(data.train_mask.nonzero().flatten())
    result = _quiet(lambda: unlearn(model, data, request, damping="auto"))
    assert not result.data_after.train_mask.any()
    assert result.rhs_norm > 0
    with pytest.raises(ValueError, match="train_mask: no training node remains"):
        unlearn(model, data, request, hessian="after")


def test_a_graph_without_edges_and_permuted_columns():
    data = _data(30)
    data.edge_index = torch.zeros(2, 0, dtype=torch.long)
    model = _trained(data, "gat", epochs=5)
    result = unlearn(model, data, NodeRequest(data.train_mask.nonzero().flatten()[:2]), damping="auto")
    assert result.affected.influenced.numel() == 0
    assert result.step_norm > 0


def test_the_order_of_edges_and_of_the_request_is_irrelevant():
    data = _data(50)
    model, request = _trained(data), _request("edge", data)
    first = unlearn(model, data, request, rtol=1e-10)
    turned = data.__copy__()
    turned.edge_index = data.edge_index[:, torch.randperm(data.edge_index.shape[1])]
    second = unlearn(model, turned, EdgeRequest(request.edges.flip(0).flip(1)), rtol=1e-10)
    torch.testing.assert_close(_flat(first.delta), _flat(second.delta), rtol=1e-7, atol=1e-10)


# --- other people's models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [PyGGCN, PyGGAT, PyGGIN])
def test_pygs_own_models(kind):
    data = _data(60)
    torch.manual_seed(0)
    options = {"norm": "batch_norm"} if kind is PyGGIN else {}
    model = train(kind(8, 16, 2, 3, dropout=0.5, **options).double(), data, TrainConfig(epochs=20, lr=0.01))
    result = _quiet(lambda: unlearn(model, data, _request("node", data), damping="auto"))
    assert result.solve.converged
    assert result.solve.relative_residual < 1e-3
    assert 0 < result.step_norm < 10
    if kind is PyGGIN:  # buffers are not parameters
        for name, value in model.named_buffers():
            assert torch.equal(value, dict(result.model.named_buffers())[name])


def test_logits_and_log_probabilities_are_one():
    data = _data(50)
    model = _trained(data)

    class Logits(nn.Module):
        num_layers = 2

        def __init__(self):
            super().__init__()
            self.inner = copy.deepcopy(model)

        def forward(self, x, edge_index):
            return self.inner(x, edge_index) + x.sum(1, keepdim=True)

    request = _request("edge", data)
    delta = unlearn(model, data, request, rtol=1e-10).delta
    other = unlearn(Logits(), data, request, rtol=1e-10).delta
    torch.testing.assert_close(_flat(delta), _flat(other), rtol=1e-7, atol=1e-10)


def test_a_forward_of_ones_own_and_frozen_parameters():
    data = _data(50)
    model, request = _trained(data), _request("edge", data)

    def forward(params, x, edge_index):
        return two_layer_logits([params["lin1.weight"], params["lin2.weight"]], x, edge_index)

    mine = unlearn(model, data, request, forward=forward, rtol=1e-10)
    torch.testing.assert_close(_flat(mine.delta), _flat(unlearn(model, data, request, rtol=1e-10).delta))
    model.lin2.weight.requires_grad_(False)
    frozen = unlearn(model, data, request)
    assert list(frozen.delta) == ["lin1.weight"]
    assert torch.equal(frozen.model.lin2.weight, model.lin2.weight)


def test_layers_are_counted():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = GCNConv(3, 3), APPNP(K=4, alpha=0.1)

    assert count_layers(Mixed()) == 5
    assert count_layers(SGConv(3, 2, K=3)) == 3
    assert count_layers(PyGGCN(3, 4, 5, 2)) == 5
    with pytest.raises(ValueError, match="num_layers must be given"):
        count_layers(nn.Linear(2, 2))


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "name"), [("node", "gcn"), ("edge", "gcn"), ("feature", "gcn"), ("edge", "gat"), ("node", "pyg")]
)
def test_exact_batches_give_the_same_step(task, name):
    data = _data(90, num_edges=100)
    torch.manual_seed(0)
    if name == "pyg":
        model = train(PyGGCN(8, 6, 3, 3).double(), data, TrainConfig(epochs=5))
    else:
        model = _trained(data, name, epochs=5)
    request = _request(task, data)
    whole = unlearn(model, data, request, damping=200.0, rtol=1e-10)
    for size in (23, 1000):
        parts = unlearn(model, data, request, damping=200.0, rtol=1e-10, batch_size=size)
        torch.testing.assert_close(_flat(parts.delta), _flat(whole.delta), rtol=1e-6, atol=1e-11)
        assert parts.solve.undamped_relative_residual == pytest.approx(whole.solve.undamped_relative_residual, rel=1e-6)


def test_fanout_estimates():
    data = _data(200, num_edges=1500)
    model, request = _trained(data), _request("edge", data)
    whole = unlearn(model, data, request, damping=50.0)
    near = unlearn(model, data, request, damping=50.0, batch_size=64, fanout=8)
    same = unlearn(model, data, request, damping=50.0, batch_size=64, fanout=8)
    cosine = F.cosine_similarity(_flat(near.delta), _flat(whole.delta), dim=0)
    assert 0.3 < cosine < 0.9999
    assert torch.equal(_flat(near.delta), _flat(same.delta))


def test_random_batches_with_lissa():
    data = _data(90)
    model, request = _trained(data), _request("edge", data)
    whole = unlearn(model, data, request, damping=50.0)
    found = _quiet(
        lambda: unlearn(
            model, data, request, solver="lissa", damping=50.0, scale=400.0, depth=80, repeats=2, batch_size=30
        )
    )
    assert F.cosine_similarity(_flat(found.delta), _flat(whole.delta), dim=0) > 0.95


class _Loader:
    """Batches as NeighborLoader yields them, of all neighbours or of a random half."""

    def __init__(self, data, size, *, half=False, stale=False):
        from graph_unlearn.data import Neighborhoods

        self.data, self.size, self.half, self.stale = data, size, half, stale
        self.cut = Neighborhoods(data, 2)
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        if self.stale:
            torch.manual_seed(self.passes)
        for ids in torch.split(self.data.train_mask.nonzero().flatten(), self.size):
            batch = self.cut.batch(ids)
            if self.half or self.stale:
                keep = torch.rand(batch.edge_index.shape[1]) < 0.5
                batch.edge_index = batch.edge_index[:, keep]
                used = torch.cat([torch.arange(batch.batch_size), batch.edge_index.flatten()]).unique()
                place = torch.full((len(batch.n_id),), -1)
                place[used] = torch.arange(len(used))
                batch = Data(
                    x=batch.x[used],
                    y=batch.y[used],
                    n_id=batch.n_id[used],
                    edge_index=place[batch.edge_index],
                    batch_size=batch.batch_size,
                )
            yield batch


def test_a_loader_of_batches():
    data = _data(90)
    model, request = _trained(data), _request("edge", data)
    whole = unlearn(model, data, request, damping=50.0, rtol=1e-10)
    exact = unlearn(model, data, request, damping=50.0, rtol=1e-10, loader=_Loader(data, 20))
    torch.testing.assert_close(_flat(exact.delta), _flat(whole.delta), rtol=1e-6, atol=1e-10)
    state = torch.get_rng_state()
    sampled = unlearn(model, data, request, damping=50.0, loader=_Loader(data, 20, half=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert sampled.solve.converged  # the same sample in every pass: a fixed matrix
    assert not torch.allclose(_flat(sampled.delta), _flat(whole.delta), rtol=1e-3)
    with pytest.raises(ValueError, match="same batches in every pass"):
        unlearn(model, data, request, loader=_Loader(data, 20, stale=True))
    few = data.__copy__()
    few.train_mask = data.train_mask & (torch.arange(90) < 50)
    with pytest.raises(ValueError, match="every training node once"):
        unlearn(model, data, request, loader=_Loader(few, 20))
    with pytest.raises(ValueError, match="n_id and batch_size"):
        unlearn(model, data, request, loader=[data])
    with pytest.raises(ValueError, match="batch_size"):
        unlearn(model, data, request, loader=_Loader(data, 20), solver="sgd")


def test_pygs_neighbor_loader():
    pytest.importorskip("torch_sparse", reason="NeighborLoader needs pyg-lib or torch-sparse")
    from torch_geometric.loader import NeighborLoader

    data = _data(90)
    model, request = _trained(data), _request("edge", data)
    loader = NeighborLoader(data, [-1, -1, -1], input_nodes=data.train_mask, batch_size=30)
    whole = unlearn(model, data, request, damping=50.0, rtol=1e-10)
    parts = unlearn(model, data, request, damping=50.0, rtol=1e-10, loader=loader)
    torch.testing.assert_close(_flat(parts.delta), _flat(whole.delta), rtol=1e-6, atol=1e-10)


# --- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gid"}, "did you mean"),
        ({"solver": "cgs"}, "did you mean 'cg'"),
        ({"damping": -1.0}, "damping"),
        ({"damping": "automatic"}, "'auto'"),
        ({"damping": math.nan}, "damping must be a finite"),
        ({"hessian": "later"}, "hessian"),
        ({"on_negative_curvature": "ignore"}, "on_negative_curvature"),
        ({"l2": -1.0}, "l2"),
        ({"max_loss_rise": -0.1}, "max_loss_rise"),
        ({"retained_sample": 0}, "retained_sample"),
        ({"batch_size": 0}, "batch_size must"),
        ({"fanout": 3}, "fanout needs batch_size"),
        ({"num_layers": 0}, "num_layers"),
        ({"request": NodeRequest(torch.tensor([99]))}, "out of range"),
        ({"request": EdgeRequest(torch.tensor([[0], [0]]))}, "edge not in graph"),
        ({"request": torch.tensor([1])}, "NodeRequest"),
        ({"train_mask": None}, "train_mask"),
        ({"train_mask": torch.zeros(40, dtype=torch.bool)}, "train_mask selects no node"),
        ({"nan": True}, "finite"),
        ({"one_way": True}, "undirected"),
        ({"y": torch.full((40,), 3)}, "y holds class 3"),
        ({"weight": math.inf}, "gradient of the loss is not finite"),
        ({"forward": lambda params, x, edge_index: x[0]}, "scores of shape"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_input(options, message):
    data, model = _data(40), _trained(_data(40), epochs=2)
    options = dict(options)
    request = options.pop("request", NodeRequest(data.train_mask.nonzero().flatten()[:3]))
    if options.pop("nan", False):
        data.x[3, 1] = math.nan
    if options.pop("one_way", False):
        data.edge_index = data.edge_index[:, 1:]
    if "weight" in options:
        model.lin2.weight.data[0, 0] = options.pop("weight")
    for name in ("train_mask", "y"):
        if name in options:
            data[name] = options.pop(name)
    with pytest.raises(ValueError, match=message):
        unlearn(model, data, request, **options)


def test_a_directed_graph():
    data = _data(40)
    model = _trained(data)
    data.edge_index = data.edge_index[:, data.edge_index[0] < data.edge_index[1]]
    edge = data.edge_index[:, :1]
    result = unlearn(model, data, EdgeRequest(edge), directed=True, damping=50.0)
    assert result.data_after.edge_index.shape[1] == data.edge_index.shape[1] - 1
    with pytest.raises(ValueError, match="edge not in graph"):
        unlearn(model, data, EdgeRequest(edge.flip(0)), directed=True)


# --- real data -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cora(data_root):
    data = load_graph("cora", data_root)
    data.x = data.x.to_sparse()
    graph = training_graph(data)
    model = retrain(lambda: GCN(data.x.shape[1], 7), graph, graph.train_mask)
    return data, graph, model


@pytest.mark.parametrize("task", TASKS)
def test_gcn_on_cora(cora, task):
    """Residuals as the card measured them; accuracy is a check of sanity only, no update passes it too."""
    data, graph, model = cora
    request = _request(task, graph, 0.05)
    after = apply_request(request, data)
    unchanged = accuracy(model, after, data.test_mask)
    default = unlearn(model, graph, request)
    assert default.solve.relative_residual < 1e-3
    assert default.solve.num_hvp <= 13
    assert 0.6 < default.solve.undamped_relative_residual < 0.9
    assert default.step_factor == 1.0
    assert abs(accuracy(default.model, after, data.test_mask) - unchanged) < 0.02
    published = _quiet(lambda: unlearn(model, graph, request, **PUBLISHED))
    equal = unlearn(model, graph, request, damping=3.0)
    assert equal.solve.undamped_relative_residual < published.solve.undamped_relative_residual
    assert equal.solve.num_hvp < 25 < published.solve.num_hvp
    assert default.step_norm < published.step_norm


def test_negative_curvature_on_cora(cora):
    _, graph, model = cora
    request = _request("edge", graph, 0.05)
    with pytest.raises(UnstableStepError, match="negative curvature"):
        unlearn(model, graph, request, damping=1.0)
    auto = unlearn(model, graph, request, damping="auto")
    assert 1.5 < auto.damping < 8.0
    assert auto.solve.converged


def test_convergence_is_reported_once(cora):
    _, graph, model = cora
    request = _request("edge", graph, 0.05)
    with pytest.warns(ihvp.ConvergenceWarning, match="undamped") as caught:
        unlearn(model, graph, request, **PUBLISHED)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_timings_add_up(cora):
    _, graph, model = cora
    seconds = unlearn(model, graph, _request("edge", graph, 0.05)).timings
    assert min(seconds.t_setup, seconds.t_solve, seconds.t_apply) > 0
    assert seconds.t_setup + seconds.t_solve + seconds.t_apply == pytest.approx(seconds.total)


def test_the_single_map_of_sgc():
    data = _data(60)
    model = train(SGC(8, 3, hidden=0).double(), data, TrainConfig(epochs=100))
    result = unlearn(model, data, _request("node", data), damping=0.0, l2=0.1, rtol=1e-8)
    assert result.solve.relative_residual == result.solve.undamped_relative_residual < 1e-7
