r"""A trainer for losses that set one completion against K others.

TRL's `DPOTrainer` holds pairs only. `MultiNegativeTrainer` is transformers' `Trainer` with lists: one prompt, one preferred
and K other completions per row. The log-probabilities come from hidden states and the head without a matrix of logits.

Two layouts give the same numbers. *Concatenated* repeats the prompt for each completion, (1 + K)(P + C) tokens per row. *Packed*
writes the prompt once, P + (1 + K) C tokens: every completion sees the prompt and itself, its positions start where the
prompt ends, and its first token is predicted from the last token of the prompt.

$$\text{saved}=\frac{(1+K)(P+C)}{P+(1+K)\,C}$$

Host: transformers >= 5 (in the extra `trl`); TRL isn't needed. Documentation: `docs/guides/preference-training.md`.
"""

# Without `from __future__ import annotations`: HfArgumentParser reads the annotations of MultiNegativeConfig.

import contextlib
import copy
import functools
import inspect
import types
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from datasets import Dataset  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from pref_opt._checks import check_choice, check_count
from pref_opt._state import (
    LossStateCallback,
    choose_loss,
    is_empty,
    is_messages,
    method_name,
    method_options,
    old_names,
    resume_loss,
)
from pref_opt.chunked import head_options, token_logps_chunked
from pref_opt.losses import Logps, LossContext, LossOutput, PreferenceLoss, loss_names
from pref_opt.scoring import evaluating

__all__ = [
    "MultiNegativeCollator",
    "MultiNegativeConfig",
    "MultiNegativeTrainer",
    "batch_logps",
    "packed_attention_mask",
    "tokenize_lists",
]

Layout = Literal["packed", "concatenated"]

LAYOUTS = ("packed", "concatenated")
# Columns that losses of this package read; see NAPOLoss.
FEATURES = (
    "ids",
    "user_embeddings",
    "avg_item_embeddings",
    "negative_scores",
    "chosen_items",
    "rejected_items",
    "history_items",
)
# Stored log-probabilities of a row's 1 + K completions under the reference.
STORED = "ref_logps"
IGNORED = -100
PADDING = -1
# Arguments of the forward pass that gives log-probabilities, as the collator names them.
FORWARD = ("input_ids", "attention_mask", "segments", "position_ids", "sources", "targets")


# --- data --------------------------------------------------------------------------------------------------------------


