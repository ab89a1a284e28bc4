"""Cases of GOOD-Motif: the methods of graph-ood and the baselines, on one network where the method leaves it open.

Protocol: the epoch is the one with the best accuracy on the out-of-distribution validation graphs, after the first 70 % of
the epochs for AIA; the test graphs choose nothing.
"""

from __future__ import annotations

from typing import Any

from ballast_bench.case import Case, CellInput, CellOutput, Metric, SkipCell

__all__ = ["cpu", "gpu", "quick", "train"]

# Creating the first optimiser imports torch._dynamo, which takes as long as torch itself.
_PRELOAD = ("graph_ood.baselines", "graph_ood.cal", "sklearn.metrics", "torch._dynamo")
_METRICS = (
    Metric("test_accuracy", label="test accuracy"),
    Metric("id_test_accuracy", label="accuracy in distribution", tested=False),
    Metric("train_seconds", better="lower", label="train s", digits=1, tested=False, tolerance=0.25),
)
_METHODS: dict[str, dict[str, Any]] = {
    "ERM": {"method": "erm"},
    "IRM": {"method": "irm"},
    "V-REx": {"method": "vrex"},
    "GroupDRO": {"method": "group-dro"},
    "mixup": {"method": "mixup"},
    "DropEdge": {"method": "drop-edge"},
    "CAL": {"method": "cal"},
    "InfoIGL": {"method": "infoigl"},
    "ERM, network of AIA": {"method": "erm", "net": "aia"},
    "AIA": {"method": "aia"},
}
_NET = (
    "ERM to InfoIGL share the encoder ({layers} GIN layers, {hidden} dimensions, dropout 0.5), the sum over nodes and the head; "
    "AIA has two layers before and two after its masks, the mean over nodes and a linear head, and its own ERM beside it. "
)
_STRENGTHS = (
    "Adam, 1e-3 (AIA: 5e-3 for the adversary), a cosine over the epochs. Strengths are the defaults of the package; nothing "
    "was tuned."
)


def quick() -> tuple[Case, ...]:
    """Generated graphs; no files needed."""
    return (
        _case(
            "motif-quick",
            "GOOD-Motif, bases that vote for a class in training, tiny",
            ("base", "concept"),
            ("ERM", "V-REx", "CAL"),
            {"num_data": 300, "hidden": 16, "layers": 2, "batch_size": 64, "epochs": 5},
            note="126 training graphs and five epochs: whether everything runs, not how well.",
            seeds=(0, 1),
            expected=0.8,
        ),
    )


def cpu() -> tuple[Case, ...]:
    """1,500 training graphs: mechanics and cost, not accuracy."""
    note = (
        "1,500 of the usual {full} training graphs, batches of 64, 20 epochs, two seeds, each with its own graphs: a check of "
        "mechanics and cost. At this size the methods can't be told apart; the published programs can't be told apart "
        "either. " + _NET.format(layers=3, hidden=64) + _STRENGTHS
    )
    small = {"hidden": 64, "layers": 3, "batch_size": 64, "epochs": 20}
    return (
        _case(
            "motif-base-covariate-small",
            "GOOD-Motif, bases never seen in training, 1,500 training graphs",
            ("base", "covariate"),
            tuple(_METHODS),
            {**small, "num_data": 2500},
            note=note.format(full="18,000"),
            seeds=(0, 1),
            expected=15,
        ),
        _case(
            "motif-base-concept-small",
            "GOOD-Motif, bases that vote for a class in training, 1,500 training graphs",
            ("base", "concept"),
            tuple(_METHODS),
            {**small, "num_data": 3572},
            note=note.format(full="12,600"),
            seeds=(0, 1),
            expected=15,
        ),
    )


def gpu() -> tuple[Case, ...]:
    """The full data sets, ten seeds; skips without CUDA."""
    full = {
        "hidden": 128,
        "layers": 3,
        "batch_size": 256,
        "epochs": 100,
        "num_data": 30000,
        "data_seed": 0,
        "device": "cuda",
    }
    note = (
        "Full size, batches of 256, 100 epochs, ten seeds on the same graphs. "
        + _NET.format(layers=3, hidden=128)
        + _STRENGTHS
    )
    shifts = {
        ("base", "covariate"): "bases never seen in training",
        ("base", "concept"): "bases that vote for a class in training",
        ("size", "covariate"): "graphs larger than in training",
    }
    return tuple(
        _case(
            f"motif-{domain}-{shift}",
            f"GOOD-Motif, {what}",
            (domain, shift),
            tuple(_METHODS),
            full,
            note=note,
            seeds=tuple(range(10)),
            expected=120,
            budget=3600,
        )
        for (domain, shift), what in shifts.items()
    )


