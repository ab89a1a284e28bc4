"""Records, portable files, pickles, MIMIC tables and generated visits of RAREMed."""

from __future__ import annotations

import csv
import gzip
import json
import pickle
import sys
import types
from collections import Counter

import numpy as np
import pytest

from recsys_losses.raremed import (
    EHRDataset,
    EHRVocabulary,
    MimicTables,
    Visit,
    bayes_optimal,
    ddi_rate,
    make_synthetic_ehr,
    read_mimic,
)

LINE = {"patient": "7", "visit": "1", "diagnoses": ["a", "b"], "procedures": ["x"], "medications": ["m", "n"]}


def same(one: EHRDataset, other: EHRDataset) -> bool:
    return (
        one.visits == other.visits
        and one.vocabulary == other.vocabulary
        and (one.ddi_adj == other.ddi_adj).all()
        and (one.diagnosis_counts == other.diagnosis_counts).all()
    )


@pytest.fixture(scope="module")
def small() -> EHRDataset:
    return EHRDataset.synthetic(num_patients=60, seed=1)


# --- the data set -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["file", "random"])
def test_split_leaks_no_patient_and_keeps_every_visit(small, order):
    parts = small.split(order=order, seed=3)
    patients = [set(part.patients()) for part in parts]
    assert [len(group) for group in patients] == [40, 10, 10]
    assert not patients[0] & patients[1]
    assert not patients[0] & patients[2]
    assert not patients[1] & patients[2]
    assert Counter(v for part in parts for v in part.visits) == Counter(small.visits)


def test_split_in_file_order_and_random_order(small):
    assert small.split()[0].patients() == small.patients()[:40]
    random = [small.split(order="random", seed=seed)[0].patients() for seed in (0, 0, 1)]
    assert random[0] == random[1] != random[2]
    assert random[0] != small.patients()[:40]


def test_parts_know_the_rarity_in_the_whole(small):
    test = small.split()[2]
    whole = dict(zip(small.visits, small.rarity(), strict=True))
    assert test.rarity().tolist() == [whole[visit] for visit in test.visits]


def test_targets_are_the_medications(small):
    target = small.targets()
    assert [tuple(np.flatnonzero(row)) for row in target.numpy()] == [
        tuple(sorted(v.medications)) for v in small.visits
    ]


@pytest.mark.parametrize(
    ("visit", "message"),
    [
        (Visit("1", "1", (), (), (0,)), "no diagnoses"),
        (Visit("1", "1", (2,), (), ()), "id 2 of diagnoses is out of range"),
        (Visit("1", "1", (0,), (-1,), ()), "id -1 of procedures is out of range"),
        (Visit("1", "1", (0, 0), (), ()), "twice"),
    ],
)
def test_dataset_refuses(visit, message):
    vocabulary = EHRVocabulary(("a", "b"), ("x",), ("m",))
    with pytest.raises(ValueError, match=message):
        EHRDataset((visit,), vocabulary, np.zeros((1, 1)))


@pytest.mark.parametrize(
    ("matrix", "message"), [([[0, 1], [0, 0]], "symmetric"), ([[0, 1]], "square"), ([[0]], "2 med")]
)
def test_dataset_refuses_wrong_interactions(matrix, message):
    with pytest.raises(ValueError, match=message):
        EHRDataset((), EHRVocabulary((), (), ("m", "n")), np.array(matrix))


def test_split_refuses(small):
    with pytest.raises(ValueError, match="unknown by 'visit'"):
        small.split(by="visit")
    with pytest.raises(ValueError, match="at least 6 patients"):
        EHRDataset.synthetic(num_patients=5).split()
    with pytest.raises(ValueError, match="twice"):
        EHRVocabulary(("a", "a"), (), ())


# --- portable files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ddi", ["npz", "csv"])
def test_jsonl_round_trip(small, tmp_path, ddi):
    small.to_jsonl(tmp_path / "new" / "folder", ddi=ddi)
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == sorted(["visits.jsonl", "vocab.json", f"ddi.{ddi}"])
    assert same(EHRDataset.from_jsonl(folder), small)
    assert same(EHRDataset.from_jsonl(folder / "visits.jsonl"), small)


def test_rewriting_the_other_kind_of_interactions_leaves_one(small, tmp_path):
    small.to_jsonl(tmp_path, ddi="csv")
    small.to_jsonl(tmp_path)
    assert not (tmp_path / "ddi.csv").exists()


