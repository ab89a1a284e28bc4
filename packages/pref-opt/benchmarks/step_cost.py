"""What a training step of each pairwise loss costs beside one of TRL's own DPO trainer.

    python packages/pref-opt/benchmarks/step_cost.py
    python packages/pref-opt/benchmarks/step_cost.py --adapter-rank 8 --methods dpo simpo repo
    python packages/pref-opt/benchmarks/step_cost.py --device cuda --hidden 1024 --layers 12 --length 1024 --vocabulary 32000

A random Qwen2 model, the same batch for all sides, one step of every side per round. A step is the trainer's own
`training_step` (policy forward, reference where the loss needs one, loss, logged metrics, backward) and the optimiser. All
losses run in `PreferenceTrainer`; `trl_dpo` is TRL's `DPOTrainer`, `dpo_stored` has its reference in the data.
`step_over_trl_dpo` is a ratio of medians, `least_step_over_trl_dpo` one of the shortest steps. `loss_alone_over_trl_dpo_step`
is the loss object by itself, forward and backward on numbers, without any model.
On the CPU the clock counts this process's time only. Prints one JSON object.
"""

from __future__ import annotations

import copy
import importlib.metadata
import os
import tempfile
import time
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from datasets import Dataset, disable_progress_bars
from trl import DPOConfig, DPOTrainer

from ballast_testing.measure import emit, interleaved, machine, parser
from pref_opt.losses import Logps, LossContext, loss_names, make_loss
from pref_opt.tiny import tiny_causal_lm, tiny_tokenizer
from pref_opt.trl import PreferenceConfig, PreferenceTrainer

if TYPE_CHECKING:
    from collections.abc import Callable

    Trainer = DPOTrainer | PreferenceTrainer

REPEATS_OF_LOSS = 20


def pairs(count: int, length: int, seed: int) -> list[dict[str, str]]:
    """Return pairs of letters: a prompt of half the length, completions of the other half with their end token."""
    generator = torch.Generator().manual_seed(seed)

    def letters(size: int) -> str:
        return "".join(chr(97 + int(i)) for i in torch.randint(26, (size,), generator=generator))

    half = length // 2
    return [
        {"prompt": letters(half), "chosen": letters(length - half - 1), "rejected": letters(length - half - 1)}
        for _ in range(count)
    ]


def trainers(methods: list[str], folder: str, args: Any) -> dict[str, Trainer]:
    """Return TRL's trainer and ours with every method, each with a model of its own."""
    tokenizer = tiny_tokenizer()
    start = tiny_causal_lm(
        tokenizer,
        hidden=args.hidden,
        layers=args.layers,
        vocab_size=args.vocabulary,
        max_position_embeddings=args.length,
        seed=args.seed,
    )
    common: dict[str, Any] = {
        "per_device_train_batch_size": args.pairs,
        "max_length": args.length,
        "report_to": "none",
        "bf16": args.device == "cuda",
        "use_cpu": args.device == "cpu",
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": args.seed,
    }
    data: dict[str, Any] = {
        "train_dataset": Dataset.from_list(pairs(args.pairs, args.length, args.seed)),
        "processing_class": tokenizer,
        "peft_config": adapter(args.adapter_rank),
    }

    def ours(method: str, **options: Any) -> PreferenceTrainer:
        config = PreferenceConfig(folder, **common, **options, method=method)
        return PreferenceTrainer(copy.deepcopy(start), args=config, **data)

    reference = None if args.adapter_rank else copy.deepcopy(start)
    theirs = DPOTrainer(copy.deepcopy(start), reference, args=DPOConfig(folder, **common), **data)
    built: dict[str, Trainer] = {"trl_dpo": theirs, **{method: ours(method) for method in methods}}
    if "dpo" in methods:
        built["dpo_stored"] = ours("dpo", precompute_ref_log_probs=True)
    return built


