r"""gamma-PO: a total margin, dealt out among the pairs by how far the policy already separates them.

Fixed margins treat clear and ambiguous pairs alike. Here clear pairs get more of the margin and ambiguous ones, which are
often mislabelled, less; a Kullback-Leibler term keeps the shares near uniform. Works with every loss $-\log\sigma(r-\gamma)$.

$$
\gamma_i=\gamma_0Np_i,\qquad
p=\arg\min_{p\in\Delta}\ \frac1N\sum_{i=1}^N-\log\sigma(r_i-\gamma_0Np_i)+\tau\,\text{KL}(p\,\|\,\text{uniform})
$$

Reference: J. Sun, J. Wu, J. Wu, Z. Zhu, X. Lu, J. Zhou, L. Ma, X. Wang, *Robust Preference Optimization via Dynamic Target
Margins*, Findings of ACL 2025, arXiv:2506.03690. Documentation: `docs/papers/pref-opt/gamma_po.md`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch

from pref_opt._checks import (
    check_choice,
    check_count,
    check_label_smoothing,
    check_not_negative,
    check_pairs,
    check_positive,
)
from pref_opt.baselines import (
    check_values,
    implicit_rewards,
    logistic_losses,
    reduced,
    references,
    reward_gap,
    upcast,
)
from pref_opt.losses import LossOutput, PreferenceLoss

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from pref_opt.baselines import Reduction
    from pref_opt.losses import Logps, LossContext

__all__ = ["GammaPOLoss", "RewardGapQueue", "dynamic_margins", "gamma_dpo_loss", "gamma_simpo_loss"]

# Defaults per form: with sums the gaps are larger, so that the slope is smaller and the margin in nats larger.
DEFAULTS = {"simpo": (2.5, 0.3), "dpo": (0.1, 10.0)}


@torch.no_grad()
def dynamic_margins(
    reward_gaps: Tensor,
    history: Tensor | None = None,
    *,
    gamma0: float,
    tau: float,
    num_iters: int = 20,
    eps: float = 1e-10,
) -> Tensor:
    r"""Margins of the pairs of a batch, from multiplicative updates of their shares (Sun et al., 2025, eq. 22 to 24).

    $$
    p\leftarrow\frac{p\,e^{-\eta g}}{\sum_jp_je^{-\eta g_j}},\qquad
    g_i=\gamma_0\,\sigma(\gamma_0Np_i-r_i)+\tau\big(1+\log(Np_i)\big),\qquad\eta=\min\Big(\frac1{2\tau},1\Big)
    $$

    from $p=1/N$, in the log domain. The problem is strictly convex; at its optimum
    $\tau\log(Np_i)+\gamma_0\sigma(\gamma_i-r_i)$ is the same for all pairs, so margins rise with the gaps, average to
    $\gamma_0$ and differ at most by the factor $e^{\gamma_0/\tau}$. For $\tau\ge\frac12$ the distance to it about halves in
    each update; for smaller $\tau$ the number of updates is part of the method. As in the authors' program, the margins are
    those before the last of `num_iters` updates.

    Args:
        reward_gaps: Rewards of the preferred minus those of the other completions (B,), $\beta$ included.
        history: Further gaps (Q,) in the same problem; None or empty for none.
        gamma0: $\gamma_0\ge0$, the mean margin, in units of reward.
        tau: $\tau>0$; larger values make the margins more equal.
        num_iters: Number of updates, >= 1, the last of which isn't used.
        eps: Added to the shares inside the logarithm, >= 0.

    Returns:
        Margins (B,) without a graph, in float32 or wider.

    Raises:
        ValueError: If a shape or dtype doesn't fit, the batch is empty, gaps aren't finite (checked in main memory only), or
            an option is out of range.

    Examples:
        >>> import torch
        >>> from pref_opt.gamma_po import dynamic_margins
        >>> dynamic_margins(torch.tensor([-2.0, 0.0, 2.0]), gamma0=1.0, tau=1.0)
        tensor([0.7372, 0.9220, 1.3408])
    """
    _check_solver(gamma0, tau, num_iters)
    check_not_negative("eps", eps)
    check_pairs(reward_gaps=reward_gaps)
    gaps = upcast(reward_gaps)
    check_values("reward_gaps", gaps)
    if history is not None and history.numel():
        check_pairs(history=history)
        check_values("history", history)
        gaps = torch.cat([gaps, history.to(gaps)])
    count, step = len(gaps), min(0.5 / tau, 1.0)
    log_p = torch.full_like(gaps, -math.log(count))
    for _ in range(num_iters - 1):
        p = log_p.exp()
        pull = torch.sub(gamma0 * count * p, gaps).sigmoid_()
        # What is the same for all pairs, tau (1 + log N), cancels when the shares are normalised.
        log_p.sub_(p.add_(eps).log_(), alpha=step * tau).sub_(pull, alpha=step * gamma0)
        log_p = log_p.log_softmax(0)
    return gamma0 * count * log_p[: len(reward_gaps)].exp()


def gamma_simpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    history: Tensor | None = None,
    *,
    beta: float,
    gamma_beta_ratio: float,
    tau: float,
    num_iters: int = 20,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""SimPO with dynamic margins (Sun et al., 2025, eq. 12).

    $$\ell_i=-\log\sigma(r_i-\gamma_i),\qquad r_i=\beta D_i$$

    The margins carry no gradient. Source of $\gamma_i$: `dynamic_margins` with $\gamma_0=\beta\cdot\text{ratio}$.

    Args:
        chosen_logps: Preferred completions (B,), nats per token.
        rejected_logps: Other completions (B,).
        history: Further reward gaps (Q,), $\beta$ included; None or empty for none.
        beta: $\beta>0$; 2.5 to 10.
        gamma_beta_ratio: Mean margin over $\beta$, >= 0; 0.15 to 0.5.
        tau: $\tau>0$; 3 to 20.
        num_iters: Number of updates of the margins, >= 1.
        reduction: `"mean"`, or `"none"` for shape (B,).

    Returns:
        The loss in float32 or wider.

    Raises:
        ValueError: If a shape or dtype doesn't fit, the batch is empty, gaps aren't finite (checked in main memory only), or
            an option is out of range.

    Examples:
        >>> import torch
        >>> from pref_opt.gamma_po import gamma_simpo_loss
        >>> gamma_simpo_loss(torch.tensor([-1.0]), torch.tensor([-1.25]), beta=2.0, gamma_beta_ratio=0.25, tau=10.0)
        tensor(0.6931)
    """
    check_positive("beta", beta)
    check_pairs(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    gaps = beta * (upcast(chosen_logps) - upcast(rejected_logps))
    margins = dynamic_margins(gaps, history, gamma0=_gamma0(beta, gamma_beta_ratio), tau=tau, num_iters=num_iters)
    return reduced(logistic_losses(gaps - margins), reduction)


def gamma_dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    history: Tensor | None = None,
    *,
    beta: float,
    gamma_beta_ratio: float,
    tau: float,
    label_smoothing: float = 0.0,
    num_iters: int = 20,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""DPO with dynamic margins of mean zero, as in the authors' program.

    $$\ell_i=-(1-\varepsilon)\log\sigma(z_i)-\varepsilon\log\sigma(-z_i),\qquad z_i=r_i-(\gamma_i-\gamma_0),\quad r_i=\beta G_i$$

    The paper (eq. 11) doesn't take $\gamma_0$ off; then large $\tau$ gives DPO with an offset and not DPO.

    Args:
        chosen_logps: Preferred completions under the policy (B,), nats.
        rejected_logps: Other completions under the policy (B,).
        ref_chosen_logps: Preferred completions under the reference (B,).
        ref_rejected_logps: Other completions under the reference (B,).
        history: Further reward gaps (Q,), $\beta$ included; None or empty for none.
        beta: $\beta>0$; 0.01 to 0.1 with sums.
        gamma_beta_ratio: Mean margin over $\beta$, >= 0; 10 to 50 for $\beta=0.1$, so that the margins are of the size of
            the gaps.
        tau: $\tau>0$.
        label_smoothing: $\varepsilon$ in [0, 0.5).
        num_iters: Number of updates of the margins, >= 1.
        reduction: `"mean"`, or `"none"` for shape (B,).

    Returns:
        The loss in float32 or wider.

    Raises:
        ValueError: If a shape or dtype doesn't fit, the batch is empty, gaps aren't finite (checked in main memory only), or
            an option is out of range.

    Examples:
        >>> import torch
        >>> from pref_opt.gamma_po import gamma_dpo_loss
        >>> same = torch.tensor([-7.0, -9.0])
        >>> gamma_dpo_loss(same, same, same, same, beta=0.1, gamma_beta_ratio=10.0, tau=5.0)  # equal gaps: DPO
        tensor(0.6931)
    """
    check_positive("beta", beta)
    gamma0 = _gamma0(beta, gamma_beta_ratio)
    gaps = beta * reward_gap(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    margins = dynamic_margins(gaps, history, gamma0=gamma0, tau=tau, num_iters=num_iters)
    return reduced(logistic_losses(gaps - (margins - gamma0), label_smoothing), reduction)


def _gamma0(beta: float, gamma_beta_ratio: float) -> float:
    check_not_negative("gamma_beta_ratio", gamma_beta_ratio)
    return beta * gamma_beta_ratio


def _check_solver(gamma0: float, tau: float, num_iters: int) -> None:
    check_not_negative("gamma0", gamma0)
    check_positive("tau", tau)
    check_count("num_iters", num_iters)


class RewardGapQueue:
    """The most recent reward gaps of each process, first in, first out.

    It starts with a few standard normal draws in one row, which every process reads. The first push of W processes makes W
    rows of it, and process w reads row w: each has its own past, yet all hold all rows, so that one checkpoint serves all of
    them. With another number of processes later on, process w takes over row w modulo the old number.

    Args:
        max_size: Most gaps per process, >= 1; older ones are forgotten.
        pool_size: Size of the pool that `sample` fills up, >= 1.
        init_size: Number of initial draws, in [0, `max_size`].
        seed: Seed of the initial draws, and of samples without a generator.

    Raises:
        ValueError: If a size is out of range.

    Examples:
        >>> import torch
        >>> from pref_opt.gamma_po import RewardGapQueue
        >>> queue = RewardGapQueue(max_size=3, pool_size=4, init_size=0)
        >>> queue.push(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        >>> len(queue), queue.sample(2).shape, queue.state_dict()["history"]
        (3, torch.Size([2]), tensor([[2., 3., 4.]]))
    """

    def __init__(self, max_size: int = 2048, pool_size: int = 256, init_size: int = 8, seed: int = 0) -> None:
        check_count("max_size", max_size)
        check_count("pool_size", pool_size)
        check_count("init_size", init_size, least=0)
        if init_size > max_size:
            raise ValueError(f"init_size must be at most max_size = {max_size}, got {init_size}")
        self.max_size = max_size
        self.pool_size = pool_size
        self.seed = seed
        self.num_pushes = 0
        self._history = torch.randn(1, init_size, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        """Return the number of gaps of one process."""
        return self._history.shape[1]

    def sample(self, batch_size: int, generator: torch.Generator | None = None, *, process: int = 0) -> Tensor:
        """Draw what a pool has room for beside a batch, uniformly and without replacement.

        Args:
            batch_size: Number of pairs of the batch, >= 1.
            generator: On the CPU; without one, the draw depends on the seed and the number of pushes only.
            process: Whose gaps, >= 0.

        Returns:
            Gaps (n,), n = min(number of gaps, `pool_size` - `batch_size`) or 0, on the device of the last push.

        Raises:
            ValueError: If `batch_size` < 1 or `process` < 0.
        """
        check_count("batch_size", batch_size)
        check_count("process", process, least=0)
        row = self._history[process % len(self._history)]
        wanted = max(0, min(len(row), self.pool_size - batch_size))
        if generator is None:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.num_pushes) % 2**32)
        order = torch.randperm(len(row), generator=generator)[:wanted]
        # From pageable memory this copies before it returns, and doesn't wait for the device's queue.
        return row[order.to(row.device, non_blocking=True)]

    def push(self, gaps: Tensor) -> None:
        """Append the gaps of a step in their order and forget the oldest.

        Args:
            gaps: (B,) of one process, or (W, B) of all of them. Non-finite gaps are refused in main memory and stored as 0
                on a device, where looking at them would mean to wait.

        Raises:
            ValueError: If the shape or dtype doesn't fit, or gaps in main memory aren't finite.
        """
        if not gaps.is_floating_point() or gaps.ndim not in (1, 2) or gaps.numel() == 0:
            raise ValueError(f"gaps must be floating, (B,) or (W, B), got {gaps.dtype} of shape {tuple(gaps.shape)}")
        gaps = gaps.detach().view(-1, gaps.shape[-1])
        check_values("gaps", gaps)
        gaps = torch.where(gaps.isfinite(), gaps, 0.0).to(self._history.dtype)
        history = self._history.to(gaps.device, non_blocking=True)
        if len(history) != len(gaps):
            history = torch.stack([history[row % len(history)] for row in range(len(gaps))])
        self._history = torch.cat([history, gaps], 1)[:, -self.max_size :]
        self.num_pushes += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the gaps (W, n), oldest first, and the number of pushes."""
        return {"history": self._history.clone(), "num_pushes": self.num_pushes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; raises ValueError where it doesn't fit into this queue."""
        history = torch.as_tensor(state["history"], dtype=self._history.dtype)
        if history.ndim != 2 or len(history) == 0 or history.shape[1] > self.max_size:
            raise ValueError(
                f"history must have at least one row of at most max_size = {self.max_size} gaps, "
                f"got shape {tuple(history.shape)}"
            )
        self._history = history.clone()
        self.num_pushes = int(state["num_pushes"])


class GammaPOLoss(PreferenceLoss):
    r"""gamma-PO as a loss object: `gamma_simpo_loss` or `gamma_dpo_loss` with its pool of reward gaps.

    With `pool="queue"` a process solves its micro-batch together with up to 256 of its own past gaps, and pushes its gaps
    afterwards. With `pool="gathered"` the pool is the micro-batch of all processes, without a past. Evaluation leaves the
    queue as it is and gathers nothing. Metrics: mean, smallest and largest margin of the batch, size of the pool.

    Args:
        base: `"simpo"` (means per token, no reference) or `"dpo"` (sums and a reference).
        beta: $\beta>0$; None gives 2.5 for SimPO and 0.1 for DPO.
        gamma_beta_ratio: Mean margin over $\beta$, >= 0; None gives 0.3 for SimPO and 10 for DPO.
        tau: $\tau>0$; larger values make the margins more equal. The best one depends on the model, 3 to 20 in the paper.
        num_iters: Number of updates of the margins, >= 1.
        pool: `"queue"` or `"gathered"`.
        label_smoothing: $\varepsilon$ in [0, 0.5), around the shifted argument in both forms.
        seed: Seed of the queue.

    Raises:
        ValueError: If an option is out of range.

    Examples:
        >>> import torch
        >>> from pref_opt.losses import LossContext, Logps, make_loss
        >>> loss = make_loss("gamma_po", tau=1.0)
        >>> out = loss(Logps(torch.tensor([-1.0, -1.0]), torch.tensor([-2.0, -1.0])), LossContext())
        >>> clear, ambiguous = out.metrics["margin/max"], out.metrics["margin/min"]
        >>> bool(clear > ambiguous), int(out.metrics["margin/pool_size"])
        (True, 10)
    """

    couples_pairs = True

    def __init__(
        self,
        base: Literal["simpo", "dpo"] = "simpo",
        beta: float | None = None,
        gamma_beta_ratio: float | None = None,
        tau: float = 10.0,
        num_iters: int = 20,
        pool: Literal["queue", "gathered"] = "queue",
        label_smoothing: float = 0.0,
        *,
        seed: int = 0,
    ) -> None:
        check_choice("base", base, DEFAULTS)
        check_choice("pool", pool, ("queue", "gathered"))
        default_beta, default_ratio = DEFAULTS[base]
        self.beta = default_beta if beta is None else beta
        check_positive("beta", self.beta)
        self.gamma0 = _gamma0(self.beta, default_ratio if gamma_beta_ratio is None else gamma_beta_ratio)
        _check_solver(self.gamma0, tau, num_iters)
        check_label_smoothing(label_smoothing)
        self.base = base
        self.tau = tau
        self.num_iters = num_iters
        self.label_smoothing = label_smoothing
        self.queue = RewardGapQueue(seed=seed) if pool == "queue" else None
        self.requires_reference = base == "dpo"
        self.length_normalized = base == "simpo"

    def __call__(self, logps: Logps, context: LossContext) -> LossOutput:
        """Compute the loss of one micro-batch; the queue changes only in training."""
        gaps = self._gaps(logps)
        history = self._history(gaps.detach(), context)
        margins = dynamic_margins(gaps, history, gamma0=self.gamma0, tau=self.tau, num_iters=self.num_iters)
        shift = margins - self.gamma0 if self.base == "dpo" else margins
        loss = reduced(logistic_losses(gaps - shift, self.label_smoothing), "mean")
        metrics = {
            "margin/mean": margins.mean(),
            "margin/min": margins.min(),
            "margin/max": margins.max(),
            "margin/pool_size": margins.new_full((), len(gaps) + len(history)),
        }
        return LossOutput(loss, *implicit_rewards(logps, self.beta, reference=self.requires_reference), metrics)

    def _gaps(self, logps: Logps) -> Tensor:
        if self.base == "dpo":
            return self.beta * reward_gap(logps.chosen, logps.rejected, *references(logps))
        check_pairs(chosen_logps=logps.chosen, rejected_logps=logps.rejected)
        return self.beta * (upcast(logps.chosen) - upcast(logps.rejected))

    def _history(self, gaps: Tensor, context: LossContext) -> Tensor:
        """Return the rest of the pool beside this process's batch."""
        everyone = context.gather(gaps) if context.training and context.world_size > 1 else gaps
        if self.queue is None:
            start = context.process_index * len(gaps)
            return (
                torch.cat([everyone[:start], everyone[start + len(gaps) :]]) if len(everyone) > len(gaps) else gaps[:0]
            )
        check_values("reward_gaps", gaps)
        history = self.queue.sample(len(gaps), process=context.process_index).to(gaps.device, non_blocking=True)
        if context.training:
            self.queue.push(everyone.reshape(-1, len(gaps)))
        return history

    def state_dict(self) -> dict[str, Any]:
        """Return the queue, or nothing where there is none."""
        return {} if self.queue is None else self.queue.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; raises ValueError where it was written by another method."""
        super().load_state_dict(state)
        if self.queue is not None:
            self.queue.load_state_dict(state)
