"""Delayed clicks: who knows what when, the windows, the stream, generated data and the Criteo log."""

from __future__ import annotations

import gzip
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from recsys_losses.if_dfm import (
    DelayedClicks,
    _criteo,
    concatenate,
    cvr_metrics,
    make_delayed_clicks,
    relative_improvement,
)

DAY = 86_400
PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)


def _clicks(times, delays=None, **more):
    """Clicks at whole seconds; a delay of None is no conversion."""
    click = torch.tensor(times, dtype=torch.float64)
    pay = torch.tensor(
        [-1.0 if d is None else t + d for t, d in zip(times, delays or [None] * len(times), strict=True)],
        dtype=torch.float64,
    )
    n = len(times)
    return DelayedClicks(torch.zeros(n, 1), torch.arange(n).unsqueeze(1), click, pay, **more)


@pytest.fixture(scope="module")
def small():
    return make_delayed_clicks(per_day=40, days=30, seed=3)


# --- what is known when ---------------------------------------------------------------------------------------------


def test_labels_are_those_of_the_moment():
    data = _clicks([0, 0, 0], [10, DAY, None])
    rows = torch.arange(3)
    assert data.clicks(rows, at=0.5).label.tolist() == [1, 0, 0]
    exactly = data.clicks(rows, at=1.0)
    assert exactly.label.tolist() == [1, 1, 0]  # a conversion exactly then is known
    assert exactly.pay_ts.tolist() == [10, DAY, -1]
    assert data.clicks(rows).label.tolist() == [1, 1, 0]
    assert data.clicks(rows, at=0.5).pay_ts.tolist() == [10, -1, -1]  # the later one isn't there


def test_elapsed_is_a_delay_or_an_age():
    data = _clicks([0, 0], [DAY / 2, None])
    clicks = data.clicks(torch.arange(2), at=3.0)
    assert clicks.elapsed().tolist() == [0.5, 3.0]
    assert clicks.age().tolist() == [3.0, 3.0]
    with pytest.raises(ValueError, match="elapsed is not defined for final labels"):
        data.clicks(torch.arange(2)).elapsed()


def test_negative_times_of_conversion_mean_none():
    data = DelayedClicks(torch.zeros(2, 0), torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2), torch.tensor([-7, 0]))
    assert data.pay_ts.tolist() == [-1.0, 0.0]
    assert data.x_cat.dtype == torch.int64
    assert data.cardinalities == (1,)


# --- the protocol's windows -----------------------------------------------------------------------------------------


def test_window_puts_every_click_where_the_protocol_does():
    at = [0.5, 1, 14.5, 14.6, 14.7, 14.8, 15, 16, 23.9, 24, 24.5, 25, 26]
    delays = [0.1, 14, 0.5, 1, 9.5, None, 9.5, 1, 0.2, 0.5, 0.6, 20, 0.1]
    data = _clicks([t * DAY for t in at], [None if d is None else d * DAY for d in delays])
    parts = data.window(T=15, duration=14, gap=10, valid=1)
    assert parts["train"].row.tolist() == [1, 2, 3, 4, 5]
    assert parts["train"].label.tolist() == [1, 1, 0, 0, 0]  # the first two convert exactly at T
    assert parts["flipped"].row.tolist() == [3]  # click 4 converts at 24.2, after tau
    assert parts["flipped"].label.tolist() == [0]
    assert parts["added"].row.tolist() == [6, 7, 8]
    assert parts["added"].label.tolist() == [0, 1, 0]
    assert parts["valid"].row.tolist() == [9, 10]
    assert parts["valid"].label.tolist() == [1, 0]
    assert parts["test"].row.tolist() == [11]
    assert parts["test"].label.tolist() == [1]
    corrected = parts["train"].corrected(parts["flipped"])
    assert corrected.label.tolist() == [1, 1, 1, 0, 0]
    assert parts["train"].label.tolist() == [1, 1, 0, 0, 0]  # a copy


