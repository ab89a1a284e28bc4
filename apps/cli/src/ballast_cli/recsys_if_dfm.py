"""`ballast recsys if-dfm`: conversion models under delayed feedback, and their influence update."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from ballast_cli.output import EpochProgress, print_result, write_json

if_dfm_app = App(name="if-dfm", help="Delayed conversions: train, update without retraining, evaluate.")

ModelName = Literal["logistic", "mlp", "deepfm", "autoint", "dcnv2"]
MethodName = Literal["vanilla", "retrain", "readd", "oracle", "fnw", "fnc", "fsiw", "es-dfm", "defer", "ulc", "dfm"]


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class ClickOptions:
    """The clicks: a file in the format of the Criteo conversion log, or generated ones."""

    data: str = "synthetic"
    "`synthetic`, or a file (plain or gzip) with 19 tab-separated columns."
    per_day: int = 4000
    "Synthetic: clicks per day."
    days: int = 30
    "Synthetic: days."
    data_seed: int = 0
    "Synthetic: seed of the clicks."

    def load(self) -> Any:
        """The library's DelayedClicks."""
        from recsys_losses.if_dfm import DelayedClicks

        if self.data == "synthetic":
            return DelayedClicks.synthetic(per_day=self.per_day, days=self.days, seed=self.data_seed)
        return DelayedClicks.load_criteo(self.data)


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class WindowOptions:
    """The periods, in days from the start of the log."""

    train_end: float = 15.0
    "T: end of the training period."
    duration: float = 14.0
    "Length of the training period."
    gap: float = 10.0
    "From T to the day of the test clicks."
    valid: float = 1.0
    "Length of the validation period before the test clicks; the update is made at its start."

    def periods(self) -> dict[str, float]:
        """Arguments of `DelayedClicks.window`."""
        return {"T": self.train_end, "duration": self.duration, "gap": self.gap, "valid": self.valid}


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class BackboneOptions:
    """The model that scores a click."""

    model: ModelName = "mlp"
    "Logistic regression, MLP, DeepFM, AutoInt or DCNv2."
    dim: int = 8
    "Width of the embeddings (64 in the paper)."
    hidden: Annotated[tuple[int, ...], Parameter(consume_multiple=True)] = (64, 32)
    "Widths of the layers of mlp, deepfm and dcnv2 (256 256 128 in the paper)."

    def sizes(self) -> dict[str, Any]:
        """Options of `build_model`."""
        if self.model == "logistic":
            return {}
        return {"dim": self.dim} if self.model == "autoint" else {"dim": self.dim, "hidden": list(self.hidden)}


