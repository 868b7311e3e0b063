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
    followed,
    index_of,
    occurs,
    unknown_row,
    unready_row,
)

MAX_GENERATIONS = 32
REQUEST = np.dtype(
    [("live", np.bool_), ("slot", np.int32), ("tenant", np.int32), ("output", np.int64)],
    align=True,
)
"""``slot``: where its text is, the prompt's last tokens and its output; NONE: it neither reads nor leaves anything. ``output``:
where in the text begins what it may leave."""
CURSOR = np.dtype(
    [("serial", np.int64), ("position", np.int64), ("num_tokens", np.int32), ("state", np.int32), ("length", np.int32)],
    align=True,
)
"""The longest suffix of a request's text up to ``position`` that occurred in a generation when that had ``num_tokens``."""
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
def _follow(index: Index, automaton: Record, text: Ints, cursor: Record) -> None:
    """Move a cursor to the end of the text."""
    max_match = automaton.max_match
    first = max(0, text.size - max_match)
    state, length, position = cursor.state, cursor.length, cursor.position
    is_valid = cursor.serial == automaton.serial and position >= first
    if is_valid and cursor.num_tokens != automaton.num_tokens:
        # States keep their numbers. Longer suffixes may occur now, and if any does, the one longer by a token does.
        if length < min(max_match, position) and occurs(index, text[position - length - 1 : position]):
            is_valid = False
        else:
            state = clamp(index.states, state, length)
    if not is_valid:
        state, length, position = ROOT, 0, first
    for i in range(position, text.size):
        state, length = advance(index, state, length, text[i], max_match)
    cursor.serial = automaton.serial
    cursor.num_tokens = automaton.num_tokens
    cursor.position = text.size
    cursor.state = state
    cursor.length = length


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
        if queries.max_tokens[row] <= 0:
            continue
        if readers.requests[key].slot == NONE:
            continue
        own = arrays.automata[readers.requests[key].slot]
        text = arrays.text[own.start : own.start + own.length]
        number = readers.requests[key].tenant
        tenant = past.tenants[number]
        best, best_state, best_length = NONE, ROOT, 0
        for n in range(tenant.num_generations):
            place = (tenant.newest - n) % MAX_GENERATIONS
            slot = past.generations[number, place]
            automaton = arrays.automata[slot]
            index = index_of(arrays, automaton)
            cursor = readers.cursors[key, place]
            _follow(index, automaton, text, cursor)
            state, length = cursor.state, cursor.length
            for i in range(queries.tail_lengths[row]):
                state, length = advance(index, state, length, queries.tails[row, i], automaton.max_match)
            state, length = followed(index.states, state, length)
            if length > best_length:
                best, best_state, best_length = slot, state, length
        if best != NONE:
            automaton = arrays.automata[best]
            max_tokens = min(queries.max_tokens[row], found.tokens.shape[1])
            found.lengths[row] = continue_context(
                automaton, index_of(arrays, automaton).states, best_state, best_length, row, max_tokens, found.tokens,
                found.beliefs, evidence,
            )  # fmt: skip
    return NONE


class HistorySteps(NamedTuple):
    extend: Callable[[Arrays, Readers, Ints, Tokens, Ints], int]
    fill: Callable[[Arrays, int, int, int, int], None]
    lookup: Callable[[Arrays, Readers, Past, Queries, Found, Any], int]


@functools.cache
def history_steps() -> HistorySteps:
    """The compiled functions; compiles them, or loads what an earlier process compiled, once."""
    arrays, readers, tokens = Arena(0).arrays, Readers.empty(0), np.zeros(0, np.int32)
    return HistorySteps(
        machine_code(extend, arrays, readers, tokens, tokens, tokens, counts_references=False),
        machine_code(_index, arrays, 0, 0, 0, 0, releases_gil=True, counts_references=False),
        machine_code(look_up, arrays, readers, Past.empty(0), *EXAMPLES, counts_references=False),
    )
