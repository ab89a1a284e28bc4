from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from recsys_losses.dsl import (
    DSLController,
    SparseEmbedding,
    cosine_update_ratio,
    count_costs,
    csr_bytes,
    dsl_update_mask,
    gradient_grow,
    load_compressed,
    magnitude_masks,
    magnitude_prune,
    random_grow,
    random_mask,
    save_compressed,
    to_csr,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- schedule and initial masks -----------------------------------------------------------------------------------


def test_schedule_ends_and_falls():
    ratios = [cosine_update_ratio(t, 50, 0.4, 0.01) for t in range(51)]
    assert ratios[0] == 0.4
    assert ratios[25] == pytest.approx(0.205)
    assert ratios[50] == pytest.approx(0.01, abs=1e-15)
    assert all(a > b for a, b in itertools.pairwise(ratios))


def test_schedule_of_arrays_is_that_of_the_steps():
    steps = [0, 3, 10]
    want = [cosine_update_ratio(t, 10) for t in steps]
    as_tensor = cosine_update_ratio(torch.tensor(steps), 10)
    as_array = cosine_update_ratio(np.array(steps), 10)
    assert isinstance(as_array, np.ndarray)
    np.testing.assert_allclose(as_tensor.numpy(), want)
    np.testing.assert_allclose(as_array, want)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((0, 0), "total_steps"),
        ((11, 10), "step"),
        ((-1, 10), "step"),
        ((1, 10, 1.5), "ratio"),
        ((1, 10, 0.5, -0.1), "ratio"),
        ((torch.tensor([3, 11]), 10), "step"),
    ],
)
def test_schedule_refuses(arguments, word):
    with pytest.raises(ValueError, match=word):
        cosine_update_ratio(*arguments)


def test_random_mask_exact_and_bernoulli():
    assert int(random_mask((30, 7), 0.3, exact=True, generator=generator()).sum()) == 63
    bernoulli = random_mask((200, 100), 0.3, generator=generator())
    assert bernoulli.dtype == torch.bool
    # 20,000 draws: a standard deviation is 65
    assert 0 < abs(int(bernoulli.sum()) - 6000) < 300
    assert torch.equal(bernoulli, random_mask((200, 100), 0.3, generator=generator()))
    assert not torch.equal(bernoulli, random_mask((200, 100), 0.3, generator=generator(1)))


def test_exact_mask_spreads_over_all_positions():
    count = sum(random_mask((10,), 0.3, exact=True, generator=generator(seed)).int() for seed in range(400))
    # 400 draws with p = 0.3: a standard deviation is 9
    assert count.min() > 80
    assert count.max() < 160


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, math.nan])
def test_density_outside_is_refused(density):
    with pytest.raises(ValueError, match="density"):
        random_mask((3,), density)
    with pytest.raises(ValueError, match="density"):
        magnitude_masks({"a": torch.ones(3)}, density)


def test_magnitude_masks_rank_all_tensors_together():
    weights = {"large": 10 + torch.rand(4, 5, generator=generator()), "small": torch.rand(3, generator=generator(1))}
    masks = magnitude_masks(weights, 0.5)
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.5 * 23)
    assert not masks["small"].any()
    kept = weights["large"][masks["large"]]
    assert kept.min() > weights["large"][~masks["large"]].max()


def test_magnitude_masks_break_ties_in_order():
    masks = magnitude_masks({"a": torch.ones(3), "b": -torch.ones(2, 2)}, 4 / 7)
    assert masks["a"].all()
    assert masks["b"].tolist() == [[True, False], [False, False]]


# --- one update ---------------------------------------------------------------------------------------------------


def official_prune(weight: torch.Tensor, mask: torch.Tensor, ratio: float) -> torch.Tensor:
    """The authors' way: a sort of all elements, the threshold counted from the zeros."""
    active = int(mask.sum())
    count = math.ceil(ratio * active)
    if count == 0:
        return mask
    threshold = weight.abs().flatten().sort().values[weight.numel() - active + count - 1]
    return weight.abs() > threshold


