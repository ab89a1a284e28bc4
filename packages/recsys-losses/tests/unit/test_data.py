"""Readers, filters, splits, known data sets and generated feedback."""

from __future__ import annotations

import gzip
import lzma
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_losses.data import (
    DATASETS,
    InteractionData,
    check_dataset,
    hold_out_validation,
    inject_false_positives,
    k_core,
    load_dataset,
    read_inter,
    read_lightgcn,
    read_movielens,
    read_pairs,
    reindex,
    split_ratio,
    synthetic_feedback,
    unbiased_split,
)

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True)
FUZZ = settings(max_examples=200, deadline=None, derandomize=True)
PACKERS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pairs(edges: torch.Tensor) -> list[tuple[int, int]]:
    return list(map(tuple, edges.T.tolist()))


def random_edges(num_users: int, num_items: int, share: float, seed: int = 0) -> torch.Tensor:
    mask = torch.rand(num_users, num_items, generator=generator(seed)) < share
    edges = mask.nonzero().T
    return edges[:, torch.randperm(edges.shape[1], generator=generator(seed))]


@pytest.fixture
def write(tmp_path):
    def write_file(name, content, suffix=""):
        path = tmp_path / (name + suffix)
        path.write_bytes(PACKERS[suffix](content.encode() if isinstance(content, str) else content))
        return path

    return write_file


class TestInteractionData:
    def test_repr_shows_sizes(self):
        edges = torch.tensor([[0], [1]])
        assert "train=1, valid=none, test=1" in repr(InteractionData(1, 2, train=edges, test=edges))

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"num_users": 0}, "num_users must be between 1 and 2147483648, got 0"),
            ({"num_items": 1}, "train holds the item id 1, which is not below num_items=1"),
            ({"test": torch.tensor([[2], [0]])}, "test holds the user id 2, which is not below num_users=2"),
            ({"valid": torch.tensor([[0], [-1]])}, "valid holds the negative item id -1"),
            ({"train": torch.zeros(3, 2, dtype=torch.long)}, r"shape \(2, E\)"),
            ({"train": torch.zeros(2, 2)}, "int64"),
        ],
    )
    def test_bad_input(self, changes, match):
        fields = {"num_users": 2, "num_items": 2, "train": torch.tensor([[0], [1]]), "test": torch.tensor([[1], [0]])}
        with pytest.raises(ValueError, match=match):
            InteractionData(**(fields | changes))


class TestReadLightGCN:
    @pytest.mark.parametrize("suffix", PACKERS)
    @pytest.mark.parametrize("named", [True, False], ids=["named", "found"])
    def test_lines_users_only_blank_lines_and_compression(self, write, suffix, named):
        train = write("train.txt", "0 5 2\n\n1\n3 0\r\n  4\t1 ", suffix)
        test = write("test.txt", "7\n0 1\n", suffix)
        if not named:
            train, test = train.with_name("train.txt"), test.with_name("test.txt")
        data = read_lightgcn(train, test)
        assert pairs(data.train) == [(0, 5), (0, 2), (3, 0), (4, 1)]
        assert pairs(data.test) == [(0, 1)]
        assert (data.num_users, data.num_items, data.valid) == (8, 6, None)
        assert data.train.dtype == torch.int64

    def test_given_sizes(self, write):
        data = read_lightgcn(write("train.txt", "0 1\n"), write("test.txt", "0 0\n"), num_users=9, num_items=7)
        assert (data.num_users, data.num_items) == (9, 7)

    def test_byte_order_mark_and_old_mac_line_ends(self, write):
        data = read_lightgcn(write("train.txt", b"\xef\xbb\xbf0 1\r1 2\r"), write("test.txt", "0 0\n"))
        assert pairs(data.train) == [(0, 1), (1, 2)]

    def test_duplicates_are_removed_with_their_number(self, write):
        train, test = write("train.txt", "1 4 4 3\n0 1\n1 3 2\n"), write("test.txt", "0 0\n")
        with pytest.warns(UserWarning, match=r"train\.txt: 2 duplicate pairs removed") as caught:
            data = read_lightgcn(train, test)
        assert pairs(data.train) == [(1, 4), (1, 3), (0, 1), (1, 2)]
        assert caught[0].filename == __file__

    def test_overlap_is_reported(self, write):
        train, test = write("train.txt", "0 1 2\n"), write("test.txt", "0 2 3\n")
        with pytest.warns(UserWarning, match=r"1 pairs of test\.txt are also in train\.txt") as caught:
            read_lightgcn(train, test)
        assert caught[0].filename == __file__

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            ("0 1\n1 x 2\n", r"train\.txt:2: expected integers separated by blanks, got 'x'"),
            ("0,1,2\n1,2\n", r"train\.txt:1: expected integers .* got '0,1,2'; the line looks separated by ','"),
            ("0 1\n\n1 1.5\n", r"train\.txt:3: expected integers .* got '1\.5'"),
            ("0 1\n1 -3\n", r"train\.txt:2: negative id -3"),
            ("0 1\n1 +3\n", r"train\.txt:2: expected integers"),
            ("0 1_0\n", r"train\.txt:1: expected integers"),
            ("0 ٣\n", r"train\.txt:1: expected integers"),
            ("0 1\n1 3000000000\n", r"train\.txt:2: id 3000000000 is larger than 2147483647"),
            ("0 1\n" + "9" * 400 + " 1\n", r"train\.txt:2: id 9{40} is larger"),
            ("", r"train\.txt is empty"),
            (" \n\n", r"train\.txt is empty"),
            ("0\n1\n", r"train\.txt holds no interactions, only users"),
            (b"0 1\n1 \xff\n", r"train\.txt:2: not UTF-8 text \(byte 0xff\)"),
            (b"0 1\n1 \x00\n", r"train\.txt:2: expected integers"),
            ("0 1\n20 1\n", r"train\.txt:2: user id 20 is not below num_users=20"),
            ("0 1\n1 3 30\n", r"train\.txt:2: item id 30 is not below num_items=30"),
        ],
    )
    def test_bad_files(self, write, content, match):
        train, test = write("train.txt", content), write("test.txt", "0 0\n")
        with pytest.raises(ValueError, match=match):
            read_lightgcn(train, test, num_users=20, num_items=30)

    def test_line_number_deep_in_a_file(self, write):
        lines = [f"{u} {u + 1}" for u in range(500)]
        lines[416] = "416 four"
        with pytest.raises(ValueError, match=r"train\.txt\.gz:417: expected integers"):
            read_lightgcn(write("train.txt", "\n".join(lines), ".gz"), write("test.txt", "0 0"))

    def test_absent_file_lists_what_was_looked_for(self, tmp_path, write):
        with pytest.raises(FileNotFoundError, match=r"train\.txt, .*train\.txt\.gz, .*train\.txt\.xz"):
            read_lightgcn(tmp_path / "train.txt", write("test.txt", "0 0\n"))
        with pytest.raises(ValueError, match="is a folder"):
            read_lightgcn(tmp_path, tmp_path)


