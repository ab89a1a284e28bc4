"""Cases of the methods that set one item against K others: DMPO, S-DPO, DynamicPO and NAPO on candidate lists.

A row is a history, the item that came next, and other candidates. Every item is one token of a vocabulary of its own, and the
language model is a small Qwen2 with random weights: to a model that has never read, the texts of names say nothing. Each cell
trains the model on the next items alone (SFT) and goes on from there with its method; the SFT model is the reference.
"""

from __future__ import annotations

import gzip
import json
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ballast_bench.case import Case, CellInput, CellOutput, Metric, SkipCell, Sweep

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from datasets import Dataset  # type: ignore[import-untyped]
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["cpu", "generated", "gpu", "lastfm", "quick"]

_HERE = "ballast_bench.suites.pref_opt_lists"
_PRELOAD = ("pref_opt.multi_negative", "pref_opt.napo", "pref_opt.dynamic_po", "torch._dynamo")
_METRICS = (
    Metric("hr@1", label="HR@1 of 20"),
    Metric("ndcg", label="NDCG", tested=False),
    Metric("chosen_logp", label="log-probability of the right item, nats", digits=2, tested=False, tolerance=0.1),
    Metric("train_seconds", better="lower", label="train CPU s", digits=1, tested=False, tolerance=0.25),
)
_PAD, _END, _BETWEEN = "<|pad|>", "<|end|>", "::"

_NAPO = {"beta": 1.0, "gamma0": 1.0, "alpha": 0.3}
_METHODS: dict[str, dict[str, Any]] = {
    "Popularity": {"method": "popularity"},
    "SFT": {"method": "sft"},
    "SFT, twice as long": {"method": "sft", "sft_epochs": 20},
    "DMPO": {"method": "dmpo", "options": {"beta": 1.0}},
    "DynamicPO (DMPO)": {"method": "dynamic_po", "options": {"base": "dmpo", "beta": 1.0, "margin": 6.0}},
    "S-DPO": {"method": "sdpo", "options": {"beta": 1.0}},
    "DynamicPO (S-DPO)": {"method": "dynamic_po", "options": {"base": "sdpo", "beta": 1.0, "margin": 6.0}},
    "NAPO": {"method": "napo", "options": {**_NAPO, "share_ratio": 0.7}},
    "NAPO, nothing borrowed": {"method": "napo", "options": {**_NAPO, "share_ratio": 0.0}},
    "NAPO, authors' gradient": {"method": "napo", "options": {**_NAPO, "share_ratio": 0.7, "negative_grad": "none"}},
}
_SHARED = {"batch_size": 32, "epochs": 3}
_SMALL = {**_SHARED, "hidden": 64, "layers": 2, "heads": 4, "intermediate": 128, "sft_epochs": 10, "sft_lr": 3e-3}
# Learning rates; see `_NOTE`. Those of 15 rejected items serve the other numbers of the curve too.
_LR = {
    15: {"DMPO": 1e-3, "DynamicPO (DMPO)": 1e-2, "S-DPO": 1e-2, "DynamicPO (S-DPO)": 3e-3, "NAPO": 1e-2},
    3: {"S-DPO": 1e-3, "NAPO": 1e-3, "NAPO, nothing borrowed": 3e-3, "NAPO, authors' gradient": 3e-3},
}
_DATA = (
    "LastFM as published with S-DPO: 2,767 lists of its val file to train on and the 2,495 lists of its test file; no train file "
    "is published. Each artist is one token (4,606), the prompt is the history without the candidates, and 35 % of the right "
    "artists of the test occur in no training history or answer. Per list K rejected artists are drawn once. A hit is a right "
    "artist more probable than the 19 others. Published figures are of Llama-2-7B with the candidates in its prompt."
)
_NOTE = (
    f"{_DATA} A model of 64 dimensions and two layers, SFT for 10 epochs at 3e-3, then 3 epochs of the method from the same model, "
    "batches of 32, cosine, gradient norm at most 0.3. The losses have the authors' parameters. The learning rate of each "
    "method, out of 3e-4, 1e-3, 3e-3, 1e-2 and 3e-2 (the last two only where 3e-3 had been the best), was the best by HR@1 over two other seeds on a fifth of the users of the val file, which "
    "were kept out of training for that."
)
_NOTE_LARGE = f"{_DATA} A model in the shape of Qwen2-0.5B with random weights; nothing was tuned."


