r"""Answers of a language model: how probable they are under it, and drawing them.

$$\log\pi(y|x)=\sum_t\log\pi(y_t|x,y_{<t}),\qquad \bar\ell(y|x)=\frac{\log\pi(y|x)}{|y|}$$

Both go through one code, which holds no matrix of logits (`pref_opt.chunked`) and tokenises as TRL does, so that the means
agree with those of training. `pref_opt.alignment_potential` selects and makes pairs with it; its documentation is
`docs/papers/pref-opt/alignment_potential.md`.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch.nn.utils.rnn import pad_sequence

from pref_opt._checks import check_count, check_positive
from pref_opt._row_log import RowLog, digest
from pref_opt.chunked import IGNORED, head_options, sequence_logps_chunked
from pref_opt.data import _check_row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from datasets import Dataset  # type: ignore[import-untyped]
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "CompletionLogps",
    "Generator",
    "Message",
    "Prompt",
    "RewardScorer",
    "TransformersGenerator",
    "classifier_reward",
    "completion_logps",
    "likelihood_reward",
    "score_preferences",
]

Message = Mapping[str, str]
Prompt = str | Sequence[Message]

# Rows that are sorted by length together, per row of a batch.
_WINDOW = 32


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


# --- log-probabilities ---


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
        ValueError: If the numbers of prompts and completions differ, a prompt and its completions aren't all texts or all
            messages, or a number is out of range.

    Examples:
        >>> from pref_opt.scoring import completion_logps
        >>> from pref_opt.tiny import tiny_causal_lm, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer()
        >>> result = completion_logps(tiny_causal_lm(tokenizer), tokenizer, ["1+1="], [["2", "11"]])
        >>> result.lengths[0]
        tensor([2, 3])
    """
    check_count("batch_size", batch_size)
    if max_length is not None:
        check_count("max_length", max_length)
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

    Source: Huang et al. 2025, section 3.2 and appendix D.1; the columns are those of the authors' files. Rows are read and
    scored in windows that are sorted by length. Where the prompt alone fills `max_length`, nothing of the answers is left:
    such rows are left out, with a warning, as TRL leaves them out of training.

    Args:
        model: The policy before training. It is put in evaluation mode, and back afterwards.
        dataset: Rows with `prompt`, `chosen` and `rejected`, texts or conversations; a stream is read once. Their explicit
            margin is, in this order, that of `reward`, a column `rm_margin`, or the spread of a column `all_rm_scores`.
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
        ValueError: If a row (the message names it) lacks a column, has an empty answer or the same one twice, or a
            log-probability isn't finite; if the dataset is a dict of splits or empty; or if `output` was written with
            another model, other data or other settings.

    Examples:
        >>> from pref_opt.scoring import score_preferences
        >>> from pref_opt.tiny import tiny_causal_lm, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer()
        >>> rows = [{"prompt": "2+2=", "chosen": "4", "rejected": "5", "all_rm_scores": [0.1, 0.9]}]
        >>> scored = score_preferences(tiny_causal_lm(tokenizer), rows, tokenizer)
        >>> scored["rm_margin"][0]
        0.8
    """
    import datasets

    check_count("batch_size", batch_size)
    check_count("max_length", max_length)
    if isinstance(dataset, Mapping):
        raise ValueError(f"dataset must be one split, got a dict of {sorted(map(str, dataset))}; choose one of them")
    settings: dict[str, Any] = {"kind": "score_preferences", "max_length": max_length, "reward": reward is not None}
    log = RowLog(output, settings if output is None else {**settings, "model": _fingerprint(model)})
    read: list[dict[str, Any]] = []
    done = 0
    for window in _windows(enumerate(dataset), _WINDOW * batch_size):
        pairs = [_pair(index, row, tokenizer, max_length) for index, row in window]
        for pair in pairs:
            if pair.number in log.rows and log.rows[pair.number]["mark"] != pair.mark:
                raise ValueError(
                    f"{output} holds other data than dataset: row {pair.number} differs; name another output"
                )
        todo = [pair for pair in pairs if pair.number not in log.rows]
        log.append(_scores(model, tokenizer, todo, batch_size, device, reward))
        if not isinstance(dataset, datasets.Dataset):
            read += [dict(row) for _, row in window]
        done += len(window)
        if on_progress is not None:
            on_progress(done)
    if not done:
        raise ValueError("dataset is empty; at least one pair is needed")
    whole = dataset if isinstance(dataset, datasets.Dataset) else datasets.Dataset.from_list(read)
    return _scored_dataset(whole, [log.rows[index] for index in range(done)], max_length)


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


class _Pair(NamedTuple):
    """A row, its two sequences, what is known of its explicit margin, and a mark by which it is known again."""

    number: int
    row: Mapping[str, Any]
    sequences: list[_Encoded]
    margin: float | None
    mark: str


def _pair(index: int, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> _Pair:
    form, _ = _check_row(f"row {index}", row)
    if form.startswith("lists"):
        raise ValueError(f"row {index}: rejected must be a text or a list of messages, got a list of completions")
    sequences = _encode(tokenizer, row["prompt"], [row["chosen"], row["rejected"]], max_length)
    margin = _stored_margin(index, row)
    return _Pair(index, row, sequences, margin, digest([sequences, margin]))


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


def _scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[_Pair],
    batch_size: int,
    device: str | torch.device | None,
    reward: RewardScorer | None,
) -> list[dict[str, Any]]:
    """Return the scores of pairs; those without any token of an answer are marked as not fitting."""
    if not pairs:
        return []
    sequences = [sequence for pair in pairs for sequence in pair.sequences]
    sums, lengths = _sequence_sums(model, tokenizer, sequences, 2 * batch_size, device)
    bad = (~sums.isfinite()).nonzero()
    if len(bad):
        pair, side = pairs[int(bad[0, 0]) // 2], ("chosen", "rejected")[int(bad[0, 0]) % 2]
        raise ValueError(
            f"row {pair.number}: log-probability of {side} is {sums[bad[0, 0]]}; check the model's weights and dtype"
        )
    means = sums / lengths.clamp(min=1)
    margins = [pair.margin for pair in pairs] if reward is None else _reward_margins(pairs, reward)
    return [
        {
            "idx": pair.number,
            "mark": pair.mark,
            "fits": min(size) > 0,
            "rm_margin": margin,
            "chosen_logps": chosen,
            "rejected_logps": rejected,
            "chosen_logps_norm": chosen_mean,
            "rejected_logps_norm": rejected_mean,
            "logp_margin": chosen - rejected,
            "logp_margin_norm": chosen_mean - rejected_mean,
            "logp_margin_abs": abs(chosen - rejected),
            "logp_margin_norm_abs": abs(chosen_mean - rejected_mean),
        }
        for pair, margin, (chosen, rejected), (chosen_mean, rejected_mean), size in zip(
            pairs,
            margins,
            sums.view(-1, 2).tolist(),
            means.view(-1, 2).tolist(),
            lengths.view(-1, 2).tolist(),
            strict=True,
        )
    ]


def _reward_margins(pairs: Sequence[_Pair], reward: RewardScorer) -> list[float]:
    prompts = [pair.row["prompt"] for pair in pairs for _ in range(2)]
    responses = [_text(pair.row[name]) for pair in pairs for name in ("chosen", "rejected")]
    scores = _rewards(reward, prompts, responses).view(-1, 2)
    return [float(value) for value in scores[:, 0] - scores[:, 1]]


def _scored_dataset(dataset: Dataset, scores: list[dict[str, Any]], max_length: int) -> Dataset:
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
    kept = dataset.select(columns["idx"]) if left else dataset
    kept = kept.remove_columns([name for name in _SCORES if name in kept.column_names])
    features = datasets.Features({name: datasets.Value("int64" if name == "idx" else "float64") for name in _SCORES})
    return datasets.concatenate_datasets([kept, datasets.Dataset.from_dict(columns, features=features)], axis=1)


def _text(prompt: Any) -> str:
    """Return a text, or the last message of a conversation."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _answer(prompt: Prompt, text: str) -> Any:
    """Return a response in the form of its prompt."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _rewards(reward: RewardScorer, prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
    """Return finite rewards [N] in float64 on the CPU."""
    if not responses:
        return torch.zeros(0, dtype=torch.float64)
    scores = torch.as_tensor(reward(prompts, responses)).detach().to("cpu", torch.float64)
    if scores.shape != (len(responses),):
        raise ValueError(f"reward must return shape [{len(responses)}], got {tuple(scores.shape)}")
    bad = (~scores.isfinite()).nonzero()
    if len(bad):
        index = int(bad[0, 0])
        raise ValueError(f"reward must be finite, got {scores[index].item()} for the answer {responses[index]!r}")
    return scores


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    completions: Sequence[Prompt],
    max_length: int | None,
) -> list[_Encoded]:
    """Tokenise prompt and completions together; the completions start where they leave the tokens of the prompt."""
    if any(isinstance(completion, str) != isinstance(prompt, str) for completion in completions):
        raise ValueError("prompt and completions must all be texts, or all be lists of messages")
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
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    backbone, head = _parts(model)
    # The token of position 0 has nothing before it that could predict it.
    lengths = torch.tensor([max(0, len(s.ids) - max(1, s.prompt_length)) for s in sequences], dtype=torch.int64)
    sums = torch.zeros(len(sequences), dtype=torch.float64)
    # Longest first: a batch that is too large for the memory fails early.
    order = sorted((i for i in range(len(sequences)) if lengths[i]), key=lambda i: -len(sequences[i].ids))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with evaluating(model):
        for chunk in _windows(order, batch_size):
            sums[chunk] = _batch_sums(backbone, head, [sequences[i] for i in chunk], int(pad or 0), model.device)
    return sums, lengths


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Switch dropout and gradients off; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(False)
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _batch_sums(
    backbone: Callable[..., Any], head: _Projection, sequences: list[_Encoded], pad: int, device: torch.device
) -> Tensor:
    ids = pad_sequence([torch.tensor(s.ids) for s in sequences], batch_first=True, padding_value=pad)
    starts, ends = (
        torch.tensor(x)[:, None] for x in zip(*((s.prompt_length, len(s.ids)) for s in sequences), strict=True)
    )
    position = torch.arange(ids.shape[1])
    labels = ids.where((starts <= position) & (position < ends), IGNORED).to(device)
    ids, mask = ids.to(device), (position < ends).long().to(device)
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
    return inner.base_model, _Projection(head, **head_options(inner.config.get_text_config()))


def _windows(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while window := list(itertools.islice(iterator, size)):
        yield window


def _fingerprint(model: PreTrainedModel) -> str:
    """Return a digest of the model's parameters, from some entries of each."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // 64)]
        digest.update(picked.to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()[:16]


# --- rewards from models ---


def likelihood_reward(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 8, max_length: int | None = 2048
) -> RewardScorer:
    r"""Return a reward that is the mean log-probability of an answer under a language model.

    $$r(x,y)=\frac1{|y|}\sum_t\log\pi(y_t|x,y_{<t})$$

    Source: own definition; a model that was trained further than the policy can judge it.

    Args:
        model: Causal language model of transformers.
        tokenizer: Its tokenizer; conversations need a chat template.
        batch_size: Sequences per forward pass, >= 1.
        max_length: Tokens of prompt and answer; an answer of which nothing is left has reward 0. None cuts nothing.

    Returns:
        A function of prompts and responses that returns rewards [N], nats per token, float64.

    Raises:
        ValueError: If a number is out of range; on call, for the reasons that `completion_logps` gives.

    Examples:
        >>> from pref_opt.scoring import likelihood_reward
        >>> from pref_opt.tiny import tiny_causal_lm, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer()
        >>> reward = likelihood_reward(tiny_causal_lm(tokenizer), tokenizer)
        >>> reward(["1+1=", "1+1="], ["2", "3"]).shape
        torch.Size([2])
    """
    check_count("batch_size", batch_size)
    if max_length is not None:
        check_count("max_length", max_length)

    def reward(prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
        answers = [[_answer(prompt, text)] for prompt, text in zip(prompts, responses, strict=True)]
        scored = completion_logps(model, tokenizer, prompts, answers, batch_size=batch_size, max_length=max_length)
        return torch.cat(scored.sums) / torch.cat(scored.lengths).clamp(min=1)

    return reward


def classifier_reward(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 8, max_length: int | None = 2048
) -> RewardScorer:
    r"""Return the reward of a sequence classifier with one output, as reward models are usually published.

    $$r(x,y)=f(x\oplus y)$$

    Text prompts are continued by the response, conversations go through the chat template. Source: the authors' code, which
    scores with such models.

    Args:
        model: Model of transformers for sequence classification; its padding token is set to the tokenizer's.
        tokenizer: Its tokenizer.
        batch_size: Sequences per forward pass, >= 1.
        max_length: Tokens of prompt and answer; the end of longer ones is cut. None cuts nothing.

    Returns:
        A function of prompts and responses that returns rewards [N], float64.

    Raises:
        ValueError: If the model has several outputs, or a number is out of range.

    Examples:
        >>> import torch
        >>> from transformers import Qwen2Config, Qwen2ForSequenceClassification
        >>> from pref_opt.scoring import classifier_reward
        >>> from pref_opt.tiny import tiny_tokenizer
        >>> tokenizer = tiny_tokenizer()
        >>> sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1)
        >>> config = Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes)
        >>> reward = classifier_reward(Qwen2ForSequenceClassification(config), tokenizer)
        >>> reward(["1+1=", "1+1="], ["2", "3"]).dtype
        torch.float64
    """
    check_count("batch_size", batch_size)
    if max_length is not None:
        check_count("max_length", max_length)
    if model.config.num_labels != 1:
        raise ValueError(f"model must have one output to be a reward model, got {model.config.num_labels}")
    model.config.pad_token_id = tokenizer.pad_token_id

    def reward(prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
        shown = [
            prompt + text
            if isinstance(prompt, str)
            else tokenizer.apply_chat_template([dict(m) for m in (*prompt, *_answer(prompt, text))], tokenize=False)
            for prompt, text in zip(prompts, responses, strict=True)
        ]
        rewards = []
        with evaluating(model):
            for texts in _windows(shown, batch_size):
                batch = tokenizer(
                    texts,
                    add_special_tokens=isinstance(prompts[0], str),  # a chat template writes its own
                    padding=True,
                    truncation=max_length is not None,
                    max_length=max_length,
                    return_tensors="pt",
                )
                rewards.append(model(**batch.to(model.device)).logits[:, 0].double().cpu())
        return torch.cat(rewards)

    return reward


# --- drawing ---


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
        >>> from pref_opt.scoring import TransformersGenerator
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
        on_gpu = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(on_gpu), evaluating(self.model):
            # torch.manual_seed would change the state of all GPUs, and fork_rng restores only those it knows.
            torch.default_generator.manual_seed(seed)
            for device in on_gpu:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            for batch in _windows(order, max(1, self.batch_size // n)):
                answers = self._sample([encoded[i] for i in batch], sampling)
                drawn |= {i: answers[k * n : (k + 1) * n] for k, i in enumerate(batch)}
        whole = [_Encoded(ids + answer, len(ids)) for i, ids in enumerate(encoded) for answer in drawn[i]]
        sums, lengths = _sequence_sums(self.model, self.tokenizer, whole, self.batch_size, None)
        average = iter((sums / lengths.clamp(min=1)).tolist())
        decode = self.tokenizer.decode
        return [
            [(str(decode(answer, skip_special_tokens=True)), next(average)) for answer in drawn[i]]
            for i in range(len(prompts))
        ]

    def fingerprint(self) -> str:
        """Return what answers depend on beside the arguments of a call, so that unfinished self-play can tell models apart."""
        return f"{_fingerprint(self.model)}, batches of {self.batch_size}"

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


def _until_end(tokens: list[int], ends: list[int]) -> list[int]:
    return next((tokens[: index + 1] for index, token in enumerate(tokens) if token in ends), tokens)
