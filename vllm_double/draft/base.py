"""What the frontier asks of a draft engine: paged, batched, ragged forwards and copies of tail pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["DraftEngine", "Row", "count_outputs"]

_FEW_PAGES = 64  # up to here Python's min and max are quicker than numpy's


@dataclass(frozen=True, slots=True)
class Row:
    """Query tokens of one branch: a chunk of a prompt, one token, or a path to be verified in one forward.

    pages: the branch's block table, best as an array; entry i holds positions i * page_size .. (i + 1) * page_size - 1 and
        every page up to the last query token must be there.
    start: position of the first query token, which is the number of tokens that the branch has in its pages
        before it.
    tokens: the query tokens (at least one); their keys and values are written from position start on.
    num_outputs: how many of the last query tokens want their next-token distribution, 0 .. len(tokens).
    temperature: divides the logits of this row's outputs; 0 (greedy) means 1, because the probabilities are
        wanted all the same.
    """

    pages: Sequence[int]
    start: int
    tokens: Sequence[int]
    num_outputs: int
    temperature: float


class DraftEngine(Protocol):
    """A draft model over a paged key/value cache.

    One caller, one forward at a time; the pages are the caller's to manage.
    """

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        ...

    @property
    def num_pages(self) -> int:
        """Pages that the caller may use: 0 .. num_pages - 1."""
        ...

    @property
    def max_length(self) -> int:
        """Positions that the draft model can take: start + len(tokens) of a row is at most this."""
        ...

    @property
    def vocab_size(self) -> int:
        """Tokens in the true vocabulary (without padding of the embedding)."""
        ...

    def forward(self, rows: Sequence[Row], num_children: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Write the rows' keys and values, and return the best next tokens after each wanted query token.

        Returns tokens int32 [N, num_children] and probabilities float32 [N, num_children], where N is the sum
        of num_outputs, in row order; each line sorted by falling probability. Probabilities are
        softmax(logits / (temperature or 1)) over the true vocabulary, so a line sums to at most 1. The arrays
        are the caller's. Two rows of one call must not write the same slot, and no row may read a slot that
        another row of the call writes. Raises ValueError for a malformed row, before anything is written.
        """
        ...

    def copy_slots(self, triples: Sequence[tuple[int, int, int]]) -> None:
        """Copy slots 0 .. used - 1 of each (source page, destination page, used slots), in all layers.

        Destinations are distinct and are no source of the same call. Raises ValueError otherwise.
        """
        ...


def count_outputs(rows: Sequence[Row], *, page_size: int, num_pages: int, max_length: int, vocab_size: int) -> int:
    """Check the rows of one forward and return N, the sum of their num_outputs.

    Raises ValueError that names the first malformed row.
    """
    num_outputs = 0
    for index, row in enumerate(rows):
        num_tokens = len(row.tokens)
        end = row.start + num_tokens
        num_row_pages = -(-end // page_size)
        if num_tokens == 0:
            raise ValueError(f"row {index} has no query tokens")
        if row.start < 0 or end > max_length:
            raise ValueError(f"row {index} has positions {row.start}..{end - 1}, the model takes 0..{max_length - 1}")
        if min(row.tokens) < 0 or max(row.tokens) >= vocab_size:
            raise ValueError(f"row {index} has a token outside 0..{vocab_size - 1}")
        if not 0 <= row.num_outputs <= num_tokens:
            raise ValueError(f"row {index} wants {row.num_outputs} outputs of {num_tokens} tokens")
        if num_row_pages > len(row.pages):
            raise ValueError(f"row {index} ends at position {end - 1} but has only {len(row.pages)} pages")
        if row.temperature < 0:
            raise ValueError(f"row {index} has temperature {row.temperature}")
        used = row.pages if num_row_pages == len(row.pages) else row.pages[:num_row_pages]
        least, greatest = _bounds(used)
        if least < 0 or greatest >= num_pages:
            raise ValueError(f"row {index} uses a page outside 0..{num_pages - 1}")
        num_outputs += row.num_outputs
    return num_outputs


def _bounds(pages: Sequence[int]) -> tuple[int, int]:
    if len(pages) <= _FEW_PAGES:
        return min(pages), max(pages)
    found = np.asarray(pages)
    return int(found.min()), int(found.max())
