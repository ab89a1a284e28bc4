r"""NAPO: more negatives for the price of a few, and a margin that doubts them.

Every negative of a language-model recommender costs a sequence. NAPO lends each user the negatives of the most similar
users of the batch: their log-probabilities are there already. A margin shrinks where a small recommender (SASRec) scores
the negatives unusually high, because those may be false negatives. No reference model is needed.

$$
\ell_i=\operatorname{softplus}\Big(\gamma+\log\sum_{n\in P_i}e^{\beta(n-c_i)}\Big),\qquad
\gamma=\gamma_0\big(1-\alpha(M-\overline M)\big)
$$

$c_i$ is the log-probability of the positive, $P_i$ the pool of a user's own negatives and those of the $\lfloor\rho(N-1)\rfloor$
most similar users, $M$ the mean score of the pools and $\overline M$ its moving average. A shared negative counts with its
log-probability under the *other* user's prompt; that is what makes it free.

Reference: C. Ding, D. Liu, J. Wu, X. Hu, J. Wu, H. Wang, Y. Wang, X. Wang, X. Wang, *On Negative-aware Preference
Optimization for Recommendation*, 2025, arXiv:2508.09653; formulas as in the authors' code.
Documentation: `docs/papers/pref-opt/napo.md`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

from pref_opt._checks import (
    check_below_one,
    check_choice,
    check_count,
    check_finite,
    check_fraction,
    check_lists,
    check_not_negative,
    check_positive,
)
from pref_opt.baselines import check_values, implicit_rewards, reduced, upcast
from pref_opt.losses import LossOutput, PreferenceLoss

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from pref_opt.baselines import Reduction
    from pref_opt.losses import Logps, LossContext

__all__ = [
    "NAPOLoss",
    "SASRec",
    "annotate_dataset",
    "dynamic_reward_margin",
    "hit_ratio_at_1",
    "napo_loss",
    "popularity_bias",
    "shared_negative_index",
    "train_sasrec",
]

NegativeGrad = Literal["all", "own", "none"]
Similarity = Literal["seq", "item"]

NEGATIVE_GRADS = ("all", "own", "none")
# The feature that each kind of similarity compares.
SIMILARITIES = {"seq": "user_embeddings", "item": "avg_item_embeddings"}
NO_ITEM = -1


# --- the loss ----------------------------------------------------------------------------------------------------------


def shared_negative_index(
    user_embeddings: Tensor, ids: Tensor | None = None, *, share_ratio: float, rows: Tensor | None = None
) -> Tensor:
    r"""Return whose negatives each user borrows, most similar first.

    $$T_i=\operatorname{top}_{\lfloor\rho(N-1)\rfloor}\{u_i^\top u_h:h\ne i\}$$

    Source: the authors' code (sharing). The similarity is a plain dot product, which favours long vectors.

    Args:
        user_embeddings: Vectors $u$ of all users of the batch (N, d), of all processes together.
        ids: Ids of the training examples (N,), integers; None takes the positions.
        share_ratio: $\rho$ in [0, 1].
        rows: Users whose neighbours are wanted (B,), integer positions in the batch; None takes all N.

    Returns:
        Positions in the batch (B, T), int64. With one user, or a small ratio, T is 0.

    Raises:
        ValueError: If a shape or dtype doesn't fit, `share_ratio` is outside [0, 1], or ids repeat while negatives are
            shared (looked at in main memory only).

    Examples:
        >>> import torch
        >>> from pref_opt.napo import shared_negative_index
        >>> users = torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.0]])
        >>> shared_negative_index(users, share_ratio=0.5)
        tensor([[1],
                [0],
                [1]])
    """
    check_fraction("share_ratio", share_ratio)
    if user_embeddings.ndim != 2 or len(user_embeddings) == 0 or not user_embeddings.is_floating_point():
        got = f"{user_embeddings.dtype} of {tuple(user_embeddings.shape)}"
        raise ValueError(f"user_embeddings must be a floating matrix (N, d) with N >= 1, got {got}")
    users = upcast(user_embeddings.detach())
    everyone = torch.arange(len(users), device=users.device)
    rows = everyone if rows is None else rows
    # The ratio times a whole number may fall short of a whole number by a rounding error.
    count = math.floor(share_ratio * (len(users) - 1) + 1e-9)
    if count == 0:
        return rows.new_empty(len(rows), 0)
    if ids is not None:
        _check_ids(ids, len(users))
    similarity = users[rows] @ users.T
    similarity = similarity.masked_fill(rows.unsqueeze(1) == everyone, -torch.inf)
    return similarity.argsort(dim=1, descending=True, stable=True)[:, :count]


def _check_ids(ids: Tensor, num_users: int) -> None:
    if ids.shape != (num_users,) or ids.is_floating_point():
        raise ValueError(f"ids must be integers of shape ({num_users},), got {ids.dtype} of {tuple(ids.shape)}")
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    ordered = ids.sort().values
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeated):
        raise ValueError(f"ids must differ within a batch, got duplicate example ids: {repeated[0].item()}")


def napo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    user_embeddings: Tensor,
    *,
    beta: float = 1.0,
    gamma: float | Tensor = 1.0,
    share_ratio: float = 0.7,
    negative_grad: NegativeGrad = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""One completion against a user's own negatives and those of similar users.

    $$\ell_i=\operatorname{softplus}\Big(\gamma+\log\sum_{n\in P_i}e^{\beta(n-c_i)}\Big),\qquad
    P_i=\{n_{hj}:h\in\{i\}\cup T_i\}$$

    Source: the authors' code, in log-domain. Without sharing and with $\gamma=0$ it is S-DPO without a reference; with one
    negative besides, it is SimPO on sums with the ratio $\gamma/\beta$. In the authors' code gathered negatives, the own
    ones included, carry no gradient (`negative_grad="none"`), which leaves a weighted likelihood of the positives.

    Args:
        chosen_logps: Positives (B,), sums over tokens, nats.
        rejected_logps: Negatives (B, K), each under the prompt of its own row.
        user_embeddings: Vectors of the users (B, d), constants.
        beta: $\beta>0$.
        gamma: Margin, a finite number or a scalar tensor, a constant.
        share_ratio: $\rho$ in [0, 1], the share of the other users whose negatives are borrowed.
        negative_grad: Which negatives get a gradient: `"all"`, a user's `"own"` ones, or `"none"`.
        reduction: `"mean"`, or `"none"` for shape (B,).

    Returns:
        The loss in float32 or wider.

    Raises:
        ValueError: If a shape or dtype doesn't fit, the batch is empty, an option is out of range, or a value isn't finite
            (looked at in main memory only).

    Examples:
        >>> import torch
        >>> from pref_opt.napo import napo_loss
        >>> users = torch.eye(2)
        >>> chosen, rejected = torch.zeros(2), torch.zeros(2, 3)
        >>> napo_loss(chosen, rejected, users, gamma=0.0, share_ratio=1.0)  # log(1 + 2 K)
        tensor(1.9459)
    """
    check_positive("beta", beta)
    check_choice("negative_grad", negative_grad, NEGATIVE_GRADS)
    _check_batch(chosen_logps, rejected_logps)
    _check_users(user_embeddings, len(chosen_logps), "user_embeddings")
    if not isinstance(gamma, torch.Tensor):
        check_finite("gamma", gamma)
    elif gamma.ndim:
        raise ValueError(f"gamma must be a number or a scalar tensor, got shape {tuple(gamma.shape)}")
    index = shared_negative_index(user_embeddings, share_ratio=share_ratio)
    pool = _pooled(upcast(rejected_logps), index, negative_grad)
    return reduced(_losses(upcast(chosen_logps), pool, beta=beta, gamma=gamma), reduction)


