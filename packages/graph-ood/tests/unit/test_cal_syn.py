"""CAL on SYN-b graphs and on a real data set: does it do what it is for?"""

from __future__ import annotations

import pytest
import torch
from torch_geometric.data import Batch
from torch_geometric.loader import DataLoader

from graph_ood.baselines import train_baseline
from graph_ood.cal import CAL, cross_validate_tu, train_cal
from graph_ood.data import SynB, load_tu
from graph_ood.explain import mask_auc
from graph_ood.nets import GraphClassifier, ProjectedEncoder
from graph_ood.training import evaluate

TOTAL, BATCH = 800, 32


def syn(bias, seed, test_total=4000, val_total=TOTAL):
    totals = {"train": TOTAL, "val": val_total, "test": test_total}
    return tuple(list(SynB(bias=bias, split=split, total=total, seed=seed)) for split, total in totals.items())


def trained(train, val, seed, *, cal=True, hidden=32, epochs=20, conv="gcn"):
    torch.manual_seed(seed)
    encoder = ProjectedEncoder(10, hidden, 3, conv)
    model = CAL(10, 4, encoder=encoder) if cal else GraphClassifier(encoder, 4)
    options = {"epochs": epochs, "lr": 2e-3, "scheduler": "cosine", "min_lr": 5e-6, "seed": seed}
    loaders = DataLoader(train, BATCH, shuffle=True), DataLoader(val, 256)
    (train_cal if cal else train_baseline)(model, *loaders, **options)
    return model


@pytest.mark.slow
def test_cal_beats_its_backbone_where_the_base_goes_with_the_class():
    # As the cpu case syn-0.9-gin, whose five seeds show a gain of seven points; with GCN it is two, too few for three seeds.
    accuracy = {True: [], False: []}
    for seed in range(3):
        train, val, test = syn(0.9, seed, val_total=4000)
        for cal, values in accuracy.items():
            model = trained(train, val, seed, cal=cal, hidden=64, epochs=30, conv="gin")
            values.append(evaluate(model.predict if cal else model, DataLoader(test, 256)))
    assert sum(accuracy[True]) / 3 - sum(accuracy[False]) / 3 > 0.02, accuracy


@pytest.mark.slow
def test_attention_finds_the_motif_where_the_base_goes_with_the_class():
    # With GCN; with GIN one of these seeds gives its weight to the base.
    node_auc = []
    for seed in range(3):
        train, val, test = syn(0.9, seed, val_total=4000)
        model = trained(train, val, seed, hidden=64, epochs=30)
        data = Batch.from_data_list(test)
        with torch.no_grad():
            node_auc.append(mask_auc(model(data)["node_att"], data.node_gt, data.batch))
    assert min(node_auc) > 0.9, node_auc


@pytest.mark.slow
def test_attention_finds_the_motif_without_being_told():
    train, val, test = syn(0.5, 0, test_total=400)
    model = trained(train, val, 0)
    data = Batch.from_data_list(test)
    with torch.no_grad():
        out = model(data)
    assert mask_auc(out["node_att"], data.node_gt, data.batch) > 0.6  # chance is 0.5
    motif, base = out["node_att"][data.node_gt], out["node_att"][~data.node_gt]
    assert float(motif.mean()) > float(base.mean())
    # the trivial head is at chance, 0.25, while the causal one is not
    right = {head: (out[f"logits_{head}"].argmax(1) == data.y).double().mean() for head in ("trivial", "causal")}
    assert float(right["trivial"]) < 0.4
    assert float(right["causal"]) > float(right["trivial"])


@pytest.mark.slow
def test_shuffled_labels_leave_chance():
    generator = torch.Generator().manual_seed(0)
    splits = syn(0.9, 0, test_total=1600)
    for graphs in splits:
        labels = torch.cat([graph.y for graph in graphs])
        for graph, label in zip(graphs, labels[torch.randperm(len(labels), generator=generator)], strict=True):
            graph.y = label.view(1)
    train, val, test = splits
    model = trained(train, val, 0, epochs=8)
    # 320 test graphs: 0.25 with a standard deviation of 0.024
    assert abs(evaluate(model.predict, DataLoader(test, 256)) - 0.25) < 0.1


@pytest.mark.slow
def test_real_graphs_are_classified_better_than_by_the_larger_class(data_root):
    graphs = load_tu("MUTAG", data_root)
    result = cross_validate_tu(
        graphs,
        lambda: CAL(graphs.num_features, 2, hidden=16),
        epochs=25,
        lr=5e-3,
        batch_size=32,
        only=range(5),
    )
    assert result.mean > 0.7, result.accuracies  # the larger class has 0.665
    assert result.test_max >= result.mean
