"""What `DSLController` costs: per training step, per mask update, in memory; and what the sparse table saves.

    python packages/recsys-losses/benchmarks/dsl_overhead.py
    python packages/recsys-losses/benchmarks/dsl_overhead.py --skip-large      # without the graph of Gowalla's size

Prints one JSON object. The port is the authors' way: masks in float32, two full sorts per update, counts fetched one by
one. Its growth may take active positions (the density leak), which ours can't, so the masks agree only where enough
gradients differ from 0, as here. Steps are those of a LightGCN with 3 layers and 64 dimensions on a generated graph, BPR on
1,024 samples, Adam in one fused pass.
"""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ballast_testing.measure import emit, in_worker, interleaved, machine, parser, peak_extra_bytes, ratio
from recsys_losses.baselines import bpr_loss
from recsys_losses.dsl import (
    DSLController,
    SparseEmbedding,
    csr_bytes,
    dsl_update_mask,
    random_mask,
    save_compressed,
    to_csr,
)
from recsys_losses.models import LightGCN

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

DIM, BATCH = 64, 1024
GRAPHS = {"lastfm": (1_892, 4_489, 42_135), "gowalla": (29_858, 40_981, 810_128)}
ROWS = 70_000
INTERVAL = 1000
DENSITIES = (0.5, 0.2, 0.1)


class Port:
    """The authors' masking, restated: what it does in every step, and in an update."""

    def __init__(self, weight: torch.nn.Parameter, mask: Tensor) -> None:
        self.weight, self.mask = weight, mask.float()

    @torch.no_grad()
    def apply(self) -> None:
        self.weight.data = self.weight.data * self.mask

    @torch.no_grad()
    def update(self, grad: Tensor, rate: float) -> Tensor:
        nonzero = int(self.mask.sum().item())
        zeros = self.mask.numel() - nonzero
        remove = math.ceil(rate * nonzero)
        ordered, _ = torch.sort(self.weight.data.abs().view(-1))
        kept = (self.weight.data.abs() > ordered[zeros + remove - 1].item()).float()
        grown = nonzero - int(kept.sum().item())
        _, position = torch.sort((grad * (kept == 0).float()).abs().flatten(), descending=True)
        kept.view(-1)[position[:grown]] = 1.0
        return kept


def lightgcn_steps(name: str, seed: int) -> tuple[dict[str, Callable[[], None]], Callable[[], object]]:
    """Return the training step of every side, and one mask update of ours, on a generated graph of the named size."""
    num_users, num_items, num_edges = GRAPHS[name]
    generator = torch.Generator().manual_seed(seed)
    edges = torch.stack([torch.randint(n, (num_edges,), generator=generator) for n in (num_users, num_items)])
    models = {
        side: LightGCN(num_users, num_items, edges, DIM, 3, seed=seed) for side in ("plain", "controller", "port")
    }
    optimizers = {side: torch.optim.Adam(m.parameters(), lr=1e-3, fused=True) for side, m in models.items()}
    weights = {side: m.backbone.embedding.weight for side, m in models.items()}
    mask = random_mask(weights["plain"].shape, 0.5, exact=True, generator=generator)
    DSLController(
        models["controller"],
        optimizers["controller"],
        total_steps=10**9,
        update_interval=10**9,
        masks={"backbone.embedding.weight": mask},
    ).attach()
    port = Port(weights["port"], mask)
    port.apply()

    def step(side: str) -> None:
        row = torch.randint(num_edges, (BATCH,), generator=generator)
        negative = torch.randint(num_items, (BATCH,), generator=generator)
        optimizers[side].zero_grad()
        user, item = models[side].embeddings()
        u = user.index_select(0, edges[0, row])
        loss = bpr_loss((u * item.index_select(0, edges[1, row])).sum(1), (u * item.index_select(0, negative)).sum(1))
        loss.backward()
        optimizers[side].step()
        if side == "port":
            port.apply()

    def update() -> object:
        weight = weights["controller"]
        return dsl_update_mask(weight.detach(), mask, weight.grad, ratio=0.25)

    return {side: partial(step, side) for side in models}, update


def step_overhead(name: str, args: Any) -> dict[str, Any]:
    """Return the time of a step with and without the controller, the update spread over its interval."""
    steps, update = lightgcn_steps(name, args.seed)
    many = 20 if name == "lastfm" else 1
    sides = {side: partial(_repeat, step, many) for side, step in steps.items()}
    time = interleaved(sides, repetitions=args.repetitions, warmup=args.warmup)
    update_s = interleaved({"update": update}, repetitions=args.repetitions)["update"]["median_s"]
    plain, ours, port = (time[side]["median_s"] / many for side in ("plain", "controller", "port"))
    return {
        "case": f"LightGCN step, {sum(GRAPHS[name][:2]):,} x {DIM}",
        "plain_step_median_s": plain,
        "controller_step_over_plain": ours / plain,
        f"controller_with_an_update_every_{INTERVAL}_over_plain": (ours + update_s / INTERVAL) / plain,
        "port_step_over_plain": port / plain,
    }


