"""Tables and a picture from docs/results/*.json, as Markdown and SVG.

A result file that is absent gives "not measured yet"; a file that is there must hold every cell that a page names,
otherwise the build stops. Published figures come from docs/results/published.json alone.
"""

from __future__ import annotations

import difflib
import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

RESULTS = Path(__file__).resolve().parents[1] / "results"
PUBLISHED = "published"
MISSING = '<span class="ballast-missing">not measured yet</span>'
# What is shown of a script's output: figures whose key holds one of these, nothing below HIDDEN.
SHOWN = ("_over_", "speed_of", "memory_of", "difference", "per_s", "per_cpu_second", "ratio", "median_s", "extra_bytes")
HIDDEN = ("rounds", "runs", "versions", "metrics")
NAMES = {
    "recall": "Recall",
    "ndcg": "NDCG",
    "arp": "ARP",
    "precision": "Precision",
    "hit_ratio": "HitRatio",
    "mrr": "MRR",
    "hr": "HR",
    "prauc": "PRAUC",
    "ddi_rate": "DDI rate",
    "num_med": "drugs per visit",
    "auc": "AUC",
    "log_loss": "log loss",
    "likelihood": "right one more likely",
    "exact": "right one written",
    "flipped_weight": "weight, flipped over clean",
    "flipped_margin": "own weight or margin, flipped over clean",
    "lc_win_rate": "LC win rate, %",
    "win_rate": "win rate, %",
    "alpacaeval2_lc": "AlpacaEval 2 LC, %",
    "alpacaeval2_wr": "AlpacaEval 2 WR, %",
    "arena_hard": "Arena-Hard, %",
    "mt_bench": "MT-Bench",
}


@dataclass(frozen=True)
class Stat:
    """Mean, standard deviation and number of seeds of one metric; `std` is None for one seed or where none is known."""

    mean: float
    std: float | None = None
    n: int = 0


@dataclass(frozen=True)
class Method:
    """One method of a case."""

    name: str
    metrics: dict[str, Stat]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One comparison on one data set; the first metric is the most important one."""

    id: str
    title: str
    dataset: str
    baseline: str
    note: str
    metrics: tuple[dict[str, Any], ...]
    methods: dict[str, Method]


@dataclass(frozen=True)
class ResultFile:
    """One committed export: what it was measured on, and its cases."""

    about: str
    commands: tuple[str, ...]
    cases: dict[str, Case]


def load(name: str, folder: Path = RESULTS) -> ResultFile | None:
    """Read docs/results/<name>.json as `ballast bench export` writes it; None where there is no such file."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    cases = {}
    for entry in content["cases"]:
        methods = {
            m["name"]: Method(
                m["name"], {k: Stat(v["mean"], v["std"], v["n"]) for k, v in m["metrics"].items()}, m["settings"]
            )
            for m in entry["methods"]
        }
        cases[entry["id"].rpartition("/")[2]] = Case(
            entry["id"],
            entry["title"],
            entry["dataset"],
            entry["baseline"],
            entry["note"],
            tuple(entry["metrics"]),
            methods,
        )
    return ResultFile(_about(content), tuple(content["commands"]), cases)


def render(kind: str, spec: dict[str, Any]) -> str:
    """Return what stands in place of a ```results, ```benchmarks or ```picture block.

    Raises:
        ValueError: If the block names something that its file does not hold.
    """
    if kind == "results":
        return results(**spec)
    if kind == "benchmarks":
        return benchmarks(**spec)
    if kind == "speed":
        return speed(**spec)
    return picture(**spec)


