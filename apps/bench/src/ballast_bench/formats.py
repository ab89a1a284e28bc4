"""Numbers as text, the same in the terminal, in HTML and in messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ballast_bench.case import Metric
    from ballast_bench.stats import Summary

__all__ = ["mean_std", "number", "p_value", "relative"]


def number(value: float | None, digits: int = 4) -> str:
    """Return `value` with fixed decimals, a dash for None.

    Examples:
        >>> number(0.12345), number(None)
        ('0.1235', '–')
    """
    return "–" if value is None else f"{value:.{digits}f}"


def mean_std(summary: Summary | None, metric: Metric) -> str:
    """Return "mean ± std", or the value alone for one seed."""
    if summary is None:
        return "–"
    text = number(summary.mean, metric.digits)
    return text if summary.std is None else f"{text} ± {number(summary.std, metric.digits)}"


def relative(value: float, base: float) -> str:
    """Return the relative difference in percent with its sign.

    Examples:
        >>> relative(1.1, 1.0), relative(1.0, 0.0)
        ('+10.0 %', '–')
    """
    return "–" if base == 0 else f"{100 * (value - base) / abs(base):+.1f} %"


def p_value(p: float | None) -> str:
    """Return a p-value with three decimals, "<0.001" below that.

    Examples:
        >>> p_value(0.0004), p_value(0.25), p_value(None)
        ('<0.001', '0.250', '–')
    """
    if p is None:
        return "–"
    return "<0.001" if p < 0.001 else f"{p:.3f}"
