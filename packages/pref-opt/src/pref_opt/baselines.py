r"""The losses that this package's methods start from and are compared with.

All of them judge a pair of completions by their log-probabilities: DPO and its relatives by the change against a frozen
reference, SimPO, SLiC, CPO, ORPO and MPPO without one; S-DPO, DMPO and MPPO hold one completion against several.

$$
D=\log\pi(y_w)-\log\pi(y_l),\qquad G=D-\big(\log\pi_{\text{ref}}(y_w)-\log\pi_{\text{ref}}(y_l)\big),\qquad
\ell^{\text{DPO}}=-\log\sigma(\beta G)
$$

The functions never normalise by length: a log-probability is a sum over completion tokens or a mean, as the caller
decides. Each loss object says which one it wants (`length_normalized`).

References: R. Rafailov et al., *Direct Preference Optimization: Your Language Model is Secretly a Reward Model*, NeurIPS
2023, arXiv:2305.18290; the docstring of each loss names its own. Documentation: `docs/api/pref-opt/baselines.md`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F

from pref_opt._checks import (
    check_choice,
    check_finite,
    check_label_smoothing,
    check_lists,
    check_not_negative,
    check_pairs,
    check_positive,
)
from pref_opt.losses import LossOutput, PreferenceLoss

if TYPE_CHECKING:
    from torch import Tensor

    from pref_opt.losses import Logps, LossContext

__all__ = [
    "CDPOLoss",
    "CPOLoss",
    "DMPOLoss",
    "DPOLoss",
    "DPONormLoss",
    "IPOLoss",
    "KTOPairLoss",
    "MPPOLoss",
    "ORPOLoss",
    "RobustDPOLoss",
    "SDPOLoss",
    "SLiCLoss",
    "SimPOLoss",
    "chosen_nll",
    "cpo_loss",
    "dmpo_loss",
    "dpo_loss",
    "ipo_loss",
    "kto_pair_loss",
    "mppo_loss",
    "orpo_odds_loss",
    "reward_gap",
    "robust_dpo_loss",
    "sdpo_loss",
    "sequence_logps",
    "simpo_loss",
    "slic_loss",
]

Reduction = Literal["mean", "none"]

REDUCTIONS = ("mean", "none")


# --- what all losses share --------------------------------------------------------------------------------------------


def upcast(values: Tensor) -> Tensor:
    """Return half precision in float32, anything wider unchanged."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def reduced(losses: Tensor, reduction: Reduction) -> Tensor:
    """Return the mean of the losses of a batch, or the losses themselves; raise ValueError for another reduction."""
    check_choice("reduction", reduction, REDUCTIONS)
    return losses.mean() if reduction == "mean" else losses


def logistic_losses(margins: Tensor, label_smoothing: float = 0.0) -> Tensor:
    r"""Return $-(1-\varepsilon)\log\sigma(z)-\varepsilon\log\sigma(-z)$ of each margin."""
    check_label_smoothing(label_smoothing)
    if label_smoothing == 0:
        return -F.logsigmoid(margins)
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)


def checked_margin(name: str, margin: float | Tensor, batch: int) -> float | Tensor:
    """Return a margin that is one finite number or one per pair, in float32 or wider; raise ValueError otherwise.

    Values of a tensor are looked at where that costs no wait for a device.
    """
    if not isinstance(margin, torch.Tensor):
        check_finite(name, margin)
        return margin
    if not margin.is_floating_point() or margin.shape not in ((), (batch,)):
        raise ValueError(
            f"{name} must be a number or a floating-point tensor of shape () or ({batch},), "
            f"got {margin.dtype} of shape {tuple(margin.shape)}"
        )
    check_values(name, margin)
    return upcast(margin)


def check_values(name: str, values: Tensor) -> None:
    """Raise ValueError where a tensor in main memory has values that aren't finite; a device isn't waited for."""
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return
    finite = values.detach().isfinite()
    if not bool(finite.all()):
        first = (~finite).nonzero()[0].tolist()
        raise ValueError(f"{name} contains non-finite values, the first at {first}: {values.detach()[tuple(first)]}")


def implicit_rewards(logps: Logps, beta: float, *, reference: bool) -> tuple[Tensor, Tensor]:
    """Return what a pair's completions are worth to the policy, for logs: detached, in float32 or wider."""
    chosen, rejected = upcast(logps.chosen.detach()), upcast(logps.rejected.detach())
    if reference:
        ref_chosen, ref_rejected = references(logps)
        chosen, rejected = chosen - upcast(ref_chosen.detach()), rejected - upcast(ref_rejected.detach())
    return beta * chosen, beta * rejected


