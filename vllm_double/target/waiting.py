"""Whether the target waits for the draft's next tokens.

After an outcome that was not prepared the target has nothing to verify, and its next forward gives one token; after an unlikely
outcome it has little. The draft's next token comes with the draft's next forward. To wait for it pays if it brings more tokens
than the whole batch would have decoded meanwhile. That is an optimal-stopping problem. Its one-step look-ahead rule is optimal,
because each further token is accepted less often than the one before (Chow and Robbins 1961). All its figures are measured:
nothing here reads a clock by itself.

A forward that verifies nothing has one merit: the draft prepares for its one outcome alone, and so misses the next outcome less
often than behind a chain. What that is worth is charged to the wait.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_double.target._round_steps import DECAY
from vllm_double.target.calibration import NUM_TEMPERATURES
from vllm_double.target.draft_link import DraftLink
from vllm_double.target.means import MEAN, Means
from vllm_double.target.speculation_trie import Records
from vllm_double.target.stats import Counters

__all__ = ["Prospects", "Rates", "WaitRule", "Waiting"]

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]

_FIRST_STEPS = 1.5  # draft steps until the first token comes, before any wait was measured: the rest of one, and one
_SILENCE = 1.5  # draft steps without a heartbeat after which the worker is late
_MOST_STEPS = 8


class _Mean:
    """A decaying mean that begins with a guess of so much weight. It may lie in an array."""

    def __init__(self, guess: float, guess_weight: float, sums: Records | None = None) -> None:
        self._guess, self._guess_weight = guess, guess_weight
        self._sums = np.zeros(1, MEAN) if sums is None else sums

    def observe(self, value: float) -> None:
        self.fade()
        self._sums["total"] += value
        self._sums["weight"] += 1.0

    def fade(self) -> None:
        self._sums["total"] *= DECAY
        self._sums["weight"] *= DECAY

    def value(self, guess: float | None = None) -> float:
        guess = self._guess if guess is None else guess
        total, weight = self._sums[0].item()
        mean: float = (guess * self._guess_weight + total) / (self._guess_weight + weight)
        return mean


@dataclass(frozen=True, slots=True)
class Rates:
    """What the target does without waiting. tokens_per_s: of the batch. token_s: what a token to verify adds to a step."""

    tokens_per_s: float
    token_s: float

    @property
    def price(self) -> float:
        """Tokens that the batch decodes while one more is verified."""
        return self.tokens_per_s * self.token_s


class Prospects(NamedTuple):
    """The draft's next tokens for some rows.

    accept_probs, float64 [rows]: that it is accepted. acceptances, float64 [rows]: that the one behind it is, too, and so on.
    are_missed, bool [rows]: nothing was prepared for the row.
    """

    accept_probs: Floats
    acceptances: Floats
    are_missed: npt.NDArray[np.bool_]

    def only(self, which: npt.NDArray[np.bool_]) -> Prospects:
        """Of some of the rows."""
        return Prospects(self.accept_probs[which], self.acceptances[which], self.are_missed[which])


class WaitRule:
    """What waiting costs and brings, as measured, and the decision. Seconds and tokens."""

    def __init__(self) -> None:
        self.step_s = 0.0  # of the draft: 0 before the worker has reported it
        self.means = means = Means.empty()
        self._first_s, self._next_s = _Mean(0.0, 1.0), _Mean(0.0, 1.0)
        places = range(NUM_TEMPERATURES)
        self._accepted = [_Mean(0.5, 8.0, means.accepted[place : place + 1]) for place in places]
        self._accepted_after_miss = [_Mean(0.5, 8.0, means.accepted_after_miss[place : place + 1]) for place in places]
        self._hits_after_nothing = _Mean(0.9, 8.0, means.hits_after_nothing)
        self._hits_after_chain = _Mean(0.8, 8.0, means.hits_after_chain)
        self._hits_after_wait = _Mean(0.8, 8.0, means.hits_after_wait)
        self._tokens_of_hit = _Mean(2.0, 8.0, means.tokens_of_hit)

    # ---- measurements -----------------------------------------------------------------------------------------

    def observe_first(self, seconds: float) -> None:
        """A wait's first token came after so many seconds."""
        self._first_s.observe(seconds)

    def observe_next(self, seconds: float) -> None:
        """The next token of a wait came so many seconds after the one before."""
        self._next_s.observe(seconds)

    def observe_no_wait(self) -> None:
        """There was no wait: what earlier ones took counts less, so that one is tried again some day."""
        self._first_s.fade()
        self._hits_after_wait.fade()

    def prospects(self, temperatures: Ints, lengths: Ints, accept_probs: Floats) -> Prospects:
        """Of rows with paths of such lengths, all of whose tokens are accepted with these probabilities."""
        everywhere = np.array([mean.value() for mean in self._accepted])
        after_miss = np.array([mean.value(guess) for mean, guess in zip(self._accepted_after_miss, everywhere, strict=True)])
        are_missed = lengths == 0
        acceptances = np.where(are_missed, after_miss[temperatures], everywhere[temperatures])
        return Prospects(np.where(are_missed, 1.0, accept_probs) * acceptances, acceptances, are_missed)

    @property
    def first_s(self) -> float:
        """Expected seconds until the first token comes."""
        return self._first_s.value(_FIRST_STEPS * self.step_s)

    @property
    def next_s(self) -> float:
        """Expected seconds until the next one comes."""
        return self._next_s.value(self.step_s)

    @property
    def silence_s(self) -> float:
        """Seconds without a heartbeat after which the worker is not waited for."""
        return _SILENCE * self.step_s

    def rates(self, fixed: float, per_token: float, num_rows: int) -> Rates:
        """What the batch decodes, by what its forwards have given lately and take: see `StepCost.estimate`."""
        tokens_per_row, chain_length, _ = self.means.batch[0].item()
        seconds = fixed + per_token * num_rows * (1.0 + chain_length)
        return Rates(tokens_per_row * num_rows / seconds, per_token)

    # ---- decisions --------------------------------------------------------------------------------------------

    def pay_to_verify(self, prospects: Prospects, rates: Rates) -> npt.NDArray[np.bool_]:
        """Whose next token brings more than its verification costs, bool [rows]."""
        return prospects.accept_probs > rates.price

    def pays_to_begin(self, prospects: Prospects, rates: Rates) -> bool:
        """Whether to wait for the next tokens of these rows."""
        accept_probs, acceptances, are_missed = prospects
        if not len(accept_probs) or self.step_s <= 0.0:
            return False
        best = gain = 0.0
        seconds, next_s = self.first_s, self.next_s
        for _ in range(_MOST_STEPS):
            worth = _worth(accept_probs, rates)
            gain += worth
            best = max(best, gain - rates.tokens_per_s * seconds)
            if worth <= rates.tokens_per_s * next_s:
                break  # nor is any later one
            seconds += next_s
            accept_probs = accept_probs * acceptances
        # An outcome that is prepared is worth this much more than one for which the target waits.
        worth_of_hit = max((self._tokens_of_hit.value() - 1.0) * int(are_missed.sum()) - best, 0.0)
        fewer_hits = self._hits_after_nothing.value() - self._hits_after_wait.value(self._hits_after_chain.value())
        return best > max(fewer_hits, 0.0) * worth_of_hit

    def pays_to_go_on(self, prospects: Prospects, rates: Rates) -> bool:
        """Whether to wait for one more draft step."""
        return _worth(prospects.accept_probs, rates) > rates.tokens_per_s * self.next_s


