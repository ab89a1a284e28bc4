"""What the golden runner knows about single functions: names of tuple elements, procedures, canonical forms.

The general rules are in `ballast_testing.golden`. A function has an entry here only if its golden file's note, or the
method card it belongs to, describes something the general rules can't see. Every entry says which sentence it follows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ballast_testing.golden import GoldenCase

    Resolve = Callable[[str], Any]
    Arguments = dict[str, Any]
    Outputs = dict[str, Any]


@dataclass(frozen=True)
class Adapter:
    """The deviations of one function from the general rules.

    Attributes:
        names: Names of the elements of the returned tuple.
        arguments: Changes the converted arguments before the call; gets the arguments and the case.
        finish: Derives outputs that are expected but not returned; gets the case, the outputs and the arguments.
        gradient_of: The scalar whose gradients are expected; gets the outputs.
        canonical: Per expected key, a map applied to both sides before they are compared.
        want: Per input, how its lists are passed, instead of what the signature says ("python", "array", ...).
        null_is_nan: An expected null means NaN.
        reference_only: Expected keys that are not compared, with the reason.
        run: A procedure in place of the one call; returns the outputs by expected key.
    """

    names: tuple[str, ...] = ()
    arguments: Callable[[Arguments, GoldenCase], Arguments] | None = None
    finish: Callable[[GoldenCase, Outputs, Arguments, Resolve], Outputs] | None = None
    gradient_of: Callable[[Outputs], Any] | None = None
    canonical: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    want: Mapping[str, str] = field(default_factory=dict)
    null_is_nan: bool = False
    reference_only: Mapping[str, str] = field(default_factory=dict)
    run: Callable[[GoldenCase, Arguments, Resolve], Outputs] | None = None


def adapter_for(function: str) -> Adapter:
    """Return the entry of a function, or one that changes nothing."""
    return ADAPTERS.get(function, _NONE)


def as_list(value: Any) -> Any:
    """Return nested Python lists for a tensor, an array or a sequence."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [as_list(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def first_seen(labels: Any) -> list[int]:
    """Rename cluster labels by order of first appearance, so that equal partitions are equal lists."""
    number: dict[Any, int] = {}
    return [number.setdefault(label, len(number)) for label in as_list(labels)]


def sorted_list(values: Any) -> list[Any]:
    """Return the elements in order, for results that are sets."""
    return sorted(as_list(values))


# --- graph-ood -------------------------------------------------------------------------------------------------------


def _mask_regularizer(case: GoldenCase, outputs: Outputs, arguments: Arguments, resolve: Resolve) -> Outputs:
    """The two parts add up to the loss; `count_term=False` leaves the second one out (aia card, section 9)."""
    if "loss_ratio" not in case.expected and "loss_nonzero" not in case.expected:
        return outputs
    ratio = resolve(case.function)(**{**arguments, "count_term": False})
    return {**outputs, "loss_ratio": ratio, "loss_nonzero": outputs["loss"] - ratio}


def _rcc_fit(case: GoldenCase, arguments: Arguments, resolve: Resolve) -> Outputs:
    """`RCC(**params).fit(**inputs)`, scikit-learn style attributes (asrc card, section 9)."""
    fitted = resolve("graph_ood.rcc.RCC")(**case.params).fit(**{name: arguments[name] for name in case.inputs})
    keys = ("edges", "edge_weights", "labels", "num_clusters", "representatives")
    return {key: getattr(fitted, f"{key}_") for key in keys}


def _motif_graph(case: GoldenCase, outputs: Outputs, arguments: Arguments, resolve: Resolve) -> Outputs:
    """The large graphs are described by the number of edges and the last few of them."""
    del arguments, resolve
    graph = outputs["output"]
    out = {key: getattr(graph, key) for key in ("num_nodes", "edges", "role", "node_gt")}
    edges = as_list(out["edges"])
    last = case.expected.get("last_edges", [])
    return {**out, "num_edges": len(edges), "last_edges": edges[len(edges) - len(last) :]}


# --- graph-unlearn ---------------------------------------------------------------------------------------------------


def _gif_removal(case: GoldenCase, arguments: Arguments, resolve: Resolve) -> Outputs:
    """Cases named edges_* call remove_edges, cases named nodes_* call remove_nodes."""
    for prefix, function in (("edges_", "remove_edges"), ("nodes_", "remove_nodes")):
        if case.name.startswith(prefix):
            return {"edge_index": resolve(f"graph_unlearn.gif.{function}")(**arguments)}
    raise ValueError(f"case name {case.name!r} starts with neither 'edges_' nor 'nodes_'")


