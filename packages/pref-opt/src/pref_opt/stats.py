r"""Moving mean and standard deviation of reward gaps, shared by the methods that compare a batch with recent ones.

$$m\leftarrow\mu m+(1-\mu)\,\overline{G},\qquad s\leftarrow\mu s+(1-\mu)\,\text{std}(G)$$
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pref_opt._checks import check_below_one

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["MovingGapStats", "update_gap_stats"]


def update_gap_stats(
    gap: Tensor, mean: float | Tensor, std: float | Tensor, momentum: float = 0.9
) -> tuple[Tensor, Tensor]:
    r"""Return the moving mean and standard deviation after one more batch of gaps.

    $$m'=\mu m+(1-\mu)\frac1N\sum_iG_i,\qquad s'=\mu s+(1-\mu)\sqrt{\tfrac1{N-1}\sum_i(G_i-\overline G)^2}$$

    Source: the programs of beta-DPO and alpha-DPO. One gap has no spread: its standard deviation counts as 0 here, where
    theirs is NaN for ever.

    Args:
        gap: Reward gaps [N] of all processes, nats.
        mean: Moving mean before this batch, a number or a scalar tensor.
        std: Moving standard deviation before this batch.
        momentum: $\mu$ in [0, 1).

    Returns:
        New mean and new standard deviation, detached scalars in float32 or wider.

    Raises:
        ValueError: If `gap` is not a non-empty vector, or `momentum` is outside [0, 1).

    Examples:
        >>> import torch
        >>> from pref_opt.stats import update_gap_stats
        >>> mean, std = update_gap_stats(torch.tensor([1.0, 3.0]), 0.0, 0.0, momentum=0.5)
        >>> round(mean.item(), 3), round(std.item(), 3)
        (1.0, 0.707)
    """
    if gap.ndim != 1 or gap.numel() == 0:
        raise ValueError(f"gap must be a non-empty vector, got shape {tuple(gap.shape)}")
    check_below_one("momentum", momentum)
    gap = gap.detach().to(torch.promote_types(gap.dtype, torch.float32))
    spread = gap.std() if gap.numel() > 1 else gap.new_zeros(())
    return momentum * mean + (1 - momentum) * gap.mean(), momentum * std + (1 - momentum) * spread


class MovingGapStats:
    """Moving mean and standard deviation with their state.

    Args:
        momentum: Weight of the past in [0, 1).
        debias: Divide by one minus the weight of the zeros that the statistics start from.

    Raises:
        ValueError: If `momentum` is outside [0, 1).

    Examples:
        >>> import torch
        >>> from pref_opt.stats import MovingGapStats
        >>> stats = MovingGapStats(momentum=0.9, debias=True)
        >>> mean, std = stats.update(torch.tensor([1.0, 3.0]))
        >>> round(mean.item(), 3)
        2.0
    """

    def __init__(self, momentum: float = 0.9, *, debias: bool = False) -> None:
        check_below_one("momentum", momentum)
        self.momentum = momentum
        self.debias = debias
        self.num_updates = 0
        self._mean = torch.zeros(())
        self._std = torch.zeros(())

    def update(self, gap: Tensor) -> tuple[Tensor, Tensor]:
        """Take in the gaps [N] of all processes and return `current()`."""
        mean, std = self._mean.to(gap.device), self._std.to(gap.device)
        self._mean, self._std = update_gap_stats(gap, mean, std, self.momentum)
        self.num_updates += 1
        return self.current()

    def current(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation as scalar tensors."""
        if not self.debias or self.num_updates == 0:
            return self._mean, self._std
        seen = 1 - self.momentum**self.num_updates
        return self._mean / seen, self._std / seen

    def state_dict(self) -> dict[str, Any]:
        """Return the state: two tensors and the number of updates."""
        return {"mean": self._mean, "std": self._std, "num_updates": self.num_updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._mean, self._std = torch.as_tensor(state["mean"]), torch.as_tensor(state["std"])
        self.num_updates = int(state["num_updates"])