@if_dfm_app.command
def make_synthetic(
    *,
    output: Path,
    per_day: int = 4000,
    days: int = 30,
    mean_delay_days: float = 4.0,
    drift: float = 0.02,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Write generated clicks in the format of the Criteo conversion log.

    Examples:
        ballast recsys if-dfm make-synthetic --output runs/clicks.txt.gz --per-day 2000 --seed 1

    Args:
        output: File to write; `.gz` compresses it.
        per_day: Clicks per day.
        days: Days.
        mean_delay_days: Mean delay of a conversion.
        drift: Change of the weights per day.
        seed: Seed of everything.
        json: Print the result as one JSON object.
    """
    from recsys_losses.if_dfm import DelayedClicks

    data = DelayedClicks.synthetic(per_day=per_day, days=days, mean_delay_days=mean_delay_days, drift=drift, seed=seed)
    data.to_criteo_file(output)
    conversions = int((data.pay_ts >= 0).sum())
    print_result({"clicks": len(data), "conversions": conversions, "output": str(output)}, as_json=json)


@if_dfm_app.command
def train(
    *,
    clicks: ClickOptions = ClickOptions(),
    window: WindowOptions = WindowOptions(),
    backbone: BackboneOptions = BackboneOptions(),
    method: MethodName = "vanilla",
    output: Path = Path("runs/if-dfm"),
    epochs: int = 20,
    batch_size: int = 1024,
    lr: float = 1e-3,
    l2: float = 1e-4,
    patience: int | None = 6,
    monitor: Literal["auc", "prauc", "log_loss"] = "auc",
    window_hours: float = 0.25,
    attribution_days: float = 7.0,
    counterfactual_days: float = 7.0,
    seed: int = 0,
    fresh: bool = False,
    json: bool = False,
) -> None:
    """Train one method on what is known at the update time and test it on the clicks of the test day.

    `vanilla` is the stale model that `update` starts from. An interrupted run continues when the same command is given
    again.

    Examples:
        ballast recsys if-dfm train --method vanilla --output runs/vanilla

        ballast recsys if-dfm train --method es-dfm --window-hours 24 --output runs/es-dfm

    Args:
        clicks: What to train on.
        window: The periods.
        backbone: The model and its size.
        method: How labels that may still change are treated; see the page of IF-DFM.
        output: Folder for `model.safetensors`, `metrics.json`, `history.json` and the checkpoints.
        epochs: Passes over the clicks, at most.
        batch_size: Clicks per step.
        lr: Learning rate of Adam.
        l2: Its weight decay.
        patience: Epochs without improvement on the validation clicks before training stops.
        monitor: Validation metric that chooses the epoch.
        window_hours: Waiting window of es-dfm and defer.
        attribution_days: Age at which defer takes a label for final.
        counterfactual_days: How far back fsiw and ulc put their counterfactual deadline.
        seed: Seed of initialisation and shuffling.
        fresh: Start over instead of continuing checkpoints in `--output`.
        json: Print the result as one JSON object.
    """
    from recsys_losses.if_dfm import TrainOptions, build_model, cvr_metrics, save_model, train_method

    data = clicks.load()
    sizes = backbone.sizes()
    features = data.x_num.shape[1]
    options = TrainOptions(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        l2=l2,
        patience=patience,
        monitor=monitor,
        window_hours=window_hours,
        attribution_days=attribution_days,
        counterfactual_days=counterfactual_days,
        seed=seed,
    )
    folder = output / "checkpoints"
    if fresh:
        for file in folder.glob("*.safetensors"):
            file.unlink()

    def build(extra: int, outputs: int) -> Any:
        return build_model(backbone.model, features + extra, data.cardinalities, seed=seed, outputs=outputs, **sizes)

    with EpochProgress(epochs, quiet=json) as progress:
        trained = train_method(
            method, data, build, **window.periods(), options=options, folder=folder, on_epoch=progress.update
        )
    test = data.window(**window.periods())["test"]
    metrics = cvr_metrics(test.label, trained.predict(test))
    save_model(
        trained.model,
        output / "model.safetensors",
        name=backbone.model,
        num_numeric=features,
        cardinalities=data.cardinalities,
        options={**sizes, "outputs": 2 if method == "dfm" else 1},
        about={"method": method, "calibrated": trained.calibrated, "window": window.periods(), "l2": l2},
    )
    write_json(output / "history.json", [result.history for result in trained.results])
    best = trained.results[-1].best_epoch
    summary = {
        "method": method,
        "model": backbone.model,
        **metrics,
        "best_epoch": best,
        "seconds": round(trained.seconds, 2),
        "output": str(output),
    }
    write_json(output / "metrics.json", summary)
    print_result(summary, as_json=json)


@if_dfm_app.command
def update(
    *,
    model: Path,
    clicks: ClickOptions = ClickOptions(),
    output: Path = Path("runs/if-dfm-updated"),
    added: bool = True,
    damping: Annotated[tuple[float, ...], Parameter(consume_multiple=True)] = (0.01,),
    solver: Literal["cg", "adam", "direct"] = "cg",
    hessian: Literal["ggn", "hessian"] = "ggn",
    curvature_rows: int | None = None,
    include_added_in_hessian: bool = False,
    correct_stationarity: bool = False,
    curvature_scale: float = 1.0,
    tol: float = 1e-3,
    max_iter: int = 500,
    lr: float = 1e-4,
    strict: bool = False,
    diagnose: bool = False,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Correct a trained model for the conversions that arrived since, and for the new clicks, without retraining.

    Examples:
        ballast recsys if-dfm update --model runs/vanilla/model.safetensors --output runs/updated

        ballast recsys if-dfm update --model runs/vanilla/model.safetensors --no-added --damping 0.1 0.01 --diagnose

    Args:
        model: File that `train --method vanilla` wrote; the periods are those of that run.
        clicks: The same clicks.
        output: Folder for `model.safetensors` and `update.json`.
        added: Use the clicks since the end of training as well; otherwise only the labels that changed.
        damping: Added to the curvature; of several, the one with the best AUC on the validation clicks is taken.
        solver: Conjugate gradients, Adam on the quadratic (the authors' way), or a dense solve for small models.
        hessian: Gauss-Newton matrix, or the Hessian, which needs more damping.
        curvature_rows: Estimate the curvature on so many random training clicks; all by default.
        include_added_in_hessian: Add the curvature of the new clicks.
        correct_stationarity: Also go the way that training left, for a model stopped early.
        curvature_scale: 0.5 is what the authors' loop converges to, twice the step.
        tol: Relative residual at which the solver stops.
        max_iter: Its largest number of steps.
        lr: Learning rate of adam.
        strict: Fail instead of warning when the solver did not converge.
        diagnose: Also estimate the extreme eigenvalues of the curvature and the gradient that training left.
        seed: Seed of the choice of `--curvature-rows`.
        json: Print the result as one JSON object.
    """
    import torch

    from recsys_losses.if_dfm import (
        InfluenceUpdater,
        choose_damping,
        cvr_metrics,
        load_model,
        predict,
        save_model,
    )

    backbone, facts = load_model(model)
    about = facts["about"]
    if about.get("method") != "vanilla":
        raise ValueError(f"{model} was trained with method {about.get('method')!r}; an update needs 'vanilla'")
    data = clicks.load()
    _check_fit(facts["build"], data, model)
    parts = data.window(**about["window"])
    train_clicks = parts["train"]
    sample = None
    if curvature_rows is not None:
        if not curvature_rows >= 1:
            raise ValueError(f"--curvature-rows must be >= 1, got {curvature_rows}")
        order = torch.randperm(len(train_clicks), generator=torch.Generator().manual_seed(seed))
        sample = train_clicks[order[:curvature_rows]].loader()
    updater = InfluenceUpdater(
        backbone,
        train_clicks.loader(),
        damping=damping[0],
        method=solver,
        hessian=hessian,
        l2=about["l2"],
        curvature_loader=sample,
        cache=sample is not None,
        curvature_scale=curvature_scale,
        include_added_in_hessian=include_added_in_hessian,
        correct_stationarity=correct_stationarity,
        tol=tol,
        max_iter=max_iter,
        lr=lr,
        strict=strict,
    )
    flipped, new = parts["flipped"].loader(), parts["added"].loader() if added else None
    extra = {} if not diagnose else updater.diagnose()
    if len(damping) > 1:
        valid = parts["valid"]
        _, change = choose_damping(
            updater, flipped, new, damping, lambda m: cvr_metrics(valid.label, predict(m, valid))["auc"]
        )
    else:
        change = updater.update(flipped, new)
    before = cvr_metrics(parts["test"].label, predict(backbone, parts["test"]))
    updater.apply(change)
    after = cvr_metrics(parts["test"].label, predict(backbone, parts["test"]))
    build = facts["build"]
    save_model(
        backbone,
        output / "model.safetensors",
        name=build["name"],
        num_numeric=build["num_numeric"],
        cardinalities=build["cardinalities"],
        options=build["options"],
        about={**about, "method": "if-dfm"},
    )
    summary = {
        **after,
        **{f"{name}_before": value for name, value in before.items()},
        **change.info,
        **extra,
        "output": str(output),
    }
    write_json(output / "update.json", summary)
    print_result(summary, as_json=json)


@if_dfm_app.command
def evaluate(
    *,
    model: Path,
    clicks: ClickOptions = ClickOptions(),
    vanilla: Path | None = None,
    retrain: Path | None = None,
    output: Path | None = None,
    json: bool = False,
) -> None:
    """Test a model on the clicks of its test day, and say how much of the gap to a retrained one it closes.

    Examples:
        ballast recsys if-dfm evaluate --model runs/updated/model.safetensors

        ballast recsys if-dfm evaluate --model runs/updated/model.safetensors --vanilla runs/vanilla/model.safetensors
        --retrain runs/retrain/model.safetensors

    Args:
        model: File that `train` or `update` wrote.
        clicks: The clicks.
        vanilla: The stale model; with `--retrain`, relative improvements are added.
        retrain: The retrained model.
        output: Also write the metrics to this JSON file.
        json: Print the result as one JSON object.
    """
    from recsys_losses.if_dfm import relative_improvement

    if (vanilla is None) != (retrain is None):
        raise ValueError("--vanilla and --retrain belong together: the gap is between the two")
    data = clicks.load()
    result: dict[str, Any] = _test(model, data)
    if vanilla is not None and retrain is not None:
        stale, renewed = _test(vanilla, data), _test(retrain, data)
        gaps = {f"ri_{name}": relative_improvement(value, stale[name], renewed[name]) for name, value in result.items()}
        result |= gaps
    if output is not None:
        write_json(output, result)
    print_result(result, as_json=json)


def _test(path: Path, data: Any) -> dict[str, float]:
    from recsys_losses.if_dfm import cvr_metrics, fnc_calibrate, load_model, predict

    model, facts = load_model(path)
    _check_fit(facts["build"], data, path)
    test = data.window(**facts["about"]["window"])["test"]
    probability = predict(model, test)
    if facts["about"]["calibrated"]:
        probability = fnc_calibrate(probability)
    return cvr_metrics(test.label, probability)


def _check_fit(build: dict[str, Any], data: Any, path: Path) -> None:
    model = build["num_numeric"], tuple(build["cardinalities"])
    given = data.x_num.shape[1], tuple(data.cardinalities)
    if model != given:
        raise ValueError(f"{path} was trained on other features: {model}; the clicks have {given}")
