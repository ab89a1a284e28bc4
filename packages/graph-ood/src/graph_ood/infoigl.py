r"""InfoIGL: invariant graph learning with an attention filter and contrast by class on two levels.

Attention on nodes and edges keeps the part of a graph that the class depends on. Two contrastive losses draw graphs of a
class together, whatever environment they come from: against class prototypes, and against hard negatives. No environment
labels are needed.

$$
\mathcal L=\mathcal L_{\text{pred}}+\lambda_s\,\mathcal L_{\text{sem}}(z,w)+\lambda_i\,\mathcal L_{\text{ins}}(z',w),\qquad
w_c\leftarrow\sum_{i:\,y_i=c}\operatorname*{softmax}_i\Big(\frac{\cos(z_i,w_c)}{t}\Big)z_i,\qquad
z'_i=\lambda_cz_i+(1-\lambda_c)\,w_{y_i}
$$

Reference: W. Mao, J. Wu, H. Liu, Y. Sui, X. Wang, *Invariant Graph Learning Meets Information Bottleneck for
Out-of-Distribution Generalization*, Frontiers of Computer Science 20(1), 2026, arXiv:2408.01697. The authors' code has
other contrastive losses than the paper's equations; `variant` selects. Documentation:
`docs/papers/graph-ood/infoigl.md`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from graph_ood._checks import (
    check_choice,
    check_count,
    check_fraction,
    check_matrix,
    check_not_negative,
    check_positive,
    upcast,
)
from graph_ood.nets import ConvStack, SoftSplit, WeightedGCNConv, graph_index, pool, readout_head
from graph_ood.training import fit

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import Tensor
    from torch_geometric.data import Batch, Data  # type: ignore[import-untyped]

    from graph_ood.training import History, Metric

__all__ = [
    "InfoIGL",
    "InfoIGLState",
    "InfoIGLTrainer",
    "LossParts",
    "infoigl_loss",
    "instance_loss",
    "semantic_loss",
    "update_prototypes",
]

Variant = Literal["official", "paper"]
Encoder = Literal["gin", "gcn", "gat"]

VARIANTS = ("official", "paper")


class InfoIGLState(NamedTuple):
    """What the contrastive losses remember between batches; neither tensor has a graph.

    Attributes:
        prototypes: One vector per class, shape `(C, d)`; None before the first batch.
        memory_bank: The last negatives of every class, shape `(C, K, d)`.
    """

    prototypes: Tensor | None
    memory_bank: Tensor

    @classmethod
    def start(
        cls,
        num_classes: int,
        dim: int,
        *,
        num_negatives: int = 10,
        prototypes: Tensor | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> InfoIGLState:
        """Return a state with a random memory bank, as the authors make one at the start of every epoch.

        Args:
            num_classes: C >= 2.
            dim: d >= 1, width of what is contrasted.
            num_negatives: K >= 1.
            prototypes: Kept from before, shape `(C, d)`; None to start from the first batch.
            generator: Source of the standard normal rows, on any device.
            device: Where the bank lies.

        Returns:
            The state.

        Raises:
            ValueError: If a size is too small, or `prototypes` has another shape.

        Examples:
            >>> InfoIGLState.start(3, 8).memory_bank.shape
            torch.Size([3, 10, 8])
        """
        for name, value, least in (
            ("num_classes", num_classes, 2),
            ("dim", dim, 1),
            ("num_negatives", num_negatives, 1),
        ):
            check_count(name, value, least)
        if prototypes is not None and prototypes.shape != (num_classes, dim):
            raise ValueError(f"prototypes must be ({num_classes}, {dim}), got {tuple(prototypes.shape)}")
        return cls(prototypes, _normal((num_classes, num_negatives, dim), generator, torch.device(device or "cpu")))


class LossParts(NamedTuple):
    """The total and its parts, scalars without the weights; only `loss` has a graph.

    Attributes:
        loss: What is minimised.
        loss_pred: Cross-entropy of the classifier.
        loss_sem: Contrast against prototypes.
        loss_ins: Contrast against hard negatives.
        state: State after this batch.
    """

    loss: Tensor
    loss_pred: Tensor
    loss_sem: Tensor
    loss_ins: Tensor
    state: InfoIGLState


def update_prototypes(
    z: Tensor,
    y: Tensor,
    prototypes: Tensor | None,
    *,
    temperature: float = 5.0,
    num_classes: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return the class prototypes after a batch (Mao et al., 2026, eq. 15).

    $$
    m_i=\operatorname*{softmax}_{i:\,y_i=c}\big(\cos(z_i,w_c)/t\big),\qquad w_c\leftarrow\sum_{i:\,y_i=c}m_iz_i
    $$

    A class without a member in the batch keeps its prototype. Without earlier prototypes the class means are taken; a
    class missing from that first batch gets a standard normal row.

    Args:
        z: Graph vectors, shape `(B, d)`, floating; treated as constants.
        y: Classes, shape `(B,)`, integers in $[0,C)$.
        prototypes: $w$, shape `(C, d)`; None on the first batch.
        temperature: $t>0$.
        num_classes: C; needed where `prototypes` is None.
        generator: Source of the rows of missing classes.

    Returns:
        New prototypes, shape `(C, d)`, without a graph; float32 where `z` is in half precision.

    Raises:
        ValueError: If a shape or dtype doesn't fit, `y` is out of range, `num_classes` is missing or differs from the
            rows of `prototypes`, or `temperature` isn't a positive finite number.

    Examples:
        >>> import torch
        >>> z, y = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 4.0]]), torch.tensor([0, 1, 1])
        >>> update_prototypes(z, y, None, num_classes=2)
        tensor([[1., 0.],
                [0., 3.]])
    """
    check_positive("temperature", temperature)
    if prototypes is None:
        if num_classes is None:
            raise ValueError("num_classes is needed where prototypes is None, got None")
        check_count("num_classes", num_classes, 2)
        _check_batch(z, y, num_classes)
        z, member = upcast(z.detach()), _membership(y, num_classes)
        count = member.sum(1, keepdim=True)
        means = member.to(z.dtype) @ z / count.clamp(min=1)
        return torch.where(count > 0, means, _normal(means.shape, generator, z.device).to(z.dtype))
    if num_classes not in (None, len(prototypes)):
        raise ValueError(f"num_classes must be the rows of prototypes, {len(prototypes)}, got {num_classes!r}")
    _check_with_prototypes(z, y, prototypes)
    z, member = upcast(z.detach()), _membership(y, len(prototypes))
    old = prototypes.detach().to(z.dtype)
    score = F.normalize(old, dim=1) @ F.normalize(z, dim=1).T / temperature
    # A finite fill keeps the row of a missing class free of NaN; it is thrown away below.
    weight = score.masked_fill(~member, torch.finfo(score.dtype).min).softmax(1)
    return torch.where(member.any(1, keepdim=True), weight @ z, old)


