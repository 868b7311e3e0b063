"""Guidance tokens as one flat batch, less those that the paged cache already holds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

__all__ = ["GuidanceBatch", "insert_guidance", "insert_guidance_reference"]

PADDING_SLOT = -1  # vLLM's attention kernels write nothing there
_TOKEN_DTYPES = (torch.int32, torch.int64)


class GuidanceBatch(NamedTuple):
    """The tokens that a forward still has to compute, request after request.

    Behind them, from query_start_loc[-1] on, input_ids and positions are 0 and slot_mapping is PADDING_SLOT: how
    many tokens are left is known on the device only, so there is room for all.

    input_ids: int64 [tokens].
    positions: int64 [tokens], of the token in its request.
    slot_mapping: int64 [tokens], page * page_size + slot, where the token's keys and values go.
    query_start_loc: int32 [requests + 1], where each request's tokens begin and the last one's end.
    seq_lens: int32 [requests], tokens of the request once the forward has run: in the cache, kept and computed.
    num_kept: int32 [requests], guidance tokens that were in the cache already.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    num_kept: torch.Tensor


def insert_guidance(
    guidance: torch.Tensor,
    guidance_start_loc: torch.Tensor,
    num_computed_tokens: torch.Tensor,
    block_table: torch.Tensor,
    *,
    page_size: int,
    path: torch.Tensor | None = None,
    path_start_loc: torch.Tensor | None = None,
) -> GuidanceBatch:
    """Lay out the guidance tokens that the draft has to read for each request, without a tree.

    Guidance is text that the target has verified (or a chunk of a prompt, or a path to be scored). Of a request it begins
    at position num_computed_tokens; from there on the request's pages may hold the keys and values of a path that was
    drafted before. As far as the guidance repeats the path it is kept, and behind that it is laid out to be computed.
    The last guidance token is computed in any case, because what follows it is wanted.

    guidance: int32 or int64 [tokens], the requests' tokens one after the other; tokens behind guidance_start_loc[-1] are
        ignored.
    guidance_start_loc: int32 [requests + 1], ascending from 0: where each request's tokens begin and end. A request
        without guidance gets no tokens.
    num_computed_tokens: int32 [requests].
    block_table: int32 [requests, pages], the last dimension contiguous; entry i of a row holds positions
        i * page_size .. (i + 1) * page_size - 1. Entries behind a request's last guidance token are not read.
    page_size: slots in a page.
    path, path_start_loc: None (nothing is cached there), or the paths like the guidance.

    All are on one device. Raises ValueError for shapes and dtypes; values are not looked at, since that would wait for
    the device. On a GPU the kernels of triton_insert_guidance do it, on a CPU the reference, whose results may share
    memory with the arguments.
    """
    _check(guidance, guidance_start_loc, num_computed_tokens, block_table, page_size, path, path_start_loc)
    if guidance.is_cuda:
        from double_kernels.triton_insert_guidance import insert_guidance_triton  # here: a CPU needs no triton

        lay_out = insert_guidance_triton
    else:
        lay_out = insert_guidance_reference
    return lay_out(
        guidance, guidance_start_loc, num_computed_tokens, block_table, page_size=page_size,
        path=path, path_start_loc=path_start_loc,
    )  # fmt: skip


