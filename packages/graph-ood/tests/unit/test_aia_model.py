"""AIA: mask networks, the two steps, training, augmentation and the domain encoder, on small generated graphs."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader

from graph_ood.aia import (
    AIA,
    AIATrainer,
    MaskAugmentation,
    MaskNet,
    combine_masks,
    graph_covariate_shift,
    mask_regularizer,
    objectives,
    train_domain_encoder,
)
from graph_ood.data import GoodMotif, load_good_motif
from graph_ood.nets import ConvStack


def _graph(seed: int, label: int, num_features: int = 3) -> Data:
    """A ring whose label is its mean feature's sign."""
    generator = torch.Generator().manual_seed(seed)
    n = 4 + seed % 4
    ring = torch.stack([torch.arange(n), (torch.arange(n) + 1) % n])
    x = torch.randn(n, num_features, generator=generator) + (2 * label - 1)
    return Data(x=x, edge_index=torch.cat([ring, ring.flip(0)], 1), y=torch.tensor([label]))


def _graphs(count: int = 16, num_features: int = 3) -> list[Data]:
    return [_graph(i, i % 2, num_features) for i in range(count)]


def _batch(count: int = 16) -> Batch:
    return Batch.from_data_list(_graphs(count))


def _model(seed: int = 0, **options) -> AIA:
    torch.manual_seed(seed)
    return AIA(3, 2, **{"hidden": 8, **options})


# --- masks ---------------------------------------------------------------------------------------------------------


def test_mask_scores_are_single_linear_layers_of_node_and_pair_embeddings():
    torch.manual_seed(0)
    net, batch = MaskNet(3, 8).eval(), _batch()
    masks = net(batch.x, batch.edge_index, batch.batch)
    z = net.encoder(batch.x, batch.edge_index)
    pairs = torch.cat([z[batch.edge_index[0]], z[batch.edge_index[1]]], 1)
    torch.testing.assert_close(masks.node, net.node(z).squeeze(1).sigmoid())
    torch.testing.assert_close(masks.edge, net.edge(pairs).squeeze(1).sigmoid())
    reverse = net(batch.x, batch.edge_index.flip(0)).edge
    assert not torch.allclose(reverse, masks.edge)  # directed


@pytest.mark.parametrize("encoder", ["gin", "gcn", "gat"])
def test_masks_and_logits_of_a_graph_do_not_depend_on_its_batch(encoder):
    model, batch = _model(encoder=encoder).eval(), _batch()
    logits, masks = model(batch), model.augment(batch)
    node, edge = 0, 0
    for i, graph in enumerate(_graphs()):
        torch.testing.assert_close(model(graph)[0], logits[i])
        alone = model.augment(graph)
        torch.testing.assert_close(alone.node, masks.node[node : node + graph.num_nodes])
        torch.testing.assert_close(alone.edge, masks.edge[edge : edge + graph.num_edges])
        node, edge = node + graph.num_nodes, edge + graph.num_edges


