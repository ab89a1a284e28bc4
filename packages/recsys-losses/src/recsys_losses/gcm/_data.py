"""Interactions with contexts: the files of the authors, negative sampling, and the leave-one-out protocol."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
import torch

from recsys_losses._checks import check_choice
from recsys_losses._interactions import rank_in_group
from recsys_losses._readers import Ints, _Fields, _parse_ints, _read_text, _Text
from recsys_losses.gcm._graph import check_edges
from recsys_losses.gcm._loss import check_contexts, check_features
from recsys_losses.sampling import UniformNegativeSampler

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from torch import Tensor

    Scorer = Callable[[Tensor, Tensor], Tensor]

TRAIN, TEST = "train.dat", "test.dat"
USERS, ITEMS = "userid_dict.txt", "itemid_dict.txt"
LAST = "c_last"
METRICS = ("hr", "ndcg", "mrr")

# Which context fields the authors keep, by the fields a file has; of other files all are kept.
_KEPT: dict[tuple[str, ...], tuple[str, ...]] = {
    ("c_city", "c_year", "c_month", "c_day", "c_hour", "c_minute", "c_DoW", LAST): (
        "c_city",
        "c_month",
        "c_hour",
        "c_DoW",
        LAST,
    ),
}


class Samples(NamedTuple):
    """The samples of an epoch in random order, or a batch of them.

    Args:
        users: LongTensor (n,).
        items: LongTensor (n,).
        contexts: LongTensor (n,).
        labels: 1 for interactions, 0 for negatives, float32 (n,).
    """

    users: Tensor
    items: Tensor
    contexts: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class ContextDataset:
    r"""Interactions (user, item, context) with static features, split into train, test and (optionally) validation.

    Args:
        num_users: U.
        num_items: All items $I_\text{all}$, those included that occur only as a last item.
        num_graph_items: Items that can be recommended, ids 0..I-1.
        user_features: Feature ids of the users, LongTensor `(U, f)`, or None.
        item_features: Feature ids of the graph items, LongTensor `(I, f)`, or None.
        context_features: Distinct contexts, LongTensor `(C, k)`: the last column is an item, the others feature ids.
        train: LongTensor `(3, M)`, rows user, item and context; in time order within each user.
        test: LongTensor `(3, T)`.
        valid: LongTensor `(3, V)`, or None.
        num_user_features: $F_u$; None is 1 + the largest id.
        num_item_features: $F_i$, likewise.
        num_context_features: $F_c$ of all context fields but the last item, likewise.
        context_fields: Names of the k context fields, if known.

    Raises:
        ValueError: If a shape is wrong or an index out of range.

    Examples:
        >>> import torch
        >>> rows = torch.tensor([[0, 0], [1, 0], [0, 1]])
        >>> contexts = torch.tensor([[0, 0], [1, 1]])
        >>> ContextDataset(1, 2, 2, None, None, contexts, train=rows[:, :1], test=rows[:, 1:])
        ContextDataset(num_users=1, num_items=2 (2 in the graph), contexts=2, train=1, valid=none, test=1)
    """

    num_users: int
    num_items: int
    num_graph_items: int
    user_features: Tensor | None
    item_features: Tensor | None
    context_features: Tensor
    train: Tensor
    test: Tensor
    valid: Tensor | None = None
    num_user_features: int | None = None
    num_item_features: int | None = None
    num_context_features: int | None = None
    context_fields: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (self.num_users >= 1 and 1 <= self.num_graph_items <= self.num_items):
            sizes = (self.num_users, self.num_items, self.num_graph_items)
            raise ValueError(
                "num_users must be >= 1 and num_graph_items in 1..num_items, got "
                f"num_users={sizes[0]}, num_items={sizes[1]}, num_graph_items={sizes[2]}"
            )
        if self.context_features.ndim != 2 or self.context_features.shape[1] == 0:
            raise ValueError(f"context_features must be (C, k), k >= 1, got {tuple(self.context_features.shape)}")
        for name, ids in (
            ("num_user_features", self.user_features),
            ("num_item_features", self.item_features),
            ("num_context_features", self.context_features[:, :-1]),
        ):
            if getattr(self, name) is None:
                largest = -1 if ids is None or ids.numel() == 0 else int(ids.max())
                object.__setattr__(self, name, largest + 1)
        for side, features, size, rows in (
            ("user", self.user_features, self.num_user_features, self.num_users),
            ("item", self.item_features, self.num_item_features, self.num_graph_items),
        ):
            check_features(side, features, None if features is None else size, rows)
        check_contexts(self.context_features, self.num_context_features or 0, self.num_items)
        sizes = (self.num_users, self.num_graph_items, len(self.context_features))
        for name in ("train", "test", "valid"):
            events = getattr(self, name)
            if events is None:
                continue
            if events.ndim != 2 or events.shape[0] != 3:
                raise ValueError(f"{name} must be (3, n), rows user, item and context, got {tuple(events.shape)}")
            check_edges(
                (events[0], events[1], events[2]), sizes, (f"{name} users", f"{name} items", f"{name} contexts")
            )

    def __repr__(self) -> str:
        valid = "none" if self.valid is None else f"{self.valid.shape[1]}"
        return (
            f"ContextDataset(num_users={self.num_users}, num_items={self.num_items} ({self.num_graph_items} in the graph), "
            f"contexts={len(self.context_features)}, train={self.train.shape[1]}, valid={valid}, test={self.test.shape[1]})"
        )

    @classmethod
    def from_files(cls, directory: str | os.PathLike[str], keep_context: Sequence[str] | None = None) -> ContextDataset:
        r"""Read `train.dat`, `test.dat`, `userid_dict.txt` and `itemid_dict.txt` as the authors publish them.

        A header names the columns: `user_id,item_id`, then the context, the user features (if any) and the item
        features (if any), each a group of names joined by `-` and starting with `c_`, `u_` or `i_`. The values are
        joined alike, and are ids that are global within their group. The last context field is `c_last`, an item:

            user_id,item_id,c_city-c_hour-c_last,u_stars,i_city-i_stars
            0,16,1-24-15,3,1-63

        The lengths of the two dictionaries, Python literals of original ids and indices, are the numbers of users and of
        items. Items below the largest one that occurs as `item_id` are graph items. Contexts are the distinct tuples of
        the kept fields over both files.

        Args:
            directory: Folder of the four files, plain, gzip or xz.
            keep_context: Names of the context fields to keep, with or without `c_`; `c_last` must be among them. None
                keeps city, month, hour, DoW and last of the Yelp files, and all fields of others.

        Returns:
            The data, interactions in the order of the file.

        Raises:
            FileNotFoundError: If a file is absent.
            ValueError: If a file is empty, damaged or malformed, an id out of range, or the features of a user or an
                item unknown or contradictory; with file and line.

        Reference: the files of [wujcan/GCM](https://github.com/wujcan/GCM).
        """
        directory = Path(directory)
        num_users, num_items = (_dict_length(directory / name) for name in (USERS, ITEMS))
        parts = [_Events.read(directory / name) for name in (TRAIN, TEST)]
        train, test = parts
        if train.groups != test.groups:
            test.text.fail(0, f"the header differs from that of {train.text.name}")
        kept = _kept_fields(train, keep_context)
        for part in parts:
            part.check_ids(num_users, num_items)
        num_graph_items = 1 + max(int(part.values[:, 1].max()) for part in parts)
        contexts, inverse = np.unique(
            np.concatenate([part.columns(kept) for part in parts]), axis=0, return_inverse=True
        )
        numbers = np.split(inverse.reshape(-1), [len(train.values)])
        events = [np.stack([*part.values[:, :2].T, number]) for part, number in zip(parts, numbers, strict=True)]
        ordinary = np.concatenate([part.columns(train.fields("c")[:-1]) for part in parts])
        features = {
            "u": _static(parts, "u", 0, num_users, USERS),
            "i": _static(parts, "i", 1, num_graph_items, "the graph items"),
        }
        return cls(
            num_users,
            num_items,
            num_graph_items,
            features["u"],
            features["i"],
            torch.from_numpy(contexts),
            train=torch.from_numpy(events[0]),
            test=torch.from_numpy(events[1]),
            num_context_features=int(ordinary.max(initial=-1)) + 1,
            context_fields=kept,
        )

    def hold_out_last(self) -> ContextDataset:
        """Return the data with the last train interaction of every user as validation interactions.

        Users with a single train interaction keep it. The order within a user is that of `train`.

        Raises:
            ValueError: If there are validation interactions already.

        Examples:
            >>> import torch
            >>> train = torch.tensor([[0, 0, 1], [0, 1, 0], [0, 0, 0]])
            >>> data = ContextDataset(2, 2, 2, None, None, torch.zeros(1, 1, dtype=torch.long), train, train[:, :1])
            >>> data.hold_out_last().valid
            tensor([[0],
                    [1],
                    [0]])
        """
        if self.valid is not None:
            raise ValueError("the data has validation interactions already")
        users = self.train[0]
        count = torch.bincount(users, minlength=self.num_users)[users]
        held = (rank_in_group(users, torch.zeros_like(users)) == count - 1) & (count > 1)
        return dataclasses.replace(self, train=self.train[:, ~held], valid=self.train[:, held])

    def to(self, device: torch.device | str) -> ContextDataset:
        """Return the data with its tensors on `device`."""
        moved: dict[str, Any] = {
            field.name: value.to(device)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return dataclasses.replace(self, **moved)

    def digest(self) -> str:
        """Return a fingerprint of everything that training and selection see."""
        digest = hashlib.sha256(f"{self.num_users} {self.num_items} {self.num_graph_items}".encode())
        for part in (self.user_features, self.item_features, self.context_features, self.train, self.valid):
            digest.update(b"none" if part is None else part.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def sampler(self, generator: torch.Generator | None = None) -> UniformNegativeSampler:
        """Return the sampler of negatives; its rows are the positions of `user_contexts`, not users."""
        group, events = self._user_contexts()
        exclude = torch.stack([group, events[1]])
        return UniformNegativeSampler(self.num_graph_items, exclude=exclude, generator=generator)

    def sample_epoch(
        self,
        num_negatives: int = 4,
        generator: torch.Generator | None = None,
        *,
        sampler: UniformNegativeSampler | None = None,
    ) -> Samples:
        r"""Draw one positive and `num_negatives` negatives per train interaction, in random order.

        A negative is uniform over the graph items that the user didn't take *in this exact context*; items of other
        contexts are legal. The draw is exact, which equals redrawing until an item is legal.

        Args:
            num_negatives: Negatives per interaction, >= 1.
            generator: Source of randomness, on the device of the data; None uses torch's.
            sampler: What `sampler(generator)` returned, to save building it again in every epoch.

        Returns:
            $M(1+n)$ samples.

        Raises:
            ValueError: If `num_negatives` is below 1, or a user took all items in one context.

        Reference: Wu et al., 2020; the rule is that of the authors' code.

        Examples:
            >>> import torch
            >>> train = torch.tensor([[0, 0], [0, 1], [0, 1]])  # item 1 was taken, but not in context 0
            >>> data = ContextDataset(1, 2, 2, None, None, torch.tensor([[0, 0], [1, 0]]), train, train)
            >>> samples = data.sample_epoch(1, torch.Generator().manual_seed(0))
            >>> samples.items[samples.labels == 0].sort().values
            tensor([0, 1])
        """
        if not num_negatives >= 1:
            raise ValueError(f"num_negatives must be >= 1, got {num_negatives!r}")
        sampler = self.sampler(generator) if sampler is None else sampler
        group, (users, items, contexts) = self._user_contexts()
        negatives = sampler.sample(group, num_negatives)
        total = len(users) * (1 + num_negatives)
        order = torch.randperm(total, generator=generator, device=users.device)
        row = order % len(users)
        drawn = torch.cat([items, negatives.T.flatten()])[order]
        return Samples(users[row], drawn, contexts[row], (order < len(users)).float())

    def leave_one_out_metrics(
        self,
        score: Scorer,
        *,
        split: str = "test",
        ks: Sequence[int] = (10, 50),
        mask_target: bool = True,
        batch_size: int = 256,
    ) -> dict[str, float]:
        r"""Rank all graph items for every held-out interaction, in its context.

        $$\mathrm{HR@}k=\operatorname{mean}[r\le k],\qquad\mathrm{NDCG@}k=\operatorname{mean}\frac{[r\le k]}{\log_2(r+1)},
        \qquad\mathrm{MRR@}k=\operatorname{mean}\frac{[r\le k]}{r}$$

        with r the rank of the held-out item, from 1; equal scores are ordered by id. The items that the user took in
        train (and, for the test interactions, in validation) aren't ranked.

        Args:
            score: Function of users `(B,)` and contexts `(B,)` that returns the scores `(B, I)` of all graph items, such
                as `GCM.score_all`.
            split: `"test"` or `"valid"`.
            ks: Cut-offs.
            mask_target: Whether a held-out item that the user took before is left out like any other, so that it
                **can't be hit** (the protocol of the authors, and of all published figures). False ranks it.
            batch_size: Interactions scored at once.

        Returns:
            `{"hr@10": ..., "ndcg@10": ..., "mrr@10": ..., ...}`.

        Raises:
            ValueError: If the split is missing or empty, a cut-off is out of range, or scores have the wrong shape or
                aren't finite.

        Examples:
            >>> import torch
            >>> train, test = torch.tensor([[0], [0], [0]]), torch.tensor([[0], [2], [0]])
            >>> data = ContextDataset(1, 4, 4, None, None, torch.zeros(1, 1, dtype=torch.long), train, test)
            >>> data.leave_one_out_metrics(lambda users, contexts: torch.tensor([[9.0, 4.0, 3.0, 2.0]]), ks=(1, 2))
            {'hr@1': 0.0, 'ndcg@1': 0.0, 'mrr@1': 0.0, 'hr@2': 1.0, 'ndcg@2': 0.6309297535714575, 'mrr@2': 0.5}
        """
        check_choice("split", split, ("test", "valid"))
        events = self.test if split == "test" else self.valid
        if events is None or events.shape[1] == 0:
            raise ValueError(f"split={split!r}: the data has no such interactions")
        self.check_cutoffs(ks)
        known = [self.train] if split == "valid" or self.valid is None else [self.train, self.valid]
        seen = SeenItems(torch.cat(known, 1), self.num_users)
        ranks = torch.cat(
            [
                self._ranks(score, batch, seen, mask_target=mask_target)
                for batch in torch.split(events, batch_size, dim=1)
            ]
        ).double()
        values: dict[str, float] = {}
        for k in ks:
            hit = (ranks <= k).double()
            values[f"hr@{k}"] = float(hit.mean())
            values[f"ndcg@{k}"] = float((hit / torch.log2(ranks + 1)).mean())
            values[f"mrr@{k}"] = float((hit / ranks).mean())
        return values

    def check_cutoffs(self, ks: Sequence[int]) -> None:
        """Raise ValueError unless every cut-off is in 1..I."""
        for k in ks:
            if not 1 <= k <= self.num_graph_items:
                raise ValueError(f"k must be in 1..{self.num_graph_items} (the number of graph items), got {k!r}")

    def _ranks(self, score: Scorer, events: Tensor, seen: SeenItems, *, mask_target: bool) -> Tensor:
        """Return the rank of the held-out items, from 1; one beyond the last where they can't be hit."""
        users, items, contexts = events
        scores = score(users, contexts)
        if scores.shape != (len(users), self.num_graph_items):
            wanted = (len(users), self.num_graph_items)
            raise ValueError(f"score must return {wanted} for this block, got {tuple(scores.shape)}")
        if not bool(scores.isfinite().all()):
            raise ValueError("score returned values that aren't finite")
        target = scores.gather(1, items[:, None])
        scores = scores.clone()
        row, item = seen.of(users)
        scores[row, item] = -torch.inf
        number = torch.arange(self.num_graph_items, device=scores.device)
        before = (scores > target) | ((scores == target) & (number < items[:, None]))
        rank: Tensor = 1 + before.sum(1)
        if mask_target:
            hidden = scores.gather(1, items[:, None])[:, 0] == -torch.inf
            rank = torch.where(hidden, self.num_graph_items + 1, rank)
        return rank

    def _user_contexts(self) -> tuple[Tensor, Tensor]:
        """Return the number of the (user, context) pair of every train interaction, and the interactions."""
        key = self.train[0] * len(self.context_features) + self.train[2]
        group: Tensor = torch.unique(key, return_inverse=True)[1]
        return group, self.train


class SeenItems:
    """The items of each user, found for blocks of users at once."""

    def __init__(self, events: Tensor, num_users: int) -> None:
        self.items = events[1][torch.argsort(events[0], stable=True)]
        self.count = torch.bincount(events[0], minlength=num_users)
        self.start = self.count.cumsum(0) - self.count

    def of(self, users: Tensor) -> tuple[Tensor, Tensor]:
        """Return positions in `users` and items, one pair per interaction."""
        count = self.count[users]
        row = torch.repeat_interleave(torch.arange(len(users), device=users.device), count)
        first = torch.repeat_interleave(self.start[users] - (count.cumsum(0) - count), count)
        return row, self.items[first + torch.arange(len(row), device=users.device)]


# --- files -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Events:
    """A table of interactions: the names of its columns by group, and its values (n, columns); row n is on line n + 2."""

    text: _Text
    groups: tuple[tuple[str, ...], ...]
    values: Ints

    @classmethod
    def read(cls, path: Path) -> _Events:
        text = _read_text(path)
        groups = _parse_header(text)
        return cls(text, groups, _parse_rows(text, groups))

    def fields(self, kind: str) -> tuple[str, ...]:
        """Return the names of the context ("c"), user ("u") or item ("i") fields."""
        return next((group for group in self.groups[2:] if group[0].startswith(f"{kind}_")), ())

    def columns(self, names: Sequence[str]) -> Ints:
        """Return the named columns, (n, names)."""
        flat = [name for group in self.groups for name in group]
        return self.values[:, [flat.index(name) for name in names]]

    def fail(self, row: int, problem: str) -> NoReturn:
        self.text.fail(row + 1, problem)

    def check_ids(self, num_users: int, num_items: int) -> None:
        """Raise ValueError for a user or an item that its dictionary doesn't have."""
        for name, size, source in (
            ("user_id", num_users, USERS),
            ("item_id", num_items, ITEMS),
            (LAST, num_items, ITEMS),
        ):
            ids = self.columns((name,))[:, 0]
            if (ids >= size).any():
                row = int(np.argmax(ids >= size))
                self.fail(row, f"{name} {ids[row]} is out of range: {source} has {size} entries")


def _dict_length(path: Path) -> int:
    """Return the number of entries of a dictionary written as a Python literal; nothing is executed."""
    text = _read_text(path)
    try:
        value = ast.literal_eval(text.data.decode().strip())
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        line = getattr(error, "lineno", None) or 1
        text.fail(line - 1, f"expected a Python dictionary of literals ({type(error).__name__})")
    if not isinstance(value, dict) or not value:
        text.fail(0, f"expected a non-empty Python dictionary, got {type(value).__name__}")
    return len(value)


def _parse_header(text: _Text) -> tuple[tuple[str, ...], ...]:
    header = text.line(0).strip()
    groups = tuple(tuple(name.strip() for name in column.split("-")) for column in header.split(","))
    if groups[:2] != (("user_id",), ("item_id",)):
        text.fail(0, f"expected a header that starts with user_id,item_id, got {header[:80]!r}")
    kinds: list[str] = []
    for group in groups[2:]:
        prefixes = {name.partition("_")[0] for name in group}
        if len(prefixes) != 1 or not prefixes <= {"c", "u", "i"} or prefixes & set(kinds):
            text.fail(0, f"expected one group of names with the prefix c_, u_ or i_ each, got {'-'.join(group)[:80]!r}")
        kinds += prefixes
    names = [name for group in groups for name in group]
    if len(set(names)) != len(names):
        text.fail(0, f"a name occurs twice in the header {header[:80]!r}")
    context = next((group for group in groups[2:] if group[0].startswith("c_")), ())
    if not context or context[-1] != LAST:
        text.fail(0, f"expected context fields that end with {LAST}, got {'-'.join(context) or 'none'}")
    return groups


def _parse_rows(text: _Text, groups: tuple[tuple[str, ...], ...]) -> Ints:
    body = text.data.find(b"\n") + 1
    data = text.data.rstrip(b"\n") + b"\n"
    if body == 0 or body >= len(data):
        raise ValueError(f"{text.name} holds no interactions")
    pattern = b",".join(b"-" * (len(group) - 1) for group in groups) + b"\n"
    buffer = np.frombuffer(data, dtype=np.uint8)[body:]
    cut = np.flatnonzero((buffer == ord(",")) | (buffer == ord("-")) | (buffer == ord("\n")))
    width = len(pattern)
    if len(cut) % width or (buffer[cut].reshape(-1, width) != np.frombuffer(pattern, dtype=np.uint8)).any():
        _fail_form(text, pattern)
    end = cut.astype(np.int64) + body
    start = np.concatenate(([body], end[:-1] + 1))
    line = np.repeat(np.arange(1, 1 + len(end) // width), width)
    return _parse_ints(_Text(text.name, data), _Fields(start, end, line), ",").reshape(-1, width)


def _fail_form(text: _Text, pattern: bytes) -> NoReturn:
    wanted = pattern.rstrip(b"\n")
    for number, line in enumerate(text.data.rstrip(b"\n").split(b"\n")[1:], start=1):
        if bytes(char for char in line if char in b",-") != wanted:
            form = text.line(0).strip()
            text.fail(number, f"expected integers joined as in the header {form!r}, got {line[:80].decode()!r}")
    raise AssertionError("unreachable: some line differs from the pattern")


def _kept_fields(train: _Events, keep_context: Sequence[str] | None) -> tuple[str, ...]:
    fields = train.fields("c")
    if keep_context is None:
        return _KEPT.get(fields, fields)
    if isinstance(keep_context, str):
        raise ValueError(f"keep_context must be a sequence of names, got the string {keep_context!r}")
    wanted = {name if name.startswith("c_") else f"c_{name}" for name in keep_context}
    for name in sorted(wanted):
        check_choice("context field in keep_context", name, fields)
    if LAST not in wanted:
        raise ValueError(f"keep_context must contain {LAST}, got {tuple(keep_context)}")
    return tuple(name for name in fields if name in wanted)


def _static(parts: list[_Events], kind: str, key: int, size: int, source: str) -> Tensor | None:
    """Return the features (size, f) of users or items, which every row repeats; None where there are no such columns."""
    names = parts[0].fields(kind)
    if not names:
        return None
    features = np.full((size, len(names)), -1, dtype=np.int64)
    for part in reversed(parts):  # the first row of an id decides
        ids, values = part.values[::-1, key], part.columns(names)[::-1]
        features[ids] = values
    what = "user" if kind == "u" else "item"
    for part in parts:
        ids, differs = part.values[:, key], (features[part.values[:, key]] != part.columns(names)).any(1)
        if differs.any():
            row = int(np.argmax(differs))
            part.fail(row, f"the features of {what} {ids[row]} differ from those in an earlier row")
    unknown = np.flatnonzero((features < 0).any(1))
    if unknown.size:
        files = " or ".join(part.text.name for part in parts)
        raise ValueError(f"{what} {unknown[0]} of {source} has no row in {files}, so its features are unknown")
    return torch.from_numpy(features)
