"""What a trainer and a loss object say to each other, and the names of the loss objects.

A loss object is called once per micro-batch with the log-probabilities of its sequences. What it keeps between calls (moving
statistics, queues, counters) is its state: it changes in training only, is the same on every process, and is saved with the
checkpoints.
"""

from __future__ import annotations

import importlib
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pref_opt._checks import check_choice

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

__all__ = [
    "Logps",
    "LossContext",
    "LossOutput",
    "PreferenceLoss",
    "loss_names",
    "make_loss",
    "register_loss",
]


@dataclass(frozen=True)
class Logps:
    """Log-probabilities of the completions of one micro-batch of one process, in nats.

    They are sums over completion tokens, or means where the loss object says `length_normalized`.

    Attributes:
        chosen: Preferred completions [B], with gradient.
        rejected: Other completions [B], or [B, K] for losses with K negatives, with gradient.
        ref_chosen: Under the frozen reference [B]; None where the loss needs no reference.
        ref_rejected: Under the frozen reference, in the shape of `rejected`.
        chosen_lengths: Completion tokens [B]; None where the caller doesn't know them.
        rejected_lengths: Completion tokens, in the shape of `rejected`.
        features: Further columns of the data, such as user vectors [B, d], scores [B, K] and ids [B].
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None
    features: Mapping[str, Tensor] = field(default_factory=dict)


def _alone(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True)
class LossContext:
    """Where and when a loss is computed.

    Attributes:
        training: False in evaluation: no state changes, nothing is filtered, nothing is gathered.
        gather: Concatenate detached tensors of equal shapes along the first dimension, in the order of the processes.
        world_size: Number of processes.
        process_index: Which of them this is.
    """

    training: bool = True
    gather: Callable[[Tensor], Tensor] = _alone
    world_size: int = 1
    process_index: int = 0


@dataclass
class LossOutput:
    """What a loss object returns.

    Attributes:
        loss: Scalar in float32 or wider, with gradient. Its gradient averaged over processes is that of the global batch.
        chosen_rewards: Implicit rewards of the preferred completions [B], detached, for logs.
        rejected_rewards: The same of the others, [B] or [B, K].
        metrics: Further detached scalars for logs.
    """

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class PreferenceLoss:
    """A preference loss with its hyper-parameters and its state; subclasses say what they need and compute.

    Attributes:
        requires_reference: Whether log-probabilities under a frozen reference are needed.
        length_normalized: Whether log-probabilities are means over completion tokens and not sums.
        multi_negative: Whether `rejected` is [B, K] and not [B].
        couples_pairs: Whether the pairs of a batch are tied to each other, so that the global batch counts.
        least_pairs: Fewest pairs that a global batch, or an optimiser step where `wants_window`, may have.
    """

    requires_reference: bool = True
    length_normalized: bool = False
    multi_negative: ClassVar[bool] = False
    couples_pairs: ClassVar[bool] = False
    least_pairs: ClassVar[int] = 1

    def __call__(self, logps: Logps, context: LossContext) -> LossOutput:
        """Compute the loss of one micro-batch; state changes only where `context.training`."""
        raise NotImplementedError

    def prepare_window(self, window: Sequence[Logps], context: LossContext) -> None:
        """Look at all micro-batches of an optimiser step before the first is computed.

        Losses that offer one statistic per optimiser step override this; a trainer calls it only where
        `wants_window` is true. The log-probabilities carry no gradient.
        """

    @property
    def wants_window(self) -> bool:
        """Whether `prepare_window` has to be called before each optimiser step."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and plain numbers, by name."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; raises ValueError where the names differ."""
        expected = set(self.state_dict())
        if set(state) != expected:
            raise ValueError(
                f"state of {type(self).__name__} must have {sorted(expected)}, got {sorted(state)}; "
                "it was written by another method"
            )


Share = TypeVar("Share")


class PlannedLoss(PreferenceLoss, Generic[Share]):
    """A loss that looks at detached values of all pairs of a batch, or of an optimiser step, before it computes any.

    Subclasses say what the values are and make of them a plan: one share per micro-batch, which its loss is computed with.

    Args:
        step_option: The hyper-parameter that asks for plans of a whole optimiser step, for messages; None for plans of one
            micro-batch at a time.
    """

    def __init__(self, step_option: str | None = None) -> None:
        self._step_option = step_option
        self._pending: deque[tuple[int, Share]] = deque()

    @property
    def wants_window(self) -> bool:
        """Whether plans are those of an optimiser step."""
        return self._step_option is not None

    def _values(self, logps: Logps) -> Tensor:
        """Return what a plan is made of [B], with or without gradient."""
        raise NotImplementedError

    def _plan(self, values: list[Tensor], context: LossContext) -> list[Share]:
        """Return the shares of micro-batches; what moves with training moves here."""
        raise NotImplementedError

    def prepare_window(self, window: Sequence[Logps], context: LossContext) -> None:
        """Plan all micro-batches of an optimiser step."""
        if context.training and self.wants_window:
            values = [self._values(logps).detach() for logps in window]
            self._pending = deque(zip(map(len, values), self._plan(values, context), strict=True))

    def _planned(self, values: Tensor, context: LossContext) -> Share:
        """Return the share of a micro-batch of training, from a plan of its own or from that of its step."""
        if not self.wants_window:
            return self._plan([values], context)[0]
        if not self._pending or self._pending[0][0] != len(values):
            raise RuntimeError(
                f"{self._step_option} needs prepare_window with the micro-batches of each optimiser step, in order"
            )
        return self._pending.popleft()[1]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; raises ValueError where the names differ."""
        super().load_state_dict(state)
        self._pending.clear()


