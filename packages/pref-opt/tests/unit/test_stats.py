from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pref_opt.stats import MovingGapStats, update_gap_stats

F64 = torch.float64


@given(
    gaps=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20),
    mean=st.floats(-10, 10),
    std=st.floats(0, 10),
    momentum=st.floats(0, 0.999),
)
@settings(derandomize=True, deadline=None, max_examples=100)
def test_update_is_a_weighted_mean_of_old_and_new(gaps, mean, std, momentum):
    got = update_gap_stats(torch.tensor(gaps, dtype=F64), mean, std, momentum)
    want = (
        momentum * mean + (1 - momentum) * np.mean(gaps),
        momentum * std + (1 - momentum) * np.std(gaps, ddof=1),
    )
    np.testing.assert_allclose([x.item() for x in got], want, rtol=1e-9, atol=1e-9)


def test_one_gap_has_no_spread():
    mean, std = update_gap_stats(torch.tensor([4.0]), 2.0, 1.0, momentum=0.5)
    assert (mean.item(), std.item()) == (3.0, 0.5)


def test_results_carry_no_graph_and_are_float32_at_least():
    gap = torch.tensor([1.0, 3.0], dtype=torch.bfloat16, requires_grad=True)
    for value in update_gap_stats(gap, torch.tensor(0.0), torch.tensor(1.0)):
        assert value.shape == ()
        assert value.dtype == torch.float32
        assert not value.requires_grad
    assert update_gap_stats(gap.double(), 0.0, 1.0)[0].dtype == F64


def test_statistics_converge_to_those_of_the_gaps():
    generator = torch.Generator().manual_seed(0)
    stats = MovingGapStats(momentum=0.95)
    for _ in range(400):
        mean, std = stats.update(3 + 2 * torch.randn(64, generator=generator))
    assert mean.item() == pytest.approx(3.0, abs=0.2)
    assert std.item() == pytest.approx(2.0, abs=0.2)
    assert stats.num_updates == 400


def test_debiased_statistics_of_constant_batches_are_exact_from_the_start():
    gap = torch.tensor([1.0, 3.0], dtype=F64)
    plain, debiased = MovingGapStats(0.9), MovingGapStats(0.9, debias=True)
    for step in range(1, 5):
        mean, std = debiased.update(gap)
        assert mean.item() == pytest.approx(2.0)
        assert std.item() == pytest.approx(math.sqrt(2))
        assert plain.update(gap)[0].item() == pytest.approx(2.0 * (1 - 0.9**step))
    for fresh in (MovingGapStats(), MovingGapStats(debias=True)):
        assert [x.item() for x in fresh.current()] == [0.0, 0.0]


@pytest.mark.parametrize("debias", [False, True])
def test_resume_is_exact(debias):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(5, generator=generator) for _ in range(6)]
    whole, first = MovingGapStats(debias=debias), MovingGapStats(debias=debias)
    for gap in batches[:3]:
        whole.update(gap)
        first.update(gap)
    second = MovingGapStats(debias=debias)
    second.load_state_dict(first.state_dict())
    for gap in batches[3:]:
        assert whole.update(gap) == second.update(gap)
    assert second.state_dict() == whole.state_dict()
    assert whole.update(batches[0]) != first.update(batches[0])


def test_reading_changes_nothing():
    stats = MovingGapStats()
    stats.update(torch.tensor([1.0, 2.0]))
    assert stats.current() == stats.current()
    assert stats.num_updates == 1


BAD = [
    (lambda: update_gap_stats(torch.zeros(0), 0.0, 1.0), r"gap must be a non-empty vector, got shape \(0,\)"),
    (lambda: update_gap_stats(torch.zeros(2, 2), 0.0, 1.0), r"gap must be a non-empty vector, got shape \(2, 2\)"),
    (lambda: update_gap_stats(torch.zeros(2), 0.0, 1.0, momentum=1.0), r"momentum must be in \[0, 1\), got 1\.0"),
    (lambda: MovingGapStats(momentum=-0.1), r"momentum must be in \[0, 1\), got -0\.1"),
    (lambda: MovingGapStats(momentum=math.nan), r"momentum must be in \[0, 1\), got nan"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=range(len(BAD)))
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