def insert_guidance_reference(
    guidance: torch.Tensor,
    guidance_start_loc: torch.Tensor,
    num_computed_tokens: torch.Tensor,
    block_table: torch.Tensor,
    *,
    page_size: int,
    path: torch.Tensor | None = None,
    path_start_loc: torch.Tensor | None = None,
) -> GuidanceBatch:
    """`insert_guidance` on the host, whose results lie where the arguments do; these are not checked.

    In numpy, on views of the tensors: for a draft iteration's few rows an operator of torch on a CPU is mostly dispatch.
    """
    if guidance.is_cuda:
        results = insert_guidance_reference(
            guidance.cpu(), guidance_start_loc.cpu(), num_computed_tokens.cpu(), block_table.cpu(), page_size=page_size,
            path=path.cpu() if path is not None else None,
            path_start_loc=path_start_loc.cpu() if path_start_loc is not None else None,
        )  # fmt: skip
        return GuidanceBatch(*(result.to(guidance.device) for result in results))

    starts, computed = guidance_start_loc.numpy(), num_computed_tokens.numpy()
    begins = starts[:-1]
    lengths = starts[1:] - begins
    seq_lens = computed + lengths
    num_kept = np.zeros(len(lengths), dtype=np.int32)
    input_ids, query_start_loc = guidance, guidance_start_loc
    if path is not None and path_start_loc is not None:
        tokens, path_tokens, path_starts = guidance.numpy(), path.numpy(), path_start_loc.numpy()
        # Less the last token, which is computed in any case.
        limits = np.minimum(lengths - 1, np.diff(path_starts)).clip(0)
        for index in np.flatnonzero(limits):
            begin, path_begin, limit = begins[index], path_starts[index], limits[index]
            differs = tokens[begin : begin + limit] != path_tokens[path_begin : path_begin + limit]
            num_kept[index] = differs.argmax() if differs.any() else limit
        first_tokens = begins + num_kept
        lengths, computed = lengths - num_kept, computed + num_kept
        starts = np.zeros_like(starts)
        np.cumsum(lengths, out=starts[1:])
        input_ids = torch.from_numpy(tokens[np.arange(starts[-1]) + np.repeat(first_tokens - starts[:-1], lengths)])
        query_start_loc = torch.from_numpy(starts)
    num_tokens = int(starts[-1])
    request = np.arange(len(lengths)).repeat(lengths)
    # Per request the same distance from the place in the batch to the position in the request.
    positions = np.arange(num_tokens)
    positions += (computed - starts[:-1])[request]
    pages = positions // page_size
    slot_mapping = block_table.numpy()[request, pages] - pages  # int64 from here on
    slot_mapping *= page_size
    slot_mapping += positions
    room = guidance.shape[0] - num_tokens
    return GuidanceBatch(
        _padded((input_ids[:num_tokens] if room else input_ids).long(), room, 0),
        _padded(torch.from_numpy(positions), room, 0),
        _padded(torch.from_numpy(slot_mapping), room, PADDING_SLOT),
        query_start_loc,
        torch.from_numpy(seq_lens),
        torch.from_numpy(num_kept),
    )


def _padded(values: torch.Tensor, room: int, padding: int) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, room), value=padding) if room else values


def _check(
    guidance: torch.Tensor,
    guidance_start_loc: torch.Tensor,
    num_computed_tokens: torch.Tensor,
    block_table: torch.Tensor,
    page_size: int,
    path: torch.Tensor | None,
    path_start_loc: torch.Tensor | None,
) -> None:
    if page_size < 1:
        raise ValueError(f"page_size is {page_size}, it must be positive")
    if (path is None) != (path_start_loc is None):
        raise ValueError("path and path_start_loc come together")
    num_requests, device = block_table.shape[0], guidance.device
    for name, values, length in (
        ("guidance", guidance, None),
        ("num_computed_tokens", num_computed_tokens, num_requests),
        ("guidance_start_loc", guidance_start_loc, num_requests + 1),
        ("path", path, None),
        ("path_start_loc", path_start_loc, num_requests + 1),
    ):
        if values is None:
            continue
        dtypes = _TOKEN_DTYPES if length is None else (torch.int32,)
        is_right = values.dtype in dtypes and values.ndim == 1 and (length is None or len(values) == length)
        if not is_right or not values.is_contiguous() or values.device != device:
            kind = "int32 or int64 [tokens]" if length is None else f"int32 [{length}]"
            raise ValueError(f"{name} must be contiguous {kind} on {device}, not {_text(values)}")
    if block_table.dtype != torch.int32 or block_table.ndim != 2 or block_table.device != device:
        raise ValueError(f"block_table must be int32 [requests, pages] on {device}, not {_text(block_table)}")
    if block_table.stride(1) != 1 and block_table.shape[1] > 1:
        raise ValueError(f"the last dimension of block_table must be contiguous, its stride is {block_table.stride(1)}")


def _text(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
