"""One TRL trainer for every preference loss of this package.

`PreferenceTrainer` is TRL's `DPOTrainer` with the loss exchanged: data, models, adapters, precomputed references,
accumulation, several processes and checkpoints are TRL's. It adds what TRL has no place for: losses without a reference, losses
whose statistics have to survive a restart, and losses that look at the whole batch.

Host: TRL >= 1.16 (the extra `trl`). Documentation: `docs/guides/preference-training.md`.
"""

# Without `from __future__ import annotations`: HfArgumentParser reads the annotations of PreferenceConfig.

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl import DPOConfig  # type: ignore[attr-defined]

from pref_opt import _compat
from pref_opt._checks import check_choice
from pref_opt._state import (
    LossStateCallback,
    check_batch_sizes,
    choose_loss,
    is_empty,
    is_messages,
    load_loss_state,
    method_name,
    method_options,
    resume_loss,
    save_loss_state,
)
from pref_opt.losses import Logps, LossContext, LossOutput, PreferenceLoss, loss_names
from pref_opt.scoring import evaluating

__all__ = ["PreferenceConfig", "PreferenceTrainer", "load_loss_state", "save_loss_state"]


@dataclass
class PreferenceConfig(DPOConfig):
    """Arguments of `PreferenceTrainer`: those of TRL's `DPOConfig`, and the loss by name.

    Options that only TRL's own loss reads (`beta`, `loss_type`, `label_smoothing`, `f_divergence_type` and the like) are
    refused rather than ignored: hyper-parameters of the loss go into `method_kwargs`.

    Attributes:
        method: Name of the loss, one of `pref_opt.losses.loss_names()`.
        method_kwargs: Hyper-parameters of the loss, a dictionary or a JSON string.

    Raises:
        ValueError: If the method is unknown, `method_kwargs` isn't a dictionary, or an ignored option is set.

    Examples:
        >>> from pref_opt.trl import PreferenceConfig
        >>> config = PreferenceConfig("out", method="repo", method_kwargs={"gamma": 0.4}, bf16=False, use_cpu=True)
        >>> config.method_kwargs
        {'gamma': 0.4}
    """

    method: str = field(default="dpo", metadata={"help": "Name of the preference loss."})
    method_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Hyper-parameters of the preference loss, as JSON on the command line."}
    )

    def __post_init__(self) -> None:
        check_choice("method", self.method, loss_names())
        self.method_kwargs = method_options(self.method_kwargs)
        _compat.use_new_names(self)
        super().__post_init__()  # type: ignore[no-untyped-call]
        _compat.refuse_ignored_options(self)