def brute_grow(grad: torch.Tensor, mask: torch.Tensor, count: int) -> torch.Tensor:
    order = sorted(
        (i for i in range(grad.numel()) if not mask.flatten()[i]), key=lambda i: -abs(float(grad.flatten()[i]))
    )
    new = mask.clone().flatten()
    new[order[:count]] = True
    return new.view(mask.shape)


def drawn(seed: int, shape: tuple[int, ...], density: float, levels: int) -> tuple[torch.Tensor, ...]:
    """Weights and gradients on few levels, so that ties and exact zeros are common."""
    source = generator(seed)
    mask = torch.rand(shape, generator=source) < density
    weight = torch.randint(-levels, levels + 1, shape, generator=source).double() * mask
    grad = torch.randint(-levels, levels + 1, shape, generator=source).double()
    return weight, mask, grad


@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(1,), (9,), (4, 5), (2, 3, 4)]),
    density=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    levels=st.sampled_from([0, 1, 3, 10**6]),
    ratio=st.floats(0, 1),
)
@settings(derandomize=True, deadline=None, max_examples=150)
def test_update_keeps_the_count_and_follows_the_definition(seed, shape, density, levels, ratio):
    weight, mask, grad = drawn(seed, shape, density, levels)
    before = weight.clone(), mask.clone(), grad.clone()
    update = dsl_update_mask(weight, mask, grad, ratio=ratio)
    kept = official_prune(weight, mask, ratio)
    assert torch.equal(magnitude_prune(weight, mask, ratio)[0], kept)
    assert update.num_pruned == int(mask.sum() - kept.sum()) >= math.ceil(ratio * int(mask.sum()))
    assert update.num_nonzero == int(update.mask.sum()) == int(mask.sum())
    assert torch.equal(update.mask, brute_grow(grad, kept, update.num_pruned))
    assert torch.equal(update.weight, weight * update.mask)
    for now, then in zip((weight, mask, grad), before, strict=True):
        assert torch.equal(now, then)


def test_no_density_leak_where_few_gradients_are_nonzero():
    """A 200 x 16 table of which one row has a gradient: the authors' code goes from 1,610 non-zeros to 1,419."""
    mask = random_mask((200, 16), 0.5, generator=generator())
    weight = torch.randn(200, 16, generator=generator(1)) * mask
    grad = torch.zeros(200, 16)
    grad[3] = 1
    update = dsl_update_mask(weight, mask, grad, ratio=0.5)
    assert update.num_nonzero == int(mask.sum())
    assert update.mask[3].all()


def test_newborn_zeros_go_first_and_more_than_asked():
    weight = torch.tensor([0.0, 0.0, 0.0, 5.0, 0.0, 0.0])
    mask = torch.tensor([True, True, True, True, False, False])
    kept, count = magnitude_prune(weight, mask, 0.25)
    assert count == 3
    assert kept.tolist() == [False, False, False, True, False, False]


def test_full_density_gives_everything_back():
    weight = torch.randn(6, 5, generator=generator())
    update = dsl_update_mask(weight, torch.ones(6, 5), torch.zeros(6, 5), ratio=0.4)
    assert update.num_pruned == 12
    assert torch.equal(update.weight, weight)


def test_everything_equal_goes_and_the_first_positions_grow():
    update = dsl_update_mask(
        torch.ones(4) * torch.tensor([1, 1, 0, 0]), torch.tensor([1, 1, 0, 0]), torch.ones(4), ratio=0.1
    )
    assert update.num_pruned == 2
    assert update.mask.tolist() == [True, True, False, False]


def test_regret_keeps_the_value():
    weight = torch.tensor([0.1, 2.0, 0.0])
    update = dsl_update_mask(weight, torch.tensor([1, 1, 0]), torch.tensor([9.0, 0.0, 1.0]), ratio=0.5)
    assert update.num_pruned == 1
    assert torch.equal(update.weight, weight)


def test_noncontiguous_and_half_inputs():
    weight, mask, grad = (x.T for x in drawn(0, (6, 8), 0.5, 10**6))
    update = dsl_update_mask(weight, mask, grad, ratio=0.3)
    want = dsl_update_mask(weight.contiguous(), mask.contiguous(), grad.contiguous(), ratio=0.3)
    assert torch.equal(update.mask, want.mask)
    half = dsl_update_mask(weight.bfloat16(), mask, grad.bfloat16(), ratio=0.3)
    assert half.weight.dtype == torch.bfloat16
    assert half.num_nonzero == want.num_nonzero


