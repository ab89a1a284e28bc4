r"""beta-DPO: DPO with one beta per batch and a filter, both set by how far the gaps are from their usual size.

Pairs that the policy already separates widely want small steps, close pairs large ones. beta-DPO sets beta from the mean
gap of a batch, relative to a moving average, and first drops pairs whose gap is unlikely under a Gaussian with the moving
mean and standard deviation. Neither the mask nor beta carries a gradient.

$$
G_i=\log\frac{\pi(y^w_i|x_i)}{\pi_\text{ref}(y^w_i|x_i)}-\log\frac{\pi(y^l_i|x_i)}{\pi_\text{ref}(y^l_i|x_i)},\qquad
\beta_b=\max\Big(\beta_{\min},\;\beta_0\big(1+a\,(\overline{G}_\text{kept}-m)\big)\Big),\qquad
\mathcal{L}=-\frac1{|\text{kept}|}\sum_{i\in\text{kept}}\log\sigma(\beta_bG_i)
$$

Reference: J. Wu, Y. Xie, Z. Yang, J. Wu, J. Gao, B. Ding, X. Wang, X. He, *beta-DPO: Direct Preference Optimization with
Dynamic beta*, NeurIPS 2024, arXiv:2407.08639, eq. 5-9 and algorithm 1. Documentation: `docs/papers/pref-opt/beta_dpo.md`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch

from pref_opt._checks import (
    check_below_one,
    check_choice,
    check_count,
    check_not_negative,
    check_pairs,
    check_positive,
)
from pref_opt.baselines import check_values, implicit_rewards, logistic_losses, references, reward_gap, upcast
from pref_opt.losses import LossOutput, PlannedLoss
from pref_opt.stats import MovingGapStats, update_gap_stats

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from pref_opt.losses import Logps, LossContext

__all__ = [
    "BetaDPOLoss",
    "beta_dpo_loss",
    "dynamic_beta",
    "filter_weights",
    "num_keep",
    "sample_keep_mask",
]

# Below this standard deviation the gaps are equal, as they are before the first update: nothing tells an outlier.
NO_SPREAD = 1e-6


def num_keep(num_pairs: int, filter_ratio: float) -> int:
    r"""Return how many pairs the filter keeps.

    $$n=\lfloor N(1-\rho)\rfloor$$

    Source: the authors' code; section 4.2.2 of the paper gives the kept share, its appendix the dropped one.

    Args:
        num_pairs: $N$, pairs of all processes, at least 1.
        filter_ratio: $\rho$, the share that is dropped, in [0, 1).

    Returns:
        A number from 0 to `num_pairs`, rounded down.

    Raises:
        ValueError: If `num_pairs` isn't a positive integer or `filter_ratio` is outside [0, 1).

    Examples:
        >>> from pref_opt.beta_dpo import num_keep
        >>> num_keep(32, 0.2), num_keep(8, 0.2), num_keep(2, 0.2)
        (25, 6, 1)
    """
    check_count("num_pairs", num_pairs)
    check_below_one("filter_ratio", filter_ratio)
    return int(num_pairs * (1 - filter_ratio))


def filter_weights(gap: Tensor, *, gap_mean: float | Tensor, gap_std: float | Tensor) -> Tensor:
    r"""Weights with which the filter draws the pairs it keeps: a Gaussian around the moving mean, 1 at its top.

    $$w_i=\exp\Big(-\tfrac12\big(\tfrac{G_i-m}{s}\big)^2\Big)$$

    Where $s<10^{-6}$ all weights are 1. Source: section 4.2.2 of the paper.

    Args:
        gap: Reward gaps $G$ [N], nats, not multiplied by beta.
        gap_mean: Moving mean $m$, a number or a scalar tensor.
        gap_std: Moving standard deviation $s\ge0$.

    Returns:
        Weights [N] in [0, 1], detached, in float32 or wider; 0 where the exponential underflows.

    Raises:
        ValueError: If `gap` isn't a non-empty floating vector or the number `gap_std` is negative.

    Examples:
        >>> import torch
        >>> from pref_opt.beta_dpo import filter_weights
        >>> filter_weights(torch.tensor([1.0, 3.0, 21.0]), gap_mean=1.0, gap_std=2.0)
        tensor([1.0000e+00, 6.0653e-01, 1.9287e-22])
    """
    return _log_weights(gap, gap_mean, gap_std).exp()


def sample_keep_mask(
    gap: Tensor,
    *,
    gap_mean: float | Tensor,
    gap_std: float | Tensor,
    filter_ratio: float = 0.2,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draw the pairs that are kept, without replacement and with probability proportional to their weights.

    $$\text{kept}=\text{top}_n\big(\log w_i-\log e_i\big),\qquad e_i\sim\text{Exp}(1)$$

    The $n=\lfloor N(1-\rho)\rfloor$ largest of these keys are such a draw, so an outlier may survive. As the weights stay
    logarithms, pairs however far away are drawn in the right proportion, and nothing waits for the device.

    Args:
        gap: Reward gaps [N] of all processes, nats.
        gap_mean: Moving mean, a number or a scalar tensor.
        gap_std: Moving standard deviation $\ge0$.
        filter_ratio: $\rho$, the share that is dropped, in [0, 1).
        generator: Source of the draw on any device; the global CPU generator where None. Equal generators on the CPU draw
            equal masks on every device.

    Returns:
        Booleans [N], `num_keep(N, filter_ratio)` of them true.

    Raises:
        ValueError: If `gap` isn't a non-empty floating vector, the number `gap_std` is negative or `filter_ratio` is
            outside [0, 1).

    Examples:
        >>> import torch
        >>> from pref_opt.beta_dpo import sample_keep_mask
        >>> gap = torch.tensor([0.1, 90.0, -0.3, 0.2, 0.0])
        >>> generator = torch.Generator().manual_seed(0)
        >>> sample_keep_mask(gap, gap_mean=0.0, gap_std=1.0, filter_ratio=0.2, generator=generator)
        tensor([ True, False,  True,  True,  True])
    """
    log_weights = _log_weights(gap, gap_mean, gap_std)
    count = num_keep(len(gap), filter_ratio)
    device = "cpu" if generator is None else generator.device
    noise = torch.empty(len(gap), dtype=torch.float64, device=device).exponential_(generator=generator)
    noise = noise.clamp_min(1e-30).log().to(log_weights.dtype).to(log_weights.device, non_blocking=True)
    keys = log_weights - noise
    kept = keys.topk(count, sorted=False).indices
    return torch.zeros_like(keys, dtype=torch.bool).scatter(0, kept, True)


