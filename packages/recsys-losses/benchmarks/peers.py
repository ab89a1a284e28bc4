"""Side by side with RecBole and Cornac: MF training throughput, and full-ranking evaluation of Gowalla, on one thread.

Each side runs in a process of its own, in turn (ours, peer, ours, peer, ...), so that a drifting machine hits both.

    python packages/recsys-losses/benchmarks/peers.py --data-root ../shared/data --output docs/results/speed_peers.json

The peers are fetched by uv into environments of their own; `--recbole-python` and `--cornac-python` name interpreters
that have them already.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
RECBOLE = [
    "uv",
    "run",
    "--no-project",
    "--with",
    "recbole==1.2.1",
    "--with",
    "numpy<2",
    "--with",
    "setuptools<81",
    "python",
]
CORNAC = ["uv", "run", "--no-project", "--with", "cornac==3.0.1", "python"]
METRICS = ("recall@20", "ndcg@20", "precision@20")


def ours(args: argparse.Namespace) -> dict[str, object]:
    """Time this package on the arrays in `args.arrays` (run in a child process)."""
    import torch

    torch.set_num_threads(1)
    import recsys_losses
    from recsys_losses.data import InteractionData
    from recsys_losses.metrics import evaluate_full_ranking
    from recsys_losses.models import MatrixFactorization
    from recsys_losses.training import LossConfig, fit

    train = torch.from_numpy(np.load(args.arrays / "train.npy"))
    test = torch.from_numpy(np.load(args.arrays / "test.npy"))
    num_users, num_items = (int(max(train[row].max(), test[row].max())) + 1 for row in (0, 1))
    result: dict[str, object] = {"version": recsys_losses.__version__, "torch": torch.__version__}
    if args.ours == "train":
        data = InteractionData(num_users, num_items, train, test)
        model = MatrixFactorization(num_users, num_items, dim=64, seed=0)
        done = fit(
            model, LossConfig("bpr"), data,
            epochs=9, batch_size=args.batch_size, lr=5e-3, select_on="none", eval_every=1000, seed=0,
        )  # fmt: skip
        seconds = statistics.median(record["seconds"] for record in done.history[1:])
        return result | {"interactions": train.shape[1], "interactions_per_second": train.shape[1] / seconds}
    user, item = (torch.from_numpy(np.load(args.arrays / f"{name}.npy")) for name in ("user", "item"))
    start = time.perf_counter()
    metrics = evaluate_full_ranking(user, item, train, test, ks=(20,))
    seconds = time.perf_counter() - start
    return result | {"users_per_second": len(test[0].unique()) / seconds, "seconds": seconds, "metrics": metrics}


def call(command: list[str]) -> dict[str, object]:
    """Run a child on one thread and return the JSON object on its last line."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def write_arrays(name: str, root: Path, folder: Path, *, embeddings: bool) -> None:
    """Write the split, and random embeddings of a realistic scale where they are ranked, as numpy arrays."""
    from recsys_losses.data import load_dataset

    data = load_dataset(name, root)
    np.save(folder / "train.npy", data.train.numpy())
    np.save(folder / "test.npy", data.test.numpy())
    if embeddings:
        rng = np.random.default_rng(0)
        np.save(folder / "user.npy", rng.normal(0, 0.1, (data.num_users, 64)).astype(np.float32))
        np.save(folder / "item.npy", rng.normal(0, 0.1, (data.num_items, 64)).astype(np.float32))


def compare_training(name: str, args: argparse.Namespace) -> dict[str, object]:
    """Interactions per second of MF with BPR, d = 64: ours, RecBole's, Cornac's."""
    with tempfile.TemporaryDirectory() as tmp:
        write_arrays(name, args.data_root, Path(tmp), embeddings=False)
        batch = ["--batch-size", str(args.batch_size)]
        rounds = [
            {
                "ours": call([sys.executable, __file__, "--ours", "train", "--arrays", tmp, *batch]),
                "recbole": call(
                    [*args.recbole, str(HERE / "peer_recbole.py"), "--arrays", tmp, "--task", "train", *batch]
                ),
                "cornac": call([*args.cornac, str(HERE / "peer_cornac.py"), "--arrays", tmp]),
            }
            for _ in range(args.rounds)
        ]
    speed = {side: [r[side]["interactions_per_second"] for r in rounds] for side in ("ours", "recbole", "cornac")}
    return {
        "case": f"MF + BPR training, {name}, d=64, batch {args.batch_size}, one thread",
        "unit": "interactions per second",
        "median": {side: statistics.median(values) for side, values in speed.items()},
        "ours_over_recbole": statistics.median(a / b for a, b in zip(speed["ours"], speed["recbole"], strict=True)),
        "ours_over_cornac": statistics.median(a / b for a, b in zip(speed["ours"], speed["cornac"], strict=True)),
        "rounds": speed,
        "versions": {side: rounds[0][side]["version"] for side in speed},
    }


def compare_evaluation(args: argparse.Namespace) -> dict[str, object]:
    """Users per second of full-ranking evaluation on Gowalla, K = 20: ours and RecBole's at its best batch size."""
    with tempfile.TemporaryDirectory() as tmp:
        write_arrays("gowalla", args.data_root, Path(tmp), embeddings=True)
        rounds = [
            {
                "ours": call([sys.executable, __file__, "--ours", "evaluate", "--arrays", tmp]),
                "recbole": call([*args.recbole, str(HERE / "peer_recbole.py"), "--arrays", tmp, "--task", "evaluate"]),
            }
            for _ in range(args.rounds)
        ]
    speed = {side: [r[side]["users_per_second"] for r in rounds] for side in ("ours", "recbole")}
    last = rounds[-1]
    return {
        "case": "full-ranking evaluation, gowalla (29,858 x 40,981), K=20, d=64, one thread",
        "unit": "users per second",
        "median": {side: statistics.median(values) for side, values in speed.items()},
        "ours_over_recbole": statistics.median(a / b for a, b in zip(speed["ours"], speed["recbole"], strict=True)),
        "largest_metric_difference": max(
            abs(last["ours"]["metrics"][m] - last["recbole"]["metrics"][m]) for m in METRICS
        ),
        "recbole_users_per_batch": last["recbole"]["best_users_per_batch"],
        "rounds": speed,
    }


def main() -> None:
    """Run the comparison and write or print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, default=Path(os.environ.get("BALLAST_DATA", "../shared/data")))
    parser.add_argument("--data", nargs="+", default=["lastfm", "ml-100k", "gowalla"], help="data sets to train on")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--skip-evaluation", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--recbole-python", help="an interpreter with RecBole; fetched by uv otherwise")
    parser.add_argument("--cornac-python", help="an interpreter with Cornac; fetched by uv otherwise")
    parser.add_argument("--ours", choices=("train", "evaluate"), help=argparse.SUPPRESS)
    parser.add_argument("--arrays", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ours:
        print(json.dumps(ours(args)))
        return
    args.recbole = [args.recbole_python] if args.recbole_python else RECBOLE
    args.cornac = [args.cornac_python] if args.cornac_python else CORNAC
    results = [compare_training(name, args) for name in args.data]
    if not args.skip_evaluation:
        results.append(compare_evaluation(args))
    about = {
        "command": "python packages/recsys-losses/benchmarks/peers.py",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "load_1min": round(os.getloadavg()[0], 2),
    }
    text = json.dumps(about | {"results": results}, indent=2) + "\n"
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
