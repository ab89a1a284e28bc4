"""One test per assumption about TRL and transformers: a release that breaks one shows here which."""

import copy
import dataclasses
import inspect
import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from pref_opt import _compat
from pref_opt.tiny import tiny_causal_lm, tiny_tokenizer

# TRL still uses the old names of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

PAIRS = [
    {"prompt": "one", "chosen": " two three", "rejected": " four"},
    {"prompt": "five six", "chosen": " seven", "rejected": " eight nine ten"},
    {"prompt": "seven seven", "chosen": " one", "rejected": " ten"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(word for row in PAIRS for word in row.values())


@pytest.fixture
def model(tokenizer):
    return tiny_causal_lm(tokenizer, hidden=16, layers=1)


@pytest.fixture
def build(tmp_path, tokenizer, model):
    """Return a function that makes a trainer of TRL with the options given."""

    def make(trainer=DPOTrainer, rows=PAIRS, **options):
        names = ("model", "ref_model", "peft_config", "eval_dataset", "callbacks")
        given = {name: options.pop(name) for name in names if name in options}
        made = given.pop("model", None) or copy.deepcopy(model)
        if "peft_config" not in given and not hasattr(made, "peft_config"):
            given.setdefault("ref_model", copy.deepcopy(made))
        args = {
            "per_device_train_batch_size": 3,
            "max_steps": 1,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "report_to": "none",
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        config = DPOConfig(str(tmp_path / "out"), **args | options)
        data = Dataset.from_list(rows)
        return trainer(made, args=config, train_dataset=data, processing_class=tokenizer, **given)

    return make


def batch_of(trainer):
    return next(iter(trainer.get_train_dataloader()))


def dense_logps(model, inputs):
    """Return log-probabilities of the completions [2B, L-1] from the model's logits."""
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    logps = logits[:, :-1].log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    return logps * inputs["completion_mask"][:, 1:]


def test_every_option_of_trl_is_known():
    inherited = {field.name for base in DPOConfig.__mro__[1:-1] for field in dataclasses.fields(base)}
    own = {field.name for field in dataclasses.fields(DPOConfig)} - inherited
    used = {
        "model_init_kwargs",
        "trust_remote_code",
        "disable_dropout",
        "dataset_num_proc",
        "max_length",
        "truncation_mode",
        "pad_to_multiple_of",
        "precompute_ref_log_probs",
        "precompute_ref_batch_size",
        "activation_offloading",
        "sync_ref_model",
        "ref_model_mixup_alpha",
        "ref_model_sync_steps",
        "pad_token",
    }
    # A new option belongs into one of the two sets.
    assert own == used | set(_compat.IGNORED_OPTIONS) | {"router_aux_loss_coef"}


def test_options_left_alone_are_accepted(tmp_path):
    _compat.refuse_ignored_options(DPOConfig(str(tmp_path), bf16=False, use_cpu=True, router_aux_loss_coef=0.0))
    with pytest.raises(ValueError, match=r"beta must be left at 0\.1, got 0\.2"):
        _compat.refuse_ignored_options(DPOConfig(str(tmp_path), bf16=False, use_cpu=True, beta=0.2))


def test_the_old_name_of_an_option_does_not_warn_of_itself(tmp_path):
    class Config(DPOConfig):
        def __post_init__(self):
            _compat.use_new_names(self)
            super().__post_init__()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        on, off = (Config(str(tmp_path), bf16=False, use_cpu=True, gradient_checkpointing=x) for x in (True, False))
    assert (on.gradient_checkpointing, off.gradient_checkpointing) == (True, False)


def test_batches_hold_the_chosen_rows_first(build, tokenizer):
    trainer = build(pad_to_multiple_of=8)
    inputs = batch_of(trainer)
    assert set(inputs) == {"input_ids", "attention_mask", "completion_mask"}
    assert inputs["input_ids"].shape == (6, 8)
    labels, mask = _compat.completion_labels(inputs), _compat.completion_mask(inputs)
    assert mask.shape == (6, 7)
    assert mask.dtype == torch.bool
    assert ((labels[:, 1:] != -100) == mask).all()
    said = [tokenizer.decode(row[row != -100], skip_special_tokens=True) for row in labels]
    told = [tokenizer.decode(row, skip_special_tokens=True) for row in inputs["input_ids"]]
    order = [
        [row["prompt"] for row in PAIRS].index(text.removesuffix(end)) for text, end in zip(told, said, strict=True)
    ]
    assert order[:3] == order[3:]
    assert said == [PAIRS[i]["chosen"] for i in order[:3]] + [PAIRS[i]["rejected"] for i in order[3:]]
    assert all(row[row != -100][-1] == tokenizer.eos_token_id for row in labels)  # the end counts


def test_the_head_returns_log_probabilities_of_the_completions(build):
    trainer = build()
    inputs = batch_of(trainer)
    tokens = _compat.policy_tokens(trainer.model, inputs)
    torch.testing.assert_close(tokens.logps, dense_logps(trainer.model, inputs), rtol=1e-5, atol=1e-5)
    assert tokens.logps.requires_grad
    assert tokens.logps.dtype == torch.float32
    assert {x.shape for x in tokens} == {tokens.logps.shape}
    assert not tokens.logps[~_compat.completion_mask(inputs)].any()
    logits = _compat.dense_outputs(trainer.model, inputs).logits[:, :-1]
    mask = _compat.completion_mask(inputs)
    torch.testing.assert_close(tokens.mean_logits[mask], logits.mean(-1)[mask], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        tokens.entropy[mask], torch.distributions.Categorical(logits=logits).entropy()[mask], rtol=1e-4, atol=1e-4
    )
    assert (tokens.is_top1[mask] == (logits.argmax(-1) == inputs["input_ids"][:, 1:])[mask]).all()


def test_virtual_tokens_of_an_adapter_are_cut_off(build, model):
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = build(peft_config=prompt)
    inputs = batch_of(trainer)
    tokens = _compat.policy_tokens(trainer.model, inputs)
    assert tokens.logps.shape == _compat.completion_mask(inputs).shape
    assert ((tokens.logps != 0) == _compat.completion_mask(inputs)).all()


def test_the_patched_model_still_has_its_own_forward(build):
    trainer = build()
    inputs = batch_of(trainer)
    out = _compat.dense_outputs(trainer.model, inputs)
    assert out.logits.shape[:2] == inputs["input_ids"].shape
    assert not out.logits.requires_grad


@pytest.mark.parametrize("kind", ["model", "new adapter", "given adapter"])
def test_references_are_sums_under_the_start(build, model, kind):
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    given = {
        "model": {},
        "new adapter": {"peft_config": lora},  # the reference is the model without it
        "given adapter": {"model": get_peft_model(copy.deepcopy(model), lora)},  # the reference is a copy of it
    }
    trainer = build(**given[kind])
    inputs = batch_of(trainer)
    want = dense_logps(model if kind == "new adapter" else trainer.model, inputs).sum(1)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad and ".ref." not in name:
                parameter += 0.1
    assert (dense_logps(trainer.model, inputs).sum(1) - want).abs().max() > 1e-2
    chosen, rejected = _compat.reference_logps(trainer, inputs)
    assert not chosen.requires_grad
    torch.testing.assert_close(torch.cat([chosen, rejected]), want, rtol=1e-4, atol=1e-4)


def test_precomputed_references_are_columns_of_sums(build):
    inputs = batch_of(build(precompute_ref_log_probs=True, ref_model=None))
    plain = build()
    chosen, rejected = _compat.reference_logps(plain, inputs)
    torch.testing.assert_close(inputs["ref_chosen_logps"], chosen, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inputs["ref_rejected_logps"], rejected, rtol=1e-5, atol=1e-5)


def test_a_model_without_a_name_needs_its_reference_given(build):
    with pytest.raises(OSError, match="Repo id must"):
        build(ref_model=None)


def test_the_stub_is_small_and_never_called(build):
    state = torch.get_rng_state()
    stub = _compat.reference_stub()
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(parameter.numel() for parameter in stub.parameters()) < 1000

    class Alone(DPOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return _compat.policy_tokens(model, inputs).logps.sum()

    trainer = build(Alone, ref_model=stub)
    stub.model.register_forward_hook(lambda *args: pytest.fail("the stub was called"))
    trainer.train()


def test_preparing_a_batch_again_changes_nothing(build):
    trainer = build()
    inputs = batch_of(trainer)
    once = _compat.on_device(trainer, inputs)
    once["extra"] = torch.ones(2)
    twice = _compat.on_device(trainer, once)
    assert "extra" not in inputs
    assert all(twice[name] is once[name] for name in once)


def test_the_mode_is_that_of_the_model(build):
    trainer = build(eval_dataset=Dataset.from_list(PAIRS))
    seen = []

    class Looking(TrainerCallback):
        def on_prediction_step(self, *args, **kwargs):
            seen.append(_compat.is_training(trainer))

        def on_substep_end(self, *args, **kwargs):
            seen.append(_compat.is_training(trainer))

        on_step_end = on_substep_end

    trainer.add_callback(Looking())
    trainer.train()
    trainer.evaluate()
    assert seen == [True, False]


def test_ids_become_text(build, tokenizer):
    assert _compat.decoded(build(), torch.tensor(tokenizer("six")["input_ids"])) == "six"


def test_metrics_are_averaged_and_cleared_by_the_log(build):
    trainer = build()
    for value in (1.0, 4.0):
        _compat.log_metric(trainer, "train", "mine", value)
    _compat.log_metric(trainer, "eval", "mine", 7.0)
    _compat.count_tokens(trainer, "train", 5.0)
    _compat.count_tokens(trainer, "train", 6.0)
    _compat.count_tokens(trainer, "eval", 9.0)
    trainer.model.train()
    trainer.log({})
    trainer.model.eval()
    trainer.log({})
    train, evaluation = trainer.state.log_history
    assert (train["mine"], train["num_tokens"]) == (2.5, 11)
    assert (evaluation["eval_mine"], evaluation["eval_num_tokens"]) == (7.0, 11)
    trainer.model.train()
    trainer.log({})
    assert "mine" not in trainer.state.log_history[-1]
    with pytest.raises(ValueError, match="mode must be one of 'eval', 'train', got 'test'"):
        _compat.log_metric(trainer, "test", "mine", 1.0)


@pytest.mark.parametrize(("coefficient", "needed"), [(None, True), (0.0, False)])
def test_mixtures_of_experts_add_a_loss(build, tokenizer, coefficient, needed):
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    trainer = build(model=MixtralForCausalLM(config), router_aux_loss_coef=coefficient)
    assert _compat.needs_router_loss(trainer) == needed


def test_dense_models_add_none(build):
    assert not _compat.needs_router_loss(build())


def test_trls_head_is_a_function_of_its_own():
    hidden, weight = torch.randn(7, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    labels = torch.randint(9, (7,))
    logps = _compat.head_logps(hidden, weight, labels)
    want = (hidden @ weight.T).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(logps, want, rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.autograd.grad(x.sum(), (hidden, weight)) for x in (logps, want))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_data_are_seen_before_and_after_they_are_tokenised(build):
    seen = []

    class Seeing(_compat.HostTrainer):
        def check_rows(self, dataset, name):
            seen.append((name, dataset[0]["chosen"]))

        def check_dropped(self, dropped, total, max_length, name):
            seen.append((name, dropped, total, max_length))

    long = {"prompt": "one " * 20, "chosen": " two", "rejected": " six"}
    trainer = build(Seeing, [*PAIRS, long], max_length=10, eval_dataset=Dataset.from_list(PAIRS))
    assert seen == [("train", " two three"), ("train", 1, 4, 10), ("eval", " two three"), ("eval", 0, 3, 10)]
    assert len(trainer.train_dataset) == 3  # without a word
    trainer.evaluate(Dataset.from_list([long | {"prompt": "one"}]))
    assert seen[4:] == [("eval", " two"), ("eval", 0, 1, 10)]


def test_the_batches_of_a_step_are_fetched_together(build):
    fetched = []

    class Fetching(DPOTrainer):
        def get_batch_samples(self, *args, **kwargs):
            batches, count = super().get_batch_samples(*args, **kwargs)
            fetched.append(len(batches))
            return batches, count

    build(Fetching, per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=4).train()
    assert fetched[:4] == [2, 1, 2, 1]  # three pairs: the last step of an epoch has one
    assert list(inspect.signature(Trainer.get_batch_samples).parameters)[1:] == [
        "epoch_iterator",
        "num_batches",
        "device",
    ]


def test_the_trainer_divides_by_the_micro_batches(build):
    def gradient(scaled, **options):
        class Constant(DPOTrainer):
            loss_is_scaled_for_ga = scaled

            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                assert num_items_in_batch is None
                return _compat.policy_tokens(model, inputs).logps.sum()

        trainer = build(Constant, PAIRS[:2], per_device_train_batch_size=1, max_grad_norm=1e9, **options)
        trainer.train()
        return trainer.state.log_history[0]["grad_norm"]

    assert gradient(True, gradient_accumulation_steps=2) == pytest.approx(
        2 * gradient(False, gradient_accumulation_steps=2), rel=1e-5
    )


def test_checkpoints_are_complete_when_callbacks_hear_of_them(build, tmp_path):
    seen = []

    class Saving(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen.extend(sorted(path.name for path in (tmp_path / "out" / f"checkpoint-{state.global_step}").iterdir()))
            assert args.should_save

    build(callbacks=[Saving()], save_strategy="steps", save_steps=1).train()
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json"} <= set(seen)
