"""The model: a LightGCN that knows how to thin its graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from recsys_losses._bipartite import Propagate, SortedPairs, SparseRows, normalized_rows, sorted_pairs
from recsys_losses._checks import check_choice
from recsys_losses.metrics import topk_items
from recsys_losses.models import LightGCN
from recsys_losses.sgl._graph import check_pairs, check_ratio, kept_by_nodes, kept_edges
from recsys_losses.sgl._losses import Objective, check_batch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from recsys_losses.sgl._losses import BatchReduction, Mode, Negatives, SGLLoss

Augmentation = Literal["nd", "ed", "rw"]

AUGMENTATIONS = ("nd", "ed", "rw")


class SGL(nn.Module):
    r"""LightGCN trained with the loss of SGL.

    `backbone` is the `recsys_losses.models.LightGCN` that holds the tables and the full graph: it is all that is needed
    after training (`recsys_losses.training.save_model(model.backbone, path)`).

    Args:
        num_users: U.
        num_items: I.
        edge_index: Training pairs (user, item), items not offset, LongTensor `(2, E)`; repeated pairs count once.
        embed_dim: Width d of the embeddings.
        num_layers: Number of hops L >= 0.
        aug: How views are made: `"nd"` drops nodes, `"ed"` edges, `"rw"` edges anew for every hop.
        ssl_ratio: $\rho$, the share that is dropped, in [0, 1).
        temperature: $\tau>0$.
        ssl_weight: $\lambda_1\ge0$; with 0 no view is made and the model is LightGCN with BPR.
        l2_weight: $\lambda_2\ge0$.
        seed: Seeds the initial values and the views; None takes torch's default generator for both.
        mode: As in `ssl_loss`.
        negatives: As in `ssl_loss`.
        reduction: As in `sgl_loss`.
        chunk_size: As in `ssl_loss`.

    Raises:
        ValueError: If an argument is out of range or unknown.

    Reference: Wu et al., 2021, section 3.

    Examples:
        >>> import torch
        >>> model = SGL(2, 3, torch.tensor([[0, 0, 1], [0, 1, 2]]), embed_dim=8, num_layers=2, seed=0)
        >>> model.refresh_views()
        >>> loss = model(torch.tensor([0, 1]), torch.tensor([1, 2]), torch.tensor([2, 0]))
        >>> loss.loss.backward()
        >>> [tuple(table.shape) for table in model.embeddings()]
        [(2, 8), (3, 8)]
    """

    _user: Tensor
    _item: Tensor
    _by_item: Tensor

    def __init__(
        self,
        num_users: int,
        num_items: int,
        edge_index: Tensor,
        embed_dim: int = 64,
        num_layers: int = 3,
        aug: Augmentation = "ed",
        ssl_ratio: float = 0.1,
        temperature: float = 0.2,
        ssl_weight: float = 0.1,
        l2_weight: float = 1e-4,
        seed: int | None = None,
        *,
        mode: Mode = "both_side",
        negatives: Negatives = "all",
        reduction: BatchReduction = "sum",
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("aug", aug, AUGMENTATIONS)
        check_ratio("ssl_ratio", ssl_ratio)
        check_pairs("edge_index", edge_index, num_users, num_items)
        self.objective = Objective(temperature, ssl_weight, l2_weight, mode, negatives, reduction, chunk_size)
        self.num_users, self.num_items = num_users, num_items
        self.aug, self.ssl_ratio = aug, ssl_ratio
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.backbone = LightGCN(num_users, num_items, edge_index, embed_dim, num_layers, generator=self._generator)
        for name in ("_user", "_item", "_by_item"):
            self.register_buffer(name, torch.empty(0), persistent=False)
        self._views: list[list[SparseRows]] = []
        self.replace_edges(edge_index)

    @property
    def num_layers(self) -> int:
        """Number of hops L."""
        return self.backbone.num_layers

    def embeddings(self) -> tuple[Tensor, Tensor]:
        """Return the tables that score, propagated through the full graph, `(U, d)` and `(I, d)`."""
        return self.backbone.embeddings()

    def refresh_views(self, generator: torch.Generator | None = None) -> None:
        """Draw two new views; to be called once per epoch. Without it, the first forward draws them.

        Args:
            generator: Source of the draw; None takes the model's own.
        """
        if self.objective.ssl_weight == 0:
            return
        source = self._generator if generator is None else generator
        self._views = [self._thinned(source), self._thinned(source)]

    def replace_edges(self, edge_index: Tensor) -> None:
        """Propagate through the graph of other pairs, LongTensor `(2, E)`, from now on; views are drawn anew."""
        check_pairs("edge_index", edge_index, self.num_users, self.num_items)
        self.backbone.replace_edges(edge_index)
        self._user, self._item, self._by_item = sorted_pairs(self.backbone.edge_index(), self.num_items)
        self._views = []

    def forward(self, users: Tensor, pos_items: Tensor, neg_items: Tensor) -> SGLLoss:
        """Return the loss of a batch.

        Args:
            users: Users, LongTensor `(B,)`.
            pos_items: Their positive items, LongTensor `(B,)`.
            neg_items: Their negative items, LongTensor `(B,)`.

        Returns:
            `SGLLoss(loss, bpr, ssl, l2)`; `ssl` is 0 with `ssl_weight=0`, where it isn't computed.

        Raises:
            ValueError: If shapes don't fit or an id is out of range (noticed on a CPU).
        """
        check_batch(self.num_users, self.num_items, users=users, pos_items=pos_items, neg_items=neg_items)
        table = self.backbone.backbone.embedding.weight
        encoded: Tensor = Propagate.apply(table, self.backbone.adjacency, self.num_layers)
        return self.objective(table, self.num_users, encoded, self._encode_views(table), users, pos_items, neg_items)

    def recommend(self, users: Tensor, k: int, exclude_train: bool = True) -> tuple[Tensor, Tensor]:
        """Return the k best items of each user.

        Args:
            users: Users, LongTensor `(n,)`.
            k: Number of items, 1..I.
            exclude_train: Leave out the training items of a user.

        Returns:
            `(scores, items)`, each `(n, k)`, best first. A user with fewer than k items left has -inf and -1 at the end.

        Raises:
            ValueError: If k or a user is out of range.
        """
        known = torch.stack([self._user, self._item]) if exclude_train else None
        with torch.no_grad():
            user, item = self.embeddings()
            items = topk_items(user, item, known, k=k, users=users, deterministic=True)
            scores = torch.einsum("nd,nkd->nk", user[users.to(user.device)], item[items.clamp(min=0)])
        return scores.masked_fill(items < 0, -torch.inf), items

    def options(self) -> dict[str, Any]:
        """Return what the model depends on beside its edges, JSON values."""
        return {
            "model": "sgl",
            "dim": self.backbone.dim,
            "num_layers": self.num_layers,
            "aug": self.aug,
            "ssl_ratio": self.ssl_ratio,
            "temperature": self.objective.temperature,
            "ssl_weight": self.objective.ssl_weight,
            "l2_weight": self.objective.l2_weight,
            "mode": self.objective.mode,
            "negatives": self.objective.negatives,
            "reduction": self.objective.reduction,
        }

    def extra_repr(self) -> str:
        shown = {name: value for name, value in self.options().items() if name != "model"}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    def _thinned(self, generator: torch.Generator | None) -> list[SparseRows]:
        """Draw one view: one graph, or one for every hop."""
        pairs = SortedPairs(self._user, self._item, self._by_item)
        dtype = self.backbone.backbone.embedding.weight.dtype
        sizes = self.num_users, self.num_items
        graphs = []
        for _ in range(self.num_layers if self.aug == "rw" else 1):
            if self.aug == "nd":
                keep = kept_by_nodes(self._user, self._item, *sizes, self.ssl_ratio, generator)
            else:
                keep = kept_edges(len(self._user), self.ssl_ratio, generator, self._user.device)
            graphs.append(normalized_rows(pairs, *sizes, dtype, keep))
        return graphs

    def _encode_views(self, table: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.objective.ssl_weight == 0:
            return None
        if not self._views:
            self.refresh_views()
        first, second = self._views
        return self._encode_view(table, first), self._encode_view(table, second)

    def _encode_view(self, table: Tensor, view: list[SparseRows]) -> Tensor:
        hops = [rows.matrix() for rows in view]
        encoded: Tensor = Propagate.apply(table, hops if self.aug == "rw" else hops[0], self.num_layers)
        return encoded

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SGL:
        # The views move with the model; they are no buffers, as their number differs between augmentations.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._views = [[SparseRows(*map(fn, rows)) for rows in view] for view in self._views]
        return self
