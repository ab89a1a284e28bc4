"""Metrics of recommended sets, interaction rate, rarity of visits and fairness over it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from recsys_losses._checks import check_choice
from recsys_losses.raremed._losses import check_ddi

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    Floats = NDArray[np.float64]
    Array = NDArray[Any] | Tensor | Sequence[Any]

REDUCES = ("max", "mean")


class Fairness(NamedTuple):
    """What `rarity_fairness` returns.

    Args:
        weighted_mean: Mean score weighted by the rarity of the visits.
        neg_pearson: Minus the correlation of the group means with the rank of the group; positive when rare visits are
            served worse. 0 where all groups are equal.
        neg_slope: Minus the least-squares slope of the group means.
        gap: Largest minus smallest group mean.
        group_means: Mean score of each group, from the most common to the rarest visits.
    """

    weighted_mean: float
    neg_pearson: float
    neg_slope: float
    gap: float
    group_means: list[float]

    @property
    def group_std(self) -> float:
        """Population standard deviation of the group means, the measure of the paper's Table 4; smaller is fairer."""
        return float(np.std(self.group_means))


def visit_rarity(
    diagnoses: Sequence[Sequence[int]],
    *,
    counts: Array | None = None,
    reduce: Literal["max", "mean"] = "max",
) -> Floats:
    r"""Rarity of visits: the weight of their rarest diagnosis.

    $$w(c)=\frac{\sum_{c'}n_{c'}}{\#\text{codes}\cdot n_c},\qquad r_v=\max_{c\in v}w(c)$$

    with $n_c$ the number of visits with code c. A code of average frequency weighs 1; over all occurrences the weights
    average 1. Procedures don't count.

    Args:
        diagnoses: Diagnosis ids of each visit; a repeated id counts once.
        counts: $n_c$ by id, shape `(D,)`, of the *whole* data set; ids of count 0 aren't codes. None counts `diagnoses`.
        reduce: `"max"` or `"mean"` over the diagnoses of a visit.

    Returns:
        float64, one value per visit.

    Raises:
        ValueError: If there is no visit, a visit has no diagnoses, an id is negative, out of range of `counts` or has
            count 0 there, or `reduce` is unknown.

    Source: Zhao et al., 2024, sec. 6.1, and `PatientWeight` of the authors' code.

    Examples:
        >>> visit_rarity([[0, 1], [0], [0, 2]])  # counts 3, 1, 1: mean 5 / 3
        array([1.66666667, 0.55555556, 1.66666667])
    """
    check_choice("reduce", reduce, REDUCES)
    if not len(diagnoses):
        raise ValueError("diagnoses holds no visits")
    visits = [np.unique(np.asarray(codes, dtype=np.int64)) for codes in diagnoses]
    for number, codes in enumerate(visits):
        if not codes.size:
            raise ValueError(f"visit {number} has no diagnoses")
        if codes[0] < 0:
            raise ValueError(f"visit {number}: diagnosis id {codes[0]} is out of range")
    flat = np.concatenate(visits)
    seen = np.bincount(flat).astype(np.float64) if counts is None else _array(counts).astype(np.float64)
    if seen.ndim != 1 or not bool((seen >= 0).all()) or not bool(np.isfinite(seen).all()):
        raise ValueError(f"counts must be one finite number >= 0 per diagnosis, got the shape {seen.shape}")
    if flat.max() >= seen.size or not bool((seen[flat] > 0).all()):
        wrong = next(int(code) for code in flat if code >= seen.size or seen[code] == 0)
        raise ValueError(f"diagnosis id {wrong} is out of range: counts has {seen.size} entries, or none of this code")
    weight = seen.sum() / np.count_nonzero(seen) / np.where(seen > 0, seen, 1.0)
    starts = np.cumsum([0, *(codes.size for codes in visits[:-1])])
    if reduce == "max":
        return np.asarray(np.maximum.reduceat(weight[flat], starts))
    return np.asarray(np.add.reduceat(weight[flat], starts) / np.array([codes.size for codes in visits]))


