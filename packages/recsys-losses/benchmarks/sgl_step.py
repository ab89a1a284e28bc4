"""One SGL training step beside a straightforward port of the step, on graphs of the size of lastfm and gowalla.

    BALLAST_DATA=../shared/data python sgl_step.py             # the real graphs; without the data, generated ones
    python sgl_step.py --data gowalla --repetitions 5

Both sides take the same batch, views, parameters and Adam, and compute the same loss. The port does what follows from
the formulas: three sparse products of a COO matrix per hop, all rows of both views normalised, the whole (B, U) and (B, I)
logits, the positive subtracted from every column. Ours multiplies sparse rows by a matrix that is its own transpose, makes
distinct batch entries once, and the logits in blocks, again in the backward pass. Peak memory is measured in a process of
its own for each side and counts everything beside parameters and graphs; it is that of the first step, so that the state
of Adam is in it for both. Prints one JSON object.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from ballast_testing.measure import emit, in_worker, interleaved, machine, parser, peak_extra_bytes, ratio
from recsys_losses.data import InteractionData, load_dataset
from recsys_losses.sgl import SGL, BPRSampler, drop_edges, normalized_adjacency

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_SIZES = {"lastfm": (1_892, 4_489, 42_135), "gowalla": (29_858, 40_981, 810_128)}


def interactions(name: str, seed: int) -> tuple[InteractionData, str]:
    """Return the real data set where it is, otherwise one of its size with a power law over users and items."""
    root = os.environ.get("BALLAST_DATA")
    if root and (Path(root) / "recsys" / name).is_dir():
        return load_dataset(name, root), "real"
    users, items, pairs = _SIZES[name]
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.arange(1, size + 1, dtype=torch.float64) ** -0.6 for size in (users, items)]
    drawn = [torch.multinomial(w, 2 * pairs, replacement=True, generator=generator) for w in weights]
    edges = torch.unique(torch.stack(drawn), dim=1)
    train = edges[:, torch.randperm(edges.shape[1], generator=generator)[:pairs]]
    return InteractionData(users, items, train=train, test=train[:, :0]), "generated"


def sides(data: InteractionData, options: Any) -> dict[str, Callable[[], float]]:
    """Return the training steps to compare; each gives its loss."""
    users, pos, neg = next(iter(BPRSampler(data, batch_size=options.batch_size, seed=options.seed)))
    shape = data.num_users, data.num_items
    model = SGL(*shape, data.train, options.dim, options.layers, seed=options.seed)
    tables = [torch.nn.Parameter(table.detach().clone()) for table in model.backbone.base_embeddings()]
    optimizer = {
        "ours": torch.optim.Adam(model.parameters(), lr=1e-3, fused=True),
        "port": torch.optim.Adam(tables, lr=1e-3, fused=True),
    }
    model.refresh_views(torch.Generator().manual_seed(options.seed))
    generator = torch.Generator().manual_seed(options.seed)
    full = model.backbone.edge_index()  # the order in which the model draws its views
    views = [drop_edges(full, model.ssl_ratio, generator=generator) for _ in range(2)]
    graphs = [normalized_adjacency(edges, *shape, layout="coo") for edges in (full, *views)]

    def ours() -> float:
        optimizer["ours"].zero_grad()
        loss = model(users, pos, neg).loss
        loss.backward()
        optimizer["ours"].step()
        return float(loss.detach())

    def port() -> float:
        optimizer["port"].zero_grad()
        loss = port_loss(tables, graphs, users, pos, neg, options.layers)
        loss.backward()
        optimizer["port"].step()
        return float(loss.detach())

    return {"port": port, "ours": ours}


def port_loss(tables: list[Any], graphs: list[Tensor], users: Tensor, pos: Tensor, neg: Tensor, layers: int) -> Any:
    """Return the loss of SGL-ED, formula by formula, with its default weights."""
    (user, item), (user1, item1), (user2, item2) = (_encode(tables, graph, layers) for graph in graphs)
    margin = (user[users] * item[pos]).sum(1) - (user[users] * item[neg]).sum(1)
    squares = [
        table[ids].pow(2).sum() for table, ids in zip((tables[0], tables[1], tables[1]), (users, pos, neg), strict=True)
    ]
    ssl = _contrast(user1, user2, users) + _contrast(item1, item2, pos)
    return -F.logsigmoid(margin).sum() + 0.1 * ssl + 1e-4 * 0.5 * sum(squares)


def _encode(tables: list[Any], graph: Tensor, layers: int) -> tuple[Tensor, ...]:
    hops = [torch.cat(tables)]
    for _ in range(layers):
        hops.append(torch.sparse.mm(graph, hops[-1]))
    return torch.stack(hops, dim=1).mean(1).split([len(table) for table in tables])


def _contrast(view1: Tensor, view2: Tensor, ids: Tensor, temperature: float = 0.2) -> Tensor:
    view1, view2 = F.normalize(view1, dim=1), F.normalize(view2, dim=1)
    positive = (view1[ids] * view2[ids]).sum(1, keepdim=True)
    logits = view1[ids] @ view2.T - positive
    return torch.logsumexp(logits / temperature, dim=1).sum()


def return_free_memory() -> None:
    """Give the memory that building the graphs left with the allocator back, so that using it again is counted."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def case(name: str, options: Any) -> dict[str, Any]:
    """Measure one graph."""
    data, origin = interactions(name, options.seed)
    compared = sides(data, options)
    losses = {side: step() for side, step in compared.items()}
    seconds = interleaved(compared, repetitions=options.repetitions, warmup=options.warmup)
    arguments = ["--data", name, "--threads", str(options.threads), "--seed", str(options.seed)]
    for key in ("dim", "layers", "batch_size"):
        arguments += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    memory = {side: in_worker(side, arguments) for side in compared}
    return {
        "data": name if origin == "real" else f"generated, size of {name}",
        "users": data.num_users,
        "train_pairs": data.train.shape[1],
        "nodes": data.num_users + data.num_items,
        "sides": {side: {**seconds[side], "peak_extra_bytes": memory[side]} for side in compared},
        "speed_of_ours_over_port": ratio(seconds["port"]["median_s"], seconds["ours"]["median_s"]),
        "memory_of_ours_over_port": ratio(memory["ours"], memory["port"]),
        "relative_loss_difference": abs(losses["ours"] - losses["port"]) / losses["port"],
    }


def main() -> None:
    """Measure and print."""
    options_of = parser(__doc__)
    options_of.add_argument("--data", nargs="+", choices=tuple(_SIZES), default=list(_SIZES))
    options_of.add_argument("--dim", type=int, default=64)
    options_of.add_argument("--layers", type=int, default=3)
    options_of.add_argument("--batch-size", type=int, default=2048)
    options = options_of.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        data, _ = interactions(options.data[0], options.seed)
        step = sides(data, options)[options.memory_of]
        return_free_memory()
        print(json.dumps({"peak_extra_bytes": peak_extra_bytes(step)}))
        return
    cases = [case(name, options) for name in options.data]
    shape = {"dim": options.dim, "layers": options.layers, "batch_size": options.batch_size}
    emit(
        {"benchmark": "sgl_step", **machine(), **shape, "repetitions": options.repetitions, "cases": cases},
        options.output,
    )


if __name__ == "__main__":
    main()
