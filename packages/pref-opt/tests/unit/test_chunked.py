"""Chunked log-probabilities beside the dense log-softmax, with gradients, bounds on memory, and bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pref_opt.chunked import sequence_logps_chunked, token_logps_chunked

F64 = torch.float64


def dense(hidden, weight, labels, *, bias=None, softcap=None, scale=1.0):
    logits = hidden @ weight.T
    logits = logits if bias is None else logits + bias
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return logps.masked_fill(labels == -100, 0.0)


def draw(n=3, t=7, h=5, v=11, dtype=F64, share=0.6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, t, h, generator=generator, dtype=F64).to(dtype).requires_grad_()
    weight = torch.randn(v, h, generator=generator, dtype=F64).to(dtype).requires_grad_()
    bias = torch.randn(v, generator=generator, dtype=F64).to(dtype).requires_grad_()
    labels = torch.randint(v, (n, t), generator=generator)
    labels[torch.rand(n, t, generator=generator) > share] = -100
    return hidden, weight, bias, labels


def gradients(logps, *inputs):
    factor = torch.linspace(-1, 2, logps.numel(), dtype=logps.dtype).view(logps.shape)
    return torch.autograd.grad((logps * factor).sum(), inputs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (F64, 1e-10)])
@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"scale": 0.25}, {"softcap": 2.0, "scale": 3.0}])
@pytest.mark.parametrize("chunks", [{}, {"token_chunk": 2, "vocab_chunk": 3}, {"token_chunk": 100, "vocab_chunk": 1}])
@pytest.mark.parametrize("with_bias", [False, True])
def test_matches_the_dense_result(dtype, tolerance, options, chunks, with_bias):
    hidden, weight, bias, labels = draw(dtype=dtype)
    inputs = (hidden, weight, bias) if with_bias else (hidden, weight)
    extra = {"bias": bias} if with_bias else {}
    ours = token_logps_chunked(hidden, weight, labels, **extra, **options, **chunks)
    theirs = dense(hidden, weight, labels, **extra, **options)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert (ours[labels == -100] == 0).all()
    for mine, other in zip(gradients(ours, *inputs), gradients(theirs, *inputs), strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5, "scale": 0.7}])
def test_gradcheck(options):
    hidden, weight, bias, labels = draw(n=2, t=3, h=2, v=5)
    assert torch.autograd.gradcheck(
        lambda *x: token_logps_chunked(x[0], x[1], labels, bias=x[2], token_chunk=2, vocab_chunk=2, **options),
        (hidden, weight, bias),
    )


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(1, 7),
    st.integers(1, 7),
    st.floats(0, 1),
    st.integers(0, 999),
)
def test_the_sizes_of_the_tiles_do_not_matter(n, t, v, token_chunk, vocab_chunk, share, seed):
    hidden, weight, bias, labels = draw(n, t, 3, v, share=share, seed=seed)
    ours = token_logps_chunked(hidden, weight, labels, bias=bias, token_chunk=token_chunk, vocab_chunk=vocab_chunk)
    theirs = dense(hidden, weight, labels, bias=bias)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for mine, other in zip(gradients(ours, hidden, weight, bias), gradients(theirs, hidden, weight, bias), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("average", [False, True])
def test_sequences_shift_inside(average):
    hidden, weight, bias, labels = draw()
    labels[1] = -100  # no completion: 0, and no division by 0
    ours = sequence_logps_chunked(hidden, weight, labels, bias=bias, token_chunk=3, average=average)
    theirs = dense(hidden[:, :-1], weight, labels[:, 1:], bias=bias).sum(1)
    if average:
        theirs = theirs / (labels[:, 1:] != -100).sum(1).clamp(min=1)
    assert ours[1] == 0
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for mine, other in zip(gradients(ours, hidden, weight, bias), gradients(theirs, hidden, weight, bias), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


def test_nothing_labelled_gives_zeros_that_can_be_differentiated():
    hidden, weight, bias, labels = draw()
    logps = token_logps_chunked(hidden, weight, labels.fill_(-100), bias=bias)
    assert not logps.any()
    for gradient in torch.autograd.grad(logps.sum(), (hidden, weight, bias)):
        assert not gradient.any()


@pytest.mark.parametrize("needed", ["hidden", "weight", "bias"])
def test_only_needed_gradients_are_computed(needed):
    hidden, weight, bias, labels = draw()
    named = {"hidden": hidden, "weight": weight, "bias": bias}
    (want,) = gradients(dense(hidden, weight, labels, bias=bias), named[needed])
    for name, value in named.items():
        value.requires_grad_(name == needed)
    with _Largest() as seen:
        (got,) = gradients(token_logps_chunked(hidden, weight, labels, bias=bias), named[needed])
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert (tuple(weight.shape) in seen.zeros) == (needed == "weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    hidden, weight, _bias, labels = draw(n=2, t=40, h=16, v=50, dtype=dtype, share=1.0)
    hidden.data /= 4
    ours = token_logps_chunked(hidden, weight, labels, token_chunk=4, vocab_chunk=16)
    wide = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    theirs = dense(*wide, labels)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    got, want = gradients(ours, hidden, weight), gradients(theirs, *wide)
    assert [x.dtype for x in got] == [dtype, dtype]
    for mine, other in zip(got, want, strict=True):
        # One rounding of the result and those of the logits, not one for each of the 20 tiles of tokens.
        assert (mine.float() - other).norm() < 0.01 * other.norm()


def test_autocast_computes_products_in_its_dtype():
    hidden, weight, _bias, labels = draw(dtype=torch.float32, share=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = token_logps_chunked(hidden, weight, labels)
    rounded = token_logps_chunked(hidden.bfloat16(), weight.bfloat16(), labels)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, rounded, rtol=0, atol=0)
    assert gradients(logps, weight)[0].dtype == torch.float32


def test_large_logits_stay_finite():
    hidden, weight, _bias, labels = draw(dtype=torch.float32)
    logps = token_logps_chunked(hidden * 1e4, weight, labels, vocab_chunk=4)
    torch.testing.assert_close(logps, dense(hidden * 1e4, weight, labels))
    assert all(x.isfinite().all() for x in gradients(logps, hidden, weight))


def test_words_that_a_bias_rules_out():
    hidden, weight, bias, labels = draw()
    bias = torch.where(torch.arange(11) < 4, -torch.inf, bias.detach())
    labels = torch.where(labels >= 0, labels.clamp(min=4), labels)
    logps = token_logps_chunked(hidden, weight, labels, bias=bias, vocab_chunk=2)
    torch.testing.assert_close(logps, dense(hidden, weight, labels, bias=bias), rtol=1e-10, atol=1e-10)
    assert all(x.isfinite().all() for x in gradients(logps, hidden, weight))


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation returned, and the shapes made by zeros_like."""

    def __init__(self):
        super().__init__()
        self.entries = 0
        self.zeros = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                self.entries = max(self.entries, value.numel())
        if "zeros_like" in str(func):
            self.zeros.add(tuple(out.shape))
        return out


