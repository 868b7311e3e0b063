"""What every source of repeated text offers to the proposer."""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Continuation", "Retriever", "Tokens", "beliefs", "check_tokens"]

Tokens = npt.NDArray[np.int32]
"""Token ids, one dimension, none negative."""


class Continuation(NamedTuple):
    """Tokens that followed earlier occurrences of the text's end, with the evidence for each.

    ``counts[i] / totals[i]`` is the relative frequency of ``tokens[i]`` after the context of step i. Nothing
    is cut where the evidence gets thin: the caller decides how many tokens to take.
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
    """Raises ValueError where one is negative: sources keep negative numbers for themselves."""
    if len(tokens) and (tokens.min() if isinstance(tokens, np.ndarray) else min(tokens)) < 0:
        raise ValueError("token ids must not be negative")


class Retriever(Protocol):
    """Sources are driven by one thread. An unknown key raises KeyError, a doubly started one ValueError."""

    name: str

    def start(self, key: int, tokens: Tokens, tenant: str | None) -> None:
        """Begin a request with its prompt, which may only be queued: `work` indexes it. Tenants see nothing of each other's."""

    def work(self, budget_tokens: int) -> None:
        """Index at most so many queued tokens; long prompts do not hold up short ones."""

    def extend(self, key: int, tokens: Sequence[int]) -> None:
        """Append committed tokens."""

    def lookup(self, key: int, tail: Sequence[int], max_tokens: int) -> Continuation | None:
        """What followed the longest suffix of text + tail that occurred before; the tail is not kept."""

    def stop(self, key: int, keep: bool) -> None:
        """End the request. ``keep``: later ones of its tenant may be offered what it was answered."""

    def forget(self) -> None:
        """Drop what was kept of requests that ended: the weights changed."""
