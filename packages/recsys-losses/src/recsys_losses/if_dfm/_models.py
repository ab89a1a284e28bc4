"""Backbones of conversion-rate models on numeric and categorical features: logistic, MLP, DeepFM, AutoInt, DCNv2."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from recsys_losses._checks import check_choice
from recsys_losses._storage import read_tensors, write_tensors

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from torch import Tensor

ModelName = Literal["logistic", "mlp", "deepfm", "autoint", "dcnv2"]

_MODEL = "recsys_losses if_dfm model"


class LogisticModel(nn.Module):
    r"""Logistic regression on numeric features and one-hot codes: $f=b+x^\top w+\sum_fw_f[\text{code}_f]$.

    Args:
        num_numeric: Numeric features, >= 0.
        cardinalities: Codes of each categorical feature.
        outputs: Logits per row; with 1 the result is `(B,)`, else `(B, outputs)`.

    Raises:
        ValueError: If a size is out of range.

    Examples:
        >>> import torch
        >>> LogisticModel(2, [3, 4])(torch.zeros(5, 2), torch.zeros(5, 2, dtype=torch.long)).shape
        torch.Size([5])
    """

    def __init__(self, num_numeric: int, cardinalities: Sequence[int], *, outputs: int = 1) -> None:
        super().__init__()
        self.first = _FirstOrder(num_numeric, cardinalities, outputs)

    def forward(self, x_num: Tensor, x_cat: Tensor) -> Tensor:
        return _squeezed(self.first(x_num, x_cat))


class MLPModel(nn.Module):
    """Embeddings of all fields side by side, then a multi-layer perceptron.

    Args:
        num_numeric: Numeric features, >= 0; each has a vector that its value scales.
        cardinalities: Codes of each categorical feature.
        dim: Width of the embeddings (64 in the authors' code).
        hidden: Widths of the layers (256, 256, 128 in the authors' code), LeakyReLU after each.
        outputs: Logits per row.

    Raises:
        ValueError: If a size is out of range.

    Examples:
        >>> import torch
        >>> MLPModel(2, [3, 4])(torch.zeros(5, 2), torch.zeros(5, 2, dtype=torch.long)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        num_numeric: int,
        cardinalities: Sequence[int],
        *,
        dim: int = 8,
        hidden: Sequence[int] = (64, 32),
        outputs: int = 1,
    ) -> None:
        super().__init__()
        self.fields = _Fields(num_numeric, cardinalities, dim, std=1.0)
        self.deep = _perceptron(self.fields.width, hidden, outputs)

    def forward(self, x_num: Tensor, x_cat: Tensor) -> Tensor:
        return _squeezed(self.deep(self.fields(x_num, x_cat).flatten(1)))


class DeepFM(nn.Module):
    r"""Perceptron, first-order terms and the pairwise products of a factorisation machine (Guo et al., 2017).

    $$f=\mathrm{MLP}(e)+\langle w,x\rangle+\tfrac12\textstyle\sum_k\bigl[(\sum_fe_{fk})^2-\sum_fe_{fk}^2\bigr]$$

    Args:
        num_numeric: Numeric features, >= 0.
        cardinalities: Codes of each categorical feature.
        dim: Width of the embeddings.
        hidden: Widths of the layers.
        outputs: Logits per row; the pairwise part is shared by them.

    Raises:
        ValueError: If a size is out of range.

    Examples:
        >>> import torch
        >>> DeepFM(2, [3, 4])(torch.zeros(5, 2), torch.zeros(5, 2, dtype=torch.long)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        num_numeric: int,
        cardinalities: Sequence[int],
        *,
        dim: int = 8,
        hidden: Sequence[int] = (64, 32),
        outputs: int = 1,
    ) -> None:
        super().__init__()
        self.fields = _Fields(num_numeric, cardinalities, dim, std=0.01)
        self.first = _FirstOrder(num_numeric, cardinalities, outputs)
        self.deep = _perceptron(self.fields.width, hidden, outputs)

    def forward(self, x_num: Tensor, x_cat: Tensor) -> Tensor:
        e = self.fields(x_num, x_cat)
        pairs = 0.5 * (e.sum(1).square() - e.square().sum(1)).sum(1, keepdim=True)
        return _squeezed(self.deep(e.flatten(1)) + self.first(x_num, x_cat) + pairs)


class AutoInt(nn.Module):
    """Self-attention over the fields, then one linear layer (Song et al., 2019).

    Args:
        num_numeric: Numeric features, >= 0.
        cardinalities: Codes of each categorical feature.
        dim: Width of the embeddings.
        layers: Attention layers, >= 1 (3 in the authors' code).
        heads: Heads, a divisor of `attention_dim` (2 in the authors' code).
        attention_dim: Width of the attention (64 in the authors' code).
        outputs: Logits per row.

    Raises:
        ValueError: If a size is out of range.

    Examples:
        >>> import torch
        >>> AutoInt(2, [3, 4])(torch.zeros(5, 2), torch.zeros(5, 2, dtype=torch.long)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        num_numeric: int,
        cardinalities: Sequence[int],
        *,
        dim: int = 8,
        layers: int = 2,
        heads: int = 2,
        attention_dim: int = 16,
        outputs: int = 1,
    ) -> None:
        super().__init__()
        if not layers >= 1:
            raise ValueError(f"layers must be >= 1, got {layers!r}")
        if not heads >= 1 or attention_dim % heads:
            raise ValueError(f"heads must divide attention_dim {attention_dim}, got {heads!r}")
        self.fields = _Fields(num_numeric, cardinalities, dim, std=0.01)
        widths = [dim] + [attention_dim] * layers
        self.attention = nn.ModuleList(_Attention(a, b, heads) for a, b in pairwise(widths))
        _check_outputs(outputs)
        self.out = nn.Linear(self.fields.count * attention_dim, outputs)

    def forward(self, x_num: Tensor, x_cat: Tensor) -> Tensor:
        e = self.fields(x_num, x_cat)
        for layer in self.attention:
            e = layer(e)
        return _squeezed(self.out(e.flatten(1)))


class DCNv2(nn.Module):
    r"""Cross layers $x_{l+1}=x_0\odot(Wx_l+b)+x_l$ with full matrices, then a perceptron (Wang et al., 2021).

    Args:
        num_numeric: Numeric features, >= 0.
        cardinalities: Codes of each categorical feature.
        dim: Width of the embeddings.
        cross_layers: Cross layers, >= 1 (1 in the authors' code).
        hidden: Widths of the perceptron.
        outputs: Logits per row.

    Raises:
        ValueError: If a size is out of range.

    Examples:
        >>> import torch
        >>> DCNv2(2, [3, 4])(torch.zeros(5, 2), torch.zeros(5, 2, dtype=torch.long)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        num_numeric: int,
        cardinalities: Sequence[int],
        *,
        dim: int = 8,
        cross_layers: int = 1,
        hidden: Sequence[int] = (64, 32),
        outputs: int = 1,
    ) -> None:
        super().__init__()
        if not cross_layers >= 1:
            raise ValueError(f"cross_layers must be >= 1, got {cross_layers!r}")
        self.fields = _Fields(num_numeric, cardinalities, dim, std=0.01)
        width = self.fields.width
        self.cross = nn.ModuleList(nn.Linear(width, width) for _ in range(cross_layers))
        self.deep = _perceptron(width, hidden, outputs)

    def forward(self, x_num: Tensor, x_cat: Tensor) -> Tensor:
        first = x = self.fields(x_num, x_cat).flatten(1)
        for layer in self.cross:
            x = first * layer(x) + x
        return _squeezed(self.deep(x))


MODELS: dict[str, type[nn.Module]] = {
    "logistic": LogisticModel,
    "mlp": MLPModel,
    "deepfm": DeepFM,
    "autoint": AutoInt,
    "dcnv2": DCNv2,
}


def build_model(
    name: ModelName, num_numeric: int, cardinalities: Sequence[int], *, seed: int = 0, **options: Any
) -> nn.Module:
    """Return a freshly initialised backbone: `forward(x_num, x_cat)` gives logits.

    Args:
        name: `"logistic"`, `"mlp"`, `"deepfm"`, `"autoint"` or `"dcnv2"`.
        num_numeric: Numeric features; the elapsed time that FSIW appends counts.
        cardinalities: Codes of each categorical feature.
        seed: Seed of the initialisation; the global random state is left alone.
        **options: Sizes, see the classes.

    Raises:
        ValueError: If the name or a size is unknown or out of range.

    Examples:
        >>> import torch
        >>> model = build_model("mlp", 2, (5, 7), dim=4, hidden=(8,))
        >>> model(torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.long)).shape
        torch.Size([3])
    """
    check_choice("model", name, MODELS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return MODELS[name](num_numeric, tuple(cardinalities), **options)
        except TypeError as error:
            raise ValueError(f"model {name!r}: {error}") from error


def save_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: ModelName,
    num_numeric: int,
    cardinalities: Sequence[int],
    options: dict[str, Any] | None = None,
    about: dict[str, Any] | None = None,
) -> None:
    """Write a backbone to a safetensors file, with what `build_model` needs and what else there is to know about it."""
    build = {
        "name": name,
        "num_numeric": num_numeric,
        "cardinalities": list(cardinalities),
        "options": dict(options or {}),
    }
    write_tensors(path, model.state_dict(), {"kind": _MODEL, "version": 1, "build": build, "about": about or {}})


def load_model(path: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, Any]]:
    """Read what `save_model` wrote: the model, and a dict with `build` and `about`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or something else.
    """
    tensors, metadata = read_tensors(path, _MODEL)
    build = metadata["build"]
    model = build_model(build["name"], build["num_numeric"], build["cardinalities"], **build["options"])
    model.load_state_dict(tensors)
    return model, {"build": build, "about": metadata["about"]}


class _Fields(nn.Module):
    """One vector per field: an embedding for a code, a vector scaled by the value for a numeric feature."""

    offsets: Tensor

    def __init__(self, num_numeric: int, cardinalities: Sequence[int], dim: int, std: float) -> None:
        super().__init__()
        _check_features(num_numeric, cardinalities)
        if not dim >= 1:
            raise ValueError(f"dim must be >= 1, got {dim!r}")
        self.count = num_numeric + len(cardinalities)
        self.width = self.count * dim
        self.table = nn.Embedding(max(1, sum(cardinalities)), dim)
        self.numeric = nn.Parameter(torch.empty(num_numeric, dim))
        nn.init.normal_(self.table.weight, std=std)
        nn.init.normal_(self.numeric, std=std)
        self.register_buffer("offsets", _offsets(cardinalities), persistent=False)

    def forward(self, x_num: Tensor, x_cat: Tensor) -> Tensor:
        scaled = x_num.unsqueeze(2).to(self.numeric) * self.numeric
        return torch.cat([scaled, self.table(x_cat + self.offsets)], 1)


class _FirstOrder(nn.Module):
    """Linear terms of all features, from zero."""

    offsets: Tensor

    def __init__(self, num_numeric: int, cardinalities: Sequence[int], outputs: int) -> None:
        super().__init__()
        _check_features(num_numeric, cardinalities)
        _check_outputs(outputs)
        self.table = nn.Embedding(max(1, sum(cardinalities)), outputs)
        self.numeric = nn.Parameter(torch.zeros(num_numeric, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.zeros_(self.table.weight)
        self.register_buffer("offsets", _offsets(cardinalities), persistent=False)

    def forward(self, x_num: Tensor, x_cat: Tensor) -> Tensor:
        out: Tensor = self.table(x_cat + self.offsets).sum(1)
        return out + x_num.to(out) @ self.numeric + self.bias


class _Attention(nn.Module):
    """Multi-head self-attention over fields with a linear residual; plain operations, so that it can be differentiated twice."""

    def __init__(self, width: int, out: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * out, bias=False)
        self.residual = nn.Linear(width, out, bias=False)

    def forward(self, e: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(e).chunk(3, -1))
        weight = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        mixed = (weight @ v).transpose(1, 2).flatten(-2)
        return torch.relu(mixed + self.residual(e))


def _offsets(cardinalities: Sequence[int]) -> Tensor:
    sizes = torch.tensor(tuple(cardinalities), dtype=torch.long)
    return sizes.cumsum(0) - sizes


def _check_features(num_numeric: int, cardinalities: Sequence[int]) -> None:
    if num_numeric < 0 or num_numeric + len(cardinalities) == 0 or any(c < 1 for c in cardinalities):
        raise ValueError(f"a model needs features: num_numeric={num_numeric!r}, cardinalities={tuple(cardinalities)}")


def _check_outputs(outputs: int) -> None:
    if not outputs >= 1:
        raise ValueError(f"outputs must be >= 1, got {outputs!r}")


def _perceptron(width: int, hidden: Sequence[int], outputs: int) -> nn.Sequential:
    _check_outputs(outputs)
    if any(size < 1 for size in hidden):
        raise ValueError(f"hidden must hold widths >= 1, got {tuple(hidden)}")
    widths = [width, *hidden]
    layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.LeakyReLU())]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))


def _squeezed(logits: Tensor) -> Tensor:
    return logits.squeeze(1) if logits.shape[1] == 1 else logits
