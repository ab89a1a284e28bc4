"""`ballast recsys raremed`: medication recommendation from hospital visits. For research; not a medical device."""

from __future__ import annotations

import dataclasses
import json as json_module
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from ballast_cli.output import EpochProgress, print_result, write_json

raremed_app = App(
    name="raremed",
    help="RAREMed: recommend medications for hospital visits. For research only, not a medical device.",
)


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class NetworkOptions:
    """The network."""

    embed_dim: int = 512
    "Width of the representation."
    num_layers: int = 3
    "Encoder layers."
    num_heads: int = 4
    "Attention heads."
    ff_dim: int = 2048
    "Width of the feed-forward part."
    dropout: float = 0.3
    "Dropout rate."
    relevance: Literal["rank", "constant"] = "rank"
    "`rank` tells the order of codes; `constant` repeats a slip of the authors' code that hides it."


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class StepOptions:
    """The optimiser, shared by all stages, and how patients are split."""

    batch_size: int = 16
    "Visits per step; 1 with `--lr 1e-5` is the authors' regime."
    lr: float = 1e-4
    "Learning rate of AdamW."
    weight_decay: float = 0.1
    "Weight decay of AdamW."
    split_order: Literal["file", "random"] = "file"
    "Patients in file order, as the authors' code, or shuffled, as the paper."


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class PretrainingOptions:
    """The two pre-training stages."""

    smp_epochs: int = 20
    "Epochs of sequence matching; 0 leaves it out."
    sr_epochs: int = 20
    "Epochs of self-reconstruction; 0 leaves it out."
    smp_form: Literal["bce", "pairwise_softmax"] = "bce"
    "Loss of sequence matching: the paper's or the code's."
    different_patient: bool = False
    "Mix visits of different patients only, as the paper says."
    mask_prob: float = 0.0
    "Share of codes hidden in self-reconstruction."


@raremed_app.command
def make_synthetic(
    *,
    output: Path = Path("data/raremed-synthetic"),
    num_patients: int = 1200,
    num_diagnoses: int = 300,
    num_procedures: int = 80,
    num_medications: int = 90,
    num_conditions: int = 25,
    zipf: float = 1.1,
    ddi_density: float = 0.12,
    ddi_format: Literal["npz", "csv"] = "npz",
    seed: int = 0,
    json: bool = False,
) -> None:
    """Generate visits of patients with common and rare conditions, as JSON Lines.

    Examples:
        ballast recsys raremed make-synthetic --output data/ehr --num-patients 400

    Args:
        output: Folder for `visits.jsonl`, `vocab.json` and the interactions.
        num_patients: Patients; about 2.4 visits each.
        num_diagnoses: Diagnosis codes.
        num_procedures: Procedure codes.
        num_medications: Medications.
        num_conditions: Latent conditions.
        zipf: Exponent of their popularity; larger makes the rare ones rarer.
        ddi_density: Share of pairs of drugs that interact.
        ddi_format: A matrix, or pairs of codes.
        seed: Seed of everything.
        json: Print the result as one JSON object.
    """
    from recsys_losses.raremed import bayes_optimal, make_synthetic_ehr

    ehr = make_synthetic_ehr(
        num_patients, num_diagnoses, num_procedures, num_medications, num_conditions, zipf, ddi_density, seed
    )
    data = ehr.dataset()
    data.to_jsonl(output, ddi=ddi_format)
    best = float(bayes_optimal(ehr.truth).expected_jaccard.mean())
    print_result({**_sizes(data), "bayes_optimal_jaccard": best, "output": str(output)}, as_json=json)


