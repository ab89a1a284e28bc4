from __future__ import annotations

import pytest
import torch

from graph_unlearn.data import synthetic_graph
from graph_unlearn.nets import GAT, GCN
from graph_unlearn.training import TrainConfig, accuracy, evaluation_mode, paper_config, retrain, seeded, train


def _make():
    return GCN(32, 3)


def test_training_learns_and_repeats_itself():
    data = synthetic_graph(300, 32, 3, seed=1)
    state = torch.get_rng_state()
    first = retrain(_make, data, data.train_mask, TrainConfig(epochs=60, seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    second = retrain(_make, data, data.train_mask, TrainConfig(epochs=60, seed=3))
    other = retrain(_make, data, data.train_mask, TrainConfig(epochs=60, seed=4))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.lin1.weight, other.lin1.weight)
    untrained = retrain(_make, data, data.train_mask, TrainConfig(epochs=0, seed=3))
    assert accuracy(first, data, data.test_mask) > accuracy(untrained, data, data.test_mask) + 0.2
    assert accuracy(first, data, data.test_mask) > 0.75


def test_only_training_labels_matter():
    data = synthetic_graph(200, 32, 3)
    first = retrain(_make, data, data.train_mask, TrainConfig(epochs=5))
    data.y = torch.where(data.train_mask, data.y, (data.y + 1) % 3)
    second = retrain(_make, data, data.train_mask, TrainConfig(epochs=5))
    assert torch.equal(first.lin1.weight, second.lin1.weight)


def test_settings_of_the_authors():
    assert [(paper_config(m).lr, paper_config(m).weight_decay) for m in ("gcn", "sgc", "gat", "gin")] == [
        (0.05, 1e-4),
        (0.05, 1e-4),
        (0.01, 1e-3),
        (0.01, 1e-4),
    ]


def test_modes_are_put_back():
    model = GAT(4, 2)
    model.train()
    model.conv2.eval()
    with evaluation_mode(model):
        assert not any(part.training for part in model.modules())
    assert model.training
    assert not model.conv2.training
    data = synthetic_graph(20, 4, 2)
    accuracy(model, data, data.train_mask)
    assert model.training


def test_seeded_restores_even_after_an_error():
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="shape"), seeded(1):
        torch.rand(3).reshape(2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_mask": None}, "train_mask"),
        ({"train_mask": torch.zeros(30, dtype=torch.bool)}, "train_mask"),
        ({"train_mask": torch.ones(30)}, "bool"),
        ({"x": torch.full((30, 4), float("nan"))}, "finite"),
        ({"x": torch.ones(30, 4, dtype=torch.long)}, "floating"),
        ({"y": torch.zeros(29, dtype=torch.long)}, "labels"),
        ({"y": None}, "no y"),
        ({"edge_index": torch.tensor([[0], [30]])}, "out of range"),
        ({"edge_index": torch.tensor([[0.0], [1.0]])}, "integers"),
    ],
)
def test_bad_graphs(change, message):
    data = synthetic_graph(30, 4, 2)
    for name, value in change.items():
        data[name] = value
    with pytest.raises(ValueError, match=message):
        train(GCN(4, 2), data, TrainConfig(epochs=1))


def test_bad_settings_and_divergence():
    for wrong in ({"epochs": -1}, {"lr": 0.0}, {"weight_decay": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TrainConfig(**wrong)
    data = synthetic_graph(30, 4, 2)
    data.x = data.x * 1e30
    with pytest.raises(ValueError, match="lower lr"):
        train(GCN(4, 2), data, TrainConfig(epochs=20, lr=1e20))
    with pytest.raises(ValueError, match="mask"):
        accuracy(GCN(4, 2), data, torch.zeros(30, dtype=torch.bool))
    with pytest.raises(ValueError, match="train_mask"):
        retrain(lambda: GCN(4, 2), data, torch.zeros(30, dtype=torch.bool))
