from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from recsys_losses.mcrl import (
    MCRL,
    Caser,
    GRU4Rec,
    MCRLTrainer,
    NextItNet,
    ReplayBuffer,
    SASRec,
    SessionSimulator,
    double_q_target,
    evaluate_next_item,
    mcrl_loss,
    next_item_metrics,
    pad_histories,
)

BACKBONES = {"gru4rec": GRU4Rec, "caser": Caser, "nextitnet": NextItNet, "sasrec": SASRec}
I, L = 30, 6


def make(name: str, **options: Any):
    return BACKBONES[name](I, hidden=8, state_size=L, **options).double()


def states(rows: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    items = torch.randint(I, (rows, L), generator=generator)
    length = torch.randint(1, L + 1, (rows,), generator=generator)
    beyond = torch.arange(L) >= length[:, None]
    return items.masked_fill(beyond, I), length


def buffer(sessions: int = 60, seed: int = 1, state_size: int = L) -> ReplayBuffer:
    logs = SessionSimulator(num_items=I).logs(sessions, seed)
    return ReplayBuffer.from_sessions(logs, state_size=state_size, num_items=I)


def model(**options: Any) -> MCRL:
    return MCRL(I, hidden=8, state_size=L, **options)


# --- backbones ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
class TestBackbones:
    def test_padding_content_never_matters(self, name):
        net = make(name).eval()
        items, length = states()
        out = net(items, length)
        assert out.shape == (12, 8)
        other = torch.where(
            items == I, torch.randint(I, items.shape, generator=torch.Generator().manual_seed(5)), items
        )
        assert not torch.equal(items, other)
        torch.testing.assert_close(net(other, length), out, rtol=0, atol=0)

    def test_items_within_the_length_matter(self, name):
        """Every valid position has an influence, so the state isn't that of the last item alone."""
        net = make(name).eval()
        for parameter in net.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
        items, length = states()
        out = net(items, length)
        for position in range(L):
            changed = items.clone()
            changed[:, position] = (items[:, position] + 1) % I
            moved = (net(changed, length) - out).abs().amax(1) > 0
            assert torch.equal(moved, position < length)

    def test_gradients_reach_every_parameter(self, name):
        net = make(name)
        # a constant added to a state before a normalisation has no effect: weigh the outputs unevenly
        (net(*states(64)) * torch.arange(1.0, 9.0)).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())

    def test_seed_alone_decides_the_parameters(self, name):
        state = torch.random.get_rng_state()
        one, two, other = make(name, seed=1), make(name, seed=1), make(name, seed=2)
        assert torch.equal(state, torch.random.get_rng_state())
        for (key, a), b, c in zip(one.named_parameters(), two.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b), key
            assert torch.equal(a, c) == (a.ndim == 1), key
        assert one.item_embedding.weight.std().item() == pytest.approx(0.01, rel=0.3)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"length": torch.tensor([0, 1])}, "length"),
            ({"length": torch.tensor([1, L + 1])}, "length"),
            ({"length": torch.tensor([1])}, "length"),
            ({"length": torch.tensor([1.0, 1.0])}, "length"),
            ({"items": torch.full((2, L), I + 1)}, "items"),
            ({"items": torch.zeros(2, L - 1, dtype=torch.int64)}, "items"),
        ],
    )
    def test_bad_states(self, name, change, words):
        state = {"items": torch.zeros(2, L, dtype=torch.int64), "length": torch.tensor([1, L]), **change}
        with pytest.raises(ValueError, match=words):
            make(name)(**state)

    def test_learns_the_last_item(self, name):
        """Each encoder can tell what was last: a linear head finds it."""
        net = BACKBONES[name](I, hidden=16, state_size=L)
        head = torch.nn.Linear(16, I)
        torch.nn.init.xavier_uniform_(head.weight, generator=torch.Generator().manual_seed(0))
        optimizer = torch.optim.Adam([*net.parameters(), *head.parameters()], lr=0.01)
        generator = torch.Generator().manual_seed(1)
        for step in range(100):
            items, length = states(128, seed=step)
            last = items.gather(1, length[:, None] - 1)[:, 0]
            optimizer.zero_grad()
            F.cross_entropy(head(net(items, length, generator=generator)), last).backward()
            optimizer.step()
        items, length = states(300, seed=999)
        last = items.gather(1, length[:, None] - 1)[:, 0]
        accuracy = (head(net.eval()(items, length)).argmax(1) == last).double().mean()
        assert accuracy > 0.5  # a guess has 1/30


