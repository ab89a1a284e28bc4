"""Blocked log-sum-exp against materialised scores: values, gradients, memory, and the Triton kernels interpreted."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.nn import functional as F

from recsys_losses.blocked import blocked_log_sum_exp, blocked_scores, blocked_softmax_loss


def materialised(user: Tensor, item: Tensor, temperature: float, bias: Tensor | None, exclude: Tensor | None) -> Tensor:
    """Log-sum-exp of the full matrix: the oracle."""
    score = user @ item.T / temperature
    if bias is not None:
        score = score + bias
    if exclude is not None:
        row, col = (torch.arange(len(user)), exclude) if exclude.ndim == 1 else exclude
        mask = torch.zeros(score.shape, dtype=torch.bool)
        mask[row, col] = True
        score = score.masked_fill(mask, -torch.inf)
    return torch.logsumexp(score, 1)


def case(
    rows: int, items: int, dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    user = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    item = torch.randn(items, dim, generator=generator, dtype=torch.float64)
    bias = torch.randn(items, generator=generator, dtype=torch.float64)
    return tuple(x.to(dtype).requires_grad_() for x in (user, item, bias))  # type: ignore[return-value]


# odd sizes, one block, several blocks, more rows than a block of rows holds
SHAPES = [(1, 1, 1, None), (3, 47, 31, 10), (5, 1100, 3, None), (7, 64, 8, 64), (2050, 33, 2, 8)]


@pytest.mark.parametrize(("rows", "items", "dim", "block_size"), SHAPES)
@pytest.mark.parametrize("excluded", ["none", "one", "pairs"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_materialised(
    rows: int, items: int, dim: int, block_size: int | None, excluded: str, with_bias: bool
) -> None:
    user, item, bias = case(rows, items, dim)
    generator = torch.Generator().manual_seed(1)
    exclude = None
    if excluded != "none" and items == 1:
        pytest.skip("nothing would be left of a catalogue of one item; see test_everything_excluded")
    if excluded == "one":
        exclude = torch.randint(items, (rows,), generator=generator)
    elif excluded == "pairs":  # unordered, with repetitions, some rows without any
        exclude = torch.stack(
            (
                torch.randint(rows, (2 * rows,), generator=generator),
                torch.randint(items - 1, (2 * rows,), generator=generator),
            )
        )
    wrt = (user, item, bias) if with_bias else (user, item)
    cotangent = torch.randn(rows, generator=generator, dtype=torch.float64)
    expected = materialised(user, item, 0.3, bias if with_bias else None, exclude)
    value = blocked_log_sum_exp(
        user,
        item,
        temperature=0.3,
        item_bias=bias if with_bias else None,
        exclude=exclude,
        block_size=block_size,
    )
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(value, wrt, cotangent), torch.autograd.grad(expected, wrt, cotangent), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_gradcheck() -> None:
    user, item, bias = case(3, 11, 4)
    exclude = torch.tensor([[0, 0, 2], [1, 5, 10]])
    assert torch.autograd.gradcheck(
        lambda u, i, b: blocked_log_sum_exp(u, i, temperature=0.7, item_bias=b, exclude=exclude, block_size=4),
        (user, item, bias),
    )
    target = torch.tensor([2, 2, 9])
    for include_positive in (True, False):
        assert torch.autograd.gradcheck(
            lambda u, i, b, include_positive=include_positive: blocked_softmax_loss(
                u, i, target, temperature=0.7, item_bias=b, include_positive=include_positive, block_size=4
            ),
            (user, item, bias),
        )


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 9),
    items=st.integers(2, 40),
    block_size=st.integers(1, 50),
    shift=st.floats(-50, 50),
    seed=st.integers(0, 1000),
)
def test_block_size_and_shift_do_not_matter(rows: int, items: int, block_size: int, shift: float, seed: int) -> None:
    user, item, bias = case(rows, items, 3, seed=seed)
    whole = blocked_log_sum_exp(user, item, item_bias=bias, block_size=items)
    blocked = blocked_log_sum_exp(user, item, item_bias=bias + shift, block_size=block_size)
    torch.testing.assert_close(blocked, whole + shift, rtol=1e-11, atol=1e-11)


def test_float32_gradient_to_1e_5_with_a_large_catalogue() -> None:
    user, item, bias = case(64, 20_000, 32, dtype=torch.float32)
    double = [x.detach().double().requires_grad_() for x in (user, item, bias)]
    target = torch.randint(20_000, (64,), generator=torch.Generator().manual_seed(2))
    logits = double[0] @ double[1].T + double[2]
    exact = torch.autograd.grad(F.cross_entropy(logits, target), double)
    loss = blocked_softmax_loss(user, item, target, temperature=1.0, similarity="dot", item_bias=bias)
    torch.testing.assert_close(loss.double(), F.cross_entropy(logits, target), rtol=1e-6, atol=0)
    for ours, theirs in zip(torch.autograd.grad(loss, (user, item, bias)), exact, strict=True):
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_float32(dtype: torch.dtype) -> None:
    # 3,000 equal terms of 1: a half-precision running sum would stop at 2,048 (float16) or 256 (bfloat16).
    user, item = (
        torch.ones(2, 4, dtype=dtype, requires_grad=True),
        torch.zeros(3000, 4, dtype=dtype, requires_grad=True),
    )
    lse = blocked_log_sum_exp(user, item, block_size=100)
    assert lse.dtype == dtype
    torch.testing.assert_close(lse.float(), torch.full((2,), 3000.0).log(), rtol=torch.finfo(dtype).eps, atol=0)
    grad_user, grad_item = torch.autograd.grad(lse.sum(), (user, item))
    assert grad_user.dtype == grad_item.dtype == dtype
    torch.testing.assert_close(
        grad_item.float(), torch.full((3000, 4), 2 / 3000), rtol=2 * torch.finfo(dtype).eps, atol=0
    )
    assert blocked_scores(user, item, torch.tensor([0, 1]), temperature=1.0).lse.dtype == torch.float32


def test_mixed_dtypes_promote() -> None:
    user, item, _ = case(3, 9, 4, dtype=torch.float32)
    half = item.detach().half().requires_grad_()
    lse = blocked_log_sum_exp(user, half, block_size=4)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, materialised(user, half.float(), 1.0, None, None))
    assert torch.autograd.grad(lse.sum(), half)[0].dtype == torch.float16


def test_sharp_temperature_is_finite_in_float32() -> None:
    user, item, _ = case(4, 50, 8, dtype=torch.float32)
    value = blocked_log_sum_exp(user, item, temperature=1e-4, block_size=7)
    limit = (user @ item.T).amax(1)  # tau -> 0: tau * lse -> the largest score
    torch.testing.assert_close(value * 1e-4, limit, rtol=1e-4, atol=1e-4)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(value.sum(), (user, item)))


@pytest.mark.parametrize("block_size", [2, 5])
def test_everything_excluded(block_size: int) -> None:
    user, item, bias = case(2, 5, 3)
    exclude = torch.stack((torch.zeros(5, dtype=torch.int64), torch.arange(5)))
    lse = blocked_log_sum_exp(user, item, item_bias=bias, exclude=exclude, block_size=block_size)
    assert lse[0] == -torch.inf
    torch.testing.assert_close(lse[1:], materialised(user[1:], item, 1.0, bias, None))
    grads = torch.autograd.grad(lse[1] + lse[0], (user, item, bias))
    expected = torch.autograd.grad(materialised(user[1:], item, 1.0, bias, None).sum(), (user, item, bias))
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_bias_of_minus_infinity_removes_an_item() -> None:
    user, item, _ = case(3, 6, 2)
    bias = torch.zeros(6, dtype=torch.float64)
    bias[:3] = -torch.inf  # a whole block of 3
    value = blocked_log_sum_exp(user, item, item_bias=bias, block_size=3)
    torch.testing.assert_close(value, materialised(user, item[3:], 1.0, None, None))
    assert torch.equal(torch.autograd.grad(value.sum(), item)[0][:3], torch.zeros(3, 2, dtype=torch.float64))


def test_ids_outside_the_table_exclude_nothing() -> None:
    user, item, _ = case(2, 6, 2)
    value = blocked_log_sum_exp(user, item, exclude=torch.tensor([-1, 6]), block_size=4)
    torch.testing.assert_close(value, materialised(user, item, 1.0, None, None))


def test_inputs_unchanged_and_no_second_derivative() -> None:
    user, item, bias = case(4, 9, 3)
    before = [x.detach().clone() for x in (user, item, bias)]
    value = blocked_log_sum_exp(user, item, item_bias=bias, exclude=torch.tensor([0, 1, 2, 3]), block_size=4)
    (grad,) = torch.autograd.grad(value.sum(), user, create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not require grad|once_differentiable"):
        grad.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, (user, item, bias), strict=True))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("include_positive", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_loss_equals_materialised(similarity: str, include_positive: bool, with_bias: bool) -> None:
    user, item, bias = case(6, 40, 5)
    target = torch.tensor([0, 39, 7, 7, 12, 0])
    u, i = (F.normalize(user, dim=1), F.normalize(item, dim=1)) if similarity == "cosine" else (user, item)
    logits = u @ i.T / 0.2 + (bias if with_bias else 0)
    expected = materialised(u, i, 0.2, bias if with_bias else None, None if include_positive else target)
    expected = expected - logits.gather(1, target[:, None]).squeeze(1)
    if include_positive:
        torch.testing.assert_close(expected, F.cross_entropy(logits, target, reduction="none"))
    loss = blocked_softmax_loss(
        user,
        item,
        target,
        temperature=0.2,
        include_positive=include_positive,
        similarity=similarity,  # type: ignore[arg-type]
        item_bias=bias if with_bias else None,
        block_size=7,
        reduction="none",
    )
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-11)
    wrt = (user, item, bias) if with_bias else (user, item)
    for ours, theirs in zip(
        torch.autograd.grad(loss.sum(), wrt), torch.autograd.grad(expected.sum(), wrt), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_scores_primitive_and_reductions() -> None:
    user, item, _ = case(4, 12, 3)
    target = torch.tensor([3, 0, 11, 3])
    lse, score = blocked_scores(user, item, target, temperature=0.5, include_positive=False, similarity="dot")
    torch.testing.assert_close(score, (user * item[target]).sum(1))
    torch.testing.assert_close(lse, materialised(user, item, 0.5, None, target))
    rows, mean, total = (
        blocked_softmax_loss(user, item, target, temperature=0.5, similarity="dot", reduction=r)  # type: ignore[arg-type]
        for r in ("none", "mean", "sum")
    )
    torch.testing.assert_close(mean, rows.mean())
    torch.testing.assert_close(total, rows.sum())
    # gradient through one of the two results only
    torch.testing.assert_close(torch.autograd.grad(score.sum(), user)[0], item[target].detach())


def test_ranking_bound() -> None:
    """With all items in the denominator the loss bounds the logarithm of the positive's rank (SSM, eq. 15)."""
    user, item, _ = case(50, 300, 4)
    target = torch.randint(300, (50,), generator=torch.Generator().manual_seed(3))
    loss = blocked_softmax_loss(user, item, target, temperature=0.5, similarity="dot", reduction="none")
    score = user @ item.T
    rank = (score >= score.gather(1, target[:, None])).sum(1)
    assert (loss >= rank.log() - 1e-12).all()


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
        return out


