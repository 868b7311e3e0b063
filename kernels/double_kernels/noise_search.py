"""A search for the tokens of one row that may be the best with noise, compiled by numba.

The noise of nearly all tokens needs no logarithm. A token whose logit lies d / scale below the best score that was seen passes
it only if its uniform number is below exp(-d), thus if its 32-bit hash is below 2 ** (32 - floor(d / log(2))): of 150,000
tokens a few dozen are.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["MAX_COUNT", "capacity", "compiled_search"]

MAX_COUNT = 256  # best scores, which are kept in order by insertion
_BLOCK = 256
_LOG2_E = math.log2(math.e)
# Relative errors of float32 in a score, and of the noise, whose logarithms are of float32: both several times what they are.
_SCORE_ERROR = 1e-6
_NOISE_ERROR = 1e-4
_LARGEST_NOISE = 23.0
_LARGEST_COMPLEMENT = 2.0**-24
_LEAST_SCALE = np.float32(1e-30)  # of a smaller one more tokens pass
_SIGNATURE = (
    "int64(float32[::1], uint32[::1], uint32, float32, float32, float32, int64, float64[::1], int32[::1], float64[::1])"
)


def capacity(count: int) -> int:
    """How many candidates of a row there is room for."""
    return 2048 + 16 * count


@functools.cache
def compiled_search() -> Any:
    """`_search`, from numba's cache where that works."""
    import numba  # here: vLLM's workers break if numba is imported before they are set up, and a GPU needs none

    options = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(_SIGNATURE, cache=True, **options)(_search)
    except Exception:  # no folder to write to, or a damaged file; a compiler error is raised again below
        return numba.njit(_SIGNATURE, **options)(_search)


def _search(
    logits: npt.NDArray[np.float32],
    words: npt.NDArray[np.uint32],
    prefix: np.uint32,
    temperature: np.float32,
    scale: np.float32,
    floor: np.float32,
    count: int,
    best: npt.NDArray[np.float64],
    tokens: npt.NDArray[np.int32],
    scores: npt.NDArray[np.float64],
) -> int:
    """Write the candidates of a row to `tokens`, rising, and return how many; -1 if there is no room for them.

    Among them are all tokens that are `count` best ones by a score in float32, but for those below `floor`, which is a
    finite number.

    words: hash_word of all tokens.
    prefix: hash_prefix of seed and position.
    best, scores: for the caller's memory; float64 [count], and as many as `tokens`.
    """
    multiplier_3, multiplier_4 = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)
    addend, num_bytes, five = np.uint32(0xE6546B64), np.uint32(16), np.uint32(5)
    one, zero, most = np.float32(1), np.float32(0), np.float32(31)
    vocab_size = len(logits)
    passes = np.empty(_BLOCK, dtype=np.uint32)
    hashes = np.empty(_BLOCK, dtype=np.uint32)
    best[:count] = -np.inf
    bound = np.float32(-np.inf)  # a score that the `count`-th best one reaches
    inverse_temperature = one / temperature
    steepness = np.float32(_LOG2_E / max(scale, _LEAST_SCALE))
    num_found = 0
    for begin in range(0, vocab_size, _BLOCK):
        size = min(_BLOCK, vocab_size - begin)
        block = logits[begin : begin + size]
        block_words = words[begin : begin + size]
        any_passes = np.uint32(0)
        for place in range(size):
            state = np.uint32(prefix ^ block_words[place])
            state = np.uint32(np.uint32(state << np.uint32(13)) | np.uint32(state >> np.uint32(19)))
            state = np.uint32(np.uint32(np.uint32(state * five) + addend) ^ num_bytes)
            state = np.uint32(np.uint32(state ^ np.uint32(state >> np.uint32(16))) * multiplier_3)
            state = np.uint32(np.uint32(state ^ np.uint32(state >> np.uint32(13))) * multiplier_4)
            state = np.uint32(state ^ np.uint32(state >> np.uint32(16)))
            hashes[place] = state
            logit = block[place]
            halvings = (bound - logit * inverse_temperature) * steepness
            halvings = halvings if halvings > zero else zero  # noqa: FURB136 (NaN, of infinities, must be 0)
            halvings = halvings if halvings < most else most  # noqa: FURB136
            shift = np.uint32(~np.int32(halvings) & np.int32(31))
            passes_one = np.uint32((np.uint32(np.uint32(state >> np.uint32(1)) >> shift) == 0) & (logit >= floor))
            passes[place] = passes_one
            any_passes = np.uint32(any_passes | passes_one)
        if not any_passes:
            continue
        for place in range(size):
            if not passes[place]:
                continue
            uniform = np.float64(np.float32((hashes[place] + 0.5) * 2.0**-32))
            exponential = -math.log(max(1 - uniform, _LARGEST_COMPLEMENT)) if uniform > 0.25 else -math.log1p(-uniform)
            score = np.float64(block[place] / temperature) - scale * math.log(exponential)
            if score < bound:
                continue
            if num_found == len(tokens):
                num_found = 0
                for found in range(len(tokens)):
                    if scores[found] >= bound:
                        tokens[num_found] = tokens[found]
                        scores[num_found] = scores[found]
                        num_found += 1
                if num_found > len(tokens) // 2:
                    return -1
            tokens[num_found] = begin + place
            scores[num_found] = score
            num_found += 1
            if score > best[0]:
                rank = 1
                while rank < count and best[rank] < score:
                    best[rank - 1] = best[rank]
                    rank += 1
                best[rank - 1] = score
                error = _NOISE_ERROR * scale + _SCORE_ERROR * (abs(best[0]) + _LARGEST_NOISE * scale)
                bound = np.float32(best[0] - error) if np.isfinite(best[0]) else np.float32(best[0])
    return num_found
