"""Simulated users: logs to learn from, and rollouts that show what a policy earns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from recsys_losses._checks import check_finite
from recsys_losses.mcrl._losses import check_gamma

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_LONGEST = 30
_SHORTEST = 3


class RolloutReturn(NamedTuple):
    """What a policy earned, averaged over the sessions of a rollout.

    Args:
        discounted: Mean of the discounted sum of rewards.
        total: Mean of the plain sum.
    """

    discounted: float
    total: float


@dataclass
class _Users:
    """The hidden state of n sessions."""

    interest: Tensor
    wish: Tensor


class SessionSimulator:
    r"""Users with a moving interest whose purchases make further purchases from the same cluster likelier.

    Items have vectors $v_a,u_a\sim\mathcal N(0,I/k)$, a popularity $-0.6\log(\text{rank})$ in random order and a cluster
    $c_a$. A session has an interest $z\sim\mathcal N(0,I)$ and a counter $h$ per cluster, 0 at first. An event:

    $$a=\arg\max_a\;\beta\,v_a^\top z+0.5\,\mathrm{pop}_a+\mathrm{Gumbel},\qquad
    P(\text{purchase})=\sigma(\text{bias}+2\,u_a^\top z+h_{c_a})$$

    A purchase raises $h_{c_a}$ by `boost`, the delayed effect; then $z\leftarrow0.9z+0.09\sqrt k\,v_a+0.1\,\mathcal
    N(0,I)$. A session ends with probability 1 / `mean_length` after each event, or after 30; shorter than 3 events
    it is dropped.

    Args:
        num_items: I, at least 2.
        latent_dim: k.
        num_clusters: Clusters.
        beta: How strongly a click follows the interest.
        purchase_bias: Log-odds of a purchase without taste.
        boost: What a purchase adds to the log-odds of its cluster.
        mean_length: Mean number of events before short sessions are dropped, at least 1.
        seed: Seed of the items.

    Raises:
        ValueError: If a size is out of range or an option isn't finite.

    Source: written for this package; a made-up world, no model of any shop.

    Examples:
        >>> simulator = SessionSimulator(num_items=20)
        >>> sessions = simulator.logs(5, seed=1)
        >>> all(len(session) >= 3 for session in sessions)
        True
        >>> simulator.rollout(lambda histories: torch.zeros(len(histories), dtype=torch.int64), 50, seed=2).total > 0
        True
    """

    def __init__(
        self,
        num_items: int = 300,
        latent_dim: int = 8,
        num_clusters: int = 15,
        beta: float = 2.0,
        purchase_bias: float = -2.0,
        boost: float = 1.0,
        mean_length: float = 8,
        seed: int = 0,
    ) -> None:
        sizes = (("num_items", num_items, 2), ("latent_dim", latent_dim, 1), ("num_clusters", num_clusters, 1))
        for name, value, least in sizes:
            if not value >= least:
                raise ValueError(f"{name} must be >= {least}, got {value!r}")
        for name, number in (("beta", beta), ("purchase_bias", purchase_bias), ("boost", boost)):
            check_finite(name, number)
        if not 1 <= mean_length < math.inf:
            raise ValueError(f"mean_length must be a finite number >= 1, got {mean_length!r}")
        self.num_items, self.latent_dim, self.num_clusters = num_items, latent_dim, num_clusters
        self.beta, self.purchase_bias, self.boost, self.mean_length = beta, purchase_bias, boost, mean_length
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        shape, scale = (num_items, latent_dim), 1 / math.sqrt(latent_dim)
        self.click_vectors = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        self.purchase_vectors = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        rank = torch.randperm(num_items, generator=generator).double() + 1
        self.popularity = -0.6 * rank.log()
        self.cluster = torch.randint(num_clusters, (num_items,), generator=generator)

    def logs(self, n: int, seed: int) -> list[list[tuple[int, bool]]]:
        """Simulate n sessions under the logging behaviour.

        Args:
            n: Sessions to start, at least 1; those shorter than 3 events are dropped, about a quarter by default.
            seed: Seed of the sessions.

        Returns:
            Sessions of (item, is_purchase).

        Raises:
            ValueError: If `n` < 1.
        """
        generator = _generator(n, seed)
        users = self._arrive(n, generator)
        items, bought = [], []
        length = torch.full((n,), _LONGEST)
        for event in range(_LONGEST):
            item = self._click(users, generator)
            items.append(item)
            bought.append(self._buy(users, item, generator))
            self._move(users, item, generator)
            left = torch.rand(n, generator=generator, dtype=torch.float64) < 1 / self.mean_length
            length = torch.where(left, length.clamp_max(event + 1), length)
        table = zip(torch.stack(items, 1).tolist(), torch.stack(bought, 1).tolist(), length.tolist(), strict=True)
        sessions = (list(zip(a[:events], b[:events], strict=True)) for a, b, events in table)
        return [session for session in sessions if len(session) >= _SHORTEST]

    def rollout(
        self,
        policy: Callable[[list[list[int]]], Tensor],
        n: int,
        seed: int,
        gamma: float = 0.5,
        horizon: int = 6,
    ) -> RolloutReturn:
        r"""Let a policy recommend to simulated users, and count what it earns.

        After one logged event, the item of the policy is shown in each step. It is accepted with probability
        $\sigma(3v_a^\top z)$ and, if so, bought as in the logs; the reward is 0.2 for accepting and 0.8 more for buying.
        Interest and history change with accepted items alone.

        Args:
            policy: Maps n histories of item ids (oldest first) to the n items to show, int64 `(n,)`.
            n: Sessions, at least 1.
            seed: Seed of the sessions.
            gamma: Discount, in [0, 1].
            horizon: Items shown per session, at least 1.

        Returns:
            The mean discounted and the mean plain sum of rewards.

        Raises:
            ValueError: If an argument is out of range or the policy returns something else than n items.
        """
        check_gamma(gamma)
        if not horizon >= 1:
            raise ValueError(f"horizon must be >= 1, got {horizon!r}")
        generator = _generator(n, seed)
        users = self._arrive(n, generator)
        first = self._click(users, generator)
        self._buy(users, first, generator)
        self._move(users, first, generator)
        histories = [[item] for item in first.tolist()]
        rewards = torch.zeros(n, horizon, dtype=torch.float64)
        for step in range(horizon):
            item = self._shown(policy([list(history) for history in histories]), n)
            chance = (3 * (self.click_vectors[item] * users.interest).sum(1)).sigmoid()
            accepted = torch.rand(n, generator=generator, dtype=torch.float64) < chance
            bought = self._buy(users, item, generator, accepted)
            self._move(users, item, generator, accepted)
            rewards[:, step] = 0.2 * accepted + 0.8 * bought
            for row in accepted.nonzero().flatten().tolist():
                histories[row].append(int(item[row]))
        discount = gamma ** torch.arange(horizon, dtype=torch.float64)
        return RolloutReturn(float((rewards @ discount).mean()), float(rewards.sum(1).mean()))

    def _arrive(self, n: int, generator: torch.Generator) -> _Users:
        interest = torch.randn(n, self.latent_dim, generator=generator, dtype=torch.float64)
        return _Users(interest, torch.zeros(n, self.num_clusters, dtype=torch.float64))

    def _click(self, users: _Users, generator: torch.Generator) -> Tensor:
        uniform = torch.rand(len(users.interest), self.num_items, generator=generator, dtype=torch.float64)
        gumbel = -(-uniform.clamp_min(1e-300).log()).log()
        return (self.beta * users.interest @ self.click_vectors.T + 0.5 * self.popularity + gumbel).argmax(1)

    def _buy(self, users: _Users, item: Tensor, generator: torch.Generator, accepted: Tensor | None = None) -> Tensor:
        """Return who buys the item, and raise their wish for its cluster."""
        rows, cluster = torch.arange(len(item)), self.cluster[item]
        taste = 2 * (self.purchase_vectors[item] * users.interest).sum(1)
        chance = (self.purchase_bias + taste + users.wish[rows, cluster]).sigmoid()
        bought = torch.rand(len(item), generator=generator, dtype=torch.float64) < chance
        bought = bought if accepted is None else bought & accepted
        users.wish[rows, cluster] += self.boost * bought
        return bought

    def _move(self, users: _Users, item: Tensor, generator: torch.Generator, accepted: Tensor | None = None) -> None:
        noise = torch.randn(users.interest.shape, generator=generator, dtype=torch.float64)
        pull = 0.09 * math.sqrt(self.latent_dim) * self.click_vectors[item]
        moved = 0.9 * users.interest + pull + 0.1 * noise
        users.interest = moved if accepted is None else torch.where(accepted.unsqueeze(1), moved, users.interest)

    def _shown(self, items: Tensor, n: int) -> Tensor:
        items = torch.as_tensor(items).cpu()
        if items.shape != (n,) or items.is_floating_point():
            raise ValueError(f"the policy must return {n} item ids, got {items.dtype} {tuple(items.shape)}")
        if int(items.min()) < 0 or int(items.max()) >= self.num_items:
            raise ValueError(f"the policy showed an item outside [0, {self.num_items})")
        return items


def _generator(n: int, seed: int) -> torch.Generator:
    if not n >= 1:
        raise ValueError(f"n must be >= 1, got {n!r}")
    return torch.Generator().manual_seed(seed)
