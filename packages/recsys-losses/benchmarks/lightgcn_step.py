"""One LightGCN training step on one core: ours beside PyG's, which normalises the graph in every layer of every step.

    python packages/recsys-losses/benchmarks/lightgcn_step.py --root ../shared/data

Prints one JSON object. Three sides take the same BPR steps from the same parameters, in turn, round by round: PyG's
LightGCN as it comes, the same with a graph normalised once, and ours. Loss and optimiser are the same for all; the largest
difference of the propagated tables is reported too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from typing import TYPE_CHECKING, Any

import torch

from recsys_losses.baselines import bpr_loss
from recsys_losses.models import LightGCN

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def step_of(model: Any, tables: Callable[[], Tensor], batches: Tensor, num_users: int) -> Callable[[int], None]:
    """Return a function that takes the training step on a numbered batch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

    def step(number: int) -> None:
        user, pos, neg = batches[number % len(batches)]
        optimizer.zero_grad()
        table = tables()
        u = table.index_select(0, user)
        pos_score = (u * table.index_select(0, pos + num_users)).sum(1)
        neg_score = (u * table.index_select(0, neg + num_users)).sum(1)
        bpr_loss(pos_score, neg_score).backward()
        optimizer.step()

    return step


def timed(step: Callable[[int], None], steps: int) -> float:
    """Return seconds per step, after one that isn't timed."""
    step(0)
    start = time.perf_counter()
    for number in range(steps):
        step(number)
    return (time.perf_counter() - start) / steps


def main() -> None:
    """Run the comparison and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", default=os.environ.get("BALLAST_DATA", "../shared/data"))
    parser.add_argument("--data", default="lastfm", help="a data set that load_dataset knows")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch-geometric still calls torch.jit.script
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    from torch_geometric.nn import LightGCN as PyGLightGCN
    from torch_geometric.nn.conv.gcn_conv import gcn_norm

    from recsys_losses.data import load_dataset

    data = load_dataset(args.data, args.root)
    num_nodes = data.num_users + data.num_items
    user, item = data.train[0], data.train[1] + data.num_users
    edges = torch.stack([torch.cat([user, item]), torch.cat([item, user])])
    normed, weight = gcn_norm(edges, None, num_nodes, add_self_loops=False, dtype=torch.float32)
    ours = LightGCN(data.num_users, data.num_items, data.train, args.dim, args.layers, seed=0)
    pyg = PyGLightGCN(num_nodes, args.dim, args.layers)
    once = PyGLightGCN(num_nodes, args.dim, args.layers, normalize=False)
    for model in (pyg, once):
        model.load_state_dict(ours.backbone.state_dict())
    tables: dict[str, Callable[[], Tensor]] = {
        "pyg": lambda: pyg.get_embedding(edges),
        "pyg_normalised_once": lambda: once.get_embedding(normed, weight),
        "ours": lambda: torch.cat(ours.embeddings()),
    }
    with torch.no_grad():
        reference = tables["pyg"]()
        difference = {side: float((table() - reference).abs().max()) for side, table in tables.items()}
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(data.train.shape[1], (8, args.batch_size), generator=generator)
    negative = torch.randint(data.num_items, row.shape, generator=generator)
    batches = torch.stack([data.train[0][row], data.train[1][row], negative], dim=1)
    models = {"pyg": pyg, "pyg_normalised_once": once, "ours": ours}
    steps = {side: step_of(models[side], tables[side], batches, data.num_users) for side in tables}
    rounds = [{side: timed(step, args.steps) for side, step in steps.items()} for _ in range(args.rounds)]
    result = {
        "command": "python packages/recsys-losses/benchmarks/lightgcn_step.py",
        "data": args.data,
        "nodes": num_nodes,
        "edges": data.train.shape[1],
        "layers": args.layers,
        "dim": args.dim,
        "batch_size": args.batch_size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "unit": "seconds per step",
        "median": {side: statistics.median(r[side] for r in rounds) for side in steps},
        "speedup_over_pyg": {side: statistics.median(r["pyg"] / r[side] for r in rounds) for side in steps},
        "largest_difference_to_pyg": difference,
        "rounds": rounds,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
