"""Training on clicks, and the delayed-feedback methods that IF-DFM is compared with, on the data available at one time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F

from recsys_losses._checks import check_choice, check_positive
from recsys_losses._epochs import EpochRun, EpochsResult
from recsys_losses.if_dfm._data import Clicks, DelayedClicks, concatenate
from recsys_losses.if_dfm._losses import (
    defer_loss,
    dfm_loss,
    es_dfm_loss,
    es_dfm_pretrain_loss,
    fnc_calibrate,
    fnw_loss,
    fsiw_loss,
    ulc_loss,
)
from recsys_losses.if_dfm._metrics import cvr_metrics

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    Builder = Callable[[int, int], nn.Module]
    """From the number of extra numeric features and of outputs to a fresh backbone."""
    StepLoss = Callable[[Tensor, dict[str, Tensor]], Tensor]
    Predict = Callable[[Tensor], Tensor]

MethodName = Literal["vanilla", "retrain", "readd", "oracle", "fnw", "fnc", "fsiw", "es-dfm", "defer", "ulc", "dfm"]
Monitor = Literal["auc", "prauc", "log_loss"]

METHODS = ("vanilla", "retrain", "readd", "oracle", "fnw", "fnc", "fsiw", "es-dfm", "defer", "ulc", "dfm")
MONITORS = ("auc", "prauc", "log_loss")
_CHECKPOINT = "recsys_losses if_dfm checkpoint"


@dataclass(frozen=True)
class TrainOptions:
    """How a model is trained; the defaults are those of the authors' code.

    Args:
        epochs: Passes over the rows, at most.
        batch_size: Rows per step.
        lr: Learning rate of Adam.
        l2: Its weight decay (added to the gradient, not decoupled).
        patience: Epochs without improvement on the validation clicks after which training stops; None never stops.
        monitor: Metric on the validation clicks that chooses the epoch: `"auc"`, `"prauc"` or `"log_loss"`. Fresh clicks
            have few conversions yet, so that log-loss prefers models that predict too little.
        window_hours: Waiting window of ES-DFM and DEFER.
        attribution_days: Age at which DEFER takes a label for final.
        counterfactual_days: How far back FSIW and ULC put their counterfactual deadline.
        rounds: Rounds of ULC.
        seed: Seed of initialisation and shuffling.
    """

    epochs: int = 20
    batch_size: int = 1024
    lr: float = 1e-4
    l2: float = 1e-4
    patience: int | None = 6
    monitor: Monitor = "auc"
    window_hours: float = 0.25
    attribution_days: float = 7.0
    counterfactual_days: float = 7.0
    rounds: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience", "rounds"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise ValueError(f"{name} must be >= 1, got {value!r}")
        for name in ("lr", "attribution_days", "counterfactual_days"):
            check_positive(name, getattr(self, name))
        for name in ("l2", "window_hours"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number >= 0, got {getattr(self, name)!r}")
        check_choice("monitor", self.monitor, MONITORS)


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained model and how its logits become probabilities.

    Args:
        model: The conversion model.
        results: One record per training run, auxiliary models first.
        calibrated: Whether probabilities go through `fnc_calibrate`.
    """

    model: nn.Module
    results: tuple[EpochsResult, ...]
    calibrated: bool = False

    @property
    def seconds(self) -> float:
        """Wall time of all training, validation included."""
        return sum(result.seconds for result in self.results)

    def predict(self, clicks: Clicks) -> Tensor:
        """Conversion probabilities, float32 `(N,)`."""
        probability = predict(self.model, clicks)
        return fnc_calibrate(probability) if self.calibrated else probability


def predict(model: nn.Module, clicks: Clicks, *, batch_size: int = 16_384) -> Tensor:
    """Conversion probabilities of a model with logits, float32 `(N,)`; of several outputs, the first."""
    training = model.training
    model.eval()
    with torch.no_grad():
        parts = [_first(model(x_num, x_cat)).sigmoid() for x_num, x_cat, _ in clicks.batches(batch_size)]
    model.train(training)
    return torch.cat(parts)


