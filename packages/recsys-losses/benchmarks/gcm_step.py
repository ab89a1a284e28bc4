"""GCM beside a direct port: one training step, and the ranking of all items for every test interaction.

    python packages/recsys-losses/benchmarks/gcm_step.py

Prints one JSON object. The port follows the published code: it builds the message of every interaction in every layer
(`index_select`, `index_add`), and ranks by decoding all items for one user at a time. Both sides take the same steps from
the same parameters; the largest differences of logits, gradients and scores are reported too. The data are generated; all
figures depend on the number of interactions per node and on the number of distinct contexts.
"""

from __future__ import annotations

import copy
import json
import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ballast_testing.measure import emit, in_worker, interleaved, machine, parser, peak_extra_bytes, ratio
from recsys_losses.gcm import GCM, Samples, make_context_data

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class Port:
    """The published computation on the parameters of a model."""

    def __init__(self, model: GCM) -> None:
        self.model = model
        graph = model.graph
        self.users, self.items, self.contexts = graph.users, graph.items, graph.contexts
        self.user_degree = torch.bincount(self.users, minlength=model.num_users).clamp_min(1).float()[:, None]
        self.item_degree = torch.bincount(self.items, minlength=model.num_graph_items).clamp_min(1).float()[:, None]

    def tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return users, items, the fields of all contexts (C, k, d), and their biases (C, k)."""
        m = self.model
        features, last = m.context_features[:, :-1], m.context_features[:, -1:]
        fields = torch.cat([F.embedding(features, m.context_feature_embedding), F.embedding(last, m.item_embedding)], 1)
        biases = torch.cat([F.embedding(features, m.context_feature_bias), F.embedding(last, m.item_bias)], 1)[..., 0]
        user = self._encode(m.user_embedding, m.user_feature_embedding, m.user_features)
        item = self._encode(m.item_embedding[: m.num_graph_items], m.item_feature_embedding, m.item_features)
        message = fields.mean(1).index_select(0, self.contexts)
        users, items = [user], [item]
        for _ in range(m.num_layers):
            to_user = items[-1].index_select(0, self.items) + message
            to_item = users[-1].index_select(0, self.users) + message
            users.append(torch.zeros_like(user).index_add(0, self.users, to_user) / self.user_degree.sqrt())
            items.append(torch.zeros_like(item).index_add(0, self.items, to_item) / self.item_degree.sqrt())
        return torch.stack(users).mean(0), torch.stack(items).mean(0), fields, biases

    @staticmethod
    def _encode(ids: Tensor, table: Tensor, features: Tensor) -> Tensor:
        return torch.cat([ids[:, None], F.embedding(features, table)], 1).mean(1)

    def decode(self, tables: tuple[Tensor, ...], users: Tensor, items: Tensor, contexts: Tensor) -> Tensor:
        """Score a batch by the squares of sums and the sums of squares."""
        user, item, fields, biases = tables
        x = torch.cat([user[users][:, None], item[items][:, None], fields[contexts]], 1)
        pairs = 0.5 * (x.sum(1).square() - x.square().sum(1)).sum(1)
        m = self.model
        return pairs + m.user_bias[users, 0] + m.item_bias[items, 0] + biases[contexts].sum(1) + m.global_bias[0, 0]

    def loss(self, batch: Samples) -> tuple[Tensor, Tensor]:
        """Return loss and logits."""
        m = self.model
        logits = self.decode(self.tables(), batch.users, batch.items, batch.contexts)
        squares = m.user_embedding[batch.users].square().sum() + m.item_embedding[batch.items].square().sum()
        for table in (m.user_feature_embedding, m.item_feature_embedding, m.context_feature_embedding):
            squares = squares + table.square().sum()
        bce = F.binary_cross_entropy_with_logits(logits, batch.labels, reduction="sum")
        return bce + m.l2_weight * squares / 2, logits

    @torch.no_grad()
    def rank(self, users: Tensor, contexts: Tensor) -> Tensor:
        """Score all items for one user after the other, propagating once."""
        tables = self.tables()
        items = torch.arange(self.model.num_graph_items)
        rows = [
            self.decode(tables, u.expand_as(items), items, c.expand_as(items))
            for u, c in zip(users, contexts, strict=True)
        ]
        return torch.stack(rows)


def build(args: Any) -> tuple[Any, Samples, GCM]:
    """Return the data, a batch, and a model that nothing has run on yet."""
    data = make_context_data(args.users, args.items, args.interactions, seed=args.seed).data
    samples = data.sample_epoch(4, torch.Generator().manual_seed(args.seed))
    batch = Samples(*(column[: args.batch_size].clone() for column in samples))
    return data, batch, GCM.from_dataset(data, embed_dim=args.dim, num_layers=args.layers, seed=args.seed)


def losses_of(model: GCM, side: str) -> Callable[[Samples], Tensor]:
    """Return the function that a side minimises."""
    return (lambda batch: model.loss(*batch).loss) if side == "ours" else (lambda batch: Port(model).loss(batch)[0])


def step_of(model: GCM, side: str, batch: Samples) -> Callable[[], None]:
    """Return a function that takes one training step."""
    loss = losses_of(model, side)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()

    return step


def differences(model: GCM, batch: Samples, users: Tensor, contexts: Tensor) -> dict[str, float]:
    """Return by how much the two sides differ before training; gradients relative to the largest of a table."""
    gradients = [
        torch.autograd.grad(losses_of(model, side)(batch), list(model.parameters())) for side in ("ours", "port")
    ]
    pairs = zip(*gradients, strict=True)
    scores = model.score_all(users[:20], contexts[:20]) - Port(model).rank(users[:20], contexts[:20])
    return {
        "largest_difference_of_gradients": max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs),
        "largest_difference_of_scores": float(scores.abs().max()),
    }


def main() -> None:
    """Run the comparison and print one JSON object."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--users", type=int, default=3000)
    options.add_argument("--items", type=int, default=1500)
    options.add_argument("--interactions", type=int, default=100_000)
    options.add_argument("--layers", type=int, default=2)
    options.add_argument("--dim", type=int, default=64)
    options.add_argument("--batch-size", type=int, default=2048)
    options.add_argument("--ranked", type=int, default=200, help="test interactions ranked (default: 200)")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    data, batch, model = build(args)
    if args.memory_of:
        step_bytes = peak_extra_bytes(step_of(model, args.memory_of, batch))
        print(json.dumps({"peak_extra_bytes": step_bytes}))
        return
    users, contexts = data.test[0, : args.ranked], data.test[2, : args.ranked]
    about = differences(model, batch, users, contexts)
    steps = {side: step_of(copy.deepcopy(model), side, batch) for side in ("ours", "port")}
    step = interleaved(steps, repetitions=args.repetitions, warmup=args.warmup)

    def rank() -> Tensor:
        model.refresh()
        return model.score_all(users, contexts)

    rankings = {"ours": rank, "port": lambda: Port(model).rank(users, contexts)}
    ranked = interleaved(rankings, repetitions=args.repetitions, warmup=args.warmup)
    memory = {side: in_worker(side, sys.argv[1:]) for side in steps}
    emit(
        {
            **machine(),
            "layers": args.layers,
            "dim": args.dim,
            "batch_size": args.batch_size,
            "users": data.num_users,
            "graph_items": data.num_graph_items,
            "interactions": data.train.shape[1],
            "contexts": len(data.context_features),
            "ranked_rows": len(users),
            **about,
            "training_step": {
                "port_over_ours": step["port"]["median_s"] / step["ours"]["median_s"],
                "memory_of_ours_over_port": ratio(memory["ours"], memory["port"]),
                "sides": {side: {"median_s": step[side]["median_s"], "extra_bytes": memory[side]} for side in steps},
                "runs": step,
            },
            "ranking": {
                "port_over_ours": ranked["port"]["median_s"] / ranked["ours"]["median_s"],
                "sides": {side: {"median_s": ranked[side]["median_s"]} for side in rankings},
                "runs": ranked,
            },
        },
        args.output,
    )


if __name__ == "__main__":
    main()
