"""Masks as explanations, their agreement with the true motif, and the picture."""

from __future__ import annotations

import builtins
import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric.data import Batch, Data
from torch_geometric.explain import Explanation

from graph_ood.data import GoodMotif
from graph_ood.explain import _COLORS, _INK, draw_split, explanations, graph_layout, mask_auc


def _batch(count: int = 3) -> Batch:
    return Batch.from_data_list([GoodMotif(split="train", num_data=30)[i] for i in range(count)])


def _perfect(batch: Data) -> dict[str, torch.Tensor]:
    return {"node_mask": batch.node_gt.float(), "edge_mask": batch.edge_gt.float()}


# --- explanations -------------------------------------------------------------------------------------------------


def test_masks_go_to_their_graphs():
    batch = _batch()
    node, edge = torch.rand(batch.num_nodes, requires_grad=True), torch.rand(batch.num_edges)
    found = explanations(batch, node_mask=node, edge_mask=edge)
    assert [type(explanation) for explanation in found] == [Explanation] * 3
    assert torch.equal(torch.cat([e.node_mask[:, 0] for e in found]), node.detach())
    assert torch.equal(torch.cat([e.edge_mask for e in found]), edge)
    for explanation, graph in zip(found, batch.to_data_list(), strict=True):
        assert torch.equal(explanation.edge_index, graph.edge_index)
        assert torch.equal(explanation.node_gt, graph.node_gt)
        assert explanation.validate()
        assert not explanation.node_mask.requires_grad


def test_one_mask_of_one_graph_is_enough():
    graph = _batch(1).to_data_list()[0]
    (found,) = explanations(graph, edge_mask=torch.rand(graph.num_edges))
    assert "node_mask" not in found
    assert found.get_explanation_subgraph().num_edges == graph.num_edges


def test_the_batch_is_left_alone():
    batch = _batch()
    keys = sorted(batch.keys())
    explanations(batch, **_perfect(batch))
    assert sorted(batch.keys()) == keys


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({}, "got neither"),
        ({"node_mask": torch.rand(3)}, r"node_mask must be a float tensor \(\d+,\), got torch.float32 \(3,\)"),
        ({"edge_mask": torch.rand(3, 1)}, r"edge_mask must be a float tensor \(\d+,\), got torch.float32 \(3, 1\)"),
    ],
)
def test_bad_masks(masks, message):
    with pytest.raises(ValueError, match=message):
        explanations(_batch(), **masks)


def test_boolean_masks_are_refused():
    batch = _batch()
    with pytest.raises(ValueError, match=r"node_mask must be a float tensor .* got torch.bool"):
        explanations(batch, node_mask=batch.node_gt)


# --- AUC ----------------------------------------------------------------------------------------------------------

MASK = torch.tensor([0.9, 0.1, 0.5, 0.5, 0.3])
TRUTH = torch.tensor([True, False, True, False, False])


def test_auc_is_the_share_of_pairs_in_the_right_order():
    pairs = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a in MASK[TRUTH].tolist()
        for b in MASK[~TRUTH].tolist()
    ]  # fmt: skip
    assert mask_auc(MASK, TRUTH) == pytest.approx(sum(pairs) / len(pairs))


