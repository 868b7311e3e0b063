"""The compiled functions of `history`."""

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
    Index,
    Record,
    advance,
    append,
    append_text,
    clamp,
    continue_context,
    crowded,
    followed,
    index_of,
    occurs,
    unknown_row,
    unready_row,
)

MAX_GENERATIONS = 32  # a power of two
REQUEST = np.dtype(
    [("live", np.bool_), ("slot", np.int32), ("tenant", np.int32), ("output", np.int64)],
    align=True,
)
"""``slot``: where its text is, the prompt's last tokens and its output; NONE: it neither reads nor leaves anything. ``output``:
where in the text begins what it may leave."""
CURSOR = np.dtype(
    [("serial", np.int64), ("position", np.int64)]
    + [(name, np.int32) for name in ("num_tokens", "state", "length", "tail_state", "tail_length")],
    align=True,
)
"""The longest suffix of a request's text up to ``position`` that occurred in a generation when that had ``num_tokens``; and of
a query's text and tail."""
TENANT = np.dtype([("newest", np.int32), ("num_generations", np.int32)])
"""``newest``: place of the newest generation. Older ones are at the places before it, modulo MAX_GENERATIONS."""


class Readers(NamedTuple):
    requests: Records
    """REQUEST [keys]"""
    cursors: Records
    """CURSOR [keys, MAX_GENERATIONS], by the generation's place"""

    @classmethod
    def empty(cls, num_keys: int) -> "Readers":
        return cls(np.zeros(num_keys, REQUEST), np.zeros((num_keys, MAX_GENERATIONS), CURSOR))


class Past(NamedTuple):
    tenants: Records
    """TENANT [tenants]"""
    generations: Ints
    """[tenants, MAX_GENERATIONS], automata by place"""

    @classmethod
    def empty(cls, num_tenants: int) -> "Past":
        return cls(np.zeros(num_tenants, TENANT), np.zeros((num_tenants, MAX_GENERATIONS), np.int32))


def extend(arrays: Arrays, readers: Readers, keys: Ints, tokens: Tokens, starts: Ints) -> int:
    """Append to texts, and leave room for a separator. If not NONE is returned, nothing was done: see `unready_row`."""
    unready = unready_row(arrays, readers.requests, keys, starts, 1)
    if unready != NONE:
        return unready
    for row in range(keys.size):
        slot = readers.requests[keys[row]].slot
        if slot != NONE:
            append_text(arrays, arrays.automata[slot], tokens[starts[row] : starts[row + 1]])
    return NONE


def _index(arrays: Arrays, generation: int, slot: int, start: int, stop: int) -> None:
    """Append a part of a text, of which the last token is a separator, to a generation."""
    automaton = arrays.automata[generation]
    index = index_of(arrays, automaton)
    first = arrays.automata[slot].start
    for position in range(first + start, first + stop):
        append(automaton, index, arrays.text[position])


@view_part
def _is_valid(index: Index, automaton: Record, text: Ints, cursor: Record) -> bool:
    """Whether a cursor still names the longest suffix of what it has followed; texts may have been added to its generation."""
    max_match, length, position = automaton.max_match, cursor.length, cursor.position
    if cursor.serial != automaton.serial or position < text.size - max_match:
        return False
    if cursor.num_tokens != automaton.num_tokens:
        # States keep their numbers. Longer suffixes may occur now, and if any does, the one longer by a token does.
        if length < min(max_match, position) and occurs(index, text[position - length - 1 : position]):
            return False
        cursor.state = clamp(index.states, cursor.state, length)
        cursor.num_tokens = automaton.num_tokens
    return True


@view_part
def _place_of(tenant: Record, n: int) -> int:
    """Place of the n-th generation; 0: the newest."""
    return (tenant.newest - n) & (MAX_GENERATIONS - 1)  # type: ignore[no-any-return]


