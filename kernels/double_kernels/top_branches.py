"""The most probable next tokens and their probabilities, from logits."""

from __future__ import annotations

import torch

__all__ = ["top_branches", "top_branches_reference"]

_BLOCK = 64
_MANY_SCORES = 1 << 16


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
    best_scores, tokens = _topk(scores, min(num_children + 1, vocab_size))
    if vocab_size > 1:
        is_tied = (best_scores[:, 1:] == best_scores[:, :-1]).any(dim=-1)
        if bool(is_tied.any()):
            tokens = tokens.clone()
            for row in is_tied.nonzero().flatten().tolist():
                tokens[row, :num_children] = _lowest_ids_first(scores[row], best_scores[row, num_children - 1], num_children)
    tokens = tokens[:, :num_children].contiguous()

    if temperatures is not None:
        scores = scores / temperatures.unsqueeze(-1)
    # torch's fused softmax is three times as fast as logsumexp on a CPU, and subtracts the same log-sum-exp.
    probs = torch.softmax(scores, dim=-1).gather(-1, tokens)
    return tokens, probs


def _topk(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """torch.topk of every row, which of equal scores takes any."""
    num_rows, vocab_size = scores.shape
    num_blocks = vocab_size // _BLOCK
    if scores.numel() < _MANY_SCORES or num_blocks < 2 * count:
        values, tokens = torch.topk(scores, count)
        return values, tokens
    # The best scores lie in the blocks with the best maxima, or behind the last whole block. On a CPU this is
    # 2 to 6 times as fast as topk, which moves every score.
    end = num_blocks * _BLOCK
    blocks = scores[:, :end].reshape(num_rows, num_blocks, _BLOCK)
    chosen = torch.topk(blocks.amax(-1), count, sorted=False).indices.unsqueeze(-1)
    candidates = torch.cat([blocks.gather(1, chosen.expand(-1, -1, _BLOCK)).flatten(1), scores[:, end:]], dim=1)
    ids = torch.arange(_BLOCK, device=scores.device)
    tokens = torch.cat(
        [
            (chosen * _BLOCK + ids).flatten(1),
            torch.arange(end, vocab_size, device=scores.device).expand(num_rows, -1),
        ],
        dim=1,
    )
    values, places = torch.topk(candidates, count)
    return values, tokens.gather(1, places)


def _lowest_ids_first(scores: torch.Tensor, cut: torch.Tensor, num_children: int) -> torch.Tensor:
    """Best tokens int64 [num_children] of one row, whose `num_children`-th best score is `cut`."""
    candidates = (~(scores < cut)).nonzero().flatten()  # NaN is among the best, as in topk
    order = scores[candidates].argsort(descending=True, stable=True)
    return candidates[order[:num_children]]
