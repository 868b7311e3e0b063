"""Sources whose state lies in arrays indexed by key: a single lookup is one of many."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_double.retrieval.base import Continuation, Found, Queries, Source, Tokens, check_tokens

__all__ = ["EVIDENCE", "EXAMPLES", "MAX_CONTINUATION", "ArraySource", "with_room"]

MAX_CONTINUATION = 1024
"""Most tokens that one lookup returns."""
EVIDENCE = np.dtype([("match_length", np.int32), ("count", np.int32), ("total", np.int32)])
"""What an answer's token rests on."""
_NO_EVIDENCE = np.zeros((0, 0), EVIDENCE)
EXAMPLES = (Queries.of([], [], []), Found.empty(0, 0), _NO_EVIDENCE)
"""Arguments of a compiled lookup, for its types."""


def with_room(array: npt.NDArray[Any], index: int) -> npt.NDArray[Any]:
    """The array, or one twice as long or longer, with zeros behind what it held, that has this row."""
    if index < len(array):
        return array
    grown = np.zeros((max(2 * len(array), index + 1), *array.shape[1:]), array.dtype)
    grown[: len(array)] = array
    return grown


class ArraySource(Source):
    """A compiled call answers all queries."""

    rows: Any
    """A named tuple of arrays by key. ``requests`` holds records with a field ``live``: the others are free."""

    @property
    def requests(self) -> npt.NDArray[Any]:
        return self.rows.requests  # type: ignore[no-any-return]

    @abstractmethod
    def _look_up(self, queries: Queries, found: Found, evidence: npt.NDArray[Any]) -> int:
        """The compiled lookup: the row of an unknown key, or -1. Fills evidence, EVIDENCE [n, width], unless that is empty."""

    @abstractmethod
    def extend_many(self, keys: npt.NDArray[np.int32], tokens: Tokens, starts: npt.NDArray[np.int32]) -> None:
        """See Source."""

    def _is_live(self, key: int) -> bool:
        return 0 <= key < len(self.requests) and bool(self.requests["live"][key])

    def _begin(self, key: int, tokens: Tokens) -> None:
        """Have a row for a key. Raises ValueError: it is in use, or a token is negative."""
        if self._is_live(key):
            raise ValueError(f"request {key} is started already")
        check_tokens(tokens)
        if key >= len(self.requests):
            self.rows = type(self.rows)(*(with_room(array, key) for array in self.rows))

    def _end(self, key: int) -> None:
        """Raises KeyError: unknown key."""
        if not self._is_live(key):
            raise KeyError(key)
        self.requests["live"][key] = False

    def extend(self, key: int, tokens: Sequence[int]) -> None:
        """See Source. KeyError: unknown key. ValueError: a negative token, none is appended."""
        check_tokens(tokens)
        self.extend_many(np.array([key], np.int32), np.array(tokens, np.int32), np.array([0, len(tokens)], np.int32))

    def lookup_many(self, queries: Queries, found: Found) -> None:
        """See Source. KeyError: unknown key."""
        row = self._look_up(queries, found, _NO_EVIDENCE)
        if row >= 0:
            raise KeyError(int(queries.keys[row]))

    def lookup(self, key: int, tail: Sequence[int], max_tokens: int) -> Continuation | None:
        """See Source. KeyError: unknown key. ValueError: a negative token, or ``max_tokens`` not in [1, MAX_CONTINUATION]."""
        if not 1 <= max_tokens <= MAX_CONTINUATION:
            raise ValueError(f"max_tokens must be between 1 and {MAX_CONTINUATION}, not {max_tokens}")
        check_tokens(tail)
        found, evidence = Found.empty(1, max_tokens), np.zeros((1, max_tokens), EVIDENCE)
        if self._look_up(Queries.of([key], [tail], [max_tokens]), found, evidence) >= 0:
            raise KeyError(key)
        rests_on = evidence[0, : found.lengths[0]]
        if not len(rests_on):
            return None
        tokens = found.tokens[0, : len(rests_on)].tolist()
        match_length = int(rests_on["match_length"][0])
        return Continuation.of(tokens, match_length, rests_on["count"].tolist(), rests_on["total"].tolist())
