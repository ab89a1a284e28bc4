from __future__ import annotations

import dataclasses
import itertools
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ballast_testing.distributed import run_gloo
from recsys_losses._distributed import Shard
from recsys_losses.adap_tau import adap_tau_loss
from recsys_losses.data import InteractionData, hold_out_validation, load_dataset
from recsys_losses.metrics import evaluate_full_ranking
from recsys_losses.models import LightGCN, MatrixFactorization
from recsys_losses.objectives import L2_ON, LOSSES, PairObjective, _other_columns, make_objective
from recsys_losses.ssm import in_batch_ssm_loss, ssm_loss
from recsys_losses.training import LossConfig, evaluate, fit, load_model, save_model

if TYPE_CHECKING:
    from pathlib import Path

NUM_USERS, NUM_ITEMS = 48, 36

# Of every loss the plain form, and the options that change what is computed.
CONFIGS: dict[str, dict[str, Any]] = {
    "bpr": {"name": "bpr"},
    "bpr popularity": {"name": "bpr", "negatives": "popularity", "similarity": "cosine"},
    "bce": {"name": "bce", "num_negatives": 3},
    "bce shared": {"name": "bce", "num_negatives": 8, "shared_negatives": True},
    "softmax": {"name": "softmax", "num_negatives": 16, "temperature": 0.2},
    "softmax own": {"name": "softmax", "num_negatives": 4, "shared_negatives": False, "temperature": 0.2},
    "softmax excluding": {"name": "softmax", "num_negatives": 16, "exclude_positives": True, "temperature": 0.2},
    "softmax all": {"name": "softmax", "negatives": "all", "temperature": 0.2},
    "ssm": {"name": "ssm", "num_negatives": 16, "temperature": 0.2},
    "ssm in-batch logq": {"name": "ssm", "negatives": "in-batch", "logq": True, "temperature": 0.2},
    "ssm in-batch masked": {"name": "ssm", "negatives": "in-batch", "logq": True, "mask_accidental": True},
    "ssm popularity logq": {
        "name": "ssm",
        "negatives": "popularity",
        "logq": True,
        "num_negatives": 16,
        "temperature": 0.2,
    },
    "ssm all": {"name": "ssm", "negatives": "all", "temperature": 0.2},
    "bsl": {"name": "bsl", "num_negatives": 16, "temperature": 0.2, "power": 1.1},
    "bsl grouped": {"name": "bsl", "num_negatives": 16, "temperature": 0.2, "group_by_user": True},
    "bsl in-batch": {"name": "bsl", "negatives": "in-batch", "logq": True, "mask_accidental": True, "temperature": 0.2},
    "bsl reweight all": {"name": "bsl", "negatives": "all", "bsl_mode": "reweight", "temperature": 0.2},
    "bilateral": {"name": "bilateral", "num_negatives": 16, "tau_pos": 0.3, "tau_neg": 0.2},
    "bilateral all": {"name": "bilateral", "negatives": "all", "temperature": 0.2},
    "adap-tau": {"name": "adap-tau", "num_negatives": 16, "warmup_epochs": 2},
    "adap-tau all": {"name": "adap-tau", "negatives": "all", "warmup_epochs": 2},
    "cpr": {"name": "cpr", "cpr_sample_rate": 2.0},
}


def planted(seed: int = 0, *, with_valid: bool = False) -> InteractionData:
    """Three groups of users, each with items of its own; a few items are liked by everyone; 5 % noise."""
    generator = torch.Generator().manual_seed(seed)
    user_group, item_group = torch.arange(NUM_USERS) % 3, torch.arange(NUM_ITEMS) % 3
    chance = torch.where(user_group[:, None] == item_group, 0.75, 0.05)
    chance[:, :2] = 0.5
    chance[-1] = 0  # a user without any pair
    user, item = (torch.rand(chance.shape, generator=generator) < chance).nonzero().T
    data = InteractionData(NUM_USERS, NUM_ITEMS, *_divided(torch.stack([user, item]), generator))
    return hold_out_validation(data, share=0.2, generator=generator) if with_valid else data


