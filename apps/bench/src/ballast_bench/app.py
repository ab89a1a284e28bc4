"""The command group `ballast bench`."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from ballast_bench.aggregate import aggregate
from ballast_bench.errors import BenchError, UsageError
from ballast_bench.formats import mean_std, relative
from ballast_bench.meta import cpu_count, find_data_root
from ballast_bench.store import Store
from ballast_bench.suites import SUITES, load_suite, select_cells

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ballast_bench.compare import Difference
    from ballast_bench.runner import RunSummary

__all__ = ["app"]

app = App(name="bench", help="Measure the methods, keep the figures, compare and report them.", help_format="markdown")

Json = Annotated[bool, Parameter(name="--json", negative=())]


class _Guard:
    """Turn expected errors into a message and an exit code: 1 while measuring, 2 for the request, 130 for Ctrl-C."""

    def __init__(self, hint: str = "") -> None:
        self._hint = hint

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, BenchError):
            _fail(str(error), error.exit_code)
        if isinstance(error, KeyboardInterrupt):
            _fail(f"interrupted{self._hint}", 130)
        if isinstance(error, FileNotFoundError | ValueError):
            _fail(str(error), 2)
        if isinstance(error, OSError):
            _fail(f"{error}{self._hint}", 1)


def _fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


@app.command
def run(
    *,
    suite: str = "quick",
    output: Path | None = None,
    jobs: int | None = None,
    only: str | None = None,
    seeds: str | None = None,
    data_root: Path | None = None,
    executor: Literal["local", "ray"] = "local",
    rerun: bool = False,
    report: bool = True,
    as_json: Json = False,
) -> None:
    """Run the missing cells of a suite, then print the results and write the HTML report.

    Every (case, method, seed) runs in a process of its own and is on disk as soon as it ends; run the same command again
    after any interruption and only the missing cells are measured. Failed, timed-out and skipped cells are tried again.

    ```
    ballast bench run --suite quick
    ballast bench run --suite cpu --jobs 2 --only lastfm-mf
    ballast bench run --suite my_cases.py:cases --seeds 0-9 --output runs/mine
    ```

    Args:
        suite: quick, cpu, gpu, or a function that returns cases: "file.py:function" or "module:function".
        output: Folder of the results store (default: runs/SUITE).
        jobs: Cells at a time (default: the number of CPUs, at most the number of cells).
        only: Part of "package/case/method/seed", or a shell pattern for the whole of it.
        seeds: Seeds instead of the suite's, e.g. "0,1,2" or "0-4".
        data_root: Folder of the real data (default: BALLAST_DATA, else shared/data in a parent folder).
        executor: local, or ray (optional extra) for the cluster in RAY_ADDRESS.
        rerun: Measure cells again that the store already has; old records stay.
        report: Print the table and write the report at the end.
        as_json: Print one JSON object instead of the table.
    """
    from ballast_bench.runner import run_cells

    target = output or Path("runs") / _store_name(suite)
    with _Guard(f"; finished cells are kept in {target}, run the same command again to measure the rest"), _sigterm():
        if jobs is not None and jobs < 1:
            raise UsageError(f"--jobs must be at least 1, got {jobs}")
        cells = select_cells(load_suite(suite), only, _parse_seeds(seeds))
        root = find_data_root(data_root)
        store = Store(target, create=True)
        summary = run_cells(
            store,
            cells,
            jobs=jobs or min(cpu_count(), len(cells)),
            executor=executor,
            data_root=root,
            command=_command(suite, target, jobs, only, seeds, data_root, executor),
            rerun=rerun,
        )
        for warning in summary.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        _finish(store, summary, report=report, as_json=as_json)
    if summary.failed:
        raise SystemExit(1)


@app.command
def report(store: Path, /, *, output: Path | None = None, as_json: Json = False) -> None:
    """Print the results of a store and write its HTML report.

    ```
    ballast bench report runs/quick
    ```

    Args:
        store: Folder of the results store.
        output: File to write (default: report.html in the store).
        as_json: Print one JSON object instead of the tables.
    """
    with _Guard():
        _report(Store(store), output, as_json=as_json)


@app.command
def compare(before: Path, after: Path, /, *, as_json: Json = False) -> None:
    """Show what changed between two stores; exit code 1 when something got worse.

    A change counts when it exceeds the metric's tolerance and the bootstrap interval over the common seeds leaves out 0.

    ```
    ballast bench compare runs/main runs/branch
    ```

    Args:
        before: Folder of the first results store.
        after: Folder of the second.
        as_json: Print one JSON object instead of the table.
    """
    from ballast_bench import compare as comparing

    with _Guard():
        stores = [Store(path) for path in (before, after)]
        difference = comparing.compare(*(aggregate(store.latest()) for store in stores))
        for store in stores:
            _warn_unreadable(store)
        if as_json:
            print(json.dumps(_difference_json(difference), indent=1))
        else:
            _print_difference(difference)
    if difference.regressions:
        raise SystemExit(1)


@app.command
def export(
    store: Path,
    /,
    *,
    output: Path,
    file_format: Annotated[Literal["json", "csv", "parquet"], Parameter(name="--format")] = "json",
) -> None:
    """Write the results of a store in one file, the same bytes for the same store.

    ```
    ballast bench export runs/cpu --output docs/results/recsys-losses-cpu.json
    ballast bench export runs/cpu --output cpu.parquet --format parquet
    ```

    Args:
        store: Folder of the results store.
        output: File to write.
        file_format: json (means, deviations, values per seed, environment, command), or csv or parquet (one row per cell and metric).
    """
    from ballast_bench.export import export_json
    from ballast_bench.query import write_table

    with _Guard():
        source = Store(store)
        if file_format == "json":
            export_json(source, output)
        else:
            write_table(source, output, file_format)
        _warn_unreadable(source)
        print(output)


@app.command(name="list")
def list_suites(*, suite: str | None = None, as_json: Json = False) -> None:
    """List the suites, their cases, methods and rough times.

    ```
    ballast bench list --suite cpu
    ```

    Args:
        suite: Only this suite.
        as_json: Print one JSON object instead of the tables.
    """
    with _Guard():
        names = [suite] if suite else list(SUITES)
        suites = {name: load_suite(name) for name in names}
        if as_json:
            listed = {
                name: [
                    {**case.description(), "methods": dict(case.methods), "seeds": list(case.seeds)} for case in cases
                ]
                for name, cases in suites.items()
            }
            print(json.dumps(listed, indent=1))
            return
        from rich.table import Table

        from ballast_bench.tables import console

        out = console()
        for name, cases in suites.items():
            cells = [cell for case in cases for cell in case.cells()]
            minutes = sum(cell.case.expected for cell in cells) / 60
            title = f"{name}  [dim]{SUITES.get(name, '')} · {len(cells)} cells, about {minutes:.0f} process minutes[/]"
            table = Table("case", "data", "methods", "seeds", "s per cell", title=title, title_justify="left")
            for case in cases:
                seconds = f"{case.expected:g}"
                table.add_row(case.id, case.dataset, ", ".join(case.methods), str(len(case.seeds)), seconds)
            out.print(table)


@app.command
def query(store: Path, sql: str, /, *, as_json: Json = False) -> None:
    """Run SQL (DuckDB) over a store: tables `records` and `cells`, views `metrics` and `history`.

    ```
    ballast bench query runs/quick "SELECT method, avg(value) FROM metrics WHERE metric = 'recall@20' GROUP BY ALL"
    ```

    Args:
        store: Folder of the results store.
        sql: The statement.
        as_json: Print a list of JSON objects instead of a table.
    """
    from ballast_bench import query as querying

    with _Guard():
        names, rows = querying.query(Store(store), sql)
        if as_json:
            print(json.dumps([dict(zip(names, row, strict=True)) for row in rows], indent=1, default=str))
            return
        from rich.markup import escape
        from rich.table import Table

        from ballast_bench.tables import console

        table = Table(*names)
        for row in rows:
            table.add_row(*(escape(str(value)) for value in row))
        console().print(table)


class _sigterm:
    """Let SIGTERM end a run like Ctrl-C does: cells ended, finished ones kept."""

    def __enter__(self) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        try:
            self._before: Any = signal.signal(signal.SIGTERM, interrupt)
        except ValueError:  # not the main thread
            self._before = None

    def __exit__(self, *details: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)


def _store_name(suite: str) -> str:
    return suite if ":" not in suite else suite.rpartition(":")[2]


def _command(
    suite: str,
    target: Path,
    jobs: int | None,
    only: str | None,
    seeds: str | None,
    data_root: Path | None,
    executor: str,
) -> str:
    """Return the command as one would type it, whatever program the group is mounted in."""
    words = ["ballast", "bench", "run", "--suite", suite, "--output", str(target)]
    options = {"--jobs": jobs, "--only": only, "--seeds": seeds, "--data-root": data_root}
    for name, value in options.items():
        words += [] if value is None else [name, str(value)]
    words += [] if executor == "local" else ["--executor", executor]
    return shlex.join(words)


def _parse_seeds(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        seeds = [seed for part in text.split(",") for seed in _seed_range(part.strip())]
    except ValueError:
        raise UsageError(f"--seeds must look like '0,1,2' or '0-4', got {text!r}") from None
    if not seeds or len(set(seeds)) != len(seeds):
        raise UsageError(f"--seeds must name distinct seeds, got {text!r}")
    return tuple(seeds)


def _seed_range(part: str) -> Iterator[int]:
    first, dash, last = part.partition("-")
    return iter(range(int(first), int(last) + 1)) if dash else iter([int(part)])


def _finish(store: Store, summary: RunSummary, *, report: bool, as_json: bool) -> None:
    counts = f"{summary.measured} measured, {summary.kept} kept, {summary.failed} failed, {summary.skipped} skipped"
    print(f"cells: {counts}; records in {store.records_path}", file=sys.stderr)
    if report:
        _report(store, None, as_json=as_json, summary=summary)
    elif as_json:
        print(json.dumps(_summary_json(store, summary), indent=1))


def _report(store: Store, output: Path | None, *, as_json: bool, summary: RunSummary | None = None) -> None:
    from ballast_bench.export import to_json
    from ballast_bench.report import write_report
    from ballast_bench.tables import console, print_results

    path, results = write_report(store, output)
    _warn_unreadable(store)
    if as_json:
        content = to_json(results, store.latest())
        content["report"] = str(path)
        if summary is not None:
            content["run"] = _summary_json(store, summary)
        print(json.dumps(content, indent=1, ensure_ascii=False))
        return
    print_results(results, console())
    print(f"report: {path.resolve()}")


def _summary_json(store: Store, summary: RunSummary) -> dict[str, Any]:
    counts = {name: getattr(summary, name) for name in ("measured", "kept", "failed", "skipped", "warnings")}
    return {"store": str(store.path), **counts}


def _warn_unreadable(store: Store) -> None:
    for path, why in store.unreadable:
        print(f"warning: unreadable record {path} ({why}); `run` measures it again", file=sys.stderr)


def _difference_json(difference: Difference) -> dict[str, Any]:
    return {
        "changes": [
            {
                "case": change.case,
                "method": change.method,
                "metric": change.metric.name,
                "before": change.before.mean,
                "after": change.after.mean,
                "interval": None if change.low is None else [change.low, change.high],
                "verdict": change.verdict,
            }
            for change in difference.changes
        ],
        "only_before": difference.only_before,
        "only_after": difference.only_after,
        "settings_changed": difference.settings,
        "regressions": len(difference.regressions),
    }


def _print_difference(difference: Difference) -> None:
    from rich.markup import escape
    from rich.table import Table

    from ballast_bench.tables import console

    marks = {"regression": "[red]▼ regression[/]", "improvement": "[green]▲ improvement[/]", "same": "[dim]same[/]"}
    out = console()
    table = Table("case", "method", "metric", "before", "after", "change", "verdict")
    for change in difference.changes:
        table.add_row(
            escape(change.case),
            escape(change.method),
            change.metric.name,
            mean_std(change.before, change.metric),
            mean_std(change.after, change.metric),
            relative(change.after.mean, change.before.mean),
            marks[change.verdict],
        )
    out.print(table)
    for label, names in (
        ("only in the first store", difference.only_before),
        ("only in the second store", difference.only_after),
        ("settings differ", difference.settings),
    ):
        if names:
            out.print(f"{label}: {escape(', '.join(names))}")
    improved = sum(change.verdict == "improvement" for change in difference.changes)
    out.print(f"{len(difference.regressions)} regressions, {improved} improvements, {len(difference.changes)} compared")
