"""Cases of SGL: LightGCN with BPR beside the same model with self-supervised views.

Protocol: settings and numbers of epochs were chosen beforehand on validation pairs; training on all train pairs; the test
pairs are looked at for the learning curves, but nothing is selected on them.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from ballast_bench.case import Case, CellInput, CellOutput, Metric, SkipCell, Sweep

if TYPE_CHECKING:
    from recsys_losses.data import InteractionData
    from recsys_losses.sgl import SGL

__all__ = ["cpu", "quick", "train"]

# Creating the first optimiser imports torch._dynamo, which takes as long as torch itself.
_PRELOAD = ("recsys_losses.sgl", "recsys_losses.training", "torch._dynamo", "torch_geometric.nn")
_RUN = "ballast_bench.suites.recsys_sgl:train"
_METRICS = (
    Metric("recall@20"),
    Metric("ndcg@20"),
    Metric("tail_recall@20", label="tail recall@20"),
    Metric("train_seconds", better="lower", label="train s", digits=1, tested=False, tolerance=0.25),
)
_CURVE_POINTS = 8
_TAIL_GROUPS, _GROUPS = 8, 10
_TAIL = (
    "Tail recall is the part of recall@20 that comes from the less popular items which together hold eight tenths of the "
    "train interactions."
)

_QUICK_LIGHTGCN: dict[str, Any] = {"ssl_weight": 0.0, "l2_weight": 1e-3, "epochs": 9}
_QUICK_SGL: dict[str, Any] = {"ssl_weight": 0.005, "l2_weight": 1e-3, "epochs": 7}
_LIGHTGCN: dict[str, Any] = {"ssl_weight": 0.0, "l2_weight": 1e-3, "epochs": 75}
_SGL: dict[str, Any] = {"ssl_weight": 0.05, "l2_weight": 1e-3, "epochs": 14}


def quick() -> tuple[Case, ...]:
    """Generated data; no files needed."""
    return (
        Case(
            package="recsys_losses",
            name="synthetic-sgl",
            title="SGL on generated clicks",
            dataset="synthetic",
            run=_RUN,
            methods={
                "LightGCN": _settings(_QUICK_LIGHTGCN, batch_size=1024),
                "SGL-ED": _settings(_QUICK_SGL, aug="ed", batch_size=1024),
            },
            baseline="LightGCN",
            seeds=(0, 1),
            metrics=_METRICS,
            expected=3,
            tradeoff=("tail_recall@20", "recall@20"),
            preload=_PRELOAD,
            note=(
                "1,000 users and 400 items; what a user clicks depends on how often an item was shown, the test pairs are "
                "a uniform sample of what the users like. Each seed generates its own data. Epochs and weights were "
                f"chosen beforehand, from a handful of values, by recall on data of two other seeds. {_TAIL}"
            ),
        ),
    )


def cpu() -> tuple[Case, ...]:
    """lastfm: three kinds of views beside LightGCN, clean and with false pairs."""
    note = (
        "d = 64, two layers, batch 2,048, Adam 1e-2, users drawn uniformly. Epochs and weights of LightGCN and of SGL-ED were "
        "chosen on validation pairs (a tenth of each user's train pairs, one seed, four or five settings); SGL-ND and "
        f"SGL-RW take over those of SGL-ED. {_TAIL}"
    )
    sweep = "lastfm-sgl-noise", "false pairs added, %"
    base: dict[str, Any] = {
        "package": "recsys_losses",
        "dataset": "lastfm",
        "run": _RUN,
        "baseline": "LightGCN",
        "seeds": (0, 1, 2),
        "metrics": _METRICS,
        "tradeoff": ("tail_recall@20", "recall@20"),
        "preload": _PRELOAD,
        "budget": 900.0,
        "expected": 18.0,
    }
    views = {f"SGL-{aug.upper()}": _settings(_SGL, aug=aug) for aug in ("ed", "nd", "rw")}
    early = _settings({**_LIGHTGCN, "epochs": _SGL["epochs"]})
    noisy = {
        "LightGCN": _settings(_LIGHTGCN, noise=0.2),
        "SGL-ED": _settings(_SGL, aug="ed", noise=0.2),
    }
    return (
        Case(
            name="lastfm-sgl",
            title="SGL on lastfm",
            methods={"LightGCN": _settings(_LIGHTGCN), "LightGCN (epochs of SGL)": early, **views},
            sweep=Sweep(*sweep, 0),
            note=note,
            **base,
        ),
        Case(
            name="lastfm-sgl-noise-20",
            title="SGL on lastfm with 20 % false pairs",
            methods=noisy,
            sweep=Sweep(*sweep, 20),
            note=(
                "Random pairs, drawn uniformly from those that are in neither train nor test and anew per seed, are added "
                f"to the train pairs; settings and epochs are those of the clean data. {note}"
            ),
            **base,
        ),
    )


def _settings(
    plan: dict[str, Any], *, aug: str | None = None, noise: float = 0.0, batch_size: int = 2048
) -> dict[str, Any]:
    """Return the settings of a method as JSON values; they are part of the cells' keys."""
    model = {"num_layers": 2, "l2_weight": plan["l2_weight"], "ssl_weight": plan["ssl_weight"]}
    if aug is not None:
        model |= {"aug": aug, "ssl_ratio": 0.1, "temperature": 0.2}
    settings = {"model": model, "fit": {"epochs": plan["epochs"], "lr": 1e-2}, "batch_size": batch_size}
    return settings | ({"noise": noise} if noise else {})