def _divided(pairs: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    in_test = torch.rand(pairs.shape[1], generator=generator) < 0.25
    return pairs[:, ~in_test], pairs[:, in_test]


def flat(seed: int = 0, dim: int = 16, **options: Any) -> MatrixFactorization:
    return MatrixFactorization(NUM_USERS, NUM_ITEMS, dim, seed=seed, **options)


def train(model: MatrixFactorization | LightGCN, config: dict[str, Any], data: InteractionData, **options: Any) -> Any:
    defaults = {"epochs": 2, "batch_size": 64, "lr": 0.02, "select_on": "none"}
    return fit(model, LossConfig(**config), data, **{**defaults, **options})


def comparable(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in history]


def popularity_recall(data: InteractionData, k: int) -> float:
    count = torch.bincount(data.train[1], minlength=data.num_items).float()
    tables = torch.ones(data.num_users, 1), count[:, None]
    return evaluate_full_ranking(*tables, data.train, data.test, ks=(k,), metrics=("recall",))[f"recall@{k}"]


class TestEveryLoss:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_learns_the_planted_groups(self, name: str) -> None:
        data = planted()
        model = flat()
        result = train(model, CONFIGS[name], data, epochs=25)
        # In the first epoch after a change of temperature the adaptive loss is on another scale.
        first = 3 if CONFIGS[name]["name"] == "adap-tau" else 0
        assert result.history[-1]["loss"] < result.history[first]["loss"]
        recall = evaluate(model, data, ks=(8,), metrics=("recall",))["recall@8"]
        assert recall > popularity_recall(data, 8) + 0.05

    @pytest.mark.parametrize("name", CONFIGS)
    def test_moves_every_parameter_of_both_models(self, name: str) -> None:
        data = planted()
        for model in (flat(), LightGCN(NUM_USERS, NUM_ITEMS, data.train, 8, 2, seed=0)):
            before = {key: value.detach().clone() for key, value in model.named_parameters()}
            train(model, CONFIGS[name], data)
            assert all(not torch.equal(value, before[key]) for key, value in model.named_parameters())
            assert all(value.isfinite().all() for value in model.parameters())

    def test_all_losses_are_tried(self) -> None:
        assert {config["name"] for config in CONFIGS.values()} == set(LOSSES)


def one_batch(config: dict[str, Any], data: InteractionData, **options: Any) -> tuple[PairObjective, Any]:
    arguments = {"batch_size": 32, "l2": 0.0, "l2_on": None, "device": torch.device("cpu")}
    objective = make_objective(
        LossConfig(**config), data, generator=torch.Generator().manual_seed(0), **{**arguments, **options}
    )
    assert isinstance(objective, PairObjective)
    return objective, next(iter(objective.batches()))


class TestObjective:
    def test_epoch_holds_every_pair_once_and_a_short_last_batch(self) -> None:
        data = planted()
        objective, _ = one_batch({"name": "bpr"}, data)
        batches = list(objective.batches())
        seen = torch.cat([torch.stack([batch.user, batch.item]) for batch in batches], dim=1)
        key = data.train[0] * NUM_ITEMS + data.train[1]
        assert torch.equal((seen[0] * NUM_ITEMS + seen[1]).sort().values, key.sort().values)
        assert [batch.size for batch in batches[:-1]] == [32] * (len(batches) - 1)
        assert batches[-1].size == data.train.shape[1] % 32

    def test_shuffles_anew_every_epoch(self) -> None:
        objective, first = one_batch({"name": "bpr"}, planted())
        assert not torch.equal(first.user, next(iter(objective.batches())).user)

    def test_grouping_keeps_the_rows_of_a_user_together(self) -> None:
        objective, _ = one_batch({"name": "bsl", "group_by_user": True}, planted())
        orders = []
        for _ in range(2):
            users = torch.cat([batch.user for batch in objective.batches()])
            orders.append([user for user, _ in itertools.groupby(users.tolist())])
            assert len(orders[-1]) == len(set(orders[-1]))
        assert orders[0] != orders[1]

    @pytest.mark.parametrize("name", ["uniform", "popularity"])
    @pytest.mark.parametrize("shared", [True, False])
    def test_negatives_differ_from_batch_to_batch(self, name: str, shared: bool) -> None:
        config = {"name": "ssm", "negatives": name, "shared_negatives": shared, "num_negatives": 12}
        objective, _ = one_batch(config, planted())
        drawn = [batch.negative for batch in objective.batches()]
        assert all(
            negative.shape == ((12,) if shared else (batch.size, 12))
            for negative, batch in zip(drawn, objective.batches(), strict=True)
        )
        assert not torch.equal(drawn[0], drawn[1])

    def test_bpr_negatives_are_no_positives(self) -> None:
        data = planted()
        objective, _ = one_batch({"name": "bpr"}, data)
        known = {tuple(pair) for pair in data.train.T.tolist()}
        pairs = [
            (u, j) for b in objective.batches() for u, j in zip(b.user.tolist(), b.negative[:, 0].tolist(), strict=True)
        ]
        assert not known & set(pairs)

    def test_in_batch_ssm_is_the_function_of_the_rows(self) -> None:
        data, model = planted(), flat()
        objective, batch = one_batch({"name": "ssm", "negatives": "in-batch", "mask_accidental": True}, data)
        expected = in_batch_ssm_loss(
            model.user_embedding[batch.user], model.item_embedding[batch.item], item_id=batch.item, temperature=0.1
        )
        torch.testing.assert_close(objective(batch, model).loss, expected)

    @pytest.mark.parametrize("count", [3, 30])  # looked up row by row, and out of a product with the table
    @pytest.mark.parametrize("similarity", ["cosine", "dot"])
    def test_own_negatives_either_way(self, count: int, similarity: str) -> None:
        data, model = planted(), flat()
        config = {"name": "ssm", "num_negatives": count, "shared_negatives": False, "similarity": similarity}
        objective, batch = one_batch({**config, "mask_accidental": True}, data)
        user, item = model.embeddings()
        expected = ssm_loss(
            user[batch.user],
            item[batch.item],
            item[batch.negative],
            similarity=similarity,
            neg_mask=batch.negative != batch.item[:, None],
            temperature=0.1,
        )
        loss = objective(batch, model).loss
        torch.testing.assert_close(loss, expected)
        for ours, theirs in zip(
            torch.autograd.grad(loss, [user, item]), torch.autograd.grad(expected, [user, item]), strict=True
        ):
            torch.testing.assert_close(ours, theirs)

    @pytest.mark.parametrize("name", ["softmax", "ssm", "bsl", "bilateral", "adap-tau"])
    def test_whole_catalogue_equals_all_items_as_own_negatives(self, name: str) -> None:
        data, model = planted(), flat()
        whole, batch = one_batch({"name": name, "negatives": "all"}, data)
        own, _ = one_batch({"name": name, "num_negatives": NUM_ITEMS - 1, "shared_negatives": False}, data)
        others = torch.stack(
            [torch.tensor([i for i in range(NUM_ITEMS) if i != own_item]) for own_item in batch.item.tolist()]
        )
        for objective in (whole, own):
            objective.start_epoch(0, model)
        losses = [whole(batch, model).loss, own(batch._replace(negative=others), model).loss]
        torch.testing.assert_close(*losses)
        gradients = [torch.autograd.grad(loss, [*model.embeddings()]) for loss in losses]
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        if whole.temperature is not None and own.temperature is not None:
            torch.testing.assert_close(whole.temperature.pending, own.temperature.pending)

    def test_adaptive_temperature_without_users_is_one_softmax(self) -> None:
        data, model = planted(), flat()
        adaptive, batch = one_batch({"name": "adap-tau", "num_negatives": 9, "center": "none"}, data)
        record = adaptive.start_epoch(0, model)
        softmax, _ = one_batch({"name": "softmax", "num_negatives": 9, "temperature": 1 / record["inv_tau0"]}, data)
        torch.testing.assert_close(adaptive(batch, model).loss, softmax(batch, model).loss)

    def test_adaptive_temperature_observes_and_renews(self) -> None:
        data, model = planted(), flat()
        objective, batch = one_batch({"name": "adap-tau", "num_negatives": 9}, data)
        objective.start_epoch(0, model)
        objective(batch, model)
        objective.start_epoch(1, model)
        assert objective.temperature is not None
        seen = torch.zeros(NUM_USERS, dtype=torch.bool)
        seen[batch.user] = True
        differs = objective.temperature.inv_tau != objective.temperature.inv_tau0.float()
        assert differs[seen].any()
        assert not differs[~seen].any()
        user, item = (torch.nn.functional.normalize(table, dim=1) for table in model.embeddings())
        pos = (user[batch.user] * item[batch.item]).sum(1)
        neg = user[batch.user] @ item[batch.negative].T
        expected = adap_tau_loss(
            pos, neg, objective.temperature(batch.user), inv_tau_pos=objective.temperature.inv_tau0
        )
        torch.testing.assert_close(objective(batch, model).loss, expected)

    def test_user_dropout_acts_in_training(self) -> None:
        data = planted()
        model = flat(user_dropout=0.5)
        objective, batch = one_batch({"name": "ssm", "negatives": "in-batch"}, data)
        losses = {float(objective(batch, model).loss.detach()) for _ in range(3)}
        assert len(losses) == 3

    def test_a_row_of_accidental_hits_only_stays_finite(self) -> None:
        data = planted()
        for name in ("softmax", "ssm", "bsl", "bilateral"):
            objective, batch = one_batch({"name": name, "negatives": "in-batch", "mask_accidental": True}, data)
            model = flat()
            alike = batch._replace(item=batch.item[:1].expand(32))
            loss = objective(alike, model).loss
            assert loss.isfinite()
            assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, [*model.embeddings()]))

    def test_last_batch_of_one_row_has_no_in_batch_negatives(self) -> None:
        data = planted()
        size = data.train.shape[1] - 1
        for name in ("ssm", "softmax", "bsl", "adap-tau"):
            result = train(flat(), {"name": name, "negatives": "in-batch"}, data, epochs=1, batch_size=size)
            assert result.history[0]["loss"] > 0

    @pytest.mark.parametrize(("rows", "first"), [(5, 0), (3, 0), (3, 2), (2, 3), (2, 4)])
    def test_other_columns(self, rows: int, first: int) -> None:
        x = torch.arange(5.0 * rows).view(rows, 5)
        for row, rest in enumerate(_other_columns(x, first)):
            expected = {float(x[row, c]) for c in range(5) if c != (first + row) % 5}
            assert set(rest.tolist()) == expected


