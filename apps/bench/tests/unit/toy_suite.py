"""Cases that take no time: what the runner, store and report tests run."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

from ballast_bench.case import Case, CellInput, CellOutput, Metric, Published, SkipCell, Sweep

METRICS = (
    Metric("recall@20"),
    Metric("arp@20", better="lower", digits=1),
    Metric("train_seconds", better="lower", tested=False, tolerance=0.5),
)


def train(cell: CellInput) -> CellOutput:
    behaviour = cell.settings.get("do", "fit")
    if behaviour == "raise":
        raise RuntimeError("the toy method fell over")
    if behaviour == "skip":
        raise SkipCell("no toy data here")
    if behaviour == "die":
        os.abort()
    if behaviour == "nan":
        return CellOutput({"recall@20": float("nan"), "arp@20": 1.0, "train_seconds": 0.1})
    if behaviour == "sleep":
        if "ready" in cell.settings:
            (Path(cell.settings["ready"]) / f"{os.getpid()}").touch()
        time.sleep(cell.settings["seconds"])
    if behaviour == "allocate":
        bytearray(cell.settings["mib"] << 20)
    level = cell.settings.get("level", 0.2)
    wobble = (cell.seed * 7919 % 13) / 1000
    quality = level + wobble + cell.settings.get("slope", 0.0) * wobble
    history = tuple(
        {"epoch": e, "seconds": 0.5 * e, "recall@20": quality * e / 4, "loss": 1.0 / e} for e in range(1, 5)
    )
    info = {"device": "cpu", "data_sha256": "0" * 64, "pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"]}
    metrics = {"recall@20": quality, "arp@20": 100 * level, "train_seconds": 2.0}
    return CellOutput(metrics, history, info)


def case(name: str = "toy", **changes: object) -> Case:
    base = Case(
        package="toys",
        name=name,
        title="Toys compared",
        dataset="toy-data",
        run=f"{__file__}:train",
        methods={"BPR": {"level": 0.2}, "SSM": {"level": 0.25, "slope": 0.5}, "CPR": {"level": 0.22, "slope": -0.4}},
        baseline="BPR",
        seeds=(0, 1, 2),
        metrics=METRICS,
        budget=60.0,
        expected=0.5,
        published=(Published("SSM", "recall@20", 0.251, "Toy paper, Table 2", "another split"),),
        tradeoff=("arp@20", "recall@20"),
        note="Toy protocol.",
    )
    return dataclasses.replace(base, **changes)


def toy() -> tuple[Case, ...]:
    return (case(),)


def wide() -> tuple[Case, ...]:
    """A comparison and a sweep of three levels."""
    levels = [
        case(f"noise-{x}", title="Noise", sweep=Sweep("noise", "false positives, %", x), seeds=(0, 1), tradeoff=None)
        for x in (0, 20, 40)
    ]
    return (case(), *levels)


def troubled() -> tuple[Case, ...]:
    methods = {name: {"do": name} for name in ("fit", "raise", "skip", "die", "nan")}
    methods["slow"] = {"do": "sleep", "seconds": 60}
    return (case("troubled", methods=methods, baseline="fit", seeds=(0,), budget=3.0),)


def slow() -> tuple[Case, ...]:
    """Eight cells of 0.3 s each: long enough to be interrupted; TOY_READY names a folder where they announce themselves."""
    settings = {"do": "sleep", "seconds": 0.3}
    if "TOY_READY" in os.environ:
        settings["ready"] = os.environ["TOY_READY"]
    methods = {"BPR": {"level": 0.2, **settings}, "SSM": {"level": 0.25, **settings}}
    return (case("slow", methods=methods, seeds=(0, 1, 2, 3)),)
