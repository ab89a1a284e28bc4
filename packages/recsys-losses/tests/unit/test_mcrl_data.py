from __future__ import annotations

import builtins

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_losses.mcrl import (
    ReplayBuffer,
    SessionSimulator,
    number_items,
    pad_histories,
    read_sessions,
    sessions_to_columns,
    split_sessions,
    write_sessions,
)

HEADER = "session_id,item_id,is_purchase,timestamp\n"


class Frame:
    """As much of a pandas DataFrame as is asked of one."""

    def __init__(self, columns):
        self._columns = {name: np.asarray(column, dtype=object) for name, column in columns.items()}

    def keys(self):
        return list(self._columns)

    def __getitem__(self, name):
        return self._columns[name]


# --- replay buffer ------------------------------------------------------------------------------------------------


def test_transitions_of_one_session_by_hand():
    buffer = ReplayBuffer.from_sessions([[(0, False), (3, True), (1, False), (3, False)]], state_size=2, num_items=4)
    batch = buffer.transitions(with_session_items=True)
    pad = 4
    assert batch.items.tolist() == [[pad, pad], [0, pad], [0, 3], [3, 1]]
    assert batch.length.tolist() == [1, 1, 2, 2]
    assert batch.action.tolist() == [0, 3, 1, 3]
    assert batch.next_items.tolist() == [[0, pad], [0, 3], [3, 1], [1, 3]]
    assert batch.next_length.tolist() == [1, 2, 2, 2]
    assert batch.done.tolist() == [False, False, False, True]
    assert batch.is_purchase.tolist() == [False, True, False, False]
    torch.testing.assert_close(batch.reward, torch.tensor([0.2, 1.0, 0.2, 0.2]))
    assert batch.session_items.tolist() == [[0, 3, 1, 3]] * 4


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    state_size=st.integers(1, 4),
    seed=st.integers(0, 100),
)
@settings(deadline=None, max_examples=40)
def test_transitions_equal_a_loop(lengths, state_size, seed):
    rng = np.random.default_rng(seed)
    sessions = [[(int(rng.integers(9)), bool(rng.integers(2))) for _ in range(n)] for n in lengths]
    batch = ReplayBuffer.from_sessions(sessions, state_size=state_size, num_items=9).transitions()
    row = 0
    for session in sessions:
        items = [item for item, _ in session]
        for t, (item, bought) in enumerate(session):
            before, after = items[:t][-state_size:], items[: t + 1][-state_size:]
            assert batch.items[row].tolist() == before + [9] * (state_size - len(before))
            assert batch.length[row] == max(1, len(before))
            assert batch.next_items[row].tolist() == after + [9] * (state_size - len(after))
            assert batch.next_length[row] == len(after)
            assert (batch.action[row], batch.is_purchase[row]) == (item, bought)
            assert batch.done[row] == (t + 1 == len(session))
            row += 1
    assert row == len(batch.action)


def test_equal_rewards_do_not_hide_purchases():
    buffer = ReplayBuffer.from_sessions([[(0, False), (1, True)]], reward_click=1.0, reward_purchase=1.0)
    batch = buffer.transitions()
    assert batch.reward.tolist() == [1.0, 1.0]
    assert batch.is_purchase.tolist() == [False, True]


@pytest.mark.parametrize("wrap", [dict, Frame])
def test_table_is_sorted_by_session_and_time(wrap):
    columns = {
        "session_id": ["b", "a", "b", "a", "b"],
        "item_id": [4, 0, 2, 1, 3],
        "is_purchase": [1, 0, 0, 0, 0],
        "timestamp": [3.0, 2.0, 1.0, 1.0, 1.0],
    }
    table = wrap(columns) if wrap is dict else Frame(columns)
    if wrap is Frame:
        table._columns["item_id"] = np.asarray(columns["item_id"])
    buffer = ReplayBuffer.from_sessions(table, state_size=3)
    batch = buffer.transitions()
    assert batch.action.tolist() == [1, 0, 2, 3, 4]  # rows that tie in time keep their order
    assert batch.done.tolist() == [False, True, False, False, True]
    assert batch.is_purchase.tolist() == [False, False, False, False, True]
    assert buffer.num_items == 5


