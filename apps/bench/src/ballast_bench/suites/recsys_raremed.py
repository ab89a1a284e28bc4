"""Cases of RAREMed: its parts, and simple baselines, on generated hospital visits whose truth is known.

Protocol: patients in file order, 4 : 1 : 1; the epoch of fine-tuning is the best on the validation visits; the test
visits are looked at once. Each seed generates its own data, and all methods of a seed see the same.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ballast_bench.case import Case, CellInput, CellOutput, Metric

if TYPE_CHECKING:
    from recsys_losses.raremed import EHRDataset

__all__ = ["cpu", "quick", "recommend"]

# Creating the first optimiser imports torch._dynamo, which takes as long as torch itself.
_PRELOAD = ("recsys_losses.raremed", "torch._dynamo")
_RUN = "ballast_bench.suites.recsys_raremed:recommend"
_METRICS = (
    Metric("jaccard", label="Jaccard"),
    Metric("prauc", label="PRAUC"),
    Metric("ddi_rate", better="lower", label="DDI rate", tolerance=0.03),
    # how many drugs is neither better high nor low; it is shown for what the weights do
    Metric("num_med", better="lower", label="drugs", digits=1, tested=False, tolerance=0.1),
    Metric("gap", better="lower", label="gap of G1-G5", tolerance=0.3),
    Metric("group_std", better="lower", label="std of G1-G5", tolerance=0.3),
    Metric("group_1", label="Jaccard G1 (common)", tested=False),
    Metric("group_5", label="Jaccard G5 (rare)"),
    Metric("train_seconds", better="lower", label="train s", digits=1, tested=False, tolerance=0.25),
)
_SMALL = {"embed_dim": 64, "num_layers": 2, "num_heads": 4, "ff_dim": 256}


def quick() -> tuple[Case, ...]:
    """A smaller network on fewer patients: what the interaction weight does, beside the most popular drugs."""
    network = {"embed_dim": 32, "num_layers": 1, "num_heads": 4, "ff_dim": 64, "dropout": 0.1}
    settings = {"patients": 500, "network": network, "epochs": 8, "optimiser": {"batch_size": 32, "lr": 3e-3}}
    return (
        _case(
            "raremed-quick",
            "Medication recommendation on generated visits, small",
            {
                "popularity (top-14)": {"patients": 500, "baseline": "popularity", "k": 14},
                "no pre-training": settings,
                "beta 5": {**settings, "weights": {"ddi_weight": 5.0}},
            },
            baseline="popularity (top-14)",
            expected=4,
            note=(
                "500 patients with common and rare latent conditions, one encoder layer of width 32, 8 epochs, settings "
                "not tuned. The truth recommends 14 drugs per visit and a Bayes-optimal recommender reaches a Jaccard index "
                "of about 0.67. Not a medical device."
            ),
        ),
    )


def cpu() -> tuple[Case, ...]:
    """The parts of RAREMed at the settings of the method card's reference runs."""
    plain: dict[str, Any] = {
        "patients": 1200,
        "network": {**_SMALL, "dropout": 0.3},
        "epochs": 12,
        "optimiser": {"batch_size": 16, "lr": 1e-3},
    }
    return (
        _case(
            "raremed-synthetic",
            "RAREMed with and without its parts on generated visits",
            {
                "no pre-training": plain,
                "SR": {**plain, "sr_epochs": 6},
                "SMP+SR": {**plain, "smp_epochs": 6, "sr_epochs": 6},
                "beta 5": {**plain, "weights": {"ddi_weight": 5.0}},
                "alpha .2": {**plain, "weights": {"margin_weight": 0.2}},
                "popularity (top-14)": {"patients": 1200, "baseline": "popularity", "k": 14},
                "logistic regression": {"patients": 1200, "baseline": "logistic", "C": 1.0},
            },
            baseline="no pre-training",
            expected=20,
            note=(
                "1,200 generated patients, about 2,900 visits, 300 diagnoses, 80 procedures, 90 drugs; common and rare "
                "latent conditions. Groups G1 (common) to G5 (rare) by a visit's rarest diagnosis. Width 64, 2 layers, "
                "dropout 0.3, AdamW 1e-3, batches of 16, 6 epochs per pre-training task and 12 of fine-tuning: the "
                "settings of earlier reference runs, not tuned here. The epoch of fine-tuning is chosen on validation "
                "visits. The published regime (width 512, batch 1, lr 1e-5, 20 + 20 epochs) is far longer, so that its "
                "gain from pre-training isn't to be expected here. Not a medical device."
            ),
        ),
    )