def _gif_delta(case: GoldenCase, arguments: Arguments, resolve: Resolve) -> Outputs:
    """The update from `gif_delta`, its right-hand side from `gif_rhs`, the three losses from the forward written here."""
    import torch

    a, model = arguments, case.params["model"]

    def forward(params: Any, x: Any, edge_index: Any) -> Any:
        return torch.log_softmax(_two_layers(model, list(params), x, edge_index), dim=-1)

    def loss(x: Any, edge_index: Any, mask: Any) -> Any:
        log_probs = forward(a["weights"], x, edge_index)
        return torch.nn.functional.nll_loss(log_probs[mask], a["y"][mask], reduction="sum")

    gif_delta = resolve("graph_unlearn.gif.gif_delta")
    out: Outputs = {
        "loss_train": loss(a["x"], a["edge_index"], a["train_mask"]),
        "loss_before": loss(a["x"], a["edge_index"], a["mask_before"]),
        "loss_after": loss(a["x_after"], a["edge_index_after"], a["mask_after"]),
        "delta": gif_delta(**a),
    }
    if "delta_official_undetached" in case.expected:
        out["delta_official_undetached"] = gif_delta(**{**a, "detach_rhs": False})
    if "rhs" in case.expected:
        before = SimpleNamespace(x=a["x"], edge_index=a["edge_index"], y=a["y"], train_mask=a["train_mask"])
        after = SimpleNamespace(x=a["x_after"], edge_index=a["edge_index_after"], y=a["y"], train_mask=a["train_mask"])
        weights = [weight.detach().requires_grad_() for weight in a["weights"]]
        gif_rhs = resolve("graph_unlearn.gif.gif_rhs")
        out["rhs"] = gif_rhs(forward, weights, before, after, a["mask_before"], a["mask_after"])
    return out


def _two_layers(model: str, weights: list[Any], x: Any, edge_index: Any) -> Any:
    """Two layers without self loops and bias, as the generator's networks (checked against the vectors to 1e-14)."""
    import torch

    source, target = edge_index
    degree = torch.zeros(x.shape[0], dtype=x.dtype).index_add(0, target, torch.ones(len(target), dtype=x.dtype))
    scale = torch.where(degree > 0, degree.clamp(min=1).rsqrt(), torch.zeros_like(degree))
    norm = (scale[source] * scale[target]).unsqueeze(1)

    def propagate(h: Any) -> Any:
        return torch.zeros_like(h).index_add(0, target, h[source] * norm)

    if model == "gcn":
        return propagate(torch.relu(propagate(x @ weights[0].T)) @ weights[1].T)
    if model == "sgc":
        h = propagate(propagate(x))
        for weight in weights:
            h = h @ weight.T
        return h
    raise ValueError(f"model must be 'gcn' or 'sgc', got {model!r}")


# --- ihvp ------------------------------------------------------------------------------------------------------------


def _solve(case: GoldenCase, arguments: Arguments, resolve: Resolve) -> Outputs:
    """`solve` on a dense operator; what is not a field of its result follows from the definitions in the card."""
    import torch

    matrix, b, params = arguments["A"], arguments["b"], case.params
    solve = resolve("ihvp.solvers.solve")
    result = solve(**arguments)
    x = result.x
    # The damping of neumann is relative to its scale (card, "Closed form").
    shift = params["damping"] * (params["scale"] if params["method"] == "neumann" else 1.0)
    damped = matrix + shift * torch.eye(len(b), dtype=matrix.dtype)
    out: Outputs = {"x": x, "converged": result.converged, "negative_curvature": result.negative_curvature}
    out["diverging"] = getattr(result, "diverged", None)
    out["relative_residual"] = result.relative_residual
    out["quadratic_value"] = 0.5 * x @ damped @ x - b @ x
    if "limit" in case.expected:
        out["limit"] = solve(matrix, b, method="direct", damping=shift).x
    if "half_factor_bug_limit" in case.expected:
        out["half_factor_bug_limit"] = solve(0.5 * matrix, b, method="direct", damping=shift).x
    return out


