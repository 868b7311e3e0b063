"""Pure functions of measurements: quantiles, round-wise ratios, looping text."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from statistics import median

__all__ = ["first_difference", "is_looping", "median_ratio", "quantile", "quiet_median", "share"]

LOOP_WINDOW = 64
LOOP_PERIOD = 16


def quantile(values: Sequence[float], fraction: float) -> float:
    """The quantile with linear interpolation between order statistics; ValueError without values."""
    if not values:
        raise ValueError("a quantile needs at least one value")
    if not 0 <= fraction <= 1:
        raise ValueError(f"a quantile's fraction lies in [0, 1], not {fraction}")
    ordered = sorted(values)
    place = fraction * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def quiet_median(values: Sequence[float], blocks: int = 40) -> float:
    """The median while the machine is quiet: of the medians of consecutive blocks the one at the tenth percentile.

    A virtual core runs at two speeds, 1.8 apart, as the other half of its physical core is used by somebody or not;
    the median of everything tells how often that was. ValueError with fewer values than blocks.
    """
    if len(values) < blocks:
        raise ValueError(f"{blocks} blocks need as many values, not {len(values)}")
    bounds = [len(values) * index // blocks for index in range(blocks + 1)]
    return quantile([median(values[start:end]) for start, end in itertools.pairwise(bounds)], 0.1)


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over rounds of ours / theirs, so that what disturbs a whole round cancels out."""
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"ratios pair the rounds one to one: {len(ours)} against {len(theirs)}")
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def is_looping(tokens: Sequence[int], window: int = LOOP_WINDOW, max_period: int = LOOP_PERIOD) -> bool:
    """Whether the last ``window`` tokens repeat with a period of at most ``max_period`` tokens.

    A shorter text has not had the time to loop, and does not count as looping.
    """
    if len(tokens) < window:
        return False
    tail = tokens[-window:]
    return any(all(tail[i] == tail[i - period] for i in range(period, window)) for period in range(1, max_period + 1))


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token that differs, the shorter length if one goes on, None if they are equal."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


def share(flags: Sequence[bool]) -> float:
    """Share of true flags; 0 of none."""
    return sum(flags) / len(flags) if flags else 0.0
