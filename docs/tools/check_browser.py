"""Look at the built site, and at an HTML report, in headless Chromium at desktop and phone width.

Checks per page: no console error or exception, no request to another host, every formula rendered, no image missing, the
page not wider than the window. Once: the search finds an API name by a part of it. Takes screenshots. Needs Chromium and
nothing but the standard library; without Chromium it says so and exits 0.

    python docs/tools/check_browser.py site [--report runs/quick/report.html] [--screenshots DIR]
"""

from __future__ import annotations

import argparse
import base64
import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
WIDTHS = {"desktop": 1280, "phone": 390}
STATE = """(() => ({
  width: document.documentElement.scrollWidth,
  formulas: document.querySelectorAll('.arithmatex').length,
  rendered: document.querySelectorAll('.arithmatex .katex').length,
  broken: [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src),
  wide: [...document.querySelectorAll('article *')]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && e.parentElement.getBoundingClientRect().right <= innerWidth + 1)
    .filter(e => getComputedStyle(e.parentElement).overflowX === 'visible')
    .slice(0, 3).map(e => (e.tagName + ' ' + e.className).trim()),
}))()"""


class Browser:
    """The DevTools protocol over Chromium's pipe: JSON messages that end with a zero byte, on descriptors 3 and 4."""

    def __init__(self, program: str, profile: str) -> None:
        down_read, down_write = os.pipe()
        up_read, up_write = os.pipe()
        self.process = subprocess.Popen(  # noqa: S603
            # bash moves the descriptors to the numbers that Chromium expects
            [  # noqa: S607
                "bash",
                "-c",
                f'exec "$@" 3<&{down_read} 4>&{up_write}',
                "bash",
                program,
                *FLAGS,
                f"--user-data-dir={profile}",
            ],
            pass_fds=(down_read, up_write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(down_read)
        os.close(up_write)
        self._out = os.fdopen(down_write, "wb", buffering=0)
        self._in = os.fdopen(up_read, "rb", buffering=0)
        self._buffer = b""
        self._next = 0
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session: str | None = None
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    session: str | None = None

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            chunk = self._in.read(1 << 16)
            if not chunk:
                raise RuntimeError("Chromium closed the connection")
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)  # type: ignore[no-any-return]

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command and wait for its answer; events that arrive meanwhile are kept."""
        self._next += 1
        message: dict[str, Any] = {"id": self._next, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self._out.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._next:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]  # type: ignore[no-any-return]
            self.events.append(answer)

    def evaluate(self, script: str) -> Any:
        """Value of an expression in the page; promises are awaited."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"].get("description", "exception in the page"))
        return result["result"].get("value")

    def wait(self, script: str, seconds: float = 10.0) -> bool:
        """Whether an expression becomes true in time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.evaluate(script):
                return True
            time.sleep(0.05)
        return False

    def open(self, url: str, width: int, height: int = 900) -> None:
        """Load a page at a window size."""
        self.events.clear()
        self.resize(width, height)
        self.call("Page.navigate", url=url)
        if not self.wait(
            f"location.href.split('#')[0] === {json.dumps(url)} && document.readyState === 'complete'", 20
        ):
            raise RuntimeError(f"{url} did not load")
        time.sleep(0.15)
        self.evaluate("1")  # collects the events that are still on their way

    def screenshot(self, path: Path, *, full: bool = True) -> None:
        """Write a PNG of the page, the whole of it unless `full` is False."""
        if full:
            size = self.call("Page.getLayoutMetrics")
            self.resize(size["cssLayoutViewport"]["clientWidth"], max(900, int(size["cssContentSize"]["height"])))
        time.sleep(0.4)  # the theme fades its tabs in
        shot = self.call("Page.captureScreenshot", format="png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def resize(self, width: int, height: int) -> None:
        """Give the page a window of this size."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def complaints(self, origin: str) -> list[str]:
        """Console errors and warnings, exceptions, failed loads, and requests that leave `origin`."""
        found = []
        for event in self.events:
            kind, p = event.get("method"), event.get("params", {})
            if kind == "Runtime.exceptionThrown":
                found.append("exception: " + p["exceptionDetails"].get("exception", {}).get("description", "?"))
            elif kind == "Runtime.consoleAPICalled" and p["type"] in ("error", "warning", "assert"):
                found.append("console: " + " ".join(str(a.get("value", a.get("description"))) for a in p["args"]))
            elif kind == "Log.entryAdded" and p["entry"]["level"] in ("error", "warning"):
                found.append(f"log: {p['entry']['text']} {p['entry'].get('url', '')}")
            elif kind == "Network.requestWillBeSent":
                url = p["request"]["url"]
                if not url.startswith((origin, "data:", "blob:", "about:")):
                    found.append(f"request to another host: {url}")
        return found

    def close(self) -> None:
        """End the browser."""
        self._out.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without a line per request."""

    def log_message(self, *_: object) -> None:
        return


def check_page(browser: Browser, url: str, origin: str, shots: Path | None, name: str, *, formulas: bool) -> list[str]:
    """Problems of one page at both widths."""
    problems = []
    for label, width in WIDTHS.items():
        browser.open(url, width)
        state = browser.evaluate(STATE)
        found = browser.complaints(origin)
        if state["width"] > width:
            found.append(f"{state['width']} px wide in a window of {width} px: {', '.join(state['wide']) or '?'}")
        if formulas and state["rendered"] != state["formulas"]:
            found.append(f"{state['rendered']} of {state['formulas']} formulas rendered")
        found += [f"image not loaded: {source}" for source in state["broken"]]
        problems += [f"{name} ({label}): {text}" for text in found]
        if shots is not None:
            browser.screenshot(shots / f"{name.strip('/').replace('/', '-') or 'home'}-{label}.png")
    return problems


def typed_and_found(browser: Browser, query: str, there: str) -> bool:
    """Type into the search field and wait for the result. What is typed before the page's script listens is not seen."""
    browser.evaluate("(() => { const f = document.querySelector('.md-search__input'); f.value = ''; f.focus(); })()")
    browser.call("Input.insertText", text=query)
    return browser.wait(there, 5)


