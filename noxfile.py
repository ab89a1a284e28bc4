"""Sessions of the workspace. Plain `nox` runs what CI runs; `nox -l` lists the rest."""

from __future__ import annotations

import os
import shutil
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import nox

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "uv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "imports", "tests", "golden", "build", "docs"]

ROOT = Path(__file__).parent
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "NO_MKDOCS_2_WARNING": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def _project(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]


MEMBERS = {_project(f.parent)["name"]: f.parent for f in sorted(ROOT.glob("[pa]*s/*/pyproject.toml"))}
# Version 0.0.0 marks a member that is planned and holds no code yet: it is built and imported, there is nothing to test.
BUILT = [name for name, folder in MEMBERS.items() if _project(folder)["version"] != "0.0.0"]
PUBLISHED = [name for name in BUILT if MEMBERS[name].parent.name == "packages" and name != "ballast-testing"]


def _import_name(package: str) -> str:
    return next(p.parent.name for p in MEMBERS[package].glob("src/*/__init__.py"))


def _sync(session: nox.Session, *args: str) -> None:
    """Install exactly what `args` ask of the lock file into this session's own environment."""
    session.run_install(
        "uv", "sync", "--quiet", "--frozen", "--exact", "--no-default-groups", *args,
        env={"UV_PROJECT_ENVIRONMENT": session.virtualenv.location},
        external=True,
    )  # fmt: skip


def _sync_tests(session: nox.Session, package: str) -> None:
    """Only the package, its own dependencies and its own test group: an undeclared import fails."""
    _sync(session, "--package", package, "--group", "test")


def _pytest(session: nox.Session, package: str, marks: str) -> None:
    session.run(
        "pytest", str(MEMBERS[package].relative_to(ROOT)), "-q", "-m", marks, *session.posargs,
        env=ONE_THREAD, success_codes=[0, 5] if marks != "not slow and not gpu and not network" else [0],
    )  # fmt: skip


def _changed_since_main(session: nox.Session) -> set[str]:
    """Files changed since the branch left origin/main; empty where there is no such branch."""
    base = session.run(
        "git", "merge-base", "HEAD", "origin/main", external=True, silent=True, success_codes=[0, 1, 128]
    )
    if not base or "fatal" in base:
        session.log("no origin/main to compare with: changelog check has nothing to look at")
        return set()
    return set(session.run("git", "diff", "--name-only", base.strip(), external=True, silent=True).split())


@nox.session
def lint(session: nox.Session) -> None:
    """Style, spelling, workflow safety, lock file, a changelog fragment for every changed package."""
    _sync(session, "--only-group", "dev")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("codespell")
    session.run("zizmor", "--offline", "--quiet", ".github")
    session.run("uv", "lock", "--check", "--quiet", external=True)
    changed = _changed_since_main(session)
    for name in BUILT:
        folder = MEMBERS[name].relative_to(ROOT).as_posix()
        touched = any(f.startswith(f"{folder}/src/") for f in changed)
        noted = any(f.startswith((f"{folder}/changes/", f"{folder}/CHANGELOG.md")) for f in changed)
        if touched and not noted:
            session.error(f"{name} changed without a fragment in {folder}/changes/ (see CONTRIBUTING.md)")


@nox.session
def types(session: nox.Session) -> None:
    """Run mypy --strict over every package and app."""
    _sync(session, "--all-packages", "--group", "dev", "--group", "test")
    session.run("mypy", env=ONE_THREAD)


