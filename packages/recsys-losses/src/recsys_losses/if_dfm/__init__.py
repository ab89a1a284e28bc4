r"""IF-DFM: influence update of a conversion model for delayed feedback.

A click is trained on as 0 until it converts. When conversions arrive, and new clicks with them, the change that retraining
would make to the parameters is, to first order, the solution of one linear system with the Hessian of the trained loss.
Adding it takes seconds and needs no delay model.

$$\delta=-\frac1nH^{-1}\Bigl[\sum_{j\in J}\bigl(\nabla\ell(z_j^\delta)-\nabla\ell(z_j)\bigr)+\sum_{k\in K}\nabla\ell(z_k)\Bigr]$$

Around it: the losses of the delayed-feedback methods it is compared with, the Criteo log and generated clicks with known
delays, the protocol's windows and hourly stream, small backbones, and training.

Reference: C. Ding, J. Wu, Y. Yuan, C. Li, X. Wang, D. Wang, F. Yang, A. Rabinovich, *Delayed Feedback Modeling with
Influence Functions*, AAAI 2026, arXiv:2502.01669. Documentation: `docs/papers/recsys-losses/if_dfm.md`.
"""

from recsys_losses.if_dfm._data import (
    Batch,
    ClickLoader,
    Clicks,
    DelayedClicks,
    StreamHour,
    concatenate,
    make_delayed_clicks,
)
from recsys_losses.if_dfm._influence import (
    InfluenceUpdater,
    Solve,
    Update,
    choose_damping,
    hessian_vector_product,
    influence_rhs,
    solve_influence,
)
from recsys_losses.if_dfm._logistic import LogisticUpdate, logistic_influence_update
from recsys_losses.if_dfm._losses import (
    defer_loss,
    dfm_loss,
    es_dfm_loss,
    es_dfm_pretrain_loss,
    fnc_calibrate,
    fnw_loss,
    fsiw_loss,
    ulc_loss,
)
from recsys_losses.if_dfm._metrics import cvr_metrics, relative_improvement
from recsys_losses.if_dfm._models import (
    MODELS,
    AutoInt,
    DCNv2,
    DeepFM,
    LogisticModel,
    MLPModel,
    build_model,
    load_model,
    save_model,
)
from recsys_losses.if_dfm._training import METHODS, Trained, TrainOptions, fit_clicks, predict, train_method

__all__ = [
    "METHODS",
    "MODELS",
    "AutoInt",
    "Batch",
    "ClickLoader",
    "Clicks",
    "DCNv2",
    "DeepFM",
    "DelayedClicks",
    "InfluenceUpdater",
    "LogisticModel",
    "LogisticUpdate",
    "MLPModel",
    "Solve",
    "StreamHour",
    "TrainOptions",
    "Trained",
    "Update",
    "build_model",
    "choose_damping",
    "concatenate",
    "cvr_metrics",
    "defer_loss",
    "dfm_loss",
    "es_dfm_loss",
    "es_dfm_pretrain_loss",
    "fit_clicks",
    "fnc_calibrate",
    "fnw_loss",
    "fsiw_loss",
    "hessian_vector_product",
    "influence_rhs",
    "load_model",
    "logistic_influence_update",
    "make_delayed_clicks",
    "predict",
    "relative_improvement",
    "save_model",
    "solve_influence",
    "train_method",
    "ulc_loss",
]
