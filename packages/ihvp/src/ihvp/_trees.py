"""Pytrees of tensors: a tensor, or dicts, lists and tuples of them. Solvers see the list of leaves and never flatten further."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

Pytree = Any
"""A tensor, or a dict, list or tuple (also nested or named) of them."""


def leaves_of(tree: Pytree, name: str) -> list[Tensor]:
    """Return the tensors of a pytree in its order.

    Raises:
        ValueError: If a leaf isn't a real floating tensor, or there is none.
    """
    found = list(_walk(tree, name))
    if not found:
        raise ValueError(f"{name} holds no tensor")
    for path, leaf in found:
        if not leaf.is_floating_point():
            raise ValueError(f"{path} must be a real floating tensor, got dtype {leaf.dtype}")
    return [leaf for _, leaf in found]


def leaves_like(reference: Pytree, tree: Pytree, name: str, reference_name: str) -> list[Tensor]:
    """Return the tensors of `tree` in the order of `reference`; the order of dict keys may differ.

    Raises:
        ValueError: If keys, lengths or shapes differ ("structure").
    """
    return list(_walk_like(reference, tree, name, reference_name))


def rebuild(reference: Pytree, leaves: list[Tensor]) -> Pytree:
    """Return a pytree with the structure of `reference` and other tensors."""
    return _rebuild(reference, iter(leaves))


def map_tensors(convert: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply `convert` to the tensors inside dicts, lists and tuples; everything else is passed through."""
    if isinstance(value, torch.Tensor):
        return convert(value)
    if isinstance(value, dict):
        return {key: map_tensors(convert, entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return _sequence(value, [map_tensors(convert, entry) for entry in value])
    return value


def working(tensor: Tensor) -> Tensor:
    """Return the tensor without a graph, half precision as a float32 copy."""
    tensor = tensor.detach()
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor


def dot(a: list[Tensor], b: list[Tensor]) -> float:
    """Inner product, accumulated in float64."""
    total = sum(torch.dot(x.reshape(-1).double(), y.reshape(-1).double()) for x, y in zip(a, b, strict=True))
    return float(total)


def norm(a: list[Tensor]) -> float:
    """Euclidean norm over all leaves, accumulated in float64."""
    return float(sum(torch.dot(x, x) for x in (leaf.reshape(-1).double() for leaf in a)) ** 0.5)


def all_finite(a: list[Tensor]) -> bool:
    """Whether no element is infinite or NaN."""
    return bool(torch.stack([leaf.isfinite().all() for leaf in a]).all())


def random_like(a: list[Tensor], generator: torch.Generator | None) -> list[Tensor]:
    """Standard normal leaves; without a generator always the same ones. Drawn on the CPU, so that devices agree."""
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype, device=generator.device).to(leaf.device)
        for leaf in a
    ]


def _walk(tree: Pytree, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, (Mapping, list, tuple)):
        for key, entry in _items(tree):
            yield from _walk(entry, f"{path}[{key!r}]")
    else:
        raise ValueError(f"{path} must be a tensor, or a dict, list or tuple of tensors, got {type(tree).__name__}")


def _walk_like(reference: Pytree, tree: Pytree, path: str, other: str) -> Iterator[Tensor]:
    if isinstance(reference, torch.Tensor):
        if not isinstance(tree, torch.Tensor):
            raise ValueError(f"{path} must have the structure of {other}: expected a tensor, got {type(tree).__name__}")
        if tree.shape != reference.shape:
            shapes = f"shape {tuple(tree.shape)}, expected {tuple(reference.shape)}"
            raise ValueError(f"{path} must have the structure of {other}: {shapes}")
        yield tree
        return
    kind = Mapping if isinstance(reference, Mapping) else (list, tuple)
    if not isinstance(tree, kind):
        raise ValueError(f"{path} must have the structure of {other}, got {type(tree).__name__}")
    found, wanted = dict(_items(tree)), dict(_items(reference))
    if found.keys() != wanted.keys():
        missing, extra = sorted(map(repr, wanted.keys() - found)), sorted(map(repr, found.keys() - wanted))
        raise ValueError(f"{path} must have the structure of {other}: missing {missing}, unknown {extra}")
    for key, entry in wanted.items():
        yield from _walk_like(entry, found[key], f"{path}[{key!r}]", other)


def _items(tree: Any) -> Iterator[tuple[Any, Any]]:
    return iter(tree.items()) if isinstance(tree, Mapping) else enumerate(tree)


def _rebuild(reference: Pytree, leaves: Iterator[Tensor]) -> Pytree:
    if isinstance(reference, torch.Tensor):
        return next(leaves)
    if isinstance(reference, Mapping):
        return {key: _rebuild(entry, leaves) for key, entry in reference.items()}
    return _sequence(reference, [_rebuild(entry, leaves) for entry in reference])


def _sequence(like: Any, entries: list[Any]) -> Any:
    return type(like)(*entries) if hasattr(like, "_fields") else type(like)(entries)
