"""mkdocs hooks: API pages before the build, and tables of measured results in place of their fences.

A page asks for results with a fenced block (YAML inside), so no figure is ever typed into a page:

    ```results      published beside ours, one row per setting
    ```benchmarks   every committed export of a suite in full
    ```speed        figures of the committed outputs of benchmark scripts
    ```picture      one metric of one case as bars
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from mkdocs.exceptions import PluginError

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))
import api_pages
import results_tables

VERSION = re.compile(r"\{\{ version ([a-z0-9-]+) \}\}")
FENCE = re.compile(r"^```(results|benchmarks|picture|speed)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def on_pre_build(config: MkDocsConfig) -> None:
    """Generate docs/api; stop the build on a public name without docstring or a method without page."""
    problems = api_pages.generate()
    if problems:
        raise PluginError("\n".join(problems))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace the result fences of one page."""

    def replace(match: re.Match[str]) -> str:
        try:
            spec = yaml.safe_load(match[2]) or {}
            return results_tables.render(match[1], spec)
        except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
            raise PluginError(f"{page.file.src_uri}: ```{match[1]} block: {error}") from error

    return VERSION.sub(_version, FENCE.sub(replace, markdown))


def _version(match: re.Match[str]) -> str:
    file = api_pages.ROOT / "packages" / match[1] / "pyproject.toml"
    return str(tomllib.loads(file.read_text(encoding="utf-8"))["project"]["version"])
