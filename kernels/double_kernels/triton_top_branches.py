"""top_branches on a GPU: two launches, the first of which reads the logits once.

The first takes tiles of a row, so that 64 rows fill every multiprocessor: of each tile the maximum and the sum of
exponentials, of each block of 64 logits the best. The second, one program per row, merges the sums. The f best tokens lie
in the f blocks with the best maxima (of equal maxima the lower blocks): those are read again, f x 64 logits of the row.

With noise the blocks' maxima are of the noisy scores, which the second launch computes again for the blocks that it reads.
For support two launches of their own find the most probable tokens first, from which torch derives the floors.

Both times the f best are found without a sort: logits become integers of the same order, and the f-th largest of them is
found bit by bit, by counting. The time does not depend on f.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# The parameters of kernels have no Python types: they are Triton's.

import torch
import triton
import triton.language as tl

from double_kernels.noise import Noise
from double_kernels.support import NUM_INSPECTED, Support, logit_floors
from double_kernels.triton_noise import gumbel_noise_of

__all__ = ["MAX_CHILDREN", "MAX_VOCAB_SIZE", "is_supported", "top_branches_triton"]

MAX_CHILDREN = NUM_INSPECTED
MAX_VOCAB_SIZE = 262_144  # 4,096 blocks fit into the registers of the second launch

_BLOCK = 64
_TILE_BLOCKS = 64
_KEY_BITS = {torch.float16: 16, torch.bfloat16: 16, torch.float32: 32}


def is_supported(logits: torch.Tensor, num_children: int) -> bool:
    """Whether the kernels take logits of this dtype and vocabulary, and this many children."""
    return logits.dtype in _KEY_BITS and logits.shape[1] <= MAX_VOCAB_SIZE and num_children <= MAX_CHILDREN


def top_branches_triton(
    logits: torch.Tensor,
    num_children: int,
    temperatures: torch.Tensor | None = None,
    noise: Noise | None = None,
    support: Support | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See top_branches; no host synchronisation. Logits may have any strides.

    Raises ValueError for logits or a count that the kernels don't take.
    """
    if not is_supported(logits, num_children):
        raise ValueError(f"the kernels take no {num_children} children of {logits.dtype} {tuple(logits.shape)} logits")
    num_rows, vocab_size = logits.shape
    device = logits.device
    tokens = torch.empty((num_rows, num_children), dtype=torch.int64, device=device)
    probs = torch.empty((num_rows, num_children), dtype=torch.float32, device=device)
    if num_rows == 0:
        return tokens, probs
    if temperatures is not None:
        temperatures = temperatures.to(torch.float32).contiguous()
    seeds = positions = scales = floors = None
    if noise is not None:
        seeds, positions = noise.seeds.contiguous(), noise.positions.contiguous()
        scales = noise.scales.to(torch.float32).contiguous()
    if support is not None:
        best, best_probs = top_branches_triton(logits, min(NUM_INSPECTED, vocab_size), temperatures)
        floors = logit_floors(logits.gather(1, best).float(), best_probs, vocab_size, support)
    num_blocks = triton.cdiv(vocab_size, _BLOCK)
    tile_blocks = min(_TILE_BLOCKS, triton.next_power_of_2(num_blocks))
    num_tiles = triton.cdiv(num_blocks, tile_blocks)
    padded_children = max(4, triton.next_power_of_2(num_children))
    block_keys = torch.empty((num_rows, num_tiles * tile_blocks), dtype=torch.int32, device=device)
    # A multiple of 16, so that the alignment of the second half is always the same: no kernel is compiled twice.
    tile_sums = torch.empty((2, triton.cdiv(num_rows * num_tiles, 16) * 16), dtype=torch.float32, device=device)
    scratch = torch.empty((2, num_rows, padded_children), dtype=torch.int32, device=device)
    is_plain = noise is None and support is None
    key_bits = _KEY_BITS[logits.dtype] if is_plain else 32  # scores with noise, or masked, are float32
    of_rows = (temperatures, seeds, positions, scales, floors)
    _reduce_tiles[(num_rows * num_tiles,)](
        logits, *of_rows, block_keys, tile_sums[0], tile_sums[1], vocab_size, num_tiles, logits.stride(0), logits.stride(1),
        KEY_BITS=key_bits, BLOCK=_BLOCK, TILE_BLOCKS=tile_blocks, num_warps=4,
    )  # fmt: skip
    _select_tokens[(num_rows,)](
        logits, *of_rows, block_keys, tile_sums[0], tile_sums[1], scratch[0], scratch[1], tokens, probs,
        vocab_size, num_blocks, num_tiles, block_keys.shape[1], num_children, logits.stride(0), logits.stride(1),
        KEY_BITS=key_bits, BLOCK=_BLOCK, BLOCKS=triton.next_power_of_2(num_blocks), TILES=triton.next_power_of_2(num_tiles),
        CHILDREN=padded_children, num_warps=8,
    )  # fmt: skip
    return tokens, probs


