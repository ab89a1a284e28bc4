"""Time of an influence update of an MLP beside the authors' loop and beside retraining, on generated clicks.

    python if_dfm_update.py                       # 8,000 clicks a day
    python if_dfm_update.py --per-day 2000 --epochs 10 --repetitions 3

Three ways from a stale model to one that knows the new labels. `update`: conjugate gradients with the Gauss-Newton matrix
of a sample of the training clicks, to a relative residual of 1e-3. `loop`: the authors' program as it is written: Adam on
the quadratic with a batch of 2,048 clicks per step, a Hessian product by two backward passes, no more; it stops by its own
rule (`loop`), or takes all 2,000 steps (timed once). Its two passes over the flipped clicks for the right-hand side are kept; the evaluation on the
test clicks at every step is left out, in its favour. `retrain`: all epochs of Adam on the corrected labels, no validation.
The loop has the damping of the update. Residuals are those of the system with the Gauss-Newton matrix of all clicks.

Prints one JSON object.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ballast_testing.measure import emit, interleaved, machine, parser, ratio
from recsys_losses.if_dfm import (
    InfluenceUpdater,
    TrainOptions,
    Update,
    build_model,
    cvr_metrics,
    fit_clicks,
    hessian_vector_product,
    influence_rhs,
    make_delayed_clicks,
    predict,
    relative_improvement,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from recsys_losses.if_dfm import Clicks

DAMPING = 1e-2
ROWS = 4096


def official_loop(
    model: nn.Module,
    train: Clicks,
    flipped: Clicks,
    l2: float,
    seed: int,
    *,
    steps_at_most: int = 2000,
    stop: bool = True,
) -> tuple[Tensor, int]:
    """The authors' optimiser loop, with or without its stopping rule; returns the change and the Hessian products."""
    parameters = list(model.parameters())
    n = len(train)

    def gradient(clicks: Clicks, label: float) -> list[Tensor]:
        total = [torch.zeros_like(p) for p in parameters]
        for x_num, x_cat, y in clicks.batches(2048):
            loss = F.binary_cross_entropy_with_logits(model(x_num, x_cat), torch.full_like(y, label), reduction="sum")
            for t, g in zip(total, torch.autograd.grad(loss, parameters), strict=True):
                t += g
        return total

    old, new = gradient(flipped, 0.0), gradient(flipped, 1.0)
    b = [(o - w) / n for o, w in zip(old, new, strict=True)]
    x = [torch.full_like(p, 1e-4).requires_grad_() for p in parameters]
    optimizer = torch.optim.Adam(x, lr=1e-4, weight_decay=DAMPING + l2)
    generator = torch.Generator().manual_seed(seed)
    last, best, chosen, waited, steps = 0.0, float("inf"), [v.detach().clone() for v in x], 0, 0
    for steps in range(1, steps_at_most + 1):
        index = torch.randint(0, n, (2048,), generator=generator)
        loss = F.binary_cross_entropy_with_logits(model(train.x_num[index], train.x_cat[index]), train.label[index])
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        product = torch.autograd.grad(first, parameters, grad_outputs=[v.detach() for v in x])
        optimizer.zero_grad()
        value = sum((0.5 * v * h).sum() - (c * v).sum() for v, h, c in zip(x, product, b, strict=True))
        value.backward()  # h is a constant here: the gradient is h / 2 - b
        size = float(torch.cat([v.grad.flatten() for v in x]).norm())
        optimizer.step()
        if stop and steps > 20:
            waited += 1
            if abs(size - last) < best:
                best, chosen, waited = abs(size - last), [v.detach().clone() for v in x], 0
            if waited >= 15:
                break
        last = size
    return torch.cat([v.detach().flatten() for v in (chosen if stop else x)]), steps


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--per-day", type=int, default=8000, help="clicks per day")
    options.add_argument("--epochs", type=int, default=20, help="epochs of training and of retraining")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    data = make_delayed_clicks(per_day=args.per_day, seed=args.seed)
    parts = data.window(15, 14, 10, 1)
    train, flipped, test = parts["train"], parts["flipped"], parts["test"]
    corrected = train.corrected(flipped)
    training = TrainOptions(epochs=args.epochs, lr=1e-3, patience=None, seed=args.seed)

    def trained(clicks: Clicks) -> nn.Module:
        model = build_model("mlp", data.x_num.shape[1], data.cardinalities, seed=args.seed)
        fit_clicks(model, clicks, None, training)
        return model

    stale = trained(train)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed))
    updater = InfluenceUpdater(
        stale,
        train.loader(),
        damping=DAMPING,
        hessian="ggn",
        l2=training.l2,
        curvature_loader=train[order[:ROWS]].loader(),
        cache=True,
        tol=1e-3,
    )
    found: dict[str, Any] = {}

    def update() -> None:
        found["update"] = updater.update(flipped.loader())

    def loop() -> None:
        found["loop"] = official_loop(stale, train, flipped, training.l2, args.seed)

    def retrain() -> None:
        found["retrain"] = trained(corrected)

    sides = {"update": update, "loop": loop, "retrain": retrain}
    seconds = interleaved(sides, repetitions=args.repetitions, warmup=args.warmup)
    median = {name: value["median_s"] for name, value in seconds.items()}
    start = time.perf_counter()
    found["all steps of the loop"] = official_loop(stale, train, flipped, training.l2, args.seed, stop=False)
    median["all steps of the loop"] = time.perf_counter() - start
    loops = ("loop", "all steps of the loop")
    deltas = {"update": found["update"].delta, **{name: found[name][0] for name in loops}}
    steps = {"update": found["update"].info["products"], **{name: found[name][1] for name in loops}}
    quality = {"stale": _auc(stale, test), "retrain": _auc(found["retrain"], test)}
    for name, delta in deltas.items():
        updater.apply(Update(delta, {}))
        quality[name] = _auc(stale, test)
        updater.revert()
    gap = {name: relative_improvement(quality[name], quality["stale"], quality["retrain"]) for name in deltas}
    emit(
        {
            **machine(),
            "case": f"MLP, {len(train):,} clicks, {len(flipped):,} labels changed",
            "parameters": sum(p.numel() for p in stale.parameters()),
            "damping": DAMPING,
            "seconds": seconds,
            "speed_of_update_over_retraining": ratio(median["retrain"], median["update"]),
            "speed_of_update_over_authors_loop": ratio(median["loop"], median["update"]),
            "speed_of_update_over_all_steps_of_the_loop": ratio(median["all steps of the loop"], median["update"]),
            "hessian_products": steps,
            "rows_in_hessian_products": {name: n * (ROWS if name == "update" else 2048) for name, n in steps.items()},
            "relative_residual_on_the_sample": {"update": found["update"].info["residual"]},
            "relative_residual_on_all_clicks": {
                name: _residual(stale, train, flipped, training.l2, delta) for name, delta in deltas.items()
            },
            "auc": quality,
            "gap_closed_percent": gap,
        },
        args.output,
    )


def _auc(model: nn.Module, test: Clicks) -> float:
    return cvr_metrics(test.label, predict(model, test))["auc"]


def _residual(model: nn.Module, train: Clicks, flipped: Clicks, l2: float, change: Tensor) -> float:
    """Relative residual of a change in the damped system over all training clicks."""
    b = influence_rhs(model, flipped.loader(), [], len(train))
    product = (DAMPING + l2) * change
    for batch in train.batches(8192):
        product = product + len(batch.label) / len(train) * hessian_vector_product(model, batch, change, kind="ggn")
    return float((b - product).norm() / b.norm())


if __name__ == "__main__":
    main()
