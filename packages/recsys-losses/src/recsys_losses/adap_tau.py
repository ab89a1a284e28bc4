r"""Adap-tau: a softmax temperature that is computed instead of searched, globally and per user.

With cosine scores the temperature decides the result, and its best value depends on the data, the model and the stage
of training. Adap-tau sets the global inverse temperature $w_0=1/\tau_0$ once per epoch so that the observed pairs hold
half of the softmax mass, and bends it per user by the user's loss $l_u$ of the last epoch, centred at $c$:

$$w_0=\frac{\log\tfrac12+\log(U'I)-\log|D'|}{\mu_{pos}-\mu_{all}},\qquad
w_u=w_0\exp\!\big(-W\big(\mathrm{clip}((l_u-c)/\beta,\,-1/e,\,1000)\big)\big),$$

$$L_b=-w_0 f(u_b,i_b)+\log\sum_j\exp\big(w_{u_b}f(u_b,j)\big).$$

$f$ is the cosine, $W$ the Lambert function, $U'$ and $D'$ the users above the 0.2-quantile of the degrees and their
pairs. Both temperatures are constants for the gradient. This is the form of the authors' code, not of the paper's
pseudo-code, which uses $w_u$ on both sides, puts the positive into the denominator and halves $\beta$.

Jiawei Chen, Junkang Wu, Jiancan Wu, Xuezhi Cao, Sheng Zhou, Xiangnan He. Adap-tau: Adaptively Modulating Embedding
Magnitude for Recommendation. WWW 2023. arXiv 2302.04775. See docs/papers/recsys-losses/adap_tau.md.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_losses._checks import check_choice, check_positive, check_reduction, check_scores, reduce, upcast
from recsys_losses._interactions import check_edges

if TYPE_CHECKING:
    from recsys_losses._checks import Reduction

__all__ = [
    "AdaptiveTemperature",
    "adap_tau_loss",
    "estimate_inverse_temperature",
    "lambertw0",
    "unit_temperature_loss",
    "user_inverse_temperature",
    "warmup_inverse_temperature",
]

CENTERS = ("mean", "quantile")

# What the authors' model holds before its first epoch: a temperature of 0.1.
START_INVERSE_TEMPERATURE = 10.0

# The float64 nearest to 1/e and what it lacks: x + 1/e loses no digits when the two parts are added one by one.
_INV_E = 0.36787944117144233
_INV_E_REST = -1.2428753672788363e-17
_MAX_Z = 1000.0
_CHUNK_EDGES = 65_536


def adap_tau_loss(
    pos_score: Tensor,
    neg_scores: Tensor,
    inv_tau_neg: Tensor | float,
    *,
    inv_tau_pos: float | Tensor,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Softmax loss with a global inverse temperature for positives and one per user for negatives (official code).

    $$L_b=-w_0 f_b^{+}+\log\sum_{j=1}^{N}\exp(w_b f_{bj})$$

    The positive isn't in the denominator. Both inverse temperatures are detached. The paper's appendix D writes another
    loss ($w_u$ on both sides, positive in the denominator); the authors' code and this function don't.

    Args:
        pos_score: Cosines of the observed pairs, shape `(B,)`, floating.
        neg_scores: Cosines of the sampled pairs, shape `(B, N)`, same dtype and device.
        inv_tau_neg: $w_b\ge0$ per row, shape `(B,)`, or one number for all rows. Detached.
        inv_tau_pos: $w_0\ge0$, a number or a tensor with shape `()`. Detached.
        reduction: `"none"` gives shape `(B,)`, `"mean"` and `"sum"` a scalar.

    Returns:
        Loss in the dtype of `pos_score`; half-precision inputs are reduced in float32.

    Raises:
        ValueError: If a shape doesn't match, a temperature number is negative or not finite, or `reduction` is
            unknown.

    Examples:
        >>> import torch
        >>> adap_tau_loss(torch.tensor([1.0]), torch.tensor([[1.0, 1.0]]), torch.tensor([3.0]), inv_tau_pos=2.0)
        tensor(1.6931)
    """
    check_scores(pos_score, neg_scores)
    check_reduction(reduction)
    rows = pos_score.shape[0]
    inv_tau_neg = _constant("inv_tau_neg", inv_tau_neg, shapes=((), (rows,)))
    inv_tau_pos = _constant("inv_tau_pos", inv_tau_pos, shapes=((),))
    loss = _row_loss(upcast(pos_score), upcast(neg_scores), inv_tau_pos, inv_tau_neg)
    return reduce(loss, reduction, pos_score.dtype)


