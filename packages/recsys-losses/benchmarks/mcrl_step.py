"""One training step of MCRL: ours beside a straightforward port, on one core.

    python packages/recsys-losses/benchmarks/mcrl_step.py                    # 5,000 items
    python packages/recsys-losses/benchmarks/mcrl_step.py --items 26702      # the catalogue of RC15

Prints one JSON object. Both sides take the same step from the same parameters: sample a batch, twin GRU networks, double
Q over all items, conservative and contrastive losses, Adam. The port keeps the transitions as a dictionary of rows and
copies a batch out of it in every step, as the published code of this line of work does with pandas; scores all items with
both networks and the transition MLP on concatenated vectors [B (K + 1), 2 d]. `alone` gives single parts. d3rlpy's
DiscreteCQL, the usual peer, wasn't installed and isn't compared.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import torch

from ballast_testing.measure import emit, in_worker, interleaved, machine, parser, peak_extra_bytes, ratio
from recsys_losses.mcrl import MCRL, ReplayBuffer, Transitions, mcrl_loss

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def generated(num_items: int, sessions: int, seed: int) -> ReplayBuffer:
    """Return sessions of 5.8 events on average, as many per session as in RC15, with 4 % purchases."""
    generator = torch.Generator().manual_seed(seed)
    length = 3 + torch.empty(sessions).geometric_(1 / 3.8, generator=generator).long().clamp_max(40) - 1
    events = int(length.sum())
    items = (num_items * torch.rand(events, generator=generator).square()).long().clamp_max(num_items - 1)
    return ReplayBuffer(items, torch.rand(events, generator=generator) < 0.04, length, num_items=num_items)


class RowBuffer:
    """Transitions as a dictionary of rows (`DataFrame.to_dict`), copied row by row into every batch."""

    def __init__(self, buffer: ReplayBuffer, seed: int) -> None:
        batch = buffer.transitions()
        self.columns: dict[str, dict[int, Any]] = {
            name: dict(enumerate(column.tolist())) for name, column in batch._asdict().items() if column is not None
        }
        self.rows = len(buffer)
        self.random = random.Random(seed)  # noqa: S311

    def sample(self, n: int) -> Transitions:
        """Return a batch drawn with replacement."""
        drawn = [self.random.randrange(self.rows) for _ in range(n)]
        return Transitions(**{name: torch.tensor([rows[i] for i in drawn]) for name, rows in self.columns.items()})


def port_loss(model: MCRL, batch: Transitions, negatives_of: random.Random) -> Tensor:
    """Return the loss as one writes it down first."""
    trained = negatives_of.randrange(2)
    net, other = model.networks[trained], model.networks[1 - trained]
    rows = []
    for action in batch.action.tolist():
        row: list[int] = []
        while len(row) < model.num_negatives:
            item = negatives_of.randrange(model.num_items)
            if item != action:
                row.append(item)
        rows.append([action, *row])
    actions = torch.tensor(rows)
    state = net.backbone(*batch.state)
    with torch.no_grad():
        q_next_online = net.q_head(net.backbone(*batch.next_state))
        next_state = other.backbone(*batch.next_state)
        q_next_target = other.q_head(next_state)
    vectors = net.backbone.item_embedding(actions)
    repeated = state.unsqueeze(1).expand(-1, actions.shape[1], -1)
    both = torch.cat([repeated, vectors], dim=2).flatten(0, 1)
    predicted = net.transition_out(net.transition_in(both).relu()).unflatten(0, actions.shape)
    rho = (net.reward_head(state).unsqueeze(1) * vectors).sum(2)
    return mcrl_loss(
        net.q_head(state),
        q_next_online,
        q_next_target,
        batch.action,
        batch.reward,
        batch.done,
        rho[:, 0],
        rho[:, 1:],
        predicted[:, 0],
        predicted[:, 1:],
        next_state,
    ).loss


def stepper(loss: Callable[[], Tensor], model: MCRL) -> Callable[[], None]:
    """Return the training step of a loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    return step


