r"""CPR, cross pairwise ranking: a loss in which the exposure of users and items cancels, without propensities.

A k-sample is a cycle of k observed pairs $(u_1,i_1),\dots,(u_k,i_k)$ whose crossed pairs $(u_j,i_{j+1})$,
$i_{k+1}=i_1$, were not observed. The sum of the observed scores is compared with the sum after every user got the
item of the next pair:

$$m=\frac1k\sum_{j=1}^k s(u_j,i_j)-\frac1k\sum_{j=1}^k s(u_j,i_{j+1}),\qquad L=\mathrm{mean}\,\log(1+e^{-m}).$$

Every user and every item occurs once with plus and once with minus, so that $s(u,i)+a_u+b_i$ has the same margins as
$s(u,i)$: under the exposure model $P(O=1|R=1)=p_u\,p_i\,P(R=1)^\alpha$ the propensities are such terms. Scores are raw
dot products; cosines would break the cancellation. Several times as many samples as needed are drawn and the hardest
ones kept.

Qi Wan, Xiangnan He, Xiang Wang, Jiancan Wu, Wei Guo, Ruiming Tang. Cross Pairwise Ranking for Unbiased Item
Recommendation. WWW 2022. arXiv 2204.12176. See docs/papers/recsys-losses/cpr.md.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from recsys_losses._checks import check_reduction, reduce, upcast
from recsys_losses._interactions import EdgeSet, check_edges, drop_duplicates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from recsys_losses._checks import Reduction

__all__ = ["CPRLoss", "CPRSampler", "cpr_batch_sizes", "cpr_loss", "cpr_scores", "filter_cpr_candidates"]

CPRBatch = dict[int, tuple[Tensor, Tensor]]

# Edges drawn at once: enough to hide the cost of a call, few enough for the arrays to stay in the cache.
_BLOCK_EDGES = 1 << 18


def cpr_loss(pos_score: Tensor, neg_score: Tensor, *, keep: int | None = None, reduction: Reduction = "mean") -> Tensor:
    r"""Cross pairwise ranking loss of the hardest samples (Eq. 8 and 14; selection as in the official code).

    $$L=\mathrm{mean}_{s\in\mathrm{kept}}\log\big(1+e^{-(s^{+}-s^{-})}\big)$$

    Kept are the `keep` samples with the smallest margins, of all k together; only they get a gradient.

    Args:
        pos_score: Mean score of the observed pairs of each sample, shape `(S,)`, floating.
        neg_score: Mean score of its crossed pairs, shape `(S,)`, same dtype and device.
        keep: How many samples to keep, in [1, S]; None keeps all.
        reduction: `"none"` gives shape `(keep,)`, smallest margin first if `keep` is given; the others a scalar.

    Returns:
        Loss in the dtype of `pos_score`; half-precision inputs are reduced in float32.

    Raises:
        ValueError: If the shapes differ or are empty, `keep` is out of range, or `reduction` is unknown.

    Examples:
        >>> import torch
        >>> cpr_loss(torch.tensor([1.0, 3.0]), torch.tensor([1.0, -2.0]), keep=1)
        tensor(0.6931)
    """
    if pos_score.ndim != 1 or pos_score.shape != neg_score.shape or pos_score.shape[0] == 0:
        raise ValueError(
            "expected pos_score (S,) and neg_score (S,) with S >= 1, "
            f"got {tuple(pos_score.shape)} and {tuple(neg_score.shape)}"
        )
    check_reduction(reduction)
    margin = upcast(pos_score) - upcast(neg_score)
    if keep is not None:
        margin = margin[_hardest(margin, keep)]
    return reduce(F.softplus(-margin), reduction, pos_score.dtype)


def cpr_scores(user_emb: Tensor, item_emb: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean dot products of the observed and of the crossed pairs of each sample (Eq. 14).

    $$s^{+}=\frac1k\sum_j u_j^\top i_j,\qquad s^{-}=\frac1k\sum_j u_j^\top i_{j+1},\qquad i_{k+1}=i_1$$

    Args:
        user_emb: Vectors of $u_1..u_k$, shape `(k, n, d)`, k at least 2, floating. Not normalised.
        item_emb: Vectors of $i_1..i_k$, shape `(k, n, d)`, same dtype and device.

    Returns:
        `pos_score` and `neg_score`, shape `(n,)` each, dtype of `user_emb`.

    Raises:
        ValueError: If the shapes differ, aren't three-dimensional, or k < 2.

    Examples:
        >>> import torch
        >>> one = torch.eye(2).reshape(2, 1, 2)
        >>> cpr_scores(one, one)
        (tensor([1.]), tensor([0.]))
    """
    if user_emb.ndim != 3 or user_emb.shape != item_emb.shape:
        raise ValueError(
            f"expected user_emb and item_emb (k, n, d), got {tuple(user_emb.shape)} and {tuple(item_emb.shape)}"
        )
    _check_k(user_emb.shape[0])
    pos, neg = _cycle_scores(upcast(user_emb), upcast(item_emb), _dot, 1.0 / user_emb.shape[0])
    return pos.to(user_emb.dtype), neg.to(user_emb.dtype)


