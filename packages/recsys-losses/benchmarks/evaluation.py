"""Full-ranking evaluation at the size of Gowalla: `evaluate_full_ranking` beside torch with PyG's metrics.

    python evaluation.py --root shared/data       # real pairs
    python evaluation.py                          # random pairs of the same number

The other side is what one writes without this package: for each batch of users the product with all items, known
items set to -inf, `torch.topk`, and the metrics of torch_geometric. Embeddings are random; the time doesn't depend on
them. Recall, NDCG and Precision at 20 of both sides are compared. Prints one JSON object.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from ballast_testing.measure import emit, in_worker, interleaved, machine, parser, peak_extra_bytes, ratio
from recsys_losses.metrics import evaluate_full_ranking

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

USERS, ITEMS, TRAIN, TEST = 29_858, 40_981, 810_128, 217_242
K = 20


def load(root: str | None, users: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Return the train and test pairs of the first `users` users (all by default)."""
    if root is None:
        generator = torch.Generator().manual_seed(seed)
        key = torch.randperm(USERS * ITEMS // 64, generator=generator)[: TRAIN + TEST] * 64  # distinct pairs
        pairs = torch.stack((key // ITEMS, key % ITEMS))
        train, test = pairs[:, :TRAIN], pairs[:, TRAIN:]
        train, test = (x[:, (x[0] * ITEMS + x[1]).argsort()] for x in (train, test))
    else:
        from recsys_losses.data import load_dataset

        data = load_dataset("gowalla", root)
        train, test = data.train, data.test
    if users is not None:
        train, test = train[:, train[0] < users], test[:, test[0] < users]
    return train, test


def with_pyg(user: Tensor, item: Tensor, train: Tensor, test: Tensor, batch_size: int) -> dict[str, float]:
    """Evaluate batch by batch with torch.topk and PyG's link prediction metrics."""
    from torch_geometric.metrics import LinkPredMetricCollection, LinkPredNDCG, LinkPredPrecision, LinkPredRecall

    metric = LinkPredMetricCollection(
        {f"recall@{K}": LinkPredRecall(K), f"ndcg@{K}": LinkPredNDCG(K), f"precision@{K}": LinkPredPrecision(K)}
    )
    evaluated = torch.unique(test[0])
    position = torch.full((len(user),), -1)
    for users in torch.split(evaluated, batch_size):
        position.fill_(-1)
        position[users] = torch.arange(len(users))
        score = user[users] @ item.T
        known = position[train[0]] >= 0
        score[position[train[0, known]], train[1, known]] = -torch.inf
        wanted = position[test[0]] >= 0
        metric.update(score.topk(K).indices, torch.stack((position[test[0, wanted]], test[1, wanted])))
    return {name: float(value) for name, value in metric.compute().items()}


def sides(options: Any) -> tuple[dict[str, Callable[[], dict[str, float]]], int]:
    """Return the functions to compare and the number of evaluated users."""
    train, test = load(options.root, options.users, options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    user = torch.randn(USERS, options.dim, generator=generator)
    item = torch.randn(ITEMS, options.dim, generator=generator)
    size = options.batch_size
    compared = {
        "pyg": lambda: with_pyg(user, item, train, test, size),
        "recsys_losses": lambda: evaluate_full_ranking(user, item, train, test, ks=(K,), batch_size=size),
        "recsys_losses_deterministic": lambda: evaluate_full_ranking(
            user, item, train, test, ks=(K,), batch_size=size, deterministic=True
        ),
    }
    return compared, len(torch.unique(test[0]))


def main() -> None:
    """Measure and print."""
    options_of = parser(__doc__)
    options_of.add_argument("--root", help="folder with recsys/gowalla; random pairs without it")
    options_of.add_argument("--users", type=int, help="evaluate only the first users")
    options_of.add_argument("--batch-size", type=int, default=1024)
    options_of.add_argument("--dim", type=int, default=64)
    options = options_of.parse_args()
    torch.set_num_threads(options.threads)
    compared, num_users = sides(options)
    if options.memory_of:
        print(json.dumps({"peak_extra_bytes": peak_extra_bytes(compared[options.memory_of])}))
        return
    value = {name: run() for name, run in compared.items()}
    reference = value.pop("pyg")
    error = {name: max(abs(v[key] - reference[key]) for key in reference) for name, v in value.items()}
    seconds = interleaved(compared, repetitions=options.repetitions, warmup=0)
    arguments = ["--batch-size", options.batch_size, "--dim", options.dim, "--threads", options.threads]
    arguments += [] if options.root is None else ["--root", options.root]
    arguments += [] if options.users is None else ["--users", options.users]
    memory = {name: in_worker(name, [str(x) for x in arguments]) for name in compared}
    result: dict[str, Any] = {"benchmark": "evaluation", **machine(), "repetitions": options.repetitions}
    result |= {"data": "random" if options.root is None else "gowalla", "users": num_users, "items": ITEMS}
    result |= {"dim": options.dim, "k": K, "batch_size": options.batch_size, "metrics": reference, "sides": {}}
    for name in compared:
        entry: dict[str, Any] = {**seconds[name], "users_per_s": num_users / seconds[name]["median_s"]}
        entry["peak_extra_bytes"] = memory[name]
        if name != "pyg":
            entry["speed_over_pyg"] = ratio(seconds["pyg"]["median_s"], seconds[name]["median_s"])
            entry["max_metric_difference"] = error[name]
        result["sides"][name] = entry
    emit(result, options.output)


if __name__ == "__main__":
    main()
