"""GOOD-Motif and Spurious-Motif: what the shifts do, the published statistics, seeds, files."""

from __future__ import annotations

import pytest
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import chisquare
from torch_geometric.loader import DataLoader

from graph_ood.data import GoodMotif, good_motif_split_sizes, load_good_motif, motif_graph, spurious_motif

BASES = ("wheel", "tree", "ladder", "star", "path")
MOTIFS = ("house", "cycle", "crane")
WIDTHS = {"covariate": (6, 10, 15, 30, 70), "concept": (10, 40, 70)}


def equally_frequent(values, classes) -> bool:
    counts = values.bincount(minlength=classes)
    return chisquare(counts.tolist()).pvalue > 1e-3


def same(a, b) -> bool:
    return set(a.keys()) == set(b.keys()) and all(torch.equal(a[key], b[key]) for key in a.keys())  # noqa: SIM118


def node_counts(dataset) -> torch.Tensor:
    return dataset.slices["x"].diff()


@pytest.fixture(scope="module")
def large():
    """Every domain and shift, 5000 graphs each."""
    return {
        (domain, shift): {
            split: GoodMotif(None, domain, shift, split, num_data=5000) for split in ("train", "val", "test")
        }
        for domain in ("base", "size")
        for shift in ("covariate", "concept")
    }


def global_edges(dataset) -> torch.Tensor:
    edges = dataset.slices["edge_index"].diff()
    return dataset._data.edge_index + dataset.slices["x"][:-1].repeat_interleave(edges)


@pytest.mark.parametrize("domain", ["base", "size"])
@pytest.mark.parametrize("shift", ["covariate", "concept", "no_shift"])
def test_graphs_are_undirected_simple_and_connected(domain, shift):
    for split, dataset in load_good_motif(domain=domain, shift=shift, num_data=300).items():
        edges = global_edges(dataset)
        n = len(dataset._data.x)
        keys = edges[0] * n + edges[1]
        assert torch.equal(keys.sort().values, keys.unique()), split
        assert torch.equal((edges[1] * n + edges[0]).sort().values, keys.sort().values)
        assert (edges[0] != edges[1]).all()
        matrix = coo_array((torch.ones(len(keys)).numpy(), tuple(edges.numpy())), shape=(n, n))
        # One component per graph: every graph is connected, and none reaches into the next.
        assert connected_components(matrix)[0] == len(dataset)


@pytest.mark.parametrize("domain", ["base", "size"])
def test_fields(domain):
    dataset = GoodMotif(domain=domain, num_data=300)
    graph = dataset[17]
    n, m = graph.num_nodes, graph.num_edges
    assert torch.equal(graph.x, torch.ones(n, 1))
    assert graph.node_gt.dtype == graph.edge_gt.dtype == torch.bool
    assert torch.equal(graph.node_gt, torch.arange(n) >= n - 5)
    assert torch.equal(graph.edge_gt, graph.node_gt[graph.edge_index].all(0))
    assert graph.edge_index.shape == (2, m)
    names = {"y", "env_id", "base_id", "motif_id"} | ({"width_id"} if domain == "size" else set())
    assert set(graph.keys()) == {"x", "edge_index", "node_gt", "edge_gt"} | names
    for name in names:
        assert graph[name].shape == (1,)
        assert graph[name].dtype == torch.int64
    batch = next(iter(DataLoader(dataset, batch_size=8)))
    assert batch.y.shape == batch.env_id.shape == (8,)
    assert batch.node_gt.sum() == 40


