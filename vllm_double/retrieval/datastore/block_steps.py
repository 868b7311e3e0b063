"""A file as compiled lookups read it: number by number, out of a cache of blocks, and never waiting for a disk.

No file is mapped: a mapping of one that is cut off ends the process (SIGBUS), and its page faults wait for the disk. A number
that cannot be read now is 0, and `Reading.is_missing` says so: lookups test every number in any case.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import types

from vllm_double.jit import view_part
from vllm_double.retrieval.suffix_automaton.arena import Ints, Records

__all__ = ["BLOCK", "READING", "Blocks", "byte_at", "int_at", "long_at"]

Bytes = npt.NDArray[np.uint8]
Longs = npt.NDArray[np.int64]

BLOCK = 1024
"""Bytes that are read at once."""
READING = np.dtype(
    [
        ("start", "i8"), ("num_bytes", "i8"),  # Linux's `struct iovec`: where the next block goes, which ``iovec`` points to
        ("iovec", "i8"), ("first", "i8"),  # first: address of the cache
        ("fd", "i8"), ("size", "i8"),  # size: of the file, in bytes
        ("num_reads", "i8"), ("max_reads", "i8"),  # of this call
        ("num_missing", "i8"),  # of these, those that failed
        ("is_missing", "?"),  # a number was not to be had since this was last set to False
    ],
    align=True,
)  # fmt: skip
_NOWAIT = 8  # RWF_NOWAIT of Linux
_preadv2 = types.ExternalFunction(
    "preadv2", types.int64(types.int32, types.int64, types.int32, types.int64, types.int32)
)  # fmt: skip


class Blocks(NamedTuple):
    """Block b of the file, if it is held, lies at ``b % len(tags)``, where the tag is b + 1. There are 2^n places."""

    reading: Records
    """READING [1]"""
    tags: Longs
    bytes: Bytes
    """[places, BLOCK]"""
    ints: Ints
    """The same memory, as ``longs``."""
    longs: Longs
    missing: Longs
    """[any]: blocks that were not to be had."""
    offsets: Longs
    """[sections]: where they start in the file, in bytes."""
    lengths: Longs
    """[sections]: in items"""


@view_part
def _place(blocks: Blocks, position: int) -> int:
    """Where the block with this byte of the file lies; -1: it is not to be had now."""
    block = position // BLOCK
    place = block & (blocks.tags.size - 1)
    if blocks.tags[place] == block + 1:
        return place
    reading = blocks.reading[0]
    if reading.is_missing:
        return -1
    if reading.num_reads < reading.max_reads:
        reading.num_reads += 1
        blocks.tags[place] = 0
        reading.start = reading.first + place * BLOCK
        reading.num_bytes = min(BLOCK, reading.size - block * BLOCK)
        if _preadv2(reading.fd, reading.iovec, 1, block * BLOCK, _NOWAIT) == reading.num_bytes:
            blocks.tags[place] = block + 1
            return place
        if reading.num_missing < blocks.missing.size:
            blocks.missing[reading.num_missing] = block
        reading.num_missing += 1
    reading.is_missing = True
    return -1


@view_part
def byte_at(blocks: Blocks, section: int, index: int) -> int:
    """A byte of a section; 0 if it is missing."""
    position = blocks.offsets[section] + index
    place = _place(blocks, position)
    return 0 if place < 0 else np.int64(blocks.bytes[place, position % BLOCK])  # type: ignore[return-value]


@view_part
def int_at(blocks: Blocks, section: int, index: int) -> int:
    """The int32 with this number in a section; 0 if it is missing."""
    position = blocks.offsets[section] + 4 * index
    place = _place(blocks, position)
    return 0 if place < 0 else np.int64(blocks.ints[place, position % BLOCK // 4])  # type: ignore[return-value]


@view_part
def long_at(blocks: Blocks, section: int, index: int) -> int:
    """The int64 with this number in a section; 0 if it is missing."""
    position = blocks.offsets[section] + 8 * index
    place = _place(blocks, position)
    return 0 if place < 0 else blocks.longs[place, position % BLOCK // 8]  # type: ignore[no-any-return]
