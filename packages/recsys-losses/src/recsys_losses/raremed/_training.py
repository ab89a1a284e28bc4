"""The three stages of RAREMed, one optimiser through all of them, and the evaluation."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from recsys_losses._checks import check_choice, check_positive
from recsys_losses._epochs import EpochRun, EpochsResult
from recsys_losses.raremed._losses import (
    SMP_FORMS,
    check_weights,
    medication_loss,
    multi_hot,
    reconstruction,
    smp_loss,
)
from recsys_losses.raremed._metrics import jaccard_per_visit, multilabel_metrics, rarity_fairness, rate_of_sets
from recsys_losses.raremed._model import RAREMed, Tokens
from recsys_losses.raremed._pretext import make_smp_negatives, mask_codes

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from recsys_losses.raremed._losses import SMPForm
    from recsys_losses.raremed._metrics import Array
    from recsys_losses.raremed._records import EHRDataset, Visit

    OnEpoch = Callable[[dict[str, float]], None]

_CHECKPOINT = "recsys_losses raremed checkpoint"
_BATCHES_PER_BUCKET = 32
_EVALUATION_BATCH = 256


class RAREMedTrainer:
    """Pre-trains and fine-tunes a `RAREMed`, by one AdamW whose state is carried over the stages.

    Call `pretrain_smp`, `pretrain_sr` and `finetune` in the order wanted; each is optional. Batches are padded, visits
    of similar length together. Everything random comes from one seeded generator. Each stage has its own checkpoint; a
    run that was interrupted is continued by the same calls with the same files: finished stages are loaded, the
    unfinished one goes on, and the result equals that of an uninterrupted run bit for bit (on one device).

    Args:
        model: Trained in place; moved to `device`.
        train: The visits to learn from.
        valid: The visits that select the epoch of fine-tuning. With `train` they are the pool of the mixed visits of
            sequence matching, as in the authors' code.
        batch_size: Visits per step. 1 with `lr=1e-5` is the authors' regime, and hours of work.
        lr: Learning rate. With larger batches and smaller models higher ones fit: 1e-3 for width 64 and batches of 16.
        weight_decay: Of AdamW.
        margin_weight: As in `medication_loss`.
        ddi_weight: As in `medication_loss`.
        ddi_scale: As in `medication_loss`.
        threshold: Probability from which a drug is recommended.
        seed: Seed of shuffling, mixed visits, masking and dropout; the model has its own.
        device: Torch device.

    Raises:
        ValueError: If an option is out of range, a part is empty, or the sizes of model and data differ.

    Examples:
        >>> from recsys_losses.raremed import EHRDataset
        >>> data = EHRDataset.synthetic(num_patients=60, seed=0)
        >>> train, valid, test = data.split()
        >>> model = RAREMed(300, 80, 90, embed_dim=16, num_layers=1, ff_dim=32, dropout=0.0)
        >>> trainer = RAREMedTrainer(model, train, valid, lr=1e-3)
        >>> _ = trainer.pretrain_sr(1)
        >>> len(trainer.finetune(2).history)
        2
        >>> sorted(trainer.evaluate(test))[:3]
        ['ddi_rate', 'f1', 'gap']
    """

    def __init__(
        self,
        model: RAREMed,
        train: EHRDataset,
        valid: EHRDataset,
        *,
        batch_size: int = 16,
        lr: float = 1e-4,
        weight_decay: float = 0.1,
        margin_weight: float = 0.005,
        ddi_weight: float = 0.1,
        ddi_scale: float = 5e-4,
        threshold: float = 0.5,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        check_positive("lr", lr)
        if not batch_size >= 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
        if not 0 <= weight_decay < float("inf"):
            raise ValueError(f"weight_decay must be a finite number of at least 0, got {weight_decay!r}")
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must be between 0 and 1 (both excluded), got {threshold!r}")
        check_weights(margin_weight, ddi_weight, ddi_scale)
        for name, part in (("train", train), ("valid", valid)):
            if not len(part):
                raise ValueError(f"{name} holds no visits")
            _check_sizes(model, part)
        self.model, self.train, self.valid = model.to(device), train, valid
        self.batch_size, self.threshold, self.device = batch_size, threshold, torch.device(device)
        self._weights = {"margin_weight": margin_weight, "ddi_weight": ddi_weight, "ddi_scale": ddi_scale}
        fused = self.device.type in ("cpu", "cuda") or None
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=fused)
        self._generator = torch.Generator().manual_seed(seed)
        self._settings = {
            "model": model.options(), "data": _digest(train, valid), "batch_size": batch_size, "lr": lr,
            "weight_decay": weight_decay, "seed": seed,
        }  # fmt: skip
        self._stages: list[dict[str, Any]] = []

    def pretrain_smp(
        self,
        epochs: int = 20,
        *,
        form: SMPForm = "bce",
        different_patient: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = True,
        on_epoch: OnEpoch | None = None,
    ) -> EpochsResult:
        """Learn to tell visits from mixed ones; keeps the last epoch.

        Args:
            epochs: Passes over the train visits, with new mixed ones in each. 20 in the authors' code, 30 in the paper.
            form: As in `smp_loss`.
            different_patient: As in `make_smp_negatives`.
            checkpoint: safetensors file that is replaced after every epoch; None writes none.
            resume: Continue from `checkpoint` where it exists; False starts the stage over.
            on_epoch: Called with the record of every finished epoch.

        Returns:
            The history: `loss` and `accuracy` of each epoch, as measured while training.

        Raises:
            ValueError: If an option is unknown, no visit can be mixed, or the checkpoint doesn't fit.
            RuntimeError: If the loss isn't finite.
        """
        check_choice("form", form, SMP_FORMS)
        pool = (*self.train.visits, *self.valid.visits)
        tokens = self._tokens(self.train.visits)

        def epoch(_: int) -> dict[str, float]:
            mixed = make_smp_negatives(
                self.train.visits, pool, different_patient=different_patient, generator=self._generator
            )
            both = _interleave(tokens, self._tokens(mixed))
            right = torch.zeros((), dtype=torch.float64, device=self.device)

            def step(rows: Tensor) -> Tensor:
                pairs = torch.stack((2 * rows, 2 * rows + 1), 1).flatten()
                logits = self.model.smp(self.model.encode_tokens(both.batch(pairs, self.device))).squeeze(1)
                target = torch.tensor([1.0, 0.0], device=self.device).repeat(rows.numel())
                right.add_(((logits.detach() > 0) == (target > 0)).sum())
                return smp_loss(logits, target, form=form, validate=False)

            loss = self._pass(both.length.view(-1, 2).sum(1), step)
            return {"loss": loss, "accuracy": float(right) / (2 * len(self.train))}

        stage = {"stage": "smp", "form": form, "different_patient": different_patient}
        return self._run(stage, epochs, epoch, checkpoint=checkpoint, resume=resume, on_epoch=on_epoch)

    def pretrain_sr(
        self,
        epochs: int = 20,
        *,
        mask_prob: float = 0.0,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = True,
        on_epoch: OnEpoch | None = None,
    ) -> EpochsResult:
        """Learn to reconstruct the codes of a visit from its representation; keeps the last epoch.

        Args:
            epochs: Passes over the train visits.
            mask_prob: Share of codes that `mask_codes` hides in each epoch; 0, the published setting, hides none.
            checkpoint: As in `pretrain_smp`.
            resume: As in `pretrain_smp`.
            on_epoch: As in `pretrain_smp`.

        Returns:
            The history with the `loss` of each epoch.

        Raises:
            ValueError: If `mask_prob` is out of range or the checkpoint doesn't fit.
            RuntimeError: If the loss isn't finite.
        """
        if not 0 <= mask_prob <= 1:
            raise ValueError(f"mask_prob must be in [0, 1], got {mask_prob!r}")
        diagnoses, procedures = _lists(self.train.visits)
        target = multi_hot(diagnoses, procedures, self.model.num_diagnoses, self.model.num_procedures)
        plain = self._tokens(self.train.visits)

        def epoch(_: int) -> dict[str, float]:
            tokens = plain if mask_prob == 0 else self._masked(diagnoses, procedures, mask_prob)

            def step(rows: Tensor) -> Tensor:
                logits = self.model.sr(self.model.encode_tokens(tokens.batch(rows, self.device)))
                return reconstruction(logits, target[rows].to(self.device))

            return {"loss": self._pass(tokens.length, step)}

        stage = {"stage": "sr", "mask_prob": mask_prob}
        return self._run(stage, epochs, epoch, checkpoint=checkpoint, resume=resume, on_epoch=on_epoch)

    def finetune(
        self,
        epochs: int = 60,
        *,
        patience: int | None = 11,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = True,
        on_epoch: OnEpoch | None = None,
    ) -> EpochsResult:
        """Learn to recommend by `medication_loss`; keeps the epoch with the best Jaccard index on the validation visits.

        Args:
            epochs: Passes over the train visits, at most.
            patience: Epochs without improvement after which training stops ("more than 10" in the authors' code); None
                never stops early.
            checkpoint: As in `pretrain_smp`.
            resume: As in `pretrain_smp`.
            on_epoch: As in `pretrain_smp`.

        Returns:
            The history with the `loss` and the validation `jaccard` of each epoch, and what was selected.

        Raises:
            ValueError: If an option is out of range or the checkpoint doesn't fit.
            RuntimeError: If the loss isn't finite.
        """
        if patience is not None and not patience >= 1:
            raise ValueError(f"patience must be at least 1 or None, got {patience!r}")
        tokens, target = self._tokens(self.train.visits), self.train.targets()
        adjacency = torch.as_tensor(self.train.ddi_adj, dtype=torch.float32, device=self.device)
        wanted = self.valid.targets().numpy()

        def step(rows: Tensor) -> Tensor:
            logits = self.model.medication(self.model.encode_tokens(tokens.batch(rows, self.device)))
            y = target[rows].to(self.device)
            return medication_loss(logits, y, adjacency, **self._weights, reduction="mean", validate=False).loss

        def select() -> dict[str, float]:
            scores = jaccard_per_visit(wanted, predict_medications(self.model, self.valid), threshold=self.threshold)
            return {"jaccard": float(scores.mean())}

        return self._run(
            {"stage": "medication", **self._weights, "threshold": self.threshold, "patience": patience},
            epochs,
            lambda _: {"loss": self._pass(tokens.length, step)},
            select,
            patience=patience,
            checkpoint=checkpoint,
            resume=resume,
            on_epoch=on_epoch,
        )

    def evaluate(self, data: EHRDataset, *, num_groups: int | None = 5) -> dict[str, float]:
        """Metrics of the model on visits, as `evaluate_recommendations` returns them."""
        probability = predict_medications(self.model, data)
        return evaluate_recommendations(data, probability, threshold=self.threshold, num_groups=num_groups)

    def _run(
        self,
        stage: dict[str, Any],
        epochs: int,
        train: Callable[[int], dict[str, float]],
        evaluate: Callable[[], dict[str, float]] | None = None,
        *,
        patience: int | None = None,
        checkpoint: str | os.PathLike[str] | None,
        resume: bool,
        on_epoch: OnEpoch | None,
    ) -> EpochsResult:
        if not epochs >= 1:
            raise ValueError(f"epochs must be at least 1, got {epochs!r}")
        settings = {**self._settings, "stage": stage, "earlier stages": list(self._stages)}
        run = EpochRun(_CHECKPOINT, self.model, self.optimizer, self._generator, settings=settings)
        run.load_if_there(checkpoint, resume=resume)

        def seeded(epoch: int) -> dict[str, float]:
            self.model.train()
            with _dropout_from(self._generator, self.device):
                return train(epoch)

        result = run.run(
            epochs,
            seeded,
            evaluate,
            monitor="jaccard",
            patience=patience,
            checkpoint=checkpoint,
            on_epoch=on_epoch,
        )
        self._stages.append({**stage, "epochs": len(result.history)})
        return result

    def _pass(self, length: Tensor, step: Callable[[Tensor], Tensor]) -> float:
        """Take one optimiser step per batch and return the mean loss over the visits."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for rows in _bucketed(length, self.batch_size, self._generator):
            self.optimizer.zero_grad(set_to_none=True)
            loss = step(rows)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            total += loss.detach() * rows.numel()
        return float(total) / length.numel()

    def _tokens(self, visits: Sequence[Visit]) -> _Prepared:
        return _Prepared.of(self.model.build_tokens(*_lists(visits)))

    def _masked(self, diagnoses: list[Any], procedures: list[Any], mask_prob: float) -> _Prepared:
        sizes = (self.model.num_diagnoses, self.model.num_procedures)
        hidden = [
            mask_codes(lists, num_codes=size, mask_prob=mask_prob, generator=self._generator)
            for lists, size in zip((diagnoses, procedures), sizes, strict=True)
        ]
        return _Prepared.of(self.model.build_tokens(*hidden))


class _Prepared:
    """The tokens of many visits, from which batches are cut."""

    def __init__(self, tokens: Tensor, length: Tensor) -> None:
        self.stacked, self.length = tokens, length

    @classmethod
    def of(cls, tokens: Tokens) -> _Prepared:
        full = torch.full((tokens.ids.shape[0],), tokens.ids.shape[1])
        length = full if tokens.padding is None else (~tokens.padding).sum(1)
        return cls(torch.stack((tokens.ids, tokens.relevance, tokens.segment)), length)

    def batch(self, rows: Tensor, device: torch.device) -> Tokens:
        """The visits of some rows, padded to the longest of them only."""
        length = self.length[rows]
        longest = int(length.max())
        padding = torch.arange(longest) >= length.unsqueeze(1)
        parts = self.stacked[:, rows, :longest].to(device)
        return Tokens(parts[0], parts[1], parts[2], padding.to(device) if bool(padding.any()) else None)


def predict_medications(model: RAREMed, data: EHRDataset) -> NDArray[np.float32]:
    """Return the probability of every medication in every visit, shape `(V, M)`.

    Args:
        model: A trained model.
        data: Visits; their medications aren't looked at.

    Returns:
        float32 array.

    Raises:
        ValueError: If there are no visits or the sizes differ from those of the model.

    Examples:
        >>> from recsys_losses.raremed import EHRDataset
        >>> data = EHRDataset.synthetic(num_patients=10, seed=0)
        >>> predict_medications(RAREMed(300, 80, 90, embed_dim=16, num_layers=1, ff_dim=32), data).shape
        (24, 90)
    """
    _check_sizes(model, data)
    if not len(data):
        raise ValueError("data holds no visits")
    tokens = _Prepared.of(model.build_tokens(*_lists(data.visits)))
    device = model.token.weight.device
    order = tokens.length.argsort(stable=True)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            parts = [
                torch.sigmoid(model.medication(model.encode_tokens(tokens.batch(rows, device)))).float().cpu()
                for rows in torch.split(order, _EVALUATION_BATCH)
            ]
    finally:
        model.train(was_training)
    probability = torch.empty(len(data), model.num_medications)
    probability[order] = torch.cat(parts)
    return probability.numpy()


def evaluate_recommendations(
    data: EHRDataset, probability: Array, *, threshold: float = 0.5, num_groups: int | None = 5
) -> dict[str, float]:
    """Metrics of predicted probabilities, whatever predicted them.

    Args:
        data: The visits and what was given in them.
        probability: Shape `(V, M)`, in [0, 1].
        threshold: Probability from which a drug is recommended, in (0, 1).
        num_groups: Groups of the fairness over rarity; None leaves it out.

    Returns:
        The metrics of `multilabel_metrics`; `ddi_rate`; and of `rarity_fairness` of the Jaccard index `weighted_jaccard`,
        `neg_pearson`, `neg_slope`, `gap`, `group_std` and `group_1` (most common) to `group_5` (rarest).

    Raises:
        ValueError: If the shapes don't fit, an option is out of range, or there are too few visits for the groups.

    Examples:
        >>> from recsys_losses.raremed import EHRDataset
        >>> data = EHRDataset.synthetic(num_patients=30, seed=0)
        >>> metrics = evaluate_recommendations(data, data.targets())
        >>> metrics["jaccard"], metrics["gap"]
        (1.0, 0.0)
    """
    target = data.targets().numpy()
    metrics = multilabel_metrics(target, probability, threshold=threshold)
    prob = torch.as_tensor(probability).cpu().numpy()
    metrics["ddi_rate"] = rate_of_sets(prob >= threshold, data.ddi_adj)
    if num_groups is None:
        return metrics
    fairness = rarity_fairness(
        jaccard_per_visit(target, prob, threshold=threshold), data.rarity(), num_groups=num_groups
    )
    return {
        **metrics,
        "weighted_jaccard": fairness.weighted_mean,
        "neg_pearson": fairness.neg_pearson,
        "neg_slope": fairness.neg_slope,
        "gap": fairness.gap,
        "group_std": fairness.group_std,
        **{f"group_{number}": mean for number, mean in enumerate(fairness.group_means, start=1)},
    }


def _bucketed(length: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Shuffle the rows, sort them by length within buckets of some batches, and yield the batches in random order."""
    order = torch.randperm(length.numel(), generator=generator)
    sorted_parts = [
        part[length[part].argsort(stable=True)] for part in torch.split(order, batch_size * _BATCHES_PER_BUCKET)
    ]
    batches = [batch for part in sorted_parts for batch in torch.split(part, batch_size)]
    for number in torch.randperm(len(batches), generator=generator).tolist():
        yield batches[number]


def _interleave(first: _Prepared, second: _Prepared) -> _Prepared:
    """Row 2i is row i of the first, row 2i + 1 row i of the second."""
    width = max(first.stacked.shape[2], second.stacked.shape[2])
    padded = [torch.nn.functional.pad(part.stacked, (0, width - part.stacked.shape[2])) for part in (first, second)]
    stacked = torch.stack(padded, dim=2).flatten(1, 2)
    return _Prepared(stacked, torch.stack((first.length, second.length), 1).flatten())


@contextmanager
def _dropout_from(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Let torch's global generator, which dropout uses, start from the run's own, and put it back afterwards."""
    seed = int(torch.randint(2**62, (1,), generator=generator))
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _lists(visits: Sequence[Visit]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    return [visit.diagnoses for visit in visits], [visit.procedures for visit in visits]


def _check_sizes(model: RAREMed, data: EHRDataset) -> None:
    model_sizes = (model.num_diagnoses, model.num_procedures, model.num_medications)
    data_sizes = (data.num_diagnoses, data.num_procedures, data.num_medications)
    if model_sizes != data_sizes:
        raise ValueError(
            f"the model has the sizes {model_sizes} (diagnoses, procedures, medications), the data {data_sizes}"
        )


def _digest(*parts: EHRDataset) -> str:
    """Return a fingerprint of what training and selection see."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr([tuple(visit) for visit in part.visits]).encode())
        digest.update(part.ddi_adj.tobytes())
    return digest.hexdigest()
