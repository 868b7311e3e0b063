"""The compiled lookup of a datastore: functions on the sections that `datastore` describes.

Sections come from a file of which only the header is checked: every index that is read from one is tested
before it is used, and no loop's length depends on what is read.
"""

import functools
from collections.abc import Callable

import numba
import numpy as np
import numpy.typing as npt

from vllm_double.jit import of_numbers, part, pointer
from vllm_double.retrieval._steps import _believe, _outputs

Ints = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]
Longs = npt.NDArray[np.int64]

# Sections in the order of the file.
TOKENS, STARTS, SAMPLES, ORDER, FOLLOWERS, SUCCESSORS, SHARED, ANCHORS, NODES = range(9)

# Intervals of more entries than this are nodes; smaller ones are counted as they are looked up.
SCAN = 32
# Columns of a node: its entries [FIRST, STOP), all of which share DEPTH tokens of context; the next larger node around it;
# the most frequent token behind it with its COUNT, and an entry whose context is longer by that token.
FIRST, STOP, DEPTH, PARENT, TOKEN, COUNT, SUCCESSOR = range(7)
NUM_COLUMNS = 7
NONE = -1
# Contexts are shorter than this, so nodes are nested less deeply.
MAX_DEPTH = 256


@part
def _bits(vocab_size: int) -> int:
    """Bits of a token id plus one."""
    bits = 1
    while vocab_size >> bits:
        bits += 1
    return bits


