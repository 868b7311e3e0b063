"""What every source of repeated text offers to the round and to the draft."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Continuation", "Found", "Queries", "Source", "Tokens", "beliefs", "check_tokens", "index_figures"]

Tokens = npt.NDArray[np.int32]
"""Token ids, one dimension, none negative."""


class Continuation(NamedTuple):
    """Tokens that followed earlier occurrences of the text's end, with the evidence for each.

    ``counts[i] / totals[i]`` is the relative frequency of ``tokens[i]`` after the context of step i. Thin evidence
    cuts nothing: the caller decides how many tokens to take.
    """

    tokens: list[int]
    match_length: int
    """Length of the context of the first token; no later token has a shorter one."""
    counts: list[int]
    """How often this token followed the context of its step, >= 1."""
    totals: list[int]
    """How often the context of this step occurred with some token behind it, >= counts."""
    beliefs: list[float]
    """How far to believe in this token before anything is learnt, see `beliefs`."""

    @classmethod
    def of(cls, tokens: list[int], match_length: int, counts: list[int], totals: list[int]) -> "Continuation":
        """With its beliefs."""
        return cls(tokens, match_length, counts, totals, beliefs(match_length, counts, totals))


def beliefs(match_length: int, counts: Sequence[int], totals: Sequence[int]) -> list[float]:
    """For each token the share of occurrences that went on so, trusted more the longer the match and the more there are.

    Compiled lookups bring their own, which are the same.
    """
    believed = []
    doubt = 0.5 ** (match_length / 2)
    for count, total in zip(counts, totals, strict=True):
        believed.append((1.0 - doubt) * count / (total + 0.1))
        doubt *= math.sqrt(0.5)
    return believed


def check_tokens(tokens: Sequence[int] | Tokens) -> None:
    """Raises ValueError if one is negative: sources keep negative numbers for themselves."""
    if len(tokens) and (tokens.min() if isinstance(tokens, np.ndarray) else min(tokens)) < 0:
        raise ValueError("token ids must not be negative")


class Queries(NamedTuple):
    """What is asked of a source. Query i: continue the text of ``keys[i]`` + ``tails[i, :tail_lengths[i]]``."""

    keys: npt.NDArray[np.int32]
    """[n]; a key may be asked about several times."""
    tails: npt.NDArray[np.int32]
    """[n, any width]; not kept."""
    tail_lengths: npt.NDArray[np.int32]
    """[n]"""
    max_tokens: npt.NDArray[np.int32]
    """[n]; 0: nothing is wanted. More than `Found` has room for: as many as it has."""

    @classmethod
    def of(cls, keys: Sequence[int], tails: Sequence[Sequence[int]], max_tokens: Sequence[int]) -> "Queries":
        """From lists."""
        lengths = np.array([len(tail) for tail in tails], np.int32)
        padded = np.zeros((len(tails), max(lengths, default=0)), np.int32)
        for row, tail in zip(padded, tails, strict=True):
            row[: len(tail)] = tail
        return cls(np.array(keys, np.int32), padded, lengths, np.array(max_tokens, np.int32))


class Found(NamedTuple):
    """What a source answers: row i continues the text of query i with ``tokens[i, :lengths[i]]``; length 0: nothing was found.

    What lies behind a row's length is undefined. Arrays may have more rows than there are queries.
    """

    lengths: npt.NDArray[np.int32]
    """[n]"""
    tokens: npt.NDArray[np.int32]
    """[n, width]"""
    beliefs: npt.NDArray[np.float32]
    """[n, width], see `beliefs`."""

    @classmethod
    def empty(cls, num_queries: int, width: int) -> "Found":
        """Room for so many answers of so many tokens."""
        shape = (num_queries, width)
        return cls(np.zeros(num_queries, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32))


class Source(ABC):
    """A source of repeated text. One thread at a time drives it.

    Keys are small integers that the caller chooses, and may use again after `stop`: state lies in arrays indexed by key.
    An unknown key raises KeyError, a doubly started one ValueError. Tails and texts hold no negative tokens: the
    ``_many`` forms trust their caller, the single ones raise ValueError.
    """

    name: str
    num_unindexed: int = 0
    """Requests and answers that found no room in an index."""

    @property
    def num_bytes(self) -> int:
        """Memory of its indexes that it shares with no other source before it in a list of `sources.Sources`."""
        return 0

    @abstractmethod
    def start(self, key: int, tokens: Tokens, tenant: str | None) -> None:
        """Begin a request with its prompt, which may only be queued for `work`. Tenants never see each other's texts."""

    def work(self, budget_tokens: int) -> None:  # noqa: B027  # most sources have nothing to do
        """Index at most so many queued tokens; long prompts do not hold up short ones. A small budget is cheap."""

    @abstractmethod
    def extend(self, key: int, tokens: Sequence[int]) -> None:
        """Append committed tokens."""

    @abstractmethod
    def lookup(self, key: int, tail: Sequence[int], max_tokens: int) -> Continuation | None:
        """What followed the longest suffix of text + tail that occurred before; the tail is not kept."""

    @abstractmethod
    def stop(self, key: int, keep: bool) -> None:
        """End the request. ``keep``: later requests of its tenant may be offered its output."""

    def forget(self) -> None:  # noqa: B027
        """Drop what was kept of requests that ended: the weights changed."""

    def extend_many(self, keys: npt.NDArray[np.int32], tokens: Tokens, starts: npt.NDArray[np.int32]) -> None:
        """Append ``tokens[starts[i] : starts[i + 1]]`` to the text of ``keys[i]``. keys: [n], each once; starts: [n + 1]."""
        for i, key in enumerate(keys.tolist()):
            self.extend(key, tokens[starts[i] : starts[i + 1]].tolist())

    def lookup_many(self, queries: Queries, found: Found) -> None:
        """Answer all queries."""
        width = found.tokens.shape[1]
        for i, key in enumerate(queries.keys.tolist()):
            limit = min(int(queries.max_tokens[i]), width)
            one = self.lookup(key, queries.tails[i, : queries.tail_lengths[i]].tolist(), limit) if limit > 0 else None
            num_found = 0 if one is None else len(one.tokens)
            found.lengths[i] = num_found
            if one is not None:
                found.tokens[i, :num_found] = one.tokens
                found.beliefs[i, :num_found] = one.beliefs


def index_figures(sources: Iterable[Source]) -> dict[str, int]:
    """Bytes of all indexes, and requests and answers that found no room in one, by their metrics' names."""
    sources = list(sources)
    return {
        "index_bytes": sum(source.num_bytes for source in sources),
        "unindexed": sum(source.num_unindexed for source in sources),
    }
