"""`ballast graph-ood`: train graph classifiers under distribution shift, evaluate them, draw what they look at."""

from __future__ import annotations

import dataclasses
import json as json_format
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from cyclopts import App, Parameter

from ballast_bench.meta import find_data_root
from ballast_cli.output import EpochProgress, print_result, write_json, write_text

if TYPE_CHECKING:
    import torch
    from torch_geometric.data import Batch, Dataset  # type: ignore[import-untyped]
    from torch_geometric.loader import DataLoader  # type: ignore[import-untyped]

    from graph_ood.training import History

graph_ood_app = App(
    name="graph-ood", help="Graph classifiers that survive distribution shift: CAL, AIA, InfoIGL, baselines."
)

Method = Literal["cal", "aia", "infoigl", "erm", "irm", "vrex", "group-dro", "mixup", "drop-edge"]

_BASELINES = ("erm", "irm", "vrex", "group-dro", "mixup", "drop-edge")
_MASKED = ("cal", "aia", "infoigl")
# Which methods know an option that not all know.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "strength": ("irm", "vrex", "group-dro", "mixup", "drop-edge"),
    "net": _BASELINES,
    "lambda_unif": ("cal",),
    "lambda_caus": ("cal",),
    "gamma": ("aia",),
    "adv_lr": ("aia",),
    "adv_reg": ("aia",),
    "cau_reg": ("aia",),
    "stable_ratio": ("aia",),
    "lambda_s": ("infoigl",),
    "lambda_i": ("infoigl",),
    "lambda_c": ("infoigl",),
    "variant": ("infoigl",),
    "dropout": ("aia", "infoigl", *_BASELINES),
    "weight_decay": ("aia", "infoigl", *_BASELINES),
    "min_lr": ("cal", "infoigl", *_BASELINES),
    "warmup_select": ("aia", "infoigl", *_BASELINES),
}
_FORMS = "good-motif:base|size:covariate|concept|no_shift, spurious-motif:BIAS, syn-b:BIAS, tu:NAME, tu:NAME:size"
_EVAL_BATCH = 256


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class GraphDataOptions:
    """The graphs, and where they come from."""

    data: str
    "`good-motif:base:covariate`, `spurious-motif:0.9`, `syn-b:0.9`, `tu:MUTAG` (at random), `tu:MUTAG:size` (by size)."
    root: Path | None = None
    "Of TU data: the folder above `MUTAG/raw`, $BALLAST_DATA by default. Of generated data: where they are kept, if given."
    num_data: int | None = None
    "Graphs in all splits of generated data together; 3000 by default, 30000 (SYN-b: 8000) are the published sizes."
    data_seed: int = 0
    "Seed of the generated data, or of the split of TU data."


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class MethodOptions:
    """What the method is told; everything has the library's default."""

    strength: float | None = None
    "Penalty weight of irm and vrex, step size of group-dro, alpha of mixup, share of edges that drop-edge removes."
    net: Literal["cal", "aia", "infoigl"] | None = None
    "Network of a baseline: that of the method it is compared with; cal by default."
    lambda_unif: float | None = None
    "CAL: weight of the uniform predictions of the trivial part."
    lambda_caus: float | None = None
    "CAL: weight of the interventions."
    gamma: float | None = None
    "AIA: weight of the distance between augmented and original graphs."
    adv_lr: float | None = None
    "AIA: learning rate of the adversarial network."
    adv_reg: float | None = None
    "AIA: weight of the size of the adversarial mask."
    cau_reg: float | None = None
    "AIA: weight of the size of the stable mask."
    stable_ratio: float | None = None
    "AIA: share of a graph that is stable, in (0, 1]."
    lambda_s: float | None = None
    "InfoIGL: weight of the contrast with class prototypes."
    lambda_i: float | None = None
    "InfoIGL: weight of the contrast between graphs."
    lambda_c: float | None = None
    "InfoIGL: share of the graph itself in the contrast between graphs."
    variant: Literal["official", "paper"] | None = None
    "InfoIGL: contrasts as in the authors' code or as in the paper."
    dropout: float | None = None
    "In all but the networks of CAL."
    weight_decay: float | None = None
    "L2 term of Adam; CAL has none."
    min_lr: float | None = None
    "Where the cosine of the learning rate ends; the rate itself keeps it constant. AIA's ends at 0."
    warmup_select: int | None = None
    "Epochs that validation can't choose; 70 % of them for AIA, 0 by default for the others; CAL has none."

    def given(self, method: str) -> dict[str, Any]:
        """Return what was given.

        Raises:
            ValueError: If the method doesn't know one of them.
        """
        values = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        for name in values:
            if method not in _OPTIONS[name]:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} is an option of {', '.join(_OPTIONS[name])}, not of {method}")
        return values


