"""The mathematics of ADNCE: weights, losses, KL-DRO, and bounds on divergences."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_losses._checks import (
    check_choice,
    check_finite,
    check_positive,
    check_reduction,
    check_scores,
    reduce,
    upcast,
)
from recsys_losses._distributed import Shard, current_shard, gather_rows
from recsys_losses.baselines import result_dtype

if TYPE_CHECKING:
    from recsys_losses._checks import Reduction

Variant = Literal["simclr", "graphcl", "simcse"]
Phi = Literal["kl", "chi2", "reverse_kl"]

VARIANTS = ("simclr", "graphcl", "simcse")
PHIS = ("kl", "chi2", "reverse_kl")

# 1 / sigma beyond this changes no weight of float32 similarities, but its square would overflow.
_SHARPEST = 1e18
_MAX_STEPS = 200
# How far one step of the root search may change the temperature: by a factor of about 7.
_LONGEST_STEP = 2.0


class KLDRO(NamedTuple):
    """Worst case of a row of negatives in the penalised KL form; see `kl_dro`.

    Args:
        value: Soft maximum, shape `(A,)`.
        worst_case: Distribution over the negatives, shape `(A, N)`.
        kl: Its KL divergence from the uniform distribution over the row's negatives, shape `(A,)`, >= 0.
    """

    value: Tensor
    worst_case: Tensor
    kl: Tensor


class KLTemperature(NamedTuple):
    """Temperature that belongs to a radius; see `kl_dro_temperature`.

    Args:
        temperature: Optimal multiplier, shape `(A,)`; 0 where the ball holds the distribution on the maximum.
        robust_value: Worst-case expectation in the ball, shape `(A,)`.
        gaussian_approximation: Temperature for a small radius, shape `(A,)`.
    """

    temperature: Tensor
    robust_value: Tensor
    gaussian_approximation: Tensor


class PhiBound(NamedTuple):
    """Lower bound of a divergence; see `phi_divergence_lower_bound`.

    Args:
        value: The bound, shape `()`.
        dual_lambda: The dual variable at its optimum, shape `()`, detached.
    """

    value: Tensor
    dual_lambda: Tensor


def adnce_log_weights(similarity: Tensor, mu: float, sigma: float, mask: Tensor | None = None) -> Tensor:
    r"""Logarithms of the mean-one weights of a row of negatives (Wu et al., 2023, eq. 11).

    $$\log w_j=-\tfrac12\Big(\frac{s_j-\mu}{\sigma}\Big)^2-\log\operatorname*{mean}_k
      \exp\Big(-\tfrac12\Big(\frac{s_k-\mu}{\sigma}\Big)^2\Big)$$

    A large $\sigma$ gives weights of one, a small one puts all weight on the negative nearest to $\mu$, and $\mu$ far
    above the similarities tilts the weights towards the largest. Finite for every $\sigma>0$.

    Args:
        similarity: Raw similarities $s$, not divided by a temperature, shape `(..., N)`, floating, N >= 1.
        mu: $\mu$, the similarity with the largest weight; any finite number, also outside [-1, 1].
        sigma: $\sigma>0$, the width of the bump.
        mask: True marks a valid negative, same shape as `similarity`, boolean. Others are left out of the mean.

    Returns:
        Shape `(..., N)`, detached, in the dtype of `similarity` (half precision is computed in float32); `-inf` where
        `mask` is False.

    Raises:
        ValueError: If a shape or a dtype is wrong, `mu` isn't finite, or `sigma` isn't a positive finite number.

    Examples:
        >>> import torch
        >>> weights = adnce_log_weights(torch.tensor([0.9, 0.5, -0.3]), mu=0.5, sigma=0.4).exp()
        >>> weights, weights.mean()
        (tensor([1.0446, 1.7223, 0.2331]), tensor(1.))
    """
    _check_bump(mu, sigma)
    dtype = result_dtype(similarity=similarity)
    if similarity.ndim == 0 or similarity.shape[-1] == 0:
        raise ValueError(f"similarity must have shape (..., N) with N >= 1, got {tuple(similarity.shape)}")
    count: int | Tensor = similarity.shape[-1]
    buffer = upcast(similarity.detach()).clone()
    if mask is not None:
        _check_mask(mask, similarity)
        buffer = buffer.masked_fill_(~mask, -torch.inf)
        count = mask.sum(-1)
    weights, log_mean = _bump_(buffer, mu, sigma, count)
    return weights.sub_(log_mean.unsqueeze(-1)).to(dtype)


def adnce_from_similarity(
    pos_sim: Tensor,
    neg_sim: Tensor,
    *,
    temperature: float,
    mu: float | None = None,
    sigma: float | None = None,
    mask: Tensor | None = None,
    include_positive: bool = True,
    average_negatives: bool = False,
    validate: bool | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""ADNCE of similarities that are already computed, for any choice of negatives (Wu et al., 2023, eq. 11 and 12).

    $$\ell_a=-\frac{s_a^+}{\tau}+\log\Big([e^{s_a^+/\tau}]+\Big[\tfrac1N\Big]\sum_{j=1}^{N}w_{aj}e^{s_{aj}/\tau}\Big)$$

    The weights carry no gradient: that of a similarity is its weighted softmax share. The two brackets are the
    options `include_positive` and `average_negatives`; the variants of `adnce_loss` set them.

    Args:
        pos_sim: Similarities of the positives, shape `(A,)`, floating; not divided by the temperature.
        neg_sim: Similarities of the negatives, shape `(A, N)`.
        temperature: $\tau>0$.
        mu: $\mu$ of `adnce_log_weights`; without `mu` and `sigma` the weights are one, which is InfoNCE.
        sigma: $\sigma>0$ of `adnce_log_weights`.
        mask: True marks a valid negative, shape `(A, N)`, boolean; N in the formula is the number of those. A row
            without any has loss 0 if the positive is included; if it isn't, the row has no loss and is an error.
        include_positive: True puts the positive into the denominator (loss >= 0).
        average_negatives: True takes the mean over the negatives, False their sum.
        validate: Whether to look for rows without a negative. None looks at CPU tensors and not at others, where it
            would wait for the device; True always looks; False never does, which `torch.vmap` needs. A row that slips
            through has loss `-inf`. Under `torch.compile` nothing is looked at.
        reduction: `"none"` gives shape `(A,)`, `"mean"` and `"sum"` a scalar.

    Returns:
        The loss in the promoted dtype of the similarities; half precision is computed in float32.

    Raises:
        ValueError: If the shapes don't fit, A or N is 0, a dtype is wrong, only one of `mu` and `sigma` is given,
            `temperature` or `sigma` isn't a positive finite number, `mu` isn't finite, a row has no valid negative
            while `include_positive` is False, or `reduction` is unknown.

    Examples:
        >>> import torch
        >>> pos, neg = torch.tensor([0.9]), torch.tensor([[0.9, 0.4, -0.2]])
        >>> adnce_from_similarity(pos, neg, temperature=0.5)
        tensor(0.9077)
        >>> adnce_from_similarity(pos, neg, temperature=0.5, mu=0.4, sigma=0.3)  # the hard negative counts less
        tensor(0.8628)
    """
    _check_options(temperature, mu, sigma)
    check_reduction(reduction)
    check_scores(pos_sim, neg_sim)
    dtype = result_dtype(pos_sim=pos_sim, neg_sim=neg_sim)
    count: int | Tensor = neg_sim.shape[1]
    logits = upcast(neg_sim) / temperature
    empty = None
    if mask is not None:
        _check_mask(mask, neg_sim)
        if not include_positive:
            _check_some_valid(mask, validate)
        logits = logits.masked_fill(~mask, -torch.inf)
        count = mask.sum(1)
        empty = count == 0
    shift = _shift_(logits, temperature, mu, sigma, count, average_negatives=average_negatives)
    total = _log_sum(logits, empty) - shift
    return reduce(_row_loss(upcast(pos_sim) / temperature, total, include_positive=include_positive), reduction, dtype)


