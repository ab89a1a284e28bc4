"""Graph classification under distribution shift on PyTorch Geometric, and clustering with an unknown number of clusters.

CAL, AIA and InfoIGL with the baselines and the data of a fair comparison. `graph_ood.asrc` and `graph_ood.rcc` are imported
by name: they are scikit-learn estimators, and nothing else here needs scikit-learn to be loaded. Documentation:
`docs/packages/graph-ood.md`.
"""

from graph_ood import aia, baselines, cal, data, explain, infoigl, nets, training
from graph_ood.aia import AIA, AIATrainer, MaskNet, combine_masks, graph_covariate_shift, mask_regularizer
from graph_ood.baselines import drop_edge, group_dro_loss, irm_penalty, mixup, train_baseline, vrex_penalty
from graph_ood.cal import CAL, CALPlus, cal_loss, cross_validate_tu, intervene, train_cal
from graph_ood.data import (
    GoodMotif,
    SynB,
    check_graphs,
    environment_ids,
    load_good_motif,
    load_syn_b,
    load_tu,
    size_split,
    spurious_motif,
)
from graph_ood.explain import draw_split, mask_auc
from graph_ood.infoigl import InfoIGL, InfoIGLTrainer, infoigl_loss, instance_loss, semantic_loss
from graph_ood.nets import ConvStack, GraphClassifier, ProjectedEncoder, attention_split, weighted_gcn_conv
from graph_ood.training import History, cross_validate, evaluate, fit, load_model, save_model, supervised_step

__all__ = [
    "AIA",
    "CAL",
    "AIATrainer",
    "CALPlus",
    "ConvStack",
    "GoodMotif",
    "GraphClassifier",
    "History",
    "InfoIGL",
    "InfoIGLTrainer",
    "MaskNet",
    "ProjectedEncoder",
    "SynB",
    "aia",
    "attention_split",
    "baselines",
    "cal",
    "cal_loss",
    "check_graphs",
    "combine_masks",
    "cross_validate",
    "cross_validate_tu",
    "data",
    "draw_split",
    "drop_edge",
    "environment_ids",
    "evaluate",
    "explain",
    "fit",
    "graph_covariate_shift",
    "group_dro_loss",
    "infoigl",
    "infoigl_loss",
    "instance_loss",
    "intervene",
    "irm_penalty",
    "load_good_motif",
    "load_model",
    "load_syn_b",
    "load_tu",
    "mask_auc",
    "mask_regularizer",
    "mixup",
    "nets",
    "save_model",
    "semantic_loss",
    "size_split",
    "spurious_motif",
    "supervised_step",
    "train_baseline",
    "train_cal",
    "training",
    "vrex_penalty",
    "weighted_gcn_conv",
]
