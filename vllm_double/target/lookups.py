"""What the round asks of the sources of repeated text, for all rows at once."""

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_double.retrieval.base import Retriever, Tokens

__all__ = ["Found", "Lookups", "Queries"]

Ints = npt.NDArray[np.int32]


class Queries(NamedTuple):
    """A row for each query: the text of ``keys[i]`` + ``tails[i, :tail_lengths[i]]`` is to be continued."""

    keys: Ints
    """[n]"""
    tails: Ints
    """[n, any width]"""
    tail_lengths: Ints
    """[n]"""
    max_tokens: Ints
    """[n]; 0: nothing is wanted."""


class Found(NamedTuple):
    """Row i continues the text of query i with ``tokens[i, :lengths[i]]``; length 0: nothing was found.

    Those of all sources together have another dimension in front.
    """

    lengths: Ints
    """[n]"""
    tokens: Ints
    """[n, width]"""
    beliefs: npt.NDArray[np.float32]
    """[n, width]: see `retrieval.base.beliefs`."""


class Lookups:
    """The sources. Keys are the requests' slots."""

    def __init__(self, sources: Sequence[Retriever], indices: Sequence[int], max_tokens: int) -> None:
        """indices: of the sources' names, see `Calibration`. max_tokens: of an answer."""
        self.sources = list(sources)
        self.indices = np.array(indices, np.int32)
        self._max_tokens = max_tokens
        self.found = self._room(1)
        self._no_tails = np.zeros((1, 0), np.int32), np.zeros(1, np.int32)

    def _room(self, num_queries: int) -> Found:
        shape = (len(self.sources), num_queries, self._max_tokens)
        return Found(np.zeros(shape[:2], np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32))

    def start(self, slot: int, tokens: Tokens, tenant: str | None) -> None:
        """A request begins; its prompt is indexed by `index`."""
        for source in self.sources:
            source.start(slot, tokens, tenant)

    def stop(self, slot: int, keep: bool) -> None:
        """A request ends. keep: later requests of its tenant may be offered its output."""
        for source in self.sources:
            source.stop(slot, keep)

    def drop(self, slot: int) -> None:
        """A request ends that may not be sound."""
        for source in self.sources:
            with suppress(Exception):
                source.stop(slot, False)

    def forget(self) -> None:
        """Nothing of requests that ended is offered again."""
        for source in self.sources:
            source.forget()

    def index(self, budget_tokens: int) -> None:
        """Index at most so many tokens for each source."""
        for source in self.sources:
            source.work(budget_tokens)

    def extend(self, slots: Ints, tokens: Ints, starts: Ints) -> None:
        """Texts go on with ``tokens[starts[i] : starts[i + 1]]``."""
        for source in self.sources:
            _extend_many(source, slots, tokens, starts)

    def ask(self, slots: Ints, max_tokens: Ints) -> Found:
        """What follows these texts, by each source."""
        num_queries = len(slots)
        if num_queries > len(self._no_tails[1]):
            self._no_tails = np.zeros((num_queries, 0), np.int32), np.zeros(num_queries, np.int32)
        return self.ask_behind(Queries(slots, self._no_tails[0][:num_queries], self._no_tails[1][:num_queries], max_tokens))

    def ask_behind(self, queries: Queries) -> Found:
        """What follows texts with tails, by each source. The answer is good until the next question."""
        num_queries = len(queries.keys)
        if num_queries > self.found.lengths.shape[1]:
            self.found = self._room(2 * num_queries)
        for source, lengths, tokens, beliefs in zip(self.sources, *self.found, strict=True):
            _lookup_many(source, queries, Found(lengths[:num_queries], tokens[:num_queries], beliefs[:num_queries]))
        return self.found


def _lookup_many(source: Retriever, queries: Queries, found: Found) -> None:
    for index, (key, max_tokens) in enumerate(zip(queries.keys.tolist(), queries.max_tokens.tolist(), strict=True)):
        tail = queries.tails[index, : queries.tail_lengths[index]].tolist()
        one = source.lookup(key, tail, max_tokens) if max_tokens > 0 else None
        found.lengths[index] = length = 0 if one is None else len(one.tokens)
        if one is not None:
            found.tokens[index, :length], found.beliefs[index, :length] = one.tokens, one.beliefs


def _extend_many(source: Retriever, slots: Ints, tokens: Ints, starts: Ints) -> None:
    flat, bounds = tokens.tolist(), starts.tolist()
    for index, slot in enumerate(slots.tolist()):
        source.extend(slot, flat[bounds[index] : bounds[index + 1]])