def test_codes_get_ids_by_first_appearance_without_a_vocabulary(tmp_path):
    path = tmp_path / "any.jsonl"
    second = {**LINE, "visit": 2, "diagnoses": ["b", "c"], "procedures": []}
    path.write_text("\ufeff" + json.dumps(LINE) + "\n\n" + json.dumps(second) + "\n")
    data = EHRDataset.from_jsonl(path)
    assert data.vocabulary == EHRVocabulary(("a", "b", "c"), ("x",), ("m", "n"))
    assert [visit.diagnoses for visit in data.visits] == [(0, 1), (1, 2)]
    assert data.visits[1].visit == "2"
    assert not data.ddi_adj.any()


def test_numbers_are_ids(tmp_path):
    path = tmp_path / "any.jsonl"
    path.write_text(json.dumps({**LINE, "diagnoses": [4, 0], "procedures": [1], "medications": [2]}))
    data = EHRDataset.from_jsonl(path)
    assert data.visits[0].diagnoses == (4, 0)
    assert (data.num_diagnoses, data.num_procedures, data.num_medications) == (5, 2, 3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "visits.jsonl:2: not JSON"),
        ("[1]", "visits.jsonl:2: expected an object"),
        (json.dumps({"patient": "1"}), "visits.jsonl:2: there is no 'visit'"),
        (json.dumps({**LINE, "patient": None}), "visits.jsonl:2: 'patient' must be"),
        (json.dumps({**LINE, "diagnoses": []}), "visits.jsonl:2: the visit has no diagnoses"),
        (json.dumps({**LINE, "diagnoses": "a"}), "visits.jsonl:2: 'diagnoses' must be a list"),
        (json.dumps({**LINE, "procedures": ["x", "x"]}), "visits.jsonl:2: 'procedures' holds 'x' twice"),
        (json.dumps({**LINE, "medications": ["q"]}), "visits.jsonl:2: 'medications' holds 'q', which is not"),
        (json.dumps({**LINE, "medications": [9]}), "visits.jsonl:2: the id 9 of 'medications' is out of range"),
        (json.dumps({**LINE, "medications": [1.5]}), "visits.jsonl:2: an entry of 'medications'"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    vocabulary = {"diagnoses": ["a", "b"], "procedures": ["x"], "medications": ["m", "n"]}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "visits.jsonl").write_text(json.dumps(LINE) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        EHRDataset.from_jsonl(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", b"{\n\n]", "vocab.json:3: not JSON"),
        ("vocab.json", b'{"diagnoses": ["a"]}', "list of texts 'procedures'"),
        ("vocab.json", b"\xff", "not UTF-8"),
        ("visits.jsonl", b"\n\n", "holds no visits"),
        ("visits.jsonl", b"\xff\n", "visits.jsonl:1: not UTF-8"),
        ("ddi.npz", b"PK not an archive", "ddi.npz is not"),
        ("ddi.csv", b"1,2\nm,q\n", "ddi.csv:2: .*'q' is not in the vocabulary"),
        ("ddi.csv", b"1,2\nm,m\n", "ddi.csv:2: .*two different"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, name, content, message):
    vocabulary = {"diagnoses": ["a", "b"], "procedures": ["x"], "medications": ["m", "n"]}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "visits.jsonl").write_text(json.dumps(LINE))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        EHRDataset.from_jsonl(tmp_path)


def test_interactions_of_another_size_are_refused(small, tmp_path):
    small.to_jsonl(tmp_path)
    np.savez(tmp_path / "ddi.npz", ddi_adj=np.zeros((3, 3)))
    with pytest.raises(ValueError, match=r"ddi.npz: ddi_adj must be \(90, 90\)"):
        EHRDataset.from_jsonl(tmp_path)


def test_absent_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        EHRDataset.from_jsonl(tmp_path / "nowhere")
    (tmp_path / "visits.jsonl").write_text(json.dumps(LINE))
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        EHRDataset.from_jsonl(tmp_path, vocabulary=tmp_path / "none.json")


# --- pickles ----------------------------------------------------------------------------------------------------------


class Voc:
    """The shape of the original class; pickled by the name of this module."""

    def __init__(self, words):
        self.idx2word = dict(enumerate(words))
        self.word2idx = {word: i for i, word in enumerate(words)}


def write_pickles(folder, *, records=None, voc=None, ddi=None, protocol=4):
    words = {"diag_voc": ["a", "b", "c"], "pro_voc": ["x"], "med_voc": ["m", "n"]}
    parts = {
        "records_final": [[[[0, 2], [0], [1], 1.5], [[1], [], [0, 1], 0.5]], [[[2], [0], [], 2.0]]]
        if records is None
        else records,
        "voc_final": {name: Voc(entries) for name, entries in words.items()} if voc is None else voc,
        "ddi_A_final": np.array([[0.0, 1.0], [1.0, 0.0]]) if ddi is None else ddi,
    }
    with pytest.MonkeyPatch.context() as patch:
        # pickle looks the class up where it says it is, as in the original: the script that was run
        patch.setattr(Voc, "__module__", "process")
        patch.setitem(sys.modules, "process", types.SimpleNamespace(Voc=Voc))
        for name, value in parts.items():
            content = value if isinstance(value, bytes) else pickle.dumps(value, protocol=protocol)
            (folder / f"{name}.pkl").write_bytes(content)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_pickles_of_every_protocol(tmp_path, protocol):
    write_pickles(tmp_path, protocol=protocol)
    data = EHRDataset.from_pickles(tmp_path, allow_pickle=True)
    assert data.vocabulary == EHRVocabulary(("a", "b", "c"), ("x",), ("m", "n"))
    assert [v.diagnoses for v in data.visits] == [(0, 2), (1,), (2,)]
    assert [v.patient for v in data.visits] == ["0", "0", "1"]
    assert data.ddi_adj.tolist() == [[0, 1], [1, 0]]


def test_numpy_scalars_and_lists_in_pickles(tmp_path):
    write_pickles(tmp_path, records=[[[[np.int64(0)], [], [np.int64(1)]]]], ddi=[[0, 0], [0, 0]])
    assert EHRDataset.from_pickles(tmp_path, allow_pickle=True).visits[0].medications == (1,)


def test_a_vocabulary_class_that_dill_wrote_by_value(tmp_path, monkeypatch):
    # dill stores a class of the main script as calls of its own helpers; here they are imitated
    helpers = types.ModuleType("dill._dill")
    for name in ("_create_type", "_create_function", "_create_code", "_load_type"):
        exec(f"def {name}(*arguments): raise AssertionError", helpers.__dict__)  # noqa: S102
        getattr(helpers, name).__module__ = "dill._dill"
    monkeypatch.setitem(sys.modules, "dill", types.ModuleType("dill"))
    monkeypatch.setitem(sys.modules, "dill._dill", helpers)

    class ByValue:
        """A call of a helper, as it stands in the file."""

        def __init__(self, helper, *arguments, state=None):
            self.call = (
                (getattr(helpers, helper), arguments) if state is None else (getattr(helpers, helper), arguments, state)
            )

        def __reduce__(self):
            return self.call

    code = ByValue("_create_code", 1, 2, b"code")
    method = ByValue("_create_function", code, {}, "add_word", state={"__module__": "__main__"})
    kind = ByValue(
        "_create_type", ByValue("_load_type", "type"), "Voc", (ByValue("_load_type", "object"),), {"add": method}
    )

    class Instance:
        """An instance of the class above, old style: rebuilt by copyreg, then its state."""

        def __init__(self, words):
            self.words = words

        def __reduce__(self):
            import copyreg

            return copyreg._reconstructor, (kind, object, None), {"idx2word": dict(enumerate(self.words))}

    voc = {"diag_voc": Instance(["a", "b", "c"]), "pro_voc": Instance(["x"]), "med_voc": Instance(["m", "n"])}
    write_pickles(tmp_path, voc=voc)
    assert EHRDataset.from_pickles(tmp_path, allow_pickle=True).vocabulary.diagnoses == ("a", "b", "c")


class _Attack:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def _attacks():
    import os
    import subprocess

    return [
        _Attack(os.system, "touch hacked"),
        _Attack(subprocess.Popen, ["touch", "hacked"]),
        _Attack(eval, "1"),
        _Attack(getattr, "x", "upper"),
        _Attack(np.load, "hacked.npy"),
        _Attack(Counter, "ab"),
        _Attack(__import__, "os"),
    ]


@pytest.mark.parametrize("attack", _attacks(), ids=lambda attack: attack.call[0].__name__)
@pytest.mark.parametrize("place", ["records", "voc", "ddi"])
def test_anything_but_data_is_refused(tmp_path, monkeypatch, attack, place):
    monkeypatch.chdir(tmp_path)
    write_pickles(tmp_path, **{place: attack})
    with pytest.raises(ValueError, match="is not allowed"):
        EHRDataset.from_pickles(tmp_path, allow_pickle=True)
    assert not (tmp_path / "hacked").exists()


def test_names_below_builtins_are_refused_too(tmp_path):
    # protocol 4 resolves dotted names: "dict.fromkeys" must not be looked up below dict
    write_pickles(tmp_path, records=b"\x80\x04\x8c\x08builtins\x8c\x0ddict.fromkeys\x93.")
    with pytest.raises(ValueError, match=r"builtins.dict.fromkeys is not allowed"):
        EHRDataset.from_pickles(tmp_path, allow_pickle=True)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"records": b"not a pickle"}, "records_final.pkl can't be read"),
        ({"records": pickle.dumps([[1]])[:-4]}, "records_final.pkl can't be read"),
        ({"records": {"a": 1}}, "expected a list of patients"),
        ({"records": [[[[0], [0]]]]}, "patient 0, visit 0: expected"),
        ({"records": [[[["x"], [0], [0]]]]}, "three lists of ids"),
        ({"records": [[[[7], [0], [0]]]]}, "out of range"),
        ({"voc": {"diag_voc": 1}}, "voc_final.pkl: expected 'diag_voc'"),
        ({"ddi": np.full((2, 2), 0.5)}, "0/1 matrix"),
        ({"ddi": np.zeros((3, 3))}, "2 medications"),
    ],
)
def test_wrong_pickles_are_named(tmp_path, parts, message):
    write_pickles(tmp_path, **parts)
    with pytest.raises(ValueError, match=message):
        EHRDataset.from_pickles(tmp_path, allow_pickle=True)


