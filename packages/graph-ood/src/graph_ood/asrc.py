r"""ASRC: cluster vectors without knowing how many clusters there are.

A graph auto-encoder (AdaGAE) learns an embedding and the graph that it is computed on, in turns. Robust continuous
clustering (RCC) finds clusters in the embedding; they choose the negatives of a contrastive loss that shapes the next
embedding, and their number bounds the growth of the neighbourhoods.

$$
\mathcal L=\underbrace{\frac1n\sum_{ij}p_{ij}\log\frac{p_{ij}}{q_{ij}}+\frac{\lambda}{n}\,\text{tr}(Z^\top(D-A)Z)}_{L_{GAE}}
+\beta\,L_{ssl},\qquad q_{ij}=\text{softmax}_j(-\|z_i-z_j\|^2)
$$

Source: C.-L. Ding, J. Wu, W. Lin, S. Shen, X. Wang, Y. Yuan, *Adaptive Self-supervised Robust Clustering for Unstructured
Data with Unknown Cluster Number*, 2024, arXiv:2407.20119. Its code isn't public. The auto-encoder is that of X. Li,
H. Zhang, R. Zhang, *Adaptive Graph Auto-Encoder for General Data Clustering*, TPAMI 2021, arXiv:2002.08648.
Documentation: `docs/papers/graph-ood/asrc.md`, which says what here is the paper's and what is derived.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator, ClusterMixin  # type: ignore[import-untyped]
from torch import Tensor, nn

from graph_ood._checks import (
    check_choice,
    check_count,
    check_fraction,
    check_matrix,
    check_not_negative,
    check_positive,
)
from graph_ood.rcc import (
    METRICS,
    RCC,
    as_points,
    check_neighbors,
    clustering_scores,
    identical_pairs,
    mutual_knn_graph,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[np.float64]
    IntArray = NDArray[np.int64]

__all__ = [
    "ASRC",
    "AdaGAE",
    "CanGraph",
    "adagae_forward",
    "can_graph",
    "clustering_scores",
    "prototype_contrastive_loss",
]

_TINY = 1e-10  # of the published program: in the threshold of the graph, in q and in the logarithm
_FAR = -50.0  # exponent below which a probability is nothing; smaller ones become denormal numbers, which are slow
_VIEWS = 5  # draws of dropped edges per outer epoch; features are drawn in every step

# How RCC reads an embedding; chosen on digits and UMIST.
_SHARE = 0.6  # of the edges that are shorter than what RCC takes its scales from
_FINAL_SHARES = (0.3, 0.6, 0.8)
_CUTS = np.concatenate([np.arange(0.5, 0.9, 0.03), np.arange(0.9, 1.0, 0.01)])
_RCC_SHORT = 1.001e-2


class CanGraph(NamedTuple):
    r"""A graph of adaptive neighbours; all parts are (n, n).

    Attributes:
        prob: Weights $p_{ij}$; rows sum to 1 (more among many identical points).
        adjacency: $A=(P+P^\top)/2$.
        normalized_adjacency: $S=D^{-1/2}AD^{-1/2}$.
        distance: Squared distances.
    """

    prob: Tensor
    adjacency: Tensor
    normalized_adjacency: Tensor
    distance: Tensor


def can_graph(x: Tensor, num_neighbors: int) -> CanGraph:
    r"""Weigh the nearest neighbours of every point so that the weights fall linearly to zero at the next one.

    $$p_{ij}=\frac{\max(0,d_i^{(k)}-d_{ij})}{k\,d_i^{(k)}-\sum_{r<k}d_i^{(r)}},\qquad
    d_i^{(0)}=0\le d_i^{(1)}\le\dots\text{ the sorted squared distances}$$

    The point itself is one of the k. It is the minimiser of $\sum_jp_{ij}d_{ij}+\gamma_ip_{ij}^2$ on the simplex with k
    non-zeros. Where more than k distances are equal to the smallest, each gets 1 / k, and the row sums to more than 1.
    Source: AdaGAE, equation 8, with the program's 1e-10 added to $d_i^{(k)}$.

    Args:
        x: Points (n, D), floating.
        num_neighbors: k, the point itself included, in [1, n - 1].

    Returns:
        The graph, in the dtype of `x`; distances are formed in float64.

    Raises:
        ValueError: If `x` isn't a finite float matrix, or `num_neighbors` is out of range.

    Examples:
        >>> import torch
        >>> can_graph(torch.tensor([[0.0], [1.0], [3.0]]), 2).prob.round(decimals=3)
        tensor([[0.5290, 0.4710, 0.0000],
                [0.4290, 0.5710, 0.0000],
                [0.0000, 0.3570, 0.6430]])
    """
    check_matrix("x", x)
    check_neighbors(num_neighbors, len(x), "num_neighbors")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x must be finite, got NaN or infinity")
    distance = _squared_distances(x.double())
    prob = _can_weights(distance, num_neighbors)
    adjacency = (prob + prob.T) / 2
    graph = (prob, adjacency, _normalized(adjacency), distance)
    return CanGraph(*(part.to(x.dtype) for part in graph))


def _squared_distances(x: Tensor) -> Tensor:
    x = x - x.mean(0)
    squared = x.square().sum(1)
    distance = squared[:, None] + squared[None, :] - 2 * (x @ x.T)
    return torch.maximum(distance, distance.T).clamp_min_(0).fill_diagonal_(0)


def _can_weights(distance: Tensor, k: int) -> Tensor:
    nearest = distance.topk(k + 1, dim=1, largest=False).values
    top = nearest[:, k:] + _TINY
    return (top - distance).clamp_min_(0).div_(k * top - nearest[:, :k].sum(1, keepdim=True))


def _normalized(adjacency: Tensor) -> Tensor:
    scale = adjacency.sum(1).rsqrt()
    return scale[:, None] * adjacency * scale[None, :]


def adagae_forward(
    x: Tensor, w1: Tensor, w2: Tensor, adjacency: Tensor, prob: Tensor, lam: float
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Embed the points, rebuild the neighbour probabilities, and return the loss of the graph auto-encoder.

    $$Z=S\,\text{relu}(S(XW_1))\,W_2,\qquad q_{ij}=\text{softmax}_j(-\|z_i-z_j\|^2)+10^{-10},$$

    $$L_{GAE}=\frac1n\sum_{ij}p_{ij}\log\Big(\frac{p_{ij}}{q_{ij}}+10^{-10}\Big)+\frac\lambda n\,\text{tr}(Z^\top(D-A)Z)$$

    Source: AdaGAE, equations 9 to 13, and its program.

    Args:
        x: Points (n, D).
        w1: First weights (D, hidden).
        w2: Second weights (hidden, e).
        adjacency: $A$ (n, n), symmetric, >= 0; `CanGraph.adjacency`.
        prob: $P$ (n, n), rows sum to 1; `CanGraph.prob`.
        lam: $\lambda\ge0$.

    Returns:
        The embedding (n, e), the probabilities $q$ (n, n), and the loss, a scalar.

    Raises:
        ValueError: If shapes don't fit or `lam` < 0.

    Examples:
        >>> import torch
        >>> x = torch.eye(4)
        >>> graph = can_graph(x, 2)
        >>> z, q, loss = adagae_forward(x, torch.eye(4), torch.eye(4), graph.adjacency, graph.prob, 0.1)
        >>> q.sum(1)
        tensor([1.0000, 1.0000, 1.0000, 1.0000])
    """
    check_matrix("x", x)
    n = len(x)
    check_matrix("w1", w1)
    check_matrix("w2", w2)
    if w1.shape[0] != x.shape[1] or w2.shape[0] != w1.shape[1]:
        raise ValueError(
            f"x, w1, w2 must be (n, D), (D, hidden), (hidden, e), got {[tuple(part.shape) for part in (x, w1, w2)]}"
        )
    for name, matrix in (("adjacency", adjacency), ("prob", prob)):
        if matrix.shape != (n, n):
            raise ValueError(f"{name} must be ({n}, {n}) for {n} points, got {tuple(matrix.shape)}")
    check_not_negative("lam", lam)
    s = _normalized(adjacency)
    z = _embed(s @ (x @ w1), s, w2)
    q = torch.softmax(-_pairwise(z), 1) + _TINY
    return z, q, _graph_loss(z, _Support.of(prob, adjacency), lam)


