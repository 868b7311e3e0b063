"""Retrieval from datastores."""

import logging
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_double.retrieval.array_source import ArraySource, with_room
from vllm_double.retrieval.base import Found, Queries, Tokens
from vllm_double.retrieval.datastore.file import Datastore
from vllm_double.retrieval.datastore.lookup_steps import CHOICE, REQUEST, Texts, lookup_steps

__all__ = ["DatastoreRetriever"]

_logger = logging.getLogger(__name__)
_MAX_READS = 512  # blocks that the lookups of one call read in all, in less than a millisecond,
_LEAST_READS = 8  # and of each file: many small files take longer
_MOST_BLOCKS = 1 << 15  # of all files that are kept: 32 MiB


class DatastoreRetriever(ArraySource):
    """Continues a request with what follows the same words in the corpus.

    A lookup answers from one file: that in which the longest suffix of text + tail occurs; of equally long ones that in which
    it occurs most often, then the first. There one step takes as context the longest suffix of text + tail + (tokens returned
    so far), of at most ``max_match`` tokens, that occurs in a document with a token of that document behind it. Its total is
    the number of such occurrences in all documents. It returns the token that followed most often, with that count; of equally
    frequent ones the lowest id. Steps end with ``max_tokens``, or before a context would be shorter than the first one
    (``match_length``). tests/references/retrieval.py has the same in a few obvious lines.

    An answer is shorter as long as the file is not in memory, and ends for good with a file that is changed: see `reader`.
    Of each text the last ``max_match`` tokens at least are kept. Costs: benchmarks/datastore_bench.py.
    """

    name = "datastore"

    def __init__(self, *datastores: Datastore) -> None:
        """``max_match`` is the greatest of the datastores'."""
        self.max_match = max(datastore.header.max_match for datastore in datastores)
        self._files = list(datastores)
        for datastore in datastores:
            datastore.reader.keep(_MOST_BLOCKS // len(datastores))
        self.rows = Texts(np.zeros(16, REQUEST), np.zeros((16, 8 * self.max_match), np.int32))
        self._context = np.zeros(0, np.int32)
        self._choices = np.zeros(0, CHOICE)
        self._steps = lookup_steps()

    def start(self, key: int, tokens: Tokens, tenant: str | None = None) -> None:
        """Begin with a prompt, int32 [n]. ValueError: the key is in use, or a token is negative."""
        last = tokens[-self.max_match :]
        self._begin(key, last)
        self.requests[key] = (True, len(last))
        self.rows.recent[key, : len(last)] = last

    def stop(self, key: int, keep: bool = False) -> None:
        """Forget the request. KeyError: unknown key."""
        self._end(key)

    def extend_many(self, keys: npt.NDArray[np.int32], tokens: Tokens, starts: npt.NDArray[np.int32]) -> None:
        """See Source. KeyError: unknown key, and nothing is appended."""
        row = self._steps.extend(self.rows, self.max_match, keys, tokens, starts)
        if row >= 0:
            raise KeyError(int(keys[row]))

    def _look_up(self, queries: Queries, found: Found, evidence: npt.NDArray[Any]) -> int:
        room = self.max_match + queries.tails.shape[1] + found.tokens.shape[1]
        if len(self._context) < room:
            self._context = np.zeros(room, np.int32)
        self._choices = with_room(self._choices, len(queries.keys))
        found.lengths[: len(queries.keys)] = 0
        row, passes = -1, [False]
        if len(self._files) > 1:
            self._choices.fill(0)
            passes = [True, False]
        for file in self._files:
            file.reader.begin(max(_LEAST_READS, _MAX_READS // len(self._files)))
        for is_probe in passes:
            for number, file in enumerate(self._files):
                row = self._steps.lookup(
                    file.reader.blocks, file.header.max_match, number, is_probe, self.rows, self._context, self._choices,
                    queries, found, evidence,
                )  # fmt: skip
        if changed := [file for file in self._files if not file.reader.end()]:
            found.lengths[: len(queries.keys)] = 0
            self._files = [file for file in self._files if file not in changed]
            for file in changed:
                _logger.warning('The datastore "%s" was changed, or cannot be read: it is not used any more.', file.path)
        return row
