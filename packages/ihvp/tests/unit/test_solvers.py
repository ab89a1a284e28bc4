"""Solvers against exact answers, and their diagnostics."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ihvp import (
    ConvergenceWarning,
    apply_delta,
    cg,
    direct,
    lanczos,
    lissa,
    make_hvp,
    module_loss,
    neumann,
    quadratic_sgd,
    solve,
)

DOUBLE = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def with_spectrum(values, seed=0, dtype=DOUBLE):
    values = torch.as_tensor(values, dtype=DOUBLE)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=DOUBLE, generator=seeded(seed)))
    matrix = q @ torch.diag(values) @ q.T
    return (0.5 * (matrix + matrix.T)).to(dtype)


def rhs(size, seed=1, dtype=DOUBLE):
    return torch.randn(size, dtype=DOUBLE, generator=seeded(seed)).to(dtype)


def close(a, b, rtol):
    return float((a - b).norm()) <= rtol * float(b.norm())


SPD = with_spectrum([0.5, 1.0, 1.5, 2.0, 3.0, 4.0])
INDEFINITE = with_spectrum([-1.0, 0.5, 1.0, 2.0, 3.0])
METHODS = {
    "cg": {},
    "neumann": {"scale": 5.0},
    "lissa": {"scale": 5.0},
    "sgd": {"lr": 0.1},
    "direct": {},
    "lanczos": {},
}


# --- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_all_methods_find_the_same_solution(damping):
    b = rhs(6)
    want = torch.linalg.solve(SPD + damping * torch.eye(6, dtype=DOUBLE), b)
    runs = {
        "direct": {},
        "cg": {"rtol": 1e-10},
        "lanczos": {},
        "neumann": {"scale": 3.0, "num_iter": 300, "damping": damping / 3.0},
        "lissa": {"scale": 3.0, "depth": 300, "damping": damping / 3.0},
        "sgd": {"lr": 0.3, "num_iter": 400},
    }
    for method, arguments in runs.items():
        result = solve(SPD, b, method=method, **{"damping": damping, **arguments})
        assert close(result.x, want, 1e-8), method
        assert result.converged, method
        undamped = float((b - SPD @ result.x).norm() / b.norm())
        assert result.undamped_relative_residual == pytest.approx(undamped, abs=1e-9), method
        assert result.residual_norm == pytest.approx(result.relative_residual * float(b.norm())), method


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 10), seed=st.integers(0, 500), spread=st.floats(0.0, 1.2), damping=st.floats(0.0, 2.0))
def test_cg_solves_positive_definite_systems_in_at_most_p_steps(size, seed, spread, damping):
    values = 10 ** (spread * torch.rand(size, dtype=DOUBLE, generator=seeded(seed)))
    A, b = with_spectrum(values, seed), rhs(size, seed + 1)
    result = cg(A, b, damping=damping, rtol=1e-6, max_iter=size)
    assert result.converged
    assert result.num_iter <= size
    assert not result.negative_curvature
    assert close(A @ result.x + damping * result.x, b, 1e-5)


def test_few_distinct_eigenvalues_need_as_many_steps():
    A = with_spectrum([1.0] * 10 + [3.0] * 10 + [7.0] * 10)
    assert cg(A, rhs(30), rtol=1e-8).num_iter == 3


def test_pytrees_give_the_flat_answer():
    b = rhs(6)
    tree = {"w": b[:4].reshape(2, 2), "rest": (b[4:],)}

    def A(v):
        out = SPD @ torch.cat([v["w"].flatten(), v["rest"][0]])
        return {"rest": (out[4:],), "w": out[:4].reshape(2, 2)}

    runs = {
        "cg": {},
        "lanczos": {},
        "direct": {},
        # given, not estimated: the random start of an estimate depends on the shapes
        "neumann": {"num_iter": 20, "scale": 5.0},
        "sgd": {"num_iter": 20, "lr": 0.2},
        "lissa": {"scale": 5.0},
    }
    for method, arguments in runs.items():
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
            want = solve(SPD, b, method=method, **arguments)
            got = solve(A, tree, method=method, **arguments)
        assert list(got.x) == ["w", "rest"]
        flat = torch.cat([got.x["w"].flatten(), got.x["rest"][0]])
        torch.testing.assert_close(flat, want.x, rtol=1e-6, atol=1e-9)


def test_single_precision_solves_to_what_it_supports():
    A = with_spectrum(torch.logspace(-2, 1, 60))
    b = rhs(60)
    exact = torch.linalg.solve(A, b)
    result = cg(A.float(), b.float(), rtol=1e-4, max_iter=300)
    assert result.converged
    assert close(result.x.double(), exact, 1e-2)


def test_a_residual_spoilt_by_rounding_is_formed_anew_and_improved():
    """The recursion reports 1e-7 long before the true residual of float32 is there; a restart helps, and the flag is true."""
    A = with_spectrum(torch.logspace(-4, 0, 80)).float()
    b = rhs(80, dtype=torch.float32)
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        result = cg(A, b, rtol=1e-7, max_iter=2000)
    true = float((b.double() - A.double() @ result.x.double()).norm() / b.double().norm())
    assert result.relative_residual == pytest.approx(true, rel=0.5)
    assert result.converged == (result.relative_residual <= 1e-7)
    assert result.history[-1] < 1e-6


def test_zero_tolerance_stops_at_rounding():
    with pytest.warns(ConvergenceWarning, match="rtol"):
        result = cg(SPD, rhs(6), rtol=0.0, max_iter=1000)
    assert result.relative_residual < 1e-14
    assert result.num_iter < 100
    assert not result.negative_curvature


def test_a_start_at_the_solution_needs_no_step():
    b = rhs(6)
    x = torch.linalg.solve(SPD, b)
    result = cg(SPD, b, x0=x)
    assert (result.num_iter, result.num_hvp, result.converged) == (0, 1, True)
    torch.testing.assert_close(result.x, x)
    assert result.x is not x


def test_a_preconditioner_saves_products():
    diagonal = torch.logspace(0, 4, 40, dtype=DOUBLE)
    A = torch.diag(diagonal) + 0.1 * with_spectrum(torch.linspace(0, 1, 40))
    b = rhs(40)
    plain = cg(A, b, rtol=1e-8, max_iter=500)
    helped = cg(A, b, rtol=1e-8, max_iter=500, preconditioner=1 / A.diagonal())
    assert plain.converged
    assert helped.converged
    assert helped.num_hvp < 0.3 * plain.num_hvp
    assert close(helped.x, torch.linalg.solve(A, b), 1e-5)


def test_neumann_converges_to_the_inverse_with_damping_times_scale():
    b, s, d = rhs(6), 5.0, 0.2
    result = neumann(SPD, b, scale=s, damping=d, num_iter=400)
    eye = torch.eye(6, dtype=DOUBLE)
    assert close(result.x, torch.linalg.solve(SPD + d * s * eye, b), 1e-10)
    assert not close(result.x, torch.linalg.solve(SPD + d * eye, b), 1e-2)
    assert neumann(SPD, b, scale=s, num_iter=400).converged


def test_neumann_is_its_closed_form_and_its_history_the_residual():
    b, s, d, T = rhs(6), 6.0, 0.1, 7
    M = (1 - d) * torch.eye(6, dtype=DOUBLE) - SPD / s
    iterates = [sum(torch.linalg.matrix_power(M, k) @ b for k in range(t + 1)) / s for t in range(T + 1)]
    with pytest.warns(ConvergenceWarning):
        result = neumann(SPD, b, scale=s, damping=d, num_iter=T)
    torch.testing.assert_close(result.x, iterates[T])
    residuals = [float((b - SPD @ x - d * s * x).norm() / b.norm()) for x in iterates]
    assert result.history == pytest.approx(residuals[:T])
    assert result.relative_residual == pytest.approx(residuals[T])
    assert (result.num_iter, result.num_hvp) == (T, T + 1)


def test_neumann_stops_at_the_tolerance_and_estimates_its_scale():
    b = rhs(6)
    result = neumann(SPD, b, num_iter=1000, rtol=1e-5)
    assert result.converged
    assert result.relative_residual <= 1e-5
    assert result.num_iter < 300
    assert result.num_hvp > result.num_iter + 1  # the estimate is counted


def test_small_curvature_is_scaled_and_not_inverted():
    """GIF's published setting: s = 500 and 100 steps multiply a direction of curvature 1 by about 101 / 500."""
    A, b = torch.diag(torch.tensor([1.0, 400.0], dtype=DOUBLE)), torch.ones(2, dtype=DOUBLE)
    with pytest.warns(ConvergenceWarning, match="did not converge"):
        x = neumann(A, b, scale=500.0, num_iter=100).x
    assert float(x[1]) == pytest.approx(1 / 400, rel=1e-6)
    assert float(x[0]) == pytest.approx(1 - (1 - 1 / 500) ** 101)
    assert 0.9 < float(x[0]) / (101 / 500) <= 1