def test_pickles_need_the_switch_and_the_files(tmp_path):
    with pytest.raises(ValueError, match="allow_pickle=True"):
        EHRDataset.from_pickles(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"records_final\.pkl"):
        EHRDataset.from_pickles(tmp_path, allow_pickle=True)


# --- MIMIC ------------------------------------------------------------------------------------------------------------

DIAGNOSES = [
    ("1", "10", "1", "4019"), ("1", "10", "2", "25000"), ("1", "11", "1", "4019"), ("2", "20", "2", "4019"),
    ("2", "20", "1", "25000"), ("2", "21", "1", ""), ("3", "30", "1", "4019"),
]  # fmt: skip
PROCEDURES = [("1", "10", "2", "9904"), ("1", "10", "1", "3893"), ("1", "11", "1", "9904"), ("2", "20", "1", "9904"),
              ("3", "30", "1", "9904")]  # fmt: skip
PRESCRIPTIONS = [
    ("1", "10", "Aspirin", "111"), ("1", "10", "ASPIRIN ", "112"), ("1", "10", "Saline", "0"), ("1", "11", "Heparin", "113"),
    ("2", "20", "Heparin", ""), ("2", "21", "Insulin", "114"), ("3", "30", "Aspirin", "111"),
]  # fmt: skip


