r"""Lean full-batch training of node classifiers, and retraining as the measure of unlearning.

$$\min_\theta\frac1n\sum_{i\in\text{train}}\text{NLL}\big(f_G(i),y_i\big)+\text{weight decay}$$

with Adam and dropout. A graph of a few thousand nodes needs no sampler: 100 epochs take about half a second.

Documentation: `docs/papers/graph-unlearn/gif.md`.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from graph_unlearn._checks import check_choice, check_count, check_data, check_mask, check_number

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn
    from torch_geometric.data import Data  # type: ignore[import-untyped]

__all__ = ["TrainConfig", "accuracy", "evaluation_mode", "paper_config", "retrain", "seeded", "train"]


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Args:
        epochs: Full-batch steps, >= 0.
        lr: Adam's rate, > 0.
        weight_decay: Adam's weight decay, >= 0.
        seed: Of dropout, and of the weights in `retrain`.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> TrainConfig(epochs=50).lr
        0.05
    """

    epochs: int = 100
    lr: float = 0.05
    weight_decay: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("epochs", self.epochs, low=0)
        check_number("lr", self.lr, low=0, open_low=True)
        check_number("weight_decay", self.weight_decay, low=0)


def paper_config(model: str, *, epochs: int = 100, seed: int = 0) -> TrainConfig:
    """Settings of the authors' code for one of the four networks.

    Args:
        model: `"gcn"`, `"sgc"`, `"gat"` or `"gin"`.
        epochs: Full-batch steps.
        seed: Of dropout, and of the weights in `retrain`.

    Returns:
        The settings: rate 0.05 for GCN and SGC, 0.01 for GAT and GIN; weight decay 1e-3 for GAT, else 1e-4.

    Raises:
        ValueError: If `model` is unknown.

    Examples:
        >>> paper_config("gat").weight_decay
        0.001
    """
    settings = {"gcn": (0.05, 1e-4), "sgc": (0.05, 1e-4), "gat": (0.01, 1e-3), "gin": (0.01, 1e-4)}
    check_choice("model", model, settings)
    lr, weight_decay = settings[model]
    return TrainConfig(epochs=epochs, lr=lr, weight_decay=weight_decay, seed=seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run with torch's global generators seeded, and put them back afterwards.

    Args:
        seed: The seed.

    Yields:
        Nothing.

    Examples:
        >>> import torch
        >>> with seeded(0):
        ...     a = torch.rand(1)
        >>> with seeded(0):
        ...     b = torch.rand(1)
        >>> bool(a == b)
        True
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and put the mode of every submodule back afterwards.

    Args:
        model: The module.

    Yields:
        Nothing.

    Examples:
        >>> import torch
        >>> layer = torch.nn.Dropout()
        >>> with evaluation_mode(layer):
        ...     inside = layer.training
        >>> inside, layer.training
        (False, True)
    """
    before = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


def train(model: nn.Module, data: Data, config: TrainConfig | None = None) -> nn.Module:
    """Train a model in place on the training nodes of a graph, all at once.

    Args:
        model: `forward(x, edge_index)` gives logits or log-probabilities, shape `(N, C)`.
        data: The graph, with `x`, `edge_index`, `y` and `train_mask`; all edges are used (see `training_graph`).
        config: Settings; None takes the defaults.

    Returns:
        The same model, in evaluation mode.

    Raises:
        ValueError: If the graph lacks something, `x` isn't finite, or the loss becomes infinite or NaN.

    Examples:
        >>> from graph_unlearn.data import synthetic_graph
        >>> from graph_unlearn.nets import GCN
        >>> data = synthetic_graph()
        >>> model = train(GCN(32, 3), data, TrainConfig(epochs=20))
        >>> model.training
        False
    """
    config = config or TrainConfig()
    check_data(data)
    nodes = data.train_mask.nonzero().flatten()
    y = data.y[nodes]
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    loss = torch.zeros(())
    with seeded(config.seed):
        model.train()
        for _ in range(config.epochs):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data.x, data.edge_index).index_select(0, nodes), y)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    model.eval()
    if not math.isfinite(float(loss.detach())):
        raise ValueError(f"training ended with a loss of {float(loss.detach())}: lower lr (it is {config.lr:g})")
    return model


def retrain(
    make_model: Callable[[], nn.Module], data_after: Data, train_mask: Tensor, config: TrainConfig | None = None
) -> nn.Module:
    """Train a fresh model on what remains: the gold standard of unlearning.

    Args:
        make_model: Returns an untrained model; called with torch's generators seeded.
        data_after: The remaining graph.
        train_mask: Remaining training nodes, bool, shape `(N,)`.
        config: Settings; None takes the defaults.

    Returns:
        The trained model, in evaluation mode.

    Raises:
        ValueError: If `train_mask` has a wrong shape or selects no node, or for the reasons of `train`.

    Examples:
        >>> from graph_unlearn.data import synthetic_graph
        >>> from graph_unlearn.nets import GCN
        >>> data = synthetic_graph()
        >>> model = retrain(lambda: GCN(32, 3), data, data.train_mask, TrainConfig(epochs=2))
        >>> round(accuracy(model, data, data.train_mask), 1) >= 0.3
        True
    """
    config = config or TrainConfig()
    check_mask("train_mask", train_mask, data_after.y.shape[0])
    data = data_after.__copy__()
    data.train_mask = train_mask
    with seeded(config.seed):
        model = make_model().to(data.y.device)
    return train(model, data, config)


@torch.no_grad()
def accuracy(model: nn.Module, data: Data, mask: Tensor) -> float:
    """Part of the nodes in `mask` whose label has the highest score.

    Args:
        model: `forward(x, edge_index)` gives scores, shape `(N, C)`. It is run in evaluation mode; its mode is kept.
        data: The graph.
        mask: Bool, shape `(N,)`.

    Returns:
        The accuracy (equal to the micro-F1).

    Raises:
        ValueError: If `mask` has a wrong shape or selects no node.

    Examples:
        >>> import torch
        >>> from torch_geometric.data import Data
        >>> class Features(torch.nn.Module):
        ...     def forward(self, x, edge_index):
        ...         return x
        >>> data = Data(x=torch.eye(2), edge_index=torch.zeros(2, 0, dtype=torch.long), y=torch.tensor([0, 0]))
        >>> accuracy(Features(), data, torch.tensor([True, True]))
        0.5
    """
    check_mask("mask", mask, data.y.shape[0])
    with evaluation_mode(model):
        out = model(data.x, data.edge_index)[mask]
    return float((out.argmax(-1) == data.y[mask]).double().mean())