def _case(
    name: str, title: str, methods: dict[str, dict[str, Any]], *, baseline: str, expected: float, note: str
) -> Case:
    return Case(
        package="recsys_losses",
        name=name,
        title=title,
        dataset="synthetic-ehr",
        run=_RUN,
        methods=methods,
        baseline=baseline,
        seeds=(0, 1, 2),
        metrics=_METRICS,
        tradeoff=("ddi_rate", "jaccard"),
        preload=_PRELOAD,
        expected=expected,
        budget=900,
        note=note,
    )


def recommend(cell: CellInput) -> CellOutput:
    """Train and test one recommender of medications: one cell of every case here."""
    import torch

    from recsys_losses.raremed import bayes_optimal, evaluate_recommendations, make_synthetic_ehr

    torch.set_num_threads(1)
    ehr = make_synthetic_ehr(num_patients=cell.settings["patients"], seed=cell.seed)
    parts = ehr.dataset().split()
    start = time.perf_counter()
    history: tuple[dict[str, float], ...] = ()
    if "baseline" in cell.settings:
        probability = _baseline(cell.settings, parts[0], parts[2])
        seconds = time.perf_counter() - start
    else:
        probability, history, seconds = _train(cell.settings, parts, cell.seed)
    metrics = evaluate_recommendations(parts[2], probability)
    metrics["train_seconds"] = seconds
    info = {
        "device": "cpu",
        "visits": [len(part) for part in parts],
        "bayes_optimal_jaccard": float(bayes_optimal(ehr.truth[-len(parts[2]) :]).expected_jaccard.mean()),
        "truth_ddi_rate": evaluate_recommendations(parts[2], parts[2].targets())["ddi_rate"],
        **{name: value for name, value in metrics.items() if name.startswith(("group_", "neg_", "weighted_"))},
    }
    return CellOutput({metric.name: metrics[metric.name] for metric in _METRICS}, history, info)


def _baseline(settings: dict[str, Any], train: EHRDataset, test: EHRDataset) -> Any:
    from recsys_losses.raremed import logistic_medications, popular_medications

    if settings["baseline"] == "popularity":
        return popular_medications(train, test, k=settings["k"])
    return logistic_medications(train, test, C=settings["C"])


def _train(settings: dict[str, Any], parts: tuple[EHRDataset, ...], seed: int) -> tuple[Any, Any, float]:
    """Probabilities on the test visits, the history of fine-tuning, and the seconds of all stages."""
    from recsys_losses.raremed import RAREMed, RAREMedTrainer, predict_medications

    train, valid, test = parts
    sizes = (train.num_diagnoses, train.num_procedures, train.num_medications)
    model = RAREMed(*sizes, **settings["network"], seed=seed)
    trainer = RAREMedTrainer(model, train, valid, **settings["optimiser"], **settings.get("weights", {}), seed=seed)
    records: list[dict[str, float]] = []
    if settings.get("smp_epochs"):
        records += trainer.pretrain_smp(settings["smp_epochs"]).history
    if settings.get("sr_epochs"):
        records += trainer.pretrain_sr(settings["sr_epochs"]).history
    tuned = trainer.finetune(settings["epochs"], patience=None).history
    return predict_medications(model, test), tuple(tuned), sum(record["seconds"] for record in [*records, *tuned])
