"""A suffix automaton over tokens that counts occurrences online, compiled by numba.

Blumer et al. 1985, "The smallest automaton recognizing the subwords of a text": each state is a set of
substrings that end at the same positions, and its suffix link leads to their longest suffix that ends at more
positions. Added to that:

- **Depth.** Lookups use at most ``max_match`` tokens of context, so only substrings of at most
  ``max_match + 1`` tokens (context and next token) are held. A new token extends the state of the last
  ``max_match`` tokens, the window, instead of the state of the whole text, and adds nothing where that was
  seen before. So a path of suffix links has at most ``max_match + 1`` states (a handful in prose), and a
  token costs no more than such a path, save for the transitions that a split copies: O(1) amortised.
- **Counts.** A token adds an occurrence to the states on the path of suffix links from the new end, and to no
  other: counts are exact at all times.
- **The most frequent next token of each state**, ``BEST``. Context + next token occurs as often as the count
  of the state that the transition leads to. Only states on that path gain, so one comparison per state keeps
  it.
- **One transition inside the state.** A state's longest substring, with each token that a transition adds, is
  in the text. Such substrings form a trie with at most one leaf per token, so the transitions beyond each
  state's first number fewer than the tokens. A hash table with two slots per token holds them.

Memory per token of capacity, which is at most twice the tokens: 64 bytes of states (two at worst; what is
never written is not resident), 16 of transitions, 8 of table.
"""

import itertools
from collections.abc import Callable
from functools import partial

import numpy as np

from vllm_double.retrieval._steps import (
    BEST,
    CAPACITY,
    COUNT,
    EDGES,
    END,
    FIRST,
    HEADER_LENGTH,
    LENGTH,
    LINK,
    MAX_MATCH,
    NONE,
    NUM_EDGES,
    NUM_STATES,
    NUM_TOKENS,
    ROOT,
    SEPARATOR,
    STATES_AT,
    TABLE_AT,
    TOKEN,
    WINDOW,
    WINDOW_LENGTH,
    Header,
    Ints,
    steps,
)
from vllm_double.retrieval.base import Continuation
from vllm_double.retrieval.buffers import Scratch, zeros

__all__ = ["SEPARATOR", "SuffixAutomaton", "warm_up"]


def warm_up() -> None:
    """Compile, or load what an earlier process compiled. Call it at start-up; later calls cost nothing."""
    steps()