def _worth(accept_probs: Floats, rates: Rates) -> float:
    """Tokens that verifying these brings, less what they cost; who is not worth it is not verified."""
    return float(np.maximum(accept_probs - rates.price, 0.0).sum())


class Waiting:
    """The target's waits for the draft. ``clock`` gives seconds."""

    def __init__(self, link: DraftLink, counters: Counters, clock: Callable[[], float]) -> None:
        self.rule = WaitRule()
        self._link = link
        self._counters = counters
        self._clock = clock
        self._late_beat = -1  # the heartbeat of a worker that was waited for in vain

    def pays(self, prospects: Prospects, rates: Rates) -> bool:
        """Whether to wait for rows that the worker may draft for."""
        if self.rule.pays_to_begin(prospects, rates):
            return True
        self.rule.observe_no_wait()
        return False

    def is_prompt(self) -> bool:
        """Whether the worker can be expected to answer at once: it is not late, and reads nobody's prompt."""
        if self._link.heartbeat == self._late_beat:
            return False
        self.rule.step_s = self._counters.worker.get("step_seconds", 0.0)
        return self._link.all_have_drafted()

    def wait(self, look: Callable[[], tuple[int, Prospects]], rates: Rates, num_known: int) -> Generator[None, None, float]:
        """Wait for the next draft tokens of some rows, while that pays; returns the seconds.

        look: takes in what has come; returns how many tokens are known, and what would come next. num_known: tokens before.
        """
        rule, link = self.rule, self._link
        began = seen = came = self._clock()
        beat, num_before, has_come = link.heartbeat, num_known, False
        while True:
            yield
            num_found, prospects = look()
            now = self._clock()
            if link.heartbeat != beat:
                beat, seen = link.heartbeat, now
            if num_found > num_known:
                if has_come:
                    rule.observe_next(now - came)
                else:
                    rule.observe_first(now - began)
                num_known, came, has_come = num_found, now, True
                if not rule.pays_to_go_on(prospects, rates):
                    break
            if now - seen > rule.silence_s or now - came > rule.first_s + rule.silence_s:
                self._late_beat = beat
                break
        self._counters.waited(now - began, num_known > num_before)
        return now - began
