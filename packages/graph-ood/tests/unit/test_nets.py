from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GINConv
from torch_geometric.nn.conv.gcn_conv import gcn_norm

from graph_ood._sparse import edge_routes, propagate, propagate_relu
from graph_ood.nets import (
    ConvStack,
    GraphClassifier,
    ProjectedEncoder,
    SoftSplit,
    WeightedGATConv,
    WeightedGCNConv,
    WeightedGINConv,
    attention_split,
    graph_index,
    pool,
    readout_head,
    weighted_gcn_conv,
    weighted_gcn_norm,
    weighted_gin_conv,
)

PATH = torch.tensor([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]])


def random_graph(n=6, m=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, dtype=torch.float64, generator=generator)
    edges = torch.randint(n, (2, m), generator=generator)
    return x, edges, torch.rand(m, dtype=torch.float64, generator=generator)


def dense(edges, weight, n=4):
    return weight.new_zeros(n, n).index_put(tuple(edges), weight)


def test_symmetric_weights_give_the_normalisation_of_pyg():
    weight = torch.tensor([0.2, 0.2, 0.7, 0.7, 1.5, 1.5], dtype=torch.float64)
    edges, norm = weighted_gcn_norm(PATH, weight, 4, torch.float64)
    theirs, expected = gcn_norm(PATH, weight, 4, add_self_loops=True, dtype=torch.float64)
    torch.testing.assert_close(dense(edges, norm), dense(theirs, expected))


def test_the_degree_is_summed_at_the_source():
    star = torch.tensor([[0, 0, 0], [1, 2, 3]])
    edges, norm = weighted_gcn_norm(star, None, 4, torch.float64)
    assert norm[0] == pytest.approx(0.5)  # 1 / sqrt(4 * 1)
    theirs = gcn_norm(star, None, 4, add_self_loops=True, dtype=torch.float64)[1]
    assert theirs[0] == pytest.approx(0.5**0.5)
    assert edges.shape == (2, 7)


@given(st.integers(0, 50))
@settings(max_examples=15, deadline=None)
def test_ones_equal_no_weights_in_every_convolution(seed):
    x, edges, weight = random_graph(seed=seed)
    ones = torch.ones_like(weight)
    torch.manual_seed(seed)
    for conv in (
        WeightedGCNConv(4, 8).double(),
        WeightedGINConv(4, 8).double().eval(),
        WeightedGINConv(4, 8, message_relu=False).double().eval(),
        WeightedGATConv(4, 8).double(),
    ):
        torch.testing.assert_close(conv(x, edges, ones), conv(x, edges))
        assert not torch.allclose(conv(x, edges, weight), conv(x, edges))


def test_a_zero_weight_is_an_absent_edge():
    x, edges, weight = random_graph()
    edges = edges[:, edges[0] != edges[1]]
    weight = weight[: edges.shape[1]].clone()
    weight[::2] = 0
    kept = weight > 0
    for conv in (WeightedGCNConv(4, 8).double(), WeightedGINConv(4, 8).double().eval()):
        torch.testing.assert_close(conv(x, edges, weight), conv(x, edges[:, kept], weight[kept]))


def test_gin_without_the_relu_is_the_layer_of_pyg():
    x, edges, _ = random_graph()
    ours = WeightedGINConv(4, 8, message_relu=False).double()
    theirs = GINConv(ours.mlp)
    torch.testing.assert_close(ours(x, edges), theirs(x, edges))


def test_modules_equal_their_functions():
    x, edges, weight = random_graph()
    gcn = WeightedGCNConv(4, 8).double()
    torch.testing.assert_close(gcn(x, edges, weight), weighted_gcn_conv(x, edges, weight, gcn.weight, gcn.bias))
    gin = WeightedGINConv(4, 8).double().eval()
    lin1, norm, _, lin2 = gin.mlp
    expected = weighted_gin_conv(
        x,
        edges,
        weight,
        gin.eps,
        *(lin1.weight, lin1.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var),
        *(lin2.weight, lin2.bias),
    )
    torch.testing.assert_close(gin(x, edges, weight), expected)
    split = SoftSplit(4).double()
    by_hand = attention_split(x, edges, split.node.weight, split.node.bias, split.edge.weight, split.edge.bias)
    for name, value in split(x, edges).items():
        torch.testing.assert_close(value, by_hand[name])


def test_gradients():
    x, edges, weight = random_graph(4, 6)
    matrix = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs = tuple(value.clone().requires_grad_() for value in (x, weight + 0.1, matrix))
    assert torch.autograd.gradcheck(lambda x, w, m: weighted_gcn_conv(x, edges, w, m, None), inputs)
    gat = WeightedGATConv(4, 4).double()
    assert torch.autograd.gradcheck(lambda x, w: gat(x, edges, w), inputs[:2])