def adnce_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float = 0.5,
    mu: float | None = None,
    sigma: float | None = None,
    variant: Variant = "simclr",
    reduction: Reduction = "mean",
    gather: bool = False,
) -> Tensor:
    r"""ADNCE of the embeddings of two views, with the rest of the batch as negatives (Wu et al., 2023, eq. 11 and 12).

    Rows are normalised inside, so similarities are cosines. The denominators of the authors' three projects differ:

    | variant | anchors | negatives | loss of an anchor |
    |---|---|---|---|
    | `"simclr"` (images) | both views, 2B | the 2B - 2 others of both views | $-\log\frac{e^{s^+/\tau}}{e^{s^+/\tau}+\sum_jw_je^{s_j/\tau}}$ |
    | `"graphcl"` (graphs) | view 1, B | the B - 1 others of view 2 | $-\frac{s^+}{\tau}+\log\operatorname*{mean}_jw_je^{s_j/\tau}$ |
    | `"simcse"` (sentences, SGL) | view 1, B | all B of view 2, the own one too | $-\frac{s^+}{\tau}+\log\sum_jw_je^{s_j/\tau}$ |

    `"graphcl"` has no positive in the denominator and a mean instead of a sum, so its loss may be negative. `"simcse"`
    weighs the positive in the denominator as well, so with `mu` its loss may be negative too. With `mu=None` it is the
    InfoNCE of SimCSE and SGL.

    One matrix product and no copy of the similarity matrix beside the log-weights.

    Args:
        z1: Embeddings of view 1 (images, sentences, graphs, users, items), shape `(B, d)`, floating. A zero row has
            similarity 0.
        z2: Embeddings of view 2, same shape; row b belongs to row b of `z1`.
        temperature: $\tau>0$. It matters more than `mu` and `sigma`; more false negatives need a lower one.
        mu: $\mu$, the similarity of the negatives with the largest weight, usually 0.1 to 0.9. Without `mu` and
            `sigma` the weights are one: InfoNCE.
        sigma: $\sigma>0$, the width of the bump; 1 is a good start, below 0.3 hurts.
        variant: `"simclr"`, `"graphcl"` or `"simcse"`.
        reduction: `"none"` gives one loss per anchor (`"simclr"`: view 1, then view 2), `"mean"` and `"sum"` a scalar.
        gather: True takes the negatives from all processes of `torch.distributed`, which must have batches of the same
            size. The anchors stay those of this process, and so does the result: the loss of the whole batch is the
            mean over processes. Gradients flow back to the embeddings of every process, so that averaging over
            processes, as DistributedDataParallel does, gives the gradient of the whole batch's mean.

    Returns:
        The loss in the promoted dtype of the embeddings; half precision is computed in float32.

    Raises:
        ValueError: If the shapes differ, the batch has no negatives (B < 2; B < 1 for `"simcse"`), a dtype is wrong,
            only one of `mu` and `sigma` is given, `temperature` or `sigma` isn't a positive finite number, `mu` isn't
            finite, or `variant` or `reduction` is unknown.

    Examples:
        >>> import torch
        >>> z1, z2 = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.2], [0.6, 1.0]])
        >>> adnce_loss(z1, z2, temperature=0.5)
        tensor(0.5355)
        >>> adnce_loss(z1, z2, temperature=0.5, mu=0.2, sigma=0.5)  # less weight on the hardest negatives
        tensor(0.5203)
        >>> adnce_loss(z1, z2, temperature=0.5, mu=0.2, sigma=0.5, variant="graphcl")
        tensor(-1.1275)
    """
    _check_options(temperature, mu, sigma)
    check_choice("variant", variant, VARIANTS)
    check_reduction(reduction)
    shard = current_shard() if gather else Shard()
    _check_views(z1, z2, shard.world, least=1 if variant == "simcse" else 2)
    dtype = result_dtype(z1=z1, z2=z2)
    first, second = (F.normalize(upcast(z.to(dtype)), dim=-1) for z in (z1, z2))
    batch, total_rows = z1.shape[0], z1.shape[0] * shard.world
    pos = (first * second).sum(-1) / temperature
    columns = gather_rows(second, total_rows, shard)
    if variant == "simclr":
        columns = torch.cat([gather_rows(first, total_rows, shard), columns])
        anchors = torch.cat([first, second]) / temperature
        pos = torch.cat([pos, pos])
    else:
        anchors = first / temperature
    logits = upcast(anchors @ columns.T)
    count = columns.shape[0]
    if variant != "simcse":
        # The anchor itself and its positive: with -inf their share of the softmax, which is the gradient, is 0 by
        # itself. Recorded by autograd each of these writes would copy the matrix in the backward pass.
        hidden = logits.detach().view(-1, batch, count // total_rows, total_rows)
        own = hidden[..., shard.rank * batch : (shard.rank + 1) * batch]
        own.diagonal(dim1=1, dim2=3).fill_(-torch.inf)
        count -= own.shape[2]
    shift = _shift_(logits, temperature, mu, sigma, count, average_negatives=variant == "graphcl")
    total = logits.logsumexp(1) - shift
    return reduce(_row_loss(pos, total, include_positive=variant == "simclr"), reduction, dtype)


def info_nce_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float = 0.5,
    variant: Variant = "simclr",
    reduction: Reduction = "mean",
    gather: bool = False,
) -> Tensor:
    r"""InfoNCE: `adnce_loss` with all weights one (Wu et al., 2023, eq. 1).

    $$\ell=-\frac{s^+}{\tau}+\log\Big([e^{s^+/\tau}]+\sum_je^{s_j/\tau}\Big)$$

    Args:
        z1: As in `adnce_loss`.
        z2: As in `adnce_loss`.
        temperature: $\tau>0$.
        variant: Which denominator, as in `adnce_loss`.
        reduction: As in `adnce_loss`.
        gather: As in `adnce_loss`.

    Returns:
        As `adnce_loss`.

    Raises:
        ValueError: As `adnce_loss`.

    Examples:
        >>> import torch
        >>> info_nce_loss(torch.ones(4, 2), torch.ones(4, 2))  # all similarities equal: log 7
        tensor(1.9459)
    """
    return adnce_loss(z1, z2, temperature=temperature, variant=variant, reduction=reduction, gather=gather)


