"""Cases of ADNCE: InfoNCE beside ADNCE while false negatives are let in, and graph classification on MUTAG.

The contrastive task is generated. A sample belongs to a latent class and varies around its centre; a view mixes sample
and fresh nuisance variables through a random non-linear map. What the labels allow is the dial: negatives of the
anchor's own class (false negatives) stay in the loss with a given probability. An embedding is judged by the class of its
nearest neighbours, and the features under it by a linear probe.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

from ballast_bench.case import Case, CellInput, CellOutput, Metric, Published, SkipCell, Sweep

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["contrast", "cpu", "graphs", "quick"]

_HERE = "ballast_bench.suites.recsys_adnce"
_PRELOAD = ("recsys_losses.adnce", "torch._dynamo")
_KNN = Metric("knn_accuracy", label="20-NN accuracy")
_PROBE = Metric("probe_accuracy", label="linear probe accuracy")
_ACCURACY = Metric("accuracy", label="10-fold SVM accuracy")
_SECONDS = Metric("train_seconds", better="lower", label="train s", digits=1, tested=False, tolerance=0.25)

_CLASSES, _LATENT, _NUISANCE, _WIDTH = 10, 16, 16, 64
_TRAIN, _TEST, _BATCH, _HIDDEN, _OUT = 2000, 2000, 128, 128, 32
_NEIGHBOURS = 20

# Share of false negatives kept -> temperature of both methods, mu and sigma of ADNCE; see `_NOTE`.
_CHOSEN = {0.0: (0.4, 0.7, 1.0), 0.5: (0.4, 0.1, 0.5), 1.0: (0.2, 1.5, 1.0)}
_TEMPERATURES = (0.2, 0.4, 0.8)
_NOTE = (
    "Generated task: 10 latent classes, two noisy views per sample, batches of 128, an MLP encoder. The share on the axis is "
    "the probability that a negative of the anchor's own class stays in the loss (0: the labels remove all false negatives, "
    "100 %: plain in-batch negatives). Every seed generates its own data. "
)


def quick() -> tuple[Case, ...]:
    """One small case: half of the false negatives kept."""
    temperature, mu, sigma = _CHOSEN[0.5]
    small = {"temperature": temperature, "kept": 0.5, "samples": 1000, "epochs": 20}
    return (
        _contrast_case(
            "adnce-false-negatives-small",
            "Contrastive learning with half of the false negatives",
            {"InfoNCE": small, "ADNCE": {**small, "mu": mu, "sigma": sigma}},
            baseline="InfoNCE",
            seeds=(0, 1),
            expected=2,
            note=f"{_NOTE}Settings were chosen on the larger task of the cpu suite, on data of other seeds.",
        ),
    )


def cpu() -> tuple[Case, ...]:
    """ADNCE against InfoNCE as false negatives grow, InfoNCE at three temperatures, and MUTAG."""
    return (*_false_negatives(), *_temperatures(), _mutag())


def _false_negatives() -> tuple[Case, ...]:
    note = (
        "Both methods share the temperature, the best one of InfoNCE out of 0.1, 0.2, 0.4 and 0.8; mu and sigma of ADNCE were "
        "the best at that temperature out of 0.1, 0.4, 0.7, 1.5 and 0.5, 1. Both were chosen by 20-NN accuracy on data of two other seeds, for each share."
    )
    return tuple(
        _contrast_case(
            f"adnce-false-negatives-{round(100 * kept)}",
            "ADNCE and InfoNCE as false negatives grow",
            {
                "InfoNCE": _contrast_settings(kept, temperature),
                "ADNCE": _contrast_settings(kept, temperature, mu=mu, sigma=sigma),
            },
            baseline="InfoNCE",
            seeds=(0, 1, 2, 3, 4),
            sweep=Sweep("adnce-false-negatives", "false negatives kept, %", 100 * kept),
            expected=3,
            note=_NOTE + note,
        )
        for kept, (temperature, mu, sigma) in _CHOSEN.items()
    )


def _temperatures() -> tuple[Case, ...]:
    note = "The paper finds that the best temperature falls as false negatives grow (figure 1); nothing is chosen here."
    methods = {f"InfoNCE, tau {temperature}": temperature for temperature in _TEMPERATURES}
    return tuple(
        _contrast_case(
            f"adnce-temperature-{round(100 * kept)}",
            "InfoNCE at three temperatures as false negatives grow",
            {name: _contrast_settings(kept, temperature) for name, temperature in methods.items()},
            baseline=f"InfoNCE, tau {_TEMPERATURES[1]}",
            seeds=(0, 1, 2),
            sweep=Sweep("adnce-temperature", "false negatives kept, %", 100 * kept),
            expected=3,
            note=_NOTE + note,
        )
        for kept in _CHOSEN
    )


def _mutag() -> Case:
    settings = {"temperature": 0.15, "augmentation": "random2", "epochs": 20}
    return Case(
        package="recsys_losses",
        name="adnce-mutag",
        title="Graph classification on MUTAG without labels (GraphCL)",
        dataset="mutag",
        run=f"{_HERE}:graphs",
        methods={"InfoNCE": settings, "ADNCE": {**settings, "mu": 0.7, "sigma": 1.0}},
        baseline="InfoNCE",
        seeds=(0, 1, 2, 3, 4),
        metrics=(_ACCURACY, _SECONDS),
        preload=(*_PRELOAD, "torch_geometric.nn", "sklearn.svm"),
        expected=6,
        published=(
            Published("InfoNCE", "accuracy", 0.8680, "ADNCE paper, Table 10", "GraphCL with its own temperature"),
            Published("ADNCE", "accuracy", 0.8904, "ADNCE paper, Table 10"),
        ),
        note=(
            "188 graphs, the larger class has 66.5 %. Settings of the paper for ADNCE, the same temperature for InfoNCE; 20 "
            "epochs, no selection. Accuracy of an SVM on frozen embeddings, mean of 10 folds. The differences between "
            "seeds are larger than the one between the methods."
        ),
    )


def _contrast_settings(kept: float, temperature: float, **bump: float) -> dict[str, Any]:
    return {"temperature": temperature, **bump, "kept": kept, "samples": _TRAIN, "epochs": 20}


def _contrast_case(name: str, title: str, methods: dict[str, dict[str, Any]], **fields: Any) -> Case:
    return Case(
        package="recsys_losses",
        name=name,
        title=title,
        dataset="generated",
        run=f"{_HERE}:contrast",
        methods=methods,
        metrics=(_KNN, _PROBE, _SECONDS),
        preload=(*_PRELOAD, "sklearn.linear_model", "sklearn.neighbors"),
        **fields,
    )


class _Task(NamedTuple):
    """Samples (n, _LATENT) of classes (n,), the first ones for training, and the map from which views come."""

    label: Tensor
    sample: Tensor
    inner: Tensor
    outer: Tensor

    def view(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Return a view of these samples, with fresh nuisance."""
        import torch

        nuisance = torch.randn(len(rows), _NUISANCE, generator=generator)
        return (torch.cat([self.sample[rows], nuisance], 1) @ self.inner).tanh() @ self.outer


