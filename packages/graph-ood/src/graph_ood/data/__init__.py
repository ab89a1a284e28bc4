r"""Graph data with a known shift: GOOD-Motif, Spurious-Motif and SYN-b from a seed, TU files from disk.

A generated graph is a base $B$ of some width, a motif $M$ that decides the label, one edge between them, and a few noise
edges. Training data couple $M$ with $B$, or show only some $B$; test data don't, or show others:

$$P_\text{train}(B\mid M)\neq P_\text{test}(B\mid M)\qquad\text{or}\qquad P_\text{train}(B)\neq P_\text{test}(B)$$

Nothing is downloaded, and what is kept on disk are safetensors files.

References: S. Gui, X. Li, L. Wang, S. Ji, *GOOD: A Graph Out-of-Distribution Benchmark*, NeurIPS 2022, arXiv:2206.08452.
Y. Sui, X. Wang, J. Wu, M. Lin, X. He, T.-S. Chua, *Causal Attention for Interpretable and Generalizable Graph
Classification*, KDD 2022, arXiv:2112.15089. Y. Wu, X. Wang, A. Zhang, X. He, T.-S. Chua, *Discovering Invariant
Rationales for Graph Neural Networks*, ICLR 2022, arXiv:2201.12872. Documentation: `docs/guides/graph-shift-data.md`.
"""

from graph_ood.data._inspect import check_graphs, environment_counts, environment_ids
from graph_ood.data._motif import GoodMotif, good_motif_split_sizes, load_good_motif, spurious_motif
from graph_ood.data._real import TUGraphs, cal_features, load_tu, size_split
from graph_ood.data._shapes import MotifGraph, motif_graph
from graph_ood.data._syn_b import SynB, load_syn_b, syn_b_counts

__all__ = [
    "GoodMotif",
    "MotifGraph",
    "SynB",
    "TUGraphs",
    "cal_features",
    "check_graphs",
    "environment_counts",
    "environment_ids",
    "good_motif_split_sizes",
    "load_good_motif",
    "load_syn_b",
    "load_tu",
    "motif_graph",
    "size_split",
    "spurious_motif",
    "syn_b_counts",
]
