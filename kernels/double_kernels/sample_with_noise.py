"""One token per row by the Gumbel-max trick, with noise that is a function of seed, position and token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from double_kernels.noise import gumbel_noise

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["sample_with_noise", "sample_with_noise_reference"]

_NUM_RANKED = 4  # so many tokens of a row are hardly ever so close that only the reference knows the best


def sample_with_noise(logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The token with the highest logit + gumbel_noise(seed, position, token) of every row, int64 [rows].

    logits: float32 [rows, vocab], not changed, any strides. Temperature and masks are applied already; -inf is a token
        of probability zero.
    seeds, positions: int64 [rows] on the same device.

    Equals vLLM's `gumbel_sample` of processed logits (vllm/v1/worker/gpu/sample/gumbel.py), of the same device, bit for
    bit. So do its corner cases: of equal sums the lowest token is taken, and of a row without a finite logit token 0.
    Of a row with NaN some token is taken.

    Raises ValueError for a wrong shape or dtype.

    On a GPU the kernel of triton_noise does it, without a host synchronisation. On a CPU a search finds the few best tokens
    of each row; the reference looks at these alone, or at the whole row if others are as close.
    """
    _check(logits, seeds, positions)
    if logits.is_cuda:
        from double_kernels.triton_noise import sample_with_noise_triton  # here: a CPU needs no triton

        return sample_with_noise_triton(logits, seeds, positions)
    if logits.shape[0] == 0:
        return torch.empty(0, dtype=torch.int64)
    return torch.from_numpy(_sample_by_search(logits.detach().numpy(), seeds.numpy(), positions.numpy()))


def sample_with_noise_reference(logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`sample_with_noise` by the noise of all tokens, on the host; its arguments are not checked."""
    tokens = np.arange(logits.shape[1])
    best = _best_places(logits.detach().cpu().numpy(), seeds.cpu().numpy(), positions.cpu().numpy(), tokens)
    return torch.from_numpy(best).to(logits.device)


def _best_places(
    logits: npt.NDArray[np.float32], seeds: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], tokens: npt.NDArray[Any]
) -> npt.NDArray[np.int64]:
    """int64 [rows], where in each row the highest sum is, the first of equal ones. tokens: ids, [n] or [rows, n]."""
    scores = gumbel_noise(seeds[:, None], positions[:, None], tokens)
    with np.errstate(over="ignore"):  # a mask of the lowest number may become -inf
        scores += logits
    scores[np.isnan(logits)] = -np.inf
    places: npt.NDArray[np.int64] = scores.argmax(1)
    return places


def _sample_by_search(
    logits: npt.NDArray[np.float32], seeds: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    from double_kernels.ranking import ranked_tokens, score_errors  # here: a GPU needs none

    num_rows, vocab_size = logits.shape
    rows, scales = np.arange(num_rows), np.ones(num_rows, np.float32)
    count = min(_NUM_RANKED, vocab_size)
    found, scores = ranked_tokens(logits, count, (seeds, positions, scales), num_threads=torch.get_num_threads())
    found.sort(axis=1)
    sampled: npt.NDArray[np.int64] = found[rows, _best_places(logits[rows[:, None], found], seeds, positions, found)]
    # No token behind the ranked ones reaches the best one, unless the last of these is as close: infinite scores always are.
    with np.errstate(invalid="ignore"):
        is_certain = scores[:, 0] - scores[:, -1] > 2 * score_errors(scores[:, 0], scales)
    if count < vocab_size and not is_certain.all():
        unsure = ~is_certain
        sampled[unsure] = _best_places(logits[unsure], seeds[unsure], positions[unsure], np.arange(vocab_size))
    return sampled


def _check(logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> None:
    if logits.ndim != 2 or logits.dtype != torch.float32 or logits.shape[1] == 0:
        raise ValueError(f"logits must be float32 [rows, vocab], not {logits.dtype} {tuple(logits.shape)}")
    for name, values in (("seeds", seeds), ("positions", positions)):
        if values.dtype != torch.int64 or values.shape != logits.shape[:1]:
            raise ValueError(f"{name} must be int64 [{logits.shape[0]}], not {values.dtype} {tuple(values.shape)}")
