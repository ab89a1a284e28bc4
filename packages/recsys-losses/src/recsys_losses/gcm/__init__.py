r"""GCM, Graph Convolution Machine: graph convolution where every interaction carries a context.

A factorisation machine sees each interaction on its own, and a graph recommender forgets when and where it took place.
GCM puts the context on the edge: messages are the neighbour's vector plus the context's, and the convolved vectors are
scored by a factorisation machine together with the fields of the context in which a recommendation is asked for.

$$
p_u^{l+1}=\frac{1}{\sqrt{|N_u|}}\sum_{m:\,u_m=u}\big(q_{i_m}^l+\bar e_{c_m}\big),\qquad p_u=\sum_l\beta_lp_u^l,\qquad
\hat y(u,c,i)=\mathrm{FM}(p_u,q_i,v_{c1},\dots,v_{ck})
$$

With sums as messages a layer is linear, $q\mapsto Aq+S$: one sparse product per layer, and $S$, what the contexts add,
once for all layers. Ranking all items takes one matrix product (`fm_rank`).

Reference: J. Wu, X. He, X. Wang, Q. Wang, W. Chen, J. Lian, X. Xie, *Graph Convolution Machine for Context-aware
Recommender System*, Frontiers of Computer Science 16, 2022, arXiv:2001.11402. Documentation:
`docs/papers/recsys-losses/gcm.md`.
"""

from __future__ import annotations

from recsys_losses.gcm._convolution import MergeWeights, gcm_convolve, gcm_encode
from recsys_losses.gcm._data import ContextDataset, Samples
from recsys_losses.gcm._decoders import fm_decode, fm_rank, mlp_decode, mlp_rank
from recsys_losses.gcm._loss import GCMLoss, gcm_loss
from recsys_losses.gcm._model import GCM
from recsys_losses.gcm._synthetic import SyntheticContexts, make_context_data
from recsys_losses.gcm._training import fit_gcm, load_gcm, save_gcm

__all__ = [
    "GCM",
    "ContextDataset",
    "GCMLoss",
    "MergeWeights",
    "Samples",
    "SyntheticContexts",
    "fit_gcm",
    "fm_decode",
    "fm_rank",
    "gcm_convolve",
    "gcm_encode",
    "gcm_loss",
    "load_gcm",
    "make_context_data",
    "mlp_decode",
    "mlp_rank",
    "save_gcm",
]
