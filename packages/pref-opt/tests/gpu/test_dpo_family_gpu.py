"""beta-DPO, Dr. DPO and alpha-DPO on CUDA: the figures of the CPU, and no wait for the device in a training step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from pref_opt.alpha_dpo import AlphaDPOLoss
from pref_opt.beta_dpo import BetaDPOLoss, sample_keep_mask
from pref_opt.dr_dpo import DrDPOLoss
from pref_opt.losses import Logps, LossContext

if TYPE_CHECKING:
    from pref_opt.losses import PreferenceLoss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

TRAIN, EVAL = LossContext(), LossContext(training=False)
LOSSES = {
    "beta_dpo": lambda: BetaDPOLoss(filter_ratio=0.3, debias=True),
    "beta_dpo, first batch": lambda: BetaDPOLoss(filter_ratio=0.3, init_from_first_batch=True),
    "beta_dpo, local": lambda: BetaDPOLoss(filter_ratio=0.3, normalization="local"),
    "dr_dpo": lambda: DrDPOLoss(beta=0.2, beta_prime=0.7),
    "dr_dpo, global": lambda: DrDPOLoss(beta=0.2, group="global"),
    "alpha_dpo": lambda: AlphaDPOLoss(alpha=0.2),
}


def _logps(step: int, device: str, dtype: torch.dtype) -> Logps:
    values = torch.randn(4, 16, generator=torch.Generator().manual_seed(step)) * 3 - 20
    chosen, rejected, ref_chosen, ref_rejected = values.to(dtype).to(device)
    return Logps(chosen.requires_grad_(), rejected.requires_grad_(), ref_chosen, ref_rejected)


def _step(loss: PreferenceLoss, logps: Logps, context: LossContext) -> tuple[torch.Tensor, torch.Tensor]:
    out = loss(logps, context)
    return out.loss, torch.stack(torch.autograd.grad(out.loss, (logps.chosen, logps.rejected)))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_the_cpu(name: str, dtype: torch.dtype) -> None:
    host, device = LOSSES[name](), LOSSES[name]()
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-2}[dtype]
    for step in range(6):
        context = EVAL if step == 4 else TRAIN
        expected = _step(host, _logps(step, "cpu", dtype), context)
        got = _step(device, _logps(step, "cuda", dtype), context)
        assert got[0].device.type == "cuda"
        assert got[0].dtype == torch.promote_types(dtype, torch.float32)
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(b.cpu(), a, rtol=tolerance, atol=tolerance)


def test_the_same_generator_draws_the_same_mask() -> None:
    gap = torch.randn(200, generator=torch.Generator().manual_seed(0))
    masks = [
        sample_keep_mask(gap.to(device), gap_mean=0.1, gap_std=1.0, generator=torch.Generator().manual_seed(7)).cpu()
        for device in ("cpu", "cuda")
    ]
    assert torch.equal(masks[0], masks[1])
    own = sample_keep_mask(gap.cuda(), gap_mean=0.1, gap_std=1.0, generator=torch.Generator("cuda").manual_seed(7))
    assert int(own.sum()) == 160


@pytest.mark.parametrize("name", LOSSES)
def test_a_resumed_run_continues_from_a_state_on_the_cpu(name: str) -> None:
    loss, resumed = LOSSES[name](), LOSSES[name]()
    for step in range(3):
        loss(_logps(step, "cuda", torch.float32), TRAIN)
    state = {key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in loss.state_dict().items()}
    resumed.load_state_dict(state)
    assert all(
        metric.device.type == "cuda" for metric in resumed(_logps(8, "cuda", torch.float32), EVAL).metrics.values()
    )
    for step in range(3, 5):
        a, b = (_step(one, _logps(step, "cuda", torch.float32), TRAIN) for one in (loss, resumed))
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_does_not_wait_for_the_device(name: str) -> None:
    loss = LOSSES[name]()
    batches = [_logps(step, "cuda", torch.float32) for step in range(4)]
    loss(batches[0], TRAIN)  # moves the zeros of the initial state
    torch.cuda.set_sync_debug_mode("error")
    try:
        for logps in batches[1:]:
            _step(loss, logps, TRAIN)
    finally:
        torch.cuda.set_sync_debug_mode("default")
