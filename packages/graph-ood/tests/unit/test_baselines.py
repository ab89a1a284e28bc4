"""The comparison methods: their equations, their limits, and short runs on generated graphs."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader

from graph_ood.baselines import (
    METHODS,
    STRENGTHS,
    GroupDRO,
    drop_edge,
    environment_risks,
    group_dro_loss,
    irm_penalty,
    mixup,
    train_baseline,
    vrex_penalty,
)
from graph_ood.nets import ConvStack, GraphClassifier
from graph_ood.training import evaluate

F64 = torch.float64
ENV = torch.tensor([2, 0, 2, 1, 0, 2, 1])
TARGET = torch.tensor([0, 1, 2, 0, 1, 2, 2])


def _logits(scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(7, 3, dtype=F64, generator=torch.Generator().manual_seed(0))


def _losses() -> torch.Tensor:
    return torch.rand(7, dtype=F64, generator=torch.Generator().manual_seed(1))


def _risk(logits: torch.Tensor, env: int, scale: float = 1.0) -> torch.Tensor:
    return F.cross_entropy(scale * logits[env == ENV], TARGET[env == ENV])


# --- risks of environments ----------------------------------------------------------------------------------------


def test_risks_are_the_means_of_the_environments():
    losses = _losses()
    risks, present = environment_risks(losses, ENV, num_envs=4)
    want = [losses[e == ENV].mean() for e in range(3)]
    torch.testing.assert_close(risks, torch.stack([*want, torch.zeros((), dtype=F64)]))
    assert present.tolist() == [True, True, True, False]


def test_ids_may_be_anything_where_the_number_is_left_open():
    losses = _losses()
    renamed = torch.tensor([70, -5, 6])[ENV]  # the ascending order is 1, 2, 0
    dense = environment_risks(losses, ENV, num_envs=3)[0]
    torch.testing.assert_close(environment_risks(losses, renamed)[0], dense[[1, 2, 0]])
    for penalty in (partial(vrex_penalty, losses), partial(irm_penalty, _logits(), TARGET)):
        torch.testing.assert_close(penalty(renamed), penalty(ENV, num_envs=3))


# --- IRM ----------------------------------------------------------------------------------------------------------


def test_irm_is_the_squared_slope_of_the_risk_in_a_scale_of_the_logits():
    logits, step = _logits(), 1e-5
    slopes = [(_risk(logits, e, 1 + step) - _risk(logits, e, 1 - step)) / (2 * step) for e in range(3)]
    want = torch.stack(slopes).square().mean()
    torch.testing.assert_close(irm_penalty(logits, TARGET, ENV), want, rtol=1e-8, atol=0)


def test_irm_is_what_a_dummy_scale_and_a_second_backward_pass_give():
    # The form of the authors' program, gradient included.
    ours, theirs = (_logits().requires_grad_() for _ in range(2))
    scale = torch.ones((), dtype=F64, requires_grad=True)
    slopes = [torch.autograd.grad(_risk(theirs, e, scale), scale, create_graph=True)[0] for e in range(3)]
    torch.stack(slopes).square().mean().backward()
    irm_penalty(ours, TARGET, ENV, num_envs=3).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_irm_gradient():
    assert torch.autograd.gradcheck(lambda z: irm_penalty(z, TARGET, ENV, num_envs=3), _logits().requires_grad_())


def test_irm_is_zero_where_the_scale_of_the_logits_is_the_best_one():
    # Environment 0 holds three rows of class 0 and one of class 1: log-odds log 3 are optimal.
    target, env = torch.tensor([0, 0, 0, 1]), torch.zeros(4, dtype=torch.int64)
    best = torch.tensor([math.log(3.0), 0.0], dtype=F64).expand(4, -1)
    assert irm_penalty(best, target, env).item() == pytest.approx(0.0, abs=1e-15)
    assert irm_penalty(2 * best, target, env).item() > 1e-2


def test_a_missing_environment_does_not_change_the_penalties():
    torch.testing.assert_close(
        irm_penalty(_logits(), TARGET, ENV, num_envs=9), irm_penalty(_logits(), TARGET, ENV, num_envs=3)
    )
    torch.testing.assert_close(vrex_penalty(_losses(), ENV, num_envs=9), vrex_penalty(_losses(), ENV, num_envs=3))


# --- V-REx --------------------------------------------------------------------------------------------------------


def test_vrex_is_the_variance_of_the_risks():
    losses = _losses()
    risks = torch.stack([losses[e == ENV].mean() for e in range(3)])
    torch.testing.assert_close(vrex_penalty(losses, ENV), risks.var(correction=0))
    assert torch.autograd.gradcheck(lambda x: vrex_penalty(x, ENV, num_envs=4), losses.requires_grad_())


def test_vrex_is_zero_for_equal_risks_and_for_one_environment():
    equal = torch.tensor([1.0, 3.0, 2.0, 2.0], dtype=F64)
    assert vrex_penalty(equal, torch.tensor([0, 0, 1, 2])).item() == 0.0
    assert vrex_penalty(_losses(), torch.zeros(7, dtype=torch.int64), num_envs=3).item() == 0.0


@given(shift=st.floats(-5, 5), scale=st.floats(-3, 3))
@settings(derandomize=True, deadline=None, max_examples=50)
def test_vrex_ignores_a_shift_and_is_quadratic_in_a_scale(shift, scale):
    want = scale**2 * vrex_penalty(_losses(), ENV).item()
    assert vrex_penalty(scale * _losses() + shift, ENV).item() == pytest.approx(want, abs=1e-12)


# --- GroupDRO -----------------------------------------------------------------------------------------------------


def test_group_dro_without_a_step_is_the_mean_of_the_risks():
    uniform = torch.full((3,), -math.log(3.0), dtype=F64)
    loss, moved = group_dro_loss(_losses(), ENV, uniform, step_size=0.0)
    torch.testing.assert_close(loss, environment_risks(_losses(), ENV)[0].mean())
    torch.testing.assert_close(moved, uniform)


def test_group_dro_follows_the_multiplicative_update():
    risks, weights = environment_risks(_losses(), ENV)[0], torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    loss, moved = group_dro_loss(_losses(), ENV, weights.log(), step_size=0.7)
    raised = weights * (0.7 * risks).exp()
    torch.testing.assert_close(moved.exp(), raised / raised.sum())
    torch.testing.assert_close(loss, (raised / raised.sum() * risks).sum())


def test_group_dro_gradient_treats_the_weights_as_constants():
    losses = _losses().requires_grad_()
    loss, moved = group_dro_loss(losses, ENV, torch.zeros(3, dtype=F64), step_size=0.7)
    loss.backward()
    count = torch.bincount(ENV)
    torch.testing.assert_close(losses.grad, moved.exp()[ENV] / count[ENV])
    assert not moved.requires_grad


@given(loss=st.lists(st.floats(0, 10), min_size=7, max_size=7), step=st.floats(0, 5))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_group_dro_lies_between_the_mean_and_the_worst_environment(loss, step):
    losses = torch.tensor(loss, dtype=F64)
    risks = environment_risks(losses, ENV)[0]
    value, moved = group_dro_loss(losses, ENV, torch.zeros(3, dtype=F64), step_size=step)
    assert risks.mean().item() - 1e-9 <= value.item() <= risks.max().item() + 1e-9
    assert moved.exp().sum().item() == pytest.approx(1.0)


def test_group_dro_weights_concentrate_on_the_worst_and_come_back():
    objective = GroupDRO(2, step_size=1.0)
    env = torch.tensor([0, 1])
    for _ in range(300):  # in plain numbers the other weight would have been rounded to 0, for ever
        objective(torch.tensor([0.0, 1.0]), env)
    assert objective.weights.tolist() == [pytest.approx(0.0, abs=1e-30), pytest.approx(1.0)]
    for _ in range(310):
        objective(torch.tensor([1.0, 0.0]), env)
    assert objective.weights[0] > 0.99


def test_group_dro_state_is_its_weights():
    first, second = GroupDRO(3, 0.5), GroupDRO(3, 0.5)
    first(_losses().float(), ENV)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(_losses().float(), ENV), second(_losses().float(), ENV))
    assert repr(first) == "GroupDRO(num_envs=3, step_size=0.5)"


def test_an_absent_environment_adds_nothing():
    losses, env = _losses()[:4], torch.tensor([0, 0, 1, 1])
    loss, moved = group_dro_loss(losses, env, torch.zeros(3, dtype=F64), step_size=0.4)
    risks = environment_risks(losses, env, num_envs=3)[0]
    torch.testing.assert_close(moved, (0.4 * risks).log_softmax(0))
    torch.testing.assert_close(loss, (moved.exp()[:2] * risks[:2]).sum())


# --- mixup --------------------------------------------------------------------------------------------------------


def test_mixup_mixes_rows_and_repeats():
    h, y = torch.eye(6, dtype=F64), torch.arange(6)
    mixed = mixup(h, y, alpha=0.5, generator=torch.Generator().manual_seed(3))
    again = mixup(h, y, alpha=0.5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(mixed.h, again.h)
    assert mixed.share == again.share
    assert 0 < mixed.share < 1
    assert sorted(mixed.partner.tolist()) == list(range(6))
    torch.testing.assert_close(mixed.h, mixed.share * h + (1 - mixed.share) * h[mixed.partner])


def test_mixup_share_follows_its_beta_distribution():
    generator = torch.Generator().manual_seed(0)
    h, y = torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64)
    for alpha in (0.3, 4.0):
        shares = torch.tensor([mixup(h, y, alpha=alpha, generator=generator).share for _ in range(3000)])
        variance = 1 / (4 * (2 * alpha + 1))
        assert shares.mean().item() == pytest.approx(0.5, abs=4 * math.sqrt(variance / 3000))
        assert shares.var().item() == pytest.approx(variance, rel=0.1)


def test_mixup_without_alpha_is_the_identity_and_draws_nothing():
    h, y = torch.randn(4, 2), torch.arange(4)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    mixed = mixup(h, y, alpha=0.0, generator=generator)
    assert mixed.h is h
    assert mixed.partner is y
    assert mixed.share == 1.0
    assert torch.equal(generator.get_state(), before)


# --- DropEdge -----------------------------------------------------------------------------------------------------


def _ring(n: int) -> torch.Tensor:
    forward = torch.stack([torch.arange(n), (torch.arange(n) + 1) % n])
    return torch.cat([forward, forward.flip(0)], 1)


def _set(edges: torch.Tensor) -> set[tuple[int, int]]:
    return {(int(i), int(j)) for i, j in edges.T}


def test_dropped_edges_lose_both_directions():
    ring = _ring(50)
    left = drop_edge(ring, 0.4, generator=torch.Generator().manual_seed(0))
    assert _set(left) < _set(ring)
    assert {(j, i) for i, j in _set(left)} == _set(left)
    assert len(_set(left)) == left.shape[1]


@pytest.mark.parametrize("undirected", [True, False])
def test_the_share_of_dropped_edges(undirected):
    left = drop_edge(_ring(5000), 0.3, undirected=undirected, generator=torch.Generator().manual_seed(1))
    assert left.shape[1] / 10_000 == pytest.approx(0.7, abs=4 * math.sqrt(0.21 / 5000))


def test_directed_edges_keep_their_order_and_may_lose_one_direction():
    ring = _ring(50)
    left = drop_edge(ring, 0.4, undirected=False, generator=torch.Generator().manual_seed(0))
    place = [ring.T.tolist().index(edge) for edge in left.T.tolist()]
    assert place == sorted(place)
    assert {(j, i) for i, j in _set(left)} != _set(left)


def test_self_loops_stay_single_and_no_edge_is_no_problem():
    loops = torch.tensor([[0, 1, 1, 2], [0, 2, 1, 1]])
    assert _set(drop_edge(loops, 1e-12)) == _set(loops)
    assert drop_edge(loops, 1e-12).shape == loops.shape
    assert drop_edge(loops[:, :0], 0.5).shape == (2, 0)
    assert drop_edge(loops, 0.0) is loops


# --- numerics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_float32(dtype):
    losses = torch.full((4097,), 0.5, dtype=dtype)  # bfloat16 counts to 256 only
    env = torch.zeros(4097, dtype=torch.int64)
    env[0] = 1
    assert environment_risks(losses, env)[0].tolist() == [0.5, 0.5]
    assert vrex_penalty(losses, env).item() == 0.0
    assert irm_penalty(_logits().to(dtype), TARGET, ENV).dtype == torch.float32


def test_large_logits_stay_finite():
    logits = torch.tensor([[3e4, 0.0], [0.0, 3e4]], dtype=torch.float32, requires_grad=True)
    penalty = irm_penalty(logits, torch.tensor([1, 1]), torch.tensor([0, 1]))
    penalty.backward()
    assert penalty.item() == pytest.approx(3e4**2 / 2)
    assert logits.grad.isfinite().all()


def test_nothing_waits_for_the_device():
    # A meta tensor holds no data, so whatever would read a value on the host fails here.
    logits = torch.zeros(7, 3, device="meta", requires_grad=True)
    env, target = ENV.to("meta"), TARGET.to("meta")
    losses = logits.sum(1)
    loss = irm_penalty(logits, target, env, num_envs=3) + vrex_penalty(losses, env, num_envs=3)
    loss = loss + group_dro_loss(losses, env, torch.zeros(3, device="meta"))[0]
    assert torch.autograd.grad(loss, logits)[0].shape == (7, 3)


# --- training -----------------------------------------------------------------------------------------------------


def _graphs(count: int = 48, *, env: bool = True) -> list[Data]:
    """Rings of 4 to 6 nodes whose class shows in one noisy feature; environments 10, 20, 30."""
    generator = torch.Generator().manual_seed(5)
    graphs = []
    for i in range(count):
        n, y = 4 + i % 3, i % 2
        x = torch.randn(n, 2, generator=generator)
        x[:, 0] += 2 * y
        extra = {"env_id": torch.tensor([10 * (1 + i // 2 % 3)])} if env else {}
        graphs.append(Data(x=x, edge_index=_ring(n), y=torch.tensor([y]), **extra))
    return graphs


def _model() -> GraphClassifier:
    torch.manual_seed(0)
    return GraphClassifier(ConvStack(2, 8, 2), 2)


def _train(method: str, strength: float | None = None, **options):
    graphs = _graphs()
    model = _model()
    train, val = DataLoader(graphs[:36], 12, shuffle=True), DataLoader(graphs[36:], 12)
    options = {"epochs": 3, "lr": 0.01, "seed": 1, **options}
    history = train_baseline(model, train, val, method=method, strength=strength, **options)
    return model, history


def _same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("method", ["irm", "vrex", "mixup", "drop-edge"])
def test_strength_zero_is_erm_bit_for_bit(method):
    erm, plain = _train("erm")
    model, history = _train(method, 0.0)
    assert _same(model, erm)
    assert [r["loss"] for r in history.records] == [r["loss"] for r in plain.records]


@pytest.mark.parametrize("method", METHODS)
def test_each_method_does_something_of_its_own(method):
    model, history = _train(method)
    assert [record["epoch"] for record in history.records] == [0, 1, 2]
    assert history.best["val_accuracy"] == max(record["val_accuracy"] for record in history.records)
    if method != "erm":
        assert not _same(model, _train("erm")[0])


@pytest.mark.parametrize("method", METHODS)
def test_each_method_learns_an_easy_task(method):
    graphs = _graphs(96)
    model = _model()
    train_baseline(model, DataLoader(graphs[:64], 16, shuffle=True), method=method, epochs=12, lr=0.02)
    model.eval()
    assert evaluate(model, DataLoader(graphs[64:], 32)) > 0.85


def test_a_heavy_variance_penalty_brings_the_risks_together():
    spread = {}
    for strength in (0.0, 100.0):
        graphs = _graphs()
        for graph in graphs:  # one environment has half of its labels the wrong way round
            if graph.env_id == 30 and graph.x[0, 1] > 0:
                graph.y = 1 - graph.y
        model = _model()
        train_baseline(
            model, DataLoader(graphs, 48, shuffle=True), method="vrex", strength=strength, epochs=30, lr=0.01
        )
        batch = next(iter(DataLoader(graphs, 48)))
        spread[strength] = vrex_penalty(F.cross_entropy(model(batch), batch.y, reduction="none"), batch.env_id).item()
    assert spread[100.0] < 0.5 * spread[0.0]


@pytest.mark.parametrize("method", ["group-dro", "mixup", "drop-edge"])
def test_an_interrupted_run_ends_the_same(tmp_path, method):
    whole, history = _train(method, epochs=4)

    class Interrupt(Exception):
        pass

    def stop(record: dict[str, float]) -> None:
        if record["epoch"] == 1:
            raise Interrupt

    file = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Interrupt):
        _train(method, epochs=4, checkpoint=file, on_epoch=stop)
    resumed, again = _train(method, epochs=4, checkpoint=file)
    assert _same(resumed, whole)
    assert [r["loss"] for r in again.records] == [r["loss"] for r in history.records]


def test_a_checkpoint_of_another_method_is_refused(tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    _train("vrex", epochs=1, checkpoint=file)
    with pytest.raises(ValueError, match=r"method \(was 'vrex', is 'irm'\)"):
        _train("irm", epochs=2, checkpoint=file)
    with pytest.raises(ValueError, match=r"strength \(was 10.0, is 3.0\)"):
        _train("vrex", 3.0, epochs=2, checkpoint=file)


def test_environments_are_not_needed_where_they_are_not_used():
    graphs = _graphs(24, env=False)
    for method in ("erm", "mixup", "drop-edge"):
        history = train_baseline(_model(), DataLoader(graphs, 12, shuffle=True), method=method, epochs=1)
        assert math.isfinite(history.records[0]["loss"])


# --- bad input ----------------------------------------------------------------------------------------------------

L, Z = torch.zeros(7), torch.zeros(7, 3)

BAD_ARGUMENTS = [
    (lambda: environment_risks(L, ENV[:3]), r"got \(7,\) and \(3,\)"),
    (lambda: environment_risks(L[:0], ENV[:0]), "empty batch"),
    (lambda: environment_risks(L.long(), ENV), r"losses must be a floating-point tensor, got torch.int64"),
    (lambda: environment_risks(L, ENV.float()), r"env_id must be an int64 tensor, got torch.float32"),
    (lambda: environment_risks(L, ENV, num_envs=2), r"env_id must be in \[0, 2\), got 0 to 2"),
    (lambda: environment_risks(L, ENV - 1, num_envs=3), r"env_id must be in \[0, 3\), got -1 to 1"),
    (lambda: environment_risks(L, ENV, num_envs=0), r"num_envs must be an integer >= 1, got 0"),
    (lambda: irm_penalty(Z, TARGET[:3], ENV), "target"),
    (lambda: irm_penalty(Z, TARGET + 1, ENV), r"target must be in \[0, 3\), got 1 to 3"),
    (lambda: irm_penalty(Z, TARGET, ENV[:3]), "env_id"),
    (lambda: vrex_penalty(L, ENV[:3]), "env_id"),
    (lambda: group_dro_loss(L, ENV, torch.zeros(2)), r"env_id must be in \[0, 2\)"),
    (lambda: group_dro_loss(L, ENV, torch.zeros(3, 1)), r"log_weights must be a floating-point tensor \(E,\)"),
    (lambda: group_dro_loss(L, ENV, torch.zeros(3), step_size=-1.0), r"step_size must be a finite number >= 0, got -1"),
    (lambda: GroupDRO(1), r"num_envs must be an integer >= 2, got 1"),
    (lambda: GroupDRO(2, math.nan), "step_size"),
    (lambda: mixup(Z, TARGET, alpha=-0.5), r"alpha must be a finite number >= 0, got -0.5"),
    (lambda: mixup(Z, TARGET[:2]), r"got \(7, 3\) and \(2,\)"),
    (lambda: mixup(Z[:0], TARGET[:0]), "empty batch"),
    (
        lambda: drop_edge(torch.zeros(3, 4, dtype=torch.int64), 0.5),
        r"edge_index must have shape \(2, m\), got \(3, 4\)",
    ),
    (lambda: drop_edge(_ring(3), 1.0), r"p must be in \[0, 1\), got 1.0"),
    (lambda: drop_edge(_ring(3), math.nan), r"p must be in \[0, 1\), got nan"),
    (lambda: _train("vrx"), r"unknown method 'vrx'.*did you mean 'vrex'"),
    (lambda: _train("irm", -1.0), r"strength must be a finite number >= 0, got -1"),
    (lambda: _train("erm", 0.5), r"strength must be 0 or None for method 'erm', got 0.5"),
    (lambda: _train("drop-edge", 1.0), r"strength of method 'drop-edge' must be in \[0, 1\), got 1.0"),
]


@pytest.mark.parametrize(("call", "message"), BAD_ARGUMENTS, ids=range(len(BAD_ARGUMENTS)))
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("method", ["irm", "vrex", "group-dro"])
def test_bad_environments(method):
    graphs = _graphs(12)
    train = partial(train_baseline, _model(), method=method, epochs=1)
    single = [graph for graph in graphs if graph.env_id == 20]
    with pytest.raises(ValueError, match=r"at least 2 training environments, got \[20\]"):
        train(DataLoader(single, 4))
    graphs[3].env_id = torch.tensor([-1])
    with pytest.raises(ValueError, match=r"graph 3: env_id is -1, so its environment is unknown"):
        train(DataLoader(graphs, 4))
    del graphs[3].env_id
    with pytest.raises(ValueError, match=r"graph 3: env_id must be one int64 number, got nothing"):
        train(DataLoader(graphs, 4))


@pytest.mark.parametrize("y", [torch.tensor([2]), torch.tensor([-1]), torch.tensor([0.0]), torch.tensor([0, 1]), None])
def test_bad_labels(y):
    graphs = _graphs(12)
    graphs[5].y = y
    with pytest.raises(ValueError, match=r"y of training graph 5 must be one class in \[0, 2\)"):
        train_baseline(_model(), DataLoader(graphs, 4), epochs=1)


def test_every_method_has_a_strength_that_it_accepts():
    assert set(STRENGTHS) == set(METHODS)
    for method, strength in STRENGTHS.items():
        assert math.isfinite(_train(method, strength, epochs=1)[1].records[0]["loss"])
