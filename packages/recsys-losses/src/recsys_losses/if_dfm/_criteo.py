"""Reader and writer of the Criteo conversion log; the file is never in memory as a whole."""

from __future__ import annotations

import gzip
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn, cast

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Ints = NDArray[np.int64]
    Floats = NDArray[np.float64]

BINS = (64, 16, 128, 64, 128, 64, 512, 512)
"""Bins of the numeric columns in the authors' code."""
COLUMNS = 19
_NUMERIC = range(2, 10)
_CATEGORICAL = range(10, 19)
_PIECE = 1 << 25
_TAB, _NEWLINE, _RETURN = 9, 10, 13
_NUMBER = np.zeros(256, dtype=np.bool_)
_NUMBER[np.frombuffer(b"0123456789+-.eE\0", dtype=np.uint8)] = True


@dataclass(frozen=True)
class CriteoLog:
    """The log as arrays: times in seconds (no conversion is -1), 17 columns of codes and their cardinalities."""

    click_ts: Floats
    pay_ts: Floats
    codes: Ints
    cardinalities: tuple[int, ...]


def read_criteo(path: str | os.PathLike[str]) -> CriteoLog:
    """Read the log piece by piece; see `DelayedClicks.load_criteo`."""
    path = Path(path)
    times: list[Floats] = []
    numeric: list[Floats] = []
    vocabularies = [_Vocabulary() for _ in _CATEGORICAL]
    line = 0
    for piece in _pieces(path):
        fields = _Fields(piece, path.name, line)
        click = fields.numbers(0, "click time")
        pay = fields.numbers(1, "conversion time")
        fields.refuse(click < 0, "click time is missing or negative")
        fields.refuse((pay >= 0) & (pay < click), "the conversion lies before the click")
        times.append(np.stack([click, np.where(pay < 0, -1.0, pay)]))
        numeric.append(np.stack([fields.numbers(column, f"column {column + 1}") for column in _NUMERIC]))
        for vocabulary, column in zip(vocabularies, _CATEGORICAL, strict=True):
            vocabulary.add(fields.texts(column))
        line += len(fields)
    if not line:
        raise ValueError(f"{path.name} is empty")
    click_ts, pay_ts = np.concatenate(times, 1)
    codes = np.empty((line, len(BINS) + len(vocabularies)), dtype=np.int64)
    values = np.concatenate(numeric, 1)
    for number, bins in enumerate(BINS):
        codes[:, number] = _binned(values[number], bins)
    cardinalities = list(BINS)
    for number, vocabulary in enumerate(vocabularies, start=len(BINS)):
        codes[:, number], size = vocabulary.codes()
        cardinalities.append(size)
    return CriteoLog(click_ts, pay_ts, codes, tuple(cardinalities))


