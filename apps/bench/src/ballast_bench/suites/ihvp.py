"""Cases of ihvp: how many Hessian products each solver needs for the same answer.

Protocol: train a model on generated data to a minimum, take the gradient of 1 % of the samples as right-hand side, and run
the Neumann series for 100 steps, as GIF publishes it, or 400, with the smallest safe scale. Its residual without damping
is the target of all others: the figure is the number of products until a method's own undamped residual is that small.
"""

from __future__ import annotations

import time
import warnings
from typing import TYPE_CHECKING, Any

from ballast_bench.case import Case, CellInput, CellOutput, Metric

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    import ihvp

__all__ = ["cpu", "quick", "solve_one"]

_METRICS = (
    Metric("products", better="lower", label="Hessian products to the target", digits=1, tolerance=0.1),
    Metric("reached", better="higher", label="target reached", digits=2, tested=False),
    Metric("undamped_residual", better="lower", label="undamped residual", tested=False, tolerance=0.1),
    Metric("solve_seconds", better="lower", label="solve CPU s", digits=3, tested=False, tolerance=0.5),
)
_METHODS: dict[str, dict[str, Any]] = {
    "Neumann": {"solver": "neumann"},
    "CG": {"solver": "cg", "damping": 0.0},
    "CG damped": {"solver": "cg", "damping": 0.2},
    "SGD": {"solver": "sgd", "lr": 1.8, "momentum": 0.0},
    "Adam": {"solver": "adam", "lr": 0.001},
    "LiSSA, batches": {"solver": "lissa", "scale": 5.0, "batch": 0.1},
    "Adam, batches": {"solver": "adam", "lr": 0.0001, "batch": 0.1},
}
_NOTE = (
    "The target is the residual |b - H x| / |b| of the Neumann series after the steps in the title, with the smallest safe "
    "scale, 1.1 times the largest eigenvalue; the products that estimate that eigenvalue are not counted, for any method. "
    "H includes the weight decay of training. Products are in full passes over the data: a batch of a tenth counts a tenth. "
    "Every count includes one product for the final residual. A method that misses the target is shown with the products "
    "of its budget, as many as the series took (twice as many for methods on all data), and its residual there. SGD's "
    "rate is 1.8 divided by the largest eigenvalue. "
    "Chosen from a few values on the data of another seed: the damping of CG damped (a fifth of scale / steps, the damping "
    "that so many steps amount to; it is of use for the network only), Adam's rates, LiSSA's scale (5 times the largest "
    "eigenvalue)."
)


def quick() -> tuple[Case, ...]:
    """One small logistic regression."""
    few = ("Neumann", "CG", "SGD", "LiSSA, batches")
    return (
        _case(
            "logistic-small",
            "Products of solvers, small logistic regression",
            {"problem": "logistic", "samples": 300, "features": 10, "l2": 1e-3, "target_steps": 100},
            few,
            seeds=(0, 1),
            expected=0.4,
        ),
    )


def cpu() -> tuple[Case, ...]:
    """Logistic regression and a trained network, each to the residual of 100 and of 400 Neumann steps."""
    logistic = {"problem": "logistic", "samples": 1000, "features": 20, "l2": 1e-3}
    network = {"problem": "mlp", "samples": 600, "features": 20, "l2": 1e-3}
    return tuple(
        _case(
            f"{problem['problem']}-{steps}",
            f"Products of solvers, {title}, residual of {steps} Neumann steps",
            {**problem, "target_steps": steps},
            tuple(name for name in _METHODS if problem is network or name != "CG damped"),
            seeds=(0, 1, 2),
            expected=4,
        )
        for problem, title in ((logistic, "logistic regression"), (network, "MLP"))
        for steps in (100, 400)
    )


def _case(
    name: str, title: str, problem: dict[str, Any], methods: tuple[str, ...], *, seeds: tuple[int, ...], expected: float
) -> Case:
    return Case(
        package="ihvp",
        name=name,
        title=title,
        dataset="generated",
        run="ballast_bench.suites.ihvp:solve_one",
        methods={method: {**_METHODS[method], **problem} for method in methods},
        baseline="Neumann",
        seeds=seeds,
        metrics=_METRICS,
        expected=expected,
        preload=("ihvp", "torch._dynamo"),
        note=_NOTE,
    )


def solve_one(cell: CellInput) -> CellOutput:
    """Train the model of this seed, take the target from the Neumann series, and run one solver until it is met."""
    import torch

    import ihvp

    torch.set_num_threads(1)
    settings = cell.settings
    start = time.process_time()
    problem = _Problem(settings, cell.seed)
    train_seconds = time.process_time() - start
    with warnings.catch_warnings():
        # A run that misses the target is a figure here.
        warnings.simplefilter("ignore", ihvp.ConvergenceWarning)
        largest = ihvp.largest_eigenvalue(problem.hessian, problem.params, max_iter=100, rtol=1e-4)
        scale = 1.1 * largest
        target = ihvp.neumann(
            problem.hessian, problem.b, scale=scale, num_iter=settings["target_steps"]
        ).undamped_relative_residual
        result, seconds, share = _first_to_reach(_runs(settings, problem, largest, scale, cell.seed), target)
    # The product for the residual is over all data.
    products = share * (result.num_hvp - 1) + 1
    metrics = {
        "products": products,
        "reached": float(result.undamped_relative_residual <= target),
        "undamped_residual": result.undamped_relative_residual,
        "solve_seconds": seconds,
    }
    info = {
        "target": target,
        "parameters": sum(p.numel() for p in problem.params.values()),
        "largest_eigenvalue": largest,
        "train_seconds": train_seconds,
        "gradient_norm_at_minimum": problem.gradient_norm,
    }
    return CellOutput(metrics=metrics, info=info)


