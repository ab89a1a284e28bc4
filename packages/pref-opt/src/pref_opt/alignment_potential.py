r"""Alignment potential: which preference pairs to train on.

A reward model's margin (explicit) says how sure the label is, the policy's own margin (implicit) how much of it has been
learned. Pairs with a large explicit and a small implicit margin have most to teach. The score selects from a given set, or
from pairs that the model makes itself: generate, evolve the prompts, generate again, select.

$$
A_i=\frac{E_i-\overline E}{\text{std}(E)}-\lambda\,\frac{I_i-\overline I}{\text{std}(I)},\qquad
E_i=|r(x,y_w)-r(x,y_l)|,\qquad I_i=\Big|\tfrac{\log\pi(y_w|x)}{|y_w|}-\tfrac{\log\pi(y_l|x)}{|y_l|}\Big|
$$

Reference: K. Huang, J. Wu, Z. Chen, X. Wang, J. Gao, B. Ding, J. Wu, X. He, X. Wang, *Larger or Smaller Reward Margins to
Select Preferences for LLM Alignment?*, ICML 2025, arXiv:2503.01864. Its $\alpha$ is `implicit_weight` ($\lambda$) here.
Documentation: `docs/papers/pref-opt/alignment_potential.md`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
import torch

from pref_opt._checks import check_choice, check_count, check_fraction, check_not_negative, check_positive
from pref_opt.chunked import sequence_logps_chunked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from datasets import Dataset  # type: ignore[import-untyped]
    from numpy.typing import ArrayLike
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "DEFAULT_STRATEGIES",
    "CompletionLogps",
    "Generator",
    "Message",
    "PairChoice",
    "Prompt",
    "RewardScorer",
    "TransformersGenerator",
    "alignment_potential",
    "best_worst_pair",
    "build_self_play_pairs",
    "completion_logps",
    "evolve_and_select",
    "evolve_prompts",
    "score_preferences",
    "select_top",
]

_LOG = logging.getLogger(__name__)

Metric = Literal["alignment_potential", "explicit", "implicit", "random"]
Normalize = Literal["zscore", "none"]
Message = Mapping[str, str]
Prompt = str | Sequence[Message]

_METRICS = ("alignment_potential", "explicit", "implicit", "random")
_NORMALIZATIONS = ("zscore", "none")
_IGNORED = -100
# Rows that are sorted by length together, per row of a batch.
_WINDOW = 32

DEFAULT_STRATEGIES: Mapping[str, str] = {
    "breadth": (
        "Below is a task that someone gave to an assistant. Invent one different task from the same field. It should be "
        "about as long and as hard as the original and bring along whatever input it needs.\n\n"
        "Original task:\n{prompt}\n\nAnswer with the text of the new task alone."
    ),
    "deepen": (
        "Below is a task that someone gave to an assistant. Rewrite it so that a good answer has to look further and go "
        "deeper into the question. Keep any input it contains, make sure it can be understood on its own, and let it "
        "grow by no more than 10 to 20 words.\n\nTask:\n{prompt}\n\nAnswer with the rewritten task alone."
    ),
    "constrain": (
        "Below is a task that someone gave to an assistant. Rewrite it with exactly one further requirement that a good "
        "answer must meet. Keep any input it contains, make sure it can be understood on its own, and let it grow by no "
        "more than 10 to 20 words.\n\nTask:\n{prompt}\n\nAnswer with the rewritten task alone."
    ),
    "concretize": (
        "Below is a task that someone gave to an assistant. Rewrite it so that general notions in it become specific "
        "ones. Keep any input it contains, make sure it can be understood on its own, and let it grow by no more than 10 "
        "to 20 words.\n\nTask:\n{prompt}\n\nAnswer with the rewritten task alone."
    ),
    "reason": (
        "Below is a task that someone gave to an assistant. Rewrite it so that it asks outright for an answer reached in "
        "several steps of reasoning. Keep any input it contains, make sure it can be understood on its own, and let it "
        "grow by no more than 10 to 20 words.\n\nTask:\n{prompt}\n\nAnswer with the rewritten task alone."
    ),
}
"""Instructions by which the model rewrites a prompt; `{prompt}` stands for it."""


class PairChoice(NamedTuple):
    """Which of several answers to a prompt make a pair.

    Attributes:
        chosen_index: Answer with the highest reward; the first of several.
        rejected_index: Answer with the lowest reward; the first of several.
        explicit_margin: Difference of their rewards, > 0.
        implicit_margin: Difference of their average log-probabilities, nats per token, of either sign.
    """

    chosen_index: int
    rejected_index: int
    explicit_margin: float
    implicit_margin: float


class CompletionLogps(NamedTuple):
    """Log-probabilities of completions, one vector per prompt.

    Attributes:
        sums: Sums over completion tokens, nats, float64.
        lengths: Number of completion tokens that were counted, int64.
    """

    sums: list[Tensor]
    lengths: list[Tensor]


class RewardScorer(Protocol):
    """A reward model, or a rule: one number per prompt and response, larger for better."""

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
        """Return rewards [N] of `responses[i]` to `prompts[i]`."""


class Generator(Protocol):
    """A function that samples answers with their average log-probability under the untempered model."""

    def __call__(
        self, prompts: Sequence[Prompt], n: int, temperature: float, top_p: float, max_tokens: int, seed: int
    ) -> list[list[tuple[str, float]]]:
        """Return, for each prompt, `n` pairs of a text and its average log-probability in nats per token."""


# --- the score -------------------------------------------------------------------------------------------------------


def alignment_potential(
    explicit_margin: ArrayLike | Tensor,
    implicit_margin: ArrayLike | Tensor,
    *,
    implicit_weight: float = 1.0,
    normalize: Normalize = "zscore",
    signed: bool = False,
) -> Tensor:
    r"""Return the alignment potential of each pair of a candidate set.

    $$A_i=z(E)_i-\lambda\,z(I)_i,\qquad z(v)=\frac{v-\overline v}{\text{std}(v)}$$

    with the population's standard deviation (`"zscore"`), or $A_i=E_i-\lambda I_i$ (`"none"`). Source: Huang et al. 2025,
    eq. 11 and appendix D.1; the authors' code. Standardised scores depend on the whole set: those of different sets aren't
    comparable. A margin that is constant over the set counts as 0 after standardising, where the authors' code gives NaN.

    Args:
        explicit_margin: Reward of chosen minus rejected [N].
        implicit_margin: Average log-probability of chosen minus rejected [N], nats per token.
        implicit_weight: $\lambda\ge0$; 0 ranks by the explicit margin alone. Published: 1 and 2.5 for given sets, 2.5 and
            5 for self-made pairs.
        normalize: `"zscore"`, or `"none"` for margins that are on one scale already.
        signed: Leave the signs of the margins, so that pairs which the model ranks wrongly score high ($M_+$, eq. 10);
            by default both margins are absolute values.

    Returns:
        Scores [N], float64, larger for pairs with more to teach.

    Raises:
        ValueError: If the margins differ in length, are empty, not vectors, or not finite (the message names the first bad
            index), `implicit_weight` is negative, or `normalize` is unknown.

    Examples:
        >>> from pref_opt.alignment_potential import alignment_potential
        >>> alignment_potential([3.0, 3.0, 1.0], [0.0, 2.0, -1.0], normalize="none")
        tensor([3., 1., 0.], dtype=torch.float64)
    """
    explicit, implicit = _margins(explicit_margin, implicit_margin)
    check_not_negative("implicit_weight", implicit_weight)
    check_choice("normalize", normalize, _NORMALIZATIONS)
    if not signed:
        explicit, implicit = explicit.abs(), implicit.abs()
    if normalize == "zscore":
        explicit, implicit = _standardize(explicit), _standardize(implicit)
    return explicit - implicit_weight * implicit


def select_top(
    explicit_margin: ArrayLike | Tensor,
    implicit_margin: ArrayLike | Tensor,
    *,
    metric: Metric = "alignment_potential",
    implicit_weight: float = 1.0,
    normalize: Normalize = "zscore",
    select_ratio: float = 0.4,
    signed: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return the indices of the pairs that a metric puts first.

    $$\text{top}_k(s),\qquad k=\lfloor\text{ratio}\cdot N\rfloor$$

    with $s=A$, $|E|$, $-|I|$ or a random order. Source: Huang et al. 2025, sections 4 and 5. Their slice `[-0:]` returns all
    pairs at $k=0$; here none.

    Args:
        explicit_margin: Reward of chosen minus rejected [N].
        implicit_margin: Average log-probability of chosen minus rejected [N].
        metric: `"alignment_potential"`, `"explicit"` (large margins first), `"implicit"` (small margins first) or
            `"random"`.
        implicit_weight: $\lambda\ge0$, for the alignment potential.
        normalize: `"zscore"` or `"none"`, for the alignment potential.
        select_ratio: Share of the pairs in [0, 1].
        signed: Use the margins with their signs.
        generator: CPU generator of the random order; by default a new one with seed 0. The other metrics ignore it.

    Returns:
        Indices [k], int64, best first; equal scores in the order of the set.

    Raises:
        ValueError: For the reasons that `alignment_potential` gives, if `metric` is unknown, or `select_ratio` is outside
            [0, 1].

    Examples:
        >>> from pref_opt.alignment_potential import select_top
        >>> select_top([0.9, 0.1, 0.8, 0.2], [0.5, 0.5, 0.1, 0.1], select_ratio=0.5)
        tensor([2, 3])
    """
    check_choice("metric", metric, _METRICS)
    check_fraction("select_ratio", select_ratio)
    score = alignment_potential(
        explicit_margin, implicit_margin, implicit_weight=implicit_weight, normalize=normalize, signed=signed
    )
    if metric in ("explicit", "implicit"):
        explicit, implicit = _margins(explicit_margin, implicit_margin)
        margin = explicit if metric == "explicit" else implicit
        margin = margin if signed else margin.abs()
        score = margin if metric == "explicit" else -margin
    count = math.floor(select_ratio * len(score))
    if metric == "random":
        return torch.randperm(len(score), generator=generator or torch.Generator().manual_seed(0))[:count]
    return score.argsort(descending=True, stable=True)[:count]