@raremed_app.command
def prepare_mimic(
    folder: Path,
    /,
    *,
    output: Path = Path("data/raremed-mimic"),
    ndc_to_rxcui: Path | None = None,
    rxcui_to_atc: Path | None = None,
    drugbank: Path | None = None,
    drug_atc: Path | None = None,
    drug_ddi: Path | None = None,
    medication_key: Literal["drug", "ndc"] = "drug",
    drop_ndc_zero: bool = True,
    forward_fill: bool = True,
    min_admissions: int = 2,
    max_medications: int = 300,
    subject_share: float | None = None,
    min_occurrences: int = 6,
    num_side_effects: int = 40,
    ddi_format: Literal["npz", "csv"] = "npz",
    json: bool = False,
) -> None:
    """Build visits from the tables of MIMIC-III or MIMIC-IV, as JSON Lines. The tables stay where they are.

    Examples:
        ballast recsys raremed prepare-mimic shared/data/recsys/mimic-iii-demo --min-admissions 1 --min-occurrences 2

    Args:
        folder: Folder with DIAGNOSES_ICD, PROCEDURES_ICD and PRESCRIPTIONS (`.csv` or `.csv.gz`).
        output: Folder for `visits.jsonl`, `vocab.json` and the interactions.
        ndc_to_rxcui: `ndc2RXCUI.txt`; with `--rxcui-to-atc` it maps products to ATC classes.
        rxcui_to_atc: `RXCUI2atc4.csv`.
        drugbank: `drugbank_drugs_info.csv`: keep classes with a known structure.
        drug_atc: `drug-atc.csv`, needed with `--drug-ddi`.
        drug_ddi: `drug-DDI.csv` (TWOSIDES); without it no drugs interact.
        medication_key: What a medication is without the mapping.
        drop_ndc_zero: Drop prescriptions without a product code.
        forward_fill: Fill missing values from the row before; otherwise drop such rows.
        min_admissions: Least admissions of a patient in the prescriptions.
        max_medications: The most frequent ones are kept.
        subject_share: First share of the patients; all for MIMIC-III, a tenth for MIMIC-IV by default.
        min_occurrences: Least admissions with a diagnosis or procedure code.
        num_side_effects: Rarest side effects that interactions come from.
        ddi_format: A matrix, or pairs of codes.
        json: Print the result as one JSON object.
    """
    from recsys_losses.raremed import MimicTables, read_mimic

    data = read_mimic(
        folder,
        MimicTables(ndc_to_rxcui, rxcui_to_atc, drugbank, drug_atc, drug_ddi),
        medication_key=medication_key,
        drop_ndc_zero=drop_ndc_zero,
        forward_fill=forward_fill,
        min_admissions=min_admissions,
        max_medications=max_medications,
        subject_share=subject_share,
        min_occurrences=min_occurrences,
        num_side_effects=num_side_effects,
    )
    data.to_jsonl(output, ddi=ddi_format)
    print_result({**_sizes(data), "output": str(output)}, as_json=json)


@raremed_app.command
def pretrain(
    *,
    data: Path,
    output: Path = Path("runs/raremed-pretrain"),
    network: NetworkOptions = NetworkOptions(),
    step: StepOptions = StepOptions(),
    pretraining: PretrainingOptions = PretrainingOptions(),
    seed: int = 0,
    device: str = "cpu",
    fresh: bool = False,
    json: bool = False,
) -> None:
    """Pre-train the network by sequence matching, then self-reconstruction; `finetune --pretrained` goes on from there.

    An interrupted run continues exactly where it stopped when the same command is given again.

    Examples:
        ballast recsys raremed pretrain --data data/ehr --embed-dim 64 --num-layers 2 --ff-dim 256 --lr 1e-3

    Args:
        data: Folder or file of visits.
        output: Folder for the checkpoints, `model.safetensors`, `config.json`, `history.json`.
        network: The network.
        step: The optimiser and the split.
        pretraining: The stages.
        seed: Seed of initialisation, split and training.
        device: Torch device.
        fresh: Start over instead of continuing checkpoints in `--output`.
        json: Print the result as one JSON object.
    """
    from recsys_losses.raremed import save_raremed

    if pretraining.smp_epochs < 0 or pretraining.sr_epochs < 0 or not pretraining.smp_epochs + pretraining.sr_epochs:
        raise ValueError("smp-epochs and sr-epochs must be at least 0, and one of them above")
    config = {"seed": seed, **_plain(network, step, pretraining)}
    trainer, _ = _trainer(data, config, device, weights={})
    write_json(output / "config.json", config)
    history = _pretrain(trainer, config, output, quiet=json, resume=not fresh)
    save_raremed(trainer.model, output / "model.safetensors")
    write_json(output / "history.json", history)
    last = {f"{stage}_{key}": value for stage, records in history.items() for key, value in records[-1].items()}
    print_result(
        {key: last[key] for key in ("smp_loss", "smp_accuracy", "sr_loss") if key in last} | {"output": str(output)},
        as_json=json,
    )


