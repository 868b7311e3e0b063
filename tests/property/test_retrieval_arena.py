"""The arena against a list of ranges, full arenas, and many requests in one call."""

import random
from pathlib import Path
from unittest import mock

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.property.test_retrieval_properties import STREAMS
from tests.references.automaton import check_arena, check_context, check_history
from tests.references.retrieval import scan
from vllm_double.retrieval import (
    ContextRetriever,
    Datastore,
    DatastoreRetriever,
    EditRetriever,
    Found,
    HistoryRetriever,
    Queries,
    Source,
    context,
)
from vllm_double.retrieval.base import Continuation
from vllm_double.retrieval.datastore.build import build
from vllm_double.retrieval.suffix_automaton.arena import BYTES_PER_TOKEN, NONE, Arena


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=60), st.integers(1, 1500))
@settings(max_examples=200, deadline=None)
def test_ranges_never_overlap_and_come_back(actions: list[tuple[bool, int]], num_tokens: int) -> None:
    arena, slots = Arena(num_tokens * BYTES_PER_TOKEN), list[int]()
    for opens, number in actions:
        if opens:
            slot = arena.open(1 << number, 4)
            if slot != NONE:
                slots.append(slot)
        elif slots:
            arena.close(slots.pop(number % len(slots)))
        check_arena(arena, slots)
    for slot in slots:
        arena.close(slot)
    assert arena.num_free == num_tokens
    arena.clean(None)
    check_arena(arena, [])
    assert arena.open(1 << (num_tokens.bit_length() - 1), 4) != NONE, "neighbours make one range again"


def test_memory_of_a_large_context_is_given_back_in_slices() -> None:
    retriever = ContextRetriever()
    retriever.start(0, np.random.default_rng(0).integers(0, 1000, 200_000).astype(np.int32))
    before = psutil.Process().memory_info().rss
    retriever.work(1 << 20)
    grown = psutil.Process().memory_info().rss - before
    assert grown > 10 << 20
    retriever.stop(0)
    num_slices = 0
    while retriever.arena._released:
        retriever.work(64)
        num_slices += 1
    assert num_slices == 1 << 18 >> 12
    assert psutil.Process().memory_info().rss - before < grown / 5


def test_short_requests_use_the_same_memory_again() -> None:
    retriever, starts = HistoryRetriever(100_000), set[int]()
    for _ in range(200):
        retriever.start(0, np.array([5], np.int32), "a")
        for _ in range(4):
            retriever.extend(0, list(range(150)))  # more than its first range has room for
            starts.add(int(retriever.arena.arrays.automata["start"][retriever.requests["slot"][0]]))
        retriever.stop(0, keep=True)
        retriever.work(1000)
    assert len(starts) < 20


def test_a_request_that_finds_the_arena_full_goes_without_an_index() -> None:
    retriever = ContextRetriever(arena=Arena(512 * BYTES_PER_TOKEN))
    text = np.array([1, 2, 3] * 50, np.int32)
    for key in range(3):
        retriever.start(key, text)
        retriever.work(1000)
    assert retriever.num_unindexed == 1
    assert [retriever.lookup(key, (), 3) is not None for key in range(3)] == [True, True, False]
    retriever.extend(2, [1, 2])
    assert retriever.lookup(2, (), 3) is None
    retriever.extend(0, [7] * 200)  # no room for twice as much
    assert retriever.num_unindexed == 2 and retriever.lookup(0, (), 3) is None
    check_context(retriever)
    retriever.stop(0)
    retriever.start(0, text)
    retriever.work(1000)
    assert retriever.lookup(0, (), 3) is not None
    check_context(retriever)


def test_a_history_that_finds_the_arena_full_gives_up_its_oldest_generation() -> None:
    retriever = HistoryRetriever(100_000, arena=Arena(4096 * BYTES_PER_TOKEN))
    for key in range(40):
        retriever.start(0, np.array([5], np.int32), f"tenant {key % 20}")
        retriever.extend(0, [1000 + 10 * key + step for step in range(9)])
        retriever.stop(0, keep=True)
        retriever.work(64)
        check_history(retriever)
    assert retriever.arena.num_refused > 0
    for tenant, is_known in ((19, True), (0, False)):
        retriever.start(1, np.array([1000 + 10 * (20 + tenant)], np.int32), f"tenant {tenant}")
        assert (retriever.lookup(1, (), 4) is not None) == is_known
        retriever.stop(1, keep=False)
    check_history(retriever)


