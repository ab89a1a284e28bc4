"""Cases of the losses on pairs: wrong labels at a known rate, and the choice of pairs by their alignment potential.

The pairs come from GSM8K. A prompt is what a worked solution says after its last equals sign, a completion the final number,
right or corrupted: whoever has learnt to read the number off the text ranks them rightly. That is as much as a language model of two layers, trained
from nothing on one core, can learn of it. Each cell trains the model on the preferred completions alone (SFT, with wrong ones
among them where labels are flipped) and goes on from there with its loss; the SFT model is the reference.
"""

from __future__ import annotations

import copy
import tempfile
import time
from typing import TYPE_CHECKING, Any

from ballast_bench.case import Case, CellInput, CellOutput, Metric, SkipCell

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from datasets import Dataset  # type: ignore[import-untyped]
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

    from pref_opt.losses import Logps, LossOutput, PreferenceLoss

__all__ = ["cpu", "flips", "generated", "gpu", "quick", "selection"]

_HERE = "ballast_bench.suites.pref_opt_pairs"
_PRELOAD = ("pref_opt.trl", "pref_opt.alignment_potential", "torch._dynamo")
_ACCURACY = Metric("accuracy", label="held-out accuracy")
_LIKELIHOOD = Metric("likelihood", label="right number more likely", tested=False)
_EXACT = Metric("exact", label="right number written")
_WEIGHT = Metric("flipped_weight", better="lower", label="weight of flipped over clean pairs", digits=2, tolerance=0.1)
# The margin where a loss has one for each pair, or the weight that Dr. DPO gives a pair, or the share that beta-DPO keeps.
_MARGIN = Metric("flipped_margin", better="lower", label="own weight or margin", digits=3, tested=False)
_SECONDS = Metric("train_seconds", better="lower", label="train CPU s", digits=1, tested=False, tolerance=0.25)
_SELECTED = (
    Metric("explicit", label="explicit margin", digits=2, tested=False),
    Metric("implicit", better="lower", label="implicit margin", digits=2, tested=False),
    Metric("right", label="chosen number right", tested=False),
)
_ANSWER = "\n#### "

