"""Sessions as transitions: readers, numbering, splitting, and the replay buffer."""

from __future__ import annotations

import csv
import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

COLUMNS = ("session_id", "item_id", "is_purchase", "timestamp")
_TRUTH = {"0": False, "1": True, "false": False, "true": True}

Columns = dict[str, "NDArray[Any]"]


class Transitions(NamedTuple):
    """A batch of transitions; item id I is padding.

    Args:
        items: The items before the action, left-aligned, int64 `(B, Ls)`.
        length: How many there are, int64 `(B,)`, at least 1: an empty history is one padding item.
        action: The item that followed, int64 `(B,)`.
        reward: Its reward, float32 `(B,)`.
        next_items: The items including the action, int64 `(B, Ls)`.
        next_length: How many there are, int64 `(B,)`.
        done: Whether the session ended with it, bool `(B,)`.
        is_purchase: Whether it was bought, bool `(B,)`.
        session_items: All items of the session, padded, int64 `(B, M)`; None unless asked for.
    """

    items: Tensor
    length: Tensor
    action: Tensor
    reward: Tensor
    next_items: Tensor
    next_length: Tensor
    done: Tensor
    is_purchase: Tensor
    session_items: Tensor | None = None

    @property
    def state(self) -> tuple[Tensor, Tensor]:
        """Items and lengths before the action, as `MCRL.q_values` takes them."""
        return self.items, self.length

    @property
    def next_state(self) -> tuple[Tensor, Tensor]:
        """Items and lengths after the action."""
        return self.next_items, self.next_length