def quick() -> tuple[Case, ...]:
    """Generated lists; no files needed."""
    settings = {
        **_SMALL,
        "hidden": 32,
        "intermediate": 64,
        "layers": 1,
        "batch_size": 16,
        "sft_epochs": 6,
        "epochs": 2,
        "lr": 3e-3,
        "negatives": 5,
        "data": {"items": 40, "lists": 300},
    }
    names = ("SFT", "DMPO", "DynamicPO (DMPO)", "S-DPO", "DynamicPO (S-DPO)", "NAPO")
    return (
        Case(
            package="pref_opt",
            name="lists-quick",
            title="Generated candidate lists",
            dataset="lists-generated",
            run=f"{_HERE}:generated",
            methods={name: {**settings, **_METHODS[name]} for name in names},
            baseline="S-DPO",
            seeds=(0,),
            metrics=_METRICS,
            preload=_PRELOAD,
            expected=1.8,
            note="300 lists to train on, two epochs of each method: whether everything runs, not how well.",
        ),
    )


def cpu() -> tuple[Case, ...]:
    """LastFM: DMPO and DynamicPO as negatives get more, S-DPO and DynamicPO, and NAPO with few negatives."""
    return _cases(_SMALL, note=_NOTE)


def gpu() -> tuple[Case, ...]:
    """The same with a model in the shape of Qwen2-0.5B, from its configuration; skips without CUDA."""
    shape = {"hidden": 896, "layers": 24, "heads": 14, "intermediate": 4864}
    large = {**_SHARED, **shape, "sft_epochs": 5, "sft_lr": 3e-4, "lr": 3e-5, "device": "cuda"}
    return _cases(large, suffix="-large", note=_NOTE_LARGE, fixed={"expected": 240, "budget": 3600})


def _cases(
    settings: dict[str, Any], *, note: str, suffix: str = "", fixed: dict[str, Any] | None = None
) -> tuple[Case, ...]:
    def case(name: str, title: str, negatives: int, names: Sequence[str], baseline: str, **fields: Any) -> Case:
        rates = _LR[3 if negatives == 3 and baseline == "S-DPO" else 15]
        methods = {
            method: {"lr": rates.get(method), "negatives": negatives, **settings, **_METHODS[method]}
            for method in names
        }
        return Case(
            package="pref_opt",
            name=name + suffix,
            title=title,
            dataset="lastfm-sdpo",
            run=f"{_HERE}:lastfm",
            methods=methods,
            baseline=baseline,
            metrics=_METRICS,
            preload=_PRELOAD,
            note=note,
            **{"seeds": (0, 1, 2, 3, 4), **fields, **(fixed or {})},
        )

    around_dmpo = [
        case(
            f"lastfm-dmpo-{negatives}",
            "LastFM, DMPO and DynamicPO as negatives get more",
            negatives,
            ("DMPO", "DynamicPO (DMPO)"),
            "DMPO",
            sweep=Sweep(f"lastfm-dmpo{suffix}", "rejected items per list", negatives),
            seeds=(0, 1, 2, 3, 4) if negatives == 15 else (0, 1, 2),
            expected=expected,
        )
        for negatives, expected in ((3, 35), (7, 45), (15, 60), (19, 70))
    ]
    around_sdpo = case(
        "lastfm-sdpo-15",
        "LastFM, 15 negatives: S-DPO, DynamicPO and NAPO",
        15,
        ("Popularity", "SFT", "SFT, twice as long", "S-DPO", "DynamicPO (S-DPO)", "NAPO"),
        "S-DPO",
        expected=43,
    )
    few = case(
        "lastfm-sdpo-3",
        "LastFM, 3 negatives: S-DPO and NAPO",
        3,
        ("S-DPO", "NAPO, nothing borrowed", "NAPO", "NAPO, authors' gradient"),
        "S-DPO",
        expected=38,
    )
    return (*around_dmpo, around_sdpo, few)


# --- data --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lists:
    """Rows to train on and to test on, with `history` (names, oldest first), `chosen` and `rejected`; and all names."""

    train: list[dict[str, Any]]
    test: list[dict[str, Any]]
    items: list[str]


def _read(root: Path | None, *, held_out: bool = False) -> Lists:
    """Return LastFM: `val` to train on and `test`; with `held_out`, a fifth of the users of `val` instead of `test`."""
    folder = None if root is None else root / "pref" / "lastfm-sdpo"
    if folder is None or not folder.is_dir():
        raise SkipCell("data set 'lastfm-sdpo' is not here: set BALLAST_DATA or --data-root")
    parts = {}
    for name in ("val", "test"):
        with gzip.open(folder / f"lastfm-{name}.json.gz", "rt", encoding="utf-8") as file:
            parts[name] = [_row(entry) for entry in json.load(file)]
    items = sorted({item for rows in parts.values() for row in rows for item in _names(row)})
    if not held_out:
        return Lists(parts["val"], parts["test"], items)
    users = _by_user(parts["val"])
    return Lists(
        [row for i, rows in enumerate(users) if i % 5 for row in rows],
        [row for i, rows in enumerate(users) if i % 5 == 0 for row in rows],
        items,
    )


