r"""The head of a language model under a preference loss: peak memory and time with gradients, without the rest of the model.

    python packages/pref-opt/benchmarks/head_memory.py  # 32,000 and 128,000 words, width 896, 4 sequences of 256 tokens
    python packages/pref-opt/benchmarks/head_memory.py --device cuda --vocab 32000 128000 152000 256000 \
        --widths 896 2048 4096 --lengths 1024 4096

Every side computes SimPO's loss (means over completion tokens) from hidden states and the weight of the head, and the
gradients of both. `dense` holds all logits; `trl` is the tiled head of TRL's trainers; `liger` is Liger's fused loss; sides
whose package isn't installed are named under `left_out`. `pref_opt` is `token_logps_chunked`. The first part of each sequence is a prompt without labels.
On a GPU a side that runs out of memory is given as null. On the CPU, peak memory is measured in a process of its own for
each side. It counts everything beside the inputs; the gradients, which all sides have to return, are also given alone.
Every side has run once, for its result, before the clock starts.
Prints one JSON object.
"""

from __future__ import annotations

import gc
import json
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from ballast_testing.measure import emit, in_worker, interleaved, machine, parser, peak_extra_bytes, ratio
from pref_opt.baselines import simpo_loss
from pref_opt.chunked import token_logps_chunked

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

Outcome = tuple["Tensor", "Tensor", "Tensor"]

BETA, GAMMA_BETA_RATIO = 2.0, 0.25
PEERS = {"trl": "trl", "liger": "liger_kernel"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def inputs(shape: tuple[int, int, int, int], prompt: float, device: str, dtype: str, seed: int) -> list[Tensor]:
    """Return hidden states [N, T, H], the head [V, H] and labels [N, T]; the first N/2 sequences are preferred."""
    n, t, h, v = shape
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, t, h, generator=generator).to(device, DTYPES[dtype]).requires_grad_()
    weight = (torch.randn(v, h, generator=generator) / h**0.5).to(device, DTYPES[dtype]).requires_grad_()
    labels = torch.randint(v, (n, t), generator=generator)
    labels[:, : int(prompt * t)] = -100
    return [hidden, weight, labels.to(device)]


def sides(hidden: Tensor, weight: Tensor, labels: Tensor) -> dict[str, Callable[[], Outcome]]:
    """Return the functions to compare; each gives the loss and the gradients of hidden states and head."""
    mask = labels != -100

    def with_gradients(loss: Tensor) -> Outcome:
        return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))

    def of_tokens(logps: Tensor) -> Outcome:
        chosen, rejected = (logps.sum(1) / mask.sum(1)).chunk(2)
        return with_gradients(simpo_loss(chosen, rejected, beta=BETA, gamma_beta_ratio=GAMMA_BETA_RATIO))

    def dense() -> Outcome:
        logps = (hidden @ weight.T).float().log_softmax(-1)
        return of_tokens(logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(~mask, 0))

    def trl() -> Outcome:
        from pref_opt._compat import head_logps

        # As in TRL: on devices without Triton it projects every position.
        if hidden.is_cuda:
            logps = head_logps(hidden[mask], weight, labels[mask])
            return of_tokens(logps.new_zeros(mask.shape).masked_scatter(mask, logps))
        logps = head_logps(hidden.flatten(0, 1), weight, labels.clamp(min=0).flatten())
        return of_tokens(logps.view(mask.shape).masked_fill(~mask, 0))

    def liger() -> Outcome:
        from liger_kernel.chunked_loss import LigerFusedLinearSimPOLoss

        fused = LigerFusedLinearSimPOLoss(
            beta=BETA, gamma=BETA * GAMMA_BETA_RATIO, compute_nll_loss=False, compiled=hidden.is_cuda
        )
        return with_gradients(fused(weight, hidden, labels)[0])

    compared = {"dense": dense, "pref_opt": lambda: of_tokens(token_logps_chunked(hidden, weight, labels))}
    peers = {"trl": trl, "liger": liger}
    return compared | {name: run for name, run in peers.items() if find_spec(PEERS[name])}


def fitting(run: Callable[[], Outcome]) -> Outcome | None:
    """Return what `run` gives, on the CPU, or None where the memory of the GPU doesn't suffice."""
    try:
        loss, *gradients = run()
        return (loss.cpu(), *(gradient.cpu() for gradient in gradients))  # type: ignore[return-value]
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def difference(ours: Outcome, theirs: Outcome) -> float:
    """Return the largest deviation, relative to the largest entry of loss and gradients each."""
    return max(
        float((a.double() - b.double()).abs().max() / b.double().abs().max()) for a, b in zip(ours, theirs, strict=True)
    )


