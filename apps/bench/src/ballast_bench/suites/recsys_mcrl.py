"""Cases of MCRL: the method beside its ablations on simulated sessions, where long-term return can be measured.

Every method trains the same number of steps and keeps the steps that rank purchases best on validation sessions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ballast_bench.case import Case, CellInput, CellOutput, Metric

if TYPE_CHECKING:
    from torch import Tensor

    from recsys_losses._epochs import EpochsResult
    from recsys_losses.mcrl import MCRLTrainer, ReplayBuffer

__all__ = ["cpu", "quick", "train"]

# Creating the first optimiser imports torch._dynamo, which takes as long as torch itself.
_PRELOAD = ("recsys_losses.mcrl", "torch._dynamo")
_METRICS = (
    Metric("ndcg_purchase@10", label="purchase NDCG@10"),
    Metric("hr_purchase@10", label="purchase HR@10"),
    Metric("hr_click@10", label="click HR@10"),
    Metric("discounted_return", label="rollout, discounted"),
    Metric("total_return", label="rollout, total", digits=3),
    Metric("max_q", better="lower", label="mean max Q", digits=2, tested=False, tolerance=0.1),
    Metric("train_seconds", better="lower", label="train s", digits=1, tested=False, tolerance=0.25),
)
_MONITOR = "ndcg_purchase@10"
_CROSS_ENTROPY = "conservative only (cross-entropy)"
_WEIGHTS: dict[str, dict[str, float]] = {
    _CROSS_ENTROPY: {"td_weight": 0.0, "reward_weight": 0.0, "transition_weight": 0.0},
    "naive double Q": {"cql_weight": 0.0, "reward_weight": 0.0, "transition_weight": 0.0},
    "td+conservative": {"reward_weight": 0.0, "transition_weight": 0.0},
    "full MCRL": {},
    "without transition": {"transition_weight": 0.0},
    "without reward": {"reward_weight": 0.0},
}
_WORLD = (
    "Simulated sessions: a user's interest moves with what is clicked, and a purchase makes further ones from the same "
    "cluster of items likelier. The returns are those of 1,000 simulated users to whom the trained model recommends six "
    "items in turn. Each seed has its own items, sessions and users, the same for all methods. "
)


def quick() -> tuple[Case, ...]:
    """A small world, three methods."""
    methods = (_CROSS_ENTROPY, "td+conservative", "full MCRL")
    return (
        _case(
            "mcrl-simulator-small",
            "MCRL and its parts on few simulated sessions",
            {
                name: {
                    "model": {**_WEIGHTS[name], "hidden": 32},
                    "lrs": [0.01],
                    "epochs": 4,
                    "steps": 75,
                    "batch_size": 128,
                    "items": 100,
                    "sessions": 1000,
                }
                for name in methods
            },
            seeds=(0, 1),
            expected=4,
            note=_WORLD + "100 items, 1,000 sessions to learn from, GRU of width 32, 300 steps of 128 at most.",
        ),
    )


def cpu() -> tuple[Case, ...]:
    """The world of the card: MCRL and five ablations."""
    note = (
        _WORLD
        + "300 items, 2,500 sessions started, of which about 1,900 are long enough, GRU of width 64, steps of 256 with "
        "Adam, 900 at most; validation and test: 400 and 1,000 sessions. Every 100 steps the model ranks the validation "
        "sessions, and the steps with the best purchase NDCG@10 are kept, for each method and seed by itself. The "
        "cross-entropy recommender is the baseline to beat, since part of the gains in this line of work is that of any "
        "auxiliary loss; it alone also has its learning rate chosen on the validation sessions (0.0025, 0.005, 0.01), the "
        "others take 0.005. Train seconds are those of the chosen run."
    )
    settings = {
        name: {
            "model": weights,
            "lrs": [0.0025, 0.005, 0.01] if name == _CROSS_ENTROPY else [0.005],
            "epochs": 9,
            "steps": 100,
            "batch_size": 256,
            "items": 300,
            "sessions": 2500,
        }
        for name, weights in _WEIGHTS.items()
    }
    return (
        _case(
            "mcrl-simulator",
            "MCRL and its ablations on simulated sessions",
            settings,
            seeds=(0, 1, 2),
            expected=18,
            note=note,
        ),
    )


def _case(name: str, title: str, methods: dict[str, dict[str, Any]], **fields: Any) -> Case:
    return Case(
        package="recsys_losses",
        name=name,
        title=title,
        dataset="simulated sessions",
        run="ballast_bench.suites.recsys_mcrl:train",
        methods=methods,
        baseline=_CROSS_ENTROPY,
        metrics=_METRICS,
        tradeoff=("max_q", "discounted_return"),
        preload=_PRELOAD,
        **fields,
    )


def train(cell: CellInput) -> CellOutput:
    """Train one variant, choose its steps on validation sessions, test it, and let it recommend."""
    import torch

    from recsys_losses.mcrl import ReplayBuffer, SessionSimulator

    torch.set_num_threads(1)
    settings, seed = cell.settings, cell.seed
    simulator = SessionSimulator(settings["items"], seed=seed)
    sizes = {"train": settings["sessions"], "valid": 400, "test": 1000}
    buffers = {
        part: ReplayBuffer.from_sessions(simulator.logs(n, 10 * seed + number), num_items=simulator.num_items)
        for number, (part, n) in enumerate(sizes.items(), start=1)
    }
    runs = [_fit(simulator.num_items, buffers["train"], buffers["valid"], settings, lr, seed) for lr in settings["lrs"]]
    trainer, result = max(runs, key=lambda run: run[1].best[_MONITOR])
    model = trainer.model
    tested = trainer.evaluate(buffers["test"], ks=(10,))

    def policy(histories: list[list[int]]) -> Tensor:
        return model.recommend(histories, 1)[:, 0]

    returns = simulator.rollout(policy, 1000, seed)
    seconds = sum(record["seconds"] for record in result.history)
    figures = {
        **{metric.name: tested[metric.name] for metric in _METRICS if metric.name in tested},
        "discounted_return": returns.discounted,
        "total_return": returns.total,
        "train_seconds": seconds,
    }
    history = tuple({**record, "epoch": record["epoch"] + 1} for record in result.history)
    info = {
        "device": "cpu",
        "lr": trainer.lr,
        "best_steps": (result.best_epoch + 1) * settings["steps"],
        "train_transitions": len(buffers["train"]),
        "mean_q": tested["mean_q"],
        "logged_q": tested["logged_q"],
        "seconds_of_all_runs": sum(run.seconds for _, run in runs),
        "data_sha256": buffers["train"].digest(),
    }
    return CellOutput(figures, history, info)


def _fit(
    num_items: int, train_set: ReplayBuffer, valid_set: ReplayBuffer, settings: dict[str, Any], lr: float, seed: int
) -> tuple[MCRLTrainer, EpochsResult]:
    """Train a fresh model with one learning rate; its best steps are kept."""
    from recsys_losses.mcrl import MCRL, MCRLTrainer

    model = MCRL(num_items, seed=seed, **settings["model"])
    trainer = MCRLTrainer(model, train_set, valid_set, batch_size=settings["batch_size"], lr=lr, seed=seed)
    steps = settings["steps"]
    result = trainer.fit(settings["epochs"], steps_per_epoch=steps, patience=None, monitor=_MONITOR, ks=(10,))
    return trainer, result