def unit_temperature_loss(pos_score: Tensor, neg_scores: Tensor) -> Tensor:
    r"""Row losses at temperature 1, the measure of how hard a user is (official code; l(u) of the paper's Eq. 15).

    $$l_b=-f_b^{+}+\log\sum_{j=1}^{N}\exp(f_{bj})$$

    Args:
        pos_score: Cosines of the observed pairs, shape `(B,)`, floating.
        neg_scores: Cosines of the sampled pairs, shape `(B, N)`, same dtype and device.

    Returns:
        Detached losses, shape `(B,)`, dtype of `pos_score`.

    Raises:
        ValueError: If a shape doesn't match.

    Examples:
        >>> import torch
        >>> unit_temperature_loss(torch.tensor([0.5]), torch.tensor([[0.5, 0.5]]))
        tensor([0.6931])
    """
    check_scores(pos_score, neg_scores)
    loss = _row_loss(upcast(pos_score.detach()), upcast(neg_scores.detach()), 1.0, 1.0)
    return loss.to(pos_score.dtype)


def lambertw0(x: Tensor) -> Tensor:
    r"""Principal branch of the Lambert function: the $w\ge-1$ with $w e^w=x$.

    A series in $\sqrt{2(ex+1)}$ next to the branch point, Halley's iteration elsewhere; exact to the last digits of
    float64, in which it always computes. Not differentiable here: the input is detached, because $W'$ is infinite at
    $-1/e$ and Adap-tau takes temperatures as constants.

    Args:
        x: Any shape, floating. Values below $-1/e$ give -1.

    Returns:
        Detached tensor like `x`. NaN stays NaN.

    Raises:
        ValueError: If `x` isn't floating.

    Examples:
        >>> import math, torch
        >>> lambertw0(torch.tensor([-1 / math.e, 0.0, math.e], dtype=torch.float64))
        tensor([-1.,  0.,  1.], dtype=torch.float64)
    """
    if not x.is_floating_point():
        raise ValueError(f"x must be a floating tensor, got {x.dtype}")
    value = x.detach().double()
    squared = 2.0 * math.e * ((value + _INV_E) + _INV_E_REST)
    p = squared.clamp(min=0.0).sqrt()
    series = -1.0 + p * (1.0 + p * (-1 / 3 + p * (11 / 72 + p * (-43 / 540 + p * 769 / 17280))))
    # Iacono and Boyd's start, within 2 % everywhere right of -0.2; three cubic steps are enough, one is spare.
    log = value.clamp(min=-0.3).log1p()
    w = torch.where(value < -0.2, series, log * (1.0 - log.log1p() / (2.0 + log)))
    for _ in range(4):
        exp = w.exp()
        error = w * exp - value
        w = w - error / (exp * (w + 1.0) - (w + 2.0) * error / (2.0 * w + 2.0))
    # Near the branch point the iteration divides rounding errors by w + 1; there the series is exact.
    w = torch.where(p < 0.01, series, w)
    return torch.where(value.isposinf(), value, w).to(x.dtype)


def user_inverse_temperature(
    user_loss: Tensor,
    *,
    inv_tau0: float,
    beta: float = 1.0,
    center: str = "mean",
    quantile: float | None = None,
) -> Tensor:
    r"""Inverse temperature per user from the user's mean loss (official code; Eq. 15-16 with $\beta$ halved).

    $$w_u=w_0\exp\big(-W(z_u)\big),\qquad z_u=\mathrm{clip}\big((l_u-c)/\beta,\,-1/e,\,1000\big)$$

    A user whose loss is above the centre gets a softer softmax ($w_u<w_0$), one below it a sharper one, up to
    $e\,w_0$. The paper's $\beta$ is half of this one.

    Args:
        user_loss: Mean unit-temperature loss of each user, shape `(U,)`, floating. Waits for the device once.
        inv_tau0: Global $w_0>0$.
        beta: $\beta>0$; large values give every user $w_0$.
        center: `"mean"` of `user_loss`, or its `"quantile"`.
        quantile: Which quantile in [0, 1]; needed with `center="quantile"`, ignored otherwise.

    Returns:
        Detached $w_u$ in $(0, e\,w_0]$, shape `(U,)`, dtype of `user_loss`.

    Raises:
        ValueError: If `user_loss` isn't a non-empty finite vector, `inv_tau0` or `beta` isn't positive, `center` is
            unknown, or `quantile` is missing or outside [0, 1].

    Examples:
        >>> import torch
        >>> user_inverse_temperature(torch.tensor([6.0, 7.0, 8.0]), inv_tau0=10.0)
        tensor([27.1828, 10.0000,  5.6714])
    """
    if user_loss.ndim != 1 or user_loss.shape[0] == 0 or not user_loss.is_floating_point():
        raise ValueError(f"user_loss must be floating (U,) with U >= 1, got {user_loss.dtype} {tuple(user_loss.shape)}")
    check_positive("inv_tau0", inv_tau0)
    check_positive("beta", beta)
    _check_center(center, quantile)
    loss = user_loss.detach().double()
    if not bool(loss.isfinite().all()):
        raise ValueError("user_loss must be finite, got NaN or infinity; has the training diverged?")
    middle = loss.mean() if quantile is None or center == "mean" else _quantile(loss, quantile)
    z = ((loss - middle) / beta).clamp(max=_MAX_Z)
    return (inv_tau0 * (-lambertw0(z)).exp()).to(user_loss.dtype)


