"""Negative sampling: uniform, uniform without positives, shared, popularity^beta, and the in-batch law.

Everything is vectorised, runs on the device of the batch and is determined by the generator. Rows of a batch are
users (B,); a sampler returns item ids (B, N), or (N,) when one set of negatives is shared by the whole batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from recsys_losses._interactions import EdgeSet, count_ids, nth_free_item, shifted_keys

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["EdgeSet", "PopularityNegativeSampler", "UniformNegativeSampler", "in_batch_log_q", "item_counts"]


def item_counts(edge_index: Tensor, num_items: int) -> Tensor:
    """Return how often each item occurs in the edges.

    Args:
        edge_index: LongTensor (2, E) of (user, item) pairs.
        num_items: Number of items I.

    Returns:
        LongTensor (I,), zeros for items without an edge.

    Raises:
        ValueError: `edge_index` is not (2, E) or an item id is out of range.

    Examples:
        >>> import torch
        >>> item_counts(torch.tensor([[0, 1, 1], [2, 0, 2]]), num_items=4)
        tensor([1, 0, 2, 0])
    """
    if edge_index.ndim != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"edge_index must have shape (2, E), got {tuple(edge_index.shape)}")
    counts = count_ids(edge_index[1], num_items)
    if counts.numel() != num_items:
        raise ValueError(f"edge_index holds an item id that is not below num_items={num_items}")
    return counts


def in_batch_log_q(item_count: Tensor) -> Tensor:
    r"""Return the log-probability of each item under the in-batch law, for the logQ correction.

    Negatives that are the positives of other rows follow the train frequency:
    $$\log q_i = \log\frac{c_i}{\sum_j c_j}.$$

    Args:
        item_count: (I,) train pairs per item, at least one of them positive.

    Returns:
        (I,) tensor of the default dtype; -inf for items that never occur and so are never drawn.

    Raises:
        ValueError: `item_count` is not a non-empty vector or all counts are zero.

    Source: SSM (Wu et al., TOIS 2024, arXiv 2201.02327), in-batch sampling distribution.

    Examples:
        >>> import torch
        >>> in_batch_log_q(torch.tensor([1, 3])).exp()
        tensor([0.2500, 0.7500])
    """
    return _log_law(item_count, 1.0).to(torch.get_default_dtype())


class UniformNegativeSampler:
    r"""Draws items uniformly with replacement, from all items or from those the user has not interacted with.

    With `exclude`, the draw is exact and needs no rejection: a rank $r$ uniform over the free items of the user is
    turned into an item by counting the positives before it. For the user's sorted positives $p_0 < p_1 < \dots$
    $$\text{item} = r + \#\{j : p_j - j \le r\},$$
    one binary search per draw, for users of any density.

    Args:
        num_items: Number of items I.
        exclude: LongTensor (2, E) of pairs never returned as negatives, usually the train pairs; None excludes nothing.
        shared: One set of N negatives for the whole batch; cannot be combined with `exclude`.
        generator: Source of randomness; None uses torch's default generator.

    Raises:
        ValueError: num_items below 1, `exclude` malformed, or `shared` together with `exclude`.

    Examples:
        >>> import torch
        >>> train = torch.tensor([[0, 0, 1], [0, 1, 2]])
        >>> sampler = UniformNegativeSampler(3, exclude=train, generator=torch.Generator().manual_seed(0))
        >>> sampler.sample(torch.tensor([0, 0]), 3)
        tensor([[2, 2, 2],
                [2, 2, 2]])
    """

    def __init__(
        self,
        num_items: int,
        *,
        exclude: Tensor | None = None,
        shared: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        if not num_items >= 1:
            raise ValueError(f"num_items must be at least 1, got {num_items!r}")
        if shared and exclude is not None:
            raise ValueError("shared=True cannot be combined with exclude: shared negatives belong to no single user")
        self.num_items = num_items
        self.shared = shared
        self.generator = generator
        self._shifted: Tensor | None = None
        if exclude is not None:
            keys = EdgeSet(exclude, num_items).keys
            count = count_ids(keys // num_items, 1)
            self._shifted = shifted_keys(keys, num_items)
            # Positions of each user's pairs; the last entry serves users beyond the last one that has any.
            self._start = torch.cat((count.new_zeros(1), count.cumsum(0), count.new_full((1,), keys.numel())))
            self._some_user_full = bool((count == num_items).any())

    def __repr__(self) -> str:
        pairs = None if self._shifted is None else f"{self._shifted.numel()} pairs"
        return f"UniformNegativeSampler(num_items={self.num_items}, exclude={pairs}, shared={self.shared})"

    def sample(self, user: Tensor, n: int) -> Tensor:
        """Draw `n` negatives per user, or `n` for the whole batch if `shared`.

        Args:
            user: Integer tensor (B,) of user ids; its device is the device of the result.
            n: Number of negatives N, at least 1.

        Returns:
            LongTensor (B, N), or (N,) if `shared`.

        Raises:
            ValueError: `user` is not a vector of non-negative ids, n below 1, or a user has interacted with all items.
        """
        _check_request(user, n)
        if self.shared:
            return self._randint((n,), user.device)
        shape = (user.shape[0], n)
        if self._shifted is None:
            return self._randint(shape, user.device)
        if self._shifted.device != user.device:
            self._shifted, self._start = self._shifted.to(user.device), self._start.to(user.device)
        return self._sample_free(self._shifted, user.long(), shape)

    def _randint(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        source = self.generator.device if self.generator is not None else device
        return torch.randint(self.num_items, shape, generator=self.generator, device=source).to(device)

    def _sample_free(self, shifted: Tensor, user: Tensor, shape: tuple[int, int]) -> Tensor:
        row = user.clamp(max=self._start.numel() - 2)
        start = self._start[row]
        free = self.num_items - self._start[row + 1] + start
        if self._some_user_full and bool((free == 0).any()):
            raise ValueError(f"user {int(user[free == 0][0])} has interacted with all items; no negative can be drawn")
        rank = (_rand(shape, self.generator, user.device) * free.unsqueeze(1)).long()
        return nth_free_item(shifted, start.unsqueeze(1), user.unsqueeze(1), rank, self.num_items)


class PopularityNegativeSampler:
    r"""Draws items in proportion to a power of their popularity, $q_i \propto c_i^\beta$.

    Inversion of the cumulative sum, O(log I) per draw for catalogues of any size; beta 0 is uniform over all items,
    beta 1 the in-batch law. Items with count 0 are never drawn for beta > 0.

    Args:
        item_count: (I,) train pairs per item.
        beta: Exponent, at least 0.
        shared: One set of N negatives for the whole batch (default).
        generator: Source of randomness; None uses torch's default generator.

    Raises:
        ValueError: Counts not a non-empty vector, negative, not finite or all zero, or beta negative or not finite.

    Source: SSM (Wu et al., TOIS 2024, arXiv 2201.02327), popularity-based negatives.

    Examples:
        >>> import torch
        >>> sampler = PopularityNegativeSampler(torch.tensor([1, 0, 4]), beta=0.5)
        >>> sampler.sample(torch.arange(8), 5).shape
        torch.Size([5])
        >>> sampler.log_prob(torch.tensor([0, 2])).exp()
        tensor([0.3333, 0.6667])
    """

    def __init__(
        self,
        item_count: Tensor,
        *,
        beta: float = 1.0,
        shared: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        self._log_q = _log_law(item_count, beta)
        self._cumulative = self._log_q.exp().cumsum(0)
        self._total = float(self._cumulative[-1])
        self.num_items = item_count.shape[0]
        self.beta = beta
        self.shared = shared
        self.generator = generator

    def __repr__(self) -> str:
        return f"PopularityNegativeSampler(num_items={self.num_items}, beta={self.beta}, shared={self.shared})"

    def sample(self, user: Tensor, n: int) -> Tensor:
        """Draw `n` negatives for the whole batch, or per user if not `shared`.

        Args:
            user: Integer tensor (B,) of user ids; gives the batch size and the device of the result.
            n: Number of negatives N, at least 1.

        Returns:
            LongTensor (N,), or (B, N) if not `shared`.

        Raises:
            ValueError: `user` is not a vector of non-negative ids or n below 1.
        """
        _check_request(user, n)
        if self._cumulative.device != user.device:
            self._cumulative = self._cumulative.to(user.device)
        shape = (n,) if self.shared else (user.shape[0], n)
        return torch.searchsorted(self._cumulative, _rand(shape, self.generator, user.device) * self._total, right=True)

    def log_prob(self, items: Tensor) -> Tensor:
        """Return the log-probability of drawing each item, for the logQ correction.

        Args:
            items: Integer tensor of item ids in [0, I), any shape.

        Returns:
            Tensor of the default dtype and the shape of `items`; -inf for items that are never drawn.

        Raises:
            ValueError: `items` is not an integer tensor, or (on the CPU) an id is out of range.
        """
        _check_ids("items", items, self.num_items)
        if self._log_q.device != items.device:
            self._log_q = self._log_q.to(items.device)
        return self._log_q[items].to(torch.get_default_dtype())


def _log_law(item_count: Tensor, beta: float) -> Tensor:
    """Return log q (I,) in float64 for q proportional to count^beta."""
    if item_count.ndim != 1 or item_count.shape[0] == 0:
        raise ValueError(f"item_count must be a non-empty vector (I,), got shape {tuple(item_count.shape)}")
    if not 0 <= beta < float("inf"):
        raise ValueError(f"beta must be a finite number of at least 0, got {beta!r}")
    count = item_count.double()
    if not bool(((count >= 0) & (count < float("inf"))).all()):
        raise ValueError("item_count must hold finite numbers of at least 0")
    if beta == 0:
        return torch.log_softmax(torch.zeros_like(count), dim=0)
    if not bool((count > 0).any()):
        raise ValueError("item_count holds only zeros; no item can be drawn")
    return torch.log_softmax(beta * count.log(), dim=0)


def _rand(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Draw uniform float64 numbers in [0, 1) where the generator lives and return them on `device`."""
    source = generator.device if generator is not None else device
    # float64: below 2^53 the product with a count or total stays strictly below it, so no index can overrun
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=source).to(device)


def _check_request(user: Tensor, n: int) -> None:
    if user.ndim != 1:
        raise ValueError(f"user must have shape (B,), got {tuple(user.shape)}")
    if not n >= 1:
        raise ValueError(f"n must be at least 1, got {n!r}")
    _check_ids("user", user, None)


def _check_ids(name: str, ids: Tensor, size: int | None) -> None:
    """Check dtype everywhere, the range on the CPU only, where it costs no synchronisation."""
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be an int64 or int32 tensor, got {ids.dtype}")
    if ids.device.type != "cpu" or ids.numel() == 0:
        return
    low, high = (int(x) for x in ids.aminmax())
    if low < 0:
        raise ValueError(f"{name} holds the negative id {low}; ids start at 0")
    if size is not None and high >= size:
        raise ValueError(f"{name} holds the id {high}, which is not below {size}")
