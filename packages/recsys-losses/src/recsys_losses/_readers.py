"""Readers for the text formats of implicit-feedback data; use them through `recsys_losses.data`.

A file is read as one byte buffer and cut into fields with array operations. A field remembers its line, so that
errors name file and line without a second pass.
"""

from __future__ import annotations

import gzip
import lzma
import math
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from recsys_losses._interactions import MAX_ID, EdgeSet, InteractionData, drop_duplicates

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from torch import Tensor

Ints = NDArray[np.int64]

_SUFFIXES = (".gz", ".xz")
_MAGIC = {"gzip": b"\x1f\x8b", "xz": b"\xfd7zXZ\x00"}
_FIELD_TYPES = ("token", "token_seq", "float", "float_seq")


def read_lightgcn(
    train_path: str | os.PathLike[str],
    test_path: str | os.PathLike[str],
    *,
    num_users: int | None = None,
    num_items: int | None = None,
) -> InteractionData:
    r"""Read a train and a test file in the LightGCN/NGCF text format.

    One line per user, `user item item ...`, 0-based integers separated by blanks, no header. A line that holds only a
    user is legal and adds nothing. Plain, gzip and xz files are told apart by their content, and `train.txt` also finds
    `train.txt.gz` or `train.txt.xz`.

    Args:
        train_path: Train file.
        test_path: Test file.
        num_users: Number of users U; None takes 1 + the largest user id of both files, lines without items included.
        num_items: Number of items I; None takes 1 + the largest item id of both files.

    Returns:
        The data, users without train pairs kept. Pairs repeated within a file are removed with a warning that gives
        their number, and pairs in both files are reported by a warning.

    Raises:
        FileNotFoundError: A file is absent; the message lists what was looked for.
        ValueError: An empty, damaged or malformed file, or an id out of range, with file and line.

    Source: the data folders of NGCF and LightGCN (arXiv 1905.08108, 2002.02126).

    Examples:
        >>> import tempfile, pathlib
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "train.txt").write_text("0 2 1\n1 0\n")
        >>> _ = (folder / "test.txt").write_text("0 0\n1\n")
        >>> read_lightgcn(folder / "train.txt", folder / "test.txt")
        InteractionData(num_users=2, num_items=3, train=3, valid=none, test=1)
    """
    train, train_users = _read_user_lines(train_path, num_users, num_items)
    test, test_users = _read_user_lines(test_path, num_users, num_items)
    data = InteractionData(
        num_users=num_users if num_users is not None else max(train_users, test_users),
        num_items=num_items if num_items is not None else 1 + max(int(train[1].max()), int(test[1].max())),
        train=train,
        test=test,
    )
    warn_overlap(data, Path(train_path).name, Path(test_path).name)
    return data


def read_pairs(
    path: str | os.PathLike[str],
    *,
    sep: str | None = None,
    base: int = 0,
    columns: tuple[int, int] = (0, 1),
    header: bool = False,
) -> Tensor:
    r"""Read one (user, item) pair per line.

    Further columns may hold anything, such as the counts `3.2466e+05` of the lastfm files.

    Args:
        path: Plain, gzip or xz file.
        sep: Column separator; " " stands for any run of blanks; None takes what the first line shows, the first of
            "::", tab, comma, semicolon, blanks.
        base: Smallest legal id, subtracted from all ids: 0 or 1.
        columns: Positions of the user and the item column, from 0.
        header: Skip the first line.

    Returns:
        LongTensor (2, E) in file order; repeated pairs are removed with a warning that gives their number.

    Raises:
        FileNotFoundError: The file is absent.
        ValueError: An empty, damaged or malformed file or an id below `base`, with file and line; or a bad argument.

    Examples:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "data1.txt"
        >>> _ = path.write_text("1\t3\t3.2466e+05\n2\t1\t7\n")
        >>> read_pairs(path, base=1)
        tensor([[0, 1],
                [2, 0]])
    """
    if base not in (0, 1):
        raise ValueError(f"base must be 0 or 1, got {base!r}")
    if len(columns) != 2 or columns[0] == columns[1] or min(columns) < 0:
        raise ValueError(f"columns must be two different positions from 0, got {columns!r}")
    if sep is not None and (not sep or any(c.isdigit() or c in "\r\n" for c in sep)):
        raise ValueError(f"sep must be a non-empty string without digits and line breaks, got {sep!r}")
    text = _read_text(path)
    if sep is None:
        sep = _guess_separator(text.line(1) if header else text.first_line) or " "
    table = _cut(text, sep, columns, skip=1 if header else 0)
    user, item = (_parse_ints(text, column, sep, base=base) for column in table)
    return drop_duplicates(_edges(user, item), text.name)


