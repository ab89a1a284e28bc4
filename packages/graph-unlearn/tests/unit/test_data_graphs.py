from __future__ import annotations

import pytest
import torch
from torch_geometric.data import Data
from torch_geometric.utils import contains_self_loops, is_undirected

from graph_unlearn.data import Neighborhoods, load_graph, synthetic_graph, training_graph


@pytest.mark.parametrize(
    ("name", "nodes", "edges", "features", "classes"),
    [("cora", 2708, 10556, 1433, 7), ("citeseer", 3327, 9104, 3703, 6), ("cora_ml", 2995, 16316, 2879, 7)],
)
def test_citation_graphs(name, nodes, edges, features, classes, data_root, tmp_path):
    data = load_graph(name, data_root, cache=tmp_path)
    assert (data.x.shape, data.edge_index.shape, data.num_classes) == ((nodes, features), (2, edges), classes)
    assert is_undirected(data.edge_index)
    assert not contains_self_loops(data.edge_index)
    sums = data.x.sum(1)
    torch.testing.assert_close(sums[sums > 0], torch.ones(int((sums > 0).sum())))
    assert not (data.train_mask & data.test_mask).any()
    assert int(data.test_mask.sum()) == -(-nodes // 10)
    again = load_graph(name, data_root, cache=tmp_path)  # from the cache
    assert torch.equal(again.x, data.x)
    assert torch.equal(again.train_mask, data.train_mask)
    assert not torch.equal(load_graph(name, data_root, cache=tmp_path, seed=1).train_mask, data.train_mask)


def test_loading_writes_nothing_beside_the_raw_files(data_root, tmp_path):
    root = tmp_path / "graph"
    raw = root / "planetoid" / "Cora" / "raw"
    raw.mkdir(parents=True)
    for file in (data_root / "graph" / "planetoid" / "Cora" / "raw").iterdir():
        (raw / file.name).symlink_to(file)
    before = sorted(root.rglob("*"))
    load_graph("cora", tmp_path)
    assert sorted(root.rglob("*")) == before


def test_missing_files_and_bad_names():
    with pytest.raises(FileNotFoundError, match="planetoid"):
        load_graph("cora", "/nowhere")
    with pytest.raises(ValueError, match="did you mean 'cora'"):
        load_graph("coral", "/nowhere")
    with pytest.raises(ValueError, match="test_size"):
        load_graph("cora", "/nowhere", test_size=0.0)


def test_training_graph_has_no_edge_to_a_test_node():
    data = synthetic_graph(200, 4, 3)
    graph = training_graph(data)
    assert data.train_mask[graph.edge_index].all()
    assert 0 < graph.edge_index.shape[1] < data.edge_index.shape[1]
    with pytest.raises(ValueError, match="train_mask"):
        training_graph(Data(edge_index=data.edge_index))


def test_synthetic_graph_follows_its_numbers():
    data = synthetic_graph(2000, 8, 4, num_edges=8000, homophily=0.9, seed=3)
    alike = (data.y[data.edge_index[0]] == data.y[data.edge_index[1]]).double().mean()
    assert 0.9 < alike < 0.95  # one in four of the random pairs is of one class too
    assert is_undirected(data.edge_index)
    assert not contains_self_loops(data.edge_index)
    assert 15_000 < data.edge_index.shape[1] <= 16_000
    same, other = (
        synthetic_graph(2000, 8, 4, num_edges=8000, homophily=0.9, seed=3),
        synthetic_graph(2000, 8, 4, seed=4),
    )
    assert torch.equal(same.edge_index, data.edge_index)
    assert torch.equal(same.x, data.x)
    assert not torch.equal(other.y, data.y)
    local = synthetic_graph(500, 2, 2, locality=5)
    gap = (local.edge_index[0] - local.edge_index[1]).abs()
    assert torch.minimum(gap, 500 - gap).max() <= 5
    assert synthetic_graph(20, 2, 2, num_edges=0).edge_index.shape == (2, 0)
    with pytest.raises(ValueError, match="homophily"):
        synthetic_graph(homophily=1.5)


# --- neighbourhoods ---------------------------------------------------------------------------------------------------


def test_neighbourhoods_are_put_back_after_every_batch():
    data = synthetic_graph(100, 4, 2)
    cut = Neighborhoods(data, 2)
    first = cut.batch(torch.tensor([5, 17]))
    assert first.n_id[:2].tolist() == [5, 17]
    assert len(first.n_id.unique()) == len(first.n_id)
    cut.batch(torch.arange(50))
    again = cut.batch(torch.tensor([5, 17]))
    assert torch.equal(again.n_id, first.n_id)
    assert torch.equal(again.edge_index, first.edge_index)


def test_neighbourhood_of_an_isolated_node():
    data = Data(x=torch.ones(3, 1), edge_index=torch.tensor([[0, 1], [1, 0]]), y=torch.zeros(3, dtype=torch.long))
    batch = Neighborhoods(data, 2).batch(torch.tensor([2]))
    assert batch.n_id.tolist() == [2]
    assert batch.edge_index.shape == (2, 0)


def test_fanout_bounds_every_degree_and_samples_fairly():
    star = torch.stack([torch.arange(1, 101), torch.zeros(100, dtype=torch.long)])
    data = Data(x=torch.ones(101, 1), edge_index=star, y=torch.zeros(101, dtype=torch.long))
    counts = torch.zeros(101)
    for seed in range(300):
        batch = Neighborhoods(data, 1, fanout=10, seed=seed).batch(torch.tensor([0]))
        taken = batch.n_id[batch.edge_index[0]]
        assert len(taken.unique()) == 10
        counts[taken] += 1
    assert counts[0] == 0
    assert counts[1:].min() >= 15  # 30 expected
    assert counts[1:].max() <= 50
    full = Neighborhoods(data, 1, fanout=200).batch(torch.tensor([0]))
    assert full.edge_index.shape[1] == 100


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda d: Neighborhoods(d, 0), "num_layers"),
        (lambda d: Neighborhoods(d, 1, fanout=0), "fanout"),
        (lambda d: Neighborhoods(Data(x=d.x.to_sparse(), edge_index=d.edge_index, y=d.y), 1), "dense"),
    ],
)
def test_bad_neighbourhoods(run, message):
    with pytest.raises(ValueError, match=message):
        run(synthetic_graph(20, 2, 2))


def test_reading_announces_nothing(data_root, capfd):
    load_graph("cora", data_root)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