class PreferenceTrainer(_compat.HostTrainer):
    r"""TRL's `DPOTrainer` with any pairwise loss of this package.

    The loss gets sums of log-probabilities over completion tokens, or means where it asks for them, and log-probabilities
    under the reference where it needs one:

    $$\log\pi(y)=\sum_t\log\pi(y_t\mid x,y_{<t})\quad\text{or}\quad\frac1{|y|}\sum_t\log\pi(y_t\mid x,y_{<t})$$

    - **No reference needed**: none is loaded and none is run.
    - **A reference needed, but none given**: with adapters it is the model without them; otherwise TRL loads the model
      again by its name, or a model without a name is copied.
    - **State of the loss** is written into every checkpoint and restored by `train(resume_from_checkpoint=...)`.
    - **Losses that look at an optimiser step as a whole** get one more pass without gradients over its micro-batches.
      Where a reference is run on the fly, its results are kept for the second pass.
    - Evaluation computes the loss with its state frozen. `logps/*` in the logs are sums, as in TRL.

    Args:
        model: Model or its name.
        ref_model: Reference; refused where the loss needs none.
        args: A `PreferenceConfig`.
        loss: Loss object, or a name; None takes `args.method` and `args.method_kwargs`.
        **kwargs: Further arguments of `DPOTrainer`: `train_dataset`, `eval_dataset`, `processing_class`, `peft_config`,
            `callbacks` and others.

    Raises:
        ValueError: If an option would be ignored, the loss needs several negatives per prompt, a reference is given or
            precomputed that nobody reads, the model adds a load-balancing loss, or the data have rows that can't be
            trained on: missing columns, empty or identical completions, prompts that fill `max_length`. `train` raises it
            if a batch would have fewer pairs than the loss needs, or a log-probability isn't finite.

    Examples:
        >>> from datasets import Dataset
        >>> from pref_opt.tiny import tiny_causal_lm, tiny_tokenizer
        >>> from pref_opt.trl import PreferenceConfig, PreferenceTrainer
        >>> pairs = Dataset.from_list([{"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}] * 8)
        >>> tokenizer = tiny_tokenizer()
        >>> args = PreferenceConfig("out", method="simpo", bf16=False, use_cpu=True, report_to="none")
        >>> model = tiny_causal_lm(tokenizer)
        >>> trainer = PreferenceTrainer(model, args=args, train_dataset=pairs, processing_class=tokenizer)
        >>> trainer.ref_model is None  # and trainer.train() would go on
        True
    """

    # Our losses are means over the pairs of a micro-batch: the trainer divides by the number of micro-batches.
    loss_is_scaled_for_ga = False  # type: ignore[assignment]
    _tag_names = ["trl", "pref-opt"]  # noqa: RUF012 (as in TRL)
    _name = "preference optimisation"
    _paper: dict[str, str] = {}  # noqa: RUF012

    def __init__(
        self,
        model: Any,
        ref_model: PreTrainedModel | None = None,
        args: PreferenceConfig | None = None,
        loss: PreferenceLoss | str | None = None,
        **kwargs: Any,
    ) -> None:
        args = PreferenceConfig() if args is None else args
        if not isinstance(args, PreferenceConfig):
            raise ValueError(f"args must be a PreferenceConfig, got {type(args).__name__}")
        self.loss = _pairwise(choose_loss(loss, args.method, args.method_kwargs, default="dpo"))
        self._check_reference(ref_model, args)
        # TRL looks at the first row before anything else.
        if next(iter(kwargs.get("train_dataset") or ()), None) is None:
            raise ValueError("train_dataset must not be empty, got 0 rows")
        if not self.loss.requires_reference and kwargs.get("peft_config") is None:
            ref_model = _compat.reference_stub()
        elif ref_model is None and _has_to_be_copied(model, args, kwargs):
            ref_model = copy.deepcopy(model).requires_grad_(False)
        super().__init__(model, ref_model, args, **kwargs)
        if not self.loss.requires_reference:
            self.ref_model = None
        if _compat.needs_router_loss(self):
            raise ValueError(
                "router_aux_loss_coef must be 0 for a mixture-of-experts model, got None: "
                "the losses of this package don't add a load-balancing loss"
            )
        self.add_callback(LossStateCallback(self.loss))

    def _check_reference(self, ref_model: PreTrainedModel | None, args: PreferenceConfig) -> None:
        if self.loss.requires_reference:
            return
        name = method_name(self.loss)
        if ref_model is not None:
            raise ValueError(
                f"ref_model must be None: method {name!r} needs no reference, got {type(ref_model).__name__}"
            )
        for option in ("precompute_ref_log_probs", "sync_ref_model"):
            if getattr(args, option):
                raise ValueError(f"{option} must be False: method {name!r} needs no reference, got True")

    # --- data -----------------------------------------------------------------------------------------------------

    def check_rows(self, dataset: Any, name: str) -> None:
        """Raise ValueError where columns are missing, or completions are empty or identical."""
        first = next(iter(dataset), None)
        if first is None:
            raise ValueError(f"{name}_dataset must not be empty, got 0 rows")
        missing = [column for column in ("chosen", "rejected") if column not in first]
        if missing:
            raise ValueError(
                f"{name}_dataset must have the columns chosen and rejected (and prompt, unless they start with it): "
                f"{', '.join(missing)} missing, got {', '.join(sorted(first))}"
            )
        if hasattr(dataset, "__len__"):
            _check_completions(dataset.select_columns(["chosen", "rejected"]), name)

    def check_dropped(self, dropped: int, total: int, max_length: int | None, name: str) -> None:
        """Raise ValueError where TRL has dropped rows."""
        if dropped:
            raise ValueError(
                f"{name}_dataset: the prompts of {dropped} of {total} rows are not shorter than max_length={max_length}, "
                "which leaves no completion; shorten them, drop these rows, or raise max_length"
            )

    # --- loss -----------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss of one micro-batch and log as TRL does; see `transformers.Trainer.compute_loss`."""
        training = _compat.is_training(self)
        # The reference goes first: its activations are gone before those of the policy, which have to stay, are made.
        reference = self._reference(inputs)
        tokens = _compat.policy_tokens(model, inputs)
        logps = self._pair_logps(tokens.logps.sum(1), reference, inputs)
        out = self.loss(logps, self._context(training))
        self._log_step("train" if training else "eval", inputs, tokens, out)
        if not return_outputs:
            return out.loss
        return out.loss, _compat.dense_outputs(model, inputs)

    def _context(self, training: bool) -> LossContext:
        if not training:
            return LossContext(training=False)
        return LossContext(
            training=True,
            gather=self.accelerator.gather,
            world_size=self.accelerator.num_processes,
            process_index=self.accelerator.process_index,
        )

    def _reference(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
        """Return sums of log-probabilities under the reference, from the columns of the batch or computed."""
        if not self.loss.requires_reference:
            return None
        if "ref_chosen_logps" in inputs:
            return inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        return _compat.reference_logps(self, inputs)

    def _pair_logps(self, sums: Tensor, reference: tuple[Tensor, Tensor] | None, inputs: Mapping[str, Any]) -> Logps:
        lengths = _compat.completion_mask(inputs).sum(1)
        divisor = lengths.clamp(min=1) if self.loss.length_normalized else torch.ones_like(lengths)
        joined = None if reference is None else torch.cat(reference).to(sums.dtype)
        self._check_finite({"policy": sums} if joined is None else {"policy": sums, "reference": joined}, inputs)
        chosen, rejected = (sums / divisor).chunk(2)
        ref_chosen, ref_rejected = (None, None) if joined is None else (joined / divisor).chunk(2)
        chosen_lengths, rejected_lengths = lengths.chunk(2)
        return Logps(chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths)

    def _check_finite(self, logps: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> None:
        """Raise ValueError that names the first row whose log-probability isn't finite; one wait for the device."""
        finite = torch.stack([sums.detach().isfinite() for sums in logps.values()])
        if finite.all():
            return
        which, row = finite.logical_not().nonzero()[0].tolist()
        who, sums = list(logps.items())[which]
        side, pair = ("chosen", row) if row < len(sums) // 2 else ("rejected", row - len(sums) // 2)
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        text = _compat.decoded(self, ids)
        raise ValueError(
            f"log-probabilities under the {who} must be finite, got {float(sums[row].detach())} for the {side} completion of row "
            f"{pair} of a batch, at step {self.state.global_step}: {text[:200]!r}"
        )

    # --- the whole of an optimiser step ---------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Fetch the micro-batches of an optimiser step, and show them to a loss that wants to see all of them first."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if batches and self.loss.wants_window:
            batches = [_compat.on_device(self, batch) for batch in batches]
            self._show_window(batches)
        return batches, num_items

    @torch.no_grad()
    def _show_window(self, batches: list[dict[str, Any]]) -> None:
        model = self.model_wrapped
        window = []
        for batch in batches:
            # Neither dropout nor gradient checkpointing in a pass without gradients.
            with evaluating(model), self.compute_loss_context_manager():
                reference = self._reference(batch)
                sums = _compat.policy_tokens(model, batch).logps.sum(1)
            if reference is not None:
                batch["ref_chosen_logps"], batch["ref_rejected_logps"] = reference
            window.append(self._pair_logps(sums, reference, batch))
        self.loss.prepare_window(window, self._context(training=True))

    # --- logs -----------------------------------------------------------------------------------------------------

    def _log_step(self, mode: str, inputs: Mapping[str, Any], tokens: _compat.TokenOutputs, out: LossOutput) -> None:
        """Log under TRL's names and those of the loss; one gather and one wait for the device per micro-batch."""
        ratios = self._ratios(inputs, tokens, out)
        parts = [part for pair in ratios.values() for part in pair] + [inputs["attention_mask"].sum()]
        summed = self.accelerator.gather(torch.stack([part.detach().double() for part in parts])[None]).sum(0)
        *values, num_tokens = summed.tolist()
        for name, total, count in zip(ratios, values[::2], values[1::2], strict=True):
            _compat.log_metric(self, mode, name, total / count if count else 0.0)
        _compat.count_tokens(self, mode, num_tokens)

    def _ratios(
        self, inputs: Mapping[str, Any], tokens: _compat.TokenOutputs, out: LossOutput
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return what is logged as a sum and what it is divided by, both to be added over processes."""
        mask = _compat.completion_mask(inputs)
        chosen_mask, rejected_mask = mask.chunk(2)
        chosen_logits, rejected_logits = (tokens.mean_logits * mask).chunk(2)
        chosen_logps, rejected_logps = tokens.logps.sum(1).chunk(2)
        hits = tokens.is_top1.chunk(2)[0] & chosen_mask
        margins = out.chosen_rewards - out.rejected_rewards
        one = mask.new_ones((), dtype=torch.float64)
        ratios = {
            "entropy": ((tokens.entropy * mask).sum(), mask.sum()),
            "logits/chosen": (chosen_logits.sum(), chosen_mask.sum()),
            "logits/rejected": (rejected_logits.sum(), rejected_mask.sum()),
            "mean_token_accuracy": (hits.sum(), chosen_mask.sum()),
        }
        per_pair = {
            "rewards/chosen": out.chosen_rewards,
            "rewards/rejected": out.rejected_rewards,
            "rewards/accuracies": margins > 0,
            "rewards/margins": margins,
            "logps/chosen": chosen_logps,
            "logps/rejected": rejected_logps,
        }
        ratios |= {name: (values.sum(), one * values.numel()) for name, values in per_pair.items()}
        return ratios | {name: (value, one) for name, value in out.metrics.items()}

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; with a checkpoint, the state of the loss is restored as well. See `transformers.Trainer.train`."""
        check_batch_sizes(self, self.loss)
        resume_loss(self.loss, resume_from_checkpoint, self.args.output_dir)
        return super().train(resume_from_checkpoint, *args, **kwargs)


def _pairwise(loss: PreferenceLoss) -> PreferenceLoss:
    """Return the loss if it takes pairs."""
    if loss.multi_negative:
        raise ValueError(
            f"method {method_name(loss)!r} needs several rejected completions per prompt: "
            "loss must be pairwise here; use pref_opt.multi_negative.MultiNegativeTrainer"
        )
    return loss


def _has_to_be_copied(model: Any, args: PreferenceConfig, kwargs: Mapping[str, Any]) -> bool:
    """Return whether the reference is the model itself but can neither be loaded by name nor be had by an adapter."""
    if isinstance(model, str) or args.precompute_ref_log_probs or kwargs.get("peft_config") is not None:
        return False
    return isinstance(model, PreTrainedModel) and not model.config._name_or_path


def _check_completions(pairs: Iterable[Mapping[str, Any]], name: str) -> None:
    """Raise ValueError that counts the rows that are no pairs of two different completions, and names the first of a kind."""
    bad: dict[str, list[int]] = {}
    for row, pair in enumerate(pairs):
        for kind in _faults(pair["chosen"], pair["rejected"]):
            bad.setdefault(kind, []).append(row)
    found = [f"{len(rows)} rows with {kind} (the first is row {rows[0]})" for kind, rows in bad.items()]
    if found:
        raise ValueError(f"{name}_dataset must have pairs of two different completions, got {'; '.join(found)}")


def _faults(chosen: Any, rejected: Any) -> Iterator[str]:
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if is_empty(value):
            yield f"empty {name}"
        elif isinstance(value, list) and not is_messages(value):
            yield f"several completions as {name}, which pref_opt.multi_negative.MultiNegativeTrainer takes"
        elif not isinstance(value, (str, list)):
            yield f"{type(value).__name__} as {name} and not text or messages"
    if chosen == rejected:
        yield "identical chosen and rejected"