def read_inter(
    path: str | os.PathLike[str],
    *,
    user: str = "user_id",
    item: str = "item_id",
    rating: str = "rating",
    min_rating: float | None = None,
) -> tuple[Tensor, tuple[str, ...], tuple[str, ...]]:
    r"""Read a RecBole atomic interaction file (`.inter`).

    Tab separated; the header names the fields as `name:type` with the types token, token_seq, float and float_seq.
    Ids are tokens: they are numbered from 0 in the order in which they first appear in the file (RecBole itself starts
    at 1 and keeps 0 for padding).

    Args:
        path: Plain, gzip or xz file.
        user: Name of the user field, of type token.
        item: Name of the item field, of type token.
        rating: Name of the rating field, of type float; needed only with `min_rating`.
        min_rating: Keep rows with at least this rating; None keeps all. The numbering is that of the whole file.

    Returns:
        `(edge_index, user_tokens, item_tokens)`: LongTensor (2, E) in file order without repetitions (their number is
        given in a warning), and the token of each id.

    Raises:
        FileNotFoundError: The file is absent.
        ValueError: An empty, damaged or malformed file, or a header without the fields asked for, with file and line;
            or no row reaches `min_rating`.

    Source: RecBole, atomic files.

    Examples:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "toy.inter"
        >>> _ = path.write_text("user_id:token\titem_id:token\trating:float\nann\ttea\t5\nbob\ttea\t1\n")
        >>> read_inter(path, min_rating=4)
        (tensor([[0],
                [0]]), ('ann', 'bob'), ('tea',))
    """
    text = _read_text(path)
    wanted = [(user, "token"), (item, "token")] + ([(rating, "float")] if min_rating is not None else [])
    table = _cut(text, "\t", _header_positions(text, wanted), skip=1)
    user_index, user_tokens = _number_tokens(text, table[0])
    item_index, item_tokens = _number_tokens(text, table[1])
    edges = _edges(user_index, item_index)
    if min_rating is not None:
        edges = _keep_rated(edges, text, table[2], min_rating)
    return drop_duplicates(edges, text.name), user_tokens, item_tokens


def read_movielens(
    path: str | os.PathLike[str], *, min_rating: float | None = None
) -> tuple[Tensor, tuple[str, ...], tuple[str, ...]]:
    r"""Read a MovieLens rating file: `u.data` (tab separated) or `ratings.dat` (separated by `::`).

    Columns: user, item, rating, time. Ids are numbered from 0 in ascending order of the ids in the file.

    Args:
        path: Plain, gzip or xz file.
        min_rating: Keep rows with at least this rating; None keeps all. The numbering is that of the whole file.

    Returns:
        `(edge_index, user_tokens, item_tokens)`: LongTensor (2, E) in file order without repetitions (their number is
        given in a warning), and the original id of each new id, as text.

    Raises:
        FileNotFoundError: The file is absent.
        ValueError: An empty, damaged or malformed file, with file and line; or no row reaches `min_rating`.

    Examples:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "ratings.dat"
        >>> _ = path.write_text("7::20::4.5::978300760\n3::20::1::978300761\n")
        >>> read_movielens(path, min_rating=4)
        (tensor([[1],
                [0]]), ('3', '7'), ('20',))
    """
    text = _read_text(path)
    sep = "::" if "::" in text.first_line else "\t"
    table = _cut(text, sep, (0, 1, 2))
    user_ids, user = np.unique(_parse_ints(text, table[0], sep), return_inverse=True)
    item_ids, item = np.unique(_parse_ints(text, table[1], sep), return_inverse=True)
    edges = _edges(user, item)
    if min_rating is not None:
        edges = _keep_rated(edges, text, table[2], min_rating)
    edges = drop_duplicates(edges, text.name)
    return edges, tuple(map(str, user_ids.tolist())), tuple(map(str, item_ids.tolist()))