def best_worst_pair(rewards: ArrayLike | Tensor, avg_logps: ArrayLike | Tensor) -> PairChoice:
    r"""Choose the answers with the highest and the lowest reward as a pair.

    $$w=\arg\max_kr_k,\quad l=\arg\min_kr_k,\quad E=r_w-r_l,\quad I=\bar\ell_w-\bar\ell_l$$

    Source: the authors' code for self-made pairs.

    Args:
        rewards: Rewards [K] of the answers to one prompt, K >= 2.
        avg_logps: Average log-probabilities [K] of the answers, nats per token.

    Returns:
        The two indices and the two margins.

    Raises:
        ValueError: If there are fewer than two answers, the lengths differ, a value isn't finite, or all rewards are equal.

    Examples:
        >>> from pref_opt.alignment_potential import best_worst_pair
        >>> best_worst_pair([0.2, 0.9, 0.1], [-1.0, -1.5, -1.0])[:2]
        (1, 2)
    """
    values, logps = _vector("rewards", rewards), _vector("avg_logps", avg_logps)
    if len(values) != len(logps):
        raise ValueError(f"rewards and avg_logps must have the same length, got {len(values)} and {len(logps)}")
    if len(values) < 2:
        raise ValueError(f"rewards must have at least 2 answers, got {len(values)}")
    array = values.numpy()
    best, worst = int(array.argmax()), int(array.argmin())
    if array[best] == array[worst]:
        raise ValueError(f"rewards must differ between answers, got {array[best]} for all {len(array)}")
    return PairChoice(best, worst, float(values[best] - values[worst]), float(logps[best] - logps[worst]))


def _margins(explicit_margin: ArrayLike | Tensor, implicit_margin: ArrayLike | Tensor) -> tuple[Tensor, Tensor]:
    explicit, implicit = _vector("explicit_margin", explicit_margin), _vector("implicit_margin", implicit_margin)
    if len(explicit) != len(implicit):
        raise ValueError(
            f"explicit_margin and implicit_margin must have the same length, got {len(explicit)} and {len(implicit)}"
        )
    return explicit, implicit


def _vector(name: str, values: ArrayLike | Tensor) -> Tensor:
    """Return a finite vector in float64 on the CPU."""
    if isinstance(values, torch.Tensor):
        vector = values.detach().to("cpu", torch.float64)
    else:
        vector = torch.from_numpy(np.array(values, dtype=np.float64))
    if vector.ndim != 1:
        raise ValueError(f"{name} must be a vector [N], got shape {tuple(vector.shape)}")
    if len(vector) == 0:
        raise ValueError(f"{name} is empty; at least one pair is needed")
    bad = (~vector.isfinite()).nonzero()
    if len(bad):
        index = int(bad[0, 0])
        raise ValueError(f"{name} must be finite, got {vector[index].item()} at index {index}")
    return vector


