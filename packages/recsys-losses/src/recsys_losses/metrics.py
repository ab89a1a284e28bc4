r"""Full-ranking evaluation of embedding recommenders.

Every user who has a test item gets **all** items scored by $s_{ui}=u\cdot i$; items known from training are removed, the
best $K$ are kept. With the relevant items $R_u$ (the user's test items) and $h_{ur}=1$ if rank $r$ holds one of them:

$$\mathrm{Recall@}K=\frac{\sum_{r\le K}h_{ur}}{|R_u|},\quad
\mathrm{Precision@}K=\frac{\sum_{r\le K}h_{ur}}{K},\quad
\mathrm{NDCG@}K=\frac{\sum_{r\le K}h_{ur}/\log_2(r+1)}{\sum_{r\le\min(K,|R_u|)}1/\log_2(r+1)}$$

averaged over the users with a test item, unweighted. Memory is bounded by `batch_size` times the number of items (or
`item_block`), never users times items. The ideal gain of NDCG counts all relevant items, not only those retrieved.

Reference: the protocol of X. He et al., *LightGCN*, SIGIR 2020, section 4.1, and of J. Wu et al., *BSL*, ICDE 2024.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from recsys_losses._checks import check_choice, upcast
from recsys_losses._interactions import check_edges

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

__all__ = [
    "METRICS",
    "evaluate_full_ranking",
    "item_group_recall",
    "item_popularity_groups",
    "metrics_from_hits",
    "topk_items",
]

METRICS = ("recall", "ndcg", "precision", "hit_ratio", "mrr", "arp")

# Scores are kept as blocks of about _COLUMNS items, and a CPU takes _CPU_ROWS users at once: one block is 2 MB and
# stays in the cache, which makes the product twice as fast as one wide product. _TILE items share one maximum.
_COLUMNS = 2048
_CPU_ROWS = 256
_TILE = 64
# Scores held at once when `item_block` is left to us: 128 MB in float32.
_SCORES_AT_ONCE = 1 << 25


def _check_tables(user_emb: Tensor, item_emb: Tensor) -> None:
    """Raise ValueError unless the tables fit each other, are finite and give finite scores."""
    if user_emb.ndim != 2 or item_emb.ndim != 2 or user_emb.shape[1] != item_emb.shape[1]:
        raise ValueError(
            f"expected user_emb (U, d) and item_emb (I, d), got {tuple(user_emb.shape)} and {tuple(item_emb.shape)}"
        )
    if user_emb.device != item_emb.device or not (user_emb.is_floating_point() and item_emb.is_floating_point()):
        raise ValueError(
            "user_emb and item_emb must be floating and on one device, "
            f"got {user_emb.dtype} on {user_emb.device} and {item_emb.dtype} on {item_emb.device}"
        )
    length = []
    for name, table in (("user_emb", user_emb), ("item_emb", item_emb)):
        if table.numel() == 0:
            raise ValueError(f"{name} is empty: {tuple(table.shape)}")
        low, high = (float(x) for x in torch.aminmax(table.detach()))
        if math.isnan(low) or math.isnan(high):
            raise ValueError(f"{name} contains NaN")
        length.append(max(-low, high) * math.sqrt(table.shape[1]))
    limit = torch.finfo(torch.promote_types(user_emb.dtype, torch.float32)).max
    if not length[0] * length[1] < limit:  # Cauchy-Schwarz: no score can overflow
        raise ValueError("user_emb and item_emb contain values that are infinite or so large that scores overflow")


def _check_cutoffs(ks: Sequence[int], num_items: int) -> None:
    """Raise ValueError unless every cut-off is an integer in 1..num_items."""
    if len(ks) == 0:
        raise ValueError("ks is empty; at least one cut-off is needed")
    for k in ks:
        if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= num_items:
            raise ValueError(f"k must be an integer in 1..{num_items} (the number of items), got {k!r}")


def _check_sizes(batch_size: int, item_block: int | None) -> None:
    """Raise ValueError unless the block sizes are positive."""
    if not batch_size >= 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size!r}")
    if item_block is not None and not item_block >= 1:
        raise ValueError(f"item_block must be >= 1 or None, got {item_block!r}")


def _sorted_keys(edge_index: Tensor, num_items: int, device: torch.device) -> Tensor:
    """Return the distinct pairs as ascending keys `user * num_items + item`."""
    edges = edge_index.to(device)
    key = edges[0] * num_items + edges[1]
    # Readers give sorted distinct pairs; looking is far cheaper than sorting again.
    return key if bool((key[1:] > key[:-1]).all()) else torch.unique(key)


def _row_pointer(key: Tensor, num_users: int, num_items: int) -> Tensor:
    """Return the (U + 1,) positions at which each user's pairs begin in the sorted keys."""
    bounds = torch.arange(num_users + 1, device=key.device) * num_items
    return torch.searchsorted(key, bounds)


