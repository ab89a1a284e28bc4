"""`ballast recsys gcm`: context-aware recommendation with the Graph Convolution Machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from cyclopts import App, Parameter

from ballast_cli.output import EpochProgress, print_result, write_json, write_text

gcm_app = App(name="gcm", help="Graph Convolution Machine: recommendation in a context.")

Norm = Literal["left-single", "left-double", "right-single", "right-double", "both"]
Merge = Literal["sum", "product", "mlp"]
Decoder = Literal["fm", "inner_product", "mlp"]
Words = Annotated[tuple[str, ...] | None, Parameter(consume_multiple=True)]
Numbers = Annotated[tuple[float, ...] | None, Parameter(consume_multiple=True)]


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class GCMOptions:
    """The model."""

    dim: int = 64
    "Width of the embeddings."
    layers: int = 2
    "Graph layers; 0 is a factorisation machine."
    norm: Norm = "left-single"
    "What a node does with its number of interactions."
    merge: Merge = "sum"
    "How a message joins the neighbour and the context."
    decoder: Decoder = "fm"
    "How user, item and context are scored."
    layer_weights: Numbers = None
    "Weights of the layers, one more than `--layers`; equal by default."
    decoder_layers: int = 1
    "Hidden layers of `--decoder mlp`."
    reg: float = 1e-3
    "Coefficient of the squared norms."

    def build(self, data: Any, seed: int) -> Any:
        """A freshly initialised model for `data`."""
        from recsys_losses.gcm import GCM

        return GCM.from_dataset(
            data,
            embed_dim=self.dim,
            num_layers=self.layers,
            norm=self.norm,
            merge=self.merge,
            decoder=self.decoder,
            layer_weights=self.layer_weights,
            decoder_layers=self.decoder_layers,
            l2_weight=self.reg,
            seed=seed,
        )


@gcm_app.command
def train(
    *,
    data: Path,
    model: GCMOptions = GCMOptions(),
    output: Path = Path("runs/gcm"),
    keep_context: Words = None,
    epochs: int = 300,
    batch_size: int = 2048,
    lr: float = 1e-3,
    negatives: int = 4,
    eval_every: int = 1,
    patience: int | None = 50,
    monitor: str = "hr@10+ndcg@10",
    select_on: Literal["valid", "test", "none"] = "valid",
    ks: Annotated[tuple[int, ...], Parameter(consume_multiple=True)] = (10, 50),
    mask_target: bool = True,
    seed: int = 0,
    device: str = "cpu",
    fresh: bool = False,
    json: bool = False,
) -> None:
    """Train GCM on a folder of interactions with contexts and report its leave-one-out test metrics.

    An interrupted run continues exactly where it stopped when the same command is given again.

    Examples:
        ballast recsys gcm make-synthetic --output data/contexts

        ballast recsys gcm train --data data/contexts --layers 2 --norm left-single --decoder fm --negatives 4 --reg 1e-3

    Args:
        data: Folder with train.dat, test.dat, userid_dict.txt and itemid_dict.txt.
        model: The model and its size.
        output: Folder for `model.safetensors`, `metrics.json`, `history.json`, `config.yaml` and the checkpoint.
        keep_context: Context fields to keep, c_last among them; those of the authors by default.
        epochs: Passes over the samples, at most.
        batch_size: Samples per step.
        lr: Learning rate of Adam.
        negatives: Negatives per interaction.
        eval_every: Epochs between two evaluations.
        patience: Evaluations without improvement before training stops.
        monitor: Metric, or sum of metrics, that chooses the epoch.
        select_on: Part that chooses the epoch: the last train interaction of each user, held out; the test interactions
            (a published habit, warns); or none.
        ks: Cut-offs of the metrics.
        mask_target: Never rank items that the user took before, even where one of them is the test item.
        seed: Seed of initialisation, shuffling and negatives.
        device: Torch device.
        fresh: Start over instead of continuing a checkpoint in `--output`.
        json: Print the result as one JSON object.
    """
    from recsys_losses.gcm import ContextDataset, fit_gcm, save_gcm

    interactions = ContextDataset.from_files(data, keep_context)
    interactions.check_cutoffs(ks)  # not only after training
    recommender = model.build(interactions, seed)
    config = {"data": str(data), **dataclasses.asdict(model), "keep_context": keep_context}
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items() if v is not None}
    write_text(output / "config.yaml", yaml.safe_dump(plain, sort_keys=False))
    with EpochProgress(epochs, quiet=json) as progress:
        result = fit_gcm(
            recommender,
            interactions,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            num_negatives=negatives,
            eval_every=eval_every,
            patience=patience,
            monitor=monitor,
            select_on=select_on,
            ks=ks,
            mask_target=mask_target,
            seed=seed,
            device=device,
            checkpoint=output / "checkpoint.safetensors",
            resume=not fresh,
            on_epoch=progress.update,
        )
    metrics = _test(recommender, interactions, ks, mask_target=mask_target)
    save_gcm(recommender, output / "model.safetensors")
    write_json(output / "history.json", result.history)
    summary = {
        **metrics,
        "best_epoch": result.best_epoch,
        "seconds": round(result.seconds, 2),
        "output": str(output),
    }
    write_json(output / "metrics.json", summary)
    print_result(summary, as_json=json)


@gcm_app.command
def evaluate(
    *,
    model: Path,
    data: Path,
    keep_context: Words = None,
    ks: Annotated[tuple[int, ...], Parameter(consume_multiple=True)] = (10, 50),
    mask_target: bool = True,
    device: str = "cpu",
    output: Path | None = None,
    json: bool = False,
) -> None:
    """Rank all items for the test interaction of every user, in its context.

    Examples:
        ballast recsys gcm evaluate --model runs/gcm/model.safetensors --data data/contexts --ks 10 50

    Args:
        model: File that `ballast recsys gcm train` wrote.
        data: Folder that it was trained on.
        keep_context: As in training.
        ks: Cut-offs.
        mask_target: Never rank items that the user took before, even where one of them is the test item.
        device: Torch device.
        output: Also write the metrics to this JSON file.
        json: Print the result as one JSON object.
    """
    from recsys_losses.gcm import ContextDataset, load_gcm

    interactions = ContextDataset.from_files(data, keep_context)
    recommender = load_gcm(model, interactions, device=device)
    result = _test(recommender, interactions, ks, mask_target=mask_target)
    if output is not None:
        write_json(output, result)
    print_result(result, as_json=json)


@gcm_app.command
def make_synthetic(
    *,
    output: Path,
    users: int = 600,
    items: int = 400,
    interactions: int = 12000,
    seed: int = 0,
    ks: Annotated[tuple[int, ...], Parameter(consume_multiple=True)] = (10, 50),
    mask_target: bool = True,
    json: bool = False,
) -> None:
    """Write a folder of generated interactions whose contexts matter, and tell what a perfect model would reach.

    Examples:
        ballast recsys gcm make-synthetic --output data/contexts --users 600 --items 400 --interactions 12000

    Args:
        output: Folder for train.dat, test.dat and the two dictionaries.
        users: Number of users.
        items: Number of items.
        interactions: About how many interactions; every user has at least five.
        seed: Seed of everything.
        ks: Cut-offs of the metrics of the true scores.
        mask_target: As in `train`.
        json: Print the result as one JSON object.
    """
    from recsys_losses.gcm import make_context_data

    made = make_context_data(users, items, interactions, seed=seed)
    bayes = made.bayes_metrics(ks=ks, mask_target=mask_target)
    made.write(output)
    data = made.data
    summary = {
        "users": data.num_users,
        "items": data.num_items,
        "graph_items": data.num_graph_items,
        "contexts": len(data.context_features),
        "train": data.train.shape[1],
        "test": data.test.shape[1],
        **{f"true_scores_{name}": value for name, value in bayes.items()},
        "output": str(output),
    }
    print_result(summary, as_json=json)


def _test(model: Any, data: Any, ks: tuple[int, ...], *, mask_target: bool) -> dict[str, float]:
    data = data.to(model.user_embedding.device)
    metrics: dict[str, float] = data.leave_one_out_metrics(model.score_all, ks=ks, mask_target=mask_target)
    return metrics
