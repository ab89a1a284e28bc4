"""The four losses of MCRL, their sum, and the negative actions that two of them need."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from recsys_losses._checks import check_finite, check_positive, check_reduction, reduce, upcast
from recsys_losses.baselines import result_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from recsys_losses._checks import Reduction

_EPS = 1e-8


class MCRLLoss(NamedTuple):
    """What `mcrl_loss` returns: the weighted sum and its four parts, not weighted.

    Args:
        loss: The sum to minimise.
        td: Double-Q temporal-difference loss.
        conservative: Log-sum-exp of all actions minus the logged one.
        reward: Contrastive loss of the reward model.
        transition: Contrastive loss of the transition model.
    """

    loss: Tensor
    td: Tensor
    conservative: Tensor
    reward: Tensor
    transition: Tensor


class Parts(NamedTuple):
    """What the weighted sum is made of; a part without tensors is left out, and its weight must be 0."""

    q: Tensor
    action: Tensor
    target: Tensor | None
    reward_scores: tuple[Tensor, Tensor] | None
    reward_sample_weight: Tensor | None
    transitions: tuple[Tensor, Tensor, Tensor] | None


class Weights(NamedTuple):
    """The weights and temperatures of the sum."""

    td: float
    cql: float
    reward: float
    transition: float
    cql_temperature: float
    temperature: float


def double_q_target(q_next_online: Tensor, q_next_target: Tensor, reward: Tensor, done: Tensor, gamma: float) -> Tensor:
    r"""Double-Q target: one network selects the next action, the other one says what it is worth.

    $$y=r+\gamma\,(1-\mathrm{done})\,Q^-\big(s',\arg\max_{a'}Q(s',a')\big)$$

    No gradient passes. Of several best actions the lowest index is taken; the value after the end counts as 0.

    Args:
        q_next_online: $Q(s',\cdot)$ of the network in training, shape `(B, I)`, floating.
        q_next_target: $Q^-(s',\cdot)$ of the other network, shape `(B, I)`.
        reward: $r$, shape `(B,)`, floating.
        done: Whether the session ended with this action, shape `(B,)`, boolean or 0 and 1.
        gamma: Discount, in [0, 1].

    Returns:
        Shape `(B,)`, in the promoted dtype of the floating arguments.

    Raises:
        ValueError: If the shapes don't fit, B or I is 0, a dtype is wrong, or `gamma` is out of range.

    Source: H. van Hasselt, *Double Q-learning*, NeurIPS 2010; the reading of MCRL is ours.

    Examples:
        >>> import torch
        >>> online, target = torch.tensor([[1.0, 2.0]]), torch.tensor([[5.0, 3.0]])
        >>> double_q_target(online, target, torch.tensor([1.0]), torch.tensor([False]), 0.5)
        tensor([2.5000])
    """
    _check_q(q_next_online, "q_next_online")
    _check_same("q_next_target", q_next_target, "q_next_online", q_next_online)
    rows = q_next_online.shape[0]
    _check_rows(rows, reward=reward, done=done)
    check_gamma(gamma)
    dtype = result_dtype(q_next_online=q_next_online, q_next_target=q_next_target, reward=reward)
    best = q_next_online.detach().argmax(dim=1, keepdim=True)
    return bellman(q_next_target.detach().gather(1, best).squeeze(1).to(dtype), reward, done, gamma)


def bellman(next_value: Tensor, reward: Tensor, done: Tensor, gamma: float) -> Tensor:
    """Return reward + gamma * next value (B,), where the session goes on, without a gradient."""
    ahead = gamma * next_value.detach()
    return (reward + torch.where(done != 0, torch.zeros_like(ahead), ahead)).detach()


def td_loss(q: Tensor, action: Tensor, target: Tensor, reduction: Reduction = "mean") -> Tensor:
    r"""Half the squared temporal-difference error of the logged action.

    $$\ell_b=\tfrac12\big(Q(s_b,a_b)-\mathrm{sg}[y_b]\big)^2$$

    Args:
        q: $Q(s,\cdot)$, shape `(B, I)`, floating.
        action: Logged items $a$, shape `(B,)`, integers in [0, I).
        target: $y$, shape `(B,)`, such as `double_q_target` returns; gets no gradient.
        reduction: `"none"` gives shape `(B,)`, `"mean"` and `"sum"` a scalar.

    Returns:
        The loss in the promoted dtype of `q` and `target`; half precision is computed in float32.

    Raises:
        ValueError: If the shapes don't fit, a dtype is wrong, or (on the CPU) an action is out of range.

    Source: TRFL's `double_qlearning` and the code line of SQN use the same half.

    Examples:
        >>> import torch
        >>> td_loss(torch.tensor([[0.0, 3.0]]), torch.tensor([1]), torch.tensor([1.0]))
        tensor(2.)
    """
    check_reduction(reduction)
    _check_q(q, "q")
    check_items("action", action, q.shape[1], rows=q.shape[0])
    _check_rows(q.shape[0], target=target)
    return reduce(_td(_logged(q, action), target), reduction, result_dtype(q=q, target=target))


def conservative_loss(q: Tensor, action: Tensor, temperature: float = 1.0, reduction: Reduction = "mean") -> Tensor:
    r"""Conservative term over all actions: lowers Q of what was not logged against what was.

    $$\ell_b=T\log\sum_{a'}e^{Q(s_b,a')/T}-Q(s_b,a_b)$$

    With $T=1$ it is exactly the cross-entropy of Q as logits, so that it trains next-item prediction as well.

    Args:
        q: $Q(s,\cdot)$, shape `(B, I)`, floating.
        action: Logged items $a$, shape `(B,)`, integers in [0, I).
        temperature: $T>0$; towards 0 the log-sum-exp becomes the maximum.
        reduction: `"none"` gives shape `(B,)`, `"mean"` and `"sum"` a scalar.

    Returns:
        The loss in the dtype of `q`; half precision is computed in float32.

    Raises:
        ValueError: If the shapes don't fit, a dtype is wrong, `temperature` isn't a positive finite number, or (on the
            CPU) an action is out of range.

    Source: A. Kumar et al., *Conservative Q-Learning*, NeurIPS 2020 (CQL(H)); the reading of MCRL is ours.

    Examples:
        >>> import torch
        >>> conservative_loss(torch.zeros(1, 4), torch.tensor([2]))  # log 4
        tensor(1.3863)
    """
    check_reduction(reduction)
    check_positive("temperature", temperature)
    _check_q(q, "q")
    check_items("action", action, q.shape[1], rows=q.shape[0])
    return reduce(_conservative(q, _logged(q, action), temperature), reduction, result_dtype(q=q))


def contrastive_reward_loss(
    reward_pos: Tensor,
    reward_neg: Tensor,
    temperature: float,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Contrastive loss of the reward model: the logged action against negative actions of the same state.

    $$\ell_b=-w_b\log\frac{e^{\rho(s_b,a_b)/\tau}}{e^{\rho(s_b,a_b)/\tau}+\sum_k e^{\rho(s_b,n_{bk})/\tau}}$$

    With K = 1 it is the logistic loss of the difference.

    Args:
        reward_pos: $\rho(s,a)$, shape `(B,)`, floating.
        reward_neg: $\rho(s,n_k)$, shape `(B, K)`.
        temperature: $\tau>0$; usual values lie between 0.07 and 1.
        weight: $w$ per row, shape `(B,)`, such as the reward over its mean; gets no gradient. None weighs all rows
            alike.
        reduction: `"none"` gives shape `(B,)`, `"mean"` and `"sum"` a scalar.

    Returns:
        The loss in the promoted dtype of the scores; half precision is computed in float32.

    Raises:
        ValueError: If the shapes don't fit, K is 0, a dtype is wrong or `temperature` isn't a positive finite number.

    Source: our reading of the abstract of arXiv:2310.16566.

    Examples:
        >>> import torch
        >>> contrastive_reward_loss(torch.tensor([0.2]), torch.full((1, 3), 0.2), 0.2)  # log 4
        tensor(1.3863)
    """
    check_reduction(reduction)
    check_positive("temperature", temperature)
    _check_contrast("reward_pos", reward_pos, "reward_neg", reward_neg, vector=False)
    if weight is not None:
        _check_rows(reward_pos.shape[0], weight=weight)
    dtype = result_dtype(reward_pos=reward_pos, reward_neg=reward_neg)
    return reduce(_reward(reward_pos, reward_neg, temperature, weight), reduction, dtype)


def contrastive_transition_loss(
    trans_pos: Tensor, trans_neg: Tensor, next_state: Tensor, temperature: float, reduction: Reduction = "mean"
) -> Tensor:
    r"""Contrastive loss of the transition model: only the logged action explains the next state.

    $$\ell_b=-\log\frac{e^{c_{b0}/\tau}}{\sum_{k=0}^{K}e^{c_{bk}/\tau}},\qquad
    c_{b0}=\cos\big(T(s_b,a_b),\mathrm{sg}[s'_b]\big),\quad c_{bk}=\cos\big(T(s_b,n_{bk}),\mathrm{sg}[s'_b]\big)$$

    Args:
        trans_pos: $T(s,a)$, shape `(B, d)`, floating.
        trans_neg: $T(s,n_k)$, shape `(B, K, d)`.
        next_state: $s'$, shape `(B, d)`; gets no gradient.
        temperature: $\tau>0$.
        reduction: `"none"` gives shape `(B,)`, `"mean"` and `"sum"` a scalar.

    Returns:
        The loss in the promoted dtype of the vectors; half precision is computed in float32. A zero vector has cosine 0.

    Raises:
        ValueError: If the shapes don't fit, K is 0, a dtype is wrong or `temperature` isn't a positive finite number.

    Source: our reading of the abstract of arXiv:2310.16566.

    Examples:
        >>> import torch
        >>> state = torch.tensor([[1.0, 0.0]])
        >>> contrastive_transition_loss(state, torch.tensor([[[0.0, 1.0]]]), state, 1.0)  # log(1 + 1/e)
        tensor(0.3133)
    """
    check_reduction(reduction)
    check_positive("temperature", temperature)
    _check_contrast("trans_pos", trans_pos, "trans_neg", trans_neg, vector=True)
    _check_same("next_state", next_state, "trans_pos", trans_pos)
    dtype = result_dtype(trans_pos=trans_pos, trans_neg=trans_neg, next_state=next_state)
    return reduce(_transition(trans_pos, trans_neg, next_state, temperature), reduction, dtype)


def mcrl_loss(
    q: Tensor,
    q_next_online: Tensor,
    q_next_target: Tensor,
    action: Tensor,
    reward: Tensor,
    done: Tensor,
    reward_pos: Tensor,
    reward_neg: Tensor,
    trans_pos: Tensor,
    trans_neg: Tensor,
    next_state: Tensor,
    *,
    gamma: float = 0.5,
    td_weight: float = 1.0,
    cql_weight: float = 1.0,
    cql_temperature: float = 1.0,
    reward_weight: float = 0.5,
    transition_weight: float = 0.5,
    temperature: float = 0.2,
    reduction: Reduction = "mean",
) -> MCRLLoss:
    r"""Weighted sum of the four losses.

    $$\mathcal L=w_{td}\mathcal L_{td}+w_c\mathcal L_c+w_r\mathcal L_r+w_t\mathcal L_t$$

    `cql_weight` alone is a plain cross-entropy recommender, `td_weight` alone naive double Q-learning. A part of weight
    0 is computed and returned, but gets no gradient.

    Args:
        q: $Q(s,\cdot)$, shape `(B, I)`, floating.
        q_next_online: $Q(s',\cdot)$ of the network in training, shape `(B, I)`; gets no gradient.
        q_next_target: $Q^-(s',\cdot)$ of the other network, shape `(B, I)`; gets no gradient.
        action: Logged items, shape `(B,)`, integers in [0, I).
        reward: Rewards, shape `(B,)`, floating.
        done: Whether the session ended with this action, shape `(B,)`, boolean or 0 and 1.
        reward_pos: $\rho(s,a)$, shape `(B,)`.
        reward_neg: $\rho(s,n_k)$, shape `(B, K)`.
        trans_pos: $T(s,a)$, shape `(B, d)`.
        trans_neg: $T(s,n_k)$, shape `(B, K, d)`.
        next_state: $s'$, shape `(B, d)`; gets no gradient.
        gamma: Discount, in [0, 1].
        td_weight: $w_{td}$, any finite number.
        cql_weight: $w_c$.
        cql_temperature: Temperature of the conservative term, positive.
        reward_weight: $w_r$.
        transition_weight: $w_t$.
        temperature: $\tau>0$ of the two contrastive losses.
        reduction: `"none"` gives shape `(B,)`, `"mean"` and `"sum"` a scalar.

    Returns:
        The sum and its parts, in the promoted dtype of the floating arguments.

    Raises:
        ValueError: If the shapes don't fit, K is 0, a dtype is wrong, or an option is out of range.

    Source: our reading of the abstract of arXiv:2310.16566.

    Examples:
        >>> import torch
        >>> q, state = torch.zeros(1, 4), torch.zeros(1, 2)
        >>> out = mcrl_loss(q, q, q, torch.tensor([0]), torch.tensor([1.0]), torch.tensor([True]),
        ...     torch.zeros(1), torch.zeros(1, 3), state, torch.zeros(1, 3, 2), state)
        >>> out.td, out.conservative
        (tensor(0.5000), tensor(1.3863))
    """
    weights = Weights(td_weight, cql_weight, reward_weight, transition_weight, cql_temperature, temperature)
    check_weights(weights)
    check_reduction(reduction)
    _check_q(q, "q")
    _check_same("q_next_online", q_next_online, "q", q)
    check_items("action", action, q.shape[1], rows=q.shape[0])
    _check_contrast("reward_pos", reward_pos, "reward_neg", reward_neg, vector=False)
    _check_contrast("trans_pos", trans_pos, "trans_neg", trans_neg, vector=True)
    _check_same("next_state", next_state, "trans_pos", trans_pos)
    _check_rows(q.shape[0], reward_pos=reward_pos)
    if trans_pos.shape[0] != q.shape[0]:
        raise ValueError(f"trans_pos must have the {q.shape[0]} rows of q, got {tuple(trans_pos.shape)}")
    dtype = result_dtype(
        q=q,
        q_next_online=q_next_online,
        q_next_target=q_next_target,
        reward=reward,
        reward_pos=reward_pos,
        reward_neg=reward_neg,
        trans_pos=trans_pos,
        trans_neg=trans_neg,
        next_state=next_state,
    )
    target = double_q_target(q_next_online, q_next_target, reward, done, gamma)
    parts = Parts(q, action, target, (reward_pos, reward_neg), None, (trans_pos, trans_neg, next_state))
    return weighted_sum(parts, weights, reduction, dtype)


def weighted_sum(parts: Parts, weights: Weights, reduction: Reduction, dtype: torch.dtype) -> MCRLLoss:
    """Return the sum and its parts; a part that is left out is 0."""
    logged = _logged(parts.q, parts.action)
    zero = torch.zeros_like(upcast(logged.detach()))
    td = zero if parts.target is None else _td(logged, parts.target)
    conservative = _conservative(parts.q, logged, weights.cql_temperature)
    reward, transition = zero, zero
    if parts.reward_scores is not None:
        reward = _reward(*parts.reward_scores, weights.temperature, parts.reward_sample_weight)
    if parts.transitions is not None:
        transition = _transition(*parts.transitions, weights.temperature)
    # A part of weight 0 may be infinite, which 0 times it wouldn't survive.
    weighted = (
        (weights.td, td),
        (weights.cql, conservative),
        (weights.reward, reward),
        (weights.transition, transition),
    )
    loss = sum((w * part for w, part in weighted if w != 0), zero)
    return MCRLLoss(*(reduce(x, reduction, dtype) for x in (loss, td, conservative, reward, transition)))


def sample_negative_actions(
    action: Tensor,
    num_items: int,
    k: int,
    *,
    exclude: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draw actions that were not taken: uniform over the items, never the logged one.

    Each is drawn from the ranks of the permitted items and moved past the excluded ones: exact, without rejection, and
    without waiting for the device.

    Args:
        action: Logged items, shape `(B,)`, integers in [0, I).
        num_items: I, at least 2.
        k: Negatives per row, at least 1. A row may hold an item twice.
        exclude: Further items never to draw, shape `(B, M)`, integers; numbers outside [0, I) stand for nothing, and
            repetitions are fine. Some item has to remain for every row.
        generator: Source of randomness, torch's default one if None. Numbers are drawn on its device.

    Returns:
        int64 `(B, k)`, on the device of `action`.

    Raises:
        ValueError: If `k` < 1 or `num_items` < 2, a shape or a dtype is wrong, (on the CPU) an action is out of range, or
            no item remains for a row.

    Examples:
        >>> import torch
        >>> sample_negative_actions(torch.tensor([0, 1]), 3, 2, exclude=torch.tensor([[2], [0]]))
        tensor([[1, 1],
                [2, 2]])
    """
    if not k >= 1:
        raise ValueError(f"at least one negative is needed, got k={k!r}")
    if not num_items >= 2:
        raise ValueError(f"num_items must be >= 2, got {num_items!r}")
    check_items("action", action, num_items)
    source = action.device if generator is None else generator.device
    if exclude is None:
        drawn = torch.randint(num_items - 1, (action.shape[0], k), generator=generator, device=source)
        drawn = drawn.to(action.device)
        return drawn + (drawn >= action.unsqueeze(1))
    if exclude.ndim != 2 or exclude.shape[0] != action.shape[0]:
        raise ValueError(f"exclude must be (B={action.shape[0]}, M), got {tuple(exclude.shape)}")
    taken = _distinct(torch.cat([action.unsqueeze(1), exclude.long()], dim=1), num_items)
    free = num_items - (taken < num_items).sum(dim=1, keepdim=True)
    if num_items <= taken.shape[1] and bool((free < 1).any()):
        raise ValueError(f"no item remains to draw: a row excludes all num_items={num_items}")
    uniform = torch.rand(action.shape[0], k, generator=generator, device=source, dtype=torch.float64)
    rank = (uniform.to(action.device) * free).long()
    # The j-th excluded item (in order) is passed by all ranks from it minus j on.
    passed = torch.where(taken < num_items, taken - torch.arange(taken.shape[1], device=taken.device), num_items)
    return rank + torch.searchsorted(passed, rank, right=True)


def _distinct(items: Tensor, num_items: int) -> Tensor:
    """Sort each row; repetitions and what isn't an item become `num_items` and come last."""
    items = torch.where((items < 0) | (items >= num_items), num_items, items).sort(dim=1).values
    again = torch.zeros_like(items, dtype=torch.bool)
    again[:, 1:] = items[:, 1:] == items[:, :-1]
    return items.masked_fill(again, num_items).sort(dim=1).values


def _logged(q: Tensor, action: Tensor) -> Tensor:
    return q.gather(1, action.unsqueeze(1).long()).squeeze(1)


def _td(logged: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (upcast(logged) - upcast(target.detach())).square()


def _conservative(q: Tensor, logged: Tensor, temperature: float) -> Tensor:
    q = upcast(q)
    if temperature == 1:
        return q.logsumexp(1) - upcast(logged)
    return temperature * (q / temperature).logsumexp(1) - upcast(logged)


def _reward(pos: Tensor, neg: Tensor, temperature: float, weight: Tensor | None) -> Tensor:
    loss = _contrast(torch.cat([upcast(pos).unsqueeze(1), upcast(neg)], dim=1) / temperature)
    return loss if weight is None else upcast(weight.detach()) * loss


def _transition(pos: Tensor, neg: Tensor, next_state: Tensor, temperature: float) -> Tensor:
    predicted = torch.cat([upcast(pos).unsqueeze(1), upcast(neg)], dim=1)
    state = F.normalize(upcast(next_state.detach()), dim=1, eps=_EPS).to(predicted.dtype)
    length = torch.linalg.vector_norm(predicted, dim=2).clamp_min(_EPS)
    cosine = torch.bmm(predicted, state.unsqueeze(2)).squeeze(2) / length
    return _contrast(cosine / temperature)


def _contrast(logits: Tensor) -> Tensor:
    """Return -log softmax at the first column."""
    return logits.logsumexp(1) - logits[:, 0]


def check_gamma(gamma: float) -> None:
    """Raise ValueError unless `gamma` is in [0, 1]."""
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1], got {gamma!r}")


def check_weights(weights: Weights) -> None:
    """Raise ValueError unless the weights are finite and the temperatures positive."""
    check_finite("td_weight", weights.td)
    check_finite("cql_weight", weights.cql)
    check_finite("reward_weight", weights.reward)
    check_finite("transition_weight", weights.transition)
    check_positive("cql_temperature", weights.cql_temperature)
    check_positive("temperature", weights.temperature)


def check_items(name: str, items: Tensor, num_items: int, *, rows: int | None = None) -> None:
    """Raise ValueError unless `items` is `(rows,)`, of integers, and (where looking costs no wait) in [0, I)."""
    if items.ndim != 1 or (rows is not None and items.shape[0] != rows):
        raise ValueError(f"{name} must be ({'B' if rows is None else rows},), got {tuple(items.shape)}")
    if items.is_floating_point() or items.is_complex() or items.dtype == torch.bool:
        raise ValueError(f"{name} must hold integers, got dtype {items.dtype}")
    check_range(name, items, 0, num_items - 1)


def check_range(name: str, values: Tensor, low: int, high: int) -> None:
    """Raise ValueError for values outside [low, high]; on a GPU looking would wait, so nothing is looked at."""
    if values.device.type != "cpu" or values.numel() == 0 or torch.compiler.is_compiling():
        return
    smallest, largest = (int(x) for x in values.aminmax())
    if smallest < low or largest > high:
        raise ValueError(f"{name} must be in [{low}, {high}], got values from {smallest} to {largest}")


def _check_q(q: Tensor, name: str) -> None:
    if q.ndim != 2 or q.numel() == 0:
        raise ValueError(f"{name} must be (B, I) with B, I >= 1, got {tuple(q.shape)}")
    result_dtype(**{name: q})


def _check_same(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.shape != other.shape:
        raise ValueError(f"{name} must have the shape {tuple(other.shape)} of {other_name}, got {tuple(tensor.shape)}")
    result_dtype(**{name: tensor})


def _check_rows(rows: int, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != (rows,):
            raise ValueError(f"{name} must be (B={rows},), got {tuple(tensor.shape)}")


def _check_contrast(pos_name: str, pos: Tensor, neg_name: str, neg: Tensor, *, vector: bool) -> None:
    """Raise ValueError unless pos is (B,) or (B, d) and neg has K >= 1 of the same per row."""
    expected = "(B, d) and (B, K, d)" if vector else "(B,) and (B, K)"
    if pos.ndim != 1 + vector or neg.ndim != pos.ndim + 1 or (neg.shape[:1] + neg.shape[2:]) != pos.shape:
        raise ValueError(f"{pos_name} and {neg_name} must be {expected}, got {tuple(pos.shape)} and {tuple(neg.shape)}")
    if pos.numel() == 0:
        raise ValueError(f"{pos_name} is empty: {tuple(pos.shape)}")
    if neg.shape[1] == 0:
        raise ValueError(f"{neg_name} has no columns; at least one negative per row is needed")
