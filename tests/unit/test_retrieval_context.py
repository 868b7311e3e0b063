import numpy as np
import pytest

from tests.references.automaton import check_context, owned
from tests.references.retrieval import scan
from vllm_double.retrieval import ContextRetriever, Continuation
from vllm_double.retrieval.array_source import MAX_CONTINUATION
from vllm_double.retrieval.suffix_automaton.arena import BYTES_PER_TOKEN, NONE, STATE

KEY = 7


def indexed(tokens: list[int], max_match: int = 32) -> ContextRetriever:
    retriever = ContextRetriever(max_match)
    retriever.start(KEY, np.array(tokens, np.int32))
    retriever.work(len(tokens))
    return retriever


def slot_of(retriever: ContextRetriever) -> int:
    return int(retriever.requests["slot"][KEY])


def random_tokens(length: int, alphabet: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, alphabet, length).tolist()


def test_the_longest_match_is_continued_and_not_a_more_frequent_shorter_one() -> None:
    text = [1, 2, 3, 9, 2, 4, 9, 2, 4, 9, 1, 2]
    assert indexed(text).lookup(KEY, [], 1) == Continuation.of([3], 2, [1], [1])


def test_the_most_frequent_token_is_returned_with_its_count_and_the_total() -> None:
    text = [5, 1, 5, 2, 5, 2, 5, 3, 5]
    assert indexed(text).lookup(KEY, [], 1) == Continuation.of([2], 1, [2], [4])


def test_of_equally_frequent_tokens_the_latest_is_returned() -> None:
    assert indexed([5, 1, 5, 2, 5, 3, 5]).lookup(KEY, [], 1) == Continuation.of([3], 1, [1], [3])
    assert indexed([5, 2, 5, 1, 5, 1, 5, 2, 8, 5]).lookup(KEY, [], 1) == Continuation.of([2], 1, [2], [4])


def test_the_occurrence_at_the_end_of_the_text_counts_only_once_a_token_follows() -> None:
    retriever = indexed([5, 1, 5])
    assert retriever.lookup(KEY, [], 1) == Continuation.of([1], 1, [1], [1])
    retriever.extend(KEY, [1, 8, 5])
    assert retriever.lookup(KEY, [], 1) == Continuation.of([1], 1, [2], [2])


def test_counts_fall_step_by_step_as_the_context_grows() -> None:
    text = [1, 2, 3, 4, 0, 1, 2, 3, 5, 0, 1, 2, 6, 0, 9]
    assert indexed(text).lookup(KEY, [1], 4) == Continuation.of([2, 3, 5, 0], 1, [3, 2, 1, 1], [3, 3, 2, 1])


def test_a_loop_is_continued_beyond_the_end_of_the_text() -> None:
    found = indexed([1, 2, 3, 1, 2, 3, 1]).lookup(KEY, [], 8)
    assert found is not None
    assert found.tokens == [2, 3, 1, 2, 3, 1, 2, 3]
    assert found.match_length == 4


def test_a_continuation_ends_before_its_context_gets_shorter_than_the_match() -> None:
    # Behind 1 2 3 the text ends with 4, which never occurred with anything behind it.
    assert indexed([1, 2, 3, 4]).lookup(KEY, [1, 2], 8) == Continuation.of([3, 4], 2, [1, 1], [1, 1])


def test_the_tail_is_matched_behind_the_text_and_forgotten() -> None:
    retriever = indexed([1, 2, 3, 4, 9, 1, 2])
    assert retriever.lookup(KEY, [3], 1) == Continuation.of([4], 3, [1], [1])
    assert retriever.lookup(KEY, [], 1) == Continuation.of([3], 2, [1], [1])
    check_context(retriever)


def test_tokens_of_the_tail_that_never_occurred_end_the_match() -> None:
    retriever = indexed([1, 2, 3, 1, 2])
    assert retriever.lookup(KEY, [8], 4) is None
    assert retriever.lookup(KEY, [8, 1], 1) == Continuation.of([2], 1, [2], [2])


