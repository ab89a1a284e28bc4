"""The MCRL recommender: networks, the training loss of a batch, scores, and files."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from recsys_losses._checks import check_choice, check_finite, reduce
from recsys_losses._storage import read_tensors, write_tensors
from recsys_losses.mcrl._backbones import BackboneName, initialise, make_backbone
from recsys_losses.mcrl._buffer import pad_histories
from recsys_losses.mcrl._losses import (
    MCRLLoss,
    Parts,
    Weights,
    bellman,
    check_gamma,
    check_items,
    check_weights,
    sample_negative_actions,
    weighted_sum,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from recsys_losses.mcrl._buffer import Transitions

State = tuple["Tensor", "Tensor"]
Double = Literal["twin", "polyak"]
RankBy = Literal["q", "q+reward", "ce"]

_KIND = "recsys_losses mcrl model"
_DOUBLE = ("twin", "polyak")
_ROWS = 1024
_RANK_BY = ("q", "q+reward", "ce")


class Network(nn.Module):
    """An encoder with the heads of Q, of the reward model and of the transition model."""

    def __init__(self, backbone: str, num_items: int, hidden: int, state_size: int, dropout: float, ce: bool) -> None:
        super().__init__()
        self.backbone = make_backbone(backbone, num_items, hidden, state_size, dropout)
        self.q_head = nn.Linear(hidden, num_items)
        self.reward_head = nn.Linear(hidden, hidden, bias=False)
        self.transition_in = nn.Linear(2 * hidden, hidden)
        self.transition_out = nn.Linear(hidden, hidden)
        self.ce_head = nn.Linear(hidden, num_items) if ce else None

    @property
    def item_table(self) -> Tensor:
        """The item vectors e, (I + 1, d)."""
        return self.backbone.item_embedding.weight

    def rewards(self, state: Tensor, actions: Tensor) -> Tensor:
        """Return rho(s, a) for states (B, d) and actions (B, M), shape (B, M)."""
        vectors = F.embedding(actions, self.item_table)
        return torch.bmm(vectors, self.reward_head(state).unsqueeze(2)).squeeze(2)

    def all_rewards(self, state: Tensor) -> Tensor:
        """Return rho(s, .) for all items, shape (B, I)."""
        scores: Tensor = self.reward_head(state) @ self.item_table[:-1].T
        return scores

    def transitions(self, state: Tensor, actions: Tensor) -> Tensor:
        """Return T(s, a) = W_2 relu(W_1 [s; e_a] + b_1) + b_2 for actions (B, M), shape (B, M, d).

        W_1 falls apart into a part of the state, computed once per row, and one of the item: a look-up in the projected
        table where that is smaller than the actions, the projection of the vectors otherwise.
        """
        w_state, w_item = self.transition_in.weight.chunk(2, dim=1)
        if self.item_table.shape[0] <= actions.numel():
            item = F.embedding(actions, F.linear(self.item_table, w_item))
        else:
            item = F.linear(F.embedding(actions, self.item_table), w_item)
        first = F.linear(state, w_state, self.transition_in.bias).unsqueeze(1) + item
        out: Tensor = self.transition_out(first.relu())
        return out

    def scores(self, state: Tensor, rank_by: str, omega: float) -> Tensor:
        """Return what items are ranked by, (B, I)."""
        if rank_by == "ce":
            assert self.ce_head is not None  # noqa: S101  # MCRL checks it
            logits: Tensor = self.ce_head(state)
            return logits
        q: Tensor = self.q_head(state)
        return q if rank_by == "q" else q + omega * self.all_rewards(state)


class MCRL(nn.Module):
    r"""Sequential recommender with a conservative Q, a contrastive reward model and a contrastive transition model.

    $$Q(s,\cdot)=W_qs+b_q,\qquad\rho(s,a)=(W_rs)^\top e_a,\qquad T(s,a)=\mathrm{MLP}_2([s;e_a])$$

    With `double="twin"` there are two networks: a fair coin picks which one a step trains, the other one evaluates, and
    the mean of both serves. With `"polyak"` one network is trained at every step, against a copy that follows it slowly
    (`update_target`). Parts of weight 0 are not computed.

    Args:
        num_items: I, at least 2.
        backbone: `"gru4rec"`, `"caser"`, `"nextitnet"` or `"sasrec"`.
        hidden: Width d of item vectors and states.
        state_size: Items of a state.
        double: `"twin"` or `"polyak"`.
        gamma: Discount, in [0, 1].
        td_weight: Weight of the temporal-difference loss.
        cql_weight: Weight of the conservative loss; alone it makes a plain cross-entropy recommender.
        cql_temperature: Temperature of the conservative loss.
        reward_weight: Weight of the contrastive reward loss.
        transition_weight: Weight of the contrastive transition loss.
        temperature: Temperature of the two contrastive losses.
        num_negatives: K, at least 1.
        exclude_session: Never draw an item of the session as a negative; needs batches with `session_items`.
        reward_weighted: Weigh the rows of the reward loss by their reward over its mean in the batch.
        ce_weight: Weight of the cross-entropy of a second linear head; 0 leaves the head out.
        target_tau: Share of the trained network in an update of the copy (`"polyak"`), in (0, 1].
        rank_by: `"q"`, `"q+reward"` (adds `omega` times the reward model) or `"ce"` (the second head).
        omega: Weight of the reward model in `"q+reward"`.
        dropout: Dropout of Caser and SASRec, in [0, 1).
        seed: Seed of the parameters.

    Raises:
        ValueError: If an option is unknown or out of range.

    Source: our reading of the abstract of arXiv:2310.16566; states, rewards and twin networks as in SQN (Xin et al.,
    SIGIR 2020).

    Examples:
        >>> import torch
        >>> from recsys_losses.mcrl import ReplayBuffer
        >>> buffer = ReplayBuffer.from_sessions([[(4, False), (2, True), (1, False)]], state_size=3, num_items=6)
        >>> model = MCRL(6, hidden=8, state_size=3)
        >>> generator = torch.Generator().manual_seed(0)
        >>> model.loss(buffer.sample(4, generator), generator).loss.backward()
        >>> model.recommend([[4, 2], []], k=2).shape
        torch.Size([2, 2])
    """

    def __init__(
        self,
        num_items: int,
        backbone: BackboneName = "gru4rec",
        hidden: int = 64,
        state_size: int = 10,
        double: Double = "twin",
        *,
        gamma: float = 0.5,
        td_weight: float = 1.0,
        cql_weight: float = 1.0,
        cql_temperature: float = 1.0,
        reward_weight: float = 0.5,
        transition_weight: float = 0.5,
        temperature: float = 0.2,
        num_negatives: int = 10,
        exclude_session: bool = False,
        reward_weighted: bool = False,
        ce_weight: float = 0.0,
        target_tau: float = 0.005,
        rank_by: RankBy = "q",
        omega: float = 1.0,
        dropout: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._options = {
            name: value for name, value in locals().items() if name not in ("self", "__class__", "num_items", "seed")
        }
        if not num_items >= 2:
            raise ValueError(f"num_items must be >= 2, got {num_items!r}")
        if not num_negatives >= 1:
            raise ValueError(f"at least one negative is needed, got num_negatives={num_negatives!r}")
        if not 0 < target_tau <= 1:
            raise ValueError(f"target_tau must be in (0, 1], got {target_tau!r}")
        check_choice("double", double, _DOUBLE)
        check_choice("rank_by", rank_by, _RANK_BY)
        check_finite("ce_weight", ce_weight)
        check_finite("omega", omega)
        check_gamma(gamma)
        if rank_by == "ce" and ce_weight == 0:
            raise ValueError("rank_by='ce' needs a second head: ce_weight must not be 0")
        self.weights = Weights(td_weight, cql_weight, reward_weight, transition_weight, cql_temperature, temperature)
        check_weights(self.weights)
        self.num_items, self.hidden, self.state_size = num_items, hidden, state_size
        self.gamma, self.target_tau = gamma, target_tau
        self.num_negatives, self.exclude_session, self.reward_weighted = num_negatives, exclude_session, reward_weighted
        self.ce_weight, self.rank_by, self.omega = ce_weight, rank_by, omega
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            self.networks = nn.ModuleList(
                Network(backbone, num_items, hidden, state_size, dropout, ce_weight != 0)
                for _ in range(2 if double == "twin" else 1)
            )
        for network in self.networks:
            initialise(network, generator)
        self.target = copy.deepcopy(self.networks[0]).requires_grad_(False) if double == "polyak" else None

    def loss(self, batch: Transitions, generator: torch.Generator | None = None) -> MCRLLoss:
        """Return the loss of a batch, for one network of twins.

        Args:
            batch: Transitions, such as `ReplayBuffer.sample` draws.
            generator: Source of the coin, the negatives and dropout; torch's default one if None. One on the CPU never
                makes the CPU wait for a GPU.

        Returns:
            `loss` to minimise (with the cross-entropy of the second head in it) and the four parts. A part of weight 0
            isn't computed and is 0, except the conservative one.

        Raises:
            ValueError: If the states have another size, (on the CPU) a value is out of range, or `exclude_session` finds
                no `session_items` in the batch.
        """
        network, other = self._pick(generator)
        check_items("action", batch.action, self.num_items, rows=batch.items.shape[0])
        state = network.backbone(*batch.state, generator=generator)
        q = network.q_head(state)
        target, next_state = self._ahead(network, other, batch, generator)
        reward_scores, transitions = None, None
        if self.weights.reward != 0 or self.weights.transition != 0:
            actions = self._actions(batch, generator)
            if self.weights.reward != 0:
                rho = network.rewards(state, actions)
                reward_scores = rho[:, 0], rho[:, 1:]
            if next_state is not None and self.weights.transition != 0:
                predicted = network.transitions(state, actions)
                transitions = predicted[:, 0], predicted[:, 1:], next_state
        sample_weight = batch.reward / batch.reward.mean() if self.reward_weighted else None
        parts = Parts(q, batch.action, target, reward_scores, sample_weight, transitions)
        result = weighted_sum(parts, self.weights, "mean", q.dtype)
        if network.ce_head is None:
            return result
        cross_entropy = F.cross_entropy(network.ce_head(state).float(), batch.action)
        return result._replace(loss=result.loss + self.ce_weight * reduce(cross_entropy, "none", q.dtype))

    def update_target(self) -> None:
        """Move the copy of `"polyak"` towards the trained network; call it after every step. Twins need nothing."""
        if self.target is None:
            return
        with torch.no_grad():
            for ours, theirs in zip(self.target.parameters(), self.networks[0].parameters(), strict=True):
                ours.lerp_(theirs, self.target_tau)

    def q_values(self, state: State) -> Tensor:
        """Return Q of all items, the mean over twins.

        Args:
            state: Items int64 `(B, state_size)` and lengths int64 `(B,)`, such as `Transitions.state` or
                `pad_histories` gives.

        Returns:
            Shape `(B, I)`.

        Raises:
            ValueError: If a shape is wrong, or (on the CPU) a length or an item is out of range.
        """
        return self._mean_scores(state, "q")

    def scores(self, state: State) -> Tensor:
        """Return what items are ranked by, as `rank_by` says, the mean over twins, shape `(B, I)`."""
        return self._mean_scores(state, self.rank_by)

    @torch.no_grad()
    def recommend(self, sessions: Sequence[Sequence[int]], k: int) -> Tensor:
        """Return the k best items for each history, best first, without dropout.

        Args:
            sessions: Item ids per session, oldest first.
            k: Items per session, in 1..I. Items seen aren't removed.

        Returns:
            int64 `(n, k)`, on the CPU.

        Raises:
            ValueError: If `k` is out of range, there is no session, or an item is unknown.
        """
        if not 1 <= k <= self.num_items:
            raise ValueError(f"k must be in 1..{self.num_items} (the number of items), got {k!r}")
        items, length = pad_histories(sessions, self.state_size, self.num_items)
        device = next(self.parameters()).device
        starts = range(0, len(sessions), _ROWS)
        training = self.training
        self.eval()
        try:
            blocks = ((items[at : at + _ROWS].to(device), length[at : at + _ROWS].to(device)) for at in starts)
            best = [self.scores(state).topk(k).indices.cpu() for state in blocks]
        finally:
            self.train(training)
        return torch.cat(best)

    def options(self) -> dict[str, Any]:
        """Return the arguments it was made with, without the number of items and the seed."""
        return dict(self._options)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to a safetensors file, its options in the header.

        Args:
            path: File to write or to replace.
        """
        metadata = {"kind": _KIND, "version": 1, "num_items": self.num_items, "options": self.options()}
        write_tensors(path, self.state_dict(), metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> MCRL:
        """Read a model that `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged or holds something else.
        """
        tensors, metadata = read_tensors(path, _KIND)
        model = cls(metadata["num_items"], **metadata["options"])
        model.load_state_dict(tensors)
        return model.to(device)

    def _pick(self, generator: torch.Generator | None) -> tuple[Network, Network]:
        """Return the network to train and the one that evaluates."""
        first = self.networks[0]
        if self.target is not None:
            return first, self.target  # type: ignore[return-value]
        source = "cpu" if generator is None else generator.device
        pair = list(self.networks)
        trained = int(torch.randint(2, (), generator=generator, device=source))
        return pair[trained], pair[1 - trained]  # type: ignore[return-value]

    @torch.no_grad()
    def _ahead(
        self, network: Network, other: Network, batch: Transitions, generator: torch.Generator | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the double-Q target and the next state of the other network, where a loss needs them."""
        if self.weights.td == 0 and self.weights.transition == 0:
            return None, None
        next_state = other.backbone(*batch.next_state, generator=generator)
        if self.weights.td == 0:
            return None, next_state
        best = network.q_head(network.backbone(*batch.next_state, generator=generator)).argmax(1)
        # One value per row is needed of the other network: no product with all items.
        head = other.q_head
        value = (next_state * head.weight.index_select(0, best)).sum(1) + head.bias.index_select(0, best)
        return bellman(value, batch.reward, batch.done, self.gamma), next_state

    def _actions(self, batch: Transitions, generator: torch.Generator | None) -> Tensor:
        """Return the logged action and the negatives, (B, 1 + K)."""
        if self.exclude_session and batch.session_items is None:
            raise ValueError("exclude_session needs session_items in the batch: sample(..., with_session_items=True)")
        exclude = batch.session_items if self.exclude_session else None
        negatives = sample_negative_actions(
            batch.action, self.num_items, self.num_negatives, exclude=exclude, generator=generator
        )
        return torch.cat([batch.action.unsqueeze(1), negatives], dim=1)

    def _mean_scores(self, state: State, rank_by: str) -> Tensor:
        networks: Iterable[Network] = self.networks  # type: ignore[assignment]
        scores = [net.scores(net.backbone(*state), rank_by, self.omega) for net in networks]
        return scores[0] if len(scores) == 1 else torch.stack(scores).mean(0)

    def extra_repr(self) -> str:
        return f"num_items={self.num_items}, double={self._options['double']!r}, rank_by={self.rank_by!r}"
