from __future__ import annotations

import copy

import pytest
import torch
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader

from graph_ood.cal import CAL, CALPlus, cal_loss, intervene, train_cal, update_prototypes

pytestmark = pytest.mark.gpu


def graphs(count=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ring = torch.tensor([[0, 1, 2, 3, 1, 2, 3, 0, 0], [1, 2, 3, 0, 0, 1, 2, 3, 0]])
    return [
        Data(x=torch.randn(4, 3, generator=generator) * 0.3 + i % 2, edge_index=ring, y=torch.tensor([i % 2]))
        for i in range(count)
    ]


def no_wait():
    """Any wait for the device is an error inside; what does not wait stays that way."""

    class NoWait:
        def __enter__(self):
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *_):
            torch.cuda.set_sync_debug_mode("default")

    return NoWait()


@pytest.mark.parametrize("encoder", ["gcn", "gin", "gat"])
def test_the_gpu_gives_the_loss_and_the_gradients_of_the_cpu(encoder):
    torch.manual_seed(0)
    # without dropout and shuffling nothing is random; the CPU takes sparse products, the GPU does not
    cpu = CAL(3, 2, encoder=encoder, hidden=8, shuffle=False)
    for module in cpu.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    gpu = copy.deepcopy(cpu).cuda()
    batch = Batch.from_data_list(graphs(6))
    found = []
    for model, data in ((cpu, batch), (gpu, batch.clone().cuda())):
        parts = model.training_loss(data)
        parts["loss"].backward()
        found.append([parts["loss"].detach().cpu(), *(p.grad.cpu() for p in model.parameters() if p.grad is not None)])
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [CAL, CALPlus])
def test_a_step_does_not_wait_for_the_device(kind):
    torch.manual_seed(0)
    model = kind(3, 2, hidden=8).cuda()
    batch = Batch.from_data_list(graphs(6)).cuda()
    optimizer = torch.optim.Adam(model.parameters())
    for number in range(3):
        if number == 2:  # the first steps allocate
            with no_wait():
                loss = model.training_loss(batch)["loss"]
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        else:
            optimizer.zero_grad()
            model.training_loss(batch)["loss"].backward()
            optimizer.step()
    assert bool(loss.isfinite())


def test_functions_on_the_gpu_are_those_on_the_cpu():
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 2, 1, 1, 0])
    torch.testing.assert_close(
        cal_loss(z.cuda(), 2 * z.cuda(), -z.cuda(), y.cuda()).loss.cpu(), cal_loss(z, 2 * z, -z, y).loss
    )
    for generator in (torch.Generator().manual_seed(1), torch.Generator("cuda").manual_seed(1)):
        mixed = intervene(z.cuda(), torch.zeros(5, 3).cuda(), generator=generator)
        assert mixed.is_cuda
        torch.testing.assert_close(mixed.sum(0).cpu(), z.sum(0))
    prototypes, seen = torch.randn(3, 3), torch.tensor([True, True, False])
    found = update_prototypes(z.cuda(), y.cuda(), prototypes.cuda(), seen.cuda())
    torch.testing.assert_close(found[0].cpu(), update_prototypes(z, y, prototypes, seen)[0])


@pytest.mark.parametrize("kind", [CAL, CALPlus])
def test_training_on_the_gpu_learns(kind):
    torch.manual_seed(0)
    model = kind(3, 2, hidden=8, num_layers=1)
    loader = DataLoader(graphs(), batch_size=8, shuffle=True)
    history = train_cal(model, loader, DataLoader(graphs(12, 1), 6), epochs=10, lr=0.01, device="cuda")
    assert history.best["val_accuracy"] >= 0.9  # guessing gives 0.5
    assert model.explain(graphs(1)[0].cuda())[0].node_mask.device.type == "cpu"