def test_without_timestamps_rows_are_in_order_and_short_sessions_may_go():
    table = {"session_id": [2, 1, 2, 2], "item_id": [5, 7, 6, 5], "is_purchase": [0, 0, 1, 0]}
    buffer = ReplayBuffer.from_sessions(table, min_length=2, num_items=8)
    assert buffer.transitions().action.tolist() == [5, 6, 5]
    assert "1 sessions, 3 transitions, 1 purchases" in repr(buffer)
    with pytest.raises(ValueError, match="min_length=4"):
        ReplayBuffer.from_sessions(table, min_length=4)


def test_samples_are_uniform_and_repeat_under_a_seed():
    buffer = ReplayBuffer.from_sessions([[(0, False)], [(1, False), (2, False), (3, True)]])
    one, two = (buffer.sample(4000, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(one.action, two.action)
    counts = torch.bincount(one.action, minlength=4)
    assert (counts - 1000).abs().max() < 5 * 28


def test_mdp_arrays_follow_the_sessions():
    mdp = ReplayBuffer.from_sessions([[(0, False), (1, True)], [(2, False)]], state_size=2).to_mdp()
    assert mdp["observations"].tolist() == [[3, 3], [0, 3], [3, 3]]
    assert mdp["actions"].tolist() == [[0], [1], [2]]
    assert mdp["terminals"].tolist() == [0.0, 1.0, 1.0]
    np.testing.assert_allclose(mdp["rewards"], [0.2, 1.0, 0.2], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"item_id": [0, 5]}, r"num_items=3"),
        ({"item_id": [-1, 0]}, "num_items=3"),
        ({"item_id": [0.5, 1.0]}, "number_items"),
        ({"is_purchase": [0, 2]}, "is_purchase"),
        ({"is_purchase": [0]}, "different lengths"),
        ({"timestamp": [0.0, float("nan")]}, "timestamp"),
        ({"session_id": None}, "session_id"),
    ],
)
def test_bad_tables(change, words):
    table = {"session_id": [1, 1], "item_id": [0, 1], "is_purchase": [0, 1], "timestamp": [0.0, 1.0], **change}
    table = {name: column for name, column in table.items() if column is not None}
    with pytest.raises(ValueError, match=words):
        ReplayBuffer.from_sessions(table, num_items=3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"state_size": 0}, "state_size"),
        ({"min_length": 0}, "min_length"),
        ({"reward_click": float("inf")}, "reward_click"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        ReplayBuffer.from_sessions([[(0, False)]], **options)
    with pytest.raises(ValueError, match="no events"):
        ReplayBuffer.from_sessions([])
    with pytest.raises(ValueError, match="n must be"):
        ReplayBuffer.from_sessions([[(0, False)]]).sample(0)


def test_padding_of_histories():
    items, length = pad_histories([[1, 2, 3], [0]], state_size=2, num_items=4)
    assert items.tolist() == [[2, 3], [0, 4]]
    assert length.tolist() == [2, 1]
    for sessions in ([], [[4]], [[-1]]):
        with pytest.raises(ValueError, match=r"session"):
            pad_histories(sessions, state_size=2, num_items=4)


# --- files --------------------------------------------------------------------------------------------------------


def test_csv_round_trip(tmp_path):
    columns = sessions_to_columns([[(4, False), (2, True)], [(0, False)]])
    write_sessions(tmp_path / "deep" / "events.csv", columns)
    read = read_sessions(tmp_path / "deep" / "events.csv")
    assert set(read) == set(columns)
    for name in columns:
        np.testing.assert_array_equal(read[name], columns[name])
    assert read["item_id"].dtype == np.int64
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["events.csv"]


def test_csv_columns_in_any_order_and_ids_as_they_are(tmp_path):
    path = tmp_path / "events.csv"
    path.write_text("\ufefftimestamp,extra,item_id,session_id,is_purchase\n1,x,007,s-1,TRUE\n2,y,12,s-1,false\n")
    read = read_sessions(path)
    assert read["item_id"].tolist() == ["007", "12"]  # leading zeros: not a number
    assert read["is_purchase"].tolist() == [True, False]
    assert read["session_id"].tolist() == ["s-1", "s-1"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty file"),
        ("session_id,item_id\n", r"events\.csv:1: no column is_purchase, timestamp"),
        (HEADER, "no events"),
        (HEADER + "1,2,0,1\n1,2,0\n", r"events\.csv:3: expected 4 fields, got 3"),
        (HEADER + "1,2,yes,1\n", r"events\.csv:2: is_purchase must be 0, 1, true or false, got 'yes'"),
        (HEADER + "1,2,0,soon\n", r"events\.csv:2: timestamp must be a finite number, got 'soon'"),
        (HEADER + "1,2,0,nan\n", r"events\.csv:2: timestamp"),
        (HEADER + "1,,0,1\n", r"events\.csv:2: item_id is empty"),
    ],
)
def test_bad_csv_names_file_and_line(tmp_path, text, words):
    path = tmp_path / "events.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_sessions(path)


