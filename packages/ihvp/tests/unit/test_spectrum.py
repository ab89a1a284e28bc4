"""Extreme eigenvalues against dense ones."""

from __future__ import annotations

import pytest
import torch

from ihvp import extreme_eigenvalues, largest_eigenvalue


def with_spectrum(values, seed=0):
    values = torch.as_tensor(values, dtype=torch.float64)
    q, _ = torch.linalg.qr(
        torch.randn(len(values), len(values), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    )
    matrix = q @ torch.diag(values) @ q.T
    return 0.5 * (matrix + matrix.T)


def test_the_whole_krylov_space_gives_exact_ends():
    A = with_spectrum([-3.0, -0.1, 0.0, 1.0, 4.0, 40.0])
    low, high = extreme_eigenvalues(A, torch.zeros(6, dtype=torch.float64))
    assert low == pytest.approx(-3.0, abs=1e-9)
    assert high == pytest.approx(40.0, abs=1e-9)


def test_estimates_lie_inside_the_spectrum_and_close_to_its_ends():
    spectrum = torch.cat([torch.tensor([-2.0]), torch.linspace(0, 1, 198), torch.tensor([9.0])])
    A = with_spectrum(spectrum)
    low, high = extreme_eigenvalues(A, torch.zeros(200, dtype=torch.float64), num_steps=25)
    assert -2.0 - 1e-9 <= low < -1.99
    assert 8.999 < high <= 9.0 + 1e-9


def test_reorthogonalisation_keeps_float32_within_the_spectrum():
    # Plain Lanczos loses orthogonality here, and finds copies of the largest eigenvalue.
    spectrum = torch.cat([torch.logspace(-4, 0, 150), torch.tensor([1e3])])
    A = with_spectrum(spectrum).float()
    low, high = extreme_eigenvalues(A, torch.zeros(151), num_steps=151)
    assert high == pytest.approx(1e3, rel=1e-5)
    assert low > -1e-2


def test_an_invariant_space_ends_early():
    products = 0

    def A(v):
        nonlocal products
        products += 1
        return 2 * v

    assert extreme_eigenvalues(A, torch.zeros(50)) == pytest.approx((2.0, 2.0))
    assert products == 1


def test_pytrees_and_generators():
    like = {"a": torch.zeros(2, 2), "b": torch.zeros(1)}

    def A(v):
        return {"a": 3 * v["a"], "b": -v["b"]}

    one = extreme_eigenvalues(A, like, generator=torch.Generator().manual_seed(5))
    assert one == pytest.approx((-1.0, 3.0), abs=1e-5)
    assert one == extreme_eigenvalues(A, like, generator=torch.Generator().manual_seed(5))


def test_power_iteration_finds_the_largest_size_from_below():
    A = with_spectrum([-8.0, 1.0, 2.0, 5.0])
    found = largest_eigenvalue(A, torch.zeros(4, dtype=torch.float64), rtol=1e-6, max_iter=200)
    assert 7.99 < found <= 8.0 + 1e-9
    assert largest_eigenvalue(torch.zeros(3, 3), torch.zeros(3)) == 0.0


@pytest.mark.parametrize("function", [extreme_eigenvalues, largest_eigenvalue])
def test_bad_arguments_are_refused(function):
    def stochastic(v):
        return v

    stochastic.stochastic = True
    with pytest.raises(ValueError, match="stochastic"):
        function(stochastic, torch.zeros(2))
    with pytest.raises(ValueError, match="symmetric"):
        function(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.zeros(2))
    with pytest.raises(ValueError, match="structure"):
        function(torch.eye(3), torch.zeros(2))
    with pytest.raises(ValueError, match="finite"):
        function(lambda v: v * float("nan"), torch.zeros(2))
    count = "num_steps" if function is extreme_eigenvalues else "max_iter"
    with pytest.raises(ValueError, match=count):
        function(torch.eye(2), torch.zeros(2), **{count: 0})