class SuffixAutomaton:
    """The arrays of one automaton. It does not keep the text: each token is handed over once, in order.

    SEPARATOR ends a document: contexts do not reach across it.
    """

    __slots__ = ("_edges", "_header", "_header_at", "_states", "_steps", "_table", "capacity", "extend_from", "max_match")

    def __init__(self, capacity: int, max_match: int) -> None:
        """Room for ``capacity`` tokens, a power of two; contexts have at most ``max_match`` tokens."""
        self._steps = steps()
        self.capacity = capacity
        self.max_match = max_match
        self._header = np.zeros(HEADER_LENGTH, np.int64)
        self._header_at = self._header.ctypes.data
        self.extend_from: Callable[[int, int, int], None] = partial(self._steps.extend, self._header_at)
        """`extend` from the address of an int32 array that is contiguous."""
        self._states = zeros((2 * capacity, 8), np.int32)
        self._edges = zeros((capacity, 4), np.int32)
        self._table = zeros((2 * capacity,), np.int32)
        self._note_arrays()
        self.clear()

    def _note_arrays(self) -> None:
        arrays = (self._states, self._edges, self._table)
        self._header[MAX_MATCH], self._header[CAPACITY] = self.max_match, self.capacity
        self._header[STATES_AT : TABLE_AT + 1] = [array.ctypes.data for array in arrays]

    @property
    def header(self) -> Header:
        """Counts and addresses, int64 [HEADER_LENGTH], for looking up several automata in one call."""
        return self._header

    @property
    def num_tokens(self) -> int:
        """Tokens appended since `clear`."""
        return int(self._header[NUM_TOKENS])

    @property
    def num_bytes(self) -> tuple[int, int]:
        """(bytes written to, bytes reserved) by states, transitions and table."""
        states, edges = (int(n) for n in self._header[:2])
        reserved = self._states.nbytes + self._edges.nbytes + self._table.nbytes
        return 32 * states + 16 * edges + self._table.nbytes, reserved

    def clear(self) -> None:
        """Back to the empty text, keeping the memory."""
        if self._header[NUM_EDGES]:
            self._table.fill(0)
        self._header[:MAX_MATCH] = 0
        self._header[NUM_STATES] = 1
        self._states[ROOT] = NONE
        self._states[ROOT, LENGTH] = 0

    def reserve(self, num_tokens: int) -> None:
        """Make room for so many tokens in all, by doubling."""
        if num_tokens <= self.capacity:
            return
        while self.capacity < num_tokens:
            self.capacity *= 2
        num_states, num_edges = (int(n) for n in self._header[:2])
        states = zeros((2 * self.capacity, 8), np.int32)
        states[:num_states] = self._states[:num_states]
        edges = zeros((self.capacity, 4), np.int32)
        edges[:num_edges] = self._edges[:num_edges]
        table = zeros((2 * self.capacity,), np.int32)
        self._states, self._edges, self._table = states, edges, table
        self._note_arrays()
        self._steps.rehash(self._header)

    def extend(self, text: Ints, start: int, stop: int) -> None:
        """Append text[start:stop]; there must be room. No token may be negative."""
        self.extend_from(text.ctypes.data, start, stop)

    def lookup(self, scratch: Scratch, num_feed: int, from_end: bool, max_tokens: int) -> Continuation | None:
        """Match the first num_feed tokens of scratch.feed, if from_end behind the text, and continue it."""
        found = self._steps.lookup(self._header_at, scratch.feed.address, num_feed, from_end, scratch.out_address, max_tokens)
        return scratch.continuation(*found)

    def source(self) -> tuple[int, int]:
        """Where the latest occurrence is of the token that a lookup behind the text's end returns first, and the length of its
        context; (-1, 0): there is none."""
        return self._steps.source(self._header_at)

    def check_integrity(self, text: Ints) -> None:
        """Raise AssertionError where the arrays are not those of text. Slow, O(n * max_match): for tests."""
        depth = self.max_match + 1
        num_tokens, num_states = self.num_tokens, int(self._header[NUM_STATES])
        states = self._states[:num_states].tolist()
        assert num_tokens == len(text) <= self.capacity
        assert num_states <= max(2 * num_tokens, 1)
        moves = self._transitions()
        separators = np.flatnonzero(text == SEPARATOR)
        bounds = [0, *(separators + 1).tolist()]
        bounds += [num_tokens] if bounds[-1] < num_tokens else []
        longest, shortest = [0] * num_states, [depth] * num_states
        shortest[ROOT] = 0
        counts, ends = [0] * num_states, [0] * num_states
        for begin, stop in itertools.pairwise(bounds):
            for start in range(begin, stop):
                state = ROOT
                for length, token in enumerate(text[start : min(start + depth, stop)].tolist(), 1):
                    state = moves[state][token]
                    longest[state] = max(longest[state], length)
                    shortest[state] = min(shortest[state], length)
            for end in range(begin + 1, stop + 1):
                state = ROOT
                for token in text[max(begin, end - depth) : end].tolist():
                    state = moves[state][token]
                while state != ROOT:
                    counts[state] += 1
                    ends[state] = end
                    state = states[state][LINK]
        for state, row in enumerate(states[1:], 1):
            assert row[COUNT] == counts[state] > 0, "an occurrence is not counted"
            assert row[END] == ends[state], "END is the last occurrence"
            assert row[LENGTH] == longest[state], "LENGTH is that of the longest substring"
            assert longest[row[LINK]] + 1 == shortest[state], "the link leads to the next shorter substrings"
            assert all(states[target][TOKEN] == token for token, target in moves[state].items())
            if shortest[state] == depth:
                continue  # too long for a context: what it leads to is neither kept up to date nor read
            followers = sum(counts[target] for target in moves[state].values())
            expected = 0 if row[TOKEN] == SEPARATOR else counts[state] - (ends[state] == num_tokens)
            assert followers == expected, "a transition is missing"
            best = max(moves[state].values(), key=lambda target: (counts[target], ends[target]), default=NONE)
            assert row[BEST] == best, "BEST is the most frequent, then the latest"
        window = int(self._header[WINDOW])
        length = int(self._header[WINDOW_LENGTH])
        since_separator = num_tokens - (int(separators[-1]) + 1 if len(separators) else 0)
        assert length == min(since_separator, self.max_match)
        state = ROOT
        for token in text[num_tokens - length :].tolist():
            state = moves[state][token]
        assert window == state, "the window is the state of the last tokens"

    def _transitions(self) -> list[dict[int, int]]:
        """For each state the target of each token."""
        num_states, num_edges = (int(n) for n in self._header[:2])
        assert num_edges <= max(self.num_tokens - 1, 0), "more transitions than there is room for"
        moves: list[dict[int, int]] = []
        found = 0
        for first, edge in self._states[:num_states, [FIRST, EDGES]].tolist():
            state = len(moves)
            moves.append({} if first == NONE else {int(self._states[first, TOKEN]): first})
            while edge != NONE:
                source, token, target, following = self._edges[edge].tolist()
                assert source == state
                assert token not in moves[state], "two transitions for one token"
                moves[state][token] = target
                edge = following
                found += 1
        assert found == num_edges == np.count_nonzero(self._table)
        return moves
