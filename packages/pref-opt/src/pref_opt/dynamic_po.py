r"""DynamicPO: boundary negatives and a beta for each of them.

After supervised training most random negatives are far below the positive already. A mean over all of them dilutes the few
near the boundary. DynamicPO keeps, for every row, the negatives that violate the preference, or else the best cluster, and
gives each of them a beta by its place between the positive and the easy negatives.

$$
\ell=-\log\sigma\Big(\tfrac1{|V|}\sum_{j\in V}\beta_j\,(c'-n'_j)\Big),\qquad
\beta_j=\beta\Big(1+\tfrac12\tanh\frac{p_j-q_j-m}{|p_j|+|q_j|}\Big),\quad p_j=c-n_j,\quad q_j=n_j-d
$$

Here $c,n_j$ are log-probabilities of the positive and of the negatives, $c',n'_j$ their ratios to the reference, $V$ the
boundary negatives, $d$ the mean of the other negatives and $m$ a margin in nats. `base` chooses the loss around it: this
one (DMPO), MPPO or S-DPO.

Reference: X. Hu, K. Zhang, J. Wu, S. Wang, C. Wang, W. Chen, Y. Zhu, H. Wang, X. Wang, X. Wang, *DynamicPO: Dynamic
Preference Optimization for Recommendation*, DASFAA 2026, arXiv:2605.00327; formulas as in the authors' code.
Documentation: `docs/papers/pref-opt/dynamic_po.md`.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from pref_opt._checks import check_choice, check_count, check_finite, check_lists, check_positive
from pref_opt.baselines import REDUCTIONS, check_values, implicit_rewards, logistic_losses, reduced, upcast
from pref_opt.losses import LossOutput, PreferenceLoss

if TYPE_CHECKING:
    from torch import Tensor

    from pref_opt.baselines import Reduction
    from pref_opt.losses import Logps, LossContext

__all__ = [
    "DynamicPOLoss",
    "boundary_mask",
    "dual_margin_beta",
    "dynamic_po_loss",
    "optimal_kmeans_1d",
]

Base = Literal["dmpo", "mppo", "sdpo"]
Clustering = Literal["exact", "sklearn"]

BASES = ("dmpo", "mppo", "sdpo")
CLUSTERINGS = ("exact", "sklearn")
SKLEARN_SEED = 42


# --- which negatives ---------------------------------------------------------------------------------------------------


def boundary_mask(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    *,
    num_clusters: int = 3,
    clustering: Clustering = "exact",
) -> Tensor:
    r"""Return which negatives of each row lie at the boundary.

    $$V=\{j:n_j\ge c\},\qquad\text{or, where that is empty, the cluster of the }n_j\text{ with the highest mean}$$

    Source: the authors' code (boundary negatives). Every row has at least one. The log-probabilities are those of the
    policy, not ratios to a reference, so the result serves scores of any recommender as well.

    Args:
        chosen_logps: Positives (B,), nats.
        rejected_logps: Negatives (B, K).
        num_clusters: Most clusters, >= 1. Rows with fewer distinct values have fewer clusters.
        clustering: `"exact"` finds the best partition (`optimal_kmeans_1d`); `"sklearn"` runs scikit-learn's k-means row by
            row with one start and a fixed seed, as the authors do, and often misses it.

    Returns:
        Boolean (B, K), without gradient.

    Raises:
        ValueError: If a shape or dtype doesn't fit, the batch is empty, an option is out of range, or a value isn't finite
            (looked at in main memory only).

    Examples:
        >>> import torch
        >>> from pref_opt.dynamic_po import boundary_mask
        >>> rejected = torch.tensor([[-4.0, -9.0, -12.0], [-5.5, -6.0, -12.0]])
        >>> boundary_mask(torch.tensor([-5.0, -5.0]), rejected, num_clusters=2)
        tensor([[ True, False, False],
                [ True,  True, False]])
    """
    _check_rows(chosen_logps, rejected_logps)
    check_count("num_clusters", num_clusters)
    check_choice("clustering", clustering, CLUSTERINGS)
    chosen, rejected = upcast(chosen_logps.detach()), upcast(rejected_logps.detach())
    violations = rejected >= chosen.unsqueeze(1)
    partition = optimal_kmeans_1d if clustering == "exact" else _sklearn_kmeans_1d
    labels = partition(rejected, num_clusters)
    top = labels == labels.amax(1, keepdim=True)
    return torch.where(violations.any(1, keepdim=True), violations, top)


def optimal_kmeans_1d(values: Tensor, num_clusters: int) -> Tensor:
    r"""Partition the numbers of each row into clusters with the least sum of squares.

    $$\min_{C_1,\dots,C_k}\sum_{l=1}^{k}\sum_{j\in C_l}\Big(x_j-\overline{x_{C_l}}\Big)^2$$

    Optimal clusters of numbers are runs of the sorted numbers, so dynamic programming over the ends of the runs finds
    them: all rows at once, on their device, with $O(BK^2)$ memory. Equal numbers stay together; there are
    min(`num_clusters`, distinct numbers) clusters. Among equally good partitions the one with the longest top cluster is
    taken. Source: the definition of k-means.

    Args:
        values: Numbers (B, K), floating, finite.
        num_clusters: k >= 1.

    Returns:
        Labels (B, K), int64, numbered from 0 by increasing mean of the cluster.

    Raises:
        ValueError: If `values` isn't a non-empty floating matrix, has non-finite values (looked at in main memory only),
            or `num_clusters` < 1.

    Examples:
        >>> import torch
        >>> from pref_opt.dynamic_po import optimal_kmeans_1d
        >>> optimal_kmeans_1d(torch.tensor([[5.0, 0.0, 9.0, 0.5, 5.5]]), 3)
        tensor([[1, 0, 2, 0, 1]])
    """
    check_count("num_clusters", num_clusters)
    if values.ndim != 2 or values.numel() == 0 or not values.is_floating_point():
        raise ValueError(
            f"values must be a non-empty floating matrix (B, K), got {values.dtype} of {tuple(values.shape)}"
        )
    check_values("values", values)
    ordered, order = values.detach().double().sort(1)
    starts = _run_starts(ordered, min(num_clusters, values.shape[1]))
    position = torch.arange(values.shape[1], device=values.device)
    # Position p belongs to the run whose start is the last one at or before p; start 0 is no boundary.
    run = ((starts.unsqueeze(2) <= position) & (starts.unsqueeze(2) > 0)).sum(1)
    return torch.zeros_like(run).scatter(1, order, run)


def _run_starts(ordered: Tensor, num_runs: int) -> Tensor:
    """Return the starts (B, R) of the runs of sorted numbers (B, K); unused ones are 0."""
    batch, size = ordered.shape
    cost = _run_costs(ordered)
    # A run may start where the number differs from the one before, so that equal numbers stay together.
    may_start = torch.cat([ordered.new_ones(batch, 1) > 0, ordered[:, 1:] > ordered[:, :-1]], 1)
    best = cost[:, 0]  # of the first e + 1 numbers, in one run
    choices = []
    for _ in range(num_runs - 1):
        before = torch.cat([best.new_zeros(batch, 1), best[:, :-1]], 1)  # of the numbers before start s
        total = torch.where(may_start, before, torch.inf).unsqueeze(2) + cost
        best, choice = total.min(1).values, total.argmin(1)  # ties: the first, which is the longest run
        choices.append(choice)
    starts, last = [], torch.full((batch, 1), size - 1, dtype=torch.long, device=ordered.device)
    for choice in reversed(choices):
        start = choice.gather(1, last)
        starts.append(start)
        last = (start - 1).clamp_min(0)
    return torch.cat(starts, 1) if starts else last.new_zeros(batch, 1)


def _run_costs(ordered: Tensor) -> Tensor:
    r"""Return the sum of squares (B, K, K) of the run from i to j, infinite where j < i.

    From squared differences, $\frac1n\sum_{p<q}(x_q-x_p)^2$, which are exactly 0 for equal numbers and don't cancel.
    """
    size = ordered.shape[1]
    squares = (ordered.unsqueeze(1) - ordered.unsqueeze(2)).square().triu()  # [p, q], p < q
    from_start = squares.flip(1).cumsum(1).flip(1)  # [i, q]: sum over p from i to q
    position = torch.arange(size, device=ordered.device)
    length = position.unsqueeze(0) - position.unsqueeze(1) + 1
    cost = from_start.triu().cumsum(2) / length.clamp_min(1)
    return torch.where(length > 0, cost, torch.inf)


def _sklearn_kmeans_1d(values: Tensor, num_clusters: int) -> Tensor:
    """Return labels as scikit-learn's k-means finds them, renumbered by increasing mean."""
    import numpy as np
    from sklearn.cluster import KMeans  # type: ignore[import-untyped]

    labels = []
    for row in values.double().cpu().numpy():
        clusters = min(num_clusters, len(np.unique(row)))
        fitted = KMeans(clusters, n_init=1, random_state=SKLEARN_SEED).fit(row[:, None])
        rank = fitted.cluster_centers_[:, 0].argsort().argsort()
        labels.append(torch.as_tensor(rank[fitted.labels_]))
    return torch.stack(labels).to(values.device)


