"""What keeps a file's blocks: a cache for lookups, and a thread that waits for the disk in their place."""

import os
import weakref
from collections import deque
from collections.abc import Sequence
from queue import SimpleQueue
from threading import Thread

import numpy as np
import numpy.typing as npt

from vllm_double.retrieval.datastore.block_steps import BLOCK, READING, Blocks

__all__ = ["Reader"]

_LEAST_BLOCKS = 64
_SPAN = 64  # blocks that the thread reads at once
_MOST_MISSING = 16  # blocks that are asked for after one call

_Stamp = tuple[int, int]
_Wanted = SimpleQueue[list[int] | None]
_Read = deque[list[tuple[int, bytes]] | None]
"""Spans: the first block's number, and all bytes. None: the file has changed."""


class Reader:
    """An open file of which no byte is read after it was changed. Its owner's thread calls it, and never waits for a disk.

    ``begin``, lookups in ``blocks``, ``end``. A block that the operating system does not have in memory is missing; it is read
    by a thread, for later calls.
    """

    def __init__(self, fd: int, stamp: _Stamp, offsets: Sequence[int], lengths: Sequence[int]) -> None:
        """fd: is closed with the reader. stamp: see `stamp_of`. offsets, lengths: of the sections, in bytes and items."""
        self._fd, self._stamp = fd, stamp
        self._offsets, self._lengths = np.array(offsets, np.int64), np.array(lengths, np.int64)
        self.keep(_LEAST_BLOCKS)
        self._wanted: _Wanted = SimpleQueue()
        self._read: _Read = deque()
        self._thread: Thread | None = None
        self._is_reading = self._has_changed = False
        self._close: weakref.finalize[..., Reader] = weakref.finalize(self, os.close, fd)

    def keep(self, num_blocks: int) -> None:
        """Have an empty cache of so many blocks, or fewer; memory is taken as it is used."""
        most = max(num_blocks, _LEAST_BLOCKS).bit_length() - 1
        num_places = 1 << min(most, (-(-self._stamp[0] // BLOCK) - 1).bit_length())
        memory = np.zeros((num_places, BLOCK // 8), np.int64)
        reading = np.zeros(1, READING)
        reading["first"], reading["iovec"] = memory.ctypes.data, reading.ctypes.data
        reading["fd"], reading["size"] = self._fd, self._stamp[0]
        self.blocks = Blocks(
            reading, np.zeros(num_places, np.int64), memory.view(np.uint8), memory.view(np.int32), memory,
            np.zeros(_MOST_MISSING, np.int64), self._offsets, self._lengths,
        )  # fmt: skip

    def begin(self, max_reads: int) -> None:
        """Lookups follow, which read so many blocks at most."""
        while self._read:
            self._is_reading = False
            spans = self._read.popleft()
            self._has_changed |= spans is None
            for first, data in spans or ():
                self._hold(first, data)
        self.blocks.reading["num_reads"] = self.blocks.reading["num_missing"] = 0
        self.blocks.reading["max_reads"] = max_reads

    def end(self) -> bool:
        """Whether the file is what it was; if not, nothing of the lookups since `begin` counts."""
        (reading,) = self.blocks.reading
        if reading["num_reads"] > reading["num_missing"]:
            self._has_changed |= stamp_of(self._fd) != self._stamp
        if reading["num_missing"] and not self._is_reading and not self._has_changed:
            self._is_reading = True
            if self._thread is None:
                self._start()
            self._wanted.put(self.blocks.missing[: reading["num_missing"]].tolist())  # no more than there is room for
        return not self._has_changed

    def _hold(self, first: int, data: bytes) -> None:
        num_blocks, rest = divmod(len(data), BLOCK)
        numbers = np.arange(first, first + num_blocks + (rest > 0))
        places = numbers & (len(self.blocks.tags) - 1)
        padded: npt.NDArray[np.uint8] = np.zeros((len(numbers), BLOCK), np.uint8)
        padded.ravel()[: len(data)] = np.frombuffer(data, np.uint8)
        self.blocks.bytes[places] = padded
        self.blocks.tags[places] = numbers + 1

    def _start(self) -> None:
        """The thread ends with the reader, and closes the file."""
        self._close.detach()
        self._close = weakref.finalize(self, self._wanted.put, None)
        arguments = (self._fd, self._stamp, self._wanted, self._read)
        self._thread = Thread(target=_run, args=arguments, name="vllm-double-datastore", daemon=True)
        self._thread.start()


def stamp_of(fd: int) -> _Stamp:
    """Size in bytes and time of the last change."""
    status = os.fstat(fd)
    return status.st_size, status.st_mtime_ns


def _run(fd: int, stamp: _Stamp, wanted: _Wanted, read: _Read) -> None:
    while (blocks := wanted.get()) is not None:
        spans: list[tuple[int, bytes]] | None = []
        try:
            for first in sorted({block // _SPAN * _SPAN for block in blocks}):
                spans.append((first, os.pread(fd, _SPAN * BLOCK, first * BLOCK)))  # type: ignore[union-attr]
            if stamp_of(fd) != stamp:
                spans = None
        except OSError:
            spans = None  # as good as changed
        read.append(spans)
    os.close(fd)
