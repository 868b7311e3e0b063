"""How often a token that a source gave probability q is what the target says: learnt from every committed token.

Each listed child of a node on the committed path is a labelled example, at no cost: it was the target's token, or it was
not. A table of decaying counts by source, probability bucket and temperature turns a source's own figure into a probability.
"""

from bisect import bisect_left
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["DRAFT_NAME", "NUM_BUCKETS", "NUM_TEMPERATURES", "TEMPERATURE_NAMES", "Calibration", "Tables", "temperature_bucket"]

DRAFT_NAME = "draft"
NUM_BUCKETS = 20
_TEMPERATURES = (0.0, 0.4, 0.85, 1.2)  # upper bounds of buckets
TEMPERATURE_NAMES = ("greedy", "T <= 0.4", "T <= 0.85", "T <= 1.2", "T > 1.2")
NUM_TEMPERATURES = len(TEMPERATURE_NAMES)
_PRIOR_TRIALS = 20.0

Floats = npt.NDArray[np.float64]


def temperature_bucket(temperature: float) -> int:
    """What temperatures are taken together, 0 .. NUM_TEMPERATURES - 1; 0: greedy."""
    return bisect_left(_TEMPERATURES, temperature)


class Tables(NamedTuple):
    """By source, temperature bucket and bucket of the source's own probability. Compiled steps read them and learn."""

    curve: Floats
    """[sources, NUM_TEMPERATURES, NUM_BUCKETS + 1]: the probability, in (0, 1); the last entry is that of certainty."""
    hits: Floats
    """[sources, NUM_TEMPERATURES, NUM_BUCKETS]"""
    trials: Floats
    """As ``hits``."""

    @classmethod
    def prior(cls, num_sources: int) -> "Tables":
        """Before anything is observed a source is taken at its word."""
        middles = (np.arange(NUM_BUCKETS) + 0.5) / NUM_BUCKETS
        shape = (num_sources, NUM_TEMPERATURES, NUM_BUCKETS)
        curve = np.empty((*shape[:2], NUM_BUCKETS + 1))
        curve[...] = [*middles, middles[-1]]
        hits = np.empty(shape)
        hits[...] = _PRIOR_TRIALS * middles
        return cls(curve, hits, np.full(shape, _PRIOR_TRIALS))


class Calibration:
    """The tables, and the sources' names: index 0 is the draft."""

    def __init__(self, sources: Iterable[str] = ()) -> None:
        """sources: those beside the draft; a name may come twice."""
        self.sources = list(dict.fromkeys([DRAFT_NAME, *sources]))
        self.tables = Tables.prior(len(self.sources))

    def curve(self, source: str, temperature: int) -> Floats:
        """The live table of one source, [NUM_BUCKETS + 1]. temperature: see `temperature_bucket`."""
        row: Floats = self.tables.curve[self.sources.index(source), temperature]
        return row

    def table(self) -> list[tuple[str, int, float, float, float]]:
        """Rows (source, temperature bucket, bucket's lower edge, observed frequency, trials) for a reliability plot."""
        curve, _, trials = self.tables
        return [
            (source, temperature, bucket / NUM_BUCKETS, float(curve[index, temperature, bucket]), float(count - _PRIOR_TRIALS))
            for index, source in sorted(enumerate(self.sources), key=lambda entry: entry[1])
            for temperature in range(NUM_TEMPERATURES)
            for bucket, count in enumerate(trials[index, temperature])
            if count > _PRIOR_TRIALS
        ]
