"""Shapes of the generated graphs, against networkx."""

from __future__ import annotations

import math

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graph_ood.data import motif_graph

GOOD_BASES = ("wheel", "tree", "ladder", "star", "path")
MOTIF_EDGES = {"house": 6, "cycle": 5, "crane": 6}


def reference(base: str, width: int) -> nx.Graph:
    if base == "tree":
        return nx.balanced_tree(2, max(1, int(math.log2(width)) - 1))
    return {"wheel": nx.wheel_graph, "ladder": nx.ladder_graph, "star": nx.star_graph, "path": nx.path_graph}[base](
        width
    )


def as_networkx(graph) -> nx.Graph:
    out = nx.Graph(graph.edges)
    out.add_nodes_from(range(graph.num_nodes))
    return out


@pytest.mark.parametrize("base", GOOD_BASES)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 11, 31, 32, 75])
def test_bases_are_those_of_networkx(base, width):
    expected = reference(base, width)
    graph = motif_graph(base=base, width=width, motif="crane", attach_to=0)
    found = as_networkx(graph).subgraph(range(graph.num_nodes - 5))
    assert set(found.nodes) == set(expected.nodes)
    assert {frozenset(e) for e in found.edges} == {frozenset(e) for e in expected.edges}


@given(
    base=st.sampled_from(GOOD_BASES),
    motif=st.sampled_from(sorted(MOTIF_EDGES)),
    width=st.integers(1, 80),
    where=st.floats(0, 1, exclude_max=True),
)
@settings(max_examples=60, deadline=None)
def test_graphs_are_connected_simple_and_complete(base, motif, width, where):
    num_base = reference(base, width).number_of_nodes()
    attach_to = int(where * num_base)
    graph = motif_graph(base=base, width=width, motif=motif, attach_to=attach_to)
    assert graph.edges == sorted(set(graph.edges))
    assert all(i < j for i, j in graph.edges)
    assert nx.is_connected(as_networkx(graph))
    assert graph.num_nodes == num_base + 5 == len(graph.role) == len(graph.node_gt)
    assert graph.node_gt == [0] * num_base + [1] * 5
    across = [e for e in graph.edges if graph.node_gt[e[0]] != graph.node_gt[e[1]]]
    assert across == [(attach_to, num_base)]
    assert sum(i >= num_base for i, _ in graph.edges) == MOTIF_EDGES[motif]
    assert min(graph.role[num_base:]) == max(graph.role[:num_base]) + 1


def test_motifs_of_good_are_no_isomorphic_pair():
    graphs = [as_networkx(motif_graph(base="path", width=1, motif=m, attach_to=0)) for m in MOTIF_EDGES]
    assert not any(nx.is_isomorphic(a, b) for i, a in enumerate(graphs) for b in graphs[:i])


def test_grid_and_tree_of_cal_are_those_of_networkx():
    graph = as_networkx(motif_graph(base="tree", height=2, branching=15, motif="grid", attach_to=7, flavor="cal"))
    grid = nx.convert_node_labels_to_integers(nx.grid_graph([3, 2]), first_label=241)
    assert {frozenset(e) for e in graph.subgraph(range(241, 247)).edges} == {frozenset(e) for e in grid.edges}
    tree = nx.balanced_tree(15, 2)
    assert {frozenset(e) for e in graph.subgraph(range(241)).edges} == {frozenset(e) for e in tree.edges}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"flavor": "dir"}, "flavor"),
        ({"base": "grid"}, "base"),
        ({"base": "ladde"}, "did you mean 'ladder'"),
        ({"motif": "diamond"}, "motif"),
        ({"width": None}, "width"),
        ({"width": 0}, "width"),
        ({"width": 2.5}, "width"),
        ({"height": 2}, "height"),
        ({"branching": 2}, "branching"),
        ({"attach_to": 6}, "attach_to"),
        ({"attach_to": -1}, "attach_to"),
    ],
)
def test_bad_arguments_of_flavor_good(change, word):
    with pytest.raises(ValueError, match=word):
        motif_graph(**{"base": "wheel", "width": 6, "motif": "house", "attach_to": 0} | change)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"base": "ba"}, "base"),
        ({"motif": "crane"}, "motif"),
        ({"height": None}, "height"),
        ({"branching": 0}, "branching"),
        ({"width": 5}, "width"),
        ({"attach_to": 4}, "attach_to"),
    ],
)
def test_bad_arguments_of_flavor_cal(change, word):
    good = {"base": "tree", "height": 1, "branching": 3, "motif": "house", "attach_to": 0, "flavor": "cal"}
    with pytest.raises(ValueError, match=word):
        motif_graph(**good | change)