def test_sgd_is_gradient_descent_with_explicit_gradient():
    b, lr, damping = rhs(6), 0.2, 0.1
    x = torch.full((6,), 0.5, dtype=DOUBLE)
    for _ in range(10):
        x = x - lr * (SPD @ x + damping * x - b)
    with pytest.warns(ConvergenceWarning):
        got = quadratic_sgd(SPD, b, lr=lr, num_iter=10, damping=damping, x0=0.5)
    torch.testing.assert_close(got.x, x)
    with pytest.warns(ConvergenceWarning):
        tree = quadratic_sgd(SPD, b, lr=lr, num_iter=10, damping=damping, x0=torch.full((6,), 0.5, dtype=DOUBLE))
    torch.testing.assert_close(tree.x, x)


@pytest.mark.parametrize("arguments", [{"lr": 0.2, "momentum": 0.8}, {"lr": 0.02, "optimizer": "adam"}, {}])
def test_optimisers_reach_the_solution(arguments):
    b = rhs(6)
    result = quadratic_sgd(SPD, b, num_iter=1500, rtol=1e-3, **arguments)
    assert result.converged
    assert close(result.x, torch.linalg.solve(SPD, b), 1e-2)


def test_half_the_gradient_leads_to_twice_the_solution():
    b = rhs(6)
    with pytest.warns(ConvergenceWarning, match="twice"):
        result = quadratic_sgd(SPD, b, lr=0.3, num_iter=500, compat_half_gradient=True)
    assert close(result.x, 2 * torch.linalg.solve(SPD, b), 1e-8)
    assert not result.converged
    assert result.relative_residual == pytest.approx(1.0)


