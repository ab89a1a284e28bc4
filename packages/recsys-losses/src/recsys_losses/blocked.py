r"""Log-sum-exp over a whole item table without a (B, I) score matrix.

$$\mathrm{lse}_b=\log\sum_{j\in\mathcal I\setminus E_b}\exp\Big(\frac{u_b\cdot i_j}{\tau}+\beta_j\Big)$$

Scores are made one block of items at a time, reduced, and dropped; the backward pass makes them again. With
$p_{bj}=\exp(s_{bj}-\mathrm{lse}_b)$ the gradients $\partial u_b=\sum_j p_{bj}i_j/\tau$, $\partial i_j=\sum_b
p_{bj}u_b/\tau$ and $\partial\beta_j=\sum_b p_{bj}$ are exact. Memory beside the inputs and their gradients is
O(B * block_size) instead of O(B * I).

Losses are not repeated here: `blocked_scores` gives the two quantities that softmax losses are made of, the
log-sum-exp and the score of the target, and each loss combines them.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from recsys_losses._checks import SIMILARITIES, check_choice, check_positive, check_reduction, reduce, upcast

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from recsys_losses._checks import Reduction, Similarity

__all__ = ["BlockedScores", "blocked_log_sum_exp", "blocked_scores", "blocked_softmax_loss"]

Implementation = Literal["auto", "torch", "triton"]
_IMPLEMENTATIONS = ("auto", "torch", "triton")

# One block of scores is _ROWS x _COLUMNS float32 = 2 MB and stays in a core's cache; a GPU wants larger products.
_ROWS = 1024
_COLUMNS = 512
_GPU_ROWS = 16384
_GPU_COLUMNS = 8192
_TRITON_MAX_DIM = 128


class BlockedScores(NamedTuple):
    """What a softmax loss needs of a whole catalogue.

    Attributes:
        lse: Log-sum-exp of the logits over the catalogue, shape `(B,)`.
        target_score: Raw similarity of each row and its target (no temperature, no bias), shape `(B,)`.
    """

    lse: Tensor
    target_score: Tensor


def _lowest(dtype: torch.dtype) -> float:
    """Return the finite stand-in for -inf: its exponential is 0, its differences are never NaN."""
    return torch.finfo(dtype).min / 4


class _Blocks:
    """The grid of (items, rows) blocks over one score matrix, one buffer, and the pairs left out of each block."""

    def __init__(
        self, user: Tensor, item: Tensor, bias: Tensor | None, exclude: Tensor | None, block_size: int | None
    ) -> None:
        gpu = user.device.type != "cpu"
        self.user, self.item = user, item
        self.bias = None if bias is None else bias.clamp(min=_lowest(user.dtype))
        self.rows = min(_GPU_ROWS if gpu else _ROWS, len(user))
        self.columns = min(block_size or (_GPU_COLUMNS if gpu else _COLUMNS), len(item))
        self.buffer = user.new_empty(self.rows * self.columns)
        self.num_row_blocks = -(-len(user) // self.rows)
        self.num_blocks = -(-len(item) // self.columns)
        self.left_out = self._left_out(exclude) if exclude is not None else None

    def _left_out(self, exclude: Tensor) -> tuple[Tensor, ...]:
        """Divide the excluded pairs among the blocks, as flat positions in the block's scores."""
        if exclude.ndim == 1:
            row, column = torch.arange(len(exclude), device=exclude.device), exclude
        else:
            row, column = exclude[0], exclude[1]
        known = (row >= 0) & (row < len(self.user)) & (column >= 0) & (column < len(self.item))
        row, column = row[known], column[known]
        block, chunk = column // self.columns, row // self.rows
        width = (len(self.item) - block * self.columns).clamp(max=self.columns)
        flat = (row - chunk * self.rows) * width + (column - block * self.columns)
        cell = block * self.num_row_blocks + chunk
        order = torch.argsort(cell)
        counts = torch.bincount(cell, minlength=self.num_blocks * self.num_row_blocks).tolist()
        return torch.split(flat[order], counts)

    def items(self) -> Iterator[tuple[int, slice, Tensor]]:
        """Yield (number, positions, embeddings) of every block of items."""
        for number in range(self.num_blocks):
            span = slice(number * self.columns, min((number + 1) * self.columns, len(self.item)))
            yield number, span, self.item[span].to(self.user.dtype)

    def scores(self, number: int, span: slice, item: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, scores) for every block of rows; the scores are overwritten by the next block."""
        for chunk in range(self.num_row_blocks):
            rows = slice(chunk * self.rows, min((chunk + 1) * self.rows, len(self.user)))
            user = self.user[rows]
            score = self.buffer[: len(user) * len(item)].view(len(user), len(item))
            if self.bias is None:
                torch.mm(user, item.T, out=score)
            else:
                torch.addmm(self.bias[span], user, item.T, out=score)
            if self.left_out is not None:
                score.view(-1).index_fill_(0, self.left_out[number * self.num_row_blocks + chunk], _lowest(user.dtype))
            yield rows, score


def _torch_forward(
    user: Tensor, item: Tensor, bias: Tensor | None, exclude: Tensor | None, block_size: int | None
) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp (B,) and the log-sum-exp of every block (blocks, B)."""
    blocks = _Blocks(user, item, bias, exclude, block_size)
    log_p = torch.empty_like(blocks.buffer)
    partial = user.new_empty(blocks.num_blocks, len(user))
    for number, span, part in blocks.items():
        for rows, score in blocks.scores(number, span, part):
            # log_softmax finds the maximum and sums the exponentials while a row is in the cache, in half the time of
            # exp alone; the largest of its values is minus the logarithm of the sum that was divided by.
            log_prob = torch.log_softmax(score, 1, out=log_p[: score.numel()].view_as(score))
            torch.sub(score.amax(1), log_prob.amax(1), out=partial[number, rows])
    lse = torch.logsumexp(partial, 0)
    return lse.masked_fill_(lse < _lowest(user.dtype) / 2, -torch.inf), partial


