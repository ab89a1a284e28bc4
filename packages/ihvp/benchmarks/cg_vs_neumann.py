"""Products and CPU seconds of conjugate gradients against the Neumann series at an equal residual without damping.

The series runs for `--steps` steps with the smallest safe scale, 1.1 times the largest eigenvalue. Conjugate gradients,
without damping and with a fifth of scale / steps, run until their own undamped residual is as small. Both work on the same
cached gradient graph, and both pay one product for the final residual.

    python packages/ihvp/benchmarks/cg_vs_neumann.py --output docs/results/speed/cg_vs_neumann.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ihvp import ConvergenceWarning, cg, largest_eigenvalue, make_hvp, module_loss, neumann

if TYPE_CHECKING:
    from collections.abc import Callable

L2 = 1e-3


def problem(kind: str, seed: int) -> tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Train to a minimum on generated data; return the Hessian, the gradient of 1 % of the samples, and the parameters."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n, d = (2000, 50) if kind == "logistic" else (1000, 20)
    x = normal(n, d) * torch.logspace(0, -1, d, dtype=torch.float64)
    logits = 2 * (x @ normal(d, 3) if kind == "logistic" else torch.tanh(x @ normal(d, 8)) @ normal(8, 3))
    y = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    model = nn.Linear(d, 3) if kind == "logistic" else nn.Sequential(nn.Linear(d, 32), nn.Tanh(), nn.Linear(32, 3))
    model = model.double()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=500, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y) + 0.5 * L2 * torch.stack([(p**2).sum() for p in model.parameters()]).sum()
        loss.backward()
        return loss

    optimizer.step(closure)

    def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(x), y, reduction="sum") / n

    loss_fn, params = module_loss(model, loss, x, y)
    removed, _ = module_loss(model, loss, x[: n // 100], y[: n // 100])
    return make_hvp(loss_fn, params, l2=L2), torch.func.grad(removed)(params), params


def fewest(solver: Callable[[int], Any], target: float, limit: int) -> int | None:
    """Return the first number of steps whose undamped residual meets the target."""
    for steps in range(1, limit + 1):
        if solver(steps).undamped_relative_residual <= target:
            return steps
    return None


def cpu_seconds(run: Callable[[], object]) -> float:
    """Return the processor time of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(kind: str, seed: int, steps: int, repetitions: int) -> dict[str, Any]:
    """Compare the two on one problem; times are interleaved."""
    H, b, params = problem(kind, seed)
    scale = 1.1 * largest_eigenvalue(H, params, max_iter=100, rtol=1e-4)
    series = neumann(H, b, scale=scale, num_iter=steps)
    target = series.undamped_relative_residual
    out: dict[str, Any] = {
        "case": f"{kind}, {steps} Neumann steps, seed {seed}",
        "parameters": sum(p.numel() for p in params.values()),
        "undamped_residual": target,
        "neumann_products": series.num_hvp,
    }
    for name, damping in (("cg", 0.0), ("damped_cg", 0.2 * scale / steps)):

        def conjugate(k: int, damping: float = damping) -> Any:
            return cg(H, b, damping=damping, rtol=0.0, max_iter=k)

        needed = fewest(conjugate, target, steps)
        if needed is None:
            out[f"{name}_products"] = None  # this damping alone keeps the residual above the target
            continue
        ours, theirs = [], []
        for _ in range(repetitions):
            theirs.append(cpu_seconds(lambda: neumann(H, b, scale=scale, num_iter=steps)))
            ours.append(cpu_seconds(partial(conjugate, needed)))
        products = conjugate(needed).num_hvp
        out[f"{name}_products"] = products
        out[f"products_neumann_over_{name}"] = series.num_hvp / products
        out[f"cpu_seconds_neumann_over_{name}"] = statistics.median(theirs) / statistics.median(ours)
    return out


def main() -> None:
    """Measure all cases and print one JSON object."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, nargs="+", default=[100, 400])
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--repetitions", type=int, default=7)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--output", type=Path)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", ConvergenceWarning)  # iterates stopped early are the subject
    cases = [
        measure(kind, seed, steps, args.repetitions)
        for kind in ("logistic", "mlp")
        for steps in args.steps
        for seed in args.seeds
    ]
    result = {
        "command": "python packages/ihvp/benchmarks/cg_vs_neumann.py",
        "device": _processor(),
        "threads": args.threads,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cases": cases,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.output is not None:
        args.output.write_text(text + "\n", encoding="utf-8")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
