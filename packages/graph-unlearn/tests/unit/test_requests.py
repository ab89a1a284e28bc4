from __future__ import annotations

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric.data import Data
from torch_geometric.utils import to_undirected

from graph_unlearn.requests import (
    EdgeRequest,
    FeatureRequest,
    NodeRequest,
    affected_nodes,
    apply_request,
    check_request,
    draw_request,
    remove_edges,
    remove_nodes,
    request_nodes,
    task_of,
)

PATH = torch.tensor([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]])
NONE = torch.zeros(0, dtype=torch.long)


def _graph(**fields):
    masks = {"train_mask": torch.tensor([True, True, True, False, True]), "test_mask": torch.arange(5) == 3}
    plain = {"x": torch.ones(5, 3), "edge_index": PATH, "y": torch.zeros(5, dtype=torch.long)}
    return Data(**{**plain, **masks, **fields})


graphs = st.integers(2, 12).flatmap(
    lambda n: st.tuples(
        st.just(n),
        st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)).filter(lambda e: e[0] != e[1]), max_size=25),
        st.lists(st.integers(0, n - 1), max_size=4),
        st.integers(1, 3),
    )
)


@given(graphs)
@settings(derandomize=True, deadline=None, max_examples=150)
def test_affected_nodes_are_the_neighbourhoods_of_networkx(case):
    n, edges, request, layers = case
    edge_index = torch.tensor(edges, dtype=torch.long).reshape(-1, 2).T
    graph = nx.DiGraph(edges)
    graph.add_nodes_from(range(n))

    def near(hops):
        found = [nx.single_source_shortest_path_length(graph, v, hops) for v in set(request)]
        return {u for lengths in found for u in lengths}

    named = torch.tensor(request, dtype=torch.long)
    for task, hops in (("node", layers + 1), ("edge", layers), ("feature", layers)):
        got = affected_nodes(task, edge_index, named, n, layers)
        expected = near(hops) if task == "edge" else near(hops) - set(request)
        assert got.influenced.tolist() == sorted(expected)
        assert got.deleted.tolist() == (sorted(set(request)) if task == "node" else [])
        assert got.feature.tolist() == (sorted(set(request)) if task == "feature" else [])


@given(graphs)
@settings(derandomize=True, deadline=None, max_examples=100)
def test_removal_drops_exactly_what_is_named(case):
    _, edges, nodes, _ = case
    edge_index = torch.tensor(edges, dtype=torch.long).reshape(-1, 2).T
    gone = {tuple(e) for e in edges[::3]}
    kept = [e for e in edges if e not in gone and e[::-1] not in gone]
    named = torch.tensor(edges[::3], dtype=torch.long).reshape(-1, 2).T
    assert remove_edges(edge_index, named).T.tolist() == [list(e) for e in kept]
    kept = [e for e in edges if e not in gone]
    assert remove_edges(edge_index, named, directed=True).T.tolist() == [list(e) for e in kept]
    kept = [list(e) for e in edges if not set(e) & set(nodes)]
    assert remove_nodes(edge_index, torch.tensor(nodes, dtype=torch.long)).T.tolist() == kept


def test_apply_keeps_the_input_and_ids():
    data = _graph()
    after = apply_request(NodeRequest(torch.tensor([1])), data)
    assert after.edge_index.tolist() == [[2, 3], [3, 2]]
    assert after.x.shape == (5, 3)
    assert after.train_mask.tolist() == [True, False, True, False, True]
    assert data.train_mask.tolist() == [True, True, True, False, True]
    assert data.edge_index is PATH
    assert apply_request(EdgeRequest(torch.tensor([[2], [1]])), data).edge_index.tolist() == [
        [0, 1, 2, 3],
        [1, 0, 3, 2],
    ]


