r"""Statistics over seeds: summary, paired comparison with the baseline, correction for many comparisons.

With three to five seeds no test is powerful. The numbers say so themselves: every comparison carries its n; the Wilcoxon
test cannot fall below $2^{1-n}$ (0.25 at n = 3, 0.0625 at n = 5), hence the paired t-test is what is corrected and
marked, and the bootstrap interval of the mean difference stands beside it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Comparison", "Summary", "bootstrap_interval", "compare_paired", "holm", "summarise"]

ALPHA = 0.05
_EXACT_UP_TO = 6  # 6**6 = 46,656 resamples
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation (n - 1) of n values; `std` is None for one value."""

    n: int
    mean: float
    std: float | None


@dataclass(frozen=True)
class Comparison:
    """Paired comparison of a method with its baseline over the seeds both have.

    Args:
        n: Number of common seeds.
        difference: Mean of method minus baseline.
        low: Lower end of the 95 % bootstrap interval of the mean difference, None for n < 2.
        high: Upper end.
        p_t: Two-sided paired t-test, None when n < 2 or all differences are equal.
        p_wilcoxon: Two-sided Wilcoxon signed-rank test (exact where possible), None when all differences are 0.
        p_holm: `p_t` after Holm's correction within the case, None until corrected.
    """

    n: int
    difference: float
    low: float | None
    high: float | None
    p_t: float | None
    p_wilcoxon: float | None
    p_holm: float | None = None

    def verdict(self, sign: int) -> str:
        """Return "better", "worse", "unclear" or "untested" (fewer than 3 seeds, or no p-value).

        Args:
            sign: +1 when higher values are better, otherwise -1.
        """
        p = self.p_holm if self.p_holm is not None else self.p_t
        if self.n < 3 or p is None:
            return "untested"
        if not p < ALPHA:
            return "unclear"
        return "better" if self.difference * sign > 0 else "worse"


def summarise(values: Sequence[float]) -> Summary:
    """Return n, mean and sample standard deviation.

    Raises:
        ValueError: If `values` is empty.

    Examples:
        >>> summarise([1.0, 2.0, 3.0])
        Summary(n=3, mean=2.0, std=1.0)
    """
    if not len(values):
        raise ValueError("values is empty; at least one is needed")
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Summary(len(values), float(np.mean(values)), std)


def bootstrap_interval(differences: Sequence[float], *, level: float = 0.95) -> tuple[float, float] | None:
    """Return the percentile bootstrap interval of the mean of paired differences.

    All n^n resamples are enumerated up to n = 6 (exact, no randomness); beyond that 10,000 are drawn with a fixed seed.

    Args:
        differences: One difference per seed.
        level: Coverage, in (0, 1).

    Returns:
        Lower and upper end, or None for fewer than two differences.

    Examples:
        >>> bootstrap_interval([1.0, 1.0, 1.0])
        (1.0, 1.0)
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level!r}")
    n = len(differences)
    if n < 2:
        return None
    values = np.asarray(differences, dtype=float)
    if n <= _EXACT_UP_TO:
        index = np.array(list(itertools.product(range(n), repeat=n)))
    else:
        index = np.random.default_rng(0).integers(0, n, size=(_RESAMPLES, n))
    means = values[index].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def compare_paired(method: Mapping[int, float], baseline: Mapping[int, float]) -> Comparison | None:
    """Compare a method with the baseline over their common seeds.

    Args:
        method: Value per seed.
        baseline: Value per seed.

    Returns:
        The comparison, or None when no seed is common.
    """
    seeds = sorted(method.keys() & baseline.keys())
    if not seeds:
        return None
    differences = np.array([method[seed] - baseline[seed] for seed in seeds])
    low, high = bootstrap_interval(differences.tolist()) or (None, None)
    return Comparison(len(seeds), float(differences.mean()), low, high, _t_test(differences), _wilcoxon(differences))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return Holm's step-down adjusted p-values, None where there was none (and not counted).

    Examples:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, index) in enumerate(order):
        highest = max(highest, min(1.0, p * (len(order) - rank)))
        adjusted[index] = highest
    return adjusted


def _t_test(differences: np.ndarray) -> float | None:
    n = len(differences)
    spread = float(np.std(differences, ddof=1)) if n > 1 else 0.0
    # Differences equal up to rounding have no variance to test against.
    if n < 2 or spread <= 1e-12 * max(1e-300, float(np.abs(differences).max())):
        return None
    from scipy.special import stdtr  # type: ignore[import-untyped]

    t = abs(float(differences.mean())) / (spread / math.sqrt(n))
    return float(2 * stdtr(n - 1, -t))


def _wilcoxon(differences: np.ndarray) -> float | None:
    if not np.any(differences):
        return None
    from scipy.stats import wilcoxon  # type: ignore[import-untyped]

    tied = len(np.unique(np.abs(differences))) < len(differences) or bool(np.any(differences == 0))
    method = "approx" if tied and len(differences) > 10 else "exact"
    return float(wilcoxon(differences, method=method).pvalue)
