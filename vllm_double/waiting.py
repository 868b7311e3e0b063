"""Whether the target waits for the draft's first tokens behind an outcome that was not prepared.

After such an outcome the target has nothing to verify, and its next forward gives one token. The draft's first token behind it
comes with the draft's next forward. To wait for it pays if the tokens that it brings are more than what the whole batch would
have decoded meanwhile. That is an optimal-stopping problem whose one-step look-ahead rule is optimal, because each further token
is accepted less often than the one before (Chow and Robbins 1961). All its figures are measured: nothing here reads a clock.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_double.calibration import NUM_TEMPERATURES

__all__ = ["WaitRule"]

_DECAY = 0.98
_PRIOR_TRIALS = 8.0
_PRIOR_ACCEPTANCE = 0.4
_FIRST_STEPS = 1.5  # draft steps until the first token comes, before any wait was measured: the rest of one, and one
_SILENCE = 1.1  # draft steps without a heartbeat after which the worker is late
_MOST_STEPS = 8


class WaitRule:
    """What waiting costs and brings, as measured, and the decision. Seconds and tokens."""

    def __init__(self) -> None:
        self.step_s = 0.0  # of the draft: 0 before the worker has reported it
        self._first_s, self._first_weight = 0.0, 0.0
        self._tried = [_PRIOR_TRIALS] * NUM_TEMPERATURES
        self._accepted = [_PRIOR_TRIALS * _PRIOR_ACCEPTANCE] * NUM_TEMPERATURES

    # ---- measurements -----------------------------------------------------------------------------------------

    def observe_token(self, temperatures: int, accepted: bool) -> None:
        """The draft's first token behind an outcome that was not prepared was, or was not, what the target said."""
        self._tried[temperatures] = self._tried[temperatures] * _DECAY + 1.0
        self._accepted[temperatures] = self._accepted[temperatures] * _DECAY + accepted

    def observe_first(self, seconds: float) -> None:
        """A wait's first token came after so many seconds."""
        self._first_weight = self._first_weight * _DECAY + 1.0
        self._first_s += (seconds - self._first_s) / self._first_weight

    def observe_no_wait(self) -> None:
        """There was no wait: what earlier ones took counts less, so that one is tried again some day."""
        self._first_weight *= _DECAY

    def acceptance(self, temperatures: int) -> float:
        """Of the first token behind an outcome that was not prepared."""
        return self._accepted[temperatures] / self._tried[temperatures]

    @property
    def first_s(self) -> float:
        """Expected seconds until the first token comes."""
        expected = _FIRST_STEPS * self.step_s
        return (expected + self._first_weight * self._first_s) / (1.0 + self._first_weight)

    @property
    def silence_s(self) -> float:
        """Seconds without a heartbeat after which the worker is not waited for."""
        return _SILENCE * self.step_s

    # ---- decisions --------------------------------------------------------------------------------------------

    def pays_to_begin(self, acceptances: Sequence[float], tokens_per_s: float) -> bool:
        """Whether to wait where nothing has come. acceptances: of each row that has nothing to verify.

        tokens_per_s: what the whole batch decodes without waiting.
        """
        if not acceptances or self.step_s <= 0.0:
            return False
        gain, seconds, reaches = 0.0, self.first_s, list(acceptances)
        for _ in range(_MOST_STEPS):
            gain += sum(reaches)
            if gain > tokens_per_s * seconds:
                return True
            seconds += self.step_s
            reaches = [reach * acceptance for reach, acceptance in zip(reaches, acceptances, strict=True)]
        return False

    def pays_to_go_on(self, reaches: Sequence[float], tokens_per_s: float) -> bool:
        """Whether to wait for one more draft step. reaches: of each waiting row, the chance that its next token is accepted."""
        return sum(reaches) > tokens_per_s * self.step_s