def tokenize_lists(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 512,
    features: Sequence[str] | None = None,
    name: str = "dataset",
) -> Dataset:
    """Check and tokenise rows of one prompt, one preferred and K other completions.

    Texts: an end-of-sequence token is added to completions that lack it. Conversations: `prompt` is a list of messages,
    `chosen` one too, `rejected` a list of such lists; the tokenizer's chat template renders them. The tokens of a prompt
    don't depend on what follows: where a completion would merge with its end, it is tokenised by itself.

    Args:
        dataset: Columns `prompt`, `chosen`, `rejected`, and those in `features`.
        tokenizer: Of the model.
        max_length: Most tokens of a prompt with a completion, >= 2; None for no limit.
        features: Further columns to keep, of numbers in one shape for all rows; None keeps those that losses of this
            package read, where there are any.
        name: What messages call the data set.

    Returns:
        A data set with `prompt_ids`, `answer_ids` (1 + K lists, the preferred first), `row` (its number), the features, and
        `ref_logps` if it was there.

    Raises:
        ValueError: If there are no rows, a column is missing, or a row has an empty prompt, chosen or rejected, the same text
            as both, another number of rejected completions than the first, or more than `max_length` tokens. The message
            names the row.

    Examples:
        >>> from datasets import Dataset
        >>> from pref_opt.multi_negative import tokenize_lists
        >>> from pref_opt.tiny import tiny_tokenizer
        >>> rows = Dataset.from_list([{"prompt": "ab", "chosen": "c", "rejected": ["d", "ef"]}])
        >>> [len(ids) for ids in tokenize_lists(rows, tiny_tokenizer())[0]["answer_ids"]]
        [2, 2, 3]
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(f"{name} must be a datasets.Dataset, got {type(dataset).__name__}")
    if max_length is not None:
        check_count("max_length", max_length, least=2)
    kept = _features(dataset, features, name)
    _check_columns(dataset, ("prompt", "chosen", "rejected"), name)
    if not len(dataset):
        raise ValueError(f"{name} must have at least one row, got none")
    num_negatives = len(dataset[0]["rejected"]) if isinstance(dataset[0]["rejected"], list) else 0
    convert = functools.partial(
        _tokenized, tokenizer=tokenizer, max_length=max_length, num_negatives=num_negatives, name=name
    )
    unused = [column for column in dataset.column_names if column not in (*kept, STORED)]
    return dataset.map(convert, with_indices=True, remove_columns=unused, desc=f"Tokenizing {name}")


def _features(dataset: Dataset, features: Sequence[str] | None, name: str) -> list[str]:
    if features is None:
        return [column for column in FEATURES if column in dataset.column_names]
    _check_columns(dataset, features, name)
    return list(features)


def _check_columns(dataset: Dataset, columns: Sequence[str], name: str) -> None:
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise ValueError(f"{name} must have the columns {missing}, got {dataset.column_names}")


def _tokenized(
    row: Mapping[str, Any],
    index: int,
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    num_negatives: int,
    name: str,
) -> dict[str, Any]:
    where = f"{name}, row {index}"
    _check_row(row, num_negatives, where)
    conversation = isinstance(row["prompt"], list)
    encode = _encoded_conversation if conversation else _encoded_text
    completions = [row["chosen"], *row["rejected"]]
    prompt, answers = encode(tokenizer, row["prompt"], completions, where)
    if not prompt:
        raise ValueError(
            f"{where}: prompt has no tokens, but the first token of a completion is predicted from its last"
        )
    longest = max(len(answer) for answer in answers)
    if max_length is not None and len(prompt) + longest > max_length:
        raise ValueError(
            f"{where}: a prompt of {len(prompt)} tokens and a completion of {longest} exceed max_length={max_length}; "
            "raise it, drop the row, or cut prompts with pref_opt.data.truncate_prompts"
        )
    return {"prompt_ids": prompt, "answer_ids": answers, "row": index}


def _check_row(row: Mapping[str, Any], num_negatives: int, where: str) -> None:
    prompt, chosen, rejected = (row[name] for name in ("prompt", "chosen", "rejected"))
    if not isinstance(rejected, list) or not rejected:
        raise ValueError(f"{where}: rejected must be a list of at least one completion, got {rejected!r}")
    if len(rejected) != num_negatives:
        raise ValueError(
            f"{where}: {len(rejected)} rejected completions, row 0 has {num_negatives}; all rows must have equally many"
        )
    conversation = isinstance(prompt, list)
    for column, value in (("prompt", prompt), ("chosen", chosen), *(("rejected", value) for value in rejected)):
        if not (is_messages(value) if conversation else isinstance(value, str)):
            expected = "messages" if conversation else "text"
            raise ValueError(f"{where}: {column} must be {expected}, as the prompt is, got {value!r}")
        if is_empty(value):
            raise ValueError(f"{where}: {column} is empty")
    if chosen in rejected:
        raise ValueError(f"{where}: chosen and one of rejected are identical: {chosen!r}")
    if STORED in row and len(row[STORED]) != 1 + num_negatives:
        raise ValueError(f"{where}: {STORED} must have {1 + num_negatives} numbers, got {len(row[STORED])}")


def _encoded_text(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completions: Sequence[str], where: str
) -> tuple[list[int], list[list[int]]]:
    del where
    end = tokenizer.eos_token_id
    prompt_ids = _ids(tokenizer, prompt)
    answers = [_continuation(tokenizer, prompt, prompt_ids, text, special=True) for text in completions]
    return prompt_ids, [ids if end is None or ids[-1:] == [end] else [*ids, int(end)] for ids in answers]


def _encoded_conversation(
    tokenizer: PreTrainedTokenizerBase, prompt: list[Any], completions: Sequence[list[Any]], where: str
) -> tuple[list[int], list[list[int]]]:
    start = str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))
    start_ids = _ids(tokenizer, start, special=False)
    answers = []
    for completion in completions:
        whole = str(tokenizer.apply_chat_template([*prompt, *completion], tokenize=False))
        if not whole.startswith(start):
            raise ValueError(
                f"{where}: the chat template doesn't continue the prompt: {start[-60:]!r} became {whole!r}"
            )
        answers.append(_continuation(tokenizer, start, start_ids, whole.removeprefix(start), special=False))
    return start_ids, answers


def _continuation(
    tokenizer: PreTrainedTokenizerBase, prompt: str, prompt_ids: list[int], completion: str, *, special: bool
) -> list[int]:
    """Return the tokens of a completion after its prompt; by itself where it would merge with the prompt's end."""
    whole = _ids(tokenizer, prompt + completion, special=special)
    if whole[: len(prompt_ids)] == prompt_ids:
        return whole[len(prompt_ids) :]
    return _ids(tokenizer, completion, special=False)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    end = tokenizer.eos_token_id
    added = special and end is not None and ids[-1:] == [end] and not text.endswith(str(tokenizer.eos_token))
    return ids[:-1] if added else ids


