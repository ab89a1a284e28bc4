"""Blocked log-sum-exp and full-ranking evaluation on CUDA."""

from __future__ import annotations

import pytest
import torch

from recsys_losses.blocked import blocked_log_sum_exp, blocked_softmax_loss
from recsys_losses.metrics import METRICS, evaluate_full_ranking, topk_items

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    # Triton 3.9 announces a changed default of a switch that the kernels set themselves
    pytest.mark.filterwarnings("ignore:.*TRITON_DEFAULT_FP_FUSION.*:UserWarning"),
]


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(("rows", "items", "dim"), [(3, 47, 31), (1024, 50_000, 64), (257, 70_001, 128), (1, 1, 1)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("excluded", [False, True])
def test_equals_float64(impl: str, rows: int, items: int, dim: int, with_bias: bool, excluded: bool) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    user = torch.randn(rows, dim, generator=generator, device="cuda", requires_grad=True)
    item = (torch.randn(items, dim, generator=generator, device="cuda") * 0.3).requires_grad_()
    bias = torch.randn(items, generator=generator, device="cuda", requires_grad=True) if with_bias else None
    exclude = torch.randint(-1, items, (rows,), generator=generator, device="cuda") if excluded and items > 1 else None
    cotangent = torch.randn(rows, generator=generator, device="cuda")
    wrt = [x for x in (user, item, bias) if x is not None]
    double = [x.detach().double().requires_grad_() for x in wrt]
    exact = blocked_log_sum_exp(
        double[0], double[1], item_bias=double[2] if with_bias else None, exclude=exclude, impl="torch"
    )
    ours = blocked_log_sum_exp(user, item, item_bias=bias, exclude=exclude, impl=impl)  # type: ignore[arg-type]
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    exact_grads = torch.autograd.grad(exact, double, cotangent.double())
    for x, y in zip(torch.autograd.grad(ours, wrt, cotangent), exact_grads, strict=True):
        assert float((x - y).abs().max() / y.abs().max()) < 1e-5


def test_auto_is_triton_and_repeats_bit_for_bit() -> None:
    generator = torch.Generator("cuda").manual_seed(1)
    user = torch.randn(500, 64, generator=generator, device="cuda", requires_grad=True)
    item = torch.randn(9000, 64, generator=generator, device="cuda", requires_grad=True)
    target = torch.randint(9000, (500,), generator=generator, device="cuda")
    results = []
    for impl in ("auto", "triton", "triton"):
        loss = blocked_softmax_loss(user, item, target, temperature=0.1, impl=impl)  # type: ignore[arg-type]
        results.append((loss, *torch.autograd.grad(loss, (user, item))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_peak_memory_is_a_tenth_of_the_logits(impl: str) -> None:
    rows, items = 1024, 200_000
    user = torch.randn(rows, 64, device="cuda", requires_grad=True)
    item = torch.randn(items, 64, device="cuda", requires_grad=True)
    target = torch.zeros(rows, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = blocked_softmax_loss(user, item, target, temperature=1.0, similarity="dot", impl=impl)  # type: ignore[arg-type]
    loss.backward()
    extra = torch.cuda.max_memory_allocated() - before - item.numel() * 4 - user.numel() * 4  # beside the gradients
    assert extra <= rows * items * 4 / 10


def test_evaluation_equals_cpu() -> None:
    generator = torch.Generator().manual_seed(2)
    user = torch.randint(-3, 4, (60, 8), generator=generator).float()  # exact scores, many ties
    item = torch.randint(-3, 4, (5000, 8), generator=generator).float()
    draw = torch.rand(60, 5000, generator=generator)
    train, test = (draw < 0.01).nonzero().T, (draw > 0.99).nonzero().T
    options = {"batch_size": 16, "item_block": 3000, "deterministic": True}
    on_cpu = evaluate_full_ranking(user, item, train, test, metrics=METRICS, **options)  # type: ignore[arg-type]
    on_gpu = evaluate_full_ranking(user.cuda(), item.cuda(), train, test, metrics=METRICS, **options)  # type: ignore[arg-type]
    assert on_gpu == pytest.approx(on_cpu, rel=1e-12)
    top = topk_items(user.cuda(), item.cuda(), train.cuda(), k=7, deterministic=True)
    assert torch.equal(top.cpu(), topk_items(user, item, train, k=7, deterministic=True))