@given(seed=st.integers(0, 10**6), T=st.floats(5, 20), gap=st.floats(1.5, 8), duration=st.floats(1, 5))
@PROPERTY
def test_windows_hold_nothing_from_later(seed, T, gap, duration):
    data = make_delayed_clicks(per_day=30, days=30, seed=seed % 50, num_numeric=1, num_categorical=1)
    parts = data.window(T, duration, gap, 1.0)
    moments = {"train": T, "flipped": T, "added": T + gap - 1, "valid": T + gap}
    for name, moment in moments.items():
        part = parts[name]
        assert (part.click_ts < moment * DAY).all()
        assert (part.pay_ts <= moment * DAY).all()
        torch.testing.assert_close(part.label, (part.pay_ts >= 0).float())
    pay = data.pay_ts[parts["flipped"].row]
    assert ((pay > T * DAY) & (pay < (T + gap - 1) * DAY)).all()
    known = data.clicks(parts["train"].row, T + gap - 1).label
    torch.testing.assert_close(parts["train"].corrected(parts["flipped"]).label, known)
    assert not set(parts["test"].row.tolist()) & {
        row for name in ("train", "added", "valid") for row in parts[name].row.tolist()
    }


def test_correcting_refuses_what_is_not_there(small):
    parts = small.window(15, 14, 10)
    with pytest.raises(ValueError, match="not among these"):
        parts["added"].corrected(parts["flipped"])
    corrected = parts["train"].corrected(parts["flipped"])
    with pytest.raises(ValueError, match="already positive"):
        corrected.corrected(parts["flipped"])
    assert len(parts["train"][:0].corrected(parts["flipped"][:0])) == 0


# --- the stream -----------------------------------------------------------------------------------------------------


@given(
    rows=st.lists(
        st.tuples(st.integers(0, 20 * 3600), st.one_of(st.none(), st.integers(0, 20 * 3600))), min_size=1, max_size=30
    ),
    window=st.sampled_from([0.0, 0.25, 1.0, 5.0]),
    duplicates=st.sampled_from(["conversions", "all", "none"]),
)
@PROPERTY
def test_the_stream_leaks_no_future_label(rows, window, duplicates):
    data = _clicks([t for t, _ in rows], [d for _, d in rows])
    entered = []
    for hour, train, test in data.streaming(
        range(60), window_hours=window, duplicates=duplicates, attribution_days=0.5
    ):
        start, stop = hour * 3600, (hour + 1) * 3600
        assert ((train.seen_ts >= start) & (train.seen_ts < stop)).all()
        assert (train.pay_ts <= train.seen_ts).all()
        truth = data.pay_ts[train.row]
        torch.testing.assert_close(train.label, ((truth >= 0) & (truth <= train.seen_ts)).float())
        assert ((test.click_ts >= stop) & (test.click_ts < stop + 3600)).all()
        assert not set(test.row.tolist()) & {row for part in entered for row in part.row.tolist()}
        entered.append(train)
    stream = concatenate(entered)
    # Everything that enters in 60 hours: nothing is lost, nothing counted twice.
    click, pay = data.click_ts, data.pay_ts
    late = (pay > click + window * 3600) & (pay < 60 * 3600)
    expected = len(data) + {"conversions": int(late.sum()), "all": len(data), "none": 0}[duplicates]
    assert len(stream) == expected
    if duplicates == "conversions":
        assert int(stream.label.sum()) == int(((pay >= 0) & (pay < 60 * 3600)).sum())


def test_entries_stop_before_the_moment():
    data = _clicks([0, 0, 7200], [1800, 7200, None])
    stream = data.entries(torch.arange(3), until=1.5 / 24, window_hours=0.25)
    assert stream.row.tolist() == [0, 1, 0]
    assert stream.label.tolist() == [0, 0, 1]
    assert stream.seen_ts.tolist() == [900, 900, 1800]
    at_once = data.entries(torch.arange(3), until=3 / 24, window_hours=0)
    assert at_once.row.tolist() == [0, 1, 0, 2, 1]
    assert at_once.label.tolist() == [0, 0, 1, 0, 1]


