"""The options of a loss in training, and which of them go together."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from recsys_losses._checks import SIMILARITIES, check_choice, check_finite, check_positive
from recsys_losses.adap_tau import CENTERS
from recsys_losses.bsl import MODES

if TYPE_CHECKING:
    from recsys_losses._checks import Similarity

Negatives = Literal["uniform", "in-batch", "popularity", "all"]
L2On = Literal["layer0", "output", "table"]

LOSSES = ("bpr", "bce", "softmax", "ssm", "bsl", "bilateral", "adap-tau", "cpr")
NEGATIVES = ("uniform", "in-batch", "popularity", "all")
L2_ON = ("layer0", "output", "table")

POINTWISE = ("bpr", "bce")
_SAMPLING = {"negatives", "popularity_beta", "exclude_positives", "group_by_user"}
_SOFTMAX = _SAMPLING | {"num_negatives", "shared_negatives", "mask_accidental", "similarity"}
# Options beside the name that a loss uses; any other must keep its default.
_USED = {
    "bpr": _SAMPLING | {"similarity"},
    "bce": _SAMPLING | {"similarity", "num_negatives", "shared_negatives"},
    "softmax": _SOFTMAX | {"temperature", "logq"},
    "ssm": _SOFTMAX | {"temperature", "logq"},
    "bsl": _SOFTMAX | {"temperature", "logq", "power", "bsl_mode"},
    "bilateral": _SOFTMAX | {"temperature", "logq", "tau_pos", "tau_neg"},
    "adap-tau": (_SOFTMAX - {"similarity"}) | {"beta", "center", "quantile", "warmup_epochs"},
    "cpr": {"cpr_max_k", "cpr_sample_rate", "cpr_sample_ratio"},
}


@dataclass(frozen=True)
class LossConfig:
    r"""A loss and its options; an option that the loss doesn't use must keep its default.

    Args:
        name: One of `LOSSES`.
        temperature: $\tau>0$ of softmax, ssm and bsl, and of bilateral where `tau_pos` or `tau_neg` is None.
        negatives: `"uniform"`: drawn from all items; `"popularity"`: by train count to the power `popularity_beta`;
            `"in-batch"`: the items of the other rows; `"all"`: the whole catalogue, in blocks. bpr and bce take the first
            two only.
        num_negatives: N; None is 1 for bpr, 4 for bce and 512 otherwise.
        shared_negatives: One set of N negatives for the whole batch, or own ones for every row. None is True for the
            softmax losses unless `exclude_positives`.
        exclude_positives: Never draw a user's train items (uniform negatives of their own only). None is True for bpr
            and bce with uniform negatives, False otherwise.
        logq: Subtract $\log q$ of the item from its logit (in-batch and popularity negatives). ssm corrects the positive
            too, the others, which leave it out of the denominator, the negatives only.
        mask_accidental: Leave out negatives that are the row's own item. ssm masks them all; for the other losses a row
            that would be left without any keeps them, and means over negatives keep N as divisor.
        similarity: `"cosine"` or `"dot"` scores in training; None is dot for bpr, bce and cpr, cosine otherwise.
        power: $r$ of bsl.
        bsl_mode: `"multi"`, `"reweight"` or `"single"`.
        group_by_user: Put the rows of a user next to each other, hence into the same batch, in random order of users.
        tau_pos: $\tau_+$ of bilateral.
        tau_neg: $\tau_-$ of bilateral.
        beta: $\beta$ of adap-tau.
        center: `"mean"` or `"quantile"` of the user losses in adap-tau; `"none"` keeps the global temperature for all.
        quantile: The quantile of `center="quantile"`.
        warmup_epochs: Epochs of adap-tau with the closed-form temperature.
        cpr_max_k: Longest cycle of cpr.
        cpr_sample_rate: Cycles drawn for one that is kept.
        cpr_sample_ratio: Cycles of length k for one of k + 1.
        popularity_beta: Exponent of `negatives="popularity"`.

    Raises:
        ValueError: If a name is unknown, a number out of range, or an option can't be used with the loss.

    Examples:
        >>> LossConfig("ssm", negatives="in-batch", logq=True, temperature=0.2).name
        'ssm'
    """

    name: str
    temperature: float = 0.1
    negatives: Negatives = "uniform"
    num_negatives: int | None = None
    shared_negatives: bool | None = None
    exclude_positives: bool | None = None
    logq: bool = False
    mask_accidental: bool = False
    similarity: Similarity | None = None
    power: float = 1.0
    bsl_mode: Literal["multi", "reweight", "single"] = "multi"
    group_by_user: bool = False
    tau_pos: float | None = None
    tau_neg: float | None = None
    beta: float = 1.0
    center: Literal["mean", "quantile", "none"] = "mean"
    quantile: float | None = None
    warmup_epochs: int = 100
    cpr_max_k: int = 3
    cpr_sample_rate: float = 3.0
    cpr_sample_ratio: float = 3.0
    popularity_beta: float = 1.0

    def __post_init__(self) -> None:
        check_choice("loss", self.name, LOSSES)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in _USED[self.name] | {"name"} and value != field.default:
                raise ValueError(
                    f"{field.name}={value!r} is not used by loss {self.name!r}; leave it at {field.default!r}"
                )
        self._check_values()
        self._check_negatives()

    def _check_values(self) -> None:
        for name in ("temperature", "tau_pos", "tau_neg", "beta"):
            value = getattr(self, name)
            if value is not None:
                check_positive(name, value)
        check_finite("power", self.power)
        check_choice("bsl_mode", self.bsl_mode, MODES)
        check_choice("center", self.center, (*CENTERS, "none"))
        if self.similarity is not None:
            check_choice("similarity", self.similarity, SIMILARITIES)
        if self.center == "quantile" and (self.quantile is None or not 0 <= self.quantile <= 1):
            raise ValueError(f"quantile must be in [0, 1] with center='quantile', got {self.quantile!r}")
        if self.num_negatives is not None and not self.num_negatives >= 1:
            raise ValueError(f"num_negatives must be >= 1, got {self.num_negatives!r}")

    def _check_negatives(self) -> None:
        check_choice("negatives", self.negatives, NEGATIVES)
        if self.name in POINTWISE and self.negatives not in ("uniform", "popularity"):
            raise ValueError(f"loss {self.name!r} takes negatives 'uniform' or 'popularity', got {self.negatives!r}")
        if self.negatives in ("in-batch", "all"):
            for name in ("num_negatives", "shared_negatives", "exclude_positives"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} has no meaning with negatives={self.negatives!r}; leave it at None")
        if self.logq and self.negatives not in ("in-batch", "popularity"):
            raise ValueError(f"logq needs negatives 'in-batch' or 'popularity', got {self.negatives!r}")
        if self.mask_accidental and self.negatives == "all":
            raise ValueError("mask_accidental has no meaning with negatives='all': the row's own item is known")
        if self.exclude_positives and (self.shared_negatives or self.negatives != "uniform"):
            raise ValueError("exclude_positives needs uniform negatives that aren't shared by the batch")


class Draws(NamedTuple):
    """How sampled negatives are drawn."""

    number: int
    shared: bool
    exclude: bool


def draws_of(config: LossConfig) -> Draws:
    """Return how a loss draws its negatives, with the defaults of that loss filled in."""
    pointwise = config.name in POINTWISE
    number = config.num_negatives or {"bpr": 1, "bce": 4}.get(config.name, 512)
    exclude = config.exclude_positives
    if exclude is None:
        exclude = pointwise and config.negatives == "uniform" and not config.shared_negatives
    shared = config.shared_negatives
    if shared is None:
        shared = not (pointwise or exclude)
    return Draws(number, shared, exclude)