class MultiNegativeCollator:
    """Make batches of tokenised lists in one of the two layouts.

    All tensors of a batch of B rows with K negatives: `lengths` (B, 1 + K), the tokens of the completions, the preferred
    first; `rows` (B,), their numbers in the data set; `features`, a dictionary; `ref_logps` (B, 1 + K) where rows have them.
    There's no `labels`, which would make the trainer count tokens.

    - Concatenated: `input_ids`, `attention_mask` and `targets` ((1 + K) B, L), padded on the right: first the B preferred
      completions with their prompts, then the B first negatives, and so on. `targets` holds what each position predicts,
      -100 for nothing.
    - Packed: `input_ids`, `position_ids` and `segments` (B, S): the prompt (segment 0), the preferred completion (1), the
      negatives (2..), padding (-1). `targets`, `sources` and `answers` (B, M) say, for each token of a completion, what it
      is, which position predicts it, and which completion it belongs to.

    Args:
        pad_token_id: Token that fills rows up.
        layout: `"packed"` or `"concatenated"`.
        features: Columns that the loss reads; None takes those that losses of this package read.

    Raises:
        ValueError: If the layout is unknown; on call, if rows have different numbers of negatives, or a feature has another
            shape than in the first row.

    Examples:
        >>> from pref_opt.multi_negative import MultiNegativeCollator
        >>> rows = [{"prompt_ids": [5, 6], "answer_ids": [[7], [8, 9]], "row": 0}]
        >>> batch = MultiNegativeCollator(0)(rows)
        >>> batch["input_ids"], batch["position_ids"]
        (tensor([[5, 6, 7, 8, 9]]), tensor([[0, 1, 2, 2, 3]]))
        >>> batch["targets"], batch["sources"]  # both first tokens are predicted from the last of the prompt
        (tensor([[7, 8, 9]]), tensor([[1, 1, 3]]))
        >>> MultiNegativeCollator(0, layout="concatenated")(rows)["input_ids"]
        tensor([[5, 6, 7, 0],
                [5, 6, 8, 9]])
    """

    def __init__(self, pad_token_id: int, *, layout: Layout = "packed", features: Sequence[str] | None = None) -> None:
        check_choice("layout", layout, LAYOUTS)
        self.pad_token_id = pad_token_id
        self.layout = layout
        self.features = features

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch of tokenised rows, as `tokenize_lists` makes them."""
        lengths = [[len(answer) for answer in row["answer_ids"]] for row in rows]
        for row, sizes in zip(rows, lengths, strict=True):
            if len(sizes) != len(lengths[0]):
                raise ValueError(
                    f"row {row['row']} has {len(sizes) - 1} rejected completions, row {rows[0]['row']} of the same batch has "
                    f"{len(lengths[0]) - 1}; all rows must have equally many"
                )
        # The lengths come first: the trainer takes the first tensor's first dimension for the size of the batch.
        batch: dict[str, Any] = {"lengths": torch.tensor(lengths)}
        batch |= self._packed(rows) if self.layout == "packed" else self._concatenated(rows)
        batch["rows"] = torch.tensor([row["row"] for row in rows])
        names = [name for name in FEATURES if name in rows[0]] if self.features is None else self.features
        batch["features"] = {name: _stacked(name, rows) for name in names}
        if STORED in rows[0]:
            batch[STORED] = _stacked(STORED, rows)
        return batch

    def _concatenated(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        ids, targets = [], []
        for position in range(len(rows[0]["answer_ids"])):
            for row in rows:
                prompt, answer = row["prompt_ids"], row["answer_ids"][position]
                ids.append([*prompt, *answer])
                targets.append([IGNORED] * (len(prompt) - 1) + [*answer, IGNORED])
        return {
            "input_ids": _filled(ids, self.pad_token_id),
            "attention_mask": _filled([[1] * len(row) for row in ids], 0),
            "targets": _filled(targets, IGNORED),
        }

    def _packed(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        columns: dict[str, list[list[int]]] = defaultdict(list)
        for row in rows:
            prompt, answers = row["prompt_ids"], row["answer_ids"]
            sizes = [len(answer) for answer in answers]
            starts = [len(prompt) + sum(sizes[:i]) for i in range(len(sizes))]
            columns["input_ids"].append([*prompt, *(token for answer in answers for token in answer)])
            columns["position_ids"].append([*range(len(prompt)), *(len(prompt) + t for n in sizes for t in range(n))])
            columns["segments"].append([0] * len(prompt) + [i + 1 for i, n in enumerate(sizes) for _ in range(n)])
            columns["targets"].append([token for answer in answers for token in answer])
            columns["sources"].append(
                [
                    start + t - 1 if t else len(prompt) - 1
                    for start, n in zip(starts, sizes, strict=True)
                    for t in range(n)
                ]
            )
            columns["answers"].append([i for i, n in enumerate(sizes) for _ in range(n)])
        fill = {"input_ids": self.pad_token_id, "segments": PADDING, "targets": IGNORED}
        return {name: _filled(values, fill.get(name, 0)) for name, values in columns.items()}


def _filled(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long)


def _stacked(name: str, rows: Sequence[Mapping[str, Any]]) -> Tensor:
    values = [torch.as_tensor(row[name]) for row in rows]
    for row, value in zip(rows, values, strict=True):
        if value.shape != values[0].shape:
            raise ValueError(
                f"{name} must have one shape in all rows, got {tuple(value.shape)} in row {row['row']} and "
                f"{tuple(values[0].shape)} in row {rows[0]['row']}"
            )
    stacked = torch.stack(values)
    return stacked.float() if stacked.is_floating_point() else stacked


# --- forward pass ------------------------------------------------------------------------------------------------------


def packed_attention_mask(segments: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    r"""Return the additive mask of packed rows: everybody sees the prompt, and a completion sees itself.

    $$m_{qk}=0\ \text{ if }k\le q\text{ and }s_k\in\{0,s_q\},\qquad\text{else the least number of the dtype}$$

    Padding sees itself, so that no row of the softmax is empty. Source: own definition.

    Args:
        segments: Segment of each position (B, S): 0 for the prompt, 1, 2, .. for completions, -1 for padding.
        dtype: Floating dtype of the attention scores.

    Returns:
        (B, 1, S, S).

    Examples:
        >>> import torch
        >>> from pref_opt.multi_negative import packed_attention_mask
        >>> (packed_attention_mask(torch.tensor([[0, 1, 2, 2]])) == 0).long()
        tensor([[[[1, 0, 0, 0],
                  [1, 1, 0, 0],
                  [1, 0, 1, 0],
                  [1, 0, 1, 1]]]])
    """
    position = torch.arange(segments.shape[1], device=segments.device)
    query, key = segments.unsqueeze(2), segments.unsqueeze(1)
    seen = (key == query) | (key == 0)
    seen = seen & (position.unsqueeze(0) <= position.unsqueeze(1))
    # Least number and not -inf: frameworks differ in what they make of the latter.
    mask = torch.zeros(seen.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill(~seen, torch.finfo(dtype).min).unsqueeze(1)


def batch_logps(model: Any, batch: Mapping[str, Any]) -> Tensor:
    r"""Return the log-probability of every completion of a batch, in either layout, without a matrix of logits.

    $$\log\pi(y_{ij}\mid x_i)=\sum_t\log\pi(y_{ijt}\mid x_i,y_{ij,<t})$$

    Source: the definition of a language model's likelihood.

    Args:
        model: Causal model of transformers, also with adapters of PEFT. Its `forward` learns a further argument, `logps_of`,
            and is the same without it.
        batch: What `MultiNegativeCollator` returns.

    Returns:
        Sums over tokens (B, 1 + K), nats, the preferred completion first, in float32 or wider, with gradient.

    Raises:
        ValueError: If the model has no linear head, its head has an adapter, or its adapter adds virtual tokens.

    Examples:
        >>> from pref_opt.multi_negative import MultiNegativeCollator, batch_logps
        >>> from pref_opt.tiny import tiny_causal_lm, tiny_tokenizer
        >>> model = tiny_causal_lm(tiny_tokenizer())
        >>> rows = [{"prompt_ids": [5, 6], "answer_ids": [[7], [8, 9]], "row": 0}]
        >>> packed, repeated = (
        ...     batch_logps(model, MultiNegativeCollator(0, layout=layout)(rows))
        ...     for layout in ("packed", "concatenated")
        ... )
        >>> bool((packed - repeated).abs().max() < 1e-5)
        True
    """
    _teach_logps(model)
    tokens: Tensor = model(logps_of={name: batch[name] for name in FORWARD if name in batch})
    lengths = batch["lengths"]
    if "answers" not in batch:
        return tokens.sum(1).view(lengths.shape[1], lengths.shape[0]).T
    return tokens.new_zeros(lengths.shape).scatter_add(1, batch["answers"], tokens)


def _teach_logps(model: Any) -> None:
    """Let the forward pass of a causal model return log-probabilities where it is given `logps_of`.

    They have to come out of the model's own forward pass, because that is what wrappers for several processes wrap.
    """
    inner = _causal_model(model)
    if inner is None or hasattr(inner, "_forward_without_logps"):
        return
    _check_head(inner, model)

    # The class's function, so that others who read the signature find that of the model.
    @functools.wraps(type(inner).forward)
    def forward(self: Any, *args: Any, logps_of: Mapping[str, Tensor] | None = None, **kwargs: Any) -> Any:
        if logps_of is None:
            return self._forward_without_logps(*args, **kwargs)
        return _token_logps(self, logps_of)

    # Bound methods, which copies of the model bind to themselves.
    inner._forward_without_logps = inner.forward
    inner.forward = types.MethodType(forward, inner)


def _causal_model(model: Any) -> Any:
    """Return the transformers model inside adapters; None inside a wrapper, which was made of a model that has learned."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return model if isinstance(model, PreTrainedModel) else None


