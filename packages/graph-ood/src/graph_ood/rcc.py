r"""RCC, robust continuous clustering: clusters as the connected pieces of points that were pulled together.

Every point $x_i$ gets a representative $u_i$. Neighbours pull their representatives together through a robust penalty that
lets go of pairs that don't belong together; its scale $\mu$ shrinks until only real clusters hold. The number of clusters
is a result, not an argument.

$$
\min_{U,l}\ \tfrac12\sum_i\|x_i-u_i\|^2
+\tfrac\lambda2\sum_{(p,q)}w_{pq}\big[l_{pq}\|u_p-u_q\|^2+\mu(\sqrt{l_{pq}}-1)^2\big]
$$

Source: S. A. Shah, V. Koltun, *Robust Continuous Clustering*, PNAS 114(37), 2017. Documentation:
`docs/papers/graph-ood/asrc.md`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClusterMixin  # type: ignore[import-untyped]

if TYPE_CHECKING:
    import scipy.sparse as sp  # type: ignore[import-untyped]
    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor

    Array = NDArray[np.float64]
    IntArray = NDArray[np.int64]

__all__ = ["RCC", "clustering_scores", "mutual_knn_graph"]

Metric = Literal["euclidean", "cosine"]
METRICS = ("euclidean", "cosine")
SOLVERS = ("cg", "lu")

# Constants of the published program.
_DISTANCE_FLOOR = 1e-5  # added to every squared coordinate difference
_SHORT = 1e-2  # edges shorter than this per root dimension don't count for the scales
_SHORTEST = 0.01  # share of the edges that the two small scales average
_MAX_DELTA_EDGES = 250
_STALLED = 0.1  # a smaller change of the objective ends a stage

_SYMMETRIC: dict[str, Any] = {"diag_pivot_thresh": 0.0, "options": {"SymmetricMode": True}}
_CG_TOLERANCE, _CG_STEPS = 1e-6, 1000


def mutual_knn_graph(x: Tensor | ArrayLike, k: int = 10, metric: Metric = "euclidean") -> Tensor:
    r"""Return the edges between mutual neighbours, and those of a minimum spanning tree.

    $$\{(i,j):i\in\text{kNN}(j)\wedge j\in\text{kNN}(i)\}\ \cup\ \text{MST}(\text{kNN graph})$$

    The tree spans each connected part of the graph of the k nearest neighbours, so no point is alone. Identical points
    count as neighbours of each other however many there are. Equation: Shah and Koltun, section "Connectivity structure".

    Args:
        x: Points (n, D), finite.
        k: Neighbours of a point, in [1, n - 1].
        metric: `"euclidean"` or `"cosine"`.

    Returns:
        Edges (E, 2), int64, each with i < j, in lexicographic order.

    Raises:
        ValueError: If `x` isn't a finite matrix of two rows or more, `k` is out of range, or `metric` is unknown.

    Examples:
        >>> import torch
        >>> mutual_knn_graph(torch.tensor([[0.0], [1.0], [5.0], [7.0]]), k=1)
        tensor([[0, 1],
                [2, 3]])
    """
    points = as_points(x)
    _check_metric(metric)
    check_neighbors(k, len(points))
    return torch.from_numpy(_knn_edges(points, k, metric))


def clustering_scores(labels_true: Tensor | ArrayLike, labels_pred: Tensor | ArrayLike) -> dict[str, float]:
    r"""Compare a clustering with the true classes; the numbers of clusters may differ.

    $$\text{ACC}=\frac1n\max_{m\text{ one-to-one}}\sum_i[m(\hat y_i)=y_i]$$

    Points of predicted clusters that are matched with no class count as errors.

    Args:
        labels_true: Class of every point (n,).
        labels_pred: Cluster of every point (n,), any integers; a label of its own for noise is one more cluster.

    Returns:
        `acc`; `nmi`, normalised by the arithmetic mean; `ari`, the adjusted Rand index; `ami`, the adjusted mutual
        information; `num_clusters`, the number of different predicted labels (an int).

    Raises:
        ValueError: If the labels aren't vectors of the same length >= 1.

    Examples:
        >>> scores = clustering_scores([0, 0, 1, 1], [5, 5, 2, 7])
        >>> scores["acc"], scores["num_clusters"]
        (0.75, 3)
    """
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
    from sklearn import metrics  # type: ignore[import-untyped]
    from sklearn.metrics.cluster import contingency_matrix  # type: ignore[import-untyped]

    true, pred = as_numpy(labels_true), as_numpy(labels_pred)
    if true.ndim != 1 or true.shape != pred.shape or not len(true):
        raise ValueError(
            f"labels must be two vectors of the same length >= 1, got labels_true {true.shape} and labels_pred {pred.shape}"
        )
    table = contingency_matrix(true, pred)
    rows, columns = linear_sum_assignment(table, maximize=True)
    return {
        "acc": float(table[rows, columns].sum() / len(true)),
        "nmi": float(metrics.normalized_mutual_info_score(true, pred)),
        "ari": float(metrics.adjusted_rand_score(true, pred)),
        "ami": float(metrics.adjusted_mutual_info_score(true, pred)),
        "num_clusters": table.shape[1],
    }


class RCC(ClusterMixin, BaseEstimator):  # type: ignore[misc]
    r"""Robust continuous clustering, a scikit-learn estimator.

    With the weights $l_{pq}=\big(\mu/(\mu+\|u_p-u_q\|^2)\big)^2$ fixed, the representatives solve

    $$(I+\lambda(D-R))\,U=X,\qquad R_{pq}=w_{pq}l_{pq},\quad D=\text{diag}(R\mathbf 1),\quad
    \lambda=\|X\|_2/\lambda_{\max}(D-R)$$

    Both are alternated, with $\mu$ halved every few rounds. Clusters are the connected components of the edges whose
    representatives are closer than `threshold` times the mean of the shortest percent of all edges.

    Several constants of the method are absolute lengths: scale features to about [0, 1] before (`x / x.max()`). On fewer
    than a hundred points the shortest percent is one edge and the result has too many clusters. Points spread evenly over
    one or two dimensions have very short edges among them, with the same result.

    Args:
        k: Neighbours in the graph, in [1, n - 1].
        metric: `"euclidean"` or `"cosine"`, for the graph alone.
        threshold: Factor of the length below which representatives are joined, > 0.
        max_iter: Largest number of rounds, >= 1.
        inner_iter: Rounds before the scale shrinks, >= 1.
        solver: `"lu"`, a sparse factorisation, the faster one up to 1e4 points at least, or `"cg"`, conjugate gradients
            on all columns at once from the previous solution, which needs no more memory than the graph.

    Attributes:
        labels_: Cluster of every point (n,), 0 to `num_clusters_` - 1 in the order of first appearance.
        num_clusters_: How many were found.
        representatives_: $U$ (n, D).
        edges_: Edges of the graph (E, 2).
        edge_weights_: $w$ (E,).
        objective_: The objective of every round; it doesn't rise while `scale_` stays.
        scale_: $\mu$ of every round.
        cut_: The length below which representatives were joined.
        n_features_in_: D.

    Examples:
        >>> import torch
        >>> g = torch.Generator().manual_seed(0)
        >>> x = torch.eye(3, 16).repeat_interleave(100, 0) + 0.1 * torch.randn(300, 16, generator=g)
        >>> RCC().fit(x).num_clusters_
        3
    """

    def __init__(
        self,
        k: int = 10,
        metric: Metric = "euclidean",
        threshold: float = 1.0,
        max_iter: int = 100,
        inner_iter: int = 4,
        solver: Literal["cg", "lu"] = "lu",
    ) -> None:
        self.k = k
        self.metric = metric
        self.threshold = threshold
        self.max_iter = max_iter
        self.inner_iter = inner_iter
        self.solver = solver

    def fit(
        self,
        x: Tensor | ArrayLike,
        edges: Tensor | ArrayLike | None = None,
        edge_weights: Tensor | ArrayLike | None = None,
    ) -> Self:
        """Cluster the points.

        Args:
            x: Points (n, D), finite, n >= 2.
            edges: Graph (E, 2) to use instead of the mutual neighbours, each edge once; then `k` and `metric` aren't
                used.
            edge_weights: Positive factors (E,) of the edges' usual weights.

        Returns:
            The estimator itself.

        Raises:
            ValueError: If `x`, `edges`, `edge_weights` or a parameter is out of range.
        """
        points = as_points(x)
        self._check_parameters()
        if edges is None:
            check_neighbors(self.k, len(points))
            pairs = _knn_edges(points, self.k, self.metric)
        else:
            pairs = _given_edges(edges, len(points))
        self.n_features_in_ = points.shape[1]
        self.edges_ = torch.from_numpy(pairs)
        self.edge_weights_ = _edge_weights(pairs, len(points), edge_weights)
        run = _Run(points, pairs, self.edge_weights_, solver=self.solver, inner_iter=self.inner_iter)
        run.solve(self.max_iter)
        self.representatives_ = run.u[run.place]
        self.objective_ = np.array(run.objective)
        self.scale_ = np.array(run.scales)
        self.cut_ = self.threshold * run.short
        self.labels_ = _components(len(points), pairs[run.lengths() <= self.cut_])
        self.num_clusters_ = int(self.labels_.max()) + 1
        return self

    def _check_parameters(self) -> None:
        _check_metric(self.metric)
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be 'cg' or 'lu', got {self.solver!r}")
        if not (self.threshold > 0 and math.isfinite(self.threshold)):
            raise ValueError(f"threshold must be a positive finite number, got {self.threshold!r}")
        for name in ("max_iter", "inner_iter"):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


class _Run:
    """The alternation: state of one fit."""

    def __init__(self, x: Array, pairs: IntArray, weights: Array, *, solver: str, inner_iter: int) -> None:
        # The pattern of the matrix never changes, so the order of elimination is found once.
        self.order = _elimination_order(len(x), pairs) if solver == "lu" else np.arange(len(x))
        self.place = np.argsort(self.order)
        self.x = x[self.order]
        self.u = self.x.copy()
        self.i, self.j = self.place[pairs].T
        self.weights = weights
        self.solver, self.inner_iter = solver, inner_iter
        self.objective: list[float] = []
        self.scales: list[float] = []
        self.mu, self.delta, self.short = _scales(self.squared() + x.shape[1] * _DISTANCE_FLOOR, x.shape[1])
        self.norm = _spectral_norm(x)
        self.vector: Array | None = None
        self.set_lambda(weights)

    def squared(self) -> Array:
        difference = self.u[self.i] - self.u[self.j]
        return cast("Array", np.einsum("ed,ed->e", difference, difference))

    def lengths(self) -> Array:
        return cast("Array", np.sqrt(self.squared()))

    def laplacian(self, values: Array) -> sp.csr_array:
        import scipy.sparse as sp

        n = len(self.x)
        half = sp.coo_array((values, (self.i, self.j)), shape=(n, n)).tocsr()
        full = half + half.T
        return (sp.diags_array(full.sum(axis=1)) - full).tocsr()

    def set_lambda(self, values: Array) -> None:
        largest, self.vector = _largest_eigenvalue(self.laplacian(values), self.vector)
        self.lam = self.norm / largest if largest > 0 else 0.0

    def solve(self, max_iter: int) -> None:
        previous, inner = 0.0, 0
        for _ in range(max_iter):
            squared = self.squared()
            line = (self.mu / (self.mu + squared)) ** 2  # Geman-McClure
            pull = self.weights * line
            value = self.value(squared, line)
            self.objective.append(value)
            self.scales.append(self.mu)
            laplacian = self.laplacian(pull)
            self.u = _solve(laplacian, self.lam, self.x, self.u, self.solver)
            inner += 1
            last, stalled, previous = inner == self.inner_iter, abs(previous - value) < _STALLED, value
            if not (last or stalled):
                continue
            if self.mu >= self.delta:  # the program compares with delta, not with its square
                self.mu /= 2
            elif last:
                self.mu = self.delta / 2
            else:
                return
            self.set_lambda(pull)
            inner = 0

    def value(self, squared: Array, line: Array) -> float:
        fit = ((self.x - self.u) ** 2).sum()
        pairs = self.weights * (line * squared + self.mu * (np.sqrt(line) - 1) ** 2)
        return float(0.5 * fit + 0.5 * self.lam * pairs.sum())


def _scales(squared: Array, dims: int) -> tuple[float, float, float]:
    """Return the first mu, delta, and the mean length of the shortest percent of the edges."""
    length = np.sqrt(squared)
    length[length / math.sqrt(dims) < _SHORT] = length.max()
    length.sort()
    percent = math.ceil(_SHORTEST * len(length))
    mu = 3.0 * float(length[-1]) ** 2
    return mu, float(length[: min(_MAX_DELTA_EDGES, percent)].mean()), float(length[:percent].mean())


def _spectral_norm(x: Array) -> float:
    """Return the largest singular value, from the smaller Gram matrix."""
    from scipy.linalg import eigh  # type: ignore[import-untyped]

    gram = x.T @ x if x.shape[1] <= len(x) else x @ x.T
    last = len(gram) - 1
    return math.sqrt(max(float(eigh(gram, eigvals_only=True, subset_by_index=[last, last])[0]), 0.0))


def _largest_eigenvalue(matrix: sp.csr_array, start: Array | None) -> tuple[float, Array]:
    """Return the largest eigenvalue of a symmetric matrix and its vector, from which a next call starts."""
    from scipy.sparse.linalg import eigsh  # type: ignore[import-untyped]

    n = matrix.shape[0]
    if n <= 20:
        values, vectors = np.linalg.eigh(matrix.toarray())
        return float(values[-1]), vectors[:, -1]
    begin = np.random.default_rng(0).standard_normal(n) if start is None else start
    values, vectors = eigsh(matrix, k=1, which="LA", v0=begin, tol=1e-5)
    return float(values[0]), vectors[:, 0]


def _elimination_order(n: int, pairs: IntArray) -> IntArray:
    """Return the order of the points in which a factorisation of the graph's matrix fills least (minimum degree)."""
    import scipy.sparse as sp
    from scipy.sparse.linalg import splu

    half = sp.coo_array((np.full(len(pairs), -1.0), pairs.T), shape=(n, n))
    matrix = half + half.T + sp.diags_array(np.bincount(pairs.ravel(), minlength=n) + 1.0)
    return np.argsort(splu(matrix.tocsc(), permc_spec="MMD_AT_PLUS_A", **_SYMMETRIC).perm_c)