@pytest.mark.parametrize("name", ["gru4rec", "nextitnet", "sasrec"])
def test_no_state_depends_on_later_items(name):
    net = make(name).eval()
    vectors = torch.randn(2, L, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vectors.requires_grad_()
    net.item_embedding.forward = lambda items: vectors
    out = net.states(torch.zeros(2, L, dtype=torch.int64))
    for position in range(L):
        (gradient,) = torch.autograd.grad(out[:, position].square().sum(), vectors, retain_graph=True)
        assert gradient[:, position + 1 :].abs().max() == 0 if position + 1 < L else True
        assert gradient[:, position].abs().max() > 0


@pytest.mark.parametrize("name", ["caser", "sasrec"])
def test_dropout_is_off_in_eval_and_follows_the_generator(name):
    net = make(name, dropout=0.5)
    state = states()
    one, two, other = (net(*state, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(net.eval()(*state), net(*state))


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (GRU4Rec, {"hidden": 0}, "hidden"),
        (Caser, {"heights": (2, 11)}, "heights"),
        (Caser, {"filters": 0}, "filters"),
        (Caser, {"dropout": 1.0}, "dropout"),
        (NextItNet, {"dilations": ()}, "dilations"),
        (SASRec, {"num_heads": 3}, "num_heads"),
        (SASRec, {"num_blocks": 0}, "num_blocks"),
    ],
)
def test_bad_backbones(kind, options, words):
    with pytest.raises(ValueError, match=words):
        kind(I, **options)


# --- the model ----------------------------------------------------------------------------------------------------


class TestLoss:
    @pytest.mark.parametrize("items", [I, 300])
    def test_equals_the_loss_of_plain_tensors(self, items):
        """Same draws, but the transition MLP on concatenated vectors and three full Q matrices."""
        net = MCRL(items, hidden=8, state_size=L, num_negatives=4, seed=3).double()
        logs = SessionSimulator(num_items=items).logs(20, 1)
        batch = ReplayBuffer.from_sessions(logs, state_size=L, num_items=items).sample(16, torch.Generator())
        batch = batch._replace(reward=batch.reward.double())
        generator = torch.Generator().manual_seed(5)
        out = net.loss(batch, torch.Generator().manual_seed(5))
        trained = int(torch.randint(2, (), generator=generator))
        negatives = torch.randint(items - 1, (16, 4), generator=generator)
        negatives += negatives >= batch.action[:, None]
        online, other = net.networks[trained], net.networks[1 - trained]
        state, next_state = online.backbone(*batch.state), other.backbone(*batch.next_state)
        actions = torch.cat([batch.action[:, None], negatives], dim=1)
        vectors = online.backbone.item_embedding(actions)
        both = torch.cat([state[:, None].expand(-1, 5, -1), vectors], dim=2)
        predicted = online.transition_out(online.transition_in(both).relu())
        rho = (online.reward_head(state)[:, None] * vectors).sum(2)
        expected = mcrl_loss(
            online.q_head(state),
            online.q_head(online.backbone(*batch.next_state)),
            other.q_head(next_state),
            batch.action,
            batch.reward,
            batch.done,
            rho[:, 0],
            rho[:, 1:],
            predicted[:, 0],
            predicted[:, 1:],
            next_state,
        )
        torch.testing.assert_close(tuple(out), tuple(expected))
        ours = torch.autograd.grad(out.loss, list(online.parameters()))
        theirs = torch.autograd.grad(expected.loss, list(online.parameters()))
        torch.testing.assert_close(ours, theirs)

    def test_twins_train_one_network_per_step(self):
        net, data = model(), buffer()
        generator = torch.Generator().manual_seed(0)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        counts = [0, 0]
        for _ in range(60):
            before = [[p.detach().clone() for p in network.parameters()] for network in net.networks]
            optimizer.zero_grad(set_to_none=True)
            net.loss(data.sample(8, generator), generator).loss.backward()
            optimizer.step()
            moved = [
                any(not torch.equal(a, b) for a, b in zip(network.parameters(), old, strict=True))
                for network, old in zip(net.networks, before, strict=True)
            ]
            assert sum(moved) == 1
            counts[moved.index(True)] += 1
        assert min(counts) > 15  # a fair coin: 30 of 60, standard deviation 4

    def test_polyak_follows_by_its_share_and_gets_no_gradient(self):
        net, data = model(double="polyak", target_tau=0.25), buffer()
        net.loss(data.sample(8, torch.Generator()), torch.Generator()).loss.backward()
        assert all(p.grad is None for p in net.target.parameters())
        old = [p.clone() for p in net.target.parameters()]
        with torch.no_grad():
            for parameter in net.networks[0].parameters():
                parameter += 1
        net.update_target()
        for now, before in zip(net.target.parameters(), old, strict=True):
            torch.testing.assert_close(now, before + 0.25)

    def test_target_of_polyak_is_used(self):
        net, batch = model(double="polyak", reward_weight=0.0, transition_weight=0.0), buffer().transitions()
        with torch.no_grad():
            for parameter in net.target.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            network, target = net.networks[0], net.target
            q, ahead = (network.q_head(network.backbone(*state)) for state in (batch.state, batch.next_state))
            y = double_q_target(ahead, target.q_head(target.backbone(*batch.next_state)), batch.reward, batch.done, 0.5)
            logged = q.gather(1, batch.action[:, None])[:, 0]
        torch.testing.assert_close(net.loss(batch).td, 0.5 * (logged - y).square().mean())

    def test_parts_of_weight_zero_are_left_out(self):
        net = model(td_weight=0.0, reward_weight=0.0, transition_weight=0.0)
        batch = buffer().transitions()
        out = net.loss(batch, torch.Generator())
        assert out.td == out.reward == out.transition == 0
        out.loss.backward()
        used = {name.split(".")[2] for name, p in net.named_parameters() if p.grad is not None}
        assert used == {"backbone", "q_head"}
        assert out.loss == out.conservative

    def test_second_head(self):
        net, batch = model(ce_weight=2.0, rank_by="ce"), buffer().transitions()
        plain = model()
        generators = [torch.Generator().manual_seed(0) for _ in range(2)]
        plain.load_state_dict({k: v for k, v in net.state_dict().items() if "ce_head" not in k})
        with_head, without = net.loss(batch, generators[0]), plain.loss(batch, generators[1])
        trained = net.networks[int(torch.randint(2, (), generator=torch.Generator().manual_seed(0)))]
        expected = F.cross_entropy(trained.ce_head(trained.backbone(*batch.state)), batch.action)
        torch.testing.assert_close(with_head.loss - without.loss, 2 * expected)
        mean = sum(n.ce_head(n.backbone(*batch.state)) for n in net.networks) / 2
        torch.testing.assert_close(net.scores(batch.state), mean)

    def test_reward_weighting_prefers_purchases(self):
        batch = buffer().transitions()
        net = model(reward_weighted=True)
        plain = model()
        weighted, even = (m.loss(batch, torch.Generator().manual_seed(0)) for m in (net, plain))
        assert weighted.reward != even.reward
        same = batch._replace(reward=torch.ones_like(batch.reward))
        weighted, even = (m.loss(same, torch.Generator().manual_seed(0)) for m in (net, plain))
        torch.testing.assert_close(weighted.reward, even.reward)

    def test_excluded_sessions(self):
        net, data = model(exclude_session=True, num_negatives=50), buffer()
        with pytest.raises(ValueError, match="session_items"):
            net.loss(data.sample(4, torch.Generator()), torch.Generator())
        batch = data.sample(32, torch.Generator(), with_session_items=True)
        actions = net._actions(batch, torch.Generator())
        assert torch.equal(actions[:, 0], batch.action)
        for row, session in zip(actions[:, 1:].tolist(), batch.session_items.tolist(), strict=True):
            assert not set(row) & set(session)

    def test_rank_by_reward_too(self):
        net = model(rank_by="q+reward", omega=3.0, seed=4)
        state = buffer().transitions().state
        rho = [n.rewards(n.backbone(*state), torch.arange(I).expand(len(state[1]), -1)) for n in net.networks]
        torch.testing.assert_close(net.scores(state), net.q_values(state) + 3 * (rho[0] + rho[1]) / 2)

    def test_float64_works(self):
        batch = buffer().transitions()
        assert model().double().loss(batch, torch.Generator()).loss.dtype == torch.float64


class TestRecommend:
    def test_best_items_first_for_any_history(self):
        net = model(backbone="sasrec", dropout=0.5).train()
        sessions = [[1, 2, 3], [], list(range(20))]
        best = net.recommend(sessions, k=I)
        assert net.training
        assert [sorted(row) for row in best.tolist()] == [list(range(I))] * 3
        scores = net.eval().q_values(pad_histories(sessions, L, I))
        assert torch.equal(scores.gather(1, best), scores.sort(descending=True).values)
        assert torch.equal(net.recommend(sessions, k=4), best[:, :4])

    def test_many_sessions_are_cut_into_blocks(self):
        net = model()
        sessions = [[i % I] for i in range(2050)]
        assert torch.equal(net.recommend(sessions, 3)[1024 : 1024 + I], net.recommend(sessions[1024 : 1024 + I], 3))

    def test_bad_input(self):
        for sessions, k, words in (
            ([[1]], 0, "k must"),
            ([[1]], I + 1, "k must"),
            ([[I]], 1, "outside"),
            ([], 1, "empty"),
        ):
            with pytest.raises(ValueError, match=words):
                model().recommend(sessions, k)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gamma": 1.5}, "gamma"),
        ({"temperature": 0.0}, "temperature"),
        ({"cql_temperature": 0.0}, "cql_temperature"),
        ({"num_negatives": 0}, "at least one negative"),
        ({"backbone": "gru"}, "accepted: caser, gru4rec, nextitnet, sasrec; did you mean 'gru4rec'"),
        ({"double": "both"}, "double"),
        ({"rank_by": "reward"}, "rank_by"),
        ({"rank_by": "ce"}, "ce_weight"),
        ({"target_tau": 0.0}, "target_tau"),
        ({"ce_weight": float("nan")}, "ce_weight"),
        ({"dropout": 1.0, "backbone": "caser"}, "dropout"),
    ],
)
def test_bad_models(options, words):
    with pytest.raises(ValueError, match=words):
        model(**options)
    with pytest.raises(ValueError, match="num_items"):
        MCRL(1)


