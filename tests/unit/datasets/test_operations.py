"""Which rows an operation keeps, and what two files have in common: rules that depend on the rows alone."""

import json
import tracemalloc
from collections import Counter
from itertools import combinations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.common.errors import InvalidArgument
from lathe.datasets import operations
from lathe.datasets.differences import difference, longest_increasing
from lathe.datasets.operations import AuditChoice, Dedupe, Drop, Parent, Preparation, Sample, Split, Truncate
from lathe.datasets.selection import DROPPED, Cut, StrataPass, counts, select, shares
from lathe.datasets.strata import Strata
from lathe.text.rowindex import RowIndex, RowIndexWriter

AUDIT = AuditChoice("baseModels/tiny", "supervised", 100, "end", "a" * 64)
TEXTS = st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=30)
SEEDS = st.integers(-(2**63), 2**63 - 1)


def content_of(texts):
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """A row index of texts. Hypothesis runs many examples within one test: one folder for all of them."""
    folder = tmp_path_factory.mktemp("rows")
    numbers = iter(range(10**9))

    def make(texts):
        path = folder / str(next(numbers))
        with RowIndexWriter(path) as writer:
            writer.feed(content_of(texts))
            writer.finish()
        return RowIndex(path)

    return make


def strata(texts, field="text"):
    work = StrataPass(field)
    work.feed(content_of(texts))
    return work.finish()


def taken(texts, selection, part=0):
    cut = Cut(selection, part)
    kept = cut.feed(content_of(texts)) + cut.finish()
    return [json.loads(line)["text"] for line in kept.splitlines()]


# --- split -------------------------------------------------------------------------------------------------------


@given(texts=TEXTS, seed=SEEDS, data=st.data(), stratified=st.booleans())
def test_a_split_is_a_partition_that_parts_no_equal_rows_and_repeats(indexed, texts, seed, data, stratified):
    wanted = data.draw(st.integers(1, len(texts) - 1))
    operation = Split(seed, count=wanted, stratify_by="text" if stratified else "")
    groups = strata(texts) if stratified else None
    selection = select(operation, indexed(texts), groups)
    assert selection == select(operation, indexed(texts), groups)
    train, held_out = taken(texts, selection, 0), taken(texts, selection, 1)
    assert Counter(train) + Counter(held_out) == Counter(texts)
    assert not set(train) & set(held_out)
    assert len(held_out) <= wanted
    assert counts(operation, selection) == [len(train), len(held_out)]


@given(rows=st.integers(2, 60), fraction=st.floats(0.01, 0.99), seed=SEEDS)
def test_a_split_of_different_rows_holds_out_exactly_the_share(indexed, rows, fraction, seed):
    texts = [str(number) for number in range(rows)]
    wanted = round(rows * fraction)
    if not 0 < wanted < rows:
        with pytest.raises(InvalidArgument, match="leaves nothing"):
            select(Split(seed, fraction), indexed(texts))
        return
    assert counts(Split(seed, fraction), select(Split(seed, fraction), indexed(texts))) == [
        rows - wanted,
        wanted,
    ]


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=5), seed=SEEDS, data=st.data())
def test_a_stratified_split_keeps_every_share_within_a_row(indexed, sizes, seed, data):
    texts = [f"{name}{n}" for name, size in zip("abcde", sizes, strict=False) for n in range(size)]
    if len(texts) < 2:
        return
    wanted = data.draw(st.integers(1, len(texts) - 1))
    groups = strata([text[0] for text in texts])
    held_out = taken(texts, select(Split(seed, count=wanted), indexed(texts), groups), 1)
    assert len(held_out) == wanted
    got = Counter(text[0] for text in held_out)
    for name, size in zip("abcde", sizes, strict=False):
        assert abs(got[name] - size * wanted / len(texts)) < 1


def test_another_seed_is_another_split_and_more_rows_move_no_one(indexed):
    texts = [str(number) for number in range(200)]
    one, other = (taken(texts, select(Split(seed, 0.2), indexed(texts)), 1) for seed in (1, 2))
    assert set(one) != set(other)
    # What is drawn is drawn from the row, not from its place: the same row has the same ticket elsewhere.
    back = texts[::-1]
    assert set(taken(back, select(Split(1, 0.2), indexed(back)), 1)) == set(one)


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=8), data=st.data())
def test_shares_add_up_and_stay_within_one_of_the_proportion(sizes, data):
    wanted = data.draw(st.integers(0, sum(sizes)))
    dealt = shares(sizes, wanted)
    assert sum(dealt) == wanted
    for got, size in zip(dealt, sizes, strict=True):
        assert 0 <= got <= size and abs(got - size * wanted / sum(sizes)) < 1


