"""`ballast graph-unlearn`: delete from trained graph networks, and check that it worked."""

from __future__ import annotations

import dataclasses
import json as jsonlib
import math
import time
import warnings
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from cyclopts import App, Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ballast_bench.meta import find_data_root
from ballast_cli.output import print_result, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

graph_unlearn_app = App(
    name="graph-unlearn",
    help="Delete nodes, edges or features from trained graph networks (GIF), beside doing nothing and retraining.",
)

Update = Literal["if", "gif", "gif_cg"]
_UPDATES: tuple[Update, ...] = ("if", "gif", "gif_cg")


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class GraphOptions:
    """The graph."""

    data: Literal["synthetic", "cora", "citeseer", "cora_ml"] = "synthetic"
    "A citation graph, or `synthetic`, which needs no files."
    root: Path | None = None
    "Folder with the raw files; $BALLAST_DATA or `shared/data` above the current folder by default."
    device: str = "cpu"
    "Torch device."

    def load(self) -> Any:
        """Read or generate the graph; features are stored sparse, bags of words being a few percent dense."""
        from graph_unlearn.data import load_graph, synthetic_graph

        if self.data == "synthetic":
            return synthetic_graph().to(self.device)
        root = find_data_root(self.root)
        if root is None:
            raise FileNotFoundError(
                f"--data {self.data}: no data root; name it with --root or BALLAST_DATA, or use --data synthetic"
            )
        data = load_graph(self.data, root)
        data.x = data.x.to_sparse()
        return data.to(self.device)


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The network and its training."""

    model: Literal["gcn", "sgc", "gat", "gin"] = "gcn"
    "Two layers each, in the sizes of the paper."
    self_loops: bool = False
    "Self loops in gcn and sgc; the authors' code has none."
    hidden: int | None = None
    "Width of the hidden layer; 16, 16, 8 (times 8 heads) or 32 by default."
    dropout: float | None = None
    "Probability of dropout; 0.5, or 0.6 for gat, by default."
    epochs: int = 100
    "Full-batch steps."
    lr: float | None = None
    "Adam's rate; the authors' for each model by default."
    weight_decay: float | None = None
    "Adam's weight decay; the authors' for each model by default."

    def config(self) -> Any:
        """The library's TrainConfig."""
        from graph_unlearn.training import paper_config

        given = {"lr": self.lr, "weight_decay": self.weight_decay}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(paper_config(self.model, epochs=self.epochs), **changes)

    def maker(self, data: Any) -> Callable[[], nn.Module]:
        """What builds an untrained network for a graph."""
        from graph_unlearn.nets import build_model

        options: dict[str, Any] = {"hidden": self.hidden, "dropout": self.dropout}
        options = {name: value for name, value in options.items() if value is not None}
        if self.self_loops:
            if self.model not in ("gcn", "sgc"):
                raise ValueError(f"--self-loops is for gcn and sgc, not {self.model}")
            options["self_loops"] = True
        features, classes = data.x.shape[1], int(data.num_classes)
        return lambda: build_model(self.model, features, classes, **options)


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class StepOptions:
    """How the step is computed."""

    method: Literal["gif", "if"] = "gif"
    "GIF, or the classical influence function without the neighbours."
    solver: Literal["cg", "neumann", "lanczos"] = "cg"
    "Conjugate gradients, the published recursion, or Lanczos."
    damping: Literal["auto"] | float | None = None
    "Added to the Hessian: a number >= 0, or `auto`; 10 by default, 0 for neumann."
    hessian: Literal["before", "after"] = "before"
    "Hessian on the graph before the request, as published, or after it: a Newton step."
    restrict_to_train: bool = True
    "Keep labels of test nodes out of the step; the published program doesn't."
    scale: float = 500.0
    "Scale of neumann, above half of the largest eigenvalue."
    num_iter: int = 100
    "Steps of neumann."
    rtol: float = 1e-4
    "Relative residual at which cg stops."
    on_negative_curvature: Literal["raise", "increase", "warn"] = "raise"
    "What negative curvature does: the run is recorded as refused, the damping is raised, or the step is applied all the same."
    max_loss_rise: float = 0.1
    "The step is halved while the retained loss rises by more, in nats; `inf` applies it unseen."

    def arguments(self) -> dict[str, Any]:
        """Arguments of the library's `unlearn`."""
        damping = self.damping if self.damping is not None else (0.0 if self.solver == "neumann" else 10.0)
        shared: dict[str, Any] = {
            "method": self.method,
            "solver": self.solver,
            "damping": damping,
            "hessian": self.hessian,
            "restrict_to_train": self.restrict_to_train,
            "on_negative_curvature": self.on_negative_curvature,
            "max_loss_rise": None if math.isinf(self.max_loss_rise) else self.max_loss_rise,
        }
        if self.solver == "neumann":
            return {**shared, "scale": self.scale, "num_iter": self.num_iter}
        return {**shared, "rtol": self.rtol} if self.solver == "cg" else shared