def adapter(rank: int) -> Any:
    """Return the configuration of LoRA on all linear layers, or None for rank 0."""
    if not rank:
        return None
    from peft import LoraConfig

    return LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")


def step_of(trainer: Trainer) -> Callable[[], None]:
    """Return one step of a trainer on its one batch."""
    (batch,) = trainer.get_train_dataloader()
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    model, optimizer = trainer.model, trainer.optimizer

    def step() -> None:
        trainer.training_step(model, dict(batch))
        optimizer.step()
        optimizer.zero_grad()

    return step


def loss_of(method: str, args: Any) -> Callable[[], None]:
    """Return the loss by itself on log-probabilities of a batch, several times."""
    loss = make_loss(method)
    generator = torch.Generator().manual_seed(args.seed)
    base = -torch.rand(4, args.pairs, generator=generator).to(args.device)
    chosen, rejected = (x.clone().requires_grad_() for x in base[:2])
    lengths = torch.full((args.pairs,), args.length // 2, device=args.device)
    references = tuple(base[2:]) if loss.requires_reference else (None, None)
    logps = Logps(chosen, rejected, *references, lengths, lengths)

    def run() -> None:
        for _ in range(REPEATS_OF_LOSS):
            torch.autograd.grad(loss(logps, LossContext()).loss, (chosen, rejected))

    return run


def measure(args: Any) -> list[dict[str, Any]]:
    """Return one entry per method."""
    methods = [method for method in args.methods or loss_names() if not make_loss(method).multi_negative]
    clock = time.perf_counter if args.device == "cuda" else time.process_time
    timed = partial(interleaved, repetitions=args.repetitions, warmup=args.warmup, device=args.device, clock=clock)
    with tempfile.TemporaryDirectory() as folder:
        built = trainers(methods, folder, args)
        steps = timed({name: step_of(trainer) for name, trainer in built.items()})
    alone = timed({method: loss_of(method, args) for method in methods})
    dpo = steps.pop("trl_dpo")
    results: list[dict[str, Any]] = [{"case": "trl_dpo, reference run", **dpo}]
    for name, seconds in steps.items():
        needs = name != "dpo_stored" and make_loss(name).requires_reference
        entry: dict[str, Any] = {"case": f"{name}, {'reference run' if needs else 'no reference run'}", **seconds}
        entry["step_over_trl_dpo"] = seconds["median_s"] / dpo["median_s"]
        entry["least_step_over_trl_dpo"] = seconds["min_s"] / dpo["min_s"]
        if name in alone:
            loss = alone[name]["median_s"] / REPEATS_OF_LOSS
            entry["loss_alone_over_trl_dpo_step"] = loss / dpo["median_s"]
        results.append(entry)
    return results


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--methods", nargs="+", choices=loss_names(), help="default: all losses on pairs")
    options.add_argument("--hidden", type=int, default=256, help="width of the model (default: 256)")
    options.add_argument("--layers", type=int, default=4, help="layers of the model (default: 4)")
    options.add_argument("--vocabulary", type=int, default=2048, help="words of the head (default: 2048)")
    options.add_argument("--length", type=int, default=256, help="tokens of prompt and completion (default: 256)")
    options.add_argument("--pairs", type=int, default=4, help="pairs of a batch, at least 2 (default: 4)")
    options.add_argument("--adapter-rank", type=int, default=0, help="train LoRA of this rank; 0 trains all weights")
    args = options.parse_args()
    disable_progress_bars()
    torch.set_num_threads(args.threads)
    # TRL and PEFT still use old names of transformers.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")
    about = machine(args.device)
    versions = {name: importlib.metadata.version(name) for name in ("trl", "transformers")}
    sizes = {
        name: getattr(args, name) for name in ("hidden", "layers", "vocabulary", "length", "pairs", "adapter_rank")
    }
    result = {"benchmark": "preference_step_cost", **about, **versions, "repetitions": args.repetitions, **sizes}
    emit({**result, "results": measure(args)}, args.output)


if __name__ == "__main__":
    main()
