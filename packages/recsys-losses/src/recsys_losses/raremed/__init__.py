r"""RAREMed: medication recommendation that leaves no rare disease behind.

One transformer reads a visit's diagnoses, by priority, and procedures; two pre-training tasks that need no labels
(do these belong together? which codes were there?) precede fine-tuning on the medications given, whose loss also
holds back drugs that interact:

$$
\mathcal{L}=(1-\alpha)\,\mathcal{L}_\mathrm{bce}+\alpha\,\mathcal{L}_\mathrm{margin}+\beta\,c\,s^\top A\,s
$$

Not a medical device: for research only.

Reference: Z. Zhao, Y. Jing, F. Feng, J. Wu, C. Gao, X. He, *Leave No Patient Behind: Enhancing Medication Recommendation
for Rare Disease Patients*, SIGIR 2024, arXiv:2403.17745, eq. 1-10. Documentation: `docs/papers/recsys-losses/raremed.md`.
"""

from recsys_losses.raremed._baselines import logistic_medications, popular_medications
from recsys_losses.raremed._losses import (
    MedicationLoss,
    ddi_loss,
    medication_loss,
    multilabel_margin,
    smp_loss,
    sr_loss,
)
from recsys_losses.raremed._metrics import (
    Fairness,
    ddi_rate,
    jaccard_per_visit,
    multilabel_metrics,
    rarity_fairness,
    visit_rarity,
)
from recsys_losses.raremed._mimic import MimicTables, read_mimic
from recsys_losses.raremed._model import RAREMed, Tokens, load_raremed, save_raremed
from recsys_losses.raremed._pretext import make_smp_negatives, mask_codes
from recsys_losses.raremed._records import EHRDataset, EHRVocabulary, Visit
from recsys_losses.raremed._synthetic import EHR, BayesOptimal, bayes_optimal, make_synthetic_ehr
from recsys_losses.raremed._training import RAREMedTrainer, evaluate_recommendations, predict_medications

__all__ = [
    "EHR",
    "BayesOptimal",
    "EHRDataset",
    "EHRVocabulary",
    "Fairness",
    "MedicationLoss",
    "MimicTables",
    "RAREMed",
    "RAREMedTrainer",
    "Tokens",
    "Visit",
    "bayes_optimal",
    "ddi_loss",
    "ddi_rate",
    "evaluate_recommendations",
    "jaccard_per_visit",
    "load_raremed",
    "logistic_medications",
    "make_smp_negatives",
    "make_synthetic_ehr",
    "mask_codes",
    "medication_loss",
    "multilabel_margin",
    "multilabel_metrics",
    "popular_medications",
    "predict_medications",
    "rarity_fairness",
    "read_mimic",
    "save_raremed",
    "smp_loss",
    "sr_loss",
    "visit_rarity",
]