@graph_unlearn_app.command
def run(
    *,
    source: GraphOptions = GraphOptions(),
    net: ModelOptions = ModelOptions(),
    step: StepOptions = StepOptions(),
    graph: Literal["full", "training"] = "training",
    task: Literal["node", "edge", "feature"] = "node",
    ratio: float = 0.05,
    runs: int = 1,
    seed: int = 0,
    output: Path | None = None,
    fresh: bool = False,
    json: bool = False,
) -> None:
    """Train, delete at random, and compare the updated network with the old one and with a retrained one.

    Test accuracy says that nothing broke, not that anything was forgotten: the old weights (`no_update`) have it too. Look
    at `undamped_residual` for the quality of the step, and at `efficacy` and `mia` for its effect.

    With `--output` every finished run is kept, and the same command continues an interrupted one.

    Examples:
        ballast graph-unlearn run --data cora --root DIR --model gcn --task edge --ratio 0.05 --runs 10 --output out.json

        ballast graph-unlearn run --task feature --solver neumann --scale 500 --num-iter 100

    Args:
        source: The graph.
        net: What to train.
        step: How to unlearn.
        graph: What is trained on: the edges between training nodes, as in the paper, or all edges. Labels are those of
            training nodes in both; tests are on all edges.
        task: What is deleted.
        ratio: Part of the training nodes (node, feature) or edges (edge) that is deleted.
        runs: How many times, each with the next seed.
        seed: Seed of the first run: its weights, dropout and request.
        output: JSON file with settings, runs and their summary.
        fresh: Start over instead of continuing the file.
        json: Print the summary as one JSON object.
    """
    from graph_unlearn.data import training_graph

    data = source.load()
    before = data if graph == "full" else training_graph(data)
    make_model, config, arguments = net.maker(data), net.config(), step.arguments()
    settings = _settings(source, net, step=arguments, graph=graph, task=task, ratio=ratio)

    def one(key: Sequence[float]) -> list[dict[str, Any]]:
        return [_one_run(before, data, make_model, config, arguments, task, ratio, int(key[0]))]

    rows = _Runs("run", settings, output, fresh=fresh, quiet=json).collect([(seed + i,) for i in range(runs)], one)
    summary: dict[str, Any] = {"runs": len(rows), "refused": sum(bool(row["refused"]) for row in rows)}
    summary |= _statistics([{k: v for k, v in row.items() if k not in ("seed", "refused")} for row in rows])
    _finish(output, summary, json=json)