def _embed(first: Tensor, s: Tensor, w2: Tensor) -> Tensor:
    return s @ (torch.relu(first) @ w2)


def _pairwise(z: Tensor) -> Tensor:
    return torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist").square()


@dataclass(frozen=True)
class _Support:
    """The pairs with a weight: the loss needs distances only there, beside one sum per row."""

    place: Tensor
    row: Tensor
    prob: Tensor
    adjacency: Tensor

    @classmethod
    def of(cls, prob: Tensor, adjacency: Tensor) -> _Support:
        place = torch.nonzero(((prob != 0) | (adjacency != 0)).view(-1)).squeeze(1)
        row = torch.div(place, prob.shape[1], rounding_mode="floor")
        return cls(place, row, prob.reshape(-1)[place], adjacency.reshape(-1)[place])


def _graph_loss(z: Tensor, support: _Support, lam: float) -> Tensor:
    distance, total = _Distances.apply(z, support.place)
    q = torch.exp(-distance - total[support.row]) + _TINY
    divergence = support.prob * torch.log(support.prob / q + _TINY)
    # tr(Z'(D - A)Z) is half the sum of the weighted squared distances
    return cast("Tensor", (divergence.sum() + lam / 2 * (support.adjacency * distance).sum()) / len(z))


class _Distances(torch.autograd.Function):
    """Squared distances at some places (flat index), and logsumexp over each row of the negative distances.

    One (n, n) matrix is kept for the backward pass; plain autograd keeps five.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        z = z - z.mean(0)
        squared = z.square().sum(1)
        near = torch.addmm(-squared[None, :], z, z.T, alpha=2)
        near -= squared[:, None]
        distance = near.view(-1)[place].neg_().clamp_min_(0)
        # The largest entry of a row is the point itself, at distance 0: nothing overflows.
        total = near.clamp_(min=_FAR).exp_().sum(1)
        ctx.save_for_backward(z, place, near.div_(total[:, None]))
        return distance, total.log()

    @staticmethod
    def backward(ctx: Any, grad_distance: Tensor, grad_total: Tensor) -> tuple[Tensor, None]:
        z, place, soft = ctx.saved_tensors
        pull = soft * grad_total[:, None]
        pull.view(-1).index_add_(0, place, -grad_distance)
        pull = pull + pull.T
        return 2 * (pull @ z - pull.sum(1, keepdim=True) * z), None


def prototype_contrastive_loss(z1: Tensor, z2: Tensor, labels: Tensor, *, tau: float = 0.5) -> Tensor:
    r"""Contrast two views of every point with the prototypes of the clusters that it isn't in.

    $$L_{ssl}=-\frac1n\sum_i\log\frac{e^{z_i^1\cdot z_i^2/\tau}}
    {e^{z_i^1\cdot z_i^2/\tau}+\sum_{r\ne y_i}e^{z_i^1\cdot c_r/\tau}},\qquad
    c_r=\frac{\sum_{i:y_i=r}z_i^1}{\|\sum_{i:y_i=r}z_i^1\|}$$

    Rows are normalised first; the prototypes carry no gradient. Points of the own cluster are never negatives. With one
    cluster there are none, and the loss is 0. Source: derived from the abstract of the paper, which gives no formula.

    Args:
        z1: First view (n, e).
        z2: Second view (n, e).
        labels: Cluster of every point (n,), integers.
        tau: Temperature > 0.

    Returns:
        The mean over points, a scalar.

    Raises:
        ValueError: If shapes don't fit or `tau` isn't positive.

    Examples:
        >>> import torch
        >>> z = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> round(float(prototype_contrastive_loss(z, z, torch.tensor([0, 1]), tau=1.0)), 4)  # log(1 + 1 / e)
        0.3133
    """
    check_matrix("z1", z1)
    check_matrix("z2", z2, z1.shape[1])
    if z2.shape != z1.shape:
        raise ValueError(f"z1 and z2 must have the same shape, got {tuple(z1.shape)} and {tuple(z2.shape)}")
    if labels.shape != (len(z1),) or labels.is_floating_point():
        raise ValueError(f"labels must be {len(z1)} integers, one per row, got {labels.dtype} {tuple(labels.shape)}")
    check_positive("tau", tau)
    values, cluster = torch.unique(labels, return_inverse=True)
    if len(values) < 2:
        return 0.0 * (z1.sum() + z2.sum())
    return _contrast(z1, z2, cluster, len(values), tau)


def _contrast(z1: Tensor, z2: Tensor, cluster: Tensor, num_clusters: int, tau: float) -> Tensor:
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    with torch.no_grad():
        center = F.normalize(z1.new_zeros(num_clusters, z1.shape[1]).index_add_(0, cluster, z1), dim=1)
    positive = (z1 * z2).sum(1, keepdim=True) / tau
    negative = (z1 @ center.T / tau).scatter(1, cluster[:, None], -math.inf)
    return (torch.logsumexp(torch.cat([positive, negative], 1), 1, keepdim=True) - positive).mean()


class AdaGAE(nn.Module):
    r"""The two-layer graph encoder without biases, $Z=S\,\text{relu}(S(XW_1))\,W_2$.

    Args:
        in_channels: D.
        hidden: Width of the first layer.
        out_channels: Width of the embedding.
        generator: Source of the initial weights (uniform Glorot).

    Examples:
        >>> import torch
        >>> x = torch.eye(5)
        >>> AdaGAE(5, 8, 2)(x, can_graph(x, 2).normalized_adjacency).shape
        torch.Size([5, 2])
    """

    def __init__(
        self, in_channels: int, hidden: int = 256, out_channels: int = 64, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("hidden", hidden), ("out_channels", out_channels)):
            check_count(name, value)
        self.w1 = nn.Parameter(torch.empty(in_channels, hidden))
        self.w2 = nn.Parameter(torch.empty(hidden, out_channels))
        for weight in (self.w1, self.w2):
            nn.init.xavier_uniform_(weight, generator=generator)

    def forward(self, x: Tensor, normalized_adjacency: Tensor) -> Tensor:
        """Return the embedding (n, out_channels) of the points (n, D) on a graph (n, n)."""
        return _embed(normalized_adjacency @ (x @ self.w1), normalized_adjacency, self.w2)

    def embed(self, averaged: Tensor, normalized_adjacency: Tensor) -> Tensor:
        """The same from $SX$, which doesn't change while the graph stays."""
        return _embed(averaged @ self.w1, normalized_adjacency, self.w2)


