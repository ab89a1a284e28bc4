"""The packed layout of `MultiNegativeTrainer` beside one row per completion: tokens, time of a step, memory.

    python packages/pref-opt/benchmarks/packed_speed.py
    python packages/pref-opt/benchmarks/packed_speed.py --device cuda --hidden 1024 --layers 12 --rows 8

Rows of one prompt (300 tokens) and 16 completions (5 tokens each, one of them preferred). Both sides are the same trainer with
the same random Qwen2 model and data; `concatenated` repeats the prompt before every completion. A step is the trainer's own
`training_step` (policy forward, reference where the loss needs one, loss, logged metrics, backward) and the optimiser.
On the CPU the clock counts this process's time only, and memory is measured in a process of its own for each side.
Prints one JSON object.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import tempfile
import time
from typing import TYPE_CHECKING, Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from datasets import Dataset, disable_progress_bars

from ballast_testing.measure import emit, in_worker, interleaved, machine, parser, peak_extra_bytes, ratio
from pref_opt.multi_negative import LAYOUTS, MultiNegativeConfig, MultiNegativeTrainer, batch_logps
from pref_opt.tiny import tiny_causal_lm, tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable


def lists(rows: int, prompt: int, completion: int, negatives: int, seed: int) -> list[dict[str, Any]]:
    """Return rows of letters; the end token counts as one of a completion."""
    generator = torch.Generator().manual_seed(seed)

    def letters(size: int) -> str:
        return "".join(chr(97 + int(i)) for i in torch.randint(26, (size,), generator=generator))

    def row() -> dict[str, Any]:
        # A letter of its own keeps the preferred completion apart from the others.
        others = [letters(completion - 1) for _ in range(negatives)]
        return {"prompt": letters(prompt), "chosen": "A" + letters(completion - 2), "rejected": others}

    return [row() for _ in range(rows)]


def trainer_of(method: str, layout: str, folder: str, args: Any) -> MultiNegativeTrainer:
    """Return a trainer with a model of its own."""
    tokenizer = tiny_tokenizer()
    model = tiny_causal_lm(
        tokenizer,
        hidden=args.hidden,
        layers=args.layers,
        vocab_size=args.vocabulary,
        max_position_embeddings=args.prompt + args.completion,
        seed=args.seed,
    )
    config = MultiNegativeConfig(
        folder,
        method=method,
        layout=layout,
        max_length=args.prompt + args.completion,
        per_device_train_batch_size=args.rows,
        report_to="none",
        bf16=args.device == "cuda",
        use_cpu=args.device == "cpu",
        save_strategy="no",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=args.seed,
    )
    data = Dataset.from_list(lists(args.rows, args.prompt, args.completion, args.negatives, args.seed))
    return MultiNegativeTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)


def batch_of(trainer: MultiNegativeTrainer) -> dict[str, Any]:
    """Return the one batch of the data."""
    (batch,) = trainer.get_train_dataloader()
    return dict(batch)


def step_of(trainer: MultiNegativeTrainer) -> Callable[[], None]:
    """Return one step of a trainer on its one batch."""
    batch = batch_of(trainer)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    model: Any = trainer.model
    optimizer: Any = trainer.optimizer

    def step() -> None:
        trainer.training_step(model, dict(batch))
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(method: str, folder: str, args: Any) -> dict[str, Any]:
    """Return tokens, seconds and memory of both layouts under one loss."""
    trainers = {layout: trainer_of(method, layout, folder, args) for layout in LAYOUTS}
    with torch.no_grad():
        before = {layout: batch_logps(one.model, batch_of(one)).cpu() for layout, one in trainers.items()}
    tokens = {layout: batch_of(one)["input_ids"].numel() for layout, one in trainers.items()}
    clock = time.perf_counter if args.device == "cuda" else time.process_time
    seconds = interleaved(
        {layout: step_of(one) for layout, one in trainers.items()},
        repetitions=args.repetitions,
        warmup=args.warmup,
        device=args.device,
        clock=clock,
    )
    memory = {layout: peak(method, layout, trainers[layout], args) for layout in LAYOUTS}
    packed, repeated = (seconds[layout]["median_s"] for layout in LAYOUTS)
    deviation = (before["packed"] - before["concatenated"]).abs().max() / before["concatenated"].abs().max()
    return {
        "case": f"{method}, {'reference run' if trainers['packed'].loss.requires_reference else 'no reference run'}",
        "tokens": tokens,
        "sides": {layout: {**seconds[layout], "peak_extra_bytes": memory[layout]} for layout in LAYOUTS},
        "tokens_of_concatenated_over_packed": tokens["concatenated"] / tokens["packed"],
        "speed_of_packed": repeated / packed,
        "memory_of_packed_over_concatenated": ratio(memory["packed"], memory["concatenated"]),
        "max_difference": float(deviation),
    }


def peak(method: str, layout: str, trainer: MultiNegativeTrainer, args: Any) -> int | None:
    """Return the peak memory of a step in one layout."""
    if args.device == "cuda":
        return peak_extra_bytes(step_of(trainer), "cuda")
    names = ("prompt", "completion", "negatives", "rows", "hidden", "layers", "vocabulary", "threads", "seed")
    sizes = [word for name in names for word in (f"--{name}", str(getattr(args, name)))]
    return in_worker(layout, ["--methods", method, *sizes])


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--methods", nargs="+", default=["sdpo", "mppo"], help="losses (default: sdpo mppo)")
    options.add_argument("--prompt", type=int, default=300, help="tokens of a prompt (default: 300)")
    options.add_argument("--completion", type=int, default=5, help="tokens of a completion, >= 3 (default: 5)")
    options.add_argument("--negatives", type=int, default=15, help="other completions of a row (default: 15)")
    options.add_argument("--rows", type=int, default=2, help="rows of a batch (default: 2)")
    options.add_argument("--hidden", type=int, default=256, help="width of the model (default: 256)")
    options.add_argument("--layers", type=int, default=4, help="layers of the model (default: 4)")
    options.add_argument("--vocabulary", type=int, default=2048, help="words of the head (default: 2048)")
    args = options.parse_args()
    disable_progress_bars()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        if args.memory_of:
            step = step_of(trainer_of(args.methods[0], args.memory_of, folder, args))
            print(json.dumps({"peak_extra_bytes": peak_extra_bytes(step)}))
            return
        about = machine(args.device)
        cases = [measure(method, folder, args) for method in args.methods]
    versions = {"transformers": importlib.metadata.version("transformers"), "repetitions": args.repetitions}
    names = ("prompt", "completion", "negatives", "rows", "hidden", "layers", "vocabulary")
    sizes = {name: getattr(args, name) for name in names}
    emit({"benchmark": "packed_speed", **about, **versions, **sizes, "cases": cases}, args.output)


if __name__ == "__main__":
    main()
