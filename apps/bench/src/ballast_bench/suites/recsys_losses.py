"""Cases of recsys-losses: one recommender trained with each loss, everything else equal.

Protocol: fixed numbers of epochs, chosen beforehand on validation pairs or taken from the reference runs; training on all
train pairs; the test pairs are looked at for the learning curves, but nothing is selected on them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ballast_bench.case import Case, CellInput, CellOutput, Metric, Published, SkipCell, Sweep

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from recsys_losses.data import InteractionData

__all__ = ["cpu", "gpu", "quick", "train"]

# Creating the first optimiser imports torch._dynamo, which takes as long as torch itself.
_PRELOAD = ("recsys_losses.training", "torch._dynamo")
_RUN = "ballast_bench.suites.recsys_losses:train"
_RECALL = Metric("recall@20")
_NDCG = Metric("ndcg@20")
_ARP = Metric("arp@20", better="lower", label="popularity (ARP@20)", digits=1, tolerance=0.03)
_TAIL = Metric("tail_recall@20", label="tail recall@20")
_SECONDS = Metric("train_seconds", better="lower", label="train s", digits=1, tested=False, tolerance=0.25)
_METRICS = (_RECALL, _NDCG, _ARP, _SECONDS)
_TRADEOFF = ("arp@20", "recall@20")
_CURVE_POINTS = 8
_TAIL_GROUPS, _GROUPS = 5, 10

_UNIFORM = {"negatives": "uniform", "num_negatives": 512, "shared_negatives": True}
_LOSSES: dict[str, dict[str, Any]] = {
    "BPR": {"name": "bpr"},
    "BCE": {"name": "bce", "num_negatives": 4},
    "Softmax (SL)": {"name": "softmax", "temperature": 0.2, **_UNIFORM},
    "SSM uniform": {"name": "ssm", "temperature": 0.2, **_UNIFORM},
    "SSM in-batch": {"name": "ssm", "temperature": 0.3, "negatives": "in-batch"},
    "SSM in-batch+logQ": {"name": "ssm", "temperature": 0.2, "negatives": "in-batch", "logq": True},
    "BSL": {"name": "bsl", "temperature": 0.2, "power": 1.0, "bsl_mode": "multi", **_UNIFORM},
    "Adap-tau": {"name": "adap-tau", "beta": 1.0, **_UNIFORM},
    "CPR": {"name": "cpr"},
}


_FEW = {"num_negatives": 256}
_QUICK_MF: dict[str, dict[str, Any]] = {
    "BPR": {"epochs": 50, "score": "dot", "l2": 0.07},
    "BCE": {"epochs": 30, "score": "dot", "l2": 0.05},
    "Softmax (SL)": {"epochs": 15, "score": "cosine", "loss": {"temperature": 0.3, **_FEW}},
    "SSM uniform": {"epochs": 15, "score": "cosine", "loss": {"temperature": 0.3, **_FEW}},
    "SSM in-batch": {"epochs": 10, "score": "cosine", "loss": {"temperature": 1.0}},
    "SSM in-batch+logQ": {"epochs": 12, "score": "cosine", "loss": {"temperature": 0.3}},
    "BSL": {"epochs": 20, "score": "cosine", "loss": {"temperature": 0.3, "power": 0.6, **_FEW}},
    "Adap-tau": {"epochs": 15, "score": "cosine", "loss": {"warmup_epochs": 100, **_FEW}},
    "CPR": {"epochs": 15, "score": "dot", "l2": 0.1, "loss": {"cpr_sample_rate": 1.5}},
}
_QUICK_LIGHTGCN: dict[str, dict[str, Any]] = {
    "BPR": {"model": "lightgcn", "layers": 2, "epochs": 35, "score": "dot", "l2": 0.01},
    "SSM in-batch": {"model": "lightgcn", "layers": 2, "epochs": 8, "score": "dot", "loss": {"temperature": 1.0}},
}


def quick() -> tuple[Case, ...]:
    """Generated data with a known exposure bias and an unbiased test set; no files needed."""
    note = (
        "1,000 users and 400 items with known preferences; what a user clicks also depends on how often an item was shown "
        "(power law), while the test pairs are a uniform sample of what the users like. A method that learns the "
        "preferences instead of the exposure has a higher recall at a lower popularity (ARP). Each seed generates its "
        "own data. Epochs and one or two settings per loss were chosen beforehand, from a handful of values, by recall on "
        "data of two other seeds: CPR with few draws per kept sample, SSM in-batch with a high temperature."
    )
    return (
        _case(
            "synthetic-mf",
            "Matrix factorisation on generated clicks",
            "synthetic",
            {name: _settings(name, **plan) for name, plan in _QUICK_MF.items()},
            note=note,
            seeds=(0, 1, 2),
            expected=2.5,
        ),
        _case(
            "synthetic-lightgcn",
            "LightGCN on generated clicks",
            "synthetic",
            {name: _settings(name, **plan) for name, plan in _QUICK_LIGHTGCN.items()},
            note=note,
            seeds=(0, 1),
            expected=4,
        ),
    )


def cpu() -> tuple[Case, ...]:
    """Real data on a CPU: the comparison of all losses, noise, popularity bias, and one large data set."""
    return (
        *_comparison(),
        *_noise(),
        *_popularity(),
        _gowalla("cpu", epochs=8, budget=1500, expected=700),
    )


def gpu() -> tuple[Case, ...]:
    """The same shapes on a CUDA device, and Gowalla at full length."""
    small = tuple(_on_gpu(case) for case in (*_comparison(), *_noise(), *_popularity()))
    return (*small, _gowalla("cuda", epochs=200, budget=3600, expected=600), _gowalla_mf())


def _settings(
    method: str,
    *,
    epochs: int,
    score: str,
    model: str = "mf",
    layers: int = 3,
    lr: float = 5e-3,
    batch_size: int = 1024,
    l2: float | None = None,
    loss: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Return the settings of a method as JSON values; they are part of the cells' keys."""
    fit: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "lr": lr}
    if l2 is not None:
        fit["l2"] = l2
    elif method in ("BPR", "BCE"):
        fit["l2"] = 0.03
    elif method == "CPR":
        fit["l2"] = 0.01  # over all rows of the tables
    architecture = {"name": model} if model == "mf" else {"name": model, "num_layers": layers}
    return {"model": architecture, "loss": {**_LOSSES[method], **(loss or {})}, "fit": fit, "score": score, **more}