def semantic_loss(
    z: Tensor, y: Tensor, prototypes: Tensor, *, variant: Variant = "official", tau: float = 1.0
) -> Tensor:
    r"""Contrast graphs with the prototypes of all classes.

    $$
    \text{paper (eq. 16): } -\frac1B\sum_i\log\operatorname*{softmax}_k\big(z_i^\top w_k/\tau\big)_{y_i}\qquad
    \text{official: } -\frac1B\sum_i\log\operatorname*{softmax}_k\big(p_{ik}\big)_{y_i},\quad
    p_{ik}=\operatorname*{softmax}_k\big(\cos(z_i,w_k)/\tau\big)
    $$

    The official form applies softmax twice. It lies between $\log(e+C-1)-1$ and $\log(e+C-1)$, with a small gradient;
    the published weights were tuned with it.

    Args:
        z: Graph vectors, shape `(B, d)`, floating.
        y: Classes, shape `(B,)`, integers in $[0,C)$.
        prototypes: $w$, shape `(C, d)`; from `update_prototypes`.
        variant: `"official"` or `"paper"`.
        tau: $\tau>0$; 1 in the paper's settings and in the authors' code.

    Returns:
        The loss, a scalar in the dtype of `z`; half precision is computed in float32.

    Raises:
        ValueError: If a shape or dtype doesn't fit, `prototypes` is None, `y` is out of range, `tau` isn't a positive
            finite number or `variant` is unknown.

    Examples:
        >>> import torch
        >>> z, y, w = 5 * torch.eye(2), torch.tensor([0, 1]), torch.eye(2)
        >>> semantic_loss(z, y, w), semantic_loss(z, y, w, variant="paper")
        (tensor(0.4885), tensor(0.0067))
    """
    check_choice("variant", variant, VARIANTS)
    check_positive("tau", tau)
    _check_with_prototypes(z, y, prototypes)
    dtype, z = z.dtype, upcast(z)
    w = prototypes.to(z.dtype)
    if variant == "paper":
        return F.cross_entropy(z @ w.T / tau, y).to(dtype)
    logits = F.normalize(z, dim=1) @ F.normalize(w, dim=1).T / tau
    return F.cross_entropy(logits.softmax(1), y).to(dtype)


