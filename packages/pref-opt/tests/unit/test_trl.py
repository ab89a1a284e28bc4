"""The trainer beside TRL's own on a model of two layers, its checkpoints, and what it refuses."""

import copy
import json
import math
import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import HfArgumentParser
from trl import DPOConfig, DPOTrainer

from pref_opt.losses import LossOutput, PreferenceLoss, make_loss
from pref_opt.tiny import tiny_causal_lm, tiny_tokenizer
from pref_opt.trl import PreferenceConfig, PreferenceTrainer, load_loss_state, save_loss_state

# TRL still uses the old names of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

COMMON = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "max_length": 64,
    "save_strategy": "no",
    "seed": 0,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
# Names that TRL logs and that must be the same; timings aside.
SHARED = (
    "loss",
    "grad_norm",
    "entropy",
    "num_tokens",
    "mean_token_accuracy",
    "logits/chosen",
    "logits/rejected",
    "logps/chosen",
    "logps/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
)


def rows(count=24):
    return [
        {"prompt": f"{i} + {j} =", "chosen": f" {i + j}", "rejected": f" {i + 2 * j + 1}, or so"}
        for i, j in ((n, (7 * n) % 11) for n in range(count))
    ]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(word for row in rows() for word in row.values())


@pytest.fixture(scope="module")
def data():
    return Dataset.from_list(rows())


@pytest.fixture
def model(tokenizer):
    return tiny_causal_lm(tokenizer, hidden=32)


@pytest.fixture
def build(tmp_path, tokenizer, data, model):
    """Return a function that makes a trainer with the method and the options given."""

    def make(method="dpo", method_kwargs=None, *, loss=None, trainer=None, **options):
        ours = {"method": method, "method_kwargs": method_kwargs} if loss is None else {}
        names = ("model", "ref_model", "train_dataset", "eval_dataset", "peft_config", "callbacks", "compute_metrics")
        given = {name: options.pop(name) for name in names if name in options}
        given = {"train_dataset": data, "processing_class": tokenizer, **given}
        args = PreferenceConfig(str(tmp_path / "out"), **COMMON | ours | options)
        made = given.pop("model", None) or copy.deepcopy(model)
        return PreferenceTrainer(made, args=args, loss=loss, **given)

    return make


@pytest.fixture
def theirs(tmp_path, tokenizer, data, model):
    """Return a function that makes TRL's own trainer."""

    def make(**options):
        names = ("model", "ref_model", "train_dataset", "eval_dataset", "peft_config")
        given = {name: options.pop(name) for name in names if name in options}
        given = {"train_dataset": data, "processing_class": tokenizer, **given}
        args = DPOConfig(str(tmp_path / "theirs"), **COMMON | options)
        made = given.pop("model", None) or copy.deepcopy(model)
        if "peft_config" not in given and not args.precompute_ref_log_probs:
            given.setdefault("ref_model", copy.deepcopy(made))
        return DPOTrainer(made, args=args, **given)

    return make


