"""What a target step costs, learnt as ``fixed + per_token * query tokens``."""

__all__ = ["StepCost"]

_DECAY = 0.98
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
