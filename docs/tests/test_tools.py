"""The tools of the site and of the workflows; collected by the `docs` session."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[1] / "tools"
ROOT = HERE.parents[1]


def load_module(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


results_tables = load_module(HERE / "results_tables.py")
api_pages = load_module(HERE / "api_pages.py")
changed_packages = load_module(ROOT / ".github" / "scripts" / "changed_packages.py")
release_tag = load_module(ROOT / ".github" / "scripts" / "release_tag.py")

EXPORT = {
    "schema": 1,
    "commands": ["ballast bench run --suite cpu"],
    "finished": "2026-11-24T20:00:00+00:00",
    "environments": [
        {"processor": "A CPU", "packages": {"torch": "2.15"}, "commit": "0123456789abcdef", "dirty": False}
    ],
    "cases": [
        {
            "id": "recsys_losses/lastfm-mf",
            "title": "MF on lastfm",
            "dataset": "lastfm",
            "baseline": "bpr",
            "note": "Chosen on validation data.",
            "metrics": [{"name": "recall@20", "better": "higher", "digits": 4}],
            "methods": [
                {
                    "name": "bpr",
                    "settings": {"loss": {"name": "bpr", "l2": 0.03}},
                    "metrics": {"recall@20": {"mean": 0.25261, "std": 0.0022, "n": 5}},
                },
                {"name": "ssm", "settings": {}, "metrics": {"recall@20": {"mean": 0.2748, "std": None, "n": 1}}},
            ],
        }
    ],
}
PUBLISHED = {
    "schema": 1,
    "sources": {"s": {"text": "A paper, Table 1", "url": "https://example.org"}},
    "figures": {"f": {"source": "s", "recall@20": [0.25, 0.001]}},
}
ROW = {"label": "MF, BPR", "published": "f", "ours": "lastfm-mf :: bpr"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "published.json").write_text(json.dumps(PUBLISHED), encoding="utf-8")
    (tmp_path / "cpu.json").write_text(json.dumps(EXPORT), encoding="utf-8")
    monkeypatch.setattr(results_tables, "RESULTS", tmp_path)
    monkeypatch.setattr(results_tables.load, "__defaults__", (tmp_path,))
    return tmp_path


def table(**change):
    return results_tables.results(file="cpu", metrics=["recall@20"], rows=[{**ROW, **change}])


def test_a_row_shows_published_ours_and_configuration(folder):
    text = table()
    assert "0.2500 ± 0.0010<sup>1</sup>" in text
    assert "0.2526 ± 0.0022<br>n = 5" in text
    assert "loss bpr, l2 0.03" in text
    assert "<sup>1</sup> [A paper, Table 1](https://example.org)" in text
    assert "torch 2.15, commit 0123456789, finished 2026-11-24" in text


def test_an_absent_file_is_said_to_be_not_measured(folder):
    (folder / "cpu.json").unlink()
    assert "not measured yet" in table()
    assert "not measured yet" in results_tables.picture(file="cpu", case="x", metric="recall@20", title="T")
    assert "not measured yet" in results_tables.benchmarks()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ours": "lastfm-mg :: bpr"}, "no case 'lastfm-mg'; did you mean 'lastfm-mf'"),
        ({"ours": "lastfm-mf :: bqr"}, "no method 'bqr'; did you mean 'bpr'"),
        ({"ours": "lastfm-mf"}, "must read 'case :: method'"),
        ({"published": "g"}, "no figure 'g'"),
        ({"colour": "red"}, "unknown keys"),
    ],
)
def test_a_reference_that_leads_nowhere_is_refused(folder, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        table(**change)


def test_a_missing_metric_is_refused(folder):
    with pytest.raises(ValueError, match="no metric 'ndcg@20'"):
        results_tables.results(file="cpu", metrics=["ndcg@20"], rows=[{"label": "x", "ours": "lastfm-mf :: ssm"}])


def test_benchmarks_and_picture_hold_every_method(folder):
    text = results_tables.benchmarks()
    drawn = results_tables.picture(file="cpu", case="lastfm-mf", metric="recall@20", title="Recall")
    for name in ("bpr", "ssm"):
        assert name in text
        assert f"<span>{name}</span>" in drawn
    assert drawn.count('class="base"') == 1
    assert drawn.count('class="whisker"') == 1  # one seed has no deviation


def test_api_pages_names_missing_docstrings_exports_and_pages(tmp_path):
    source = tmp_path / "thing"
    source.mkdir()
    (source / "__init__.py").write_text("", encoding="utf-8")
    (source / "one.py").write_text(
        '__all__ = ["f", "g", "h"]\ndef f(): ...\ndef g():\n    """G.\n\n    Example:\n    """\n', encoding="utf-8"
    )
    (source / "two.py").write_text("x = 1\n", encoding="utf-8")
    package = api_pages.Package("thing", blocks=("two",), summaries={})
    modules = api_pages.griffe.load("thing", search_paths=[tmp_path]).modules
    one = "\n".join(api_pages.problems_of(package, modules["one"]))
    assert "thing.one.f: public function or class without a docstring" in one
    assert "thing.one.g: the section is called 'Examples:'" in one
    assert "__all__ names 'h'" in one
    assert "nor a page" in one
    assert api_pages.problems_of(package, modules["two"]) == ["thing.two: no __all__"]


def test_changed_packages_follow_dependents_and_ignore_prose():
    known = {"a": ("packages/a", set()), "b": ("packages/b", {"a"}), "c": ("apps/c", {"b"}), "d": ("packages/d", set())}
    concerned = changed_packages.concerned
    assert concerned(["packages/a/src/a/x.py"], known) == ["a", "b", "c"]
    assert concerned(["packages/d/README.md"], known) == ["d"]
    assert concerned(["docs/index.md", "README.md"], known) == []
    assert concerned(["uv.lock"], known) == ["a", "b", "c", "d"]
    assert concerned(None, known) == ["a", "b", "c", "d"]
    assert changed_packages.changed_files("") is None


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        ("v1.0.0", "is not <package>-v"),
        ("nothing-v1.0.0", "no package 'nothing'"),
        ("mllm-v0.0.0", "mllm"),
        ("testing-v0.1.0", "private"),
        ("recsys-losses-v99.0.0", "tag says 99.0.0"),
        ("recsys-losses-v1.0.0\nx=1", "is not <package>-v"),
    ],
)
def test_a_tag_that_does_not_fit_is_refused(tag, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        release_tag.parse(tag)


def test_outputs_of_scripts_are_shown_beside_suites(folder):
    record = {
        "benchmark": "b",
        "device": "A CPU",
        "torch": "2.15",
        "cases": [
            {
                "items": 50000,
                "sides": {
                    "blocked": {"median_s": 0.25, "min_s": 0.2, "peak_extra_bytes": 2**21, "time_over_direct": 1.1}
                },
            }
        ],
    }
    (folder / "one_script.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    (folder / "lines.json").write_text('{"data": "a", "ratio": 12.5}\n{"data": "b", "ratio": 2}\n', encoding="utf-8")
    text = results_tables.speed()
    assert "| 50,000 items, blocked | median s | 250.0 ms |" in text
    assert "| 50,000 items, blocked | peak extra | 2.0 MiB |" in text
    assert "| 50,000 items, blocked | time over direct | 1.1 |" in text
    assert "| b | ratio | 2 |" in text
    assert "min" not in text
    assert "one script" not in results_tables.benchmarks()
    (folder / "empty.json").write_text('{"data": "a"}', encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape("empty.json holds no figure")):
        results_tables.speed()


def test_the_bench_suites_quote_the_same_published_figures():
    suites = ROOT / "apps/bench/src/ballast_bench/suites/published.json"
    docs = json.loads((ROOT / "docs/results/published.json").read_text())["figures"]
    known = set()
    for figures in docs.values():
        for metric, value in figures.items():
            if metric != "source":
                known.add((metric, value[0] if isinstance(value, list) else value))
    quoted = {(row["metric"], row["value"]) for row in json.loads(suites.read_text())["figures"]}
    assert quoted <= known
