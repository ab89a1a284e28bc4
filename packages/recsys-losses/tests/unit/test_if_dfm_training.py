"""Training on clicks: every method of the comparison, checkpoints, saved models."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from recsys_losses.if_dfm import (
    METHODS,
    MODELS,
    DelayedClicks,
    InfluenceUpdater,
    TrainOptions,
    build_model,
    cvr_metrics,
    fit_clicks,
    load_model,
    make_delayed_clicks,
    predict,
    save_model,
    train_method,
)

WINDOW = {"T": 15.0, "duration": 14.0, "gap": 10.0}
FAST = TrainOptions(epochs=3, batch_size=256, lr=0.02, patience=None, window_hours=24)


@pytest.fixture(scope="module")
def data() -> DelayedClicks:
    return make_delayed_clicks(per_day=150, days=30, num_numeric=4, num_categorical=2, cardinality=10, seed=0)


def _builder(data, name="logistic", **sizes):
    def build(extra, outputs):
        return build_model(name, data.x_num.shape[1] + extra, data.cardinalities, outputs=outputs, seed=3, **sizes)

    return build


def _state(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_to_rank_conversions(data, method):
    trained = train_method(method, data, _builder(data), **WINDOW, options=FAST)
    test = data.window(**WINDOW)["test"]
    probability = trained.predict(test)
    assert ((probability >= 0) & (probability <= 1)).all()
    metrics = cvr_metrics(test.label, probability)
    bayes = cvr_metrics(test.label, data.p_true[test.row])
    assert metrics["auc"] > 0.5 + 0.6 * (bayes["auc"] - 0.5)
    runs = {"es-dfm": 2, "defer": 2, "fsiw": 2, "ulc": 4}.get(method, 1)
    assert len(trained.results) == runs
    assert trained.seconds == pytest.approx(sum(result.seconds for result in trained.results))
    again = train_method(method, data, _builder(data), **WINDOW, options=FAST)
    assert torch.equal(_state(again.model), _state(trained.model))


def _mean_predictions(data, methods, options):
    test = data.window(**WINDOW)["test"]
    return data.p_true[test.row].mean().item(), {
        method: train_method(method, data, _builder(data), **WINDOW, options=options).predict(test).mean().item()
        for method in methods
    }


def test_corrections_bring_the_mean_prediction_back():
    # 40 % of the conversions are still to come: a method that knows about delays predicts more than the stale labels say.
    data = make_delayed_clicks(
        per_day=200, num_numeric=2, num_categorical=1, cardinality=10, mean_delay_days=8.0, seed=1, base=-1.0, drift=0.0
    )
    options = dataclasses.replace(FAST, epochs=4, lr=0.1)
    truth, mean = _mean_predictions(data, ("vanilla", "readd", "fsiw", "dfm", "ulc", "oracle"), options)
    assert mean["vanilla"] < 0.75 * truth
    for method in ("fsiw", "dfm", "ulc"):  # those that look at the age of a click
        assert abs(mean[method] - truth) < abs(mean["readd"] - truth), method
    assert mean["oracle"] == pytest.approx(truth, rel=0.12)


@pytest.mark.parametrize("method", ["vanilla", "ulc", "dfm"])
def test_an_interrupted_run_continues_exactly(data, method, tmp_path):
    options = dataclasses.replace(FAST, epochs=4)
    whole = train_method(method, data, _builder(data), **WINDOW, options=options)

    class StopError(Exception):
        pass

    seen = []

    def interrupt(record):
        seen.append(record)
        if len(seen) == 2:
            raise StopError

    with pytest.raises(StopError):
        train_method(method, data, _builder(data), **WINDOW, options=options, folder=tmp_path, on_epoch=interrupt)
    rest = []
    resumed = train_method(
        method, data, _builder(data), **WINDOW, options=options, folder=tmp_path, on_epoch=rest.append
    )
    assert torch.equal(_state(resumed.model), _state(whole.model))
    assert len(rest) == sum(len(result.history) for result in whole.results) - 2
    with pytest.raises(ValueError, match=r"other settings: lr \(was 0.02, is 0.01\)"):
        train_method(
            method, data, _builder(data), **WINDOW, options=dataclasses.replace(options, lr=0.01), folder=tmp_path
        )


def test_validation_chooses_the_epoch_and_stops(data):
    parts = data.window(**WINDOW)
    options = dataclasses.replace(FAST, epochs=30, patience=2, lr=0.3, monitor="log_loss")
    model = _builder(data)(0, 1)
    result = fit_clicks(model, parts["train"], parts["valid"], options)
    assert result.stopped_early
    losses = [record["log_loss"] for record in result.history]
    assert result.best_epoch == losses.index(min(losses))
    valid = cvr_metrics(parts["valid"].label, predict(model, parts["valid"]))
    assert valid["log_loss"] == pytest.approx(min(losses))


def test_without_validation_the_last_epoch_stays(data):
    parts = data.window(**WINDOW)
    seen = []
    model = _builder(data)(0, 1)
    result = fit_clicks(model, parts["train"], None, FAST, on_epoch=seen.append)
    assert result.best_epoch == 2
    assert [record["epoch"] for record in seen] == [0, 1, 2]
    assert seen[-1]["loss"] < seen[0]["loss"]


def test_l2_is_in_the_gradient(data):
    # Adam's weight decay: one epoch of many steps with a huge factor keeps the weights near zero.
    parts = data.window(**WINDOW)
    norms = []
    for l2 in (0.0, 10.0):
        model = _builder(data)(0, 1)
        fit_clicks(model, parts["train"], None, dataclasses.replace(FAST, l2=l2))
        norms.append(float(_state(model).norm()))
    assert norms[1] < 0.3 * norms[0]


@pytest.mark.parametrize("name", MODELS)
def test_saved_models_come_back(tmp_path, name):
    sizes = {} if name == "logistic" else {"dim": 3}
    model = build_model(name, 2, (4, 5), seed=1, **sizes)
    x_num, x_cat = torch.randn(6, 2), torch.randint(0, 4, (6, 2))
    path = tmp_path / "model.safetensors"
    save_model(model, path, name=name, num_numeric=2, cardinalities=(4, 5), options=sizes, about={"l2": 0.1})
    back, facts = load_model(path)
    torch.testing.assert_close(back(x_num, x_cat), model(x_num, x_cat), rtol=0, atol=0)
    assert facts["about"] == {"l2": 0.1}
    assert model(x_num, x_cat).shape == (6,)
    two = build_model(name, 0, (4, 5), outputs=2, **sizes)
    assert two(torch.zeros(6, 0), x_cat).shape == (6, 2)


@pytest.mark.parametrize("name", MODELS)
def test_building_is_seeded_and_leaves_the_global_state(name):
    before = torch.get_rng_state()
    one, same, other = (build_model(name, 2, (5,), seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(_state(one), _state(same))
    assert name == "logistic" or not torch.equal(_state(one), _state(other))


def test_deepfm_adds_pairwise_products():
    model = build_model("deepfm", 1, (2, 3), dim=4, hidden=())
    x_num, x_cat = torch.tensor([[2.0]]), torch.tensor([[1, 2]])
    e = torch.stack([2.0 * model.fields.numeric[0], model.fields.table.weight[1], model.fields.table.weight[4]])
    pairs = sum(e[i] @ e[j] for i in range(3) for j in range(i))
    deep = model.deep(e.flatten().unsqueeze(0)).squeeze()
    torch.testing.assert_close(model(x_num, x_cat)[0], deep + pairs)


def test_an_update_is_cheaper_than_retraining_in_passes(data):
    # The work, not the clock: passes over rows of an update on a sample against those of a training run.
    parts = data.window(**WINDOW)
    trained = train_method("vanilla", data, _builder(data, "mlp", dim=4, hidden=(16,)), **WINDOW, options=FAST)
    sample = parts["train"][torch.arange(0, len(parts["train"]), 8)]
    updater = InfluenceUpdater(
        trained.model,
        parts["train"].loader(),
        damping=0.03,
        hessian="ggn",
        l2=FAST.l2,
        curvature_loader=sample.loader(),
        cache=True,
        tol=1e-2,
    )
    update = updater.update(parts["flipped"].loader())
    assert update.info["converged"]
    # forward, backward and two backward passes per product
    update_rows = 4 * update.info["products"] * len(sample) + 3 * len(parts["flipped"])
    retrain_rows = 3 * 20 * len(parts["train"])
    assert update_rows * 10 < retrain_rows


BAD = [
    (lambda d: train_method("esdfm", d, _builder(d), **WINDOW), r"unknown method 'esdfm'.*did you mean 'es-dfm'\?"),
    (lambda d: TrainOptions(epochs=0), "epochs must be >= 1, got 0"),
    (lambda d: TrainOptions(lr=0.0), "lr must be a positive finite number"),
    (lambda d: TrainOptions(l2=-1.0), "l2 must be a finite number >= 0"),
    (lambda d: TrainOptions(monitor="recall"), "unknown monitor 'recall'"),
    (lambda d: fit_clicks(_builder(d)(0, 1), d.clicks(torch.arange(0)), None, FAST), "no clicks to train on"),
    (
        lambda d: train_method(
            "fsiw", d, _builder(d), **WINDOW, options=dataclasses.replace(FAST, counterfactual_days=30.0)
        ),
        "lower counterfactual_days",
    ),
    (lambda d: build_model("mpl", 1, (2,)), r"unknown model 'mpl'.*did you mean 'mlp'\?"),
    (lambda d: build_model("mlp", 0, ()), "a model needs features"),
    (lambda d: build_model("mlp", 1, (2,), layers=3), "model 'mlp'.*layers"),
    (lambda d: build_model("mlp", 1, (2,), hidden=(0,)), "hidden must hold widths >= 1"),
    (lambda d: build_model("mlp", 1, (2,), dim=0), "dim must be >= 1"),
    (lambda d: build_model("autoint", 1, (2,), heads=3), "heads must divide attention_dim 16, got 3"),
    (lambda d: build_model("autoint", 1, (2,), layers=0), "layers must be >= 1"),
    (lambda d: build_model("dcnv2", 1, (2,), cross_layers=0), "cross_layers must be >= 1"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=range(len(BAD)))
def test_bad_arguments(data, call, message):
    with pytest.raises(ValueError, match=message):
        call(data)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((-1, [3]), {}, "num_numeric=-1"),
        ((2, [3, 0]), {}, r"cardinalities=\(3, 0\)"),
        ((0, []), {}, "a model needs features"),
        ((2, [3]), {"outputs": 0}, "outputs must be >= 1, got 0"),
    ],
)
def test_a_model_refuses_sizes_out_of_range(model, sizes, options, message):
    with pytest.raises(ValueError, match=message):
        model(*sizes, **options)
