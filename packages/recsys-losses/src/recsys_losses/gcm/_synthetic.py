"""Generated interactions with contexts that matter, and the scores that generated them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from recsys_losses.gcm._data import ITEMS, LAST, TEST, TRAIN, USERS, ContextDataset

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

_CANDIDATES = 100
_SPREAD = 1.6  # of the latent vectors, over sqrt(dim)
_LAST_WEIGHT = 0.5
_POPULARITY_POWER, _POPULARITY_WEIGHT = 0.8, 0.3
_CONCENTRATION = 0.3  # of the Dirichlet that a user's contexts come from


@dataclass(frozen=True, eq=False)
class SyntheticContexts:
    """Generated interactions together with what generated them.

    Args:
        data: The interactions; the last one of every user is the test interaction.
        test_scores: True scores of all graph items for the test interactions, float64 `(T, I)`, before the noise of
            the choice. Ranking by them is the Bayes ranking: no model can do better on average.
    """

    data: ContextDataset
    test_scores: Tensor

    def bayes_metrics(self, *, ks: Sequence[int] = (10, 50), mask_target: bool = True) -> dict[str, float]:
        """Return the leave-one-out metrics of the true scores; arguments as in `ContextDataset.leave_one_out_metrics`."""
        done = 0

        def score(users: Tensor, contexts: Tensor) -> Tensor:
            nonlocal done
            done += len(users)
            return self.test_scores[done - len(users) : done]

        return self.data.leave_one_out_metrics(score, ks=ks, mask_target=mask_target)

    def write(self, directory: str | os.PathLike[str]) -> Path:
        """Write the four files that `ContextDataset.from_files` reads, each as a whole or not at all.

        Args:
            directory: Folder, created if absent.

        Returns:
            The folder.

        Examples:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     made = make_context_data(num_users=20, num_items=30, num_interactions=200)
            ...     data = ContextDataset.from_files(made.write(folder))
            >>> data.train.shape == made.data.train.shape
            True
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, events in ((TRAIN, self.data.train), (TEST, self.data.test)):
            _write(directory / name, _table(self.data, events))
        _write(directory / USERS, repr({f"u{n}": n for n in range(self.data.num_users)}) + "\n")
        _write(directory / ITEMS, repr({f"i{n}": n for n in range(self.data.num_items)}) + "\n")
        return directory


def make_context_data(
    num_users: int = 600,
    num_items: int = 400,
    num_interactions: int = 12000,
    context_cards: Sequence[int] = (20, 12, 24, 7),
    user_cards: Sequence[int] = (8, 5),
    item_cards: Sequence[int] = (10, 5, 2),
    dim: int = 8,
    seed: int = 0,
) -> SyntheticContexts:
    r"""Generate interactions whose context matters, with known scores.

    Ids, feature values, context values and, apart, the roles of items as the previous item have latent vectors from
    $N(0,1.6^2/\text{dim})$. A user's vector $u$ is that of the id plus those of the features, an item's $v$ likewise. In
    time order, each of the $\max(5,\text{Poisson}(n/U))$ events of a user draws the values $c$ of its context fields from
    the user's own Dirichlet(0.3) distributions, scores the items by

    $$s_i=v_i\cdot\Big(u+\sum_f c_f+\tfrac12\,\text{last}_j\Big)+0.3\,\text{pop}_i,\qquad
    \text{pop}_i=-0.8\log\text{rank}_i,$$

    j the item of the event before (item 0 for the first; ranks in random order), and takes the item with the largest
    score plus Gumbel noise among 100 that are drawn uniformly. The last event of a user is the test event.

    Items that nobody takes are renumbered to the end, so that the others are the graph items.

    Args:
        num_users: U, >= 1.
        num_items: Items, >= 2.
        num_interactions: n, about how many events there are, >= 1.
        context_cards: Number of values of each context field but the last item, each >= 1.
        user_cards: Number of values of each user feature; empty for none.
        item_cards: Number of values of each item feature; empty for none.
        dim: Latent dimensions, >= 1.
        seed: Seed of everything.

    Returns:
        The data, with a writer of files, and the true scores of the test events.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> made = make_context_data(num_users=20, num_items=30, num_interactions=200)
        >>> made.data.test.shape
        torch.Size([3, 20])
    """
    for name, size, least in (
        ("num_users", num_users, 1),
        ("num_items", num_items, 2),
        ("num_interactions", num_interactions, 1),
        ("dim", dim, 1),
        *((name, card, 1) for name, cards in _named(context_cards, user_cards, item_cards) for card in cards),
    ):
        if not size >= least:
            raise ValueError(f"{name} must be at least {least}, got {size!r}")
    rng = np.random.default_rng(seed)
    world = _World.draw(rng, num_users, num_items, context_cards, user_cards, item_cards, dim)
    count = np.maximum(5, rng.poisson(num_interactions / num_users, num_users))
    users, items, values = _events(rng, world, count, context_cards)
    return _assemble(world, users, items, values)


def _named(*cards: Sequence[int]) -> tuple[tuple[str, Sequence[int]], ...]:
    return tuple(zip(("context_cards", "user_cards", "item_cards"), cards, strict=True))