@pytest.mark.parametrize("name", BACKBONES)
def test_save_and_load(tmp_path, name):
    net = model(backbone=name, double="polyak", ce_weight=0.5, seed=7)
    net.save(tmp_path / "model.safetensors")
    again = MCRL.load(tmp_path / "model.safetensors")
    assert again.options() == net.options()
    state = buffer().transitions().state
    assert torch.equal(again.eval().q_values(state), net.eval().q_values(state))
    (tmp_path / "other.safetensors").write_text("x")
    with pytest.raises(ValueError, match=r"other\.safetensors"):
        MCRL.load(tmp_path / "other.safetensors")


# --- evaluation ---------------------------------------------------------------------------------------------------


def test_evaluation_ranks_every_event():
    net, data = model(seed=2).eval(), buffer()
    found = evaluate_next_item(net, data, ks=(3, 10), batch_size=17)
    batch = data.transitions()
    with torch.no_grad():
        q = net.q_values(batch.state)
    for k in (3, 10):
        expected = next_item_metrics(q, batch.action, batch.is_purchase, k=k)
        assert {name: found[f"{name}@{k}"] for name in expected} == pytest.approx(expected)
    logged = q.gather(1, batch.action[:, None])
    hits = ((q > logged).sum(1) < 10).double()
    assert found["reward@10"] == pytest.approx(float((hits * batch.reward).sum()), rel=1e-5)
    assert found["max_q"] == pytest.approx(float(q.amax(1).mean()), rel=1e-5)
    assert found["logged_q"] == pytest.approx(float(logged.mean()), rel=1e-5, abs=1e-7)
    assert found["mean_q"] == pytest.approx(float(q.mean()), rel=1e-4, abs=1e-7)


