"""What the two pre-training tasks are made from: mixed visits and masked codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from recsys_losses.raremed._records import Visit

    Ints = NDArray[np.int64]

_MAX_DRAWS = 100


def make_smp_negatives(
    visits: Sequence[Visit],
    pool: Sequence[Visit],
    *,
    per_positive: int = 1,
    different_patient: bool = False,
    generator: torch.Generator | None = None,
) -> list[Visit]:
    """Mix visits for sequence matching prediction: half keep their diagnoses, half their procedures.

    The other half comes from a visit of the pool drawn uniformly from those whose procedure list differs. After 100
    draws that don't, the candidates are listed, so that a pool of nearly equal visits ends no loop.

    Args:
        visits: The visits to mix.
        pool: Where the replacements come from; the authors' code takes train and validation visits.
        per_positive: Mixed visits per visit, at least 1.
        different_patient: Demand another patient as well, as the paper says; the authors' code doesn't.
        generator: CPU generator; None uses torch's default generator.

    Returns:
        `per_positive` mixed visits for each visit, in the order of the visits; the inputs stay as they are.

    Raises:
        ValueError: If there is nothing to mix, `per_positive` is below 1, or a visit has no candidate.

    Source: Zhao et al., 2024, sec. 4.2.1.

    Examples:
        >>> import torch
        >>> from recsys_losses.raremed import Visit
        >>> a, b = Visit("1", "x", (0, 1), (5,), ()), Visit("2", "y", (2,), (6,), ())
        >>> [mixed] = make_smp_negatives([a], [a, b], generator=torch.Generator().manual_seed(0))
        >>> (mixed.diagnoses, mixed.procedures) in [((0, 1), (6,)), ((2,), (5,))]
        True
    """
    if not len(visits) or not len(pool):
        raise ValueError(f"there is nothing to mix: {len(visits)} visits, {len(pool)} in the pool")
    if not per_positive >= 1:
        raise ValueError(f"per_positive must be at least 1, got {per_positive!r}")
    lists: dict[tuple[int, ...], int] = {}
    people: dict[str, int] = {}
    own, others = (
        np.array(
            [(lists.setdefault(v.procedures, len(lists)), people.setdefault(v.patient, len(people))) for v in part]
        )
        for part in (visits, pool)
    )
    own = own.repeat(per_positive, axis=0)

    def refused(rows: Ints, drawn: Ints) -> NDArray[np.bool_]:
        same = own[rows] == others[drawn]
        return np.asarray(same.any(1) if different_patient else same[:, 0])

    partner = _draw(own.shape[0], len(pool), refused, generator)
    swap = torch.rand(own.shape[0], generator=generator).numpy() < 0.5
    mixed = []
    for row, (number, procedures_too) in enumerate(zip(partner, swap, strict=True)):
        visit, other = visits[row // per_positive], pool[number]
        replaced = {"procedures": other.procedures} if procedures_too else {"diagnoses": other.diagnoses}
        mixed.append(visit._replace(**replaced))
    return mixed


def _draw(
    rows: int, pool: int, refused: Callable[[Ints, Ints], NDArray[np.bool_]], generator: torch.Generator | None
) -> Ints:
    """Draw one entry of the pool for every row, again where it is refused."""
    drawn = torch.randint(pool, (rows,), generator=generator).numpy()
    open_rows = np.arange(rows)
    for _ in range(_MAX_DRAWS):
        open_rows = open_rows[refused(open_rows, drawn[open_rows])]
        if not open_rows.size:
            return drawn
        drawn[open_rows] = torch.randint(pool, (open_rows.size,), generator=generator).numpy()
    for row in open_rows:
        candidates = np.flatnonzero(~refused(np.full(pool, row), np.arange(pool)))
        if not candidates.size:
            raise ValueError(f"no visit of the pool differs in its procedures (and patient, if asked) from visit {row}")
        drawn[row] = candidates[int(torch.randint(candidates.size, (1,), generator=generator))]
    return drawn


def mask_codes(
    codes: Sequence[Sequence[int]], *, num_codes: int, mask_prob: float = 0.15, generator: torch.Generator | None = None
) -> list[list[int]]:
    """Hide codes as BERT does: of those chosen, 80 % become [MASK], 10 % a random code, 10 % stay.

    Args:
        codes: Ids of each visit, 0 to `num_codes - 1`.
        num_codes: D or P; [MASK] has the id `num_codes`.
        mask_prob: Probability that a code is chosen, in [0, 1].
        generator: CPU generator; None uses torch's default generator.

    Returns:
        New lists; the given ones stay as they are.

    Raises:
        ValueError: If `mask_prob` is out of range, `num_codes` isn't positive, or an id is out of range.

    Source: Zhao et al., 2024, sec. 4.2.2; masking is off in the authors' runs.

    Examples:
        >>> mask_codes([[3, 1], []], num_codes=5, mask_prob=0.0)
        [[3, 1], []]
    """
    if not 0 <= mask_prob <= 1:
        raise ValueError(f"mask_prob must be in [0, 1], got {mask_prob!r}")
    if not num_codes >= 1:
        raise ValueError(f"num_codes must be at least 1, got {num_codes!r}")
    flat = torch.tensor([code for visit in codes for code in visit], dtype=torch.long)
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < num_codes:
        raise ValueError(f"ids {int(flat.min())} to {int(flat.max())} are out of range, accepted: 0 to {num_codes - 1}")
    chance, kind = torch.rand(2, flat.numel(), generator=generator)
    other = torch.randint(num_codes, flat.shape, generator=generator)
    hidden = torch.where(kind < 0.8, torch.full_like(flat, num_codes), torch.where(kind < 0.9, other, flat))
    result = torch.where(chance < mask_prob, hidden, flat)
    return [part.tolist() for part in torch.split(result, [len(visit) for visit in codes])]
