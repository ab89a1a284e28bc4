from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader

from graph_ood.data import load_good_motif
from graph_ood.infoigl import InfoIGL, InfoIGLTrainer, update_prototypes
from graph_ood.nets import GraphClassifier
from graph_ood.training import fit


def graphs(count=30, seed=0):
    """Three classes: the mean of the features tells them apart. On rings."""
    generator = torch.Generator().manual_seed(seed)
    nodes = torch.arange(5)
    edges = torch.cat([torch.stack([nodes, (nodes + 1) % 5]), torch.stack([(nodes + 1) % 5, nodes])], 1)
    return [
        Data(x=torch.randn(5, 2, generator=generator) * 0.5 + i % 3, edge_index=edges, y=torch.tensor([i % 3]))
        for i in range(count)
    ]


def make(seed=0, **options):
    torch.manual_seed(seed)
    return InfoIGL(2, 3, **{"hidden": 16, "num_layers": 2, **options})


def run(trainer, epochs, **options):
    return trainer.fit(
        DataLoader(graphs(), batch_size=10, shuffle=True),
        DataLoader(graphs(15, seed=1), batch_size=15),
        epochs=epochs,
        **options,
    )


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def off_diagonal_cosine(w):
    w = nn.functional.normalize(w, dim=1)
    return float((w @ w.T)[~torch.eye(len(w), dtype=torch.bool)].mean())


# --- network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["gin", "gcn", "gat"])
@pytest.mark.parametrize("projection", [None, "mlp"])
def test_forward_shapes_ranges_and_gradients(encoder, projection):
    model = make(encoder=encoder, projection=projection)
    batch = Batch.from_data_list(graphs(6))
    out = model(batch)
    width = 16 if projection is None else 8
    assert {k: tuple(v.shape) for k, v in out.items()} == {
        "logits": (6, 3),
        "z": (6, width),
        "node_att": (30,),
        "edge_att": (60,),
    }
    assert model.contrast_dim == width
    for name in ("node_att", "edge_att"):
        assert torch.all((out[name] > 0) & (out[name] < 1))
    (out["logits"].square().sum() + out["z"].square().sum()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_without_filter_it_is_a_plain_classifier():
    model = make(filter=False).eval()
    batch = Batch.from_data_list(graphs(6))
    plain = GraphClassifier(model.encoder, 3, head=model.head).eval()
    out = model(batch)
    torch.testing.assert_close(out["logits"], plain(batch))
    torch.testing.assert_close(out["z"], plain.embed(batch))
    assert torch.equal(out["node_att"], torch.ones(30))
    assert torch.equal(out["edge_att"], torch.ones(60))


def test_filter_is_cals_causal_branch():
    model = make().eval()
    batch = Batch.from_data_list(graphs(6))
    h = model.encoder(batch.x, batch.edge_index)
    part = model.redundancy_filter
    node = part.split.node(h).softmax(1)[:, 1]
    source, target = batch.edge_index
    edge = part.split.edge(torch.cat([h[source], h[target]], 1)).softmax(1)[:, 1]
    # dense: D^-1/2 (W + I) D^-1/2 with the degree of the source
    adjacency = torch.eye(30).index_put((source, target), edge)
    scale = adjacency.sum(1).rsqrt()
    mixed = (scale[:, None] * adjacency * scale).T @ (part.norm(node[:, None] * h) @ part.conv.weight) + part.conv.bias
    want = torch.zeros(6, 16).index_add(0, batch.batch, mixed.relu())
    out = model(batch)
    torch.testing.assert_close(out["z"], want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((out["node_att"], out["edge_att"]), (node, edge))


def test_own_encoder():
    class Encoder(nn.Module):
        hidden = 4

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 4)

        def forward(self, x, edge_index):
            return self.linear(x)

    assert make(encoder=Encoder())(Batch.from_data_list(graphs(3)))["z"].shape == (3, 4)


def test_predict_gives_the_logits_of_a_single_graph_too():
    model = make().eval()
    one = graphs(1)[0]
    torch.testing.assert_close(model.predict(one), model.predict(Batch.from_data_list([one])))


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_training_learns_separable_classes(variant):
    # under the paper's form products of sums over nodes are large; the projection is bounded by its batch norm
    trainer = InfoIGLTrainer(make(projection="mlp"), lr=0.01, variant=variant)
    history = run(trainer, 15, warmup_select=5)
    assert history.records[-1]["loss"] < history.records[0]["loss"]
    assert history.best["val_accuracy"] > 0.8  # chance 0.33
    assert history.best_epoch >= 5
    # prototypes are those of the training graphs
    assert trainer.state.prototypes.shape == (3, 8)
    assert not trainer.state.prototypes.requires_grad


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_without_contrast_it_is_training_on_cross_entropy(variant):
    ours, plain = make(), make()
    run(InfoIGLTrainer(ours, lr=0.01, weight_decay=0.01, lambda_s=0.0, lambda_i=0.0, variant=variant), 4)
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.01, weight_decay=0.01)

    def step(batch):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(plain(batch)["logits"], batch.y)
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach()}

    fit(
        plain,
        DataLoader(graphs(), batch_size=10, shuffle=True),
        step=step,
        predict=plain.predict,
        optimizers=[optimizer],
        val_loader=DataLoader(graphs(15, seed=1), batch_size=15),
        epochs=4,
        scheduler="cosine",
        min_lr=1e-6,
    )
    assert same(ours, plain)
    other = make()
    run(InfoIGLTrainer(other, lr=0.01, weight_decay=0.01, variant=variant), 4)
    assert not same(other, plain)


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_a_run_continues_exactly(tmp_path, variant):
    def trainer():
        return InfoIGLTrainer(make(projection="mlp"), variant=variant, num_negatives=15)  # tops up from the memory

    whole, parts = trainer(), trainer()
    expected = run(whole, 6)

    def stop(record):
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(parts, 6, checkpoint=tmp_path / "run.safetensors", on_epoch=stop)
    resumed = trainer()
    history = run(resumed, 6, checkpoint=tmp_path / "run.safetensors")
    assert same(whole.model, resumed.model)
    assert torch.equal(whole.state.prototypes, resumed.state.prototypes)
    assert torch.equal(whole.state.memory_bank, resumed.state.memory_bank)
    assert [r["loss"] for r in history.records] == [r["loss"] for r in expected.records]