def test_evaluation_ranks_by_what_serves():
    net = model(rank_by="q+reward", omega=1e6, seed=2)
    data = buffer()
    assert evaluate_next_item(net, data)["hr_click@5"] != evaluate_next_item(model(seed=2), data)["hr_click@5"]


# --- training -----------------------------------------------------------------------------------------------------


def fit(net: MCRL, folder: Any = None, epochs: int = 4, **options: Any):
    trainer = MCRLTrainer(net, buffer(), buffer(30, 2), batch_size=16, lr=0.01, seed=3)
    checkpoint = None if folder is None else folder / "checkpoint.safetensors"
    defaults = {"steps_per_epoch": 5, "ks": (10,), "monitor": "ndcg_purchase@10", "checkpoint": checkpoint}
    return trainer.fit(epochs, **{**defaults, **options})


def comparable(result) -> list[dict[str, float]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in result.history]


@pytest.mark.parametrize(
    "options", [{"backbone": "sasrec", "exclude_session": True}, {"backbone": "caser", "double": "polyak"}]
)
def test_resumed_run_equals_a_whole_one(tmp_path, options):
    """Also with dropout, of which the generator is the only source."""
    whole = model(**options)
    straight = fit(whole)
    torch.manual_seed(123)  # the global generator has no say
    fit(model(**options), tmp_path, epochs=2)
    resumed = model(**options)
    second = fit(resumed, tmp_path)
    assert comparable(second) == comparable(straight)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_checkpoint_of_another_run_is_refused(tmp_path):
    fit(model(), tmp_path, epochs=1)
    with pytest.raises(ValueError, match="gamma"):
        fit(model(gamma=0.9), tmp_path)
    fit(model(gamma=0.9), tmp_path, epochs=1, resume=False)


