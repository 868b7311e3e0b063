"""What every source of repeated text offers to the proposer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Continuation", "Retriever", "Tokens"]

Tokens = npt.NDArray[np.int32]
"""Token ids, one dimension, none negative."""


@dataclass(frozen=True, slots=True)
class Continuation:
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


class Retriever(Protocol):
    """Sources are driven by one thread. An unknown key raises KeyError, a doubly started one ValueError."""

    name: str

    def start(self, key: int, tokens: Tokens) -> None:
        """Begin a request with its prompt, which may only be queued: `work` indexes it."""

    def work(self, budget_tokens: int) -> None:
        """Index at most so many queued tokens; long prompts do not hold up short ones."""

    def extend(self, key: int, tokens: Sequence[int]) -> None:
        """Append committed tokens."""

    def rewind(self, key: int, length: int) -> None:
        """Keep only the first ``length`` tokens."""

    def lookup(self, key: int, tail: Sequence[int], max_tokens: int) -> Continuation | None:
        """What followed the longest suffix of text + tail that occurred before; the tail is not kept."""

    def stop(self, key: int) -> None:
        """Forget the request."""

    def forget(self) -> None:
        """Drop what was kept of requests that ended: the weights changed."""
