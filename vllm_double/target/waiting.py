"""Whether the target waits for the draft's first tokens behind an outcome that was not prepared.

After such an outcome the target has nothing to verify, and its next forward gives one token. The draft's first token behind it
comes with the draft's next forward. To wait for it pays if it brings more tokens than the whole batch would have decoded
meanwhile. That is an optimal-stopping problem whose one-step look-ahead rule is optimal, because each further token is accepted
less often than the one before (Chow and Robbins 1961). All its figures are measured: nothing here reads a clock by itself.

A forward that verifies nothing has one merit: the draft prepares for its one outcome alone, and so misses the next outcome less
often than behind a chain. What that is worth is charged to the wait.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_double.target._round_steps import DECAY
from vllm_double.target.calibration import NUM_TEMPERATURES
from vllm_double.target.draft_link import DraftLink
from vllm_double.target.means import MEAN, Means
from vllm_double.target.speculation_trie import Records
from vllm_double.target.stats import Counters

__all__ = ["Rates", "WaitRule", "Waiting"]

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

    def acceptance(self, temperature: int) -> float:
        """Of the first token behind an outcome that was not prepared."""
        return self._accepted_after_miss[temperature].value(self._accepted[temperature].value())

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
        tokens_per_row, chain_length = self.means.batch[0].item()
        seconds = fixed + per_token * num_rows * (1.0 + chain_length)
        return Rates(tokens_per_row * num_rows / seconds, per_token)

    # ---- decisions --------------------------------------------------------------------------------------------

    def pays_to_begin(self, acceptances: Sequence[float], rates: Rates) -> bool:
        """Whether to wait if nothing has come. acceptances: of each row that has nothing to verify."""
        if not len(acceptances) or self.step_s <= 0.0:
            return False
        best = gain = 0.0
        seconds, next_s, accept_probs = self.first_s, self.next_s, list(acceptances)
        for _ in range(_MOST_STEPS):
            gain += _worth(accept_probs, rates)
            best = max(best, gain - rates.tokens_per_s * seconds)
            seconds += next_s
            accept_probs = [prob * acceptance for prob, acceptance in zip(accept_probs, acceptances, strict=True)]
        # An outcome that is prepared is worth this much more than one for which the target waits.
        worth_of_hit = max((self._tokens_of_hit.value() - 1.0) * len(acceptances) - best, 0.0)
        fewer_hits = self._hits_after_nothing.value() - self._hits_after_wait.value(self._hits_after_chain.value())
        return best > max(fewer_hits, 0.0) * worth_of_hit

    def pays_to_go_on(self, accept_probs: Sequence[float], rates: Rates) -> bool:
        """Whether to wait for one more draft step. accept_probs: of each waiting row's next token."""
        return _worth(accept_probs, rates) > rates.tokens_per_s * self.next_s


def _worth(accept_probs: Sequence[float], rates: Rates) -> float:
    """Tokens that verifying these brings, less what they cost; who is not worth it is not verified."""
    price = rates.tokens_per_s * rates.token_s
    return sum([max(prob - price, 0.0) for prob in accept_probs])


class Waiting:
    """The target's waits for the draft. ``clock`` gives seconds."""

    def __init__(self, link: DraftLink, counters: Counters, clock: Callable[[], float]) -> None:
        self.rule = WaitRule()
        self._link = link
        self._counters = counters
        self._clock = clock
        self._late_beat = -1  # the heartbeat of a worker that was waited for in vain

    def pays(self, temperatures: Sequence[int], rates: Rates) -> bool:
        """Whether to wait for rows that have nothing to verify. temperatures: of each that the worker may draft for."""
        acceptance = [self.rule.acceptance(temperature) for temperature in range(NUM_TEMPERATURES)]
        if self.rule.pays_to_begin([acceptance[temperature] for temperature in temperatures], rates):
            return True
        self.rule.observe_no_wait()
        return False

    def is_prompt(self) -> bool:
        """Whether the worker can be expected to answer at once: it is not late, and reads nobody's prompt."""
        if self._link.heartbeat == self._late_beat:
            return False
        self.rule.step_s = self._counters.worker.get("step_seconds", 0.0)
        return self._link.all_have_drafted()

    def wait(
        self, look: Callable[[], tuple[int, list[float]]], temperatures: Sequence[int], rates: Rates
    ) -> Generator[None, None, float]:
        """Wait for the first draft tokens of some rows, while that pays; returns the seconds.

        look: takes in what has come; returns how many tokens are known, and for each row the probability that all of its tokens
        are accepted.
        """
        rule, link = self.rule, self._link
        began = seen = came = self._clock()
        beat, num_known = link.heartbeat, 0
        while True:
            yield
            num_before, (num_known, accept_probs) = num_known, look()
            now = self._clock()
            if link.heartbeat != beat:
                beat, seen = link.heartbeat, now
            if num_known > num_before:
                if num_before:
                    rule.observe_next(now - came)
                else:
                    rule.observe_first(now - began)
                came = now
                next_probs = [prob * rule.acceptance(t) for prob, t in zip(accept_probs, temperatures, strict=True)]
                if not rule.pays_to_go_on(next_probs, rates):
                    break
            if now - seen > rule.silence_s or now - came > rule.first_s + rule.silence_s:
                self._late_beat = beat
                break
        self._counters.waited(now - began, num_known > 0)
        return now - began
