"""What a training step of CAL costs beside a step of ERM with the same encoder.

    python packages/graph-ood/benchmarks/cal_step.py
    python packages/graph-ood/benchmarks/cal_step.py --device cuda --batch-size 128 --hidden 128

Prints one JSON object. All sides step on the same batches of SYN-b graphs, in turn. With loading, a step
also collates its graphs, as in training. CAL has two convolutions, each as large as a GCN layer, beside the three of the
encoder: next to a GCN that alone is five thirds.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch_geometric.data import Batch

from ballast_testing.measure import emit, interleaved, machine, parser
from graph_ood.cal import CAL, CALPlus
from graph_ood.data import SynB
from graph_ood.nets import GraphClassifier, ProjectedEncoder

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

SIDES = ("erm", "cal", "cal_plus")


def make(side: str, encoder: str, hidden: int, seed: int) -> nn.Module:
    """Return the model of a side."""
    torch.manual_seed(seed)
    net = ProjectedEncoder(10, hidden, 3, encoder)
    if side == "erm":
        return GraphClassifier(net, 4)
    return (CALPlus if side == "cal_plus" else CAL)(10, 4, encoder=net)


def steps(encoder: str, graphs: list[Any], args: Any) -> dict[str, dict[str, Callable[[], None]]]:
    """Return one training step per side, on a batch that is there and on one that is collated first."""
    ready = Batch.from_data_list(graphs).to(args.device)
    models = {side: make(side, encoder, args.hidden, args.seed).to(args.device) for side in SIDES}
    optimizers = {side: torch.optim.Adam(model.parameters(), lr=1e-3) for side, model in models.items()}

    def step(side: str, *, load: bool) -> None:
        batch = Batch.from_data_list(graphs).to(args.device) if load else ready
        optimizers[side].zero_grad()
        model = models[side]
        loss = F.cross_entropy(model(batch), batch.y) if side == "erm" else model.training_loss(batch)["loss"]
        loss.backward()
        optimizers[side].step()

    return {
        kind: {side: partial(step, side, load=kind == "with_loading") for side in SIDES}
        for kind in ("step", "with_loading")
    }


def measure(encoder: str, graphs: list[Any], args: Any) -> dict[str, Any]:
    """Return times of a step and their ratios to ERM."""
    result: dict[str, Any] = {
        "case": f"CAL, {encoder.upper()}, {args.batch_size} graphs of SYN-b, {args.hidden} dimensions"
    }
    for kind, sides in steps(encoder, graphs, args).items():
        time = interleaved(sides, repetitions=args.repetitions, warmup=args.warmup, device=args.device)
        seconds = {side: value["median_s"] for side, value in time.items()}
        suffix = "" if kind == "step" else "_with_loading"
        if kind == "step":
            result["erm_step_median_s"] = seconds["erm"]
            result["cal_graphs_per_s"] = args.batch_size / seconds["cal"]
        for side in SIDES[1:]:
            result[f"{side}_step_over_erm{suffix}"] = seconds[side] / seconds["erm"]
    return result


def main() -> None:
    """Measure and print."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--device", default="cpu")
    options.add_argument("--batch-size", type=int, default=32)
    options.add_argument("--hidden", type=int, default=64)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    about = machine(args.device)
    total = max(400, -(-args.batch_size * 10 // 7) + 40)
    graphs = list(SynB(bias=0.9, split="train", total=total, seed=args.seed))[: args.batch_size]
    emit({**about, "results": [measure(encoder, graphs, args) for encoder in ("gcn", "gin", "gat")]}, args.output)


if __name__ == "__main__":
    main()
