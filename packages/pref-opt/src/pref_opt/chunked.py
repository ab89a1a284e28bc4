r"""Log-probabilities of labelled tokens from hidden states and a head, in bounded memory.

A head of 128,000 words turns 16,000 hidden states into 8 GB of float32 logits, and a loss needs one number of each row.
Here the logits exist one tile at a time: the forward pass keeps the logarithm of each row's normaliser, the backward pass
computes the tiles again. Any loss of the resulting vector, whatever pairs it ties to each other, needs no copy of its own.

$$\log p_t=\ell_{t,y_t}-\log\sum_v e^{\ell_{tv}},\qquad
\frac{\partial\log p_t}{\partial\ell_{tv}}=\mathbb 1[v=y_t]-p_{tv},\qquad \ell=c\tanh\big(s\,(hW^\top+b)/c\big)$$

Online normalisation: M. Milakov, N. Gimelshein, *Online normalizer calculation for softmax*, 2018, arXiv:1805.02867.
Documentation: `docs/packages/pref-opt.md`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pref_opt._checks import check_count, check_positive

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = ["sequence_logps_chunked", "token_logps_chunked"]

IGNORED = -100
TILE_ENTRIES = 2**24


class _Head(NamedTuple):
    """How a tile of logits is computed; nothing here is differentiated."""

    token_chunk: int
    vocab_chunk: int
    softcap: float | None
    scale: float


def token_logps_chunked(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    token_chunk: int = 1024,
    vocab_chunk: int | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    r"""Return the log-probability of each label under the head, without a matrix of logits.

    $$\log p_{nt}=\ell_{nt,y_{nt}}-\log\sum_ve^{\ell_{ntv}}$$

    Labels and hidden states are aligned: `labels[n, t]` is what `hidden[n, t]` predicts. Only positions with a label are
    projected. Source: the definition of a log-softmax, with the sum taken online over tiles of words.

    Args:
        hidden: Last hidden states [N, T, H], floating point.
        weight: Weight of the head [V, H].
        labels: Integer labels [N, T] in 0..V-1, or -100 where nothing is predicted.
        bias: Bias of the head [V].
        token_chunk: Most rows of a tile, >= 1.
        vocab_chunk: Most columns of a tile, >= 1; None takes as many as keep a tile under 17 million entries.
        softcap: $c>0$ of models that cap their logits (Gemma 2), applied after `scale`.
        scale: $s>0$, a factor of the logits (Granite: 1 / `logits_scaling`).

    Returns:
        Log-probabilities [N, T] in float32 or wider, nats; 0 where the label is -100. Differentiable once with respect to
        `hidden`, `weight` and `bias`; products of half-precision tensors are summed in float32.

    Raises:
        ValueError: If shapes or dtypes don't fit, a label is outside the vocabulary, or a number is out of range.

    Examples:
        >>> import torch
        >>> from pref_opt.chunked import token_logps_chunked
        >>> hidden, weight = torch.zeros(1, 3, 8), torch.ones(10, 8)
        >>> token_logps_chunked(hidden, weight, torch.tensor([[-100, 4, 9]])).exp()
        tensor([[1.0000, 0.1000, 0.1000]])
    """
    _check(hidden, weight, labels, bias)
    head = _head(token_chunk, vocab_chunk, softcap, scale)
    # Finding the labelled rows already waits for the device, so the check of their values costs no further wait of note.
    flat = labels.reshape(-1)
    index = (flat != IGNORED).nonzero()[:, 0]
    targets = flat[index].long()
    if ((targets < 0) | (targets >= len(weight))).any():
        wrong = targets[(targets < 0) | (targets >= len(weight))][0].item()
        raise ValueError(f"labels must be -100 or in [0, {len(weight)}), got {wrong}")
    rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, index)
    logps: Tensor = _LabelLogps.apply(rows, weight, bias, targets, head)
    return logps.new_zeros(flat.shape).index_copy(0, index, logps).view(labels.shape)


def sequence_logps_chunked(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    token_chunk: int = 1024,
    vocab_chunk: int | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    average: bool = False,
) -> Tensor:
    r"""Return the log-probability of each sequence's labels, without a matrix of logits.

    $$\log p(y_n)=\sum_{t:\,y_{n,t+1}\ne-100}\log p\big(y_{n,t+1}\mid h_{nt}\big)$$

    The shift by one position happens inside, as in `pref_opt.baselines.sequence_logps`, of which this is the
    memory-bounded twin. Source: the definition of a language model's likelihood.

    Args:
        hidden: Last hidden states [N, T, H], floating point.
        weight: Weight of the head [V, H].
        labels: The input ids [N, T], with -100 at the prompt and at padding.
        bias: Bias of the head [V].
        token_chunk: Most rows of a tile, >= 1.
        vocab_chunk: Most columns of a tile, >= 1; None takes as many as keep a tile under 17 million entries.
        softcap: Cap of the logits, > 0.
        scale: Factor of the logits, > 0.
        average: Divide by the number of labelled tokens (at least 1) instead of returning the sum.

    Returns:
        Log-probabilities [N] in float32 or wider, nats.

    Raises:
        ValueError: For the reasons that `token_logps_chunked` gives.

    Examples:
        >>> import torch
        >>> from pref_opt.chunked import sequence_logps_chunked
        >>> hidden, weight = torch.zeros(1, 3, 8), torch.ones(10, 8)
        >>> sequence_logps_chunked(hidden, weight, torch.tensor([[-100, 4, 9]]), average=True).exp()
        tensor([0.1000])
    """
    _check(hidden, weight, labels, bias)
    # The labels move rather than the hidden states: a view of the latter would have to be copied.
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    logps = token_logps_chunked(
        hidden,
        weight,
        following,
        bias=bias,
        token_chunk=token_chunk,
        vocab_chunk=vocab_chunk,
        softcap=softcap,
        scale=scale,
    ).sum(1)
    if not average:
        return logps
    return logps / (following != IGNORED).sum(1).clamp(min=1)


class _LabelLogps(torch.autograd.Function):
    """Log-probabilities [M] of targets [M] from rows [M, H], tile by tile in both directions."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: _Head) -> Tensor:
        ctx.head, ctx.dtype = head, _product_dtype(rows, weight)
        wide = torch.promote_types(torch.promote_types(rows.dtype, weight.dtype), torch.float32)
        normaliser = rows.new_full((len(rows),), -torch.inf, dtype=wide)
        target = torch.zeros_like(normaliser)
        for words, weights, offset in _vocabulary(weight, bias, ctx.dtype, head):
            for tokens in _slices(len(rows), head.token_chunk):
                logits = _cap(_tile(rows[tokens], weights, offset, ctx.dtype, wide, head.scale), head.softcap)
                local, inside = _local(targets[tokens], words)
                picked = logits.gather(1, local[:, None])[:, 0]
                target[tokens] = torch.where(inside, picked, target[tokens])
                normaliser[tokens] = torch.logaddexp(normaliser[tokens], logits.logsumexp(1))
        ctx.save_for_backward(rows, weight, bias, targets, normaliser)
        return target - normaliser

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        rows, weight, bias, targets, normaliser = ctx.saved_tensors
        head, wide = ctx.head, normaliser.dtype
        wants_rows, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_rows = torch.zeros_like(rows, dtype=wide) if wants_rows else None
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        grad_bias = torch.zeros_like(bias) if wants_bias else None
        # Words outside, tokens inside: only a slice of the head's gradient has to be held in float32, if it isn't already.
        for words, weights, offset in _vocabulary(weight, bias, ctx.dtype, head):
            sum_weight = None if grad_weight is None else grad_weight[words].to(wide)
            sum_bias = None if grad_bias is None else grad_bias[words].to(wide)
            for tokens in _slices(len(rows), head.token_chunk):
                part = rows[tokens]
                logits = _tile(part, weights, offset, ctx.dtype, wide, head.scale)
                step = _logit_gradient(logits, targets[tokens], normaliser[tokens], grad[tokens], words, head)
                if grad_rows is not None:
                    _add_product(grad_rows[tokens], step, weights, ctx.dtype)
                if sum_weight is not None:
                    _add_product(sum_weight, step.T, part, ctx.dtype)
                if sum_bias is not None:
                    sum_bias += step.sum(0)
            if grad_weight is not None and sum_weight is not None and grad_weight.dtype != wide:
                grad_weight[words] = sum_weight
            if grad_bias is not None and sum_bias is not None and grad_bias.dtype != wide:
                grad_bias[words] = sum_bias
        return None if grad_rows is None else grad_rows.to(rows.dtype), grad_weight, grad_bias, None, None


