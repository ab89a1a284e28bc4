"""GCM: encoder, convolution, decoders, loss and module against golden vectors, loops and limits."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ballast_testing.losses import check_loss
from recsys_losses.gcm import (
    GCM,
    MergeWeights,
    _decoders,
    fm_decode,
    fm_rank,
    gcm_convolve,
    gcm_encode,
    gcm_loss,
    make_context_data,
    mlp_decode,
    mlp_rank,
)
from recsys_losses.models import LightGCN

F64 = torch.float64
GOLDEN = Path(__file__).parents[1] / "golden" / "gcm.json"
NORMS = ("left-single", "left-double", "right-single", "right-double", "both")
U, ITEMS, GRAPH, C, K, D = 5, 7, 6, 8, 3, 4


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def _ids(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


# User 4 and item 5 have no interaction; the pair (0, 0) occurs twice in one context and once in another.
USERS = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3])
TRAIN_ITEMS = torch.tensor([0, 0, 0, 1, 2, 2, 3, 4, 0])
CONTEXTS = torch.tensor([1, 1, 2, 0, 5, 7, 3, 3, 4])
EDGES = (USERS, TRAIN_ITEMS, CONTEXTS)


def _merge_weights(layers: int, dim: int = D) -> list[MergeWeights]:
    def one(seed: int) -> MergeWeights:
        shapes = ((dim, 2 * dim), (dim,), (dim, 2 * dim), (dim,))
        return MergeWeights(*(_randn(*shape, seed=seed + n) for n, shape in enumerate(shapes)))

    return [one(100 + 10 * layer) for layer in range(layers)]


def _by_edge(
    user: Tensor,
    item: Tensor,
    context: Tensor,
    *,
    num_layers: int,
    norm: str = "left-single",
    merge: str = "sum",
    layer_weights: list[float] | None = None,
    merge_weights: list[MergeWeights] | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, one interaction after the other."""
    weights = layer_weights or [1 / (num_layers + 1)] * (num_layers + 1)
    num_user, num_item = (np.bincount(x, minlength=n) for x, n in ((USERS, len(user)), (TRAIN_ITEMS, len(item))))
    total = [weights[0] * user, weights[0] * item]
    receive = {"left-single": -0.5, "left-double": -1.0, "both": -0.5}.get(norm, 0.0)
    send = {"right-single": -0.5, "right-double": -1.0, "both": -0.5}.get(norm, 0.0)
    for layer in range(num_layers):
        new_user, new_item = [torch.zeros(D, dtype=F64) for _ in user], [torch.zeros(D, dtype=F64) for _ in item]
        for u, i, c in zip(*(x.tolist() for x in EDGES), strict=True):
            sides = (
                (new_user, u, item[i] * num_item[i] ** send, num_user[u], 0),
                (new_item, i, user[u] * num_user[u] ** send, num_item[i], 2),
            )
            for out, row, sender, degree, side in sides:
                if merge == "sum":
                    message = sender + context[c]
                elif merge == "product":
                    message = sender * context[c] / context[c].norm()
                else:
                    weight, bias = merge_weights[layer][side : side + 2]
                    message = F.leaky_relu(weight @ torch.cat([sender, context[c]]) + bias, 0.2)
                out[row] = out[row] + message * degree**receive
        user, item = torch.stack(new_user), torch.stack(new_item)
        total = [total[0] + weights[layer + 1] * user, total[1] + weights[layer + 1] * item]
    return total[0], total[1]


# --- encoder ------------------------------------------------------------------------------------------------------


def test_encode_pools_the_id_with_the_features():
    ids, table, features = _randn(3, D), _randn(6, D, seed=1), torch.tensor([[0, 3], [2, 2], [5, 1]])
    want = torch.stack([torch.stack([ids[n], *table[features[n]]]).sum(0) for n in range(3)])
    torch.testing.assert_close(gcm_encode(ids, table, features, pooling="sum"), want)
    torch.testing.assert_close(gcm_encode(ids, table, features), want / 3)
    torch.testing.assert_close(gcm_encode(ids, None, None), ids)
    assert torch.autograd.gradcheck(
        lambda a, b: gcm_encode(a, b, features), (ids.requires_grad_(), table.requires_grad_())
    )


