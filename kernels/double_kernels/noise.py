"""The Gumbel noise that the target and the draft share: a function of a request's seed, a position and a token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

__all__ = ["Noise", "draw_chances", "gumbel_noise", "hash_finished", "hash_mixed", "hash_word"]

_MASK = 0xFFFFFFFF
_LARGEST_COMPLEMENT = 2.0**-24  # 1 - u is at least this: u is rounded to float32, and may be 1
_SERIES_ENDS = 0.25


class Noise(NamedTuple):
    """The noise of the rows of a batch, on one device.

    seeds: int64 [rows], the requests' seeds.
    positions: int64 [rows], of the input token that a row's logits come from: one before the token that is sampled.
    scales: float32 [rows], factors of the noise, each 0 or more. 0 is a row without noise.
    """

    seeds: torch.Tensor
    positions: torch.Tensor
    scales: torch.Tensor


def gumbel_noise(
    seeds: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], tokens: npt.NDArray[Any]
) -> npt.NDArray[np.float32]:
    """The noise of tokens at positions of requests: float32 of the arguments' common shape.

    seeds, positions: int64, any values; the upper half of a position is ignored.
    tokens: integers, 0 .. 2 ** 32 - 1.

    The definition is vLLM's, in vllm/v1/worker/gpu/sample/gumbel.py, with use_fp64=False and is_drafting=False. The
    32-bit MurmurHash3 of the seed's lower half, its upper half, the position's lower half and the token gives a uniform
    number u. The noise is -log(E) of the exponential E = -log(1 - u). Equal bit for bit to vLLM's kernels in triton's
    interpreter; a GPU's logarithm rounds otherwise.
    """
    shape = np.broadcast_shapes(np.shape(seeds), np.shape(positions), np.shape(tokens))
    words = hash_word(np.atleast_1d(tokens).astype(np.uint32))
    uniform = _uniform(hash_finished(hash_mixed(_hash_prefix(seeds, positions), words))).reshape(shape)
    # log(1 - u), for small u as a series: the largest noise comes from there, and 1 - u would lose its digits.
    series = np.full_like(uniform, 1 / 8)
    for degree in range(7, 0, -1):
        series = np.float32(1 / degree) + uniform * series
    complement = np.maximum(np.float32(1) - uniform, np.float32(_LARGEST_COMPLEMENT))
    log_complement = np.where(uniform < np.float32(_SERIES_ENDS), -uniform * series, np.log(complement))
    return np.asarray(-np.log(-log_complement), dtype=np.float32)


def draw_chances(
    seeds: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
    tokens: npt.NDArray[np.int32],
    lengths: npt.NDArray[np.int32],
    probs: npt.NDArray[np.float32],
) -> None:
    """Turn the probabilities of tokens into their chances to be drawn, given their noise, in place.

    seeds, positions [rows]: of the noise of each row's first token; the next token's position is one more. tokens, probs
    [rows, n], of which the first ``lengths`` [rows] count.

    A token of probability p and noise g is drawn if log p + g exceeds the largest score of all others, which is a Gumbel number
    at log(1 - p). So its chance is exp(-(1 - p) / p * exp(-g)), whose mean over the noise is p.
    """
    from double_kernels.ranking import compiled_chances

    compiled_chances()(seeds, positions, tokens, lengths, probs)


def _hash_prefix(seeds: npt.NDArray[Any], positions: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    """State of the hash before the token is mixed in."""
    seeds, positions = np.atleast_1d(seeds), np.atleast_1d(positions)  # numpy warns where a scalar overflows
    state = np.zeros(1, dtype=np.uint32)
    for values in (seeds, seeds >> 32, positions):
        state = hash_mixed(state, hash_word((values & _MASK).astype(np.uint32)))
    return state


# The steps of MurmurHash3_x86_32, of arrays of uint32; `ranking` compiles the same functions for single numbers.


def hash_word(value: Any) -> Any:
    """What is mixed into the state for four bytes."""
    word = np.uint32(value * np.uint32(0xCC9E2D51))
    return np.uint32(np.uint32(np.uint32(word << np.uint32(15)) | np.uint32(word >> np.uint32(17))) * np.uint32(0x1B873593))


def hash_mixed(state: Any, word: Any) -> Any:
    """The state with a word more."""
    state = np.uint32(state ^ word)
    state = np.uint32(np.uint32(state << np.uint32(13)) | np.uint32(state >> np.uint32(19)))
    return np.uint32(np.uint32(state * np.uint32(5)) + np.uint32(0xE6546B64))


def hash_finished(state: Any) -> Any:
    """The hash of the 16 bytes that were mixed in."""
    state = np.uint32(state ^ np.uint32(16))
    state = np.uint32(np.uint32(state ^ np.uint32(state >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    state = np.uint32(np.uint32(state ^ np.uint32(state >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.uint32(state ^ np.uint32(state >> np.uint32(16)))


def _uniform(hashes: npt.NDArray[np.uint32]) -> npt.NDArray[np.float32]:
    """(hash + 0.5) / 2 ** 32, rounded once: both halves are exact."""
    high = (hashes >> 16).astype(np.float32) * np.float32(2.0**-16)
    low = ((hashes & 0xFFFF).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    return high + low
