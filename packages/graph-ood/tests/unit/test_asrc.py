from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graph_ood import asrc
from graph_ood.asrc import AdaGAE, adagae_forward, can_graph, prototype_contrastive_loss

F64 = torch.float64


def _rng(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- the graph ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.integers(3, 30), st.integers(1, 8), st.integers(0, 10**6), st.sampled_from([F64, torch.float32]))
def test_rows_sum_to_one_over_k_points(n, k, seed, dtype):
    k = min(k, n - 1)
    graph = can_graph(_rng(n, 4, seed=seed, dtype=dtype), k)
    assert graph.prob.dtype == dtype
    torch.testing.assert_close(graph.prob.sum(1), torch.ones(n, dtype=dtype), rtol=0, atol=1e-6)
    assert ((graph.prob > 1e-8).sum(1) == k).all()  # the next one has about 1e-10
    assert (graph.prob.max(1).values <= graph.prob.diagonal() + 1e-12).all()
    assert torch.equal(graph.adjacency, graph.adjacency.T)
    largest = torch.linalg.eigvalsh(graph.normalized_adjacency.double())[-1]
    assert abs(largest - 1) < 1e-5


def test_weights_minimise_the_quadratic_programme():
    """With gamma from the k-th distance, no feasible direction lowers sum p d + gamma p^2."""
    x, k = _rng(12, 3), 4
    graph = can_graph(x, k)
    for row, distance in zip(graph.prob, graph.distance, strict=True):
        ordered = distance.sort().values
        gamma = (k * ordered[k] - ordered[:k].sum()) / 2
        slope = distance + 2 * gamma * row
        on = row > 1e-8
        assert (slope[on] - slope[on].mean()).abs().max() < 1e-6
        assert (slope[~on] >= slope[on].mean() - 1e-6).all()


def test_graph_follows_a_permutation_and_ignores_moves_and_scales():
    x = _rng(20, 5)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    prob = can_graph(x, 5).prob
    torch.testing.assert_close(can_graph(x[order], 5).prob, prob[order][:, order], atol=1e-9, rtol=0)
    torch.testing.assert_close(can_graph(3 * x + 7, 5).prob, prob, atol=1e-8, rtol=0)


def test_close_points_far_from_the_origin_keep_their_order_in_float32():
    x = torch.linspace(0, 1, 11)[:, None].repeat(1, 8) + 1000.0
    assert torch.equal(can_graph(x, 2).prob[5].topk(3).indices.sort().values, torch.tensor([4, 5, 6]))


def test_identical_points_share_the_weight():
    x = torch.tensor([[0.0, 0.0]] * 2 + [[5.0, 1.0]] * 2 + [[1.0, 9.0]] * 2, dtype=F64)
    assert torch.equal(
        can_graph(x, 2).prob.round(decimals=6), torch.block_diag(*[torch.full((2, 2), 0.5)] * 3).double()
    )
    torch.testing.assert_close(can_graph(torch.zeros(6, 2, dtype=F64), 3).prob, torch.full((6, 6), 1 / 3, dtype=F64))


# --- the auto-encoder -----------------------------------------------------------------------------------------------


def _reference_loss(z, prob, adjacency, lam):
    distance = (z[:, None] - z[None]).square().sum(2)
    q = torch.softmax(-distance, 1) + 1e-10
    laplacian = torch.diag(adjacency.sum(1)) - adjacency
    return ((prob * torch.log(prob / q + 1e-10)).sum() + lam * torch.trace(z.T @ laplacian @ z)) / len(z)


def test_loss_and_gradients_against_the_dense_formula():
    x, w1, w2 = _rng(15, 6), _rng(6, 5, seed=1).requires_grad_(), _rng(5, 3, seed=2).requires_grad_()
    graph = can_graph(x, 4)
    other = can_graph(_rng(15, 2, seed=3), 3)  # an adjacency that doesn't belong to the probabilities
    for adjacency in (graph.adjacency, other.adjacency):
        z, _, loss = adagae_forward(x, w1, w2, adjacency, graph.prob, 0.7)
        reference = _reference_loss(z, graph.prob, adjacency, 0.7)
        torch.testing.assert_close(loss, reference)
        ours = torch.autograd.grad(loss, (w1, w2), retain_graph=True)
        torch.testing.assert_close(ours, torch.autograd.grad(reference, (w1, w2)))