# --- convolution --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("merge", ["sum", "product", "mlp"])
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_convolution_equals_the_definition_and_its_gradient(norm, merge, layers):
    tables = [_randn(U, D), _randn(GRAPH, D, seed=1), _randn(C, D, seed=2)]
    options: dict[str, Any] = {"num_layers": layers, "norm": norm, "merge": merge}
    if layers == 3:
        options["layer_weights"] = [0.1, -0.4, 0.8, 0.3]
    if merge == "mlp":
        options["merge_weights"] = _merge_weights(layers)
    results = []
    for run in (lambda *x: gcm_convolve(*x, *EDGES, **options), lambda *x: _by_edge(*x, **options)):
        leaves = [table.clone().requires_grad_() for table in tables]
        user, item = run(*leaves)
        upstream = (user * _randn(U, D, seed=3)).sum() + (item * _randn(GRAPH, D, seed=4)).sum()
        results.append((user, item, *torch.autograd.grad(upstream, leaves, materialize_grads=True)))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("merge", ["sum", "product", "mlp"])
def test_convolution_passes_gradcheck(merge):
    weights = [w for layer in _merge_weights(2) for w in layer] if merge == "mlp" else []

    def run(user, item, context, *flat):
        layers = [MergeWeights(*flat[n : n + 4]) for n in range(0, len(flat), 4)] if flat else None
        return gcm_convolve(user, item, context, *EDGES, num_layers=2, norm="both", merge=merge, merge_weights=layers)

    inputs = [_randn(U, D), _randn(GRAPH, D, seed=1), _randn(C, D, seed=2), *weights]
    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in inputs])


@given(order=st.permutations(list(range(9))), norm=st.sampled_from(NORMS))
@settings(derandomize=True, deadline=None, max_examples=25)
def test_order_of_the_interactions_does_not_matter(order, norm):
    tables = _randn(U, D), _randn(GRAPH, D, seed=1), _randn(C, D, seed=2)
    shuffled = [edge[order] for edge in EDGES]
    got = gcm_convolve(*tables, *shuffled, num_layers=2, norm=norm)
    torch.testing.assert_close(got, gcm_convolve(*tables, *EDGES, num_layers=2, norm=norm))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("merge", ["sum", "product"])
def test_nodes_without_interactions_are_zero_beyond_the_first_layer(norm, merge):
    tables = _randn(U, D), _randn(GRAPH, D, seed=1), _randn(C, D, seed=2)
    options = {"num_layers": 2, "norm": norm, "merge": merge}
    user, item = gcm_convolve(*tables, *EDGES, layer_weights=[0.0, 1.0, 1.0], **options)
    assert not user[4].any()
    assert not item[5].any()
    assert user[:4].any(1).all()
    user, item = gcm_convolve(*tables, *EDGES, layer_weights=[0.5, 1.0, 1.0], **options)
    torch.testing.assert_close(user[4], 0.5 * tables[0][4])
    assert item.isfinite().all()


def test_a_repeated_interaction_counts_twice():
    # One user who took items 0 and 1, and then item 1 again: (q0 + 2 q1 + 3 e) / sqrt(3).
    user, item, context = _randn(1, D), _randn(2, D, seed=1), _randn(1, D, seed=2)
    zero = torch.zeros(3, dtype=torch.long)
    options = {"num_layers": 1, "layer_weights": [0.0, 1.0]}
    got, _ = gcm_convolve(user, item, context, zero, torch.tensor([0, 1, 1]), zero, **options)
    torch.testing.assert_close(got[0], (item[0] + 2 * item[1] + 3 * context[0]) / 3**0.5)


def test_product_with_a_zero_context_is_zero():
    context = torch.zeros(C, D, dtype=F64, requires_grad=True)
    options = {"num_layers": 1, "merge": "product", "layer_weights": [0.0, 1.0]}
    user, item = gcm_convolve(_randn(U, D), _randn(GRAPH, D, seed=1), context, *EDGES, **options)
    assert not user.any()
    assert not item.any()
    (user.sum() + item.sum()).backward()
    assert context.grad.isfinite().all()


