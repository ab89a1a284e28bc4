"""AIA on CUDA: the losses and gradients of the host, no wait in a step, and training at full size."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch_geometric.data import Batch
from torch_geometric.loader import DataLoader

from graph_ood.aia import AIA, AIATrainer, train_domain_encoder
from graph_ood.baselines import train_baseline
from graph_ood.data import load_good_motif
from graph_ood.nets import ConvStack, GraphClassifier

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def _batch() -> Batch:
    return Batch.from_data_list(list(load_good_motif(None, "base", "covariate", num_data=300)["train"]))


@pytest.mark.parametrize("encoder", ["gin", "gcn", "gat"])
@pytest.mark.parametrize("side", ["stable", "adversarial"])
def test_losses_and_gradients_equal_the_host(encoder: str, side: str) -> None:
    torch.manual_seed(0)
    model = AIA(1, 3, hidden=16, dropout=0.0, encoder=encoder).double()  # type: ignore[arg-type]
    batch = _batch()
    batch.x = batch.x.double()
    found = []
    for device in ("cpu", "cuda"):
        net, data = copy.deepcopy(model).to(device), copy.copy(batch).to(device)
        parameters = net.stable_parameters() if side == "stable" else net.adversarial_parameters()
        step = net.stable_step if side == "stable" else net.adversarial_step
        parts = step(data, data.y)
        grads = torch.autograd.grad(parts["loss"], parameters)
        found.append([x.detach().cpu() for x in (*parts.values(), *grads)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-9)


def test_a_step_does_not_wait_for_the_device() -> None:
    batch = _batch().to("cuda")
    trainer = AIATrainer(AIA(1, 3, hidden=32).to("cuda"))
    for _ in range(2):
        trainer.step(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_interrupted_run_goes_on_with_both_optimizers(tmp_path) -> None:  # type: ignore[no-untyped-def]
    splits = load_good_motif(None, "base", "covariate", num_data=300)
    loader, val = DataLoader(splits["train"], 32, shuffle=True), DataLoader(splits["val"], 256)

    class Stop(Exception):
        pass

    def stop(record: dict[str, float]) -> None:
        if record["epoch"] == 1:
            raise Stop

    def trainer() -> AIATrainer:
        torch.manual_seed(0)
        return AIATrainer(AIA(1, 3, hidden=16), epochs=4, warmup_select=1)

    with pytest.raises(Stop):
        trainer().fit(loader, val, device="cuda", checkpoint=tmp_path / "run", on_epoch=stop)
    rest = trainer()
    history = rest.fit(loader, val, device="cuda", checkpoint=tmp_path / "run")
    assert len(history.records) == 4
    assert all(math.isfinite(value) for record in history.records for value in record.values())
    assert rest.stable_optimizer.state[rest.model.stable_parameters()[0]]["exp_avg"].is_cuda


def test_domain_encoder_trains_there() -> None:
    graphs = list(load_good_motif(None, "base", "covariate", num_data=300)["train"])
    features = train_domain_encoder(graphs[:60], graphs[60:120], epochs=1, device="cuda").features(graphs)
    assert features.shape == (len(graphs), 16)
    assert not features.is_cuda


@pytest.mark.slow
def test_mean_accuracy_on_unseen_bases_is_not_below_erm() -> None:
    splits = load_good_motif(None, "base", "covariate", num_data=30000)
    val, test = (DataLoader(splits[name], 1024) for name in ("val", "test"))
    accuracy: dict[str, list[float]] = {"erm": [], "aia": []}
    for seed in range(10):
        loader = DataLoader(splits["train"], 256, shuffle=True)
        torch.manual_seed(seed)
        erm = GraphClassifier(ConvStack(1, 128, 4, "weighted_gin"), 3, pool="mean", head=torch.nn.Linear(128, 3))
        shared = {"epochs": 40, "warmup_select": 28, "scheduler": "cosine", "seed": seed}
        history = train_baseline(erm, loader, val, test_loaders={"test": test}, device="cuda", **shared)
        accuracy["erm"].append(history.best["test_accuracy"])
        torch.manual_seed(seed)
        history = AIATrainer(AIA(1, 3, hidden=128), **shared).fit(loader, val, {"test": test}, device="cuda")
        accuracy["aia"].append(history.best["test_accuracy"])
    assert sum(accuracy["aia"]) >= sum(accuracy["erm"]), accuracy
