r"""MCRL: model-enhanced contrastive reinforcement learning for sequential recommendation.

Learns from logs which next item leads to purchases later: a conservative double Q-function, and two contrastive models
beside it, one of the reward and one of the transition, that share its encoder. Logged actions are the positives, random
actions the negatives.

$$
\mathcal L=w_{td}\,\tfrac12\big(Q(s,a)-y\big)^2+w_c\Big(\log\sum_{a'}e^{Q(s,a')}-Q(s,a)\Big)
+w_r\,\mathcal L_{\text{reward}}+w_t\,\mathcal L_{\text{transition}},\qquad
y=r+\gamma(1-\mathrm{done})\,Q^-\big(s',\arg\max_{a'}Q(s',a')\big)
$$

Reference: C. Li, Z. Yang, J. Zhang, J. Wu, D. Wang, X. He, X. Wang, *Model-enhanced Contrastive Reinforcement Learning
for Sequential Recommendation*, 2023, arXiv:2310.16566. Only the abstract could be read and no code exists: every formula
here is our reading of it. Documentation: `docs/papers/recsys-losses/mcrl.md`.
"""

from recsys_losses.mcrl._backbones import Caser, GRU4Rec, NextItNet, SASRec
from recsys_losses.mcrl._buffer import (
    ReplayBuffer,
    Transitions,
    number_items,
    pad_histories,
    read_sessions,
    sessions_to_columns,
    split_sessions,
    write_sessions,
)
from recsys_losses.mcrl._losses import (
    MCRLLoss,
    conservative_loss,
    contrastive_reward_loss,
    contrastive_transition_loss,
    double_q_target,
    mcrl_loss,
    sample_negative_actions,
    td_loss,
)
from recsys_losses.mcrl._metrics import next_item_metrics
from recsys_losses.mcrl._model import MCRL
from recsys_losses.mcrl._simulator import RolloutReturn, SessionSimulator
from recsys_losses.mcrl._training import MCRLTrainer, evaluate_next_item

__all__ = [
    "MCRL",
    "Caser",
    "GRU4Rec",
    "MCRLLoss",
    "MCRLTrainer",
    "NextItNet",
    "ReplayBuffer",
    "RolloutReturn",
    "SASRec",
    "SessionSimulator",
    "Transitions",
    "conservative_loss",
    "contrastive_reward_loss",
    "contrastive_transition_loss",
    "double_q_target",
    "evaluate_next_item",
    "mcrl_loss",
    "next_item_metrics",
    "number_items",
    "pad_histories",
    "read_sessions",
    "sample_negative_actions",
    "sessions_to_columns",
    "split_sessions",
    "td_loss",
    "write_sessions",
]