@view_part
def _follow(arrays: Arrays, cursors: Records, slots: Ints, tenant: Record, text: Ints) -> None:
    """Move the cursors to the end of the text, and begin its tail there.

    Token by token in all generations: each step waits for memory, and the generations do not wait for each other.
    """
    first = text.size
    for n in range(tenant.num_generations):
        place = _place_of(tenant, n)
        cursor, automaton = cursors[place], arrays.automata[slots[place]]
        if not _is_valid(index_of(arrays, automaton), automaton, text, cursor):
            cursor.serial, cursor.num_tokens = automaton.serial, automaton.num_tokens
            cursor.state, cursor.length, cursor.position = ROOT, 0, max(0, text.size - automaton.max_match)
        first = min(first, cursor.position)
    for i in range(first, text.size):
        for n in range(tenant.num_generations):
            place = _place_of(tenant, n)
            cursor = cursors[place]
            if cursor.position <= i:
                automaton = arrays.automata[slots[place]]
                index = index_of(arrays, automaton)
                cursor.state, cursor.length = advance(index, cursor.state, cursor.length, text[i], automaton.max_match)
                cursor.position = i + 1
    for n in range(tenant.num_generations):
        cursor = cursors[_place_of(tenant, n)]
        cursor.tail_state, cursor.tail_length = cursor.state, cursor.length


def look_up(
    arrays: Arrays, readers: Readers, past: Past, queries: Queries, found: Found, evidence: Records
) -> int:  # fmt: skip
    """Answer all queries; see `HistoryRetriever`. Returns the row of an unknown key, or NONE."""
    unknown = unknown_row(readers.requests, queries.keys)
    if unknown != NONE:
        return unknown
    for row in range(queries.keys.size):
        key = queries.keys[row]
        found.lengths[row] = 0
        if queries.max_tokens[row] <= 0 or readers.requests[key].slot == NONE:
            continue
        own = arrays.automata[readers.requests[key].slot]
        number, cursors = readers.requests[key].tenant, readers.cursors[key]
        tenant, slots = past.tenants[number], past.generations[number]
        _follow(arrays, cursors, slots, tenant, arrays.text[own.start : own.start + own.length])
        for i in range(queries.tail_lengths[row]):
            for n in range(tenant.num_generations):
                place = _place_of(tenant, n)
                cursor, automaton = cursors[place], arrays.automata[slots[place]]
                index, token = index_of(arrays, automaton), queries.tails[row, i]
                cursor.tail_state, cursor.tail_length = advance(
                    index, cursor.tail_state, cursor.tail_length, token, automaton.max_match
                )
        best, best_state, best_length = NONE, ROOT, 0
        for n in range(tenant.num_generations):
            place = _place_of(tenant, n)
            states = index_of(arrays, arrays.automata[slots[place]]).states
            state, length = followed(states, cursors[place].tail_state, cursors[place].tail_length)
            if length > best_length:
                best, best_state, best_length = slots[place], state, length
        if best != NONE:
            automaton = arrays.automata[best]
            max_tokens = min(queries.max_tokens[row], found.tokens.shape[1])
            found.lengths[row] = continue_context(
                automaton, index_of(arrays, automaton).states, best_state, best_length, row, max_tokens, found.tokens,
                found.beliefs, evidence,
            )  # fmt: skip
    return NONE


class HistorySteps(NamedTuple):
    crowded: Callable[[Arrays, Records, int, int], int]
    extend: Callable[[Arrays, Readers, Ints, Tokens, Ints], int]
    fill: Callable[[Arrays, int, int, int, int], None]
    lookup: Callable[[Arrays, Readers, Past, Queries, Found, Any], int]


@functools.cache
def history_steps() -> HistorySteps:
    """The compiled functions; compiles them, or loads what an earlier process compiled, once."""
    arrays, readers, tokens = Arena(0).arrays, Readers.empty(0), np.zeros(0, np.int32)
    return HistorySteps(
        machine_code(crowded, arrays, readers.requests, 0, 0, counts_references=False),
        machine_code(extend, arrays, readers, tokens, tokens, tokens, counts_references=False),
        machine_code(_index, arrays, 0, 0, 0, 0, releases_gil=True, counts_references=False),
        machine_code(look_up, arrays, readers, Past.empty(0), *EXAMPLES, counts_references=False),
    )
