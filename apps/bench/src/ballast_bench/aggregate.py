"""From records to comparisons: one `CaseResult` per case, with statistics per method and metric."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ballast_bench.case import Metric, Published, Sweep
from ballast_bench.stats import Comparison, Summary, compare_paired, holm, summarise

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ballast_bench.store import Record

__all__ = ["CaseResult", "MethodResult", "Trouble", "aggregate", "mean_curve"]


@dataclass(frozen=True)
class Trouble:
    """A cell without a figure: failed, over its budget, or skipped."""

    case: str
    method: str
    seed: int
    status: str
    reason: str


@dataclass
class MethodResult:
    """What a method of a case reached.

    Args:
        name: The method.
        settings: Its settings (of the newest record).
        values: Per metric, the value per seed.
        records: The successful records, by seed.
    """

    name: str
    settings: dict[str, Any]
    values: dict[str, dict[int, float]] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    comparisons: dict[str, Comparison] = field(default_factory=dict)

    def summary(self, metric: str) -> Summary | None:
        """Return n, mean and std of a metric, None when no seed has it."""
        values = self.values.get(metric)
        return summarise([values[seed] for seed in sorted(values)]) if values else None

    def mean(self, field_name: str) -> float | None:
        """Return the mean over seeds of a measured field such as "seconds" or "peak_mib"."""
        values = [v for record in self.records if (v := record.train_info[field_name]) is not None]
        return float(np.mean(values)) if values else None


@dataclass
class CaseResult:
    """A case with the results of its methods."""

    id: str
    title: str
    dataset: str
    note: str
    baseline: str
    metrics: tuple[Metric, ...]
    methods: list[MethodResult]
    published: tuple[Published, ...]
    sweep: Sweep | None
    tradeoff: tuple[str, str] | None
    seeds: tuple[int, ...]
    troubles: list[Trouble]

    @property
    def results(self) -> list[MethodResult]:
        """The methods that have at least one figure."""
        return [method for method in self.methods if method.records]

    def method(self, name: str) -> MethodResult | None:
        """Return a method by name."""
        return next((method for method in self.methods if method.name == name), None)

    def best(self, metric: Metric) -> str | None:
        """Return the method with the best mean."""
        means = {m.name: s.mean for m in self.methods if (s := m.summary(metric.name)) is not None}
        return max(means, key=lambda name: metric.sign * means[name]) if means else None

    def published_for(self, method: str, metric: str) -> list[Published]:
        """Return the figures of others for a method and metric."""
        return [figure for figure in self.published if (figure.method, figure.metric) == (method, metric)]


def aggregate(records: Iterable[Record]) -> list[CaseResult]:
    """Group records (one per case, method and seed, as `Store.latest` gives them) into cases with statistics.

    Cases and methods keep the order of the suite. Within a case, the p-values of all methods and tested metrics are
    corrected together (Holm).
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.cell[0], []).append(record)
    results = [_case(group) for group in groups.values()]
    place = {name: (group[-1].run_info["case_order"], name) for name, group in groups.items()}
    return sorted(results, key=lambda result: place[result.id])


def mean_curve(method: MethodResult, metric: str) -> list[tuple[float, float, float]]:
    """Return (epoch, seconds, metric) averaged over the seeds, at the epochs that every seed has."""
    curves = []
    for record in method.records:
        rows = {row["epoch"]: row for row in record.train_info["history"] if "epoch" in row and metric in row}
        if rows:
            curves.append(rows)
    if not curves:
        return []
    common = sorted(set.intersection(*(set(rows) for rows in curves)))
    return [
        (
            epoch,
            float(np.mean([rows[epoch].get("seconds", 0.0) for rows in curves])),
            float(np.mean([rows[epoch][metric] for rows in curves])),
        )
        for epoch in common
    ]


def _case(records: Sequence[Record]) -> CaseResult:
    newest = max(records, key=lambda record: record.finished)
    info = newest.run_info["case"]
    metrics = tuple(Metric(**metric) for metric in info["metrics"])
    methods: dict[str, MethodResult] = {}
    troubles = []
    ordered = sorted(records, key=lambda r: (r.run_info["method_order"], r.run_info["method"], r.run_info["seed"]))
    for record in ordered:
        name, seed = record.run_info["method"], record.run_info["seed"]
        method = methods.setdefault(name, MethodResult(name, dict(record.run_info["settings"])))
        if record.status != "ok":
            reason = record.train_info["error"] or "no reason recorded"
            troubles.append(Trouble(info["id"], name, seed, record.status, reason))
            continue
        method.records.append(record)
        for metric, value in record.train_info["metrics"].items():
            method.values.setdefault(metric, {})[seed] = value
    result = CaseResult(
        id=info["id"],
        title=info["title"],
        dataset=info["dataset"],
        note=info["note"],
        baseline=info["baseline"],
        metrics=metrics,
        methods=list(methods.values()),
        published=tuple(Published(**figure) for figure in info["published"]),
        sweep=Sweep(**info["sweep"]) if info["sweep"] else None,
        tradeoff=tuple(info["tradeoff"]) if info["tradeoff"] else None,
        seeds=tuple(sorted({record.run_info["seed"] for record in records})),
        troubles=troubles,
    )
    _compare_with_baseline(result)
    return result


def _compare_with_baseline(case: CaseResult) -> None:
    baseline = case.method(case.baseline)
    if baseline is None:
        return
    tested: list[tuple[MethodResult, str]] = []
    for method in case.results:
        for metric in case.metrics:
            ours, theirs = method.values.get(metric.name), baseline.values.get(metric.name)
            if method is baseline or not ours or not theirs:
                continue
            comparison = compare_paired(ours, theirs)
            if comparison is None:
                continue
            method.comparisons[metric.name] = comparison
            if metric.tested:
                tested.append((method, metric.name))
    adjusted = holm([method.comparisons[name].p_t for method, name in tested])
    for (method, name), p in zip(tested, adjusted, strict=True):
        method.comparisons[name] = dataclasses.replace(method.comparisons[name], p_holm=p)
