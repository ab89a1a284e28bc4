"""Hospital visits: the record types, the portable files, and the pickles of the original pipeline."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from recsys_losses._checks import check_choice
from recsys_losses.raremed._losses import check_ddi
from recsys_losses.raremed._metrics import visit_rarity
from recsys_losses.raremed._pickles import read_pickle, vocabulary_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from recsys_losses.raremed._mimic import MimicTables

KINDS = ("diagnoses", "procedures", "medications")
VISITS_FILE, VOCABULARY_FILE, DDI_FILES = "visits.jsonl", "vocab.json", ("ddi.npz", "ddi.csv")


class Visit(NamedTuple):
    """One hospital stay.

    Args:
        patient: Identifier of the patient.
        visit: Identifier of the stay.
        diagnoses: Diagnosis ids by priority, at least one, without repetitions.
        procedures: Procedure ids in their order; may be empty.
        medications: Medication ids, a set in any order.
    """

    patient: str
    visit: str
    diagnoses: tuple[int, ...]
    procedures: tuple[int, ...]
    medications: tuple[int, ...]


@dataclass(frozen=True)
class EHRVocabulary:
    """The codes that the ids stand for: id i of a kind is entry i.

    Args:
        diagnoses: D diagnosis codes.
        procedures: P procedure codes.
        medications: M medication codes.
    """

    diagnoses: tuple[str, ...]
    procedures: tuple[str, ...]
    medications: tuple[str, ...]

    def __post_init__(self) -> None:
        for kind in KINDS:
            codes = getattr(self, kind)
            if len(set(codes)) != len(codes):
                repeated = next(code for code in codes if codes.count(code) > 1)
                raise ValueError(f"the {kind} of the vocabulary hold {repeated!r} twice")


@dataclass(frozen=True, eq=False)
class EHRDataset:
    """Visits with their vocabulary and the interactions of the medications.

    Args:
        visits: The visits in file order; those of a patient need not be neighbours.
        vocabulary: The codes behind the ids.
        ddi_adj: Shape `(M, M)`, symmetric, 1 where two drugs interact.
        diagnosis_counts: Number of visits with each diagnosis, shape `(D,)`, which rarity is measured by; None counts
            `visits`. The parts of a split keep the counts of the whole.

    Raises:
        ValueError: If a visit has no diagnoses, an id is out of range or repeated in a visit, or a shape doesn't fit.

    Examples:
        >>> data = EHRDataset.synthetic(num_patients=60, seed=0)
        >>> data
        EHRDataset(patients=60, visits=144, diagnoses=300, procedures=80, medications=90)
        >>> [len(part.patients()) for part in data.split()]
        [40, 10, 10]
    """

    visits: tuple[Visit, ...]
    vocabulary: EHRVocabulary
    ddi_adj: NDArray[np.uint8]
    diagnosis_counts: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        import torch

        check_ddi(torch.as_tensor(np.asarray(self.ddi_adj)), self.num_medications)
        object.__setattr__(self, "visits", tuple(self.visits))
        object.__setattr__(self, "ddi_adj", np.asarray(self.ddi_adj, dtype=np.uint8))
        for number, visit in enumerate(self.visits):
            self._check(number, visit)
        if self.diagnosis_counts is None:
            flat = [code for visit in self.visits for code in visit.diagnoses]
            object.__setattr__(self, "diagnosis_counts", np.bincount(flat, minlength=self.num_diagnoses))

    def _check(self, number: int, visit: Visit) -> None:
        if not visit.diagnoses:
            raise ValueError(f"visit {number} (patient {visit.patient}) has no diagnoses")
        for kind in KINDS:
            ids, size = getattr(visit, kind), len(getattr(self.vocabulary, kind))
            if ids and not 0 <= min(ids) <= max(ids) < size:
                wrong = min(ids) if min(ids) < 0 else max(ids)
                raise ValueError(f"visit {number}: the id {wrong} of {kind} is out of range, accepted: 0 to {size - 1}")
            if len(set(ids)) != len(ids):
                raise ValueError(f"visit {number}: {kind} holds an id twice")

    def __repr__(self) -> str:
        sizes = ", ".join(f"{kind}={len(getattr(self.vocabulary, kind))}" for kind in KINDS)
        return f"EHRDataset(patients={len(self.patients())}, visits={len(self.visits)}, {sizes})"

    def __len__(self) -> int:
        return len(self.visits)

    @property
    def num_diagnoses(self) -> int:
        """D."""
        return len(self.vocabulary.diagnoses)

    @property
    def num_procedures(self) -> int:
        """P."""
        return len(self.vocabulary.procedures)

    @property
    def num_medications(self) -> int:
        """M."""
        return len(self.vocabulary.medications)

    def patients(self) -> list[str]:
        """The patients in order of their first visit."""
        return list(dict.fromkeys(visit.patient for visit in self.visits))

    def targets(self) -> Tensor:
        """The medications given, shape `(V, M)`, float32."""
        import torch

        target = torch.zeros(len(self.visits), self.num_medications)
        for number, visit in enumerate(self.visits):
            target[number, list(visit.medications)] = 1.0
        return target

    def rarity(self, *, reduce: Literal["max", "mean"] = "max") -> NDArray[np.float64]:
        """`visit_rarity` of every visit, by the counts of the whole data set."""
        return visit_rarity([visit.diagnoses for visit in self.visits], counts=self.diagnosis_counts, reduce=reduce)

    def split(
        self, by: Literal["patient"] = "patient", *, order: Literal["file", "random"] = "file", seed: int = 0
    ) -> tuple[EHRDataset, EHRDataset, EHRDataset]:
        """Split into train, validation and test visits of different patients, 4 : 1 : 1.

        Args:
            by: `"patient"`: all visits of a patient go to the same part. Nothing else is offered, as it would leak.
            order: `"file"` takes the first two thirds of the patients, then the next sixth, as the authors' code;
                `"random"` shuffles the patients first, as the paper.
            seed: Seed of the shuffle.

        Returns:
            Three data sets with the vocabulary, interactions and diagnosis counts of this one.

        Raises:
            ValueError: If an option is unknown or there are fewer than 6 patients.
        """
        check_choice("by", by, ("patient",))
        check_choice("order", order, ("file", "random"))
        patients = self.patients()
        if len(patients) < 6:
            raise ValueError(f"a 4 : 1 : 1 split needs at least 6 patients, got {len(patients)}")
        if order == "random":
            patients = [patients[i] for i in np.random.default_rng(seed).permutation(len(patients))]
        ends = (len(patients) * 2 // 3, len(patients) * 5 // 6)
        part_of = {patient: (i >= ends[0]) + (i >= ends[1]) for i, patient in enumerate(patients)}
        parts = [tuple(visit for visit in self.visits if part_of[visit.patient] == part) for part in range(3)]
        train, valid, test = (dataclasses.replace(self, visits=part) for part in parts)
        return train, valid, test

    # --- portable files -----------------------------------------------------------------------------------------------

    def to_jsonl(self, folder: str | os.PathLike[str], *, ddi: Literal["npz", "csv"] = "npz") -> None:
        """Write `visits.jsonl` (codes, not ids), `vocab.json` and `ddi.npz` or `ddi.csv`; each file whole or not at all.

        Args:
            folder: Created if absent.
            ddi: `"npz"` writes the matrix under the key `ddi_adj`, `"csv"` one pair of codes per line, each pair once.

        Raises:
            ValueError: If `ddi` is unknown.
        """
        check_choice("ddi", ddi, ("npz", "csv"))
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(self._line(visit)) + "\n" for visit in self.visits)
        write_whole(folder / VISITS_FILE, lines.encode())
        vocabulary = {kind: list(getattr(self.vocabulary, kind)) for kind in KINDS}
        write_whole(folder / VOCABULARY_FILE, (json.dumps(vocabulary, indent=1) + "\n").encode())
        for name in DDI_FILES:
            (folder / name).unlink(missing_ok=True)
        if ddi == "npz":
            buffer = io.BytesIO()
            np.savez_compressed(buffer, ddi_adj=self.ddi_adj)
            write_whole(folder / "ddi.npz", buffer.getvalue())
            return
        write_whole(folder / "ddi.csv", self._ddi_csv().encode())

    def _line(self, visit: Visit) -> dict[str, Any]:
        codes = {kind: [getattr(self.vocabulary, kind)[i] for i in getattr(visit, kind)] for kind in KINDS}
        return {"patient": visit.patient, "visit": visit.visit, **codes}

    def _ddi_csv(self) -> str:
        import csv

        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(("medication 1", "medication 2"))
        codes = self.vocabulary.medications
        writer.writerows((codes[i], codes[j]) for i, j in np.argwhere(np.triu(self.ddi_adj)))
        return buffer.getvalue()

    @classmethod
    def from_jsonl(
        cls,
        path: str | os.PathLike[str],
        *,
        vocabulary: str | os.PathLike[str] | None = None,
        ddi: str | os.PathLike[str] | None = None,
    ) -> EHRDataset:
        r"""Read visits from JSON Lines.

        One object per line:

        `{"patient": "7", "visit": "12", "diagnoses": ["4019", "25000"], "procedures": [], "medications": ["A02B"]}`

        An entry of the three lists is a code, or a number, which is then an id: the position in the vocabulary. Without
        a vocabulary the codes get ids by first appearance, and numbers stay what they are.

        Args:
            path: The file, or a folder that holds it as `visits.jsonl`.
            vocabulary: JSON object of the three lists of codes; None takes `vocab.json` beside the visits if there.
            ddi: `.npz` with a matrix `ddi_adj`, or `.csv` of a header and pairs of medication codes; None takes
                `ddi.npz` or `ddi.csv` beside the visits if there, else no drugs interact.

        Returns:
            The data set.

        Raises:
            FileNotFoundError: If a file is absent.
            ValueError: If a file is malformed, a code isn't in the vocabulary or repeated in a visit, or a visit has
                no diagnoses; the message names file and line.

        Examples:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     EHRDataset.synthetic(num_patients=20, seed=0).to_jsonl(folder)
            ...     EHRDataset.from_jsonl(folder)
            EHRDataset(patients=20, visits=50, diagnoses=300, procedures=80, medications=90)
        """
        path = Path(path)
        if path.is_dir():
            path = path / VISITS_FILE
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}")
        vocabulary_path = _beside(path, vocabulary, (VOCABULARY_FILE,))
        known = None if vocabulary_path is None else _read_vocabulary(vocabulary_path)
        readers = {kind: _Codes(kind, None if known is None else getattr(known, kind)) for kind in KINDS}
        visits = [_read_visit(where, line, readers) for where, line in _numbered_lines(path)]
        if not visits:
            raise ValueError(f"{path} holds no visits")
        final = EHRVocabulary(*(readers[kind].vocabulary() for kind in KINDS)) if known is None else known
        ddi_path = _beside(path, ddi, DDI_FILES)
        return cls(tuple(visits), final, _read_ddi(ddi_path, final.medications))

    # --- other sources ------------------------------------------------------------------------------------------------

    @classmethod
    def from_mimic(
        cls, folder: str | os.PathLike[str], tables: MimicTables | None = None, **filters: Any
    ) -> EHRDataset:
        """Build visits from the CSV files of MIMIC-III or MIMIC-IV; see `read_mimic` for all options."""
        from recsys_losses.raremed._mimic import read_mimic

        return read_mimic(folder, tables, **filters)

    @classmethod
    def from_pickles(cls, folder: str | os.PathLike[str], *, allow_pickle: bool = False) -> EHRDataset:
        """Read `records_final.pkl`, `voc_final.pkl` and `ddi_A_final.pkl`, as the original pipeline writes them.

        Unpickling runs what a file asks for. This reader builds only plain containers, numbers, numpy arrays and an
        empty stand-in for the vocabulary class, and refuses any other name; still, read files you trust. The rarity
        stored with a visit is ignored; it is computed anew.

        Args:
            folder: Folder of the three files.
            allow_pickle: Has to be True.

        Returns:
            The data set; patients and visits are numbered from 0.

        Raises:
            FileNotFoundError: If a file is absent.
            ValueError: If `allow_pickle` isn't True, a file is damaged or asks for anything else than the above, or the
                records don't have the form `[diagnoses, procedures, medications]` or `[..., rarity]`.
        """
        if allow_pickle is not True:
            raise ValueError("pickle files can run code; pass allow_pickle=True for files you trust")
        folder = Path(folder)
        records = read_pickle(folder / "records_final.pkl")
        vocabularies = read_pickle(folder / "voc_final.pkl")
        ddi_adj = np.asarray(read_pickle(folder / "ddi_A_final.pkl"))
        names = ("diag_voc", "pro_voc", "med_voc")
        vocabulary = EHRVocabulary(*(vocabulary_of(folder / "voc_final.pkl", vocabularies, name) for name in names))
        if ddi_adj.ndim != 2 or not np.isin(ddi_adj, (0, 1)).all():
            raise ValueError(f"{folder / 'ddi_A_final.pkl'} holds no 0/1 matrix")
        return cls(tuple(_pickled_visits(folder / "records_final.pkl", records)), vocabulary, ddi_adj.astype(np.uint8))

    @classmethod
    def synthetic(cls, **options: Any) -> EHRDataset:
        """The data set of `make_synthetic_ehr`, which has the options and returns the truth as well."""
        from recsys_losses.raremed._synthetic import make_synthetic_ehr

        return make_synthetic_ehr(**options).dataset()


def write_whole(path: Path, content: bytes) -> None:
    """Write the file in place of an earlier one, which stays whole until the new one is."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class _Codes:
    """Turns the entries of one kind into ids, and collects the vocabulary where none is given."""

    def __init__(self, kind: str, known: Sequence[str] | None) -> None:
        self.kind, self.known = kind, known
        self.ids = {code: i for i, code in enumerate(known or ())}
        self.largest = -1

    def of(self, where: str, entries: Any) -> tuple[int, ...]:
        if not isinstance(entries, list):
            raise ValueError(f"{where}: {self.kind!r} must be a list, got {type(entries).__name__}")
        ids = tuple(self._id(where, entry) for entry in entries)
        if len(set(ids)) != len(ids):
            repeated = next(entry for entry, i in zip(entries, ids, strict=True) if ids.count(i) > 1)
            raise ValueError(f"{where}: {self.kind!r} holds {repeated!r} twice")
        return ids

    def _id(self, where: str, entry: Any) -> int:
        if isinstance(entry, str):
            if self.known is None:
                return self.ids.setdefault(entry, len(self.ids))
            if entry not in self.ids:
                raise ValueError(f"{where}: {self.kind!r} holds {entry!r}, which is not in the vocabulary")
            return self.ids[entry]
        if isinstance(entry, bool) or not isinstance(entry, int):
            raise ValueError(f"{where}: an entry of {self.kind!r} must be a code or an id, got {entry!r}")
        if entry < 0 or (self.known is not None and entry >= len(self.known)):
            raise ValueError(f"{where}: the id {entry} of {self.kind!r} is out of range")
        self.largest = max(self.largest, entry)
        return entry

    def vocabulary(self) -> tuple[str, ...]:
        """The codes that were read, or the names 0, 1, ... of the ids."""
        if self.ids and self.largest >= 0:
            raise ValueError(f"{self.kind} holds codes and ids; without a vocabulary it must be one or the other")
        return tuple(self.ids) if self.ids else tuple(str(i) for i in range(self.largest + 1))


