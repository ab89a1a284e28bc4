"""Splits and filters of interaction edges; use them through `recsys_losses.data`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from recsys_losses._interactions import (
    InteractionData,
    check_edges,
    count_ids,
    edge_keys,
    nth_free_item,
    rank_in_group,
    shifted_keys,
)

if TYPE_CHECKING:
    from torch import Tensor


def k_core(edge_index: Tensor, *, min_user: int, min_item: int) -> Tensor:
    """Keep the pairs of users and items with enough pairs, repeated until nothing changes.

    Args:
        edge_index: LongTensor (2, E).
        min_user: Least number of pairs per user, at least 0.
        min_item: Least number of pairs per item, at least 0.

    Returns:
        LongTensor (2, E') of the remaining pairs in their order, ids unchanged; possibly empty.

    Raises:
        ValueError: `edge_index` malformed or a negative minimum.

    Examples:
        >>> import torch
        >>> k_core(torch.tensor([[0, 0, 1, 1, 2], [0, 1, 0, 1, 1]]), min_user=2, min_item=2)
        tensor([[0, 0, 1, 1],
                [0, 1, 0, 1]])
    """
    check_edges("edge_index", edge_index)
    for name, minimum in (("min_user", min_user), ("min_item", min_item)):
        if not minimum >= 0:
            raise ValueError(f"{name} must be at least 0, got {minimum!r}")
    while edge_index.shape[1]:
        user, item = edge_index
        keep = (torch.bincount(user)[user] >= min_user) & (torch.bincount(item)[item] >= min_item)
        if keep.all():
            break
        edge_index = edge_index[:, keep]
    return edge_index


def split_ratio(
    edge_index: Tensor,
    *,
    test: float = 0.2,
    valid: float = 0.0,
    per_user: bool = True,
    generator: torch.Generator | None = None,
    num_users: int | None = None,
    num_items: int | None = None,
) -> InteractionData:
    """Split pairs at random into train, test and validation pairs.

    Args:
        edge_index: LongTensor (2, E) without repetitions.
        test: Share of test pairs, at least 0.
        valid: Share of validation pairs, at least 0; `test + valid` below 1.
        per_user: Take floor(share * n) of the n pairs of every user; otherwise floor(share * E) of all pairs.
        generator: CPU generator; None uses torch's default generator.
        num_users: Number of users U; None takes 1 + the largest user id.
        num_items: Number of items I; None takes 1 + the largest item id.

    Returns:
        The split data; within each part the pairs keep their order. `valid` is None for share 0.

    Raises:
        ValueError: `edge_index` malformed or empty, shares out of range, or an id out of range.

    Examples:
        >>> import torch
        >>> edges = torch.stack((torch.zeros(10, dtype=torch.long), torch.arange(10)))
        >>> split_ratio(edges, test=0.2, valid=0.1, generator=torch.Generator().manual_seed(0))
        InteractionData(num_users=1, num_items=10, train=7, valid=1, test=2)
    """
    check_edges("edge_index", edge_index, num_users, num_items)
    if edge_index.shape[1] == 0:
        raise ValueError("edge_index holds no pairs")
    if not (test >= 0 and valid >= 0 and test + valid < 1):
        raise ValueError(f"test and valid must be at least 0 with a sum below 1, got {test!r} and {valid!r}")
    user = edge_index[0]
    group = user if per_user else torch.zeros_like(user)
    rank = _random_rank(group, generator)
    size = torch.bincount(group)[group]
    num_test, num_valid = _floor_share(test, size), _floor_share(valid, size)
    is_test = rank < num_test
    is_valid = ~is_test & (rank < num_test + num_valid)
    return InteractionData(
        num_users=int(user.max()) + 1 if num_users is None else num_users,
        num_items=int(edge_index[1].max()) + 1 if num_items is None else num_items,
        train=edge_index[:, ~(is_test | is_valid)],
        test=edge_index[:, is_test],
        valid=edge_index[:, is_valid] if valid > 0 else None,
    )


def hold_out_validation(
    data: InteractionData, *, share: float = 0.1, generator: torch.Generator | None = None
) -> InteractionData:
    """Move a share of each user's train pairs to a validation set.

    Args:
        data: Data without validation pairs.
        share: Share in (0, 1); floor(share * n) of a user's n train pairs are moved, so users with few keep all.
        generator: CPU generator; None uses torch's default generator.

    Returns:
        The data with the smaller train set and `valid`; test pairs and sizes unchanged.

    Raises:
        ValueError: `data.valid` is set already, or `share` out of range.

    Examples:
        >>> import torch
        >>> train = torch.stack((torch.zeros(20, dtype=torch.long), torch.arange(20)))
        >>> hold_out_validation(InteractionData(1, 21, train=train, test=torch.tensor([[0], [20]])))
        InteractionData(num_users=1, num_items=21, train=18, valid=2, test=1)
    """
    if data.valid is not None:
        raise ValueError("data has validation pairs already")
    if not 0 < share < 1:
        raise ValueError(f"share must be between 0 and 1 (both excluded), got {share!r}")
    user = data.train[0]
    held = _random_rank(user, generator) < _floor_share(share, count_ids(user, data.num_users)[user])
    return dataclasses.replace(data, train=data.train[:, ~held], valid=data.train[:, held])


def unbiased_split(
    edge_index: Tensor,
    *,
    heldout: float = 0.3,
    cap: float,
    test_share: float = 2 / 3,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Split so that the held-out pairs have a nearly uniform item popularity.

    A pair of item i with $c_i$ pairs gets the weight
    $$w = \min(1 / c_i, \text{cap});$$
    a share `heldout` of all pairs is drawn without replacement with these weights (the pairs with the smallest keys
    $-\log U / w$, U uniform). Held-out pairs whose user or item is left without train pairs go back to train, so every
    user and item of `edge_index` occurs in train. The rest is split at random into test and validation pairs.

    Args:
        edge_index: LongTensor (2, E) without repetitions.
        heldout: Share of pairs drawn, in (0, 1); round(heldout * E) before pairs go back.
        cap: Largest weight, positive; 1 / median item count is a choice that keeps rare items from dominating.
        test_share: Share of the held-out pairs that are test, in (0, 1]; the others are validation.
        generator: CPU generator; None uses torch's default generator.

    Returns:
        `(train, valid, test)`, ids unchanged. Train keeps the order of `edge_index`, pairs that went back come last.
        `reindex` renumbers by first appearance in train, as the original code does.

    Raises:
        ValueError: `edge_index` malformed or empty, or an argument out of range.

    Source: CPR (Wan et al., WWW 2022, arXiv 2204.12176), section 5.1 and the official code.

    Examples:
        >>> import torch
        >>> edges = torch.cartesian_prod(torch.arange(10), torch.arange(10)).T
        >>> train, valid, test = unbiased_split(edges, cap=0.1, generator=torch.Generator().manual_seed(0))
        >>> train.shape[1], valid.shape[1], test.shape[1]
        (70, 10, 20)
    """
    check_edges("edge_index", edge_index)
    if edge_index.shape[1] == 0:
        raise ValueError("edge_index holds no pairs")
    if not 0 < heldout < 1:
        raise ValueError(f"heldout must be between 0 and 1 (both excluded), got {heldout!r}")
    if not cap > 0:
        raise ValueError(f"cap must be positive, got {cap!r}")
    if not 0 < test_share <= 1:
        raise ValueError(f"test_share must be in (0, 1], got {test_share!r}")
    user, item = edge_index
    num_pairs = user.numel()
    weight = (1 / torch.bincount(item)[item].double()).clamp(max=cap)
    key = torch.empty(num_pairs, dtype=torch.float64).exponential_(generator=generator) / weight
    held = torch.zeros(num_pairs, dtype=torch.bool)
    held[torch.argsort(key)[: round(heldout * num_pairs)]] = True
    seen_user = count_ids(user[~held], int(user.max()) + 1) > 0
    seen_item = count_ids(item[~held], int(item.max()) + 1) > 0
    back = held & ~(seen_user[user] & seen_item[item])
    train = torch.cat((edge_index[:, ~held], edge_index[:, back]), dim=1)
    kept = edge_index[:, held & ~back]
    is_test = torch.zeros(kept.shape[1], dtype=torch.bool)
    is_test[torch.randperm(kept.shape[1], generator=generator)[: round(test_share * kept.shape[1])]] = True
    return train, kept[:, ~is_test], kept[:, is_test]


def reindex(train: Tensor, *others: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """Renumber users and items in order of their first appearance in train.

    Args:
        train: LongTensor (2, E) with at least one pair.
        *others: Further edge lists whose users and items all occur in train.

    Returns:
        `([train, *others] with new ids, user_ids (U,), item_ids (I,))`: element n of the last two is the old id of the
        new id n.

    Raises:
        ValueError: Train is empty, or a user or item of the others does not occur in train.

    Examples:
        >>> import torch
        >>> [train], user_ids, item_ids = reindex(torch.tensor([[7, 3, 7], [5, 5, 2]]))
        >>> train, user_ids, item_ids
        (tensor([[0, 1, 0],
                [0, 0, 1]]), tensor([7, 3]), tensor([5, 2]))
    """
    check_edges("train", train)
    if train.shape[1] == 0:
        raise ValueError("train holds no pairs")
    old_ids = [_first_appearances(row) for row in train]
    renumbered = [
        torch.stack([_new_ids(name, row, old) for name, row, old in zip(("user", "item"), edges, old_ids, strict=True)])
        for edges in (train, *others)
    ]
    return renumbered, old_ids[0], old_ids[1]


def inject_false_positives(
    data: InteractionData, rate: float, generator: torch.Generator | None = None
) -> InteractionData:
    """Add random items to the train pairs of every user, in proportion to his number of train pairs.

    A user with n train pairs gets floor(rate * n) new pairs, one more with the probability of the fraction lost by
    floor, so that the expected share is exact for users of every activity. The items are drawn uniformly, without
    repetition, from those that are in none of the user's train, validation and test pairs; a user without enough of
    them gets all of them.

    Args:
        data: Clean data; validation and test pairs stay as they are.
        rate: Number of false positives per train pair, at least 0 and finite, e.g. 0.4 for 40 %.
        generator: CPU generator; None uses torch's default generator.

    Returns:
        The data with the longer train set, new pairs last.

    Raises:
        ValueError: `rate` negative or not finite.

    Source: BSL (Wu et al., ICDE 2024), research question 3: positive noise.

    Examples:
        >>> import torch
        >>> data = InteractionData(1, 50, train=torch.tensor([[0] * 10, list(range(10))]), test=torch.tensor([[0], [10]]))
        >>> inject_false_positives(data, 0.2)
        InteractionData(num_users=1, num_items=50, train=12, valid=none, test=1)
    """
    if not 0 <= rate < float("inf"):
        raise ValueError(f"rate must be a finite number of at least 0, got {rate!r}")
    wanted = rate * count_ids(data.train[0], data.num_users).double()
    wanted = torch.floor(wanted + torch.rand(data.num_users, dtype=torch.float64, generator=generator)).long()
    parts = [part for part in (data.train, data.valid, data.test) if part is not None]
    known = torch.unique(edge_keys(torch.cat(parts, dim=1), data.num_items))
    free = data.num_items - count_ids(known.div(data.num_items, rounding_mode="floor"), data.num_users)
    missing = torch.minimum(wanted, free)
    noise = known.new_empty(0)
    while missing.any():
        fresh = torch.unique(_draw_free_keys(known, missing, free, data.num_items, generator))
        noise = torch.cat((noise, fresh))
        known = torch.sort(torch.cat((known, fresh))).values
        drawn = count_ids(fresh.div(data.num_items, rounding_mode="floor"), data.num_users)
        missing, free = missing - drawn, free - drawn
    new = torch.stack((noise.div(data.num_items, rounding_mode="floor"), noise % data.num_items))
    return dataclasses.replace(data, train=torch.cat((data.train, new), dim=1))


def _random_rank(group: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return the rank of every element in a random order of its group."""
    return rank_in_group(group, torch.rand(group.numel(), dtype=torch.float64, generator=generator))


def _draw_free_keys(
    known: Tensor, draws: Tensor, free: Tensor, num_items: int, generator: torch.Generator | None
) -> Tensor:
    """Draw for every user `draws` keys, with repetition, of pairs that are not among the sorted `known` keys."""
    user = torch.repeat_interleave(torch.arange(draws.numel()), draws)
    rank = (torch.rand(user.numel(), dtype=torch.float64, generator=generator) * free[user]).long()
    start = torch.searchsorted(known, user * num_items)
    return user * num_items + nth_free_item(shifted_keys(known, num_items), start, user, rank, num_items)


def _floor_share(share: float, size: Tensor) -> Tensor:
    """Return floor(share * size), where 0.29 * 100 is 29."""
    return torch.floor(share * size.double() + 1e-9).long()


def _first_appearances(ids: Tensor) -> Tensor:
    """Return the distinct ids in order of first appearance."""
    values: Tensor
    values, inverse = torch.unique(ids, return_inverse=True)
    first = torch.full_like(values, ids.numel()).scatter_reduce_(0, inverse, torch.arange(ids.numel()), "amin")
    return values[torch.argsort(first)]


def _new_ids(name: str, ids: Tensor, old: Tensor) -> Tensor:
    """Return the position in `old` of every id."""
    order = torch.argsort(old)
    position = torch.searchsorted(old[order], ids).clamp_(max=old.numel() - 1)
    if bool((old[order][position] != ids).any()):
        raise ValueError(f"an edge list holds a {name} that does not occur in train")
    return order[position]
