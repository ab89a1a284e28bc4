"""Write docs/api/<package>/<module>.md before the site is built, and check what the site promises.

Fails when a public name has no docstring, when a module's `__all__` is missing, or when a module that is neither a
known building block nor private has no page under docs/papers. Reads the sources without importing them.

    python docs/tools/api_pages.py
"""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import griffe

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
# the page's own title stands for the module
OPTIONS = "    options: { show_root_heading: false, show_root_toc_entry: false }\n"


@dataclass(frozen=True)
class Package:
    """A package that the site documents: its building blocks need no paper page, every other public module does."""

    name: str
    blocks: tuple[str, ...]
    summaries: dict[str, str]

    @property
    def import_name(self) -> str:
        return self.name.replace("-", "_")


AVAILABLE = (
    Package(
        "recsys-losses",
        blocks=("baselines", "blocked", "data", "metrics", "models", "objectives", "sampling", "synthetic", "training"),
        summaries={
            "ssm": "Sampled softmax loss: in-batch, shared or own negatives, logQ, accidental hits",
            "bsl": "Bilateral softmax loss",
            "adap_tau": "Adaptive temperature, global and per user",
            "cpr": "Cross pairwise ranking and its sampler",
            "adnce": "Adjusted InfoNCE, the robust view of InfoNCE, bounds on divergences",
            "sgl": "Self-supervised graph learning on LightGCN: views, contrastive loss, training",
            "gcm": "Graph convolution over interactions with context, factorisation-machine decoder",
            "dsl": "Dynamic sparse training with an exact budget, export to sparse rows",
            "raremed": "Medication recommendation for rare diseases: encoder, pre-training, losses, records, metrics",
            "mcrl": "Offline reinforcement learning for sequences: losses, backbones, buffer, simulator",
            "if_dfm": "Influence update for delayed conversions, delayed-feedback losses, click data",
            "baselines": "BPR, BCE, softmax loss",
            "blocked": "Log-sum-exp over a whole catalogue in bounded memory",
            "data": "Readers, splits, generated feedback",
            "metrics": "Full-ranking evaluation, top-k, popularity",
            "models": "Matrix factorisation, LightGCN",
            "objectives": "`LossConfig`: a loss with its negatives, as the trainer and the command use it",
            "sampling": "Negative samplers, membership tests",
            "synthetic": "Generated feedback with known preferences and known exposure bias",
            "training": "`fit`, `evaluate`, checkpoints",
        },
    ),
    Package(
        "graph-ood",
        blocks=("baselines", "data", "explain", "nets", "rcc", "training"),
        summaries={
            "cal": "Causal attention, the three losses, CAL+ with prototypes and a memory bank",
            "aia": "Mask networks, adversarial and stable objectives, a measure of covariate shift",
            "infoigl": "Prototypes, contrast with them and between graphs, the redundancy filter",
            "asrc": "Adaptive graph, graph auto-encoder, contrast with cluster prototypes, ASRC",
            "rcc": "Robust continuous clustering, mutual nearest neighbours",
            "baselines": "ERM, IRM, V-REx, GroupDRO, manifold mixup, DropEdge",
            "data": "GOOD-Motif, SYN-b, TU data sets, size shift, checks of graphs",
            "explain": "Masks as explanations, their AUC, pictures",
            "nets": "Convolutions with edge weights, encoders, heads",
            "training": "`fit`, cross-validation, checkpoints",
        },
    ),
    Package(
        "graph-unlearn",
        blocks=("attacks", "convex", "data", "graph_eraser", "nets", "requests", "training"),
        summaries={
            "gif": "Right-hand side, functional reference, `unlearn` for any module",
            "requests": "What is to go, which nodes it touches, the graph without it",
            "attacks": "Adversarial edges and the efficacy curve, membership inference",
            "convex": "The check in weight space against true retraining",
            "data": "Citation graphs with the published split, generated graphs",
            "graph_eraser": "Training in shards: balanced partitions, aggregation",
            "nets": "GCN, SGC, GAT and GIN of the paper",
            "training": "Full-batch training, retraining",
        },
    ),
    Package(
        "ihvp",
        blocks=("hvp", "operators", "spectrum"),
        summaries={
            "hvp": "Hessian-vector products, two exact ways, and a loss as a function of parameters",
            "operators": "Products over a data loader and over ranks, or of one random batch",
            "solvers": "Conjugate gradient, Neumann series, LiSSA, quadratic SGD and Adam, direct, Lanczos",
            "spectrum": "Extreme eigenvalues",
        },
    ),
    Package(
        "pref-opt",
        blocks=("baselines", "chunked", "data", "losses", "multi_negative", "scoring", "stats", "tiny", "trl"),
        summaries={
            "beta_dpo": "Dynamic beta and filter per batch",
            "dr_dpo": "Soft minimum over the pairs of a batch, their weights, flipped labels",
            "alpha_dpo": "SimPO with a margin per pair from moving statistics",
            "gamma_po": "Margins as shares of a fixed sum, queue of reward gaps",
            "repo": "ReLU on the length-normalised gap, schedules of the margin",
            "napo": "Negatives of similar users, dynamic margin, SASRec, ranking metrics",
            "dynamic_po": "Boundary negatives, a beta for each of them",
            "alignment_potential": "Scores of pairs, selection, self-play and evolved prompts",
            "baselines": "DPO and its variants, IPO, KTO on pairs, SimPO, CPO, ORPO, SLiC, S-DPO, DMPO, MPPO",
            "losses": "Loss objects by name, what a trainer passes to them",
            "stats": "Moving statistics of reward gaps",
            "trl": "`PreferenceTrainer` on TRL's DPO trainer",
            "multi_negative": "`MultiNegativeTrainer`: K negatives, one copy of the prompt",
            "chunked": "Log-probabilities of sequences without the matrix of logits",
            "scoring": "Log-probabilities of a preference set under a model, rewards from models, drawing answers",
            "data": "Converters, checks, flips, splits, truncation",
            "tiny": "A tokenizer and a model made on the spot",
        },
    ),
)