def _check_head(inner: PreTrainedModel, model: Any) -> None:
    head = inner.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"model must have a linear head without an adapter, got {type(head).__name__} in {type(inner).__name__}: its "
            "weight is read directly"
        )
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError("model must have no adapter that adds virtual tokens, such as prefix or prompt tuning")


def _token_logps(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the log-probabilities of the targets of a batch, in their shape; 0 where there's no target."""
    if "segments" in batch:
        mask = packed_attention_mask(batch["segments"], model.dtype)
        inputs = {"attention_mask": mask, "position_ids": batch["position_ids"]}
    else:
        inputs = {"attention_mask": batch["attention_mask"]}
    hidden = model.base_model(input_ids=batch["input_ids"], use_cache=False, **inputs)[0]
    if "sources" in batch:
        hidden = hidden.gather(1, batch["sources"].unsqueeze(2).expand(-1, -1, hidden.shape[2]))
    head = model.get_output_embeddings()
    return token_logps_chunked(
        hidden, head.weight, batch["targets"], bias=head.bias, **head_options(model.config.get_text_config())
    )


def _check_packable(model: Any, max_length: int | None) -> None:
    """Raise ValueError where a model would not compute the same in the packed layout."""
    inner = _causal_model(model)
    config = inner.config.get_text_config()
    reason = None
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    window = _window(config)
    if "position_ids" not in inspect.signature(type(inner.base_model).forward).parameters:
        reason = "takes no position_ids"
    elif kinds:
        reason = f"has layers of the kinds {sorted(kinds)}"
    elif config._attn_implementation not in ("sdpa", "eager"):
        reason = f"uses attn_implementation={config._attn_implementation!r}, not 'sdpa' or 'eager'"
    elif window is not None and (max_length is None or max_length > window):
        reason = f"sees {window} tokens back in some layers, fewer than max_length={max_length}"
    if reason:
        raise ValueError(f"layout='packed' can't be used: {type(inner).__name__} {reason}; use layout='concatenated'")


def _window(config: Any) -> int | None:
    kinds = getattr(config, "layer_types", None)
    used = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    window = getattr(config, "sliding_window", None)
    return int(window) if used and window else None


# --- trainer -----------------------------------------------------------------------------------------------------------


@dataclass
class MultiNegativeConfig(TrainingArguments):
    """Arguments of `MultiNegativeTrainer`: those of transformers' `TrainingArguments`, the loss by name, and the layout.

    `remove_unused_columns` is always off.

    Attributes:
        method: Name of the loss, one of `pref_opt.losses.loss_names()` that takes K negatives.
        method_kwargs: Hyper-parameters of the loss, a dictionary or a JSON string.
        max_length: Most tokens of a prompt with one completion, >= 2; None for no limit.
        layout: `"packed"` or `"concatenated"`.
        feature_columns: Columns that the loss reads; None takes those that losses of this package read.
        disable_dropout: Set the rates of all dropout layers of policy and reference to 0.
        precompute_ref_log_probs: Compute what the reference says once, before training, and let go of the reference. Data
            sets that have a column `ref_logps` (1 + K sums over tokens per row, nats, the preferred completion first) keep
            theirs; without this option the column isn't read.

    Raises:
        ValueError: If the method or layout is unknown, `method_kwargs` isn't a dictionary, or `max_length` < 2.

    Examples:
        >>> from pref_opt.multi_negative import MultiNegativeConfig
        >>> MultiNegativeConfig("out", method="dynamic_po", method_kwargs='{"base": "sdpo"}', use_cpu=True).method_kwargs
        {'base': 'sdpo'}
    """

    method: str = field(default="sdpo", metadata={"help": "Name of the preference loss."})
    method_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Hyper-parameters of the preference loss, as JSON on the command line."}
    )
    max_length: int | None = field(default=512, metadata={"help": "Most tokens of a prompt with one completion."})
    layout: str = field(default="packed", metadata={"help": "'packed' (the prompt once) or 'concatenated'."})
    feature_columns: list[str] | None = field(default=None, metadata={"help": "Columns that the loss reads."})
    disable_dropout: bool = field(default=True, metadata={"help": "Set the rates of all dropout layers to 0."})
    precompute_ref_log_probs: bool = field(
        default=False, metadata={"help": "Compute log-probabilities under the reference once, before training."}
    )

    def __post_init__(self) -> None:
        check_choice("method", self.method, loss_names())
        check_choice("layout", self.layout, LAYOUTS)
        self.method_kwargs = method_options(self.method_kwargs)
        if self.max_length is not None:
            check_count("max_length", self.max_length, least=2)
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.remove_unused_columns = False
        # The losses are in the trainer: nothing in a batch is a label.
        self.label_names = self.label_names or []