def _case(name: str, title: str, dataset: str, methods: dict[str, dict[str, Any]], **fields: Any) -> Case:
    models = {settings["model"]["name"] for settings in methods.values()}
    base: dict[str, Any] = {
        "package": "recsys_losses",
        "preload": _PRELOAD if models == {"mf"} else (*_PRELOAD, "torch_geometric.nn"),
        "run": _RUN,
        "baseline": "BPR",
        "metrics": _METRICS,
        "tradeoff": _TRADEOFF,
        "published": _published(name),
        **fields,
    }
    return Case(name=name, title=title, dataset=dataset, methods=methods, **base)


# Epochs, score, L2 and temperature of BPR and SSM are those of the reference runs (protocol, section 9). Those of the
# other losses, of LightGCN and of the debiased split had the best recall on validation pairs (a tenth of each user's
# train pairs; one seed, a handful of values per loss). The power 1 of BSL was chosen on lastfm with matrix factorisation
# and taken over for the other cases.
_MF: dict[str, dict[str, dict[str, Any]]] = {
    "ml-100k": {
        "BPR": {"epochs": 80, "score": "dot", "l2": 0.03},
        "BCE": {"epochs": 60, "score": "dot", "l2": 0.03},
        "Softmax (SL)": {"epochs": 20, "score": "cosine"},
        "SSM uniform": {"epochs": 20, "score": "cosine"},
        "SSM in-batch": {"epochs": 16, "score": "dot"},
        "SSM in-batch+logQ": {"epochs": 16, "score": "dot"},
        "BSL": {"epochs": 20, "score": "cosine"},
        "Adap-tau": {"epochs": 24, "score": "cosine"},
        "CPR": {"epochs": 20, "score": "dot", "l2": 0.1, "loss": {"cpr_sample_rate": 1.5}},
    },
    "lastfm": {
        "BPR": {"epochs": 150, "score": "dot", "l2": 0.03},
        "BCE": {"epochs": 80, "score": "dot", "l2": 0.03},
        "Softmax (SL)": {"epochs": 24, "score": "cosine"},
        "SSM uniform": {"epochs": 16, "score": "cosine"},
        "SSM in-batch": {"epochs": 36, "score": "dot"},
        "SSM in-batch+logQ": {"epochs": 16, "score": "cosine"},
        "BSL": {"epochs": 24, "score": "cosine"},
        "Adap-tau": {"epochs": 24, "score": "cosine"},
        "CPR": {"epochs": 50, "score": "dot", "l2": 0.1},
    },
}
_LIGHTGCN: dict[str, dict[str, dict[str, Any]]] = {
    "ml-100k": {
        "BPR": {"epochs": 30, "score": "dot", "l2": 0.01},
        "BCE": {"epochs": 35, "score": "dot", "l2": 0.001},
        "Softmax (SL)": {"epochs": 15, "score": "dot"},
        "SSM uniform": {"epochs": 15, "score": "dot"},
        "SSM in-batch": {"epochs": 15, "score": "dot", "loss": {"temperature": 0.5}},
        "SSM in-batch+logQ": {"epochs": 6, "score": "cosine"},
        "BSL": {"epochs": 15, "score": "dot"},
        "Adap-tau": {"epochs": 15, "score": "dot"},
        "CPR": {"epochs": 25, "score": "dot", "l2": 0.01, "loss": {"cpr_sample_rate": 1.5}},
    },
    "lastfm": {
        "BPR": {"epochs": 40, "score": "dot", "l2": 0.001},
        "BCE": {"epochs": 40, "score": "dot", "l2": 0.001},
        "Softmax (SL)": {"epochs": 15, "score": "cosine"},
        "SSM uniform": {"epochs": 15, "score": "cosine"},
        "SSM in-batch": {"epochs": 15, "score": "dot"},
        "SSM in-batch+logQ": {"epochs": 12, "score": "cosine"},
        "BSL": {"epochs": 15, "score": "cosine"},
        "Adap-tau": {"epochs": 12, "score": "cosine"},
        "CPR": {"epochs": 30, "score": "dot", "l2": 0.01, "loss": {"cpr_sample_rate": 1.5}},
    },
}
_UNBIASED: dict[str, dict[str, dict[str, Any]]] = {
    "ml-100k": {
        "BPR": {"epochs": 60, "score": "dot", "l2": 0.03},
        "SSM uniform": {"epochs": 12, "score": "cosine"},
        "SSM in-batch": {"epochs": 12, "score": "dot", "loss": {"temperature": 0.5}},
        "CPR": {"epochs": 30, "score": "dot", "l2": 0.1, "loss": {"cpr_sample_rate": 1.5}},
    },
    "lastfm": {
        "BPR": {"epochs": 50, "score": "dot", "l2": 0.03},
        "SSM uniform": {"epochs": 20, "score": "cosine"},
        "SSM in-batch": {"epochs": 24, "score": "dot"},
        "CPR": {"epochs": 40, "score": "dot", "l2": 0.01},
    },
}


