from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ballast_bench.store as store_module
from ballast_bench.aggregate import aggregate
from ballast_bench.errors import UsageError
from ballast_bench.export import to_json
from ballast_bench.process import local, specification
from ballast_bench.runner import run_cells
from ballast_bench.store import Store
from ballast_bench.suites import select_cells


def figures(store):
    """What the table shows, without times and places."""
    cases = to_json(aggregate(store.latest()), [])["cases"]
    for method in (method for case in cases for method in case["methods"]):
        del method["cell_seconds"], method["peak_mib"]
    return cases


def start(toy_file, output, ready=None):
    words = ["run", "--suite", f"{toy_file}:slow", "--output", output, "--jobs", 2, "--no-report"]
    environment = {**os.environ, **({"TOY_READY": str(ready)} if ready else {})}
    return subprocess.Popen(
        [sys.executable, "-m", "ballast_bench", *map(str, words)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # a shell starts background jobs with SIGINT ignored, and so would be whatever the tests start
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def records_in(output):
    return len(list(Path(output, "records").glob("*.json")))


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_every_ending_of_a_cell_is_recorded(toys, measured):
    store = measured(*toys.troubled())
    ends = {record.run_info["method"]: record for record in store.latest()}
    statuses = {name: record.status for name, record in ends.items()}
    assert statuses == {
        "fit": "ok",
        "raise": "failed",
        "skip": "skipped",
        "die": "failed",
        "nan": "failed",
        "slow": "timeout",
    }
    errors = {name: record.train_info["error"] for name, record in ends.items()}
    assert "RuntimeError: the toy method fell over" in errors["raise"]
    assert errors["skip"] == "no toy data here"
    assert "killed by SIGABRT" in errors["die"]
    assert "metrics must be finite" in errors["nan"]
    assert "the budget is 3 s" in errors["slow"]


def test_only_missing_cells_are_measured(toys, measured):
    store = measured(toys.case(seeds=(0, 1)))
    summary = run_cells(store, select_cells(toys.toy()), jobs=2)
    assert (summary.kept, summary.measured) == (6, 3)
    summary = run_cells(store, select_cells(toys.toy()), jobs=2)
    assert (summary.kept, summary.measured) == (9, 0)
    summary = run_cells(store, select_cells([toys.case(seeds=(0,))]), jobs=2, rerun=True)
    assert summary.measured == 3
    assert (len(store.records()), len(store.latest())) == (12, 9)


def test_cells_of_other_commits_are_kept_with_a_warning(toys, measured):
    store = measured(toys.case(seeds=(0,)))
    path = store.latest()[0].path
    content = json.loads(path.read_text())
    content["meta_info"]["commit"] = "f" * 40
    path.write_text(json.dumps(content))
    summary = run_cells(store, select_cells([toys.case(seeds=(0,))]), jobs=1)
    assert summary.kept == 3
    assert "measured at other commits (ffffffffff)" in summary.warnings[0]


def test_every_cell_has_a_process_and_a_memory_of_its_own(toys):
    methods = {"big": {"do": "allocate", "mib": 300}, "small": {"do": "fit"}, "broken": {"do": "die"}}
    case = toys.case(methods=methods, baseline="small", seeds=(0, 1), preload=("json", "no_such_module"))
    outcomes = [outcome for _, outcome in local([specification(cell, None) for cell in case.cells()], 1)]
    assert [outcome["status"] for outcome in outcomes] == 2 * ["ok", "ok", "failed"]
    big, small, _, _, after, _ = outcomes
    assert big["peak_mib"] > 300
    assert after["peak_mib"] == pytest.approx(small["peak_mib"], abs=20)  # nothing of the cells before is in it
    pids = [outcome["info"]["pid"] for outcome in outcomes if outcome["status"] == "ok"]
    assert len(set(pids)) == 4
    assert os.getpid() not in pids
    assert {outcome["info"]["threads"] for outcome in outcomes if outcome["status"] == "ok"} == {"1"}


def test_closing_the_executor_ends_its_cells(toys, tmp_path):
    methods = {"wait": {"do": "sleep", "seconds": 60, "ready": str(tmp_path)}}
    case = toys.case(methods=methods, baseline="wait", seeds=(0, 1))
    quick = toys.case(seeds=(0,))
    specs = [specification(cell, None) for cell in (*case.cells()[:1], *quick.cells()[:1])]
    outcomes = local(specs, 2)
    assert next(outcomes)[0] == 1
    wait_until(lambda: any(tmp_path.iterdir()))
    (pid,) = (int(file.name) for file in tmp_path.iterdir())
    outcomes.close()
    wait_until(lambda: not alive(pid), 5)


def test_kill_9_loses_nothing_that_was_finished(toy_file, tmp_path, bench, monkeypatch):
    ready = tmp_path / "ready"
    ready.mkdir()
    monkeypatch.setenv("TOY_READY", str(ready))  # part of the settings, hence of the keys
    output, whole = tmp_path / "killed", tmp_path / "whole"
    process = start(toy_file, output, ready)
    wait_until(lambda: records_in(output) >= 3)
    process.kill()
    process.communicate()
    assert 3 <= records_in(output) < 8
    pids = [int(file.name) for file in ready.iterdir()]
    wait_until(lambda: not any(alive(pid) for pid in pids), 5)  # no orphan keeps a core busy
    assert bench("run", "--suite", f"{toy_file}:slow", "--output", output, "--jobs", 2, "--no-report") == 0
    assert records_in(output) == 8
    assert bench("run", "--suite", f"{toy_file}:slow", "--output", whole, "--jobs", 2, "--no-report") == 0
    assert figures(Store(output)) == figures(Store(whole))


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_cells_and_keeps_the_finished(toy_file, tmp_path, sent):
    ready = tmp_path / "ready"
    ready.mkdir()
    output = tmp_path / "store"
    process = start(toy_file, output, ready)
    wait_until(lambda: records_in(output) >= 1)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "error: interrupted; finished cells are kept in" in errors
    wait_until(lambda: not any(alive(int(file.name)) for file in ready.iterdir()), 5)
    assert 1 <= len(Store(output).latest()) < 8
    assert not list((output / "records").glob(".*"))


def test_a_full_disk_stops_the_run_and_keeps_the_finished(toy_file, tmp_path, monkeypatch, bench, capsys):
    write = store_module.write_atomic
    written = []

    def limited(path, text):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written.append(path)
        write(path, text)

    monkeypatch.setattr(store_module, "write_atomic", limited)
    assert bench("run", "--suite", f"{toy_file}:toy", "--output", tmp_path / "s", "--jobs", 2) == 1
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    assert len(Store(tmp_path / "s").latest()) == 2  # store.json and two records
    assert bench("run", "--suite", f"{toy_file}:toy", "--output", tmp_path / "s", "--jobs", 2) == 0
    assert len(Store(tmp_path / "s").latest()) == 9


def test_a_second_run_on_the_same_store_is_refused(toy_file, tmp_path, bench, capsys):
    process = start(toy_file, tmp_path / "s")
    try:
        wait_until(lambda: records_in(tmp_path / "s") >= 1)
        assert bench("run", "--suite", f"{toy_file}:slow", "--output", tmp_path / "s") == 2
        assert f"in use by another run (process {process.pid})" in capsys.readouterr().err
    finally:
        process.kill()
        process.communicate()


def test_jobs_and_executor_are_checked(toys, tmp_path):
    store = Store(tmp_path / "s", create=True)
    with pytest.raises(ValueError, match="jobs must be >= 1, got 0"):
        run_cells(store, [], jobs=0)
    with pytest.raises(UsageError, match=r"unknown executor 'rey'; known: local, ray; did you mean 'ray'\?"):
        run_cells(store, [], jobs=1, executor="rey")


def test_ray_gives_the_same_figures(toys, measured, tmp_path):
    pytest.importorskip("ray")
    store = Store(tmp_path / "ray", create=True)
    run_cells(store, select_cells(toys.toy()), jobs=2, executor="ray")
    assert figures(store) == figures(measured(toys.case()))


def test_without_ray_the_message_says_what_to_install(toys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"ballast-bench\[ray\]"):
        run_cells(Store(tmp_path / "s", create=True), select_cells(toys.toy()), jobs=1, executor="ray")
