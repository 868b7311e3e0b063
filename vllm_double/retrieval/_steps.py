"""Steps of the suffix automaton: compiled functions on the arrays that `automaton` describes."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from vllm_double.jit import compiled, of_numbers, part, pointer

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]
Header = npt.NDArray[np.int64]

# Columns of a state (32 bytes). NONE marks an absent link, transition or best.
LENGTH, LINK, COUNT, END, BEST, TOKEN, FIRST, EDGES = range(8)
# Columns of a transition (16 bytes): EDGES starts a state's list, NEXT_EDGE continues it.
SOURCE, LABEL, TARGET, NEXT_EDGE = range(4)
# Entries of the header. The addresses are those of the arrays, which saves unpacking them in every call.
NUM_STATES, NUM_EDGES, WINDOW, WINDOW_LENGTH, NUM_TOKENS, MAX_MATCH, CAPACITY, STATES_AT, EDGES_AT, TABLE_AT = range(10)
HEADER_LENGTH = TABLE_AT + 1
ROOT = 0
NONE = -1
# The last token of a document: contexts do not reach across it, and nothing is continued with it.
SEPARATOR = 2**31 - 1
MAX_CONTINUATION = 1024
"""Most tokens that one lookup returns."""


@part
def _arrays(header: Header) -> tuple[Ints, Ints, Ints]:
    """States, transitions and table that a header leads to."""
    capacity = header[CAPACITY]
    return (
        numba.carray(pointer(header[STATES_AT]), (2 * capacity, 8), np.int32),
        numba.carray(pointer(header[EDGES_AT]), (capacity, 4), np.int32),
        numba.carray(pointer(header[TABLE_AT]), (2 * capacity,), np.int32),
    )


@part
def _outputs(out_at: int, max_tokens: int) -> tuple[Floats, Ints]:
    """What a lookup fills at an address: float64 [n] of beliefs, and int32 [n, 3] of tokens, counts and totals behind them."""
    return (
        numba.carray(pointer(out_at), (max_tokens,), np.float64),
        numba.carray(pointer(out_at + 8 * MAX_CONTINUATION), (max_tokens, 3), np.int32),
    )


@part
def _believe(beliefs: Floats, out: Ints, num_found: int, match_length: int) -> None:
    """As `base.beliefs`."""
    doubt = 0.5 ** (match_length / 2)
    for i in range(num_found):
        beliefs[i] = (1.0 - doubt) * out[i, 1] / (out[i, 2] + 0.1)
        doubt *= math.sqrt(0.5)


@part
def _slot(edges: Ints, table: Ints, state: int, token: int) -> int:
    """The table slot of a transition, or the empty one where it belongs."""
    mask = table.size - 1
    mixed = np.uint64(state) * np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(token) * np.uint64(0xD6E8FEB86659FD93)
    slot = np.int64((mixed ^ (mixed >> np.uint64(32))) & np.uint64(mask))
    while True:
        edge = table[slot] - 1
        if edge < 0 or (edges[edge, SOURCE] == state and edges[edge, LABEL] == token):
            return slot  # type: ignore[return-value]
        slot = (slot + 1) & mask


@part
def _find(states: Ints, edges: Ints, table: Ints, state: int, token: int) -> int:
    """The state that ``token`` leads to, or NONE."""
    first = states[state, FIRST]
    if first == NONE or states[first, TOKEN] == token:
        return first  # type: ignore[no-any-return]
    if states[state, EDGES] == NONE:
        return NONE
    edge = table[_slot(edges, table, state, token)] - 1
    return edges[edge, TARGET] if edge >= 0 else NONE


@part
def _connect(header: Header, states: Ints, edges: Ints, table: Ints, state: int, token: int, target: int) -> None:
    """Add a transition, or give the one that is there another target, whose TOKEN is set already."""
    first = states[state, FIRST]
    if first == NONE or states[first, TOKEN] == token:
        states[state, FIRST] = target
        return
    slot = _slot(edges, table, state, token)
    edge = table[slot] - 1
    if edge < 0:
        edge = header[NUM_EDGES]
        header[NUM_EDGES] += 1
        edges[edge, SOURCE] = state
        edges[edge, LABEL] = token
        edges[edge, NEXT_EDGE] = states[state, EDGES]
        states[state, EDGES] = edge
        table[slot] = edge + 1
    edges[edge, TARGET] = target


@part
def _split(header: Header, states: Ints, edges: Ints, table: Ints, parent: int, token: int) -> int:
    """Give the substrings of parent + token a state of their own: they now end where longer ones don't."""
    whole = _find(states, edges, table, parent, token)
    part = header[NUM_STATES]
    header[NUM_STATES] += 1
    for column in range(8):
        states[part, column] = states[whole, column]
    states[part, LENGTH] = states[parent, LENGTH] + 1
    states[part, EDGES] = NONE
    edge = states[whole, EDGES]
    while edge != NONE:
        _connect(header, states, edges, table, part, edges[edge, LABEL], edges[edge, TARGET])
        edge = edges[edge, NEXT_EDGE]
    while parent != NONE and _find(states, edges, table, parent, token) == whole:
        _connect(header, states, edges, table, parent, token, part)
        parent = states[parent, LINK]
    states[whole, LINK] = part
    return part  # type: ignore[no-any-return]