def test_without_contexts_and_with_both_factors_it_is_lightgcn():
    edges = torch.tensor([[0, 0, 1, 2, 3], [0, 1, 1, 2, 4]])
    model = LightGCN(U, GRAPH, edges, D, num_layers=3, seed=0).double()
    model.replace_edges(edges)
    zero = torch.zeros(1, D, dtype=F64)
    got = gcm_convolve(
        *model.base_embeddings(), zero, *edges, torch.zeros(5, dtype=torch.long), num_layers=3, norm="both"
    )
    torch.testing.assert_close(got, model.embeddings())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_convolved_in_float32(dtype):
    # 3,000 messages of 1: a half precision sum would stop at 256 (bfloat16) or 2,048 (float16).
    one, zero = torch.ones(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)
    edge = torch.zeros(3000, dtype=torch.long)
    user, _ = gcm_convolve(zero, one, zero, edge, edge, edge, num_layers=1, norm="left-double", layer_weights=[0, 1])
    assert user.dtype == dtype
    assert user.item() == 1


# --- decoders -----------------------------------------------------------------------------------------------------


def test_fm_decode_is_the_factorisation_machine():
    user, item, rows, bias = _randn(6, D), _randn(6, D, seed=1), _randn(6, K, D, seed=2), _randn(6, seed=3)
    x = torch.cat([user[:, None], item[:, None], rows], 1)
    pairs = sum((x[:, s] * x[:, t]).sum(1) for s, t in itertools.combinations(range(K + 2), 2))
    torch.testing.assert_close(fm_decode(user, item, rows, bias), pairs + bias)
    assert torch.autograd.gradcheck(fm_decode, [x.requires_grad_() for x in (user, item, rows, bias)])


def test_fm_rank_equals_fm_decode_in_a_loop():
    user, rows, item = _randn(5, D), _randn(5, K, D, seed=1), _randn(9, D, seed=2)
    user_bias, context_bias, item_bias = _randn(5, 1, seed=3), _randn(5, K, seed=4), _randn(9, 1, seed=5)
    bias = user_bias + context_bias.sum(1, keepdim=True) + item_bias.T + 0.7
    want = torch.stack([fm_decode(user, item[n].expand(5, -1), rows, bias[:, n]) for n in range(9)], 1)
    got = fm_rank(user, rows, user_bias, context_bias, item, item_bias, global_bias=0.7)
    torch.testing.assert_close(got, want)
    for context in (context_bias.sum(1), context_bias[..., None]):
        other = fm_rank(user, rows, user_bias[:, 0], context, item, item_bias[:, 0], global_bias=torch.tensor([[0.7]]))
        torch.testing.assert_close(other, want)
    for context in (context_bias[0], context_bias[0, :, None], float(context_bias[0].sum())):
        one = fm_rank(user[0], rows[0], user_bias[0, 0], context, item, item_bias, global_bias=0.7)
        torch.testing.assert_close(one, want[0])


@pytest.mark.parametrize("hidden", [0, 1, 2])
def test_mlp_rank_equals_mlp_decode_in_a_loop(hidden, monkeypatch):
    monkeypatch.setattr(_decoders, "_BLOCK", 2 * 9 * D)  # blocks of two users
    user, rows, item = _randn(5, D), _randn(5, K, D, seed=1), _randn(9, D, seed=2)
    widths = [(K + 2) * D, D, D]
    weights = [w for n in range(hidden) for w in (_randn(D, widths[n], seed=n), _randn(D, seed=9 + n))]
    weights.append(_randn(1, widths[min(hidden, 1)], seed=20))
    want = torch.stack([mlp_decode(user, item[n].expand(5, -1), rows, weights) for n in range(9)], 1)
    torch.testing.assert_close(mlp_rank(user, rows, item, weights), want)
    hand = torch.cat([user, item[:1].expand(5, -1), rows.flatten(1)], 1)
    for n in range(hidden):
        hand = F.leaky_relu(hand @ weights[2 * n].T + weights[2 * n + 1], 0.2)
    torch.testing.assert_close(want[:, 0], (hand @ weights[-1].T)[:, 0])


