"""Sources that share an arena, asked and extended in one compiled call: between two forwards each call finds cold caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vllm_double.jit import view_part
from vllm_double.retrieval import context_steps, edit_steps, history_steps
from vllm_double.retrieval.array_source import EVIDENCE
from vllm_double.retrieval.base import Found, Queries, Source, Tokens
from vllm_double.retrieval.context import ContextRetriever
from vllm_double.retrieval.context_steps import CONTEXT, QUEUE
from vllm_double.retrieval.edit import EditRetriever
from vllm_double.retrieval.edit_steps import COPYING, Edits
from vllm_double.retrieval.history import HistoryRetriever
from vllm_double.retrieval.history_steps import Past, Readers
from vllm_double.retrieval.suffix_automaton.arena import NONE, Arena, Arrays, Ints, Records

__all__ = ["Bundle", "Indexes", "extend", "look_up"]


class Indexes(NamedTuple):
    """The state of a context and its edits, and of a history: ``num_sources`` is 3, 2 if there is no history, or 0."""

    arrays: Arrays
    contexts: Records
    queues: Records
    at_once: int
    edits: Edits
    scratch: Records
    num_sources: int
    readers: Readers
    past: Past
    evidence: Records
    """None is wanted: empty."""

    @classmethod
    def empty(cls) -> Indexes:
        """Of no requests."""
        return cls(
            Arena(0).arrays, np.zeros(0, CONTEXT), np.full(1, NONE, QUEUE), 0, Edits.empty(0), np.zeros(1, COPYING), 0,
            Readers.empty(0), Past.empty(0), np.zeros((0, 0), EVIDENCE),
        )  # fmt: skip


_extend_context, _look_up_context = view_part(context_steps.extend), view_part(context_steps.look_up)
_extend_edit, _look_up_edit = view_part(edit_steps.extend), view_part(edit_steps.look_up)
_extend_history, _look_up_history = view_part(history_steps.extend), view_part(history_steps.look_up)


@view_part
def _part(found: Found, source: int) -> Found:
    return Found(found.lengths[source], found.tokens[source], found.beliefs[source])


@view_part
def look_up(indexes: Indexes, queries: Queries, found: Found) -> int:
    """Answer all queries. found: with one more dimension in front, of sources. The row of an unknown key, or NONE."""
    if indexes.num_sources == 0:
        return NONE
    arrays, evidence = indexes.arrays, indexes.evidence
    row = _look_up_context(arrays, indexes.contexts, queries, _part(found, 0), evidence)
    if row == NONE:
        row = _look_up_edit(
            arrays, indexes.contexts, indexes.edits, indexes.scratch, queries, _part(found, 1), evidence
        )  # fmt: skip
    if row == NONE and indexes.num_sources > 2:
        row = _look_up_history(arrays, indexes.readers, indexes.past, queries, _part(found, 2), evidence)
    return row


@view_part
def extend(indexes: Indexes, keys: Ints, tokens: Tokens, starts: Ints) -> int:
    """Append to all texts, see `Source.extend_many`; how many sources did, before one that cannot without more room."""
    if indexes.num_sources == 0:
        return 0
    arrays = indexes.arrays
    if _extend_context(arrays, indexes.contexts, indexes.queues, keys, tokens, starts, indexes.at_once) != NONE:
        return 0
    if _extend_edit(arrays, indexes.contexts, indexes.edits, keys, tokens, starts) != NONE:
        return 1
    if indexes.num_sources > 2 and _extend_history(arrays, indexes.readers, keys, tokens, starts) != NONE:
        return 2
    return indexes.num_sources


class Bundle:
    """The sources of a list that can be called together: as `Sources` opens them, the first two or three."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._context, self._edit, self._history = None, None, None
        self._nothing = Indexes.empty()
        if len(sources) > 1 and isinstance(sources[0], ContextRetriever) and isinstance(sources[1], EditRetriever):
            self._context, self._edit = sources[0], sources[1]
            if len(sources) > 2 and isinstance(sources[2], HistoryRetriever) and sources[2].arena is sources[0].arena:
                self._history = sources[2]
        self.num_sources = 0 if self._context is None else 2 if self._history is None else 3

    def indexes(self) -> Indexes:
        """What the compiled functions take: as it is now, for one round. Of no requests if ``num_sources`` is 0."""
        nothing, context, edit, history = self._nothing, self._context, self._edit, self._history
        if context is None or edit is None:
            return nothing
        return Indexes(
            context.arena.arrays, context.rows.requests, context.queues, context.at_once, edit.rows, nothing.scratch, self.num_sources,
            nothing.readers if history is None else history.rows, nothing.past if history is None else history.past,
            nothing.evidence,
        )  # fmt: skip