def check_search(browser: Browser, origin: str, shots: Path | None) -> list[str]:
    """The search, asked for a part of a name, must offer the page of that name."""
    problems = []
    for query, wanted in (("in_batch_ssm", "ssm"), ("AdaptiveTemperature", "adap_tau"), ("bilateral", "bsl")):
        browser.open(f"{origin}/", WIDTHS["desktop"])
        there = f"[...document.querySelectorAll('.md-search-result__link')].some(a => a.href.includes({json.dumps(wanted)}))"
        if not any(typed_and_found(browser, query, there) for _ in range(4)):
            problems.append(f"search for {query!r} does not offer a page of {wanted!r}")
        if shots is not None and query == "in_batch_ssm":
            browser.screenshot(shots / "search-desktop.png", full=False)
    return problems


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=Path, help="folder of the built site")
    parser.add_argument("--report", type=Path, help="HTML report to look at as well")
    parser.add_argument("--screenshots", type=Path, help="folder for PNG files")
    arguments = parser.parse_args()
    if not (arguments.site / "index.html").is_file():
        parser.error(f"{arguments.site}/index.html does not exist: build the site first (mkdocs build --strict)")
    if arguments.report is not None and not arguments.report.is_file():
        parser.error(f"report {arguments.report} does not exist")
    program = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if program is None:
        print(f"skipped: none of {', '.join(BROWSERS)} is installed")
        return 0

    handler = functools.partial(Quiet, directory=str(arguments.site.resolve()))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    origin = f"http://127.0.0.1:{server.server_address[1]}"
    pages = sorted(p.parent.relative_to(arguments.site).as_posix() for p in arguments.site.rglob("index.html"))
    problems: list[str] = []
    profile = tempfile.mkdtemp(prefix="check-browser-")
    browser = Browser(program, profile)
    try:
        for page in pages:
            path = "/" if page == "." else f"/{quote(page)}/"
            problems += check_page(browser, origin + path, origin, arguments.screenshots, path, formulas=True)
        if not browser.evaluate("true"):
            raise RuntimeError("the page no longer answers")
        problems += check_search(browser, origin, arguments.screenshots)
        if arguments.report is not None:
            url = arguments.report.resolve().as_uri()
            problems += check_page(browser, url, url, arguments.screenshots, "report", formulas=False)
    finally:
        browser.close()
        server.shutdown()
        shutil.rmtree(profile, ignore_errors=True)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(pages)} pages at {' and '.join(f'{w} px' for w in WIDTHS.values())}: {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