def test_lanczos_is_cg_in_exact_arithmetic():
    A, b = with_spectrum(torch.linspace(1, 50, 30)), rhs(30)
    with pytest.warns(ConvergenceWarning):
        steps = cg(A, b, rtol=1e-12, max_iter=8)
    with pytest.warns(ConvergenceWarning):
        space = lanczos(A, b, num_steps=8, rtol=1e-12)
    assert close(space.x, steps.x, 1e-6)
    assert space.num_hvp == 9


def test_a_low_rank_inverse_leaves_small_curvature_out():
    A = torch.diag(torch.tensor([1.0, 2.0, 30.0, 40.0], dtype=DOUBLE))
    b = torch.ones(4, dtype=DOUBLE)
    with pytest.warns(ConvergenceWarning, match="rank"):
        result = lanczos(A, b, rank=2)
    torch.testing.assert_close(result.x, torch.tensor([0.0, 0.0, 1 / 30, 1 / 40], dtype=DOUBLE))
    assert result.relative_residual == pytest.approx(2**0.5 / 2)


def test_lanczos_solves_indefinite_systems_with_a_flag():
    b = rhs(5)
    with pytest.warns(ConvergenceWarning, match="negative curvature"):
        result = lanczos(INDEFINITE, b)
    assert result.negative_curvature
    assert close(result.x, torch.linalg.solve(INDEFINITE, b), 1e-8)


