"""`ballast recsys mcrl`: train a sequential recommender on sessions, evaluate it, simulate sessions."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from ballast_cli.output import EpochProgress, print_result, write_json

mcrl_app = App(name="mcrl", help="MCRL: next items that lead to purchases, learned from sessions.")

Cutoffs = Annotated[tuple[int, ...], Parameter(consume_multiple=True)]


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class MCRLOptions:
    """The model and its losses; what isn't given keeps the library's default."""

    backbone: Literal["gru4rec", "caser", "nextitnet", "sasrec"] | None = None
    "Encoder of the session."
    hidden: int | None = None
    "Width of item vectors and states."
    state_size: int | None = None
    "Last items that make a state."
    double: Literal["twin", "polyak"] | None = None
    "Two networks that take turns, or one with a slow copy."
    gamma: float | None = None
    "Discount of later rewards, in [0, 1]."
    td_weight: float | None = None
    "Weight of the temporal-difference loss; 0 with the two below leaves plain cross-entropy."
    cql_weight: float | None = None
    "Weight of the conservative loss."
    cql_temperature: float | None = None
    "Temperature of the conservative loss."
    reward_weight: float | None = None
    "Weight of the contrastive reward loss."
    transition_weight: float | None = None
    "Weight of the contrastive transition loss."
    temperature: float | None = None
    "Temperature of the contrastive losses."
    num_negatives: int | None = None
    "Negative actions per logged one."
    exclude_session: bool | None = None
    "Never draw an item of the session as a negative."
    reward_weighted: bool | None = None
    "Weigh the reward loss by the reward."
    ce_weight: float | None = None
    "Weight of the cross-entropy of a second head."
    rank_by: Literal["q", "q+reward", "ce"] | None = None
    "What ranks the items."

    def given(self) -> dict[str, Any]:
        """Return what was given."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@mcrl_app.command
def train(
    *,
    data: str = "simulated",
    model: MCRLOptions = MCRLOptions(),
    output: Path = Path("runs/mcrl"),
    sessions: int = 2500,
    min_length: int = 3,
    epochs: int = 30,
    steps_per_epoch: int | None = None,
    batch_size: int = 256,
    lr: float = 5e-3,
    eval_every: int = 1,
    patience: int | None = 5,
    monitor: str = "ndcg_purchase@20",
    ks: Cutoffs = (5, 10, 20),
    seed: int = 0,
    device: str = "cpu",
    fresh: bool = False,
    json: bool = False,
) -> None:
    """Train on sessions and report the metrics of held-out ones; sessions are split 8:1:1 at random.

    An interrupted run continues exactly where it stopped when the same command is given again.

    Examples:
        ballast recsys mcrl train --sessions 500 --epochs 5

        ballast recsys mcrl train --data events.csv --backbone sasrec --output runs/shop

    Args:
        data: CSV or Parquet file with session_id, item_id, is_purchase and timestamp, or `simulated`.
        model: The model and its losses.
        output: Folder for `model.safetensors`, `items.json`, `metrics.json`, `history.json` and the checkpoint.
        sessions: Sessions to simulate, of `--data simulated`.
        min_length: Sessions with fewer events are left out.
        epochs: Epochs, at most.
        steps_per_epoch: Steps per epoch; one per batch of transitions by default.
        batch_size: Transitions per step.
        lr: Learning rate of Adam.
        eval_every: Epochs between two evaluations.
        patience: Evaluations without improvement before training stops.
        monitor: Metric on the validation sessions that chooses the epoch, with a cut-off of `--ks`.
        ks: Cut-offs of the metrics.
        seed: Seed of initialisation, sampling, the split and the simulation.
        device: Torch device.
        fresh: Start over instead of continuing a checkpoint in `--output`.
        json: Print the result as one JSON object.
    """
    from recsys_losses.mcrl import MCRL, MCRLTrainer, number_items, split_sessions

    table, ids = number_items(_load(data, sessions, seed))
    options = model.given()
    recommender = MCRL(len(ids), **options, seed=seed)
    size = recommender.state_size
    train_set, valid_set, test_set = (
        _buffer(part, size, len(ids), min_length) for part in split_sessions(table, seed=seed)
    )
    trainer = MCRLTrainer(recommender, train_set, valid_set, batch_size=batch_size, lr=lr, seed=seed, device=device)
    with EpochProgress(epochs, quiet=json) as progress:
        result = trainer.fit(
            epochs,
            steps_per_epoch=steps_per_epoch,
            eval_every=eval_every,
            patience=patience,
            monitor=monitor,
            ks=ks,
            checkpoint=output / "checkpoint.safetensors",
            resume=not fresh,
            on_epoch=progress.update,
        )
    metrics = trainer.evaluate(test_set, ks=ks)
    recommender.save(output / "model.safetensors")
    write_json(output / "items.json", ids)
    write_json(output / "history.json", result.history)
    summary = {
        "backbone": options.get("backbone", "gru4rec"),
        "items": len(ids),
        "train_sessions": train_set.num_sessions,
        "test_sessions": test_set.num_sessions,
        **metrics,
        "best_epoch": result.best_epoch,
        "seconds": round(result.seconds, 2),
        "output": str(output),
    }
    write_json(output / "metrics.json", summary)
    print_result(summary, as_json=json)


