"""Full-catalogue softmax, forward and backward: blocked log-sum-exp beside materialised logits.

    python blocked_softmax.py                                   # CPU, 50k and 200k items
    python blocked_softmax.py --device cuda --items 1000000     # adds the Triton kernels

Both sides compute the mean cross-entropy of `user @ item.T` with random targets and the gradients of both tables.
Peak memory is measured in a process of its own for each side and counts everything beside the inputs; the gradients,
which both sides have to return, are also given alone. Prints one JSON object.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from ballast_testing.measure import emit, in_worker, interleaved, machine, parser, peak_extra_bytes, ratio
from recsys_losses.blocked import blocked_softmax_loss

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

Gradients = tuple["Tensor", ...]


def sides(rows: int, items: int, dim: int, device: str, seed: int) -> dict[str, Callable[[], Gradients]]:
    """Return the functions to compare; each gives the gradients of the two tables."""
    generator = torch.Generator().manual_seed(seed)
    user = torch.randn(rows, dim, generator=generator).to(device).requires_grad_()
    item = (torch.randn(items, dim, generator=generator) * 0.2).to(device).requires_grad_()
    target = torch.randint(items, (rows,), generator=generator).to(device)

    def materialised() -> Gradients:
        return torch.autograd.grad(F.cross_entropy(user @ item.T, target), (user, item))

    def blocked(impl: str) -> Gradients:
        loss = blocked_softmax_loss(user, item, target, temperature=1.0, similarity="dot", impl=impl)  # type: ignore[arg-type]
        return torch.autograd.grad(loss, (user, item))

    compared: dict[str, Callable[[], Gradients]] = {"materialised": materialised, "blocked": lambda: blocked("torch")}
    if device == "cuda":
        compared["triton"] = lambda: blocked("triton")
    return compared


def difference(ours: Gradients, theirs: Gradients) -> float:
    """Return the largest deviation, relative to the largest entry of each gradient."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


def case(items: int, options: Any) -> dict[str, Any]:
    """Measure one catalogue size."""
    compared = sides(options.rows, items, options.dim, options.device, options.seed)
    reference = compared["materialised"]()
    errors = {name: difference(run(), reference) for name, run in compared.items() if name != "materialised"}
    del reference
    seconds = interleaved(compared, repetitions=options.repetitions, warmup=options.warmup, device=options.device)
    shape = ["--rows", options.rows, "--items", items, "--dim", options.dim, "--device", options.device]
    arguments = [str(x) for x in [*shape, "--threads", options.threads, "--seed", options.seed]]
    memory = {name: in_worker(name, arguments) for name in compared}
    logits = options.rows * items * 4
    gradients = (options.rows + items) * options.dim * 4
    result: dict[str, Any] = {"rows": options.rows, "items": items, "dim": options.dim}
    result |= {"logits_bytes": logits, "gradient_bytes": gradients, "sides": {}}
    for name in compared:
        entry: dict[str, Any] = {**seconds[name], "peak_extra_bytes": memory[name]}
        entry["peak_extra_over_logits"] = ratio(memory[name], logits)
        if name != "materialised":
            entry["time_over_materialised"] = ratio(seconds[name]["median_s"], seconds["materialised"]["median_s"])
            entry["memory_over_materialised"] = ratio(memory[name], memory["materialised"])
            entry["max_gradient_difference"] = errors[name]
        result["sides"][name] = entry
    return result


def main() -> None:
    """Measure and print."""
    options_of = parser(__doc__)
    options_of.add_argument("--rows", type=int, default=1024)
    options_of.add_argument("--items", type=int, nargs="+", default=[50_000, 200_000])
    options_of.add_argument("--dim", type=int, default=64)
    options_of.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = options_of.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        warm = sides(64, 2048, options.dim, options.device, options.seed)[options.memory_of]
        warm()
        run = sides(options.rows, options.items[0], options.dim, options.device, options.seed)[options.memory_of]
        print(json.dumps({"peak_extra_bytes": peak_extra_bytes(run, options.device)}))
        return
    cases = [case(items, options) for items in options.items]
    result = {"benchmark": "blocked_softmax", **machine(options.device), "repetitions": options.repetitions}
    emit({**result, "cases": cases}, options.output)


if __name__ == "__main__":
    main()
