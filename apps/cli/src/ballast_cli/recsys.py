"""`ballast recsys`: train a recommender, evaluate it, write recommendations."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from cyclopts import App, Parameter

from ballast_cli.datasets import DataOptions
from ballast_cli.output import EpochProgress, print_result, write_json, write_text
from ballast_cli.recsys_adnce import adnce_app
from ballast_cli.recsys_dsl import dsl_app
from ballast_cli.recsys_gcm import gcm_app
from ballast_cli.recsys_if_dfm import if_dfm_app
from ballast_cli.recsys_mcrl import mcrl_app
from ballast_cli.recsys_raremed import raremed_app
from ballast_cli.recsys_sgl import sgl_app

recsys_app = App(
    name="recsys", help="Recommendation: train with a loss, evaluate, recommend; methods with commands of their own."
)
for method_app in (adnce_app, dsl_app, gcm_app, if_dfm_app, mcrl_app, raremed_app, sgl_app):
    recsys_app.command(method_app)

ModelName = Literal["mf", "lightgcn"]
Score = Literal["dot", "cosine"]


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class LossOptions:
    """The loss and its hyper-parameters; a flag that the chosen loss does not use is refused."""

    loss: str = "ssm"
    "bpr, bce, softmax, ssm, bsl, bilateral, adap-tau or cpr."
    temperature: float | None = None
    "Divides the scores, > 0 (softmax, ssm, bsl)."
    negatives: Literal["uniform", "in-batch", "popularity", "all"] | None = None
    "Where negatives come from; `all` is the whole catalogue in bounded memory."
    num_negatives: int | None = None
    "Negatives per row, or per batch when shared."
    shared_negatives: bool | None = None
    "One set of negatives for the whole batch."
    exclude_positives: bool | None = None
    "Never draw a user's training items as negatives."
    logq: bool | None = None
    "Subtract the log sampling probability of each item (sampled softmax correction)."
    mask_accidental: bool | None = None
    "Drop negatives that equal the row's own positive."
    similarity: Literal["cosine", "dot"] | None = None
    "Score used in training."
    popularity_beta: float | None = None
    "Exponent of the popularity law of `--negatives popularity`."
    power: float | None = None
    "BSL: weight r of the negative side."
    bsl_mode: Literal["multi", "reweight", "single"] | None = None
    "BSL: form of the loss."
    group_by_user: bool | None = None
    "BSL: batch the rows of a user together."
    tau_pos: float | None = None
    "Bilateral: temperature of the positive side."
    tau_neg: float | None = None
    "Bilateral: temperature of the negative side."
    beta: float | None = None
    "Adap-tau: strength of the per-user rule; larger is weaker."
    center: Literal["mean", "quantile", "none"] | None = None
    "Adap-tau: what a user's loss is compared with; `none` keeps one global temperature."
    quantile: float | None = None
    "Adap-tau: the quantile for `--center quantile`."
    warmup_epochs: int | None = None
    "Adap-tau: epochs with the closed-form temperature."
    cpr_max_k: int | None = None
    "CPR: longest cycle of interactions."
    cpr_sample_rate: float | None = None
    "CPR: samples drawn per sample kept."
    cpr_sample_ratio: float | None = None
    "CPR: how many times more samples of k than of k + 1."

    def config(self) -> Any:
        """The library's LossConfig; what was not given keeps the library's default."""
        from recsys_losses.training import LossConfig

        given = {k: v for k, v in dataclasses.asdict(self).items() if k != "loss" and v is not None}
        return LossConfig(self.loss, **given)


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The model that scores users against items."""

    model: ModelName = "mf"
    "Matrix factorisation or LightGCN."
    dim: int = 64
    "Width of the embeddings."
    layers: int = 3
    "LightGCN: number of propagation layers."

    def build(self, data: Any, seed: int) -> Any:
        """A freshly initialised model for `data`."""
        from recsys_losses.models import LightGCN, MatrixFactorization

        if self.model == "mf":
            return MatrixFactorization(data.num_users, data.num_items, self.dim, seed=seed)
        return LightGCN(data.num_users, data.num_items, data.train, self.dim, num_layers=self.layers, seed=seed)