# --- loss ---------------------------------------------------------------------------------------------------------


def _golden_cases() -> list[dict[str, Any]]:
    return json.loads(GOLDEN.read_text())["cases"]


def _tensors(values: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor | None]:
    def tensor(value: Any) -> Tensor | None:
        if value is None:
            return None
        read = torch.tensor(value)
        return read.to(dtype).requires_grad_() if read.is_floating_point() else read

    return {name: tensor(value) for name, value in values.items()}


@pytest.mark.parametrize("case", _golden_cases(), ids=lambda case: case["name"])
def test_float32_stays_within_1e_4_of_the_vectors(case):
    inputs = _tensors(case["inputs"], torch.float32)
    out = gcm_loss(**inputs, **case["params"])
    scale = max(1.0, *(abs(x) for x in case["expected"]["logits"]))
    assert (out.logits - torch.tensor(case["expected"]["logits"])).abs().max() < 1e-4 * scale
    assert out.loss.item() == pytest.approx(case["expected"]["loss"], rel=1e-4)
    out.loss.backward()
    for name, value in inputs.items():
        want = case["expected"].get(f"grad_{name}")
        if want is not None:
            want = torch.tensor(want)
            got = torch.zeros_like(want) if value.grad is None else value.grad
            assert (got - want).norm() <= 1e-4 * max(1.0, want.norm())


def _problem(*, user_features: bool = True, item_features: bool = True) -> dict[str, Tensor | None]:
    """Seven items of which six are in the graph."""
    return {
        "user_embedding": _randn(U, D),
        "user_feature_embedding": _randn(4, D, seed=1) if user_features else None,
        "item_embedding": _randn(ITEMS, D, seed=2),
        "item_feature_embedding": _randn(5, D, seed=3) if item_features else None,
        "context_feature_embedding": _randn(6, D, seed=4),
        "user_bias": _randn(U, 1, seed=5),
        "item_bias": _randn(ITEMS, 1, seed=6),
        "context_feature_bias": _randn(6, 1, seed=7),
        "global_bias": _randn(1, 1, seed=8),
        "user_features": _ids(4, U, 2) if user_features else None,
        "item_features": _ids(5, GRAPH, 3, seed=1) if item_features else None,
        "context_features": torch.cat([_ids(6, C, K - 1, seed=2), _ids(ITEMS, C, 1, seed=3)], 1),
        "train_users": USERS,
        "train_items": TRAIN_ITEMS,
        "train_contexts": CONTEXTS,
        "users": _ids(U, 9, seed=4),
        "items": _ids(GRAPH, 9, seed=5),
        "contexts": _ids(C, 9, seed=6),
        "labels": _ids(2, 9, seed=7),
    }


LEARNED = (
    "user_embedding",
    "user_feature_embedding",
    "item_embedding",
    "item_feature_embedding",
    "context_feature_embedding",
    "user_bias",
    "item_bias",
    "context_feature_bias",
    "global_bias",
)