def _hvp_logistic(case: GoldenCase, arguments: Arguments, resolve: Resolve) -> Outputs:
    """Logistic regression built from the note; Newton steps and influence through the package's products and solver."""
    import torch

    features, y, theta, v = (arguments[key] for key in ("X", "y", "theta", "v"))
    l2, mean = case.params["l2"], case.params["reduction"] == "mean"
    weight = 1.0 / len(y) if mean else 1.0
    hvp, solve = resolve("ihvp.hvp.hvp"), resolve("ihvp.solvers.solve")

    def loss_over(rows: Any) -> Callable[[Any], Any]:
        def loss(parameters: Any) -> Any:
            score = features[rows] @ parameters
            each = torch.nn.functional.softplus(score) - y[rows] * score
            return weight * each.sum() + 0.5 * l2 * parameters @ parameters

        return loss

    def gradient(loss: Callable[[Any], Any], at: Any) -> Any:
        leaf = at.detach().clone().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]

    def hessian(loss: Callable[[Any], Any], at: Any) -> Any:
        return torch.stack([hvp(loss, at, unit).detach() for unit in torch.eye(len(at), dtype=at.dtype)], dim=1)

    def newton(loss: Callable[[Any], Any]) -> Any:
        at = torch.zeros_like(theta)
        for _ in range(50):
            at = at - torch.linalg.solve(hessian(loss, at), gradient(loss, at))
        return at

    everything = torch.arange(len(y))
    loss = loss_over(everything)
    full = newton(loss)
    first = gradient(loss_over(everything[:1]), full) - l2 * full  # the sample's own term, without the regulariser
    return {
        "loss": loss(theta),
        "grad": gradient(loss, theta),
        "hessian": hessian(loss, theta),
        "hvp": hvp(loss, theta, v),
        "ihvp": solve(lambda u: hvp(loss, theta, u), v, method="cg", rtol=1e-13, max_iter=20 * len(theta)).x,
        "theta_full": full,
        "theta_without_0": newton(loss_over(everything[1:])),
        "influence_delta": solve(hessian(loss, full), first, method="direct").x,
    }


# --- llm-rec ---------------------------------------------------------------------------------------------------------


def _sid_trie(case: GoldenCase, arguments: Arguments, resolve: Resolve) -> Outputs:
    """SidTrie(sequences, eos_token_id).allowed_next(prefix), sorted; `prefixes` are the questions."""
    del arguments
    trie = resolve(case.function)(case.inputs["sequences"], **case.params)
    prefixes = case.expected["prefixes"]
    return {"prefixes": prefixes, "allowed": [sorted(int(t) for t in trie.allowed_next(p)) for p in prefixes]}


def _constrained(case: GoldenCase, outputs: Outputs, arguments: Arguments, resolve: Resolve) -> Outputs:
    """The scores at the allowed positions; every other token must be -inf."""
    del resolve
    scores, allowed = as_list(outputs["output"]), as_list(arguments["allowed"])
    if len(scores) != len(allowed):
        raise ValueError(f"{len(scores)} rows of scores for {len(allowed)} rows of allowed tokens")
    for i, row in enumerate(scores):
        open_tokens = [t for t, score in enumerate(row) if t not in allowed[i] and score != float("-inf")]
        if open_tokens:
            raise ValueError(f"row {i}: token {open_tokens[0]} isn't allowed but has the score {row[open_tokens[0]]}")
    return {"allowed_scores": [[scores[i][t] for t in tokens] for i, tokens in enumerate(allowed)]}


def _sasrec(case: GoldenCase, arguments: Arguments, resolve: Resolve) -> Outputs:
    """Class; the state_dict keys are the official ones, dropout off."""
    import torch

    model = resolve(case.function)(**case.params).to(torch.float64)
    model.load_state_dict(arguments["state_dict"], strict=True)
    model.eval()
    history = (arguments["sequences"], arguments["lengths"])
    with torch.no_grad():
        return {"representation": model.representation(*history), "scores": model(*history)}


def _packed_bytes(arguments: Arguments, case: GoldenCase) -> Arguments:
    """`codes` are packed bytes (minionerec card: uint8)."""
    import torch

    del case
    return {**arguments, "codes": torch.as_tensor(arguments["codes"]).to(torch.uint8)}


# --- recsys-losses ---------------------------------------------------------------------------------------------------