def problems_of_docstring(member: griffe.Object | griffe.Alias) -> list[str]:
    """What is wrong with the docstring of a public function or class; constants need none."""
    target = member.final_target if member.is_alias else member
    if not (target.is_function or target.is_class):
        return []
    if target.docstring is None:
        return [f"{target.path}: public function or class without a docstring"]
    if re.search(r"^\s*Example:\s*$", target.docstring.value, re.MULTILINE):
        return [f"{target.path}: the section is called 'Examples:'; under 'Example:' doctests are rendered as prose"]
    return []


def problems_of(package: Package, module: griffe.Module) -> list[str]:
    """Everything that keeps this module from being published on the site."""
    found: list[str] = []
    if module.exports is None:
        found.append(f"{module.path}: no __all__")
    for export in module.exports or []:
        name = str(export)
        member = module.members.get(name)
        if member is None:
            found.append(f"{module.path}: __all__ names {name!r}, which is not defined there")
        else:
            found += problems_of_docstring(member)
    page = DOCS / "papers" / package.name / f"{module.name}.md"
    if module.name not in package.blocks and not page.is_file():
        found.append(
            f"{module.path}: neither a building block of {Path(__file__).name} nor a page {page.relative_to(ROOT)}"
        )
    return found


def write_if_changed(path: Path, text: str) -> None:
    """Leave an up-to-date file alone: `mkdocs serve` watches this folder and would rebuild for ever."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def generate() -> list[str]:
    """Write the pages; return the problems found."""
    problems: list[str] = []
    written: set[Path] = set()

    def write(relative: str, text: str) -> None:
        path = DOCS / "api" / relative
        write_if_changed(path, text)
        written.add(path)

    overview = ["# API", "", "Generated from the docstrings of the packages that are available.", ""]
    for package in AVAILABLE:
        source = ROOT / "packages" / package.name / "src"
        tree = griffe.load(
            package.import_name, search_paths=[source], docstring_parser="google", allow_inspection=False
        )
        modules = [m for name, m in sorted(tree.modules.items()) if not name.startswith("_")]
        order = {name: i for i, name in enumerate(package.summaries)}
        modules.sort(key=lambda m: (order.get(m.name, len(order)), m.name))
        overview += [f"## {package.name}", "", "| module | holds |", "|---|---|"]
        for module in modules:
            problems += problems_of(package, module)
            summary = package.summaries.get(module.name, "")
            overview.append(f"| [`{module.path}`]({package.name}/{module.name}.md) | {summary} |")
            write(
                f"{package.name}/{module.name}.md",
                f"---\nsearch: {{ boost: 3 }}\n---\n# {module.path}\n\n::: {module.path}\n{OPTIONS}",
            )
        overview.append("")
        write(f"{package.name}/.nav.yml", "nav:\n" + "".join(f"  - {m.name}.md\n" for m in modules))
        if not modules:
            problems.append(f"{package.name}: no public module under {source.relative_to(ROOT)}")
    write("index.md", "\n".join(overview))
    write(".nav.yml", "nav:\n  - index.md\n" + "".join(f"  - {p.name}: {p.name}\n" for p in AVAILABLE))
    for stale in set((DOCS / "api").rglob("*.*")) - written:
        if stale.is_file():
            stale.unlink()
    return problems


def main() -> int:
    """Command line: regenerate everything, print the problems, return the exit code."""
    shutil.rmtree(DOCS / "api", ignore_errors=True)
    problems = generate()
    for problem in problems:
        print(f"api_pages: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
