"""Attacks and the comparisons built on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric.data import Data
from torch_geometric.utils import is_undirected

from graph_unlearn.attacks import (
    UPDATES,
    add_edges,
    adversarial_edges,
    efficacy_curve,
    membership_auc,
    membership_table,
    posterior,
)
from graph_unlearn.data import load_graph, synthetic_graph
from graph_unlearn.nets import GCN
from graph_unlearn.requests import remove_edges
from graph_unlearn.training import TrainConfig

CG = {"gif_cg": UPDATES["gif_cg"]}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def complete(labels: list[int]) -> Data:
    n = len(labels)
    a, b = torch.tensor([(i, j) for i in range(n) for j in range(n) if i != j]).T
    return Data(edge_index=torch.stack([a, b]), y=torch.tensor(labels))


@settings(deadline=None, max_examples=60)
@given(n=st.integers(20, 60), ratio=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_adversarial_edges_are_what_they_should_be(n, ratio, seed):
    data = synthetic_graph(n, 2, 3, num_edges=n // 2, test_size=0.2, seed=seed)
    undirected = data.edge_index.shape[1] // 2
    new = adversarial_edges(data, data.train_mask, ratio, generator(seed))
    assert new.shape == (2, int(ratio * undirected))
    assert data.train_mask[new].all()
    assert (data.y[new[0]] != data.y[new[1]]).all()
    assert (new[0] < new[1]).all()
    codes = new[0] * n + new[1]
    assert len(codes.unique()) == len(codes)
    assert not torch.isin(codes, data.edge_index[0] * n + data.edge_index[1]).any()
    assert torch.equal(new, adversarial_edges(data, data.train_mask, ratio, generator(seed)))
    corrupted = add_edges(data, new)
    assert is_undirected(corrupted.edge_index)
    assert torch.equal(remove_edges(corrupted.edge_index, new), data.edge_index)


def test_all_pairs_can_be_drawn_and_no_more():
    graph = Data(edge_index=torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]]), y=torch.tensor([0, 0, 1, 1]))
    everyone = torch.ones(4, dtype=torch.bool)
    new = adversarial_edges(graph, everyone, 2.0, generator(0))
    assert sorted(map(tuple, new.T.tolist())) == [(0, 2), (0, 3), (1, 2), (1, 3)]
    with pytest.raises(ValueError, match="only 4 pairs"):
        adversarial_edges(graph, everyone, 2.5, generator(0))
    with pytest.raises(ValueError, match="only 0 pairs"):
        adversarial_edges(complete([0, 1, 2]), everyone[:3], 1.0, generator(0))


def test_every_pair_is_equally_likely():
    graph = Data(edge_index=torch.tensor([[0, 1], [1, 0]]), y=torch.tensor([0, 0, 1, 1, 2]))
    everyone, g = torch.ones(5, dtype=torch.bool), generator(0)
    count = torch.zeros(25)
    for _ in range(800):
        a, b = adversarial_edges(graph, everyone, 1.0, g)
        count[a * 5 + b] += 1
    drawn = count[count > 0]
    assert len(drawn) == 8
    assert (drawn - 100).abs().max() < 5 * 100**0.5


def test_add_edges_leaves_the_graph_alone():
    data = synthetic_graph(20, 4, 2)
    before = data.edge_index.clone()
    after = add_edges(data, torch.tensor([[0], [19]]))
    assert torch.equal(data.edge_index, before)
    assert after.edge_index[:, -2:].tolist() == [[0, 19], [19, 0]]
    assert after.x is data.x


def test_l2_attack_sees_movement_only():
    before = torch.rand(30, 4, generator=generator(0)).softmax(1)
    members, others = torch.arange(10), torch.arange(10, 30)
    assert membership_auc(before, before, members, others) == 0.5
    after = before.clone()
    after[:10] = after[:10].roll(1, 1)
    assert membership_auc(before, after, members, others) == 1.0
    assert membership_auc(before, after, others, members) == 0.0
    # The labels play no part in it.
    assert membership_auc(before, after, members, others, "l2", torch.zeros(30).long()) == 1.0


def test_loss_attack_is_the_auc_of_the_negative_loss():
    from sklearn.metrics import roc_auc_score

    p = torch.rand(40, 3, generator=generator(1)).softmax(1).double()
    y = torch.randint(3, (40,), generator=generator(2))
    members, others = torch.arange(0, 40, 4), torch.arange(1, 40, 2)
    nodes = torch.cat([members, others])
    expected = roc_auc_score([1] * 10 + [0] * 20, p[nodes, y[nodes]].log().numpy())
    assert membership_auc(p, p, members, others, "loss", y) == pytest.approx(expected, abs=1e-12)
    assert membership_auc(p.roll(1, 0), p, members, others, "loss", y) == pytest.approx(expected, abs=1e-12)
    certain = torch.eye(3)[y]  # zero probabilities: infinite losses for wrong classes
    assert membership_auc(certain, certain, members, others, "loss", (y + 1) % 3) == 0.5


def test_posterior_of_logits_and_of_log_probabilities():
    data = synthetic_graph(20, 4, 2)
    model = GCN(4, 2).train()
    p = posterior(model, data)
    assert model.training
    assert torch.allclose(p.sum(1), torch.ones(20))
    assert torch.allclose(p, model.eval()(data.x, data.edge_index).exp())


def test_membership_finds_an_overfit_model():
    data = synthetic_graph(200, 128, 3, num_edges=300, signal=0.3, homophily=0.4, test_size=0.3)
    config = TrainConfig(epochs=150, lr=0.02, weight_decay=0.0)
    rows = membership_table(lambda: GCN(128, 3, 32, dropout=0.0), data, 0.3, seeds=(0, 1), config=config, updates={})
    assert [(row["seed"], row["method"]) for row in rows] == [
        (seed, name) for seed in (0, 1) for name in ("no_update", "retrain")
    ]
    kept, retrained = rows[::2], rows[1::2]
    for row, fresh in zip(kept, retrained, strict=True):
        assert row["l2"] == 0.5
        assert row["loss"] > 0.62  # the old model knows its training nodes
        assert fresh["loss"] < row["loss"] - 0.1  # the retrained one has never seen them


def test_rows_are_paired_and_repeat_themselves():
    data = synthetic_graph(150, 16, 3)
    make_model = lambda: GCN(16, 3)
    config = TrainConfig(epochs=25)
    rows = efficacy_curve(make_model, data, [0.0, 0.5], seeds=(0, 1), config=config, updates=CG)
    assert [(row["ratio"], row["seed"]) for row in rows] == [(0.0, 0), (0.0, 1), (0.5, 0), (0.5, 1)]
    nothing = rows[0]
    assert nothing["edges"] == 0
    assert nothing["corrupted"] == nothing["no_update"] == nothing["gif_cg"] == nothing["retrain"]
    (alone,) = efficacy_curve(make_model, data, [0.5], seeds=(1,), config=config, updates=CG)
    assert alone == rows[3]
    table = membership_table(make_model, data, 0.1, config=config, updates=CG)
    assert table == membership_table(make_model, data, 0.1, config=config, updates=CG)
    assert [row["method"] for row in table] == ["no_update", "gif_cg", "retrain"]
    assert table[1]["l2"] != 0.5


def test_refused_updates_are_reported():
    data = synthetic_graph(150, 16, 3)
    updates = {
        "wild": {"solver": "neumann", "damping": 0.0, "scale": 1e-2, "num_iter": 100, "rtol": 1e-6},
        "shy": {"max_loss_rise": 0.0},
    }
    (row,) = efficacy_curve(lambda: GCN(16, 3), data, [0.9], config=TrainConfig(epochs=25), updates=updates)
    assert row["refused"] == ["wild"]
    assert row["wild"] == row["no_update"]
    assert set(row["shortened"]) <= {"shy"}


def posteriors(rows: int = 4) -> Any:
    return torch.full((rows, 2), 0.5)


ONE, TWO = torch.tensor([0]), torch.tensor([1])
GRAPH = synthetic_graph(30, 4, 2)
BAD = {
    "ratio": (lambda: adversarial_edges(GRAPH, GRAPH.train_mask, -0.1), "ratio"),
    "no node": (lambda: adversarial_edges(GRAPH, GRAPH.train_mask & False, 0.1), "train_mask"),
    "edge shape": (lambda: add_edges(GRAPH, torch.tensor([1, 2])), "edges must have shape"),
    "edge id": (lambda: add_edges(GRAPH, torch.tensor([[1], [30]])), "out of range"),
    "attack": (lambda: membership_auc(posteriors(), posteriors(), ONE, TWO, "l1"), "unknown attack"),  # type: ignore[arg-type]
    "shapes": (lambda: membership_auc(posteriors(), posteriors(5), ONE, TWO), "posteriors"),
    "nan": (lambda: membership_auc(posteriors(), posteriors() * torch.nan, ONE, TWO), "finite"),
    "common": (lambda: membership_auc(posteriors(), posteriors(), ONE, ONE), "in common"),
    "empty": (lambda: membership_auc(posteriors(), posteriors(), ONE[:0], TWO), "members must not be empty"),
    "member id": (lambda: membership_auc(posteriors(), posteriors(), ONE + 9, TWO), "out of range"),
    "labels": (lambda: membership_auc(posteriors(), posteriors(), ONE, TWO, "loss"), "labels"),
    "name": (lambda: efficacy_curve(lambda: GCN(4, 2), GRAPH, updates={"retrain": {}}), "retrain"),
    "name of a row": (lambda: membership_table(lambda: GCN(4, 2), GRAPH, updates={"no_update": {}}), "no_update"),
    "nothing deleted": (lambda: membership_table(lambda: GCN(4, 2), GRAPH, 0.001), "deletes none"),
    "no test nodes": (lambda: efficacy_curve(lambda: GCN(4, 2), without_test()), "test_mask"),
}


def without_test() -> Any:
    data = GRAPH.__copy__()
    del data.test_mask
    return data


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
def test_deleting_adversarial_edges_repairs_the_model(data_root, tmp_path):
    """Cora, GCN without self loops, ten seeds; each comparison is paired by seed."""
    data = load_graph("cora", data_root, cache=tmp_path)
    features, classes = data.x.shape[1], data.num_classes
    data.x = data.x.to_sparse()
    updates = {"gif": UPDATES["gif"], "gif_cg": UPDATES["gif_cg"]}
    rows = efficacy_curve(lambda: GCN(features, classes), data, [0.9], seeds=range(10), updates=updates)

    def mean(name: str, other: str) -> float:
        return sum(row[name] - row[other] for row in rows) / len(rows)

    assert mean("no_update", "corrupted") > 0.03  # cleaning the graph alone
    assert mean("gif", "no_update") > 0.005
    assert mean("gif_cg", "no_update") > 0