def test_random_growth_is_exact_and_uniform_over_inactive_positions():
    mask = torch.zeros(5, 8, dtype=torch.bool)
    mask[0] = True
    count = torch.zeros(5, 8, dtype=torch.int64)
    source = generator()
    for _ in range(200):
        new = random_grow(mask, 8, source)
        assert int(new.sum()) == 16
        assert new[0].all()
        count += new
    # 200 draws with p = 1/4: a standard deviation is 6
    assert count[1:].min() > 20
    assert count[1:].max() < 80


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: magnitude_prune(torch.ones(3), torch.ones(3), 1.2), "ratio"),
        (lambda: magnitude_prune(torch.ones(3), torch.ones(3), math.nan), "ratio"),
        (lambda: magnitude_prune(torch.ones(3), torch.ones(2), 0.1), "shapes"),
        (lambda: magnitude_prune(torch.ones(2), torch.tensor([1.0, 0.5]), 0.1), "binary"),
        (lambda: gradient_grow(torch.ones(2), torch.tensor([1.0, math.nan]), 0), "binary"),
        (lambda: gradient_grow(torch.ones(3), torch.tensor([1, 0, 0]), 3), "num_grow"),
        (lambda: gradient_grow(torch.tensor([1.0, math.nan]), torch.tensor([1, 0]), 1), "NaN"),
        (lambda: random_grow(torch.tensor([1, 0, 0]), -1), "num_grow"),
        (lambda: dsl_update_mask(torch.ones(3), torch.ones(3), torch.ones(1, 3), ratio=0.1), "shapes"),
        (lambda: magnitude_masks({}, 0.5), "empty"),
    ],
    ids=itertools.count(),
)
def test_bad_arguments_of_the_functions(call, word):
    with pytest.raises(ValueError, match=word):
        call()


# --- the controller -----------------------------------------------------------------------------------------------


def table(seed: int = 0, rows: int = 20, width: int = 6) -> nn.Embedding:
    module = nn.Embedding(rows, width)
    nn.init.normal_(module.weight, generator=generator(seed))
    return module


def controlled(
    module: nn.Module, optimizer: torch.optim.Optimizer, density: float = 0.4, **options: Any
) -> DSLController:
    defaults = {"total_steps": 40, "update_interval": 4, "init": "exact", "generator": generator()}
    return DSLController(module, optimizer, density, **{**defaults, **options})


