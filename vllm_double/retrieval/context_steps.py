"""The compiled functions of `context`."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from vllm_double.jit import machine_code, view_part
from vllm_double.retrieval.array_source import EXAMPLES
from vllm_double.retrieval.base import Found, Queries, Tokens
from vllm_double.retrieval.suffix_automaton.arena import NONE, Arena, Arrays, Ints, Records
from vllm_double.retrieval.suffix_automaton.automaton_steps import (
    ROOT,
    Record,
    advance,
    append,
    append_text,
    continue_context,
    crowded,
    followed,
    index_of,
    move,
    text_at,
    unknown_row,
    unready_row,
)

CONTEXT = np.dtype([("live", np.bool_), ("is_queued", np.bool_), ("slot", np.int32), ("next", np.int32)], align=True)
"""``slot``: of its automaton, or NONE if the arena was full. ``next``: the key behind it in the queue of those that wait to
be indexed, which those that stopped leave when it is their turn."""
QUEUE = np.dtype([("first", np.int32), ("last", np.int32)])
_MOVE = 8  # tokens whose share of an automaton is moved in the time that indexing one takes


class Contexts(NamedTuple):
    requests: Records
    """CONTEXT [keys]"""


@view_part
def _put(requests: Records, queue: Record, key: int) -> None:
    """Put a key at the end of the queue, unless it is there."""
    if requests[key].is_queued:
        return
    requests[key].is_queued = True
    requests[key].next = NONE
    if queue.first == NONE:
        queue.first = key
    else:
        requests[queue.last].next = key
    queue.last = key


@view_part
def _take(requests: Records, queue: Record) -> int:
    """The first key of the queue; NONE: there is none."""
    key = queue.first
    if key != NONE:
        queue.first = requests[key].next
        requests[key].is_queued = False
    return key  # type: ignore[no-any-return]


@view_part
def _index(arrays: Arrays, automaton: Record, num_tokens: int) -> None:
    """Index the next tokens of the text."""
    index, start = index_of(arrays, automaton), automaton.start
    for position in range(automaton.num_tokens, automaton.num_tokens + num_tokens):
        append(automaton, index, arrays.text[start + position])


def _enqueue(requests: Records, queues: Records, key: int) -> None:
    _put(requests, queues[0], key)


def extend(
    arrays: Arrays, requests: Records, queues: Records, keys: Ints, tokens: Tokens, starts: Ints, at_once: int
) -> int:  # fmt: skip
    """Append to texts, and index them if few tokens wait. If not NONE is returned, nothing was done: see `unready_row`."""
    unready = unready_row(arrays, requests, keys, starts, 0)
    if unready != NONE:
        return unready
    for row in range(keys.size):
        slot = requests[keys[row]].slot
        if slot == NONE:
            continue
        automaton = arrays.automata[slot]
        append_text(arrays, automaton, tokens[starts[row] : starts[row + 1]])
        if automaton.grown_capacity or automaton.length - automaton.num_tokens > at_once:
            _put(requests, queues[0], keys[row])
        else:
            _index(arrays, automaton, automaton.length - automaton.num_tokens)
    return NONE


def _work(arrays: Arrays, requests: Records, queues: Records, budget: int, turn: int) -> tuple[int, int]:
    """Index queued texts by turns: what is left of the budget, and an automaton that has moved, or NONE. That ends the call."""
    while budget > 0:
        key = _take(requests, queues[0])
        if key == NONE:
            break
        if not requests[key].live or requests[key].slot == NONE:
            continue
        slot = requests[key].slot
        automaton = arrays.automata[slot]
        if automaton.grown_capacity:
            num_tokens = min(_MOVE * min(turn, budget), automaton.capacity - automaton.num_moved)
            move(arrays, automaton, num_tokens)
            budget -= (num_tokens + _MOVE - 1) // _MOVE
            _put(requests, queues[0], key)
            if automaton.num_moved == NONE:
                return budget, slot
        else:
            num_tokens = min(min(turn, budget), automaton.length - automaton.num_tokens)
            _index(arrays, automaton, num_tokens)
            budget -= num_tokens
            if automaton.num_tokens < automaton.length:
                _put(requests, queues[0], key)
    return budget, NONE


def look_up(arrays: Arrays, requests: Records, queries: Queries, found: Found, evidence: Records) -> int:
    """Answer all queries; see `ContextRetriever`. Returns the row of an unknown key, or NONE."""
    unknown = unknown_row(requests, queries.keys)
    if unknown != NONE:
        return unknown
    for row in range(queries.keys.size):
        key = queries.keys[row]
        found.lengths[row] = 0
        if queries.max_tokens[row] <= 0:
            continue
        if requests[key].slot == NONE:
            continue
        automaton = arrays.automata[requests[key].slot]
        index = index_of(arrays, automaton)
        num_tail, max_match = queries.tail_lengths[row], automaton.max_match
        first = 0
        if automaton.num_tokens == automaton.length and num_tail < max_match:
            state, length = automaton.window, automaton.window_length
        else:
            state, length = ROOT, 0
            first = max(0, num_tail - max_match)
            for position in range(max(0, automaton.length - (max_match - (num_tail - first))), automaton.length):
                state, length = advance(index, state, length, text_at(arrays, automaton, position), max_match)
        for i in range(first, num_tail):
            state, length = advance(index, state, length, queries.tails[row, i], max_match)
        max_tokens = min(queries.max_tokens[row], found.tokens.shape[1])
        found.lengths[row] = continue_context(
            automaton, index.states, state, length, row, max_tokens, found.tokens, found.beliefs, evidence
        )
    return NONE


@view_part
def source_of(arrays: Arrays, automaton: Record) -> tuple[int, int]:
    """Where the latest occurrence is of the token that a lookup behind the text's end returns first, and the length of its
    context; (NONE, 0): there is none, or tokens wait."""
    if automaton.num_tokens < automaton.length:
        return NONE, 0
    states = index_of(arrays, automaton).states
    state, length = followed(states, automaton.window, automaton.window_length)
    if state == ROOT:
        return NONE, 0
    return states[states[state].best].end - 1, length


class ContextSteps(NamedTuple):
    crowded: Callable[[Arrays, Records, int, int], int]
    enqueue: Callable[[Records, Records, int], None]
    extend: Callable[[Arrays, Records, Records, Ints, Tokens, Ints, int], int]
    work: Callable[[Arrays, Records, Records, int, int], tuple[int, int]]
    lookup: Callable[[Arrays, Records, Queries, Found, Any], int]


@functools.cache
def context_steps() -> ContextSteps:
    """The compiled functions; compiles them, or loads what an earlier process compiled, once."""
    arrays, requests, queues = Arena(0).arrays, np.zeros(0, CONTEXT), np.zeros(1, QUEUE)
    tokens = np.zeros(0, np.int32)
    return ContextSteps(
        machine_code(crowded, arrays, requests, 0, 0, counts_references=False),
        machine_code(_enqueue, requests, queues, 0, counts_references=False),
        machine_code(extend, arrays, requests, queues, tokens, tokens, tokens, 0, counts_references=False),
        machine_code(_work, arrays, requests, queues, 0, 0, releases_gil=True, counts_references=False),
        machine_code(look_up, arrays, requests, *EXAMPLES, counts_references=False),
    )