def dynamic_beta(
    gap: Tensor,
    keep_mask: Tensor,
    *,
    beta: float,
    scale: float,
    gap_mean: float | Tensor,
    beta_min: float = 1e-3,
) -> Tensor:
    r"""Return the beta of a batch.

    $$\beta_b=\max\Big(\beta_{\min},\;\beta_0\big(1+a\,(\tfrac1n\textstyle\sum_{i\in\text{kept}}G_i-m)\big)\Big)$$

    Source: eq. 6 of the paper and the authors' code. The printed equation has $\beta_0G$ in place of $G$, so its
    $\alpha=a/\beta_0$.

    Args:
        gap: Reward gaps $G$ [N] of all processes, nats, not multiplied by beta.
        keep_mask: Booleans [N]; without any true one the result is $\beta_0$.
        beta: $\beta_0>0$.
        scale: $a\ge0$ in 1/nat; 0 gives $\beta_0$ always.
        gap_mean: Moving mean $m$ after this batch was taken in, a number or a scalar tensor.
        beta_min: Least beta, positive.

    Returns:
        Detached scalar in float32 or wider.

    Raises:
        ValueError: If `gap` isn't a non-empty floating vector, `keep_mask` isn't boolean of its shape, or a number is out
            of range.

    Examples:
        >>> import torch
        >>> from pref_opt.beta_dpo import dynamic_beta
        >>> gap, keep = torch.tensor([1.0, 3.0, 90.0]), torch.tensor([True, True, False])
        >>> dynamic_beta(gap, keep, beta=0.1, scale=0.6, gap_mean=1.0)
        tensor(0.1600)
    """
    check_positive("beta", beta)
    check_not_negative("scale", scale)
    check_positive("beta_min", beta_min)
    check_pairs(gap=gap)
    _check_mask(keep_mask, gap)
    gap = upcast(gap)
    count = keep_mask.sum()
    excess = _over(keep_mask, gap).sum() / count.clamp_min(1) - gap_mean
    return (beta * (1 + scale * _over(count > 0, excess))).clamp_min(beta_min).detach()


