r"""GIF: unlearning nodes, edges or features of a trained graph network by an influence function.

The classical influence function takes back the loss of what is deleted. In a graph the deletion also changes the losses of
the neighbours, through message passing; GIF adds that change. One linear system with the Hessian of the training loss then
gives the step to the weights that training without the deleted part would have found.

$$
b=\nabla_\theta\sum_{i\in A}\ell\big(f_G(i),y_i\big)-\nabla_\theta\sum_{i\in B}\ell\big(f_{G\setminus\Delta G}(i),y_i\big),
\qquad(H+\lambda I)\,\delta=b,\qquad\theta_{\text{new}}=\theta+\delta
$$

Reference: J. Wu, Y. Yang, Y. Qian, Y. Sui, X. Wang, X. He, *GIF: A General Graph Unlearning Strategy via Influence
Function*, WWW 2023, arXiv:2304.02835, eq. 17, 20-24. Documentation: `docs/papers/graph-unlearn/gif.md`.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch_geometric.nn import MessagePassing  # type: ignore[import-untyped]

import ihvp
from graph_unlearn._checks import check_choice, check_count, check_data, check_number
from graph_unlearn.data import Neighborhoods
from graph_unlearn.nets import two_layer_logits
from graph_unlearn.requests import (
    AffectedNodes,
    EdgeRequest,
    FeatureRequest,
    NodeRequest,
    Request,
    affected_nodes,
    apply_request,
    check_request,
    remove_edges,
    remove_nodes,
    request_nodes,
    task_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor, nn
    from torch_geometric.data import Data  # type: ignore[import-untyped]

    Forward = Callable[[Any, Tensor, Tensor], Tensor]
    Loss = Literal["nll"] | Callable[[Tensor, Tensor], Tensor]

__all__ = [
    "AffectedNodes",
    "DampingWarning",
    "EdgeRequest",
    "FeatureRequest",
    "NodeRequest",
    "Request",
    "Timings",
    "UnlearnResult",
    "UnstableStepError",
    "affected_nodes",
    "auto_damping",
    "count_layers",
    "gif_delta",
    "gif_rhs",
    "influence_masks",
    "remove_edges",
    "remove_nodes",
    "unlearn",
]

METHODS = ("gif", "if")
SOLVERS = ("cg", "neumann", "lissa", "sgd", "direct", "lanczos")
# Damping of these is relative to their scale in `ihvp`; here it is absolute everywhere.
RELATIVE = ("neumann", "lissa")
# Far below what any damping leaves undone.
CG_RTOL = 1e-3
HALVINGS = 20
RAISES = 10


class UnstableStepError(ValueError):
    """The linear system has no step that may be applied: negative curvature, or an iteration that diverged."""


class DampingWarning(UserWarning):
    """The damping, or the length of the step, is not what was asked for."""


@dataclass(frozen=True)
class Timings:
    """Seconds of the parts of `unlearn`: processor time of this process on a CPU, wall-clock time on another device.

    Attributes:
        t_setup: Checks, remaining graph, affected nodes, right-hand side.
        t_solve: The linear system, an automatic damping included.
        t_apply: Backtracking, and the new model.
        total: All of it.
    """

    t_setup: float
    t_solve: float
    t_apply: float
    total: float


@dataclass(frozen=True)
class UnlearnResult:
    r"""What `unlearn` returns.

    Attributes:
        model: A copy of the model with the new weights, in the mode of the input.
        delta: The step that was applied, name to tensor, in the structure of the trainable parameters.
        data_after: The remaining graph; a deleted node keeps its row, without edges and outside every mask.
        affected: Nodes that the request touches.
        solve: Diagnostics of the linear system. `relative_residual` is that of the damped system, `undamped_relative_residual`
            is $\|b-Hx\|/\|b\|$, the only one that compares dampings. Its `x` is the step before backtracking.
        timings: Where the time went.
        damping: $\lambda$ that was used, after `"auto"` or an increase.
        damping_increases: How often negative curvature made it larger.
        step_factor: Part of the solution that was applied, 1 without backtracking.
        rhs_norm: $\|b\|$.
        step_norm: $\|\delta\|$.
        loss_before: Mean loss of the retained sample on the remaining graph with the old weights; NaN without backtracking.
        loss_after: The same with the new weights.
    """

    model: nn.Module
    delta: dict[str, Tensor]
    data_after: Data
    affected: AffectedNodes
    solve: ihvp.SolveResult
    timings: Timings
    damping: float = 0.0
    damping_increases: int = 0
    step_factor: float = 1.0
    rhs_norm: float = 0.0
    step_norm: float = 0.0
    loss_before: float = math.nan
    loss_after: float = math.nan

    @property
    def backtracked(self) -> bool:
        """Whether the full step was refused."""
        return self.step_factor < 1.0


# --- pure functions ---------------------------------------------------------------------------------------------------


def influence_masks(
    task: Literal["node", "edge", "feature"],
    affected: AffectedNodes,
    request: Tensor,
    num_nodes: int,
    *,
    method: Literal["gif", "if"] = "gif",
) -> tuple[Tensor, Tensor]:
    """The nodes whose losses make up the right-hand side: before the request, and after it.

    GIF: influenced nodes before and after, a deleted node only before, a stripped node both. The classical influence
    function: only the nodes that the request names (the endpoints of edges).

    Args:
        task: `"node"`, `"edge"` or `"feature"`.
        affected: From `affected_nodes`.
        request: Node ids that the request names, shape `(R,)`.
        num_nodes: N.
        method: `"gif"` or `"if"`.

    Returns:
        Two bool masks of shape `(N,)`.

    Raises:
        ValueError: If `method` is unknown.

    Examples:
        >>> import torch
        >>> path = torch.tensor([[0, 1], [1, 0]])
        >>> touched = affected_nodes("node", path, torch.tensor([0]), 3, num_layers=1)
        >>> influence_masks("node", touched, torch.tensor([0]), 3)
        (tensor([ True,  True, False]), tensor([False,  True, False]))
    """
    check_choice("method", method, METHODS)
    before = torch.zeros(num_nodes, dtype=torch.bool, device=affected.influenced.device)
    if method == "gif":
        before[affected.influenced] = True
    before[request.to(before.device)] = True
    after = before.clone()
    if task == "node":
        after[affected.deleted] = False
    return before, after


def gif_rhs(forward: Forward, params: Any, data: Data, after: Data, mask_before: Tensor, mask_after: Tensor) -> Any:
    r"""Right-hand side of GIF: gradient of what goes minus gradient of what comes in its place.

    $$b=\nabla_\theta\sum_{i\in A}\ell\big(f_G(i),y_i\big)-\nabla_\theta\sum_{i\in B}\ell\big(f_{G\setminus\Delta G}(i),y_i\big)$$

    Args:
        forward: Called as `forward(params, x, edge_index)`; gives logits or log-probabilities, shape `(N, C)`.
        params: $\theta$: dicts, lists or tuples of floating tensors.
        data: The graph before, with `x`, `edge_index` and `y`.
        after: The graph after, with `x` and `edge_index`.
        mask_before: $A$, bool, shape `(N,)`; may be empty.
        mask_after: $B$, likewise.

    Returns:
        $b$ in the structure of `params`, without a graph.

    Examples:
        >>> import torch
        >>> from torch_geometric.data import Data
        >>> graph = Data(x=torch.zeros(1, 2), edge_index=torch.zeros(2, 0, dtype=torch.long), y=torch.tensor([0]))
        >>> one, none = torch.tensor([True]), torch.tensor([False])
        >>> gif_rhs(lambda bias, x, edge_index: x + bias, torch.zeros(2), graph, graph, one, none)
        tensor([-0.5000,  0.5000])
    """
    leaves, structure = tree_flatten(params)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    b = [torch.zeros_like(leaf) for leaf in leaves]
    for sign, graph, mask in ((1.0, data, mask_before), (-1.0, after, mask_after)):
        if not bool(mask.any()):
            continue
        with torch.enable_grad():
            out = forward(tree_unflatten(leaves, structure), graph.x, graph.edge_index)
            value = F.cross_entropy(out[mask], data.y[mask], reduction="sum")
        gradient = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        for leaf, g in zip(b, gradient, strict=True):
            leaf.add_(g, alpha=sign)
    return tree_unflatten([leaf.detach() for leaf in b], structure)


def gif_delta(
    weights: Sequence[Tensor],
    x: Tensor,
    edge_index: Tensor,
    x_after: Tensor,
    edge_index_after: Tensor,
    y: Tensor,
    train_mask: Tensor,
    mask_before: Tensor,
    mask_after: Tensor,
    *,
    model: Literal["gcn", "sgc"] = "gcn",
    scale: float = 500.0,
    damping: float = 0.0,
    num_iter: int = 100,
    method: Literal["gif", "if"] = "gif",
    self_loops: bool = False,
    detach_rhs: bool = True,
) -> list[Tensor]:
    r"""The update of the published program for its two-layer networks: a reference, not what `unlearn` does by default.

    $$h_0=b,\qquad h_t=b+(1-d)\,h_{t-1}-\tfrac1sHh_{t-1},\qquad\delta=h_T/s$$

    Args:
        weights: $W_1$ `(hidden, F)` and $W_2$ `(C, hidden)`, without biases.
        x: Features before, shape `(N, F)`.
        edge_index: Edges before, shape `(2, E)`.
        x_after: Features after.
        edge_index_after: Edges after.
        y: Labels, shape `(N,)`.
        train_mask: Nodes whose summed loss on the graph before makes up $H$, bool, shape `(N,)`.
        mask_before: $A$, bool, shape `(N,)`.
        mask_after: $B$; ignored for method `"if"`.
        model: `"gcn"` or `"sgc"`.
        scale: $s>0$.
        damping: $d\ge0$, relative to the scale ($\lambda=ds$).
        num_iter: $T\ge0$.
        method: `"if"` leaves out the second term of b, as the program's "IF" does.
        self_loops: Add self loops.
        detach_rhs: False repeats a slip of the program: its first product also differentiates b.

    Returns:
        The update of every weight.

    Raises:
        ValueError: If a number is out of range, or `model` or `method` is unknown.

    Examples:
        >>> import torch
        >>> w = [torch.eye(2), torch.eye(2)]
        >>> x, edges = torch.eye(2), torch.tensor([[0, 1], [1, 0]])
        >>> mask = torch.tensor([True, True])
        >>> delta = gif_delta(w, x, edges, x, edges, torch.tensor([0, 1]), mask, mask, mask)  # nothing changed
        >>> float(delta[0].abs().max())
        0.0
    """
    check_choice("method", method, METHODS)
    check_number("scale", scale, low=0, open_low=True)
    check_number("damping", damping, low=0)
    check_count("num_iter", num_iter, low=0)
    leaves = [weight.detach().requires_grad_() for weight in weights]

    def gradient(features: Tensor, edges: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        out = two_layer_logits(leaves, features, edges, model=model, self_loops=self_loops)
        return torch.autograd.grad(F.cross_entropy(out[mask], y[mask], reduction="sum"), leaves, create_graph=True)

    with torch.enable_grad():
        training = gradient(x, edge_index, train_mask)
        b = list(gradient(x, edge_index, mask_before))
        if method == "gif":
            b = [g - h for g, h in zip(b, gradient(x_after, edge_index_after, mask_after), strict=True)]
        h = b if not detach_rhs else [leaf.detach() for leaf in b]
        for _ in range(num_iter):
            inner = torch.stack([(g * leaf).sum() for g, leaf in zip(training, h, strict=True)]).sum()
            product = torch.autograd.grad(inner, leaves, retain_graph=True)
            h = [
                (fixed + (1.0 - damping) * leaf - change / scale).detach()
                for fixed, leaf, change in zip(b, h, product, strict=True)
            ]
    return [leaf.detach() / scale for leaf in h]


def auto_damping(operator: Any, params: Any, *, num_steps: int = 30, generator: torch.Generator | None = None) -> float:
    r"""A damping from the ends of the spectrum: twice the most negative curvature, and never below a small part of the largest.

    $$\lambda=2\max(-\mu_{\min},0)+10^{-5}\mu_{\max}$$

    The least damped direction is then stretched by $1/|\mu_{\min}|$ at most. Lanczos estimates err to the inside of the
    spectrum; the factor 2 allows for it.

    Args:
        operator: The Hessian, a function from a pytree to a pytree that is the same in every call.
        params: Structure of the vectors.
        num_steps: Products of the Lanczos run.
        generator: Source of its start; None means a fixed one.

    Returns:
        $\lambda>0$, or 0 for a zero operator.

    Raises:
        ValueError: If the operator is stochastic, or its products aren't finite.

    Examples:
        >>> import torch
        >>> H = torch.diag(torch.tensor([-1.0, 2.0, 10.0]))
        >>> round(auto_damping(H, torch.zeros(3)), 3)
        2.0
    """
    low, high = ihvp.extreme_eigenvalues(operator, params, num_steps=num_steps, generator=generator)
    return 2.0 * max(-low, 0.0) + 1e-5 * max(high, -low, 0.0)


def count_layers(model: nn.Module) -> int:
    """The message-passing layers of a model: its attribute `num_layers`, or else what its PyG convolutions add up to.

    Args:
        model: Any module. A convolution with an attribute `K` (SGConv, TAGConv, APPNP) counts K times.

    Returns:
        The number of layers.

    Raises:
        ValueError: If there is neither.

    Examples:
        >>> from torch_geometric.nn import SGConv
        >>> count_layers(SGConv(4, 3, K=2))
        2
    """
    told = getattr(model, "num_layers", None)
    if isinstance(told, int) and told >= 1:
        return told
    convolutions = [part for part in model.modules() if isinstance(part, MessagePassing)]
    found = sum(int(k) if isinstance(k := getattr(part, "K", 1), int) else 1 for part in convolutions)
    if found < 1:
        raise ValueError("num_layers must be given: the model has no PyG convolution and no attribute num_layers")
    return found


# --- unlearning -------------------------------------------------------------------------------------------------------


def unlearn(
    model: nn.Module,
    data: Data,
    request: Request,
    *,
    num_layers: int | None = None,
    method: Literal["gif", "if"] = "gif",
    solver: str = "cg",
    damping: float | Literal["auto"] = 10.0,
    hessian: Literal["before", "after"] = "before",
    restrict_to_train: bool = True,
    forward: Forward | None = None,
    loss: Loss = "nll",
    l2: float = 0.0,
    directed: bool = False,
    on_negative_curvature: Literal["raise", "increase", "warn"] = "raise",
    max_loss_rise: float | None = 0.1,
    retained_sample: int = 1000,
    batch_size: int | None = None,
    fanout: int | None = None,
    loader: Iterable[Any] | None = None,
    seed: int = 0,
    **solver_args: Any,
) -> UnlearnResult:
    r"""Remove the influence of nodes, edges or features from a trained network.

    $$(H+\lambda I)\,\delta=b,\qquad\theta_{\text{new}}=\theta+\delta,\qquad H=\nabla^2_\theta\sum_{i\in\text{train}}\ell\big(f_G(i),y_i\big)+l_2I$$

    A step is never applied unseen. Where the damped Hessian has a direction of negative curvature the solution is no
    minimum: that is an error, or with `on_negative_curvature="increase"` a larger damping and a warning. Then the mean
    loss of a sample of retained training nodes is compared on the remaining graph: while it rises by more than
    `max_loss_rise`, the step is halved, with a warning. Test accuracy is no evidence of unlearning: doing nothing scores
    the same.

    Args:
        model: Any module with `forward(x, edge_index)` that gives logits or log-probabilities, shape `(N, C)`. It isn't
            changed. Parameters with `requires_grad` take part; dropout is off and batch norm uses its running statistics.
        data: The graph that the model was trained on (see `training_graph`), with `x`, `edge_index`, `y` and `train_mask`.
        request: A `NodeRequest`, `EdgeRequest` or `FeatureRequest`; an empty one gives back the same weights.
        num_layers: $k$, message-passing layers; None asks `count_layers`.
        method: `"gif"`, or `"if"` for the classical influence function.
        solver: `"cg"`, `"neumann"` (the published recursion: `scale=500, num_iter=100, damping=0`), `"lissa"`, `"sgd"`,
            `"direct"` or `"lanczos"`, as in `ihvp.solve`. All but `"cg"` and `"direct"` don't see negative curvature on
            their way; it is then tested along the solution.
        damping: $\lambda\ge0$, absolute for every solver (for `"neumann"` and `"lissa"` it is divided by the scale), or
            `"auto"` for `auto_damping`. The default suits the summed loss of some thousand nodes.
        hessian: `"before"` takes $H$ on the graph before the request as the paper does; `"after"` on the remaining graph
            and the remaining training nodes, a Newton step: nearer to retraining, at the same price.
        restrict_to_train: Only training nodes enter b. False, as in the authors' program, lets test labels into the
            update, and warns.
        forward: Called as `forward(params, x, edge_index)` with a dict of the trainable parameters, instead of the model.
        loss: `"nll"` (log-probabilities and logits give the same), or a function of output rows and labels that returns
            the SUM over the rows.
        l2: Weight decay of the summed loss that training had, >= 0 (n times that of the mean loss).
        directed: Edges have a direction. False demands both directions of every edge, and removes both.
        on_negative_curvature: `"raise"`, `"increase"` to double the damping, to at least `auto_damping`, until there is none,
            or `"warn"` to apply what the solver gave, as published programs do.
        max_loss_rise: Largest accepted rise of the mean retained loss, >= 0, in nats; None applies the step unseen.
        retained_sample: Nodes of that sample at most, >= 1, drawn once; with `batch_size` a run of ids.
        batch_size: Work through the graph in exact neighbourhoods of so many nodes at a time instead of at once, >= 1: the
            same result in bounded memory, as long as neighbourhoods are small. With `"lissa"` and `"sgd"` it is the size
            of their random batches.
        fanout: Edges per node and layer in the neighbourhoods of $H$; None keeps all. Bounded in any graph, but an estimate.
            b stays exact: a difference of two samples would be noise.
        loader: Batches for $H$ as PyG's NeighborLoader yields them (`x`, `edge_index`, `y`, `batch_size`; the first nodes
            are the seeds), of the graph that `hessian` names, over its training nodes. Every pass must yield the same:
            torch's generator is seeded before each.
        seed: Of everything random here.
        **solver_args: Further arguments of the solver, e.g. `rtol` (1e-3 here) and `max_iter` of `"cg"`, `scale` and
            `num_iter` of `"neumann"`.

    Returns:
        The new model with all diagnostics.

    Raises:
        ValueError: If a node is out of range, an edge is not in graph, the graph is not undirected, `train_mask` is missing
            or selects no node, `x` isn't finite, the number of layers can't be told, or an argument is out of range.
        UnstableStepError: (a ValueError) If the curvature is negative, the iteration diverged, or no part of the step
            keeps the retained loss.

    Examples:
        >>> import torch
        >>> from graph_unlearn.data import synthetic_graph
        >>> from graph_unlearn.nets import SGC
        >>> from graph_unlearn.training import train
        >>> data = synthetic_graph()
        >>> _ = torch.manual_seed(0)
        >>> model = train(SGC(32, 3), data)
        >>> result = unlearn(model, data, NodeRequest(torch.tensor([0, 1])))
        >>> result.solve.converged, result.step_factor
        (True, 1.0)
    """
    _check_arguments(method, solver, damping, hessian, on_negative_curvature, l2, max_loss_rise, retained_sample)
    clock = _Clock(data)
    check_data(data)
    check_request(request, data, directed=directed)
    layers = count_layers(model) if num_layers is None else num_layers
    task, named, num_nodes = task_of(request), request_nodes(request).to(data.edge_index.device), data.x.shape[0]
    affected = affected_nodes(task, data.edge_index, named, num_nodes, layers)
    after = apply_request(request, data, directed=directed)
    problem = _Problem(model, forward, loss, layers, batch_size, fanout, seed)
    if _is_empty(request):
        return _unchanged(model, problem, after, affected, clock)
    before_mask, after_mask = influence_masks(task, affected, named, num_nodes, method=method)
    if restrict_to_train:
        before_mask, after_mask = before_mask & data.train_mask, after_mask & after.train_mask
    else:
        _warn_of_leak((before_mask & ~data.train_mask).sum())
    b = problem.gradient(data, before_mask)
    for leaf, g in zip(b.values(), problem.gradient(after, after_mask).values(), strict=True):
        leaf.sub_(g)
    clock.lap()
    rhs_norm = _norm(b)
    if rhs_norm == 0.0:
        return _unchanged(model, problem, after, affected, clock)
    graph = data if hessian == "before" else after
    if not bool(graph.train_mask.any()):
        raise ValueError("train_mask: no training node remains after the request, hessian='after' needs one")
    operator = problem.hessian(graph, l2, stochastic=solver in ("lissa", "sgd"), loader=loader)
    solved = _Solver(operator, b, solver, solver_args, on_negative_curvature).run(damping)
    clock.lap()
    step = _Backtracking(problem, after, max_loss_rise, retained_sample, seed).run(solved.result.x)
    updated = _moved(model, problem.params, step.delta)
    return UnlearnResult(
        model=updated,
        delta=step.delta,
        data_after=after,
        affected=affected,
        solve=solved.result,
        timings=clock.finish(),
        damping=solved.damping,
        damping_increases=solved.increases,
        step_factor=step.factor,
        rhs_norm=rhs_norm,
        step_norm=_norm(step.delta),
        loss_before=step.loss_before,
        loss_after=step.loss_after,
    )


class _Clock:
    """Laps of one call."""

    def __init__(self, data: Data) -> None:
        self.device = data.x.device if isinstance(getattr(data, "x", None), torch.Tensor) else torch.device("cpu")
        self.marks = [self.now()]

    def now(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def lap(self) -> None:
        self.marks.append(self.now())

    def finish(self) -> Timings:
        marks = [*self.marks, self.now()]
        laps = [b - a for a, b in itertools.pairwise(marks)]
        laps += [0.0] * (3 - len(laps))
        return Timings(laps[0], laps[1], laps[2], marks[-1] - marks[0])


class _Problem:
    """Summed losses of nodes as functions of the parameters, at once or in neighbourhoods."""

    def __init__(
        self,
        model: nn.Module,
        forward: Forward | None,
        loss: Loss,
        num_layers: int,
        batch_size: int | None,
        fanout: int | None,
        seed: int,
    ) -> None:
        if batch_size is not None:
            check_count("batch_size", batch_size, low=1)
        elif fanout is not None:
            raise ValueError(f"fanout needs batch_size, got fanout={fanout!r} and batch_size=None")
        self.model, self.forward, self.loss = model, forward, loss
        self.num_layers, self.batch_size, self.fanout, self.seed = num_layers, batch_size, fanout, seed
        self.params = ihvp.module_loss(model, _nothing)[1]
        self.cut: dict[tuple[int, int | None], Neighborhoods] = {}
        self.log_probs: bool | None = None

    def gradient(self, data: Data, mask: Tensor) -> dict[str, Tensor]:
        """Gradient of the summed loss of the nodes in a mask."""
        total = {name: torch.zeros_like(p) for name, p in self.params.items()}
        for loss_fn in self.parts(data, mask.nonzero().flatten()):
            leaves = {name: p.detach().requires_grad_() for name, p in self.params.items()}
            with torch.enable_grad():
                found = torch.autograd.grad(
                    loss_fn(leaves), list(leaves.values()), allow_unused=True, materialize_grads=True
                )
            for leaf, g in zip(total.values(), found, strict=True):
                leaf.add_(g)
        if not all(bool(leaf.isfinite().all()) for leaf in total.values()):
            raise ValueError("the gradient of the loss is not finite: check the model's weights and outputs")
        return total

    @torch.no_grad()
    def mean_loss(self, data: Data, nodes: Tensor, params: dict[str, Tensor]) -> float:
        """Mean loss of some nodes."""
        return sum(float(loss_fn(params)) for loss_fn in self.parts(data, nodes)) / len(nodes)

    def hessian(self, data: Data, l2: float, *, stochastic: bool, loader: Iterable[Any] | None) -> Any:
        """Products with the Hessian of the summed training loss."""
        nodes = data.train_mask.nonzero().flatten()
        if loader is not None:
            if stochastic:
                raise ValueError("loader is for solvers with an exact Hessian; for 'lissa' and 'sgd' give batch_size")
            same = _SamePass(loader, nodes, self.seed)
            return ihvp.DataHVP(self.model, self.loader_loss, same, "sum", l2=l2, size=_seeds)
        if self.batch_size is None:
            (loss_fn,) = self.parts(data, nodes)
            return ihvp.make_hvp(loss_fn, self.params, l2=l2)

        def loss(model: nn.Module, ids: Tensor) -> Tensor:
            return self.part_loss(model, self.neighborhoods(data, self.fanout).batch(ids))

        if stochastic:
            generator = torch.Generator().manual_seed(self.seed)
            return ihvp.StochasticHVP(self.model, loss, (nodes,), self.batch_size, "sum", l2=l2, generator=generator)
        return ihvp.DataHVP(self.model, loss, [(ids,) for ids in torch.split(nodes, self.batch_size)], "sum", l2=l2)

    def parts(self, data: Data, nodes: Tensor) -> Iterator[Callable[[Any], Tensor]]:
        """The summed loss of nodes, as functions to add up."""
        if len(nodes) == 0:
            return
        if self.batch_size is None:
            yield self.function(_At(data.x, data.edge_index, data.y[nodes], nodes))
            return
        for ids in torch.split(nodes, self.batch_size):
            batch = self.neighborhoods(data).batch(ids)
            yield self.function(_At(batch.x, batch.edge_index, batch.y[: len(ids)], slice(len(ids))))

    def function(self, at: _At) -> Callable[[Any], Tensor]:
        loss_fn, _ = ihvp.module_loss(self.model, self.row_loss, at.x, at.edge_index, at.y, at.rows)
        return loss_fn

    def part_loss(self, model: nn.Module, batch: Data) -> Tensor:
        size = int(batch.batch_size)
        return self.row_loss(model, batch.x, batch.edge_index, batch.y[:size], slice(size))

    def loader_loss(self, model: nn.Module, batch: Data) -> Tensor:
        device = next(iter(self.params.values())).device
        return self.part_loss(model, batch.to(device))

    def row_loss(self, model: nn.Module, x: Tensor, edge_index: Tensor, y: Tensor, rows: Any) -> Tensor:
        out = model(x, edge_index) if self.forward is None else self.forward(self.swapped(model), x, edge_index)
        if not isinstance(out, torch.Tensor) or out.ndim != 2 or out.shape[0] != x.shape[0]:
            got = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise ValueError(f"the model must return scores of shape ({x.shape[0]}, C), got {got}")
        # The backward pass of out[rows] sorts, that of index_select doesn't.
        chosen = out.index_select(0, rows) if isinstance(rows, torch.Tensor) else out[rows]
        if callable(self.loss):
            return self.loss(chosen, y)
        if out.device.type == "cpu" and int(y.max()) >= out.shape[1]:
            raise ValueError(f"y holds class {int(y.max())}, the model has scores for classes 0 to {out.shape[1] - 1}")
        if self.log_probs is None:
            # Said once: a second log_softmax would change nothing, but cost a third of every product.
            self.log_probs = bool((out.detach().float().logsumexp(-1).abs() < 1e-3).all())
        return (F.nll_loss if self.log_probs else F.cross_entropy)(chosen, y, reduction="sum")

    def swapped(self, model: nn.Module) -> dict[str, Tensor]:
        """The parameters that take part, as the present call holds them."""
        return {name: p for name, p in model.named_parameters() if name in self.params}

    def neighborhoods(self, data: Data, fanout: int | None = None) -> Neighborhoods:
        key = (id(data), fanout)
        if key not in self.cut:
            self.cut[key] = Neighborhoods(data, self.num_layers, fanout=fanout, seed=self.seed)
        return self.cut[key]


@dataclass(frozen=True)
class _At:
    """Where a loss is taken: a graph, and the rows that count."""

    x: Tensor
    edge_index: Tensor
    y: Tensor
    rows: Any


class _SamePass:
    """A loader that yields the same batches in every pass, checked to cover the training nodes."""

    def __init__(self, loader: Iterable[Any], nodes: Tensor, seed: int) -> None:
        self.loader, self.seed = loader, seed
        passes = [self.seeds(), self.seeds()]
        if not torch.equal(passes[0][1], passes[1][1]):
            raise ValueError("loader must yield the same batches in every pass: make a list of it, or set its seed")
        if not torch.equal(passes[0][0].sort().values, nodes.cpu()):
            raise ValueError(
                f"loader must yield every training node once as a seed: it yields {len(passes[0][0])} seeds for "
                f"{len(nodes)} training nodes; pass input_nodes=data.train_mask"
            )

    def __iter__(self) -> Iterator[Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            yield from self.loader

    def seeds(self) -> tuple[Tensor, Tensor]:
        """Return the seeds of one pass, and all nodes of its batches."""
        seeds, everything = [torch.zeros(0, dtype=torch.long)], [torch.zeros(0, dtype=torch.long)]
        for batch in self:
            if getattr(batch, "n_id", None) is None or getattr(batch, "batch_size", None) is None:
                raise ValueError("a batch of loader must have n_id and batch_size, as PyG's NeighborLoader yields it")
            seeds.append(batch.n_id[: _seeds(batch)].cpu())
            everything.append(batch.n_id.cpu())
        return torch.cat(seeds), torch.cat(everything)


@dataclass(frozen=True)
class _Solved:
    result: ihvp.SolveResult
    damping: float
    increases: int


class _Solver:
    """One linear system, with the rule for negative curvature."""

    def __init__(self, operator: Any, b: dict[str, Tensor], solver: str, args: dict[str, Any], rule: str) -> None:
        self.operator, self.b, self.solver, self.args, self.rule = operator, b, solver, dict(args), rule
        if solver == "cg":
            self.args.setdefault("rtol", CG_RTOL)
        self.exact = getattr(operator, "exact", operator)
        if solver in RELATIVE and self.args.get("scale") is None:
            self.args["scale"] = 1.1 * ihvp.largest_eigenvalue(self.exact, b)

    def run(self, damping: float | Literal["auto"]) -> _Solved:
        asked = auto_damping(self.exact, self.b) if damping == "auto" else float(damping)
        used = asked
        for increases in range(RAISES + 1):
            result = self.attempt(used)
            if result.diverged:
                raise UnstableStepError(
                    f"{self.solver} diverged after {result.num_iter} steps; nothing was applied: "
                    f"{'raise scale' if self.solver in RELATIVE else 'lower lr'}"
                    f" (residual {result.relative_residual:.2e})"
                )
            if not result.negative_curvature or self.rule == "warn":
                self.report(result, asked, used)
                return _Solved(result, used, increases)
            if self.rule == "raise":
                break
            used = max(2.0 * used, auto_damping(self.exact, self.b))
        raise UnstableStepError(
            f"the Hessian with damping {used:g} has negative curvature; nothing was applied: raise damping, or take "
            'damping="auto" or on_negative_curvature="increase"'
        )

    def attempt(self, damping: float) -> ihvp.SolveResult:
        relative = damping / self.args["scale"] if self.solver in RELATIVE else damping
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ihvp.ConvergenceWarning)  # reported below, once
            result = ihvp.solve(self.operator, self.b, method=self.solver, damping=relative, **self.args)
        if self.solver in ("cg", "direct") or result.diverged:
            return result
        image = self.exact(result.x)
        curvature = sum(float((x.double() * (image[n] + damping * x).double()).sum()) for n, x in result.x.items())
        if curvature >= 0:
            return result
        return _replace(result, negative_curvature=True)

    def report(self, result: ihvp.SolveResult, asked: float, used: float) -> None:
        if used > asked:
            text = f"negative curvature at damping {asked:g}: it was raised to {used:g}"
            warnings.warn(text, DampingWarning, stacklevel=4)
        if result.negative_curvature:
            text = f"the solution has negative curvature at damping {used:g} and is applied all the same"
            warnings.warn(text, DampingWarning, stacklevel=4)
        elif not result.converged:
            text = (
                f"{self.solver} stopped after {result.num_iter} steps at a relative residual of "
                f"{result.relative_residual:.2e} (undamped {result.undamped_relative_residual:.2e})"
            )
            warnings.warn(text, ihvp.ConvergenceWarning, stacklevel=4)


@dataclass(frozen=True)
class _Step:
    delta: dict[str, Tensor]
    factor: float
    loss_before: float = math.nan
    loss_after: float = math.nan


class _Backtracking:
    """Halve a step while the loss of a retained sample rises too far."""

    def __init__(
        self, problem: _Problem, after: Data, max_loss_rise: float | None, retained_sample: int, seed: int
    ) -> None:
        self.problem, self.after, self.max_loss_rise = problem, after, max_loss_rise
        nodes = after.train_mask.nonzero().flatten()
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(nodes), generator=generator)[:retained_sample]
        if problem.batch_size is not None and len(nodes) > retained_sample:
            # Neighbours in the order of ids, as the batches of the Hessian: scattered nodes would touch the whole graph.
            start = int(torch.randint(len(nodes) - retained_sample + 1, (), generator=generator))
            order = torch.arange(start, start + retained_sample)
        self.nodes = nodes[order.sort().values.to(nodes.device)]

    def run(self, x: dict[str, Tensor]) -> _Step:
        if self.max_loss_rise is None or len(self.nodes) == 0:
            return _Step(x, 1.0)
        params = self.problem.params
        start = self.problem.mean_loss(self.after, self.nodes, params)
        for halvings in range(HALVINGS + 1):
            factor = 0.5**halvings
            delta = {name: factor * leaf for name, leaf in x.items()} if halvings else x
            loss = self.problem.mean_loss(self.after, self.nodes, ihvp.apply_delta(params, delta))
            if loss <= start + self.max_loss_rise:
                if halvings:
                    text = f"the full step would raise the retained loss from {start:.3g} by more than "
                    text += f"{self.max_loss_rise:g}: {factor:g} of it was applied (loss {loss:.3g})"
                    warnings.warn(text, DampingWarning, stacklevel=4)
                return _Step(delta, factor, start, loss)
        raise UnstableStepError(
            f"no part of the step keeps the retained loss below {start:.3g} + {self.max_loss_rise:g}; nothing was applied"
        )


def _unchanged(
    model: nn.Module, problem: _Problem, after: Data, affected: AffectedNodes, clock: _Clock
) -> UnlearnResult:
    """The result of a request without influence: no solve, the same weights."""
    delta = {name: torch.zeros_like(p) for name, p in problem.params.items()}
    solve = ihvp.SolveResult(
        x=delta,
        converged=True,
        num_iter=0,
        num_hvp=0,
        residual_norm=0.0,
        relative_residual=0.0,
        undamped_relative_residual=0.0,
    )
    return UnlearnResult(_copy(model), delta, after, affected, solve, clock.finish())


def _copy(model: nn.Module) -> nn.Module:
    # PyG 2.6 initialises the layers of a copy before it fills them, and so draws random numbers
    with torch.random.fork_rng(devices=[]):
        return copy.deepcopy(model)


def _moved(model: nn.Module, params: dict[str, Tensor], delta: dict[str, Tensor]) -> nn.Module:
    new = _copy(model)
    named = dict(new.named_parameters())
    with torch.no_grad():
        for name, value in ihvp.apply_delta(params, delta).items():
            named[name].copy_(value)
            named[name].grad = None
    return new


def _is_empty(request: Request) -> bool:
    if isinstance(request, FeatureRequest) and request.columns is not None and request.columns.numel() == 0:
        return True
    return request_nodes(request).numel() == 0


def _warn_of_leak(count: Tensor) -> None:
    warnings.warn(
        f"restrict_to_train=False: labels of {int(count)} nodes outside train_mask enter the update; "
        "an evaluation on them is no longer a test",
        UserWarning,
        stacklevel=3,
    )


def _norm(tree: dict[str, Tensor]) -> float:
    return float(torch.stack([leaf.double().square().sum() for leaf in tree.values()]).sum().sqrt())


def _replace(result: ihvp.SolveResult, **changes: Any) -> ihvp.SolveResult:
    return dataclasses.replace(result, **changes)


def _seeds(batch: Any) -> int:
    return int(batch.batch_size)


def _nothing(*_: Any) -> Tensor:
    return torch.zeros(())


def _check_arguments(
    method: str,
    solver: str,
    damping: float | str,
    hessian: str,
    on_negative_curvature: str,
    l2: float,
    max_loss_rise: float | None,
    retained_sample: int,
) -> None:
    check_choice("method", method, METHODS)
    check_choice("solver", solver, SOLVERS)
    check_choice("hessian", hessian, ("before", "after"))
    check_choice("on_negative_curvature", on_negative_curvature, ("raise", "increase", "warn"))
    if damping != "auto":
        if isinstance(damping, str):
            raise ValueError(f"damping must be a number >= 0 or 'auto', got {damping!r}")
        check_number("damping", damping, low=0)
    check_number("l2", l2, low=0)
    if max_loss_rise is not None:
        check_number("max_loss_rise", max_loss_rise, low=0)
    check_count("retained_sample", retained_sample, low=1)
