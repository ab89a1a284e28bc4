"""Training over epochs of sampled steps, and evaluation in blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from recsys_losses._checks import check_positive
from recsys_losses._epochs import EpochRun, EpochsResult
from recsys_losses.mcrl._metrics import check_cutoffs, metrics_of_ranks, target_ranks

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from recsys_losses.mcrl._buffer import ReplayBuffer
    from recsys_losses.mcrl._model import MCRL

_CHECKPOINT = "recsys_losses mcrl checkpoint"


class MCRLTrainer:
    r"""Trains an `MCRL` model on a replay buffer and keeps the best epoch of a validation buffer.

    A step draws `batch_size` transitions with replacement, so an epoch is a number of steps, not a pass.

    Args:
        model: What is trained, in place. It is moved to `device`.
        train: Transitions to learn from.
        valid: Transitions that choose the epoch; None keeps the last one.
        batch_size: Transitions per step.
        lr: Learning rate of Adam.
        seed: Seed of everything random in training; the model has its own.
        device: Torch device.

    Raises:
        ValueError: If an option is out of range, or a buffer doesn't fit the model.

    Examples:
        >>> from recsys_losses.mcrl import MCRL, ReplayBuffer, SessionSimulator
        >>> sessions = SessionSimulator(num_items=20).logs(30, seed=1)
        >>> buffer = ReplayBuffer.from_sessions(sessions, state_size=5, num_items=20)
        >>> trainer = MCRLTrainer(MCRL(20, hidden=8, state_size=5), buffer, batch_size=16)
        >>> result = trainer.fit(epochs=2, steps_per_epoch=3)
        >>> len(result.history), sorted(trainer.evaluate(buffer, ks=(5,)))[:2]
        (2, ['hr_click@5', 'hr_purchase@5'])
    """

    def __init__(
        self,
        model: MCRL,
        train: ReplayBuffer,
        valid: ReplayBuffer | None = None,
        *,
        batch_size: int = 256,
        lr: float = 5e-3,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        check_positive("lr", lr)
        if not batch_size >= 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size!r}")
        for buffer in (train, valid):
            _check_buffer(model, buffer)
        self.device = torch.device(device)
        self.model = model.to(self.device)
        self.train = train.to(self.device)
        self.valid = None if valid is None else valid.to(self.device)
        self.batch_size, self.lr, self.seed = batch_size, lr, seed

    def fit(
        self,
        epochs: int = 30,
        *,
        steps_per_epoch: int | None = None,
        eval_every: int = 1,
        patience: int | None = 5,
        monitor: str = "ndcg_purchase@20",
        ks: Sequence[int] = (20,),
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = True,
        on_epoch: Callable[[dict[str, float]], None] | None = None,
    ) -> EpochsResult:
        """Train, and leave the model with the parameters of the best epoch.

        Args:
            epochs: Epochs, at most.
            steps_per_epoch: Steps per epoch; None is the number of transitions over `batch_size`, rounded down.
            eval_every: Epochs between two evaluations; the last epoch is always evaluated.
            patience: Evaluations without improvement after which training stops; None never stops early.
            monitor: Metric on the validation buffer that chooses the epoch; its cut-off must be among `ks`.
            ks: Cut-offs of the metrics.
            checkpoint: safetensors file that is replaced after every epoch; None writes none.
            resume: Continue from `checkpoint` where it exists; False starts over.
            on_epoch: Called with the record of every finished epoch.

        Returns:
            History and selection; a record holds the loss and its parts, averaged over the steps.

        Raises:
            ValueError: If an option is out of range, or the checkpoint belongs to another run.
            RuntimeError: If the loss isn't finite.
        """
        steps = max(1, len(self.train) // self.batch_size) if steps_per_epoch is None else steps_per_epoch
        counts = (("epochs", epochs), ("steps_per_epoch", steps), ("eval_every", eval_every), ("patience", patience))
        for name, value in counts:
            if value is not None and not value >= 1:
                raise ValueError(f"{name} must be >= 1, got {value!r}")
        check_cutoffs(ks)
        _check_monitor(monitor, ks)
        # Numbers are drawn on the CPU: which twin to train is known there without waiting for a GPU.
        generator = torch.Generator().manual_seed(self.seed)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=self.lr, fused=self.device.type in ("cpu", "cuda") or None)
        settings = {
            "model": self.model.options(),
            "train": self.train.digest(),
            "valid": None if self.valid is None else self.valid.digest(),
            "batch_size": self.batch_size,
            "lr": self.lr,
            "seed": self.seed,
            "steps_per_epoch": steps,
            "eval_every": eval_every,
            "patience": patience,
            "monitor": monitor,
            "ks": list(ks),
        }
        run = EpochRun(_CHECKPOINT, self.model, optimizer, generator, settings=settings)
        run.load_if_there(checkpoint, resume=resume)

        def train(epoch: int) -> dict[str, float]:
            del epoch
            return self._train_epoch(steps, optimizer, generator)

        def evaluate() -> dict[str, float]:
            assert self.valid is not None  # noqa: S101  # only called then
            return self.evaluate(self.valid, ks=ks)

        return run.run(
            epochs,
            train,
            None if self.valid is None else evaluate,
            monitor=monitor,
            eval_every=eval_every,
            patience=patience,
            checkpoint=checkpoint,
            on_epoch=on_epoch,
        )

    def evaluate(
        self, buffer: ReplayBuffer, *, ks: Sequence[int] = (5, 10, 15, 20), batch_size: int = 1024
    ) -> dict[str, float]:
        """Rank all items for every event of a buffer: `evaluate_next_item` of the model.

        Args:
            buffer: Held-out sessions.
            ks: Cut-offs.
            batch_size: Events ranked at once.
        """
        return evaluate_next_item(self.model, buffer, ks=ks, batch_size=batch_size)

    def _train_epoch(
        self, steps: int, optimizer: torch.optim.Optimizer, generator: torch.Generator
    ) -> dict[str, float]:
        self.model.train()
        total = torch.zeros(5, dtype=torch.float64, device=self.device)
        with_session_items = self.model.exclude_session
        for _ in range(steps):
            batch = self.train.sample(self.batch_size, generator, with_session_items=with_session_items)
            optimizer.zero_grad(set_to_none=True)
            result = self.model.loss(batch, generator)
            result.loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            self.model.update_target()
            total += torch.stack(result).detach()
        return dict(zip(type(result)._fields, (total / steps).tolist(), strict=True))


@torch.no_grad()
def evaluate_next_item(
    model: MCRL, buffer: ReplayBuffer, *, ks: Sequence[int] = (5, 10, 15, 20), batch_size: int = 1024
) -> dict[str, float]:
    r"""Rank all items for every event of a buffer, the first of a session included, clicks and purchases apart.

    Args:
        model: The model; dropout is off meanwhile.
        buffer: Held-out sessions, with the model's number of items and state size.
        ks: Cut-offs.
        batch_size: Events ranked at once; memory grows with it times the number of items.

    Returns:
        Per cut-off `hr_click`, `ndcg_click`, `hr_purchase`, `ndcg_purchase` (as `next_item_metrics`) and `reward`, the
        sum of the rewards of the hits, as `"hr_click@5"`; and three averages over the events that show over-estimation:
        `max_q`, `logged_q` (of the item that followed) and `mean_q` (over all items).

    Raises:
        ValueError: If the buffer doesn't fit, a cut-off or `batch_size` is below 1, or a score is NaN.

    Source: the protocol of SQN (Xin et al., SIGIR 2020), as in the code of `HN-RS/CSA`.
    """
    check_cutoffs(ks)
    if not batch_size >= 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size!r}")
    _check_buffer(model, buffer)
    training = model.training
    model.eval()
    try:
        events = torch.arange(len(buffer), device=buffer.device)
        blocks = [_rank_block(model, buffer, events[at : at + batch_size]) for at in range(0, len(buffer), batch_size)]
    finally:
        model.train(training)
    rank, is_purchase, reward, q = (torch.cat(column) for column in zip(*blocks, strict=True))
    metrics: dict[str, float] = {}
    for k in ks:
        metrics |= {f"{name}@{k}": value for name, value in metrics_of_ranks(rank, is_purchase, k).items()}
        metrics[f"reward@{k}"] = float(reward[rank <= k].double().sum())
    return metrics | dict(zip(("max_q", "logged_q", "mean_q"), q.double().mean(0).tolist(), strict=True))


def _rank_block(
    model: MCRL, buffer: ReplayBuffer, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rank, purchase flag, reward, and (max, logged, mean) Q of the numbered events."""
    batch = buffer.transitions(index)
    q = model.q_values(batch.state)
    scores = q if model.rank_by == "q" else model.scores(batch.state)
    logged = q.gather(1, batch.action.unsqueeze(1)).squeeze(1)
    statistics = torch.stack([q.amax(1), logged, q.mean(1)], dim=1)
    return target_ranks(scores, batch.action), batch.is_purchase, batch.reward, statistics


def _check_buffer(model: MCRL, buffer: ReplayBuffer | None) -> None:
    if buffer is None:
        return
    if (buffer.num_items, buffer.state_size) != (model.num_items, model.state_size):
        raise ValueError(
            f"the buffer has num_items={buffer.num_items} and state_size={buffer.state_size}, "
            f"the model {model.num_items} and {model.state_size}"
        )


def _check_monitor(monitor: str, ks: Sequence[int]) -> None:
    names = ("hr_click", "ndcg_click", "hr_purchase", "ndcg_purchase", "reward")
    accepted = [f"{name}@{k}" for name in names for k in ks]
    if monitor not in accepted:
        raise ValueError(f"unknown monitor {monitor!r}; accepted with ks={tuple(ks)}: {', '.join(accepted)}")
