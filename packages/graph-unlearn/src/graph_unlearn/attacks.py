r"""Does a deletion work? Attacks and comparisons that can tell, always beside doing nothing and retraining.

Adversarial edges between nodes of different classes hurt a model; deleting them should repair it. Membership inference
asks whether an observer can tell deleted nodes from nodes that were never trained on:

$$\text{l2: }\ \lVert p_i-p'_i\rVert_2,\qquad\text{loss: }\ p'_{i,y_i},\qquad
\text{AUC}=\Pr(\text{score of a deleted node}>\text{score of another})$$

with the posterior $p$ before and $p'$ after the deletion; an AUC of 0.5 tells nothing.

References: J. Wu et al., *GIF: A General Graph Unlearning Strategy via Influence Function*, WWW 2023, arXiv:2304.02835,
Section 4.3. M. Chen et al., *Graph Unlearning*, CCS 2022, arXiv:2103.14991, Section 6.5 (membership inference).
Documentation: `docs/papers/graph-unlearn/gif.md`.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import TYPE_CHECKING, Any, Literal

import torch

import ihvp
from graph_unlearn._checks import check_choice, check_ids, check_integers, check_mask, check_number
from graph_unlearn.gif import DampingWarning, UnstableStepError, unlearn
from graph_unlearn.requests import EdgeRequest, apply_request, draw_request, request_nodes
from graph_unlearn.training import TrainConfig, accuracy, evaluation_mode, retrain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor, nn
    from torch_geometric.data import Data  # type: ignore[import-untyped]

    from graph_unlearn.requests import Request

__all__ = [
    "UPDATES",
    "add_edges",
    "adversarial_edges",
    "efficacy_curve",
    "membership_auc",
    "membership_table",
    "posterior",
]

Attack = Literal["l2", "loss"]
ATTACKS: tuple[Attack, ...] = ("l2", "loss")
RETRAIN_SEED = 10_000
_PUBLISHED = {
    "solver": "neumann",
    "damping": 0.0,
    "scale": 500.0,
    "num_iter": 100,
    "on_negative_curvature": "warn",
    "max_loss_rise": None,
}

UPDATES: dict[str, dict[str, Any]] = {
    "if": {"method": "if", **_PUBLISHED},
    "gif": {"method": "gif", **_PUBLISHED},
    "gif_cg": {"method": "gif", "solver": "cg", "damping": 10.0},
}
"""Updates that are compared by default, with their arguments of `unlearn`: the classical influence function and GIF with the
published recursion, applied unseen, and GIF with conjugate gradients."""


def adversarial_edges(data: Data, train_mask: Tensor, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    r"""Draw edges that hurt: between random training nodes of different label, where there is none yet.

    $\lfloor\rho m\rfloor$ pairs, every one of the possible ones equally likely, without replacement; $m$ is the number of
    undirected edges of the graph.

    Args:
        data: An undirected graph with `edge_index` and labels `y`.
        train_mask: Which nodes may get edges, bool `(N,)`.
        ratio: $\rho\ge0$; the paper uses 0.1 to 1.
        generator: Source of the draw, on the CPU; None means one seeded with 0.

    Returns:
        Every new edge once, shape `(2, R)`, the lower id first: what `add_edges` and `EdgeRequest` take.

    Raises:
        ValueError: If `ratio` is negative, `train_mask` selects nothing, or there aren't so many pairs.

    Examples:
        >>> import torch
        >>> from torch_geometric.data import Data
        >>> graph = Data(edge_index=torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]), y=torch.tensor([0, 0, 1, 1]))
        >>> new = adversarial_edges(graph, torch.ones(4, dtype=torch.bool), 1.0)
        >>> graph.y[new[0]] != graph.y[new[1]], new.shape  # 2 edges were there
        (tensor([True, True]), torch.Size([2, 2]))
    """
    check_number("ratio", ratio, low=0)
    y, n = data.y.cpu(), data.y.shape[0]
    check_mask("train_mask", train_mask, n)
    train_mask = train_mask.cpu()
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    nodes, (a, b) = train_mask.nonzero().squeeze(1), data.edge_index.cpu()
    present = (torch.minimum(a, b) * n + torch.maximum(a, b)).unique()
    count = int(ratio * int((present // n != present % n).sum()))
    _check_available(count, present, train_mask, y)
    drawn = torch.empty(0, dtype=torch.int64)
    while drawn.numel() < count:
        pair = nodes[torch.randint(nodes.numel(), (2, 2 * (count - drawn.numel()) + 16), generator=generator)]
        pair = pair[:, y[pair[0]] != y[pair[1]]]
        new = pair.amin(0) * n + pair.amax(0)
        drawn = _first_of_each(torch.cat([drawn, new[~torch.isin(new, present)]]))[:count]
    return torch.stack([drawn // n, drawn % n]).to(data.edge_index.device)


def _check_available(count: int, present: Tensor, train_mask: Tensor, y: Tensor) -> None:
    """Refuse more pairs than there are between training nodes of different label without an edge."""
    size = y[train_mask].unique(return_counts=True)[1]  # type: ignore[no-untyped-call]
    pairs = (int(size.sum()) ** 2 - int(size.square().sum())) // 2
    a, b = present // y.numel(), present % y.numel()
    taken = int((train_mask[a] & train_mask[b] & (y[a] != y[b])).sum())
    if count > pairs - taken:
        raise ValueError(
            f"ratio asks for {count} new edges, there are only {pairs - taken} pairs of different label left"
        )


def _first_of_each(values: Tensor) -> Tensor:
    """Return the distinct values in the order of their first appearance."""
    distinct, index = values.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    first = torch.full_like(distinct, values.numel()).scatter_reduce(0, index, torch.arange(values.numel()), "amin")
    return values[first.sort().values]


def add_edges(data: Data, edges: Tensor) -> Data:
    """Return a copy of a graph with further undirected edges at the end of its list.

    Args:
        data: The graph; it isn't changed.
        edges: New edges, each once, shape `(2, R)`, integer.

    Returns:
        The graph with both directions of every new edge.

    Raises:
        ValueError: If `edges` isn't an integer tensor of two rows, or a node is out of range.

    Examples:
        >>> import torch
        >>> from torch_geometric.data import Data
        >>> graph = Data(x=torch.ones(2, 1), edge_index=torch.empty(2, 0, dtype=torch.long))
        >>> add_edges(graph, torch.tensor([[0], [1]])).edge_index
        tensor([[0, 1],
                [1, 0]])
    """
    check_integers("edges", edges, 2)
    check_ids("edges", edges, data.num_nodes)
    after = data.__copy__()
    edges = edges.to(data.edge_index)
    after.edge_index = torch.cat([data.edge_index, edges, edges.flip(0)], 1)
    return after


def membership_auc(
    posterior_before: Tensor,
    posterior_after: Tensor,
    members: Tensor,
    nonmembers: Tensor,
    attack: Attack = "l2",
    y: Tensor | None = None,
) -> float:
    r"""How well an observer tells deleted nodes from nodes that were never trained on.

    $$\text{l2: }\ \lVert p_i-p'_i\rVert_2,\qquad\text{loss: }\ p'_{i,y_i}$$

    The scores are compared by the area under the ROC curve. Attack `"l2"` sees the model before and after the deletion:
    0.5 says that the deleted nodes' predictions moved no more than others'. It is 0.5 where nothing was updated, so look
    at `"loss"` too: that one sees the model after the deletion alone, and a model that still remembers the deleted nodes
    fits them better than others. Compare with a retrained model, not with 0.5: deleted and other nodes may differ in what
    is left of the graph.

    Args:
        posterior_before: $p$, class probabilities of the model before the deletion, shape `(N, C)`.
        posterior_after: $p'$, those of the model after it, on the same inputs.
        members: Deleted nodes, shape `(R,)`, integer.
        nonmembers: Nodes outside training, shape `(T,)`, integer.
        attack: `"l2"` or `"loss"`.
        y: Labels, shape `(N,)`, integer; needed by attack `"loss"`.

    Returns:
        The AUC, in [0, 1].

    Raises:
        ValueError: If a shape is wrong, a posterior isn't finite, a node is out of range, a group is empty or both have
            a node in common, `y` is missing, or `attack` is unknown.

    Examples:
        >>> import torch
        >>> before = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.5, 0.5]])
        >>> after = torch.tensor([[0.5, 0.5], [0.6, 0.4], [0.4, 0.6]])
        >>> membership_auc(before, after, torch.tensor([0]), torch.tensor([1, 2]))
        1.0
    """
    from sklearn.metrics import roc_auc_score  # type: ignore[import-untyped]

    check_choice("attack", attack, ATTACKS)
    _check_membership(posterior_before, posterior_after, members, nonmembers)
    nodes = torch.cat([members, nonmembers]).long()
    if attack == "l2":
        score = (posterior_after[nodes].double() - posterior_before[nodes].double()).norm(dim=1)
    elif y is None:
        raise ValueError("attack 'loss' needs the labels `y`")
    else:
        # The probability of the label orders nodes as the negative loss does, and stays finite.
        score = posterior_after[nodes].double().gather(1, y[nodes].long()[:, None]).squeeze(1)
    label = torch.arange(nodes.numel()) < members.numel()
    return float(roc_auc_score(label.numpy(), score.detach().cpu().numpy()))


def _check_membership(before: Tensor, after: Tensor, members: Tensor, nonmembers: Tensor) -> None:
    if before.ndim != 2 or before.shape != after.shape:
        raise ValueError(f"posteriors must share the shape (N, C), got {tuple(before.shape)} and {tuple(after.shape)}")
    if not bool((before.isfinite() & after.isfinite()).all()):
        raise ValueError("posteriors must be finite")
    for name, nodes in (("members", members), ("nonmembers", nonmembers)):
        check_integers(name, nodes, 1)
        check_ids(name, nodes, before.shape[0])
        if nodes.numel() == 0:
            raise ValueError(f"{name} must not be empty")
    if bool(torch.isin(members, nonmembers).any()):
        raise ValueError("members and nonmembers must not have a node in common")


@torch.no_grad()
def posterior(model: nn.Module, data: Data) -> Tensor:
    """Class probabilities of a model in evaluation mode.

    Args:
        model: `forward(x, edge_index)` gives logits or log-probabilities, shape `(N, C)`.
        data: The graph.

    Returns:
        Shape `(N, C)`, rows sum to 1.

    Examples:
        >>> from graph_unlearn.data import synthetic_graph
        >>> from graph_unlearn.nets import GCN
        >>> posterior(GCN(8, 2), synthetic_graph(10, 8, 2)).shape
        torch.Size([10, 2])
    """
    with evaluation_mode(model):
        out: Tensor = model(data.x, data.edge_index)
    return out.softmax(-1)


def efficacy_curve(
    make_model: Callable[[], nn.Module],
    data: Data,
    ratios: Sequence[float] = (0.5, 0.9),
    *,
    seeds: Iterable[int] = (0,),
    config: TrainConfig | None = None,
    updates: Mapping[str, Mapping[str, Any]] = UPDATES,
) -> list[dict[str, Any]]:
    """Train on a graph with adversarial edges, delete them, and see how much of the damage goes (GIF, Section 4.3).

    Of the gain over the corrupted model most comes from the clean graph at inference. So the old weights on the clean graph
    are part of every row; what an update does is the difference to them, and retraining shows what there is to gain.

    Args:
        make_model: Returns an untrained model, `forward(x, edge_index)` gives logits or log-probabilities `(N, C)`.
        data: The clean graph with `train_mask` and `test_mask`. All its edges are trained on.
        ratios: Adversarial edges per undirected edge of the graph, each >= 0.
        seeds: Of edges, weights and dropout; the figures of a row share theirs.
        config: Settings of training; None takes the defaults. Its seed is replaced.
        updates: Name to arguments of `unlearn`.

    Returns:
        A row per ratio and seed: `ratio`, `seed`, `edges` (how many), test accuracies `corrupted` (model and graph),
        `no_update` (clean graph), one per update, `retrain`; `refused` (updates that `unlearn` refused, whose accuracy is
        that of `no_update`) and `shortened` (steps that it shortened).

    Raises:
        ValueError: For the reasons of `adversarial_edges`, `train` and `unlearn`; or a name of an update is taken.

    Examples:
        >>> from graph_unlearn.data import synthetic_graph
        >>> from graph_unlearn.nets import GCN
        >>> graph = synthetic_graph(100, 8, 2)
        >>> (row,) = efficacy_curve(lambda: GCN(8, 2), graph, [0.5], config=TrainConfig(epochs=20), updates={})
        >>> sorted(row)
        ['corrupted', 'edges', 'no_update', 'ratio', 'refused', 'retrain', 'seed', 'shortened']
    """
    fixed = ("ratio", "seed", "edges", "corrupted", "no_update", "retrain", "refused", "shortened")
    _check_updates(updates, fixed)
    _check_masks(data)
    return [
        _efficacy_row(make_model, data, ratio, dataclasses.replace(config or TrainConfig(), seed=seed), updates)
        for ratio in ratios
        for seed in seeds
    ]


def _efficacy_row(
    make_model: Callable[[], nn.Module],
    data: Data,
    ratio: float,
    config: TrainConfig,
    updates: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    edges = adversarial_edges(data, data.train_mask, ratio, torch.Generator().manual_seed(config.seed))
    corrupted = add_edges(data, edges)
    model = retrain(make_model, corrupted, data.train_mask, config)
    row: dict[str, Any] = {"ratio": ratio, "seed": config.seed, "edges": edges.shape[1]}
    row["corrupted"] = accuracy(model, corrupted, data.test_mask)
    row["no_update"] = accuracy(model, data, data.test_mask)
    row |= {"refused": [], "shortened": []}
    for name, arguments in updates.items():
        updated, told = _updated(model, corrupted, EdgeRequest(edges), arguments)
        row[name] = accuracy(updated, data, data.test_mask)
        if told:
            row[told].append(name)
    row["retrain"] = accuracy(retrain(make_model, data, data.train_mask, config), data, data.test_mask)
    return row


def membership_table(
    make_model: Callable[[], nn.Module],
    data: Data,
    ratio: float = 0.05,
    *,
    seeds: Iterable[int] = (0,),
    config: TrainConfig | None = None,
    updates: Mapping[str, Mapping[str, Any]] = UPDATES,
) -> list[dict[str, Any]]:
    """Delete random training nodes and attack what is left: deleted against test nodes.

    Both posteriors are those on the graph before the deletion, as of somebody who still has the node and its edges: they
    differ by the weights alone. On the remaining graph a deleted node would be without neighbours, which any attack sees.

    Args:
        make_model: Returns an untrained model, `forward(x, edge_index)` gives logits or log-probabilities `(N, C)`.
        data: The graph with `train_mask` and `test_mask`.
        ratio: Part of the training nodes to delete, in (0, 1).
        seeds: Of the choice of nodes, weights and dropout; the rows of a seed share theirs. Retraining has a seed of its
            own for weights and dropout, as it would in practice.
        config: Settings of training; None takes the defaults. Its seed is replaced.
        updates: Name to arguments of `unlearn`.

    Returns:
        Rows for `no_update`, each update and `retrain`, per seed: `seed`, `method`, `l2` and `loss` (AUC of
        `membership_auc`), `accuracy` on the test nodes of the remaining graph, and `told` (empty, `refused` or `shortened`).

    Raises:
        ValueError: For the reasons of `train` and `unlearn`; a name of an update is taken; or no node is deleted.

    Examples:
        >>> from graph_unlearn.data import synthetic_graph
        >>> from graph_unlearn.nets import GCN
        >>> graph = synthetic_graph(100, 8, 2)
        >>> rows = membership_table(lambda: GCN(8, 2), graph, 0.1, config=TrainConfig(epochs=20), updates={})
        >>> [(row["method"], row["l2"]) for row in rows][0]  # nothing moved
        ('no_update', 0.5)
    """
    _check_updates(updates, ("no_update", "retrain"))
    _check_masks(data)
    return [
        row
        for seed in seeds
        for row in _membership_rows(
            make_model, data, ratio, dataclasses.replace(config or TrainConfig(), seed=seed), updates
        )
    ]


def _membership_rows(
    make_model: Callable[[], nn.Module],
    data: Data,
    ratio: float,
    config: TrainConfig,
    updates: Mapping[str, Mapping[str, Any]],
) -> list[dict[str, Any]]:
    request = draw_request("node", data, ratio, torch.Generator().manual_seed(config.seed))
    deleted, others = request_nodes(request), data.test_mask.nonzero().flatten()
    if deleted.numel() == 0:
        raise ValueError(f"ratio {ratio!r} of {int(data.train_mask.sum())} training nodes deletes none")
    after = apply_request(request, data)
    model = retrain(make_model, data, data.train_mask, config)
    models: dict[str, tuple[nn.Module, str]] = {"no_update": (model, "")}
    models |= {name: _updated(model, data, request, arguments) for name, arguments in updates.items()}
    anew = dataclasses.replace(config, seed=config.seed + RETRAIN_SEED)
    models["retrain"] = (retrain(make_model, after, after.train_mask, anew), "")
    before = posterior(model, data)
    rows = []
    for name, (updated, told) in models.items():
        now = posterior(updated, data)
        row: dict[str, Any] = {"seed": config.seed, "method": name}
        for attack in ATTACKS:
            row[attack] = membership_auc(before, now, deleted, others, attack, data.y)
        rows.append(row | {"accuracy": accuracy(updated, after, data.test_mask), "told": told})
    return rows


def _updated(model: nn.Module, data: Data, request: Request, arguments: Mapping[str, Any]) -> tuple[nn.Module, str]:
    """Return the model after an update, and what `unlearn` did about it: "" (nothing), "refused" or "shortened"."""
    with warnings.catch_warnings():
        # The published recursion never converges: that is one of the things compared here.
        warnings.simplefilter("ignore", ihvp.ConvergenceWarning)
        warnings.simplefilter("ignore", DampingWarning)
        try:
            result = unlearn(model, data, request, **arguments)
        except UnstableStepError:
            return model, "refused"
    return result.model, "shortened" if result.backtracked else ""


def _check_updates(updates: Mapping[str, Mapping[str, Any]], taken: Iterable[str]) -> None:
    for name in updates:
        if name in taken:
            raise ValueError(f"updates must not use the name {name!r}: it is one of the rows' own")


def _check_masks(data: Data) -> None:
    for name in ("train_mask", "test_mask"):
        check_mask(name, getattr(data, name, None), data.y.shape[0])
