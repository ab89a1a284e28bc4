"""Run a function on several gloo processes of this machine and collect what each returns."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["gathered", "run_gloo"]


def gathered(values: Tensor) -> Tensor:
    """Return tensors of equal shapes of all processes, rank 0 first; of this one alone where no processes are joined.

    Args:
        values: Detached, (N, ...).

    Returns:
        (world size * N, ...).

    Raises:
        ValueError: If `values` carries a gradient, which a gather would lose.
    """
    import torch

    if values.requires_grad:
        raise ValueError("values must be detached")
    if not torch.distributed.is_initialized():
        return values
    parts = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def run_gloo(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call `fn(rank, world_size, *args)` in `world_size` processes joined by gloo.

    The processes are spawned, so `fn` must be a module-level function (its test file is loaded by path) and `args`
    picklable: tensors and plain values, no classes of the test file. Each process uses one thread; the rendezvous is a
    file of its own, so runs side by side can't meet.

    Args:
        fn: Called with the default process group initialised.
        world_size: Number of processes, >= 1.
        *args: Further arguments of `fn`.
        timeout: Seconds, > 0, after which the processes are ended.

    Returns:
        What each rank returned, rank 0 first. Tensors come back as CPU tensors without a graph.

    Raises:
        ValueError: If `world_size` < 1, `timeout` is not positive, or `fn` is a lambda or a local function.
        RuntimeError: If a process raised (its traceback is in the message) or died.
        TimeoutError: If the processes did not finish in time.

    Examples:
        A module-level function of the test file, and the call:

        ```text
        def summed(rank, world_size, x):
            value = torch.tensor([x + rank])
            torch.distributed.all_reduce(value)
            return value

        first, second = run_gloo(summed, 2, 10)
        ```
    """
    if not world_size >= 1:
        raise ValueError(f"world_size must be >= 1, got {world_size!r}")
    if not timeout > 0:
        raise ValueError(f"timeout must be > 0, got {timeout!r}")
    import torch.multiprocessing as mp

    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="ballast-gloo-") as folder:
        processes, readers = [], []
        for rank in range(world_size):
            reader, writer = context.Pipe(duplex=False)
            arguments = (_Target(fn), rank, world_size, str(Path(folder) / "rendezvous"), timeout, writer, args)
            process = context.Process(target=_child, args=arguments, daemon=True)
            process.start()
            writer.close()  # the child holds the other end now: its death ends the pipe
            processes.append(process)
            readers.append(reader)
        try:
            return _collect(processes, readers, timeout)
        finally:
            _end(processes)


class _Target:
    """A function on its way to another process: its name, and its file for test modules that have no importable name."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.module = fn.__module__
        self.name = fn.__qualname__
        self.path = inspect.getsourcefile(fn)
        if "<" in self.name or self.path is None:
            raise ValueError(f"fn must be a module-level function, got {self.name}")

    def load(self) -> Callable[..., Any]:
        try:
            module = importlib.import_module(self.module)
        except ModuleNotFoundError:
            # pytest --import-mode=importlib gives test files names that nobody else can import.
            spec = importlib.util.spec_from_file_location(self.module, str(self.path))
            if spec is None or spec.loader is None:
                raise
            module = sys.modules[self.module] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        found: Any = module
        for part in self.name.split("."):
            found = getattr(found, part)
        return cast("Callable[..., Any]", found)


def _child(
    target: _Target,
    rank: int,
    world_size: int,
    rendezvous: str,
    timeout: float,
    writer: Any,
    args: tuple[Any, ...],
) -> None:
    """Run one rank; send ("result", value) or ("error", traceback)."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        result = target.load()(rank, world_size, *args)
        dist.barrier()
        writer.send(("result", _map(result, _pack)))
    except BaseException:  # noqa: BLE001 (the parent raises it)
        writer.send(("error", traceback.format_exc()))
    finally:
        writer.close()
        if dist.is_initialized():
            dist.destroy_process_group()


class _Packed:
    """A tensor on its way between processes: its bytes, since torch's own shared-memory handles die with the child."""

    def __init__(self, tensor: Any) -> None:
        import torch

        dense = tensor.detach().cpu().contiguous()
        self.dtype = str(dense.dtype).removeprefix("torch.")
        self.shape = tuple(dense.shape)
        self.data = dense.reshape(-1).view(torch.uint8).numpy().tobytes() if dense.numel() else b""

    def tensor(self) -> Any:
        import torch

        dtype = getattr(torch, self.dtype)
        if not self.data:
            return torch.empty(self.shape, dtype=dtype)
        return torch.frombuffer(bytearray(self.data), dtype=dtype).reshape(self.shape)


def _pack(leaf: Any) -> Any:
    import torch

    return _Packed(leaf) if isinstance(leaf, torch.Tensor) else leaf


def _unpack(leaf: Any) -> Any:
    return leaf.tensor() if isinstance(leaf, _Packed) else leaf


def _map(value: Any, convert: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _map(entry, convert) for key, entry in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(entry, convert) for entry in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_map(entry, convert) for entry in value)
    return convert(value)


def _collect(processes: list[Any], readers: list[Any], timeout: float) -> list[Any]:
    """Return every rank's result; raise as soon as one has failed."""
    from multiprocessing.connection import wait

    size = len(processes)
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    while len(results) < size:
        pending = [reader for rank, reader in enumerate(readers) if rank not in results]
        ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"{len(pending)} of {size} gloo processes did not finish within {timeout:g} s")
        errors = []
        for reader in ready:
            rank = readers.index(reader)
            try:
                kind, value = readers[rank].recv()
            except EOFError:
                processes[rank].join(timeout=2.0)
                errors.append(f"rank {rank} of {size} died with exit code {processes[rank].exitcode}")
                continue
            if kind == "error":
                errors.append(f"rank {rank} of {size} failed:\n{value}")
            else:
                results[rank] = _map(value, _unpack)
        if errors:
            raise RuntimeError("\n".join(errors))
    return [results[rank] for rank in range(size)]


def _end(processes: list[Any]) -> None:
    """End the processes that this run has started."""
    for process in processes:
        process.join(timeout=1.0)
        if process.is_alive():
            process.terminate()
            process.join(timeout=2.0)
        if process.is_alive():
            process.kill()
            process.join()