def sides(options: Any) -> dict[str, Callable[[], None]]:
    """Return the step of both sides, each on a model of its own."""
    buffer = generated(options.items, options.sessions, options.seed)
    ours, ported = (
        MCRL(options.items, hidden=options.dim, num_negatives=options.negatives, seed=options.seed) for _ in range(2)
    )
    generator = torch.Generator().manual_seed(options.seed)
    rows, numbers = RowBuffer(buffer, options.seed), random.Random(options.seed)  # noqa: S311
    return {
        "ours": stepper(lambda: ours.loss(buffer.sample(options.batch_size, generator), generator).loss, ours),
        "port": stepper(lambda: port_loss(ported, rows.sample(options.batch_size), numbers), ported),
    }


def parts(options: Any) -> dict[str, dict[str, Callable[[], object]]]:
    """Return single parts of the step, both sides."""
    buffer = generated(options.items, options.sessions, options.seed)
    rows = RowBuffer(buffer, options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    net = MCRL(options.items, hidden=options.dim, seed=options.seed).networks[0]
    state = torch.randn(options.batch_size, options.dim, generator=generator, requires_grad=True)
    shape = (options.batch_size, options.negatives + 1)
    actions = torch.randint(options.items, shape, generator=generator)
    weights = [net.item_table, *net.transition_in.parameters(), *net.transition_out.parameters()]

    def concatenated() -> Tensor:
        vectors = net.backbone.item_embedding(actions)
        both = torch.cat([state.unsqueeze(1).expand(-1, shape[1], -1), vectors], dim=2).flatten(0, 1)
        return net.transition_out(net.transition_in(both).relu())

    def gradients(out: Tensor) -> object:
        return torch.autograd.grad(out.square().sum(), [state, *weights])

    return {
        "batch": {
            "ours": lambda: buffer.sample(options.batch_size, generator),
            "port": lambda: rows.sample(options.batch_size),
        },
        "transition_model": {
            "ours": lambda: gradients(net.transitions(state, actions)),
            "port": lambda: gradients(concatenated()),
        },
    }


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--items", type=int, default=5000)
    options.add_argument("--sessions", type=int, default=20_000)
    options.add_argument("--batch-size", type=int, default=256)
    options.add_argument("--dim", type=int, default=64)
    options.add_argument("--negatives", type=int, default=10)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(f'{{"peak_extra_bytes": {peak_extra_bytes(sides(args)[args.memory_of]) or 0}}}')
        return
    seconds = interleaved(sides(args), repetitions=args.repetitions, warmup=args.warmup)
    alone = {
        name: interleaved(both, repetitions=args.repetitions, warmup=args.warmup) for name, both in parts(args).items()
    }
    shape = {"items": args.items, "batch_size": args.batch_size, "dim": args.dim, "negatives": args.negatives}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in {**shape, "sessions": args.sessions}.items()]
    memory = {side: in_worker(side, [*flags, f"--threads={args.threads}", f"--seed={args.seed}"]) for side in seconds}
    result: dict[str, Any] = {**machine(), **shape, "sessions": args.sessions}
    result["speed_of_ours_over_port"] = ratio(seconds["port"]["median_s"], seconds["ours"]["median_s"])
    result["ours_steps_per_s"] = 1 / seconds["ours"]["median_s"]
    result["port_steps_per_s"] = 1 / seconds["port"]["median_s"]
    result["memory_of_ours_over_port"] = ratio(memory["ours"], memory["port"])
    result["alone"] = {
        name: {"speed_of_ours_over_port": ratio(both["port"]["median_s"], both["ours"]["median_s"])}
        for name, both in alone.items()
    }
    result["runs"] = {"step": seconds, **alone, "peak_extra_bytes": memory}
    emit(result, args.output)


if __name__ == "__main__":
    main()