class ReplayBuffer:
    r"""Sessions of clicks and purchases as transitions (state, action, reward, next state, done).

    The state is made of the last `state_size` items before the action, so the first event of a session has an empty
    one. Events are kept once, as flat tensors; states are cut out of them when a batch is drawn, which needs memory for
    n events instead of 2 n times `state_size` items. Make one with `from_sessions`.

    Args:
        items: Items of all events, session by session in order of time, int64 `(n,)`, in [0, I).
        is_purchase: Whether they were bought, bool `(n,)`.
        session_lengths: Events per session, int64, each at least 1, n in total.
        num_items: I.
        state_size: Items of a state, at least 1.
        reward_click: Reward of a click.
        reward_purchase: Reward of a purchase.

    Raises:
        ValueError: If the shapes don't fit, there are no events, or a value is out of range.

    Examples:
        >>> import torch
        >>> buffer = ReplayBuffer.from_sessions([[(4, False), (2, True)]], state_size=3, num_items=5)
        >>> batch = buffer.transitions()
        >>> batch.items.tolist(), batch.length.tolist(), batch.action.tolist()
        ([[5, 5, 5], [4, 5, 5]], [1, 1], [4, 2])
        >>> batch.next_items.tolist(), batch.done.tolist(), batch.reward
        ([[4, 5, 5], [4, 2, 5]], [False, True], tensor([0.2000, 1.0000]))
    """

    def __init__(
        self,
        items: Tensor,
        is_purchase: Tensor,
        session_lengths: Tensor,
        *,
        num_items: int,
        state_size: int = 10,
        reward_click: float = 0.2,
        reward_purchase: float = 1.0,
    ) -> None:
        _check_events(items, is_purchase, session_lengths, num_items, state_size)
        for name, reward in (("reward_click", reward_click), ("reward_purchase", reward_purchase)):
            if not math.isfinite(reward):
                raise ValueError(f"{name} must be a finite number, got {reward!r}")
        self.num_items, self.state_size = num_items, state_size
        self.reward_click, self.reward_purchase = reward_click, reward_purchase
        self._items, self._is_purchase = items, is_purchase
        ends = session_lengths.cumsum(0)
        self._longest = int(session_lengths.max())
        self.num_sessions = session_lengths.shape[0]
        # Per event: where its session starts and ends (the index after its last event).
        self._start = (ends - session_lengths).repeat_interleave(session_lengths)
        self._end = ends.repeat_interleave(session_lengths)

    @classmethod
    def from_sessions(
        cls,
        df: Any,
        state_size: int = 10,
        reward_click: float = 0.2,
        reward_purchase: float = 1.0,
        *,
        num_items: int | None = None,
        min_length: int = 1,
    ) -> ReplayBuffer:
        """Build the buffer from a table of events, or from sessions.

        Args:
            df: A mapping of columns or a pandas DataFrame with `session_id`, `item_id` (0-based integers),
                `is_purchase` and, if there is one, `timestamp`, which orders the events of a session (rows are in order
                otherwise, and where it ties); or a sequence of sessions, each a sequence of (item, is_purchase).
            state_size: Items of a state.
            reward_click: Reward of a click.
            reward_purchase: Reward of a purchase.
            num_items: I; None takes 1 + the largest item. Give it whenever a model is to see other sessions too.
            min_length: Sessions with fewer events are left out.

        Returns:
            The buffer; sessions in the order of their ids.

        Raises:
            ValueError: If a column is missing or has another length, an item isn't an integer in [0, I), a purchase flag
                isn't 0 or 1, or no session is left.
        """
        table = _as_columns(sessions_to_columns(df) if isinstance(df, (list, tuple)) else df)
        session, item, bought = _sorted_events(table)
        if not min_length >= 1:
            raise ValueError(f"min_length must be >= 1, got {min_length!r}")
        _, number, counts = np.unique(session, return_inverse=True, return_counts=True)
        kept = counts[number] >= min_length
        if not kept.any():
            raise ValueError(f"no session has min_length={min_length} events")
        return cls(
            torch.from_numpy(item[kept]),
            torch.from_numpy(bought[kept]),
            torch.from_numpy(counts[counts >= min_length].astype(np.int64)),
            num_items=int(item.max()) + 1 if num_items is None else num_items,
            state_size=state_size,
            reward_click=reward_click,
            reward_purchase=reward_purchase,
        )

    def __len__(self) -> int:
        """Return the number of events, each of which is a transition."""
        return self._items.shape[0]

    def __repr__(self) -> str:
        bought = int(self._is_purchase.sum())
        return (
            f"ReplayBuffer({self.num_sessions} sessions, {len(self)} transitions, {bought} purchases, "
            f"num_items={self.num_items}, state_size={self.state_size})"
        )

    @property
    def device(self) -> torch.device:
        """Where the events are."""
        return self._items.device

    def to(self, device: torch.device | str) -> ReplayBuffer:
        """Return this buffer with its tensors on `device`."""
        moved = object.__new__(ReplayBuffer)
        moved.__dict__.update(
            {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in vars(self).items()}
        )
        return moved

    def sample(
        self, n: int, generator: torch.Generator | None = None, *, with_session_items: bool = False
    ) -> Transitions:
        """Draw transitions uniformly, with replacement.

        Args:
            n: How many, at least 1.
            generator: Source of randomness, torch's default one if None. Numbers are drawn on its device.
            with_session_items: Also return all items of the session of each.

        Returns:
            The batch, on the device of the buffer.

        Raises:
            ValueError: If `n` < 1.
        """
        if not n >= 1:
            raise ValueError(f"n must be >= 1, got {n!r}")
        source = self.device if generator is None else generator.device
        drawn = torch.randint(len(self), (n,), generator=generator, device=source)
        return self.transitions(drawn.to(self.device), with_session_items=with_session_items)

    def transitions(self, index: Tensor | None = None, *, with_session_items: bool = False) -> Transitions:
        """Return the numbered transitions, all of them by default.

        Args:
            index: Numbers in [0, n), int64 `(B,)`, on the device of the buffer.
            with_session_items: Also return all items of the session of each.
        """
        index = torch.arange(len(self), device=self.device) if index is None else index
        start, end = self._start[index], self._end[index]
        is_purchase = self._is_purchase[index]
        items, length = self._window(start, index)
        next_items, next_length = self._window(start, index + 1)
        return Transitions(
            items=items,
            length=length,
            action=self._items[index],
            reward=torch.where(is_purchase, self.reward_purchase, self.reward_click),
            next_items=next_items,
            next_length=next_length,
            done=index + 1 == end,
            is_purchase=is_purchase,
            session_items=self._cut(start, end, self._longest) if with_session_items else None,
        )

    def to_mdp(self) -> dict[str, NDArray[Any]]:
        """Return the transitions as arrays with the names that d3rlpy's `MDPDataset` takes.

        Returns:
            `observations` (n, state_size), `actions` (n, 1), `rewards` (n,) and `terminals` (n,), session by session.
        """
        batch = self.transitions()
        return {
            "observations": batch.items.cpu().numpy(),
            "actions": batch.action.unsqueeze(1).cpu().numpy(),
            "rewards": batch.reward.cpu().numpy(),
            "terminals": batch.done.float().cpu().numpy(),
        }

    def digest(self) -> str:
        """Return a fingerprint of the events and of how they become transitions."""
        digest = hashlib.sha256(
            f"{self.num_items} {self.state_size} {self.reward_click} {self.reward_purchase}".encode()
        )
        for tensor in (self._items, self._is_purchase, self._start):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _window(self, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last items of [start, end), left-aligned, and their number, at least 1."""
        first = torch.maximum(start, end - self.state_size)
        return self._cut(first, end, self.state_size), (end - first).clamp_min(1)

    def _cut(self, start: Tensor, end: Tensor, width: int) -> Tensor:
        """Return the items of [start, end), padded to `width`."""
        position = start.unsqueeze(1) + torch.arange(width, device=start.device)
        found = self._items[position.clamp_max(len(self) - 1)]
        return found.masked_fill(position >= end.unsqueeze(1), self.num_items)


def pad_histories(sessions: Sequence[Sequence[int]], state_size: int, num_items: int) -> tuple[Tensor, Tensor]:
    """Return states for histories of items, as `MCRL.q_values` takes them.

    Args:
        sessions: Item ids per session, oldest first; the last `state_size` count. An empty one is a state too.
        state_size: Items of a state.
        num_items: I, which is also the padding.

    Returns:
        Items int64 `(n, state_size)` and lengths int64 `(n,)`.

    Raises:
        ValueError: If there is no session, or an item isn't in [0, I).

    Examples:
        >>> pad_histories([[3, 1], []], state_size=3, num_items=5)
        (tensor([[3, 1, 5],
                [5, 5, 5]]), tensor([2, 1]))
    """
    if len(sessions) == 0:
        raise ValueError("sessions is empty")
    items = torch.full((len(sessions), state_size), num_items)
    length = torch.ones(len(sessions), dtype=torch.int64)
    for row, session in enumerate(sessions):
        recent = torch.as_tensor(list(session)[-state_size:], dtype=torch.int64)
        if recent.numel() == 0:
            continue
        if int(recent.min()) < 0 or int(recent.max()) >= num_items:
            raise ValueError(f"session {row} has an item outside [0, {num_items}): {recent.tolist()}")
        items[row, : recent.numel()] = recent
        length[row] = recent.numel()
    return items, length


def sessions_to_columns(sessions: Iterable[Sequence[tuple[int, bool]]]) -> Columns:
    """Lay sessions of (item, is_purchase) out as the columns of a table of events.

    Args:
        sessions: Such as `SessionSimulator.logs` returns.

    Returns:
        `session_id`, `item_id`, `is_purchase` and `timestamp` (the position in the session).

    Examples:
        >>> sessions_to_columns([[(4, False), (2, True)]])["item_id"]
        array([4, 2])
    """
    rows = [
        (number, item, bought, time)
        for number, session in enumerate(sessions)
        for time, (item, bought) in enumerate(session)
    ]
    columns = zip(*rows, strict=True) if rows else ((),) * len(COLUMNS)
    return {name: np.array(column) for name, column in zip(COLUMNS, columns, strict=True)}


def read_sessions(path: str | os.PathLike[str]) -> Columns:
    r"""Read a table of events, `session_id,item_id,is_purchase,timestamp`.

    Args:
        path: A CSV file with a header (the columns in any order, others are ignored), or a `.parquet` file, which
            needs pyarrow. `is_purchase` is 0, 1, true or false.

    Returns:
        The columns: `session_id` and `item_id` as they are (integers, or text where one isn't), `is_purchase` bool,
        `timestamp` float64.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is malformed, with file and line, or pyarrow is missing.

    Examples:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "events.csv"
        >>> _ = path.write_text("session_id,item_id,is_purchase,timestamp\n7,30,0,1.5\n7,12,1,2.5\n")
        >>> read_sessions(path)["item_id"]
        array([30, 12])
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    return _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)


def write_sessions(path: str | os.PathLike[str], columns: Mapping[str, Any]) -> None:
    """Write a table of events as CSV, in place of an earlier file, which stays whole until the new one is.

    Args:
        path: File to write.
        columns: As `read_sessions` returns them.

    Raises:
        ValueError: If a column is missing, or the columns have different lengths.
    """
    table = _as_columns(columns)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            bought = table["is_purchase"].astype(np.int64)
            rows = zip(table["session_id"], table["item_id"], bought, table["timestamp"], strict=True)
            writer.writerows(rows)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def number_items(columns: Mapping[str, Any], ids: Sequence[Any] | None = None) -> tuple[Columns, list[Any]]:
    """Replace item ids by numbers from 0.

    Args:
        columns: A table of events.
        ids: The original id of every number, to number another table alike; None numbers the ids found, in order.

    Returns:
        The table with numbers as `item_id`, and the original ids by number.

    Raises:
        ValueError: If an item isn't among `ids`.

    Examples:
        >>> import numpy as np
        >>> table = {"session_id": [1, 1], "item_id": [90, 17], "is_purchase": [0, 1], "timestamp": [0, 1]}
        >>> numbered, ids = number_items(table)
        >>> numbered["item_id"], ids
        (array([1, 0]), [17, 90])
    """
    table = _as_columns(columns)
    known = np.unique(table["item_id"]) if ids is None else np.asarray(ids)
    order = np.argsort(known, kind="stable")
    place = np.searchsorted(known, table["item_id"], sorter=order)
    number = order[np.minimum(place, len(known) - 1)] if len(known) else place
    unknown = np.ones(len(place), dtype=bool) if len(known) == 0 else known[number] != table["item_id"]
    if unknown.any():
        raise ValueError(f"item_id {table['item_id'][unknown][0]!r} isn't among the {len(known)} known items")
    return {**table, "item_id": number.astype(np.int64)}, known.tolist()


def split_sessions(
    columns: Mapping[str, Any], shares: Sequence[float] = (0.8, 0.1, 0.1), *, seed: int = 0
) -> list[Columns]:
    """Split a table of events by session, at random.

    Args:
        columns: A table of events.
        shares: Share of the sessions per part; they add up to 1.
        seed: Seed of the order.

    Returns:
        One table per share, rows in their order.

    Raises:
        ValueError: If a share is negative or they don't add up to 1.

    Examples:
        >>> table = sessions_to_columns([[(0, False)]] * 10)
        >>> [len(part["item_id"]) for part in split_sessions(table)]
        [8, 1, 1]
    """
    if len(shares) == 0 or any(not share >= 0 for share in shares) or not math.isclose(sum(shares), 1.0):
        raise ValueError(f"shares must be >= 0 and add up to 1, got {tuple(shares)!r}")
    table = _as_columns(columns)
    sessions, number = np.unique(table["session_id"], return_inverse=True)
    order = torch.randperm(len(sessions), generator=torch.Generator().manual_seed(seed)).numpy()
    limits = [round(x * len(sessions)) for x in np.cumsum(shares)[:-1]]
    place = np.empty(len(sessions), dtype=np.int64)
    place[order] = np.arange(len(sessions))
    part = np.searchsorted(limits, place, side="right")[number]
    return [{name: column[part == i] for name, column in table.items()} for i in range(len(shares))]


def _read_csv(path: Path) -> Columns:
    values: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        header = next(reader, None)
        if header is None:
            raise ValueError(f"{path}: empty file, expected a header with {', '.join(COLUMNS)}")
        missing = [name for name in COLUMNS if name not in header]
        if missing:
            raise ValueError(f"{path}:1: no column {', '.join(missing)}; the header is {','.join(header)!r}")
        place = [header.index(name) for name in COLUMNS]
        for row in reader:
            if len(row) != len(header):
                raise ValueError(f"{path}:{reader.line_num}: expected {len(header)} fields, got {len(row)}")
            for name, at in zip(COLUMNS, place, strict=True):
                values[name].append(_parse(name, row[at].strip(), path, reader.line_num))
    if not values["item_id"]:
        raise ValueError(f"{path}: no events behind the header")
    return {name: _ids(values[name]) if name.endswith("_id") else np.array(values[name]) for name in COLUMNS}


def _parse(name: str, text: str, path: Path, line: int) -> Any:
    if name.endswith("_id"):
        if not text:
            raise ValueError(f"{path}:{line}: {name} is empty")
        return text
    if name == "is_purchase":
        if text.lower() not in _TRUTH:
            raise ValueError(f"{path}:{line}: is_purchase must be 0, 1, true or false, got {text!r}")
        return _TRUTH[text.lower()]
    try:
        time = float(text)
    except ValueError:
        time = math.nan
    if not math.isfinite(time):
        raise ValueError(f"{path}:{line}: timestamp must be a finite number, got {text!r}")
    return time


def _ids(values: list[str]) -> NDArray[Any]:
    """Return integers, or the text as it is where one value isn't the usual form of an integer."""
    try:
        numbers = np.array([int(value) for value in values], dtype=np.int64)
    except (ValueError, OverflowError):
        return np.array(values)
    return numbers if all(str(n) == v for n, v in zip(numbers.tolist(), values, strict=True)) else np.array(values)


def _read_parquet(path: Path) -> Columns:
    try:
        from pyarrow import parquet  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ValueError(f"{path}: reading Parquet needs pyarrow, which isn't installed; write CSV instead") from error
    from pyarrow import ArrowException

    try:
        table = parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet file: {error}") from error
    try:
        return _as_columns({name: table[name].to_numpy() for name in table.column_names})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _as_columns(df: Any) -> Columns:
    """Return the columns of a mapping or a DataFrame as arrays of one length; the timestamp may be missing."""
    names = list(df.keys()) if hasattr(df, "keys") else []
    missing = [name for name in COLUMNS[:3] if name not in names]
    if missing:
        raise ValueError(f"no column {', '.join(missing)}; there are {', '.join(map(str, names)) or 'none'}")
    table = {name: np.asarray(df[name]) for name in COLUMNS if name in names}
    rows = len(table["item_id"])
    table.setdefault("timestamp", np.arange(rows, dtype=np.float64))
    lengths = {name: column.shape for name, column in table.items()}
    if any(shape != (rows,) for shape in lengths.values()):
        raise ValueError(f"the columns have different lengths: {lengths}")
    if rows == 0:
        raise ValueError("there are no events")
    bought = table["is_purchase"]
    if bought.dtype != bool:
        if not np.isin(bought, (0, 1)).all():
            raise ValueError("is_purchase must be 0 or 1 everywhere")
        table["is_purchase"] = bought.astype(bool)
    if table["timestamp"].dtype.kind == "f" and not np.isfinite(table["timestamp"]).all():
        raise ValueError("timestamp must be finite everywhere")
    return table


def _sorted_events(table: Columns) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Return session, item and purchase of all events, by session and time; ties keep the order of the rows."""
    item = table["item_id"]
    if item.dtype.kind not in "iu":
        raise ValueError(f"item_id must hold integers from 0, got {item.dtype}; number_items makes them")
    _, session = np.unique(table["session_id"], return_inverse=True)
    order = np.lexsort((table["timestamp"], session))
    return session[order], item[order].astype(np.int64), table["is_purchase"][order]


def _check_events(items: Tensor, is_purchase: Tensor, session_lengths: Tensor, num_items: int, state_size: int) -> None:
    if not state_size >= 1:
        raise ValueError(f"state_size must be >= 1, got {state_size!r}")
    if items.ndim != 1 or items.dtype != torch.int64 or items.numel() == 0:
        raise ValueError(f"items must be int64 (n,) with n >= 1, got {items.dtype} {tuple(items.shape)}")
    if is_purchase.shape != items.shape or is_purchase.dtype != torch.bool:
        raise ValueError(f"is_purchase must be bool {tuple(items.shape)}, got {is_purchase.dtype}")
    if int(items.min()) < 0 or int(items.max()) >= num_items:
        raise ValueError(f"items must be in [0, num_items={num_items}), got {int(items.min())} to {int(items.max())}")
    if session_lengths.ndim != 1 or session_lengths.dtype != torch.int64 or int(session_lengths.min()) < 1:
        raise ValueError("session_lengths must be int64 (S,), each at least 1")
    if int(session_lengths.sum()) != items.numel():
        raise ValueError(f"session_lengths must add up to {items.numel()} events, got {int(session_lengths.sum())}")
