"""`ballast recsys dsl`: train a sparse recommender, and write its tables in sparse form."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from cyclopts import App, Parameter

from ballast_cli.datasets import DataOptions
from ballast_cli.output import EpochProgress, print_result, write_json, write_text

if TYPE_CHECKING:
    from recsys_losses.data import InteractionData

dsl_app = App(
    name="dsl", help="Dynamic sparse learning: train with a fixed share of non-zero weights, export sparse tables."
)

# Batch size and learning rates (first, last) of the authors' code.
_DEFAULTS: dict[str, tuple[int, float, float | None]] = {
    "lightgcn": (1024, 1e-2, 1e-4),
    "neumf": (512, 1e-4, None),
    "multvae": (16, 1e-3, None),
}


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class SparseOptions:
    """How many weights are non-zero, and how they move."""

    density: float = 0.5
    "Share of non-zero weights in every masked tensor, in (0, 1]."
    interval: int = 3000
    "Steps between two updates of the masks."
    initial_ratio: float = 0.5
    "Share of the non-zeros that the first update moves."
    minimum_ratio: float = 0.005
    "Share that the last update moves."
    growth: Literal["gradient", "random"] = "gradient"
    "Which inactive weights come back: those with the largest gradients, or any."
    init: Literal["uniform", "exact", "magnitude"] = "uniform"
    "First masks: every weight with probability density, exactly as many per tensor, or the largest weights."
    reset_new_state: bool = False
    "Zero Adam's moments of newly active weights."
    stop_fraction: float = 1.0
    "Share of the training after which the masks stay; 0 keeps the first ones."
    accumulate_grad: bool = False
    "Grow by the gradients of the whole interval instead of the last step's."

    def config(self) -> Any:
        """The library's DSLConfig."""
        from recsys_losses.dsl import DSLConfig

        options = dataclasses.asdict(self)
        return DSLConfig(update_interval=options.pop("interval"), **options)