def kl_dro(neg_sim: Tensor, temperature: float, mask: Tensor | None = None) -> KLDRO:
    r"""Worst case of each row of negatives over all distributions, with a KL penalty (Wu et al., 2023, theorem 3.2).

    $$\max_Q\,\mathbb{E}_Q[f]-\tau\,\mathrm{KL}(Q\Vert Q_0)=\tau\log\mathbb{E}_{Q_0}e^{f/\tau},\qquad
      Q^*\propto Q_0\,e^{f/\tau}$$

    $Q_0$ is uniform over the row. The value lies between the mean and the maximum and falls with $\tau$; its gradient is
    $Q^*$. InfoNCE with the mean over negatives and without the positive in the denominator is the value minus the
    positive similarity, divided by $\tau$: the distribution that it trains against is $Q^*$, and `kl` is the radius of
    the ball.

    Args:
        neg_sim: Similarities $f$ of the negatives, shape `(A, N)`, floating, A, N >= 1.
        temperature: $\tau>0$.
        mask: True marks a valid negative, shape `(A, N)`, boolean. On CPU tensors a row without any is an error, on
            others it isn't looked for and gives no number.

    Returns:
        `KLDRO(value, worst_case, kl)`, differentiable, in the dtype of `neg_sim`; half precision is computed in
        float32.

    Raises:
        ValueError: If a shape or a dtype is wrong, a row has no valid negative, or `temperature` isn't a positive
            finite number.

    Examples:
        >>> import torch
        >>> value, worst_case, kl = kl_dro(torch.tensor([[0.9, 0.1, -0.4]]), temperature=0.5)
        >>> value, worst_case, kl
        (tensor([0.4726]), tensor([[0.7836, 0.1582, 0.0582]]), tensor([0.4503]))
    """
    check_positive("temperature", temperature)
    _check_rows(neg_sim)
    dtype = result_dtype(neg_sim=neg_sim)
    similarity = upcast(neg_sim)
    if mask is not None:
        _check_mask(mask, neg_sim)
        _check_some_valid(mask, None)
        similarity = similarity.masked_fill(~mask, -torch.inf)
    peak = similarity.detach().amax(1, keepdim=True)
    below = (similarity - peak) / temperature
    worst_case = below.softmax(1)
    log_mean = _log_mean_exp(below, mask)
    # Where the share underflows to 0, its logarithm may be -inf.
    tilt = (worst_case * torch.where(worst_case > 0, below, 0.0)).sum(1)
    value = peak.squeeze(1) + temperature * log_mean
    return KLDRO(value.to(dtype), worst_case.to(dtype), (tilt - log_mean).to(dtype))


