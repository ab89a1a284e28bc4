"""Draw what CAL looks at in one SYN-b graph per class, around the motif, and print the areas under the curve.

    python packages/graph-ood/benchmarks/draw_cal.py --output docs/assets/images/cal_split.svg

Trains a small CAL on SYN-b (about 20 seconds on one core) and draws what lies within three edges of the motif of test graphs:
whole ones have about 240 nodes. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch_geometric.data import Batch
from torch_geometric.loader import DataLoader
from torch_geometric.utils import k_hop_subgraph

from graph_ood.cal import CAL, train_cal
from graph_ood.data import SynB
from graph_ood.explain import draw_split, mask_auc

if TYPE_CHECKING:
    from torch_geometric.explain import Explanation

CLASSES = ("house", "cycle", "grid", "diamond")


def around_motif(explanation: Explanation, hops: int) -> Explanation:
    """Return the part of a graph within some edges of its motif."""
    motif = explanation.node_gt.nonzero().flatten()
    nodes = k_hop_subgraph(motif, hops, explanation.edge_index, num_nodes=explanation.num_nodes)[0]
    return explanation.subgraph(nodes)


def main() -> None:
    """Train, draw and print."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--output", type=Path, default=Path("cal_split.svg"))
    options.add_argument("--bias", type=float, default=0.9)
    options.add_argument("--graphs", type=int, default=800, help="training, validation and test graphs (default: 800)")
    options.add_argument("--epochs", type=int, default=20)
    options.add_argument("--hidden", type=int, default=32)
    options.add_argument("--base", type=int, default=0, choices=(0, 1), help="0: trees, 1: Barabási-Albert graphs")
    options.add_argument("--hops", type=int, default=3, help="edges between the motif and what is drawn (default: 3)")
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    torch.set_num_threads(1)
    data = {s: list(SynB(bias=args.bias, split=s, total=args.graphs, seed=args.seed)) for s in ("train", "val", "test")}
    torch.manual_seed(args.seed)
    model = CAL(10, 4, hidden=args.hidden)
    train_cal(
        model,
        DataLoader(data["train"], 32, shuffle=True),
        DataLoader(data["val"], 256),
        epochs=args.epochs,
        lr=2e-3,
        min_lr=5e-6,
        seed=args.seed,
    )
    test = Batch.from_data_list(data["test"])
    with torch.no_grad():
        out = model(test)
    of_edge = test.batch[test.edge_index[0]]
    drawn = [next(g for g in data["test"] if int(g.y) == c and int(g.base_id) == args.base) for c in range(4)]
    draw_split(
        [around_motif(model.explain(graph)[0], args.hops) for graph in drawn], args.output, titles=CLASSES, columns=2
    )
    result = {
        "file": str(args.output),
        "test_accuracy": float((out["logits_causal"].argmax(1) == test.y).double().mean()),
        "node_auc": mask_auc(out["node_att"], test.node_gt, test.batch),
        "edge_auc": mask_auc(out["edge_att"], test.edge_gt, of_edge),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