@dsl_app.command
def train(
    *,
    data: DataOptions,
    model: Literal["lightgcn", "neumf", "multvae"] = "lightgcn",
    sparse: SparseOptions = SparseOptions(),
    output: Path = Path("runs/recsys-dsl"),
    dense: bool = False,
    epochs: int = 40,
    batch_size: int | None = None,
    lr: float | None = None,
    final_lr: float | None = None,
    l2: float = 1e-4,
    dim: int | None = None,
    layers: int = 3,
    eval_every: int = 1,
    patience: int | None = None,
    monitor: str = "recall@20",
    select_on: Literal["valid", "none"] = "valid",
    ks: Annotated[tuple[int, ...], Parameter(consume_multiple=True)] = (20,),
    seed: int = 0,
    device: str = "cpu",
    fresh: bool = False,
    json: bool = False,
) -> None:
    """Train a recommender that is sparse from the first step, and report its test metrics.

    An interrupted run continues exactly where it stopped when the same command is given again.

    Examples:
        ballast recsys dsl train --data synthetic --density 0.2 --interval 40 --epochs 20

        ballast recsys dsl train --model neumf --data ml-100k --density 0.5 --interval 2000 --lr 1e-3

    Args:
        data: What to train on.
        model: The backbone.
        sparse: How sparse.
        output: Folder for `model.safetensors`, `metrics.json`, `history.json`, `config.yaml` and the checkpoint.
        dense: Train all weights, for comparison.
        epochs: Passes, at most; the schedules end with the last one.
        batch_size: Pairs per step, users for multvae; 1024, 512 or 16 by default, as the authors'.
        lr: Learning rate of the first epoch; 1e-2, 1e-4 or 1e-3 by default.
        final_lr: Learning rate after the last epoch, reached by a cosine; 1e-4 for lightgcn, else constant by default.
        l2: Coefficient of the squared norms, lightgcn only.
        dim: Width of the embeddings, 64 for lightgcn, 16 for neumf; of the latent vector of multvae, 200.
        layers: Hops of lightgcn.
        eval_every: Epochs between two evaluations.
        patience: Evaluations without improvement before training stops.
        monitor: Metric that chooses the epoch: recall, ndcg or precision at one of the cut-offs.
        select_on: Part that chooses the epoch; `none` keeps the last.
        ks: Cut-offs of the metrics.
        seed: Seed of initialisation, masks, sampling and the validation split.
        device: Torch device.
        fresh: Start over instead of continuing a checkpoint in `--output`.
        json: Print the result as one JSON object.
    """
    from recsys_losses.dsl import count_costs, evaluate_backbone, fit_sparse, save_backbone

    config = None if dense else sparse.config()
    interactions = data.load()
    backbone = _build(model, interactions, dim, layers, seed)
    size, first_lr, last_lr = _DEFAULTS[model]
    settings = {
        "epochs": epochs,
        "batch_size": size if batch_size is None else batch_size,
        "lr": first_lr if lr is None else lr,
        "final_lr": last_lr if final_lr is None else final_lr,
        "l2": l2,
        "eval_every": eval_every,
        "patience": patience,
        "monitor": monitor,
        "select_on": select_on,
        "ks": ks,
        "seed": seed,
        "device": device,
    }
    given = {
        "model": model,
        "data": data.data,
        "dense": dense,
        **dataclasses.asdict(sparse),
        **settings,
        "ks": list(ks),
    }
    write_text(output / "config.yaml", yaml.safe_dump(given, sort_keys=False))
    with EpochProgress(epochs, quiet=json) as progress:
        result = fit_sparse(
            backbone,
            interactions,
            config,
            **settings,  # type: ignore[arg-type]
            checkpoint=output / "checkpoint.safetensors",
            resume=not fresh,
            on_epoch=progress.update,
        )
    costs = count_costs(backbone, result.masks)
    save_backbone(output / "model.safetensors", backbone, list(result.masks))
    write_json(output / "history.json", result.history)
    summary = {
        "model": model,
        **evaluate_backbone(backbone, interactions, ks=ks),
        "nonzero": costs["nonzero"],
        "dense": costs["dense"],
        "ratio": costs["ratio"],
        "explored": result.explored,
        "best_epoch": result.best_epoch,
        "seconds": round(result.seconds, 2),
        "output": str(output),
    }
    write_json(output / "metrics.json", summary)
    print_result(summary, as_json=json)


@dsl_app.command
def export(*, model: Path, output: Path, json: bool = False) -> None:
    """Write the masked tensors of a trained model as sparse rows, the others as they are.

    `recsys_losses.dsl.load_compressed` reads the file. Of a lightgcn it's the table before propagation; the graph isn't
    in it.

    Examples:
        ballast recsys dsl export --model runs/recsys-dsl/model.safetensors --output runs/recsys-dsl/sparse.safetensors

    Args:
        model: File that `ballast recsys dsl train` wrote.
        output: File to write.
        json: Print the result as one JSON object.
    """
    from recsys_losses.dsl import load_backbone, save_compressed, to_csr

    backbone, masked = load_backbone(model)
    tensors = backbone.state_dict()
    tables = {name: to_csr(tensor) if name in masked else tensor for name, tensor in tensors.items()}
    size = save_compressed(output, tables)
    dense_bytes = sum(tensor.nbytes for tensor in tensors.values())
    summary = {
        "tables": len(masked),
        "nonzero": sum(tables[name].values().numel() for name in masked),
        "dense_bytes": dense_bytes,
        "bytes": size,
        "ratio": size / dense_bytes,
        "output": str(output),
    }
    print_result(summary, as_json=json)


def _build(model: str, data: InteractionData, dim: int | None, layers: int, seed: int) -> Any:
    from recsys_losses.dsl import MultVAE, NeuMF
    from recsys_losses.models import LightGCN

    sizes = data.num_users, data.num_items
    if model == "lightgcn":
        return LightGCN(*sizes, data.train, 64 if dim is None else dim, num_layers=layers, seed=seed)
    if model == "neumf":
        return NeuMF(*sizes, 16 if dim is None else dim, seed=seed)
    return MultVAE(*sizes, latent=200 if dim is None else dim, seed=seed)