def cpr_batch_sizes(
    batch_size: int,
    sample_ratio: float = 3.0,
    max_k: int = 3,
    sample_rate: float = 1.0,
    fixed_k: int | None = None,
) -> list[int]:
    r"""How many samples of each k a batch draws (official code).

    The shares of k = 2..max_k are as $r^{K-2},\dots,r,1$ with $r$ = `sample_ratio` and $K$ = `max_k`; they are
    rounded, the last k takes what is left of `batch_size`, and each is multiplied by `sample_rate` and rounded up.

    Args:
        batch_size: Samples that are kept per step, at least 1.
        sample_ratio: $r>0$, how many samples of k there are for one of k + 1.
        max_k: Longest cycle, at least 2.
        sample_rate: Samples drawn for one that is kept, at least 1.
        fixed_k: Only cycles of this length, in [2, max_k].

    Returns:
        Sizes for k = 2..max_k; zeros are possible.

    Raises:
        ValueError: If an argument is out of range, or `batch_size` is too small for so many k.

    Examples:
        >>> cpr_batch_sizes(2048, sample_rate=3.0)
        [4608, 1536]
    """
    if not batch_size >= 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size!r}")
    if not (sample_ratio > 0 and math.isfinite(sample_ratio)):
        raise ValueError(f"sample_ratio must be a positive finite number, got {sample_ratio!r}")
    if not max_k >= 2:
        raise ValueError(f"max_k must be >= 2, got {max_k!r}")
    if not (sample_rate >= 1 and math.isfinite(sample_rate)):
        raise ValueError(f"sample_rate must be a finite number >= 1, got {sample_rate!r}")
    if fixed_k is not None:
        if not 2 <= fixed_k <= max_k:
            raise ValueError(f"fixed_k must be in [2, max_k={max_k}], got {fixed_k!r}")
        return [math.ceil(batch_size * sample_rate) if k == fixed_k else 0 for k in range(2, max_k + 1)]
    shares = [sample_ratio**power for power in range(max_k - 2, -1, -1)]
    sizes = [round(batch_size * share / sum(shares)) for share in shares[:-1]]
    sizes.append(batch_size - sum(sizes))
    if sizes[-1] < 0:
        raise ValueError(f"batch_size={batch_size} is too small for max_k={max_k} with sample_ratio={sample_ratio}")
    return [math.ceil(size * sample_rate) for size in sizes]


