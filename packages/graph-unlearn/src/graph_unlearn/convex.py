r"""The check that can fail: unlearning against true retraining in weight space, where the minimum is unique.

A two-hop SGC with a single map is multinomial logistic regression on fixed features; with a quadratic term its loss is
strictly convex. Both minima, with and without the deleted part, are found by Newton's method. What an update has achieved is
then the distance that is left.

$$
R(W)=\sum_{i\in\text{train}}-\log\text{softmax}\big((S^2XW)_i\big)_{y_i}+\tfrac{l_2}2\|W\|^2,\qquad
\text{err}=\frac{\|\theta+\delta-\theta_{\text{retrained}}\|}{\|\theta-\theta_{\text{retrained}}\|}
$$

err = 1 means that nothing was unlearned, 0 that the update equals retraining. Test accuracy can't tell these apart.

Reference: J. Wu, Y. Yang, Y. Qian, Y. Sui, X. Wang, X. He, *GIF: A General Graph Unlearning Strategy via Influence
Function*, WWW 2023, arXiv:2304.02835; the network is that of F. Wu, A. Souza, T. Zhang, C. Fifty, T. Yu, K. Weinberger,
*Simplifying Graph Convolutional Networks*, ICML 2019, arXiv:1902.07153. Documentation:
`docs/papers/graph-unlearn/gif.md`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

import ihvp
from graph_unlearn._checks import check_data, check_number
from graph_unlearn.gif import UnlearnResult, unlearn
from graph_unlearn.nets import SGC
from graph_unlearn.requests import apply_request

if TYPE_CHECKING:
    from torch import Tensor
    from torch_geometric.data import Data  # type: ignore[import-untyped]

    from graph_unlearn.requests import Request

__all__ = ["ConvexCheck", "ConvexResult", "convex_model", "newton_train", "weight_error"]

NEWTON_STEPS = 50


@dataclass(frozen=True)
class ConvexResult:
    r"""How near an update came to retraining.

    Attributes:
        err: $\|\theta+\delta-\theta_{\text{retrained}}\|/\|\theta-\theta_{\text{retrained}}\|$.
        cosine: Cosine between the update and the way to the retrained weights; 0 for no update.
        distance: $\|\theta-\theta_{\text{retrained}}\|$, the way to go.
        unlearned: What `unlearn` returned; None for no update.
    """

    err: float
    cosine: float
    distance: float
    unlearned: UnlearnResult | None = None


def convex_model(data: Data) -> SGC:
    """A two-hop SGC with one map from features to classes, weights zero, in float64.

    Args:
        data: The graph, with `x` and `y`.

    Returns:
        The untrained model.

    Examples:
        >>> from graph_unlearn.data import synthetic_graph
        >>> [tuple(p.shape) for p in convex_model(synthetic_graph()).parameters()]
        [(3, 32)]
    """
    model = SGC(data.x.shape[1], int(data.y.max()) + 1, hidden=0).double()
    for weight in model.parameters():
        torch.nn.init.zeros_(weight)
    return model.to(data.y.device)


def newton_train(model: torch.nn.Module, data: Data, l2: float, *, tol: float = 1e-10) -> torch.nn.Module:
    r"""Minimise the regularised summed loss by Newton's method with conjugate gradients, in place.

    $$\theta\leftarrow\theta-t\,\big(\nabla^2R(\theta)\big)^{-1}\nabla R(\theta),\qquad\text{until }\|\nabla R(\theta)\|\le\text{tol}$$

    with $t$ halved until the loss doesn't rise.

    Args:
        model: A model whose loss is convex, in float64 (see `convex_model`).
        data: The graph, with `x` (float64), `edge_index`, `y` and `train_mask`.
        l2: $l_2>0$.
        tol: Norm of the gradient to reach, > 0.

    Returns:
        The same model.

    Raises:
        ValueError: If `l2` or `tol` isn't positive, the graph lacks something, or the gradient doesn't get that small.

    Examples:
        >>> from graph_unlearn.data import synthetic_graph
        >>> data = synthetic_graph()
        >>> data.x = data.x.double()
        >>> model = newton_train(convex_model(data), data, l2=1.0)
    """
    check_number("l2", l2, low=0, open_low=True)
    check_number("tol", tol, low=0, open_low=True)
    check_data(data)
    nodes = data.train_mask.nonzero().flatten()
    y = data.y[nodes]

    def loss(module: torch.nn.Module, x: Tensor, edge_index: Tensor) -> Tensor:
        return F.cross_entropy(module(x, edge_index)[nodes], y, reduction="sum")

    loss_fn, _ = ihvp.module_loss(model, loss, data.x, data.edge_index)
    for _ in range(NEWTON_STEPS):
        params = {name: p.detach() for name, p in model.named_parameters()}
        value, gradient = _value_and_gradient(loss_fn, params, l2)
        size = _norm(gradient)
        if size <= tol:
            return model
        operator = ihvp.make_hvp(loss_fn, params, l2=l2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ihvp.ConvergenceWarning)  # an inexact direction only costs a step
            step = ihvp.cg(operator, gradient, rtol=min(0.1, size) * 1e-3, max_iter=1000).x
        _descend(model, loss_fn, params, step, value, l2)
    raise ValueError(f"newton_train reached a gradient norm of {size:.1e}, not tol={tol:g}: is the model in float64?")


def weight_error(before: dict[str, Tensor], delta: dict[str, Tensor], retrained: dict[str, Tensor]) -> ConvexResult:
    r"""Compare an update with the way to the retrained weights.

    $$\text{err}=\frac{\|\theta+\delta-\theta_{\text{retrained}}\|}{\|\theta-\theta_{\text{retrained}}\|},\qquad
    \text{cosine}=\cos\big(\delta,\theta_{\text{retrained}}-\theta\big)$$

    Args:
        before: $\theta$, name to tensor.
        delta: $\delta$, likewise.
        retrained: $\theta_{\text{retrained}}$, likewise.

    Returns:
        Both figures; where nothing had to change, err is 0 for no update and infinite otherwise.

    Examples:
        >>> import torch
        >>> start, goal = {"w": torch.zeros(2)}, {"w": torch.tensor([2.0, 0.0])}
        >>> found = weight_error(start, {"w": torch.tensor([1.0, 0.0])}, goal)
        >>> found.err, found.cosine
        (0.5, 1.0)
    """
    way = {name: retrained[name] - p for name, p in before.items()}
    left = {name: leaf - delta[name] for name, leaf in way.items()}
    distance, size = _norm(way), _norm(delta)
    if distance == 0.0:
        return ConvexResult(0.0 if size == 0.0 else float("inf"), 0.0, 0.0)
    inner = sum(float((leaf * delta[name]).sum()) for name, leaf in way.items())
    return ConvexResult(_norm(left) / distance, inner / (distance * size) if size else 0.0, distance)


class ConvexCheck:
    """One graph, one strength of regularisation: train once, then compare any number of updates with retraining.

    Args:
        data: The graph to train on, with `x`, `edge_index`, `y` and `train_mask`. It is copied to float64.
        l2: Strength of the quadratic term, > 0.

    Raises:
        ValueError: If `l2` isn't positive or the graph lacks something.

    Examples:
        >>> import torch
        >>> from graph_unlearn.data import synthetic_graph
        >>> from graph_unlearn.requests import NodeRequest
        >>> check = ConvexCheck(synthetic_graph(), l2=1.0)
        >>> request = NodeRequest(torch.tensor([0, 1]))
        >>> check.compare(request, update=False).err
        1.0
        >>> check.compare(request, damping=0.0).err < 0.2
        True
    """

    def __init__(self, data: Data, l2: float) -> None:
        self.l2 = l2
        self.data = data.__copy__()
        self.data.x = data.x.double()
        self.model = newton_train(convex_model(self.data), self.data, l2)
        self.goals: dict[int, tuple[Request, dict[str, Tensor]]] = {}

    def retrained(self, request: Request) -> dict[str, Tensor]:
        """Weights of the true minimum without the requested part; kept for the request.

        Args:
            request: The request.

        Returns:
            Name to tensor.
        """
        if id(request) not in self.goals:
            after = apply_request(request, self.data)
            # From the old minimum: there is only one, and it is near.
            model = convex_model(after)
            model.load_state_dict(self.model.state_dict())
            newton_train(model, after, self.l2)
            self.goals[id(request)] = (request, {n: p.detach() for n, p in model.named_parameters()})
        return self.goals[id(request)][1]

    def compare(self, request: Request, *, update: bool = True, **options: Any) -> ConvexResult:
        """Unlearn a request and measure what is left of the way to the retrained weights.

        Args:
            request: The request.
            update: False compares the old weights themselves.
            **options: Of `unlearn`; its `l2` is set.

        Returns:
            The comparison.
        """
        before = {name: p.detach() for name, p in self.model.named_parameters()}
        goal = self.retrained(request)
        if not update:
            return weight_error(before, {name: torch.zeros_like(p) for name, p in before.items()}, goal)
        found = unlearn(self.model, self.data, request, l2=self.l2, **options)
        plain = weight_error(before, found.delta, goal)
        return ConvexResult(plain.err, plain.cosine, plain.distance, found)


def _value_and_gradient(loss_fn: Any, params: dict[str, Tensor], l2: float) -> tuple[float, dict[str, Tensor]]:
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    value = loss_fn(leaves)
    found = torch.autograd.grad(value, list(leaves.values()))
    gradient = {name: g + l2 * p for (name, p), g in zip(params.items(), found, strict=True)}
    return float(value.detach()) + 0.5 * l2 * _norm(params) ** 2, gradient


def _descend(
    model: torch.nn.Module, loss_fn: Any, params: dict[str, Tensor], step: dict[str, Tensor], value: float, l2: float
) -> None:
    """Move against `step`, halved until the loss doesn't rise beyond rounding."""
    factor = 1.0
    for _ in range(30):
        moved = {name: p - factor * step[name] for name, p in params.items()}
        with torch.no_grad():
            reached = float(loss_fn(moved)) + 0.5 * l2 * _norm(moved) ** 2
        if reached <= value * (1 + 1e-12):
            break
        factor *= 0.5
    model.load_state_dict(moved)


def _norm(tree: dict[str, Tensor]) -> float:
    return float(torch.stack([leaf.double().square().sum() for leaf in tree.values()]).sum().sqrt())
