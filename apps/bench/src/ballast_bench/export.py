"""The committed form of a run: compact, ordered, the same bytes for the same store."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from ballast_bench.aggregate import aggregate, mean_curve
from ballast_bench.store import SCHEMA, Store, write_atomic

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ballast_bench.aggregate import CaseResult, MethodResult
    from ballast_bench.store import Record

__all__ = ["export_json", "to_json"]

_DIGITS = 6


def export_json(store: Store, target: Path) -> None:
    """Write the newest results of `store` to `target` as JSON (see `to_json`)."""
    records = store.latest()
    target.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(to_json(aggregate(records), records), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(target, text + "\n")


def to_json(results: Sequence[CaseResult], records: Sequence[Record]) -> dict[str, Any]:
    """Return results as JSON values: environment, commands, and per case the methods with values per seed.

    Numbers are rounded to 6 significant digits. Cases and methods keep the order of the suite, seeds ascend.

    Args:
        results: Aggregated cases.
        records: The records they come from, for the environment.
    """
    return {
        "schema": SCHEMA,
        "commands": sorted({record.run_info["command"] for record in records if record.run_info["command"]}),
        "finished": max((record.finished for record in records), default=None),
        "environments": _environments(records),
        "cases": [_case(result) for result in results],
    }


def _environments(records: Sequence[Record]) -> list[dict[str, Any]]:
    distinct = {}
    for record in records:
        meta = {name: value for name, value in record.meta_info.items() if name != "data_sha256"}
        distinct[json.dumps(meta, sort_keys=True)] = meta
    return [distinct[text] for text in sorted(distinct)]


def _case(result: CaseResult) -> dict[str, Any]:
    hashes = {r.meta_info.get("data_sha256") for method in result.results for r in method.records} - {None}
    return {
        "id": result.id,
        "title": result.title,
        "dataset": result.dataset,
        "data_sha256": sorted(hashes),
        "note": result.note,
        "baseline": result.baseline,
        "sweep": dataclasses.asdict(result.sweep) if result.sweep else None,
        "seeds": list(result.seeds),
        "metrics": [dataclasses.asdict(metric) for metric in result.metrics],
        "methods": [_method(result, method) for method in result.methods],
        "published": [dataclasses.asdict(figure) for figure in result.published],
        "without_figure": [
            {**dataclasses.asdict(trouble), "reason": trouble.reason.strip().splitlines()[-1]}
            for trouble in result.troubles
        ],
    }


def _method(case: CaseResult, method: MethodResult) -> dict[str, Any]:
    metrics = {}
    for metric in case.metrics:
        summary = method.summary(metric.name)
        if summary is None:
            continue
        comparison = method.comparisons.get(metric.name)
        versus = None
        if comparison is not None:
            numbers = {name: _short(value) for name, value in dataclasses.asdict(comparison).items()}
            versus = {**numbers, "verdict": comparison.verdict(metric.sign) if metric.tested else "not tested"}
        metrics[metric.name] = {
            "mean": _short(summary.mean),
            "std": _short(summary.std),
            "n": summary.n,
            "values": {str(seed): _short(value) for seed, value in sorted(method.values[metric.name].items())},
            "versus_baseline": versus,
        }
    return {
        "name": method.name,
        "settings": method.settings,
        "metrics": metrics,
        "cell_seconds": _short(method.mean("process_seconds")),
        "peak_mib": _short(method.mean("peak_mib")),
        "curve": [[_short(value) for value in point] for point in mean_curve(method, case.metrics[0].name)],
    }


def _short(value: float | None) -> float | int | None:
    if value is None or isinstance(value, int):
        return value
    return float(f"{value:.{_DIGITS}g}")