@part
def _clamp(states: Ints, state: int, length: int) -> int:
    """The state of the last ``length`` tokens of a substring that ``state`` holds."""
    while state != ROOT and states[states[state, LINK], LENGTH] >= length:
        state = states[state, LINK]
    return state


@part
def _insert(header: Header, states: Ints, edges: Ints, table: Ints, parent: int, token: int) -> int:
    """States, links and transitions for window + token, which is new; ``parent`` is the window's state."""
    new = header[NUM_STATES]
    header[NUM_STATES] += 1
    states[new, LENGTH] = header[WINDOW_LENGTH] + 1
    states[new, COUNT] = 0
    states[new, BEST] = NONE
    states[new, TOKEN] = token
    states[new, FIRST] = NONE
    states[new, EDGES] = NONE
    found = NONE
    while parent != NONE:
        found = _find(states, edges, table, parent, token)
        if found != NONE:
            break
        _connect(header, states, edges, table, parent, token, new)
        parent = states[parent, LINK]
    if parent == NONE:
        found = ROOT
    elif states[found, LENGTH] != states[parent, LENGTH] + 1:
        found = _split(header, states, edges, table, parent, token)
    states[new, LINK] = found
    return new  # type: ignore[no-any-return]


@part
def _append(header: Header, states: Ints, edges: Ints, table: Ints, token: int) -> None:
    """One more token, and one more occurrence of all that ends with it."""
    length, max_match = header[WINDOW_LENGTH], header[MAX_MATCH]
    context = header[WINDOW]
    top = _find(states, edges, table, context, token)
    if top == NONE:
        top = _insert(header, states, edges, table, context, token)
    elif states[top, LENGTH] > length + 1:
        # Near a document's beginning: what was seen with more before it now occurs without.
        top = _split(header, states, edges, table, context, token)
    header[NUM_TOKENS] += 1
    header[WINDOW_LENGTH] = min(length + 1, max_match)
    header[WINDOW] = top if length < max_match else _clamp(states, top, max_match)
    followed = top
    while followed != ROOT:
        states[followed, COUNT] += 1
        states[followed, END] = header[NUM_TOKENS]
        followed = states[followed, LINK]
    # A split of the window's own state leaves its longer part in ``context``: too long for a context, so its
    # BEST is never read. All that led to a split state gain here, so no BEST stays with the longer part.
    followed = top
    while context != ROOT:
        followed = _clamp(states, followed, length + 1)
        best = states[context, BEST]
        # >= : of equally frequent tokens the one seen last.
        if best == NONE or states[followed, COUNT] >= states[best, COUNT]:
            states[context, BEST] = followed
        context = states[context, LINK]
        length = states[context, LENGTH]


def _extend(header_at: int, text_at: int, start: int, stop: int) -> None:
    """Append text[start:stop]; behind a separator a new document begins.

    Here and below arrays come as addresses: to take one over from Python costs as much as all the rest of a short call.
    """
    header = numba.carray(pointer(header_at), (HEADER_LENGTH,), np.int64)
    text = numba.carray(pointer(text_at), (stop,), np.int32)
    states, edges, table = _arrays(header)
    for position in range(start, stop):
        _append(header, states, edges, table, text[position])
        if text[position] == SEPARATOR:
            header[WINDOW], header[WINDOW_LENGTH] = ROOT, 0


@part
def _advance(states: Ints, edges: Ints, table: Ints, state: int, length: int, token: int, max_match: int) -> tuple[int, int]:
    """The longest suffix of (what ``state`` holds with ``length`` tokens) + token that occurs: its state and length."""
    target = _find(states, edges, table, state, token)
    while target == NONE and state != ROOT:
        state = states[state, LINK]
        length = states[state, LENGTH]
        target = _find(states, edges, table, state, token)
    if target == NONE:
        return state, length
    # What a transition leads to holds each context of its state, and the token: a look at its link is a look far away.
    return (target, length + 1) if length < max_match else (_clamp(states, target, max_match), max_match)


@part
def _followed(states: Ints, state: int, length: int) -> tuple[int, int]:
    """The longest suffix that occurs with a token behind it."""
    while state != ROOT and states[state, BEST] == NONE:
        state = states[state, LINK]
        length = states[state, LENGTH]
    return state, length