def _loss_by_hand(*arrays: np.ndarray, l2_weight: float, reduction: str) -> np.ndarray:
    """Two layers, left-single, in numpy, with the definition of the FM."""
    named = dict(zip(_problem(), arrays, strict=True))
    n = len(named["users"])
    p = np.concatenate([named["user_embedding"][:, None], named["user_feature_embedding"][named["user_features"]]], 1)
    q = np.concatenate(
        [named["item_embedding"][:GRAPH, None], named["item_feature_embedding"][named["item_features"]]], 1
    )
    p, q = p.mean(1), q.mean(1)
    fields = named["context_features"]
    rows = np.concatenate(
        [named["context_feature_embedding"][fields[:, :-1]], named["item_embedding"][fields[:, -1:]]], 1
    )
    e = rows.mean(1)
    total_p, total_q = p / 3, q / 3
    users, items, contexts = named["train_users"], named["train_items"], named["train_contexts"]
    for _ in range(2):
        new_p, new_q = np.zeros_like(p), np.zeros_like(q)
        np.add.at(new_p, users, q[items] + e[contexts])
        np.add.at(new_q, items, p[users] + e[contexts])
        p = new_p / np.sqrt(np.maximum(1, np.bincount(users, minlength=len(p))))[:, None]
        q = new_q / np.sqrt(np.maximum(1, np.bincount(items, minlength=len(q))))[:, None]
        total_p, total_q = total_p + p / 3, total_q + q / 3
    users, items, contexts = named["users"], named["items"], named["contexts"]
    x = np.concatenate([total_p[users][:, None], total_q[items][:, None], rows[contexts]], 1)
    score = 0.5 * (x.sum(1) ** 2 - (x**2).sum(1)).sum(1) + named["global_bias"].item()
    score = score + named["user_bias"][users, 0] + named["item_bias"][items, 0]
    score = score + named["context_feature_bias"][fields[contexts][:, :-1], 0].sum(1)
    score = score + named["item_bias"][fields[contexts][:, -1], 0]
    bce = np.logaddexp(0, score) - named["labels"] * score
    squares = sum((named[name] ** 2).sum() for name in LEARNED[1:5] if name != "item_embedding")
    squares += (named["user_embedding"][users] ** 2).sum() + (named["item_embedding"][items] ** 2).sum()
    loss = bce + l2_weight * squares / 2 / n
    return {"none": loss, "mean": loss.mean(), "sum": loss.sum()}[reduction]


def test_battery():
    inputs = list(_problem().values())
    check_loss(
        lambda *x, **options: gcm_loss(*x, **options).loss,
        inputs,
        {"l2_weight": 0.3, "reduction": "mean"},
        _loss_by_hand,
        extreme=1e2,  # scores grow with the square, and layers add up
        dtypes={"float32": 1e-5, "bfloat16": 0.2},  # rounded embeddings, squared
        rows=range(len(inputs) - 4, len(inputs)),
    )


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_parts_of_the_loss_fit_together(reduction):
    problem = _problem()
    out = gcm_loss(**problem, l2_weight=0.2, reduction=reduction)
    torch.testing.assert_close(out.loss, out.bce + 0.2 * out.l2)
    bce = F.binary_cross_entropy_with_logits(out.logits, problem["labels"].double(), reduction=reduction)
    torch.testing.assert_close(out.bce, bce)
    assert out.user.shape == (U, D)
    assert out.item.shape == (GRAPH, D)


def test_without_layers_it_is_a_factorisation_machine_of_sums():
    problem = _problem()
    out = gcm_loss(**problem, num_layers=0)
    user = problem["user_embedding"] + problem["user_feature_embedding"][problem["user_features"]].sum(1)
    torch.testing.assert_close(out.user, user)
    other = {**problem, "train_items": TRAIN_ITEMS.flip(0), "train_contexts": CONTEXTS.flip(0)}
    torch.testing.assert_close(gcm_loss(**other, num_layers=0).loss, out.loss)


def test_items_outside_the_graph_learn_only_as_last_items():
    problem = _problem()
    last = problem["context_features"][:, -1]
    for touched in (False, True):
        last[last == ITEMS - 1] = 0
        last[CONTEXTS[3]] = ITEMS - 1 if touched else 0
        table = problem["item_embedding"].clone().requires_grad_()
        gcm_loss(**{**problem, "item_embedding": table}).loss.backward()
        assert bool(table.grad[ITEMS - 1].any()) == touched


def test_features_of_either_side_are_optional():
    for user, item in itertools.product((True, False), repeat=2):
        out = gcm_loss(**_problem(user_features=user, item_features=item), num_graph_items=GRAPH, num_layers=1)
        assert out.item.shape == (GRAPH, D)
    whole = _problem(user_features=False, item_features=False)
    assert gcm_loss(**whole).item.shape == (ITEMS, D)


# --- module -------------------------------------------------------------------------------------------------------