def warn_overlap(data: InteractionData, train_name: str, test_name: str) -> None:
    """Warn with the number of pairs that are in both train and test; the evaluation would never rank them."""
    shared = int(EdgeSet(data.train, data.num_items).contains(data.test[0], data.test[1]).sum())
    if shared:
        warnings.warn(f"{shared} pairs of {test_name} are also in {train_name}", UserWarning, stacklevel=3)


@dataclass(frozen=True)
class _Text:
    """Content of a file: decompressed, line ends unified."""

    name: str
    data: bytes

    @property
    def first_line(self) -> str:
        """First line that is not blank."""
        return self.data.strip().partition(b"\n")[0].decode()

    def line(self, index: int) -> str:
        """Return the line with this 0-based index, empty beyond the end."""
        start = 0
        for _ in range(index):
            start = self.data.find(b"\n", start) + 1
            if start == 0:
                return ""
        end = self.data.find(b"\n", start)
        return self.data[start : end if end >= 0 else len(self.data)].decode()

    def fail(self, line: int, problem: str) -> NoReturn:
        """Raise ValueError for the line with this 0-based index."""
        raise ValueError(f"{self.name}:{line + 1}: {problem}")


@dataclass(frozen=True)
class _Fields:
    """Byte ranges of fields and the 0-based line of each, all (F,)."""

    start: Ints
    end: Ints
    line: Ints

    def __getitem__(self, index: NDArray[np.bool_]) -> _Fields:
        return _Fields(self.start[index], self.end[index], self.line[index])

    def texts(self, data: bytes) -> list[bytes]:
        """Return the content of every field."""
        return [data[a:b] for a, b in zip(self.start.tolist(), self.end.tolist(), strict=True)]


def _find(path: str | os.PathLike[str]) -> Path:
    """Return the file itself or its compressed copy."""
    path = Path(path)
    candidates = [path] if path.suffix in _SUFFIXES else [path, *(Path(f"{path}{suffix}") for suffix in _SUFFIXES)]
    for candidate in candidates:
        if candidate.is_dir():
            raise ValueError(f"{candidate} is a folder, expected a file")
        if candidate.exists():
            return candidate
    raise FileNotFoundError(f"file not found; looked for {', '.join(map(str, candidates))}")


def _read_text(path: str | os.PathLike[str]) -> _Text:
    path = _find(path)
    data = _decompress(path.name, path.read_bytes(), path.suffix).removeprefix(b"\xef\xbb\xbf")
    if not data.strip():
        raise ValueError(f"{path.name} is empty")
    if not data.isascii():
        try:
            data.decode()
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise ValueError(f"{path.name}:{line}: not UTF-8 text (byte 0x{data[error.start]:02x})") from None
    return _Text(path.name, data.replace(b"\r\n", b"\n").replace(b"\r", b"\n"))


def _decompress(name: str, data: bytes, suffix: str) -> bytes:
    kind = next((kind for kind, magic in _MAGIC.items() if data.startswith(magic)), None)
    if kind is None:
        if data and suffix in _SUFFIXES:
            raise ValueError(f"{name} has no {'gzip' if suffix == '.gz' else 'xz'} header; is it compressed at all?")
        return data
    try:
        return gzip.decompress(data) if kind == "gzip" else lzma.decompress(data)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{name}: truncated or damaged {kind} data ({error})") from error


def _read_user_lines(path: str | os.PathLike[str], num_users: int | None, num_items: int | None) -> tuple[Tensor, int]:
    """Return the edges of a LightGCN file and 1 + its largest user id."""
    text = _read_text(path)
    fields = _cut_blanks(text.data)
    is_user = np.ones(fields.line.size, dtype=np.bool_)
    is_user[1:] = fields.line[1:] != fields.line[:-1]
    ids = _parse_ints(text, fields, " ")
    _check_below(text, fields[is_user], ids[is_user], "user", num_users)
    _check_below(text, fields[~is_user], ids[~is_user], "item", num_items)
    if is_user.all():
        raise ValueError(f"{text.name} holds no interactions, only users")
    user = ids[is_user][np.cumsum(is_user) - 1]
    edges = _edges(user[~is_user], ids[~is_user])
    return drop_duplicates(edges, text.name, stacklevel=4), 1 + int(ids[is_user].max())