def _torch_backward(
    grad: Tensor,
    lse: Tensor,
    partial: Tensor,
    user: Tensor,
    item: Tensor,
    bias: Tensor | None,
    exclude: Tensor | None,
    block_size: int | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of user, item and bias in the dtype of `user`."""
    blocks = _Blocks(user, item, bias, exclude, block_size)
    dim = user.shape[1]
    # p = softmax within the block x share of the block; the share scales rows, which is done on the (B, d) side.
    share = (torch.exp(partial - lse) * grad).masked_fill_(lse == -torch.inf, 0)
    grad_user = torch.zeros_like(user)
    grad_item = torch.empty_like(item, dtype=user.dtype)
    grad_bias = None if bias is None else torch.empty_like(bias)
    user_t = user.T.contiguous()
    prob_buffer = torch.empty_like(blocks.buffer)
    row_buffer, column_buffer = torch.empty_like(user[: blocks.rows]), user.new_empty(dim, blocks.rows)
    for number, span, part in blocks.items():
        grad_part = user.new_zeros(dim, len(part))
        bias_part = user.new_zeros(len(part)) if bias is not None else None
        for rows, score in blocks.scores(number, span, part):
            prob = torch.softmax(score, 1, out=prob_buffer[: score.numel()].view_as(score))
            weight = share[number, rows]
            product = torch.mm(prob, part, out=row_buffer[: len(weight)])
            grad_user[rows].addcmul_(product, weight[:, None])
            weighted = torch.mul(user_t[:, rows], weight, out=column_buffer[:, : len(weight)])
            grad_part.addmm_(weighted, prob)
            if bias_part is not None:
                bias_part.addmv_(prob.T, weight)
        grad_item[span] = grad_part.T
        if grad_bias is not None and bias_part is not None:
            grad_bias[span] = bias_part
    return grad_user, grad_item, grad_bias


class _CatalogueScores(torch.autograd.Function):
    """Log-sum-exp over the catalogue and score of the target, with recomputation in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        user: Tensor,
        item: Tensor,
        bias: Tensor | None,
        target: Tensor | None,
        exclude: Tensor | None,
        block_size: int | None,
        triton: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.block_size, ctx.triton = block_size, triton
        if triton:
            from recsys_losses import _triton_lse

            lse, partial = _triton_lse.forward(user, item, bias, exclude), None
        else:
            lse, partial = _torch_forward(user, item, bias, exclude, block_size)
        ctx.save_for_backward(user, item, bias, target, exclude, lse, partial)
        score = None if target is None else (user * item[target]).sum(1)
        return lse, score

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_lse: Tensor, grad_score: Tensor | None) -> tuple[Tensor | None, ...]:
        user, item, bias, target, exclude, lse, partial = ctx.saved_tensors
        if ctx.triton:
            from recsys_losses import _triton_lse

            grad_user, grad_item, grad_bias = _triton_lse.backward(grad_lse, lse, user, item, bias, exclude)
        else:
            grad_user, grad_item, grad_bias = _torch_backward(
                grad_lse, lse, partial, user, item, bias, exclude, ctx.block_size
            )
        if target is not None and grad_score is not None:
            grad_user.addcmul_(item[target], grad_score[:, None])
            # index_put_ accumulates in a fixed order on CUDA as well, unlike index_add_
            grad_item.index_put_((target,), user * grad_score[:, None], accumulate=True)
        return grad_user, grad_item.to(item.dtype), grad_bias, None, None, None, None


