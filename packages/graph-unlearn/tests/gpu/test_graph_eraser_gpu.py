"""GraphEraser and the attacks on CUDA: the same shards and draws as on the CPU, and figures of the device."""

from __future__ import annotations

import pytest
import torch

from graph_unlearn.attacks import UPDATES, adversarial_edges, efficacy_curve, membership_table
from graph_unlearn.data import synthetic_graph
from graph_unlearn.graph_eraser import GraphEraser
from graph_unlearn.nets import GCN
from graph_unlearn.requests import NodeRequest, apply_request
from graph_unlearn.training import TrainConfig

pytestmark = pytest.mark.gpu
CONFIG = TrainConfig(epochs=20)


@pytest.mark.parametrize("partition", ["blpa", "bekm", "random"])
def test_graph_eraser(partition):
    host = synthetic_graph(120, 16, 3)
    data = host.clone().to("cuda")
    eraser = GraphEraser(lambda: GCN(16, 3), 4, partition, "optimal", config=CONFIG).fit(data)
    if partition != "bekm":  # its embedding is rounded by the device
        same = GraphEraser(lambda: GCN(16, 3), 4, partition, "optimal", config=CONFIG).fit(host)
        assert torch.equal(eraser.assignment.cpu(), same.assignment)
    request = NodeRequest(data.train_mask.nonzero().flatten()[:2])
    posterior = eraser.unlearn(request).predict(apply_request(request, data))
    assert posterior.is_cuda
    assert torch.allclose(posterior.sum(1), torch.ones(120, device="cuda"))


def test_attacks():
    host = synthetic_graph(150, 16, 3)
    data = host.clone().to("cuda")
    drawn = adversarial_edges(data, data.train_mask, 0.5, torch.Generator().manual_seed(0))
    assert drawn.is_cuda
    assert torch.equal(drawn.cpu(), adversarial_edges(host, host.train_mask, 0.5, torch.Generator().manual_seed(0)))
    updates = {"gif_cg": UPDATES["gif_cg"]}
    (row,) = efficacy_curve(lambda: GCN(16, 3), data, [0.5], config=CONFIG, updates=updates)
    assert 0 < row["gif_cg"] <= 1
    rows = membership_table(lambda: GCN(16, 3), data, 0.1, config=CONFIG, updates=updates)
    assert rows[0]["l2"] == 0.5