_BUILT_IN = {
    "dpo": "pref_opt.baselines:DPOLoss",
    "cdpo": "pref_opt.baselines:CDPOLoss",
    "robust_dpo": "pref_opt.baselines:RobustDPOLoss",
    "dpo_norm": "pref_opt.baselines:DPONormLoss",
    "ipo": "pref_opt.baselines:IPOLoss",
    "simpo": "pref_opt.baselines:SimPOLoss",
    "cpo": "pref_opt.baselines:CPOLoss",
    "slic": "pref_opt.baselines:SLiCLoss",
    "orpo": "pref_opt.baselines:ORPOLoss",
    "kto_pair": "pref_opt.baselines:KTOPairLoss",
    "sdpo": "pref_opt.baselines:SDPOLoss",
    "dmpo": "pref_opt.baselines:DMPOLoss",
    "mppo": "pref_opt.baselines:MPPOLoss",
    "beta_dpo": "pref_opt.beta_dpo:BetaDPOLoss",
    "dr_dpo": "pref_opt.dr_dpo:DrDPOLoss",
    "alpha_dpo": "pref_opt.alpha_dpo:AlphaDPOLoss",
    "gamma_po": "pref_opt.gamma_po:GammaPOLoss",
    "repo": "pref_opt.repo:RePOLoss",
    "repo_plus_plus": "pref_opt.repo:RePOPlusPlusLoss",
    "napo": "pref_opt.napo:NAPOLoss",
    "dynamic_po": "pref_opt.dynamic_po:DynamicPOLoss",
}
_REGISTERED: dict[str, Callable[..., PreferenceLoss]] = {}


def register_loss(name: str, factory: Callable[..., PreferenceLoss]) -> None:
    """Give a loss of your own a name that configurations and the command line accept.

    Args:
        name: New name; one of the built-in names is refused.
        factory: Class or function that takes the hyper-parameters as keywords.

    Raises:
        ValueError: If `name` is built in.
    """
    if name in _BUILT_IN:
        raise ValueError(f"name must not be that of a built-in loss, got {name!r}")
    _REGISTERED[name] = factory


def loss_names() -> tuple[str, ...]:
    """Return the names that `make_loss` accepts."""
    return (*_BUILT_IN, *_REGISTERED)


def make_loss(name: str, **options: Any) -> PreferenceLoss:
    """Return a new loss object by name.

    Args:
        name: One of `loss_names()`.
        **options: Hyper-parameters of its class.

    Returns:
        A loss object in its initial state.

    Raises:
        ValueError: If the name is unknown (the message proposes the nearest) or a hyper-parameter isn't accepted.

    Examples:
        >>> from pref_opt.losses import make_loss
        >>> make_loss("repo", gamma=0.4).requires_reference
        False
    """
    check_choice("method", name, loss_names())
    factory = _REGISTERED.get(name)
    if factory is None:
        module, _, attribute = _BUILT_IN[name].partition(":")
        factory = getattr(importlib.import_module(module), attribute)
    try:
        return factory(**options)
    except TypeError as error:
        raise ValueError(f"method {name!r} doesn't accept {options}: {error}") from error
