"""Each adapter against a small stand-in of the function it is for: right passes, wrong fails."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from ballast_testing.golden import GoldenCase, UnhandledFormError, check_case
from ballast_testing.golden_adapters import ADAPTERS, first_seen

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put functions where the adapters look for them."""

    def install(**functions: Any) -> None:
        for dotted, function in functions.items():
            *parents, name = dotted.split("__")
            for i in range(1, len(parents) + 1):
                module = ".".join(parents[:i])
                if not isinstance(sys.modules.get(module), _Fake):
                    monkeypatch.setitem(sys.modules, module, _Fake(module))
            setattr(sys.modules[".".join(parents)], name, function)

    return install


class _Fake(ModuleType):
    pass


def case(function: str, inputs: Any, expected: Any, params: Any = None, name: str = "one", **more: Any) -> GoldenCase:
    package = function.split(".")[0].replace("_", "-")
    return GoldenCase(
        package=package,
        file="f.json",
        name=name,
        function=function,
        inputs=inputs,
        params=params or {},
        expected=expected,
        **more,
    )


def fails(golden: GoldenCase, match: str) -> None:
    with pytest.raises((AssertionError, ValueError), match=match):
        check_case(golden)


# --- ihvp ------------------------------------------------------------------------------------------------------------


def hvp(loss: Any, params: Any, v: Any) -> Any:
    leaf = params.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    return torch.autograd.grad(grad @ v, leaf)[0]


def solve(A: Any, b: Any, *, method: str = "cg", damping: float = 0.0, scale: float = 1.0, **_: Any) -> Any:
    dense = A
    if not isinstance(A, torch.Tensor):
        dense = torch.stack([A(unit) for unit in torch.eye(len(b), dtype=b.dtype)], dim=1)
    dense = dense + damping * (scale if method == "neumann" else 1.0) * torch.eye(len(b), dtype=b.dtype)
    x = torch.linalg.solve(dense, b)
    residual = float((dense @ x - b).norm() / b.norm())
    return SimpleNamespace(x=x, converged=True, negative_curvature=False, diverged=False, relative_residual=residual)


