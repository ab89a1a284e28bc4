r"""DSL: dynamic sparse learning.

Embedding tables dominate the size of a recommender. DSL trains a model that is sparse from the first step, with a
constant number of non-zeros. Every few thousand steps it moves them: the smallest go, and as many inactive positions with
the largest gradients come back to life.

$$
M_{\text{new}}=M'+\text{top}_{c}\big(|G|\odot(1-M')\big),\qquad M'=M\odot\mathbb 1\big[|W|>\theta_t\big],\qquad
c=\textstyle\sum M-\sum M'
$$

Reference: S. Wang, Y. Sui, J. Wu, Z. Zheng, H. Xiong, *Dynamic Sparse Learning: A Novel Paradigm for Efficient
Recommendation*, WSDM 2024, arXiv:2402.02855, algorithm 1, in the order of operations of the authors' code.
Documentation: `docs/papers/recsys-losses/dsl.md`.
"""

from __future__ import annotations

from recsys_losses.dsl._backbones import MultVAE, NeuMF
from recsys_losses.dsl._compress import (
    SparseEmbedding,
    count_costs,
    csr_bytes,
    load_compressed,
    save_compressed,
    to_csr,
)
from recsys_losses.dsl._controller import DSLController
from recsys_losses.dsl._masks import (
    DSLUpdate,
    cosine_update_ratio,
    dsl_update_mask,
    gradient_grow,
    magnitude_masks,
    magnitude_prune,
    random_grow,
    random_mask,
)
from recsys_losses.dsl._training import (
    DSLConfig,
    SparseFitResult,
    evaluate_backbone,
    fit_sparse,
    load_backbone,
    save_backbone,
)

__all__ = [
    "DSLConfig",
    "DSLController",
    "DSLUpdate",
    "MultVAE",
    "NeuMF",
    "SparseEmbedding",
    "SparseFitResult",
    "cosine_update_ratio",
    "count_costs",
    "csr_bytes",
    "dsl_update_mask",
    "evaluate_backbone",
    "fit_sparse",
    "gradient_grow",
    "load_backbone",
    "load_compressed",
    "magnitude_masks",
    "magnitude_prune",
    "random_grow",
    "random_mask",
    "save_backbone",
    "save_compressed",
    "to_csr",
]
