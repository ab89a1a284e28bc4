"""One ADNCE step, loss and gradients: `adnce_loss` (variant "simclr") beside a port of the authors' way.

    python adnce_loss.py                          # batches of 256 to 4096, embeddings of width 128
    python adnce_loss.py --device cuda

The port exponentiates the matrix of similarities, copies the negatives out with a boolean mask, takes the logarithm again
for the weights, and has the weights of the whole matrix in probability space. Its mask is built by a Python loop; the
side `port` finds it ready, `port_with_mask` builds it in every step. Peak memory is measured in a process of its own for
each side and counts everything beside the inputs. Loss and gradients of both sides are compared. Prints one JSON object.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from ballast_testing.measure import emit, in_worker, interleaved, machine, parser, peak_extra_bytes, ratio
from recsys_losses.adnce import adnce_loss

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

Outcome = tuple["Tensor", ...]

TEMPERATURE, MU, SIGMA = 0.3, 0.7, 1.0


def negatives_mask(batch: int, device: str) -> Tensor:
    """Return which pairs of the 2B embeddings are negatives, marked row by row."""
    mask = torch.ones((2 * batch, 2 * batch), dtype=torch.bool)
    for row in range(batch):
        mask[row, row] = mask[row, row + batch] = False
        mask[row + batch, row] = mask[row + batch, row + batch] = False
    return mask.to(device)


def port(z1: Tensor, z2: Tensor, mask: Tensor) -> Tensor:
    """Return the loss as the authors' code computes it."""
    first, second = F.normalize(z1, dim=-1), F.normalize(z2, dim=-1)
    both = torch.cat([first, second])
    rows = both.shape[0]
    neg = (both @ both.T / TEMPERATURE).exp().masked_select(mask).view(rows, rows - 2)
    pos = ((first * second).sum(-1) / TEMPERATURE).exp().repeat(2)
    similarity = neg.log() * TEMPERATURE
    weight = (-0.5 * ((similarity - MU) / SIGMA) ** 2).exp() / (SIGMA * math.sqrt(2 * math.pi))
    weight = weight / weight.mean(1, keepdim=True)
    total = (neg * weight.detach()).sum(1)
    return (-(pos / (pos + total)).log()).mean()


def sides(batch: int, dim: int, device: str, seed: int) -> dict[str, Callable[[], Outcome]]:
    """Return the functions to compare; each gives the loss and the gradients of both views."""
    generator = torch.Generator().manual_seed(seed)
    z1 = torch.randn(batch, dim, generator=generator)
    z2 = z1 + torch.randn(batch, dim, generator=generator)
    z1, z2 = z1.to(device).requires_grad_(), z2.to(device).requires_grad_()
    ready: list[Tensor] = []

    def with_gradients(loss: Tensor) -> Outcome:
        return (loss.detach(), *torch.autograd.grad(loss, (z1, z2)))

    def with_ready_mask() -> Outcome:
        if not ready:
            ready.append(negatives_mask(batch, device))
        return with_gradients(port(z1, z2, ready[0]))

    return {
        "recsys_losses": lambda: with_gradients(adnce_loss(z1, z2, temperature=TEMPERATURE, mu=MU, sigma=SIGMA)),
        "port": with_ready_mask,
        "port_with_mask": lambda: with_gradients(port(z1, z2, negatives_mask(batch, device))),
    }


def case(batch: int, options: Any) -> dict[str, Any]:
    """Measure one batch size."""
    compared = sides(batch, options.dim, options.device, options.seed)
    ours, theirs = compared["recsys_losses"](), compared["port"]()
    difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))
    seconds = interleaved(compared, repetitions=options.repetitions, warmup=options.warmup, device=options.device)
    shape = ["--batches", batch, "--dim", options.dim, "--device", options.device]
    arguments = [str(x) for x in [*shape, "--threads", options.threads, "--seed", options.seed]]
    memory = {name: in_worker(name, arguments) for name in ("recsys_losses", "port")}
    matrix = 4 * (2 * batch) ** 2
    return {
        "batch": batch,
        "dim": options.dim,
        "matrix_bytes": matrix,
        "sides": {name: {**seconds[name], "peak_extra_bytes": memory.get(name)} for name in compared},
        "peak_over_matrix": ratio(memory["recsys_losses"], matrix),
        "port_peak_over_matrix": ratio(memory["port"], matrix),
        "speed_of_recsys_losses": ratio(seconds["port"]["median_s"], seconds["recsys_losses"]["median_s"]),
        "speed_of_recsys_losses_with_mask_loop": ratio(
            seconds["port_with_mask"]["median_s"], seconds["recsys_losses"]["median_s"]
        ),
        "memory_of_recsys_losses": ratio(memory["recsys_losses"], memory["port"]),
        "max_difference": difference,
    }


def main() -> None:
    """Measure and print."""
    options_of = parser(__doc__)
    options_of.add_argument("--batches", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    options_of.add_argument("--dim", type=int, default=128)
    options_of.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = options_of.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        sides(64, options.dim, options.device, options.seed)[options.memory_of]()
        run = sides(options.batches[0], options.dim, options.device, options.seed)[options.memory_of]
        print(json.dumps({"peak_extra_bytes": peak_extra_bytes(run, options.device)}))
        return
    cases = [case(batch, options) for batch in options.batches]
    result = {"benchmark": "adnce_loss", **machine(options.device), "repetitions": options.repetitions}
    emit({**result, "temperature": TEMPERATURE, "mu": MU, "sigma": SIGMA, "cases": cases}, options.output)


if __name__ == "__main__":
    main()