def test_distances_gradcheck():
    z, place = _rng(6, 3).requires_grad_(), torch.tensor([1, 8, 9, 20, 34])
    assert torch.autograd.gradcheck(lambda z: asrc._Distances.apply(z, place), z)


def test_far_clusters_do_not_overflow():
    z = torch.cat([torch.zeros(3, 2), torch.full((3, 2), 1e4)]) + 0.1 * _rng(6, 2, dtype=torch.float32)
    z.requires_grad_()
    graph = can_graph(z.detach(), 2)
    loss = asrc._graph_loss(z, asrc._Support.of(graph.prob, graph.prob), 0.1)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(z.grad).all()


def test_only_smoothness_is_left_when_the_probabilities_are_met():
    """q = p: the divergence is 0 up to the 1e-10, what is left is the term of lam."""
    x, eye = _rng(8, 3), torch.eye(3, dtype=F64)
    adjacency = can_graph(x, 3).adjacency
    z, recon, _ = adagae_forward(x, eye, eye, adjacency, adjacency, 0.0)
    prob = recon.detach() - 1e-10
    laplacian = torch.diag(adjacency.sum(1)) - adjacency
    smoothness = torch.trace(z.T @ laplacian @ z) / 8
    loss = adagae_forward(x, eye, eye, adjacency, prob, 2.0)[2]
    torch.testing.assert_close(loss, 2 * smoothness, atol=1e-7, rtol=1e-6)


def test_module_is_the_function_and_embeds_from_averaged_features():
    x = _rng(10, 4, dtype=torch.float32)
    graph = can_graph(x, 3)
    model = AdaGAE(4, 6, 2, generator=torch.Generator().manual_seed(0))
    z = model(x, graph.normalized_adjacency)
    function = adagae_forward(x, model.w1, model.w2, graph.adjacency, graph.prob, 0.0)[0]
    torch.testing.assert_close(z, function)
    torch.testing.assert_close(model.embed(graph.normalized_adjacency @ x, graph.normalized_adjacency), z)
    assert model.w1.abs().max() <= (6 / 10) ** 0.5


# --- the contrastive loss -------------------------------------------------------------------------------------------


def test_contrast_against_a_loop():
    z1, z2, labels = _rng(7, 3), _rng(7, 3, seed=1), torch.tensor([4, 4, -1, -1, 9, 4, 9])
    a, b = z1.numpy(), z2.numpy()
    a, b = a / np.linalg.norm(a, axis=1, keepdims=True), b / np.linalg.norm(b, axis=1, keepdims=True)
    rows = []
    for i, own in enumerate(labels.tolist()):
        positive = np.exp(a[i] @ b[i] / 0.3)
        centers = {r: a[labels.numpy() == r].mean(0) for r in set(labels.tolist()) - {own}}
        negative = sum(np.exp(a[i] @ (c / np.linalg.norm(c)) / 0.3) for c in centers.values())
        rows.append(-np.log(positive / (positive + negative)))
    assert float(prototype_contrastive_loss(z1, z2, labels, tau=0.3)) == pytest.approx(np.mean(rows), rel=1e-12)


def test_contrast_prototypes_carry_no_gradient():
    """With the prototypes frozen by hand the gradient is the same."""
    z1, z2 = _rng(6, 3).requires_grad_(), _rng(6, 3, seed=1)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    prototypes = torch.nn.functional.normalize(
        torch.stack([torch.nn.functional.normalize(z1.detach(), dim=1)[labels == r].sum(0) for r in range(3)]), dim=1
    )

    def frozen(z1):
        a, b = torch.nn.functional.normalize(z1, dim=1), torch.nn.functional.normalize(z2, dim=1)
        score = torch.exp(a @ prototypes.T / 0.5) * (torch.arange(3) != labels[:, None])
        positive = torch.exp((a * b).sum(1) / 0.5)
        return -torch.log(positive / (positive + score.sum(1))).mean()

    ours = torch.autograd.grad(prototype_contrastive_loss(z1, z2, labels), z1)
    torch.testing.assert_close(ours, torch.autograd.grad(frozen(z1), z1))


def test_contrast_with_one_cluster_is_zero_with_zero_gradient():
    z1 = _rng(4, 3).requires_grad_()
    loss = prototype_contrastive_loss(z1, _rng(4, 3, seed=1), torch.zeros(4, dtype=torch.int64))
    assert loss == 0
    assert (torch.autograd.grad(loss, z1)[0] == 0).all()