def _cut(text: _Text, sep: str, columns: Sequence[int], *, skip: int = 0) -> list[_Fields]:
    """Return the wanted columns of all lines that are not blank, after the first `skip` lines."""
    fields = _cut_blanks(text.data) if not sep.strip(" ") else _cut_at(text.data, sep.encode())
    if skip:
        fields = fields[fields.line >= skip]
    if fields.line.size == 0:
        raise ValueError(f"{text.name} holds no interactions")
    first = np.ones(fields.line.size, dtype=np.bool_)
    first[1:] = fields.line[1:] != fields.line[:-1]
    starts = np.flatnonzero(first)
    count = np.diff(starts, append=fields.line.size)
    short = np.flatnonzero(count <= max(columns))
    if short.size:
        line = int(fields.line[starts[short[0]]])
        problem = f"expected at least {max(columns) + 1} columns separated by {_show(sep)}, got {count[short[0]]}"
        text.fail(line, problem + _separator_hint(text.line(line), sep))
    rows = [starts + column for column in columns]
    return [_Fields(fields.start[row], fields.end[row], fields.line[row]) for row in rows]


def _cut_blanks(data: bytes) -> _Fields:
    """Cut at runs of spaces, tabs and line breaks."""
    buffer = np.frombuffer(data, dtype=np.uint8)
    inside = np.zeros(buffer.size + 2, dtype=np.int8)
    inside[1:-1] = ~np.isin(buffer, np.frombuffer(b" \t\n", dtype=np.uint8))
    change = np.diff(inside)
    start = np.flatnonzero(change == 1)
    return _Fields(start, np.flatnonzero(change == -1), np.searchsorted(np.flatnonzero(buffer == 10), start))


def _cut_at(data: bytes, sep: bytes) -> _Fields:
    """Cut at every separator and line break, trim spaces, drop blank lines."""
    if len(sep) > 1:
        # one mark per separator, padded with blanks so that the offsets stay those of the original text
        mark = b"\x1f" + b" " * (len(sep) - 1)
        data, sep = data.replace(b"\x1f", b"?").replace(sep, mark), b"\x1f"
    buffer = np.frombuffer(data, dtype=np.uint8)
    cut = np.flatnonzero((buffer == sep[0]) | (buffer == 10))
    start = np.concatenate(([0], cut + 1)).astype(np.int64)
    end = np.concatenate((cut, [buffer.size])).astype(np.int64)
    line = np.concatenate(([0], np.cumsum(buffer[cut] == 10))).astype(np.int64)
    start, end = _trim(buffer, start, end)
    alone = np.ones(line.size, dtype=np.bool_)
    alone[1:] &= line[1:] != line[:-1]
    alone[:-1] &= line[1:] != line[:-1]
    return _Fields(start, end, line)[~(alone & (start == end))]


def _trim(buffer: NDArray[np.uint8], start: Ints, end: Ints) -> tuple[Ints, Ints]:
    """Move both ends of every field inwards past spaces."""
    if not (buffer == 32).any():
        return start, end
    solid = np.flatnonzero(buffer != 32)
    first = np.searchsorted(solid, start)
    last = np.searchsorted(solid, end) - 1
    empty = last < first
    if solid.size == 0:
        return start, start
    new_start = np.where(empty, start, solid[np.minimum(first, solid.size - 1)])
    return new_start, np.where(empty, start, solid[last] + 1)


def _parse_ints(text: _Text, fields: _Fields, sep: str, *, base: int = 0) -> Ints:
    """Return the fields as integers minus `base`; the first that is none, or out of range, is an error with its line."""
    buffer = np.frombuffer(text.data, dtype=np.uint8)
    length = fields.end - fields.start
    bad = (length == 0) | (length > 18)
    value = np.zeros(length.size, dtype=np.int64)
    for k in range(min(int(length.max(initial=0)), 18)):
        active = length > k
        digit = buffer[np.where(active, fields.start + k, 0)] - np.uint8(48)
        bad |= active & (digit > 9)
        value = np.where(active, 10 * value + digit, value)
    value -= base
    bad |= (value < 0) | (value > MAX_ID)
    if bad.any():
        _fail_integer(text, fields, int(np.argmax(bad)), sep, base)
    return value


