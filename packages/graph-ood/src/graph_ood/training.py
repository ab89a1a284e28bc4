r"""The training loop of this package: epochs, selection on validation data, checkpoints, exact resume, cross-validation.

What happens with one batch is the method's own affair (`step`); everything around it is here once. Randomness comes from
the seed and the number of the epoch alone, so a run that continues from its checkpoint ends with the same parameters as one
that was never interrupted.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
import torch.nn.functional as F

from graph_ood._checks import check_choice, check_count, check_not_negative, check_target
from graph_ood._storage import read_tensors, write_tensors

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch_geometric.data import Batch, Data  # type: ignore[import-untyped]

__all__ = [
    "CrossValidation",
    "History",
    "Stateful",
    "cross_validate",
    "evaluate",
    "fit",
    "load_model",
    "save_model",
    "supervised_step",
]

Metric = Literal["accuracy", "roc_auc"]
Selection = Literal["val", "test_max"]
_METRICS = ("accuracy", "roc_auc")
_CHECKPOINT = "graph_ood checkpoint"
_MODEL = "graph_ood model"


class Stateful(Protocol):
    """Anything whose state is a flat dict of tensors: a memory bank, group weights."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state_dict: dict[str, Tensor], /) -> object: ...


@dataclass
class History:
    """What a run did; the model itself is trained in place.

    Args:
        records: One per epoch: `epoch` (from 0), the means of what `step` returned (`loss`, ...), `seconds` of training
            alone, and `val_<metric>`, `<name>_<metric>` where there is validation and test data.
        best_epoch: Epoch whose parameters the model has; the last one without validation data.
        seconds: Wall time of training and evaluation, interrupted runs added up.
    """

    records: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = -1
    seconds: float = 0.0

    @property
    def best(self) -> dict[str, float]:
        """The record of the best epoch."""
        return self.records[self.best_epoch]

    @property
    def train_seconds(self) -> float:
        """Wall time of training without evaluation."""
        return sum(record["seconds"] for record in self.records)