def kl_dro_temperature(neg_sim: Tensor, eta: float, *, tol: float = 1e-10) -> KLTemperature:
    r"""Temperature that belongs to a KL ball of radius $\eta$ around the uniform distribution of each row.

    $$\max_{\mathrm{KL}(Q\Vert Q_0)\le\eta}\mathbb{E}_Q[f]
      =\min_{\alpha\ge0}\ \alpha\eta+\alpha\log\mathbb{E}_{Q_0}e^{f/\alpha},\qquad
      \tau^*\approx\sqrt{\frac{\operatorname{Var}_{Q_0}f}{2\eta}}\ \text{for small }\eta$$

    The optimal $\alpha=\tau^*$ is where the KL divergence of the worst case is $\eta$ (`kl_dro` gives the way back). A
    ball that holds the uniform distribution on the m maximal negatives, $\eta\ge\log(N/m)$, has temperature 0 and the
    maximum as value. Computed in float64 for all rows together: Newton steps in $\log\tau$ inside a bracket. Waits for
    the device.

    Args:
        neg_sim: Similarities $f$ of the negatives, shape `(A, N)`, floating, A, N >= 1.
        eta: $\eta>0$, the radius in nats.
        tol: Relative tolerance of the temperature, > 0.

    Returns:
        `KLTemperature(temperature, robust_value, gaussian_approximation)`, each `(A,)`, in the dtype of `neg_sim`.
        Only `robust_value` carries a gradient, the worst-case distribution.

    Raises:
        ValueError: If a shape or a dtype is wrong, a similarity isn't finite, or `eta` or `tol` isn't a positive
            finite number.

    Reference: Wu et al., 2023, theorem 3.2 and corollary 3.4.

    Examples:
        >>> import torch
        >>> negatives = torch.tensor([[0.9, 0.1, -0.4]])
        >>> tau, value, gaussian = kl_dro_temperature(negatives, eta=0.45)
        >>> tau, value, gaussian
        (tensor([0.5002]), tensor([0.6976]), tensor([0.5644]))
        >>> kl_dro(negatives, float(tau)).kl
        tensor([0.4500])
    """
    check_positive("eta", eta)
    check_positive("tol", tol)
    _check_rows(neg_sim)
    dtype = result_dtype(neg_sim=neg_sim)
    similarity = neg_sim.double()
    if not bool(similarity.isfinite().all()):
        raise ValueError("neg_sim must be finite")
    values = similarity.detach()
    peak = values.amax(1, keepdim=True)
    degenerate = eta >= (similarity.shape[1] / (values == peak).sum(1).double()).log()
    solved = (~degenerate).nonzero().squeeze(1)
    below = (values - peak)[solved]
    spread = -below.amin(1)
    temperature = torch.zeros_like(peak.squeeze(1))
    if len(solved):
        temperature[solved] = spread * _scaled_temperature(below / spread.unsqueeze(1), eta, tol)
    safe = torch.where(degenerate, 1.0, temperature).unsqueeze(1)
    soft = peak + safe * (_log_mean_exp((similarity - peak) / safe, None).unsqueeze(1) + eta)
    robust = torch.where(degenerate, similarity.amax(1), soft.squeeze(1))
    gaussian = values.std(1, correction=0) / math.sqrt(2 * eta)
    return KLTemperature(temperature.to(dtype), robust.to(dtype), gaussian.to(dtype))


