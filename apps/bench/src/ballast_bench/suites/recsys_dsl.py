"""Cases of dynamic sparse learning: a LightGCN with a tenth to a half of its weights, the rest of the training equal.

Protocol: fixed numbers of epochs; training on all train pairs; the test pairs are looked at for the learning curves, but
nothing is selected on them.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ballast_bench.case import Case, CellInput, CellOutput, Metric, SkipCell, Sweep

if TYPE_CHECKING:
    from recsys_losses.data import InteractionData

__all__ = ["cpu", "quick", "train"]

# Creating the first optimiser imports torch._dynamo, which takes as long as torch itself.
_PRELOAD = ("recsys_losses.dsl", "torch._dynamo", "torch_geometric.nn")
_METRICS = (
    Metric("recall@20"),
    Metric("ndcg@20"),
    Metric("nonzero", better="lower", label="non-zeros", digits=3, tested=False),
    Metric("table_kib", better="lower", label="exported table, KiB", digits=0, tested=False),
    Metric("train_seconds", better="lower", label="train s", digits=1, tested=False, tolerance=0.25),
)
_CURVE_POINTS = 8
_FRESH = "DSL, reset + sum"
_ALL = ("dense", "DSL", "static mask", "random growth", _FRESH)


def quick() -> tuple[Case, ...]:
    """Generated clicks; no files needed."""
    return (
        _case(
            "synthetic-dsl",
            "LightGCN with a quarter of its weights on generated clicks",
            "synthetic",
            _methods(_ALL[:3], 0.25, interval=40, epochs=30, layers=2, dim=64),
            note=(
                "1,000 users and 400 items, two layers, 64 dimensions, 30 epochs. Each seed generates its own data. The "
                "interval between two updates of the mask is that of the real data, shortened with the training."
            ),
            expected=3,
        ),
    )


def cpu() -> tuple[Case, ...]:
    """LightGCN on lastfm at three densities, and for twice as long."""
    note = (
        "LightGCN with 3 layers and 64 dimensions, BPR, batches of 1024, Adam from 1e-2 to 1e-4 by a cosine, an update of "
        "the mask every 200 steps: settings of the reference run, none tuned for sparse training. Beside them the best of "
        "six variants of DSL on validation pairs at density 0.5, one or two seeds each: Adam's moments of newly active "
        "weights reset, and growth by the sum of the gradients since the last update. All masks start random with the same "
        "density. {} steps are very few: the paper trains for about a million. The exported table is the one before "
        "propagation, columns in one byte each."
    )
    short = tuple(
        _case(
            f"lastfm-dsl-{density}",
            f"LightGCN with {density:.0%} of its weights on lastfm",
            "lastfm",
            _methods(_ALL if density == 0.5 else _ALL[1:], density, interval=200, epochs=40, layers=3, dim=64),
            note=note.format("1,680"),
            sweep=Sweep("lastfm-dsl", "share of non-zero weights", density),
            expected=15,
        )
        for density in (0.5, 0.2, 0.1)
    )
    longer = _case(
        "lastfm-dsl-0.5-long",
        "LightGCN with 50% of its weights on lastfm, twice as long",
        "lastfm",
        _methods(("dense", "DSL", _FRESH), 0.5, interval=200, epochs=80, layers=3, dim=64),
        note=note.format("3,360"),
        baseline="dense",
        expected=25,
    )
    return (*short, longer)


def _methods(
    names: tuple[str, ...], density: float, *, interval: int, epochs: int, layers: int, dim: int
) -> dict[str, dict[str, Any]]:
    sparse = {"density": density, "update_interval": interval}
    options: dict[str, dict[str, Any] | None] = {
        "dense": None,
        "DSL": sparse,
        "static mask": {**sparse, "stop_fraction": 0.0},
        "random growth": {**sparse, "growth": "random"},
        _FRESH: {**sparse, "reset_new_state": True, "accumulate_grad": True},
    }
    return {name: {"epochs": epochs, "layers": layers, "dim": dim, "dsl": options[name]} for name in names}


def _case(name: str, title: str, dataset: str, methods: dict[str, dict[str, Any]], **fields: Any) -> Case:
    return Case(
        package="recsys_losses",
        name=name,
        title=title,
        dataset=dataset,
        methods=methods,
        run="ballast_bench.suites.recsys_dsl:train",
        metrics=_METRICS,
        seeds=(0, 1, 2),
        preload=_PRELOAD,
        budget=900,
        **{"baseline": "static mask", **fields},
    )


def train(cell: CellInput) -> CellOutput:
    """Train and test one LightGCN, dense or sparse: one cell of every case here.

    Raises:
        SkipCell: If the data is absent.
    """
    import torch

    from recsys_losses.dsl import DSLConfig, count_costs, evaluate_backbone, fit_sparse
    from recsys_losses.models import LightGCN

    torch.set_num_threads(1)
    settings, data = cell.settings, _load(cell)
    model = LightGCN(data.num_users, data.num_items, data.train, settings["dim"], settings["layers"], seed=cell.seed)
    every = max(1, round(settings["epochs"] / _CURVE_POINTS))
    seconds, curve = 0.0, []

    def tested() -> dict[str, float]:
        metrics = evaluate_backbone(model, data)
        return {name: metrics[name] for name in ("recall@20", "ndcg@20")}

    def follow(record: dict[str, float]) -> None:
        nonlocal seconds
        seconds += record["seconds"]
        if (record["epoch"] + 1) % every == 0:
            curve.append({**record, "epoch": record["epoch"] + 1, "seconds": seconds, **tested()})

    result = fit_sparse(
        model,
        data,
        None if settings["dsl"] is None else DSLConfig(**settings["dsl"]),
        epochs=settings["epochs"],
        lr=1e-2,
        final_lr=1e-4,
        select_on="none",
        seed=cell.seed,
        on_epoch=follow,
    )
    metrics = {
        **tested(),
        "nonzero": count_costs(model, result.masks)["ratio"],
        "table_kib": _exported_bytes(model, sparse=bool(result.masks)) / 1024,
        "train_seconds": seconds,
    }
    info = {
        "device": "cpu",
        "users": data.num_users,
        "items": data.num_items,
        "train_pairs": data.train.shape[1],
        "test_pairs": data.test.shape[1],
        "explored": result.explored,
    }
    return CellOutput(metrics, tuple(curve), info)


def _load(cell: CellInput) -> InteractionData:
    import dataclasses

    from recsys_losses.data import load_dataset

    if cell.data_root is None and cell.dataset != "synthetic":
        raise SkipCell(f"data set {cell.dataset!r} is not here: set BALLAST_DATA or --data-root")
    try:
        data = load_dataset(cell.dataset, cell.data_root, seed=cell.seed)
    except FileNotFoundError as error:
        raise SkipCell(f"data set {cell.dataset!r} is not here: {error}") from error
    return dataclasses.replace(data, valid=None)


def _exported_bytes(model: Any, *, sparse: bool) -> int:
    """Return the size of the file with the trained table."""
    from recsys_losses.dsl import save_compressed, to_csr

    table = model.backbone.embedding.weight.detach()
    with tempfile.TemporaryDirectory() as folder:
        return save_compressed(Path(folder) / "table.safetensors", {"table": to_csr(table) if sparse else table})
