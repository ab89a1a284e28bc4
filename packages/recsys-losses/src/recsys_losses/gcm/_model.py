"""The model: tables, the graph they are propagated through, and recommendations in a context."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from recsys_losses._checks import check_choice, check_reduction
from recsys_losses.gcm._convolution import MergeWeights, check_options
from recsys_losses.gcm._data import ContextDataset, SeenItems
from recsys_losses.gcm._decoders import DECODERS, fm_rank, mlp_rank
from recsys_losses.gcm._graph import NORMS, SparseMap, check_edges, check_indices
from recsys_losses.gcm._loss import (
    GCMLoss,
    Structure,
    Tables,
    batch_loss,
    check_batch,
    check_contexts,
    check_features,
    context_rows,
    decode,
    make_structure,
    node_vectors,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from recsys_losses._checks import Reduction
    from recsys_losses.gcm._convolution import Merge, Norm
    from recsys_losses.gcm._loss import Decoder

_OPTIONS = ("embed_dim", "num_layers", "norm", "merge", "decoder", "decoder_layers", "l2_weight")
_SIZES = ("num_user_features", "num_item_features", "num_context_features")


class GCM(nn.Module):
    r"""Graph Convolution Machine: encoder, convolution over a graph with contexts on its edges, decoder.

    The sparse matrices of the graph are built once. `refresh` propagates once and keeps the vectors, so that scores for
    any number of users and contexts need no further pass; whatever changes the parameters drops them. Contexts are
    given by number, or as rows `(B, k)` of feature ids for contexts that the data doesn't have.

    Args:
        num_users: U.
        num_items: All items, those included that occur only as a last item.
        num_graph_items: Items that can be recommended, ids 0..I-1.
        user_features: Feature ids, LongTensor `(U, f)`, or None.
        item_features: Feature ids, LongTensor `(I, f)`, or None.
        context_features: Contexts, LongTensor `(C, k)`, the last column an item.
        train_users: Users of the interactions, LongTensor `(M,)`.
        train_items: Their items.
        train_contexts: Their contexts.
        embed_dim: Width d.
        num_layers: L >= 0; 0 is a factorisation machine on summed sides.
        norm: As in `gcm_convolve`.
        merge: As in `gcm_convolve`.
        layer_weights: As in `gcm_convolve`.
        decoder: `"fm"`, `"inner_product"` or `"mlp"`.
        decoder_layers: Hidden layers of the decoder `"mlp"`, >= 0; without effect on others.
        l2_weight: $\lambda$ of `loss`.
        num_user_features: Rows of the table; None is 1 + the largest id. Likewise the next two.
        num_item_features: See above.
        num_context_features: See above; the last column doesn't count.
        seed: Seeds the initial values (Xavier normal; the global bias and those of neurons are 0); None uses torch's
            default generator.

    Raises:
        ValueError: If an argument is out of range, a shape doesn't fit or an option is unknown.

    Reference: Wu et al., 2020.

    Examples:
        >>> from recsys_losses.gcm import make_context_data
        >>> made = make_context_data(num_users=20, num_items=30, num_interactions=200)
        >>> model = GCM.from_dataset(made.data, embed_dim=8, seed=0)
        >>> users, _, contexts = made.data.test[:, :2]
        >>> model.recommend(users, contexts, k=3).shape
        torch.Size([2, 3])
    """

    user_features: Tensor | None
    item_features: Tensor | None
    context_features: Tensor
    _context_rows: Tensor

    def __init__(
        self,
        num_users: int,
        num_items: int,
        num_graph_items: int,
        user_features: Tensor | None,
        item_features: Tensor | None,
        context_features: Tensor,
        train_users: Tensor,
        train_items: Tensor,
        train_contexts: Tensor,
        embed_dim: int = 64,
        num_layers: int = 2,
        *,
        norm: Norm = "left-single",
        merge: Merge = "sum",
        layer_weights: Sequence[float] | None = None,
        decoder: Decoder = "fm",
        decoder_layers: int = 1,
        l2_weight: float = 1e-3,
        num_user_features: int | None = None,
        num_item_features: int | None = None,
        num_context_features: int | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.weights = check_options(num_layers, merge, layer_weights)
        check_choice("norm", norm, NORMS)
        check_choice("decoder", decoder, DECODERS)
        if not embed_dim >= 1:
            raise ValueError(f"embed_dim must be >= 1, got {embed_dim!r}")
        if not decoder_layers >= 0:
            raise ValueError(f"decoder_layers must be >= 0, got {decoder_layers!r}")
        if not 0 <= l2_weight < math.inf:
            raise ValueError(f"l2_weight must be a finite number >= 0, got {l2_weight!r}")
        for name, size, most in (("num_users", num_users, math.inf), ("num_graph_items", num_graph_items, num_items)):
            if not 1 <= size <= most:
                raise ValueError(f"{name} must be between 1 and {most}, got {size!r}")
        sizes = (
            _size("num_user_features", user_features, num_user_features),
            _size("num_item_features", item_features, num_item_features),
            _size("num_context_features", context_features[..., :-1], num_context_features),
        )
        check_features("user", user_features, None if user_features is None else sizes[0], num_users)
        check_features("item", item_features, None if item_features is None else sizes[1], num_graph_items)
        check_contexts(context_features, sizes[2], num_items)
        self.num_users, self.num_items, self.num_graph_items = num_users, num_items, num_graph_items
        self.num_user_features, self.num_item_features, self.num_context_features = sizes
        self.embed_dim, self.num_layers, self.norm, self.merge, self.decoder = (
            embed_dim,
            num_layers,
            norm,
            merge,
            decoder,
        )
        self.decoder_layers, self.l2_weight = decoder_layers, l2_weight
        for name, tensor in (
            ("user_features", user_features),
            ("item_features", item_features),
            ("context_features", context_features),
        ):
            self.register_buffer(name, tensor, persistent=False)
        self._make_parameters(None if seed is None else torch.Generator().manual_seed(seed))
        self._vectors: tuple[Tensor, Tensor] | None = None
        self.replace_interactions(train_users, train_items, train_contexts)

    def _make_parameters(self, generator: torch.Generator | None) -> None:
        dim = self.embed_dim

        def table(rows: int, columns: int = dim) -> nn.Parameter:
            std = math.sqrt(2 / (rows + columns))
            return nn.Parameter(torch.empty(rows, columns).normal_(0, std, generator=generator))

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape))

        self.user_embedding = table(self.num_users)
        self.user_feature_embedding = None if self.user_features is None else table(self.num_user_features)
        self.item_embedding = table(self.num_items)
        self.item_feature_embedding = None if self.item_features is None else table(self.num_item_features)
        self.context_feature_embedding = table(self.num_context_features)
        self.user_bias, self.item_bias = table(self.num_users, 1), table(self.num_items, 1)
        self.context_feature_bias = table(self.num_context_features, 1)
        self.global_bias = zeros(1, 1)
        self.merge_weights = nn.ParameterList()
        if self.merge == "mlp":
            for _ in range(2 * self.num_layers):
                self.merge_weights += [table(dim, 2 * dim), zeros(dim)]
        self.decoder_weights = nn.ParameterList()
        if self.decoder == "mlp":
            width = (self.context_features.shape[1] + 2) * dim
            for _ in range(self.decoder_layers):
                self.decoder_weights += [table(dim, width), zeros(dim)]
                width = dim
            self.decoder_weights += [table(1, width)]

    @classmethod
    def from_dataset(cls, data: ContextDataset, **options: Any) -> GCM:
        """Return a model for the train interactions of a data set.

        Args:
            data: The data.
            **options: `embed_dim`, `num_layers`, ..., `seed`, as above.
        """
        return cls(
            data.num_users,
            data.num_items,
            data.num_graph_items,
            data.user_features,
            data.item_features,
            data.context_features,
            *data.train,
            num_user_features=data.num_user_features,
            num_item_features=data.num_item_features,
            num_context_features=data.num_context_features,
            **options,
        )

    def replace_interactions(self, train_users: Tensor, train_items: Tensor, train_contexts: Tensor) -> None:
        """Propagate through the graph of other interactions from now on; arguments as in the constructor."""
        device = self.user_embedding.device
        users, items, contexts = train_users.to(device), train_items.to(device), train_contexts.to(device)
        check_edges((users, items, contexts), (self.num_users, self.num_graph_items, len(self.context_features)))
        structure = make_structure(
            self.user_features,
            self.item_features,
            self.context_features,
            (users, items, contexts),
            (self.num_users, self.num_graph_items, self.num_items, self.num_context_features),
            norm=self.norm,
            merge=self.merge,
            weights=self.weights,
            dtype=self.user_embedding.dtype,
        )
        self.graph = structure.graph
        self.feature_map: SparseMap | None = structure.feature_map
        self.register_buffer("_context_rows", structure.context_rows, persistent=False)
        self._vectors = None

    def forward(self, users: Tensor, items: Tensor, contexts: Tensor) -> Tensor:
        """Return the logits of a batch, shape `(B,)`; every call propagates through the graph.

        Args:
            users: LongTensor `(B,)`.
            items: Graph items, LongTensor `(B,)`.
            contexts: Numbers of contexts `(B,)` or rows of feature ids `(B, k)`.

        Raises:
            ValueError: If shapes don't fit or (on the CPU) an index is out of range.
        """
        rows = self._rows(contexts)
        self._check_users(users, rows)
        _check_on_cpu("items", items, self.num_graph_items)
        tables = self._tables()
        context_table = tables.context_table()
        user, item = node_vectors(tables, self._structure(), context_table)
        return decode(tables, self.decoder, user, item, users, items, rows, context_table)

    def loss(
        self, users: Tensor, items: Tensor, contexts: Tensor, labels: Tensor, *, reduction: Reduction = "sum"
    ) -> GCMLoss:
        """Return `gcm_loss` of a batch on the graph that is there already.

        Args:
            users: LongTensor `(B,)`.
            items: Graph items, LongTensor `(B,)`.
            contexts: Numbers of contexts, LongTensor `(B,)`.
            labels: 1 for interactions and 0 for negatives, shape `(B,)`.
            reduction: As in `gcm_loss`.

        Raises:
            ValueError: If shapes don't fit or (on the CPU, where looking costs nothing) an index is out of range.
        """
        check_reduction(reduction)
        if users.device.type == "cpu":
            sizes = (self.num_users, self.num_graph_items, len(self.context_features))
            check_batch(users, items, contexts, labels, sizes)
        self._vectors = None  # the caller is about to change the parameters
        return batch_loss(
            self._tables(),
            self._structure(),
            self.decoder,
            users,
            items,
            self._context_rows.index_select(0, contexts),
            labels,
            l2_weight=self.l2_weight,
            reduction=reduction,
        )

    @torch.no_grad()
    def refresh(self) -> tuple[Tensor, Tensor]:
        """Propagate and keep the vectors of users `(U, d)` and graph items `(I, d)`, which are returned.

        Needed after parameters were changed by hand or by an optimiser without a call of `loss` in between.
        """
        tables = self._tables()
        self._vectors = node_vectors(tables, self._structure(), tables.context_table())
        return self._vectors

    @torch.no_grad()
    def score_all(self, users: Tensor, contexts: Tensor) -> Tensor:
        """Return the scores of all graph items, `(B, I)`, in one matrix product for the decoder `"fm"`.

        Args:
            users: LongTensor `(B,)`.
            contexts: Numbers of contexts `(B,)` or rows of feature ids `(B, k)`.

        Raises:
            ValueError: If shapes don't fit or (on the CPU) an index is out of range.
        """
        rows = self._rows(contexts)
        self._check_users(users, rows)
        user, item = self.refresh() if self._vectors is None else self._vectors
        user = user[users]
        if self.decoder == "inner_product":
            return user @ item.T
        tables = self._tables()
        context = F.embedding(rows, tables.context_table())
        if self.decoder == "mlp":
            return mlp_rank(user, context, item, list(self.decoder_weights))
        return fm_rank(
            user,
            context,
            self.user_bias[users, 0],
            tables.context_bias_table()[rows],
            item,
            self.item_bias[: self.num_graph_items],
            global_bias=self.global_bias,
        )

    def recommend(
        self, users: Tensor, contexts: Tensor, k: int = 10, *, exclude_known: bool = True, batch_size: int = 1024
    ) -> Tensor:
        """Return the k best items of each user in a context, best first.

        Args:
            users: LongTensor `(B,)`; a user may occur several times.
            contexts: Numbers of contexts `(B,)` or rows of feature ids `(B, k)`.
            k: Items per row, 1..I.
            exclude_known: Leave out the items of the user's interactions.
            batch_size: Rows scored at once.

        Returns:
            LongTensor `(B, k)`, filled up with -1 where fewer items are left.

        Raises:
            ValueError: If k is out of range, shapes don't fit or an index is out of range.
        """
        if not 1 <= k <= self.num_graph_items:
            raise ValueError(f"k must be in 1..{self.num_graph_items} (the number of graph items), got {k!r}")
        events = torch.stack([self.graph.users, self.graph.items])
        seen = SeenItems(events if exclude_known else events[:, :0], self.num_users)
        best = [torch.empty(0, k, dtype=torch.int64, device=users.device)]
        for user, context in zip(torch.split(users, batch_size), torch.split(contexts, batch_size), strict=True):
            scores = self.score_all(user, context)
            row, item = seen.of(user)
            scores[row, item] = -torch.inf
            value, top = scores.topk(k, dim=1)
            best.append(top.masked_fill(value == -torch.inf, -1))
        return torch.cat(best)

    def options(self) -> dict[str, Any]:
        """Return the options that rebuild the model, JSON values."""
        options = {name: getattr(self, name) for name in (*_OPTIONS, *_SIZES)}
        return {**options, "layer_weights": list(self.weights)}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        self._vectors = None
        return super().load_state_dict(state_dict, *args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._vectors = None
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}={getattr(self, name)!r}"
            for name in (
                "num_users",
                "num_items",
                "num_graph_items",
                "embed_dim",
                "num_layers",
                "norm",
                "merge",
                "decoder",
            )
        )

    def _tables(self) -> Tables:
        merge = list(self.merge_weights)
        return Tables(
            self.user_embedding,
            self.user_feature_embedding,
            self.item_embedding,
            self.item_feature_embedding,
            self.context_feature_embedding,
            self.user_bias,
            self.item_bias,
            self.context_feature_bias,
            self.global_bias,
            [MergeWeights(*merge[n : n + 4]) for n in range(0, len(merge), 4)] if self.merge == "mlp" else None,
            list(self.decoder_weights),
        )

    def _structure(self) -> Structure:
        return Structure(
            self.user_features, self.item_features, self.graph, self._context_rows, self.feature_map, self.weights
        )

    def _rows(self, contexts: Tensor) -> Tensor:
        """Return rows of the context table, (B, k)."""
        if contexts.ndim == 1:
            _check_on_cpu("contexts", contexts, len(self.context_features))
            return self._context_rows.index_select(0, contexts)
        if contexts.ndim != 2 or contexts.shape[1] != self.context_features.shape[1]:
            fields = self.context_features.shape[1]
            raise ValueError(f"contexts must be (B,) numbers or (B, {fields}) feature ids, got {tuple(contexts.shape)}")
        _check_on_cpu("contexts (all columns but the last)", contexts[:, :-1], self.num_context_features)
        _check_on_cpu("contexts (last column, items)", contexts[:, -1], self.num_items)
        return context_rows(contexts, self.num_context_features)

    def _check_users(self, users: Tensor, rows: Tensor) -> None:
        if users.ndim != 1 or len(users) != len(rows):
            raise ValueError(
                f"users must be (B,) with one context each, got {tuple(users.shape)} and {len(rows)} contexts"
            )
        _check_on_cpu("users", users, self.num_users)


def _check_on_cpu(name: str, index: Tensor, size: int) -> None:
    """Raise ValueError for an index out of range, unless looking would wait for a GPU."""
    if index.device.type == "cpu":
        check_indices(name, index, size)


def _size(name: str, ids: Tensor | None, given: int | None) -> int:
    if given is not None:
        if not given >= 0:
            raise ValueError(f"{name} must be >= 0, got {given!r}")
        return given
    return 0 if ids is None or ids.numel() == 0 else int(ids.max()) + 1
