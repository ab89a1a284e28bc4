"""ASRC on CUDA: the loss, gradients and graph of the host, and a fit whose clusters are right."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graph_ood import asrc
from graph_ood.asrc import ASRC, adagae_forward, can_graph, clustering_scores, prototype_contrastive_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def _rng(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_graph_loss_and_gradients_equal_the_host() -> None:
    found = []
    for device in ("cpu", "cuda"):
        x = _rng(300, 20).to(device)
        w1, w2 = (_rng(*s, seed=1).div_(s[0] ** 0.5).to(device).requires_grad_() for s in ((20, 16), (16, 8)))
        graph = can_graph(x, 9)
        z, recon, loss = adagae_forward(x, w1, w2, graph.adjacency, graph.prob, 0.3)
        contrast = prototype_contrastive_loss(z, z.roll(1, 0), torch.arange(300, device=device) % 7)
        grads = torch.autograd.grad(loss + contrast, (w1, w2))
        found.append([part.detach().cpu() for part in (*graph, z, recon, loss, contrast, *grads)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-7, atol=1e-10)


def test_float32_loss_at_full_size_is_near_float64() -> None:
    z = (3 * _rng(2000, 64)).cuda()
    graph = can_graph(z, 30)
    exact = asrc._graph_loss(z, asrc._Support.of(graph.prob, graph.prob), 0.25)
    single = asrc._graph_loss(z.float(), asrc._Support.of(graph.prob.float(), graph.prob.float()), 0.25)
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=0)


def test_fit_finds_blobs_and_leaves_nothing_on_the_device() -> None:
    truth = np.arange(400) % 4
    x = np.eye(4, 12)[truth] + 0.1 * np.random.default_rng(0).standard_normal((400, 12))
    fitted = ASRC(epochs=2, inner_steps=20, device="cuda").fit(x)
    assert clustering_scores(truth, fitted.labels_)["acc"] == 1.0
    assert fitted.graph_.prob.device.type == "cpu"
    assert isinstance(fitted.embedding_, np.ndarray)
