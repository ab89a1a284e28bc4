r"""Dr. DPO: a soft minimum over the pairs of a batch in place of their mean.

A pair with a flipped label has a large loss, and in a mean it pulls the hardest. Dr. DPO gives the pairs of a batch the
weights of a softmax over their negated losses, so that pairs which the policy disagrees with strongly lose weight. The
optimism is intended: it is the most favourable reweighting of the pairs within a KL ball, not the worst.

$$\mathcal{L}=-\beta'\log\frac1B\sum_i e^{-\ell_i/\beta'}$$

Reference: J. Wu, Y. Xie, Z. Yang, J. Wu, J. Chen, J. Gao, B. Ding, X. Wang, X. He, *Towards Robust Alignment of Language
Models: Distributionally Robustifying Direct Preference Optimization*, ICLR 2025, arXiv:2407.07880, eq. 12. Documentation:
`docs/papers/pref-opt/dr_dpo.md`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch

from pref_opt._checks import check_choice, check_count, check_label_smoothing, check_pairs, check_positive
from pref_opt.baselines import dpo_loss, implicit_rewards, ipo_loss, references, upcast
from pref_opt.losses import LossOutput, PlannedLoss

if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]
    from torch import Tensor

    from pref_opt.losses import Logps, LossContext

__all__ = ["DrDPOLoss", "dr_aggregate", "dr_dpo_loss", "dr_weights", "flip_preferences"]

Base = Literal["sigmoid", "ipo_sum"] | Callable[..., "Tensor"]

# Below it the quotients of float32 losses overflow or become 0/0.
LEAST_BETA_PRIME = 1e-30
# Reading a value makes the host wait for the device, so the effective sample size is looked at now and then.
WATCH_EVERY, LEAST_ESS = 50, 0.2


def dr_aggregate(losses: Tensor, *, beta_prime: float = 1.0) -> Tensor:
    r"""Soft minimum of the losses of a batch, of whatever kind they are.

    $$\mathcal{L}=-\beta'\log\frac1B\sum_ie^{-\ell_i/\beta'},\qquad
    \min_i\ell_i\le\mathcal{L}\le\frac1B\sum_i\ell_i,\qquad
    \frac{\partial\mathcal{L}}{\partial\ell_i}=\frac{e^{-\ell_i/\beta'}}{\sum_je^{-\ell_j/\beta'}}$$

    The losses are shifted by their minimum, and a spread that is small beside $\beta'$ goes through expm1 and log1p: no
    loss is too large and no $\beta'$ either. Source: eq. 12 of the paper with $h=-\ell$.

    Args:
        losses: Losses of the pairs [B].
        beta_prime: $\beta'$ in the unit of the losses. Small values select the best fitting pairs, infinity is the mean.

    Returns:
        Scalar in float32 or wider.

    Raises:
        ValueError: If `losses` isn't a non-empty floating vector or `beta_prime` isn't positive (above $10^{-30}$).

    Examples:
        >>> import torch
        >>> from pref_opt.dr_dpo import dr_aggregate
        >>> losses = torch.tensor([0.1, 5.0])
        >>> dr_aggregate(losses, beta_prime=1.0), dr_aggregate(losses, beta_prime=float("inf"))
        (tensor(0.7857), tensor(2.5500))
    """
    _check_beta_prime(beta_prime)
    check_pairs(losses=losses)
    losses = upcast(losses)
    if beta_prime == math.inf:
        return losses.mean()
    least = losses.detach().min()  # cancels, so it carries no gradient
    exponents = (least - losses) / beta_prime
    below_one = exponents.expm1().mean()
    small_spread = below_one.clamp_min(-0.5).log1p()
    return least - beta_prime * torch.where(below_one > -0.5, small_spread, exponents.exp().mean().log())


def dr_weights(losses: Tensor, *, beta_prime: float = 1.0) -> Tensor:
    r"""Weights of the pairs in the gradient of `dr_aggregate`, 1 on average.

    $$w_i=\frac{e^{-\ell_i/\beta'}}{\frac1B\sum_je^{-\ell_j/\beta'}}$$

    Source: section 4.3 of the paper.

    Args:
        losses: Losses of the pairs [B].
        beta_prime: $\beta'$ in the unit of the losses; infinity gives ones.

    Returns:
        Weights [B] in [0, B], detached, in float32 or wider.

    Raises:
        ValueError: If `losses` isn't a non-empty floating vector or `beta_prime` isn't positive (above $10^{-30}$).

    Examples:
        >>> import torch
        >>> from pref_opt.dr_dpo import dr_weights
        >>> dr_weights(torch.tensor([0.1, 1.0]), beta_prime=0.1)  # the example of the paper
        tensor([1.9998e+00, 2.4679e-04])
    """
    _check_beta_prime(beta_prime)
    check_pairs(losses=losses)
    losses = upcast(losses.detach())
    return len(losses) * ((losses.min() - losses) / beta_prime).softmax(0)


def dr_dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    beta_prime: float = 1.0,
    base: Base = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Dr. DPO loss of a batch.

    $$\mathcal{L}=-\beta'\log\frac1B\sum_ie^{-\ell_i/\beta'},\qquad\ell_i=-\log\sigma(\beta G_i)$$

    Source: eq. 12 of the paper; `label_smoothing` and the base `"ipo_sum"` are the authors' code's.

    Args:
        chosen_logps: Log-probabilities of the preferred completions [B], sums over tokens, nats.
        rejected_logps: Log-probabilities of the other completions [B].
        ref_chosen_logps: The same as `chosen_logps` under the frozen reference.
        ref_rejected_logps: The same as `rejected_logps` under the frozen reference.
        beta: Of the base loss, positive.
        beta_prime: $\beta'$ in the unit of the base loss; infinity gives its mean.
        base: `"sigmoid"` (DPO), `"ipo_sum"` (IPO on the log-probabilities as given), or a function of the four tensors
            that returns the losses [B]; `beta` isn't passed to it.
        label_smoothing: Of the base `"sigmoid"`, in [0, 0.5).

    Returns:
        Scalar in float32 or wider.

    Raises:
        ValueError: If the log-probabilities aren't floating vectors of one length, a number is out of range, `base` is
            unknown, or `label_smoothing` is given with a base that has none.

    Examples:
        >>> import torch
        >>> from pref_opt.baselines import simpo_loss
        >>> from pref_opt.dr_dpo import dr_dpo_loss
        >>> chosen, rejected, zero = torch.tensor([-3.0, -9.0]), torch.tensor([-5.0, -4.0]), torch.zeros(2)
        >>> dr_dpo_loss(chosen, rejected, zero, zero, beta=0.1)
        tensor(0.7685)
        >>> def simpo(chosen, rejected, *_):
        ...     return simpo_loss(chosen, rejected, beta=2.0, gamma_beta_ratio=0.25, reduction="none")
        >>> dr_dpo_loss(chosen, rejected, zero, zero, base=simpo)
        tensor(0.7229)
    """
    _check_base(base, beta, label_smoothing)
    tensors = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return dr_aggregate(_base_losses(tensors, base, beta, label_smoothing), beta_prime=beta_prime)


