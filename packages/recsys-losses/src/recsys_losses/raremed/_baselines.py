"""What a recommender of medications has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from recsys_losses.raremed._losses import multi_hot

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from recsys_losses.raremed._records import EHRDataset

    Floats = NDArray[np.float64]


def popular_medications(train: EHRDataset, data: EHRDataset, *, k: int = 14) -> Floats:
    """Recommend the same k medications, those in most train visits, to everyone.

    Args:
        train: The visits to count in.
        data: The visits to recommend for.
        k: Size of the recommended set, 1 to M.

    Returns:
        Shape `(V, M)`: values that fall with the rank and are at least 0.5 for the first k, to be used as probabilities
        with the threshold 0.5.

    Raises:
        ValueError: If `k` is out of range.

    Examples:
        >>> from recsys_losses.raremed import EHRDataset
        >>> train, _, test = EHRDataset.synthetic(num_patients=30, seed=0).split()
        >>> int((popular_medications(train, test, k=14)[0] >= 0.5).sum())
        14
    """
    if not 1 <= k <= train.num_medications:
        raise ValueError(f"k must be between 1 and the {train.num_medications} medications, got {k!r}")
    count = train.targets().sum(0).numpy()
    rank = np.empty(count.size)
    rank[np.argsort(-count, kind="stable")] = np.arange(count.size)
    return np.tile(k / (k + rank + 0.5), (len(data), 1))


def logistic_medications(train: EHRDataset, data: EHRDataset, *, C: float = 1.0, max_iter: int = 1000) -> Floats:
    """One logistic regression per medication on the multi-hot codes of a visit, by scikit-learn.

    Args:
        train: The visits to learn from.
        data: The visits to predict.
        C: Inverse strength of the L2 penalty, as scikit-learn has it.
        max_iter: Iterations of the solver, at most.

    Returns:
        Probabilities, shape `(V, M)`. A medication in no train visit has 0, one in all of them 1.

    Raises:
        ValueError: If an option is out of range.

    Examples:
        >>> from recsys_losses.raremed import EHRDataset
        >>> train, _, test = EHRDataset.synthetic(num_patients=30, seed=0).split()
        >>> logistic_medications(train, test).shape == (len(test), 90)
        True
    """
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
    from sklearn.multiclass import OneVsRestClassifier  # type: ignore[import-untyped]

    if not (C > 0 and max_iter >= 1):
        raise ValueError(f"C must be positive and max_iter at least 1, got {C!r} and {max_iter!r}")
    target = train.targets().numpy()
    share = target.mean(0)
    probability = np.tile(share.astype(np.float64), (len(data), 1))
    varied = (share > 0) & (share < 1)
    if varied.sum() > 1:  # for a single column scikit-learn returns the two classes instead
        model = OneVsRestClassifier(LogisticRegression(C=C, max_iter=max_iter)).fit(_features(train), target[:, varied])
        probability[:, varied] = model.predict_proba(_features(data))
    return probability


def _features(data: EHRDataset) -> NDArray[np.float32]:
    diagnoses, procedures = [v.diagnoses for v in data.visits], [v.procedures for v in data.visits]
    return multi_hot(diagnoses, procedures, data.num_diagnoses, data.num_procedures).numpy()
