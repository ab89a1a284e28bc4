from __future__ import annotations

import os
import time

import pytest

from ballast_testing.distributed import gathered, run_gloo


def reported(rank: int, world_size: int, offset: int) -> dict:
    import torch

    value = torch.tensor([rank + offset], dtype=torch.bfloat16)
    total = value.clone()
    torch.distributed.all_reduce(total)
    return {
        "own": value,
        "total": total,
        "size": world_size,
        "empty": torch.zeros(0, 3),
        "pair": (rank, "x"),
        "all": gathered(value),
    }


def failing(rank: int, world_size: int) -> int:
    if rank == 1:
        raise KeyError("only on rank one")
    return world_size


def dying(rank: int, world_size: int) -> int:
    if rank == 0:
        os._exit(7)
    return world_size


def sleeping(rank: int, world_size: int) -> None:
    del rank, world_size
    time.sleep(60)


def test_results_come_back_by_rank() -> None:
    import torch

    first, second = run_gloo(reported, 2, 10)
    assert first["own"].dtype == torch.bfloat16
    assert (first["own"].item(), second["own"].item()) == (10, 11)
    assert first["total"].item() == second["total"].item() == 21
    assert first["empty"].shape == (0, 3)
    assert first["all"].tolist() == second["all"].tolist() == [10, 11]
    assert second["pair"] == (1, "x")


def test_one_process_gathers_its_own_values() -> None:
    import torch

    values = torch.ones(2)
    assert gathered(values) is values
    with pytest.raises(ValueError, match="must be detached"):
        gathered(values.requires_grad_())


def test_a_failing_rank_raises_with_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 failed") as caught:
        run_gloo(failing, 2)
    assert "only on rank one" in str(caught.value)
    assert "in failing" in str(caught.value)


def test_a_dead_rank_raises_with_its_exit_code() -> None:
    with pytest.raises(RuntimeError, match="rank 0 of 1 died with exit code 7"):
        run_gloo(dying, 1)


def test_timeout_ends_the_processes() -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="1 of 1"):
        run_gloo(sleeping, 1, timeout=8.0)
    assert time.monotonic() - start < 50


@pytest.mark.parametrize(
    ("size", "timeout", "match"), [(0, 1.0, "world_size"), (1, 0.0, "timeout"), (1, float("nan"), "timeout")]
)
def test_bad_arguments(size: int, timeout: float, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        run_gloo(sleeping, size, timeout=timeout)