@triton.jit
def _keys(logits, KEY_BITS: tl.constexpr):
    """int32 of the same order as the logits, -(2 ** (KEY_BITS - 1)) < key; -0 is 0, NaN is the greatest."""
    if KEY_BITS == 16:
        bits = logits.to(tl.int16, bitcast=True).to(tl.int32)
    else:
        bits = logits.to(tl.int32, bitcast=True)
    # A negative number's bits below the sign count the other way.
    keys = bits ^ ((bits >> 31) & ((1 << (KEY_BITS - 1)) - 1))
    values = logits.to(tl.float32)
    keys = tl.where(values == 0.0, 0, keys)
    return tl.where(values != values, (1 << (KEY_BITS - 1)) - 1, keys)


@triton.jit
def _rank_keys(
    logits, token, row, temperatures_ptr, seeds_ptr, positions_ptr, scales_ptr, floors_ptr, KEY_BITS: tl.constexpr,
):  # fmt: skip
    """int32 of the order in which the row's tokens are ranked; of logits unless there is noise or support.

    A pointer is None if rows have no such number. The kernels are compiled apart for that.
    """
    ranks = logits
    if scales_ptr is not None:
        scale = tl.load(scales_ptr + row)
        scores = _tempered(logits, temperatures_ptr, row)
        noise = gumbel_noise_of(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), token)
        ranks = tl.where(scale > 0.0, scores + scale * noise, logits.to(tl.float32))
    if floors_ptr is not None:
        ranks = tl.where(logits.to(tl.float32) < tl.load(floors_ptr + row), -float("inf"), ranks.to(tl.float32))
    return _keys(ranks, KEY_BITS)


@triton.jit
def _tempered(logits, temperatures_ptr, row):
    """float32 logits over the row's temperature, if there are temperatures; an error of 2 ulp would show in an exponential."""
    scores = logits.to(tl.float32)
    if temperatures_ptr is not None:
        scores = tl.div_rn(scores, tl.load(temperatures_ptr + row))
    return scores


@triton.jit
def _is_among_best(keys, count, KEY_BITS: tl.constexpr):
    """Mask [N] of the `count` greatest int32 keys [N]; of equal keys the first."""
    keys = keys.to(tl.int64) + (1 << (KEY_BITS - 1))  # 0 .. 2 ** KEY_BITS - 1
    threshold = tl.full([1], 0, tl.int64)
    step = tl.full([1], 1 << (KEY_BITS - 1), tl.int64)
    for _ in range(KEY_BITS):
        candidate = threshold + step
        num_reaching = tl.sum((keys >= candidate).to(tl.int32), axis=0)
        threshold = tl.where(num_reaching >= count, candidate, threshold)
        step = step >> 1
    is_above = keys > threshold
    is_equal = keys == threshold
    num_above = tl.sum(is_above.to(tl.int32), axis=0)
    return is_above | (is_equal & (tl.cumsum(is_equal.to(tl.int32), axis=0) <= count - num_above))


@triton.jit
def _reduce_tiles(
    logits_ptr, temperatures_ptr, seeds_ptr, positions_ptr, scales_ptr, floors_ptr, block_keys_ptr, maxima_ptr, sums_ptr,
    vocab_size, num_tiles, row_stride, token_stride, KEY_BITS: tl.constexpr, BLOCK: tl.constexpr, TILE_BLOCKS: tl.constexpr,
):  # fmt: skip
    """One tile of one row: its maximum, its sum of exp(score - maximum), and the greatest key of each block."""
    row = tl.program_id(0) // num_tiles
    tile = tl.program_id(0) % num_tiles
    block = tile * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    token = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    is_token = token < vocab_size
    row_ptr = logits_ptr + row.to(tl.int64) * row_stride
    logits = tl.load(row_ptr + token.to(tl.int64) * token_stride, mask=is_token, other=-float("inf"))
    keys = _rank_keys(logits, token, row, temperatures_ptr, seeds_ptr, positions_ptr, scales_ptr, floors_ptr, KEY_BITS)
    keys = tl.where(is_token, keys, -(1 << (KEY_BITS - 1)))
    row_keys_ptr = block_keys_ptr + row.to(tl.int64) * num_tiles * TILE_BLOCKS
    tl.store(row_keys_ptr + block, tl.max(keys, axis=1))

    scores = _tempered(logits, temperatures_ptr, row)
    numbers = tl.where(scores != scores, -float("inf"), scores)
    highest = tl.max(tl.max(numbers, axis=1), axis=0)
    # A tile without a finite score adds nothing to a row that has one.
    shift = tl.where(highest == -float("inf"), 0.0, highest)
    tl.store(maxima_ptr + tl.program_id(0), highest)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(tl.sum(tl.exp(scores - shift), axis=1), axis=0))


