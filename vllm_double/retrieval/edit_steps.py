"""The compiled functions of `edit`: what is being copied, token by token."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from vllm_double.jit import machine_code, view_part
from vllm_double.retrieval.array_source import EXAMPLES
from vllm_double.retrieval.base import Found, Queries, Tokens
from vllm_double.retrieval.context_steps import CONTEXT, source_of
from vllm_double.retrieval.suffix_automaton.arena import NONE, Arena, Arrays, Ints, Records
from vllm_double.retrieval.suffix_automaton.automaton_steps import Record, note, text_at, unknown_row

_MIN_MATCH = 8  # copying is taken to have begun where so many tokens are those of an earlier place
_WINDOW = 64  # tokens behind a change among which the place is looked for where copying goes on
_SURE = 2  # tokens by which that place is known
_LONGEST_CHANGE = 32  # a change of more tokens is none: copying has ended
_LONGEST_NAME = 8  # tokens of what is replaced again wherever it comes
_MAX_REPLACEMENTS = 64

COPYING = np.dtype(
    [
        ("live", np.bool_), ("source", np.int64), ("end", np.int64), ("run", np.int32),
        ("change", np.int32, _LONGEST_CHANGE + 1), ("num_change", np.int32),
        ("due", np.int32, _LONGEST_NAME), ("num_due", np.int32),
        ("replaced", np.int32), ("num_replaced", np.int32), ("num_replacements", np.int32),
    ],
    align=True,
)  # fmt: skip
"""Where in a text its end is being copied from.

