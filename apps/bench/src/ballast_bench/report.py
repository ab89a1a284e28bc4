"""The report: one HTML file that needs nothing else, light and dark, with sortable tables and drawn plots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ballast_bench import formats, plots
from ballast_bench.aggregate import CaseResult, aggregate
from ballast_bench.store import Store, write_atomic

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ballast_bench.store import Record

__all__ = ["Section", "render", "write_report"]


@dataclass(frozen=True)
class Section:
    """One heading of the report: a case, or all cases of a sweep."""

    anchor: str
    title: str
    cases: list[CaseResult]
    sweep: str | None


def write_report(store: Store, target: Path | None = None) -> tuple[Path, list[CaseResult]]:
    """Write the HTML report of a store and return its path and the results shown.

    Args:
        store: The results store.
        target: File to write; `report.html` in the store when None.
    """
    records = store.latest()
    results = aggregate(records)
    path = target or store.path / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, render(results, records, title=store.path.resolve().name, unreadable=store.unreadable))
    return path, results


def render(
    results: Sequence[CaseResult], records: Sequence[Record], *, title: str, unreadable: Sequence[tuple[Path, str]] = ()
) -> str:
    """Return the report as HTML text.

    Args:
        results: Aggregated cases.
        records: The records they come from.
        title: Name of the run.
        unreadable: Damaged records, listed with their reasons.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ballast_bench"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    palette = _palette(results)
    template = environment.get_template("report.html.j2")
    return template.render(
        title=title,
        sections=_sections(results),
        tiles=_tiles(results, records),
        troubles=[trouble for case in results for trouble in case.troubles],
        unreadable=[(str(path), why) for path, why in unreadable],
        machine=_machine(records),
        palette=palette,
        plots=plots,
        f=formats,
    )


def _palette(results: Sequence[CaseResult]) -> dict[str, int]:
    """Give every method one colour for the whole page, in the order of first appearance."""
    names = dict.fromkeys(method.name for case in results for method in case.methods)
    return {name: index % plots.COLOURS for index, name in enumerate(names)}


def _sections(results: Sequence[CaseResult]) -> list[Section]:
    groups: dict[str, list[CaseResult]] = {}
    for case in results:
        key = case.id if case.sweep is None else f"{case.id.split('/', 1)[0]}/{case.sweep.group}"
        groups.setdefault(key, []).append(case)
    sections = []
    for index, cases in enumerate(groups.values()):
        ordered = sorted(cases, key=lambda case: case.sweep.x if case.sweep else 0.0)
        label = ordered[0].sweep.label if ordered[0].sweep else None
        sections.append(Section(f"s{index}", ordered[0].title, ordered, label))
    return sections


def _tiles(results: Sequence[CaseResult], records: Sequence[Record]) -> list[tuple[str, str]]:
    ok = [record for record in records if record.status == "ok"]
    failed = sum(record.status in ("failed", "timeout") for record in records)
    skipped = sum(record.status == "skipped" for record in records)
    busy = sum(record.train_info["process_seconds"] for record in records)
    methods = {method.name for case in results for method in case.methods}
    peak = max((record.train_info["peak_mib"] or 0.0 for record in ok), default=0.0)
    tiles = [
        (str(len(ok)), "cells measured"),
        (str(len(results)), "cases"),
        (str(len(methods)), "methods"),
        (f"{busy / 60:.1f} min", "process time"),
        (f"{peak:.0f} MiB", "largest peak memory"),
    ]
    if failed:
        tiles.append((str(failed), "failed"))
    if skipped:
        tiles.append((str(skipped), "skipped"))
    return tiles


def _machine(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Return facts about where the records come from, all distinct values of each."""

    def distinct(values: list[Any]) -> str:
        return "; ".join(dict.fromkeys(str(value) for value in values if value is not None)) or "unknown"

    metas = [record.meta_info for record in records]
    packages = [", ".join(f"{name} {version}" for name, version in meta["packages"].items()) for meta in metas]
    commits = [meta["commit"] and meta["commit"][:12] + (" + local changes" if meta["dirty"] else "") for meta in metas]
    return [
        ("command", distinct([record.run_info["command"] or None for record in records])),
        ("commit", distinct(commits)),
        ("packages", distinct(packages)),
        ("python", distinct([meta["python"] for meta in metas])),
        ("machine", distinct([f"{meta['processor']}, {meta['cpu_count']} CPUs, {meta['platform']}" for meta in metas])),
        ("device", distinct([meta["device"] for meta in metas])),
        ("finished", distinct([max((record.finished for record in records), default=None)])),
    ]
