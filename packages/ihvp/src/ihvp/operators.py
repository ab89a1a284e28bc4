r"""The Hessian of a loss over a data set, summed exactly over batches and processes, or estimated from one random batch.

$$Hv=\sum_\beta w_\beta H_\beta v,\qquad w_\beta=n_\beta/n\ \text{(mean)}\quad\text{or}\quad 1\ \text{(sum)}$$

The batches of a loader may differ in size: each is weighted by its own, so the last, shorter one doesn't bias the mean.

Documentation: `docs/papers/ihvp/solvers.md`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch

from ihvp._trees import Pytree, leaves_like, rebuild
from ihvp.hvp import Mode, make_hvp, module_loss

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor, nn

__all__ = ["DataHVP", "StochasticHVP"]

Reduction = Literal["mean", "sum"]
REDUCTIONS = ("mean", "sum")


class DataHVP:
    r"""Hessian of a loss over everything that a loader yields; every product is one full pass.

    $$v\mapsto\Big(\sum_\beta w_\beta\nabla^2R_\beta(\theta)+l_2I\Big)v$$

    Dropout is off and batch norm uses its running statistics during a product; the modes of the module are put back.
    When `torch.distributed` is initialised, every process runs its own part of the data and the sums are added over all
    of them: the solver then has to run in each process with the same right-hand side. The module must be the bare one,
    not wrapped in DistributedDataParallel.

    Args:
        model: The module; parameters with `requires_grad` take part. Its present values are used at every product.
        loss: Called as `loss(model, *batch)` for a batch that is a tuple or list, else `loss(model, batch)`; returns a
            scalar.
        loader: Iterable over batches that can be iterated again and again: a DataLoader or a list. Order is irrelevant.
        reduction: How `loss` reduces over its batch: `"mean"` gives the Hessian of the mean over all samples, `"sum"`
            that of the sum.
        l2: Weight decay that `loss` leaves out, >= 0, in the same reduction.
        mode: See `make_hvp`.
        size: Samples of a batch; None takes the length of the first tensor in it.

    Attributes:
        params: Name to detached parameter, the structure of vectors.

    Raises:
        ValueError: If no parameter requires a gradient, `l2` is negative or `reduction` is unknown; at a product, if the
            loader yields nothing, a batch has no size, or for the reasons of `make_hvp`.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> batches = [(torch.ones(2, 1), torch.zeros(2, 1)), (2 * torch.ones(1, 1), torch.zeros(1, 1))]
        >>> H = DataHVP(model, lambda m, x, y: 0.5 * ((m(x) - y) ** 2).mean(), batches)
        >>> H({"weight": torch.ones(1, 1)})  # (1 + 1 + 4) / 3
        {'weight': tensor([[2.]])}
    """

    stochastic = False

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor],
        loader: Iterable[Any],
        reduction: Reduction = "mean",
        *,
        l2: float = 0.0,
        mode: Mode = "auto",
        size: Callable[[Any], int] | None = None,
    ) -> None:
        _check(reduction, l2)
        self.model = model
        self.loss = loss
        self.loader = loader
        self.reduction = reduction
        self.l2 = l2
        self.mode: Mode = mode
        self.size = size or _batch_size
        self.params = module_loss(model, loss)[1]

    def __call__(self, v: Pytree) -> Pytree:
        total, weight = self._local_sum(v)
        total, weight = _over_ranks(total, weight)
        if weight == 0:
            raise ValueError("the loader yields no samples; an iterator can be used up: pass a DataLoader or a list")
        factor = 1.0 / weight if self.reduction == "mean" else 1.0
        vector = leaves_like(self.params, v, "v", "params")
        out = [(h * factor).add(x.detach().to(h), alpha=self.l2) for h, x in zip(total, vector, strict=True)]
        return rebuild(self.params, out)

    def _local_sum(self, v: Pytree) -> tuple[list[Tensor], int]:
        """Sum over the batches of this process, and its samples."""
        total = [torch.zeros_like(p) for p in self.params.values()]
        samples = 0
        for batch in self.loader:
            count = self.size(batch)
            if count == 0:
                continue
            product = batch_product(self.model, self.loss, batch, v, self.mode)
            for leaf, h in zip(total, product, strict=True):
                leaf.add_(h, alpha=count if self.reduction == "mean" else 1)
            samples += count
        return total, samples


class StochasticHVP:
    r"""Hessian of a loss on one random batch per call: for `lissa` and `quadratic_sgd` only.

    $$v\mapsto\hat Hv,\qquad\mathbb{E}\hat H=H$$

    Every call draws its samples anew and independently, without replacement inside the batch. With the reduction
    `"sum"` the batch is multiplied by n / batch size.

    Args:
        model: The module; parameters with `requires_grad` take part.
        loss: Called as `loss(model, *batch)`; returns a scalar.
        data: Tensors of equal length (features, targets, ...), or a map-style dataset of samples, which torch's default
            collation puts together.
        batch_size: Samples per call, >= 1; all of them where there are fewer.
        reduction: How `loss` reduces over its batch.
        l2: Weight decay that `loss` leaves out, >= 0, in the same reduction.
        mode: See `make_hvp`.
        generator: Source of the batches, on the CPU; None means one seeded with 0.

    Attributes:
        params: Name to detached parameter, the structure of vectors.

    Raises:
        ValueError: If no parameter requires a gradient, `data` is empty or its tensors differ in length, `batch_size` < 1,
            `l2` is negative or `reduction` is unknown.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> x = torch.tensor([[1.0], [1.0], [2.0]])
        >>> H = StochasticHVP(model, lambda m, x: 0.5 * (m(x) ** 2).mean(), (x,), batch_size=1)
        >>> float(H({"weight": torch.ones(1, 1)})["weight"]) in (1.0, 4.0)
        True
        >>> H.exact({"weight": torch.ones(1, 1)})
        {'weight': tensor([[2.]])}
    """

    stochastic = True

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor],
        data: Any,
        batch_size: int = 256,
        reduction: Reduction = "mean",
        *,
        l2: float = 0.0,
        mode: Mode = "auto",
        generator: torch.Generator | None = None,
    ) -> None:
        _check(reduction, l2)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be an integer >= 1, got {batch_size!r}")
        self.data = data
        self.tensors = isinstance(data, (tuple, list)) and all(isinstance(part, torch.Tensor) for part in data)
        self.num_samples = _samples(data, self.tensors)
        self.batch_size = min(batch_size, self.num_samples)
        self.l2 = l2
        self.generator = generator if generator is not None else torch.Generator().manual_seed(0)
        self.full = DataHVP(model, loss, _InOrder(self), reduction, l2=l2, mode=mode, size=_batch_size)
        self.params = self.full.params

    def __call__(self, v: Pytree, *, generator: torch.Generator | None = None) -> Pytree:
        rows = torch.randperm(self.num_samples, generator=generator or self.generator)[: self.batch_size]
        full = self.full
        product = batch_product(full.model, full.loss, self.batch(rows), v, full.mode)
        factor = self.num_samples / self.batch_size if full.reduction == "sum" else 1.0
        vector = leaves_like(self.params, v, "v", "params")
        out = [(h * factor).add(x.detach().to(h), alpha=self.l2) for h, x in zip(product, vector, strict=True)]
        return rebuild(self.params, out)

    def exact(self, v: Pytree) -> Pytree:
        """The product with the Hessian over all samples, one pass in batches."""
        return self.full(v)

    def batch(self, rows: Tensor) -> Any:
        """Return the samples of some rows as one batch."""
        if self.tensors:
            return tuple(part[rows.to(part.device)] for part in self.data)
        return torch.utils.data.default_collate([self.data[int(row)] for row in rows])


class _InOrder:
    """All samples of a StochasticHVP in batches."""

    def __init__(self, operator: StochasticHVP) -> None:
        self.operator = operator

    def __iter__(self) -> Any:
        rows = torch.arange(self.operator.num_samples)
        return (self.operator.batch(part) for part in torch.split(rows, self.operator.batch_size))


def batch_product(model: nn.Module, loss: Callable[..., Tensor], batch: Any, v: Pytree, mode: Mode) -> list[Tensor]:
    """One product with the Hessian of one batch, in the order of the module's parameters."""
    loss_fn, params = module_loss(model, loss, *(batch if isinstance(batch, (tuple, list)) else (batch,)))
    return list(make_hvp(loss_fn, params, mode=mode)(v).values())


