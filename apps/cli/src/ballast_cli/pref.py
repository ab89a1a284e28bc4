"""`ballast pref`: make, score and select preference data, train on them, and evaluate."""

from __future__ import annotations

import dataclasses
import difflib
import json as json_format
import os
import re
import shutil
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml
from cyclopts import App, Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ballast_bench.meta import find_data_root
from ballast_cli.output import print_result, write_json, write_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from datasets import Dataset  # type: ignore[import-untyped]

pref_app = App(
    name="pref",
    help="Preference optimisation: convert, score and select pairs; train with any loss of pref-opt; evaluate.",
)

Metric = Literal["alignment_potential", "explicit", "implicit", "random"]

_FILES = {
    "gsm8k": Path("math/gsm8k/train.jsonl.gz"),
    "lastfm": Path("pref/lastfm-sdpo/lastfm-val.json.gz"),
}
# Arguments of the trainer that have a flag of their own here.
_OWN_FLAGS = {
    "output_dir": "--output",
    "method": "--method",
    "method_kwargs": "--option",
    "model_name_or_path": "--model",
    "seed": "--seed",
    "resume_from_checkpoint": "--fresh",
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


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The language model."""

    model: str | None = None
    "Folder or name of a model of transformers, or of an adapter of PEFT."
    tiny: bool = False
    "Make a small random model and its tokenizer from the texts of the data instead: nothing is downloaded."
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    "Precision in which the model is loaded."
    device: str = "cpu"
    "Torch device."

    def load(self, data: Dataset, seed: int) -> tuple[Any, Any]:
        """Return model and tokenizer.

        Raises:
            ValueError: If neither or both of `model` and `tiny` are given, or the model can't be loaded.
        """
        _one_model(self.model, tiny=self.tiny)
        if self.model is None:
            model, tokenizer = _tiny(data, seed)
        else:
            model, tokenizer = _loaded(self.model, dtype=self.dtype)
        return model.to(self.device), tokenizer


# --- data ------------------------------------------------------------------------------------------------------------


@pref_app.command
def convert(
    kind: Literal["hh", "gsm8k", "lastfm"],
    /,
    *,
    source: Path | None = None,
    root: Path | None = None,
    output: Path = Path("runs/pref-data"),
    flip_rate: float = 0.0,
    solutions: bool = True,
    negatives: int | None = None,
    candidates: bool = True,
    conversational: bool = False,
    held_out: float = 0.0,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Make preference data from dialogues, solved problems or candidate lists.

    Examples:
        ballast pref convert gsm8k --flip-rate 0.2 --held-out 0.1 --output runs/gsm8k-20

        ballast pref convert lastfm --negatives 5 --held-out 0.1 --output runs/lastfm

        ballast pref convert hh --source harmless-base/test.jsonl.gz

    Args:
        kind: `hh` (two dialogues per line), `gsm8k` (right against corrupted final answers) or `lastfm` (one artist against
            the other candidates).
        source: The file; for gsm8k and lastfm that of the data root by default.
        root: Data root; $BALLAST_DATA or `shared/data` above the current folder by default.
        output: Folder for `train.jsonl`, `held_out.jsonl` and `convert.json`.
        flip_rate: Share of pairs of gsm8k with chosen and rejected exchanged, marked in the column `flipped`; the held-out
            rows are never exchanged.
        solutions: Keep the calculations of gsm8k; otherwise completions are numbers alone.
        negatives: Rejected artists per row of lastfm; 0 makes pairs with one drawn artist; all others by default.
        candidates: List the candidates of lastfm in the prompt.
        conversational: Write conversations instead of texts.
        held_out: Share of rows for `held_out.jsonl`; rows with the same prompt stay together.
        seed: Seed of what is drawn.
        json: Print the result as one JSON object.
    """
    from pref_opt.data import check_preferences, split_rows, write_preferences

    given = {"flip_rate": (flip_rate, 0.0, "gsm8k"), "solutions": (solutions, True, "gsm8k"),
             "negatives": (negatives, None, "lastfm"), "candidates": (candidates, True, "lastfm")}  # fmt: skip
    for name, (value, default, owner) in given.items():
        if value != default and kind != owner:
            raise ValueError(f"--{name.replace('_', '-')} is an option of {owner}, not of {kind}")
    if not 0 <= held_out < 1:
        raise ValueError(f"--held-out must be in [0, 1), got {held_out}")
    path = _source(kind, source, root)
    dropped: dict[str, int] = {}
    if kind == "gsm8k":
        data = _gsm8k(path, solutions, conversational, seed)
    elif kind == "lastfm":
        data = _lastfm(path, negatives, candidates, conversational, seed)
    else:
        data, dropped = _hh(path, conversational)
    kept = data
    if held_out:
        kept, rest = split_rows(data, fraction=held_out, seed=seed, group_by="prompt")
    if flip_rate:
        kept = _flipped(kept, flip_rate, seed)
    check_preferences(kept)
    write_preferences(kept, output / "train.jsonl")
    result: dict[str, Any] = {"kind": kind, "source": str(path), "rows": len(kept), "seed": seed}
    if held_out:
        write_preferences(rest, output / "held_out.jsonl")
        result["held_out_rows"] = len(rest)
    if "flipped" in kept.column_names:
        result["flipped"] = sum(kept["flipped"])
    result |= {f"dropped: {reason}": count for reason, count in dropped.items()}
    write_json(output / "convert.json", result)
    print_result({**result, "output": str(output)}, as_json=json)


@pref_app.command
def score(
    *,
    data: Path,
    source: ModelOptions = ModelOptions(),
    output: Path = Path("runs/pref-scored.jsonl"),
    batch_size: int = 8,
    max_length: int = 2048,
    seed: int = 0,
    fresh: bool = False,
    json: bool = False,
) -> None:
    """Add to each pair what the model thinks of it, and the margin of a reward model where the data have one.

    Finished rows are kept in a file beside the output: an interrupted command continues when it is given again.

    Examples:
        ballast pref score --data runs/gsm8k-20/train.jsonl --tiny --output runs/scored.jsonl

        ballast pref score --data pairs.jsonl --model Qwen/Qwen2.5-0.5B-Instruct --dtype bfloat16 --device cuda

    Args:
        data: Pairs (`.jsonl`, `.json`, `.parquet` or a saved data set). A column `rm_margin` or `all_rm_scores` holds what a
            reward model says.
        source: The model that is to be trained.
        output: JSON-lines file.
        batch_size: Pairs per forward pass.
        max_length: Tokens of prompt and answer, as in training.
        seed: Seed of a tiny model.
        fresh: Start over instead of continuing.
        json: Print the result as one JSON object.
    """
    from pref_opt.alignment_potential import score_preferences
    from pref_opt.data import read_preferences, write_preferences

    _prepare_libraries(quiet=json)
    pairs = read_preferences(data)
    if _negatives(pairs) is not None:
        raise ValueError(f"{data}: scores are made of pairs, but rejected is a list")
    model, tokenizer = source.load(pairs, seed)
    unfinished = output.with_name(f"{output.name}.unfinished")
    if fresh:
        unfinished.unlink(missing_ok=True)
    with _Progress("rows", len(pairs), quiet=json) as progress:
        scored = score_preferences(
            model,
            pairs,
            tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            output=unfinished,
            on_progress=progress.reach,
        )
    write_preferences(scored, output)
    unfinished.unlink()
    known = [margin for margin in scored["rm_margin"] if margin is not None]
    result: dict[str, Any] = {
        "rows": len(scored),
        "left_out": len(pairs) - len(scored),
        "accuracy": sum(margin > 0 for margin in scored["logp_margin_norm"]) / len(scored),
        "implicit_margin": sum(scored["logp_margin_norm_abs"]) / len(scored),
    }
    if known:
        result["explicit_margin"] = sum(map(abs, known)) / len(known)
    print_result({**result, "output": str(output)}, as_json=json)


@pref_app.command
def select(
    *,
    data: Path,
    output: Path = Path("runs/pref-selected.jsonl"),
    ratio: float = 0.4,
    metric: Metric = "alignment_potential",
    implicit_weight: float = 1.0,
    normalize: Literal["zscore", "none"] = "zscore",
    signed: bool = False,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Keep the pairs with most to teach: the reward model is sure of them, the model isn't.

    Examples:
        ballast pref select --data runs/scored.jsonl --ratio 0.4

        ballast pref select --data runs/scored.jsonl --metric random --seed 1 --output runs/random.jsonl

    Args:
        data: What `ballast pref score` wrote.
        output: JSON-lines file of the selected pairs, best first.
        ratio: Share that is kept, in [0, 1].
        metric: Alignment potential, large explicit margins, small implicit margins, or a random order.
        implicit_weight: Weight of the implicit margin in the alignment potential.
        normalize: Standardise both margins over the file, or take them as they are.
        signed: Use the margins with their signs: pairs that the model ranks wrongly score high.
        seed: Seed of the random order.
        json: Print the result as one JSON object.
    """
    import torch

    from pref_opt.alignment_potential import select_top
    from pref_opt.data import read_preferences, write_preferences

    pairs = read_preferences(data)
    explicit = _column(pairs, "rm_margin", data, needed=metric in ("alignment_potential", "explicit"))
    implicit = _column(pairs, "logp_margin_norm", data, needed=metric in ("alignment_potential", "implicit"))
    chosen = select_top(
        explicit,
        implicit,
        metric=metric,
        implicit_weight=implicit_weight,
        normalize=normalize,
        select_ratio=ratio,
        signed=signed,
        generator=torch.Generator().manual_seed(seed),
    ).tolist()
    write_preferences(pairs.select(chosen), output)
    result: dict[str, Any] = {"metric": metric, "rows": len(pairs), "selected": len(chosen)}
    for name, values in (("explicit_margin", explicit), ("implicit_margin", implicit)):
        if chosen and any(values):
            result[name] = sum(abs(value) for value in values) / len(values)
            result[f"selected_{name}"] = sum(abs(values[index]) for index in chosen) / len(chosen)
    print_result({**result, "output": str(output)}, as_json=json)


def _source(kind: str, source: Path | None, root: Path | None) -> Path:
    if source is not None:
        return source
    if kind not in _FILES:
        raise ValueError(f"{kind} needs --source FILE")
    folder = find_data_root(root)
    if folder is None:
        raise FileNotFoundError(f"{kind}: no data root; name it with --root or BALLAST_DATA, or the file with --source")
    return folder / _FILES[kind]


def _gsm8k(path: Path, solutions: bool, conversational: bool, seed: int) -> Dataset:
    from pref_opt.data import gsm8k_preferences

    return gsm8k_preferences(path, solutions=solutions, conversational=conversational, seed=seed)


def _lastfm(path: Path, negatives: int | None, candidates: bool, conversational: bool, seed: int) -> Dataset:
    from pref_opt.data import lastfm_lists, lastfm_pairs

    shared: dict[str, Any] = {"show_candidates": candidates, "conversational": conversational, "seed": seed}
    if negatives == 0:
        return lastfm_pairs(path, **shared)
    return lastfm_lists(path, num_negatives=negatives, **shared)


def _hh(path: Path, conversational: bool) -> tuple[Dataset, dict[str, int]]:
    from pref_opt.data import hh_preferences

    return hh_preferences(path, conversational=conversational)


def _flipped(pairs: Dataset, rate: float, seed: int) -> Dataset:
    from pref_opt.data import flip_pairs

    return flip_pairs(pairs, rate=rate, seed=seed)


def _column(pairs: Dataset, name: str, path: Path, *, needed: bool) -> list[float]:
    values = pairs[name][:] if name in pairs.column_names else [None] * len(pairs)
    if not needed:
        return [0.0 if value is None else float(value) for value in values]
    for row, value in enumerate(values):
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError(f"{path}: row {row}: {name} must be a number, got {value!r}; `ballast pref score` adds it")
    return [float(value) for value in values]


# --- training --------------------------------------------------------------------------------------------------------


@pref_app.command
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
        seed: Seed of a tiny model, of shuffling and of what the loss draws.
        fresh: Start over instead of continuing from a checkpoint in `--output`.
        json: Print the result as one JSON object.
    """
    from pref_opt.data import read_preferences, truncate_prompts
    from pref_opt.losses import make_loss

    _one_model(model, tiny=tiny)
    _prepare_libraries(quiet=json)
    options = _options(option)
    loss = make_loss(method, **options)
    rows = read_preferences(data)
    held_out = None if eval_data is None else read_preferences(eval_data)
    for path, part in ((data, rows), (eval_data, held_out)):
        if part is not None and (_negatives(part) is not None) != loss.multi_negative:
            wanted = "a list of completions" if loss.multi_negative else "one completion"
            raise ValueError(f"{path}: method {method} needs {wanted} as rejected; `ballast pref convert` makes both")
    with warnings.catch_warnings():
        # TRL and PEFT still use names that transformers has renamed; a user of this command can do nothing about it.
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
        own = {"--output_dir": str(output), "--method": method, "--method_kwargs": json_format.dumps(options)}
        args, model_args = _trainer_arguments(
            {**own, "--seed": str(seed)}, trainer, trainer_config, several=loss.multi_negative, tiny=tiny
        )
        settings = {
            "method": method,
            "options": options,
            "data": str(data),
            "model": model or "tiny",
            "ref_model": ref_model,
            "max_prompt_length": max_prompt_length,
            "seed": seed,
        }
        resume = _last_checkpoint(output, settings, fresh=fresh)
        if tiny:
            model = _write_tiny(output / "tiny", rows, seed)
        policy, tokenizer = _loaded(str(model), model_args=model_args)
        reference = None if ref_model is None else _loaded(ref_model, model_args=model_args)[0]
        cut = 0
        if max_prompt_length is not None:
            rows, cut = truncate_prompts(
                rows, tokenizer, max_prompt_length=max_prompt_length, max_length=args.max_length
            )
            if held_out is not None:
                held_out = truncate_prompts(
                    held_out, tokenizer, max_prompt_length=max_prompt_length, max_length=args.max_length
                ).dataset
        write_text(output / "config.yaml", yaml.safe_dump({**settings, "trainer": list(trainer)}, sort_keys=False))
        with _Progress("steps", 0, quiet=json) as progress:
            made = _trainer(
                loss.multi_negative, policy, reference, args, model_args, rows, held_out, tokenizer, progress
            )
            outcome = made.train(resume_from_checkpoint=resume)
        made.save_model(str(output))
        evaluated = {} if held_out is None else made.evaluate()
    result: dict[str, Any] = {
        "method": method,
        "rows": len(rows),
        "prompts_cut": cut,
        "steps": made.state.global_step,
        "loss": outcome.training_loss,
        **{name: value for name, value in _last_figures(made.state.log_history).items() if name != "loss"},
        **{name: evaluated[name] for name in ("eval_loss", *(f"eval_{k}" for k in _FIGURES)) if name in evaluated},
        "train_seconds": round(outcome.metrics["train_runtime"], 2),
        "output": str(output),
    }
    if made.is_world_process_zero():
        write_json(output / "history.json", made.state.log_history)
        write_text(output / "curves.svg", draw_curves(made.state.log_history, f"{method} on {data.name}"))
        write_json(output / "result.json", result)
        print_result(result, as_json=json)


def draw_curves(history: Sequence[Mapping[str, Any]], title: str) -> str:
    """Return an SVG picture of the loss, margins, accuracies, and of beta and the filtered fraction where they are logged.

    Args:
        history: The trainer's `state.log_history`.
        title: Title of the picture.
    """
    import io

    import matplotlib as mpl
    from matplotlib.figure import Figure

    panels = [(label, curves) for label, names in _PANELS.items() if (curves := _curves(history, names))]
    # Fixed names inside the file: the same run gives the same bytes.
    with mpl.rc_context({"svg.hashsalt": "ballast", "svg.fonttype": "none"}):
        figure = Figure(figsize=(4.2 * max(1, len(panels)), 3.4), layout="constrained")
        axes = figure.subplots(1, max(1, len(panels)), squeeze=False)[0]
        for axis, (label, curves) in zip(axes, panels, strict=False):
            for name, points in curves.items():
                axis.plot(
                    *zip(*points, strict=True), marker="o" if len(points) < 30 else None, markersize=3, label=name
                )
            axis.set_title(label)
            axis.set_xlabel("step")
            if len(curves) > 1:
                axis.legend(fontsize=8)
        figure.suptitle(title)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


_FIGURES = ("rewards/accuracies", "rewards/margins")
# What is drawn, and under which names the trainers and losses log it; "1 - NAME" draws the rest to one.
_PANELS: dict[str, tuple[str, ...]] = {
    "loss": ("loss", "eval_loss"),
    "margin": ("rewards/margins", "eval_rewards/margins"),
    "accuracy": ("rewards/accuracies", "eval_rewards/accuracies"),
    "beta": ("beta_used", "beta/mean"),
    "filtered fraction": ("filtered_fraction", "1 - kept_fraction", "1 - boundary/fraction"),
}


def _curves(history: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    curves = {}
    for name in names:
        key = name.removeprefix("1 - ")
        points = [(record["step"], record[key]) for record in history if isinstance(record.get(key), (int, float))]
        if points:
            curves[name] = [(step, 1 - value) for step, value in points] if key != name else points
    return curves


def _last_figures(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the last values that training logged of what is drawn."""
    logged = [name for names in _PANELS.values() for name in names if not name.startswith(("eval_", "1 - "))]
    logged += ["kept_fraction", "boundary/fraction"]
    return {name: points[-1][1] for name in logged if (points := _curves(history, [name]).get(name))}


def _one_model(model: str | None, *, tiny: bool) -> None:
    if (model is None) != tiny:
        raise ValueError("give either --model FOLDER_OR_NAME or --tiny")


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
    words = list(given)
    for word in words:
        name = word.removeprefix("--").partition("=")[0].replace("-", "_")
        if word.startswith("--") and name in _OWN_FLAGS:
            raise ValueError(f"{word.partition('=')[0]} is set by {_OWN_FLAGS[name]}")
    if config is not None and not config.is_file():
        raise FileNotFoundError(f"--trainer-config: no such file: {config}")
    parser = TrlParser((Config, ModelConfig), allow_abbrev=False)

    def refuse(message: str) -> None:
        raise ValueError(f"arguments of the trainer: {message}")

    parser.error = refuse  # type: ignore[method-assign, assignment]
    defaults: dict[str, Any] = dict(_TINY_TRAINING) if tiny else {}
    if not torch.accelerator.is_available():
        defaults |= {"use_cpu": True, "bf16": False}
    if tiny:
        defaults |= {"bf16": False, _checkpointing(parser): False}
    parser.set_defaults(**defaults)
    words = [word for pair in own.items() for word in pair] + words
    words += [] if config is None else ["--config", str(config)]
    args, model_args, unknown = parser.parse_args_and_config(words, return_remaining_strings=True)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0], [*known, *_train_flags()], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"neither this command nor the trainer knows {unknown[0]!r}{hint}")
    if not args.disable_tqdm:
        args.disable_tqdm = True  # this command draws its own progress
    return args, model_args


def _checkpointing(parser: Any) -> str:
    """Return the name of the switch that recomputes activations; transformers has renamed it."""
    names = {action.dest for action in parser._actions}
    return "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"


def _train_flags() -> list[str]:
    names = [name for argument in pref_app["train"].assemble_argument_collection() for name in argument.names]
    return [name for name in names if name.startswith("--")]


def _last_checkpoint(output: Path, settings: Mapping[str, Any], *, fresh: bool) -> str | None:
    """Return the checkpoint to continue from.

    Raises:
        ValueError: If the checkpoints in the folder come from other settings.
    """
    folders = {int(path.name.rpartition("-")[2]): path for path in output.glob("checkpoint-*") if _is_checkpoint(path)}
    if fresh:
        for path in folders.values():
            shutil.rmtree(path)
        return None
    if not folders:
        return None
    try:
        stored = yaml.safe_load((output / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{output} has checkpoints, but no readable config.yaml: {error}; give --fresh") from None
    for name, value in settings.items():
        if not isinstance(stored, dict) or stored.get(name) != value:
            there = stored.get(name) if isinstance(stored, dict) else stored
            raise ValueError(
                f"{output} has checkpoints of a run with {name} = {there!r}, asked for is {value!r}; "
                "name another --output, or give --fresh"
            )
    return str(folders[max(folders)])


def _is_checkpoint(path: Path) -> bool:
    return re.fullmatch(r"checkpoint-\d+", path.name) is not None and (path / "trainer_state.json").is_file()


def _trainer(
    several: bool,
    policy: Any,
    reference: Any,
    args: Any,
    model_args: Any,
    rows: Dataset,
    held_out: Dataset | None,
    tokenizer: Any,
    progress: _Progress,
) -> Any:
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback
    from trl import get_peft_config  # type: ignore[attr-defined]

    class Report(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress.expect(state.max_steps, state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress.reach(state.global_step, show=False)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            shown = {name: logs[name] for name in ("loss", *_FIGURES) if name in (logs or {})}
            if shown:
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


# --- evaluation ------------------------------------------------------------------------------------------------------


@pref_app.command
def evaluate(
    *,
    data: Path,
    source: ModelOptions = ModelOptions(),
    reference: str | None = None,
    average: bool = False,
    batch_size: int = 8,
    max_length: int = 2048,
    output: Path | None = None,
    seed: int = 0,
    json: bool = False,
) -> None:
    """How often does the model put the preferred completion above the other, or above all K others?

    Examples:
        ballast pref evaluate --data runs/gsm8k/held_out.jsonl --model runs/pref

        ballast pref evaluate --data held_out.jsonl --model runs/simpo --average --reference Qwen/Qwen2.5-0.5B-Instruct

    Args:
        data: Pairs, or rows whose `rejected` is a list.
        source: The model.
        reference: Model whose log-probabilities are subtracted: rewards of DPO and its relatives.
        average: Divide log-probabilities by the number of tokens: rewards of SimPO and its relatives.
        batch_size: Sequences per forward pass.
        max_length: Tokens of prompt and completion; rows of which nothing is left are counted apart.
        output: JSON file for the result.
        seed: Seed of a tiny model.
        json: Print the result as one JSON object.
    """
    from pref_opt.data import read_preferences

    _prepare_libraries(quiet=json)
    rows = read_preferences(data)
    several = _negatives(rows)
    prompts = rows["prompt"][:]
    completions = [[row["chosen"], *(row["rejected"] if several else [row["rejected"]])] for row in rows]
    model, tokenizer = source.load(rows, seed)
    models = [model] if reference is None else [model, _loaded(reference, dtype=source.dtype)[0].to(source.device)]
    sums: list[list[Any]] = []
    with _Progress("rows", len(rows) * len(models), quiet=json) as progress:
        for one in models:
            part, lengths = _all_logps(one, tokenizer, prompts, completions, batch_size, max_length, progress)
            sums.append(part)
    rewards = []
    for index, counts in enumerate(lengths):
        if int(counts.min()) == 0:
            continue
        reward = sums[0][index] - (sums[1][index] if reference is not None else 0)
        rewards.append(reward / counts if average else reward)
    if not rewards:
        raise ValueError(f"{data}: every prompt fills --max-length {max_length}")
    right = [bool(reward[0] > reward[1:].max()) for reward in rewards]
    margins = [float(reward[0] - reward[1:].mean()) for reward in rewards]
    sizes = [counts for counts in lengths if int(counts.min())]
    result: dict[str, Any] = {
        "rows": len(rewards),
        "left_out": len(rows) - len(rewards),
        "negatives": several or 1,
        "hit_ratio@1" if several else "accuracy": sum(right) / len(right),
        "by_chance": 1 / (1 + (several or 1)),
        "margin": sum(margins) / len(margins),
        "chosen_tokens": sum(float(counts[0]) for counts in sizes) / len(sizes),
        "rejected_tokens": sum(float(counts[1:].double().mean()) for counts in sizes) / len(sizes),
    }
    if output is not None:
        write_json(output, result)
        result["output"] = str(output)
    print_result(result, as_json=json)


def _all_logps(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    completions: Sequence[Sequence[Any]],
    batch_size: int,
    max_length: int,
    progress: _Progress,
) -> tuple[list[Any], list[Any]]:
    """Return the log-probabilities of all completions, in windows that are sorted by length each."""
    from pref_opt.alignment_potential import completion_logps

    sums, lengths = [], []
    done = progress.done
    window = 32 * batch_size
    for start in range(0, len(prompts), window):
        part = completion_logps(
            model,
            tokenizer,
            prompts[start : start + window],
            completions[start : start + window],
            batch_size=batch_size,
            max_length=max_length,
        )
        sums += part.sums
        lengths += part.lengths
        progress.reach(done + len(sums))
    return sums, lengths


def _negatives(rows: Dataset) -> int | None:
    """Return the number of rejected completions per row, None for pairs."""
    rejected = rows[0]["rejected"]
    several = isinstance(rejected, list) and not isinstance(rejected[0], dict)
    return len(rejected) if several else None


# --- models and libraries --------------------------------------------------------------------------------------------


def _prepare_libraries(*, quiet: bool) -> None:
    """Keep the host libraries from sending anything and from drawing bars of their own; to be called before they load."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets

    if quiet or not Console(stderr=True).is_terminal:
        datasets.disable_progress_bars()


def _loaded(name: str, *, dtype: str | None = None, model_args: Any = None) -> tuple[Any, Any]:
    """Return a model of transformers, with the adapter where it is one, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    options: dict[str, Any] = {"dtype": dtype or "auto"}
    if model_args is not None:
        options = {
            "dtype": model_args.dtype or "auto",
            "revision": model_args.model_revision,
            "attn_implementation": model_args.attn_implementation,
        }
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(name, **options)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {name} can't be loaded: {str(error).strip().splitlines()[0]}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _tiny(data: Dataset, seed: int) -> tuple[Any, Any]:
    from pref_opt.tiny import tiny_causal_lm, tiny_tokenizer

    texts = (text for row in data.select(range(min(len(data), 2000))) for text in _strings(row))
    tokenizer = tiny_tokenizer(texts, vocab_size=1024)
    return tiny_causal_lm(tokenizer, seed=seed), tokenizer


def _write_tiny(folder: Path, data: Dataset, seed: int) -> str:
    """Write a tiny model, so that from here on it is a model like others: references and adapters find it by its name."""
    model, tokenizer = _tiny(data, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _strings(value: Any) -> list[str]:
    """Return the texts in a row, those of messages included."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for part in parts for text in _strings(part)]


class _Progress:
    """Progress on standard error: a bar with rate and time left, or plain lines when not a terminal."""

    def __init__(self, unit: str, total: int, *, quiet: bool) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._unit, self._total, self._quiet = unit, total, quiet
        self._start, self._first, self._said = time.perf_counter(), 0, 0.0
        self.done = 0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        shown = not quiet and self._console.is_terminal
        self._bar = Progress(
            *columns, TextColumn("eta"), TimeRemainingColumn(), console=self._console, disable=not shown
        )
        self._task = self._bar.add_task(unit, total=total)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def expect(self, total: int, done: int) -> None:
        """Start the clock: so many there will be, and so many there are already."""
        self._total, self._first, self._start = total, done, time.perf_counter()
        self._bar.update(self._task, total=total, completed=done)

    def reach(self, done: int, text: str = "", *, show: bool = True) -> None:
        """Show that so many are done; plain lines come at most every two seconds, and at the end."""
        self.done = done
        rate = (done - self._first) / max(time.perf_counter() - self._start, 1e-9)
        self._bar.update(self._task, completed=done, description=f"{self._unit} {rate:.1f}/s {text}")
        if not self._bar.disable or self._quiet or not show:
            return
        now = time.perf_counter()
        if done < self._total and now - self._said < 2:
            return
        self._said = now
        left = (self._total - done) / rate if rate > 0 else 0.0
        self._console.print(
            f"{self._unit} {done}/{self._total} {rate:.1f}/s eta={left:.0f}s {text}".rstrip(), markup=False
        )
