r"""The losses that the four papers are compared with: BPR, binary cross-entropy and the plain softmax loss.

All three work on scores that are already computed. BPR compares one observed item with one other, binary cross-entropy
judges every score alone, and the softmax loss weighs the negatives of a row by a softmax, without the positive.

$$
\ell^{\mathrm{BPR}}_b=\operatorname{softplus}(n_b-p_b),\qquad
\ell^{\mathrm{BCE}}_b=\operatorname{softplus}(-p_b)+\tfrac1N\textstyle\sum_j\operatorname{softplus}(n_{bj}),\qquad
\ell^{\mathrm{SL}}_b=-\tfrac{p_b}{\tau}+\log\textstyle\sum_j e^{n_{bj}/\tau}
$$

References: S. Rendle, C. Freudenthaler, Z. Gantner, L. Schmidt-Thieme, *BPR: Bayesian Personalized Ranking from Implicit
Feedback*, UAI 2009, arXiv:1205.2618; X. He, L. Liao, H. Zhang, L. Nie, X. Hu, T.-S. Chua, *Neural Collaborative
Filtering*, WWW 2017, arXiv:1708.05031, section 3.1 (binary cross-entropy with sampled negatives); J. Wu, J. Chen,
J. Wu, W. Shi, J. Zhang, X. Wang, *BSL: Understanding and Improving Softmax Loss for Recommendation*, ICDE 2024,
arXiv:2312.12882, eq. 5 (softmax loss). Documentation: `docs/papers/recsys-losses/bsl.md`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from recsys_losses._checks import check_positive, check_reduction, check_scores, reduce, upcast

if TYPE_CHECKING:
    from torch import Tensor

    from recsys_losses._checks import Reduction

__all__ = ["BCELoss", "BPRLoss", "SoftmaxLoss", "bce_loss", "bpr_loss", "softmax_loss"]


def result_dtype(**tensors: Tensor) -> torch.dtype:
    """Return the promoted dtype of the tensors; raise ValueError, with the argument's name, unless all are floating."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got dtype {tensor.dtype}")
    first, *rest = (tensor.dtype for tensor in tensors.values())
    for dtype in rest:
        first = torch.promote_types(first, dtype)
    return first


def _softplus(x: Tensor) -> Tensor:
    # F.softplus becomes linear above 20, an error of 2e-9; this form is exact to rounding everywhere.
    return -F.logsigmoid(-x)


