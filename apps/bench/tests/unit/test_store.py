from __future__ import annotations

import dataclasses
import errno
import json
import os

import pytest

from ballast_bench.errors import StoreError
from ballast_bench.runner import run_cells
from ballast_bench.store import SCHEMA, Store, write_atomic
from ballast_bench.suites import select_cells


def edit(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


def test_records_survive_a_round_trip(toys, measured):
    store = measured(toys.case())
    records = store.latest()
    assert len(records) == 9
    assert {record.status for record in records} == {"ok"}
    first = records[0]
    assert json.loads(first.path.read_text()) == json.loads(first.to_json())
    assert first.run_info["settings"] == {"level": 0.2}
    assert first.train_info["history"][0]["epoch"] == 1
    assert first.train_info["peak_mib"] > 1
    assert first.meta_info["packages"]["ballast-bench"]
    assert first.meta_info["device"] == "cpu"
    assert first.meta_info["data_sha256"] == "0" * 64


def test_a_truncated_record_is_reported_and_measured_again(toys, measured):
    store = measured(toys.case())
    victim = store.latest()[4].path
    victim.write_text(victim.read_text()[:200])
    assert len(store.records()) == 8
    assert [path for path, _ in store.unreadable] == [victim]
    summary = run_cells(store, select_cells(toys.toy()), jobs=2)
    assert (summary.kept, summary.measured) == (8, 1)
    assert "unreadable record" in summary.warnings[0]
    assert victim.name in summary.warnings[0]
    assert len(store.latest()) == 9
    assert store.unreadable == []
    assert (store.path / "unreadable" / victim.name).exists()


@pytest.mark.parametrize("damage", ["", "[]", '{"schema": 1}', "\x00\x01", "null"])
def test_any_damage_is_unreadable_not_a_crash(toys, measured, damage):
    store = measured(toys.case(seeds=(0,)))
    store.latest()[0].path.write_text(damage)
    assert len(store.latest()) == 2
    assert len(store.unreadable) == 1


def test_a_record_whose_content_was_changed_is_unreadable(toys, measured):
    store = measured(toys.case(seeds=(0,)))
    path = store.latest()[0].path
    content = json.loads(path.read_text())
    content["run_info"]["seed"] = 5
    path.write_text(json.dumps(content))
    store.records()
    assert "does not belong to the content" in store.unreadable[0][1]


@pytest.mark.parametrize(("schema", "word"), [(0, "older"), (99, "another"), ("1", "another")])
def test_a_record_of_another_schema_stops_with_its_name(toys, measured, schema, word):
    store = measured(toys.case(seeds=(0,)))
    path = store.latest()[0].path
    edit(path, schema=schema)
    with pytest.raises(StoreError, match=rf"{path.name}.*{word} schema version.*reads version {SCHEMA}"):
        store.records()


def test_a_store_of_another_schema_stops_at_once(tmp_path):
    Store(tmp_path / "s", create=True)
    (tmp_path / "s" / "store.json").write_text('{"schema": 0}')
    with pytest.raises(StoreError, match=r"store\.json has an older schema version \(0\)"):
        Store(tmp_path / "s")


def test_only_a_store_or_an_empty_folder_is_accepted(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="is not empty and not a results store"):
        Store(tmp_path, create=True)
    with pytest.raises(StoreError, match="it has no folder 'records'"):
        Store(tmp_path / "absent")
    with pytest.raises(StoreError, match="is a file"):
        Store(tmp_path / "notes.txt", create=True)


def test_the_newest_settings_count(toys, measured):
    measured(toys.case(seeds=(0,)))
    changed = {**toys.case().methods, "SSM": {"level": 0.3}}
    store = measured(toys.case(seeds=(0,), methods=changed))
    assert len(store.records()) == 4
    latest = {record.run_info["method"]: record for record in store.latest()}
    assert latest["SSM"].run_info["settings"] == {"level": 0.3}


def test_a_failure_does_not_hide_a_success_of_the_same_cell(toys, measured):
    store = measured(toys.case(seeds=(0,)))
    good = store.latest()[0]
    failed = {**good.train_info, "status": "failed"}
    later = {**good.run_info, "finished": "2999-01-01T00:00:00"}
    store.append(dataclasses.replace(good, train_info=failed, run_info=later))
    assert {record.status for record in store.latest()} == {"ok"}


def test_a_second_writer_is_refused(tmp_path):
    store = Store(tmp_path / "s", create=True)
    refused = pytest.raises(StoreError, match=rf"in use by another run \(process {os.getpid()}\)")
    with store.lock(), refused, Store(tmp_path / "s").lock():
        pass
    with store.lock():  # free again
        pass


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "a.json"
    write_atomic(target, "old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(target, "new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
