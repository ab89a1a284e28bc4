"""The sparse form of masked tensors: for serving, on disk, and what it costs."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from recsys_losses._storage import read_tensors, write_tensors
from recsys_losses.dsl._masks import as_mask

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from torch import Tensor

_KIND = "recsys_losses sparse tables"
_PARTS = ("row_pointer", "column", "value")


def to_csr(weight: Tensor) -> Tensor:
    """Copy the non-zeros of a tensor into sparse rows.

    Args:
        weight: Any shape; other than two dimensions are seen as `(shape[0], -1)`, a vector as one row.

    Returns:
        Sparse CSR tensor with 32-bit indices where they suffice, on the device of `weight`.

    Raises:
        ValueError: If `weight` has no dimension.

    Examples:
        >>> import torch
        >>> table = to_csr(torch.tensor([[0.0, 2.0], [0.0, 0.0]]))
        >>> table.crow_indices().tolist(), table.col_indices().tolist(), table.values().tolist()
        ([0, 1, 1], [1], [2.0])
    """
    if weight.ndim == 0:
        raise ValueError("a scalar has no rows to compress")
    rows = weight.detach()
    rows = rows.reshape(1, -1) if rows.ndim == 1 else rows.reshape(rows.shape[0], -1)
    kept = rows != 0
    pointer = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])
    row, column = kept.nonzero().unbind(1)
    index = torch.int32 if max(column.numel(), *rows.shape) < 2**31 else torch.int64
    return _csr(pointer.to(index), column.to(index), rows[row, column], rows.shape)


def csr_bytes(table: Tensor) -> int:
    """Return the bytes of the three arrays of a sparse CSR tensor.

    Args:
        table: Sparse CSR tensor.

    Examples:
        >>> import torch
        >>> csr_bytes(to_csr(torch.eye(4)))  # five pointers, four columns and four values of 4 bytes
        52
    """
    return table.crow_indices().nbytes + table.col_indices().nbytes + table.values().nbytes


def save_compressed(path: str | os.PathLike[str], tables: Mapping[str, Tensor]) -> int:
    """Write sparse and dense tensors to one safetensors file.

    Columns of a sparse table are written in 1, 2 or 4 bytes each, as few as its width allows.

    Args:
        path: File to write or to replace, as a whole.
        tables: By name: sparse CSR tensors, such as `DSLController.compress` returns, and dense ones, which are written
            as they are.

    Returns:
        The size of the file in bytes.

    Raises:
        ValueError: If a tensor is sparse in another layout.

    Examples:
        >>> import tempfile, pathlib, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "tables.safetensors"
        ...     size = save_compressed(path, {"item": to_csr(torch.eye(3)), "bias": torch.zeros(2)})
        ...     tables = load_compressed(path)
        >>> tables["item"].to_dense().diagonal(), tables["bias"]
        (tensor([1., 1., 1.]), tensor([0., 0.]))
    """
    from pathlib import Path

    tensors: dict[str, Tensor] = {}
    layout: list[dict[str, Any]] = []
    for number, (name, table) in enumerate(tables.items()):
        if table.layout == torch.strided:
            layout.append({"name": name})
            tensors[f"{number}"] = table
        elif table.layout == torch.sparse_csr:
            layout.append({"name": name, "shape": list(table.shape)})
            parts = _parts(table)
            tensors |= {f"{number}.{part}": value for part, value in zip(_PARTS, parts, strict=True)}
        else:
            raise ValueError(f"table {name!r} must be dense or sparse CSR, got layout {table.layout}")
    write_tensors(path, tensors, {"kind": _KIND, "version": 1, "tables": layout})
    return Path(path).stat().st_size


def load_compressed(path: str | os.PathLike[str], *, device: str = "cpu") -> dict[str, Tensor]:
    """Read what `save_compressed` wrote.

    Args:
        path: The file.
        device: Where to put the tensors.

    Returns:
        Sparse CSR (32-bit indices where they suffice) and dense tensors by name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or something else.
    """
    tensors, metadata = read_tensors(path, _KIND, device=device)
    tables = {}
    for number, entry in enumerate(metadata["tables"]):
        if "shape" not in entry:
            tables[entry["name"]] = tensors[f"{number}"]
            continue
        pointer, column, value = (tensors[f"{number}.{part}"] for part in _PARTS)
        try:
            table = _csr(pointer, column.to(pointer.dtype), value, torch.Size(entry["shape"]), check=True)
        except RuntimeError as error:
            raise ValueError(f"{path}: table {entry['name']!r} is damaged: {error}") from error
        tables[entry["name"]] = table
    return tables


class SparseEmbedding(nn.Module):
    """Lookup of dense rows in a sparse table, in place of `nn.Embedding` when a model is served.

    Holds the non-zeros, their columns (1 byte each up to a width of 256) and a pointer per row. It has no gradient.

    Args:
        table: Sparse CSR tensor `(rows, width)`, copied.

    Raises:
        ValueError: If `table` isn't sparse CSR.

    Examples:
        >>> import torch
        >>> lookup = SparseEmbedding(to_csr(torch.eye(4)))
        >>> lookup(torch.tensor([2]))
        tensor([[0., 0., 1., 0.]])
    """

    row_pointer: Tensor
    column: Tensor
    value: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        if table.layout != torch.sparse_csr:
            raise ValueError(f"table must be sparse CSR, got layout {table.layout}")
        self.num_rows, self.width = table.shape
        for name, part in zip(_PARTS, _parts(table), strict=True):
            self.register_buffer(name, part.clone())

    @property
    def nbytes(self) -> int:
        """Bytes of the table as it is held."""
        return self.row_pointer.nbytes + self.column.nbytes + self.value.nbytes

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of the ids (any shape), one dimension more."""
        row = ids.reshape(-1)
        start = self.row_pointer[row].long()
        count = self.row_pointer[row + 1] - start
        out = self.value.new_zeros(row.numel() * self.width)
        # The n-th element of a row lies n after its start, and all of them follow each other in `source`.
        source = torch.repeat_interleave(start - (count.cumsum(0) - count), count)
        source += torch.arange(source.numel(), device=row.device)
        place = torch.repeat_interleave(torch.arange(row.numel(), device=row.device) * self.width, count)
        out[place + self.column[source]] = self.value[source]
        return out.view(*ids.shape, self.width)

    def extra_repr(self) -> str:
        return f"{self.num_rows}, {self.width}, nonzero={self.value.numel()}"


