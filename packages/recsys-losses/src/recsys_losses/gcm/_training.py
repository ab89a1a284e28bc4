"""Training of GCM with honest selection and exact resume, and its files."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Literal

import torch

from recsys_losses._checks import check_choice, check_positive
from recsys_losses._epochs import EpochRun, EpochsResult
from recsys_losses._storage import read_tensors, write_tensors
from recsys_losses.gcm._data import METRICS, ContextDataset, Samples
from recsys_losses.gcm._model import GCM

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Sequence

    from torch.optim import Optimizer

    from recsys_losses.sampling import UniformNegativeSampler

SelectOn = Literal["valid", "test", "none"]

_CHECKPOINT = "recsys_losses gcm checkpoint"
_MODEL = "recsys_losses gcm model"
_SELECT_ON = ("valid", "test", "none")


def fit_gcm(
    model: GCM,
    data: ContextDataset,
    *,
    epochs: int = 300,
    batch_size: int = 2048,
    lr: float = 1e-3,
    num_negatives: int = 4,
    eval_every: int = 1,
    patience: int | None = 50,
    monitor: str = "hr@10+ndcg@10",
    select_on: SelectOn = "valid",
    ks: Sequence[int] = (10, 50),
    mask_target: bool = True,
    seed: int = 0,
    device: torch.device | str = "cpu",
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = True,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> EpochsResult:
    r"""Train a model in place and leave it with the parameters of the best epoch.

    An epoch goes through the samples of `ContextDataset.sample_epoch` in batches; a step minimises the summed loss of a
    batch by Adam. The whole graph is propagated in every step.

    Args:
        model: What is trained; its graph is replaced by that of the interactions that are trained on.
        data: Interactions; only `train` is learned from.
        epochs: Passes over the samples, at most.
        batch_size: Samples (not interactions) per step.
        lr: Learning rate.
        num_negatives: Negatives per interaction.
        eval_every: Epochs between two evaluations.
        patience: Evaluations without improvement after which training stops; None never stops early.
        monitor: Metric that chooses the epoch, or several joined by `+`, whose sum does; cut-offs must be among `ks`.
        select_on: `"valid"`: choose the epoch on `data.valid`; where that is None, the last train interaction of every
            user is held out, and neither trained on nor in the graph. `"test"`: choose it on the test interactions, as
            the authors do, with a warning. `"none"`: train `epochs` epochs without evaluation and keep the last.
        ks: Cut-offs.
        mask_target: As in `ContextDataset.leave_one_out_metrics`.
        seed: Seed of negatives and shuffling; the model has its own.
        device: Torch device.
        checkpoint: safetensors file that is replaced after every epoch; None writes none.
        resume: Continue from `checkpoint` where it exists; False starts over.
        on_epoch: Called with the record of every finished epoch.

    Returns:
        The history (`loss` is the mean cross-entropy of a sample) and what was selected.

    Raises:
        ValueError: If an argument is out of range or unknown, the data or the checkpoint doesn't fit, or there is
            nothing to select on.
        RuntimeError: If the loss isn't finite.

    Reference: Wu et al., 2020, and the authors' code, with selection on validation interactions instead of test ones.

    Examples:
        >>> from recsys_losses.gcm import make_context_data
        >>> made = make_context_data(num_users=20, num_items=30, num_interactions=200)
        >>> result = fit_gcm(GCM.from_dataset(made.data, embed_dim=8, seed=0), made.data, epochs=2, ks=(10,))
        >>> len(result.history), sorted(result.best)
        (2, ['hr@10', 'hr@10+ndcg@10', 'mrr@10', 'ndcg@10'])
    """
    _check_arguments(model, data, epochs, batch_size, lr, eval_every, patience, monitor, select_on, ks)
    device = torch.device(device)
    settings = {
        "model": model.options(),
        "data": data.digest(),
        "batch_size": batch_size,
        "lr": lr,
        "num_negatives": num_negatives,
        "eval_every": eval_every,
        "patience": patience,
        "monitor": monitor,
        "select_on": select_on,
        "ks": list(ks),
        "mask_target": mask_target,
        "seed": seed,
    }
    data = _selection(data, select_on).to(device)
    model.to(device)
    model.replace_interactions(*data.train)
    generator = torch.Generator(device).manual_seed(seed)
    # The fused step is one pass over the tables, several times faster than the default on the CPU.
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=device.type in ("cpu", "cuda") or None)
    run = EpochRun(_CHECKPOINT, model, optimizer, generator, settings=settings)
    run.load_if_there(checkpoint, resume=resume)
    sampler = data.sampler(generator)

    def train(epoch: int) -> dict[str, float]:
        return {"loss": _train_epoch(model, data, optimizer, sampler, batch_size, num_negatives, generator)}

    def evaluate() -> dict[str, float]:
        split = "test" if select_on == "test" else "valid"
        metrics = data.leave_one_out_metrics(model.score_all, split=split, ks=ks, mask_target=mask_target)
        return {**metrics, monitor: sum(metrics[name] for name in monitor.split("+"))}

    return run.run(
        epochs,
        train,
        None if select_on == "none" else evaluate,
        monitor=monitor,
        eval_every=eval_every,
        patience=patience,
        checkpoint=checkpoint,
        on_epoch=on_epoch,
    )


def _train_epoch(
    model: GCM,
    data: ContextDataset,
    optimizer: Optimizer,
    sampler: UniformNegativeSampler,
    batch_size: int,
    num_negatives: int,
    generator: torch.Generator,
) -> float:
    samples = data.sample_epoch(num_negatives, generator, sampler=sampler)
    total = torch.zeros((), dtype=torch.float64, device=samples.users.device)
    for batch in _batches(samples, batch_size):
        optimizer.zero_grad(set_to_none=True)
        step = model.loss(batch.users, batch.items, batch.contexts, batch.labels)
        step.loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += step.bce.detach()
    return float(total) / len(samples.users)


def _batches(samples: Samples, batch_size: int) -> Iterator[Samples]:
    for parts in zip(*(torch.split(column, batch_size) for column in samples), strict=True):
        yield Samples(*parts)


def save_gcm(model: GCM, path: str | os.PathLike[str]) -> None:
    """Write a model with its features, contexts and graph to a safetensors file.

    Args:
        model: The model.
        path: File to write or to replace.

    Examples:
        >>> import pathlib, tempfile
        >>> from recsys_losses.gcm import make_context_data
        >>> data = make_context_data(num_users=20, num_items=30, num_interactions=200).data
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "gcm.safetensors"
        ...     save_gcm(GCM.from_dataset(data, embed_dim=8), path)
        ...     load_gcm(path).embed_dim
        8
    """
    tensors = {f"parameter.{name}": value for name, value in model.state_dict().items()}
    tensors["train"] = torch.stack([model.graph.users, model.graph.items, model.graph.contexts])
    for name in ("user_features", "item_features", "context_features"):
        if getattr(model, name) is not None:
            tensors[name] = getattr(model, name)
    sizes = [model.num_users, model.num_items, model.num_graph_items]
    write_tensors(path, tensors, {"kind": _MODEL, "version": 1, "sizes": sizes, "options": model.options()})


def load_gcm(
    path: str | os.PathLike[str], data: ContextDataset | None = None, *, device: torch.device | str = "cpu"
) -> GCM:
    """Read a model that `save_gcm` wrote.

    Args:
        path: The file.
        data: Data that the model has to fit, for a check of sizes and contexts; None checks nothing.
        device: Where to put the model.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or holds something else, or doesn't fit `data`.
    """
    tensors, metadata = read_tensors(path, _MODEL)
    parameters = {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith("parameter.")}
    num_users, num_items, num_graph_items = metadata["sizes"]
    train_users, train_items, train_contexts = tensors["train"]
    model = GCM(
        num_users,
        num_items,
        num_graph_items,
        tensors.get("user_features"),
        tensors.get("item_features"),
        tensors["context_features"],
        train_users,
        train_items,
        train_contexts,
        **metadata["options"],
    )
    model.to(parameters["user_embedding"].dtype).load_state_dict(parameters)
    if data is not None:
        _check_fit(model, data)
    return model.to(device)


def _selection(data: ContextDataset, select_on: str) -> ContextDataset:
    """Return the data with what the epoch is selected on."""
    if select_on == "test":
        warnings.warn(
            "select_on='test' chooses the epoch on data.test: metrics on the same interactions are optimistic and not "
            "comparable with those of a run that selects on validation interactions (test-set leak)",
            UserWarning,
            stacklevel=3,
        )
        return data
    if select_on == "none":
        return data
    if data.valid is None:
        data = data.hold_out_last()
    if data.valid is None or data.valid.shape[1] == 0:
        raise ValueError("there are no validation interactions to select on: no user has two train interactions")
    return data


def _check_fit(model: GCM, data: ContextDataset) -> None:
    ours = (model.num_users, model.num_items, model.num_graph_items)
    theirs = (data.num_users, data.num_items, data.num_graph_items)
    if ours != theirs:
        raise ValueError(f"the model has {ours} users, items and graph items, the data {theirs}")
    if not torch.equal(model.context_features.cpu(), data.context_features.cpu()):
        raise ValueError("the model's contexts are numbered otherwise than those of the data")


def _check_arguments(
    model: GCM,
    data: ContextDataset,
    epochs: int,
    batch_size: int,
    lr: float,
    eval_every: int,
    patience: int | None,
    monitor: str,
    select_on: str,
    ks: Sequence[int],
) -> None:
    _check_fit(model, data)
    for name, value in (
        ("epochs", epochs),
        ("batch_size", batch_size),
        ("eval_every", eval_every),
        ("patience", patience),
    ):
        if value is not None and not value >= 1:
            raise ValueError(f"{name} must be >= 1, got {value!r}")
    check_positive("lr", lr)
    check_choice("select_on", select_on, _SELECT_ON)
    if data.train.shape[1] == 0:
        raise ValueError("data.train is empty: there is nothing to train on")
    if select_on == "none":
        return
    data.check_cutoffs(ks)
    for part in monitor.split("+"):
        metric, _, cutoff = part.partition("@")
        check_choice("monitor", metric, METRICS)
        if cutoff not in {str(k) for k in ks}:
            raise ValueError(f"monitor={monitor!r} needs its cut-offs among ks={tuple(ks)}")
