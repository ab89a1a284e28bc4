"""`ballast graph-ood cluster`: cluster vectors without knowing the number of clusters."""

from __future__ import annotations

import difflib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ballast_bench.meta import find_data_root
from ballast_cli.output import EpochProgress, print_result, write_json, write_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MATRICES = ("COIL20", "Isolet", "JAFFE", "ORL", "Palm", "UMIST", "USPSdata_20_uni", "segment_uni")


def cluster(
    *,
    data: str,
    method: Literal["asrc", "rcc", "kmeans"] = "asrc",
    root: Path | None = None,
    labels: Path | None = None,
    output: Path = Path("runs/graph-ood-cluster"),
    num_clusters: int | None = None,
    neighbors: int = 10,
    metric: Literal["euclidean", "cosine"] = "cosine",
    epochs: int = 6,
    beta: float = 1.0,
    lam: float = 0.25,
    threshold: float = 1.0,
    min_size: int = 5,
    seed: int = 0,
    device: str = "cpu",
    json: bool = False,
) -> None:
    """Cluster vectors; ASRC and RCC find the number of clusters themselves.

    Values are divided by the largest absolute one. With known classes (`--labels`, `digits`, a .mat file that holds Y) the
    result has scores too; the methods don't see the classes.

    Examples:
        ballast graph-ood cluster --data digits --method rcc

        ballast graph-ood cluster --data mat:UMIST --root /data --output runs/umist

        ballast graph-ood cluster --data vectors.npy --labels classes.csv --json

    Args:
        data: A file of points x features (.npy; .csv with commas and no header; .mat with X and perhaps Y), `digits` of
            scikit-learn, or `mat:NAME` for `graph/clustering/NAME.mat` under the data root.
        method: `asrc`, `rcc` or `kmeans`.
        root: Folder of the known data sets; $BALLAST_DATA by default.
        labels: File (.npy or .csv) with one integer class per point, for scores.
        output: Folder for `labels.csv` and `result.json`.
        num_clusters: Number of clusters, for k-means only, which needs it.
        neighbors: Neighbours in the graph of RCC.
        metric: Of that graph.
        epochs: Outer epochs of ASRC.
        beta: ASRC: weight of the contrastive loss.
        lam: ASRC: weight of the smoothness term.
        threshold: RCC: factor of the length below which points are joined.
        min_size: ASRC: smallest cluster.
        seed: Seed of ASRC and k-means.
        device: Torch device of ASRC.
        json: Print the result as one JSON object.
    """
    if (num_clusters is None) == (method == "kmeans"):
        needs = (
            "needs --num-clusters" if method == "kmeans" else "finds the number of clusters; leave out --num-clusters"
        )
        raise ValueError(f"--method {method} {needs}")
    points, known = _read(data, root)
    if labels is not None:
        known = _read_labels(labels, len(points))
    start = time.perf_counter()
    extra: dict[str, Any] = {}
    if method == "kmeans":
        found = _kmeans(points, num_clusters, seed)
    elif method == "rcc":
        from graph_ood.rcc import RCC

        found = RCC(k=neighbors, metric=metric, threshold=threshold).fit_predict(_scaled(points))
    else:
        from graph_ood.asrc import ASRC

        model = ASRC(
            k=neighbors,
            metric=metric,
            epochs=epochs,
            beta=beta,
            lam=lam,
            min_size=min_size,
            seed=seed,
            device=device,
        )
        with EpochProgress(epochs, quiet=json) as progress:
            model.fit(points, on_epoch=progress.update)
        found, extra = model.labels_, {"modularity": model.modularity_}
    result: dict[str, Any] = {
        "method": method,
        "data": data,
        "points": len(points),
        "features": points.shape[1],
        "num_clusters": len(set(found.tolist())),
        **extra,
        "seconds": time.perf_counter() - start,
    }
    if known is not None:
        from graph_ood.rcc import clustering_scores

        scores = clustering_scores(known, found)
        result |= {name: scores[name] for name in ("acc", "nmi", "ari", "ami")}
    write_text(output / "labels.csv", "".join(f"{label}\n" for label in found.tolist()))
    write_json(output / "result.json", result)
    print_result({**result, "output": str(output)}, as_json=json)