def filter_cpr_candidates(edge_index: Tensor, candidates: Tensor, *, num_samples: int) -> tuple[Tensor, Tensor]:
    r"""Keep the first candidates whose crossed pairs were not observed (official sampler, same order).

    Candidate c is the cycle of the edges `candidates[:, c]`; it is accepted if no $(u_j, i_{j+1})$ is in
    `edge_index`. The scan is a mask over all candidates, not a loop.

    Args:
        edge_index: Train pairs, int64, shape `(2, E)`: users, then items (not offset).
        candidates: Edge numbers in [0, E), int64, shape `(k, C)`, k at least 2.
        num_samples: How many accepted candidates to return at most, at least 1.

    Returns:
        Users and items of the accepted cycles, shape `(k, n)` each, n <= `num_samples`.

    Raises:
        ValueError: If a shape, a dtype, an id or an edge number is out of range, or `num_samples` < 1.

    Examples:
        >>> import torch
        >>> edges = torch.tensor([[0, 0, 1], [0, 1, 2]])
        >>> filter_cpr_candidates(edges, torch.tensor([[0, 1], [1, 2]]), num_samples=2)
        (tensor([[0],
                [1]]), tensor([[1],
                [2]]))
    """
    check_edges("edge_index", edge_index)
    if candidates.ndim != 2 or candidates.dtype != torch.int64:
        raise ValueError(f"candidates must be int64 (k, C), got {candidates.dtype} {tuple(candidates.shape)}")
    _check_k(candidates.shape[0])
    if not num_samples >= 1:
        raise ValueError(f"num_samples must be >= 1, got {num_samples!r}")
    if candidates.shape[1] == 0:
        return candidates, candidates
    low, high = (int(x) for x in candidates.aminmax())
    if low < 0 or high >= edge_index.shape[1]:
        raise ValueError(f"candidates must be in [0, E={edge_index.shape[1]}), got numbers from {low} to {high}")
    edges = EdgeSet(edge_index, int(edge_index[1].max()) + 1)
    return _accept(edges, edge_index, candidates, num_samples)