def _row(entry: dict[str, Any]) -> dict[str, Any]:
    chosen = entry["trueSelection"]
    return {
        "history": entry["historyList"].split(_BETWEEN),
        "chosen": chosen,
        "rejected": [item for item in entry["itemList"] if item != chosen],
    }


def _names(row: dict[str, Any]) -> list[str]:
    return [*row["history"], row["chosen"], *row["rejected"]]


def _by_user(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return the rows of each user: consecutive ones, each history the one before with the item that came next."""
    users: list[list[dict[str, Any]]] = []
    follows: list[str] | None = None
    for row in rows:
        if follows is None or row["history"] != follows[-len(row["history"]) :]:
            users.append([])
        users[-1].append(row)
        follows = [*row["history"], row["chosen"]]
    return users


def _tokenizer(items: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per item, for texts of items with `::` between them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate((_PAD, _END, *items))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(_BETWEEN, "removed")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=_PAD, eos_token=_END)  # type: ignore[no-untyped-call]


def _generate(items: int, lists: int, seed: int) -> Lists:
    """Return generated lists: walks over a ring of items by one or two places at a time, and 19 other candidates."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def draw() -> dict[str, Any]:
        steps = torch.randint(1, 3, (7,), generator=generator).cumsum(0)
        walk = ((steps + torch.randint(items, (1,), generator=generator)) % items).tolist()
        others = [i for i in torch.randperm(items, generator=generator).tolist() if i not in walk]
        *history, chosen = [str(i) for i in walk]
        return {"history": history, "chosen": chosen, "rejected": [str(i) for i in others[:19]]}

    rows = [draw() for _ in range(2 * lists)]
    return Lists(rows[:lists], rows[lists:], [str(i) for i in range(items)])


def _dataset(rows: Sequence[dict[str, Any]], items: Sequence[str], negatives: int | None, seed: int) -> Dataset:
    """Return rows as the trainer takes them, with `negatives` of the rejected items drawn once, or all."""
    import torch
    from datasets import Dataset

    number = {item: i for i, item in enumerate(items)}
    generator = torch.Generator().manual_seed(seed)
    made = []
    for row in rows:
        drawn = torch.randperm(len(row["rejected"]), generator=generator)[:negatives].tolist()
        rejected = [row["rejected"][i] for i in drawn] if negatives else row["rejected"]
        made.append(
            {
                "prompt": _BETWEEN.join(row["history"]) + _BETWEEN,
                "chosen": row["chosen"],
                "rejected": rejected,
                "history_items": [number[item] for item in row["history"]],
                "chosen_items": number[row["chosen"]],
                "rejected_items": [number[item] for item in rejected],
            }
        )
    return Dataset.from_list(made)


# --- cells -------------------------------------------------------------------------------------------------------------


def lastfm(cell: CellInput) -> CellOutput:
    """Train and test one method on LastFM: one cell of the real cases.

    Raises:
        SkipCell: If the data is absent, or the cell wants CUDA and there is none.
    """
    return _run(cell, _read(cell.data_root, held_out=cell.settings.get("held_out", False)))


def generated(cell: CellInput) -> CellOutput:
    """Train and test one method on generated lists: one cell of the quick case."""
    return _run(cell, _generate(seed=cell.seed, **cell.settings["data"]))


def _run(cell: CellInput, lists: Lists) -> CellOutput:
    import torch
    from datasets import disable_progress_bars

    from pref_opt.multi_negative import tokenize_lists
    from pref_opt.tiny import tiny_causal_lm

    settings, device = cell.settings, cell.settings.get("device", "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise SkipCell("needs CUDA")
    if settings["method"] == "popularity":
        return CellOutput(_popular(lists))
    torch.set_num_threads(1)
    disable_progress_bars()
    tokenizer = _tokenizer(lists.items)
    training = _dataset(lists.train, lists.items, settings["negatives"], cell.seed)
    model = tiny_causal_lm(
        tokenizer,
        hidden=settings["hidden"],
        layers=settings["layers"],
        max_length=64,
        seed=cell.seed,
        num_attention_heads=settings["heads"],
        intermediate_size=settings["intermediate"],
    ).to(device)
    test = tokenize_lists(_dataset(lists.test, lists.items, None, 0), tokenizer, features=()).to_list()
    start = time.process_time()
    _supervise(model, tokenize_lists(training, tokenizer, features=()).to_list(), settings, cell.seed)
    seconds = time.process_time() - start
    before = _tested(model, test)
    info = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "train_lists": len(lists.train),
        "test_lists": len(test),
        "items": len(lists.items),
        "sft_seconds": seconds,
        **{f"sft_{name}": value for name, value in before.items()},
    }
    if settings["method"] == "sft":
        return CellOutput({**before, "train_seconds": seconds}, (), info)
    start = time.process_time()
    _prefer(model, tokenizer, training, lists, settings, cell.seed)
    seconds = time.process_time() - start
    return CellOutput({**_tested(model, test), "train_seconds": seconds}, (), info)


def _supervise(model: PreTrainedModel, rows: list[dict[str, Any]], settings: dict[str, Any], seed: int) -> None:
    """Train on the next items alone."""
    import torch

    from pref_opt.multi_negative import MultiNegativeCollator, batch_logps

    collator = MultiNegativeCollator(0, features=())
    rows = [{**row, "answer_ids": row["answer_ids"][:1]} for row in rows]
    order = torch.Generator().manual_seed(seed)
    size, epochs = settings["batch_size"], settings["sft_epochs"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["sft_lr"], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(rows) // size))
    model.train()
    for _ in range(epochs):
        for numbers in torch.randperm(len(rows), generator=order).split(size):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            batch = _moved(collator([rows[i] for i in numbers.tolist()]), model.device)
            (-batch_logps(model, batch).mean()).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.train(False)


def _prefer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    training: Dataset,
    lists: Lists,
    settings: dict[str, Any],
    seed: int,
) -> None:
    """Go on with a preference loss; the model as it is now is the reference where one is needed."""
    from transformers import PrinterCallback

    from pref_opt.multi_negative import MultiNegativeConfig, MultiNegativeTrainer

    if settings["method"] == "napo":
        training = _annotated(training, lists, seed)
    with tempfile.TemporaryDirectory() as folder:
        args = MultiNegativeConfig(
            folder,
            method=settings["method"],
            method_kwargs=settings["options"],
            feature_columns=None if settings["method"] == "napo" else [],
            per_device_train_batch_size=settings["batch_size"],
            num_train_epochs=settings["epochs"],
            learning_rate=settings["lr"],
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            max_grad_norm=0.3,
            weight_decay=0.0,
            seed=seed,
            use_cpu=settings.get("device", "cpu") == "cpu",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = MultiNegativeTrainer(model, args=args, train_dataset=training, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.train(False)


def _annotated(training: Dataset, lists: Lists, seed: int) -> Dataset:
    from pref_opt.napo import annotate_dataset, train_sasrec

    number = {item: i for i, item in enumerate(lists.items)}
    sequences = [[number[item] for item in (*row["history"], row["chosen"])] for row in lists.train]
    return annotate_dataset(training, train_sasrec(sequences, len(number), epochs=30, seed=seed))


def _tested(model: PreTrainedModel, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return how the right item ranks among all candidates of its row, by log-probability; ties count against it."""
    import torch

    from pref_opt.multi_negative import MultiNegativeCollator, batch_logps

    collator = MultiNegativeCollator(0, features=())
    with torch.no_grad():
        logps = [
            batch_logps(model, _moved(collator(rows[start : start + 128]), model.device))
            for start in range(0, len(rows), 128)
        ]
    return _ranked(torch.cat(logps))


def _popular(lists: Lists) -> dict[str, float]:
    """Return the same of how often an item occurs in training, each user's item counted once, as smoothed frequencies."""
    import torch

    start = time.process_time()
    counts = Counter(item for rows in _by_user(lists.train) for item in (*rows[0]["history"], *_chosen(rows)))
    total = sum(counts.values()) + len(lists.items)
    frequencies = torch.tensor(
        [[(counts[item] + 1) / total for item in (row["chosen"], *row["rejected"])] for row in lists.test]
    )
    return {**_ranked(frequencies.log()), "train_seconds": time.process_time() - start}


def _chosen(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [row["chosen"] for row in rows]


def _ranked(scores: Tensor) -> dict[str, float]:
    rank = (scores[:, 1:] >= scores[:, :1]).sum(1)
    return {
        "hr@1": float((rank == 0).double().mean()),
        "ndcg": float((1 / (rank + 2).double().log2()).mean()),
        "chosen_logp": float(scores[:, 0].double().mean()),
    }


def _moved(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) for name, value in batch.items() if name != "features"}