@given(scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
@settings(derandomize=True, deadline=None, max_examples=30)
def test_auc_sees_the_order_alone(scale, shift):
    assert mask_auc(scale * MASK.double() + shift, TRUTH) == pytest.approx(mask_auc(MASK, TRUTH))
    assert mask_auc(-scale * MASK, TRUTH) == pytest.approx(1 - mask_auc(MASK, TRUTH))


def test_auc_of_the_truth_and_of_a_constant():
    batch = _batch()
    assert mask_auc(batch.node_gt.float(), batch.node_gt) == 1.0
    assert mask_auc(1 - batch.edge_gt.float(), batch.edge_gt) == 0.0
    assert mask_auc(torch.full((batch.num_nodes,), 0.5), batch.node_gt) == 0.5


def test_auc_per_graph_compares_within_graphs_only():
    # Right within both graphs, but one has higher scores throughout. The third has no motif and doesn't count.
    mask = torch.tensor([0.2, 0.9, 0.1, 0.8, 0.5])
    truth = torch.tensor([True, True, False, False, False])
    index = torch.tensor([0, 1, 0, 1, 2])
    assert mask_auc(mask, truth, index) == 1.0
    assert mask_auc(mask, truth) < 1.0


def test_auc_per_graph_is_the_mean():
    batch = _batch()
    mask = torch.rand(batch.num_nodes, generator=torch.Generator().manual_seed(0))
    single = [mask_auc(e.node_mask[:, 0], e.node_gt) for e in explanations(batch, node_mask=mask)]
    assert mask_auc(mask, batch.node_gt, batch.batch) == pytest.approx(sum(single) / 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((MASK, torch.ones(5, dtype=torch.bool)), "one of the two classes is missing"),
        ((MASK, torch.zeros(5, dtype=torch.bool)), "one of the two classes is missing"),
        ((MASK, TRUTH, torch.arange(5)), "one of the two classes is missing"),
        ((MASK[:0], TRUTH[:0]), "one of the two classes is missing"),
        ((MASK, TRUTH[:3]), r"got \(5,\) and torch.bool \(3,\)"),
        ((MASK, TRUTH.long()), "bool truth"),
        ((MASK.where(TRUTH, math.nan), TRUTH), "got NaN"),
        ((MASK, TRUTH, torch.zeros(3, dtype=torch.int64)), r"graph_index \(5,\), got \(3,\)"),
    ],
)
def test_bad_arguments_of_auc(arguments, message):
    with pytest.raises(ValueError, match=message):
        mask_auc(*arguments)


# --- layout -------------------------------------------------------------------------------------------------------


def _stress(xy: np.ndarray, distance: np.ndarray) -> float:
    gap = np.sqrt(np.square(xy[:, None] - xy[None]).sum(-1))
    upper = np.triu_indices(len(xy), 1)
    return float((((gap - distance) / distance)[upper] ** 2).mean())


def test_a_path_becomes_a_line():
    path = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]])
    xy = graph_layout(path, 5, iterations=2000)
    distance = np.abs(np.subtract.outer(np.arange(5), np.arange(5)))
    gap = np.sqrt(np.square(xy[:, None] - xy[None]).sum(-1))
    np.testing.assert_allclose(gap, distance, atol=0.02)


def test_the_layout_repeats_and_improves_on_its_start():
    graph = _batch(1).to_data_list()[0]
    import networkx as nx

    lengths = dict(nx.all_pairs_shortest_path_length(nx.Graph(graph.edge_index.T.tolist())))
    n = graph.num_nodes
    distance = np.array([[lengths[i][j] for j in range(n)] for i in range(n)], float)
    xy = graph_layout(graph.edge_index, n)
    assert np.array_equal(xy, graph_layout(graph.edge_index, n))
    start = graph_layout(graph.edge_index, n, iterations=0)
    np.fill_diagonal(distance, 1.0)
    assert _stress(xy, distance) < 0.2 * _stress(start, distance)
    assert np.isfinite(xy).all()


def test_unconnected_parts_and_single_nodes_have_a_place():
    xy = graph_layout(torch.tensor([[0, 2], [1, 3]]), 5)
    gap = np.sqrt(np.square(xy[:, None] - xy[None]).sum(-1))[np.triu_indices(5, 1)]
    assert gap.min() > 0.3
    assert graph_layout(torch.zeros(2, 0, dtype=torch.int64), 1).tolist() == [[0.0, 0.0]]
    assert np.isfinite(graph_layout(torch.zeros(2, 0, dtype=torch.int64), 3)).all()


@pytest.mark.parametrize(
    ("edges", "nodes", "message"),
    [
        (torch.zeros(3, 2, dtype=torch.int64), 2, r"edge_index must have shape \(2, m\), got \(3, 2\)"),
        (torch.tensor([[0], [5]]), 3, r"edge_index must name nodes in \[0, 3\), got 0 to 5"),
        (torch.zeros(2, 0, dtype=torch.int64), 0, r"num_nodes must be an integer >= 1, got 0"),
    ],
)
def test_bad_layouts(edges, nodes, message):
    with pytest.raises(ValueError, match=message):
        graph_layout(edges, nodes)


# --- picture ------------------------------------------------------------------------------------------------------


def _luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_all_colours_are_readable_on_white_and_on_a_dark_page():
    # 3:1 is what WCAG 2.1 asks of graphics.
    for color in (*_COLORS, _INK):
        assert 1.05 / (_luminance(color) + 0.05) >= 3, color
        assert (_luminance(color) + 0.05) / (_luminance("#1e2129") + 0.05) >= 2.9, color