def test_shares_sum_to_one_and_can_be_switched_off():
    x, edges, _ = random_graph()
    split = SoftSplit(4).double()(x, edges)
    for part in ("node", "edge"):
        total = split[f"{part}_trivial"] + split[f"{part}_causal"]
        torch.testing.assert_close(total, torch.ones_like(total))
    off = SoftSplit(4, node=False, edge=False).double()(x, edges)
    assert all(bool((value == 0.5).all()) for value in off.values())


@pytest.mark.parametrize("conv", ["gcn", "gin", "gat"])
def test_a_batch_is_its_graphs_one_by_one(conv):
    torch.manual_seed(0)
    graphs = [Data(x=torch.randn(n, 4), edge_index=PATH[:, : 2 * (n - 1)]) for n in (2, 3, 4)]
    for encoder in (ProjectedEncoder(4, 8, 2, conv), ConvStack(4, 8, 2, conv)):
        for how in ("sum", "mean"):
            model = GraphClassifier(encoder, 3, pool=how).eval()
            together = model(Batch.from_data_list(graphs))
            torch.testing.assert_close(together, torch.cat([model(graph) for graph in graphs]))


def test_graphs_without_edges_and_empty_graphs_are_finite():
    graphs = [Data(x=torch.ones(2, 4), edge_index=PATH[:, :0]), Data(x=torch.ones(0, 4), edge_index=PATH[:, :0])]
    batch = Batch.from_data_list(graphs)
    for conv in ("gcn", "gin", "weighted_gin", "gat"):
        assert bool(GraphClassifier(ConvStack(4, 8, 2, conv), 3).eval()(batch).isfinite().all())
    index, num_graphs = graph_index(batch)
    assert pool(batch.x, index, num_graphs, "mean")[1].tolist() == [0.0] * 4


def test_one_layer_has_neither_relu_nor_dropout():
    torch.manual_seed(0)
    stack = ConvStack(4, 8, 1, "gcn")
    out = stack(torch.randn(5, 4), PATH)
    assert bool((out < 0).any())
    assert not bool((out == 0).any())


def test_batch_norms_of_cal_start_at_one_and_a_small_shift():
    head = readout_head(4, 2)
    assert head[0].bias.tolist() == pytest.approx([1e-4] * 4)
    assert ProjectedEncoder(4, 8).input_norm.bias.tolist() == pytest.approx([1e-4] * 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: weighted_gcn_conv(torch.ones(4, 2), PATH, torch.ones(5), torch.eye(2), None), "edge_weight"),
        (
            lambda: weighted_gcn_conv(torch.ones(4, 2), PATH, -torch.ones(6), torch.eye(2), None),
            "edge_weight must be >= 0",
        ),
        (lambda: weighted_gcn_conv(torch.ones(4, 2), PATH, None, torch.eye(3), None), "weight must have shape"),
        (lambda: weighted_gcn_conv(torch.ones(4, 2), PATH.float(), None, torch.eye(2), None), "edge_index"),
        (lambda: weighted_gcn_conv(torch.ones(4), PATH, None, torch.eye(2), None), "x must have shape"),
        (lambda: weighted_gcn_conv(torch.ones(4, 2, dtype=torch.int64), PATH, None, torch.eye(2), None), "float"),
        (lambda: WeightedGATConv(4, 6, heads=4), "heads must divide"),
        (lambda: ProjectedEncoder(4, 6, 2, "gat"), "divisible by the 4 heads"),
        (lambda: ProjectedEncoder(4, 8, 2, "gni"), "did you mean 'gin'"),
        (lambda: ConvStack(4, 8, 0), "num_layers must be an integer >= 1"),
        (lambda: ConvStack(4, 8, dropout=1.5), "dropout must be in"),
        (lambda: GraphClassifier(ConvStack(4, 8), 3, pool="max"), "unknown pool"),
        (lambda: attention_split(torch.ones(2, 1), PATH[:, :1], *[torch.zeros(2, 2)] * 4), "node_weight"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sum_messages", [propagate, propagate_relu], ids=lambda f: f.__name__)
@given(seed=st.integers(0, 100), m=st.integers(0, 20))
@settings(max_examples=20, deadline=None)
def test_sparse_products_are_the_sum_of_messages(sum_messages, weighted, seed, m):
    x, edges, weight = random_graph(5, m, seed)
    weight = (weight - 0.3) if weighted else None  # negative ones too
    results = []
    for routes in (None, edge_routes(edges, x)):
        inputs = [value.clone().requires_grad_() for value in (x, weight) if value is not None]
        out = sum_messages(inputs[0], edges, inputs[1] if weighted else None, routes)
        gradients = torch.autograd.grad((out * x.cos()).sum(), inputs)
        results.append((out, *gradients))
    for scattered, sparse in zip(*results, strict=True):
        torch.testing.assert_close(scattered, sparse)
    by_hand = torch.zeros_like(x)
    for k, (i, j) in enumerate(edges.T.tolist()):
        message = x[i] if weight is None else weight[k] * x[i]
        by_hand[j] += message.relu() if sum_messages is propagate_relu else message
    torch.testing.assert_close(results[0][0], by_hand)