def logistic_case() -> GoldenCase:
    """Closed forms in numpy."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 2)), (rng.random(7) > 0.5).astype(float)
    theta, v, l2, weight = rng.normal(size=2), rng.normal(size=2), 0.1, 1 / 7

    def grad(at: Any, rows: Any) -> Any:
        return weight * x[rows].T @ (1 / (1 + np.exp(-x[rows] @ at)) - y[rows]) + l2 * at

    def hessian(at: Any, rows: Any) -> Any:
        p = 1 / (1 + np.exp(-x[rows] @ at))
        return weight * x[rows].T @ (x[rows] * (p * (1 - p))[:, None]) + l2 * np.eye(2)

    def newton(rows: Any) -> Any:
        at = np.zeros(2)
        for _ in range(50):
            at = at - np.linalg.solve(hessian(at, rows), grad(at, rows))
        return at

    everything = np.arange(7)
    full = newton(everything)
    first = grad(full, everything[:1]) - l2 * full
    expected = {
        "loss": float(weight * np.sum(np.log1p(np.exp(x @ theta)) - y * (x @ theta)) + 0.5 * l2 * theta @ theta),
        "grad": grad(theta, everything).tolist(),
        "hessian": hessian(theta, everything).tolist(),
        "hvp": (hessian(theta, everything) @ v).tolist(),
        "ihvp": np.linalg.solve(hessian(theta, everything), v).tolist(),
        "theta_full": full.tolist(),
        "theta_without_0": newton(everything[1:]).tolist(),
        "influence_delta": np.linalg.solve(hessian(full, everything), first).tolist(),
    }
    inputs = {"X": x.tolist(), "y": y.tolist(), "theta": theta.tolist(), "v": v.tolist()}
    return case("ihvp.hvp.hvp", inputs, expected, {"l2": l2, "reduction": "mean"})


def test_logistic_regression_is_built_from_the_note(stand_in: Any) -> None:
    golden = logistic_case()
    stand_in(ihvp__hvp__hvp=hvp, ihvp__solvers__solve=solve)
    check_case(golden)
    stand_in(ihvp__hvp__hvp=lambda loss, params, v: 0.5 * hvp(loss, params, v))
    fails(golden, "hessian")


def test_solvers(stand_in: Any) -> None:
    matrix, b = [[2.0, 0.0], [0.0, 4.0]], [2.0, 2.0]
    inputs = {"A": matrix, "b": b}
    stand_in(ihvp__solvers__solve=solve)
    check_case(
        case(
            "ihvp.solvers.solve",
            inputs,
            {"x": [1.0, 0.5], "quadratic_value": -1.5, "limit": [1.0, 0.5], "half_factor_bug_limit": [2.0, 1.0]},
            {"method": "direct", "damping": 0.0},
        )
    )
    damped = case(
        "ihvp.solvers.solve",
        inputs,
        {"x": [0.5, 1 / 3], "relative_residual": 0.0, "diverging": False, "limit": [0.5, 1 / 3]},
        {"method": "neumann", "damping": 0.5, "scale": 4.0, "num_iter": 3},
    )
    check_case(damped)
    flags = case("ihvp.solvers.solve", inputs, {"negative_curvature": True}, {"method": "cg", "damping": 0.0})
    fails(flags, "negative_curvature")
    assert "max_iterations_needed" in check_case(
        case(
            "ihvp.solvers.solve",
            inputs,
            {"x": [1.0, 0.5], "converged": True, "max_iterations_needed": 4},
            {"method": "cg", "damping": 0.0},
        )
    )


# --- graphs ----------------------------------------------------------------------------------------------------------


def test_gif_removal_is_chosen_by_the_case_name(stand_in: Any) -> None:
    both = "graph_unlearn.gif.remove_edges / graph_unlearn.gif.remove_nodes"
    stand_in(
        graph_unlearn__gif__remove_edges=lambda edge_index, edges: edge_index[:, edges.shape[1] :],
        graph_unlearn__gif__remove_nodes=lambda edge_index, nodes: edge_index[:, : len(nodes)],
    )
    edges = {"edge_index": [[0, 1, 2], [1, 2, 0]], "edges": [[0], [1]]}
    nodes = {"edge_index": [[0, 1, 2], [1, 2, 0]], "nodes": [2]}
    check_case(case(both, edges, {"edge_index": [[1, 2], [2, 0]]}, name="edges_n3"))
    check_case(case(both, nodes, {"edge_index": [[0], [1]]}, name="nodes_n3"))
    fails(case(both, nodes, {"edge_index": [[0], [1]]}, name="other_n3"), "other_n3")
    fails(case(both, edges, {"edge_index": [[0, 2], [2, 0]]}, name="edges_n3"), "edge_index")


def test_gif_delta_takes_the_losses_from_the_runner(stand_in: Any) -> None:
    """One edge in both directions, one weight: the convolution swaps the two nodes, so twice gives x back."""
    weight, x = np.array([[1.0], [-1.0]]), np.array([[1.0], [2.0]])
    logits = x @ weight.T
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    inputs = {
        "weights": [weight.tolist()],
        "x": x.tolist(),
        "edge_index": [[0, 1], [1, 0]],
        "x_after": x.tolist(),
        "edge_index_after": [[], []],
        "y": [0, 1],
        "train_mask": [True, True],
        "mask_before": [True, False],
        "mask_after": [False, True],
    }
    expected = {
        "loss_train": float(-log_probs[0, 0] - log_probs[1, 1]),
        "loss_before": float(-log_probs[0, 0]),
        "loss_after": float(np.log(2)),
        "rhs": [[[7.0], [7.0]]],
        "delta": [[[1.0], [1.0]]],
        "delta_official_undetached": [[[2.0], [2.0]]],
        "delta_traditional_if_official_start": [[[9.0], [9.0]]],
    }
    golden = case("graph_unlearn.gif.gif_delta", inputs, expected, {"model": "sgc", "scale": 2.0})

    def gif_delta(weights: list[Any], *_: Any, detach_rhs: bool = True, **__: Any) -> list[Any]:
        return [torch.full_like(w, 1.0 if detach_rhs else 2.0) for w in weights]

    def gif_rhs(forward: Any, params: list[Any], data: Any, *_: Any) -> list[Any]:
        assert forward(params, data.x, data.edge_index).shape == (2, 2)
        return [torch.full_like(w, 7.0) for w in params]

    stand_in(graph_unlearn__gif__gif_delta=gif_delta, graph_unlearn__gif__gif_rhs=gif_rhs)
    assert list(check_case(golden)) == ["delta_traditional_if_official_start"]
    stand_in(graph_unlearn__gif__gif_delta=lambda weights, **_: [0.9 * torch.ones_like(w) for w in weights])
    fails(golden, "delta")


def test_cluster_labels_are_compared_up_to_renaming(stand_in: Any) -> None:
    assert first_seen(torch.tensor([5, 5, 2, 7, 2])) == [0, 0, 1, 2, 1]

    class RCC:
        def __init__(self, k: int, metric: str) -> None:
            self.edges_ = torch.tensor([[0, 1]])
            self.edge_weights_ = torch.ones(1)
            self.num_clusters_, self.representatives_ = k, torch.zeros(3, 1)
            self.metric = metric

        def fit(self, x: Any) -> Any:
            self.labels_ = torch.tensor([4, 4, 1]) + 0 * len(x)
            return self

    expected = {"labels": [0, 0, 1], "num_clusters": 2, "edges": [[0, 1]], "ami_with_truth": 0.3}
    inputs, params = {"x": [[0.0], [1.0], [2.0]]}, {"k": 2, "metric": "euclidean"}
    stand_in(graph_ood__rcc__RCC=RCC)
    check_case(case("graph_ood.rcc.RCC.fit", inputs, expected, params))
    fails(case("graph_ood.rcc.RCC.fit", inputs, {**expected, "labels": [0, 1, 1]}, params), "labels")


def test_motif_graph_is_described_by_its_last_edges(stand_in: Any) -> None:
    graph = SimpleNamespace(
        num_nodes=3, edges=[(0, 1), (0, 2), (1, 2)], role=[0, 1, 1], node_gt=torch.tensor([0, 1, 1])
    )
    stand_in(graph_ood__data__motif_graph=lambda base: graph)
    good = {"num_nodes": 3, "num_edges": 3, "last_edges": [[0, 2], [1, 2]], "role": [0, 1, 1], "node_gt": [0, 1, 1]}
    check_case(case("graph_ood.data.motif_graph", {}, good, {"base": "tree"}))
    fails(case("graph_ood.data.motif_graph", {}, {**good, "num_edges": 4}, {"base": "tree"}), "num_edges")
    fails(case("graph_ood.data.motif_graph", {}, {"last_edges": [[0, 1]]}, {"base": "tree"}), "last_edges")


def test_mask_regularizer_has_two_parts(stand_in: Any) -> None:
    def regularizer(mask: Any, *, count_term: bool = True) -> Any:
        return mask.sum() + (0.5 if count_term else 0.0)

    stand_in(graph_ood__aia__mask_regularizer=regularizer)
    expected = {"loss": 3.5, "loss_ratio": 3.0, "loss_nonzero": 0.5, "grad_mask": [1.0, 1.0]}
    check_case(case("graph_ood.aia.mask_regularizer", {"mask": [1.0, 2.0]}, expected))
    fails(case("graph_ood.aia.mask_regularizer", {"mask": [1.0, 2.0]}, {**expected, "loss_ratio": 3.1}), "loss_ratio")


# --- language models -------------------------------------------------------------------------------------------------


def test_sid_trie(stand_in: Any) -> None:
    class SidTrie:
        def __init__(self, sequences: list[list[int]], eos_token_id: int) -> None:
            self.sequences, self.eos = sequences, eos_token_id

        def allowed_next(self, prefix: list[int]) -> set[int]:
            n = len(prefix)
            return {s[n] if len(s) > n else self.eos for s in self.sequences if s[:n] == prefix}

    stand_in(llm_rec__minionerec__SidTrie=SidTrie)
    inputs, params = {"sequences": [[1, 2], [1, 3]]}, {"eos_token_id": 9}
    expected = {"prefixes": [[], [1], [1, 2]], "allowed": [[1], [2, 3], [9]]}
    check_case(case("llm_rec.minionerec.SidTrie", inputs, expected, params))
    expected["allowed"][1] = [2]
    fails(case("llm_rec.minionerec.SidTrie", inputs, expected, params), "allowed")


def test_tokens_outside_the_trie_must_be_impossible(stand_in: Any) -> None:
    def constrained(scores: Any, allowed: list[list[int]]) -> Any:
        out = torch.full_like(scores, float("-inf"))
        for i, tokens in enumerate(allowed):
            out[i, tokens] = scores.log_softmax(-1)[i, tokens]
        return out

    scores = [[0.0, 0.0], [0.0, 0.0]]
    golden = case(
        "llm_rec.minionerec.constrained_log_probs",
        {"scores": scores, "allowed": [[0, 1], [1]]},
        {"allowed_scores": [[-np.log(2), -np.log(2)], [-np.log(2)]]},
    )
    stand_in(llm_rec__minionerec__constrained_log_probs=constrained)
    check_case(golden)
    stand_in(llm_rec__minionerec__constrained_log_probs=lambda scores, allowed: scores.log_softmax(-1))
    fails(golden, "isn't allowed")


def test_sasrec_is_loaded_from_the_state_dict(stand_in: Any) -> None:
    class SASRec(torch.nn.Module):
        def __init__(self, hidden_size: int) -> None:
            super().__init__()
            self.item_embeddings = torch.nn.Embedding(3, hidden_size)
            self.dropout = torch.nn.Dropout(0.9)

        def representation(self, sequences: Any, lengths: Any) -> Any:
            del lengths
            return self.dropout(self.item_embeddings(sequences).sum(1))

        def forward(self, sequences: Any, lengths: Any) -> Any:
            return self.representation(sequences, lengths) @ self.item_embeddings.weight.T

    stand_in(llm_rec__ilora__SASRec=SASRec)
    table = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    inputs = {"sequences": [[0, 1]], "lengths": [2], "state_dict": {"item_embeddings.weight": table}}
    expected = {"representation": [[1.0, 1.0]], "scores": [[1.0, 1.0, 2.0]]}
    check_case(case("llm_rec.ilora.SASRec", inputs, expected, {"hidden_size": 2}))
    inputs["state_dict"] = {"other.weight": table}
    with pytest.raises(RuntimeError, match=r"other\.weight"):
        check_case(case("llm_rec.ilora.SASRec", inputs, expected, {"hidden_size": 2}))


def test_packed_codes_are_bytes(stand_in: Any) -> None:
    stand_in(llm_rec__minionerec__unpack_codes=lambda codes: (codes.long() + 0 * (codes.dtype == torch.uint8)).numpy())
    check_case(case("llm_rec.minionerec.unpack_codes", {"codes": [[255]]}, {"output": [[255]]}))

    def strict(codes: Any) -> Any:
        assert codes.dtype == torch.uint8
        return codes.numpy()

    stand_in(llm_rec__minionerec__unpack_codes=strict)
    check_case(case("llm_rec.minionerec.unpack_codes", {"codes": [[255]]}, {"output": [[255]]}))


def test_upstream_over_a_tuple_and_a_list_of_codebooks(stand_in: Any) -> None:
    def residual_quantize(x: Any, codebooks: list[Any]) -> Any:
        assert isinstance(codebooks, list)
        return x * codebooks[0].sum(), (x * x).sum(), torch.tensor([0])

    stand_in(llm_rec__minionerec__residual_quantize=residual_quantize)
    expected = {
        "x_q": [3.0, 6.0],
        "loss": 5.0,
        "codes": [0],
        "grad_x": [3.0 + 2.0, 3.0 + 4.0],
        "grad_codebooks": [[[3.0, 3.0]], [[0.0, 0.0]]],
    }
    inputs = {"x": [1.0, 2.0], "codebooks": [[[1.0, 2.0]], [[0.0, 1.0]]]}
    cotangents = {"x_q": [1.0, 1.0], "loss": 1.0}
    name = "llm_rec.minionerec.residual_quantize"
    check_case(case(name, inputs, expected, cotangents=cotangents))
    fails(case(name, inputs, {**expected, "grad_x": [3.0, 3.0]}, cotangents=cotangents), "grad_x")


def test_gradients_of_the_mean_of_the_losses(stand_in: Any) -> None:
    stand_in(mllm__adavip__adavip_loss=lambda a: (a * a, a, -a))
    expected = {"losses": [1.0, 4.0], "text_margin": [1.0, 2.0], "image_margin": [-1.0, -2.0], "grad_a": [1.0, 2.0]}
    check_case(case("mllm.adavip.adavip_loss", {"a": [1.0, 2.0]}, expected))
    fails(case("mllm.adavip.adavip_loss", {"a": [1.0, 2.0]}, {**expected, "grad_a": [2.0, 4.0]}), "grad_a")


# --- the rest --------------------------------------------------------------------------------------------------------


def test_selected_indices_are_a_set(stand_in: Any) -> None:
    stand_in(pref_opt__alignment_potential__select_top=lambda m: torch.tensor([3, 1]))
    name = "pref_opt.alignment_potential.select_top"
    check_case(case(name, {"m": [0.0]}, {"indices_sorted": [1, 3]}))
    fails(case(name, {"m": [0.0]}, {"indices_sorted": [1, 2]}), "indices_sorted")


def test_dsl_trajectory(stand_in: Any) -> None:
    class DSLController:
        def __init__(self, module: Any, optimizer: Any, *, masks: dict[str, Any], total_steps: int) -> None:
            self.module, self.optimizer, self.masks = module, optimizer, masks
            assert total_steps == 5

        def step(self) -> None:
            self.optimizer.step()
            with torch.no_grad():
                self.module.weight.mul_(self.masks["weight"])

        def explored_fraction(self) -> float:
            return 0.5

    stand_in(recsys_losses__dsl__DSLController=DSLController)
    inputs = {"weight": [1.0, 1.0], "mask": [1.0, 0.0], "target": [0.0, 0.0], "curvature": [1.0, 1.0]}
    params = {"optimizer": "SGD", "lr": 0.5, "steps": 2, "total_steps": 5}
    expected = {"weight": [0.25, 0.0], "mask": [1.0, 0.0], "num_nonzero": [1, 1], "explored_fraction": 0.5}
    check_case(case("recsys_losses.dsl.DSLController", inputs, expected, params))
    fails(case("recsys_losses.dsl.DSLController", inputs, {**expected, "weight": [0.2, 0.0]}, params), "weight")


def test_soft_target_from_the_gradient(stand_in: Any) -> None:
    def ulc_loss(logits: Any, target: Any, *, reduction: str = "mean") -> Any:
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction=reduction)

    stand_in(recsys_losses__if_dfm__ulc_loss=ulc_loss)
    inputs = {"logits": [0.0, 0.0], "target": [0.25, 1.0]}
    expected = {"loss": float(np.log(2)), "grad_logits": [0.125, -0.25], "target": [0.25, 1.0]}
    golden = case("recsys_losses.if_dfm.ulc_loss", inputs, expected)
    check_case(golden)
    fails(case("recsys_losses.if_dfm.ulc_loss", inputs, {**expected, "target": [0.5, 1.0]}), "target")


def test_views_shared_or_per_layer(stand_in: Any) -> None:
    def sgl_loss(view1_edge_index: Any, view2_edge_index: Any) -> Any:
        per_layer = isinstance(view1_edge_index, list) and all(view.shape[0] == 2 for view in view1_edge_index)
        assert isinstance(view2_edge_index, torch.Tensor)
        return torch.tensor(float(per_layer))

    stand_in(recsys_losses__sgl__sgl_loss=sgl_loss)
    shared, layer = [[0], [1]], [[0], [1]]
    for view, found in ((shared, 0.0), ([layer, layer], 1.0), ([layer, [[0, 1], [1, 0]]], 1.0)):
        inputs = {"view1_edge_index": view, "view2_edge_index": shared}
        check_case(case("recsys_losses.sgl.sgl_loss", inputs, {"loss": found}))


def test_metrics_on_request(stand_in: Any) -> None:
    def loss(logps: Any, *, return_metrics: bool = False) -> Any:
        return (logps.sum(), {"clip_fraction": torch.tensor(0.25)}) if return_metrics else logps.sum()

    stand_in(rlvr__losses__policy_gradient_loss=loss)
    name = "rlvr.losses.policy_gradient_loss"
    check_case(case(name, {"logps": [1.0]}, {"loss": 1.0, "grad_logps": [1.0], "clip_fraction": 0.25}))
    check_case(case(name, {"logps": [1.0]}, {"loss": 1.0, "grad_logps": [1.0]}))
    fails(case(name, {"logps": [1.0]}, {"loss": 1.0, "clip_fraction": 0.5}), "clip_fraction")


def test_values_shown_multiplied_by_the_mask(stand_in: Any) -> None:
    stand_in(rlvr__advantages__reinforce_pp_advantages=lambda rewards, mask: (rewards * mask, rewards))
    inputs = {"rewards": [1.0, 2.0], "mask": [1.0, 0.0]}
    check_case(
        case("rlvr.advantages.reinforce_pp_advantages", inputs, {"advantages": [1.0, 0.0], "returns": [1.0, 0.0]})
    )
    stand_in(rlvr__direction__reweight_advantages=lambda advantages, mask: advantages + 0 * mask)
    inputs = {"advantages": [1.0, 2.0], "mask": [1.0, 0.0]}
    check_case(case("rlvr.direction.reweight_advantages", inputs, {"advantages": [1.0, 0.0]}))


def test_null_is_nan_where_the_note_says_so(stand_in: Any) -> None:
    stand_in(rlvr__coca__calibration_metrics=lambda correct: {"auroc": float("nan") if correct[0] else 0.5})
    check_case(case("rlvr.coca.calibration_metrics", {"correct": [1.0]}, {"auroc": None}))
    fails(case("rlvr.coca.calibration_metrics", {"correct": [0.0]}, {"auroc": None}), "expected NaN")
    stand_in(rlvr__mugglemath__extract_answer=lambda text: {"answer": float("nan")})
    fails(case("rlvr.mugglemath.extract_answer", {"text": ""}, {"answer": None}), "answer")


def test_kl_gradient_is_of_the_sum(stand_in: Any) -> None:
    stand_in(rlvr__losses__kl_estimate=lambda logps: logps.square())
    check_case(case("rlvr.losses.kl_estimate", {"logps": [1.0, 2.0]}, {"kl": [1.0, 4.0], "grad_logps": [2.0, 4.0]}))


def test_sepseq_knows_no_torch(stand_in: Any) -> None:
    def insert(values: Any, *, segment_len: int) -> str:
        assert type(values) is list
        return f"{values} {segment_len}"

    stand_in(seqnum_sepseq__insert_separators=insert)
    text = case("seqnum_sepseq.insert_separators", {"values": [1, 2.5]}, {"text": "[1, 2.5] 3"}, {"segment_len": 3})
    check_case(text)
    summary = "seqnum_sepseq.diagnostics.attention_summary"
    stand_in(seqnum_sepseq__diagnostics__attention_summary=lambda attention: {"kind": type(attention).__name__})
    check_case(case(summary, {"attention": [[1.0]]}, {"kind": "ndarray"}))


def test_a_returned_tuple_of_another_length_is_not_guessed(stand_in: Any) -> None:
    stand_in(pref_opt__stats__update_gap_stats=lambda gap: (gap.mean(), gap.std(), 3))
    with pytest.raises(UnhandledFormError, match="a tuple of 3"):
        check_case(case("pref_opt.stats.update_gap_stats", {"gap": [1.0, 2.0]}, {"mean": 1.5, "std": 0.5}))


def test_every_adapter_names_a_function_of_its_package() -> None:
    for name in ADAPTERS:
        for part in name.split(" / "):
            assert all(piece.isidentifier() for piece in part.split(".")), part
