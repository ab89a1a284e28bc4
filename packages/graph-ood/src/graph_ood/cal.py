r"""CAL: causal attention learning for graph classification.

Attention splits every graph softly into a causal and a trivial part. The first one is to predict the label, the second one
is to predict nothing, and the causal part must also predict the label next to the trivial part of any other graph: what
merely occurs together with the label stops helping. No environment labels are needed, and the attention is an explanation.

$$
\mathcal L=\lambda_s\,\mathrm{CE}(z_c,y)+\lambda_u\,\mathrm{KL}(\text{uniform}\,\|\,p_t)
+\lambda_c\,\mathrm{CE}(z_{c+t'},y),\qquad h_{c+t'}=h_c+h_t[\text{perm}]
$$

References: Y. Sui, X. Wang, J. Wu, M. Lin, X. He, T.-S. Chua, *Causal Attention for Interpretable and Generalizable Graph
Classification*, KDD 2022, arXiv:2112.15089; `CALPlus`: Y. Sui, W. Mao, S. Wang, X. Wang, J. Wu, X. He, T.-S. Chua,
*Enhancing Out-of-distribution Generalization on Graphs via Causal Attention Learning*, ACM TKDD 18(5):127, 2024.
Documentation: `docs/papers/graph-ood/cal.md`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from graph_ood._checks import (
    check_choice,
    check_count,
    check_matrix,
    check_not_negative,
    check_positive,
    check_target,
    upcast,
)
from graph_ood.explain import explanations
from graph_ood.nets import (
    ProjectedEncoder,
    SoftSplit,
    WeightedGCNConv,
    attention_split,
    graph_index,
    loop_routes,
    pool,
    readout_head,
    weighted_gcn_conv,
)
from graph_ood.training import cross_validate, fit

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor
    from torch_geometric.data import Data  # type: ignore[import-untyped]
    from torch_geometric.explain import Explanation  # type: ignore[import-untyped]
    from torch_geometric.loader import DataLoader  # type: ignore[import-untyped]

    from graph_ood._sparse import Routes
    from graph_ood.training import CrossValidation, History

__all__ = [
    "CAL",
    "CALPlus",
    "CalLoss",
    "attention_split",
    "cal_loss",
    "cross_validate_tu",
    "intervene",
    "prototype_loss",
    "train_cal",
    "update_prototypes",
    "weighted_gcn_conv",
]

Mode = Literal["add", "cat"]
Encoder = Literal["gcn", "gin", "gat"]
Lambdas = tuple[float, float, float]

MODES = ("add", "cat")
ENCODERS = ("gcn", "gin", "gat")


class CalLoss(NamedTuple):
    """The objective of a batch and its parts, scalars without the weights.

    Attributes:
        loss: What is minimised.
        loss_sup: Cross-entropy of the causal head.
        loss_unif: Divergence of the trivial head from the uniform distribution.
        loss_caus: Cross-entropy of the head that sees causal parts next to shuffled trivial ones.
    """

    loss: Tensor
    loss_sup: Tensor
    loss_unif: Tensor
    loss_caus: Tensor


def cal_loss(
    logits_trivial: Tensor,
    logits_causal: Tensor,
    logits_intervened: Tensor,
    target: Tensor,
    *,
    lambda_sup: float = 1.0,
    lambda_unif: float = 0.5,
    lambda_caus: float = 0.5,
) -> CalLoss:
    r"""Return the objective of CAL (Sui et al., 2022, eq. 11, 12, 14 and 15).

    $$
    \mathcal L=\lambda_s\,\mathrm{CE}(z_c,y)+\lambda_u\Big(-\frac1{BC}\sum_{b,k}\log p_{bk}-\log C\Big)
    +\lambda_c\,\mathrm{CE}(z_{c+t'},y),\qquad p=\operatorname{softmax}(z_t)
    $$

    Args:
        logits_trivial: $z_t$, raw scores of the trivial head, shape `(B, C)`, floating.
        logits_causal: $z_c$, of the causal head, `(B, C)`.
        logits_intervened: $z_{c+t'}$, of the head on `intervene`'s result, `(B, C)`.
        target: Classes $y$, shape `(B,)`, int64 in [0, C); the range is checked on the CPU only.
        lambda_sup: $\lambda_s\ge0$.
        lambda_unif: $\lambda_u\ge0$; $\lambda_1$ in the paper, stable between 0.3 and 0.7 there.
        lambda_caus: $\lambda_c\ge0$; $\lambda_2$ in the paper, best between 0.3 and 0.5 there.

    Returns:
        The objective and its parts, in the dtype of `logits_causal`; half precision is computed in float32.

    Raises:
        ValueError: If the shapes differ, `target` doesn't fit or is out of [0, C), or a weight is negative.

    Examples:
        >>> import torch
        >>> zero = torch.zeros(2, 4)
        >>> parts = cal_loss(zero, zero, zero, torch.tensor([0, 3]))
        >>> parts.loss, parts.loss_unif  # 1.5 log 4
        (tensor(2.0794), tensor(0.))
    """
    for name, value in (("lambda_sup", lambda_sup), ("lambda_unif", lambda_unif), ("lambda_caus", lambda_caus)):
        check_not_negative(name, value)
    _check_classes(logits_causal, target)
    for name, logits in (("logits_trivial", logits_trivial), ("logits_intervened", logits_intervened)):
        if logits.shape != logits_causal.shape:
            wanted = tuple(logits_causal.shape)
            raise ValueError(f"{name} must have the shape of logits_causal, {wanted}, got {tuple(logits.shape)}")
    dtype = logits_causal.dtype
    sup = F.cross_entropy(upcast(logits_causal), target)
    caus = F.cross_entropy(upcast(logits_intervened), target)
    log_p = upcast(logits_trivial).log_softmax(1)
    unif = -log_p.mean() - math.log(log_p.shape[1])
    loss = lambda_sup * sup + lambda_unif * unif + lambda_caus * caus
    return CalLoss(loss.to(dtype), sup.to(dtype), unif.to(dtype), caus.to(dtype))


def intervene(
    h_trivial: Tensor,
    h_causal: Tensor,
    perm: Tensor | None = None,
    *,
    mode: Mode = "add",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Put the causal part of every graph next to the trivial part of another one (Sui et al., 2022, eq. 13).

    $$h_b=h^c_b+h^t_{\text{perm}(b)}\quad\text{or}\quad h_b=[h^t_{\text{perm}(b)}\,\|\,h^c_b]$$

    The causal parts stay in their rows, so the labels still fit.

    Args:
        h_trivial: Pooled trivial parts, shape `(B, d)`, floating.
        h_causal: Pooled causal parts, `(B, d)`.
        perm: Permutation of the rows, int64 `(B,)`; its values are checked on the CPU only. None draws one.
        mode: "add", or "cat" for `(B, 2d)`.
        generator: Source of the permutation, on any device; the default one of the device where None.

    Returns:
        The mixed representations.

    Raises:
        ValueError: If the shapes don't fit, `perm` isn't a permutation of B rows, or `mode` is unknown.

    Examples:
        >>> import torch
        >>> h = torch.tensor([[1.0], [2.0]])
        >>> intervene(10 * h, h, torch.tensor([1, 0]))
        tensor([[21.],
                [12.]])
    """
    check_choice("mode", mode, MODES)
    check_matrix("h_trivial", h_trivial)
    check_matrix("h_causal", h_causal)
    if h_trivial.shape != h_causal.shape:
        raise ValueError(
            f"h_trivial and h_causal must have one shape, got {tuple(h_trivial.shape)} and {tuple(h_causal.shape)}"
        )
    if perm is None:
        device = h_trivial.device if generator is None else generator.device
        perm = torch.randperm(len(h_causal), generator=generator, device=device).to(h_trivial.device)
    else:
        _check_permutation(perm, len(h_causal))
    return _mix(h_trivial.index_select(0, perm), h_causal, mode)


def update_prototypes(
    h: Tensor, y: Tensor, prototypes: Tensor, seen: Tensor, *, tau: float = 1.0
) -> tuple[Tensor, Tensor]:
    r"""Return the class prototypes of CAL+ after a batch (Sui et al., 2024).

    $$p_i\leftarrow\sum_{k:\,y_k=i}w_kh_k,\qquad w=\operatorname*{softmax}_{k:\,y_k=i}\big(\cos(h_k,p_i)/\tau\big)$$

    A class that is seen for the first time gets the mean of its members; one without a member keeps its prototype.

    Args:
        h: Pooled causal parts, shape `(B, d)`, floating; treated as constants.
        y: Classes, shape `(B,)`, int64 in [0, C); the range is checked on the CPU only.
        prototypes: $p$, shape `(C, d)`.
        seen: Which classes have a prototype yet, bool `(C,)`.
        tau: Temperature $\tau>0$.

    Returns:
        New prototypes in the dtype of `prototypes`, and which classes have one; without a graph.

    Raises:
        ValueError: If a shape doesn't fit, `y` is out of range, or `tau` isn't a positive finite number.

    Examples:
        >>> import torch
        >>> h, y = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 4.0]]), torch.tensor([0, 1, 1])
        >>> update_prototypes(h, y, torch.zeros(3, 2), torch.zeros(3, dtype=torch.bool))
        (tensor([[1., 0.],
                [0., 3.],
                [0., 0.]]), tensor([ True,  True, False]))
    """
    check_positive("tau", tau)
    _check_prototypes(h, y, prototypes, seen)
    h, old = upcast(h.detach()), upcast(prototypes.detach())
    member = torch.arange(len(old), device=y.device)[:, None] == y
    score = F.normalize(old, dim=1) @ F.normalize(h, dim=1).T / tau
    score = torch.where(seen[:, None], score, 0.0)  # equal weights: the mean
    # a finite fill keeps the row of a missing class free of NaN; it is not used
    weight = score.masked_fill(~member, torch.finfo(score.dtype).min).softmax(1)
    present = member.any(1)
    return torch.where(present[:, None], weight @ h, old).to(prototypes.dtype), seen | present


def prototype_loss(h: Tensor, y: Tensor, prototypes: Tensor, seen: Tensor | None = None) -> Tensor:
    r"""Contrast causal parts with the prototypes of all classes (Sui et al., 2024).

    $$\ell=-\frac1B\sum_b\log\operatorname*{softmax}_i\big(h_b^\top p_i\big)_{y_b}$$

    Args:
        h: Pooled causal parts, shape `(B, d)`, floating.
        y: Classes, shape `(B,)`, int64 in [0, C).
        prototypes: $p$, shape `(C, d)`, treated as constants.
        seen: Which classes have a prototype, bool `(C,)`; the others are left out of the softmax. None stands for all.

    Returns:
        A scalar in the dtype of `h`; half precision is computed in float32.

    Raises:
        ValueError: If a shape doesn't fit or `y` is out of range.

    Examples:
        >>> import torch
        >>> prototype_loss(torch.eye(2), torch.tensor([0, 1]), torch.eye(2))
        tensor(0.3133)
    """
    everything = torch.ones(len(prototypes), dtype=torch.bool, device=prototypes.device)
    seen = everything if seen is None else seen
    _check_prototypes(h, y, prototypes, seen)
    logits = upcast(h) @ prototypes.detach().to(upcast(h).dtype).T
    return F.cross_entropy(logits.masked_fill(~seen, torch.finfo(logits.dtype).min), y).to(h.dtype)


class CAL(nn.Module):
    r"""Encoder, attention, two branches and three heads (Sui et al., 2022, eq. 6-13).

    $$
    h=f(x,E),\quad(\alpha,\beta)=\text{attention}(h),\quad
    h^c_g=\sum_{i\in g}\operatorname{relu}\big(\mathrm{WGCN}(\mathrm{BN}(\alpha^c\odot h),E,\beta^c)\big)_i
    $$

    and $h^t$ likewise from $\alpha^t=1-\alpha^c$ and $\beta^t=1-\beta^c$, with its own weights; attention as
    `attention_split`, WGCN as `weighted_gcn_conv`.

    Args:
        in_channels: Node features F.
        num_classes: C >= 2.
        encoder: "gcn", "gin" or "gat" for a `ProjectedEncoder`, or a module (x, edge_index) -> [n, d] with an attribute
            `hidden` = d, which then replaces `hidden` and `num_layers`.
        hidden: d.
        num_layers: Convolutions of the encoder.
        mode: How causal and trivial parts are mixed, "add" or "cat".
        node_attention: Whether nodes are scored; all have 0.5 otherwise.
        edge_attention: The same for edges.
        shuffle: Whether trivial parts come from other graphs in training; from the graph itself otherwise.

    Raises:
        ValueError: If a size, `encoder` or `mode` is not accepted.

    Examples:
        >>> import torch
        >>> from torch_geometric.data import Batch, Data
        >>> graph = Data(x=torch.randn(3, 2), edge_index=torch.tensor([[0, 1], [1, 2]]))
        >>> out = CAL(2, 4, hidden=8)(Batch.from_data_list([graph, graph]))
        >>> {name: tuple(value.shape) for name, value in out.items()}  # doctest: +NORMALIZE_WHITESPACE
        {'logits_causal': (2, 4), 'logits_trivial': (2, 4), 'logits_mixed': (2, 4), 'node_att': (6,),
         'edge_att': (4,)}
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        encoder: Encoder | nn.Module = "gcn",
        hidden: int = 128,
        num_layers: int = 3,
        mode: Mode = "add",
        node_attention: bool = True,
        edge_attention: bool = True,
        shuffle: bool = True,
    ) -> None:
        super().__init__()
        check_count("num_classes", num_classes, 2)
        check_choice("mode", mode, MODES)
        if not isinstance(encoder, nn.Module):
            check_choice("encoder", encoder, ENCODERS)
            encoder = ProjectedEncoder(in_channels, hidden, num_layers, encoder)
        self.encoder = encoder
        self.hidden = int(encoder.hidden)  # type: ignore[arg-type]
        self.num_classes, self.mode, self.shuffle = num_classes, mode, shuffle
        self.split = SoftSplit(self.hidden, node=node_attention, edge=edge_attention)
        self.trivial, self.causal = _Branch(self.hidden), _Branch(self.hidden)
        self.head_trivial = readout_head(self.hidden, num_classes)
        self.head_causal = readout_head(self.hidden, num_classes)
        width = self.hidden if mode == "add" else 2 * self.hidden
        self.head_mixed = readout_head(self.hidden, num_classes, in_channels=width)

    def forward(self, data: Data) -> dict[str, Tensor]:
        """Return the logits of the three heads [B, C], and the causal scores `node_att` [n] and `edge_att` [m] in [0, 1]."""
        h_causal, h_trivial, split = self._parts(data)
        return {**self._heads(h_causal, h_trivial), "node_att": split["node_causal"], "edge_att": split["edge_causal"]}

    def training_loss(self, data: Data, *, lambdas: Lambdas = (1.0, 0.5, 0.5)) -> dict[str, Tensor]:
        """Return the objective of a batch with classes `y`: "loss", and its parts.

        Args:
            data: A batch of graphs.
            lambdas: Weights of the causal head, of the uniformity of the trivial head and of the intervention.

        Returns:
            "loss", "loss_sup", "loss_unif", "loss_caus", scalars.

        Raises:
            ValueError: If the batch has a single graph, or `y` doesn't fit.
        """
        h_causal, h_trivial, _ = self._parts(data)
        return self._objective(self._heads(h_causal, h_trivial), data.y, lambdas)

    def predict(self, data: Data) -> Tensor:
        """Return the logits of the causal head [B, C]; the other two heads are not computed."""
        index, num_graphs = graph_index(data)
        self._check_batch_size(num_graphs)
        h, routes = self._encode(data)
        split = self.split(h, data.edge_index)
        h = self.causal(h, data.edge_index, split["node_causal"], split["edge_causal"], routes)
        return self.head_causal(pool(h, index, num_graphs, "sum"))  # type: ignore[no-any-return]

    @torch.no_grad()
    def explain(self, data: Data) -> list[Explanation]:
        """Return the causal scores of every graph, computed in evaluation mode.

        Args:
            data: A batch, or a single graph.

        Returns:
            One explanation per graph, with `node_mask` `(n_g, 1)` and `edge_mask` `(m_g,)`, on the CPU.

        Examples:
            >>> import torch
            >>> from torch_geometric.data import Data
            >>> graph = Data(x=torch.ones(3, 1), edge_index=torch.tensor([[0, 1], [1, 2]]))
            >>> CAL(1, 2, hidden=8).explain(graph)[0].edge_mask.shape
            torch.Size([2])
        """
        before = self.training
        self.eval()
        try:
            split = self.split(self.encoder(data.x, data.edge_index), data.edge_index)
        finally:
            self.train(before)
        return explanations(data, node_mask=split["node_causal"], edge_mask=split["edge_causal"])

    def _encode(self, data: Data) -> tuple[Tensor, Routes | None]:
        """Return node embeddings, and the sorted edges that the encoder and both branches share."""
        routes = loop_routes(data.edge_index, data.x)
        if isinstance(self.encoder, ProjectedEncoder):
            return self.encoder(data.x, data.edge_index, loops=routes), routes
        return self.encoder(data.x, data.edge_index), routes

    def _parts(self, data: Data) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the pooled causal and trivial parts and the scores."""
        index, num_graphs = graph_index(data)
        self._check_batch_size(num_graphs)
        edges = data.edge_index
        h, routes = self._encode(data)
        split = self.split(h, edges)
        causal = self.causal(h, edges, split["node_causal"], split["edge_causal"], routes)
        trivial = self.trivial(h, edges, split["node_trivial"], split["edge_trivial"], routes)
        return pool(causal, index, num_graphs, "sum"), pool(trivial, index, num_graphs, "sum"), split

    def _heads(self, h_causal: Tensor, h_trivial: Tensor) -> dict[str, Tensor]:
        return {
            "logits_causal": self.head_causal(h_causal),
            "logits_trivial": self.head_trivial(h_trivial),
            "logits_mixed": self.head_mixed(self._mixed(h_causal, h_trivial)),
        }

    def _mixed(self, h_causal: Tensor, h_trivial: Tensor) -> Tensor:
        if self.training and self.shuffle:
            return intervene(h_trivial, h_causal, mode=self.mode)
        return _mix(h_trivial, h_causal, self.mode)

    def _objective(self, logits: dict[str, Tensor], y: Tensor, lambdas: Lambdas) -> dict[str, Tensor]:
        sup, unif, caus = lambdas
        parts = cal_loss(
            logits["logits_trivial"],
            logits["logits_causal"],
            logits["logits_mixed"],
            y,
            lambda_sup=sup,
            lambda_unif=unif,
            lambda_caus=caus,
        )
        return parts._asdict()

    def _check_batch_size(self, num_graphs: int) -> None:
        if self.training and num_graphs < 2:
            raise ValueError("batch size 1: batch norm over graphs needs two or more graphs in training")


class CALPlus(CAL):
    r"""CAL+ (Sui et al., 2024): CAL with class prototypes, and trivial parts from earlier batches.

    $$\mathcal L=\mathcal L_{\text{CAL}}+\rho_1\,\ell_{\text{pro}}$$

    with `prototype_loss` between unit vectors. The trivial part next to a causal one is drawn from the batch and from a memory of the last
    `num_batches` batches; what is remembered is constant. Prototypes and memory are buffers: they are saved with the model
    and restored with it. Only training with `training_loss` changes them.

    Args:
        in_channels: Node features F.
        num_classes: C >= 2.
        num_batches: Batches that are remembered, between 2 and 10 in the paper.
        batch_size: Graphs in a full batch.
        tau: Temperature of `update_prototypes`, > 0.
        rho1: Weight of the prototypes, >= 0.
        **options: As for `CAL`.

    Raises:
        ValueError: If an option is not accepted.

    Examples:
        >>> import torch
        >>> from torch_geometric.data import Batch, Data
        >>> graph = Data(x=torch.randn(3, 2), edge_index=torch.tensor([[0, 1], [1, 2]]), y=torch.tensor([0]))
        >>> model = CALPlus(2, 4, num_batches=2, batch_size=2, hidden=8)
        >>> parts = model.training_loss(Batch.from_data_list([graph, graph]))
        >>> list(parts), int(model.remembered)
        (['loss', 'loss_sup', 'loss_unif', 'loss_caus', 'loss_pro'], 2)
    """

    prototypes: Tensor
    seen: Tensor
    memory: Tensor
    remembered: Tensor
    place: Tensor

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        num_batches: int = 4,
        batch_size: int = 128,
        tau: float = 1.0,
        rho1: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(in_channels, num_classes, **options)
        check_count("num_batches", num_batches)
        check_count("batch_size", batch_size)
        check_positive("tau", tau)
        check_not_negative("rho1", rho1)
        self.tau, self.rho1 = tau, rho1
        self.register_buffer("prototypes", torch.zeros(num_classes, self.hidden))
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))
        self.register_buffer("memory", torch.zeros(num_batches * batch_size, self.hidden))
        self.register_buffer("remembered", torch.zeros((), dtype=torch.int64))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))

    def training_loss(self, data: Data, *, lambdas: Lambdas = (1.0, 0.5, 0.5)) -> dict[str, Tensor]:
        """Return the objective of a batch with classes `y`: "loss", and its parts, "loss_pro" among them.

        Args:
            data: A batch of graphs.
            lambdas: As for `CAL`; the second one is the paper's rho2.

        Returns:
            "loss", "loss_sup", "loss_unif", "loss_caus", "loss_pro", scalars.

        Raises:
            ValueError: If the batch has a single graph, or `y` doesn't fit.
        """
        h_causal, h_trivial, _ = self._parts(data)
        parts = self._objective(self._heads(h_causal, h_trivial), data.y, lambdas)
        if self.training:
            self.prototypes, self.seen = update_prototypes(h_causal, data.y, self.prototypes, self.seen, tau=self.tau)
            self._remember(h_trivial.detach())
        # sums over nodes have products in the hundreds: the loss would be all there is
        pro = prototype_loss(F.normalize(h_causal), data.y, F.normalize(self.prototypes), self.seen)
        return {**parts, "loss": parts["loss"] + self.rho1 * pro, "loss_pro": pro}

    def _mixed(self, h_causal: Tensor, h_trivial: Tensor) -> Tensor:
        if not (self.training and self.shuffle):
            return super()._mixed(h_causal, h_trivial)
        size = len(h_causal)
        draw = torch.rand(size, device=h_causal.device, dtype=torch.float64) * (size + self.remembered)
        # rows of the memory are filled from its start, so those that are remembered follow the batch
        partner = torch.cat([h_trivial, self.memory.to(h_trivial.dtype)]).index_select(0, draw.long())
        return _mix(partner, h_causal, self.mode)

    @torch.no_grad()
    def _remember(self, h_trivial: Tensor) -> None:
        """Overwrite the oldest rows; nothing here waits for the device."""
        capacity = len(self.memory)
        rows = h_trivial[-capacity:].to(self.memory.dtype)
        at = (self.place + torch.arange(len(rows), device=rows.device)) % capacity
        self.memory.index_copy_(0, at, rows)
        self.place.add_(len(rows)).remainder_(capacity)
        self.remembered.add_(len(rows)).clamp_(max=capacity)


