"""Retrieval from a request's own prompt and output."""

from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_double.retrieval.array_source import ArraySource
from vllm_double.retrieval.base import Found, Queries, Tokens
from vllm_double.retrieval.context_steps import CONTEXT, QUEUE, Contexts, context_steps
from vllm_double.retrieval.suffix_automaton.arena import BYTES_PER_TOKEN, NONE, SPARE, Arena, Arrays

__all__ = ["ContextRetriever"]

_MIN_CAPACITY = 256
# Tokens that extend indexes before it returns (some 50 us); more wait for `work`.
_AT_ONCE = 64
# Tokens that `work` indexes of one request before it turns to the next.
_SLICE = 512


class ContextRetriever(ArraySource):
    """Continues a request with what followed the same words earlier in the same request.

    Let ``indexed`` be the part of the text that is indexed: all of it, except while a long prompt waits
    for `work`, or while the index is moved to a larger range, which `work` does too. One step of a lookup takes as
    context the longest suffix of text + tail + (tokens returned so far), of at most ``max_match`` tokens, that occurs
    in ``indexed`` with a token of ``indexed`` behind it. Its total is the number of such occurrences (they may overlap).
    It returns the token that followed most often, with that count; of equally frequent ones that which followed last.
    Steps end with ``max_tokens``, or before a context would be shorter than the first one (``match_length``). So a
    continuation that reaches the end of the text goes on where the text's own end occurred before, as in
    periodic text. Occurrences inside the tail don't count. tests/references/retrieval.py has the same in a few obvious
    lines.

    While tokens wait, a lookup is exact for the part that is indexed, and still matches the text's true end.
    A request that finds the arena full is answered nothing. Costs: benchmarks/retrieval_bench.py.
    """

    name = "context"

    def __init__(self, max_match: int = 32, arena: Arena | None = None) -> None:
        """Contexts have at most ``max_match`` tokens. Call `sources.warm_up` before the first start."""
        if max_match < 1:
            raise ValueError(f"max_match must be at least 1, not {max_match}")
        self.max_match = max_match
        self.at_once = _AT_ONCE
        self.arena = arena or Arena()
        self.num_unindexed = 0
        """Requests that found no room for an index, or for a larger one."""
        self.rows = Contexts(np.zeros(16, CONTEXT))
        self.queues = np.full(1, NONE, QUEUE)
        self._steps = context_steps()

    @property
    def arrays(self) -> Arrays:
        return self.arena.arrays

    def start(self, key: int, tokens: Tokens, tenant: str | None = None) -> None:
        """Copy and queue a prompt, int32 [n]. ValueError: the key is in use, or a token is negative."""
        self._begin(key, tokens)
        slot = self.arena.open(max(_MIN_CAPACITY, 1 << len(tokens).bit_length()), self.max_match)
        self.requests["live"][key], self.requests["slot"][key] = True, slot
        if slot == NONE:
            self.num_unindexed += 1
        elif len(tokens):
            start = self.arrays.automata["start"][slot]
            self.arrays.text[start : start + len(tokens)] = tokens
            self.arrays.automata["length"][slot] = len(tokens)
            self._steps.enqueue(self.requests, self.queues, key)

    def stop(self, key: int, keep: bool = False) -> None:
        """Forget the request and free its memory: its text is of use to itself only. KeyError: unknown key."""
        self._end(key)
        if self.requests["slot"][key] != NONE:
            self.arena.close(int(self.requests["slot"][key]))

    def work(self, budget_tokens: int) -> None:
        """Index at most ``budget_tokens`` queued tokens, taking turns between the requests that wait."""
        budget = budget_tokens
        while budget > 0:
            budget, moved = self._steps.work(self.arrays, self.requests, self.queues, budget, _SLICE)
            if moved == NONE:
                break
            self._end_growth(moved)
        self.arena.clean(max(1, budget_tokens // _SLICE))
        key = NONE if budget > 0 else len(self.requests)  # first what waits
        while (key := self._steps.crowded(self.arrays, self.requests, key + 1, SPARE)) != NONE:
            self._grow(key, SPARE)
            self._steps.enqueue(self.requests, self.queues, key)

    def extend_many(self, keys: npt.NDArray[np.int32], tokens: Tokens, starts: npt.NDArray[np.int32]) -> None:
        """See Source. KeyError: unknown key, and nothing is appended."""
        while True:
            row = self._steps.extend(self.arrays, self.requests, self.queues, keys, tokens, starts, self.at_once)
            if row == NONE:
                return
            if row < 0:
                raise KeyError(int(keys[-2 - row]))
            self._grow(int(keys[row]), int(starts[row + 1] - starts[row]))

    def _grow(self, key: int, num_tokens: int) -> None:
        """Begin to move the index to a range with room for so many tokens more, twice as large or larger."""
        slot = int(self.requests["slot"][key])
        automaton = self.arrays.automata[slot]
        while automaton["grown_capacity"]:  # a text that has doubled again before `work` could move it
            _, moved = self._steps.work(self.arrays, self.requests, self.queues, int(automaton["capacity"]), _SLICE)
            if moved != NONE:
                self._end_growth(moved)
        length = int(automaton["length"]) + num_tokens
        capacity = max(2 * int(automaton["capacity"]), 1 << length.bit_length())
        start = self.arena.allocate(capacity)
        if start == NONE:
            self.arena.close(slot)
            self.requests["slot"][key] = NONE
            self.num_unindexed += 1
        else:
            automaton["grown_start"], automaton["grown_capacity"], automaton["num_moved"] = start, capacity, 0

    def _end_growth(self, slot: int) -> None:
        automaton = self.arrays.automata[slot]
        self.arena.release(int(automaton["grown_start"]), int(automaton["grown_capacity"]))
        automaton["grown_capacity"] = automaton["num_moved"] = 0

    def _look_up(self, queries: Queries, found: Found, evidence: npt.NDArray[Any]) -> int:
        return self._steps.lookup(self.arena.arrays, self.requests, queries, found, evidence)

    @property
    def num_bytes(self) -> int:
        """Of the whole arena."""
        return self.arena.num_used * BYTES_PER_TOKEN

    @property
    def num_waiting(self) -> int:
        """Tokens that wait for `work`."""
        slots = self.requests["slot"][self.requests["live"]]
        automata = self.arrays.automata[slots[slots != NONE]]
        return int((automata["length"] - automata["num_tokens"]).sum())

    def num_indexed(self, key: int) -> int:
        """Tokens of the request that are indexed. KeyError: unknown key."""
        return int(self.arrays.automata["num_tokens"][self._slot(key)])

    def text(self, key: int) -> Tokens:
        """A copy of the whole text, int32 [n]. KeyError: unknown key."""
        automaton, text = self.arrays.automata[self._slot(key)], self.arrays.text
        start, grown, length = (int(automaton[name]) for name in ("start", "grown_start", "length"))
        inside = min(length, int(automaton["capacity"]))
        return np.append(text[start : start + inside], text[grown + inside : grown + length])

    def _slot(self, key: int) -> int:
        if not self._is_live(key):
            raise KeyError(key)
        return int(self.requests["slot"][key])