def _pooled(rejected: Tensor, index: Tensor, negative_grad: NegativeGrad) -> Tensor:
    """Return the pools (N, K (1 + T)): a user's own negatives first, then those of the users in `index` (N, T)."""
    own = rejected.detach() if negative_grad == "none" else rejected
    shared = rejected if negative_grad == "all" else rejected.detach()
    return torch.cat([own, shared[index].flatten(1)], 1)


def _losses(chosen: Tensor, pool: Tensor, *, beta: float, gamma: float | Tensor) -> Tensor:
    if isinstance(gamma, torch.Tensor):
        gamma = gamma.detach()
    return F.softplus(gamma + (beta * (pool - chosen.unsqueeze(1))).logsumexp(1))


def dynamic_reward_margin(
    negative_scores: Tensor,
    *,
    gamma0: float = 1.0,
    alpha: float = 0.3,
    score_ema: float | Tensor = 0.0,
    momentum: float = 0.9,
) -> tuple[Tensor, Tensor]:
    r"""Return the margin of a batch and the moving average of the scores after it.

    $$\overline M\leftarrow\mu\overline M+(1-\mu)M,\qquad\gamma=\gamma_0\big(1-\alpha(M-\overline M)\big)$$

    $M$ is the mean of the scores. Scores above the usual, which mean probable false negatives, give a smaller margin; it may
    become negative. Source: the authors' code: one margin per batch, from the average that has taken in the batch already.

    Args:
        negative_scores: Scores of the negatives in the pools (B, P), from a recommender.
        gamma0: $\gamma_0$, any finite number.
        alpha: $\alpha\ge0$.
        score_ema: $\overline M$ before this batch; it starts at 0.
        momentum: $\mu$ in [0, 1).

    Returns:
        $\gamma$ and the new $\overline M$, detached scalars in float32 or wider.

    Raises:
        ValueError: If `negative_scores` isn't a non-empty floating matrix or an option is out of range.

    Examples:
        >>> import torch
        >>> from pref_opt.napo import dynamic_reward_margin
        >>> gamma, ema = dynamic_reward_margin(torch.tensor([[2.0, 4.0]]), score_ema=2.0)
        >>> round(gamma.item(), 4), round(ema.item(), 4)
        (0.73, 2.1)
    """
    if negative_scores.ndim != 2 or negative_scores.numel() == 0 or not negative_scores.is_floating_point():
        got = f"{negative_scores.dtype} of {tuple(negative_scores.shape)}"
        raise ValueError(f"negative_scores must be a non-empty floating matrix (B, P), got {got}")
    _check_margin(gamma0, alpha, momentum)
    mean = upcast(negative_scores.detach()).mean()
    new = momentum * score_ema + (1 - momentum) * mean
    return _margin(mean, new, gamma0, alpha), new


