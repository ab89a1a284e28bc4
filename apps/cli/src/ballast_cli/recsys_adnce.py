"""`ballast recsys adnce`: contrastive graph classification with ADNCE or InfoNCE."""

from __future__ import annotations

import json as json_module
import statistics
from pathlib import Path
from typing import Any, Literal

from cyclopts import App

from ballast_cli.output import EpochProgress, print_result, write_json

adnce_app = App(name="adnce", help="ADNCE: InfoNCE with weighted negatives; graph classification without labels.")


@adnce_app.command
def tu(
    *,
    dataset: str,
    root: Path,
    temperature: float = 0.15,
    mu: float | None = None,
    sigma: float | None = None,
    aug: Literal["random2", "random3", "random4"] = "random2",
    epochs: int = 20,
    seeds: int = 5,
    batch_size: int = 128,
    lr: float = 0.01,
    hidden: int = 32,
    layers: int = 3,
    folds: int = 10,
    output: Path = Path("runs/adnce-tu"),
    seed: int = 0,
    device: str = "cpu",
    fresh: bool = False,
    json: bool = False,
) -> None:
    """Train a GIN encoder on a TU data set without labels, then report the accuracy of an SVM on its embeddings.

    With `--mu` and `--sigma` the loss is ADNCE, without them InfoNCE. Nothing is written into `--root`. An interrupted run
    continues exactly where it stopped when the same command is given again.

    Examples:
        ballast recsys adnce tu --dataset MUTAG --root shared/data/graph/tu --mu .7 --sigma 1 --temperature .15

        ballast recsys adnce tu --dataset NCI1 --root shared/data/graph/tu --temperature .05 --aug random3 --seeds 1

    Args:
        dataset: Name of the data set: MUTAG, PROTEINS, NCI1, IMDB-BINARY, ...
        root: Folder with `<dataset>/raw/<dataset>_A.txt` and the other files of the TU text format.
        temperature: Divides the cosines, > 0.
        mu: Similarity of the negatives with the largest weight.
        sigma: Width of the bump around it, > 0.
        aug: Augmentations to choose from: node drop and subgraph; also edge drop; also feature masking.
        epochs: Passes over the graphs.
        seeds: Number of runs, with the seeds `--seed`, `--seed` + 1, ...
        batch_size: Graphs per step.
        lr: Learning rate of Adam.
        hidden: Width of each GIN layer.
        layers: Number of GIN layers.
        folds: Folds of the evaluation.
        output: Folder for the checkpoints and results of each seed, and `result.json`.
        seed: First seed.
        device: Torch device.
        fresh: Start over instead of continuing what is in `--output`.
        json: Print the result as one JSON object.
    """
    from recsys_losses.adnce import load_tu_graphs

    if seeds < 1:
        raise ValueError(f"seeds must be >= 1, got {seeds!r}")
    graphs = load_tu_graphs(root, dataset)
    options: dict[str, Any] = {
        "temperature": temperature,
        "mu": mu,
        "sigma": sigma,
        "augmentation": aug,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "hidden": hidden,
        "num_layers": layers,
    }
    folder = output / dataset
    accuracies = [
        _accuracy(graphs, {**options, "seed": number}, folds, folder, device, fresh=fresh, quiet=json)
        for number in range(seed, seed + seeds)
    ]
    labels = [int(graph.y) for graph in graphs]
    summary = {
        "dataset": dataset,
        "graphs": len(graphs),
        "loss": "infonce" if mu is None else "adnce",
        "accuracy": statistics.fmean(accuracies),
        "std": statistics.stdev(accuracies) if seeds > 1 else 0.0,
        "per_seed": [round(accuracy, 4) for accuracy in accuracies],
        "largest_class": max(labels.count(label) for label in set(labels)) / len(labels),
        "output": str(folder),
    }
    write_json(folder / "result.json", summary)
    print_result(summary, as_json=json)


def _accuracy(
    graphs: list[Any], options: dict[str, Any], folds: int, folder: Path, device: str, *, fresh: bool, quiet: bool
) -> float:
    """Train and evaluate one seed; a seed that was finished with the same settings is read back."""
    import torch

    from recsys_losses.adnce import embed_graphs, evaluate_svm, train_graph_encoder

    file = folder / f"seed-{options['seed']}.json"
    settings = {**options, "folds": folds}
    if file.exists() and not fresh:
        finished = json_module.loads(file.read_text(encoding="utf-8"))
        if finished["settings"] == settings:
            return float(finished["accuracy"])
    with EpochProgress(options["epochs"], quiet=quiet) as progress:
        trained = train_graph_encoder(
            graphs,
            **options,
            device=device,
            checkpoint=folder / f"seed-{options['seed']}.safetensors",
            resume=not fresh,
            on_epoch=progress.update,
        )
    labels = torch.cat([graph.y for graph in graphs])
    accuracy = evaluate_svm(embed_graphs(trained.encoder, graphs), labels, folds=folds, seed=options["seed"])
    write_json(file, {"settings": settings, "accuracy": accuracy.mean, "folds": accuracy.folds})
    return accuracy.mean