@part
def _continue(header: Header, states: Ints, state: int, length: int, out_at: int, max_tokens: int) -> tuple[int, int]:
    """Fill `_outputs` with token, count and total of each step behind a context: (tokens found, match length)."""
    beliefs, out = _outputs(out_at, max_tokens)
    num_tokens, max_match = header[NUM_TOKENS], header[MAX_MATCH]
    match_length, num_found = 0, 0
    while num_found < max_tokens:
        state, length = _followed(states, state, length)
        if state == ROOT or length < match_length:
            break
        best = states[state, BEST]
        if states[best, TOKEN] == SEPARATOR:
            break
        if num_found == 0:
            match_length = length
        out[num_found, 0] = states[best, TOKEN]
        out[num_found, 1] = states[best, COUNT]
        # The occurrence at the very end of the text has no token behind it.
        out[num_found, 2] = states[state, COUNT] - (states[state, END] == num_tokens)
        num_found += 1
        if length < max_match:
            state, length = best, length + 1
        else:
            state = _clamp(states, best, max_match)
    _believe(beliefs, out, num_found, match_length)
    return num_found, match_length


def _lookup(header_at: int, feed_at: int, num_feed: int, from_window: bool, out_at: int, max_tokens: int) -> tuple[int, int]:
    """Match feed[:num_feed], behind the window or on its own, and continue it: see `_continue`."""
    header = numba.carray(pointer(header_at), (HEADER_LENGTH,), np.int64)
    feed = numba.carray(pointer(feed_at), (num_feed,), np.int32)
    states, edges, table = _arrays(header)
    state = header[WINDOW] if from_window else ROOT
    length = header[WINDOW_LENGTH] if from_window else 0
    for i in range(num_feed):
        state, length = _advance(states, edges, table, state, length, feed[i], header[MAX_MATCH])
    return _continue(header, states, state, length, out_at, max_tokens)


def _source(header_at: int) -> tuple[int, int]:
    """Where the latest occurrence of a lookup's first token is, and the length of its context; (-1, 0): nowhere."""
    header = numba.carray(pointer(header_at), (HEADER_LENGTH,), np.int64)
    states = _arrays(header)[0]
    state, length = _followed(states, header[WINDOW], header[WINDOW_LENGTH])
    if state == ROOT:
        return -1, 0
    return states[states[state, BEST], END] - 1, length


def _recall(
    num_automata: int, headers_at: int, cursors_at: int, feed_at: int, num_kept: int, num_feed: int, out_at: int,
    max_tokens: int,
) -> tuple[int, int]:  # fmt: skip
    """Match behind the cursors of several automata, headers and cursors int64 [n, ...], newest first; continue the longest.

    A cursor is a state and a length. feed[:num_kept] moves the cursors, feed[num_kept:num_feed] does not.
    """
    headers = numba.carray(pointer(headers_at), (num_automata, HEADER_LENGTH), np.int64)
    cursors = numba.carray(pointer(cursors_at), (num_automata, 2), np.int64)
    feed = numba.carray(pointer(feed_at), (num_feed,), np.int32)
    newest, best_length, best_state = 0, 0, ROOT
    for n in range(num_automata):
        states, edges, table = _arrays(headers[n])
        state, length = cursors[n, 0], cursors[n, 1]
        for i in range(num_feed):
            state, length = _advance(states, edges, table, state, length, feed[i], headers[n, MAX_MATCH])
            if i == num_kept - 1:
                cursors[n, 0], cursors[n, 1] = state, length
        state, length = _followed(states, state, length)
        if length > best_length:
            newest, best_length, best_state = n, length, state
    if best_length == 0:
        return 0, 0
    states = _arrays(headers[newest])[0]
    return _continue(headers[newest], states, best_state, best_length, out_at, max_tokens)


def _rehash(header: Header) -> None:
    """Fill an empty table."""
    _, edges, table = _arrays(header)
    for edge in range(header[NUM_EDGES]):
        table[_slot(edges, table, edges[edge, SOURCE], edges[edge, LABEL])] = edge + 1


class Steps(NamedTuple):
    extend: Callable[..., None]
    lookup: Callable[..., tuple[int, int]]
    source: Callable[[int], tuple[int, int]]
    recall: Callable[..., tuple[int, int]]
    rehash: Callable[..., None]


@functools.cache
def steps() -> Steps:
    """The compiled functions; compiles them, or loads what an earlier process compiled, once."""
    return Steps(
        of_numbers(_extend, 4, "void"),
        of_numbers(_lookup, 6),
        of_numbers(_source, 1),
        of_numbers(_recall, 8),
        compiled(_rehash, "void(int64[::1])"),
    )