class CPRSampler(IterableDataset[CPRBatch]):
    r"""Draws the cycles of one epoch, batch by batch; the accepted ones follow the law of the official sampler.

    Edges are drawn uniformly with replacement, so users by activity and items by popularity; cycles with an observed
    crossed pair are rejected. Cycles are independent, hence many steps are drawn at once, tested by binary search in
    sorted keys, and cut into batches. Unlike the official code, which fails when fewer than half of the candidates
    pass, it redraws until there are enough.

    Iterate once per epoch, or give it to a `DataLoader` with `batch_size=None` and no workers (they would all draw
    the same). On several processes use a generator with another seed on each.

    Args:
        edge_index: Train pairs, int64, shape `(2, E)`; duplicates are removed with a warning.
        num_users: U.
        num_items: I.
        batch_size: Samples per step before `sample_rate`; an epoch has E // `batch_size` steps.
        sample_ratio: See `cpr_batch_sizes`.
        max_k: Longest cycle.
        sample_rate: Samples drawn for one that `CPRLoss` keeps.
        fixed_k: Only cycles of this length.
        generator: Source of randomness, torch's default one if None. Numbers are drawn on its device.
        max_rounds: How often candidates are drawn for the same steps, at least 1; a round draws at most twice as
            many as are needed.
        device: Where the cycles are tested and returned.

    Raises:
        ValueError: If an argument is out of range, or there are fewer edges than `batch_size`.

    Examples:
        >>> import torch
        >>> edges = torch.arange(8).repeat(2, 1)
        >>> sampler = CPRSampler(edges, 8, 8, batch_size=4, sample_rate=1.0, generator=torch.Generator().manual_seed(0))
        >>> {k: tuple(users.shape) for k, (users, items) in next(iter(sampler)).items()}
        {2: (2, 3), 3: (3, 1)}
    """

    def __init__(
        self,
        edge_index: Tensor,
        num_users: int,
        num_items: int,
        *,
        batch_size: int = 2048,
        sample_ratio: float = 3.0,
        max_k: int = 3,
        sample_rate: float = 3.0,
        fixed_k: int | None = None,
        generator: torch.Generator | None = None,
        max_rounds: int = 20,
        device: torch.device | str = "cpu",
    ) -> None:
        check_edges("edge_index", edge_index, num_users, num_items)
        if not max_rounds >= 1:
            raise ValueError(f"max_rounds must be >= 1, got {max_rounds!r}")
        sizes = cpr_batch_sizes(batch_size, sample_ratio, max_k, sample_rate, fixed_k)
        self.edge_index = drop_duplicates(edge_index, "edge_index").to(device)
        self.batch_size = batch_size
        if len(self) == 0:
            raise ValueError(f"batch_size={batch_size} exceeds the number of distinct edges {self.edge_index.shape[1]}")
        self.sizes = {k: size for k, size in enumerate(sizes, start=2) if size > 0}
        self.generator = generator
        self.max_rounds = max_rounds
        self._edges = EdgeSet(self.edge_index, num_items)

    def __len__(self) -> int:
        return self.edge_index.shape[1] // self.batch_size

    def __repr__(self) -> str:
        return f"CPRSampler({self.edge_index.shape[1]} edges, {len(self)} steps, samples per step {self.sizes})"

    def __iter__(self) -> Iterator[CPRBatch]:
        """Yield `{k: (users, items)}` with users and items int64 `(k, n_k)`, one dict per step.

        Raises:
            RuntimeError: If too few candidates are accepted in `max_rounds` rounds.
        """
        per_step = sum(k * size for k, size in self.sizes.items())
        block = max(1, _BLOCK_EDGES // per_step)
        # Local to the epoch: the stream depends on the state of the generator alone.
        rates = dict.fromkeys(self.sizes, 1.0)
        for start in range(0, len(self), block):
            steps = min(block, len(self) - start)
            drawn = {k: self._draw(k, size * steps, rates) for k, size in self.sizes.items()}
            for step in range(steps):
                yield {
                    k: (
                        users[:, step * self.sizes[k] : (step + 1) * self.sizes[k]],
                        items[:, step * self.sizes[k] : (step + 1) * self.sizes[k]],
                    )
                    for k, (users, items) in drawn.items()
                }

    def _draw(self, k: int, needed: int, rates: dict[int, float]) -> tuple[Tensor, Tensor]:
        """Return `needed` accepted cycles of length k; `rates` holds the acceptance rates seen so far."""
        parts: list[tuple[Tensor, Tensor]] = []
        found, tried = 0, 0
        for _ in range(self.max_rounds):
            missing = needed - found
            count = min(2 * needed, math.ceil(1.05 * missing / rates[k]) + 8)
            users, items = _accept(self._edges, self.edge_index, self._candidates(k, count), missing)
            parts.append((users, items))
            found += users.shape[1]
            tried += count
            if found == needed:
                break
            # The round ended short, so everything it accepted was counted.
            rates[k] = max(found / tried, 1 / (2 * self.max_rounds))
        else:
            raise RuntimeError(
                f"k={k}: only {found} of {needed} cycles found in {self.max_rounds} rounds, acceptance rate "
                f"{found / tried:.4f}; the graph is too dense for cycles of this length, lower max_k (or fixed_k)"
            )
        if len(parts) == 1:
            return parts[0]
        return torch.cat([users for users, _ in parts], dim=1), torch.cat([items for _, items in parts], dim=1)

    def _candidates(self, k: int, count: int) -> Tensor:
        device = self.edge_index.device
        source = device if self.generator is None else self.generator.device
        drawn = torch.randint(self.edge_index.shape[1], (k, count), generator=self.generator, device=source)
        return drawn.to(device)


class CPRLoss(nn.Module):
    r"""`cpr_loss` of a batch of cycles: scores all of them without a graph, then the kept ones with gradients.

    Equal to `cpr_loss` of all scores with the same `keep`, at the memory and backward time of `keep` samples. The
    samples of all k compete in one pool, as in the official code.

    Args:
        keep: How many samples to keep; None keeps all.

    Raises:
        ValueError: If `keep` < 1.

    Examples:
        >>> import torch
        >>> users = items = torch.tensor([[0], [1]])
        >>> CPRLoss()({2: (users, items)}, torch.eye(2), torch.eye(2))
        tensor(0.3133)
    """

    def __init__(self, keep: int | None = None) -> None:
        super().__init__()
        if keep is not None and not keep >= 1:
            raise ValueError(f"keep must be >= 1, got {keep!r}")
        self.keep = keep

    def forward(
        self,
        batch: Mapping[int, tuple[Tensor, Tensor]],
        user_emb: Tensor,
        item_emb: Tensor,
        score_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return the mean loss of the kept samples.

        Args:
            batch: `{k: (users, items)}`, int64 `(k, n_k)` each, as `CPRSampler` yields.
            user_emb: Final user table, shape `(U, d)`, floating. Not normalised.
            item_emb: Final item table, shape `(I, d)`.
            score_fn: Scores of user vectors `(..., d)` and item vectors `(..., d)`, shape `(...)`; it must give the
                same for the same pair in a call. None is the dot product.

        Returns:
            Scalar in the dtype of `user_emb`.

        Raises:
            ValueError: If `batch` is empty, a shape doesn't match its k, or `keep` exceeds the number of samples.
        """
        total = _check_batch(batch)
        score = score_fn or _dot
        if self.keep is not None and self.keep != total:
            with torch.no_grad():
                scores = [self._scores(u, i, user_emb, item_emb, score, 1.0 / k) for k, (u, i) in batch.items()]
                margin = torch.cat([pos - neg for pos, neg in scores])
                kept = _hardest(margin, self.keep)
            users, items, weight = _padded(batch, margin.dtype)
            pairs = [self._scores(users[:, kept], items[:, kept], user_emb, item_emb, score, weight[:, kept])]
        else:
            pairs = [self._scores(u, i, user_emb, item_emb, score, 1.0 / k) for k, (u, i) in batch.items()]
        pos_score, neg_score = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        return cpr_loss(pos_score, neg_score).to(user_emb.dtype)

    def extra_repr(self) -> str:
        return f"keep={self.keep}"

    @staticmethod
    def _scores(
        users: Tensor,
        items: Tensor,
        user_emb: Tensor,
        item_emb: Tensor,
        score: Callable[[Tensor, Tensor], Tensor],
        weight: Tensor | float,
    ) -> tuple[Tensor, Tensor]:
        # F.embedding: its backward is several times faster than that of indexing.
        user, item = F.embedding(users, user_emb), F.embedding(items, item_emb)
        return _cycle_scores(upcast(user), upcast(item), score, weight)


def _dot(user: Tensor, item: Tensor) -> Tensor:
    return (user * item).sum(dim=-1)


def _cycle_scores(
    user: Tensor, item: Tensor, score: Callable[[Tensor, Tensor], Tensor], weight: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Return the weighted sums over the cycle (k, n, d) of the observed and of the crossed scores."""
    crossed = item.roll(-1, dims=0)
    return (weight * score(user, item)).sum(dim=0), (weight * score(user, crossed)).sum(dim=0)


def _hardest(margin: Tensor, keep: int) -> Tensor:
    """Return the positions of the `keep` smallest margins, smallest first."""
    if not keep >= 1:
        raise ValueError(f"keep must be >= 1, got {keep!r}")
    if keep > margin.shape[0]:
        raise ValueError(f"keep={keep} exceeds the number of samples {margin.shape[0]}")
    return margin.detach().topk(keep, largest=False).indices


def _check_k(k: int) -> None:
    if k < 2:
        raise ValueError(f"a cycle needs k >= 2 pairs, got k={k}")


def _check_batch(batch: Mapping[int, tuple[Tensor, Tensor]]) -> int:
    """Return the number of samples of all k."""
    for k, (users, items) in batch.items():
        _check_k(k)
        if users.ndim != 2 or users.shape[0] != k or users.shape != items.shape:
            raise ValueError(
                f"k={k}: expected users and items ({k}, n), got {tuple(users.shape)} and {tuple(items.shape)}"
            )
    total = sum(users.shape[1] for users, _ in batch.values())
    if total == 0:
        raise ValueError("batch holds no samples")
    return total


def _padded(batch: Mapping[int, tuple[Tensor, Tensor]], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Bring the cycles of all k to the longest by going round again with weight 0.

    Which k the kept samples have is known on the device only; with one length for all, nothing has to wait for it.
    """
    longest = max(batch)
    columns = []
    for k, (users, items) in batch.items():
        slots = [slot % k for slot in range(longest)]
        weight = torch.zeros(longest, users.shape[1], dtype=dtype, device=users.device)
        weight[:k] = 1.0 / k
        columns.append((users[slots], items[slots], weight))
    users, items, weight = (torch.cat(parts, dim=1) for parts in zip(*columns, strict=True))
    return users, items, weight


def _accept(edges: EdgeSet, edge_index: Tensor, candidates: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Return users and items (k, n) of the first `limit` candidates without an observed crossed pair."""
    k, count = candidates.shape
    # index_select is several times faster than indexing on the CPU.
    users, items = (row.index_select(0, candidates.reshape(-1)).view(k, count) for row in edge_index)
    rejected = edges.contains(users, items.roll(-1, dims=0)).any(dim=0)
    accepted = (~rejected).nonzero().squeeze(1)[:limit]
    return users.index_select(1, accepted), items.index_select(1, accepted)
