"""An append-only byte ring in shared memory: one producer, one consumer, no locks, nobody waits.

Layout of the buffer::

    0    head: bytes ever written, u64, written by the producer only
    64   tail: bytes ever read, u64, written by the consumer only
    128  data: ``capacity`` bytes; byte number i of the stream lies at i % capacity

A record is a header (CRC32 of all that follows, length, kind, session, sequence number) and its payload, and
may wrap around the end. Its sequence number is the stream position of its first byte, so each side knows what
must come next without any memory of its own: a restarted end simply goes on, and bytes of an earlier lap
never pass for a record.

Either index may be overwritten by a stray write: each side keeps its own and writes it again at every call,
and a consumer that reads nonsense goes on at the producer's head. Records may be lost by that; a wrong one is
not delivered.
"""

from __future__ import annotations

import functools
import struct
import threading
import zlib
from collections.abc import Callable
from typing import Final, TypeAlias

import numpy as np

__all__ = ["HEADER_BYTES", "INDEX_BYTES", "Record", "RingConsumer", "RingProducer", "seal_frame"]

INDEX_BYTES: Final = 128
_HEAD: Final = 0
_TAIL: Final = 8  # in 8-byte words: another cache line, so that the ends do not fight over one

_CRC: Final = struct.Struct("<I")
_BODY: Final = struct.Struct("<IIIQ")  # length of the payload, kind, session, sequence number
HEADER_BYTES: Final = _CRC.size + _BODY.size

Record: TypeAlias = tuple[int, int, memoryview]
"""(kind, session, payload); the payload is private memory of the reader."""

_MAX_ENTRIES: Final = 1024  # of one drain
_ROOM_TO_ALIGN: Final = 8 * _MAX_ENTRIES
ENTRY: Final = np.dtype([("kind", "u4"), ("session", "u4"), ("start", "i8"), ("end", "i8")])


@functools.cache
def _read_records() -> Callable[..., tuple[int, int]]:
    """See `_ring_steps.read_records`. numba is imported late: in a process of vLLM it must not come before vLLM."""
    from vllm_double.jit import machine_code
    from vllm_double.transport import _ring_steps as steps

    some = np.zeros(1, np.uint8)
    return machine_code(steps.read_records, some, np.uint64(0), 0, 0, 0, 1, some, np.zeros(1, ENTRY))


def seal_frame(kind: int, session: int, sequence: int, payload: bytes) -> bytes:
    """A whole record: header and payload."""
    body = _BODY.pack(len(payload), kind, session, sequence) + payload
    return _CRC.pack(zlib.crc32(body)) + body


class _Ring:
    def __init__(self, buffer: memoryview) -> None:
        """``buffer``: writable bytes, 8-byte aligned, INDEX_BYTES + capacity of them; zeroed before its first
        use."""
        self.capacity: Final = len(buffer) - INDEX_BYTES
        if self.capacity < HEADER_BYTES or buffer.readonly or buffer.format != "B":
            raise ValueError(f"a ring needs a writable view of more than {INDEX_BYTES + HEADER_BYTES} bytes")
        # Stores and loads through a view of 'Q' are single aligned 8-byte moves: an index is never seen half
        # written.
        self._indices = buffer[:INDEX_BYTES].cast("Q")
        self._data = buffer[INDEX_BYTES:]
        # Of this ring alone, hence never contended, and never left held in a forked child by another thread.
        self._lock = threading.Lock()

    def _fence(self) -> None:
        """Order the memory accesses before this line against those after it, as the other process sees them.

        Nothing in Python promises that the other core sees a record's bytes before the index that announces
        them; x86 keeps the order of stores, ARM does not. Taking and dropping an uncontended lock is the
        cheapest barrier that Python has. Twice, because acquire and release each let accesses slip *into* the
        locked section, where two of them could still pass each other; between a release and the next acquire
        nothing can.
        """
        with self._lock:
            pass
        with self._lock:
            pass

    def close(self) -> None:
        """Let go of the buffer; nothing else may be called afterwards."""
        self._indices.release()
        self._data.release()


class RingProducer(_Ring):
    """The writing end; goes on where the last producer stopped."""

    def __init__(self, buffer: memoryview) -> None:
        super().__init__(buffer)
        self._head: int = self._indices[_HEAD]

    def push(self, kind: int, session: int, payload: bytes) -> bool:
        """Append a record. False: no room, nothing was written. Raises ValueError if it could never fit."""
        size = HEADER_BYTES + len(payload)
        capacity = self.capacity
        if size > capacity:
            raise ValueError(f"a record of {size} bytes in a ring of {capacity}")
        head = self._head
        used = head - self._indices[_TAIL]
        if used < 0 or used + size > capacity:
            # Shown again because the consumer may be stuck behind a damaged copy, and this is what frees it.
            self._indices[_HEAD] = head
            return False
        frame = seal_frame(kind, session, head, payload)
        start = head % capacity
        room = capacity - start
        if size <= room:
            self._data[start : start + size] = frame
        else:
            self._data[start:] = frame[:room]
            self._data[: size - room] = frame[room:]
        self._fence()  # the record is whole before the head shows it
        self._head = head + size
        self._indices[_HEAD] = self._head
        return True


class RingConsumer(_Ring):
    """The reading end; goes on where the last consumer stopped. ``corrupt`` counts the resynchronisations."""

    def __init__(self, buffer: memoryview) -> None:
        super().__init__(buffer)
        self._tail: int = self._indices[_TAIL]
        self._bytes = np.frombuffer(self._data, np.uint8)
        self._entries = np.zeros(_MAX_ENTRIES, ENTRY)
        self._read_records = _read_records()
        self.corrupt = 0

    @property
    def pending(self) -> bool:
        """Whether there is something to drain."""
        return bool(self._indices[_HEAD] != self._tail)

    def skip(self) -> None:
        """Drop whatever stands in the ring."""
        self._tail = self._indices[_TAIL] = self._indices[_HEAD]

    def drain(self, max_bytes: int, kind: int = -1, size: int = 1) -> list[Record]:
        """Take whole records of at most ``max_bytes`` together, but at least one if there is one.

        Consecutive records of ``kind`` and one session come as one, if ``size`` divides their lengths. A damaged record, or
        damaged indices, end the drain: what lies between there and the producer's head is dropped.
        """
        head = self._indices[_HEAD]
        tail = self._tail
        used = head - tail
        records: list[Record] = []
        if used:
            if HEADER_BYTES <= used <= self.capacity:
                self._fence()  # no byte of a record is read before the head that shows it
                after = self._read(tail, used, max_bytes, kind, size, records)
            else:
                after = None
            if after is None:
                self.corrupt += 1
                after = head
            self._fence()  # nor is its room given back before it was read
            self._tail = after
        self._indices[_TAIL] = self._tail
        return records

    def _read(self, tail: int, used: int, max_bytes: int, kind: int, size: int, records: list[Record]) -> int | None:
        """Append private copies of the records behind ``tail``; the new tail, or None at a damaged record."""
        # Copies, because checking bytes that the other end can still change is no check.
        payloads = np.empty(used + _ROOM_TO_ALIGN, np.uint8)
        num_read, num_entries = self._read_records(self._bytes, tail, used, max_bytes, kind, size, payloads, self._entries)
        view = memoryview(payloads)  # type: ignore[arg-type]
        for entry_kind, session, start, end in self._entries[:num_entries].tolist():
            records.append((entry_kind, session, view[start:end]))
        return tail + num_read if num_read >= 0 else None

    def close(self) -> None:
        """See _Ring."""
        del self._bytes
        super().close()
