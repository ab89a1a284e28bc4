"""What training needs of several processes: who we are, and sums and gathers with their gradients.

Every function is the identity in a single process. Processes hold replicas of the model and see the same batches, of
which each takes its share of the rows.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor


class Shard(NamedTuple):
    """This process among those that train together."""

    rank: int = 0
    world: int = 1

    def share(self, total: int) -> int:
        """Return how many of `total` rows every process computes; the last ones may repeat a row."""
        return -(-total // self.world)

    def valid(self, total: int) -> int:
        """Return how many of our rows are not repetitions; they come first."""
        share = self.share(total)
        return max(0, min(share, total - self.rank * share))

    def take(self, rows: Tensor) -> Tensor:
        """Return our rows of a tensor of the whole batch; the last row fills up."""
        if self.world == 1:
            return rows
        total = rows.shape[0]
        share = self.share(total)
        position = torch.arange(self.rank * share, (self.rank + 1) * share, device=rows.device)
        return rows.index_select(0, position.clamp_(max=total - 1))


def current_shard() -> Shard:
    """Return this process among the others; join them first if a launcher (torchrun, accelerate) started us."""
    if not dist.is_available():
        return Shard()
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _join()
    if not dist.is_initialized():
        return Shard()
    return Shard(dist.get_rank(), dist.get_world_size())


def _join() -> None:
    try:
        from accelerate import PartialState
    except ImportError:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    else:
        PartialState(cpu=not torch.cuda.is_available())


def gather_rows(rows: Tensor, total: int, shard: Shard) -> Tensor:
    """Return the rows of all processes in order, the repetitions at the end left out; gradients flow back to theirs.

    Args:
        rows: Our share `(P, ...)` of a batch, as `Shard.take` gives.
        total: Rows B of the whole batch.
        shard: This process.

    Returns:
        Tensor `(B, ...)`.
    """
    if shard.world == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows.contiguous(), shard)
    return gathered[:total]


class _Gather(torch.autograd.Function):
    """Concatenate over processes; backward sums what all of them found for our rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, shard: Shard) -> Tensor:
        ctx.shard, ctx.share = shard, rows.shape[0]
        parts = [torch.empty_like(rows) for _ in range(shard.world)]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        start = ctx.shard.rank * ctx.share
        return grad[start : start + ctx.share], None


def sum_gradients(parameters: Iterable[Tensor], shard: Shard) -> None:
    """Add up the gradients of all processes, in place."""
    if shard.world == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


def sum_over_processes(value: Tensor, shard: Shard) -> Tensor:
    """Return the sum of a tensor over all processes."""
    if shard.world == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value


def broadcast_from_first(tensors: Iterable[Tensor], shard: Shard) -> None:
    """Overwrite the tensors with those of the first process."""
    if shard.world == 1:
        return
    for tensor in tensors:
        dist.broadcast(tensor.detach(), src=0)


def barrier(shard: Shard) -> None:
    """Wait for all processes."""
    if shard.world > 1:
        dist.barrier()
