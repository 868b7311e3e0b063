"""How often a token that a source gave probability q is what the target says: learnt from every committed token.

Each listed child of a node on the committed path is a labelled example, at no cost: it was the target's token, or it was
not. A table of decaying counts by source, probability bucket and temperature turns a source's own figure into a chance.
"""

__all__ = ["Calibration"]

_NUM_BUCKETS = 20
_DECAY_AT = 4000.0  # trials in a bucket beyond which old ones count half
_PRIOR_TRIALS = 20.0


class Calibration:
    """Observed acceptance by (source, bucket of the source's own probability, greedy or sampled)."""

    def __init__(self) -> None:
        self._hits: dict[tuple[str, int, bool], float] = {}
        self._trials: dict[tuple[str, int, bool], float] = {}
        self._probs: dict[tuple[str, int, bool], float] = {}

    @staticmethod
    def _key(source: str, raw: float, temperature: float) -> tuple[str, int, bool]:
        return source, min(int(raw * _NUM_BUCKETS), _NUM_BUCKETS - 1), temperature > 0

    def probability(self, source: str, raw: float, temperature: float) -> float:
        """The chance that the target agrees with a token to which ``source`` gave ``raw``; in (0, 1)."""
        key = source, min(int(raw * _NUM_BUCKETS), _NUM_BUCKETS - 1), temperature > 0
        prob = self._probs.get(key)
        # Within an unseen bucket the source's own figure is the best guess.
        return prob if prob is not None else min(max(raw, 1e-4), 0.995)

    def observe(self, source: str, raw: float, temperature: float, agreed: bool) -> None:
        """Count one example: the target did (``agreed``) or did not continue with the token."""
        key = self._key(source, raw, temperature)
        trials = self._trials.get(key)
        if trials is None:
            middle = (key[1] + 0.5) / _NUM_BUCKETS
            trials, hits = _PRIOR_TRIALS, _PRIOR_TRIALS * middle
        else:
            hits = self._hits[key]
        trials, hits = trials + 1.0, hits + agreed
        if trials > _DECAY_AT:
            trials, hits = trials / 2, hits / 2
        self._trials[key], self._hits[key] = trials, hits
        self._probs[key] = min(max(hits / trials, 1e-4), 0.995)

    def table(self) -> list[tuple[str, float, bool, float, float]]:
        """Rows (source, bucket's lower edge, sampled, observed frequency, trials) for a reliability plot."""
        return [
            (source, bucket / _NUM_BUCKETS, sampled, self._probs[source, bucket, sampled], trials)
            for (source, bucket, sampled), trials in sorted(self._trials.items())
        ]