class _Share(NamedTuple):
    """What one micro-batch of this process gets from the plan of its window."""

    weights: Tensor  # of its pairs in the sum of losses whose gradient is that of the group
    value: Tensor
    metrics: dict[str, Tensor]


class DrDPOLoss(PlannedLoss[_Share]):
    r"""Dr. DPO over the pairs of a group.

    The weights compare the pairs of one group with each other: a group of one pair is plain DPO, and larger groups tell a
    flipped pair better. Evaluation returns the plain mean, which doesn't depend on the batch size, and logs the soft
    minimum as `loss/dr`. With a function as `base`, set `requires_reference` and `length_normalized` of the object to what
    it needs.

    `weights/ess` is the effective sample size $1/(B\sum_ip_i^2)$ of the weights as a share of the group: 1 where all
    are equal. A warning is given once if it is found below 0.2, where $\beta'$ is too small beside the spread of the
    losses and training may collapse; it is looked at every 50 calls.

    Args:
        beta: Of the base loss, positive.
        beta_prime: $\beta'$ in the unit of the base loss; infinity gives its mean.
        base: `"sigmoid"` (DPO), `"ipo_sum"`, or a function of chosen, rejected, ref_chosen and ref_rejected (None where
            there is no reference) that returns the losses [B].
        label_smoothing: Of the base `"sigmoid"`, in [0, 0.5).
        group: `"local"` is the micro-batch of one process, as in the authors' code; `"global"` that of all processes;
            `"step"` all pairs of an optimiser step, which needs `prepare_window`.

    Raises:
        ValueError: If an option is out of range or unknown.

    Examples:
        >>> import torch
        >>> from pref_opt.dr_dpo import DrDPOLoss
        >>> from pref_opt.losses import Logps, LossContext
        >>> zero = torch.zeros(2)
        >>> logps = Logps(torch.tensor([-3.0, -9.0]), torch.tensor([-5.0, -4.0]), zero, zero)
        >>> out = DrDPOLoss(beta=0.1, beta_prime=1.0)(logps, LossContext())
        >>> out.loss, out.metrics["loss/mean"], out.metrics["weights/min"]
        (tensor(0.7685), tensor(0.7861), tensor(0.8142))
    """

    couples_pairs: ClassVar[bool] = True

    def __init__(
        self,
        beta: float = 0.1,
        beta_prime: float = 1.0,
        base: Base = "sigmoid",
        label_smoothing: float = 0.0,
        group: Literal["local", "global", "step"] = "local",
    ) -> None:
        _check_base(base, beta, label_smoothing)
        _check_beta_prime(beta_prime)
        check_choice("group", group, ("local", "global", "step"))
        self.beta = beta
        self.beta_prime = beta_prime
        self.base = base
        self.label_smoothing = label_smoothing
        self.group = group
        self._calls = 0
        self._warned: set[str] = set()
        super().__init__("group='step'" if group == "step" else None)

    def __call__(self, logps: Logps, context: LossContext) -> LossOutput:
        losses = self._values(logps)
        if context.training:
            share = self._planned(losses.detach(), context)
            surrogate = (share.weights * losses).sum()
            loss, metrics = share.value + (surrogate - surrogate.detach()), share.metrics
            self._watch(metrics)
        else:
            loss, metrics = losses.mean(), self._metrics(losses.detach())
        chosen, rejected = implicit_rewards(logps, self.beta, reference=self.requires_reference)
        return LossOutput(loss=loss, chosen_rewards=chosen, rejected_rewards=rejected, metrics=metrics)

    def _values(self, logps: Logps) -> Tensor:
        tensors = (logps.chosen, logps.rejected, logps.ref_chosen, logps.ref_rejected)
        if self.requires_reference:
            references(logps)
        return _base_losses(tensors, self.base, self.beta, self.label_smoothing)

    def _plan(self, losses: list[Tensor], context: LossContext) -> list[_Share]:
        """Weigh the pairs of a window; the trainer will average the losses over its micro-batches and processes."""
        own = torch.cat(losses)
        group, start = own, 0
        if self.group != "local":
            group, start = context.gather(own), context.process_index * len(own)
        if len(group) == 1:
            self._warn(
                "Dr. DPO with one pair per group is plain DPO: raise per_device_train_batch_size or use another `group`"
            )
        # Of the group's average 1/len(group); the trainer divides by processes and micro-batches, which len(own) holds.
        weights = dr_weights(group, beta_prime=self.beta_prime).narrow(0, start, len(own)) * (len(losses) / len(own))
        value, metrics = dr_aggregate(group, beta_prime=self.beta_prime), self._metrics(group)
        return [_Share(part, value, metrics) for part in torch.split(weights, [len(part) for part in losses])]

    def _metrics(self, losses: Tensor) -> dict[str, Tensor]:
        weights = dr_weights(losses, beta_prime=self.beta_prime)
        return {
            "loss/dr": dr_aggregate(losses, beta_prime=self.beta_prime),
            "loss/mean": losses.mean(),
            "weights/min": weights.min(),
            "weights/max": weights.max(),
            "weights/ess": 1 / weights.square().mean(),
            "weights/group_size": losses.new_full((), len(losses)),
        }

    def _watch(self, metrics: dict[str, Tensor]) -> None:
        self._calls += 1
        if self._calls % WATCH_EVERY == 0 and float(metrics["weights/ess"]) < LEAST_ESS:
            self._warn(
                f"Dr. DPO: fewer than {LEAST_ESS:.0%} of the pairs carry the gradient (weights/ess); beta_prime="
                f"{self.beta_prime!r} is small beside the spread of the losses, raise it"
            )

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, UserWarning, stacklevel=2)