def write_mimic(
    folder, version=3, *, zipped=False, diagnoses=DIAGNOSES, procedures=PROCEDURES, prescriptions=PRESCRIPTIONS
):
    code = "ICD9_CODE" if version == 3 else "ICD_CODE"
    tables = {
        "DIAGNOSES_ICD": (("SUBJECT_ID", "HADM_ID", "SEQ_NUM", code), diagnoses),
        "PROCEDURES_ICD": (("SUBJECT_ID", "HADM_ID", "SEQ_NUM", code), procedures),
        "PRESCRIPTIONS": (("SUBJECT_ID", "HADM_ID", "DRUG", "NDC"), prescriptions),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, (header, rows) in tables.items():
        lines = [("ROW_ID", *header), *((str(i), *row) for i, row in enumerate(rows))]
        text = "\n".join(",".join(line) for line in lines) + "\n"
        if version == 4:
            name, text = name.lower(), text.replace(lines and ",".join(lines[0]), ",".join(lines[0]).lower(), 1)
        if zipped:
            (folder / f"{name}.csv.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / f"{name}.csv").write_text(text)


CUT_GZIP = gzip.compress(b"SUBJECT_ID,HADM_ID,DRUG,NDC\n" + b"1,10,Aspirin,111\n" * 50)[:-20]
OPEN = {"min_admissions": 1, "min_occurrences": 1}


def words(data: EHRDataset) -> list[tuple]:
    """Visits with codes in place of ids."""
    v = data.vocabulary
    return [
        (
            visit.patient,
            visit.visit,
            [v.diagnoses[i] for i in visit.diagnoses],
            [v.procedures[i] for i in visit.procedures],
            [v.medications[i] for i in visit.medications],
        )
        for visit in data.visits
    ]


EXPECTED = [
    ("1", "10", ["4019", "25000"], ["3893", "9904"], ["aspirin"]),
    ("1", "11", ["4019"], ["9904"], ["heparin"]),
    ("2", "20", ["4019", "25000"], ["9904"], ["heparin"]),  # file order, not SEQ_NUM; NDC filled from the row before
    ("3", "30", ["4019"], ["9904"], ["aspirin"]),
]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("place", ["", "hosp"])
def test_mimic_iii_tables(tmp_path, zipped, place):
    write_mimic(tmp_path / place, zipped=zipped)
    data = EHRDataset.from_mimic(tmp_path, **OPEN)
    assert words(data) == EXPECTED
    assert not data.ddi_adj.any()


def test_mimic_iv_tables_and_its_share_of_patients(tmp_path):
    write_mimic(tmp_path, version=4)
    assert words(read_mimic(tmp_path, subject_share=1.0, **OPEN)) == EXPECTED
    assert words(read_mimic(tmp_path, subject_share=0.34, **OPEN)) == EXPECTED[:2]
    with pytest.raises(ValueError, match="0 with diagnoses"):  # a tenth of three patients
        read_mimic(tmp_path, **OPEN)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"min_admissions": 2, "min_occurrences": 1}, EXPECTED[:3]),
        (
            {"min_admissions": 1, "min_occurrences": 3},
            [(p, v, ["4019"], ["9904"], drugs) for p, v, _, _, drugs in EXPECTED],
        ),
        ({**OPEN, "forward_fill": False}, [EXPECTED[0], EXPECTED[1], EXPECTED[3]]),
        ({**OPEN, "max_medications": 1}, [EXPECTED[0], EXPECTED[3]]),  # aspirin and heparin tie: by name
        ({**OPEN, "drop_ndc_zero": False}, [(*EXPECTED[0][:4], ["aspirin", "saline"]), *EXPECTED[1:]]),
        (
            {**OPEN, "medication_key": "ndc"},
            [
                (*row[:4], drugs)
                for row, drugs in zip(EXPECTED, [["111", "112"], ["113"], ["113"], ["111"]], strict=True)
            ],
        ),
    ],
)
def test_each_filter(tmp_path, options, expected):
    write_mimic(tmp_path)
    assert words(read_mimic(tmp_path, **options)) == expected


