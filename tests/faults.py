"""Channels with the faults that a test asks for.

Faults are drawn from a seeded generator, so a failing run can be repeated. The shared memory loses nothing but by damage, and
never reorders: faults other than ``corrupt`` show that the two ends would bear a worse transport.
"""

from __future__ import annotations

import random
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, cast

from vllm_double.transport.base import DraftChannel
from vllm_double.transport.inprocess import InProcessTargetChannel
from vllm_double.transport.ring import HEADER_BYTES, Record, seal_frame

__all__ = ["Faults", "FaultyQueue", "Queue", "QueueTargetChannel", "faulty_pair", "inject", "open_frame"]


@dataclass(frozen=True, slots=True)
class Faults:
    """Chances, per record, of each misfortune.

    ``drop``: it vanishes; ``duplicate``: it comes twice; ``delay``: it is held back for 1 to ``max_delay``
    drains and so overtaken; ``corrupt``: one bit of it is flipped, which also costs what stands behind it.
    """

    drop: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.0
    corrupt: float = 0.0
    max_delay: int = 3

    def __post_init__(self) -> None:
        for chance in (self.drop, self.duplicate, self.delay, self.corrupt):
            if not 0.0 <= chance <= 1.0:
                raise ValueError(f"{chance} is no probability")
        if self.max_delay < 1:
            raise ValueError("max_delay must be at least 1")


_NO_FAULTS: Final = Faults()


def open_frame(frame: bytes) -> Record | None:
    """The record in ``frame`` (exactly one), or None if it is damaged. Does not look at the sequence number."""
    if len(frame) < HEADER_BYTES:
        return None
    crc, length, kind, session = struct.unpack_from("<IIII", frame)
    if length != len(frame) - HEADER_BYTES or zlib.crc32(frame[4:]) != crc:
        return None
    return kind, session, memoryview(frame)[HEADER_BYTES:]


class Queue:
    """A ring's producer and consumer in one, on a deque of sealed records. ``capacity``: bytes, as a ring counts them."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.corrupt = 0
        self._queue: deque[bytes] = deque()
        self._used = 0
        self._sequence = 0

    @property
    def pending(self) -> bool:
        return bool(self._queue)

    def skip(self) -> None:
        self._queue.clear()
        self._used = 0

    def push(self, kind: int, session: int, payload: bytes) -> bool:
        size = HEADER_BYTES + len(payload)
        if size > self.capacity:
            raise ValueError(f"a record of {size} bytes in a ring of {self.capacity}")
        if self._used + size > self.capacity:
            return False
        self._deliver(seal_frame(kind, session, self._sequence, payload))
        self._sequence += size
        return True

    def _deliver(self, frame: bytes) -> None:
        self._used += len(frame)
        self._queue.append(frame)

    def drain(self, max_bytes: int, kind: int = -1, size: int = 1) -> list[Record]:
        """Nothing is merged."""
        records: list[Record] = []
        taken = 0
        while self._queue and (not records or taken + len(self._queue[0]) <= max_bytes):
            frame = self._queue.popleft()
            taken += len(frame)
            self._used -= len(frame)
            record = open_frame(frame)
            if record is None:
                self.corrupt += 1
                self.skip()
                break
            records.append(record)
        return records


class QueueTargetChannel(InProcessTargetChannel):
    """A target's channel with queues in the place of the rings, and so have its workers."""

    def __init__(self, commands: Queue, reports: Queue, sleep: Callable[[float], None]) -> None:
        super().__init__(HEADER_BYTES, sleep)
        self.commands = commands
        self.reports = reports
        self._commands, self._reports = cast(Any, commands), cast(Any, reports)

    def attach(self) -> DraftChannel:
        worker = super().attach()
        worker._commands, worker._reports = cast(Any, self.commands), cast(Any, self.reports)
        self.commands.skip()
        self.commands.corrupt = 0
        return worker


class FaultyQueue(Queue):
    """A Queue with faults, which `inject` changes for the records still to come."""

    def __init__(self, capacity: int, faults: Faults, seed: int) -> None:
        super().__init__(capacity)
        self.faults = faults
        self._random = random.Random(seed)
        self._held: list[tuple[int, bytes]] = []

    @property
    def pending(self) -> bool:
        return bool(self._queue or self._held)

    def skip(self) -> None:
        super().skip()
        self._held.clear()

    def _deliver(self, frame: bytes) -> None:
        chance = self._random.random
        if chance() < self.faults.drop:
            return
        if chance() < self.faults.corrupt:
            damaged = bytearray(frame)
            damaged[self._random.randrange(len(frame))] ^= 1 << self._random.randrange(8)
            frame = bytes(damaged)
        for _ in range(2 if chance() < self.faults.duplicate else 1):
            if chance() < self.faults.delay:
                self._used += len(frame)
                self._held.append((self._random.randint(1, self.faults.max_delay), frame))
            else:
                super()._deliver(frame)

    def drain(self, max_bytes: int, kind: int = -1, size: int = 1) -> list[Record]:
        self._queue.extend(frame for turns, frame in self._held if turns == 0)
        self._held = [(turns - 1, frame) for turns, frame in self._held if turns > 0]
        return super().drain(max_bytes)


def inject(channel: Queue, faults: Faults) -> None:
    """Replace the faults for the records still to come."""
    assert isinstance(channel, FaultyQueue)
    channel.faults = faults


def faulty_pair(
    *,
    capacity: int = 4 << 20,
    commands: Faults = _NO_FAULTS,
    reports: Faults = _NO_FAULTS,
    seed: int = 0,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[QueueTargetChannel, DraftChannel]:
    """As `in_process_pair`, with faults in either direction."""
    target = QueueTargetChannel(FaultyQueue(capacity, commands, 2 * seed), FaultyQueue(capacity, reports, 2 * seed + 1), sleep)
    return target, target.attach()