def _case(
    name: str, title: str, data: tuple[str, str], methods: tuple[str, ...], settings: dict[str, Any], **fields: Any
) -> Case:
    shared = {"domain": data[0], "shift": data[1], **settings}
    return Case(
        package="graph_ood",
        name=name,
        title=title,
        dataset="good-motif",
        methods={method: {**shared, **_METHODS[method]} for method in methods},
        run="ballast_bench.suites.graph_ood_motif:train",
        metrics=_METRICS,
        baseline="ERM",
        preload=_PRELOAD,
        **{"budget": 900, **fields},
    )


def train(cell: CellInput) -> CellOutput:
    """Train and test one classifier: one cell of every case here.

    Raises:
        SkipCell: If the cell wants CUDA and there is none.
    """
    import torch
    from torch_geometric.loader import DataLoader  # type: ignore[import-untyped]

    from graph_ood.data import load_good_motif
    from graph_ood.training import evaluate

    torch.set_num_threads(1)
    settings = cell.settings
    device = settings.get("device", "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise SkipCell("needs CUDA")
    splits = load_good_motif(
        None,
        settings["domain"],
        settings["shift"],
        num_data=settings["num_data"],
        seed=settings.get("data_seed", cell.seed),
    )
    loaders = {name: DataLoader(split, 256) for name, split in splits.items()}
    torch.manual_seed(cell.seed)
    fit, predict, model = _method(settings, cell.seed, device)
    history = fit(DataLoader(splits["train"], settings["batch_size"], shuffle=True), loaders["val"])
    metrics = {f"{name}_accuracy": evaluate(predict, loaders[name], device=device) for name in ("test", "id_test")}
    info = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "train_graphs": len(splits["train"]),
        "test_graphs": len(splits["test"]),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "best_epoch": history.best_epoch,
        **_mask_auc(model, settings["method"], loaders["test"], device),
    }
    curve = tuple({**record, "epoch": record["epoch"] + 1} for record in history.records)
    return CellOutput({**metrics, "train_seconds": history.train_seconds}, curve, info)


def _method(settings: dict[str, Any], seed: int, device: str) -> tuple[Any, Any, Any]:
    """Return how to train, how to predict, and the model."""
    from functools import partial

    from torch import nn

    from graph_ood.aia import AIA, AIATrainer
    from graph_ood.baselines import train_baseline
    from graph_ood.cal import CAL, train_cal
    from graph_ood.infoigl import InfoIGL, InfoIGLTrainer
    from graph_ood.nets import ConvStack, GraphClassifier

    method, hidden, epochs = settings["method"], settings["hidden"], settings["epochs"]
    if method == "aia":
        aia = AIA(1, 3, hidden=hidden)
        trainer = AIATrainer(aia, epochs=epochs, warmup_select=int(0.7 * epochs), seed=seed)
        return partial(trainer.fit, device=device), aia, aia
    shared = {"epochs": epochs, "seed": seed, "device": device}
    if settings.get("net") == "aia":
        model = GraphClassifier(ConvStack(1, hidden, 4, "weighted_gin"), 3, pool="mean", head=nn.Linear(hidden, 3))
        return partial(train_baseline, model, method=method, scheduler="cosine", **shared), model, model
    encoder = ConvStack(1, hidden, settings["layers"], "gin")
    if method == "cal":
        cal = CAL(1, 3, encoder=encoder)
        return partial(train_cal, cal, **shared), cal.predict, cal
    if method == "infoigl":
        infoigl = InfoIGL(1, 3, encoder=encoder)
        return partial(InfoIGLTrainer(infoigl).fit, **shared), infoigl.predict, infoigl
    model = GraphClassifier(encoder, 3)
    return partial(train_baseline, model, method=method, scheduler="cosine", **shared), model, model


def _mask_auc(model: Any, method: str, loader: Any, device: str) -> dict[str, float]:
    """Return how well node masks rank the true motif first in test graphs; nothing for methods without masks."""
    import torch

    from graph_ood.explain import mask_auc

    if method not in ("cal", "infoigl", "aia"):
        return {}
    areas, graphs = 0.0, 0
    with torch.no_grad():
        for batch in loader:
            batch = batch.to(device)
            mask = model.augment(batch, "stable").node if method == "aia" else model(batch)["node_att"]
            areas += mask_auc(mask, batch.node_gt, batch.batch) * batch.num_graphs
            graphs += batch.num_graphs
    return {"node_mask_auc": areas / graphs}
