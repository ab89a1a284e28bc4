"""Two gloo processes under accelerate train as one process with the same global batch.

All losses share one pair of processes, which pays for its imports once; each loss has a test of its own.
"""

import copy
import os

import pytest
import torch

from ballast_testing.distributed import run_gloo

# Losses that tie the pairs of a batch to each other.
PAIRS = {
    "beta_dpo": ("beta_dpo", {"scale": 0.8, "filter_ratio": 0.25}),
    # Without its filter, which draws by position in the window: two processes hold their pairs in another order.
    "beta_dpo over a step": ("beta_dpo", {"scale": 0.8, "filter_ratio": 0.0, "window": "step"}),
    "dr_dpo": ("dr_dpo", {"group": "global", "beta_prime": 0.05}),
    "dr_dpo over a step": ("dr_dpo", {"group": "step", "beta_prime": 0.05}),
    "alpha_dpo": ("alpha_dpo", {"alpha": 0.5}),
    "alpha_dpo over a step": ("alpha_dpo", {"alpha": 0.5, "stats_window": "step"}),
    "gamma_po": (
        "gamma_po",
        {"base": "dpo", "pool": "gathered", "beta": 0.5, "gamma_beta_ratio": 4.0, "tau": 2.0},
    ),
    "kto_pair": ("kto_pair", {"beta": 0.5}),
}
# K negatives: one loss that ties rows, one that doesn't, one with stored references.
LISTS = {
    "napo": ("napo", {"share_ratio": 0.5}),
    "dynamic_po": ("dynamic_po", {"base": "sdpo"}),
    "dmpo with a stored reference": ("dmpo", {}),
}
NAMES = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "num_tokens")
COMMON = {
    "max_steps": 2,
    "learning_rate": 1e-2,
    "optim": "sgd",  # Adam would blow up rounding where a gradient is almost 0
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "max_length": 64,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_only_model": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def pairs():
    return [
        {"prompt": f"{i} + {j} =", "chosen": f" {i + j}", "rejected": f" {i + 2 * j + 1}, or so"}
        for i, j in ((n, (7 * n) % 11) for n in range(24))
    ]


def lists():
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "prompt": f"{'then ' * (n % 3)}{n} + {n % 5} =",
            "chosen": f" {n + n % 5}",
            "rejected": [f" {n + n % 5 + j + 1}{', or so' if (n + j) % 2 else ''}" for j in range(3)],
            "ids": n,
            "user_embeddings": torch.randn(4, generator=generator).tolist(),
            "negative_scores": torch.randn(3, generator=generator).tolist(),
        }
        for n in range(16)
    ]


def pair_trainer(name, folder, world_size, given):
    from pref_opt.trl import PreferenceConfig, PreferenceTrainer

    method, options = PAIRS[name]
    micro_batches = 2 if name.endswith("over a step") else 1
    args = PreferenceConfig(
        folder,
        **COMMON,
        method=method,
        method_kwargs=options,
        per_device_train_batch_size=8 // world_size // micro_batches,
        gradient_accumulation_steps=micro_batches,
        bf16=False,
        gradient_checkpointing=False,
    )
    return PreferenceTrainer(args=args, train_dataset=given["pairs"], **given["host"])


def list_trainer(name, folder, world_size, given):
    from pref_opt.multi_negative import MultiNegativeConfig, MultiNegativeTrainer

    method, options = LISTS[name]
    args = MultiNegativeConfig(
        folder,
        **COMMON,
        method=method,
        method_kwargs=options,
        per_device_train_batch_size=8 // world_size,
        precompute_ref_log_probs=name.endswith("stored reference"),
        per_device_eval_batch_size=3,  # 16 rows in batches of 3 don't come out even on two processes
    )
    return MultiNegativeTrainer(args=args, train_dataset=given["lists"], **given["host"])


def train(rank, world_size, folder):
    """Train with each loss; return logs, the weights at the end, the loss's state, and what this process has written."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    if world_size > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        os.environ |= {name: str(value) for name, value in names.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # unused: the group stands already
    from datasets import Dataset

    from pref_opt import _state
    from pref_opt.tiny import tiny_causal_lm, tiny_tokenizer

    written = []
    save = _state.save_loss_state
    _state.save_loss_state = lambda loss, path: written.append(str(path)) or save(loss, path)
    tokenizer = tiny_tokenizer(text for row in pairs() for text in row.values())
    start = tiny_causal_lm(tokenizer, hidden=32)
    results = {}
    for name in (*PAIRS, *LISTS):
        given = {
            "pairs": Dataset.from_list(pairs()),
            "lists": Dataset.from_list(lists()),
            "host": {"model": copy.deepcopy(start), "processing_class": tokenizer},
        }
        make = pair_trainer if name in PAIRS else list_trainer
        written.clear()
        trainer = make(name, f"{folder}/{world_size}-{name.replace(' ', '-')}", world_size, given)
        assert trainer.accelerator.num_processes == world_size
        trainer.train()
        weights = [p.detach().flatten() for p in trainer.accelerator.unwrap_model(trainer.model).parameters()]
        results[name] = {
            "logs": [[entry[key] for key in NAMES] for entry in trainer.state.log_history if "loss" in entry],
            "weights": torch.cat(weights),
            "state": {key: torch.as_tensor(value) for key, value in trainer.loss.state_dict().items()},
            "stored": torch.tensor(trainer.train_dataset["ref_logps"][:]) if "stored" in name else torch.empty(0),
            "written": len(written),
        }
    _state.save_loss_state = save
    return {"results": results, "start": torch.cat([p.detach().flatten() for p in start.parameters()])}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return what one process has found, and what each of two has."""
    folder = str(tmp_path_factory.mktemp("runs"))
    return train(0, 1, folder), run_gloo(train, 2, folder, timeout=900.0)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("name", [*PAIRS, *LISTS])
def test_two_processes_are_one_with_the_joint_batch(trained, name):
    one, two = trained
    want = one["results"][name]
    assert (want["weights"] - one["start"]).abs().max() > 1e-3  # there is something to compare
    for process in two:
        got = process["results"][name]
        torch.testing.assert_close(got["weights"], want["weights"], rtol=0, atol=1e-5)
        torch.testing.assert_close(got["state"], want["state"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got["stored"], want["stored"], rtol=1e-4, atol=1e-4)
    for mine, other in zip(two[0]["results"][name]["logs"], want["logs"], strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)
    assert (want["written"], *(process["results"][name]["written"] for process in two)) == (1, 1, 0)
