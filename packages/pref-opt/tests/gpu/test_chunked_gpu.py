"""Chunked log-probabilities on a CUDA device: the dense numbers, in the memory of a tile."""

from __future__ import annotations

import pytest
import torch

from pref_opt.chunked import sequence_logps_chunked, token_logps_chunked

pytestmark = pytest.mark.gpu


def draw(n, t, h, v, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(n, t, h, generator=generator, device="cuda", dtype=dtype).requires_grad_()
    weight = (torch.randn(v, h, generator=generator, device="cuda", dtype=dtype) / h**0.5).requires_grad_()
    labels = torch.randint(v, (n, t), generator=generator, device="cuda")
    labels[:, : t // 3] = -100
    return hidden, weight, labels


def dense(hidden, weight, labels):
    logits = hidden @ weight.T
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return logps.masked_fill(labels == -100, 0.0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_matches_the_dense_result(dtype, tolerance):
    hidden, weight, labels = draw(3, 50, 64, 1000, dtype)
    ours = token_logps_chunked(hidden, weight, labels, token_chunk=16, vocab_chunk=300)
    theirs = dense(hidden, weight, labels)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for mine, other in zip(
        torch.autograd.grad(ours.sum(), (hidden, weight)),
        torch.autograd.grad(theirs.sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_summed_in_float32(dtype, autocast):
    hidden, weight, labels = draw(4, 512, 256, 5000, torch.float32 if autocast else dtype)
    with torch.autocast("cuda", dtype=dtype, enabled=autocast):
        ours = token_logps_chunked(hidden, weight, labels, token_chunk=32, vocab_chunk=1000)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    theirs = dense(*wide, labels)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), theirs, rtol=0.02, atol=0.05)
    got = torch.autograd.grad(ours.sum(), (hidden, weight))
    want = torch.autograd.grad(theirs.sum(), wide)
    for mine, other in zip(got, want, strict=True):
        assert mine.dtype == hidden.dtype
        assert (mine.double() - other).norm() < 0.02 * other.norm()


def test_memory_is_that_of_the_inputs_and_a_tile():
    n, t, h, v = 8, 1024, 256, 50_000
    hidden, weight, labels = draw(n, t, h, v, torch.bfloat16)

    def peak(run):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(run().sum(), (hidden, weight))
        return torch.cuda.max_memory_allocated() - before

    def chunked():
        return sequence_logps_chunked(hidden, weight, labels, token_chunk=512, vocab_chunk=8192)

    chunked().sum().backward()  # the workspace of cuBLAS isn't of interest
    hidden.grad = weight.grad = None
    inputs = 2 * (hidden.numel() + weight.numel())
    # Gradients in the dtype of the inputs, those of the hidden states in float32 as well; a few tiles in float32.
    assert peak(chunked) < 4 * inputs + 6 * 4 * 512 * 8192
    assert peak(lambda: dense(hidden, weight, labels)) > 2 * n * t * v
