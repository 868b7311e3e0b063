"""What the round asks of the sources of repeated text, for all rows at once."""

from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from vllm_double.retrieval.base import Found, Queries, Source, Tokens
from vllm_double.retrieval.bundle import Bundle
from vllm_double.target.batch import Live

__all__ = ["Lookups"]

_HOUSEKEEPING_TOKENS = 1024  # behind each round, for what sources put off until they are called
Ints = npt.NDArray[np.int32]


class Lookups:
    """The sources. Keys are the requests' slots. ``is_broken``: a call of one raised, and may have left anything behind."""

    def __init__(self, sources: Sequence[Source], indices: Sequence[int], max_tokens: int) -> None:
        """indices: of the sources' names, see `Calibration`. max_tokens: of an answer."""
        self.sources = list(sources)
        self.indices = np.array(indices, np.int32)
        self._max_tokens = max_tokens
        self._num_waiting = 0  # tokens that may not be indexed yet, at most
        self.is_broken = False
        self.bundle = Bundle(self.sources)
        self.found = self._room(1)

    def _room(self, num_queries: int) -> Found:
        shape = (len(self.sources), num_queries, self._max_tokens)
        return Found(np.zeros(shape[:2], np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32))

    def _calling(self, first: int = 0) -> Iterator[Source]:
        """The sources from this one on, each to be called once."""
        self.is_broken = True
        yield from self.sources[first:]
        self.is_broken = False

    def start(self, slot: int, tokens: Tokens, tenant: str | None) -> None:
        """A request begins; its prompt is indexed by `index`."""
        self._num_waiting += len(tokens)
        for source in self._calling():
            source.start(slot, tokens, tenant)

    def stop(self, slot: int, length: int, keep: bool) -> None:
        """A request ends with a text of so many tokens. keep: later requests of its tenant may be offered its output."""
        self._num_waiting += length
        for source in self._calling():
            source.stop(slot, keep)

    def drop(self, slot: int) -> None:
        """A request ends that may not be sound."""
        for source in self.sources:
            with suppress(Exception):
                source.stop(slot, False)

    def forget(self) -> None:
        """Nothing of requests that ended is offered again."""
        for source in self._calling():
            source.forget()

    def index(self, budget_tokens: int) -> bool:
        """Index at most so many tokens for each source; whether more may wait."""
        for source in self._calling():
            source.work(budget_tokens)
        self._num_waiting = max(0, self._num_waiting - budget_tokens)
        return self._num_waiting > 0

    def extend(self, live: Live, num_grown: int, num_told: int) -> None:
        """Texts have grown; so many sources know it."""
        self._num_waiting = max(self._num_waiting, _HOUSEKEEPING_TOKENS)
        for source in self._calling(num_told):
            source.extend_many(live.grown_slots[:num_grown], live.new_tokens, live.new_starts[: num_grown + 1])

    @property
    def are_bundled(self) -> bool:
        """Whether all sources are in the bundle."""
        return self.bundle.num_sources == len(self.sources)

    def make_room(self, num_queries: int) -> None:
        """For answers to so many queries."""
        if num_queries > self.found.lengths.shape[1]:
            self.found = self._room(2 * num_queries)

    def ask(self, queries: Queries) -> Found:
        """What follows texts with tails, by each source; `make_room` came before. Good until the next question."""
        for source, lengths, tokens, beliefs in zip(self._calling(), *self.found, strict=True):
            source.lookup_many(queries, Found(lengths, tokens, beliefs))
        return self.found
