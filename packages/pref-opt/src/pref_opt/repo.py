r"""RePO: a rectifier on the difference of mean log-probabilities.

SimPO with its slope taken to infinity: no reference and no $\beta$, one margin $\gamma$. Pairs that the policy already
separates by the margin get no gradient at all, all others the same.

$$\ell_i=\max(0,\,\gamma-M_i),\qquad
M_i=\frac{\log\pi(y_w)}{|y_w|}-\frac{\log\pi(y_l)}{|y_l|}$$

Reference: J. Wu, K. Huang, X. Wang, J. Gao, B. Ding, J. Wu, X. He, X. Wang, *RePO: Understanding Preference Learning
Through ReLU-Based Optimization*, NeurIPS 2025, arXiv:2503.07426. Documentation: `docs/papers/pref-opt/repo.md`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from pref_opt._checks import check_count, check_finite, check_not_negative, check_pairs, check_positive
from pref_opt.baselines import checked_margin, chosen_nll, implicit_rewards, logistic_losses, reduced, upcast
from pref_opt.losses import LossOutput, PreferenceLoss

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from pref_opt.baselines import Reduction
    from pref_opt.losses import Logps, LossContext

__all__ = [
    "LinearMarginSchedule",
    "RePOLoss",
    "RePOPlusPlusLoss",
    "filtered_fraction",
    "repo_loss",
    "repo_plus_plus_loss",
]


def repo_loss(
    chosen_logps: Tensor, rejected_logps: Tensor, *, gamma: float | Tensor, reduction: Reduction = "mean"
) -> Tensor:
    r"""RePO (Wu et al., 2025).

    $$\ell_i=\max(0,\,\gamma-M_i),\qquad M_i=\bar\pi(y_{w,i})-\bar\pi(y_{l,i})$$

    The mean is over all pairs, those without gradient included. It is the limit of the SimPO loss divided by its slope:
    $0\le\frac1\beta\operatorname{softplus}(\beta(\gamma-M))-\ell\le\frac{\log2}{\beta}$. At $M=\gamma$ the gradient is 0.

    Args:
        chosen_logps: Preferred completions (B,), nats per token.
        rejected_logps: Other completions (B,).
        gamma: $\gamma$, nats per token, a finite number or one per pair (B,); 0 to 1, published 0.4 to 0.6. It may be
            negative, and no gradient is stopped in it.
        reduction: `"mean"`, or `"none"` for shape (B,).

    Returns:
        The loss in float32 or wider.

    Raises:
        ValueError: If a shape or dtype doesn't fit, the batch is empty, `gamma` isn't finite, or `reduction` is unknown.

    Examples:
        >>> import torch
        >>> from pref_opt.repo import repo_loss
        >>> repo_loss(torch.tensor([-1.0, -1.0]), torch.tensor([-1.25, -3.0]), gamma=0.5, reduction="none")
        tensor([0.2500, 0.0000])
    """
    return reduced(torch.relu(_shortfall(chosen_logps, rejected_logps, gamma)), reduction)


def repo_plus_plus_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    *,
    beta: float,
    gamma: float | Tensor,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""RePO++: the filter of RePO with the weights of SimPO.

    $$\ell_i=-\log\sigma\big(-\beta\max(0,\,\gamma-M_i)\big)$$

    Pairs below the margin have SimPO's loss and gradient with margin $\gamma/\beta$ taken as $\gamma$ here; pairs above it
    have the constant $\log2$ and gradient 0.

    The paper's programs don't hold this variant: the formula is derived from its description in words.

    Args:
        chosen_logps: Preferred completions (B,), nats per token.
        rejected_logps: Other completions (B,).
        beta: $\beta>0$; 2 to 10.
        gamma: $\gamma$, nats per token, a finite number or one per pair (B,).
        reduction: `"mean"`, or `"none"` for shape (B,).

    Returns:
        The loss in float32 or wider.

    Raises:
        ValueError: If a shape or dtype doesn't fit, the batch is empty, or an option is out of range.

    Examples:
        >>> import torch
        >>> from pref_opt.repo import repo_plus_plus_loss
        >>> chosen, rejected = torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -3.0])
        >>> repo_plus_plus_loss(chosen, rejected, beta=2.0, gamma=0.5, reduction="none")
        tensor([1.3133, 0.6931])
    """
    check_positive("beta", beta)
    short = torch.relu(_shortfall(chosen_logps, rejected_logps, gamma))
    return reduced(logistic_losses(-beta * short), reduction)