@graph_ood_app.command
def train(
    *,
    method: Method,
    data: GraphDataOptions,
    options: MethodOptions = MethodOptions(),
    encoder: Literal["gcn", "gin", "gat"] | None = None,
    hidden: int | None = None,
    layers: int | None = None,
    epochs: int = 100,
    batch_size: int = 128,
    lr: float = 1e-3,
    select_on: Literal["val", "id_val"] = "val",
    output: Path = Path("runs/graph-ood"),
    seed: int = 0,
    device: str = "cpu",
    fresh: bool = False,
    json: bool = False,
) -> None:
    """Train a graph classifier, choose its epoch on validation graphs, and report its accuracy on every split.

    An interrupted run continues exactly where it stopped when the same command is given again.

    Examples:
        ballast graph-ood train --method cal --data syn-b:0.9 --num-data 800 --epochs 30 --lr 2e-3

        ballast graph-ood train --method vrex --strength 10 --data good-motif:base:concept --output runs/vrex

        ballast graph-ood train --method infoigl --data tu:MUTAG:size --root shared/data --epochs 30

    Args:
        method: cal, aia, infoigl, or a baseline; irm, vrex and group-dro need data with environments.
        data: What to train on.
        options: Options of the method.
        encoder: Convolutions; gcn for CAL and its network, else gin.
        hidden: Width; 300 for AIA and its network, else 128.
        layers: Convolutions of the encoder; 4 for AIA (half of them before the masks) and its network, else 3.
        epochs: Passes over the training graphs.
        batch_size: Graphs per step.
        lr: Learning rate of the first epoch.
        select_on: Split whose accuracy chooses the epoch; `id_val` is distributed as the training graphs.
        output: Folder for `model.safetensors`, `result.json`, `history.json`, `config.yaml` and the checkpoint.
        seed: Seed of initialisation, shuffling and what the method draws.
        device: Torch device.
        fresh: Start over instead of continuing a checkpoint in `--output`.
        json: Print the result as one JSON object.
    """
    from torch_geometric.loader import DataLoader

    from graph_ood.training import save_model

    given = options.given(method)
    splits = _splits(data)
    if select_on not in splits:
        raise ValueError(f"--select-on {select_on}: {data.data} has only the splits {', '.join(splits)}")
    settings: dict[str, Any] = {
        "method": method,
        **_data_settings(data),
        **_architecture(method, given, encoder, hidden, layers),
        "in_channels": splits["train"].num_node_features,
        "num_classes": splits["train"].num_classes,
        "options": given,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "select_on": select_on,
        "seed": seed,
    }
    checkpoint = output / "checkpoint.safetensors"
    if checkpoint.exists() and not fresh:
        _check_unchanged(output / "config.yaml", settings)
    model = _build(settings)
    write_text(output / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
    with EpochProgress(epochs, quiet=json) as progress:
        history = _fit(
            model,
            settings,
            DataLoader(splits["train"], batch_size, shuffle=True),
            DataLoader(splits[select_on], _EVAL_BATCH),
            device=device,
            checkpoint=checkpoint,
            resume=not fresh,
            on_epoch=lambda record: progress.update({**record, f"accuracy@{select_on}": record["val_accuracy"]}),
        )
    save_model(output / "model.safetensors", model, settings)
    write_json(output / "history.json", history.records)
    scores = {f"{name}_accuracy": _accuracy(model, method, split, device) for name, split in splits.items()}
    summary = {
        "method": method,
        "data": data.data,
        "best_epoch": history.best_epoch,
        **scores,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "train_seconds": round(history.train_seconds, 2),
        "output": str(output),
    }
    write_json(output / "result.json", summary)
    print_result(summary, as_json=json)


@graph_ood_app.command
def evaluate(
    *,
    run: Path,
    split: str = "test",
    data: str | None = None,
    root: Path | None = None,
    num_data: int | None = None,
    data_seed: int | None = None,
    device: str = "cpu",
    output: Path | None = None,
    json: bool = False,
) -> None:
    """Evaluate a trained model on a split of its data, or of other data with the same features and classes.

    Examples:
        ballast graph-ood evaluate --run runs/vrex --split id_test

        ballast graph-ood evaluate --run runs/vrex --data good-motif:base:covariate --split test

    Args:
        run: Folder that `ballast graph-ood train` wrote.
        split: Name of the split.
        data: Other data than those of the training, in the same form.
        root: As in `train`; where the training had its data by default.
        num_data: Graphs of generated data; as in the training by default.
        data_seed: Seed of generated data; as in the training by default.
        device: Torch device.
        output: JSON file to write the result to as well.
        json: Print the result as one JSON object.
    """
    model, settings = _load(run)
    chosen = _override(settings, data=data, root=root, num_data=num_data, data_seed=data_seed)
    graphs = _split(chosen, split)
    _check_fits(settings, graphs, chosen.data)
    summary = {
        "method": settings["method"],
        "data": chosen.data,
        "split": split,
        "graphs": len(graphs),
        "accuracy": _accuracy(model, settings["method"], graphs, device),
        "majority": _majority(graphs),
    }
    if output is not None:
        write_json(output, summary)
    print_result(summary, as_json=json)


@graph_ood_app.command
def explain(
    *,
    run: Path,
    split: str = "test",
    graphs: Annotated[tuple[int, ...], Parameter(consume_multiple=True)] = (0, 1, 2),
    output: Path | None = None,
    columns: int = 3,
    root: Path | None = None,
    device: str = "cpu",
    json: bool = False,
) -> None:
    """Draw the causal and the trivial part of some graphs, and compare the masks of the whole split with the true motifs.

    Examples:
        ballast graph-ood explain --run runs/cal --graphs 0 5 7 --output runs/cal/split.svg

    Args:
        run: Folder that `ballast graph-ood train` wrote, of cal, aia or infoigl.
        split: Name of the split.
        graphs: Which graphs to draw, from 0.
        output: SVG or PNG file; `explain.svg` in the folder of the run by default.
        columns: Graphs per row.
        root: As in `train`; where the training had its data by default.
        device: Torch device.
        json: Print the result as one JSON object.
    """
    from graph_ood.explain import draw_split

    model, settings = _load(run)
    if settings["method"] not in _MASKED:
        raise ValueError(f"{run} is a run of {settings['method']}; only {', '.join(_MASKED)} have masks")
    found = _split(_override(settings, root=root), split)
    wrong = [number for number in graphs if not 0 <= number < len(found)]
    if wrong or not graphs:
        raise ValueError(f"--graphs must name graphs in [0, {len(found)}) of split {split}, got {list(graphs)}")
    picture, titles = _explained(model, settings, found, graphs, device)
    path = draw_split(picture, run / "explain.svg" if output is None else output, titles=titles, columns=columns)
    summary = {
        "method": settings["method"],
        "split": split,
        **_mask_areas(model, settings, found, device),
        "picture": str(path),
    }
    print_result(summary, as_json=json)


def _splits(data: GraphDataOptions) -> dict[str, Dataset]:
    """Make or read all splits.

    Raises:
        ValueError: If the data have no such form.
        FileNotFoundError: If the files of TU data aren't there.
    """
    from graph_ood.data import load_good_motif, load_syn_b, spurious_motif

    kind, *words = data.data.split(":")
    shared: dict[str, Any] = {"root": data.root, "seed": data.data_seed}
    size = 3000 if data.num_data is None else data.num_data
    if kind == "good-motif" and len(words) == 2:
        return load_good_motif(domain=words[0], shift=words[1], num_data=size, **shared)  # type: ignore[arg-type]
    if kind in ("spurious-motif", "syn-b") and len(words) == 1:
        try:
            bias = float(words[0])
        except ValueError:
            raise ValueError(f"--data {data.data}: the bias must be a number, got {words[0]!r}") from None
        if kind == "syn-b":
            return load_syn_b(bias=bias, total=size, **shared)
        return spurious_motif(bias, num_data=size, **shared)
    if kind == "tu" and words and words[1:] in ([], ["size"]):
        return _tu_splits(data, words[0], by_size=len(words) == 2)
    raise ValueError(f"--data {data.data}: accepted are {_FORMS}")


def _tu_splits(data: GraphDataOptions, name: str, *, by_size: bool) -> dict[str, Dataset]:
    """Split 8:1:1, by size or at random with equal shares of the classes."""
    from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]

    from graph_ood.data import load_tu, size_split

    root = find_data_root(None) if data.root is None else data.root
    if root is None:
        raise FileNotFoundError(f"--data {data.data}: name the folder of the TU data with --root or BALLAST_DATA")
    dataset = load_tu(name, root)
    if by_size:
        return size_split(dataset, seed=data.data_seed)
    labels = dataset.y.numpy()
    train, rest = train_test_split(range(len(labels)), test_size=0.2, random_state=data.data_seed, stratify=labels)
    val, test = train_test_split(rest, test_size=0.5, random_state=data.data_seed, stratify=labels[rest])
    return {split: dataset[index] for split, index in {"train": train, "val": val, "test": test}.items()}