def _fail_integer(text: _Text, fields: _Fields, index: int, sep: str, base: int) -> NoReturn:
    line = int(fields.line[index])
    token = text.data[fields.start[index] : fields.end[index]].decode()
    digits = token.removeprefix("-")
    if not (digits.isascii() and digits.isdigit()):
        hint = _separator_hint(text.line(line), sep)
        text.fail(line, f"expected integers separated by {_show(sep)}, got {token[:40]!r}{hint}")
    if token.startswith("-"):
        text.fail(line, f"negative id {token[:40]}; ids start at {base}")
    if len(token) <= 18 and int(token) < base:
        text.fail(line, f"id {token} is below the base {base}")
    text.fail(line, f"id {token[:40]} is larger than {MAX_ID + base}")


def _check_below(text: _Text, fields: _Fields, ids: Ints, what: str, size: int | None) -> None:
    if size is None:
        return
    over = np.flatnonzero(ids >= size)
    if over.size:
        text.fail(int(fields.line[over[0]]), f"{what} id {ids[over[0]]} is not below num_{what}s={size}")


def _header_positions(text: _Text, wanted: Sequence[tuple[str, str]]) -> list[int]:
    """Return the columns of the wanted (name, type) fields of a RecBole header."""
    header = text.line(0)
    types: dict[str, str] = {}
    for field in header.split("\t"):
        name, colon, kind = field.strip().rpartition(":")
        if not colon or ":" in name or kind not in _FIELD_TYPES:
            problem = f"expected a header of tab separated name:type fields (types {', '.join(_FIELD_TYPES)})"
            text.fail(0, f"{problem}, got {field.strip()[:60]!r}{_separator_hint(header, chr(9))}")
        if name in types:
            text.fail(0, f"the header names the field {name!r} twice")
        types[name] = kind
    for name, kind in wanted:
        if name not in types:
            text.fail(0, f"the header has no field {name!r}; its fields are {', '.join(types)}")
        if types[name] != kind:
            text.fail(0, f"field {name!r} must have type {kind}, got {types[name]}")
    return [list(types).index(name) for name, _ in wanted]


def _number_tokens(text: _Text, fields: _Fields) -> tuple[Ints, tuple[str, ...]]:
    """Number the tokens from 0 in order of first appearance."""
    empty = np.flatnonzero(fields.start == fields.end)
    if empty.size:
        text.fail(int(fields.line[empty[0]]), "empty token")
    number: dict[bytes, int] = {}
    index = [number.setdefault(token, len(number)) for token in fields.texts(text.data)]
    return np.array(index, dtype=np.int64), tuple(token.decode() for token in number)


def _keep_rated(edges: Tensor, text: _Text, fields: _Fields, min_rating: float) -> Tensor:
    """Return the edges whose rating is at least `min_rating`."""
    if not math.isfinite(min_rating):
        raise ValueError(f"min_rating must be a finite number, got {min_rating!r}")
    tokens = fields.texts(text.data)
    enough: dict[bytes, bool] = {}
    for line, token in zip(fields.line.tolist(), tokens, strict=True):
        if token not in enough:
            enough[token] = _parse_rating(text, line, token) >= min_rating
    keep = torch.tensor([enough[token] for token in tokens])
    if not keep.any():
        raise ValueError(f"{text.name}: no rating reaches min_rating={min_rating}")
    return edges[:, keep]


def _parse_rating(text: _Text, line: int, token: bytes) -> float:
    try:
        value = math.nan if b"_" in token else float(token)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        text.fail(line, f"expected a number as rating, got {token[:40].decode(errors='replace')!r}")
    return value


def _edges(user: Ints, item: Ints) -> Tensor:
    return torch.from_numpy(np.stack((user.reshape(-1), item.reshape(-1))).astype(np.int64, copy=False))


def _guess_separator(line: str) -> str | None:
    """Return what seems to separate the columns of a line, None for a single column."""
    line = line.strip()
    return next((sep for sep in ("::", "\t", ",", ";", "|", ":", " ") if sep in line), None)


def _separator_hint(line: str, sep: str) -> str:
    guess = _guess_separator(line)
    if guess is None or guess == sep or (not sep.strip() and not guess.strip() and sep == " "):
        return ""
    return f"; the line looks separated by {_show(guess)}"


def _show(sep: str) -> str:
    return {"\t": "tabs", " ": "blanks"}.get(sep, repr(sep))
