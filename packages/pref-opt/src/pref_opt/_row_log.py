"""Finished rows of a long computation, kept so that an interrupted call goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["RowLog", "digest"]

_FIRST = b'{"settings": '


def digest(value: Any) -> str:
    """Return 16 hex digits that stand for a value of JSON types."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


class RowLog:
    """Rows by their `idx`, also in a JSON-lines file where `path` isn't None; its first line says what they depend on.

    A last line that was torn by a crash is dropped. A file that isn't such a log, or one of other settings, is refused
    before anything is written to it.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.rows: dict[int, dict[str, Any]] = {}
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        stored = self.path.read_bytes() if self.path.exists() else b""
        if not (stored.startswith(_FIRST) or _FIRST.startswith(stored)):
            raise ValueError(f"{self.path} is not a file of finished rows; name another output")
        whole = stored[: stored.rfind(b"\n") + 1]
        lines = [self._parsed(number, line) for number, line in enumerate(whole.splitlines(), 1)]
        if lines:
            self._check(lines[0]["settings"], settings)
        if len(whole) < len(stored):
            os.truncate(self.path, len(whole))
        if not lines:
            self._write([{"settings": dict(settings)}])
        self.rows = {row["idx"]: row for row in lines[1:]}

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Keep rows; where there is a file, they are on the disk when this returns."""
        if self.path is not None and rows:
            self._write(rows)
        self.rows.update((row["idx"], row) for row in rows)

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        assert self.path is not None  # noqa: S101  # for the type checker; the callers have looked
        with self.path.open("ab") as file:
            file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())

    def _parsed(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{self.path}:{number}: not valid JSON: {error}; name another output") from None
        if not isinstance(value, dict) or (number > 1 and not isinstance(value.get("idx"), int)):
            raise ValueError(f"{self.path}:{number}: not a finished row; name another output")
        return value

    def _check(self, stored: Any, settings: Mapping[str, Any]) -> None:
        if not isinstance(stored, dict):
            raise ValueError(f"{self.path} is not a file of finished rows; name another output")
        for name, value in settings.items():
            if stored.get(name) != value:
                raise ValueError(
                    f"{self.path} was written with {name} = {stored.get(name)!r}, asked for is {value!r}; "
                    "name another output"
                )
