r"""AIA: adversarial invariant augmentation against covariate shift of graphs.

Test graphs may have environments that no training graph has. Two networks give every node and edge a mask: the
adversarial one moves the graph as far from the training graphs as the classifier notices, the stable one keeps what
decides the label out of its reach. The classifier learns from the stable part and from the augmented graph:

$$
\begin{aligned}
\tilde M&=(1-M_{sta})\odot M_{adv}+M_{sta}\\
\min_{\theta,\theta_2}\;&\ell\big(f(g\odot M_{sta}),y\big)+\ell\big(f(g\odot\tilde M),y\big)
  +\beta_s\,R(M_{sta};\lambda_s)\\
\max_{\theta_1}\;&\ell\big(f(g\odot M_{adv}),y\big)-\gamma\,c(g\odot M_{adv},g)-\beta_a\,R(M_{adv};\lambda_a)
\end{aligned}
$$

Reference: Y. Sui, Q. Wu, J. Wu, Q. Cui, L. Li, J. Zhou, X. Wang, X. He, *Unleashing the Power of Graph Data Augmentation
on Covariate Distribution Shift*, NeurIPS 2023, arXiv:2211.02843, eq. 6-10 and algorithm 2. Documentation:
`docs/papers/graph-ood/aia.md`.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch_geometric.data import Data  # type: ignore[import-untyped]
from torch_geometric.loader import DataLoader  # type: ignore[import-untyped]
from torch_geometric.transforms import BaseTransform  # type: ignore[import-untyped]

from graph_ood._checks import check_choice, check_count, check_not_negative, check_positive, check_target, upcast
from graph_ood._sparse import edge_routes, propagate
from graph_ood.nets import ConvStack, WeightedGINConv, graph_index, pool, weighted_gin_conv
from graph_ood.training import fit, supervised_step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor
    from torch_geometric.data import Batch, Dataset

    from graph_ood._sparse import Routes
    from graph_ood.training import History

__all__ = [
    "AIA",
    "AIAObjectives",
    "AIATrainer",
    "DomainEncoder",
    "MaskAugmentation",
    "MaskNet",
    "Masks",
    "WeightedGINConv",
    "combine_masks",
    "graph_covariate_shift",
    "mask_regularizer",
    "objectives",
    "train_domain_encoder",
    "weighted_gin_conv",
]

Task = Literal["multiclass", "binary"]
MaskKind = Literal["combined", "stable", "adversarial"]
Encoder = Literal["gin", "gcn", "gat"]

_TINY = 1e-8


class Masks(NamedTuple):
    """Weights of one batch of graphs.

    Attributes:
        node: One weight in (0, 1) per node, shape `(n,)`.
        edge: One weight in (0, 1) per directed edge, shape `(m,)`.
    """

    node: Tensor
    edge: Tensor


class AIAObjectives(NamedTuple):
    """Losses of the two steps.

    Attributes:
        loss_stable_step: What the classifier and the stable network minimise.
        loss_adv_step_minimised: What the adversarial network minimises, the negative of its objective.
        transport_cost: How far the adversarial graph is from the graph, in the classifier's eyes.
    """

    loss_stable_step: Tensor
    loss_adv_step_minimised: Tensor
    transport_cost: Tensor


def combine_masks(mask_stable: Tensor, mask_adv: Tensor, *, validate: bool = True) -> Tensor:
    r"""Mask of the augmented graph: the adversarial one where nothing is stable.

    $$\tilde M=(1-M_{sta})\odot M_{adv}+M_{sta}$$

    Source: Sui et al., 2023, below eq. 8. The gradient reaches the stable mask in both places.

    Args:
        mask_stable: $M_{sta}$ in [0, 1], any shape.
        mask_adv: $M_{adv}$ in [0, 1], the same shape.
        validate: Look at the values, which waits for the device.

    Returns:
        $\tilde M$, between `mask_stable` and 1.

    Raises:
        ValueError: If the shapes differ, or a mask holds NaN or a value outside [0, 1].

    Examples:
        >>> import torch
        >>> combine_masks(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.2, 0.2, 0.2]))
        tensor([0.2000, 0.6000, 1.0000])
    """
    if mask_stable.shape != mask_adv.shape:
        shapes = f"{tuple(mask_stable.shape)} and {tuple(mask_adv.shape)}"
        raise ValueError(f"mask_stable and mask_adv must have one shape, got {shapes}")
    if validate:
        _check_mask("mask_stable", mask_stable)
        _check_mask("mask_adv", mask_adv)
    return (1 - mask_stable) * mask_adv + mask_stable


def mask_regularizer(
    mask: Tensor,
    graph_index: Tensor,
    *,
    num_graphs: int,
    ratio: float,
    count_term: bool = True,
    validate: bool = True,
) -> Tensor:
    r"""Distance of the mean mask of each graph from a wanted ratio.

    $$
    R=\frac1B\sum_g\Big|\frac{s_g}{s_g+u_g}-\lambda\Big|+\frac1B\sum_g\Big(\frac{\#\{M>0\}_g}{K_g}-\lambda\Big),
    \qquad s_g=\sum M+10^{-8},\quad u_g=\sum(1-M)+10^{-8}
    $$

    Source: Sui et al., 2023, eq. 9-10 and the authors' code. The second sum has no gradient: a sigmoid is above 0, so it
    is the constant $1-\lambda$. Graphs without elements (no edges, say) count in neither mean; where no graph has any,
    the result is 0.

    Args:
        mask: $M$ in [0, 1], shape `(K,)`, floating.
        graph_index: Graph of every element, shape `(K,)`, integer in [0, `num_graphs`).
        num_graphs: $B\ge1$.
        ratio: $\lambda$ in (0, 1]; 1 asks for masks that keep everything.
        count_term: Add the second sum, as published.
        validate: Look at the values of `mask` and `graph_index`, which waits for the device.

    Returns:
        A scalar in the dtype of `mask`; half precision is summed in float32.

    Raises:
        ValueError: If `mask` holds NaN or a value outside [0, 1], `graph_index` has another shape or dtype or holds an
            index >= `num_graphs`, `ratio` isn't in (0, 1], or `num_graphs` < 1.

    Examples:
        >>> import torch
        >>> mask_regularizer(
        ...     torch.tensor([0.9, 0.7, 0.2]), torch.tensor([0, 0, 1]), num_graphs=2, ratio=0.5, count_term=False
        ... )
        tensor(0.3000)
    """
    _check_ratio("ratio", ratio)
    check_count("num_graphs", num_graphs)
    if mask.ndim != 1 or not mask.is_floating_point():
        raise ValueError(f"mask must be floating of shape (K,), got {mask.dtype} of shape {tuple(mask.shape)}")
    if graph_index.shape != mask.shape or graph_index.dtype not in (torch.int64, torch.int32):
        got = f"{graph_index.dtype} of shape {tuple(graph_index.shape)}"
        raise ValueError(f"graph_index must be integer of the shape of mask, {tuple(mask.shape)}, got {got}")
    if validate:
        _check_mask("mask", mask)
        _check_graph_index(graph_index, num_graphs)
    values = upcast(mask)
    zeros = values.new_zeros(num_graphs)
    count = zeros.index_add(0, graph_index, torch.ones_like(values))
    kept = zeros.index_add(0, graph_index, values)
    present = count > 0
    term = ((kept + _TINY) / (count + 2 * _TINY) - ratio).abs()
    if count_term:
        positive = zeros.index_add(0, graph_index, (values > 0).to(values.dtype))
        term = term + positive / count.clamp(min=1) - ratio
    total = torch.where(present, term, zeros).sum() / present.sum().clamp(min=1)
    return total.to(mask.dtype)


def objectives(
    logits_stable: Tensor,
    logits_augmented: Tensor,
    logits_adv: Tensor,
    h_adv: Tensor,
    h_orig: Tensor,
    reg_stable: Tensor,
    reg_adv: Tensor,
    target: Tensor,
    *,
    cau_reg: float,
    adv_dis: float,
    adv_reg: float,
    task: Task = "multiclass",
    validate: bool = True,
) -> AIAObjectives:
    r"""Losses of the stable and of the adversarial step.

    $$
    L_s=\ell(f_{sta},y)+\ell(\tilde f,y)+\beta_sR_{sta},\qquad
    -L_a=-\big[\ell(f_{adv},y)-\gamma\,c-\beta_aR_{adv}\big],\qquad c=\frac1{Bd}\sum\|h_{adv}-h\|_2^2
    $$

    Source: Sui et al., 2023, eq. 7-8. The cost is divided by $d$ as in the authors' code; the published $\gamma$ belong to
    that form.

    Args:
        logits_stable: Logits of the graphs under the stable mask, shape `(B, C)`.
        logits_augmented: Under the combined mask, `(B, C)`.
        logits_adv: Under the adversarial mask alone, `(B, C)`.
        h_adv: Pooled embeddings under the adversarial mask, `(B, d)`.
        h_orig: Pooled embeddings without a mask, `(B, d)`.
        reg_stable: $R_{sta}$, a scalar: nodes plus edges.
        reg_adv: $R_{adv}$, a scalar.
        target: Labels: `(B,)` integer in [0, C) for "multiclass"; `(B, C)` in {0, 1} or NaN (not labelled) for "binary".
        cau_reg: $\beta_s\ge0$.
        adv_dis: $\gamma\ge0$, weight of the transport cost.
        adv_reg: $\beta_a\ge0$.
        task: "multiclass" (cross entropy) or "binary" (binary cross entropy over the labelled entries).
        validate: Look at the values of `target`, which waits for the device.

    Returns:
        Both losses and the transport cost.

    Raises:
        ValueError: If `target` doesn't fit the logits or holds a class outside [0, C), a weight is negative, embeddings
            have different shapes, or `task` is unknown.

    Examples:
        >>> import torch
        >>> flat, h, zero = torch.zeros(4, 2), torch.ones(4, 3), torch.tensor(0.0)
        >>> y = torch.tensor([0, 1, 1, 0])
        >>> objectives(flat, flat, flat, h, h + 1, zero, zero, y, cau_reg=1, adv_dis=0.5, adv_reg=0.5).transport_cost
        tensor(1.)
    """
    for name, logits in (("logits_augmented", logits_augmented), ("logits_adv", logits_adv)):
        if logits.shape != logits_stable.shape:
            raise ValueError(f"{name} must have shape {tuple(logits_stable.shape)}, got {tuple(logits.shape)}")
    if h_adv.shape != h_orig.shape:
        raise ValueError(f"h_adv and h_orig must have one shape, got {tuple(h_adv.shape)} and {tuple(h_orig.shape)}")
    for name, weight in (("cau_reg", cau_reg), ("adv_dis", adv_dis), ("adv_reg", adv_reg)):
        check_not_negative(name, weight)
    _check_target(target, logits_stable, task, validate=validate)
    cost = _transport_cost(h_adv, h_orig)
    stable = _label_loss(logits_stable, target, task) + _label_loss(logits_augmented, target, task)
    attack = _label_loss(logits_adv, target, task) - adv_dis * cost - adv_reg * reg_adv
    return AIAObjectives(stable + cau_reg * reg_stable, -attack, cost)


def _transport_cost(h_adv: Tensor, h_orig: Tensor) -> Tensor:
    return F.mse_loss(upcast(h_adv), upcast(h_orig))


def _label_loss(logits: Tensor, target: Tensor, task: Task) -> Tensor:
    logits = upcast(logits)
    if task == "multiclass":
        return F.cross_entropy(logits, target)
    labelled = ~target.isnan()
    known = torch.where(labelled, target, 0).to(logits.dtype)
    loss = F.binary_cross_entropy_with_logits(logits, known, reduction="none")
    return (loss * labelled).sum() / labelled.sum().clamp(min=1)


def _check_mask(name: str, mask: Tensor) -> None:
    if not bool(((mask >= 0) & (mask <= 1)).all()):  # NaN is neither
        low, high = mask.detach().min().item(), mask.detach().max().item()
        raise ValueError(f"{name} must lie in [0, 1] without NaN, got values from {low} to {high}")


def _check_graph_index(graph_index: Tensor, num_graphs: int) -> None:
    if graph_index.numel() == 0:
        return
    low, high = int(graph_index.min()), int(graph_index.max())
    if low < 0 or high >= num_graphs:
        raise ValueError(f"graph_index must lie in [0, num_graphs) = [0, {num_graphs}), got {low} to {high}")


def _check_ratio(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name} must lie in (0, 1], got {value!r}")


def _check_target(target: Tensor, logits: Tensor, task: Task, *, validate: bool) -> None:
    check_choice("task", task, ("multiclass", "binary"))
    if logits.ndim != 2:
        raise ValueError(f"logits must have shape (B, C), got {tuple(logits.shape)}")
    if task == "binary":
        if target.shape != logits.shape or not target.is_floating_point():
            got = f"{target.dtype} of shape {tuple(target.shape)}"
            raise ValueError(f"target must be floating of shape {tuple(logits.shape)} for task 'binary', got {got}")
        if validate and not bool((target.isnan() | (target == 0) | (target == 1)).all()):
            raise ValueError("target must be 0, 1 or NaN (not labelled) for task 'binary'")
        return
    check_target(logits, target)
    if validate and target.numel():
        low, high = int(target.min()), int(target.max())
        if low < 0 or high >= logits.shape[1]:
            raise ValueError(f"target must lie in [0, {logits.shape[1]}), got {low} to {high}")


class MaskNet(nn.Module):
    r"""A network that gives every node and every directed edge a weight in (0, 1).

    $$z=\text{GNN}(g),\qquad M^x_i=\sigma(w^\top z_i+b),\qquad M^a_{ij}=\sigma(w'^\top[z_i\,\|\,z_j]+b')$$

    Source: Sui et al., 2023, eq. 6, and the authors' code.

    Args:
        in_channels: Node features F.
        hidden: Width d; a multiple of 4 for "gat".
        num_layers: Convolutions.
        dropout: After each layer, in [0, 1].
        encoder: "gin", "gcn" or "gat".

    Raises:
        ValueError: If a size or option is out of range.

    Examples:
        >>> import torch
        >>> masks = MaskNet(3, 8)(torch.ones(3, 3), torch.tensor([[0, 1], [1, 2]]))
        >>> masks.node.shape, masks.edge.shape
        (torch.Size([3]), torch.Size([2]))
    """

    def __init__(
        self, in_channels: int, hidden: int, num_layers: int = 2, dropout: float = 0.5, *, encoder: Encoder = "gin"
    ) -> None:
        super().__init__()
        self.encoder = _stack(in_channels, hidden, num_layers, encoder, dropout)
        self.node = nn.Linear(hidden, 1)
        self.edge = nn.Linear(2 * hidden, 1)

    def forward(
        self, x: Tensor, edge_index: Tensor, batch: Tensor | None = None, *, shared: _Shared | None = None
    ) -> Masks:
        """Return the masks.

        Args:
            x: Features `(n, F)`.
            edge_index: Edges `(2, m)`.
            batch: Graph of every node; without influence, since no layer mixes graphs except by batch norm.
            shared: What `AIA` has already computed on these graphs for another network.
        """
        del batch
        # w' [z_i || z_j] = left z_i + right z_j: three columns over the nodes in place of one product over the edges
        columns = torch.cat([self.node.weight, *self.edge.weight.chunk(2, 1)])
        if isinstance(self.encoder, _GINStack) and not self.encoder.training:
            weight, bias = self.encoder.affine()
            z = self.encoder.inner(x, edge_index, None, shared)
            score = F.linear(z, columns @ weight, columns @ bias)
        else:
            score = _encode(self.encoder, x, edge_index, shared) @ columns.T
        at = score.index_select(0, edge_index.flatten()).view(2, -1, 3)
        return Masks(
            (score[:, 0] + self.node.bias).sigmoid(),
            (at[0, :, 1] + at[1, :, 2] + self.edge.bias).sigmoid(),
        )


class AIA(nn.Module):
    r"""A graph classifier with an adversarial augmenter and a generator of the stable part.

    The masks are applied between two encoders: $h=\text{back}\big(\text{front}(g)\odot M^x;M^a\big)$, mean pooling, a
    linear layer. Predictions use the stable mask alone.

    Args:
        in_channels: Node features F.
        num_classes: Classes C, or labels per graph for task "binary".
        hidden: Width d; a multiple of 4 for "gat".
        front_layers: Convolutions before the masks.
        back_layers: Convolutions after the masks.
        mask_layers: Convolutions of either mask network.
        dropout: In [0, 1].
        stable_ratio: $\lambda_s$ in (0, 1], wanted mean of the stable mask on nodes and on edges.
        adv_node_ratio: $\lambda_a$ of the adversarial mask on nodes, in (0, 1]; 1 asks it to change little.
        adv_edge_ratio: The same on edges.
        encoder: "gin" (the layer of `weighted_gin_conv`), "gcn" or "gat".
        task: "multiclass" (labels `(B,)`) or "binary" (labels `(B, C)`, NaN where there is none).

    Raises:
        ValueError: If a size or option is out of range.

    Examples:
        >>> import torch
        >>> from torch_geometric.data import Batch, Data
        >>> edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
        >>> batch = Batch.from_data_list([Data(x=torch.ones(3, 1), edge_index=edges) for _ in range(4)])
        >>> model = AIA(1, 2, hidden=8)
        >>> model(batch).shape
        torch.Size([4, 2])
        >>> losses = model.stable_step(batch, torch.tensor([0, 1, 0, 1]))
        >>> sorted(losses)
        ['loss', 'loss_augmented', 'loss_stable', 'reg_stable']
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        hidden: int = 300,
        front_layers: int = 2,
        back_layers: int = 2,
        mask_layers: int = 2,
        dropout: float = 0.5,
        stable_ratio: float = 0.5,
        adv_node_ratio: float = 1.0,
        adv_edge_ratio: float = 0.8,
        encoder: Encoder = "gin",
        task: Task = "multiclass",
    ) -> None:
        super().__init__()
        check_count("num_classes", num_classes)
        check_choice("task", task, ("multiclass", "binary"))
        for name, value in (
            ("stable_ratio", stable_ratio),
            ("adv_node_ratio", adv_node_ratio),
            ("adv_edge_ratio", adv_edge_ratio),
        ):
            _check_ratio(name, value)
        self.num_classes, self.task = num_classes, task
        self.stable_ratio, self.adv_node_ratio, self.adv_edge_ratio = stable_ratio, adv_node_ratio, adv_edge_ratio
        self.front = _stack(in_channels, hidden, front_layers, encoder, dropout)
        self.back = _stack(hidden, hidden, back_layers, encoder, dropout)
        self.head = nn.Linear(hidden, num_classes)
        self.stable = MaskNet(in_channels, hidden, mask_layers, dropout, encoder=encoder)
        self.adversarial = MaskNet(in_channels, hidden, mask_layers, dropout, encoder=encoder)

    def forward(self, data: Data) -> Tensor:
        """Return the logits `(B, C)` under the stable mask."""
        shared = self._share(data)
        masks = self.stable(data.x, data.edge_index, shared=shared)
        h = _encode(self.front, data.x, data.edge_index, shared)
        return self.head(self._embed(data, h, masks, shared))  # type: ignore[no-any-return]

    def stable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the classifier and of the stable network."""
        return [p for module in self._stable_side() for p in module.parameters()]

    def adversarial_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the adversarial network."""
        return list(self.adversarial.parameters())

    def stable_step(self, data: Data, y: Tensor, *, cau_reg: float = 1.0) -> dict[str, Tensor]:
        r"""Return the loss of the stable step, to be minimised over `stable_parameters`.

        Puts the adversarial network in evaluation mode and the rest in training mode, and leaves them there. The two
        masked graphs pass the back encoder one after the other, so that each has its own batch statistics.

        Args:
            data: A batch of graphs with `x` and `edge_index`.
            y: Labels; their values are not looked at (`AIATrainer.fit` does, once).
            cau_reg: $\beta_s\ge0$.

        Returns:
            "loss", and its parts without their gradients: "loss_stable", "loss_augmented", "reg_stable".

        Raises:
            ValueError: If `y` doesn't fit the logits.
        """
        self.adversarial.eval()
        for module in self._stable_side():
            module.train()
        shared = self._share(data)
        h = _encode(self.front, data.x, data.edge_index, shared)
        masks = self.stable(data.x, data.edge_index, shared=shared)
        with torch.no_grad():
            attack = self.adversarial(data.x, data.edge_index, shared=shared)
        both = Masks(*(combine_masks(m, a, validate=False) for m, a in zip(masks, attack, strict=True)))
        logits, augmented = (self.head(self._embed(data, h, m, shared)) for m in (masks, both))
        _check_target(y, logits, self.task, validate=False)
        loss_stable, loss_augmented = _label_loss(logits, y, self.task), _label_loss(augmented, y, self.task)
        reg = self._regularizer(data, masks, self.stable_ratio, self.stable_ratio)
        return {
            "loss": loss_stable + loss_augmented + cau_reg * reg,
            "loss_stable": loss_stable.detach(),
            "loss_augmented": loss_augmented.detach(),
            "reg_stable": reg.detach(),
        }

    def adversarial_step(
        self, data: Data, y: Tensor, *, adv_dis: float = 0.2, adv_reg: float = 0.5
    ) -> dict[str, Tensor]:
        r"""Return the loss of the adversarial step, to be minimised over `adversarial_parameters`.

        Puts the adversarial network in training mode and the rest in evaluation mode, and leaves them there. Call
        `loss.backward(inputs=model.adversarial_parameters())`: the classifier needs no gradients here.

        Args:
            data: A batch of graphs with `x` and `edge_index`.
            y: Labels; their values are not looked at.
            adv_dis: $\gamma\ge0$, weight of the transport cost.
            adv_reg: $\beta_a\ge0$.

        Returns:
            "loss", and its parts without their gradients: "loss_adv", "transport_cost", "reg_adv".

        Raises:
            ValueError: If `y` doesn't fit the logits.
        """
        for module in self._stable_side():
            module.eval()
        self.adversarial.train()
        shared = self._share(data)
        masks = self.adversarial(data.x, data.edge_index, shared=shared)
        with torch.no_grad():
            h = _encode(self.front, data.x, data.edge_index, shared)
            original = self._embed(data, h, None, shared)
        moved = self._embed(data, h, masks, shared)
        logits = self.head(moved)
        _check_target(y, logits, self.task, validate=False)
        loss, cost = _label_loss(logits, y, self.task), _transport_cost(moved, original)
        reg = self._regularizer(data, masks, self.adv_node_ratio, self.adv_edge_ratio)
        return {
            "loss": -(loss - adv_dis * cost - adv_reg * reg),
            "loss_adv": loss.detach(),
            "transport_cost": cost.detach(),
            "reg_adv": reg.detach(),
        }

    @torch.no_grad()
    def augment(self, data: Data, kind: MaskKind = "combined") -> Masks:
        """Return masks of a batch or of one graph, in evaluation mode.

        Args:
            data: Graphs with `x` and `edge_index`.
            kind: "combined" (the augmented graph), "stable" (what decides the label) or "adversarial".

        Returns:
            The masks, without a graph of gradients.

        Raises:
            ValueError: If `kind` is unknown.

        Examples:
            >>> import torch
            >>> from torch_geometric.data import Data  # type: ignore[import-untyped]
            >>> graph = Data(x=torch.ones(3, 1), edge_index=torch.tensor([[0, 1], [1, 2]]))
            >>> AIA(1, 2, hidden=8).augment(graph, "stable").edge.shape
            torch.Size([2])
        """
        check_choice("kind", kind, ("combined", "stable", "adversarial"))
        if kind != "combined":
            net = self.stable if kind == "stable" else self.adversarial
            with _evaluating(net):
                masks: Masks = net(data.x, data.edge_index)
            return masks
        pairs = zip(self.augment(data, "stable"), self.augment(data, "adversarial"), strict=True)
        return Masks(*(combine_masks(m, a, validate=False) for m, a in pairs))

    def _stable_side(self) -> tuple[nn.Module, ...]:
        return self.front, self.back, self.head, self.stable

    def _embed(self, data: Data, h: Tensor, masks: Masks | None, shared: _Shared | None = None) -> Tensor:
        """Return the pooled back embeddings (B, d) of front embeddings h."""
        index, num_graphs = graph_index(data)
        weight = None if masks is None else masks.edge
        if masks is not None:
            h = h * masks.node.unsqueeze(-1)
        if not isinstance(self.back, _GINStack) or shared is None:
            return pool(self.back(h, data.edge_index, weight), index, num_graphs, "mean")
        shared = shared._replace(messages=None)
        if self.back.training:
            return pool(self.back(h, data.edge_index, weight, shared=shared), index, num_graphs, "mean")
        inner = self.back.inner(h, data.edge_index, weight, shared)
        return F.linear(pool(inner, index, num_graphs, "mean"), *self.back.affine())

    def _share(self, data: Data) -> _Shared | None:
        return _GINStack.share(data.x, data.edge_index) if isinstance(self.front, _GINStack) else None

    def _regularizer(self, data: Data, masks: Masks, node_ratio: float, edge_ratio: float) -> Tensor:
        """Nodes plus edges; an edge belongs to the graph of its source."""
        index, num_graphs = graph_index(data)
        of_edge = index.index_select(0, data.edge_index[0])
        node = mask_regularizer(masks.node, index, num_graphs=num_graphs, ratio=node_ratio, validate=False)
        return node + mask_regularizer(masks.edge, of_edge, num_graphs=num_graphs, ratio=edge_ratio, validate=False)


class _Shared(NamedTuple):
    """What all GIN encoders of a step compute alike: the order of the edges, and the sums of the first layer over them."""

    routes: Routes | None
    messages: Tensor | None


class _GINStack(ConvStack):
    """`ConvStack` of "weighted_gin" for edge weights in [0, 1], without work that the steps of AIA would do twice."""

    def __init__(self, in_channels: int, hidden: int, num_layers: int, dropout: float) -> None:
        super().__init__(in_channels, hidden, num_layers, "weighted_gin", dropout)

    @staticmethod
    def share(x: Tensor, edge_index: Tensor) -> _Shared:
        """Return what several encoders of the same graphs can share."""
        routes = edge_routes(edge_index, x)
        return _Shared(routes, propagate(x.relu(), edge_index, None, routes))

    def forward(
        self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None, *, shared: _Shared | None = None
    ) -> Tensor:
        """Return node embeddings."""
        h = self.inner(x, edge_index, edge_weight, shared)
        conv, norm = self._layers()[-1]
        h = norm(conv.mlp[-1](h))
        return h if len(self.convs) == 1 else F.dropout(h, self.dropout, self.training, inplace=True)

    def inner(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None, shared: _Shared | None) -> Tensor:
        """Return what the last layer's MLP holds after its ReLU, `(n, 2d)`.

        In evaluation mode all that follows is affine, so it can wait until nodes are averaged, or be merged with the next
        linear layer.
        """
        routes, messages = (edge_routes(edge_index, x), None) if shared is None else shared
        *before, (last, _) = self._layers()
        h = x
        for conv, norm in before:
            h = norm(conv.mlp[-1](_inner(conv, h, edge_index, edge_weight, routes, messages))).relu_()
            h, messages = F.dropout(h, self.dropout, self.training), None
        return _inner(last, h, edge_index, edge_weight, routes, messages)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return weight `(d, 2d)` and bias `(d,)` of what follows `inner`."""
        conv, norm = self._layers()[-1]
        linear: nn.Linear = conv.mlp[-1]  # type: ignore[assignment]
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None and variance is not None  # noqa: S101, PT018  # for the type checker
        scale = norm.weight * (variance + norm.eps).rsqrt()
        return linear.weight * scale.unsqueeze(-1), (linear.bias - mean) * scale + norm.bias

    def _layers(self) -> list[tuple[WeightedGINConv, nn.BatchNorm1d]]:
        return list(zip(self.convs, self.norms, strict=True))  # type: ignore[arg-type]


def _inner(
    conv: WeightedGINConv,
    h: Tensor,
    edge_index: Tensor,
    edge_weight: Tensor | None,
    routes: Routes | None,
    messages: Tensor | None,
) -> Tensor:
    """A GIN layer up to the ReLU of its MLP; for weights >= 0 the ReLU on messages acts on nodes, which are fewer."""
    if messages is None:
        messages = propagate(h.relu(), edge_index, edge_weight, routes)
    linear, norm, _relu, _last = conv.mlp
    return norm(linear(torch.addcmul(messages, h, 1 + conv.eps))).relu_()  # type: ignore[no-any-return]


def _stack(in_channels: int, hidden: int, num_layers: int, encoder: Encoder, dropout: float) -> ConvStack:
    check_choice("encoder", encoder, ("gin", "gcn", "gat"))
    if encoder == "gin":
        return _GINStack(in_channels, hidden, num_layers, dropout)
    return ConvStack(in_channels, hidden, num_layers, encoder, dropout)


def _encode(stack: ConvStack, x: Tensor, edge_index: Tensor, shared: _Shared | None) -> Tensor:
    if shared is None:
        return stack(x, edge_index)  # type: ignore[no-any-return]
    return stack(x, edge_index, shared=shared)  # type: ignore[no-any-return]


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Hold a module in evaluation mode."""
    before = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(before)


class AIATrainer:
    r"""Trains an `AIA`: after each stable step one adversarial step on the same batch, with an optimiser each (Adam).

    Source: Sui et al., 2023, algorithm 2. Learning rates are those of the authors' commands; the paper's table has them
    the other way round.

    Args:
        model: The model; trained in place.
        lr: Learning rate of the classifier and the stable network, > 0.
        adv_lr: Learning rate of the adversarial network, > 0.
        weight_decay: Of both optimisers, >= 0.
        gamma: $\gamma\ge0$, weight of the transport cost.
        cau_reg: $\beta_s\ge0$.
        adv_reg: $\beta_a\ge0$.
        epochs: Passes over the training graphs.
        scheduler: "cosine" lowers both learning rates to 0 over the epochs; None keeps them.
        warmup_select: Epochs that validation can't choose, in [0, epochs); the published 70 belong to 100 epochs.
        seed: Source of all randomness of the run.

    Raises:
        ValueError: If an option is out of range.

    Examples:
        >>> import torch
        >>> from torch_geometric.data import Data  # type: ignore[import-untyped]
        >>> from torch_geometric.loader import DataLoader  # type: ignore[import-untyped]
        >>> edges = torch.tensor([[0, 1], [1, 0]])
        >>> graphs = [Data(x=torch.full((2, 1), float(i % 2)), edge_index=edges, y=i % 2) for i in range(8)]
        >>> trainer = AIATrainer(AIA(1, 2, hidden=8), epochs=2, warmup_select=0)
        >>> history = trainer.fit(DataLoader(graphs, batch_size=4, shuffle=True))
        >>> len(history.records)
        2
    """

    def __init__(
        self,
        model: AIA,
        *,
        lr: float = 1e-3,
        adv_lr: float = 5e-3,
        weight_decay: float = 5e-6,
        gamma: float = 0.2,
        cau_reg: float = 1.0,
        adv_reg: float = 0.5,
        epochs: int = 100,
        scheduler: Literal["cosine"] | None = "cosine",
        warmup_select: int = 70,
        seed: int = 0,
    ) -> None:
        check_positive("lr", lr)
        check_positive("adv_lr", adv_lr)
        weights = {"weight_decay": weight_decay, "gamma": gamma, "cau_reg": cau_reg, "adv_reg": adv_reg}
        for name, value in weights.items():
            check_not_negative(name, value)
        check_count("epochs", epochs)
        if not 0 <= warmup_select < epochs:
            raise ValueError(f"warmup_select must lie in [0, epochs) = [0, {epochs}), got {warmup_select!r}")
        self.model = model
        self.gamma, self.cau_reg, self.adv_reg = gamma, cau_reg, adv_reg
        self.epochs, self.scheduler, self.warmup_select, self.seed = epochs, scheduler, warmup_select, seed
        self.stable_optimizer, self.adversarial_optimizer = (
            torch.optim.Adam(parameters, rate, weight_decay=weight_decay, fused=True)
            for parameters, rate in ((model.stable_parameters(), lr), (model.adversarial_parameters(), adv_lr))
        )

    def stable_step(self, batch: Batch) -> dict[str, Tensor]:
        """Improve the classifier and the stable network on one batch; return the loss and its parts."""
        self.stable_optimizer.zero_grad()
        losses = self.model.stable_step(batch, _labels(batch, self.model), cau_reg=self.cau_reg)
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        self.stable_optimizer.step()
        return {name: value.detach() for name, value in losses.items()}

    def adversarial_step(self, batch: Batch) -> dict[str, Tensor]:
        """Improve the adversarial network on one batch; return the loss and its parts."""
        self.adversarial_optimizer.zero_grad()
        losses = self.model.adversarial_step(
            batch, _labels(batch, self.model), adv_dis=self.gamma, adv_reg=self.adv_reg
        )
        losses["loss"].backward(inputs=self.model.adversarial_parameters())  # type: ignore[no-untyped-call]
        self.adversarial_optimizer.step()
        return {name: value.detach() for name, value in losses.items()}

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Take the stable step and then the adversarial one; "loss" is that of the stable step."""
        stable, adversarial = self.stable_step(batch), self.adversarial_step(batch)
        return {**adversarial, **stable, "loss_adv_step": adversarial["loss"]}

    def fit(
        self,
        train_loader: DataLoader,
        val_loader: DataLoader | None = None,
        test_loaders: Mapping[str, DataLoader] | None = None,
        *,
        metric: Literal["accuracy", "roc_auc"] = "accuracy",
        device: str | torch.device = "cpu",
        checkpoint: str | Path | None = None,
        resume: bool = True,
        on_epoch: Callable[[dict[str, float]], None] | None = None,
    ) -> History:
        """Train; the model is left with the parameters of its best validation epoch, or of the last one without.

        Args:
            train_loader: Training graphs.
            val_loader: Chooses the epoch, after `warmup_select` of them.
            test_loaders: Further sets to evaluate each epoch, by name; they choose nothing.
            metric: "accuracy" or "roc_auc".
            device: Where to train.
            checkpoint: File for the state after each epoch.
            resume: Continue from `checkpoint` where it exists; the end is that of an uninterrupted run.
            on_epoch: Called with the record of every finished epoch.

        Returns:
            The history.

        Raises:
            ValueError: If a training graph has a label that the model doesn't know or features that aren't finite, or an
                argument doesn't fit.
            RuntimeError: If a loss isn't finite.
        """
        _check_graphs(train_loader, self.model)
        return fit(
            self.model,
            train_loader,
            step=self.step,
            predict=self.model,
            optimizers=[self.stable_optimizer, self.adversarial_optimizer],
            val_loader=val_loader,
            test_loaders=test_loaders,
            epochs=self.epochs,
            scheduler=self.scheduler,
            warmup_select=self.warmup_select,
            metric=metric,
            seed=self.seed,
            device=device,
            checkpoint=checkpoint,
            resume=resume,
            on_epoch=on_epoch,
            settings={"gamma": self.gamma, "cau_reg": self.cau_reg, "adv_reg": self.adv_reg},
        )


def _labels(batch: Batch, model: AIA) -> Tensor:
    y: Tensor = batch.y
    return y.view(-1) if model.task == "multiclass" else y.view(batch.num_graphs, -1)


def _check_graphs(loader: DataLoader, model: AIA) -> None:
    """Look at labels and features once, where the loader has its graphs at hand."""
    for number, graph in enumerate(getattr(loader, "dataset", ())):
        y = torch.as_tensor(graph.y).view(-1)
        known = y.isnan() | (y == 0) | (y == 1) if model.task == "binary" else (y >= 0) & (y < model.num_classes)
        if not bool(known.all()):
            accepted = "0, 1 or NaN" if model.task == "binary" else f"in [0, {model.num_classes})"
            raise ValueError(f"target of training graph {number} must be {accepted}, got {y.tolist()}")
        if not bool(graph.x.isfinite().all()):
            raise ValueError(f"x of training graph {number} must be finite")


class MaskAugmentation(BaseTransform):  # type: ignore[misc]
    r"""Turns a graph into its masked version: features times the node mask, and the edge mask as `edge_weight`.

    The paper writes the masks on the input as here; `AIA` itself applies them after its front encoder.

    Args:
        model: A trained `AIA` on the device of the graphs.
        kind: "combined", "stable" or "adversarial".

    Raises:
        ValueError: If `kind` is unknown.

    Examples:
        >>> import torch
        >>> from torch_geometric.data import Data  # type: ignore[import-untyped]
        >>> graph = Data(x=torch.ones(3, 1), edge_index=torch.tensor([[0, 1], [1, 2]]))
        >>> masked = MaskAugmentation(AIA(1, 2, hidden=8))(graph)
        >>> bool((masked.x < graph.x).all()), masked.edge_weight.shape
        (True, torch.Size([2]))
    """

    def __init__(self, model: AIA, kind: MaskKind = "combined") -> None:
        check_choice("kind", kind, ("combined", "stable", "adversarial"))
        self.model, self.kind = model, kind

    def forward(self, data: Data) -> Data:
        masks = self.model.augment(data, self.kind)
        data.x = data.x * masks.node.unsqueeze(-1)
        data.edge_weight = masks.edge
        return data


class DomainEncoder(nn.Module):
    """A small GIN that tells two sets of graphs apart; its pooled embeddings are the features for `graph_covariate_shift`.

    Args:
        in_channels: Node features F.
        hidden: Width d.
        num_layers: Convolutions.

    Examples:
        >>> import torch
        >>> from torch_geometric.data import Data  # type: ignore[import-untyped]
        >>> graph = Data(x=torch.ones(3, 1), edge_index=torch.tensor([[0, 1], [1, 2]]))
        >>> DomainEncoder(1).features([graph, graph]).shape
        torch.Size([2, 16])
    """

    def __init__(self, in_channels: int, hidden: int = 16, num_layers: int = 3) -> None:
        super().__init__()
        self.encoder = _stack(in_channels, hidden, num_layers, "gin", 0.0)
        self.head = nn.Linear(hidden, 2)

    def embed(self, data: Data) -> Tensor:
        """Return graph embeddings `(B, d)`; graphs may have an `edge_weight` in [0, 1]."""
        index, num_graphs = graph_index(data)
        weight = getattr(data, "edge_weight", None)
        return pool(self.encoder(data.x, data.edge_index, weight), index, num_graphs, "mean")

    def forward(self, data: Data) -> Tensor:
        """Return logits `(B, 2)`; class 1 is the second set."""
        return self.head(self.embed(data))  # type: ignore[no-any-return]

    @torch.no_grad()
    def features(self, graphs: Sequence[Data] | Dataset, *, batch_size: int = 256) -> Tensor:
        """Return the embeddings of a set of graphs, shape `(N, d)` on the CPU, in evaluation mode."""
        device = self.head.weight.device
        with _evaluating(self):
            # the iterator draws a number, which shall not be one of the global state
            loader = DataLoader(graphs, batch_size=batch_size, generator=torch.Generator())
            return torch.cat([self.embed(batch.to(device)).cpu() for batch in loader])


def train_domain_encoder(
    ds_p: Sequence[Data] | Dataset,
    ds_q: Sequence[Data] | Dataset,
    *,
    hidden: int = 16,
    num_layers: int = 3,
    epochs: int = 10,
    batch_size: int = 64,
    lr: float = 5e-3,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> DomainEncoder:
    r"""Train a graph network to tell two sets of graphs apart, each set with the same total weight.

    Source: Sui et al., 2023, appendix C. Its size and training aren't published. Measure the shift on graphs that it
    hasn't seen where the sets are small: an encoder that has learnt its graphs by heart finds a shift between halves of
    one set.

    Args:
        ds_p: Graphs with `x`, `edge_index` and, for augmented graphs, `edge_weight`.
        ds_q: The other graphs.
        hidden: Width d of the features; a density estimate in more dimensions needs more graphs.
        num_layers: Convolutions.
        epochs: Passes over both sets.
        batch_size: Graphs per step.
        lr: Learning rate of Adam.
        seed: Of the parameters and the order of graphs; the global random state isn't used.
        device: Where to train.

    Returns:
        The encoder, in evaluation mode.

    Raises:
        ValueError: If a set is empty, or the sets have different numbers of features.

    Examples:
        >>> import torch
        >>> from torch_geometric.data import Data  # type: ignore[import-untyped]
        >>> edges = torch.tensor([[0, 1, 1, 2, 2, 0], [1, 0, 2, 1, 0, 2]])
        >>> triangles = [Data(x=torch.ones(3, 1), edge_index=edges) for _ in range(8)]
        >>> paths = [Data(x=torch.ones(3, 1), edge_index=edges[:, :4]) for _ in range(8)]
        >>> encoder = train_domain_encoder(triangles, paths, epochs=2)
        >>> encoder.features(paths).shape
        torch.Size([8, 16])
    """
    if len(ds_p) == 0 or len(ds_q) == 0:
        raise ValueError(f"both sets need graphs, got {len(ds_p)} and {len(ds_q)}")
    width = ds_p[0].x.shape[1]
    if ds_q[0].x.shape[1] != width:
        raise ValueError(f"ds_q must have {width} node features as ds_p has, got {ds_q[0].x.shape[1]}")
    graphs = [_of_domain(graph, domain) for domain, graphs in enumerate((ds_p, ds_q)) for graph in graphs]
    balance = torch.tensor([len(graphs) / (2 * len(ds_p)), len(graphs) / (2 * len(ds_q))], device=device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DomainEncoder(width, hidden, num_layers).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    step = supervised_step(model, optimizer, partial(F.cross_entropy, weight=balance))
    loader = DataLoader(graphs, batch_size=batch_size, shuffle=True)
    fit(model, loader, step=step, predict=model, optimizers=[optimizer], epochs=epochs, seed=seed, device=device)
    return model


def _of_domain(graph: Data, domain: int) -> Data:
    """Return what the encoder needs of a graph; graphs with and without weights go into one batch."""
    weight = getattr(graph, "edge_weight", None)
    if weight is None:
        weight = graph.x.new_ones(graph.edge_index.shape[1])
    return Data(x=graph.x, edge_index=graph.edge_index, edge_weight=weight, y=domain)


def graph_covariate_shift(
    feats_p: Tensor,
    feats_q: Tensor,
    *,
    num_samples: int = 1000,
    eps: float | None = None,
    bandwidth: Literal["scott", "silverman"] | float = "scott",
    generator: torch.Generator | None = None,
) -> float:
    r"""How much of two distributions lies where the other one has no density.

    $$
    \text{GCS}(P,Q)=\tfrac12\int_{p(z)q(z)=0}|p-q|\,dz
    \approx\frac1{2M}\sum_{z\sim w}\frac{|p(z)-q(z)|}{w(z)}\,\mathbb 1[p(z)<\epsilon\lor q(z)<\epsilon],
    \qquad w=\tfrac12(p+q)
    $$

    Source: Sui et al., 2023, definition 2.1 and appendix C. The features of both sets are scaled together to mean 0 and
    variance 1, each set with the same weight; $p$ and $q$ are Gaussian kernel density estimates with one bandwidth, so that
    $w$, from which the $M$ points are drawn, is their mean and no weight exceeds 2. The row that a point was drawn around
    doesn't count in the density at that point: in many dimensions two halves of one set would look different otherwise.

    Args:
        feats_p: Features of the first set, shape `(N, d)`, from `train_domain_encoder`.
        feats_q: Features of the second set, shape `(N', d)`.
        num_samples: $M\ge1$.
        eps: $\epsilon\ge0$; not published. None takes the 1 % quantile of the drawn $w(z)$.
        bandwidth: Rule for the width of the kernel, computed for both sets together, or the width itself.
        generator: For the points; None uses the global one.

    Returns:
        The estimate, in [0, 1].

    Raises:
        ValueError: If the shapes don't fit, a feature isn't finite, every feature is constant, or an option is out of range.

    Examples:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> p, q = torch.randn(200, 2, generator=generator), torch.randn(200, 2, generator=generator)
        >>> graph_covariate_shift(p, q + 20, generator=generator) > 0.9
        True
        >>> graph_covariate_shift(p, q, generator=generator) < 0.1
        True
    """
    check_count("num_samples", num_samples)
    if eps is not None:
        check_not_negative("eps", eps)
    p, q = _standardised(feats_p, feats_q)
    width = _bandwidth(bandwidth, len(p) + len(q), p.shape[1])
    from_p = num_samples // 2  # one half of the points from each set: a row of it, moved by the kernel
    z_p, own_p = _draw(p, from_p, width, generator)
    z_q, own_q = _draw(q, num_samples - from_p, width, generator)
    z = torch.cat([z_p, z_q])
    log_p, log_q = _log_density(p, z, width), _log_density(q, z, width)
    log_p[:from_p] = _without_own(log_p[:from_p], own_p, len(p))
    log_q[from_p:] = _without_own(log_q[from_p:], own_q, len(q))
    log_w = torch.logaddexp(log_p, log_q) - math.log(2)
    log_eps = log_w.quantile(0.01) if eps is None else torch.tensor(eps, dtype=z.dtype).log()
    outside = torch.minimum(log_p, log_q) < log_eps
    distance = ((log_p - log_w).exp() - (log_q - log_w).exp()).abs()
    return float((distance * outside).sum() / (2 * num_samples))


def _draw(points: Tensor, count: int, width: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Draw from the density of `points`; return the drawn points, and the log of the kernel that each came from."""
    noise = torch.randn(count, points.shape[1], generator=generator, dtype=points.dtype)
    z = points[torch.randint(len(points), (count,), generator=generator)] + width * noise
    volume = points.shape[1] * math.log(width * math.sqrt(2 * math.pi))
    return z, -noise.square().sum(1) / 2 - volume


def _without_own(log_density: Tensor, log_kernel: Tensor, n: int) -> Tensor:
    """Take the kernel of its own row out of a density at a drawn point; in many dimensions it would be most of it."""
    if n == 1:
        return log_density
    share = (log_kernel - math.log(n) - log_density).exp().clamp(max=1 - 1e-9)
    return log_density + (-share).log1p() + math.log(n / (n - 1))


def _standardised(feats_p: Tensor, feats_q: Tensor) -> tuple[Tensor, Tensor]:
    p, q = feats_p.detach().cpu().double(), feats_q.detach().cpu().double()
    for name, x in (("feats_p", p), ("feats_q", q)):
        if x.ndim != 2 or 0 in x.shape:
            raise ValueError(f"{name} must have shape (N, d) with N, d >= 1, got {tuple(x.shape)}")
        if not bool(x.isfinite().all()):
            raise ValueError(f"{name} must be finite")
    if p.shape[1] != q.shape[1]:
        raise ValueError(f"feats_p and feats_q must have the same d, got {p.shape[1]} and {q.shape[1]}")
    mean = (p.mean(0) + q.mean(0)) / 2
    scale = (((p - mean).square().mean(0) + (q - mean).square().mean(0)) / 2).sqrt()
    varying = scale > 1e-12 * mean.abs().clamp(min=1e-300)
    if not bool(varying.any()):
        raise ValueError("every feature is constant over feats_p and feats_q")
    return tuple(((x - mean) / scale)[:, varying] for x in (p, q))  # type: ignore[return-value]


def _bandwidth(bandwidth: str | float, n: int, d: int) -> float:
    if isinstance(bandwidth, str):
        check_choice("bandwidth", bandwidth, ("scott", "silverman"))
        return float((n if bandwidth == "scott" else n * (d + 2) / 4) ** (-1 / (d + 4)))
    check_positive("bandwidth", bandwidth)
    return bandwidth


def _log_density(points: Tensor, z: Tensor, width: float) -> Tensor:
    from sklearn.neighbors import KernelDensity  # type: ignore[import-untyped]

    estimate = KernelDensity(bandwidth=width, rtol=1e-6).fit(points.numpy())
    return torch.from_numpy(estimate.score_samples(z.numpy()))
