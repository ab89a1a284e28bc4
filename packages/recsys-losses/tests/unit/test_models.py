from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from recsys_losses.models import LightGCN, MatrixFactorization, normalized_adjacency

NUM_USERS, NUM_ITEMS, DIM = 23, 17, 8


def some_edges(count: int = 90, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    user = torch.randint(NUM_USERS - 1, (count,), generator=generator)  # the last user has no edge
    item = torch.randint(NUM_ITEMS - 1, (count,), generator=generator)
    return torch.unique(torch.stack([user, item]), dim=1)


def dense_adjacency(edges: torch.Tensor) -> torch.Tensor:
    """The definition, entry by entry."""
    size = NUM_USERS + NUM_ITEMS
    plain = torch.zeros(size, size, dtype=torch.float64)
    for user, item in edges.T.tolist():
        plain[user, NUM_USERS + item] = plain[NUM_USERS + item, user] = 1
    degree = plain.sum(1)
    for v in range(size):
        for w in range(size):
            if plain[v, w]:
                plain[v, w] = 1 / math.sqrt(degree[v] * degree[w])
    return plain


def both_directions(edges: torch.Tensor) -> torch.Tensor:
    user, item = edges[0], edges[1] + NUM_USERS
    return torch.stack([torch.cat([user, item]), torch.cat([item, user])])


class TestNormalizedAdjacency:
    def test_equals_the_definition_and_ignores_repetitions(self) -> None:
        edges = some_edges()
        repeated = torch.cat([edges, edges[:, :7]], dim=1)[:, torch.randperm(edges.shape[1] + 7)]
        result = normalized_adjacency(repeated, NUM_USERS, NUM_ITEMS, dtype=torch.float64)
        torch.testing.assert_close(result.to_dense(), dense_adjacency(edges), rtol=1e-12, atol=0)

    def test_nodes_without_edges_have_zero_rows(self) -> None:
        dense = normalized_adjacency(some_edges(), NUM_USERS, NUM_ITEMS).to_dense()
        assert dense.isfinite().all()
        assert dense[NUM_USERS - 1].abs().sum() == 0

    @pytest.mark.parametrize(
        ("edges", "message"),
        [
            (torch.tensor([[0], [NUM_ITEMS]]), "item id 17"),
            (torch.tensor([[NUM_USERS], [0]]), "user id 23"),
            (torch.tensor([[-1], [0]]), "negative user id"),
            (torch.tensor([0, 1]), "shape"),
            (torch.tensor([[0.0], [1.0]]), "int64"),
        ],
    )
    def test_bad_edges(self, edges: torch.Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            normalized_adjacency(edges, NUM_USERS, NUM_ITEMS)


class TestMatrixFactorization:
    def test_xavier_bound_is_per_table(self) -> None:
        model = MatrixFactorization(2000, 30, dim=10, seed=0)
        for table in model.embeddings():
            bound = math.sqrt(6 / (table.shape[0] + 10))
            assert table.abs().max() <= bound
            assert table.abs().max() > 0.98 * bound

    def test_joint_xavier_uses_all_rows(self) -> None:
        bound = math.sqrt(6 / (2030 + 10))
        _, item = MatrixFactorization(2000, 30, dim=10, init="xavier-joint", seed=0).embeddings()
        assert 0.9 * bound < item.abs().max() <= bound

    def test_normal_has_standard_deviation_one_tenth(self) -> None:
        user, _ = MatrixFactorization(2000, 30, dim=10, init="normal", seed=0).embeddings()
        assert user.std().item() == pytest.approx(0.1, rel=0.03)

    def test_seed_and_generator_determine_the_values(self) -> None:
        first = MatrixFactorization(5, 6, seed=3)
        again = MatrixFactorization(5, 6, generator=torch.Generator().manual_seed(3))
        other = MatrixFactorization(5, 6, seed=4)
        assert torch.equal(first.user_embedding, again.user_embedding)
        assert not torch.equal(first.user_embedding, other.user_embedding)

    def test_tables_are_parameters(self) -> None:
        model = MatrixFactorization(5, 6, dim=4, seed=0)
        assert all(isinstance(table, nn.Parameter) for table in model.embeddings())
        assert {name for name, _ in model.named_parameters()} == {"user_embedding", "item_embedding"}

    def test_user_keep_mask(self) -> None:
        model = MatrixFactorization(5, 6, dim=50, user_dropout=0.25, seed=0)
        mask = model.user_keep_mask(400, torch.Generator().manual_seed(0))
        assert mask is not None
        assert mask.unique().tolist() == pytest.approx([0, 4 / 3])
        assert mask.mean().item() == pytest.approx(1, abs=0.02)
        assert MatrixFactorization(5, 6, seed=0).user_keep_mask(3) is None

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"num_users": 0}, "num_users must be at least 1, got 0"),
            ({"num_items": -1}, "num_items"),
            ({"dim": 0}, "dim"),
            ({"init": "xavir"}, "did you mean 'xavier'"),
            ({"user_dropout": 1.0}, r"user_dropout must be in \[0, 1\)"),
            ({"user_dropout": float("nan")}, "user_dropout"),
            ({"seed": 0, "generator": torch.Generator()}, "either generator or seed"),
        ],
    )
    def test_bad_arguments(self, arguments: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            MatrixFactorization(**{"num_users": 2, "num_items": 3, **arguments})


class TestLightGCN:
    @pytest.mark.parametrize("num_layers", [1, 2, 3])
    def test_equals_pyg_with_its_default_normalisation(self, num_layers: int) -> None:
        from torch_geometric.nn import LightGCN as Backbone

        edges = some_edges()
        model = LightGCN(NUM_USERS, NUM_ITEMS, edges, DIM, num_layers, seed=0)
        reference = Backbone(NUM_USERS + NUM_ITEMS, DIM, num_layers)
        reference.load_state_dict(model.backbone.state_dict())
        ours, theirs = torch.cat(model.embeddings()), reference.get_embedding(both_directions(edges))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        cotangent = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
        ours.backward(cotangent)
        theirs.backward(cotangent)
        torch.testing.assert_close(
            model.backbone.embedding.weight.grad, reference.embedding.weight.grad, rtol=0, atol=1e-6
        )

    def test_backbone_accepts_the_adjacency(self) -> None:
        model = LightGCN(NUM_USERS, NUM_ITEMS, some_edges(), DIM, seed=0)
        theirs = model.backbone.get_embedding(model.adjacency)
        torch.testing.assert_close(torch.cat(model.embeddings()), theirs, rtol=0, atol=1e-6)

    def test_equals_the_mean_of_powers_of_the_matrix(self) -> None:
        edges = some_edges()
        model = LightGCN(NUM_USERS, NUM_ITEMS, edges, DIM, 2, seed=0).double()
        matrix, table = dense_adjacency(edges), model.backbone.embedding.weight
        expected = (table + matrix @ table + matrix @ (matrix @ table)) / 3
        torch.testing.assert_close(torch.cat(model.embeddings()), expected, rtol=1e-6, atol=1e-8)

    def test_gradient(self) -> None:
        from recsys_losses._bipartite import Propagate

        adjacency = normalized_adjacency(some_edges(), NUM_USERS, NUM_ITEMS, dtype=torch.float64)
        table = torch.randn(NUM_USERS + NUM_ITEMS, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: Propagate.apply(x, adjacency, 3), (table,))

    def test_no_layers_is_matrix_factorization(self) -> None:
        model = LightGCN(NUM_USERS, NUM_ITEMS, some_edges(), DIM, 0, seed=5)
        flat = MatrixFactorization(NUM_USERS, NUM_ITEMS, DIM, seed=5)
        for ours, theirs in zip(model.embeddings(), flat.embeddings(), strict=True):
            assert torch.equal(ours, theirs)

    def test_cold_user_keeps_his_own_vector(self) -> None:
        model = LightGCN(NUM_USERS, NUM_ITEMS, some_edges(), DIM, 3, seed=0)
        torch.testing.assert_close(model.embeddings()[0][-1], model.base_embeddings()[0][-1] / 4)

    def test_message_dropout_is_on_in_training_tables_only(self) -> None:
        model = LightGCN(NUM_USERS, NUM_ITEMS, some_edges(), DIM, 2, message_dropout=0.5, seed=0)
        clean = torch.cat(model.embeddings())
        assert torch.equal(clean, torch.cat(model.embeddings()))
        drawn = [torch.cat(model.training_embeddings(torch.Generator().manual_seed(s))) for s in (0, 0, 1)]
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])
        generator = torch.Generator().manual_seed(0)
        mean = sum(torch.cat(model.training_embeddings(generator)).detach() for _ in range(3000)) / 3000
        torch.testing.assert_close(mean, clean.detach(), rtol=0, atol=0.03)

    def test_gradient_with_dropout_is_that_of_the_same_mask(self) -> None:
        model = LightGCN(NUM_USERS, NUM_ITEMS, some_edges(), 2, 2, message_dropout=0.3, seed=0).double()
        weight = model.backbone.embedding.weight

        def tables(x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                weight.copy_(x)
            return torch.cat(model.training_embeddings(torch.Generator().manual_seed(0)))

        start = weight.detach().clone()
        cotangent = torch.randn(start.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        (gradient,) = torch.autograd.grad(tables(start), weight, cotangent)
        direction = torch.randn(start.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        ahead, behind = (float((tables(start + h * direction).detach() * cotangent).sum()) for h in (1e-3, -1e-3))
        assert float((gradient * direction).sum()) == pytest.approx((ahead - behind) / 2e-3, rel=1e-5)

    def test_edges_round_trip_and_replacement(self) -> None:
        edges, others = some_edges(), some_edges(seed=1)
        model = LightGCN(NUM_USERS, NUM_ITEMS, edges, DIM, seed=0)
        assert torch.equal(model.edge_index(), edges)
        model.replace_edges(others)
        assert torch.equal(model.edge_index(), others)
        fresh = LightGCN(NUM_USERS, NUM_ITEMS, others, DIM, seed=0)
        assert torch.equal(torch.cat(model.embeddings()), torch.cat(fresh.embeddings()))

    def test_copies_and_state_dict(self) -> None:
        model = LightGCN(NUM_USERS, NUM_ITEMS, some_edges(), DIM, seed=0)
        twin = copy.deepcopy(model)
        other = LightGCN(NUM_USERS, NUM_ITEMS, some_edges(), DIM, seed=1)
        other.load_state_dict(model.state_dict())
        for tables in (twin.embeddings(), other.embeddings()):
            assert torch.equal(torch.cat(tables), torch.cat(model.embeddings()))

    def test_building_leaves_the_global_generator_alone(self) -> None:
        before = torch.random.get_rng_state()
        LightGCN(NUM_USERS, NUM_ITEMS, some_edges(), DIM, seed=0)
        assert torch.equal(before, torch.random.get_rng_state())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [({"num_layers": -1}, "num_layers must be >= 0"), ({"message_dropout": -0.1}, "message_dropout")],
    )
    def test_bad_arguments(self, arguments: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            LightGCN(NUM_USERS, NUM_ITEMS, some_edges(), **arguments)
