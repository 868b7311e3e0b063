"""The rows of the target's batch, as the round's compiled steps read them."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_double.target.speculation_trie import CHAIN_TOKEN, Records

__all__ = ["Batch", "Live", "Row", "Rows", "Summary"]

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the target's batch after sampling.

    tokens: int32 [n], the whole text with what was just sampled. num_sampled: how many of them were just sampled; 0 while
    the prompt is being read. verified: the draft tokens that the target really verified in this step.
    """

    request_id: str
    tokens: Ints
    num_sampled: int
    verified: Sequence[int]


class Rows(NamedTuple):
    """All rows of a batch; see `Row`."""

    slots: Ints
    """[n]: of the requests; written by the proposer."""
    texts: Ints
    """[any, any], in C order: where the texts lie. They are read during the round only."""
    places: Ints
    """[n]: row of ``texts``"""
    lengths: Ints
    """[n]"""
    num_sampled: Ints
    """[n]"""
    verified: Ints
    """Of all rows, one behind the other."""
    verified_starts: Ints
    """[n + 1]"""


class Batch(NamedTuple):
    """The rows and their requests' ids."""

    request_ids: Sequence[str]
    rows: Rows

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Batch:
        """From single rows, whose texts are copied."""
        lengths = [len(row.tokens) for row in rows]
        texts = np.zeros((len(rows), max(lengths, default=0)), np.int32)
        for text, row in zip(texts, rows, strict=True):
            text[: len(row.tokens)] = row.tokens
        verified = [row.verified for row in rows]
        return cls.at(
            [row.request_id for row in rows], texts, range(len(rows)), lengths, [row.num_sampled for row in rows], verified
        )

    @classmethod
    def at(
        cls, request_ids: Sequence[str], texts: Ints, places: Sequence[int], lengths: Sequence[int],
        num_sampled: Sequence[int], verified: Sequence[Sequence[int]],
    ) -> Batch:  # fmt: skip
        """Texts as they lie with the model runner: no tokens are copied but the verified ones."""
        n = len(request_ids)
        starts = itertools.accumulate(map(len, verified), initial=0)
        # One array for all, which numpy does not make of a list: between two forwards each call into it finds cold caches.
        all_of_them = array("i", bytes(4 * n))
        for part in (places, lengths, num_sampled, starts, itertools.chain.from_iterable(verified)):
            all_of_them.extend(part)
        ints = np.frombuffer(all_of_them, np.int32)
        rows = Rows(
            slots=ints[:n], texts=texts, places=ints[n : 2 * n], lengths=ints[2 * n : 3 * n],
            num_sampled=ints[3 * n : 4 * n], verified=ints[5 * n + 1 :], verified_starts=ints[4 * n : 5 * n + 1],
        )  # fmt: skip
        return cls(request_ids, rows)

    def text(self, row: int) -> Ints:
        """The whole text of a row, a view."""
        return self.rows.texts[self.rows.places[row], : self.rows.lengths[row]]


class Summary(NamedTuple):
    """How much there is in `Live`."""

    num_live: int
    """Rows that want drafts."""
    num_sampled: int
    """Those of them that are not greedy."""
    num_grown: int
    """Texts that went on,"""
    num_ended: int
    """and of these, that have ended."""
    num_told: int
    """Sources that know of it."""


class Live(NamedTuple):
    """What a round finds out of its rows. The first arrays are by live row, which is one that wants drafts.

    Arrays are reused from round to round, and longer than what is in them.
    """

    summary: Ints
    """A `Summary`."""
    slots: Ints
    rows: Ints
    """Which row of the batch."""
    keys: Ints
    """Slots of the rows that the sources are asked about."""
    limits: Ints
    """Most tokens of its chain."""
    paths: Records
    """CHAIN_TOKEN [live rows, most tokens of a chain]: the best path."""
    path_lengths: Ints
    tails: Ints
    """[queries, most tokens of a chain]: what to ask the sources for is behind these tokens."""
    tail_lengths: Ints
    tail_limits: Ints
    grown_slots: Ints
    """Of requests whose text went on, with the tokens that count in ``new_tokens[new_starts[i] : new_starts[i + 1]]``."""
    new_tokens: Ints
    new_starts: Ints
    ended: Ints
    """Rows whose text has ended, and in ``ends`` where."""
    ended_slots: Ints
    ends: Ints

    @classmethod
    def empty(cls, num_rows: int, max_chain: int, num_new: int) -> Live:
        """Room for so many rows, and for so many new tokens in all."""

        def ints(*shape: int) -> Ints:
            return np.zeros(shape, np.int32)

        n = num_rows
        return cls(
            summary=ints(len(Summary._fields)), slots=ints(n), rows=ints(n), keys=ints(n), limits=ints(n), paths=np.zeros((n, max_chain), CHAIN_TOKEN), path_lengths=ints(n),
            tails=ints(n, max_chain), tail_lengths=ints(n), tail_limits=ints(n), grown_slots=ints(n), new_tokens=ints(num_new),
            new_starts=ints(n + 1), ended=ints(n), ended_slots=ints(n), ends=ints(n),
        )  # fmt: skip
