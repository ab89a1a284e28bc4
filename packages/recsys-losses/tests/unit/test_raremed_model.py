"""The network, the pretext tasks, the trainer and the baselines of RAREMed."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from recsys_losses.raremed import (
    EHRDataset,
    RAREMed,
    RAREMedTrainer,
    Visit,
    evaluate_recommendations,
    load_raremed,
    logistic_medications,
    make_smp_negatives,
    mask_codes,
    popular_medications,
    predict_medications,
    save_raremed,
)

SIZES = (300, 80, 90)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(relevance: str = "rank", **options) -> RAREMed:
    options = {"embed_dim": 16, "num_layers": 2, "num_heads": 2, "ff_dim": 32, **options}
    return RAREMed(*SIZES, relevance=relevance, **options)


@pytest.fixture(scope="module")
def parts() -> tuple[EHRDataset, EHRDataset, EHRDataset]:
    return EHRDataset.synthetic(num_patients=60, seed=1).split()


def trainer(parts, *, seed: int = 0, dropout: float = 0.3, **options) -> RAREMedTrainer:
    return RAREMedTrainer(network(dropout=dropout), parts[0], parts[1], seed=seed, **{"lr": 1e-3, **options})


DIAGNOSES = [[4, 7, 1], [5], [299, 0, 3, 9, 2, 8], [5, 6]]
PROCEDURES = [[2], [], [79, 0, 1], [3, 4, 5, 6]]


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_padded_batch_equals_one_by_one(mode):
    model = network(dropout=0.0).train(mode == "train")
    batch = model.encode(DIAGNOSES, PROCEDURES)
    alone = torch.cat([model.encode([d], [p]) for d, p in zip(DIAGNOSES, PROCEDURES, strict=True)])
    torch.testing.assert_close(batch, alone, rtol=0, atol=1e-5)
    assert (batch[0] - batch[1]).abs().max() > 0.1


def test_padding_gets_no_gradient():
    model = network(dropout=0.0)
    model.encode(DIAGNOSES, PROCEDURES)[1].sum().backward()  # the shortest visit: code 5 alone
    used = torch.nonzero(model.token.weight.grad.abs().sum(1)).flatten().tolist()
    assert used == [0, 1, 2 + 5]


def test_it_is_the_encoder_of_torch_at_the_first_position():
    model = network(dropout=0.0).double()
    tokens = model.tokens(DIAGNOSES, PROCEDURES)
    x = model.token(tokens.ids) + model.segment(tokens.segment) + model.relevance(tokens.relevance)
    want = model.encoder(x, src_key_padding_mask=tokens.padding)[:, 0]
    torch.testing.assert_close(model.encode(DIAGNOSES, PROCEDURES), want, rtol=1e-10, atol=1e-12)


def test_tokens_are_laid_out_as_in_the_paper():
    tokens = network().tokens([[7, 4]], [[3]])
    assert tokens.ids.tolist() == [[0, 2 + 7, 2 + 4, 1, 2 + 301 + 3]]
    assert tokens.segment.tolist() == [[0, 0, 0, 0, 1]]  # [SEP] belongs to the first segment
    assert tokens.relevance.tolist() == [[0, 1, 2, 1000, 1001]]
    assert network("constant").tokens([[7, 4]], [[3]]).relevance.tolist() == [[0, 0, 0, 1000, 1000]]
    assert tokens.padding is None


@pytest.mark.parametrize(("relevance", "same"), [("constant", True), ("rank", False)])
def test_the_order_of_codes(relevance, same):
    model = network(relevance, dropout=0.0)
    one = model.encode([[4, 7, 1]], [[2, 3]])
    other = model.encode([[1, 4, 7]], [[3, 2]])
    assert torch.allclose(one, other, rtol=0, atol=1e-6) == same


def test_diagnoses_and_procedures_are_told_apart():
    model = network(dropout=0.0)
    assert not torch.allclose(model.encode([[4, 5]], [[]]), model.encode([[4]], [[5]]), atol=1e-4)


def test_initial_weights():
    model, again, other = network(seed=3), network(seed=3), network(seed=4)
    for table in (model.token, model.segment, model.relevance):
        assert table.weight.abs().max() <= 0.1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(model.token.weight, other.token.weight)
    before = torch.random.get_rng_state()
    network()
    assert torch.equal(before, torch.random.get_rng_state())


def test_recommend_is_the_thresholded_prediction(parts):
    model, visit = network(dropout=0.5), parts[0].visits[3]
    model.train()
    [probability] = predict_medications(model, EHRDataset((visit,), parts[0].vocabulary, parts[0].ddi_adj))
    for threshold in (0.4, 0.5, 0.6):
        want = np.flatnonzero(probability >= threshold).tolist()
        assert model.recommend(visit, threshold) == want
        assert model.recommend((visit.diagnoses, visit.procedures), threshold) == want
    assert model.training


def test_heads_have_the_sizes_of_the_tasks():
    model = network()
    z = model.encode(DIAGNOSES, PROCEDURES)
    assert [head(z).shape[1] for head in (model.smp, model.sr, model.medication)] == [1, 380, 90]
    assert model(DIAGNOSES, PROCEDURES).shape == (4, 90)


@pytest.mark.parametrize(
    ("diagnoses", "procedures", "message"),
    [
        ([[]], [[1]], "no diagnoses"),
        ([[300]], [[1]], "diagnosis id 300 is out of range"),
        ([[1]], [[80]], "procedure id 80 is out of range"),
        ([[1]], [], "as many"),
        ([], [], "as many"),
        ([[1] * 1000], [[]], "at most 999"),
    ],
)
def test_encode_refuses(diagnoses, procedures, message):
    with pytest.raises(ValueError, match=message):
        network().encode(diagnoses, procedures)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 15}, "divisible"),
        ({"num_layers": 0}, "num_layers"),
        ({"dropout": 1.0}, "dropout"),
        ({"relevance": "ranked"}, "did you mean 'rank'"),
    ],
)
def test_network_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        network(**options)


@pytest.mark.parametrize("threshold", [0.0, 1.0, float("nan")])
def test_recommend_refuses(threshold):
    with pytest.raises(ValueError, match="threshold"):
        network().recommend(([1], []), threshold)


def test_saved_models_come_back(tmp_path):
    model = network("constant", dropout=0.1)
    save_raremed(model, tmp_path / "model.safetensors")
    again = load_raremed(tmp_path / "model.safetensors")
    assert again.options() == model.options()
    torch.testing.assert_close(again.eval().encode(DIAGNOSES, PROCEDURES), model.eval().encode(DIAGNOSES, PROCEDURES))
    with pytest.raises(FileNotFoundError, match="none"):
        load_raremed(tmp_path / "none.safetensors")


# --- pretext tasks ----------------------------------------------------------------------------------------------------


def test_mixed_visits_keep_one_half(parts):
    visits, pool = parts[0].visits, (*parts[0].visits, *parts[1].visits)
    mixed = make_smp_negatives(visits, pool, per_positive=2, generator=generator())
    assert len(mixed) == 2 * len(visits)
    known = {v.diagnoses for v in pool}, {v.procedures for v in pool}
    kept_diagnoses = 0
    for i, new in enumerate(mixed):
        old = visits[i // 2]
        kept_diagnoses += new.diagnoses == old.diagnoses and new.procedures != old.procedures
        assert new.diagnoses == old.diagnoses or new.procedures == old.procedures
        assert new.diagnoses in known[0]
        assert new.procedures in known[1]
    assert kept_diagnoses / len(mixed) == pytest.approx(0.5, abs=0.12)


def test_mixed_visits_differ_in_their_procedures():
    same, other = Visit("1", "a", (0,), (1,), ()), Visit("1", "b", (2,), (3,), ())
    pool = [same] * 400 + [other]  # random draws alone would nearly always fail
    for seed in range(10):
        [mixed] = make_smp_negatives([same], pool, generator=generator(seed))
        assert (mixed.diagnoses, mixed.procedures) in (((0,), (3,)), ((2,), (1,)))


def test_mixed_visits_of_another_patient():
    visit = Visit("1", "a", (0,), (1,), ())
    pool = [Visit("1", "b", (2,), (3,), ()), Visit("2", "c", (4,), (5,), ())]
    partners = set()
    for seed in range(20):
        [mixed] = make_smp_negatives([visit], pool, different_patient=True, generator=generator(seed))
        partners |= {*mixed.diagnoses, *mixed.procedures} - {0, 1}
    assert partners == {4, 5}
    with pytest.raises(ValueError, match="no visit of the pool differs"):
        make_smp_negatives([visit], pool[:1], different_patient=True)


@pytest.mark.parametrize(
    ("visits", "pool", "options", "message"),
    [
        ([], [Visit("1", "a", (0,), (1,), ())], {}, "nothing to mix"),
        ([Visit("1", "a", (0,), (1,), ())], [], {}, "nothing to mix"),
        ([Visit("1", "a", (0,), (1,), ())], [Visit("2", "b", (5,), (1,), ())], {}, "no visit of the pool differs"),
        ([Visit("1", "a", (0,), (1,), ())], [Visit("2", "b", (5,), (2,), ())], {"per_positive": 0}, "per_positive"),
    ],
)
def test_mixing_refuses(visits, pool, options, message):
    with pytest.raises(ValueError, match=message):
        make_smp_negatives(visits, pool, **options)


def test_masking_shares_and_purity():
    codes = [[i % 50 for i in range(1000)] for _ in range(20)]
    before = copy.deepcopy(codes)
    hidden = mask_codes(codes, num_codes=50, mask_prob=0.5, generator=generator())
    assert codes == before
    flat, new = np.array(codes), np.array(hidden)
    assert (new == 50).mean() == pytest.approx(0.4, abs=0.02)
    # 10 % random, of which 1 / 50 hit the same code
    assert ((new != flat) & (new != 50)).mean() == pytest.approx(0.05 * 49 / 50, abs=0.01)
    assert mask_codes([[1], [2, 3]], num_codes=5, mask_prob=0.0) == [[1], [2, 3]]
    assert mask_codes([[], []], num_codes=5) == [[], []]


@pytest.mark.parametrize(
    ("codes", "options", "message"),
    [
        ([[5]], {"num_codes": 5}, "out of range"),
        ([[0]], {"num_codes": 0}, "num_codes"),
        ([[0]], {"num_codes": 5, "mask_prob": 1.5}, "mask_prob"),
    ],
)
def test_masking_refuses(codes, options, message):
    with pytest.raises(ValueError, match=message):
        mask_codes(codes, **options)


# --- the trainer ------------------------------------------------------------------------------------------------------


def stages(run: RAREMedTrainer, folder=None, *, epochs: int = 3) -> dict[str, list]:
    files = {name: None if folder is None else folder / f"{name}.safetensors" for name in ("smp", "sr", "medication")}
    return {
        "smp": run.pretrain_smp(2, different_patient=True, checkpoint=files["smp"]).history,
        "sr": run.pretrain_sr(2, mask_prob=0.15, checkpoint=files["sr"]).history,
        "medication": run.finetune(epochs, checkpoint=files["medication"]).history,
    }


def plain(history):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in history]


def test_interrupted_stages_continue_to_the_same_weights(parts, tmp_path):
    whole = trainer(parts)
    histories = stages(whole)

    class Stop(Exception):
        pass

    def stop(record):
        if record["epoch"] == 1:
            raise Stop

    cut = trainer(parts)
    cut.pretrain_smp(2, different_patient=True, checkpoint=tmp_path / "smp.safetensors")
    with pytest.raises(Stop):
        cut.pretrain_sr(2, mask_prob=0.15, checkpoint=tmp_path / "sr.safetensors", on_epoch=stop)
    cut = trainer(parts)
    cut.pretrain_smp(2, different_patient=True, checkpoint=tmp_path / "smp.safetensors")
    cut.pretrain_sr(2, mask_prob=0.15, checkpoint=tmp_path / "sr.safetensors")
    with pytest.raises(Stop):
        cut.finetune(3, checkpoint=tmp_path / "medication.safetensors", on_epoch=stop)
    resumed = trainer(parts)
    again = stages(resumed, tmp_path)
    assert {name: plain(h) for name, h in again.items()} == {name: plain(h) for name, h in histories.items()}
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_checkpoint_of_other_stages_or_settings_is_refused(parts, tmp_path):
    file = tmp_path / "medication.safetensors"
    trainer(parts).finetune(1, checkpoint=file)
    with pytest.raises(ValueError, match=r"other settings: stage\.ddi_weight"):
        trainer(parts, ddi_weight=1.0).finetune(2, checkpoint=file)
    other = trainer(parts)
    other.pretrain_sr(1)
    with pytest.raises(ValueError, match="earlier stages"):
        other.finetune(2, checkpoint=file)
    assert len(trainer(parts, lr=1e-4).finetune(1, checkpoint=file, resume=False).history) == 1


def test_one_optimiser_is_carried_over_the_stages(parts):
    run = trainer(parts)
    run.pretrain_sr(1)
    shared = run.model.token.weight
    steps = int(run.optimizer.state[shared]["step"])
    assert steps == -(-len(parts[0]) // 16)
    run.finetune(1)
    assert int(run.optimizer.state[shared]["step"]) == 2 * steps
    assert int(run.optimizer.state[run.model.medication.weight]["step"]) == steps


def test_every_parameter_of_a_stage_moves(parts):
    run = trainer(parts)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.finetune(2)
    moved = {name for name, value in run.model.state_dict().items() if not torch.equal(value, before[name])}
    assert set(before) - moved == {"smp.weight", "smp.bias", "sr.weight", "sr.bias"}


def test_the_best_validation_epoch_is_kept(parts):
    run = trainer(parts)
    result = run.finetune(4)
    best = max(result.history, key=lambda record: record["jaccard"])
    assert result.best["jaccard"] == best["jaccard"]
    assert run.evaluate(parts[1])["jaccard"] == pytest.approx(best["jaccard"])


def test_training_is_seeded_and_leaves_the_global_generator_alone(parts):
    before = torch.random.get_rng_state()
    losses = [[r["loss"] for r in stages(trainer(parts, seed=seed), epochs=1)["medication"]] for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_batch_of_one_is_the_regime_of_the_authors(parts):
    run = trainer(parts, batch_size=1, lr=1e-5)
    run.finetune(1)
    assert int(run.optimizer.state[run.model.token.weight]["step"]) == len(parts[0])


def test_the_loss_of_an_epoch_does_not_depend_on_the_batches(parts):
    # without dropout and at a learning rate of nearly zero: padding and buckets change nothing
    losses = []
    for size in (1, 7, 64):
        run = trainer(parts, dropout=0.0, lr=1e-12, batch_size=size)
        losses.append((run.pretrain_sr(1).history[0]["loss"], run.finetune(1).history[0]["loss"]))
    np.testing.assert_allclose(losses, [losses[0]] * 3, rtol=1e-5)


def test_smp_in_the_form_of_the_code(parts):
    history = trainer(parts, dropout=0.0).pretrain_smp(2, form="pairwise_softmax").history
    assert 0.31 < history[-1]["loss"] < 1.32
    assert 0.3 < history[-1]["accuracy"] < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"lr": 0.0}, "lr"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"threshold": 1.0}, "threshold"),
        ({"margin_weight": 2.0}, "margin_weight"),
        ({"ddi_weight": -1.0}, "ddi_weight"),
    ],
)
def test_trainer_refuses(parts, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(parts, **options)


def test_trainer_refuses_in_its_stages(parts):
    run = trainer(parts)
    with pytest.raises(ValueError, match="form"):
        run.pretrain_smp(1, form="bcee")
    with pytest.raises(ValueError, match="mask_prob"):
        run.pretrain_sr(1, mask_prob=2.0)
    with pytest.raises(ValueError, match="patience"):
        run.finetune(1, patience=0)
    with pytest.raises(ValueError, match="epochs"):
        run.finetune(0)
    with pytest.raises(ValueError, match="sizes"):
        RAREMedTrainer(RAREMed(300, 80, 91, 16, 1, 2, 32), parts[0], parts[1])


# --- evaluation and baselines -----------------------------------------------------------------------------------------


def test_predictions_are_in_the_order_of_the_visits(parts):
    model = network().eval()
    got = predict_medications(model, parts[2])
    want = torch.sigmoid(model([v.diagnoses for v in parts[2].visits], [v.procedures for v in parts[2].visits]))
    np.testing.assert_allclose(got, want.detach().numpy(), atol=1e-6)


def test_evaluation_of_the_truth(parts):
    metrics = evaluate_recommendations(parts[2], parts[2].targets())
    perfect = {"jaccard": 1.0, "prauc": 1.0, "f1": 1.0, "weighted_jaccard": 1.0, "gap": 0.0, "group_std": 0.0}
    assert {name: metrics[name] for name in perfect} == pytest.approx(perfect)
    assert metrics["num_med"] == pytest.approx(parts[2].targets().sum(1).mean().item())
    assert "gap" not in evaluate_recommendations(parts[2], parts[2].targets(), num_groups=None)


def test_popular_medications_are_those_of_train(parts):
    probability = popular_medications(parts[0], parts[2], k=3)
    top = parts[0].targets().sum(0).argsort(descending=True, stable=True)[:3]
    assert all(set(np.flatnonzero(row >= 0.5)) == set(top.tolist()) for row in probability)
    for k in (1, 90):
        assert (popular_medications(parts[0], parts[2], k=k)[0] >= 0.5).sum() == k
    with pytest.raises(ValueError, match="k must be"):
        popular_medications(parts[0], parts[2], k=0)


def test_logistic_regression_beats_popularity_and_knows_constant_drugs(parts):
    train = EHRDataset(
        tuple(v._replace(medications=tuple(sorted({*v.medications, 0} - {1}))) for v in parts[0].visits),
        parts[0].vocabulary,
        parts[0].ddi_adj,
    )
    probability = logistic_medications(train, parts[2])
    assert (probability[:, 0] == 1).all()
    assert (probability[:, 1] == 0).all()
    learned = evaluate_recommendations(parts[2], logistic_medications(parts[0], parts[2]))
    popular = evaluate_recommendations(parts[2], popular_medications(parts[0], parts[2]))
    assert learned["prauc"] > popular["prauc"] + 0.02
    with pytest.raises(ValueError, match="C must be"):
        logistic_medications(train, parts[2], C=0.0)


# --- what training reaches --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large() -> tuple[EHRDataset, EHRDataset, EHRDataset]:
    return EHRDataset.synthetic(seed=0).split()


def reach(large, **weights) -> dict[str, float]:
    train, valid, test = large
    model = RAREMed(*SIZES, 64, 1, 4, 128, dropout=0.1)
    run = RAREMedTrainer(model, train, valid, batch_size=32, lr=2e-3, **weights)
    run.finetune(8)
    return run.evaluate(test)


@pytest.mark.slow
def test_finetuning_and_what_its_weights_do(large):
    # measured on seed 0: see the docs page; the margins are those of the method card
    plain, careful, generous = reach(large), reach(large, ddi_weight=5.0), reach(large, margin_weight=0.2)
    popular = evaluate_recommendations(large[2], popular_medications(large[0], large[2]))
    assert plain["jaccard"] > popular["jaccard"] + 0.1
    assert careful["ddi_rate"] < plain["ddi_rate"] - 0.02
    assert careful["num_med"] < plain["num_med"]
    assert generous["num_med"] > plain["num_med"] + 3


@pytest.mark.slow
def test_pretraining_tasks_are_learned(large):
    train, valid, _ = large
    run = RAREMedTrainer(RAREMed(*SIZES, 64, 1, 4, 128, dropout=0.0), train, valid, batch_size=16, lr=1e-3)
    smp = run.pretrain_smp(18).history
    assert smp[-1]["accuracy"] > 0.8
    fresh = RAREMedTrainer(RAREMed(*SIZES, 64, 1, 4, 128), train, valid, batch_size=16, lr=1e-3)
    sr = [record["loss"] for record in fresh.pretrain_sr(4).history]
    assert sr == sorted(sr, reverse=True)
    # the best that a constant prediction, the frequency of each code, can do
    codes = np.zeros((len(train), sum(SIZES[:2])))
    for row, visit in zip(codes, train.visits, strict=True):
        row[[*visit.diagnoses, *(SIZES[0] + code for code in visit.procedures)]] = 1
    share = codes.mean(0)
    constant = -(codes * np.log(share + 1e-12) + (1 - codes) * np.log(1 - share + 1e-12)).mean()
    assert sr[-1] < 0.9 * constant
