"""Compiled parts of the transport: records out of a ring, and the look at what they hold."""

from typing import Any

import numpy as np

from vllm_double.jit import as_int, part

_HEADER_BYTES, _CRC_BYTES = 24, 4  # see ring.seal_frame


def _crc_tables() -> Any:
    """uint32 [8, 256]: the CRC of a byte that so many other bytes follow."""
    tables = np.zeros((8, 256), np.uint32)
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = (value >> 1) ^ (0xEDB88320 if value & 1 else 0)
        tables[0, byte] = value
    for place in range(1, 8):
        tables[place] = (tables[place - 1] >> 8) ^ tables[0][tables[place - 1] & 0xFF]
    return tables


_CRC = _crc_tables()


@part
def _word(data: Any, start: int) -> Any:
    return (
        np.uint32(data[start])
        | (np.uint32(data[start + 1]) << np.uint32(8))
        | (np.uint32(data[start + 2]) << np.uint32(16))
        | (np.uint32(data[start + 3]) << np.uint32(24))
    )


@part
def crc32(data: Any, start: int, end: int, value: Any) -> Any:
    """As zlib.crc32 of ``data[start:end]``, eight bytes at a time, without the inversions before and after."""
    byte, shift = np.uint32(0xFF), np.uint32(8)
    while end - start >= 8:
        low, high = value ^ _word(data, start), _word(data, start + 4)
        value = (
            _CRC[7, low & byte]
            ^ _CRC[6, (low >> shift) & byte]
            ^ _CRC[5, (low >> np.uint32(16)) & byte]
            ^ _CRC[4, low >> np.uint32(24)]
            ^ _CRC[3, high & byte]
            ^ _CRC[2, (high >> shift) & byte]
            ^ _CRC[1, (high >> np.uint32(16)) & byte]
            ^ _CRC[0, high >> np.uint32(24)]
        )
        start += 8
    while start < end:
        value = (value >> shift) ^ _CRC[0, (value ^ np.uint32(data[start])) & byte]
        start += 1
    return value


@part
def _copy(ring: Any, position: int, size: int, out: Any, start: int) -> None:
    """Bytes of the stream from a position in the ring on, which may wrap around its end."""
    room = min(size, len(ring) - position)
    out[start : start + room] = ring[position : position + room]
    if room < size:
        out[start + room : start + size] = ring[: size - room]


def read_records(
    ring: Any, tail: Any, used: int, max_bytes: int, kind: int, size: int, payloads: Any, entries: Any
) -> tuple[int, int]:
    """Copy payloads of whole records of at most ``max_bytes`` together, but at least one, out of a ring, and check the copies.

    tail: stream position where the ``used`` bytes begin. Consecutive records of ``kind`` and one session become one entry, if
    ``size`` divides their lengths. Returns how many bytes were read, -1 at a damaged record, and how many entries were written.
    """
    header = np.empty(_HEADER_BYTES, np.uint8)
    capacity, offset, written, num_entries = len(ring), 0, 0, 0
    while used - offset >= _HEADER_BYTES:
        if num_entries == len(entries) or (offset > 0 and offset + _HEADER_BYTES > max_bytes):
            return offset, num_entries
        position = as_int((tail + np.uint64(offset)) % np.uint64(capacity))
        _copy(ring, position, _HEADER_BYTES, header, 0)
        length = as_int(_word(header, 4))
        sequence = np.uint64(_word(header, 16)) | (np.uint64(_word(header, 20)) << np.uint64(32))
        end = offset + _HEADER_BYTES + length
        if sequence != tail + np.uint64(offset) or end > used:
            return -1, num_entries
        if offset > 0 and end > max_bytes:
            return offset, num_entries
        record_kind, session = _word(header, 8), _word(header, 12)
        is_merged = as_int(record_kind) == kind and length % size == 0
        joins = False
        if is_merged and num_entries > 0:
            last = entries[num_entries - 1]
            joins = last.kind == record_kind and last.session == session and (last.end - last.start) % size == 0
        start = written if joins else (written + 7) & ~7
        _copy(ring, (position + _HEADER_BYTES) % capacity, length, payloads, start)
        value = crc32(header, _CRC_BYTES, _HEADER_BYTES, np.uint32(0xFFFFFFFF))
        value = crc32(payloads, start, start + length, value) ^ np.uint32(0xFFFFFFFF)
        if value != _word(header, 0):
            return -1, num_entries
        written = start + length
        if joins:
            entries[num_entries - 1].end = written
        else:
            new = entries[num_entries]
            new.kind, new.session, new.start, new.end = record_kind, session, start, written
            num_entries += 1
        offset = end
    if offset < used:
        return -1, num_entries  # the producer never leaves less than a header
    return offset, num_entries


def keep_sound(nodes: Any) -> int:
    """Move the nodes (NODE_DTYPE [n]) that can be believed to the front; returns how many they are."""
    num_kept = 0
    for index in range(len(nodes)):
        node = nodes[index]
        is_sound = node.count <= len(node.probs)
        for place in range(min(as_int(node.count), len(node.probs))):
            is_sound = is_sound and 0.0 <= node.probs[place] < np.inf
        if is_sound:
            if num_kept != index:
                nodes[num_kept] = nodes[index]
            num_kept += 1
    return num_kept