def _scaled(points: NDArray[np.float64]) -> NDArray[np.float64]:
    import numpy as np

    return points / (np.abs(points).max() or 1.0)


def _kmeans(points: NDArray[np.float64], num_clusters: int | None, seed: int) -> NDArray[np.int64]:
    import numpy as np
    from sklearn.cluster import KMeans  # type: ignore[import-untyped]

    if num_clusters is None or not 1 <= num_clusters <= len(points):
        raise ValueError(f"--num-clusters must be in [1, {len(points)}], got {num_clusters}")
    found = KMeans(num_clusters, n_init=10, random_state=seed).fit_predict(_scaled(points))
    return np.asarray(found, dtype=np.int64)


def _read(data: str, root: Path | None) -> tuple[NDArray[np.float64], NDArray[np.int64] | None]:
    """Return points and, where the data has them, classes."""
    import numpy as np

    if data == "digits":
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]

        points, known = load_digits(return_X_y=True)
        return points, known.astype(np.int64)
    if data.startswith("mat:"):
        return _read_mat(_known_matrix(data.removeprefix("mat:"), root))
    path = Path(data)
    if not path.is_file():
        raise FileNotFoundError(f"--data {data}: no such file, and neither `digits` nor `mat:NAME`")
    if path.suffix == ".mat":
        return _read_mat(path)
    points = _table(path, "--data")
    if points.ndim != 2 or len(points) < 2 or not np.isfinite(points).all():
        raise ValueError(f"{path} must hold a matrix of finite numbers with two rows or more, got {points.shape}")
    return points, None


def _known_matrix(name: str, root: Path | None) -> Path:
    if name not in _MATRICES:
        nearest = difflib.get_close_matches(name, _MATRICES, n=1, cutoff=0.3)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(_MATRICES)}{hint}")
    folder = find_data_root(root)
    if folder is None:
        raise FileNotFoundError(f"--data mat:{name}: no data root; name it with --root or BALLAST_DATA")
    path = folder / "graph" / "clustering" / f"{name}.mat"
    if not path.is_file():
        raise FileNotFoundError(f"--data mat:{name}: there is no {path}")
    return path


def _read_mat(path: Path) -> tuple[NDArray[np.float64], NDArray[np.int64] | None]:
    import numpy as np
    from scipy.io import loadmat  # type: ignore[import-untyped]
    from scipy.io.matlab import MatReadError  # type: ignore[import-untyped]

    try:
        content = loadmat(path)
    except (MatReadError, ValueError, NotImplementedError, TypeError) as error:
        raise ValueError(f"{path} can't be read as a MATLAB file: {error}") from error
    if "X" not in content or content["X"].ndim != 2:
        raise ValueError(f"{path} must hold a matrix X (points x features)")
    points = np.asarray(content["X"], dtype=np.float64)
    if "Y" not in content:
        return points, None
    known = np.asarray(content["Y"]).ravel()
    if len(known) != len(points):
        raise ValueError(f"{path}: X has {len(points)} rows, Y has {len(known)} entries")
    return points, np.unique(known, return_inverse=True)[1].astype(np.int64)


def _table(path: Path, flag: str) -> NDArray[np.float64]:
    """Read numbers from a .npy or .csv file."""
    import numpy as np

    if path.suffix not in (".npy", ".csv"):
        raise ValueError(f"{flag} {path}: a .npy, .csv or .mat file is expected")
    try:
        values = (
            np.load(path, allow_pickle=False) if path.suffix == ".npy" else np.loadtxt(path, delimiter=",", ndmin=2)
        )
        return np.asarray(values, dtype=np.float64)
    except (ValueError, TypeError, EOFError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error


def _read_labels(path: Path, count: int) -> NDArray[np.int64]:
    import numpy as np

    if not path.is_file():
        raise FileNotFoundError(f"--labels {path}: no such file")
    values = _table(path, "--labels").ravel()
    if len(values) != count or not (values == np.round(values)).all():
        raise ValueError(f"{path} must hold {count} integers, one per point, got {len(values)} numbers")
    return values.astype(np.int64)