# Completions have some three tokens, not hundreds: with sums of log-probabilities beta is 1 where 0.1 is usual.
_METHODS: dict[str, dict[str, Any]] = {
    "SFT": {"method": "none"},
    "SFT, longer": {"method": "sft"},
    "DPO": {"method": "dpo", "options": {"beta": 1.0}},
    "DPO, 3e-4": {"method": "dpo", "options": {"beta": 1.0}},
    "cDPO": {"method": "cdpo", "options": {"beta": 1.0}},
    "Robust DPO": {"method": "robust_dpo", "options": {"beta": 1.0}},
    "IPO": {"method": "ipo", "options": {"beta": 0.1}},
    "Length-normalised DPO": {"method": "dpo_norm", "options": {"beta": 2.5}},
    "KTO on pairs": {"method": "kto_pair", "options": {"beta": 1.0}},
    "CPO": {"method": "cpo", "options": {"beta": 1.0}},
    "SLiC": {"method": "slic"},
    "ORPO": {"method": "orpo"},
    "SimPO": {"method": "simpo"},
    "beta-DPO": {"method": "beta_dpo", "options": {"beta": 1.0}},
    "Dr. DPO": {"method": "dr_dpo", "options": {"beta": 1.0}},
    "alpha-DPO": {"method": "alpha_dpo"},
    "gamma-DPO": {"method": "gamma_po", "options": {"base": "dpo", "beta": 1.0, "gamma_beta_ratio": 1.0, "tau": 1.0}},
    "gamma-SimPO": {"method": "gamma_po", "options": {"base": "simpo", "tau": 1.0}},
    "RePO": {"method": "repo"},
    "RePO++": {"method": "repo_plus_plus"},
}
# Learning rates of the cases with wrong labels; see `_NOTE`.
_LR = {"CPO": 3e-3, "ORPO": 3e-3, "Dr. DPO": 3e-4, "beta-DPO": 3e-4, "Robust DPO": 3e-4, "DPO, 3e-4": 3e-4}
_SETTINGS = {"hidden": 64, "layers": 2, "batch_size": 32, "sft_steps": 30, "sft_lr": 3e-3, "pairs": 4800, "lr": 1e-3}
_DATA = (
    "GSM8K: 4,800 problems of its train file, the 1,319 of its test file. A prompt is what the worked solution says after its "
    "last equals sign (16 characters of it), a completion the final number: the right one, or one near it, a tenth, ten times or "
    "twice of it, or with two digits exchanged. Bytes are tokens. A Qwen2 of 64 dimensions and two layers with random weights, SFT on the "
    "preferred numbers at 3e-3 (30 steps with wrong labels, 100 where pairs are chosen), then one epoch of pairs in batches of 32, "
    "cosine, from the same model."
)
_NOTE = (
    f"{_DATA} Each pair of the training set is flipped with the rate's probability, before SFT; the test is clean. Losses have "
    "their default parameters, except: beta is 1 where log-probabilities are summed, as completions have some three tokens (IPO "
    "keeps 0.1, length-normalised DPO has 2.5), cDPO and robust DPO know the flip rate (0.1 without flips), gamma-PO has tau 1 and "
    "on DPO the ratio 1. The learning rate of each loss, out of 3e-4, 1e-3 and 3e-3 (and 1e-4 or 1e-2 where the best of these "
    "stood at the edge), was the best by held-out accuracy at 20 % flips with another seed, on 1,200 further problems of the train "
    "file; `DPO, 3e-4` has that of Dr. DPO, beta-DPO and robust DPO. Held-out accuracy is by the implicit reward of each loss; a "
    "number counts as written where greedy decoding gives it exactly. `SFT` is the model that the losses start from, `SFT, longer` "
    "the same with 150 further steps. Weight: the mean gradient of the loss with respect to the log-probability of the preferred "
    "completion, of flipped pairs over that of clean ones, for the trained model on 1,280 training pairs in batches of 32. Own "
    "weight or margin: the same of what the loss gives to each pair, the weight in Dr. DPO's soft minimum, the share that beta-DPO "
    "keeps, the target margin of gamma-PO and alpha-DPO; 1 for all others."
)
_SELECT_NOTE = (
    f"{_DATA} The model draws five numbers for each of 3,200 problems (temperature 0.8, top_p 0.95); the best and the worst by a "
    "reward make a pair. The reward is the mean log-probability under a model of the same size with 1,000 steps of SFT on right "
    "numbers. 40 % of the pairs are chosen, and SimPO trains on them for one epoch; `All pairs` are two and a half times as many "
    "steps. The learning rate, 3e-4 out of 1e-4, 3e-4 and 1e-3, was the best for random pairs by right numbers written, with another "
    "seed. Margins and the share of right chosen numbers are of the pairs trained on."
)


def quick() -> tuple[Case, ...]:
    """Generated sums; no files needed."""
    small = {**_SETTINGS, "hidden": 32, "layers": 1, "batch_size": 16, "sft_steps": 20, "pairs": 160, "data": 64}
    common: dict[str, Any] = {"package": "pref_opt", "dataset": "sums-generated", "seeds": (0,), "preload": _PRELOAD}
    names = ("DPO", "Dr. DPO", "beta-DPO", "alpha-DPO", "gamma-SimPO", "RePO")
    note = "A few steps of each: whether everything runs, not how well."
    return (
        Case(
            name="pairs-quick",
            title="Generated sums, 20 % flipped pairs",
            run=f"{_HERE}:generated",
            methods={name: {**small, "flips": 0.2, **_METHODS[name]} for name in names},
            baseline="DPO",
            metrics=(_ACCURACY, _LIKELIHOOD, _EXACT, _WEIGHT, _MARGIN, _SECONDS),
            expected=2,
            note=note,
            **common,
        ),
    )


def cpu() -> tuple[Case, ...]:
    """Pairs from GSM8K: wrong labels at 0, 20 and 40 %, and 40 % of the pairs chosen in four ways."""
    return (*(_flip_case(rate) for rate in (0.0, 0.2, 0.4)), _select_case())