def test_lissa_averages_independent_draws():
    """Multiplicative noise of 30 %: the mean of many repeats is nearer to the exact iterate than single runs are."""
    b, s, depth = rhs(6), 8.0, 40
    M = torch.eye(6, dtype=DOUBLE) - SPD / s
    exact = sum(torch.linalg.matrix_power(M, k) @ b for k in range(depth + 1)) / s

    def draws(seed):
        generator = seeded(seed)

        def sample(v):
            return SPD @ v * (1 + 0.3 * torch.randn((), generator=generator, dtype=DOUBLE))

        sample.exact = lambda v: SPD @ v
        return sample

    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        single = [lissa(draws(seed), b, scale=s, depth=depth).x for seed in range(20)]
        mean = lissa(draws(99), b, scale=s, depth=depth, repeats=64)
    error = float(torch.stack([(x - exact).norm() ** 2 for x in single]).mean() ** 0.5)
    assert float((mean.x - exact).norm()) < 0.35 * error  # 1/8 in expectation
    assert mean.num_iter == 64 * depth
    assert mean.num_hvp == 64 * depth + 1
    true = float((b - SPD @ mean.x).norm() / b.norm())
    assert mean.relative_residual == pytest.approx(true)


def test_lissa_passes_its_generator_on():
    seen = []

    def sample(v, generator):
        seen.append(generator)
        return SPD @ v

    generator = seeded(3)
    with pytest.warns(ConvergenceWarning):
        # the last product, for the residual, has no exact operator here and draws as well
        lissa(lambda v, generator=None: sample(v, generator), rhs(6), scale=5.0, depth=2, generator=generator)
    assert seen == [generator, generator, None]


# --- diagnostics -------------------------------------------------------------------------------------------------------


def test_neumann_reports_divergence_and_stays_finite():
    b = rhs(6)
    with pytest.warns(ConvergenceWarning, match=r"diverged.*raise \(increase\) scale"):
        counted = neumann(SPD, b, scale=1.5, num_iter=40)
    assert counted.diverged
    assert counted.num_iter == 40  # without a tolerance the published recursion runs to its end
    with pytest.warns(ConvergenceWarning):
        stopped = neumann(SPD, b, scale=1.5, num_iter=40, rtol=1e-6)
    assert stopped.diverged
    assert stopped.num_iter < 20
    with pytest.warns(ConvergenceWarning):
        overflowed = neumann(SPD.float(), b.float(), scale=0.01, num_iter=200)
    assert overflowed.diverged
    assert overflowed.x.isfinite().all()
    assert not overflowed.converged
    assert neumann(SPD, b, scale=4.5, num_iter=300).diverged is False


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_sgd_reports_divergence(optimizer):
    A = SPD if optimizer == "sgd" else INDEFINITE
    arguments = {"lr": 2.0} if optimizer == "sgd" else {"lr": 5.0, "optimizer": "adam"}
    with pytest.warns(ConvergenceWarning, match="diverged"):
        result = quadratic_sgd(A, rhs(len(A)), num_iter=3000, **arguments)
    assert result.diverged
    assert result.x.isfinite().all()


def test_lissa_reports_divergence():
    with pytest.warns(ConvergenceWarning, match="diverged"):
        result = lissa(SPD, rhs(6), scale=1.0, depth=500, repeats=3)
    assert result.diverged
    assert result.num_iter < 100
    assert result.x.isfinite().all()


def test_cg_reports_negative_curvature_and_damping_cures_it():
    b = rhs(5)
    with pytest.warns(ConvergenceWarning, match=r"negative curvature.*increase\) damping"):
        result = cg(INDEFINITE, b, rtol=1e-10)
    assert result.negative_curvature
    assert not result.converged
    cured = cg(INDEFINITE, b, damping=1.5, rtol=1e-10)
    assert cured.converged
    assert not cured.negative_curvature


def test_negative_curvature_at_the_first_step_returns_the_direction_of_b():
    b = torch.tensor([1.0, 0.0], dtype=DOUBLE)
    A = torch.diag(torch.tensor([-2.0, 5.0], dtype=DOUBLE))
    with pytest.warns(ConvergenceWarning, match="negative curvature"):
        result = cg(A, b)
    assert result.num_iter == 0
    torch.testing.assert_close(result.x, torch.tensor([0.5, 0.0], dtype=DOUBLE))