def train(cell: CellInput) -> CellOutput:
    """Train and test one model: one cell of every case here.

    Raises:
        SkipCell: If the data is absent.
    """
    import torch

    from recsys_losses.sgl import SGL, BPRSampler, fit

    torch.set_num_threads(1)
    settings = cell.settings
    data = _load(cell)
    model = SGL(data.num_users, data.num_items, data.train, 64, **settings["model"], seed=cell.seed)
    curve = _Curve(model, data, settings["fit"]["epochs"])
    sampler = BPRSampler(data, batch_size=settings["batch_size"], seed=cell.seed)
    fit(model, sampler, **settings["fit"], select_on="none", on_epoch=curve)
    info = {
        "device": "cpu",
        "data_sha256": _hash(data),
        "users": data.num_users,
        "items": data.num_items,
        "train_pairs": data.train.shape[1],
        "test_pairs": data.test.shape[1],
        "interactions_per_second": settings["fit"]["epochs"] * data.train.shape[1] / curve.seconds,
    }
    return CellOutput({**_test(model, data), "train_seconds": curve.seconds}, tuple(curve.rows), info)


class _Curve:
    """Called by `fit` after every epoch: adds up the training time, and tests the model at a few epochs."""

    def __init__(self, model: SGL, data: InteractionData, epochs: int) -> None:
        self._model, self._data, self._epochs = model, data, epochs
        self._every = max(1, round(epochs / _CURVE_POINTS))
        self.seconds = 0.0
        self.rows: list[dict[str, float]] = []

    def __call__(self, record: dict[str, float]) -> None:
        epoch = int(record["epoch"]) + 1
        self.seconds += record["seconds"]
        if epoch % self._every and epoch != self._epochs:
            return
        self.rows.append({**record, "epoch": epoch, "seconds": self.seconds, **_test(self._model, self._data)})


def _test(model: SGL, data: InteractionData) -> dict[str, float]:
    """Rank the test pairs: recall, NDCG, and recall from the tail."""
    import torch

    from recsys_losses.metrics import evaluate_full_ranking, item_group_recall

    with torch.no_grad():
        tables = model.embeddings()
        metrics = evaluate_full_ranking(*tables, data.train, data.test, ks=(20,), metrics=("recall", "ndcg"))
        groups = item_group_recall(*tables, data.train, data.test, k=20, num_groups=_GROUPS)
    return {**metrics, "tail_recall@20": float(groups[:_TAIL_GROUPS].sum())}


def _load(cell: CellInput) -> InteractionData:
    import dataclasses

    import torch

    from recsys_losses.data import load_dataset
    from recsys_losses.sgl import add_noise

    if cell.data_root is None and cell.dataset != "synthetic":
        raise SkipCell(f"data set {cell.dataset!r} is not here: set BALLAST_DATA or --data-root")
    try:
        data = load_dataset(cell.dataset, cell.data_root, seed=cell.seed)
    except FileNotFoundError as error:
        raise SkipCell(f"data set {cell.dataset!r} is not here: {error}") from error
    noise = cell.settings.get("noise", 0.0)
    if noise:
        data = add_noise(data, noise, generator=torch.Generator().manual_seed(cell.seed))
    return dataclasses.replace(data, valid=None)


def _hash(data: InteractionData) -> str:
    digest = hashlib.sha256(f"{data.num_users} {data.num_items}".encode())
    for pairs in (data.train, data.test):
        digest.update(pairs.numpy().tobytes())
    return digest.hexdigest()