def train(module: nn.Embedding, optimizer: torch.optim.Optimizer, step: Any, steps: int, seed: int = 5) -> None:
    """Rows of random batches are pulled towards fixed targets, so most gradients of a step are 0."""
    source = generator(seed)
    target = torch.randn(module.weight.shape, generator=source)
    for _ in range(steps):
        ids = torch.randint(len(target), (6,), generator=source)
        optimizer.zero_grad()
        (module(ids) - target[ids]).square().sum().backward()
        step()


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "fused": lambda p: torch.optim.Adam(p, lr=0.05, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("growth", ["gradient", "random"])
def test_inactive_weights_are_zero_and_the_budget_exact_after_every_step(name, growth):
    module = table()
    optimizer = OPTIMIZERS[name](module.parameters())
    controller = controlled(module, optimizer, growth=growth)
    budget = round(0.4 * module.weight.numel())
    masks, start = set(), module.weight.detach().clone()

    def step() -> None:
        controller.step()
        mask = controller.masks["weight"]
        assert mask.dtype == torch.bool
        assert int(mask.sum()) == budget
        assert not module.weight[~mask].any()
        momentum = optimizer.state[module.weight].get("momentum_buffer")
        assert momentum is None or not momentum[~mask].any()
        masks.add(tuple(mask.flatten().tolist()))

    train(module, optimizer, step, 40)
    assert len(masks) > 4
    assert not torch.equal(start, module.weight)


def test_budget_over_a_thousand_updates_with_zero_and_tied_gradients():
    module = table(rows=8, width=4)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    controller = controlled(module, optimizer, 0.3, total_steps=1000, update_interval=1)
    source = generator(3)
    for number in range(1000):
        kind = number % 4
        gradient = torch.randn(8, 4, generator=source)
        if kind == 1:
            gradient.zero_()
        elif kind == 2:
            gradient = gradient.sign()
        elif kind == 3:
            gradient[1:] = 0
        module.weight.grad = gradient
        controller.step()
        assert int(controller.masks["weight"].sum()) == round(0.3 * 32)
        assert not module.weight[~controller.masks["weight"]].any()


def test_full_density_is_dense_training():
    plain, sparse = table(), table()
    optimizers = [torch.optim.Adam(module.parameters(), lr=0.05) for module in (plain, sparse)]
    controller = controlled(sparse, optimizers[1], 1.0)
    train(plain, optimizers[0], optimizers[0].step, 40)
    train(sparse, optimizers[1], controller.step, 40)
    assert torch.equal(plain.weight, sparse.weight)


@pytest.mark.parametrize("options", [{"stop_fraction": 0.0}, {"initial_ratio": 0.0, "minimum_ratio": 0.0}])
def test_a_static_mask_never_changes(options):
    module = table()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    controller = controlled(module, optimizer, **options)
    before = controller.masks["weight"].clone()
    train(module, optimizer, controller.step, 40)
    assert torch.equal(controller.masks["weight"], before)
    assert controller.explored_fraction() == controller.density() == 0.4


def test_updates_come_at_the_interval_and_stop():
    module = table()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    controller = controlled(module, optimizer, stop_fraction=0.5, minimum_ratio=0.1)
    changed = []
    old = controller.masks["weight"].clone()

    def step() -> None:
        nonlocal old
        controller.step()
        if not torch.equal(controller.masks["weight"], old):
            changed.append(controller.steps)
        old = controller.masks["weight"].clone()

    train(module, optimizer, step, 60)
    assert changed == [4, 8, 12, 16, 20]


def test_no_update_after_the_last_step():
    module = table()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    controller = controlled(module, optimizer, total_steps=8)
    train(module, optimizer, controller.step, 8)
    last = controller.masks["weight"].clone()
    train(module, optimizer, controller.step, 8)
    assert torch.equal(controller.masks["weight"], last)
    assert not module.weight[~last].any()


def test_attached_to_the_optimizer_it_does_what_step_does():
    own, hooked = table(), table()
    optimizers = [torch.optim.Adam(module.parameters(), lr=0.05) for module in (own, hooked)]
    controllers = [controlled(module, optimizer) for module, optimizer in zip((own, hooked), optimizers, strict=True)]
    assert controllers[1].attach() is controllers[1]
    train(own, optimizers[0], controllers[0].step, 20)
    train(hooked, optimizers[1], optimizers[1].step, 20)
    assert torch.equal(own.weight, hooked.weight)
    assert torch.equal(controllers[0].masks["weight"], controllers[1].masks["weight"])
    train(hooked, optimizers[1], controllers[1].step, 4)  # not twice per step
    assert controllers[1].steps == 24
    with pytest.raises(RuntimeError, match="attached"):
        controllers[1].attach()


def test_removed_the_weights_become_dense_again():
    module = table()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    controller = controlled(module, optimizer).attach()
    train(module, optimizer, optimizer.step, 8)
    controller.remove()
    train(module, optimizer, optimizer.step, 20)
    assert (module.weight != 0).all()
    for call in (controller.step, controller.attach):
        with pytest.raises(RuntimeError, match="removed"):
            call()


def test_step_passes_the_closure_on():
    module = table()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    controller = controlled(module, optimizer)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = module.weight.square().sum()
        loss.backward()
        return loss

    before = float(module.weight.detach().square().sum())
    assert float(controller.step(closure).detach()) == pytest.approx(before)


@pytest.mark.parametrize("reset", [True, False])
def test_state_of_newly_active_positions(reset):
    module = table()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    controller = controlled(module, optimizer, reset_new_state=reset)
    train(module, optimizer, controller.step, 3)
    old = controller.masks["weight"].clone()
    train(module, optimizer, controller.step, 1)
    new = controller.masks["weight"] & ~old
    kept = controller.masks["weight"] & old
    assert new.any()
    moments = [optimizer.state[module.weight][key] for key in ("exp_avg", "exp_avg_sq")]
    assert all(bool(moment[new].any()) != reset for moment in moments)
    assert all(moment[kept].any() for moment in moments)
    assert not module.weight[new].any()


def test_accumulated_gradients_choose_instead_of_the_last_one():
    weight = torch.tensor([[5.0, 1.0, 0.0, 0.0]])
    chosen = {}
    for accumulate in (False, True):
        module = nn.Embedding.from_pretrained(weight.clone(), freeze=False)
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
        controller = DSLController(
            module, optimizer, total_steps=4, update_interval=2, masks={"weight": weight != 0}, accumulate_grad=accumulate
        )  # fmt: skip
        for gradient in ([0.0, 0.0, 9.0, 0.0], [0.0, 0.0, 0.0, 1.0]):
            module.weight.grad = torch.tensor([gradient])
            controller.step()
        chosen[accumulate] = controller.masks["weight"].flatten().tolist()
        for gradient in ([0.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]):  # the sum starts anew after an update
            module.weight.grad = torch.tensor([gradient])
            controller.step()
        assert controller.masks["weight"].flatten().tolist() == [True, True, False, False]
    assert chosen == {False: [True, False, False, True], True: [True, False, True, False]}


def test_sparse_gradients_give_the_masks_of_dense_ones():
    modules = [nn.Embedding(20, 6, sparse=sparse) for sparse in (False, True)]
    controllers = []
    for module in modules:
        nn.init.normal_(module.weight, generator=generator())
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        controllers.append(controlled(module, optimizer, accumulate_grad=len(controllers) == 2))
        train(module, optimizer, controllers[-1].step, 40)
    assert modules[1].weight.grad.is_sparse
    torch.testing.assert_close(modules[0].weight, modules[1].weight)
    assert torch.equal(controllers[0].masks["weight"], controllers[1].masks["weight"])
    assert controllers[0].explored_fraction() > 0.45


def test_sparse_gradients_are_accumulated_too():
    module = nn.Embedding(20, 6, sparse=True)
    optimizer = torch.optim.SparseAdam(module.parameters(), lr=0.05)
    controller = controlled(module, optimizer, accumulate_grad=True)
    train(module, optimizer, controller.step, 40)
    assert int(controller.masks["weight"].sum()) == 48
    assert not module.weight[~controller.masks["weight"]].any()


def test_two_tensors_keep_their_own_budgets():
    module = nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 4))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    controller = controlled(module, optimizer, 0.5, init="magnitude")
    assert set(controller.masks) == {"0.weight", "1.weight"}  # not the biases
    before = {name: int(mask.sum()) for name, mask in controller.masks.items()}
    assert sum(before.values()) == 56
    source = generator()
    for _ in range(12):
        optimizer.zero_grad()
        module(torch.randn(16, 10, generator=source)).square().sum().backward()
        controller.step()
    assert {name: int(mask.sum()) for name, mask in controller.masks.items()} == before
    assert module[0].bias.all()
    for name, mask in controller.masks.items():
        assert not module.get_parameter(name)[~mask].any()