def test_contrast_is_small_temperature_safe():
    z = _rng(10, 4, dtype=torch.float32)
    loss = prototype_contrastive_loss(z, z, torch.arange(10) % 3, tau=1e-3)
    assert torch.isfinite(loss)


# --- reading clusters -------------------------------------------------------------------------------------------------


def _links(x, k):
    return asrc._Links(asrc.mutual_knn_graph(x, k).numpy(), asrc.identical_pairs(x), 5)


def test_modularity_against_networkx():
    import networkx as nx

    graph = nx.gnm_random_graph(30, 90, seed=0)
    edges, labels = np.array(graph.edges), np.arange(30) % 4
    parts = [set(np.flatnonzero(labels == r).tolist()) for r in range(4)]
    expected = nx.community.modularity(graph, parts)
    assert asrc._modularity(labels, edges) == pytest.approx(expected, abs=1e-12)


def test_small_pieces_join_the_neighbour_with_most_edges():
    # pieces 0 (4 points), 1 (4 points), 2 (1 point, two edges to 1 and one to 0), 3 (1 point, only linked to 2),
    # 4 (1 point without edges)
    labels = np.array([0] * 4 + [1] * 4 + [2, 3, 4])
    edges = np.array([[0, 1], [1, 2], [2, 3], [4, 5], [5, 6], [6, 7], [4, 8], [5, 8], [0, 8], [8, 9]])
    joined = asrc._absorb_small(labels, edges, 3)
    assert joined.tolist() == [0] * 4 + [1] * 6 + [2]
    assert asrc._absorb_small(labels, edges, 1).tolist() == labels.tolist()


def test_partition_does_not_depend_on_the_scale_of_the_embedding():
    x = np.eye(4, 8)[np.arange(200) % 4] + 0.1 * np.random.default_rng(0).standard_normal((200, 8))
    links = _links(x, 8)
    found = [asrc._partition(scale * x, links, (0.6,)) for scale in (1e-3, 1.0, 1e3)]
    assert [part.num_clusters for part in found] == [4, 4, 4]


def test_identical_points_stay_together():
    """Even where the embedding tells them apart."""
    x = np.repeat(np.random.default_rng(0).standard_normal((8, 3)), 15, axis=0)
    z = np.random.default_rng(1).standard_normal((120, 4))
    labels = asrc._partition(z, _links(x, 10), (0.6,)).labels.reshape(8, 15)
    assert (labels == labels[:, :1]).all()
    assert asrc._partition(np.zeros((20, 2)), _links(np.zeros((20, 2)), 5), (0.6,)).num_clusters == 1


# --- errors -----------------------------------------------------------------------------------------------------------


def test_bad_graph():
    x = _rng(5, 2)
    for k in (0, 5, -1, 2.0):
        with pytest.raises(ValueError, match="num_neighbors must be an integer in"):
            can_graph(x, k)
    with pytest.raises(ValueError, match="x must"):
        can_graph(x[0], 2)
    with pytest.raises(ValueError, match="x must be finite"):
        can_graph(torch.full((5, 2), float("nan")), 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"w1": _rng(3, 5)}, "x, w1, w2 must be"),
        ({"w2": _rng(4, 2)}, "x, w1, w2 must be"),
        ({"adjacency": _rng(5, 6)}, "adjacency must be"),
        ({"prob": _rng(4, 4)}, "prob must be"),
        ({"lam": -1.0}, "lam must be"),
        ({"x": _rng(5)}, "x must"),
    ],
)
def test_bad_forward(change, words):
    graph = can_graph(_rng(6, 4), 2)
    good = {"x": _rng(6, 4), "w1": _rng(4, 5), "w2": _rng(5, 2), "adjacency": graph.adjacency, "prob": graph.prob}
    with pytest.raises(ValueError, match=words):
        adagae_forward(**{**good, "lam": 0.1, **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels must be 4 integers"),
        ({"labels": torch.zeros(4)}, "labels must be 4 integers"),
        ({"z2": _rng(3, 2)}, "z1 and z2"),
        ({"z2": _rng(4, 3)}, "z2 must"),
        ({"tau": 0.0}, "tau must be"),
    ],
)
def test_bad_contrast(change, words):
    good = {"z1": _rng(4, 2), "z2": _rng(4, 2), "labels": torch.arange(4), "tau": 0.5}
    with pytest.raises(ValueError, match=words):
        prototype_contrastive_loss(**{**good, **change})
