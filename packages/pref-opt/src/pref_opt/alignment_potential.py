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

import logging
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from pref_opt._checks import check_choice, check_count, check_fraction, check_not_negative
from pref_opt._row_log import RowLog, digest
from pref_opt.scoring import (
    CompletionLogps,
    Generator,
    Message,
    Prompt,
    RewardScorer,
    TransformersGenerator,
    _answer,
    _rewards,
    _text,
    completion_logps,
    score_preferences,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from datasets import Dataset  # type: ignore[import-untyped]
    from numpy.typing import ArrayLike
    from torch import Tensor

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
_METRICS = ("alignment_potential", "explicit", "implicit", "random")
_NORMALIZATIONS = ("zscore", "none")

_REWRITE = (
    "Below is a task that someone gave to an assistant. Rewrite it {how}. Keep any input it contains, make sure it can be "
    "understood on its own, and let it grow by no more than 10 to 20 words.\n\n"
    "Task:\n{{prompt}}\n\nAnswer with the rewritten task alone."
)
DEFAULT_STRATEGIES: Mapping[str, str] = {
    "breadth": (
        "Below is a task that someone gave to an assistant. Invent one different task from the same field. It should be "
        "about as long and as hard as the original and bring along whatever input it needs.\n\n"
        "Original task:\n{prompt}\n\nAnswer with the text of the new task alone."
    ),
    "deepen": _REWRITE.format(how="so that a good answer has to look further and go deeper into the question"),
    "constrain": _REWRITE.format(how="with exactly one further requirement that a good answer must meet"),
    "concretize": _REWRITE.format(how="so that general notions in it become specific ones"),
    "reason": _REWRITE.format(how="so that it asks outright for an answer reached in several steps of reasoning"),
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
    explicit, implicit = _vector("explicit_margin", explicit_margin), _vector("implicit_margin", implicit_margin)
    if len(explicit) != len(implicit):
        raise ValueError(
            f"explicit_margin and implicit_margin must have the same length, got {len(explicit)} and {len(implicit)}"
        )
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
    count = math.floor(select_ratio * len(score))
    if metric == "random":
        return torch.randperm(len(score), generator=generator or torch.Generator().manual_seed(0))[:count]
    if metric != "alignment_potential":
        margin = _vector(metric, explicit_margin if metric == "explicit" else implicit_margin)
        margin = margin if signed else margin.abs()
        score = margin if metric == "explicit" else -margin
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


# --- self-made pairs -------------------------------------------------------------------------------------------------


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

    Source: Huang et al. 2025, section 5.1 and the authors' code. Prompts with an empty answer are left out before the reward
    model sees them, then those whose best and worst answer have equal rewards or equal texts. How many were is logged.

    Args:
        prompts: Texts, or conversations that end with what is to be answered.
        generator: Samples answers (`TransformersGenerator`, or any function of that form).
        reward: Scores answers.
        num_responses: Answers per prompt, >= 2.
        temperature: Of sampling, > 0.
        top_p: Of sampling, in (0, 1].
        max_tokens: Tokens per answer, at most.
        seed: Seed of sampling; a chunk that starts with prompt i gets `seed + i`.
        chunk_size: Prompts per call of `generator`.
        output: JSON-lines file that keeps finished chunks; an interrupted call with the same arguments continues it. A
            generator that has a method `fingerprint` (`TransformersGenerator` has) continues its own model's file only.
        on_progress: Called with the number of prompts done so far.

    Returns:
        A preference set in TRL's form, with the columns `idx` (of the prompt), `prompt`, `chosen`, `rejected` (conversations
        where the prompts are), `rm_margin`, `chosen_logps_norm`, `rejected_logps_norm`, `logp_margin_norm`,
        `logp_margin_norm_abs`, `all_generated_responses` and `all_rm_scores`.

    Raises:
        ValueError: If there are no prompts or they differ in form, a number is out of range, `generator` or `reward` return
            another number of values than asked for or values that aren't finite, no prompt gives a pair, or `output` was
            written with other arguments.

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
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}

    def make(start: int, chunk: Sequence[Prompt]) -> list[dict[str, Any]]:
        answers = generator(chunk, n=num_responses, **sampling, seed=seed + start)
        _check_answers(answers, len(chunk), num_responses)
        full = [i for i, row in enumerate(answers) if all(text.strip() for text, _ in row)]
        texts = [text for i in full for text, _ in answers[i]]
        scores = _rewards(reward, [chunk[i] for i in full for _ in range(num_responses)], texts)
        rows = {i: {"idx": start + i, "skipped": "an empty answer"} for i in range(len(chunk))}
        for i, rewards in zip(full, scores.view(-1, num_responses).tolist(), strict=True):
            rows[i] = _pair(start + i, chunk[i], answers[i], rewards)
        return list(rows.values())

    settings = {"kind": "build_self_play_pairs", **sampling, "num_responses": num_responses, "seed": seed}
    rows = _in_chunks(make, prompts, generator, settings, chunk_size, output, on_progress)
    return _pairs_dataset(rows)


