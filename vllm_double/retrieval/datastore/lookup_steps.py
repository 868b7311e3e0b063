"""The compiled lookup of a datastore: functions on the sections that `file` describes.

Sections come from a file of which only the header is checked: every index that is read from one is tested
before it is used, and no loop's length depends on what is read. An answer ends before what is missing: see `block_steps`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_double.jit import machine_code, view_part
from vllm_double.retrieval.array_source import EXAMPLES
from vllm_double.retrieval.base import Found, Queries, Tokens
from vllm_double.retrieval.datastore.block_steps import READING, Blocks, byte_at, int_at, long_at
from vllm_double.retrieval.suffix_automaton.arena import Ints, Records
from vllm_double.retrieval.suffix_automaton.automaton_steps import Record, note, unknown_row

Bytes = npt.NDArray[np.uint8]
Longs = npt.NDArray[np.int64]

# Intervals of more entries than this are nodes; smaller ones are counted as they are looked up.
SCAN = 32
NODE = np.dtype([(name, "<i4") for name in ("first", "stop", "depth", "parent", "token", "count", "successor")])
"""Entries [first, stop), all of which share ``depth`` tokens of context; the next larger node around them; the most frequent
token behind them with its count, and an entry whose context is longer by that token."""
_FIRST, _STOP, _DEPTH, _PARENT, _TOKEN, _COUNT, _SUCCESSOR = range(7)
_NUM_FIELDS = 7
NONE = -1
# Contexts are shorter than this, so nodes are nested less deeply.
MAX_DEPTH = 256

REQUEST = np.dtype([("live", np.bool_), ("length", np.int32)], align=True)
"""``length``: tokens held of the end of its text."""
CHOICE = np.dtype([("file", np.int32), ("match_length", np.int32), ("total", np.int32)])
"""The file that answers a query."""


class Sections(NamedTuple):
    """The arrays of a file, see `datastore.file`."""

    tokens: Ints
    starts: Ints
    samples: Longs
    order: Ints
    followers: Ints
    successors: Ints
    shared: Bytes
    anchors: Ints
    nodes: Records


SECTION_DTYPES: tuple[npt.DTypeLike, ...] = ("<i4", "<i4", "<i8", "<i4", "<i4", "<i4", "u1", "<i4", NODE)
_TOKENS, _STARTS, _SAMPLES, _ORDER, _FOLLOWERS, _SUCCESSORS, _SHARED, _ANCHORS, _NODES = range(len(SECTION_DTYPES))


class Texts(NamedTuple):
    """The ends of texts by key."""

    requests: Records
    """REQUEST [keys]"""
    recent: Ints
    """[keys, any width]: of each text the last ``max_match`` tokens at least"""


@view_part
def bits_of(vocab_size: int) -> int:
    """Bits of a token id plus one."""
    bits = 1
    while vocab_size >> bits:
        bits += 1
    return bits


@view_part
def _first_behind(file: Blocks, key: int, is_behind_equals: bool, low: int, high: int) -> int:
    """The first in [low, high) of the rising samples that is the key or more, or more than it; high: none."""
    while low < high:
        middle = (low + high) // 2
        sample = long_at(file, _SAMPLES, middle)
        if sample < key or (is_behind_equals and sample == key):
            low = middle + 1
        else:
            high = middle
    return low


@view_part
def _narrow(file: Blocks, key: int, first: int, stop: int) -> tuple[int, int]:
    """The part of [first, stop) in which the samples leave open whether an entry is before a context with this key."""
    high = min((stop + SCAN - 1) // SCAN, file.lengths[_SAMPLES])
    low = _first_behind(file, key, False, (first + SCAN - 1) // SCAN, high)
    after = _first_behind(file, key, True, low, high)
    return max(first, (low - 1) * SCAN + 1), min(stop, after * SCAN)


@view_part
def _common(file: Blocks, position: int, context: Ints, end: int, limit: int, length: int) -> int:
    """How many tokens, at most limit, the end of context[:end] shares with those before position: ``length`` or more."""
    index = position - 1 - length
    while length < limit and 0 <= index < file.lengths[_TOKENS] and int_at(file, _TOKENS, index) == context[end - 1 - length]:
        length += 1
        index -= 1
    return length


@view_part
def _search(file: Blocks, context: Ints, end: int, max_match: int) -> tuple[int, int]:
    """(entry, length): an entry that shares most tokens with the end of context[:end]; length 0: there is none."""
    vocab_size = file.lengths[_STARTS] - 1
    limit = 0
    while limit < min(end, max_match) and 0 <= context[end - 1 - limit] < vocab_size:
        limit += 1
    if limit == 0:
        return 0, 0
    first, stop = int_at(file, _STARTS, context[end - 1]), int_at(file, _STARTS, context[end - 1] + 1)
    if not 0 <= first < stop <= file.lengths[_ORDER]:
        return 0, 0
    bits = bits_of(vocab_size)
    key = 0
    for i in range(63 // bits):
        key = key << bits | (int(context[end - 1 - i]) + 1 if i < limit else 0)
    low, high = _narrow(file, key, first, stop)
    # Tokens shared with the entry before low, and with the entry high: those in between share the smaller number at least.
    below, above = 1, 1
    while low < high:
        middle = (low + high) // 2
        length = _common(file, int_at(file, _ORDER, middle), context, end, limit, min(below, above))
        index = int_at(file, _ORDER, middle) - 1 - length
        if length == limit:
            return middle, limit
        if 0 <= index < file.lengths[_TOKENS] and int_at(file, _TOKENS, index) > context[end - 1 - length]:
            high, above = middle, length
        else:
            low, below = middle + 1, length
    # The samples told only on which side those are that were not compared.
    below = _common(file, int_at(file, _ORDER, low - 1), context, end, limit, below) if low > first else 0
    above = _common(file, int_at(file, _ORDER, low), context, end, limit, above) if low < stop else 0
    return (low - 1, below) if below > above else (low, above)


@view_part
def _around(file: Blocks, entry: int, length: int) -> tuple[int, int]:
    """The entries [first, stop) that share ``length`` tokens with this one; if more than SCAN do, more than SCAN of them."""
    first = entry
    while first > 0 and entry - first < SCAN and byte_at(file, _SHARED, first) >= length:
        first -= 1
    stop = entry + 1
    while stop < file.lengths[_SHARED] and stop - entry <= SCAN and byte_at(file, _SHARED, stop) >= length:
        stop += 1
    return first, stop


@view_part
def _tally(file: Blocks, first: int, stop: int) -> tuple[int, int, int, int]:
    """(token, count, total, successor) of the most frequent follower of these entries."""
    # Most often one is the majority, which two passes find: Boyer and Moore 1981, "MJRTY".
    token, lead = NONE, 0
    for i in range(first, stop):
        if lead == 0:
            token = int_at(file, _FOLLOWERS, i)
        lead += 1 if int_at(file, _FOLLOWERS, i) == token else -1
    count, successor = 0, NONE
    for i in range(first, stop):
        if int_at(file, _FOLLOWERS, i) == token:
            count += 1
            successor = max(successor, int_at(file, _SUCCESSORS, i))
    if 2 * count > stop - first:
        return token, count, stop - first, successor
    token, count, successor = NONE, 0, NONE
    for i in range(first, stop):
        follower = int_at(file, _FOLLOWERS, i)
        times, behind = 0, NONE
        # A follower that was counted already gets fewer now.
        for j in range(i, stop):
            if int_at(file, _FOLLOWERS, j) == follower:
                times += 1
                behind = max(behind, int_at(file, _SUCCESSORS, j))
        if times > count or (times == count and follower < token):
            token, count, successor = follower, times, behind
    return token, count, stop - first, successor


@view_part
def _node(file: Blocks, node: int, field: int) -> int:
    return int_at(file, _NODES, node * _NUM_FIELDS + field)


@view_part
def _recall(file: Blocks, entry: int, length: int) -> tuple[int, int, int, int]:
    """(token, count, total, successor) of the node around an entry that is a multiple of SCAN; token NONE: no such node."""
    node = int_at(file, _ANCHORS, entry // SCAN) if entry // SCAN < file.lengths[_ANCHORS] else NONE
    if not 0 <= node < file.lengths[_NODES]:
        return NONE, 0, 0, NONE
    for _ in range(MAX_DEPTH):
        parent = _node(file, node, _PARENT)
        if not 0 <= parent < file.lengths[_NODES] or _node(file, parent, _DEPTH) < length:
            break
        node = parent
    total = _node(file, node, _STOP) - _node(file, node, _FIRST)
    if _node(file, node, _DEPTH) < length or not 1 <= _node(file, node, _COUNT) <= total:
        return NONE, 0, 0, NONE
    return _node(file, node, _TOKEN), _node(file, node, _COUNT), total, _node(file, node, _SUCCESSOR)


@view_part
def _continue(
    file: Blocks, context: Ints, num_context: int, max_match: int, row: int, max_tokens: int, found: Found,
    evidence: Records, choice: Record,
) -> int:  # fmt: skip
    """Fill a row of the answer with what follows context[:num_context], behind which there is room; how many tokens."""
    entry, length = _search(file, context, num_context, max_match)
    match_length, num_found, doubt = length, 0, 1.0
    while num_found < max_tokens and length >= max(match_length, 1):
        first, stop = _around(file, entry, length)
        if stop - first <= SCAN:
            token, count, total, successor = _tally(file, first, stop)
        else:
            token, count, total, successor = _recall(file, (first + SCAN - 1) // SCAN * SCAN, length)
        if file.reading[0].is_missing or not 0 <= token < file.lengths[_STARTS] - 1 or total > file.lengths[_ORDER]:
            break  # or a damaged file
        if num_found == 0:
            choice.match_length = match_length
            choice.total = total
        doubt = note(row, num_found, token, match_length, count, total, doubt, found.tokens, found.beliefs, evidence)
        context[num_context + num_found] = token
        num_found += 1
        if 0 <= successor < file.lengths[_ORDER]:
            # The context grew by one. A longer one does not occur: without its last token it would have before.
            entry, length = successor, min(length + 1, max_match)
        elif num_found < max_tokens:
            # The grown context occurs at the end of documents only.
            entry, length = _search(file, context, num_context + num_found, max_match)
    return num_found


def _lookup(
    file: Blocks, max_match: int, number: int, is_probe: bool, texts: Texts, context: Ints, choices: Records,
    queries: Queries, found: Found, evidence: Records,
) -> int:  # fmt: skip
    """Answer the queries that are to be answered from file ``number``: all, if it is the only one. Probe: find out which are.

    context has room for the end of a text, a tail and an answer. Returns the row of an unknown key, or NONE.
    """
    unknown = unknown_row(texts.requests, queries.keys)
    if unknown != NONE:
        return unknown
    for row in range(queries.keys.size):
        key = queries.keys[row]
        choice = choices[row]
        if not is_probe and choice.file != number:
            continue
        end, num_context = texts.requests[key].length, 0
        for i in range(max(0, end - max_match), end):
            context[num_context] = texts.recent[key, i]
            num_context += 1
        for i in range(queries.tail_lengths[row]):
            context[num_context] = queries.tails[row, i]
            num_context += 1
        max_tokens = min(queries.max_tokens[row], found.tokens.shape[1])
        match_length, total = choice.match_length, choice.total
        file.reading[0].is_missing = False
        if is_probe:
            choice.match_length = 0
            choice.total = 0
            _continue(file, context, num_context, max_match, row, min(max_tokens, 1), found, evidence, choice)
            if (choice.match_length, choice.total) > (match_length, total):
                choice.file = number
            else:
                choice.match_length = match_length
                choice.total = total
        else:
            found.lengths[row] = _continue(
                file, context, num_context, max_match, row, max_tokens, found, evidence, choice
            )  # fmt: skip
    return NONE


def _extend(texts: Texts, max_match: int, keys: Ints, tokens: Tokens, starts: Ints) -> int:
    """Append to texts. Returns the row of an unknown key, or NONE."""
    unknown = unknown_row(texts.requests, keys)
    if unknown != NONE:
        return unknown
    for row in range(keys.size):
        request, recent = texts.requests[keys[row]], texts.recent[keys[row]]
        first, stop = max(starts[row], starts[row + 1] - max_match), starts[row + 1]
        if request.length + stop - first > recent.size:
            num_kept = min(request.length, max_match)
            for i in range(num_kept):
                recent[i] = recent[request.length - num_kept + i]
            request.length = num_kept
        for i in range(first, stop):
            recent[request.length] = tokens[i]
            request.length += 1
    return NONE


class LookupSteps(NamedTuple):
    lookup: Callable[[Blocks, int, int, bool, Texts, Ints, Records, Queries, Found, Records], int]
    extend: Callable[[Texts, int, Ints, Tokens, Ints], int]


@functools.cache
def lookup_steps() -> LookupSteps:
    """The compiled functions; compiles them, or loads what an earlier process compiled, once."""
    ints, texts = np.zeros(0, np.int32), Texts(np.zeros(0, REQUEST), np.zeros((0, 0), np.int32))
    longs, table = np.zeros(0, np.int64), np.zeros((0, 0), np.int64)
    file = Blocks(np.zeros(0, READING), longs, table.view(np.uint8), table.view(np.int32), table, longs, longs, longs)
    return LookupSteps(
        machine_code(_lookup, file, 0, 0, True, texts, ints, np.zeros(0, CHOICE), *EXAMPLES, counts_references=False),
        machine_code(_extend, texts, 0, ints, ints, ints, counts_references=False),
    )
