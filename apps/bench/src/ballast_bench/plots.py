"""Plots as inline SVG whose colours are CSS variables, so that one drawing serves the light and the dark page."""

from __future__ import annotations

import functools
import io
import re
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

from ballast_bench.aggregate import mean_curve

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ballast_bench.aggregate import CaseResult
    from ballast_bench.case import Metric

__all__ = ["COLOURS", "bars", "curves", "sweep", "tradeoff"]

COLOURS = 10
_FOREGROUND, _GRID, _MUTED = "#0a0b01", "#0a0b02", "#0a0b03"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ballast-bench",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _FOREGROUND,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.titlecolor": _FOREGROUND,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 2,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
_MARKERS = "osD^vPX*<>"
_P = ParamSpec("_P")


def _styled(draw: Callable[_P, str | None]) -> Callable[_P, str | None]:
    @functools.wraps(draw)
    def drawn(*args: _P.args, **kwargs: _P.kwargs) -> str | None:
        import matplotlib as mpl

        with mpl.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return drawn


@_styled
def bars(case: CaseResult, palette: dict[str, int]) -> str | None:
    """Draw the tested metrics per method: bar = mean, whisker = standard deviation, dots = seeds, diamond = others."""
    metrics = [metric for metric in case.metrics if metric.tested][:3]
    methods = case.results[::-1]
    if not methods or not metrics:
        return None
    figure, axes = _figure(len(metrics), width=11, height=0.8 + 0.3 * len(methods), sharey=True)
    for axis, metric in zip(axes, metrics, strict=True):
        for row, method in enumerate(methods):
            summary = method.summary(metric.name)
            if summary is None:
                continue
            colour = _colour(palette[method.name])
            axis.barh(row, summary.mean, height=0.62, color=colour, alpha=0.85)
            if summary.std:
                axis.errorbar(summary.mean, row, xerr=summary.std, color=_FOREGROUND, linewidth=1.2, capsize=3)
            values = list(method.values[metric.name].values())
            if 1 < len(values) <= 10:
                axis.plot(values, [row] * len(values), "o", color=_FOREGROUND, markersize=2.6, alpha=0.55)
            for other in case.published_for(method.name, metric.name):
                axis.plot(other.value, row, "D", markersize=6, markerfacecolor="none", color=_FOREGROUND)
        axis.set_yticks(range(len(methods)), [method.name for method in methods], color=_FOREGROUND)
        axis.set_title(_heading(metric))
        axis.grid(visible=False, axis="y")
        axis.spines["left"].set_visible(False)
        axis.set_xlim(left=min(0.0, axis.get_xlim()[0]))
    return _svg(figure, f"{case.title}: {', '.join(metric.name for metric in metrics)} per method")


@_styled
def curves(case: CaseResult, palette: dict[str, int]) -> str | None:
    """Draw the first metric against epochs and against training time, mean over seeds."""
    metric = case.metrics[0]
    drawn = [(method, curve) for method in case.results if len(curve := mean_curve(method, metric.name)) > 1]
    if not drawn:
        return None
    timed = all(second > 0 for _, curve in drawn for _, second, _ in curve)
    figure, axes = _figure(2 if timed else 1, width=6.7 if timed else 5.4, height=3.7, sharey=True)
    for place, (method, curve) in enumerate(drawn):
        epoch, seconds, value = (np.array(column) for column in zip(*curve, strict=True))
        style = _line(palette[method.name], place)
        axes[0].plot(epoch, value, label=method.name, **style)
        if timed:
            axes[1].plot(seconds, value, **style)
    axes[0].set_xlabel("epoch")
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_title(f"{metric.label or metric.name} while training")
    if timed:
        _seconds_axis(axes[1])
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(drawn)), fontsize=9
    )
    return _svg(figure, f"{case.title}: learning curves of {metric.name}")


