"""What the compiled commit measures for the rule of waiting."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vllm_double.target.calibration import NUM_TEMPERATURES
from vllm_double.target.speculation_trie import Records

__all__ = ["MEAN", "Means"]

MEAN = np.dtype([("total", "f8"), ("weight", "f8")])
_BATCH = np.dtype([("tokens_per_row", "f8"), ("chain_length", "f8"), ("num_rows", "i8")])


class Means(NamedTuple):
    """What the compiled commit measures: decaying sums and weights, MEAN [temperatures] or [1]."""

    accepted: Records
    """Of the draft's first tokens."""
    accepted_after_miss: Records
    """Of those behind an outcome that was not prepared."""
    hits_after_nothing: Records
    """How often an outcome was prepared, behind a forward without a chain."""
    hits_after_chain: Records
    hits_after_wait: Records
    tokens_of_hit: Records
    """Of a forward whose outcome before was prepared."""
    batch: Records
    """BATCH [1]: tokens that a row's forward gave lately, and draft tokens that it verified; and how many rows were counted."""

    @classmethod
    def empty(cls) -> Means:
        def mean(size: int) -> Records:
            return np.zeros(size, MEAN)

        batch = np.array([(1.0, 0.0, 0)], _BATCH)
        return cls(mean(NUM_TEMPERATURES), mean(NUM_TEMPERATURES), mean(1), mean(1), mean(1), mean(1), batch)
