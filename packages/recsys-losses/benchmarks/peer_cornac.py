"""Cornac's side of the comparison: training throughput of its Cython BPR on one thread.

Runs in an environment of its own, started by `peers.py`:

    uv run --no-project --with cornac==3.0.1 python packages/recsys-losses/benchmarks/peer_cornac.py --arrays DIR

DIR holds `train.npy` (2, E). Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np


def main() -> None:
    """Time a number of epochs, less the time of a fit with one epoch (set-up), and print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arrays", type=Path, required=True)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()

    import cornac

    edges = np.load(args.arrays / "train.npy")
    dataset = cornac.data.Dataset.from_uir([(str(u), str(i), 1.0) for u, i in edges.T.tolist()], seed=0)

    def fit(epochs: int) -> float:
        model = cornac.models.BPR(
            k=args.dim,
            max_iter=epochs,
            learning_rate=0.05,
            lambda_reg=0.001,
            num_threads=1,
            use_bias=False,
            seed=0,
            verbose=False,
        )
        start = time.perf_counter()
        model.fit(dataset)
        return time.perf_counter() - start

    fit(1)
    seconds = (fit(args.epochs + 1) - fit(1)) / args.epochs
    print(
        json.dumps(
            {
                "peer": "cornac",
                "version": cornac.__version__,
                "task": "train",
                "optimiser": "SGD, one pair at a time (Hogwild code on one thread)",
                "interactions": int(edges.shape[1]),
                "seconds_per_epoch": seconds,
                "interactions_per_second": edges.shape[1] / seconds,
            }
        )
    )


if __name__ == "__main__":
    main()