def case(shape: tuple[int, int, int, int], options: Any) -> dict[str, Any]:
    """Measure one shape."""
    n, t, h, v = shape
    compared = sides(*inputs(shape, options.prompt, options.device, options.dtype, options.seed))
    outcomes = {name: fitting(run) for name, run in compared.items()}
    running = {name: run for name, run in compared.items() if outcomes[name] is not None}
    seconds = interleaved(running, repetitions=options.repetitions, warmup=options.warmup, device=options.device)
    memory = {name: peak(name, run, shape, options) for name, run in running.items()}
    size = DTYPES[options.dtype].itemsize
    reference = outcomes["dense"] or outcomes["pref_opt"]
    entries: dict[str, Any] = {}
    for name in compared:
        outcome = outcomes[name]
        if outcome is None:
            entries[name] = None
            continue
        entry: dict[str, Any] = {**seconds[name], "peak_extra_bytes": memory[name]}
        if name != "dense" and reference is not None:
            entry["max_difference"] = difference(outcome, reference)
            entry["time_over_dense"] = ratio(seconds[name]["median_s"], seconds.get("dense", {}).get("median_s"))
            entry["memory_over_dense"] = ratio(memory[name], memory.get("dense"))
        if name not in ("dense", "pref_opt"):
            entry["time_of_pref_opt_over_it"] = ratio(seconds["pref_opt"]["median_s"], seconds[name]["median_s"])
            entry["memory_of_pref_opt_over_it"] = ratio(memory["pref_opt"], memory[name])
        entries[name] = entry
    return {
        "sequences": n,
        "length": t,
        "width": h,
        "vocabulary": v,
        "dtype": options.dtype,
        "logits_bytes": 4 * n * t * v,
        "gradient_bytes": size * (n * t * h + v * h),
        "sides": entries,
    }


def peak(name: str, run: Callable[[], Outcome], shape: tuple[int, int, int, int], options: Any) -> int | None:
    """Return the peak memory of one side."""
    if options.device == "cuda":
        return peak_extra_bytes(run, "cuda")
    n, t, h, v = shape
    words = ["--sequences", n, "--lengths", t, "--widths", h, "--vocab", v, "--prompt", options.prompt]
    words += ["--dtype", options.dtype, "--threads", options.threads, "--seed", options.seed]
    return in_worker(name, [str(word) for word in words])


def main() -> None:
    """Measure and print."""
    options_of = parser(__doc__)
    options_of.set_defaults(repetitions=3, warmup=0)
    options_of.add_argument("--sequences", type=int, help="even; 4 on the CPU, 8 on a GPU by default")
    options_of.add_argument("--lengths", type=int, nargs="+", default=[256])
    options_of.add_argument("--widths", type=int, nargs="+", default=[896])
    options_of.add_argument("--vocab", type=int, nargs="+", default=[32_000, 128_000])
    options_of.add_argument("--prompt", type=float, default=0.5, help="share of positions without a label")
    options_of.add_argument("--dtype", choices=tuple(DTYPES), help="bfloat16 on a GPU, float32 on the CPU by default")
    options_of.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = options_of.parse_args()
    torch.set_num_threads(options.threads)
    options.sequences = options.sequences or (8 if options.device == "cuda" else 4)
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    shapes = [
        (options.sequences, length, width, words)
        for length in options.lengths
        for width in options.widths
        for words in options.vocab
    ]
    if options.memory_of:
        prepared = (options.prompt, "cpu", options.dtype, options.seed)
        sides(*inputs((2, 16, shapes[0][2], 512), *prepared))[options.memory_of]()
        run = sides(*inputs(shapes[0], *prepared))[options.memory_of]
        print(json.dumps({"peak_extra_bytes": peak_extra_bytes(run)}))
        return
    cases = [case(shape, options) for shape in shapes]
    result = {"benchmark": "head_memory", **machine(options.device), "repetitions": options.repetitions}
    missing = {name: f"{package} is not installed" for name, package in PEERS.items() if not find_spec(package)}
    emit({**result, "prompt_share": options.prompt, "left_out": missing, "cases": cases}, options.output)


if __name__ == "__main__":
    main()
