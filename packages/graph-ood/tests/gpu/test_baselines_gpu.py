"""The baselines on CUDA: the same figures as on the CPU, and training that repeats and resumes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch_geometric.loader import DataLoader

from graph_ood.baselines import METHODS, drop_edge, group_dro_loss, irm_penalty, mixup, train_baseline, vrex_penalty
from graph_ood.data import load_good_motif
from graph_ood.nets import ConvStack, GraphClassifier

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(512, 5, dtype=torch.float64, generator=generator)
    return logits, *(torch.randint(n, (512,), generator=generator) for n in (5, 3))


def test_losses_and_gradients_equal_those_of_the_cpu() -> None:
    def run(device: str) -> list[torch.Tensor]:
        logits, target, env = (value.to(device) for value in _inputs())
        logits.requires_grad_()
        losses = torch.nn.functional.cross_entropy(logits, target, reduction="none")
        dro, moved = group_dro_loss(losses, env, torch.zeros(3, dtype=torch.float64, device=device), step_size=0.3)
        penalties = [irm_penalty(logits, target, env, num_envs=3), vrex_penalty(losses, env, num_envs=3), dro]
        gradients = [torch.autograd.grad(p, logits, retain_graph=True)[0] for p in penalties]
        return [value.detach().cpu() for value in (*penalties, moved, *gradients)]

    for ours, cpu in zip(run("cuda"), run("cpu"), strict=True):
        torch.testing.assert_close(ours, cpu, rtol=1e-10, atol=1e-13)


def test_nothing_waits_for_the_device() -> None:
    logits, target, env = (value.cuda() for value in _inputs())
    losses = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    weights = torch.zeros(3, dtype=torch.float64, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        irm_penalty(logits, target, env, num_envs=3)
        vrex_penalty(losses, env, num_envs=3)
        group_dro_loss(losses, env, weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_mixup_draws_the_same_as_on_the_cpu() -> None:
    h, y = torch.randn(16, 4), torch.arange(16)
    ours, cpu = (mixup(h.to(d), y.to(d), generator=torch.Generator().manual_seed(1)) for d in ("cuda", "cpu"))
    assert ours.share == cpu.share
    assert torch.equal(ours.partner.cpu(), cpu.partner)
    torch.testing.assert_close(ours.h.cpu(), cpu.h)


def test_dropped_edges_lose_both_directions() -> None:
    forward = torch.stack([torch.arange(1000), torch.arange(1000).roll(-1)])
    ring = torch.cat([forward, forward.flip(0)], 1).cuda()
    left = drop_edge(ring, 0.4, generator=torch.Generator("cuda").manual_seed(0)).cpu()
    pairs = {(int(i), int(j)) for i, j in left.T}
    assert {(j, i) for i, j in pairs} == pairs
    assert 1000 < len(pairs) < 1400


@pytest.mark.parametrize("method", METHODS)
def test_training_falls_and_resumes(method: str, tmp_path: Any) -> None:
    splits = load_good_motif(None, "base", "covariate", num_data=1000, seed=0)

    def train(epochs: int, **options: Any) -> Any:
        torch.manual_seed(0)
        model = GraphClassifier(ConvStack(1, 32, 3), 3)
        loaders = DataLoader(splits["train"], 100, shuffle=True), DataLoader(splits["id_val"], 100)
        return train_baseline(model, *loaders, method=method, epochs=epochs, seed=3, device="cuda", **options)

    whole = train(6)
    assert all(0 <= record["val_accuracy"] <= 1 for record in whole.records)
    assert whole.records[-1]["loss"] < whole.records[0]["loss"]
    file = tmp_path / "checkpoint.safetensors"
    train(3, checkpoint=file)
    resumed = train(6, checkpoint=file)
    # sums by atomic additions differ in their last digits from run to run
    for ours, other in zip(resumed.records, whole.records, strict=True):
        assert ours["loss"] == pytest.approx(other["loss"], rel=0.05)
