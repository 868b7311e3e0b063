"""The best tokens of rows with Gumbel noise, on a CPU."""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from double_kernels.noise import gumbel_noise, hash_prefix, hash_word
from double_kernels.noise_search import MAX_COUNT, capacity, compiled_ranking, compiled_search

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["fill_up", "noisy_tokens", "noisy_tokens_reference", "ranked_tokens"]

_SCORES_OF_A_THREAD = 1 << 17  # fewer are not worth a thread


def noisy_tokens(
    logits: npt.NDArray[np.float32],
    count: int,
    seeds: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
    *,
    scales: npt.NDArray[np.float32] | None = None,
    temperatures: npt.NDArray[np.float32] | None = None,
    floors: npt.NDArray[np.float32] | None = None,
    num_threads: int = 1,
) -> npt.NDArray[np.int64]:
    """int64 [rows, count]: the tokens with the highest logit / temperature + scale * noise; of equal ones the lower first.

    logits: float32 [rows, vocab].
    count: 1 .. vocab.
    scales, temperatures: None (all 1) or float32 [rows], each positive.
    floors: None or float32 [rows]; tokens with lower logits, with -inf and with NaN come last, by rising id.
    num_threads: how many threads may work at rows.

    A compiled search finds a few candidates of each row; these get the scores that the reference computes.
    """
    num_rows, vocab_size = logits.shape
    if count > MAX_COUNT:
        return noisy_tokens_reference(logits, count, seeds, positions, scales=scales, temperatures=temperatures, floors=floors)
    if logits.strides[1] != logits.itemsize:
        logits = np.ascontiguousarray(logits)
    ones = np.ones(num_rows, dtype=np.float32)
    scales = ones if scales is None else scales
    temperatures = ones if temperatures is None else temperatures
    lowest = np.full(num_rows, np.finfo(np.float32).min)
    bounds = lowest if floors is None else np.maximum(floors, lowest)
    prefixes = hash_prefix(seeds, positions)
    words = _token_words(vocab_size)
    search = compiled_search()

    def candidates(first: int) -> list[npt.NDArray[np.int32] | None]:
        best, room = np.empty(count), capacity(count)
        tokens, scores = np.empty(room, dtype=np.int32), np.empty(room)
        found: list[npt.NDArray[np.int32] | None] = []
        for row in range(first, num_rows, num_threads):
            num_found = search(
                logits[row], words, prefixes[row], temperatures[row], scales[row], bounds[row], count, best, tokens, scores
            )
            found.append(tokens[:num_found].copy() if num_found >= 0 else None)
        return found

    num_threads = max(1, min(num_threads, num_rows, logits.size // _SCORES_OF_A_THREAD))
    of_rows: list[npt.NDArray[np.int32] | None] = [None] * num_rows
    for first, found in enumerate(
        map(candidates, [0]) if num_threads == 1 else _threads(num_threads).map(candidates, range(num_threads))
    ):
        of_rows[first::num_threads] = found

    no_room = [row for row, tokens in enumerate(of_rows) if tokens is None]
    none = np.empty(0, dtype=np.int32)
    tokens = np.concatenate([none if of_row is None else of_row for of_row in of_rows])
    rows = np.repeat(np.arange(num_rows), [0 if of_row is None else len(of_row) for of_row in of_rows])
    with np.errstate(over="ignore"):  # a mask of the lowest number may become -inf
        scores = logits[rows, tokens] / temperatures[rows]
    scores += scales[rows] * gumbel_noise(seeds[rows], positions[rows], tokens)
    order = np.lexsort((tokens, -scores, rows))
    order = order[scores[order] > -np.inf]
    nums = np.bincount(rows[order], minlength=num_rows)
    places = (np.cumsum(nums) - nums)[:, None] + np.arange(count)
    result = np.zeros((num_rows, count), dtype=np.int64)
    if order.size:
        result[:] = tokens[order[np.minimum(places, order.size - 1)]]
    fill_up(result, nums)
    if no_room:
        result[no_room] = noisy_tokens_reference(
            logits[no_room], count, seeds[no_room], positions[no_room], scales=scales[no_room],
            temperatures=temperatures[no_room], floors=bounds[no_room],
        )  # fmt: skip
    return result


def ranked_tokens(
    logits: npt.NDArray[np.float32],
    count: int,
    seeds: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
    scales: npt.NDArray[np.float32],
    temperatures: npt.NDArray[np.float32] | None = None,
    floors: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.int64]:
    """As `noisy_tokens`, in one compiled call: tokens whose scores differ in float32's last digits may change places."""
    num_rows, vocab_size = logits.shape
    if count > MAX_COUNT:
        return noisy_tokens_reference(logits, count, seeds, positions, scales=scales, temperatures=temperatures, floors=floors)
    lowest = np.full(num_rows, np.finfo(np.float32).min)
    bounds = lowest if floors is None else np.maximum(floors, lowest)
    temperatures = np.ones(num_rows, dtype=np.float32) if temperatures is None else np.ascontiguousarray(temperatures)
    tokens, num_found = np.zeros((num_rows, count), dtype=np.int64), np.empty(num_rows, dtype=np.int64)
    compiled_ranking()(
        np.ascontiguousarray(logits), _token_words(vocab_size), hash_prefix(seeds, positions), temperatures,
        np.ascontiguousarray(scales), bounds, tokens, num_found,
    )  # fmt: skip
    fill_up(tokens, num_found)
    return tokens


@functools.lru_cache(maxsize=4)
def _token_words(vocab_size: int) -> npt.NDArray[np.uint32]:
    return hash_word(np.arange(vocab_size, dtype=np.uint32))


def _threads(num_threads: int) -> ThreadPoolExecutor:
    return _threads_of_process(num_threads, os.getpid())  # a forked process has none of its parent's


@functools.cache
def _threads_of_process(num_threads: int, _process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="noisy-tokens")


def noisy_tokens_reference(
    logits: npt.NDArray[np.float32],
    count: int,
    seeds: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
    *,
    scales: npt.NDArray[np.float32] | None = None,
    temperatures: npt.NDArray[np.float32] | None = None,
    floors: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.int64]:
    """`noisy_tokens` by the noise of all tokens and a sort."""
    scores = gumbel_noise(seeds[:, None], positions[:, None], np.arange(logits.shape[1]))
    if scales is not None:
        scores *= scales[:, None]
    with np.errstate(over="ignore"):  # a mask of the lowest number may become -inf
        scores += logits if temperatures is None else logits / temperatures[:, None]
    scores[np.isnan(logits)] = -np.inf
    if floors is not None:
        scores[logits < floors[:, None]] = -np.inf
    return np.argsort(-scores, axis=1, kind="stable")[:, :count].astype(np.int64)


def fill_up(tokens: npt.NDArray[np.int64], num_found: npt.NDArray[np.int64]) -> None:
    """Behind the `num_found` first tokens of each row write the lowest ids that are not among them."""
    count = tokens.shape[1]
    for row in np.flatnonzero(num_found < count):
        found = num_found[row]
        tokens[row, found:] = np.setdiff1d(np.arange(count), tokens[row, :found])[: count - found]