@raremed_app.command
def finetune(
    *,
    data: Path,
    output: Path = Path("runs/raremed"),
    pretrained: Path | None = None,
    network: NetworkOptions | None = None,
    step: StepOptions | None = None,
    epochs: int = 60,
    patience: int = 11,
    margin_weight: float = 0.005,
    ddi_weight: float = 0.1,
    ddi_scale: float = 5e-4,
    threshold: Annotated[float, Parameter(help="Probability from which a drug is recommended.")] = 0.5,
    seed: int | None = None,
    device: str = "cpu",
    fresh: bool = False,
    json: bool = False,
) -> None:
    """Learn to recommend medications and report the metrics on the test patients.

    An interrupted run continues exactly where it stopped when the same command is given again.

    Examples:
        ballast recsys raremed finetune --data data/ehr --pretrained runs/raremed-pretrain --epochs 12

        ballast recsys raremed finetune --data data/ehr --embed-dim 64 --num-layers 2 --ff-dim 256 --lr 1e-3

    Args:
        data: Folder or file of visits.
        output: Folder for `model.safetensors`, `metrics.json`, `history.json`, `config.json` and the checkpoint.
        pretrained: Folder of `pretrain`: its network, optimiser with its state, split and seed are taken over, so that
            none of them may be given here. Without it the network starts from random weights.
        network: The network.
        step: The optimiser and the split.
        epochs: Passes over the training visits, at most.
        patience: Epochs without a better Jaccard index on the validation visits before training stops.
        margin_weight: Weight of the margin term; more recommends more drugs.
        ddi_weight: Weight of the interaction term; more avoids interactions, with fewer drugs.
        ddi_scale: Scale of the interaction term.
        threshold: Probability from which a drug is recommended.
        seed: Seed of initialisation, split and training; 0 by default.
        device: Torch device.
        fresh: Start over instead of continuing the checkpoint in `--output`.
        json: Print the result as one JSON object.
    """
    from recsys_losses.raremed import save_raremed

    config = _finetune_config(pretrained, network, step, seed)
    weights: dict[str, Any] = {
        "margin_weight": margin_weight,
        "ddi_weight": ddi_weight,
        "ddi_scale": ddi_scale,
        "threshold": threshold,
    }
    trainer, test = _trainer(data, config, device, weights=weights)
    write_json(
        output / "config.json", {**config, **weights, "pretrained": None if pretrained is None else str(pretrained)}
    )
    if pretrained is not None:
        _pretrain(trainer, config, pretrained, quiet=json, resume=True)
    with EpochProgress(epochs, quiet=json) as progress:
        result = trainer.finetune(
            epochs,
            patience=patience,
            checkpoint=output / "checkpoint.safetensors",
            resume=not fresh,
            on_epoch=progress.update,
        )
    save_raremed(trainer.model, output / "model.safetensors")
    write_json(output / "history.json", result.history)
    more = {"best_epoch": result.best_epoch, "seconds": round(result.seconds, 2), "output": str(output)}
    summary = {**trainer.evaluate(test), **more}
    write_json(output / "metrics.json", summary)
    print_result(summary, as_json=json)