def test_strata_keep_no_values():
    work = Strata("text")
    tracemalloc.start()
    for n in range(20):
        work.add(json.dumps({"text": str(n) * 200_000}).encode())
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert list(work.rows) == list(range(20)) and kept < 1_000_000


def test_strata_by_answer_by_a_key_of_it_and_by_a_path():
    def chat(answer):
        return json.dumps(
            {"messages": [{"role": "user", "content": answer}, {"role": "assistant", "content": answer}]}
        ).encode()

    def numbers(field, *lines):
        work = Strata(field)
        for line in lines:
            work.add(line)
        return list(work.finish())

    rows = [b'{"messages": [{"role": "user", "content": "yes"}], "grade": 1}', chat("no")]
    assert numbers("answer", *rows) == [0, 1]
    rows = [chat("yes"), chat("no"), b'{"prompt": "?", "completion": "yes"}', b'{"text": "yes"}']
    assert numbers("answer", *rows) == [0, 1, 0, 0]
    tickets = [chat(json.dumps({"kind": kind, "n": n})) for n, kind in enumerate(("a", "b", "a"))]
    assert numbers("answer.kind", *tickets, chat("no JSON")) == [0, 1, 0, 2]
    assert numbers("messages[0].content", *rows[:2], *rows[:1]) == [0, 1, 0]
    assert numbers("messages[-1].role", *rows) == [0, 0, 1, 1]
    assert numbers("label", b'{"label": true}', b'{"label": "true"}', b"{}") == [0, 1, 2]
    for path in ("", "messages[x]", "messages[0"):
        with pytest.raises(InvalidArgument, match="path"):
            Strata(path)
    with pytest.raises(InvalidArgument, match="more than 1000 different"):
        numbers("text", *(json.dumps({"text": str(n)}).encode() for n in range(1001)))
    with pytest.raises(InvalidArgument, match="no row has lable"):
        numbers("lable", b'{"label": 1}', b'{"label": 2}')
    assert numbers("label") == []


# --- dedupe, drop, sample ---------------------------------------------------------------------------------------


@given(texts=TEXTS)
def test_dedupe_keeps_the_first_of_equals_and_twice_is_once(indexed, texts):
    kept = taken(texts, select(Dedupe(), indexed(texts)))
    assert kept == list(dict.fromkeys(texts))
    assert taken(kept, select(Dedupe(), indexed(kept))) == kept


def test_what_is_left_of_equal_rows_is_chosen_with_80_bytes_a_row(indexed):
    rows = 20_000
    index = indexed([str(number) for number in range(rows)])
    pool, usual = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        assert set(select(Dedupe(), index)) == {0}
        peak = tracemalloc.get_traced_memory()[1] + pool.max_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(usual)
    assert peak < 80 * rows


def test_what_an_audit_found_is_left_out_beside_what_is_named(indexed):
    texts = list("abcabd")
    assert taken(texts, select(Drop((1,), ("email",), AUDIT), indexed(texts), found={2, 6})) == list("cab")
    assert taken(texts, select(Dedupe(AUDIT), indexed(texts), found={3})) == list("abd")


@given(texts=TEXTS, data=st.data())
def test_drop_leaves_out_exactly_those_lines(indexed, texts, data):
    lines = data.draw(st.sets(st.integers(1, len(texts)), min_size=1))
    kept = taken(texts, select(Drop(tuple(sorted(lines))), indexed(texts)))
    assert kept == [text for line, text in enumerate(texts, 1) if line not in lines]


def test_a_line_that_is_not_there_cannot_be_dropped(indexed):
    with pytest.raises(InvalidArgument, match="no row on line 4"):
        select(Drop((1, 4, 5)), indexed("abc"))


@given(texts=TEXTS, seed=SEEDS, data=st.data())
def test_a_sample_has_so_many_rows_in_their_order_and_repeats(indexed, texts, seed, data):
    count = data.draw(st.integers(1, len(texts)))
    selection = select(Sample(seed, count), indexed(texts))
    assert selection == select(Sample(seed, count), indexed(texts))
    kept = [position for position, part in enumerate(selection) if part != DROPPED]
    assert len(kept) == count and taken(texts, selection) == [texts[position] for position in kept]
    if count < len(texts):
        more = select(Sample(seed, count + 1), indexed(texts))
        assert all(more[position] == 0 for position in kept)


def test_a_sample_draws_equal_rows_each_by_itself(indexed):
    texts = ["a"] * 50 + ["b"] * 50
    for seed in range(5):
        assert 5 < taken(texts, select(Sample(seed, 40), indexed(texts))).count("a") < 35


