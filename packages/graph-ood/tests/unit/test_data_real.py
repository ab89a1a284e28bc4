"""TU files, the split by size, checks before training, environments."""

from __future__ import annotations

import pytest
import torch
from torch_geometric.data import Data

from graph_ood.data import (
    GoodMotif,
    SynB,
    cal_features,
    check_graphs,
    environment_counts,
    environment_ids,
    load_tu,
    size_split,
)


def write_tu(root, name="TOY", **fields):
    """Three graphs: a path of three nodes, a single node, and a pair whose edge is given twice; edges from 1."""
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    files = {
        "A": "1, 2\n2, 1\n2, 3\n3, 2\n5, 6\n6, 5\n5, 6\n6, 6\n",
        "graph_indicator": "1\n1\n1\n2\n3\n3\n",
        "graph_labels": "-1\n1\n1\n",
        "edge_labels": "0\n0\n1\n1\n0\n0\n0\n0\n",
    } | fields
    for field, text in files.items():
        if text is not None:
            (raw / f"{name}_{field}.txt").write_text(text)
    return raw


@pytest.mark.parametrize(
    ("name", "graphs", "features", "classes", "counts"),
    [
        ("MUTAG", 188, 109, 2, [63, 125]),
        ("IMDB-BINARY", 1000, 103, 2, [500, 500]),
        pytest.param("PROTEINS", 1113, 106, 2, [663, 450], marks=pytest.mark.slow),
        pytest.param("NCI1", 4110, 139, 2, [2053, 2057], marks=pytest.mark.slow),
        pytest.param("IMDB-MULTI", 1500, 103, 3, [500, 500, 500], marks=pytest.mark.slow),
    ],
)
def test_real_files(data_root, name, graphs, features, classes, counts):
    dataset = load_tu(name, data_root)
    assert (len(dataset), dataset.num_features, dataset.num_classes) == (graphs, features, classes)
    assert dataset.y.bincount().tolist() == counts
    check_graphs(dataset, num_classes=classes)
    assert "edge_attr" not in dataset[0]
    graph = dataset[graphs // 2]
    degree = torch.zeros(graph.num_nodes).index_add(0, graph.edge_index[0], torch.ones(graph.num_edges))
    assert torch.equal(graph.x[:, -102], degree)
    assert torch.equal(graph.x[:, -101:].argmax(1), degree.clamp(max=100).long())


def test_real_files_are_those_of_tudataset(data_root, tmp_path):
    from torch_geometric.datasets import TUDataset

    (tmp_path / "MUTAG").mkdir()
    (tmp_path / "MUTAG" / "raw").symlink_to(data_root / "graph" / "tu" / "MUTAG" / "raw")
    theirs = TUDataset(str(tmp_path), "MUTAG", use_node_attr=True)
    ours = load_tu("MUTAG", data_root, features="raw")
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.edge_index, b.edge_index)
        assert torch.equal(a.y, b.y)


def test_known_features_come_first(tmp_path):
    write_tu(tmp_path, node_labels="3\n4\n3\n4\n3\n3\n", node_attributes="0.5\n1\n2\n3\n4\n5\n")
    raw = load_tu("TOY", tmp_path, features="raw")
    assert raw[0].x.tolist() == [[0.5, 1, 0], [1, 0, 1], [2, 1, 0]]
    cal = load_tu("TOY", tmp_path)
    assert torch.equal(cal[0].x[:, :3], raw[0].x)
    assert cal[0].x[:, 3].tolist() == [1, 2, 1]
    assert cal.num_features == 3 + 102


def test_loops_repeats_isolated_nodes_and_edge_labels(tmp_path):
    write_tu(tmp_path)
    dataset = load_tu("TOY", tmp_path)
    assert [graph.num_nodes for graph in dataset] == [3, 1, 2]
    assert [graph.num_edges for graph in dataset] == [4, 0, 2]
    assert dataset.y.tolist() == [0, 1, 1]
    assert dataset[1].x[0, :3].tolist() == [1, 0, 1]
    assert set(dataset[0].keys()) == {"x", "edge_index", "y"}
    assert load_tu("TOY", tmp_path, features="raw")[0].x.tolist() == [[1], [1], [1]]


def test_a_graph_without_edges_at_the_end(tmp_path):
    write_tu(tmp_path, A="1, 2\n2, 1\n", edge_labels="0\n0\n")
    assert [graph.num_edges for graph in load_tu("TOY", tmp_path)] == [2, 0, 0]


@pytest.mark.parametrize(("name", "cap"), [("REDDIT-BINARY", 10), ("DD", 10), ("TOY", 100)])
def test_degrees_are_cut(tmp_path, name, cap):
    write_tu(tmp_path, name)
    assert load_tu(name, tmp_path).num_features == cap + 3


