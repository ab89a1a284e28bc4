"""Recommendation losses that stay steady under popularity bias and noise, with what it takes to train and judge them.

Methods: `ssm`, `bsl`, `adap_tau`, `cpr`; baselines in `baselines`. Around them: `data`, `sampling`, `models`, `training`,
`metrics`, and `blocked` for softmax over whole catalogues in bounded memory.
"""

from importlib.metadata import version

from recsys_losses.adap_tau import (
    AdaptiveTemperature,
    adap_tau_loss,
    estimate_inverse_temperature,
    lambertw0,
    unit_temperature_loss,
    user_inverse_temperature,
    warmup_inverse_temperature,
)
from recsys_losses.baselines import BCELoss, BPRLoss, SoftmaxLoss, bce_loss, bpr_loss, softmax_loss
from recsys_losses.blocked import BlockedScores, blocked_log_sum_exp, blocked_scores, blocked_softmax_loss
from recsys_losses.bsl import (
    BilateralSoftmaxLoss,
    BSLLoss,
    bilateral_softmax_loss,
    bsl_loss,
    grouped_log_mean_exp,
    in_batch_scores,
)
from recsys_losses.cpr import CPRLoss, CPRSampler, cpr_batch_sizes, cpr_loss, cpr_scores, filter_cpr_candidates
from recsys_losses.data import (
    DATASETS,
    InteractionData,
    SyntheticFeedback,
    check_dataset,
    hold_out_validation,
    inject_false_positives,
    k_core,
    load_dataset,
    read_inter,
    read_lightgcn,
    read_movielens,
    read_pairs,
    split_ratio,
    synthetic_feedback,
    unbiased_split,
)
from recsys_losses.metrics import (
    evaluate_full_ranking,
    item_group_recall,
    item_popularity_groups,
    metrics_from_hits,
    topk_items,
)
from recsys_losses.models import LightGCN, MatrixFactorization, normalized_adjacency
from recsys_losses.sampling import (
    EdgeSet,
    PopularityNegativeSampler,
    UniformNegativeSampler,
    in_batch_log_q,
    item_counts,
)
from recsys_losses.ssm import SSMLoss, in_batch_ssm_loss, sampled_softmax_loss, ssm_loss
from recsys_losses.training import LOSSES, FitResult, LossConfig, evaluate, fit, load_model, save_model

__version__ = version("recsys-losses")

__all__ = [
    "DATASETS",
    "LOSSES",
    "AdaptiveTemperature",
    "BCELoss",
    "BPRLoss",
    "BSLLoss",
    "BilateralSoftmaxLoss",
    "BlockedScores",
    "CPRLoss",
    "CPRSampler",
    "EdgeSet",
    "FitResult",
    "InteractionData",
    "LightGCN",
    "LossConfig",
    "MatrixFactorization",
    "PopularityNegativeSampler",
    "SSMLoss",
    "SoftmaxLoss",
    "SyntheticFeedback",
    "UniformNegativeSampler",
    "adap_tau_loss",
    "bce_loss",
    "bilateral_softmax_loss",
    "blocked_log_sum_exp",
    "blocked_scores",
    "blocked_softmax_loss",
    "bpr_loss",
    "bsl_loss",
    "check_dataset",
    "cpr_batch_sizes",
    "cpr_loss",
    "cpr_scores",
    "estimate_inverse_temperature",
    "evaluate",
    "evaluate_full_ranking",
    "filter_cpr_candidates",
    "fit",
    "grouped_log_mean_exp",
    "hold_out_validation",
    "in_batch_log_q",
    "in_batch_scores",
    "in_batch_ssm_loss",
    "inject_false_positives",
    "item_counts",
    "item_group_recall",
    "item_popularity_groups",
    "k_core",
    "lambertw0",
    "load_dataset",
    "load_model",
    "metrics_from_hits",
    "normalized_adjacency",
    "read_inter",
    "read_lightgcn",
    "read_movielens",
    "read_pairs",
    "sampled_softmax_loss",
    "save_model",
    "softmax_loss",
    "split_ratio",
    "ssm_loss",
    "synthetic_feedback",
    "topk_items",
    "unbiased_split",
    "unit_temperature_loss",
    "user_inverse_temperature",
    "warmup_inverse_temperature",
]
