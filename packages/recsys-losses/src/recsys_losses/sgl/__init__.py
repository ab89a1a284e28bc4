r"""SGL: a graph recommender that also learns to recognise every node in two thinned copies of its graph.

Every epoch two copies of the graph of training pairs are thinned at random, and LightGCN gives every node an embedding in
each, $z'$ and $z''$. Beside BPR on the full graph, a node's two embeddings must agree more than those of different nodes
of its side. Rare nodes gain most: they get a training signal that doesn't depend on how often they were clicked.

$$\mathcal L=\sum_b\operatorname{softplus}(\hat y_{u_bj_b}-\hat y_{u_bi_b})
+\lambda_1\sum_b\big(\ell_{\mathrm{user}}(u_b)+\ell_{\mathrm{item}}(i_b)\big)
+\frac{\lambda_2}2\sum_b\big(\|e_{u_b}\|^2+\|e_{i_b}\|^2+\|e_{j_b}\|^2\big),$$

$$\ell(a)=\log\sum_{v}e^{\cos(z'_a,z''_v)/\tau}-\cos(z'_a,z''_a)/\tau,\qquad v\ \text{over all nodes of the side}.$$

Reference: J. Wu, X. Wang, F. Feng, X. He, L. Chen, J. Lian, X. Xie, *Self-supervised Graph Learning for Recommendation*,
SIGIR 2021, arXiv:2010.10783. Documentation: `docs/papers/recsys-losses/sgl.md`.
"""

from recsys_losses.sgl._graph import (
    add_noise,
    drop_edges,
    drop_nodes,
    normalized_adjacency,
    propagate,
    random_walk_views,
)
from recsys_losses.sgl._losses import SGLLoss, bpr_loss, sgl_loss, ssl_loss
from recsys_losses.sgl._metrics import recall_ndcg_at_k
from recsys_losses.sgl._model import SGL
from recsys_losses.sgl._training import BPRBatch, BPRSampler, fit

__all__ = [
    "SGL",
    "BPRBatch",
    "BPRSampler",
    "SGLLoss",
    "add_noise",
    "bpr_loss",
    "drop_edges",
    "drop_nodes",
    "fit",
    "normalized_adjacency",
    "propagate",
    "random_walk_views",
    "recall_ndcg_at_k",
    "sgl_loss",
    "ssl_loss",
]