def beta_dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    keep_mask: Tensor,
    beta: float,
    scale: float,
    gap_mean: float | Tensor,
    beta_min: float = 1e-3,
) -> Tensor:
    r"""beta-DPO loss of the pairs of one process.

    $$\mathcal{L}=-\frac1{|\text{kept}|}\sum_{i\in\text{kept}}\log\sigma(\beta_bG_i),\qquad
    \frac{\partial\mathcal{L}}{\partial\log\pi(y^w_i)}=-\frac{\beta_b\,\sigma(-\beta_bG_i)}{|\text{kept}|}$$

    with $\beta_b$ of `dynamic_beta`, a constant for the gradient. Source: algorithm 1 of the paper. With `scale=0` and
    every pair kept it is DPO.

    Args:
        chosen_logps: Log-probabilities of the preferred completions [B], sums over tokens, nats.
        rejected_logps: Log-probabilities of the other completions [B].
        ref_chosen_logps: The same as `chosen_logps` under the frozen reference.
        ref_rejected_logps: The same as `rejected_logps` under the frozen reference.
        keep_mask: Booleans [B], from `sample_keep_mask`.
        beta: $\beta_0>0$.
        scale: $a\ge0$ in 1/nat.
        gap_mean: Moving mean of the gaps after this batch was taken in.
        beta_min: Least beta, positive.

    Returns:
        Mean over the kept pairs in float32 or wider; 0, still with a graph, where none is kept.

    Raises:
        ValueError: If the log-probabilities aren't floating vectors of one length, `keep_mask` isn't boolean of that
            length, or a number is out of range.

    Examples:
        >>> import torch
        >>> from pref_opt.beta_dpo import beta_dpo_loss
        >>> chosen, rejected, zero = torch.tensor([-3.0, -9.0]), torch.tensor([-5.0, -4.0]), torch.zeros(2)
        >>> keep = torch.tensor([True, False])
        >>> beta_dpo_loss(chosen, rejected, zero, zero, keep_mask=keep, beta=0.1, scale=0.6, gap_mean=1.0)
        tensor(0.5459)
    """
    gap = reward_gap(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    beta_used = dynamic_beta(gap, keep_mask, beta=beta, scale=scale, gap_mean=gap_mean, beta_min=beta_min)
    return _kept_sum(gap, keep_mask, beta_used) / keep_mask.sum().clamp_min(1)


class _Share(NamedTuple):
    """What one micro-batch of this process gets from the plan of its window."""

    keep: Tensor
    beta: Tensor
    factor: float | Tensor  # of the sum of the kept losses
    largest: Tensor


class BetaDPOLoss(PlannedLoss[_Share]):
    r"""beta-DPO with its moving statistics.

    Per micro-batch of all processes together: the statistics take in the gaps, the filter draws, and the mean of the kept
    gaps sets beta. The draw depends on the gaps, `seed` and the number of updates, so all processes agree and a resumed
    run continues with the same draws. Evaluation changes nothing, keeps every pair and uses $\beta_0$.

    Args:
        beta: $\beta_0>0$.
        scale: $a\ge0$ in 1/nat, how much a gap above the moving mean raises beta; 0 leaves the filter alone.
        filter_ratio: $\rho$, the share of pairs that is dropped, in [0, 1); 0 leaves the dynamic beta alone.
        momentum: Weight of the past in the moving statistics, in [0, 1).
        beta_min: Least beta, positive.
        debias: Correct the statistics for their start at zero.
        normalization: `"global"` averages over the kept pairs of all processes; `"local"` averages over those of each
            process and then over processes, as the authors' code does.
        window: `"micro_batch"` draws one mask and one beta per micro-batch; `"step"` one per optimiser step, which needs
            `prepare_window`.
        init_from_first_batch: Take the statistics of the first batch with any spread as they are, instead of a tenth.
        seed: Of the draws, at least 0.

    Raises:
        ValueError: If an option is out of range or unknown, or both `debias` and `init_from_first_batch` are asked for.

    Examples:
        >>> import torch
        >>> from pref_opt.beta_dpo import BetaDPOLoss
        >>> from pref_opt.losses import Logps, LossContext
        >>> loss = BetaDPOLoss(beta=0.1, scale=0.6, filter_ratio=0.25)
        >>> logps = Logps(*(torch.tensor([-4.0, -5.0, -6.0, -7.0]) for _ in range(4)))
        >>> out = loss(logps, LossContext())
        >>> out.loss, out.metrics["beta_used"], out.metrics["kept_fraction"]
        (tensor(0.6931), tensor(0.1000), tensor(0.7500))
    """

    couples_pairs: ClassVar[bool] = True
    least_pairs: ClassVar[int] = 2  # a single gap has no spread

    def __init__(
        self,
        beta: float = 0.1,
        scale: float = 0.6,
        filter_ratio: float = 0.2,
        momentum: float = 0.9,
        beta_min: float = 1e-3,
        debias: bool = False,
        normalization: Literal["global", "local"] = "global",
        window: Literal["micro_batch", "step"] = "micro_batch",
        *,
        init_from_first_batch: bool = False,
        seed: int = 0,
    ) -> None:
        check_positive("beta", beta)
        check_not_negative("scale", scale)
        check_below_one("filter_ratio", filter_ratio)
        check_positive("beta_min", beta_min)
        check_choice("normalization", normalization, ("global", "local"))
        check_choice("window", window, ("micro_batch", "step"))
        check_count("seed", seed, least=0)
        if debias and init_from_first_batch:
            raise ValueError("debias and init_from_first_batch both correct the start at zero: choose one of them")
        self.beta = beta
        self.scale = scale
        self.filter_ratio = filter_ratio
        self.beta_min = beta_min
        self.normalization = normalization
        self.window = window
        self.init_from_first_batch = init_from_first_batch
        self.seed = seed
        self._stats = MovingGapStats(momentum, debias=debias)
        super().__init__("window='step'" if window == "step" else None)

    def _values(self, logps: Logps) -> Tensor:
        return _gap(logps)

    def __call__(self, logps: Logps, context: LossContext) -> LossOutput:
        gap = _gap(logps)
        share = self._share(gap, context)
        mean, std = self._stats.current()
        chosen, rejected = implicit_rewards(logps, self.beta, reference=True)
        return LossOutput(
            loss=share.factor * _kept_sum(gap, share.keep, share.beta),
            chosen_rewards=chosen,
            rejected_rewards=rejected,
            metrics={
                "beta_used": share.beta,
                "gap_mean": mean.to(gap.device),
                "gap_std": std.to(gap.device),
                "gap/max": share.largest,
                "kept_fraction": share.keep.to(gap.dtype).mean(),
            },
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the moving mean and standard deviation and the number of updates."""
        return self._stats.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._stats.load_state_dict(state)

    def _share(self, gap: Tensor, context: LossContext) -> _Share:
        detached = gap.detach()
        if not context.training:
            everything = torch.ones_like(detached, dtype=torch.bool)
            return _Share(everything, detached.new_full((), self.beta), 1 / len(gap), detached.max())
        return self._planned(detached, context)

    def _plan(self, gaps: list[Tensor], context: LossContext) -> list[_Share]:
        """Take in the gaps of a window; the trainer will average the losses over its micro-batches and processes."""
        own = torch.cat(gaps)
        everyone = context.gather(own)
        check_values("gap", everyone)
        count = self._count(len(everyone))
        mean, std = self._update(everyone)
        number = np.random.SeedSequence([self.seed, self._stats.num_updates]).generate_state(1)[0]
        mask = sample_keep_mask(
            everyone,
            gap_mean=mean,
            gap_std=std,
            filter_ratio=self.filter_ratio,
            generator=torch.Generator().manual_seed(int(number)),
        )
        beta = dynamic_beta(everyone, mask, beta=self.beta, scale=self.scale, gap_mean=mean, beta_min=self.beta_min)
        keep = mask.narrow(0, context.process_index * len(own), len(own))
        factor: float | Tensor = len(gaps) * context.world_size / count
        if self.normalization == "local":
            factor = len(gaps) / keep.sum().clamp_min(1).to(own.dtype)
        largest = everyone.max()
        return [_Share(part, beta, factor, largest) for part in torch.split(keep, [len(gap) for gap in gaps])]

    def _count(self, num_pairs: int) -> int:
        if num_pairs < 2:
            raise ValueError(
                f"beta-DPO needs at least 2 pairs per (global) micro-batch, got {num_pairs}: raise "
                "per_device_train_batch_size, set dataloader_drop_last or use window='step'"
            )
        count = num_keep(num_pairs, self.filter_ratio)
        if count == 0:
            raise ValueError(f"filter_ratio={self.filter_ratio!r} keeps none of the {num_pairs} pairs of a micro-batch")
        return count

    def _update(self, gap: Tensor) -> tuple[Tensor, Tensor]:
        before = self._stats.state_dict()["std"].to(gap.device)
        mean, std = self._stats.update(gap)
        if not self.init_from_first_batch:
            return mean, std
        # While policy and reference are equal all gaps are 0; such a batch says nothing about those to come.
        first_mean, first_std = update_gap_stats(gap, 0.0, 0.0, momentum=0.0)
        unseen = before == 0
        mean, std = torch.where(unseen, first_mean, mean), torch.where(unseen, first_std, std)
        self._stats.load_state_dict({"mean": mean, "std": std, "num_updates": self._stats.num_updates})
        return mean, std


def _gap(logps: Logps) -> Tensor:
    return reward_gap(logps.chosen, logps.rejected, *references(logps))


def _kept_sum(gap: Tensor, keep_mask: Tensor, beta: Tensor) -> Tensor:
    return _over(keep_mask, logistic_losses(beta * gap)).sum()


def _over(mask: Tensor, values: Tensor) -> Tensor:
    """Return the values where the mask is true and 0 elsewhere, whatever stands there."""
    return torch.where(mask, values, torch.zeros_like(values))


def _log_weights(gap: Tensor, mean: float | Tensor, std: float | Tensor) -> Tensor:
    check_pairs(gap=gap)
    if not isinstance(std, torch.Tensor):
        check_not_negative("gap_std", std)
    gap = upcast(gap)
    spread = torch.as_tensor(std, dtype=gap.dtype, device=gap.device)
    score = (gap - mean) / spread.clamp_min(NO_SPREAD)
    return _over(spread >= NO_SPREAD, -0.5 * score.square()).detach()


def _check_mask(keep_mask: Tensor, gap: Tensor) -> None:
    if keep_mask.dtype != torch.bool or keep_mask.shape != gap.shape:
        raise ValueError(
            f"keep_mask must be boolean of shape {tuple(gap.shape)}, got {keep_mask.dtype} of {tuple(keep_mask.shape)}"
        )
