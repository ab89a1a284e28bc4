from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch

from ballast_testing._golden_values import compare, kind_of, takes_only_tensor, to_argument, wanted


def parameter(annotation: Any) -> inspect.Parameter:
    return inspect.Parameter("x", inspect.Parameter.KEYWORD_ONLY, annotation=annotation)


@pytest.mark.parametrize(
    ("annotation", "want"),
    [
        ("Tensor", "tensor"),
        (torch.LongTensor, "tensor"),
        ("Tensor | float", "tensor"),
        ("torch.LongTensor | None", "tensor"),
        ("Tensor | Sequence[float]", "tensor"),
        ("Tensor | Sequence[Tensor]", "tensor"),
        ("list[Tensor]", "tensors"),
        ("Sequence[torch.Tensor]", "tensors"),
        ("list[list[int]]", "python"),
        ("Sequence[float | None]", "python"),
        ("NDArray[np.float64]", "array"),
        ("ArrayLike", "array"),
        ("float", "auto"),
        (inspect.Parameter.empty, "auto"),
    ],
)
def test_what_a_signature_asks_for(annotation: Any, want: str) -> None:
    assert wanted(parameter(annotation)) == want


def test_numbers_become_tensors_only_if_nothing_else_is_accepted() -> None:
    assert takes_only_tensor(parameter("Tensor"))
    assert takes_only_tensor(parameter("Tensor | None"))
    assert not takes_only_tensor(parameter("Tensor | float"))
    assert not takes_only_tensor(parameter("Tensor | Sequence[float]"))
    assert not takes_only_tensor(None)


def test_arguments() -> None:
    assert to_argument("x", [0.1, 0.2]).dtype == torch.float64
    assert to_argument("x", [0.1], dtype="float32").dtype == torch.float32
    assert to_argument("x", [[1, 2]]).dtype == torch.int64
    assert to_argument("x", [True, False]).dtype == torch.bool
    assert to_argument("x", 3) == 3
    assert to_argument("x", None) is None
    assert to_argument("x", ["a", "b"]) == ["a", "b"]
    assert to_argument("x", [1.0, None]) == [1.0, None]
    assert to_argument("x", [[1], [2, 3]]) == [[1], [2, 3]]
    assert [t.shape for t in to_argument("x", [[1.0], [2.0, 3.0]])] == [(1,), (2,)]
    assert [t.shape for t in to_argument("x", [[[1], [2]], [[1, 2], [3, 4]]])] == [(2, 1), (2, 2)]
    assert to_argument("edge_index", []).dtype == torch.int64
    assert to_argument("x", []).dtype == torch.float64
    assert isinstance(to_argument("x", [1.0], "array"), np.ndarray)
    assert to_argument("x", [1.0], "python") == [1.0]
    assert set(to_argument("x", {"a": [1.0], "b": {"c": [1]}})["b"]) == {"c"}
    learned = to_argument("x", [1, 2], learned=True)
    assert learned.requires_grad
    assert learned.dtype == torch.float64


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ([1, 2.0], "float"),
        ([1], "int"),
        ([[True]], "bool"),
        (["a"], "str"),
        ([], None),
        ([1, None], None),
        ([1, True], None),
    ],
)
def test_kinds(value: Any, kind: str | None) -> None:
    assert kind_of(value) == kind


EQUAL = [
    (1.0, 1),
    (torch.tensor(1.0), 1.0),
    (np.float32(1.0), 1.0),
    (torch.tensor([1, 2]), [1, 2]),
    ((1, 2), [1, 2]),
    ([torch.tensor(1.0), torch.tensor(2.0)], [1.0, 2.0]),
    (torch.zeros(0, 2), []),
    (torch.zeros(2, 0), [[], []]),
    ([torch.tensor([1.0]), torch.tensor([1.0, 2.0])], [[1.0], [1.0, 2.0]]),
    ((("a", None),), [["a", None]]),
    (torch.tensor(True), True),
    ({"a": torch.tensor([1.0])}, {"a": [1.0]}),
    (torch.tensor([True, False]), [1.0, 0.0]),
    (torch.eye(2).to_sparse(), [[1.0, 0.0], [0.0, 1.0]]),
    (torch.ones(2, dtype=torch.bfloat16), [1.0, 1.0]),
    (float("inf"), float("inf")),
]
DIFFERENT = [
    (float("nan"), 1.0),
    (float("nan"), float("nan")),
    (float("inf"), 1.0),
    (1.0, float("inf")),
    (float("-inf"), float("inf")),
    (torch.tensor([1.0, float("nan")]), [1.0, float("nan")]),
    (torch.tensor([1.0, float("inf")]), [1.0, 2.0]),
    (torch.tensor([1.0]), 1.0),
    (1.0, [1.0]),
    (1, True),
    (True, 1),
    (None, 0.0),
    (0.0, None),
    ("1", 1),
    (torch.tensor([1.0]), [True]),
    (10**15, 10**15 + 1),
    (torch.tensor([10**15]), [10**15 + 1]),
    ([1.0], [1.0, 2.0]),
    (torch.ones(2, 1), [1.0, 1.0]),
    ([[1.0], [2.0]], [[1.0], [2.0, 3.0]]),
    ({"a": 1, "b": 2}, {"a": 1}),
    ({}, {"a": 1}),
    ("ab", ["a", "b"]),
]


@pytest.mark.parametrize(("actual", "expected"), EQUAL, ids=range(len(EQUAL)))
def test_equal(actual: Any, expected: Any) -> None:
    assert compare(actual, expected, 1e-6, 1e-8) is None


@pytest.mark.parametrize(("actual", "expected"), DIFFERENT, ids=range(len(DIFFERENT)))
def test_different(actual: Any, expected: Any) -> None:
    assert compare(actual, expected, 1e-6, 1e-8)


def test_tolerance_is_absolute_plus_relative() -> None:
    assert compare(100.9, 100.0, 0.01, 0.0) is None
    assert compare(101.1, 100.0, 0.01, 0.0)
    assert compare(101.1, 100.0, 0.01, 0.2) is None
    assert compare([0.0, 0.1], [0.0, 0.0], 1.0, 0.05)
    assert compare([0.0, 0.04], [0.0, 0.0], 0.0, 0.05) is None
