"""Cases of GCM: what graph, decoder and contexts each contribute on generated data whose contexts matter.

Protocol: leave-one-out, all items ranked; fixed numbers of epochs, chosen on validation interactions of data of other
seeds; training on all train interactions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ballast_bench.case import Case, CellInput, CellOutput, Metric

if TYPE_CHECKING:
    from recsys_losses.gcm import ContextDataset

__all__ = ["cpu", "quick", "train"]

_PRELOAD = ("recsys_losses.gcm", "torch._dynamo")
_RUN = "ballast_bench.suites.recsys_gcm:train"
_METRICS = (
    Metric("hr@10", label="HR@10"),
    Metric("ndcg@10"),
    Metric("hr@50", label="HR@50"),
    Metric("train_seconds", better="lower", label="train s", digits=1, tested=False, tolerance=0.25),
)
_FM = "FM (L=0)"
_FULL = {"num_users": 600, "num_items": 400, "num_interactions": 12000}
_SMALL = {"num_users": 300, "num_items": 150, "num_interactions": 5000}

_METHODS: dict[str, dict[str, Any]] = {
    "GCM L=1": {"num_layers": 1},
    "GCM L=2": {"num_layers": 2},
    _FM: {"num_layers": 0},
    "GCM L=2 inner product": {"num_layers": 2, "decoder": "inner_product"},
    "GCM L=2 shuffled contexts": {"num_layers": 2, "contexts": "shuffled"},
    "GCM without context": {"num_layers": 2, "contexts": "constant"},
    "popularity": {},
}
# Best of 8, 16, ..., 80 epochs by mean HR@10 + NDCG@10 on validation interactions of the data of seeds 100 and 101.
_EPOCHS = {
    "GCM L=1": 56,
    "GCM L=2": 32,
    _FM: 16,
    "GCM L=2 inner product": 56,
    "GCM L=2 shuffled contexts": 56,
    "GCM without context": 72,
    "popularity": 0,
}


def quick() -> tuple[Case, ...]:
    """A small set of generated interactions."""
    methods = {name: _METHODS[name] for name in ("GCM L=1", _FM, "GCM L=2 shuffled contexts", "popularity")}
    epochs = dict.fromkeys(methods, 20) | {"popularity": 0}
    return (
        _case(
            "gcm-quick",
            "GCM on generated contexts, small",
            _SMALL,
            methods,
            epochs,
            seeds=(0, 1),
            expected=0.7,
            chosen="20 epochs for all.",
        ),
    )


def cpu() -> tuple[Case, ...]:
    """The planted comparison: GCM against itself without graph, decoder or contexts."""
    return (
        _case(
            "gcm-planted",
            "GCM on generated contexts that matter",
            _FULL,
            _METHODS,
            _EPOCHS,
            seeds=(0, 1, 2, 3, 4),
            expected=6,
            chosen=(
                "Of 8, 16, ..., 80 epochs each method has the number with the best HR@10 + NDCG@10 on validation "
                "interactions of the data of two other seeds."
            ),
        ),
    )


def _case(
    name: str,
    title: str,
    sizes: dict[str, int],
    methods: dict[str, dict[str, Any]],
    epochs: dict[str, int],
    *,
    seeds: tuple[int, ...],
    expected: float,
    chosen: str,
) -> Case:
    return Case(
        package="recsys_losses",
        name=name,
        title=title,
        dataset="synthetic",
        run=_RUN,
        methods={method: {**settings, "data": sizes, "epochs": epochs[method]} for method, settings in methods.items()},
        baseline=_FM,
        seeds=seeds,
        metrics=_METRICS,
        tradeoff=("train_seconds", "hr@10"),
        preload=_PRELOAD,
        expected=expected,
        note=(
            f"{sizes['num_users']} users, {sizes['num_items']} items, about {sizes['num_interactions']:,} interactions in "
            "contexts of four fields and the last item; the context is part of the true score. Each seed generates its own "
            f"data. d = 32, Adam 5e-3, lambda 1e-3, 4 negatives, batch 2048, all methods alike. {chosen} All items are ranked "
            "for the last event of each user; the user's train items are left out, except for the test item itself. Without "
            "context: every context is the same; shuffled: each context gets the fields of another one, in train and test."
        ),
    )


def train(cell: CellInput) -> CellOutput:
    """Train and test one model on generated interactions: one cell of every case here."""
    import torch

    from recsys_losses.gcm import GCM, fit_gcm, make_context_data

    torch.set_num_threads(1)
    settings = dict(cell.settings)
    made = make_context_data(**settings.pop("data"), seed=cell.seed)
    data = _with_contexts(made.data, settings.pop("contexts", "true"), cell.seed)
    bayes = made.bayes_metrics(ks=(10,), mask_target=False)
    info = {"train": data.train.shape[1], "graph_items": data.num_graph_items, "true_scores_hr@10": bayes["hr@10"]}
    epochs = settings.pop("epochs")
    if epochs == 0:
        return CellOutput({**_popularity(data), "train_seconds": 0.0}, info=info)
    model = GCM.from_dataset(data, embed_dim=32, seed=cell.seed, **settings)
    result = fit_gcm(model, data, epochs=epochs, lr=5e-3, select_on="none", seed=cell.seed)
    seconds = sum(record["seconds"] for record in result.history)
    metrics = data.leave_one_out_metrics(model.score_all, mask_target=False)
    return CellOutput({**metrics, "train_seconds": seconds}, tuple(result.history), info)


def _with_contexts(data: ContextDataset, contexts: str, seed: int) -> ContextDataset:
    import dataclasses

    import torch

    features = data.context_features
    if contexts == "shuffled":
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
        return dataclasses.replace(data, context_features=features[order])
    if contexts == "constant":
        return dataclasses.replace(data, context_features=features[:1].repeat(len(features), 1))
    return data


def _popularity(data: ContextDataset) -> dict[str, float]:
    import torch

    count = torch.bincount(data.train[1], minlength=data.num_graph_items).float()
    return data.leave_one_out_metrics(lambda users, contexts: count.expand(len(users), -1), mask_target=False)