def _dsl_controller(case: GoldenCase, arguments: Arguments, resolve: Resolve) -> Outputs:
    """The trajectory of the dsl card, section 9: one parameter, `steps` calls of the controller."""
    import torch

    params = dict(case.params)
    steps, optimizer_name, lr = params.pop("steps"), params.pop("optimizer"), params.pop("lr")
    module = torch.nn.Module()
    module.register_parameter("weight", torch.nn.Parameter(arguments["weight"].detach().clone()))
    optimizer = getattr(torch.optim, optimizer_name)(module.parameters(), lr=lr)
    controller = resolve(case.function)(module, optimizer, masks={"weight": arguments["mask"]}, **params)
    weight = module.get_parameter("weight")
    num_nonzero = []
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * arguments["curvature"] * (weight - arguments["target"]) ** 2).sum().backward()
        controller.step()
        num_nonzero.append(int(controller.masks["weight"].count_nonzero()))
    return {
        "weight": weight,
        "mask": controller.masks["weight"],
        "num_nonzero": num_nonzero,
        "explored_fraction": controller.explored_fraction(),
    }


def _views(arguments: Arguments, case: GoldenCase) -> Arguments:
    """A view is one (2, E') tensor, or a list of them: a three-level list is the latter even if all have one length."""
    del case
    views = {key: arguments[key] for key in ("view1_edge_index", "view2_edge_index") if key in arguments}
    return {**arguments, **{k: list(v) if getattr(v, "ndim", 2) == 3 else v for k, v in views.items()}}


def _ulc(case: GoldenCase, outputs: Outputs, arguments: Arguments, resolve: Resolve) -> Outputs:
    """The soft target, if it isn't returned, from the gradient of the summed loss: sigmoid(logits) - target."""
    import torch

    if "target" not in case.expected or "target" in outputs:
        return outputs
    leaf = arguments["logits"].detach().clone().requires_grad_()
    total = resolve(case.function)(**{**arguments, "logits": leaf, "reduction": "sum"})
    total = getattr(total, "loss", total)
    return {**outputs, "target": leaf.sigmoid() - torch.autograd.grad(total, leaf)[0]}


# --- rlvr ------------------------------------------------------------------------------------------------------------


def _with_metrics(arguments: Arguments, case: GoldenCase) -> Arguments:
    """The clip fractions are returned only on request."""
    asked = any(key.endswith("_fraction") for key in case.expected)
    return {**arguments, "return_metrics": True} if asked else arguments


def _metrics(case: GoldenCase, outputs: Outputs, arguments: Arguments, resolve: Resolve) -> Outputs:
    """Lay the metrics beside the loss."""
    del case, arguments, resolve
    metrics = outputs.get("metrics")
    if metrics is None:
        return outputs
    fields = metrics._asdict() if hasattr(metrics, "_asdict") else dict(metrics)
    return {**outputs, **fields}


def _times_mask(key: str) -> Callable[[GoldenCase, Outputs, Arguments, Resolve], Outputs]:
    """Expected values that are "shown multiplied by mask"."""

    def finish(case: GoldenCase, outputs: Outputs, arguments: Arguments, resolve: Resolve) -> Outputs:
        del case, resolve
        return {**outputs, key: outputs[key] * arguments["mask"]}

    return finish


_NONE = Adapter()
_PYTHON_LISTS = {"diagnoses": "python", "procedures": "python", "predictions": "python", "test_items": "python"}
# The core of seqnum-sepseq knows no torch.
_SEPSEQ = Adapter(
    want={
        "values": "python",
        "attention": "array",
        "separator_positions": "python",
        "segment_ids": "python",
        "accuracy": "array",
        "baseline": "array",
    }
)

