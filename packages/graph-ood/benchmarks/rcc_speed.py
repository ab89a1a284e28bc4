"""What `RCC` costs: the alternation and the graph on 7,494 points, against the reference program restated.

    python packages/graph-ood/benchmarks/rcc_speed.py --data /path/to/data       # pendigits, 7,494 x 16
    python packages/graph-ood/benchmarks/rcc_speed.py                            # generated points of the same size

Prints one JSON object. The port is the reference's way: `spsolve` and a matrix of its own in every round, `eigs` without a
start for lambda, a full matrix of distances for the graph. Both sides get the same edges for the alternation, run the same
number of rounds, and their partitions are compared.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree
from scipy.sparse.linalg import eigs, spsolve
from scipy.spatial.distance import cdist

from ballast_testing.measure import emit, interleaved, machine, parser
from graph_ood.rcc import RCC, clustering_scores, mutual_knn_graph

POINTS, DIMS, CLASSES, NEIGHBORS = 7_494, 16, 10, 10


def points(root: Path | None, seed: int) -> tuple[str, np.ndarray]:
    """Return pendigits, or generated points."""
    if root is not None:
        table = np.genfromtxt(root / "graph" / "clustering" / "pendigits.txt", delimiter=",")
        return "pendigits", table[:, :-1] / table[:, :-1].max()
    rng = np.random.default_rng(seed)
    x = rng.random((CLASSES, DIMS))[np.arange(POINTS) % CLASSES] + 0.1 * rng.standard_normal((POINTS, DIMS))
    return "generated", x - x.min()


def port_graph(x: np.ndarray) -> np.ndarray:
    """The graph from all distances at once."""
    n = len(x)
    distance = cdist(x, x)
    near = np.argpartition(distance, tuple(range(1, NEIGHBORS + 1)), axis=1)[:, 1 : NEIGHBORS + 1]
    row = np.repeat(np.arange(n), NEIGHBORS)
    hit = sp.csr_matrix((np.ones(n * NEIGHBORS), (row, near.ravel())), shape=(n, n))
    tree = minimum_spanning_tree(sp.csr_matrix((distance[row, near.ravel()], (row, near.ravel())), shape=(n, n)))
    both = sp.triu(hit.minimum(hit.T) + tree.maximum(tree.T), k=1).tocoo()
    return np.stack([both.row, both.col], 1)


def port_loop(x: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, int]:
    """The alternation, one dense solve of a sparse system after the other; return labels and rounds."""
    x = x.astype(np.float32)
    n, (i, j) = len(x), edges.T

    def matrix(values: np.ndarray) -> sp.csr_matrix:
        half = sp.coo_matrix((values, (i, j)), shape=(n, n)).tocsr()
        full = half + half.T
        return sp.diags(np.asarray(full.sum(axis=1)).ravel()).tocsr() - full

    def largest(laplacian: sp.csr_matrix) -> float:
        return float(eigs(laplacian, k=1, return_eigenvectors=False)[0].real)

    count = np.bincount(edges.ravel(), minlength=n)
    weights = count.mean() / np.sqrt(count[i] * count[j])
    length = np.sqrt((((x[i] - x[j]) ** 2) + 1e-5).sum(axis=1))
    length[length / math.sqrt(x.shape[1]) < 1e-2] = length.max()
    length.sort()
    percent = math.ceil(0.01 * len(length))
    mu, delta, short = 3 * length[-1] ** 2, length[: min(250, percent)].mean(), length[:percent].mean()
    norm = np.linalg.norm(x, 2)
    lam = norm / largest(matrix(weights))
    u, previous, inner = x.copy(), 0.0, 0
    for rounds in range(1, 101):  # noqa: B007
        squared = ((u[i] - u[j]) ** 2).sum(axis=1)
        line = (mu / (mu + squared)) ** 2
        penalty = weights * (line * squared + mu * (np.sqrt(line) - 1) ** 2)
        value = 0.5 * ((x - u) ** 2).sum() + 0.5 * lam * penalty.sum()
        laplacian = matrix(weights * line)
        u = spsolve((sp.eye(n) + lam * laplacian).tocsc(), x)
        inner += 1
        last, stalled, previous = inner == 4, abs(previous - value) < 0.1, value
        if not (last or stalled):
            continue
        if mu >= delta:
            mu /= 2
        elif last:
            mu = delta / 2
        else:
            break
        lam, inner = norm / largest(laplacian), 0
    kept = edges[np.sqrt(((u[i] - u[j]) ** 2).sum(axis=1)) <= short]
    graph = sp.coo_matrix((np.ones(len(kept)), (kept[:, 0], kept[:, 1])), shape=(n, n))
    return connected_components(graph, directed=False)[1], rounds


def main() -> None:
    """Measure and print."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--data", type=Path, help="folder with graph/clustering/pendigits.txt")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    about = machine()
    name, x = points(args.data, args.seed)
    edges = mutual_knn_graph(x, NEIGHBORS)
    pairs = edges.numpy()
    ours = RCC().fit(x, edges)
    labels, rounds = port_loop(x, pairs)
    loop = interleaved(
        {
            "lu": lambda: RCC(solver="lu").fit(x, edges),
            "cg": lambda: RCC(solver="cg").fit(x, edges),
            "port": lambda: port_loop(x, pairs),
        },
        repetitions=args.repetitions,
        warmup=args.warmup,
    )
    graph = interleaved(
        {"ours": lambda: mutual_knn_graph(x, NEIGHBORS), "port": lambda: port_graph(x)},
        repetitions=args.repetitions,
        warmup=args.warmup,
    )
    time = {side: value["median_s"] for side, value in loop.items()}
    shape = f"{name}, {len(x):,} x {x.shape[1]}"
    results: list[dict[str, Any]] = [
        {
            "case": f"alternation, {shape}",
            "ours_median_s": time["lu"],
            "port_median_s": time["port"],
            "speed_of_ours_over_port": time["port"] / time["lu"],
            "speed_of_ours_with_conjugate_gradients_over_port": time["port"] / time["cg"],
            "ami_of_ours_and_port": clustering_scores(labels, ours.labels_)["ami"],
            "difference_in_clusters": abs(int(labels.max()) + 1 - ours.num_clusters_),
            "difference_in_rounds": abs(rounds - len(ours.objective_)),
        },
        {
            "case": f"graph, {shape}",
            "ours_median_s": graph["ours"]["median_s"],
            "speed_of_ours_over_port": graph["port"]["median_s"] / graph["ours"]["median_s"],
        },
        {
            "case": f"both, {shape}",
            "ours_median_s": time["lu"] + graph["ours"]["median_s"],
            "speed_of_ours_over_port": (time["port"] + graph["port"]["median_s"])
            / (time["lu"] + graph["ours"]["median_s"]),
        },
    ]
    emit({**about, "results": results}, args.output)


if __name__ == "__main__":
    main()