def steps(trainer, names=("loss",)):
    """Train and return what was logged at each step."""
    trainer.train()
    return [[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry]


class Counting(PreferenceLoss):
    """A small loss with a state of every kind that depends on everything before."""

    def __init__(self, beta=0.1, window=False):
        self.beta = beta
        self.window = window
        self.mean = torch.zeros(())
        self.calls = 0
        self.scale = 1.0
        self.seen = []

    @property
    def wants_window(self):
        return self.window

    def prepare_window(self, window, context):
        assert context.training
        assert not any(logps.chosen.requires_grad for logps in window)
        self.seen.append([self._gap(logps).tolist() for logps in window])

    def _gap(self, logps):
        return logps.chosen - logps.rejected - (logps.ref_chosen - logps.ref_rejected)

    def __call__(self, logps, context):
        gap = self._gap(logps)
        if context.training:
            self.mean = 0.9 * self.mean + 0.1 * context.gather(gap.detach()).mean()
            self.calls += 1
            self.scale *= 1.1
        loss = -torch.nn.functional.logsigmoid(self.beta * self.scale * (gap - self.mean)).mean()
        rewards = (self.beta * (logps.chosen - logps.ref_chosen), self.beta * (logps.rejected - logps.ref_rejected))
        return LossOutput(loss, *(x.detach() for x in rewards), {"moving": self.mean})

    def state_dict(self):
        return {"mean": self.mean, "calls": self.calls, "scale": self.scale}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.mean, self.calls, self.scale = state["mean"], state["calls"], state["scale"]


# --- beside TRL's own trainers ------------------------------------------------------------------------------------


def test_dpo_inside_is_trls_dpo(build, theirs):
    ours, reference = steps(build(method_kwargs={"beta": 0.3}), SHARED), steps(theirs(beta=0.3), SHARED)
    assert ours[0][0] == pytest.approx(0.693147, abs=1e-6)
    assert ours[-1][0] < 0.69
    for mine, other in zip(ours, reference, strict=True):
        assert mine == pytest.approx(other, rel=1e-6, abs=1e-6)


def test_dpo_inside_is_trls_dpo_with_lora(build, theirs):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    ours, reference = build(peft_config=lora, learning_rate=1e-2), theirs(peft_config=lora, learning_rate=1e-2)
    mine, other = steps(ours, SHARED), steps(reference, SHARED)
    assert ours.ref_model is None
    assert mine[-1][0] < 0.6931
    for left, right in zip(mine, other, strict=True):
        assert left == pytest.approx(right, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"gradient_checkpointing": True}, {"precompute_ref_log_probs": True}, {"peft_config": LoraConfig(r=2)}],
)
def test_no_warnings_that_nobody_can_heed(build, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(max_steps=1, **options).train()


def test_precomputed_references_give_the_same_steps(build, theirs):
    ours = build(precompute_ref_log_probs=True)
    assert ours.ref_model is None
    reference = steps(theirs(), SHARED)
    for mine, other in zip(steps(ours, SHARED), reference, strict=True):
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("precompute", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_means_inside_are_trls_sigmoid_norm(build, theirs, precompute):
    ours = steps(build("dpo_norm", {"beta": 2.0}, precompute_ref_log_probs=precompute))
    other = steps(theirs(loss_type=["sigmoid_norm"], beta=2.0))
    assert ours[-1][0] < 0.69
    for mine, right in zip(ours, other, strict=True):
        assert mine == pytest.approx(right, rel=1e-5, abs=1e-6)


def test_simpo_inside_is_trls_simpo(build, tmp_path, tokenizer, data, model):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    args = CPOConfig(str(tmp_path / "cpo"), **COMMON, loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=0.8)
    reference = CPOTrainer(copy.deepcopy(model), args=args, train_dataset=data, processing_class=tokenizer)
    ours = build("simpo", {"beta": 2.0, "gamma_beta_ratio": 0.4})
    names = ("loss", "rewards/margins", "rewards/accuracies")
    for mine, other in zip(steps(ours, names), steps(reference, names), strict=True):
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("size", "micro_batches"), [(4, 2), pytest.param(2, 4, marks=pytest.mark.slow)])
def test_accumulation_is_a_larger_batch(build, size, micro_batches):
    whole = steps(build(per_device_train_batch_size=8, max_steps=2), SHARED)
    parts = build(per_device_train_batch_size=size, gradient_accumulation_steps=micro_batches, max_steps=2)
    for mine, other in zip(steps(parts, SHARED[:2]), whole, strict=True):
        assert mine == pytest.approx(other[:2], rel=1e-4)


# --- references ---------------------------------------------------------------------------------------------------


def count_forwards(trainer):
    """Count forward passes of all models the trainer has, with a gradient and without."""
    counted = {"with": 0, "without": 0}

    def count(module, args, output):
        counted["with" if torch.is_grad_enabled() else "without"] += 1

    for model in {id(m): m for m in (trainer.model, trainer.ref_model) if m is not None}.values():
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        base.model.register_forward_hook(count)
    return counted


@pytest.mark.parametrize("adapted", [None, "config", "model"])
def test_no_reference_is_made_or_run_where_none_is_needed(build, model, adapted):
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    given = {None: {}, "config": {"peft_config": lora}, "model": {"model": get_peft_model(copy.deepcopy(model), lora)}}
    trainer = build("simpo", eval_dataset=Dataset.from_list(rows(4)), **given[adapted])
    assert trainer.ref_model is None
    if adapted == "model":
        assert list(trainer.model.peft_config) == ["default"]
    counted = count_forwards(trainer)
    trainer.train()
    assert counted == {"with": 3, "without": 0}
    trainer.evaluate()
    assert counted == {"with": 3, "without": 1}


def test_a_needed_reference_is_a_copy_that_stays(build, model):
    trainer = build()
    counted = count_forwards(trainer)
    before = copy.deepcopy(trainer.ref_model.state_dict())
    trainer.train()
    assert counted == {"with": 3, "without": 3}
    assert all(torch.equal(value, before[name]) for name, value in trainer.ref_model.state_dict().items())
    assert any(not torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in trainer.ref_model.parameters())


# --- losses -------------------------------------------------------------------------------------------------------


def test_name_class_and_object_are_the_same(build):
    by_method = steps(build("simpo", {"beta": 3.0}, max_steps=1))
    assert by_method == steps(build(loss=make_loss("simpo", beta=3.0), max_steps=1))
    assert by_method == steps(build("simpo", '{"beta": 3.0}', max_steps=1))
    assert build(loss="simpo").loss.length_normalized


PAIRWISE = [
    "cdpo",
    "robust_dpo",
    "ipo",
    "cpo",
    "slic",
    "orpo",
    "kto_pair",
    "beta_dpo",
    "dr_dpo",
    "alpha_dpo",
    "gamma_po",
]


@pytest.mark.slow
@pytest.mark.parametrize("method", [*PAIRWISE, "repo", "repo_plus_plus"])
def test_every_pairwise_loss_trains(build, method):
    trainer = build(method, max_steps=2)
    assert all(math.isfinite(loss) for (loss,) in steps(trainer))
    assert "rewards/margins" in trainer.state.log_history[0]


def test_evaluation_leaves_the_state_alone(build):
    loss = Counting()
    trainer = build(loss=loss, eval_dataset=Dataset.from_list(rows(10)))
    trainer.train()
    before = copy.deepcopy(loss.state_dict())
    metrics = trainer.evaluate()
    assert loss.state_dict() == before
    assert loss.calls == 3
    assert metrics["eval_loss"] > 0
    logged = trainer.state.log_history[-1]
    assert {f"eval_{name}" for name in SHARED if name not in ("loss", "grad_norm")} <= set(logged)
    assert logged["eval_moving"] == pytest.approx(float(loss.mean))


def test_metrics_for_users_get_logits(build, tokenizer):
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions.shape)
        return {"mine": 1.0}

    trainer = build(eval_dataset=Dataset.from_list(rows(4)), compute_metrics=metrics)
    assert trainer.evaluate()["eval_mine"] == 1.0
    assert seen[0][::2] == (8, len(tokenizer))