def _comparison() -> tuple[Case, ...]:
    note = (
        "d = 64, batch 1024, Adam 5e-3. Epochs and settings were chosen on validation pairs, from a handful of values per "
        "loss with one seed (BPR and SSM with matrix factorisation: taken from the reference runs), then trained on all "
        "train pairs. Small differences between losses mean little."
    )
    seeds = (0, 1, 2, 3, 4)
    flat = tuple(
        _case(
            f"{dataset}-mf",
            f"Matrix factorisation on {dataset}",
            dataset,
            {name: _settings(name, model="mf", **plan) for name, plan in plans.items()},
            note=note,
            seeds=seeds,
            expected=10,
            budget=600,
        )
        for dataset, plans in _MF.items()
    )
    graph = tuple(
        _case(
            f"{dataset}-lightgcn",
            f"LightGCN on {dataset}",
            dataset,
            {name: _settings(name, model="lightgcn", layers=2, **plan) for name, plan in plans.items()},
            note=f"Two layers. {note}",
            seeds=seeds,
            expected=14,
            budget=900,
        )
        for dataset, plans in _LIGHTGCN.items()
    )
    return (*flat, *graph)


def _noise() -> tuple[Case, ...]:
    note = (
        "False positives: random items added to each user's train pairs, the test pairs stay clean; the noise is drawn "
        "anew per seed. SL and BSL share everything but the treatment of the positive scores (power 1 for both, chosen on validation pairs at 0 and 40 % noise)."
    )
    return tuple(
        _case(
            f"lastfm-noise-{percent}",
            "Positive noise on lastfm: SL and BSL",
            "lastfm",
            {
                name: _settings(name, model="mf", epochs=16, score="cosine", noise=percent / 100)
                for name in ("Softmax (SL)", "BSL")
            },
            baseline="Softmax (SL)",
            metrics=(_RECALL, _NDCG, _SECONDS),
            tradeoff=None,
            note=note,
            seeds=(0, 1, 2),
            expected=11,
            sweep=Sweep("lastfm-noise", "false positives added, %", percent),
        )
        for percent in (0, 10, 20, 30, 40)
    )