def test_augment_combines_and_leaves_no_trace():
    model, batch = _model(), _batch()
    model.train()
    before = copy.deepcopy(model.state_dict())
    kinds = {kind: model.augment(batch, kind) for kind in ("combined", "stable", "adversarial")}
    for i in range(2):
        want = combine_masks(kinds["stable"][i], kinds["adversarial"][i])
        assert torch.equal(kinds["combined"][i], want)
        assert not want.requires_grad
    assert all(module.training for module in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_prediction_does_not_see_the_adversary():
    model, batch = _model().eval(), _batch()
    logits = model(batch)
    with torch.no_grad():
        for p in model.adversarial_parameters():
            p.add_(1.0)
    assert torch.equal(model(batch), logits)
    model.stable.node.bias.data.fill_(-4.0)
    assert not torch.allclose(model(batch), logits)


# --- the two steps against plain passes ----------------------------------------------------------------------------


def _plain_losses(model: AIA, data: Batch, y: torch.Tensor, side: str) -> torch.Tensor:
    """Both objectives as the card writes them: every pass apart, through `ConvStack` itself, no shared work."""

    def conv(stack, x, weight=None):
        return ConvStack.forward(stack, x, data.edge_index, weight)

    def masks(net):
        z = conv(net.encoder, data.x)
        pairs = torch.cat([z[data.edge_index[0]], z[data.edge_index[1]]], 1)
        return net.node(z).squeeze(1).sigmoid(), net.edge(pairs).squeeze(1).sigmoid()

    def embed(h, node=None, edge=None):
        h = conv(model.back, h if node is None else h * node[:, None], edge)
        return torch.stack([h[data.batch == g].mean(0) for g in range(data.num_graphs)])

    def regularizer(node, edge, node_ratio, edge_ratio):
        options = {"num_graphs": data.num_graphs}
        of_edge = data.batch[data.edge_index[0]]
        return mask_regularizer(node, data.batch, ratio=node_ratio, **options) + mask_regularizer(
            edge, of_edge, ratio=edge_ratio, **options
        )

    model.train()
    frozen = [model.adversarial] if side == "stable" else [model.front, model.back, model.head, model.stable]
    for module in frozen:
        module.eval()
    zero, flat = torch.zeros(()), torch.zeros(data.num_graphs, 2)
    h = conv(model.front, data.x)
    weights = {"cau_reg": 1.0, "adv_dis": 0.3, "adv_reg": 0.5}
    if side == "adversarial":
        node, edge = masks(model.adversarial)
        original, moved = embed(h), embed(h, node, edge)
        reg = regularizer(node, edge, 1.0, 0.8)
        result = objectives(flat, flat, model.head(moved), moved, original, zero, reg, y, **weights)
        return result.loss_adv_step_minimised
    node, edge = masks(model.stable)
    adv_node, adv_edge = masks(model.adversarial)
    logits = model.head(embed(h, node, edge))
    augmented = model.head(embed(h, combine_masks(node, adv_node), combine_masks(edge, adv_edge)))
    reg = regularizer(node, edge, 0.4, 0.4)
    return objectives(logits, augmented, flat, flat, flat, reg, zero, y, **weights).loss_stable_step


@pytest.mark.parametrize("encoder", ["gin", "gcn", "gat"])
@pytest.mark.parametrize("side", ["stable", "adversarial"])
@pytest.mark.parametrize("layers", [1, 3])
def test_a_step_equals_separate_plain_passes_in_loss_gradients_and_running_statistics(encoder, side, layers):
    depth = {"front_layers": layers, "back_layers": layers, "mask_layers": layers}
    model = _model(encoder=encoder, dropout=0.0, stable_ratio=0.4, **depth).double()
    plain, batch = copy.deepcopy(model), _batch()
    batch.x = batch.x.double()
    if side == "stable":
        loss = model.stable_step(batch, batch.y)["loss"]
        names = ("front", "back", "head", "stable")
    else:
        loss = model.adversarial_step(batch, batch.y, adv_dis=0.3)["loss"]
        names = ("adversarial",)
    want = _plain_losses(plain, batch, batch.y, side)
    torch.testing.assert_close(loss, want)
    ours, theirs = (
        torch.autograd.grad(value, [p for n in names for p in getattr(m, n).parameters()])
        for m, value in ((model, loss), (plain, want))
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    state = plain.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name])


def test_losses_are_those_of_objectives():
    model, batch = _model(dropout=0.0), _batch()
    parts = model.stable_step(batch, batch.y, cau_reg=0.7)
    torch.testing.assert_close(
        parts["loss"].detach(), parts["loss_stable"] + parts["loss_augmented"] + 0.7 * parts["reg_stable"]
    )
    parts = model.adversarial_step(batch, batch.y, adv_dis=0.2, adv_reg=0.6)
    torch.testing.assert_close(
        parts["loss"].detach(), -parts["loss_adv"] + 0.2 * parts["transport_cost"] + 0.6 * parts["reg_adv"]
    )


