"""Applying an update."""

from __future__ import annotations

import pytest
import torch

from ihvp import apply_delta


def test_out_of_place_in_the_dtype_of_the_parameters():
    params = {"a": torch.ones(2, dtype=torch.bfloat16, requires_grad=True), "b": [torch.zeros(3)]}
    new = apply_delta(params, {"b": [torch.ones(3)], "a": torch.tensor([0.5, 1.0])})
    assert new["a"].dtype == torch.bfloat16
    assert new["a"].tolist() == [1.5, 2.0]
    assert new["b"][0].tolist() == [1.0, 1.0, 1.0]
    assert not new["a"].requires_grad
    assert params["a"].tolist() == [1.0, 1.0]


def test_the_limit_holds_over_all_tensors_and_only_when_exceeded():
    params, delta = [torch.zeros(1), torch.zeros(1)], [torch.tensor([3.0]), torch.tensor([4.0])]
    assert [p.item() for p in apply_delta(params, delta, max_norm=10.0)] == [3.0, 4.0]
    clipped = torch.cat(apply_delta(params, delta, max_norm=2.0))
    torch.testing.assert_close(clipped, torch.tensor([1.2, 1.6]))


@pytest.mark.parametrize(
    ("delta", "max_norm", "match"),
    [
        (torch.ones(3), None, "structure"),
        (torch.tensor([1.0, float("nan")]), None, "finite"),
        (torch.ones(2), 0.0, "max_norm"),
        (torch.ones(2), float("inf"), "max_norm"),
    ],
)
def test_bad_arguments_are_refused(delta, max_norm, match):
    with pytest.raises(ValueError, match=match):
        apply_delta(torch.zeros(2), delta, max_norm=max_norm)