def test_base_and_motif_are_what_the_labels_say():
    """Without noise edges a graph of the stated base, motif and width is found exactly."""
    for graph in GoodMotif(shift="no_shift", num_data=300)[:60]:
        base, motif = BASES[graph.base_id], MOTIFS[graph.motif_id]
        num_base = graph.num_nodes - 5
        width = {"ladder": num_base // 2, "star": num_base - 1, "tree": num_base + 1}.get(base, num_base)
        pairs = {(i, j) for i, j in graph.edge_index.t().tolist() if i < j}
        fits = []
        for attach_to in range(num_base):
            core = motif_graph(base=base, width=width, motif=motif, attach_to=attach_to)
            extra = pairs - set(core.edges)
            fits.append(
                set(core.edges) <= pairs
                and len(extra) <= int(0.05 * len(core.edges))
                and all(0 in (core.role[i], core.role[j]) for i, j in extra)
            )
        assert any(fits)


def test_noise_never_joins_two_nodes_with_a_role():
    """In a star every noise edge has the centre as one end; motifs keep their number of edges."""
    dataset = GoodMotif(domain="size", split="test", num_data=1500)
    more = 0
    for graph in dataset:
        assert int(graph.edge_gt.sum()) == 2 * (5, 6)[MOTIFS[graph.motif_id] != "cycle"]
        if graph.base_id == 3:
            num_base = graph.num_nodes - 5
            row, col = graph.edge_index[:, (graph.edge_index[0] < graph.edge_index[1])]
            assert int(((row > 0) & (col < num_base)).sum()) == 0
            assert int(((row > 0) & (row < num_base) & (col >= num_base)).sum()) <= 1
            more += int(((row == 0) & (col >= num_base)).sum())
    assert more > 0


def test_covariate_shift_of_the_base(large):
    splits = large["base", "covariate"]
    assert splits["train"].base_id.unique().tolist() == [0, 1, 2]
    assert splits["val"].base_id.unique().tolist() == [3]
    assert splits["test"].base_id.unique().tolist() == [4]
    for dataset in splits.values():
        assert torch.equal(dataset.env_id, dataset.base_id)
        assert equally_frequent(dataset.motif_id, 3)
    assert equally_frequent(splits["train"].base_id, 3)
    joint = 3 * splits["train"].base_id + splits["train"].motif_id
    assert equally_frequent(joint, 9)
    paths = node_counts(splits["test"]) - 5
    assert equally_frequent(paths - 5, 11)


def test_covariate_shift_of_the_size(large):
    splits = large["size", "covariate"]
    assert splits["train"].width_id.unique().tolist() == [0, 1, 2]
    assert splits["val"].width_id.unique().tolist() == [3]
    assert splits["test"].width_id.unique().tolist() == [4]
    for dataset in splits.values():
        assert torch.equal(dataset.env_id, dataset.width_id)
        assert equally_frequent(dataset.base_id, 5)
        assert equally_frequent(dataset.motif_id, 3)
    assert equally_frequent(splits["train"].width_id, 3)


@pytest.mark.parametrize("domain", ["base", "size"])
@pytest.mark.parametrize("shift", ["covariate", "concept"])
def test_widths_lie_around_their_class(large, domain, shift):
    for dataset in large[domain, shift].values():
        path = dataset.base_id == 4
        if not path.any():
            continue
        classes = torch.tensor(WIDTHS[shift])[dataset.width_id[path]] if domain == "size" else 10
        off = node_counts(dataset)[path] - 5 - classes
        assert off.min() >= -5
        assert off.max() <= 5
        assert len(off.unique()) == 11


@pytest.mark.parametrize("domain", ["base", "size"])
def test_concept_shift(large, domain):
    splits = large[domain, "concept"]
    field = "base_id" if domain == "base" else "width_id"
    agree = {split: dataset._data[field] == dataset.motif_id for split, dataset in splits.items()}
    train = splits["train"]
    assert 0.95 < agree["train"].float().mean() < 0.99
    # A share r follows the motif, of the others a third does by chance.
    for env, ratio in enumerate((0.99, 0.97, 0.95)):
        assert abs(agree["train"][train.env_id == env].float().mean() - (ratio + (1 - ratio) / 3)) < 0.015
    assert abs(agree["val"].float().mean() - (0.3 + 0.7 / 3)) < 0.05
    assert equally_frequent(3 * splits["test"]._data[field] + splits["test"].motif_id, 9)
    assert train.env_id.bincount().tolist() == [len(train) // 3] * 3
    assert splits["test"].env_id.unique().tolist() == splits["val"].env_id.unique().tolist() == [-1]
    assert sorted(train._data[field].unique().tolist()) == [0, 1, 2]
    if domain == "size":
        assert equally_frequent(train.base_id, 5)


def test_without_shift_the_splits_are_alike():
    splits = load_good_motif(shift="no_shift", num_data=3000)
    assert list(splits) == ["train", "val", "test"]
    assert {split: dataset.env_id.unique().tolist() for split, dataset in splits.items()} == {
        "train": [0, 1, 2],
        "val": [3],
        "test": [4],
    }
    assert all(equally_frequent(dataset.base_id, 5) for dataset in splits.values())
    assert all(equally_frequent(dataset.motif_id, 3) for dataset in splits.values())


# The reference statistics of the released files: nodes and directed edges per graph.
@pytest.mark.parametrize(
    ("domain", "split", "nodes", "edges"),
    [
        ("base", "train", 17.07, 48.89),
        ("base", "val", 15.82, 33.00),
        ("base", "test", 14.97, 31.54),
        ("size", "train", 16.93, 43.57),
        ("size", "val", 39.22, 107.03),
        ("size", "test", 87.18, 239.65),
    ],
)
def test_means_are_those_of_the_released_files(domain, split, nodes, edges):
    dataset = GoodMotif(domain=domain, split=split, num_data=5000 if split == "train" else 30000)
    assert len(dataset) == 3000
    assert dataset._data.num_nodes / 3000 == pytest.approx(nodes, rel=0.03)
    assert dataset._data.num_edges / 3000 == pytest.approx(edges, rel=0.03)


def test_label_noise():
    dataset = GoodMotif(num_data=15000)
    wrong = (dataset.y != dataset.motif_id).float().mean()
    assert abs(wrong - 0.0667) < 0.005
    clean = GoodMotif(num_data=300, label_noise=0)
    assert torch.equal(clean.y, clean.motif_id)
    random = GoodMotif(num_data=3000, label_noise=1)
    assert abs((random.y == random.motif_id).float().mean() - 1 / 3) < 0.03


@pytest.mark.parametrize("shift", ["covariate", "concept", "no_shift"])
@pytest.mark.parametrize("num_data", [30, 997, 3000])
def test_split_sizes(shift, num_data):
    sizes = good_motif_split_sizes(num_data, shift)
    splits = load_good_motif(shift=shift, num_data=num_data)
    assert {split: len(dataset) for split, dataset in splits.items()} == sizes
    assert sum(sizes.values()) <= num_data
    assert min(sizes.values()) > 0


def test_one_seed_one_data_set():
    a, b = (GoodMotif(domain="size", num_data=300, seed=3) for _ in range(2))
    assert same(a._data, b._data)
    other = GoodMotif(domain="size", num_data=300, seed=4)
    assert not torch.equal(a._data.y, other._data.y)
    id_val = GoodMotif(domain="size", split="id_val", num_data=300, seed=3)
    assert not all(same(id_val[i], a[i]) for i in range(10))


def test_a_graph_depends_on_its_index_only():
    small, big = (GoodMotif(shift="concept", num_data=n) for n in (300, 900))
    assert all(same(small[i], big[i]) for i in range(len(small)))


def test_graphs_are_kept_as_safetensors_and_read_again(tmp_path, monkeypatch):
    first = GoodMotif(tmp_path / "motif", "size", "concept", "val", 300, 5)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.suffix for path in files] == [".safetensors"]
    monkeypatch.setattr("graph_ood.data._motif.build_table", None)  # a second call must not make anything
    second = GoodMotif(tmp_path / "motif", "size", "concept", "val", 300, 5)
    assert len(first) == len(second) == 60
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    assert second.num_classes == 3
    with pytest.raises(TypeError):
        GoodMotif(tmp_path / "motif", "size", "concept", "val", 300, 6)  # another seed is another file


def test_a_damaged_or_foreign_file_is_refused(tmp_path):
    GoodMotif(tmp_path, num_data=30)
    [path] = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:50])
    with pytest.raises(ValueError, match="safetensors"):
        GoodMotif(tmp_path, num_data=30)
    GoodMotif(tmp_path, num_data=30, seed=1)
    [other] = [p for p in tmp_path.iterdir() if p != path]
    path.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match="another kind"):
        GoodMotif(tmp_path, num_data=30)