source: place of the next token to be copied; NONE: nothing is being copied.
end: places from here on are the copy itself.
run: tokens that were foreseen since copying began or went on.
change: tokens since the copy departed from the text, which happened at ``source``; empty while it has not.
due: what is still to come of a replacement, ``source`` being behind what it replaces already: ``num_replaced`` tokens, of
which the first is ``replaced``.
"""
REPLACEMENT = np.dtype(
    [("old", np.int32, _LONGEST_NAME), ("new", np.int32, _LONGEST_NAME), ("num_old", np.int32), ("num_new", np.int32)]
)


class Edits(NamedTuple):
    requests: Records
    """COPYING [keys]"""
    replacements: Records
    """REPLACEMENT [keys, _MAX_REPLACEMENTS]: what was replaced last and what came instead, oldest first; each begins with
    another token."""

    @classmethod
    def empty(cls, num_keys: int) -> "Edits":
        shape = (num_keys, _MAX_REPLACEMENTS)
        return cls(np.zeros(num_keys, COPYING), np.zeros(shape, REPLACEMENT))


@view_part
def _begin(copying: Record, source: int, run: int) -> None:
    """Copying begins, or goes on, at ``source``."""
    copying.source = source
    copying.run = run
    copying.num_change = 0
    copying.num_due = 0


@view_part
def _replacement_at(
    arrays: Arrays, text: Record, copying: Record, replacements: Records, place: int, stop: int
) -> int:  # fmt: skip
    """Which replacement is of what stands at a place of the text, before ``stop``; NONE: none is."""
    for i in range(copying.num_replacements if place < stop else 0):
        if replacements[i].old[0] != text_at(arrays, text, place):
            continue
        if place + replacements[i].num_old > stop:
            return NONE
        for j in range(1, replacements[i].num_old):
            if replacements[i].old[j] != text_at(arrays, text, place + j):
                return NONE
        return i
    return NONE


@view_part
def _forget(copying: Record, replacements: Records, token: int) -> None:
    """Drop the replacement that begins with a token, if there is one."""
    kept = 0
    for i in range(copying.num_replacements):
        if replacements[i].old[0] != token:
            replacements[kept] = replacements[i]
            kept += 1
    copying.num_replacements = kept


@view_part
def _place_behind_change(arrays: Arrays, text: Record, copying: Record, num_sure: int) -> int:
    """The nearest place behind the last ``num_sure`` tokens, at or behind where the copy departed; NONE: none."""
    if copying.num_change < num_sure:
        return NONE
    stop = min(copying.source + _WINDOW, min(copying.end, text.length))
    for place in range(copying.source, stop - num_sure + 1):
        for i in range(num_sure):
            if text_at(arrays, text, place + i) != copying.change[copying.num_change - num_sure + i]:
                break
        else:
            return place + num_sure
    return NONE


@view_part
def _try_to_go_on(arrays: Arrays, text: Record, copying: Record, replacements: Records, is_real: bool) -> None:
    place = _place_behind_change(arrays, text, copying, _SURE)
    if place == NONE:
        if copying.num_change > _LONGEST_CHANGE:
            _begin(copying, NONE, 0)
        return
    first, num_new = copying.source, copying.num_change - _SURE
    num_old = place - _SURE - first
    while num_old and num_new and text_at(arrays, text, first + num_old - 1) == copying.change[num_new - 1]:
        num_old -= 1
        num_new -= 1
    if is_real and 0 < num_old <= _LONGEST_NAME and 0 < num_new <= _LONGEST_NAME:
        _forget(copying, replacements, text_at(arrays, text, first))
        if copying.num_replacements == _MAX_REPLACEMENTS:
            _forget(copying, replacements, replacements[0].old[0])
        added = replacements[copying.num_replacements]
        for i in range(num_old):
            added.old[i] = text_at(arrays, text, first + i)
        for i in range(num_new):
            added.new[i] = copying.change[i]
        added.num_old = num_old
        added.num_new = num_new
        copying.num_replacements += 1
    _begin(copying, place, _SURE)


@view_part
def _step(arrays: Arrays, text: Record, copying: Record, replacements: Records, is_real: bool, token: int) -> None:
    """One more token of the copy. Not ``is_real``: replacements stay as they are."""
    if copying.source == NONE:
        return
    if copying.num_change:
        copying.change[copying.num_change] = token
        copying.num_change += 1
        _try_to_go_on(arrays, text, copying, replacements, is_real)
        return
    is_new = copying.num_due == 0
    if is_new:
        stop = min(text.length, copying.source + _LONGEST_NAME)
        found = _replacement_at(arrays, text, copying, replacements, copying.source, stop)
        if found != NONE:
            for i in range(replacements[found].num_new):
                copying.due[i] = replacements[found].new[i]
            copying.num_due = replacements[found].num_new
            copying.replaced = replacements[found].old[0]
            copying.num_replaced = replacements[found].num_old
            copying.source += copying.num_replaced
    if copying.num_due:
        if token == copying.due[0]:
            copying.num_due -= 1
            for i in range(copying.num_due):
                copying.due[i] = copying.due[i + 1]
            copying.run += 1
            return
        # It does not hold everywhere.
        if is_real:
            _forget(copying, replacements, copying.replaced)
        if is_new:
            copying.source -= copying.num_replaced
        copying.num_due = 0
    if copying.source < text.length and text_at(arrays, text, copying.source) == token:
        copying.source += 1
        copying.run += 1
    else:
        copying.change[0] = token
        copying.num_change = 1


@view_part
def _is_plain(copying: Record) -> bool:
    """Whether the copy has followed the text for so long that the context is as sure of the next token."""
    return copying.run >= _MIN_MATCH and copying.num_change == 0 and copying.num_due == 0  # type: ignore[no-any-return]


@view_part
def _is_plain_behind(arrays: Arrays, text: Record, copying: Record, tail: Ints) -> bool:
    """Whether that is so behind ``tail`` too, and nothing is going to be replaced; found out cheaply."""
    if copying.num_replacements or not _is_plain(copying) or copying.source + tail.size > text.length:
        return copying.num_replacements == 0 and tail.size == 0 and _is_plain(copying)  # type: ignore[no-any-return]
    for i in range(tail.size):  # noqa: SIM110
        if text_at(arrays, text, copying.source + i) != tail[i]:
            return False
    return True


@view_part
def _ahead(
    arrays: Arrays, text: Record, copying: Record, replacements: Records, row: int, max_tokens: int, found: Found,
    evidence: Records,
) -> int:  # fmt: skip
    """Fill a row of the answer with the next tokens of the copy; how many.

    None where the copied text itself goes on and a long run speaks for it: there the context says the same.
    """
    place, run, is_plain = copying.source, copying.run, _is_plain(copying)
    if copying.num_change:
        place, run = _place_behind_change(arrays, text, copying, 1), 1
        if place == NONE:
            # Most changes replace: what comes behind what was replaced is the nearest guess.
            place, run = copying.source + 1, 0
    stop = min(text.length, place + max_tokens + _LONGEST_NAME)
    num_found, doubt = 0, 1.0
    for i in range(min(copying.num_due, max_tokens)):
        doubt = note(row, num_found, copying.due[i], 1 + run, 1, 1, doubt, found.tokens, found.beliefs, evidence)
        num_found += 1
    while num_found < max_tokens and place < stop:
        which = _replacement_at(arrays, text, copying, replacements, place, stop)
        num_new = 1 if which == NONE else replacements[which].num_new
        for i in range(min(num_new, max_tokens - num_found)):
            token = text_at(arrays, text, place) if which == NONE else replacements[which].new[i]
            doubt = note(row, num_found, token, 1 + run, 1, 1, doubt, found.tokens, found.beliefs, evidence)
            num_found += 1
        place += 1 if which == NONE else replacements[which].num_old
        is_plain = is_plain and which == NONE
    return 0 if is_plain else num_found


def extend(arrays: Arrays, contexts: Records, edits: Edits, keys: Ints, tokens: Tokens, starts: Ints) -> int:
    """Follow texts that have these tokens already. Returns the row of an unknown key, or NONE."""
    unknown = unknown_row(edits.requests, keys)
    if unknown != NONE:
        return unknown
    for row in range(keys.size):
        key = keys[row]
        if contexts[key].slot == NONE:
            continue
        text, copying = arrays.automata[contexts[key].slot], edits.requests[key]
        for i in range(starts[row], starts[row + 1]):
            _step(arrays, text, copying, edits.replacements[key], True, tokens[i])
        if copying.source == NONE or copying.num_change:
            source, length = source_of(arrays, text)
            if length >= _MIN_MATCH:
                _begin(copying, source, length)
                copying.end = text.length - length
    return NONE


def look_up(
    arrays: Arrays, contexts: Records, edits: Edits, scratch: Records, queries: Queries, found: Found, evidence: Records
) -> int:  # fmt: skip
    """Answer all queries; see `EditRetriever`. Returns the row of an unknown key, or NONE.

    scratch: COPYING [1], to be tried on tokens that are not committed.
    """
    unknown = unknown_row(edits.requests, queries.keys)
    if unknown != NONE:
        return unknown
    for row in range(queries.keys.size):
        key = queries.keys[row]
        found.lengths[row] = 0
        if queries.max_tokens[row] <= 0:
            continue
        copying = edits.requests[key]
        if contexts[key].slot == NONE or copying.source == NONE:
            continue
        text, tail = arrays.automata[contexts[key].slot], queries.tails[row, : queries.tail_lengths[row]]
        if _is_plain_behind(arrays, text, copying, tail):
            continue
        if tail.size:
            scratch[0] = copying
            copying = scratch[0]
            for i in range(tail.size):
                _step(arrays, text, copying, edits.replacements[key], False, tail[i])
            if copying.source == NONE:
                continue
        max_tokens = min(queries.max_tokens[row], found.tokens.shape[1])
        found.lengths[row] = _ahead(arrays, text, copying, edits.replacements[key], row, max_tokens, found, evidence)
    return NONE


class EditSteps(NamedTuple):
    extend: Callable[[Arrays, Records, Edits, Ints, Tokens, Ints], int]
    lookup: Callable[[Arrays, Records, Edits, Records, Queries, Found, Any], int]


@functools.cache
def edit_steps() -> EditSteps:
    """The compiled functions; compiles them, or loads what an earlier process compiled, once."""
    arrays, contexts, edits, tokens = Arena(0).arrays, np.zeros(0, CONTEXT), Edits.empty(0), np.zeros(0, np.int32)
    return EditSteps(
        machine_code(extend, arrays, contexts, edits, tokens, tokens, tokens, counts_references=False),
        machine_code(look_up, arrays, contexts, edits, np.zeros(0, COPYING), *EXAMPLES, counts_references=False),
    )