@pytest.mark.parametrize("side", ["stable", "adversarial"])
def test_a_step_changes_its_own_side_only_running_statistics_included(side):
    trainer, batch = AIATrainer(_model()), _batch()
    trainer.step(batch)
    before = copy.deepcopy(trainer.model.state_dict())
    (trainer.stable_step if side == "stable" else trainer.adversarial_step)(batch)
    for name, value in trainer.model.state_dict().items():
        adversarial = name.startswith("adversarial.")
        same = torch.equal(value, before[name])
        assert same == (adversarial == (side == "stable")), name


def test_the_adversarial_step_leaves_no_gradient_on_the_classifier():
    trainer, batch = AIATrainer(_model()), _batch()
    trainer.adversarial_step(batch)
    assert all(p.grad is None for p in trainer.model.stable_parameters())
    trainer.stable_step(batch)
    grads = [p.grad.clone() for p in trainer.model.stable_parameters()]
    trainer.adversarial_step(batch)
    assert all(torch.equal(p.grad, g) for p, g in zip(trainer.model.stable_parameters(), grads, strict=True))


# --- what the adversary learns -------------------------------------------------------------------------------------


def _clean_loss(model: AIA, batch: Batch) -> float:
    """Cross entropy on the unmasked graphs, in evaluation mode."""
    with torch.no_grad():
        h = model.front(batch.x, batch.edge_index)
        return float(F.cross_entropy(model.head(model._embed(batch, h, None)), batch.y))


def _attack(trainer: AIATrainer, batch: Batch, steps: int) -> dict[str, torch.Tensor]:
    for _ in range(steps):
        trainer.adversarial_step(batch)
    trainer.model.eval()
    masks = trainer.model.augment(batch, "adversarial")
    with torch.no_grad():
        h = trainer.model.front(batch.x, batch.edge_index)
        moved, original = trainer.model._embed(batch, h, masks), trainer.model._embed(batch, h, None)
        return {
            "loss": F.cross_entropy(trainer.model.head(moved), batch.y),
            "cost": F.mse_loss(moved, original),
            "mean": torch.cat(masks).mean(),
        }


def test_the_attack_on_a_frozen_classifier_raises_its_loss():
    model, batch = _model(dropout=0.0), _batch(40)
    trainer = AIATrainer(model, gamma=0.0, adv_reg=0.1, lr=1e-2)
    for _ in range(40):
        trainer.stable_step(batch)
    model.eval()
    clean = _clean_loss(model, batch)
    before = _attack(trainer, batch, 1)["loss"]
    after = _attack(trainer, batch, 50)["loss"]
    assert after > clean
    assert after > 1.5 * before


def test_a_large_transport_weight_makes_the_attack_keep_everything():
    model, batch = _model(dropout=0.0), _batch(40)
    start = _attack(AIATrainer(model, gamma=1e6, adv_reg=0.0, adv_lr=5e-2), batch, 1)
    end = _attack(AIATrainer(model, gamma=1e6, adv_reg=0.0, adv_lr=5e-2), batch, 200)
    assert start["mean"] < 0.8
    assert end["mean"] > 0.95
    assert end["cost"] < 0.01 * start["cost"]


@pytest.mark.parametrize("ratio", [0.25, 0.8])
def test_the_stable_mask_reaches_its_ratio(ratio):
    loader = DataLoader(_graphs(64), batch_size=16, shuffle=True)
    model = _model(stable_ratio=ratio)
    AIATrainer(model, lr=1e-2, epochs=20, warmup_select=0).fit(loader)
    masks = model.augment(_batch(64), "stable")
    assert masks.node.mean().item() == pytest.approx(ratio, abs=0.15)
    assert masks.edge.mean().item() == pytest.approx(ratio, abs=0.15)


# --- training ------------------------------------------------------------------------------------------------------