def optimizer_overhead(args: Any) -> dict[str, Any]:
    """Return the strictest view: Adam's step alone, without any forward or backward pass around it."""
    sides: dict[str, Callable[[], object]] = {}
    for side in ("plain", "controller", "port"):
        weight = torch.nn.Embedding(ROWS, DIM)
        optimizer = torch.optim.Adam(weight.parameters(), lr=1e-3, fused=True)
        weight.weight.grad = torch.randn(ROWS, DIM)
        mask = random_mask((ROWS, DIM), 0.5)
        if side == "controller":
            DSLController(weight, optimizer, total_steps=10**9, update_interval=10**9, masks={"weight": mask}).attach()
        port = Port(weight.weight, mask)
        sides[side] = partial(_step_then, optimizer, port.apply if side == "port" else None)
    time = {side: value["median_s"] for side, value in interleaved(sides, repetitions=args.repetitions).items()}
    return {
        "case": f"Adam's step alone, {ROWS:,} x {DIM}",
        "plain_step_median_s": time["plain"],
        "controller_step_over_plain": time["controller"] / time["plain"],
        "port_step_over_plain": time["port"] / time["plain"],
    }


def update_sides(seed: int, density: float) -> dict[str, Callable[[], Any]]:
    """Return one mask update of either side, on the same table and dense gradient."""
    generator = torch.Generator().manual_seed(seed)
    mask = random_mask((ROWS, DIM), density, exact=True, generator=generator)
    weight = torch.nn.Parameter(torch.randn(ROWS, DIM, generator=generator) * mask)
    grad = torch.randn(ROWS, DIM, generator=generator)
    port = Port(weight, mask)
    return {
        "ours": lambda: dsl_update_mask(weight.detach(), mask, grad, ratio=0.25).mask,
        "port": lambda: port.update(grad, 0.25),
    }


def update_speed(args: Any, density: float) -> dict[str, Any]:
    """Return the time and the peak memory of one mask update."""
    sides = update_sides(args.seed, density)
    differing = int((sides["ours"]() != sides["port"]().bool()).sum())
    time = interleaved(sides, repetitions=args.repetitions, warmup=args.warmup)
    memory = {side: in_worker(f"{side}:{density}", ["--seed", str(args.seed)]) for side in sides}
    return {
        "case": f"mask update, {ROWS:,} x {DIM}, density {density}",
        "ours_median_s": time["ours"]["median_s"],
        "speed_of_ours_over_port": time["port"]["median_s"] / time["ours"]["median_s"],
        "memory_of_ours_over_port": ratio(memory["ours"], memory["port"]),
        "difference_in_positions": differing,
    }


def export(args: Any, density: float) -> dict[str, Any]:
    """Return the size of the sparse table in its three forms, and the time of a lookup, against the dense table."""
    generator = torch.Generator().manual_seed(args.seed)
    mask = random_mask((ROWS, DIM), density, exact=True, generator=generator)
    table = torch.randn(ROWS, DIM, generator=generator) * mask
    csr = to_csr(table)
    lookup = SparseEmbedding(csr)
    with tempfile.TemporaryDirectory() as folder:
        file = save_compressed(Path(folder) / "table", {"table": csr})
    ids = torch.randint(ROWS, (64, BATCH), generator=generator)
    sides = {
        "dense": lambda: [F.embedding(batch, table) for batch in ids],
        "sparse": lambda: [lookup(batch) for batch in ids],
    }
    time = interleaved(sides, repetitions=args.repetitions, warmup=args.warmup)
    return {
        "case": f"exported table, {ROWS:,} x {DIM}, density {density}",
        "file_over_dense": file / table.nbytes,
        "serving_module_over_dense": lookup.nbytes / table.nbytes,
        "csr_tensor_over_dense": csr_bytes(csr) / table.nbytes,
        "lookup_of_1024_rows_median_s": time["sparse"]["median_s"] / len(ids),
        "lookup_time_over_dense": time["sparse"]["median_s"] / time["dense"]["median_s"],
    }


def _repeat(step: Callable[[], None], times: int) -> None:
    for _ in range(times):
        step()


def _step_then(optimizer: torch.optim.Optimizer, after: Callable[[], None] | None) -> None:
    optimizer.step()
    if after is not None:
        after()


def main() -> None:
    """Measure and print."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--skip-large", action="store_true", help="leave out the LightGCN of Gowalla's size")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message=".*torch.jit.*")  # torch-geometric still calls torch.jit.script
    if args.memory_of:
        side, _, density = args.memory_of.partition(":")
        print(json.dumps({"peak_extra_bytes": peak_extra_bytes(update_sides(args.seed, float(density))[side])}))
        return
    about = machine()
    mask = random_mask((ROWS, DIM), 0.5)
    results = [
        *(step_overhead(name, args) for name in GRAPHS if name == "lastfm" or not args.skip_large),
        optimizer_overhead(args),
        *(update_speed(args, density) for density in DENSITIES),
        {"case": "mask held between updates", "memory_of_ours_over_port": mask.nbytes / mask.float().nbytes},
        *(export(args, density) for density in DENSITIES),
    ]
    emit({**about, "results": results}, args.output)


if __name__ == "__main__":
    main()