# --- the whole of an optimiser step -------------------------------------------------------------------------------


def test_a_window_is_shown_before_each_step(build):
    loss = Counting(window=True)
    accumulated = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer = build(loss=loss, **accumulated)
    counted = count_forwards(trainer)
    shown = steps(trainer)
    assert [len(window) for window in loss.seen] == [4, 4, 4]
    assert loss.calls == 12
    # 12 micro-batches: one pass of the policy with a gradient and one without; the reference is run once.
    assert counted == {"with": 12, "without": 24}
    assert trainer.model.training
    # The first window is before any update: the policy is its reference. Looking changes nothing in the steps.
    assert all(gap == pytest.approx(0, abs=1e-5) for part in loss.seen[0] for gap in part)
    assert any(abs(gap) > 1e-3 for part in loss.seen[1] for gap in part)
    assert shown == steps(build(loss=Counting(), **accumulated))


def test_losses_over_a_step_do_not_depend_on_the_micro_batches(build):
    options = {"max_steps": 2, "learning_rate": 1e-2}
    whole = steps(build("dr_dpo", {"group": "global"}, per_device_train_batch_size=8, **options), ("loss", "grad_norm"))
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    split = steps(build("dr_dpo", {"group": "step"}, **parts, **options), ("loss", "grad_norm"))
    for mine, other in zip(split, whole, strict=True):
        assert mine == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize(
    ("method", "over_a_step", "over_a_batch"),
    [
        ("dr_dpo", {"group": "step"}, {"group": "global"}),
        ("alpha_dpo", {"alpha": 0.5, "stats_window": "step"}, {"alpha": 0.5}),
        ("beta_dpo", {"window": "step", "filter_ratio": 0.25}, {"filter_ratio": 0.25}),
    ],
)
def test_the_last_step_of_an_epoch_counts_what_it_has(build, method, over_a_step, over_a_batch):
    """Of 13 rows the second step has 5: in two micro-batches of 2 and one of 1, fewer than the four of the first."""
    options = {"train_dataset": Dataset.from_list(rows(13)), "max_steps": 4, "learning_rate": 1e-2, "optim": "sgd"}
    whole = steps(build(method, over_a_batch, per_device_train_batch_size=8, **options), ("loss", "grad_norm"))
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    split = steps(build(method, over_a_step, **parts, **options), ("loss", "grad_norm"))
    assert whole[1][1] > 1e-2
    for mine, other in zip(split, whole, strict=True):
        assert mine == pytest.approx(other, rel=1e-3)


