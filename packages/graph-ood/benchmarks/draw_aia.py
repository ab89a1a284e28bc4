"""Draw what AIA calls stable: one GOOD-Motif graph per class, its masks against the true motif, and the area under the curve.

    python packages/graph-ood/benchmarks/draw_aia.py --output docs/assets/images/aia_split.svg

Trains a small AIA on GOOD-Motif with unseen bases (about a minute on one core), draws graphs with bases of the training and
prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

import torch
from torch_geometric.data import Batch
from torch_geometric.loader import DataLoader

from graph_ood.aia import AIA, AIATrainer
from graph_ood.data import load_good_motif
from graph_ood.explain import draw_split, explanations, mask_auc

CLASSES = ("house", "cycle", "crane")


def main() -> None:
    """Train, draw and print."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--output", type=Path, default=Path("aia_split.svg"))
    options.add_argument("--graphs", type=int, default=2500, help="graphs of all splits together (default: 2500)")
    options.add_argument("--epochs", type=int, default=20)
    options.add_argument("--hidden", type=int, default=64)
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*torch.jit.*")  # torch-geometric still calls torch.jit.script
    splits = load_good_motif(None, "base", "covariate", num_data=args.graphs, seed=args.seed)
    torch.manual_seed(args.seed)
    model = AIA(1, 3, hidden=args.hidden)
    trainer = AIATrainer(model, epochs=args.epochs, warmup_select=int(0.7 * args.epochs), seed=args.seed)
    history = trainer.fit(
        DataLoader(splits["train"], 64, shuffle=True),
        DataLoader(splits["val"], 256),
        {name: DataLoader(splits[name], 256) for name in ("id_test", "test")},
    )
    graphs = list(splits["id_test"])
    seen = Batch.from_data_list(graphs)
    masks = model.augment(seen, "stable")
    drawn = Batch.from_data_list([next(g for g in graphs if int(g.motif_id) == motif) for motif in range(3)])
    shown = model.augment(drawn, "stable")
    draw_split(explanations(drawn, node_mask=shown.node, edge_mask=shown.edge), args.output, titles=CLASSES, columns=3)
    result = {
        "file": str(args.output),
        "accuracy_in_distribution": history.best["id_test_accuracy"],
        "test_accuracy": history.best["test_accuracy"],
        "node_auc": mask_auc(masks.node, seen.node_gt, seen.batch),
        "edge_auc": mask_auc(masks.edge, seen.edge_gt, seen.batch[seen.edge_index[0]]),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