def results(*, file: str, metrics: list[str], rows: list[dict[str, str]]) -> str:
    """Published figures beside ours, one row per setting; a row names a `published` figure, a cell of `ours`, or both."""
    sources: dict[str, str] = {}
    about: dict[str, None] = {}
    names = "<br>".join(_heading(m) for m in metrics)
    lines = ["| setting | metric | published or reference | ours | configuration |", "|---|---|---|---|---|"]
    for row in rows:
        unknown = row.keys() - {"label", "published", "ours", "file"}
        if unknown:
            raise ValueError(f"unknown keys {sorted(unknown)} in row {row['label']!r}")
        published, ours, configuration = "–", "–", ""
        if "published" in row:
            published = _published(row["published"], metrics, sources)
        if "ours" in row:
            name = row.get("file", file)
            measured = load(name)
            ours, configuration = _ours(measured, name, row["ours"], metrics)
            if measured is not None:
                about[measured.about] = None
        elif "published" in row:
            ours = "not attempted"
        lines.append(f"| {row['label']} | {names} | {published} | {ours} | {configuration} |")
    notes = [f"{mark} {text}." for text, mark in sources.items()]
    if about:
        notes.append(f"Ours: mean ± standard deviation over n seeds. {' '.join(about)}")
    return _table(lines) + "\n\n" + _small(notes)


def benchmarks(*, files: list[str] | None = None) -> str:
    """Every case of every committed result file in full."""
    names = files if files is not None else sorted(path.stem for path in _files() if _is_suite(path))
    found = [(name, measured) for name in names if (measured := load(name)) is not None]
    if not found:
        return MISSING
    parts = []
    for name, measured in found:
        command = f"`{measured.commands[0]}`." if measured.commands else ""
        parts += [f"## {name} {{ #{name} }}", _small([command, measured.about, f"[Raw data](../results/{name}.json)."])]
        for case in measured.cases.values():
            parts += [f"### {case.title} {{ #{_anchor(name, case)} }}", html.escape(case.note), _case_table(case)]
    return "\n\n".join(part for part in parts if part)


def speed() -> str:
    """The figures of every script of `packages/*/benchmarks` whose output is committed: any result file but a suite's."""
    parts = []
    for path in _files():
        if _is_suite(path):
            continue
        text = path.read_text(encoding="utf-8").strip()
        # a script may print one JSON object, or one per line
        records = [json.loads(text)] if text.startswith("{\n") else [json.loads(line) for line in text.splitlines()]
        rows = [row for record in records for row in _figures(record, "")]
        if not rows:
            raise ValueError(f"docs/results/{path.name} holds no figure that is shown here")
        facts = [_fact(key, records[0].get(key)) for key in ("device", "cpu", "torch", "threads", "date", "command")]
        title = path.stem.replace("_", " ").replace("-", " ")
        about = f"{', '.join(fact for fact in facts if fact)}. " if any(facts) else ""
        lines = ["| case | measured | value |", "|---|---|---|", *(f"| {a} | {b} | {c} |" for a, b, c in rows)]
        note = _small([about, f"[Raw data](../results/{path.relative_to(RESULTS).as_posix()})."])
        parts += [f"### {title} {{ #speed-{path.stem.replace('_', '-')} }}", _table(lines), note]
    return "\n\n".join(parts) if parts else MISSING


def _files() -> list[Path]:
    return sorted(path for path in RESULTS.rglob("*.json") if path.stem != PUBLISHED)


def _is_suite(path: Path) -> bool:
    """Exports of `ballast bench` name their environments; the output of a script does not."""
    content = path.read_text(encoding="utf-8")
    return '"environments"' in content and '"cases"' in content


def _fact(key: str, value: Any) -> str:
    if value is None:
        return ""
    return f"`{value}`" if key == "command" else str(value) if key in ("device", "cpu", "date") else f"{key} {value}"


def _figures(value: Any, where: str) -> list[tuple[str, str, str]]:
    """Rows (case, measured, value) for the figures inside a script's output, in its order."""
    if isinstance(value, list):
        return [row for entry in value if isinstance(entry, dict) for row in _figures(entry, where)]
    if not isinstance(value, dict):
        return []
    name = value.get("case") or value.get("data") or (f"{value['items']:,} items" if "items" in value else "")
    where = ", ".join(part for part in (where, str(name)) if part)
    rows = []
    for key, inner in value.items():
        if isinstance(inner, (int, float)) and not isinstance(inner, bool) and any(part in key for part in SHOWN):
            rows.append((html.escape(where), key.replace("_", " ").removesuffix(" bytes"), _number(key, inner)))
        elif key == "median" and isinstance(inner, dict):
            unit = value.get("unit", "")
            rows += [
                (html.escape(where), side.replace("_", " "), f"{_number('', x)} {unit}".strip())
                for side, x in inner.items()
            ]
        elif key.startswith(("speedup_over_", "largest_difference_")) and isinstance(inner, dict):
            what = key.replace("_", " ")
            rows += [
                (html.escape(where), f"{side.replace('_', ' ')}, {what}", _number("", x)) for side, x in inner.items()
            ]
        elif isinstance(inner, (dict, list)) and key not in HIDDEN:
            side = "" if key in ("sides", "cases", "results") else key.replace("_", " ")
            rows += _figures(inner, ", ".join(part for part in (where, side) if part))
    return rows