ADAPTERS: dict[str, Adapter] = {
    "graph_ood.aia.mask_regularizer": Adapter(finish=_mask_regularizer),
    "graph_ood.asrc.adagae_forward": Adapter(names=("embedding", "recon", "loss")),
    "graph_ood.data.motif_graph": Adapter(finish=_motif_graph),
    "graph_ood.infoigl.instance_loss": Adapter(names=("loss", "memory_bank")),
    "graph_ood.rcc.RCC.fit": Adapter(
        run=_rcc_fit,
        canonical={"labels": first_seen},
        reference_only={"ami_with_truth": "the true labels aren't in the file; equal labels give equal scores"},
    ),
    "graph_unlearn.gif.remove_edges / graph_unlearn.gif.remove_nodes": Adapter(run=_gif_removal),
    "graph_unlearn.gif.gif_delta": Adapter(
        run=_gif_delta,
        want={"weights": "tensors"},
        reference_only={"delta_traditional_if_official_start": "an iteration start that the API doesn't offer"},
    ),
    "ihvp.solvers.solve": Adapter(
        run=_solve,
        reference_only={
            "max_iterations_needed": "for cg only x and the flags are binding",
            "min_eig": "a property of the input",
        },
    ),
    "ihvp.hvp.hvp": Adapter(run=_hvp_logistic),
    "llm_rec.cetrec.counterfactual_tuning_loss": Adapter(names=("loss", "ta", "ct")),
    "llm_rec.ilora.SASRec": Adapter(run=_sasrec),
    "llm_rec.minionerec.SidTrie": Adapter(run=_sid_trie),
    "llm_rec.minionerec.append_dedup_suffix": Adapter(want={"codes": "python"}),
    "llm_rec.minionerec.constrained_log_probs": Adapter(finish=_constrained, want={"allowed": "python"}),
    "llm_rec.minionerec.grpo_loss": Adapter(names=("loss", "mean_kl")),
    "llm_rec.minionerec.preprocess_reviews": Adapter(want={"timestamps": "python"}),
    "llm_rec.minionerec.residual_quantize": Adapter(names=("x_q", "loss", "codes"), want={"codebooks": "tensors"}),
    "llm_rec.minionerec.rqvae_loss": Adapter(names=("loss", "recon_loss")),
    "llm_rec.minionerec.unpack_codes": Adapter(arguments=_packed_bytes),
    "llm_rec.minionerec.vector_quantize": Adapter(names=("x_q", "loss", "codes")),
    "llm_unlearn.tcft.critic_scores": Adapter(want={"true_leak": "python", "predicted_leak": "python"}),
    "llm_unlearn.tcft.multi_event_leakage": Adapter(want={"claim_flags": "python"}),
    "llm_unlearn.tcft.stock_leakage_rate": Adapter(want={"predicted": "python", "actual": "python"}),
    "mllm.adavip.adavip_loss": Adapter(
        names=("losses", "text_margin", "image_margin"), gradient_of=lambda outputs: outputs["losses"].mean()
    ),
    "pref_opt.alignment_potential.select_top": Adapter(canonical={"indices_sorted": sorted_list}),
    "pref_opt.alpha_dpo.alpha_dpo_rewards": Adapter(names=("chosen_rewards", "rejected_rewards")),
    "pref_opt.napo.dynamic_reward_margin": Adapter(names=("gamma", "score_ema")),
    "pref_opt.stats.update_gap_stats": Adapter(names=("mean", "std")),
    "recsys_losses.cpr.cpr_scores": Adapter(names=("pos_score", "neg_score")),
    "recsys_losses.cpr.filter_cpr_candidates": Adapter(names=("users", "items")),
    "recsys_losses.dsl.DSLController": Adapter(run=_dsl_controller),
    "recsys_losses.if_dfm.logistic_influence_update": Adapter(want={"flipped": "python"}),
    "recsys_losses.if_dfm.ulc_loss": Adapter(finish=_ulc),
    "recsys_losses.raremed.ddi_rate": Adapter(want=_PYTHON_LISTS),
    "recsys_losses.raremed.sr_loss": Adapter(want=_PYTHON_LISTS),
    "recsys_losses.raremed.visit_rarity": Adapter(want=_PYTHON_LISTS),
    "recsys_losses.sgl.recall_ndcg_at_k": Adapter(want=_PYTHON_LISTS),
    "recsys_losses.sgl.sgl_loss": Adapter(arguments=_views),
    "rlvr.advantages.reinforce_pp_advantages": Adapter(names=("advantages", "returns"), finish=_times_mask("returns")),
    "rlvr.coca.calibration_metrics": Adapter(null_is_nan=True),
    "rlvr.direction.reweight_advantages": Adapter(finish=_times_mask("advantages")),
    "rlvr.losses.kl_estimate": Adapter(gradient_of=lambda outputs: outputs["kl"].sum()),
    "rlvr.losses.policy_gradient_loss": Adapter(names=("loss", "metrics"), arguments=_with_metrics, finish=_metrics),
    "rlvr.reczero.rating_metrics": Adapter(null_is_nan=True, want={"predictions": "python", "targets": "python"}),
    "seqnum_sepseq.diagnostics.attention_summary": _SEPSEQ,
    "seqnum_sepseq.insert_separators": _SEPSEQ,
    "seqnum_sepseq.scoring.relative_improvement": _SEPSEQ,
    "seqnum_sepseq.tasks.solve": _SEPSEQ,
}