def _product_dtype(rows: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype of the products, which is autocast's where autocast is on."""
    dtype = torch.promote_types(rows.dtype, weight.dtype)
    if torch.is_autocast_enabled(rows.device.type) and dtype != torch.float64:
        return torch.get_autocast_dtype(rows.device.type)
    return dtype


def _vocabulary(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype, head: _Head
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    for words in _slices(len(weight), head.vocab_chunk):
        yield words, weight[words].to(dtype), None if bias is None else bias[words]


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _tile(
    rows: Tensor, weights: Tensor, offset: Tensor | None, dtype: torch.dtype, wide: torch.dtype, scale: float
) -> Tensor:
    """Return the scaled logits of one tile, in a tensor of its own."""
    logits = torch.mm(rows.to(dtype), weights.T).to(wide)
    if offset is not None:
        logits += offset
    return logits if scale == 1.0 else logits.mul_(scale)


def _cap(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _local(targets: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """Return the targets counted from the tile's first word, and which of them the tile has."""
    inside = (targets >= words.start) & (targets < words.stop)
    return torch.where(inside, targets - words.start, 0), inside


def _logit_gradient(
    logits: Tensor, targets: Tensor, normaliser: Tensor, grad: Tensor, words: slice, head: _Head
) -> Tensor:
    """Return the loss gradient with respect to the head's products; `logits` is overwritten."""
    slope = None
    if head.softcap is not None:
        capped = logits.div_(head.softcap).tanh_()
        slope = 1 - capped * capped
        logits = capped.mul_(head.softcap)
    step = logits.sub_(normaliser[:, None]).exp_().mul_(-grad[:, None])
    local, inside = _local(targets, words)
    step.scatter_add_(1, local[:, None], (grad * inside)[:, None])
    if slope is not None:
        step *= slope
    return step if head.scale == 1.0 else step.mul_(head.scale)


def _add_product(total: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    """Add `a @ b` to `total`, which is in float32 or wider, without rounding the product to half precision."""
    if total.is_cuda and dtype in (torch.float16, torch.bfloat16) and torch.__version__ >= "2.8":
        torch.addmm(total, a.to(dtype), b.to(dtype), out_dtype=torch.float32, out=total)
        return
    total.addmm_(a, b.to(total.dtype))


def _head(token_chunk: int, vocab_chunk: int | None, softcap: float | None, scale: float) -> _Head:
    check_count("token_chunk", token_chunk)
    check_positive("scale", scale)
    if softcap is not None:
        check_positive("softcap", softcap)
    if vocab_chunk is None:
        vocab_chunk = max(1, TILE_ENTRIES // token_chunk)
    check_count("vocab_chunk", vocab_chunk)
    return _Head(token_chunk, vocab_chunk, softcap, scale)


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    for name, value, size in (("hidden", hidden, 3), ("weight", weight, 2), ("labels", labels, 2), ("bias", bias, 1)):
        if value is None:
            continue
        if value.ndim != size:
            raise ValueError(f"{name} must have {size} dimensions, got shape {tuple(value.shape)}")
        if name != "labels" and not value.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {value.dtype}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if labels.shape != hidden.shape[:2]:
        raise ValueError(
            f"labels must have the shape [N, T] of hidden, got {tuple(labels.shape)} and {tuple(hidden.shape)}"
        )
    if labels.numel() == 0:
        raise ValueError(f"labels: empty batch, got shape {tuple(labels.shape)}")
    if weight.shape[1] != hidden.shape[2] or not len(weight):
        raise ValueError(f"weight must have shape [V, {hidden.shape[2]}] with V >= 1, got {tuple(weight.shape)}")
    if bias is not None and len(bias) != len(weight):
        raise ValueError(f"bias must have shape [{len(weight)}], got {tuple(bias.shape)}")


def head_options(config: Any) -> dict[str, Any]:
    """Return how a model turns its head's products into logits: capped (Gemma 2) or scaled (Granite, Cohere)."""
    divisor = getattr(config, "logits_scaling", None) or 1.0
    factor = getattr(config, "logit_scale", None) or 1.0
    return {"softcap": getattr(config, "final_logit_softcapping", None), "scale": factor / divisor}