def _number(key: str, value: float) -> str:
    if key.endswith("_bytes"):
        return f"{value / 2**20:,.1f} MiB"
    if key.endswith("_s") and "per" not in key:
        return f"{value * 1000:,.1f} ms"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def picture(*, file: str, case: str, metric: str, title: str) -> str:
    """One metric of one case as horizontal bars with whiskers of one standard deviation."""
    measured = load(file)
    if measured is None:
        return f'<figure class="ballast-figure" markdown="0"><figcaption>{title}: {MISSING}</figcaption></figure>'
    chosen = _pick(measured.cases, case, f"docs/results/{file}.json", "case")
    if not any(metric in m.metrics for m in chosen.methods.values()):
        raise ValueError(f"docs/results/{file}.json: case {case!r} has no metric {metric!r}")
    caption = (
        f"{html.escape(chosen.title)}. Whiskers: one standard deviation. {measured.about} "
        f'<a href="benchmarks/#{_anchor(file, chosen)}">All figures</a>.'
    )
    heading = f"<strong>{html.escape(title)}</strong>"
    return (
        f'<figure class="ballast-figure" markdown="0">{heading}{_bars(chosen, metric)}'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _bars(case: Case, metric: str) -> str:
    bars = [(m.name, m.metrics[metric]) for m in case.methods.values() if metric in m.metrics]
    top = max(stat.mean + (stat.std or 0.0) for _, stat in bars) or 1.0
    rows = []
    for name, stat in bars:
        kind = "base" if name == case.baseline else "ours"
        length, reach = 100 * stat.mean / top, 100 * (stat.std or 0.0) / top
        whisker = f'<i class="whisker" style="left:{length - reach:.2f}%;width:{2 * reach:.2f}%"></i>' if reach else ""
        rows.append(
            f'<div class="bars"><span>{html.escape(name)}</span><span class="track">'
            f'<i class="{kind}" style="width:{length:.2f}%"></i>{whisker}</span><span>{stat.mean:.3f}</span></div>'
        )
    return "".join(rows)


def _case_table(case: Case) -> str:
    names = [m["name"] for m in case.metrics]
    arrows = {m["name"]: "↑" if m["better"] == "higher" else "↓" for m in case.metrics}
    labels = {m["name"]: m.get("label") or _heading(m["name"]) for m in case.metrics}
    digits = {m["name"]: m["digits"] for m in case.metrics}
    flat = {method.name: _flat(method.settings) for method in case.methods.values()}
    first = next(iter(flat.values()), {})
    common = {k: v for k, v in first.items() if len(flat) > 1 and all(f.get(k) == v for f in flat.values())}
    lines = ["| method | " + " | ".join(f"{labels[n]} {arrows[n]}" for n in names) + " | n | settings |"]
    lines.append("|---" * (len(names) + 3) + "|")
    for method in case.methods.values():
        cells = [_stat(method.metrics[n], digits[n]) if n in method.metrics else "–" for n in names]
        n = max((s.n for s in method.metrics.values()), default=0)
        mark = " (baseline)" if method.name == case.baseline else ""
        own = {k: v for k, v in flat[method.name].items() if k not in common}
        lines.append(f"| {method.name}{mark} | " + " | ".join(cells) + f" | {n} | {_settings(own)} |")
    note = _small([f"All methods: {_settings(common)}."]) if common else ""
    return "\n\n".join(part for part in (_table(lines), note) if part)


def _ours(measured: ResultFile | None, file: str, reference: str, metrics: Iterable[str]) -> tuple[str, str]:
    if measured is None:
        return MISSING, ""
    where = f"docs/results/{file}.json"
    case_name, separator, method_name = (part.strip() for part in reference.partition("::"))
    if not separator:
        raise ValueError(f"`ours` must read 'case :: method', got {reference!r}")
    case = _pick(measured.cases, case_name, where, "case")
    method = _pick(case.methods, method_name, f"{where}, case {case_name!r}", "method")
    stats = [_pick(method.metrics, m, f"{where}, {reference}", "metric") for m in metrics]
    digits = {m["name"]: m["digits"] for m in case.metrics}
    text = "<br>".join(_stat(s, digits.get(m, 4)) for s, m in zip(stats, metrics, strict=True))
    return f"{text}<br>n = {stats[0].n}", _settings(method.settings)


def _published(key: str, metrics: Iterable[str], sources: dict[str, str]) -> str:
    content = json.loads((RESULTS / f"{PUBLISHED}.json").read_text(encoding="utf-8"))
    figure = _pick(content["figures"], key, f"docs/results/{PUBLISHED}.json", "figure")
    source = _pick(content["sources"], figure["source"], f"docs/results/{PUBLISHED}.json", "source")
    text = f"[{source['text']}]({source['url']})" if source["url"] else source["text"]
    mark = sources.setdefault(text, f"<sup>{len(sources) + 1}</sup>")
    cells = []
    for metric in metrics:
        value = figure.get(metric)
        digits = 1 if metric.startswith("arp") else 4
        # Shares have the digits of ours beside them; other figures are shown as they are printed.
        if value is None:
            cells.append("–")
        elif isinstance(value, list):
            cells.append(_stat(Stat(value[0], value[1]), digits))
        else:
            cells.append(_printed(value, digits))
    return "<br>".join([cells[0] + mark, *cells[1:]])


def _printed(value: float, digits: int) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}f}" if value < 1 or digits == 1 else f"{value:g}"


