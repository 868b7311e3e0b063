"""The draft's use of the sources of repeated text: which texts they know, and what they say behind several paths at once."""

from collections.abc import Sequence

from vllm_double.draft.arena import MAX_AHEAD, Forward, Ints
from vllm_double.retrieval.base import Found, Queries, Source

__all__ = ["Lookups"]

_INDEX_TOKENS_PER_ITERATION = 1024


class Lookups:
    """All calls of the sources. Requests are named by their slots, which are used again once they are stopped."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self._started: set[int] = set()
        self._found: list[Found] = []

    def __len__(self) -> int:
        return len(self.sources)

    def start(self, slot: int, text: Ints, tenant: str | None) -> None:
        """All of a request's text at admission is there."""
        self._started.add(slot)
        for source in self.sources:
            source.start(slot, text, tenant)

    def extend(self, slot: int, tokens: Ints) -> None:
        """The text has grown."""
        new = tokens.tolist()
        for source in self.sources:
            source.extend(slot, new)

    def stop(self, slot: int, keep: bool) -> None:
        """``keep``: whether the text may be offered to later requests. A text that was never started is none of theirs."""
        if slot in self._started:
            self._started.remove(slot)
            for source in self.sources:
                source.stop(slot, keep)

    def forget(self) -> None:
        """The target's weights changed."""
        for source in self.sources:
            source.forget()

    def work(self) -> None:
        """Index some of what has come."""
        for source in self.sources:
            source.work(_INDEX_TOKENS_PER_ITERATION)

    def ask(self, forward: Forward, num_queries: int) -> list[Found]:
        """What each source says to the forward's queries; good until the next call."""
        size = len(forward.queries.keys)
        if not self._found or len(self._found[0].lengths) < size:
            self._found = [Found.empty(size, MAX_AHEAD) for _ in self.sources]
        queries = Queries(*(array[:num_queries] for array in forward.queries))
        for source, found in zip(self.sources, self._found, strict=True):
            source.lookup_many(queries, found)
        return self._found