def train_cal(
    model: CAL,
    train_loader: DataLoader,
    val_loader: DataLoader | None = None,
    *,
    epochs: int = 100,
    lr: float = 1e-3,
    min_lr: float = 1e-6,
    scheduler: Literal["cosine"] | None = "cosine",
    lambdas: Lambdas = (1.0, 0.5, 0.5),
    test_loaders: Mapping[str, DataLoader] | None = None,
    metric: Literal["accuracy", "roc_auc"] = "accuracy",
    seed: int = 0,
    device: torch.device | str = "cpu",
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = True,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> History:
    r"""Train CAL or CAL+ in place with Adam; the causal head chooses the epoch, and is what is tested.

    Args:
        model: The model.
        train_loader: Batches of graphs with a class `y`.
        val_loader: Batches that choose the epoch; None keeps the last.
        epochs: Passes over the training graphs.
        lr: Learning rate; the authors take 1e-3, and 2e-3 for SYN-b.
        min_lr: Where the cosine ends, >= 0; not used without a scheduler.
        scheduler: "cosine", as the authors do for SYN-b, or None, as they do for real graphs.
        lambdas: $\lambda_s,\lambda_u,\lambda_c$ of `cal_loss`.
        test_loaders: Further sets that are evaluated every epoch, by name.
        metric: "accuracy" or "roc_auc".
        seed: Seed of shuffling and of the interventions; the model has its own.
        device: Torch device.
        checkpoint: safetensors file that is replaced after every epoch; None writes none.
        resume: Continue from `checkpoint` where it exists.
        on_epoch: Called with the record of every finished epoch.

    Returns:
        The history; the model has the parameters of the chosen epoch.

    Raises:
        ValueError: If a weight is negative, or `fit` refuses an argument.

    Reference: Sui et al., 2022, appendix A.1, with the loop that all methods of this package share.

    Examples:
        >>> import torch
        >>> from torch_geometric.data import Data
        >>> from torch_geometric.loader import DataLoader
        >>> edges = torch.tensor([[0, 1], [1, 0]])
        >>> graphs = [Data(x=torch.randn(2, 3), edge_index=edges, y=torch.tensor([i % 2])) for i in range(8)]
        >>> history = train_cal(CAL(3, 2, hidden=8), DataLoader(graphs, 4, shuffle=True), epochs=2)
        >>> sorted(history.best)
        ['epoch', 'loss', 'loss_caus', 'loss_sup', 'loss_unif', 'seconds']
    """
    for value in lambdas:
        check_not_negative("lambdas", value)
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)

    def step(batch: Data) -> dict[str, Tensor]:
        optimizer.zero_grad()
        parts = model.training_loss(batch, lambdas=lambdas)
        parts["loss"].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return {name: value.detach() for name, value in parts.items()}

    return fit(
        model,
        train_loader,
        step=step,
        predict=model.predict,
        optimizers=[optimizer],
        val_loader=val_loader,
        test_loaders=test_loaders,
        epochs=epochs,
        scheduler=scheduler,
        min_lr=min_lr,
        metric=metric,
        seed=seed,
        device=device,
        checkpoint=checkpoint,
        resume=resume,
        on_epoch=on_epoch,
        settings={"method": type(model).__name__, "lambdas": list(lambdas)},
    )