class MultiNegativeTrainer(Trainer):
    r"""transformers' `Trainer` for every loss of this package that takes K negatives per row.

    - **Data**: columns `prompt`, `chosen` and `rejected` (a list), as texts or conversations, and further columns of numbers
      that the loss reads; see `tokenize_lists`.
    - **Reference**: the model that is given; otherwise, with adapters, the model without them; otherwise a copy of the model
      as it is now. Losses that need none get none. An adapter that was trained before has to be merged, or its model given
      as the reference. With `precompute_ref_log_probs` no copy is made: the column `ref_logps` of `trainer.train_dataset`
      holds what the reference says, and a data set saved with it needn't be scored again.
    - **Losses** that tie rows to each other see the micro-batch of all processes. Their state is written into every
      checkpoint and restored by `train(resume_from_checkpoint=...)`. Evaluation computes the loss with its state frozen.
    - **Logs** beside those of the trainer: `rewards/chosen`, `rewards/rejected`, `rewards/accuracies` (the share of rows whose
      preferred completion is above all others), `rewards/margins` (to the mean of the others), `logps/chosen`,
      `logps/rejected`, `num_tokens` (since training was started or resumed), and what the loss reports.

    Args:
        model: Causal model of transformers, or one with adapters of PEFT.
        ref_model: Reference; refused where the loss needs none.
        args: A `MultiNegativeConfig`.
        loss: Loss object, or a name; None takes `args.method` and `args.method_kwargs`.
        train_dataset: Rows to train on.
        eval_dataset: Rows to evaluate on, or several such sets by name.
        processing_class: Tokenizer.
        peft_config: Makes an adapter.
        **kwargs: Further arguments of `Trainer`: `callbacks`, `optimizers` and others.

    Raises:
        ValueError: If the loss takes pairs or looks at whole optimiser steps, a reference is given or precomputed that nobody
            reads, the model can't be used in the layout, or the data have rows that can't be trained on. `train` raises it
            if a log-probability isn't finite; the message names the row.

    Examples:
        >>> import tempfile
        >>> from datasets import Dataset
        >>> from pref_opt.multi_negative import MultiNegativeConfig, MultiNegativeTrainer
        >>> from pref_opt.tiny import tiny_causal_lm, tiny_tokenizer
        >>> rows = Dataset.from_list([{"prompt": "2+2=", "chosen": "4", "rejected": ["3", "5", "22"]}] * 4)
        >>> tokenizer = tiny_tokenizer()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     args = MultiNegativeConfig(folder, method="mppo", use_cpu=True, report_to="none")
        ...     trainer = MultiNegativeTrainer(
        ...         tiny_causal_lm(tokenizer), args=args, train_dataset=rows, processing_class=tokenizer
        ...     )
        ...     trainer.ref_model is None  # and trainer.train() would go on
        True
    """

    # Our losses are means over the rows of a micro-batch: the trainer divides by the number of micro-batches.
    loss_is_scaled_for_ga = False
    args: MultiNegativeConfig

    def __init__(
        self,
        model: Any,
        ref_model: PreTrainedModel | None = None,
        args: MultiNegativeConfig | None = None,
        loss: PreferenceLoss | str | None = None,
        *,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        args = MultiNegativeConfig() if args is None else args
        if not isinstance(args, MultiNegativeConfig):
            raise ValueError(f"args must be a MultiNegativeConfig, got {type(args).__name__}")
        if args.n_gpu > 1:
            raise ValueError(f"one process must have one device, got {args.n_gpu}: start with `accelerate launch`")
        if processing_class is None:
            raise ValueError("processing_class must be the tokenizer of the model, got None")
        self.loss = _listwise(choose_loss(loss, args.method, args.method_kwargs, default="sdpo"))
        self._check_reference(ref_model, model, args)
        set_seed(args.seed)  # for the weights of a new adapter; the trainer does so too, later
        copied = self.loss.requires_reference and not args.precompute_ref_log_probs
        model, ref_model = _with_reference(model, ref_model, peft_config, needed=copied)
        for one in (model, ref_model):
            self._make_ready(one, args)
        self.tokenizer_of_lists = processing_class
        self._features = args.feature_columns
        self._metrics: dict[str, dict[str, list[Tensor]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._num_tokens = 0
        self._precomputed = False
        self.args = args
        collator = MultiNegativeCollator(
            _padding_token(processing_class),
            layout=args.layout,  # type: ignore[arg-type]
            features=args.feature_columns,
        )
        super().__init__(
            model=model,
            args=args,
            data_collator=kwargs.pop("data_collator", None) or collator,
            train_dataset=self._prepared(train_dataset, "train_dataset"),
            eval_dataset=self._prepared(eval_dataset, "eval_dataset"),
            processing_class=processing_class,
            **kwargs,
        )
        # What a model's forward pass accepts doesn't matter: its own loss is never computed.
        self.model_accepts_loss_kwargs = False
        self.ref_model = None if ref_model is None else self.accelerator.prepare_model(ref_model, evaluation_mode=True)
        self.add_callback(LossStateCallback(self.loss))
        if args.precompute_ref_log_probs:
            self._precompute()

    # --- what is trained -------------------------------------------------------------------------------------------

    def _check_reference(self, ref_model: Any, model: Any, args: MultiNegativeConfig) -> None:
        if args.precompute_ref_log_probs and not self.loss.requires_reference:
            raise ValueError(
                f"precompute_ref_log_probs must be off for method {method_name(self.loss)!r}, which needs no reference"
            )
        if args.precompute_ref_log_probs and (args.fsdp or args.deepspeed):
            raise ValueError("precompute_ref_log_probs must be off with FSDP or DeepSpeed, which split the model later")
        if ref_model is not None and not self.loss.requires_reference:
            raise ValueError(
                f"ref_model must be None for method {method_name(self.loss)!r}, which needs no reference, "
                f"got {type(ref_model).__name__}"
            )
        if ref_model is model and ref_model is not None:
            raise ValueError("ref_model must not be the model that is trained; pass a copy, or None")

    @staticmethod
    def _make_ready(model: Any, args: MultiNegativeConfig) -> None:
        if model is None:
            return
        if _causal_model(model) is None:
            raise ValueError(f"model must be a causal model of transformers, got {type(model).__name__}")
        if args.layout == "packed":
            _check_packable(model, args.max_length)
        if args.disable_dropout:
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        _teach_logps(model)

    def _prepared(self, dataset: Any, name: str) -> Any:
        if isinstance(dataset, dict):
            return {key: self._prepared(value, f"{name}[{key!r}]") for key, value in dataset.items()}
        if dataset is None or "answer_ids" in (getattr(dataset, "column_names", None) or ()):
            return dataset
        with self.args.main_process_first(desc=f"tokenizing {name}"):
            return tokenize_lists(
                dataset, self.tokenizer_of_lists, max_length=self.args.max_length, features=self._features, name=name
            )

    def _precompute(self) -> None:
        """Store what the reference says about all completions, and let go of it; the model is still as it was given."""
        self.train_dataset = self._with_stored(self.train_dataset)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: self._with_stored(dataset) for name, dataset in self.eval_dataset.items()}
        else:
            self.eval_dataset = self._with_stored(self.eval_dataset)
        self.ref_model = None
        self._precomputed = True

    def _with_stored(self, dataset: Any) -> Any:
        if dataset is None or STORED in dataset.column_names:
            return dataset
        loader = self.accelerator.prepare_data_loader(
            DataLoader(dataset, self.args.per_device_eval_batch_size, collate_fn=self.data_collator)
        )
        sums = []
        for batch in loader:
            with self.accelerator.autocast():
                found = self._reference(self.model, self._prepare_inputs(batch))
            sums.append(self.accelerator.gather_for_metrics(found).cpu())
        return dataset.add_column(STORED, torch.cat(sums).tolist())

    # --- loss ------------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss of one micro-batch; see `transformers.Trainer.compute_loss`."""
        mode = "train" if model.training else "eval"
        # The reference goes first: its activations are gone before those of the policy, which have to stay, are made.
        reference = self._reference(model, inputs)
        sums = batch_logps(model, inputs)
        self._check_finite("policy", sums, inputs)
        out = self.loss(self._logps(sums, reference, inputs), self._context(mode))
        self._record(mode, inputs, sums.detach(), out)
        return (out.loss, {"logps": sums.detach()}) if return_outputs else out.loss

    def _context(self, mode: str) -> LossContext:
        if mode == "eval":
            return LossContext(training=False)
        return LossContext(
            training=True,
            gather=self.accelerator.gather,
            world_size=self.accelerator.num_processes,
            process_index=self.accelerator.process_index,
        )

    @torch.no_grad()
    def _reference(self, model: Any, inputs: Mapping[str, Any]) -> Tensor | None:
        if not self.loss.requires_reference:
            return None
        sums: Tensor
        if self.args.precompute_ref_log_probs and STORED in inputs:
            sums = inputs[STORED]
        elif self.ref_model is not None:
            sums = batch_logps(self.ref_model, inputs)
        else:
            # The bare policy: a second pass through a wrapper may write to buffers that the first has saved.
            policy = self.accelerator.unwrap_model(model)
            adapted = hasattr(policy, "disable_adapter")
            if self._precomputed and not adapted:
                raise ValueError(
                    f"eval_dataset must be given when the trainer is made, or have the column {STORED!r}: "
                    "precompute_ref_log_probs has let go of the reference"
                )
            with policy.disable_adapter() if adapted else contextlib.nullcontext(), evaluating(policy):
                sums = batch_logps(policy, inputs)
        self._check_finite("reference", sums, inputs)
        return sums

    def _logps(self, sums: Tensor, reference: Tensor | None, inputs: Mapping[str, Any]) -> Logps:
        lengths = inputs["lengths"]
        divisor = lengths.clamp(min=1) if self.loss.length_normalized else torch.ones_like(lengths)
        policy = sums / divisor
        ref = None if reference is None else reference.to(sums.dtype) / divisor
        return Logps(
            chosen=policy[:, 0],
            rejected=policy[:, 1:],
            ref_chosen=None if ref is None else ref[:, 0],
            ref_rejected=None if ref is None else ref[:, 1:],
            chosen_lengths=lengths[:, 0],
            rejected_lengths=lengths[:, 1:],
            features=inputs["features"],
        )

    def _check_finite(self, who: str, sums: Tensor, inputs: Mapping[str, Any]) -> None:
        finite = sums.detach().isfinite()
        if finite.all():
            return
        # In the packed layout what isn't finite in one completion reaches the others of its row.
        row, completion = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"log-probabilities under the {who} must be finite, got {float(sums[row, completion])} in row "
            f"{int(inputs['rows'][row])} of the data set, at step {self.state.global_step}"
        )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Evaluate on one batch; there's nothing to predict but the loss."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss: Tensor = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    # --- logs ------------------------------------------------------------------------------------------------------

    def _record(self, mode: str, inputs: Mapping[str, Any], sums: Tensor, out: LossOutput) -> None:
        """Keep what is logged, on its device."""
        tokens = inputs["segments"] >= 0 if "segments" in inputs else inputs["attention_mask"]
        best_other = out.rejected_rewards.amax(1)
        values = {
            "rewards/chosen": out.chosen_rewards,
            "rewards/rejected": out.rejected_rewards,
            "rewards/accuracies": out.chosen_rewards > best_other,
            "rewards/margins": out.chosen_rewards - out.rejected_rewards.mean(1),
            "logps/chosen": sums[:, 0],
            "logps/rejected": sums[:, 1:],
            "num_tokens": tokens.sum(),
            **out.metrics,
        }
        for name, value in values.items():
            self._metrics[mode][name].append(value.detach().double().mean())

    def _drained(self, mode: str) -> dict[str, float]:
        """Return the means of what was kept, over batches and processes; the tokens of training are summed from its start."""
        kept, self._metrics[mode] = self._metrics[mode], defaultdict(list)
        if not kept:
            return {}
        sizes = torch.tensor([len(values) if name == "num_tokens" else 1 for name, values in kept.items()])
        means = torch.stack([torch.stack(values).mean() for values in kept.values()])
        gathered = self.accelerator.gather((means * sizes.to(means.device)).unsqueeze(0))
        result = dict(zip(kept, gathered.mean(0).tolist(), strict=True))
        tokens = round(result.pop("num_tokens") * len(gathered))
        if mode == "train":
            self._num_tokens += tokens
            result["num_tokens"] = self._num_tokens
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what the trainer logs, and in training the means since the last log."""
        if "loss" in logs:
            logs = logs | self._drained("train")
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; rows that aren't tokenised yet are. See `transformers.Trainer.evaluate`."""
        if not isinstance(eval_dataset, str):
            eval_dataset = self._prepared(eval_dataset, "eval_dataset")
        return super().evaluate(eval_dataset, *args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Evaluate on all batches; the means of what was kept are part of the metrics."""
        self._metrics["eval"].clear()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        kept = {f"{metric_key_prefix}_{name}": value for name, value in self._drained("eval").items()}
        return output._replace(metrics={**(output.metrics or {}), **kept})

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; with a checkpoint, the state of the loss is restored as well. See `transformers.Trainer.train`."""
        resume_loss(self.loss, resume_from_checkpoint, self.args.output_dir)
        return super().train(resume_from_checkpoint, *args, **kwargs)


def _listwise(loss: PreferenceLoss) -> PreferenceLoss:
    """Return the loss if it takes K negatives."""
    if not loss.multi_negative:
        raise ValueError(
            f"method {method_name(loss)!r} takes pairs: loss must take K negatives here; use "
            "pref_opt.trl.PreferenceTrainer"
        )
    if loss.wants_window:
        raise ValueError(
            f"method {method_name(loss)!r} looks at whole optimiser steps, which this trainer doesn't show"
        )
    return loss


def _with_reference(model: Any, ref_model: Any, peft_config: Any, *, needed: bool) -> tuple[Any, Any]:
    """Return the model, with an adapter if one is asked for, and the reference, None where the model can play it."""
    if peft_config is not None:
        from peft import get_peft_model

        with old_names():
            model = get_peft_model(model, peft_config)
    if needed and ref_model is None and not hasattr(model, "disable_adapter"):
        ref_model = copy.deepcopy(model)
    return model, None if ref_model is None else ref_model.eval().requires_grad_(False)


def _padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    token = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if token is None:
        raise ValueError("processing_class must have a padding or an end-of-sequence token, got neither")
    return int(token)
