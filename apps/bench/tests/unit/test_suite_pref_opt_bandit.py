import pytest
import torch

from ballast_bench.case import CellInput, resolve
from ballast_bench.suites import pref_opt_bandit as cases

F64 = torch.float64


def play(method, seed=0, suite=cases.quick, **changes):
    case = suite()[0]
    settings = {**case.methods[method], **changes}
    return cases.play(CellInput(case.name, case.dataset, method, settings, seed, None))


@pytest.mark.parametrize("case", [case for suite in (cases.quick, cases.cpu) for case in suite()])
def test_a_case_is_complete(case):
    assert resolve(case.run) is cases.play
    rest = [{k: v for k, v in one.items() if k not in ("rule", "signed")} for one in case.methods.values()]
    assert all(one == rest[0] for one in rest)


def test_cells_repeat_and_have_the_metrics_of_their_case():
    out = play("Random")
    assert set(out.metrics) == {metric.name for metric in cases.quick()[0].metrics}
    assert out == play("Random")
    assert out != play("Random", seed=1)
    assert out.history[0] == {"epoch": 0.0, "error": 1.0}


def test_the_pair_of_the_largest_gap_needs_a_fraction_of_the_updates_of_random_pairs():
    gap, random = ([play(name, seed).metrics for seed in range(5)] for name in ("Largest gap of margins", "Random"))
    assert all(one["reached"] for one in (*gap, *random))
    updates = [sum(one["updates"] for one in runs) for runs in (gap, random)]
    assert updates[0] < updates[1] / 3  # the theorem promises less than half
    # A random pair of n answers leaves 1 - 1/n of the squared error on average: 1e-12 after 262 updates for n = 10.
    assert 150 * 5 < updates[1] < 300 * 5


def test_all_scores_but_implicit_take_the_widest_pair_of_a_uniform_policy():
    rewards = torch.tensor([[0.5, 0.4, 0.9], [0.1, 0.7, 0.3]], dtype=F64)
    for method, settings in cases._METHODS.items():
        if settings["rule"] not in ("random", "implicit"):
            chosen = cases._choose(settings, rewards, torch.zeros_like(rewards), torch.Generator())
            assert chosen == (1, 0, 1), method


def test_scores_differ_in_what_they_take_a_wrong_or_overdone_margin_for():
    rewards = torch.tensor([[0.0, 1.0], [0.0, 0.6], [0.0, 0.5]], dtype=F64)
    implied = torch.tensor([[0.0, -0.9], [0.0, 2.6], [0.0, 0.0]], dtype=F64)  # ranked wrongly; overdone; not learned

    def taken(method):
        return cases._choose(cases._METHODS[method], rewards, implied, torch.Generator())[0]

    assert taken("Explicit margin") == 0
    assert taken("Implicit margin") == 2
    assert taken("Alignment potential") == 2
    assert taken("Alignment potential, signed") == 0
    assert taken("Largest gap of margins") == 1


def test_an_update_descends_the_expected_loss():
    rewards, policy = torch.rand(2, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    before = policy.clone().requires_grad_()
    truth, margin = (rewards[2] - rewards[1]).sigmoid(), 0.1 * (before[2] - before[1])
    loss = torch.nn.functional.binary_cross_entropy_with_logits(margin, truth)
    (gradient,) = torch.autograd.grad(loss, before)
    cases._descend(policy, rewards, 2, 1, 0.1)
    torch.testing.assert_close(policy, before.detach() - 200 * gradient)
    same = policy.clone()
    cases._descend(policy, rewards, 3, 3, 0.1)
    assert torch.equal(policy, same)


def test_a_run_ends_with_its_budget():
    out = play("Explicit margin", budget=12)
    assert (out.metrics["updates"], out.metrics["reached"]) == (12, 0)
    assert out.metrics["error"] > 0.1