@_styled
def tradeoff(case: CaseResult, palette: dict[str, int]) -> str | None:
    """Draw two metrics against each other, one point with whiskers per method."""
    if case.tradeoff is None:
        return None
    named = {metric.name: metric for metric in case.metrics}
    across, up = (named[name] for name in case.tradeoff)
    points = [
        (method, x, y)
        for method in case.results
        if (x := method.summary(across.name)) is not None and (y := method.summary(up.name)) is not None
    ]
    if len(points) < 2:
        return None
    figure, (axis,) = _figure(1, width=4.8, height=3.7)
    for place, (method, x, y) in enumerate(points):
        colour = _colour(palette[method.name])
        axis.errorbar(x.mean, y.mean, xerr=x.std, yerr=y.std, color=colour, linewidth=1, alpha=0.6)
        axis.plot(x.mean, y.mean, _MARKERS[place % len(_MARKERS)], color=colour, markersize=8, label=method.name)
    axis.margins(0.12)
    axis.set_xlabel(_heading(across))
    axis.set_ylabel(_heading(up))
    corner = ("upper" if up.sign > 0 else "lower") + (" right" if across.sign > 0 else " left")
    axis.set_title(f"trade-off: {corner} is better")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=min(3, len(points)), fontsize=9)
    return _svg(figure, f"{case.title}: {up.name} against {across.name}")


@_styled
def sweep(cases: Sequence[CaseResult], palette: dict[str, int]) -> str | None:
    """Draw the tested metrics of the cases of one sweep against the position of the case."""
    ordered = sorted((case for case in cases if case.sweep is not None), key=lambda case: case.sweep.x)  # type: ignore[union-attr]
    if len(ordered) < 2 or ordered[0].sweep is None:
        return None
    metrics = [metric for metric in ordered[0].metrics if metric.tested][:3]
    names = list(dict.fromkeys(method.name for case in ordered for method in case.results))
    figure, axes = _figure(len(metrics), width=11, height=3.5)
    for axis, metric in zip(axes, metrics, strict=True):
        for place, name in enumerate(names):
            points = [
                (case.sweep.x, summary.mean, summary.std or 0.0)
                for case in ordered
                if case.sweep and (method := case.method(name)) and (summary := method.summary(metric.name))
            ]
            x, mean, std = (np.array(column) for column in zip(*points, strict=True))
            colour = _colour(palette[name])
            axis.plot(x, mean, label=name, marker=_MARKERS[place % len(_MARKERS)], color=colour)
            axis.fill_between(x, mean - std, mean + std, color=colour, alpha=0.16, linewidth=0)
        axis.set_title(_heading(metric))
        axis.set_xlabel(ordered[0].sweep.label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(5, len(names)))
    return _svg(
        figure, f"{ordered[0].title}: {', '.join(metric.name for metric in metrics)} over {ordered[0].sweep.label}"
    )


def _figure(columns: int, *, width: float, height: float, sharey: bool = False) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, sharey=sharey, squeeze=False)[0]


def _seconds_axis(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda second, _: f"{second:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("training seconds, log scale")
    axis.set_title("the same against cost")


def _svg(figure: Any, label: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = text.replace("<svg", f'<svg role="img" aria-label="{_attribute(label)}"', 1)
    text = text.replace(_FOREGROUND, "var(--fg)").replace(_GRID, "var(--grid)").replace(_MUTED, "var(--muted)")
    return re.sub(r"#0c0d([0-9a-f]{2})", lambda match: f"var(--c{int(match[1], 16)})", text)


def _colour(index: int) -> str:
    return f"#0c0d{index % COLOURS:02x}"


def _line(index: int, place: int) -> dict[str, Any]:
    return {"color": _colour(index), "marker": _MARKERS[place % len(_MARKERS)], "markersize": 4}


def _heading(metric: Metric) -> str:
    return f"{metric.label or metric.name} {'↑' if metric.sign > 0 else '↓'}"


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
