r"""GraphEraser: exact-style unlearning by training one model per shard of the graph, the baseline of GIF.

The training nodes are partitioned into balanced shards, by label propagation on the graph (BLPA), by k-means on node
embeddings (BEKM) or at random. Every shard trains a model of its own; predictions are aggregated. A deletion retrains
the shards that held what is deleted.

$$\hat p_i=\sum_s\alpha_s\,p^{(s)}_i,\qquad
|V_s|\le\Big\lceil\tfrac nS+\delta\big(n-\tfrac nS\big)\Big\rceil,\qquad \theta_s=\arg\min_\theta L(\theta;G[V_s])$$

Reference: M. Chen, Z. Zhang, T. Wang, M. Backes, M. Humbert, Y. Zhang, *Graph Unlearning*, CCS 2022, arXiv:2103.14991.
Documentation: `docs/papers/graph-unlearn/gif.md`.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING, Literal, Self

import torch
import torch.nn.functional as F
from torch import nn
from torch_geometric.data import Data  # type: ignore[import-untyped]
from torch_geometric.nn import SAGEConv  # type: ignore[import-untyped]
from torch_geometric.utils import subgraph  # type: ignore[import-untyped]

from graph_unlearn._checks import (
    check_choice,
    check_count,
    check_data,
    check_edge_index,
    check_number,
)
from graph_unlearn.data import training_graph
from graph_unlearn.requests import EdgeRequest, NodeRequest, apply_request, check_request
from graph_unlearn.training import TrainConfig, evaluation_mode, retrain

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from graph_unlearn.requests import Request

__all__ = [
    "GraphEraser",
    "aggregate_posteriors",
    "balanced_assign",
    "balanced_kmeans",
    "balanced_lpa",
    "learn_weights",
    "sage_embedding",
    "shard_cap",
]

Partition = Literal["blpa", "bekm", "random"]
Aggregate = Literal["mean", "majority", "optimal"]

PARTITIONS = ("blpa", "bekm", "random")
AGGREGATES = ("mean", "majority", "optimal")
SAMPLES = 1000


def shard_cap(num_nodes: int, num_shards: int, cap_delta: float = 0.005) -> int:
    r"""Return the largest number of nodes in one shard.

    $$\Big\lceil\tfrac nS+\delta\big(n-\tfrac nS\big)\Big\rceil$$

    Args:
        num_nodes: $n\ge1$, nodes to be partitioned.
        num_shards: $S$, from 1 to $n$.
        cap_delta: $\delta$ in [0, 1]; 0 makes all shards equal, 1 allows one shard with everything.

    Returns:
        The cap, at least $n/S$.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> shard_cap(2437, 20)
        134
    """
    if not 1 <= num_shards <= num_nodes:
        raise ValueError(f"num_shards must be between 1 and the number of nodes, {num_nodes}, got {num_shards!r}")
    if not 0 <= cap_delta <= 1:
        raise ValueError(f"cap_delta must be in [0, 1], got {cap_delta!r}")
    even = num_nodes / num_shards
    return math.ceil(even + cap_delta * (num_nodes - even))


def balanced_lpa(
    edge_index: Tensor,
    num_nodes: int,
    num_shards: int,
    cap: int,
    *,
    max_rounds: int = 100,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Partition a graph by label propagation with a cap on the size of a shard (GraphEraser, BLPA).

    The nodes start in random shards of equal size. In every round a node wants the shard in which most of its neighbours
    are, ties at random. Those with most neighbours in the wanted shard move first. Into a full shard they move in that
    order as soon as somebody leaves. It ends when nobody moves.

    The order of moves within a round doesn't matter beyond that: every shard admits a prefix of its queue, and the
    largest prefixes that the cap allows are unique. So the moves are made for all shards at once.

    Nodes without neighbours take no part: they fill the smallest shards at the end. (As published, they all want shard 0,
    crowd out those that have a reason to be there, and shards end as small as the crowd makes shard 0 large.)

    Args:
        edge_index: Edges, shape `(2, E)`, integer, both directions of an undirected edge. Self loops don't count.
        num_nodes: $n\ge1$.
        num_shards: $S$, from 1 to $n$.
        cap: Nodes in a shard at most; `cap * num_shards >= num_nodes`.
        max_rounds: Rounds at most, >= 0.
        generator: Source of randomness, on the CPU; None uses the global one.

    Returns:
        The shard of each node, shape `(n,)`, int64, on the device of `edge_index`. Computed on the CPU.

    Raises:
        ValueError: If a node id is out of range, or an argument is.

    Examples:
        >>> import torch
        >>> edges = torch.tensor([[0, 1, 1, 2, 3, 4], [1, 0, 2, 1, 4, 3]])  # 0 - 1 - 2 and 3 - 4
        >>> shards = balanced_lpa(edges, 5, 2, 3, generator=torch.Generator().manual_seed(0))
        >>> shards[0] == shards[1] == shards[2], shards[3] == shards[4]
        (tensor(True), tensor(True))
    """
    _check_partition(num_nodes, num_shards, cap)
    if max_rounds < 0:
        raise ValueError(f"max_rounds must be >= 0, got {max_rounds!r}")
    check_edge_index(edge_index, num_nodes)
    device, edge_index = edge_index.device, edge_index.cpu()
    source, target = edge_index[:, edge_index[0] != edge_index[1]]
    connected = torch.zeros(num_nodes, dtype=torch.bool)
    connected[source] = connected[target] = True
    shard = torch.full((num_nodes,), -1)
    count = int(connected.sum())
    shard[connected] = torch.arange(count)[torch.randperm(count, generator=generator)] % num_shards
    size = shard[connected].bincount(minlength=num_shards)
    for _ in range(max_rounds):
        node, wanted = _wanted(source, target, shard, num_shards, generator)
        if not _move(node, wanted, shard, size, cap):
            break
    alone = (~connected).nonzero().squeeze(1)
    alone = alone[torch.randperm(alone.numel(), generator=generator)]
    shard[alone] = _emptiest(size, alone.numel())
    return shard.to(device)


