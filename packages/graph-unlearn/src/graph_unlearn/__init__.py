"""Deleting nodes, edges and features from trained graph networks (GIF), with baselines, attacks and a check in weight space.

`unlearn` is the main function; `requests` says what goes, `attacks` and `convex` whether it went. Documentation:
`docs/packages/graph-unlearn.md`.
"""

from graph_unlearn import attacks, convex, data, gif, graph_eraser, nets, requests, training
from graph_unlearn.attacks import adversarial_edges, efficacy_curve, membership_auc
from graph_unlearn.data import Neighborhoods, load_graph, synthetic_graph, training_graph
from graph_unlearn.gif import (
    DampingWarning,
    Timings,
    UnlearnResult,
    UnstableStepError,
    auto_damping,
    count_layers,
    gif_delta,
    gif_rhs,
    influence_masks,
    unlearn,
)
from graph_unlearn.graph_eraser import GraphEraser, balanced_assign, balanced_lpa
from graph_unlearn.nets import GAT, GCN, GIN, SGC
from graph_unlearn.requests import (
    AffectedNodes,
    EdgeRequest,
    FeatureRequest,
    NodeRequest,
    Request,
    affected_nodes,
    apply_request,
    check_request,
    draw_request,
    remove_edges,
    remove_nodes,
)
from graph_unlearn.training import TrainConfig, accuracy, paper_config, retrain, train

__all__ = [
    "GAT",
    "GCN",
    "GIN",
    "SGC",
    "AffectedNodes",
    "DampingWarning",
    "EdgeRequest",
    "FeatureRequest",
    "GraphEraser",
    "Neighborhoods",
    "NodeRequest",
    "Request",
    "Timings",
    "TrainConfig",
    "UnlearnResult",
    "UnstableStepError",
    "accuracy",
    "adversarial_edges",
    "affected_nodes",
    "apply_request",
    "attacks",
    "auto_damping",
    "balanced_assign",
    "balanced_lpa",
    "check_request",
    "convex",
    "count_layers",
    "data",
    "draw_request",
    "efficacy_curve",
    "gif",
    "gif_delta",
    "gif_rhs",
    "graph_eraser",
    "influence_masks",
    "load_graph",
    "membership_auc",
    "nets",
    "paper_config",
    "remove_edges",
    "remove_nodes",
    "requests",
    "retrain",
    "synthetic_graph",
    "train",
    "training",
    "training_graph",
    "unlearn",
]