def test_direct_flags_an_indefinite_matrix_and_names_the_eigenvalue():
    b = rhs(5)
    with pytest.warns(ConvergenceWarning, match="damping by more than 1"):
        result = direct(INDEFINITE, b)
    assert result.negative_curvature
    assert result.converged
    assert close(result.x, torch.linalg.solve(INDEFINITE, b), 1e-9)
    assert not direct(INDEFINITE, b, damping=1.1).negative_curvature


def test_direct_refuses_singular_matrices():
    for A in (with_spectrum([0.0, 1.0, 2.0]), torch.zeros(3, 3, dtype=DOUBLE), with_spectrum([-1.0, 0.0, 2.0])):
        with pytest.raises(ValueError, match=r"singular.*damping"):
            direct(A, rhs(3))
    assert direct(with_spectrum([0.0, 1.0, 2.0]), rhs(3), damping=0.1).converged
    with pytest.raises(ValueError, match="damping"):
        lanczos(torch.zeros(3, 3), torch.ones(3))


def test_a_zero_right_hand_side_gives_zero_at_once():
    for method, arguments in METHODS.items():
        result = solve(SPD, torch.zeros(6, dtype=DOUBLE), method=method, **arguments)
        assert not result.x.any(), method
        assert result.converged, method
        assert (result.relative_residual, result.undamped_relative_residual) == (0.0, 0.0), method


def test_running_out_of_steps_warns_once_with_the_residual():
    b = rhs(6)
    with pytest.warns(ConvergenceWarning) as caught:
        result = cg(SPD, b, max_iter=2)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert f"{result.relative_residual:.2e}" in text
    assert f"{result.undamped_relative_residual:.2e}" in text
    assert "max_iter" in text


@pytest.mark.parametrize("call", [cg, solve])
def test_the_warning_points_to_the_caller(call):
    with pytest.warns(ConvergenceWarning) as caught:
        call(SPD, rhs(6), max_iter=1)
    assert caught[0].filename == __file__


def test_a_damped_residual_says_nothing_about_the_undamped_one():
    result = cg(SPD, rhs(6), damping=100.0)
    assert result.converged
    assert result.relative_residual < 1e-4
    assert result.undamped_relative_residual > 0.9


@pytest.mark.filterwarnings("ignore::ihvp.ConvergenceWarning")
@pytest.mark.parametrize("method", ["cg", "lanczos", "direct"])
def test_values_that_overflow_later_never_pass_as_an_answer(method):
    calls = 0

    def A(v):
        nonlocal calls
        calls += 1
        return SPD @ v if calls < 3 else torch.full_like(v, float("nan"))

    if method == "direct":
        with pytest.raises(ValueError, match="finite"):
            direct(A, rhs(6))
        return
    if method == "lanczos":
        with pytest.raises(ValueError, match="finite"):
            lanczos(A, rhs(6))
        return
    result = cg(A, rhs(6))
    assert result.diverged
    assert result.x.isfinite().all()
    assert not result.converged


# --- right-hand side and structures ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::ihvp.ConvergenceWarning")
@pytest.mark.parametrize("method", METHODS)
def test_a_right_hand_side_with_a_graph_changes_nothing(method):
    theta = torch.linspace(0.1, 0.6, 6, dtype=DOUBLE, requires_grad=True)
    b = torch.autograd.grad((theta**3).sum(), theta, create_graph=True)[0]
    assert b.requires_grad
    with_graph = solve(SPD, b, method=method, **METHODS[method])
    without = solve(SPD, b.detach(), method=method, **METHODS[method])
    assert torch.equal(with_graph.x, without.x)
    assert not with_graph.x.requires_grad