def bpr_loss(pos_score: Tensor, neg_score: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    r"""Bayesian personalised ranking loss with one negative per row (Rendle et al., 2009, section 4.1).

    $$\ell_b=-\log\sigma(p_b-n_b)=\operatorname{softplus}(n_b-p_b)$$

    No constant is added inside the logarithm, so badly misordered pairs keep their full gradient.

    Args:
        pos_score: Scores $p$ of the observed items, shape `(B,)`, floating.
        neg_score: Scores $n$ of the sampled items, shape `(B,)`.
        reduction: `"none"` gives shape `(B,)`, `"mean"` and `"sum"` a scalar.

    Returns:
        The loss in the promoted dtype of the scores; half precision is computed in float32.

    Raises:
        ValueError: If the shapes differ or aren't `(B,)` with B >= 1, a dtype isn't floating, or `reduction` is unknown.

    Examples:
        >>> import torch
        >>> bpr_loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
        tensor(0.6931)
    """
    check_reduction(reduction)
    if pos_score.ndim != 1 or neg_score.shape != pos_score.shape:
        shapes = f"{tuple(pos_score.shape)} and {tuple(neg_score.shape)}"
        raise ValueError(f"expected pos_score (B,) and neg_score (B,), got {shapes}")
    if pos_score.shape[0] == 0:
        raise ValueError("empty batch: pos_score has no rows")
    dtype = result_dtype(pos_score=pos_score, neg_score=neg_score)
    return reduce(_softplus(upcast(neg_score) - upcast(pos_score)), reduction, dtype)


def bce_loss(pos_score: Tensor, neg_scores: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    r"""Binary cross-entropy of one positive and the mean of N negatives (He et al., 2017, eq. 7).

    $$\ell_b=\operatorname{softplus}(-p_b)+\frac1N\sum_{j=1}^N\operatorname{softplus}(n_{bj})$$

    The negatives of a row are averaged here, where the paper adds them up: positives and negatives then weigh the same
    whatever N is.

    Args:
        pos_score: Scores $p$ (logits) of the observed items, shape `(B,)`, floating.
        neg_scores: Scores $n$ of the sampled items, shape `(B, N)`.
        reduction: `"none"` gives shape `(B,)`, `"mean"` and `"sum"` a scalar.

    Returns:
        The loss in the promoted dtype of the scores; half precision is computed in float32.

    Raises:
        ValueError: If the shapes don't fit, B or N is 0, a dtype isn't floating, or `reduction` is unknown.

    Examples:
        >>> import torch
        >>> bce_loss(torch.tensor([0.0]), torch.tensor([[0.0, 0.0, 0.0]]))
        tensor(1.3863)
    """
    check_reduction(reduction)
    check_scores(pos_score, neg_scores)
    dtype = result_dtype(pos_score=pos_score, neg_scores=neg_scores)
    loss = _softplus(-upcast(pos_score)) + _softplus(upcast(neg_scores)).mean(1)
    return reduce(loss, reduction, dtype)


def softmax_loss(pos_score: Tensor, neg_scores: Tensor, *, temperature: float, reduction: Reduction = "mean") -> Tensor:
    r"""Softmax loss with the positive left out of the denominator (Wu et al., 2024, eq. 5, with a sum for the mean).

    $$\ell_b=-\frac{p_b}{\tau}+\log\sum_{j=1}^N e^{n_{bj}/\tau}$$

    It has no lower bound. `recsys_losses.bsl.bsl_loss` with `mode="reweight"` and `power=1` is the same function,
    `mode="single"` differs by the constant $\log N$, and `recsys_losses.ssm.sampled_softmax_loss` puts the positive
    into the sum.

    Args:
        pos_score: Scores $p$ of the observed items, shape `(B,)`, floating.
        neg_scores: Scores $n$ of the sampled items, shape `(B, N)`.
        temperature: $\tau>0$ that divides the scores; smaller values weigh hard negatives more. 0.05 to 0.3 is usual
            for cosine scores.
        reduction: `"none"` gives shape `(B,)`, `"mean"` and `"sum"` a scalar.

    Returns:
        The loss in the promoted dtype of the scores; half precision is computed in float32.

    Raises:
        ValueError: If the shapes don't fit, B or N is 0, a dtype isn't floating, `temperature` isn't a positive finite
            number, or `reduction` is unknown.

    Examples:
        >>> import torch
        >>> softmax_loss(torch.tensor([0.5]), torch.tensor([[0.5, 0.5]]), temperature=0.1)
        tensor(0.6931)
    """
    check_positive("temperature", temperature)
    check_reduction(reduction)
    check_scores(pos_score, neg_scores)
    dtype = result_dtype(pos_score=pos_score, neg_scores=neg_scores)
    loss = (upcast(neg_scores) / temperature).logsumexp(1) - upcast(pos_score) / temperature
    return reduce(loss, reduction, dtype)


class BPRLoss(nn.Module):
    """Module form of `bpr_loss`.

    Args:
        reduction: As in `bpr_loss`.

    Raises:
        ValueError: If `reduction` is unknown.

    Examples:
        >>> import torch
        >>> BPRLoss()(torch.tensor([1.0]), torch.tensor([1.0]))
        tensor(0.6931)
    """

    def __init__(self, *, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction = reduction

    def forward(self, pos_score: Tensor, neg_score: Tensor) -> Tensor:
        return bpr_loss(pos_score, neg_score, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


class BCELoss(nn.Module):
    """Module form of `bce_loss`.

    Args:
        reduction: As in `bce_loss`.

    Raises:
        ValueError: If `reduction` is unknown.

    Examples:
        >>> import torch
        >>> BCELoss()(torch.tensor([0.0]), torch.tensor([[0.0, 0.0]]))
        tensor(1.3863)
    """

    def __init__(self, *, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction = reduction

    def forward(self, pos_score: Tensor, neg_scores: Tensor) -> Tensor:
        return bce_loss(pos_score, neg_scores, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


class SoftmaxLoss(nn.Module):
    r"""Module form of `softmax_loss`.

    Args:
        temperature: $\tau>0$, as in `softmax_loss`.
        reduction: As in `softmax_loss`.

    Raises:
        ValueError: If `temperature` isn't a positive finite number or `reduction` is unknown.

    Examples:
        >>> import torch
        >>> SoftmaxLoss(temperature=0.1)(torch.tensor([0.5]), torch.tensor([[0.5, 0.5]]))
        tensor(0.6931)
    """

    def __init__(self, temperature: float, *, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_positive("temperature", temperature)
        check_reduction(reduction)
        self.temperature = temperature
        self.reduction = reduction

    def forward(self, pos_score: Tensor, neg_scores: Tensor) -> Tensor:
        return softmax_loss(pos_score, neg_scores, temperature=self.temperature, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}"