class TestCompression:
    CONTENT = "".join(f"{u} {u * 7 % 90} {u * 11 % 90}\n" for u in range(3000))

    @pytest.mark.parametrize("suffix", [".gz", ".xz"])
    @pytest.mark.parametrize("share", [0.2, 0.5, 0.999])
    def test_truncated(self, write, suffix, share):
        path = write("train.txt", self.CONTENT, suffix)
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(ValueError, match=rf"train\.txt\{suffix}: truncated or damaged (gzip|xz) data"):
            read_pairs(path, sep=" ")

    @pytest.mark.parametrize("suffix", [".gz", ".xz"])
    def test_damaged_in_the_middle(self, write, suffix):
        path = write("train.txt", self.CONTENT, suffix)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
        with pytest.raises(ValueError, match="truncated or damaged"):
            read_pairs(path, sep=" ")

    def test_plain_text_under_a_compressed_name(self, tmp_path):
        path = tmp_path / "train.txt.gz"
        path.write_text("0 1\n")
        with pytest.raises(ValueError, match="no gzip header"):
            read_pairs(path)

    def test_compressed_under_a_plain_name(self, tmp_path):
        path = tmp_path / "train.txt"
        path.write_bytes(gzip.compress(b"0 1\n"))
        assert pairs(read_pairs(path)) == [(0, 1)]

    @pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
    def test_zero_bytes(self, tmp_path, suffix):
        path = tmp_path / f"train.txt{suffix}"
        path.write_bytes(b"")
        with pytest.raises(ValueError, match="is empty"):
            read_pairs(path)


class TestReadPairs:
    @pytest.mark.parametrize("suffix", PACKERS)
    @pytest.mark.parametrize("sep", ["\t", ",", "::", " ", ";", "|"])
    @pytest.mark.parametrize("given_sep", [True, False])
    def test_separators(self, write, suffix, sep, given_sep):
        path = write("pairs.txt", f"1{sep}4{sep}9\n\n3{sep}2{sep}8\n", suffix)
        assert pairs(read_pairs(path, sep=sep if given_sep else None)) == [(1, 4), (3, 2)]

    def test_other_columns_may_hold_anything(self, write):
        path = write("data1.txt", "1\t3\t3.2466e+05\n2\t1\tabc\n2\t4\t\n")
        assert pairs(read_pairs(path, sep="\t", base=1)) == [(0, 2), (1, 0), (1, 3)]

    def test_columns_and_header(self, write):
        path = write("clicks.csv", "time,item,user\n0.5, 7,1\n0.6,8 ,  2  \n")
        assert pairs(read_pairs(path, columns=(2, 1), header=True)) == [(1, 7), (2, 8)]

    def test_single_pair_without_line_end(self, write):
        assert pairs(read_pairs(write("p", "3,4"), sep=",")) == [(3, 4)]

    def test_duplicates(self, write):
        with pytest.warns(UserWarning, match="1 duplicate pairs removed"):
            assert pairs(read_pairs(write("p", "3,4\n0,9\n3,4\n"))) == [(3, 4), (0, 9)]

    @pytest.mark.parametrize(
        ("content", "arguments", "match"),
        [
            ("1\t2\n3\n", {}, r"p:2: expected at least 2 columns separated by tabs, got 1"),
            ("1 2\n3 4\n", {"sep": "\t"}, r"p:1: expected at least 2 columns separated by tabs, got 1; .* by blanks"),
            ("1,2\n3,4\n", {"sep": "::"}, r"p:1: expected at least 2 columns separated by '::', got 1; .* by ','"),
            ("1,2\n3,4\n", {"columns": (0, 2)}, r"p:1: expected at least 3 columns"),
            ("1,2\n,4\n", {}, r"p:2: expected integers separated by ',', got ''"),
            ("1,2\na,4\n", {}, r"p:2: expected integers separated by ',', got 'a'"),
            ("user,item\n1,4\n", {}, r"p:1: expected integers"),
            ("user,item\n", {"header": True}, r"p holds no interactions"),
            ("1,2\n0,4\n", {"base": 1}, r"p:2: id 0 is below the base 1"),
            ("1,2\n0,-4\n", {}, r"p:2: negative id -4; ids start at 0"),
            ("1,2\n0,2147483648\n", {}, r"p:2: id 2147483648 is larger than 2147483647"),
            ("1\x1f2\n", {"sep": "::"}, r"p:1: expected at least 2 columns"),
            ("1:::2\n", {"sep": "::"}, r"p:1: expected integers"),
            ("1,2\n", {"base": 2}, r"base must be 0 or 1, got 2"),
            ("1,2\n", {"columns": (1, 1)}, r"columns must be two different positions"),
            ("1,2\n", {"columns": (0, -1)}, r"columns must be two different positions"),
            ("1,2\n", {"sep": ""}, r"sep must be a non-empty string"),
            ("1,2\n", {"sep": "\n"}, r"sep must be a non-empty string"),
            ("112\n", {"sep": "1"}, r"sep must be a non-empty string without digits"),
        ],
    )
    def test_bad_input(self, write, content, arguments, match):
        path = write("p", content)
        with pytest.raises(ValueError, match=match):
            read_pairs(path, **arguments)


INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


class TestReadInter:
    @pytest.mark.parametrize("suffix", PACKERS)
    def test_tokens_in_order_of_appearance(self, write, suffix):
        path = write("a.inter", INTER + "ann\ttea\t5\t1\nbob\tcafé au lait\t2.5\t2\nann\tcafé au lait\t4\t3\n", suffix)
        edges, users, items = read_inter(path)
        assert pairs(edges) == [(0, 0), (1, 1), (0, 1)]
        assert (users, items) == (("ann", "bob"), ("tea", "café au lait"))
        edges, users, items = read_inter(path, min_rating=4)
        assert pairs(edges) == [(0, 0), (0, 1)]
        assert (users, items) == (("ann", "bob"), ("tea", "café au lait"))

    def test_other_field_names_and_no_rating_needed(self, write):
        path = write("a.inter", "when:float\ti:token\tu:token\n1\tx\ty\n")
        edges, users, items = read_inter(path, user="u", item="i")
        assert (pairs(edges), users, items) == ([(0, 0)], ("y",), ("x",))

    def test_repeated_interactions(self, write):
        path = write("a.inter", INTER + "a\tx\t5\t1\na\tx\t4\t2\n")
        with pytest.warns(UserWarning, match="1 duplicate pairs removed"):
            assert pairs(read_inter(path)[0]) == [(0, 0)]

    @pytest.mark.parametrize(
        ("content", "arguments", "match"),
        [
            ("1\t2\t3\n", {}, r"a\.inter:1: expected a header of tab separated name:type fields .* got '1'"),
            (INTER.replace("\t", ","), {}, r"a\.inter:1: expected a header"),
            ("user_id:token\titem_id:text\n", {}, r"a\.inter:1: expected a header .* got 'item_id:text'"),
            (
                "user_id:token\trating:float\na\t1\n",
                {},
                r"a\.inter:1: the header has no field 'item_id'; .* user_id, rating",
            ),
            (
                "user_id:token\titem_id:token\na\tx\n",
                {"min_rating": 1},
                r"a\.inter:1: the header has no field 'rating'",
            ),
            (
                "user_id:float\titem_id:token\n1\tx\n",
                {},
                r"a\.inter:1: field 'user_id' must have type token, got float",
            ),
            ("user_id:token\tuser_id:token\titem_id:token\n", {}, r"names the field 'user_id' twice"),
            (INTER, {}, r"a\.inter holds no interactions"),
            ("", {}, r"a\.inter is empty"),
            (INTER + "a\tx\t5\t1\nb\n", {}, r"a\.inter:3: expected at least 2 columns separated by tabs, got 1"),
            (INTER + "a\tx\t5\t1\nb x 5 1\n", {}, r"a\.inter:3: .*; the line looks separated by blanks"),
            (INTER + "a\tx\t5\t1\n\tx\t5\t1\n", {}, r"a\.inter:3: empty token"),
            (INTER + "a\tx\tgood\t1\n", {"min_rating": 3}, r"a\.inter:2: expected a number as rating, got 'good'"),
            (INTER + "a\tx\t5\t1\nb\tx\tnan\t1\n", {"min_rating": 3}, r"a\.inter:3: expected a number as rating"),
            (INTER + "a\tx\t2\t1\n", {"min_rating": 3}, r"a\.inter: no rating reaches min_rating=3"),
            (INTER + "a\tx\t2\t1\n", {"min_rating": math.nan}, r"min_rating must be a finite number, got nan"),
            (INTER.encode() + b"a\t\xfe\t2\t1\n", {}, r"a\.inter:2: not UTF-8 text"),
        ],
    )
    def test_bad_input(self, write, content, arguments, match):
        path = write("a.inter", content)
        with pytest.raises(ValueError, match=match):
            read_inter(path, **arguments)