def _standardize(values: Tensor) -> Tensor:
    """Return z-scores with the population's standard deviation; zeros where all values are equal."""
    # Rounding would give a constant column a tiny spread, and sums of values near the largest double would overflow.
    if values.max() == values.min():
        return torch.zeros_like(values)
    values = values / values.abs().max()
    centred = values - values.mean()
    return centred / centred.square().mean().sqrt()


# --- log-probabilities of a preference set ---------------------------------------------------------------------------


class _Encoded(NamedTuple):
    ids: list[int]
    prompt_length: int


def completion_logps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Prompt]],
    *,
    batch_size: int = 8,
    max_length: int | None = 2048,
    device: str | torch.device | None = None,
) -> CompletionLogps:
    r"""Return log-probabilities of completions, tokenised as TRL tokenises preference data.

    $$\log\pi(y|x)=\sum_t\log\pi(y_t|x,y_{<t})$$

    The end-of-sequence token counts, prompt and padding don't. Sequences are sorted by length, and the logits exist one
    tile at a time (`pref_opt.chunked`).

    Args:
        model: Causal language model of transformers, with or without adapters.
        tokenizer: Its tokenizer; conversations need a chat template.
        prompts: Texts, or conversations as lists of messages.
        completions: For each prompt its completions, in the form of the prompt.
        batch_size: Sequences per forward pass, >= 1.
        max_length: Tokens of prompt and completion; the end of longer sequences is cut. None cuts nothing.
        device: Where to compute; the model is moved there. None leaves it where it is.

    Returns:
        Sums and numbers of tokens; a completion of which nothing is left within `max_length` has sum 0 and length 0.

    Raises:
        ValueError: If the numbers of prompts and completions differ, or a prompt or completion isn't text or messages.

    Examples:
        >>> from pref_opt.alignment_potential import completion_logps
        >>> from pref_opt.tiny import tiny_causal_lm, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer()
        >>> result = completion_logps(tiny_causal_lm(tokenizer), tokenizer, ["1+1="], [["2", "11"]])
        >>> result.lengths[0]
        tensor([2, 3])
    """
    check_count("batch_size", batch_size)
    if len(prompts) != len(completions):
        raise ValueError(f"prompts and completions must be equally many, got {len(prompts)} and {len(completions)}")
    rows = [_encode(tokenizer, prompt, texts, max_length) for prompt, texts in zip(prompts, completions, strict=True)]
    sums, lengths = _sequence_sums(model, tokenizer, list(itertools.chain(*rows)), batch_size, device)
    sizes = [len(row) for row in rows]
    return CompletionLogps(list(torch.split(sums, sizes)), list(torch.split(lengths, sizes)))


def score_preferences(
    model: PreTrainedModel,
    dataset: Dataset | Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 8,
    max_length: int = 2048,
    device: str | torch.device | None = None,
    reward: RewardScorer | None = None,
    output: Path | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Dataset:
    r"""Add both margins to a preference set, with the model that is to be trained on it.

    $$I_i=\frac{\log\pi(y_w|x)}{|y_w|}-\frac{\log\pi(y_l|x)}{|y_l|}$$

    Source: Huang et al. 2025, section 3.2 and appendix D.1; the columns are those of the authors' files. Rows are read,
    scored and written in windows that are sorted by length, so that a stream of rows may have any length. Where the prompt
    alone fills `max_length` nothing of the answers is left: such rows are left out, with a warning, as TRL leaves them out
    of training.

    Args:
        model: The policy before training. It is put in evaluation mode, and back afterwards.
        dataset: Rows with `prompt`, `chosen` and `rejected`, texts or conversations. Their explicit margin is, in this
            order, that of `reward`, a column `rm_margin`, or the spread of a column `all_rm_scores`.
        tokenizer: Tokenizer of the model.
        batch_size: Pairs per forward pass, >= 1; there is no backward pass, so 4 to 8 times that of training fits.
        max_length: Tokens of prompt and answer, as in training.
        device: Where to compute; None leaves the model where it is.
        reward: Reward model that scores both answers.
        output: JSON-lines file that keeps finished rows; an interrupted call with the same arguments continues it.
        on_progress: Called with the number of rows done so far.

    Returns:
        The rows with the columns `idx` (position in `dataset`), `rm_margin` (null where unknown), `chosen_logps`,
        `rejected_logps`, `chosen_logps_norm`, `rejected_logps_norm` (per token), `logp_margin`, `logp_margin_norm`,
        `logp_margin_abs` and `logp_margin_norm_abs`.

    Raises:
        ValueError: If a row (the message names it) lacks a column or has an empty answer, a log-probability isn't finite,
            the dataset is a dict of splits or empty, or `output` was written with another model, other data or other
            settings.

    Examples:
        >>> from pref_opt.alignment_potential import score_preferences
        >>> from pref_opt.tiny import tiny_causal_lm, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer()
        >>> rows = [{"prompt": "2+2=", "chosen": "4", "rejected": "5", "all_rm_scores": [0.1, 0.9]}]
        >>> scored = score_preferences(tiny_causal_lm(tokenizer), rows, tokenizer)
        >>> scored["rm_margin"][0]
        0.8
    """
    check_count("batch_size", batch_size)
    check_count("max_length", max_length)
    if isinstance(dataset, Mapping):
        raise ValueError(f"dataset must be one split, got a dict of {sorted(map(str, dataset))}; choose one of them")
    log = _RowLog(output, {"kind": "score_preferences", "max_length": max_length, "model": _fingerprint(model)})
    done = {row["idx"]: row for row in log.rows}
    finished: list[dict[str, Any]] = []
    for window in _windows(enumerate(dataset), _WINDOW * batch_size):
        encoded = {index: _encode_pair(index, row, tokenizer, max_length) for index, row in window}
        marks = {index: _mark(pair) for index, pair in encoded.items()}
        for index in encoded.keys() & done.keys():
            if done[index]["mark"] != marks[index]:
                raise ValueError(f"{output} holds other data than dataset: row {index} differs; name another output")
        todo = [(index, row) for index, row in window if index not in done]
        scored = _score_rows(model, tokenizer, todo, encoded, batch_size, device, reward)
        log.append([{**row, "mark": marks[row["idx"]]} for row in scored])
        done |= {row["idx"]: row for row in scored}
        finished += [done[index] for index, _ in window]
        if on_progress is not None:
            on_progress(len(finished))
    if not finished:
        raise ValueError("dataset is empty; at least one pair is needed")
    return _scored_dataset(dataset, finished, max_length)


_SCORES = (
    "idx",
    "rm_margin",
    "chosen_logps",
    "rejected_logps",
    "chosen_logps_norm",
    "rejected_logps_norm",
    "logp_margin",
    "logp_margin_norm",
    "logp_margin_abs",
    "logp_margin_norm_abs",
)


def _score_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[tuple[int, Mapping[str, Any]]],
    encoded: Mapping[int, list[_Encoded]],
    batch_size: int,
    device: str | torch.device | None,
    reward: RewardScorer | None,
) -> list[dict[str, Any]]:
    """Return the scores of rows; those without any token of an answer are marked as not fitting."""
    if not rows:
        return []
    sequences = [sequence for index, _ in rows for sequence in encoded[index]]
    sums, lengths = _sequence_sums(model, tokenizer, sequences, 2 * batch_size, device)
    explicit = _explicit_margins(rows, reward)
    out = []
    for (index, _), (chosen, rejected), counts, margin in zip(
        rows, sums.view(-1, 2).tolist(), lengths.view(-1, 2).tolist(), explicit, strict=True
    ):
        for name, value in (("chosen", chosen), ("rejected", rejected)):
            if not math.isfinite(value):
                raise ValueError(
                    f"row {index}: log-probability of {name} is {value}; check the model's weights and dtype"
                )
        if min(counts) == 0:
            out.append({"idx": index, "fits": False})
            continue
        chosen_norm, rejected_norm = chosen / counts[0], rejected / counts[1]
        values: tuple[Any, ...] = (
            index, margin, chosen, rejected, chosen_norm, rejected_norm, chosen - rejected, chosen_norm - rejected_norm,
            abs(chosen - rejected), abs(chosen_norm - rejected_norm),
        )  # fmt: skip
        out.append({**dict(zip(_SCORES, values, strict=True)), "fits": True})
    return out


