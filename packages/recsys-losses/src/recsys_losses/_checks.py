"""Argument checks and reductions shared by the loss functions.

Checks look at shapes, dtypes and Python numbers only, so that none of them waits for a GPU.
"""

from __future__ import annotations

import difflib
import math
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor

Reduction = Literal["none", "mean", "sum"]
Similarity = Literal["cosine", "dot"]

REDUCTIONS = ("none", "mean", "sum")
SIMILARITIES = ("cosine", "dot")


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a positive finite number."""
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")


def check_finite(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a finite number."""
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")


def check_choice(name: str, value: str, accepted: Collection[str]) -> None:
    """Raise ValueError unless `value` is one of `accepted`; the message lists them and names the nearest."""
    if value in accepted:
        return
    nearest = difflib.get_close_matches(str(value), list(accepted), n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"unknown {name} {value!r}; accepted: {', '.join(sorted(accepted))}{hint}")


def check_reduction(reduction: str) -> None:
    """Raise ValueError unless `reduction` is "none", "mean" or "sum"."""
    check_choice("reduction", reduction, REDUCTIONS)


def check_scores(pos_score: Tensor, neg_scores: Tensor) -> None:
    """Raise ValueError unless `pos_score` is (B,) and `neg_scores` (B, N) with B, N >= 1."""
    if pos_score.ndim != 1 or neg_scores.ndim != 2 or neg_scores.shape[0] != pos_score.shape[0]:
        raise ValueError(
            f"expected pos_score (B,) and neg_scores (B, N), got {tuple(pos_score.shape)} and {tuple(neg_scores.shape)}"
        )
    if pos_score.shape[0] == 0:
        raise ValueError("empty batch: pos_score has no rows")
    if neg_scores.shape[1] == 0:
        raise ValueError("neg_scores has no columns; at least one negative per row is needed")


def upcast(x: Tensor) -> Tensor:
    """Return `x` in float32 when it is half precision, unchanged otherwise."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def reduce(loss: Tensor, reduction: Reduction, dtype: torch.dtype) -> Tensor:
    """Reduce the per-row loss (B,) in its own precision and return it as `dtype`."""
    if reduction == "mean":
        loss = loss.mean()
    elif reduction == "sum":
        loss = loss.sum()
    return loss.to(dtype)