def cross_validate_tu(
    dataset: Sequence[Data],
    make_model: Callable[[], CAL],
    folds: int = 10,
    selection: Literal["val", "test_max"] = "val",
    *,
    epochs: int = 100,
    lr: float = 1e-3,
    lambdas: Lambdas = (1.0, 0.5, 0.5),
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | str = "cpu",
    only: Sequence[int] | None = None,
) -> CrossValidation:
    """Cross-validate CAL on real graphs as its authors do: stratified folds, Adam without a scheduler.

    Args:
        dataset: Graphs with a class `y`, such as those of `load_tu`.
        make_model: Makes a model; called once per fold, after the seed of the fold is set.
        folds: Number of folds, >= 3 with "val".
        selection: "val": the fold before the test fold chooses the epoch. "test_max": the best mean test accuracy over
            epochs, as published; optimistic.
        epochs: Passes over the training graphs.
        lr: Learning rate.
        lambdas: As in `cal_loss`.
        batch_size: Graphs per step.
        seed: Of models and training; the split itself is the one of the published tables.
        device: Torch device.
        only: Folds to run; all by default.

    Returns:
        Accuracies and histories; each history has `test_accuracy` for every epoch.

    Raises:
        ValueError: If an argument is not accepted, or a class has fewer graphs than there are folds.

    Examples:
        >>> import torch
        >>> from torch_geometric.data import Data
        >>> edges = torch.tensor([[0, 1], [1, 0]])
        >>> graphs = [Data(x=torch.full((2, 1), i % 2.0), edge_index=edges, y=torch.tensor([i % 2])) for i in range(18)]
        >>> result = cross_validate_tu(graphs, lambda: CAL(1, 2, hidden=8), folds=3, epochs=2)
        >>> len(result.accuracies)
        3
    """
    from torch_geometric.loader import DataLoader

    def train_fold(train: list[Data], val: list[Data] | None, test: list[Data], fold: int) -> History:
        fold_seed = seed * 1000 + fold
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(fold_seed)
            model = make_model()
        return train_cal(
            model,
            DataLoader(train, batch_size, shuffle=True),
            None if val is None else DataLoader(val, batch_size),
            test_loaders={"test": DataLoader(test, batch_size)},
            epochs=epochs,
            lr=lr,
            scheduler=None,
            lambdas=lambdas,
            seed=fold_seed,
            device=device,
        )

    return cross_validate(dataset, train_fold, folds=folds, selection=selection, only=only)