# --- generated clicks -----------------------------------------------------------------------------------------------


def test_generated_clicks_have_the_stated_law():
    data = make_delayed_clicks(per_day=2000, days=30, seed=0)
    assert torch.equal(make_delayed_clicks(per_day=2000, days=30, seed=0).pay_ts, data.pay_ts)
    assert not torch.equal(make_delayed_clicks(per_day=2000, days=30, seed=1).x_num, data.x_num)
    assert len(data) == 60_000
    assert data.cardinalities == (50,) * 9
    converted = data.pay_ts >= 0
    # calibrated in every tenth of the probability, 4 standard errors
    for part in data.p_true.argsort().chunk(10):
        p = data.p_true[part]
        error = (converted[part].double().mean() - p.mean()).abs()
        assert error < 4 * ((p * (1 - p)).sum().sqrt() / len(part))
    delay = (data.pay_ts - data.click_ts)[converted] / DAY
    assert delay.max() < 30
    assert 3.0 < delay.mean() < 5.5
    values, counts = data.x_cat[:, 0].unique(return_counts=True)
    assert values[0] == 0
    assert counts[0] / len(data) == pytest.approx(6 / 50, abs=0.01)  # geometric
    assert counts[1] / counts[0] == pytest.approx(1 - 6 / 50, abs=0.05)
    bayes = roc_auc_score(converted, data.p_true)
    assert 0.65 < bayes < 0.95


def test_drift_moves_the_weights():
    still, moving = (make_delayed_clicks(per_day=300, days=30, seed=2, drift=d, window_days=1e6) for d in (0.0, 0.3))
    late = still.click_ts > 25 * DAY
    early = still.click_ts < DAY
    change = (still.p_true.logit() - moving.p_true.logit()).abs()
    assert change[early].mean() < 0.3
    assert change[late].mean() > 3


def test_fake_negatives_of_the_protocol():
    parts = make_delayed_clicks(per_day=1000, seed=0).window(15, 14, 10, 1)
    final = parts["train"].corrected(parts["flipped"])
    assert 0.1 < 1 - parts["train"].label.sum() / final.label.sum() < 0.4


# --- the Criteo log -------------------------------------------------------------------------------------------------


def _line(click=5, pay="", numeric=("1",) * 8, texts=("a",) * 9):
    return "\t".join([str(click), str(pay), *numeric, *texts])


def _write(path, lines, end="\n"):
    content = (end.join(lines) + end).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["data.txt", "data.txt.gz"])
def test_round_trip_keeps_times_order_and_bins(tmp_path, small, name, monkeypatch):
    monkeypatch.setattr(_criteo, "_PIECE", 5_000)  # many pieces, cut inside lines
    path = tmp_path / name
    small.to_criteo_file(path)
    back = DelayedClicks.load_criteo(path)
    assert back.click_ts.tolist() == small.click_ts.floor().tolist()
    torch.testing.assert_close(back.pay_ts >= 0, small.pay_ts >= 0)
    assert back.x_num.shape == (len(small), 0)
    assert back.x_cat.shape == (len(small), 17)
    assert back.cardinalities[:8] == (64, 16, 128, 64, 128, 64, 512, 512)
    for column, bins in enumerate((64, 16, 128, 64, 128, 64, 512, 512)):
        x = small.x_num[:, column].double()
        scaled = ((x - x.min()) * 1000).round()
        want = (scaled / scaled.max() * (bins - 1e-5)).floor()
        assert back.x_cat[:, column].tolist() == want.tolist()
    for column in range(9):
        _, dense = small.x_cat[:, column].unique(return_inverse=True)
        assert back.x_cat[:, 8 + column].tolist() == dense.tolist()
    assert not list(tmp_path.glob(".*"))


