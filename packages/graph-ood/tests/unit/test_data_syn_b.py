"""SYN-b: counts, structure, features, seeds, files."""

from __future__ import annotations

import networkx as nx
import pytest
import torch
from torch_geometric.utils import degree

from graph_ood.data import SynB, load_syn_b, syn_b_counts

CLASSES = ("house", "cycle", "grid", "diamond")


@pytest.fixture(scope="module")
def splits():
    return load_syn_b(bias=0.9, total=800)


def test_every_class_and_base_as_often_as_counted(splits):
    for split, counts in syn_b_counts(0.9, 800).items():
        dataset = splits[split]
        for label, name in enumerate(CLASSES):
            for base, base_name in enumerate(("tree", "ba")):
                found = int(((dataset.y == label) & (dataset.base_id == base)).sum())
                assert found == counts[name][base_name]
        assert torch.equal(dataset.y, dataset.motif_id)
        assert torch.equal(dataset.env_id, dataset.base_id)
        assert dataset.num_classes == 4
    # Shuffled: the first class isn't all in front.
    assert len(splits["train"].y[:40].unique()) == 4


def test_structure(splits):
    for graph in splits["val"]:
        pairs = nx.Graph(graph.edge_index.t().tolist())
        assert pairs.number_of_nodes() == graph.num_nodes
        assert 2 * pairs.number_of_edges() == graph.num_edges
        assert nx.is_connected(pairs)
        assert nx.number_of_selfloops(pairs) == 0
        assert 230 <= graph.num_nodes <= 247
        assert 542 <= graph.num_edges <= 1000
        assert int(graph.node_gt.sum()) == (5, 6, 6, 6)[graph.y]
        # Noise may add edges inside the motif.
        assert int(graph.edge_gt.sum()) // 2 >= (6, 6, 7, 8)[graph.y]
        size = 241 if graph.base_id == 0 else 225
        assert graph.num_nodes == size + int(graph.node_gt.sum())


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5])
def test_number_of_noise_edges(noise):
    for graph in SynB(bias=0.5, split="val", total=400, noise=noise):
        base = 240 if graph.base_id == 0 else 446
        core = base + 1 + (6, 6, 7, 8)[graph.y]
        assert graph.num_edges == 2 * (core + int(noise * core))


@pytest.mark.parametrize("width", [1, 3, 10, 20])
def test_features_are_the_degree(width):
    for graph in SynB(bias=0.5, split="val", total=80, max_degree=width):
        count = degree(graph.edge_index[0], graph.num_nodes, dtype=torch.long)
        assert graph.x.shape == (graph.num_nodes, width)
        assert torch.equal(graph.x.argmax(1), count.clamp(max=width - 1))
        assert torch.equal(graph.x.sum(1), torch.ones(graph.num_nodes))


def test_preferential_attachment_is_that_of_networkx():
    """Degrees of the Barabási-Albert base, pooled over graphs: share of each low degree, and the mean largest one."""
    ours, largest = [], []
    for graph in SynB(bias=0.0, split="train", total=800, noise=0.0):
        if graph.base_id == 1:
            inside = graph.edge_index[:, ~graph.node_gt[graph.edge_index].any(0)]
            ours.append(degree(inside[0], 225, dtype=torch.long))
            largest.append(int(ours[-1].max()))
    theirs, theirs_largest = [], []
    for seed in range(150):
        degrees = [d for _, d in nx.barabasi_albert_graph(225, 2, seed=seed).degree]
        theirs.append(torch.tensor(degrees))
        theirs_largest.append(max(degrees))
    assert len(ours) >= 130
    found, expected = (torch.cat(x).bincount(minlength=6)[:6] / (225 * len(x)) for x in (ours, theirs))
    torch.testing.assert_close(found, expected, atol=0.012, rtol=0)
    assert sum(largest) / len(largest) == pytest.approx(sum(theirs_largest) / len(theirs_largest), rel=0.1)


def test_one_seed_one_data_set(splits):
    again = SynB(bias=0.9, split="val", total=800)
    assert torch.equal(again._data.edge_index, splits["val"]._data.edge_index)
    other = SynB(bias=0.9, split="val", total=800, seed=1)
    assert not torch.equal(again._data.y, other._data.y)


@pytest.mark.parametrize("bias", [0.0, 0.5, 1.0])
def test_counts_at_the_ends(bias):
    counts = syn_b_counts(bias, 8000)
    assert counts["train"]["house"] == {"tree": int(1400 * bias), "ba": int(1400 * (1 - bias))}
    assert counts["test"]["diamond"] == {"tree": 200, "ba": 200}


def test_parts_of_the_split_are_shares():
    assert syn_b_counts(0.5, 8000, (70, 10, 20)) == syn_b_counts(0.5, 8000)
    assert syn_b_counts(0.5, 8000, (8, 1, 1))["train"]["grid"] == {"tree": 800, "ba": 800}


def test_graphs_are_kept_as_safetensors_and_read_again(tmp_path, monkeypatch):
    first = SynB(tmp_path, 0.7, "val", 80)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    monkeypatch.setattr("graph_ood.data._syn_b.build_table", None)
    second = SynB(tmp_path, 0.7, "val", 80)
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a.keys())  # noqa: SIM118


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"bias": 1.01}, "bias"),
        ({"bias": -0.1}, "bias"),
        ({"bias": float("nan")}, "bias"),
        ({"split": "id_val"}, "split"),
        ({"total": 39}, "total"),
        ({"total": 40, "split": "val", "bias": 0.5}, "split 'val' is empty"),
        ({"max_degree": 0}, "max_degree"),
        ({"noise": -0.1}, "noise"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_arguments(arguments, word):
    with pytest.raises(ValueError, match=word):
        SynB(**arguments)


@pytest.mark.parametrize("split", [(7, 3), (0, 0, 0), (7, -1, 2), (7, float("nan"), 2)])
def test_bad_split_of_the_counts(split):
    with pytest.raises(ValueError, match="split"):
        syn_b_counts(0.5, 800, split)
