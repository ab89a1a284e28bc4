"""Speed of `CPRSampler` beside a loop over Python sets: accepted (user, item) pairs per second on one core.

    python cpr_sampler.py                                  # graphs drawn with the sizes of gowalla and ml-100k
    python cpr_sampler.py --root shared/data/recsys        # the real ones

Prints one JSON object per data set. Both sides draw edges with the same law, in bulk, and return the same kind of
batches; they differ in the membership test: binary search in sorted keys for all candidates at once, or one set per
user, candidate by candidate. Building either side isn't timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from recsys_losses.cpr import CPRSampler, cpr_batch_sizes

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

SIZES = {"gowalla": (29_858, 40_981, 810_128), "ml-100k": (943, 1_682, 44_679)}


def load(name: str, root: str | None, seed: int) -> tuple[int, int, Tensor]:
    """Return users, items and train edges, from the folder `root` or generated with the sizes of `name`."""
    if root is None:
        num_users, num_items, num_edges = SIZES[name]
        return num_users, num_items, generate(num_users, num_items, num_edges, seed)
    from recsys_losses.data import load_dataset

    data = load_dataset(name, root)
    return data.num_users, data.num_items, data.train


def generate(num_users: int, num_items: int, num_edges: int, seed: int) -> Tensor:
    """Return distinct edges whose user and item degrees fall off roughly as a power law, (2, E)."""
    rng = np.random.default_rng(seed)
    user_p, item_p = ((np.arange(n) + 10.0) ** -0.7 for n in (num_users, num_items))
    keys = np.empty(0, dtype=np.int64)
    while keys.size < num_edges:
        user = rng.choice(num_users, size=num_edges, p=user_p / user_p.sum())
        item = rng.choice(num_items, size=num_edges, p=item_p / item_p.sum())
        keys = np.unique(np.concatenate([keys, user * num_items + item]))
    keys = np.sort(rng.permutation(keys)[:num_edges])
    return torch.from_numpy(np.stack([keys // num_items, keys % num_items]))


def set_loop(edges: Tensor, num_users: int, sizes: list[int], seed: int, steps: int) -> Callable[[], int]:
    """Return a function that draws `steps` steps with sets and says how many pairs that were."""
    rng = np.random.default_rng(seed)
    user, item = edges.tolist()
    train: list[set[int]] = [set() for _ in range(num_users)]
    for u, i in zip(user, item, strict=True):
        train[u].add(i)

    def accepted(cycle: list[int]) -> bool:
        return all(item[cycle[j - 1]] not in train[user[cycle[j - 2]]] for j in range(len(cycle)))

    def draw(k: int, size: int) -> tuple[Tensor, Tensor]:
        cycles: list[list[int]] = []
        while len(cycles) < size:
            cycles += [c for c in rng.integers(len(user), size=(size - len(cycles), k)).tolist() if accepted(c)]
        return (
            torch.tensor([[user[e] for e in cycle] for cycle in cycles]).T,
            torch.tensor([[item[e] for e in cycle] for cycle in cycles]).T,
        )

    return lambda: sum(draw(k, size)[0].numel() for _ in range(steps) for k, size in enumerate(sizes, start=2))


def rate(draw: Callable[[], int], repeats: int) -> dict[str, float | list[float]]:
    """Return median rates in pairs per second of wall-clock and of CPU time; the first, untimed call warms up.

    On a machine that others use as well, the CPU time is the one to read.
    """
    draw()
    wall, cpu = [], []
    for _ in range(repeats):
        started = time.perf_counter(), time.process_time()
        pairs = draw()
        wall.append(pairs / (time.perf_counter() - started[0]))
        cpu.append(pairs / (time.process_time() - started[1]))
    return {
        "pairs_per_second": round(statistics.median(wall)),
        "pairs_per_cpu_second": round(statistics.median(cpu)),
        "runs": [round(x) for x in wall],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=sorted(SIZES), default=sorted(SIZES))
    parser.add_argument("--root", help="folder of the real data sets; without it graphs of their sizes are generated")
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--sample-rate", type=float, default=3.0)
    parser.add_argument("--max-k", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--set-steps", type=int, default=10, help="steps of the slow side per run")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.data:
        num_users, num_items, edges = load(name, args.root, args.seed)
        sampler = CPRSampler(
            edges,
            num_users,
            num_items,
            batch_size=args.batch_size,
            max_k=args.max_k,
            sample_rate=args.sample_rate,
            generator=torch.Generator().manual_seed(args.seed),
        )
        sizes = cpr_batch_sizes(args.batch_size, max_k=args.max_k, sample_rate=args.sample_rate)
        loop = set_loop(edges, num_users, sizes, args.seed, args.set_steps)
        ours = rate(lambda sampler=sampler: sum(u.numel() for b in sampler for u, _ in b.values()), args.repeats)
        theirs = rate(loop, args.repeats)
        record = {
            "command": f"python packages/recsys-losses/benchmarks/cpr_sampler.py{' --root shared/data' if args.root else ''}",
            "data": name if args.root else f"{name}-like",
            "users": num_users,
            "items": num_items,
            "edges": edges.shape[1],
            "samples_per_step": sizes,
            "steps_per_epoch": len(sampler),
            "sampler": ours,
            "python_sets": theirs,
            "ratio": round(ours["pairs_per_cpu_second"] / theirs["pairs_per_cpu_second"], 1),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpu": platform.processor() or platform.machine(),
            "load_average": [round(x, 2) for x in os.getloadavg()],
        }
        print(json.dumps(record))


if __name__ == "__main__":
    main()