class TestReadMovielens:
    @pytest.mark.parametrize("suffix", PACKERS)
    @pytest.mark.parametrize("sep", ["\t", "::"])
    def test_ids_in_ascending_order(self, write, suffix, sep):
        rows = [(20, 5, "3.5", 9), (3, 110, "5", 9), (20, 110, "1", 9)]
        path = write("ratings", "".join(sep.join(map(str, row)) + "\n" for row in rows), suffix)
        edges, users, items = read_movielens(path)
        assert pairs(edges) == [(1, 0), (0, 1), (1, 1)]
        assert (users, items) == (("3", "20"), ("5", "110"))
        assert pairs(read_movielens(path, min_rating=3.5)[0]) == [(1, 0), (0, 1)]

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            (
                "1,2,3,4\n",
                r"u\.data:1: expected at least 3 columns separated by tabs, got 1; the line looks separated by ','",
            ),
            (
                "1::2::3::4\n1\t2\t3\t4\n",
                r"u\.data:2: expected at least 3 columns separated by '::', got 1; .* by tabs",
            ),
            ("1\t2\n", r"u\.data:1: expected at least 3 columns separated by tabs, got 2"),
            ("1\tb\t3\t4\n", r"u\.data:1: expected integers separated by tabs, got 'b'"),
            ("1\t2\tbad\t4\n", r"u\.data:1: expected a number as rating"),
            ("", r"u\.data is empty"),
        ],
    )
    def test_bad_input(self, write, content, match):
        path = write("u.data", content)
        with pytest.raises(ValueError, match=match):
            read_movielens(path, min_rating=1)


READERS = {
    "lightgcn": lambda path: read_lightgcn(path, path),
    "pairs": read_pairs,
    "pairs-double": lambda path: read_pairs(path, sep="::"),
    "inter": lambda path: read_inter(path, min_rating=2),
    "movielens": lambda path: read_movielens(path, min_rating=2),
}
TEXT = st.text(alphabet='0123 45\t\n\r,:-.ae٣\x00\x1f"', max_size=60)


@pytest.mark.parametrize("reader", READERS)
class TestFuzz:
    """Whatever the bytes: edges in range or a ValueError that names the file."""

    def check(self, reader, path, content):
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                result = READERS[reader](path)
            except ValueError as error:
                assert "fuzz" in str(error)  # noqa: PT017
                return
        edges = (
            result.train if isinstance(result, InteractionData) else result[0] if isinstance(result, tuple) else result
        )
        assert edges.shape[0] == 2
        assert edges.shape[1] > 0
        assert edges.dtype == torch.int64
        assert int(edges.min()) >= 0
        assert len(set(pairs(edges))) == edges.shape[1]

    @FUZZ
    @given(content=st.binary(max_size=80))
    def test_any_bytes(self, reader, tmp_path_factory, content):
        self.check(reader, tmp_path_factory.getbasetemp() / "fuzz", content)

    @FUZZ
    @given(content=TEXT, header=st.booleans())
    def test_any_text_that_looks_like_data(self, reader, tmp_path_factory, content, header):
        content = (INTER if header and reader == "inter" else "") + content
        self.check(reader, tmp_path_factory.getbasetemp() / "fuzz", content.encode())

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(cut=st.integers(0, 200), flip=st.integers(0, 200), packer=st.sampled_from([gzip.compress, lzma.compress]))
    def test_damaged_archives(self, reader, tmp_path_factory, cut, flip, packer):
        data = bytearray(packer(b"0 1\n1 2\n2 0\n" * 5))
        data = data[:cut]
        if data:
            data[flip % len(data)] ^= 0x55
        self.check(reader, tmp_path_factory.getbasetemp() / "fuzz", bytes(data))


@PROPERTY
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1)), min_size=1, max_size=20, unique=True
    ),
    sep=st.sampled_from([" ", "\t", ",", "::", " , "]),
)
def test_pairs_round_trip(tmp_path_factory, rows, sep):
    path = tmp_path_factory.getbasetemp() / "round-trip"
    path.write_text("\n".join(f"{u}{sep}{i}" for u, i in rows))
    assert pairs(read_pairs(path, sep=sep)) == rows


@PROPERTY
@given(lines=st.dictionaries(st.integers(0, 50), st.sets(st.integers(0, 99)), min_size=1))
def test_lightgcn_round_trip(tmp_path_factory, lines):
    folder = tmp_path_factory.getbasetemp()
    lines[51] = {0}
    (folder / "rt-train").write_text("".join(" ".join(map(str, [u, *items])) + "\n" for u, items in lines.items()))
    (folder / "rt-test").write_text("51 1\n")
    data = read_lightgcn(folder / "rt-train", folder / "rt-test")
    assert pairs(data.train) == [(u, i) for u, items in lines.items() for i in items]


class TestKCore:
    @PROPERTY
    @given(
        edges=st.sets(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1),
        min_user=st.integers(0, 4),
        min_item=st.integers(0, 4),
    )
    def test_equals_removal_one_at_a_time(self, edges, min_user, min_item):
        left = set(edges)
        while True:
            bad = [
                (u, i)
                for u, i in left
                if sum(v == u for v, _ in left) < min_user or sum(j == i for _, j in left) < min_item
            ]
            if not bad:
                break
            left.remove(bad[0])
        result = k_core(torch.tensor(sorted(edges)).T, min_user=min_user, min_item=min_item)
        assert pairs(result) == sorted(left)

    def test_bad_input(self):
        with pytest.raises(ValueError, match="min_item must be at least 0, got -1"):
            k_core(torch.tensor([[0], [0]]), min_user=1, min_item=-1)