@nox.session
def imports(session: nox.Session) -> None:
    """Who may import whom, as written and as loaded at run time."""
    _sync(session, "--all-packages", "--group", "dev")
    session.run("lint-imports")
    heavy = [
        "accelerate",
        "matplotlib",
        "peft",
        "pyg_lib",
        "scipy",
        "sklearn",
        "torch_geometric",
        "torch_cluster",
        "torch_scatter",
        "torch_sparse",
        "transformers",
        "triton",
        "trl",
        "verl",
    ]
    for name in PUBLISHED:
        module = _import_name(name)
        # A graph package is made of PyG, which loads triton and transformers itself where they are; its optional parts stay out.
        on_pyg = any(d.startswith("torch-geometric") for d in _project(MEMBERS[name])["dependencies"])
        unwanted = [m for m in heavy if not (on_pyg and m in ("torch_geometric", "transformers", "triton"))]
        session.run(
            "python", "-c",
            f"import torch, sys; before = set(sys.modules); import {module}; "
            f"loaded = sorted(m for m in {unwanted!r} if m in set(sys.modules) - before); "
            f"sys.exit(f'import {module} loads {{loaded}}' if loaded else 0)",
            env=ONE_THREAD,
        )  # fmt: skip


@nox.session
@nox.parametrize("package", BUILT, ids=BUILT)
def tests(session: nox.Session, package: str) -> None:
    """Fast tests of one package, with only that package's own dependencies installed."""
    _sync_tests(session, package)
    _pytest(session, package, "not slow and not gpu and not network")


@nox.session
@nox.parametrize("package", BUILT, ids=BUILT)
def slow(session: nox.Session, package: str) -> None:
    """Tests that take more than about ten seconds: real data, several processes, torch.compile."""
    _sync_tests(session, package)
    _pytest(session, package, "slow and not gpu and not network")


@nox.session
@nox.parametrize("package", BUILT, ids=BUILT)
def gpu(session: nox.Session, package: str) -> None:
    """Tests that need CUDA; each is skipped, with the reason, where there is none."""
    _sync_tests(session, package)
    _pytest(session, package, "gpu")


@nox.session
@nox.parametrize("package", PUBLISHED, ids=PUBLISHED)
def lowest(session: nox.Session, package: str) -> None:
    """The fast tests with the lowest versions that the package's own metadata allows."""
    folder = MEMBERS[package].relative_to(ROOT).as_posix()
    session.run_install(
        "uv", "pip", "install", "--quiet", "--resolution", "lowest-direct", "-e", folder,
        "--group", f"{folder}/pyproject.toml:test",
        external=True,
    )  # fmt: skip
    _pytest(session, package, "not slow and not gpu and not network")