def gpu() -> tuple[Case, ...]:
    """The cases of `cpu` with a model in the shape of Qwen2-0.5B, from its configuration; skips without CUDA."""
    shape = {"num_attention_heads": 14, "intermediate_size": 4864}
    large = {"hidden": 896, "layers": 24, "shape": shape, "sft_lr": 1e-4, "lr": 1e-5, "device": "cuda"}
    note = " Here the model has the shape of Qwen2-0.5B; nothing was tuned."
    return (*(_flip_case(rate, "-large", large, note) for rate in (0.0, 0.2, 0.4)), _select_case("-large", large, note))


def _flip_case(rate: float, suffix: str = "", changed: dict[str, Any] | None = None, note: str = "") -> Case:
    methods = {
        name: {**_SETTINGS, "flips": rate, "lr": _LR.get(name, _SETTINGS["lr"]), **settings, **(changed or {})}
        for name, settings in _METHODS.items()
    }
    for name in ("cDPO", "Robust DPO"):
        methods[name]["options"] = {**methods[name]["options"], "label_smoothing": rate or 0.1}
    measured = (_ACCURACY, _LIKELIHOOD, _EXACT)
    return Case(
        package="pref_opt",
        name=f"gsm8k-flips-{round(100 * rate)}{suffix}",
        title=f"GSM8K pairs, {round(100 * rate)} % flipped",
        dataset="gsm8k",
        run=f"{_HERE}:flips",
        methods=methods,
        baseline="DPO",
        seeds=(0, 1, 2),
        metrics=(*measured, _WEIGHT, _MARGIN, _SECONDS) if rate else (*measured, _SECONDS),
        preload=_PRELOAD,
        expected=240 if changed else 17,
        budget=3600 if changed else 600,
        note=_NOTE + note,
    )


def _select_case(suffix: str = "", changed: dict[str, Any] | None = None, note: str = "") -> Case:
    settings = {
        **_SETTINGS,
        "sft_steps": 100,
        "lr": 3e-4,
        "pairs": 3200,
        "reward_steps": 1000,
        "ratio": 0.4,
        "method": "simpo",
        **(changed or {}),
    }
    methods: dict[str, dict[str, Any]] = {
        "SFT": {"metric": "random", "method": "none"},
        "Random": {"metric": "random"},
        "Explicit margin": {"metric": "explicit"},
        "Implicit margin": {"metric": "implicit"},
        "Alignment potential": {"metric": "alignment_potential"},
        "All pairs": {"metric": "all"},
    }
    return Case(
        package="pref_opt",
        name=f"gsm8k-select-40{suffix}",
        title="GSM8K, pairs of the model's own, 40 % chosen",
        dataset="gsm8k",
        run=f"{_HERE}:selection",
        methods={name: {**settings, **chosen} for name, chosen in methods.items()},
        baseline="Random",
        seeds=(0, 1, 2, 3, 4),
        metrics=(_EXACT, _LIKELIHOOD, *_SELECTED, _SECONDS),
        preload=_PRELOAD,
        expected=480 if changed else 40,
        budget=3600 if changed else 900,
        note=_SELECT_NOTE + note,
    )


# --- data --------------------------------------------------------------------------------------------------------------


def _read(root: Path | None, settings: dict[str, Any], seed: int) -> tuple[Dataset, Dataset]:
    """Return GSM8K to train on and to test on; with `held_out`, further problems of the train file instead of the test."""
    from pref_opt.data import gsm8k_preferences

    folder = None if root is None else root / "math" / "gsm8k"
    if folder is None or not folder.is_dir():
        raise SkipCell("data set 'gsm8k' is not here: set BALLAST_DATA or --data-root")
    train = gsm8k_preferences(folder / "train.jsonl.gz", seed=seed).remove_columns("flipped")
    if settings.get("held_out"):
        test = train.select(range(4800, 6000))
    else:
        test = gsm8k_preferences(folder / "test.jsonl.gz").remove_columns("flipped")
    return _shortened(train.select(range(settings["pairs"]))), _shortened(test)