class TestSplitRatio:
    @PROPERTY
    @given(
        seed=st.integers(0, 1000),
        test=st.sampled_from([0.0, 0.1, 0.2, 0.29, 0.5]),
        valid=st.sampled_from([0.0, 0.1, 0.3]),
    )
    def test_per_user_floors_and_a_partition(self, seed, test, valid):
        edges = random_edges(6, 120, 0.4, seed)
        data = split_ratio(edges, test=test, valid=valid, generator=generator(seed))
        parts = [part for part in (data.train, data.valid, data.test) if part is not None]
        assert sorted(pairs(torch.cat(parts, dim=1))) == sorted(pairs(edges))
        for user in range(6):
            n = int((edges[0] == user).sum())
            assert int((data.test[0] == user).sum()) == math.floor(round(test * n, 6))
            if valid:
                assert int((data.valid[0] == user).sum()) == math.floor(round(valid * n, 6))
        assert (data.valid is None) == (valid == 0)

    def test_over_all_pairs(self):
        edges = random_edges(10, 30, 0.5)
        data = split_ratio(edges, test=0.25, per_user=False, generator=generator())
        assert data.test.shape[1] == math.floor(0.25 * edges.shape[1])

    def test_parts_keep_the_order_and_sizes_can_be_given(self):
        edges = torch.stack((torch.zeros(50, dtype=torch.long), torch.arange(50)))
        data = split_ratio(edges, test=0.2, generator=generator(), num_users=3, num_items=60)
        assert data.train[1].tolist() == sorted(data.train[1].tolist())
        assert (data.num_users, data.num_items) == (3, 60)

    def test_every_pair_is_equally_likely(self):
        edges = torch.stack((torch.zeros(10, dtype=torch.long), torch.arange(10)))
        source = generator()
        hits = torch.zeros(10)
        for _ in range(2000):
            hits[split_ratio(edges, test=0.3, generator=source).test[1]] += 1
        assert hits.sub(600).abs().max() < 5 * math.sqrt(2000 * 0.3 * 0.7)

    def test_the_generator_decides(self):
        edges = random_edges(10, 30, 0.5)
        splits = [split_ratio(edges, generator=generator(seed)).test for seed in (1, 1, 2)]
        assert torch.equal(splits[0], splits[1])
        assert not torch.equal(splits[0], splits[2])

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"test": 1.0}, "test and valid must be at least 0 with a sum below 1, got 1.0 and 0.0"),
            ({"test": 0.5, "valid": 0.5}, "sum below 1"),
            ({"test": -0.1}, "at least 0"),
            ({"test": math.nan}, "at least 0"),
            ({"num_users": 1}, "user id 1, which is not below num_users=1"),
        ],
    )
    def test_bad_input(self, arguments, match):
        with pytest.raises(ValueError, match=match):
            split_ratio(torch.tensor([[0, 1], [0, 1]]), **arguments)
        with pytest.raises(ValueError, match="no pairs"):
            split_ratio(torch.zeros(2, 0, dtype=torch.long))


