"""A scripted pair of models: tables for next-token distributions, and how long each forward takes.

The draft's distributions are drawn from a family (`Script`), and the target's greedy token is drawn from the draft's
distribution, so that the draft is as right as it says. Both depend on the last token alone, and so does what retrieval knows:
every method that is simulated reads the same texts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

__all__ = ["NUM_LISTED", "VOCAB_SIZE", "Script", "Tables", "Text", "Times", "texts"]

NUM_LISTED = 64
"""Places of the draft's list that a `Text` tells apart."""

VOCAB_SIZE = 1 << 30
"""So large that no text ever comes back to a token by chance."""

_QUANTILES = 1024
_MASK = (1 << 64) - 1
_SURE, _AGREES, _RANK, _NAME, _BEGINS, _LENGTH, _ELSEWHERE = range(7)  # what a hash is drawn for

_Number = TypeVar("_Number", int, npt.NDArray[np.uint64])


@dataclass(frozen=True, slots=True)
class Script:
    """What the models say, as a function of the last token.

    acceptance: mean of the draft's confidence in its first token, and how often that is the target's, in (0, 1].
    tail: where it is not, the chance that it is none of the draft's next r either is ``(r + 1) ** -tail``.
    spread: sum of the parameters of the beta distribution of the draft's confidence; small: sure here, clueless there.
    copied, copy_length: share of the text that repeats something seen, in runs of so many tokens (mean); retrieval knows
        a run as soon as it has begun, and is wrong behind its end.
    """

    acceptance: float
    tail: float = 0.5
    spread: float = 1.5
    copied: float = 0.0
    copy_length: float = 12.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.acceptance <= 1.0:
            raise ValueError(f"acceptance is {self.acceptance:g}, not in (0, 1]")
        if not 0.0 <= self.copied < 1.0:
            raise ValueError(f"the copied share is {self.copied:g}, not in [0, 1)")
        if not (self.tail > 0 and self.spread > 0 and self.copy_length >= 1):
            raise ValueError("tail and spread must be positive, copy_length at least 1")
        if self.copied > self.copy_length / (self.copy_length + 1):
            raise ValueError(f"the copied share is {self.copied:g}: runs of {self.copy_length:g} tokens do not give that much")


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds. A target step over t tokens takes ``target + token * (t - 1)``; ``gap`` is what a step with a proposer takes on
    top, between two forwards. A draft forward of t tokens takes ``draft + draft_token * (t - 1)``.
    """

    target: float
    draft: float
    token: float = 0.0
    draft_token: float = 0.0
    gap: float = 0.0

    def step(self, num_tokens: int) -> float:
        """A target forward."""
        return self.target + self.token * (num_tokens - 1)

    def draft_forward(self, num_tokens: int) -> float:
        """A draft forward."""
        return self.draft + self.draft_token * (num_tokens - 1)


class Tables:
    """Hashes of a token give the draft's confidence behind it, the rank of the target's token in the draft's list, and whether
    retrieval knows how it goes on."""

    def __init__(self, script: Script) -> None:
        self._script = script
        if script.acceptance < 1.0:
            rng = np.random.default_rng(0)
            a, b = script.acceptance * script.spread, (1 - script.acceptance) * script.spread
            sure = np.quantile(rng.beta(a, b, 200_000), (np.arange(_QUANTILES) + 0.5) / _QUANTILES)
        else:
            sure = np.ones(_QUANTILES)
        ranks = np.arange(1, NUM_LISTED, dtype=np.float64)
        rest = ranks**-script.tail - (ranks + 1) ** -script.tail
        probs = np.concatenate([sure[:, None], (1 - sure)[:, None] * rest[None, :]], axis=1)
        # The first place is the surest one: where the tail's first token would be more probable, they change places.
        self._order = np.argsort(-probs, axis=1, kind="stable").astype(np.int32)
        self._probs = np.take_along_axis(probs, self._order.astype(np.int64), 1).astype(np.float32)
        self._sure = sure.tolist()
        self._run_begins = script.copied / (1 - script.copied) / script.copy_length
        self._known: dict[int, int] = {}

    def children(self, tokens: npt.NDArray[np.uint64], count: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """The draft's ``count`` best tokens behind each of ``tokens``, int32 and float32 [n, count]; count <= NUM_LISTED."""
        quantiles = (self._hash(tokens, _SURE) % _QUANTILES).astype(np.int64)
        names = (self._hash(tokens, _NAME) % VOCAB_SIZE).astype(np.int32)
        return (names[:, None] + self._order[quantiles, :count]) % VOCAB_SIZE, self._probs[quantiles, :count]

    def target(self, token: int) -> int:
        """The target's token behind ``token``."""
        known = self._known.get(token)
        if known is None:
            if self._uniform(token, _AGREES) < self._sure[self._hash(token, _SURE) % _QUANTILES]:
                rank = 0
            else:
                rank = int(min(self._uniform(token, _RANK) ** (-1.0 / self._script.tail), 1e9))
            known = self._known[token] = (self._hash(token, _NAME) % VOCAB_SIZE + rank) % VOCAB_SIZE
        return known

    def copied_behind(self, token: int, left: int) -> int:
        """How many tokens retrieval knows behind ``token``, where it knew ``left`` of them (0: not this one) before it."""
        if left > 0:
            return left - 1
        if self._run_begins == 0.0 or self._uniform(token, _BEGINS) >= self._run_begins:
            return 0
        length = self._script.copy_length
        return 1 if length <= 1 else 1 + int(math.log(self._uniform(token, _LENGTH)) / math.log(1 - 1 / length))

    def elsewhere(self, token: int) -> int:
        """How the text goes on that a copied run was taken from."""
        return self._hash(token, _ELSEWHERE) % VOCAB_SIZE

    def _uniform(self, token: int, salt: int) -> float:
        return (self._hash(token, salt) + 0.5) / 2.0**64

    def _hash(self, tokens: _Number, salt: int) -> _Number:
        """splitmix64 of token and salt; numpy's uint64 arrays wrap around by themselves."""
        start = (((self._script.seed << 8) + salt) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & _MASK
        value = (tokens * 0x9E3779B97F4A7C15 + start) & _MASK
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
        return value ^ (value >> 31)  # type: ignore[return-value]  # numpy: uint64 & int is uint64, its stubs say signed


@dataclass(frozen=True, slots=True)
class Text:
    """What the target says in one request, and what draft and retrieval know of it.

    tokens: int32 [n]; the first one is the prompt. ranks [n]: the place of each in the draft's list behind the token before it,
    NUM_LISTED where it is not listed. copied [n]: how many tokens, from each place on, retrieval knows.
    agreed [n]: how many tokens, from each place on, are the draft's first.
    """

    tokens: npt.NDArray[np.int32]
    ranks: list[int]
    copied: list[int]
    agreed: list[int] = field(init=False)

    def __post_init__(self) -> None:
        agreed = [0] * len(self.ranks)
        for place in reversed(range(len(agreed) - 1)):
            agreed[place] = agreed[place + 1] + 1 if self.ranks[place] == 0 else 0
        object.__setattr__(self, "agreed", agreed)


def texts(tables: Tables, num_texts: int, num_tokens: int) -> list[Text]:
    """The target's texts of ``num_tokens`` tokens, each behind a prompt of its own of one token."""
    return [_text(tables, 7919 * (index + 1), num_tokens) for index in range(num_texts)]


def _text(tables: Tables, prompt: int, num_tokens: int) -> Text:
    tokens, copied = [prompt], [0]
    while len(tokens) < num_tokens:
        copied.append(tables.copied_behind(tokens[-1], copied[-1]))
        tokens.append(tables.target(tokens[-1]))
    array = np.array(tokens, np.int32)
    listed, _ = tables.children(array[:-1].astype(np.uint64), NUM_LISTED)
    is_here = listed == array[1:, None]
    ranks = np.where(is_here.any(axis=1), is_here.argmax(axis=1), NUM_LISTED)
    return Text(array, [NUM_LISTED, *ranks.tolist()], copied)