def test_num_classes_where_a_split_lacks_one():
    dataset = GoodMotif(split="id_val", num_data=30)
    assert len(dataset) == 3
    assert dataset.num_classes == dataset[:1].num_classes == 3
    assert dataset.num_features == 1


def test_transform_is_applied():
    def renamed(graph):
        graph.seen = graph.y + 10
        return graph

    assert GoodMotif(num_data=30, transform=renamed)[0].seen >= 10


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"domain": "basis"}, "domain"),
        ({"shift": "concpt"}, "shift.*did you mean 'concept'"),
        ({"split": "valid"}, "split"),
        ({"split": "id_val", "shift": "no_shift"}, "split"),
        ({"num_data": 29}, "num_data"),
        ({"num_data": 100.0}, "num_data"),
        ({"seed": -1}, "seed"),
        ({"label_noise": 1.5}, "label_noise"),
        ({"label_noise": float("nan")}, "label_noise"),
    ],
)
def test_bad_arguments(arguments, word):
    with pytest.raises(ValueError, match=word):
        GoodMotif(**arguments)


def test_spurious_motif():
    splits = spurious_motif(0.8, num_data=6000)
    assert {split: len(d) for split, d in splits.items()} == {"train": 3000, "id_val": 500, "val": 500, "test": 2000}
    for split, dataset in splits.items():
        assert torch.equal(dataset.y, dataset.motif_id)
        assert dataset.y.bincount().max() - dataset.y.bincount().min() <= 1
        follows = dataset.base_id == dataset.motif_id
        expected = 0.8 if split in ("train", "id_val") else 1 / 3
        assert abs(follows.float().mean() - expected) < 0.06, split
        others = (dataset.base_id - dataset.motif_id)[~follows] % 3
        assert equally_frequent(others - 1, 2)
    assert equally_frequent(3 * splits["test"].base_id + splits["test"].y, 9)