def test_encoding_of_missing_values(tmp_path):
    numeric = [("", *["2"] * 7), ("0", *["2"] * 7), ("63", *["2"] * 7)]
    texts = [("zz", *[""] * 8), ("", *["b"] * 8), ("aa", *["b"] * 8)]
    lines = [_line(numeric=n, texts=t) for n, t in zip(numeric, texts, strict=True)]
    data = DelayedClicks.load_criteo(_write(tmp_path / "data.txt", lines, end="\r\n"))
    assert data.x_cat[:, 0].tolist() == [0, 0, 63]  # -1, 0 and 63 on 64 bins: 64 / 64 is the last one
    assert data.x_cat[:, 1].tolist() == [0, 0, 0]  # a constant column
    assert data.x_cat[:, 8].tolist() == [2, 0, 1]  # sorted text, empty first
    assert data.x_cat[:, 9].tolist() == [0, 1, 1]
    assert data.cardinalities[8:] == (3, *[2] * 8)


def test_a_last_line_without_its_end_counts(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text(_line(pay=9) + "\n" + _line(pay=-1))
    data = DelayedClicks.load_criteo(path)
    assert data.pay_ts.tolist() == [9, -1]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (_line() + "\tx", r"data.txt:3: expected 19 tab-separated columns, got 20"),
        ("", r"data.txt:3: expected 19 tab-separated columns, got 1"),
        (_line(click=""), r"data.txt:3: click time is missing or negative"),
        (_line(click="5s"), r"data.txt:3: click time is not a number"),
        (_line(click=5, pay=4), r"data.txt:3: the conversion lies before the click"),
        (_line(numeric=("1", "1-2", *["1"] * 6)), r"data.txt:3: column 4 is not a number"),
        (_line(numeric=("1", "1e999", *["1"] * 6)), r"data.txt:3: column 4 is not finite"),
        (_line(numeric=("nan", *["1"] * 7)), r"data.txt:3: column 3 is not a number"),
    ],
)
@pytest.mark.parametrize("piece", [64, 1 << 20])
def test_malformed_lines_are_named(tmp_path, monkeypatch, bad, message, piece):
    monkeypatch.setattr(_criteo, "_PIECE", piece)
    path = _write(tmp_path / "data.txt", [_line(), _line(), bad, _line()])
    with pytest.raises(ValueError, match=message):
        DelayedClicks.load_criteo(path)


def test_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        DelayedClicks.load_criteo(tmp_path / "absent.txt")
    with pytest.raises(ValueError, match="is a folder"):
        DelayedClicks.load_criteo(tmp_path)
    empty = tmp_path / "empty.txt"
    empty.write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty.txt is empty"):
        DelayedClicks.load_criteo(empty)
    cut = tmp_path / "cut.gz"
    cut.write_bytes(gzip.compress(_line().encode() * 50)[:-20])
    with pytest.raises(ValueError, match=r"cut.gz: truncated or damaged gzip data"):
        DelayedClicks.load_criteo(cut)


def test_writing_needs_the_columns_of_the_format(tmp_path):
    with pytest.raises(ValueError, match=r"8 numeric and 9 categorical columns, got 2 and 9"):
        make_delayed_clicks(per_day=5, days=2, num_numeric=2).to_criteo_file(tmp_path / "x")


def test_reading_needs_no_loop_over_lines(tmp_path, monkeypatch):
    # A file of one piece and one of many give the same codes, also where texts are new in a late piece.
    lines = [
        _line(click=i, pay=i + 1 if i % 3 else "", texts=(f"t{i % 7:x}", *["q" * (i % 4)] * 8)) for i in range(500)
    ]
    path = _write(tmp_path / "data.txt", lines)
    whole = DelayedClicks.load_criteo(path)
    monkeypatch.setattr(_criteo, "_PIECE", 100)
    pieces = DelayedClicks.load_criteo(path)
    assert torch.equal(whole.x_cat, pieces.x_cat)
    assert torch.equal(whole.pay_ts, pieces.pay_ts)


