"""The state of a loss in a checkpoint, and how a loss is named and chosen in a trainer's arguments.

Shared by the trainers; needs torch and safetensors alone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pref_opt.losses import _BUILT_IN

if TYPE_CHECKING:
    from pref_opt.losses import PreferenceLoss

__all__ = ["load_loss_state", "method_name", "method_options", "save_loss_state"]

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