@triton.jit
def _select_tokens(
    logits_ptr, temperatures_ptr, seeds_ptr, positions_ptr, scales_ptr, floors_ptr, block_keys_ptr, maxima_ptr, sums_ptr,
    chosen_blocks_ptr, chosen_tokens_ptr, tokens_ptr, probs_ptr, vocab_size, num_blocks, num_tiles, keys_stride, num_children,
    row_stride, token_stride, KEY_BITS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr,
    CHILDREN: tl.constexpr,
):  # fmt: skip
    """One row: its log-sum-exp, its best blocks, the best tokens of these, in order."""
    row = tl.program_id(0).to(tl.int64)
    lowest: tl.constexpr = -(1 << (KEY_BITS - 1))

    tile = tl.arange(0, TILES)
    maxima = tl.load(maxima_ptr + row * num_tiles + tile, mask=tile < num_tiles, other=-float("inf"))
    sums = tl.load(sums_ptr + row * num_tiles + tile, mask=tile < num_tiles, other=0.0)
    highest = tl.max(maxima, axis=0)
    total = tl.sum(sums * tl.exp(maxima - highest), axis=0)  # NaN where nothing is finite, or something is +inf or NaN

    block = tl.arange(0, BLOCKS)
    block_keys = tl.load(block_keys_ptr + row * keys_stride + block, mask=block < num_blocks, other=lowest)
    num_chosen = tl.minimum(num_children, num_blocks)
    is_chosen = _is_among_best(block_keys, num_chosen, KEY_BITS)
    chosen_blocks_ptr += row * CHILDREN
    # Ascending, so that the first of equal candidates below is the one with the lowest id.
    tl.store(chosen_blocks_ptr + tl.cumsum(is_chosen.to(tl.int32), axis=0) - 1, block, mask=is_chosen)
    tl.debug_barrier()

    candidate = tl.arange(0, CHILDREN * BLOCK)
    place = candidate // BLOCK
    chosen = tl.load(chosen_blocks_ptr + place, mask=place < num_chosen, other=0)
    token = chosen * BLOCK + candidate % BLOCK
    is_token = (place < num_chosen) & (token < vocab_size)
    logits_ptr += row * row_stride
    logits = tl.load(logits_ptr + token.to(tl.int64) * token_stride, mask=is_token, other=-float("inf"))
    keys = _rank_keys(logits, token, row, temperatures_ptr, seeds_ptr, positions_ptr, scales_ptr, floors_ptr, KEY_BITS)
    keys = tl.where(is_token, keys, lowest)
    is_best = _is_among_best(keys, num_children, KEY_BITS)
    chosen_tokens_ptr += row * CHILDREN
    tl.store(chosen_tokens_ptr + tl.cumsum(is_best.to(tl.int32), axis=0) - 1, token, mask=is_best)
    tl.debug_barrier()

    child = tl.arange(0, CHILDREN)
    is_child = child < num_children
    token = tl.load(chosen_tokens_ptr + child, mask=is_child, other=0)
    logits = tl.load(logits_ptr + token.to(tl.int64) * token_stride, mask=is_child, other=-float("inf"))
    keys = _rank_keys(logits, token, row, temperatures_ptr, seeds_ptr, positions_ptr, scales_ptr, floors_ptr, KEY_BITS)
    keys = tl.where(is_child, keys, lowest)
    comes_before = (keys[None, :] > keys[:, None]) | ((keys[None, :] == keys[:, None]) & (child[None, :] < child[:, None]))
    rank = tl.sum(comes_before.to(tl.int32), axis=1)
    scores = _tempered(logits, temperatures_ptr, row)
    tl.store(tokens_ptr + row * num_children + rank, token.to(tl.int64), mask=is_child)
    probs = tl.exp(scores - highest) / total
    if floors_ptr is not None:
        probs = tl.where(logits.to(tl.float32) < tl.load(floors_ptr + row), 0.0, probs)
    tl.store(probs_ptr + row * num_children + rank, probs, mask=is_child)
