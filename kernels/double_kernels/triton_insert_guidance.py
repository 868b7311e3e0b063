"""insert_guidance on a GPU: one program per request, and no host synchronisation.

Without paths one launch lays everything out. With paths a launch before it counts the kept tokens: the place of a request's
tokens depends on those that all requests before it keep, and each program would have to read 1,024 x 128 tokens for that.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# The parameters of kernels have no Python types: they are Triton's.

import torch
import triton
import triton.language as tl

from double_kernels.insert_guidance import PADDING_SLOT, GuidanceBatch

__all__ = ["insert_guidance_triton"]

_BLOCK = 128
_REQUESTS = 1024  # whose counts are summed at a time
_ROUND = 16  # results begin at multiples of this, so that their alignment is always the same: no kernel is compiled twice


def insert_guidance_triton(
    guidance: torch.Tensor,
    guidance_start_loc: torch.Tensor,
    num_computed_tokens: torch.Tensor,
    block_table: torch.Tensor,
    *,
    page_size: int,
    path: torch.Tensor | None = None,
    path_start_loc: torch.Tensor | None = None,
) -> GuidanceBatch:
    """See insert_guidance, which checks the arguments: int32 or int64 tokens [tokens], int32 start_locs [requests + 1],
    num_computed_tokens [requests] and block_table [requests, pages]. What is returned is new memory."""
    num_tokens, num_requests = len(guidance), len(num_computed_tokens)
    device = guidance.device
    flat = torch.empty((3, _round_up(num_tokens)), dtype=torch.int64, device=device)[:, :num_tokens]
    lengths = torch.empty((3, _round_up(num_requests + 1)), dtype=torch.int32, device=device)
    batch = GuidanceBatch(
        flat[0], flat[1], flat[2], lengths[0, : num_requests + 1], lengths[1, :num_requests], lengths[2, :num_requests]
    )
    if num_requests == 0:
        batch.query_start_loc.zero_()
        batch.input_ids.zero_()
        batch.positions.zero_()
        batch.slot_mapping.fill_(PADDING_SLOT)
        return batch
    if path is not None:
        _count_kept[(num_requests,)](
            guidance, guidance_start_loc, path, path_start_loc, batch.num_kept, BLOCK=_BLOCK, num_warps=4
        )
    _lay_out[(num_requests,)](
        guidance, guidance_start_loc, num_computed_tokens, block_table, *batch, num_tokens, num_requests,
        block_table.stride(0), PADDING_SLOT=PADDING_SLOT, HAS_PATHS=path is not None, PAGE_SIZE=page_size, BLOCK=_BLOCK,
        REQUESTS=_REQUESTS, num_warps=4,
    )  # fmt: skip
    return batch


def _round_up(count: int) -> int:
    return -(-count // _ROUND) * _ROUND


@triton.jit
def _count_kept(
    guidance_ptr, guidance_start_loc_ptr, path_ptr, path_start_loc_ptr, num_kept_ptr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The length of one request's common prefix of guidance and path, without the guidance's last token."""
    request = tl.program_id(0)
    begin = tl.load(guidance_start_loc_ptr + request)
    end = tl.load(guidance_start_loc_ptr + request + 1)
    path_begin = tl.load(path_start_loc_ptr + request)
    path_end = tl.load(path_start_loc_ptr + request + 1)
    num_kept = tl.minimum(end - begin - 1, path_end - path_begin)
    limit = num_kept
    for first in range(0, limit, BLOCK):
        offset = first + tl.arange(0, BLOCK)
        token = tl.load(guidance_ptr + begin + offset, mask=offset < limit, other=0)
        cached = tl.load(path_ptr + path_begin + offset, mask=offset < limit, other=0)
        num_kept = tl.minimum(num_kept, tl.min(tl.where(token != cached, offset, limit), axis=0))
    tl.store(num_kept_ptr + request, tl.maximum(num_kept, 0))


@triton.jit(do_not_specialize=["num_tokens", "num_requests"])
def _lay_out(
    guidance_ptr, guidance_start_loc_ptr, num_computed_ptr, block_table_ptr, input_ids_ptr, positions_ptr, slot_mapping_ptr,
    query_start_loc_ptr, seq_lens_ptr, num_kept_ptr, num_tokens, num_requests, table_stride, PADDING_SLOT: tl.constexpr,
    HAS_PATHS: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr, REQUESTS: tl.constexpr,
):  # fmt: skip
    """One request's tokens, and its share of the padding behind all."""
    request = tl.program_id(0)
    begin = tl.load(guidance_start_loc_ptr + request)
    end = tl.load(guidance_start_loc_ptr + request + 1)
    num_computed = tl.load(num_computed_ptr + request)
    query_begin = begin
    query_end = end
    batch_end = tl.load(guidance_start_loc_ptr + num_requests)
    if HAS_PATHS:
        for first in range(0, num_requests, REQUESTS):
            other = first + tl.arange(0, REQUESTS)
            kept = tl.load(num_kept_ptr + other, mask=other < num_requests, other=0)
            query_begin -= tl.sum(tl.where(other < request, kept, 0), axis=0)
            query_end -= tl.sum(tl.where(other <= request, kept, 0), axis=0)
            batch_end -= tl.sum(kept, axis=0)
    else:
        tl.store(num_kept_ptr + request, 0)
    tl.store(query_start_loc_ptr + request, query_begin)
    if request == num_requests - 1:
        tl.store(query_start_loc_ptr + num_requests, batch_end)
    tl.store(seq_lens_ptr + request, num_computed + end - begin)

    num_queries = query_end - query_begin
    num_kept = end - begin - num_queries
    table_ptr = block_table_ptr + request.to(tl.int64) * table_stride
    for first in range(0, num_queries, BLOCK):
        offset = first + tl.arange(0, BLOCK)
        is_query = offset < num_queries
        token = tl.load(guidance_ptr + begin + num_kept + offset, mask=is_query, other=0)
        position = num_computed + num_kept + offset
        page = tl.load(table_ptr + position // PAGE_SIZE, mask=is_query, other=0)
        slot = page.to(tl.int64) * PAGE_SIZE + position % PAGE_SIZE
        tl.store(input_ids_ptr + query_begin + offset, token.to(tl.int64), mask=is_query)
        tl.store(positions_ptr + query_begin + offset, position.to(tl.int64), mask=is_query)
        tl.store(slot_mapping_ptr + query_begin + offset, slot, mask=is_query)
    for first in range(batch_end + request * BLOCK, num_tokens, num_requests * BLOCK):
        offset = first + tl.arange(0, BLOCK)
        is_padding = offset < num_tokens
        tl.store(input_ids_ptr + offset, tl.full([BLOCK], 0, tl.int64), mask=is_padding)
        tl.store(positions_ptr + offset, tl.full([BLOCK], 0, tl.int64), mask=is_padding)
        tl.store(slot_mapping_ptr + offset, tl.full([BLOCK], PADDING_SLOT, tl.int64), mask=is_padding)