def test_largest_tensor_is_a_block() -> None:
    rows, items, block_size = 300, 5000, 100
    user, item, bias = case(rows, items, 6, dtype=torch.float32)
    target = torch.zeros(rows, dtype=torch.int64)
    with Watch() as materialising:
        F.cross_entropy(user @ item.T, target).backward()
    assert materialising.largest == rows * items
    with Watch() as watch:
        blocked_softmax_loss(
            user, item, target, temperature=1.0, item_bias=bias, include_positive=False, block_size=block_size
        ).backward()
    assert watch.largest <= max(rows * block_size, items * 6)


GOOD = {"user_emb": torch.ones(3, 2), "item_emb": torch.ones(4, 2)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a positive finite number, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be a positive finite number"),
        ({"user_emb": torch.ones(3, 3)}, r"\(3, 3\) and \(4, 2\)"),
        ({"user_emb": torch.ones(0, 2)}, "empty batch"),
        ({"item_bias": torch.ones(3)}, r"item_bias must have shape \(4,\), got \(3,\)"),
        ({"exclude": torch.ones(2, dtype=torch.int64)}, r"exclude must be int64 \(3,\) or \(2, M\)"),
        ({"exclude": torch.ones(3)}, "exclude must be int64"),
        ({"block_size": 0}, "block_size must be >= 1 or None, got 0"),
        ({"impl": "cuda"}, "unknown impl 'cuda'; accepted: auto, torch, triton"),
    ],
)
def test_bad_arguments(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        blocked_log_sum_exp(**{**GOOD, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.zeros(2, dtype=torch.int64)}, r"target must be int64 \(3,\)"),
        ({"target": torch.zeros(3)}, "target must be int64"),
        ({"similarity": "cosin"}, "unknown similarity 'cosin'.*did you mean 'cosine'"),
        ({"reduction": "avg"}, "unknown reduction 'avg'"),
        ({"item_emb": torch.ones(1, 2), "include_positive": False}, "at least 2 items"),
    ],
)
def test_bad_loss_arguments(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        blocked_softmax_loss(
            **{"target": torch.zeros(3, dtype=torch.int64), "temperature": 1.0, **GOOD, **change}  # type: ignore[arg-type]
        )


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="impl='triton' needs CUDA tensors, got tensors on cpu"):
        blocked_log_sum_exp(torch.ones(3, 2), torch.ones(4, 2), impl="triton")


