"""What the commands of `ballast pref` share: models of transformers, a tiny model without a download, progress."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]

    from pref_opt.alignment_potential import RewardScorer

# A tiny model learns its tokens from the first rows; more of them would change few.
_TINY_ROWS = 2000


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

    def check(self) -> None:
        """Raise ValueError unless there's exactly one model."""
        one_model(self.model, tiny=self.tiny)

    def load(self, data: Dataset, seed: int) -> tuple[Any, Any]:
        """Return model and tokenizer.

        Raises:
            ValueError: If the model can't be loaded.
        """
        model, tokenizer = tiny_model(data, seed) if self.model is None else load_model(self.model, dtype=self.dtype)
        return model.to(self.device), tokenizer

    def other(self, name: str) -> Any:
        """Return a further model, such as a reference, in the same precision and place."""
        return load_model(name, dtype=self.dtype)[0].to(self.device)


NO_MODEL = ModelOptions()


def one_model(model: str | None, *, tiny: bool) -> None:
    """Raise ValueError unless there's either a model or `--tiny`."""
    if (model is None) != tiny:
        raise ValueError("give either --model FOLDER_OR_NAME or --tiny")


def prepare_libraries(*, quiet: bool) -> None:
    """Keep the host libraries from sending anything and from drawing bars of their own; to be called before they load."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if quiet or not Console(stderr=True).is_terminal:
        datasets.disable_progress_bars()


def load_model(name: str, **options: Any) -> tuple[Any, Any]:
    """Return a language model of transformers, with the adapter where it is one, and its tokenizer.

    Raises:
        ValueError: If there is none of that name, or it is damaged.
    """
    from transformers import AutoModelForCausalLM

    return load_pretrained(AutoModelForCausalLM, name, **options)


def load_pretrained(kind: Any, name: str, **options: Any) -> tuple[Any, Any]:
    """Return what an auto class of transformers makes of a folder or name, and its tokenizer.

    Raises:
        ValueError: If there is none of that name, or it is damaged.
    """
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    try:
        model = kind.from_pretrained(name, use_safetensors=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"model {name} can't be loaded: {str(error).strip().splitlines()[0]}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def tiny_model(data: Dataset, seed: int) -> tuple[Any, Any]:
    """Return a small random model, and a tokenizer that was trained on the texts of the data."""
    from pref_opt.tiny import tiny_causal_lm, tiny_tokenizer

    rows = data.select_columns(["prompt", "chosen", "rejected"]).select(range(min(len(data), _TINY_ROWS)))
    tokenizer = tiny_tokenizer((text for row in rows for text in _texts(row)), vocab_size=1024)
    return tiny_causal_lm(tokenizer, seed=seed), tokenizer


def load_reward(name: str, *, dtype: str, device: str, batch_size: int, max_length: int) -> RewardScorer:
    """Return what scores answers: a classifier with one output, or a language model by its log-probability per token.

    Raises:
        ValueError: If there is no model of that name, or the classifier has several outputs.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from pref_opt.scoring import classifier_reward, likelihood_reward

    try:
        kinds = AutoConfig.from_pretrained(name).architectures or []
    except (OSError, ValueError):
        kinds = []  # an adapter, or an error that loading the model explains
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        model, tokenizer = load_model(name, dtype=dtype)
        return likelihood_reward(model.to(device), tokenizer, batch_size=batch_size, max_length=max_length)
    model, tokenizer = load_pretrained(AutoModelForSequenceClassification, name, dtype=dtype)
    try:
        return classifier_reward(model.to(device), tokenizer, batch_size=batch_size, max_length=max_length)
    except ValueError as error:
        raise ValueError(f"--reward-model {name}: {error}") from None


def _texts(value: Any) -> list[str]:
    """Return the texts in a row, those of messages included."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else []
    return [text for part in parts for text in _texts(part)]


def number_of_negatives(rows: Dataset) -> int | None:
    """Return the number of rejected completions per row, None for pairs."""
    rejected = rows[0]["rejected"]
    several = isinstance(rejected, list) and not isinstance(rejected[0], Mapping)
    return len(rejected) if several else None


class CountProgress:
    """Progress on standard error: a bar with rate and time left, or plain lines when not a terminal."""

    def __init__(self, unit: str, total: int, *, quiet: bool) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._unit, self._total, self._quiet = unit, total, quiet
        self._start, self._first, self._said = time.perf_counter(), 0, 0.0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        left = (TextColumn("eta"), TimeRemainingColumn())
        self._bar = Progress(*columns, *left, console=self._console, disable=quiet or not self._console.is_terminal)
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

    def reach(self, done: int, text: str = "", *, line: bool = True) -> None:
        """Show that so many are done; plain lines, where asked for, come every two seconds at most, and at the end."""
        rate = (done - self._first) / max(time.perf_counter() - self._start, 1e-9)
        self._bar.update(self._task, completed=done, description=f"{self._unit} {rate:.1f}/s {text}")
        now = time.perf_counter()
        if not self._bar.disable or self._quiet or not line or (done < self._total and now - self._said < 2):
            return
        self._said = now
        left = (self._total - done) / rate if rate > 0 else 0.0
        shown = f"{self._unit} {done}/{self._total} {rate:.1f}/s eta={left:.0f}s {text}"
        self._console.print(shown.rstrip(), markup=False)
