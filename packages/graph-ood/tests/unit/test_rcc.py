from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.utils import estimator_checks

from graph_ood.rcc import RCC, clustering_scores, mutual_knn_graph


def blobs(n=600, clusters=5, dims=16, spread=0.05, seed=0):
    rng = np.random.default_rng(seed)
    truth = np.arange(n) % clusters
    return np.eye(clusters, dims)[truth] + spread * rng.standard_normal((n, dims)), truth


def same_partition(a, b):
    return clustering_scores(a, b)["acc"] == 1.0 and len(np.unique(a)) == len(np.unique(b))


# --- the graph ----------------------------------------------------------------------------------------------------


def brute_force_mutual(x, k):
    distance = np.linalg.norm(x[:, None] - x[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    near = np.argsort(distance, axis=1)[:, :k]
    return {(i, j) for i in range(len(x)) for j in near[i] if i < j and i in near[j]}


@settings(deadline=None, max_examples=25)
@given(st.integers(3, 40), st.integers(1, 6), st.integers(0, 10**6))
def test_graph_holds_all_mutual_neighbours_and_is_as_connected_as_the_knn_graph(n, k, seed):
    k = min(k, n - 1)
    x = np.random.default_rng(seed).standard_normal((n, 3))
    edges = mutual_knn_graph(x, k).numpy()
    found = {tuple(edge) for edge in edges.tolist()}
    assert len(found) == len(edges)
    assert edges.tolist() == sorted(edges.tolist())
    assert (edges[:, 0] < edges[:, 1]).all()
    mutual = brute_force_mutual(x, k)
    assert mutual <= found
    assert len(found - mutual) < n  # what a tree may add
    distance = np.linalg.norm(x[:, None] - x[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    directed = np.zeros((n, n))
    np.put_along_axis(directed, np.argsort(distance, axis=1)[:, :k], 1, axis=1)
    ours = np.zeros((n, n))
    ours[edges[:, 0], edges[:, 1]] = 1
    parts = connected_components(directed, directed=False)
    assert connected_components(ours, directed=False)[0] == parts[0]


def test_cosine_graph_ignores_lengths():
    x = np.random.default_rng(0).standard_normal((40, 4))
    longer = x * np.random.default_rng(1).uniform(0.1, 10, (40, 1))
    assert torch.equal(mutual_knn_graph(x, 5, "cosine"), mutual_knn_graph(longer, 5, "cosine"))
    assert not torch.equal(mutual_knn_graph(x, 5), mutual_knn_graph(longer, 5))


def test_more_identical_points_than_neighbours_stay_linked():
    x = np.repeat([[0.0, 0.0], [1.0, 1.0]], 30, axis=0)
    edges = mutual_knn_graph(x, 3).numpy()
    graph = np.zeros((60, 60))
    graph[edges[:, 0], edges[:, 1]] = 1
    assert connected_components(graph, directed=False)[0] == 2


# --- the clustering -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["lu", "cg"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_five_blobs(solver, metric):
    x, truth = blobs()
    fitted = RCC(solver=solver, metric=metric).fit(x)
    assert fitted.num_clusters_ == 5
    assert same_partition(truth, fitted.labels_)


def test_solvers_agree():
    x, _ = blobs(n=200)
    direct, iterative = (RCC(solver=solver).fit(x) for solver in ("lu", "cg"))
    np.testing.assert_allclose(iterative.representatives_, direct.representatives_, atol=1e-4)
    np.testing.assert_allclose(iterative.objective_, direct.objective_, rtol=1e-5)


def test_representatives_solve_the_normal_equations():
    x, _ = blobs(n=60)
    fitted = RCC(max_iter=1).fit(x)
    i, j = fitted.edges_.numpy().T
    squared = ((x[i] - x[j]) ** 2).sum(1)
    mu = fitted.scale_[0]
    pull = np.zeros((60, 60))
    pull[i, j] = pull[j, i] = fitted.edge_weights_ * (mu / (mu + squared)) ** 2
    weights = np.zeros((60, 60))
    weights[i, j] = weights[j, i] = fitted.edge_weights_
    largest = np.linalg.eigvalsh(np.diag(weights.sum(1)) - weights)[-1]
    lam = np.linalg.norm(x, 2) / largest
    matrix = np.eye(60) + lam * (np.diag(pull.sum(1)) - pull)
    np.testing.assert_allclose(fitted.representatives_, np.linalg.solve(matrix, x), atol=1e-4)


def test_weights_from_the_numbers_of_edges():
    fitted = RCC().fit(np.eye(4), edges=[[0, 1], [1, 2], [1, 3]], edge_weights=[1.0, 2.0, 1.0])
    plain = 1.5 / np.sqrt(3 * 1)
    np.testing.assert_allclose(fitted.edge_weights_, [plain, 2 * plain, plain])


@pytest.mark.parametrize("solver", ["lu", "cg"])
def test_objective_falls_while_the_scale_stays(solver):
    x, _ = blobs(n=300, spread=0.4)
    fitted = RCC(solver=solver, inner_iter=8).fit(x)
    same = np.diff(fitted.scale_) == 0
    assert same.sum() > 5
    assert (np.diff(fitted.objective_)[same] <= 1e-6 * np.abs(fitted.objective_[1:][same])).all()
    assert (np.diff(fitted.scale_) <= 0).all()


def test_order_of_the_points_does_not_matter():
    x, _ = blobs(n=300, spread=0.3)
    order = np.random.default_rng(3).permutation(300)
    assert same_partition(RCC().fit(x).labels_[order], RCC().fit(x[order]).labels_)


def test_all_points_identical():
    fitted = RCC().fit(np.ones((50, 3)))
    assert fitted.num_clusters_ == 1
    assert np.isfinite(fitted.representatives_).all()
    assert RCC().fit(np.zeros((50, 3))).num_clusters_ == 1


def test_two_points():
    near, far = [[0.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]
    for x in (near, far):
        fitted = RCC(k=1).fit(x)
        assert fitted.edges_.tolist() == [[0, 1]]
        assert fitted.num_clusters_ in (1, 2)
        assert np.isfinite(fitted.representatives_).all()
    assert RCC(k=1).fit(far).num_clusters_ == 1


def test_a_cut_edge_separates():
    x, truth = blobs(n=100, clusters=2)
    edges = mutual_knn_graph(x, 5).numpy()
    inside = edges[truth[edges[:, 0]] == truth[edges[:, 1]]]
    assert RCC(threshold=1e6).fit(x, inside).num_clusters_ == 2
    assert RCC(threshold=1e6).fit(x, np.concatenate([inside, [[0, 1]]])).num_clusters_ == 1


def test_digits_against_kmeans():
    """Measured: RCC 25 clusters, NMI 0.899; k-means with the true number 0.742."""
    from sklearn.cluster import KMeans
    from sklearn.datasets import load_digits

    x, truth = load_digits(return_X_y=True)
    ours = clustering_scores(truth, RCC(metric="cosine").fit_predict(x / x.max()))
    reference = clustering_scores(truth, KMeans(10, n_init=3, random_state=0).fit_predict(x))
    assert ours["nmi"] > reference["nmi"] + 0.1
    assert 15 <= ours["num_clusters"] <= 35


# --- scores ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-2, 6)), min_size=2, max_size=40), st.integers(0, 99))
def test_scores_do_not_depend_on_names(pairs, seed):
    true, pred = np.array(pairs).T
    rename = np.random.default_rng(seed).permutation(100)
    scores, renamed = clustering_scores(true, pred), clustering_scores(torch.tensor(true), rename[pred + 2])
    assert scores == pytest.approx(renamed)
    assert scores["num_clusters"] == len(np.unique(pred))
    # no one-to-one map does better than the commonest pair of every cluster
    most = sum(np.bincount(true[pred == value]).max() for value in np.unique(pred)) / len(true)
    assert scores["acc"] <= most + 1e-12


# --- scikit-learn ---------------------------------------------------------------------------------------------------


def test_estimator_conventions():
    estimator = RCC(k=4, threshold=2.0)
    assert clone(estimator).get_params() == estimator.get_params()
    estimator_checks.check_parameters_default_constructible("RCC", RCC())
    for check in (
        estimator_checks.check_no_attributes_set_in_init,
        estimator_checks.check_get_params_invariance,
        estimator_checks.check_set_params,
        estimator_checks.check_clustering,
        estimator_checks.check_clusterer_compute_labels_predict,
    ):
        check("RCC", RCC(threshold=2.0))  # the clustering check has 50 points, where the default cuts too short


def test_in_a_pipeline():
    x, truth = blobs(n=300, spread=0.05)
    labels = make_pipeline(MinMaxScaler(), RCC()).fit_predict(100 * x)
    assert clustering_scores(truth, labels)["nmi"] > 0.8


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": [1.0, 2.0]}, "x must be a matrix"),
        ({"x": [[1.0, 2.0]]}, "x must be a matrix"),
        ({"x": [["a", "b"], ["c", "d"]]}, "x must be a matrix of numbers"),
        ({"x": [[np.nan]] * 20}, "x must be finite"),
        ({"x": [[np.inf]] * 20}, "x must be finite"),
        ({"k": 0}, r"k must be an integer in \[1, 19\]"),
        ({"k": 20}, r"k must be an integer in \[1, 19\]"),
        ({"k": 2.5}, "k must be an integer"),
        ({"metric": "manhattan"}, "metric must be"),
        ({"solver": "qr"}, "solver must be"),
        ({"threshold": 0.0}, "threshold must be"),
        ({"max_iter": 0}, "max_iter must be"),
        ({"inner_iter": 0}, "inner_iter must be"),
        ({"edges": [[0, 1, 2]]}, "edges must be integers"),
        ({"edges": [[0.0, 1.0]]}, "edges must be integers"),
        ({"edges": [[0, 20]]}, "edges must hold indices"),
        ({"edges": [[3, 3]]}, "edges must join two different"),
        ({"edges": [[0, 1], [1, 0]]}, "edges must hold every edge once"),
        ({"edges": [[0, 1]], "edge_weights": [1.0, 1.0]}, "edge_weights must be 1 positive"),
        ({"edges": [[0, 1]], "edge_weights": [-1.0]}, "edge_weights must be 1 positive"),
    ],
)
def test_bad_input(change, words):
    fitting = {"x": np.random.default_rng(0).standard_normal((20, 3))}
    parameters = {name: value for name, value in change.items() if name in RCC().get_params()}
    fitting |= {name: value for name, value in change.items() if name not in parameters}
    with pytest.raises(ValueError, match=words):
        RCC(**{"k": 3, **parameters}).fit(**fitting)


@pytest.mark.parametrize(("true", "pred"), [([0, 1], [0]), ([], []), ([[0], [1]], [[0], [1]])])
def test_bad_labels(true, pred):
    with pytest.raises(ValueError, match="labels"):
        clustering_scores(true, pred)


def test_bad_graph():
    with pytest.raises(ValueError, match="metric must be"):
        mutual_knn_graph(np.eye(4), 2, "city")
    with pytest.raises(ValueError, match="k must be"):
        mutual_knn_graph(np.eye(4), 4)