# --- metrics --------------------------------------------------------------------------------------------------------


def test_metrics_by_hand():
    metrics = cvr_metrics(torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0.9, 0.8, 0.7, 0.1]))
    assert metrics["auc"] == pytest.approx(0.75)
    assert metrics["log_loss"] == pytest.approx(-np.mean(np.log([0.9, 0.2, 0.7, 0.9])))
    # points (recall, precision): (1, .5), (1, 2/3), (.5, .5), (.5, 1), (0, 1)
    assert metrics["prauc"] == pytest.approx(0.5 * (2 / 3 + 0.5) / 2 + 0.5 * 1.0)


def test_relative_improvement_of_losses():
    assert relative_improvement(0.42, vanilla=0.5, retrain=0.4) == pytest.approx(80)
    assert relative_improvement(0.55, vanilla=0.5, retrain=0.4) == pytest.approx(-50)


# --- bad input ------------------------------------------------------------------------------------------------------

N, C, T = torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.long), torch.ones(2)
BAD = [
    (lambda: DelayedClicks(N, C, T, T - 0.5), "conversion of click 0 lies before the click"),
    (lambda: DelayedClicks(N[:1], C, T, T), r"expected x_num \(N, n\)"),
    (lambda: DelayedClicks(N[:0], C[:0], T[:0], T[:0]), "there are no clicks"),
    (lambda: DelayedClicks(N, C.float(), T, T), "x_cat must be integer codes"),
    (lambda: DelayedClicks(N, C, T, T * math.nan), "must be finite"),
    (lambda: DelayedClicks(N, C - 1, T, T), "code out of range"),
    (lambda: DelayedClicks(N, C + 3, T, T, cardinalities=(3,)), "code out of range"),
    (lambda: DelayedClicks(N, C, T, T, cardinalities=(3, 4)), "must name 1 columns, got 2"),
    (lambda: make_delayed_clicks(per_day=0), "per_day must be at least 1, got 0"),
    (lambda: make_delayed_clicks(cardinality=6), "cardinality must be at least 7"),
    (lambda: make_delayed_clicks(mean_delay_days=0), "mean_delay_days must be a positive"),
    (lambda: make_delayed_clicks(drift=math.inf), "drift must be a finite number"),
    (lambda: DelayedClicks(N, C, T, T).window(15, 14, 10), "no clicks in the train period"),
    (lambda: DelayedClicks(N, C, T, T).window(15, 14, 1, 1), "gap - valid must be a positive"),
    (lambda: DelayedClicks(N, C, T, T).entries(C[:, 0], 1.0, duplicates="both"), "unknown duplicates 'both'"),
    (lambda: DelayedClicks(N, C, T, T).entries(C[:, 0], 1.0, window_hours=-1), "window_hours must be"),
    (
        lambda: DelayedClicks(N, C, T, T).entries(C[:, 0], 1.0, duplicates="all", attribution_days=0.0),
        "attribution_days must be longer than the window",
    ),
    (lambda: list(DelayedClicks(N, C, T, T).clicks(C[:, 0]).batches(0)), "batch_size must be >= 1"),
    (lambda: cvr_metrics([0, 1], [0.5]), r"got \(2,\) and \(1,\)"),
    (lambda: cvr_metrics([0, 0], [0.5, 0.5]), "both 0 and 1"),
    (lambda: cvr_metrics([0, 2], [0.5, 0.5]), "label must hold 0 and 1 only"),
    (lambda: cvr_metrics([0, 1], [0.5, 1.5]), "prob must lie"),
    (lambda: relative_improvement(1.0, 0.5, 0.5), "there is no gap"),
    (lambda: relative_improvement(math.nan, 0.5, 0.6), "metric must be a finite number"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=range(len(BAD)))
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