def test_training_learns_and_repeats_bit_for_bit():
    loader, test = DataLoader(_graphs(64), batch_size=16, shuffle=True), DataLoader(_graphs(40), batch_size=40)
    runs = []
    for _ in range(2):
        model = _model()
        history = AIATrainer(model, lr=1e-2, epochs=8, warmup_select=2, seed=3).fit(loader, test, {"test": test})
        runs.append((model.state_dict(), history))
    assert all(torch.equal(v, runs[1][0][k]) for k, v in runs[0][0].items())
    history = runs[0][1]
    assert history.best["test_accuracy"] > 0.85  # half of the graphs have either label
    assert history.best_epoch >= 2
    assert {"loss", "loss_adv_step", "loss_stable", "loss_augmented", "loss_adv", "transport_cost"} <= set(history.best)
    assert all(math.isfinite(v) for record in history.records for v in record.values())


class _StopError(Exception):
    pass


@pytest.mark.parametrize("encoder", ["gin", "gat"])
def test_an_interrupted_run_ends_like_one_that_was_not(tmp_path, encoder):
    loader, val = DataLoader(_graphs(48), batch_size=16, shuffle=True), DataLoader(_graphs(20), batch_size=20)

    def trainer():
        return AIATrainer(_model(encoder=encoder), epochs=5, warmup_select=1, seed=1)

    def stop(record):
        if record["epoch"] == 1:
            raise _StopError

    whole = trainer()
    whole.fit(loader, val)
    with pytest.raises(_StopError):
        trainer().fit(loader, val, checkpoint=tmp_path / "run.safetensors", on_epoch=stop)
    torch.manual_seed(99)
    rest = trainer()
    seen = []
    history = rest.fit(loader, val, checkpoint=tmp_path / "run.safetensors", on_epoch=seen.append)
    assert [r["epoch"] for r in seen] == [2, 3, 4]
    assert len(history.records) == 5
    want = whole.model.state_dict()
    assert all(torch.equal(v, want[k]) for k, v in rest.model.state_dict().items())
    with pytest.raises(ValueError, match="gamma"):
        AIATrainer(_model(encoder=encoder), epochs=5, warmup_select=1, seed=1, gamma=1.0).fit(
            loader, val, checkpoint=tmp_path / "run.safetensors"
        )


def test_binary_task_with_missing_labels():
    graphs = _graphs(32)
    for i, graph in enumerate(graphs):
        graph.y = torch.tensor([[float(i % 2), math.nan if i % 3 else 1.0 - i % 2]])
    torch.manual_seed(0)
    trainer = AIATrainer(AIA(3, 2, hidden=8, task="binary"), lr=1e-2, epochs=20, warmup_select=0)
    history = trainer.fit(DataLoader(graphs, batch_size=8, shuffle=True))
    assert history.records[-1]["loss_stable"] < 0.8 * history.records[0]["loss_stable"]
    scores = trainer.model(Batch.from_data_list(graphs))[:, 0] > 0
    assert (scores == torch.tensor([i % 2 == 1 for i in range(32)])).float().mean() > 0.85


def test_graphs_without_edges_and_with_one_node():
    lone = Data(x=torch.randn(1, 3), edge_index=torch.empty(2, 0, dtype=torch.long), y=torch.tensor([1]))
    batch = Batch.from_data_list([*_graphs(6), lone])
    trainer = AIATrainer(_model())
    losses = trainer.step(batch)
    assert all(v.isfinite() for v in losses.values())
    only = Batch.from_data_list([lone.clone() for _ in range(4)])
    assert all(v.isfinite() for v in trainer.step(only).values())
    assert trainer.model.eval()(only).isfinite().all()


@pytest.mark.slow
def test_on_motifs_it_learns_the_motif():
    splits = load_good_motif(domain="base", num_data=1200, seed=0)
    torch.manual_seed(0)
    model = AIA(1, 3, hidden=32)
    loaders = {name: DataLoader(splits[name], batch_size=256) for name in ("id_val", "id_test")}
    trainer = AIATrainer(model, epochs=20, warmup_select=0, lr=5e-3)
    history = trainer.fit(
        DataLoader(splits["train"], batch_size=64, shuffle=True), loaders["id_val"], {"test": loaders["id_test"]}
    )
    assert history.best["test_accuracy"] > 0.5  # the most frequent class has about a third


