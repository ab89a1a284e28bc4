"""Preference data: reading, checking, converting, splitting, and cutting long prompts from the left.

Everything here ends in TRL's form: rows with `prompt`, `chosen` and `rejected`, as texts or as conversations (lists of messages
with `role` and `content`). For losses with K negatives `rejected` is a list of K texts or conversations. Converters
make such rows from HH dialogues, GSM8K answers and LastFM candidate lists.

Needs `datasets`, which the extra `trl` brings. Documentation: `docs/guides/preference-training.md`.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pref_opt._checks import check_count, check_fraction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from datasets import Dataset  # type: ignore[import-untyped]
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Converted",
    "Truncated",
    "check_preferences",
    "flip_pairs",
    "gsm8k_preferences",
    "hh_preferences",
    "lastfm_lists",
    "lastfm_pairs",
    "read_preferences",
    "split_rows",
    "truncate_prompts",
    "write_preferences",
]

_COLUMNS = ("prompt", "chosen", "rejected")


class Converted(NamedTuple):
    """A converted preference set.

    Attributes:
        dataset: The pairs.
        dropped: Number of rows that were left out, by reason.
    """

    dataset: Dataset
    dropped: dict[str, int]


class Truncated(NamedTuple):
    """A preference set whose prompts have at most so many tokens.

    Attributes:
        dataset: All rows.
        cut: Number of prompts that were cut.
    """

    dataset: Dataset
    cut: int


# --- checking, reading, writing --------------------------------------------------------------------------------------


def check_preferences(dataset: Dataset | Iterable[Mapping[str, Any]]) -> None:
    """Raise ValueError at the first row that can't be trained on.

    Source: the mistakes that users of preference trainers report most.

    Args:
        dataset: Rows with `prompt`, `chosen` and `rejected`; `rejected` may be a list of them, equally many in every row.

    Raises:
        ValueError: If there are no rows, or a row lacks a column, has an empty `chosen` or `rejected`, the same text as
            both, a value that is neither text nor messages, or another number of rejected completions than the first row. The
            message names the row, counted from 0.

    Examples:
        >>> from pref_opt.data import check_preferences
        >>> check_preferences([{"prompt": "1+1=", "chosen": "2", "rejected": "2"}])
        Traceback (most recent call last):
        ...
        ValueError: row 0: chosen and rejected are identical: '2'
    """
    if isinstance(dataset, Mapping):
        raise ValueError(f"dataset must be one split, got a dict of {sorted(map(str, dataset))}; choose one of them")
    first: tuple[str, int] | None = None
    for index, row in enumerate(dataset):
        form = _check_row(f"row {index}", row)
        if first is None:
            first = form
        if form[0] != first[0]:
            raise ValueError(f"row {index}: holds {form[0]}, row 0 {first[0]}; all rows must have the same form")
        if form[1] != first[1]:
            raise ValueError(f"row {index}: {form[1]} rejected, row 0 has {first[1]}; all rows must have equally many")
    if first is None:
        raise ValueError("dataset is empty; at least one row is needed")


def read_preferences(path: str | Path) -> Dataset:
    """Read a preference set and check it.

    Args:
        path: JSON lines (`.jsonl`), a JSON list (`.json`), either of them also with `.gz`, a `.parquet` file, or a folder
            that `Dataset.save_to_disk` wrote.

    Returns:
        Its rows.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or of an unknown kind (file and line), or a row can't be trained on (file and
            row).

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from pref_opt.data import read_preferences
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "pairs.jsonl"
        ...     _ = path.write_text('{"prompt": "1+1=", "chosen": "2", "rejected": "3"}')
        ...     read_preferences(path)["chosen"][0]
        '2'
    """
    import datasets
    import pyarrow as pa  # type: ignore[import-untyped]

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        if path.is_dir():
            dataset = datasets.load_from_disk(str(path))
        elif path.suffix == ".parquet":
            dataset = datasets.Dataset.from_parquet(str(path), keep_in_memory=True)
        else:
            dataset = _from_rows([row for _, row in _read_rows(path)])
    except (OSError, pa.ArrowInvalid, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{path} is not a preference set: {error}") from None
    try:
        check_preferences(dataset)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return dataset


def write_preferences(dataset: Dataset | Iterable[Mapping[str, Any]], path: str | Path) -> None:
    r"""Write rows as JSON lines, all of them or none.

    Args:
        dataset: Rows of JSON values.
        path: File to write; the folders above it are made.

    Raises:
        ValueError: If a value is no JSON value, such as NaN.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from pref_opt.data import write_preferences
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_preferences([{"prompt": "1+1=", "chosen": "2"}], Path(folder) / "rows.jsonl")
        ...     (Path(folder) / "rows.jsonl").read_text()
        '{"prompt": "1+1=", "chosen": "2"}\n'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            for index, row in enumerate(dataset):
                try:
                    file.write(json.dumps(dict(row), ensure_ascii=False, allow_nan=False) + "\n")
                except (TypeError, ValueError) as error:
                    raise ValueError(f"row {index} can't be written as JSON: {error}") from None
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _check_row(where: str, row: Mapping[str, Any]) -> tuple[str, int]:
    """Return the form of a row and its number of rejected completions."""
    missing = [name for name in _COLUMNS if row.get(name) is None]
    if missing:
        raise ValueError(f"{where}: no column {', '.join(missing)}; got {', '.join(sorted(row))}")
    prompt, chosen, rejected = (row[name] for name in _COLUMNS)
    several = _is_several(rejected)
    form = "texts" if isinstance(prompt, str) else "conversations"
    completions = rejected if several else [rejected]
    for name, value in (("prompt", prompt), ("chosen", chosen), *(("rejected", entry) for entry in completions)):
        if (form == "texts") != isinstance(value, str) or not (isinstance(value, str) or _is_messages(value)):
            raise ValueError(f"{where}: {name} must be {_wanted(form)}, as prompt is, got {value!r}")
        if name != "prompt" and not _last_text(value).strip():
            raise ValueError(f"{where}: {name} is empty")
    if not completions:
        raise ValueError(f"{where}: rejected is empty")
    if chosen in completions:
        raise ValueError(f"{where}: chosen and rejected are identical: {_last_text(chosen)[:80]!r}")
    return (f"lists of {form}" if several else form), len(completions)