def _pick(table: dict[str, Any], key: str, where: str, what: str) -> Any:
    if key in table:
        return table[key]
    near = difflib.get_close_matches(key, table, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{where} has no {what} {key!r}{hint} (it has {', '.join(sorted(table)) or 'none'})")


def _anchor(file: str, case: Case) -> str:
    return f"{file}-{case.id}".replace("/", "-").replace("_", "-").lower()


def _heading(metric: str) -> str:
    name, at, k = metric.partition("@")
    return NAMES.get(name, name.replace("_", " ")) + at + k


def _stat(stat: Stat, digits: int = 4) -> str:
    if stat.std is None:
        return f"{stat.mean:.{digits}f}"
    return f"{stat.mean:.{digits}f} ± {stat.std:.{digits}f}"


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """One level: {"loss": {"name": "ssm", "temperature": 0.2}} becomes {"loss": "ssm", "temperature": 0.2}."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= {key if inner == "name" else inner: v for inner, v in _flat(value).items()}
        else:
            flat[key] = value
    return flat


def _settings(settings: dict[str, Any]) -> str:
    text = ", ".join(f"{key} {_value(value)}" for key, value in _flat(settings).items())
    return html.escape(text).replace("|", "\\|").replace("_", "\\_")


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _about(content: dict[str, Any]) -> str:
    machines = []
    for environment in content["environments"]:
        versions = environment.get("packages") or {}
        commit = environment.get("commit")
        parts = [
            environment.get("gpu") or environment.get("processor"),
            f"torch {versions['torch']}" if "torch" in versions else None,
            f"commit {commit[:10]}{' with local changes' if environment.get('dirty') else ''}" if commit else None,
        ]
        machines.append(", ".join(str(part) for part in parts if part))
    where = "; ".join(dict.fromkeys(machines))
    when = f", finished {content['finished'][:10]}" if content.get("finished") else ""
    return f"Measured on {where}{when}." if where else ""


def _table(lines: Collection[str]) -> str:
    body = "\n".join(lines)
    return f'<div class="ballast-table" markdown="1">\n\n{body}\n\n</div>'


def _small(notes: Iterable[str]) -> str:
    text = " ".join(note for note in notes if note)
    return f'<small markdown="span">{text}</small>' if text else ""