INTERPRETED = textwrap.dedent("""
    import torch
    from recsys_losses.blocked import blocked_log_sum_exp, blocked_softmax_loss

    shapes = [(5, 7, 3), (3, 200, 70), (65, 129, 5)]
    for number, (rows, items, dim) in enumerate(shapes):
        generator = torch.Generator().manual_seed(number)
        user = torch.randn(rows, dim, generator=generator, requires_grad=True)
        item = torch.randn(items, dim, generator=generator, requires_grad=True)
        bias = torch.randn(items, generator=generator, requires_grad=True)
        exclude = torch.randint(-1, items, (rows,), generator=generator)
        cotangent = torch.randn(rows, generator=generator)
        for b, e in ((None, None), (bias, None), (None, exclude), (bias, exclude)):
            wrt = [x for x in (user, item, b) if x is not None]
            double = [x.detach().double().requires_grad_() for x in wrt]
            exact = blocked_log_sum_exp(
                double[0], double[1], temperature=0.5, item_bias=None if b is None else double[2], exclude=e
            )
            ours = blocked_log_sum_exp(user, item, temperature=0.5, item_bias=b, exclude=e, impl="triton")
            torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
            for x, y in zip(torch.autograd.grad(ours, wrt, cotangent), torch.autograd.grad(exact, double, cotangent.double())):
                assert float((x - y).abs().max() / y.abs().max()) < 1e-5, (rows, items, dim)

    user, item = torch.ones(2, 4), torch.ones(1, 4, requires_grad=True)
    lse = blocked_log_sum_exp(user, item, exclude=torch.tensor([0, -1]), impl="triton")
    assert lse.tolist() == [-torch.inf, 4.0]
    assert torch.equal(torch.autograd.grad(lse.sum(), item)[0], torch.ones(1, 4))

    half = [torch.randn(20, 6, generator=generator).to(torch.bfloat16).requires_grad_() for _ in range(2)]
    target = torch.arange(20).flip(0)
    kwargs = dict(temperature=0.5, include_positive=False, similarity="dot")
    a = blocked_softmax_loss(*half, target, impl="triton", **kwargs)
    b = blocked_softmax_loss(*half, target, impl="torch", **kwargs)
    assert a.dtype == torch.bfloat16
    for x, y in zip(torch.autograd.grad(a, half), torch.autograd.grad(b, half)):
        torch.testing.assert_close(x, y)

    for change, message in (
        (dict(user_emb=torch.ones(2, 200), item_emb=torch.ones(3, 200)), "width of at most 128"),
        (dict(user_emb=torch.ones(2, 4).double(), item_emb=torch.ones(3, 4)), "float64"),
        (dict(user_emb=torch.ones(2, 4), item_emb=torch.ones(3, 4), exclude=torch.zeros(2, 1).long()), "pairs"),
    ):
        try:
            blocked_log_sum_exp(**change, impl="triton")
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(message)
    print("kernels agree")
""")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_kernels_in_the_interpreter() -> None:
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "kernels agree"


def test_import_is_lazy() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import recsys_losses.blocked, recsys_losses.metrics;"
        "new = set(sys.modules) - before;"
        "print(sorted(m for m in new if m.split('.')[0] in ('triton', 'torch_geometric', 'scipy')"
        " or m == 'recsys_losses._triton_lse'))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.strip() == "[]"