def _task(samples: int, generator: torch.Generator) -> _Task:
    import torch

    total, mixed = samples + _TEST, 2 * _WIDTH
    inner = torch.randn(_LATENT + _NUISANCE, mixed, generator=generator) * 2 / (_LATENT + _NUISANCE) ** 0.5
    outer = torch.randn(mixed, _WIDTH, generator=generator) / mixed**0.5
    centre = torch.randn(_CLASSES, _LATENT, generator=generator)
    label = torch.randint(_CLASSES, (total,), generator=generator)
    sample = centre[label] + torch.randn(total, _LATENT, generator=generator)
    return _Task(label, sample, inner, outer)


def contrast(cell: CellInput) -> CellOutput:
    """Train an encoder on the generated task and judge it: one cell of the false-negative cases."""
    import torch
    from torch.nn.functional import normalize

    torch.set_num_threads(1)
    settings = cell.settings
    generator = torch.Generator().manual_seed(cell.seed)
    task = _task(settings["samples"], generator)
    encoder, head = _networks(cell.seed)
    start = time.perf_counter()
    history = _train(task, encoder, head, settings, generator)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        features = encoder(task.view(torch.arange(len(task.label)), generator))
        embedding = normalize(head(features), dim=1)
    metrics = _judge(features, embedding, task.label, settings["samples"])
    return CellOutput({**metrics, "train_seconds": seconds}, history, {"device": "cpu", "batch": _BATCH})