def test_absent_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"events\.csv"):
        read_sessions(tmp_path / "events.csv")


def test_parquet_equals_csv(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = sessions_to_columns([[(4, False), (2, True)], [(0, False)]])
    parquet.write_table(pa.table(columns), tmp_path / "events.parquet")
    read = read_sessions(tmp_path / "events.parquet")
    for name in columns:
        np.testing.assert_array_equal(read[name], columns[name])
    (tmp_path / "broken.parquet").write_text("nothing")
    with pytest.raises(ValueError, match=r"broken\.parquet is not a readable"):
        read_sessions(tmp_path / "broken.parquet")
    parquet.write_table(pa.table({"item_id": [1]}), tmp_path / "narrow.parquet")
    with pytest.raises(ValueError, match=r"narrow\.parquet: no column session_id"):
        read_sessions(tmp_path / "narrow.parquet")


def test_parquet_without_pyarrow_says_so(tmp_path, monkeypatch):
    path = tmp_path / "events.parquet"
    path.write_bytes(b"PAR1")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "pyarrow":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="needs pyarrow"):
        read_sessions(path)


# --- numbering and splitting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [[90, 17, 40], ["x", "a", "k"]])
def test_numbers_lead_back_to_the_ids(ids):
    table = {"session_id": [1, 1, 1, 2], "item_id": [*ids, ids[0]], "is_purchase": [0, 0, 0, 1]}
    numbered, known = number_items(table)
    assert [known[number] for number in numbered["item_id"]] == [*ids, ids[0]]
    again, same = number_items({**table, "item_id": [ids[1]] * 4}, known[::-1])
    assert same == known[::-1]
    assert [same[number] for number in again["item_id"]] == [ids[1]] * 4
    with pytest.raises(ValueError, match="isn't among the 2 known"):
        number_items(table, sorted(ids)[:2])


def test_split_is_by_session():
    table = sessions_to_columns([[(i, False), (i, True)] for i in range(50)])
    parts = split_sessions(table, seed=3)
    sessions = [set(part["session_id"].tolist()) for part in parts]
    assert [len(s) for s in sessions] == [40, 5, 5]
    assert set.union(*sessions) == set(range(50))
    assert sum(len(part["item_id"]) for part in parts) == 100
    assert set(split_sessions(table, seed=4)[1]["session_id"].tolist()) != sessions[1]
    for shares in ((0.5, 0.4), (1.5, -0.5), ()):
        with pytest.raises(ValueError, match="shares"):
            split_sessions(table, shares)


# --- simulator ----------------------------------------------------------------------------------------------------


def test_logs_have_the_sizes_of_the_card():
    sessions = SessionSimulator().logs(2500, seed=1)
    events = [event for session in sessions for event in session]
    # P(at least 3 events) = (7/8)^2, and 9.8 events are expected of those.
    assert 1800 < len(sessions) < 2030
    assert 3 <= min(map(len, sessions)) <= max(map(len, sessions)) <= 30
    assert 17_000 < len(events) < 20_500
    assert 0.2 < np.mean([bought for _, bought in events]) < 0.36