def _use_triton(impl: str, user: Tensor, exclude: Tensor | None) -> bool:
    """Decide for the Triton kernels; raise ValueError if they are demanded where they can't run."""
    check_choice("impl", impl, _IMPLEMENTATIONS)
    if impl == "torch" or (impl == "auto" and user.device.type != "cuda"):
        return False
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    reason = None
    if importlib.util.find_spec("triton") is None:
        reason = "the triton package, which is not installed"
    elif user.device.type != "cuda" and not interpreted:
        reason = f"CUDA tensors, got tensors on {user.device}"
    elif user.dtype == torch.float64:
        reason = "float32, float16 or bfloat16, got float64"
    elif user.shape[1] > _TRITON_MAX_DIM:
        reason = f"a width of at most {_TRITON_MAX_DIM}, got {user.shape[1]}"
    elif exclude is not None and exclude.ndim == 2:
        reason = "exclude of shape (B,), got pairs (2, M)"
    if reason is not None and impl == "triton":
        raise ValueError(f"impl='triton' needs {reason}; impl='torch' has no such limit")
    return reason is None


def _check(
    user_emb: Tensor,
    item_emb: Tensor,
    item_bias: Tensor | None,
    exclude: Tensor | None,
    temperature: float,
    block_size: int | None,
) -> None:
    """Raise ValueError for shapes, dtypes and numbers that do not fit."""
    check_positive("temperature", temperature)
    if user_emb.ndim != 2 or item_emb.ndim != 2 or user_emb.shape[1] != item_emb.shape[1]:
        raise ValueError(
            f"expected user_emb (B, d) and item_emb (I, d), got {tuple(user_emb.shape)} and {tuple(item_emb.shape)}"
        )
    if 0 in user_emb.shape or 0 in item_emb.shape:
        raise ValueError(f"empty batch or catalogue: {tuple(user_emb.shape)} and {tuple(item_emb.shape)}")
    if item_bias is not None and item_bias.shape != item_emb.shape[:1]:
        raise ValueError(f"item_bias must have shape ({len(item_emb)},), got {tuple(item_bias.shape)}")
    if exclude is not None and (
        exclude.dtype != torch.int64 or (exclude.shape != user_emb.shape[:1] and exclude.shape[:-1] != (2,))
    ):
        raise ValueError(
            f"exclude must be int64 ({len(user_emb)},) or (2, M), got {exclude.dtype} {tuple(exclude.shape)}"
        )
    if block_size is not None and not block_size >= 1:
        raise ValueError(f"block_size must be >= 1 or None, got {block_size!r}")