def supervised_step(
    model: nn.Module,
    optimizer: Optimizer,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Callable[[Batch], dict[str, Tensor]]:
    """Return the step of empirical risk minimisation: one gradient step on the mean loss of a batch.

    Args:
        model: Module from a batch to logits [B, C].
        optimizer: Its optimiser.
        loss: From logits [B, C] and classes [B] to a scalar.

    Returns:
        A step for `fit`.

    Examples:
        >>> from graph_ood.nets import ConvStack, GraphClassifier
        >>> model = GraphClassifier(ConvStack(1, 8), 2)
        >>> step = supervised_step(model, torch.optim.Adam(model.parameters()))
    """

    def step(batch: Batch) -> dict[str, Tensor]:
        optimizer.zero_grad()
        value = loss(model(batch), batch.y)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return {"loss": value.detach()}

    return step


def fit(
    model: nn.Module,
    train_loader: Iterable[Batch],
    *,
    step: Callable[[Batch], dict[str, Tensor]],
    predict: Callable[[Batch], Tensor],
    optimizers: Sequence[Optimizer],
    val_loader: Iterable[Batch] | None = None,
    test_loaders: Mapping[str, Iterable[Batch]] | None = None,
    epochs: int = 100,
    scheduler: Literal["cosine"] | None = None,
    min_lr: float = 0.0,
    warmup_select: int = 0,
    metric: Metric = "accuracy",
    seed: int = 0,
    device: str | torch.device = "cpu",
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = True,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    extra: Stateful | None = None,
    settings: Mapping[str, Any] | None = None,
) -> History:
    """Train a model in place and leave it with the parameters of its best validation epoch.

    A batch of a single graph is skipped: batch norm over pooled embeddings has no variance there.

    Args:
        model: Everything that has parameters; moved to `device`, in training mode for each epoch.
        train_loader: PyG loader of training graphs; its shuffling is reseeded every epoch.
        step: Does everything for one batch, optimiser steps included, and returns detached scalars, `loss` among them.
        predict: From a batch to logits [B, C] (or [B] for a binary task); called in evaluation mode without gradient.
        optimizers: All optimisers that `step` uses; their learning rates are scheduled and their states checkpointed.
        val_loader: Chooses the epoch; None keeps the last one.
        test_loaders: Further sets to evaluate each epoch, by name; they choose nothing.
        epochs: Number of epochs, >= 1, those of a checkpoint included.
        scheduler: "cosine" lowers each learning rate to `min_lr` over all epochs, one step per epoch; None keeps it.
        min_lr: Where the cosine ends, >= 0.
        warmup_select: Epochs that can't be chosen, in [0, epochs).
        metric: "accuracy" or "roc_auc" (binary).
        seed: Source of all randomness of the run.
        device: Where to train.
        checkpoint: safetensors file that is replaced after every epoch.
        resume: Whether to continue from `checkpoint` where it exists.
        on_epoch: Called with the record of every finished epoch.
        extra: Further state that belongs into the checkpoint.
        settings: What else the run depends on, JSON values; a checkpoint written with other settings is refused.

    Returns:
        The history.

    Raises:
        ValueError: If an argument is out of range, no training batch has two graphs, or the checkpoint doesn't fit.
        RuntimeError: If a loss isn't finite.

    Examples:
        >>> from torch_geometric.data import Data
        >>> from torch_geometric.loader import DataLoader
        >>> from graph_ood.nets import ConvStack, GraphClassifier
        >>> edges = torch.tensor([[0, 1], [1, 0]])
        >>> graphs = [Data(x=torch.full((2, 1), float(i % 2)), edge_index=edges, y=i % 2) for i in range(8)]
        >>> loader = DataLoader(graphs, batch_size=4, shuffle=True)
        >>> model = GraphClassifier(ConvStack(1, 8), 2)
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        >>> step = supervised_step(model, optimizer)
        >>> history = fit(model, loader, step=step, predict=model, optimizers=[optimizer], val_loader=loader, epochs=3)
        >>> len(history.records)
        3
    """
    _check_fit(epochs, scheduler, min_lr, warmup_select, metric)
    model.to(device)
    _move_state(optimizers)
    used = {
        "seed": seed,
        "scheduler": scheduler,
        "epochs": epochs if scheduler else None,  # the cosine depends on it
        "min_lr": min_lr,
        "warmup_select": warmup_select,
        "metric": metric,
        "optimizers": [_hyperparameters(optimizer) for optimizer in optimizers],
        **(settings or {}),
    }
    run = _Run(model, optimizers, extra, used)
    if checkpoint is not None and resume and Path(checkpoint).exists():
        run.load(checkpoint)
    history = run.history
    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    for epoch in range(len(history.records), epochs):
        start = time.perf_counter()
        if scheduler is not None:
            _set_cosine(optimizers, base, min_lr, epoch / epochs)
        record = {"epoch": epoch, **_train_epoch(model, train_loader, step, device, seed, epoch)}
        for name, loader in {**({"val": val_loader} if val_loader is not None else {}), **(test_loaders or {})}.items():
            record[f"{name}_{metric}"] = _evaluate(model, predict, loader, device, metric)
        if val_loader is not None and epoch >= warmup_select:
            run.select(epoch, record[f"val_{metric}"], f"val_{metric}")
        history.records.append(record)
        history.seconds += time.perf_counter() - start
        if checkpoint is not None:
            run.save(checkpoint)
        if on_epoch is not None:
            on_epoch(dict(record))
    for optimizer, rates in zip(optimizers, base, strict=True):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    run.finish()
    return history


def evaluate(
    predict: Callable[[Batch], Tensor],
    loader: Iterable[Batch],
    *,
    device: str | torch.device = "cpu",
    metric: Metric = "accuracy",
) -> float:
    """Return accuracy or ROC-AUC of logits over a loader.

    Args:
        predict: From a batch to logits [B, C], or [B] for a binary task. A module must be in evaluation mode.
        loader: Loader of graphs whose `y` is a class.
        device: Where the batches go.
        metric: "accuracy" or "roc_auc"; the latter scores class 1 of two.

    Returns:
        The figure, in [0, 1].

    Raises:
        ValueError: If the loader is empty, or "roc_auc" meets more than two classes or only one.

    Examples:
        >>> from torch_geometric.data import Data
        >>> from torch_geometric.loader import DataLoader
        >>> graphs = [Data(x=torch.ones(1, 1), y=0), Data(x=torch.ones(1, 1), y=1)]
        >>> evaluate(lambda batch: torch.tensor([[1.0, 0.0], [1.0, 0.0]]), DataLoader(graphs, batch_size=2))
        0.5
    """
    check_choice("metric", metric, _METRICS)
    logits, targets = [], []
    with torch.no_grad():
        for batch in loader:
            logits.append(predict(batch.to(device)))
            targets.append(batch.y.view(-1))
    if not logits:
        raise ValueError("loader is empty: there is nothing to evaluate")
    scores, y = torch.cat(logits), torch.cat(targets)
    if metric == "roc_auc":
        return _roc_auc(scores, y)
    if scores.ndim == 1:
        return float(((scores > 0).long() == y).double().mean())
    check_target(scores, y)
    return float((scores.argmax(-1) == y).double().mean())


@dataclass(frozen=True)
class CrossValidation:
    """Accuracy over the folds of a cross-validation.

    Args:
        accuracies: Test accuracy of every fold, chosen as `selection` says.
        histories: The run of every fold.
        selection: "val" or "test_max".
    """

    accuracies: tuple[float, ...]
    histories: tuple[History, ...]
    selection: Selection

    @property
    def mean(self) -> float:
        """Mean over folds."""
        return sum(self.accuracies) / len(self.accuracies)

    @property
    def std(self) -> float:
        """Population standard deviation over folds, as the published tables print."""
        return math.sqrt(sum((value - self.mean) ** 2 for value in self.accuracies) / len(self.accuracies))

    @property
    def test_max(self) -> float:
        """Highest mean test accuracy over folds at one epoch: optimistic, since test data chose the epoch."""
        return sum(_at_best_mean(self.histories)) / len(self.histories)


def cross_validate(
    dataset: Sequence[Data],
    train_fold: Callable[[list[Data], list[Data] | None, list[Data], int], History],
    *,
    folds: int = 10,
    selection: Selection = "val",
    seed: int = 12345,
    only: Sequence[int] | None = None,
) -> CrossValidation:
    """Stratified cross-validation over graphs.

    Args:
        dataset: Graphs with a class `y`.
        train_fold: Called with training graphs, validation graphs (None with "test_max"), test graphs and the number of the
            fold; returns a history whose records hold `test_accuracy`.
        folds: Number of folds, >= 3 with "val".
        selection: "val": the fold before the test fold chooses the epoch. "test_max": no validation data, the epoch with
            the best mean test accuracy is taken, as many published tables do; optimistic.
        seed: Of the split.
        only: Folds to run; all by default.

    Returns:
        Accuracies and histories.

    Raises:
        ValueError: If `folds` or `selection` is not accepted, or a class has fewer graphs than there are folds.

    Examples:
        >>> from torch_geometric.data import Data
        >>> graphs = [Data(x=torch.ones(1, 1), y=i % 2) for i in range(12)]
        >>> def train_fold(train, val, test, fold):
        ...     return History([{"epoch": 0, "test_accuracy": len(test) / 10}], best_epoch=0)
        >>> round(cross_validate(graphs, train_fold, folds=3).mean, 2)
        0.4
    """
    check_choice("selection", selection, ("val", "test_max"))
    check_count("folds", folds, 3 if selection == "val" else 2)
    numbers = range(folds) if only is None else list(only)
    if not numbers or min(numbers) < 0 or max(numbers) >= folds:
        raise ValueError(f"only must name folds in [0, {folds}), got {only!r}")
    parts = _fold_indices([int(data.y) for data in dataset], folds, seed)
    histories = []
    for fold in numbers:
        held = {fold} if selection == "test_max" else {fold, (fold - 1) % folds}
        train = [dataset[i] for part in range(folds) if part not in held for i in parts[part]]
        val = None if selection == "test_max" else [dataset[i] for i in parts[(fold - 1) % folds]]
        histories.append(train_fold(train, val, [dataset[i] for i in parts[fold]], fold))
    accuracies = (
        _at_best_mean(histories)
        if selection == "test_max"
        else [history.best["test_accuracy"] for history in histories]
    )
    return CrossValidation(tuple(accuracies), tuple(histories), selection)


def save_model(path: str | os.PathLike[str], model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Write parameters and buffers with the settings that rebuild the model, as safetensors, atomically.

    Args:
        path: The file.
        model: The model.
        settings: JSON values.

    Examples:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> save_model(path, torch.nn.Linear(2, 1), {"in_features": 2})
        >>> load_model(path)[1]
        {'in_features': 2}
    """
    write_tensors(path, model.state_dict(), {"kind": _MODEL, "settings": dict(settings)})


def load_model(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state dict and the settings of a file written by `save_model`.

    Args:
        path: The file.

    Returns:
        State dict and settings.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or something else.

    Examples:
        >>> load_model("nowhere.safetensors")
        Traceback (most recent call last):
        FileNotFoundError: no file nowhere.safetensors
    """
    tensors, metadata = read_tensors(path, _MODEL)
    return tensors, metadata["settings"]


class _Run:
    """A model in training and everything that its checkpoint holds."""

    def __init__(
        self, model: nn.Module, optimizers: Sequence[Optimizer], extra: Stateful | None, settings: dict[str, Any]
    ) -> None:
        self.model, self.optimizers, self.extra, self.settings = model, optimizers, extra, settings
        self.history = History()
        self.best_value = -math.inf
        self.best_parameters: dict[str, Tensor] = {}

    def select(self, epoch: int, value: float, name: str) -> None:
        """Keep the parameters if they are the best so far."""
        if math.isnan(value):
            raise RuntimeError(f"{name} of epoch {epoch} is NaN")
        if value <= self.best_value:
            return
        self.history.best_epoch, self.best_value = epoch, value
        self.best_parameters = {k: v.detach().clone() for k, v in self.model.state_dict().items()}

    def finish(self) -> None:
        """Leave the model in evaluation mode with the parameters of the best epoch."""
        if self.best_parameters:
            self.model.load_state_dict(self.best_parameters)
        else:
            self.history.best_epoch = len(self.history.records) - 1
        self.model.eval()

    def save(self, path: str | os.PathLike[str]) -> None:
        parts = {"model": self.model.state_dict(), "best": self.best_parameters}
        if self.extra is not None:
            parts["extra"] = self.extra.state_dict()
        tensors = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
        for number, optimizer in enumerate(self.optimizers):
            for index, values in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer{number}.{index}.{k}": v for k, v in values.items() if v is not None}
        state = {"history": asdict(self.history), "best_value": self.best_value if self.best_parameters else None}
        write_tensors(path, tensors, {"kind": _CHECKPOINT, "settings": self.settings, **state})

    def load(self, path: str | os.PathLike[str]) -> None:
        tensors, metadata = read_tensors(path, _CHECKPOINT)
        saved, wanted = metadata["settings"], self.settings
        differing = sorted(key for key in saved.keys() | wanted.keys() if saved.get(key) != wanted.get(key))
        if differing:
            told = ", ".join(f"{key} (was {saved.get(key)!r}, is {wanted.get(key)!r})" for key in differing)
            raise ValueError(f"checkpoint {path} was written with other settings: {told}; resume=False starts over")
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = value
        try:
            self.model.load_state_dict(parts["model"])
        except RuntimeError as error:
            raise ValueError(f"checkpoint {path} holds another model: {error}") from error
        device = next(self.model.parameters()).device
        self.best_parameters = {name: value.to(device) for name, value in parts.get("best", {}).items()}
        if self.extra is not None:
            self.extra.load_state_dict(parts.get("extra", {}))
        for number, optimizer in enumerate(self.optimizers):
            _load_moments(optimizer, parts.get(f"optimizer{number}", {}))
        self.history = History(**metadata["history"])
        self.best_value = -math.inf if metadata["best_value"] is None else metadata["best_value"]


def _check_fit(epochs: int, scheduler: str | None, min_lr: float, warmup_select: int, metric: str) -> None:
    check_count("epochs", epochs)
    if scheduler is not None:
        check_choice("scheduler", scheduler, ("cosine",))
    check_not_negative("min_lr", min_lr)
    check_choice("metric", metric, _METRICS)
    if not 0 <= warmup_select < epochs:
        raise ValueError(f"warmup_select must be in [0, epochs={epochs}), got {warmup_select!r}")


def _train_epoch(
    model: nn.Module,
    loader: Iterable[Batch],
    step: Callable[[Batch], dict[str, Tensor]],
    device: str | torch.device,
    seed: int,
    epoch: int,
) -> dict[str, float]:
    """One pass over the loader; the figures of `step` are averaged over graphs and read from the device once."""
    start = time.perf_counter()
    model.train()
    totals: dict[str, Tensor] = {}
    graphs = 0
    cuda = torch.device(device)
    with torch.random.fork_rng(devices=[cuda] if cuda.type == "cuda" else []):
        torch.manual_seed((seed * 1_000_003 + epoch) % 2**63)
        generator = getattr(loader, "generator", None)
        if generator is not None:
            generator.manual_seed((seed * 1_000_003 + epoch) % 2**63)
        for batch in loader:
            if batch.num_graphs < 2:
                continue
            for name, value in step(batch.to(device)).items():
                totals[name] = totals.get(name, 0.0) + value.double() * batch.num_graphs
            graphs += batch.num_graphs
    if graphs == 0:
        raise ValueError("train_loader has no batch of at least two graphs")
    record = {name: float(value) / graphs for name, value in totals.items()}
    record["seconds"] = time.perf_counter() - start
    if not all(math.isfinite(value) for value in record.values()):
        raise RuntimeError(f"training of epoch {epoch} gave {record}; a lower learning rate may help")
    return record


def _evaluate(
    model: nn.Module,
    predict: Callable[[Batch], Tensor],
    loader: Iterable[Batch],
    device: str | torch.device,
    metric: Metric,
) -> float:
    model.eval()
    return evaluate(predict, loader, device=device, metric=metric)


def _roc_auc(scores: Tensor, y: Tensor) -> float:
    from sklearn.metrics import roc_auc_score  # type: ignore[import-untyped]

    if scores.ndim == 2 and scores.shape[1] > 2:
        raise ValueError(f"metric 'roc_auc' needs two classes, got logits with {scores.shape[1]}")
    if bool((y == y[0]).all()):
        raise ValueError("metric 'roc_auc' needs graphs of both classes, got one class")
    if scores.ndim == 2:
        scores = scores[:, -1] - scores[:, 0] if scores.shape[1] == 2 else scores[:, 0]
    return float(roc_auc_score(y.cpu().numpy(), scores.double().cpu().numpy()))


def _fold_indices(labels: list[int], folds: int, seed: int) -> list[list[int]]:
    from sklearn.model_selection import StratifiedKFold  # type: ignore[import-untyped]

    fewest = min((labels.count(label) for label in set(labels)), default=0)
    if fewest < folds:
        raise ValueError(f"folds must not exceed the graphs of the smallest class ({fewest}), got {folds}")
    split = StratifiedKFold(folds, shuffle=True, random_state=seed).split(labels, labels)
    return [[int(i) for i in test] for _, test in split]


def _at_best_mean(histories: Sequence[History]) -> list[float]:
    """Test accuracy of every fold at the epoch where their mean is highest."""
    per_epoch = [
        [record["test_accuracy"] for record in records] for records in zip(*(h.records for h in histories), strict=True)
    ]
    return max(per_epoch, key=sum)


def _set_cosine(optimizers: Sequence[Optimizer], base: list[list[float]], min_lr: float, progress: float) -> None:
    for optimizer, rates in zip(optimizers, base, strict=True):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = min_lr + (rate - min_lr) * (1 + math.cos(math.pi * progress)) / 2


def _hyperparameters(optimizer: Optimizer) -> list[Any]:
    """Class and numbers of an optimiser, in JSON."""
    simple = (bool, int, float, type(None))
    groups = [
        {k: list(v) if isinstance(v, tuple) else v for k, v in group.items() if isinstance(v, (*simple, tuple))}
        for group in optimizer.param_groups
    ]
    return [type(optimizer).__name__, groups]


def _move_state(optimizers: Sequence[Optimizer]) -> None:
    """An optimiser that has taken steps elsewhere follows its parameters; torch knows which counters stay on the host."""
    for optimizer in optimizers:
        if optimizer.state:
            optimizer.load_state_dict(optimizer.state_dict())


def _load_moments(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, rest = name.partition(".")
        moments.setdefault(int(index), {})[rest] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
