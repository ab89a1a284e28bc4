r"""alpha-DPO: SimPO with a margin of its own for every pair.

SimPO asks of all pairs the same margin. alpha-DPO adds how much further the policy already separates a pair than the
reference does, standardised over recent batches: pairs that have moved a lot get a larger margin, the others a smaller
one. The margin carries no gradient, and the reward stays free of the reference.

$$
\mathcal{L}=-\frac1B\sum_i\log\sigma\big(\beta(D_i-\mu_i)\big),\qquad
\mu_i=\text{sg}\Big[\gamma_\beta+\alpha\,\frac{G_i-m}{s}\Big]
$$

with $D$ the difference of the mean log-probabilities per token, $G$ the same difference minus that of the reference.

Reference: J. Wu, X. Wang, Z. Yang, J. Wu, J. Gao, B. Ding, X. Wang, X. He, *AlphaDPO: Adaptive Reward Margin for Direct
Preference Optimization*, ICML 2025, arXiv:2410.10148, eq. 8-12. Documentation: `docs/papers/pref-opt/alpha_dpo.md`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch

from pref_opt._checks import (
    check_choice,
    check_finite,
    check_label_smoothing,
    check_not_negative,
    check_pairs,
    check_positive,
)
from pref_opt.baselines import check_values, references, reward_gap, simpo_loss, upcast
from pref_opt.losses import LossOutput, PlannedLoss
from pref_opt.stats import MovingGapStats

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from pref_opt.losses import Logps, LossContext

__all__ = ["AlphaDPOLoss", "adaptive_margin", "alpha_dpo_loss", "alpha_dpo_rewards"]


def adaptive_margin(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    gamma_beta_ratio: float,
    alpha: float,
    gap_mean: float | Tensor,
    gap_std: float | Tensor,
    eps: float = 1e-6,
) -> Tensor:
    r"""Return the margin of each pair.

    $$\mu_i=\gamma_\beta+\alpha\,\frac{G_i-m}{\max(s,\epsilon)}$$

    Source: eq. 10-12 of the paper in the units of the authors' code, which multiplies the whole margin by beta.

    Args:
        chosen_logps: Log-probabilities of the preferred completions [B], means over tokens, nats per token.
        rejected_logps: Log-probabilities of the other completions [B].
        ref_chosen_logps: The same as `chosen_logps` under the frozen reference.
        ref_rejected_logps: The same as `rejected_logps` under the frozen reference.
        gamma_beta_ratio: $\gamma_\beta$, the margin of a pair with an average gap, nats per token.
        alpha: Weight of the standardised gap; 0 is SimPO, negative values reverse the adaptation.
        gap_mean: Moving mean $m$ after this batch was taken in, a number or a scalar tensor.
        gap_std: Moving standard deviation $s\ge0$ after this batch was taken in.
        eps: Least divisor, positive.

    Returns:
        Margins [B], detached, in float32 or wider.

    Raises:
        ValueError: If the log-probabilities aren't floating vectors of one length, or a number is out of range.

    Examples:
        >>> import torch
        >>> from pref_opt.alpha_dpo import adaptive_margin
        >>> chosen, rejected, zero = torch.tensor([-1.0, -1.0]), torch.tensor([-1.5, -1.1]), torch.zeros(2)
        >>> adaptive_margin(
        ...     chosen, rejected, zero, zero, gamma_beta_ratio=0.3, alpha=0.2, gap_mean=0.3, gap_std=0.2
        ... )
        tensor([0.5000, 0.1000])
    """
    check_finite("gamma_beta_ratio", gamma_beta_ratio)
    check_finite("alpha", alpha)
    check_positive("eps", eps)
    if not isinstance(gap_std, torch.Tensor):
        check_not_negative("gap_std", gap_std)
    gap = reward_gap(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    spread = torch.as_tensor(gap_std, dtype=gap.dtype, device=gap.device).clamp_min(eps)
    return (gamma_beta_ratio + alpha * ((gap - gap_mean) / spread)).detach()


def alpha_dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    gamma_beta_ratio: float,
    alpha: float,
    gap_mean: float | Tensor,
    gap_std: float | Tensor,
    label_smoothing: float = 0.0,
    eps: float = 1e-6,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    r"""alpha-DPO loss.

    $$
    \ell_i=-(1-e)\log\sigma(z_i)-e\log\sigma(-z_i),\qquad z_i=\beta(D_i-\mu_i),\qquad
    \frac{\partial\mathcal{L}}{\partial\log\pi(y^w_i)}=-\frac{\beta\,\sigma(-z_i)}{B}\quad(e=0)
    $$

    with $\mu_i$ of `adaptive_margin`. Only $D$ carries a gradient. Source: eq. 12 of the paper; the label smoothing $e$ is
    the authors' code's.

    Args:
        chosen_logps: Log-probabilities of the preferred completions [B], means over tokens, nats per token.
        rejected_logps: Log-probabilities of the other completions [B].
        ref_chosen_logps: The same as `chosen_logps` under the frozen reference.
        ref_rejected_logps: The same as `rejected_logps` under the frozen reference.
        beta: Positive.
        gamma_beta_ratio: Margin of a pair with an average gap, nats per token.
        alpha: Weight of the standardised gap; 0 is SimPO.
        gap_mean: Moving mean of the gaps after this batch was taken in.
        gap_std: Moving standard deviation of the gaps after this batch was taken in, $\ge0$.
        label_smoothing: $e$ in [0, 0.5); it flips around the margin.
        eps: Least divisor of the standardised gap, positive.
        reduction: `"mean"` gives a scalar, `"none"` [B].

    Returns:
        The loss in float32 or wider.

    Raises:
        ValueError: If the log-probabilities aren't floating vectors of one length, a number is out of range or
            `reduction` is unknown.

    Examples:
        >>> import torch
        >>> from pref_opt.alpha_dpo import alpha_dpo_loss
        >>> chosen, rejected, zero = torch.tensor([-1.0, -1.0]), torch.tensor([-1.5, -1.1]), torch.zeros(2)
        >>> options = {"beta": 2.5, "gamma_beta_ratio": 0.3, "gap_mean": 0.3, "gap_std": 0.2}
        >>> alpha_dpo_loss(chosen, rejected, zero, zero, alpha=0.2, reduction="none", **options)
        tensor([0.6931, 0.6931])
    """
    margin = adaptive_margin(
        chosen_logps,
        rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        gamma_beta_ratio=gamma_beta_ratio,
        alpha=alpha,
        gap_mean=gap_mean,
        gap_std=gap_std,
        eps=eps,
    )
    return simpo_loss(
        chosen_logps,
        rejected_logps,
        beta=beta,
        gamma_beta_ratio=margin,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


def alpha_dpo_rewards(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    r"""Return the implicit rewards, for logs.

    $$r(y)=\beta\Big(\log\pi(y)-\alpha\log\frac{\pi(y)}{\pi_\text{ref}(y)}\Big)$$

    Source: the authors' code.

    Args:
        chosen_logps: Log-probabilities of the preferred completions [B], means over tokens, nats per token.
        rejected_logps: Log-probabilities of the other completions [B].
        ref_chosen_logps: The same as `chosen_logps` under the frozen reference.
        ref_rejected_logps: The same as `rejected_logps` under the frozen reference.
        beta: Positive.
        alpha: Weight of the log-ratio.

    Returns:
        Rewards of the preferred and of the other completions, both [B], detached, in float32 or wider.

    Raises:
        ValueError: If the log-probabilities aren't floating vectors of one length, or a number is out of range.

    Examples:
        >>> import torch
        >>> from pref_opt.alpha_dpo import alpha_dpo_rewards
        >>> policy, reference = torch.tensor([-1.0]), torch.tensor([-2.0])
        >>> alpha_dpo_rewards(policy, policy, reference, reference, beta=2.0, alpha=0.1)
        (tensor([-2.2000]), tensor([-2.2000]))
    """
    check_positive("beta", beta)
    check_finite("alpha", alpha)
    check_pairs(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    chosen, rejected = (
        beta * (logps - alpha * (logps - upcast(ref.detach())))
        for logps, ref in (
            (upcast(chosen_logps.detach()), ref_chosen_logps),
            (upcast(rejected_logps.detach()), ref_rejected_logps),
        )
    )
    return chosen, rejected


class _Share(NamedTuple):
    """What one micro-batch of this process gets from the plan of its window."""

    mean: Tensor
    std: Tensor
    factor: float  # of the sum of the losses


class AlphaDPOLoss(PlannedLoss[_Share]):
    r"""alpha-DPO with its moving statistics.

    Per micro-batch of all processes together the statistics take in the gaps before they are used. While they have seen no
    spread ($s<\epsilon$, as before the first update, when the gaps are 0) the margin is $\gamma_\beta$ and the loss that of
    SimPO. Evaluation uses the statistics as they are and changes nothing.

    Args:
        beta: Positive.
        gamma_beta_ratio: Margin of a pair with an average gap, nats per token (nats without length normalisation).
        alpha: Weight of the standardised gap; 0 is SimPO, negative values reverse the adaptation.
        momentum: Weight of the past in the moving statistics, in [0, 1).
        label_smoothing: In [0, 0.5).
        length_normalized: Whether log-probabilities are means over tokens; False takes sums.
        debias: Correct the statistics for their start at zero; recommended, the default is the authors'.
        eps: Least standard deviation that is divided by, positive.
        stats_window: `"micro_batch"` updates the statistics with every micro-batch; `"step"` once per optimiser step,
            which needs `prepare_window`.

    Raises:
        ValueError: If an option is out of range or unknown.

    Examples:
        >>> import torch
        >>> from pref_opt.alpha_dpo import AlphaDPOLoss
        >>> from pref_opt.losses import Logps, LossContext
        >>> loss = AlphaDPOLoss(beta=2.5, gamma_beta_ratio=0.4, alpha=0.2)
        >>> out = loss(Logps(*(torch.tensor([-1.0, -2.0]) for _ in range(4))), LossContext())
        >>> out.loss, out.metrics["margin/mean"]  # policy = reference: softplus(2.5 * 0.4), as in SimPO
        (tensor(1.3133), tensor(0.4000))
    """

    couples_pairs: ClassVar[bool] = True
    least_pairs: ClassVar[int] = 2  # a single gap has no spread

    def __init__(
        self,
        beta: float = 2.5,
        gamma_beta_ratio: float = 0.3,
        alpha: float = 0.05,
        momentum: float = 0.9,
        label_smoothing: float = 0.0,
        length_normalized: bool = True,
        debias: bool = False,
        eps: float = 1e-6,
        stats_window: Literal["micro_batch", "step"] = "micro_batch",
    ) -> None:
        check_positive("beta", beta)
        check_finite("gamma_beta_ratio", gamma_beta_ratio)
        check_finite("alpha", alpha)
        check_label_smoothing(label_smoothing)
        check_positive("eps", eps)
        check_choice("stats_window", stats_window, ("micro_batch", "step"))
        self.beta = beta
        self.gamma_beta_ratio = gamma_beta_ratio
        self.alpha = alpha
        self.label_smoothing = label_smoothing
        self.length_normalized = length_normalized
        self.eps = eps
        self.stats_window = stats_window
        self._stats = MovingGapStats(momentum, debias=debias)
        super().__init__("stats_window='step'" if stats_window == "step" else None)

    def _values(self, logps: Logps) -> Tensor:
        return reward_gap(*_tensors(logps))

    def __call__(self, logps: Logps, context: LossContext) -> LossOutput:
        tensors = _tensors(logps)
        share = self._share(reward_gap(*tensors).detach(), context)
        margin = adaptive_margin(
            *tensors,
            gamma_beta_ratio=self.gamma_beta_ratio,
            alpha=self.alpha,
            gap_mean=share.mean,
            # An infinite spread leaves gamma_beta_ratio alone: without statistics there is nothing to compare a gap with.
            gap_std=share.std.masked_fill(share.std < self.eps, torch.inf),
            eps=self.eps,
        )
        losses = simpo_loss(
            logps.chosen,
            logps.rejected,
            beta=self.beta,
            gamma_beta_ratio=margin,
            label_smoothing=self.label_smoothing,
            reduction="none",
        )
        chosen, rejected = alpha_dpo_rewards(*tensors, beta=self.beta, alpha=self.alpha)
        return LossOutput(
            loss=share.factor * losses.sum(),
            chosen_rewards=chosen,
            rejected_rewards=rejected,
            metrics={
                "margin/mean": margin.mean(),
                "margin/min": margin.min(),
                "margin/max": margin.max(),
                "margin/std": margin.std(correction=0),
                "gap_mean": share.mean,
                "gap_std": share.std,
            },
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the moving mean and standard deviation and the number of updates."""
        return self._stats.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._stats.load_state_dict(state)

    def _share(self, gap: Tensor, context: LossContext) -> _Share:
        if not context.training:
            mean, std = self._stats.current()
            return _Share(mean.to(gap.device), std.to(gap.device), 1 / len(gap))
        return self._planned(gap, context)

    def _plan(self, gaps: list[Tensor], context: LossContext) -> list[_Share]:
        """Take in the gaps of a window; the trainer will average the losses over its micro-batches and processes."""
        own = torch.cat(gaps)
        everyone = context.gather(own)
        check_values("gap", everyone)
        if len(everyone) < 2:
            raise ValueError(
                "alpha-DPO needs at least 2 pairs per (global) micro-batch, got 1: raise per_device_train_batch_size, "
                "set dataloader_drop_last or use stats_window='step'"
            )
        mean, std = self._stats.update(everyone)
        return [_Share(mean, std, len(gaps) / len(own))] * len(gaps)


def _tensors(logps: Logps) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return logps.chosen, logps.rejected, *references(logps)