def _solve(laplacian: sp.csr_array, lam: float, x: Array, start: Array, solver: str) -> Array:
    """Solve (I + lam * laplacian) U = X."""
    import scipy.sparse as sp
    from scipy.sparse.linalg import splu

    matrix = (sp.eye_array(len(x), format="csr") + lam * laplacian).tocsr()
    if solver == "lu":
        factors = splu(
            matrix.tocsc(), permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True}
        )
        return cast("Array", factors.solve(x))
    return _conjugate_gradients(matrix, x, start)


def _conjugate_gradients(matrix: sp.csr_array, b: Array, start: Array) -> Array:
    """Solve for all columns of `b` at once, each with its own step length, scaled by the diagonal."""
    inverse = 1.0 / matrix.diagonal()[:, None]
    x = start.copy()
    residual = b - matrix @ x
    tolerance = (_CG_TOLERANCE * np.linalg.norm(b, axis=0)) ** 2
    z = inverse * residual
    direction = z.copy()
    product = np.einsum("nd,nd->d", residual, z)
    for _ in range(_CG_STEPS):
        if (np.einsum("nd,nd->d", residual, residual) <= tolerance).all():
            break
        moved = matrix @ direction
        curvature = np.einsum("nd,nd->d", direction, moved)
        step = np.divide(product, curvature, out=np.zeros_like(product), where=curvature > 0)
        x += step * direction
        residual -= step * moved
        np.multiply(inverse, residual, out=z)
        following = np.einsum("nd,nd->d", residual, z)
        direction *= np.divide(following, product, out=np.zeros_like(product), where=product > 0)
        direction += z
        product = following
    return x