def instance_loss(
    z: Tensor,
    y: Tensor,
    prototypes: Tensor,
    memory_bank: Tensor,
    *,
    variant: Variant = "official",
    lambda_c: float = 0.7,
    num_negatives: int = 10,
    tau: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Contrast graphs with a graph of their class and with negatives of others (Mao et al., 2026, eq. 18-19).

    $$
    z'_i=\lambda_cz_i+(1-\lambda_c)w_{y_i},\qquad
    s_i=\tfrac1\tau\big[z_i'^\top z'_{p(i)},\,z_i'^\top n_1,\dots,z_i'^\top n_K\big],\qquad
    \mathcal L=-\frac1B\sum_i\log\operatorname{softmax}(s_i)_1
    $$

    - `"paper"`: $p(i)$ is a random *other* member of the class (itself if alone), the negatives of class $c$ are the $K$
      vectors $z'$ of other classes with the largest $w_c^\top z'$. The draw doesn't depend on the order of the batch.
    - `"official"`: $p(i)$ is the first member of the class in the batch, also for itself; the negatives are the $K$
      with the *smallest* $w_c^\top z'$; $\operatorname{softmax}(s_i)$ takes the place of $s_i$, so softmax is applied
      twice.

    With fewer than $K$ candidates the first rows of the class's memory go before them, as constants. What a class used is
    its new memory.

    Args:
        z: Graph vectors, shape `(B, d)`, floating.
        y: Classes, shape `(B,)`, integers in $[0,C)$.
        prototypes: $w$, shape `(C, d)`; from `update_prototypes`.
        memory_bank: Last negatives of every class, shape `(C, K, d)`.
        variant: `"official"` or `"paper"`.
        lambda_c: $\lambda_c\in[0,1]$, share of the graph in $z'$.
        num_negatives: $K$, the second dimension of `memory_bank`.
        tau: $\tau>0$; 1 in the paper's settings and in the authors' code.
        generator: Source of the positives of the paper's form, on any device; not used by the official one.

    Returns:
        The loss, a scalar in the dtype of `z` (half precision is computed in float32), and the new memory, which has no
        graph and the dtype of `memory_bank`.

    Raises:
        ValueError: If a shape or dtype doesn't fit, `prototypes` is None, `y` is out of range, `lambda_c` is outside
            [0, 1], `tau` isn't a positive finite number, or `variant` is unknown.

    Examples:
        >>> import torch
        >>> z, y = torch.tensor([[4.0, 0.0], [4.0, 0.0], [0.0, 4.0]]), torch.tensor([0, 0, 1])
        >>> bank = torch.zeros(2, 1, 2)
        >>> loss, bank = instance_loss(z, y, torch.eye(2), bank, variant="paper", num_negatives=1, lambda_c=1.0)
        >>> loss, bank[0], bank[1]
        (tensor(1.1921e-07), tensor([[0., 4.]]), tensor([[4., 0.]]))
    """
    check_choice("variant", variant, VARIANTS)
    check_positive("tau", tau)
    check_fraction("lambda_c", lambda_c)
    _check_with_prototypes(z, y, prototypes)
    expected = (prototypes.shape[0], num_negatives, z.shape[1])
    check_count("num_negatives", num_negatives)
    if memory_bank.shape != expected:
        raise ValueError(f"memory_bank must be (C, num_negatives, d) = {expected}, got {tuple(memory_bank.shape)}")
    dtype, z = z.dtype, upcast(z)
    w, bank = prototypes.to(z.dtype), memory_bank.detach().to(z.dtype)
    mixed = lambda_c * z + (1 - lambda_c) * w[y]
    member = _membership(y, len(w))
    with torch.no_grad():
        similarity = w @ mixed.T
        nearness = -similarity if variant == "paper" else similarity
        positive = _other_members(y, similarity, len(w), generator) if variant == "paper" else _first_members(member)[y]
    negatives = _negatives(mixed, member, nearness, y, bank)
    all_scores = (mixed @ negatives.reshape(-1, z.shape[1]).T).view(len(z), len(w), num_negatives)
    own = all_scores.gather(1, y[:, None, None].expand(-1, 1, num_negatives)).squeeze(1)
    scores = torch.cat([(mixed * mixed[positive]).sum(1, keepdim=True), own], 1) / tau
    if variant == "official":
        scores = scores.softmax(1)
    loss = F.cross_entropy(scores, torch.zeros_like(y))
    new_bank = torch.where(member.any(1)[:, None, None], negatives.detach(), bank)
    return loss.to(dtype), new_bank.to(memory_bank.dtype)


def infoigl_loss(
    logits: Tensor,
    z: Tensor,
    y: Tensor,
    state: InfoIGLState,
    *,
    lambda_s: float = 0.5,
    lambda_i: float = 0.5,
    lambda_c: float = 0.7,
    pred_weight: float = 1.0,
    variant: Variant = "official",
    tau: float = 1.0,
    temperature: float = 5.0,
    generator: torch.Generator | None = None,
) -> LossParts:
    r"""Return the objective of a batch and the state after it (Mao et al., 2026, eq. 21).

    $$\mathcal L=\beta\,\mathrm{CE}(\text{logits},y)+\lambda_s\mathcal L_{\text{sem}}+\lambda_i\mathcal L_{\text{ins}}$$

    The prototypes are brought up to date first, without a gradient; both contrasts see the new ones.

    Args:
        logits: Raw scores of the classifier, shape `(B, C)`.
        z: Graph vectors, shape `(B, d)`.
        y: Classes, shape `(B,)`, integers in $[0,C)$.
        state: State before the batch, from `InfoIGLState.start` or the last call.
        lambda_s: $\lambda_s\ge0$, weight of `semantic_loss`.
        lambda_i: $\lambda_i\ge0$, weight of `instance_loss`.
        lambda_c: Share of the graph in $z'$, in [0, 1].
        pred_weight: $\beta\ge0$; the authors' code has 0.5 unless told otherwise, the paper's equation 1.
        variant: Form of both contrasts, `"official"` or `"paper"`.
        tau: Temperature of both contrasts, > 0.
        temperature: Temperature of `update_prototypes`, > 0.
        generator: Source of everything random.

    Returns:
        The total, its parts and the new state.

    Raises:
        ValueError: If a weight is negative or not finite, a shape doesn't fit, or for the reasons of the parts.

    Examples:
        >>> import torch
        >>> y = torch.tensor([0, 1, 1])
        >>> state = InfoIGLState.start(2, 4, generator=torch.Generator().manual_seed(0))
        >>> parts = infoigl_loss(torch.zeros(3, 2), torch.ones(3, 4), y, state, lambda_s=0.5, lambda_i=0.0)
        >>> parts.loss, parts.loss_pred, parts.loss_sem
        (tensor(1.0397), tensor(0.6931), tensor(0.6931))
    """
    _check_weights(lambda_s, lambda_i, pred_weight)
    classes, num_negatives = state.memory_bank.shape[:2]
    if logits.shape != (len(z), classes):
        raise ValueError(f"logits must be (B, C) = {(len(z), classes)}, got {tuple(logits.shape)}")
    prototypes = update_prototypes(
        z, y, state.prototypes, temperature=temperature, num_classes=classes, generator=generator
    )
    pred = F.cross_entropy(upcast(logits), y)
    sem = semantic_loss(z, y, prototypes, variant=variant, tau=tau)
    ins, bank = instance_loss(
        z,
        y,
        prototypes,
        state.memory_bank,
        variant=variant,
        lambda_c=lambda_c,
        num_negatives=num_negatives,
        tau=tau,
        generator=generator,
    )
    loss = pred_weight * pred + lambda_s * sem + lambda_i * ins
    return LossParts(loss, pred.detach(), sem.detach(), ins.detach(), InfoIGLState(prototypes, bank))


class InfoIGL(nn.Module):
    r"""Encoder, redundancy filter, classifier and the vector that is contrasted.

    $$z_G=\sum_{i\in G}\operatorname{relu}\big(\mathrm{WGCN}(\mathrm{BN}(\alpha\odot h),E,\beta)\big)_i$$

    with $\alpha$ and $\beta$ the second column of `attention_split` on the node embeddings $h$, and WGCN as
    `weighted_gcn_conv`.

    Args:
        in_channels: Node features F.
        num_classes: C >= 2.
        encoder: "gin", "gcn" or "gat" for a `ConvStack`, or a module (x, edge_index) -> [n, d] with an attribute
            `hidden` = d, which then replaces `hidden`, `num_layers` and `dropout` of the encoder.
        hidden: d.
        num_layers: Convolutions of the encoder.
        dropout: Of the encoder and the projection, in [0, 1].
        filter: Whether attention filters; without it $z_G$ is the sum of $h$.
        projection: "mlp" contrasts a projection to d // 2 dimensions in place of $z_G$ itself; the classifier reads
            $z_G$ either way.

    Raises:
        ValueError: If a size, `dropout`, `encoder` or `projection` is not accepted.

    Examples:
        >>> import torch
        >>> from torch_geometric.data import Batch, Data
        >>> graph = Data(x=torch.randn(3, 2), edge_index=torch.tensor([[0, 1], [1, 2]]))
        >>> out = InfoIGL(2, 3, hidden=8)(Batch.from_data_list([graph, graph]))
        >>> {name: tuple(value.shape) for name, value in out.items()}
        {'logits': (2, 3), 'z': (2, 8), 'node_att': (6,), 'edge_att': (4,)}
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        encoder: Encoder | nn.Module = "gin",
        hidden: int = 128,
        num_layers: int = 3,
        dropout: float = 0.5,
        filter: bool = True,  # noqa: A002  # the paper's word
        projection: Literal["mlp"] | None = None,
    ) -> None:
        super().__init__()
        check_count("num_classes", num_classes, 2)
        if projection not in (None, "mlp"):
            raise ValueError(f"projection must be None or 'mlp', got {projection!r}")
        if not isinstance(encoder, nn.Module):
            check_choice("encoder", encoder, ("gin", "gcn", "gat"))
            encoder = ConvStack(in_channels, hidden, num_layers, encoder, dropout)
        self.encoder = encoder
        hidden = int(encoder.hidden)  # type: ignore[arg-type]
        if projection and hidden < 2:
            raise ValueError(f"hidden must be at least 2 with projection 'mlp', got {hidden}")
        self.num_classes = num_classes
        self.contrast_dim = hidden if projection is None else hidden // 2
        self.redundancy_filter = _RedundancyFilter(hidden) if filter else None
        self.projection = _projection(hidden, self.contrast_dim, dropout) if projection else None
        self.head = readout_head(hidden, num_classes)

    def forward(self, data: Data) -> dict[str, Tensor]:
        """Return `logits` [B, C], `z` [B, d or d // 2], and the attention `node_att` [n] and `edge_att` [m] in [0, 1]."""
        index, num_graphs = graph_index(data)
        h = self.encoder(data.x, data.edge_index)
        if self.redundancy_filter is None:
            node_att, edge_att = h.new_ones(len(h)), h.new_ones(data.edge_index.shape[1])
        else:
            h, node_att, edge_att = self.redundancy_filter(h, data.edge_index)
        graph = pool(h, index, num_graphs, "sum")
        z = graph if self.projection is None else self.projection(graph)
        return {"logits": self.head(graph), "z": z, "node_att": node_att, "edge_att": edge_att}

    def predict(self, data: Data) -> Tensor:
        """Return the logits alone, [B, C]."""
        return self(data)["logits"]  # type: ignore[no-any-return]