def references(logps: Logps) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities under the reference; raise ValueError where the caller gave none."""
    if logps.ref_chosen is None or logps.ref_rejected is None:
        raise ValueError("ref_chosen and ref_rejected must be tensors: this loss needs a reference, got None")
    return logps.ref_chosen, logps.ref_rejected


def chosen_nll(logps: Logps, *, length_normalized: bool) -> Tensor:
    r"""Negative log-likelihood of the preferred completions, per token and averaged over completions.

    $$-\frac1B\sum_i\frac{1}{|y_{w,i}|}\sum_t\log\pi(y_{w,i,t})$$

    Every completion counts the same whatever its length, so that processes can be averaged.

    Args:
        logps: Log-probabilities; sums need `chosen_lengths`, whose zeros count as 1.
        length_normalized: Whether `logps.chosen` holds means already.

    Returns:
        Scalar with gradient, in float32 or wider, nats per token.

    Raises:
        ValueError: If lengths are needed and missing, or have another shape.

    Examples:
        >>> import torch
        >>> from pref_opt.baselines import chosen_nll
        >>> from pref_opt.losses import Logps
        >>> sums = Logps(torch.tensor([-6.0, -4.0]), torch.zeros(2), chosen_lengths=torch.tensor([3, 1]))
        >>> chosen_nll(sums, length_normalized=False)
        tensor(3.)
    """
    chosen = upcast(logps.chosen)
    if length_normalized:
        return -chosen.mean()
    lengths = logps.chosen_lengths
    if lengths is None or lengths.shape != chosen.shape:
        got = None if lengths is None else tuple(lengths.shape)
        raise ValueError(f"chosen_lengths must have shape {tuple(chosen.shape)} for a term per token, got {got}")
    return -(chosen / lengths.clamp(min=1)).mean()


def sequence_logps(logits: Tensor, labels: Tensor, *, ignore_index: int = -100, average: bool = False) -> Tensor:
    r"""Log-probabilities of sequences from the logits of a causal model.

    $$\log\pi(y)=\sum_{t:\,y_{t+1}\ne\text{ignore}}\log\text{softmax}(z_t)_{y_{t+1}}$$

    Position t of the logits is judged by position t + 1 of the labels: give both as the model has them.

    Args:
        logits: (B, T, V), floating; half precision is normalised in float32.
        labels: (B, T), integer: token ids in [0, V), or `ignore_index` for prompt and padding.
        ignore_index: The label of positions that don't count.
        average: Divide by the number of positions that count, at least 1.

    Returns:
        Shape (B,), nats, in float32 or wider.

    Raises:
        ValueError: If shapes or dtypes don't fit, T < 2, the batch is empty, or (checked in main memory only) a label is
            outside [0, V).

    Examples:
        >>> import torch
        >>> from pref_opt.baselines import sequence_logps
        >>> sequence_logps(torch.zeros(1, 4, 2), torch.tensor([[-100, -100, 1, 0]]))  # two tokens of probability 1/2
        tensor([-1.3863])
    """
    _check_sequences(logits, labels, ignore_index)
    labels = labels[:, 1:]
    batch, steps = labels.shape
    nll = F.cross_entropy(
        upcast(logits[:, :-1]).reshape(batch * steps, -1),
        labels.reshape(-1).long(),
        ignore_index=ignore_index,
        reduction="none",
    )
    total = -nll.view(batch, steps).sum(1)
    return total / (labels != ignore_index).sum(1).clamp(min=1) if average else total


def _check_sequences(logits: Tensor, labels: Tensor, ignore_index: int) -> None:
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        shapes = f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"expected logits (B, T, V) and labels (B, T), got {shapes}")
    if not logits.is_floating_point() or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"logits must be floating and labels integer, got {logits.dtype} and {labels.dtype}")
    if len(labels) == 0 or labels.shape[1] < 2:
        raise ValueError(f"labels: empty batch or fewer than 2 positions, got shape {tuple(labels.shape)}")
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    outside = (labels[:, 1:] != ignore_index) & ((labels[:, 1:] < 0) | (labels[:, 1:] >= logits.shape[2]))
    if bool(outside.any()):
        row = int(outside.any(1).nonzero()[0])
        raise ValueError(
            f"labels must be in [0, {logits.shape[2]}) or {ignore_index}, got {int(labels[row, 1:][outside[row]][0])} "
            f"in row {row}"
        )


def reward_gap(
    chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen_logps: Tensor, ref_rejected_logps: Tensor
) -> Tensor:
    r"""How much further apart the policy holds two completions than the reference does, without $\beta$.

    $$G=\log\frac{\pi(y_w)}{\pi(y_l)}-\log\frac{\pi_{\text{ref}}(y_w)}{\pi_{\text{ref}}(y_l)}$$

    Source: Rafailov et al., 2023, the argument of the sigmoid in eq. 7.

    Args:
        chosen_logps: Preferred completions under the policy (B,), nats.
        rejected_logps: Other completions under the policy (B,).
        ref_chosen_logps: Preferred completions under the reference (B,).
        ref_rejected_logps: Other completions under the reference (B,).

    Returns:
        Shape (B,), in float32 or wider.

    Raises:
        ValueError: If a shape or a dtype doesn't fit, or the batch is empty.

    Examples:
        >>> import torch
        >>> from pref_opt.baselines import reward_gap
        >>> reward_gap(*(torch.tensor([x]) for x in (-3.0, -5.0, -4.0, -4.5)))
        tensor([1.5000])
    """
    check_pairs(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    return (upcast(chosen_logps) - upcast(rejected_logps)) - (upcast(ref_chosen_logps) - upcast(ref_rejected_logps))


def _logp_gap(chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
    check_pairs(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    return upcast(chosen_logps) - upcast(rejected_logps)


# --- losses with a reference ------------------------------------------------------------------------------------------


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""DPO (Rafailov et al., 2023, eq. 7); with label smoothing, conservative DPO.

    $$\ell=-(1-\varepsilon)\log\sigma(\beta G)-\varepsilon\log\sigma(-\beta G)$$

    Fed with means per token it is length-normalised DPO. E. Mitchell, *A note on DPO with noisy preferences*, 2023, is the
    source of $\varepsilon$, the assumed share of flipped pairs.

    Args:
        chosen_logps: Preferred completions under the policy (B,), nats.
        rejected_logps: Other completions under the policy (B,).
        ref_chosen_logps: Preferred completions under the reference (B,).
        ref_rejected_logps: Other completions under the reference (B,).
        beta: $\beta>0$; 0.01 to 0.5 with sums.
        label_smoothing: $\varepsilon$ in [0, 0.5).
        reduction: `"mean"`, or `"none"` for shape (B,).

    Returns:
        The loss in float32 or wider.

    Raises:
        ValueError: If a shape or dtype doesn't fit, the batch is empty, or an option is out of range.

    Examples:
        >>> import torch
        >>> from pref_opt.baselines import dpo_loss
        >>> same = torch.tensor([-7.0])
        >>> dpo_loss(same, same, same, same)  # nothing learnt yet: log 2
        tensor(0.6931)
    """
    check_positive("beta", beta)
    gap = reward_gap(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return reduced(logistic_losses(beta * gap, label_smoothing), reduction)


def robust_dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Robust DPO: an unbiased estimate of the DPO loss on clean pairs from pairs of which a known share is flipped.

    $$\ell=\frac{-(1-\varepsilon)\log\sigma(\beta G)+\varepsilon\log\sigma(-\beta G)}{1-2\varepsilon}$$

    Source: S. Ray Chowdhury, A. Kini, N. Natarajan, *Provably Robust DPO: Aligning Language Models with Noisy Feedback*,
    ICML 2024, arXiv:2403.00409. It has no lower bound for $\varepsilon>0$.

    Args:
        chosen_logps: Preferred completions under the policy (B,), nats.
        rejected_logps: Other completions under the policy (B,).
        ref_chosen_logps: Preferred completions under the reference (B,).
        ref_rejected_logps: Other completions under the reference (B,).
        beta: $\beta>0$.
        label_smoothing: $\varepsilon$ in [0, 0.5), the share of flipped pairs.
        reduction: `"mean"`, or `"none"` for shape (B,).

    Returns:
        The loss in float32 or wider.

    Raises:
        ValueError: If a shape or dtype doesn't fit, the batch is empty, or an option is out of range.

    Examples:
        >>> import torch
        >>> from pref_opt.baselines import robust_dpo_loss
        >>> same = torch.tensor([-7.0])
        >>> robust_dpo_loss(same, same, same, same, label_smoothing=0.2)
        tensor(0.6931)
    """
    check_positive("beta", beta)
    check_label_smoothing(label_smoothing)
    z = beta * reward_gap(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    signed = label_smoothing * F.logsigmoid(-z) - (1 - label_smoothing) * F.logsigmoid(z)
    return reduced(signed / (1 - 2 * label_smoothing), reduction)


def ipo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""IPO: a target for the gap, in place of a gap that grows for ever.

    $$\ell=\Big(G-\frac{1}{2\beta}\Big)^2$$

    Source: M. G. Azar et al., *A General Theoretical Paradigm to Understand Learning from Human Preferences*, AISTATS 2024,
    arXiv:2310.12036, eq. 17, with sums; TRL feeds means.

    Args:
        chosen_logps: Preferred completions under the policy (B,), nats.
        rejected_logps: Other completions under the policy (B,).
        ref_chosen_logps: Preferred completions under the reference (B,).
        ref_rejected_logps: Other completions under the reference (B,).
        beta: $\beta>0$, called $\tau$ in the paper.
        reduction: `"mean"`, or `"none"` for shape (B,).

    Returns:
        The loss in float32 or wider.

    Raises:
        ValueError: If a shape or dtype doesn't fit, the batch is empty, or an option is out of range.

    Examples:
        >>> import torch
        >>> from pref_opt.baselines import ipo_loss
        >>> same = torch.tensor([-7.0])
        >>> ipo_loss(same, same, same, same, beta=0.25)
        tensor(4.)
    """
    check_positive("beta", beta)
    gap = reward_gap(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return reduced((gap - 1 / (2 * beta)).square(), reduction)


def kto_pair_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""KTO with its KL terms estimated from pairs, as the programs of the papers here run it.

    $$
    1-\sigma\big(\beta(a-\text{KL}_b)\big)\ \text{ and }\ 1-\sigma\big(\beta(\text{KL}_a-b)\big),\qquad
    \text{KL}_a=\max(0,\overline a),\quad a=\log\frac{\pi(y_w)}{\pi_{\text{ref}}(y_w)},\quad
    b=\log\frac{\pi(y_l)}{\pi_{\text{ref}}(y_l)}
    $$

    The KL terms carry gradient there and here; KTO itself (K. Ethayarajh et al., *KTO: Model Alignment as Prospect
    Theoretic Optimization*, ICML 2024, arXiv:2402.01306) detaches an estimate from mismatched completions.

    Args:
        chosen_logps: Preferred completions under the policy (B,), nats.
        rejected_logps: Other completions under the policy (B,).
        ref_chosen_logps: Preferred completions under the reference (B,).
        ref_rejected_logps: Other completions under the reference (B,).
        beta: $\beta>0$.
        reduction: `"mean"`, or `"none"` for shape (2B,): the preferred completions, then the others.

    Returns:
        The loss in float32 or wider.

    Raises:
        ValueError: If a shape or dtype doesn't fit, the batch is empty, or an option is out of range.

    Examples:
        >>> import torch
        >>> from pref_opt.baselines import kto_pair_loss
        >>> same = torch.tensor([-7.0])
        >>> kto_pair_loss(same, same, same, same, reduction="none")
        tensor([0.5000, 0.5000])
    """
    check_positive("beta", beta)
    check_pairs(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    chosen = upcast(chosen_logps) - upcast(ref_chosen_logps)
    rejected = upcast(rejected_logps) - upcast(ref_rejected_logps)
    kl_chosen, kl_rejected = chosen.mean().clamp(min=0), rejected.mean().clamp(min=0)
    margins = torch.cat([chosen - kl_rejected, kl_chosen - rejected])
    return reduced(torch.sigmoid(-beta * margins), reduction)


# --- losses without a reference ---------------------------------------------------------------------------------------


def simpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    *,
    beta: float = 2.0,
    gamma_beta_ratio: float | Tensor = 0.25,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""SimPO: the mean log-probability as reward, and a margin.

    $$\ell=-(1-\varepsilon)\log\sigma\big(\beta(D-\gamma/\beta)\big)-\varepsilon\log\sigma\big(-\beta(D-\gamma/\beta)\big)$$

    Source: Y. Meng, M. Xia, D. Chen, *SimPO: Simple Preference Optimization with a Reference-Free Reward*, NeurIPS 2024,
    arXiv:2405.14734, eq. 6; label smoothing as in its program.

    Args:
        chosen_logps: Preferred completions (B,), nats per token.
        rejected_logps: Other completions (B,).
        beta: $\beta>0$; 2 to 10.
        gamma_beta_ratio: $\gamma/\beta$, nats per token, a number or one per pair (B,).
        label_smoothing: $\varepsilon$ in [0, 0.5).
        reduction: `"mean"`, or `"none"` for shape (B,).

    Returns:
        The loss in float32 or wider.

    Raises:
        ValueError: If a shape or dtype doesn't fit, the batch is empty, or an option is out of range.

    Examples:
        >>> import torch
        >>> from pref_opt.baselines import simpo_loss
        >>> simpo_loss(torch.tensor([-1.0]), torch.tensor([-1.25]))  # exactly at the margin
        tensor(0.6931)
    """
    check_positive("beta", beta)
    gap = _logp_gap(chosen_logps, rejected_logps)
    margin = checked_margin("gamma_beta_ratio", gamma_beta_ratio, len(gap))
    return reduced(logistic_losses(beta * (gap - margin), label_smoothing), reduction)


def slic_loss(chosen_logps: Tensor, rejected_logps: Tensor, *, beta: float, reduction: Reduction = "mean") -> Tensor:
    r"""SLiC: a hinge on the difference of log-probabilities.

    $$\ell=\max(0,\,1-\beta D)$$

    Source: Y. Zhao et al., *SLiC-HF: Sequence Likelihood Calibration with Human Feedback*, 2023, arXiv:2305.10425, with
    the margin $\delta=1/\beta$ and divided by it.

    Args:
        chosen_logps: Preferred completions (B,), nats, sums or means per token.
        rejected_logps: Other completions (B,).
        beta: $\beta>0$, one over the margin.
        reduction: `"mean"`, or `"none"` for shape (B,).

    Returns:
        The loss in float32 or wider.

    Raises:
        ValueError: If a shape or dtype doesn't fit, the batch is empty, or an option is out of range.

    Examples:
        >>> import torch
        >>> from pref_opt.baselines import slic_loss
        >>> slic_loss(torch.tensor([-1.0, -1.0]), torch.tensor([-1.25, -3.0]), beta=1.0, reduction="none")
        tensor([0.7500, 0.0000])
    """
    check_positive("beta", beta)
    return reduced(torch.relu(1 - beta * _logp_gap(chosen_logps, rejected_logps)), reduction)


def cpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The preference term of CPO: DPO with a uniform reference.

    $$\ell=-(1-\varepsilon)\log\sigma(\beta D)-\varepsilon\log\sigma(-\beta D)$$

    Source: H. Xu et al., *Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine
    Translation*, ICML 2024, arXiv:2401.08417. `CPOLoss` adds the likelihood of the preferred completion.

    Args:
        chosen_logps: Preferred completions (B,), nats.
        rejected_logps: Other completions (B,).
        beta: $\beta>0$.
        label_smoothing: $\varepsilon$ in [0, 0.5).
        reduction: `"mean"`, or `"none"` for shape (B,).

    Returns:
        The loss in float32 or wider.

    Raises:
        ValueError: If a shape or dtype doesn't fit, the batch is empty, or an option is out of range.

    Examples:
        >>> import torch
        >>> from pref_opt.baselines import cpo_loss
        >>> cpo_loss(torch.tensor([-20.0]), torch.tensor([-30.0]), beta=0.1)
        tensor(0.3133)
    """
    check_positive("beta", beta)
    return reduced(logistic_losses(beta * _logp_gap(chosen_logps, rejected_logps), label_smoothing), reduction)


def orpo_odds_loss(
    chosen_logps: Tensor, rejected_logps: Tensor, *, beta: float, reduction: Reduction = "mean"
) -> Tensor:
    r"""The odds-ratio term of ORPO.

    $$\ell=-\beta\log\sigma\Big(D-\big(\log(1-e^{\bar\pi_w})-\log(1-e^{\bar\pi_l})\big)\Big)$$

    with the mean log-probabilities $\bar\pi$. Source: J. Hong, N. Lee, J. Thorne, *ORPO: Monolithic Preference Optimization
    without Reference Model*, EMNLP 2024, arXiv:2403.07691, eq. 7. `ORPOLoss` adds the likelihood of the preferred completion.

    Args:
        chosen_logps: Preferred completions (B,), nats per token, at most 0. What is nearer to 0 than the dtype resolves at 1
            has infinite odds; it counts as having that distance in the second difference.
        rejected_logps: Other completions (B,), likewise.
        beta: $\beta>0$, a weight ($\lambda$ in the paper).
        reduction: `"mean"`, or `"none"` for shape (B,).

    Returns:
        The loss in float32 or wider.

    Raises:
        ValueError: If a shape or dtype doesn't fit, the batch is empty, or an option is out of range.

    Examples:
        >>> import torch
        >>> from pref_opt.baselines import orpo_odds_loss
        >>> half, fifth = torch.tensor([0.5]).log(), torch.tensor([0.2]).log()
        >>> orpo_odds_loss(half, fifth, beta=1.0)  # odds 1 against 1/4: -log(4/5)
        tensor(0.2231)
    """
    check_positive("beta", beta)
    gap = _logp_gap(chosen_logps, rejected_logps)
    log_odds = gap - (_log1mexp(upcast(chosen_logps)) - _log1mexp(upcast(rejected_logps)))
    return reduced(-beta * F.logsigmoid(log_odds), reduction)


def _log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) of x < 0 to full precision; both branches are finite, so that `where` needs no guard."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x > -math.log(2), (-x.expm1()).log(), (-x.exp()).log1p())


# --- losses with several negatives ------------------------------------------------------------------------------------


def sdpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""S-DPO: DPO against K other completions, in the form of a softmax.

    $$\ell=\operatorname{softplus}\Big(\log\sum_{j=1}^K e^{\beta(n_j-c)}\Big),\qquad
    c=\log\frac{\pi(y_w)}{\pi_{\text{ref}}(y_w)},\quad n_j=\log\frac{\pi(y_{l,j})}{\pi_{\text{ref}}(y_{l,j})}$$

    Source: Y. Chen et al., *On Softmax Direct Preference Optimization for Recommendation*, NeurIPS 2024, arXiv:2406.09215.
    One negative gives DPO.

    Args:
        chosen_logps: Preferred completions under the policy (B,), nats.
        rejected_logps: Other completions under the policy (B, K).
        ref_chosen_logps: Preferred completions under the reference (B,).
        ref_rejected_logps: Other completions under the reference (B, K).
        beta: $\beta>0$.
        reduction: `"mean"`, or `"none"` for shape (B,).

    Returns:
        The loss in float32 or wider.

    Raises:
        ValueError: If a shape or dtype doesn't fit, the batch is empty, or an option is out of range.

    Examples:
        >>> import torch
        >>> from pref_opt.baselines import sdpo_loss
        >>> one, three = torch.zeros(1), torch.zeros(1, 3)
        >>> sdpo_loss(one, three, one, three)  # log(1 + K)
        tensor(1.3863)
    """
    check_positive("beta", beta)
    chosen, rejected = _log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    hardest = (beta * (rejected - chosen.unsqueeze(1))).logsumexp(1)
    return reduced(logistic_losses(-hardest), reduction)


def dmpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""DMPO: DPO against the mean of K other completions.

    $$\ell=-\log\sigma\Big(\beta\big(c-\tfrac1K\textstyle\sum_jn_j\big)\Big)$$

    with the log-ratios $c$, $n_j$ of `sdpo_loss`. Source: Z. Bai et al., *Finetuning Large Language Model for Personalized
    Ranking* (DMPO), 2024, arXiv:2405.16127. One negative gives DPO.

    Args:
        chosen_logps: Preferred completions under the policy (B,), nats.
        rejected_logps: Other completions under the policy (B, K).
        ref_chosen_logps: Preferred completions under the reference (B,).
        ref_rejected_logps: Other completions under the reference (B, K).
        beta: $\beta>0$.
        reduction: `"mean"`, or `"none"` for shape (B,).

    Returns:
        The loss in float32 or wider.

    Raises:
        ValueError: If a shape or dtype doesn't fit, the batch is empty, or an option is out of range.

    Examples:
        >>> import torch
        >>> from pref_opt.baselines import dmpo_loss
        >>> one, three = torch.zeros(1), torch.zeros(1, 3)
        >>> dmpo_loss(one, three, one, three)
        tensor(0.6931)
    """
    check_positive("beta", beta)
    chosen, rejected = _log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return reduced(logistic_losses(beta * (chosen - rejected.mean(1))), reduction)


def mppo_loss(
    chosen_logps: Tensor, rejected_logps: Tensor, *, beta: float = 1.0, reduction: Reduction = "mean"
) -> Tensor:
    r"""MPPO: one completion against K others, on probabilities.

    $$\ell=-\log\sigma\Big(\beta\big(K e^{\log\pi(y_w)}-\textstyle\sum_{j=1}^Ke^{\log\pi(y_{l,j})}\big)\Big)$$

    Source: S. Xie et al., *MPPO: Multi Pair-wise Preference Optimization for LLMs with Arbitrary Negative Samples*, COLING
    2025, arXiv:2412.15244, in the form of DynamicPO's program. Probabilities of long completions vanish: below about
    -100 nats (float32) a completion has no gradient.

    Args:
        chosen_logps: Preferred completions (B,), nats, at most 0.
        rejected_logps: Other completions (B, K).
        beta: $\beta>0$.
        reduction: `"mean"`, or `"none"` for shape (B,).

    Returns:
        The loss in float32 or wider.

    Raises:
        ValueError: If a shape or dtype doesn't fit, the batch is empty, or an option is out of range.

    Examples:
        >>> import torch
        >>> from pref_opt.baselines import mppo_loss
        >>> mppo_loss(torch.zeros(1), torch.full((1, 2), -50.0))  # 2 against 0
        tensor(0.1269)
    """
    check_positive("beta", beta)
    check_lists(chosen_logps, rejected_logps)
    wins = rejected_logps.shape[1] * upcast(chosen_logps).exp() - upcast(rejected_logps).exp().sum(1)
    return reduced(logistic_losses(beta * wins), reduction)


def _log_ratios(
    chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen_logps: Tensor, ref_rejected_logps: Tensor
) -> tuple[Tensor, Tensor]:
    check_lists(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    chosen = upcast(chosen_logps) - upcast(ref_chosen_logps)
    return chosen, upcast(rejected_logps) - upcast(ref_rejected_logps)


# --- loss objects -----------------------------------------------------------------------------------------------------


class _Stateless(PreferenceLoss):
    """A loss without state whose rewards are beta times log-ratios, or log-probabilities where there is no reference."""

    def __init__(self, beta: float) -> None:
        check_positive("beta", beta)
        self.beta = beta

    def _loss(self, logps: Logps) -> Tensor:
        raise NotImplementedError

    def __call__(self, logps: Logps, context: LossContext) -> LossOutput:
        loss = self._loss(logps)
        return LossOutput(loss, *implicit_rewards(logps, self.beta, reference=self.requires_reference))


class DPOLoss(_Stateless):
    r"""DPO as a loss object, on sums; see `dpo_loss`.

    Args:
        beta: $\beta>0$.
        label_smoothing: $\varepsilon$ in [0, 0.5).

    Raises:
        ValueError: If an option is out of range.

    Examples:
        >>> import torch
        >>> from pref_opt.losses import LossContext, Logps, make_loss
        >>> same = torch.tensor([-7.0, -9.0])
        >>> make_loss("dpo", beta=0.1)(Logps(same, same, same, same), LossContext()).loss
        tensor(0.6931)
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        super().__init__(beta)
        check_label_smoothing(label_smoothing)
        self.label_smoothing = label_smoothing

    def _loss(self, logps: Logps) -> Tensor:
        pairs = (logps.chosen, logps.rejected, *references(logps))
        return dpo_loss(*pairs, beta=self.beta, label_smoothing=self.label_smoothing)


class CDPOLoss(DPOLoss):
    r"""Conservative DPO: `DPOLoss` that smooths labels by default.

    Args:
        beta: $\beta>0$.
        label_smoothing: $\varepsilon$ in [0, 0.5), the assumed share of flipped pairs.

    Raises:
        ValueError: If an option is out of range.

    Examples:
        >>> from pref_opt.baselines import CDPOLoss
        >>> CDPOLoss().label_smoothing
        0.1
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.1) -> None:
        super().__init__(beta, label_smoothing)


class DPONormLoss(DPOLoss):
    r"""Length-normalised DPO: `DPOLoss` on means per token.

    Args:
        beta: $\beta>0$; larger than with sums, as means are smaller.
        label_smoothing: $\varepsilon$ in [0, 0.5).

    Raises:
        ValueError: If an option is out of range.

    Examples:
        >>> from pref_opt.baselines import DPONormLoss
        >>> DPONormLoss(beta=5.0).length_normalized
        True
    """

    length_normalized = True


class RobustDPOLoss(DPOLoss):
    r"""Robust DPO as a loss object, on sums; see `robust_dpo_loss`.

    Args:
        beta: $\beta>0$.
        label_smoothing: $\varepsilon$ in [0, 0.5), the share of flipped pairs.

    Raises:
        ValueError: If an option is out of range.

    Examples:
        >>> from pref_opt.baselines import RobustDPOLoss
        >>> RobustDPOLoss(label_smoothing=0.2).requires_reference
        True
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.1) -> None:
        super().__init__(beta, label_smoothing)

    def _loss(self, logps: Logps) -> Tensor:
        pairs = (logps.chosen, logps.rejected, *references(logps))
        return robust_dpo_loss(*pairs, beta=self.beta, label_smoothing=self.label_smoothing)


class IPOLoss(_Stateless):
    r"""IPO as a loss object; see `ipo_loss`.

    Args:
        beta: $\beta>0$.
        length_normalized: False for sums, as in the paper; True for means per token, as in TRL.

    Raises:
        ValueError: If an option is out of range.

    Examples:
        >>> from pref_opt.baselines import IPOLoss
        >>> IPOLoss(length_normalized=True).length_normalized
        True
    """

    def __init__(self, beta: float = 0.1, *, length_normalized: bool = False) -> None:
        super().__init__(beta)
        self.length_normalized = length_normalized

    def _loss(self, logps: Logps) -> Tensor:
        return ipo_loss(logps.chosen, logps.rejected, *references(logps), beta=self.beta)


class KTOPairLoss(PreferenceLoss):
    r"""Paired KTO as a loss object, on sums; see `kto_pair_loss`.

    The two KL terms are means over the batch of all processes.

    Args:
        beta: $\beta>0$.

    Raises:
        ValueError: If `beta` isn't positive.

    Examples:
        >>> from pref_opt.baselines import KTOPairLoss
        >>> KTOPairLoss().couples_pairs
        True
    """

    couples_pairs: ClassVar[bool] = True

    def __init__(self, beta: float = 0.1) -> None:
        check_positive("beta", beta)
        self.beta = beta

    def __call__(self, logps: Logps, context: LossContext) -> LossOutput:
        """Compute the loss of the global batch; only this process's pairs carry gradient."""
        pairs = (logps.chosen, logps.rejected, *references(logps))
        rewards = implicit_rewards(logps, self.beta, reference=True)
        if not context.training or context.world_size == 1:
            return LossOutput(kto_pair_loss(*pairs, beta=self.beta), *rewards)
        everyone = _everyone(torch.stack([upcast(values) for values in pairs], 1), context)
        loss = kto_pair_loss(*everyone.unbind(1), beta=self.beta)
        # Averaging over processes divides the gradient of each pair by their number, which is undone here.
        return LossOutput(loss + (context.world_size - 1) * (loss - loss.detach()), *rewards)


def _everyone(values: Tensor, context: LossContext) -> Tensor:
    """Return the values of all processes; those of this one keep their graph."""
    start = context.process_index * len(values)
    gathered = context.gather(values.detach())
    return torch.cat([gathered[:start], values, gathered[start + len(values) :]])


class SimPOLoss(_Stateless):
    r"""SimPO as a loss object, on means per token and without a reference; see `simpo_loss`.

    Args:
        beta: $\beta>0$.
        gamma_beta_ratio: $\gamma/\beta$, a finite number.
        label_smoothing: $\varepsilon$ in [0, 0.5).

    Raises:
        ValueError: If an option is out of range.

    Examples:
        >>> from pref_opt.baselines import SimPOLoss
        >>> loss = SimPOLoss(beta=2.5, gamma_beta_ratio=0.4)
        >>> loss.requires_reference, loss.length_normalized
        (False, True)
    """

    requires_reference = False
    length_normalized = True

    def __init__(self, beta: float = 2.0, gamma_beta_ratio: float = 0.25, label_smoothing: float = 0.0) -> None:
        super().__init__(beta)
        check_finite("gamma_beta_ratio", gamma_beta_ratio)
        check_label_smoothing(label_smoothing)
        self.gamma_beta_ratio = gamma_beta_ratio
        self.label_smoothing = label_smoothing

    def _loss(self, logps: Logps) -> Tensor:
        return simpo_loss(
            logps.chosen,
            logps.rejected,
            beta=self.beta,
            gamma_beta_ratio=self.gamma_beta_ratio,
            label_smoothing=self.label_smoothing,
        )


class SLiCLoss(_Stateless):
    r"""SLiC as a loss object, without a reference; see `slic_loss`.

    Args:
        beta: $\beta>0$, one over the margin.
        length_normalized: True for means per token; False for sums.

    Raises:
        ValueError: If an option is out of range.

    Examples:
        >>> from pref_opt.baselines import SLiCLoss
        >>> SLiCLoss(beta=1.0).requires_reference
        False
    """

    requires_reference = False

    def __init__(self, beta: float = 1.0, *, length_normalized: bool = True) -> None:
        super().__init__(beta)
        self.length_normalized = length_normalized

    def _loss(self, logps: Logps) -> Tensor:
        return slic_loss(logps.chosen, logps.rejected, beta=self.beta)


class _WithLikelihood(PreferenceLoss):
    """A preference term plus the weighted likelihood of the preferred completions."""

    requires_reference = False

    def __init__(self, beta: float, nll_weight: float) -> None:
        check_positive("beta", beta)
        self.beta = beta
        self.nll_weight = nll_weight

    def _preference(self, logps: Logps) -> Tensor:
        raise NotImplementedError

    def __call__(self, logps: Logps, context: LossContext) -> LossOutput:
        loss = self._preference(logps)
        rewards = implicit_rewards(logps, self.beta, reference=False)
        if self.nll_weight == 0:
            return LossOutput(loss, *rewards)
        nll = chosen_nll(logps, length_normalized=self.length_normalized)
        return LossOutput(loss + self.nll_weight * nll, *rewards, {"nll": nll.detach()})


class CPOLoss(_WithLikelihood):
    r"""CPO as a loss object, on sums and without a reference: `cpo_loss` plus the likelihood of the preferred completions.

    The likelihood is per token (`chosen_nll`) and needs `Logps.chosen_lengths` unless its weight is 0.

    Args:
        beta: $\beta>0$.
        cpo_alpha: Weight of the likelihood, at least 0.
        label_smoothing: $\varepsilon$ in [0, 0.5).

    Raises:
        ValueError: If an option is out of range.

    Examples:
        >>> import torch
        >>> from pref_opt.losses import LossContext, Logps, make_loss
        >>> logps = Logps(torch.tensor([-4.0]), torch.tensor([-4.0]), chosen_lengths=torch.tensor([2]))
        >>> make_loss("cpo")(logps, LossContext()).loss  # log 2 + 2 nats per token
        tensor(2.6931)
    """

    def __init__(self, beta: float = 0.1, cpo_alpha: float = 1.0, label_smoothing: float = 0.0) -> None:
        check_not_negative("cpo_alpha", cpo_alpha)
        check_label_smoothing(label_smoothing)
        super().__init__(beta, nll_weight=cpo_alpha)
        self.label_smoothing = label_smoothing

    def _preference(self, logps: Logps) -> Tensor:
        return cpo_loss(logps.chosen, logps.rejected, beta=self.beta, label_smoothing=self.label_smoothing)


class ORPOLoss(_WithLikelihood):
    r"""ORPO as a loss object, on means per token: likelihood of the preferred completions plus `orpo_odds_loss`.

    Args:
        beta: Weight of the odds-ratio term, > 0.

    Raises:
        ValueError: If `beta` isn't positive.

    Examples:
        >>> import torch
        >>> from pref_opt.losses import LossContext, Logps, make_loss
        >>> logps = Logps(torch.tensor([-2.0]), torch.tensor([-2.0]))
        >>> make_loss("orpo", beta=0.1)(logps, LossContext()).loss  # 2 nats per token + 0.1 log 2
        tensor(2.0693)
    """

    length_normalized = True

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__(beta, nll_weight=1.0)

    def _preference(self, logps: Logps) -> Tensor:
        return orpo_odds_loss(logps.chosen, logps.rejected, beta=self.beta)


class _AgainstMany(_Stateless):
    """A loss of one completion against K others."""

    multi_negative: ClassVar[bool] = True

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__(beta)


class SDPOLoss(_AgainstMany):
    r"""S-DPO as a loss object, on sums, K negatives per row; see `sdpo_loss`.

    Args:
        beta: $\beta>0$.

    Raises:
        ValueError: If `beta` isn't positive.

    Examples:
        >>> import torch
        >>> from pref_opt.losses import LossContext, Logps, make_loss
        >>> one, three = torch.zeros(1), torch.zeros(1, 3)
        >>> make_loss("sdpo")(Logps(one, three, one, three), LossContext()).loss
        tensor(1.3863)
    """

    def _loss(self, logps: Logps) -> Tensor:
        return sdpo_loss(logps.chosen, logps.rejected, *references(logps), beta=self.beta)


class DMPOLoss(_AgainstMany):
    r"""DMPO as a loss object, on sums, K negatives per row; see `dmpo_loss`.

    Args:
        beta: $\beta>0$.

    Raises:
        ValueError: If `beta` isn't positive.

    Examples:
        >>> from pref_opt.baselines import DMPOLoss
        >>> DMPOLoss().multi_negative
        True
    """

    def _loss(self, logps: Logps) -> Tensor:
        return dmpo_loss(logps.chosen, logps.rejected, *references(logps), beta=self.beta)


class MPPOLoss(_AgainstMany):
    r"""MPPO as a loss object, on sums, K negatives per row and without a reference; see `mppo_loss`.

    Args:
        beta: $\beta>0$.

    Raises:
        ValueError: If `beta` isn't positive.

    Examples:
        >>> from pref_opt.baselines import MPPOLoss
        >>> MPPOLoss().requires_reference
        False
    """

    requires_reference = False

    def _loss(self, logps: Logps) -> Tensor:
        return mppo_loss(logps.chosen, logps.rejected, beta=self.beta)
