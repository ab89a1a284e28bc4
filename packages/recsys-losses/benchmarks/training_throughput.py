"""Training speed on one core: MF with BPR, and SSM with shared negatives, each beside the plain torch loop.

    python packages/recsys-losses/benchmarks/training_throughput.py --root ../shared/data

Prints one JSON object. Baseline and candidate run in turn, round by round; a round's ratio is of two runs next to each
other. The baselines are what one writes first: `nn.Embedding` tables, `torch.optim.Adam` as it comes, negatives looked up
row by row. The BPR baseline draws its negatives without excluding positives, which the candidate does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from recsys_losses.models import MatrixFactorization
from recsys_losses.objectives import make_objective
from recsys_losses.ssm import ssm_loss
from recsys_losses.training import LossConfig, fit

if TYPE_CHECKING:
    from collections.abc import Callable

    from recsys_losses.data import InteractionData

DIM = 64


def plain_bpr(data: InteractionData, batch_size: int, epochs: int) -> float:
    """Return interactions per second of the median epoch of a plain loop."""
    user_table, item_table = nn.Embedding(data.num_users, DIM), nn.Embedding(data.num_items, DIM)
    optimizer = torch.optim.Adam([*user_table.parameters(), *item_table.parameters()], lr=5e-3)
    seconds = []
    for _ in range(epochs):
        start = time.perf_counter()
        for row in torch.randperm(data.train.shape[1]).split(batch_size):
            user, pos = data.train[:, row]
            neg = torch.randint(data.num_items, user.shape)
            u = user_table(user)
            loss = F.softplus((u * item_table(neg)).sum(1) - (u * item_table(pos)).sum(1)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds.append(time.perf_counter() - start)
    return data.train.shape[1] / statistics.median(seconds[1:])


def fitted_bpr(data: InteractionData, batch_size: int, epochs: int) -> float:
    """Return interactions per second of the median epoch of `fit`."""
    model = MatrixFactorization(data.num_users, data.num_items, DIM, seed=0)
    result = fit(model, LossConfig("bpr"), data, epochs=epochs, batch_size=batch_size, lr=5e-3, select_on="none")
    return data.train.shape[1] / statistics.median(record["seconds"] for record in result.history[1:])


def gathered_ssm(data: InteractionData, batch_size: int, count: int) -> Callable[[], None]:
    """Return a step of SSM whose negatives are gathered for every row, (B, N, d)."""
    user_table, item_table = nn.Embedding(data.num_users, DIM), nn.Embedding(data.num_items, DIM)
    optimizer = torch.optim.Adam([*user_table.parameters(), *item_table.parameters()], lr=5e-3)

    def step() -> None:
        user, pos = data.train[:, torch.randint(data.train.shape[1], (batch_size,))]
        neg = torch.randint(data.num_items, (batch_size, count))
        optimizer.zero_grad()
        ssm_loss(user_table(user), item_table(pos), item_table(neg), temperature=0.1).backward()
        optimizer.step()

    return step


def fitted_ssm(data: InteractionData, batch_size: int, count: int, *, shared: bool) -> Callable[[], None]:
    """Return a step of SSM as `fit` takes it."""
    model = MatrixFactorization(data.num_users, data.num_items, DIM, seed=0)
    config = LossConfig("ssm", num_negatives=count, shared_negatives=shared)
    objective = make_objective(
        config,
        data,
        batch_size=batch_size,
        l2=0.0,
        l2_on=None,
        generator=torch.Generator().manual_seed(0),
        device=torch.device("cpu"),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, fused=True)
    batches = iter(())

    def step() -> None:
        nonlocal batches
        batch: Any = next(batches, None)
        while batch is None or batch.size < batch_size:
            if batch is None:
                batches = iter(objective.batches())  # type: ignore[assignment]
            batch = next(batches, None)
        optimizer.zero_grad()
        objective(batch, model).total().backward()
        optimizer.step()

    return step


def timed(step: Callable[[], None], steps: int) -> float:
    """Return seconds per step, after one that isn't timed."""
    step()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps


def summary(rounds: list[dict[str, float]], unit: str, *, higher_is_better: bool) -> dict[str, object]:
    """Return medians and the ratio of each side to the baseline."""
    median = {side: statistics.median(r[side] for r in rounds) for side in rounds[0]}
    sides = [side for side in rounds[0] if side != "baseline"]
    speedup = {
        side: statistics.median(
            r[side] / r["baseline"] if higher_is_better else r["baseline"] / r[side] for r in rounds
        )
        for side in sides
    }
    return {"unit": unit, "median": median, "speedup_over_baseline": speedup, "rounds": rounds}


def main() -> None:
    """Run both cases and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", default=os.environ.get("BALLAST_DATA", "../shared/data"))
    parser.add_argument("--data", default="lastfm", help="a data set that load_dataset knows")
    parser.add_argument("--batch-size", type=int, default=2048, help="of BPR; SSM takes 1,024")
    parser.add_argument("--negatives", type=int, default=800)
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    from recsys_losses.data import load_dataset

    data = load_dataset(args.data, args.root)
    bpr = [
        {
            "baseline": plain_bpr(data, args.batch_size, args.epochs),
            "fit": fitted_bpr(data, args.batch_size, args.epochs),
        }
        for _ in range(args.rounds)
    ]
    steps = {
        "baseline": gathered_ssm(data, 1024, args.negatives),
        "shared": fitted_ssm(data, 1024, args.negatives, shared=True),
        "own": fitted_ssm(data, 1024, args.negatives, shared=False),
    }
    ssm = [{side: timed(step, args.steps) for side, step in steps.items()} for _ in range(args.rounds)]
    result = {
        "command": "python packages/recsys-losses/benchmarks/training_throughput.py",
        "data": args.data,
        "dim": DIM,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "bpr": {"batch_size": args.batch_size} | summary(bpr, "interactions per second", higher_is_better=True),
        "ssm": {"batch_size": 1024, "negatives": args.negatives}
        | summary(ssm, "seconds per step", higher_is_better=False),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
