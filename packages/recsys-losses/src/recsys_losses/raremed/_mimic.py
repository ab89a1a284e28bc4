"""Visits from the CSV files of MIMIC-III and MIMIC-IV, with the filters of the original preprocessing.

Files are read row by row and only what is needed is kept, so that the full tables need no more memory than their
admissions. Nothing is downloaded: both databases need credentials from PhysioNet; a demo of MIMIC-III is open.
"""

from __future__ import annotations

import ast
import csv
import gzip
import logging
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from recsys_losses._checks import check_choice
from recsys_losses.raremed._records import EHRDataset, EHRVocabulary, Visit

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Mapping

    from numpy.typing import NDArray

    PathLike = str | os.PathLike[str]

_log = logging.getLogger(__name__)

_ATC3_LENGTH = 4

Admission = tuple[int, int]  # subject, hospital stay
Codes = dict[Admission, dict[str, None]]  # a dict keeps the order of the codes


@dataclass(frozen=True)
class MimicTables:
    """Helper files of the original pipeline that turn drug products into ATC level-3 classes; all optional.

    Args:
        ndc_to_rxcui: `ndc2RXCUI.txt`, a Python dict of NDC to RxCUI; it is parsed, never run.
        rxcui_to_atc: `RXCUI2atc4.csv` with the columns RXCUI and ATC4. It and `ndc_to_rxcui` are used together.
        drugbank: `drugbank_drugs_info.csv` with the columns name and moldb_smiles: classes none of whose drugs has a
            structure there are dropped.
        drug_atc: `drug-atc.csv`: a STITCH id, then its ATC codes.
        drug_ddi: `drug-DDI.csv` (TWOSIDES) with the columns STITCH 1, STITCH 2, Polypharmacy Side Effect and Side Effect
            Name. It needs `drug_atc` and the two mapping files.

    Raises:
        ValueError: If one of two files that belong together is missing.
    """

    ndc_to_rxcui: PathLike | None = None
    rxcui_to_atc: PathLike | None = None
    drugbank: PathLike | None = None
    drug_atc: PathLike | None = None
    drug_ddi: PathLike | None = None

    def __post_init__(self) -> None:
        if (self.ndc_to_rxcui is None) != (self.rxcui_to_atc is None):
            raise ValueError("ndc_to_rxcui and rxcui_to_atc are two steps of one mapping; give both or neither")
        if (self.drug_atc is None) != (self.drug_ddi is None):
            raise ValueError("drug_atc and drug_ddi belong together; give both or neither")
        if not self.maps_to_atc and (self.drug_ddi is not None or self.drugbank is not None):
            raise ValueError("drug_ddi and drugbank need ATC classes: give ndc_to_rxcui and rxcui_to_atc as well")

    @property
    def maps_to_atc(self) -> bool:
        """Whether drug products are mapped to ATC classes."""
        return self.ndc_to_rxcui is not None


@dataclass
class _Prescriptions:
    """What is kept of the prescriptions."""

    medications: Codes = field(default_factory=dict)
    admissions: dict[int, set[int]] = field(default_factory=dict)  # by subject, before products are mapped
    names: dict[str, set[str]] = field(default_factory=dict)  # drug names by code


class _Source(NamedTuple):
    """One table of the folder and how to name it."""

    table: str
    columns: tuple[str, ...]


_DIAGNOSES = _Source("diagnoses_icd", ("subject_id", "hadm_id"))
_PROCEDURES = _Source("procedures_icd", ("subject_id", "hadm_id", "seq_num"))
_PRESCRIPTIONS = _Source("prescriptions", ("subject_id", "hadm_id", "drug", "ndc"))
_ICD = ("icd9_code", "icd_code")  # MIMIC-III, MIMIC-IV


