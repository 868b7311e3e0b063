"""How often a token that a source gave probability q is what the target says: learnt from every committed token.

Each listed child of a node on the committed path is a labelled example, at no cost: it was the target's token, or it was
not. A table of decaying counts by source, probability bucket and temperature turns a source's own figure into a chance.
"""

__all__ = ["NUM_BUCKETS", "Calibration"]

NUM_BUCKETS = 20
_DECAY_AT = 4000.0  # trials in a bucket beyond which old ones count half
_PRIOR_TRIALS = 20.0


class Calibration:
    """Observed acceptance by source, by bucket of the source's own probability, and by greedy or sampled."""

    def __init__(self) -> None:
        self._curves: dict[tuple[str, bool], list[float]] = {}
        self._hits: dict[tuple[str, bool], list[float]] = {}
        self._trials: dict[tuple[str, bool], list[float]] = {}

    def curve(self, source: str, sampled: bool) -> list[float]:
        """The live table of one source, float [NUM_BUCKETS + 1]: entry int(raw * NUM_BUCKETS) is the chance, in (0, 1).

        sampled: whether the request has a temperature. Before anything is observed a source is taken at its word.
        """
        key = source, sampled
        if key not in self._curves:
            middles = [(bucket + 0.5) / NUM_BUCKETS for bucket in range(NUM_BUCKETS)]
            self._curves[key] = [*middles, middles[-1]]
            self._trials[key] = [_PRIOR_TRIALS] * NUM_BUCKETS
            self._hits[key] = [_PRIOR_TRIALS * middle for middle in middles]
        return self._curves[key]

    def observe(self, source: str, raw: float, sampled: bool, agreed: bool) -> None:
        """Count one example: the target did (``agreed``) or did not continue with the token."""
        curve = self.curve(source, sampled)
        trials, hits = self._trials[source, sampled], self._hits[source, sampled]
        bucket = min(int(raw * NUM_BUCKETS), NUM_BUCKETS - 1)
        trials[bucket] += 1.0
        hits[bucket] += agreed
        if trials[bucket] > _DECAY_AT:
            trials[bucket] /= 2
            hits[bucket] /= 2
        curve[bucket] = min(max(hits[bucket] / trials[bucket], 1e-4), 0.995)
        curve[NUM_BUCKETS] = curve[NUM_BUCKETS - 1]

    def table(self) -> list[tuple[str, bool, float, float, float]]:
        """Rows (source, sampled, bucket's lower edge, observed frequency, trials) for a reliability plot."""
        return [
            (
                source,
                sampled,
                bucket / NUM_BUCKETS,
                curve[bucket],
                self._trials[source, sampled][bucket] - _PRIOR_TRIALS,
            )
            for (source, sampled), curve in sorted(self._curves.items())
            for bucket in range(NUM_BUCKETS)
            if self._trials[source, sampled][bucket] > _PRIOR_TRIALS
        ]