def filtered_fraction(chosen_logps: Tensor, rejected_logps: Tensor, *, gamma: float | Tensor) -> Tensor:
    r"""Share of the pairs that RePO gives no gradient.

    $$\frac1B\sum_i\mathbb 1[M_i\ge\gamma]$$

    Args:
        chosen_logps: Preferred completions (B,), nats per token.
        rejected_logps: Other completions (B,).
        gamma: $\gamma$, a finite number or one per pair (B,).

    Returns:
        Detached scalar in [0, 1], in float32 or wider.

    Raises:
        ValueError: If a shape or dtype doesn't fit, the batch is empty, or `gamma` isn't finite.

    Examples:
        >>> import torch
        >>> from pref_opt.repo import filtered_fraction
        >>> filtered_fraction(torch.tensor([-1.0, -1.0]), torch.tensor([-1.5, -1.25]), gamma=0.5)
        tensor(0.5000)
    """
    short = _shortfall(chosen_logps.detach(), rejected_logps.detach(), gamma).detach()
    return (short <= 0).to(short.dtype).mean()


def _shortfall(chosen_logps: Tensor, rejected_logps: Tensor, gamma: float | Tensor) -> Tensor:
    check_pairs(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    margin = checked_margin("gamma", gamma, len(chosen_logps))
    return margin - (upcast(chosen_logps) - upcast(rejected_logps))


class LinearMarginSchedule:
    r"""A margin that moves linearly from one value to another and stays there.

    $$\gamma(t)=\gamma_0+\min(t/T,1)\,(\gamma_1-\gamma_0)$$

    From a large margin, which filters almost nothing, to the final one. Derived: the paper's programs keep it constant.

    Args:
        start: $\gamma_0$, finite.
        end: $\gamma_1$, finite.
        total_steps: $T\ge1$, in calls of the loss in training: micro-batches, not optimiser steps.

    Raises:
        ValueError: If a margin isn't finite or `total_steps` < 1.

    Examples:
        >>> from pref_opt.repo import LinearMarginSchedule
        >>> gamma = LinearMarginSchedule(1.0, 0.5, total_steps=100)
        >>> gamma(0), gamma(50), gamma(1000)
        (1.0, 0.75, 0.5)
    """

    def __init__(self, start: float, end: float, total_steps: int) -> None:
        check_finite("start", start)
        check_finite("end", end)
        check_count("total_steps", total_steps)
        self.start = start
        self.end = end
        self.total_steps = total_steps

    def __call__(self, step: int) -> float:
        """Return the margin of a step, counted from 0."""
        check_count("step", step, least=0)
        return self.start + min(step / self.total_steps, 1.0) * (self.end - self.start)


class RePOLoss(PreferenceLoss):
    r"""RePO as a loss object, on means per token and without a reference; see `repo_loss`.

    Rewards for logs are the mean log-probabilities. Metrics: `filtered_fraction`, `M/mean` and `M/std` of $M$; `gamma` with a
    schedule, `nll` with a likelihood term.

    Args:
        gamma: $\gamma$, a finite number; without effect where a schedule is given.
        gamma_schedule: Margin by number of training calls so far, or the arguments of `LinearMarginSchedule` as a mapping.
            The number of calls is the state of this object.
        sft_weight: Weight >= 0 of the negative log-likelihood of the preferred completions.

    Raises:
        ValueError: If an option is out of range.

    Examples:
        >>> import torch
        >>> from pref_opt.losses import LossContext, Logps, make_loss
        >>> out = make_loss("repo", gamma=0.5)(Logps(torch.tensor([-1.0]), torch.tensor([-1.25])), LossContext())
        >>> out.loss, out.metrics["filtered_fraction"]
        (tensor(0.2500), tensor(0.))
    """

    requires_reference = False
    length_normalized = True
    beta = 1.0

    def __init__(
        self,
        gamma: float = 0.5,
        gamma_schedule: Callable[[int], float] | Mapping[str, Any] | None = None,
        sft_weight: float = 0.0,
    ) -> None:
        check_finite("gamma", gamma)
        check_not_negative("sft_weight", sft_weight)
        self.gamma = gamma
        self.gamma_schedule = _schedule(gamma_schedule)
        self.sft_weight = sft_weight
        self.num_updates = 0

    def _loss(self, logps: Logps, gamma: float) -> Tensor:
        return repo_loss(logps.chosen, logps.rejected, gamma=gamma)

    def __call__(self, logps: Logps, context: LossContext) -> LossOutput:
        """Compute the loss of one micro-batch; a schedule advances only in training."""
        gamma = self.gamma if self.gamma_schedule is None else self.gamma_schedule(self.num_updates)
        loss = self._loss(logps, gamma)
        rewards = implicit_rewards(logps, self.beta, reference=False)
        gap = upcast(logps.chosen.detach()) - upcast(logps.rejected.detach())
        metrics = {
            "filtered_fraction": filtered_fraction(logps.chosen, logps.rejected, gamma=gamma),
            "M/mean": gap.mean(),
            "M/std": gap.std(correction=0),
        }
        if self.gamma_schedule is not None:
            metrics["gamma"] = gap.new_full((), gamma)
            self.num_updates += int(context.training)
        if self.sft_weight:
            nll = chosen_nll(logps, length_normalized=True)
            loss = loss + self.sft_weight * nll
            metrics["nll"] = nll.detach()
        return LossOutput(loss, *rewards, metrics)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of training calls, or nothing without a schedule."""
        return {} if self.gamma_schedule is None else {"num_updates": self.num_updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; raises ValueError where the names differ."""
        super().load_state_dict(state)
        self.num_updates = int(state.get("num_updates", 0))


class RePOPlusPlusLoss(RePOLoss):
    r"""RePO++ as a loss object; see `repo_plus_plus_loss`. Rewards for logs are $\beta$ times the mean log-probabilities.

    Args:
        beta: $\beta>0$.
        gamma: As in `RePOLoss`.
        gamma_schedule: As in `RePOLoss`.
        sft_weight: As in `RePOLoss`.

    Raises:
        ValueError: If an option is out of range.

    Examples:
        >>> import torch
        >>> from pref_opt.losses import LossContext, Logps, make_loss
        >>> loss = make_loss("repo_plus_plus", beta=2.0, gamma=0.5)
        >>> loss(Logps(torch.tensor([-1.0]), torch.tensor([-1.0])), LossContext()).loss
        tensor(1.3133)
    """

    def __init__(
        self,
        beta: float = 2.5,
        gamma: float = 0.5,
        gamma_schedule: Callable[[int], float] | Mapping[str, Any] | None = None,
        sft_weight: float = 0.0,
    ) -> None:
        check_positive("beta", beta)
        super().__init__(gamma, gamma_schedule, sft_weight)
        self.beta = beta

    def _loss(self, logps: Logps, gamma: float) -> Tensor:
        return repo_plus_plus_loss(logps.chosen, logps.rejected, beta=self.beta, gamma=gamma)


def _schedule(value: Callable[[int], float] | Mapping[str, Any] | None) -> Callable[[int], float] | None:
    if value is None or callable(value):
        return value
    accepted = {"start", "end", "total_steps"}
    if not isinstance(value, Mapping) or set(value) != accepted:
        raise ValueError(
            f"gamma_schedule must be a function of the step or a mapping with {sorted(accepted)}, got {value!r}"
        )
    return LinearMarginSchedule(**value)
