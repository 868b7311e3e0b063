"""The most probable next tokens and their probabilities, from logits."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from double_kernels.noise import Noise
from double_kernels.support import NUM_INSPECTED, Support, fill_up, logit_floors

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["top_branches", "top_branches_reference"]

_BLOCK = 128
_FEW_SCORES = 1 << 13  # so few that it is cheaper to look at all of them
_MOST_SCORES = 1 << 22  # 16 MiB: from 32 MiB on an allocator takes fresh pages for every result, which costs more than softmax
_ALL_BELOW = 0x0101010101010101  # eight booleans that are true


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

    On a CPU the tokens are found in numpy, on views of the tensors: it compares and sorts many numbers at a time, whatever
    they are. torch.topk branches on every score, and takes twice as long for scores that the processor has not seen before.
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
        best = torch.from_numpy(_best_tokens(scores, min(NUM_INSPECTED, vocab_size)))
        floors = logit_floors(scores.gather(1, best), probs.gather(1, best), vocab_size, support)
    tokens = torch.from_numpy(_ranked(scores, num_children, temperatures, noise, floors))
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
) -> npt.NDArray[np.int64]:
    """int64 [rows, count]: the best tokens of rows on a CPU, each of which may have noise."""
    is_noisy = noise.scales.numpy() > 0 if noise is not None else np.zeros(len(scores), np.bool_)
    if noise is None or not is_noisy.any():
        return _plainly_ranked(scores, count, floors)
    from double_kernels.ranking import ranked_tokens  # here: greedy rows need no numba

    tokens = np.empty((len(scores), count), np.int64)
    some = slice(None) if is_noisy.all() else is_noisy
    seeds, positions, scales = (values.numpy()[some] for values in noise)
    temperatures_some, floors_some = (None if values is None else values.numpy()[some] for values in (temperatures, floors))
    tokens[some] = ranked_tokens(scores.numpy()[some], count, seeds, positions, scales, temperatures_some, floors_some)[0]
    if not is_noisy.all():
        plain = torch.from_numpy(~is_noisy)
        tokens[~is_noisy] = _plainly_ranked(scores[plain], count, None if floors is None else floors[plain])
    return tokens


def _plainly_ranked(scores: torch.Tensor, count: int, floors: torch.Tensor | None) -> npt.NDArray[np.int64]:
    """int64 [rows, count]: the best tokens of rows; those below the row's floor last, by rising id."""
    found = _best_tokens(scores, count)
    if floors is not None and found.size:
        values = np.take_along_axis(scores.numpy(), found, 1)
        fill_up(found, ((values >= floors.numpy()[:, None]) & (values > -np.inf)).sum(1))
    return found


def _softmax(scores: torch.Tensor, temperatures: torch.Tensor | None) -> torch.Tensor:
    # torch's fused softmax is twice as fast as logsumexp on a CPU, and subtracts the same log-sum-exp.
    return torch.softmax(scores if temperatures is None else scores / temperatures.unsqueeze(-1), dim=-1)


def _best_tokens(scores: torch.Tensor, count: int) -> npt.NDArray[np.int64]:
    """int64 [rows, count]: the ids of every row's best scores, which are contiguous and on a CPU."""
    num_rows, vocab_size = scores.shape
    if scores.numel() < _FEW_SCORES:
        # One more than is wanted shows whether the cut falls between equal scores: topk takes any of them.
        best = torch.topk(scores, min(count + 1, vocab_size))
        values = best.values.numpy()
        if not (values[:, 1:] == values[:, :-1]).any():
            return np.ascontiguousarray(best.indices.numpy()[:, :count])
    places, _ = _contenders(scores, count)
    rows = places // vocab_size
    bits = (scores.numpy().reshape(-1)[places] + 0.0).view(np.int32)  # -0.0 is 0.0
    # Keys that rise with the row, then with falling scores, then with the id: integers order as the floats whose bits they
    # have, but negative ones the other way round. There is room for all three: a row beside others is short.
    id_bits = vocab_size.bit_length()
    keys = (rows << 32) - (bits ^ ((bits >> 31) & 0x7FFFFFFF))
    keys <<= id_bits
    keys |= places - rows * vocab_size
    keys.sort()
    counts = np.bincount(rows, minlength=num_rows)
    firsts = counts.cumsum() - counts
    return keys[firsts[:, None] + np.arange(count)] & ((1 << id_bits) - 1)


def _contenders(scores: torch.Tensor, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Where scores not below a bound lie in the flattened scores, in any order, and float32 [rows, 1] the bounds.

    The bound is the `count`-th best score, or of many scores that of some blocks' maxima: `count` scores of a row reach it,
    the best ones among them, and few others do. NaN is not below any.
    """
    num_rows, vocab_size = scores.shape
    num_blocks = vocab_size // _BLOCK
    if scores.numel() < _FEW_SCORES:
        values = scores.numpy()
        bounds = np.partition(values, -count, axis=1)[:, -count, None]
        return _not_below(values, bounds), bounds
    if num_blocks < max(4 * count, 256):
        # Block i holds every width-th score from the i-th on: torch finds the maxima of 64 neighbours at once.
        width = min(vocab_size, -(-4 * count // 64) * 64)
        height = vocab_size // width
        maxima = scores[:, : height * width].view(num_rows, height, width).amax(1).numpy()
        maxima.sort(axis=1)
        bounds = maxima[:, -count, None]
        return _not_below(scores.numpy(), bounds), bounds

    # Blocks of neighbours, the best of which are looked into: the others are not read again.
    end = num_blocks * _BLOCK
    blocks, bounds = _contenders(scores[:, :end].view(num_rows, num_blocks, _BLOCK).amax(2), count)
    rows = blocks // num_blocks
    places = (blocks * _BLOCK + rows * (vocab_size - end))[:, None] + np.arange(_BLOCK)
    places = places.reshape(-1)[_not_below(scores.numpy().reshape(-1)[places], bounds[rows])]
    if end < vocab_size:
        behind = _not_below(scores[:, end:].numpy(), bounds)
        places = np.concatenate([places, behind + (behind // (vocab_size - end) + 1) * end])
    return places, bounds


def _not_below(scores: npt.NDArray[np.float32], bounds: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Where scores that are not below their row's bound lie in the flattened scores, rising."""
    size = scores.size
    if size < _FEW_SCORES:
        return np.flatnonzero(~(scores < bounds))
    below = np.empty(size + -size % 8, dtype=np.bool_)
    below[size:] = True
    np.less(scores, bounds, out=below[:size].reshape(scores.shape))
    # Most are below: eight at a time are skipped.
    eights = below.view(np.int64)
    left = np.flatnonzero(eights != _ALL_BELOW)
    inside = np.flatnonzero(~eights[left].view(np.bool_))
    places: npt.NDArray[np.int64] = 8 * left[inside >> 3]
    places += inside & 7
    return places