def _explicit_margins(rows: list[tuple[int, Mapping[str, Any]]], reward: RewardScorer | None) -> list[float | None]:
    if reward is not None:
        prompts = [row["prompt"] for _, row in rows for _ in range(2)]
        responses = [_text(row[name]) for _, row in rows for name in ("chosen", "rejected")]
        scores = _rewards(reward, prompts, responses).view(-1, 2)
        return [float(value) for value in scores[:, 0] - scores[:, 1]]
    return [_stored_margin(index, row) for index, row in rows]


def _stored_margin(index: int, row: Mapping[str, Any]) -> float | None:
    if row.get("rm_margin") is not None:
        margin = float(row["rm_margin"])
    elif row.get("all_rm_scores") is not None:
        scores = [float(value) for value in row["all_rm_scores"]]
        if len(scores) < 2:
            raise ValueError(f"row {index}: all_rm_scores must have at least 2 values, got {len(scores)}")
        margin = max(scores) - min(scores)
    else:
        return None
    if not math.isfinite(margin):
        raise ValueError(f"row {index}: the reward margin must be finite, got {margin}")
    return margin


def _scored_dataset(
    dataset: Dataset | Iterable[Mapping[str, Any]], scores: list[dict[str, Any]], max_length: int
) -> Dataset:
    import datasets

    fitting = [row for row in scores if row["fits"]]
    if left := len(scores) - len(fitting):
        first = next(row["idx"] for row in scores if not row["fits"])
        message = (
            f"{left} of {len(scores)} rows left out (first: row {first}): the prompt fills max_length={max_length}"
        )
        if not fitting:
            raise ValueError(message)
        warnings.warn(message, stacklevel=3)
    columns = {name: [row[name] for row in fitting] for name in _SCORES}
    kept = columns["idx"]
    if isinstance(dataset, datasets.Dataset):
        chosen = dataset if len(kept) == len(dataset) else dataset.select(kept)
    else:
        wanted = set(kept)
        chosen = datasets.Dataset.from_list([dict(row) for index, row in enumerate(dataset) if index in wanted])
    chosen = chosen.remove_columns([name for name in _SCORES if name in chosen.column_names])
    extra = datasets.Dataset.from_dict(columns, features=_score_features())
    return datasets.concatenate_datasets([chosen, extra], axis=1)


def _score_features() -> Any:
    import datasets

    return datasets.Features({name: datasets.Value("int64" if name == "idx" else "float64") for name in _SCORES})


def _encode_pair(
    index: int, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[_Encoded]:
    for name in ("prompt", "chosen", "rejected"):
        if row.get(name) is None:
            raise ValueError(f"row {index}: no column {name!r}; got {', '.join(sorted(row))}")
        if name != "prompt" and not _text(row[name], f"row {index}: {name}").strip():
            raise ValueError(f"row {index}: {name} is empty")
    return _encode(tokenizer, row["prompt"], [row["chosen"], row["rejected"]], max_length, f"row {index}: ")


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    completions: Sequence[Prompt],
    max_length: int | None,
    where: str = "",
) -> list[_Encoded]:
    """Tokenise prompt and completions together; the completions start where they leave the tokens of the prompt."""
    if any(isinstance(completion, str) != isinstance(prompt, str) for completion in completions):
        raise ValueError(f"{where}prompt and completions must all be texts, or all be lists of messages")
    prompt_ids = _tokens(tokenizer, prompt, generation=True)
    whole = [_tokens(tokenizer, _joined(prompt, completion, tokenizer)) for completion in completions]
    start = min((_common_prefix(prompt_ids, ids) for ids in whole), default=0)
    return [_Encoded(ids[:max_length], start) for ids in whole]