def _over_ranks(total: list[Tensor], samples: int) -> tuple[list[Tensor], int]:
    """Add sums and samples over all processes, in one message per dtype and device plus one for the samples."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return total, samples
    if torch.distributed.get_world_size() == 1:
        return total, samples
    count = torch.tensor([samples], dtype=torch.int64, device=total[0].device)
    torch.distributed.all_reduce(count)
    flat = torch.cat([leaf.reshape(-1) for leaf in total])
    torch.distributed.all_reduce(flat)
    parts = flat.split_with_sizes([leaf.numel() for leaf in total])
    out = [part.reshape(like.shape).to(like) for part, like in zip(parts, total, strict=True)]
    return out, int(count)


def _batch_size(batch: Any) -> int:
    found = _first_tensor(batch)
    if found is None or found.ndim == 0:
        raise ValueError(f"can't tell how many samples a batch of type {type(batch).__name__} holds: pass size")
    return found.shape[0]


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, torch.Tensor):
        return value
    entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return next((found for entry in entries if (found := _first_tensor(entry)) is not None), None)


def _samples(data: Any, tensors: bool) -> int:
    lengths = {len(part) for part in data} if tensors else {len(data)}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"data must be tensors of equal length or a dataset, not empty: got lengths {sorted(lengths)}")
    return int(lengths.pop())


def _check(reduction: str, l2: float) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    if not (l2 >= 0 and math.isfinite(l2)):
        raise ValueError(f"l2 must be a finite number >= 0, got {l2!r}")
