"""Hessians over data: exact sums over unequal batches and processes, and random batches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ballast_testing.distributed import run_gloo
from ihvp import DataHVP, StochasticHVP, cg, lissa, module_loss, quadratic_sgd, solve
from ihvp.hvp import hvp


def problem(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 2)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(23, 3, generator=generator, dtype=torch.float64).to(dtype)
    return model, x, torch.arange(23) % 2


def loss_of(reduction):
    return lambda m, x, y: F.cross_entropy(m(x), y, reduction=reduction)


def vector(params, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in params.items()}


def flat(tree):
    return torch.cat([leaf.reshape(-1) for leaf in tree.values()])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("mode", ["auto", "rev-rev"])
def test_unequal_batches_sum_to_the_whole(reduction, mode):
    model, x, y = problem()
    loader = DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(2))
    operator = DataHVP(model, loss_of(reduction), loader, reduction, l2=0.3, mode=mode)  # batches 5, 5, 5, 5, 3
    loss_fn, params = module_loss(model, loss_of(reduction), x, y)
    assert list(operator.params) == list(params)
    v = vector(params)
    want = flat(hvp(loss_fn, params, v)) + 0.3 * flat(v)
    torch.testing.assert_close(flat(operator(v)), want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(flat(operator(v)), want, rtol=1e-10, atol=1e-12)  # another order of the data
    assert all(part.training for part in model.modules())


def test_batches_of_other_kinds():
    model, x, y = problem()
    params = module_loss(model, loss_of("mean"), x, y)[1]
    v = vector(params)
    want = flat(DataHVP(model, loss_of("mean"), [(x, y)])(v))

    def of_dict(m, batch):
        return F.cross_entropy(m(batch["x"]), batch["y"])

    dicts = [{"x": x[:9], "y": y[:9]}, {"x": x[9:], "y": y[9:]}]
    torch.testing.assert_close(flat(DataHVP(model, of_dict, dicts)(v)), want)
    ranges = [range(9), range(9, 23)]
    by_rows = DataHVP(model, lambda m, rows: F.cross_entropy(m(x[list(rows)]), y[list(rows)]), ranges, size=len)
    torch.testing.assert_close(flat(by_rows(v)), want)
    with pytest.raises(ValueError, match="pass size"):
        DataHVP(model, of_dict, [{"x": 1}])(v)


def test_empty_and_used_up_loaders_are_refused():
    model, x, y = problem()
    v = vector(module_loss(model, loss_of("mean"), x, y)[1])
    once = DataHVP(model, loss_of("mean"), iter([(x, y)]))
    once(v)
    with pytest.raises(ValueError, match="no samples"):
        once(v)
    skipped = DataHVP(model, loss_of("mean"), [(x, y), (x[:0], y[:0])])
    assert flat(skipped(v)).isfinite().all()


def test_a_solve_over_batches_equals_the_solve_over_all():
    model, x, y = problem()
    loss_fn, params = module_loss(model, loss_of("mean"), x, y)
    b = vector(params)
    want = cg(lambda v: hvp(loss_fn, params, v), b, damping=1.0, rtol=1e-8)
    got = cg(DataHVP(model, loss_of("mean"), DataLoader(TensorDataset(x, y), batch_size=6)), b, damping=1.0, rtol=1e-8)
    assert got.converged
    torch.testing.assert_close(flat(got.x), flat(want.x), rtol=1e-6, atol=1e-8)


DAMPING = {"mean": 1.0, "sum": 40.0}


def solved_on_ranks(rank, world_size):
    model, x, y = problem()
    rows = slice(0, 14) if rank == 0 else slice(14, None)  # unequal shares
    found = {}
    for reduction, damping in DAMPING.items():
        loader = DataLoader(TensorDataset(x[rows], y[rows]), batch_size=5)
        operator = DataHVP(model, loss_of(reduction), loader, reduction, l2=0.1)
        b = vector(operator.params)
        found[reduction] = (operator(b), cg(operator, b, damping=damping, rtol=1e-8).x)
    return found


def test_two_processes_equal_one():
    model, x, y = problem()
    ranks = run_gloo(solved_on_ranks, 2)
    assert len(ranks) == 2
    for reduction, damping in DAMPING.items():
        operator = DataHVP(model, loss_of(reduction), [(x, y)], reduction, l2=0.1)
        b = vector(operator.params)
        want = cg(operator, b, damping=damping, rtol=1e-8).x
        for found in ranks:
            product, solution = found[reduction]
            torch.testing.assert_close(flat(product), flat(operator(b)), rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(flat(solution), flat(want), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_random_batches_are_unbiased_and_reproducible(reduction):
    model, x, y = problem()
    loss_fn, params = module_loss(model, loss_of(reduction), x, y)
    v = vector(params)
    want = flat(hvp(loss_fn, params, v)) + 0.2 * flat(v)

    def operator():
        generator = torch.Generator().manual_seed(4)
        return StochasticHVP(model, loss_of(reduction), (x, y), 4, reduction, l2=0.2, generator=generator)

    one, two = operator(), operator()
    draws = torch.stack([flat(one(v)) for _ in range(300)])
    assert torch.equal(draws[0], flat(two(v)))
    assert not torch.equal(draws[0], draws[1])
    spread = draws.std(0) / 300**0.5
    assert ((draws.mean(0) - want).abs() < 5 * spread + 1e-12).all()
    torch.testing.assert_close(flat(one.exact(v)), want, rtol=1e-10, atol=1e-12)
    assert not torch.equal(flat(two(v, generator=torch.Generator().manual_seed(9))), draws[1])


def test_datasets_are_collated():
    model, x, y = problem()
    by_tensor = StochasticHVP(model, loss_of("mean"), (x, y), 4, generator=torch.Generator().manual_seed(1))
    by_sample = StochasticHVP(
        model, loss_of("mean"), TensorDataset(x, y), 4, generator=torch.Generator().manual_seed(1)
    )
    v = vector(by_tensor.params)
    torch.testing.assert_close(flat(by_tensor(v)), flat(by_sample(v)))


def test_stochastic_solvers_take_it_and_report_the_exact_residual():
    model, x, y = problem()
    operator = StochasticHVP(model, loss_of("mean"), (x, y), 12, l2=1.0)
    b = vector(operator.params)
    want = flat(cg(operator.exact, b, rtol=1e-8).x)
    for result in (
        lissa(operator, b, scale=4.0, depth=60, repeats=4, rtol=0.2),
        quadratic_sgd(operator, b, lr=0.2, num_iter=150, rtol=0.2),
    ):
        assert float((flat(result.x) - want).norm()) < 0.2 * float(want.norm())
        true = float((flat(b) - flat(operator.exact(result.x))).norm() / flat(b).norm())
        assert result.relative_residual == pytest.approx(true, rel=1e-6)
        assert 0 < true < 0.2


def test_the_fixed_solvers_refuse_it():
    model, x, y = problem()
    operator = StochasticHVP(model, loss_of("mean"), (x, y), 4)
    for method in ("cg", "neumann", "direct", "lanczos"):
        with pytest.raises(ValueError, match="stochastic"):
            solve(operator, vector(operator.params), method=method)
    with pytest.raises(ValueError, match="lr must be given"):
        quadratic_sgd(operator, vector(operator.params))


def test_half_precision_models_give_float32_products():
    model, x, y = problem(torch.bfloat16)
    operator = DataHVP(model, loss_of("mean"), [(x, y)])
    out = operator(vector(operator.params))
    assert {leaf.dtype for leaf in out.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_bad_arguments_are_refused():
    model, x, y = problem()
    with pytest.raises(ValueError, match="reduction"):
        DataHVP(model, loss_of("mean"), [(x, y)], "none")
    with pytest.raises(ValueError, match="l2"):
        DataHVP(model, loss_of("mean"), [(x, y)], l2=-1.0)
    with pytest.raises(ValueError, match="batch_size"):
        StochasticHVP(model, loss_of("mean"), (x, y), 0)
    with pytest.raises(ValueError, match="equal length"):
        StochasticHVP(model, loss_of("mean"), (x, y[:5]))
    with pytest.raises(ValueError, match="not empty"):
        StochasticHVP(model, loss_of("mean"), (x[:0], y[:0]))
    with pytest.raises(ValueError, match="structure"):
        DataHVP(model, loss_of("mean"), [(x, y)])({"w": torch.ones(2)})
