"""Losses of RAREMed: the three terms of fine-tuning and the two pre-training tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F

from recsys_losses._checks import check_choice, check_finite, check_reduction, reduce, upcast

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from recsys_losses._checks import Reduction

SMPForm = Literal["bce", "pairwise_softmax"]

SMP_FORMS = ("bce", "pairwise_softmax")


class MedicationLoss(NamedTuple):
    """What `medication_loss` returns; every field is reduced over the visits alike.

    Args:
        loss: The weighted sum of the three terms.
        bce: Binary cross-entropy, averaged over the medications, without its weight.
        margin: Margin term, without its weight.
        ddi: Interaction term with its scale, without its weight.
    """

    loss: Tensor
    bce: Tensor
    margin: Tensor
    ddi: Tensor


def medication_loss(
    logits: Tensor,
    target: Tensor,
    ddi_adj: Tensor,
    *,
    margin_weight: float = 0.005,
    ddi_weight: float = 0.1,
    ddi_scale: float = 5e-4,
    reduction: Reduction = "sum",
    validate: bool = True,
) -> MedicationLoss:
    r"""Fine-tuning loss of RAREMed.

    Per visit, with $s=\sigma(x)$:

    $$
    \mathcal{L}=(1-\alpha)\,\frac1M\sum_{j}\mathrm{BCE}(s_j,y_j)
      +\frac{\alpha}{M}\sum_{j:y_j=1}\sum_{k:y_k=0}\max(0,1-(s_j-s_k))
      +\beta\,c\,s^\top A\,s
    $$

    This is the form of the authors' code. The paper's eq. 9,
    $(1-\beta)[(1-\alpha)L_\mathrm{bce}+\alpha L_\mathrm{margin}]+\beta L_\mathrm{ddi}$, *sums* the cross-entropy over
    the M medications and doesn't scale $s^\top As$. Up to an overall factor it is this function with
    `ddi_scale=1`, `margin_weight=a` and `ddi_weight=b`, where

    $$
    \frac{a}{1-a}=\frac{\alpha}{(1-\alpha)M},\qquad b=\frac{(1-a)\,\beta}{(1-\beta)(1-\alpha)M};
    $$

    for its $\alpha=0.03$, $\beta=0.7$ and 112 medications: a = 2.8e-4, b = 0.0215, a pull on interactions about 430
    times that of the code's defaults. The weights of the two forms are not interchangeable.

    Args:
        logits: $x$, shape `(B, M)`, floating.
        target: $y$, medications given, shape `(B, M)`, 0 or 1 of any dtype.
        ddi_adj: $A$, shape `(M, M)`, symmetric, 1 where two drugs interact; each pair counts twice in $s^\top As$.
        margin_weight: $\alpha$ in [0, 1]; more recommends more drugs.
        ddi_weight: $\beta\ge0$; more avoids interactions, at the price of fewer drugs.
        ddi_scale: $c\ge0$.
        reduction: `"sum"` over the visits, `"mean"`, or `"none"` for fields of shape `(B,)`.
        validate: Check that `target` and `ddi_adj` hold what they should, which waits for a GPU.

    Returns:
        The loss and its unweighted parts in the dtype of `logits`; half precision is computed in float32. A visit with
        no or only positive labels has a margin term of 0.

    Raises:
        ValueError: If a shape doesn't fit, `ddi_adj` isn't square and symmetric, `target` isn't binary, a weight is out
            of range, or `reduction` is unknown.

    Source: Zhao et al., 2024, eq. 6-9, and `loss_func` of the authors' code summed over the visits of a batch.

    Examples:
        >>> import torch
        >>> logits, target = torch.zeros(1, 4), torch.tensor([[1, 1, 0, 0]])
        >>> loss = medication_loss(logits, target, torch.zeros(4, 4), margin_weight=0.5)
        >>> loss.bce, loss.margin, loss.ddi  # log 2; 4 pairs / 4 medications; no interactions
        (tensor(0.6931), tensor(1.), tensor(0.))
    """
    check_reduction(reduction)
    check_weights(margin_weight, ddi_weight, ddi_scale)
    _check_pair("logits", logits, target)
    check_ddi(ddi_adj, logits.shape[1], values=validate)
    if validate:
        check_binary("target", target)
    x = upcast(logits)
    y = target.to(x.dtype)
    bce = F.binary_cross_entropy_with_logits(x, y, reduction="none").mean(1)
    # |y - s| without the rounding of 1 - s
    margin = _margin(torch.sigmoid(torch.where(y > 0, -x, x)), y)
    ddi = _ddi(torch.sigmoid(x), ddi_adj, ddi_scale)
    loss = (1 - margin_weight) * bce + margin_weight * margin + ddi_weight * ddi
    return MedicationLoss(*(reduce(part, reduction, logits.dtype) for part in (loss, bce, margin, ddi)))


def multilabel_margin(prob: Tensor, target: Tensor, reduction: Reduction = "mean", *, validate: bool = True) -> Tensor:
    r"""Multi-label margin loss of probabilities.

    $$\ell=\frac1M\sum_{j:y_j=1}\sum_{k:y_k=0}\max(0,1-(s_j-s_k))$$

    Two probabilities never differ by more than the margin 1, so no hinge is ever closed and the double sum is

    $$\ell=\frac1M\Big(n_-\sum_{j:y_j=1}(1-s_j)+n_+\sum_{k:y_k=0}s_k\Big),$$

    which takes O(M) instead of O(M²). The value is that of torch's `multilabel_margin_loss`.

    Args:
        prob: $s$ in [0, 1], shape `(B, M)`, floating.
        target: $y$, shape `(B, M)`, 0 or 1 of any dtype (not torch's list of indices).
        reduction: `"none"` gives shape `(B,)`, `"mean"` and `"sum"` a scalar.
        validate: Check the values, which waits for a GPU.

    Returns:
        The loss in the dtype of `prob`; 0 for a visit with no or only positive labels.

    Raises:
        ValueError: If the shapes don't fit, `prob` leaves [0, 1], `target` isn't binary, or `reduction` is unknown.

    Source: Zhao et al., 2024, eq. 7.

    Examples:
        >>> import torch
        >>> multilabel_margin(torch.tensor([[0.9, 0.4, 0.1]]), torch.tensor([[1, 0, 0]]))  # (0.5 + 0.2) / 3
        tensor(0.2333)
    """
    check_reduction(reduction)
    _check_pair("prob", prob, target)
    if validate:
        check_binary("target", target)
        if not bool(((prob >= 0) & (prob <= 1)).all()):
            raise ValueError("prob must hold probabilities in [0, 1]; the closed form doesn't hold outside")
    s = upcast(prob)
    y = target.to(s.dtype)
    return reduce(_margin((y - s).abs(), y), reduction, prob.dtype)


def ddi_loss(
    logits: Tensor, ddi_adj: Tensor, *, scale: float = 5e-4, reduction: Reduction = "sum", validate: bool = True
) -> Tensor:
    r"""Expected drug-drug interactions of independent recommendations, $c\,s^\top As$ with $s=\sigma(x)$.

    Args:
        logits: $x$, shape `(B, M)`, floating.
        ddi_adj: $A$, shape `(M, M)`, symmetric, 1 where two drugs interact.
        scale: $c$, a finite number.
        reduction: `"none"` gives shape `(B,)`, `"mean"` and `"sum"` a scalar.
        validate: Check that `ddi_adj` is symmetric and 0/1, which waits for a GPU.

    Returns:
        The loss in the dtype of `logits`. Visits don't mix.

    Raises:
        ValueError: If a shape doesn't fit, `ddi_adj` isn't square and symmetric, or an option is out of range.

    Source: Zhao et al., 2024, eq. 8, with the scale of the authors' code.

    Examples:
        >>> import torch
        >>> ddi_loss(torch.zeros(2, 2), torch.tensor([[0, 1], [1, 0]]), scale=1.0)  # two visits, 2 * 0.5 * 0.5 each
        tensor(1.)
    """
    check_reduction(reduction)
    check_finite("scale", scale)
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"expected floating logits (B, M), got {logits.dtype} {tuple(logits.shape)}")
    if logits.shape[0] == 0:
        raise ValueError("empty batch: logits has no rows")
    check_ddi(ddi_adj, logits.shape[1], values=validate)
    return reduce(_ddi(torch.sigmoid(upcast(logits)), ddi_adj, scale), reduction, logits.dtype)


def smp_loss(logits: Tensor, target: Tensor, *, form: SMPForm = "bce", validate: bool = True) -> Tensor:
    r"""Sequence matching prediction: do these diagnoses and procedures belong to one visit?

    `"bce"` is binary cross-entropy on the logits, averaged over all 2n entries (the paper's eq. 3, whose second term is
    printed with the wrong sign). `"pairwise_softmax"` is what the authors' code computes, a bounded ranking loss of each
    (positive, negative) pair,

    $$\frac1n\sum_i\log\big(1+e^{\sigma(s_i^-)-\sigma(s_i^+)}\big).$$

    Args:
        logits: $s$, shape `(2n,)`, floating.
        target: 1 for visits as they were, 0 for mixed ones, shape `(2n,)`; for `"pairwise_softmax"` in consecutive
            pairs 1, 0.
        form: `"bce"` or `"pairwise_softmax"`.
        validate: Check the values of `target`, which waits for a GPU.

    Returns:
        A scalar in the dtype of `logits`.

    Raises:
        ValueError: If the shapes don't fit or are empty, `target` isn't binary, `form` is unknown, or for
            `"pairwise_softmax"` the length is odd or the entries aren't in pairs.

    Source: Zhao et al., 2024, eq. 3, and the authors' code.

    Examples:
        >>> import torch
        >>> smp_loss(torch.zeros(2), torch.tensor([1, 0]))
        tensor(0.6931)
    """
    check_choice("form", form, SMP_FORMS)
    if logits.ndim != 1 or target.shape != logits.shape or not logits.is_floating_point():
        raise ValueError(f"expected floating logits (2n,) and target (2n,), got {_shapes(logits, target)}")
    if logits.shape[0] == 0:
        raise ValueError("empty batch: logits has no entries")
    if form == "pairwise_softmax" and logits.shape[0] % 2:
        raise ValueError(f"form 'pairwise_softmax' needs pairs, an even length; got the odd length {logits.shape[0]}")
    if validate:
        check_binary("target", target)
    x = upcast(logits)
    if form == "bce":
        return F.binary_cross_entropy_with_logits(x, target.to(x.dtype)).to(logits.dtype)
    if validate and not bool((target.view(-1, 2) == target.new_tensor([1, 0])).all()):
        raise ValueError("form 'pairwise_softmax' needs target in consecutive pairs (1, 0)")
    s = torch.sigmoid(x).view(-1, 2)
    return F.softplus(s[:, 1] - s[:, 0]).mean().to(logits.dtype)


def sr_loss(
    logits: Tensor,
    diagnoses: Sequence[Sequence[int]],
    procedures: Sequence[Sequence[int]],
    *,
    num_diagnoses: int,
    num_procedures: int,
) -> Tensor:
    r"""Self-reconstruction: binary cross-entropy of all codes of a visit, from its representation.

    The mean over the $D+P$ codes and the batch, as in the authors' code; the paper's eq. 4 sums over the codes.

    Args:
        logits: Shape `(B, D + P)`, floating: diagnoses first.
        diagnoses: The diagnosis ids of the B visits, unmasked; at least one each.
        procedures: Their procedure ids; may be empty.
        num_diagnoses: D.
        num_procedures: P.

    Returns:
        A scalar in the dtype of `logits`.

    Raises:
        ValueError: If the sizes don't fit, a visit has no diagnoses, or an id is out of range.

    Source: Zhao et al., 2024, eq. 4.

    Examples:
        >>> import torch
        >>> sr_loss(torch.zeros(1, 5), [[0, 2]], [[1]], num_diagnoses=3, num_procedures=2)
        tensor(0.6931)
    """
    if logits.ndim != 2 or logits.shape[1] != num_diagnoses + num_procedures or not logits.is_floating_point():
        raise ValueError(
            f"expected floating logits (B, {num_diagnoses} + {num_procedures}), got {logits.dtype} {tuple(logits.shape)}"
        )
    if not 0 < logits.shape[0] == len(diagnoses) == len(procedures):
        counts = f"{logits.shape[0]} rows, {len(diagnoses)} diagnosis lists, {len(procedures)} procedure lists"
        raise ValueError(f"expected as many lists as rows of logits, at least one; got {counts}")
    check_codes(diagnoses, procedures, num_diagnoses, num_procedures)
    return reconstruction(logits, multi_hot(diagnoses, procedures, num_diagnoses, num_procedures).to(logits.device))


def reconstruction(logits: Tensor, target: Tensor) -> Tensor:
    """Mean binary cross-entropy with a multi-hot target of the same shape."""
    x = upcast(logits)
    return F.binary_cross_entropy_with_logits(x, target.to(x.dtype)).to(logits.dtype)


def multi_hot(
    diagnoses: Sequence[Sequence[int]], procedures: Sequence[Sequence[int]], num_diagnoses: int, num_procedures: int
) -> Tensor:
    """Return the float32 matrix (B, D + P) of valid codes, diagnoses first."""
    hot = torch.zeros(len(diagnoses), num_diagnoses + num_procedures)
    for offset, lists in ((0, diagnoses), (num_diagnoses, procedures)):
        rows = torch.repeat_interleave(torch.arange(len(lists)), torch.tensor([len(codes) for codes in lists]))
        hot[rows, torch.tensor([offset + code for codes in lists for code in codes], dtype=torch.long)] = 1.0
    return hot


def check_weights(margin_weight: float, ddi_weight: float, ddi_scale: float) -> None:
    """Raise ValueError for a weight of the medication loss that is out of range."""
    if not 0 <= margin_weight <= 1:
        raise ValueError(f"margin_weight must be in [0, 1], got {margin_weight!r}")
    for name, weight in (("ddi_weight", ddi_weight), ("ddi_scale", ddi_scale)):
        check_finite(name, weight)
        if weight < 0:
            raise ValueError(f"{name} must be at least 0, got {weight!r}")


def check_codes(
    diagnoses: Sequence[Sequence[int]], procedures: Sequence[Sequence[int]], num_diagnoses: int, num_procedures: int
) -> None:
    """Raise ValueError for a visit without diagnoses or an id out of range."""
    for kind, lists, size in (("diagnosis", diagnoses, num_diagnoses), ("procedure", procedures, num_procedures)):
        for number, codes in enumerate(lists):
            if kind == "diagnosis" and not len(codes):
                raise ValueError(f"visit {number} has no diagnoses")
            for code in codes:
                if not 0 <= code < size:
                    raise ValueError(f"visit {number}: {kind} id {code} is out of range, accepted: 0 to {size - 1}")


def check_ddi(ddi_adj: Tensor, size: int | None = None, *, values: bool = True) -> None:
    """Raise ValueError unless the matrix is square (and of that size), symmetric and 0/1."""
    if ddi_adj.ndim != 2 or ddi_adj.shape[0] != ddi_adj.shape[1]:
        raise ValueError(f"ddi_adj must be square (M, M), got {tuple(ddi_adj.shape)}")
    if size is not None and ddi_adj.shape[0] != size:
        raise ValueError(f"ddi_adj must be ({size}, {size}) for {size} medications, got {tuple(ddi_adj.shape)}")
    if not values:
        return
    if not torch.equal(ddi_adj, ddi_adj.T):
        raise ValueError("ddi_adj must be symmetric: an interaction has no direction")
    check_binary("ddi_adj", ddi_adj)


def check_binary(name: str, x: Tensor) -> None:
    """Raise ValueError unless all entries are 0 or 1."""
    wrong = x[(x != 0) & (x != 1)]
    if wrong.numel():
        raise ValueError(f"{name} must be binary (0 or 1), got {wrong[0].item()!r}")


def _check_pair(name: str, x: Tensor, target: Tensor) -> None:
    if x.ndim != 2 or target.shape != x.shape or not x.is_floating_point():
        raise ValueError(f"expected floating {name} (B, M) and target (B, M), got {_shapes(x, target)}")
    if x.shape[0] == 0 or x.shape[1] == 0:
        raise ValueError(f"empty batch: {name} has the shape {tuple(x.shape)}")


def _shapes(x: Tensor, target: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)} and {tuple(target.shape)}"


def _margin(error: Tensor, y: Tensor) -> Tensor:
    """Closed form of the double sum per row; `error` is |y - s|."""
    positives = y.sum(1)
    negatives = y.shape[1] - positives
    missed, invented = (error * y).sum(1), (error * (1 - y)).sum(1)
    return (negatives * missed + positives * invented) / y.shape[1]


def _ddi(s: Tensor, ddi_adj: Tensor, scale: float) -> Tensor:
    return scale * ((s @ ddi_adj.to(s.dtype)) * s).sum(1)
