"""What a draft that knows the target's noise lists for a sampled request: chances to be drawn instead of probabilities.

Imports torch with `double_kernels`.
"""

import math

import numpy as np
from double_kernels.ranking import row_noise

from vllm_double.draft.arena import Ints, Records
from vllm_double.jit import view_part

__all__ = ["list_chances", "weigh"]

_LEAST_SCORE = -1e30  # nothing may be known of a list
_LEAST_TOTAL = 1e-9


@view_part
def list_chances(draws: Records, slot: int, position: int, tokens: Ints, listed: Records) -> None:
    """Turn the draft's probabilities of listed tokens, which are drawn behind ``position``, into chances. draws: DRAW."""
    row_noise(draws[slot].seed, position, tokens, listed["noise"])
    for place in range(len(listed)):
        entry = listed[place]
        entry.log_q = math.log(entry.prob) if entry.prob > 0.0 else -np.inf
    weigh(draws, slot, listed)


@view_part
def weigh(draws: Records, slot: int, listed: Records) -> None:
    """The chances of `NoiseCoupling.weights` for listed tokens with log q and noise."""
    draw, best, total = draws[slot], _LEAST_SCORE, 0.0
    for place in range(len(listed)):
        entry = listed[place]
        entry.prob = draw.log_q_weight * entry.log_q + draw.noise_weight * entry.noise
        best = max(best, entry.prob)
    for place in range(len(listed)):
        listed[place].prob = math.exp(listed[place].prob - best)
        total += listed[place].prob
    for place in range(len(listed)):
        listed[place].prob *= draw.coverage / max(total, _LEAST_TOTAL)