class TestHoldOutValidation:
    def test_floor_of_each_users_pairs_moves(self):
        edges = random_edges(20, 60, 0.5)
        data = InteractionData(25, 60, train=edges, test=torch.tensor([[0], [0]]))
        held = hold_out_validation(data, share=0.1, generator=generator())
        assert sorted(pairs(held.train) + pairs(held.valid)) == sorted(pairs(edges))
        counts = torch.bincount(edges[0], minlength=25)
        assert torch.equal(torch.bincount(held.valid[0], minlength=25), counts // 10)
        assert (held.num_users, held.num_items) == (25, 60)
        assert held.test is data.test
        assert data.valid is None

    def test_bad_input(self):
        edges = torch.tensor([[0], [0]])
        with pytest.raises(ValueError, match="share must be between 0 and 1"):
            hold_out_validation(InteractionData(1, 1, train=edges, test=edges), share=1.0)
        with pytest.raises(ValueError, match="already"):
            hold_out_validation(InteractionData(1, 1, train=edges, test=edges, valid=edges))


class TestUnbiasedSplit:
    @PROPERTY
    @given(
        seed=st.integers(0, 1000),
        heldout=st.sampled_from([0.1, 0.3, 0.8]),
        test_share=st.sampled_from([0.5, 2 / 3, 1.0]),
    )
    def test_partition_in_which_everyone_has_train_pairs(self, seed, heldout, test_share):
        edges = random_edges(12, 15, 0.3, seed)
        parts = unbiased_split(edges, heldout=heldout, cap=0.2, test_share=test_share, generator=generator(seed))
        train, valid, test = parts
        assert sorted(pairs(torch.cat(parts, dim=1))) == sorted(pairs(edges))
        assert set(train[0].tolist()) == set(edges[0].tolist())
        assert set(train[1].tolist()) == set(edges[1].tolist())
        held = valid.shape[1] + test.shape[1]
        assert held <= round(heldout * edges.shape[1])
        assert test.shape[1] == round(test_share * held)

    def test_heldout_popularity_is_flat_where_train_is_skewed(self):
        share = torch.linspace(0.02, 0.9, 40)
        edges = (torch.rand(3000, 40, generator=generator()) < share).nonzero().T
        counts = torch.bincount(edges[1]).double()
        _, valid, test = unbiased_split(edges, heldout=0.02, cap=1.0, generator=generator())
        held = torch.bincount(torch.cat((valid, test), 1)[1], minlength=40).double()
        assert counts.max() / counts.min() > 20
        assert held[counts > 200].std() / held[counts > 200].mean() < 0.25

    def test_first_draw_follows_the_weights(self):
        # item 0 has 6 pairs, item 1 has 2: weights 1/6 and cap 0.25
        edges = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1], [0, 0, 0, 0, 0, 0, 1, 1]])
        source = generator()
        hits = torch.zeros(2)
        for _ in range(2000):
            hits[unbiased_split(edges, heldout=0.125, cap=0.25, test_share=1.0, generator=source)[2][1]] += 1
        # users 2..5 have a single pair, which goes back; the others stay: 2 pairs of weight 1/6, 2 of weight 1/4
        expected = 2000 * torch.tensor([2 / 6, 2 / 4]) / (6 / 6 + 2 / 4)
        assert (hits - expected).abs().max() < 5 * math.sqrt(2000 / 4)

    def test_moved_back_pairs_come_last(self):
        edges = torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3]])
        train, _, _ = unbiased_split(edges, heldout=0.5, cap=1.0, generator=generator())
        kept = [pair for pair in pairs(edges) if pair in pairs(train)]
        assert sorted(pairs(train)) == kept

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"heldout": 0.0}, "heldout must be between 0 and 1"),
            ({"heldout": 1.0}, "heldout must be between 0 and 1"),
            ({"cap": 0.0}, "cap must be positive, got 0.0"),
            ({"cap": math.nan}, "cap must be positive, got nan"),
            ({"test_share": 0.0}, r"test_share must be in \(0, 1\], got 0.0"),
        ],
    )
    def test_bad_input(self, arguments, match):
        with pytest.raises(ValueError, match=match):
            unbiased_split(torch.tensor([[0, 1], [0, 1]]), **({"cap": 0.5} | arguments))
        with pytest.raises(ValueError, match="no pairs"):
            unbiased_split(torch.zeros(2, 0, dtype=torch.long), cap=0.5)


class TestReindex:
    def test_order_of_first_appearance(self):
        train, other = torch.tensor([[9, 4, 9, 0], [7, 7, 1, 3]]), torch.tensor([[0, 9], [1, 1]])
        (new_train, new_other), users, items = reindex(train, other)
        assert users.tolist() == [9, 4, 0]
        assert items.tolist() == [7, 1, 3]
        assert torch.equal(torch.stack((users[new_train[0]], items[new_train[1]])), train)
        assert torch.equal(torch.stack((users[new_other[0]], items[new_other[1]])), other)

    def test_unknown_ids(self):
        with pytest.raises(ValueError, match="item that does not occur in train"):
            reindex(torch.tensor([[0], [5]]), torch.tensor([[0], [6]]))
        with pytest.raises(ValueError, match="no pairs"):
            reindex(torch.zeros(2, 0, dtype=torch.long))


class TestInjectFalsePositives:
    def test_added_in_proportion_and_never_known(self):
        edges = random_edges(40, 100, 0.3)
        data = split_ratio(edges, test=0.2, valid=0.1, generator=generator())
        noisy = inject_false_positives(data, 0.4, generator())
        known = set(pairs(edges))
        added = pairs(noisy.train)[data.train.shape[1] :]
        assert torch.equal(noisy.train[:, : data.train.shape[1]], data.train)
        assert not known & set(added)
        assert len(set(added)) == len(added)
        clean = torch.bincount(data.train[0], minlength=40).double()
        extra = torch.bincount(noisy.train[0], minlength=40).double() - clean
        assert ((extra >= torch.floor(0.4 * clean)) & (extra <= torch.ceil(0.4 * clean))).all()
        assert torch.equal(noisy.test, data.test)
        assert torch.equal(noisy.valid, data.valid)

    def test_fractions_count_on_average(self):
        train = torch.stack((torch.arange(4000), torch.zeros(4000, dtype=torch.long)))
        data = InteractionData(4000, 50, train=train, test=torch.tensor([[0], [1]]))
        added = inject_false_positives(data, 0.3, generator()).train.shape[1] - 4000
        assert abs(added - 1200) < 5 * math.sqrt(4000 * 0.3 * 0.7)

    def test_items_are_uniform(self):
        train = torch.stack((torch.arange(5000), torch.zeros(5000, dtype=torch.long)))
        data = InteractionData(5000, 11, train=train, test=torch.tensor([[0], [1]]))
        noise = inject_false_positives(data, 2.0, generator()).train[:, 5000:]
        counts = torch.bincount(noise[1], minlength=11)
        assert counts[0] == 0
        assert counts[1:].sub(1000).abs().max() < 5 * math.sqrt(1000)

    def test_a_user_without_enough_items_gets_all(self):
        data = InteractionData(1, 5, train=torch.tensor([[0, 0], [0, 1]]), test=torch.tensor([[0], [4]]))
        noisy = inject_false_positives(data, 10.0, generator())
        assert sorted(noisy.train[1].tolist()) == [0, 1, 2, 3]

    def test_zero_rate_changes_nothing(self):
        data = InteractionData(1, 5, train=torch.tensor([[0], [0]]), test=torch.tensor([[0], [4]]))
        assert torch.equal(inject_false_positives(data, 0.0, generator()).train, data.train)

    @pytest.mark.parametrize("rate", [-0.1, math.nan, math.inf])
    def test_bad_rate(self, rate):
        edges = torch.tensor([[0], [0]])
        with pytest.raises(ValueError, match="rate must be a finite number of at least 0"):
            inject_false_positives(InteractionData(1, 1, train=edges, test=edges), rate)


