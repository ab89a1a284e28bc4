"""Cells on a Ray cluster: every cell still runs in a process of its own, started by a Ray task.

Ray is the optional extra `ballast-bench[ray]` and imported here only. A task whose worker dies is retried by Ray; the
driver alone writes the results store, so nothing is lost or written twice. `jobs` bounds the tasks in flight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ballast_bench.errors import UsageError
from ballast_bench.process import failure, run_one

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["on_ray"]

_RETRIES = 3


def on_ray(specs: Sequence[Mapping[str, Any]], jobs: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Run cells as Ray tasks; yield (index, outcome) as they end.

    Connects to the cluster that RAY_ADDRESS names, or starts one on this machine.

    Raises:
        UsageError: If Ray is not installed.
    """
    try:
        import ray  # type: ignore[import-not-found,unused-ignore]
    except ModuleNotFoundError:
        raise UsageError(
            "--executor ray needs Ray, which is not installed; install the extra: pip install 'ballast-bench[ray]'"
        ) from None
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
    task = ray.remote(num_cpus=1, max_retries=_RETRIES)(run_one)
    waiting = list(range(len(specs)))[::-1]
    running: dict[Any, int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                index = waiting.pop()
                running[task.remote(dict(specs[index]))] = index
            ready, _ = ray.wait(list(running), num_returns=1)
            for reference in ready:
                yield running.pop(reference), _outcome(ray, reference)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        if started:
            ray.shutdown()


def _outcome(ray: Any, reference: Any) -> dict[str, Any]:
    try:
        return ray.get(reference)  # type: ignore[no-any-return]
    except ray.exceptions.RayError as error:
        return failure("failed", f"the Ray task failed {_RETRIES + 1} times: {error}", 0.0)