def test_prototypes_matter_to_the_continuation(tmp_path):
    """Losing them would show: the test above can fail."""
    path = tmp_path / "run.safetensors"
    run(InfoIGLTrainer(make()), 3, checkpoint=path)
    lost, kept = InfoIGLTrainer(make()), InfoIGLTrainer(make())
    lost.load_state_dict = lambda state_dict: None
    for trainer in (lost, kept):
        run(trainer, 3, checkpoint=path)
        trainer.step(Batch.from_data_list(graphs(6)))
    assert not torch.equal(lost.state.prototypes, kept.state.prototypes)


def test_checkpoint_of_other_settings_is_refused(tmp_path):
    run(InfoIGLTrainer(make()), 1, checkpoint=tmp_path / "run.safetensors")
    with pytest.raises(ValueError, match="lambda_s"):
        run(InfoIGLTrainer(make(), lambda_s=0.1), 1, checkpoint=tmp_path / "run.safetensors")


def test_state_survives_a_round_trip():
    trainer = InfoIGLTrainer(make())
    assert trainer.state_dict() == {}
    run(trainer, 1)
    other = InfoIGLTrainer(make())
    other.load_state_dict(copy.deepcopy(trainer.state_dict()))
    torch.testing.assert_close(tuple(other.state), tuple(trainer.state))
    other.load_state_dict({})
    assert other.state is None
    with pytest.raises(ValueError, match=r"memory_bank must be \(3, 4, 16\), got \(3, 10, 16\)"):
        InfoIGLTrainer(make(), num_negatives=4).load_state_dict(trainer.state_dict())


def test_memory_starts_anew_in_every_epoch_and_prototypes_do_not():
    trainer = InfoIGLTrainer(make())
    run(trainer, 1)
    bank, prototypes = trainer.state.memory_bank, trainer.state.prototypes
    torch.manual_seed(99)
    trainer.start_epoch()
    assert not torch.isclose(trainer.state.memory_bank, bank).any()
    assert torch.equal(trainer.state.prototypes, prototypes)