class ASRC(ClusterMixin, BaseEstimator):  # type: ignore[misc]
    r"""Clustering with an unknown number of clusters, a scikit-learn estimator.

    Each outer epoch takes `inner_steps` steps of Adam on $L_{GAE}+\beta L_{ssl}$, embeds the points, rebuilds the graph
    with `neighbor_step` more neighbours as long as there are fewer than n / (clusters found), and clusters the embedding.

    RCC works with lengths that mean nothing in a learnt embedding. Three things make it work here (derived). Its edges
    are those between mutual neighbours of the input. The embedding is scaled so that a given share of these edges is
    shorter than what RCC takes its scales from. Representatives are joined below the length that gives the partition with the
    highest modularity on the graph of the edges, after pieces of fewer than `min_size` points have gone to the neighbour
    with which they share most edges. None of this looks at labels.

    Memory is a few (n, n) matrices in float32, a step takes O(n^2 e): made for n up to about 1e4.

    Args:
        k: Neighbours in the graph of RCC, in [1, n - 1].
        metric: `"euclidean"` or `"cosine"`, of that graph.
        num_neighbors: Neighbours in the first graph of the auto-encoder, the point itself not counted, in [1, n - 2].
        neighbor_step: Neighbours added per outer epoch, >= 0.
        max_neighbors: Where the growth ends; None: n / (clusters found).
        epochs: Outer epochs, >= 1.
        inner_steps: Steps per outer epoch, >= 1.
        lr: Learning rate of Adam.
        lam: $\lambda\ge0$, weight of the smoothness term.
        beta: $\beta\ge0$, weight of the contrastive loss; 0 leaves it out.
        tau: Its temperature.
        feature_drop: Share of features that the second view lacks, in [0, 1).
        edge_drop: Share of edges that it lacks, in [0, 1).
        input_share: Weight of the input's graph in every later one, in [0, 1].
        hidden: Width of the first layer.
        out_channels: Width of the embedding.
        min_size: Smallest cluster, >= 1.
        seed: Seed of the weights and views.
        device: Torch device of the training; RCC runs on the CPU.

    Attributes:
        labels_: Cluster of every point (n,).
        num_clusters_: How many were found.
        embedding_: $Z$ (n, out_channels), a float32 array.
        graph_: The graph of the last outer epoch, a `CanGraph` on the CPU.
        history_: One dict per outer epoch: `epoch`, `loss`, `gae`, `ssl`, `num_neighbors`, `num_clusters`,
            `modularity`, `seconds`.
        modularity_: Of the result, on the graph of RCC.
        n_features_in_: D.

    Examples:
        >>> import torch
        >>> g = torch.Generator().manual_seed(0)
        >>> x = torch.eye(3, 8).repeat_interleave(40, 0) + 0.1 * torch.randn(120, 8, generator=g)
        >>> ASRC(epochs=2, inner_steps=20).fit(x).num_clusters_
        3
    """

    def __init__(
        self,
        k: int = 10,
        metric: Literal["euclidean", "cosine"] = "cosine",
        num_neighbors: int = 5,
        neighbor_step: int = 5,
        max_neighbors: int | None = None,
        epochs: int = 6,
        inner_steps: int = 50,
        lr: float = 5e-3,
        lam: float = 0.25,
        beta: float = 1.0,
        tau: float = 0.5,
        feature_drop: float = 0.1,
        edge_drop: float = 0.1,
        input_share: float = 0.0,
        hidden: int = 256,
        out_channels: int = 64,
        min_size: int = 5,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.k = k
        self.metric = metric
        self.num_neighbors = num_neighbors
        self.neighbor_step = neighbor_step
        self.max_neighbors = max_neighbors
        self.epochs = epochs
        self.inner_steps = inner_steps
        self.lr = lr
        self.lam = lam
        self.beta = beta
        self.tau = tau
        self.feature_drop = feature_drop
        self.edge_drop = edge_drop
        self.input_share = input_share
        self.hidden = hidden
        self.out_channels = out_channels
        self.min_size = min_size
        self.seed = seed
        self.device = device

    def fit(
        self, x: Tensor | ArrayLike, y: object = None, *, on_epoch: Callable[[dict[str, Any]], None] | None = None
    ) -> Self:
        """Learn the embedding and cluster the points.

        Args:
            x: Points (n, D), finite; they are divided by the largest absolute entry.
            y: Not used.
            on_epoch: Called with every entry of `history_`.

        Returns:
            The estimator itself.

        Raises:
            ValueError: If `x` or a parameter is out of range, or the loss stops being finite.
        """
        del y
        points = as_points(x)
        self._check_parameters(len(points))
        self.n_features_in_ = points.shape[1]
        points = points / (np.abs(points).max() or 1.0)
        graph = _Links(mutual_knn_graph(points, self.k, self.metric).numpy(), identical_pairs(points), self.min_size)
        run = _Training(self, points)
        partition = _partition(_principal(points), graph, (_SHARE,))
        self.history_ = []
        for epoch in range(self.epochs):
            start = time.perf_counter()
            losses = run.epoch(partition.labels)
            shares = _FINAL_SHARES if epoch == self.epochs - 1 else (_SHARE,)
            neighbors = run.num_neighbors
            partition = _partition(run.embedding.cpu().numpy().astype(np.float64), graph, shares)
            if epoch < self.epochs - 1:
                run.update_graph(self._most_neighbors(len(points), partition.num_clusters))
            record = {
                "epoch": epoch,
                **losses,
                "num_neighbors": neighbors,
                "num_clusters": partition.num_clusters,
                "modularity": partition.modularity,
                "seconds": time.perf_counter() - start,
            }
            self.history_.append(record)
            if on_epoch is not None:
                on_epoch(record)
        self.labels_ = partition.labels
        self.num_clusters_ = partition.num_clusters
        self.modularity_ = partition.modularity
        self.embedding_ = run.embedding.cpu().numpy()
        self.graph_ = CanGraph(*(part.cpu() for part in run.graph))
        return self

    def _most_neighbors(self, n: int, num_clusters: int) -> int:
        if self.max_neighbors is not None:
            return min(self.max_neighbors, n - 1)
        return n // max(2, min(num_clusters, n // self.num_neighbors))

    def _check_parameters(self, n: int) -> None:
        check_neighbors(self.k, n)
        check_choice("metric", self.metric, METRICS)
        check_neighbors(self.num_neighbors, n - 1, "num_neighbors")
        check_count("neighbor_step", self.neighbor_step, 0)
        for name in ("epochs", "inner_steps", "hidden", "out_channels", "min_size"):
            check_count(name, getattr(self, name))
        if self.max_neighbors is not None:
            check_count("max_neighbors", self.max_neighbors)
        for name in ("lr", "tau"):
            check_positive(name, getattr(self, name))
        for name in ("lam", "beta"):
            check_not_negative(name, getattr(self, name))
        check_count("seed", self.seed, 0)
        check_fraction("input_share", self.input_share)
        for name in ("feature_drop", "edge_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)!r}")


class _Training:
    """Encoder, optimiser and graph of one fit."""

    def __init__(self, options: ASRC, points: Array) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.generator = torch.Generator().manual_seed(options.seed)
        self.x = torch.from_numpy(points).float().to(self.device)
        model = AdaGAE(self.x.shape[1], options.hidden, options.out_channels, generator=self.generator)
        self.model = model.to(self.device)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
        self.num_neighbors = options.num_neighbors + 1
        self.graph = can_graph(self.x, self.num_neighbors)
        self.input_prob = self.graph.prob
        self.embedding = self.x

    def epoch(self, labels: IntArray) -> dict[str, float]:
        """Train for one outer epoch and embed the points; return the mean losses."""
        options, s = self.options, self.graph.normalized_adjacency
        averaged = s @ self.x
        # sum A d = sum P d for symmetric d
        support = _Support.of(self.graph.prob, self.graph.prob)
        cluster = torch.from_numpy(labels).to(self.device)
        num_clusters = int(labels.max()) + 1
        contrast = options.beta > 0 and num_clusters > 1
        sums = torch.zeros(2, device=self.device)
        for step in range(options.inner_steps):
            z = self.model.embed(averaged, s)
            loss = gae = _graph_loss(z, support, options.lam)
            ssl = gae.new_zeros(())
            if contrast:
                if step % math.ceil(options.inner_steps / _VIEWS) == 0:
                    sparser = self._drop_edges()
                    averaged_again = sparser @ self.x
                second = self.model.embed(averaged_again * self._keep_features(), sparser)
                ssl = _contrast(z, second, cluster, num_clusters, options.tau)
                loss = gae + options.beta * ssl
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            sums += torch.stack([gae.detach(), ssl.detach()])
        with torch.no_grad():
            self.embedding = self.model.embed(averaged, s)
        gae_mean, ssl_mean = (sums / options.inner_steps).tolist()
        total = gae_mean + options.beta * ssl_mean
        if not (math.isfinite(total) and bool(torch.isfinite(self.embedding).all())):
            raise ValueError(f"the loss is {total}; a smaller lr than {options.lr} may help")
        return {"loss": total, "gae": gae_mean, "ssl": ssl_mean}

    def update_graph(self, most: int) -> None:
        """Build the next graph from the embedding, unless the neighbourhoods have their full size."""
        if self.num_neighbors >= most:
            return
        options = self.options
        self.num_neighbors = min(self.num_neighbors + options.neighbor_step, most)
        self.graph = can_graph(self.embedding, self.num_neighbors)
        if options.input_share:
            prob = (1 - options.input_share) * self.graph.prob + options.input_share * self.input_prob
            adjacency = (prob + prob.T) / 2
            self.graph = CanGraph(prob, adjacency, _normalized(adjacency), self.graph.distance)

    def _drop_edges(self) -> Tensor:
        adjacency = self.graph.adjacency
        drawn = torch.rand(adjacency.shape, generator=self.generator).to(self.device)
        keep = (drawn >= self.options.edge_drop).triu(1)
        return _normalized(adjacency * (keep | keep.T).fill_diagonal_(True))

    def _keep_features(self) -> Tensor:
        drop = self.options.feature_drop
        drawn = torch.rand(self.x.shape[1], generator=self.generator).to(self.device)
        return (drawn >= drop) / (1 - drop)


# --- reading clusters off an embedding ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Partition:
    labels: IntArray
    modularity: float

    @property
    def num_clusters(self) -> int:
        return int(self.labels.max()) + 1


@dataclass(frozen=True)
class _Links:
    """Who may be joined (edges), who must be (identical points), and how small a piece may stay."""

    edges: IntArray
    identical: IntArray
    min_size: int


def _partition(z: Array, graph: _Links, shares: tuple[float, ...]) -> _Partition:
    """Run RCC at every scale and return the joined pieces of the highest modularity, ties to the first."""
    best: _Partition | None = None
    edges = graph.edges
    for share in shares:
        fitted = RCC().fit(_rescaled(z, edges, share), edges)
        length = _lengths(fitted.representatives_, edges)
        for cut in np.unique(np.quantile(length, _CUTS)):
            joined = np.concatenate([edges[length <= cut], graph.identical])
            labels = _absorb_small(_components(len(z), joined), edges, graph.min_size)
            candidate = _Partition(labels, _modularity(labels, edges))
            if best is None or candidate.modularity > best.modularity:
                best = candidate
    return cast("_Partition", best)


def _rescaled(z: Array, edges: IntArray, share: float) -> Array:
    """Scale so that this share of the edges is shorter than the length from which RCC counts edges."""
    length = _lengths(z, edges)
    typical = float(np.quantile(length, share)) or float(length.max())
    return z * (_RCC_SHORT * math.sqrt(z.shape[1]) / typical) if typical > 0 else z


def _lengths(z: Array, edges: IntArray) -> Array:
    return cast("Array", np.linalg.norm(z[edges[:, 0]] - z[edges[:, 1]], axis=1))


def _components(n: int, edges: IntArray) -> IntArray:
    import scipy.sparse as sp  # type: ignore[import-untyped]
    from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped]

    graph = sp.coo_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(n, n))
    return cast("IntArray", connected_components(graph, directed=False)[1].astype(np.int64))


def _absorb_small(labels: IntArray, edges: IntArray, min_size: int) -> IntArray:
    """Join every piece that is too small to the one with which it shares most edges, until none has such a neighbour."""
    import scipy.sparse as sp

    while True:
        size = np.bincount(labels)
        a, b = labels[edges].T
        across = a != b
        shared = sp.coo_array((np.ones(across.sum()), (a[across], b[across])), shape=(len(size), len(size))).tocsr()
        shared = (shared + shared.T).tocsr()
        small = np.flatnonzero((size < min_size) & (np.diff(shared.indptr) > 0))
        if not len(small):
            return labels
        host = np.asarray(shared[small].argmax(axis=1)).ravel()
        labels = _components(len(size), np.stack([small, host], 1))[labels]


def _modularity(labels: IntArray, edges: IntArray) -> float:
    a, b = labels[edges].T
    degree = np.bincount(np.concatenate([a, b])) / (2 * len(edges))
    return float((a == b).mean() - (degree**2).sum())


def _principal(x: Array) -> Array:
    """Rotate to at most n columns; all distances stay."""
    if x.shape[1] <= len(x):
        return x
    left, values, _ = np.linalg.svd(x, full_matrices=False)
    return cast("Array", left * values)
