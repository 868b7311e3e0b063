"""The draft's use of the sources of repeated text: which texts they know, and what they say behind several paths at once."""

from collections.abc import Sequence

import numpy as np

from vllm_double.draft.arena import MAX_AHEAD, Forward, Found, Ints
from vllm_double.retrieval.base import Retriever

__all__ = ["Lookups"]

_INDEX_TOKENS_PER_ITERATION = 1024


class Lookups:
    """All calls of the sources. Requests are named by their slots, which are used again once they are stopped."""

    def __init__(self, retrievers: Sequence[Retriever]) -> None:
        self.retrievers = list(retrievers)
        self._keys: dict[int, int] = {}  # of today's sources, which take no key twice
        self._found: list[Found] = []

    def __len__(self) -> int:
        return len(self.retrievers)

    def start(self, slot: int, handle: int, text: Ints, tenant: str | None) -> None:
        """All of a request's text at admission is there."""
        self._keys[slot] = handle
        for retriever in self.retrievers:
            retriever.start(handle, text, tenant)

    def extend(self, slot: int, tokens: Ints) -> None:
        """The text has grown."""
        if self.retrievers:
            new = tokens.tolist()
            for retriever in self.retrievers:
                retriever.extend(self._keys[slot], new)

    def stop(self, slot: int, keep: bool) -> None:
        """``keep``: whether the text may be offered to later requests. A text that was never started is none of theirs."""
        if (key := self._keys.pop(slot, None)) is not None:
            for retriever in self.retrievers:
                retriever.stop(key, keep)

    def forget(self) -> None:
        """The target's weights changed."""
        for retriever in self.retrievers:
            retriever.forget()

    def work(self) -> None:
        """Index some of what has come."""
        for retriever in self.retrievers:
            retriever.work(_INDEX_TOKENS_PER_ITERATION)

    def ask(self, forward: Forward, num_queries: int) -> list[Found]:
        """What each source says to the forward's queries; good until the next call."""
        size = len(forward.queries.keys)
        if len(self._found) < len(self.retrievers) or len(self._found[0].lengths) < size:
            self._found = [
                Found(
                    np.zeros(size, np.int32), np.zeros((size, MAX_AHEAD), np.int32), np.zeros((size, MAX_AHEAD), np.float32)
                )
                for _ in self.retrievers
            ]  # fmt: skip
        queries = forward.queries
        for retriever, found in zip(self.retrievers, self._found, strict=True):
            for index in range(num_queries):  # Source.lookup_many does this
                tail = queries.tails[index, : queries.tail_lengths[index]].tolist()
                said = retriever.lookup(self._keys[int(queries.keys[index])], tail, int(queries.max_tokens[index]))
                found.lengths[index] = num_tokens = len(said.tokens) if said is not None else 0
                if said is not None:
                    found.tokens[index, :num_tokens], found.beliefs[index, :num_tokens] = said.tokens, said.beliefs
        return self._found