def _model(**options: Any) -> GCM:
    problem = _problem()
    names = ("user_features", "item_features", "context_features", "train_users", "train_items", "train_contexts")
    sizes = {"num_user_features": 4, "num_item_features": 5, "num_context_features": 6}
    graph = [problem[name] for name in names]
    return GCM(U, ITEMS, GRAPH, *graph, embed_dim=D, **{"seed": 0, **sizes, **options}).double()


def _batch(rows: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem = _problem()
    return tuple(problem[name][:rows] for name in ("users", "items", "contexts", "labels"))


@pytest.mark.parametrize("decoder", ["fm", "inner_product", "mlp"])
@pytest.mark.parametrize("merge", ["sum", "product", "mlp"])
def test_module_equals_the_function(decoder, merge):
    options = {"num_layers": 2, "norm": "both", "merge": merge, "decoder": decoder, "layer_weights": [0.5, 0.2, 0.3]}
    model = _model(l2_weight=0.1, decoder_layers=2, **options)
    tables = {name: getattr(model, name) for name in LEARNED}
    flat = list(model.merge_weights)
    more = {
        "merge_weights": [MergeWeights(*flat[n : n + 4]) for n in range(0, len(flat), 4)] or None,
        "decoder_weights": list(model.decoder_weights) or None,
    }
    want = gcm_loss(**{**_problem(), **tables}, l2_weight=0.1, **options, **more)
    got = model.loss(*_batch())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(model(*_batch()[:3]), want.logits)
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(x.loss, parameters, materialize_grads=True) for x in (got, want)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("decoder", ["fm", "inner_product", "mlp"])
def test_scores_of_all_items_equal_the_forward_pass(decoder):
    model = _model(decoder=decoder)
    users, _, contexts, _ = _batch()
    scores = model.score_all(users, contexts)
    assert scores.shape == (9, GRAPH)
    for item in range(GRAPH):
        torch.testing.assert_close(scores[:, item], model(users, torch.full_like(users, item), contexts))
    rows = model.context_features[contexts]
    torch.testing.assert_close(model.score_all(users, rows), scores)


def test_recommendations_are_the_best_unseen_items():
    model = _model()
    users, contexts = torch.tensor([0, 3, 4, 0]), torch.tensor([1, 2, 3, 4])
    scores = model.score_all(users, contexts)
    got = model.recommend(users, contexts, k=4, batch_size=3)
    for row, user in enumerate(users.tolist()):
        seen = TRAIN_ITEMS[user == USERS].tolist()
        want = [i for i in scores[row].argsort(descending=True).tolist() if i not in seen][:4]
        assert got[row].tolist() == want + [-1] * (4 - len(want))
    assert got[1].tolist()[-1] == -1  # user 3 took three of the six items
    known = model.recommend(users, contexts, k=1, exclude_known=False)
    assert known[:, 0].tolist() == scores.argmax(1).tolist()


def test_kept_vectors_follow_the_parameters():
    model = _model()
    users, _, contexts, _ = batch = _batch()
    before = model.score_all(users, contexts)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.loss(*batch).loss.backward()
    optimizer.step()
    after = model.score_all(users, contexts)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after[:, 0], model(users, torch.zeros_like(users), contexts))
    other = _model(seed=1)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model.score_all(users, contexts), other.score_all(users, contexts))
    with torch.no_grad():
        model.user_embedding.zero_()
    assert torch.equal(model.score_all(users, contexts), other.score_all(users, contexts))  # until refresh
    model.refresh()
    assert not torch.equal(model.score_all(users, contexts), other.score_all(users, contexts))


def test_replaced_interactions_are_the_graph():
    model, other = _model(), _model()
    edges = USERS[:5], TRAIN_ITEMS[:5], CONTEXTS[:5]
    other.replace_interactions(*edges)
    problem = _problem()
    names = ("user_features", "item_features", "context_features")
    sizes = {"num_user_features": 4, "num_item_features": 5, "num_context_features": 6}
    fresh = GCM(U, ITEMS, GRAPH, *(problem[n] for n in names), *edges, embed_dim=D, seed=0, **sizes).double()
    torch.testing.assert_close(other(*_batch()[:3]), fresh(*_batch()[:3]))
    assert not torch.allclose(other(*_batch()[:3]), model(*_batch()[:3]))


