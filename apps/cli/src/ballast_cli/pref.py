"""`ballast pref`: make, score and select preference data, train on them, and evaluate."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import App

from ballast_bench.meta import find_data_root
from ballast_cli.output import print_result, write_json
from ballast_cli.pref_common import (
    NO_MODEL,
    CountProgress,
    ModelOptions,
    load_reward,
    number_of_negatives,
    prepare_libraries,
)
from ballast_cli.pref_train import train

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset  # type: ignore[import-untyped]

pref_app = App(
    name="pref",
    help="Preference optimisation: convert, score and select pairs; train with any loss of pref-opt; evaluate.",
)
pref_app.command(train)

_FILES = {
    "gsm8k": Path("math/gsm8k/train.jsonl.gz"),
    "lastfm": Path("pref/lastfm-sdpo/lastfm-val.json.gz"),
}


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
    user_vectors: bool = False,
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
        user_vectors: Train a small recommender (SASRec) on the rows of lastfm for training, and add its vectors and scores,
            which the method napo reads.
        conversational: Write conversations instead of texts.
        held_out: Share of rows for `held_out.jsonl`; rows with the same prompt stay together.
        seed: Seed of what is drawn.
        json: Print the result as one JSON object.
    """
    from pref_opt.data import check_preferences, flip_pairs, write_preferences

    given: dict[str, tuple[Any, Any, str]] = {
        "flip_rate": (flip_rate, 0.0, "gsm8k"),
        "solutions": (solutions, True, "gsm8k"),
        "negatives": (negatives, None, "lastfm"),
        "candidates": (candidates, True, "lastfm"),
        "user_vectors": (user_vectors, False, "lastfm"),
    }
    for name, (value, default, owner) in given.items():
        if value != default and kind != owner:
            raise ValueError(f"--{name.replace('_', '-')} is an option of {owner}, not of {kind}")
    if user_vectors and negatives == 0:
        raise ValueError("--user-vectors is for lists of candidates, not for the pairs of --negatives 0")
    if not 0 <= held_out < 1:
        raise ValueError(f"--held-out must be in [0, 1), got {held_out}")
    path = _source(kind, source, root)
    prepare_libraries(quiet=True)
    data, dropped = _converted(
        kind,
        path,
        solutions=solutions,
        negatives=negatives,
        candidates=candidates,
        conversational=conversational,
        seed=seed,
    )
    check_preferences(data)
    parts = _parts(data, held_out, seed)
    if kind == "gsm8k":
        parts["train"] = flip_pairs(parts["train"], rate=flip_rate, seed=seed)
    if user_vectors:
        parts = _with_user_vectors(parts, seed)
    result: dict[str, Any] = {"kind": kind, "source": str(path), "seed": seed}
    for name, part in parts.items():
        write_preferences(part, output / f"{name}.jsonl")
        result[f"{name}_rows"] = len(part)
    if kind == "gsm8k":
        result["flipped"] = sum(parts["train"]["flipped"])
    result |= {f"dropped: {reason}": count for reason, count in dropped.items()}
    write_json(output / "convert.json", result)
    print_result({**result, "output": str(output)}, as_json=json)