def test_nothing_is_written_beside_the_files(tmp_path):
    raw = write_tu(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    load_tu("TOY", tmp_path)
    cache = tmp_path.parent / f"{tmp_path.name}-cache"
    kept = load_tu("TOY", tmp_path, cache=cache)
    assert sorted(tmp_path.rglob("*")) == before
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"]
    again = load_tu("TOY", tmp_path, cache=cache)
    assert all(torch.equal(a.x, b.x) for a, b in zip(kept, again, strict=True))
    assert again.num_classes == 2
    # Other text, another file.
    (raw / "TOY_graph_labels.txt").write_text("10\n20\n30\n")
    assert load_tu("TOY", tmp_path, cache=cache).num_classes == 3


def test_the_cache_spares_the_parsing(tmp_path, monkeypatch):
    write_tu(tmp_path / "data")
    load_tu("TOY", tmp_path / "data", cache=tmp_path / "cache")
    monkeypatch.setattr("graph_ood.data._real.read_tu_data", None)
    assert len(load_tu("TOY", tmp_path / "data", cache=tmp_path / "cache")) == 3


@pytest.mark.parametrize("below", ["", "tu", "graph/tu"])
def test_where_the_files_may_lie(tmp_path, below):
    write_tu(tmp_path / below)
    assert len(load_tu("TOY", tmp_path)) == 3


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="OTHER_A"):
        load_tu("OTHER", tmp_path)
    write_tu(tmp_path, graph_labels=None)
    with pytest.raises(FileNotFoundError, match="TOY_graph_labels"):
        load_tu("TOY", tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"graph_labels": "1\n1\n"},
        {"graph_indicator": "1\n1\n1\n"},
        {"A": "1, x\n"},
        {"node_labels": "1\n1\n"},
        {"A": "1, 99\n99, 1\n", "edge_labels": "0\n0\n"},
    ],
)
def test_files_that_do_not_fit(tmp_path, fields):
    write_tu(tmp_path, **fields)
    with pytest.raises(ValueError, match="TOY"):
        load_tu("TOY", tmp_path)


@pytest.mark.parametrize(
    ("name", "features", "word"), [("TOY", "degree", "features"), ("../TOY", "cal", "name"), ("", "cal", "name")]
)
def test_bad_arguments_of_load_tu(tmp_path, name, features, word):
    with pytest.raises(ValueError, match=word):
        load_tu(name, tmp_path, features=features)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"x": torch.ones(2, 1)}, "x"),
        ({"max_degree": 0}, "max_degree"),
        ({"edge_index": torch.ones(2, 2)}, "edge_index"),
    ],
)
def test_bad_arguments_of_cal_features(change, word):
    with pytest.raises(ValueError, match=word):
        cal_features(**{"x": None, "edge_index": torch.tensor([[0], [1]]), "num_nodes": 3} | change)


# --- split by size ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sizes():
    return GoodMotif(domain="size", num_data=500)


@pytest.mark.parametrize("mode", ["sl", "ls"])
def test_size_split(sizes, mode):
    splits = size_split(sizes, mode=mode)
    number = {split: [graph.num_nodes for graph in part] for split, part in splits.items()}
    assert {split: len(part) for split, part in splits.items()} == {"train": 240, "val": 30, "test": 30}
    assert sorted(n for part in number.values() for n in part) == sorted(graph.num_nodes for graph in sizes)
    held_out = number["val"] + number["test"]
    assert max(number["train"]) <= min(held_out) if mode == "sl" else min(number["train"]) >= max(held_out)
    # Shuffled halves: the test isn't the more extreme one.
    assert max(number["val"]) > min(number["test"]) if mode == "sl" else min(number["val"]) < max(number["test"])


def test_size_split_is_disjoint_and_seeded(sizes):
    first, again, other = (size_split(sizes, seed=seed) for seed in (0, 0, 1))
    indices = [i for part in first.values() for i in part.indices()]
    assert sorted(indices) == list(range(len(sizes)))
    assert list(first["test"].indices()) == list(again["test"].indices())
    assert list(first["test"].indices()) != list(other["test"].indices())
    assert list(first["train"].indices()) == list(other["train"].indices())


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"mode": "large"}, "mode"),
        ({"held_out": 0}, "held_out"),
        ({"held_out": 1.0}, "held_out"),
        ({"held_out": 0.001}, "held_out"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_arguments_of_size_split(sizes, arguments, word):
    with pytest.raises(ValueError, match=word):
        size_split(sizes, **arguments)


# --- checks ----------------------------------------------------------------------------------------------------------


def graph(**change) -> Data:
    fields = {"x": torch.ones(3, 2), "edge_index": torch.tensor([[0, 1], [1, 0]]), "y": torch.tensor([1])}
    return Data(**{key: value for key, value in (fields | change).items() if value is not None})


def with_entry(value: float) -> torch.Tensor:
    x = torch.ones(3, 2)
    x[2, 1] = value
    return x


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"x": None}, "x must be"),
        ({"x": torch.ones(3, 2, dtype=torch.long)}, "x must be"),
        ({"x": torch.ones(3)}, "x must be"),
        ({"x": torch.ones(3, 5)}, "x has 5 columns"),
        ({"x": torch.ones(0, 2)}, "x has no rows"),
        ({"x": torch.ones(3, 0)}, "x has no columns"),
        ({"x": with_entry(float("nan"))}, "x has an entry that isn't finite, in row 2"),
        ({"x": with_entry(float("-inf"))}, "x has an entry that isn't finite, in row 2"),
        ({"edge_index": None}, "edge_index must be"),
        ({"edge_index": torch.ones(2, 2)}, "edge_index must be"),
        ({"edge_index": torch.ones(3, 2, dtype=torch.long)}, "edge_index must be"),
        ({"edge_index": torch.empty(2, 0, dtype=torch.long)}, "edge_index has no edges"),
        ({"edge_index": torch.tensor([[0, 3], [3, 0]])}, r"edge_index has nodes outside \[0, 3\)"),
        ({"edge_index": torch.tensor([[0, -1], [-1, 0]])}, "edge_index has nodes outside"),
        ({"y": None}, "y must be"),
        ({"y": torch.tensor([1.0])}, "y must be"),
        ({"y": torch.tensor([1, 0])}, "y must be"),
        ({"y": torch.tensor([3])}, r"y must be in \[0, 3\), got 3"),
        ({"y": torch.tensor([-1])}, r"y must be in \[0, 3\)"),
    ],
)
def test_a_bad_graph_is_named(change, word):
    graphs = [graph(), graph(), graph(**change), graph()]
    with pytest.raises(ValueError, match=f"graph 2: {word}"):
        check_graphs(graphs, num_classes=3)