def rarity_fairness(score: Array, rarity: Array, *, num_groups: int = 5, round_groups: int | None = None) -> Fairness:
    r"""How a score falls from common to rare visits.

    The n visits are sorted by rarity (ties in their order) and cut into g consecutive groups of $\lfloor n/g\rfloor+1$,
    the last one smaller.

    Args:
        score: Score of each visit, such as its Jaccard index, shape `(n,)`.
        rarity: Rarity of each visit from `visit_rarity`, shape `(n,)`, positive.
        num_groups: g, at least 2.
        round_groups: Decimals to which the group means are rounded, as the authors' code does with 4; None rounds
            nothing.

    Returns:
        Weighted mean, trend, gap and group means; `group_std` of the result is the paper's measure.

    Raises:
        ValueError: If the shapes don't fit, a value isn't finite, a rarity isn't positive, or there are too few visits
            for every group to have one.

    Source: Zhao et al., 2024, sec. 6.1 and Table 4, and `get_grouped_metrics` of the authors' code.

    Examples:
        >>> fairness = rarity_fairness([0.9, 0.8, 0.6], [1.0, 2.0, 3.0], num_groups=2)
        >>> fairness.group_means, round(fairness.gap, 2), fairness.neg_pearson
        ([0.8500000000000001, 0.6], 0.25, 1.0)
    """
    value, weight = _array(score).astype(np.float64), _array(rarity).astype(np.float64)
    if value.ndim != 1 or weight.shape != value.shape:
        raise ValueError(f"expected score (n,) and rarity (n,), got {value.shape} and {weight.shape}")
    if not num_groups >= 2:
        raise ValueError(f"num_groups must be at least 2, got {num_groups!r}")
    if not (np.isfinite(value).all() and np.isfinite(weight).all() and (weight > 0).all()):
        raise ValueError("score must be finite and rarity positive and finite")
    size = value.size // num_groups + 1
    if value.size <= size * (num_groups - 1):
        raise ValueError(f"{value.size} visits are too few for num_groups={num_groups} groups of {size}")
    ordered = value[np.argsort(weight, kind="stable")]
    means = np.array([ordered[start : start + size].mean() for start in range(0, value.size, size)])
    if round_groups is not None:
        means = np.round(means, round_groups)
    position = np.arange(num_groups) - (num_groups - 1) / 2
    centred = means - means.mean()
    covariance, spread = float(centred @ position), float(np.sqrt((centred @ centred) * (position @ position)))
    flat = float(np.ptp(means)) == 0.0
    return Fairness(
        weighted_mean=float(value @ weight / weight.sum()),
        neg_pearson=0.0 if flat else -covariance / spread,
        neg_slope=0.0 if flat else -covariance / float(position @ position),
        gap=float(np.ptp(means)),
        group_means=means.tolist(),
    )


def multilabel_metrics(target: Array, probability: Array, *, threshold: float = 0.5) -> dict[str, float]:
    r"""Metrics of recommended sets, each the mean over the visits.

    A drug is recommended where its probability is at least `threshold` (paper eq. 10: above it). Jaccard is
    $|R\cap Y|/|R\cup Y|$; where both sets are empty it is 0, as are precision, recall and F1 of an empty set (the
    authors' code divides 0 by 0). `prauc` is scikit-learn's average precision, 0 for a visit without medications.

    Args:
        target: Medications given, shape `(B, M)`, 0 or 1.
        probability: Their probabilities, shape `(B, M)`.
        threshold: In (0, 1).

    Returns:
        `jaccard`, `prauc`, `precision`, `recall`, `f1`, and `num_med`, the mean size of the recommended sets.

    Raises:
        ValueError: If the shapes don't fit or are empty, `target` isn't binary, a probability isn't in [0, 1], or
            `threshold` is out of range.

    Source: Zhao et al., 2024, sec. 6.1.

    Examples:
        >>> multilabel_metrics([[1, 1, 0, 0]], [[0.9, 0.2, 0.6, 0.1]])["jaccard"]
        0.3333333333333333
    """
    y, prob = _checked(target, probability, threshold)
    recommended = prob >= threshold
    both = (y & recommended).sum(1)
    size, given = recommended.sum(1), y.sum(1)
    return {
        "jaccard": _mean_ratio(both, size + given - both),
        "prauc": _average_precision(y, prob),
        "precision": _mean_ratio(both, size),
        "recall": _mean_ratio(both, given),
        "f1": _mean_ratio(2 * both, size + given),
        "num_med": float(size.mean()),
    }


