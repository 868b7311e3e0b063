"""How often a token that a source gave probability q is what the target says: learnt from every committed token.

Each listed child of a node on the committed path is a labelled example, at no cost: it was the target's token, or it was
not. A table of decaying counts by source, probability bucket and temperature turns a source's own figure into a chance.
"""

from bisect import bisect_left
from typing import TypeAlias

__all__ = ["NUM_BUCKETS", "NUM_TEMPERATURES", "TEMPERATURE_NAMES", "Calibration", "temperature_bucket"]

NUM_BUCKETS = 20
_TEMPERATURES = (0.0, 0.4, 0.85, 1.2)  # upper bounds of buckets
TEMPERATURE_NAMES = ("greedy", "T <= 0.4", "T <= 0.85", "T <= 1.2", "T > 1.2")
NUM_TEMPERATURES = len(TEMPERATURE_NAMES)
_DECAY_AT = 4000.0  # trials in a bucket beyond which old ones count half
_PRIOR_TRIALS = 20.0

_Table: TypeAlias = tuple[list[float], list[float], list[float]]  # curve, hits, trials


def temperature_bucket(temperature: float) -> int:
    """What temperatures are taken together, 0 .. NUM_TEMPERATURES - 1; 0: greedy."""
    return bisect_left(_TEMPERATURES, temperature)


class Calibration:
    """Observed acceptance by source, by bucket of the source's own probability, and by temperature bucket."""

    def __init__(self) -> None:
        self._tables: dict[tuple[str, int], _Table] = {}

    def curve(self, source: str, temperatures: int) -> list[float]:
        """The live table of one source, float [NUM_BUCKETS + 1]: entry int(raw * NUM_BUCKETS) is the chance, in (0, 1).

        temperatures: see `temperature_bucket`. Before anything is observed a source is taken at its word.
        """
        return self._table(source, temperatures)[0]

    def _table(self, source: str, temperatures: int) -> _Table:
        table = self._tables.get((source, temperatures))
        if table is None:
            middles = [(bucket + 0.5) / NUM_BUCKETS for bucket in range(NUM_BUCKETS)]
            hits = [_PRIOR_TRIALS * middle for middle in middles]
            table = self._tables[source, temperatures] = [*middles, middles[-1]], hits, [_PRIOR_TRIALS] * NUM_BUCKETS
        return table

    def observe(self, source: str, raw: float, temperatures: int, agreed: bool) -> None:
        """Count one example: the target did (``agreed``) or did not continue with the token."""
        curve, hits, trials = self._tables.get((source, temperatures)) or self._table(source, temperatures)
        bucket = int(raw * NUM_BUCKETS)
        if bucket >= NUM_BUCKETS:
            bucket = NUM_BUCKETS - 1
        tried, hit = trials[bucket] + 1.0, hits[bucket] + agreed
        if tried > _DECAY_AT:
            tried, hit = tried / 2, hit / 2
        trials[bucket], hits[bucket] = tried, hit
        chance = hit / tried
        curve[bucket] = chance if 1e-4 <= chance <= 0.995 else min(max(chance, 1e-4), 0.995)
        if bucket == NUM_BUCKETS - 1:
            curve[NUM_BUCKETS] = curve[bucket]

    def table(self) -> list[tuple[str, int, float, float, float]]:
        """Rows (source, temperature bucket, bucket's lower edge, observed frequency, trials) for a reliability plot."""
        return [
            (
                source,
                temperatures,
                bucket / NUM_BUCKETS,
                curve[bucket],
                trials[bucket] - _PRIOR_TRIALS,
            )
            for (source, temperatures), (curve, _, trials) in sorted(self._tables.items())
            for bucket in range(NUM_BUCKETS)
            if trials[bucket] > _PRIOR_TRIALS
        ]