def _knn_edges(points: Array, k: int, metric: str) -> IntArray:
    import scipy.sparse as sp
    from scipy.sparse.csgraph import minimum_spanning_tree  # type: ignore[import-untyped]
    from sklearn.neighbors import NearestNeighbors  # type: ignore[import-untyped]

    n = len(points)
    length, neighbor = NearestNeighbors(n_neighbors=k, metric=metric).fit(points).kneighbors()
    row, column = np.repeat(np.arange(n), k), neighbor.ravel()
    near = sp.csr_array((np.ones(n * k), (row, column)), shape=(n, n))
    # To the tree a length of 0 is no edge; identical points that aren't among k neighbours are linked in a chain.
    tiny = np.finfo(np.float64).tiny
    twin, next_twin = identical_pairs(points).T
    entries = np.concatenate([np.maximum(length.ravel(), tiny), np.full(len(twin), tiny)])
    place = (np.concatenate([row, twin]), np.concatenate([column, next_twin]))
    # scipy before 1.13 takes 32-bit places only
    tree = minimum_spanning_tree(sp.csr_array((entries, [p.astype(np.int32) for p in place]), shape=(n, n)))
    linked = sp.triu(near.minimum(near.T) + tree + tree.T, k=1).tocoo()
    return _sorted_pairs(linked.row, linked.col)