def test_logs_repeat_under_a_seed_and_differ_between_seeds():
    simulator = SessionSimulator(num_items=40)
    assert simulator.logs(20, seed=1) == SessionSimulator(num_items=40).logs(20, seed=1)
    assert simulator.logs(20, seed=1) != simulator.logs(20, seed=2)
    assert simulator.logs(20, seed=1) != SessionSimulator(num_items=40, seed=1).logs(20, seed=1)


def test_popular_items_are_clicked_more():
    simulator = SessionSimulator(num_items=50)
    clicks = torch.bincount(
        torch.tensor([item for session in simulator.logs(400, seed=1) for item, _ in session]), minlength=50
    )
    best = simulator.popularity.topk(10).indices
    assert clicks[best].float().mean() > 1.5 * clicks.float().mean()


def test_a_purchase_makes_the_next_from_its_cluster_likelier():
    """With one cluster every purchase helps the next; the share rises with the position, and doesn't without boost."""
    shares = {}
    for boost in (0.0, 1.0):
        sessions = SessionSimulator(num_clusters=1, boost=boost, mean_length=30).logs(600, seed=1)
        early = np.mean([bought for session in sessions for _, bought in session[:3]])
        late = np.mean([bought for session in sessions for _, bought in session[8:]])
        shares[boost] = late - early
    assert shares[1.0] > shares[0.0] + 0.2


def test_rollout_counts_rewards_as_defined():
    simulator = SessionSimulator(num_items=6)
    simulator.click_vectors *= 0  # everything is accepted with probability 1/2
    simulator.purchase_bias = 50.0  # and what is accepted is bought
    seen = []

    def policy(histories):
        seen.append([len(history) for history in histories])
        return torch.zeros(len(histories), dtype=torch.int64)

    out = simulator.rollout(policy, 4000, seed=0, gamma=0.5, horizon=3)
    assert out.total == pytest.approx(1.5, abs=0.06)
    assert out.discounted == pytest.approx(0.5 * 1.75, abs=0.05)
    assert seen[0] == [1] * 4000
    # the history grows with accepted items alone
    assert np.mean(seen[2]) == pytest.approx(2.0, abs=0.06)


def test_rollout_pays_for_knowing_the_user():
    simulator = SessionSimulator()

    def neighbours(histories):
        last = torch.tensor([history[-1] for history in histories])
        return (simulator.click_vectors[last] @ simulator.click_vectors.T).argmax(1)

    def anything(histories):
        return torch.arange(len(histories)) % simulator.num_items

    assert simulator.rollout(neighbours, 500, 1).total > simulator.rollout(anything, 500, 1).total + 0.3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_items": 1}, "num_items"),
        ({"latent_dim": 0}, "latent_dim"),
        ({"num_clusters": 0}, "num_clusters"),
        ({"beta": float("nan")}, "beta"),
        ({"mean_length": 0.5}, "mean_length"),
    ],
)
def test_bad_simulators(options, words):
    with pytest.raises(ValueError, match=words):
        SessionSimulator(**options)


def test_bad_rollouts():
    simulator = SessionSimulator(num_items=5)
    good = lambda histories: torch.zeros(len(histories), dtype=torch.int64)
    with pytest.raises(ValueError, match="n must be"):
        simulator.logs(0, seed=0)
    with pytest.raises(ValueError, match="gamma"):
        simulator.rollout(good, 2, 0, gamma=2.0)
    with pytest.raises(ValueError, match="horizon"):
        simulator.rollout(good, 2, 0, horizon=0)
    with pytest.raises(ValueError, match="must return 2"):
        simulator.rollout(lambda histories: torch.zeros(3, dtype=torch.int64), 2, 0)
    with pytest.raises(ValueError, match="outside"):
        simulator.rollout(lambda histories: torch.full((2,), 5), 2, 0)
