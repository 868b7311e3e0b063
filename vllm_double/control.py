"""How many tokens to verify: a token is added while it pays for what it costs the target. And whether the draft works at all.

The target's step time is learnt as ``fixed + per_token * query tokens``. Tokens are taken in falling order of their chance
to be accepted, as long as each raises the expected number of tokens per second of the whole batch.
"""

from collections.abc import Sequence

__all__ = ["DraftUse", "StepCost", "chain_lengths", "speed_up"]

_DECAY = 0.98
_TRIAL_TOKENS = 64  # by which the draft is judged
_LEAST_SHARE = 0.02  # of the committed tokens that the draft has to bring
_FIRST_REST, _LONGEST_REST = 256, 1024  # tokens; each rest is twice as long as the one before, while trials fail
_PRIOR_TOKENS_FOR_DOUBLE = 24.0  # before anything is measured: so many more query tokens double a step's time


class StepCost:
    """Decaying least squares of step seconds over query tokens; outliers are cut."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def observe(self, num_tokens: int, seconds: float) -> None:
        """One measured target step (without prefill) of ``num_tokens`` query tokens."""
        if self._weight >= 10:
            fixed, per_token = self.estimate()
            seconds = min(seconds, 3.0 * (fixed + per_token * num_tokens))
        self._weight = self._weight * _DECAY + 1.0
        self._x = self._x * _DECAY + num_tokens
        self._y = self._y * _DECAY + seconds
        self._xx = self._xx * _DECAY + num_tokens * num_tokens
        self._xy = self._xy * _DECAY + num_tokens * seconds

    def estimate(self) -> tuple[float, float]:
        """(fixed seconds, seconds per query token); only their ratio matters before anything is measured."""
        if self._weight == 0.0:
            return 1.0, 1.0 / _PRIOR_TOKENS_FOR_DOUBLE
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - mean_x * mean_x
        covariance = self._xy / self._weight - mean_x * mean_y
        # The prior keeps the slope sane while all steps have had the same size.
        prior_slope = mean_y / (mean_x + _PRIOR_TOKENS_FOR_DOUBLE)
        prior_weight = 4.0
        slope = (covariance * self._weight + prior_slope * prior_weight) / (variance * self._weight + prior_weight)
        slope = min(max(slope, mean_y * 1e-3), mean_y / max(mean_x, 1.0))
        return max(mean_y - slope * mean_x, 1e-9), slope


def chain_lengths(reaches: Sequence[Sequence[float]], fixed: float, per_token: float) -> list[int]:
    """Tokens to verify for each row of the batch.

    reaches: for each row the falling chances that its path is accepted up to each token.
    fixed, per_token: the target's step time in seconds without and per query token.
    """
    num_rows = len(reaches)
    expected = float(num_rows)
    seconds = fixed + per_token * num_rows
    threshold = 0.0
    for reach in sorted((reach for row in reaches for reach in row), reverse=True):
        if reach * seconds <= per_token * expected:
            threshold = reach
            break
        expected += reach
        seconds += per_token
    return [sum(reach > threshold for reach in row) for row in reaches]


def speed_up(
    rounds: float, rows: float, committed: float, proposed: float, propose_seconds: float, fixed: float, per_token: float
) -> float:
    """Tokens per second of some rounds over those of plain decoding, as far as the target's process can tell.

    rounds: target forwards, over ``rows`` > 0 rows in all, which gave ``committed`` tokens. proposed: tokens to verify.
    propose_seconds: time that proposing took. fixed, per_token: as for `chain_lengths`. What the draft takes from a target
    that shares its machine is in ``fixed`` either way, and not seen.
    """
    plain = fixed * rounds + per_token * rows
    return committed / rows * plain / (plain + per_token * proposed + propose_seconds)


class DraftUse:
    """Whether the draft model is of use to one request. Where retrieval brings all that is accepted, the draft only takes
    memory bandwidth from a target beside it, and time from other requests: it rests, and is tried again.
    """

    __slots__ = ("_brought", "_committed", "_next_rest", "_rest")

    def __init__(self) -> None:
        self._committed = self._brought = 0
        self._rest, self._next_rest = 0, _FIRST_REST

    @property
    def is_resting(self) -> bool:
        return self._rest > 0

    def observe(self, committed: int, brought: int) -> bool:
        """So many tokens were committed, ``brought`` of them by the draft; True where it rests from now on."""
        if self._rest > 0:
            self._rest -= min(committed, self._rest)
            return False
        self._committed += committed
        self._brought += brought
        if self._committed < _TRIAL_TOKENS:
            return False
        is_of_use = self._brought >= _LEAST_SHARE * self._committed
        self._committed = self._brought = 0
        if is_of_use:
            self._next_rest = _FIRST_REST
        else:
            self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, _LONGEST_REST)
        return not is_of_use