def _one_run(
    before: Any,
    data: Any,
    make_model: Callable[[], nn.Module],
    config: Any,
    arguments: dict[str, Any],
    task: Any,
    ratio: float,
    seed: int,
) -> dict[str, Any]:
    import torch

    import ihvp
    from graph_unlearn.gif import DampingWarning, UnstableStepError, unlearn
    from graph_unlearn.requests import apply_request, draw_request
    from graph_unlearn.training import accuracy, retrain

    config = dataclasses.replace(config, seed=seed)
    start = time.process_time()
    model = retrain(make_model, before, before.train_mask, config)
    trained = time.process_time()
    request = draw_request(task, before, ratio, torch.Generator().manual_seed(seed))
    # What is deleted goes from the graph for training and from that for testing.
    after, test = apply_request(request, before), apply_request(request, data)
    row: dict[str, Any] = {"seed": seed, "refused": "", "original": accuracy(model, data, data.test_mask)}
    row["no_update"] = accuracy(model, test, data.test_mask)
    with warnings.catch_warnings():
        # Both are figures of the row.
        warnings.simplefilter("ignore", ihvp.ConvergenceWarning)
        warnings.simplefilter("ignore", DampingWarning)
        try:
            result = unlearn(model, before, request, **arguments)
        except UnstableStepError as error:
            row["refused"] = str(error)
        else:
            times = dataclasses.asdict(result.timings)
            row |= {
                "updated": accuracy(result.model, test, data.test_mask),
                "residual": result.solve.relative_residual,
                "undamped_residual": result.solve.undamped_relative_residual,
                "damping": result.damping,
                "step_factor": result.step_factor,
                "step_norm": result.step_norm,
                "products": float(result.solve.num_hvp),
                "setup_seconds": times["t_setup"],
                "solve_seconds": times["t_solve"],
                "unlearn_seconds": times["total"],
            }
    again = time.process_time()
    retrained = retrain(make_model, after, after.train_mask, config)
    row |= {"retrain_seconds": time.process_time() - again, "train_seconds": trained - start}
    row["retrain"] = accuracy(retrained, test, data.test_mask)
    return row


@graph_unlearn_app.command
def efficacy(
    *,
    source: GraphOptions = GraphOptions(),
    net: ModelOptions = ModelOptions(),
    ratios: Annotated[tuple[float, ...], Parameter(consume_multiple=True)] = (0.5, 0.9),
    updates: Annotated[tuple[Update, ...], Parameter(consume_multiple=True)] = _UPDATES,
    damping: Literal["auto"] | float = 10.0,
    hessian: Literal["before", "after"] = "before",
    restrict_to_train: bool = True,
    runs: int = 3,
    seed: int = 0,
    output: Path | None = None,
    fresh: bool = False,
    json: bool = False,
) -> None:
    """Train on a graph with adversarial edges, delete them, and see how much of the damage goes.

    `no_update` is the old network on the clean graph: what an update is worth is the difference to it (`gain`).

    Examples:
        ballast graph-unlearn efficacy --data cora --root DIR --ratios 0.5 0.9 --runs 10 --output efficacy.json

        ballast graph-unlearn efficacy --updates gif_cg --damping auto

    Args:
        source: The clean graph.
        net: What to train.
        ratios: Adversarial edges per edge of the graph.
        updates: The classical influence function and GIF with the published recursion, and GIF with conjugate gradients.
        damping: Of gif_cg; a number >= 0 or `auto`.
        hessian: Hessian on the graph before the deletion, or after it.
        restrict_to_train: Keep labels of test nodes out of the step; the published program doesn't.
        runs: How many times per ratio, each with the next seed.
        seed: Seed of the first run: its edges, weights and dropout.
        output: JSON file with settings, runs and their summary.
        fresh: Start over instead of continuing the file.
        json: Print the summary as one JSON object.
    """
    from graph_unlearn.attacks import efficacy_curve

    data = source.load()
    make_model, config = net.maker(data), net.config()
    chosen = _updates(updates, damping=damping, hessian=hessian, restrict_to_train=restrict_to_train)
    settings = _settings(source, net, updates=chosen)

    def one(key: Sequence[float]) -> list[dict[str, Any]]:
        return efficacy_curve(make_model, data, [key[0]], seeds=[int(key[1])], config=config, updates=chosen)

    keys = [(ratio, seed + i) for ratio in ratios for i in range(runs)]
    rows = _Runs("efficacy", settings, output, fresh=fresh, quiet=json).collect(keys, one)
    summary: dict[str, Any] = {"runs": len(rows)}
    for ratio in ratios:
        group = [row for row in rows if row["ratio"] == ratio]
        names = ("corrupted", "no_update", *chosen, "retrain")
        figures = _statistics([{name: row[name] for name in names} for row in group])
        gains = {f"gain {name}": mean(row[name] - row["no_update"] for row in group) for name in (*chosen, "retrain")}
        held = {key: sum(len(row[key]) for row in group) for key in ("refused", "shortened")}
        summary |= {f"{ratio:g} {name}": value for name, value in {**figures, **gains, **held}.items()}
    _finish(output, summary, json=json)


