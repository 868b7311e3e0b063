"""How often a token that a source gave probability q is what the target says: learnt from every committed token.

Each listed child of a node on the committed path is a labelled example, at no cost: it was the target's token, or it was
not. A table of decaying counts by source, probability bucket and temperature turns a source's own figure into a chance.
"""

from typing import TypeAlias

__all__ = ["NUM_BUCKETS", "Calibration"]

NUM_BUCKETS = 20
_DECAY_AT = 4000.0  # trials in a bucket beyond which old ones count half
_PRIOR_TRIALS = 20.0

_Table: TypeAlias = tuple[list[float], list[float], list[float]]  # curve, hits, trials


class Calibration:
    """Observed acceptance by source, by bucket of the source's own probability, and by greedy or sampled."""

    def __init__(self) -> None:
        self._tables: dict[tuple[str, bool], _Table] = {}

    def curve(self, source: str, sampled: bool) -> list[float]:
        """The live table of one source, float [NUM_BUCKETS + 1]: entry int(raw * NUM_BUCKETS) is the chance, in (0, 1).

        sampled: whether the request has a temperature. Before anything is observed a source is taken at its word.
        """
        return self._table(source, sampled)[0]

    def _table(self, source: str, sampled: bool) -> _Table:
        table = self._tables.get((source, sampled))
        if table is None:
            middles = [(bucket + 0.5) / NUM_BUCKETS for bucket in range(NUM_BUCKETS)]
            hits = [_PRIOR_TRIALS * middle for middle in middles]
            table = self._tables[source, sampled] = [*middles, middles[-1]], hits, [_PRIOR_TRIALS] * NUM_BUCKETS
        return table

    def observe(self, source: str, raw: float, sampled: bool, agreed: bool) -> None:
        """Count one example: the target did (``agreed``) or did not continue with the token."""
        curve, hits, trials = self._tables.get((source, sampled)) or self._table(source, sampled)
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

    def table(self) -> list[tuple[str, bool, float, float, float]]:
        """Rows (source, sampled, bucket's lower edge, observed frequency, trials) for a reliability plot."""
        return [
            (
                source,
                sampled,
                bucket / NUM_BUCKETS,
                curve[bucket],
                trials[bucket] - _PRIOR_TRIALS,
            )
            for (source, sampled), (curve, _, trials) in sorted(self._tables.items())
            for bucket in range(NUM_BUCKETS)
            if trials[bucket] > _PRIOR_TRIALS
        ]