def flip_preferences(
    dataset: Dataset | list[dict[str, Any]], rate: float, seed: int, flip_sft_target: bool = True
) -> Dataset | list[dict[str, Any]]:
    r"""Swap the preferred and the other answer of randomly chosen pairs, to study wrong labels.

    $$P(\text{pair }i\text{ is flipped})=\text{rate},\quad\text{independently}$$

    Every column whose name holds "chosen" changes places with its partner named "rejected" (`chosen` and `rejected`,
    `score_chosen` and `score_rejected`). With one seed, the pairs flipped at a lower rate are also flipped at a higher
    one. Source: the noise study of the paper, section 5; flip training data only.

    Args:
        dataset: A `datasets.Dataset` or a list of dicts with columns `chosen` and `rejected`.
        rate: Probability of a flip in [0, 0.5].
        seed: Seed of the choice, at least 0.
        flip_sft_target: Whether supervised training before the preference training sees the wrong answers too, as in the
            paper. True: it may use `chosen`, and a column `sft_target` follows the flips if there is one. False: the
            column `sft_target` keeps the right answers, and is added if there is none.

    Returns:
        A new dataset in the order of the old one with the boolean column `flipped`; nothing is changed in place.

    Raises:
        ValueError: If `rate` is outside [0, 0.5], `seed` is negative, a column is missing, or `flipped` already exists.
        TypeError: If `dataset` is of another type.

    Examples:
        >>> from pref_opt.dr_dpo import flip_preferences
        >>> pairs = [{"prompt": str(i), "chosen": "right", "rejected": "wrong"} for i in range(5)]
        >>> [row["chosen"] for row in flip_preferences(pairs, rate=0.4, seed=7)]
        ['wrong', 'wrong', 'right', 'right', 'right']
    """
    if not 0 <= rate <= 0.5:
        raise ValueError(f"rate must be in [0, 0.5], got {rate!r}")
    check_count("seed", seed, least=0)
    if not isinstance(dataset, list):
        from datasets import Dataset

        if not isinstance(dataset, Dataset):
            raise TypeError(f"dataset must be a datasets.Dataset or a list of dicts, got {type(dataset).__name__}")
    chance = torch.rand(len(dataset), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    flips: list[bool] = (chance < rate).tolist()
    if isinstance(dataset, list):
        return _flip_rows(dataset, flips, flip_sft_target)
    return _flip_dataset(dataset, flips, flip_sft_target)


def _flip_rows(rows: list[dict[str, Any]], flips: list[bool], flip_sft_target: bool) -> list[dict[str, Any]]:
    flipped = []
    for row, flip in zip(rows, flips, strict=True):
        partner = _names_after_flip(list(row))
        new = {name: row[partner.get(name, name) if flip else name] for name in row}
        if not flip_sft_target:
            new["sft_target"] = row.get("sft_target", row["chosen"])
        elif flip and "sft_target" in row:
            new["sft_target"] = row["rejected"]
        flipped.append({**new, "flipped": flip})
    return flipped


def _flip_dataset(dataset: Dataset, flips: list[bool], flip_sft_target: bool) -> Dataset:
    """Stand the flipped rows below the others and pick, which copies no row whatever its columns hold."""
    from datasets import concatenate_datasets

    partner = _names_after_flip(dataset.column_names)
    if not flip_sft_target and "sft_target" not in dataset.column_names:
        dataset = dataset.add_column("sft_target", dataset["chosen"][:], feature=dataset.features["chosen"])
    order = dataset.column_names
    swapped = dataset.rename_columns(partner)
    if flip_sft_target and "sft_target" in order:
        swapped = swapped.remove_columns("sft_target")
        swapped = swapped.add_column("sft_target", swapped["chosen"][:], feature=swapped.features["chosen"])
    size = len(dataset)
    both = concatenate_datasets(
        [
            dataset.add_column("flipped", [False] * size),
            swapped.select_columns(order).add_column("flipped", [True] * size),
        ]
    )
    return both.select([i + size * flip for i, flip in enumerate(flips)])


def _names_after_flip(names: list[str]) -> dict[str, str]:
    """Return the new name of every column that changes places."""
    for name in ("chosen", "rejected"):
        if name not in names:
            raise ValueError(f"dataset must have columns 'chosen' and 'rejected', got {names}")
    if "flipped" in names:
        raise ValueError("dataset already has a column 'flipped'")
    partners = {name: name.replace("chosen", "rejected") for name in names if "chosen" in name}
    pairs = {name: partner for name, partner in partners.items() if partner in names}
    return pairs | {partner: name for name, partner in pairs.items()}


def _base_losses(tensors: tuple[Any, Any, Any, Any], base: Base, beta: float, label_smoothing: float) -> Tensor:
    if base == "sigmoid":
        return dpo_loss(*tensors, beta=beta, label_smoothing=label_smoothing, reduction="none")
    if base == "ipo_sum":
        return ipo_loss(*tensors, beta=beta, reduction="none")
    losses = base(*tensors)
    if losses.shape != tensors[0].shape:
        raise ValueError(f"base must return losses of shape {tuple(tensors[0].shape)}, got {tuple(losses.shape)}")
    return losses


def _check_base(base: Base, beta: float, label_smoothing: float) -> None:
    check_positive("beta", beta)
    check_label_smoothing(label_smoothing)
    if not callable(base):
        check_choice("base", base, ("sigmoid", "ipo_sum"))
    if label_smoothing and base != "sigmoid":
        raise ValueError(f"label_smoothing needs base='sigmoid', got {label_smoothing!r} with base={base!r}")


def _check_beta_prime(beta_prime: float) -> None:
    if not beta_prime > LEAST_BETA_PRIME:
        raise ValueError(
            f"beta_prime must be positive (above {LEAST_BETA_PRIME}; infinity means plain DPO), got {beta_prime!r}"
        )