def test_best_epoch_is_kept():
    net = model()
    result = fit(net, epochs=6, patience=None)
    values = [record["ndcg_purchase@10"] for record in result.history]
    assert result.best["ndcg_purchase@10"] == max(values)
    assert result.best_epoch == values.index(max(values))
    assert evaluate_next_item(net, buffer(30, 2), ks=(10,))["ndcg_purchase@10"] == pytest.approx(max(values))


def test_without_validation_the_last_epoch_stays():
    trainer = MCRLTrainer(model(), buffer(), batch_size=16)
    result = trainer.fit(2)
    assert result.best == {}
    assert len(buffer()) // 16 > 1
    assert all(math.isfinite(record["loss"]) for record in result.history)


def test_bad_training():
    net = model()
    for options, words in (({"lr": 0.0}, "lr"), ({"batch_size": 0}, "batch_size")):
        with pytest.raises(ValueError, match=words):
            MCRLTrainer(net, buffer(), **options)
    with pytest.raises(ValueError, match="state_size=4"):
        MCRLTrainer(net, buffer(state_size=4))
    for options, words in (
        ({"epochs": 0}, "epochs"),
        ({"steps_per_epoch": 0}, "steps_per_epoch"),
        ({"monitor": "ndcg_purchase@20"}, "monitor"),
        ({"ks": ()}, "k must"),
    ):
        with pytest.raises(ValueError, match=words):
            fit(net, **options)
    with pytest.raises(ValueError, match="batch_size"):
        evaluate_next_item(net, buffer(), batch_size=0)


