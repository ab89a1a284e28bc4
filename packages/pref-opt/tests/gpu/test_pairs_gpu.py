"""Losses on pairs and lists on CUDA: equal to float64 on the CPU, in half precision too, and without waiting."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
import torch

from pref_opt.baselines import sequence_logps
from pref_opt.gamma_po import GammaPOLoss, RewardGapQueue, dynamic_margins
from pref_opt.losses import Logps, LossContext, LossOutput, make_loss
from pref_opt.repo import RePOLoss, repo_loss

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pref_opt.losses import PreferenceLoss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

NAMES = [
    *("dpo", "cdpo", "robust_dpo", "dpo_norm", "ipo", "simpo", "cpo", "slic", "orpo", "kto_pair"),
    *("sdpo", "dmpo", "mppo", "gamma_po", "repo", "repo_plus_plus"),
]
BATCH, NEGATIVES = 64, 5


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _values(loss: PreferenceLoss, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(BATCH,), (BATCH, NEGATIVES) if loss.multi_negative else (BATCH,)] * (2 if loss.requires_reference else 1)
    return [-0.1 - 3 * torch.rand(*shape, generator=generator) for shape in shapes]


def _call(loss: PreferenceLoss, values: list[torch.Tensor]) -> tuple[LossOutput, tuple[torch.Tensor, ...]]:
    chosen, rejected = (x.detach().requires_grad_() for x in values[:2])
    lengths = torch.full((BATCH,), 7, device=chosen.device)
    refs = values[2:] or (None, None)
    return loss(Logps(chosen, rejected, *refs, chosen_lengths=lengths), LossContext()), (chosen, rejected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_equals_float64_on_the_cpu(name: str, dtype: torch.dtype) -> None:
    ours, exact = make_loss(name), make_loss(name)
    for seed in range(3):  # the third call of a queue has a past
        values = [x.to(dtype) for x in _values(ours, seed)]
        out, leaves = _call(ours, [x.cuda() for x in values])
        want, exact_leaves = _call(exact, [x.double() for x in values])
        assert out.loss.dtype == torch.float32
        torch.testing.assert_close(out.loss.cpu().double(), want.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(out.chosen_rewards.cpu().double(), want.chosen_rewards, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(out.rejected_rewards.cpu().double(), want.rejected_rewards, rtol=1e-5, atol=1e-6)
        assert set(out.metrics) == set(want.metrics)
        for key, value in want.metrics.items():
            torch.testing.assert_close(out.metrics[key].cpu().double(), value.double(), rtol=1e-4, atol=1e-5)
        tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-5}
        for leaf, exact_leaf in zip(
            torch.autograd.grad(out.loss, leaves), torch.autograd.grad(want.loss, exact_leaves), strict=True
        ):
            assert leaf.dtype == dtype
            torch.testing.assert_close(leaf.cpu().double(), exact_leaf, **tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_never_waits_for_the_device(name: str) -> None:
    loss = make_loss(name)
    values = [x.cuda() for x in _values(loss)]
    _call(loss, values)  # the queue moves to the device
    with _no_waiting():
        for _ in range(3):
            out, leaves = _call(loss, values)
            torch.autograd.grad(out.loss, leaves)


def test_tensor_margins_and_schedules_never_wait() -> None:
    chosen, rejected = -torch.rand(2, BATCH, device="cuda")
    margins = torch.rand(BATCH, device="cuda")
    scheduled = RePOLoss(gamma_schedule={"start": 1.0, "end": 0.5, "total_steps": 10}, sft_weight=0.1)
    with _no_waiting():
        repo_loss(chosen, rejected, gamma=margins)
        scheduled(Logps(chosen, rejected), LossContext())


def test_sequence_logps() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 9, 101, generator=generator)
    labels = torch.randint(0, 101, (4, 9), generator=generator)
    labels[:, :4] = -100
    for dtype in (torch.float32, torch.bfloat16):
        device_logits, device_labels = logits.to(dtype).cuda(), labels.cuda()
        with _no_waiting():
            got = sequence_logps(device_logits, device_labels, average=True)
        exact = sequence_logps(logits.to(dtype).double(), labels, average=True)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.cpu().double(), exact, rtol=1e-5, atol=1e-5)


def test_margins_in_float64_agree() -> None:
    gaps = 3 * torch.randn(256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = dynamic_margins(gaps[:16], gaps[16:], gamma0=4.0, tau=10.0)
    got = dynamic_margins(gaps[:16].cuda(), gaps[16:].cuda(), gamma0=4.0, tau=10.0)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-12, atol=1e-12)


def test_a_broken_gap_on_the_device_does_not_poison_the_queue() -> None:
    queue = RewardGapQueue(init_size=0)
    queue.push(torch.tensor([1.0, float("nan"), float("inf")], device="cuda"))
    assert sorted(queue.sample(1).tolist()) == [0.0, 0.0, 1.0]


def test_state_moves_between_devices() -> None:
    loss, twin = GammaPOLoss(tau=1.0), GammaPOLoss(tau=1.0)
    values = _values(loss)
    _call(loss, [x.cuda() for x in values])
    twin.load_state_dict({key: x.cpu() if isinstance(x, torch.Tensor) else x for key, x in loss.state_dict().items()})
    on_device, _ = _call(loss, [x.cuda() for x in values])
    in_memory, _ = _call(twin, values)
    torch.testing.assert_close(on_device.loss.cpu(), in_memory.loss, rtol=1e-5, atol=1e-6)
