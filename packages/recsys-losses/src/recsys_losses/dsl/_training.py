"""Training of the three backbones with sparse tables: what an epoch is for each, and how each is ranked."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from recsys_losses._checks import check_choice, check_positive
from recsys_losses._epochs import EpochRun, EpochsResult
from recsys_losses._interactions import fingerprint
from recsys_losses._storage import read_tensors, write_tensors
from recsys_losses.baselines import bpr_loss
from recsys_losses.data import InteractionData, hold_out_validation
from recsys_losses.dsl._backbones import MultVAE, NeuMF
from recsys_losses.dsl._controller import DSLController, Growth, Init
from recsys_losses.dsl._masks import check_count
from recsys_losses.metrics import evaluate_full_ranking, metrics_from_hits
from recsys_losses.models import LightGCN
from recsys_losses.sampling import UniformNegativeSampler

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

BACKBONES = ("lightgcn", "neumf", "multvae")
Backbone = LightGCN | NeuMF | MultVAE

_CHECKPOINT = "recsys_losses dsl checkpoint"
_MODEL = "recsys_losses dsl model"
_METRICS = ("recall", "ndcg", "precision")
# Users ranked at once by the backbones that give no embeddings.
_USERS_AT_ONCE = 128
_KL_WEIGHT, _KL_UPDATES = 0.2, 200_000


@dataclass(frozen=True)
class DSLConfig:
    """Options of `DSLController` for a training by `fit_sparse`, which fills in the rest.

    Args:
        density: Share of non-zeros, in (0, 1].
        update_interval: Steps between two updates of the masks.
        initial_ratio: Share of the non-zeros that the first update moves.
        minimum_ratio: Share that the last one moves.
        growth: `"gradient"` or `"random"`.
        init: `"uniform"`, `"exact"` or `"magnitude"`.
        reset_new_state: Zero the optimiser's state of newly active positions.
        stop_fraction: Share of the training after which the masks stay; 0 is a static mask.
        accumulate_grad: Grow by the gradients of the whole interval.
    """

    density: float = 0.5
    update_interval: int = 3000
    initial_ratio: float = 0.5
    minimum_ratio: float = 0.005
    growth: Growth = "gradient"
    init: Init = "uniform"
    reset_new_state: bool = False
    stop_fraction: float = 1.0
    accumulate_grad: bool = False


@dataclass(frozen=True)
class SparseFitResult(EpochsResult):
    """What `fit_sparse` did; the model is trained in place.

    Args:
        history: One record per epoch; see `EpochsResult`.
        best_epoch: Epoch whose parameters the model has.
        best: Metrics of that epoch; empty if nothing was evaluated.
        stopped_early: Whether patience ran out before the last epoch.
        seconds: Wall time of training and evaluation, interrupted runs added up.
        masks: Masks of that epoch by parameter name; empty after dense training.
        explored: Share of positions that were ever active; 1 after dense training.
    """

    masks: dict[str, Tensor]
    explored: float


def fit_sparse(
    model: Backbone,
    data: InteractionData,
    config: DSLConfig | None,
    *,
    epochs: int,
    batch_size: int = 1024,
    lr: float = 1e-2,
    final_lr: float | None = None,
    l2: float = 1e-4,
    select: Callable[[str, nn.Parameter], bool] | None = None,
    select_on: Literal["valid", "none"] = "valid",
    monitor: str = "recall@20",
    eval_every: int = 1,
    patience: int | None = None,
    ks: Sequence[int] = (20,),
    seed: int = 0,
    device: torch.device | str = "cpu",
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = True,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> SparseFitResult:
    r"""Train LightGCN, NeuMF or MultVAE with Adam, sparse by a `DSLController` or dense.

    An epoch draws as many samples as there are training pairs (LightGCN: users uniformly, then one of their items; NeuMF:
    every pair once), each with one negative the user has no pair with, or visits every user with pairs once (MultVAE).
    The losses are BPR with the L2 term $\frac{\lambda}{2B}\sum\|e\|^2$ on the base embeddings; the cross-entropy of
    positive and negative; and the multinomial likelihood with a KL term whose weight rises linearly to 0.2 within 200,000
    steps.

    Args:
        model: What is trained. It is moved to `device`.
        data: Interactions; only `train` is learned from.
        config: How sparse; None trains all parameters.
        epochs: Passes, at most; the schedules end with the last one.
        batch_size: Pairs, or users for MultVAE, per step.
        lr: Learning rate of the first epoch.
        final_lr: Learning rate after the last epoch, reached by a cosine; None keeps `lr`.
        l2: $\lambda\ge0$, of LightGCN only.
        select: Which parameters are masked; None is `model.select` (NeuMF: the perceptron's embeddings), or those of two
            or more dimensions.
        select_on: `"valid"`: choose the epoch on `data.valid`, where that is None on a tenth of each user's training
            pairs (by `seed`), which then aren't trained on. `"none"`: keep the last epoch.
        monitor: Metric that chooses it: recall, ndcg or precision at one of `ks`.
        eval_every: Epochs between two evaluations.
        patience: Evaluations without improvement after which training stops; None never stops early.
        ks: Cut-offs.
        seed: Seed of masks, sampling, dropout and held-out pairs; the model has its own.
        device: Torch device.
        checkpoint: File that is replaced after every epoch; a run continues exactly from it.
        resume: Continue from `checkpoint` where it exists.
        on_epoch: Called with the record of every finished epoch.

    Returns:
        The history, what was selected, and its masks.

    Raises:
        ValueError: If an argument is out of range or unknown, the data doesn't fit or is empty, or the checkpoint was
            written with other settings.
        RuntimeError: If the loss isn't finite.

    Examples:
        >>> import torch
        >>> from recsys_losses.data import InteractionData
        >>> pairs = torch.cartesian_prod(torch.arange(4), torch.arange(6)).T
        >>> data = InteractionData(4, 6, train=pairs[:, ::2], test=pairs[:, 1::2])
        >>> model = NeuMF(4, 6, dim=4)
        >>> result = fit_sparse(model, data, DSLConfig(0.5, 2, init="exact"), epochs=2, select_on="none")
        >>> result.masks["mlp_user.weight"].float().mean(), bool((model.mlp_user.weight != 0).sum() <= 8)
        (tensor(0.5000), True)
    """
    _check_fit(model, data, epochs, batch_size, lr, final_lr, l2, eval_every, patience)
    check_choice("select_on", select_on, ("valid", "none"))
    digest = fingerprint(data)
    if select_on == "valid":
        _check_monitor(monitor, ks, data.num_items)
        data = _with_validation(model, data, seed)
    model.to(device)
    generator = torch.Generator(device).manual_seed(seed)
    task = _task(model, data, batch_size, l2, generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=torch.device(device).type in ("cpu", "cuda") or None)
    controller = None
    if config is not None:
        chosen = getattr(model, "select", None) if select is None else select
        controller = DSLController(
            model,
            optimizer,
            **dataclasses.asdict(config),
            total_steps=epochs * task.steps,
            select=chosen,
            generator=generator,
        ).attach()
    settings = {
        "dsl": "dense" if config is None else dataclasses.asdict(config),
        "masked": [] if controller is None else list(controller.masks),
        "model": model.options(),
        "data": digest,
        "epochs": epochs,  # both schedules depend on it
        "batch_size": batch_size,
        "lr": lr,
        "final_lr": final_lr,
        "l2": l2,
        "select_on": select_on,
        "monitor": monitor,
        "eval_every": eval_every,
        "patience": patience,
        "ks": list(ks),
        "seed": seed,
    }
    kept = _Kept(model, {} if controller is None else controller.masks)
    run = EpochRun(_CHECKPOINT, kept, optimizer, generator, settings=settings, extra=controller)
    run.load_if_there(checkpoint, resume=resume)

    def train(epoch: int) -> dict[str, float]:
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(lr, final_lr, epoch, epochs)
        return _train_epoch(model, task, optimizer, epoch)

    def rank() -> dict[str, float]:
        return evaluate_backbone(model, data, split="valid", ks=ks)

    try:
        result = run.run(
            epochs,
            train,
            rank if select_on == "valid" else None,
            monitor=monitor,
            eval_every=eval_every,
            patience=patience,
            checkpoint=checkpoint,
            on_epoch=on_epoch,
        )
    finally:
        if controller is not None:
            controller.remove()
    masks = {} if controller is None else controller.masks
    explored = 1.0 if controller is None else controller.explored_fraction()
    return SparseFitResult(**vars(result), masks=masks, explored=explored)


def evaluate_backbone(
    model: Backbone,
    data: InteractionData,
    *,
    split: Literal["test", "valid"] = "test",
    ks: Sequence[int] = (20,),
) -> dict[str, float]:
    """Rank all items for every user with held-out pairs, training pairs left out.

    MultVAE sees the training pairs of the user; the authors hold out whole users instead.

    Args:
        model: A trained model.
        data: Interactions.
        split: Which pairs are relevant.
        ks: Cut-offs.

    Returns:
        Recall, NDCG and precision, as `{"recall@20": ..., ...}`.

    Raises:
        ValueError: If the split is missing or empty, or a cut-off larger than the catalogue.

    Examples:
        >>> import torch
        >>> from recsys_losses.data import InteractionData
        >>> data = InteractionData(2, 3, train=torch.tensor([[0, 1], [0, 1]]), test=torch.tensor([[0, 1], [1, 0]]))
        >>> evaluate_backbone(NeuMF(2, 3, dim=4), data, ks=(2,))["recall@2"]
        1.0
    """
    check_choice("split", split, ("test", "valid"))
    held = data.test if split == "test" else data.valid
    if held is None or held.shape[1] == 0:
        raise ValueError(f"data.{split} holds no pairs to rank")
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            if isinstance(model, LightGCN):
                pairs = data.train.to(device), held.to(device)
                return evaluate_full_ranking(*model.embeddings(), *pairs, ks=ks, metrics=_METRICS)
            return _rank_scores(model, data, held.to(device), ks)
    finally:
        model.train(training)


def save_backbone(path: str | os.PathLike[str], model: Backbone, masked: Sequence[str]) -> None:
    """Write a trained model to a safetensors file, dense, with its options in the header; a LightGCN with its graph.

    Args:
        path: File to write or to replace, as a whole.
        model: The model.
        masked: Names of its masked tensors, such as the keys of `SparseFitResult.masks`.

    Examples:
        >>> import tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "model.safetensors"
        ...     save_backbone(path, NeuMF(2, 3, dim=4), ["mlp_user.weight"])
        ...     model, masked = load_backbone(path)
        >>> model.num_items, masked
        (3, ['mlp_user.weight'])
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
        "masked": list(masked),
    }
    write_tensors(path, tensors, metadata)


