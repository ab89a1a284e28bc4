"""What a training step of InfoIGL costs beside one of cross-entropy: on the same network, and on one without the filter.

    python packages/graph-ood/benchmarks/infoigl_step.py
    python packages/graph-ood/benchmarks/infoigl_step.py --device cuda

Prints one JSON object. The graphs are those of GOOD-Motif in the sizes published for InfoIGL: base, concept shift, 128 graphs
per batch and 128 dimensions; size, covariate shift, 1,024 graphs and 64 dimensions. Collating a batch, the same on all sides,
is not counted.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch_geometric.data import Batch

from ballast_testing.measure import emit, interleaved, machine, parser
from graph_ood.data import load_good_motif
from graph_ood.infoigl import InfoIGL, InfoIGLTrainer

if TYPE_CHECKING:
    from collections.abc import Callable

SHIFTS = {"base": ("concept", 128, 128), "size": ("covariate", 1024, 64)}
STEPS = 3


def cross_entropy_step(model: InfoIGL, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """Take one step of empirical risk minimisation."""
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model.predict(batch), batch.y).backward()
    optimizer.step()


def repeat(step: Callable[[], object]) -> None:
    """Take a few steps, so that one measurement is not too short."""
    for _ in range(STEPS):
        step()


def sides(batch: Batch, hidden: int, seed: int, device: str) -> dict[str, Callable[[], object]]:
    """Return one step of every kind, on networks from one seed."""
    steps: dict[str, Callable[[], object]] = {}
    for name, filtered in (("erm", False), ("filter", True)):
        torch.manual_seed(seed)
        model = InfoIGL(1, 3, hidden=hidden, filter=filtered).to(device).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        steps[name] = partial(cross_entropy_step, model, optimizer, batch)
    for variant in ("official", "paper"):
        for name, filtered in (("", True), (" without filter", False)):
            torch.manual_seed(seed)
            model = InfoIGL(1, 3, hidden=hidden, filter=filtered).to(device).train()
            steps[variant + name] = partial(InfoIGLTrainer(model, variant=variant).step, batch)  # type: ignore[arg-type]
    return {name: partial(repeat, step) for name, step in steps.items()}


def measure(domain: str, args: Any) -> dict[str, Any]:
    """Return the ratios for one shift."""
    shift, size, hidden = SHIFTS[domain]
    graphs = load_good_motif(None, domain, shift, num_data=2 * size + 30, seed=args.seed)["train"]  # type: ignore[arg-type]
    batch = Batch.from_data_list([graphs[i % len(graphs)] for i in range(size)]).to(args.device)
    found = interleaved(
        sides(batch, hidden, args.seed, args.device),
        repetitions=args.repetitions,
        warmup=args.warmup,
        device=args.device,
    )
    time = {name: value["median_s"] / STEPS for name, value in found.items()}
    return {
        "case": f"{size:,} graphs of GOOD-Motif {domain}, {hidden} dimensions",
        "erm_step_median_s": time["erm"],
        "infoigl_over_erm_on_the_same_network": time["official"] / time["filter"],
        "paper_form_over_erm_on_the_same_network": time["paper"] / time["filter"],
        "contrast_alone_over_erm": time["official without filter"] / time["erm"],
        "filter_over_erm": time["filter"] / time["erm"],
        "infoigl_over_erm_without_filter": time["official"] / time["erm"],
    }


def main() -> None:
    """Measure and print."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message=".*torch.jit.*")  # torch-geometric still calls torch.jit.script
    emit({**machine(args.device), "results": [measure(domain, args) for domain in SHIFTS]}, args.output)


if __name__ == "__main__":
    main()
