"""Next-item metrics, clicks and purchases apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recsys_losses.mcrl._losses import check_items

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def next_item_metrics(scores: Tensor, target: Tensor, is_purchase: Tensor, *, k: int) -> dict[str, float]:
    r"""Hit ratio and NDCG at k of the next item among all items, for clicks and purchases apart.

    $$\mathrm{rank}=1+|\{a: s_a>s_{\mathrm{target}}\}|,\quad
    \mathrm{HR}=\mathrm{mean}\,[\mathrm{rank}\le k],\quad
    \mathrm{NDCG}=\mathrm{mean}\,\frac{[\mathrm{rank}\le k]}{\log_2(\mathrm{rank}+1)}$$

    Only strictly higher scores push the target down: items that tie with it don't. Seen items aren't removed.

    Args:
        scores: Score of every item, shape `(n, I)`, floating, without NaN.
        target: The items that followed, shape `(n,)`, integers in [0, I).
        is_purchase: Whether they were bought, shape `(n,)`, boolean or 0 and 1.
        k: Cut-off, at least 1.

    Returns:
        `hr_click`, `ndcg_click`, `hr_purchase` and `ndcg_purchase`; 0.0 for a type that is absent.

    Raises:
        ValueError: If the shapes don't fit, `k` < 1, a target is out of range or a score is NaN.

    Source: the protocol of SQN (Xin et al., SIGIR 2020), as in the code of `HN-RS/CSA`.

    Examples:
        >>> import torch
        >>> scores = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.3, 0.3]])
        >>> next_item_metrics(scores, torch.tensor([2, 0]), torch.tensor([False, True]), k=1)
        {'hr_click': 0.0, 'ndcg_click': 0.0, 'hr_purchase': 1.0, 'ndcg_purchase': 1.0}
    """
    if is_purchase.shape != target.shape:
        raise ValueError(f"is_purchase must be {tuple(target.shape)}, got {tuple(is_purchase.shape)}")
    return metrics_of_ranks(target_ranks(scores, target), is_purchase != 0, k)


def target_ranks(scores: Tensor, target: Tensor) -> Tensor:
    """Return 1 + the number of strictly higher scores, (n,)."""
    if scores.ndim != 2 or not scores.is_floating_point():
        raise ValueError(f"scores must be floating (n, I), got {scores.dtype} {tuple(scores.shape)}")
    check_items("target", target, scores.shape[1], rows=scores.shape[0])
    if bool(scores.isnan().any()):  # every comparison with it is false: a NaN would look like the best rank
        raise ValueError("scores contain NaN")
    return 1 + (scores > scores.gather(1, target.unsqueeze(1))).sum(dim=1)


def metrics_of_ranks(rank: Tensor, is_purchase: Tensor, k: int) -> dict[str, float]:
    """Return the hit ratio and NDCG of both types of event from the ranks of the targets."""
    check_cutoffs((k,))
    hit = (rank <= k).double()
    gain = hit / (rank + 1).double().log2()
    metrics: dict[str, float] = {}
    for name, chosen in (("click", ~is_purchase), ("purchase", is_purchase)):
        count = max(1, int(chosen.sum()))
        metrics[f"hr_{name}"] = float(hit[chosen].sum()) / count
        metrics[f"ndcg_{name}"] = float(gain[chosen].sum()) / count
    return metrics


def check_cutoffs(ks: Sequence[int]) -> None:
    """Raise ValueError unless there are cut-offs and all are at least 1."""
    if len(ks) == 0 or any(not k >= 1 for k in ks):
        raise ValueError(f"k must be >= 1, got {tuple(ks)!r}")