@pytest.mark.parametrize("method", ["beta_dpo", "alpha_dpo"])
def test_batches_without_two_pairs_to_compare(build, method):
    alone = (
        rf"method '{method}' compares the rows of a batch .* at least 2: raise per_device_train_batch_size, got 1 on 1"
    )
    with pytest.raises(ValueError, match=alone + ".*micro-batches of gradient accumulation are not seen"):
        build(method, per_device_train_batch_size=1, gradient_accumulation_steps=4).train()
    last = r"the last batch of an epoch has 1 of the 13 rows of train_dataset: set dataloader_drop_last=True"
    odd = Dataset.from_list(rows(13))
    with pytest.raises(ValueError, match=last):
        build(method, train_dataset=odd, max_steps=4).train()
    with pytest.raises(ValueError, match=last):
        build(method, train_dataset=odd, max_steps=-1, num_train_epochs=1).train()


def test_batches_with_enough_to_compare(build):
    odd = Dataset.from_list(rows(13))
    dropping = build("alpha_dpo", train_dataset=odd, max_steps=4, dataloader_drop_last=True)
    assert len(steps(dropping)) == 4
    assert len(steps(build("alpha_dpo", train_dataset=odd, max_steps=2))) == 2  # ends before the last batch
    small = {"per_device_train_batch_size": 1, "max_steps": 1}
    assert len(steps(build("gamma_po", {"pool": "gathered"}, **small))) == 1  # a single pair has the mean margin
    with pytest.warns(UserWarning, match="one pair per group is plain DPO: raise per_device_train_batch_size"):
        assert len(steps(build("dr_dpo", **small))) == 1
    assert len(steps(build("alpha_dpo", {"stats_window": "step"}, gradient_accumulation_steps=2, **small))) == 1
    assert len(steps(build("dpo", train_dataset=odd, **COMMON | {"max_steps": 4}))) == 4  # compares nothing


@pytest.mark.parametrize(("gamma", "share"), [(-1e3, 1.0), (1e3, 0.0)])
def test_pairs_that_are_skipped_are_reported(build, gamma, share):
    names = ("filtered_fraction", "grad_norm")
    logged = steps(build("repo", {"gamma": gamma}, max_steps=1), names)[0]
    assert logged[0] == share
    assert (logged[1] == 0) == (share == 1.0)


def test_pairs_that_are_filtered_are_reported(build):
    trainer = build("beta_dpo", {"filter_ratio": 0.25}, eval_dataset=Dataset.from_list(rows(4)))
    assert steps(trainer, ("kept_fraction",)) == [[0.75]] * 3
    assert trainer.evaluate()["eval_kept_fraction"] == 1.0  # evaluation looks at all of them


