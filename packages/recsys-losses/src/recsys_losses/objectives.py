r"""What one training step minimises: a loss, where its negatives come from, and the L2 term.

`LossConfig` names a loss and its options. An objective draws the batches of an epoch and turns one into a loss: it looks
up only the rows a batch needs, makes their scores, and calls the loss function of the method's module.

Batches and everything that couples rows (in-batch negatives, groups of a user, hardest cycles) are defined for the whole
batch, whatever the number of processes: every process draws the same batch from an equally seeded generator and computes
its share of the rows; rows of the others are gathered with their gradients.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from recsys_losses._checks import check_choice
from recsys_losses._distributed import Shard, gather_rows
from recsys_losses._loss_config import L2_ON, LOSSES, NEGATIVES, POINTWISE, L2On, LossConfig, draws_of
from recsys_losses.adap_tau import AdaptiveTemperature, adap_tau_loss
from recsys_losses.baselines import bce_loss, bpr_loss, softmax_loss
from recsys_losses.blocked import blocked_log_sum_exp, blocked_scores
from recsys_losses.bsl import bilateral_softmax_loss, bsl_loss, grouped_log_mean_exp
from recsys_losses.cpr import CPRLoss, CPRSampler, cpr_loss, cpr_scores
from recsys_losses.models import MatrixFactorization, Recommender
from recsys_losses.sampling import (
    PopularityNegativeSampler,
    UniformNegativeSampler,
    in_batch_log_q,
    item_counts,
)
from recsys_losses.ssm import in_batch_ssm_loss, sampled_softmax_loss, ssm_loss

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from recsys_losses._interactions import InteractionData

__all__ = ["L2_ON", "LOSSES", "NEGATIVES", "CPRObjective", "LossConfig", "PairObjective", "StepLoss", "make_objective"]

# Elements of negatives drawn at once: enough to hide the cost of a call, few enough for the cache.
_DRAWN_AT_ONCE = 1 << 18


class PairBatch(NamedTuple):
    """Positive pairs of a whole batch: users (B,), items (B,), and drawn negatives (N,), (B, N) or None."""

    user: Tensor
    item: Tensor
    negative: Tensor | None
    size: int


class StepLoss(NamedTuple):
    """This process's part of the mean loss and of the L2 term; both add up over processes."""

    loss: Tensor
    penalty: Tensor | None

    def total(self) -> Tensor:
        """Return what is differentiated."""
        return self.loss if self.penalty is None else self.loss + self.penalty


