"""Context retrieval against a scan of the whole text."""

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from tests.references.automaton import check_context
from tests.references.retrieval import scan
from vllm_double.retrieval import ContextRetriever, context


def fibonacci_word(length: int) -> list[int]:
    shorter, longer = [0], [0, 1]
    while len(longer) < length:
        shorter, longer = longer, longer + shorter
    return longer[:length]


LENGTHS = st.integers(0, 120)
RANDOM = st.integers(1, 5).flatmap(lambda size: st.lists(st.integers(0, size - 1), max_size=120))
PERIODIC = st.builds(
    lambda period, length: (period * length)[:length],
    st.lists(st.integers(0, 3), min_size=1, max_size=12),
    LENGTHS,
)
BLOCKS = st.builds(
    # Few blocks in any order: long matches that part again.
    lambda blocks, order: [token for i in order for token in blocks[i % len(blocks)]],
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=15), min_size=1, max_size=4),
    st.lists(st.integers(0, 3), max_size=10),
)
STREAMS = st.one_of(RANDOM, PERIODIC, BLOCKS, LENGTHS.map(fibonacci_word), LENGTHS.map(lambda n: [0] * n))
# A small bound is reached often; 32 is what is used.
BOUNDS = st.sampled_from([1, 2, 3, 5, 8, 32])


@given(STREAMS, st.data(), BOUNDS)
@settings(max_examples=600, deadline=None)
def test_a_lookup_equals_a_scan(text: list[int], data: st.DataObject, max_match: int) -> None:
    num_indexed = data.draw(st.one_of(st.just(len(text)), st.integers(0, len(text))), "num_indexed")
    start = data.draw(st.integers(0, len(text)), "start")
    repeated = text[start : start + data.draw(st.integers(0, 40), "tail length")]
    tail = data.draw(st.one_of(st.just([]), st.just(repeated), RANDOM), "tail")
    retriever = ContextRetriever(max_match)
    retriever.start(0, np.array(text, np.int32))
    retriever.work(num_indexed)
    assert retriever.lookup(0, tail, 20) == scan(text, num_indexed, tail, 20, max_match)


@given(STREAMS, BOUNDS)
@settings(max_examples=300, deadline=None)
def test_the_automaton_of_a_text_is_that_of_its_definition(text: list[int], max_match: int) -> None:
    retriever = ContextRetriever(max_match)
    retriever.start(0, np.array(text, np.int32))
    retriever.work(len(text))
    check_context(retriever)


class Requests(RuleBasedStateMachine):
    """Several requests, driven as a proposer drives them, beside plain lists."""

    keys = Bundle("keys")

    @initialize(max_match=BOUNDS)
    def build(self, max_match: int) -> None:
        # Small, so that texts of a testable length wait, too.
        self.patches = [mock.patch.object(context, name, 10) for name in ("_AT_ONCE", "_SLICE", "_MIN_CAPACITY")]
        self.patches[2] = mock.patch.object(context, "_MIN_CAPACITY", 2)
        for patch in self.patches:
            patch.start()
        self.retriever = ContextRetriever(max_match)
        self.max_match = max_match
        self.texts: dict[int, list[int]] = {}
        self.next_key = 0

    def teardown(self) -> None:
        for patch in self.patches:
            patch.stop()

    @rule(target=keys, text=STREAMS)
    def start(self, text: list[int]) -> int:
        key = self.next_key
        self.next_key += 1
        self.retriever.start(key, np.array(text, np.int32))
        self.texts[key] = list(text)
        with pytest.raises(ValueError, match="already"):
            self.retriever.start(key, np.array(text, np.int32))
        return key

    @rule(key=keys, tokens=st.one_of(STREAMS, st.lists(st.integers(0, 3), max_size=3)))
    def extend(self, key: int, tokens: list[int]) -> None:
        self.retriever.extend(key, tokens)
        self.texts[key] += tokens

    @rule(key=keys, start=st.integers(0, 120), length=st.integers(1, 20))
    def repeat(self, key: int, start: int, length: int) -> None:
        self.extend(key, self.texts[key][start : start + length])

    @rule(budget=st.integers(0, 200))
    def work(self, budget: int) -> None:
        waiting = self.retriever.num_waiting
        self.retriever.work(budget)
        # Less, if an index is moved to a larger range meanwhile.
        assert max(0, waiting - budget) <= self.retriever.num_waiting <= waiting
        is_moving = self.retriever.arrays.automata["grown_capacity"].any()
        if budget and not is_moving:
            assert self.retriever.num_waiting < max(waiting, 1)

    @rule(key=keys, tail=st.one_of(st.just([]), RANDOM), max_tokens=st.integers(1, 20))
    def lookup(self, key: int, tail: list[int], max_tokens: int) -> None:
        text = self.texts[key]
        expected = scan(text, self.retriever.num_indexed(key), tail, max_tokens, self.max_match)
        assert self.retriever.lookup(key, tail, max_tokens) == expected

    @rule(key=keys, start=st.integers(0, 120), length=st.integers(1, 40))
    def lookup_repeated(self, key: int, start: int, length: int) -> None:
        self.lookup(key, self.texts[key][start : start + length], 10)

    @rule(key=consumes(keys))
    def stop(self, key: int) -> None:
        self.retriever.stop(key)
        del self.texts[key]
        with pytest.raises(KeyError):
            self.retriever.lookup(key, [], 1)

    @invariant()
    def waiting_is_what_is_not_indexed(self) -> None:
        waiting = sum(len(text) - self.retriever.num_indexed(key) for key, text in self.texts.items())
        assert self.retriever.num_waiting == waiting
        check_context(self.retriever)


Requests.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
test_requests_driven_at_random_equal_plain_lists = Requests.TestCase
