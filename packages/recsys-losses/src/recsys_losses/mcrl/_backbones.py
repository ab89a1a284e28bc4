"""Four encoders of a session: GRU4Rec, Caser, NextItNet and SASRec, with one signature."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import nn

from recsys_losses._checks import check_choice
from recsys_losses.mcrl._losses import check_range

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

BackboneName = Literal["gru4rec", "caser", "nextitnet", "sasrec"]


class Backbone(nn.Module):
    """What the four encoders share: the item table, the checks and dropout."""

    def __init__(self, num_items: int, hidden: int, state_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        for name, value in (("num_items", num_items), ("hidden", hidden), ("state_size", state_size)):
            if not value >= 1:
                raise ValueError(f"{name} must be >= 1, got {value!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout!r}")
        self.num_items, self.hidden, self.state_size, self.dropout = num_items, hidden, state_size, dropout
        # The last row stands for padding: as the only item of an empty history it is a state of its own, and learned.
        self.item_embedding = nn.Embedding(num_items + 1, hidden)

    def forward(self, items: Tensor, length: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Encode sessions.

        Args:
            items: Item ids, oldest first from the left, shape `(B, state_size)`, int64 in [0, I]; I is padding.
            length: How many of them count, shape `(B,)`, int64 in [1, state_size]. What stands beyond never matters.
            generator: Source of dropout while training, torch's default one if None.

        Returns:
            States, shape `(B, hidden)`.

        Raises:
            ValueError: If a shape is wrong, or (on the CPU) a length or an item is out of range.
        """
        check_state(items, length, self.num_items, self.state_size)
        return self._encode(items, length, generator)

    def _encode(self, items: Tensor, length: Tensor, generator: torch.Generator | None) -> Tensor:
        raise NotImplementedError

    def _drop(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        if not self.training or self.dropout == 0:
            return x
        source = x.device if generator is None else generator.device
        kept = torch.rand(x.shape, generator=generator, device=source).to(x.device) >= self.dropout
        return x * (kept.to(x.dtype) / (1 - self.dropout))

    def extra_repr(self) -> str:
        return f"num_items={self.num_items}, hidden={self.hidden}, state_size={self.state_size}"


class CausalBackbone(Backbone):
    """An encoder with a state at every position, of which the one at the last valid position is the session's."""

    def states(self, items: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the state after every position, shape `(B, Ls, hidden)`; none depends on later positions."""
        raise NotImplementedError

    def _encode(self, items: Tensor, length: Tensor, generator: torch.Generator | None) -> Tensor:
        states = self.states(items, generator=generator)
        last = (length.long() - 1).view(-1, 1, 1).expand(-1, 1, states.shape[2])
        return states.gather(1, last).squeeze(1)


class GRU4Rec(CausalBackbone):
    r"""Gated recurrent unit over the session; the state is the hidden vector after the last item.

    Args:
        num_items: I.
        hidden: Width d of embeddings and states.
        state_size: Items of a state.
        seed: Seed of the parameters.

    Raises:
        ValueError: If a size is below 1.

    Reference: B. Hidasi et al., *Session-based Recommendations with Recurrent Neural Networks*, ICLR 2016.

    Examples:
        >>> import torch
        >>> GRU4Rec(9, hidden=4, state_size=3)(torch.tensor([[2, 5, 9]]), torch.tensor([2])).shape
        torch.Size([1, 4])
    """

    def __init__(self, num_items: int, hidden: int = 64, state_size: int = 10, *, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            super().__init__(num_items, hidden, state_size)
            self.gru = nn.GRU(hidden, hidden, batch_first=True)
        initialise(self, torch.Generator().manual_seed(seed))

    def states(self, items: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        out: Tensor = self.gru(self.item_embedding(items))[0]
        return out


class Caser(Backbone):
    r"""Convolutions over the session as an image: full-width filters of some heights, and one along time.

    Positions beyond the length are zeros.

    Args:
        num_items: I.
        hidden: Width d of embeddings and states.
        state_size: Items of a state, at least as many as the highest filter.
        dropout: Share of the convolutions' outputs dropped in training, in [0, 1).
        heights: Heights of the horizontal filters.
        filters: Filters per height.
        seed: Seed of the parameters.

    Raises:
        ValueError: If a size is below 1, a height is out of range, or `dropout` is out of range.

    Reference: J. Tang, K. Wang, *Personalized Top-N Sequential Recommendation via Convolutional Sequence Embedding*,
    WSDM 2018; the sizes follow the SQN line of code as recalled.

    Examples:
        >>> import torch
        >>> net = Caser(9, hidden=4, state_size=4).eval()
        >>> net(torch.tensor([[2, 5, 9, 9]]), torch.tensor([2])).shape
        torch.Size([1, 4])
    """

    def __init__(
        self,
        num_items: int,
        hidden: int = 64,
        state_size: int = 10,
        *,
        dropout: float = 0.1,
        heights: Sequence[int] = (2, 3, 4),
        filters: int = 16,
        seed: int = 0,
    ) -> None:
        if len(heights) == 0 or any(not 1 <= height <= state_size for height in heights):
            raise ValueError(f"heights must be in 1..{state_size} (state_size), got {tuple(heights)!r}")
        if not filters >= 1:
            raise ValueError(f"filters must be >= 1, got {filters!r}")
        with torch.random.fork_rng(devices=[]):
            super().__init__(num_items, hidden, state_size, dropout)
            self.horizontal = nn.ModuleList(nn.Conv1d(hidden, filters, height) for height in heights)
            self.vertical = nn.Linear(state_size, 1)
            self.out = nn.Linear(filters * len(heights) + hidden, hidden)
        initialise(self, torch.Generator().manual_seed(seed))

    def _encode(self, items: Tensor, length: Tensor, generator: torch.Generator | None) -> Tensor:
        valid = torch.arange(items.shape[1], device=items.device) < length.unsqueeze(1)
        image = (self.item_embedding(items) * valid.unsqueeze(2)).transpose(1, 2)  # (B, d, Ls)
        parts = [conv(image).relu().amax(dim=2) for conv in self.horizontal]
        parts.append(self.vertical(image).squeeze(2))
        out: Tensor = self.out(self._drop(torch.cat(parts, dim=1), generator))
        return out


class NextItNet(CausalBackbone):
    r"""Residual blocks of dilated causal convolutions; the state is the vector at the last item.

    A block of dilation l has two convolutions of width 3, of dilation l and 2 l, each followed by layer normalisation and
    ReLU.

    Args:
        num_items: I.
        hidden: Width d of embeddings and states.
        state_size: Items of a state.
        dilations: One block each.
        seed: Seed of the parameters.

    Raises:
        ValueError: If a size or a dilation is below 1.

    Reference: F. Yuan et al., *A Simple Convolutional Generative Network for Next Item Recommendation*, WSDM 2019; the
    sizes follow the SQN line of code as recalled.

    Examples:
        >>> import torch
        >>> NextItNet(9, hidden=4, state_size=3)(torch.tensor([[2, 5, 9]]), torch.tensor([2])).shape
        torch.Size([1, 4])
    """

    def __init__(
        self,
        num_items: int,
        hidden: int = 64,
        state_size: int = 10,
        *,
        dilations: Sequence[int] = (1, 2, 1, 2, 1, 2),
        seed: int = 0,
    ) -> None:
        if len(dilations) == 0 or any(not dilation >= 1 for dilation in dilations):
            raise ValueError(f"dilations must be >= 1, got {tuple(dilations)!r}")
        with torch.random.fork_rng(devices=[]):
            super().__init__(num_items, hidden, state_size)
            self.blocks = nn.ModuleList(_DilatedBlock(hidden, dilation) for dilation in dilations)
        initialise(self, torch.Generator().manual_seed(seed))

    def states(self, items: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        x: Tensor = self.item_embedding(items)
        for block in self.blocks:
            x = block(x)
        return x


class _DilatedBlock(nn.Module):
    """Two causal convolutions with normalisation and ReLU, added to their input."""

    def __init__(self, hidden: int, dilation: int) -> None:
        super().__init__()
        self.dilations = (dilation, 2 * dilation)
        self.convs = nn.ModuleList(nn.Conv1d(hidden, hidden, 3, dilation=d) for d in self.dilations)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in self.dilations)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for conv, norm, dilation in zip(self.convs, self.norms, self.dilations, strict=True):
            past = F.pad(out.transpose(1, 2), (2 * dilation, 0))  # the left alone: no look ahead
            out = norm(conv(past).transpose(1, 2)).relu()
        return x + out


class SASRec(CausalBackbone):
    r"""Causal self-attention over the session; the state is the vector at the last item.

    Args:
        num_items: I.
        hidden: Width d of embeddings and states, divisible by `num_heads`.
        state_size: Items of a state.
        dropout: Share dropped of the inputs and of every sub-layer's output in training, in [0, 1).
        num_blocks: Blocks of attention and point-wise layers.
        num_heads: Heads of the attention.
        seed: Seed of the parameters.

    Raises:
        ValueError: If a size is below 1, `hidden` isn't divisible by `num_heads`, or `dropout` is out of range.

    Reference: W.-C. Kang, J. McAuley, *Self-Attentive Sequential Recommendation*, ICDM 2018.

    Examples:
        >>> import torch
        >>> SASRec(9, hidden=4, state_size=3).eval()(torch.tensor([[2, 5, 9]]), torch.tensor([2])).shape
        torch.Size([1, 4])
    """

    def __init__(
        self,
        num_items: int,
        hidden: int = 64,
        state_size: int = 10,
        *,
        dropout: float = 0.1,
        num_blocks: int = 1,
        num_heads: int = 1,
        seed: int = 0,
    ) -> None:
        if not num_blocks >= 1:
            raise ValueError(f"num_blocks must be >= 1, got {num_blocks!r}")
        if not num_heads >= 1 or hidden % num_heads:
            raise ValueError(f"num_heads must be >= 1 and divide hidden={hidden}, got {num_heads!r}")
        with torch.random.fork_rng(devices=[]):
            super().__init__(num_items, hidden, state_size, dropout)
            self.position_embedding = nn.Embedding(state_size, hidden)
            self.blocks = nn.ModuleList(_AttentionBlock(hidden, num_heads) for _ in range(num_blocks))
            self.norm = nn.LayerNorm(hidden)
        initialise(self, torch.Generator().manual_seed(seed))

    def states(self, items: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        x = self._drop(self.item_embedding(items) + self.position_embedding.weight[: items.shape[1]], generator)
        for block in self.blocks:
            x = block(x, lambda y: self._drop(y, generator))
        out: Tensor = self.norm(x)
        return out


class _AttentionBlock(nn.Module):
    """The parameters of one block: normalised queries, keys and values as they are, two point-wise layers."""

    def __init__(self, hidden: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.first, self.second = (nn.Linear(hidden, hidden) for _ in range(2))
        self.attention_norm, self.point_norm = (nn.LayerNorm(hidden) for _ in range(2))

    def forward(self, x: Tensor, drop: Callable[[Tensor], Tensor]) -> Tensor:
        queries: Tensor = self.attention_norm(x)
        x = queries + drop(self._attend(queries, x))
        inner: Tensor = self.point_norm(x)
        return inner + drop(self.second(self.first(inner).relu()))

    def _attend(self, queries: Tensor, x: Tensor) -> Tensor:
        """Attend from every position to it and those before; padding stands to the right and is never reached."""
        query, key, value = (self._heads(y) for y in (self.query(queries), self.key(x), self.value(x)))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.num_heads, -1).transpose(1, 2)


BACKBONES: dict[str, type[GRU4Rec | Caser | NextItNet | SASRec]] = {
    "gru4rec": GRU4Rec,
    "caser": Caser,
    "nextitnet": NextItNet,
    "sasrec": SASRec,
}


def make_backbone(name: str, num_items: int, hidden: int, state_size: int, dropout: float) -> Backbone:
    """Return the named encoder; those without dropout ignore it."""
    check_choice("backbone", name, BACKBONES)
    kind = BACKBONES[name]
    if kind is Caser or kind is SASRec:
        return kind(num_items, hidden, state_size, dropout=dropout)
    return kind(num_items, hidden, state_size)


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Embeddings from N(0, 0.01^2), matrices by Xavier's rule, biases 0; normalisations keep 1 and 0."""
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    for parameter in module.parameters():
        if id(parameter) in tables:
            nn.init.normal_(parameter, std=0.01, generator=generator)
        elif parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter, generator=generator)
    biases = (p for name, p in module.named_parameters() if name.rpartition(".")[2].startswith("bias"))
    for bias in biases:
        nn.init.zeros_(bias)


def check_state(items: Tensor, length: Tensor, num_items: int, state_size: int) -> None:
    """Raise ValueError unless items is (B, state_size) and length (B,), with values in range."""
    if items.ndim != 2 or items.shape[1] != state_size or length.shape != items.shape[:1]:
        raise ValueError(
            f"expected items (B, {state_size}) and length (B,), got {tuple(items.shape)} and {tuple(length.shape)}"
        )
    for name, tensor in (("items", items), ("length", length)):
        if tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must hold integers (int32 or int64), got {tensor.dtype}")
    check_range("length", length, 1, state_size)
    check_range("items", items, 0, num_items)
