"""A draft engine without a model: pages hold token ids, and a forward reads the context back through them.

Its next-token distribution is a function of exactly the context that the pages hold, so a bug in how branches
share, fork, rewind or free pages changes the output, or stops the test: every slot also holds a hash of all
tokens up to it, as a real key depends on all tokens before it, and a slot whose hash does not fit the prefix
that it is read behind raises AssertionError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_double.draft.engine.base import Batch, DraftEngine, Row
from vllm_double.prefix_hash import mix

__all__ = ["FakeEngine", "NextToken", "count_outputs", "hashed_logits", "rows_of"]

NextToken = Callable[[Sequence[int]], npt.NDArray[np.float64]]
"""From a context (all tokens of the text so far) to the logits of the next token, float64 [vocab_size]."""

_POISON = -1
_EMPTY_PREFIX = 0


def hashed_logits(vocab_size: int, *, seed: int = 0, spread: float = 2.0) -> NextToken:
    """A NextToken that draws normal logits, of deviation `spread`, from the hash of the whole context."""

    def next_token(context: Sequence[int]) -> npt.NDArray[np.float64]:
        prefix = mix(_EMPTY_PREFIX, seed)
        for token in context:
            prefix = mix(prefix, token)
        return np.random.default_rng(prefix).normal(scale=spread, size=vocab_size)

    return next_token


class FakeEngine:
    """DraftEngine whose model is the function `next_token`; for tests and scripted worlds.

    Raises AssertionError where a real engine would silently answer nonsense: a poisoned slot is read or
    copied, a slot holds a token that was written behind another prefix, two rows of a forward write one slot,
    or a row reads a slot that another row of the same forward writes.
    """

    def __init__(
        self,
        next_token: NextToken,
        *,
        vocab_size: int,
        num_pages: int = 64,
        page_size: int = 4,
        max_length: int = 256,
    ) -> None:
        self.page_size = page_size
        self.num_pages = num_pages
        self.max_length = max_length
        self.vocab_size = vocab_size
        self.num_forwards = 0
        self.num_query_tokens = 0
        self.num_copied_slots = 0
        self._next_token = next_token
        self._tokens = np.full((num_pages, page_size), _POISON, dtype=np.int32)
        self._prefixes = np.zeros((num_pages, page_size), dtype=np.uint64)

    def forward(self, batch: Batch, num_children: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """See DraftEngine.forward. Ties go to the lower token id."""
        num_outputs = count_outputs(batch, self)
        if not 1 <= num_children <= self.vocab_size:
            raise ValueError(f"num_children is {num_children}, the vocabulary has {self.vocab_size} tokens")
        rows = rows_of(batch)
        # All cached contexts are read before anything is written, so that a row never profits from a
        # neighbour.
        cached = [self._read(index, row) for index, row in enumerate(rows)]
        self._write(rows, cached)
        self.num_forwards += 1
        tokens = np.empty((num_outputs, num_children), dtype=np.int32)
        probs = np.empty((num_outputs, num_children), dtype=np.float32)
        output = 0
        for row, (context, _) in zip(rows, cached, strict=True):
            text = [*context, *row.tokens]
            self.num_query_tokens += len(row.tokens)
            for length in range(len(text) - row.num_outputs + 1, len(text) + 1):
                tokens[output], probs[output] = self._best(text[:length], row, num_children)
                output += 1
        return tokens, probs

    def copy_slots(self, triples: Sequence[tuple[int, int, int]]) -> None:
        """See DraftEngine.copy_slots. What lies behind the used slots of a destination becomes poison."""
        sources = {source for source, _, _ in triples}
        destinations = [destination for _, destination, _ in triples]
        if len(set(destinations)) != len(destinations) or sources & set(destinations):
            raise ValueError("destinations of a copy must be distinct and no source of the same call")
        for source, destination, used in triples:
            if not (0 <= source < self.num_pages and 0 <= destination < self.num_pages):
                raise ValueError(f"copy of page {source} to {destination}, pages are 0..{self.num_pages - 1}")
            if not 0 <= used <= self.page_size:
                raise ValueError(f"copy of {used} slots, a page has {self.page_size}")
        for source, destination, used in triples:
            assert (self._tokens[source, :used] != _POISON).all(), f"copy of poisoned slots of page {source}"
            self._tokens[destination] = _POISON
            self._tokens[destination, :used] = self._tokens[source, :used]
            self._prefixes[destination, :used] = self._prefixes[source, :used]
            self.num_copied_slots += used

    def poison(self, pages: Iterable[int]) -> None:
        """Forget what the pages hold, so that a use after they were freed is found."""
        for page in pages:
            self._tokens[page] = _POISON

    def context(self, pages: Sequence[int], length: int) -> list[int]:
        """The `length` tokens that a branch with this block table holds; checked as in a forward."""
        row = Row(pages=pages, start=length, tokens=(), num_outputs=0, temperature=0.0)
        return self._read(0, row)[0]

    def _read(self, index: int, row: Row) -> tuple[list[int], int]:
        """The tokens before the row's query tokens, and the hash of them."""
        context: list[int] = []
        prefix = _EMPTY_PREFIX
        for position in range(row.start):
            page, slot = row.pages[position // self.page_size], position % self.page_size
            token = int(self._tokens[page, slot])
            where = f"row {index}, position {position}, page {page}, slot {slot}"
            assert token != _POISON, f"poisoned slot was read: {where}"
            prefix = mix(prefix, token)
            assert int(self._prefixes[page, slot]) == prefix, f"slot was written by another branch: {where}"
            context.append(token)
        return context, prefix

    def _write(self, rows: Sequence[Row], cached: Sequence[tuple[list[int], int]]) -> None:
        writers: dict[tuple[int, int], int] = {}
        for index, (row, (_, prefix)) in enumerate(zip(rows, cached, strict=True)):
            for position, token in enumerate(row.tokens, start=row.start):
                page, slot = row.pages[position // self.page_size], position % self.page_size
                other = writers.setdefault((page, slot), index)
                assert other == index, f"rows {other} and {index} both write page {page}, slot {slot}"
                prefix = mix(prefix, token)
                self._tokens[page, slot] = token
                self._prefixes[page, slot] = prefix
        for index, row in enumerate(rows):
            for position in range(row.start):
                page, slot = row.pages[position // self.page_size], position % self.page_size
                writer = writers.get((page, slot))
                assert writer is None, f"row {index} reads page {page}, slot {slot}, which row {writer} writes"

    def _best(
        self, context: Sequence[int], row: Row, num_children: int
    ) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
        logits = self._next_token(context) / (row.temperature or 1.0)
        assert logits.shape == (self.vocab_size,), f"next_token gave logits of shape {logits.shape}"
        weights = np.exp(logits - logits.max())
        probs = weights / weights.sum()
        scores = np.log(probs)
        if row.noise_scale > 0:
            from double_kernels import gumbel_noise  # imports torch

            seed, position = np.array([row.seed], np.int64), np.array([len(context) - 1], np.int64)
            noise = gumbel_noise(seed, position, np.arange(self.vocab_size))
            scores += row.noise_scale * noise
        kept = is_kept(probs, row)
        probs[~kept] = 0.0
        scores[~kept] = -np.inf
        best = np.argsort(-scores, kind="stable")[:num_children]
        return best, probs[best]


def is_kept(probs: npt.NDArray[np.float64], row: Row) -> npt.NDArray[np.bool_]:
    """bool [vocab_size]: the tokens that the target draws from, if these are its probabilities; see `logit_floors`."""
    if np.isnan(probs).any():
        return np.ones(len(probs), np.bool_)  # without a distribution there is nothing to filter
    falling = np.sort(probs)[::-1]
    kept = falling >= row.min_p * falling[0]
    if 0 < row.top_k <= len(falling):
        kept &= falling >= falling[row.top_k - 1]
    if row.top_p < 1:
        mass = falling * kept
        kept &= np.cumsum(mass) - mass < row.top_p * mass.sum()
    least: np.float64 = falling[kept].min()
    return np.greater_equal(probs, least)


def rows_of(batch: Batch) -> list[Row]:
    """The rows that a batch was made of."""
    ends = batch.query_start.tolist()
    rows = zip(batch.starts.tolist(), batch.num_outputs.tolist(), batch.sampling.tolist(), strict=True)
    return [
        Row(pages, start, batch.token_ids[begin:end].tolist(), num_outputs, temperature, seed, *sampling)
        for pages, begin, end, (start, num_outputs, (seed, temperature, *sampling)) in zip(
            batch.pages.tolist(), ends[:-1], ends[1:], rows, strict=True
        )
    ]


def count_outputs(batch: Batch, engine: DraftEngine) -> int:
    """Check the rows of one forward and return N, the sum of their num_outputs.

    Raises ValueError that names the first malformed row.
    """
    if not len(batch):
        return 0
    for is_wrong, what in _faults(batch, engine):
        if is_wrong.any():
            raise ValueError(f"row {is_wrong.nonzero()[0][0]} {what}")
    return int(batch.num_outputs.sum())


def _faults(batch: Batch, engine: DraftEngine) -> Iterator[tuple[Any, str]]:
    """For each possible fault, bool [rows] and a message."""
    lengths = np.diff(batch.query_start)
    yield lengths < 1, "has no query tokens"
    ends = batch.starts + lengths
    yield (batch.starts < 0) | (ends > engine.max_length), f"has positions outside 0..{engine.max_length - 1}"
    is_foreign = (batch.token_ids < 0) | (batch.token_ids >= engine.vocab_size)
    yield np.logical_or.reduceat(is_foreign, batch.query_start[:-1]), f"has a token outside 0..{engine.vocab_size - 1}"
    yield (batch.num_outputs < 0) | (batch.num_outputs > lengths), "wants fewer outputs than none, or more than it has tokens"
    num_row_pages, width = -(-ends // engine.page_size), batch.pages.shape[1]
    yield num_row_pages > width, f"has more positions than {width} pages hold"
    pages = batch.pages[:, : num_row_pages.max()]
    is_used = np.arange(pages.shape[1]) < num_row_pages[:, None]
    yield (((pages < 0) | (pages >= engine.num_pages)) & is_used).any(axis=1), f"uses a page outside 0..{engine.num_pages - 1}"
    yield batch.temperatures < 0, "has a negative temperature"
    yield batch.sampling["noise_scale"] < 0, "has a negative noise scale"
