"""The interface of a draft engine: paged, batched, ragged forwards and copies of tail pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["SAMPLING_DTYPE", "Batch", "DraftEngine", "Row"]

SAMPLING_DTYPE = np.dtype(
    [("seed", "<i8"), ("temperature", "<f4"), ("noise_scale", "<f4"), ("top_k", "<i4"), ("top_p", "<f4"), ("min_p", "<f4")]
)
"""How the target samples a row's tokens, as `Row` says."""


@dataclass(frozen=True, slots=True)
class Row:
    """Query tokens of one branch: a chunk of a prompt, one token, or a path to be verified in one forward.

    pages: the branch's block table, best as an array; entry i holds positions i * page_size .. (i + 1) * page_size - 1 and
        every page up to the last query token must be there.
    start: position of the first query token, which is the number of tokens that the branch has in its pages
        before it.
    tokens: the query tokens (at least one); their keys and values are written from position start on.
    num_outputs: how many of the last query tokens want their next-token distribution, 0 .. len(tokens).
    temperature: divides the logits of this row's outputs; 0 (greedy) means 1, because probabilities are wanted in any case.
    seed, noise_scale: next tokens are ranked by ``log(probability) + noise_scale * noise(seed, position of the query token,
        next token)``; 0 ranks them by probability. See `double_kernels.gumbel_noise`.
    top_k (0: off), top_p (1: off), min_p (0: off): the target's filters; tokens outside come last, with probability 0.
    """

    pages: Sequence[int]
    start: int
    tokens: Sequence[int]
    num_outputs: int
    temperature: float
    seed: int = 0
    noise_scale: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass(frozen=True)
class Batch:
    """The rows of one forward, flat; see `Row` for their meaning.

    token_ids: int64 [tokens], row after row. query_start: int32 [rows + 1], where each row's tokens begin. starts, num_outputs:
    int32 [rows]. sampling: SAMPLING_DTYPE [rows]. pages: int32 [rows, width], block tables; entries behind a row's last page
    mean nothing. The arrays are good until the caller makes its next batch.
    """

    token_ids: npt.NDArray[np.int64]
    query_start: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int32]
    num_outputs: npt.NDArray[np.int32]
    sampling: npt.NDArray[np.void]
    pages: npt.NDArray[np.int32]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Batch:
        """The same rows."""
        pages = np.zeros((len(rows), max((len(row.pages) for row in rows), default=0)), np.int32)
        for table, row in zip(pages, rows, strict=True):
            table[: len(row.pages)] = row.pages
        return cls(
            np.array([token for row in rows for token in row.tokens], np.int64),
            np.array([0, *accumulate(len(row.tokens) for row in rows)], np.int32),
            np.array([row.start for row in rows], np.int32),
            np.array([row.num_outputs for row in rows], np.int32),
            np.array(
                [(row.seed, row.temperature, row.noise_scale, row.top_k, row.top_p, row.min_p) for row in rows], SAMPLING_DTYPE
            ),
            pages,
        )

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def temperatures(self) -> npt.NDArray[np.float32]:
        """float32 [rows]"""
        return self.sampling["temperature"]

    @cached_property
    def is_sampled(self) -> bool:
        """Whether any row is ranked with noise."""
        return bool(self.sampling["noise_scale"].any())

    @property
    def is_filtered(self) -> bool:
        """Whether any row leaves tokens out."""
        sampling = self.sampling
        return bool((sampling["top_k"] > 0).any() or (sampling["top_p"] < 1).any() or (sampling["min_p"] > 0).any())

    @cached_property
    def positions(self) -> npt.NDArray[np.int64]:
        """int64 [tokens]: of the tokens in their texts."""
        shifts = self.starts.astype(np.int64) - self.query_start[:-1]
        return np.arange(len(self.token_ids)) + np.repeat(shifts, np.diff(self.query_start))

    def slot_mapping(self, page_size: int) -> npt.NDArray[np.int64]:
        """int64 [tokens]: page * page_size + place in the page, where the tokens' keys and values are written."""
        row, positions = np.repeat(np.arange(len(self)), np.diff(self.query_start)), self.positions
        return self.pages[row, positions // page_size].astype(np.int64) * page_size + positions % page_size

    @cached_property
    def output_indices(self) -> npt.NDArray[np.int64]:
        """int64 [outputs]: places of the tokens whose next-token distribution is wanted, each row's last ones."""
        ends, counts = self.query_start[1:], self.num_outputs
        before = np.cumsum(counts) - counts
        return np.repeat(ends - counts - before, counts) + np.arange(counts.sum())

    @property
    def output_positions(self) -> npt.NDArray[np.int64]:
        """int64 [outputs]: positions of these tokens in their texts."""
        return self.positions[self.output_indices]

    @property
    def output_sampling(self) -> npt.NDArray[np.void]:
        """SAMPLING_DTYPE [outputs]"""
        return np.repeat(self.sampling, self.num_outputs)


class DraftEngine(Protocol):
    """A draft model over a paged key/value cache.

    One caller, one forward at a time; the pages are the caller's to manage.
    """

    page_size: int  # tokens in a page
    num_pages: int  # the caller may use pages 0 .. num_pages - 1
    max_length: int  # positions that the draft model can take: start + len(tokens) of a row is at most this
    vocab_size: int  # tokens in the true vocabulary, without padding of the embedding

    def forward(self, batch: Batch, num_children: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Write the rows' keys and values, and return the best next tokens after each wanted query token.

        Returns tokens int32 [N, num_children] and probabilities float32 [N, num_children], where N is the sum
        of num_outputs, in row order; each line as `Row` ranks it. Probabilities are
        softmax(logits / (temperature or 1)) over the true vocabulary, so a line sums to at most 1. The arrays
        are the caller's. Two rows of one call must not write the same slot, and no row may read a slot that
        another row of the call writes. Rows are not checked; the tests' engine does.
        """
        ...

    def copy_slots(self, triples: Sequence[tuple[int, int, int]]) -> None:
        """Copy slots 0 .. used - 1 of each (source page, destination page, used slots), in all layers.

        Destinations are distinct and are no source of the same call. Raises ValueError otherwise.
        """
        ...