# --- how much each of them counts --------------------------------------------------------------------------------------


def dual_margin_beta(
    chosen_logps: Tensor, rejected_logps: Tensor, mask: Tensor, *, beta: float = 1.0, margin: float = 6.0
) -> Tensor:
    r"""Return the beta of each boundary negative.

    $$\beta_j=\beta\,(1+\delta_j),\qquad\delta_j=\tfrac12\tanh\frac{p_j-q_j-m}{|p_j|+|q_j|},\qquad
    p_j=c-n_j,\quad q_j=n_j-d$$

    $d$ is the mean of the other negatives, or of the boundary negatives where there are no others. A negative far below
    the positive but close to the easy ones gets a larger beta, a violating one a smaller; all lie in
    $[\beta/2,3\beta/2]$. Where the positive, the negative and $d$ are equal, $\delta_j=-\tfrac12$ for a positive margin
    and 0 without one. Source: the authors' code (dual margin).

    Args:
        chosen_logps: Positives under the policy (B,), nats.
        rejected_logps: Negatives under the policy (B, K).
        mask: Boundary negatives (B, K), boolean, at least one per row.
        beta: $\beta>0$.
        margin: $m$ in nats of the whole completion, any finite number.

    Returns:
        (B, K) in float32 or wider, without gradient, 0 outside the mask.

    Raises:
        ValueError: If a shape or dtype doesn't fit, an option is out of range, or a row of the mask is empty (looked at in
            main memory only).

    Examples:
        >>> import torch
        >>> from pref_opt.dynamic_po import dual_margin_beta
        >>> mask = torch.tensor([[True, False]])
        >>> dual_margin_beta(torch.tensor([-2.0]), torch.tensor([[-6.0, -10.0]]), mask, margin=0.0)
        tensor([[1., 0.]])
    """
    _check_rows(chosen_logps, rejected_logps)
    check_positive("beta", beta)
    check_finite("margin", margin)
    _check_mask(mask, rejected_logps)
    chosen, rejected = upcast(chosen_logps.detach()), upcast(rejected_logps.detach())
    easy = torch.where(mask.all(1, keepdim=True), mask, ~mask)
    level = torch.where(easy, rejected, 0.0).sum(1, keepdim=True) / easy.sum(1, keepdim=True)
    to_chosen, to_easy = chosen.unsqueeze(1) - rejected, rejected - level
    scale = (to_chosen.abs() + to_easy.abs()).clamp_min(1e-12)
    delta = 0.5 * torch.tanh((to_chosen - to_easy - margin) / scale)
    return torch.where(mask, beta * (1 + delta), 0.0)