def test_svg_is_the_same_bytes_every_time_and_has_no_date(tmp_path):
    batch = _batch()
    found = explanations(batch, **_perfect(batch))
    files = [draw_split(found, tmp_path / name, titles=["one", "two", "three"]) for name in ("a.svg", "b.svg")]
    first, second = (file.read_bytes() for file in files)
    assert first == second
    assert b"<dc:date>" not in first
    ET.fromstring(first)  # noqa: S314  # our own file
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.svg", "b.svg"]


def test_png_is_transparent_and_repeats(tmp_path):
    from matplotlib.image import imread

    (found,) = explanations(_batch(1), **_perfect(_batch(1)))
    first, second = (draw_split(found, tmp_path / "deep" / name) for name in ("a.png", "b.png"))
    assert first.read_bytes() == second.read_bytes()
    picture = imread(first)
    assert picture[0, 0, 3] == 0
    assert picture[..., 3].max() == 1


def _paint(file) -> str:
    return file.read_text()


def test_causal_and_trivial_have_their_colours_and_the_motif_its_rings(tmp_path):
    batch = _batch(1)
    perfect = explanations(batch, **_perfect(batch))
    text = _paint(draw_split(perfect, tmp_path / "perfect.svg"))
    causal, trivial = int(batch.node_gt.sum()), int((~batch.node_gt).sum())
    # one use of a marker per node, and one more in the legend
    assert text.count(f"fill: {_COLORS[2]}") == causal + 1
    assert text.count(f"fill: {_COLORS[0]}") == trivial + 1
    assert text.count(f"stroke: {_COLORS[2]}") == int(batch.edge_gt.sum()) // 2
    # bands of edges and rings of nodes; the ring of the legend is written twice
    marks = int(batch.edge_gt.sum()) // 2 + causal + 2
    assert text.count(f"stroke: {_INK}") == marks
    without = [Explanation(**{k: v for k, v in e.to_dict().items() if not k.endswith("_gt")}) for e in perfect]
    assert f"stroke: {_INK}" not in _paint(draw_split(without, tmp_path / "plain.svg"))


def test_nodes_are_grey_without_a_mask_and_without_differences(tmp_path):
    batch = _batch(1)
    grey = [int(_COLORS[1][i : i + 2], 16) for i in (1, 3, 5)]
    for name, masks in {
        "edges": {"edge_mask": torch.rand(batch.num_edges)},
        "flat": {"node_mask": torch.full((batch.num_nodes,), 0.5)},
    }.items():
        text = _paint(draw_split(explanations(batch, **masks), tmp_path / f"{name}.svg"))
        painted = [[int(c[i : i + 2], 16) for i in (0, 2, 4)] for c in re.findall(r"<use [^>]*fill: #(\w{6})", text)]
        near = [color for color in painted if all(abs(c - g) <= 2 for c, g in zip(color, grey, strict=True))]
        assert len(near) == batch.num_nodes


def test_a_graph_without_edges_can_be_drawn(tmp_path):
    graph = Data(x=torch.ones(2, 1), edge_index=torch.zeros(2, 0, dtype=torch.int64))
    assert draw_split(explanations(graph, node_mask=torch.rand(2)), tmp_path / "a.svg").stat().st_size > 0


def test_a_crash_leaves_the_old_picture(tmp_path, monkeypatch):
    (found,) = explanations(_batch(1), **_perfect(_batch(1)))
    file = draw_split(found, tmp_path / "a.svg")
    before = file.read_bytes()

    def fail(self, target, **_):
        target.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        draw_split(found, file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_matplotlib_is_named_where_it_is_missing(tmp_path, monkeypatch):
    (found,) = explanations(_batch(1), **_perfect(_batch(1)))
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match="draw_split needs matplotlib"):
        draw_split(found, tmp_path / "a.svg")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.pdf", {}, r"path must end with .svg or .png, got '.*a.pdf'"),
        ("a.svg", {"titles": ["x", "y"]}, "expected 1 titles, got 2"),
        ("a.svg", {"columns": 0}, "columns must be an integer >= 1, got 0"),
    ],
)
def test_bad_pictures(tmp_path, name, options, message):
    (found,) = explanations(_batch(1), **_perfect(_batch(1)))
    with pytest.raises(ValueError, match=message):
        draw_split(found, tmp_path / name, **options)
    with pytest.raises(ValueError, match="at least one explanation"):
        draw_split([], tmp_path / "a.svg")
    assert not list(tmp_path.iterdir())
