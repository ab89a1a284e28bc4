r"""Training of embedding recommenders, with honest selection and exact resume.

`fit` shuffles the training pairs every epoch, takes Adam steps on a loss of `recsys_losses.objectives`, evaluates on
validation pairs, stops early and restores the best epoch. Everything random comes from one seeded generator, and the
checkpoint holds all that the rest of a run depends on: a resumed run equals an uninterrupted one bit for bit (on one
device).

Launched on several processes (torchrun, accelerate), each computes its share of every batch: the losses and the
parameters are those of one process, up to rounding.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F

from recsys_losses._checks import check_choice, check_positive
from recsys_losses._distributed import (
    Shard,
    broadcast_from_first,
    current_shard,
    sum_gradients,
    sum_over_processes,
)
from recsys_losses._epochs import EpochRun, EpochsResult
from recsys_losses._interactions import fingerprint
from recsys_losses._loss_config import LOSSES, L2On, LossConfig
from recsys_losses._storage import read_tensors, write_tensors
from recsys_losses.data import InteractionData, hold_out_validation
from recsys_losses.metrics import METRICS, evaluate_full_ranking
from recsys_losses.models import LightGCN, MatrixFactorization, Recommender
from recsys_losses.objectives import CPRObjective, PairObjective, StepLoss, make_objective

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from torch.optim import Optimizer

__all__ = ["LOSSES", "FitResult", "LossConfig", "evaluate", "fit", "load_model", "save_model"]

SelectOn = Literal["valid", "test", "none"]
Score = Literal["dot", "cosine"]
Objective = PairObjective | CPRObjective

_SELECT_ON = ("valid", "test", "none")
_SCORES = ("dot", "cosine")
_MONITORS = tuple(metric for metric in METRICS if metric != "arp")
_CHECKPOINT = "recsys_losses checkpoint"
_MODEL = "recsys_losses model"


@dataclass(frozen=True)
class FitResult(EpochsResult):
    """What `fit` did; the model itself is trained in place.

    Args:
        history: One record per epoch: `epoch` (from 0), `loss` (mean over rows, without the L2 term), `seconds` (of the
            training steps alone), the metrics of an epoch that was evaluated (`recall@20`, ...), and `inv_tau0` of
            adap-tau.
        best_epoch: Epoch whose parameters the model has.
        best: Metrics of that epoch on the part that selected it; empty with `select_on="none"`.
        stopped_early: Whether patience ran out before the last epoch.
        seconds: Wall time of training and evaluation, interrupted runs added up.
        interactions_per_second: Positive rows trained on per second of the training steps.
    """

    interactions_per_second: float


def fit(
    model: Recommender,
    loss: LossConfig,
    data: InteractionData,
    *,
    epochs: int,
    batch_size: int = 1024,
    lr: float = 1e-3,
    l2: float = 0.0,
    l2_on: L2On | None = None,
    eval_every: int = 1,
    patience: int | None = None,
    monitor: str = "recall@20",
    select_on: SelectOn = "valid",
    score_eval: Score = "dot",
    seed: int = 0,
    device: torch.device | str = "cpu",
    ks: Sequence[int] = (20,),
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool = False,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> FitResult:
    r"""Train a model in place and leave it with the parameters of the best epoch.

    A step minimises the mean loss over the rows of a batch plus the L2 term, by Adam without a schedule. For a batch of B
    rows the L2 term is

    $$\frac{\lambda}{2B}\sum\|e\|^2\ (\text{layer0, output}),\qquad
    \frac{\lambda}{U+I}\sum_{\text{all rows}}\|e\|^2\ (\text{table}).$$

    Args:
        model: What is trained. It is moved to `device`.
        loss: The loss and its options.
        data: Interactions; only `train` is learned from.
        epochs: Passes over the training pairs, at most.
        batch_size: Positive pairs (cpr: kept cycles) per step, over all processes.
        lr: Learning rate.
        l2: $\lambda\ge0$.
        l2_on: `"layer0"` counts the base embeddings of the rows of a batch, users and positives, for bpr and bce the
            negatives too; `"output"` the embeddings that score, all drawn negatives included (each as often as it was
            drawn); `"table"` all rows of the base tables. None is `"table"` for cpr, which knows no other, else `"layer0"`.
        eval_every: Epochs between two evaluations; the last epoch is always evaluated.
        patience: Evaluations without improvement after which training stops; None never stops early.
        monitor: Metric that chooses the epoch, such as `"ndcg@20"`; its cut-off must be among `ks`.
        select_on: `"valid"`: choose the epoch on `data.valid`. Where that is None, a tenth of each user's training pairs
            is held out (by `seed`) and training uses the rest; a LightGCN then propagates through the rest alone.
            `"test"`: choose it on the test pairs, as published code does, with a warning. `"none"`: train `epochs`
            epochs without any evaluation and keep the last.
        score_eval: Score that ranks in evaluations.
        seed: Seed of shuffling, negatives, dropout and the held-out pairs; the model has its own.
        device: Torch device.
        ks: Cut-offs of the metrics; unused, as `monitor` is, with `select_on="none"`.
        checkpoint: safetensors file that is replaced after every epoch; None writes none.
        resume: Continue from `checkpoint` where it exists; False starts over.
        progress: Show a progress bar (tqdm) with rate and time left.
        on_epoch: Called with the record of every finished epoch.

    Returns:
        The history and what was selected.

    Raises:
        ValueError: If an argument is out of range or unknown, the model or the checkpoint doesn't fit, or there is
            nothing to train on or to select on.
        RuntimeError: If the loss isn't finite.

    Reference: the training loops of He et al. (LightGCN), Wu et al. (SSM, BSL), Chen et al. (Adap-tau) and Wan et al.
    (CPR), with validation-based selection in place of the test-based one of the first three.

    Examples:
        >>> import torch
        >>> from recsys_losses.models import MatrixFactorization
        >>> pairs = torch.cartesian_prod(torch.arange(4), torch.arange(6)).T
        >>> data = InteractionData(4, 6, train=pairs[:, ::2], test=pairs[:, 1::2])
        >>> model = MatrixFactorization(4, 6, dim=4, seed=0)
        >>> result = fit(model, LossConfig("bpr"), data, epochs=2, select_on="none")
        >>> len(result.history), result.best_epoch
        (2, 1)
    """
    metrics = _check_arguments(
        model, data, epochs, batch_size, lr, l2, eval_every, patience, monitor, select_on, score_eval, ks
    )
    shard = current_shard()
    device = torch.device(device)
    given = data
    data, ranked = _selection(model, data, select_on, seed)
    model.to(device)
    broadcast_from_first(model.state_dict().values(), shard)
    generator = torch.Generator(device).manual_seed(seed)
    objective = make_objective(
        loss, data, batch_size=batch_size, l2=l2, l2_on=l2_on, generator=generator, device=device, shard=shard
    )
    settings = {
        "loss": dataclasses.asdict(loss),
        "model": model.options(),
        "data": fingerprint(given),
        "batch_size": batch_size,
        "lr": lr,
        "l2": l2,
        "l2_on": l2_on,
        "eval_every": eval_every,
        "patience": patience,
        "monitor": monitor,
        "select_on": select_on,
        "score_eval": score_eval,
        "seed": seed,
        "ks": list(ks),
    }
    optimizer = _adam(model, lr, device)
    run = EpochRun(_CHECKPOINT, model, optimizer, generator, settings=settings, extra=objective, shard=shard)
    run.load_if_there(checkpoint, resume=resume)
    bar = _bar(epochs, objective.rows_per_epoch, run.epochs_done, show=progress and shard.rank == 0)

    def train(epoch: int) -> dict[str, float]:
        return _train_epoch(model, objective, optimizer, shard, epoch, bar)

    def rank() -> dict[str, float]:
        assert ranked is not None  # noqa: S101  # only called then
        return _rank_on_first(model, data, ranked, shard, ks=ks, metrics=metrics, score=score_eval)

    def report(record: dict[str, float]) -> None:
        if bar is not None:
            bar.set_postfix({k: f"{v:.4g}" for k, v in record.items() if k == "loss" or k == monitor})
        if on_epoch is not None:
            on_epoch(record)

    try:
        result = run.run(
            epochs,
            train,
            None if ranked is None else rank,
            monitor=monitor,
            eval_every=eval_every,
            patience=patience,
            checkpoint=checkpoint,
            on_epoch=report,
        )
    finally:
        if bar is not None:
            bar.close()
    trained = sum(record["seconds"] for record in result.history)
    rows = len(result.history) * objective.rows_per_epoch
    return FitResult(**vars(result), interactions_per_second=rows / trained if trained > 0 else math.nan)


def _train_epoch(
    model: Recommender, objective: Objective, optimizer: Optimizer, shard: Shard, epoch: int, bar: Any
) -> dict[str, float]:
    extra = objective.start_epoch(epoch, model)
    parameters = list(model.parameters())
    total = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
    rows = 0
    for batch in objective.batches():
        optimizer.zero_grad(set_to_none=True)
        step: StepLoss = objective(batch, model)  # type: ignore[arg-type]
        step.total().backward()  # type: ignore[no-untyped-call]
        sum_gradients(parameters, shard)
        optimizer.step()
        total += step.loss.detach() * batch.size
        rows += batch.size
        if bar is not None:
            bar.update(batch.size)
    return {"loss": float(sum_over_processes(total, shard)) / rows, **extra}


def _rank_on_first(
    model: Recommender,
    data: InteractionData,
    ranked: Tensor,
    shard: Shard,
    *,
    ks: Sequence[int],
    metrics: Sequence[str],
    score: Score,
) -> dict[str, float]:
    """Return the metrics on the pairs that select; the first process computes them for all."""
    if shard.world == 1:
        return _ranking(model, data.train, ranked, ks=ks, metrics=metrics, score=score)
    names = [f"{name}@{k}" for k in ks for name in metrics]
    values = next(model.parameters()).new_zeros(len(names), dtype=torch.float64)
    if shard.rank == 0:
        found = _ranking(model, data.train, ranked, ks=ks, metrics=metrics, score=score)
        values.copy_(torch.tensor([found[name] for name in names], dtype=torch.float64))
    broadcast_from_first([values], shard)
    return dict(zip(names, values.tolist(), strict=True))


def evaluate(
    model: Recommender,
    data: InteractionData,
    *,
    split: Literal["test", "valid"] = "test",
    ks: Sequence[int] = (20,),
    metrics: Sequence[str] = ("recall", "ndcg", "precision", "arp"),
    score: Score = "dot",
    batch_size: int = 1024,
) -> dict[str, float]:
    """Rank all items for every user with held-out pairs, training pairs left out.

    Args:
        model: A trained model.
        data: Interactions; the pairs of `train` are never ranked (those of `valid` are, when `split` is "test").
        split: Which pairs are relevant.
        ks: Cut-offs.
        metrics: Any of `recsys_losses.metrics.METRICS`.
        score: `"dot"` or `"cosine"`.
        batch_size: Users ranked at once.

    Returns:
        `{"recall@20": ..., ...}`.

    Raises:
        ValueError: If a name is unknown, a cut-off is larger than the catalogue, or the split is missing or empty.

    Examples:
        >>> import torch
        >>> from recsys_losses.models import MatrixFactorization
        >>> data = InteractionData(2, 3, train=torch.tensor([[0, 1], [0, 1]]), test=torch.tensor([[0, 1], [1, 0]]))
        >>> evaluate(MatrixFactorization(2, 3, dim=4, seed=0), data, ks=(2,), metrics=("recall",))
        {'recall@2': 1.0}
    """
    _check_model(model, data)
    check_choice("split", split, ("test", "valid"))
    check_choice("score", score, _SCORES)
    ranked = data.test if split == "test" else data.valid
    if ranked is None:
        raise ValueError("split='valid' needs data.valid, which is None")
    return _ranking(model, data.train, ranked, ks=ks, metrics=metrics, score=score, batch_size=batch_size)


def save_model(model: Recommender, path: str | os.PathLike[str]) -> None:
    """Write a model to a safetensors file, its options in the header; a LightGCN with its graph.

    Args:
        model: The model.
        path: File to write or to replace.

    Examples:
        >>> import tempfile, pathlib
        >>> from recsys_losses.models import MatrixFactorization
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "model.safetensors"
        ...     save_model(MatrixFactorization(2, 3, dim=4, user_dropout=0.1), path)
        ...     load_model(path)
        MatrixFactorization(num_users=2, num_items=3, dim=4, user_dropout=0.1)
    """
    tensors = dict(model.state_dict())
    if isinstance(model, LightGCN):
        tensors["graph.edge_index"] = model.edge_index().int()
    metadata = {
        "kind": _MODEL,
        "version": 1,
        "num_users": model.num_users,
        "num_items": model.num_items,
        "options": model.options(),
    }
    write_tensors(path, tensors, metadata)


def load_model(
    path: str | os.PathLike[str], data: InteractionData | None = None, *, device: torch.device | str = "cpu"
) -> Recommender:
    """Read a model that `save_model` wrote.

    Args:
        path: The file.
        data: Interactions that the model has to fit, for a check; None checks nothing.
        device: Where to put the model.

    Returns:
        The model, with the parameters and (LightGCN) the graph it was saved with.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or holds no model, or the sizes differ from those of `data`.
    """
    tensors, metadata = read_tensors(path, _MODEL)
    options = dict(metadata["options"])
    sizes = metadata["num_users"], metadata["num_items"]
    model: Recommender
    if options.pop("model") == "mf":
        model = MatrixFactorization(*sizes, **options, seed=0)
    else:
        model = LightGCN(*sizes, tensors.pop("graph.edge_index").long(), **options, seed=0)
    model.load_state_dict(tensors)
    if data is not None:
        _check_model(model, data)
    return model.to(device)


def _ranking(
    model: Recommender,
    train: Tensor,
    ranked: Tensor,
    *,
    ks: Sequence[int],
    metrics: Sequence[str],
    score: Score,
    batch_size: int = 1024,
) -> dict[str, float]:
    with torch.no_grad():
        user, item = model.embeddings()
        if score == "cosine":
            user, item = F.normalize(user, dim=1), F.normalize(item, dim=1)
        return evaluate_full_ranking(user, item, train, ranked, ks=ks, metrics=metrics, batch_size=batch_size)


def _selection(
    model: Recommender, data: InteractionData, select_on: str, seed: int
) -> tuple[InteractionData, Tensor | None]:
    """Return what is trained on and the pairs that select the epoch."""
    if select_on == "none":
        return data, None
    if select_on == "test":
        warnings.warn(
            "select_on='test' chooses the epoch on data.test: metrics on the same pairs are optimistic and not "
            "comparable with those of a run that selects on validation pairs (test-set leak)",
            UserWarning,
            stacklevel=3,
        )
        return data, data.test
    if data.valid is None:
        data = hold_out_validation(data, generator=torch.Generator().manual_seed(seed))
        if isinstance(model, LightGCN):  # its graph must not show the held-out pairs
            model.replace_edges(data.train)
    if data.valid is None or data.valid.shape[1] == 0:
        raise ValueError("there are no validation pairs to select the epoch on; give data.valid or select_on='none'")
    return data, data.valid


def _adam(model: Recommender, lr: float, device: torch.device) -> Optimizer:
    # The fused step is one pass over the tables, several times faster than the default on the CPU.
    return torch.optim.Adam(model.parameters(), lr=lr, fused=device.type in ("cpu", "cuda") or None)


def _bar(epochs: int, rows: int, done: int, *, show: bool) -> Any:
    if not show:
        return None
    from tqdm import tqdm

    return tqdm(total=epochs * rows, initial=done * rows, unit="pair", unit_scale=True)


def _check_model(model: Recommender, data: InteractionData) -> None:
    if (model.num_users, model.num_items) != (data.num_users, data.num_items):
        raise ValueError(
            f"the model has {model.num_users} users and {model.num_items} items, "
            f"the data {data.num_users} and {data.num_items}"
        )


def _check_arguments(
    model: Recommender,
    data: InteractionData,
    epochs: int,
    batch_size: int,
    lr: float,
    l2: float,
    eval_every: int,
    patience: int | None,
    monitor: str,
    select_on: str,
    score_eval: str,
    ks: Sequence[int],
) -> tuple[str, ...]:
    """Raise ValueError for arguments out of range; return the metrics to record."""
    _check_model(model, data)
    for name, value in (
        ("epochs", epochs),
        ("batch_size", batch_size),
        ("eval_every", eval_every),
        ("patience", patience),
    ):
        if value is not None and not value >= 1:
            raise ValueError(f"{name} must be >= 1, got {value!r}")
    check_positive("lr", lr)
    if not 0 <= l2 < math.inf:
        raise ValueError(f"l2 must be a finite number >= 0, got {l2!r}")
    check_choice("select_on", select_on, _SELECT_ON)
    check_choice("score_eval", score_eval, _SCORES)
    if data.train.shape[1] == 0:
        raise ValueError("data.train is empty: there is nothing to train on")
    if select_on == "none":
        return ()
    for k in ks:
        if not 1 <= k <= data.num_items:
            raise ValueError(f"k must be in 1..{data.num_items} (the number of items), got {k!r}")
    metric, _, cutoff = monitor.partition("@")
    check_choice("monitor", metric, _MONITORS)
    if cutoff not in {str(k) for k in ks}:
        raise ValueError(f"monitor={monitor!r} needs its cut-off among ks={tuple(ks)}")
    return tuple(dict.fromkeys(("recall", "ndcg", metric)))