def read_mimic(
    folder: PathLike,
    tables: MimicTables | None = None,
    *,
    medication_key: Literal["drug", "ndc"] = "drug",
    drop_ndc_zero: bool = True,
    forward_fill: bool = True,
    min_admissions: int = 2,
    max_medications: int | None = 300,
    subject_share: float | None = None,
    min_occurrences: int = 6,
    num_side_effects: int = 40,
) -> EHRDataset:
    """Build visits from the CSV files of MIMIC-III or MIMIC-IV, as the original preprocessing does.

    `DIAGNOSES_ICD`, `PROCEDURES_ICD` and `PRESCRIPTIONS` are found in upper or lower case, as `.csv` or `.csv.gz`, in the
    folder or its sub-folder `hosp`; column names in either case.

    Steps: (1) prescriptions without a product code (NDC "0") are dropped, missing values are filled from the row before;
    (2) patients with fewer than `min_admissions` admissions in the prescriptions are dropped; (3) products are mapped to
    ATC level 3 by `tables` (NDC, RxCUI, ATC level 4, cut to four characters), rows that can't be mapped are dropped;
    (4) the `max_medications` medications in most admissions are kept, then those with a structure; (5) admissions with
    diagnoses, procedures and medications are kept; (6) diagnoses and procedures in fewer than `min_occurrences` of them
    are dropped, and (5) and (6) repeated until nothing changes. Visits are sorted by patient and admission number;
    diagnoses keep the order of the file, procedures are sorted by SEQ_NUM. MIMIC-IV gives ICD-9 and ICD-10 codes in one
    column; they are taken as they are, as the original does.

    Args:
        folder: Folder of the tables.
        tables: Helper files; without the two of the mapping, medications are known by `medication_key`, and without
            `drug_ddi` no drugs interact.
        medication_key: What a medication is without a mapping: `"drug"`, the name in the prescription in lower case
            with single blanks, or `"ndc"`, the product, of which the same drug has many.
        drop_ndc_zero: Step (1); most of these are fluids and local preparations.
        forward_fill: Step (1); rows with missing values are dropped otherwise.
        min_admissions: Step (2), at least 1.
        max_medications: Step (4), at least 1; None keeps all.
        subject_share: Only the first share of the patients in the order of the diagnosis table, in (0, 1]. None is 1
            for MIMIC-III and 0.1 for MIMIC-IV.
        min_occurrences: Step (6), at least 1; the original drops codes with 5 or fewer.
        num_side_effects: Interactions come from this many of the rarest side effects of `drug_ddi` (ties by name).

    Returns:
        The data set; codes get ids by first appearance.

    Raises:
        FileNotFoundError: If a table or a helper file is absent; the message lists what was looked for.
        ValueError: If a file is damaged or malformed (with file and line), an option is out of range, or no admission is
            left.

    Source: Zhao et al., 2024, sec. 6.1, and `data/process.py` of the authors' code.
    """
    check_choice("medication_key", medication_key, ("drug", "ndc"))
    minima = {
        "min_admissions": min_admissions,
        "min_occurrences": min_occurrences,
        "num_side_effects": num_side_effects,
    }
    for name, value in {**minima, "max_medications": 1 if max_medications is None else max_medications}.items():
        if not value >= 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}")
    if subject_share is not None and not 0 < subject_share <= 1:
        raise ValueError(f"subject_share must be in (0, 1], got {subject_share!r}")
    tables = MimicTables() if tables is None else tables
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    mapping = _ndc_to_atc(tables)
    found = _read_prescriptions(_find(folder, _PRESCRIPTIONS), mapping, medication_key, drop_ndc_zero, forward_fill)
    frequent = {subject for subject, stays in found.admissions.items() if len(stays) >= min_admissions}
    medications = {key: codes for key, codes in found.medications.items() if key[0] in frequent}
    _keep_codes(medications, _known_medications(medications, found.names, max_medications, tables.drugbank))
    diagnoses = _read_diagnoses(_find(folder, _DIAGNOSES), subject_share)
    procedures = _read_procedures(_find(folder, _PROCEDURES))
    counts = [f"{len(part)} with {name}" for name, part in _named(diagnoses, procedures, medications)]
    _join(diagnoses, procedures, medications, min_occurrences)
    if not medications:
        raise ValueError(
            f"{folder}: no admission is left (before the join: {', '.join(counts)}); "
            "lower min_admissions or min_occurrences"
        )
    _log.info("%s: %d admissions of %s", folder, len(medications), ", ".join(counts))
    return _assemble(diagnoses, procedures, medications, tables, num_side_effects)


def _named(diagnoses: Codes, procedures: Codes, medications: Codes) -> Iterable[tuple[str, Codes]]:
    return zip(("diagnoses", "procedures", "medications"), (diagnoses, procedures, medications), strict=True)


# --- the three tables -------------------------------------------------------------------------------------------------