def _shortened(pairs: Dataset) -> Dataset:
    """Put what follows the last equals sign of the solution, which both completions share, in place of the problem."""

    def row(pair: dict[str, str]) -> dict[str, str]:
        solution, chosen = pair["chosen"].rsplit(_ANSWER, 1)
        rejected = pair["rejected"].rsplit(_ANSWER, 1)[1]
        return {"prompt": solution.rsplit("=", 1)[-1].strip()[:16] + _ANSWER, "chosen": chosen, "rejected": rejected}

    return pairs.map(row)


def _generate(pairs: int, test: int, seed: int) -> tuple[Dataset, Dataset]:
    """Return generated sums, right against one too many."""
    import torch
    from datasets import Dataset

    numbers = torch.randint(1, 50, (pairs + test, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [
        {"prompt": f"{a} + {b} = {a + b}{_ANSWER}", "chosen": str(a + b), "rejected": str(a + b + 1)}
        for a, b in numbers
    ]
    return Dataset.from_list(rows[:pairs]), Dataset.from_list(rows[pairs:])


# --- cells -------------------------------------------------------------------------------------------------------------


def flips(cell: CellInput) -> CellOutput:
    """Train and test one loss on pairs of GSM8K, some of them flipped: one cell of the real cases.

    Raises:
        SkipCell: If the data is absent, or the cell wants CUDA and there is none.
    """
    return _flips(cell, *_read(cell.data_root, cell.settings, cell.seed))


def generated(cell: CellInput) -> CellOutput:
    """Train and test one loss on generated sums: one cell of the quick case."""
    return _flips(cell, *_generate(cell.settings["pairs"], cell.settings["data"], cell.seed))


def selection(cell: CellInput) -> CellOutput:
    """Choose among pairs that the model makes itself, train on them and test: one cell of the real case.

    Raises:
        SkipCell: If the data is absent, or the cell wants CUDA and there is none.
    """
    import torch

    from pref_opt.alignment_potential import build_self_play_pairs, select_top
    from pref_opt.scoring import TransformersGenerator, likelihood_reward

    settings, seed = cell.settings, cell.seed
    train, test = _read(cell.data_root, settings, seed)
    tokenizer, model = _start(settings, seed)
    judge = copy.deepcopy(model)
    _supervise(model, tokenizer, train, settings["sft_steps"], settings, seed)
    _supervise(judge, tokenizer, train, settings["reward_steps"], settings, seed)

    reward = likelihood_reward(judge, tokenizer, batch_size=256)
    generator = TransformersGenerator(model, tokenizer, batch_size=320)
    pairs = build_self_play_pairs(train["prompt"][:], generator, reward, max_tokens=8, seed=seed)
    explicit, implicit = (torch.tensor(pairs[name][:]) for name in ("rm_margin", "logp_margin_norm"))
    chosen = torch.arange(len(pairs))
    if settings["metric"] != "all":
        random = torch.Generator().manual_seed(seed)
        chosen = select_top(
            explicit, implicit, metric=settings["metric"], select_ratio=settings["ratio"], generator=random
        )
    own = pairs.select(chosen.tolist())
    truth = train.select(own["idx"][:])["chosen"][:]
    start = time.process_time()
    _prefer(model, tokenizer, own, settings, seed)
    seconds = time.process_time() - start
    sums = _measured(model, tokenizer, test)[0]
    metrics = {
        "exact": _written(model, tokenizer, test),
        "likelihood": _share(sums[:, 0] > sums[:, 1]),
        "explicit": float(explicit[chosen].mean()),
        "implicit": float(implicit[chosen].abs().mean()),
        "right": sum(map(str.__eq__, own["chosen"][:], truth)) / len(truth),
        "train_seconds": seconds,
    }
    return CellOutput(metrics, (), {"pairs": len(pairs), "chosen": len(chosen)})


def _flips(cell: CellInput, train: Dataset, test: Dataset) -> CellOutput:
    from pref_opt.dr_dpo import flip_preferences

    settings, seed = cell.settings, cell.seed
    pairs: Any = flip_preferences(train, settings["flips"], seed)
    watched = pairs.select(range(min(len(pairs), 40 * settings["batch_size"])))
    tokenizer, model = _start(settings, seed)
    start = time.process_time()
    _supervise(model, tokenizer, pairs, settings["sft_steps"], settings, seed)
    sft_seconds = time.process_time() - start
    before = {name: _measured(model, tokenizer, rows) for name, rows in (("test", test), ("watched", watched))}
    info = {
        "sft_seconds": sft_seconds,
        "sft_likelihood": _share(before["test"][0][:, 0] > before["test"][0][:, 1]),
        "test_pairs": len(test),
    }
    start = time.process_time()
    loss = _prefer(model, tokenizer, pairs, settings, seed)
    seconds = time.process_time() - start
    after = _measured(model, tokenizer, test)
    metrics = {
        "accuracy": _accuracy(loss, after, before["test"]),
        "likelihood": _share(after[0][:, 0] > after[0][:, 1]),
        "exact": _written(model, tokenizer, test),
        "train_seconds": seconds,
    }
    if settings["flips"]:
        trained = _measured(model, tokenizer, watched)
        metrics |= _influence(loss, trained, before["watched"], watched["flipped"][:], settings["batch_size"])
    return CellOutput(metrics, (), info)


def _start(settings: dict[str, Any], seed: int) -> tuple[PreTrainedTokenizerFast, Qwen2ForCausalLM]:
    """Return the tokenizer and a model with random weights."""
    import torch
    from datasets import disable_progress_bars

    from pref_opt.tiny import tiny_causal_lm, tiny_tokenizer

    device = settings.get("device", "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise SkipCell("needs CUDA")
    torch.set_num_threads(1)
    disable_progress_bars()
    tokenizer = tiny_tokenizer()
    sizes = {"hidden": settings["hidden"], "layers": settings["layers"], **settings.get("shape", {})}
    return tokenizer, tiny_causal_lm(tokenizer, max_length=128, seed=seed, **sizes).to(device)


def _supervise(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Dataset,
    steps: int,
    settings: dict[str, Any],
    seed: int,
) -> None:
    """Train on the preferred completions alone."""
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

    rows = pairs.rename_column("chosen", "completion").select_columns(["prompt", "completion"])
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(folder, learning_rate=settings["sft_lr"], max_steps=steps, **_arguments(settings, seed))
        trainer = SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.train(False)


def _prefer(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Dataset,
    settings: dict[str, Any],
    seed: int,
) -> PreferenceLoss | None:
    """Go on with a loss, the model as it is now as the reference where one is needed; return the loss with its state."""
    from transformers import PrinterCallback

    from pref_opt.trl import PreferenceConfig, PreferenceTrainer

    if settings["method"] == "none":
        return None
    if settings["method"] == "sft":
        _supervise(model, tokenizer, pairs, len(pairs) // settings["batch_size"], settings, seed)
        return None
    with tempfile.TemporaryDirectory() as folder:
        args = PreferenceConfig(
            folder,
            method=settings["method"],
            method_kwargs=settings.get("options"),
            learning_rate=settings["lr"],
            num_train_epochs=settings.get("epochs", 1),
            dataloader_drop_last=True,
            **_arguments(settings, seed),
        )
        columns = ["prompt", "chosen", "rejected"]
        trainer = PreferenceTrainer(
            model, args=args, train_dataset=pairs.select_columns(columns), processing_class=tokenizer
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.train(False)
    return trainer.loss


def _arguments(settings: dict[str, Any], seed: int) -> dict[str, Any]:
    cpu = settings.get("device", "cpu") == "cpu"
    return {
        "per_device_train_batch_size": settings["batch_size"],
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "weight_decay": 0.0,
        "max_length": 128,
        "bf16": not cpu,
        "use_cpu": cpu,
        "activation_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "seed": seed,
    }


# --- measures ----------------------------------------------------------------------------------------------------------


def _measured(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: Dataset) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of both completions, summed [N, 2], and their numbers of tokens [N, 2]."""
    import torch

    from pref_opt.scoring import completion_logps

    completions = list(zip(pairs["chosen"], pairs["rejected"], strict=True))
    logps = completion_logps(model, tokenizer, pairs["prompt"][:], completions, batch_size=256)
    return torch.stack(logps.sums), torch.stack(logps.lengths)


def _written(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: Dataset) -> float:
    """Return the share of prompts that greedy decoding continues with exactly the chosen completion."""
    import torch

    hits = 0
    for start in range(0, len(pairs), 256):
        rows = pairs[start : start + 256]
        prompts = tokenizer(rows["prompt"], padding=True, padding_side="left", return_tensors="pt").to(model.device)
        with torch.no_grad():
            output: Any = model.generate(**prompts, do_sample=False, max_new_tokens=10)
        texts = tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        hits += sum(map(str.__eq__, texts, rows["chosen"]))
    return hits / len(pairs)


def _accuracy(loss: PreferenceLoss | None, policy: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]) -> float:
    """Return the share of pairs whose chosen completion has the larger implicit reward; without a loss, is more likely."""
    from pref_opt.losses import LossContext

    if loss is None:
        return _share(policy[0][:, 0] > policy[0][:, 1])
    out = loss(_logps(loss, policy, reference), LossContext(training=False))
    return _share(out.chosen_rewards > out.rejected_rewards)


def _influence(
    loss: PreferenceLoss | None,
    policy: tuple[Tensor, Tensor],
    reference: tuple[Tensor, Tensor],
    flipped: Sequence[bool],
    batch_size: int,
) -> dict[str, float]:
    """Return gradients, and what the loss gives, of flipped pairs over those of clean ones, in batches as in training."""
    import torch

    from pref_opt.losses import LossContext

    if loss is None:
        return {"flipped_weight": 1.0, "flipped_margin": 1.0}
    weights, margins = [], []
    for rows in torch.arange(len(flipped)).split(batch_size):  # type: ignore[no-untyped-call]
        logps = _logps(loss, *((sums[rows], lengths[rows]) for sums, lengths in (policy, reference)))
        chosen = logps.chosen.requires_grad_()
        out = loss(logps, LossContext())
        gradient = torch.autograd.grad(out.loss, chosen)[0].abs()
        weights.append(gradient)
        margins.append(_given(loss, logps, out, gradient))
    wrong = torch.tensor(flipped)
    named = {"flipped_weight": torch.cat(weights), "flipped_margin": torch.cat(margins)}
    return {name: float(values[wrong].mean() / values[~wrong].mean()) for name, values in named.items()}


def _given(loss: PreferenceLoss, logps: Logps, out: LossOutput, gradient: Tensor) -> Tensor:
    """Return the weight or margin that a loss gives to each pair, in any unit; ones where it has the same for all."""
    import torch.nn.functional as F

    from pref_opt.alpha_dpo import AlphaDPOLoss, adaptive_margin
    from pref_opt.beta_dpo import BetaDPOLoss
    from pref_opt.dr_dpo import DrDPOLoss, dr_weights
    from pref_opt.gamma_po import GammaPOLoss, dynamic_margins

    gaps = out.chosen_rewards - out.rejected_rewards
    if isinstance(loss, DrDPOLoss):
        return dr_weights(-F.logsigmoid(gaps), beta_prime=loss.beta_prime)
    if isinstance(loss, BetaDPOLoss):
        return (gradient != 0).double()
    if isinstance(loss, GammaPOLoss) and loss.queue is not None:
        return dynamic_margins(gaps, loss.queue.sample(len(gaps)), gamma0=loss.gamma0, tau=loss.tau)
    if isinstance(loss, AlphaDPOLoss) and logps.ref_chosen is not None and logps.ref_rejected is not None:
        return adaptive_margin(
            logps.chosen,
            logps.rejected,
            logps.ref_chosen,
            logps.ref_rejected,
            gamma_beta_ratio=loss.gamma_beta_ratio,
            alpha=loss.alpha,
            gap_mean=out.metrics["gap_mean"],
            gap_std=out.metrics["gap_std"],
        )
    return gaps.new_ones(len(gaps))


def _logps(loss: PreferenceLoss, policy: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]) -> Logps:
    from pref_opt.losses import Logps

    divisor = policy[1] if loss.length_normalized else policy[1].clamp(max=1)
    chosen, rejected = (policy[0] / divisor).unbind(1)
    ref_chosen, ref_rejected = (reference[0] / divisor).unbind(1)
    chosen_lengths, rejected_lengths = policy[1].unbind(1)
    return Logps(chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths)


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())
