"""Metrics of a score matrix; tables of embeddings are evaluated by `recsys_losses.metrics` without such a matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from recsys_losses.metrics import metrics_from_hits
from recsys_losses.sgl._graph import check_range

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def recall_ndcg_at_k(
    scores: Tensor, train_mask: Tensor, test_items: Sequence[Tensor | Sequence[int]], k: int = 20
) -> dict[str, float]:
    r"""Return Precision, Recall and NDCG of the k best items that aren't training items.

    The mean is over users with a test item; equations in `recsys_losses.metrics`. For tables of embeddings take
    `recsys_losses.metrics.evaluate_full_ranking`, which never holds users times items.

    Args:
        scores: Score of every user and item, shape `(U, I)`, floating.
        train_mask: True (or 1) for training items, which aren't ranked, shape `(U, I)`.
        test_items: The test items of each user, U sequences of ids without repetitions; may be empty.
        k: Cut-off, 1..I.

    Returns:
        `{"precision": ..., "recall": ..., "ndcg": ...}`.

    Raises:
        ValueError: If shapes don't fit, k isn't in 1..I, an id is out of range, or no user has a test item.

    Reference: the evaluator of the authors' code; equal scores are ranked by the lower item id.

    Examples:
        >>> import torch
        >>> recall_ndcg_at_k(torch.tensor([[0.3, 0.1, 0.2]]), torch.tensor([[True, False, False]]), [[1]], k=1)
        {'precision': 0.0, 'recall': 0.0, 'ndcg': 0.0}
    """
    if scores.ndim != 2 or train_mask.shape != scores.shape or len(test_items) != len(scores):
        raise ValueError(
            f"expected scores (U, I), train_mask (U, I) and U lists of test items, got {tuple(scores.shape)}, "
            f"{tuple(train_mask.shape)} and {len(test_items)}"
        )
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k must be in 1..{scores.shape[1]} (the number of items), got {k!r}")
    relevant = torch.zeros_like(train_mask, dtype=torch.bool)
    for user, items in enumerate(test_items):
        ids = torch.as_tensor(items, dtype=torch.int64, device=scores.device)
        check_range(f"test_items[{user}]", ids, scores.shape[1])
        relevant[user, ids] = True
    number = relevant.sum(1)
    if not bool(number.any()):
        raise ValueError("test_items is empty for every user: there is nothing to rank")
    known = train_mask.bool()
    order = scores.masked_fill(known, -torch.inf).sort(stable=True, dim=1, descending=True).indices[:, :k]
    hits = (relevant & ~known).gather(1, order)
    curve = metrics_from_hits(hits[number > 0], number[number > 0])
    return {name: float(curve[name][k - 1]) for name in ("precision", "recall", "ndcg")}
