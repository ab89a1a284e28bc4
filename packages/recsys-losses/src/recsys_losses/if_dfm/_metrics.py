"""Metrics of conversion-rate models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from recsys_losses._checks import check_finite

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def cvr_metrics(label: Tensor | Sequence[float], prob: Tensor | Sequence[float]) -> dict[str, float]:
    r"""Area under the ROC curve, area under the precision-recall curve, and log-loss, by scikit-learn.

    The second is the trapezoid area of `precision_recall_curve`, as the authors report it, not the average precision.

    Args:
        label: Final labels, 0 or 1, `(N,)`; both must occur.
        prob: Predicted probabilities in [0, 1], `(N,)`.

    Returns:
        `{"auc": ..., "prauc": ..., "log_loss": ...}`.

    Raises:
        ValueError: If the shapes don't fit, a value is out of range, or only one label occurs.

    Examples:
        >>> metrics = cvr_metrics([0, 1, 0, 1], [0.1, 0.8, 0.4, 0.4])
        >>> {name: round(value, 4) for name, value in metrics.items()}
        {'auc': 0.875, 'prauc': 0.9167, 'log_loss': 0.4389}
    """
    from sklearn.metrics import auc, log_loss, precision_recall_curve, roc_auc_score  # type: ignore[import-untyped]

    y, p = (_array(value) for value in (label, prob))
    if y.ndim != 1 or y.shape != p.shape:
        raise ValueError(f"expected label (N,) and prob (N,), got {y.shape} and {p.shape}")
    if not ((y == 0) | (y == 1)).all():
        raise ValueError("label must hold 0 and 1 only")
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("prob must lie in [0, 1]")
    if not 0 < y.sum() < len(y):
        raise ValueError("label must hold both 0 and 1")
    precision, recall, _ = precision_recall_curve(y, p)
    return {
        "auc": float(roc_auc_score(y, p)),
        "prauc": float(auc(recall, precision)),
        "log_loss": float(log_loss(y, p, labels=[0, 1])),
    }


def relative_improvement(metric: float, vanilla: float, retrain: float) -> float:
    r"""Part of the gap between the stale and the retrained model that is closed, in percent.

    $$\mathrm{RI}=100\,\frac{m-m_\text{vanilla}}{m_\text{retrain}-m_\text{vanilla}}$$

    The same for metrics where lower is better: both differences are then negative.

    Args:
        metric: The metric of the model that is judged.
        vanilla: That of the stale model.
        retrain: That of the retrained one.

    Raises:
        ValueError: If a value isn't finite or there is no gap.

    Examples:
        >>> relative_improvement(0.85, vanilla=0.8, retrain=0.9)
        50.0
    """
    for name, value in (("metric", metric), ("vanilla", vanilla), ("retrain", retrain)):
        check_finite(name, value)
    if retrain == vanilla:
        raise ValueError(f"there is no gap: vanilla and retrain are both {retrain!r}")
    return round(100 * (metric - vanilla) / (retrain - vanilla), 10)


def _array(value: Tensor | Sequence[float]) -> Any:
    return torch.as_tensor(value).detach().cpu().double().numpy()