def _read_prescriptions(
    path: Path, mapping: Mapping[str, str] | None, key: str, drop_ndc_zero: bool, forward_fill: bool
) -> _Prescriptions:
    found = _Prescriptions()
    before: tuple[str, ...] = ("", "", "", "")
    for where, row in _rows(path, _PRESCRIPTIONS.columns):
        if drop_ndc_zero and row[3] == "0":
            continue
        values = tuple(new or old for new, old in zip(row, before, strict=True)) if forward_fill else row
        before = values
        if not all(values):
            continue
        subject, stay, drug, ndc = values
        admission = _admission(where, subject, stay)
        found.admissions.setdefault(admission[0], set()).add(admission[1])
        name = " ".join(drug.split()).casefold()
        code = (name if key == "drug" else ndc) if mapping is None else mapping.get(ndc)
        if code is not None:
            found.medications.setdefault(admission, {})[code] = None
            found.names.setdefault(code, set()).add(name)
    return found


def _read_diagnoses(path: Path, subject_share: float | None) -> Codes:
    diagnoses: Codes = {}
    column = _icd_column(path)
    for where, (subject, stay, code) in _rows(path, (*_DIAGNOSES.columns, column)):
        if subject and stay and code:
            diagnoses.setdefault(_admission(where, subject, stay), {})[code] = None
    share = (0.1 if column == "icd_code" else 1.0) if subject_share is None else subject_share
    subjects = list(dict.fromkeys(subject for subject, _ in diagnoses))
    kept = set(subjects[: int(share * len(subjects) + 1e-9)])
    return {admission: codes for admission, codes in diagnoses.items() if admission[0] in kept}


def _read_procedures(path: Path) -> Codes:
    ranked: dict[Admission, list[tuple[int, str]]] = {}
    for where, (subject, stay, position, code) in _rows(path, (*_PROCEDURES.columns, _icd_column(path))):
        if subject and stay and position and code:
            ranked.setdefault(_admission(where, subject, stay), []).append((_whole(where, "SEQ_NUM", position), code))
    by_position = {key: sorted(codes, key=lambda entry: entry[0]) for key, codes in ranked.items()}
    return {key: dict.fromkeys(code for _, code in codes) for key, codes in by_position.items()}


def _admission(where: str, subject: str, stay: str) -> Admission:
    return _whole(where, "SUBJECT_ID", subject), _whole(where, "HADM_ID", stay)


def _whole(where: str, column: str, text: str) -> int:
    # Columns with missing values have often been through a program that wrote whole numbers as 123.0.
    try:
        return int(text.removesuffix(".0"))
    except ValueError:
        raise ValueError(f"{where}: {column} must be a whole number, got {text!r}") from None


# --- filters ----------------------------------------------------------------------------------------------------------


def _known_medications(
    medications: Codes, names: Mapping[str, set[str]], limit: int | None, drugbank: PathLike | None
) -> set[str]:
    """The codes in most admissions (ties by code), those with a structure among them."""
    count = _occurrences(medications)
    ranked = sorted(count, key=lambda code: (-count[code], code))[:limit]
    if drugbank is None:
        return set(ranked)
    rows = _rows(Path(drugbank), ("name", "moldb_smiles"))
    with_structure = {" ".join(name.split()).casefold() for _, (name, smiles) in rows if smiles}
    return {code for code in ranked if names[code] & with_structure}


def _join(diagnoses: Codes, procedures: Codes, medications: Codes, min_occurrences: int) -> None:
    """Keep admissions with all three kinds and codes that are frequent among them, in place, until nothing changes."""
    while True:
        common = diagnoses.keys() & procedures.keys() & medications.keys()
        changed = False
        for part in (diagnoses, procedures, medications):
            for admission in part.keys() - common:
                del part[admission]
                changed = True
        for part in (diagnoses, procedures):
            count = _occurrences(part)
            frequent = {code for code, number in count.items() if number >= min_occurrences}
            changed |= len(frequent) < len(count)
            _keep_codes(part, frequent)
        if not changed:
            return


def _occurrences(part: Codes) -> Counter[str]:
    return Counter(code for codes in part.values() for code in codes)


def _keep_codes(part: Codes, known: set[str]) -> None:
    """Drop the other codes in place, and admissions without any."""
    for admission, codes in list(part.items()):
        part[admission] = {code: None for code in codes if code in known}
        if not part[admission]:
            del part[admission]


# --- assembly ---------------------------------------------------------------------------------------------------------


def _assemble(
    diagnoses: Codes, procedures: Codes, medications: Codes, tables: MimicTables, num_side_effects: int
) -> EHRDataset:
    ids: dict[str, dict[str, int]] = {"diagnoses": {}, "procedures": {}, "medications": {}}
    visits = []
    for admission in sorted(medications):
        numbered = [
            tuple(ids[kind].setdefault(code, len(ids[kind])) for code in part[admission])
            for kind, part in _named(diagnoses, procedures, medications)
        ]
        visits.append(Visit(str(admission[0]), str(admission[1]), numbered[0], numbered[1], numbered[2]))
    vocabulary = EHRVocabulary(*(tuple(table) for table in ids.values()))
    return EHRDataset(tuple(visits), vocabulary, _interactions(ids["medications"], tables, num_side_effects))