class TestL2:
    def expected(self, config: dict[str, Any], l2_on: str, model: Any, batch: Any) -> torch.Tensor:
        user, item = (model.embeddings if l2_on == "output" else model.base_embeddings)()
        if l2_on == "table":
            return (user.square().sum() + item.square().sum()) / (NUM_USERS + NUM_ITEMS)
        rows = user[batch.user].square().sum() + item[batch.item].square().sum()
        if l2_on == "output" or config["name"] in ("bpr", "bce"):
            rows = rows + item[batch.negative].square().sum()
        return rows / (2 * batch.size)

    @pytest.mark.parametrize("l2_on", L2_ON)
    @pytest.mark.parametrize("graph", [False, True])
    @pytest.mark.parametrize(
        "config",
        [
            {"name": "bpr"},
            {"name": "bce", "num_negatives": 3, "shared_negatives": True},
            {"name": "ssm", "num_negatives": 5},
            {"name": "bsl", "num_negatives": 5, "shared_negatives": False},
        ],
    )
    def test_value_and_gradient(self, config: dict[str, Any], l2_on: str, graph: bool) -> None:
        data = planted()
        model = LightGCN(NUM_USERS, NUM_ITEMS, data.train, 8, 2, seed=0) if graph else flat()
        objective, batch = one_batch(config, data, l2=0.3, l2_on=l2_on)
        penalty = objective(batch, model).penalty
        expected = 0.3 * self.expected(config, l2_on, model, batch)
        torch.testing.assert_close(penalty, expected)
        parameters = list(model.parameters())
        for ours, theirs in zip(
            torch.autograd.grad(penalty, parameters), torch.autograd.grad(expected, parameters), strict=True
        ):
            torch.testing.assert_close(ours, theirs)

    def test_cpr_counts_the_table(self) -> None:
        data, model = planted(), flat()
        objective = make_objective(
            LossConfig("cpr"), data, batch_size=32, l2=0.3, l2_on=None,
            generator=torch.Generator().manual_seed(0), device=torch.device("cpu"),
        )  # fmt: skip
        penalty = objective(next(iter(objective.batches())), model).penalty
        torch.testing.assert_close(penalty, 0.3 * self.expected({"name": "cpr"}, "table", model, None))

    def test_shrinks_the_tables(self) -> None:
        norms = []
        for l2 in (0.0, 1.0):
            model = flat()
            train(model, {"name": "bpr"}, planted(), epochs=5, l2=l2)
            norms.append(model.user_embedding.norm().item())
        assert norms[1] < 0.8 * norms[0]