def _wanted(form: str) -> str:
    return "text" if form == "texts" else "a list of messages with role and content"


def _is_list_of(value: Any, kind: type) -> bool:
    return (
        isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(entry, kind) for entry in value)
    )


def _is_several(rejected: Any) -> bool:
    """Return whether these are several completions: a list of texts, or of lists of messages."""
    return _is_list_of(rejected, str) or _is_list_of(rejected, list)


def _is_messages(value: Any) -> bool:
    return bool(value) and _is_list_of(value, Mapping) and all({"role", "content"} <= entry.keys() for entry in value)


def _last_text(value: Any) -> str:
    return value if isinstance(value, str) else str(value[-1]["content"] or "")


def _from_rows(rows: list[dict[str, Any]]) -> Dataset:
    import datasets
    import pyarrow as pa

    try:
        return datasets.Dataset.from_list(rows)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"columns hold values of different kinds: {error}") from None


def _read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a JSON-lines file with their lines, or those of a JSON list with their positions (from 1)."""
    text = _read_text(path)
    name = path.name.removesuffix(".gz")
    if name.endswith(".jsonl"):
        numbered: Iterable[tuple[int, Any]] = _json_lines(path, text)
    elif name.endswith(".json"):
        numbered = enumerate(_json_list(path, text), 1)
    else:
        raise ValueError(f"{path}: expected .jsonl, .json (also with .gz), .parquet or a folder")
    for number, row in numbered:
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
        yield number, row


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return raw.decode("utf-8")
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    # Not splitlines: JSON strings may hold other line separators than \n.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not valid JSON: {error}") from None


def _json_list(path: Path, text: str) -> list[Any]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a JSON list of objects, got {type(rows).__name__}")
    return rows


def _texts(where: str, row: Mapping[str, Any], *names: str) -> list[str]:
    """Return text fields of a row; ValueError says where one is missing or no text."""
    for name in names:
        if not isinstance(row.get(name), str):
            raise ValueError(f"{where}: {name} must be a text, got {row.get(name)!r}")
    return [row[name] for name in names]


# --- converters ------------------------------------------------------------------------------------------------------

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")


def hh_preferences(path: str | Path, *, conversational: bool = False) -> Converted:
    r"""Convert dialogues of the HH form: two dialogues that differ in the assistant's last answer.

    The prompt is the text of `chosen` up to and with its last `Assistant:`. Rows whose `rejected` starts otherwise, has an
    empty answer or the same answer are left out and counted. Source: the original program for direct preference
    optimisation, by way of the programs of beta-DPO and Dr. DPO.

    Args:
        path: JSON lines with the texts `chosen` and `rejected`.
        conversational: Return conversations instead of texts.

    Returns:
        Pairs with `prompt`, `chosen`, `rejected`, and what was left out.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, a row isn't of that form (file and line), or nothing is left.

    Examples:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from pref_opt.data import hh_preferences
        >>> row = {name: f"\n\nHuman: 1+1?\n\nAssistant: {n}" for name, n in (("chosen", 2), ("rejected", 3))}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "hh.jsonl"
        ...     _ = path.write_text(json.dumps(row))
        ...     hh_preferences(path).dataset[0]
        {'prompt': '\n\nHuman: 1+1?\n\nAssistant:', 'chosen': ' 2', 'rejected': ' 3'}
    """
    path = Path(path)
    rows: list[dict[str, Any]] = []
    dropped = Counter[str]()
    for number, row in _read_rows(path):
        chosen, rejected = _texts(f"{path}:{number}", row, "chosen", "rejected")
        end = chosen.rfind(_ASSISTANT) + len(_ASSISTANT)
        if end < len(_ASSISTANT):
            raise ValueError(f"{path}:{number}: chosen has no {_ASSISTANT.strip()!r}")
        prompt, answers = chosen[:end], (chosen[end:], rejected[end:])
        if not rejected.startswith(prompt):
            dropped["other prompt"] += 1
        elif not all(answer.strip() for answer in answers):
            dropped["empty answer"] += 1
        elif answers[0].strip() == answers[1].strip():
            dropped["equal answers"] += 1
        elif conversational:
            turns = _turns(f"{path}:{number}", prompt.removesuffix(_ASSISTANT))
            rows.append({"prompt": turns, "chosen": _said(answers[0]), "rejected": _said(answers[1])})
        else:
            rows.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]})
    if not rows:
        raise ValueError(f"{path}: no pairs; left out: {dict(dropped)}")
    return Converted(_from_rows(rows), dict(dropped))


def gsm8k_preferences(
    path: str | Path,
    *,
    flip_rate: float = 0.0,
    solutions: bool = True,
    conversational: bool = False,
    seed: int = 0,
) -> Dataset:
    r"""Make pairs from grade-school problems: the right final answer against a wrong one.

    Wrong answers are near the right one, a tenth, ten times or twice of it, or have two digits exchanged. With `solutions`
    both completions show the right calculation, so that the pair is decided by whether the last line agrees with it. Then
    `round(flip_rate * N)` rows, drawn at random, have chosen and rejected exchanged.

    Source: K. Cobbe et al., *Training Verifiers to Solve Math Word Problems*, arXiv:2110.14168, for the problems.

    Args:
        path: JSON lines with `question` and `answer`, which ends with a line `#### 72`.
        flip_rate: Share of exchanged rows in [0, 1].
        solutions: Keep the calculation (without its annotations `<<...>>`); otherwise completions are the numbers alone.
        conversational: Return conversations instead of texts.
        seed: Seed of the wrong answers and of the exchanged rows; the wrong answers don't depend on `flip_rate`.

    Returns:
        Pairs with `prompt`, `chosen`, `rejected` and `flipped`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, a row isn't of that form (file and line), or `flip_rate` is outside [0, 1].

    Examples:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from pref_opt.data import gsm8k_preferences
        >>> row = {"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "train.jsonl"
        ...     _ = path.write_text(json.dumps(row))
        ...     gsm8k_preferences(path, flip_rate=1.0)[0]["rejected"]
        '1+1=2\n#### 2'
    """
    path = Path(path)
    check_fraction("flip_rate", flip_rate)
    wrong = np.random.default_rng([seed, 0])
    rows = []
    for number, row in _read_rows(path):
        question, answer = _texts(f"{path}:{number}", row, "question", "answer")
        found = _FINAL.search(answer)
        if found is None:
            raise ValueError(f"{path}:{number}: answer must end with a line '#### NUMBER', got {answer[-40:]!r}")
        before = re.sub("<<[^>]*>>", "", answer[: found.start(1)]) if solutions else ""
        pair = [before + found[1], before + _corrupted(found[1], wrong)]
        prompt: Any = question + "\n"
        if conversational:
            prompt, pair = [{"role": "user", "content": question}], [_said(text) for text in pair]  # type: ignore[misc]
        rows.append({"prompt": prompt, "chosen": pair[0], "rejected": pair[1]})
    if not rows:
        raise ValueError(f"{path}: no rows")
    return flip_pairs(_from_rows(rows), rate=flip_rate, seed=seed)


def lastfm_lists(
    path: str | Path,
    *,
    num_negatives: int | None = None,
    show_candidates: bool = True,
    max_history: int = 10,
    conversational: bool = False,
    seed: int = 0,
) -> Dataset:
    r"""Convert LastFM candidate lists to rows with one chosen and K rejected artists.

    The names also get numbers, their places in the sorted list of all names of the file: those of the history in the prompt
    (then -1), of the chosen artist and of the rejected ones. `pref_opt.napo.annotate_dataset` and
    the losses that know items read them.

    Source: the data of Y. Chen et al., *On Softmax Direct Preference Optimization for Recommendation*, NeurIPS 2024,
    arXiv:2406.09215; the wording of the prompt is this library's own.

    Args:
        path: JSON list of objects with `historyList` (names joined by `::`, oldest first), `itemList` (candidates) and
            `trueSelection` (one of them).
        num_negatives: K, drawn without repetition; None takes all other candidates (19).
        show_candidates: List the candidates in the prompt.
        max_history: Most artists of the history in the prompt, the latest ones, >= 1.
        conversational: Return conversations instead of texts.
        seed: Seed of the drawing.

    Returns:
        Rows with `prompt`, `chosen`, `rejected` (a list of K), `ids` (position in the file), `history_items`
        (`max_history` numbers), `chosen_items` and `rejected_items`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, a row isn't of that form or has too few candidates (file and row), or a number
            is out of range.

    Examples:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from pref_opt.data import lastfm_lists
        >>> row = {"historyList": "Boris::Fennesz", "itemList": ["Hope", "Angra", "Wax"], "trueSelection": "Angra"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "lastfm.json"
        ...     _ = path.write_text(json.dumps([row]))
        ...     rows = lastfm_lists(path, max_history=3)
        >>> rows[0]["rejected"], rows[0]["rejected_items"], rows[0]["history_items"]
        (['Hope', 'Wax'], [3, 4], [1, 2, -1])
    """
    path = Path(path)
    check_count("max_history", max_history)
    if num_negatives is not None:
        check_count("num_negatives", num_negatives)
    random = np.random.default_rng(seed)
    lists = [(number, *_candidates(f"{path}:{number}", row)) for number, row in _read_rows(path)]
    if not lists:
        raise ValueError(f"{path}: no rows")
    places = {name: i for i, name in enumerate(sorted({name for _, *names, _ in lists for name in chain(*names)}))}
    rows = []
    for number, history, items, target in lists:
        others = [item for item in items if item != target]
        if num_negatives is not None and num_negatives > len(others):
            raise ValueError(f"{path}:{number}: num_negatives={num_negatives}, but only {len(others)} other candidates")
        if num_negatives is not None:
            others = [others[i] for i in sorted(random.permutation(len(others))[:num_negatives])]
        history = history[-max_history:]
        prompt = _listening_prompt(history, items if show_candidates else [])
        form = _chat_row if conversational else _text_row
        numbers = {
            "ids": number - 1,
            "history_items": [places[name] for name in history] + [-1] * (max_history - len(history)),
            "chosen_items": places[target],
            "rejected_items": [places[name] for name in others],
        }
        rows.append(form(prompt, target, others) | numbers)
    return _from_rows(rows)


def lastfm_pairs(
    path: str | Path,
    *,
    show_candidates: bool = True,
    max_history: int = 10,
    conversational: bool = False,
    seed: int = 0,
) -> Dataset:
    """Convert LastFM candidate lists to pairs, with one of the other candidates drawn as rejected.

    Source: as of `lastfm_lists`.

    Args:
        path: As in `lastfm_lists`.
        show_candidates: List the candidates in the prompt.
        max_history: Most artists of the history in the prompt, the latest ones, >= 1.
        conversational: Return conversations instead of texts.
        seed: Seed of the drawing.

    Returns:
        Pairs with `prompt`, `chosen`, `rejected` and `ids` (position in the file).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: For the reasons that `lastfm_lists` gives.

    Examples:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from pref_opt.data import lastfm_pairs
        >>> row = {"historyList": "Boris::Fennesz", "itemList": ["Hope", "Angra"], "trueSelection": "Angra"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "lastfm.json"
        ...     _ = path.write_text(json.dumps([row]))
        ...     lastfm_pairs(path)[0]["rejected"]
        'Hope'
    """
    lists = lastfm_lists(
        path,
        num_negatives=1,
        show_candidates=show_candidates,
        max_history=max_history,
        conversational=conversational,
        seed=seed,
    )
    pairs = lists.select_columns(["prompt", "chosen", "rejected", "ids"])
    return _from_rows([{**row, "rejected": row["rejected"][0]} for row in pairs])


def _text_row(prompt: str, chosen: str, rejected: list[str]) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _chat_row(prompt: str, chosen: str, rejected: list[str]) -> dict[str, Any]:
    asked = [{"role": "user", "content": prompt.strip()}]
    return {"prompt": asked, "chosen": _said(chosen), "rejected": [_said(text) for text in rejected]}


def _turns(where: str, dialogue: str) -> list[dict[str, str]]:
    parts = _TURN.split(dialogue)
    if parts[0].strip() or len(parts) < 3:
        raise ValueError(f"{where}: a dialogue must start with {_HUMAN.strip()!r}, got {dialogue[:40]!r}")
    return [
        {"role": "user" if who == "Human" else "assistant", "content": said.strip()}
        for who, said in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text.strip()}]


_FINAL = re.compile(r"####\s*(-?[\d,]*\d)\s*\Z")


def _corrupted(number: str, random: np.random.Generator) -> str:
    """Return another number, in the same notation, with the same sign."""
    value = abs(int(number.replace(",", "")))
    least = 1 if number.startswith("-") else 0
    near = [value + step for step in range(-9, 10) if step and value + step >= least]
    scaled = [other for other in (10 * value, 2 * value, value // 10 if value % 10 == 0 else value) if other != value]
    groups = [group for group in (near, scaled, _exchanged(str(value))) if group]
    group = groups[random.integers(len(groups))]
    wrong = group[random.integers(len(group))]
    return ("-" if number.startswith("-") else "") + (f"{wrong:,}" if "," in number else str(wrong))


def _exchanged(digits: str) -> list[int]:
    """Return the numbers that two different neighbouring digits make when exchanged, without a leading zero."""
    pairs = [
        digits[:i] + digits[i + 1] + digits[i] + digits[i + 2 :]
        for i in range(len(digits) - 1)
        if digits[i] != digits[i + 1]
    ]
    return [int(text) for text in pairs if not text.startswith("0")]


def _candidates(where: str, row: Mapping[str, Any]) -> tuple[list[str], list[str], str]:
    history, target = _texts(where, row, "historyList", "trueSelection")
    items = row.get("itemList")
    if not isinstance(items, list) or not _is_list_of(items, str):
        raise ValueError(f"{where}: itemList must be a list of texts, got {items!r}")
    if len(items) < 2 or len(set(items)) < len(items) or not all(item.strip() for item in items):
        raise ValueError(f"{where}: itemList must have at least 2 different names, none empty, got {items!r}")
    if target not in items:
        raise ValueError(f"{where}: trueSelection {target!r} is not in itemList")
    return history.split("::"), items, target


def _listening_prompt(history: list[str], candidates: list[str]) -> str:
    lines = ["A listener has played these artists, the latest last:", *history]
    if candidates:
        return "\n".join([*lines, "Which of these comes next?", *candidates, "Next:"]) + "\n"
    return "\n".join([*lines, "Next:"]) + "\n"


# --- splitting and cutting -------------------------------------------------------------------------------------------


def flip_pairs(dataset: Dataset, *, rate: float, seed: int = 0) -> Dataset:
    r"""Exchange chosen and rejected of some pairs, for studies of label noise.

    $$\text{round}(\text{rate}\cdot N)$$

    rows, drawn without repetition, so that the share of wrong labels is known exactly;
    `pref_opt.dr_dpo.flip_preferences` flips each pair independently.

    Args:
        dataset: Pairs.
        rate: Share in [0, 1].
        seed: Seed of the drawing.

    Returns:
        The rows in the same order, with a column `flipped`.

    Raises:
        ValueError: If `rate` is outside [0, 1], or `rejected` is a list of completions.

    Examples:
        >>> from datasets import Dataset
        >>> from pref_opt.data import flip_pairs
        >>> pairs = Dataset.from_dict({"prompt": ["1+1="], "chosen": ["2"], "rejected": ["3"]})
        >>> flip_pairs(pairs, rate=1.0)[0]
        {'prompt': '1+1=', 'chosen': '3', 'rejected': '2', 'flipped': True}
    """
    check_fraction("rate", rate)
    rows = dataset.to_list()
    if rows and _is_several(rows[0]["rejected"]):
        raise ValueError("dataset must hold pairs, but rejected is a list of completions")
    chosen = np.random.default_rng([seed, 1]).permutation(len(rows))[: round(rate * len(rows))]
    for row in rows:
        row["flipped"] = False
    for index in chosen:
        row = rows[index]
        row |= {"chosen": row["rejected"], "rejected": row["chosen"], "flipped": True}
    return _from_rows(rows)


def split_rows(
    dataset: Dataset, *, fraction: float = 0.1, seed: int = 0, group_by: str | None = None
) -> tuple[Dataset, Dataset]:
    """Split a preference set at random into a part for training and a held-out part.

    Args:
        dataset: Rows.
        fraction: Share of the held-out rows in (0, 1); at least one row goes to either part.
        seed: Seed of the split.
        group_by: Column whose equal values stay together, such as `prompt` where prompts repeat; the held-out part then
            has the fraction only nearly.

    Returns:
        The two parts, their rows in the order of the set.

    Raises:
        ValueError: If `fraction` is outside (0, 1), there is no such column, or there are fewer than two rows or groups.

    Examples:
        >>> from datasets import Dataset
        >>> from pref_opt.data import split_rows
        >>> train, held_out = split_rows(Dataset.from_dict({"prompt": list("abcdefghij")}), fraction=0.2, seed=1)
        >>> len(train), len(held_out)
        (8, 2)
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be in (0, 1), got {fraction!r}")
    if group_by is not None and group_by not in dataset.column_names:
        raise ValueError(f"group_by must be one of the columns {', '.join(dataset.column_names)}, got {group_by!r}")
    keys = range(len(dataset)) if group_by is None else [json.dumps(value) for value in dataset[group_by]]
    groups: dict[Any, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    if len(groups) < 2:
        what = "rows" if group_by is None else f"different values of {group_by}"
        raise ValueError(f"dataset must have at least 2 {what}, got {len(groups)}")
    wanted = min(max(1, round(fraction * len(dataset))), len(dataset) - 1)
    parts = list(groups.values())
    held: list[int] = []
    for position in np.random.default_rng(seed).permutation(len(parts))[:-1]:
        if len(held) >= wanted:
            break
        held += parts[position]
    train = sorted(set(range(len(dataset))) - set(held))
    return dataset.select(train), dataset.select(sorted(held))


def truncate_prompts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int = 1800,
    max_length: int | None = 2048,
) -> Truncated:
    r"""Cut long prompts from the left, as the programs of these papers do and TRL 1.16 doesn't.

    A prompt that doesn't fit into `max_length` together with its longest completion is cut to its last `max_prompt_length`
    tokens. Of conversations the oldest turns go first (a system message stays), then the beginning of the last message. The
    completions stay as they are; the trainer cuts their end at its `max_length`.

    Source: the program of SimPO, on which those of alpha-DPO, gamma-PO, RePO and alignment potential are built.

    Args:
        dataset: Preference set, texts or conversations, with one or several rejected completions.
        tokenizer: A fast tokenizer.
        max_prompt_length: Tokens of a prompt that is cut, >= 1, with all that the chat template adds.
        max_length: Tokens of prompt and completion; None cuts every prompt longer than `max_prompt_length`.

    Returns:
        The set in the same order, and how many prompts were cut.

    Raises:
        ValueError: If the tokenizer isn't a fast one, `max_length` <= `max_prompt_length`, or a row can't be cut so far
            (the message names it).

    Examples:
        >>> from datasets import Dataset
        >>> from pref_opt.data import truncate_prompts
        >>> from pref_opt.tiny import tiny_tokenizer
        >>> data = Dataset.from_list([{"prompt": "abcdef", "chosen": "1", "rejected": "2"}])
        >>> result = truncate_prompts(data, tiny_tokenizer(), max_prompt_length=3, max_length=4)
        >>> result.dataset[0]["prompt"], result.cut
        ('def', 1)
    """
    check_count("max_prompt_length", max_prompt_length)
    if max_length is not None and max_length <= max_prompt_length:
        raise ValueError(f"max_length must be above max_prompt_length={max_prompt_length}, got {max_length}")
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer must be a fast one, which knows where tokens start, got {type(tokenizer).__name__}"
        )
    prompts, cut = [], 0
    for index, row in enumerate(dataset):
        prompt = row["prompt"]
        size = _size(tokenizer, prompt, generation=True)
        if size > max_prompt_length and (max_length is None or _longest(tokenizer, row) > max_length):
            try:
                prompt = _cut(tokenizer, prompt, max_prompt_length)
            except ValueError as error:
                raise ValueError(f"row {index}: {error}") from None
            cut += 1
        prompts.append(prompt)
    if not cut:
        return Truncated(dataset, 0)
    others = dataset.remove_columns("prompt")
    return Truncated(others.add_column("prompt", prompts).select_columns(dataset.column_names), cut)


def _longest(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> int:
    """Return the tokens of a prompt with its longest completion; texts get an end-of-sequence token."""
    prompt, rejected = row["prompt"], row["rejected"]
    completions = [row["chosen"], *(rejected if _is_several(rejected) else [rejected])]
    extra = 1 if isinstance(prompt, str) else 0
    return max(_size(tokenizer, prompt + completion) for completion in completions) + extra


def _size(tokenizer: PreTrainedTokenizerBase, text: Any, *, generation: bool = False) -> int:
    if isinstance(text, str):
        return len(tokenizer(text)["input_ids"])
    encoded: Any = tokenizer.apply_chat_template(
        text, add_generation_prompt=generation, tokenize=True, return_dict=True
    )
    return len(encoded["input_ids"])


def _cut(tokenizer: PreTrainedTokenizerBase, prompt: Any, limit: int) -> Any:
    if isinstance(prompt, str):
        return _cut_text(tokenizer, prompt, lambda text: _size(tokenizer, text) - limit)
    system = prompt[:1] if prompt[0]["role"] == "system" else []
    rest = prompt[len(system) :]

    def excess(messages: Any) -> int:
        return _size(tokenizer, messages, generation=True) - limit

    while len(rest) > 1 and excess(system + rest) > 0:
        later = next((i for i in range(1, len(rest)) if rest[i]["role"] == "user"), len(rest) - 1)
        rest = rest[later:]
    last = rest[-1]
    text = _cut_text(tokenizer, last["content"], lambda text: excess([*system, *rest[:-1], {**last, "content": text}]))
    return [*system, *rest[:-1], {**last, "content": text}]


def _cut_text(tokenizer: PreTrainedTokenizerBase, text: str, excess: Callable[[str], int]) -> str:
    """Return the end of a text from which nothing exceeds; cutting may change how the next tokens are joined."""
    while (over := excess(text)) > 0:
        starts = [
            start
            for start, _ in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        ]
        if over >= len(starts):
            raise ValueError("the prompt can't be cut to max_prompt_length: what surrounds its text is longer")
        # The tokens of one character start at the same place: at least one character has to go.
        text = text[max(1, starts[over]) :]
    return text