def _split(data: GraphDataOptions, split: str) -> Dataset:
    splits = _splits(data)
    if split not in splits:
        raise ValueError(f"--split {split}: {data.data} has the splits {', '.join(splits)}")
    return splits[split]


def _data_settings(data: GraphDataOptions) -> dict[str, Any]:
    return {**dataclasses.asdict(data), "root": None if data.root is None else str(data.root)}


def _override(settings: Mapping[str, Any], **given: Any) -> GraphDataOptions:
    """Return the data of a run, with what is given in place of what it had."""
    names = [field.name for field in dataclasses.fields(GraphDataOptions)]
    values = {name: settings[name] for name in names} | {k: v for k, v in given.items() if v is not None}
    values["root"] = None if values["root"] is None else Path(values["root"])
    return GraphDataOptions(**values)


def _architecture(
    method: str, given: Mapping[str, Any], encoder: str | None, hidden: int | None, layers: int | None
) -> dict[str, Any]:
    """Fill in the size of the network; a baseline takes the one that it is compared on."""
    net = given.get("net", "cal") if method in _BASELINES else method
    return {
        "net": net,
        "encoder": encoder or ("gcn" if net == "cal" else "gin"),
        "hidden": (300 if net == "aia" else 128) if hidden is None else hidden,
        "layers": (4 if net == "aia" else 3) if layers is None else layers,
    }