class TestFit:
    def test_same_seed_same_result(self) -> None:
        runs = []
        for seed in (0, 0, 1):
            model = flat()
            result = train(model, {"name": "ssm", "num_negatives": 8}, planted(), seed=seed)
            runs.append((comparable(result.history), model.user_embedding.detach().clone()))
        assert runs[0][0] == runs[1][0]
        assert torch.equal(runs[0][1], runs[1][1])
        assert not torch.equal(runs[0][1], runs[2][1])

    def test_global_generator_is_left_alone(self) -> None:
        before = torch.random.get_rng_state()
        train(flat(user_dropout=0.1), {"name": "bpr"}, planted())
        assert torch.equal(before, torch.random.get_rng_state())

    def test_restores_the_best_epoch(self) -> None:
        data = planted(with_valid=True)
        model = flat()
        result = train(model, {"name": "bpr"}, data, epochs=12, lr=0.3, select_on="valid", monitor="ndcg@5", ks=(3, 5))
        curve = [record["ndcg@5"] for record in result.history]
        assert max(curve) > curve[-1]  # so large a step does not end at its best
        assert result.best_epoch == curve.index(max(curve))
        assert result.best["ndcg@5"] == max(curve)
        again = evaluate(model, data, split="valid", ks=(3, 5), metrics=("recall", "ndcg"))
        assert again == result.best

    def test_patience_counts_evaluations_without_improvement(self) -> None:
        data = planted(with_valid=True)
        options = {"epochs": 60, "lr": 0.3, "select_on": "valid", "monitor": "recall@5", "ks": (5,)}
        result = train(flat(), {"name": "bpr"}, data, patience=2, eval_every=2, **options)
        assert result.stopped_early
        evaluated = [record["epoch"] for record in result.history if "recall@5" in record]
        assert evaluated == list(range(1, len(result.history), 2))
        assert result.best_epoch == evaluated[-3]
        full = train(flat(), {"name": "bpr"}, data, patience=None, eval_every=2, **options)
        assert not full.stopped_early
        assert len(full.history) == 60

    def test_last_epoch_is_evaluated(self) -> None:
        options = {"select_on": "valid", "monitor": "recall@5", "ks": (5,), "epochs": 4, "eval_every": 3}
        result = train(flat(), {"name": "bpr"}, planted(with_valid=True), **options)
        assert ["recall@5" in record for record in result.history] == [False, False, True, True]

    def test_holds_out_validation_pairs(self) -> None:
        data = planted()
        held = hold_out_validation(data, generator=torch.Generator().manual_seed(4))
        options = {"select_on": "valid", "monitor": "recall@5", "ks": (5,), "seed": 4}
        models = [LightGCN(NUM_USERS, NUM_ITEMS, edges, 8, seed=0) for edges in (data.train, held.train)]
        histories = [
            comparable(train(model, {"name": "bpr"}, part, **options).history)
            for model, part in zip(models, (data, held), strict=True)
        ]
        assert histories[0] == histories[1]
        assert torch.equal(models[0].edge_index(), held.train)  # the graph doesn't show what selects

    def test_selecting_on_test_warns(self) -> None:
        data = planted(with_valid=True)
        with pytest.warns(UserWarning, match="test-set leak"):
            result = train(flat(), {"name": "bpr"}, data, select_on="test", monitor="recall@5", ks=(5,))
        model = flat()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(model, {"name": "bpr"}, data, select_on="test", monitor="recall@5", ks=(5,))
        assert result.best["recall@5"] == evaluate(model, data, ks=(5,), metrics=("recall",))["recall@5"]

    def test_without_selection_nothing_is_evaluated(self) -> None:
        result = train(flat(), {"name": "bpr"}, planted(with_valid=True), epochs=3)
        assert result.best == {}
        assert result.best_epoch == 2
        assert all(set(record) == {"epoch", "loss", "seconds"} for record in result.history)

    def test_history_of_adap_tau_has_its_temperature(self) -> None:
        result = train(flat(), {"name": "adap-tau", "num_negatives": 8}, planted())
        assert all(record["inv_tau0"] > 0 for record in result.history)

    def test_cosine_evaluation_ignores_lengths(self) -> None:
        data, model = planted(), flat()
        stretched = flat()
        with torch.no_grad():
            stretched.item_embedding.mul_(2.0 ** (torch.arange(NUM_ITEMS)[:, None] % 5))  # exact, hence no new ties
        assert evaluate(model, data, score="cosine") == evaluate(stretched, data, score="cosine")
        assert evaluate(model, data, score="dot") != evaluate(stretched, data, score="dot")

    def test_progress_bar_and_callback(self, capsys: pytest.CaptureFixture[str]) -> None:
        records: list[dict[str, float]] = []
        result = train(flat(), {"name": "bpr"}, planted(), progress=True, on_epoch=records.append)
        assert records == result.history
        assert "pair" in capsys.readouterr().err
        train(flat(), {"name": "bpr"}, planted())
        assert capsys.readouterr().err == ""


