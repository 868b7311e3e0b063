"""A stand-in for ``double_kernels.gumbel_noise``, with its signature and other numbers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["gumbel_noise"]


def gumbel_noise(
    seeds: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], tokens: npt.NDArray[np.int32]
) -> npt.NDArray[np.float32]:
    """Standard Gumbel numbers by seed, position and token; the arrays are broadcast."""
    value = _mixed(_mixed(_mixed(seeds.astype(np.uint64)) + positions.astype(np.uint64)) + tokens.astype(np.uint64))
    uniform = ((value >> np.uint64(12)) + 0.5) / 2.0**52
    return np.asarray(-np.log(-np.log(uniform)), np.float32)


def _mixed(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64."""
    value = value * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x94D049BB133111EB)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
