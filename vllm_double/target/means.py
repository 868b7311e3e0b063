"""What is measured for the rule of waiting, by the compiled commit and by waits."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vllm_double.target._round_steps import DECAY
from vllm_double.target.calibration import NUM_TEMPERATURES
from vllm_double.target.speculation_trie import Records

__all__ = ["Means", "observe", "value"]

MEAN = np.dtype([("total", "f8"), ("weight", "f8")])
_BATCH = np.dtype([("tokens_per_row", "f8"), ("chain_length", "f8"), ("num_rows", "i8")])


class Means(NamedTuple):
    """Decaying sums and weights, MEAN [temperatures] or [1]."""

    accepted: Records
    """Of the draft's first tokens."""
    accepted_after_miss: Records
    """Of those behind an outcome that was not prepared."""
    hits_after_nothing: Records
    """How often an outcome was prepared, behind a forward without a chain."""
    hits_after_chain: Records
    hits_after_wait: Records
    first_s: Records
    """Seconds until a wait's first token came."""
    next_s: Records
    """Seconds until the next one came."""
    tokens_of_hit: Records
    """Of a forward whose outcome before was prepared."""
    batch: Records
    """BATCH [1]: tokens that a row's forward gave lately, and draft tokens that it verified; and how many rows were counted."""

    @classmethod
    def empty(cls) -> Means:
        def mean(size: int) -> Records:
            return np.zeros(size, MEAN)

        batch = np.array([(1.0, 0.0, 0)], _BATCH)
        by_temperature = mean(NUM_TEMPERATURES), mean(NUM_TEMPERATURES)
        return cls(*by_temperature, mean(1), mean(1), mean(1), mean(1), mean(1), mean(1), batch)


def observe(sums: Records, number: float) -> None:
    """One more value of a decaying mean, MEAN [1]."""
    sums["total"] = sums["total"] * DECAY + number
    sums["weight"] = sums["weight"] * DECAY + 1.0


def value(sums: Records, guess: float) -> float:
    """The mean, which begins with a guess that counts as one value."""
    total, weight = sums[0].item()
    return float((guess + total) / (1.0 + weight))
