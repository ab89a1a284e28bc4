"""A training run over epochs: selection, early stopping, and a checkpoint from which it continues exactly.

What a method trains in an epoch and how it evaluates is the method's; the rest of a run is here once.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from recsys_losses._distributed import Shard, barrier
from recsys_losses._storage import read_tensors, write_tensors

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer


class Stateful(Protocol):
    """Anything whose state is a flat dict of tensors."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state_dict: dict[str, Tensor], /) -> object: ...


@dataclass(frozen=True)
class EpochsResult:
    """What a run did; the model itself is trained in place.

    Args:
        history: One record per epoch: `epoch` (from 0), what the epoch returned (`loss`, ...), `seconds` (of training
            alone) and the metrics of an epoch that was evaluated.
        best_epoch: Epoch whose parameters the model has.
        best: Metrics of that epoch; empty if nothing was evaluated.
        stopped_early: Whether patience ran out before the last epoch.
        seconds: Wall time of training and evaluation, interrupted runs added up.
    """

    history: list[dict[str, float]]
    best_epoch: int
    best: dict[str, float]
    stopped_early: bool
    seconds: float


@dataclass
class _Past:
    """What a run has to know of the epochs behind it."""

    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = -1
    best: dict[str, float] = field(default_factory=dict)
    waited: int = 0
    seconds: float = 0.0


class EpochRun:
    """A model in training and everything that its checkpoint holds.

    Args:
        kind: What the checkpoint calls itself, such as "recsys_losses checkpoint"; another kind isn't loaded.
        model: The model, trained in place.
        optimizer: Its optimiser.
        generator: The source of everything random in the run.
        settings: What the run depends on, JSON values; a checkpoint written with other settings is refused. A dict
            inside is compared entry by entry.
        extra: Further state of the method, if any: a controller, statistics, a second model.
        shard: The place of this process among several.
    """

    def __init__(
        self,
        kind: str,
        model: nn.Module,
        optimizer: Optimizer,
        generator: torch.Generator,
        *,
        settings: Mapping[str, Any],
        extra: Stateful | None = None,
        shard: Shard | None = None,
    ) -> None:
        self.kind, self.model, self.optimizer, self.generator = kind, model, optimizer, generator
        self.settings, self.extra = dict(settings), extra
        self.shard = Shard() if shard is None else shard
        self.best_parameters: dict[str, Tensor] = {}
        self._past = _Past()

    @property
    def epochs_done(self) -> int:
        """The number of epochs behind the run, those of the checkpoint included."""
        return len(self._past.history)

    def run(
        self,
        epochs: int,
        train: Callable[[int], dict[str, float]],
        evaluate: Callable[[], dict[str, float]] | None = None,
        *,
        monitor: str = "loss",
        lower_is_better: bool = False,
        eval_every: int = 1,
        patience: int | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        on_epoch: Callable[[dict[str, float]], None] | None = None,
    ) -> EpochsResult:
        """Train up to `epochs` epochs and leave the model with the parameters of the best one.

        Args:
            epochs: Epochs in all, those of the checkpoint included.
            train: Trains the numbered epoch and returns what to record, `loss` among it.
            evaluate: Returns the metrics of the model as it is; None keeps the last epoch.
            monitor: The metric that chooses the epoch.
            lower_is_better: Whether lower values of it are better.
            eval_every: Epochs between two evaluations; the last epoch is always evaluated.
            patience: Evaluations without improvement after which training stops; None never stops early.
            checkpoint: File that is replaced after every epoch; None writes none.
            on_epoch: Called with the record of every finished epoch.

        Raises:
            RuntimeError: If the loss of an epoch isn't finite.
        """
        past = self._past
        for epoch in range(self.epochs_done, epochs):
            if patience is not None and past.waited >= patience:
                break
            start = time.perf_counter()
            record: dict[str, float] = {"epoch": epoch, **train(epoch)}
            record["seconds"] = time.perf_counter() - start
            if not math.isfinite(record["loss"]):
                raise RuntimeError(
                    f"the loss of epoch {epoch} is {record['loss']}; a lower learning rate may help (for softmax losses also a higher temperature)"
                )
            if evaluate is not None and ((epoch + 1) % eval_every == 0 or epoch + 1 == epochs):
                metrics = evaluate()
                record |= metrics
                self._select(epoch, metrics, monitor, lower_is_better=lower_is_better)
            past.seconds += time.perf_counter() - start
            past.history.append(record)
            if checkpoint is not None:
                self.save(checkpoint)
            if on_epoch is not None:
                on_epoch(dict(record))
        if self.best_parameters:
            self.model.load_state_dict(self.best_parameters)
        return EpochsResult(
            history=past.history,
            best_epoch=past.best_epoch if past.best else self.epochs_done - 1,
            best=past.best,
            stopped_early=self.epochs_done < epochs,
            seconds=past.seconds,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything that the rest of the run depends on; the first process does."""
        extra = {} if self.extra is None else self.extra.state_dict()  # on every process: it may have to be summed up
        if self.shard.rank == 0:
            parts = {"model": self.model.state_dict(), "best": self.best_parameters, "extra": extra}
            tensors = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
            tensors |= {
                f"optimizer.{number}.{name}": value
                for number, values in self.optimizer.state_dict()["state"].items()
                for name, value in values.items()
                if value is not None
            }
            tensors["generator"] = self.generator.get_state()
            metadata = {"kind": self.kind, "version": 1, "settings": self.settings, "state": asdict(self._past)}
            write_tensors(path, tensors, metadata)
        barrier(self.shard)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over what `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it holds something else, or was written with other settings.
        """
        tensors, metadata = read_tensors(path, self.kind)
        _check_settings(path, metadata["settings"], self.settings)
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "extra": {}, "optimizer": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            if part in parts:
                parts[part][rest] = value
        self.model.load_state_dict(parts["model"])
        device = next(self.model.parameters()).device
        self.best_parameters = {name: value.to(device) for name, value in parts["best"].items()}
        if self.extra is not None:
            self.extra.load_state_dict(parts["extra"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in parts["optimizer"].items():
            number, _, rest = name.partition(".")
            moments.setdefault(int(number), {})[rest] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.generator.set_state(tensors["generator"])
        self._past = _Past(**metadata["state"])

    def load_if_there(self, path: str | os.PathLike[str] | None, *, resume: bool = True) -> None:
        """Continue from a checkpoint where there is one and `resume` is set."""
        if path is not None and resume and Path(path).exists():
            self.load(path)

    def _select(self, epoch: int, metrics: dict[str, float], monitor: str, *, lower_is_better: bool) -> None:
        """Keep the parameters if they are the best so far."""
        past = self._past
        sign = -1 if lower_is_better else 1
        if past.best and not sign * metrics[monitor] > sign * past.best[monitor]:
            past.waited += 1
            return
        past.best_epoch, past.best, past.waited = epoch, metrics, 0
        self.best_parameters = {name: value.detach().clone() for name, value in self.model.state_dict().items()}


def _check_settings(path: str | os.PathLike[str], saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    old, new = _flat(saved), _flat(current)
    differing = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
    if differing:
        told = ", ".join(f"{name} (was {old.get(name)!r}, is {new.get(name)!r})" for name in differing)
        raise ValueError(f"checkpoint {path} was written with other settings: {told}; resume=False starts over")


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= {f"{key}.{name}": entry for name, entry in value.items()} if isinstance(value, dict) else {key: value}
    return flat