def test_select_chooses_by_name():
    module = nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 4))
    optimizer = torch.optim.Adam(module.parameters())
    controller = controlled(module, optimizer, select=lambda name, p: name.endswith("bias"))
    assert set(controller.masks) == {"0.bias", "1.bias"}
    assert module[0].weight.all()


def test_bernoulli_masks_are_the_default():
    module = table(rows=400)
    controller = DSLController(module, torch.optim.Adam(module.parameters()), total_steps=1, update_interval=1)
    assert 0 < abs(controller.density() - 0.5) < 0.1


def test_explored_fraction_grows_from_the_density():
    module = table()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    controller = controlled(module, optimizer)
    seen = [controller.explored_fraction()]
    union = controller.masks["weight"].clone()

    def step() -> None:
        controller.step()
        union.logical_or_(controller.masks["weight"])
        seen.append(controller.explored_fraction())

    train(module, optimizer, step, 40)
    assert seen[0] == 0.4
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(float(union.float().mean()))
    assert seen[-1] > 0.5


@pytest.mark.parametrize("growth", ["gradient", "random"])
def test_a_restored_controller_goes_on_identically(growth):
    options = {"growth": growth, "accumulate_grad": growth == "gradient"}
    whole = table()
    optimizer = torch.optim.Adam(whole.parameters(), lr=0.05)
    controller = controlled(whole, optimizer, **options)
    train(whole, optimizer, controller.step, 6)  # between two updates
    state = {key: value.clone() for key, value in controller.state_dict().items()}
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    parameters, moments = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))

    again = table(seed=9)
    other = torch.optim.Adam(again.parameters(), lr=0.05)
    restored = controlled(again, other, generator=generator(99), **options)
    again.load_state_dict(parameters)
    other.load_state_dict(moments)
    restored.load_state_dict(state)
    train(whole, optimizer, controller.step, 20, seed=7)
    train(again, other, restored.step, 20, seed=7)
    assert torch.equal(whole.weight, again.weight)
    assert torch.equal(controller.masks["weight"], restored.masks["weight"])
    assert controller.explored_fraction() == restored.explored_fraction()
    assert restored.steps == 26


