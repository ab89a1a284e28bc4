"""Interaction edges: the data container, its checks, and membership by sorted keys.

An edge list is a LongTensor (2, E): row 0 user ids, row 1 item ids, both 0-based, items not offset by the number
of users. The pair (u, i) has the key u * I + i.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_ID = 2**31 - 1
"""Largest accepted id: keys u * I + i of smaller ids never overflow 64 bits."""


@dataclass(frozen=True, eq=False)
class InteractionData:
    """Implicit feedback, split into train, test and (optionally) validation pairs.

    Users or items without any train pair are legal (cold); pairs may not be out of range.

    Args:
        num_users: Number of users U, at least 1.
        num_items: Number of items I, at least 1.
        train: LongTensor (2, E), row 0 users in [0, U), row 1 items in [0, I).
        test: LongTensor (2, T), same ranges.
        valid: LongTensor (2, V), same ranges, or None.

    Raises:
        ValueError: A size below 1, an edge list of wrong shape or dtype, or an id out of range.

    Examples:
        >>> import torch
        >>> data = InteractionData(2, 3, train=torch.tensor([[0, 1], [2, 0]]), test=torch.tensor([[0], [1]]))
        >>> data.train.shape
        torch.Size([2, 2])
    """

    num_users: int
    num_items: int
    train: Tensor
    test: Tensor
    valid: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("num_users", "num_items"):
            if not 1 <= getattr(self, name) <= MAX_ID + 1:
                raise ValueError(f"{name} must be between 1 and {MAX_ID + 1}, got {getattr(self, name)!r}")
        for name in ("train", "test", "valid"):
            edges = getattr(self, name)
            if edges is not None:
                check_edges(name, edges, self.num_users, self.num_items)

    def __repr__(self) -> str:
        valid = "none" if self.valid is None else f"{self.valid.shape[1]}"
        return (
            f"InteractionData(num_users={self.num_users}, num_items={self.num_items}, "
            f"train={self.train.shape[1]}, valid={valid}, test={self.test.shape[1]})"
        )


def fingerprint(data: InteractionData) -> str:
    """Return a hash of the pairs that training and selection see, for the settings of a checkpoint."""
    digest = hashlib.sha256(f"{data.num_users} {data.num_items}".encode())
    for pairs in (data.train, data.valid):
        digest.update(b"none" if pairs is None else pairs.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_edges(name: str, edge_index: Tensor, num_users: int | None = None, num_items: int | None = None) -> None:
    """Raise ValueError unless `edge_index` is an int64 (2, E) tensor of non-negative ids below the given sizes."""
    if edge_index.ndim != 2 or edge_index.shape[0] != 2 or edge_index.dtype != torch.int64:
        raise ValueError(
            f"{name} must be an int64 tensor of shape (2, E), got {edge_index.dtype} {tuple(edge_index.shape)}"
        )
    if edge_index.shape[1] == 0:
        return
    for row, (what, size) in enumerate((("user", num_users), ("item", num_items))):
        low, high = (int(x) for x in edge_index[row].aminmax())
        if low < 0:
            raise ValueError(f"{name} holds the negative {what} id {low}; ids start at 0")
        limit = MAX_ID + 1 if size is None else size
        if high >= limit:
            raise ValueError(f"{name} holds the {what} id {high}, which is not below num_{what}s={limit}")


def edge_keys(edge_index: Tensor, num_items: int) -> Tensor:
    """Return the key u * I + i of every edge, (E,)."""
    return edge_index[0] * num_items + edge_index[1]


def count_ids(ids: Tensor, size: int) -> Tensor:
    """Return how often each id in [0, size) occurs in `ids`, int64 (size,)."""
    return torch.bincount(ids, minlength=size)


def rank_in_group(group: Tensor, key: Tensor) -> Tensor:
    """Return the 0-based rank of every element within its group by ascending `key`; equal keys keep their order."""
    order = torch.argsort(key, stable=True)
    order = order[torch.argsort(group[order], stable=True)]
    sorted_group = group[order]
    position = torch.arange(group.numel(), device=group.device)
    starts = torch.searchsorted(sorted_group, sorted_group)
    rank = torch.empty_like(position)
    rank[order] = position - starts
    return rank


def drop_duplicates(edge_index: Tensor, source: str, *, stacklevel: int = 3) -> Tensor:
    """Return the edges without repetitions, first occurrences in their order; warn with the count if any was dropped."""
    if edge_index.shape[1] == 0:
        return edge_index
    keys = edge_keys(edge_index, int(edge_index[1].max()) + 1)
    sorted_keys, order = torch.sort(keys, stable=True)
    first = torch.ones_like(sorted_keys, dtype=torch.bool)
    first[1:] = sorted_keys[1:] != sorted_keys[:-1]
    dropped = int((~first).sum())
    if dropped == 0:
        return edge_index
    warnings.warn(f"{source}: {dropped} duplicate pairs removed", UserWarning, stacklevel=stacklevel)
    return edge_index[:, torch.sort(order[first]).values]


def shifted_keys(keys: Tensor, num_items: int) -> Tensor:
    """Return u * I + (p_j - j) for the j-th positive p_j of each user, given the sorted distinct keys; ascending too."""
    user = keys.div(num_items, rounding_mode="floor")
    return keys - torch.arange(keys.numel(), device=keys.device) + torch.searchsorted(user, user)


def nth_free_item(shifted: Tensor, start: Tensor, user: Tensor, rank: Tensor, num_items: int) -> Tensor:
    """Return the item with this 0-based rank among those the user has no pair with.

    It is the rank plus the number of positives before the item, the positives p_j with p_j - j <= rank.

    Args:
        shifted: `shifted_keys` (E,) of the pairs.
        start: Position of each user's first pair among the sorted keys, of the shape of `user`.
        user: User ids, of a shape that broadcasts with `rank`.
        rank: Ranks below the number of free items of the user.
        num_items: Number of items I.
    """
    return rank + torch.searchsorted(shifted, user * num_items + rank, right=True) - start


class EdgeSet:
    """Set of (user, item) pairs with vectorised membership tests: sorted keys and binary search.

    A test costs O(log E) and runs on the device of the edges, without waiting for it.

    Args:
        edge_index: LongTensor (2, E); repeated pairs count once.
        num_items: Number of items I.

    Raises:
        ValueError: Wrong shape or dtype, num_items below 1, or ids out of range.

    Examples:
        >>> import torch
        >>> edges = EdgeSet(torch.tensor([[0, 1], [2, 0]]), num_items=3)
        >>> edges.contains(torch.tensor([0, 1]), torch.tensor([[2, 1], [1, 0]]))
        tensor([[ True, False],
                [False,  True]])
    """

    def __init__(self, edge_index: Tensor, num_items: int) -> None:
        if not num_items >= 1:
            raise ValueError(f"num_items must be at least 1, got {num_items!r}")
        check_edges("edge_index", edge_index, None, num_items)
        self.num_items = num_items
        self.keys: Tensor = torch.unique(edge_keys(edge_index, num_items))

    def __len__(self) -> int:
        return self.keys.numel()

    def __repr__(self) -> str:
        return f"EdgeSet({len(self)} pairs, num_items={self.num_items})"

    @property
    def device(self) -> torch.device:
        """Device on which the keys live and the tests run."""
        return self.keys.device

    def to(self, device: torch.device | str) -> EdgeSet:
        """Return the set on `device`; the set itself if it is there already."""
        if self.keys.device == torch.device(device):
            return self
        moved = object.__new__(EdgeSet)
        moved.num_items, moved.keys = self.num_items, self.keys.to(device)
        return moved

    def contains(self, user: Tensor, item: Tensor) -> Tensor:
        """Return which pairs are in the set.

        Args:
            user: Integer tensor of user ids, e.g. (B,).
            item: Integer tensor of item ids that broadcasts with `user`; one more dimension than `user`, e.g. (B, N)
                with users (B,), means one row of items per user. Ids outside [0, I) are in no pair.

        Returns:
            BoolTensor of the broadcast shape.

        Raises:
            ValueError: The shapes do not fit.
        """
        if item.ndim == user.ndim + 1:
            user = user.unsqueeze(-1)
        sizes = zip(reversed(user.shape), reversed(item.shape), strict=False)
        if not all(a == b or 1 in (a, b) for a, b in sizes):
            raise ValueError(f"shapes of user {tuple(user.shape)} and item {tuple(item.shape)} do not broadcast")
        keys = user.long() * self.num_items + item
        if len(self) == 0:
            return torch.zeros(keys.shape, dtype=torch.bool, device=keys.device)
        position = torch.searchsorted(self.keys, keys).clamp_(max=len(self) - 1)
        return (self.keys[position] == keys) & (item >= 0) & (item < self.num_items)