@recsys_app.command
def train(
    *,
    data: DataOptions,
    loss: LossOptions = LossOptions(),
    model: ModelOptions = ModelOptions(),
    output: Path = Path("runs/recsys"),
    epochs: int = 50,
    batch_size: int = 1024,
    lr: float = 5e-3,
    l2: float = 0.0,
    eval_every: int = 1,
    patience: int | None = 10,
    monitor: str = "recall@20",
    select_on: Literal["valid", "test", "none"] = "valid",
    score: Score = "dot",
    ks: Annotated[tuple[int, ...], Parameter(consume_multiple=True)] = (20,),
    seed: int = 0,
    device: str = "cpu",
    fresh: bool = False,
    json: bool = False,
) -> None:
    """Train a recommender and report its test metrics.

    An interrupted run continues exactly where it stopped when the same command is given again.

    Examples:
        ballast recsys train --data synthetic --loss ssm --negatives in-batch --logq --temperature 0.2

        ballast recsys train --data lastfm --loss bpr --l2 0.03 --epochs 150 --select-on none

    Args:
        data: What to train on.
        loss: The loss and its options.
        model: The model and its size.
        output: Folder for `model.safetensors`, `metrics.json`, `history.json`, `config.yaml` and the checkpoint.
        epochs: Passes over the training pairs, at most.
        batch_size: Positive pairs per step.
        lr: Learning rate of Adam.
        l2: Coefficient of the squared norms.
        eval_every: Epochs between two evaluations.
        patience: Evaluations without improvement before training stops.
        monitor: Metric that chooses the epoch.
        select_on: Part that chooses the epoch; `test` repeats a published habit and warns.
        score: Score used in evaluation.
        ks: Cut-offs of the metrics.
        seed: Seed of initialisation, shuffling, sampling and the validation split.
        device: Torch device.
        fresh: Start over instead of continuing a checkpoint in `--output`.
        json: Print the result as one JSON object.
    """
    from recsys_losses.training import evaluate as evaluate_model
    from recsys_losses.training import fit, save_model

    interactions = data.load()
    recommender = model.build(interactions, seed)
    config = {"data": dataclasses.asdict(data), **dataclasses.asdict(loss), **dataclasses.asdict(model)}
    write_text(output / "config.yaml", yaml.safe_dump(_plain(config), sort_keys=False))
    with EpochProgress(epochs, quiet=json) as progress:
        result = fit(
            recommender,
            loss.config(),
            interactions,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            l2=l2,
            eval_every=eval_every,
            patience=patience,
            monitor=monitor,
            select_on=select_on,
            score_eval=score,
            ks=ks,
            seed=seed,
            device=device,
            checkpoint=output / "checkpoint.safetensors",
            resume=not fresh,
            on_epoch=progress.update,
        )
    metrics = evaluate_model(recommender, interactions, ks=ks, score=score)
    save_model(recommender, output / "model.safetensors")
    write_json(output / "history.json", result.history)
    summary = {
        "loss": loss.loss,
        "model": model.model,
        **metrics,
        "best_epoch": result.best_epoch,
        "seconds": round(result.seconds, 2),
        "output": str(output),
    }
    write_json(output / "metrics.json", summary)
    print_result(summary, as_json=json)


@recsys_app.command
def evaluate(
    *,
    model: Path,
    data: DataOptions,
    split: Literal["test", "valid"] = "test",
    score: Score = "dot",
    ks: Annotated[tuple[int, ...], Parameter(consume_multiple=True)] = (20,),
    metrics: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = ("recall", "ndcg", "precision", "arp"),
    output: Path | None = None,
    json: bool = False,
) -> None:
    """Rank the whole catalogue for every user with held-out items and print the metrics.

    Examples:
        ballast recsys evaluate --model runs/recsys/model.safetensors --data lastfm --ks 5 20

    Args:
        model: File that `ballast recsys train` wrote.
        data: What to evaluate on.
        split: Part to rank against; training items are masked.
        score: Dot product or cosine.
        ks: Cut-offs.
        metrics: recall, ndcg, precision, hit_ratio, mrr, arp.
        output: Also write the metrics to this JSON file.
        json: Print the result as one JSON object.
    """
    from recsys_losses.training import evaluate as evaluate_model
    from recsys_losses.training import load_model

    interactions = data.load()
    recommender = load_model(model, interactions)
    result = evaluate_model(recommender, interactions, split=split, ks=ks, metrics=metrics, score=score)
    if output is not None:
        write_json(output, result)
    print_result(result, as_json=json)


@recsys_app.command
def recommend(
    *,
    model: Path,
    data: DataOptions,
    users: Annotated[tuple[int, ...] | None, Parameter(consume_multiple=True)] = None,
    k: int = 20,
    score: Score = "dot",
    output: Path | None = None,
    json: bool = False,
) -> None:
    """Write the k best unseen items of each user, best first.

    Examples:
        ballast recsys recommend --model runs/recsys/model.safetensors --data lastfm --users 0 1 2 --k 10

    Args:
        model: File that `ballast recsys train` wrote.
        data: What the model was trained on; training items are not recommended again.
        users: User ids; every user by default.
        k: Items per user.
        score: Dot product or cosine.
        output: JSON-lines file for the recommendations; standard output by default.
        json: Print one JSON object per line (always so with `--output`).
    """
    recommendations = _recommend(model, data, users, k, score)
    lines = [_json_line(user, items) for user, items in recommendations]
    if output is not None:
        write_text(output, "\n".join(lines) + "\n")
        print_result({"users": len(lines), "k": k, "output": str(output)}, as_json=json)
        return
    for (user, items), line in zip(recommendations, lines, strict=True):
        print(line if json else f"user {user}: {' '.join(map(str, items))}")


def _recommend(
    model: Path, data: DataOptions, users: tuple[int, ...] | None, k: int, score: Score
) -> list[tuple[int, list[int]]]:
    import torch

    from recsys_losses.metrics import topk_items
    from recsys_losses.training import load_model

    interactions = data.load()
    recommender = load_model(model, interactions)
    chosen = torch.arange(interactions.num_users) if users is None else torch.tensor(users)
    with torch.no_grad():
        user_emb, item_emb = recommender.embeddings()
    if score == "cosine":
        user_emb, item_emb = (torch.nn.functional.normalize(table, dim=-1) for table in (user_emb, item_emb))
    ranked = topk_items(user_emb, item_emb, interactions.train, k=k, users=chosen, deterministic=True)
    return list(zip(chosen.tolist(), ranked.tolist(), strict=True))


def _json_line(user: int, items: list[int]) -> str:
    return json.dumps({"user": user, "items": items})


def _plain(value: Any) -> Any:
    """`value` with paths as text and what was not given left out, for YAML."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    return str(value) if isinstance(value, Path) else value
