"""What a training step of CAL, InfoIGL and AIA costs beside one of empirical risk minimisation (ERM).

    python packages/graph-ood/benchmarks/step_cost.py
    python packages/graph-ood/benchmarks/step_cost.py --device cuda --hidden 300 --batch-size 256

Prints one JSON object. Everything runs on the same batches in turn, in one process. CAL and InfoIGL have the encoder, the
readout and the head of their ERM; AIA has a network of its own (two layers before and two after the masks), so its ERM has
that one. A step is forward, loss, backward and Adam; AIA's has two of each.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ballast_testing.measure import emit, interleaved, machine, parser
from graph_ood.aia import AIA, AIATrainer
from graph_ood.cal import CAL
from graph_ood.data import GoodMotif, SynB
from graph_ood.infoigl import InfoIGL, InfoIGLTrainer
from graph_ood.nets import ConvStack, GraphClassifier, ProjectedEncoder
from graph_ood.training import supervised_step

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch_geometric.data import Batch

    Step = Callable[[Batch], object]

BATCHES = 4


def motif_steps(hidden: int, device: str) -> dict[str, Step]:
    """Return the steps of all methods on GOOD-Motif: three GIN layers, AIA and its ERM four."""
    shared = {name: ConvStack(1, hidden, 3, "gin") for name in ("erm", "cal", "infoigl")}
    aia_stack = ConvStack(1, hidden, 4, "weighted_gin")
    aia_head = torch.nn.Linear(hidden, 3)
    return {
        "erm": _supervised(GraphClassifier(shared["erm"], 3), device),
        "cal": _cal(CAL(1, 3, encoder=shared["cal"]), device),
        "infoigl": InfoIGLTrainer(InfoIGL(1, 3, encoder=shared["infoigl"]).to(device)).step,
        "erm_of_aia": _supervised(GraphClassifier(aia_stack, 3, pool="mean", head=aia_head), device),
        "aia": AIATrainer(AIA(1, 3, hidden=hidden).to(device)).step,
    }


def syn_b_steps(hidden: int, device: str) -> dict[str, Step]:
    """Return the steps of ERM and CAL on SYN-b with CAL's own encoder of three GCN layers."""
    return {
        "erm": _supervised(GraphClassifier(ProjectedEncoder(10, hidden, 3, "gcn"), 4), device),
        "cal": _cal(CAL(10, 4, encoder="gcn", hidden=hidden), device),
    }


def measure(case: str, steps: dict[str, Step], batches: list[Batch], args: Any) -> dict[str, Any]:
    """Return the time of a step of every method over that of its ERM."""
    sides = {name: partial(_run, step, batches) for name, step in steps.items()}
    time = interleaved(sides, repetitions=args.repetitions, warmup=args.warmup, device=args.device)
    seconds = {name: value["median_s"] / len(batches) for name, value in time.items()}
    result: dict[str, Any] = {
        "case": case,
        "nodes_per_batch": sum(batch.num_nodes for batch in batches) // len(batches),
        "erm_step_median_s": seconds["erm"],
        "cal_step_over_erm": seconds["cal"] / seconds["erm"],
    }
    if "infoigl" in seconds:
        result["infoigl_step_over_erm"] = seconds["infoigl"] / seconds["erm"]
    if "aia" in seconds:
        result["aia_step_over_erm_of_its_network"] = seconds["aia"] / seconds["erm_of_aia"]
        result["aia_step_over_erm"] = seconds["aia"] / seconds["erm"]
    return result


def _supervised(model: GraphClassifier, device: str) -> Step:
    model.to(device)
    return supervised_step(model, torch.optim.Adam(model.parameters(), lr=1e-3))


def _cal(model: CAL, device: str) -> Step:
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        model.training_loss(batch)["loss"].backward()
        optimizer.step()

    return step


def _run(step: Step, batches: list[Batch]) -> None:
    for batch in batches:
        step(batch)


def _batches(dataset: Any, args: Any) -> list[Batch]:
    from torch_geometric.loader import DataLoader

    return [batch.to(args.device) for batch in DataLoader(dataset, args.batch_size, drop_last=True)]


def main() -> None:
    """Measure and print."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--hidden", type=int, default=128, help="width (default: 128)")
    options.add_argument("--batch-size", type=int, default=128, help="graphs per step (default: 128)")
    options.add_argument("--skip-syn-b", action="store_true", help="leave out the larger graphs of SYN-b")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    warnings.filterwarnings("ignore", message=".*torch.jit.*")  # torch-geometric still calls torch.jit.script
    graphs = BATCHES * args.batch_size
    motif = GoodMotif(num_data=-(-graphs * 10 // 6) + 30, seed=args.seed)[:graphs]
    size = f"batches of {args.batch_size}, {args.hidden} dimensions"
    about = machine(args.device)
    results = [measure(f"GOOD-Motif, GIN, {size}", motif_steps(args.hidden, args.device), _batches(motif, args), args)]
    if not args.skip_syn_b:
        syn_b = SynB(split="train", total=-(-graphs * 10 // 7) + 100, seed=args.seed)[:graphs]
        results.append(
            measure(f"SYN-b, GCN, {size}", syn_b_steps(args.hidden, args.device), _batches(syn_b, args), args)
        )
    emit({**about, "results": results}, args.output)


if __name__ == "__main__":
    main()
