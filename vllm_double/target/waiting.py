"""Whether the target waits for the draft's first tokens behind an outcome that was not prepared.

After such an outcome the target has nothing to verify, and its next forward gives one token. The draft's first token behind it
comes with the draft's next forward. To wait for it pays if it brings more tokens than the whole batch would have decoded
meanwhile. That is an optimal-stopping problem whose one-step look-ahead rule is optimal, because each further token is accepted
less often than the one before (Chow and Robbins 1961). All its figures are measured: nothing here reads a clock.

A forward that verifies nothing has one merit: the draft prepares for its one outcome alone, and so misses the next outcome less
often than behind a chain. What that is worth is charged to the wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_double.target.calibration import NUM_TEMPERATURES

__all__ = ["Rates", "WaitRule"]

_DECAY = 0.98
_FIRST_STEPS = 1.5  # draft steps until the first token comes, before any wait was measured: the rest of one, and one
_SILENCE = 1.5  # draft steps without a heartbeat after which the worker is late
_MOST_STEPS = 8


class _Mean:
    """A decaying mean that begins with a guess of so much weight."""

    __slots__ = ("_guess", "_guess_weight", "_sum", "_weight")

    def __init__(self, guess: float, guess_weight: float) -> None:
        self._guess, self._guess_weight = guess, guess_weight
        self._sum = self._weight = 0.0

    def observe(self, value: float) -> None:
        self._sum = self._sum * _DECAY + value
        self._weight = self._weight * _DECAY + 1.0

    def fade(self) -> None:
        self._sum *= _DECAY
        self._weight *= _DECAY

    def value(self, guess: float | None = None) -> float:
        guess = self._guess if guess is None else guess
        return (guess * self._guess_weight + self._sum) / (self._guess_weight + self._weight)


@dataclass(frozen=True, slots=True)
class Rates:
    """What the target does without waiting. tokens_per_s: of the batch. token_s: what a token to verify adds to a step."""

    tokens_per_s: float
    token_s: float


class WaitRule:
    """What waiting costs and brings, as measured, and the decision. Seconds and tokens."""

    def __init__(self) -> None:
        self.step_s = 0.0  # of the draft: 0 before the worker has reported it
        self._first_s, self._next_s = _Mean(0.0, 1.0), _Mean(0.0, 1.0)
        self._accepted = [_Mean(0.5, 8.0) for _ in range(NUM_TEMPERATURES)]  # of the draft's first tokens
        self._accepted_after_miss = [_Mean(0.5, 8.0) for _ in range(NUM_TEMPERATURES)]
        self._hits_after_nothing = _Mean(0.9, 8.0)  # how often an outcome was prepared, behind a forward without a chain
        self._hits_after_chain = _Mean(0.8, 8.0)
        self._hits_after_wait = _Mean(0.8, 8.0)
        self._tokens_of_hit = _Mean(2.0, 8.0)  # of a forward whose outcome before was prepared

    # ---- measurements -----------------------------------------------------------------------------------------

    def observe_token(self, temperatures: int, after_miss: bool, accepted: bool) -> None:
        """Whether the draft's first token behind a text was the target's. after_miss: the text was an outcome that was not
        prepared."""
        self._accepted[temperatures].observe(accepted)
        if after_miss:
            self._accepted_after_miss[temperatures].observe(accepted)

    def observe_forward(self, waited: bool, num_verified: int, was_hit: bool, num_tokens: int, is_hit: bool) -> None:
        """A row's forward. waited: for its chain of ``num_verified``. was_hit, is_hit: something was ready before it, and
        behind the ``num_tokens`` that it gave."""
        if was_hit:
            self._tokens_of_hit.observe(num_tokens)
        if waited:
            self._hits_after_wait.observe(is_hit)
        elif num_verified:
            self._hits_after_chain.observe(is_hit)
        else:
            self._hits_after_nothing.observe(is_hit)

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

    def acceptance(self, temperatures: int) -> float:
        """Of the first token behind an outcome that was not prepared."""
        return self._accepted_after_miss[temperatures].value(self._accepted[temperatures].value())

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

    # ---- decisions --------------------------------------------------------------------------------------------

    def pays_to_begin(self, acceptances: Sequence[float], rates: Rates) -> bool:
        """Whether to wait if nothing has come. acceptances: of each row that has nothing to verify."""
        if not acceptances or self.step_s <= 0.0:
            return False
        best = gain = 0.0
        seconds, reaches = self.first_s, list(acceptances)
        for _ in range(_MOST_STEPS):
            gain += _worth(reaches, rates)
            best = max(best, gain - rates.tokens_per_s * seconds)
            seconds += self.next_s
            reaches = [reach * acceptance for reach, acceptance in zip(reaches, acceptances, strict=True)]
        # An outcome that is prepared is worth this much more than one for which the target waits.
        worth_of_hit = max((self._tokens_of_hit.value() - 1.0) * len(acceptances) - best, 0.0)
        fewer_hits = self._hits_after_nothing.value() - self._hits_after_wait.value(self._hits_after_chain.value())
        return best > max(fewer_hits, 0.0) * worth_of_hit

    def pays_to_go_on(self, reaches: Sequence[float], rates: Rates) -> bool:
        """Whether to wait for one more draft step. reaches: of each waiting row, the chance that its next token is accepted."""
        return _worth(reaches, rates) > rates.tokens_per_s * self.next_s


def _worth(reaches: Sequence[float], rates: Rates) -> float:
    """Tokens that verifying these brings, less what they cost; who is not worth it is not verified."""
    price = rates.tokens_per_s * rates.token_s
    return sum(max(reach - price, 0.0) for reach in reaches)
