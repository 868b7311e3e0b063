"""The tokens that a request's sampling parameters leave, as one floor of the logits per row."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["NUM_INSPECTED", "Support", "fill_up", "logit_floors"]

NUM_INSPECTED = 64


class Support(NamedTuple):
    """The target's filters of the rows of a batch, on one device.

    top_k: int32 [rows]; 0 or less keeps all tokens.
    top_p: float32 [rows]; 1 keeps all tokens.
    min_p: float32 [rows]; 0 keeps all tokens.
    """

    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor


def logit_floors(logits: torch.Tensor, probs: torch.Tensor, vocab_size: int, support: Support) -> torch.Tensor:
    """float32 [rows]: tokens with lower logits are outside of the support; -inf if there are none.

    logits, probs: float32 [rows, n], of the n = min(vocab_size, NUM_INSPECTED) most probable tokens, falling.

    In vLLM's order: min_p keeps tokens with at least min_p of the highest probability. Of these top_k keeps as many,
    and those that equal the last one. Of these, renormalised, top_p keeps the most probable ones up to the one with
    which their sum reaches top_p. A bound that lies behind the n tokens is ignored. The first token is always kept.
    """
    num_inspected = probs.shape[1]
    is_number = ~probs[:, :1].isnan()  # without a distribution there is nothing to filter
    rank = torch.arange(num_inspected, device=probs.device)
    top_k = support.top_k.to(torch.int64)[:, None]
    has_top_k = (top_k > 0) & (top_k <= min(num_inspected, vocab_size))
    kth = torch.where(has_top_k, top_k - 1, num_inspected - 1)
    is_kept = (logits >= logits.gather(1, kth)) & (probs >= support.min_p[:, None] * probs[:, :1])
    is_cut = has_top_k | ~is_kept[:, -1:]
    kept_probs = torch.where(is_kept, probs, 0.0)
    total = torch.where(is_cut, kept_probs.sum(1, keepdim=True), 1.0)
    top_p = support.top_p[:, None]
    before = kept_probs.cumsum(1) - kept_probs
    is_kept &= (before < top_p * total) | (top_p >= 1)
    is_cut |= ~is_kept[:, -1:]
    last = torch.where(is_kept, rank, 0).amax(1, keepdim=True)
    floors = torch.where(is_cut & is_number, logits.gather(1, last), -torch.inf)
    return floors.squeeze(1)


def fill_up(tokens: npt.NDArray[np.int64], num_found: npt.NDArray[np.int64]) -> None:
    """Behind the `num_found` first tokens of each row write the lowest ids that are not among them."""
    count = tokens.shape[1]
    for row in np.flatnonzero(num_found < count):
        found = num_found[row]
        tokens[row, found:] = np.setdiff1d(np.arange(count), tokens[row, :found])[: count - found]