@pytest.mark.parametrize("text", [[], [1], [1, 2, 3]], ids=str)
def test_without_repetition_nothing_is_returned(text: list[int]) -> None:
    assert indexed(text).lookup(KEY, [], 4) is None


def test_a_context_is_never_longer_than_max_match() -> None:
    text = [1, 2, 3, 4, 5, 6, 0, 9, 2, 3, 4, 5, 7, 9, 2, 3, 4, 5, 7, 1, 2, 3, 4, 5]
    assert indexed(text, 32).lookup(KEY, [], 1) == Continuation.of([6], 5, [1], [1])
    assert indexed(text, 4).lookup(KEY, [], 1) == Continuation.of([7], 4, [2], [3])


def test_arrays_are_taken_as_tokens_and_as_tail() -> None:
    retriever = indexed([1, 2, 3])
    retriever.extend(KEY, np.array([9, 1], np.int32))
    assert retriever.lookup(KEY, np.array([2], np.int32), 1) == Continuation.of([3], 2, [1], [1])


@pytest.mark.parametrize("chunk", [1, 37, 4000], ids="chunk{}".format)
def test_growth_loses_no_transition_and_no_count(chunk: int) -> None:
    text = random_tokens(4000, 40)
    retriever = indexed([])
    for start in range(0, len(text), chunk):
        retriever.extend(KEY, text[start : start + chunk])
    retriever.work(len(text))
    check_context(retriever)
    for tail in ([], text[1000:1006], [3]):
        assert retriever.lookup(KEY, tail, 6) == scan(text, len(text), tail, 6, 32)


def test_start_only_queues_and_work_keeps_to_its_budget() -> None:
    retriever = ContextRetriever()
    retriever.start(KEY, np.zeros(3000, np.int32))
    assert (retriever.num_indexed(KEY), retriever.num_waiting) == (0, 3000)
    retriever.work(700)
    assert (retriever.num_indexed(KEY), retriever.num_waiting) == (700, 2300)
    retriever.work(0)
    assert retriever.num_indexed(KEY) == 700
    retriever.work(10_000)
    assert (retriever.num_indexed(KEY), retriever.num_waiting) == (3000, 0)


def test_a_long_prompt_does_not_hold_up_a_short_one() -> None:
    retriever = ContextRetriever()
    retriever.start(1, np.zeros(100_000, np.int32))
    retriever.start(2, np.zeros(200, np.int32))
    retriever.work(1000)
    assert retriever.num_indexed(2) == 200
    assert retriever.num_indexed(1) == 800


def test_a_lookup_before_the_prompt_is_indexed_matches_the_true_end_of_the_text() -> None:
    text = [1, 2, 3, 4, 8, 8, 8, 9, 1, 2]
    retriever = ContextRetriever()
    retriever.start(KEY, np.array(text, np.int32))
    assert retriever.lookup(KEY, [], 2) is None
    retriever.work(4)
    assert retriever.lookup(KEY, [], 2) == Continuation.of([3, 4], 2, [1, 1], [1, 1])
    assert retriever.lookup(KEY, [3], 2) == Continuation.of([4], 3, [1], [1])


def test_tokens_committed_while_a_prompt_waits_are_indexed_behind_it() -> None:
    text = random_tokens(3000, 30)
    retriever = ContextRetriever()
    retriever.start(KEY, np.array(text, np.int32))
    retriever.work(100)
    retriever.extend(KEY, text[200:210])
    assert retriever.num_indexed(KEY) == 100
    retriever.work(10_000)
    check_context(retriever)
    assert retriever.lookup(KEY, [], 5) == scan(text + text[200:210], 3010, [], 5, 32)


def test_requests_do_not_see_each_other() -> None:
    retriever = indexed([1, 2, 3])
    retriever.start(8, np.array([4, 5, 6], np.int32))
    retriever.work(10)
    assert retriever.lookup(8, [1], 1) is None
    retriever.stop(KEY)
    assert retriever.lookup(8, [4], 1) == Continuation.of([5], 1, [1], [1])


