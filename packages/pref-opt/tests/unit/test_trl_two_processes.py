"""Two gloo processes under accelerate train as one process with the same global batch."""

import copy
import os

import pytest
import torch

from ballast_testing.distributed import run_gloo

METHODS = {
    "beta_dpo": {"scale": 0.8, "filter_ratio": 0.25},
    "dr_dpo": {"group": "global", "beta_prime": 0.05},
    "alpha_dpo": {"alpha": 0.5},
    "gamma_po": {"base": "dpo", "pool": "gathered", "beta": 0.5, "gamma_beta_ratio": 4.0, "tau": 2.0},
    "dr_dpo/step": {"group": "step", "beta_prime": 0.05},
}
NAMES = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "entropy", "num_tokens")


def pairs():
    return [
        {"prompt": f"{i} + {j} =", "chosen": f" {i + j}", "rejected": f" {i + 2 * j + 1}, or so"}
        for i, j in ((n, (7 * n) % 11) for n in range(24))
    ]


def train(rank, world_size, folder):
    """Train with each method; return logs, the weights at the end, and how often this process wrote a loss."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    if world_size > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        os.environ |= {name: str(value) for name, value in names.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # unused: the group stands already
    from datasets import Dataset

    from ballast_testing.llm import tiny_causal_lm, tiny_tokenizer
    from pref_opt import trl

    written = []
    save = trl.save_loss_state
    trl.save_loss_state = lambda loss, path: written.append(str(path)) or save(loss, path)
    tokenizer = tiny_tokenizer(word for row in pairs() for word in row.values())
    start = tiny_causal_lm(tokenizer, hidden=32)
    results = {}
    for method, options in METHODS.items():
        step = method.endswith("/step")
        args = trl.PreferenceConfig(
            f"{folder}/{world_size}-{method.replace('/', '-')}",
            method=method.removesuffix("/step"),
            method_kwargs=options,
            per_device_train_batch_size=8 // world_size // (2 if step else 1),
            gradient_accumulation_steps=2 if step else 1,
            max_steps=3,
            learning_rate=1e-2,
            optim="sgd",  # Adam would blow up rounding where a gradient is almost 0
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to="none",
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            max_length=64,
            save_strategy="steps",
            save_steps=3,
            save_only_model=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = trl.PreferenceTrainer(
            copy.deepcopy(start), args=args, train_dataset=Dataset.from_list(pairs()), processing_class=tokenizer
        )
        assert trainer.accelerator.num_processes == world_size
        trainer.train()
        weights = torch.cat(
            [p.detach().flatten() for p in trainer.accelerator.unwrap_model(trainer.model).parameters()]
        )
        logs = [[entry[name] for name in NAMES] for entry in trainer.state.log_history if "loss" in entry]
        state = {name: torch.as_tensor(value) for name, value in trainer.loss.state_dict().items()}
        results[method] = {"logs": logs, "weights": weights, "state": state}
    trl.save_loss_state = save
    start_weights = torch.cat([p.detach().flatten() for p in start.parameters()])
    return {"results": results, "written": len(written), "start": start_weights}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_two_processes_are_one_with_the_joint_batch(tmp_path):
    one = train(0, 1, str(tmp_path))
    first, second = run_gloo(train, 2, str(tmp_path), timeout=900.0)
    assert (one["written"], first["written"], second["written"]) == (5, 5, 0)
    for method in METHODS:
        want = one["results"][method]
        assert (want["weights"] - one["start"]).abs().max() > 1e-3
        for process in (first, second):
            got = process["results"][method]
            torch.testing.assert_close(got["weights"], want["weights"], rtol=0, atol=1e-5)
            assert {name: x.tolist() for name, x in got["state"].items()} == pytest.approx(
                {name: x.tolist() for name, x in want["state"].items()}, rel=1e-4, abs=1e-5
            )
        for mine, other in zip(first["results"][method]["logs"], want["logs"], strict=True):
            assert mine == pytest.approx(other, rel=1e-4, abs=1e-5), method