def identical_pairs(points: Array) -> IntArray:
    """Return pairs (m, 2) that chain identical points: every point but the last of its kind, and the next."""
    kind = np.unique(points, axis=0, return_inverse=True)[1].ravel()
    order = np.argsort(kind, kind="stable")
    same = kind[order[:-1]] == kind[order[1:]]
    return np.stack([order[:-1][same], order[1:][same]], 1).astype(np.int64)


def _sorted_pairs(a: IntArray, b: IntArray) -> IntArray:
    order = np.lexsort((b, a))
    return np.stack([a[order], b[order]], 1).astype(np.int64)


def _given_edges(edges: Tensor | ArrayLike, n: int) -> IntArray:
    """Return given edges as (E, 2), each row with the smaller end first, in the given order."""
    pairs = as_numpy(edges)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs) or not np.issubdtype(pairs.dtype, np.integer):
        raise ValueError(f"edges must be integers of shape (E, 2) with E >= 1, got {pairs.dtype} {pairs.shape}")
    if pairs.min() < 0 or pairs.max() >= n:
        raise ValueError(f"edges must hold indices in [0, {n - 1}], got {pairs.min()} to {pairs.max()}")
    pairs = np.sort(pairs, axis=1).astype(np.int64)
    if (pairs[:, 0] == pairs[:, 1]).any():
        raise ValueError("edges must join two different points, got a loop")
    if len(np.unique(pairs, axis=0)) < len(pairs):
        raise ValueError("edges must hold every edge once, got an edge twice")
    return pairs


