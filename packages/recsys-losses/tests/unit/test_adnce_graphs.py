from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from recsys_losses.adnce import (
    GRAPH_AUGMENTATIONS,
    GINEncoder,
    augment_graphs,
    embed_graphs,
    evaluate_svm,
    load_tu_graphs,
    train_graph_encoder,
)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _ring(nodes: int, features: int = 2):
    from torch_geometric.data import Data

    start = torch.arange(nodes)
    end = (start + 1) % nodes
    x = torch.arange(nodes * features, dtype=torch.float32).view(nodes, features) + 100
    return Data(x=x, edge_index=torch.stack([torch.cat([start, end]), torch.cat([end, start])]))


def _star(leaves: int):
    from torch_geometric.data import Data

    leaf = torch.arange(1, leaves + 1)
    hub = torch.zeros_like(leaf)
    edge_index = torch.stack([torch.cat([hub, leaf]), torch.cat([leaf, hub])])
    return Data(x=torch.ones(leaves + 1, 2), edge_index=edge_index)


def _two_kinds(number: int = 24):
    graphs = []
    for i in range(number):
        graph = _ring(6 + i % 5) if i % 2 else _star(6 + i % 5)
        graph.x, graph.y = torch.ones(graph.num_nodes, 2), torch.tensor([i % 2])
        graphs.append(graph)
    return graphs


def _batch(*graphs):
    from torch_geometric.data import Batch

    return Batch.from_data_list(list(graphs))


def _write_tu(root, name="TOY", *, labels=True):
    """Two triangles and a path of two nodes, of two classes."""
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    edges = [(1, 2), (2, 3), (3, 1), (4, 5), (5, 6), (6, 4), (7, 8)]
    lines = [f"{a}, {b}\n{b}, {a}\n" for a, b in edges]
    (raw / f"{name}_A.txt").write_text("".join(lines))
    (raw / f"{name}_graph_indicator.txt").write_text("1\n1\n1\n2\n2\n2\n3\n3\n")
    (raw / f"{name}_graph_labels.txt").write_text("1\n1\n-1\n")
    if labels:
        (raw / f"{name}_node_labels.txt").write_text("0\n1\n2\n0\n0\n0\n1\n1\n")
    return raw


# --- data ---------------------------------------------------------------------------------------------------------


