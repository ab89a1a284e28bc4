"""What the two trainers share: how a loss is chosen, its state in checkpoints, and checks of batches and completions.

Hosts: safetensors and transformers.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from pref_opt.losses import _BUILT_IN, PreferenceLoss, make_loss

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import Trainer

__all__ = [
    "LossStateCallback",
    "check_batch_sizes",
    "choose_loss",
    "is_empty",
    "is_messages",
    "load_loss_state",
    "method_name",
    "method_options",
    "old_names",
    "resume_loss",
    "save_loss_state",
]

STATE_FILE = "preference_loss.safetensors"


def save_loss_state(loss: PreferenceLoss, folder: str | os.PathLike[str]) -> Path:
    """Write the state of a loss to `preference_loss.safetensors` in `folder`, all of it or nothing.

    Tensors are stored as tensors; plain numbers and the name of the method are JSON in the metadata of the file.

    Args:
        loss: Loss object.
        folder: An existing folder, usually `checkpoint-N`.

    Returns:
        Path of the file.

    Raises:
        ValueError: If the state holds something else than tensors, numbers, strings and None.

    Examples:
        >>> import tempfile
        >>> from pref_opt.losses import make_loss
        >>> from pref_opt.trl import load_loss_state, save_loss_state
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_loss_state(make_loss("dpo"), folder)
        ...     load_loss_state(make_loss("dpo"), folder)
        >>> path.name
        'preference_loss.safetensors'
    """
    tensors, plain = {}, {}
    for name, value in loss.state_dict().items():
        if isinstance(value, Tensor):
            tensors[name] = value.detach().cpu().clone().contiguous()
        elif value is None or isinstance(value, (bool, int, float, str)):
            plain[name] = value
        else:
            raise ValueError(f"state {name!r} of a loss must be a tensor or a plain number, got {type(value).__name__}")
    path = Path(folder) / STATE_FILE
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, unfinished, metadata={"method": method_name(loss), "numbers": json.dumps(plain)})
        with unfinished.open("rb") as written:
            os.fsync(written.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def load_loss_state(loss: PreferenceLoss, folder: str | os.PathLike[str]) -> None:
    """Restore the state of a loss from what `save_loss_state` wrote.

    Args:
        loss: Loss object of the same method; it is changed.
        folder: Folder of the checkpoint.

    Raises:
        ValueError: If the file is missing although the loss has a state, or another method wrote it.

    Examples:
        See `save_loss_state`.
    """
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        if not loss.state_dict():
            return
        raise ValueError(f"{path} is missing: the checkpoint must hold the state of method {method_name(loss)!r}")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        state: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    if metadata.get("method") != method_name(loss):
        raise ValueError(
            f"the checkpoint {folder} was written by method {metadata.get('method')!r}, but {method_name(loss)!r} is "
            "trained; resume with the same method, or start from the checkpoint's model instead"
        )
    loss.load_state_dict(state | json.loads(metadata["numbers"]))


def method_name(loss: PreferenceLoss) -> str:
    """Return the built-in name of a loss object, or the name of its class."""
    place = f"{type(loss).__module__}:{type(loss).__qualname__}"
    return next((name for name, target in _BUILT_IN.items() if target == place), type(loss).__qualname__)


def method_options(value: Any) -> dict[str, Any]:
    """Return the hyper-parameters that a dictionary, its JSON or None stands for; raise ValueError for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"method_kwargs must be a dictionary or its JSON, got {value!r}: {error}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"method_kwargs must be a dictionary, got {value!r}")
    return value


def choose_loss(loss: PreferenceLoss | str | None, method: str, method_kwargs: Any, *, default: str) -> PreferenceLoss:
    """Return the loss that a trainer was asked for; two different answers are an error.

    Args:
        loss: The trainer's argument: an object, a name, or None for `method`.
        method: The name in its configuration, `default` where nobody has chosen one.
        method_kwargs: Hyper-parameters in its configuration.
        default: Name that configurations start with.

    Raises:
        ValueError: If `loss` and the configuration name different losses, or a hyper-parameter isn't accepted.
    """
    options = method_options(method_kwargs)
    if not isinstance(loss, PreferenceLoss):
        if loss is not None and method not in (default, loss):
            raise ValueError(f"loss must be args.method if both are given, got {loss!r} and {method!r}")
        return make_loss(loss or method, **options)
    if options or method not in (default, method_name(loss)):
        raise ValueError(
            f"loss must not be an object where args name another: got {method_name(loss)!r} beside "
            f"method={method!r}, method_kwargs={options!r}"
        )
    return loss


def resume_loss(loss: PreferenceLoss, resume_from_checkpoint: str | bool | None, output_dir: str | None) -> None:
    """Restore the state of a loss from what `Trainer.train` was asked to resume from, if anything."""
    folder = resume_from_checkpoint
    if folder is True:
        folder = get_last_checkpoint(output_dir)  # type: ignore[no-untyped-call]
    if folder:
        load_loss_state(loss, folder)


class LossStateCallback(TrainerCallback):
    """Writes the state of the loss into each checkpoint, from the process that writes the rest of it."""

    def __init__(self, loss: PreferenceLoss) -> None:
        self.loss = loss

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save:
            save_loss_state(self.loss, Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def check_batch_sizes(trainer: Trainer, loss: PreferenceLoss) -> None:
    """Raise ValueError where a batch would have fewer rows than the loss needs.

    A batch is the micro-batch of all processes, or the optimiser step where the loss looks at it as a whole. With several
    processes accelerate fills the last one of an epoch up.
    """
    args, processes = trainer.args, trainer.accelerator.num_processes
    size = args.per_device_train_batch_size * processes
    size *= args.gradient_accumulation_steps if loss.wants_window else 1
    why = f"method {method_name(loss)!r} compares the rows of a batch with each other and needs at least {loss.least_pairs}"
    if size < loss.least_pairs:
        hint = "" if loss.wants_window else "; rows of other micro-batches of gradient accumulation are not seen"
        raise ValueError(f"{why}: raise per_device_train_batch_size, got {size} on {processes} process{hint}")
    dataset: Any = trainer.train_dataset
    if processes > 1 or args.dataloader_drop_last or not hasattr(dataset, "__len__"):
        return
    last = len(dataset) % size
    if last == 0 or last >= loss.least_pairs:
        return
    steps = math.ceil(math.ceil(len(dataset) / args.per_device_train_batch_size) / args.gradient_accumulation_steps)
    planned = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps)
    if planned >= steps:
        raise ValueError(
            f"{why}, but the last batch of an epoch has {last} of the {len(dataset)} rows of train_dataset: set "
            "dataloader_drop_last=True, or change per_device_train_batch_size"
        )


def is_messages(value: Any) -> bool:
    """Return whether a value is a list of messages."""
    return isinstance(value, list) and all(isinstance(message, dict) and "content" in message for message in value)


def is_empty(value: Any) -> bool:
    """Return whether there's no text in a string, and neither text nor a call of a tool in the last of some messages."""
    if is_messages(value):
        return not value or not (value[-1]["content"] or value[-1].get("tool_calls"))
    return not value


@contextlib.contextmanager
def old_names() -> Iterator[None]:
    """Be silent about names that TRL and PEFT use and transformers has changed; nobody who calls them can change that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
        yield
