"""Argument checks shared by the modules of this package; they look at shapes, dtypes and Python numbers only."""

from __future__ import annotations

import difflib
import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a positive finite number."""
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")


def check_not_negative(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a finite number of at least 0."""
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")


def check_finite(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a finite number."""
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")


def check_fraction(name: str, value: float) -> None:
    """Raise ValueError unless `value` is in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")


def check_below_one(name: str, value: float) -> None:
    """Raise ValueError unless `value` is in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}")


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raise ValueError unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


def check_choice(name: str, value: object, accepted: Collection[str]) -> None:
    """Raise ValueError unless `value` is one of `accepted`; the message proposes the nearest."""
    if value in accepted:
        return
    near = difflib.get_close_matches(str(value), accepted, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} must be one of {', '.join(map(repr, sorted(accepted)))}, got {value!r}{hint}")


def check_label_smoothing(value: float) -> None:
    """Raise ValueError unless `label_smoothing` is in [0, 0.5)."""
    if not 0 <= value < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {value!r}")


def check_pairs(**logps: Tensor) -> None:
    """Raise ValueError unless all of `logps` are floating, one-dimensional, of one length, and not empty."""
    first, reference = next(iter(logps.items()))
    for name, value in logps.items():
        _check_float(name, value)
        if value.ndim != 1:
            raise ValueError(f"{name}: expected 1-D per-sequence log-probabilities, got shape {tuple(value.shape)}")
        if value.shape != reference.shape:
            raise ValueError(
                f"{first} and {name} must have the same shape, got {tuple(reference.shape)} and {tuple(value.shape)}"
            )
    if reference.numel() == 0:
        raise ValueError(f"{first}: empty batch")


def check_lists(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
) -> None:
    """Raise ValueError unless the chosen are [B] and the rejected [B, K], with B and K of at least 1."""
    for suffix, chosen, rejected in (
        ("", chosen_logps, rejected_logps),
        ("ref_", ref_chosen_logps, ref_rejected_logps),
    ):
        if chosen is None or rejected is None:
            continue
        check_pairs(**{f"{suffix}chosen_logps": chosen})
        _check_float(f"{suffix}rejected_logps", rejected)
        if rejected.ndim != 2 or len(rejected) != len(chosen) or rejected.shape[1] == 0:
            raise ValueError(
                f"{suffix}rejected_logps must have shape [B, K] with B = {len(chosen)} and K >= 1, "
                f"got {tuple(rejected.shape)}"
            )
    if (
        ref_chosen_logps is not None
        and ref_rejected_logps is not None
        and ref_rejected_logps.shape != rejected_logps.shape
    ):
        raise ValueError(
            "rejected_logps and ref_rejected_logps must have the same shape, "
            f"got {tuple(rejected_logps.shape)} and {tuple(ref_rejected_logps.shape)}"
        )


def _check_float(name: str, value: Tensor) -> None:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"{name} must be a floating-point tensor, got {kind}")