@pytest.mark.parametrize("merge", ["sum", "mlp"])
def test_copies_and_pickles_work_on_their_own(merge):
    model = _model(merge=merge)
    want = model(*_batch()[:3])
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        torch.testing.assert_close(clone(*_batch()[:3]), want)
        clone.loss(*_batch()).loss.backward()
        assert model.user_embedding.grad is None


def test_initial_values_are_xavier_normal_and_seeded():
    data = make_context_data(num_users=400, num_items=30, num_interactions=3000).data
    model = GCM.from_dataset(data, embed_dim=32, seed=3)
    assert model.user_embedding.std().item() == pytest.approx((2 / 432) ** 0.5, rel=0.05)
    assert model.global_bias.item() == 0
    again = GCM.from_dataset(data, embed_dim=32, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


# --- bad input ----------------------------------------------------------------------------------------------------

TABLES = (torch.zeros(U, D), torch.zeros(GRAPH, D), torch.zeros(C, D))


def _wrong(**change: Any) -> Any:
    return lambda: gcm_loss(**{**_problem(), **change})


BAD = [
    (lambda: gcm_convolve(*TABLES, *EDGES, num_layers=2, layer_weights=[1.0, 0.0]), "layer_weights must be .* = 3"),
    (lambda: gcm_convolve(*TABLES, *EDGES, num_layers=0, layer_weights=[float("nan")]), "layer_weights"),
    (lambda: gcm_convolve(*TABLES, *EDGES, num_layers=-1), "num_layers must be >= 0, got -1"),
    (lambda: gcm_convolve(*TABLES, USERS[:3], *EDGES[1:], num_layers=1), "same length"),
    (lambda: gcm_convolve(*TABLES, USERS + 2, *EDGES[1:], num_layers=1), r"train_users holds 5, .*out of range"),
    (
        lambda: gcm_convolve(*TABLES, USERS, TRAIN_ITEMS - 1, CONTEXTS, num_layers=1),
        r"train_items holds -1.*out of range",
    ),
    (lambda: gcm_convolve(*TABLES, *EDGES[:2], CONTEXTS + 1, num_layers=1), r"train_contexts holds 8.*out of range"),
    (lambda: gcm_convolve(*TABLES, USERS.double(), *EDGES[1:], num_layers=1), "train_users must hold integers"),
    (
        lambda: gcm_convolve(*TABLES, *EDGES, num_layers=1, norm="left"),
        "unknown norm 'left'; accepted: both, left-double",
    ),
    (
        lambda: gcm_convolve(*TABLES, *EDGES, num_layers=1, merge="add"),
        "unknown merge 'add'; accepted: mlp, product, sum",
    ),
    (lambda: gcm_convolve(*TABLES, *EDGES, num_layers=1, merge="mlp"), "merge_weights are needed for merge='mlp'"),
    (
        lambda: gcm_convolve(*TABLES, *EDGES, num_layers=1, merge="mlp", merge_weights=_merge_weights(2)),
        r"one entry per layer \(1\), got 2",
    ),
    (
        lambda: gcm_convolve(*TABLES, *EDGES, num_layers=1, merge="mlp", merge_weights=_merge_weights(1, 3)),
        "must have the shapes",
    ),
    (
        lambda: gcm_convolve(TABLES[0], torch.zeros(GRAPH, 3), TABLES[2], *EDGES, num_layers=1),
        r"item0 must be \(n, d\)",
    ),
    (lambda: gcm_encode(TABLES[0], TABLES[1], None), "both be given or both be None"),
    (lambda: gcm_encode(TABLES[0], TABLES[1], torch.full((U, 1), 9)), "features holds 9, which is out of range"),
    (lambda: gcm_encode(TABLES[0], TABLES[1], torch.zeros(2, 1, dtype=torch.long)), r"features \(n, f\)"),
    (lambda: gcm_encode(TABLES[0], None, None, pooling="max"), "unknown pooling 'max'; accepted: mean, sum"),
    (lambda: fm_decode(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 1, 3), torch.zeros(2)), r"item \(B, d\)"),
    (
        lambda: fm_decode(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 1, 4), torch.zeros(2)),
        "context_rows must be",
    ),
    (lambda: fm_decode(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 1, 3), torch.zeros(3)), "bias must be"),
    (
        lambda: fm_rank(
            torch.zeros(2, 3), torch.zeros(2, 4, 3), torch.zeros(3), 0.0, torch.zeros(7, 3), torch.zeros(7)
        ),
        "user_bias must be one number or hold one per row",
    ),
    (
        lambda: fm_rank(torch.zeros(2, 3), torch.zeros(2, 4, 3), 0.0, 0.0, torch.zeros(7, 3), torch.zeros(6)),
        "item_bias must hold 7 values",
    ),
    (lambda: mlp_decode(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 1, 3), [torch.zeros(1, 8)]), "shapes"),
    (_wrong(decoder="dot"), "unknown decoder 'dot'; accepted: fm, inner_product, mlp"),
    (_wrong(reduction="avg"), "unknown reduction 'avg'"),
    (_wrong(l2_weight=-1.0), "l2_weight must be a finite number >= 0"),
    (_wrong(decoder="mlp"), "decoder_weights are needed for decoder='mlp'"),
    (_wrong(decoder_weights=[torch.zeros(1, D)]), "decoder_weights are needed for decoder='mlp'"),
    (_wrong(items=torch.full((9,), GRAPH)), "items holds 6, which is out of range"),
    (_wrong(users=_ids(U, 8)), "same length"),
    (_wrong(**{n: torch.zeros(0, dtype=torch.long) for n in ("users", "items", "contexts", "labels")}), "empty batch"),
    (_wrong(user_features=None), "user_features and user_feature_embedding"),
    (_wrong(item_features=_ids(5, ITEMS + 1, 3)), "num_graph_items must be between 1 and 7, got 8"),
    (_wrong(user_features=_ids(4, U + 1, 2)), r"user_features must be \(5, f\)"),
    (_wrong(context_features=torch.full((C, K), 6)), r"all columns but the last\) holds 6, which is out of range"),
    (_wrong(context_features=torch.tensor([[0, 0, 7]] * C)), r"last column, items\) holds 7, which is out of range"),
    (_wrong(context_features=torch.zeros(C, 0, dtype=torch.long)), "k >= 1"),
    (_wrong(item_bias=_randn(GRAPH, 1)), "item_bias must hold 7 values"),
    (_wrong(context_feature_embedding=_randn(6, 3)), "context_feature_embedding must be"),
    (_wrong(user_embedding=_ids(3, U, D)), "user must be a floating-point tensor"),
    (lambda: _model(num_layers=1, layer_weights=[1.0]), "layer_weights"),
    (lambda: _model(decoder_layers=-1), "decoder_layers must be >= 0"),
    (lambda: _model(num_user_features=3), "user_features holds 3, which is out of range"),
    (lambda: _model()(*_batch()[:2], _ids(C, 8)), "one context each"),
    (
        lambda: _model()(*_batch()[:2], torch.zeros(9, 2, dtype=torch.long)),
        r"contexts must be \(B,\) numbers or \(B, 3\)",
    ),
    (lambda: _model().score_all(torch.tensor([U]), torch.tensor([0])), "users holds 5, which is out of range"),
    (lambda: _model().score_all(torch.tensor([0]), torch.tensor([C])), "contexts holds 8, which is out of range"),
    (lambda: _model().score_all(torch.tensor([0]), torch.tensor([[6, 0, 0]])), r"all columns but the last\) holds 6"),
    (lambda: _model().score_all(torch.tensor([0]), torch.tensor([[0, 0, 7]])), r"last column, items\) holds 7"),
    (lambda: _model().loss(*_batch()[:3], torch.ones(8)), "same length"),
    (lambda: _model().recommend(USERS, CONTEXTS, k=GRAPH + 1), r"k must be in 1..6 .*, got 7"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=range(len(BAD)))
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
