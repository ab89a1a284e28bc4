from __future__ import annotations

import dataclasses

import pytest
import torch

from pref_opt import losses
from pref_opt.losses import (
    Logps,
    LossContext,
    LossOutput,
    PreferenceLoss,
    loss_names,
    make_loss,
    register_loss,
)

REFERENCE_FREE = {"simpo", "cpo", "slic", "orpo", "mppo", "gamma_po", "repo", "repo_plus_plus"}
NORMALIZED = {"dpo_norm", "simpo", "slic", "orpo", "gamma_po", "repo", "repo_plus_plus"}
MANY = {"sdpo", "dmpo", "mppo"}
COUPLED = {"kto_pair", "gamma_po"}
PAIRWISE = [
    *("dpo", "cdpo", "robust_dpo", "dpo_norm", "ipo", "simpo", "cpo", "slic", "orpo", "kto_pair"),
    *("sdpo", "dmpo", "mppo", "gamma_po", "repo", "repo_plus_plus"),
]


class Constant(PreferenceLoss):
    """A loss of the test's own with a counter as its state."""

    def __init__(self, value: float = 1.0) -> None:
        self.value = value
        self.calls = 0

    def __call__(self, logps: Logps, context: LossContext) -> LossOutput:
        self.calls += int(context.training)
        return LossOutput(self.value * logps.chosen.mean(), logps.chosen, logps.rejected)

    def state_dict(self) -> dict[str, int]:
        return {"calls": self.calls}


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(losses, "_REGISTERED", {})
    register_loss("constant", Constant)


@pytest.mark.parametrize("name", PAIRWISE)
def test_defaults_make_a_loss_with_gradient(name):
    loss = make_loss(name)
    assert (loss.requires_reference, loss.length_normalized) == (name not in REFERENCE_FREE, name in NORMALIZED)
    assert (loss.multi_negative, loss.couples_pairs, loss.wants_window) == (name in MANY, name in COUPLED, False)
    generator = torch.Generator().manual_seed(0)
    shape = (4, 3) if name in MANY else (4,)
    values = [-1 - torch.rand(size, generator=generator) for size in ((4,), shape, (4,), shape)]
    chosen, rejected = (x.requires_grad_() for x in values[:2])
    refs = values[2:] if loss.requires_reference else (None, None)
    out = loss(Logps(chosen, rejected, *refs, chosen_lengths=torch.full((4,), 3)), LossContext())
    out.loss.backward()
    assert out.loss.shape == ()
    assert (chosen.grad <= 0).all()
    assert (rejected.grad >= 0).all()
    assert chosen.grad.any()
    assert rejected.grad.any()
    assert out.chosen_rewards.shape == (4,)
    assert out.rejected_rewards.shape == shape
    assert all(value.shape == () and not value.requires_grad for value in out.metrics.values())
    loss.load_state_dict(make_loss(name).state_dict())


def test_each_call_makes_a_new_object():
    assert make_loss("gamma_po") is not make_loss("gamma_po")
    assert make_loss("dpo", beta=0.5).beta == 0.5


def test_unknown_names_and_options():
    with pytest.raises(ValueError, match=r"method must be one of .*'dpo'.*, got 'simp'; did you mean 'simpo'\?"):
        make_loss("simp")
    with pytest.raises(ValueError, match=r"method must be one of .*, got 'zzz'$"):
        make_loss("zzz")
    with pytest.raises(ValueError, match=r"method 'dpo' doesn't accept \{'gamma': 0\.4\}: .*gamma"):
        make_loss("dpo", gamma=0.4)
    with pytest.raises(ValueError, match=r"method 'dpo' doesn't accept \{'beta': 'high'\}"):
        make_loss("dpo", beta="high")


@pytest.mark.usefixtures("registered")
def test_a_registered_loss_is_made_by_name():
    assert loss_names()[-1] == "constant"
    loss = make_loss("constant", value=2.0)
    out = loss(Logps(torch.ones(3), torch.zeros(3)), LossContext())
    assert (out.loss.item(), out.metrics) == (2.0, {})
    with pytest.raises(ValueError, match=r"did you mean 'constant'\?"):
        make_loss("constat")
    with pytest.raises(ValueError, match=r"method 'constant' doesn't accept \{'weight': 1\}"):
        make_loss("constant", weight=1)


@pytest.mark.usefixtures("registered")
def test_built_in_names_are_taken():
    with pytest.raises(ValueError, match=r"name must not be that of a built-in loss, got 'dpo'"):
        register_loss("dpo", Constant)


def test_state_of_another_method_is_refused():
    queue = make_loss("gamma_po").state_dict()
    message = r"state of DPOLoss must have \[\], got \['history', 'num_pushes'\]; it was written by another method"
    with pytest.raises(ValueError, match=message):
        make_loss("dpo").load_state_dict(queue)
    with pytest.raises(ValueError, match=r"state of GammaPOLoss must have \['history', 'num_pushes'\], got \[\]"):
        make_loss("gamma_po").load_state_dict({})
    make_loss("dpo").load_state_dict({})


def test_base_class_needs_a_body():
    with pytest.raises(NotImplementedError):
        PreferenceLoss()(Logps(torch.ones(1), torch.ones(1)), LossContext())
    assert PreferenceLoss().prepare_window([], LossContext()) is None


def test_context_of_one_process_gathers_itself():
    values = torch.arange(3.0)
    context = LossContext()
    assert context.gather(values) is values
    assert (context.training, context.world_size, context.process_index) == (True, 1, 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        context.training = False
    assert Logps(values, values).features == {}
