"""What this package assumes of TRL and transformers beyond their documentation: one name here per assumption.

Nothing else in the package touches those internals. `tests/unit/test_compat.py` has a test for each of them, so a new
version of TRL that breaks one says which. Read and run with TRL 1.16 and transformers 5.23.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from trl import DPOConfig, DPOTrainer  # type: ignore[attr-defined]

from pref_opt._checks import check_choice
from pref_opt._state import old_names

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from transformers import PreTrainedModel

__all__ = [
    "HostTrainer",
    "TokenOutputs",
    "completion_labels",
    "completion_mask",
    "count_tokens",
    "decoded",
    "dense_outputs",
    "head_logps",
    "is_training",
    "log_metric",
    "needs_router_loss",
    "on_device",
    "policy_tokens",
    "reference_logps",
    "reference_stub",
    "refuse_ignored_options",
    "use_new_names",
]

# Columns of a batch that are no arguments of the model.
NOT_FOR_THE_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")

# Options that only TRL's own loss reads. Where the hint is empty there is nothing to set instead.
IGNORED_OPTIONS = {
    "loss_type": "choose the loss with `method`",
    "loss_weights": "one loss is computed, that of `method`",
    "beta": "pass it to the loss: method_kwargs={'beta': ...}",
    "label_smoothing": "pass it to the loss: method_kwargs={'label_smoothing': ...}",
    "ld_alpha": "",
    "f_divergence_type": "",
    "f_alpha_divergence_coef": "",
    "use_weighting": "",
    "discopop_tau": "",
    "padding_free": "TRL ignores it as well since its refactoring",
}


class TokenOutputs(NamedTuple):
    """What the policy says about the completion tokens of a batch, [2B, L-1] each, chosen rows first.

    Attributes:
        logps: Log-probabilities with gradient, 0 outside the completions.
        entropy: Entropies of the next-token distributions.
        mean_logits: Means of the logits over the vocabulary.
        is_top1: Whether the token is the most likely one.
    """

    logps: Tensor
    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor


def refuse_ignored_options(config: DPOConfig) -> None:
    """Raise ValueError where an option of TRL's is set that only TRL's own loss would read."""
    for field in dataclasses.fields(DPOConfig):
        if field.name not in IGNORED_OPTIONS:
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = getattr(config, field.name)
        if value != default:
            hint = IGNORED_OPTIONS[field.name]
            raise ValueError(
                f"{field.name} must be left at {default!r}, got {value!r}: the losses of this package don't read it"
                + (f"; {hint}" if hint else "")
            )
    if config.router_aux_loss_coef:
        raise ValueError(
            f"router_aux_loss_coef must be None or 0, got {config.router_aux_loss_coef!r}: "
            "the losses of this package don't add a load-balancing loss"
        )


def use_new_names(config: DPOConfig) -> None:
    """Fill in the new name of an option whose old name TRL gives a default to, which would warn about itself."""
    if getattr(config, "activation_checkpointing", False) is None:
        config.activation_checkpointing = config.gradient_checkpointing


def completion_mask(inputs: Mapping[str, Tensor]) -> Tensor:
    """Return which next tokens belong to a completion [2B, L-1]: the collator puts all chosen rows first."""
    return inputs["completion_mask"][:, 1:].bool()


def completion_labels(inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the input ids [2B, L] with -100 outside the completions."""
    return inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)


def _model_arguments(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_MODEL} | {"use_cache": False}


def policy_tokens(model: Any, inputs: Mapping[str, Tensor]) -> TokenOutputs:
    """Run the policy with the head that TRL put on it, which never holds all logits."""
    out = model(**_model_arguments(inputs), labels=completion_labels(inputs), fused_lm_head=True)
    # Prompt-learning adapters put virtual tokens in front; the real ones are the last columns.
    kept = inputs["input_ids"].shape[1] - 1
    return TokenOutputs(*(x[:, -kept:] for x in (out.log_probs, out.entropy, out.mean_logits, out.is_top1)))


def reference_logps(trainer: DPOTrainer, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the sums of log-probabilities [B] under the reference: another model, or the policy without its adapter."""
    # The bare policy, not the wrapped one: a second pass through DDP may write to buffers that the first has saved.
    model = trainer.model if trainer.ref_model is None else trainer.ref_model
    chosen, rejected = trainer.compute_ref_log_probs(model, inputs)  # type: ignore[no-untyped-call]
    return chosen, rejected


def dense_outputs(model: Any, inputs: Mapping[str, Tensor]) -> Any:
    """Return the outputs of the model's own forward pass, with logits; the patched model still has it."""
    with torch.no_grad():
        return model(**_model_arguments(inputs))


def on_device(trainer: DPOTrainer, batch: dict[str, Any]) -> dict[str, Any]:
    """Return a new batch on the trainer's device; preparing it again, as the trainer will, changes nothing."""
    return dict(trainer._prepare_inputs(batch))


def is_training(trainer: DPOTrainer) -> bool:
    """Return what TRL's logs and ours are told apart by: the mode of the model."""
    model: Any = trainer.model
    return bool(model.training)


def decoded(trainer: DPOTrainer, ids: Tensor) -> str:
    """Return the text of token ids [T]; the processing class is a tokenizer or a processor with its method."""
    processing: Any = trainer.processing_class
    return str(processing.decode(ids))


def log_metric(trainer: DPOTrainer, mode: str, name: str, value: float) -> None:
    """Add a value to those that TRL averages at the next log, in evaluation with the prefix `eval_`."""
    check_choice("mode", mode, ("train", "eval"))
    trainer._metrics[mode][name].append(value)


def count_tokens(trainer: DPOTrainer, mode: str, tokens: float) -> None:
    """Count the tokens of a batch of all processes; only training adds to the number that is logged."""
    if mode == "train":
        trainer._total_train_tokens += int(tokens) // trainer._tp_size
    trainer._metrics[mode]["num_tokens"] = [trainer._total_train_tokens]


def needs_router_loss(trainer: DPOTrainer) -> bool:
    """Return whether TRL would add the load-balancing loss of a mixture of experts."""
    return bool(trainer.aux_loss_enabled)


def reference_stub() -> PreTrainedModel:
    """Return a model of about 600 parameters for TRL, which insists on a reference even where nothing calls it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    with torch.random.fork_rng(devices=[]):
        model: PreTrainedModel = LlamaForCausalLM(config)
    return model


def head_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return TRL's own log-probabilities [N] of labels [N] from hidden states [N, H], for comparisons."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    logps: Tensor = ChunkedLogProbFunction.apply(
        hidden, weight, None, labels, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
    )[0]
    return logps


class HostTrainer(DPOTrainer):
    """TRL's trainer with a look at every data set before and after it is tokenised.

    TRL drops, without a word, pairs whose prompt alone fills `max_length`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with old_names():
            super().__init__(*args, **kwargs)

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        with old_names():
            return super().compute_ref_log_probs(model, inputs)  # type: ignore[no-untyped-call]

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        self.check_rows(dataset, dataset_name)
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if hasattr(dataset, "__len__"):
            self.check_dropped(len(dataset) - len(prepared), len(dataset), args.max_length, dataset_name)
        return prepared

    def check_rows(self, dataset: Any, name: str) -> None:
        """Raise ValueError where the rows can't be trained on."""

    def check_dropped(self, dropped: int, total: int, max_length: int | None, name: str) -> None:
        """Raise ValueError where TRL has dropped rows."""
