"""Retrieval for replies that repeat a shown text with changes: it goes on copying behind a change, and repeats replacements."""

from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_double.retrieval.array_source import ArraySource
from vllm_double.retrieval.base import Found, Queries, Tokens
from vllm_double.retrieval.context import ContextRetriever
from vllm_double.retrieval.edit_steps import COPYING, Edits, edit_steps
from vllm_double.retrieval.suffix_automaton.arena import NONE

__all__ = ["EditRetriever"]


class EditRetriever(ArraySource):
    """Continues a reply that repeats a text of its own request with changes, as edits of code do.

    Where at least 8 tokens are those of an earlier place, that place is being copied. Behind a token that departs
    from it a suffix automaton knows nothing for a while. Here the copy goes on: behind a replaced token, or where the next
    tokens are found again within 64 tokens. What was replaced by what is remembered, as in the renaming of a
    variable, and offered instead wherever the copied text has it again, until that is refused once.

    Reads the texts and the automata of ``context``, whose `start` and `extend` come before these.
    """

    name = "edit"

    def __init__(self, context: ContextRetriever) -> None:
        self._context = context
        self.rows = Edits.empty(16)
        self._scratch = np.zeros(1, COPYING)
        self._steps = edit_steps()

    def start(self, key: int, tokens: Tokens, tenant: str | None = None) -> None:
        """See Source."""
        self._begin(key, tokens[:0])
        copying = self.requests[key]
        copying["live"], copying["source"] = True, NONE
        copying["num_change"] = copying["num_due"] = copying["num_replacements"] = 0

    def stop(self, key: int, keep: bool = False) -> None:
        """See Source."""
        self._end(key)

    def extend_many(self, keys: npt.NDArray[np.int32], tokens: Tokens, starts: npt.NDArray[np.int32]) -> None:
        """See Source."""
        row = self._steps.extend(self._context.arrays, self._context.requests, self.rows, keys, tokens, starts)
        if row >= 0:
            raise KeyError(int(keys[row]))

    def _look_up(self, queries: Queries, found: Found, evidence: npt.NDArray[Any]) -> int:
        return self._steps.lookup(
            self._context.arrays, self._context.requests, self.rows, self._scratch, queries, found, evidence
        )
