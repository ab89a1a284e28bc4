"""The results table of the root README, written from docs/results; `--check` fails when the README is out of date."""

from __future__ import annotations

import sys
from pathlib import Path

import results_tables

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- results: ", "<!-- /results -->"
TABLES = (
    ("quick", "synthetic-mf", ("recall@20", "ndcg@20", "arp@20")),
    ("cpu", "lastfm-mf", ("recall@20", "ndcg@20", "arp@20")),
)
HEADINGS = {"recall@20": "Recall@20", "ndcg@20": "NDCG@20", "arp@20": "ARP@20 (lower is less popular)"}


def table(file: str, case_id: str, metrics: tuple[str, ...]) -> str:
    """One Markdown table of a case, mean and standard deviation over seeds."""
    measured = results_tables.load(file)
    if measured is None:
        return f"*{file}: not measured yet.*"
    if case_id not in measured.cases:
        raise SystemExit(f"docs/results/{file}.json has no case {case_id!r}; it has {', '.join(measured.cases)}")
    case = measured.cases[case_id]
    lines = [f"{case.title} (`docs/results/{file}.json`):", ""]
    lines += ["| method | " + " | ".join(HEADINGS[m] for m in metrics) + " |", "|---|" + "---:|" * len(metrics)]
    for method in case.methods.values():
        cells = [f"{s.mean:{_digits(m)}} ± {s.std or 0:{_digits(m)}}" for m in metrics for s in (method.metrics[m],)]
        lines.append(f"| {method.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _digits(metric: str) -> str:
    return ".1f" if metric.startswith("arp") else ".4f"


def main() -> None:
    """Rewrite the README between its markers, or compare with `--check`."""
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN, 1)
    marker, rest = rest.split("\n", 1)
    tail = rest.split(END, 1)[1]
    tables = "\n\n".join(table(*spec) for spec in TABLES)
    fresh = f"{head}{BEGIN}{marker}\n\n{tables}\n\n{END}{tail}"
    if fresh == text:
        return
    if "--check" in sys.argv[1:]:
        raise SystemExit("README.md does not match docs/results: run `uv run python docs/tools/readme_table.py`")
    path.write_text(fresh, encoding="utf-8")


if __name__ == "__main__":
    main()