def test_state_is_a_copy_and_must_fit():
    module = table()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    controller = controlled(module, optimizer)
    state = controller.state_dict()
    before = state["mask.weight"].clone()
    train(module, optimizer, controller.step, 8)
    assert torch.equal(state["mask.weight"], before)
    with pytest.raises(ValueError, match=r"gradient\.weight"):
        controller.load_state_dict({**state, "gradient.weight": torch.zeros(20, 6)})
    with pytest.raises(ValueError, match="explored"):
        controller.load_state_dict({k: v for k, v in state.items() if not k.startswith("explored")})
    with pytest.raises(ValueError, match=r"\(20, 6\)"):
        controller.load_state_dict({**state, "mask.weight": torch.ones(3, dtype=torch.bool)})


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"density": 0.0}, "density"),
        ({"density": 1.5}, "density"),
        ({"total_steps": 0}, "total_steps"),
        ({"update_interval": 0}, "update_interval"),
        ({"initial_ratio": 1.1}, "ratio"),
        ({"minimum_ratio": -0.1}, "ratio"),
        ({"stop_fraction": 2.0}, "stop_fraction"),
        ({"prune": "set"}, "prune"),
        ({"growth": "momentum"}, "growth"),
        ({"init": "lottery"}, "init"),
        ({"masks": {"weight": torch.ones(3)}}, "shapes"),
        ({"masks": {"weight": torch.full((20, 6), 0.5)}}, "binary"),
        ({"masks": {"weight": torch.zeros(20, 6)}}, "no active position"),
        ({"masks": {"other": torch.ones(20, 6)}}, "other"),
        ({"density": 0.001}, "larger density"),
        ({"select": lambda name, parameter: False}, "no parameter"),
    ],
)
def test_bad_options_of_the_controller(options, word):
    module = table()
    before = module.weight.detach().clone()
    with pytest.raises(ValueError, match=word):
        controlled(module, torch.optim.Adam(module.parameters()), **options)
    assert torch.equal(module.weight, before)


def test_parameters_of_another_optimizer_are_refused():
    with pytest.raises(ValueError, match="optimizer"):
        controlled(table(), torch.optim.Adam(table().parameters()))


def test_an_update_needs_gradients():
    module = table()
    controller = controlled(module, torch.optim.Adam(module.parameters()), update_interval=2)
    controller.step()
    with pytest.raises(RuntimeError, match="gradient"):
        controller.step()


# --- sparse form --------------------------------------------------------------------------------------------------


