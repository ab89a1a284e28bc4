"""The RAREMed network: one transformer over the diagnoses and procedures of a visit, and its three heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from recsys_losses._checks import check_choice, check_positive
from recsys_losses._storage import read_tensors, write_tensors
from recsys_losses.raremed._losses import check_codes

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from torch import Tensor

    from recsys_losses.raremed._records import Visit

    Lists = Sequence[Sequence[int]]

Relevance = Literal["rank", "constant"]

RELEVANCES = ("rank", "constant")
MAX_CODES = 999
_MODEL = "recsys_losses raremed model"
_BLOCK = MAX_CODES + 1
_CLS, _SEP, _FIRST = 0, 1, 2


class Tokens(NamedTuple):
    """A batch of input sequences `[CLS], diagnoses, [SEP], procedures`, padded to the longest.

    Args:
        ids: Rows of the token table, shape `(B, L)`.
        relevance: Rows of the relevance table, shape `(B, L)`.
        segment: 0 for `[CLS]`, diagnoses and `[SEP]`, 1 for procedures, shape `(B, L)`.
        padding: True where there is nothing, shape `(B, L)`; None if all sequences are equally long.
    """

    ids: Tensor
    relevance: Tensor
    segment: Tensor
    padding: Tensor | None


class RAREMed(nn.Module):
    r"""The RAREMed network.

    Every token is the sum of its own, its segment's and its relevance's embedding (eq. 1-2); the representation of the
    visit is the output of a post-norm transformer encoder at `[CLS]`. Linear heads on it: `smp` (1), `sr` (D + P) and
    `medication` (M).

    Args:
        num_diagnoses: D.
        num_procedures: P.
        num_medications: M.
        embed_dim: Width h, divisible by `num_heads`.
        num_layers: Encoder layers, at least 1.
        num_heads: Attention heads.
        ff_dim: Width of the feed-forward part.
        dropout: In [0, 1).
        relevance: `"rank"`, the method: the n-th code of a block gets the n-th relevance vector. `"constant"`: every code
            of a block gets the first one, which is what a slip in the authors' code does; the order of codes then has
            no effect.
        seed: Seed of the initial weights: embeddings U(-0.1, 0.1), the rest torch's defaults.

    Raises:
        ValueError: If an option is out of range.

    Source: Zhao et al., 2024, sec. 4.1, and `src/models/RAREMed.py` of the authors' code.

    Examples:
        >>> model = RAREMed(30, 10, 20, embed_dim=16, num_layers=1, ff_dim=32)
        >>> model.encode([[4, 7, 1], [5]], [[2], []]).shape
        torch.Size([2, 16])
        >>> model
        RAREMed(30, 10, 20, embed_dim=16, num_layers=1, num_heads=4, ff_dim=32, dropout=0.3, relevance='rank')
    """

    def __init__(
        self,
        num_diagnoses: int,
        num_procedures: int,
        num_medications: int,
        embed_dim: int = 512,
        num_layers: int = 3,
        num_heads: int = 4,
        ff_dim: int = 2048,
        dropout: float = 0.3,
        relevance: Relevance = "rank",
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = {
            "num_diagnoses": num_diagnoses, "num_procedures": num_procedures, "num_medications": num_medications,
            "embed_dim": embed_dim, "num_layers": num_layers, "num_heads": num_heads, "ff_dim": ff_dim,
        }  # fmt: skip
        for name, size in sizes.items():
            check_positive(name, size)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be divisible by num_heads={num_heads}, got {embed_dim}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout!r}")
        check_choice("relevance", relevance, RELEVANCES)
        self.num_diagnoses, self.num_procedures, self.num_medications = num_diagnoses, num_procedures, num_medications
        self._options: dict[str, Any] = {**sizes, "dropout": dropout, "relevance": relevance}
        self._ranked = relevance == "rank"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # [CLS], [SEP], the diagnoses and their [MASK], the procedures and theirs
            self.token = nn.Embedding(_FIRST + num_diagnoses + 1 + num_procedures + 1, embed_dim)
            self.segment = nn.Embedding(2, embed_dim)
            self.relevance = nn.Embedding(2 * _BLOCK, embed_dim)
            for table in (self.token, self.segment, self.relevance):
                nn.init.uniform_(table.weight, -0.1, 0.1)
            layer = nn.TransformerEncoderLayer(embed_dim, num_heads, ff_dim, dropout, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
            self.smp = nn.Linear(embed_dim, 1)
            self.sr = nn.Linear(embed_dim, num_diagnoses + num_procedures)
            self.medication = nn.Linear(embed_dim, num_medications)

    def options(self) -> dict[str, Any]:
        """The arguments of the constructor, but the seed."""
        return dict(self._options)

    def __repr__(self) -> str:
        values = list(self._options.items())
        sizes = ", ".join(str(value) for _, value in values[:3])
        return f"RAREMed({sizes}, {', '.join(f'{name}={value!r}' for name, value in values[3:])})"

    def forward(self, diagnoses: Lists, procedures: Lists) -> Tensor:
        """Medication logits `(B, M)` of visits; see `encode`."""
        logits: Tensor = self.medication(self.encode(diagnoses, procedures))
        return logits

    def encode(self, diagnoses: Lists, procedures: Lists) -> Tensor:
        """Represent visits.

        Args:
            diagnoses: Diagnosis ids of the B visits by priority, at least one each and at most 999.
            procedures: Their procedure ids; a visit without any ends after `[SEP]`.

        Returns:
            Shape `(B, h)`.

        Raises:
            ValueError: If the lists don't fit, a visit has no diagnoses or too many codes, or an id is out of range.
        """
        return self.encode_tokens(self.tokens(diagnoses, procedures))

    def tokens(self, diagnoses: Lists, procedures: Lists) -> Tokens:
        """Build the padded input of `encode_tokens` on the device of the model; arguments as in `encode`."""
        if not 0 < len(diagnoses) == len(procedures):
            raise ValueError(f"expected as many procedure as diagnosis lists, got {len(procedures)}, {len(diagnoses)}")
        check_codes(diagnoses, procedures, self.num_diagnoses, self.num_procedures)
        tokens = self.build_tokens(diagnoses, procedures)
        return Tokens(*(None if part is None else part.to(self.token.weight.device) for part in tokens))  # type: ignore[arg-type]

    def build_tokens(self, diagnoses: Lists, procedures: Lists) -> Tokens:
        """As `tokens`, on the CPU and without checks of the ids, among which may be the [MASK] of a kind, D or P."""
        longest = max(max(len(d), len(p)) for d, p in zip(diagnoses, procedures, strict=True))
        if longest > MAX_CODES:
            raise ValueError(f"a visit may have at most {MAX_CODES} diagnoses and as many procedures, got {longest}")
        second = _FIRST + self.num_diagnoses + 1
        ids: list[int] = []
        rank: list[int] = []
        for d, p in zip(diagnoses, procedures, strict=True):
            ids += [_CLS, *(_FIRST + code for code in d), _SEP, *(second + code for code in p)]
            rank += [*range(len(d) + 1), *range(_BLOCK, _BLOCK + len(p) + 1)]
        before_sep = np.array([len(d) + 1 for d in diagnoses])
        length = before_sep + 1 + np.array([len(p) for p in procedures])
        position = np.arange(length.max())
        valid = position < length[:, None]
        padded = np.zeros((2, *valid.shape), dtype=np.int64)
        padded[:, valid] = ids, rank
        relevance = padded[1] if self._ranked else padded[1] // _BLOCK * _BLOCK
        segment = (position > before_sep[:, None]).astype(np.int64)
        padding = None if valid.all() else torch.from_numpy(~valid)
        return Tokens(torch.from_numpy(padded[0]), torch.from_numpy(relevance), torch.from_numpy(segment), padding)

    def encode_tokens(self, tokens: Tokens) -> Tensor:
        """Represent visits that `tokens` has prepared, shape `(B, h)`."""
        x = self.token(tokens.ids) + self.segment(tokens.segment) + self.relevance(tokens.relevance)
        layers = list(self.encoder.layers)
        for layer in layers[:-1]:
            x = layer(x, src_key_padding_mask=tokens.padding)
        return _first_position(layers[-1], x, tokens.padding)

    @torch.no_grad()
    def recommend(self, visit: Visit | tuple[Sequence[int], Sequence[int]], threshold: float = 0.5) -> list[int]:
        """Recommend the medications whose probability is at least `threshold`.

        Args:
            visit: A `Visit`, or its diagnosis and procedure ids.
            threshold: In (0, 1).

        Returns:
            Medication ids in ascending order.

        Raises:
            ValueError: If `threshold` is out of range, or the visit as in `encode`.
        """
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must be between 0 and 1 (both excluded), got {threshold!r}")
        diagnoses, procedures = visit if len(visit) == 2 else (visit.diagnoses, visit.procedures)
        was_training = self.training
        self.eval()
        try:
            probability = torch.sigmoid(self([diagnoses], [procedures]))[0]
        finally:
            self.train(was_training)
        chosen: list[int] = torch.nonzero(probability >= threshold).flatten().tolist()
        return chosen


def _first_position(layer: nn.TransformerEncoderLayer, x: Tensor, padding: Tensor | None) -> Tensor:
    """Output of a post-norm encoder layer at the first position alone: the others would be thrown away."""
    first: Tensor = x[:, :1]
    attended, _ = layer.self_attn(first, x, x, key_padding_mask=padding, need_weights=False)
    first = layer.norm1(first + layer.dropout1(attended))
    hidden = layer.dropout(layer.activation(layer.linear1(first)))
    out: Tensor = layer.norm2(first + layer.dropout2(layer.linear2(hidden)))
    return out[:, 0]


def save_raremed(model: RAREMed, path: str | os.PathLike[str]) -> None:
    """Write a model to a safetensors file, its options in the header.

    Args:
        model: The model.
        path: File to write or to replace.
    """
    write_tensors(path, model.state_dict(), {"kind": _MODEL, "version": 1, "options": model.options()})


def load_raremed(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> RAREMed:
    """Read a model that `save_raremed` wrote.

    Args:
        path: The file.
        device: Where to put the model.

    Returns:
        The model, in training mode.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or holds something else.

    Examples:
        >>> import tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "model.safetensors"
        ...     save_raremed(RAREMed(30, 10, 20, embed_dim=16, num_layers=1, ff_dim=32), path)
        ...     load_raremed(path).num_medications
        20
    """
    tensors, metadata = read_tensors(path, _MODEL)
    model = RAREMed(**metadata["options"])
    model.load_state_dict(tensors)
    return model.to(device)
