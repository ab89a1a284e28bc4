"""`ballast pref train`: train a language model on preferences with any loss of pref-opt."""

from __future__ import annotations

import difflib
import inspect
import io
import json as json_format
import math
import re
import shutil
import signal
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import yaml
from cyclopts import Parameter

from ballast_cli.output import print_result, write_json, write_text
from ballast_cli.pref_common import (
    CountProgress,
    load_model,
    number_of_negatives,
    one_model,
    prepare_libraries,
    tiny_model,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from datasets import Dataset  # type: ignore[import-untyped]

# What the trainers' arguments are called here.
_OWN_FLAGS = {
    "output_dir": "--output",
    "method": "--method",
    "method_kwargs": "--option",
    "loss_type": "--method",
    "beta": "--option beta=...",
    "label_smoothing": "--option label_smoothing=...",
    "model_name_or_path": "--model",
    "seed": "--seed",
    "resume_from_checkpoint": "repeating the command; --fresh starts over",
}
_TINY_TRAINING = {
    "learning_rate": 2e-3,
    "per_device_train_batch_size": 16,
    "max_steps": 200,
    "lr_scheduler_type": "constant",
    "logging_steps": 10,
    "save_steps": 50,
    "max_length": 1024,
}
_SHOWN = ("rewards/accuracies", "rewards/margins")
# What is drawn, and under which names the trainers and losses log it; "1 - NAME" draws the rest to one.
_PANELS: dict[str, tuple[str, ...]] = {
    "loss": ("loss", "eval_loss"),
    "margin": ("rewards/margins", "eval_rewards/margins"),
    "accuracy": ("rewards/accuracies", "eval_rewards/accuracies"),
    "beta": ("beta_used", "beta/mean"),
    "filtered fraction": ("filtered_fraction", "1 - kept_fraction", "1 - boundary/fraction"),
    "target margin": ("margin/mean", "margin/gamma"),
}
_RESULTS = ("loss", *_SHOWN, "beta_used", "beta/mean", "filtered_fraction", "kept_fraction", "boundary/fraction")


def train(
    *trainer: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
    method: str = "dpo",
    data: Path,
    eval_data: Path | None = None,
    model: str | None = None,
    tiny: bool = False,
    ref_model: str | None = None,
    option: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    max_prompt_length: int | None = None,
    trainer_config: Path | None = None,
    output: Path = Path("runs/pref"),
    seed: int = 0,
    fresh: bool = False,
    json: bool = False,
) -> None:
    """Train a language model on preferences, with any loss of pref-opt.

    All other arguments go to the trainer's own parser, in its own spelling: those of TRL's DPOConfig and ModelConfig for
    pairs, those of transformers' TrainingArguments and TRL's ModelConfig for rows with several rejected completions. An
    interrupted run continues from its last checkpoint when the same command is given again.

    Examples:
        ballast pref train --method simpo --data runs/gsm8k/train.jsonl --tiny --max_steps 100

        ballast pref train --method repo --option gamma=0.4 --data pairs.jsonl --eval-data held_out.jsonl
        --model Qwen/Qwen2.5-0.5B-Instruct --learning_rate 1e-6 --use_peft --report_to wandb --output runs/repo

        ballast pref train --method sdpo --data runs/lastfm/train.jsonl --tiny --per_device_train_batch_size 4

    Args:
        trainer: Arguments of the trainer.
        method: Name of the loss: dpo, simpo, beta_dpo, dr_dpo, alpha_dpo, gamma_po, repo, ...; sdpo, dmpo, mppo, napo and
            dynamic_po take several rejected completions per row.
        data: Pairs, or rows whose `rejected` is a list.
        eval_data: Rows to evaluate on after training, and during it as `--eval_strategy` says.
        model: Folder or name of a model of transformers.
        tiny: Train a small random model instead, with its own defaults (200 steps of 16 rows, 2e-3).
        ref_model: Reference, for losses that need one; the model before training by default.
        option: Hyper-parameters of the loss, NAME=VALUE each.
        max_prompt_length: Cut prompts from the left to so many tokens, where they don't fit with their completions.
        trainer_config: YAML file with arguments of the trainer; those on the command line win.
        output: Folder for the model, its checkpoints, `result.json`, `history.json`, `curves.svg` and `config.yaml`.
        seed: Seed of a tiny model and of shuffling.
        fresh: Start over instead of continuing from a checkpoint in `--output`.
        json: Print the result as one JSON object.
    """
    from pref_opt.data import read_preferences
    from pref_opt.losses import make_loss

    one_model(model, tiny=tiny)
    options = _options(option)
    several = make_loss(method, **options).multi_negative
    prepare_libraries(quiet=json)
    rows = _rows(read_preferences(data), data, method, several=several)
    held_out = None if eval_data is None else _rows(read_preferences(eval_data), eval_data, method, several=several)
    with warnings.catch_warnings():
        # TRL and PEFT still use names that transformers has renamed; a user of this command can do nothing about it.
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
        own = {"--output_dir": str(output), "--method": method, "--method_kwargs": json_format.dumps(options)}
        args, model_args = _trainer_arguments(
            {**own, "--seed": str(seed)}, trainer, trainer_config, several=several, tiny=tiny
        )
        settings = {
            "method": method,
            "options": options,
            "data": str(data),
            "rows": len(rows),
            "model": model or "tiny",
            "ref_model": ref_model,
            "max_prompt_length": max_prompt_length,
            "seed": seed,
        }
        with args.main_process_first(desc="preparing the output"):
            checkpoint = _last_checkpoint(output, settings, fresh=fresh)
            if tiny:
                model = _write_tiny(output / "tiny", rows, seed, write=args.should_save)
        loading = _loading(model_args)
        policy, tokenizer = load_model(str(model), **loading)
        reference = None if ref_model is None else load_model(ref_model, **loading)[0]
        rows, cut = _shortened(rows, tokenizer, max_prompt_length, args.max_length)
        held_out = held_out and _shortened(held_out, tokenizer, max_prompt_length, args.max_length)[0]
        if args.should_save:
            write_text(output / "config.yaml", yaml.safe_dump({**settings, "trainer": list(trainer)}, sort_keys=False))
        start = time.perf_counter()
        with CountProgress("steps", 0, quiet=json or not args.should_log) as progress:
            made = _trainer(several, policy, reference, args, model_args, rows, held_out, tokenizer, progress)
            _run(made, checkpoint)
        made.save_model(str(output))
        evaluated = {} if held_out is None else made.evaluate()
    history = made.state.log_history
    result: dict[str, Any] = {
        "method": method,
        "rows": len(rows),
        "prompts_cut": cut,
        "steps": made.state.global_step,
        **_last_values(history),
        **{name: evaluated[name] for name in ("eval_loss", *(f"eval_{k}" for k in _SHOWN)) if name in evaluated},
        "seconds": round(time.perf_counter() - start, 2),
        "output": str(output),
    }
    if made.is_world_process_zero():
        write_json(output / "history.json", _json_values(history))
        write_text(output / "curves.svg", draw_curves(history, f"{method} on {data.name}"))
        write_json(output / "result.json", _json_values(result))
        print_result(_json_values(result), as_json=json)


# --- data and models -------------------------------------------------------------------------------------------------


def _rows(rows: Dataset, path: Path, method: str, *, several: bool) -> Dataset:
    if (number_of_negatives(rows) is not None) != several:
        wanted = "a list of completions" if several else "one completion"
        raise ValueError(f"{path}: method {method} needs {wanted} as rejected; `ballast pref convert` makes both")
    return rows


def _shortened(rows: Dataset, tokenizer: Any, max_prompt_length: int | None, max_length: int | None) -> Any:
    from pref_opt.data import truncate_prompts

    if max_prompt_length is None:
        return rows, 0
    return truncate_prompts(rows, tokenizer, max_prompt_length=max_prompt_length, max_length=max_length)


def _write_tiny(folder: Path, rows: Dataset, seed: int, *, write: bool) -> str:
    """Write a tiny model, so that from here on it is a model like others: references and adapters find it by its name."""
    if write:
        model, tokenizer = tiny_model(rows, seed)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def _loading(model_args: Any) -> dict[str, Any]:
    """Return how TRL's arguments of the model want it loaded."""
    from trl import get_quantization_config  # type: ignore[attr-defined]

    options = {
        "dtype": model_args.dtype or "auto",
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
    }
    quantization = get_quantization_config(model_args)
    if quantization is not None:
        options["quantization_config"] = quantization
    return options


# --- arguments -------------------------------------------------------------------------------------------------------


def _options(given: Sequence[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for entry in given:
        name, equals, value = entry.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--option must be NAME=VALUE, got {entry!r}")
        try:
            options[name] = json_format.loads(value)
        except ValueError:
            options[name] = value
    return options


def _trainer_arguments(
    own: Mapping[str, str], given: Sequence[str], config: Path | None, *, several: bool, tiny: bool
) -> tuple[Any, Any]:
    """Return the trainer's arguments and TRL's of the model, from TRL's own parser.

    Raises:
        ValueError: If an argument is unknown (with the nearest), has a wrong value, or has a flag of this command.
    """
    import torch
    from trl import ModelConfig, TrlParser  # type: ignore[attr-defined]

    if several:
        from pref_opt.multi_negative import MultiNegativeConfig as Config
    else:
        from pref_opt.trl import PreferenceConfig as Config  # type: ignore[assignment]
    names = [word.removeprefix("--").partition("=")[0] for word in given if word.startswith("--")]
    for name in (*names, *_config_names(config)):
        if name.replace("-", "_") in _OWN_FLAGS:
            raise ValueError(f"{name} isn't an argument of the trainer here: use {_OWN_FLAGS[name.replace('-', '_')]}")
    kinds: Any = (Config, ModelConfig)
    parser = TrlParser(kinds, allow_abbrev=False)

    def refuse(message: str) -> None:
        raise ValueError(f"arguments of the trainer: {message}")

    parser.error = refuse  # type: ignore[method-assign, assignment]
    defaults: dict[str, Any] = dict(_TINY_TRAINING) if tiny else {}
    if not torch.accelerator.is_available():
        defaults |= {"use_cpu": True, "bf16": False}
    if tiny:
        defaults |= {"bf16": False, _checkpointing(parser): False}
    parser.set_defaults(**defaults)
    words = [*(word for pair in own.items() for word in pair), *given]
    words += [] if config is None else ["--config", str(config)]
    args, model_args, unknown = parser.parse_args_and_config(words, return_remaining_strings=True)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0], [*known, *_flags()], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"neither this command nor the trainer knows {unknown[0]!r}{hint}")
    _check_reports(args.report_to)
    args.disable_tqdm = True  # this command draws its own progress
    return args, model_args


def _config_names(config: Path | None) -> list[str]:
    """Return the names that a file of trainer arguments sets."""
    if config is None:
        return []
    if not config.is_file():
        raise FileNotFoundError(f"--trainer-config: no such file: {config}")
    try:
        values = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{config}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{config}: expected a mapping of trainer arguments, got {type(values).__name__}")
    return [str(name) for name in values]


def _checkpointing(parser: Any) -> str:
    """Return the name of the switch that recomputes activations; transformers has renamed it."""
    names = {action.dest for action in parser._actions}
    return "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"


def _flags() -> list[str]:
    return [f"--{name.replace('_', '-')}" for name in inspect.signature(train).parameters if name != "trainer"]


def _check_reports(names: Sequence[str]) -> None:
    """Raise ValueError where a service that should get the logs is unknown or not installed, before models are loaded."""
    from transformers.integrations import get_reporting_integration_callbacks  # type: ignore[attr-defined]

    try:
        for callback in get_reporting_integration_callbacks(names):  # type: ignore[no-untyped-call]
            callback()
    except (ImportError, RuntimeError, ValueError) as error:
        raise ValueError(f"--report_to {' '.join(names)}: {error}") from None


# --- training --------------------------------------------------------------------------------------------------------


def _last_checkpoint(output: Path, settings: Mapping[str, Any], *, fresh: bool) -> Path | None:
    """Return the checkpoint to continue from.

    Raises:
        ValueError: If the checkpoints in the folder come from other settings.
    """
    found = [path for path in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    if fresh:
        for path in found:
            shutil.rmtree(path, ignore_errors=True)
        return None
    # The state of the loss is written last: a checkpoint that an interruption left without it is not whole.
    whole = {int(path.name[11:]): path for path in found if (path / "preference_loss.safetensors").is_file()}
    if not whole:
        return None
    try:
        stored = yaml.safe_load((output / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{output} has checkpoints, but no readable config.yaml: {error}; give --fresh") from None
    for name, value in settings.items():
        there = stored.get(name) if isinstance(stored, dict) else None
        if there != value:
            raise ValueError(
                f"{output} has checkpoints of a run with {name} = {there!r}, asked for is {value!r}; "
                "name another --output, or give --fresh"
            )
    return whole[max(whole)]


def _trainer(
    several: bool,
    policy: Any,
    reference: Any,
    args: Any,
    model_args: Any,
    rows: Dataset,
    held_out: Dataset | None,
    tokenizer: Any,
    progress: CountProgress,
) -> Any:
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback
    from trl import get_peft_config  # type: ignore[attr-defined]

    class Report(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress.expect(state.max_steps, state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress.reach(state.global_step, line=False)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            shown = {name: logs[name] for name in ("loss", *_SHOWN) if name in (logs or {})}
            if "loss" in shown:
                progress.reach(state.global_step, " ".join(f"{name} {value:.4f}" for name, value in shown.items()))

    if several:
        from pref_opt.multi_negative import MultiNegativeTrainer as Trainer
    else:
        from pref_opt.trl import PreferenceTrainer as Trainer  # type: ignore[assignment]
    made = Trainer(
        policy,
        reference,
        args,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    for callback in (PrinterCallback, ProgressCallback):
        made.remove_callback(callback)  # they print to standard output
    made.add_callback(Report())
    return made


def _run(made: Any, checkpoint: Path | None) -> None:
    """Train to the end, or raise KeyboardInterrupt with a checkpoint of the last step on the disk."""
    from transformers import TrainerCallback, TrainerState

    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        args = made.args
        if state.global_step >= args.max_steps if args.max_steps > 0 else state.epoch >= args.num_train_epochs:
            # The trainer would go on for one more step.
            from pref_opt.trl import load_loss_state

            load_loss_state(made.loss, checkpoint)
            made._load_from_checkpoint(str(checkpoint))
            made.state = state
            return

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if interrupt.asked:
                control.should_save = control.should_training_stop = True

    made.add_callback(Stop())
    with _Interrupt() as interrupt:
        made.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if interrupt.asked:
        raise KeyboardInterrupt


class _Interrupt:
    """Ctrl-C asks for an end after the step; a second one interrupts at once."""

    def __enter__(self) -> Self:
        self.asked = False
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self._before)


# --- results ---------------------------------------------------------------------------------------------------------


def draw_curves(history: Sequence[Mapping[str, Any]], title: str) -> str:
    """Return an SVG picture of the loss, margins and accuracies, and of beta, filtering and target margins where logged.

    Args:
        history: The trainer's `state.log_history`.
        title: Title of the picture.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    panels = [(label, curves) for label, names in _PANELS.items() if (curves := _curves(history, names))]
    # Fixed names inside the file: the same run gives the same bytes.
    with mpl.rc_context({"svg.hashsalt": "ballast", "svg.fonttype": "none"}):
        figure = Figure(figsize=(4.2 * max(1, len(panels)), 3.4), layout="constrained")
        axes = figure.subplots(1, max(1, len(panels)), squeeze=False)[0]
        for axis, (label, curves) in zip(axes, panels, strict=False):
            for name, points in curves.items():
                marker = "o" if len(points) < 30 else None
                axis.plot(*zip(*points, strict=True), marker=marker, markersize=3, label=name)
            axis.set_title(label)
            axis.set_xlabel("step")
            axis.legend(fontsize=8)
        figure.suptitle(title)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _curves(history: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    curves = {}
    for name in names:
        key = name.removeprefix("1 - ")
        points = [(record["step"], record[key]) for record in history if key in record]
        if points:
            curves[name] = points if key == name else [(step, 1 - value) for step, value in points]
    return curves


def _last_values(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the last values that training logged of what is drawn."""
    return {name: points[-1][1] for name, points in _curves(history, _RESULTS).items()}


def _json_values(value: Any) -> Any:
    """Return a value with null for numbers that JSON doesn't have, such as the norm of a gradient that overflowed."""
    if isinstance(value, dict):
        return {name: _json_values(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_json_values(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
