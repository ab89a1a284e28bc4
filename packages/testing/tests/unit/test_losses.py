from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ballast_testing.losses import check_loss


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    return loss if reduction == "none" else getattr(loss, reduction)()


def softmax_loss(pos: Tensor, neg: Tensor, *, temperature: float, reduction: str = "mean") -> Tensor:
    work = torch.promote_types(pos.dtype, torch.float32)
    difference = (neg.to(work) - pos.to(work).unsqueeze(1)) / temperature
    return _reduce(torch.logsumexp(difference, dim=1), reduction).to(pos.dtype)


def reference(pos: Any, neg: Any, *, temperature: float, reduction: str = "mean") -> Any:
    rows = np.array([np.log(sum(np.exp((n - p) / temperature) for n in row)) for p, row in zip(pos, neg, strict=True)])
    return rows if reduction == "none" else rows.sum() if reduction == "sum" else rows.mean()


class SoftmaxLoss(nn.Module):
    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, pos: Tensor, neg: Tensor) -> Tensor:
        return softmax_loss(pos, neg, temperature=self.temperature)


class WrongModule(SoftmaxLoss):
    def forward(self, pos: Tensor, neg: Tensor) -> Tensor:
        return softmax_loss(pos, neg, temperature=2 * self.temperature)


class ForgetsItsState(nn.Module):
    """Equal to the function until it is loaded from a state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.scale.fill_(3.0)

    def forward(self, pos: Tensor, neg: Tensor) -> Tensor:
        return self.scale * softmax_loss(pos, neg, temperature=0.5)


@pytest.fixture
def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, generator=generator), torch.randn(5, 4, generator=generator)]


def battery(fn: Any, inputs: list[Any], **options: Any) -> None:
    check_loss(fn, inputs, {"temperature": 0.5}, options.pop("reference", reference), **options)


def test_a_right_loss_passes(inputs: list[Tensor]) -> None:
    battery(softmax_loss, inputs, module=SoftmaxLoss(0.5))


def test_wrong_value(inputs: list[Tensor]) -> None:
    def wrong(pos: Tensor, neg: Tensor, *, temperature: float, reduction: str = "mean") -> Tensor:
        return 1.000001 * softmax_loss(pos, neg, temperature=temperature, reduction=reduction)

    with pytest.raises(AssertionError, match="value"):
        battery(wrong, inputs)


def test_wrong_value_in_one_reduction_only(inputs: list[Tensor]) -> None:
    def wrong(pos: Tensor, neg: Tensor, *, temperature: float, reduction: str = "mean") -> Tensor:
        loss = softmax_loss(pos, neg, temperature=temperature, reduction=reduction)
        return loss / 5 if reduction == "sum" else loss

    with pytest.raises(AssertionError, match="'sum'"):
        battery(wrong, inputs)


def test_wrong_gradient(inputs: list[Tensor]) -> None:
    def wrong(pos: Tensor, neg: Tensor, *, temperature: float, reduction: str = "mean") -> Tensor:
        return softmax_loss(2 * pos - pos.detach(), neg, temperature=temperature, reduction=reduction)

    with pytest.raises(AssertionError, match="gradient"):
        battery(wrong, inputs)


def test_given_gradient_and_detached_input(inputs: list[Tensor]) -> None:
    def half_detached(pos: Tensor, neg: Tensor, *, temperature: float, reduction: str = "mean") -> Tensor:
        return softmax_loss(pos, neg.detach(), temperature=temperature, reduction=reduction)

    battery(half_detached, inputs, detached=(1,))
    with pytest.raises(AssertionError, match="input 1 must get no gradient"):
        battery(softmax_loss, inputs, detached=(1,))

    def expected(pos: Any, neg: Any, *, temperature: float) -> list[Any]:
        return [np.full(len(pos), -1 / (temperature * len(pos))), None]

    battery(half_detached, inputs, gradient=expected)
    with pytest.raises(AssertionError, match="gradient of input 0"):
        battery(softmax_loss, inputs, gradient=lambda pos, neg, **_: [np.zeros(len(pos)), None])


def test_overflow(inputs: list[Tensor]) -> None:
    def overflows(pos: Tensor, neg: Tensor, *, temperature: float, reduction: str = "mean") -> Tensor:
        difference = (neg - pos.unsqueeze(1)) / temperature
        return _reduce(torch.log(torch.exp(difference).sum(1)), reduction)

    with pytest.raises(AssertionError, match="not finite"):
        battery(overflows, inputs, dtypes={})


def test_input_mutation(inputs: list[Tensor]) -> None:
    def clips(pos: Tensor, neg: Tensor, *, temperature: float, reduction: str = "mean") -> Tensor:
        loss = softmax_loss(pos, neg, temperature=temperature, reduction=reduction)
        neg.detach().clamp_(max=0.1)
        return loss

    with pytest.raises(AssertionError, match="inputs unchanged: input 1 was modified"):
        battery(clips, inputs)


def test_mutation_of_an_integer_input() -> None:
    def sorts(x: Tensor, index: Tensor, *, reduction: str = "mean") -> Tensor:
        loss = x * index
        index.zero_()
        return _reduce(loss, reduction)

    with pytest.raises(AssertionError, match="inputs unchanged: input 1 was modified"):
        check_loss(sorts, [torch.randn(3), torch.tensor([3, 1, 2])], {}, lambda x, index, **_: x * index)


def test_dtype_is_kept(inputs: list[Tensor]) -> None:
    def promotes(pos: Tensor, neg: Tensor, *, temperature: float, reduction: str = "mean") -> Tensor:
        return softmax_loss(pos.double(), neg.double(), temperature=temperature, reduction=reduction)

    with pytest.raises(AssertionError, match=r"float32.*dtype torch.float64"):
        battery(promotes, inputs)


def test_half_precision_must_reduce_in_float32() -> None:
    def naive(x: Tensor, *, reduction: str = "mean") -> Tensor:
        return _reduce(x - x.mean(), reduction) + 300 - 300

    def exact(x: Any, *, reduction: str = "mean") -> Any:
        rows = x - x.mean()
        return rows if reduction == "none" else getattr(rows, reduction)()

    with pytest.raises(AssertionError, match="bfloat16"):
        check_loss(naive, [torch.linspace(-1, 1, 7)], {}, exact, extreme=None)


def test_module_must_equal_the_function(inputs: list[Tensor]) -> None:
    with pytest.raises(AssertionError, match="Module:"):
        battery(softmax_loss, inputs, module=WrongModule(0.5))
    with pytest.raises(AssertionError, match="state_dict"):
        battery(softmax_loss, inputs, module=ForgetsItsState())


def test_row_order(inputs: list[Tensor]) -> None:
    def first_row(pos: Tensor, neg: Tensor, *, temperature: float, reduction: str = "mean") -> Tensor:
        scale = torch.ones_like(pos)
        scale[0] = 2
        return _reduce(scale * softmax_loss(pos, neg, temperature=temperature, reduction="none"), reduction)

    def expected(pos: Any, neg: Any, *, temperature: float, reduction: str = "mean") -> Any:
        rows = reference(pos, neg, temperature=temperature, reduction="none") * np.array([2, 1, 1, 1, 1])
        return rows if reduction == "none" else getattr(rows, reduction)()

    battery(first_row, inputs, reference=expected, permutation=False)
    with pytest.raises(AssertionError, match="row permutation"):
        battery(first_row, inputs, reference=expected)


def test_reductions_must_be_scalars(inputs: list[Tensor]) -> None:
    def keeps_a_dimension(pos: Tensor, neg: Tensor, *, temperature: float, reduction: str = "mean") -> Tensor:
        loss = softmax_loss(pos, neg, temperature=temperature, reduction=reduction)
        return loss if reduction == "none" else loss.reshape(1)

    with pytest.raises(AssertionError, match="shape"):
        battery(keeps_a_dimension, inputs)


def test_mean_that_is_not_the_mean_of_the_rows() -> None:
    def weighted(x: Tensor, *, reduction: str = "mean") -> Tensor:
        return x.sum() / 2 if reduction == "mean" else _reduce(x, reduction)

    def same(x: Any, *, reduction: str = "mean") -> Any:
        return x if reduction == "none" else x.sum() if reduction == "sum" else x.sum() / 2

    with pytest.raises(AssertionError, match="'mean' against 'none'"):
        check_loss(weighted, [torch.randn(5)], {}, same)


def test_must_return_one_tensor(inputs: list[Tensor]) -> None:
    with pytest.raises(AssertionError, match="must return one tensor, got tuple"):
        battery(lambda *a, **k: (softmax_loss(*a, **k), 1), inputs)


def test_nan_is_not_equal_to_nan() -> None:
    def nan(x: Tensor) -> Tensor:
        return x.sum() * float("nan")

    with pytest.raises(AssertionError, match="value"):
        check_loss(nan, [torch.randn(3)], {}, lambda x: np.float64("nan"), reductions=())


@pytest.mark.parametrize(
    ("inputs", "options", "match"),
    [([1.0], {}, "tensor"), ([torch.ones(2)], {"reductions": ("median",)}, "median")],
)
def test_bad_arguments(inputs: list[Any], options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        check_loss(lambda x: x, inputs, {}, lambda x: x, **options)