@raremed_app.command
def evaluate(
    *,
    model: Path,
    data: Path,
    split: Literal["test", "valid", "train", "all"] = "test",
    split_order: Literal["file", "random"] = "file",
    threshold: float = 0.5,
    seed: int = 0,
    device: str = "cpu",
    output: Path | None = None,
    json: bool = False,
) -> None:
    """Print accuracy, interactions and fairness over rarity of a trained model.

    Examples:
        ballast recsys raremed evaluate --model runs/raremed/model.safetensors --data data/ehr

    Args:
        model: File that `finetune` wrote.
        data: Folder or file of visits.
        split: Patients to evaluate on.
        split_order: How the patients were split.
        threshold: Probability from which a drug is recommended.
        seed: Seed of the split, with `--split-order random`.
        device: Torch device.
        output: Also write the metrics to this JSON file.
        json: Print the result as one JSON object.
    """
    from recsys_losses.raremed import EHRDataset, evaluate_recommendations, load_raremed, predict_medications

    visits = EHRDataset.from_jsonl(data)
    if split != "all":
        parts = dict(zip(("train", "valid", "test"), visits.split(order=split_order, seed=seed), strict=True))
        visits = parts[split]
    network = load_raremed(model, device=device)
    result = evaluate_recommendations(visits, predict_medications(network, visits), threshold=threshold)
    if output is not None:
        write_json(output, result)
    print_result(result, as_json=json)


def _trainer(data: Path, config: dict[str, Any], device: str, weights: dict[str, Any]) -> tuple[Any, Any]:
    """The trainer that a configuration describes, and the test visits."""
    from recsys_losses.raremed import EHRDataset, RAREMed, RAREMedTrainer

    visits = EHRDataset.from_jsonl(data)
    step = dict(config["step"])
    train, valid, test = visits.split(order=step.pop("split_order"), seed=config["seed"])
    model = RAREMed(
        visits.num_diagnoses, visits.num_procedures, visits.num_medications, **config["network"], seed=config["seed"]
    )
    return RAREMedTrainer(model, train, valid, **step, **weights, seed=config["seed"], device=device), test


def _pretrain(
    trainer: Any, config: dict[str, Any], folder: Path, *, quiet: bool, resume: bool
) -> dict[str, list[dict[str, float]]]:
    """Run both stages, or load what of them the folder holds already."""
    options, history = config["pretraining"], {}
    if options["smp_epochs"]:
        with EpochProgress(options["smp_epochs"], quiet=quiet) as progress:
            history["smp"] = trainer.pretrain_smp(
                options["smp_epochs"],
                form=options["smp_form"],
                different_patient=options["different_patient"],
                checkpoint=folder / "smp.safetensors",
                resume=resume,
                on_epoch=progress.update,
            ).history
    if options["sr_epochs"]:
        with EpochProgress(options["sr_epochs"], quiet=quiet) as progress:
            history["sr"] = trainer.pretrain_sr(
                options["sr_epochs"],
                mask_prob=options["mask_prob"],
                checkpoint=folder / "sr.safetensors",
                resume=resume,
                on_epoch=progress.update,
            ).history
    return history


def _finetune_config(
    pretrained: Path | None, network: NetworkOptions | None, step: StepOptions | None, seed: int | None
) -> dict[str, Any]:
    if pretrained is None:
        return {"seed": 0 if seed is None else seed, **_plain(network or NetworkOptions(), step or StepOptions())}
    if network is not None or step is not None or seed is not None:
        raise ValueError("network, optimiser, split and seed come from --pretrained; don't give them here")
    path = pretrained / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; is {pretrained} a folder of `ballast recsys raremed pretrain`?")
    try:
        config: dict[str, Any] = json_module.loads(path.read_text(encoding="utf-8"))
    except json_module.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    # finetune would otherwise do the rest of an interrupted pre-training, or all of it
    stages = [name for name in ("smp", "sr") if config["pretraining"][f"{name}_epochs"]]
    if not (pretrained / "model.safetensors").is_file():
        raise ValueError(f"{pretrained} holds no finished pre-training; give the `pretrain` command again")
    missing = [name for name in stages if not (pretrained / f"{name}.safetensors").is_file()]
    if missing:
        raise FileNotFoundError(f"no file {pretrained / missing[0]}.safetensors")
    return config


def _plain(*options: Any) -> dict[str, Any]:
    names = {NetworkOptions: "network", StepOptions: "step", PretrainingOptions: "pretraining"}
    return {names[type(part)]: dataclasses.asdict(part) for part in options}


def _sizes(data: Any) -> dict[str, int]:
    return {
        "patients": len(data.patients()),
        "visits": len(data),
        "diagnoses": data.num_diagnoses,
        "procedures": data.num_procedures,
        "medications": data.num_medications,
    }
