"""The best tokens of rows with Gumbel noise, on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from double_kernels.noise import gumbel_noise

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["fill_up", "noisy_tokens", "noisy_tokens_reference"]


def noisy_tokens(
    logits: npt.NDArray[np.float32],
    count: int,
    seeds: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
    *,
    scales: npt.NDArray[np.float32] | None = None,
    temperatures: npt.NDArray[np.float32] | None = None,
    floors: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.int64]:
    """int64 [rows, count]: the tokens with the highest logit / temperature + scale * noise; of equal ones the lower first.

    logits: float32 [rows, vocab].
    count: 1 .. vocab.
    scales, temperatures: None (all 1) or float32 [rows], each positive.
    floors: None or float32 [rows]; tokens with lower logits, with -inf and with NaN come last, by rising id.
    """
    return noisy_tokens_reference(logits, count, seeds, positions, scales=scales, temperatures=temperatures, floors=floors)


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