# --- checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [False, True])
def test_a_resumed_run_is_exact(build, tmp_path, window):
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    loss = Counting(window=window)
    whole = build(loss=loss, **saving)
    logged = steps(whole, ("loss", "moving", "grad_norm"))
    again = Counting(window=window)
    resumed = build(loss=again, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    ends = [[entry[name] for name in ("loss", "moving", "grad_norm")] for entry in resumed.state.log_history[2:4]]
    assert ends == logged[2:]
    assert again.state_dict() == loss.state_dict()
    assert again.calls == 8


def test_true_resumes_from_the_last_checkpoint(build, tmp_path):
    loss = Counting()
    build(loss=loss, save_strategy="steps", save_steps=3).train()
    again = Counting()
    build(loss=again, max_steps=4, save_strategy="no").train(resume_from_checkpoint=True)
    assert again.calls == 4
    assert not [path for path in (tmp_path / "out" / "checkpoint-3").iterdir() if path.name.startswith(".")]


def test_the_file_holds_tensors_and_plain_numbers(tmp_path):
    loss = Counting()
    loss.mean, loss.calls, loss.scale = torch.tensor([0.1, 2.0]), 7, 0.1 + 0.2
    path = save_loss_state(loss, tmp_path)
    with safe_open(path, "pt") as file:
        assert list(file.keys()) == ["mean"]
        assert file.metadata()["method"] == "Counting"
        assert json.loads(file.metadata()["numbers"]) == {"calls": 7, "scale": 0.1 + 0.2}
    again = Counting()
    load_loss_state(again, tmp_path)
    assert torch.equal(again.mean, loss.mean)
    assert (again.calls, again.scale) == (7, 0.1 + 0.2)
    assert [path.name for path in tmp_path.iterdir()] == ["preference_loss.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = save_loss_state(Counting(), tmp_path)
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        save_loss_state(Counting(beta=9.0), tmp_path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_another_methods_checkpoint_is_refused(build, tmp_path):
    build("alpha_dpo", save_strategy="steps", save_steps=3).train()
    trainer = build("gamma_po", {"base": "dpo"})
    with pytest.raises(ValueError, match=r"written by method 'alpha_dpo', but 'gamma_po' is trained"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))


def test_a_checkpoint_without_the_state_is_refused(build, tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(ValueError, match=r"checkpoint-1/preference_loss.safetensors is missing.*'alpha_dpo'"):
        build("alpha_dpo").train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    load_loss_state(make_loss("simpo"), tmp_path / "checkpoint-1")  # has no state to miss


def test_states_that_cannot_be_written(tmp_path):
    loss = Counting()
    loss.calls = [1, 2]
    with pytest.raises(ValueError, match="state 'calls' of a loss must be a tensor or a plain number, got list"):
        save_loss_state(loss, tmp_path)
    assert not list(tmp_path.iterdir())


# --- bad input ----------------------------------------------------------------------------------------------------


IGNORED = [
    ({"beta": 0.5}, r"beta must be left at 0.1, got 0.5.*method_kwargs=\{'beta'"),
    ({"label_smoothing": 0.1}, "label_smoothing must be left at 0.0, got 0.1"),
    ({"loss_type": ["ipo"]}, r"loss_type must be left at \['sigmoid'\], got \['ipo'\].*`method`"),
    ({"loss_weights": [0.5]}, "loss_weights must be left at None"),
    ({"ld_alpha": 0.5}, "ld_alpha must be left at None, got 0.5"),
    ({"f_divergence_type": "forward_kl"}, "f_divergence_type must be left at 'reverse_kl', got 'forward_kl'"),
    ({"f_alpha_divergence_coef": 0.7}, "f_alpha_divergence_coef must be left at 0.5"),
    ({"use_weighting": True}, "use_weighting must be left at False, got True"),
    ({"discopop_tau": 0.5}, "discopop_tau must be left at 0.05"),
    ({"padding_free": True}, "padding_free must be left at False"),
    ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef must be None or 0, got 0.1"),
    ({"method": "dopo"}, "method must be one of .*, got 'dopo'; did you mean 'dpo'"),
    ({"method_kwargs": "{beta"}, "method_kwargs must be a dictionary or its JSON, got '{beta'"),
    ({"method_kwargs": "[1]"}, r"method_kwargs must be a dictionary, got \[1\]"),
]


@pytest.mark.parametrize(("options", "message"), IGNORED, ids=range(len(IGNORED)))
def test_options_that_would_be_ignored(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        PreferenceConfig(str(tmp_path), **COMMON | options)


def test_arguments_that_contradict(build, model, tokenizer, data, tmp_path):
    bad = [
        ({"loss": "sdpo"}, r"'sdpo' needs several rejected.*MultiNegativeTrainer"),
        ({"method": "simpo", "ref_model": copy.deepcopy(model)}, "ref_model must be None: method 'simpo' needs no"),
        (
            {"method": "simpo", "precompute_ref_log_probs": True},
            "precompute_ref_log_probs must be False: method 'simpo'",
        ),
        ({"method": "simpo", "sync_ref_model": True}, "sync_ref_model must be False: method 'simpo'"),
        ({"method": "simpo", "method_kwargs": {"betta": 1}}, "'simpo' doesn't accept"),
        ({"method": "gama_po"}, "method must be one of .*, got 'gama_po'; did you mean 'gamma_po'"),
        ({"loss": "simppo"}, "method must be one of .*, got 'simppo'; did you mean 'simpo'"),
        *(
            ({"method": method, "method_kwargs": {"beta": beta}}, f"beta must be positive.*got {beta}")
            for method in ("dpo", "simpo", "beta_dpo", "dr_dpo", "alpha_dpo", "gamma_po", "repo_plus_plus")
            for beta in (0.0, -0.1)
        ),
    ]
    for options, message in bad:
        with pytest.raises(ValueError, match=message):
            build(**options)
    args = PreferenceConfig(str(tmp_path), **COMMON, method="simpo", method_kwargs={"beta": 2.0})
    given = {"train_dataset": data, "processing_class": tokenizer}
    with pytest.raises(ValueError, match="loss must not be an object where args name another: got 'ipo' beside"):
        PreferenceTrainer(model, args=args, loss=make_loss("ipo"), **given)
    with pytest.raises(ValueError, match=r"loss must be args.method if both are given, got 'ipo' and 'simpo'"):
        PreferenceTrainer(model, args=args, loss="ipo", **given)
    with pytest.raises(ValueError, match="args must be a PreferenceConfig, got DPOConfig"):
        PreferenceTrainer(model, args=DPOConfig(str(tmp_path), **COMMON), **given)


SOUND = {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}
BAD_ROWS = [
    ([{"prompt": "a", "chosen": "b"}], "train_dataset must have the columns .*: rejected missing, got chosen, prompt"),
    ([SOUND, SOUND | {"chosen": ""}], r"1 rows with empty chosen \(the first is row 1\)"),
    ([SOUND | {"rejected": ""}] * 3, r"3 rows with empty rejected \(the first is row 0\)"),
    ([SOUND, SOUND | {"chosen": " 3"}], r"1 rows with identical chosen and rejected \(the first is row 1\)"),
    ([SOUND, SOUND | {"prompt": "x" * 64}, SOUND], "prompts of 1 of 3 rows are not shorter than max_length=64"),
    (
        [{"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": ""}],
          "rejected": [{"role": "assistant", "content": "b"}]}],
        "1 rows with empty chosen",
    ),
    ([SOUND | {"rejected": ["3", "4"]}], "several completions as rejected, which .*MultiNegativeTrainer takes .*row 0"),
    ([SOUND | {"chosen": 2.0}] * 2, "2 rows with float as chosen and not text or messages"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "message"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_rows_that_cannot_be_trained_on(build, bad, message):
    with pytest.raises(ValueError, match=message):
        build(train_dataset=Dataset.from_list(bad))


def test_evaluation_data_are_checked_too(build):
    bad = Dataset.from_list([SOUND | {"chosen": ""}])
    with pytest.raises(ValueError, match="eval_dataset must have pairs"):
        build(eval_dataset=bad)
    with pytest.raises(ValueError, match="eval_dataset must have pairs"):
        build().evaluate(bad)
    with pytest.raises(ValueError, match="train_dataset must not be empty, got 0 rows"):
        build(train_dataset=bad.select([]))


@pytest.mark.parametrize("who", ["policy", "reference"])
def test_log_probabilities_that_are_no_numbers_name_the_row(build, model, tokenizer, who):
    ids = tokenizer("1 + 1 = 7")["input_ids"]
    broken = copy.deepcopy(model)
    data = Dataset.from_list(
        [*[row for row in rows() if "7" not in "".join(row.values())][:3], SOUND | {"chosen": " 7"}]
    )
    with torch.no_grad():
        broken.get_input_embeddings().weight[ids[-1]] = torch.nan
    broken.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    broken.config.tie_word_embeddings = False
    models = {"model": broken, "ref_model": model} if who == "policy" else {"ref_model": broken}
    trainer = build(train_dataset=data, **models)
    with pytest.raises(ValueError, match=rf"under the {who} must be finite, got nan for the chosen .*'1 \+ 1 = 7"):
        trainer.train()


def test_the_configuration_parses_from_a_command_line(tmp_path):
    words = ["--output_dir", str(tmp_path), "--method", "repo", "--method_kwargs", '{"gamma": 0.3}']
    words += ["--bf16", "False", "--use_cpu", "--learning_rate", "1e-5"]
    (config,) = HfArgumentParser(PreferenceConfig).parse_args_into_dataclasses(words)
    assert (config.method, config.method_kwargs, config.learning_rate) == ("repo", {"gamma": 0.3}, 1e-5)