@nox.session
def golden(session: nox.Session) -> None:
    """Every vector that is committed with a package, through the runner that also takes other folders."""
    _sync(session, "--all-packages", "--group", "test")
    with tempfile.TemporaryDirectory() as tmp:
        for name in PUBLISHED:
            vectors = MEMBERS[name] / "tests" / "golden"
            if vectors.is_dir():
                shutil.copytree(vectors, Path(tmp) / name, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
        session.run("python", "-m", "ballast_testing.golden", *(session.posargs or [tmp]), env=ONE_THREAD)


@nox.session
@nox.parametrize("package", list(MEMBERS), ids=list(MEMBERS))
def build(session: nox.Session, package: str) -> None:
    """Wheel and sdist of one member; the wheel, alone with what it declares, is imported in a clean environment."""
    session.install("twine>=6.1")
    with tempfile.TemporaryDirectory() as tmp:
        session.run("uv", "build", "--quiet", "--all-packages", "--no-sources", "--out-dir", tmp, external=True)
        files = [str(f) for f in Path(tmp).glob(f"{package.replace('-', '_')}-*") if f.suffix in (".whl", ".gz")]
        session.run("twine", "check", "--strict", *files)
        wheel = next(f for f in files if f.endswith(".whl"))
        clean = Path(tmp) / "clean"
        session.run("uv", "venv", "--quiet", "--python", session.virtualenv.location, str(clean), external=True)
        python = str(clean / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
        # First-party wheels come from this folder, by path; an index is asked only for third-party names.
        own = [str(f) for f in Path(tmp).glob("*.whl") if _declares(package, f.name.split("-")[0].replace("_", "-"))]
        session.run("uv", "pip", "install", "--quiet", "--python", python, wheel, *own, external=True)
        session.run(
            python, "-I", "-W", "ignore", "-c", f"import {_import_name(package)} as m; print(m.__name__)", external=True
        )


def _declares(package: str, other: str) -> bool:
    """Whether `package` depends on the workspace member `other`, directly or through another member."""
    names = [d.split(">")[0].split("[")[0].strip() for d in _project(MEMBERS[package]).get("dependencies", [])]
    return other in names or any(_declares(n, other) for n in names if n in MEMBERS)


@nox.session
@nox.parametrize("package", PUBLISHED, ids=PUBLISHED)
def wheel(session: nox.Session, package: str) -> None:
    """The fast tests against the built wheel in an environment that has nothing but it and its test group."""
    folder = MEMBERS[package].relative_to(ROOT).as_posix()
    with tempfile.TemporaryDirectory() as tmp:
        session.run(
            "uv", "build", "--quiet", "--all-packages", "--no-sources", "--wheel", "--out-dir", tmp, external=True
        )
        # The test kit comes from the checkout, through the group; what is tested comes from wheels alone.
        wheels = {f.name.split("-")[0].replace("_", "-"): str(f) for f in Path(tmp).glob("*.whl")}
        own = [path for name, path in wheels.items() if name == package or _declares(package, name)]
        session.run_install(
            "uv", "pip", "install", "--quiet", *own, "--group", f"{folder}/pyproject.toml:test", external=True
        )
        session.run(
            "pytest", f"{folder}/tests", "-q", "-m", "not slow and not gpu and not network", *session.posargs,
            env=ONE_THREAD,
        )  # fmt: skip


@nox.session
@nox.parametrize("package", PUBLISHED, ids=PUBLISHED)
def api(session: nox.Session, package: str) -> None:
    """Breaking changes of the public API since the package's last tag."""
    _sync(session, "--only-group", "dev")
    tag = session.run("git", "tag", "--list", f"{package}-v*", "--sort=-v:refname", external=True, silent=True).split()
    if not tag:
        session.skip(f"{package} has no release tag yet: nothing to compare with")
    folder = MEMBERS[package].relative_to(ROOT).as_posix()
    session.run("griffecli", "check", _import_name(package), "-s", f"{folder}/src", "--against", tag[0])


@nox.session
def docs(session: nox.Session) -> None:
    """Site with --strict, formulas through KaTeX, doctests, README and docs snippets."""
    _sync(session, "--all-packages", "--group", "docs", "--group", "test")
    session.run("python", "docs/tools/readme_table.py", "--check")
    session.run("python", "docs/tools/api_pages.py", env=ONE_THREAD)
    session.run("mkdocs", "build", "--strict", "--quiet", env=ONE_THREAD)
    if shutil.which("node"):
        session.run("node", "docs/tools/check_formulas.mjs", "site", external=True)
    else:
        session.warn("node is not installed: formulas were not rendered")
    sources = [str((MEMBERS[n] / "src").relative_to(ROOT)) for n in PUBLISHED]
    session.run("pytest", "-q", "--doctest-modules", *sources, env=ONE_THREAD)
    readmes = [str((MEMBERS[n] / "README.md").relative_to(ROOT)) for n in PUBLISHED]
    session.run(
        "pytest",
        "-q",
        "--markdown-docs",
        "--markdown-docs-syntax=superfences",
        "README.md",
        *readmes,
        "docs",
        env=ONE_THREAD,
    )


@nox.session
def browser(session: nox.Session) -> None:
    """Look at the built site in headless Chromium: console, formulas, search, phone width."""
    session.run("python", "docs/tools/check_browser.py", *(session.posargs or ["site"]), env=ONE_THREAD)


@nox.session
def bench(session: nox.Session) -> None:
    """The quick suite and its report."""
    _sync(session, "--all-packages")
    session.run("ballast", "bench", "run", "--suite", "quick", *session.posargs, env=ONE_THREAD)