def dynamic_po_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    base: Base = "dmpo",
    beta: float = 1.0,
    margin: float = 6.0,
    num_clusters: int = 3,
    clustering: Clustering = "exact",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""One completion against its boundary negatives, each with a beta of its own.

    $$
    \begin{aligned}
    \text{dmpo: } & -\log\sigma\Big(\tfrac1{|V|}\textstyle\sum_{j\in V}\beta_j(c'-n'_j)\Big)\\
    \text{mppo: } & -\log\sigma\Big(\textstyle\sum_{j\in V}\beta_j(e^c-e^{n_j})\Big)\\
    \text{sdpo: } & \operatorname{softplus}\Big(\log\textstyle\sum_{j\in V}e^{\beta_j(n'_j-c')}\Big)
    \end{aligned}
    $$

    Source: the authors' code. Boundary and betas come from the policy's log-probabilities $c,n_j$ and are constants;
    the other negatives get exactly no gradient. Rows don't depend on each other.

    Args:
        chosen_logps: Positives under the policy (B,), sums over tokens, nats.
        rejected_logps: Negatives under the policy (B, K).
        ref_chosen_logps: Positives under the reference (B,); needed by `"dmpo"` and `"sdpo"`.
        ref_rejected_logps: Negatives under the reference (B, K).
        base: `"dmpo"`, `"mppo"` (on probabilities, without a reference) or `"sdpo"`.
        beta: $\beta>0$.
        margin: $m$ of the betas, nats.
        num_clusters: Most clusters where no negative violates the preference, >= 1.
        clustering: `"exact"` or `"sklearn"`; see `boundary_mask`.
        reduction: `"mean"`, or `"none"` for shape (B,).

    Returns:
        The loss in float32 or wider.

    Raises:
        ValueError: If a shape or dtype doesn't fit, the batch is empty, references are missing, an option is out of range,
            or a value isn't finite (looked at in main memory only).

    Warns:
        UserWarning: If `"mppo"` is given references, which it doesn't use.

    Examples:
        >>> import torch
        >>> from pref_opt.dynamic_po import dynamic_po_loss
        >>> chosen = torch.tensor([-5.0])
        >>> rejected = torch.tensor([[-5.5, -14.0, -15.0]], requires_grad=True)
        >>> dynamic_po_loss(chosen, rejected, chosen, rejected.detach()).backward()
        >>> rejected.grad.count_nonzero()  # one negative is near the boundary
        tensor(1)
    """
    _check_options(base, beta, margin, num_clusters, clustering)
    check_choice("reduction", reduction, REDUCTIONS)
    mask = boundary_mask(chosen_logps, rejected_logps, num_clusters=num_clusters, clustering=clustering)
    betas = dual_margin_beta(chosen_logps, rejected_logps, mask, beta=beta, margin=margin)
    given = (ref_chosen_logps, ref_rejected_logps)
    if base == "mppo" and any(reference is not None for reference in given):
        warnings.warn(
            "base='mppo' uses no reference: ref_chosen_logps and ref_rejected_logps are ignored", stacklevel=2
        )
    return reduced(_losses(chosen_logps, rejected_logps, *given, base=base, mask=mask, betas=betas), reduction)


def _losses(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None,
    ref_rejected_logps: Tensor | None,
    *,
    base: Base,
    mask: Tensor,
    betas: Tensor,
) -> Tensor:
    chosen, rejected = upcast(chosen_logps), upcast(rejected_logps)
    if base == "mppo":
        return logistic_losses((betas * (chosen.exp().unsqueeze(1) - rejected.exp())).sum(1))
    if ref_chosen_logps is None or ref_rejected_logps is None:
        raise ValueError(f"base={base!r} needs ref_chosen_logps and ref_rejected_logps, got None")
    check_lists(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    gap = (chosen - upcast(ref_chosen_logps)).unsqueeze(1) - (rejected - upcast(ref_rejected_logps))
    if base == "dmpo":
        return logistic_losses((betas * gap).sum(1) / mask.sum(1))
    return logistic_losses(-torch.where(mask, -betas * gap, -torch.inf).logsumexp(1))


class DynamicPOLoss(PreferenceLoss):
    r"""DynamicPO as a loss object, on sums, K negatives per row; see `dynamic_po_loss`.

    Metrics: `boundary/fraction` of the negatives that are kept, `boundary/violation_rate` of the negatives that are at
    least as likely as the positive, `beta/mean`, `beta/min` and `beta/max` of the kept ones, `rewards/accuracy_all` of the
    rows whose positive is above all negatives, and `rewards/margin` to the mean negative.

    Args:
        base: `"dmpo"`, `"mppo"` or `"sdpo"`.
        beta: $\beta>0$.
        margin: $m$ of the betas, nats.
        num_clusters: Most clusters, >= 1.
        clustering: `"exact"` or `"sklearn"`.

    Raises:
        ValueError: If an option is out of range.

    Examples:
        >>> import torch
        >>> from pref_opt.losses import LossContext, Logps, make_loss
        >>> chosen, rejected = torch.tensor([-5.0]), torch.tensor([[-5.5, -14.0, -15.0]])
        >>> out = make_loss("dynamic_po", base="sdpo")(Logps(chosen, rejected, chosen, rejected), LossContext())
        >>> out.loss, out.metrics["boundary/fraction"]
        (tensor(0.6931), tensor(0.3333))
    """

    multi_negative: ClassVar[bool] = True

    def __init__(
        self,
        base: Base = "dmpo",
        beta: float = 1.0,
        margin: float = 6.0,
        num_clusters: int = 3,
        clustering: Clustering = "exact",
    ) -> None:
        _check_options(base, beta, margin, num_clusters, clustering)
        self.base = base
        self.beta = beta
        self.margin = margin
        self.num_clusters = num_clusters
        self.clustering = clustering
        self.requires_reference = base != "mppo"

    def __call__(self, logps: Logps, context: LossContext) -> LossOutput:
        """Compute the loss of one micro-batch; there's no state, and rows don't depend on each other."""
        chosen, rejected = logps.chosen, logps.rejected
        mask = boundary_mask(chosen, rejected, num_clusters=self.num_clusters, clustering=self.clustering)
        betas = dual_margin_beta(chosen, rejected, mask, beta=self.beta, margin=self.margin)
        losses = _losses(chosen, rejected, logps.ref_chosen, logps.ref_rejected, base=self.base, mask=mask, betas=betas)
        chosen_rewards, rejected_rewards = implicit_rewards(logps, self.beta, reference=self.requires_reference)
        kept = mask.to(betas.dtype)
        metrics = {
            "boundary/fraction": kept.mean(),
            "boundary/violation_rate": (rejected.detach() >= chosen.detach().unsqueeze(1)).to(betas.dtype).mean(),
            "beta/mean": betas.sum() / kept.sum(),
            "beta/min": torch.where(mask, betas, torch.inf).min(),
            "beta/max": betas.max(),
            "rewards/accuracy_all": (chosen_rewards > rejected_rewards.amax(1)).to(betas.dtype).mean(),
            "rewards/margin": (chosen_rewards - rejected_rewards.mean(1)).mean(),
        }
        return LossOutput(losses.mean(), chosen_rewards, rejected_rewards, metrics)


# --- checks ------------------------------------------------------------------------------------------------------------


def _check_options(base: str, beta: float, margin: float, num_clusters: int, clustering: str) -> None:
    check_choice("base", base, BASES)
    check_positive("beta", beta)
    check_finite("margin", margin)
    check_count("num_clusters", num_clusters)
    check_choice("clustering", clustering, CLUSTERINGS)


def _check_rows(chosen_logps: Tensor, rejected_logps: Tensor) -> None:
    check_lists(chosen_logps, rejected_logps)
    check_values("chosen_logps", chosen_logps)
    check_values("rejected_logps", rejected_logps)


def _check_mask(mask: Tensor, rejected_logps: Tensor) -> None:
    if mask.dtype != torch.bool or mask.shape != rejected_logps.shape:
        raise ValueError(
            f"mask must be boolean of shape {tuple(rejected_logps.shape)}, got {mask.dtype} of {tuple(mask.shape)}"
        )
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        return
    empty = ~mask.any(1)
    if bool(empty.any()):
        raise ValueError(f"mask must have at least one negative per row, got none in row {int(empty.nonzero()[0])}")
