from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch_geometric.nn import GCNConv, GINConv

import ihvp
from graph_unlearn.data import synthetic_graph
from graph_unlearn.nets import GAT, GCN, GIN, MODELS, SGC, build_model, propagate, two_layer_logits

F64 = torch.float64


def _graph(n=40, f=6):
    data = synthetic_graph(n, f, 3, seed=2)
    data.x = torch.where(data.x.abs() > 0.3, data.x, 0.0).double()
    return data


def _dense_norm(edge_index, n, self_loops):
    a = torch.zeros(n, n, dtype=F64)
    a.index_put_((edge_index[1], edge_index[0]), torch.ones(edge_index.shape[1], dtype=F64), accumulate=True)
    if self_loops:
        a += torch.eye(n, dtype=F64)
    d = a.sum(1).pow(-0.5)
    d[d.isinf()] = 0
    return d[:, None] * a * d


@pytest.mark.parametrize("self_loops", [False, True])
@pytest.mark.parametrize("directed", [False, True])
def test_propagate_is_the_dense_product_to_the_second_derivative(self_loops, directed):
    data = _graph(12)
    edge_index = data.edge_index[:, data.edge_index[0] < data.edge_index[1]] if directed else data.edge_index
    s = _dense_norm(edge_index, 12, self_loops)
    h = torch.randn(12, 3, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.testing.assert_close(propagate(h, edge_index, self_loops=self_loops), s @ h)

    def run(h):
        return propagate(h.sin(), edge_index, self_loops=self_loops)

    assert torch.autograd.gradcheck(run, (h,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, (h,))
    plain = propagate(h, edge_index, norm="sum")
    torch.testing.assert_close(plain, torch.zeros_like(h).index_add(0, edge_index[1], h[edge_index[0]]))


def test_a_changed_graph_is_not_mistaken_for_the_old_one():
    h = torch.randn(3, 2)
    edge_index = torch.tensor([[0, 1], [1, 0]])
    first = propagate(h, edge_index)
    torch.testing.assert_close(first[:2], h[[1, 0]])
    edge_index[:, :] = torch.tensor([[1, 2], [2, 1]])  # in place
    torch.testing.assert_close(propagate(h, edge_index)[1:], h[[2, 1]])
    for seed in range(30):  # new tensors at the addresses of old ones
        edges = torch.randint(3, (2, 2), generator=torch.Generator().manual_seed(seed))
        expected = torch.zeros_like(h).index_add(0, edges[1], h[edges[0]])
        torch.testing.assert_close(propagate(h, edges, norm="sum"), expected)
        del edges
    x = torch.eye(3).to_sparse()
    net = GCN(3, 2)
    before = net.lin1(x)
    x.values().mul_(2)
    torch.testing.assert_close(net.lin1(x), 2 * before)


def test_gcn_is_pygs():
    data, model = _graph(), GCN(6, 3).double().eval()
    convs = [GCNConv(6, 16, bias=False, add_self_loops=False), GCNConv(16, 3, bias=False, add_self_loops=False)]
    for conv, lin in zip(convs, (model.lin1, model.lin2), strict=True):
        conv.double().lin.weight = lin.weight
    expected = F.log_softmax(convs[1](convs[0](data.x, data.edge_index).relu(), data.edge_index), -1)
    torch.testing.assert_close(model(data.x, data.edge_index), expected)
    logits = two_layer_logits([model.lin1.weight, model.lin2.weight], data.x, data.edge_index)
    torch.testing.assert_close(F.log_softmax(logits, -1), expected)


def test_gin_is_pygs():
    data, model = _graph(), GIN(6, 3).double().eval()
    layers = [
        GINConv(nn.Sequential(layer.lin1, nn.ReLU(), layer.lin2)).double() for layer in (model.conv1, model.conv2)
    ]
    h = model.bn1(layers[0](data.x, data.edge_index).relu())
    h = model.bn2(layers[1](h, data.edge_index).relu())
    expected = F.log_softmax(model.fc2(model.fc1(h).relu()), -1)
    torch.testing.assert_close(model(data.x, data.edge_index), expected)


@pytest.mark.parametrize("name", list(MODELS))
def test_sparse_features_give_what_dense_ones_give(name):
    data = _graph()
    torch.manual_seed(0)
    model = build_model(name, 6, 3).double().eval()
    sparse = data.x.to_sparse()
    outs = [model(x, data.edge_index) for x in (data.x, sparse)]
    torch.testing.assert_close(outs[0], outs[1])
    torch.testing.assert_close(outs[0].exp().sum(1), torch.ones(40, dtype=F64))
    y = data.y
    grads = [torch.autograd.grad(F.nll_loss(out, y), list(model.parameters())) for out in outs]
    torch.testing.assert_close(grads[0], grads[1])
    v = None
    products = []
    for x in (data.x, sparse):
        loss_fn, params = ihvp.module_loss(model, lambda m, x: F.nll_loss(m(x, data.edge_index), y), x)
        v = v or {key: torch.randn_like(p) for key, p in params.items()}
        products.append(ihvp.make_hvp(loss_fn, params, mode="rev-rev")(v))
    torch.testing.assert_close(products[0], products[1])


def test_forward_mode_agrees():
    data, model = _graph(), GCN(6, 3).double()
    loss_fn, params = ihvp.module_loss(model, lambda m: F.nll_loss(m(data.x, data.edge_index), data.y))
    v = {key: torch.randn_like(p) for key, p in params.items()}
    products = [ihvp.hvp.hvp(loss_fn, params, v, mode=mode) for mode in ("fwd-rev", "rev-rev")]
    torch.testing.assert_close(products[0], products[1], rtol=1e-10, atol=1e-12)


def test_dropout_of_sparse_features_drops_and_rescales():
    torch.manual_seed(0)
    x = torch.ones(2000, 50).to_sparse()
    model = GAT(50, 2, hidden=1, heads=1, dropout=0.5)
    with torch.no_grad():
        model.conv1.lin.weight.fill_(1.0)
    seen = []
    model.conv1.lin.register_forward_hook(lambda _m, _i, out: seen.append(out.detach()))
    model.train()(x, torch.zeros(2, 0, dtype=torch.long))
    assert abs(float(seen[0].mean()) - 50) < 0.5  # sum of 50 ones, each kept half the time and doubled
    assert float(seen[0].std()) == pytest.approx(50**0.5, rel=0.1)
    seen.clear()
    model.eval()(x, torch.zeros(2, 0, dtype=torch.long))
    assert torch.equal(seen[0], torch.full((2000, 1), 50.0))


@pytest.mark.parametrize("name", list(MODELS))
def test_networks_live_with_isolated_nodes_copies_and_half_precision(name):
    torch.manual_seed(0)
    model = build_model(name, 5, 3).eval()
    none = torch.zeros(2, 0, dtype=torch.long)
    out = model(torch.randn(4, 5), none)
    assert out.isfinite().all()
    if name in ("gcn", "sgc"):
        torch.testing.assert_close(out, torch.full((4, 3), -torch.tensor(3.0).log().item()))
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))  # noqa: S301
    x, edges = torch.randn(4, 5), torch.tensor([[0, 1], [1, 0]])
    assert torch.equal(twin(x, edges), model(x, edges))
    assert model.num_layers == 2


def test_reset_parameters_forgets_everything():
    torch.manual_seed(0)
    model = GIN(4, 2)
    model.train()(torch.randn(10, 4), torch.tensor([[0, 1], [1, 0]]))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.reset_parameters()
    after = model.state_dict()
    assert torch.equal(after["bn1.running_mean"], torch.zeros(32))
    changed = [key for key in before if key.endswith("lin1.weight") or key.startswith("fc")]
    assert all(not torch.equal(before[key], after[key]) for key in changed)


def test_bad_sizes_and_names():
    with pytest.raises(ValueError, match="did you mean 'gcn'"):
        build_model("gcnn", 3, 2)
    with pytest.raises(ValueError, match="num_classes"):
        GCN(3, 0)
    with pytest.raises(ValueError, match="model"):
        two_layer_logits([torch.eye(2)] * 2, torch.eye(2), torch.tensor([[0], [1]]), model="gat")
    assert len(list(SGC(4, 3, hidden=0).parameters())) == 1
