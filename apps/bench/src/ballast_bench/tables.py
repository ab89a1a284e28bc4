"""The results as tables for a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ballast_bench.formats import mean_std, number, relative

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ballast_bench.aggregate import CaseResult, MethodResult
    from ballast_bench.case import Metric

__all__ = ["console", "print_results"]

_MARKS = {"better": " [green]▲[/]", "worse": " [red]▼[/]"}


def console() -> Console:
    """Return a console on standard output; 120 columns where it is not a terminal."""
    return Console() if sys.stdout.isatty() else Console(width=120)


def print_results(results: Sequence[CaseResult], out: Console) -> None:
    """Print one table per case, then the cells without a figure."""
    for case in results:
        out.print(_table(case))
        if case.published:
            out.print(_published(case))
    if any(case.results for case in results):
        out.print(
            "[dim]mean ± standard deviation over seeds; bold: best mean; ▲ better, ▼ worse than the baseline "
            "(paired t-test over seeds, Holm-corrected within the case, p < 0.05)[/]"
        )
    troubles = [trouble for case in results for trouble in case.troubles]
    for trouble in troubles:
        last = trouble.reason.strip().splitlines()[-1] if trouble.reason.strip() else ""
        label = escape(f"{trouble.case}/{trouble.method}/{trouble.seed}")
        out.print(f"[yellow]{trouble.status}[/] {label}: {escape(last)}")


def _table(case: CaseResult) -> Table:
    seeds = f"{len(case.seeds)} seed{'s' if len(case.seeds) != 1 else ''}"
    title = f"{case.title}  [dim]{case.id} · {case.dataset} · {seeds}[/]"
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    table.add_column("method")
    for metric in case.metrics:
        arrow = "↑" if metric.better == "higher" else "↓"
        table.add_column(f"{metric.label or metric.name} {arrow}", justify="right")
    table.add_column(f"vs {case.baseline}", justify="right")
    best = {metric.name: case.best(metric) for metric in case.metrics}
    for method in case.methods:
        cells = [_cell(method, metric, best=best[metric.name] == method.name) for metric in case.metrics]
        table.add_row(escape(method.name), *cells, _versus(case, method))
    return table


def _cell(method: MethodResult, metric: Metric, *, best: bool) -> str:
    text = mean_std(method.summary(metric.name), metric)
    comparison = method.comparisons.get(metric.name)
    mark = _MARKS.get(comparison.verdict(metric.sign), "") if comparison and metric.tested else ""
    return f"[bold]{text}[/]{mark}" if best else f"{text}{mark}"


def _versus(case: CaseResult, method: MethodResult) -> str:
    first = case.metrics[0].name
    baseline = case.method(case.baseline)
    ours, theirs = method.summary(first), baseline.summary(first) if baseline else None
    if method.name == case.baseline:
        return "[dim]baseline[/]"
    return "–" if ours is None or theirs is None else relative(ours.mean, theirs.mean)


def _published(case: CaseResult) -> Table:
    table = Table(title="[dim]beside figures of others[/]", title_justify="left", show_edge=False, pad_edge=False)
    for heading in ("method", "metric", "ours", "theirs", "difference", "source"):
        table.add_column(heading, justify="left" if heading in ("method", "metric", "source") else "right")
    digits = {metric.name: metric.digits for metric in case.metrics}
    for figure in case.published:
        method = case.method(figure.method)
        ours = method.summary(figure.metric) if method else None
        table.add_row(
            escape(figure.method),
            escape(figure.metric),
            number(ours.mean if ours else None, digits.get(figure.metric, 4)),
            number(figure.value, digits.get(figure.metric, 4)),
            "–" if ours is None else relative(ours.mean, figure.value),
            escape(figure.source),
        )
    return table
