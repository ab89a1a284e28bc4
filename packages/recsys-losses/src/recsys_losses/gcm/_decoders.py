"""Decoders: the score of a user, an item and a context, and of a user and a context with all items."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from recsys_losses._checks import upcast
from recsys_losses.baselines import result_dtype
from recsys_losses.gcm._convolution import SLOPE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

DECODERS = ("fm", "inner_product", "mlp")

_BLOCK = 2**22  # hidden units that mlp_rank holds at once


def fm_decode(user: Tensor, item: Tensor, context_rows: Tensor, bias: Tensor) -> Tensor:
    r"""Factorisation machine over the user, the item and the context fields, each a variable of its own.

    $$\hat y=p\cdot q+(p+q)\cdot s+\tfrac12\big(\lVert s\rVert^2-\textstyle\sum_f\lVert v_f\rVert^2\big)+b,\qquad
    s=\sum_f v_f$$

    which is $\frac12\sum_d[(\sum_t x_t)^2-\sum_t x_t^2]$ over $x=(p,q,v_1,\dots,v_k)$ without squares that cancel.

    Args:
        user: p, shape `(B, d)`, floating.
        item: q, shape `(B, d)`.
        context_rows: Vectors v of the fields, shape `(B, k, d)`; not their mean.
        bias: Sum of all biases, shape `(B,)`.

    Returns:
        Logits, shape `(B,)`, in the promoted dtype; half precision is computed in float32.

    Raises:
        ValueError: If the shapes don't fit or a dtype isn't floating.

    Reference: Wu et al., 2020, section 3.4; S. Rendle, *Factorization Machines*, ICDM 2010.

    Examples:
        >>> import torch
        >>> ones = torch.ones(1, 2)
        >>> fm_decode(ones, 2 * ones, 3 * ones[None], torch.zeros(1))  # 2 (1*2 + 1*3 + 2*3)
        tensor([22.])
    """
    if user.ndim != 2 or item.shape != user.shape:
        raise ValueError(f"expected user (B, d) and item (B, d), got {tuple(user.shape)} and {tuple(item.shape)}")
    _check_rows(user, context_rows)
    if bias.shape != user.shape[:1]:
        raise ValueError(f"bias must be (B,) = ({len(user)},), got {tuple(bias.shape)}")
    dtype = result_dtype(user=user, item=item, context_rows=context_rows, bias=bias)
    user, item, context_rows, bias = (upcast(x.to(dtype)) for x in (user, item, context_rows, bias))
    total, inside = _fields(context_rows)
    return ((user * item).sum(1) + ((user + item) * total).sum(1) + inside + bias).to(dtype)


def fm_rank(
    user: Tensor,
    context_rows: Tensor,
    user_bias: Tensor | float,
    context_bias: Tensor | float,
    item: Tensor,
    item_bias: Tensor,
    *,
    global_bias: Tensor | float = 0.0,
) -> Tensor:
    r"""Scores of all items for a user in a context, or for a block of them: one matrix product.

    $$\hat y_i=q_i\cdot\Big(p+\sum_f v_f\Big)+b_i+\underbrace{p\cdot\sum_f v_f
      +\tfrac12\big(\lVert\textstyle\sum_f v_f\rVert^2-\sum_f\lVert v_f\rVert^2\big)+b_u+\sum_f b_f+b_0}_{\text{the
      same for all items}}$$

    Args:
        user: p, shape `(d,)` or `(B, d)`, floating.
        context_rows: Vectors of the context fields, shape `(k, d)` or `(B, k, d)`.
        user_bias: $b_u$: a number, or of shape `(B,)` or `(B, 1)`.
        context_bias: $b_f$ of the fields, shape `(k,)` or `(B, k)`, with or without a last dimension of 1; or their sum:
            a number, or of shape `(B,)`.
        item: Vectors of the items, shape `(I, d)`.
        item_bias: $b_i$, shape `(I,)` or `(I, 1)`.
        global_bias: $b_0$, one number.

    Returns:
        Scores, shape `(I,)` or `(B, I)`, equal to `fm_decode` for every item.

    Raises:
        ValueError: If the shapes don't fit or a dtype isn't floating.

    Examples:
        >>> import torch
        >>> fm_rank(torch.ones(2), 3 * torch.ones(1, 2), 0.0, 0.0, 2 * torch.ones(1, 2), torch.zeros(1))
        tensor([22.])
    """
    if user.ndim == 1:
        one = (user[None], context_rows[None], user_bias, torch.as_tensor(context_bias)[None])
        return fm_rank(*one, item, item_bias, global_bias=global_bias)[0]
    if user.ndim != 2 or item.ndim != 2 or item.shape[1] != user.shape[1]:
        raise ValueError(f"expected user (B, d) and item (I, d), got {tuple(user.shape)} and {tuple(item.shape)}")
    _check_rows(user, context_rows)
    if item_bias.numel() != len(item):
        raise ValueError(f"item_bias must hold {len(item)} values, got {tuple(item_bias.shape)}")
    dtype = result_dtype(user=user, context_rows=context_rows, item=item, item_bias=item_bias)
    user, context_rows, item = (upcast(x.to(dtype)) for x in (user, context_rows, item))
    total, inside = _fields(context_rows)
    constant = (user * total).sum(1) + inside
    for name, bias in (("user_bias", user_bias), ("context_bias", context_bias), ("global_bias", global_bias)):
        constant = constant + _per_row(name, bias, constant, context_rows.shape[1])
    scores = torch.addmm(item_bias.reshape(1, -1).to(user.dtype), user + total, item.T)
    return scores.add_(constant[:, None]).to(dtype)


def mlp_decode(user: Tensor, item: Tensor, context_rows: Tensor, weights: Sequence[Tensor]) -> Tensor:
    r"""Neurons over the concatenation of the user, the item and the context fields.

    $$z^0=[p;q;v_1;\dots;v_k],\qquad z^{j+1}=\mathrm{LeakyReLU}_{0.2}(W_jz^j+b_j),\qquad \hat y=w\cdot z^h$$

    Args:
        user: p, shape `(B, d)`, floating.
        item: q, shape `(B, d)`.
        context_rows: v, shape `(B, k, d)`.
        weights: $W_1,b_1,\dots,W_h,b_h,w$ with the shapes `(d, (k + 2) d)`, `(d,)`, then `(d, d)`, `(d,)`, and last
            `(1, d)`, or `(1, (k + 2) d)` for h = 0.

    Returns:
        Logits, shape `(B,)`.

    Raises:
        ValueError: If shapes don't fit.

    Reference: Wu et al., 2020, section 3.4 (a decoder that the paper compares with).

    Examples:
        >>> import torch
        >>> mlp_decode(torch.ones(1, 1), torch.ones(1, 1), 2 * torch.ones(1, 1, 1), [torch.ones(1, 3)])
        tensor([4.])
    """
    if user.ndim != 2 or item.shape != user.shape:
        raise ValueError(f"expected user (B, d) and item (B, d), got {tuple(user.shape)} and {tuple(item.shape)}")
    _check_rows(user, context_rows)
    check_decoder_weights(weights, user.shape[1], context_rows.shape[1])
    hidden = torch.cat([user, item, context_rows.flatten(1)], 1)
    for weight, bias in zip(weights[:-1:2], weights[1::2], strict=True):
        hidden = F.leaky_relu(F.linear(hidden, weight, bias), SLOPE)
    return F.linear(hidden, weights[-1])[:, 0]


def mlp_rank(user: Tensor, context_rows: Tensor, item: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Scores of all items by `mlp_decode`; the first layer meets every user, context and item once.

    Args:
        user: Shape `(B, d)`, floating.
        context_rows: Shape `(B, k, d)`.
        item: Shape `(I, d)`.
        weights: As in `mlp_decode`.

    Returns:
        Scores, shape `(B, I)`. The hidden layers of some users at a time are in memory.

    Raises:
        ValueError: If shapes don't fit.

    Examples:
        >>> import torch
        >>> mlp_rank(torch.ones(1, 1), 2 * torch.ones(1, 1, 1), torch.tensor([[1.0], [5.0]]), [torch.ones(1, 3)])
        tensor([[4., 8.]])
    """
    if user.ndim != 2 or item.ndim != 2 or item.shape[1] != user.shape[1]:
        raise ValueError(f"expected user (B, d) and item (I, d), got {tuple(user.shape)} and {tuple(item.shape)}")
    _check_rows(user, context_rows)
    dim = user.shape[1]
    check_decoder_weights(weights, dim, context_rows.shape[1])
    first = weights[0]
    from_item = F.linear(item, first[:, dim : 2 * dim])
    rest = torch.cat([first[:, :dim], first[:, 2 * dim :]], 1)
    from_rest = F.linear(torch.cat([user, context_rows.flatten(1)], 1), rest)
    if len(weights) == 1:
        return from_rest + from_item.T
    from_rest = from_rest + weights[1]
    blocks = []
    for rows in torch.split(from_rest, max(1, _BLOCK // max(1, from_item.numel()))):
        hidden = F.leaky_relu(rows[:, None] + from_item, SLOPE)
        for weight, bias in zip(weights[2:-1:2], weights[3::2], strict=True):
            hidden = F.leaky_relu(F.linear(hidden, weight, bias), SLOPE)
        blocks.append(F.linear(hidden, weights[-1])[..., 0])
    return torch.cat(blocks) if blocks else user.new_empty(0, len(item))


def check_decoder_weights(weights: Sequence[Tensor], dim: int, fields: int) -> None:
    """Raise ValueError unless the weights have the shapes that `mlp_decode` describes."""
    hidden = len(weights) // 2
    widths = [(fields + 2) * dim] + [dim] * hidden
    wanted = [shape for width in widths[:hidden] for shape in ((dim, width), (dim,))] + [(1, widths[hidden])]
    shapes = [tuple(weight.shape) for weight in weights]
    if len(weights) % 2 == 0 or shapes != wanted:
        raise ValueError(f"decoder_weights must be W, b per hidden layer and one last w, shapes {wanted}, got {shapes}")


def _check_rows(user: Tensor, context_rows: Tensor) -> None:
    wanted = (len(user), user.shape[1])
    if context_rows.ndim != 3 or (context_rows.shape[0], context_rows.shape[2]) != wanted:
        raise ValueError(
            f"context_rows must be (B, k, d) = ({wanted[0]}, k, {wanted[1]}), got {tuple(context_rows.shape)}"
        )


def _fields(context_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the fields (B, d) and their products among each other (B,)."""
    total = context_rows.sum(1)
    return total, (total.square().sum(1) - context_rows.square().sum((1, 2))) / 2


def _per_row(name: str, bias: Tensor | float, like: Tensor, fields: int) -> Tensor:
    """Return a bias as (B,) or (1,), the fields of a context added up."""
    bias = torch.as_tensor(bias, dtype=like.dtype, device=like.device)
    if name == "context_bias" and bias.shape in ((len(like), fields), (len(like), fields, 1)):
        return bias.flatten(1).sum(1)
    if bias.numel() == 1 or bias.numel() == len(like):
        return bias.reshape(-1)
    raise ValueError(f"{name} must be one number or hold one per row ({len(like)}), got {tuple(bias.shape)}")