def count_costs(module: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, float]:
    """Count the parameters of a masked model.

    Args:
        module: The model.
        masks: Masks by parameter name, such as `DSLController.masks`; parameters without a mask count in full.

    Returns:
        `nonzero` (active parameters), `dense` (all parameters) and `ratio`, their quotient.

    Raises:
        ValueError: If a mask has no parameter or another shape, or the module has no parameters.

    Examples:
        >>> import torch
        >>> count_costs(torch.nn.Linear(4, 2), {"weight": torch.eye(2, 4).bool()})
        {'nonzero': 4, 'dense': 10, 'ratio': 0.4}
    """
    parameters = dict(module.named_parameters())
    unknown = masks.keys() - parameters.keys()
    if unknown:
        raise ValueError(f"masks for unknown parameters: {', '.join(sorted(unknown))}")
    dense = sum(parameter.numel() for parameter in parameters.values())
    if dense == 0:
        raise ValueError("the module has no parameters to count")
    active = {name: int(as_mask(mask, parameters[name].shape).count_nonzero()) for name, mask in masks.items()}
    nonzero = sum(active.get(name, parameter.numel()) for name, parameter in parameters.items())
    return {"nonzero": nonzero, "dense": dense, "ratio": nonzero / dense}


def _parts(table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    width = table.shape[1]
    small = torch.uint8 if width <= 2**8 else torch.int16 if width <= 2**15 else table.col_indices().dtype
    return table.crow_indices(), table.col_indices().to(small), table.values()


def _csr(pointer: Tensor, column: Tensor, value: Tensor, shape: torch.Size, *, check: bool = False) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Sparse CSR tensor support is in beta.*")
        return torch.sparse_csr_tensor(pointer, column, value, shape, check_invariants=check)
