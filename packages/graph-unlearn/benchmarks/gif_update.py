"""What an update costs against the published recursion and a lean retrain, and the memory of a graph of 200,000 nodes.

    python packages/graph-unlearn/benchmarks/gif_update.py --data-root ../shared/data
    python packages/graph-unlearn/benchmarks/gif_update.py --data-root ../shared/data --skip-large

Prints one JSON object. Times are processor time of one process, the sides in turns; an update is all of `unlearn`: affected
nodes, gradients, system, backtracking. Damping 3 is where conjugate gradients leave the undamped residual that the published
recursion leaves (scale 500, 100 iterations); damping 10 is the default, a smaller step. The large graph is generated, with
neighbourhoods that stay local; its model is PyG's GCN. Every side runs in a process of its own there.
"""

from __future__ import annotations

import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ballast_testing.measure import emit, in_worker, interleaved, machine, parser, peak_extra_bytes, ratio
from graph_unlearn.data import load_graph, synthetic_graph, training_graph
from graph_unlearn.gif import unlearn
from graph_unlearn.nets import GCN
from graph_unlearn.requests import NodeRequest, apply_request, draw_request
from graph_unlearn.training import TrainConfig, retrain

if TYPE_CHECKING:
    from collections.abc import Callable

UPDATES: dict[str, dict[str, Any]] = {
    "cg_default_damping_10": {},
    "cg_equal_residual_damping_3": {"damping": 3.0},
    "cg_auto_damping": {"damping": "auto"},
    "published_recursion": {"solver": "neumann", "damping": 0.0, "scale": 500.0, "num_iter": 100},
}
NODES, EDGES, FEATURES, CLASSES = 200_000, 1_000_000, 64, 10
LARGE: dict[str, dict[str, Any]] = {"full": {}, "batches": {"batch_size": 5_000}}


def small(args: Any, task: Any) -> dict[str, Any]:
    """Time of one update and one retrain, GCN on Cora, 5 % requested."""
    data = load_graph("cora", args.data_root)
    data.x = data.x.to_sparse()
    graph = training_graph(data)
    config = TrainConfig(seed=args.seed)

    def make() -> torch.nn.Module:
        return GCN(data.x.shape[1], data.num_classes)

    model = retrain(make, graph, graph.train_mask, config)
    request = draw_request(task, graph, 0.05, torch.Generator().manual_seed(args.seed))
    after = apply_request(request, graph)
    sides: dict[str, Callable[[], Any]] = {
        name: lambda options=options: unlearn(model, graph, request, **options) for name, options in UPDATES.items()
    }
    found = {name: run() for name, run in sides.items()}
    sides["retrain"] = lambda: retrain(make, after, after.train_mask, config)
    seconds = interleaved(sides, repetitions=args.repetitions, clock=time.process_time)
    median = {name: value["median_s"] for name, value in seconds.items()}
    out: dict[str, Any] = {"case": f"GCN on Cora, {task} request of 5 %", "retrain_median_s": median["retrain"]}
    for name, result in found.items():
        out[f"{name}_median_s"] = median[name]
        out[f"{name}_undamped_residual"] = result.solve.undamped_relative_residual
        out[f"{name}_damped_residual"] = result.solve.relative_residual
        out[f"{name}_products"] = result.solve.num_hvp
        out[f"speed_of_{name}_over_retrain"] = median["retrain"] / median[name]
    equal, published = found["cg_equal_residual_damping_3"], found["published_recursion"]
    out["undamped_residual_ratio_cg_damping_3_over_published"] = (
        equal.solve.undamped_relative_residual / published.solve.undamped_relative_residual
    )
    out["speed_of_cg_at_equal_residual_over_published"] = (
        median["published_recursion"] / median["cg_equal_residual_damping_3"]
    )
    return out


def large_update(side: str, seed: int, file: Path | None) -> Callable[[], object]:
    """Return one update on the large graph; it leaves its step in a file."""
    from torch_geometric.nn import GCN as PyGGCN

    data = synthetic_graph(NODES, FEATURES, CLASSES, num_edges=EDGES, locality=50, seed=seed)
    torch.manual_seed(seed)
    model = PyGGCN(FEATURES, 32, 2, CLASSES)
    request = NodeRequest(torch.randperm(NODES, generator=torch.Generator().manual_seed(seed))[:20].sort().values)

    def run() -> None:
        result = unlearn(model, data, request, damping=1e5, rtol=1e-6, max_iter=4, retained_sample=5_000, **LARGE[side])
        if file is not None:
            np.save(file, torch.cat([leaf.flatten() for leaf in result.delta.values()]).numpy())

    return run


def large(args: Any) -> dict[str, Any]:
    """Peak memory at once and in exact neighbourhoods, and how far the two steps are apart."""
    with tempfile.TemporaryDirectory() as folder:
        files = {side: Path(folder) / f"{side}.npy" for side in LARGE}
        memory = {side: in_worker(f"{side}:{file}", ["--seed", str(args.seed)]) for side, file in files.items()}
        steps = {side: np.load(file).astype(np.float64) for side, file in files.items()}
    return {
        "case": f"PyG's GCN, {NODES:,} nodes, {2 * EDGES:,} directed edges drawn, batches of 5,000 nodes",
        "full_extra_bytes": memory["full"],
        "batches_extra_bytes": memory["batches"],
        "memory_of_batches_over_full": ratio(memory["batches"], memory["full"]),
        "relative_difference_of_steps": float(
            np.linalg.norm(steps["batches"] - steps["full"]) / np.linalg.norm(steps["full"])
        ),
    }


def main() -> None:
    """Measure and print."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--data-root", help="folder of the real data (default: $BALLAST_DATA)")
    options.add_argument("--skip-large", action="store_true", help="leave out the large graph")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # torch.jit inside torch-geometric; the recursion doesn't converge, as published
    if args.memory_of:
        side, _, file = args.memory_of.partition(":")
        run = large_update(side, args.seed, Path(file) if file else None)
        print(json.dumps({"peak_extra_bytes": peak_extra_bytes(run)}))
        return
    if args.data_root is None:
        import os

        args.data_root = os.environ.get("BALLAST_DATA")
    if args.data_root is None:
        options.error("--data-root is needed, or BALLAST_DATA")
    about = machine()
    results = [small(args, task) for task in ("node", "edge", "feature")]
    if not args.skip_large:
        results.append(large(args))
    emit({**about, "results": results}, args.output)


if __name__ == "__main__":
    main()