def _networks(seed: int) -> tuple[nn.Module, nn.Module]:
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = nn.Sequential(nn.Linear(_WIDTH, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, _HIDDEN), nn.ReLU())
        head = nn.Sequential(nn.Linear(_HIDDEN, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, _OUT))
    return encoder, head


def _train(
    task: _Task, encoder: nn.Module, head: nn.Module, settings: dict[str, Any], generator: torch.Generator
) -> tuple[dict[str, float], ...]:
    import torch

    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=1e-3)
    history = []
    start = time.perf_counter()
    for epoch in range(settings["epochs"]):
        order = torch.randperm(settings["samples"], generator=generator)
        total, steps = 0.0, settings["samples"] // _BATCH
        for rows in order[: steps * _BATCH].view(steps, _BATCH):
            loss = _loss(task, rows, encoder, head, settings, generator)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += float(loss.detach())
        history.append({"epoch": epoch + 1, "loss": total / steps, "seconds": time.perf_counter() - start})
    return tuple(history)


def _loss(
    task: _Task,
    rows: Tensor,
    encoder: nn.Module,
    head: nn.Module,
    settings: dict[str, Any],
    generator: torch.Generator,
) -> Tensor:
    """Return the loss of a batch, variant "simclr" with a part of the false negatives masked."""
    import torch
    from torch.nn.functional import normalize

    from recsys_losses.adnce import adnce_from_similarity

    views = torch.cat([task.view(rows, generator), task.view(rows, generator)])
    embedding = normalize(head(encoder(views)), dim=1)
    similarity = embedding @ embedding.T
    label = task.label[rows].repeat(2)
    kept = torch.rand(similarity.shape, generator=generator) < settings["kept"]
    own = torch.eye(len(rows), dtype=torch.bool).repeat(2, 2)
    return adnce_from_similarity(
        similarity.diagonal(len(rows)).repeat(2),
        similarity,
        temperature=settings["temperature"],
        mu=settings.get("mu"),
        sigma=settings.get("sigma"),
        mask=((label[:, None] != label) | kept) & ~own,
    )


def _judge(features: Tensor, embedding: Tensor, label: Tensor, samples: int) -> dict[str, float]:
    """Return the accuracies on the test samples of classifiers that are fitted on the training samples."""
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
    from sklearn.neighbors import KNeighborsClassifier  # type: ignore[import-untyped]

    scaled = (features - features[:samples].mean(0)) / (features[:samples].std(0) + 1e-6)
    judges = {
        "knn_accuracy": (KNeighborsClassifier(_NEIGHBOURS), embedding),
        "probe_accuracy": (LogisticRegression(C=0.1, max_iter=1000), scaled),
    }
    y = label.numpy()
    return {
        name: float(judge.fit(x[:samples].numpy(), y[:samples]).score(x[samples:].numpy(), y[samples:]))
        for name, (judge, x) in judges.items()
    }


def graphs(cell: CellInput) -> CellOutput:
    """Train a graph encoder and judge it by an SVM: one cell of the MUTAG case.

    Raises:
        SkipCell: If the data is absent.
    """
    import torch

    from recsys_losses.adnce import embed_graphs, evaluate_svm, load_tu_graphs, train_graph_encoder

    torch.set_num_threads(1)
    if cell.data_root is None:
        raise SkipCell(f"data set {cell.dataset!r} is not here: set BALLAST_DATA or --data-root")
    try:
        data = load_tu_graphs(cell.data_root / "graph" / "tu", cell.dataset.upper())
    except FileNotFoundError as error:
        raise SkipCell(f"data set {cell.dataset!r} is not here: {error}") from error
    start = time.perf_counter()
    trained = train_graph_encoder(data, **cell.settings, seed=cell.seed)
    seconds = time.perf_counter() - start
    labels = torch.cat([graph.y for graph in data])
    accuracy = evaluate_svm(embed_graphs(trained.encoder, data), labels, seed=cell.seed)
    history = tuple({**record, "epoch": record["epoch"] + 1} for record in trained.epochs.history)
    info = {"device": "cpu", "graphs": len(data), "folds": len(accuracy.folds)}
    return CellOutput({"accuracy": accuracy.mean, "train_seconds": seconds}, history, info)
