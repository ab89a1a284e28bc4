"""Generated hospital visits whose prescription probabilities are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from recsys_losses._checks import check_positive
from recsys_losses.raremed._records import EHRDataset, EHRVocabulary, Visit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_DIAGNOSIS_WINDOW, _PROCEDURE_WINDOW, _OWN_MEDICATIONS, _COMMON_MEDICATIONS = 14, 6, 9, 8
_BACKGROUND = 0.02
_CONCENTRATION = 0.7


@dataclass(frozen=True, eq=False)
class EHR:
    """Generated records together with what generated them.

    Args:
        records: The visits of each patient.
        ddi_adj: Shape `(M, M)`, symmetric, 1 where two drugs interact.
        num_diagnoses: D.
        num_procedures: P.
        num_medications: M.
        truth: True probability of every medication in every visit, shape `(V, M)`, visits in the order of the records.
    """

    records: list[list[Visit]]
    ddi_adj: NDArray[np.uint8]
    num_diagnoses: int
    num_procedures: int
    num_medications: int
    truth: Floats

    def dataset(self) -> EHRDataset:
        """The records as a data set, without the truth."""
        sizes = {"D": self.num_diagnoses, "P": self.num_procedures, "M": self.num_medications}
        vocabulary = EHRVocabulary(*(tuple(f"{letter}{i}" for i in range(size)) for letter, size in sizes.items()))
        return EHRDataset(tuple(visit for visits in self.records for visit in visits), vocabulary, self.ddi_adj)


class BayesOptimal(NamedTuple):
    """What `bayes_optimal` returns.

    Args:
        expected_jaccard: The largest expected Jaccard index of every visit, shape `(V,)`.
        recommended: The sets that have it, shape `(V, M)`, boolean.
    """

    expected_jaccard: Floats
    recommended: NDArray[np.bool_]


class _Conditions(NamedTuple):
    """What the conditions do: code weights (T, D) and (T, P), prescription probabilities (T, M), popularity (T,)."""

    diagnoses: Floats
    procedures: Floats
    medications: Floats
    popularity: Floats
    base: Floats


def make_synthetic_ehr(
    num_patients: int = 1200,
    num_diagnoses: int = 300,
    num_procedures: int = 80,
    num_medications: int = 90,
    num_conditions: int = 25,
    zipf: float = 1.1,
    ddi_density: float = 0.12,
    seed: int = 0,
) -> EHR:
    r"""Generate visits of patients with latent conditions, some common and some rare.

    Condition t, with popularity $\propto\mathrm{rank}^{-\text{zipf}}$, has 14 diagnosis codes (windows that start every
    D / T codes of a random order, so that neighbours overlap a little) with Dirichlet(0.7) weights and a uniform
    background of 2 %, 6 procedures likewise, and 9 medications with probabilities $m_{tj}\sim U(0.35,0.95)$; 8 common
    medications have a base probability in $U(0.3,0.8)$. A patient has 1 or 2 chronic conditions and 2 + Poisson(0.4)
    visits; a visit has these and, with probability ½, one acute condition. It draws 2 + Poisson(2) diagnoses per
    condition (repeated ones once, in the order of drawing) and 1 + Poisson(0.8) procedures, and medication j with

    $$p_j=1-(1-\mathrm{base}_j)\prod_t(1-m_{tj}).$$

    Two drugs interact with probability `ddi_density`. The defaults give about 2.4 visits per patient, 6 diagnoses, 3
    procedures and 14 medications per visit.

    Args:
        num_patients: At least 1.
        num_diagnoses: D, at least 14.
        num_procedures: P, at least 6.
        num_medications: M, at least 9.
        num_conditions: T, at least 2.
        zipf: Exponent of the popularity, at least 0; larger makes rare conditions rarer.
        ddi_density: In [0, 1].
        seed: Seed of everything.

    Returns:
        The records and the truth.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> ehr = make_synthetic_ehr(num_patients=100, seed=0)
        >>> ehr.truth.shape == (sum(map(len, ehr.records)), 90)
        True
    """
    sizes = (
        ("num_patients", num_patients, 1),
        ("num_diagnoses", num_diagnoses, _DIAGNOSIS_WINDOW),
        ("num_procedures", num_procedures, _PROCEDURE_WINDOW),
        ("num_medications", num_medications, _OWN_MEDICATIONS),
        ("num_conditions", num_conditions, 2),
    )
    for name, size, least in sizes:
        if not size >= least:
            raise ValueError(f"{name} must be at least {least}, got {size!r}")
    if zipf != 0:
        check_positive("zipf", zipf)
    if not 0 <= ddi_density <= 1:
        raise ValueError(f"ddi_density must be in [0, 1], got {ddi_density!r}")
    rng = np.random.default_rng(seed)
    conditions = _draw_conditions(rng, num_diagnoses, num_procedures, num_medications, num_conditions, zipf)
    upper = np.triu(rng.random((num_medications, num_medications)) < ddi_density, k=1)
    records, truth = [], []
    for patient in range(num_patients):
        visits, probabilities = _draw_patient(rng, patient, conditions)
        records.append(visits)
        truth += probabilities
    return EHR(
        records, (upper | upper.T).astype(np.uint8), num_diagnoses, num_procedures, num_medications, np.stack(truth)
    )


def bayes_optimal(truth: Floats) -> BayesOptimal:
    r"""The sets with the largest expected Jaccard index, given the true probabilities of independent medications.

    For a set R of size k, $|R\cap Y|$ and $Z=|Y\setminus R|$ are independent, so

    $$\mathbb{E}\frac{|R\cap Y|}{|R\cup Y|}=\Big(\sum_{j\in R}p_j\Big)\,\mathbb{E}\frac{1}{k+Z}.$$

    Exchanging a drug for a likelier one raises both factors: the best set of every size is the k likeliest drugs. The
    distribution of Z is computed exactly, for all k in O(M²) per visit.

    Args:
        truth: $p$, shape `(V, M)`, in [0, 1].

    Returns:
        The sets and their expected Jaccard index, which no recommender that knows less can beat on average.

    Raises:
        ValueError: If `truth` isn't a matrix of probabilities.

    Examples:
        >>> import numpy as np
        >>> best = bayes_optimal(np.array([[0.9, 0.1]]))  # {0}: 0.9 * (0.9 + 0.1 / 2)
        >>> best.recommended.tolist(), round(float(best.expected_jaccard[0]), 4)
        ([[True, False]], 0.855)
    """
    p = np.asarray(truth, dtype=np.float64)
    if p.ndim != 2 or not p.size or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"truth must be a matrix (V, M) of probabilities, got the shape {p.shape}")
    order = np.argsort(-p, axis=1, kind="stable")
    ranked = np.take_along_axis(p, order, axis=1)
    visits, size = p.shape
    kept = ranked.cumsum(1)
    others = np.zeros((visits, size + 1))  # distribution of Z for the k likeliest recommended
    others[:, 0] = 1.0
    best, best_k = np.zeros(visits), np.zeros(visits, dtype=np.int64)
    counts = np.arange(size + 1)
    for k in range(size, 0, -1):
        expected = kept[:, k - 1] * (others / (k + counts)).sum(1)
        best_k[expected > best] = k
        best = np.maximum(best, expected)
        one = ranked[:, k - 1 : k]
        others = others * (1 - one) + one * np.pad(others[:, :-1], ((0, 0), (1, 0)))
    recommended = np.zeros((visits, size), dtype=bool)
    np.put_along_axis(recommended, order, np.arange(size) < best_k[:, None], axis=1)
    return BayesOptimal(best, recommended)


def _draw_conditions(
    rng: np.random.Generator, diagnoses: int, procedures: int, medications: int, conditions: int, zipf: float
) -> _Conditions:
    own = np.zeros((conditions, medications))
    for row in own:
        row[rng.choice(medications, _OWN_MEDICATIONS, replace=False)] = rng.uniform(0.35, 0.95, _OWN_MEDICATIONS)
    base = np.zeros(medications)
    common = rng.choice(medications, min(_COMMON_MEDICATIONS, medications), replace=False)
    base[common] = rng.uniform(0.3, 0.8, common.size)
    popularity = np.arange(1, conditions + 1, dtype=np.float64) ** -zipf
    return _Conditions(
        _windows(rng, conditions, diagnoses, _DIAGNOSIS_WINDOW),
        _windows(rng, conditions, procedures, _PROCEDURE_WINDOW),
        own,
        popularity / popularity.sum(),
        base,
    )


def _windows(rng: np.random.Generator, conditions: int, codes: int, width: int) -> Floats:
    """Code probabilities of each condition (T, codes): a window of a random order, and a uniform background."""
    order = rng.permutation(codes)
    weights = np.full((conditions, codes), _BACKGROUND / codes)
    for t, row in enumerate(weights):
        window = order[(t * codes // conditions + np.arange(width)) % codes]
        row[window] += (1 - _BACKGROUND) * rng.dirichlet(np.full(width, _CONCENTRATION))
    return weights


def _draw_patient(rng: np.random.Generator, patient: int, conditions: _Conditions) -> tuple[list[Visit], list[Floats]]:
    chronic = _choose(rng, conditions.popularity, int(rng.integers(1, 3)))
    visits, probabilities = [], []
    for number in range(2 + rng.poisson(0.4)):
        present = chronic if rng.random() < 0.5 else [*chronic, *_choose(rng, conditions.popularity, 1)]
        present = list(dict.fromkeys(present))
        diagnoses = _draw_codes(rng, conditions.diagnoses, present, 2, 2.0)
        procedures = _draw_codes(rng, conditions.procedures, present, 1, 0.8)
        probability = 1 - (1 - conditions.base) * np.prod(1 - conditions.medications[present], axis=0)
        given = np.flatnonzero(rng.random(probability.size) < probability)
        visits.append(Visit(str(patient), f"{patient}-{number}", diagnoses, procedures, tuple(given.tolist())))
        probabilities.append(probability)
    return visits, probabilities


def _choose(rng: np.random.Generator, popularity: Floats, number: int) -> list[int]:
    return rng.choice(popularity.size, number, replace=False, p=popularity).tolist()  # type: ignore[no-any-return]


def _draw_codes(
    rng: np.random.Generator, weights: Floats, present: list[int], least: int, rate: float
) -> tuple[int, ...]:
    drawn = [rng.choice(weights.shape[1], least + rng.poisson(rate), p=weights[t]) for t in present]
    return tuple(dict.fromkeys(np.concatenate(drawn).tolist()))
