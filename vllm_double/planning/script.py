"""A scripted pair of models: tables for next-token distributions, and how long each forward takes.

The draft's distributions are drawn from a family (`Script`). The target's greedy token is drawn from the draft's distribution:
the draft is as often right as it expects. Models and retrieval depend on the last token alone: all methods read the same texts.

At a temperature T > 0 the target's logits are the draft's log-probabilities plus standard Gumbel numbers, so that its greedy
token is still drawn from the draft's distribution. The softmax of the logits over T is sampled with shared noise. A text then
depends on a seed and on the positions, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

__all__ = ["NUM_LISTED", "VOCAB_SIZE", "Script", "Tables", "Text", "Times", "texts"]

NUM_LISTED = 64
"""Places of the draft's list that a `Text` tells apart."""

VOCAB_SIZE = 1 << 30
"""So large that no text ever comes back to a token by chance."""

_QUANTILES = 1024
_MASK = (1 << 64) - 1
_SURE, _AGREES, _RANK, _NAME, _BEGINS, _LENGTH, _ELSEWHERE, _LOGIT, _SEED, _COIN = range(10)  # the purposes of hashes

_Number = TypeVar("_Number", int, npt.NDArray[np.uint64])
_Integers = int | npt.NDArray[np.int64]  # one for all tokens, or one for each