@graph_unlearn_app.command
def mia(
    *,
    source: GraphOptions = GraphOptions(),
    net: ModelOptions = ModelOptions(),
    ratio: float = 0.05,
    updates: Annotated[tuple[Update, ...], Parameter(consume_multiple=True)] = _UPDATES,
    damping: Literal["auto"] | float = 10.0,
    hessian: Literal["before", "after"] = "before",
    restrict_to_train: bool = True,
    runs: int = 3,
    seed: int = 0,
    output: Path | None = None,
    fresh: bool = False,
    json: bool = False,
) -> None:
    """Delete nodes, and attack: can deleted nodes be told from test nodes?

    AUC of two attacks. `l2` sees the network before and after; it is 0.5 where nothing was updated. `loss` sees the network
    after. Compare with `retrain`, not with 0.5. A network that is overfit on purpose (`--epochs 1000 --dropout 0
    --weight-decay 0 --lr 0.01`) shows what a leak looks like.

    Examples:
        ballast graph-unlearn mia --data cora --root DIR --ratio 0.05 --runs 10 --output mia.json

        ballast graph-unlearn mia --updates gif_cg --epochs 1000 --dropout 0 --weight-decay 0 --lr 0.01

    Args:
        source: The graph.
        net: What to train.
        ratio: Part of the training nodes that is deleted.
        updates: The classical influence function and GIF with the published recursion, and GIF with conjugate gradients.
        damping: Of gif_cg; a number >= 0 or `auto`.
        hessian: Hessian on the graph before the deletion, or after it.
        restrict_to_train: Keep labels of test nodes out of the step; the published program doesn't.
        runs: How many times, each with the next seed.
        seed: Seed of the first run: its nodes, weights and dropout.
        output: JSON file with settings, runs and their summary.
        fresh: Start over instead of continuing the file.
        json: Print the summary as one JSON object.
    """
    from graph_unlearn.attacks import membership_table

    data = source.load()
    make_model, config = net.maker(data), net.config()
    chosen = _updates(updates, damping=damping, hessian=hessian, restrict_to_train=restrict_to_train)
    settings = _settings(source, net, updates=chosen, ratio=ratio)

    def one(key: Sequence[float]) -> list[dict[str, Any]]:
        return membership_table(make_model, data, ratio, seeds=[int(key[0])], config=config, updates=chosen)

    rows = _Runs("mia", settings, output, fresh=fresh, quiet=json).collect([(seed + i,) for i in range(runs)], one)
    summary: dict[str, Any] = {"runs": runs}
    for method in ("no_update", *chosen, "retrain"):
        group = [row for row in rows if row["method"] == method]
        figures = _statistics([{name: row[name] for name in ("l2", "loss", "accuracy")} for row in group])
        summary |= {f"{method} {name}": value for name, value in figures.items()}
    for told in ("refused", "shortened"):
        summary[told] = sum(row["told"] == told for row in rows)
    _finish(output, summary, json=json)