def fit_clicks(
    model: nn.Module,
    clicks: Clicks,
    valid: Clicks | None,
    options: TrainOptions,
    *,
    loss: StepLoss | None = None,
    extra: dict[str, Tensor] | None = None,
    predicted: Predict | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    about: dict[str, Any] | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> EpochsResult:
    """Train a model on clicks with Adam, in place, and leave it with the parameters of the best epoch.

    Args:
        model: Called with `(x_num, x_cat)`.
        clicks: What it learns from, with the labels in it.
        valid: Clicks that choose the epoch and stop training, with the labels known; None trains all epochs.
        options: Epochs, rates and so on.
        loss: Called with the model's output and the rows of `extra` (`label` among them); default: cross-entropy.
        extra: Further columns of the loss, one value per click.
        predicted: From the output to probabilities, for validation; default: sigmoid of the (first) logit.
        checkpoint: safetensors file that is replaced after every epoch and continued from; None writes none.
        about: What else the checkpoint depends on, JSON values.
        on_epoch: Called with the record of every finished epoch.

    Returns:
        The history and what was selected.

    Raises:
        ValueError: If there are no clicks, or the checkpoint was written with other settings.
        RuntimeError: If the loss isn't finite.
    """
    if not len(clicks):
        raise ValueError("there are no clicks to train on")
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr, weight_decay=options.l2)
    columns = {"label": clicks.label, **(extra or {})}
    loss = _cross_entropy if loss is None else loss
    predicted = _probability if predicted is None else predicted
    # Epochs are left out: a longer run continues a shorter one.
    settings = {k: v for k, v in vars(options).items() if k not in ("epochs", "patience")}
    settings |= {"rows": len(clicks), "positives": int(clicks.label.sum()), **(about or {})}
    run = EpochRun(_CHECKPOINT, model, optimizer, generator, settings=settings)
    run.load_if_there(checkpoint)

    def train(_epoch: int) -> dict[str, float]:
        model.train()
        total = 0.0
        for index in torch.split(torch.randperm(len(clicks), generator=generator), options.batch_size):
            optimizer.zero_grad(set_to_none=True)
            value = loss(
                model(clicks.x_num[index], clicks.x_cat[index]), {name: x[index] for name, x in columns.items()}
            )
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += float(value.detach()) * len(index)
        return {"loss": total / len(clicks)}

    def evaluate() -> dict[str, float]:
        assert valid is not None  # noqa: S101  # only called then
        model.eval()
        with torch.no_grad():
            parts = [predicted(model(x_num, x_cat)) for x_num, x_cat, _ in valid.batches(16_384)]
        return cvr_metrics(valid.label, torch.cat(parts))

    return run.run(
        options.epochs,
        train,
        None if valid is None else evaluate,
        monitor=options.monitor,
        lower_is_better=options.monitor == "log_loss",
        patience=options.patience if valid is not None else None,
        checkpoint=checkpoint,
        on_epoch=on_epoch,
    )


