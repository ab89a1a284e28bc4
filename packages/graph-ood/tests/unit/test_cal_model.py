from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader

from graph_ood import nets
from graph_ood.cal import CAL, CALPlus, cross_validate_tu, train_cal

F64 = torch.float64


def edges(n, extra=()):
    nodes = torch.arange(n)
    ring = torch.stack([nodes, (nodes + 1) % n])
    return torch.cat([ring, ring.flip(0), torch.tensor(list(extra), dtype=torch.int64).view(-1, 2).T], 1)


def graphs(count=12, seed=0):
    """Class 0: features around 0; class 1: around 1; rings of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Data(
            x=torch.randn(4 + i % 3, 3, generator=generator) * 0.3 + i % 2,
            edge_index=edges(4 + i % 3),
            y=torch.tensor([i % 2]),
        )
        for i in range(count)
    ]


def batch(count=6, seed=0):
    return Batch.from_data_list(graphs(count, seed))


def make(kind=CAL, seed=0, **options):
    torch.manual_seed(seed)
    return kind(3, 2, **{"hidden": 8, "num_layers": 2, **options})


# --- the network --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["gcn", "gin", "gat"])
def test_shapes_and_scores(encoder):
    data = batch()
    out = make(encoder=encoder)(data)
    for head in ("causal", "trivial", "mixed"):
        assert out[f"logits_{head}"].shape == (6, 2)
    for name, size in (("node_att", data.num_nodes), ("edge_att", data.num_edges)):
        assert out[name].shape == (size,)
        assert bool(((out[name] > 0) & (out[name] < 1)).all())


def test_switched_off_attention_is_a_half_everywhere():
    out = make(node_attention=False, edge_attention=False)(batch())
    assert bool((out["node_att"] == 0.5).all())
    assert bool((out["edge_att"] == 0.5).all())
    only_edges = make(node_attention=False)(batch())
    assert bool((only_edges["node_att"] == 0.5).all())
    assert not bool((only_edges["edge_att"] == 0.5).all())


AWKWARD = {
    "plain": graphs(4),
    "self loops": [
        Data(x=torch.randn(4, 3), edge_index=edges(4, [(0, 0), (2, 2)]), y=torch.tensor([i])) for i in (0, 1)
    ],
    "an edge twice": [Data(x=torch.randn(4, 3), edge_index=edges(4, [(0, 1)]), y=torch.tensor([i])) for i in (0, 1)],
    "an isolated node": [Data(x=torch.randn(5, 3), edge_index=edges(4), y=torch.tensor([i])) for i in (0, 1)],
    "no edges": [Data(x=torch.randn(3, 3), edge_index=edges(0), y=torch.tensor([i])) for i in (0, 1)],
    "directed": [
        Data(x=torch.randn(3, 3), edge_index=torch.tensor([[0, 0], [1, 2]]), y=torch.tensor([i])) for i in (0, 1)
    ],
}


@pytest.mark.parametrize("name", AWKWARD)
def test_sparse_products_are_the_plain_convolutions(name, monkeypatch):
    data = Batch.from_data_list(AWKWARD[name]).to("cpu")
    data.x = data.x.double()
    results = []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(nets, "edge_routes", lambda *_: None)
        model = make(shuffle=False).double()
        parts = model.training_loss(data)
        parts["loss"].backward()
        results.append([parts["loss"], *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 20
    for sparse, plain in zip(*results, strict=True):
        torch.testing.assert_close(sparse, plain, rtol=1e-9, atol=1e-12)


def test_gradient_is_that_of_finite_differences():
    data = batch(3)
    data.x = data.x.double()
    model = make(shuffle=False).double()
    names = [name for name, _ in model.named_parameters() if name.startswith(("split", "causal.conv", "trivial.conv"))]
    values = tuple(dict(model.named_parameters())[name].detach().clone().requires_grad_() for name in names)

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, data):
            return self.model.training_loss(data)["loss"]

    def loss(*tensors):
        given = {f"model.{name}": tensor for name, tensor in zip(names, tensors, strict=True)}
        return torch.func.functional_call(Loss(), given, (data,))

    assert torch.autograd.gradcheck(loss, values, atol=1e-5)


def test_evaluation_mixes_own_parts_and_predict_is_the_causal_head():
    model, data = make().eval(), batch()
    first, second = model(data), model(data)
    assert torch.equal(first["logits_mixed"], second["logits_mixed"])
    torch.testing.assert_close(model.predict(data), first["logits_causal"])
    alone = model(Batch.from_data_list(graphs(6)[2:3]))
    for head in ("causal", "trivial", "mixed"):
        torch.testing.assert_close(alone[f"logits_{head}"], first[f"logits_{head}"][2:3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["add", "cat"])
def test_without_shuffling_the_third_head_sees_the_graph_itself(mode):
    data = batch()
    mixed = make(shuffle=False, mode=mode)(data)["logits_mixed"]
    model = make(shuffle=False, mode=mode)
    causal, trivial, _ = model._parts(data)
    own = trivial + causal if mode == "add" else torch.cat([trivial, causal], 1)
    torch.testing.assert_close(mixed, model.head_mixed(own))
    torch.manual_seed(1)
    shuffled = make(mode=mode)
    torch.manual_seed(1)
    assert not torch.allclose(shuffled(data)["logits_mixed"], mixed)


def test_only_the_intervention_without_shuffling_trains_on_the_sum_of_the_parts():
    data = batch()
    model = make(shuffle=False)
    causal, trivial, _ = model._parts(data)
    wanted = nn.functional.cross_entropy(model.head_mixed(causal + trivial), data.y)
    torch.testing.assert_close(make(shuffle=False).training_loss(data, lambdas=(0.0, 0.0, 1.0))["loss"], wanted)


@pytest.mark.parametrize("lambdas", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_each_part_of_the_loss_moves_the_attention(lambdas):
    model = make()
    model.training_loss(batch(), lambdas=lambdas)["loss"].backward()
    assert model.split.node.weight.grad.abs().max() > 0
    assert model.split.edge.weight.grad.abs().max() > 0


def test_order_of_nodes_and_graphs_does_not_matter():
    model = make().eval()
    one = graphs(1)[0]
    perm = torch.tensor([2, 0, 3, 1])
    moved = Data(x=one.x[perm.argsort()], edge_index=perm[one.edge_index])
    torch.testing.assert_close(model.predict(moved), model.predict(one), rtol=1e-4, atol=1e-5)


def test_one_graph_is_refused_in_training_and_welcome_in_evaluation():
    model, one = make(), graphs(1)[0]
    for call in (model, model.training_loss, model.predict):
        with pytest.raises(ValueError, match="batch size 1"):
            call(one)
    assert model.eval().predict(one).shape == (1, 2)


def test_any_encoder_with_a_width():
    class Linear(nn.Module):
        hidden = 5

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 5)

        def forward(self, x, edge_index):
            return self.linear(x)

    model = CAL(3, 2, encoder=Linear(), hidden=999)
    assert model(batch())["logits_mixed"].shape == (6, 2)
    assert model.causal.conv.weight.shape == (5, 5)


def test_half_precision_takes_the_plain_convolutions():
    wanted = make().training_loss(batch())["loss"]
    data = batch()
    data.x = data.x.bfloat16()
    parts = make().bfloat16().training_loss(data)
    parts["loss"].backward()
    assert parts["loss"].dtype == torch.bfloat16
    assert parts["loss"].item() == pytest.approx(wanted.item(), rel=0.3)


def test_explanations_are_the_scores_of_evaluation_and_leave_the_mode_alone():
    model, data = make(), batch()
    found = model.explain(data)
    assert model.training
    out = model.eval()(data)
    assert len(found) == 6
    torch.testing.assert_close(torch.cat([one.node_mask for one in found]).squeeze(1), out["node_att"])
    torch.testing.assert_close(torch.cat([one.edge_mask for one in found]), out["edge_att"])
    assert found[0].validate()
    assert model.explain(graphs(1)[0])[0].edge_mask.shape == (8,)
    assert not model.training


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"encoder": "gcnn"}, "encoder 'gcnn'.*did you mean 'gcn'"),
        ({"mode": "mul"}, "mode 'mul'"),
        ({"hidden": 0}, "hidden"),
        ({"hidden": 10, "encoder": "gat"}, "hidden.*10"),
        ({"num_layers": 1.5}, "num_layers"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        make(**options)
    with pytest.raises(ValueError, match="num_classes"):
        CAL(3, 1)


# --- CAL+ -----------------------------------------------------------------------------------------------------------------


def test_memory_holds_the_trivial_parts_of_the_last_batches():
    model = make(CALPlus, num_batches=2, batch_size=4)
    seen = []
    for seed in range(5):
        data = batch(4, seed)
        _, trivial, _ = copy.deepcopy(model)._parts(data)
        seen.append(trivial.detach())
        model.training_loss(data)
    assert int(model.remembered) == 8
    rows = {tuple(row) for row in model.memory.tolist()}
    assert rows == {tuple(row) for row in torch.cat(seen[-2:]).tolist()}


def test_a_batch_beyond_the_capacity_leaves_its_last_rows():
    model = make(CALPlus, num_batches=1, batch_size=4)
    _, trivial, _ = copy.deepcopy(model)._parts(batch(6))
    model.training_loss(batch(6))
    assert torch.equal(model.memory, trivial[-4:])


def test_partners_come_from_the_batch_and_from_what_is_remembered():
    model = make(CALPlus, num_batches=3, batch_size=100)
    causal, trivial = torch.zeros(200, 8), torch.ones(200, 8).requires_grad_()
    assert bool((model._mixed(causal, trivial) == 1).all())  # nothing is remembered yet
    model._remember(torch.full((200, 8), 7.0))
    mixed = model._mixed(causal, trivial)
    assert set(mixed.unique().tolist()) == {1.0, 7.0}
    assert 0.3 < float((mixed == 7).float().mean()) < 0.7
    mixed.sum().backward()
    assert trivial.grad.sum().item() == int((mixed == 1).sum())
    assert torch.equal(model.eval()._mixed(causal, trivial), trivial)


def test_prototypes_follow_the_classes_of_training_batches_only():
    model = make(CALPlus)
    only_ones = Batch.from_data_list([graph for graph in graphs(8) if int(graph.y) == 1])
    parts = model.training_loss(only_ones)
    assert model.seen.tolist() == [False, True]
    assert parts["loss_pro"].item() == 0  # a class alone has nothing to be told from
    causal, _, _ = make(CALPlus)._parts(only_ones)
    torch.testing.assert_close(model.prototypes[1], causal.detach().mean(0))
    before = copy.deepcopy(model.state_dict())
    model.eval().training_loss(batch())
    model.predict(batch())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_prototypes_are_weighed_by_rho1():
    torch.manual_seed(0)
    parts = make(CALPlus, rho1=0.3).training_loss(batch())
    rest = parts["loss_sup"] + 0.5 * parts["loss_unif"] + 0.5 * parts["loss_caus"]
    torch.testing.assert_close(parts["loss"], rest + 0.3 * parts["loss_pro"])
    for options, words in (({"rho1": -1.0}, "rho1"), ({"tau": 0.0}, "tau"), ({"num_batches": 0}, "num_batches")):
        with pytest.raises(ValueError, match=words):
            make(CALPlus, **options)


# --- training -------------------------------------------------------------------------------------------------------------


def run(kind, epochs, **options):
    model = make(kind, **({"batch_size": 4, "num_batches": 2} if kind is CALPlus else {}))
    history = train_cal(
        model,
        DataLoader(graphs(24), batch_size=4, shuffle=True),
        DataLoader(graphs(12, seed=1), batch_size=6),
        test_loaders={"test": DataLoader(graphs(12, seed=2), batch_size=6)},
        lr=0.01,
        epochs=epochs,
        **options,
    )
    return model, history


@pytest.mark.parametrize("kind", [CAL, CALPlus])
def test_training_learns_and_repeats(kind):
    model, history = run(kind, 8)
    assert history.records[-1]["loss_sup"] < 0.5 * history.records[0]["loss_sup"]
    assert history.best["test_accuracy"] >= 0.9  # guessing gives 0.5
    assert not model.training
    again, _ = run(kind, 8)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    other, _ = run(kind, 8, seed=1)
    assert not torch.equal(other.causal.conv.weight, model.causal.conv.weight)


@pytest.mark.parametrize("kind", [CAL, CALPlus])
def test_an_interrupted_run_ends_like_one_that_was_not(kind, tmp_path):
    class Stop(Exception):
        pass

    def stop(record):
        if record["epoch"] == 2:
            raise Stop

    whole, history = run(kind, 6)
    file = tmp_path / "run.safetensors"
    with pytest.raises(Stop):
        run(kind, 6, checkpoint=file, on_epoch=stop)
    continued, resumed = run(kind, 6, checkpoint=file)
    drop = [{k: v for k, v in record.items() if k != "seconds"} for record in history.records]
    assert [{k: v for k, v in record.items() if k != "seconds"} for record in resumed.records] == drop
    assert all(torch.equal(value, continued.state_dict()[name]) for name, value in whole.state_dict().items())


def test_a_checkpoint_of_other_weights_is_refused(tmp_path):
    file = tmp_path / "run.safetensors"
    run(CAL, 1, checkpoint=file)
    with pytest.raises(ValueError, match="lambdas"):
        run(CAL, 1, checkpoint=file, lambdas=(1.0, 0.3, 0.5))
    with pytest.raises(ValueError, match=r"lambdas.*-1"):
        run(CAL, 1, lambdas=(1.0, -1.0, 0.5))


def test_cross_validation_tests_every_graph_once_and_repeats():
    data = graphs(30)
    results = [
        cross_validate_tu(data, lambda: CAL(3, 2, hidden=8, num_layers=1), folds=3, epochs=4, lr=0.02, batch_size=8)
        for _ in range(2)
    ]
    assert results[0].accuracies == results[1].accuracies
    assert results[0].mean >= 0.8  # guessing gives 0.5
    assert all(len(history.records) == 4 for history in results[0].histories)
    one = cross_validate_tu(
        data, lambda: CAL(3, 2, hidden=8, num_layers=1), folds=3, epochs=4, lr=0.02, batch_size=8, only=[1]
    )
    assert one.accuracies == results[0].accuracies[1:2]
    top = cross_validate_tu(data, lambda: CAL(3, 2, hidden=8), folds=2, selection="test_max", epochs=1)
    assert top.selection == "test_max"
    with pytest.raises(ValueError, match="selection"):
        cross_validate_tu(data, CAL, selection="best")
