"""The two backbones of the paper beside LightGCN: NeuMF and MultVAE."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from recsys_losses.dsl._masks import check_count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class NeuMF(nn.Module):
    r"""Neural matrix factorisation: a product of embeddings beside a perceptron on other embeddings, one linear output.

    $$s_{ui}=w^\top\big[\,p_u\odot q_i\;\|\;\mathrm{MLP}([p'_u\|q'_i])\,\big]+b$$

    Args:
        num_users: U.
        num_items: I.
        dim: Width of each of the four embedding tables.
        hidden: Widths of the layers of the perceptron, ReLU and dropout after each.
        dropout: Share dropped in training, in [0, 1).
        seed: Seed of the initial values: embeddings N(0, 0.01²), linear layers Xavier uniform.

    Raises:
        ValueError: If an argument is out of range.

    Reference: He et al., 2017; sizes of the DSL authors' code.

    Examples:
        >>> import torch
        >>> model = NeuMF(3, 5, seed=0)
        >>> model.score(torch.tensor([0, 1]), torch.tensor([4, 4])).shape
        torch.Size([2])
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        dim: int = 16,
        hidden: Sequence[int] = (32, 16, 8),
        *,
        dropout: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_sizes(
            num_users=num_users, num_items=num_items, dim=dim, **{f"hidden[{i}]": n for i, n in enumerate(hidden)}
        )
        _check_dropout(dropout)
        self.num_users, self.num_items, self.dim = num_users, num_items, dim
        self.hidden, self.dropout = tuple(hidden), dropout
        sizes = [2 * dim, *hidden]
        self.gmf_user, self.mlp_user = nn.Embedding(num_users, dim), nn.Embedding(num_users, dim)
        self.gmf_item, self.mlp_item = nn.Embedding(num_items, dim), nn.Embedding(num_items, dim)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.predict = nn.Linear(dim + sizes[-1], 1)
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.01, generator=generator)
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)

    def score(self, user: Tensor, item: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the scores of pairs; user and item ids broadcast.

        Args:
            user: Integer ids.
            item: Integer ids.
            generator: Source of the dropout in training.

        Returns:
            Scores of the broadcast shape.
        """
        user, item = torch.broadcast_tensors(user, item)  # type: ignore[no-untyped-call]
        hidden = torch.cat([self.mlp_user(user), self.mlp_item(item)], dim=-1)
        for layer in self.layers:
            hidden = _dropped(F.relu(layer(hidden)), self.dropout if self.training else 0.0, generator)
        product = self.gmf_user(user) * self.gmf_item(item)
        out: Tensor = self.predict(torch.cat([product, hidden], dim=-1))
        return out.squeeze(-1)

    @staticmethod
    def select(name: str, parameter: nn.Parameter) -> bool:
        """Say which tensors the authors mask: the embeddings of the perceptron."""
        return name.startswith("mlp_")

    def options(self) -> dict[str, Any]:
        """Return the options that rebuild the model, JSON values."""
        return {"model": "neumf", "dim": self.dim, "hidden": list(self.hidden), "dropout": self.dropout}


class MultVAE(nn.Module):
    r"""Variational autoencoder of a user's row of interactions with a multinomial likelihood.

    $$\mathcal L_u=-\sum_i x_{ui}\log\mathrm{softmax}(f(z_u))_i+\beta\,\mathrm{KL}\big(q(z_u\mid x_u)\,\|\,N(0,I)\big)$$

    Args:
        num_users: U, kept for checks only: users have no parameters.
        num_items: I.
        hidden: Width of the one hidden layer of encoder and decoder, tanh.
        latent: Width of $z$.
        dropout: Share of a user's (length-normalised) row dropped in training, in [0, 1).
        seed: Seed of the initial values: weights Xavier normal, biases N(0, 0.001²).

    Raises:
        ValueError: If an argument is out of range.

    Reference: Liang et al., 2018; sizes of the DSL authors' code.

    Examples:
        >>> import torch
        >>> model = MultVAE(3, 5, hidden=8, latent=2, seed=0).eval()
        >>> model(torch.eye(3, 5))[0].shape
        torch.Size([3, 5])
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        hidden: int = 600,
        latent: int = 200,
        *,
        dropout: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_sizes(num_users=num_users, num_items=num_items, hidden=hidden, latent=latent)
        _check_dropout(dropout)
        self.num_users, self.num_items = num_users, num_items
        self.hidden, self.latent, self.dropout = hidden, latent, dropout
        self.encoder = nn.ModuleList([nn.Linear(num_items, hidden), nn.Linear(hidden, 2 * latent)])
        self.decoder = nn.ModuleList([nn.Linear(latent, hidden), nn.Linear(hidden, num_items)])
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight, generator=generator)
                nn.init.normal_(module.bias, std=0.001, generator=generator)

    def forward(self, row: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return the logits of all items and the KL divergence of each row.

        Args:
            row: Interactions, 0 or 1, floating `(B, I)`.
            generator: Source of dropout and noise in training; evaluation uses the mean of z.

        Returns:
            Logits `(B, I)` and KL `(B,)`.
        """
        hidden = _dropped(F.normalize(row), self.dropout if self.training else 0.0, generator)
        mean, log_variance = self.encoder[1](torch.tanh(self.encoder[0](hidden))).chunk(2, dim=1)
        kl = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(1)
        z = mean
        if self.training:
            source = row.device if generator is None else generator.device
            noise = torch.randn(mean.shape, generator=generator, device=source).to(mean)
            z = mean + noise * (0.5 * log_variance).exp()
        return self.decoder[1](torch.tanh(self.decoder[0](z))), kl

    @staticmethod
    def select(name: str, parameter: nn.Parameter) -> bool:
        """Say which tensors are masked: the weight matrices; the authors mask the biases as well."""
        return parameter.ndim >= 2

    def options(self) -> dict[str, Any]:
        """Return the options that rebuild the model, JSON values."""
        return {"model": "multvae", "hidden": self.hidden, "latent": self.latent, "dropout": self.dropout}


def _dropped(x: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    if share == 0:
        return x
    source = x.device if generator is None else generator.device
    kept = torch.rand(x.shape, generator=generator, device=source).to(x.device) >= share
    return x * kept / (1 - share)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        check_count(name, size)


def _check_dropout(dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout!r}")