def _ndc_to_atc(tables: MimicTables) -> dict[str, str] | None:
    """The ATC level-3 class of each product; None where there is no mapping."""
    if tables.ndc_to_rxcui is None or tables.rxcui_to_atc is None:
        return None
    classes: dict[str, str] = {}
    for _, (rxcui, atc) in _rows(Path(tables.rxcui_to_atc), ("rxcui", "atc4")):
        if rxcui and atc:
            classes.setdefault(rxcui.removesuffix(".0"), atc[:_ATC3_LENGTH])
    path = Path(tables.ndc_to_rxcui)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        products = ast.literal_eval(path.read_text(encoding="utf-8").strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None) or 1
        raise ValueError(f"{path}:{line}: expected a dict of NDC to RxCUI: {error}") from None
    if not isinstance(products, dict):
        raise ValueError(f"{path}:1: expected a dict of NDC to RxCUI, got {type(products).__name__}")
    return {str(ndc): classes[str(rxcui)] for ndc, rxcui in products.items() if str(rxcui) in classes}


def _interactions(medications: Mapping[str, int], tables: MimicTables, num_side_effects: int) -> NDArray[np.uint8]:
    matrix = np.zeros((len(medications), len(medications)), dtype=np.uint8)
    if tables.drug_ddi is None or tables.drug_atc is None:
        return matrix
    classes = _stitch_to_ids(Path(tables.drug_atc), medications)
    path = Path(tables.drug_ddi)
    effects = ("polypharmacy side effect", "side effect name")
    count = Counter(tuple(row) for _, row in _rows(path, effects))
    rarest = sorted(count, key=lambda effect: (-count[effect], effect[1]))[-num_side_effects:]
    chosen = {name for _, name in rarest}
    for _, (first, second, name) in _rows(path, ("stitch 1", "stitch 2", effects[1])):
        if name in chosen:
            for i in classes.get(first, ()):
                for j in classes.get(second, ()):
                    if i != j:
                        matrix[i, j] = matrix[j, i] = 1
    return matrix


def _stitch_to_ids(path: Path, medications: Mapping[str, int]) -> dict[str, set[int]]:
    """The medications of each STITCH id; the table has no header and lines of any length."""
    classes: dict[str, set[int]] = {}
    for _, row in _records(path):
        codes = {atc.strip()[:_ATC3_LENGTH] for atc in row[1:]}
        classes.setdefault(row[0], set()).update(medications[code] for code in codes if code in medications)
    return classes


# --- CSV --------------------------------------------------------------------------------------------------------------


def _find(folder: Path, source: _Source) -> Path:
    names = [name + end for name in (source.table.upper(), source.table) for end in (".csv", ".csv.gz")]
    places = [place / name for place in (folder, folder / "hosp") for name in names]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"no table {source.table} in {folder} (looked for {', '.join(names)}, also in hosp/)")
    return found


def _icd_column(path: Path) -> str:
    """The name of the column of codes, which tells the two databases apart."""
    header = [name.strip().lower() for name in next((row for _, row in _records(path)), [])]
    for name in _ICD:
        if name in header:
            return name
    raise ValueError(f"{path}:1: there is no column ICD9_CODE or ICD_CODE, only {', '.join(header) or 'an empty line'}")


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield "file:line" and the stripped values of some columns of every row."""
    positions: list[int] = []
    width = 0
    for where, row in _records(path):
        if not positions:
            header = [name.strip().lower() for name in row]
            missing = [name.upper() for name in columns if name not in header]
            if missing:
                raise ValueError(f"{where}: there is no column {missing[0]}, only {', '.join(header)}")
            positions, width = [header.index(name) for name in columns], len(header)
            continue
        if len(row) != width:
            raise ValueError(f"{where}: expected {width} values as in the header, got {len(row)}")
        yield where, tuple(row[position].strip() for position in positions)
    if not positions:
        raise ValueError(f"{path} is empty")


def _records(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield "file:line" and the fields of every line that isn't blank."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    opener = gzip.open if zipped else open
    line = 0
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text, strict=True)
            for row in reader:
                line = reader.line_num
                if row:
                    yield f"{path}:{line}", row
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}:{line + 1}: not a CSV text: {error}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}:{line + 1}: damaged gzip file: {error}") from None
