"""SQL over a results store: DuckDB reads the JSON records where they lie."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ballast_bench.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    import duckdb

    from ballast_bench.store import Store

__all__ = ["connect", "query", "write_table"]

_CELLS = """
CREATE TABLE cells AS SELECT
    key,
    run_info ->> '$.case.package' AS package,
    run_info ->> '$.case.name' AS "case",
    run_info ->> '$.case.dataset' AS dataset,
    run_info ->> '$.method' AS method,
    CAST(run_info ->> '$.seed' AS BIGINT) AS seed,
    train_info ->> '$.status' AS status,
    CAST(train_info ->> '$.seconds' AS DOUBLE) AS seconds,
    CAST(train_info ->> '$.cpu_seconds' AS DOUBLE) AS cpu_seconds,
    CAST(train_info ->> '$.process_seconds' AS DOUBLE) AS process_seconds,
    CAST(train_info ->> '$.peak_mib' AS DOUBLE) AS peak_mib,
    train_info ->> '$.error' AS error,
    run_info ->> '$.finished' AS finished,
    meta_info ->> '$.commit' AS "commit",
    CAST(meta_info ->> '$.dirty' AS BOOLEAN) AS dirty,
    meta_info ->> '$.device' AS device,
    meta_info ->> '$.data_sha256' AS data_sha256,
    CAST(run_info -> '$.settings' AS VARCHAR) AS settings,
    list_contains(?, filename) AS latest,
    CAST(run_info ->> '$.case_order' AS INTEGER) AS case_order,
    CAST(run_info ->> '$.method_order' AS INTEGER) AS method_order,
    train_info -> '$.metrics' AS metrics_json,
    train_info -> '$.history' AS history_json
FROM records ORDER BY case_order, "case", method_order, method, seed, finished
"""
_METRICS = """
CREATE VIEW metrics AS SELECT
    package, "case", dataset, method, seed, metric, CAST(metrics_json ->> ('$."' || metric || '"') AS DOUBLE) AS value,
    latest, case_order, method_order, "commit", finished
FROM (SELECT *, unnest(json_keys(metrics_json)) AS metric FROM cells)
"""
_HISTORY = """
CREATE VIEW history AS SELECT
    package, "case", dataset, method, seed, CAST(row ->> '$.epoch' AS INTEGER) AS epoch, metric,
    CAST(row ->> ('$."' || metric || '"') AS DOUBLE) AS value, latest
FROM (SELECT *, unnest(json_keys(row)) AS metric FROM (SELECT *, unnest(CAST(history_json AS JSON[])) AS row FROM cells))
WHERE metric <> 'epoch'
"""
_LONG = """
SELECT package, "case", dataset, method, seed, metric, value, "commit"
FROM metrics WHERE latest ORDER BY case_order, "case", method_order, method, seed, metric
"""


def connect(store: Store) -> duckdb.DuckDBPyConnection:
    """Return a connection with the tables `records`, `cells` and the views `metrics` and `history`.

    `cells` has one row per record, `latest` marks the ones that count; `metrics` is one row per cell and metric,
    `history` one per cell, epoch and metric. Unreadable records are left out.
    """
    import duckdb

    paths = [str(record.path) for record in store.records()]
    latest = [str(record.path) for record in store.latest()]
    connection = duckdb.connect(":memory:")
    columns = "{schema: 'INTEGER', key: 'VARCHAR', run_info: 'JSON', train_info: 'JSON', meta_info: 'JSON'}"
    if paths:
        source = f"read_json(?, columns = {columns}, filename = true, format = 'unstructured')"
        connection.execute(f"CREATE TABLE records AS SELECT * FROM {source}", [paths])  # noqa: S608 - constants only
    else:
        connection.execute(
            "CREATE TABLE records"
            "(schema INTEGER, key VARCHAR, run_info JSON, train_info JSON, meta_info JSON, filename VARCHAR)"
        )
    connection.execute(_CELLS, [latest])
    connection.execute(_METRICS)
    connection.execute(_HISTORY)
    return connection


def query(store: Store, sql: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Run `sql` and return the column names and the rows.

    Raises:
        UsageError: If DuckDB rejects the statement.
    """
    import duckdb

    with connect(store) as connection:
        try:
            result = connection.execute(sql)
        except duckdb.Error as error:
            raise UsageError(f"the query failed: {error}") from error
        return [column[0] for column in result.description or ()], result.fetchall()


def write_table(store: Store, target: Path, file_format: str) -> None:
    """Write the newest figures, one row per cell and metric, as CSV or parquet.

    Args:
        store: The results store.
        target: The file to write; replaced atomically.
        file_format: "csv" or "parquet".
    """
    options = {"csv": "FORMAT csv, HEADER", "parquet": "FORMAT parquet, COMPRESSION zstd"}[file_format]
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with connect(store) as connection:
            connection.execute(f"COPY ({_LONG}) TO '{str(temporary).replace(chr(39), chr(39) * 2)}' ({options})")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
