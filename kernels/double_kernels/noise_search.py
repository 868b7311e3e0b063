"""A search for the tokens of one row that may be the best with noise, compiled by numba.

The noise of nearly all tokens needs no logarithm. A token whose logit lies d / scale below the best score that was seen passes
it only if its uniform number is below exp(-d), thus if its 32-bit hash is below 2 ** (32 - floor(d / log(2))): of 150,000
tokens a few dozen are.

To be imported when something is searched: vLLM's workers break if numba is imported before they are set up, and a GPU needs
none.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import numba
import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["MAX_COUNT", "capacity", "compiled_noise", "compiled_ranking", "compiled_search"]

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


@numba.njit
def _word(token: Any) -> Any:
    """hash_word"""
    word = np.uint32(token * np.uint32(0xCC9E2D51))
    return np.uint32(np.uint32(np.uint32(word << np.uint32(15)) | np.uint32(word >> np.uint32(17))) * np.uint32(0x1B873593))


@numba.njit
def _hash(prefix: Any, word: Any) -> Any:
    """The hash of what `prefix` stands for and a token."""
    state = np.uint32(prefix ^ word)
    state = np.uint32(np.uint32(state << np.uint32(13)) | np.uint32(state >> np.uint32(19)))
    state = np.uint32(np.uint32(np.uint32(state * np.uint32(5)) + np.uint32(0xE6546B64)) ^ np.uint32(16))
    state = np.uint32(np.uint32(state ^ np.uint32(state >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    state = np.uint32(np.uint32(state ^ np.uint32(state >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.uint32(state ^ np.uint32(state >> np.uint32(16)))


@numba.njit
def _exponential(state: Any) -> Any:
    """The exponential number of a hash; the noise is minus its logarithm."""
    uniform = np.float64(np.float32((state + 0.5) * 2.0**-32))
    return -math.log(max(1 - uniform, _LARGEST_COMPLEMENT)) if uniform > 0.25 else -math.log1p(-uniform)


def _compiled(function: Any, signature: str) -> Any:
    """From numba's cache where that works."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(signature, cache=True, **options)(function)
    except Exception:  # no folder to write to, or a damaged file; a compiler error is raised again below
        return numba.njit(signature, **options)(function)


@functools.cache
def compiled_search() -> Any:
    """`_search`"""
    return _compiled(_search, _SIGNATURE)


@functools.cache
def compiled_ranking() -> Any:
    """`_rank`"""
    signature = (
        "void(float32[:,::1], uint32[::1], uint32[::1], float32[::1], float32[::1], float32[::1], int64[:,::1], int64[::1])"
    )
    return _compiled(_rank, signature)


@functools.cache
def compiled_noise() -> Any:
    """`_noise`"""
    return _compiled(_noise, "void(uint32[::1], int32[:,::1], float32[:,::1])")


def _noise(prefixes: npt.NDArray[np.uint32], tokens: npt.NDArray[np.int32], noise: npt.NDArray[np.float32]) -> None:
    """`gumbel_noise` but for the last digits: of tokens [rows, n] behind hash_prefix [rows], to ``noise`` [rows, n]."""
    for row in range(tokens.shape[0]):
        for place in range(tokens.shape[1]):
            state = _hash(prefixes[row], _word(np.uint32(tokens[row, place])))
            noise[row, place] = -math.log(_exponential(state))


def _rank(
    logits: npt.NDArray[np.float32],
    words: npt.NDArray[np.uint32],
    prefixes: npt.NDArray[np.uint32],
    temperatures: npt.NDArray[np.float32],
    scales: npt.NDArray[np.float32],
    floors: npt.NDArray[np.float32],
    tokens: npt.NDArray[np.int64],
    num_found: npt.NDArray[np.int64],
) -> None:
    """Write the best tokens of all rows, in order, to ``tokens`` [rows, n], and how many there are to ``num_found`` [rows].

    As `_search`, but scores are not computed again in the reference's arithmetic: two tokens whose scores differ in the last
    digits of float32 may change places.
    """
    one, zero, most = np.float32(1), np.float32(0), np.float32(31)
    vocab_size, count = logits.shape[1], tokens.shape[1]
    passes = np.empty(_BLOCK, dtype=np.uint32)
    hashes = np.empty(_BLOCK, dtype=np.uint32)
    best = np.empty(count)
    for row in range(logits.shape[0]):
        prefix, floor, scale = prefixes[row], floors[row], scales[row]
        inverse_temperature = one / temperatures[row]
        steepness = np.float32(_LOG2_E / max(scale, _LEAST_SCALE))
        bound = np.float32(-np.inf)
        found = 0
        for begin in range(0, vocab_size, _BLOCK):
            size = min(_BLOCK, vocab_size - begin)
            block = logits[row, begin : begin + size]
            block_words = words[begin : begin + size]
            any_passes = np.uint32(0)
            for place in range(size):
                state = _hash(prefix, block_words[place])
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
                exponential = _exponential(hashes[place])
                score = np.float64(block[place] * inverse_temperature) - scale * math.log(exponential)
                if found == count and not score > best[count - 1]:
                    continue
                at = min(found, count - 1)
                while at > 0 and best[at - 1] < score:
                    best[at], tokens[row, at] = best[at - 1], tokens[row, at - 1]
                    at -= 1
                best[at], tokens[row, at] = score, begin + place
                found = min(found + 1, count)
                if found == count:
                    error = _NOISE_ERROR * scale + _SCORE_ERROR * (abs(best[count - 1]) + _LARGEST_NOISE * scale)
                    bound = np.float32(best[count - 1] - error)
        num_found[row] = found


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
            state = _hash(prefix, block_words[place])
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
            exponential = _exponential(hashes[place])
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
