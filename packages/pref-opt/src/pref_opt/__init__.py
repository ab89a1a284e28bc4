r"""Preference optimisation that holds under noisy labels: losses on log-probabilities, and trainers that take them by name.

$$\mathcal L=-\log\sigma\big(\beta\,[(\log\pi(y_w)-\log\pi(y_l))-(\log\pi_\text{ref}(y_w)-\log\pi_\text{ref}(y_l))]\big)$$

One module per method: `alpha_dpo`, `beta_dpo`, `dr_dpo`, `gamma_po`, `repo` for pairs, `napo` and `dynamic_po` for several
negatives, `alignment_potential` for choosing pairs, `baselines` for what they are compared with. `pref_opt.trl` and
`pref_opt.multi_negative` are the trainers; they, `tiny` and parts of `data` need the extra `trl`, the rest needs torch.
"""

from pref_opt import (
    alignment_potential,
    alpha_dpo,
    baselines,
    beta_dpo,
    chunked,
    dr_dpo,
    dynamic_po,
    gamma_po,
    losses,
    napo,
    repo,
    stats,
)
from pref_opt.losses import (
    Logps,
    LossContext,
    LossOutput,
    PreferenceLoss,
    loss_names,
    make_loss,
    register_loss,
)

__all__ = [
    "Logps",
    "LossContext",
    "LossOutput",
    "PreferenceLoss",
    "alignment_potential",
    "alpha_dpo",
    "baselines",
    "beta_dpo",
    "chunked",
    "dr_dpo",
    "dynamic_po",
    "gamma_po",
    "loss_names",
    "losses",
    "make_loss",
    "napo",
    "register_loss",
    "repo",
    "stats",
]
