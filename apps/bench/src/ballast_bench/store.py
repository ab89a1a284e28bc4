"""The results store: a folder with one JSON record per measured cell.

Layout: `store.json` (schema), `lock`, `records/*.json`, `unreadable/` (damaged records, moved aside, never deleted).
A record is written to a temporary file in the same folder, synchronised, renamed, and the folder synchronised: after a
`kill -9` or a power cut it is there completely or not at all. Records are never changed; a later one of the same
(case, method, seed) supersedes an earlier one. `run` holds an exclusive lock (fcntl) on the store for its whole
duration; readers need none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ballast_bench.case import cell_key
from ballast_bench.errors import StoreError
from ballast_bench.meta import now

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["SCHEMA", "Record", "Store", "write_atomic"]

SCHEMA = 1


@dataclass(frozen=True)
class Record:
    """One measured cell, as it lies on disk.

    `run_info` holds what was asked (case description, method, seed, settings, command, times), `train_info` what came
    out (status, metrics, history, memory, times, error), `meta_info` where (versions, commit, machine, data hash).
    """

    schema: int
    key: str
    run_info: Mapping[str, Any]
    train_info: Mapping[str, Any]
    meta_info: Mapping[str, Any]
    path: Path | None = dataclasses.field(default=None, compare=False)

    @property
    def status(self) -> str:
        """Either "ok", "failed", "timeout" or "skipped"."""
        return str(self.train_info["status"])

    @property
    def cell(self) -> tuple[str, str, int]:
        """Case id, method and seed."""
        return self.run_info["case"]["id"], self.run_info["method"], self.run_info["seed"]

    @property
    def finished(self) -> str:
        """End of the measurement, UTC ISO 8601."""
        return str(self.run_info["finished"])

    def to_json(self) -> str:
        """Return the record as JSON text."""
        fields = {name: getattr(self, name) for name in ("schema", "key", "run_info", "train_info", "meta_info")}
        return json.dumps(fields, indent=1, allow_nan=False) + "\n"


class Store:
    """A results store on disk.

    Args:
        path: Its folder.
        create: Make the folder when it does not exist.

    Raises:
        StoreError: If the folder is missing (and not created), is no store, or has another schema.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self.path = Path(path)
        self.records_path = self.path / "records"
        self.unreadable: list[tuple[Path, str]] = []
        if create:
            self._create()
        elif not self.records_path.is_dir():
            raise StoreError(f"{self.path} is not a results store: it has no folder 'records'")
        self._check_schema()

    def _create(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise StoreError(f"{self.path} is a file; a results store is a folder")
        strangers = self.path.is_dir() and not (self.path / "store.json").exists() and not self.records_path.is_dir()
        if strangers and any(self.path.iterdir()):
            raise StoreError(f"{self.path} is not empty and not a results store; name a new folder with --output")
        self.records_path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "store.json").exists():
            write_atomic(self.path / "store.json", json.dumps({"schema": SCHEMA, "created": now()}) + "\n")

    def _check_schema(self) -> None:
        file = self.path / "store.json"
        try:
            found = json.loads(file.read_text(encoding="utf-8"))["schema"]
        except FileNotFoundError:
            return  # the records carry the schema too
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{file} cannot be read: {error}") from error
        _check_version(file, found)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the store for writing; a second writer gets a StoreError at once. Freed by the system on any death."""
        import fcntl

        with (self.path / "lock").open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                owner = file.read().strip() or "unknown"
                raise StoreError(f"{self.path} is in use by another run (process {owner}); wait for it") from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def append(self, record: Record) -> Path:
        """Write a record durably and return its path.

        Raises:
            OSError: If it cannot be written (disk full, read-only); nothing half-written stays behind.
        """
        case, method, seed = record.cell
        stamp = re.sub(r"[^0-9]", "", record.finished)[:20]
        name = f"{_slug(case)}--{_slug(method)}--s{seed}--{record.key[:12]}--{stamp}.json"
        target = self.records_path / name
        write_atomic(target, record.to_json())
        return target

    def records(self) -> list[Record]:
        """Return all readable records, oldest first; the damaged ones are listed in `unreadable`.

        Raises:
            StoreError: If a record has another schema than this program writes.
        """
        self.unreadable = []
        found = []
        for path in sorted(self.records_path.glob("*.json")):
            try:
                found.append(_parse(path))
            except StoreError:
                raise
            except (OSError, ValueError, KeyError, TypeError) as error:
                self.unreadable.append((path, f"{type(error).__name__}: {error}"))
        return sorted(found, key=lambda record: (record.finished, record.key))

    def latest(self) -> list[Record]:
        """Return the newest record of every (case, method, seed), in the order of case, method and seed.

        A successful record is not superseded by a failure with the same settings.
        """
        chosen: dict[tuple[str, str, int], Record] = {}
        for record in self.records():
            before = chosen.get(record.cell)
            keeps = before is not None and before.key == record.key and before.status == "ok" != record.status
            if not keeps:
                chosen[record.cell] = record
        return [chosen[cell] for cell in sorted(chosen)]

    def done(self) -> dict[str, Record]:
        """Return the successful records by cell key."""
        return {record.key: record for record in self.records() if record.status == "ok"}

    def set_unreadable_aside(self) -> None:
        """Move the damaged records found by the last read to `unreadable/` and forget temporary files of dead runs."""
        for path, _ in self.unreadable:
            folder = self.path / "unreadable"
            folder.mkdir(exist_ok=True)
            path.replace(folder / path.name)
        for path in self.records_path.glob(".*.tmp"):
            path.unlink(missing_ok=True)


def write_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader or a crash sees the old content or the new, never a part.

    Raises:
        OSError: If it cannot be written; the temporary file is removed.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parse(path: Path) -> Record:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise TypeError("not a JSON object")
    _check_version(path, content["schema"])
    run, train = content["run_info"], content["train_info"]
    case = run["case"]
    expected = cell_key(case["package"], case["name"], case["dataset"], run["method"], run["seed"], run["settings"])
    if content["key"] != expected:
        raise ValueError(f"key {content['key']} does not belong to the content ({expected})")
    for field in ("status", "metrics", "history", "seconds"):
        train[field]
    run["finished"]
    return Record(content["schema"], content["key"], run, train, content["meta_info"], path)


def _check_version(path: Path, found: object) -> None:
    if found != SCHEMA:
        age = "an older" if isinstance(found, int) and found < SCHEMA else "another"
        raise StoreError(
            f"{path} has {age} schema version ({found!r}); this ballast-bench reads version {SCHEMA}. "
            "Use a new --output folder, or the version of ballast-bench that wrote the store"
        )


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.@+=-]+", "_", text).strip("_") or "_"
