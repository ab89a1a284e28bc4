r"""ADNCE: InfoNCE whose negatives are weighted by a Gaussian bump in their similarity, with the DRO view behind it.

InfoNCE is a worst case over distributions of negatives in a KL ball, and the temperature is the multiplier of the radius:
the most similar negatives, which are often false ones, get the largest weights. ADNCE moves weight to negatives whose
similarity is near a chosen $\mu$. It takes embeddings of two views of anything: images, sentences, graphs, users, items.

$$
\ell=-\frac{s^+}{\tau}+\log\Big([e^{s^+/\tau}]+\sum_j w_je^{s_j/\tau}\Big),\qquad
w_j\propto\exp\!\Big(-\tfrac12\big(\tfrac{s_j-\mu}{\sigma}\big)^2\Big),\quad\operatorname*{mean}_j w_j=1
$$

Inner modules: `_losses` (loss, weights, KL-DRO, bounds on divergences), `_graphs` (graph classification with GraphCL's
augmentations, the paper's third experiment).

Reference: J. Wu, J. Chen, J. Wu, W. Shi, X. Wang, X. He, *Understanding Contrastive Learning via Distributionally Robust
Optimization*, NeurIPS 2023, arXiv:2310.11048, eq. 11 and 12. Documentation: `docs/papers/recsys-losses/adnce.md`.
"""

from recsys_losses.adnce._graphs import (
    GRAPH_AUGMENTATIONS,
    GINEncoder,
    GraphContrast,
    SVMAccuracy,
    augment_graphs,
    embed_graphs,
    evaluate_svm,
    load_tu_graphs,
    train_graph_encoder,
)
from recsys_losses.adnce._losses import (
    KLDRO,
    ADNCELoss,
    KLTemperature,
    PhiBound,
    adnce_from_similarity,
    adnce_log_weights,
    adnce_loss,
    info_nce_loss,
    kl_dro,
    kl_dro_temperature,
    phi_divergence_lower_bound,
)

__all__ = [
    "GRAPH_AUGMENTATIONS",
    "KLDRO",
    "ADNCELoss",
    "GINEncoder",
    "GraphContrast",
    "KLTemperature",
    "PhiBound",
    "SVMAccuracy",
    "adnce_from_similarity",
    "adnce_log_weights",
    "adnce_loss",
    "augment_graphs",
    "embed_graphs",
    "evaluate_svm",
    "info_nce_loss",
    "kl_dro",
    "kl_dro_temperature",
    "load_tu_graphs",
    "phi_divergence_lower_bound",
    "train_graph_encoder",
]