class TestLoadDataset:
    def test_names_are_unique_and_sorted(self):
        names = [info.name for info in DATASETS]
        assert names == sorted(set(names)) == ["gowalla", "lastfm", "ml-100k", "ml-1m", "synthetic"]

    def test_unknown_name_and_split(self):
        with pytest.raises(ValueError, match=r"unknown data set 'ml100k'; accepted: gowalla, .*did you mean 'ml-100k'"):
            load_dataset("ml100k", None)
        with pytest.raises(ValueError, match=r"unknown split 'unbaised'.*did you mean 'unbiased'"):
            load_dataset("synthetic", None, split="unbaised")
        with pytest.raises(ValueError, match="unknown data set"):
            check_dataset("netflix", None)

    def test_absent_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"ml-100k/u\.data, .*u\.data\.gz"):
            load_dataset("ml-100k", tmp_path)
        with pytest.raises(ValueError, match="root must be the folder that contains recsys/, got None"):
            load_dataset("gowalla", None)

    def test_synthetic_needs_no_root(self):
        first, again, other = (load_dataset("synthetic", None, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(first.train, again.train)
        assert not torch.equal(first.train, other.train)

    def test_ml_100k_split_is_the_published_recipe(self, tmp_path, write):
        rows = [(u, i, 1 + (u * 7 + i * 3) % 5, 0) for u in range(1, 30) for i in range(40, 0, -1) if (u + i) % 3]
        (tmp_path / "recsys" / "ml-100k").mkdir(parents=True)
        (tmp_path / "recsys" / "ml-100k" / "u.data").write_text("".join("\t".join(map(str, r)) + "\n" for r in rows))
        data = load_dataset("ml-100k", tmp_path)
        rng = np.random.default_rng(2024)
        expected = set()
        for user in range(1, 30):
            liked = np.array(sorted(i for u, i, rating, _ in rows if u == user and rating >= 4))
            expected |= {(user - 1, int(i) - 1) for i in rng.permutation(liked)[: len(liked) // 5]}
        assert set(pairs(data.test)) == expected
        assert data.train.shape[1] + data.test.shape[1] == sum(rating >= 4 for _, _, rating, _ in rows)

    @pytest.mark.parametrize(
        ("name", "users", "items", "train", "test"),
        [
            ("ml-100k", 943, 1682, 44_679, 10_696),
            ("lastfm", 1892, 4489, 42_135, 10_533),
            ("gowalla", 29_858, 40_981, 810_128, 217_242),
            ("ml-1m", 6022, 3043, 796_244, 99_455),
        ],
    )
    def test_real_sizes_and_checksums(self, data_root, name, users, items, train, test):
        data = load_dataset(name, data_root)
        assert (data.num_users, data.num_items, data.train.shape[1], data.test.shape[1]) == (users, items, train, test)
        again = load_dataset(name, data_root / "recsys")
        assert torch.equal(data.test, again.test)
        assert all(check.ok for check in check_dataset(name, data_root))

    @pytest.mark.parametrize(("name", "train", "test"), [("lastfm", 38_529, 9_426), ("ml-100k", 40_172, 10_136)])
    def test_unbiased_sizes_are_close_to_the_measured_ones(self, data_root, name, train, test):
        standard, data = load_dataset(name, data_root), load_dataset(name, data_root, split="unbiased", seed=3)
        assert data.train.shape[1] == pytest.approx(train, rel=0.01)
        assert data.test.shape[1] == pytest.approx(test, rel=0.02)
        total = sum(part.shape[1] for part in (data.train, data.valid, data.test))
        assert total == standard.train.shape[1] + standard.test.shape[1]
        assert len(set(data.train[0].tolist())) == data.num_users
        assert len(set(data.train[1].tolist())) == data.num_items
        degree = torch.bincount(data.train[1]).double()
        assert degree[data.test[1]].mean() < 0.7 * degree[data.train[1]].mean()

    def test_recbole_file_holds_the_same_ratings(self, data_root):
        folder = data_root / "recsys" / "ml-100k"
        edges, users, items = read_inter(folder / "ml-100k.inter", min_rating=4)
        other, other_users, other_items = read_movielens(folder / "u.data", min_rating=4)
        named = {(users[u], items[i]) for u, i in pairs(edges)}
        assert named == {(other_users[u], other_items[i]) for u, i in pairs(other)}
        assert len(named) == 55_375

    def test_checksums_are_those_of_the_list(self, data_root):
        listed = dict(reversed(line.split()) for line in (data_root / "recsys" / "SHA256SUMS").read_text().splitlines())
        known = {file.path: file.sha256 for info in DATASETS for file in info.files}
        assert known == {path: digest for path, digest in listed.items() if path in known}

    def test_check_reports_missing_and_changed_files(self, tmp_path):
        (tmp_path / "recsys" / "gowalla").mkdir(parents=True)
        (tmp_path / "recsys" / "gowalla" / "test.txt.xz").write_bytes(b"other")
        checks = check_dataset("gowalla", tmp_path)
        assert [(check.path.name, check.status, check.ok) for check in checks] == [
            ("train.txt.xz", "missing", False),
            ("test.txt.xz", "changed", False),
        ]
        assert check_dataset("synthetic", None) == ()


def recall(score: torch.Tensor, data: InteractionData, k: int = 20) -> float:
    score = score.clone().double()
    score[data.train[0], data.train[1]] = -math.inf
    truth = torch.zeros(data.num_users, data.num_items, dtype=torch.bool)
    truth[data.test[0], data.test[1]] = True
    size = truth.sum(1)
    hits = truth.gather(1, score.topk(k).indices).sum(1)
    return float((hits[size > 0] / size[size > 0]).mean())


@pytest.fixture(scope="module")
def feedback():
    return synthetic_feedback(seed=0)


class TestSyntheticFeedback:
    def test_rankings_order_as_they_must(self, feedback):
        data = feedback.data
        popularity = torch.bincount(data.train[1], minlength=data.num_items).expand(data.num_users, -1)
        oracle = recall(feedback.relevance, data)
        biased = recall(feedback.relevance * feedback.exposure, data)
        popular = recall(popularity, data)
        random = recall(torch.rand(data.num_users, data.num_items, generator=generator()), data)
        assert oracle > 1.15 * biased
        assert biased > 2 * popular
        assert popular > 1.1 * random

    def test_means_are_as_asked(self):
        feedback = synthetic_feedback(density=0.15, exposure_share=0.3)
        assert float(feedback.relevance.mean()) == pytest.approx(0.15, abs=1e-9)
        assert float(feedback.exposure.mean()) == pytest.approx(0.3, abs=1e-9)
        assert float(feedback.item_exposure.max()) == 1
        product = torch.outer(feedback.user_activity, feedback.item_exposure).clamp(max=1)
        assert torch.allclose(product, feedback.exposure)

    def test_parts_are_disjoint_and_relevant(self, feedback):
        data = feedback.data
        parts = pairs(torch.cat((data.train, data.valid, data.test), dim=1))
        assert len(set(parts)) == len(parts)
        assert all(feedback.relevant[u, i] for u, i in parts)

    def test_test_pairs_do_not_depend_on_exposure_and_clicks_do(self, feedback):
        data, exposure, relevant = feedback.data, feedback.exposure, feedback.relevant
        low = exposure < exposure[relevant].median()
        share_of_low = float(low[relevant].double().mean())
        in_test = float(low[data.test[0], data.test[1]].double().mean())
        in_train = float(low[data.train[0], data.train[1]].double().mean())
        assert in_test == pytest.approx(share_of_low, abs=5 * 0.5 / math.sqrt(data.test.shape[1]))
        assert in_train < 0.6 * share_of_low

    def test_clicks_of_relevant_pairs_follow_the_exposure(self, feedback):
        data, exposure = feedback.data, feedback.exposure
        clicks = torch.zeros_like(feedback.relevant)
        for part in (data.train, data.valid):
            clicks[part[0], part[1]] = True
        open_pairs = feedback.relevant.clone()
        open_pairs[data.test[0], data.test[1]] = False
        for low, high in ((0.0, 0.1), (0.1, 0.3), (0.3, 0.9), (0.999, 1.1)):
            cell = open_pairs & (exposure >= low) & (exposure < high)
            expected, n = float(exposure[cell].mean()), int(cell.sum())
            assert float(clicks[cell].double().mean()) == pytest.approx(expected, abs=5 * 0.5 / math.sqrt(n))

    def test_noise(self):
        clean, noisy = synthetic_feedback(), synthetic_feedback(noise_rate=0.5)
        size = [f.data.train.shape[1] + f.data.valid.shape[1] for f in (clean, noisy)]
        assert size[1] == pytest.approx(1.5 * size[0], rel=0.02)
        assert torch.equal(clean.data.test, noisy.data.test)
        assert not set(pairs(noisy.data.train)) & set(pairs(noisy.data.test))

    def test_no_bias_without_power_law_and_activity(self):
        feedback = synthetic_feedback(exposure_power=0.0, activity_spread=0.0)
        assert torch.allclose(feedback.exposure, torch.tensor(0.2, dtype=torch.float64))

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"num_users": 0}, "num_users must be at least 1, got 0"),
            ({"dim": 0}, "dim must be at least 1"),
            ({"density": 1.0}, "density must be between 0 and 1"),
            ({"exposure_share": math.nan}, "exposure_share must be between 0 and 1"),
            ({"test_share": 0.0}, "test_share must be between 0 and 1"),
            ({"sharpness": -1.0}, "sharpness must be a positive finite number, got -1.0"),
            ({"exposure_power": math.inf}, "exposure_power"),
            ({"noise_rate": -0.1}, "noise_rate"),
            ({"num_users": 1, "num_items": 1}, "raise num_users, num_items, density or exposure_share"),
        ],
    )
    def test_bad_input(self, arguments, match):
        with pytest.raises(ValueError, match=match):
            synthetic_feedback(**arguments)
