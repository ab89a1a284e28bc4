"""Losses of the delayed-feedback baselines: FNW, FNC, DFM, ES-DFM, FSIW, DEFER and label correction (ULC).

All take logits and work in the log domain; importance weights and soft targets carry no gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from recsys_losses._checks import check_positive, check_reduction, reduce, upcast
from recsys_losses.baselines import result_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from recsys_losses._checks import Reduction

_LOG_2 = 0.6931471805599453


def fnw_loss(logits: Tensor, label: Tensor, reduction: Reduction = "mean", *, validate: bool = True) -> Tensor:
    r"""Fake negative weighted loss (Ktena et al., 2019, eq. 8).

    For a stream in which every click enters as 0 at once and again as 1 when it converts. With $p=\sigma(x)$, no gradient
    through the weights:

    $$\ell=y\,(1+p)\,\mathrm{softplus}(-x)+(1-y)(1-p)(1+p)\,\mathrm{softplus}(x)$$

    Args:
        logits: $x$, shape `(B,)`, floating.
        label: $y$, 0 or 1, shape `(B,)`.
        reduction: `"none"` gives shape `(B,)`, `"mean"` and `"sum"` a scalar.
        validate: Check that labels are 0 or 1, which waits for a GPU.

    Returns:
        The loss in the dtype of the logits; half precision is computed in float32.

    Raises:
        ValueError: If the shapes don't fit, B is 0, the logits aren't floating, a label isn't 0 or 1, or `reduction` is
            unknown.

    Examples:
        >>> import torch
        >>> fnw_loss(torch.tensor([0.0, 0.0]), torch.tensor([0, 1]), reduction="none")
        tensor([0.5199, 1.0397])
    """
    _check(reduction, validate, label=label, logits=logits)
    x, y = upcast(logits), _as(label, logits)
    p = x.detach().sigmoid()
    loss = y * (1 + p) * _softplus(-x) + (1 - y) * (1 - p) * (1 + p) * _softplus(x)
    return reduce(loss, reduction, logits.dtype)


def fnc_calibrate(biased_probability: Tensor, *, eps: float = 1e-8, clip: bool = True) -> Tensor:
    r"""Fake negative calibration: undo the bias of a model trained with cross-entropy on a stream of duplicates.

    A click that converts enters twice, as 0 and as 1, so such a model learns $q=p/(1+p)$ (Ktena et al., 2019, eq. 10):

    $$p=\frac{q}{1-q+\epsilon}$$

    Args:
        biased_probability: $q\in[0,1]$, any shape, floating. More than 1/2 gives $p>1$.
        eps: $\epsilon>0$, keeps $q=1$ finite.
        clip: Cut $p$ at 1; the authors' code doesn't.

    Returns:
        $p$, of the same shape and dtype.

    Raises:
        ValueError: If the probabilities aren't floating or `eps` isn't a positive finite number.

    Examples:
        >>> import torch
        >>> fnc_calibrate(torch.tensor([0.2, 0.5, 0.6]))
        tensor([0.2500, 1.0000, 1.0000])
    """
    check_positive("eps", eps)
    dtype = result_dtype(biased_probability=biased_probability)
    q = upcast(biased_probability)
    p = q / (1 - q + eps)
    return (p.clamp_max(1.0) if clip else p).to(dtype)


def dfm_loss(
    logits: Tensor,
    rate_logits: Tensor,
    label: Tensor,
    elapsed: Tensor,
    reduction: Reduction = "mean",
    *,
    validate: bool = True,
) -> Tensor:
    r"""Delayed feedback model: conversion probability and exponential delay, fitted together (Chapelle, 2014, eq. 9).

    With $p=\sigma(x)$, $\lambda=\mathrm{softplus}(r)$ and the elapsed time $e$ (the delay of a conversion, the age of a
    click without one):

    $$\ell=\begin{cases}\mathrm{softplus}(-x)-\log\lambda+\lambda e&y=1\\
    -\log\bigl(1-p+p\,e^{-\lambda e}\bigr)&y=0\end{cases}$$

    A click without conversion costs nothing at $e=0$ and its full cross-entropy as $e\to\infty$.

    Args:
        logits: $x$, shape `(B,)`, floating.
        rate_logits: $r$, shape `(B,)`, floating.
        label: Whether a conversion was seen, 0 or 1, shape `(B,)`.
        elapsed: $e\ge0$, shape `(B,)`, in any unit; with days, $\lambda$ stays near 1.
        reduction: `"none"` gives shape `(B,)`, `"mean"` and `"sum"` a scalar.
        validate: Check labels and times, which waits for a GPU.

    Returns:
        The loss in the promoted dtype of the logits; half precision is computed in float32.

    Raises:
        ValueError: If the shapes don't fit, B is 0, a dtype is wrong, a label isn't 0 or 1, an elapsed time is negative
            or not finite, or `reduction` is unknown.

    Examples:
        >>> import torch
        >>> zero = torch.zeros(2)
        >>> dfm_loss(zero, zero, torch.tensor([0, 0]), torch.tensor([0.0, 1e6]), reduction="none")
        tensor([-0.0000, 0.6931])
    """
    _check(reduction, validate, label=label, logits=logits, rate_logits=rate_logits)
    if elapsed.shape != logits.shape:
        raise ValueError(f"expected elapsed {tuple(logits.shape)}, got {tuple(elapsed.shape)}")
    if validate and not bool(((elapsed >= 0) & elapsed.isfinite()).all()):
        raise ValueError("elapsed must be finite times >= 0")
    dtype = result_dtype(logits=logits, rate_logits=rate_logits)
    x, r = upcast(logits.to(dtype)), upcast(rate_logits.to(dtype))
    e = elapsed.to(x.dtype)
    hazard = _softplus(r) * e
    converted = _softplus(-x) - _log_softplus(r) + hazard
    waiting = -torch.logaddexp(F.logsigmoid(-x), F.logsigmoid(x) - hazard)
    return reduce(torch.where(label.bool(), converted, waiting), reduction, dtype)


def es_dfm_loss(
    logits: Tensor,
    label: Tensor,
    tn_logits: Tensor,
    dp_logits: Tensor,
    reduction: Reduction = "mean",
    *,
    validate: bool = True,
) -> Tensor:
    r"""ES-DFM: cross-entropy on a stream with a waiting window, weighted back to the true distribution (Yang et al., 2021).

    A click enters after the window with the label known then, and again as 1 if it converts later.

    $$\ell=y\,(1+p_{dp})\,\mathrm{softplus}(-x)+(1-y)(1+p_{dp})\,p_{rn}\,\mathrm{softplus}(x),\qquad
    p_{dp}=\sigma(\text{dp}),\ p_{rn}=\sigma(\text{tn})$$

    $p_{dp}$ is the probability of a conversion after the window, $p_{rn}$ that of being a real negative among the observed
    ones; train them with `es_dfm_pretrain_loss`. No gradient reaches them from here.

    Args:
        logits: $x$, shape `(B,)`, floating.
        label: Observed label, 0 or 1, shape `(B,)`.
        tn_logits: Logits of $p_{rn}$, shape `(B,)`, floating.
        dp_logits: Logits of $p_{dp}$, shape `(B,)`, floating.
        reduction: `"none"` gives shape `(B,)`, `"mean"` and `"sum"` a scalar.
        validate: Check that labels are 0 or 1, which waits for a GPU.

    Returns:
        The loss in the dtype of the logits; half precision is computed in float32.

    Raises:
        ValueError: If the shapes don't fit, B is 0, a dtype isn't floating, a label isn't 0 or 1, or `reduction` is
            unknown.

    Examples:
        >>> import torch
        >>> zero, never = torch.zeros(2), torch.full((2,), -100.0)
        >>> es_dfm_loss(zero, torch.tensor([0, 1]), -never, never)  # nothing is delayed: cross-entropy
        tensor(0.6931)
    """
    _check(reduction, validate, label=label, logits=logits, tn_logits=tn_logits, dp_logits=dp_logits)
    x, y = upcast(logits), _as(label, logits)
    p_dp, p_rn = (upcast(z.detach()).sigmoid() for z in (dp_logits, tn_logits))
    loss = (1 + p_dp) * (y * _softplus(-x) + (1 - y) * p_rn * _softplus(x))
    return reduce(loss, reduction, logits.dtype)


def es_dfm_pretrain_loss(
    tn_logits: Tensor, dp_logits: Tensor, converted: Tensor, delayed: Tensor, *, validate: bool = True
) -> Tensor:
    r"""Loss of the two weighting models of ES-DFM, on clicks whose outcome is known (Yang et al., 2021, section 4.4).

    $$\operatorname*{mean}_{i:\,c_i=0\ \text{or}\ d_i=1}\mathrm{BCE}(\text{tn}_i,1-c_i)
    +\operatorname*{mean}_i\mathrm{BCE}(\text{dp}_i,d_i)$$

    The first mean leaves out conversions inside the window, which are never observed as negatives; it is 0 if nothing
    remains.

    Args:
        tn_logits: Logits of being a real negative among the observed ones, shape `(B,)`, floating.
        dp_logits: Logits of a conversion after the window, shape `(B,)`, floating.
        converted: $c$, whether the click converts at all, 0 or 1, shape `(B,)`.
        delayed: $d$, whether it does so after the window, 0 or 1, shape `(B,)`.
        validate: Check the labels, which waits for a GPU.

    Returns:
        A scalar in the promoted dtype of the logits; half precision is computed in float32.

    Raises:
        ValueError: If the shapes don't fit, B is 0, a dtype isn't floating, a label isn't 0 or 1, or a click is `delayed`
            without being `converted`.

    Examples:
        >>> import torch
        >>> zero = torch.zeros(3)
        >>> es_dfm_pretrain_loss(zero, zero, torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]))
        tensor(1.3863)
    """
    _check("mean", validate, converted=converted, tn_logits=tn_logits, dp_logits=dp_logits)
    _check("mean", validate, delayed=delayed, tn_logits=tn_logits)
    if validate and bool((delayed.bool() & ~converted.bool()).any()):
        raise ValueError("delayed must be 0 where converted is 0")
    dtype = result_dtype(tn_logits=tn_logits, dp_logits=dp_logits)
    tn, dp = upcast(tn_logits.to(dtype)), upcast(dp_logits.to(dtype))
    observed_negative = (~converted.bool() | delayed.bool()).to(tn.dtype)
    real = observed_negative * _cross_entropy(tn, 1 - converted.to(tn.dtype))
    real_mean = real.sum() / observed_negative.sum().clamp_min(1)
    return (real_mean + _cross_entropy(dp, delayed.to(dp.dtype)).mean()).to(dtype)


def fsiw_loss(
    logits: Tensor,
    label: Tensor,
    true_negative_logits: Tensor,
    observed_positive_logits: Tensor,
    *,
    eps: float = 1e-8,
    reduction: Reduction = "mean",
    validate: bool = True,
) -> Tensor:
    r"""Feedback shift importance weighting (Yasui et al., 2020, section 4).

    $$\ell=\frac{y}{\sigma(l_1)+\epsilon}\,\mathrm{softplus}(-x)+(1-y)\,\sigma(l_0)\,\mathrm{softplus}(x)$$

    $\sigma(l_1)$ is the probability that a conversion has been seen by now, given that it happens; $\sigma(l_0)$ the
    probability that none ever happens, given that none was seen. Both depend on the age of the click and are fitted to a
    counterfactual deadline some days ago. No gradient reaches them from here.

    Args:
        logits: $x$, shape `(B,)`, floating.
        label: Observed label, 0 or 1, shape `(B,)`.
        true_negative_logits: $l_0$, shape `(B,)`, floating.
        observed_positive_logits: $l_1$, shape `(B,)`, floating.
        eps: $\epsilon>0$, bounds the weights by $1/\epsilon$.
        reduction: `"none"` gives shape `(B,)`, `"mean"` and `"sum"` a scalar.
        validate: Check that labels are 0 or 1, which waits for a GPU.

    Returns:
        The loss in the dtype of the logits; half precision is computed in float32.

    Raises:
        ValueError: If the shapes don't fit, B is 0, a dtype isn't floating, a label isn't 0 or 1, `eps` isn't a positive
            finite number, or `reduction` is unknown.

    Examples:
        >>> import torch
        >>> zero = torch.zeros(2)
        >>> fsiw_loss(zero, torch.tensor([0, 1]), zero, zero, reduction="none")
        tensor([0.3466, 1.3863])
    """
    check_positive("eps", eps)
    _check(
        reduction,
        validate,
        label=label,
        logits=logits,
        true_negative_logits=true_negative_logits,
        observed_positive_logits=observed_positive_logits,
    )
    x, y = upcast(logits), _as(label, logits)
    never, seen = (upcast(z.detach()).sigmoid() for z in (true_negative_logits, observed_positive_logits))
    loss = y / (seen + eps) * _softplus(-x) + (1 - y) * never * _softplus(x)
    return reduce(loss, reduction, logits.dtype)


def defer_loss(
    logits: Tensor, dp_logits: Tensor, label: Tensor, reduction: Reduction = "mean", *, validate: bool = True
) -> Tensor:
    r"""DEFER: a stream that holds every click twice, real negatives included (Gu et al., 2021).

    Each click enters after the waiting window with the label known then, and at the end of the attribution with the final
    one. Positives then have the share $q=p-\tfrac12p_{dp}$, hence the weights

    $$\ell=y\,\frac{p}{p-\frac12p_{dp}}\,\mathrm{softplus}(-x)
    +(1-y)\,\frac{1-p}{1-p+\frac12p_{dp}}\,\mathrm{softplus}(x),\qquad p_{dp}=\min(\sigma(\text{dp}),p)$$

    Args:
        logits: $x$ with $p=\sigma(x)$, shape `(B,)`, floating.
        dp_logits: Logits of a conversion after the window, shape `(B,)`, floating.
        label: Label of the entry, 0 or 1, shape `(B,)`.
        reduction: `"none"` gives shape `(B,)`, `"mean"` and `"sum"` a scalar.
        validate: Check that labels are 0 or 1, which waits for a GPU.

    Returns:
        The loss in the dtype of the logits; half precision is computed in float32. The weights carry no gradient.

    Raises:
        ValueError: If the shapes don't fit, B is 0, a dtype isn't floating, a label isn't 0 or 1, or `reduction` is
            unknown.

    Examples:
        >>> import torch
        >>> zero = torch.zeros(2)
        >>> defer_loss(zero, zero, torch.tensor([1, 0]), reduction="none") / 0.6931472  # the weights
        tensor([2.0000, 0.6667])
    """
    _check(reduction, validate, label=label, logits=logits, dp_logits=dp_logits)
    x, y = upcast(logits), _as(label, logits)
    fixed = x.detach()
    log_dp = torch.minimum(F.logsigmoid(upcast(dp_logits.detach()).to(x.dtype)), F.logsigmoid(fixed))
    positive = 1 / (1 - 0.5 * (log_dp - F.logsigmoid(fixed)).exp())
    negative = (F.logsigmoid(-fixed) - log_dp + _LOG_2).sigmoid()
    loss = y * positive * _softplus(-x) + (1 - y) * negative * _softplus(x)
    return reduce(loss, reduction, logits.dtype)


def ulc_loss(
    logits: Tensor, label: Tensor, correction_logits: Tensor, reduction: Reduction = "mean", *, validate: bool = True
) -> Tensor:
    r"""Label correction: cross-entropy against what an observed negative probably becomes (Wang et al., 2023, ULC).

    $$\ell=\mathrm{BCE}(x,t),\qquad t=\begin{cases}1&y=1\\\sigma(c)&y=0\end{cases}$$

    Args:
        logits: $x$, shape `(B,)`, floating.
        label: Observed label, 0 or 1, shape `(B,)`.
        correction_logits: $c$, logits of a later conversion given that none was seen, shape `(B,)`, floating; no gradient
            reaches them from here.
        reduction: `"none"` gives shape `(B,)`, `"mean"` and `"sum"` a scalar.
        validate: Check that labels are 0 or 1, which waits for a GPU.

    Returns:
        The loss in the dtype of the logits; half precision is computed in float32.

    Raises:
        ValueError: If the shapes don't fit, B is 0, a dtype isn't floating, a label isn't 0 or 1, or `reduction` is
            unknown.

    Examples:
        >>> import torch
        >>> x = torch.tensor([2.0, 2.0], requires_grad=True)
        >>> ulc_loss(x, torch.tensor([1, 0]), torch.tensor([-9.0, 2.0]), reduction="sum").backward()
        >>> x.grad.round(decimals=4)  # the second target is its own prediction
        tensor([-0.1192,  0.0000])
    """
    _check(reduction, validate, label=label, logits=logits, correction_logits=correction_logits)
    x = upcast(logits)
    target = torch.where(label.bool(), 1.0, upcast(correction_logits.detach()).to(x.dtype).sigmoid())
    return reduce(_cross_entropy(x, target), reduction, logits.dtype)


def check_binary(name: str, label: Tensor) -> None:
    """Raise ValueError unless every value is 0 or 1."""
    if not bool(((label == 0) | (label == 1)).all()):
        raise ValueError(f"{name} must hold 0 and 1 only")


def _check(reduction: str, validate: bool, **tensors: Tensor) -> None:
    """Check a label, named first, and logits: shapes and dtypes always, the labels' values with `validate`."""
    check_reduction(reduction)
    (name, label), *logits = tensors.items()
    result_dtype(**dict(logits))
    shape = logits[0][1].shape
    if len(shape) != 1 or any(x.shape != shape for x in tensors.values()):
        given = ", ".join(f"{key} {tuple(x.shape)}" for key, x in tensors.items())
        raise ValueError(f"expected tensors of one shape (B,), got {given}")
    if shape[0] == 0:
        raise ValueError(f"empty batch: {logits[0][0]} has no rows")
    if validate:
        check_binary(name, label)


def _as(label: Tensor, logits: Tensor) -> Tensor:
    return label.to(upcast(logits).dtype)


def _softplus(x: Tensor) -> Tensor:
    # F.softplus becomes linear above 20, an error of 2e-9; this form is exact to rounding everywhere.
    return -F.logsigmoid(-x)


def _log_softplus(x: Tensor) -> Tensor:
    # softplus underflows long before its logarithm, which is x - e^x / 2 + O(e^2x).
    low = -15.0
    return torch.where(x < low, x - 0.5 * x.clamp_max(low).exp(), _softplus(x.clamp_min(low)).log())


def _cross_entropy(x: Tensor, target: Tensor) -> Tensor:
    return target * _softplus(-x) + (1 - target) * _softplus(x)