def write_criteo(path: str | os.PathLike[str], click: Ints, pay: Ints, numeric: Ints, categorical: Ints) -> None:
    """Write the log, whole or not at all; see `DelayedClicks.to_criteo_file`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as raw:
            packed = path.suffix == ".gz"
            file = cast("IO[bytes]", gzip.GzipFile("", "wb", fileobj=raw, mtime=0)) if packed else raw
            for start in range(0, len(click), 65_536):
                part = slice(start, start + 65_536)
                file.write(_text(click[part], pay[part], numeric[part], categorical[part]))
            if file is not raw:
                file.close()
            raw.flush()
            os.fsync(raw.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _text(click: Ints, pay: Ints, numeric: Ints, categorical: Ints) -> bytes:
    rows = zip(click.tolist(), pay.tolist(), numeric.tolist(), categorical.tolist(), strict=True)
    lines = (
        "\t".join(
            [str(c), str(p) if p >= 0 else "", *map(str, x), *(f"{f:x}{code:08x}" for f, code in enumerate(codes))]
        )
        for c, p, x, codes in rows
    )
    return ("\n".join(lines) + "\n").encode()


def _pieces(path: Path) -> Iterator[bytes]:
    """Yield the file in pieces that end with a line; the last one is completed."""
    rest = b""
    with _open(path) as file:
        while block := _read(file, path):
            cut = block.rfind(b"\n") + 1
            if cut:
                yield rest + block[:cut]
                rest = block[cut:]
            else:
                rest += block
    if rest:
        yield rest + b"\n"


def _open(path: Path) -> IO[bytes]:
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a file")
    if not path.exists():
        raise FileNotFoundError(f"no file {path}; the Criteo conversion log has to be downloaded by its user")
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return cast("IO[bytes]", gzip.open(path)) if packed else path.open("rb")


def _read(file: IO[bytes], path: Path) -> bytes:
    try:
        return file.read(_PIECE)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path.name}: truncated or damaged gzip data ({error})") from error


class _Fields:
    """The fields of a piece as byte ranges, found without a loop over its lines."""

    def __init__(self, piece: bytes, name: str, first_line: int) -> None:
        self.name, self.first_line = name, first_line
        self.buffer: Bytes = np.frombuffer(piece, dtype=np.uint8)
        ends = np.flatnonzero((self.buffer == _TAB) | (self.buffer == _NEWLINE))
        newline = self.buffer[ends] == _NEWLINE
        lines = np.flatnonzero(newline)
        count = np.diff(lines, prepend=-1)
        if (count != COLUMNS).any():
            bad = int(np.flatnonzero(count != COLUMNS)[0])
            self.fail(bad, f"expected {COLUMNS} tab-separated columns, got {count[bad]}")
        self.end: Ints = ends.reshape(-1, COLUMNS).astype(np.int64)
        self.start: Ints = np.concatenate([[0], ends[:-1] + 1]).reshape(-1, COLUMNS)
        last = self.end[:, -1]
        returned = (last > self.start[:, -1]) & (self.buffer[last - 1] == _RETURN)
        self.end[:, -1] = last - returned

    def __len__(self) -> int:
        return len(self.end)

    def texts(self, column: int) -> NDArray[np.bytes_]:
        """Return the fields of a column as fixed-width byte strings."""
        start, end = self.start[:, column], self.end[:, column]
        width = max(1, int((end - start).max()))
        at = start[:, None] + np.arange(width)
        inside = at < end[:, None]
        cells = np.where(inside, self.buffer[np.minimum(at, len(self.buffer) - 1)], 0).astype(np.uint8)
        return cells.view(f"S{width}").ravel()

    def numbers(self, column: int, what: str) -> Floats:
        """Return a column as numbers, -1 where it is empty."""
        texts = self.texts(column)
        texts = np.where(texts == b"", b"-1", texts)
        letters = texts.view(np.uint8).reshape(len(texts), -1)
        self.refuse(np.any(~_NUMBER[letters], axis=1), f"{what} is not a number")
        try:
            values = texts.astype(np.float64)
        except ValueError:
            self.refuse(np.array([not _is_number(text) for text in texts]), f"{what} is not a number")
            raise
        self.refuse(~np.isfinite(values), f"{what} is not finite")
        return values

    def refuse(self, bad: NDArray[np.bool_], problem: str) -> None:
        """Raise for the first line of a mask."""
        if bad.any():
            self.fail(int(np.flatnonzero(bad)[0]), problem)

    def fail(self, line: int, problem: str) -> NoReturn:
        raise ValueError(f"{self.name}:{self.first_line + line + 1}: {problem}")


class _Vocabulary:
    """Numbers the texts of a column in sorted order over all pieces."""

    def __init__(self) -> None:
        self.known: list[NDArray[np.bytes_]] = []
        self.local: list[NDArray[np.int32]] = []

    def add(self, texts: NDArray[np.bytes_]) -> None:
        """Take the texts of one piece."""
        values, codes = np.unique(texts, return_inverse=True)
        self.known.append(values)
        self.local.append(codes.astype(np.int32))

    def codes(self) -> tuple[Ints, int]:
        """Return the number of each text, pieces in order, and how many there are."""
        values = np.unique(np.concatenate(self.known))
        parts = [np.searchsorted(values, known)[local] for known, local in zip(self.known, self.local, strict=True)]
        return np.concatenate(parts).astype(np.int64), len(values)


def _binned(values: Floats, bins: int) -> Ints:
    low, high = values.min(), values.max()
    scaled: Any = (values - low) / (high - low) if high > low else np.zeros_like(values)
    codes: Ints = np.floor(scaled * (bins - 1e-5)).astype(np.int64)
    return codes


def _is_number(text: bytes) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