@pref_app.command
def score(
    *,
    data: Path,
    source: ModelOptions = NO_MODEL,
    reward_model: str | None = None,
    output: Path = Path("runs/pref-scored.jsonl"),
    batch_size: int = 8,
    max_length: int = 2048,
    seed: int = 0,
    fresh: bool = False,
    json: bool = False,
) -> None:
    """Add to each pair what the model thinks of it, and the margin of a reward model.

    Finished rows are kept in a file beside the output: an interrupted command continues when it is given again.

    Examples:
        ballast pref score --data runs/gsm8k-20/train.jsonl --tiny --output runs/scored.jsonl

        ballast pref score --data pairs.jsonl --model Qwen/Qwen2.5-0.5B-Instruct --reward-model rewards/ --device cuda

    Args:
        data: Pairs (`.jsonl`, `.json`, `.parquet` or a saved data set). A column `rm_margin` or `all_rm_scores` holds what a
            reward model said, if none is given here.
        source: The model that is to be trained.
        reward_model: Folder or name of a classifier with one output, or of a language model whose log-probability per token
            is the reward.
        output: JSON-lines file.
        batch_size: Pairs per forward pass.
        max_length: Tokens of prompt and answer, as in training.
        seed: Seed of a tiny model.
        fresh: Start over instead of continuing.
        json: Print the result as one JSON object.
    """
    from pref_opt.alignment_potential import score_preferences
    from pref_opt.data import read_preferences, write_preferences

    source.check()
    prepare_libraries(quiet=json)
    pairs = read_preferences(data)
    if number_of_negatives(pairs) is not None:
        raise ValueError(f"{data}: scores are made of pairs, but rejected is a list")
    model, tokenizer = source.load(pairs, seed)
    reward, mark = None, ""
    if reward_model is not None:
        limits = {"batch_size": 2 * batch_size, "max_length": max_length}
        reward = load_reward(reward_model, dtype=source.dtype, device=source.device, **limits)
        # Finished rows hold margins: those of another reward model must not be mixed in.
        mark = hashlib.sha256(reward_model.encode()).hexdigest()[:8] + "."
    unfinished = output.with_name(f"{output.name}.{mark}unfinished")
    if fresh:
        unfinished.unlink(missing_ok=True)
    with CountProgress("rows", len(pairs), quiet=json) as progress:
        scored = score_preferences(
            model,
            pairs,
            tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            reward=reward,
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
    metric: Literal["alignment_potential", "explicit", "implicit", "random"] = "alignment_potential",
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
        ratio: Share that is kept, in [0, 1]; at least one pair has to be left.
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

    prepare_libraries(quiet=True)
    pairs = read_preferences(data)
    explicit = _margins(pairs, "rm_margin", data, needed=metric in ("alignment_potential", "explicit"))
    implicit = _margins(pairs, "logp_margin_norm", data, needed=metric in ("alignment_potential", "implicit"))
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
    if not chosen:
        raise ValueError(f"--ratio {ratio} selects none of {len(pairs)} pairs")
    write_preferences(pairs.select(chosen), output)
    result: dict[str, Any] = {"metric": metric, "rows": len(pairs), "selected": len(chosen)}
    for name, values in (("explicit_margin", explicit), ("implicit_margin", implicit)):
        if any(values):
            result[name] = sum(map(abs, values)) / len(values)
            result[f"selected_{name}"] = sum(abs(values[index]) for index in chosen) / len(chosen)
    print_result({**result, "output": str(output)}, as_json=json)


@pref_app.command
def evaluate(
    *,
    data: Path,
    source: ModelOptions = NO_MODEL,
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
        max_length: Tokens of prompt and completion; rows with a completion of which nothing is left are counted apart.
        output: JSON file for the result.
        seed: Seed of a tiny model.
        json: Print the result as one JSON object.
    """
    from pref_opt.data import read_preferences

    source.check()
    prepare_libraries(quiet=json)
    rows = read_preferences(data)
    negatives = number_of_negatives(rows)
    model, tokenizer = source.load(rows, seed)
    models = [model] if reference is None else [model, source.other(reference)]
    limits: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length}
    with CountProgress("rows", len(rows), quiet=json) as progress:
        sums, lengths = _all_logps(models, tokenizer, rows, limits, progress, several=negatives is not None)
    fitting = [index for index, counts in enumerate(lengths) if int(counts.min())]
    if not fitting:
        raise ValueError(f"{data}: every prompt fills --max-length {max_length}")
    rewards = [sums[index] / lengths[index] if average else sums[index] for index in fitting]
    for index, reward in zip(fitting, rewards, strict=True):
        if not reward.isfinite().all():
            raise ValueError(f"{data}: row {index}: log-probabilities must be finite, got {reward.tolist()}")
    sizes = [lengths[index].double() for index in fitting]
    result: dict[str, Any] = {
        "rows": len(rewards),
        "left_out": len(rows) - len(rewards),
        "negatives": negatives or 1,
        "hit_ratio@1" if negatives else "accuracy": sum(bool(r[0] > r[1:].max()) for r in rewards) / len(rewards),
        "by_chance": 1 / (1 + (negatives or 1)),
        "margin": sum(float(r[0] - r[1:].mean()) for r in rewards) / len(rewards),
        "chosen_tokens": sum(float(counts[0]) for counts in sizes) / len(sizes),
        "rejected_tokens": sum(float(counts[1:].mean()) for counts in sizes) / len(sizes),
    }
    if output is not None:
        write_json(output, result)
        result["output"] = str(output)
    print_result(result, as_json=json)


# --- conversion ------------------------------------------------------------------------------------------------------


def _source(kind: str, source: Path | None, root: Path | None) -> Path:
    if source is not None:
        return source
    if kind not in _FILES:
        raise ValueError(f"{kind} needs --source FILE")
    folder = find_data_root(root)
    if folder is None:
        raise FileNotFoundError(f"{kind}: no data root; name it with --root or BALLAST_DATA, or the file with --source")
    return folder / _FILES[kind]


def _converted(
    kind: str,
    path: Path,
    *,
    solutions: bool,
    negatives: int | None,
    candidates: bool,
    conversational: bool,
    seed: int,
) -> tuple[Dataset, dict[str, int]]:
    """Return the rows, and how many were left out by reason."""
    from pref_opt.data import gsm8k_preferences, hh_preferences, lastfm_lists, lastfm_pairs

    if kind == "hh":
        return hh_preferences(path, conversational=conversational)
    if kind == "gsm8k":
        return gsm8k_preferences(path, solutions=solutions, conversational=conversational, seed=seed), {}
    lists: dict[str, Any] = {"show_candidates": candidates, "conversational": conversational, "seed": seed}
    if negatives == 0:
        return lastfm_pairs(path, **lists), {}
    return lastfm_lists(path, num_negatives=negatives, **lists), {}


def _parts(data: Dataset, held_out: float, seed: int) -> dict[str, Dataset]:
    from pref_opt.data import split_rows

    if not held_out:
        return {"train": data}
    return dict(
        zip(("train", "held_out"), split_rows(data, fraction=held_out, seed=seed, group_by="prompt"), strict=True)
    )


def _with_user_vectors(parts: dict[str, Dataset], seed: int) -> dict[str, Dataset]:
    from pref_opt.napo import NO_ITEM, annotate_dataset, train_sasrec

    sequences = [
        [item for item in (*row["history_items"], row["chosen_items"]) if item != NO_ITEM] for row in parts["train"]
    ]
    ids = ("chosen_items", "rejected_items", "history_items")
    known = [value for part in parts.values() for name in ids for value in part[name]]
    largest = max(max(value) if isinstance(value, list) else value for value in known)
    sasrec = train_sasrec(sequences, largest + 1, seed=seed)
    return {name: annotate_dataset(part, sasrec) for name, part in parts.items()}


# --- scores ----------------------------------------------------------------------------------------------------------


def _margins(pairs: Dataset, name: str, path: Path, *, needed: bool) -> list[float]:
    """Return a column of margins; zeros where there are none and none are needed."""
    values: list[Any] = pairs[name][:] if name in pairs.column_names else [None] * len(pairs)
    if not needed:
        return [float(value or 0.0) for value in values]
    flag = " with --reward-model" if name == "rm_margin" else ""
    for row, value in enumerate(values):
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError(f"{path}: row {row}: no {name}, got {value!r}; `ballast pref score`{flag} adds it")
    return [float(value) for value in values]


def _all_logps(
    models: Sequence[Any],
    tokenizer: Any,
    rows: Dataset,
    limits: dict[str, Any],
    progress: CountProgress,
    *,
    several: bool,
) -> tuple[list[Any], list[Any]]:
    """Return the log-probabilities of all completions, minus those of a second model, and their numbers of tokens."""
    from pref_opt.alignment_potential import completion_logps

    sums: list[Any] = []
    lengths: list[Any] = []
    window = 32 * limits["batch_size"]  # sorted by length, each
    for start in range(0, len(rows), window):
        part = rows[start : start + window]
        completions = [
            [chosen, *rejected] if several else [chosen, rejected]
            for chosen, rejected in zip(part["chosen"], part["rejected"], strict=True)
        ]
        scored = [completion_logps(model, tokenizer, part["prompt"], completions, **limits) for model in models]
        others = [sum(one.sums[index] for one in scored[1:]) for index in range(len(completions))]
        sums += [one - other for one, other in zip(scored[0].sums, others, strict=True)]
        lengths += scored[0].lengths
        progress.reach(len(sums))
    return sums, lengths
