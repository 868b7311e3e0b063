"""fork_pages on a GPU: one launch for all caches of one layout, K and V and layers alike.

A page is copied as integers of the widest size that its layout allows (16 bytes at a time if all is aligned to them).
Adjacent dimensions are merged. Left are columns (the innermost dimension) and rows (used slots times up to three others).
Rows are counted by the used slots, so nothing is launched for the others.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# The parameters of kernels have no Python types: they are Triton's.

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
import triton
import triton.language as tl

__all__ = ["fork_pages_triton"]

_TILE_BYTES = 16_384
_MAX_TILE_WORDS = 4096
_NUM_OUTER = 3
_WORDS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}


@dataclass(frozen=True, slots=True)
class _Layout:
    """Caches of one kind, in elements. Slots are rows, or columns if they are innermost; whole pages are one slot."""

    page_stride: int
    page_size: int
    slot_stride: int
    slots_are_columns: bool
    num_columns: int
    column_stride: int
    outer: tuple[tuple[int, int], ...]  # (size, stride), _NUM_OUTER of them
    parts: tuple[int, ...]  # offsets of parts that are copied like caches of their own, if more dimensions are left

    def word_size(self, itemsize: int, addresses: Sequence[int]) -> tuple[int, int]:
        """Bytes of the integers to copy, and bytes to which the beginning of every row is aligned."""
        if self.slots_are_columns or self.column_stride != 1:
            return itemsize, itemsize
        strides = [self.page_stride, self.slot_stride, self.num_columns, *(stride for _, stride in self.outer)]
        places = [*addresses, *(itemsize * length for length in (*strides, *self.parts))]
        size = max(size for size in _WORDS if size <= itemsize or all(place % size == 0 for place in places))
        return size, 16 if all(place % 16 == 0 for place in places) else size


@lru_cache(maxsize=64)
def _layout(shape: tuple[int, ...], strides: tuple[int, ...], slot_dim: int | None) -> _Layout:
    """The layout of a cache with pages in dimension 0."""
    page_size, slot_stride = (1, 0) if slot_dim is None else (shape[slot_dim], strides[slot_dim])
    sizes = [(stride, size) for dim, (size, stride) in enumerate(zip(shape, strides, strict=True)) if dim not in (0, slot_dim)]
    merged: list[tuple[int, int]] = []  # (size, stride), outermost first
    for stride, size in sorted(sizes, reverse=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == stride * size:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    slots_are_columns = slot_dim is not None and (not merged or slot_stride < merged[-1][1])
    if slots_are_columns:
        num_columns, column_stride = page_size, slot_stride
    else:
        num_columns, column_stride = merged.pop() if merged else (1, 1)
    surplus, outer = merged[: max(0, len(merged) - _NUM_OUTER)], merged[-_NUM_OUTER:]
    places = product(*(range(size) for size, _ in surplus))
    parts = tuple(sum(index * stride for index, (_, stride) in zip(place, surplus, strict=True)) for place in places)
    padding = ((1, 0),) * (_NUM_OUTER - len(outer))
    return _Layout(strides[0], page_size, slot_stride, slots_are_columns, num_columns, column_stride, (*padding, *outer), parts)


def fork_pages_triton(caches: Sequence[torch.Tensor], triples: Sequence[tuple[int, int, int]], *, slot_dim: int | None) -> None:
    """See fork_pages, which checks the arguments; elements of 1, 2, 4 or 8 bytes. One launch for all caches of one shape,
    strides and element size.

    Nothing waits for the device: pages and addresses go to it in the order of the stream. Raises ValueError for other elements.
    """
    triples = [(source, destination, 1 if slot_dim is None else used) for source, destination, used in triples if used > 0]
    if not triples:
        return
    kinds: dict[tuple[torch.Size, tuple[int, ...], int], list[torch.Tensor]] = {}
    for cache in caches:
        if cache.numel():
            kinds.setdefault((cache.shape, cache.stride(), cache.element_size()), []).append(cache)
    for (shape, strides, itemsize), alike in kinds.items():
        if itemsize not in _WORDS:
            raise ValueError(f"a cache has elements of {itemsize} bytes, the kernel copies 1, 2, 4 or 8")
        _launch(_layout(tuple(shape), strides, slot_dim), itemsize, alike, triples)


def _launch(layout: _Layout, itemsize: int, caches: Sequence[torch.Tensor], triples: Sequence[tuple[int, int, int]]) -> None:
    addresses = [cache.data_ptr() for cache in caches]
    word, alignment = layout.word_size(itemsize, addresses)
    addresses = [address + itemsize * part for address in addresses for part in layout.parts]
    # Strides in words: if a word is wider than an element, it divides them.
    page_stride, slot_stride, *outer_strides = (
        stride * itemsize // word for stride in (layout.page_stride, layout.slot_stride, *(s for _, s in layout.outer))
    )
    outer_sizes = [size for size, _ in layout.outer]
    num_columns = layout.num_columns if layout.slots_are_columns else layout.num_columns * itemsize // word
    num_outer = outer_sizes[0] * outer_sizes[1] * outer_sizes[2]
    page_rows, used_rows = (1, 1) if layout.slots_are_columns else (layout.page_size, max(used for _, _, used in triples))
    block_columns = _block_columns(num_columns)
    tile_words = min(_MAX_TILE_WORDS, _TILE_BYTES // word)
    # The tile follows from the layout alone, so that no kernel is compiled twice; the number of tiles from the used slots.
    block_rows = min(tile_words // block_columns, triton.next_power_of_2(num_outer * page_rows))
    num_chunks = triton.cdiv(num_outer * used_rows, block_rows) * triton.cdiv(num_columns, block_columns)
    table = torch.tensor([*addresses, *(number for triple in triples for number in triple)], dtype=torch.int64)
    _copy_slots[(len(triples) * num_chunks, len(addresses))](
        _to_device(table, caches[0].device), num_chunks, page_stride, slot_stride, *outer_strides, layout.column_stride,
        WORD=_WORDS[word], WORD_BYTES=word, ALIGNMENT=alignment,
        SIZE_0=outer_sizes[0], SIZE_1=outer_sizes[1], SIZE_2=outer_sizes[2], NUM_COLUMNS=num_columns,
        SLOTS_ARE_COLUMNS=layout.slots_are_columns, BLOCK_ROWS=block_rows, BLOCK_COLUMNS=block_columns, num_warps=4,
    )  # fmt: skip


def _block_columns(num_columns: int) -> int:
    """Columns of a tile: a power of two that leaves few lanes idle, at least 16 where there are as many."""
    for size in (512, 256, 128, 64, 32, 16):
        if triton.cdiv(num_columns, size) * size <= num_columns * 9 // 8:
            return size
    return min(16, int(triton.next_power_of_2(num_columns)))


def _to_device(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return table  # the interpreter's
    return table.pin_memory().to(device, non_blocking=True)


@triton.jit(do_not_specialize=["num_chunks"])
def _copy_slots(
    table_ptr, num_chunks, page_stride, slot_stride, stride_0, stride_1, stride_2, column_stride, WORD: tl.constexpr,
    WORD_BYTES: tl.constexpr, ALIGNMENT: tl.constexpr, SIZE_0: tl.constexpr, SIZE_1: tl.constexpr, SIZE_2: tl.constexpr,
    NUM_COLUMNS: tl.constexpr, SLOTS_ARE_COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of one triple in one cache. Offsets are int64: pages lie further apart than 2 ** 31.

    table: the addresses of the caches, then the triples.
    """
    chunk = tl.program_id(0) % num_chunks
    triple_ptr = table_ptr + tl.num_programs(1) + 3 * (tl.program_id(0) // num_chunks)
    source = tl.load(triple_ptr)
    destination = tl.load(triple_ptr + 1)
    num_used = tl.load(triple_ptr + 2).to(tl.int32)
    num_column_chunks: tl.constexpr = (NUM_COLUMNS + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    first_row = chunk // num_column_chunks * BLOCK_ROWS
    columns = chunk % num_column_chunks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    if SLOTS_ARE_COLUMNS:
        num_rows = SIZE_0 * SIZE_1 * SIZE_2
    else:
        num_rows = SIZE_0 * SIZE_1 * SIZE_2 * num_used
    if first_row < num_rows:
        rows = first_row + tl.arange(0, BLOCK_ROWS)
        if SLOTS_ARE_COLUMNS:
            outer = rows
            offsets = tl.zeros([BLOCK_ROWS], tl.int64)
            is_copied = columns < num_used
        else:
            outer = rows // num_used
            offsets = (rows % num_used).to(tl.int64) * slot_stride
            is_copied = columns < NUM_COLUMNS
        offsets += (outer % SIZE_2).to(tl.int64) * stride_2
        offsets += (outer // SIZE_2 % SIZE_1).to(tl.int64) * stride_1
        offsets += (outer // (SIZE_2 * SIZE_1)).to(tl.int64) * stride_0
        # The launcher has seen addresses and strides, the compiler has not, and it would not take 16 bytes at a time.
        offsets = tl.multiple_of(offsets, ALIGNMENT // WORD_BYTES)
        source_offset = tl.multiple_of(source * page_stride, ALIGNMENT // WORD_BYTES)
        destination_offset = tl.multiple_of(destination * page_stride, ALIGNMENT // WORD_BYTES)
        base = tl.load(table_ptr + tl.program_id(1)).to(tl.pointer_type(WORD))
        base = tl.multiple_of(base, ALIGNMENT)
        tile = offsets[:, None] + columns[None, :].to(tl.int64) * column_stride
        mask = (rows < num_rows)[:, None] & is_copied[None, :]
        tl.store(base + destination_offset + tile, tl.load(base + source_offset + tile, mask=mask), mask=mask)
