"""The most probable next tokens and their probabilities, from logits."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch

from double_kernels.noise import Noise
from double_kernels.support import NUM_INSPECTED, Support, logit_floors

__all__ = ["top_branches", "top_branches_reference"]

_MOST_SCORES = 1 << 22  # 16 MiB: from 32 MiB on an allocator takes fresh pages for every result, which costs more than softmax


def top_branches(
    logits: torch.Tensor,
    num_children: int,
    temperatures: torch.Tensor | None = None,
    noise: Noise | None = None,
    support: Support | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `num_children` best tokens of every row, and their softmax probabilities.

    logits: float16, bfloat16 or float32 [rows, vocab], not changed; rows may be strided, -inf is a token of
        probability zero.
    num_children: 1 .. vocab.
    temperatures: None (all 1) or float32 [rows] on the same device, each positive.
    noise: None, or the rows' noise. A row is ranked by logit / temperature + scale * gumbel_noise; if the scale is 0, by
        the logit.
    support: None, or the target's filters. They are worked out from the NUM_INSPECTED (64) most probable tokens, as a
        floor of the row's logits: a bound that lies behind these is ignored. A token below the floor is ranked as if
        its logit were -inf, and its probability is returned as 0; those of others are not renormalised.

    Returns tokens int64 [rows, num_children] and probabilities float32 [rows, num_children], in the order of the
    ranking, without noise by falling logit; of equal ranks the lower token id comes first, also if the cut falls
    between them. Arithmetic is in float32. Probabilities are softmax(logits / temperature), whatever the noise.

    Raises ValueError for a wrong shape, dtype or count. A row with NaN, with +inf or without a finite logit
    gives NaN probabilities; the tokens of a row with NaN are distinct, in any order.

    On a GPU the kernels of triton_top_branches do it, without a host synchronisation, up to their bounds of
    vocabulary and children. Beyond them, and on a CPU, the reference does; for noise or support beyond them it copies
    the logits to the host.
    """
    _check(logits, num_children, temperatures, noise, support)
    if logits.is_cuda:
        from double_kernels import triton_top_branches  # here: a CPU needs no triton

        if triton_top_branches.is_supported(logits, num_children):
            return triton_top_branches.top_branches_triton(logits, num_children, temperatures, noise, support)
    return top_branches_reference(logits, num_children, temperatures, noise, support)


def _check(
    logits: torch.Tensor,
    num_children: int,
    temperatures: torch.Tensor | None,
    noise: Noise | None,
    support: Support | None,
) -> None:
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating point [rows, vocab], not {logits.dtype} {tuple(logits.shape)}")
    num_rows, vocab_size = logits.shape
    if not 1 <= num_children <= vocab_size:
        raise ValueError(f"num_children is {num_children}, the vocabulary has {vocab_size} tokens")
    of_rows = {"temperatures": temperatures} if temperatures is not None else {}
    of_rows |= noise._asdict() if noise is not None else {}
    of_rows |= support._asdict() if support is not None else {}
    for name, values in of_rows.items():
        if values.shape != (num_rows,):
            raise ValueError(f"{name} must be [{num_rows}], not {tuple(values.shape)}")
    if noise is not None and (noise.seeds.dtype != torch.int64 or noise.positions.dtype != torch.int64):
        raise ValueError(f"seeds and positions must be int64, not {noise.seeds.dtype} and {noise.positions.dtype}")


def top_branches_reference(
    logits: torch.Tensor,
    num_children: int,
    temperatures: torch.Tensor | None = None,
    noise: Noise | None = None,
    support: Support | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`top_branches` without a kernel, on any device; its arguments are not checked.

    On a CPU a compiled scan finds the tokens. torch.topk branches on every score, and takes twice as long for scores that the
    processor has not seen before.
    """
    if logits.is_cuda and (noise is not None or support is not None):
        of_host = _of_rows(torch.Tensor.cpu, temperatures, noise, support)
        tokens, probs = top_branches_reference(logits.cpu(), num_children, *of_host)
        return tokens.to(logits.device), probs.to(logits.device)
    if logits.is_cuda:
        scores = logits.float() + 0.0  # no -0.0, which some sorts take for less than 0.0
        tokens = scores.sort(dim=-1, descending=True, stable=True).indices[:, :num_children].contiguous()
        return tokens, _softmax(scores, temperatures).gather(-1, tokens)

    num_rows, vocab_size = logits.shape
    most_rows = max(1, _MOST_SCORES // vocab_size)
    if num_rows > most_rows:
        parts = []
        for begin in range(0, num_rows, most_rows):
            rows = slice(begin, begin + most_rows)
            of_part = _of_rows(operator.itemgetter(rows), temperatures, noise, support)
            parts.append(top_branches_reference(logits[rows], num_children, *of_part))
        return torch.cat([tokens for tokens, _ in parts]), torch.cat([probs for _, probs in parts])

    scores = logits.detach().float().contiguous()
    probs = _softmax(scores, temperatures)
    floors = None
    if support is not None and num_rows:
        best = _ranked(scores, min(NUM_INSPECTED, vocab_size), None, None, None)
        floors = logit_floors(scores.gather(1, best), probs.gather(1, best), vocab_size, support)
    tokens = _ranked(scores, num_children, temperatures, noise, floors)
    probs = probs.gather(-1, tokens)
    if floors is not None:
        probs.masked_fill_(scores.gather(1, tokens) < floors[:, None], 0.0)
    return tokens, probs


def _of_rows(
    change: Callable[[torch.Tensor], torch.Tensor],
    temperatures: torch.Tensor | None,
    noise: Noise | None,
    support: Support | None,
) -> tuple[torch.Tensor | None, Noise | None, Support | None]:
    """The numbers of the rows, each tensor changed."""
    return (
        change(temperatures) if temperatures is not None else None,
        Noise(*map(change, noise)) if noise is not None else None,
        Support(*map(change, support)) if support is not None else None,
    )


def _ranked(
    scores: torch.Tensor, count: int, temperatures: torch.Tensor | None, noise: Noise | None, floors: torch.Tensor | None
) -> torch.Tensor:
    """int64 [rows, count]: the best tokens of rows on a CPU."""
    from double_kernels.ranking import ranked_tokens  # here: a GPU needs no numba

    numbers = None if noise is None else (noise.seeds.numpy(), noise.positions.numpy(), noise.scales.numpy())
    divisors, limits = (None if values is None else values.numpy() for values in (temperatures, floors))
    return torch.from_numpy(ranked_tokens(scores.numpy(), count, numbers, divisors, limits)[0])


def _softmax(scores: torch.Tensor, temperatures: torch.Tensor | None) -> torch.Tensor:
    # torch's fused softmax is twice as fast as logsumexp on a CPU, and subtracts the same log-sum-exp.
    return torch.softmax(scores if temperatures is None else scores / temperatures.unsqueeze(-1), dim=-1)
