r"""SSM: sampled softmax loss for item recommendation.

Every observed pair is classified against a set of other items: those of the rest of the batch, or sampled ones. Hard
negatives get the larger share of the gradient, and negatives that follow the items' popularity push popular items down.
The optional correction by the sampling probability $q$ takes that last effect out again.

$$
\mathcal{L}=-\frac1B\sum_b\log\frac{e^{\ell_b^+}}{e^{\ell_b^+}+\sum_j e^{\ell_{bj}^-}},\qquad
\ell=\frac{s(u,i)}{\tau}\;[-\log q(i)]
$$

Reference: J. Wu, X. Wang, X. Gao, J. Chen, H. Fu, T. Qiu, *On the Effectiveness of Sampled Softmax Loss for Item
Recommendation*, ACM Transactions on Information Systems 42(4), 2024, arXiv:2201.02327, eq. 5.
Documentation: `docs/papers/recsys-losses/ssm.md`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from recsys_losses._checks import (
    SIMILARITIES,
    check_choice,
    check_positive,
    check_reduction,
    check_scores,
    reduce,
    upcast,
)
from recsys_losses.baselines import result_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from recsys_losses._checks import Reduction, Similarity

__all__ = ["SSMLoss", "in_batch_ssm_loss", "sampled_softmax_loss", "ssm_loss"]


def in_batch_ssm_loss(
    user_emb: Tensor,
    pos_emb: Tensor,
    *,
    temperature: float = 0.1,
    similarity: Similarity = "cosine",
    log_q: Tensor | None = None,
    item_id: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Sampled softmax loss with the items of the other rows as negatives (Wu et al., 2024, eq. 5 and section 2).

    $$\ell_b=\log\sum_{c=1}^{B}\exp\big(l_{bc}-l_{bb}\big),\qquad l_{bc}=\frac{s(u_b,i_c)}{\tau}\;[-\log q(i_c)]$$

    The positive is inside the sum, so the loss is never negative and is 0 for a batch of one. As in the authors' code,
    other rows of the same user, and copies of the same item unless `item_id` is given, are negatives.

    Args:
        user_emb: User embeddings, shape `(B, d)`, floating.
        pos_emb: Embeddings of the observed items, shape `(B, d)`; row b belongs to row b of `user_emb`.
        temperature: $\tau>0$ that divides the similarities; 0.1 to 0.2 is usual for the cosine.
        similarity: `"cosine"` (a zero vector has similarity 0) or `"dot"`.
        log_q: Natural logarithm of the sampling probability of each row's item, shape `(B,)`; subtracted from every
            column, the diagonal included. For in-batch negatives q is the item's share of the training pairs.
        item_id: Item ids, shape `(B,)`, integer. Columns with the id of the row's own item (accidental hits) are
            left out of the row's negatives.
        reduction: `"none"` gives shape `(B,)`, `"mean"` and `"sum"` a scalar. The authors' code sums.

    Returns:
        The loss in the promoted dtype of the embeddings; half precision is computed in float32.

    Raises:
        ValueError: If the shapes don't fit, B is 0, a dtype is wrong, `temperature` isn't a positive finite number, or
            `similarity` or `reduction` is unknown.

    Examples:
        >>> import torch
        >>> in_batch_ssm_loss(torch.ones(4, 2), torch.ones(4, 2))  # all scores equal: log 4
        tensor(1.3863)
    """
    _check_options(temperature, similarity, reduction)
    _check_embeddings(user_emb, pos_emb)
    batch = user_emb.shape[0]
    if log_q is not None:
        _check_shape("log_q", log_q, [("(B,)", (batch,))])
    if item_id is not None:
        _check_shape("item_id", item_id, [("(B,)", (batch,))])
        if item_id.is_floating_point() or item_id.dtype == torch.bool:
            raise ValueError(f"item_id must hold integers, got dtype {item_id.dtype}")
    dtype = result_dtype(user_emb=user_emb, pos_emb=pos_emb)
    user, item = _prepare(user_emb, dtype, similarity) / temperature, _prepare(pos_emb, dtype, similarity)
    logits = upcast(user @ item.T)
    if log_q is not None:
        logits = logits - log_q.to(logits.dtype)
    own = torch.eye(batch, dtype=torch.bool, device=logits.device)
    hidden = own if item_id is None else own | (item_id[:, None] == item_id)
    return reduce(_row_loss(logits.diagonal(), logits, hidden), reduction, dtype)


