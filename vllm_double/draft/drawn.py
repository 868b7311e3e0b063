"""What a draft that knows the target's noise lists for a sampled request: chances to be drawn instead of probabilities."""

import math

import numpy as np
from double_kernels.ranking import row_noise

from vllm_double.draft.arena import Ints, Records
from vllm_double.jit import view_part

__all__ = ["DRAW", "list_chances"]

DRAW = np.dtype([("seed", "i8"), ("log_q_weight", "f4"), ("noise_weight", "f4"), ("coverage", "f4")], align=True)
"""A request's seed, and the weights of `NoiseCoupling`."""
_LEAST_SCORE = -1e30  # nothing may be known of a list
_LEAST_TOTAL = 1e-9


@view_part
def list_chances(draws: Records, slot: int, position: int, tokens: Ints, listed: Records) -> None:
    """Turn the draft's probabilities of listed tokens, which are drawn behind ``position``, into `NoiseCoupling`'s chances."""
    draw = draws[slot]
    row_noise(draw.seed, position, tokens, listed["noise"])
    best, total = _LEAST_SCORE, 0.0
    for place in range(len(listed)):
        entry = listed[place]
        entry.log_q = math.log(entry.prob) if entry.prob > 0.0 else -np.inf
        entry.prob = draw.log_q_weight * entry.log_q + draw.noise_weight * entry.noise
        best = max(best, entry.prob)
    for place in range(len(listed)):
        listed[place].prob = math.exp(listed[place].prob - best)
        total += listed[place].prob
    for place in range(len(listed)):
        listed[place].prob *= draw.coverage / max(total, _LEAST_TOTAL)
