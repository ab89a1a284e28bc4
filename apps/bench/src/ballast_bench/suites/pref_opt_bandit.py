"""Cases of alignment potential on a tabular bandit: which pair to train on next.

The study of appendix C.2 of Huang et al. 2025. A softmax policy has one parameter per prompt and answer, and starts uniform;
rewards are uniform in [0, 1]. Each update takes one pair and descends DPO's expected loss under Bradley-Terry labels. The
error is the distance of beta times the parameters from the rewards, without the mean of each prompt, relative to the start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ballast_bench.case import Case, CellInput, CellOutput, Metric

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["cpu", "play", "quick"]

_METRICS = (
    Metric("updates", better="lower", label="updates to the target", digits=1, tolerance=0.05),
    Metric("reached", label="target reached", digits=2, tested=False),
    Metric("early_error", better="lower", label="error after 5 updates per prompt", digits=3),
    Metric("error", better="lower", label="error at the end", digits=3, tested=False, tolerance=0.05),
)
_METHODS: dict[str, dict[str, Any]] = {
    "Random": {"rule": "random"},
    "Explicit margin": {"rule": "explicit"},
    "Implicit margin": {"rule": "implicit"},
    "Alignment potential": {"rule": "potential", "signed": False},
    "Alignment potential, signed": {"rule": "potential", "signed": True},
    "Largest gap of margins": {"rule": "gap"},
}
_NOTE = (
    "A table of prompts and ten answers each, rewards uniform in [0, 1], the policy uniform at the start and as reference, beta "
    "0.1. An update takes one pair and the learning rate 2 / beta^2, the best one for its loss where the policy's margin is 0. "
    "Random draws both answers independently, as the paper's theorem does. The others take the pair that their score puts first: "
    "the gap is |explicit - implicit|, which the theorem is about, alignment potential is |explicit| - |implicit|, and its signed "
    "form explicit - implicit with the better answer first. The target is a relative error of 1e-6; a run that misses it is "
    "shown with all updates of its budget, 400 per prompt."
)


def quick() -> tuple[Case, ...]:
    """One prompt, two seeds."""
    return (_case(1, "bandit-quick", seeds=(0, 1)),)


def cpu() -> tuple[Case, ...]:
    """One prompt and five."""
    return (_case(1, "bandit-1"), _case(5, "bandit-5"))


def _case(prompts: int, name: str, seeds: tuple[int, ...] = tuple(range(10))) -> Case:
    settings = {"prompts": prompts, "answers": 10, "beta": 0.1, "target": 1e-6, "budget": 400 * prompts}
    return Case(
        package="pref_opt",
        name=name,
        title=f"Tabular bandit, {prompts} {'prompt' if prompts == 1 else 'prompts'}: which pair to train on next",
        dataset="bandit-generated",
        run="ballast_bench.suites.pref_opt_bandit:play",
        methods={method: {**own, **settings} for method, own in _METHODS.items()},
        baseline="Random",
        seeds=seeds,
        metrics=_METRICS,
        expected=0.05 * prompts,
        preload=("pref_opt.alignment_potential",),
        note=_NOTE,
    )


def play(cell: CellInput) -> CellOutput:
    """Train one table until its error is small or the budget is spent: one cell."""
    import torch

    torch.set_num_threads(1)
    settings = cell.settings
    generator = torch.Generator().manual_seed(cell.seed)
    rewards = torch.rand(settings["prompts"], settings["answers"], generator=generator, dtype=torch.float64)
    policy = torch.zeros_like(rewards)
    errors = [_error(policy, rewards, settings["beta"])]
    while errors[-1] > settings["target"] * errors[0] and len(errors) <= settings["budget"]:
        prompt, left, right = _choose(settings, rewards, settings["beta"] * policy, generator)
        _descend(policy[prompt], rewards[prompt], left, right, settings["beta"])
        errors.append(_error(policy, rewards, settings["beta"]))
    relative = [error / errors[0] for error in errors]
    metrics = {
        "updates": float(len(errors) - 1),
        "reached": float(relative[-1] <= settings["target"]),
        "early_error": relative[min(5 * settings["prompts"], len(relative) - 1)],
        "error": relative[-1],
    }
    return CellOutput(metrics, tuple({"epoch": float(i), "error": error} for i, error in enumerate(relative[:50])))


def _error(policy: Tensor, rewards: Tensor, beta: float) -> float:
    """Return the distance of the policy's rewards from the true ones; a constant per prompt changes no policy."""
    gap = beta * policy - rewards
    return float((gap - gap.mean(1, keepdim=True)).norm())


def _choose(
    settings: dict[str, Any], rewards: Tensor, implied: Tensor, generator: torch.Generator
) -> tuple[int, int, int]:
    """Return a prompt and two of its answers."""
    import torch

    from pref_opt.alignment_potential import alignment_potential

    prompts, answers = rewards.shape
    if settings["rule"] == "random":
        left, right = torch.randint(answers, (2,), generator=generator).tolist()
        return int(torch.randint(prompts, (1,), generator=generator)), left, right
    pairs = torch.triu_indices(answers, answers, 1)
    explicit, implicit = ((values[:, pairs[0]] - values[:, pairs[1]]).flatten() for values in (rewards, implied))
    explicit, implicit = explicit.abs(), implicit * explicit.sign()  # the better answer first
    scores = {
        "explicit": lambda: explicit,
        "implicit": lambda: -implicit.abs(),
        "gap": lambda: (explicit - implicit).abs(),
        "potential": lambda: alignment_potential(explicit, implicit, normalize="none", signed=settings["signed"]),
    }
    prompt, pair = divmod(int(scores[settings["rule"]]().argmax()), pairs.shape[1])
    return prompt, int(pairs[0, pair]), int(pairs[1, pair])


def _descend(policy: Tensor, rewards: Tensor, left: int, right: int, beta: float) -> None:
    """Take one step on the expected DPO loss of a pair; nothing changes where both answers are the same."""
    margins = beta * (policy[left] - policy[right]), rewards[left] - rewards[right]
    gradient = beta * (margins[0].sigmoid() - margins[1].sigmoid())
    policy[left] -= 2 / beta**2 * gradient
    policy[right] += 2 / beta**2 * gradient