def phi_divergence_lower_bound(pos_score: Tensor, neg_score: Tensor, phi: Phi = "kl") -> PhiBound:
    r"""Lower bound of a $\phi$-divergence from scores of samples of two distributions (Wu et al., 2023, theorem 4.2).

    $$D_\phi(P\Vert Q)\ \ge\ \mathbb{E}_P[f]-\min_\lambda\big\{\lambda+\mathbb{E}_Q[\phi^*(f-\lambda)]\big\}$$

    | `phi` | $\phi(t)$ | $\phi^*(s)$ | $\lambda^*$ |
    |---|---|---|---|
    | `"kl"` | $t\log t$ | $e^{s-1}$ | $\log\mathbb{E}_Qe^f-1$ (Donsker-Varadhan) |
    | `"chi2"` | $(t-1)^2$ | $s+s^2/4$ for $s\ge-2$, $-1$ below | $\mathbb{E}_Q(f-\lambda+2)_+=2$, found by sorting |
    | `"reverse_kl"` | $-\log t$ | $-1-\log(-s)$, $s<0$ | $\mathbb{E}_Q\frac{1}{\lambda-f}=1$, by Newton's method |

    Equality holds for the best $f$: $\log\frac{dP}{dQ}$ for KL, $2\frac{dP}{dQ}$ for chi-squared and
    $-\frac{dQ}{dP}$ for reverse KL, each up to a constant. Computed in float64; `"reverse_kl"` waits for the device.

    Args:
        pos_score: Scores $f$ of samples of P, shape `(n,)`, floating, n >= 1.
        neg_score: Scores $f$ of samples of Q, shape `(m,)`, m >= 1.
        phi: `"kl"`, `"chi2"` or `"reverse_kl"`.

    Returns:
        `PhiBound(value, dual_lambda)` in the promoted dtype of the scores. The value is differentiable; as $\lambda^*$
        is a minimum, it carries no gradient (envelope theorem).

    Raises:
        ValueError: If a shape or a dtype is wrong, or `phi` is unknown.

    Examples:
        >>> import torch
        >>> phi_divergence_lower_bound(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]), "kl")
        PhiBound(value=tensor(1.5000), dual_lambda=tensor(-1.))
    """
    check_choice("phi", phi, PHIS)
    for name, scores in (("pos_score", pos_score), ("neg_score", neg_score)):
        if scores.ndim != 1 or scores.shape[0] == 0:
            raise ValueError(f"{name} must have shape (n,) with n >= 1, got {tuple(scores.shape)}")
    dtype = result_dtype(pos_score=pos_score, neg_score=neg_score)
    bound = {"kl": _kl_dual, "chi2": _chi2_dual, "reverse_kl": _reverse_kl_dual}[phi]
    dual, dual_lambda = bound(neg_score.double())
    return PhiBound((pos_score.double().mean() - dual).to(dtype), dual_lambda.to(dtype))


