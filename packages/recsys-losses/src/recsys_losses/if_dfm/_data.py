"""Clicks with delayed conversions: what is known when, the protocol's windows, the hourly stream, generated data."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from recsys_losses._checks import check_choice, check_positive
from recsys_losses.if_dfm._criteo import read_criteo, write_criteo

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

Duplicates = Literal["conversions", "all", "none"]

DUPLICATES = ("conversions", "all", "none")
DAY = 86_400.0
HOUR = 3_600.0


@dataclass(frozen=True, eq=False)
class Clicks:
    """Some clicks with the labels that were known at one moment; nothing in it comes from later.

    Args:
        x_num: Numeric features, float32 `(N, n)`; n may be 0.
        x_cat: Categorical codes, int64 `(N, f)`.
        label: Whether a conversion was known, float32 0 or 1, `(N,)`.
        click_ts: Seconds of the click, float64 `(N,)`.
        pay_ts: Seconds of the conversion, -1 where none was known, float64 `(N,)`.
        seen_ts: Moment at which the label was read, float64 `(N,)`; infinite for final labels.
        row: Position of the click in the data it comes from, int64 `(N,)`.
    """

    x_num: Tensor
    x_cat: Tensor
    label: Tensor
    click_ts: Tensor
    pay_ts: Tensor
    seen_ts: Tensor
    row: Tensor

    def __len__(self) -> int:
        return len(self.label)

    def __repr__(self) -> str:
        return f"Clicks({len(self)} clicks, {int(self.label.sum())} conversions known)"

    def __getitem__(self, index: Tensor | slice) -> Clicks:
        """Some of the clicks, by a boolean mask, positions or a slice."""
        return Clicks(**{name: value[index] for name, value in vars(self).items()})

    def elapsed(self) -> Tensor:
        """Days from the click to its conversion, or to the moment the label was read; float32 `(N,)`.

        Raises:
            ValueError: If a click without conversion has a final label: its age is not defined.
        """
        days = (torch.where(self.label.bool(), self.pay_ts, self.seen_ts) - self.click_ts) / DAY
        if not bool(days.isfinite().all()):
            raise ValueError("elapsed is not defined for final labels without conversion")
        return days.float()

    def age(self) -> Tensor:
        """Days from the click to the moment the label was read, float32 `(N,)`."""
        return ((self.seen_ts - self.click_ts) / DAY).float()

    def corrected(self, flipped: Clicks) -> Clicks:
        """The same clicks with the labels of those in `flipped` set to 1.

        Raises:
            ValueError: If a flipped click is not among these, or already positive here.
        """
        order = self.row.argsort()
        found = torch.searchsorted(self.row[order], flipped.row).clamp_max(len(self) - 1)
        at = order[found] if len(self) else found
        if len(flipped) and (not len(self) or not torch.equal(self.row[at], flipped.row)):
            raise ValueError("flipped holds clicks that are not among these")
        if bool(self.label[at].any()):
            raise ValueError("flipped holds a click that is already positive")
        return replace(self, label=self.label.index_fill(0, at, 1.0))

    def batches(self, batch_size: int, *, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """Yield `(x_num, x_cat, label)` in order, or shuffled with a generator."""
        for index in _chunks(len(self), batch_size, generator):
            yield Batch(self.x_num[index], self.x_cat[index], self.label[index])

    def loader(self, batch_size: int = 8192) -> ClickLoader:
        """The clicks as batches `(x_num, x_cat, label)` that can be iterated again and again, in order."""
        return ClickLoader(self, batch_size)


class Batch(NamedTuple):
    """Features and labels of some clicks."""

    x_num: Tensor
    x_cat: Tensor
    label: Tensor


@dataclass(frozen=True)
class ClickLoader:
    """Batches of some clicks, for `InfluenceUpdater`.

    Args:
        clicks: The clicks.
        batch_size: Clicks per batch, at least 1.
    """

    clicks: Clicks
    batch_size: int

    def __iter__(self) -> Iterator[Batch]:
        return self.clicks.batches(self.batch_size)

    def __len__(self) -> int:
        return math.ceil(len(self.clicks) / self.batch_size)


class StreamHour(NamedTuple):
    """One step of the streaming protocol: train on what enters in an hour, test on the clicks of the next."""

    hour: int
    train: Clicks
    test: Clicks


@dataclass(frozen=True, eq=False)
class DelayedClicks:
    """Clicks, and when they convert.

    Args:
        x_num: Numeric features, floating `(N, n)`; n may be 0.
        x_cat: Categorical codes from 0, integer `(N, f)`.
        click_ts: Seconds from the start of the log, `(N,)`, in any order.
        pay_ts: Seconds of the conversion, negative where there is none, `(N,)`.
        p_true: Probability of a conversion where it is known (generated data), `(N,)`, or None.
        cardinalities: Number of codes of each categorical column; None takes 1 + the largest.

    Raises:
        ValueError: If the shapes don't fit, there is no click, a code is out of range, a time isn't finite, or a
            conversion lies before the click.

    Examples:
        >>> data = DelayedClicks.synthetic(per_day=50, days=30, seed=1)
        >>> parts = data.window(T=15, duration=14, gap=10, valid=1)
        >>> sorted(parts)
        ['added', 'flipped', 'test', 'train', 'valid']
        >>> bool((parts["flipped"].label == 0).all())  # the labels the model was trained with
        True
    """

    x_num: Tensor
    x_cat: Tensor
    click_ts: Tensor
    pay_ts: Tensor
    p_true: Tensor | None = None
    cardinalities: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _check_data(self)
        tidy = {
            "x_num": self.x_num.float(),
            "x_cat": self.x_cat.long(),
            "click_ts": self.click_ts.double(),
            "pay_ts": torch.where(self.pay_ts < 0, -1.0, self.pay_ts.double()),
            "cardinalities": self.cardinalities or tuple((self.x_cat.amax(0) + 1).tolist()),
        }
        for name, value in tidy.items():
            object.__setattr__(self, name, value)

    @classmethod
    def load_criteo(cls, path: str | os.PathLike[str]) -> DelayedClicks:
        """Read the Criteo conversion log (`data.txt`, 19 tab-separated columns, plain or gzip).

        The file is read in pieces; a piece is cut and encoded with array operations. The eight numeric columns are binned
        as in the authors' code (missing becomes -1, then min-max over the file, then 64, 16, 128, 64, 128, 64, 512 and 512
        bins) and stand before the nine categorical ones, which are numbered in the order of their sorted text, empty
        first. All 17 are codes: `x_num` has no columns.

        Args:
            path: The file; the user downloads it from Criteo, under its licence.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If a line is malformed or a conversion lies before the click, with file and line.

        Source: Chapelle, *Modeling Delayed Feedback in Display Advertising*, KDD 2014.
        """
        log = read_criteo(path)
        return cls(
            torch.zeros(len(log.click_ts), 0),
            torch.from_numpy(log.codes),
            torch.from_numpy(log.click_ts),
            torch.from_numpy(log.pay_ts),
            cardinalities=log.cardinalities,
        )

    @classmethod
    def synthetic(cls, **options: Any) -> DelayedClicks:
        """Return `make_delayed_clicks(**options)`."""
        return make_delayed_clicks(**options)

    def __len__(self) -> int:
        return len(self.click_ts)

    def __repr__(self) -> str:
        converted, days = int((self.pay_ts >= 0).sum()), float(self.click_ts.max()) / DAY
        return f"DelayedClicks({len(self)} clicks, {converted} conversions, {days:.1f} days)"

    def between(self, start: float, stop: float) -> Tensor:
        """Return the rows of the clicks of days [start, stop)."""
        return ((self.click_ts >= start * DAY) & (self.click_ts < stop * DAY)).nonzero().squeeze(1)

    def clicks(self, rows: Tensor, at: float | Tensor = math.inf) -> Clicks:
        """Return some clicks as they were known at a moment.

        Args:
            rows: Positions, integer `(M,)`.
            at: Day at which labels are read, one or `(M,)`; a conversion exactly then is known. Infinite: final labels.
        """
        return self._seen(rows, torch.as_tensor(at, dtype=torch.float64).expand(len(rows)) * DAY)

    def _seen(self, rows: Tensor, seen: Tensor) -> Clicks:
        """Some clicks with the labels known at given seconds, one per click."""
        pay = self.pay_ts[rows]
        known = (pay >= 0) & (pay <= seen)
        return Clicks(
            x_num=self.x_num[rows],
            x_cat=self.x_cat[rows],
            label=known.float(),
            click_ts=self.click_ts[rows],
            pay_ts=torch.where(known, pay, -1.0),
            seen_ts=seen,
            row=rows,
        )

    def window(self, T: float, duration: float, gap: float, valid: float = 1.0) -> dict[str, Clicks]:
        r"""Cut the clicks as the authors' experiment does; all times in days, $\tau=T+\text{gap}-\text{valid}$.

        Args:
            T: End of the training period.
            duration: Length of the training period, > 0.
            gap: From T to the test clicks, more than `valid`.
            valid: Length of the validation period, > 0.

        Returns:
            `train`: clicks of [T - duration, T) with the labels known at T; `flipped`: those of them that convert after
            T and before $\tau$, with the label that they had, 0; `added`: clicks of [T, $\tau$) with the labels known
            at $\tau$; `valid`: clicks of [$\tau$, T + gap) with the labels known at T + gap; `test`: clicks of the day
            from T + gap with final labels. `train.corrected(flipped)` has the labels of a retrained model.

        Raises:
            ValueError: If a length is out of range, or train, valid or test holds no click.
        """
        for name, value in (("duration", duration), ("valid", valid), ("gap - valid", gap - valid)):
            check_positive(name, value)
        tau, end = T + gap - valid, T + gap
        train = self.clicks(self.between(T - duration, T), T)
        pay = self.pay_ts[train.row]
        parts = {
            "train": train,
            "flipped": train[(pay > T * DAY) & (pay < tau * DAY)],
            "added": self.clicks(self.between(T, tau), tau),
            "valid": self.clicks(self.between(tau, end), end),
            "test": self.clicks(self.between(end, end + 1)),
        }
        for name in ("train", "valid", "test"):
            if not len(parts[name]):
                raise ValueError(f"no clicks in the {name} period (T={T}, duration={duration}, gap={gap}); {self!r}")
        return parts

    def entries(
        self,
        rows: Tensor,
        until: float,
        *,
        window_hours: float = 0.25,
        duplicates: Duplicates = "conversions",
        attribution_days: float = 30.0,
    ) -> Clicks:
        """Return what a stream of clicks holds before a moment, ordered by time of entry.

        A click enters when its waiting window ends, with the label known then. With `"conversions"` it enters again as 1 at
        a later conversion (window 0: FNW and FNC; longer: ES-DFM), with `"all"` every click enters again at the end of
        the attribution with its label of then (DEFER), with `"none"` no click enters twice.

        Args:
            rows: Positions of the clicks, integer.
            until: Day; only what enters before it is returned.
            window_hours: Length of the waiting window, >= 0.
            duplicates: `"conversions"`, `"all"` or `"none"`.
            attribution_days: Age at which a click enters again with `"all"`, longer than the window.

        Raises:
            ValueError: If an option is out of range.
        """
        check_choice("duplicates", duplicates, DUPLICATES)
        if not (window_hours >= 0 and math.isfinite(window_hours)):
            raise ValueError(f"window_hours must be a finite number >= 0, got {window_hours!r}")
        first = self.click_ts[rows] + window_hours * HOUR
        entering, at = [rows], [first]
        if duplicates == "conversions":
            late = self.pay_ts[rows] > first
            entering.append(rows[late])
            at.append(self.pay_ts[rows][late])
        if duplicates == "all":
            if not attribution_days * 24 > window_hours:
                raise ValueError(f"attribution_days must be longer than the window, got {attribution_days!r}")
            entering.append(rows)
            at.append(self.click_ts[rows] + attribution_days * DAY)
        seen, order = torch.cat(at).sort(stable=True)
        before = seen < until * DAY
        return self._seen(torch.cat(entering)[order][before], seen[before])

    def streaming(
        self,
        hours: Iterable[int],
        *,
        window_hours: float = 0.25,
        duplicates: Duplicates = "conversions",
        attribution_days: float = 30.0,
    ) -> Iterator[StreamHour]:
        """Go through the log hour by hour: train on what enters in hour h, test on the clicks of hour h + 1.

        What enters carries the label and the conversion time known at its entry, `seen_ts`. Test clicks have final labels,
        which are for evaluation alone.

        Args:
            hours: Hours from the start of the log, such as `range(30 * 24, 60 * 24)`.
            window_hours: See `entries`.
            duplicates: See `entries`.
            attribution_days: See `entries`.

        Yields:
            The hour, its entries in order of time, and the test clicks.

        Raises:
            ValueError: If an option is out of range.

        Source: Yang et al., *Capturing Delayed Feedback in Conversion Rate Prediction via Elapsed-Time Sampling*, AAAI 2021.
        """
        stream = self.entries(
            torch.arange(len(self)),
            math.inf,
            window_hours=window_hours,
            duplicates=duplicates,
            attribution_days=attribution_days,
        )
        clicked, order = self.click_ts.sort()
        for hour in hours:
            bounds = torch.tensor([hour, hour + 1, hour + 2], dtype=torch.float64) * HOUR
            a, b, _ = torch.searchsorted(stream.seen_ts, bounds).tolist()
            _, c, d = torch.searchsorted(clicked, bounds).tolist()
            yield StreamHour(hour, stream[a:b], self.clicks(order[c:d]))

    def to_criteo_file(self, path: str | os.PathLike[str]) -> None:
        """Write the clicks in the format of the Criteo log, 8 numeric and 9 categorical columns; gzip for `.gz`.

        Times are cut to whole seconds, numeric features to thousandths above the smallest of their column, codes become
        hexadecimal text whose order is that of the codes.

        Args:
            path: File to write or to replace.

        Raises:
            ValueError: If there aren't 8 numeric and 9 categorical columns.
        """
        columns = (self.x_num.shape[1], self.x_cat.shape[1])
        if columns != (8, 9):
            raise ValueError(f"the format has 8 numeric and 9 categorical columns, got {columns[0]} and {columns[1]}")
        numeric = ((self.x_num - self.x_num.amin(0)).double() * 1000).round().long()
        write_criteo(path, *(x.numpy() for x in (self.click_ts.long(), self.pay_ts.long(), numeric, self.x_cat)))


def make_delayed_clicks(
    per_day: int = 4000,
    days: int = 30,
    num_numeric: int = 8,
    num_categorical: int = 9,
    cardinality: int = 50,
    base: float = -1.6,
    mean_delay_days: float = 4.0,
    drift: float = 0.02,
    window_days: float = 30.0,
    seed: int = 0,
) -> DelayedClicks:
    r"""Generate clicks whose conversion probability and delay are known functions of the features.

    Click times are uniform, numeric features $x$ standard normal, categorical codes $\min(\mathrm{Geometric}(6/c)-1,c-1)$
    with $c$ the cardinality. A click at day $t$ converts with probability

    $$p=\sigma\Bigl(\text{base}+x^\top(w+\text{drift}\;t\,u)+\textstyle\sum_fw_f[\text{code}_f]\Bigr)$$

    after $\mathrm{Exponential}$ delay of rate $e^{x^\top w_l}/\text{mean\_delay}$ per day, and the conversion is recorded if
    it comes within the window. $w$, $w_f\sim0.35\,N$, $w_l\sim0.3\,N$, $u$ is a random unit vector.

    Args:
        per_day: Clicks per day, at least 1.
        days: Days, at least 1.
        num_numeric: Numeric features, at least 1.
        num_categorical: Categorical features, at least 1.
        cardinality: Codes per categorical feature, at least 7.
        base: Logit of a click at the mean of everything.
        mean_delay_days: Mean delay where $x=0$, > 0.
        drift: Change of the weights per day.
        window_days: Longest delay that is recorded, > 0.
        seed: Seed of everything, the coefficients included.

    Returns:
        The clicks; `p_true` is the probability that a conversion is recorded, $p(1-e^{-\text{rate}\cdot\text{window}})$.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> make_delayed_clicks(per_day=100, days=10, seed=0).x_cat.shape
        torch.Size([1000, 9])
    """
    for name, value, least in (
        ("per_day", per_day, 1),
        ("days", days, 1),
        ("num_numeric", num_numeric, 1),
        ("num_categorical", num_categorical, 1),
        ("cardinality", cardinality, 7),
    ):
        if not value >= least:
            raise ValueError(f"{name} must be at least {least}, got {value!r}")
    check_positive("mean_delay_days", mean_delay_days)
    check_positive("window_days", window_days)
    for name, number in (("base", base), ("drift", drift)):
        if not math.isfinite(number):
            raise ValueError(f"{name} must be a finite number, got {number!r}")
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    n = per_day * days
    w, codes_w = 0.35 * normal(num_numeric), 0.35 * normal(num_categorical, cardinality)
    u, w_delay = torch.nn.functional.normalize(normal(num_numeric), dim=0), 0.3 * normal(num_numeric)
    t = days * uniform(n)
    x = normal(n, num_numeric)
    drawn = torch.empty(n, num_categorical, dtype=torch.float64).geometric_(6 / cardinality, generator=generator)
    codes = (drawn.long() - 1).clamp_max(cardinality - 1)
    logit = base + x @ w + drift * t * (x @ u) + codes_w[torch.arange(num_categorical), codes].sum(1)
    p, rate = logit.sigmoid(), (x @ w_delay).exp() / mean_delay_days
    delay = -uniform(n).clamp_min(1e-300).log() / rate
    recorded = (uniform(n) < p) & (delay < window_days)
    return DelayedClicks(
        x,
        codes,
        t * DAY,
        torch.where(recorded, (t + delay) * DAY, -1.0),
        p_true=p * -(-rate * window_days).expm1(),
        cardinalities=(cardinality,) * num_categorical,
    )


def concatenate(parts: Sequence[Clicks]) -> Clicks:
    """Join several sets of clicks in order."""
    return Clicks(**{name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])})


def _chunks(count: int, batch_size: int, generator: torch.Generator | None) -> Iterator[Tensor | slice]:
    if not batch_size >= 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size!r}")
    if generator is None:
        yield from (slice(start, start + batch_size) for start in range(0, count, batch_size))
        return
    yield from torch.split(torch.randperm(count, generator=generator), batch_size)


def _check_data(data: DelayedClicks) -> None:
    n = len(data.click_ts)
    flat = [data.click_ts, data.pay_ts, *([] if data.p_true is None else [data.p_true])]
    if any(x.shape != (n,) for x in flat) or any(x.ndim != 2 or len(x) != n for x in (data.x_num, data.x_cat)):
        shapes = {name: tuple(x.shape) for name, x in vars(data).items() if isinstance(x, torch.Tensor)}
        raise ValueError(f"expected x_num (N, n), x_cat (N, f), click_ts, pay_ts and p_true (N,), got {shapes}")
    if n == 0:
        raise ValueError("there are no clicks")
    if data.x_cat.is_floating_point():
        raise ValueError(f"x_cat must be integer codes, got dtype {data.x_cat.dtype}")
    if not all(bool(x.isfinite().all()) for x in (data.x_num, data.click_ts, data.pay_ts)):
        raise ValueError("x_num, click_ts and pay_ts must be finite")
    early = (data.pay_ts >= 0) & (data.pay_ts < data.click_ts)
    if bool(early.any()):
        raise ValueError(f"the conversion of click {int(early.nonzero()[0])} lies before the click")
    sizes = data.cardinalities
    if sizes is not None and len(sizes) != data.x_cat.shape[1]:
        raise ValueError(f"cardinalities must name {data.x_cat.shape[1]} columns, got {len(sizes)}")
    low = bool((data.x_cat < 0).any())
    if low or (sizes is not None and bool((data.x_cat >= torch.tensor(sizes)).any())):
        raise ValueError(f"x_cat has a code out of range; cardinalities: {sizes}")