class _Branch(nn.Module):
    """What becomes of one half of the split: weighted nodes, batch norm, one convolution over weighted edges, ReLU."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(hidden)
        nn.init.constant_(self.norm.bias, 1e-4)  # as in the authors' code
        self.conv = WeightedGCNConv(hidden, hidden)

    def forward(self, h: Tensor, edge_index: Tensor, node: Tensor, edge: Tensor, routes: Routes | None) -> Tensor:
        h = self.norm(node[:, None] * h)
        return self.conv(h, edge_index, edge, routes=routes).relu_()  # type: ignore[no-any-return]


# --- checks and small parts ---------------------------------------------------------------------------------------------


def _mix(h_trivial: Tensor, h_causal: Tensor, mode: str) -> Tensor:
    return h_trivial + h_causal if mode == "add" else torch.cat([h_trivial, h_causal], 1)


def _check_classes(logits: Tensor, target: Tensor) -> None:
    check_target(logits, target)
    classes = logits.shape[1]
    # A look at the values would wait for a GPU.
    if target.device.type == "cpu" and target.numel() and not 0 <= int(target.min()) <= int(target.max()) < classes:
        raise ValueError(
            f"target must be in [0, {classes}), got values from {int(target.min())} to {int(target.max())}"
        )


def _check_permutation(perm: Tensor, size: int) -> None:
    if perm.shape != (size,) or perm.dtype != torch.int64:
        raise ValueError(f"perm must be a permutation of {size} rows, got {perm.dtype} of shape {tuple(perm.shape)}")
    if perm.device.type == "cpu" and not torch.equal(perm.sort().values, torch.arange(size)):
        raise ValueError(f"perm must be a permutation of {size} rows, got {perm.tolist()}")


def _check_prototypes(h: Tensor, y: Tensor, prototypes: Tensor, seen: Tensor) -> None:
    check_matrix("h", h)
    check_matrix("prototypes", prototypes, h.shape[1])
    if seen.shape != prototypes.shape[:1] or seen.dtype != torch.bool:
        raise ValueError(f"seen must be bool ({len(prototypes)},), got {seen.dtype} {tuple(seen.shape)}")
    if y.shape != h.shape[:1] or y.dtype != torch.int64:
        raise ValueError(f"y must be an int64 tensor of shape ({len(h)},), got {y.dtype} {tuple(y.shape)}")
    if y.device.type == "cpu" and y.numel() and not 0 <= int(y.min()) <= int(y.max()) < len(prototypes):
        raise ValueError(f"y must be in [0, {len(prototypes)}), got values from {int(y.min())} to {int(y.max())}")