def _edge_weights(pairs: IntArray, n: int, given: Tensor | ArrayLike | None) -> Array:
    r"""Return $w_{pq}=\text{mean}(N)/\sqrt{N_pN_q}$ with the numbers of edges N, times the given factors."""
    count = np.bincount(pairs.ravel(), minlength=n)
    weights = count.mean() / np.sqrt(count[pairs[:, 0]] * count[pairs[:, 1]])
    if given is None:
        return cast("Array", weights)
    factors = as_numpy(given).astype(np.float64)
    if factors.shape != weights.shape or not (np.isfinite(factors) & (factors > 0)).all():
        raise ValueError(
            f"edge_weights must be {len(pairs)} positive finite numbers, one per edge, got shape {factors.shape}"
        )
    return cast("Array", weights * factors)


def _components(n: int, pairs: IntArray) -> IntArray:
    import scipy.sparse as sp
    from scipy.sparse.csgraph import connected_components

    graph = sp.csr_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    return cast("IntArray", connected_components(graph, directed=False)[1].astype(np.int64))


def as_numpy(values: Any) -> NDArray[Any]:
    """Return an array; a tensor is detached and fetched."""
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def as_points(x: Any) -> Array:
    """Return `x` as a float64 matrix of two finite rows or more.

    Raises:
        ValueError: If it is anything else.
    """
    try:
        points = as_numpy(x).astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"x must be a matrix of numbers, got {type(x).__name__}") from error
    if points.ndim != 2 or len(points) < 2 or not points.shape[1]:
        raise ValueError(f"x must be a matrix (n, D) with n >= 2 and D >= 1, got shape {points.shape}")
    if not np.isfinite(points).all():
        raise ValueError("x must be finite, got NaN or infinity")
    return points


def check_neighbors(k: int, n: int, name: str = "k") -> None:
    """Raise ValueError unless `k` is an integer in [1, n - 1]."""
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 1 <= k < n:
        raise ValueError(f"{name} must be an integer in [1, {n - 1}] for {n} points, got {k!r}")


def _check_metric(metric: str) -> None:
    if metric not in METRICS:
        raise ValueError(f"metric must be 'euclidean' or 'cosine', got {metric!r}")