class ADNCELoss(nn.Module):
    r"""Module form of `adnce_loss`.

    Args:
        temperature: $\tau>0$.
        mu: $\mu$ of the weights; without `mu` and `sigma` it is InfoNCE.
        sigma: $\sigma>0$ of the weights.
        variant: `"simclr"`, `"graphcl"` or `"simcse"`.
        reduction: `"none"`, `"mean"` or `"sum"`.
        gather: Whether negatives come from all processes.

    Raises:
        ValueError: If an option is out of range.

    Examples:
        >>> import torch
        >>> loss = ADNCELoss(temperature=0.5, mu=0.7, sigma=1.0)
        >>> loss(torch.ones(4, 2), torch.ones(4, 2))
        tensor(1.9459)
    """

    def __init__(
        self,
        temperature: float = 0.5,
        mu: float | None = None,
        sigma: float | None = None,
        variant: Variant = "simclr",
        *,
        reduction: Reduction = "mean",
        gather: bool = False,
    ) -> None:
        super().__init__()
        _check_options(temperature, mu, sigma)
        check_choice("variant", variant, VARIANTS)
        check_reduction(reduction)
        self.temperature = temperature
        self.mu = mu
        self.sigma = sigma
        self.variant = variant
        self.reduction = reduction
        self.gather = gather

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        return adnce_loss(
            z1,
            z2,
            temperature=self.temperature,
            mu=self.mu,
            sigma=self.sigma,
            variant=self.variant,
            reduction=self.reduction,
            gather=self.gather,
        )

    def extra_repr(self) -> str:
        options = f"temperature={self.temperature}, mu={self.mu}, sigma={self.sigma}, variant={self.variant!r}"
        return f"{options}, reduction={self.reduction!r}, gather={self.gather}"