def _numbered_lines(path: Path) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 text ({error.reason})") from None
            if line:
                yield where, line


def _read_visit(where: str, line: str, readers: Mapping[str, _Codes]) -> Visit:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error.msg}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object, got {type(record).__name__}")
    missing = [key for key in ("patient", "visit", *KINDS) if key not in record]
    if missing:
        raise ValueError(f"{where}: there is no {missing[0]!r}")
    for key in ("patient", "visit"):
        if isinstance(record[key], bool) or not isinstance(record[key], (str, int)):
            raise ValueError(f"{where}: {key!r} must be text or a whole number, got {record[key]!r}")
    diagnoses, procedures, medications = (readers[kind].of(where, record[kind]) for kind in KINDS)
    if not diagnoses:
        raise ValueError(f"{where}: the visit has no diagnoses")
    return Visit(str(record["patient"]), str(record["visit"]), diagnoses, procedures, medications)


def _beside(path: Path, given: str | os.PathLike[str] | None, names: Iterable[str]) -> Path | None:
    if given is None:
        return next((path.with_name(name) for name in names if path.with_name(name).is_file()), None)
    if not Path(given).is_file():
        raise FileNotFoundError(f"no file {given}")
    return Path(given)


def _read_vocabulary(path: Path) -> EHRVocabulary:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason})") from None
    for kind in KINDS:
        codes = content.get(kind) if isinstance(content, dict) else None
        if not isinstance(codes, list) or not all(isinstance(code, str) for code in codes):
            raise ValueError(f"{path}: expected an object with a list of texts {kind!r}")
    try:
        return EHRVocabulary(*(tuple(content[kind]) for kind in KINDS))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_ddi(path: Path | None, medications: Sequence[str]) -> NDArray[np.uint8]:
    size = len(medications)
    if path is None:
        return np.zeros((size, size), dtype=np.uint8)
    return _read_ddi_csv(path, medications) if path.suffix == ".csv" else _read_ddi_npz(path, size)