@pytest.mark.parametrize("name", BACKBONES)
def test_short_training_beats_popularity(name):
    """120 steps on 500 sessions of users who follow their interest: far more hits than by counting."""
    simulator = SessionSimulator(num_items=60, beta=8.0)
    train, test = (
        ReplayBuffer.from_sessions(simulator.logs(n, seed), state_size=L, num_items=60)
        for n, seed in ((500, 1), (200, 2))
    )
    net = MCRL(60, name, hidden=16, state_size=L, double="polyak")
    MCRLTrainer(net, train, batch_size=64, lr=0.01).fit(1, steps_per_epoch=120)
    counts = torch.bincount(train.transitions().action, minlength=60).float()
    batch = test.transitions()
    popular = next_item_metrics(counts.expand(len(test), -1), batch.action, batch.is_purchase, k=5)
    found = evaluate_next_item(net, test, ks=(5,))
    assert found["hr_click@5"] > popular["hr_click"] + 0.2  # 0.41 by counting
    assert found["hr_purchase@5"] > popular["hr_purchase"] + 0.3  # 0.25


# --- behaviour ----------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, float]] = {
    "conservative": {"td_weight": 0.0, "reward_weight": 0.0, "transition_weight": 0.0},
    "naive": {"cql_weight": 0.0, "reward_weight": 0.0, "transition_weight": 0.0},
    "td+conservative": {"reward_weight": 0.0, "transition_weight": 0.0},
    "full": {},
}


def _simulated(variant: str, seed: int) -> dict[str, float]:
    """900 steps on 2,500 sessions; the metrics of 1,000 others and 1,000 rollouts."""
    simulator = SessionSimulator(seed=seed)
    train, test = (
        ReplayBuffer.from_sessions(simulator.logs(n, 10 * seed + part), num_items=simulator.num_items)
        for part, n in ((1, 2500), (2, 1000))
    )
    net = MCRL(simulator.num_items, seed=seed, **VARIANTS[variant])
    MCRLTrainer(net, train, seed=seed).fit(1, steps_per_epoch=900)
    returns = simulator.rollout(lambda histories: net.recommend(histories, 1)[:, 0], 1000, seed)
    return {**evaluate_next_item(net, test, ks=(10,)), "return": returns.discounted}


@pytest.mark.slow
def test_methods_rank_on_the_simulator_as_the_card_says():
    """Three seeds, means: what each part is for. Differences between two parts alone are within noise."""
    runs = {variant: [_simulated(variant, seed) for seed in range(3)] for variant in VARIANTS}
    mean = {variant: {key: sum(run[key] for run in found) / 3 for key in found[0]} for variant, found in runs.items()}
    naive, plain, td, full = (mean[name] for name in ("naive", "conservative", "td+conservative", "full"))
    # Naive double Q over-estimates by far and ranks near-randomly (a guess has a hit ratio of 10/300).
    assert naive["max_q"] > 2 * naive["return"]
    assert naive["hr_click@10"] < 0.5 * plain["hr_click@10"]
    assert naive["ndcg_purchase@10"] < 0.5 * plain["ndcg_purchase@10"]
    # The value function raises what a recommender earns; in NDCG it is level with cross-entropy after as many steps, unlike
    # in the card's single run. The contrastive models don't hurt.
    assert td["return"] > plain["return"] + 0.03
    assert td["ndcg_purchase@10"] > plain["ndcg_purchase@10"] - 0.01
    assert full["ndcg_purchase@10"] >= td["ndcg_purchase@10"] - 0.005
    assert full["return"] >= td["return"] - 0.01
    assert full["return"] > plain["return"] + 0.05
    # What falls is Q of actions that were not logged.
    for found in (td, full):
        assert found["mean_q"] < found["logged_q"] - 0.5