def test_good_graphs_pass():
    check_graphs([graph(), graph()])
    check_graphs(GoodMotif(num_data=60), num_classes=3, allow_isolated=False)
    check_graphs(SynB(bias=0.5, split="val", total=80), num_classes=4, allow_isolated=False)


def test_what_may_be_allowed():
    edgeless = graph(edge_index=torch.empty(2, 0, dtype=torch.long))
    check_graphs([graph(), edgeless], allow_edgeless=True)
    with pytest.raises(ValueError, match="graph 1: edge_index leaves node 2 without an edge"):
        check_graphs([graph(x=torch.ones(2, 2)), graph()], allow_isolated=False)
    with pytest.raises(ValueError, match="no graphs"):
        check_graphs([])
    with pytest.raises(ValueError, match="graph 0: y must be >= 0"):
        check_graphs([graph(y=torch.tensor([-2]))])


def test_the_index_is_right_beyond_the_first_chunk():
    graphs = [graph() for _ in range(4200)]
    graphs[4111] = graph(x=with_entry(float("nan")))
    with pytest.raises(ValueError, match="graph 4111: x"):
        check_graphs(graphs)


# --- environments ----------------------------------------------------------------------------------------------------


def test_environments_are_numbered_without_gaps():
    graphs = [graph(env_id=torch.tensor([e]), y=torch.tensor([y])) for e, y in [(7, 0), (2, 1), (7, 1), (2, 0)]]
    assert environment_ids(graphs, every_class=True).tolist() == [1, 0, 1, 0]
    test = GoodMotif(split="test", num_data=60)
    assert environment_ids(test).tolist() == [0] * 6
    assert environment_ids(test[:3], field="base_id").tolist() == [0] * 3
    assert environment_ids([graph(env_id=4), graph(env_id=0)]).tolist() == [1, 0]


def test_a_missing_class_is_named():
    graphs = [graph(env_id=torch.tensor([e]), y=torch.tensor([y])) for e, y in [(0, 0), (0, 1), (5, 1)]]
    environment_ids(graphs)
    with pytest.raises(ValueError, match=r"environment 5 \(env_id\) has no graph of class 0"):
        environment_ids(graphs, every_class=True)
    with pytest.raises(ValueError, match=r"environment 0 \(env_id\) has no graph of class 2"):
        environment_ids(graphs, every_class=True, num_classes=3)


@pytest.mark.parametrize(
    ("graphs", "word"),
    [
        ([], "no graphs"),
        ([graph(env_id=torch.tensor([0])), graph()], "graph 1: env_id must be"),
        ([graph(env_id=torch.tensor([0, 1]))], "graph 0: env_id must be"),
        ([graph(env_id=torch.tensor([0.0]))], "graph 0: env_id must be"),
        ([graph(env_id=torch.tensor([0])), graph(env_id=torch.tensor([-1]))], "graph 1: env_id is -1"),
    ],
)
def test_bad_environments(graphs, word):
    with pytest.raises(ValueError, match=word):
        environment_ids(graphs)


def test_concept_splits_without_environments_are_refused():
    with pytest.raises(ValueError, match="environment is unknown"):
        environment_ids(GoodMotif(shift="concept", split="val", num_data=60))


@pytest.mark.parametrize(
    ("env_id", "y", "num_classes", "word"),
    [
        ([0], [0, 1], None, "y"),
        ([], [], None, "env_id"),
        ([-1, 0], [0, 1], None, "env_id"),
        ([0, 0], [0, -1], None, "y"),
        ([0, 0], [0, 2], 2, "y"),
    ],
)
def test_bad_arguments_of_environment_counts(env_id, y, num_classes, word):
    with pytest.raises(ValueError, match=word):
        environment_counts(torch.tensor(env_id, dtype=torch.long), torch.tensor(y, dtype=torch.long), num_classes)