class PairObjective:
    """Every loss over positive pairs (all but cpr).

    Args:
        config: The loss.
        data: What is trained on; only `train` is used.
        batch_size: Rows B of a whole batch.
        l2: Coefficient of the L2 term.
        l2_on: Which embeddings it counts, see `recsys_losses.training.fit`.
        generator: Source of shuffles, negatives and dropout, on `device`.
        device: Where batches are drawn.
        shard: This process among those that train together.
    """

    def __init__(
        self,
        config: LossConfig,
        data: InteractionData,
        *,
        batch_size: int,
        l2: float,
        l2_on: L2On,
        generator: torch.Generator,
        device: torch.device,
        shard: Shard = Shard(),  # noqa: B008  # immutable
    ) -> None:
        self.config, self.batch_size, self.l2, self.l2_on = config, batch_size, l2, l2_on
        self.generator, self.shard = generator, shard
        self.num_users, self.num_items = data.num_users, data.num_items
        self.user, self.item = data.train.to(device).contiguous()
        self.similarity = config.similarity or ("dot" if config.name in POINTWISE else "cosine")
        self.draws = draws_of(config)
        self._sampler = self._make_sampler(data.train.to(device))
        self._log_q = self._make_log_q(data.train.to(device))
        self.temperature: AdaptiveTemperature | None = None
        if config.name == "adap-tau":
            self.temperature = AdaptiveTemperature(
                data.train.to(device),
                data.num_users,
                data.num_items,
                beta=config.beta,
                center="mean" if config.center == "none" else config.center,
                quantile=config.quantile,
                warmup_epochs=config.warmup_epochs,
                personalised=config.center != "none",
            )

    @property
    def rows_per_epoch(self) -> int:
        """Positive pairs that an epoch trains on."""
        return len(self.user)

    def start_epoch(self, epoch: int, model: Recommender) -> dict[str, float]:
        """Renew what is renewed once per epoch and return what is worth recording."""
        if self.temperature is None:
            return {}
        with torch.no_grad():
            self.temperature.start_epoch(epoch, *model.embeddings())
        return {"inv_tau0": float(self.temperature.inv_tau0)}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state to resume from."""
        if self.temperature is None:
            return {}
        self.temperature.synchronize()
        return dict(self.temperature.state_dict())

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Resume from `state_dict`."""
        if self.temperature is not None:
            self.temperature.load_state_dict(state)

    def batches(self) -> Iterator[PairBatch]:
        """Yield the batches of one epoch: all pairs once, shuffled, the last batch short."""
        order = self._order()
        user, item = self.user.index_select(0, order), self.item.index_select(0, order)
        size = self.batch_size
        steps = self._steps_drawn_at_once()
        for start in range(0, len(user), steps * size):
            users, items = user[start : start + steps * size], item[start : start + steps * size]
            negatives = self._negatives(users)
            for step, first in enumerate(range(0, len(users), size)):
                row = slice(first, first + size)
                negative = negatives
                if negatives is not None:
                    negative = negatives[step] if self.draws.shared else negatives[row]
                yield PairBatch(users[row], items[row], negative, min(size, len(users) - first))

    def __call__(self, batch: PairBatch, model: Recommender) -> StepLoss:
        """Return the loss of our rows, as a part of the mean over the batch."""
        user_table, item_table = model.training_embeddings(self.generator)
        user_id, item_id = self.shard.take(batch.user), self.shard.take(batch.item)
        keep = model.user_keep_mask(batch.size, self.generator)
        valid = self.shard.valid(batch.size)
        if self.config.negatives == "in-batch" and batch.size == 1:  # no other row, nothing to compare with
            return StepLoss((user_table.sum() + item_table.sum()) * 0.0, None)
        if self.config.name in POINTWISE and not self.draws.shared:
            count = self._counts_rows(model)
            row_loss, squares = self._few_negatives(batch, user_id, item_id, user_table, item_table, keep, count=count)
        else:
            user = user_table.index_select(0, user_id)
            item = item_table.index_select(0, item_id)
            squares = self._squares(batch, user[:valid], item[:valid], item_table) if self._counts_rows(model) else None
            if keep is not None:
                user = user * self.shard.take(keep)
            row_loss = self._softmax_rows(batch, user_id, item_id, user, item, item_table)
        loss = row_loss.mean() if self.shard.world == 1 else row_loss[:valid].sum() / batch.size
        return StepLoss(loss, self._penalty(batch, model, user_id[:valid], item_id[:valid], squares))

    # --- batches -----------------------------------------------------------------------------------------------------

    def _order(self) -> Tensor:
        """Return the order of the pairs in an epoch."""
        device = self.user.device
        order = torch.randperm(len(self.user), generator=self.generator, device=device)
        if not self.config.group_by_user:
            return order
        place = torch.randperm(self.num_users, generator=self.generator, device=device)
        return order[torch.argsort(place[self.user[order]], stable=True)]

    def _steps_drawn_at_once(self) -> int:
        if self._sampler is None:
            return -(-len(self.user) // self.batch_size)
        per_step = self.draws.number if self.draws.shared else self.draws.number * self.batch_size
        return max(1, _DRAWN_AT_ONCE // per_step)

    def _make_sampler(self, train: Tensor) -> UniformNegativeSampler | PopularityNegativeSampler | None:
        if self.config.negatives == "uniform":
            return UniformNegativeSampler(
                self.num_items,
                exclude=train if self.draws.exclude else None,
                shared=self.draws.shared,
                generator=self.generator,
            )
        if self.config.negatives == "popularity":
            return PopularityNegativeSampler(
                item_counts(train, self.num_items),
                beta=self.config.popularity_beta,
                shared=self.draws.shared,
                generator=self.generator,
            )
        return None

    def _make_log_q(self, train: Tensor) -> Tensor | None:
        """Return log q of every item, (I,), where the correction is on."""
        if not self.config.logq:
            return None
        if isinstance(self._sampler, PopularityNegativeSampler):
            return self._sampler.log_prob(torch.arange(self.num_items, device=train.device))
        return in_batch_log_q(item_counts(train, self.num_items))

    def _negatives(self, user: Tensor) -> Tensor | None:
        """Draw for several batches at once: (steps, N) if shared, (rows, N) otherwise."""
        if self._sampler is None:
            return None
        if not self.draws.shared:
            return self._sampler.sample(user, self.draws.number)
        steps = -(-len(user) // self.batch_size)
        return self._sampler.sample(user, steps * self.draws.number).view(steps, self.draws.number)

    # --- scores and losses -------------------------------------------------------------------------------------------

    def _few_negatives(
        self,
        batch: PairBatch,
        user_id: Tensor,
        item_id: Tensor,
        user_table: Tensor,
        item_table: Tensor,
        keep: Tensor | None,
        *,
        count: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return row losses of bpr and bce with own negatives, and the sum of squares: one lookup for all items."""
        assert batch.negative is not None  # noqa: S101  # these losses sample
        negative = self.shard.take(batch.negative)
        item_ids = torch.cat([item_id.unsqueeze(0), negative.T])
        user = user_table.index_select(0, user_id)
        item = item_table.index_select(0, item_ids.view(-1))
        squares = None
        if count:
            valid = self.shard.valid(batch.size)
            rows = item if self.shard.world == 1 else item.view(*item_ids.shape, -1)[:, :valid]
            squares = _sum_of_squares(user[:valid]) + _sum_of_squares(rows)
        if keep is not None:
            user = user * self.shard.take(keep)
        user, item = self._as_scored(user), self._as_scored(item)
        scores = torch.linalg.vecdot(item.view(*item_ids.shape, -1), user)
        return self._pointwise(scores[0], scores[1:].T), squares

    def _pointwise(self, pos: Tensor, neg: Tensor) -> Tensor:
        if self.config.name == "bpr":
            return bpr_loss(pos, neg.squeeze(1), reduction="none")
        return bce_loss(pos, neg, reduction="none")

    def _softmax_rows(
        self, batch: PairBatch, user_id: Tensor, item_id: Tensor, user: Tensor, item: Tensor, item_table: Tensor
    ) -> Tensor:
        """Return row losses (P,) from embeddings (P, d)."""
        config = self.config
        if config.negatives == "all":
            return self._whole_catalogue(batch, user_id, item_id, user, item_table)
        if config.negatives == "in-batch" and config.name == "ssm" and self.shard.world == 1:
            return in_batch_ssm_loss(
                user,
                item,
                temperature=config.temperature,
                similarity=self.similarity,
                log_q=self._log_q_of(item_id),
                item_id=item_id if config.mask_accidental else None,
                reduction="none",
            )
        if batch.negative is not None and config.name == "ssm" and self.draws.shared:
            return ssm_loss(
                user,
                item,
                item_table.index_select(0, batch.negative),
                temperature=config.temperature,
                similarity=self.similarity,
                pos_log_q=self._log_q_of(item_id),
                neg_log_q=self._log_q_of(batch.negative),
                neg_mask=batch.negative != item_id[:, None] if config.mask_accidental else None,
                reduction="none",
            )
        user, item = self._as_scored(user), self._as_scored(item)
        pos = (user * item).sum(1)
        if batch.negative is None:
            items = gather_rows(item, batch.size, self.shard)
            first = self.shard.rank * self.shard.share(batch.size)
            neg, neg_id = user @ items.T, batch.item
            neg, neg_id = _other_columns(neg, first), _other_columns(neg_id.expand(len(user), -1), first)
        else:
            neg_id = batch.negative if self.draws.shared else self.shard.take(batch.negative)
            neg = self._sampled_scores(user, neg_id, item_table)
        hidden = neg_id == item_id[:, None] if config.mask_accidental else None
        neg_log_q = self._log_q_of(neg_id)
        if config.name == "ssm":
            return sampled_softmax_loss(
                pos,
                neg,
                temperature=config.temperature,
                pos_log_q=self._log_q_of(item_id),
                neg_log_q=neg_log_q,
                neg_mask=None if hidden is None else ~hidden,
                reduction="none",
            )
        if neg_log_q is not None:
            neg = neg - self._neg_temperature * neg_log_q
        if hidden is not None:
            # A row without any other negative keeps them: the sum over none has no logarithm.
            neg = neg.masked_fill(hidden & ~hidden.all(1, keepdim=True), -torch.inf)
        return self._row_loss(batch, user_id, pos, neg)

    def _log_q_of(self, item: Tensor) -> Tensor | None:
        return None if self._log_q is None else self._log_q[item]

    def _sampled_scores(self, user: Tensor, neg_id: Tensor, item_table: Tensor) -> Tensor:
        """Return the scores (P, N) of drawn items, (N,) or (P, N)."""
        if neg_id.ndim == 1:
            return user @ self._as_scored(item_table.index_select(0, neg_id)).T
        rows, count = neg_id.shape
        if 4 * count >= self.num_items:  # a product with the table is cheaper than so many lookups
            return (user @ self._as_scored(item_table).T).gather(1, neg_id)
        table_first = rows * count >= self.num_items
        source = self._as_scored(item_table) if table_first else item_table
        item = source.index_select(0, neg_id.reshape(-1))
        item = (item if table_first else self._as_scored(item)).view(rows, count, -1)
        return torch.bmm(item, user.unsqueeze(2)).squeeze(2)

    def _row_loss(self, batch: PairBatch, user_id: Tensor, pos: Tensor, neg: Tensor) -> Tensor:
        """Return the row losses of given scores, (P,) and (P, N)."""
        config = self.config
        if config.name in POINTWISE:
            return self._pointwise(pos, neg)
        if config.name == "softmax":
            return softmax_loss(pos, neg, temperature=config.temperature, reduction="none")
        if self.temperature is not None:
            self._observe(batch, user_id, pos, neg)
            return adap_tau_loss(
                pos, neg, self.temperature(user_id), inv_tau_pos=self.temperature.inv_tau0, reduction="none"
            )
        if config.name == "bsl":
            pos, group = self._grouped(batch, user_id, pos, config.temperature, on=config.bsl_mode == "multi")
            return bsl_loss(
                pos,
                neg,
                group,
                temperature=config.temperature,
                power=config.power,
                mode=config.bsl_mode,
                reduction="none",
            )
        pos, group = self._grouped(batch, user_id, pos, self._tau_pos, on=True)
        return bilateral_softmax_loss(
            pos, neg, group, tau_pos=self._tau_pos, tau_neg=self._neg_temperature, reduction="none"
        )

    def _whole_catalogue(
        self, batch: PairBatch, user_id: Tensor, item_id: Tensor, user: Tensor, item_table: Tensor
    ) -> Tensor:
        """Return row losses with all (other) items as negatives, whose log-sum-exp stands for N scores."""
        config = self.config
        if self.temperature is not None:
            return self._whole_catalogue_adaptive(batch, user_id, item_id, user, item_table)
        tau = self._neg_temperature
        lse, pos = blocked_scores(
            user,
            item_table,
            item_id,
            temperature=tau,
            include_positive=config.name == "ssm",
            similarity=self.similarity,
        )
        if config.name == "ssm":
            # The positive is in the sum already.
            return sampled_softmax_loss(
                pos, (tau * lse)[:, None], temperature=tau, include_positive=False, reduction="none"
            )
        if config.name == "bilateral" or (config.name == "bsl" and config.bsl_mode != "reweight"):
            lse = lse - math.log(self.num_items - 1)  # their negative part is a mean
        return self._row_loss(batch, user_id, pos, (tau * lse)[:, None])

    def _whole_catalogue_adaptive(
        self, batch: PairBatch, user_id: Tensor, item_id: Tensor, user: Tensor, item_table: Tensor
    ) -> Tensor:
        """Return the row losses of adap-tau: one log-sum-exp at each user's temperature, one at 1 to observe."""
        assert self.temperature is not None  # noqa: S101
        user, items = F.normalize(user, dim=1), F.normalize(item_table, dim=1)
        pos = (user * items.index_select(0, item_id)).sum(1)
        inv_tau = self.temperature(user_id).to(user.dtype)
        with torch.no_grad():
            unit = blocked_log_sum_exp(user, items, exclude=item_id)
            self._observe(batch, user_id, pos, unit[:, None])
        lse = blocked_log_sum_exp(user * inv_tau[:, None], items, exclude=item_id)
        return adap_tau_loss(
            pos, (lse / inv_tau)[:, None], inv_tau, inv_tau_pos=self.temperature.inv_tau0, reduction="none"
        )

    def _observe(self, batch: PairBatch, user_id: Tensor, pos: Tensor, neg: Tensor) -> None:
        valid = self.shard.valid(batch.size)
        if self.temperature is not None and valid > 0:
            self.temperature.observe(user_id[:valid], pos.detach()[:valid], neg.detach()[:valid])

    def _grouped(
        self, batch: PairBatch, user_id: Tensor, pos: Tensor, tau: float, *, on: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return positive scores and group ids whose groups are those of the whole batch.

        In a single process the loss groups the rows itself. Otherwise a group may have rows elsewhere: its soft mean
        score takes the place of the row's score, and every row is a group of its own.
        """
        if self.shard.world == 1 or not on:
            return pos, user_id
        everyone = gather_rows(pos, batch.size, self.shard)
        mean = self.shard.take(tau * grouped_log_mean_exp(everyone / tau, batch.user))
        return mean, torch.arange(len(pos), device=pos.device)

    @property
    def _neg_temperature(self) -> float:
        return (
            self.config.tau_neg or self.config.temperature
            if self.config.name == "bilateral"
            else self.config.temperature
        )

    @property
    def _tau_pos(self) -> float:
        return self.config.tau_pos or self.config.temperature

    def _as_scored(self, rows: Tensor) -> Tensor:
        return F.normalize(rows, dim=-1) if self.similarity == "cosine" else rows

    # --- L2 ----------------------------------------------------------------------------------------------------------

    def _counts_rows(self, model: Recommender) -> bool:
        """Whether the L2 term counts the rows that the scores look up."""
        return self.l2 > 0 and (self.l2_on == "output" or (self.l2_on == "layer0" and _is_flat(model)))

    def _squares(self, batch: PairBatch, user: Tensor, item: Tensor, item_table: Tensor) -> Tensor:
        squares = _sum_of_squares(user) + _sum_of_squares(item)
        if batch.negative is None or (self.l2_on == "layer0" and self.config.name not in POINTWISE):
            return squares
        return squares + self._negative_squares(batch, item_table)

    def _negative_squares(self, batch: PairBatch, item_table: Tensor) -> Tensor:
        """Return the sum of squares of our drawn negatives, repetitions counted; shared ones are shared out."""
        assert batch.negative is not None  # noqa: S101
        share = 1.0
        negative = batch.negative
        if self.draws.shared:
            share = 1 / self.shard.world
        else:
            negative = self.shard.take(negative)[: self.shard.valid(batch.size)]
        norms = item_table.square().sum(1)
        return share * norms.index_select(0, negative.reshape(-1)).sum()

    def _penalty(
        self, batch: PairBatch, model: Recommender, user_id: Tensor, item_id: Tensor, squares: Tensor | None
    ) -> Tensor | None:
        """Return our part of the L2 term."""
        if self.l2 == 0:
            return None
        if self.l2_on == "table":
            return _table_penalty(model, self.l2) / self.shard.world
        if self.l2_on == "layer0" and not _is_flat(model):
            user_table, item_table = model.base_embeddings()
            squares = self._squares(
                batch, user_table.index_select(0, user_id), item_table.index_select(0, item_id), item_table
            )
        assert squares is not None  # noqa: S101  # l2 > 0
        return squares * (self.l2 / (2 * batch.size))


class CPRBatch(NamedTuple):
    """Cycles `{k: (users, items)}`, (k, n_k) each, and how many are kept."""

    cycles: dict[int, tuple[Tensor, Tensor]]
    size: int


class CPRObjective:
    """Cross pairwise ranking, which draws its own batches of cycles.

    Args:
        config: The loss, named "cpr".
        data: What is trained on; only `train` is used.
        batch_size: Cycles kept per step.
        l2: Coefficient of the L2 term, counted on the whole tables.
        generator: Source of the cycles, on `device`.
        device: Where they are drawn.
        shard: This process among those that train together.
    """

    def __init__(
        self,
        config: LossConfig,
        data: InteractionData,
        *,
        batch_size: int,
        l2: float,
        generator: torch.Generator,
        device: torch.device,
        shard: Shard = Shard(),  # noqa: B008  # immutable
    ) -> None:
        self.l2, self.batch_size, self.generator, self.shard = l2, batch_size, generator, shard
        self.keep = batch_size if config.cpr_sample_rate > 1 else None
        self._loss = CPRLoss(self.keep)
        self._sampler = CPRSampler(
            data.train.to(device),
            data.num_users,
            data.num_items,
            batch_size=batch_size,
            sample_ratio=config.cpr_sample_ratio,
            max_k=config.cpr_max_k,
            sample_rate=config.cpr_sample_rate,
            generator=generator,
            device=device,
        )

    @property
    def rows_per_epoch(self) -> int:
        """Cycles that an epoch trains on."""
        return len(self._sampler) * self.batch_size

    def start_epoch(self, epoch: int, model: Recommender) -> dict[str, float]:
        """Nothing is renewed per epoch."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return nothing: the cycles depend on the generator alone."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Do nothing."""

    def batches(self) -> Iterator[CPRBatch]:
        """Yield the batches of one epoch."""
        for cycles in self._sampler:
            yield CPRBatch(cycles, self.batch_size)

    def __call__(self, batch: CPRBatch, model: Recommender) -> StepLoss:
        """Return the mean loss of the hardest cycles of the batch, or our part of it."""
        user_table, item_table = model.training_embeddings(self.generator)
        if self.shard.world == 1:
            loss = self._loss(batch.cycles, user_table, item_table)
        else:
            loss = self._shared_out(batch, user_table, item_table)
        return StepLoss(loss, _table_penalty(model, self.l2) / self.shard.world if self.l2 > 0 else None)

    def _shared_out(self, batch: CPRBatch, user_table: Tensor, item_table: Tensor) -> Tensor:
        """Return our part of the mean: margins are shared out and gathered, then the kept cycles are shared out."""
        shard = self.shard
        ours = {k: [part.T for part in pair] for k, pair in batch.cycles.items()}
        with torch.no_grad():
            margins = []
            for users, items in ours.values():
                margin = _cycle_margins(shard.take(users), shard.take(items), user_table, item_table)
                margins.append(gather_rows(margin, len(users), shard))
            margin = torch.cat(margins)
            count = len(margin) if self.keep is None else self.keep
            kept = margin.topk(count, largest=False).indices[shard.rank :: shard.world]
        parts, first = [], 0
        for users, items in ours.values():
            mine = kept[(kept >= first) & (kept < first + len(users))] - first
            first += len(users)
            parts.append(_cycle_margins(users[mine], items[mine], user_table, item_table))
        margin = torch.cat(parts)
        if len(margin) == 0:
            return (user_table.sum() + item_table.sum()) * 0.0
        return cpr_loss(margin, torch.zeros_like(margin), reduction="sum") / count


def _cycle_margins(users: Tensor, items: Tensor, user_table: Tensor, item_table: Tensor) -> Tensor:
    """Return the margins (n,) of cycles given row by row, (n, k)."""
    pos, neg = cpr_scores(F.embedding(users.T, user_table), F.embedding(items.T, item_table))
    return pos - neg


def make_objective(
    config: LossConfig,
    data: InteractionData,
    *,
    batch_size: int,
    l2: float,
    l2_on: L2On | None,
    generator: torch.Generator,
    device: torch.device,
    shard: Shard = Shard(),  # noqa: B008  # immutable
) -> PairObjective | CPRObjective:
    """Return the objective of a loss; see `PairObjective` and `CPRObjective` for the arguments.

    Raises:
        ValueError: If `l2_on` is unknown, or isn't "table" for cpr.
    """
    if l2_on is not None:
        check_choice("l2_on", l2_on, L2_ON)
    if config.name == "cpr":
        if l2_on not in (None, "table"):
            raise ValueError(f"loss 'cpr' counts l2 on the whole table: l2_on must be 'table', got {l2_on!r}")
        return CPRObjective(config, data, batch_size=batch_size, l2=l2, generator=generator, device=device, shard=shard)
    return PairObjective(
        config,
        data,
        batch_size=batch_size,
        l2=l2,
        l2_on=l2_on or "layer0",
        generator=generator,
        device=device,
        shard=shard,
    )


def _is_flat(model: Recommender) -> bool:
    """Whether the scoring tables are the base tables themselves."""
    return isinstance(model, MatrixFactorization)


def _sum_of_squares(x: Tensor) -> Tensor:
    flat = x.reshape(-1)
    return flat.dot(flat)


def _table_penalty(model: Recommender, l2: float) -> Tensor:
    """Return l2 times the mean squared norm of all rows of the base tables."""
    user_table, item_table = model.base_embeddings()
    rows = user_table.shape[0] + item_table.shape[0]
    return (_sum_of_squares(user_table) + _sum_of_squares(item_table)) * (l2 / rows)


def _other_columns(x: Tensor, first: int) -> Tensor:
    """Return (P, B) without the own column `first + b` of every row b, (P, B - 1); the others start after it."""
    rows, columns = x.shape
    if first:
        x = x.roll(-first, dims=1)
    # Without its first element the flat matrix is runs of B foreign elements, each followed by an own one.
    flat = x.reshape(-1)
    runs = (rows - 1) * (columns + 1)
    others = flat[1 : 1 + runs].view(rows - 1, columns + 1)[:, :-1].reshape(-1)
    if rows != columns:
        others = torch.cat([others, flat[1 + runs :]])
    return others.view(rows, columns - 1)