def _catalogue_scores(
    user: Tensor,
    item: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    exclude: Tensor | None,
    block_size: int | None,
    impl: str,
) -> tuple[Tensor, Tensor | None]:
    """Call the autograd function on scaled users, in float32 at least."""
    triton = _use_triton(impl, user, exclude)
    wide = torch.promote_types(upcast(user).dtype, upcast(item).dtype)
    item = item if item.dtype in (torch.float16, torch.bfloat16) else item.to(wide)
    bias = None if bias is None else bias.to(wide)
    lse, score = _CatalogueScores.apply(user.to(wide), item, bias, target, exclude, block_size, triton)
    return lse, score


def blocked_log_sum_exp(
    user_emb: Tensor,
    item_emb: Tensor,
    *,
    temperature: float = 1.0,
    item_bias: Tensor | None = None,
    exclude: Tensor | None = None,
    block_size: int | None = None,
    impl: Implementation = "auto",
) -> Tensor:
    r"""Log-sum-exp of the scores of every row over the whole item table, in blocks.

    $$\mathrm{lse}_b=\log\sum_{j\notin E_b}\exp\big(u_b\cdot i_j/\tau+\beta_j\big)$$

    Gradients of `user_emb`, `item_emb` and `item_bias` are exact; they can't be differentiated again.

    Args:
        user_emb: Rows, shape `(B, d)`, floating.
        item_emb: Item table, shape `(I, d)`, floating, same device.
        temperature: $\tau>0$.
        item_bias: $\beta$, added to the logits of an item, shape `(I,)`, finite or -inf (which removes the item);
            `-log_q` corrects for sampling.
        exclude: Items left out of a row's sum: LongTensor `(B,)`, one item per row, or `(2, M)`, pairs (row, item).
            Ids outside the table (such as -1) leave nothing out. On CUDA the torch implementation waits for the device
            once to sort them.
        block_size: Items per block of the torch implementation; the default suits caches of 1 to 2 MB per core (512)
            and GPUs (8,192). It changes memory and time, not the result.
        impl: `"torch"`, `"triton"` (CUDA, d <= 128, not float64, `exclude` not in pairs), or `"auto"`, which takes
            Triton where it can run and torch elsewhere.

    Returns:
        Shape `(B,)`, in the promoted dtype of the two tables; half precision is computed in float32. A row whose items
        are all excluded gives -inf with zero gradient.

    Raises:
        ValueError: If shapes do not fit, `temperature` or `block_size` is not positive, or `impl` can't run.

    Reference: online normaliser of M. Milakov and N. Gimelshein, *Online normalizer calculation for softmax*,
    arXiv:1805.02867; recomputation as in T. Dao et al., *FlashAttention*, NeurIPS 2022, section 3.1.

    Examples:
        >>> import torch
        >>> blocked_log_sum_exp(torch.tensor([[1.0, 0.0]]), torch.zeros(4, 2), exclude=torch.tensor([3]))
        tensor([1.0986])
    """
    _check(user_emb, item_emb, item_bias, exclude, temperature, block_size)
    dtype = torch.promote_types(user_emb.dtype, item_emb.dtype)
    lse, _ = _catalogue_scores(upcast(user_emb) / temperature, item_emb, item_bias, None, exclude, block_size, impl)
    return lse.to(dtype)


def _check_target(user_emb: Tensor, target: Tensor, similarity: str) -> None:
    check_choice("similarity", similarity, SIMILARITIES)
    if target.dtype != torch.int64 or target.shape != user_emb.shape[:1]:
        raise ValueError(f"target must be int64 ({len(user_emb)},), got {target.dtype} {tuple(target.shape)}")