def _pairs_of(users: Tensor, pointer: Tensor, key: Tensor, num_items: int) -> tuple[Tensor, Tensor]:
    """Return the known pairs of a batch of users as (row in the batch, item), both (P,)."""
    start = pointer[users]
    count = pointer[users + 1] - start
    row = torch.repeat_interleave(torch.arange(len(users), device=users.device), count)
    within = torch.arange(len(row), device=users.device) - (count.cumsum(0) - count)[row]
    return row, key[start[row] + within] - users[row] * num_items


def _best(score: Tensor, k: int, *, stable: bool) -> tuple[Tensor, Tensor]:
    """Return the k largest values of each row and their positions; `stable` breaks ties by the lower position."""
    if not stable:
        value, position = score.topk(k, dim=1)
        return value, position
    value, position = score.topk(min(k + 1, score.shape[1]), dim=1)
    # topk is ambiguous only where neighbours in its sorted result are equal; the few such rows are sorted in full.
    tied = ((value[:, 1:] == value[:, :-1]) & (value[:, 1:] > -torch.inf)).any(1)
    row = tied.nonzero().squeeze(1)
    if len(row):
        kept = value.shape[1]
        ordered, order = score[row].sort(dim=1, descending=True, stable=True)
        value[row], position[row] = ordered[:, :kept], order[:, :kept]
    return value[:, :k], position[:, :k]