@dataclass(frozen=True, slots=True)
class Script:
    """The models' next tokens: functions of the last token and, at a temperature above 0, of the noise at its position.

    acceptance: mean of the draft's confidence in its first token, and how often that is the target's, in (0, 1].
    tail: if the first token is wrong, the next r tokens of the draft are wrong, too, with a chance of ``(r + 1) ** -tail``.
    spread: sum of the parameters of the beta distribution of the draft's confidence. If it is small, the draft is sure of some
        tokens and clueless about others.
    copied, copy_length: share of the text that repeats earlier text, and the mean length of such runs. Retrieval knows a run as
        soon as it has begun, and is wrong behind its end.
    temperature: 0 is greedy. Above 0 a token has only the NUM_LISTED successors of the draft's list; acceptance and tail are
        those at 0.
    """

    acceptance: float
    tail: float = 0.5
    spread: float = 1.5
    copied: float = 0.0
    copy_length: float = 12.0
    seed: int = 0
    temperature: float = 0.0

    def __post_init__(self) -> None:
        most = 1 - 1 / (max(self.copy_length, 1.0) + 1)
        for is_right, message in (
            (0.0 < self.acceptance <= 1.0, f"acceptance is {self.acceptance:g}, not in (0, 1]"),
            (0.0 <= self.temperature < math.inf, f"the temperature is {self.temperature:g}, not a number from 0 on"),
            (self.tail > 0 and self.spread > 0 and self.copy_length >= 1, "tail and spread must be positive, copy_length >= 1"),
            (0.0 <= self.copied <= most, f"the copied share is {self.copied:g}, not from 0 to {most:.3g}"),
        ):
            if not is_right:
                raise ValueError(message)


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
    """Hashes of a token give the draft's confidence behind it, the rank of the target's token in the draft's list, and how many
    of the next tokens retrieval knows.

    Seeds and positions matter at a temperature above 0 only. A position is that of the last token, whose logits are sampled.
    """

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
        # The first place is the surest one: if the tail's first token would be more probable, they change places.
        self._order = np.argsort(-probs, axis=1, kind="stable").astype(np.int32)
        probs = np.take_along_axis(probs, self._order.astype(np.int64), 1)
        if script.temperature > 0:
            with np.errstate(divide="ignore"):
                self._logits = np.log(probs)
            self._draft_log_probs = _log_softmax(self._logits / script.temperature)
            probs = np.exp(self._draft_log_probs)
        self._probs = probs.astype(np.float32)
        self._sure = sure.tolist()
        self._run_begins = script.copied / (1 - script.copied) / script.copy_length
        self._known: dict[tuple[int, int, int], int] = {}

    def children(
        self, tokens: npt.NDArray[np.uint64], count: int, seeds: _Integers = 0, positions: _Integers = 0
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """The draft's ``count`` best tokens behind each of ``tokens``, int32 and float32 [n, count]; count <= NUM_LISTED.

        At a temperature above 0 they are ranked by log-probability plus noise. The probabilities are the draft's without the
        noise; they do not fall in this order.
        """
        quantiles = self._quantiles(tokens)
        if self._script.temperature == 0.0:
            return self._listed(tokens, quantiles, count), self._probs[quantiles, :count]
        listed = self._listed(tokens, quantiles, NUM_LISTED)
        scores = self._draft_log_probs[quantiles] + _noise(seeds, positions, listed)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :count]
        return np.take_along_axis(listed, best, 1), np.take_along_axis(self._probs[quantiles], best, 1)

    def target(self, token: int, seed: int = 0, position: int = 0) -> int:
        """The target's token behind ``token``."""
        is_sampled = self._script.temperature > 0
        key = (token, seed, position) if is_sampled else (token, 0, 0)
        if key not in self._known:
            self._known[key] = int(self.targets(np.array([token]), seed, position)[0]) if is_sampled else self._greedy(token)
        return self._known[key]

    def targets(self, tokens: npt.NDArray[Any], seeds: _Integers, positions: _Integers) -> npt.NDArray[np.int32]:
        """The target's token behind each of ``tokens``, int32 [n]."""
        if self._script.temperature == 0.0:
            return np.array([self.target(token) for token in tokens.tolist()], np.int32)
        listed, drawn, _ = self._drawn(tokens.astype(np.uint64), seeds, positions)
        return np.take_along_axis(listed, drawn[:, None], 1)[:, 0]

    def verified(self, tokens: npt.NDArray[np.int32], seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """What a published method finds at each token of a text but the first.

        ranks, int64 [n - 1]: the place of the token in the draft's list, the likeliest first; NUM_LISTED if it is not listed.
        accepted, bool [n - 1]: whether the draft's token is accepted. At 0 this is whether the rank is 0. Above 0 the draft
        samples, and target token x follows an accepted draft token with probability min(1, draft_prob(x) / target_prob(x)).
        """
        before, positions = tokens[:-1].astype(np.uint64), np.arange(len(tokens) - 1)
        if self._script.temperature == 0.0:
            is_here = self._listed(before, self._quantiles(before), NUM_LISTED) == tokens[1:, None]
            ranks = np.where(is_here.any(axis=1), is_here.argmax(axis=1), NUM_LISTED)
            return ranks, ranks == 0
        _, ranks, chances = self._drawn(before, seed, positions)
        coins = self._uniforms(positions.astype(np.uint64) + np.uint64(self._hash(seed, _COIN)), _COIN)
        return ranks, coins < chances

    def log_probs(
        self, tokens: npt.NDArray[np.uint64]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """The draft's list behind each of ``tokens``, the likeliest first, and the log-probabilities of draft and target at a
        temperature above 0: int32 and float64 [n, NUM_LISTED]."""
        quantiles = self._quantiles(tokens)
        entries = self._hash(tokens, _LOGIT)[:, None] + np.arange(NUM_LISTED, dtype=np.uint64)
        logits = self._logits[quantiles] - np.log(-np.log(self._uniforms(entries, _LOGIT)))
        listed = self._listed(tokens, quantiles, NUM_LISTED)
        return listed, self._draft_log_probs[quantiles], _log_softmax(logits / self._script.temperature)

    def seed(self, prompt: int) -> int:
        """The seed of the text behind a prompt of one token, an int64."""
        return self._hash(prompt, _SEED) >> 1

    def copied_behind(self, token: int, left: int) -> int:
        """How many tokens retrieval knows behind ``token``, if it knew ``left`` of them (0: not this one) before it."""
        if left > 0:
            return left - 1
        if self._run_begins == 0.0 or self._uniform(token, _BEGINS) >= self._run_begins:
            return 0
        length = self._script.copy_length
        return 1 if length <= 1 else 1 + int(math.log(self._uniform(token, _LENGTH)) / math.log(1 - 1 / length))

    def elsewhere(self, token: int) -> int:
        """How the text goes on that a copied run was taken from."""
        return self._hash(token, _ELSEWHERE) % VOCAB_SIZE

    def _greedy(self, token: int) -> int:
        if self._uniform(token, _AGREES) < self._sure[self._hash(token, _SURE) % _QUANTILES]:
            rank = 0
        else:
            rank = int(min(self._uniform(token, _RANK) ** (-1.0 / self._script.tail), 1e9))
        return (self._hash(token, _NAME) % VOCAB_SIZE + rank) % VOCAB_SIZE

    def _drawn(
        self, tokens: npt.NDArray[np.uint64], seeds: _Integers, positions: _Integers
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """The draft's list [n, NUM_LISTED], the places in it of the tokens that the target draws [n], and the chances that
        these come from accepted draft tokens [n]."""
        listed, draft_log_probs, target_log_probs = self.log_probs(tokens)
        drawn = (target_log_probs + _noise(seeds, positions, listed)).argmax(axis=1).astype(np.int64)
        log_ratios = (draft_log_probs - target_log_probs)[np.arange(len(drawn)), drawn]
        return listed, drawn, np.exp(np.minimum(log_ratios, 0.0))

    def _quantiles(self, tokens: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        return (self._hash(tokens, _SURE) % _QUANTILES).astype(np.int64)

    def _listed(self, tokens: npt.NDArray[np.uint64], quantiles: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int32]:
        names = (self._hash(tokens, _NAME) % VOCAB_SIZE).astype(np.int32)
        return (names[:, None] + self._order[quantiles, :count]) % VOCAB_SIZE

    def _uniforms(self, numbers: npt.NDArray[np.uint64], salt: int) -> npt.NDArray[np.float64]:
        """Of 52 bits, so that neither 0 nor 1 comes."""
        return ((self._hash(numbers, salt) >> np.uint64(12)).astype(np.float64) + 0.5) / 2.0**52

    def _uniform(self, token: int, salt: int) -> float:
        return (self._hash(token, salt) + 0.5) / 2.0**64

    def _hash(self, tokens: _Number, salt: int) -> _Number:
        """splitmix64 of token and salt; numpy's uint64 arrays wrap around by themselves."""
        start = (((self._script.seed << 8) + salt) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & _MASK
        value = (tokens * 0x9E3779B97F4A7C15 + start) & _MASK
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
        return value ^ (value >> 31)  # type: ignore[return-value]  # numpy: uint64 & int is uint64, its stubs say signed


def _noise(seeds: _Integers, positions: _Integers, listed: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """The noise of each token of the lists [n, NUM_LISTED]."""
    from double_kernels import gumbel_noise  # imports torch

    return gumbel_noise(np.asarray(seeds, np.int64)[..., None], np.asarray(positions, np.int64)[..., None], listed)


def _log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Of each line; a logit may be -inf."""
    logits = logits - logits.max(axis=1, keepdims=True)
    normalised: npt.NDArray[np.float64] = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return normalised


@dataclass(frozen=True, slots=True)
class Text:
    """The target's text of one request, and what draft and retrieval know of it.

    tokens: int32 [n]; the first one is the prompt. seed: of the noise. ranks, accepted [n]: see `Tables.verified`; the prompt
    is neither listed nor accepted. copied [n]: how many tokens, from each place on, retrieval knows.
    agreed [n]: how many of the draft's tokens, from each place on, a published method accepts.
    """

    tokens: npt.NDArray[np.int32]
    seed: int
    ranks: list[int]
    accepted: list[bool]
    copied: list[int]
    agreed: list[int] = field(init=False)

    def __post_init__(self) -> None:
        agreed = [0] * len(self.accepted)
        for place in reversed(range(len(agreed) - 1)):
            agreed[place] = agreed[place + 1] + 1 if self.accepted[place] else 0
        object.__setattr__(self, "agreed", agreed)


def texts(tables: Tables, num_texts: int, num_tokens: int) -> list[Text]:
    """The target's texts of ``num_tokens`` tokens, each behind a prompt of its own of one token."""
    tokens = np.empty((num_texts, num_tokens), np.int32)
    tokens[:, 0] = 7919 * np.arange(1, num_texts + 1)
    seeds = np.array([tables.seed(prompt) for prompt in tokens[:, 0].tolist()], np.int64)
    for place in range(1, num_tokens):
        tokens[:, place] = tables.targets(tokens[:, place - 1], seeds, place - 1)
    return [_text(tables, line, seed) for line, seed in zip(tokens, seeds.tolist(), strict=True)]


def _text(tables: Tables, tokens: npt.NDArray[np.int32], seed: int) -> Text:
    copied = list(accumulate(tokens[:-1].tolist(), lambda left, token: tables.copied_behind(token, left), initial=0))
    ranks, accepted = tables.verified(tokens, seed)
    return Text(tokens, seed, [NUM_LISTED, *ranks.tolist()], [False, *accepted.tolist()], copied)
