"""The compiled steps of building a datastore: functions on the sections that `file` describes."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np

from vllm_double.jit import compiled, part
from vllm_double.retrieval.datastore.lookup_steps import MAX_DEPTH, NODE, NONE, SCAN, Bytes, Longs, bits_of
from vllm_double.retrieval.suffix_automaton.arena import Ints, Records
from vllm_double.retrieval.suffix_automaton.automaton_steps import Record


def _count_entries(tokens: Ints, counts: Ints) -> None:
    """Add to counts[t] the entries whose context ends with t."""
    for position in range(1, tokens.size):
        if tokens[position] >= 0 and tokens[position - 1] >= 0:
            counts[tokens[position - 1]] += 1


def _collect(tokens: Ints, low: int, high: int, positions: Ints) -> None:
    """Fill positions with the entries whose context ends with a token in [low, high), in text order."""
    found = 0
    for position in range(1, tokens.size):
        if tokens[position] >= 0 and low <= tokens[position - 1] < high:
            positions[found] = position
            found += 1


@part
def _key(tokens: Ints, position: int, depth: int, max_match: int, bits: int, num_tokens: int) -> int:
    """Tokens depth, depth + 1, ... before position, ``num_tokens`` of them in one number; 0 in the last place: the end."""
    key = np.int64(0)
    index = position - 1 - depth
    last = position - max_match
    for _ in range(num_tokens):
        key <<= bits
        if index >= last and tokens[index] >= 0:
            key |= tokens[index] + 1
            index -= 1
        else:
            last = position
    return key  # type: ignore[return-value]


@part
def _swap(positions: Ints, keys: Longs, i: int, j: int) -> None:
    positions[i], positions[j] = positions[j], positions[i]
    keys[i], keys[j] = keys[j], keys[i]


def _sort(tokens: Ints, positions: Ints, keys: Longs, max_match: int, vocab_size: int) -> None:
    """Sort positions by the tokens before them, nearest first, ``max_match`` of them at most.

    Multikey quicksort (Bentley and Sedgewick 1997) whose characters are as many tokens as fit into 63 bits.
    """
    bits = bits_of(vocab_size)
    num_tokens = 63 // bits
    end_mask = (1 << bits) - 1
    for i in range(positions.size):
        keys[i] = _key(tokens, positions[i], 0, max_match, bits, num_tokens)
    # The largest of three parts is sorted last. The others have half of the entries at most, so 31 levels of two can wait.
    stack = np.empty((3 + 2 * 31, 3), np.int64)
    parts = np.empty((3, 3), np.int64)
    stack[0] = 0, positions.size, 0
    waiting = 1
    while waiting:
        waiting -= 1
        start, stop, depth = stack[waiting]
        if stop - start < 2:
            continue
        a, b, c = keys[start], keys[(start + stop) // 2], keys[stop - 1]
        pivot = max(min(a, b), min(max(a, b), c))
        low, i, high = start, start, stop
        while i < high:
            if keys[i] < pivot:
                _swap(positions, keys, low, i)
                low += 1
                i += 1
            elif keys[i] > pivot:
                high -= 1
                _swap(positions, keys, i, high)
            else:
                i += 1
        middle = low
        if pivot & end_mask and high - low > 1:
            middle = high
            for i in range(low, high):
                keys[i] = _key(tokens, positions[i], depth + num_tokens, max_match, bits, num_tokens)
        parts[0] = start, low, depth
        parts[1] = low, middle, depth + num_tokens
        parts[2] = high, stop, depth
        largest = 0 if low - start >= max(middle - low, stop - high) else 1 if middle - low >= stop - high else 2
        for i in range(3):
            stack[waiting + i] = parts[(largest + i) % 3]
        waiting += 3


def _sample(tokens: Ints, positions: Ints, samples: Longs, max_match: int, vocab_size: int) -> None:
    """The nearest tokens before each position in one number."""
    bits = bits_of(vocab_size)
    for i in range(positions.size):
        samples[i] = _key(tokens, positions[i], 0, max_match, bits, 63 // bits)


def _describe(tokens: Ints, positions: Ints, before: int, followers: Ints, shared: Bytes, max_match: int) -> None:
    """Followers of sorted positions, and what each shares with the one before it; ``before`` precedes the first."""
    for i in range(positions.size):
        position = positions[i]
        followers[i] = tokens[position]
        length = 0
        while (
            length < max_match
            and tokens[position - 1 - length] >= 0
            and tokens[position - 1 - length] == tokens[before - 1 - length]
        ):
            length += 1
        shared[i] = length
        before = position


def _rank(order: Ints, low: int, ranks: Ints) -> None:
    """Number the positions from ``low`` on: ranks[order[i] - low] = i."""
    for i in range(order.size):
        if 0 <= order[i] - low < ranks.size:
            ranks[order[i] - low] = i


def _link(order: Ints, low: int, ranks: Ints, successors: Ints) -> None:
    """The entry of the next position, where that is numbered."""
    for i in range(order.size):
        if 0 <= order[i] + 1 - low < ranks.size:
            successors[i] = ranks[order[i] + 1 - low]


@part
def _tell(followers: Ints, successors: Ints, counts: Ints, node: Record) -> None:
    """Token, count and successor of a node; counts is all zero before and after."""
    token, count = NONE, 0
    for i in range(node.first, node.stop):
        follower = followers[i]
        counts[follower] += 1
        if counts[follower] > count or (counts[follower] == count and follower < token):
            token, count = follower, counts[follower]
    successor = NONE
    for i in range(node.first, node.stop):
        counts[followers[i]] = 0
        if followers[i] == token:
            successor = max(successor, successors[i])
    node.token = token
    node.count = count
    node.successor = successor


def _grow(followers: Ints, successors: Ints, shared: Bytes, counts: Ints, anchors: Ints, nodes: Records) -> int:
    """Fill nodes with the intervals of more than SCAN entries that share a token or more, and anchors; returns how many.

    Without room for nodes they are only counted. See Abouelhoda et al. 2004, "Replacing suffix trees with
    enhanced suffix arrays", for the stack.
    """
    depths, firsts = np.zeros(MAX_DEPTH + 1, np.int64), np.zeros(MAX_DEPTH + 1, np.int64)
    # Nodes inside of each interval on the stack, chained through ``parent`` until their parent has a number.
    inside = np.full(MAX_DEPTH + 1, NONE, np.int64)
    top, num_nodes = 0, 0
    for stop in range(1, shared.size + 1):
        length = shared[stop] if stop < shared.size else 0
        first, orphan = stop - 1, NONE
        while depths[top] > length:
            first, depth, child = firsts[top], depths[top], inside[top]
            top -= 1
            if stop - first <= SCAN:
                continue
            new = num_nodes
            num_nodes += 1
            if len(nodes) == 0:
                continue
            while child != NONE:
                following = nodes[child].parent
                nodes[child].parent = new
                child = following
            node = nodes[new]
            node.first = first
            node.stop = stop
            node.depth = depth
            node.parent = NONE
            _tell(followers, successors, counts, node)
            for i in range((first + SCAN - 1) // SCAN, (stop - 1) // SCAN + 1):
                if anchors[i] == NONE:
                    anchors[i] = new
            if depths[top] < length:
                orphan = new
            elif top > 0:
                node.parent = inside[top]
                inside[top] = new
        if depths[top] < length:
            top += 1
            depths[top], firsts[top], inside[top] = length, first, orphan
    return num_nodes


class BuildSteps(NamedTuple):
    count_entries: Callable[..., None]
    collect: Callable[..., None]
    sort: Callable[..., None]
    sample: Callable[..., None]
    describe: Callable[..., None]
    rank: Callable[..., None]
    link: Callable[..., None]
    grow: Callable[..., int]


@functools.cache
def build_steps() -> BuildSteps:
    """The compiled functions; compiles them, or loads what an earlier process compiled, once."""
    ints, longs, data, nodes = np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.uint8), np.zeros(0, NODE)
    tokens, shared = ints.copy(), data.copy()
    tokens.flags.writeable = shared.flags.writeable = False  # as sections of the file are

    def step(function: Callable[..., Any], *examples: Any) -> Any:
        return compiled(function, tuple(numba.typeof(example) for example in examples))

    return BuildSteps(
        step(_count_entries, tokens, ints),
        step(_collect, tokens, 0, 0, ints),
        step(_sort, tokens, ints, longs, 0, 0),
        step(_sample, tokens, ints, longs, 0, 0),
        step(_describe, tokens, ints, 0, ints, data, 0),
        step(_rank, ints, 0, ints),
        step(_link, ints, 0, ints, ints),
        step(_grow, tokens, tokens, shared, ints, ints, nodes),
    )