def _in_chunks(
    make: Callable[[int, Sequence[Prompt]], list[dict[str, Any]]],
    prompts: Sequence[Prompt],
    generator: Generator,
    settings: Mapping[str, Any],
    chunk_size: int,
    output: Path | None,
    on_progress: Callable[[int], None] | None,
) -> list[dict[str, Any]]:
    """Return one row per prompt; what `output` holds already isn't made again, and finished chunks are kept in it."""
    check_count("chunk_size", chunk_size)
    _check_prompts(prompts)
    prompts = list(prompts)
    log = RowLog(output, {} if output is None else {**settings, **_identity(prompts, generator, chunk_size)})
    for start in range(0, len(prompts), chunk_size):
        chunk = prompts[start : start + chunk_size]
        if any(start + i not in log.rows for i in range(len(chunk))):
            log.append(make(start, chunk))
        if on_progress is not None:
            on_progress(start + len(chunk))
    return [log.rows[index] for index in range(len(prompts))]


def _identity(prompts: Sequence[Prompt], generator: Generator, chunk_size: int) -> dict[str, Any]:
    own = getattr(generator, "fingerprint", None)
    return {
        "chunk_size": chunk_size,
        "prompts": digest([_plain(prompt) for prompt in prompts]),
        "generator": own() if callable(own) else None,
    }


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
        ValueError: If there are no prompts or strategies, an instruction lacks `{prompt}`, `length_factor` < 1, or
            `generator` returns another number of answers than asked for.

    Examples:
        >>> from pref_opt.alignment_potential import evolve_prompts
        >>> def shout(prompts, n, temperature, top_p, max_tokens, seed):
        ...     return [[('Here is the new task: "Add 2 and 3!"', -1.0)] for _ in prompts]
        >>> evolve_prompts(["Add 2 and 2."], shout)
        [['Add 2 and 3!']]
    """
    templates = list(strategies.values() if isinstance(strategies, Mapping) else strategies)
    _check_prompts(prompts)
    if not templates:
        raise ValueError("strategies is empty; at least one is needed")
    for template in templates:
        if "{prompt}" not in template:
            raise ValueError(f"every strategy must contain '{{prompt}}', got {template!r}")
    if not length_factor >= 1:
        raise ValueError(f"length_factor must be >= 1, got {length_factor!r}")
    texts = [_text(prompt) for prompt in prompts]
    asked = [
        _replaced(prompt, template.replace("{prompt}", text))
        for prompt, text in zip(prompts, texts, strict=True)
        for template in templates
    ]
    answers = generator(asked, n=1, temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)
    _check_answers(answers, len(asked), 1)
    evolved = []
    for index, text in enumerate(texts):
        rows = answers[index * len(templates) : (index + 1) * len(templates)]
        new = dict.fromkeys(_unwrapped(row[0][0]) for row in rows)
        evolved.append(
            [
                candidate
                for candidate in new
                if candidate not in ("", text)
                and max(len(candidate), len(text)) <= length_factor * min(len(candidate), len(text))
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
    chunk_size: int = 256,
    output: Path | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Dataset:
    r"""One round of self-play: pairs from given prompts, and the best of those from prompts that grew out of them.

    $$D\cup\operatorname*{top}_{k}\big(A(D')\big),\qquad D=\text{pairs of the prompts},\quad
    D'=\text{pairs of the evolved prompts}$$

    Source: Huang et al. 2025, algorithm 1 (which prints the base set where the text means the evolved one). Train on the
    result, and call it again with the trained model and another `output` for the next round.

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
        chunk_size: Prompts per call of `generator`; five times as many in the evolution with five strategies.
        output: Folder that keeps finished chunks as in `build_self_play_pairs`; one folder per round.
        on_progress: Called with the step (`"base"`, `"evolve"` or `"evolved"`), its prompts done so far, and all of them.

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

    def step(name: str, total: int) -> dict[str, Any]:
        report = None if on_progress is None else lambda done: on_progress(name, done, total)
        file = None if output is None else Path(output) / f"{name}.jsonl"
        return {"chunk_size": chunk_size, "output": file, "on_progress": report}

    def pairs(name: str, prompts: Sequence[Prompt], seed: int) -> Dataset:
        made = build_self_play_pairs(
            prompts, generator, reward, num_responses=num_responses, **sampling, seed=seed, **step(name, len(prompts))
        )
        return made.add_column("origin", [name] * len(made))

    def evolve(start: int, chunk: Sequence[Prompt]) -> list[dict[str, Any]]:
        new = evolve_prompts(chunk, generator, strategies, length_factor, fits=fits, **sampling, seed=seed + 1 + start)
        return [{"idx": start + i, "evolved": texts} for i, texts in enumerate(new)]

    base = pairs("base", base_prompts, seed)
    settings = {
        "kind": "evolve_prompts",
        **sampling,
        "strategies": _plain(strategies),
        "length_factor": length_factor,
        "seed": seed + 1,
    }
    grown = _in_chunks(evolve, base_prompts, generator, settings, **step("evolve", len(base_prompts)))
    new = [_replaced(base_prompts[row["idx"]], text) for row in grown for text in row["evolved"]]
    if not new:
        raise ValueError("no prompt evolved: every answer was empty, unchanged, or too short or long")
    evolved = pairs("evolved", new, seed + 2)
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


def _pair(index: int, prompt: Prompt, answers: Sequence[tuple[str, float]], rewards: list[float]) -> dict[str, Any]:
    """Return what is kept of a prompt: its pair, or why there is none."""
    texts, logps = [text for text, _ in answers], [logp for _, logp in answers]
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


def _check_answers(answers: Sequence[Sequence[tuple[str, float]]], prompts: int, n: int) -> None:
    if len(answers) != prompts:
        raise ValueError(f"generator must return one list per prompt, {prompts}, got {len(answers)}")
    for index, row in enumerate(answers):
        if len(row) != n:
            raise ValueError(f"generator must return n={n} answers per prompt, got {len(row)} for prompt {index}")
        for entry in row:
            if len(entry) != 2 or not isinstance(entry[0], str) or not isinstance(entry[1], Real):
                raise ValueError(f"generator must return texts with average log-probabilities, got {entry!r:.80}")
            if not math.isfinite(entry[1]):
                raise ValueError(f"generator gave a log-probability of {entry[1]} for prompt {index}")


def _check_prompts(prompts: Sequence[Prompt]) -> None:
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be a sequence of prompts, got the text {prompts[:80]!r}")
    if not prompts:
        raise ValueError("prompts is empty; at least one is needed")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) and not _is_conversation(prompt):
            raise ValueError(f"prompts[{index}] must be a text or a list of messages, got {prompt!r:.80}")
        if isinstance(prompt, str) != isinstance(prompts[0], str):
            raise ValueError(
                f"prompts must all be texts or all be conversations; prompts[{index}] differs from the first"
            )
        if not _text(prompt).strip():
            raise ValueError(f"prompts[{index}] is empty")


def _is_conversation(prompt: Any) -> bool:
    """Return whether these are messages that someone has yet to answer."""
    if not isinstance(prompt, Sequence) or not prompt:
        return False
    messages = all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in prompt)
    return messages and prompt[-1]["role"] != "assistant"


def _replaced(prompt: Prompt, text: str) -> Prompt:
    return text if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": text}]


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
