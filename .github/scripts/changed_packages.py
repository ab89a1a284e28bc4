"""Print, as a JSON list, the members that a change concerns: those with changed files and all that depend on them.

A change to a file outside the members (lock file, tool configuration, workflows) concerns every member, and so does an
unknown or empty base commit. Members at version 0.0.0 are planned and hold nothing to test.

    python .github/scripts/changed_packages.py BASE_COMMIT
"""

# ruff: noqa: T201

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
# Files that no test reads.
PROSE = re.compile(r"(docs/.*|[^/]*\.md|CITATION\.cff|LICENSE)")


def members() -> dict[str, tuple[str, set[str]]]:
    """Name -> (folder, names of first-party dependencies), built members only."""
    found = {}
    for file in sorted([*ROOT.glob("packages/*/pyproject.toml"), *ROOT.glob("apps/*/pyproject.toml")]):
        table = tomllib.loads(file.read_text(encoding="utf-8"))
        project = table["project"]
        if project["version"] == "0.0.0":
            continue
        wanted = [*project.get("dependencies", []), *table.get("dependency-groups", {}).get("test", [])]
        wanted += [d for extra in project.get("optional-dependencies", {}).values() for d in extra]
        names = {re.split(r"[\s\[<>=!~;@]", d, maxsplit=1)[0] for d in wanted if isinstance(d, str)}
        found[project["name"]] = (file.parent.relative_to(ROOT).as_posix(), names)
    return {name: (folder, names & found.keys()) for name, (folder, names) in found.items()}


def changed_files(base: str) -> list[str] | None:
    """Files that differ from `base`, or None where that cannot be told."""
    if not re.fullmatch(r"[0-9a-f]{40}", base) or set(base) == {"0"}:
        return None
    done = subprocess.run(  # noqa: S603
        ["git", "diff", "--name-only", f"{base}...HEAD"],  # noqa: S607
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.splitlines() if done.returncode == 0 else None


def concerned(files: list[str] | None, known: dict[str, tuple[str, set[str]]]) -> list[str]:
    """Members whose tests could come out differently."""
    if files is None:
        return sorted(known)
    hit: set[str] = set()
    folders = {folder: name for name, (folder, _) in known.items()}
    for file in files:
        folder = "/".join(PurePosixPath(file).parts[:2])
        if folder in folders:
            hit.add(folders[folder])
        elif not file.startswith(("packages/", "apps/")) and not PROSE.fullmatch(file):
            return sorted(known)
    while True:
        more = {name for name, (_, needs) in known.items() if needs & hit} - hit
        if not more:
            return sorted(hit)
        hit |= more


if __name__ == "__main__":
    print(json.dumps(concerned(changed_files(sys.argv[1] if len(sys.argv) > 1 else ""), members())))