@pytest.mark.parametrize("layout", ["dense", "coo", "csr"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_feature_request_in_every_layout(layout):
    x = torch.arange(15.0).reshape(5, 3)
    stored = {"dense": x, "coo": x.to_sparse(), "csr": x.to_sparse_csr()}[layout]
    whole = apply_request(FeatureRequest(torch.tensor([1, 4])), _graph(x=stored)).x
    part = apply_request(FeatureRequest(torch.tensor([1]), torch.tensor([2])), _graph(x=stored)).x
    expected = x.clone()
    expected[[1, 4]] = 0
    assert torch.equal(whole.to_dense(), expected)
    expected = x.clone()
    expected[1, 2] = 0
    assert torch.equal(part.to_dense(), expected)
    assert torch.equal(stored.to_dense(), x)


def test_draws_are_reproducible_and_of_the_asked_size():
    data = Data(
        edge_index=to_undirected(torch.randint(60, (2, 200), generator=torch.Generator().manual_seed(1))),
        train_mask=torch.arange(60) < 40,
    )
    for task, size in (("node", 8), ("feature", 8)):
        drawn = draw_request(task, data, 0.2, torch.Generator().manual_seed(3))
        assert drawn.nodes.shape == (size,)
        assert data.train_mask[drawn.nodes].all()
        assert len(drawn.nodes.unique()) == size
        assert torch.equal(drawn.nodes, draw_request(task, data, 0.2, torch.Generator().manual_seed(3)).nodes)
        assert not torch.equal(drawn.nodes, draw_request(task, data, 0.2, torch.Generator().manual_seed(4)).nodes)
    edges = draw_request("edge", data, 0.2).edges
    assert edges.shape[1] == int(0.2 * int((data.edge_index[0] < data.edge_index[1]).sum()))
    assert draw_request("edge", data, 0.0).edges.shape == (2, 0)
    check_request(
        draw_request("edge", Data(x=torch.ones(60, 1), **data.to_dict()), 1.0),
        Data(x=torch.ones(60, 1), edge_index=data.edge_index),
    )


def test_names_of_requests():
    assert [task_of(r) for r in (NodeRequest(NONE), EdgeRequest(torch.zeros(2, 0).long()), FeatureRequest(NONE))] == [
        "node",
        "edge",
        "feature",
    ]
    assert request_nodes(EdgeRequest(torch.tensor([[4, 1], [1, 4]]))).tolist() == [1, 4]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: check_request(NodeRequest(torch.tensor([5])), _graph()), "out of range: node 5"),
        (lambda: check_request(NodeRequest(torch.tensor([-1])), _graph()), "node -1, accepted are 0 to 4"),
        (lambda: check_request(FeatureRequest(torch.tensor([0]), torch.tensor([3])), _graph()), "column 3"),
        (lambda: check_request(EdgeRequest(torch.tensor([[0], [9]])), _graph()), "edges is out of range"),
        (lambda: check_request(EdgeRequest(torch.tensor([[0, 0], [1, 3]])), _graph()), r"edge not in graph: \(0, 3\)"),
        (lambda: check_request(NodeRequest(NONE), _graph(edge_index=PATH[:, 1:])), "undirected"),
        (lambda: check_request(NodeRequest(NONE), _graph(edge_index=PATH + 3)), "edge_index is out of range"),
        (lambda: NodeRequest(torch.tensor([1.0])), "integers"),
        (lambda: NodeRequest(torch.tensor([[1]])), "nodes must have shape"),
        (lambda: EdgeRequest(torch.tensor([1, 2])), "edges must have shape"),
        (lambda: affected_nodes("nodes", PATH, NONE, 5), "did you mean 'node'"),
        (lambda: affected_nodes("node", PATH, NONE, 5, num_layers=0), "num_layers"),
        (lambda: affected_nodes("node", PATH, torch.tensor([7]), 5), "request is out of range"),
        (lambda: draw_request("node", _graph(), 1.5), "ratio"),
        (lambda: draw_request("node", Data(edge_index=PATH), 0.5), "train_mask"),
        (lambda: apply_request("node", _graph()), "NodeRequest"),
    ],
)
def test_bad_input(run, message):
    with pytest.raises(ValueError, match=message):
        run()


def test_a_graph_with_copies_of_an_edge_is_undirected():
    check_request(NodeRequest(NONE), _graph(edge_index=torch.cat([PATH, PATH[:, :1]], 1)))


def test_directed_edges_are_accepted_when_said_so():
    one_way = _graph(edge_index=torch.tensor([[0, 1, 2], [1, 2, 1]]))
    check_request(EdgeRequest(torch.tensor([[0], [1]])), one_way, directed=True)
    after = apply_request(EdgeRequest(torch.tensor([[1], [2]])), one_way, directed=True)
    assert after.edge_index.tolist() == [[0, 2], [1, 1]]