class _InterruptError(Exception):
    pass


class TestResume:
    @pytest.mark.parametrize("name", ["bpr", "ssm in-batch logq", "adap-tau", "cpr"])
    def test_continues_bit_for_bit(self, name: str, tmp_path: Path) -> None:
        data = planted(with_valid=True)
        options = {"epochs": 6, "select_on": "valid", "monitor": "recall@5", "ks": (5,), "eval_every": 2}

        def model() -> LightGCN:
            return LightGCN(NUM_USERS, NUM_ITEMS, data.train, 8, 2, message_dropout=0.1, seed=0)

        def stop(record: dict[str, float]) -> None:
            if record["epoch"] == 2:
                raise _InterruptError

        whole, part = model(), model()
        expected = train(whole, CONFIGS[name], data, **options)
        path = tmp_path / "run" / "checkpoint.safetensors"
        with pytest.raises(_InterruptError):
            train(part, CONFIGS[name], data, checkpoint=path, on_epoch=stop, **options)
        records: list[dict[str, float]] = []
        resumed = model()
        result = train(resumed, CONFIGS[name], data, checkpoint=path, on_epoch=records.append, **options)
        assert [record["epoch"] for record in records] == [3, 4, 5]
        assert comparable(result.history) == comparable(expected.history)
        assert (result.best_epoch, result.best) == (expected.best_epoch, expected.best)
        for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
            assert torch.equal(ours, theirs)

    def test_interrupt_within_an_epoch(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        data, config = planted(), CONFIGS["adap-tau"]
        whole, part = flat(user_dropout=0.1), flat(user_dropout=0.1)
        train(whole, config, data, epochs=5)
        path = tmp_path / "checkpoint.safetensors"
        steps = itertools.count()
        original = PairObjective.__call__

        def interrupted(self: PairObjective, batch: Any, model: Any) -> Any:
            if next(steps) == 17:
                raise KeyboardInterrupt
            return original(self, batch, model)

        monkeypatch.setattr(PairObjective, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(part, config, data, epochs=5, checkpoint=path)
        monkeypatch.undo()
        records: list[dict[str, float]] = []
        train(part, config, data, epochs=5, checkpoint=path, on_epoch=records.append)
        assert 0 < len(records) < 5
        assert torch.equal(part.user_embedding, whole.user_embedding)
        assert torch.equal(part.item_embedding, whole.item_embedding)
        assert [file.name for file in tmp_path.iterdir()] == [path.name]

    def test_finished_run_is_not_repeated(self, tmp_path: Path) -> None:
        path = tmp_path / "checkpoint.safetensors"
        options = {"select_on": "valid", "monitor": "recall@5", "ks": (5,), "checkpoint": path}
        first, again = flat(), flat(seed=9)
        result = train(first, {"name": "bpr"}, planted(), **options)
        records: list[dict[str, float]] = []
        repeated = train(again, {"name": "bpr"}, planted(), on_epoch=records.append, **options)
        assert records == []
        assert repeated == result
        assert torch.equal(first.user_embedding, again.user_embedding)

    def test_resume_false_starts_over(self, tmp_path: Path) -> None:
        path = tmp_path / "checkpoint.safetensors"
        records: list[dict[str, float]] = []
        for _ in range(2):
            train(flat(), {"name": "bpr"}, planted(), checkpoint=path, resume=False, on_epoch=records.append)
        assert [record["epoch"] for record in records] == [0, 1, 0, 1]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"lr": 0.5}, r"lr \(was 0.02, is 0.5\)"),
            ({"seed": 3}, r"seed \(was 0, is 3\)"),
            (
                {"config": {"name": "bpr", "negatives": "popularity"}},
                r"loss.negatives \(was 'uniform', is 'popularity'\)",
            ),
            ({"data": planted(1)}, "data"),
            ({"dim": 4}, r"model.dim \(was 16, is 4\)"),
        ],
    )
    def test_other_settings_are_refused(self, change: dict[str, Any], message: str, tmp_path: Path) -> None:
        path = tmp_path / "checkpoint.safetensors"
        train(flat(), {"name": "bpr"}, planted(), checkpoint=path)
        model = flat(dim=change.pop("dim", 16))
        config, data = change.pop("config", {"name": "bpr"}), change.pop("data", planted())
        with pytest.raises(ValueError, match=message):
            train(model, config, data, checkpoint=path, **change)

    def test_damaged_checkpoint(self, tmp_path: Path) -> None:
        path = tmp_path / "checkpoint.safetensors"
        train(flat(), {"name": "bpr"}, planted(), checkpoint=path)
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            train(flat(), {"name": "bpr"}, planted(), checkpoint=path)

    def test_model_file_is_no_checkpoint(self, tmp_path: Path) -> None:
        path = tmp_path / "file.safetensors"
        save_model(flat(), path)
        with pytest.raises(ValueError, match="holds 'recsys_losses model', expected 'recsys_losses checkpoint'"):
            train(flat(), {"name": "bpr"}, planted(), checkpoint=path)