def _read_ddi_npz(path: Path, size: int) -> NDArray[np.uint8]:
    import torch

    try:
        with np.load(path, allow_pickle=False) as file:
            matrix = file["ddi_adj"]
    except (OSError, ValueError, KeyError, EOFError, TypeError) as error:
        raise ValueError(f"{path} is not an .npz file with a matrix 'ddi_adj': {error}") from None
    try:
        check_ddi(torch.as_tensor(matrix), size)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    return np.asarray(matrix, dtype=np.uint8)


def _read_ddi_csv(path: Path, medications: Sequence[str]) -> NDArray[np.uint8]:
    import csv

    ids = {code: i for i, code in enumerate(medications)}
    matrix = np.zeros((len(ids), len(ids)), dtype=np.uint8)
    lines = (line for _, line in _numbered_lines(path))
    for number, row in enumerate(csv.reader(lines), start=1):
        if number == 1:
            continue
        unknown = [code for code in row if code not in ids]
        if len(row) != 2 or unknown or row[0] == row[1]:
            what = f"{unknown[0]!r} is not in the vocabulary" if len(row) == 2 and unknown else f"got {row!r}"
            raise ValueError(f"{path}:{number}: expected two different medication codes; {what}")
        i, j = ids[row[0]], ids[row[1]]
        matrix[i, j] = matrix[j, i] = 1
    return matrix


def _pickled_visits(path: Path, records: Any) -> Iterator[Visit]:
    if not isinstance(records, (list, tuple)):
        raise ValueError(f"{path}: expected a list of patients, got {type(records).__name__}")
    for patient, visits in enumerate(records):
        for number, visit in enumerate(visits if isinstance(visits, (list, tuple)) else [visits]):
            where = f"{path}: patient {patient}, visit {number}"
            if not isinstance(visit, (list, tuple)) or len(visit) not in (3, 4):
                raise ValueError(f"{where}: expected [diagnoses, procedures, medications, rarity], got {visit!r:.80}")
            try:
                codes = [tuple(int(code) for code in part) for part in visit[:3]]
            except (TypeError, ValueError):
                raise ValueError(f"{where}: expected three lists of ids, got {visit!r:.80}") from None
            yield Visit(str(patient), f"{patient}-{number}", codes[0], codes[1], codes[2])