def _bump_(similarity: Tensor, mu: float, sigma: float, count: int | Tensor) -> tuple[Tensor, Tensor]:
    """Overwrite similarities (..., N) by log-weights whose largest is 0; return them and the log of their mean (...,)."""
    sharpness = min(1.0 / sigma, _SHARPEST)
    distance = similarity.sub_(mu)
    distance = distance.mul_(distance)
    nearest = distance.amin(-1, keepdim=True)
    nearest = torch.where(nearest.isinf(), 0.0, nearest)  # a row without a valid negative
    weights = distance.sub_(nearest).mul_(-0.5 * sharpness**2)
    total = weights.logsumexp(-1)
    log_count = math.log(count) if isinstance(count, int) else count.to(total.dtype).log()
    return weights, torch.where(total.isinf(), 0.0, total) - log_count


@torch.no_grad()
def _shift_(
    logits: Tensor,
    temperature: float,
    mu: float | None,
    sigma: float | None,
    count: int | Tensor,
    *,
    average_negatives: bool,
) -> Tensor | float:
    """Add the log-weights to the logits (A, N), in place, and return what to subtract from their log-sum-exp.

    The weights are constants for the gradient, so autograd needn't know, and no second matrix is kept for it.
    """
    shift: Tensor | float = 0.0
    if mu is not None and sigma is not None:
        weights, shift = _bump_(logits.detach() * temperature, mu, sigma, count)
        logits.detach().add_(weights)
    if average_negatives:
        shift = shift + (math.log(count) if isinstance(count, int) else count.to(logits.dtype).log())
    return shift


def _log_sum(logits: Tensor, empty: Tensor | None) -> Tensor:
    """Return the log-sum-exp of the rows; `empty` rows give -inf and the gradient 0 instead of NaN."""
    if empty is None:
        return logits.logsumexp(1)
    total = logits.masked_fill(empty.unsqueeze(1), 0.0).logsumexp(1)
    return total.masked_fill(empty, -torch.inf)


def _row_loss(pos: Tensor, total: Tensor, *, include_positive: bool) -> Tensor:
    return -F.logsigmoid(pos - total) if include_positive else total - pos


def _log_mean_exp(below: Tensor, mask: Tensor | None) -> Tensor:
    """Return the log of the mean exponential of the rows (A, N), whose largest valid element is 0."""
    count = below.shape[1] if mask is None else mask.sum(1)
    mean = below.exp().sum(1) / count
    gaps = below.expm1()
    mean_m1 = (gaps if mask is None else gaps.masked_fill(~mask, 0.0)).sum(1) / count
    # Values close together, as with a large temperature, need log1p; values far apart would lose digits in it.
    return torch.where(mean_m1 > -0.5, mean_m1.clamp_min(-0.5).log1p(), mean.log())


@torch.no_grad()
def _scaled_temperature(scaled: Tensor, eta: float, tol: float) -> Tensor:
    """Return the temperatures (A,) of rows (A, N) of values from -1 to 0, the largest 0 and less frequent than e^-eta."""
    log_tau = scaled.std(1, correction=0).log() - 0.5 * math.log(2 * eta)  # the Gaussian approximation
    low, high = torch.full_like(log_tau, -torch.inf), torch.full_like(log_tau, torch.inf)
    for _ in range(_MAX_STEPS):
        inverse = (-log_tau).exp().unsqueeze(1)
        tilted = inverse * scaled
        share = tilted.softmax(1)
        mean = (share * tilted).sum(1)
        slope = -(share * (tilted - mean.unsqueeze(1)).square()).sum(1)
        excess = mean - _log_mean_exp(tilted, None) - eta
        low = torch.where(excess > 0, log_tau, low)
        high = torch.where(excess > 0, high, log_tau)
        newton = log_tau + (-excess / slope).clamp(-_LONGEST_STEP, _LONGEST_STEP)
        bracketed = low.isfinite() & high.isfinite()
        outside = log_tau + torch.where(excess > 0, _LONGEST_STEP, -_LONGEST_STEP)
        middle = torch.where(bracketed, (low + high) / 2, outside)
        accepted = ((newton > low) & (newton < high)) | ((newton - log_tau).abs() <= tol)
        following = torch.where(accepted, newton, middle)
        moved = (following - log_tau).abs()
        log_tau = following
        if bool((moved <= tol).all()):
            break
    return log_tau.exp()