def jaccard_per_visit(target: Array, probability: Array, *, threshold: float = 0.5) -> Floats:
    """Jaccard index of each visit, as `multilabel_metrics` averages it.

    Args:
        target: Medications given, shape `(B, M)`, 0 or 1.
        probability: Their probabilities, shape `(B, M)`.
        threshold: In (0, 1).

    Returns:
        float64, shape `(B,)`.

    Raises:
        ValueError: As `multilabel_metrics`.

    Examples:
        >>> jaccard_per_visit([[1, 0], [1, 1]], [[0.9, 0.7], [0.5, 0.5]])
        array([0.5, 1. ])
    """
    y, prob = _checked(target, probability, threshold)
    recommended = prob >= threshold
    return _ratio((y & recommended).sum(1), (y | recommended).sum(1))


def ddi_rate(predictions: Sequence[Sequence[int]], ddi_adj: Array) -> float:
    r"""Share of interacting pairs among all pairs of drugs that were recommended together.

    $$\frac{\sum_v|\{\{j,k\}\subseteq R_v:A_{jk}=1\}|}{\sum_v|R_v|(|R_v|-1)/2}$$

    over all visits at once, as the authors' code; 0 if there is no pair. Rates depend on the matrix: compare them only
    for the same one.

    Args:
        predictions: Medication ids of each visit.
        ddi_adj: Shape `(M, M)`, symmetric, 1 where two drugs interact; its diagonal doesn't count.

    Returns:
        The rate in [0, 1].

    Raises:
        ValueError: If `ddi_adj` isn't square, symmetric and 0/1, or an id is out of range or repeated in a visit.

    Source: `ddi_rate_score` of the authors' code.

    Examples:
        >>> ddi_rate([[0, 1], [0, 2], [1]], [[0, 1, 0], [1, 0, 0], [0, 0, 0]])
        0.5
    """
    adjacency = _checked_ddi(ddi_adj)
    size = adjacency.shape[0]
    chosen = np.zeros((len(predictions), size), dtype=bool)
    for number, ids in enumerate(predictions):
        for drug in ids:
            if not 0 <= drug < size:
                raise ValueError(f"visit {number}: medication id {drug} is out of range, accepted: 0 to {size - 1}")
            if chosen[number, drug]:
                raise ValueError(f"visit {number}: medication id {drug} is repeated")
            chosen[number, drug] = True
    return rate_of_sets(chosen, adjacency)


def rate_of_sets(recommended: NDArray[np.bool_], adjacency: NDArray[Any]) -> float:
    """Interaction rate of sets given as a boolean matrix (B, M); the inputs are taken as valid."""
    chosen = recommended.astype(np.float64)
    off_diagonal = adjacency.astype(np.float64) * (1 - np.eye(adjacency.shape[0]))
    size = chosen.sum(1)
    pairs = float((size * (size - 1)).sum())
    return float(((chosen @ off_diagonal) * chosen).sum()) / pairs if pairs else 0.0


def _checked_ddi(ddi_adj: Array) -> NDArray[Any]:
    import torch

    adjacency = _array(ddi_adj)
    check_ddi(torch.as_tensor(adjacency))
    return adjacency


def _array(x: Array) -> NDArray[Any]:
    detach = getattr(x, "detach", None)
    return np.asarray(x if detach is None else detach().cpu().numpy())


def _checked(target: Array, probability: Array, threshold: float) -> tuple[NDArray[np.bool_], NDArray[Any]]:
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must be between 0 and 1 (both excluded), got {threshold!r}")
    y, prob = _array(target), _array(probability)
    if y.ndim != 2 or y.shape != prob.shape or not y.size:
        raise ValueError(f"expected target (B, M) and probability (B, M), not empty; got {y.shape} and {prob.shape}")
    if not np.isin(y, (0, 1)).all():
        raise ValueError("target must be binary (0 or 1)")
    if not ((prob >= 0) & (prob <= 1)).all():
        raise ValueError("probability must be in [0, 1]")
    return y.astype(bool), prob


def _ratio(part: NDArray[Any], whole: NDArray[Any]) -> Floats:
    """Divide; 0 where the whole is empty."""
    return np.asarray(part / np.maximum(whole, 1), dtype=np.float64)


def _mean_ratio(part: NDArray[Any], whole: NDArray[Any]) -> float:
    return float(_ratio(part, whole).mean())


def _average_precision(y: NDArray[np.bool_], prob: NDArray[Any]) -> float:
    """Mean over the visits; scikit-learn's own value for a row without positives is a warning and 0."""
    from sklearn.metrics import average_precision_score  # type: ignore[import-untyped]

    rows = np.flatnonzero(y.any(1))
    if not rows.size:
        return 0.0
    mean = float(average_precision_score(y[rows], prob[rows], average="samples"))
    return mean * float(rows.size / y.shape[0])
