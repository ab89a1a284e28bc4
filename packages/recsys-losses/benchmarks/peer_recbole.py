"""RecBole's side of the comparison: training throughput of its BPR model and speed of its full-ranking evaluation.

Runs in an environment of its own (RecBole needs numpy < 2), started by `peers.py`:

    uv run --no-project --with recbole==1.2.1 --with "numpy<2" --with "setuptools<81" \
        python packages/recsys-losses/benchmarks/peer_recbole.py --arrays DIR --task train

DIR holds `train.npy`, `test.npy` (2, E) and, for `--task evaluate`, `user.npy`, `item.npy` (the embeddings to rank with),
so that both sides rank the same scores. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

warnings.filterwarnings("ignore")


def write_atomic_files(arrays: Path, folder: Path, name: str) -> None:
    """Write the split as RecBole's benchmark files; the test part stands in for valid, which is not used."""
    target = folder / name
    target.mkdir(parents=True)
    train, test = np.load(arrays / "train.npy"), np.load(arrays / "test.npy")
    for part, edges in (("train", train), ("valid", test), ("test", test)):
        rows = "\n".join(f"{u}\t{i}" for u, i in edges.T.tolist())
        (target / f"{name}.{part}.inter").write_text(f"user_id:token\titem_id:token\n{rows}\n", encoding="utf-8")


def load_embeddings(model, dataset, arrays: Path) -> None:
    """Give RecBole's model our embeddings, row by row through its token maps (its index 0 is padding)."""
    import torch

    for field, table, file in (
        ("user_id", model.user_embedding, "user.npy"),
        ("item_id", model.item_embedding, "item.npy"),
    ):
        ours = np.load(arrays / file)
        tokens = dataset.field2id_token[field][1:].astype(np.int64)
        with torch.no_grad():
            table.weight[1:] = torch.from_numpy(ours[tokens]).to(table.weight)


def main() -> None:
    """Time one task and print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arrays", type=Path, required=True)
    parser.add_argument("--task", choices=("train", "evaluate"), required=True)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=4, help="epochs timed after one epoch of warm-up")
    parser.add_argument("--users-per-batch", type=int, nargs="+", default=[64, 256, 1024])
    args = parser.parse_args()

    import torch

    torch.set_num_threads(1)
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.trainer import Trainer
    from recbole.utils import get_model, init_seed

    arrays = args.arrays.resolve()
    with tempfile.TemporaryDirectory() as tmp, contextlib.chdir(tmp):  # RecBole writes its logs where it stands
        write_atomic_files(arrays, Path(tmp), "peer")
        num_items = int(np.load(arrays / "train.npy")[1].max()) + 1

        def build(users_per_batch: int):
            config = Config(
                model="BPR",
                dataset="peer",
                config_dict={
                    "data_path": tmp,
                    "checkpoint_dir": tmp,
                    "load_col": {"inter": ["user_id", "item_id"]},
                    "benchmark_filename": ["train", "valid", "test"],
                    "train_batch_size": args.batch_size,
                    "eval_batch_size": users_per_batch * num_items,
                    "embedding_size": args.dim,
                    "learning_rate": 5e-3,
                    "metrics": ["Recall", "NDCG", "Precision"],
                    "metric_decimal_place": 9,
                    "topk": [20],
                    "valid_metric": "Recall@20",
                    "show_progress": False,
                    "use_gpu": False,
                    "gpu_id": "",
                    "state": "ERROR",
                    "eval_args": {"order": "RO", "mode": "full", "group_by": "user"},
                },
            )
            init_seed(0, True)
            dataset = create_dataset(config)
            train_data, _, test_data = data_preparation(config, dataset)
            model = get_model("BPR")(config, train_data.dataset)
            return Trainer(config, model), model, dataset, train_data, test_data

        result: dict[str, object] = {
            "peer": "recbole",
            "version": __import__("recbole").__version__,
            "torch": torch.__version__,
        }
        if args.task == "train":
            trainer, _, dataset, train_data, _ = build(64)
            seconds = []
            for epoch in range(args.epochs + 1):
                start = time.perf_counter()
                trainer._train_epoch(train_data, epoch, show_progress=False)
                seconds.append(time.perf_counter() - start)
            interactions = int(np.load(arrays / "train.npy").shape[1])
            result |= {
                "task": "train",
                "batch_size": args.batch_size,
                "interactions": interactions,
                "seconds_per_epoch": statistics.median(seconds[1:]),
                "interactions_per_second": interactions / statistics.median(seconds[1:]),
            }
        else:
            runs = []
            for users_per_batch in args.users_per_batch:
                trainer, model, dataset, _, test_data = build(users_per_batch)
                load_embeddings(model, dataset, arrays)
                start = time.perf_counter()
                metrics = trainer.evaluate(test_data, load_best_model=False, show_progress=False)
                runs.append((time.perf_counter() - start, users_per_batch, dict(metrics)))
            seconds_best, users_per_batch, metrics = min(runs, key=lambda run: run[0])
            users = len(np.unique(np.load(arrays / "test.npy")[0]))
            result |= {
                "task": "evaluate",
                "users": users,
                "best_users_per_batch": users_per_batch,
                "seconds": seconds_best,
                "seconds_by_users_per_batch": {str(n): s for s, n, _ in runs},
                "users_per_second": users / seconds_best,
                "metrics": {k: float(v) for k, v in metrics.items()},
            }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