def _wanted(
    source: Tensor, target: Tensor, shard: Tensor, num_shards: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Return the nodes that want to move, those with most neighbours in the wanted shard first, and that shard."""
    key, votes = (source * num_shards + shard[target]).unique(return_counts=True)  # type: ignore[no-untyped-call]
    node, candidate = key // num_shards, key % num_shards
    # Integers order exactly: by votes, then by chance.
    chance = torch.randperm(key.numel(), generator=generator)
    rank = (votes * key.numel() + chance).argsort(descending=True)
    node, candidate, votes = node[rank], candidate[rank], votes[rank]
    order = node.argsort(stable=True)
    first = torch.ones(order.numel(), dtype=torch.bool)
    first[1:] = node[order][1:] != node[order][:-1]
    # The best candidate of every node, in the order of the votes (and of chance among equals).
    best = order[first].sort().values
    best = best[candidate[best] != shard[node[best]]]
    return node[best], candidate[best]


def _move(node: Tensor, wanted: Tensor, shard: Tensor, size: Tensor, cap: int) -> bool:
    """Move the nodes of every shard's queue as far as the cap allows; changes `shard` and `size`, tells if one moved."""
    queue = wanted.argsort(stable=True)
    node, wanted = node[queue], wanted[queue]
    length = wanted.bincount(minlength=size.numel())
    place = torch.arange(node.numel()) - (length.cumsum(0) - length)[wanted]
    admitted = torch.zeros_like(size)
    while True:
        last, admitted = admitted, torch.minimum(length, admitted + cap - size)
        now = (place >= last[wanted]) & (place < admitted[wanted])
        if not bool(now.any()):
            return bool(admitted.any())
        moved = node[now]
        size += admitted - last - shard[moved].bincount(minlength=size.numel())
        shard[moved] = wanted[now]


def _emptiest(size: Tensor, count: int) -> Tensor:
    """Return the shards that `count` more nodes go to when each goes to the smallest; changes `size`."""
    level = max(int(size.max()), -(-(int(size.sum()) + count) // size.numel()))
    place = torch.arange(size.numel()).repeat_interleave(level - size)
    height = torch.cat([torch.arange(filled, level) for filled in size.tolist()])
    place = place[height.argsort(stable=True)[:count]]
    size += place.bincount(minlength=size.numel())
    return place


def balanced_assign(distance: Tensor, cap: int) -> Tensor:
    r"""Assign every node to a near shard, with a cap on the size of a shard (GraphEraser, BEKM).

    The assignment is that of going through all pairs of shard and node from the nearest on, and assigning the node where
    it has no shard yet and the shard has room. It is found without that walk: as every pair has one distance for both
    sides, it is the stable matching in which nodes apply to their nearest shard and full shards keep the nearest.
    Equal distances go to the lower shard, then to the lower node.

    Args:
        distance: Distance of each shard's centre to each node, shape `(S, n)`, finite; only its order matters.
        cap: Nodes in a shard at most; `cap * S >= n`.

    Returns:
        The shard of each node, shape `(n,)`, int64.

    Raises:
        ValueError: If `distance` isn't a finite matrix, or the shards can't hold all nodes.

    Examples:
        >>> import torch
        >>> balanced_assign(torch.tensor([[1.0, 2.0, 3.0], [9.0, 4.0, 8.0]]), cap=2)  # node 2 finds shard 0 full
        tensor([0, 0, 1])
    """
    if distance.ndim != 2 or distance.numel() == 0:
        raise ValueError(f"distance must have shape (S, n) with S, n >= 1, got {tuple(distance.shape)}")
    num_shards, n = distance.shape
    _check_partition(n, num_shards, cap)
    if not bool(distance.isfinite().all()):
        raise ValueError("distance must be finite")
    open_to = distance.clone()
    shard = torch.full((n,), -1, device=distance.device)
    looking = torch.arange(n, device=distance.device)
    while looking.numel():
        shard[looking] = open_to[:, looking].argmin(0)
        rank = _rank_in_shard(distance, shard, num_shards)
        turned_away = rank >= cap
        # A full shard keeps only nearer ones from now on, so whoever is farther needn't apply.
        last = (rank == cap - 1).nonzero().squeeze(1)
        full = shard[last]
        limit = distance[full, last]
        nodes = torch.arange(n, device=distance.device)
        farther = (distance[full] > limit[:, None]) | ((distance[full] == limit[:, None]) & (nodes > last[:, None]))
        open_to[full] = open_to[full].masked_fill(farther, math.inf)
        looking = turned_away.nonzero().squeeze(1)
    return shard


def _rank_in_shard(distance: Tensor, shard: Tensor, num_shards: int) -> Tensor:
    """Return how many nodes of its shard come before each node, by distance, then by id."""
    own = distance.gather(0, shard[None]).squeeze(0)
    order = own.argsort(stable=True)
    order = order[shard[order].argsort(stable=True)]
    size = shard.bincount(minlength=num_shards)
    rank = torch.empty_like(shard)
    rank[order] = torch.arange(shard.numel(), device=shard.device) - (size.cumsum(0) - size)[shard[order]]
    return rank


def balanced_kmeans(
    embedding: Tensor, num_shards: int, cap: int, *, max_rounds: int = 20, generator: torch.Generator | None = None
) -> Tensor:
    r"""Partition nodes by k-means with a cap on the size of a cluster (GraphEraser, BEKM).

    $$\text{nearest pairs first: }s_i\text{ by }\lVert z_i-c_s\rVert^2,\qquad c_s=\frac1{|V_s|}\sum_{i\in V_s}z_i$$

    It starts from random nodes as centres, assigns with `balanced_assign` and ends when no centre moves. A cluster that
    loses all its nodes keeps its centre.

    Args:
        embedding: $z$, shape `(n, d)`, floating, finite.
        num_shards: $S$, from 1 to $n$.
        cap: Nodes in a shard at most; `cap * num_shards >= n`.
        max_rounds: Rounds at most, >= 1.
        generator: Source of randomness, on the CPU; None uses the global one.

    Returns:
        The shard of each node, shape `(n,)`, int64.

    Raises:
        ValueError: If `embedding` isn't a finite matrix, or another argument is out of range.

    Examples:
        >>> import torch
        >>> points = torch.tensor([[0.0], [0.1], [5.0], [5.1]])
        >>> shards = balanced_kmeans(points, 2, 2, generator=torch.Generator().manual_seed(1))
        >>> shards[0] == shards[1], shards[2] == shards[3], shards[0] == shards[2]
        (tensor(True), tensor(True), tensor(False))
    """
    if embedding.ndim != 2 or not embedding.is_floating_point():
        raise ValueError(f"embedding must be floating (n, d), got {embedding.dtype} {tuple(embedding.shape)}")
    if not bool(embedding.isfinite().all()):
        raise ValueError("embedding must be finite")
    if max_rounds < 1:
        raise ValueError(f"max_rounds must be >= 1, got {max_rounds!r}")
    n = embedding.shape[0]
    _check_partition(n, num_shards, cap)
    embedding = embedding.detach().float() if embedding.dtype.itemsize < 4 else embedding.detach()
    centre = embedding[torch.randperm(n, generator=generator)[:num_shards].to(embedding.device)]
    shard = torch.zeros(n, dtype=torch.int64)
    for _ in range(max_rounds):
        shard = balanced_assign(torch.cdist(centre, embedding), cap)
        size = shard.bincount(minlength=num_shards)[:, None]
        mean = torch.zeros_like(centre).index_add(0, shard, embedding) / size.clamp_min(1)
        moved = torch.where(size > 0, mean, centre)
        if torch.equal(moved, centre):
            break
        centre = moved
    return shard


def sage_embedding(data: Data, config: TrainConfig | None = None, *, hidden: int = 32) -> Tensor:
    """Train a GraphSAGE for the labels and return its hidden layer: what BEKM partitions.

    A linear map of the features, then PyG's GraphSAGE with two layers, so that messages are short.

    Args:
        data: The training graph, with `x` (dense or sparse), `edge_index`, `y` and `train_mask`.
        config: Settings of the training; None takes the defaults.
        hidden: Width of the embedding, >= 1.

    Returns:
        Embeddings, shape `(N, hidden)`, without a graph.

    Raises:
        ValueError: If the graph lacks something, or the training fails.

    Examples:
        >>> from graph_unlearn.data import synthetic_graph
        >>> sage_embedding(synthetic_graph(50, 8, 2), TrainConfig(epochs=5)).shape
        torch.Size([50, 32])
    """
    features, classes = data.x.shape[1], int(data.y.max()) + 1
    model = retrain(lambda: _Sage(features, hidden, classes), data, data.train_mask, config)
    with torch.no_grad():
        return model.embed(data.x, data.edge_index)  # type: ignore[operator, no-any-return]


class _Sage(nn.Module):
    def __init__(self, features: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.map = nn.Linear(features, hidden)
        self.first = SAGEConv(hidden, hidden)
        self.second = SAGEConv(hidden, classes)

    def embed(self, x: Tensor, edge_index: Tensor) -> Tensor:
        # nn.Linear refuses sparse CSR.
        mapped = F.linear(x, self.map.weight, self.map.bias) if x.layout == torch.strided else self._map_sparse(x)
        hidden: Tensor = self.first(mapped, edge_index)
        return F.relu(hidden)

    def _map_sparse(self, x: Tensor) -> Tensor:
        product: Tensor = torch.sparse.mm(x, self.map.weight.T)
        return product + self.map.bias

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        out: Tensor = self.second(F.dropout(self.embed(x, edge_index), 0.5, self.training), edge_index)
        return out


def aggregate_posteriors(posteriors: Tensor, how: Aggregate = "mean", weights: Tensor | None = None) -> Tensor:
    r"""Combine the posteriors of the shards' models.

    $$\text{mean: }\frac1S\sum_sp^{(s)},\qquad\text{optimal: }\sum_s\alpha_sp^{(s)},\qquad
    \text{majority: }\frac1{S+1}\Big(\sum_sv^{(s)}+\frac1S\sum_sp^{(s)}\Big)$$

    $v^{(s)}$ is the vote of a model for its most likely class. A model that has several splits its vote: one that can say
    nothing of a node, such as a GCN without self loops of a node without neighbours, would otherwise vote for class 0. The
    mean counts less than a vote and decides ties.

    Args:
        posteriors: $p^{(s)}_i$, shape `(S, n, C)`, floating.
        how: `"mean"`, `"majority"` or `"optimal"`.
        weights: $\alpha$ of `"optimal"`, shape `(S,)`, >= 0 with sum 1 (`learn_weights`).

    Returns:
        Rows that sum to 1, shape `(n, C)`.

    Raises:
        ValueError: If a shape is wrong, `how` is unknown, or `weights` are missing.

    Examples:
        >>> import torch
        >>> p = torch.tensor([[[0.9, 0.1]], [[0.4, 0.6]], [[0.4, 0.6]]])
        >>> aggregate_posteriors(p, "mean").argmax(1), aggregate_posteriors(p, "majority").argmax(1)
        (tensor([0]), tensor([1]))
    """
    check_choice("aggregate", how, AGGREGATES)
    if posteriors.ndim != 3 or posteriors.shape[0] == 0:
        raise ValueError(f"posteriors must have shape (S, n, C) with S >= 1, got {tuple(posteriors.shape)}")
    if how == "optimal":
        if weights is None or weights.shape != posteriors.shape[:1]:
            got = None if weights is None else tuple(weights.shape)
            raise ValueError(f"aggregate 'optimal' needs weights of shape ({posteriors.shape[0]},), got {got}")
        return torch.einsum("s,snc->nc", weights.to(posteriors), posteriors)
    mean = posteriors.mean(0)
    if how == "mean":
        return mean
    votes = (posteriors == posteriors.amax(-1, keepdim=True)).to(mean.dtype)
    votes = (votes / votes.sum(-1, keepdim=True)).sum(0)
    return (votes + mean) / (posteriors.shape[0] + 1)


def learn_weights(
    posteriors: Tensor,
    y: Tensor,
    *,
    epochs: int = 50,
    lr: float = 1e-3,
    batch_size: int = 32,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Learn how much each shard's model counts (GraphEraser, "optimal" aggregation).

    $$\min_\alpha\ \frac1n\sum_i\text{CE}\big(\text{softmax}(\textstyle\sum_s\alpha_sp^{(s)}_i),\,y_i\big)
    +\lVert\alpha\rVert_2,\qquad\alpha\ge0,\ \sum_s\alpha_s=1$$

    Adam from equal weights; after every step negative weights become 0 and the rest is divided by its sum. The gradient's
    mean is taken off before the step, which the original doesn't: there the norm makes all gradients positive, Adam's
    steps equally long, and the weights hardly differ.

    Args:
        posteriors: $p^{(s)}_i$ of training nodes, shape `(S, n, C)`, floating.
        y: Their labels, shape `(n,)`, integer.
        epochs: Passes, >= 0.
        lr: Adam's rate, > 0.
        batch_size: Nodes per step, >= 1.
        generator: Source of the order, on the CPU; None uses the global one.

    Returns:
        $\alpha$, shape `(S,)`.

    Raises:
        ValueError: If a shape is wrong or a number is out of range.

    Examples:
        >>> import torch
        >>> right, wrong = torch.eye(2), torch.eye(2).flip(0)
        >>> weights = learn_weights(torch.stack([right, wrong]), torch.tensor([0, 1]), epochs=100)
        >>> weights[0] > weights[1], weights.sum()
        (tensor(True), tensor(1.))
    """
    if posteriors.ndim != 3 or posteriors.shape[0] == 0 or posteriors.shape[1] == 0:
        raise ValueError(f"posteriors must have shape (S, n, C) with S, n >= 1, got {tuple(posteriors.shape)}")
    num_shards, n, _ = posteriors.shape
    if y.shape != (n,):
        raise ValueError(f"y must have shape ({n},), got {tuple(y.shape)}")
    check_count("epochs", epochs, low=0)
    check_number("lr", lr, low=0, open_low=True)
    check_count("batch_size", batch_size, low=1)
    posteriors = posteriors.detach()
    alpha = torch.full((num_shards,), 1 / num_shards, dtype=posteriors.dtype, device=posteriors.device)
    alpha.requires_grad_()
    optimizer = torch.optim.Adam([alpha], lr=lr)
    for _ in range(epochs):
        for batch in torch.randperm(n, generator=generator).to(y.device).split(batch_size):  # type: ignore[no-untyped-call]
            mixed = torch.einsum("s,snc->nc", alpha, posteriors[:, batch])
            (slope,) = torch.autograd.grad(F.cross_entropy(mixed, y[batch]) + alpha.norm(), alpha)
            # What is common to all weights is undone by dividing by the sum; to Adam it would hide the rest.
            alpha.grad = slope - slope.mean()
            optimizer.step()
            with torch.no_grad():
                alpha.clamp_(min=0)
                # All of them can only fall below 0 at once where the rate is larger than 1 / S.
                alpha.copy_(torch.where(alpha.sum() > 0, alpha / alpha.sum(), 1 / num_shards))
    return alpha.detach()


class GraphEraser:
    r"""Train one model per shard, predict by all of them, unlearn by retraining the shards that are touched.

    A retrained shard is bit for bit the model that it would have been without what is deleted. Two things remain of it,
    here as in the paper: which shard the other nodes are in, and, where features or edges of a deleted node are still in
    the graph given to `predict`, what it says to its neighbours.

    Args:
        make_model: Returns an untrained model, `forward(x, edge_index)` gives logits or log-probabilities `(N, C)`.
        num_shards: $S\ge1$; the papers use 20 for Cora and CiteSeer, 50 for larger graphs.
        partition: `"blpa"` (`balanced_lpa` on the edges), `"bekm"` (`balanced_kmeans` on `sage_embedding`) or `"random"`.
        aggregate: `"mean"`, `"majority"` or `"optimal"` (`aggregate_posteriors`).
        cap_delta: $\delta$ of `shard_cap`.
        seed: Of the partition, every shard's training and the learnt weights.
        config: How every shard trains, and BEKM's GraphSAGE; None takes the defaults. Its seed is replaced.

    Raises:
        ValueError: If `partition` or `aggregate` is unknown, or a number is out of range.

    Examples:
        >>> from graph_unlearn.data import synthetic_graph
        >>> from graph_unlearn.nets import GCN
        >>> from graph_unlearn.requests import NodeRequest, apply_request
        >>> data = synthetic_graph()
        >>> eraser = GraphEraser(lambda: GCN(32, 3), num_shards=4, config=TrainConfig(epochs=30)).fit(data)
        >>> request = NodeRequest(data.train_mask.nonzero()[:1].flatten())
        >>> posterior = eraser.unlearn(request).predict(apply_request(request, data))
        >>> posterior.shape, len(eraser.retrained)
        (torch.Size([300, 3]), 1)
    """

    assignment: Tensor
    "Shard of every node, shape `(N,)`; -1 outside training and for deleted nodes."
    models: list[nn.Module | None]
    "Model of every shard; None where no node is left."
    weights: Tensor | None
    "Learnt weights of the models that there are; None unless `aggregate` is `optimal`."
    retrained: tuple[int, ...]
    "Shards that the last `fit` or `unlearn` trained."
    seconds: dict[str, float]
    "Wall-clock time of the last `fit` or `unlearn`: partition, train, aggregate."

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        num_shards: int = 20,
        partition: Partition = "blpa",
        aggregate: Aggregate = "mean",
        cap_delta: float = 0.005,
        seed: int = 0,
        *,
        config: TrainConfig | None = None,
    ) -> None:
        check_choice("partition", partition, PARTITIONS)
        check_choice("aggregate", aggregate, AGGREGATES)
        check_count("num_shards", num_shards, low=1)
        check_number("cap_delta", cap_delta, low=0, high=1)
        self.make_model, self.num_shards = make_model, num_shards
        self.partition, self.aggregate = partition, aggregate
        self.cap_delta, self.seed = cap_delta, seed
        self.config = config or TrainConfig()
        self._data: Data | None = None

    def fit(self, data: Data) -> Self:
        """Partition the training nodes and train every shard's model on its own edges.

        Args:
            data: The graph, with `x`, `edge_index`, `y` and `train_mask`; kept for `unlearn`.

        Returns:
            This object.

        Raises:
            ValueError: If the graph lacks something or has fewer training nodes than shards.
        """
        check_data(data)
        start = time.perf_counter()
        self._data, self._outside = data, ~data.train_mask
        nodes = data.train_mask.nonzero().squeeze(1)
        self.assignment = torch.full_like(data.y, -1)
        self.assignment[nodes] = self._partitioned(data, nodes).to(nodes.device)
        partition = time.perf_counter() - start
        self.models = [None] * self.num_shards
        self._train(tuple(range(self.num_shards)))
        self.seconds["partition"] = partition
        return self

    def unlearn(self, request: Request) -> Self:
        """Delete, and retrain the shards that held what is deleted.

        A node or its features are in one shard, an edge in that of both ends; an edge between shards was never trained on.
        Learnt weights are learnt anew.

        Args:
            request: Nodes, edges or features of the graph given to `fit`.

        Returns:
            This object; `retrained` says which shards were.

        Raises:
            ValueError: If `fit` wasn't called, the request doesn't fit the graph, or no training node would be left.
        """
        data = self._fitted()
        check_request(request, data)
        touched = self._touched(request)
        after = apply_request(request, data)
        assignment = self.assignment.clone()
        if isinstance(request, NodeRequest):
            assignment[request.nodes.to(assignment.device)] = -1
        if not bool((assignment >= 0).any()):
            raise ValueError("train_mask would be empty: the request deletes every training node")
        self._data, self.assignment = after, assignment
        self._train(touched)
        return self

    @torch.no_grad()
    def predict(self, data: Data) -> Tensor:
        """Return the aggregated posteriors on a graph.

        Every model sees the edges among its own shard and the nodes outside training, as published.

        Args:
            data: The graph to predict on, with the nodes of `fit`: after `unlearn`, what is left of it.

        Returns:
            Class probabilities, shape `(N, C)`.

        Raises:
            ValueError: If `fit` wasn't called, or the graph has another number of nodes.
        """
        self._fitted()
        if data.x.shape[0] != self.assignment.numel():
            raise ValueError(f"data must have the {self.assignment.numel()} nodes of fit, got {data.x.shape[0]}")
        return aggregate_posteriors(self._posteriors(data, self._outside), self.aggregate, self.weights)

    def _fitted(self) -> Data:
        if self._data is None:
            raise ValueError("no model yet: call fit(data) first")
        return self._data

    def _partitioned(self, data: Data, nodes: Tensor) -> Tensor:
        """Return the shard of every training node."""
        generator = torch.Generator().manual_seed(self.seed)
        cap = shard_cap(nodes.numel(), self.num_shards, self.cap_delta)
        if self.partition == "random":
            return torch.randperm(nodes.numel(), generator=generator) % self.num_shards
        if self.partition == "bekm":
            config = dataclasses.replace(self.config, seed=self.seed)
            embedding = sage_embedding(training_graph(data), config)[nodes]
            return balanced_kmeans(embedding, self.num_shards, cap, generator=generator)
        edge_index, _ = subgraph(nodes, data.edge_index, relabel_nodes=True, num_nodes=data.y.numel())
        return balanced_lpa(edge_index, nodes.numel(), self.num_shards, cap, generator=generator)

    def _touched(self, request: Request) -> tuple[int, ...]:
        if isinstance(request, EdgeRequest):
            a, b = self.assignment[request.edges.to(self.assignment.device)]
            shards = a[a == b]
        else:
            shards = self.assignment[request.nodes.to(self.assignment.device)]
        return tuple(shards[shards >= 0].unique().tolist())

    def _train(self, shards: tuple[int, ...]) -> None:
        start = time.perf_counter()
        for shard in shards:
            # Every shard has a seed of its own, so that its model doesn't depend on which others are trained.
            config = dataclasses.replace(self.config, seed=self.seed * self.num_shards + shard)
            part = self._shard(shard)
            self.models[shard] = retrain(self.make_model, part, part.train_mask, config) if part.y.numel() else None
        trained = time.perf_counter()
        self.weights = self._learnt() if self.aggregate == "optimal" else None
        self.retrained = shards
        self.seconds = {"partition": 0.0, "train": trained - start, "aggregate": time.perf_counter() - trained}

    def _shard(self, shard: int) -> Data:
        data = self._fitted()
        nodes = (self.assignment == shard).nonzero().squeeze(1)
        edge_index, _ = subgraph(nodes, data.edge_index, relabel_nodes=True, num_nodes=data.y.numel())
        x = data.x[nodes] if data.x.layout == torch.strided else _rows(data.x, nodes)
        mask = torch.ones_like(nodes, dtype=torch.bool)
        return Data(x=x, edge_index=edge_index, y=data.y[nodes], train_mask=mask)

    def _posteriors(self, data: Data, seen: Tensor) -> Tensor:
        """Return every model's posteriors, shape (S, N, C), on the edges among its shard and the nodes in `seen`."""
        out = []
        for shard, model in enumerate(self.models):
            if model is not None:
                mask = seen | (self.assignment == shard)
                edge_index = data.edge_index[:, mask[data.edge_index].all(0)]
                with evaluation_mode(model):
                    out.append(model(data.x, edge_index).softmax(-1))
        return torch.stack(out)

    def _learnt(self) -> Tensor:
        data, generator = self._fitted(), torch.Generator().manual_seed(self.seed)
        nodes = (self.assignment >= 0).nonzero().squeeze(1)
        nodes = nodes[torch.randperm(nodes.numel(), generator=generator)[:SAMPLES].to(nodes.device)]
        seen = torch.zeros_like(self._outside)
        seen[nodes] = True
        with torch.no_grad():
            posteriors = self._posteriors(data, seen)[:, nodes]
        return learn_weights(posteriors, data.y[nodes], generator=generator)


def _rows(x: Tensor, nodes: Tensor) -> Tensor:
    """Return some rows of a sparse matrix in COO form: rows of CSR can't be picked."""
    entries: Tensor = x.to_sparse_coo()  # type: ignore[no-untyped-call]
    return entries.index_select(0, nodes).coalesce()


def _check_partition(num_nodes: int, num_shards: int, cap: int) -> None:
    if not 1 <= num_shards <= num_nodes:
        raise ValueError(f"num_shards must be between 1 and the number of nodes, {num_nodes}, got {num_shards!r}")
    if cap * num_shards < num_nodes:
        raise ValueError(f"cap must be at least {-(-num_nodes // num_shards)} for {num_nodes} nodes, got {cap!r}")