def test_half_precision_right_hand_sides_are_solved_in_float32():
    b = rhs(6).bfloat16()
    result = cg(SPD.float(), b)
    assert result.x.dtype == torch.float32
    assert close(result.x.double(), torch.linalg.solve(SPD, b.double()), 1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_bad_systems_are_refused(method):
    arguments = METHODS[method]
    b = rhs(6)
    cases = [
        (SPD + torch.triu(torch.ones(6, 6, dtype=DOUBLE), 1), b, {}, "symmetric"),
        (SPD, rhs(5), {}, "structure"),
        (SPD[:4], b, {}, "structure"),
        (lambda v: {"w": v}, b, {}, "structure"),
        (lambda v: v[:3], b, {}, "structure"),
        (SPD, b, {"damping": -0.1}, "damping"),
        (SPD, b, {"damping": float("nan")}, "damping"),
        (SPD, b / 0, {}, "finite"),
        (SPD / 0, b, {}, "finite"),
        (lambda v: v / 0, b, {}, "finite"),
        (SPD, torch.ones(6, dtype=torch.long), {}, "floating"),
    ]
    for A, right, more, match in cases:
        with pytest.raises(ValueError, match=match):
            solve(A, right, method=method, **{**arguments, **more})


@pytest.mark.parametrize("method", ["cg", "neumann", "direct", "lanczos"])
def test_stochastic_operators_are_refused(method):
    def A(v):
        return v

    A.stochastic = True
    with pytest.raises(ValueError, match="stochastic"):
        solve(A, rhs(3), method=method)


@pytest.mark.parametrize(
    ("method", "arguments", "match"),
    [
        ("neumann", {"scale": 0.0}, "scale"),
        ("neumann", {"num_iter": -1}, "num_iter"),
        ("neumann", {"rtol": -1.0}, "rtol"),
        ("lissa", {"scale": -1.0}, "scale"),
        ("lissa", {"scale": 1.0, "repeats": 0}, "repeats"),
        ("lissa", {"scale": 1.0, "depth": -1}, "depth"),
        ("sgd", {"num_iter": -1}, "num_iter"),
        ("sgd", {"lr": 0.0}, "lr"),
        ("sgd", {"optimizer": "adam"}, "lr must be given"),
        ("sgd", {"optimizer": "rmsprop"}, "optimizer"),
        ("sgd", {"momentum": 1.0}, "momentum"),
        ("sgd", {"lr": 0.1, "optimizer": "adam", "momentum": 0.5}, "momentum"),
        ("sgd", {"lr": 0.1, "x0": torch.ones(2)}, "structure"),
        ("cg", {"max_iter": -1}, "max_iter"),
        ("cg", {"rtol": -1.0}, "rtol"),
        ("cg", {"x0": torch.ones(2)}, "structure"),
        ("cg", {"preconditioner": torch.zeros(6)}, "positive"),
        ("cg", {"preconditioner": torch.ones(5)}, "structure"),
        ("direct", {"max_size": 5}, "max_size"),
        ("lanczos", {"num_steps": 0}, "num_steps"),
        ("lanczos", {"rank": 0}, "rank"),
        ("newton", {}, "method must be one of"),
    ],
)
def test_bad_arguments_are_refused(method, arguments, match):
    with pytest.raises(ValueError, match=match):
        solve(SPD, rhs(6), method=method, **arguments)


def test_an_operator_that_is_zero_needs_a_scale():
    with pytest.raises(ValueError, match="scale"):
        neumann(torch.zeros(3, 3), torch.ones(3))


def test_results_are_the_same_every_time():
    b = rhs(6)
    for method, arguments in {"neumann": {"num_iter": 50}, "sgd": {"num_iter": 50}, "lanczos": {}}.items():
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
            one, two = (solve(SPD, b, method=method, **arguments) for _ in range(2))
        assert torch.equal(one.x, two.x)


# --- models ------------------------------------------------------------------------------------------------------------


class Logistic:
    """Logistic regression with the mean over n samples and l2; the minimiser by Newton's method in closed form."""

    def __init__(self, n, seed, l2=0.1):
        generator = seeded(seed)
        self.n, self.l2 = n, l2
        self.X = torch.randn(n, 3, dtype=DOUBLE, generator=generator)
        self.y = (torch.rand(n, dtype=DOUBLE, generator=generator) < 0.5).to(DOUBLE)

    def loss(self, theta):
        score = self.X @ theta
        return (F.softplus(score) - self.y * score).sum() / self.n + 0.5 * self.l2 * theta @ theta

    def gradient(self, theta, rows):
        return self.X[rows].T @ (torch.sigmoid(self.X[rows] @ theta) - self.y[rows]) / self.n

    def minimiser(self, rows):
        theta = torch.zeros(3, dtype=DOUBLE)
        for _ in range(30):
            p = torch.sigmoid(self.X[rows] @ theta)
            hessian = (self.X[rows].T * (p * (1 - p))) @ self.X[rows] / self.n + self.l2 * torch.eye(3, dtype=DOUBLE)
            theta = theta - torch.linalg.solve(hessian, self.gradient(theta, rows) + self.l2 * theta)
        return theta

    def estimate_and_truth(self):
        """Influence of removing sample 0, and what retraining without it changes."""
        theta = self.minimiser(slice(None))
        b = self.gradient(theta, slice(0, 1))
        delta = cg(make_hvp(self.loss, theta), b, rtol=1e-10).x
        return delta, self.minimiser(slice(1, None)) - theta


@pytest.mark.parametrize("n", [12, 24, 48])
def test_the_influence_of_a_sample_points_to_retraining_without_it(n):
    pairs = [Logistic(n, seed).estimate_and_truth() for seed in range(5)]
    assert min(float(F.cosine_similarity(delta, exact, dim=0)) for delta, exact in pairs) > 0.95


def test_the_error_of_influence_falls_with_the_square_of_the_samples():
    def mean_error(n):
        pairs = [Logistic(n, 100 + seed).estimate_and_truth() for seed in range(12)]
        return sum(float((delta - exact).norm()) for delta, exact in pairs) / len(pairs)

    assert mean_error(20) / mean_error(160) > 25  # 64 in the limit


def test_the_whole_path_of_a_module():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    x, y = torch.randn(20, 3, generator=seeded()), torch.arange(20) % 2
    before = {name: p.clone() for name, p in model.state_dict().items()}
    R, params = module_loss(model, lambda m, x, y: F.cross_entropy(m(x), y), x, y)
    r, _ = module_loss(model, lambda m, x, y: F.cross_entropy(m(x), y, reduction="sum") / 20, x[:1], y[:1])
    b = torch.func.grad(r)(params)
    result = solve(make_hvp(R, params), b, damping=1.0)
    assert result.converged
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.training
    new = apply_delta(params, result.x, max_norm=0.1)
    removed_before, removed_after = float(r(params)), float(r(new))
    assert removed_after > removed_before  # the model fits what was removed less
    model.load_state_dict(new, strict=False)
    assert float(r(module_loss(model, lambda m: m)[1])) == pytest.approx(removed_after)


class _LiveBytes(TorchDispatchMode):
    """Highest number of bytes in tensors made while active."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage):
        key = storage._cdata
        if key in self.seen:
            return
        size = storage.nbytes()
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key, size):
        self.seen.discard(key)
        self.now -= size


@pytest.mark.filterwarnings("ignore::ihvp.ConvergenceWarning")
@pytest.mark.parametrize(
    ("method", "steps", "arguments"),
    [
        ("cg", "max_iter", {"rtol": 0.0}),
        ("neumann", "num_iter", {"scale": 1e4}),
        ("lissa", "depth", {"scale": 1e4}),
        ("sgd", "num_iter", {"lr": 1e-4}),
        ("sgd", "num_iter", {"lr": 1e-4, "optimizer": "adam"}),
    ],
)
def test_memory_does_not_grow_with_the_steps(method, steps, arguments):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 1))
    x = torch.randn(8, 10, generator=seeded())
    R, params = module_loss(model, lambda m, x: m(x).pow(2).mean(), x)
    b = {name: torch.ones_like(p) for name, p in params.items()}

    def peak(number):
        gc.collect()
        with _LiveBytes() as live:
            result = solve(
                make_hvp(R, params, mode="rev-rev"), b, method=method, **{steps: number}, damping=1e-3, **arguments
            )
        assert method == "cg" or result.num_iter == number
        return live.peak

    assert peak(300) <= 1.05 * peak(30)