def test_tu_files_are_read_and_nothing_is_written(tmp_path, capsys):
    raw = _write_tu(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    graphs = load_tu_graphs(tmp_path, "TOY")
    assert sorted(tmp_path.rglob("*")) == before
    assert capsys.readouterr().err == ""
    assert [graph.num_nodes for graph in graphs] == [3, 3, 2]
    assert [int(graph.y) for graph in graphs] == [1, 1, 0]
    assert graphs[0].x.tolist() == torch.eye(3).tolist()
    assert graphs[2].x.tolist() == [[0.0, 1.0, 0.0]] * 2
    assert sorted(map(tuple, graphs[2].edge_index.T.tolist())) == [(0, 1), (1, 0)]
    (raw / "TOY_node_labels.txt").unlink()
    assert [graph.x.tolist() for graph in load_tu_graphs(tmp_path, "TOY")][2] == [[1.0], [1.0]]


def test_missing_and_broken_tu_files(tmp_path):
    raw = _write_tu(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no file .*TOYS_A.txt; data sets in .*: TOY"):
        load_tu_graphs(tmp_path, "TOYS")
    (raw / "TOY_A.txt").write_text("1, 2\n2, x\n")
    with pytest.raises(ValueError, match=r"cannot read the TU files in .*TOY/raw"):
        load_tu_graphs(tmp_path, "TOY")
    (raw / "TOY_graph_labels.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"TOY_graph_labels.txt"):
        load_tu_graphs(tmp_path, "TOY")


@pytest.mark.parametrize(
    ("name", "number", "features", "largest"),
    [("MUTAG", 188, 7, 125), ("PROTEINS", 1113, 3, 663), ("IMDB-BINARY", 1000, 1, 500)],
)
def test_real_tu_data(data_root, name, number, features, largest):
    graphs = load_tu_graphs(data_root / "graph" / "tu", name)
    assert len(graphs) == number
    assert {graph.x.shape[1] for graph in graphs} == {features}
    assert torch.cat([graph.y for graph in graphs]).bincount().max() == largest


# --- augmentations ------------------------------------------------------------------------------------------------


def _kinds(monkeypatch, *kinds):
    monkeypatch.setitem(GRAPH_AUGMENTATIONS, "random2", kinds)


def _views(batch, number=30):
    for seed in range(number):
        yield augment_graphs(batch, generator=_generator(seed))


def test_dropped_nodes_are_a_tenth(monkeypatch):
    _kinds(monkeypatch, "nodes")
    gone = set()
    for view in _views(_batch(_ring(30), _ring(9))):
        ids = ((view.x[:, 0] - 100) / 2).long()
        assert torch.bincount(view.batch).tolist() in ([27, 9], [26, 9], [25, 9])  # a node between two dropped ones
        kept = ids[view.batch == 0].tolist()
        gone |= set(range(30)) - set(kept)
        ends = ids[view.edge_index]
        same = view.batch[view.edge_index[0]] == 0
        step = (ends[0] - ends[1])[same].abs()
        assert ((step == 1) | (step == 29)).all()  # only edges of the ring
        assert set(ends[:, same].flatten().tolist()) == set(kept)
    assert len(gone) > 25


def test_a_subgraph_is_connected_and_has_a_fifth_of_the_nodes(monkeypatch):
    _kinds(monkeypatch, "subgraph")
    starts = set()
    for view in _views(_batch(_ring(20), _star(14))):
        assert torch.bincount(view.batch).tolist()[0] == 5  # the seed and four more: an arc of the ring
        ids = ((view.x[view.batch == 0, 0] - 100) / 2).long().tolist()
        arc = {(i - ids[0]) % 20 for i in ids}
        assert any(arc == {(k + j) % 20 for j in range(5)} for k in range(20))
        assert (view.edge_index[0] < 5).sum() == 8
        # a star grows through its hub, so the frontier has to be extended beyond the seed's neighbour
        assert torch.bincount(view.batch).tolist()[1] == 4
        starts.add(min(ids))
    assert len(starts) > 8


def test_removed_edges_are_a_tenth(monkeypatch):
    _kinds(monkeypatch, "edges")
    for view in _views(_batch(_ring(20), _ring(20))):
        assert torch.bincount(view.batch[view.edge_index[0]]).tolist() == [36, 36]


def test_masked_features_are_a_tenth_and_random(monkeypatch):
    _kinds(monkeypatch, "features")
    batch = _batch(_ring(20), _ring(20))
    before = batch.x.clone()
    values = []
    for view in _views(batch, 100):
        changed = (view.x < 50).all(1)
        assert torch.bincount(view.batch[changed]).tolist() == [2, 2]
        assert torch.equal(view.x[~changed], before[~changed])
        assert view.num_nodes == 40
        values.append(view.x[changed])
    noise = torch.cat(values)
    assert noise.mean().item() == pytest.approx(0.5, abs=0.06)
    assert noise.std().item() == pytest.approx(0.5, abs=0.06)
    assert torch.equal(batch.x, before)


@pytest.mark.parametrize("augmentation", sorted(GRAPH_AUGMENTATIONS))
def test_every_graph_keeps_a_node_and_gets_its_own_change(augmentation):
    from torch_geometric.data import Data

    lonely = Data(x=torch.ones(3, 2), edge_index=torch.zeros(2, 0, dtype=torch.long))
    batch = _batch(_ring(30), lonely, _ring(3), *[_ring(40)] * 40)
    view = augment_graphs(batch, augmentation, generator=_generator())
    sizes = torch.bincount(view.batch, minlength=43)
    assert (sizes >= 1).all()
    assert sizes[1] == 1
    assert view.edge_index.max() < view.num_nodes
    assert (view.batch[view.edge_index[0]] == view.batch[view.edge_index[1]]).all()
    big = sizes[3:]
    assert (big == 9).any()
    assert (big > 30).any()
    again = augment_graphs(batch, augmentation, generator=_generator())
    assert torch.equal(view.x, again.x)
    assert torch.equal(view.edge_index, again.edge_index)
    other = augment_graphs(batch, augmentation, generator=_generator(1))
    assert view.num_nodes != other.num_nodes or not torch.equal(view.x, other.x)


# --- encoder and training -----------------------------------------------------------------------------------------


def test_encoder_is_invariant_to_the_order_of_nodes_and_tells_graphs_apart():
    encoder = GINEncoder(2, hidden=8, generator=_generator()).eval()
    ring, star = _two_kinds(4)[1], _two_kinds(4)[0]
    order = torch.randperm(ring.num_nodes, generator=_generator())
    from torch_geometric.data import Data

    renamed = Data(x=ring.x[order.argsort()], edge_index=order[ring.edge_index])
    one, two, other = embed_graphs(encoder, [ring, renamed, star])
    torch.testing.assert_close(one, two)
    assert (one - other).abs().max() > 0.1
    assert one.shape == (24,)


def test_seed_gives_the_same_run_whatever_the_global_generator_does():
    def run(seed):
        return train_graph_encoder(_two_kinds(), temperature=0.2, mu=0.7, sigma=1.0, epochs=2, hidden=8, seed=seed)

    torch.manual_seed(1)
    first = run(3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = run(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert [r["loss"] for r in first.epochs.history] == [r["loss"] for r in second.epochs.history]
    for a, b in zip(first.encoder.parameters(), second.encoder.parameters(), strict=True):
        assert torch.equal(a, b)
    assert run(4).epochs.history[0]["loss"] != first.epochs.history[0]["loss"]


@pytest.mark.parametrize("bump", [{}, {"mu": 0.7, "sigma": 1.0}])
def test_training_lowers_the_loss_and_separates_two_kinds(bump):
    graphs = _two_kinds(40)
    result = train_graph_encoder(graphs, temperature=0.2, epochs=15, batch_size=20, hidden=8, **bump)
    history = [record["loss"] for record in result.epochs.history]
    assert history[-1] < history[0] - 0.2
    labels = torch.cat([graph.y for graph in graphs])
    accuracy = evaluate_svm(embed_graphs(result.encoder, graphs), labels, folds=5)
    assert accuracy.mean > 0.9
    assert len(accuracy.folds) == 5


def test_an_interrupted_run_continues_exactly(tmp_path):
    graphs, options = _two_kinds(25), {"temperature": 0.2, "mu": 0.7, "sigma": 1.0, "batch_size": 12, "hidden": 8}
    whole = train_graph_encoder(graphs, epochs=4, augmentation="random4", **options)
    file = tmp_path / "checkpoint.safetensors"
    train_graph_encoder(graphs, epochs=2, augmentation="random4", checkpoint=file, **options)
    cut = train_graph_encoder(graphs, epochs=4, augmentation="random4", checkpoint=file, **options)
    assert [r["loss"] for r in cut.epochs.history] == [r["loss"] for r in whole.epochs.history]
    for name, value in whole.encoder.state_dict().items():
        assert torch.equal(cut.encoder.state_dict()[name], value), name
    with pytest.raises(ValueError, match=r"other settings: augmentation \(was 'random4', is 'random2'\)"):
        train_graph_encoder(graphs, epochs=4, checkpoint=file, **options)
    fresh = train_graph_encoder(graphs, epochs=1, checkpoint=file, resume=False, **options)
    assert len(fresh.epochs.history) == 1


GRAPHS = 25 * [None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"mu": 0.5}, "mu and sigma"),
        ({"augmentation": "random5"}, r"unknown augmentation 'random5'; accepted: random2, random3, random4"),
        ({"epochs": 0}, "epochs must be >= 1"),
        ({"batch_size": 1}, "batch_size must be at least two"),
        ({"lr": -1.0}, "lr must be a positive"),
        ({"hidden": 0}, "hidden must be >= 1"),
        ({"num_layers": 0}, "num_layers must be >= 1"),
    ],
)
def test_bad_training_options(options, message):
    with pytest.raises(ValueError, match=message):
        train_graph_encoder(_two_kinds(4), **{"temperature": 0.2, **options})


def test_one_graph_is_not_enough():
    with pytest.raises(ValueError, match="at least two graphs"):
        train_graph_encoder(_two_kinds(1), temperature=0.2)


def test_a_last_batch_of_one_graph_joins_the_one_before():
    result = train_graph_encoder(_two_kinds(9), temperature=0.2, epochs=1, batch_size=4, hidden=4)
    assert len(result.epochs.history) == 1


def test_svm_errors_and_chance_level():
    x, y = torch.randn(80, 3, generator=_generator()), torch.arange(80) % 2
    assert evaluate_svm(x, y, folds=5).mean < 0.7
    assert evaluate_svm(x, y, folds=5, seed=1) == evaluate_svm(x, y, folds=5, seed=1)
    with pytest.raises(ValueError, match=r"expected embeddings \(n, d\)"):
        evaluate_svm(x, y[:3])
    with pytest.raises(ValueError, match=r"at least two classes of at least 10 rows.*got classes of \[75, 5\]"):
        evaluate_svm(x, (torch.arange(80) < 5).long())
    with pytest.raises(ValueError, match="at least two classes"):
        evaluate_svm(x, y * 0)
    with pytest.raises(ValueError, match="folds must be >= 2"):
        evaluate_svm(x, y, folds=1)


def test_import_loads_neither_pyg_nor_sklearn():
    code = "import sys, recsys_losses.adnce; print([m for m in ('torch_geometric', 'sklearn', 'scipy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.slow
def test_mutag(data_root):
    # An independent implementation: InfoNCE 87.1 +- 2.6, ADNCE 87.5 +- 1.5; the larger class has 66.5 %.
    graphs = load_tu_graphs(data_root / "graph" / "tu", "MUTAG")
    labels = torch.cat([graph.y for graph in graphs])
    means = {}
    for name, bump in (("InfoNCE", {}), ("ADNCE", {"mu": 0.7, "sigma": 1.0})):
        accuracies = []
        for seed in range(5):
            encoder = train_graph_encoder(graphs, temperature=0.15, seed=seed, **bump).encoder
            accuracies.append(evaluate_svm(embed_graphs(encoder, graphs), labels, seed=seed).mean)
        means[name] = sum(accuracies) / 5
    assert min(means.values()) > 0.84
    assert means["ADNCE"] > means["InfoNCE"] - 0.01