def _updates(names: Sequence[str], *, damping: float | str, **shared: Any) -> dict[str, dict[str, Any]]:
    """Arguments of `unlearn` for the updates that are compared."""
    from graph_unlearn.attacks import UPDATES

    chosen = {name: {**UPDATES[name], **shared} for name in names}
    if "gif_cg" in chosen:
        chosen["gif_cg"]["damping"] = damping
    return chosen


def _settings(source: GraphOptions, net: ModelOptions, **more: Any) -> dict[str, Any]:
    """What the figures depend on, as JSON values."""
    settings = {"data": source.data, "device": source.device, **dataclasses.asdict(net), **more}
    return jsonlib.loads(jsonlib.dumps(settings))  # type: ignore[no-any-return]


class _Runs:
    """Runs that are kept in a file as they finish."""

    def __init__(
        self, command: str, settings: dict[str, Any], output: Path | None, *, fresh: bool, quiet: bool
    ) -> None:
        self.head = {"command": f"graph-unlearn {command}", "settings": settings}
        self.output, self.quiet = output, quiet
        self.kept: dict[tuple[float, ...], list[dict[str, Any]]] = {}
        if output is not None and output.exists() and not fresh:
            self.kept = self.read(output)

    def read(self, path: Path) -> dict[tuple[float, ...], list[dict[str, Any]]]:
        try:
            stored = jsonlib.loads(path.read_text(encoding="utf-8"))
            runs = {tuple(entry["key"]): entry["rows"] for entry in stored["runs"]}
            head = {name: stored[name] for name in self.head}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not a file of runs: {error!r}; name another --output, or give --fresh"
            ) from None
        for name, value in _flat(self.head).items():
            if (there := _flat(head).get(name)) != value:
                raise ValueError(
                    f"{path} holds runs with {name} = {there!r}, asked for is {value!r}; name another --output, or give --fresh"
                )
        return runs

    def collect(
        self, keys: Sequence[tuple[float, ...]], one: Callable[[Sequence[float]], list[dict[str, Any]]]
    ) -> list[dict[str, Any]]:
        """Compute what isn't kept yet, and return the rows of all keys in their order."""
        if not keys:
            raise ValueError("runs must be >= 1 (and ratios not empty)")
        with _RunProgress(sum(key not in self.kept for key in keys), quiet=self.quiet) as progress:
            for key in keys:
                if key not in self.kept:
                    self.kept[key] = one(key)
                    self.write()
                    progress.advance()
        return [row for key in keys for row in self.kept[key]]

    def write(self) -> None:
        if self.output is not None:
            runs = [{"key": key, "rows": rows} for key, rows in self.kept.items()]
            write_json(self.output, {**self.head, "runs": runs})


class _RunProgress:
    """Progress over runs on standard error: a bar with time left, or plain lines when not a terminal."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._total, self._done, self._quiet, self._start = total, 0, quiet, time.perf_counter()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        shown = not quiet and self._console.is_terminal
        self._bar = Progress(
            *columns, TextColumn("eta"), TimeRemainingColumn(), console=self._console, disable=not shown
        )
        self._task = self._bar.add_task("runs", total=total)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self) -> None:
        """Count one finished run."""
        self._done += 1
        self._bar.advance(self._task)
        if self._bar.disable and not self._quiet:
            each = (time.perf_counter() - self._start) / self._done
            left = (self._total - self._done) * each
            self._console.print(f"run {self._done}/{self._total} {each:.1f} s/run eta={left:.0f}s", markup=False)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in tree.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return out


def _statistics(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean, and standard deviation where there is one, of every figure over the rows that have it."""
    out: dict[str, float] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if name in row]
        out[name] = mean(values)
        if len(values) > 1:
            out[f"{name} std"] = stdev(values)
    return out


def _finish(output: Path | None, summary: dict[str, Any], *, json: bool) -> None:
    if output is not None:
        stored = jsonlib.loads(output.read_text(encoding="utf-8"))
        write_json(output, {**stored, "summary": summary})
        summary = {**summary, "output": str(output)}
    print_result(summary, as_json=json)
