from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

from ballast_bench.case import CellInput, SkipCell, resolve
from ballast_bench.suites import SUITES, load_suite
from ballast_bench.suites import recsys_losses as cases
from recsys_losses.data import DATASETS

ALL = [case for suite in SUITES for case in load_suite(suite)]
METHODS = {"BPR", "BCE", "Softmax (SL)", "SSM uniform", "SSM in-batch", "SSM in-batch+logQ", "BSL", "Adap-tau", "CPR"}


def settings_of():
    found = {
        json.dumps(settings, sort_keys=True): settings
        for case in ALL
        if case.run == "ballast_bench.suites.recsys_losses:train"
        for settings in case.methods.values()
    }
    return list(found.values())


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_a_case_is_complete(case):
    assert callable(resolve(case.run))
    names = {metric.name for metric in case.metrics}
    assert case.tradeoff is None or set(case.tradeoff) <= names
    for figure in case.published:
        assert figure.method in case.methods
        assert figure.metric in names


def test_every_published_figure_belongs_to_a_case():
    file = Path(cases.__file__).with_name("published.json")
    named = {name for row in json.loads(file.read_text())["figures"] for name in row["cases"]}
    assert named <= {case.name for case in ALL}


def test_settings_fit_the_package():
    from recsys_losses.training import LossConfig, fit

    accepted = set(inspect.signature(fit).parameters)
    for settings in settings_of():
        LossConfig(**settings["loss"])
        assert set(settings["fit"]) <= accepted


def test_the_suites_cover_what_they_promise():
    quick, cpu = load_suite("quick"), load_suite("cpu")
    assert set(quick[0].methods) == METHODS
    by_name = {case.name: case for case in cpu}
    for dataset in ("ml-100k", "lastfm"):
        for model in ("mf", "lightgcn"):
            case = by_name[f"{dataset}-{model}"]
            assert set(case.methods) == METHODS
            assert len(case.seeds) == 5
        assert {"BPR", "CPR", "SSM uniform", "SSM in-batch"} <= set(by_name[f"{dataset}-unbiased"].methods)
    noise = [case.sweep.x for case in cpu if case.sweep and case.sweep.group == "lastfm-noise"]
    assert sorted(noise) == [0, 10, 20, 30, 40]
    assert any(case.dataset == "gowalla" for case in cpu)
    files = {dataset.name for dataset in DATASETS} - {"synthetic"} | {"MUTAG"}
    assert not files & {case.dataset for case in quick}
    methods = {"adnce", "sgl", "gcm", "dsl", "raremed", "mcrl", "if_dfm"}
    methods |= {"pref_opt_pairs", "pref_opt_lists", "pref_opt_bandit"}
    graphs = {
        "graph_unlearn",
        "graph_ood_cal",
        "graph_ood_aia",
        "graph_ood_infoigl",
        "graph_ood_asrc",
        "graph_ood_motif",
    }
    for suite in (quick, cpu):
        runs = {case.run.partition(":")[0].rpartition(".")[2].removeprefix("recsys_") for case in suite}
        assert methods | graphs | {"losses", "ihvp"} <= runs


def minutes_of_two_jobs(cases):
    return sum(cell.case.expected for case in cases for cell in case.cells()) / 2 / 60


def test_expected_times_keep_the_budgets_of_two_jobs():
    assert minutes_of_two_jobs(load_suite("quick")) <= 2.5
    cpu = load_suite("cpu")
    for package in {case.package for case in cpu}:
        assert minutes_of_two_jobs(case for case in cpu if case.package == package) <= 70


@pytest.mark.parametrize("root", [None, Path("/nowhere")])
def test_absent_data_is_a_reason_to_skip(root):
    (case,) = (case for case in load_suite("cpu") if case.name == "lastfm-mf")
    given = CellInput(case.name, case.dataset, "BPR", dict(case.methods["BPR"]), 0, root)
    with pytest.raises(SkipCell, match="data set 'lastfm' is not here"):
        cases.train(given)


def test_an_absent_gpu_is_a_reason_to_skip(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    case = load_suite("gpu")[0]
    given = CellInput(case.name, case.dataset, "BPR", dict(case.methods["BPR"]), 0, None)
    with pytest.raises(SkipCell, match="no CUDA device"):
        cases.train(given)


@pytest.mark.parametrize("model", [{"name": "mf"}, {"name": "lightgcn", "num_layers": 1}], ids=lambda m: m["name"])
def test_a_cell_trains_and_tests(model):
    settings = {**load_suite("quick")[0].methods["SSM uniform"], "model": model}
    settings["fit"] = {**settings["fit"], "epochs": 3}
    out = cases.train(CellInput("c", "synthetic", "SSM uniform", settings, 0, None))
    assert {"recall@20", "ndcg@20", "arp@20", "tail_recall@20", "train_seconds"} <= set(out.metrics)
    assert [row["epoch"] for row in out.history] == [1, 2, 3]
    assert out.history[-1]["recall@20"] == out.metrics["recall@20"]
    again = cases.train(CellInput("c", "synthetic", "SSM uniform", settings, 0, None))
    same = {name: value for name, value in out.metrics.items() if name != "train_seconds"}
    assert same.items() <= again.metrics.items()
    assert out.info["data_sha256"] == again.info["data_sha256"]


def test_noise_adds_train_pairs_and_keeps_the_test(data_root):
    import torch

    (clean, noisy) = (
        cases._load(CellInput("c", "lastfm", "m", {"noise": noise}, 0, data_root)) for noise in (0.0, 0.4)
    )
    assert noisy.train.shape[1] == pytest.approx(1.4 * clean.train.shape[1], rel=0.01)
    assert torch.equal(noisy.test, clean.test)
