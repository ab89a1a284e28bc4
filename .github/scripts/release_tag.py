"""Check a release tag `<package>-v<version>` against the repository.

Prints `package=...` and `version=...` for GITHUB_OUTPUT, or, with --notes, the changelog section of that version. Exits 1
with a reason where the tag, the version in pyproject.toml or the changelog do not agree.

    python .github/scripts/release_tag.py [--notes] TAG
"""

# ruff: noqa: T201

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def parse(tag: str) -> tuple[str, str, Path]:
    """Package, version and folder that a tag names; ValueError where it may not be released."""
    match = re.fullmatch(r"(?P<package>[a-z0-9]+(?:-[a-z0-9]+)*)-v(?P<version>\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?)", tag)
    if match is None:
        raise ValueError(f"tag {tag!r} is not <package>-v<major>.<minor>.<patch>")
    package, version = match["package"], match["version"]
    folder = ROOT / "packages" / package
    if not (folder / "pyproject.toml").is_file():
        known = ", ".join(sorted(p.parent.name for p in ROOT.glob("packages/*/pyproject.toml")))
        raise ValueError(f"no package {package!r}; there are {known}")
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    if any(c.startswith("Private ::") for c in project.get("classifiers", [])):
        raise ValueError(f"{package} is private and never uploaded")
    if project["version"] == "0.0.0":
        raise ValueError(f"{package} is planned and holds nothing to release")
    if project["version"] != version:
        raise ValueError(f"tag says {version}, packages/{package}/pyproject.toml says {project['version']}")
    return package, version, folder


def notes(folder: Path, version: str) -> str:
    """The section of CHANGELOG.md that belongs to `version`."""
    text = (folder / "CHANGELOG.md").read_text(encoding="utf-8")
    match = re.search(rf"^## .*?\b{re.escape(version)}\b.*?$\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if match is None:
        raise ValueError(f"{folder.name}/CHANGELOG.md has no section for {version}")
    return match[1].strip()


def main(arguments: list[str]) -> int:
    """Command line."""
    want_notes = "--notes" in arguments
    rest = [a for a in arguments if a != "--notes"]
    if len(rest) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        package, version, folder = parse(rest[0])
        section = notes(folder, version)
    except ValueError as error:
        print(f"release refused: {error}", file=sys.stderr)
        return 1
    print(section if want_notes else f"package={package}\nversion={version}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