def test_the_filters_are_repeated_until_nothing_changes(tmp_path):
    # Dropping the procedure "rare" drops visit 11, which makes diagnosis "b" rare, which drops visit 20.
    diagnoses = [("1", "10", "1", "a"), ("1", "11", "1", "b"), ("2", "20", "1", "b"), ("3", "30", "1", "a")]
    procedures = [("1", "10", "1", "p"), ("1", "11", "1", "rare"), ("2", "20", "1", "p"), ("3", "30", "1", "p")]
    drugs = [(s, h, "aspirin", "1") for s, h, _, _ in diagnoses]
    write_mimic(tmp_path, diagnoses=diagnoses, procedures=procedures, prescriptions=drugs)
    data = read_mimic(tmp_path, min_admissions=1, min_occurrences=2)
    assert [visit.visit for visit in data.visits] == ["10", "30"]


@pytest.fixture
def helper_tables(tmp_path):
    (tmp_path / "ndc2RXCUI.txt").write_text("{'111': '1', '112': '2', '113': '3', '114': ''}")
    (tmp_path / "RXCUI2atc4.csv").write_text(
        "YEAR,MONTH,NDC,RXCUI,ATC4\n2017,1,9,1,B01AC\n2017,1,9,1,N02BA\n2017,1,9,2,B01AB\n2017,1,9,3,C09AA\n"
    )
    (tmp_path / "drug-atc.csv").write_text("CID01,B01AC06,N02BA01\nCID02,C09AA02\nCID03,Z99ZZ01\n")
    effects = [
        ("CID01", "CID02", "C1", "rare"),
        *[("CID01", "CID01", "C2", "common")] * 3,
        ("CID02", "CID03", "C1", "rare"),
    ]
    rows = "\n".join(",".join(row) for row in effects)
    (tmp_path / "drug-DDI.csv").write_text(f"STITCH 1,STITCH 2,Polypharmacy Side Effect,Side Effect Name\n{rows}\n")
    (tmp_path / "drugbank.csv").write_text("name,moldb_smiles\nAspirin,CC(=O)O\nHeparin,\n")
    return {
        "ndc_to_rxcui": tmp_path / "ndc2RXCUI.txt",
        "rxcui_to_atc": tmp_path / "RXCUI2atc4.csv",
        "drug_atc": tmp_path / "drug-atc.csv",
        "drug_ddi": tmp_path / "drug-DDI.csv",
        "drugbank": tmp_path / "drugbank.csv",
    }


