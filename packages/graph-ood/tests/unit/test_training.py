from __future__ import annotations

import random

import pytest
import torch
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader

from graph_ood.nets import ConvStack, GraphClassifier
from graph_ood.training import (
    History,
    cross_validate,
    evaluate,
    fit,
    load_model,
    save_model,
    supervised_step,
)


def ring(n):
    nodes = torch.arange(n)
    after = (nodes + 1) % n
    return torch.cat([torch.stack([nodes, after]), torch.stack([after, nodes])], 1)


def graphs(count=24, seed=0):
    """Class 0: features around 0; class 1: around 1. On rings."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Data(x=torch.randn(4, 3, generator=generator) * 0.3 + i % 2, edge_index=ring(4), y=torch.tensor([i % 2]))
        for i in range(count)
    ]


def make(seed=0):
    torch.manual_seed(seed)
    model = GraphClassifier(ConvStack(3, 8, 2), 2)
    return model, torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=1e-3)


def run(epochs, *, checkpoint=None, loader=None, **options):
    model, optimizer = make()
    loader = loader or DataLoader(graphs(), batch_size=8, shuffle=True)
    history = fit(
        model,
        loader,
        step=supervised_step(model, optimizer),
        predict=model,
        optimizers=[optimizer],
        val_loader=DataLoader(graphs(12, seed=1), batch_size=6),
        test_loaders={"test": DataLoader(graphs(12, seed=2), batch_size=6)},
        epochs=epochs,
        checkpoint=checkpoint,
        **options,
    )
    return model, history


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def without_time(history):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in history.records]


def test_it_learns_and_keeps_the_best_validation_epoch():
    model, history = run(15)
    assert history.best["val_accuracy"] == max(record["val_accuracy"] for record in history.records)
    assert history.best_epoch == next(
        r["epoch"] for r in history.records if r["val_accuracy"] == history.best["val_accuracy"]
    )
    assert evaluate(model, DataLoader(graphs(12, seed=1), batch_size=6)) == history.best["val_accuracy"]
    assert history.best["test_accuracy"] > 0.8
    assert not model.training


@pytest.mark.parametrize("scheduler", [None, "cosine"])
@pytest.mark.parametrize("own_generator", [False, True])
def test_a_run_continues_exactly(tmp_path, scheduler, own_generator):
    def loader():
        generator = torch.Generator().manual_seed(7) if own_generator else None
        return DataLoader(graphs(), batch_size=8, shuffle=True, generator=generator)

    whole, expected = run(6, scheduler=scheduler, loader=loader())
    stopped = []

    def stop(record):
        stopped.append(record)
        if len(stopped) == 3:
            raise KeyboardInterrupt

    file = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(6, scheduler=scheduler, checkpoint=file, on_epoch=stop, loader=loader())
    random.seed(1)
    torch.manual_seed(99)  # what happened elsewhere does not matter
    again, history = run(6, scheduler=scheduler, checkpoint=file, loader=loader())
    assert same(whole, again)
    assert without_time(history) == without_time(expected)
    assert history.best_epoch == expected.best_epoch


def test_a_finished_run_is_not_trained_again(tmp_path):
    file = tmp_path / "run.safetensors"
    model, history = run(3, checkpoint=file)
    again, second = run(3, checkpoint=file, on_epoch=lambda _: pytest.fail("trained"))
    assert same(model, again)
    assert second.records == history.records


def test_another_setting_is_refused(tmp_path):
    file = tmp_path / "run.safetensors"
    run(2, checkpoint=file)
    with pytest.raises(ValueError, match=r"other settings: seed \(was 0, is 1\)"):
        run(3, checkpoint=file, seed=1)
    run(3, checkpoint=file, seed=1, resume=False)
    file.write_bytes(b"no")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        run(3, checkpoint=file)


def test_seeds_decide_everything():
    torch.manual_seed(5)
    first, _ = run(2)
    torch.manual_seed(6)
    second, _ = run(2)
    other, _ = run(2, seed=1)
    assert same(first, second)
    assert not same(first, other)


def test_global_randomness_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    model, optimizer = make()
    torch.manual_seed(3)
    loader = [Batch.from_data_list(graphs(4))]
    fit(model, loader, step=supervised_step(model, optimizer), predict=model, optimizers=[optimizer], epochs=1)
    assert torch.equal(torch.rand(1), expected)


def test_the_cosine_ends_near_min_lr_and_rates_come_back():
    model, optimizer = make()
    rates = []

    def step(batch):
        rates.append(optimizer.param_groups[0]["lr"])
        return supervised_step(model, optimizer)(batch)

    loader = [Batch.from_data_list(graphs(4))]
    arguments = {"predict": model, "optimizers": [optimizer], "epochs": 10, "scheduler": "cosine", "min_lr": 1e-3}
    fit(model, loader, step=step, **arguments)
    reference = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(reference, 10, eta_min=1e-3)
    for rate in rates:
        assert rate == pytest.approx(schedule.get_last_lr()[0])
        reference.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_warmup_epochs_cannot_be_chosen():
    _, history = run(4, warmup_select=3)
    assert history.best_epoch == 3


def test_a_single_graph_at_the_end_is_skipped():
    _, history = run(1, loader=DataLoader(graphs(9), batch_size=8))
    assert history.records[0]["loss"] > 0
    with pytest.raises(ValueError, match="two graphs"):
        run(1, loader=DataLoader(graphs(3), batch_size=1))


def test_a_loss_that_is_not_finite_stops_the_run():
    model, optimizer = make()
    bad = [Batch.from_data_list([Data(x=torch.full((2, 3), torch.nan), edge_index=ring(2), y=torch.tensor([0]))] * 2)]
    with pytest.raises(RuntimeError, match="training of epoch 0"):
        fit(model, bad, step=supervised_step(model, optimizer), predict=model, optimizers=[optimizer], epochs=1)


def test_metrics():
    data = [Data(x=torch.ones(1, 1), y=i) for i in (0, 1, 1)]
    loader = DataLoader(data, batch_size=3)
    logits = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0]])
    assert evaluate(lambda _: logits, loader) == pytest.approx(2 / 3)
    assert evaluate(lambda _: logits, loader, metric="roc_auc") == 1.0
    assert evaluate(lambda _: logits[:, 1], loader, metric="roc_auc") == 1.0
    assert evaluate(lambda _: logits[:, 1] - 1.5, loader) == 1.0
    with pytest.raises(ValueError, match="two classes"):
        evaluate(lambda _: torch.zeros(3, 3), loader, metric="roc_auc")
    with pytest.raises(ValueError, match="one class"):
        evaluate(lambda _: logits[1:], DataLoader(data[1:], batch_size=2), metric="roc_auc")
    with pytest.raises(ValueError, match="empty"):
        evaluate(lambda _: logits, [])


def test_folds_are_disjoint_and_cover():
    data = graphs(30)
    seen = []

    def train_fold(train, val, test, fold):
        ids = [{id(graph) for graph in part} for part in (train, val, test)]
        assert not ids[0] & ids[1] and not ids[0] & ids[2] and not ids[1] & ids[2]  # noqa: PT018
        assert len(ids[0]) + len(ids[1]) + len(ids[2]) == 30
        seen.extend(id(graph) for graph in test)
        return History([{"epoch": e, "test_accuracy": v} for e, v in enumerate((fold / 10, 0.2))], best_epoch=0)

    result = cross_validate(data, train_fold, folds=3)
    assert sorted(seen) == sorted(id(graph) for graph in data)
    assert result.mean == pytest.approx(0.1)
    assert result.std == pytest.approx((2 / 3) ** 0.5 / 10)
    assert result.test_max == pytest.approx(0.2)

    def without_validation(train, val, test, fold):
        assert val is None
        assert len(train) + len(test) == 30
        return History([{"test_accuracy": 0.1}, {"test_accuracy": 0.3}], best_epoch=0)

    optimistic = cross_validate(data, without_validation, folds=3, selection="test_max")
    assert optimistic.mean == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: run(0), "epochs must be an integer >= 1"),
        (lambda: run(2, scheduler="linear"), "unknown scheduler"),
        (lambda: run(2, min_lr=-1.0), "min_lr"),
        (lambda: run(2, warmup_select=2), "warmup_select must be in"),
        (lambda: run(2, metric="f1"), "unknown metric"),
        (lambda: cross_validate(graphs(6), None, folds=4), "smallest class"),
        (lambda: cross_validate(graphs(12), None, folds=2), "folds must be an integer >= 3"),
        (lambda: cross_validate(graphs(12), None, folds=3, only=[3]), "only must name folds"),
        (lambda: cross_validate(graphs(12), None, selection="best"), "unknown selection"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_model_file_round_trip(tmp_path):
    model, _ = make()
    save_model(tmp_path / "a" / "m.safetensors", model, {"hidden": 8})
    state, settings = load_model(tmp_path / "a" / "m.safetensors")
    assert settings == {"hidden": 8}
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / "none")