class _RedundancyFilter(nn.Module):
    """The causal branch of CAL's layer: scores, then one convolution of what is left."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.split = SoftSplit(hidden)
        self.norm = nn.BatchNorm1d(hidden)
        nn.init.constant_(self.norm.bias, 1e-4)  # as in the authors' code
        self.conv = WeightedGCNConv(hidden, hidden)

    def forward(self, h: Tensor, edge_index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        split = self.split(h, edge_index)
        node, edge = split["node_causal"], split["edge_causal"]
        return self.conv(self.norm(node[:, None] * h), edge_index, edge).relu(), node, edge


def _projection(hidden: int, out: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(hidden, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, out),
        nn.BatchNorm1d(out),
        nn.ReLU(),
    )


class InfoIGLTrainer:
    r"""Train an `InfoIGL` with Adam and a cosine; its contrastive state is part of the checkpoint.

    The memory bank starts anew in every epoch, as in the authors' code; prototypes persist. Everything random in the
    losses has a stream of its own, so `lambda_s=lambda_i=0` trains exactly as the cross-entropy alone would.

    Args:
        model: The network.
        lr: Learning rate, > 0.
        weight_decay: L2 term of Adam, >= 0.
        lambda_s: Weight of `semantic_loss`, >= 0.
        lambda_i: Weight of `instance_loss`, >= 0; the paper finds values above 0.6 harmful.
        lambda_c: Share of the graph in $z'$, in [0, 1].
        pred_weight: Weight of the cross-entropy, >= 0.
        variant: Form of both contrasts, "official" or "paper".
        num_negatives: K >= 1.
        tau: Temperature of both contrasts, > 0.
        temperature: Temperature of `update_prototypes`, > 0.

    Attributes:
        state: The present `InfoIGLState`.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> import torch
        >>> from torch_geometric.data import Data
        >>> from torch_geometric.loader import DataLoader
        >>> edges = torch.tensor([[0, 1], [1, 0]])
        >>> graphs = [Data(x=torch.full((2, 1), float(i % 2)), edge_index=edges, y=i % 2) for i in range(8)]
        >>> loader = DataLoader(graphs, batch_size=4, shuffle=True)
        >>> trainer = InfoIGLTrainer(InfoIGL(1, 2, hidden=8))
        >>> history = trainer.fit(loader, loader, epochs=2)
        >>> sorted(history.records[0])
        ['epoch', 'loss', 'loss_ins', 'loss_pred', 'loss_sem', 'seconds', 'val_accuracy']
    """

    def __init__(
        self,
        model: InfoIGL,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        lambda_s: float = 0.5,
        lambda_i: float = 0.5,
        lambda_c: float = 0.7,
        pred_weight: float = 1.0,
        variant: Variant = "official",
        num_negatives: int = 10,
        tau: float = 1.0,
        temperature: float = 5.0,
    ) -> None:
        check_positive("lr", lr)
        check_not_negative("weight_decay", weight_decay)
        _check_weights(lambda_s, lambda_i, pred_weight)
        check_fraction("lambda_c", lambda_c)
        check_choice("variant", variant, VARIANTS)
        check_count("num_negatives", num_negatives)
        check_positive("tau", tau)
        check_positive("temperature", temperature)
        self.model, self.num_negatives = model, num_negatives
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay)
        self._options: dict[str, Any] = {
            "lambda_s": lambda_s,
            "lambda_i": lambda_i,
            "lambda_c": lambda_c,
            "pred_weight": pred_weight,
            "variant": variant,
            "tau": tau,
            "temperature": temperature,
        }
        self.state: InfoIGLState | None = None
        self._generator: torch.Generator | None = None

    def start_epoch(self) -> InfoIGLState:
        """Begin an epoch: a new memory bank, and a random stream that depends on torch's seed but takes nothing from it."""
        device = self._device()
        self._generator = torch.Generator(device).manual_seed(torch.initial_seed())
        old = self.state.prototypes if self.state is not None else None
        self.state = InfoIGLState.start(
            self.model.num_classes,
            self.model.contrast_dim,
            num_negatives=self.num_negatives,
            prototypes=None if old is None else old.to(device),
            generator=self._generator,
            device=device,
        )
        return self.state

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Take one gradient step on a batch; returns `loss`, `loss_pred`, `loss_sem` and `loss_ins`, detached."""
        state = self.state or self.start_epoch()
        self.optimizer.zero_grad()
        out = self.model(batch)
        y = batch.y.view(-1)
        parts = infoigl_loss(out["logits"], out["z"], y, state, generator=self._generator, **self._options)
        parts.loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.state = parts.state
        return {
            "loss": parts.loss.detach(),
            "loss_pred": parts.loss_pred,
            "loss_sem": parts.loss_sem,
            "loss_ins": parts.loss_ins,
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Return the memory bank and the prototypes, without the keys that do not exist yet."""
        found = {} if self.state is None else self.state._asdict()
        return {name: value for name, value in found.items() if value is not None}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` returned, onto the device of the model."""
        bank = state_dict.get("memory_bank")
        if bank is None:
            self.state = None
            return
        shape = (self.model.num_classes, self.num_negatives, self.model.contrast_dim)
        if bank.shape != shape:
            raise ValueError(f"memory_bank must be {shape}, got {tuple(bank.shape)}")
        device, prototypes = self._device(), state_dict.get("prototypes")
        self.state = InfoIGLState(None if prototypes is None else prototypes.to(device), bank.to(device))

    def fit(
        self,
        train_loader: Iterable[Batch],
        val_loader: Iterable[Batch] | None = None,
        test_loaders: Mapping[str, Iterable[Batch]] | None = None,
        *,
        epochs: int = 200,
        min_lr: float = 1e-6,
        warmup_select: int = 0,
        metric: Metric = "accuracy",
        seed: int = 0,
        device: str | torch.device = "cpu",
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = True,
        on_epoch: Callable[[dict[str, float]], None] | None = None,
    ) -> History:
        """Train with `graph_ood.training.fit`; the model ends with the parameters of its best validation epoch.

        Args:
            train_loader: PyG loader of training graphs whose `y` is a class.
            val_loader: Chooses the epoch; None keeps the last one.
            test_loaders: Further sets to evaluate each epoch, by name; they choose nothing.
            epochs: Number of epochs, >= 1.
            min_lr: Where the cosine ends, >= 0.
            warmup_select: Epochs that can't be chosen, in [0, epochs); 40 for Motif in the paper's settings.
            metric: "accuracy" or "roc_auc" (two classes).
            seed: Source of all randomness of the run.
            device: Where to train.
            checkpoint: safetensors file that is replaced after every epoch; prototypes and memory are in it.
            resume: Whether to continue from `checkpoint` where it exists.
            on_epoch: Called with the record of every finished epoch.

        Returns:
            The history; records hold the parts of the loss.

        Raises:
            ValueError: If an argument is out of range, a class is outside [0, C), or the checkpoint doesn't fit.
            RuntimeError: If a loss isn't finite.
        """
        return fit(
            self.model,
            _Epochs(train_loader, self.model.num_classes, self.start_epoch),
            step=self.step,
            predict=self.model.predict,
            optimizers=[self.optimizer],
            val_loader=val_loader,
            test_loaders=test_loaders,
            epochs=epochs,
            scheduler="cosine",
            min_lr=min_lr,
            warmup_select=warmup_select,
            metric=metric,
            seed=seed,
            device=device,
            checkpoint=checkpoint,
            resume=resume,
            on_epoch=on_epoch,
            extra=self,
            settings={"method": "infoigl", "num_negatives": self.num_negatives, **self._options},
        )

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


class _Epochs:
    """A loader that tells when an epoch begins, and looks at the classes while they are still on the host."""

    def __init__(self, loader: Iterable[Batch], num_classes: int, begin: Callable[[], object]) -> None:
        self.loader, self.num_classes, self.begin = loader, num_classes, begin
        self.generator = getattr(loader, "generator", None)

    def __iter__(self) -> Iterator[Batch]:
        self.begin()
        for batch in self.loader:
            _check_range(batch.y, self.num_classes)
            yield batch


# --- parts of the losses ------------------------------------------------------------------------------------------------


def _check_weights(lambda_s: float, lambda_i: float, pred_weight: float) -> None:
    for name, value in (("lambda_s", lambda_s), ("lambda_i", lambda_i), ("pred_weight", pred_weight)):
        check_not_negative(name, value)


def _check_batch(z: Tensor, y: Tensor, num_classes: int) -> None:
    check_matrix("z", z)
    if len(z) == 0:
        raise ValueError("z must have at least one row, got an empty batch")
    if y.shape != z.shape[:1] or y.dtype != torch.int64:
        raise ValueError(f"y must be an int64 tensor of shape [{len(z)}], got {y.dtype} {tuple(y.shape)}")
    _check_range(y, num_classes)


def _check_range(y: Tensor, num_classes: int) -> None:
    if y.device.type != "cpu":  # a look at the values would wait for the device
        return
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"y must be in [0, {num_classes}), got values from {low} to {high}")


def _check_with_prototypes(z: Tensor, y: Tensor, prototypes: Tensor | None) -> None:
    if prototypes is None:
        raise ValueError("prototypes must be a [C, d] tensor, got None: take those of update_prototypes")
    check_matrix("z", z)
    check_matrix("prototypes", prototypes, z.shape[1])
    if len(prototypes) < 2:
        raise ValueError(f"prototypes must have a row for each of 2 or more classes, got {len(prototypes)}")
    _check_batch(z, y, len(prototypes))


def _membership(y: Tensor, num_classes: int) -> Tensor:
    """Return which graph belongs to which class, (C, B)."""
    return torch.arange(num_classes, device=y.device)[:, None] == y


def _first_members(member: Tensor) -> Tensor:
    """Return the first row of every class, (C,); 0 where there is none."""
    return member.to(torch.uint8).argmax(1)


def _other_members(y: Tensor, similarity: Tensor, num_classes: int, generator: torch.Generator | None) -> Tensor:
    """Draw another member of the class for every row, (B,).

    Draws belong to places in the order by class and similarity to the prototype, so that a permutation of the batch
    changes nothing.
    """
    order = similarity.gather(0, y[None]).squeeze(0).argsort()
    order = order[y[order].argsort(stable=True)]
    sorted_y = y[order]
    count = torch.zeros(num_classes, dtype=torch.long, device=y.device).index_add_(0, y, torch.ones_like(y))
    start, size = (count.cumsum(0) - count)[sorted_y], count[sorted_y]
    place = torch.arange(len(y), device=y.device) - start
    source = generator.device if generator is not None else y.device
    uniform = torch.rand(len(y), generator=generator, device=source).to(y.device)
    step = 1 + (uniform * (size - 1)).long()  # 1 .. size - 1; a class of one comes back to itself
    return torch.empty_like(y).index_copy_(0, order, order[start + (place + step) % size])


def _negatives(mixed: Tensor, member: Tensor, nearness: Tensor, y: Tensor, bank: Tensor) -> Tensor:
    """Return the negatives of every class, (C, K, d): the K candidates of smallest `nearness`, topped up from the bank."""
    size = bank.shape[1]
    found = (~member).sum(1, keepdim=True).clamp(max=size)
    # With too few to choose from all are taken, in the order of the classes.
    by_class = torch.empty_like(y).index_copy_(0, y.argsort(stable=True), torch.arange(len(y), device=y.device))
    key = torch.where(found == size, nearness, by_class.to(nearness.dtype)).masked_fill(member, torch.inf)
    chosen = key.topk(min(size, len(y)), dim=1, largest=False).indices
    place = torch.arange(size, device=y.device) - (size - found)  # below 0: a row of the bank
    index = chosen.gather(1, place.clamp(0, chosen.shape[1] - 1))
    return torch.where((place >= 0)[:, :, None], mixed[index], bank)


def _normal(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
    source = generator.device if generator is not None else device
    return torch.randn(shape, generator=generator, device=source).to(device)