@dataclass(frozen=True)
class _World:
    """Latent vectors and features."""

    user: Floats
    item: Floats
    last: Floats
    context: Floats
    popularity: Floats
    user_features: Ints
    item_features: Ints
    sizes: tuple[int, int, int]

    @classmethod
    def draw(
        cls,
        rng: np.random.Generator,
        num_users: int,
        num_items: int,
        context_cards: Sequence[int],
        user_cards: Sequence[int],
        item_cards: Sequence[int],
        dim: int,
    ) -> _World:
        def latent(rows: int) -> Floats:
            return rng.normal(0.0, _SPREAD / dim**0.5, (rows, dim))

        sizes = tuple(sum(cards) for cards in (context_cards, user_cards, item_cards))
        user_features = _features(rng, num_users, user_cards)
        item_features = _features(rng, num_items, item_cards)
        user = latent(num_users) + latent(sizes[1])[user_features].sum(1)
        item = latent(num_items) + latent(sizes[2])[item_features].sum(1)
        popularity = -_POPULARITY_POWER * np.log(1.0 + rng.permutation(num_items))
        last, context = latent(num_items), latent(sizes[0])
        return cls(user, item, last, context, popularity, user_features, item_features, (sizes[0], sizes[1], sizes[2]))

    def scores(self, users: Ints, values: Ints, previous: Ints) -> Floats:
        """Return the scores of all items, (n, items)."""
        wish = self.user[users] + self.context[values].sum(1) + _LAST_WEIGHT * self.last[previous]
        scores: Floats = wish @ self.item.T + _POPULARITY_WEIGHT * self.popularity
        return scores


def _features(rng: np.random.Generator, rows: int, cards: Sequence[int]) -> Ints:
    """Return uniform values (rows, fields), numbered over all fields."""
    shift = np.cumsum([0, *cards])[: len(cards)]
    columns = [rng.integers(card, size=rows) + first for card, first in zip(cards, shift, strict=True)]
    return np.stack(columns, 1) if columns else np.zeros((rows, 0), dtype=np.int64)


def _events(
    rng: np.random.Generator, world: _World, count: Ints, context_cards: Sequence[int]
) -> tuple[Ints, Ints, Ints]:
    """Return users, items and context values (with the previous item last) of all events, by user and time."""
    habits = [
        (first, rng.dirichlet([_CONCENTRATION] * card, len(count)).cumsum(1))
        for card, first in zip(context_cards, np.cumsum([0, *context_cards]), strict=False)
    ]
    num_items = len(world.item)
    previous = np.zeros(len(count), dtype=np.int64)
    parts = []
    for time in range(int(count.max())):
        users = np.flatnonzero(count > time)
        columns = [
            first + np.minimum((share[users] < rng.random((len(users), 1))).sum(1), share.shape[1] - 1)
            for first, share in habits
        ]
        values = np.stack([*columns, previous[users]], 1)
        candidates = rng.integers(num_items, size=(len(users), _CANDIDATES))
        scores = np.take_along_axis(world.scores(users, values[:, :-1], previous[users]), candidates, 1)
        best = (scores + rng.gumbel(size=scores.shape)).argmax(1)
        items = candidates[np.arange(len(users)), best]
        parts.append((users, np.full(len(users), time), items, values))
        previous[users] = items
    users, times, items, values = (np.concatenate([part[n] for part in parts]) for n in range(4))
    order = np.lexsort((times, users))
    return users[order], items[order], values[order]


def _assemble(world: _World, users: Ints, items: Ints, values: Ints) -> SyntheticContexts:
    taken = np.bincount(items, minlength=len(world.item)) > 0
    graph = int(taken.sum())
    old = np.argsort(~taken, kind="stable")  # items that are taken come first
    new = np.empty_like(old)
    new[old] = np.arange(len(old))
    is_test = torch.from_numpy(np.append(users[1:] != users[:-1], True))
    test = is_test.numpy()
    scores = world.scores(users[test], values[test, :-1], values[test, -1])[:, old[:graph]]
    renumbered = np.concatenate([values[:, :-1], new[values[:, -1:]]], 1)
    contexts, inverse = np.unique(renumbered, axis=0, return_inverse=True)
    events = torch.from_numpy(np.stack([users, new[items], inverse.reshape(-1)]))
    fields: dict[str, Any] = {
        "user_features": _or_none(world.user_features),
        "item_features": _or_none(world.item_features[old[:graph]]),
        "num_context_features": world.sizes[0],
        "num_user_features": world.sizes[1],
        "num_item_features": world.sizes[2],
        "context_fields": (*(f"c_f{n}" for n in range(values.shape[1] - 1)), LAST),
    }
    data = ContextDataset(
        len(world.user),
        len(world.item),
        graph,
        context_features=torch.from_numpy(contexts),
        train=events[:, ~is_test],
        test=events[:, is_test],
        **fields,
    )
    return SyntheticContexts(data, torch.from_numpy(scores))


def _or_none(features: Ints) -> Tensor | None:
    return torch.from_numpy(features) if features.shape[1] else None


def _table(data: ContextDataset, events: Tensor) -> str:
    """Return the interactions as a table with a header."""
    users, items, contexts = events
    groups: list[tuple[tuple[str, ...], Tensor]] = [(("user_id",), users[:, None]), (("item_id",), items[:, None])]
    groups.append((data.context_fields, data.context_features[contexts]))
    for prefix, features, ids in (("u", data.user_features, users), ("i", data.item_features, items)):
        if features is not None:
            groups.append((tuple(f"{prefix}_f{n}" for n in range(features.shape[1])), features[ids]))
    lines = [",".join("-".join(names) for names, _ in groups)]
    rows = zip(*(values.tolist() for _, values in groups), strict=True)
    lines += [",".join("-".join(map(str, group)) for group in row) for row in rows]
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