def load_backbone(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> tuple[Backbone, list[str]]:
    """Read a model that `save_backbone` wrote.

    Args:
        path: The file.
        device: Where to put the model.

    Returns:
        The model and the names of its masked tensors.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or holds something else.
    """
    tensors, metadata = read_tensors(path, _MODEL)
    options = dict(metadata["options"])
    sizes = metadata["num_users"], metadata["num_items"]
    kind = options.pop("model")
    model: Backbone
    if kind == "lightgcn":
        model = LightGCN(*sizes, tensors.pop("graph.edge_index").long(), **options, seed=0)
    else:
        model = (NeuMF if kind == "neumf" else MultVAE)(*sizes, **options)
    model.load_state_dict(tensors)
    return model.to(device), metadata["masked"]


class _Kept(nn.Module):
    """Model and masks together, so that the best epoch is restored with its own masks."""

    def __init__(self, model: Backbone, masks: dict[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        for number, mask in enumerate(masks.values()):
            self.register_buffer(f"mask{number}", mask)


class _Task(Protocol):
    """What is minimised in the steps of an epoch."""

    steps: int

    def losses(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Yield for every step what is minimised, what is recorded, and the number of rows."""
        ...


class _Rows:
    """Pairs by user: drawing of a user's items, and rows of 0 and 1."""

    def __init__(self, edges: Tensor, num_users: int, num_items: int) -> None:
        self.num_items = num_items
        self.edges = edges[:, edges[0].argsort(stable=True)]
        self.degree = torch.bincount(edges[0], minlength=num_users)
        self.start = self.degree.cumsum(0) - self.degree
        self.users = self.degree.nonzero().squeeze(1)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw users uniformly and one item of each."""
        device = self.users.device
        chosen = torch.randint(self.users.numel(), (count,), generator=generator, device=device)
        user = self.users[chosen]
        place = torch.rand(count, generator=generator, device=device, dtype=torch.float64) * self.degree[user]
        return user, self.edges[1, self.start[user] + place.long()]

    def dense(self, users: Tensor) -> Tensor:
        """Return the rows of these users, float (B, I)."""
        count = self.degree[users]
        row = torch.repeat_interleave(torch.arange(users.numel(), device=users.device), count)
        within = torch.arange(row.numel(), device=users.device) - (count.cumsum(0) - count)[row]
        out = torch.zeros(users.numel(), self.num_items, device=users.device)
        out[row, self.edges[1, self.start[users][row] + within]] = 1
        return out


class _PairTask:
    """BPR of LightGCN and the cross-entropy of NeuMF: a positive and a negative per sample."""

    def __init__(
        self, model: LightGCN | NeuMF, data: InteractionData, batch_size: int, l2: float, generator: torch.Generator
    ) -> None:
        self.model, self.batch_size, self.l2, self.generator = model, batch_size, l2, generator
        self.pairs = data.train.to(generator.device)
        self.rows = _Rows(self.pairs, data.num_users, data.num_items)
        self.negatives = UniformNegativeSampler(data.num_items, exclude=self.pairs, generator=generator)
        self.steps = math.ceil(self.pairs.shape[1] / batch_size)

    def losses(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        del epoch
        count = self.pairs.shape[1]
        if isinstance(self.model, NeuMF):
            order = torch.randperm(count, generator=self.generator, device=self.generator.device)
            user, positive = self.pairs[:, order]
        else:
            user, positive = self.rows.draw(count, self.generator)
        negative = self.negatives.sample(user, 1).squeeze(1)
        for batch in zip(*(torch.split(x, self.batch_size) for x in (user, positive, negative)), strict=True):
            size = batch[0].numel()
            if isinstance(self.model, NeuMF):
                yield (*self._cross_entropy(self.model, *batch), size)
            else:
                yield (*self._bpr(self.model, *batch), size)

    def _bpr(self, model: LightGCN, user: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        tables = model.training_embeddings(self.generator)
        u, p, n = _looked_up(tables, user, positive, negative)
        loss = bpr_loss((u * p).sum(1), (u * n).sum(1))
        if self.l2 == 0:
            return loss, loss
        squares = sum(x.square().sum() for x in _looked_up(model.base_embeddings(), user, positive, negative))
        return loss + 0.5 * self.l2 / user.numel() * squares, loss

    def _cross_entropy(self, model: NeuMF, user: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        for_positive = F.softplus(-model.score(user, positive, self.generator)).mean()
        loss = for_positive + F.softplus(model.score(user, negative, self.generator)).mean()
        return loss, loss


class _RowTask:
    """MultVAE: a row of interactions per user."""

    def __init__(self, model: MultVAE, data: InteractionData, batch_size: int, generator: torch.Generator) -> None:
        self.model, self.batch_size, self.generator = model, batch_size, generator
        self.rows = _Rows(data.train.to(generator.device), data.num_users, data.num_items)
        self.steps = math.ceil(self.rows.users.numel() / batch_size)

    def losses(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        users = self.rows.users
        order = torch.randperm(users.numel(), generator=self.generator, device=self.generator.device)
        for number, batch in enumerate(torch.split(users[order], self.batch_size)):
            row = self.rows.dense(batch)
            logits, kl = self.model(row, self.generator)
            likelihood = -(F.log_softmax(logits, dim=1) * row).sum(1).mean()
            weight = _KL_WEIGHT * min(1.0, (epoch * self.steps + number) / _KL_UPDATES)
            yield likelihood + weight * kl.mean(), likelihood, batch.numel()


def _task(model: Backbone, data: InteractionData, batch_size: int, l2: float, generator: torch.Generator) -> _Task:
    if isinstance(model, MultVAE):
        return _RowTask(model, data, batch_size, generator)
    return _PairTask(model, data, batch_size, l2, generator)


def _train_epoch(model: Backbone, task: _Task, optimizer: torch.optim.Optimizer, epoch: int) -> dict[str, float]:
    model.train()
    total = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
    rows = 0
    for loss, recorded, size in task.losses(epoch):
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += recorded.detach() * size
        rows += size
    return {"loss": float(total) / rows}


def _looked_up(tables: tuple[Tensor, Tensor], user: Tensor, *items: Tensor) -> tuple[Tensor, ...]:
    return tables[0].index_select(0, user), *(tables[1].index_select(0, item) for item in items)


def _rank_scores(model: NeuMF | MultVAE, data: InteractionData, held: Tensor, ks: Sequence[int]) -> dict[str, float]:
    for k in ks:
        if not 1 <= k <= data.num_items:
            raise ValueError(f"k must be in 1..{data.num_items} (the number of items), got {k!r}")
    known = _Rows(data.train.to(held.device), data.num_users, data.num_items)
    relevant = _Rows(held, data.num_users, data.num_items)
    hits, counts = [], []
    for users in torch.split(relevant.users, _USERS_AT_ONCE):
        seen, wanted = known.dense(users), relevant.dense(users)
        if isinstance(model, MultVAE):
            score = model(seen)[0]
        else:
            score = model.score(users[:, None], torch.arange(data.num_items, device=held.device))
        best, item = score.masked_fill(seen > 0, -math.inf).topk(max(ks), dim=1)
        hits.append((wanted.gather(1, item) > 0) & (best > -math.inf))
        counts.append(wanted.sum(1).long())
    curve = metrics_from_hits(torch.cat(hits), torch.cat(counts))
    return {f"{name}@{k}": float(curve[name][k - 1]) for k in ks for name in _METRICS}


def _learning_rate(lr: float, final_lr: float | None, epoch: int, epochs: int) -> float:
    if final_lr is None:
        return lr
    return final_lr + 0.5 * (lr - final_lr) * (1 + math.cos(math.pi * epoch / epochs))


def _with_validation(model: Backbone, data: InteractionData, seed: int) -> InteractionData:
    if data.valid is None:
        data = hold_out_validation(data, generator=torch.Generator().manual_seed(seed))
        if isinstance(model, LightGCN):  # its graph must not show the held-out pairs
            model.replace_edges(data.train)
    if data.valid is None or data.valid.shape[1] == 0:
        raise ValueError("there are no validation pairs to select the epoch on; give data.valid or select_on='none'")
    return data


def _check_fit(
    model: Backbone,
    data: InteractionData,
    epochs: int,
    batch_size: int,
    lr: float,
    final_lr: float | None,
    l2: float,
    eval_every: int,
    patience: int | None,
) -> None:
    if (model.num_users, model.num_items) != (data.num_users, data.num_items):
        sizes = f"{model.num_users} users and {model.num_items} items, the data {data.num_users} and {data.num_items}"
        raise ValueError(f"the model has {sizes}")
    if data.train.shape[1] == 0:
        raise ValueError("data.train is empty: there is nothing to train on")
    counts: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "eval_every": eval_every}
    for name, count in counts.items():
        check_count(name, count)
    if patience is not None:
        check_count("patience", patience)
    check_positive("lr", lr)
    if final_lr is not None:
        check_positive("final_lr", final_lr)
    if not 0 <= l2 < math.inf:
        raise ValueError(f"l2 must be a finite number >= 0, got {l2!r}")


def _check_monitor(monitor: str, ks: Sequence[int], num_items: int) -> None:
    name, _, cutoff = monitor.partition("@")
    check_choice("monitor", name, _METRICS)
    if cutoff not in {str(k) for k in ks}:
        raise ValueError(f"monitor={monitor!r} needs its cut-off among ks={tuple(ks)}")
    for k in ks:
        if not 1 <= k <= num_items:
            raise ValueError(f"k must be in 1..{num_items} (the number of items), got {k!r}")
