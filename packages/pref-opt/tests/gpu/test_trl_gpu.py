"""The trainer on a CUDA device, in bfloat16 and with gradient checkpointing: TRL's steps, all losses, exact resume."""

from __future__ import annotations

import copy
import math
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

pytest.importorskip("trl")

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from pref_opt.tiny import tiny_causal_lm, tiny_tokenizer
from pref_opt.trl import PreferenceConfig, PreferenceTrainer

# TRL still uses the old names of transformers.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]

PAIRS = [
    {"prompt": f"{i} + {j} =", "chosen": f" {i + j}", "rejected": f" {i + 2 * j + 1}, or so"}
    for i, j in ((n, (7 * n) % 11) for n in range(48))
]
METHODS = [
    "dpo",
    "cdpo",
    "robust_dpo",
    "dpo_norm",
    "ipo",
    "simpo",
    "cpo",
    "slic",
    "orpo",
    "kto_pair",
    "beta_dpo",
    "dr_dpo",
    "alpha_dpo",
    "gamma_po",
    "repo",
    "repo_plus_plus",
]


@pytest.fixture
def build(tmp_path):
    """Return a function that makes a trainer, ours or TRL's."""
    tokenizer = tiny_tokenizer(word for row in PAIRS for word in row.values())
    model = tiny_causal_lm(tokenizer)

    def make(make_config, make_trainer, **options):
        common = {
            "per_device_train_batch_size": 8,
            "max_steps": 4,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        args = make_config(str(tmp_path / make_trainer.__name__), **common | options)
        given = {}
        if make_trainer is DPOTrainer:
            given["ref_model"] = copy.deepcopy(model)
        return make_trainer(
            copy.deepcopy(model),
            args=args,
            train_dataset=Dataset.from_list(PAIRS),
            processing_class=tokenizer,
            **given,
        )

    return make


def steps(trainer, **options):
    trainer.train(**options)
    names = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "entropy")
    return [[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("bf16", [False, True])
def test_dpo_inside_is_trls_dpo(build, bf16):
    ours = steps(build(PreferenceConfig, PreferenceTrainer, bf16=bf16))
    theirs = steps(build(DPOConfig, DPOTrainer, bf16=bf16))
    assert ours[0][0] == pytest.approx(0.693147, abs=1e-6)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_every_loss_trains_in_bfloat16(build, method):
    logged = steps(build(PreferenceConfig, PreferenceTrainer, method=method, bf16=True))
    assert len(logged) == 4
    assert all(math.isfinite(value) for entry in logged for value in entry)


@pytest.mark.parametrize("method", ["beta_dpo", "alpha_dpo", "gamma_po"])
def test_a_resumed_run_continues(build, tmp_path, method):
    saving = {"method": method, "save_strategy": "steps", "save_steps": 2}
    whole = steps(build(PreferenceConfig, PreferenceTrainer, **saving))
    resumed = build(PreferenceConfig, PreferenceTrainer, **saving)
    steps(resumed, resume_from_checkpoint=str(tmp_path / "PreferenceTrainer" / "checkpoint-2"))
    again = [entry["loss"] for entry in resumed.state.log_history if "loss" in entry]
    assert again[-2:] == pytest.approx([entry[0] for entry in whole[-2:]], rel=1e-3)


def test_a_window_is_shown_with_gradient_checkpointing(build):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "bf16": False}
    split = build(PreferenceConfig, PreferenceTrainer, method="dr_dpo", method_kwargs={"group": "step"}, **options)
    whole = build(PreferenceConfig, PreferenceTrainer, method="dr_dpo", method_kwargs={"group": "global"}, bf16=False)
    for mine, other in zip(steps(split), steps(whole), strict=True):
        assert mine[0] == pytest.approx(other[0], rel=1e-2)
