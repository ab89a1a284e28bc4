"""GraphEraser as a whole: what is trained, what is retrained, what is aggregated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch_geometric.utils import subgraph

from graph_unlearn.data import synthetic_graph
from graph_unlearn.graph_eraser import GraphEraser, aggregate_posteriors, learn_weights, sage_embedding, shard_cap
from graph_unlearn.nets import GCN
from graph_unlearn.requests import EdgeRequest, FeatureRequest, NodeRequest, apply_request
from graph_unlearn.training import TrainConfig, retrain

QUICK = TrainConfig(epochs=15)


def make_model() -> GCN:
    return GCN(16, 3, 8)


@pytest.fixture(scope="module")
def data() -> Any:
    return synthetic_graph(120, 16, 3, homophily=0.9, signal=2.0)


def fitted(data: Any, **options: Any) -> GraphEraser:
    return GraphEraser(make_model, **{"num_shards": 4, "config": QUICK, **options}).fit(data)


def state(model: torch.nn.Module | None) -> torch.Tensor:
    assert model is not None
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def inner_edges(eraser: GraphEraser, data: Any, *, shard: int) -> torch.Tensor:
    inside = (eraser.assignment[data.edge_index] == shard).all(0)
    return data.edge_index[:, inside & (data.edge_index[0] < data.edge_index[1])]


@pytest.mark.parametrize(
    ("partition", "aggregate"),
    [("blpa", "mean"), ("blpa", "optimal"), ("bekm", "majority"), ("random", "mean")],
)
def test_fit_and_predict(data, partition, aggregate):
    eraser = fitted(data, partition=partition, aggregate=aggregate, config=TrainConfig(epochs=30))
    assert torch.equal(eraser.assignment >= 0, data.train_mask)
    size = eraser.assignment[data.train_mask].bincount(minlength=4)
    assert int(size.max()) <= shard_cap(int(data.train_mask.sum()), 4)
    assert eraser.retrained == (0, 1, 2, 3)
    assert (eraser.weights is not None) == (aggregate == "optimal")
    posterior = eraser.predict(data)
    assert torch.allclose(posterior.sum(1), torch.ones(120))
    right = (posterior.argmax(1) == data.y)[data.test_mask].double().mean()
    by_chance = 1 / 3
    assert right > by_chance + 0.2
    again = fitted(data, partition=partition, aggregate=aggregate, config=TrainConfig(epochs=30))
    assert torch.equal(again.predict(data), posterior)


def test_a_shard_is_its_training_subgraph(data):
    eraser = fitted(data, seed=3)
    nodes = (eraser.assignment == 2).nonzero().flatten()
    part = data.__copy__()
    part.x, part.y, part.train_mask = data.x[nodes], data.y[nodes], torch.ones(len(nodes), dtype=torch.bool)
    part.edge_index = subgraph(nodes, data.edge_index, relabel_nodes=True)[0]
    alone = retrain(make_model, part, part.train_mask, TrainConfig(epochs=15, seed=3 * 4 + 2))
    assert torch.equal(state(eraser.models[2]), state(alone))


def test_test_labels_and_features_of_test_nodes_dont_matter_for_training(data):
    other = data.__copy__()
    other.y = torch.where(data.train_mask, data.y, (data.y + 1) % 3)
    other.x = data.x * data.train_mask[:, None]
    a, b = fitted(data, aggregate="optimal"), fitted(other, aggregate="optimal")
    assert all(torch.equal(state(m), state(n)) for m, n in zip(a.models, b.models, strict=True))
    assert torch.equal(a.weights, b.weights)


@pytest.mark.parametrize("kind", ["node", "edge", "feature"])
def test_unlearning_retrains_what_is_touched_and_nothing_else(data, kind):
    eraser = fitted(data)
    before, assignment = [state(model) for model in eraser.models], eraser.assignment.clone()
    members = (eraser.assignment == 1).nonzero().flatten()[:3]
    request = {
        "node": NodeRequest(members),
        "edge": EdgeRequest(inner_edges(eraser, data, shard=1)[:, :2]),
        "feature": FeatureRequest(members),
    }[kind]
    after = apply_request(request, data)
    eraser.unlearn(request)
    assert eraser.retrained == (1,)
    assert [torch.equal(state(model), old) for model, old in zip(eraser.models, before, strict=True)] == [
        True,
        False,
        True,
        True,
    ]
    expected = assignment.clone()
    if kind == "node":
        expected[members] = -1
    assert torch.equal(eraser.assignment, expected)
    # The same model as if the deleted had never been there, the shards being what they are.
    never = GraphEraser(make_model, num_shards=4, config=QUICK)
    never._partitioned = lambda data, nodes: assignment[nodes]  # type: ignore[method-assign]
    never.fit(after)
    assert all(torch.equal(state(a), state(b)) for a, b in zip(eraser.models, never.models, strict=True))
    if kind != "node":  # a deleted node is neither in a shard nor one of the nodes outside training
        assert torch.equal(eraser.predict(after), never.predict(after))


def test_edges_between_shards_and_test_nodes_need_no_training(data):
    eraser = fitted(data)
    a, b = eraser.assignment[data.edge_index]
    between = data.edge_index[:, (a != b) & (a >= 0) & (b >= 0)][:, :4]
    assert eraser.unlearn(EdgeRequest(between)).retrained == ()
    assert eraser.unlearn(NodeRequest(data.test_mask.nonzero().flatten()[:2])).retrained == ()
    assert eraser.unlearn(NodeRequest(torch.empty(0, dtype=torch.int64))).retrained == ()


def test_deletions_add_up(data):
    nodes = data.train_mask.nonzero().flatten()[:8]
    one, two = fitted(data), fitted(data)
    one.unlearn(NodeRequest(nodes))
    two.unlearn(NodeRequest(nodes[:4])).unlearn(NodeRequest(nodes[4:]))
    assert torch.equal(one.assignment, two.assignment)
    assert all(torch.equal(state(a), state(b)) for a, b in zip(one.models, two.models, strict=True))


def test_a_shard_may_lose_all_its_nodes(data):
    eraser = fitted(data, aggregate="optimal")
    request = NodeRequest((eraser.assignment == 0).nonzero().flatten())
    eraser.unlearn(request)
    assert eraser.models[0] is None
    assert eraser.weights.shape == (3,)
    assert torch.allclose(eraser.predict(apply_request(request, data)).sum(1), torch.ones(120))


def test_a_model_sees_its_shard_and_the_nodes_outside_training(data):
    eraser = fitted(data, num_shards=3)
    masks = [(eraser.assignment == s) | ~data.train_mask for s in range(3)]
    with torch.no_grad():
        each = [
            model(data.x, data.edge_index[:, mask[data.edge_index].all(0)]).softmax(-1)
            for model, mask in zip(eraser.models, masks, strict=True)
        ]
    assert torch.equal(eraser.predict(data), torch.stack(each).mean(0))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_features(data, layout):
    sparse = data.__copy__()
    sparse.x = data.x.to_sparse_coo() if layout == "coo" else data.x.to_sparse_csr()
    for partition in ("blpa", "bekm"):
        a, b = fitted(data, partition=partition), fitted(sparse, partition=partition)
        assert (a.assignment == b.assignment).double().mean() > 0.9
    a, b = fitted(data), fitted(sparse)
    assert torch.allclose(a.predict(data), b.predict(sparse), atol=1e-4)


def test_sage_embedding_separates_classes(data):
    z = sage_embedding(data, TrainConfig(epochs=30))
    centre = torch.stack([z[data.y == c].mean(0) for c in range(3)])
    nearest = torch.cdist(z, centre).argmin(1)
    assert (nearest == data.y).double().mean() > 1 / 3 + 0.3


def test_votes():
    p = torch.tensor([[[0.9, 0.1, 0.0]], [[0.2, 0.8, 0.0]], [[0.3, 0.7, 0.0]]])
    assert aggregate_posteriors(p, "mean")[0].argmax() == 1
    assert torch.allclose(aggregate_posteriors(p, "majority")[0], torch.tensor([1 + 1.4 / 3, 2 + 1.6 / 3, 0]) / 4)
    tie = torch.tensor([[[0.6, 0.4]], [[0.1, 0.9]]])
    assert aggregate_posteriors(tie, "majority")[0].argmax() == 1
    # Five models that can't tell don't outvote one that can.
    unsure = torch.cat([torch.full((5, 1, 2), 0.5), torch.tensor([[[0.4, 0.6]]])])
    assert aggregate_posteriors(unsure, "majority")[0].argmax() == 1
    assert torch.allclose(aggregate_posteriors(p, "optimal", torch.tensor([1.0, 0, 0])), p[0])


def test_learnt_weights_prefer_the_better_models():
    torch.manual_seed(0)
    y = torch.randint(3, (90,))
    good, noise = F.one_hot(y, 3).float(), torch.rand(2, 90, 3)
    p = torch.cat([good[None], noise / noise.sum(-1, keepdim=True)])
    weights = learn_weights(p, y, generator=torch.Generator().manual_seed(0))
    assert torch.isclose(weights.sum(), torch.tensor(1.0))
    assert (weights >= 0).all()
    assert weights[0] > weights[1:].max() + 0.15
    assert torch.equal(weights, learn_weights(p, y, generator=torch.Generator().manual_seed(0)))
    alike = learn_weights(p[1:2].expand(4, -1, -1), y, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(alike, torch.full((4,), 0.25), atol=1e-3)


def test_weights_stay_finite_where_the_rate_is_larger_than_a_weight():
    p = torch.rand(3, 8, 2, generator=torch.Generator().manual_seed(0)).softmax(-1)
    weights = learn_weights(p, torch.arange(8) % 2, lr=5.0, epochs=20, generator=torch.Generator().manual_seed(0))
    assert torch.isclose(weights.sum(), torch.tensor(1.0))


BAD = {
    "partition": (lambda d: GraphEraser(make_model, partition="blp"), "did you mean 'blpa'"),  # type: ignore[arg-type]
    "aggregate": (lambda d: GraphEraser(make_model, aggregate="median"), "unknown aggregate"),  # type: ignore[arg-type]
    "shards": (lambda d: GraphEraser(make_model, num_shards=0), "num_shards"),
    "delta": (lambda d: GraphEraser(make_model, cap_delta=2.0), "cap_delta"),
    "too many shards": (lambda d: GraphEraser(make_model, num_shards=500).fit(d), "num_shards"),
    "predict first": (lambda d: GraphEraser(make_model).predict(d), "fit"),
    "unlearn first": (lambda d: GraphEraser(make_model).unlearn(NodeRequest(torch.tensor([0]))), "fit"),
    "unknown node": (lambda d: fitted(d).unlearn(NodeRequest(torch.tensor([500]))), "out of range"),
    "everything": (lambda d: fitted(d).unlearn(NodeRequest(d.train_mask.nonzero().flatten())), "train_mask"),
    "no mask": (lambda d: fitted(without_mask(d)), "train_mask"),
    "another graph": (lambda d: fitted(d).predict(synthetic_graph(50, 16, 3)), "120 nodes"),
    "no posteriors": (lambda d: aggregate_posteriors(torch.zeros(3, 2)), r"\(S, n, C\)"),
    "no weights": (lambda d: aggregate_posteriors(torch.zeros(3, 2, 2), "optimal"), "weights"),
    "labels": (lambda d: learn_weights(torch.zeros(3, 2, 2), torch.zeros(3).long()), r"y must have shape \(2,\)"),
    "epochs": (lambda d: learn_weights(torch.zeros(3, 2, 2), torch.zeros(2).long(), epochs=-1), "epochs"),
}


def without_mask(data: Any) -> Any:
    other = data.__copy__()
    del other.train_mask
    return other


@pytest.mark.parametrize("case", BAD)
def test_bad_input(data, case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call(data)


def test_a_refused_request_changes_nothing(data):
    eraser = fitted(data)
    before = [state(model) for model in eraser.models], eraser.assignment.clone()
    with pytest.raises(ValueError, match="train_mask"):
        eraser.unlearn(NodeRequest(data.train_mask.nonzero().flatten()))
    assert torch.equal(eraser.assignment, before[1])
    assert all(torch.equal(state(model), old) for model, old in zip(eraser.models, before[0], strict=True))