def test_the_same_rows_in_every_version(indexed):
    """The hashes are part of the contract: if this fails, equal operations make other datasets than before."""
    texts = [str(number) for number in range(20)]
    assert taken(texts, select(Split(7, 0.25), indexed(texts)), 1) == SPLIT_7
    assert taken(texts, select(Sample(7, 5), indexed(texts))) == SAMPLE_7


SPLIT_7 = ["4", "7", "10", "12", "17"]
SAMPLE_7 = ["2", "5", "6", "10", "18"]


@pytest.mark.parametrize(
    ("operation", "field"),
    [
        (Drop((1,), ("no_such_code",), AUDIT), "drop.codes"),
        (Drop((1,), ("truncated",)), "drop.base_model"),
        (Drop((1,), (), AUDIT), "drop.base_model"),
        (Split(1), "split"),
        (Split(1, 0.5, 3), "split"),
        (Split(1, 1.0), "split"),
        (Split(1, -0.1), "split"),
        (Split(1, count=-3), "split"),
        (Sample(1, 0), "sample.count"),
        (Drop(()), "drop.lines"),
        (Truncate(AUDIT, "middle"), "truncate.policy"),
        (Truncate(AUDIT, "drop_row", True), "truncate.keep_unfit"),
        (Drop((0, 1)), "drop.lines"),
        (Drop(tuple(range(1, 10_002))), "drop.lines"),
        (Split(1, 0.5, stratify_by="messages[0"), "split.stratify_by"),
        (Split(1, 0.5, stratify_by="messages[]"), "split.stratify_by"),
        (Split(1, 0.5, stratify_by="messages[--1]"), "split.stratify_by"),
        (Split(1, 0.5, stratify_by="messages[²]"), "split.stratify_by"),
        (Split(1, 0.5, stratify_by="messages[" + "9" * 5000 + "]"), "split.stratify_by"),
        (Split(1, 0.5, stratify_by="."), "split.stratify_by"),
    ],
)
def test_what_cannot_be_meant_names_its_field(operation, field):
    with pytest.raises(InvalidArgument) as error:
        operations.check_operation(operation)
    assert error.value.violations[0].field == f"operation.{field}"


@pytest.mark.parametrize(
    "operation",
    [
        Split(3, 0.1, 0, "label"),
        Dedupe(),
        Dedupe(AUDIT),
        Drop((1, 5)),
        Drop((), ("email", "truncated"), AUDIT),
        Sample(2, 9),
        Truncate(AUDIT),
        Truncate(AUDIT, "cut_end", keep_unfit=True),
    ],
)
def test_a_preparation_comes_back_as_it_was_stored(operation):
    made = Preparation((Parent("file-1", "a" * 64),), operation, "train")
    assert operations.from_json(json.loads(json.dumps(operations.to_json(made)))) == made
    operations.check_operation(operation)


# --- differences -------------------------------------------------------------------------------------------------


@given(one=TEXTS, other=TEXTS)
def test_a_difference_shares_out_all_rows_and_turns_around(indexed, one, other):
    found, back = difference(indexed(one), indexed(other)), difference(indexed(other), indexed(one))
    only = Counter(one) - Counter(other)
    assert found.only_in_first.count == only.total()
    assert found.in_both.count == (Counter(one) & Counter(other)).total()
    assert found.only_in_first.count + found.in_both.count == len(one)
    assert found.only_in_second.count + found.in_both.count == len(other)
    assert Counter(one[line - 1] for line, _ in found.only_in_first.first) <= only
    assert all(one[line - 1] == other[second - 1] for line, second in found.in_both.first)
    assert back.only_in_first.first == tuple((line, 0) for _, line in found.only_in_second.first)
    assert back.in_both.count == found.in_both.count and back.moved.count == found.moved.count


def test_what_moved_is_what_changed_its_place_among_the_others(indexed):
    found = difference(indexed("abcdef"), indexed("xbcdeaf"))
    assert found.moved.first == ((1, 6),)
    assert found.only_in_second.first == ((0, 1),)
    same = difference(indexed("abc"), indexed("abc"))
    assert (same.moved.count, same.only_in_first.count, same.in_both.count) == (0, 0, 3)


@given(values=st.lists(st.integers(0, 9), max_size=9, unique=True))
def test_no_increasing_subsequence_is_longer(values):
    chosen = longest_increasing(values)
    kept = [value for value, stays in zip(values, chosen, strict=True) if stays]
    assert kept == sorted(kept)
    longest = max(
        (
            size
            for size in range(len(values) + 1)
            for some in combinations(values, size)
            if list(some) == sorted(some)
        ),
        default=0,
    )
    assert len(kept) == longest