def test_compressed_copies_hold_the_weights_and_cost_what_they_should(tmp_path):
    module = table(rows=300, width=64)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    controller = controlled(module, optimizer, 0.1)
    train(module, optimizer, controller.step, 6)
    stored_table = controller.compress()["weight"]
    assert stored_table.layout == torch.sparse_csr
    assert torch.equal(stored_table.to_dense(), module.weight)
    stored = stored_table.values().numel()
    assert stored == int((module.weight != 0).sum()) <= 1920
    assert csr_bytes(stored_table) == 8 * stored + 4 * 301
    assert csr_bytes(stored_table) <= 2 * 0.1 * module.weight.nbytes + 4 * 301

    lookup = SparseEmbedding(stored_table)
    assert lookup.nbytes == 5 * stored + 4 * 301
    ids = torch.tensor([[0, 299, 7], [7, 7, 30]])
    assert torch.equal(lookup(ids), module.weight[ids])
    assert lookup(torch.empty(0, dtype=torch.int64)).shape == (0, 64)

    size = save_compressed(tmp_path / "tables.safetensors", {"weight": stored_table, "bias": torch.arange(3)})
    assert size == (tmp_path / "tables.safetensors").stat().st_size
    assert 5 * stored < size < 5 * stored + 4 * 301 + 2000
    read = load_compressed(tmp_path / "tables.safetensors")
    assert torch.equal(read["weight"].to_dense(), module.weight)
    assert read["bias"].tolist() == [0, 1, 2]
    module.weight.data.zero_()
    assert stored_table.values().all()  # a copy


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4), (3, 300), (2, 40000), (4, 1)])
def test_every_shape_and_width_survives_the_file(tmp_path, shape):
    weight = torch.randn(shape, generator=generator()).double() * random_mask(shape, 0.4, generator=generator(1))
    rows = weight.view(1, -1) if len(shape) == 1 else weight.flatten(1)
    save_compressed(tmp_path / "t", {"w": to_csr(weight)})
    read = load_compressed(tmp_path / "t")["w"]
    assert torch.equal(read.to_dense(), rows)
    assert torch.equal(SparseEmbedding(read)(torch.arange(len(rows))), rows)


def test_rows_without_entries():
    weight = torch.zeros(4, 3)
    weight[2, 1] = 7
    lookup = SparseEmbedding(to_csr(weight))
    assert torch.equal(lookup(torch.tensor([0, 2, 3, 2])), weight[[0, 2, 3, 2]])
    assert not SparseEmbedding(to_csr(torch.zeros(4, 3)))(torch.arange(4)).any()


def test_other_files_and_layouts_are_refused(tmp_path):
    from recsys_losses._storage import write_tensors

    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_compressed(tmp_path / "nowhere")
    write_tensors(tmp_path / "other", {"a": torch.ones(1)}, {"kind": "something"})
    with pytest.raises(ValueError, match="something"):
        load_compressed(tmp_path / "other")
    save_compressed(tmp_path / "t", {"w": to_csr(torch.eye(3))})
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(tmp_path / "t", framework="pt") as file:
        metadata = file.metadata()
        parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file({**parts, "0.column": torch.tensor([0, 1, 9], dtype=torch.uint8)}, tmp_path / "t", metadata=metadata)
    with pytest.raises(ValueError, match="damaged"):
        load_compressed(tmp_path / "t")
    with pytest.raises(ValueError, match="layout"):
        save_compressed(tmp_path / "t", {"w": torch.eye(3).to_sparse()})
    with pytest.raises(ValueError, match="CSR"):
        SparseEmbedding(torch.eye(3))
    with pytest.raises(ValueError, match="scalar"):
        to_csr(torch.tensor(1.0))


def test_costs_count_unmasked_parameters_in_full():
    module = nn.Linear(6, 4)
    mask = random_mask((4, 6), 0.25, exact=True, generator=generator())
    assert count_costs(module, {"weight": mask}) == {"nonzero": 10, "dense": 28, "ratio": 10 / 28}
    assert count_costs(module, {})["ratio"] == 1
    with pytest.raises(ValueError, match="unknown"):
        count_costs(module, {"weights": mask})
    with pytest.raises(ValueError, match="shapes"):
        count_costs(module, {"weight": mask.T})
    with pytest.raises(ValueError, match="no parameters"):
        count_costs(nn.ReLU(), {})
