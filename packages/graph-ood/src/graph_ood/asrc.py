from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator, ClusterMixin  # type: ignore[import-untyped]
from torch import Tensor, nn

from graph_ood.rcc import RCC, as_points, check_neighbors, clustering_scores

__all__ = ["AdaGAE", "CanGraph", "adagae_forward", "can_graph", "clustering_scores", "prototype_contrastive_loss"]

_TINY = 1e-10
_FAR = -50.0


class CanGraph(NamedTuple):
    prob: Tensor
    adjacency: Tensor
    normalized_adjacency: Tensor
    distance: Tensor


def can_graph(x: Tensor, num_neighbors: int) -> CanGraph:
    distance = _squared_distances(x.double())
    prob = _can_weights(distance, num_neighbors)
    adjacency = (prob + prob.T) / 2
    graph = CanGraph(prob, adjacency, _normalized(adjacency), distance)
    return CanGraph(*(part.to(x.dtype) for part in graph))


def _squared_distances(x: Tensor) -> Tensor:
    x = x - x.mean(0)
    squared = x.square().sum(1)
    distance = squared[:, None] + squared[None, :] - 2 * (x @ x.T)
    distance = torch.maximum(distance, distance.T).clamp_min_(0)
    return distance.fill_diagonal_(0)


def _can_weights(distance: Tensor, k: int) -> Tensor:
    nearest, index = distance.topk(k + 1, dim=1, largest=False)
    top = nearest[:, k:] + _TINY
    weight = (top - nearest) / (k * top - nearest[:, :k].sum(1, keepdim=True))
    return torch.zeros_like(distance).scatter_(1, index, weight.clamp_min_(0))


def _normalized(adjacency: Tensor) -> Tensor:
    scale = adjacency.sum(1).rsqrt()
    return scale[:, None] * adjacency * scale[None, :]


class _Distances(torch.autograd.Function):
    """Squared distances at some places (flat index) and logsumexp of the negative distances of every row."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        z = z - z.mean(0)
        squared = z.square().sum(1)
        near = torch.addmm(-squared[None, :], z, z.T, beta=1, alpha=2)
        near -= squared[:, None]
        distance = near.view(-1)[place].neg_().clamp_min_(0)
        # The largest entry of a row is the point itself, at distance 0: nothing can overflow. exp() of what would
        # become a denormal number takes ten times as long.
        total = near.clamp_(min=_FAR).exp_().sum(1)
        ctx.save_for_backward(z, place, near.div_(total[:, None]))
        return distance, total.log()

    @staticmethod
    def backward(ctx: Any, grad_distance: Tensor, grad_lse: Tensor) -> tuple[Tensor, None]:
        z, place, soft = ctx.saved_tensors
        pull = soft * grad_lse[:, None]
        pull.view(-1).index_add_(0, place, -grad_distance)
        pull = pull + pull.T
        return -2 * (pull.sum(1, keepdim=True) * z - pull @ z), None


@dataclass(frozen=True)
class _Support:
    place: Tensor
    row: Tensor
    prob: Tensor
    adjacency: Tensor

    @classmethod
    def of(cls, prob: Tensor, adjacency: Tensor) -> _Support:
        place = torch.nonzero(((prob != 0) | (adjacency != 0)).view(-1)).squeeze(1)
        return cls(place, place // prob.shape[1], prob.reshape(-1)[place], adjacency.reshape(-1)[place])


def _graph_loss(z: Tensor, support: _Support, lam: float) -> Tensor:
    distance, lse = _Distances.apply(z, support.place)
    recon = torch.exp(-distance - lse[support.row]) + _TINY
    kl = support.prob * torch.log(support.prob / recon + _TINY)
    return (kl.sum() + lam / 2 * (support.adjacency * distance).sum()) / len(z)


def adagae_forward(x, w1, w2, adjacency, prob, lam):
    s = _normalized(adjacency)
    z = s @ (torch.relu(s @ (x @ w1)) @ w2)
    recon = torch.softmax(-torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist").square(), 1) + _TINY
    return z, recon, _graph_loss(z, _Support.of(prob, adjacency), lam)


def prototype_contrastive_loss(z1: Tensor, z2: Tensor, labels: Tensor, *, tau: float = 0.5) -> Tensor:
    number, labels = labels.unique(return_inverse=True)
    if len(number) == 1:
        return (z1 * 0).sum() + (z2 * 0).sum()
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    with torch.no_grad():
        prototypes = F.normalize(z1.new_zeros(len(number), z1.shape[1]).index_add_(0, labels, z1), dim=1)
    positive = (z1 * z2).sum(1, keepdim=True) / tau
    negative = (z1 @ prototypes.T / tau).scatter(1, labels[:, None], -math.inf)
    return -F.log_softmax(torch.cat([positive, negative], 1), 1)[:, 0].mean()


class AdaGAE(nn.Module):
    pass
class ASRC:
    pass
