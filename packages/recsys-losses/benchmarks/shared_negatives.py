"""One SSM step with negatives shared by the batch beside negatives gathered for every row.

    python shared_negatives.py

A step looks the embeddings up in the two tables, computes `ssm_loss` and its gradients with respect to the tables;
`step_with_adam` adds the optimiser, whose cost is the same on both sides. Ids are drawn beforehand. Prints one JSON
object.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from ballast_testing.measure import emit, in_worker, interleaved, machine, parser, peak_extra_bytes, ratio
from recsys_losses.ssm import ssm_loss

if TYPE_CHECKING:
    from collections.abc import Callable


def sides(options: Any) -> dict[str, Callable[[], object]]:
    """Return the steps to compare."""
    generator = torch.Generator().manual_seed(options.seed)
    user = (torch.randn(options.users, options.dim, generator=generator) * 0.1).requires_grad_()
    item = (torch.randn(options.items, options.dim, generator=generator) * 0.1).requires_grad_()
    rows = torch.randint(options.users, (options.rows,), generator=generator)
    positives = torch.randint(options.items, (options.rows,), generator=generator)
    own = torch.randint(options.items, (options.rows, options.negatives), generator=generator)
    shared = own[0].clone()
    optimiser = torch.optim.Adam((user, item), lr=1e-6)

    def step(negatives: torch.Tensor, *, adam: bool) -> None:
        optimiser.zero_grad()
        ssm_loss(user[rows], item[positives], item[negatives], temperature=0.1).backward()
        if adam:
            optimiser.step()

    return {
        "own": lambda: step(own, adam=False),
        "shared": lambda: step(shared, adam=False),
        "own_with_adam": lambda: step(own, adam=True),
        "shared_with_adam": lambda: step(shared, adam=True),
    }


def main() -> None:
    """Measure and print."""
    options_of = parser(__doc__)
    sizes = {"rows": 1024, "negatives": 800, "dim": 64, "users": 29_858, "items": 40_981}
    for name, default in sizes.items():
        options_of.add_argument(f"--{name}", type=int, default=default)
    options = options_of.parse_args()
    torch.set_num_threads(options.threads)
    compared = sides(options)
    if options.memory_of:
        print(json.dumps({"peak_extra_bytes": peak_extra_bytes(compared[options.memory_of])}))
        return
    seconds = interleaved(compared, repetitions=options.repetitions, warmup=options.warmup)
    arguments = [str(x) for name in sizes for x in (f"--{name}", getattr(options, name))]
    memory = {name: in_worker(name, [*arguments, "--threads", str(options.threads)]) for name in ("own", "shared")}
    result: dict[str, Any] = {"benchmark": "shared_negatives", **machine(), "repetitions": options.repetitions}
    result |= {name: getattr(options, name) for name in sizes}
    result["sides"] = {name: {**seconds[name], "peak_extra_bytes": memory.get(name)} for name in compared}
    result["speed_of_shared"] = ratio(seconds["own"]["median_s"], seconds["shared"]["median_s"])
    result["speed_of_shared_with_adam"] = ratio(
        seconds["own_with_adam"]["median_s"], seconds["shared_with_adam"]["median_s"]
    )
    result["memory_of_shared"] = ratio(memory["shared"], memory["own"])
    emit(result, options.output)


if __name__ == "__main__":
    main()
