"""The controller: keeps the masked tensors of a model sparse while any optimiser trains it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

import torch

from recsys_losses._checks import check_choice
from recsys_losses.dsl._compress import to_csr
from recsys_losses.dsl._masks import (
    as_mask,
    check_count,
    check_density,
    check_ratio,
    cosine_update_ratio,
    gradient_grow,
    magnitude_masks,
    magnitude_prune,
    random_grow,
    random_mask,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

Prune = Literal["magnitude"]
Growth = Literal["gradient", "random"]
Init = Literal["uniform", "exact", "magnitude"]

PRUNES = ("magnitude",)
GROWTHS = ("gradient", "random")
INITS = ("uniform", "exact", "magnitude")


class DSLController:
    r"""Trains a model that is sparse from the first step, with a constant number of non-zeros per tensor.

    After every optimiser step the masked tensors are multiplied by their masks; after every $\Delta T$-th step each mask
    is updated as in `dsl_update_mask`, with the gradient of that step and $r_t$ of `cosine_update_ratio`. Gradients stay
    dense, as growth needs those of inactive positions, and the optimiser's own state is left alone, except that SGD's
    momentum is masked.

    Call `step` in place of `optimizer.step`, or `attach` once and leave the training loop as it is. Build the controller
    after the model is on its device. Between steps nothing waits for the device; a mask update does.

    Args:
        module: The model; its weights are masked at once.
        optimizer: Any torch optimiser over (at least) the masked parameters.
        density: $\rho$ in (0, 1], the share of non-zeros at the start and from then on.
        total_steps: $T\ge1$, the optimiser steps of the whole training; no update comes after it.
        update_interval: $\Delta T\ge1$, steps between two updates; the paper's range is 2,000 to 20,000.
        initial_ratio: $r_0$ in [0, 1]; the paper's range is 0.3 to 0.5. With both ratios 0 the mask is static.
        minimum_ratio: $r_{\min}$ in [0, 1].
        prune: `"magnitude"`.
        growth: `"gradient"`, or `"random"`: as many inactive positions at random.
        init: `"uniform"`: every element is active with probability $\rho$; `"exact"`: exactly `round(density * n)` of
            each tensor; `"magnitude"`: the largest weights of all tensors together.
        select: Says by name and parameter which tensors are masked; None masks those of two or more dimensions.
        reset_new_state: Zero the optimiser's state of newly active positions, which has collected gradients of the time
            when they were inactive.
        stop_fraction: Share of $T$ in [0, 1] after which the masks stay; 0 keeps the initial mask for good.
        accumulate_grad: Grow by the sum of the gradients since the last update instead of the last one; needs memory of
            the size of the masked tensors.
        generator: Source of the initial masks and of random growth; None uses torch's default generator, which
            `state_dict` doesn't hold.
        masks: Initial masks by parameter name, bool or 0/1, copied; given, they name the masked tensors, and `density`,
            `init` and `select` aren't used.

    Raises:
        ValueError: If an argument is out of range or unknown, no parameter is selected, a mask doesn't fit or has no
            active position, or a masked parameter isn't the optimiser's.

    Reference: Wang et al., 2024; the authors' class `Masking`.

    Examples:
        >>> import torch
        >>> model = torch.nn.Embedding(100, 8)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> controller = DSLController(model, optimizer, 0.25, total_steps=10, update_interval=5, init="exact").attach()
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     model(torch.arange(100)).square().sum().backward()
        ...     optimizer.step()
        >>> controller.density(), float((model.weight != 0).float().mean()) <= 0.25
        (0.25, True)
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        density: float = 0.5,
        *,
        total_steps: int,
        update_interval: int,
        initial_ratio: float = 0.5,
        minimum_ratio: float = 0.005,
        prune: Prune = "magnitude",
        growth: Growth = "gradient",
        init: Init = "uniform",
        select: Callable[[str, nn.Parameter], bool] | None = None,
        reset_new_state: bool = False,
        stop_fraction: float = 1.0,
        accumulate_grad: bool = False,
        generator: torch.Generator | None = None,
        masks: Mapping[str, Tensor] | None = None,
    ) -> None:
        check_density(density)
        check_count("total_steps", total_steps)
        check_count("update_interval", update_interval)
        check_ratio("initial_ratio", initial_ratio)
        check_ratio("minimum_ratio", minimum_ratio)
        check_ratio("stop_fraction", stop_fraction)
        check_choice("prune", prune, PRUNES)
        check_choice("growth", growth, GROWTHS)
        check_choice("init", init, INITS)
        self.optimizer = optimizer
        self.total_steps, self.update_interval = total_steps, update_interval
        self.initial_ratio, self.minimum_ratio = initial_ratio, minimum_ratio
        self.growth, self.reset_new_state, self.generator = growth, reset_new_state, generator
        self.steps = 0
        self._last_update = int(stop_fraction * total_steps)
        self._handle: RemovableHandle | None = None
        self._removed = False
        self._parameters = _masked_parameters(module, optimizer, select, masks)
        self._masks = self._initial_masks(density, init, masks)
        self._explored = {name: mask.clone() for name, mask in self._masks.items()}
        self._sums = (
            {name: torch.zeros_like(parameter) for name, parameter in self._parameters.items()}
            if accumulate_grad
            else {}
        )
        self._apply_masks()

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks by parameter name, bool; updates change these tensors in place."""
        return dict(self._masks)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take the optimiser's step, mask the weights, and at every `update_interval`-th step move the masks.

        Args:
            closure: Passed on to the optimiser.

        Returns:
            What the optimiser returns.

        Raises:
            RuntimeError: If a masked parameter has no gradient at an update, or the controller was removed.
        """
        if self._removed:
            raise RuntimeError("the controller was removed; its masks are no longer kept")
        result = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        if self._handle is None:
            self._after_step()
        return result

    def attach(self) -> Self:
        """Act after every `optimizer.step()` from now on, whoever calls it.

        Returns:
            The controller.

        Raises:
            RuntimeError: If it is attached already or was removed.
        """
        if self._removed or self._handle is not None:
            raise RuntimeError("the controller was removed" if self._removed else "the controller is attached already")
        self._handle = self.optimizer.register_step_post_hook(lambda *_: self._after_step())
        return self

    def remove(self) -> None:
        """Leave optimiser and model: weights keep their values, and further training makes them dense."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._removed = True

    def density(self) -> float:
        """Return the share of active positions of all masked tensors."""
        return _share(self._masks)

    def explored_fraction(self) -> float:
        """Return the share of positions that were active at the start or after any update."""
        return _share(self._explored)

    def compress(self) -> dict[str, Tensor]:
        """Copy the non-zeros of the masked tensors into sparse CSR tensors, by name; see `to_csr`.

        Active positions whose value is exactly 0, such as those of the last update, aren't stored.
        """
        return {name: to_csr(parameter) for name, parameter in self._parameters.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of all that the rest of a training depends on, beside model and optimiser."""
        parts = {"mask": self._masks, "explored": self._explored, "gradient": self._sums}
        state = {f"{part}.{name}": value.clone() for part, values in parts.items() for name, value in values.items()}
        state["steps"] = torch.tensor(self.steps)
        if self.generator is not None:
            state["generator"] = self.generator.get_state()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` returned, and mask the weights anew.

        Args:
            state_dict: State of a controller with the same masked tensors and options.

        Raises:
            ValueError: If entries are missing or unknown, or have other shapes.
        """
        own = self.state_dict()
        differing = own.keys() ^ state_dict.keys()
        if differing:
            raise ValueError(f"the state fits another controller; missing or unknown: {', '.join(sorted(differing))}")
        for key, value in own.items():
            if value.shape != state_dict[key].shape:
                shapes = f"{tuple(value.shape)}, got {tuple(state_dict[key].shape)}"
                raise ValueError(f"the state fits another controller; expected {key} {shapes}")
        for part, values in (("mask", self._masks), ("explored", self._explored), ("gradient", self._sums)):
            for name, value in values.items():
                value.copy_(state_dict[f"{part}.{name}"])
        self.steps = int(state_dict["steps"])
        if self.generator is not None:
            self.generator.set_state(state_dict["generator"].cpu())
        self._apply_masks()

    def _initial_masks(self, density: float, init: Init, masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        if masks is not None:
            made = {name: as_mask(mask, self._parameters[name].shape) for name, mask in masks.items()}
        elif init == "magnitude":
            made = magnitude_masks(self._parameters, density)
        else:
            made = {
                name: random_mask(parameter.shape, density, exact=init == "exact", generator=self.generator)
                for name, parameter in self._parameters.items()
            }
        for name, mask in made.items():
            if not bool(mask.any()):
                raise ValueError(f"the mask of {name!r} has no active position; a larger density is needed")
        return {
            name: mask.to(self._parameters[name].device).clone(memory_format=torch.contiguous_format)
            for name, mask in made.items()
        }

    @torch.no_grad()
    def _after_step(self) -> None:
        self.steps += 1
        for name, total in self._sums.items():
            gradient = self._parameters[name].grad
            if gradient is not None:
                total.add_(gradient)
        self._apply_masks()
        if self.steps % self.update_interval == 0 and self.steps <= self._last_update:
            ratio = cosine_update_ratio(self.steps, self.total_steps, self.initial_ratio, self.minimum_ratio)
            gradients = self._gradients()
            for name, parameter in self._parameters.items():
                self._update(name, parameter, gradients[name], ratio)
            self._apply_masks()

    def _gradients(self) -> dict[str, Tensor]:
        """Return what growth goes by, for all tensors before any is changed."""
        gradients = {}
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                raise RuntimeError(f"parameter {name!r} has no gradient at step {self.steps}, an update of its mask")
            gradients[name] = self._sums.get(name, parameter.grad)
        return gradients

    def _update(self, name: str, parameter: nn.Parameter, gradient: Tensor, ratio: float) -> None:
        mask = self._masks[name]
        kept, num_pruned = magnitude_prune(parameter, mask, ratio)
        if self.growth == "random":
            new = random_grow(kept, num_pruned, self.generator)
        else:
            new = gradient_grow(gradient, kept, num_pruned)
        if name in self._sums:
            self._sums[name].zero_()
        if self.reset_new_state:
            self._forget(parameter, new & ~mask)
        mask.copy_(new)
        self._explored[name] |= new

    def _forget(self, parameter: nn.Parameter, positions: Tensor) -> None:
        for value in self.optimizer.state[parameter].values():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                value.masked_fill_(positions, 0)

    @torch.no_grad()
    def _apply_masks(self) -> None:
        for name, parameter in self._parameters.items():
            # Seen as bytes the mask is multiplied several times faster than as bool.
            mask = self._masks[name].view(torch.uint8)
            parameter.mul_(mask)
            momentum = self.optimizer.state.get(parameter, {}).get("momentum_buffer")
            if momentum is not None:
                momentum.mul_(mask)


def _masked_parameters(
    module: nn.Module,
    optimizer: Optimizer,
    select: Callable[[str, nn.Parameter], bool] | None,
    masks: Mapping[str, Tensor] | None,
) -> dict[str, nn.Parameter]:
    parameters = dict(module.named_parameters())
    if masks is not None:
        unknown = masks.keys() - parameters.keys()
        if unknown:
            raise ValueError(f"masks for unknown parameters: {', '.join(sorted(unknown))}")
        chosen = {name: parameters[name] for name in masks}
    elif select is None:
        chosen = {name: parameter for name, parameter in parameters.items() if parameter.ndim >= 2}
    else:
        chosen = {name: parameter for name, parameter in parameters.items() if select(name, parameter)}
    if not chosen:
        raise ValueError(f"no parameter is masked; the module has {', '.join(parameters) or 'none'}")
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    absent = [name for name, parameter in chosen.items() if id(parameter) not in trained]
    if absent:
        raise ValueError(f"the optimizer doesn't train the masked parameters {', '.join(absent)}")
    return chosen


def _share(masks: Mapping[str, Tensor]) -> float:
    active = sum(int(mask.count_nonzero()) for mask in masks.values())
    return active / sum(mask.numel() for mask in masks.values())
