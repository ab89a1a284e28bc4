"""What changed between two results stores, with regressions marked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ballast_bench.stats import Summary, compare_paired

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ballast_bench.aggregate import CaseResult, MethodResult
    from ballast_bench.case import Metric

__all__ = ["Change", "Difference", "compare"]


@dataclass(frozen=True)
class Change:
    """One metric of one method of one case in two stores.

    `verdict` is "regression" or "improvement" when the mean moved by more than the metric's tolerance and, with two
    common seeds or more, the 95 % bootstrap interval of the paired difference leaves out 0; otherwise "same".
    """

    case: str
    method: str
    metric: Metric
    before: Summary
    after: Summary
    low: float | None
    high: float | None
    verdict: Literal["regression", "improvement", "same"]


@dataclass(frozen=True)
class Difference:
    """All changes, the methods that only one store has ("case/method"), and those whose settings differ."""

    changes: list[Change]
    only_before: list[str]
    only_after: list[str]
    settings: list[str]

    @property
    def regressions(self) -> list[Change]:
        """The changes for the worse."""
        return [change for change in self.changes if change.verdict == "regression"]


def compare(before: Sequence[CaseResult], after: Sequence[CaseResult]) -> Difference:
    """Compare the results of two stores.

    Args:
        before: Results of the first store.
        after: Results of the second; its metrics' directions and tolerances are used.
    """
    old = {(case.id, method.name): method for case in before for method in case.results}
    new = {(case.id, method.name): (case, method) for case in after for method in case.results}
    common = [key for key in new if key in old]
    changes = [change for key in common for change in _changes(old[key], *new[key])]
    settings = ["/".join(key) for key in common if old[key].settings != new[key][1].settings]
    only_before = ["/".join(key) for key in old if key not in new]
    only_after = ["/".join(key) for key in new if key not in old]
    return Difference(changes, only_before, only_after, settings)


def _changes(old: MethodResult, case: CaseResult, new: MethodResult) -> list[Change]:
    changes = []
    for metric in case.metrics:
        before, after = old.summary(metric.name), new.summary(metric.name)
        if before is None or after is None:
            continue
        paired = compare_paired(new.values[metric.name], old.values[metric.name])
        low, high = (paired.low, paired.high) if paired else (None, None)
        verdict = _verdict(metric, before.mean, after.mean, low, high)
        changes.append(Change(case.id, new.name, metric, before, after, low, high, verdict))
    return changes


def _verdict(
    metric: Metric, before: float, after: float, low: float | None, high: float | None
) -> Literal["regression", "improvement", "same"]:
    if abs(after - before) <= metric.tolerance * abs(before):
        return "same"
    if low is not None and high is not None and low <= 0 <= high:
        return "same"
    return "improvement" if (after - before) * metric.sign > 0 else "regression"