class _Problem:
    """A classifier trained to a minimum on generated data; its Hessian and the gradient of 1 % of the samples."""

    def __init__(self, settings: dict[str, Any], seed: int) -> None:
        import torch

        import ihvp

        n, d, l2 = settings["samples"], settings["features"], settings["l2"]
        x, y = _data(settings["problem"], n, d, seed)
        torch.manual_seed(seed)
        layers = [torch.nn.Linear(d, 3)]
        if settings["problem"] == "mlp":
            layers = [torch.nn.Linear(d, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)]  # type: ignore[list-item]
        self.model = torch.nn.Sequential(*layers).double()
        self.samples, self.l2, self.data = n, l2, (x, y)
        self.gradient_norm = _train(self.model, x, y, l2)
        loss_fn, self.params = ihvp.module_loss(self.model, _mean_loss, x, y)
        self.hessian = ihvp.make_hvp(loss_fn, self.params, l2=l2)
        removed = n // 100
        removed_loss, _ = ihvp.module_loss(self.model, _mean_loss, x[:removed], y[:removed])
        gradient = torch.func.grad(removed_loss)(self.params)
        self.b = {name: g * removed / n for name, g in gradient.items()}

    def batches(self, size: int, seed: int) -> ihvp.StochasticHVP:
        import torch

        import ihvp

        generator = torch.Generator().manual_seed(seed)
        return ihvp.StochasticHVP(self.model, _mean_loss, self.data, size, l2=self.l2, generator=generator)


def _data(problem: str, n: int, d: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian features of unequal scale and labels drawn from a linear or a hidden two-layer model."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(n, d) * torch.logspace(0, -1, d, dtype=torch.float64)
    logits = 2 * x @ normal(d, 3) if problem == "logistic" else 2 * torch.tanh(x @ normal(d, 8)) @ normal(8, 3)
    return x, torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)


def _mean_loss(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.nn.functional.cross_entropy(model(x), y)


def _train(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, l2: float) -> float:
    """Minimise the loss with weight decay; return the norm of the gradient that is left."""
    import torch

    parameters = list(model.parameters())
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=500, history_size=20, tolerance_grad=1e-8, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = _mean_loss(model, x, y) + 0.5 * l2 * torch.stack([(p**2).sum() for p in parameters]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    closure()
    return float(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm())


_Run = tuple["Callable[[int], ihvp.SolveResult]", tuple[int, ...], float]


def _runs(settings: dict[str, Any], problem: _Problem, largest: float, scale: float, seed: int) -> _Run:
    """Return the solver as a function of its steps, the steps to try, and the share of the data in a product."""
    import ihvp

    H, b, solver, target_steps = problem.hessian, problem.b, settings["solver"], settings["target_steps"]
    share = settings.get("batch", 1.0)
    if solver == "neumann":
        return lambda k: ihvp.neumann(H, b, scale=scale, num_iter=k), (target_steps,), share
    if solver == "cg":
        damping = settings["damping"] * scale / target_steps
        return (
            lambda k: ihvp.cg(H, b, damping=damping, rtol=0.0, max_iter=k),
            tuple(range(1, 2 * target_steps + 1)),
            share,
        )
    if solver == "sgd":
        lr, momentum = settings["lr"] / largest, settings["momentum"]
        steps = tuple(range(5, 2 * target_steps + 1, 5))
        return lambda k: ihvp.quadratic_sgd(H, b, lr=lr, momentum=momentum, num_iter=k), steps, share
    size = round(share * problem.samples)
    parts = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0) if share == 1.0 else (1.0,)
    steps = tuple(round(part * target_steps / share) for part in parts)
    if solver == "lissa":
        s = settings["scale"] * largest
        return lambda k: ihvp.lissa(problem.batches(size, seed), b, scale=s, depth=k), steps, share
    if share == 1.0:
        return lambda k: ihvp.quadratic_sgd(H, b, lr=settings["lr"], num_iter=k, optimizer="adam"), steps, share
    return (
        lambda k: ihvp.quadratic_sgd(problem.batches(size, seed), b, lr=settings["lr"], num_iter=k, optimizer="adam"),
        steps,
        share,
    )


def _first_to_reach(run: _Run, target: float) -> tuple[ihvp.SolveResult, float, float]:
    """Try growing numbers of steps, each from the start; the last counts where none meets the target or it ends by itself."""
    solver, steps, share = run
    for number in steps:
        start = time.process_time()
        result = solver(number)
        seconds = time.process_time() - start
        if result.undamped_relative_residual <= target or result.num_iter < number:
            break
    return result, seconds, share