def blocked_scores(
    user_emb: Tensor,
    item_emb: Tensor,
    target: Tensor,
    *,
    temperature: float,
    include_positive: bool = True,
    similarity: Similarity = "cosine",
    item_bias: Tensor | None = None,
    block_size: int | None = None,
    impl: Implementation = "auto",
) -> BlockedScores:
    r"""Return what softmax losses over the whole catalogue are made of.

    Both results are in float32 at least, also for half-precision tables.

    Args:
        user_emb: Rows, shape `(B, d)`, floating.
        item_emb: Item table, shape `(I, d)`, floating, same device.
        target: Positive item of each row, LongTensor `(B,)`, 0..I-1.
        temperature: $\tau>0$.
        include_positive: Whether the target is in the row's log-sum-exp (SSM) or not (BSL, needs I >= 2).
        similarity: `"cosine"` normalises both sides (a copy of the item table is made), `"dot"` takes them as they are.
        item_bias: Added to the logits in the log-sum-exp, shape `(I,)`.
        block_size: Items per block, see `blocked_log_sum_exp`.
        impl: `"auto"`, `"torch"` or `"triton"`, see `blocked_log_sum_exp`.

    Returns:
        `BlockedScores(lse, target_score)`: $\log\sum_j\exp(s_{bj}/\tau+\beta_j)$ and $s_{b,t_b}$.

    Raises:
        ValueError: If shapes do not fit, a value is out of range, or `impl` can't run.

    Examples:
        >>> import torch
        >>> user, item = torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> blocked_scores(user, item, torch.tensor([0]), temperature=1.0)
        BlockedScores(lse=tensor([1.3133]), target_score=tensor([1.]))
    """
    _check(user_emb, item_emb, item_bias, None, temperature, block_size)
    _check_target(user_emb, target, similarity)
    if not include_positive and len(item_emb) < 2:
        raise ValueError("include_positive=False needs a catalogue of at least 2 items")
    if similarity == "cosine":
        user_emb = F.normalize(upcast(user_emb), dim=-1)
        item_emb = F.normalize(upcast(item_emb), dim=-1)
    exclude = None if include_positive else target
    lse, logit = _catalogue_scores(
        upcast(user_emb) / temperature, item_emb, item_bias, target, exclude, block_size, impl
    )
    assert logit is not None  # noqa: S101  # a target was given
    return BlockedScores(lse, logit * temperature)


def blocked_softmax_loss(
    user_emb: Tensor,
    item_emb: Tensor,
    target: Tensor,
    *,
    temperature: float,
    include_positive: bool = True,
    similarity: Similarity = "cosine",
    item_bias: Tensor | None = None,
    block_size: int | None = None,
    impl: Implementation = "auto",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Softmax loss over the whole catalogue without materialising its scores.

    $$\mathcal L_b=\log\sum_j e^{s_{bj}/\tau+\beta_j}-\big(s_{b,t_b}/\tau+\beta_{t_b}\big)$$

    With `include_positive=True` this is `F.cross_entropy` of the logits; without, the sum runs over $j\ne t_b$.

    Args:
        user_emb: Rows, shape `(B, d)`, floating.
        item_emb: Item table, shape `(I, d)`, floating, same device.
        target: Positive item of each row, LongTensor `(B,)`, 0..I-1.
        temperature: $\tau>0$.
        include_positive: Whether the target is in the denominator.
        similarity: `"cosine"` or `"dot"`.
        item_bias: Added to the logits, shape `(I,)`, for example `-log_q`.
        block_size: Items per block, see `blocked_log_sum_exp`.
        impl: `"auto"`, `"torch"` or `"triton"`, see `blocked_log_sum_exp`.
        reduction: `"none"` gives shape `(B,)`, the others a scalar.

    Returns:
        Loss in the promoted dtype of the tables; half precision is computed in float32.

    Raises:
        ValueError: If shapes do not fit, a value is out of range, or `impl` can't run.

    Reference: J. Wu et al., *On the Effectiveness of Sampled Softmax Loss*, TOIS 42(4), 2024, eq. (5) with all items as
    negatives; without the positive, J. Wu et al., *BSL*, ICDE 2024, eq. (5).

    Examples:
        >>> import torch
        >>> user, item = torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> blocked_softmax_loss(user, item, torch.tensor([0]), temperature=1.0)
        tensor(0.3133)
    """
    check_reduction(reduction)
    lse, score = blocked_scores(
        user_emb,
        item_emb,
        target,
        temperature=temperature,
        include_positive=include_positive,
        similarity=similarity,
        item_bias=item_bias,
        block_size=block_size,
        impl=impl,
    )
    logit = score / temperature
    if item_bias is not None:
        logit = logit + item_bias[target]
    return reduce(lse - logit, reduction, torch.promote_types(user_emb.dtype, item_emb.dtype))