def ssm_loss(
    user_emb: Tensor,
    pos_emb: Tensor,
    neg_emb: Tensor,
    *,
    temperature: float = 0.1,
    similarity: Similarity = "cosine",
    pos_log_q: Tensor | None = None,
    neg_log_q: Tensor | None = None,
    neg_mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Sampled softmax loss with sampled negatives, shared by the batch or per row (Wu et al., 2024, eq. 5).

    $$\ell_b=-\log\frac{e^{l_b^+}}{e^{l_b^+}+\sum_{n=1}^{N}e^{l_{bn}^-}},\qquad l=\frac{s(u,i)}{\tau}\;[-\log q(i)]$$

    Shared negatives cost one matrix product and no gather of `(B, N, d)`; the gradient has the same expectation.

    Args:
        user_emb: User embeddings, shape `(B, d)`, floating.
        pos_emb: Embeddings of the observed items, shape `(B, d)`.
        neg_emb: Embeddings of the negatives, shape `(N, d)` (shared) or `(B, N, d)` (own negatives per row).
        temperature: $\tau>0$ that divides the similarities; 0.1 to 0.2 is usual for the cosine.
        similarity: `"cosine"` (a zero vector has similarity 0) or `"dot"`.
        pos_log_q: Natural logarithm of the sampling probability of the observed items, shape `(B,)`; subtracted.
        neg_log_q: The same for the negatives, shape `(N,)` or `(B, N)`.
        neg_mask: True marks a valid negative, shape `(B, N)`, boolean. A row without any has loss 0.
        reduction: `"none"` gives shape `(B,)`, `"mean"` and `"sum"` a scalar. The authors' code sums.

    Returns:
        The loss in the promoted dtype of the embeddings; half precision is computed in float32.

    Raises:
        ValueError: If the shapes don't fit, B or N is 0, a dtype is wrong, `temperature` isn't a positive finite
            number, or `similarity` or `reduction` is unknown.

    Examples:
        >>> import torch
        >>> ssm_loss(torch.ones(4, 2), torch.ones(4, 2), torch.ones(3, 2))  # 1 + 3 equal scores: log 4
        tensor(1.3863)
    """
    _check_options(temperature, similarity, reduction)
    _check_embeddings(user_emb, pos_emb)
    _check_negatives(user_emb, neg_emb)
    _check_corrections(user_emb.shape[0], neg_emb.shape[-2], pos_log_q, neg_log_q, neg_mask)
    dtype = result_dtype(user_emb=user_emb, pos_emb=pos_emb, neg_emb=neg_emb)
    user = _prepare(user_emb, dtype, similarity) / temperature
    pos = (user * _prepare(pos_emb, dtype, similarity)).sum(-1)
    if neg_emb.ndim == 2:
        neg = upcast(user @ _prepare(neg_emb, dtype, similarity).T)
    else:
        neg = _own_logits(user, upcast(neg_emb.to(dtype)), similarity)
    hidden = None if neg_mask is None else ~neg_mask
    loss = _row_loss(_correct(pos, pos_log_q), _correct(neg, neg_log_q), hidden)
    return reduce(loss, reduction, dtype)


def sampled_softmax_loss(
    pos_score: Tensor,
    neg_scores: Tensor,
    *,
    temperature: float = 0.1,
    include_positive: bool = True,
    pos_log_q: Tensor | None = None,
    neg_log_q: Tensor | None = None,
    neg_mask: Tensor | None = None,
    validate: bool | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Sampled softmax loss of scores that are already computed (Wu et al., 2024, eq. 5).

    $$\ell_b=-\log\frac{e^{l_b^+}}{[e^{l_b^+}]+\sum_{j=1}^{N}e^{l_{bj}^-}},\qquad l=\frac{s}{\tau}\;[-\log q]$$

    Args:
        pos_score: Scores of the observed items, shape `(B,)`, floating; not yet divided by the temperature.
        neg_scores: Scores of the negatives, shape `(B, N)`.
        temperature: $\tau>0$ that divides the scores.
        include_positive: True puts the positive into the denominator (SSM, loss >= 0); False leaves it out, which is
            the SL form that BSL and Adap-tau build on.
        pos_log_q: Natural logarithm of the sampling probability of the observed items, shape `(B,)`; subtracted.
        neg_log_q: The same for the negatives, shape `(N,)` or `(B, N)`.
        neg_mask: True marks a valid negative, shape `(B, N)`, boolean. A row without any has loss 0 if the positive is
            included; if it isn't, the row has no loss and is an error.
        validate: Whether to look for such rows. None looks at CPU tensors and not at others, where it would wait for
            the device; True always looks; False never does, which `torch.vmap` needs. A row that slips through has
            loss `-inf`. Under `torch.compile` nothing is looked at.
        reduction: `"none"` gives shape `(B,)`, `"mean"` and `"sum"` a scalar.

    Returns:
        The loss in the promoted dtype of the scores; half precision is computed in float32.

    Raises:
        ValueError: If the shapes don't fit, B or N is 0, a dtype is wrong, a row has no valid negative while
            `include_positive` is False, `temperature` isn't a positive finite number, or `reduction` is unknown.

    Examples:
        >>> import torch
        >>> sampled_softmax_loss(torch.tensor([1.0]), torch.tensor([[1.0]]), temperature=1.0)  # log 2
        tensor(0.6931)
    """
    check_positive("temperature", temperature)
    check_reduction(reduction)
    check_scores(pos_score, neg_scores)
    _check_corrections(neg_scores.shape[0], neg_scores.shape[1], pos_log_q, neg_log_q, neg_mask)
    dtype = result_dtype(pos_score=pos_score, neg_scores=neg_scores)
    if neg_mask is not None and not include_positive:
        _check_some_negative(neg_mask, validate)
    hidden = None if neg_mask is None else ~neg_mask
    pos = _correct(upcast(pos_score) / temperature, pos_log_q)
    neg = _correct(upcast(neg_scores) / temperature, neg_log_q)
    return reduce(_row_loss(pos, neg, hidden, include_positive=include_positive), reduction, dtype)


class SSMLoss(nn.Module):
    r"""Module form: `in_batch_ssm_loss` when called without negatives, `ssm_loss` with them.

    Args:
        temperature: $\tau>0$ that divides the similarities.
        similarity: `"cosine"` or `"dot"`.
        reduction: `"none"`, `"mean"` or `"sum"`.

    Raises:
        ValueError: If an option is out of range; when called, if a correction doesn't belong to the kind of negatives.

    Examples:
        >>> import torch
        >>> loss = SSMLoss(temperature=0.2)
        >>> loss(torch.ones(4, 2), torch.ones(4, 2))
        tensor(1.3863)
        >>> loss(torch.ones(4, 2), torch.ones(4, 2), torch.ones(1, 2))
        tensor(0.6931)
    """

    def __init__(
        self, temperature: float = 0.1, similarity: Similarity = "cosine", *, reduction: Reduction = "mean"
    ) -> None:
        super().__init__()
        _check_options(temperature, similarity, reduction)
        self.temperature = temperature
        self.similarity = similarity
        self.reduction = reduction

    def forward(
        self,
        user_emb: Tensor,
        pos_emb: Tensor,
        neg_emb: Tensor | None = None,
        *,
        log_q: Tensor | None = None,
        item_id: Tensor | None = None,
        pos_log_q: Tensor | None = None,
        neg_log_q: Tensor | None = None,
        neg_mask: Tensor | None = None,
    ) -> Tensor:
        if neg_emb is None:
            _forbid("in-batch negatives", pos_log_q=pos_log_q, neg_log_q=neg_log_q, neg_mask=neg_mask)
            return in_batch_ssm_loss(
                user_emb,
                pos_emb,
                temperature=self.temperature,
                similarity=self.similarity,
                log_q=log_q,
                item_id=item_id,
                reduction=self.reduction,
            )
        _forbid("sampled negatives", log_q=log_q, item_id=item_id)
        return ssm_loss(
            user_emb,
            pos_emb,
            neg_emb,
            temperature=self.temperature,
            similarity=self.similarity,
            pos_log_q=pos_log_q,
            neg_log_q=neg_log_q,
            neg_mask=neg_mask,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, similarity={self.similarity!r}, reduction={self.reduction!r}"


def _row_loss(pos: Tensor, neg: Tensor, hidden: Tensor | None, *, include_positive: bool = True) -> Tensor:
    """Return the loss of each row of logits, `(B,)` and `(B, N)`, without the hidden columns."""
    if hidden is not None:
        # A row without negatives has loss 0 and gradient 0 if the positive is included: with the lowest finite number
        # the backward pass gets there without the NaN of inf - inf on the way.
        neg = neg.masked_fill(hidden, torch.finfo(neg.dtype).min if include_positive else -torch.inf)
    if not include_positive:
        return neg.logsumexp(1) - pos
    # -log sigmoid keeps small losses to full relative precision, which lse(all) - pos doesn't.
    return -F.logsigmoid(pos - neg.logsumexp(1))


def _prepare(emb: Tensor, dtype: torch.dtype, similarity: Similarity) -> Tensor:
    emb = upcast(emb.to(dtype))
    return F.normalize(emb, dim=-1) if similarity == "cosine" else emb


def _own_logits(user: Tensor, neg_emb: Tensor, similarity: Similarity) -> Tensor:
    """Return the products of (B, d) with (B, N, d); the norms divide the products, not a copy of (B, N, d)."""
    logits = upcast(torch.bmm(neg_emb, user.unsqueeze(2)).squeeze(2))
    if similarity == "dot":
        return logits
    norm: Tensor = torch.linalg.vector_norm(neg_emb, dim=-1)
    return logits / norm.clamp_min(1e-12)


def _correct(logits: Tensor, log_q: Tensor | None) -> Tensor:
    return logits if log_q is None else logits - log_q.to(logits.dtype)


def _check_options(temperature: float, similarity: str, reduction: str) -> None:
    check_positive("temperature", temperature)
    check_choice("similarity", similarity, SIMILARITIES)
    check_reduction(reduction)


def _check_embeddings(user_emb: Tensor, pos_emb: Tensor) -> None:
    if user_emb.ndim != 2 or pos_emb.shape != user_emb.shape:
        shapes = f"{tuple(user_emb.shape)} and {tuple(pos_emb.shape)}"
        raise ValueError(f"expected user_emb (B, d) and pos_emb (B, d), got {shapes}")
    if user_emb.shape[0] == 0:
        raise ValueError("empty batch: user_emb has no rows")


def _check_negatives(user_emb: Tensor, neg_emb: Tensor) -> None:
    batch, dim = user_emb.shape
    shared, own = neg_emb.ndim == 2, neg_emb.ndim == 3 and neg_emb.shape[0] == batch
    if not (shared or own) or neg_emb.shape[-1] != dim:
        shapes = f"{tuple(neg_emb.shape)} with user_emb {tuple(user_emb.shape)}"
        raise ValueError(f"expected neg_emb (N, d) or (B, N, d), got {shapes}")
    if neg_emb.shape[-2] == 0:
        raise ValueError(f"neg_emb holds no negatives: shape {tuple(neg_emb.shape)}")


def _check_shape(name: str, tensor: Tensor, accepted: list[tuple[str, tuple[int, ...]]]) -> None:
    if tuple(tensor.shape) not in [shape for _, shape in accepted]:
        rule = " or ".join(f"{letters} = {shape}" for letters, shape in accepted)
        raise ValueError(f"{name} must have shape {rule}, got {tuple(tensor.shape)}")


def _check_corrections(
    batch: int, count: int, pos_log_q: Tensor | None, neg_log_q: Tensor | None, neg_mask: Tensor | None
) -> None:
    if pos_log_q is not None:
        _check_shape("pos_log_q", pos_log_q, [("(B,)", (batch,))])
    if neg_log_q is not None:
        _check_shape("neg_log_q", neg_log_q, [("(N,)", (count,)), ("(B, N)", (batch, count))])
    if neg_mask is not None:
        _check_shape("neg_mask", neg_mask, [("(B, N)", (batch, count))])
        if neg_mask.dtype != torch.bool:
            raise ValueError(f"neg_mask must be boolean (True = valid negative), got dtype {neg_mask.dtype}")


def _check_some_negative(neg_mask: Tensor, validate: bool | None) -> None:
    if torch.compiler.is_compiling() or not (neg_mask.device.type == "cpu" if validate is None else validate):
        return
    empty = ~neg_mask.any(1)
    if bool(empty.any()):
        row = int(empty.nonzero()[0])
        raise ValueError(f"row {row} has no valid negative: neg_mask is False in all {neg_mask.shape[1]} columns")


def _forbid(kind: str, **given: Tensor | None) -> None:
    names = [name for name, value in given.items() if value is not None]
    if names:
        raise ValueError(f"{', '.join(names)} can't be used with {kind}")
