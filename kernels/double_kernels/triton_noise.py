"""The noise of gumbel_noise on a GPU, and sample_with_noise: one launch that reads the logits once, then torch's argmax of few.

The noise takes triton's operations in the order of vLLM's kernels, thus the same compiler gives it the same bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# The parameters of kernels have no Python types: they are Triton's.

import torch
import triton
import triton.language as tl

__all__ = ["gumbel_noise_of", "sample_with_noise_triton"]

_BLOCK = 1024


def sample_with_noise_triton(logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """See sample_with_noise, which checks the arguments; no host synchronisation."""
    num_rows, vocab_size = logits.shape
    num_blocks = triton.cdiv(vocab_size, _BLOCK)
    tokens = torch.empty((num_rows, num_blocks), dtype=torch.int64, device=logits.device)
    scores = torch.empty((num_rows, num_blocks), dtype=torch.float32, device=logits.device)
    if num_rows == 0:
        return tokens.new_empty(0)
    _sample_blocks[(num_rows, num_blocks)](
        logits, seeds.contiguous(), positions.contiguous(), tokens, scores, vocab_size, logits.stride(0), logits.stride(1),
        BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return tokens.gather(1, scores.argmax(1, keepdim=True)).squeeze(1)


@triton.jit
def gumbel_noise_of(seed, position, token):
    """float32 of the token's shape, of an int64 seed and an int64 position."""
    state = _mixed(tl.full([], 0, tl.uint32), seed.to(tl.uint32))
    state = _mixed(state, (seed >> 32).to(tl.uint32))
    state = _mixed(state, position.to(tl.uint32))
    state = _mixed(state, token.to(tl.uint32)) ^ 16
    state = (state ^ (state >> 16)) * 0x85EBCA6B
    state = (state ^ (state >> 13)) * 0xC2B2AE35
    state = state ^ (state >> 16)
    high = (state >> 16).to(tl.int32).to(tl.float32)
    low = (state & 0xFFFF).to(tl.int32).to(tl.float32)
    uniform = high * (1.0 / 65536.0) + (low + 0.5) * (1.0 / 4294967296.0)
    series = 1.0 / 8.0
    for degree in tl.static_range(7, 0, -1):
        series = 1.0 / degree + uniform * series
    log_complement = tl.log(tl.maximum(1.0 - uniform, 5.960464477539063e-08))
    return -tl.log(-tl.where(uniform < 0.25, -uniform * series, log_complement))


@triton.jit
def _mixed(state, word):
    """MurmurHash3_x86_32's step for four bytes, uint32."""
    word = word * 0xCC9E2D51
    word = ((word << 15) | (word >> 17)) * 0x1B873593
    state = state ^ word
    return ((state << 13) | (state >> 19)) * 5 + 0xE6546B64


@triton.jit
def _sample_blocks(
    logits_ptr, seeds_ptr, positions_ptr, tokens_ptr, scores_ptr, vocab_size, row_stride, token_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one row: the highest sum of logit and noise, and the first token that has it."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_token = token < vocab_size
    logits_ptr += row * row_stride
    logits = tl.load(logits_ptr + token.to(tl.int64) * token_stride, mask=is_token, other=-float("inf"))
    noise = gumbel_noise_of(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), token)
    score, place = tl.max(tl.where(is_token, logits + noise, -float("inf")), axis=0, return_indices=True)
    result = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(scores_ptr + result, score)
    tl.store(tokens_ptr + result, (tl.program_id(1) * BLOCK + place).to(tl.int64))