def test_a_stopped_request_leaves_the_queue_and_may_start_again() -> None:
    retriever = ContextRetriever()
    retriever.start(KEY, np.zeros(3000, np.int32))
    retriever.stop(KEY)
    assert retriever.num_waiting == 0
    retriever.work(100)
    retriever.start(KEY, np.array([3, 4], np.int32))
    retriever.work(100)
    assert retriever.lookup(KEY, [3], 1) == Continuation.of([4], 1, [1], [1])


def test_an_unknown_key_is_a_key_error() -> None:
    retriever = ContextRetriever()
    for call in (
        lambda: retriever.extend(KEY, [1]),
        lambda: retriever.lookup(KEY, [], 1),
        lambda: retriever.num_indexed(KEY),
        lambda: retriever.stop(KEY),
    ):
        with pytest.raises(KeyError):
            call()


def test_misuse_is_a_value_error_and_changes_nothing() -> None:
    text = [1, 2, 3, 1, 2]
    retriever = indexed(text)
    for call in (
        lambda: retriever.start(KEY, np.array([1], np.int32)),
        lambda: retriever.start(8, np.array([1, -1], np.int32)),
        lambda: retriever.extend(KEY, [4, -1]),
        lambda: retriever.extend(KEY, np.array([4, -1], np.int32)),
        lambda: retriever.lookup(KEY, [], 0),
        lambda: retriever.lookup(KEY, [], MAX_CONTINUATION + 1),
        lambda: ContextRetriever(0),
    ):
        with pytest.raises(ValueError, match=r"must|cannot|already"):
            call()
    check_context(retriever)
    assert retriever.lookup(KEY, [], 2) == scan(text, len(text), [], 2, 32)
    with pytest.raises(KeyError):
        retriever.lookup(8, [], 1)


def test_the_longest_continuation_fits() -> None:
    found = indexed([1, 2] * 20).lookup(KEY, [], MAX_CONTINUATION)
    assert found is not None
    assert found.tokens == [1, 2] * (MAX_CONTINUATION // 2)


def test_a_loop_takes_no_memory_and_a_new_token_behind_it_no_time_that_grow_with_the_text() -> None:
    # Work is counted in states and transitions made: a full-depth automaton adds 5000 for the last token.
    retriever = indexed([1] * 5000)
    automaton = retriever.arrays.automata[slot_of(retriever)]
    states, edges = automaton["num_states"], automaton["num_edges"]
    retriever.extend(KEY, [2])
    assert automaton["num_states"] - states < 34 and automaton["num_edges"] - edges < 34
    assert automaton["num_states"] < 80


def test_memory_is_bounded_per_token() -> None:
    # Capacity is at most twice the tokens.
    for tokens in (random_tokens(5000, 3), random_tokens(5000, 4000), [1, 2] * 2500):
        retriever = indexed(tokens)
        arena = retriever.arena
        assert len(arena.arrays.text) - arena.num_free <= 2 * 5000
        assert BYTES_PER_TOKEN == sum(array.nbytes for array in arena.arrays[1:]) / len(arena.arrays.text) == 92


@pytest.mark.parametrize("name", STATE.names)
def test_integrity_check_sees_a_changed_state(name: str) -> None:
    retriever = indexed([1, 2, 3, 1, 2, 4, 1, 2, 3])
    _, states, *_ = owned(retriever.arena, slot_of(retriever))
    # The state that holds [1, 2]: all its fields are in use.
    state = next(row for row in states if row["count"] == 3 and row["length"] == 2)
    assert state["edges"] != NONE
    state[name] += 1
    with pytest.raises((AssertionError, IndexError, KeyError)):
        check_context(retriever)


def test_integrity_check_sees_a_lost_transition() -> None:
    retriever = indexed(random_tokens(100, 5))
    _, _, _, table, _ = owned(retriever.arena, slot_of(retriever))
    table[np.flatnonzero(table)[0]] = 0
    with pytest.raises(AssertionError):
        check_context(retriever)
