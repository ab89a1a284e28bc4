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
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")


def check_not_negative(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a finite number of at least 0."""
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")


def check_fraction(name: str, value: float) -> None:
    """Raise ValueError unless `value` is in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raise ValueError unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


def check_choice(name: str, value: str, accepted: Collection[str]) -> None:
    """Raise ValueError unless `value` is one of `accepted`; the message lists them and names the nearest."""
    if value in accepted:
        return
    nearest = difflib.get_close_matches(str(value), list(accepted), n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"unknown {name} {value!r}; accepted: {', '.join(sorted(accepted))}{hint}")


def check_matrix(name: str, value: Tensor, columns: int | None = None) -> None:
    """Raise ValueError unless `value` is a float matrix, with `columns` columns if given."""
    wanted = f"[rows, {'columns' if columns is None else columns}]"
    if value.ndim != 2 or (columns is not None and value.shape[1] != columns):
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(value.shape)}")
    if not value.is_floating_point():
        raise ValueError(f"{name} must be a float tensor, got {value.dtype}")


def check_edges(edge_index: Tensor, edge_weight: Tensor | None = None) -> None:
    """Raise ValueError unless `edge_index` is an integer (2, m) tensor and `edge_weight` has one entry per edge."""
    if edge_index.ndim != 2 or edge_index.shape[0] != 2 or edge_index.dtype != torch.int64:
        raise ValueError(
            f"edge_index must be an int64 tensor of shape [2, m], got {edge_index.dtype} {tuple(edge_index.shape)}"
        )
    if edge_weight is not None and edge_weight.shape != edge_index.shape[1:]:
        raise ValueError(
            f"edge_weight must have one entry per edge ({edge_index.shape[1]}), got shape {tuple(edge_weight.shape)}"
        )


def check_target(logits: Tensor, target: Tensor) -> None:
    """Raise ValueError unless `logits` is (B, C) and `target` holds one class index per row."""
    if logits.ndim != 2 or target.shape != logits.shape[:1] or target.dtype != torch.int64:
        raise ValueError(
            f"target must be an int64 tensor of shape [B] beside logits [B, C], got {target.dtype} "
            f"{tuple(target.shape)} beside {tuple(logits.shape)}"
        )


def upcast(x: Tensor) -> Tensor:
    """Return `x` in float32 when it is half precision, unchanged otherwise."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