def test_products_become_atc_classes(tmp_path, helper_tables):
    write_mimic(tmp_path)
    mapping = {key: helper_tables[key] for key in ("ndc_to_rxcui", "rxcui_to_atc")}
    data = read_mimic(tmp_path, MimicTables(**mapping), **OPEN)
    # 111 -> 1 -> its first ATC4 B01AC -> B01A; 112 -> B01A too; 113 -> C09A; 114 can't be mapped
    assert [row[4] for row in words(data)] == [["B01A"], ["C09A"], ["C09A"], ["B01A"]]
    assert not data.ddi_adj.any()


def test_interactions_come_from_the_rarest_side_effects(tmp_path, helper_tables):
    write_mimic(tmp_path)
    tables = MimicTables(**{key: path for key, path in helper_tables.items() if key != "drugbank"})
    data = read_mimic(tmp_path, tables, num_side_effects=1, **OPEN)
    assert data.vocabulary.medications == ("B01A", "C09A")
    assert data.ddi_adj.tolist() == [[0, 1], [1, 0]]
    everything = read_mimic(tmp_path, tables, **OPEN)
    assert everything.ddi_adj.tolist() == [[0, 1], [1, 0]]  # a class doesn't interact with itself


def test_classes_without_a_structure_are_dropped(tmp_path, helper_tables):
    write_mimic(tmp_path)
    data = read_mimic(tmp_path, MimicTables(**helper_tables), **OPEN)
    assert data.vocabulary.medications == ("B01A",)  # heparin has no structure in the table


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ndc_to_rxcui": "a"}, "give both or neither"),
        ({"drug_ddi": "a"}, "give both or neither"),
        ({"drug_ddi": "a", "drug_atc": "b"}, "need ATC classes"),
        ({"drugbank": "a"}, "need ATC classes"),
    ],
)
def test_helper_files_that_belong_together(given, message):
    with pytest.raises(ValueError, match=message):
        MimicTables(**given)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("DIAGNOSES_ICD.csv", b"", "DIAGNOSES_ICD.csv:1: there is no column ICD9_CODE or ICD_CODE"),
        ("DIAGNOSES_ICD.csv", b"SUBJECT_ID,HADM_ID\n", "DIAGNOSES_ICD.csv:1: there is no column ICD9_CODE"),
        ("DIAGNOSES_ICD.csv", b"HADM_ID,ICD9_CODE\n", "DIAGNOSES_ICD.csv:1: there is no column SUBJECT_ID"),
        ("DIAGNOSES_ICD.csv", b"SUBJECT_ID,HADM_ID,ICD9_CODE\n1,10\n", "DIAGNOSES_ICD.csv:2: expected 3 values"),
        ("DIAGNOSES_ICD.csv", b"SUBJECT_ID,HADM_ID,ICD9_CODE\nx,10,a\n", "DIAGNOSES_ICD.csv:2: SUBJECT_ID must be"),
        ("DIAGNOSES_ICD.csv", b"SUBJECT_ID,HADM_ID,ICD9_CODE\n1,10,\xff\n", "not a CSV text"),
        ("PROCEDURES_ICD.csv", b"SUBJECT_ID,HADM_ID,SEQ_NUM,ICD9_CODE\n1,10,a,b\n", "PROCEDURES_ICD.csv:2: SEQ_NUM"),
        ("PROCEDURES_ICD.csv", b'SUBJECT_ID,HADM_ID,SEQ_NUM,ICD9_CODE\n1,10,1,"b\n', "not a CSV text"),
        ("PRESCRIPTIONS.csv", CUT_GZIP, "damaged gzip"),
        ("PRESCRIPTIONS.csv", b"SUBJECT_ID,HADM_ID,DRUG\n", "PRESCRIPTIONS.csv:1: there is no column NDC"),
    ],
)
def test_a_wrong_table_is_named(tmp_path, name, content, message):
    write_mimic(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_mimic(tmp_path, **OPEN)


def test_wrong_helper_files_are_named(tmp_path, helper_tables):
    write_mimic(tmp_path)
    mapping = {key: helper_tables[key] for key in ("ndc_to_rxcui", "rxcui_to_atc")}
    for text, message in (
        ("{'1': ", "ndc2RXCUI.txt:1: expected a dict"),
        ("[1]", "got list"),
        ("__import__('os')", "dict"),
    ):
        helper_tables["ndc_to_rxcui"].write_text(text)
        with pytest.raises(ValueError, match=message):
            read_mimic(tmp_path, MimicTables(**mapping), **OPEN)
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        read_mimic(tmp_path, MimicTables(**{**mapping, "rxcui_to_atc": tmp_path / "none.csv"}), **OPEN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_admissions": 0}, "min_admissions"),
        ({"min_occurrences": 0}, "min_occurrences"),
        ({"max_medications": 0}, "max_medications"),
        ({"num_side_effects": 0}, "num_side_effects"),
        ({"subject_share": 1.5}, "subject_share"),
        ({"medication_key": "atc"}, "medication_key"),
        ({}, "no admission is left .*lower min_admissions or min_occurrences"),
    ],
)
def test_mimic_options(tmp_path, options, message):
    write_mimic(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_mimic(tmp_path, **options)


def test_absent_tables_are_listed(tmp_path):
    write_mimic(tmp_path)
    (tmp_path / "PROCEDURES_ICD.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"procedures_icd .*PROCEDURES_ICD.csv.gz"):
        read_mimic(tmp_path, **OPEN)
    with pytest.raises(FileNotFoundError, match="no folder"):
        read_mimic(tmp_path / "nowhere")


def demo_rows(folder, name):
    with gzip.open(folder / f"{name}.csv.gz", "rt", newline="") as file:
        return list(csv.DictReader(file))


def test_the_demo_of_mimic_iii(data_root):
    """Sizes counted here a second time, with sets over whole tables."""
    folder = data_root / "recsys" / "mimic-iii-demo"
    diagnoses, procedures, prescriptions = (
        demo_rows(folder, name) for name in ("DIAGNOSES_ICD", "PROCEDURES_ICD", "PRESCRIPTIONS")
    )
    assert len(diagnoses) == 1761
    assert len({row["HADM_ID"] for row in diagnoses}) == 129

    previous = {"SUBJECT_ID": "", "HADM_ID": "", "DRUG": "", "NDC": ""}
    given = set()
    for row in prescriptions:
        if row["NDC"] == "0":
            continue
        previous = {key: row[key].strip() or previous[key] for key in previous}
        given.add((previous["HADM_ID"], " ".join(previous["DRUG"].split()).lower()))
    stays = {row["HADM_ID"] for row in diagnoses if row["ICD9_CODE"]}
    stays &= {row["HADM_ID"] for row in procedures if row["ICD9_CODE"]} & {stay for stay, _ in given}

    data = read_mimic(folder, min_admissions=1, min_occurrences=1, max_medications=None)
    assert {visit.visit for visit in data.visits} == stays
    assert set(data.vocabulary.diagnoses) == {row["ICD9_CODE"] for row in diagnoses if row["HADM_ID"] in stays} - {""}
    assert set(data.vocabulary.procedures) == {row["ICD9_CODE"] for row in procedures if row["HADM_ID"] in stays}
    assert set(data.vocabulary.medications) == {drug for stay, drug in given if stay in stays}
    order = {visit.visit: [data.vocabulary.diagnoses[i] for i in visit.diagnoses] for visit in data.visits}
    in_file: dict[str, list[str]] = {}
    for row in diagnoses:
        if row["ICD9_CODE"] and row["ICD9_CODE"] not in in_file.setdefault(row["HADM_ID"], []):
            in_file[row["HADM_ID"]].append(row["ICD9_CODE"])
    assert all(order[stay] == in_file[stay] for stay in stays)


def test_the_demo_with_the_filters_of_the_paper(data_root):
    data = read_mimic(data_root / "recsys" / "mimic-iii-demo")
    for kind in ("diagnoses", "procedures"):
        count = Counter(i for visit in data.visits for i in getattr(visit, kind))
        assert min(count.values()) >= 6
        assert len(count) == len(getattr(data.vocabulary, kind))
    assert data.num_medications <= 300
    assert all(visit.procedures and visit.medications for visit in data.visits)


# --- generated visits -------------------------------------------------------------------------------------------------


def test_generated_visits_look_as_described():
    ehr = make_synthetic_ehr()
    data = ehr.dataset()
    visits = data.visits
    assert len(visits) / len(ehr.records) == pytest.approx(2.4, abs=0.1)
    assert np.mean([len(v.diagnoses) for v in visits]) == pytest.approx(6, abs=0.7)
    assert np.mean([len(v.procedures) for v in visits]) == pytest.approx(3, abs=0.5)
    assert np.mean([len(v.medications) for v in visits]) == pytest.approx(14, abs=2)
    assert ddi_rate([v.medications for v in visits], ehr.ddi_adj) == pytest.approx(0.12, abs=0.04)
    upper = ehr.ddi_adj[np.triu_indices(90, k=1)]
    assert upper.mean() == pytest.approx(0.12, abs=0.02)
    assert not np.diag(ehr.ddi_adj).any()
    # The truth is calibrated: 45,000 drugs given differ from their expectation by less than four deviations.
    target = data.targets().numpy()
    deviation = np.sqrt((ehr.truth * (1 - ehr.truth)).sum())
    assert abs(target.sum() - ehr.truth.sum()) < 4 * deviation
    rarity = data.rarity()
    assert np.quantile(rarity, 0.9) > 5 * np.quantile(rarity, 0.1)


def test_generation_is_seeded():
    one, two, other = (make_synthetic_ehr(num_patients=15, seed=seed) for seed in (3, 3, 4))
    assert one.records == two.records
    assert (one.truth == two.truth).all()
    assert one.records != other.records


def test_bayes_optimal_sets_beat_every_other_set():
    p = np.random.default_rng(0).random((3, 5))
    outcomes = (np.arange(32)[:, None] >> np.arange(5)) & 1
    for row, best, chosen in zip(p, *bayes_optimal(p), strict=True):
        chance = np.prod(np.where(outcomes == 1, row, 1 - row), axis=1)

        def expected(candidate, chance=chance):
            both, either = (outcomes & candidate).sum(1), (outcomes | candidate).sum(1)
            return (chance * both / np.maximum(either, 1)).sum()

        values = [expected(candidate) for candidate in outcomes]
        assert best == pytest.approx(max(values))
        assert expected(chosen.astype(int)) == pytest.approx(best)


def test_bayes_optimal_is_what_it_promises_on_average():
    ehr = make_synthetic_ehr(num_patients=400)
    best = bayes_optimal(ehr.truth)
    target = ehr.dataset().targets().numpy() > 0
    jaccard = (best.recommended & target).sum(1) / (best.recommended | target).sum(1)
    assert jaccard.mean() == pytest.approx(best.expected_jaccard.mean(), abs=4 * jaccard.std() / len(jaccard) ** 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_patients": 0}, "num_patients"),
        ({"num_diagnoses": 13}, "num_diagnoses must be at least 14"),
        ({"num_procedures": 5}, "num_procedures"),
        ({"num_medications": 8}, "num_medications"),
        ({"num_conditions": 1}, "num_conditions"),
        ({"zipf": -1.0}, "zipf"),
        ({"ddi_density": 1.5}, "ddi_density"),
    ],
)
def test_generator_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        make_synthetic_ehr(**options)


def test_bayes_optimal_refuses():
    with pytest.raises(ValueError, match="truth"):
        bayes_optimal(np.array([0.5, 0.5]))
    with pytest.raises(ValueError, match="truth"):
        bayes_optimal(np.array([[1.5, 0.5]]))