def _kl_dual(scores: Tensor) -> tuple[Tensor, Tensor]:
    dual = scores.logsumexp(0) - math.log(len(scores))
    return dual, dual.detach() - 1


def _chi2_dual(scores: Tensor) -> tuple[Tensor, Tensor]:
    """With c = lambda - 2 the condition is sum (f - c)_+ = 2 m, the threshold of a projection on a simplex."""
    ordered = scores.detach().sort(descending=True).values
    active = torch.arange(1, len(scores) + 1, dtype=scores.dtype, device=scores.device)
    below = ordered - ordered[0]  # so that a common offset of the scores costs no digits in the partial sums
    dual_lambda = ordered[0] + ((below.cumsum(0) - 2 * len(scores)) / active).amax() + 2
    half = (1 + (scores - dual_lambda) / 2).clamp_min(0)  # phi* = half^2 - 1
    return dual_lambda - 1 + half.square().mean(), dual_lambda


def _reverse_kl_dual(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Solve mean 1 / (gap + below) = 1 for the gap between lambda and the largest score, which is in (0, 1]."""
    values = scores.detach()
    peak = values.amax()
    below = peak - values
    # The left end of the root: a convex falling function, so Newton's steps from there approach it from one side.
    gap = (below == 0).sum().double() / len(values)
    for _ in range(_MAX_STEPS):
        inverse = 1 / (gap + below)
        step = (inverse.mean() - 1) / inverse.square().mean()
        gap = gap + step
        if bool(step <= 1e-15 * gap):
            break
    dual = peak + gap - 1 - (gap + (peak - scores)).log().mean()
    return dual, peak + gap


def _check_bump(mu: float, sigma: float) -> None:
    check_finite("mu", mu)
    check_positive("sigma", sigma)


def _check_options(temperature: float, mu: float | None, sigma: float | None) -> None:
    check_positive("temperature", temperature)
    if (mu is None) != (sigma is None):
        raise ValueError(f"mu and sigma must be given together or not at all, got mu={mu!r} and sigma={sigma!r}")
    if mu is not None and sigma is not None:
        _check_bump(mu, sigma)


def _check_views(z1: Tensor, z2: Tensor, world: int, *, least: int) -> None:
    if z1.ndim != 2 or z1.shape != z2.shape or z1.shape[1] == 0:
        shapes = f"{tuple(z1.shape)} and {tuple(z2.shape)}"
        raise ValueError(f"z1 and z2 must have the same shape (B, d) with d >= 1, got {shapes}")
    if z1.shape[0] == 0 or z1.shape[0] * world < least:
        needed = "at least one row is" if least == 1 else "at least two rows are"
        raise ValueError(f"batch of {z1.shape[0]}: {needed} needed in z1 and z2")


def _check_rows(neg_sim: Tensor) -> None:
    if neg_sim.ndim != 2 or 0 in neg_sim.shape:
        raise ValueError(f"neg_sim must have shape (A, N) with A, N >= 1, got {tuple(neg_sim.shape)}")


def _check_mask(mask: Tensor, similarity: Tensor) -> None:
    if mask.shape != similarity.shape:
        raise ValueError(
            f"mask must have the shape of the similarities {tuple(similarity.shape)}, got {tuple(mask.shape)}"
        )
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean (True = valid negative), got dtype {mask.dtype}")


def _check_some_valid(mask: Tensor, validate: bool | None) -> None:
    if torch.compiler.is_compiling() or not (mask.device.type == "cpu" if validate is None else validate):
        return
    empty = ~mask.any(1)
    if bool(empty.any()):
        row = int(empty.nonzero()[0])
        raise ValueError(f"row {row} has no valid negative: mask is False in all {mask.shape[1]} columns")