class TestModelFiles:
    def test_round_trip(self, tmp_path: Path) -> None:
        data = planted()
        for model in (
            flat(user_dropout=0.2),
            LightGCN(NUM_USERS, NUM_ITEMS, data.train, 8, 2, message_dropout=0.1, seed=0),
        ):
            save_model(model, tmp_path / "model.safetensors")
            loaded = load_model(tmp_path / "model.safetensors", data)
            assert loaded.options() == model.options()
            assert evaluate(loaded, data) == evaluate(model, data)

    def test_other_sizes_are_refused(self, tmp_path: Path) -> None:
        save_model(flat(), tmp_path / "model.safetensors")
        other = InteractionData(3, 3, train=torch.tensor([[0], [0]]), test=torch.tensor([[0], [1]]))
        with pytest.raises(ValueError, match="the model has 48 users and 36 items, the data 3 and 3"):
            load_model(tmp_path / "model.safetensors", other)

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
            load_model(tmp_path / "nothing.safetensors")


class TestBadArguments:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"name": "smm"}, "unknown loss 'smm'.*did you mean 'ssm'"),
            ({"name": "ssm", "negatives": "unifrom"}, "unknown negatives.*did you mean 'uniform'"),
            ({"name": "ssm", "temperature": 0.0}, "temperature must be a positive finite number"),
            ({"name": "ssm", "temperature": float("nan")}, "temperature"),
            ({"name": "bilateral", "tau_pos": -1.0}, "tau_pos"),
            ({"name": "bsl", "bsl_mode": "mutli"}, "did you mean 'multi'"),
            ({"name": "bsl", "power": float("inf")}, "power"),
            ({"name": "ssm", "similarity": "cos"}, "similarity"),
            ({"name": "ssm", "num_negatives": 0}, "num_negatives must be >= 1"),
            ({"name": "adap-tau", "center": "quantile"}, r"quantile must be in \[0, 1\]"),
            ({"name": "adap-tau", "beta": 0.0}, "beta"),
            ({"name": "adap-tau", "similarity": "dot"}, "similarity='dot' is not used by loss 'adap-tau'"),
            ({"name": "bpr", "temperature": 0.2}, "temperature=0.2 is not used by loss 'bpr'"),
            ({"name": "bpr", "negatives": "in-batch"}, "takes negatives 'uniform' or 'popularity'"),
            ({"name": "bpr", "num_negatives": 5}, "num_negatives=5 is not used"),
            ({"name": "cpr", "similarity": "cosine"}, "not used by loss 'cpr'"),
            ({"name": "ssm", "logq": True}, "logq needs negatives"),
            ({"name": "ssm", "negatives": "in-batch", "num_negatives": 4}, "num_negatives has no meaning"),
            ({"name": "ssm", "negatives": "all", "mask_accidental": True}, "mask_accidental has no meaning"),
            ({"name": "ssm", "exclude_positives": True, "shared_negatives": True}, "exclude_positives needs"),
        ],
    )
    def test_loss(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            LossConfig(**options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"epochs": 0}, "epochs must be >= 1"),
            ({"batch_size": 0}, "batch_size"),
            ({"eval_every": 0}, "eval_every"),
            ({"patience": 0}, "patience"),
            ({"lr": float("nan")}, "lr must be a positive finite number"),
            ({"l2": -1.0}, "l2 must be a finite number >= 0"),
            ({"l2_on": "layer1"}, "did you mean 'layer0'"),
            ({"select_on": "validation"}, "did you mean 'valid'"),
            ({"score_eval": "cos"}, "unknown score_eval"),
            ({"select_on": "valid", "monitor": "recal@20"}, "did you mean 'recall'"),
            ({"select_on": "valid", "monitor": "arp@20"}, "unknown monitor 'arp'"),
            ({"select_on": "valid", "monitor": "recall@10"}, r"needs its cut-off among ks=\(20,\)"),
            ({"select_on": "valid", "ks": (20, 37)}, r"k must be in 1\.\.36 .* got 37"),
        ],
    )
    def test_fit(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            train(flat(), {"name": "bpr"}, planted(), **options)

    def test_cpr_counts_l2_on_the_table_only(self) -> None:
        with pytest.raises(ValueError, match="l2_on must be 'table'"):
            train(flat(), {"name": "cpr"}, planted(), l2_on="layer0")

    def test_model_of_other_sizes(self) -> None:
        with pytest.raises(ValueError, match="the model has 3 users"):
            train(MatrixFactorization(3, NUM_ITEMS), {"name": "bpr"}, planted())

    def test_empty_parts(self) -> None:
        data = planted()
        nothing = torch.empty(2, 0, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"data\.train is empty"):
            train(flat(), {"name": "bpr"}, dataclasses.replace(data, train=nothing))
        with pytest.raises(ValueError, match="no validation pairs"):
            train(flat(), {"name": "bpr"}, dataclasses.replace(data, valid=nothing), select_on="valid")

    def test_evaluation(self) -> None:
        with pytest.raises(ValueError, match=r"split='valid' needs data\.valid"):
            evaluate(flat(), planted(), split="valid")
        with pytest.raises(ValueError, match="37"):
            evaluate(flat(), planted(), ks=(37,))

    def test_diverging_loss(self) -> None:
        model = flat()
        with torch.no_grad():
            model.user_embedding.fill_(float("nan"))
        with pytest.raises(RuntimeError, match="the loss of epoch 0 is nan"):
            train(model, {"name": "bpr"}, planted())


DISTRIBUTED = [
    "bpr",
    "bce shared",
    "ssm in-batch logq",
    "ssm in-batch masked",
    "softmax own",
    "bsl in-batch",
    "bsl grouped",
    "bilateral all",
    "adap-tau",
    "cpr",
]


def train_many(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Train with every configuration; batches of 33 and a short last one do not divide evenly."""
    results = {}
    data = planted(with_valid=True)
    for name in DISTRIBUTED:
        model: MatrixFactorization | LightGCN
        model = flat(user_dropout=0.1) if name != "cpr" else LightGCN(NUM_USERS, NUM_ITEMS, data.train, 8, 2, seed=0)
        result = train(
            model,
            CONFIGS[name],
            data,
            epochs=3,
            batch_size=33,
            lr=0.01,
            l2=0.01,
            select_on="valid",
            monitor="recall@5",
            ks=(5,),
            checkpoint=f"{folder}/{world_size}-{name}.safetensors" if name == "adap-tau" else None,
        )
        results[name] = [record["loss"] for record in result.history], [p.detach() for p in model.parameters()]
    return results


def test_two_processes_equal_one(tmp_path: Path) -> None:
    alone = train_many(0, 1, str(tmp_path))
    for together in run_gloo(train_many, 2, str(tmp_path)):
        for name in DISTRIBUTED:
            losses, parameters = alone[name]
            assert together[name][0] == pytest.approx(losses, abs=1e-5), name
            for ours, theirs in zip(together[name][1], parameters, strict=True):
                assert (ours - theirs).abs().max() <= 1e-5, name


def test_shares_of_three_processes() -> None:
    rows = torch.arange(7)
    shards = [Shard(rank, 3) for rank in range(3)]
    assert [shard.take(rows).tolist() for shard in shards] == [[0, 1, 2], [3, 4, 5], [6, 6, 6]]
    assert [shard.valid(7) for shard in shards] == [3, 3, 1]
    assert [shard.valid(2) for shard in shards] == [1, 1, 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "options", "score", "recall"),
    [
        ({"name": "ssm", "negatives": "in-batch", "logq": True, "temperature": 0.2}, {"epochs": 16}, "cosine", 0.2838),
        ({"name": "ssm", "temperature": 0.2}, {"epochs": 16}, "cosine", 0.2748),
        ({"name": "bpr"}, {"epochs": 150, "l2": 0.03}, "dot", 0.2526),
    ],
)
def test_reference_figures_of_lastfm(
    config: dict[str, Any], options: dict[str, Any], score: Any, recall: float, data_root: Path
) -> None:
    data = load_dataset("lastfm", data_root)
    model = MatrixFactorization(data.num_users, data.num_items, 64, seed=0)
    fit(model, LossConfig(**config), data, batch_size=1024, lr=5e-3, select_on="none", **options)
    assert evaluate(model, data, score=score)["recall@20"] == pytest.approx(recall, rel=0.03)