def warmup_inverse_temperature(num_users: int, num_items: int, num_interactions: int, *, gap: float = 0.7) -> float:
    r"""Global inverse temperature while the embeddings mean nothing yet: the score gap is assumed (official code).

    $$w_0=\frac{\log\tfrac12+\log(U'I)-\log|D'|}{\mathrm{gap}}$$

    Args:
        num_users: $U'\ge1$, the users above the degree quantile.
        num_items: $I\ge1$, all items.
        num_interactions: $|D'|\ge1$, the pairs of those users.
        gap: Assumed $\mu_{pos}-\mu_{all}>0$.

    Returns:
        $w_0>0$.

    Raises:
        ValueError: If a number isn't positive, or half or more of all pairs are observed.

    Examples:
        >>> round(warmup_inverse_temperature(1000, 2000, 50_000), 4)
        4.2796
    """
    for name, value in (("num_users", num_users), ("num_items", num_items), ("num_interactions", num_interactions)):
        if not value >= 1:
            raise ValueError(f"{name} must be >= 1, got {value!r}")
    check_positive("gap", gap)
    log_ratio = _log_ratio(num_users, num_items, num_interactions)
    if not log_ratio > 0:
        raise ValueError(
            "less than half of all pairs must be observed: num_users * num_items must be above 2 * num_interactions, "
            f"got {num_users * num_items} and {2 * num_interactions}"
        )
    return log_ratio / gap


def estimate_inverse_temperature(
    user_emb: Tensor, item_emb: Tensor, edge_index: Tensor, *, user_quantile: float = 0.2
) -> float:
    r"""Global inverse temperature from the embeddings (Lemma 3, Eq. 14; the user filter is the official code's).

    $$w_0=\frac{\log\tfrac12+\log(U'I)-\log|D'|}{\mu_{pos}-\mu_{all}}$$

    $\mu_{pos}$ is the mean cosine over the pairs $D'$ of the $U'$ kept users, $\mu_{all}$ over all their pairs with
    all items. Users are kept if their degree is above the `user_quantile` of all degrees. The pairs are gathered in
    chunks, so that the extra memory doesn't grow with their number. Waits for the device.

    Args:
        user_emb: Final (propagated, dropout-free) user table, shape `(U, d)`, floating. Needn't be normalised.
        item_emb: Final item table, shape `(I, d)`.
        edge_index: Train pairs, int64, shape `(2, E)`: users, then items (not offset).
        user_quantile: Quantile of the user degrees in [0, 1).

    Returns:
        $w_0$; negative, as in the official code, if half or more of all pairs are observed.

    Raises:
        ValueError: If a shape, an id or `user_quantile` is out of range, an embedding isn't finite, no user is above
            the degree quantile, or the mean positive score isn't above the mean score.

    Examples:
        >>> import torch
        >>> user, item = torch.eye(3), torch.cat([torch.eye(3), -torch.eye(3)])
        >>> edges = torch.tensor([[0, 1, 1, 2, 2], [0, 1, 2, 0, 2]])
        >>> round(estimate_inverse_temperature(user, item, edges), 4)
        0.8109
    """
    num_users, num_items = _check_tables(user_emb, item_emb)
    _check_pairs(edge_index, num_users, num_items)
    users, edges = _frequent_users(edge_index, num_users, user_quantile)
    if users.shape[0] == 0:
        raise ValueError(f"no user above the degree quantile {user_quantile!r}: all degrees are equal")
    mu_pos, mu_all = _mean_scores(user_emb, item_emb, users, edges)
    if not mu_pos > mu_all:
        raise ValueError(f"mean positive score {mu_pos:.6g} is not above mean score {mu_all:.6g}")
    return _log_ratio(users.shape[0], num_items, edges.shape[1]) / (mu_pos - mu_all)


