"""Sampling of triples and the training run."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from recsys_losses._checks import check_choice, check_positive
from recsys_losses._epochs import EpochRun, EpochsResult
from recsys_losses._interactions import EdgeSet, InteractionData, count_ids, fingerprint
from recsys_losses.data import hold_out_validation
from recsys_losses.metrics import METRICS, evaluate_full_ranking
from recsys_losses.sampling import UniformNegativeSampler

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from recsys_losses.sgl._model import SGL

Sampling = Literal["user", "edge"]
SelectOn = Literal["valid", "test", "none"]

_SAMPLINGS = ("user", "edge")
_SELECT_ON = ("valid", "test", "none")
_MONITORS = tuple(metric for metric in METRICS if metric != "arp")
_CHECKPOINT = "recsys_losses sgl checkpoint"
# Triples drawn at once: enough to hide the cost of a call, few enough for the cache.
_DRAWN_AT_ONCE = 1 << 17


class BPRBatch(NamedTuple):
    """Triples of a batch, each a LongTensor `(B,)`.

    Attributes:
        users: Users.
        pos_items: A training item of each.
        neg_items: An item of the catalogue that is no training item of the user.
    """

    users: Tensor
    pos_items: Tensor
    neg_items: Tensor


class BPRSampler:
    """The batches of an epoch: as many triples (user, positive, negative) as there are training pairs.

    Every pass over it draws a new epoch from its generator.

    Args:
        data: Interactions; triples come from `data.train`, repeated pairs count once.
        batch_size: Triples per batch B; the last batch of an epoch may be shorter.
        sampling: `"user"`: a user drawn uniformly (with replacement) from those with a training pair, and one of his
            items, as the authors' code does: active users are seen less often than their pairs ask for. `"edge"`: every
            training pair once, in random order.
        seed: Seeds the generator, from which `fit` takes everything random.

    Raises:
        ValueError: If there is no training pair, a user has every item, `batch_size` is below 1, or `sampling` is unknown.

    Examples:
        >>> import torch
        >>> train = torch.tensor([[0, 0, 2], [0, 1, 2]])
        >>> sampler = BPRSampler(InteractionData(3, 4, train=train, test=train[:, :0]), batch_size=2)
        >>> [len(batch.users) for batch in sampler], len(sampler)
        ([2, 1], 2)
    """

    def __init__(
        self, data: InteractionData, *, batch_size: int = 2048, sampling: Sampling = "user", seed: int = 0
    ) -> None:
        check_choice("sampling", sampling, _SAMPLINGS)
        if not batch_size >= 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size!r}")
        if data.train.shape[1] == 0:
            raise ValueError("data.train is empty: there is nothing to train on")
        self.data, self.batch_size, self.sampling, self.seed = data, batch_size, sampling, seed
        self.generator = torch.Generator().manual_seed(seed)
        keys = EdgeSet(data.train.cpu(), data.num_items).keys
        self._user, self._item = keys.div(data.num_items, rounding_mode="floor"), keys % data.num_items
        self._degree = count_ids(self._user, data.num_users)
        if bool((self._degree == data.num_items).any()):
            full = int((self._degree == data.num_items).nonzero()[0])
            raise ValueError(f"user {full} has interacted with all items; no negative can be drawn")
        self._start = self._degree.cumsum(0) - self._degree
        self._active = self._degree.nonzero().squeeze(1)
        self._negatives = UniformNegativeSampler(data.num_items, exclude=data.train.cpu(), generator=self.generator)

    def __repr__(self) -> str:
        return (
            f"BPRSampler({self.num_triples} triples, batch_size={self.batch_size}, sampling={self.sampling!r}, "
            f"seed={self.seed})"
        )

    @property
    def num_triples(self) -> int:
        """Triples of an epoch: the number of distinct training pairs E."""
        return len(self._user)

    def __len__(self) -> int:
        return (self.num_triples + self.batch_size - 1) // self.batch_size

    def __iter__(self) -> Iterator[BPRBatch]:
        total = self.num_triples
        order = torch.randperm(total, generator=self.generator) if self.sampling == "edge" else None
        step = max(1, _DRAWN_AT_ONCE // self.batch_size) * self.batch_size
        for begin in range(0, total, step):
            pairs = self._random_pairs(min(step, total - begin)) if order is None else order[begin : begin + step]
            users, pos_items = self._user[pairs], self._item[pairs]
            neg_items = self._negatives.sample(users, 1).squeeze(1)
            for first in range(0, len(pairs), self.batch_size):
                rows = slice(first, first + self.batch_size)
                yield BPRBatch(users[rows], pos_items[rows], neg_items[rows])

    def _random_pairs(self, number: int) -> Tensor:
        """Return positions of pairs: users uniformly with replacement, then one pair of each."""
        drawn = torch.randint(len(self._active), (number,), generator=self.generator)
        user = self._active[drawn]
        share = torch.rand(number, dtype=torch.float64, generator=self.generator)
        return self._start[user] + (share * self._degree[user]).long()


def fit(
    model: SGL,
    sampler: BPRSampler,
    epochs: int,
    *,
    lr: float = 1e-3,
    eval_every: int = 1,
    patience: int | None = None,
    monitor: str = "recall@20",
    select_on: SelectOn = "valid",
    ks: Sequence[int] = (20,),
    device: torch.device | str = "cpu",
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = True,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> EpochsResult:
    """Train a model in place and leave it with the parameters of the best epoch.

    Every epoch draws two views and as many triples as there are training pairs, both from the generator of the sampler,
    and takes Adam steps. A resumed run equals an uninterrupted one bit for bit (on one device).

    Args:
        model: What is trained. It is moved to `device`.
        sampler: The triples; its `data` is what the epoch is chosen on.
        epochs: Epochs, at most.
        lr: Learning rate.
        eval_every: Epochs between two evaluations; the last epoch is always evaluated.
        patience: Evaluations without improvement after which training stops; None never stops early.
        monitor: Metric that chooses the epoch, such as `"ndcg@20"`; its cut-off must be among `ks`.
        select_on: `"valid"`: choose the epoch on `data.valid`. Where that is None, a tenth of each user's training pairs
            is held out (by the sampler's seed), and triples and graph come from the rest alone. `"test"`: choose it on
            the test pairs, as the authors' code does, with a warning. `"none"`: keep the last epoch, evaluate nothing.
        ks: Cut-offs of the metrics; unused, as `monitor` is, with `select_on="none"`.
        device: Torch device.
        checkpoint: safetensors file that is replaced after every epoch; None writes none.
        resume: Continue from `checkpoint` where it exists; False starts over.
        on_epoch: Called with the record of every finished epoch.

    Returns:
        The history (`loss`, `bpr`, `ssl` and `l2` per triple, the last two without their weights; `seconds`; metrics) and
        what was selected.

    Raises:
        ValueError: If an argument is out of range or unknown, the checkpoint doesn't fit, or there is nothing to select on.
        RuntimeError: If the loss isn't finite.

    Reference: the training loop of the authors' code, with validation pairs in place of test pairs.

    Examples:
        >>> import torch
        >>> from recsys_losses.sgl import SGL
        >>> pairs = torch.cartesian_prod(torch.arange(4), torch.arange(6)).T
        >>> data = InteractionData(4, 6, train=pairs[:, ::2], test=pairs[:, 1::2])
        >>> model = SGL(4, 6, data.train, embed_dim=4, seed=0)
        >>> result = fit(model, BPRSampler(data), 2, select_on="none")
        >>> len(result.history), result.best_epoch
        (2, 1)
    """
    metrics = _check_arguments(model, sampler.data, epochs, lr, eval_every, patience, monitor, select_on, ks)
    settings = {
        "model": model.options(),
        "data": fingerprint(sampler.data),
        "batch_size": sampler.batch_size,
        "sampling": sampler.sampling,
        "seed": sampler.seed,
        "lr": lr,
        "eval_every": eval_every,
        "patience": patience,
        "monitor": monitor,
        "select_on": select_on,
        "ks": list(ks),
    }
    sampler, ranked = _selection(model, sampler, select_on)
    device = torch.device(device)
    model.to(device)
    # The fused step is one pass over the tables, several times faster than the default on the CPU.
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=device.type in ("cpu", "cuda") or None)
    run = EpochRun(_CHECKPOINT, model, optimizer, sampler.generator, settings=settings)
    run.load_if_there(checkpoint, resume=resume)

    def evaluate() -> dict[str, float]:
        assert ranked is not None  # noqa: S101  # only called then
        with torch.no_grad():
            return evaluate_full_ranking(*model.embeddings(), sampler.data.train, ranked, ks=ks, metrics=metrics)

    return run.run(
        epochs,
        lambda _: _train_epoch(model, sampler, optimizer, device),
        None if ranked is None else evaluate,
        monitor=monitor,
        eval_every=eval_every,
        patience=patience,
        checkpoint=checkpoint,
        on_epoch=on_epoch,
    )


def _train_epoch(
    model: SGL, sampler: BPRSampler, optimizer: torch.optim.Optimizer, device: torch.device
) -> dict[str, float]:
    model.refresh_views(sampler.generator)
    total = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in sampler:
        optimizer.zero_grad(set_to_none=True)
        parts = model(*(ids.to(device) for ids in batch))
        parts.loss.backward()
        optimizer.step()
        scale = 1 if model.objective.reduction == "sum" else len(batch.users)
        total += torch.stack([part.detach() for part in parts]) * scale
    return dict(zip(("loss", "bpr", "ssl", "l2"), (total / sampler.num_triples).tolist(), strict=True))


def _selection(model: SGL, sampler: BPRSampler, select_on: str) -> tuple[BPRSampler, Tensor | None]:
    """Return what is trained on and the pairs that select the epoch."""
    data = sampler.data
    if select_on == "none":
        return sampler, None
    if select_on == "test":
        warnings.warn(
            "select_on='test' chooses the epoch on data.test: metrics on the same pairs are optimistic and not "
            "comparable with those of a run that selects on validation pairs (test-set leak)",
            UserWarning,
            stacklevel=3,
        )
        return sampler, data.test
    if data.valid is None:
        data = hold_out_validation(data, generator=torch.Generator().manual_seed(sampler.seed))
        model.replace_edges(data.train)  # its graph must not show the held-out pairs
        sampler = BPRSampler(data, batch_size=sampler.batch_size, sampling=sampler.sampling, seed=sampler.seed)
    if data.valid is None or data.valid.shape[1] == 0:
        raise ValueError("there are no validation pairs to select the epoch on; give data.valid or select_on='none'")
    return sampler, data.valid


def _check_arguments(
    model: SGL,
    data: InteractionData,
    epochs: int,
    lr: float,
    eval_every: int,
    patience: int | None,
    monitor: str,
    select_on: str,
    ks: Sequence[int],
) -> tuple[str, ...]:
    """Raise ValueError for arguments out of range; return the metrics to record."""
    if (model.num_users, model.num_items) != (data.num_users, data.num_items):
        raise ValueError(
            f"the model has {model.num_users} users and {model.num_items} items, "
            f"the sampler's data {data.num_users} and {data.num_items}"
        )
    for name, value in (("epochs", epochs), ("eval_every", eval_every), ("patience", patience)):
        if value is not None and not value >= 1:
            raise ValueError(f"{name} must be >= 1, got {value!r}")
    check_positive("lr", lr)
    check_choice("select_on", select_on, _SELECT_ON)
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