def test_lookups_are_exact_while_an_index_moves_to_a_larger_range() -> None:
    rng = random.Random(0)
    with mock.patch.object(context, "_MIN_CAPACITY", 8):
        retriever, text = ContextRetriever(8), list[int]()
        retriever.start(0, np.zeros(0, np.int32))
        num_moving = 0
        for _ in range(3000):
            new = [rng.randrange(4) for _ in range(rng.randrange(1, 4))]
            retriever.extend(0, new)
            text += new
            retriever.work(rng.randrange(8))
            assert retriever.text(0).tolist() == text
            if retriever.arrays.automata["grown_capacity"].any() and len(text) < 2000:
                num_moving += 1
                tail = text[-20 : -20 + rng.randrange(4)]
                assert retriever.lookup(0, tail, 5) == scan(text, retriever.num_indexed(0), tail, 5, 8)
        assert num_moving > 50
    while retriever.num_waiting:
        retriever.work(64)
    check_context(retriever)


def answers(source: Source, queries: Queries, width: int) -> list[tuple[list[int], list[float]]]:
    found = Found.empty(len(queries.keys) + 1, width)
    found.lengths.fill(7)
    source.lookup_many(queries, found)
    rows = zip(found.lengths[:-1].tolist(), found.tokens.tolist(), found.beliefs.tolist(), strict=False)
    return [(tokens[:length], beliefs[:length]) for length, tokens, beliefs in rows]


def expected(one: Continuation | None) -> tuple[list[int], list[float]]:
    return ([], []) if one is None else (one.tokens, pytest.approx(one.beliefs, rel=1e-6))


@given(st.lists(st.tuples(st.integers(0, 3), STREAMS), min_size=1, max_size=8), st.data())
@settings(max_examples=100, deadline=None)
def test_many_lookups_and_extends_at_once_are_those_of_each(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, list[int]]], data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "store"
    if not path.exists():
        build(path, [np.array([0, 1, 2, 3, 0, 1, 2, 4] * 5, np.int32)], 200, bytes(32))
    together, alone = sources(path), sources(path)
    for source in (*together, *alone):
        for key in range(4):
            source.start(key, np.array([0, 1, 2], np.int32), "a")
        source.extend(3, [0, 1, 2, 3, 0, 1, 2, 4])
        source.stop(3, keep=True)
        source.start(3, np.array([0, 1], np.int32), "a")
        source.work(1000)
    for first, text in steps:
        keys = [first, (first + 1) % 4]
        parts = [text[: len(text) // 2], text[len(text) // 2 :]]
        starts = np.cumsum([0, *(len(part) for part in parts)]).astype(np.int32)
        for source in together:
            source.extend_many(np.array(keys, np.int32), np.array(text, np.int32), starts)
        for source in alone:
            for key, part in zip(keys, parts, strict=True):
                source.extend(key, part)
        tails = data.draw(st.lists(st.lists(st.integers(0, 4), max_size=4), min_size=1, max_size=6), "tails")
        asked = [data.draw(st.integers(0, 3), "key") for _ in tails]
        limits = [data.draw(st.integers(0, 12), "limit") for _ in tails]
        queries = Queries.of(asked, tails, limits)
        for many, one in zip(together, alone, strict=True):
            singles = [
                one.lookup(key, tail, min(limit, 8)) if limit else None
                for key, tail, limit in zip(asked, tails, limits, strict=True)
            ]
            assert answers(many, queries, 8) == [expected(single) for single in singles], many.name
            assert answers(many, queries, 8) == [expected(single) for single in singles], "a lookup leaves no trace"
            many.work(64)
            one.work(64)


def sources(path: Path) -> list[Source]:
    own = ContextRetriever()
    return [own, EditRetriever(own), HistoryRetriever(4096, arena=own.arena), DatastoreRetriever(Datastore(path))]


def test_an_unknown_key_among_many_is_a_key_error_and_nothing_is_appended(tmp_path: Path) -> None:
    build(tmp_path / "store", [np.array([0, 1, 2], np.int32)], 200, bytes(32))
    for source in sources(tmp_path / "store"):
        source.start(0, np.array([1, 2, 1], np.int32), "a")
        source.work(10)
        before = source.lookup(0, (), 2)
        with pytest.raises(KeyError):
            source.extend_many(np.array([0, 9], np.int32), np.array([5, 5], np.int32), np.array([0, 1, 2], np.int32))
        for key in (9, 1000, -1):
            with pytest.raises(KeyError):
                source.lookup_many(Queries.of([0, key], [(), ()], [2, 2]), Found.empty(2, 2))
        assert source.lookup(0, (), 2) == before
