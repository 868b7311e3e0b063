"""The scores of a draw at T > 0: the target draws the token whose score is highest.

score = processed logits / T + Gumbel noise(seed, position, token). Logits are processed in vLLM's order: penalties,
temperature, top_k, top_p. Slow and plain: for one place of a text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from double_kernels import gumbel_noise

from benchmarks.client import Request

__all__ = ["gap", "noise", "processed", "scores"]

Floats = npt.NDArray[np.float32]
Int64s = npt.NDArray[np.int64]


def noise(seeds: Sequence[int] | Int64s, positions: Sequence[int] | Int64s, vocab: int) -> Floats:
    """Gumbel noise float32 [rows, vocab]; the token at index t of a text is drawn with position t - 1."""
    return gumbel_noise(np.array(seeds, np.int64)[:, None], np.array(positions, np.int64)[:, None], np.arange(vocab))


def processed(logits: Floats, request: Request, prompt: Sequence[int], output: Sequence[int]) -> Floats:
    """What is drawn from, float32 [vocab]: raw ``logits`` behind ``prompt`` and ``output``; -inf for what is filtered out."""
    found = logits.astype(np.float32)
    counts = np.bincount(np.asarray(output, np.int64), minlength=len(found)).astype(np.float32)
    repetition = np.float32(request.repetition_penalty or 1.0)
    seen = counts > 0
    seen[np.asarray(prompt, np.int64)] = True
    found[seen] = np.where(found[seen] > 0, found[seen] / repetition, found[seen] * repetition)
    found -= np.float32(request.frequency_penalty or 0.0) * counts
    found -= np.float32(request.presence_penalty or 0.0) * (counts > 0)
    found /= np.float32(request.temperature)
    if request.top_k is not None and 0 < request.top_k < len(found):
        found[found < np.partition(found, -request.top_k)[-request.top_k]] = -np.inf
    if request.top_p is not None and request.top_p < 1:
        order = np.argsort(found, kind="stable")
        mass = np.exp(found[order] - found.max())
        is_out = np.cumsum(mass / mass.sum()) <= np.float32(1 - request.top_p)
        is_out[-1] = False
        found[order[is_out]] = -np.inf
    return found


def scores(logits: Floats, request: Request, prompt: Sequence[int], output: Sequence[int]) -> Floats:
    """The scores float32 [vocab] of the token behind ``prompt`` and ``output``. ValueError for a request without a seed."""
    if request.seed is None:
        raise ValueError(f"{request.id} has no seed: its noise is not known")
    position = len(prompt) + len(output) - 1
    return processed(logits, request, prompt, output) + noise([request.seed], [position], len(logits))[0]


def gap(found: Floats, drawn: Sequence[int]) -> float:
    """How far the worst of the ``drawn`` tokens lies below the best score: of two best tokens, the difference of their scores.

    Infinite if a drawn token is filtered out.
    """
    return float(found.max() - min(found[token] for token in drawn))