def _margin(mean: Tensor, usual: Tensor, gamma0: float, alpha: float) -> Tensor:
    return gamma0 * (1 - alpha * (mean - usual))


class NAPOLoss(PreferenceLoss):
    r"""NAPO as a loss object, on sums, K negatives per row and without a reference; see `napo_loss`.

    Users, negatives and scores are those of all processes: the loss is the mean over the global batch, and its gradient
    averaged over processes is that of one process with the whole batch. Evaluation stays within its process and changes no
    state. With gradient accumulation, sharing and margin are per micro-batch.

    It reads these features of the batch, as `annotate_dataset` writes them:

    | feature | shape | needed |
    |---|---|---|
    | `user_embeddings`, or `avg_item_embeddings` with `similarity="item"` | (B, d) | unless `share_ratio=0` |
    | `negative_scores` | (B, K) | unless `alpha=0` |
    | `ids` | (B,) | no; finds examples that occur twice |
    | `chosen_items`, `rejected_items`, `history_items` | (B,), (B, K), (B, H) | no; for `exclude_items` |

    Metrics: `margin/gamma`, `scores/mean`, `scores/ema`, `negatives/pool` (size of a pool), `negatives/excluded` (share of
    the borrowed negatives that were dropped), `rewards/accuracy_all`, `rewards/margin`.

    Args:
        beta: $\beta>0$.
        gamma0: $\gamma_0$, any finite number.
        alpha: $\alpha\ge0$; 0 keeps the margin at $\gamma_0$.
        share_ratio: $\rho$ in [0, 1].
        momentum: $\mu$ in [0, 1).
        negative_grad: `"all"`, `"own"`, or `"none"` as in the authors' code.
        similarity: Which vectors tell who is similar: `"seq"` or `"item"`.
        exclude_items: Drop borrowed negatives that are the user's own positive or in the user's history, where item ids are
            given; -1 is no item.
        debias: Correct $\overline M$ for its start at zero; without it the first margins are far below $\gamma_0$ for
            scores far from 0.

    Raises:
        ValueError: If an option is out of range; on call, if a feature is missing or has the wrong shape.

    Examples:
        >>> import torch
        >>> from pref_opt.losses import LossContext, Logps, make_loss
        >>> features = {"user_embeddings": torch.eye(2), "negative_scores": torch.zeros(2, 3)}
        >>> logps = Logps(torch.zeros(2), torch.zeros(2, 3), features=features)
        >>> out = make_loss("napo", share_ratio=1.0)(logps, LossContext())
        >>> out.metrics["negatives/pool"], out.metrics["margin/gamma"]
        (tensor(6.), tensor(1.))
    """

    requires_reference = False
    multi_negative: ClassVar[bool] = True
    couples_pairs: ClassVar[bool] = True

    def __init__(
        self,
        beta: float = 1.0,
        gamma0: float = 1.0,
        alpha: float = 0.3,
        share_ratio: float = 0.7,
        momentum: float = 0.9,
        negative_grad: NegativeGrad = "all",
        similarity: Similarity = "seq",
        exclude_items: bool = True,
        *,
        debias: bool = False,
    ) -> None:
        check_positive("beta", beta)
        _check_margin(gamma0, alpha, momentum)
        check_fraction("share_ratio", share_ratio)
        check_choice("negative_grad", negative_grad, NEGATIVE_GRADS)
        check_choice("similarity", similarity, SIMILARITIES)
        self.beta = beta
        self.gamma0 = gamma0
        self.alpha = alpha
        self.share_ratio = share_ratio
        self.momentum = momentum
        self.negative_grad = negative_grad
        self.similarity = similarity
        self.exclude_items = exclude_items
        self.debias = debias
        self.num_updates = 0
        self._score_ema = torch.zeros(())

    def __call__(self, logps: Logps, context: LossContext) -> LossOutput:
        """Compute the loss of the global batch; only this process's rows carry gradient."""
        _check_batch(logps.chosen, logps.rejected)
        features = self._features(logps)
        chosen, rejected = upcast(logps.chosen), upcast(logps.rejected)
        if context.training and context.world_size > 1:
            # Own rows at the place where they were gathered from, so that every user keeps the own negatives.
            start = context.process_index * len(chosen)
            features = {name: context.gather(value) for name, value in features.items()}
            chosen, rejected = _spliced(chosen, start, context), _spliced(rejected, start, context)
        index = self._index(features, len(chosen), chosen.device)
        keep = self._keep(features, index, rejected)
        gamma, mean, usual = self._gamma(features, index, keep, training=context.training)
        pool = torch.where(keep, _pooled(rejected, index, self.negative_grad), -torch.inf)
        loss = _losses(chosen, pool, beta=self.beta, gamma=gamma).mean()
        if context.training:
            # Averaging over processes divides the gradient of each row by their number, which is undone here.
            loss = loss + (context.world_size - 1) * (loss - loss.detach())
        rewards = implicit_rewards(logps, self.beta, reference=False)
        borrowed = keep[:, rejected.shape[1] :].to(loss.dtype)
        metrics = {
            "margin/gamma": gamma,
            "scores/mean": mean,
            "scores/ema": usual,
            "negatives/pool": keep.sum(1).to(loss.dtype).mean(),
            "negatives/excluded": 1 - borrowed.mean() if borrowed.numel() else torch.zeros_like(loss.detach()),
            "rewards/accuracy_all": (rewards[0] > rewards[1].amax(1)).to(loss.dtype).mean(),
            "rewards/margin": (rewards[0] - rewards[1].mean(1)).mean(),
        }
        return LossOutput(loss, *rewards, metrics)

    def state_dict(self) -> dict[str, Any]:
        """Return the moving average of the scores and the number of updates."""
        return {"score_ema": self._score_ema, "num_updates": self.num_updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._score_ema = torch.as_tensor(state["score_ema"])
        self.num_updates = int(state["num_updates"])

    def _features(self, logps: Logps) -> dict[str, Tensor]:
        """Return the features that are used, checked; all processes return the same names."""
        given, (batch, num_negatives) = logps.features, logps.rejected.shape
        used = {}
        if self.share_ratio > 0:
            used["users"] = self._needed(given, SIMILARITIES[self.similarity], "share_ratio")
            _check_users(used["users"], batch, SIMILARITIES[self.similarity])
        if self.alpha > 0:
            used["scores"] = self._needed(given, "negative_scores", "alpha")
            _check_shape("negative_scores", used["scores"], (batch, num_negatives))
            check_values("negative_scores", used["scores"])
        if "ids" in given:
            used["ids"] = given["ids"]
        if self.exclude_items and "chosen_items" in given and "rejected_items" in given:
            used["rejected_items"] = given["rejected_items"]
            _check_shape("rejected_items", used["rejected_items"], (batch, num_negatives))
            _check_shape("chosen_items", given["chosen_items"], (batch,))
            seen = [given["chosen_items"].unsqueeze(1)]
            if "history_items" in given:
                seen.append(given["history_items"])
            used["seen_items"] = torch.cat(seen, 1)
        return {name: value.detach() for name, value in used.items()}

    def _needed(self, features: Mapping[str, Tensor], name: str, option: str) -> Tensor:
        if name not in features:
            raise ValueError(
                f"NAPO needs the feature {name!r} unless {option}=0, got {sorted(features)}; see annotate_dataset"
            )
        return features[name]

    def _index(self, features: Mapping[str, Tensor], num_users: int, device: torch.device) -> Tensor:
        if "users" not in features:
            return torch.empty(num_users, 0, dtype=torch.long, device=device)
        return shared_negative_index(features["users"], features.get("ids"), share_ratio=self.share_ratio)

    def _keep(self, features: Mapping[str, Tensor], index: Tensor, rejected: Tensor) -> Tensor:
        """Return which negatives of the pools (N, K (1 + T)) count: all own ones, and others that the user hasn't seen."""
        own = torch.ones_like(rejected, dtype=torch.bool)
        if "seen_items" not in features:
            return torch.cat([own, own[index].flatten(1)], 1)
        borrowed = features["rejected_items"][index].flatten(1)
        seen = features["seen_items"].masked_fill(features["seen_items"] == NO_ITEM, NO_ITEM - 1)
        return torch.cat([own, ~(borrowed.unsqueeze(2) == seen.unsqueeze(1)).any(2)], 1)

    def _gamma(
        self, features: Mapping[str, Tensor], index: Tensor, keep: Tensor, *, training: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the margin, the mean score of the pools, and the usual score; in training the latter moves first."""
        if "scores" not in features:
            zero = self._score_ema.to(index.device)
            return zero + self.gamma0, zero, zero
        scores = upcast(features["scores"])
        pool = torch.cat([scores, scores[index].flatten(1)], 1)
        mean = torch.where(keep, pool, 0.0).sum() / keep.sum()
        if training:
            self._score_ema = self.momentum * self._score_ema.to(mean.device) + (1 - self.momentum) * mean
            self.num_updates += 1
        usual = self._score_ema.to(mean.device)
        if self.debias:
            # Before the first batch there's nothing to compare with.
            usual = usual / (1 - self.momentum**self.num_updates) if self.num_updates else mean
        return _margin(mean, usual, self.gamma0, self.alpha), mean, usual


def _spliced(values: Tensor, start: int, context: LossContext) -> Tensor:
    """Return the values of all processes; those of this one keep their graph."""
    gathered = context.gather(values.detach())
    return torch.cat([gathered[:start], values, gathered[start + len(values) :]])


def _check_margin(gamma0: float, alpha: float, momentum: float) -> None:
    check_finite("gamma0", gamma0)
    check_not_negative("alpha", alpha)
    check_below_one("momentum", momentum)


def _check_batch(chosen_logps: Tensor, rejected_logps: Tensor) -> None:
    check_lists(chosen_logps, rejected_logps)
    check_values("chosen_logps", chosen_logps)
    check_values("rejected_logps", rejected_logps)


def _check_users(users: Tensor, batch: int, name: str) -> None:
    if users.ndim != 2 or len(users) != batch or not users.is_floating_point():
        raise ValueError(
            f"{name} must be floating of shape ({batch}, d), a row per user, got {users.dtype} of {tuple(users.shape)}"
        )
    check_values(name, users)


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")


# --- the small recommender ---------------------------------------------------------------------------------------------


class SASRec(nn.Module):
    r"""A self-attentive sequential recommender: who a user is, and how well each item would come next.

    $$u=\operatorname{LN}\big(\text{blocks}(E_{s}+P)\big)_{\text{last}},\qquad a_j=w_j^\top u+b_j$$

    Source: W.-C. Kang, J. McAuley, *Self-Attentive Sequential Recommendation*, ICDM 2018, arXiv:1808.09781, with a linear
    output layer as in NAPO's code. In each block queries are normalised, keys and values aren't.

    Args:
        num_items: Number of items; ids are 0..num_items-1, and `num_items` pads.
        hidden: Width, a multiple of `num_heads`.
        max_length: Most items of a sequence that are looked at, the last ones.
        num_blocks: Number of blocks, >= 1.
        num_heads: Number of attention heads, >= 1.
        dropout: Dropout rate in [0, 1).

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> import torch
        >>> from pref_opt.napo import SASRec
        >>> model = SASRec(20, hidden=8).eval()
        >>> user = model(model.pad([[3, 5, 7], [4]]))
        >>> user.shape, model.scores(user).shape
        (torch.Size([2, 8]), torch.Size([2, 20]))
    """

    def __init__(
        self,
        num_items: int,
        *,
        hidden: int = 64,
        max_length: int = 10,
        num_blocks: int = 1,
        num_heads: int = 1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        sizes = {"num_items": num_items, "hidden": hidden, "max_length": max_length, "num_blocks": num_blocks}
        for name, value in {**sizes, "num_heads": num_heads}.items():
            check_count(name, value)
        check_below_one("dropout", dropout)
        if hidden % num_heads:
            raise ValueError(f"hidden must be a multiple of num_heads={num_heads}, got {hidden}")
        self.num_items = num_items
        self.max_length = max_length
        self.item_embedding = nn.Embedding(num_items + 1, hidden)
        self.positions = nn.Embedding(max_length, hidden)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(hidden, num_heads, dropout) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(hidden)
        self.output = nn.Linear(hidden, num_items)

    def pad(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Return item ids (B, max_length) on the model's device: the last items, padded on the right.

        Raises:
            ValueError: If a sequence is empty or has an id outside 0..num_items-1.
        """
        device = self.item_embedding.weight.device
        return _padded(sequences, self.max_length, self.num_items, self.num_items).to(device)

    def hidden_states(self, items: Tensor) -> Tensor:
        """Return the hidden state (B, L, d) after each item of padded sequences (B, L)."""
        valid = (items != self.num_items).unsqueeze(2)
        x = self.item_embedding(items) + self.positions.weight[: items.shape[1]]
        x = self.dropout(x) * valid
        for block in self.blocks:
            x = block(x) * valid
        out: Tensor = self.norm(x)
        return out

    def forward(self, items: Tensor) -> Tensor:
        """Return the user vectors (B, d): hidden states after the last item of padded sequences (B, L)."""
        last = (items != self.num_items).sum(1).clamp_min(1) - 1
        states = self.hidden_states(items)
        return states[torch.arange(len(items), device=items.device), last]

    def scores(self, users: Tensor) -> Tensor:
        """Return the score (B, num_items) of every item as the next one, from user vectors (B, d)."""
        scores: Tensor = self.output(users)
        return scores


class _Block(nn.Module):
    """Causal self-attention and a position-wise network, each added to its input."""

    def __init__(self, hidden: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(hidden)
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.feed_norm = nn.LayerNorm(hidden)
        self.feed = nn.Sequential(
            nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, hidden), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        query = self.norm(x)
        # Sequences are padded on the right, so that the causal mask alone hides the padding from valid positions.
        parts = (self.query(query), self.key(x), self.value(x))
        q, k, v = (part.view(batch, length, self.num_heads, -1).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, hidden)
        x = query + mixed
        normed = self.feed_norm(x)
        out: Tensor = normed + self.feed(normed)
        return out


def train_sasrec(
    sequences: Sequence[Sequence[int]],
    num_items: int,
    *,
    hidden: int = 64,
    max_length: int = 10,
    num_blocks: int = 1,
    num_heads: int = 1,
    dropout: float = 0.1,
    epochs: int = 50,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> SASRec:
    r"""Train a `SASRec` to tell the next item from a random one, at every place of every sequence.

    $$\mathcal L=-\log\sigma(a_{\text{next}})-\log\sigma(-a_{\text{random}})$$

    Source: Kang and McAuley, 2018, section 3.6. Random items are drawn anew in every epoch, and may by chance be the next.

    Args:
        sequences: Items of each user, oldest first, at least two; of longer ones the last `max_length + 1` are used.
        num_items: Number of items.
        hidden: Width.
        max_length: Most items that are looked at.
        num_blocks: Number of blocks.
        num_heads: Number of attention heads.
        dropout: Dropout rate in [0, 1).
        epochs: Passes over the sequences, >= 1.
        batch_size: Sequences per step, >= 1.
        learning_rate: Of AdamW, > 0.
        weight_decay: Of AdamW, >= 0.
        seed: Of the parameters, the order and the random items; the global generator is left as it was.
        device: Where to train.

    Returns:
        The model in evaluation mode, without gradients.

    Raises:
        ValueError: If a sequence is shorter than two items, an id is outside 0..num_items-1, or a number is out of range.

    Examples:
        >>> from pref_opt.napo import train_sasrec
        >>> model = train_sasrec([[0, 1, 2, 3], [1, 2, 3, 0]] * 8, 4, hidden=16, epochs=40, learning_rate=1e-2)
        >>> model.scores(model(model.pad([[0, 1]]))).argmax(1)
        tensor([2])
    """
    check_count("epochs", epochs)
    check_count("batch_size", batch_size)
    check_positive("learning_rate", learning_rate)
    check_not_negative("weight_decay", weight_decay)
    check_count("num_items", num_items)
    check_count("max_length", max_length)
    short = next((i for i, sequence in enumerate(sequences) if len(sequence) < 2), None)
    if short is not None or not len(sequences):
        where = "none" if short is None else f"{len(sequences[short])} in sequence {short}"
        raise ValueError(f"sequences must have at least 2 items each, got {where}")
    items = _padded(sequences, max_length + 1, num_items, num_items).to(device)
    cuda = [items.device] if items.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        model = SASRec(
            num_items,
            hidden=hidden,
            max_length=max_length,
            num_blocks=num_blocks,
            num_heads=num_heads,
            dropout=dropout,
        ).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
        for _ in range(epochs):
            for rows in torch.randperm(len(items)).split(batch_size):  # type: ignore[no-untyped-call]
                optimizer.zero_grad()
                _next_item_loss(model, items[rows.to(items.device)]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    return model.eval().requires_grad_(False)


def _next_item_loss(model: SASRec, items: Tensor) -> Tensor:
    inputs, following = items[:, :-1], items[:, 1:]
    valid = following != model.num_items
    states = model.hidden_states(inputs)[valid]
    positive = following[valid]
    other = torch.randint(model.num_items, positive.shape).to(items.device)
    weight, bias = model.output.weight, model.output.bias
    up = (states * weight[positive]).sum(1) + bias[positive]
    down = (states * weight[other]).sum(1) + bias[other]
    return (F.softplus(-up) + F.softplus(down)).mean()


def _padded(sequences: Sequence[Sequence[int]], length: int, num_items: int, padding: int) -> Tensor:
    """Return the last items of each sequence (B, length), padded on the right."""
    rows = []
    for i, sequence in enumerate(sequences):
        last = [int(item) for item in sequence][-length:]
        wrong = next((item for item in last if not 0 <= item < num_items), None)
        if wrong is not None or not last:
            got = "an empty sequence" if wrong is None else wrong
            raise ValueError(f"items must be ids in [0, {num_items}), at least one per sequence, got {got} in row {i}")
        rows.append(last + [padding] * (length - len(last)))
    return torch.tensor(rows, dtype=torch.long)


def annotate_dataset(dataset: Any, sasrec: SASRec, *, batch_size: int = 1024) -> Any:
    r"""Add to a data set what NAPO asks a small recommender for.

    $$u_i=\operatorname{SASRec}(s_i),\qquad a_{ij}=w_j^\top u_i+b_j$$

    Source: the authors' data preparation.

    Args:
        dataset: `datasets.Dataset` with the columns `history_items` (list of ids, oldest first), `chosen_items` (id) and
            `rejected_items` (list of ids, as many and in the same order as `rejected`).
        sasrec: Trained model.
        batch_size: Rows per forward pass, >= 1.

    Returns:
        A data set with the new columns `user_embeddings` (hidden state of the model), `avg_item_embeddings` (mean of the
        history's item vectors), `negative_scores`, and `ids` (row numbers) if there were none. `history_items` keeps the last
        `max_length` items and is padded with -1, so that all rows are equally long.

    Raises:
        ValueError: If a column is missing or an id is unknown to the model.

    Examples:
        >>> from datasets import Dataset
        >>> from pref_opt.napo import SASRec, annotate_dataset
        >>> rows = [{"history_items": [1, 2], "chosen_items": 3, "rejected_items": [0, 4]}]
        >>> annotated = annotate_dataset(Dataset.from_list(rows), SASRec(5, hidden=8, max_length=3).eval())
        >>> annotated[0]["history_items"], len(annotated[0]["user_embeddings"]), len(annotated[0]["negative_scores"])
        ([1, 2, -1], 8, 2)
    """
    check_count("batch_size", batch_size)
    missing = {"history_items", "chosen_items", "rejected_items"} - set(dataset.column_names)
    if missing:
        raise ValueError(f"dataset must have the columns {sorted(missing)}, got {sorted(dataset.column_names)}")
    histories, rejected = list(dataset["history_items"]), list(dataset["rejected_items"])
    _check_items("rejected_items", rejected, sasrec.num_items)
    _check_items("chosen_items", [[item] for item in dataset["chosen_items"]], sasrec.num_items)
    histories = [[item for item in history if item != NO_ITEM] for history in histories]
    padded = _padded(histories, sasrec.max_length, sasrec.num_items, sasrec.num_items)
    columns: dict[str, list[Any]] = {"user_embeddings": [], "avg_item_embeddings": [], "negative_scores": []}
    training = sasrec.training
    sasrec.eval()
    for start in range(0, len(padded), batch_size):
        items = padded[start : start + batch_size].to(sasrec.item_embedding.weight.device)
        for name, value in _annotations(sasrec, items, rejected[start : start + batch_size]).items():
            columns[name] += value
    sasrec.train(training)
    columns["history_items"] = padded.masked_fill(padded == sasrec.num_items, NO_ITEM).tolist()
    if "ids" not in dataset.column_names:
        columns["ids"] = list(range(len(padded)))
    for name, values in columns.items():
        if name in dataset.column_names:
            dataset = dataset.remove_columns(name)
        dataset = dataset.add_column(name, values)
    return dataset


@torch.no_grad()
def _annotations(sasrec: SASRec, items: Tensor, rejected: Sequence[Sequence[int]]) -> dict[str, list[Any]]:
    users = sasrec(items)
    scores = sasrec.scores(users).cpu()
    valid = (items != sasrec.num_items).unsqueeze(2)
    average = (sasrec.item_embedding(items) * valid).sum(1) / valid.sum(1)
    return {
        "user_embeddings": users.tolist(),
        "avg_item_embeddings": average.tolist(),
        "negative_scores": [row[list(items)].tolist() for row, items in zip(scores, rejected, strict=True)],
    }


def _check_items(name: str, rows: Sequence[Sequence[int]], num_items: int) -> None:
    for i, row in enumerate(rows):
        for item in row:
            if not 0 <= item < num_items:
                raise ValueError(f"{name} must be ids in [0, {num_items}), got {item} in row {i}")


# --- evaluation --------------------------------------------------------------------------------------------------------


def hit_ratio_at_1(
    outputs: Sequence[str],
    candidates: Sequence[Sequence[str]],
    targets: Sequence[str],
    *,
    match: Literal["substring", "exact"] = "substring",
) -> dict[str, float]:
    r"""Count how often generated text names the right candidate, and only that.

    $$\text{HR@1}=\frac1N\sum_i\mathbb 1[\text{output }i\text{ names exactly one candidate, and it is the target}]$$

    Source: the evaluation of S-DPO and NAPO. With `"substring"`, as there, a title that is part of another one ("Air" in
    "Airbag") makes the longer one invalid where both are candidates.

    Args:
        outputs: Generated texts without their prompts (N).
        candidates: Titles that could be chosen, per row.
        targets: Right titles (N), each among the candidates of its row.
        match: `"substring"`: the title occurs in the output; `"exact"`: it is the output, apart from space around it.

    Returns:
        `hit_ratio`, and `valid_ratio`, the share of the outputs that name exactly one candidate.

    Raises:
        ValueError: If the lengths differ, there are no rows, a target isn't a candidate, or `match` is unknown.

    Examples:
        >>> from pref_opt.napo import hit_ratio_at_1
        >>> candidates = [["Queen", "Air"]] * 4
        >>> hit_ratio_at_1(["Queen", "Air", "Queen or Air", "?"], candidates, ["Queen"] * 4)
        {'hit_ratio': 0.25, 'valid_ratio': 0.5}
    """
    check_choice("match", match, ("substring", "exact"))
    if not len(outputs) == len(candidates) == len(targets) or not len(outputs):
        sizes = f"{len(outputs)}, {len(candidates)} and {len(targets)}"
        raise ValueError(f"outputs, candidates and targets must have the same length of at least 1, got {sizes}")
    hits = valid = 0
    for i, (output, titles, target) in enumerate(zip(outputs, candidates, targets, strict=True)):
        if target not in titles:
            raise ValueError(f"targets must be among the candidates, got {target!r} in row {i}")
        named = [title for title in titles if (title in output if match == "substring" else title == output.strip())]
        valid += len(named) == 1
        hits += named == [target]
    return {"hit_ratio": hits / len(outputs), "valid_ratio": valid / len(outputs)}


def popularity_bias(
    recommended: Sequence[int], histories: Sequence[Sequence[int]], popularity: Mapping[int, float]
) -> dict[str, float]:
    r"""Compare how popular the recommended items are with what the users had before.

    $$\text{mean}=\frac1N\sum_ip(r_i),\qquad\text{ratio}=\text{mean}\Big/\frac1N\sum_i\frac1{|s_i|}\sum_{j\in s_i}p(j)$$

    Source: own definition; the paper reports popularity bias without a formula that could be read. A ratio above 1 means
    that recommendations are more popular than the histories.

    Args:
        recommended: One item per user (N).
        histories: Items of each user (N), at least one.
        popularity: Number of interactions of each item, >= 0.

    Returns:
        `mean_popularity` and `popularity_ratio`.

    Raises:
        ValueError: If the lengths differ, there are no users, an item's popularity is unknown, a history is empty, or no
            item of any history has a popularity above 0.

    Examples:
        >>> from pref_opt.napo import popularity_bias
        >>> popularity_bias([0, 0], [[1], [0, 1]], {0: 9.0, 1: 3.0})
        {'mean_popularity': 9.0, 'popularity_ratio': 2.0}
    """
    if len(recommended) != len(histories) or not len(recommended):
        sizes = f"{len(recommended)} and {len(histories)}"
        raise ValueError(f"recommended and histories must have the same length of at least 1, got {sizes}")
    if not all(len(history) for history in histories):
        raise ValueError("histories must have at least one item each, got an empty one")
    unknown = {item for items in (recommended, *histories) for item in items} - set(popularity)
    if unknown:
        raise ValueError(f"popularity must have every item, got none for {min(unknown)}")
    mean = sum(popularity[item] for item in recommended) / len(recommended)
    before = sum(sum(popularity[item] for item in history) / len(history) for history in histories) / len(histories)
    if not before > 0:
        raise ValueError(f"popularity of the histories must be above 0, got a mean of {before!r}")
    return {"mean_popularity": mean, "popularity_ratio": mean / before}