class AdaptiveTemperature(nn.Module):
    r"""The schedule of Adap-tau: global and per-user inverse temperatures, renewed once per epoch.

    Call `start_epoch` before the first batch of every epoch, take $w_0$ from `inv_tau0` and $w_u$ from
    `temperature(user)`, and show every batch to `observe`. In the first epoch $w_u=w_0$; later it follows from the
    losses of the epoch before. Users without rows in it get $w_0$ and don't count for the centre.

    All state is in buffers, so `state_dict` resumes exactly: `inv_tau0` (shape `()`, float64), `inv_tau` `(U,)`, and
    two `(2, U)` tables of loss sums and row counts, `pending` of this process and `observed` of all of them. Keep the
    module out of a model that is cast to half precision: its sums would be cast as well.

    With `torch.distributed` initialised every rank calls `start_epoch` with the same embeddings; the statistics are
    summed over ranks there. Call `synchronize` on every rank before saving in the middle of an epoch.

    Args:
        edge_index: Train pairs, int64, shape `(2, E)`. Buffers live on its device.
        num_users: U, users without train pairs included.
        num_items: I.
        beta: $\beta>0$ of `user_inverse_temperature`.
        center: `"mean"` or `"quantile"`.
        quantile: Quantile in [0, 1] of the user losses with `center="quantile"`.
        warmup_epochs: Epochs with the assumed `gap`, at least 0.
        gap: Assumed score gap during warm-up, positive.
        user_quantile: Quantile of user degrees above which users count for $w_0$, in [0, 1).
        personalised: False gives every user $w_0$ (the paper's Adap-tau_0).

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> import torch
        >>> edges = torch.tensor([[0, 0, 1, 2], [0, 1, 1, 0]])
        >>> temperature = AdaptiveTemperature(edges, num_users=3, num_items=20, warmup_epochs=1)
        >>> user_emb, item_emb = torch.eye(3), torch.eye(20)[:, :3]
        >>> temperature.start_epoch(0, user_emb, item_emb)
        >>> user = torch.tensor([0, 1])
        >>> pos, neg = torch.tensor([0.9, 0.1]), torch.zeros(2, 4)
        >>> loss = adap_tau_loss(pos, neg, temperature(user), inv_tau_pos=temperature.inv_tau0)
        >>> temperature.observe(user, pos, neg)
        >>> temperature.start_epoch(0, user_emb, item_emb)
        >>> temperature.inv_tau / temperature.inv_tau0
        tensor([2.7183, 0.7429, 1.0000])
    """

    inv_tau0: Tensor
    inv_tau: Tensor
    pending: Tensor
    observed: Tensor
    kept_users: Tensor
    kept_edges: Tensor

    def __init__(
        self,
        edge_index: Tensor,
        num_users: int,
        num_items: int,
        *,
        beta: float = 1.0,
        center: str = "mean",
        quantile: float | None = 0.9,
        warmup_epochs: int = 100,
        gap: float = 0.7,
        user_quantile: float = 0.2,
        personalised: bool = True,
    ) -> None:
        super().__init__()
        _check_pairs(edge_index, num_users, num_items)
        check_positive("beta", beta)
        check_positive("gap", gap)
        _check_center(center, quantile)
        if not warmup_epochs >= 0:
            raise ValueError(f"warmup_epochs must be >= 0, got {warmup_epochs!r}")
        self.num_users, self.num_items = num_users, num_items
        self.beta, self.center, self.quantile = beta, center, quantile
        self.warmup_epochs, self.gap, self.personalised = warmup_epochs, gap, personalised
        users, edges = _frequent_users(edge_index, num_users, user_quantile)
        if users.shape[0] == 0:
            warnings.warn(
                f"no user above the degree quantile {user_quantile!r}: all users count for the temperature",
                RuntimeWarning,
                stacklevel=2,
            )
            users, edges = torch.arange(num_users, device=edge_index.device), edge_index
        device = edge_index.device
        # Follow from the arguments, hence not saved; buffers so that they move with the module.
        self.register_buffer("kept_users", users, persistent=False)
        self.register_buffer("kept_edges", edges, persistent=False)
        start = START_INVERSE_TEMPERATURE
        self.register_buffer("inv_tau0", torch.tensor(start, dtype=torch.float64, device=device))
        self.register_buffer("inv_tau", torch.full((num_users,), start, device=device))
        for name in ("pending", "observed"):
            self.register_buffer(name, torch.zeros(2, num_users, dtype=torch.float64, device=device))

    def forward(self, user: Tensor) -> Tensor:
        """Return the inverse temperatures of `user`, int64 `(B,)`, as a constant `(B,)`."""
        return self.inv_tau[user]

    @torch.no_grad()
    def start_epoch(self, epoch: int, user_emb: Tensor, item_emb: Tensor) -> None:
        """Renew both temperatures from the embeddings and from what was observed, then forget the latter.

        Where no positive inverse temperature exists (positives don't score above the average pair, or half of all
        pairs are observed) the previous value stays, with a RuntimeWarning. Waits for the device.

        Args:
            epoch: Counted from 0; below `warmup_epochs` the assumed gap is used.
            user_emb: Final (propagated, dropout-free) user table, shape `(U, d)`, floating.
            item_emb: Final item table, shape `(I, d)`.

        Raises:
            ValueError: If `epoch` is negative, a table has the wrong shape, or an embedding or loss isn't finite.
        """
        if not epoch >= 0:
            raise ValueError(f"epoch must be >= 0, got {epoch!r}")
        if _check_tables(user_emb, item_emb) != (self.num_users, self.num_items):
            raise ValueError(
                f"expected user_emb ({self.num_users}, d) and item_emb ({self.num_items}, d), "
                f"got {tuple(user_emb.shape)} and {tuple(item_emb.shape)}"
            )
        inv_tau0 = self._global_inverse_temperature(epoch, user_emb, item_emb)
        self.synchronize()
        total, count = self.observed
        seen = count.nonzero().squeeze(1)
        inv_tau = torch.full_like(self.inv_tau, inv_tau0)
        if seen.shape[0] > 0:
            inv_tau[seen] = user_inverse_temperature(
                total[seen] / count[seen],
                inv_tau0=inv_tau0,
                beta=self.beta,
                center=self.center,
                quantile=self.quantile,
            ).to(inv_tau.dtype)
        self.inv_tau0.fill_(inv_tau0)
        self.inv_tau.copy_(inv_tau)
        self.observed.zero_()

    @torch.no_grad()
    def observe(self, user: Tensor, pos_score: Tensor, neg_scores: Tensor) -> None:
        """Add the unit-temperature losses of a batch to the statistics of its users; nothing waits for the device.

        Args:
            user: Users of the rows, int64, shape `(B,)`.
            pos_score: Cosines of the observed pairs, shape `(B,)`.
            neg_scores: Cosines of the sampled pairs, shape `(B, N)`.

        Raises:
            ValueError: If a shape doesn't match.
        """
        if user.shape != pos_score.shape:
            raise ValueError(f"expected user {tuple(pos_score.shape)} like pos_score, got {tuple(user.shape)}")
        if not self.personalised:
            return
        loss = unit_temperature_loss(upcast(pos_score), upcast(neg_scores)).to(self.pending.dtype)
        self.pending.index_add_(1, user, torch.stack([loss, torch.ones_like(loss)]))

    @torch.no_grad()
    def synchronize(self) -> None:
        """Move the pending statistics into those of all ranks, which then agree; every rank must call it."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.pending)
        self.observed += self.pending
        self.pending.zero_()

    def extra_repr(self) -> str:
        return (
            f"num_users={self.num_users}, num_items={self.num_items}, beta={self.beta}, center={self.center!r}, "
            f"quantile={self.quantile}, warmup_epochs={self.warmup_epochs}, gap={self.gap}, "
            f"personalised={self.personalised}"
        )

    def _global_inverse_temperature(self, epoch: int, user_emb: Tensor, item_emb: Tensor) -> float:
        log_ratio = _log_ratio(self.kept_users.shape[0], self.num_items, self.kept_edges.shape[1])
        if not log_ratio > 0:
            return self._previous("half or more of all pairs are observed")
        if epoch < self.warmup_epochs:
            return log_ratio / self.gap
        mu_pos, mu_all = _mean_scores(user_emb, item_emb, self.kept_users, self.kept_edges)
        if not mu_pos > mu_all:
            return self._previous(f"mean positive score {mu_pos:.6g} is not above mean score {mu_all:.6g}")
        return log_ratio / (mu_pos - mu_all)

    def _previous(self, reason: str) -> float:
        previous = float(self.inv_tau0)
        # 5: past start_epoch and the frame of its no_grad, to the caller.
        warnings.warn(f"{reason}: the inverse temperature stays {previous:.6g}", RuntimeWarning, stacklevel=5)
        return previous


def _row_loss(pos: Tensor, neg: Tensor, inv_tau_pos: Tensor | float, inv_tau_neg: Tensor | float) -> Tensor:
    if isinstance(inv_tau_neg, Tensor):
        inv_tau_neg = inv_tau_neg.to(neg).reshape(-1, 1)
    if isinstance(inv_tau_pos, Tensor):
        inv_tau_pos = inv_tau_pos.to(pos)
    return torch.logsumexp(inv_tau_neg * neg, dim=1) - inv_tau_pos * pos


def _constant(name: str, value: Tensor | float, *, shapes: tuple[tuple[int, ...], ...]) -> Tensor | float:
    """Detach a tensor of an accepted shape; let a finite number >= 0 through."""
    if isinstance(value, Tensor):
        if tuple(value.shape) not in shapes:
            raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, got {tuple(value.shape)}")
        return value.detach()
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
    return value


def _check_center(center: str, quantile: float | None) -> None:
    check_choice("center", center, CENTERS)
    if center == "quantile" and (quantile is None or not 0 <= quantile <= 1):
        raise ValueError(f"quantile must be in [0, 1] with center='quantile', got {quantile!r}")


def _check_tables(user_emb: Tensor, item_emb: Tensor) -> tuple[int, int]:
    if user_emb.ndim != 2 or item_emb.ndim != 2 or user_emb.shape[1] != item_emb.shape[1]:
        raise ValueError(
            f"expected user_emb (U, d) and item_emb (I, d), got {tuple(user_emb.shape)} and {tuple(item_emb.shape)}"
        )
    return user_emb.shape[0], item_emb.shape[0]


def _check_pairs(edge_index: Tensor, num_users: int, num_items: int) -> None:
    check_edges("edge_index", edge_index, num_users, num_items)
    if edge_index.shape[1] == 0:
        raise ValueError("edge_index has no pairs; at least one is needed")


def _log_ratio(num_users: int, num_items: int, num_interactions: int) -> float:
    return math.log(num_users * num_items) - math.log(2 * num_interactions)


def _quantile(values: Tensor, q: float) -> Tensor:
    """Quantile with linear interpolation; `torch.quantile` refuses more than 16 million values."""
    ordered = values.sort().values
    position = q * (values.shape[0] - 1)
    low = math.floor(position)
    high = min(low + 1, values.shape[0] - 1)
    return torch.lerp(ordered[low], ordered[high], position - low)


def _frequent_users(edge_index: Tensor, num_users: int, user_quantile: float) -> tuple[Tensor, Tensor]:
    """Return the users whose degree is above the quantile of all degrees, and their edges."""
    if not 0 <= user_quantile < 1:
        raise ValueError(f"user_quantile must be in [0, 1), got {user_quantile!r}")
    degree = torch.bincount(edge_index[0], minlength=num_users).double()
    kept = degree > _quantile(degree, user_quantile)
    return kept.nonzero().squeeze(1), edge_index[:, kept[edge_index[0]]]


@torch.no_grad()
def _mean_scores(user_emb: Tensor, item_emb: Tensor, users: Tensor, edges: Tensor) -> tuple[float, float]:
    """Return the mean cosine over `edges`, and over all pairs of `users` with all items, as Python numbers."""
    user = F.normalize(upcast(user_emb.detach()), dim=1)
    item = F.normalize(upcast(item_emb.detach()), dim=1)
    total = torch.zeros((), dtype=torch.float64, device=user.device)
    for start in range(0, edges.shape[1], _CHUNK_EDGES):
        part = edges[:, start : start + _CHUNK_EDGES]
        total += (user[part[0]] * item[part[1]]).sum(dtype=torch.float64)
    mu_all = user[users].mean(dim=0, dtype=torch.float64) @ item.mean(dim=0, dtype=torch.float64)
    mu_pos_all = torch.stack([total / edges.shape[1], mu_all]).tolist()
    if not all(map(math.isfinite, mu_pos_all)):
        raise ValueError("user_emb and item_emb must be finite, got NaN or infinity; has the training diverged?")
    return mu_pos_all[0], mu_pos_all[1]
