"""The deterministic core of the generated data: base graphs, motifs, and the two joined by one edge."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from graph_ood._checks import check_choice, check_count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Ints = NDArray[np.int64]
else:
    Ints = Any

Flavor = Literal["good", "cal"]

FLAVORS = ("good", "cal")

GOOD_BASES = ("wheel", "tree", "ladder", "star", "path")
GOOD_MOTIFS = ("house", "cycle", "crane")
CAL_BASES = ("tree", "ba")
CAL_MOTIFS = ("house", "cycle", "grid", "diamond")

_RING = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 0)]

# Edges and roles; node 0 is the one that is joined to the base.
_MOTIFS: dict[str, dict[str, tuple[list[tuple[int, int]], tuple[int, ...]]]] = {
    "good": {
        "house": ([(1, 2), (2, 3), (3, 4), (4, 1), (0, 1), (0, 4)], (0, 1, 2, 2, 1)),
        "cycle": ([(0, 1), (1, 2), (2, 3), (3, 4), (4, 0)], (0, 1, 2, 2, 1)),
        "crane": ([(1, 2), (2, 3), (3, 4), (4, 1), (0, 1), (0, 3)], (0, 1, 2, 1, 2)),
    },
    "cal": {
        "house": ([(0, 1), (1, 2), (2, 3), (3, 0), (4, 0), (4, 1)], (0, 0, 1, 1, 2)),
        "cycle": (_RING, (0,) * 6),
        "grid": ([(0, 1), (1, 2), (3, 4), (4, 5), (0, 3), (1, 4), (2, 5)], (0,) * 6),
        "diamond": ([*_RING, (5, 1), (4, 2)], (0,) * 6),
    },
}


@dataclass(frozen=True)
class MotifGraph:
    """A base graph with one motif: what `motif_graph` returns.

    Attributes:
        num_nodes: Number of nodes $n$; the base has the first ids, the motif the last five or six.
        edges: Every edge once, as a pair $(i, j)$ with $i<j$, in lexicographic order.
        role: Structural role of every node; see `motif_graph`.
        node_gt: 1 for the nodes of the motif, 0 for those of the base.
    """

    num_nodes: int
    edges: list[tuple[int, int]]
    role: list[int]
    node_gt: list[int]


class Template(NamedTuple):
    """Base and motif before they are joined: edges once each, roles, and the number of nodes of the base."""

    num_nodes: int
    num_base: int
    low: Ints
    high: Ints
    role: tuple[int, ...]

    def joined(self, attach_to: int) -> tuple[Ints, Ints]:
        """Return both ends of every edge, with the edge from `attach_to` to the first node of the motif."""
        return np.append(self.low, attach_to), np.append(self.high, self.num_base)


def motif_graph(
    *,
    base: str,
    motif: str,
    attach_to: int,
    width: int | None = None,
    height: int | None = None,
    branching: int | None = None,
    flavor: Flavor = "good",
) -> MotifGraph:
    r"""Base graph plus one motif, joined by one edge; no random part.

    Flavor `"good"` has the shapes of GOOD-Motif. With width $w$ the bases are: `"wheel"`, a hub and $w-1$ nodes around
    it; `"tree"`, balanced and binary, of height $\max(1,\lfloor\log_2 w\rfloor-1)$; `"ladder"`, $2w$ nodes; `"star"`, a
    centre and $w$ leaves; `"path"`, $w$ nodes. Motifs have five nodes: `"house"`, `"cycle"`, `"crane"`. Roles are 0 in
    wheel, tree and ladder; in a star the leaves and in a path the two ends have role 1. The roles of a motif follow.

    Flavor `"cal"` has those of SYN-b: a balanced tree of `height` and `branching`, and the motifs `"house"` (five
    nodes), `"cycle"`, `"grid"` and `"diamond"` (six each). Its roles are 0 in the base, 1 to 3 in a house and 1 in the
    others. The base `"ba"` of SYN-b is random, so it isn't to be had here.

    Args:
        base: Name of the base.
        motif: Name of the motif.
        attach_to: Node of the base that is joined to the first node of the motif, in [0, nodes of the base).
        width: $w\ge1$; flavor `"good"` only.
        height: Height of the tree, at least 1; flavor `"cal"` only.
        branching: Children of every inner node, at least 1; flavor `"cal"` only.
        flavor: `"good"` or `"cal"`.

    Returns:
        The graph.

    Raises:
        ValueError: If a name is unknown, a size is missing, too small or of the other flavor, or `attach_to` is no node
            of the base.

    Reference: Gui et al., 2022 (GOOD), and Sui et al., 2022 (CAL); shapes as in the authors' code.

    Examples:
        >>> graph = motif_graph(base="path", width=3, motif="cycle", attach_to=2)
        >>> graph.edges
        [(0, 1), (1, 2), (2, 3), (3, 4), (3, 7), (4, 5), (5, 6), (6, 7)]
        >>> graph.role, graph.node_gt
        ([1, 0, 1, 2, 3, 4, 4, 3], [0, 0, 0, 1, 1, 1, 1, 1])
    """
    check_choice("flavor", flavor, FLAVORS)
    if flavor == "good":
        check_choice("base", base, GOOD_BASES)
        check_choice("motif", motif, GOOD_MOTIFS)
        _check_sizes(flavor, {"width": width}, {"height": height, "branching": branching})
        template = good_template(base, width or 1, motif)
    else:
        if base != "tree":
            raise ValueError(f"base must be 'tree' for flavor 'cal', got {base!r}")
        check_choice("motif", motif, CAL_MOTIFS)
        _check_sizes(flavor, {"height": height, "branching": branching}, {"width": width})
        template = cal_tree_template(height or 1, branching or 1, motif)
    check_count("attach_to", attach_to, 0)
    if attach_to >= template.num_base:
        raise ValueError(f"attach_to must be a node of the base, in [0, {template.num_base}), got {attach_to}")
    return _as_graph(template, attach_to)


def _check_sizes(flavor: Flavor, needed: dict[str, int | None], unused: dict[str, int | None]) -> None:
    for name, value in needed.items():
        if value is None:
            raise ValueError(f"{name} is needed for flavor {flavor!r}, got None")
        check_count(name, value)
    for name, value in unused.items():
        if value is not None:
            raise ValueError(f"{name} isn't used by flavor {flavor!r}, leave it out; got {value!r}")


def _as_graph(template: Template, attach_to: int) -> MotifGraph:
    low, high = template.joined(attach_to)
    edges = sorted(zip(np.minimum(low, high).tolist(), np.maximum(low, high).tolist(), strict=True))
    gt = [int(node >= template.num_base) for node in range(template.num_nodes)]
    return MotifGraph(template.num_nodes, edges, list(template.role), gt)


@lru_cache(maxsize=4096)
def good_template(base: str, width: int, motif: str) -> Template:
    """Return the base of this width beside a motif, in the shapes of GOOD-Motif."""
    return _with_motif(*_good_base(base, width), *_MOTIFS["good"][motif])


@lru_cache(maxsize=64)
def cal_tree_template(height: int, branching: int, motif: str) -> Template:
    """Return a balanced tree beside a motif, in the shapes of SYN-b."""
    return cal_template(*_tree(height, branching), motif)


def cal_template(num_base: int, edges: Sequence[tuple[int, int]] | Ints, motif: str) -> Template:
    """Return any base beside a motif of SYN-b."""
    return _with_motif(num_base, edges, (0,) * num_base, *_MOTIFS["cal"][motif])


def _with_motif(
    num_base: int,
    base_edges: Sequence[tuple[int, int]] | Ints,
    base_role: tuple[int, ...],
    motif_edges: list[tuple[int, int]],
    motif_role: tuple[int, ...],
) -> Template:
    shift = max(base_role) + 1
    base = np.asarray(base_edges, dtype=np.int64).reshape(-1, 2)
    edges = np.concatenate([base, np.asarray(motif_edges, dtype=np.int64) + num_base])
    role = (*base_role, *(shift + r for r in motif_role))
    return Template(num_base + len(motif_role), num_base, edges[:, 0], edges[:, 1], role)


def _good_base(base: str, width: int) -> tuple[int, list[tuple[int, int]], tuple[int, ...]]:
    """Return the number of nodes, the edges and the roles of a base."""
    if base == "wheel":
        rim = range(1, width)
        # Two nodes on the rim share one edge, not two; a single one has none.
        around = [(v, v + 1) for v in rim[:-1]] + ([(1, width - 1)] if width > 3 else [])
        return width, [(0, v) for v in rim] + around, (0,) * width
    if base == "tree":
        num_nodes, edges = _tree(max(1, int(math.log2(width)) - 1), 2)
        return num_nodes, edges, (0,) * num_nodes
    if base == "ladder":
        rails = [(side + v, side + v + 1) for side in (0, width) for v in range(width - 1)]
        return 2 * width, rails + [(v, width + v) for v in range(width)], (0,) * (2 * width)
    if base == "star":
        return width + 1, [(0, v) for v in range(1, width + 1)], (0, *(1,) * width)
    ends = {0, width - 1}
    return width, [(v, v + 1) for v in range(width - 1)], tuple(int(v in ends) for v in range(width))


def _tree(height: int, branching: int) -> tuple[int, list[tuple[int, int]]]:
    num_nodes = sum(branching**level for level in range(height + 1))
    return num_nodes, [((v - 1) // branching, v) for v in range(1, num_nodes)]
