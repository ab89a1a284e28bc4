"""Errors that end a command with a message and an exit code instead of a traceback."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["BenchError", "StoreError", "UsageError", "unknown"]


class BenchError(Exception):
    """Something went wrong while measuring; exit code 1."""

    exit_code = 1


class UsageError(BenchError):
    """The caller asked for something that does not exist or does not fit; exit code 2."""

    exit_code = 2


class StoreError(BenchError):
    """A results store cannot be used as it is (schema, lock, missing); exit code 2."""

    exit_code = 2


def unknown(kind: str, value: str, known: Iterable[str]) -> UsageError:
    """Return the error for a name that is not known: it lists the known names and the nearest one.

    Args:
        kind: What the name stands for, e.g. "suite".
        value: The name received.
        known: The accepted names.

    Examples:
        >>> str(unknown("suite", "quik", ["cpu", "quick"]))
        "unknown suite 'quik'; known: cpu, quick; did you mean 'quick'?"
    """
    names = sorted(known)
    nearest = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return UsageError(f"unknown {kind} {value!r}; known: {', '.join(names)}{hint}")