def train_method(
    method: MethodName,
    data: DelayedClicks,
    build: Builder,
    *,
    T: float,
    duration: float,
    gap: float,
    valid: float = 1.0,
    options: TrainOptions | None = None,
    folder: str | os.PathLike[str] | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> Trained:
    r"""Train one method of the comparison on what is known at $\tau=T+\text{gap}-\text{valid}$.

    - `vanilla`: clicks before T with the labels of T, the stale model; `retrain`: the same clicks with the labels of
      $\tau$; `readd`: and the clicks since T; `oracle`: those of `readd` with final labels, which nobody has.
    - `fnw`, `fnc`, `es-dfm`, `defer`: the stream of entries before $\tau$, see `DelayedClicks.entries`. DEFER takes the
      clicks whose second entry has come. The weighting models of ES-DFM and DEFER learn from the clicks before T, whose
      labels at $\tau$ stand for the final ones.
    - `fsiw`, `ulc`: clicks before $\tau$; their auxiliary models learn from a counterfactual deadline some days ago. ULC
      repeats: in a second round, clicks without conversion so far count as much as the first correction says.
    - `dfm`: clicks before $\tau$ with delays in days; the backbone has a second output for the rate.

    Args:
        method: The method.
        data: All clicks; only what is known at $\tau$ (for validation: at T + gap) is used, except for `oracle`.
        build: Called with (extra numeric features, outputs), returns a fresh backbone; the same one for every method.
        T: See `DelayedClicks.window`.
        duration: See `DelayedClicks.window`.
        gap: See `DelayedClicks.window`.
        valid: See `DelayedClicks.window`.
        options: How to train.
        folder: Folder of the checkpoints, one per training run; the same call continues an interrupted one.
        on_epoch: Called with the record of every finished epoch of every run.

    Returns:
        The trained conversion model.

    Raises:
        ValueError: If the method is unknown, a period holds no clicks, or a checkpoint has other settings.
    """
    check_choice("method", method, METHODS)
    parts = data.window(T, duration, gap, valid)
    tau = T + gap - valid
    trainer = _Trainer(
        data=data,
        build=build,
        options=TrainOptions() if options is None else options,
        train=parts["train"],
        flipped=parts["flipped"],
        added=parts["added"],
        valid=parts["valid"],
        start=T - duration,
        tau=tau,
        folder=None if folder is None else Path(folder),
        about={"method": method, "T": T, "duration": duration, "gap": gap, "valid": valid},
        on_epoch=on_epoch,
    )
    return trainer.methods()[method]()


@dataclass(frozen=True, eq=False)
class _Trainer:
    """The clicks of one window and how every method learns from them."""

    data: DelayedClicks
    build: Builder
    options: TrainOptions
    train: Clicks
    flipped: Clicks
    added: Clicks
    valid: Clicks
    start: float
    tau: float
    folder: Path | None
    about: dict[str, Any]
    on_epoch: Callable[[dict[str, float]], None] | None

    def methods(self) -> dict[str, Callable[[], Trained]]:
        return {
            "vanilla": lambda: self.plain(self.train),
            "retrain": lambda: self.plain(self.train.corrected(self.flipped)),
            "readd": lambda: self.plain(concatenate([self.train.corrected(self.flipped), self.added])),
            "oracle": lambda: self.plain(self.data.clicks(self.rows())),
            "fnw": lambda: self.plain(
                self.stream(window_hours=0.0), lambda z, c: fnw_loss(z, c["label"], validate=False)
            ),
            "fnc": lambda: replace(
                self.plain(self.stream(window_hours=0.0), predicted=lambda z: fnc_calibrate(_probability(z))),
                calibrated=True,
            ),
            "es-dfm": self.es_dfm,
            "defer": self.defer,
            "fsiw": self.fsiw,
            "ulc": self.ulc,
            "dfm": self.dfm,
        }

    def rows(self) -> Tensor:
        """All clicks of the training period and since."""
        return torch.cat([self.train.row, self.added.row])

    def stream(self, rows: Tensor | None = None, **options: Any) -> Clicks:
        return self.data.entries(self.rows() if rows is None else rows, self.tau, **options)

    def plain(self, clicks: Clicks, loss: StepLoss | None = None, **more: Any) -> Trained:
        model = self.build(0, 1)
        return Trained(model, (self.fit("model", model, clicks, self.valid, loss, **more),))

    def es_dfm(self) -> Trained:
        weighting, first = self.weighting()
        stream = self.stream(window_hours=self.options.window_hours)
        tn, dp = _outputs(weighting, stream.x_num, stream.x_cat)
        trained = self.plain(
            stream,
            lambda z, c: es_dfm_loss(z, c["label"], c["tn"], c["dp"], validate=False),
            extra={"tn": tn, "dp": dp},
        )
        return replace(trained, results=(first, *trained.results))

    def defer(self) -> Trained:
        weighting, first = self.weighting()
        age = self.options.attribution_days
        old = self.data.between(self.start, self.tau - age)
        stream = self.stream(old, window_hours=self.options.window_hours, duplicates="all", attribution_days=age)
        _, dp = _outputs(weighting, stream.x_num, stream.x_cat)
        trained = self.plain(stream, lambda z, c: defer_loss(z, c["dp"], c["label"], validate=False), extra={"dp": dp})
        return replace(trained, results=(first, *trained.results))

    def weighting(self) -> tuple[nn.Module, EpochsResult]:
        """The model of ES-DFM's weights: real negative among the observed ones, and delayed conversion."""
        known = self.data.clicks(self.train.row, self.tau)
        delayed = known.label * ((known.pay_ts - known.click_ts) > self.options.window_hours * 3600)
        model = self.build(0, 2)
        result = self.fit(
            "weighting",
            model,
            known,
            None,
            lambda z, c: es_dfm_pretrain_loss(z[:, 0], z[:, 1], c["label"], c["delayed"], validate=False),
            extra={"delayed": delayed},
        )
        return model, result

    def counterfactual(self) -> tuple[Clicks, Tensor]:
        """Clicks before a deadline some days ago as they were known then, and their labels of now."""
        deadline = self.tau - self.options.counterfactual_days
        then = self.data.clicks(self.data.between(self.start, deadline), deadline)
        if not len(then):
            raise ValueError(
                f"no clicks before the counterfactual deadline, day {deadline:g}; lower counterfactual_days"
            )
        return then, self.data.clicks(then.row, self.tau).label

    def fsiw(self) -> Trained:
        then, now = self.counterfactual()
        weighting = self.build(1, 2)
        first = self.fit("weighting", weighting, _with_age(then), None, _shift_loss, extra={"now": now})
        clicks = self.data.clicks(self.rows(), self.tau)
        aged = _with_age(clicks)
        never, seen = _outputs(weighting, aged.x_num, aged.x_cat)
        trained = self.plain(
            clicks,
            lambda z, c: fsiw_loss(z, c["label"], c["never"], c["seen"], validate=False),
            extra={"never": never, "seen": seen},
        )
        return replace(trained, results=(first, *trained.results))

    def ulc(self) -> Trained:
        then, now = self.counterfactual()
        waiting = then.label == 0
        then, target = _with_age(then)[waiting], now[waiting]
        clicks = self.data.clicks(self.rows(), self.tau)
        aged, since = _with_age(clicks), _with_age(self.data.clicks(then.row, self.tau))
        results: list[EpochsResult] = []
        for number in range(self.options.rounds):
            correction = self.build(1, 1)
            name = f"correction-{number}"
            results.append(self.fit(name, correction, then, None, _soft_loss, extra={"target": target}))
            (logits,) = _outputs(correction, aged.x_num, aged.x_cat)
            model = self.build(0, 1)
            results.append(
                self.fit(
                    f"model-{number}",
                    model,
                    clicks,
                    self.valid,
                    lambda z, c: ulc_loss(z, c["label"], c["correction"], validate=False),
                    extra={"correction": logits},
                )
            )
            # What hasn't converted by now either may still do so: the correction itself says how often.
            (later,) = _outputs(correction, since.x_num, since.x_cat)
            target = torch.where(now[waiting].bool(), 1.0, later.sigmoid())
        return Trained(model, tuple(results))

    def dfm(self) -> Trained:
        clicks = self.data.clicks(self.rows(), self.tau)
        model = self.build(0, 2)
        result = self.fit(
            "model",
            model,
            clicks,
            self.valid,
            lambda z, c: dfm_loss(z[:, 0], z[:, 1], c["label"], c["elapsed"], validate=False),
            extra={"elapsed": clicks.elapsed()},
        )
        return Trained(model, (result,))

    def fit(
        self,
        name: str,
        model: nn.Module,
        clicks: Clicks,
        valid: Clicks | None,
        loss: StepLoss | None = None,
        *,
        extra: dict[str, Tensor] | None = None,
        predicted: Predict | None = None,
    ) -> EpochsResult:
        return fit_clicks(
            model,
            clicks,
            valid,
            self.options,
            loss=loss,
            extra=extra,
            predicted=predicted,
            checkpoint=None if self.folder is None else self.folder / f"{name}.safetensors",
            about={**self.about, "run": name},
            on_epoch=self.on_epoch,
        )


def _shift_loss(logits: Tensor, columns: dict[str, Tensor]) -> Tensor:
    """FSIW's two models: no conversion by now, among the unseen; seen at the deadline, among those converted by now."""
    never, seen = logits.unbind(1)
    unseen, converted = 1 - columns["label"], columns["now"]
    parts = ((never, 1 - converted, unseen), (seen, columns["label"], converted))
    total = torch.zeros((), dtype=logits.dtype)
    for logit, target, weight in parts:
        rows = F.binary_cross_entropy_with_logits(logit, target, weight=weight, reduction="sum")
        total = total + rows / weight.sum().clamp_min(1)
    return total


def _soft_loss(logits: Tensor, columns: dict[str, Tensor]) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, columns["target"])


def _cross_entropy(logits: Tensor, columns: dict[str, Tensor]) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, columns["label"])


def _probability(output: Tensor) -> Tensor:
    return _first(output).sigmoid()


def _first(output: Tensor) -> Tensor:
    return output if output.ndim == 1 else output[:, 0]


def _with_age(clicks: Clicks) -> Clicks:
    """The clicks with their age in days as the last numeric feature."""
    return replace(clicks, x_num=torch.cat([clicks.x_num, clicks.age().unsqueeze(1)], 1))


def _outputs(model: nn.Module, x_num: Tensor, x_cat: Tensor) -> Sequence[Tensor]:
    """The logits of an auxiliary model, one tensor per output."""
    model.eval()
    with torch.no_grad():
        parts = [model(a, b) for a, b in zip(torch.split(x_num, 16_384), torch.split(x_cat, 16_384), strict=True)]
    out = torch.cat(parts)
    return [out] if out.ndim == 1 else out.unbind(1)
