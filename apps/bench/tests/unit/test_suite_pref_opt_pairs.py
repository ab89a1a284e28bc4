from pathlib import Path

import pytest
import torch

from ballast_bench.case import CellInput, SkipCell, resolve
from ballast_bench.suites import pref_opt_pairs as cases
from pref_opt.losses import make_loss

SIZES = {"sft_steps": 2, "pairs": 64, "data": 16}


def cell(name="DPO", root=None, **settings):
    (case,) = cases.quick()
    return CellInput(case.name, case.dataset, name, {**case.methods[name], **SIZES, **settings}, 0, root)


@pytest.mark.parametrize("case", [case for suite in ("quick", "cpu", "gpu") for case in getattr(cases, suite)()])
def test_a_case_is_complete(case):
    assert callable(resolve(case.run))
    for settings in case.methods.values():
        if settings["method"] not in ("none", "sft"):
            assert settings["lr"] > 0
            assert not make_loss(settings["method"], **settings.get("options", {})).multi_negative


def test_expected_times_keep_the_budgets():
    def seconds(suite):
        return sum(one.case.expected for case in suite for one in case.cells())

    assert seconds(cases.quick()) <= 20
    assert seconds(cases.cpu()) <= 90 * 60


def test_methods_of_a_case_differ_in_the_method_alone():
    for case in cases.cpu():
        own = {"method", "options", "lr", "metric"}
        rest = [{key: value for key, value in settings.items() if key not in own} for settings in case.methods.values()]
        assert all(settings == rest[0] for settings in rest)


def test_losses_that_know_the_flip_rate_are_told_it():
    for case, rate in zip(cases.cpu(), (0.1, 0.2, 0.4), strict=False):
        for name in ("cDPO", "Robust DPO"):
            assert case.methods[name]["options"]["label_smoothing"] == rate


def test_a_cell_trains_tests_and_repeats():
    given = cell("gamma-SimPO")
    out, again = cases.generated(given), cases.generated(given)
    assert set(out.metrics) == {metric.name for metric in cases.quick()[0].metrics}
    assert {**out.metrics, "train_seconds": 0} == {**again.metrics, "train_seconds": 0}
    start = cases.generated(cell("gamma-SimPO", method="none"))
    assert start.metrics["likelihood"] == out.info["sft_likelihood"]  # all methods of a seed start at the same model


def test_weights_are_gradients_and_margins_those_of_the_loss():
    """A flipped pair lies far on the wrong side: DPO pulls hardest at it, Dr. DPO hardly."""
    sums = torch.tensor([[-1.0, -9.0], [-1.0, -8.0], [-9.0, -1.0], [-1.0, -9.0]], dtype=torch.float64)
    policy, reference = (sums, torch.full((4, 2), 2)), (torch.zeros_like(sums), torch.full((4, 2), 2))
    flipped = [False, False, True, False]

    def influence(name, **options):
        return cases._influence(make_loss(name, **options), policy, reference, flipped, 4)

    dpo, robust = influence("dpo", beta=1.0), influence("dr_dpo", beta=1.0)
    gaps = torch.tensor([8.0, 7.0, -8.0, 8.0], dtype=torch.float64)
    slopes = torch.sigmoid(-gaps)
    assert dpo["flipped_weight"] == pytest.approx(float(slopes[2] / slopes[[0, 1, 3]].mean()))
    weighted = slopes * torch.sigmoid(gaps)
    assert robust["flipped_weight"] == pytest.approx(float(weighted[2] / weighted[[0, 1, 3]].mean()))
    assert dpo["flipped_margin"] == 1
    own = torch.sigmoid(gaps)  # exp(-loss)
    assert robust["flipped_margin"] == pytest.approx(float(own[2] / own[[0, 1, 3]].mean()))
    kept = influence("beta_dpo", filter_ratio=0.5)["flipped_margin"]
    assert kept in (0.0, 3.0)  # two of four pairs are kept: none or all of the flipped one
    assert influence("gamma_po", tau=1.0)["flipped_margin"] < 1
    assert influence("alpha_dpo")["flipped_margin"] < 1


def test_accuracy_is_by_the_rewards_of_the_loss():
    sums, none = torch.tensor([[-2.0, -1.0], [-3.0, -4.0]]), torch.zeros(2, 2)
    lengths = torch.tensor([[4, 1], [1, 1]])
    policy, reference = (sums, lengths), (none - 5, lengths)
    assert cases._accuracy(make_loss("dpo"), policy, reference) == 0.5
    assert cases._accuracy(make_loss("simpo"), policy, reference) == 1
    assert cases._accuracy(None, policy, reference) == 0.5


def test_a_number_counts_as_written_only_if_all_of_it_is():
    tokenizer, model = cases._start({"hidden": 32, "layers": 1}, 0)
    rows = cases._generate(8, 8, 0)[1]
    assert cases._written(model, tokenizer, rows) == 0
    prompts = tokenizer(rows["prompt"][:], padding=True, padding_side="left", return_tensors="pt")
    output = model.generate(**prompts, do_sample=False, max_new_tokens=10)
    texts = tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    rows = rows.remove_columns("chosen").add_column("chosen", [*texts[:4], *("?" for _ in range(4))])
    assert cases._written(model, tokenizer, rows) == 0.5


@pytest.mark.parametrize("root", [None, Path("/nowhere")])
def test_absent_data_is_a_reason_to_skip(root):
    for run in (cases.flips, cases.selection):
        with pytest.raises(SkipCell, match="data set 'gsm8k' is not here"):
            run(cell(root=root))


def test_an_absent_gpu_is_a_reason_to_skip(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SkipCell, match="needs CUDA"):
        cases.generated(cell(device="cuda"))


def test_real_pairs(data_root):
    settings = {"pairs": 4800}
    train, test = cases._read(data_root, settings, 0)
    assert (len(train), len(test)) == (4800, 1319)
    assert len(cases._read(data_root, {**settings, "held_out": True}, 0)[1]) == 1200
    assert train[0] == {"prompt": "72 clips altoget\n#### ", "chosen": "72", "rejected": "27"}
    assert all(len(row["prompt"]) <= 16 + len(cases._ANSWER) for row in (*train, *test))  # the note says so
    readable = sum(row["chosen"] in row["prompt"] for row in test) / len(test)
    assert readable == pytest.approx(0.96, abs=0.02)


@pytest.mark.parametrize("metric", ["alignment_potential", "all"])
def test_a_selection_trains_on_its_share_of_the_models_own_pairs(data_root, metric):
    case = cases.cpu()[-1]
    small = {"pairs": 64, "hidden": 32, "layers": 1, "batch_size": 8, "sft_steps": 2, "reward_steps": 3}
    settings = {**case.methods["Random"], **small, "metric": metric}
    out = cases.selection(CellInput(case.name, case.dataset, "x", settings, 0, data_root))
    assert set(out.metrics) == {metric.name for metric in case.metrics}
    share = 1 if metric == "all" else 0.4
    assert out.info["chosen"] == int(share * out.info["pairs"])
