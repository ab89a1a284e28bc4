"""GIF on a CUDA device: the same numbers as on the CPU."""

from __future__ import annotations

import pytest
import torch

from graph_unlearn.data import synthetic_graph
from graph_unlearn.gif import unlearn
from graph_unlearn.nets import MODELS, build_model
from graph_unlearn.requests import draw_request
from graph_unlearn.training import TrainConfig, accuracy, retrain, train

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", list(MODELS))
def test_the_same_step_as_on_the_cpu(name, sparse):
    data = synthetic_graph(300, 16, 3)
    data.x = data.x.double()
    model = retrain(lambda: build_model(name, 16, 3).double(), data, data.train_mask, TrainConfig(epochs=20, lr=0.01))
    for task in ("node", "edge", "feature"):
        request = draw_request(task, data, 0.05)
        here = data.__copy__()
        if sparse:
            here.x = data.x.to_sparse()
        on_cpu = unlearn(model, here, request, damping=3e3, rtol=1e-10)
        on_gpu = unlearn(model.to("cuda"), here.clone().to("cuda"), request, damping=3e3, rtol=1e-10)
        model.to("cpu")
        for a, b in zip(on_cpu.delta.values(), on_gpu.delta.values(), strict=True):
            torch.testing.assert_close(a, b.cpu(), rtol=1e-6, atol=1e-10)
        assert on_gpu.timings.total > 0


def test_batches_and_training():
    data = synthetic_graph(300, 16, 3).to("cuda")
    torch.manual_seed(0)
    model = train(build_model("gcn", 16, 3).cuda(), data)
    assert accuracy(model, data, data.test_mask) > 0.6
    request = draw_request("edge", data, 0.05)
    data.x, model = data.x.double(), model.double()
    whole = unlearn(model, data, request, rtol=1e-10)
    parts = unlearn(model, data, request, rtol=1e-10, batch_size=64)
    for a, b in zip(whole.delta.values(), parts.delta.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-10)
