"""The best tokens of rows, with Gumbel noise or without, on a CPU: one scan of the logits, compiled by numba.

The noise of nearly all tokens needs no logarithm. A token whose logit lies d / scale below the worst of the best scores passes
it only if its uniform number is below exp(-d), thus if its 32-bit hash is below 2 ** (32 - floor(d / log(2))): of 150,000
tokens a few dozen are.

Import this module when something is ranked. vLLM's workers break if numba is imported before they are set up, and a GPU needs
none.
"""

from __future__ import annotations

import functools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numba
import numpy as np

from double_kernels.noise import hash_finished, hash_mixed, hash_word
from double_kernels.support import fill_up

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["compiled_chances", "compiled_ranking", "ranked_tokens", "row_chances", "row_noise", "score_errors"]

_BLOCK = 256
_LOG2_E = math.log2(math.e)
# Relative errors of float32 in a score, and of the noise, whose logarithms are of float32: both several times too large.
_SCORE_ERROR = 1e-6
_NOISE_ERROR = 1e-4
_LARGEST_NOISE = 23.0
_LARGEST_COMPLEMENT = 2.0**-24
_LOW_BITS = 0xFFFFFFFF
_LEAST_PROB = 1e-6
_LEAST_SCALE = np.float32(1e-30)  # smaller scales let more tokens pass
_SCORES_OF_A_THREAD = 1 << 17  # fewer are not worth a thread


def ranked_tokens(
    logits: npt.NDArray[np.float32],
    count: int,
    noise: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]] | None = None,
    temperatures: npt.NDArray[np.float32] | None = None,
    floors: npt.NDArray[np.float32] | None = None,
    num_threads: int = 1,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The tokens with the highest logit / temperature + scale * noise, best first; of equal ones the lower first.
    If a row's scale is 0, those with the highest logit.

    logits: float32 [rows, vocab].
    count: 1 .. vocab.
    noise: seeds, positions and scales, see `Noise`; None: all scales are 0.
    temperatures: None (all 1) or float32 [rows], each positive.
    floors: None or float32 [rows]; tokens with lower logits, with -inf and with NaN come last, by rising id.
    num_threads: how many threads may work at rows.

    Returns tokens int64 and scores float64 [rows, count]; the scores of tokens that come last are -inf. Two tokens whose scores
    differ in the last digits of float32 may change places; see `score_errors`.
    """
    num_rows, vocab_size = logits.shape
    lowest = np.full(num_rows, np.finfo(np.float32).min)
    floors = lowest if floors is None else np.maximum(floors, lowest)
    temperatures = np.ones(num_rows, np.float32) if temperatures is None else np.ascontiguousarray(temperatures)
    bounds = np.full(num_rows, -np.inf, np.float32)
    if noise is not None:
        seeds, positions, scales = map(np.ascontiguousarray, noise)
    else:
        seeds = positions = np.zeros(num_rows, np.int64)
        scales = np.zeros(num_rows, np.float32)
        # The best of every width-th logit, from the first on, from the second on, ..: `count` of all reach the last of these.
        width = min(vocab_size, 4 * count)
        height = vocab_size // width
        best = logits[:, : height * width].reshape(num_rows, height, width).max(1)
        bounds = np.nextafter(np.partition(best, -count, axis=1)[:, -count], np.float32(-np.inf))
    tokens, scores = np.zeros((num_rows, count), np.int64), np.full((num_rows, count), -np.inf)
    num_found = np.empty(num_rows, np.int64)
    rank, words = compiled_ranking(), _token_words(vocab_size)

    def rank_rows(begin: int, end: int) -> None:
        rank(
            np.ascontiguousarray(logits[begin:end]), words, seeds[begin:end], positions[begin:end], temperatures[begin:end],
            scales[begin:end], floors[begin:end], bounds[begin:end], tokens[begin:end], scores[begin:end],
            num_found[begin:end],
        )  # fmt: skip

    num_threads = max(1, min(num_threads, num_rows, logits.size // _SCORES_OF_A_THREAD))
    num_parts = num_threads if logits.flags.c_contiguous else num_rows  # one row by itself needs no copy
    edges = [num_rows * part // num_parts for part in range(num_parts + 1)]
    run = map if num_threads == 1 else _threads(num_threads, os.getpid()).map
    list(run(rank_rows, edges[:-1], edges[1:]))
    fill_up(tokens, num_found)
    return tokens, scores


def score_errors(scores: npt.NDArray[np.float64], scales: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """How far scores may be from those of `gumbel_noise` and float32."""
    errors: npt.NDArray[np.float64] = _NOISE_ERROR * scales + _SCORE_ERROR * (np.abs(scores) + _LARGEST_NOISE * scales)
    return errors


@functools.lru_cache(maxsize=4)
def _token_words(vocab_size: int) -> npt.NDArray[np.uint32]:
    return hash_word(np.arange(vocab_size, dtype=np.uint32))  # type: ignore[no-any-return]


@functools.cache
def _threads(num_threads: int, _process: int) -> ThreadPoolExecutor:
    """A forked process has none of its parent's."""
    return ThreadPoolExecutor(num_threads, thread_name_prefix="ranked-tokens")


# numba's cache looks at this file alone; but the steps of the hash never change.
_word, _mixed, _finished = map(numba.njit, (hash_word, hash_mixed, hash_finished))


@numba.njit
def _hash(prefix: Any, word: Any) -> Any:
    """Of a seed and a position, whose `_prefix` this is, and a token."""
    return _finished(_mixed(prefix, word))