def _build(settings: Mapping[str, Any]) -> Any:
    """Make the untrained model of a run."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings["seed"])
        return _make(settings)


def _make(settings: Mapping[str, Any]) -> Any:
    from graph_ood.aia import AIA
    from graph_ood.cal import CAL
    from graph_ood.infoigl import InfoIGL
    from graph_ood.nets import ConvStack, GraphClassifier, ProjectedEncoder

    sizes = settings["in_channels"], settings["num_classes"]
    encoder, hidden, layers = settings["encoder"], settings["hidden"], settings["layers"]
    options = settings["options"]
    dropout = {"dropout": options["dropout"]} if "dropout" in options else {}
    if settings["method"] == "cal":
        return CAL(*sizes, encoder=encoder, hidden=hidden, num_layers=layers)
    if settings["method"] == "infoigl":
        return InfoIGL(*sizes, encoder=encoder, hidden=hidden, num_layers=layers, **dropout)
    if settings["method"] == "aia":
        if layers < 2:
            raise ValueError(f"--layers must be at least 2 for aia, got {layers}")
        ratio = {"stable_ratio": options["stable_ratio"]} if "stable_ratio" in options else {}
        parts = {"front_layers": layers // 2, "back_layers": layers - layers // 2}
        return AIA(sizes[0], sizes[1], encoder=encoder, hidden=hidden, **parts, **dropout, **ratio)
    if settings["net"] == "cal":
        if dropout:
            raise ValueError("--dropout is not an option of the network of cal; take --net infoigl or aia")
        return GraphClassifier(ProjectedEncoder(sizes[0], hidden, layers, encoder), sizes[1])
    if settings["net"] == "infoigl":
        return GraphClassifier(ConvStack(sizes[0], hidden, layers, encoder, **dropout), sizes[1])
    conv: Any = "weighted_gin" if encoder == "gin" else encoder
    stack = ConvStack(sizes[0], hidden, layers, conv, **dropout)
    return GraphClassifier(stack, sizes[1], pool="mean", head=_linear(hidden, sizes[1]))


def _linear(hidden: int, num_classes: int) -> torch.nn.Module:
    from torch import nn

    return nn.Linear(hidden, num_classes)


def _fit(
    model: Any,
    settings: Mapping[str, Any],
    train_loader: DataLoader,
    val_loader: DataLoader,
    *,
    on_epoch: Callable[[dict[str, float]], None],
    **run: Any,
) -> History:
    """Train the model of a run by its method."""
    from graph_ood.aia import AIATrainer
    from graph_ood.baselines import train_baseline
    from graph_ood.cal import train_cal
    from graph_ood.infoigl import InfoIGLTrainer

    method, epochs, lr, seed = (settings[name] for name in ("method", "epochs", "lr", "seed"))
    built = ("net", "dropout", "stable_ratio")
    options = {name: value for name, value in settings["options"].items() if name not in built}
    if method == "cal":
        lambdas = (1.0, options.pop("lambda_unif", 0.5), options.pop("lambda_caus", 0.5))
        return train_cal(
            model,
            train_loader,
            val_loader,
            epochs=epochs,
            lr=lr,
            lambdas=lambdas,
            seed=seed,
            on_epoch=on_epoch,
            **options,
            **run,
        )
    if method == "aia":
        warmup = options.pop("warmup_select", int(0.7 * epochs))
        trainer = AIATrainer(model, lr=lr, epochs=epochs, warmup_select=warmup, seed=seed, **options)
        return trainer.fit(train_loader, val_loader, on_epoch=on_epoch, **run)
    if method == "infoigl":
        fitted = {name: options.pop(name) for name in ("min_lr", "warmup_select") if name in options}
        contrast = InfoIGLTrainer(model, lr=lr, **options)
        return contrast.fit(train_loader, val_loader, epochs=epochs, seed=seed, on_epoch=on_epoch, **fitted, **run)
    options = {"min_lr": 1e-6, **options}
    return train_baseline(
        model,
        train_loader,
        val_loader,
        method=method,
        epochs=epochs,
        lr=lr,
        scheduler="cosine",
        seed=seed,
        on_epoch=on_epoch,
        **options,
        **run,
    )


def _check_unchanged(config: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to continue a run with other settings; how long is the checkpoint's own affair."""
    if not config.is_file():
        return
    before = yaml.safe_load(config.read_text(encoding="utf-8"))
    now = json_format.loads(json_format.dumps(settings))
    differing = [key for key in now if key != "root" and before.get(key) != now[key]]
    if differing:
        told = ", ".join(f"{key} (was {before.get(key)!r}, is {now[key]!r})" for key in differing)
        raise ValueError(f"{config.parent} holds a run with other settings: {told}; --fresh starts over")