def test_spurious_motif_has_the_bases_and_motifs_it_names():
    dataset = spurious_motif(0.5, num_data=60)["train"]
    for graph in dataset:
        num_base = graph.num_nodes - 5
        inside = int((~graph.node_gt[graph.edge_index].any(0)).sum()) // 2
        # Noise can only add: a tree has n - 1 edges, a ladder 3n/2 - 2, a wheel 2n - 2.
        least = (num_base - 1, 3 * num_base // 2 - 2, 2 * num_base - 2)[graph.base_id]
        assert 0 <= inside - least <= 2
        assert int(graph.edge_gt.sum()) // 2 == (5, 6, 6)[graph.y]


@pytest.mark.parametrize(("bias", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_spurious_motif_at_the_ends_of_the_bias(bias, share):
    dataset = spurious_motif(bias, num_data=120)["train"]
    assert (dataset.base_id == dataset.motif_id).float().mean() == share


@pytest.mark.parametrize(
    ("arguments", "word"),
    [({"bias": 1.1}, "bias"), ({"bias": -0.1}, "bias"), ({"bias": 0.5, "num_data": 12}, "num_data")],
)
def test_bad_arguments_of_spurious_motif(arguments, word):
    with pytest.raises(ValueError, match=word):
        spurious_motif(**arguments)