def _popularity() -> tuple[Case, ...]:
    note = (
        "Test pairs drawn against popularity (weights min(1/count, 1/median count)), so that recommending what is popular "
        "does not pay. Tail recall is the part of recall@20 that comes from the less popular items which together hold "
        "half of the train interactions. Epochs and settings had the best recall on validation pairs drawn alike, one seed "
        "(CPR on lastfm: those of the reference run)."
    )
    return tuple(
        _case(
            f"{dataset}-unbiased",
            f"Popularity bias on {dataset}, debiased split",
            dataset,
            {name: _settings(name, model="mf", split="unbiased", **plan) for name, plan in plans.items()},
            metrics=(_RECALL, _TAIL, _ARP, _NDCG, _SECONDS),
            note=note,
            seeds=(0, 1, 2),
            expected=12,
        )
        for dataset, plans in _UNBIASED.items()
    )


def _gowalla(device: str, *, epochs: int, budget: float, expected: float) -> Case:
    settings = {
        "SSM in-batch": _settings(
            "SSM in-batch",
            model="lightgcn",
            layers=1,
            epochs=epochs,
            score="dot",
            lr=1e-3 if device == "cuda" else 5e-3,
            batch_size=2048,
            l2=1e-5,
            loss={"temperature": 0.12},
            device=device,
        )
    }
    return _case(
        "gowalla-lightgcn1" if device == "cpu" else "gowalla-lightgcn1-full",
        "Gowalla, LightGCN-1 with in-batch SSM",
        "gowalla",
        settings,
        baseline="SSM in-batch",
        note=(
            f"29,858 users, 40,981 items, 810,128 train pairs; {epochs} epochs"
            + (" only, for the time budget: the published runs have about 200." if device == "cpu" else ".")
        ),
        seeds=(0,),
        tradeoff=None,
        budget=budget,
        expected=expected,
    )


def _gowalla_mf() -> Case:
    shared = {"model": "mf", "lr": 1e-4, "l2": 1e-9, "score": "cosine", "device": "cuda"}
    negatives = {"num_negatives": 800, "shared_negatives": False}
    methods = {
        "BPR": _settings("BPR", model="mf", epochs=300, score="dot", lr=1e-3, l2=1e-4, device="cuda"),
        "Softmax (SL)": _settings("Softmax (SL)", epochs=270, loss={"temperature": 0.08, **negatives}, **shared),  # type: ignore[arg-type]
        "BSL": _settings("BSL", epochs=389, loss={"temperature": 0.08, "power": 1.22, **negatives}, **shared),  # type: ignore[arg-type]
        "Adap-tau": _settings(
            "Adap-tau",
            epochs=366,
            loss={"beta": 0.25, "center": "quantile", "quantile": 0.9, "warmup_epochs": 100, "num_negatives": 1024},
            batch_size=2048,
            **shared,  # type: ignore[arg-type]
        ),
    }
    return _case(
        "gowalla-mf-full",
        "Gowalla, matrix factorisation at published settings",
        "gowalla",
        methods,
        note="Settings and numbers of epochs of the authors' logs; no dropout, which their runs of SL and BSL had.",
        seeds=(0,),
        budget=7200,
        expected=1500,
    )


def _on_gpu(case: Case) -> Case:
    methods = {name: {**settings, "device": "cuda"} for name, settings in case.methods.items()}
    return dataclasses.replace(case, name=f"{case.name}-gpu", methods=methods)


def _published(case: str) -> tuple[Published, ...]:
    rows = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))["figures"]
    return tuple(
        Published(row["method"], row["metric"], row["value"], row["source"], row.get("note", ""))
        for row in rows
        if case in row["cases"]
    )