def _load(run: Path) -> tuple[Any, dict[str, Any]]:
    from graph_ood.training import load_model

    tensors, settings = load_model(run / "model.safetensors")
    model = _build(settings)
    model.load_state_dict(tensors)
    return model.eval(), settings


def _check_fits(settings: Mapping[str, Any], graphs: Dataset, name: str) -> None:
    sizes = graphs.num_node_features, graphs.num_classes
    wanted = settings["in_channels"], settings["num_classes"]
    if sizes != wanted:
        raise ValueError(
            f"--data {name} has {sizes[0]} features and {sizes[1]} classes, the model {wanted[0]} and {wanted[1]}"
        )


def _predict(model: Any, method: str) -> Callable[[Batch], torch.Tensor]:
    return model.predict if method in ("cal", "infoigl") else model  # type: ignore[no-any-return]


def _accuracy(model: Any, method: str, graphs: Dataset, device: str) -> float:
    from torch_geometric.loader import DataLoader

    from graph_ood.training import evaluate as accuracy

    return accuracy(_predict(model.to(device), method), DataLoader(graphs, _EVAL_BATCH), device=device)


def _majority(graphs: Dataset) -> float:
    """Return the share of the largest class: what a constant prediction would get."""
    import torch

    y = torch.tensor([int(graph.y) for graph in graphs])
    return float(y.bincount().max()) / len(y)


