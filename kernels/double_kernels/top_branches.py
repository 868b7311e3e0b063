"""The most probable next tokens and their probabilities, from logits."""

from __future__ import annotations

import math

import torch

__all__ = ["top_branches", "top_branches_reference"]

_MANY_SCORES = 1 << 14


def top_branches(
    logits: torch.Tensor, num_children: int, temperatures: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `num_children` best tokens of every row, and their softmax probabilities.

    logits: float16, bfloat16 or float32 [rows, vocab], not changed; rows may be strided, -inf is a token of
        probability zero.
    num_children: 1 .. vocab.
    temperatures: None (all 1) or float32 [rows] on the same device, each positive.

    Returns tokens int64 [rows, num_children] and probabilities float32 [rows, num_children], by falling
    logit; of equal logits the lower token id comes first, also where the cut falls between them. Arithmetic
    is in float32.

    Raises ValueError for a wrong shape, dtype or count. A row with NaN, with +inf or without a finite logit
    gives NaN probabilities; the tokens of a row with NaN are distinct, and nothing else is said of them.

    On a GPU the kernels of triton_top_branches do it, without a host synchronisation, up to their bounds of
    vocabulary and children. Beyond them, and on a CPU, the reference does.
    """
    _check(logits, num_children, temperatures)
    if logits.is_cuda:
        from double_kernels import triton_top_branches  # here: a CPU needs no triton

        if triton_top_branches.is_supported(logits, num_children):
            return triton_top_branches.top_branches_triton(logits, num_children, temperatures)
    return top_branches_reference(logits, num_children, temperatures)


def _check(logits: torch.Tensor, num_children: int, temperatures: torch.Tensor | None) -> None:
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating point [rows, vocab], not {logits.dtype} {tuple(logits.shape)}")
    num_rows, vocab_size = logits.shape
    if not 1 <= num_children <= vocab_size:
        raise ValueError(f"num_children is {num_children}, the vocabulary has {vocab_size} tokens")
    if temperatures is not None and temperatures.shape != (num_rows,):
        raise ValueError(f"temperatures must be [{num_rows}], not {tuple(temperatures.shape)}")


def top_branches_reference(
    logits: torch.Tensor, num_children: int, temperatures: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`top_branches` in plain torch, on any device; its arguments are not checked."""
    vocab_size = logits.shape[1]
    scores = logits.float()
    # One more than is wanted tells whether the cut falls between equal logits: topk then takes any of them.
    count = min(num_children + 1, vocab_size)
    candidates, ids, _ = _candidates(scores, count, count)
    best, places = torch.topk(candidates, count)
    tokens = ids.gather(1, places[:, :num_children])
    if bool((best[:, 1:] == best[:, :-1]).any()):  # in 16 bits that is the rule
        tokens = _lowest_ids_first(scores, num_children)
    if temperatures is not None:
        scores = scores / temperatures.unsqueeze(-1)
    # torch's fused softmax is twice as fast as logsumexp on a CPU, and subtracts the same log-sum-exp.
    probs = torch.softmax(scores, dim=-1).gather(-1, tokens)
    return tokens, probs


def _lowest_ids_first(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` best tokens of every row; of equal ones the lower id comes first, and is rather among them."""
    # Twice as many groups as the best can lie in, so that one left out seldom is as good as one of them.
    candidates, ids, is_sure = _candidates(scores, count, 2 * count)
    tokens = ids.gather(1, torch.topk(_ranks(candidates, ids), count).indices)
    unsure = (~is_sure).nonzero().flatten()
    if len(unsure):
        ids = torch.arange(scores.shape[1], device=scores.device)
        tokens[unsure] = torch.topk(_ranks(scores[unsure], ids), count).indices
    return tokens


def _candidates(scores: torch.Tensor, count: int, num_chosen: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores and token ids [rows, candidates] among which are the `count` best of every row, of equal ones at the cut any.

    The best lie in the groups whose best are the best, of which there are `num_chosen`, or behind the last whole group. It
    spares topk, which moves every score, most of them. The third, bool [rows], is True where all that are equal at the cut are
    there.
    """
    num_rows, vocab_size = scores.shape
    size = 1 << (math.isqrt(vocab_size // num_chosen).bit_length() - 1 if vocab_size > num_chosen else 0)
    num_groups = vocab_size // size
    if scores.numel() < _MANY_SCORES or num_groups < 2 * num_chosen:
        ids = torch.arange(vocab_size, device=scores.device).expand_as(scores)
        return scores, ids, torch.ones(num_rows, dtype=torch.bool, device=scores.device)
    end = num_groups * size
    # A group is every num_groups-th token: maxima of whole lines are quick on a CPU.
    groups = scores[:, :end].reshape(num_rows, size, num_groups)
    maxima, chosen = torch.topk(groups.amax(1), num_chosen)
    chosen = chosen.unsqueeze(1).expand(-1, size, -1)
    found = groups.gather(2, chosen).flatten(1)
    ids = (chosen + torch.arange(0, end, num_groups, device=scores.device)[:, None]).flatten(1)
    if end < vocab_size:
        found = torch.cat([found, scores[:, end:]], dim=1)
        ids = torch.cat([ids, torch.arange(end, vocab_size, device=scores.device).expand(num_rows, -1)], dim=1)
    return found, ids, maxima[:, count - 1] > maxima[:, -1]


def _ranks(scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """int64, the greater the better: by score, and of equal ones by the lower id."""
    bits = (scores + 0.0).view(torch.int32)  # there is one zero now
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) - ids
