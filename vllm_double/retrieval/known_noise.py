"""What sources believe of a sampled request, whose noise is known: the chance that a token is drawn."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_double.retrieval.base import Found

__all__ = ["know_noise", "warm_up"]


def know_noise(
    answers: Iterable[Found],
    is_sampled: npt.NDArray[np.bool_],
    seeds: npt.NDArray[np.int64],
    positions: npt.NDArray[Any],
) -> None:
    """Turn the beliefs of answers to queries of sampled requests into chances, in place: see `double_kernels.draw_chances`.

    is_sampled, seeds: of the queries' requests, [n]. positions: of the last tokens before the answers, [n].
    """
    if not is_sampled.any():
        return
    from double_kernels import draw_chances  # imports torch

    num = len(seeds)
    seeds, places = np.ascontiguousarray(seeds), np.ascontiguousarray(positions, np.int64)
    for found in answers:
        lengths = np.where(is_sampled, found.lengths[:num], 0).astype(np.int32)
        draw_chances(seeds, places, found.tokens[:num], lengths, found.beliefs[:num])


def warm_up() -> None:
    """Compile, so that no request waits for that."""
    from double_kernels.ranking import compiled_chances

    compiled_chances()