def _masks(model: Any, method: str, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the causal scores of nodes and edges."""
    if method == "aia":
        masks = model.augment(batch, "stable")
        return masks.node, masks.edge
    out = model(batch)
    return out["node_att"], out["edge_att"]


def _explained(
    model: Any, settings: Mapping[str, Any], found: Dataset, numbers: tuple[int, ...], device: str
) -> tuple[list[Any], list[str]]:
    """Return explanations and titles of some graphs."""
    import torch
    from torch_geometric.data import Batch

    from graph_ood.explain import explanations

    method = settings["method"]
    batch = Batch.from_data_list([found[number] for number in numbers]).to(device)
    model.to(device)
    with torch.no_grad():
        node, edge = _masks(model, method, batch)
        predicted = _predict(model, method)(batch).argmax(1).tolist()
    titles = [
        f"graph {number}: class {y}, predicted {p}"
        for number, y, p in zip(numbers, batch.y.tolist(), predicted, strict=True)
    ]
    return explanations(batch, node_mask=node, edge_mask=edge), titles


def _mask_areas(model: Any, settings: Mapping[str, Any], found: Dataset, device: str) -> dict[str, Any]:
    """Return the mean areas under the ROC curves over the graphs with a true motif; nothing where there is none."""
    import torch
    from torch_geometric.loader import DataLoader

    from graph_ood.explain import mask_auc

    if "node_gt" not in found[0]:
        return {"node_auc": None, "edge_auc": None}
    parts: dict[str, list[torch.Tensor]] = {
        name: [] for name in ("node", "node_gt", "of_node", "edge", "edge_gt", "of_edge")
    }
    first = 0
    with torch.no_grad():
        for batch in DataLoader(found, _EVAL_BATCH):
            moved = batch.to(device)
            node, edge = _masks(model, settings["method"], moved)
            index = moved.batch + first
            columns = (node, moved.node_gt, index, edge, moved.edge_gt, index[moved.edge_index[0]])
            for values, column in zip(parts.values(), columns, strict=True):
                values.append(column.cpu())
            first += moved.num_graphs
    whole = {name: torch.cat(values) for name, values in parts.items()}
    return {
        "node_auc": mask_auc(whole["node"], whole["node_gt"], whole["of_node"]),
        "edge_auc": mask_auc(whole["edge"], whole["edge_gt"], whole["of_edge"]),
    }