def train(cell: CellInput) -> CellOutput:
    """Train and test one recommender: one cell of every case here.

    Raises:
        SkipCell: If the data or the device is absent.
    """
    import torch

    from recsys_losses.training import LossConfig, fit

    torch.set_num_threads(1)
    settings = cell.settings
    device = settings.get("device", "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise SkipCell("no CUDA device on this machine")
    data = _load(cell)
    model = _model(settings["model"], data, cell.seed)
    curve = _Curve(model, data, settings["score"], settings["fit"]["epochs"])
    fit(
        model,
        LossConfig(**settings["loss"]),
        data,
        **settings["fit"],
        select_on="none",
        score_eval=settings["score"],
        seed=cell.seed,
        device=device,
        on_epoch=curve,
    )
    metrics = _test(model, data, settings["score"])
    metrics["tail_recall@20"] = _tail_recall(model, data, settings["score"])
    info = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "data_sha256": _hash(data),
        "users": data.num_users,
        "items": data.num_items,
        "train_pairs": data.train.shape[1],
        "test_pairs": data.test.shape[1],
        "interactions_per_second": settings["fit"]["epochs"] * data.train.shape[1] / curve.seconds,
    }
    return CellOutput({**metrics, "train_seconds": curve.seconds}, tuple(curve.rows), info)


def _load(cell: CellInput) -> InteractionData:
    import dataclasses

    import torch

    from recsys_losses.data import inject_false_positives, load_dataset

    if cell.data_root is None and cell.dataset != "synthetic":
        raise SkipCell(f"data set {cell.dataset!r} is not here: set BALLAST_DATA or --data-root")
    try:
        data = load_dataset(cell.dataset, cell.data_root, split=cell.settings.get("split", "standard"), seed=cell.seed)
    except FileNotFoundError as error:
        raise SkipCell(f"data set {cell.dataset!r} is not here: {error}") from error
    noise = cell.settings.get("noise", 0.0)
    if noise:
        data = inject_false_positives(data, noise, torch.Generator().manual_seed(cell.seed))
    return dataclasses.replace(data, valid=None)


def _model(settings: Mapping[str, Any], data: InteractionData, seed: int) -> Any:
    from recsys_losses.models import LightGCN, MatrixFactorization

    if settings["name"] == "mf":
        return MatrixFactorization(data.num_users, data.num_items, 64, seed=seed)
    return LightGCN(data.num_users, data.num_items, data.train, 64, num_layers=settings["num_layers"], seed=seed)


class _Curve:
    """Called by `fit` after every epoch: adds up the training time, and tests the model at a few epochs."""

    def __init__(self, model: Any, data: InteractionData, score: str, epochs: int) -> None:
        self._model, self._data, self._score, self._epochs = model, data, score, epochs
        self._every = max(1, round(epochs / _CURVE_POINTS))
        self.seconds = 0.0
        self.rows: list[dict[str, float]] = []

    def __call__(self, record: dict[str, float]) -> None:
        epoch = int(record["epoch"]) + 1
        self.seconds += record["seconds"]
        if epoch % self._every and epoch != self._epochs:
            return
        tested = _test(self._model, self._data, self._score)
        self.rows.append({**record, "epoch": epoch, "seconds": self.seconds, **tested})


def _test(model: Any, data: InteractionData, score: str) -> dict[str, float]:
    """Rank the test pairs: recall, NDCG and average popularity at 20."""
    from recsys_losses.metrics import evaluate_full_ranking

    tables, pairs = _tables(model, data, score)
    return evaluate_full_ranking(*tables, *pairs, ks=(20,), metrics=("recall", "ndcg", "arp"))


def _tail_recall(model: Any, data: InteractionData, score: str) -> float:
    """Return the part of recall@20 from the less popular items that together hold half of the train interactions."""
    from recsys_losses.metrics import item_group_recall

    tables, pairs = _tables(model, data, score)
    return float(item_group_recall(*tables, *pairs, k=20, num_groups=_GROUPS)[:_TAIL_GROUPS].sum())


def _tables(model: Any, data: InteractionData, score: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    import torch

    with torch.no_grad():
        user, item = model.embeddings()
        if score == "cosine":
            user, item = torch.nn.functional.normalize(user), torch.nn.functional.normalize(item)
    return (user, item), (data.train.to(user.device), data.test.to(user.device))


def _hash(data: InteractionData) -> str:
    digest = hashlib.sha256(f"{data.num_users} {data.num_items}".encode())
    for pairs in (data.train, data.test):
        digest.update(pairs.numpy().tobytes())
    return digest.hexdigest()