@part
def _narrow(samples: Longs, key: int, first: int, stop: int) -> tuple[int, int]:
    """The part of [first, stop) in which the samples leave open whether an entry is before a context with this key."""
    low, high = (first + SCAN - 1) // SCAN, min((stop + SCAN - 1) // SCAN, samples.size)
    while low < high:
        middle = (low + high) // 2
        if samples[middle] < key:
            low = middle + 1
        else:
            high = middle
    after = low
    high = min((stop + SCAN - 1) // SCAN, samples.size)
    while after < high:
        middle = (after + high) // 2
        if samples[middle] <= key:
            after = middle + 1
        else:
            high = middle
    return max(first, (low - 1) * SCAN + 1), min(stop, after * SCAN)


@part
def _common(tokens: Ints, position: int, context: Ints, end: int, limit: int, length: int) -> int:
    """How many tokens, at most limit, the end of context[:end] shares with those before position: ``length`` or more."""
    index = position - 1 - length
    while length < limit and 0 <= index < tokens.size and tokens[index] == context[end - 1 - length]:
        length += 1
        index -= 1
    return length


@part
def _search(
    tokens: Ints, starts: Ints, samples: Longs, order: Ints, context: Ints, end: int, max_match: int
) -> tuple[int, int]:
    """(entry, length): an entry that shares most tokens with the end of context[:end]; length 0: there is none."""
    vocab_size = starts.size - 1
    limit = 0
    while limit < min(end, max_match) and 0 <= context[end - 1 - limit] < vocab_size:
        limit += 1
    if limit == 0:
        return 0, 0
    first, stop = int(starts[context[end - 1]]), int(starts[context[end - 1] + 1])
    if not 0 <= first < stop <= order.size:
        return 0, 0
    bits = _bits(vocab_size)
    key = 0
    for i in range(63 // bits):
        key = key << bits | (int(context[end - 1 - i]) + 1 if i < limit else 0)
    low, high = _narrow(samples, key, first, stop)
    # Tokens shared with the entry before low, and with the entry high: those in between share the smaller number at least.
    below, above = 1, 1
    while low < high:
        middle = (low + high) // 2
        length = _common(tokens, order[middle], context, end, limit, min(below, above))
        index = order[middle] - 1 - length
        if length == limit:
            return middle, limit
        if 0 <= index < tokens.size and tokens[index] > context[end - 1 - length]:
            high, above = middle, length
        else:
            low, below = middle + 1, length
    # The samples told only on which side those are that were not compared.
    below = _common(tokens, order[low - 1], context, end, limit, below) if low > first else 0
    above = _common(tokens, order[low], context, end, limit, above) if low < stop else 0
    return (low - 1, below) if below > above else (low, above)


@part
def _around(shared: Bytes, entry: int, length: int) -> tuple[int, int]:
    """The entries [first, stop) that share ``length`` tokens with this one; if more than SCAN do, more than SCAN of them."""
    first = entry
    while first > 0 and entry - first < SCAN and shared[first] >= length:
        first -= 1
    stop = entry + 1
    while stop < shared.size and stop - entry <= SCAN and shared[stop] >= length:
        stop += 1
    return first, stop


@part
def _tally(followers: Ints, successors: Ints, first: int, stop: int) -> tuple[int, int, int, int]:
    """(token, count, total, successor) of the most frequent follower of these entries."""
    # Most often one is the majority, which two passes find: Boyer and Moore 1981, "MJRTY".
    token, lead = NONE, 0
    for i in range(first, stop):
        if lead == 0:
            token = followers[i]
        lead += 1 if followers[i] == token else -1
    count, successor = 0, NONE
    for i in range(first, stop):
        if followers[i] == token:
            count += 1
            successor = max(successor, successors[i])
    if 2 * count > stop - first:
        return token, count, stop - first, successor
    token, count, successor = NONE, 0, NONE
    for i in range(first, stop):
        follower = followers[i]
        times, behind = 0, NONE
        # A follower that was counted already gets fewer now.
        for j in range(i, stop):
            if followers[j] == follower:
                times += 1
                behind = max(behind, successors[j])
        if times > count or (times == count and follower < token):
            token, count, successor = follower, times, behind
    return token, count, stop - first, successor


@part
def _recall(anchors: Ints, nodes: Ints, entry: int, length: int) -> tuple[int, int, int, int]:
    """(token, count, total, successor) of the node around an entry that is a multiple of SCAN; token NONE: no such node."""
    node = anchors[entry // SCAN] if entry // SCAN < anchors.size else NONE
    if not 0 <= node < len(nodes):
        return NONE, 0, 0, NONE
    for _ in range(MAX_DEPTH):
        parent = nodes[node, PARENT]
        if not 0 <= parent < len(nodes) or nodes[parent, DEPTH] < length:
            break
        node = parent
    total = np.int64(nodes[node, STOP]) - nodes[node, FIRST]
    if nodes[node, DEPTH] < length or not 1 <= nodes[node, COUNT] <= total:
        return NONE, 0, 0, NONE
    return nodes[node, TOKEN], nodes[node, COUNT], total, nodes[node, SUCCESSOR]


@part
def _section(file: Ints, places: Longs, section: int) -> Ints:
    return file[places[section, 0] // 4 : places[section, 1] // 4]


def _lookup(
    file_at: int,
    num_words: int,
    places_at: int,
    context_at: int,
    num_context: int,
    max_match: int,
    out_at: int,
    max_tokens: int,
) -> tuple[int, int]:
    """Continue context[:num_context], which has room for ``max_tokens`` more; fill `_outputs`.

    Arrays come as addresses: to take one over from Python costs much of a short call. ``places``, int64 [sections, 2], has
    first and last byte of each section. Returns (tokens found, match length).
    """
    file = numba.carray(pointer(file_at), (num_words,), np.int32)
    places = numba.carray(pointer(places_at), (NODES + 1, 2), np.int64)
    context = numba.carray(pointer(context_at), (num_context + max_tokens,), np.int32)
    beliefs, out = _outputs(out_at, max_tokens)
    tokens = _section(file, places, TOKENS)
    starts = _section(file, places, STARTS)
    samples = file.view(np.uint8)[places[SAMPLES, 0] : places[SAMPLES, 1]].view(np.int64)
    order = _section(file, places, ORDER)
    followers = _section(file, places, FOLLOWERS)
    successors = _section(file, places, SUCCESSORS)
    shared = file.view(np.uint8)[places[SHARED, 0] : places[SHARED, 1]]
    anchors = _section(file, places, ANCHORS)
    nodes = _section(file, places, NODES).reshape((-1, NUM_COLUMNS))
    entry, length = _search(tokens, starts, samples, order, context, num_context, max_match)
    match_length, num_found = length, 0
    while num_found < max_tokens and length >= max(match_length, 1):
        first, stop = _around(shared, entry, length)
        if stop - first <= SCAN:
            token, count, total, successor = _tally(followers, successors, first, stop)
        else:
            token, count, total, successor = _recall(anchors, nodes, (first + SCAN - 1) // SCAN * SCAN, length)
        if not 0 <= token < starts.size - 1 or total > order.size:
            break  # a damaged file
        out[num_found, 0], out[num_found, 1], out[num_found, 2] = token, count, total
        context[num_context + num_found] = token
        num_found += 1
        if 0 <= successor < order.size:
            # The context grew by one. A longer one does not occur: without its last token it would have before.
            entry, length = successor, min(length + 1, max_match)
        elif num_found < max_tokens:
            # The grown context occurs at the end of documents only.
            entry, length = _search(tokens, starts, samples, order, context, num_context + num_found, max_match)
    _believe(beliefs, out, num_found, match_length)
    return num_found, match_length


@functools.cache
def lookup_step() -> Callable[..., tuple[int, int]]:
    """The compiled lookup; compiles it, or loads what an earlier process compiled, once."""
    return of_numbers(_lookup, 8)