def _best_of_block(
    user: Tensor, item: Tensor, row: Tensor, col: Tensor, k: int, buffer: Tensor, *, stable: bool
) -> tuple[Tensor, Tensor]:
    """Return the k best items (score, position) of a block for each user, known pairs (row, col) left out.

    The k best items lie in the k tiles with the largest maxima: any item outside them is preceded by the k items that
    attain those maxima. So only k * _TILE candidates per user are ranked, with the same result as ranking all.
    """
    rows, items = len(user), len(item)
    if items <= 2 * k * _TILE:
        score = buffer[: rows * items].view(rows, items)
        torch.mm(user, item.T, out=score)
        score.view(-1).index_fill_(0, row * items + col, -torch.inf)
        return _best(score, k, stable=stable)

    width, blocks = _layout(items)
    score = buffer[: blocks * rows * width].view(blocks, rows, width)
    for number, part in enumerate(torch.split(item, width)):
        torch.mm(user, part.T, out=score[number, :, : len(part)])
    score[-1, :, items - (blocks - 1) * width :] = -torch.inf
    block = col // width
    score.view(-1).index_fill_(0, (block * rows + row) * width + (col - block * width), -torch.inf)

    per_block = width // _TILE
    tiles = score.view(blocks, rows, per_block, _TILE)
    highest = tiles.amax(3).transpose(0, 1).reshape(rows, blocks * per_block)
    tile = _best(highest, k, stable=stable)[1]
    if stable:
        tile = tile.sort(dim=1).values  # so that positions among the candidates follow the item ids
    block = tile // per_block
    line = (block * rows + torch.arange(rows, device=tile.device)[:, None]) * per_block + (tile - block * per_block)
    candidate = tiles.view(-1, _TILE).index_select(0, line.view(-1)).view(rows, k * _TILE)
    value, position = _best(candidate, k, stable=stable)
    return value, tile.gather(1, position // _TILE) * _TILE + position % _TILE


def _layout(items: int) -> tuple[int, int]:
    """Return the width of the blocks of scores, a multiple of _TILE of at most _COLUMNS, and their number."""
    width = math.ceil(items / math.ceil(items / _COLUMNS) / _TILE) * _TILE
    return width, math.ceil(items / width)


def _buffer_size(rows: int, items: int) -> int:
    """Return how many scores `_best_of_block` needs at most."""
    width, blocks = _layout(items)
    return rows * width * blocks


def _rank(
    user_emb: Tensor,
    item_emb: Tensor,
    key: Tensor,
    users: Tensor,
    *,
    k: int,
    batch_size: int,
    item_block: int | None,
    stable: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (users of the batch, their k best items); -1 where a user has fewer than k items left."""
    dtype = torch.promote_types(upcast(user_emb).dtype, upcast(item_emb).dtype)
    user_emb, item_emb = user_emb.detach().to(dtype), item_emb.detach().to(dtype)
    num_items = len(item_emb)
    batch_size = min(batch_size, max(len(users), 1))
    if user_emb.device.type == "cpu":
        batch_size = min(batch_size, _CPU_ROWS)
    width = min(item_block or max(_SCORES_AT_ONCE // batch_size, _COLUMNS), num_items)
    pointer = _row_pointer(key, len(user_emb), num_items)
    buffer = user_emb.new_empty(_buffer_size(batch_size, width))
    for batch in torch.split(users, batch_size):
        user = user_emb[batch]
        row, col = _pairs_of(batch, pointer, key, num_items)
        best: tuple[Tensor, Tensor] | None = None
        for begin in range(0, num_items, width):
            part = item_emb[begin : begin + width]
            inside = slice(None) if len(part) == num_items else (col >= begin) & (col < begin + width)
            score, item = _best_of_block(
                user, part, row[inside], col[inside] - begin, min(k, len(part)), buffer, stable=stable
            )
            item = item + begin
            if best is not None:  # earlier blocks hold the lower ids and come first, so a stable merge keeps the order
                score, item = torch.cat((best[0], score), 1), torch.cat((best[1], item), 1)
                score, position = _best(score, min(k, score.shape[1]), stable=stable)
                item = item.gather(1, position)
            best = score, item
        assert best is not None  # noqa: S101  # num_items >= 1
        yield batch, best[1].masked_fill(best[0] == -torch.inf, -1)


def topk_items(
    user_emb: Tensor,
    item_emb: Tensor,
    exclude_edge_index: Tensor | None,
    *,
    k: int,
    users: Tensor | None = None,
    batch_size: int = 1024,
    item_block: int | None = None,
    deterministic: bool = False,
) -> Tensor:
    r"""Return each user's k items of the highest dot product, best first.

    Args:
        user_emb: User table, shape `(U, d)`, floating; half precision is scored in float32.
        item_emb: Item table, shape `(I, d)`, on the same device.
        exclude_edge_index: Pairs (user, item) never recommended, LongTensor `(2, E)`, or None.
        k: Number of items, 1..I.
        users: Users to rank for, LongTensor `(n,)`; all by default.
        batch_size: Users scored at once, at most; a CPU takes 256, where it is fastest.
        item_block: Items scored at once; by default as many as keep the scores of a batch under 128 MB in float32.
            Changes memory and time, not the result.
        deterministic: Break equal scores by the lower item id. Without it their order is unspecified.

    Returns:
        LongTensor `(n, k)` of item ids; -1 fills the end of a row whose user has fewer than k items left.

    Raises:
        ValueError: If k is not in 1..I, an id is out of range, a table holds NaN or infinite values, or shapes differ.

    Examples:
        >>> import torch
        >>> user, item = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.1, 0.0], [0.3, 0.0], [0.2, 0.0]])
        >>> topk_items(user, item, torch.tensor([[0], [1]]), k=2)
        tensor([[2, 0]])
    """
    _check_tables(user_emb, item_emb)
    _check_cutoffs((k,), len(item_emb))
    _check_sizes(batch_size, item_block)
    if exclude_edge_index is None:
        exclude_edge_index = torch.empty(2, 0, dtype=torch.int64)
    check_edges("exclude_edge_index", exclude_edge_index, len(user_emb), len(item_emb))
    if users is None:
        users = torch.arange(len(user_emb))
    elif users.ndim != 1:
        raise ValueError(f"users must have shape (n,), got {tuple(users.shape)}")
    check_edges("users", torch.stack((users, torch.zeros_like(users))), len(user_emb), len(item_emb))
    key = _sorted_keys(exclude_edge_index, len(item_emb), user_emb.device)
    ranked = _rank(
        user_emb,
        item_emb,
        key,
        users.to(user_emb.device),
        k=k,
        batch_size=batch_size,
        item_block=item_block,
        stable=deterministic,
    )
    return torch.cat([item for _, item in ranked])


def _contains(sorted_key: Tensor, key: Tensor) -> Tensor:
    """Return, for every key, whether it occurs in the non-empty ascending `sorted_key`."""
    position = torch.searchsorted(sorted_key, key).clamp_(max=len(sorted_key) - 1)
    return sorted_key[position] == key


def metrics_from_hits(hits: Tensor, num_relevant: Tensor) -> dict[str, Tensor]:
    r"""Return Recall, NDCG and Precision at every cut-off from a table of hits.

    Args:
        hits: Whether rank r of user u holds a relevant item, bool (or integer 0/1) `(U, K)`.
        num_relevant: Number of relevant items of each user, $|R_u|\ge1$, LongTensor `(U,)`.

    Returns:
        `{"recall", "ndcg", "precision"}`, each a float64 tensor `(K,)` whose element k-1 is the mean over users at
        cut-off k (equations in the module's description).

    Raises:
        ValueError: If a user has no relevant item or more hits than relevant items, or shapes do not fit.

    Examples:
        >>> import torch
        >>> metrics_from_hits(torch.tensor([[False, True]]), torch.tensor([2]))["recall"]
        tensor([0.0000, 0.5000], dtype=torch.float64)
    """
    if hits.ndim != 2 or num_relevant.shape != hits.shape[:1] or 0 in hits.shape:
        raise ValueError(
            f"expected non-empty hits (U, K) and num_relevant (U,), got {tuple(hits.shape)}, {tuple(num_relevant.shape)}"
        )
    hit = hits.bool().double()
    found = hit.cumsum(1)
    if bool((num_relevant < 1).any()):
        raise ValueError(f"user without relevant items: row {int((num_relevant < 1).nonzero()[0])} of num_relevant")
    if bool((found[:, -1] > num_relevant).any()):
        raise ValueError("a row of hits has more hits than num_relevant")
    cutoff = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    discount = 1 / torch.log2(cutoff.double() + 1)
    ideal = discount.cumsum(0)[torch.minimum(cutoff, num_relevant[:, None]) - 1]
    return {
        "recall": (found / num_relevant[:, None]).mean(0),
        "ndcg": ((hit * discount).cumsum(1) / ideal).mean(0),
        "precision": (found / cutoff).mean(0),
    }


def _ranked_hits(
    user_emb: Tensor,
    item_emb: Tensor,
    train_edge_index: Tensor,
    test_edge_index: Tensor,
    *,
    k: int,
    batch_size: int,
    item_block: int | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (top items (n, k), hits (n, k), relevant items per user (n,), train degree of each item (I,))."""
    num_users, num_items = len(user_emb), len(item_emb)
    check_edges("train_edge_index", train_edge_index, num_users, num_items)
    check_edges("test_edge_index", test_edge_index, num_users, num_items)
    if test_edge_index.shape[1] == 0:
        raise ValueError("test_edge_index is empty: no user has a test item")
    train = _sorted_keys(train_edge_index, num_items, user_emb.device)
    test = _sorted_keys(test_edge_index, num_items, user_emb.device)
    users, relevant = torch.unique_consecutive(test // num_items, return_counts=True)
    top, hits = [], []
    for batch, item in _rank(
        user_emb,
        item_emb,
        train,
        users,
        k=k,
        batch_size=batch_size,
        item_block=item_block,
        stable=deterministic,
    ):
        top.append(item)
        hits.append(_contains(test, batch[:, None] * num_items + item) & (item >= 0))
    return torch.cat(top), torch.cat(hits), relevant, torch.bincount(train % num_items, minlength=num_items)


def _average_popularity(top: Tensor, item_count: Tensor) -> Tensor:
    """Return the mean train degree of the first 1..K recommended items, averaged over users, (K,)."""
    given = top >= 0
    degree = (item_count[top.clamp(min=0)] * given).cumsum(1).double()
    return (degree / given.cumsum(1).clamp(min=1)).mean(0)


def evaluate_full_ranking(
    user_emb: Tensor,
    item_emb: Tensor,
    train_edge_index: Tensor,
    test_edge_index: Tensor,
    *,
    ks: Sequence[int] = (20,),
    batch_size: int = 1024,
    metrics: Sequence[str] = ("recall", "ndcg", "precision"),
    item_block: int | None = None,
    deterministic: bool = False,
) -> dict[str, float]:
    r"""Evaluate the ranking of all items for every user who has a test item, train items left out.

    Beside the module's three metrics: `"hit_ratio"` (share of users with at least one hit), `"mrr"` (mean of one over
    the rank of the first hit, 0 without a hit) and `"arp"`, the average recommendation popularity: the mean number of
    train interactions of the recommended items, averaged over the evaluated users.

    Args:
        user_emb: User table, shape `(U, d)`, floating. For cosine scores pass normalised tables.
        item_emb: Item table, shape `(I, d)`, on the same device.
        train_edge_index: Known pairs (user, item), LongTensor `(2, E)`; never recommended. A user without any is
            evaluated like the others. Repeated pairs count once.
        test_edge_index: Relevant pairs, LongTensor `(2, T)`, T >= 1. A pair that is also in train counts in
            $|R_u|$ but can't be a hit.
        ks: Cut-offs K, each in 1..I.
        batch_size: Users scored at once, at most; a CPU takes 256, where it is fastest.
        metrics: Any of "recall", "ndcg", "precision", "hit_ratio", "mrr", "arp".
        item_block: Items scored at once; by default as many as keep the scores of a batch under 128 MB in float32.
        deterministic: Break equal scores by the lower item id. Without it their order is unspecified.

    Returns:
        `{"recall@20": ...}` with one entry for each metric and cut-off.

    Raises:
        ValueError: If a cut-off is not in 1..I, an id is out of range, a metric is unknown, a table holds NaN or
            infinite values, or no user has a test item.

    Examples:
        >>> import torch
        >>> user, item = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.3, 0.0], [0.1, 0.0], [0.2, 0.0]])
        >>> train, test = torch.tensor([[0], [0]]), torch.tensor([[0], [1]])
        >>> evaluate_full_ranking(user, item, train, test, ks=(1, 2), metrics=("recall",))
        {'recall@1': 0.0, 'recall@2': 1.0}
    """
    for metric in metrics:
        check_choice("metric", metric, METRICS)
    _check_tables(user_emb, item_emb)
    _check_cutoffs(ks, len(item_emb))
    _check_sizes(batch_size, item_block)
    top, hits, relevant, item_count = _ranked_hits(
        user_emb,
        item_emb,
        train_edge_index,
        test_edge_index,
        k=max(ks),
        batch_size=batch_size,
        item_block=item_block,
        deterministic=deterministic,
    )
    curve = metrics_from_hits(hits, relevant)
    any_hit = hits.cummax(1).values.double()
    rank = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    curve["hit_ratio"] = any_hit.mean(0)
    curve["mrr"] = (torch.diff(any_hit, dim=1, prepend=torch.zeros_like(any_hit[:, :1])) / rank).cumsum(1).mean(0)
    curve["arp"] = _average_popularity(top, item_count)
    values = {name: curve[name].tolist() for name in metrics}
    return {f"{name}@{k}": values[name][k - 1] for k in ks for name in metrics}


def item_popularity_groups(item_count: Tensor, num_groups: int = 10) -> Tensor:
    r"""Divide the items into groups of (nearly) equal total interactions, from the least to the most popular.

    Items are ordered by their count (equal counts by id). With $c_i$ the interactions of all items before $i$ and
    $n_i$ its own, item $i$ goes to group $\lfloor G\,(c_i+n_i/2)/\sum_j n_j\rfloor$: the one in which the middle of its
    share lies. Items without interactions are in the first group.

    Args:
        item_count: Train interactions of each item, integer `(I,)`, >= 0, not all zero.
        num_groups: Number of groups $G\ge1$.

    Returns:
        LongTensor `(I,)` with values in 0..G-1. A group can be empty if single items hold more than one share.

    Raises:
        ValueError: If a count is negative, all are zero, or the shape does not fit.

    Reference: J. Wu et al., *On the Effectiveness of Sampled Softmax Loss*, TOIS 42(4), 2024, section 4.2 (long tail).

    Examples:
        >>> import torch
        >>> item_popularity_groups(torch.tensor([4, 1, 2, 1]), num_groups=2)
        tensor([1, 0, 0, 0])
    """
    if not num_groups >= 1:
        raise ValueError(f"num_groups must be >= 1, got {num_groups!r}")
    if item_count.ndim != 1 or item_count.is_floating_point():
        raise ValueError(f"item_count must be an integer tensor (I,), got {item_count.dtype} {tuple(item_count.shape)}")
    if bool((item_count < 0).any()):
        raise ValueError("item_count must not be negative")
    total = int(item_count.sum())
    if total == 0:
        raise ValueError("item_count is zero for every item")
    order = torch.sort(item_count, stable=True).indices
    count = item_count[order].long()
    # In integers, so that the bounds do not depend on rounding.
    group = num_groups * (2 * count.cumsum(0) - count) // (2 * total)
    return torch.empty_like(group).scatter_(0, order, group.clamp(max=num_groups - 1))


def item_group_recall(
    user_emb: Tensor,
    item_emb: Tensor,
    train_edge_index: Tensor,
    test_edge_index: Tensor,
    *,
    k: int = 20,
    num_groups: int = 10,
    batch_size: int = 1024,
    item_block: int | None = None,
    deterministic: bool = False,
) -> Tensor:
    r"""Divide Recall@K into the contributions of popularity groups of items.

    $$\mathrm{Recall}_g\mathrm{@}K=\operatorname{mean}_u\frac{|\{i\in\mathrm{top}_K(u)\cap R_u:\ g(i)=g\}|}{|R_u|},
    \qquad \sum_g\mathrm{Recall}_g\mathrm{@}K=\mathrm{Recall@}K$$

    Groups come from `item_popularity_groups` over the train interactions; the last holds the most popular items.

    Args:
        user_emb: User table, shape `(U, d)`, floating.
        item_emb: Item table, shape `(I, d)`, on the same device.
        train_edge_index: Known pairs (user, item), LongTensor `(2, E)`, E >= 1; never recommended.
        test_edge_index: Relevant pairs, LongTensor `(2, T)`, T >= 1.
        k: Cut-off, 1..I.
        num_groups: Number of groups G.
        batch_size: Users scored at once, at most; a CPU takes 256, where it is fastest.
        item_block: Items scored at once, as in `evaluate_full_ranking`.
        deterministic: Break equal scores by the lower item id.

    Returns:
        Float64 tensor `(G,)`, least popular group first.

    Raises:
        ValueError: As `evaluate_full_ranking` and `item_popularity_groups`.

    Reference: J. Wu et al., *On the Effectiveness of Sampled Softmax Loss*, TOIS 42(4), 2024, eq. (29).

    Examples:
        >>> import torch
        >>> user, item = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.3, 0.0], [0.1, 0.0], [0.2, 0.0]])
        >>> train, test = torch.tensor([[0], [0]]), torch.tensor([[0, 0], [1, 2]])
        >>> item_group_recall(user, item, train, test, k=1, num_groups=2)
        tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    _check_tables(user_emb, item_emb)
    _check_cutoffs((k,), len(item_emb))
    _check_sizes(batch_size, item_block)
    top, hits, relevant, item_count = _ranked_hits(
        user_emb,
        item_emb,
        train_edge_index,
        test_edge_index,
        k=k,
        batch_size=batch_size,
        item_block=item_block,
        deterministic=deterministic,
    )
    group = item_popularity_groups(item_count, num_groups)
    share = (1 / relevant.double())[:, None].expand(hits.shape)[hits]
    return share.new_zeros(num_groups).index_add_(0, group[top[hits]], share) / len(relevant)