# --- augmentation and shift ----------------------------------------------------------------------------------------


def test_mask_augmentation_is_a_transform():
    model, graph = _model(), _graph(3, 1)
    masks = model.augment(graph)
    moved = MaskAugmentation(model)(graph)
    assert torch.equal(moved.x, graph.x * masks.node[:, None])
    assert torch.equal(moved.edge_weight, masks.edge)
    assert "edge_weight" not in graph  # the graph itself stays
    assert torch.equal(moved.edge_index, graph.edge_index)
    with pytest.raises(ValueError, match="did you mean 'stable'"):
        MaskAugmentation(model, "stabel")


def test_domain_encoder_separates_bases_but_not_halves():
    options = {"domain": "base", "num_data": 2000, "seed": 1}
    train, path = GoodMotif(split="train", **options), GoodMotif(split="test", **options)
    state = torch.random.get_rng_state()

    def shift(p, q):
        encoder = train_domain_encoder(p, q)
        generator = torch.Generator().manual_seed(0)
        return graph_covariate_shift(encoder.features(p), encoder.features(q), generator=generator)

    assert shift(train[:300], train[300:600]) < 0.15
    assert shift(train[:300], path) > 0.4
    assert torch.equal(torch.random.get_rng_state(), state)


def test_domain_encoder_takes_weighted_and_plain_graphs():
    graphs = _graphs(12)
    masked = [MaskAugmentation(_model())(graph) for graph in graphs]
    encoder = train_domain_encoder(masked, graphs, epochs=2)
    features = encoder.features(masked)
    assert features.shape == (12, 16)
    assert not torch.allclose(features, encoder.features(graphs))
    with pytest.raises(ValueError, match="both sets need graphs"):
        train_domain_encoder([], graphs)
    with pytest.raises(ValueError, match="node features"):
        train_domain_encoder(graphs, _graphs(3, num_features=2))


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stable_ratio": 0.0}, "stable_ratio"),
        ({"adv_node_ratio": 1.1}, "adv_node_ratio"),
        ({"adv_edge_ratio": -0.2}, "adv_edge_ratio"),
        ({"encoder": "gim"}, "did you mean 'gin'"),
        ({"task": "regression"}, "task"),
        ({"dropout": 1.5}, "dropout"),
        ({"hidden": 0}, "hidden"),
        ({"front_layers": 0}, "num_layers"),
    ],
)
def test_model_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        _model(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": 0.0}, "lr"),
        ({"adv_lr": -1.0}, "adv_lr"),
        ({"gamma": -0.1}, "gamma"),
        ({"adv_reg": math.nan}, "adv_reg"),
        ({"epochs": 0}, "epochs"),
        ({"epochs": 50}, "warmup_select.*50"),
    ],
)
def test_trainer_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        AIATrainer(_model(), **options)


def test_training_refuses_unknown_labels_and_broken_features():
    trainer = AIATrainer(_model(), epochs=1, warmup_select=0)
    graphs = _graphs(8)
    graphs[5].y = torch.tensor([2])
    with pytest.raises(ValueError, match=r"target of training graph 5.*\[0, 2\).*2"):
        trainer.fit(DataLoader(graphs, batch_size=4))
    graphs = _graphs(8)
    graphs[2].x[1, 0] = math.nan
    with pytest.raises(ValueError, match="x of training graph 2 must be finite"):
        trainer.fit(DataLoader(graphs, batch_size=4))
    batch = _batch()
    with pytest.raises(ValueError, match="target"):
        trainer.model.stable_step(batch, batch.y[:3])
    with pytest.raises(ValueError, match="unknown kind"):
        trainer.model.augment(batch, "other")
