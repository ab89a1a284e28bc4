"""Graphs per second and core: the generators of `graph_ood.data` against a port to networkx.

    python packages/graph-ood/benchmarks/generators.py
    python packages/graph-ood/benchmarks/generators.py --graphs 200 --repetitions 3

Prints one JSON object. The port makes each graph the way the published programs do: networkx builds base and motif, noise
edges are drawn and looked up in the graph, PyG converts it, and the graphs are collated. Sizes of the two sides agree
within a few percent (`edges_of_ours_over_port`): they share the distribution, not the seeds.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import networkx as nx
import numpy as np
import torch
from torch_geometric.data import Data, InMemoryDataset
from torch_geometric.utils import from_networkx

from ballast_testing.measure import emit, interleaved, machine, parser, ratio
from graph_ood.data import GoodMotif, SynB, good_motif_split_sizes, syn_b_counts

if TYPE_CHECKING:
    from collections.abc import Callable

GOOD = {
    "house": [(1, 2), (2, 3), (3, 4), (4, 1), (0, 1), (0, 4)],
    "cycle": [(0, 1), (1, 2), (2, 3), (3, 4), (4, 0)],
    "crane": [(1, 2), (2, 3), (3, 4), (4, 1), (0, 1), (0, 3)],
}
CAL = {
    "house": nx.Graph([(0, 1), (1, 2), (2, 3), (3, 0), (4, 0), (4, 1)]),
    "cycle": nx.cycle_graph(6),
    "grid": nx.convert_node_labels_to_integers(nx.grid_graph([3, 2])),
    "diamond": nx.Graph([*nx.cycle_graph(6).edges, (5, 1), (4, 2)]),
}


def joined(base: nx.Graph, motif: nx.Graph, rng: np.random.Generator) -> nx.Graph:
    """Hang the motif on a random node of the base."""
    n = base.number_of_nodes()
    graph = base.copy()
    graph.add_edges_from(nx.relabel_nodes(motif, {v: n + v for v in motif}).edges)
    graph.add_edge(int(rng.integers(n)), n)
    return graph


def perturbed(graph: nx.Graph, share: float, rng: np.random.Generator, role: list[int] | None = None) -> nx.Graph:
    """Draw noise edges one after the other."""
    n = graph.number_of_nodes()
    for _ in range(int(share * graph.number_of_edges())):
        u, v = (int(i) for i in rng.integers(n, size=2))
        while u == v or graph.has_edge(u, v):
            u, v = (int(i) for i in rng.integers(n, size=2))
        if role is None or 0 in (role[u], role[v]):
            graph.add_edge(u, v)
    return graph


def converted(graph: nx.Graph, num_base: int, label: int) -> Data:
    """Turn the graph into PyG's form, with the truth about its motif."""
    data = from_networkx(graph)
    data.node_gt = torch.arange(data.num_nodes) >= num_base
    data.edge_gt = data.node_gt[data.edge_index].all(0)
    data.y = torch.tensor([label])
    return data


def good_motif_port(number: int, seed: int) -> tuple[Data, Any]:
    """Training graphs of GOOD-Motif under covariate shift of the base."""
    rng = np.random.default_rng(seed)
    makers: tuple[Callable[[int], nx.Graph], ...] = (
        nx.wheel_graph,
        lambda w: nx.balanced_tree(2, max(1, int(math.log2(w)) - 1)),
        nx.ladder_graph,
    )
    graphs = []
    for _ in range(number):
        label = int(rng.integers(3))
        base = makers[int(rng.integers(3))](10 + int(rng.integers(-5, 6)))
        n = base.number_of_nodes()
        graph = joined(base, nx.Graph(list(GOOD.values())[label]), rng)
        data = converted(perturbed(graph, 0.05, rng, [0] * n + [1] * 5), n, label)
        data.x = torch.ones(data.num_nodes, 1)
        graphs.append(data)
    return InMemoryDataset.collate(graphs)


def syn_b_port(number: int, seed: int, max_degree: int = 10) -> tuple[Data, Any]:
    """Graphs of SYN-b, half of them on a tree."""
    rng = np.random.default_rng(seed)
    graphs = []
    for i in range(number):
        label = i % 4
        base = (
            nx.balanced_tree(15, 2) if i // 4 % 2 else nx.barabasi_albert_graph(225, 2, seed=int(rng.integers(2**31)))
        )
        n = base.number_of_nodes()
        graph = perturbed(joined(base, list(CAL.values())[label], rng), 0.1, rng)
        data = converted(graph, n, label)
        place = torch.tensor([min(d, max_degree - 1) for _, d in graph.degree])
        data.x = torch.eye(max_degree)[place]
        graphs.append(data)
    return InMemoryDataset.collate(graphs)


def case(name: str, sides: dict[str, Callable[[], Any]], number: int, options: Any) -> dict[str, Any]:
    """Time both sides of one data set."""
    ours, port = sides["ours"](), sides["port"]()
    seconds = interleaved(sides, repetitions=options.repetitions, warmup=options.warmup)
    return {
        "data": name,
        "graphs": number,
        "sides": {side: {**s, "graphs_per_s": number / s["median_s"]} for side, s in seconds.items()},
        "speed_of_ours_over_port": ratio(seconds["port"]["median_s"], seconds["ours"]["median_s"]),
        "edges_of_ours_over_port": ratio(ours._data.num_edges, port[0].num_edges),
    }


def main() -> None:
    """Measure and print."""
    options_of = parser(__doc__)
    options_of.add_argument(
        "--graphs", type=int, default=500, help="graphs of each data set, at least 60 (default: 500)"
    )
    options = options_of.parse_args()
    torch.set_num_threads(options.threads)
    num_data = math.ceil(options.graphs / 0.6)
    good = good_motif_split_sizes(num_data, "covariate")["train"]
    total = math.ceil(options.graphs / 0.7)
    syn = sum(sum(counts.values()) for counts in syn_b_counts(0.5, total)["train"].values())
    cases = [
        case(
            "GOOD-Motif, base, covariate",
            {
                "ours": partial(GoodMotif, num_data=num_data, seed=options.seed),
                "port": partial(good_motif_port, good, options.seed),
            },
            good,
            options,
        ),
        case(
            "SYN-0.5",
            {
                "ours": partial(SynB, bias=0.5, total=total, seed=options.seed),
                "port": partial(syn_b_port, syn, options.seed),
            },
            syn,
            options,
        ),
    ]
    emit({"benchmark": "generators", **machine(), "repetitions": options.repetitions, "cases": cases}, options.output)


if __name__ == "__main__":
    main()