@numba.njit
def _exponential(state: Any) -> Any:
    """The exponential number of a hash; the noise is minus its logarithm."""
    uniform = np.float64(np.float32((state + 0.5) * 2.0**-32))
    return -math.log(max(1 - uniform, _LARGEST_COMPLEMENT)) if uniform > 0.25 else -math.log1p(-uniform)


@numba.njit
def _seed_state(seed: Any) -> Any:
    """Of the hash, before the position is mixed in."""
    state = _mixed(np.uint32(0), _word(np.uint32(seed & _LOW_BITS)))
    return _mixed(state, _word(np.uint32((seed >> 32) & _LOW_BITS)))


@numba.njit
def _prefix(seed: Any, position: Any) -> Any:
    """State of the hash before the token is mixed in."""
    return _mixed(_seed_state(seed), _word(np.uint32(position & _LOW_BITS)))


@numba.njit
def row_noise(seed: Any, position: Any, tokens: Any, noise: Any) -> None:
    """`noise.gumbel_noise` of tokens at one position, but for float32's last digits; for other compiled functions."""
    prefix = _prefix(seed, position)
    for place in range(len(tokens)):
        noise[place] = -math.log(_exponential(_hash(prefix, _word(np.uint32(tokens[place])))))


@numba.njit(error_model="numpy")
def row_chances(seed: Any, position: Any, tokens: Any, length: Any, probs: Any) -> None:
    """`noise.draw_chances` of one row, for other compiled functions."""
    state = _seed_state(seed)
    for place in range(length):
        prefix = _mixed(state, _word(np.uint32((position + place) & _LOW_BITS)))
        exponential = _exponential(_hash(prefix, _word(np.uint32(tokens[place]))))
        prob = min(max(np.float64(probs[place]), _LEAST_PROB), 1.0)
        probs[place] = math.exp((prob - 1.0) / prob * exponential)


def _compiled(function: Any, signature: str) -> Any:
    """From numba's cache if that works."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(signature, cache=True, **options)(function)
    except Exception:  # no folder to write to, or a damaged file; a compiler error is raised again below
        return numba.njit(signature, **options)(function)


@functools.cache
def compiled_chances() -> Any:
    """`_chances`"""
    return _compiled(_chances, "void(int64[::1], int64[::1], int32[:,::1], int32[::1], float32[:,::1])")


@functools.cache
def compiled_ranking() -> Any:
    """`_rank`"""
    numbers_of_rows = "int64[::1], int64[::1], float32[::1], float32[::1], float32[::1], float32[::1]"
    return _compiled(_rank, f"void(float32[:,::1], uint32[::1], {numbers_of_rows}, int64[:,::1], float64[:,::1], int64[::1])")


def _chances(
    seeds: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
    tokens: npt.NDArray[np.int32],
    lengths: npt.NDArray[np.int32],
    probs: npt.NDArray[np.float32],
) -> None:
    """See `noise.draw_chances`."""
    for row in range(len(lengths)):
        row_chances(seeds[row], positions[row], tokens[row], lengths[row], probs[row])


def _rank(
    logits: npt.NDArray[np.float32],
    words: npt.NDArray[np.uint32],
    seeds: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
    temperatures: npt.NDArray[np.float32],
    scales: npt.NDArray[np.float32],
    floors: npt.NDArray[np.float32],
    bounds: npt.NDArray[np.float32],
    tokens: npt.NDArray[np.int64],
    scores: npt.NDArray[np.float64],
    num_found: npt.NDArray[np.int64],
) -> None:
    """Write the best tokens of all rows, in order, to ``tokens`` and their scores to ``scores`` [rows, n], and how many there
    are to ``num_found`` [rows].

    words: hash_word of all tokens. floors: finite numbers [rows]. bounds: less than the last score of each row, or -inf.
    """
    one, zero, most = np.float32(1), np.float32(0), np.float32(31)
    vocab_size, count = logits.shape[1], tokens.shape[1]
    passes = np.empty(_BLOCK, dtype=np.uint32)
    hashes = np.empty(_BLOCK, dtype=np.uint32)
    for row in range(logits.shape[0]):
        prefix, floor, scale = _prefix(seeds[row], positions[row]), floors[row], scales[row]
        best, best_tokens = scores[row], tokens[row]
        inverse_temperature = one / temperatures[row] if scale > zero else one
        steepness = np.float32(_LOG2_E / max(scale, _LEAST_SCALE))
        bound = bounds[row]
        found = 0
        for begin in range(0, vocab_size, _BLOCK):
            size = min(_BLOCK, vocab_size - begin)
            block = logits[row, begin : begin + size]
            block_words = words[begin : begin + size]
            any_passes = np.uint32(0)
            for place in range(size if scale == zero else 0):
                passes_one = np.uint32((block[place] > bound) & (block[place] >= floor))
                passes[place] = passes_one
                any_passes = np.uint32(any_passes | passes_one)
            for place in range(size if scale > zero else 0):
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
                score = np.float64(block[place] * inverse_temperature)
                if scale > zero:
                    score -= scale * math.log(_exponential(hashes[place]))
                if found == count and not score > best[count - 1]:
                    continue
                at = min(found, count - 1)
                while at > 0 and best[at - 1] < score:
                    best[at], best_tokens[at] = best[at - 1], best_tokens[at - 1]
                    at -= 1
                best[at], best_tokens[at] = score, begin + place
                found = min(found + 1, count)
                if found == count:
                    worst = best[count - 1]
                    bound = np.float32(worst - (_NOISE_ERROR * scale + _SCORE_ERROR * (abs(worst) + _LARGEST_NOISE * scale)))
        num_found[row] = found