def _joined(prompt: Prompt, completion: Prompt, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    if isinstance(prompt, str) and isinstance(completion, str):
        end = str(tokenizer.eos_token or "")
        return prompt + completion + ("" if completion.endswith(end) else end)
    return [*prompt, *completion]


def _tokens(tokenizer: PreTrainedTokenizerBase, text: Prompt, *, generation: bool = False) -> list[int]:
    if isinstance(text, str):
        return list(tokenizer(text)["input_ids"])
    encoded: Any = tokenizer.apply_chat_template(
        [dict(message) for message in text], add_generation_prompt=generation, tokenize=True, return_dict=True
    )
    return list(encoded["input_ids"])


def _common_prefix(left: list[int], right: list[int]) -> int:
    return next(
        (index for index, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )


def _sequence_sums(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: list[_Encoded],
    batch_size: int,
    device: str | torch.device | None,
) -> tuple[Tensor, Tensor]:
    """Return sums of log-probabilities and numbers of completion tokens, in the order of `sequences`."""
    if device is not None and model.device != torch.device(device):
        model.to(device)  # type: ignore[arg-type]
    backbone, head = _parts(model)
    # The token of position 0 has nothing before it that could predict it.
    lengths = torch.tensor([max(0, len(s.ids) - max(1, s.prompt_length)) for s in sequences], dtype=torch.int64)
    sums = torch.zeros(len(sequences), dtype=torch.float64)
    # Longest first: a batch that doesn't fit in memory fails at once, and not after hours.
    order = sorted((i for i in range(len(sequences)) if lengths[i]), key=lambda i: -len(sequences[i].ids))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    was_training = model.training
    model.train(False)
    try:
        with torch.no_grad():
            for chunk in _windows(order, batch_size):
                sums[chunk] = _batch_sums(backbone, head, [sequences[i] for i in chunk], int(pad or 0), model.device)
    finally:
        model.train(was_training)
    return sums, lengths


def _batch_sums(
    backbone: Callable[..., Any], head: _Projection, sequences: list[_Encoded], pad: int, device: torch.device
) -> Tensor:
    longest = max(len(sequence.ids) for sequence in sequences)
    ids = torch.full((len(sequences), longest), pad)
    labels, mask = torch.full_like(ids, _IGNORED), torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        size = len(sequence.ids)
        ids[row, :size] = torch.tensor(sequence.ids)
        mask[row, :size] = 1
        labels[row, sequence.prompt_length : size] = ids[row, sequence.prompt_length : size]
    ids, labels, mask = ids.to(device), labels.to(device), mask.to(device)
    hidden = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    weight, bias = head.layer.weight, getattr(head.layer, "bias", None)
    logps = sequence_logps_chunked(
        hidden.to(weight.device), weight, labels.to(weight.device), bias=bias, softcap=head.softcap, scale=head.scale
    )
    return logps.to("cpu", torch.float64)


class _Projection(NamedTuple):
    layer: Any
    softcap: float | None
    scale: float


def _parts(model: PreTrainedModel) -> tuple[Callable[..., Any], _Projection]:
    """Return the layers below the head, and the head, which is applied without making logits."""
    policy: Any = model
    inner = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    if inner is not policy and getattr(policy.active_peft_config, "is_prompt_learning", False):
        raise ValueError("model has a learned prompt, which isn't supported; merge it or use a LoRA adapter")
    head = inner.get_output_embeddings()
    if head is None or not isinstance(getattr(head, "weight", None), torch.Tensor) or hasattr(head, "base_layer"):
        raise ValueError(f"model must have a plain linear head, got {type(head).__name__} in {type(inner).__name__}")
    config = inner.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return inner.base_model, _Projection(head, getattr(config, "final_logit_softcapping", None), float(scale))


def _windows(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while window := list(itertools.islice(iterator, size)):
        yield window


def _mark(pair: list[_Encoded]) -> str:
    return hashlib.sha256(json.dumps(pair).encode()).hexdigest()[:16]


def _fingerprint(model: PreTrainedModel) -> str:
    """Return a digest of the model's parameters, from some entries of each."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // 64)]
        digest.update(picked.to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()[:16]


class _RowLog:
    """Finished rows in a JSON-lines file whose first line says what they depend on; a torn last line is dropped."""

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.rows: list[dict[str, Any]] = []
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        stored = self.path.read_bytes() if self.path.exists() else b""
        whole = stored[: stored.rfind(b"\n") + 1]
        if len(stored) > 0 and not stored.startswith(b"{"):
            raise ValueError(f"{self.path} is not a file of finished rows; name another output")
        lines = [self._parse(number, line) for number, line in enumerate(whole.splitlines(), 1)]
        if len(whole) < len(stored):
            os.truncate(self.path, len(whole))
        if not lines:
            self._write([{"settings": dict(settings)}])
            return
        self._check(lines[0].get("settings"), settings)
        self.rows = lines[1:]

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Keep rows; they are on the disk when this returns."""
        if self.path is not None and rows:
            self._write(rows)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        assert self.path is not None  # noqa: S101  # for the type checker; the callers have looked
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{self.path}:{number}: not valid JSON: {error}; name another output") from None
        if not isinstance(value, dict):
            raise ValueError(f"{self.path}:{number}: expected a JSON object, got {type(value).__name__}")
        return value

    def _check(self, stored: Any, settings: Mapping[str, Any]) -> None:
        if not isinstance(stored, dict):
            raise ValueError(f"{self.path} is not a file of finished rows; name another output")
        for name, value in settings.items():
            if stored.get(name) != value:
                raise ValueError(
                    f"{self.path} was written with {name} = {stored.get(name)!r}, asked for is {value!r}; "
                    "name another output"
                )


# --- self-made pairs -------------------------------------------------------------------------------------------------


class TransformersGenerator:
    r"""Answers from `generate` of transformers, with log-probabilities of the untempered model.

    Text prompts are continued as they are; conversations go through the chat template. The log-probabilities come from one
    forward pass over the finished sequences, through the same code as those of `score_preferences`: at a temperature of 0.8
    the ones used for drawing would be too large. The end-of-sequence token counts where it was drawn.

    Args:
        model: Causal language model of transformers.
        tokenizer: Its tokenizer.
        batch_size: Sequences that are generated at once, >= 1.
        device: Where to compute; the model is moved there. None leaves it where it is.

    Raises:
        ValueError: If `batch_size` < 1.

    Examples:
        >>> from pref_opt.alignment_potential import TransformersGenerator
        >>> from pref_opt.tiny import tiny_causal_lm, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer()
        >>> generate = TransformersGenerator(tiny_causal_lm(tokenizer), tokenizer)
        >>> answers = generate(["1+1="], n=2, temperature=0.8, top_p=0.95, max_tokens=4, seed=0)
        >>> len(answers[0]), answers[0][0][1] < 0
        (2, True)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 8,
        device: str | torch.device | None = None,
    ) -> None:
        check_count("batch_size", batch_size)
        self.model, self.tokenizer, self.batch_size, self.device = model, tokenizer, batch_size, device

    def __call__(
        self, prompts: Sequence[Prompt], n: int, temperature: float, top_p: float, max_tokens: int, seed: int
    ) -> list[list[tuple[str, float]]]:
        """Return, for each prompt, `n` pairs of a text and its average log-probability in nats per token.

        Raises:
            ValueError: If `n` or `max_tokens` < 1, `temperature` isn't positive, or `top_p` is outside (0, 1].
        """
        check_count("n", n)
        check_count("max_tokens", max_tokens)
        check_positive("temperature", temperature)
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {top_p!r}")
        if self.device is not None:
            self.model.to(self.device)  # type: ignore[arg-type]
        encoded = [_tokens(self.tokenizer, prompt, generation=True) for prompt in prompts]
        for index, ids in enumerate(encoded):
            if not ids:
                raise ValueError(f"prompts[{index}] has no tokens")
        order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
        sampling = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_tokens, "num_return_sequences": n}
        drawn: dict[int, list[list[int]]] = {}
        was_training = self.model.training
        self.model.train(False)
        try:
            with torch.random.fork_rng(self._forked()), torch.no_grad():
                torch.manual_seed(seed)
                for batch in _windows(order, max(1, self.batch_size // n)):
                    answers = self._sample([encoded[i] for i in batch], sampling)
                    drawn |= {i: answers[k * n : (k + 1) * n] for k, i in enumerate(batch)}
        finally:
            self.model.train(was_training)
        whole = [_Encoded(ids + answer, len(ids)) for i, ids in enumerate(encoded) for answer in drawn[i]]
        sums, lengths = _sequence_sums(self.model, self.tokenizer, whole, self.batch_size, None)
        average = iter((sums / lengths.clamp(min=1)).tolist())
        return [[(self._text(answer), next(average)) for answer in drawn[i]] for i in range(len(prompts))]

    def _sample(self, prompts: list[list[int]], sampling: dict[str, Any]) -> list[list[int]]:
        """Return the drawn tokens, up to and with the first that ends the sequence."""
        from transformers import GenerationConfig

        ends = self._ends()
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else ends[0]
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        # top_k and the penalty have values in many models' own settings, which would be taken where we are silent.
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=True, top_k=0, repetition_penalty=1.0, pad_token_id=pad, eos_token_id=ends, **sampling
        )
        output: Any = self.model.generate(  # type: ignore[operator]
            input_ids=ids.to(self.model.device), attention_mask=mask.to(self.model.device), generation_config=config
        )
        return [_until_end(row, ends) for row in output[:, width:].tolist()]

    def _ends(self) -> list[int]:
        generation: Any = getattr(self.model, "generation_config", None)
        own = getattr(generation, "eos_token_id", None)
        candidates = [self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
        ends = [int(token) for token in dict.fromkeys(candidates) if token is not None]
        if not ends:
            raise ValueError("tokenizer must have an end-of-sequence token")
        return ends

    def _forked(self) -> list[torch.device]:
        return [self.model.device] if self.model.device.type == "cuda" else []

    def _text(self, answer: list[int]) -> str:
        return str(self.tokenizer.decode(answer, skip_special_tokens=True))


def _until_end(tokens: list[int], ends: list[int]) -> list[int]:
    return next((tokens[: index + 1] for index, token in enumerate(tokens) if token in ends), tokens)


def build_self_play_pairs(
    prompts: Sequence[Prompt],
    generator: Generator,
    reward: RewardScorer,
    *,
    num_responses: int = 5,
    temperature: float = 0.8,
    top_p: float = 0.95,
    max_tokens: int = 4096,
    seed: int = 42,
    chunk_size: int = 256,
    output: Path | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Dataset:
    r"""Let the model answer each prompt several times, and make a pair of its best and its worst answer.

    Source: Huang et al. 2025, section 5.1 and the authors' code. Prompts with an empty answer are left out, and so are those
    whose best and worst answer have equal rewards or equal texts. How many were is logged.

    Args:
        prompts: Texts, or conversations that end with a user's message.
        generator: Samples answers (`TransformersGenerator`, or any function of that form).
        reward: Scores answers.
        num_responses: Answers per prompt, >= 2.
        temperature: Of sampling, > 0.
        top_p: Of sampling, in (0, 1].
        max_tokens: Tokens per answer, at most.
        seed: Seed of sampling; a chunk that starts with prompt i gets `seed + i`.
        chunk_size: Prompts per call of `generator`.
        output: JSON-lines file that keeps finished prompts; an interrupted call with the same arguments continues it.
        on_progress: Called with the number of prompts done so far.

    Returns:
        A preference set in TRL's form, with the columns `idx` (of the prompt), `prompt`, `chosen`, `rejected` (conversations
        where the prompts are), `rm_margin`, `chosen_logps_norm`, `rejected_logps_norm`, `logp_margin_norm`,
        `logp_margin_norm_abs`, `all_generated_responses` and `all_rm_scores`.

    Raises:
        ValueError: If there are no prompts, a number is out of range, `generator` or `reward` return another number of
            values than asked for or values that aren't finite, or no prompt gives a pair.

    Examples:
        >>> import torch
        >>> from pref_opt.alignment_potential import build_self_play_pairs
        >>> def generate(prompts, n, temperature, top_p, max_tokens, seed):
        ...     return [[("a" * (k + 1), -1.0 - k) for k in range(n)] for _ in prompts]
        >>> def longer(prompts, responses):
        ...     return torch.tensor([float(len(text)) for text in responses])
        >>> pairs = build_self_play_pairs(["Say a."], generate, longer, num_responses=3)
        >>> pairs["chosen"][0], pairs["rejected"][0], pairs["logp_margin_norm"][0]
        ('aaa', 'a', -2.0)
    """
    check_count("num_responses", num_responses, least=2)
    check_count("chunk_size", chunk_size)
    if not prompts:
        raise ValueError("prompts is empty; at least one is needed")
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
    given = hashlib.sha256(json.dumps([_plain(prompt) for prompt in prompts]).encode()).hexdigest()[:16]
    asked = {**sampling, "seed": seed, "num_responses": num_responses, "chunk_size": chunk_size, "prompts": given}
    log = _RowLog(output, {"kind": "build_self_play_pairs", **asked})
    rows = {row["idx"]: row for row in log.rows}
    for start in range(0, len(prompts), chunk_size):
        chunk = prompts[start : start + chunk_size]
        if all(start + i in rows for i in range(len(chunk))):
            continue
        answers = generator(chunk, n=num_responses, **sampling, seed=seed + start)
        _check_answers(answers, len(chunk), num_responses)
        texts = [text for row in answers for text, _ in row]
        scores = _rewards(reward, [prompt for prompt in chunk for _ in range(num_responses)], texts)
        new = [
            _pair(start + i, prompt, row, rewards)
            for i, (prompt, row, rewards) in enumerate(
                zip(chunk, answers, scores.view(-1, num_responses).tolist(), strict=True)
            )
        ]
        log.append(new)
        rows |= {row["idx"]: row for row in new}
        if on_progress is not None:
            on_progress(len(rows))
    return _pairs_dataset([rows[index] for index in range(len(prompts))])


def evolve_prompts(
    prompts: Sequence[Prompt],
    generator: Generator,
    strategies: Mapping[str, str] | Sequence[str] = DEFAULT_STRATEGIES,
    length_factor: float = 5,
    *,
    fits: Callable[[str], bool] | None = None,
    temperature: float = 0.8,
    top_p: float = 0.95,
    max_tokens: int = 4096,
    seed: int = 42,
) -> list[list[str]]:
    r"""Let the model rewrite each prompt, once per strategy.

    $$\tfrac1f\,|x|\le|x'|\le f\,|x|$$

    in characters is what is kept of the answers, after wrappers such as quotes and "Here is the new task:" are removed.
    Source: Huang et al. 2025, section 5.1 and the authors' code; the instructions are this library's own.

    Args:
        prompts: Texts, or conversations, whose last message is rewritten.
        generator: Samples answers.
        strategies: Instructions in which `{prompt}` stands for the prompt.
        length_factor: $f\ge1$.
        fits: Whether a new prompt is short enough, in tokens of the reward model for example; by default all are.
        temperature: Of sampling, > 0.
        top_p: Of sampling, in (0, 1].
        max_tokens: Tokens per answer, at most.
        seed: Seed of sampling.

    Returns:
        For each prompt the new ones that were kept, at most one per strategy, without repetitions.

    Raises:
        ValueError: If there are no prompts or strategies, an instruction lacks `{prompt}`, or `length_factor` < 1.

    Examples:
        >>> from pref_opt.alignment_potential import evolve_prompts
        >>> def shout(prompts, n, temperature, top_p, max_tokens, seed):
        ...     return [[('Here is the new task: "Add 2 and 3!"', -1.0)] for _ in prompts]
        >>> evolve_prompts(["Add 2 and 2."], shout)
        [['Add 2 and 3!']]
    """
    templates = list(strategies.values() if isinstance(strategies, Mapping) else strategies)
    if not prompts or not templates:
        raise ValueError(f"prompts and strategies must not be empty, got {len(prompts)} and {len(templates)}")
    for template in templates:
        if "{prompt}" not in template:
            raise ValueError(f"every strategy must contain '{{prompt}}', got {template!r}")
    if not length_factor >= 1:
        raise ValueError(f"length_factor must be >= 1, got {length_factor!r}")
    texts = [_text(prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)]
    asked = [
        _replaced(prompt, template.replace("{prompt}", text))
        for prompt, text in zip(prompts, texts, strict=True)
        for template in templates
    ]
    answers = generator(asked, n=1, temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)
    _check_answers(answers, len(asked), 1)
    evolved: list[list[str]] = []
    for index, text in enumerate(texts):
        rows = answers[index * len(templates) : (index + 1) * len(templates)]
        new = dict.fromkeys(_unwrapped(row[0][0]) for row in rows)
        evolved.append(
            [
                candidate
                for candidate in new
                if candidate != text
                and candidate
                and len(text) <= length_factor * len(candidate)
                and len(candidate) <= length_factor * len(text)
                and (fits is None or fits(candidate))
            ]
        )
    return evolved


def evolve_and_select(
    base_prompts: Sequence[Prompt],
    generator: Generator,
    reward: RewardScorer,
    *,
    num_select: int,
    implicit_weight: float = 2.5,
    seed: int = 42,
    pool: Literal["evolved", "combined"] = "evolved",
    strategies: Mapping[str, str] | Sequence[str] = DEFAULT_STRATEGIES,
    length_factor: float = 5,
    fits: Callable[[str], bool] | None = None,
    num_responses: int = 5,
    temperature: float = 0.8,
    top_p: float = 0.95,
    max_tokens: int = 4096,
    output: Path | None = None,
) -> Dataset:
    r"""One round of self-play: pairs from given prompts, and the best of those from prompts that grew out of them.

    Source: Huang et al. 2025, algorithm 1 (which prints the base set where the text means the evolved one). Train on the
    result, and call it again with the trained model for the next round.

    Args:
        base_prompts: Texts or conversations.
        generator: The model to be trained, as a function that samples.
        reward: Scores answers.
        num_select: Pairs that are selected by alignment potential.
        implicit_weight: $\lambda$; published: 2.5 and 5, and 0.5 with the combined pool.
        seed: Seed of the first generation; the evolution and the second generation use the next two.
        pool: Select from the evolved pairs and put them behind all base pairs, or select from both together.
        strategies: As in `evolve_prompts`.
        length_factor: As in `evolve_prompts`.
        fits: As in `evolve_prompts`.
        num_responses: As in `build_self_play_pairs`.
        temperature: Of all sampling.
        top_p: Of all sampling.
        max_tokens: Tokens per answer, at most.
        output: Folder that keeps finished steps; an interrupted call with the same arguments continues it.

    Returns:
        The columns of `build_self_play_pairs` and `origin` (`"base"` or `"evolved"`), base pairs first; selected pairs with
        the best first.

    Raises:
        ValueError: If `num_select` < 0, `pool` is unknown, no prompt evolved, or for the reasons that the steps give.

    Examples:
        >>> import torch
        >>> from pref_opt.alignment_potential import evolve_and_select
        >>> def generate(prompts, n, temperature, top_p, max_tokens, seed):
        ...     return [[(f"{len(text)} letters, {k}", -1.0 - k) for k in range(n)] for text in prompts]
        >>> def last_digit(prompts, responses):
        ...     return torch.tensor([float(text[-1]) for text in responses])
        >>> pairs = evolve_and_select(["Count the letters."], generate, last_digit, num_select=2, seed=0)
        >>> pairs["origin"][:]
        ['base', 'evolved', 'evolved']
    """
    import datasets

    check_count("num_select", num_select, least=0)
    check_not_negative("implicit_weight", implicit_weight)
    check_choice("pool", pool, ("evolved", "combined"))
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
    pairs: dict[str, Any] = {**sampling, "num_responses": num_responses}
    folder = None if output is None else Path(output)
    base = build_self_play_pairs(
        base_prompts, generator, reward, **pairs, seed=seed, output=folder and folder / "base.jsonl"
    )
    grown = _evolved(
        base_prompts,
        folder and folder / "evolve.jsonl",
        lambda: evolve_prompts(
            base_prompts, generator, strategies, length_factor, fits=fits, **sampling, seed=seed + 1
        ),
        {**sampling, "strategies": _plain(strategies), "length_factor": length_factor, "seed": seed + 1},
    )
    evolved = build_self_play_pairs(
        grown, generator, reward, **pairs, seed=seed + 2, output=folder and folder / "evolved.jsonl"
    )
    base = base.add_column("origin", ["base"] * len(base))
    evolved = evolved.add_column("origin", ["evolved"] * len(evolved))
    candidates = evolved if pool == "evolved" else datasets.concatenate_datasets([base, evolved])
    if num_select > len(candidates):
        warnings.warn(f"num_select={num_select}, but only {len(candidates)} pairs were made", stacklevel=2)
    order = select_top(
        candidates["rm_margin"][:],
        candidates["logp_margin_norm"][:],
        implicit_weight=implicit_weight,
        select_ratio=1.0,
    )
    selected = candidates.select(order[:num_select].tolist())
    return selected if pool == "combined" else datasets.concatenate_datasets([base, selected])


def _evolved(
    base: Sequence[Prompt], path: Path | None, evolve: Callable[[], list[list[str]]], settings: Mapping[str, Any]
) -> list[Prompt]:
    """Return the evolved prompts in the form of those they come from; kept in a file where there is one."""
    given = hashlib.sha256(json.dumps([_plain(prompt) for prompt in base]).encode()).hexdigest()[:16]
    log = _RowLog(path, {"kind": "evolve_prompts", **settings, "prompts": given})
    rows = {row["idx"]: row["evolved"] for row in log.rows}
    if len(rows) != len(base):
        rows = dict(enumerate(evolve()))
        log.append([{"idx": index, "evolved": texts} for index, texts in rows.items()])
    prompts = [_replaced(prompt, text) for index, prompt in enumerate(base) for text in rows[index]]
    if not prompts:
        raise ValueError("no prompt evolved: every answer was empty, unchanged, or too short or long")
    return prompts


def _pair(index: int, prompt: Prompt, answers: Sequence[tuple[str, float]], rewards: list[float]) -> dict[str, Any]:
    """Return what is kept of a prompt: its pair, or why there is none."""
    texts, logps = [text for text, _ in answers], [logp for _, logp in answers]
    if not all(text.strip() for text in texts):
        return {"idx": index, "skipped": "an empty answer"}
    if max(rewards) == min(rewards):
        return {"idx": index, "skipped": "equal rewards"}
    choice = best_worst_pair(rewards, logps)
    chosen, rejected = texts[choice.chosen_index], texts[choice.rejected_index]
    if chosen == rejected:
        return {"idx": index, "skipped": "equal texts"}
    return {
        "idx": index,
        "prompt": _plain(prompt),
        "chosen": _answer(prompt, chosen),
        "rejected": _answer(prompt, rejected),
        "rm_margin": choice.explicit_margin,
        "chosen_logps_norm": float(logps[choice.chosen_index]),
        "rejected_logps_norm": float(logps[choice.rejected_index]),
        "logp_margin_norm": choice.implicit_margin,
        "logp_margin_norm_abs": abs(choice.implicit_margin),
        "all_generated_responses": texts,
        "all_rm_scores": rewards,
    }


def _pairs_dataset(rows: list[dict[str, Any]]) -> Dataset:
    import datasets

    reasons = [row["skipped"] for row in rows if "skipped" in row]
    counts = ", ".join(f"{reasons.count(reason)} with {reason}" for reason in sorted(set(reasons)))
    pairs = [row for row in rows if "skipped" not in row]
    if not pairs:
        raise ValueError(f"none of {len(rows)} prompts gave a pair: {counts}")
    if reasons:
        _LOG.info("%d of %d prompts gave no pair: %s", len(reasons), len(rows), counts)
    return datasets.Dataset.from_list(pairs)


def _rewards(reward: RewardScorer, prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
    scores = torch.as_tensor(reward(prompts, responses)).detach().to("cpu", torch.float64)
    if scores.shape != (len(responses),):
        raise ValueError(f"reward must return shape [{len(responses)}], got {tuple(scores.shape)}")
    bad = (~scores.isfinite()).nonzero()
    if len(bad):
        index = int(bad[0, 0])
        raise ValueError(f"reward must be finite, got {scores[index].item()} for the answer {responses[index]!r}")
    return scores


def _check_answers(answers: Sequence[Sequence[tuple[str, float]]], prompts: int, n: int) -> None:
    if len(answers) != prompts:
        raise ValueError(f"generator must return one list per prompt, {prompts}, got {len(answers)}")
    for index, row in enumerate(answers):
        if len(row) != n:
            raise ValueError(f"generator must return n={n} answers per prompt, got {len(row)} for prompt {index}")
        for _, logp in row:
            if not math.isfinite(logp):
                raise ValueError(f"generator gave a log-probability of {logp} for prompt {index}")


def _text(prompt: Any, where: str = "prompt") -> str:
    """Return a text, or the last message of a conversation."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Sequence) and prompt and isinstance(prompt[-1], Mapping) and "content" in prompt[-1]:
        return str(prompt[-1]["content"])
    raise ValueError(f"{where} must be a text or a list of messages, got {type(prompt).__name__}: {str(prompt)[:80]!r}")


def _replaced(prompt: Prompt, text: str) -> Prompt:
    return text if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": text}]


def _answer(prompt: Prompt, text: str) -> Prompt:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _plain(value: Any) -> Any:
    """Return mappings as dicts and sequences as lists, for JSON."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return value if isinstance(value, str) or not isinstance(value, Sequence) else [_plain(entry) for entry in value]


_NEW = r"(?:new|rewritten|evolved|revised|updated)\s+"
_NOUN = r"(?:task|prompt|question|instruction|version)"
_LEAD = re.compile(
    r"^\W*(?:(?:sure|certainly|of course|okay|ok)\b[,.!]?\s*)?"
    rf"(?:here(?:'s|’s|\s+is)\s+(?:(?:the|a|an|your|my)\s+)?(?:{_NEW})?{_NOUN}\b[^\n:]{{0,40}}"
    rf"|(?:(?:the|your)\s+)?{_NEW}{_NOUN}|task|prompt)\s*:[\s*]*",
    re.IGNORECASE,
)
_QUOTES = (('"', '"'), ("'", "'"), ("“", "”"), ("`", "`"), ("**", "**"))


def _unwrapped(answer: str) -> str:
    """Return a rewritten prompt without an introduction and without quotes around the whole."""
    text = _LEAD.sub("", answer.strip()).strip()
    for left, right in _QUOTES:
        inside = text[len(left) : -len(right)]
        if (
            len(text) > len(left) + len(right)
            and text.startswith(left)
            and text.endswith(right)
            and right not in inside
        ):
            return inside.strip()
    return text