def test_starting_an_epoch_takes_nothing_from_the_global_stream():
    trainer = InfoIGLTrainer(make())
    torch.manual_seed(3)
    trainer.start_epoch()
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), drawn)


def test_a_batch_whose_class_is_out_of_range_is_refused():
    bad = graphs()
    bad[7].y = torch.tensor([3])
    with pytest.raises(ValueError, match=r"y must be in \[0, 3\), got values from 0 to 3"):
        InfoIGLTrainer(make()).fit(DataLoader(bad, batch_size=10), epochs=1)


BAD = [
    (lambda: make(encoder="gnn"), r"unknown encoder 'gnn'; accepted: gat, gcn, gin"),
    (lambda: make(projection="linear"), r"projection must be None or 'mlp', got 'linear'"),
    (lambda: InfoIGL(2, 1), r"num_classes must be an integer >= 2, got 1"),
    (lambda: make(hidden=0), r"hidden must be an integer >= 1, got 0"),
    (lambda: make(dropout=1.5), r"dropout must be in \[0, 1\], got 1.5"),
    (lambda: make(hidden=1, projection="mlp"), r"hidden must be at least 2 with projection 'mlp', got 1"),
    (lambda: InfoIGLTrainer(make(), lr=0.0), r"lr must be a positive finite number, got 0.0"),
    (lambda: InfoIGLTrainer(make(), weight_decay=-1.0), r"weight_decay must be a finite number >= 0"),
    (lambda: InfoIGLTrainer(make(), lambda_s=-1.0), r"lambda_s must be a finite number >= 0"),
    (lambda: InfoIGLTrainer(make(), lambda_i=-1.0), r"lambda_i must be a finite number >= 0"),
    (lambda: InfoIGLTrainer(make(), lambda_c=2.0), r"lambda_c must be in \[0, 1\], got 2.0"),
    (lambda: InfoIGLTrainer(make(), pred_weight=-1.0), r"pred_weight must be a finite number >= 0"),
    (lambda: InfoIGLTrainer(make(), variant="papre"), r"unknown variant 'papre'; .* did you mean 'paper'\?"),
    (lambda: InfoIGLTrainer(make(), num_negatives=0), r"num_negatives must be an integer >= 1, got 0"),
    (lambda: InfoIGLTrainer(make(), tau=0.0), r"tau must be a positive finite number, got 0.0"),
    (lambda: InfoIGLTrainer(make(), temperature=0.0), r"temperature must be a positive finite number, got 0.0"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=range(len(BAD)))
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- generated data -----------------------------------------------------------------------------------------------


def separation(model, batch):
    """Mean cosine between the class means of what is contrasted, over all graphs of the batch."""
    with torch.no_grad():
        return off_diagonal_cosine(update_prototypes(model(batch)["z"], batch.y, None, num_classes=3))


@pytest.mark.slow
def test_in_distribution_accuracy_and_separation_of_classes():
    """No shift, two seeds: far above chance (0.33), and the class means of validation graphs move apart.

    The prototypes themselves are rewritten from some twenty graphs per class in every batch; their cosine moves by 0.1
    from epoch to epoch, so that class means over 1,000 graphs take their place here.
    """
    splits = load_good_motif(None, "base", "no_shift", num_data=5000, seed=0)  # 2997 to train on
    validation = Batch.from_data_list(list(splits["val"]))
    accuracy, before, after = [], [], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = InfoIGL(1, 3, hidden=64)
        before.append(separation(copy.deepcopy(model), validation))
        trainer = InfoIGLTrainer(model)
        loaders = (DataLoader(splits["train"], batch_size=64, shuffle=True), DataLoader(splits["val"], batch_size=256))
        history = trainer.fit(*loaders, epochs=20, seed=seed)
        assert history.records[-1]["loss"] < history.records[0]["loss"] - 0.1
        accuracy.append(history.best["val_accuracy"])
        after.append(separation(model, validation))
    assert sum(accuracy) / 2 > 0.6
    assert all(b - a > 0.01 for a, b in zip(after, before, strict=True))
