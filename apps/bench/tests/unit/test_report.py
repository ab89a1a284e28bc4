from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from rich.console import Console

from ballast_bench.aggregate import aggregate
from ballast_bench.report import render, write_report
from ballast_bench.tables import print_results

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Collect addresses and check that tags nest."""

    def __init__(self):
        super().__init__()
        self.addresses, self.open, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(toys, tmp_path_factory):
    from ballast_bench.runner import run_cells
    from ballast_bench.store import Store
    from ballast_bench.suites import select_cells

    store = Store(tmp_path_factory.mktemp("report") / "toys", create=True)
    run_cells(store, select_cells((*toys.wide(), *toys.troubled())), jobs=2)
    path, results = write_report(store)
    return path, results, store


def test_the_page_needs_nothing_from_elsewhere(page):
    text = page[0].read_text()
    parsed = Page()
    parsed.feed(text)
    assert parsed.open == []
    assert parsed.addresses
    assert all(address.startswith(("#", "data:")) for address in parsed.addresses)
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)", text)
    # the only addresses in the file are the names of the SVG vocabularies
    assert set(re.findall(r'https?://[^"\s<]+', text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_the_page_shows_every_case_plot_and_trouble(page):
    text = page[0].read_text()
    assert text.count("<svg") == 6  # bars, curves, trade-off; sweep; bars and curves of the one method that ran
    for words in ("Toys compared", "false positives, %", "Toy paper, Table 2", "the toy method fell over", "SIGABRT"):
        assert words in text
    assert "prefers-color-scheme: dark" in text
    assert "NaN" not in text


def test_plots_take_their_colours_from_the_page(page):
    drawings = re.findall(r"<svg.*?</svg>", page[0].read_text(), flags=re.DOTALL)
    assert all("var(--fg)" in drawing for drawing in drawings)
    assert not any(re.search(r"#0[a-d]0[a-d]", drawing) for drawing in drawings)


def test_the_same_store_gives_the_same_page(page):
    path, _, store = page
    before = path.read_bytes()
    write_report(store)
    assert path.read_bytes() == before


def test_names_are_escaped(toys, measured):
    bad = "<script>alert(1)</script>"
    methods = {"BPR": {"level": 0.2}, bad: {"level": 0.3}}
    store = measured(toys.case(methods=methods, title=f"A & {bad}", published=()))
    records = store.latest()
    text = render(aggregate(records), records, title=bad)
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text


def test_an_empty_store_still_has_a_page(tmp_path):
    assert "Ballast benchmark" in render([], [], title="empty")


def test_the_terminal_table_has_the_figures(page):
    out = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    print_results(page[1], out)
    text = out.export_text()
    assert "0.2530 ± 0.0030 ▲" in text
    assert "+25.2 %" in text
    assert "failed toys/troubled/raise/0: RuntimeError: the toy method fell over" in text
    out.file.close()


def test_statistics_are_corrected_within_the_case(toys, measured):
    (case,) = aggregate(measured(toys.case(seeds=(0, 1, 2, 3, 4))).latest())
    p = [method.comparisons["recall@20"] for method in case.results if method.name != "BPR"]
    assert all(comparison.n == 5 for comparison in p)
    # the other tested metric has equal differences, hence no p-value: two tests are corrected
    smallest = min(p, key=lambda comparison: comparison.p_t)
    assert smallest.p_holm == pytest.approx(2 * smallest.p_t)
    assert case.method("SSM").comparisons["train_seconds"].p_holm is None


def test_a_browser_shows_it_without_complaint(page, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    done = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            f"--user-data-dir={tmp_path}",
            "--dump-dom",
            page[0].as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    assert '<th scope="col" tabindex="0">method</th>' in done.stdout  # the sorting script ran