@mcrl_app.command
def evaluate(
    *,
    model: Path,
    data: Path | None = None,
    rollouts: int = 0,
    simulator_seed: int = 0,
    ks: Cutoffs = (5, 10, 20),
    min_length: int = 3,
    seed: int = 1,
    device: str = "cpu",
    output: Path | None = None,
    json: bool = False,
) -> None:
    """Rank all items for every event of a file of sessions, let the model recommend to simulated users, or both.

    Examples:
        ballast recsys mcrl evaluate --model runs/mcrl/model.safetensors --data later.csv --ks 10 20

        ballast recsys mcrl evaluate --model runs/mcrl/model.safetensors --rollouts 1000

    Args:
        model: File that `ballast recsys mcrl train` wrote; `items.json` beside it names the items.
        data: CSV or Parquet file with session_id, item_id, is_purchase and timestamp.
        rollouts: Simulated sessions in which the model recommends; 0 leaves them out.
        simulator_seed: Seed of the simulated items, as in training (the seed of `train`).
        ks: Cut-offs.
        min_length: Sessions with fewer events are left out.
        seed: Seed of the simulated users; another one than that of training.
        device: Torch device.
        output: Also write the metrics to this JSON file.
        json: Print the result as one JSON object.
    """
    from recsys_losses.mcrl import MCRL, evaluate_next_item, number_items, read_sessions

    if data is None and rollouts == 0:
        raise ValueError("nothing to evaluate on: give --data or --rollouts")
    if rollouts < 0:
        raise ValueError(f"--rollouts must be >= 0, got {rollouts}")
    recommender = MCRL.load(model, device=device)
    ids = _read_items(model.with_name("items.json"), recommender.num_items)
    result: dict[str, Any] = {}
    if data is not None:
        table, _ = number_items(read_sessions(data), ids)
        buffer = _buffer(table, recommender.state_size, len(ids), min_length).to(device)
        result |= evaluate_next_item(recommender, buffer, ks=ks)
    if rollouts:
        result |= _rollout(recommender, ids, rollouts, simulator_seed, seed)
    if output is not None:
        write_json(output, result)
    print_result(result, as_json=json)


@mcrl_app.command
def simulate(
    *,
    output: Path,
    sessions: int = 2500,
    items: int = 300,
    simulator_seed: int = 0,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Write sessions of simulated users, whose purchases raise later ones, as a CSV file.

    Examples:
        ballast recsys mcrl simulate --output sessions.csv --sessions 2500

    Args:
        output: CSV file to write.
        sessions: Sessions to start; those shorter than 3 events are dropped.
        items: Items of the world.
        simulator_seed: Seed of the items.
        seed: Seed of the sessions.
        json: Print the result as one JSON object.
    """
    from recsys_losses.mcrl import SessionSimulator, sessions_to_columns, write_sessions

    logs = SessionSimulator(items, seed=simulator_seed).logs(sessions, seed)
    columns = sessions_to_columns(logs)
    write_sessions(output, columns)
    events = len(columns["item_id"])
    summary = {
        "sessions": len(logs),
        "events": events,
        "purchase_share": float(columns["is_purchase"].mean()) if events else 0.0,
        "output": str(output),
    }
    print_result(summary, as_json=json)


def _load(data: str, sessions: int, seed: int) -> dict[str, Any]:
    from recsys_losses.mcrl import SessionSimulator, read_sessions, sessions_to_columns

    if data != "simulated":
        return read_sessions(data)
    return sessions_to_columns(SessionSimulator(seed=seed).logs(sessions, seed))


def _buffer(table: dict[str, Any], state_size: int, num_items: int, min_length: int) -> Any:
    from recsys_losses.mcrl import ReplayBuffer

    return ReplayBuffer.from_sessions(table, state_size, num_items=num_items, min_length=min_length)


def _read_items(path: Path, num_items: int) -> list[Any]:
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {path}, which `train` writes beside the model") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    if not isinstance(ids, list) or len(ids) != num_items:
        raise ValueError(f"{path} must hold a list of the {num_items} items of the model")
    return ids


def _rollout(recommender: Any, ids: list[Any], rollouts: int, simulator_seed: int, seed: int) -> dict[str, float]:
    import torch

    from recsys_losses.mcrl import SessionSimulator

    if not all(isinstance(item, int) for item in ids):
        raise ValueError("--rollouts needs a model of simulated sessions, whose items are integers")
    simulator = SessionSimulator(seed=simulator_seed)
    if max(ids) >= simulator.num_items:
        raise ValueError(f"--rollouts needs a model of simulated sessions, with items below {simulator.num_items}")
    number = {item: place for place, item in enumerate(ids)}
    original = torch.tensor(ids)

    def policy(histories: list[list[int]]) -> torch.Tensor:
        # An item that the training sessions never held is unknown to the model.
        known = [[number[item] for item in history if item in number] for history in histories]
        return original[recommender.recommend(known, 1)[:, 0]]

    returns = simulator.rollout(policy, rollouts, seed)
    return {"discounted_return": returns.discounted, "total_return": returns.total}
