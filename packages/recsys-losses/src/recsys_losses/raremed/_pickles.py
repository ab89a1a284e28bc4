"""A reader of pickles that builds containers, numbers, numpy arrays and a stand-in for the vocabulary class only."""

from __future__ import annotations

import builtins
import copyreg
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

_BUILTINS = (
    "bool",
    "bytearray",
    "bytes",
    "complex",
    "dict",
    "float",
    "frozenset",
    "int",
    "list",
    "object",
    "set",
    "str",
)
_NUMPY = {
    "_core.multiarray": ("_reconstruct", "scalar"),
    "_core.numeric": ("_frombuffer",),
    "": ("ndarray", "dtype"),
}


class Voc:
    """Stand-in for the vocabulary class of the original code; holds idx2word and word2idx."""


class _Inert:
    """Stands for whatever dill needs to rebuild a class from its source; swallows it without running anything."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        del arguments, options

    def __call__(self, *arguments: Any, **options: Any) -> _Inert:
        del arguments, options
        return self

    def __setstate__(self, state: Any) -> None:
        del state

    def __setitem__(self, key: Any, value: Any) -> None:
        del key, value


def _create_type(*arguments: Any) -> type[Voc]:
    """What dill calls to rebuild a class: whatever it was, it's an empty Voc here."""
    del arguments
    return Voc


class _Unpickler(pickle.Unpickler):
    """Knows the names below; any other is refused before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__") and name in _BUILTINS:
            return getattr(builtins, name)
        if module == "numpy" or module.startswith("numpy."):
            return _from_numpy(module.removeprefix("numpy").removeprefix("."), name)
        if (module, name) in (("copyreg", "_reconstructor"), ("copy_reg", "_reconstructor")):
            return copyreg._reconstructor  # type: ignore[attr-defined]
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        if name == "Voc":
            return Voc
        if module == "dill" or module.startswith("dill."):
            return _create_type if name == "_create_type" else _Inert()
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


def read_pickle(path: Path) -> Any:
    """Return the object in a pickle of plain data.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or asks for anything that isn't allowed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    damage = (
        pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, MemoryError, OverflowError,
        RecursionError, TypeError, UnicodeDecodeError, ValueError,
    )  # fmt: skip
    with path.open("rb") as file:
        try:
            return _Unpickler(file).load()
        except damage as error:
            raise ValueError(f"{path} can't be read as a pickle of plain data: {error}") from None


def vocabulary_of(path: Path, vocabularies: Any, name: str) -> tuple[str, ...]:
    """Return the words of one of the vocabularies, by id.

    Raises:
        ValueError: If it isn't there or its ids aren't 0, 1, ....
    """
    voc = vocabularies.get(name) if isinstance(vocabularies, dict) else None
    words = getattr(voc, "idx2word", None)
    if not isinstance(words, dict) or sorted(words) != list(range(len(words))):
        raise ValueError(f"{path}: expected {name!r} with idx2word for the ids 0, 1, ...")
    return tuple(str(words[i]) for i in range(len(words)))


def _from_numpy(module: str, name: str) -> Any:
    here = module.replace("core.", "_core.") if module.startswith("core.") else module
    if name not in _NUMPY.get(here, ()):
        raise pickle.UnpicklingError(f"numpy.{module}.{name} is not allowed")
    if not here:
        return getattr(np, name)
    try:
        from numpy._core import multiarray, numeric
    except ImportError:  # numpy 1
        from numpy.core import multiarray, numeric  # type: ignore[no-redef]
    return getattr(multiarray if here.endswith("multiarray") else numeric, name)


def _latin1(text: str, encoding: str) -> bytes:
    """What old protocols call for the bytes of an array; no other codec is looked up."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the encoding {encoding!r} is not allowed")
    return text.encode("latin1")