def test_memory_is_bounded_by_the_tile():
    n, t, h, v = 4, 50, 8, 640
    hidden, weight, bias, labels = draw(n, t, h, v, dtype=torch.float32, share=1.0)
    saved = []
    with (
        _Largest() as seen,
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x),
    ):
        logps = sequence_logps_chunked(hidden, weight, labels, bias=bias, token_chunk=16, vocab_chunk=32)
        logps.sum().backward()
    assert seen.entries == max(n * t * h, v * h)  # nothing larger than the inputs; all logits would be 128,000
    assert max(saved) == max(n * t * h, v * h)
    with _Largest() as seen:
        dense(hidden, weight, labels, bias=bias).sum().backward()
    assert seen.entries == n * t * v


def test_unlabelled_positions_are_not_projected():
    hidden, weight, _bias, labels = draw(n=4, t=50, v=64, share=1.0)
    labels[:, :-2] = -100
    with _Largest() as seen:
        token_logps_chunked(hidden.detach(), weight.detach(), labels)
    assert seen.entries == max(8 * 64, hidden.numel())
    assert 8 * 64 < 4 * 50 * 64


H, W, L = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, dtype=torch.long)
BAD = [
    (lambda: token_logps_chunked(H[0], W, L), r"hidden must have 3 dimensions, got shape \(3, 4\)"),
    (lambda: token_logps_chunked(H, W[0], L), r"weight must have 2 dimensions, got shape \(4,\)"),
    (lambda: token_logps_chunked(H, W, L[0]), r"labels must have 2 dimensions, got shape \(3,\)"),
    (lambda: token_logps_chunked(H, W, L, bias=W), r"bias must have 1 dimensions, got shape \(5, 4\)"),
    (lambda: token_logps_chunked(H.long(), W, L), r"hidden must be a floating-point tensor, got torch.int64"),
    (lambda: token_logps_chunked(H, W, L.float()), r"labels must be integers, got torch.float32"),
    (lambda: token_logps_chunked(H, W, L > 0), r"labels must be integers, got torch.bool"),
    (lambda: token_logps_chunked(H, W, L[:, :2]), r"shape \[N, T\] of hidden, got \(2, 2\) and \(2, 3, 4\)"),
    (lambda: token_logps_chunked(H, W[:, :3], L), r"weight must have shape \[V, 4\] with V >= 1, got \(5, 3\)"),
    (lambda: token_logps_chunked(H, W, L, bias=W[:3, 0]), r"bias must have shape \[5\], got \(3,\)"),
    (lambda: token_logps_chunked(H, W, L + 5), r"labels must be -100 or in \[0, 5\), got 5"),
    (lambda: token_logps_chunked(H, W, L - 1), r"labels must be -100 or in \[0, 5\), got -1"),
    (lambda: token_logps_chunked(H[:0], W, L[:0]), "empty batch"),
    (lambda: sequence_logps_chunked(H[:, :0], W, L[:, :0]), "empty batch"),
    (lambda: token_logps_chunked(H, W, L, token_chunk=0), "token_chunk must be an integer >= 1, got 0"),
    (lambda: token_logps_chunked(H, W, L, vocab_chunk=-1), "vocab_chunk must be an integer >= 1, got -1"),
    (lambda: token_logps_chunked(H, W, L, softcap=0.0), "softcap must be positive and finite, got 0.0"),
    (lambda: sequence_logps_chunked(H, W, L, scale=math.nan), "scale must be positive and finite, got nan"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=range(len(BAD)))
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_lone_token_has_nothing_before_it():
    hidden, weight, _bias, labels = draw(n=2, t=1, share=1.0)
    assert sequence_logps_chunked(hidden, weight, labels).tolist() == [0.0, 0.0]
    assert F.cross_entropy(torch.zeros(1, 11), labels[0]) > 0  # the label itself is one
