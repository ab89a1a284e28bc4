"""`ballast recsys sgl`: train with self-supervised graph learning, evaluate head and tail, add noise to training pairs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from cyclopts import App, Parameter

from ballast_cli.datasets import DataOptions
from ballast_cli.output import EpochProgress, print_result, write_json, write_text

if TYPE_CHECKING:
    from torch import Tensor

    from recsys_losses.data import InteractionData

sgl_app = App(name="sgl", help="SGL: self-supervised graph learning (train, evaluate, add-noise).")

FileFormat = Literal["lightgcn", "pairs"]
_TAIL_GROUPS, _GROUPS = 8, 10


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class SGLData:
    """The interactions: two files, or a data set that `ballast recsys train` knows."""

    train: Path | None = None
    "File of training pairs."
    test: Path | None = None
    "File of test pairs."
    file_format: FileFormat = "lightgcn"
    "`lightgcn`: `user item item ...` per line; `pairs`: `user,item` per line. Ids start at 0."
    data: str | None = None
    "Instead of the files: a known data set (`ballast data list`), `synthetic`, or a folder."
    data_root: Path | None = None
    "Folder of the known data sets."

    def load(self) -> InteractionData:
        """Read the interactions.

        Raises:
            ValueError: Neither or both of the files and the data set, or a malformed file.
            FileNotFoundError: A missing file or data root.
        """
        if self.data is not None and self.train is None and self.test is None:
            return DataOptions(self.data, self.data_root).load()
        if self.data is not None or self.train is None or self.test is None:
            raise ValueError("give --train and --test, or --data alone")
        return _read_files(self.train, self.test, self.file_format)


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class SGLOptions:
    """The model and its loss."""

    dim: int = 64
    "Width of the embeddings."
    layers: int = 3
    "Hops of the propagation."
    aug: Literal["nd", "ed", "rw"] = "ed"
    "Views: drop nodes, drop edges, or drop edges anew for every hop."
    ssl_ratio: float = 0.1
    "Share of nodes or edges that a view leaves out, in [0, 1)."
    ssl_temp: float = 0.2
    "Temperature of the self-supervised loss, > 0."
    ssl_reg: float = 0.1
    "Weight of the self-supervised loss; 0 trains LightGCN with BPR."
    reg: float = 1e-4
    "Weight of the squared norms."
    mode: Literal["both_side", "user_side", "item_side", "merge"] = "both_side"
    "Which nodes are told apart."
    negatives: Literal["all", "batch"] = "all"
    "What a node is told apart from: all nodes of its side, or those of the batch (`merge` needs this)."

    def build(self, data: InteractionData, seed: int) -> Any:
        """A freshly initialised model for `data`."""
        from recsys_losses.sgl import SGL

        return SGL(
            data.num_users,
            data.num_items,
            data.train,
            self.dim,
            self.layers,
            self.aug,
            self.ssl_ratio,
            self.ssl_temp,
            self.ssl_reg,
            self.reg,
            seed,
            mode=self.mode,
            negatives=self.negatives,
        )


@sgl_app.command
def train(
    *,
    data: SGLData = SGLData(),
    options: SGLOptions = SGLOptions(),
    output: Path = Path("runs/sgl"),
    epochs: int = 50,
    batch_size: int = 2048,
    lr: float = 1e-3,
    sampling: Literal["user", "edge"] = "user",
    eval_every: int = 1,
    patience: int | None = 10,
    monitor: str = "recall@20",
    select_on: Literal["valid", "test", "none"] = "valid",
    ks: Annotated[tuple[int, ...], Parameter(consume_multiple=True)] = (20,),
    seed: int = 0,
    device: str = "cpu",
    fresh: bool = False,
    json: bool = False,
) -> None:
    """Train SGL and report its test metrics.

    An interrupted run continues exactly where it stopped when the same command is given again. The model that is written
    is the trained LightGCN: `ballast recsys recommend` reads it as well.

    Examples:
        ballast recsys sgl train --train train.txt --test test.txt --aug ed --layers 3 --ssl-ratio 0.1 --output runs/sgl

        ballast recsys sgl train --data lastfm --layers 2 --lr 0.01 --epochs 30

    Args:
        data: What to train on.
        options: The model and its loss.
        output: Folder for `model.safetensors`, `metrics.json`, `history.json`, `config.yaml` and the checkpoint.
        epochs: Epochs, at most; each draws as many triples as there are training pairs.
        batch_size: Triples per step.
        lr: Learning rate of Adam.
        sampling: `user` draws users uniformly, as the authors' code does; `edge` takes every training pair once.
        eval_every: Epochs between two evaluations.
        patience: Evaluations without improvement before training stops.
        monitor: Metric that chooses the epoch.
        select_on: Part that chooses the epoch; `test` repeats a published habit and warns.
        ks: Cut-offs of the metrics.
        seed: Seed of initialisation, views, triples and the validation split.
        device: Torch device.
        fresh: Start over instead of continuing a checkpoint in `--output`.
        json: Print the result as one JSON object.
    """
    from recsys_losses.sgl import BPRSampler, fit
    from recsys_losses.training import save_model

    interactions = data.load()
    model = options.build(interactions, seed)
    write_text(output / "config.yaml", yaml.safe_dump(_plain({"data": data, "options": options}), sort_keys=False))
    with EpochProgress(epochs, quiet=json) as progress:
        result = fit(
            model,
            BPRSampler(interactions, batch_size=batch_size, sampling=sampling, seed=seed),
            epochs,
            lr=lr,
            eval_every=eval_every,
            patience=patience,
            monitor=monitor,
            select_on=select_on,
            ks=ks,
            device=device,
            checkpoint=output / "checkpoint.safetensors",
            resume=not fresh,
            on_epoch=progress.update,
        )
    metrics = _test(model, interactions, ks)
    save_model(model.backbone, output / "model.safetensors")
    write_json(output / "history.json", result.history)
    summary = {
        "model": f"sgl-{options.aug}" if options.ssl_reg else "lightgcn",
        **metrics,
        "best_epoch": result.best_epoch,
        "seconds": round(result.seconds, 2),
        "output": str(output),
    }
    write_json(output / "metrics.json", summary)
    print_result(summary, as_json=json)


@sgl_app.command
def evaluate(
    *,
    model: Path,
    data: SGLData = SGLData(),
    ks: Annotated[tuple[int, ...], Parameter(consume_multiple=True)] = (20,),
    output: Path | None = None,
    json: bool = False,
) -> None:
    """Rank the whole catalogue for every user with test items; report how much of the recall comes from rare items.

    Examples:
        ballast recsys sgl evaluate --model runs/sgl/model.safetensors --train train.txt --test test.txt --ks 10 20

    Args:
        model: File that `train` wrote.
        data: What to evaluate on; training items are masked.
        ks: Cut-offs.
        output: Also write the metrics to this JSON file.
        json: Print the result as one JSON object.
    """
    from recsys_losses.training import load_model

    interactions = data.load()
    result = _test(load_model(model, interactions), interactions, ks)
    if output is not None:
        write_json(output, result)
    print_result(result, as_json=json)


@sgl_app.command
def add_noise(
    *,
    train: Path,
    test: Path,
    output: Path,
    ratio: float = 0.05,
    file_format: FileFormat = "lightgcn",
    seed: int = 0,
    json: bool = False,
) -> None:
    """Write the training pairs with false ones among them: random pairs that are in neither file.

    Examples:
        ballast recsys sgl add-noise --train train.txt --test test.txt --ratio 0.05 --output train.noise.txt

    Args:
        train: File of training pairs.
        test: File of test pairs, which stays clean.
        output: File to write, in the format of `--train`.
        ratio: False pairs per training pair.
        file_format: `lightgcn`: `user item item ...` per line; `pairs`: `user,item` per line.
        seed: Seed of the draw.
        json: Print the result as one JSON object.
    """
    import torch

    from recsys_losses import sgl

    data = _read_files(train, test, file_format)
    noisy = sgl.add_noise(data, ratio, generator=torch.Generator().manual_seed(seed))
    write_text(output, _text(noisy.train, file_format))
    added = noisy.train.shape[1] - data.train.shape[1]
    print_result({"pairs": noisy.train.shape[1], "added": added, "output": str(output)}, as_json=json)


def _read_files(train: Path, test: Path, file_format: FileFormat) -> InteractionData:
    from recsys_losses.data import InteractionData, read_lightgcn, read_pairs

    if file_format == "lightgcn":
        return read_lightgcn(train, test)
    pairs = {"train": read_pairs(train, sep=","), "test": read_pairs(test, sep=",")}
    users, items = (max(int(edges[row].max()) + 1 for edges in pairs.values() if edges.numel()) for row in (0, 1))
    return InteractionData(users, items, **pairs)


def _text(edges: Tensor, file_format: FileFormat) -> str:
    if file_format == "pairs":
        return "".join(f"{user},{item}\n" for user, item in edges.T.tolist())
    items: dict[int, list[int]] = {}
    for user, item in sorted(edges.T.tolist()):
        items.setdefault(user, []).append(item)
    return "".join(f"{user} {' '.join(map(str, row))}\n" for user, row in items.items())


def _test(model: Any, data: InteractionData, ks: tuple[int, ...]) -> dict[str, float]:
    """The metrics on the test pairs, and the recall from the less popular items that hold 8 tenths of the train pairs."""
    import torch

    from recsys_losses.metrics import evaluate_full_ranking, item_group_recall

    with torch.no_grad():
        user, item = model.embeddings()
        metrics = evaluate_full_ranking(user, item, data.train, data.test, ks=ks)
        groups = {k: item_group_recall(user, item, data.train, data.test, k=k, num_groups=_GROUPS) for k in ks}
    return metrics | {f"tail_recall@{k}": float(recall[:_TAIL_GROUPS].sum()) for k, recall in groups.items()}


def _plain(parts: dict[str, Any]) -> dict[str, Any]:
    """The options with paths as text and what was not given left out, for YAML."""
    flat = {name: value for part in parts.values() for name, value in dataclasses.asdict(part).items()}
    return {k: str(v) if isinstance(v, Path) else v for k, v in flat.items() if v is not None}
