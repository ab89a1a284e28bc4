r"""What the methods of this package are compared with: ERM, IRM, V-REx, GroupDRO, manifold mixup and DropEdge.

The first four differ in what they do with the risks $R_e$ of the training environments: average them, ask for one
classifier that is optimal in all, punish their spread, or weigh the worst ones up. The last two change the input and need
no environments.

$$
\begin{aligned}
\text{ERM: } & \tfrac1B\textstyle\sum_b\ell_b & \text{IRM: } & \text{ERM}+\lambda\,\overline{(\partial_wR_e(wz)|_{w=1})^2}\\
\text{V-REx: } & \text{ERM}+\lambda\operatorname{Var}_e R_e & \text{GroupDRO: } & \textstyle\sum_eq_eR_e,\ q_e\propto q_e\,e^{\eta R_e}
\end{aligned}
$$

References: M. Arjovsky, L. Bottou, I. Gulrajani, D. Lopez-Paz, *Invariant Risk Minimization*, 2019, arXiv:1907.02893;
D. Krueger et al., *Out-of-Distribution Generalization via Risk Extrapolation (REx)*, ICML 2021, arXiv:2003.00688;
S. Sagawa, P. W. Koh, T. B. Hashimoto, P. Liang, *Distributionally Robust Neural Networks for Group Shifts*, ICLR 2020,
arXiv:1911.08731; V. Verma et al., *Manifold Mixup*, ICML 2019, arXiv:1806.05236; Y. Rong, W. Huang, T. Xu, J. Huang,
*DropEdge: Towards Deep Graph Convolutional Networks on Node Classification*, ICLR 2020, arXiv:1907.10903.
Documentation: `docs/guides/graph-distribution-shift.md`.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from graph_ood._checks import check_choice, check_count, check_not_negative, check_target, upcast
from graph_ood.data import environment_ids
from graph_ood.training import fit

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from torch import Tensor
    from torch_geometric.data import Data, Dataset  # type: ignore[import-untyped]
    from torch_geometric.loader import DataLoader  # type: ignore[import-untyped]

    from graph_ood.nets import GraphClassifier
    from graph_ood.training import History

__all__ = [
    "METHODS",
    "STRENGTHS",
    "GroupDRO",
    "Mixed",
    "drop_edge",
    "environment_risks",
    "group_dro_loss",
    "irm_penalty",
    "mixup",
    "train_baseline",
    "vrex_penalty",
]

Method = Literal["erm", "irm", "vrex", "group-dro", "mixup", "drop-edge"]

STRENGTHS: dict[str, float] = {
    "erm": 0.0,
    "irm": 1.0,
    "vrex": 10.0,
    "group-dro": 0.01,
    "mixup": 1.0,
    "drop-edge": 0.2,
}
"The methods, and the strength that each has where none is given."
METHODS = tuple(STRENGTHS)
_BY_ENVIRONMENT = ("irm", "vrex", "group-dro")


class Mixed(NamedTuple):
    r"""What `mixup` returns.

    Args:
        h: The mixed representations, shape `(B, d)`.
        partner: Label of the other half of every row, shape `(B,)`.
        share: $\lambda$, the share of a row's own half, in [0, 1].
    """

    h: Tensor
    partner: Tensor
    share: float


def environment_risks(losses: Tensor, env_id: Tensor, *, num_envs: int | None = None) -> tuple[Tensor, Tensor]:
    r"""Mean loss of every environment in a batch.

    $$R_e=\frac{1}{|\{b:e_b=e\}|}\sum_{b:\,e_b=e}\ell_b$$

    Args:
        losses: Loss per graph, shape `(B,)`, floating.
        env_id: Environment of every graph, shape `(B,)`, integer.
        num_envs: Number of environments E; `env_id` then lies in [0, E), which is checked on the CPU only. None takes
            those that occur, whatever their ids, in ascending order; that waits for the device.

    Returns:
        The risks, shape `(E,)`, 0 where an environment has no graph in the batch, and which have one, bool `(E,)`.

    Raises:
        ValueError: If the shapes don't fit, the batch is empty, a dtype is wrong, or an id is out of range.

    Examples:
        >>> import torch
        >>> environment_risks(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([2, 0, 2]), num_envs=3)
        (tensor([3., 0., 3.]), tensor([ True, False,  True]))
    """
    _check_environments(losses, env_id, num_envs)
    losses = upcast(losses)
    if num_envs is None:
        ids, env_id = torch.unique(env_id, return_inverse=True)
        num_envs = ids.numel()
    count = losses.new_zeros(num_envs).index_add_(0, env_id, torch.ones_like(losses))
    total = losses.new_zeros(num_envs).index_add_(0, env_id, losses)
    return total / count.clamp(min=1.0), count > 0


def irm_penalty(logits: Tensor, target: Tensor, env_id: Tensor, *, num_envs: int | None = None) -> Tensor:
    r"""IRMv1 penalty of the cross-entropy: how much each environment would like to rescale the logits.

    $$
    \frac1E\sum_e\Big(\frac{\partial}{\partial w}R_e(w\,z)\Big|_{w=1}\Big)^2,\qquad
    \frac{\partial}{\partial w}\ell_b(w\,z_b)\Big|_{w=1}=\sum_kp_{bk}z_{bk}-z_{b,y_b},\quad p_b=\text{softmax}(z_b)
    $$

    The derivative is written out, so no second backward pass is needed. Environments without a graph in the batch don't
    count. Non-negative; 0 for logits that are 0.

    Args:
        logits: $z$, shape `(B, C)`, floating.
        target: Classes, shape `(B,)`, int64 in [0, C).
        env_id: Environments, as in `environment_risks`.
        num_envs: Number of environments, as in `environment_risks`.

    Returns:
        A scalar; half precision is computed and returned in float32.

    Raises:
        ValueError: If the shapes don't fit, the batch is empty, a dtype is wrong, or (on the CPU) a class or an id is out
            of range.

    Reference: Arjovsky et al., 2019, eq. (IRMv1), with the mean over environments and over the graphs of each.

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])  # right in one environment, wrong in the other
        >>> irm_penalty(logits, torch.tensor([0, 0]), torch.tensor([0, 1]))
        tensor(1.5800)
    """
    check_target(logits, target)
    _check_range("target", target, logits.shape[1])
    z = upcast(logits)
    slope = (z.softmax(1) * z).sum(1) - z.gather(1, target[:, None]).squeeze(1)
    slopes, present = environment_risks(slope, env_id, num_envs=num_envs)
    return slopes.square().sum() / present.sum()


def vrex_penalty(losses: Tensor, env_id: Tensor, *, num_envs: int | None = None) -> Tensor:
    r"""V-REx penalty: the variance of the risks over the environments.

    $$\operatorname{Var}_eR_e=\frac1E\sum_e(R_e-\bar R)^2,\qquad\bar R=\frac1E\sum_eR_e$$

    Environments without a graph in the batch don't count; with one environment it is 0.

    Args:
        losses: Loss per graph, shape `(B,)`, floating.
        env_id: Environments, as in `environment_risks`.
        num_envs: Number of environments, as in `environment_risks`.

    Returns:
        A scalar; half precision is computed and returned in float32.

    Raises:
        ValueError: As `environment_risks`.

    Reference: Krueger et al., 2021, eq. 8, with the mean of the risks taken over graphs in `train_baseline`.

    Examples:
        >>> import torch
        >>> vrex_penalty(torch.tensor([1.0, 3.0, 6.0]), torch.tensor([0, 0, 1]))
        tensor(4.)
    """
    risks, present = environment_risks(losses, env_id, num_envs=num_envs)
    count = present.sum()
    deviation = (risks - risks.sum() / count) * present
    return deviation.square().sum() / count


def group_dro_loss(
    losses: Tensor, env_id: Tensor, log_weights: Tensor, *, step_size: float = 0.01
) -> tuple[Tensor, Tensor]:
    r"""GroupDRO: weights move towards the environments with the largest risks, then weigh the risks.

    $$q_e\leftarrow\frac{q_e\,e^{\eta R_e}}{\sum_{e'}q_{e'}e^{\eta R_{e'}}},\qquad\mathcal L=\sum_eq_eR_e$$

    $R_e$ is a constant in the first step. An environment without a graph in the batch has $R_e=0$: it adds nothing to the
    loss and keeps its weight up to the normalisation. With $\eta=0$ and uniform weights the loss is $\frac1E\sum_eR_e$.

    Args:
        losses: Loss per graph, shape `(B,)`, floating.
        env_id: Environment of every graph, shape `(B,)`, integer in [0, E).
        log_weights: $\log q$ before this batch, shape `(E,)`, floating; it is normalised here.
        step_size: $\eta\ge0$.

    Returns:
        The loss, a scalar, and the new $\log q$, shape `(E,)`, detached.

    Raises:
        ValueError: If the shapes don't fit, the batch is empty, a dtype is wrong, an id is out of range (checked on the
            CPU), or `step_size` is negative or not finite.

    Reference: Sagawa et al., 2020, algorithm 1, all environments of a batch at once.

    Examples:
        >>> import torch
        >>> losses, env_id = torch.tensor([1.0, 3.0]), torch.tensor([0, 1])
        >>> loss, log_weights = group_dro_loss(losses, env_id, torch.zeros(2), step_size=0.5)
        >>> loss, log_weights.exp()
        (tensor(2.4621), tensor([0.2689, 0.7311]))
    """
    check_not_negative("step_size", step_size)
    if log_weights.ndim != 1 or log_weights.numel() == 0 or not log_weights.is_floating_point():
        raise ValueError(
            f"log_weights must be a floating-point tensor (E,), got {log_weights.dtype} {tuple(log_weights.shape)}"
        )
    risks, _present = environment_risks(losses, env_id, num_envs=log_weights.numel())
    moved = (log_weights.detach() + step_size * risks.detach()).log_softmax(0)
    return (moved.exp() * risks).sum(), moved


class GroupDRO(nn.Module):
    r"""`group_dro_loss` with its weights as a buffer, so that a state dict holds them.

    Args:
        num_envs: Number of environments E, at least 2.
        step_size: $\eta\ge0$.

    Raises:
        ValueError: If `num_envs` is below 2 or `step_size` is negative or not finite.

    Examples:
        >>> import torch
        >>> objective = GroupDRO(2, step_size=0.5)
        >>> for _ in range(20):
        ...     loss = objective(torch.tensor([1.0, 3.0]), torch.tensor([0, 1]))
        >>> objective.weights
        tensor([2.0612e-09, 1.0000e+00])
    """

    log_weights: Tensor

    def __init__(self, num_envs: int, step_size: float = 0.01) -> None:
        super().__init__()
        check_count("num_envs", num_envs, 2)
        check_not_negative("step_size", step_size)
        self.step_size = step_size
        self.register_buffer("log_weights", torch.full((num_envs,), -math.log(num_envs)))

    @property
    def weights(self) -> Tensor:
        """The weights $q$, shape `(E,)`; they sum to 1."""
        return self.log_weights.exp()

    def forward(self, losses: Tensor, env_id: Tensor) -> Tensor:
        loss, log_weights = group_dro_loss(losses, env_id, self.log_weights, step_size=self.step_size)
        self.log_weights.copy_(log_weights)
        return loss

    def extra_repr(self) -> str:
        return f"num_envs={self.log_weights.numel()}, step_size={self.step_size}"


def mixup(h: Tensor, target: Tensor, *, alpha: float = 1.0, generator: torch.Generator | None = None) -> Mixed:
    r"""Mix each pooled embedding of a batch with that of another graph, by one share for the whole batch.

    $$
    \tilde h_b=\lambda h_b+(1-\lambda)h_{\pi(b)},\quad\lambda\sim\text{Beta}(\alpha,\alpha),\qquad
    \mathcal L=\lambda\,\text{CE}(\tilde z,y)+(1-\lambda)\,\text{CE}(\tilde z,y_\pi)
    $$

    Args:
        h: Graph representations, shape `(B, d)`, floating.
        target: Classes, shape `(B,)`.
        alpha: $\alpha\ge0$; 0 mixes nothing and draws nothing.
        generator: CPU generator that draws $\lambda$ and the permutation $\pi$, for data on any device; the default one of
            torch where it is None.

    Returns:
        The mixed representations, the labels $y_\pi$ and $\lambda$.

    Raises:
        ValueError: If the shapes don't fit, the batch is empty, or `alpha` is negative or not finite.

    Reference: Verma et al., 2019, eq. 1, at the layer after the readout.

    Examples:
        >>> import torch
        >>> h, y = torch.eye(3), torch.arange(3)
        >>> mixed = mixup(h, y, generator=torch.Generator().manual_seed(0))
        >>> torch.equal(mixed.h, mixed.share * h + (1 - mixed.share) * h[mixed.partner])
        True
    """
    check_not_negative("alpha", alpha)
    if h.ndim != 2 or target.shape != h.shape[:1]:
        raise ValueError(f"expected h (B, d) and target (B,), got {tuple(h.shape)} and {tuple(target.shape)}")
    if h.shape[0] == 0:
        raise ValueError("empty batch: h has no rows")
    if alpha == 0:
        return Mixed(h, target, 1.0)
    seed = int(torch.randint(2**62, (), generator=generator))  # torch draws no Beta from a generator
    share = float(np.random.default_rng(seed).beta(alpha, alpha))
    order = torch.randperm(h.shape[0], generator=generator).to(h.device)
    return Mixed(share * h + (1 - share) * h[order], target[order], share)


def drop_edge(
    edge_index: Tensor, p: float, *, undirected: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    r"""Remove each edge with probability $p$.

    $$A'=A\odot M,\qquad M_{ij}=M_{ji}\sim\text{Bernoulli}(1-p)$$

    Args:
        edge_index: Edges, shape `(2, m)`, integer.
        p: Probability, in [0, 1); 0 returns `edge_index` itself.
        undirected: Both directions of an edge share their fate; `edge_index` must hold each edge in both, and the result
            has the forward ones first. Without it every column is drawn by itself and the order stays.
        generator: Draws the edges, on the device of `edge_index`; the default one of torch where it is None.

    Returns:
        The edges that stay, shape `(2, m')`.

    Raises:
        ValueError: If `edge_index` isn't `(2, m)` or `p` is outside [0, 1).

    Reference: Rong et al., 2020, eq. 1; drawn anew for every batch.

    Examples:
        >>> import torch
        >>> path = torch.tensor([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]])
        >>> drop_edge(path, 0.5, generator=torch.Generator().manual_seed(0))
        tensor([[1, 2],
                [2, 1]])
    """
    if edge_index.ndim != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"edge_index must have shape (2, m), got {tuple(edge_index.shape)}")
    if not 0 <= p < 1:
        raise ValueError(f"p must be in [0, 1), got {p!r}")
    if p == 0:
        return edge_index
    edges = edge_index[:, edge_index[0] <= edge_index[1]] if undirected else edge_index
    edges = edges[:, torch.rand(edges.shape[1], generator=generator, device=edges.device) >= p]
    if not undirected:
        return edges
    return torch.cat([edges, edges[:, edges[0] != edges[1]].flip(0)], 1)


def train_baseline(
    model: GraphClassifier,
    train_loader: DataLoader,
    val_loader: DataLoader | None = None,
    *,
    method: Method = "erm",
    strength: float | None = None,
    test_loaders: Mapping[str, DataLoader] | None = None,
    epochs: int = 100,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    scheduler: Literal["cosine"] | None = None,
    min_lr: float = 0.0,
    warmup_select: int = 0,
    metric: Literal["accuracy", "roc_auc"] = "accuracy",
    seed: int = 0,
    device: torch.device | str = "cpu",
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = True,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> History:
    r"""Train a graph classifier in place by one of the baselines, with Adam on cross-entropy.

    Args:
        model: The classifier; `mixup` needs its `embed` and `head`, all others only its logits.
        train_loader: Batches to learn from; its `dataset` is read once for labels and, for `irm`, `vrex` and `group-dro`,
            environments (`env_id`, one integer >= 0 per graph).
        val_loader: Batches that choose the epoch; None keeps the last.
        method: `"erm"`, `"irm"`, `"vrex"`, `"group-dro"`, `"mixup"` or `"drop-edge"`.
        strength: $\lambda\ge0$ of `irm` (default 1) and `vrex` (10), $\eta\ge0$ of `group-dro` (0.01), $\alpha\ge0$ of
            `mixup` (1), $p\in[0,1)$ of `drop-edge` (0.2). 0 is ERM, except for `group-dro`: there it gives every
            environment the same weight. `erm` has none.
        test_loaders: Further sets that are evaluated every epoch, by name.
        epochs: Passes over the training graphs.
        lr: Learning rate.
        weight_decay: Coefficient of Adam's L2 term.
        scheduler: `"cosine"` lowers the learning rate to `min_lr` over the epochs; None keeps it.
        min_lr: Last learning rate of the cosine.
        warmup_select: Epochs before the first that may be chosen.
        metric: `"accuracy"` or `"roc_auc"`.
        seed: Seed of shuffling, dropout and whatever the method draws; the model has its own.
        device: Torch device.
        checkpoint: safetensors file that is replaced after every epoch; None writes none.
        resume: Continue from `checkpoint` where it exists.
        on_epoch: Called with the record of every finished epoch.

    Returns:
        The history; the model has the parameters of the chosen epoch.

    Raises:
        ValueError: If `method` is unknown, `strength` is out of range or given for `erm`, the labels aren't classes in
            [0, C), a graph lacks `env_id`, there is a single environment, or `fit` refuses an argument.

    Reference: as the functions of this module; with the loop that all methods of this package share.

    Examples:
        >>> import torch
        >>> from torch_geometric.data import Data
        >>> from torch_geometric.loader import DataLoader
        >>> from graph_ood.nets import ConvStack, GraphClassifier
        >>> edges = torch.tensor([[0, 1], [1, 0]])
        >>> graphs = [
        ...     Data(x=torch.randn(2, 3), edge_index=edges, y=torch.tensor([i % 2]), env_id=torch.tensor([i % 3]))
        ...     for i in range(12)
        ... ]
        >>> model = GraphClassifier(ConvStack(3, 8, 2), 2)
        >>> history = train_baseline(model, DataLoader(graphs, 6, shuffle=True), method="vrex", epochs=2)
        >>> len(history.records)
        2
    """
    value = _check_strength(method, strength)
    _check_labels(train_loader.dataset, model.num_classes)
    environments = _environments(train_loader.dataset) if method in _BY_ENVIRONMENT else None
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay)
    objective = _Objective(model, method, value, environments).to(device)

    def step(batch: Data) -> dict[str, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        loss = objective(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return {"loss": loss.detach()}

    return fit(
        model,
        train_loader,
        step=step,
        predict=model,
        optimizers=[optimizer],
        val_loader=val_loader,
        test_loaders=test_loaders,
        epochs=epochs,
        scheduler=scheduler,
        min_lr=min_lr,
        warmup_select=warmup_select,
        metric=metric,
        seed=seed,
        device=device,
        checkpoint=checkpoint,
        resume=resume,
        on_epoch=on_epoch,
        extra=objective.group_dro,
        settings={"method": method, "strength": value},
    )


class _Objective:
    """The loss of a batch for one method."""

    def __init__(self, model: GraphClassifier, method: str, strength: float, environments: Tensor | None) -> None:
        self.model, self.method, self.strength = model, method, strength
        self.environments = environments
        self.group_dro = None
        if environments is not None and method == "group-dro":
            self.group_dro = GroupDRO(len(environments), strength)

    def to(self, device: torch.device | str) -> _Objective:
        if self.environments is not None:
            self.environments = self.environments.to(device)
        if self.group_dro is not None:
            self.group_dro.to(device)
        return self

    def __call__(self, batch: Data) -> Tensor:
        if self.method == "mixup":
            return self._mixup(batch)
        if self.method == "drop-edge":
            batch = copy.copy(batch)
            batch.edge_index = drop_edge(batch.edge_index, self.strength)
        logits = self.model(batch)
        losses = F.cross_entropy(logits, batch.y, reduction="none")
        if self.environments is None:
            return losses.mean()
        num_envs = len(self.environments)
        env_id = torch.searchsorted(self.environments, batch.env_id)
        if self.group_dro is not None:
            return self.group_dro(losses, env_id)  # type: ignore[no-any-return]
        if self.method == "irm":
            return losses.mean() + self.strength * irm_penalty(logits, batch.y, env_id, num_envs=num_envs)
        return losses.mean() + self.strength * vrex_penalty(losses, env_id, num_envs=num_envs)

    def _mixup(self, batch: Data) -> Tensor:
        mixed = mixup(self.model.embed(batch), batch.y, alpha=self.strength)
        logits = self.model.head(mixed.h)
        own, other = (F.cross_entropy(logits, y, reduction="none").mean() for y in (batch.y, mixed.partner))
        return mixed.share * own + (1 - mixed.share) * other


def _check_strength(method: str, strength: float | None) -> float:
    check_choice("method", method, METHODS)
    if strength is None:
        return STRENGTHS[method]
    check_not_negative("strength", strength)
    if method == "erm" and strength:
        raise ValueError(f"strength must be 0 or None for method 'erm', got {strength!r}")
    if method == "drop-edge" and strength >= 1:
        raise ValueError(f"strength of method 'drop-edge' must be in [0, 1), got {strength!r}")
    return float(strength)


def _check_labels(dataset: Dataset, num_classes: int) -> None:
    for number, graph in enumerate(dataset):
        y = None if graph.y is None else torch.as_tensor(graph.y)
        if y is None or y.numel() != 1 or y.is_floating_point() or not 0 <= int(y) < num_classes:
            raise ValueError(f"y of training graph {number} must be one class in [0, {num_classes}), got {graph.y}")


def _environments(dataset: Dataset) -> Tensor:
    """Return the ids of the environments in ascending order."""
    count = int(environment_ids(dataset).max()) + 1
    names = sorted({int(graph.env_id) for graph in dataset})
    if count < 2:
        raise ValueError(f"env_id must name at least 2 training environments, got {names}")
    return torch.tensor(names)


def _check_environments(losses: Tensor, env_id: Tensor, num_envs: int | None) -> None:
    if losses.ndim != 1 or env_id.shape != losses.shape:
        raise ValueError(f"expected losses (B,) and env_id (B,), got {tuple(losses.shape)} and {tuple(env_id.shape)}")
    if losses.numel() == 0:
        raise ValueError("empty batch: env_id has no entries")
    if not losses.is_floating_point():
        raise ValueError(f"losses must be a floating-point tensor, got {losses.dtype}")
    if env_id.dtype != torch.int64:
        raise ValueError(f"env_id must be an int64 tensor, got {env_id.dtype}")
    if num_envs is not None:
        check_count("num_envs", num_envs)
        _check_range("env_id", env_id, num_envs)


def _check_range(name: str, value: Tensor, size: int) -> None:
    """Check values on the CPU, where that waits for nobody."""
    if value.device.type == "cpu" and bool(((value < 0) | (value >= size)).any()):
        raise ValueError(f"{name} must be in [0, {size}), got {value.min().item()} to {value.max().item()}")
