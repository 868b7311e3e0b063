"""Both ends in one process, with the faults that a test asks for.

Every record goes through the wire code and its checksum. Faults are drawn from a seeded generator, so a
failing run can be repeated. The shared memory loses nothing but by damage, and never reorders: faults other
than ``corrupt`` show that the two ends would bear a worse transport.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vllm_double.transport.base import TargetEnd, WorkerEnd, new_session
from vllm_double.transport.ring import HEADER_BYTES, MergedRecord, Record, open_frame, seal_frame

__all__ = ["Channel", "Faults", "InProcessTargetEnd", "InProcessWorkerEnd", "in_process_pair"]


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


class Channel:
    """One direction: a ring's producer and consumer in one, on a deque of sealed records.

    ``capacity``: bytes, counted as a ring counts them.
    """

    def __init__(self, capacity: int, faults: Faults, seed: int) -> None:
        self.capacity = capacity
        self.corrupt = 0
        self._faults = faults
        self._random = random.Random(seed)
        self._queue: deque[bytes] = deque()
        self._held: list[tuple[int, bytes]] = []
        self._used = 0
        self._sequence = 0

    @property
    def pending(self) -> bool:
        return bool(self._queue or self._held)

    def inject(self, faults: Faults) -> None:
        """Replace the faults for the records still to come."""
        self._faults = faults

    def skip(self) -> None:
        """Drop whatever is on its way."""
        self._queue.clear()
        self._held.clear()
        self._used = 0

    def push(self, kind: int, session: int, payload: bytes) -> bool:
        size = HEADER_BYTES + len(payload)
        if size > self.capacity:
            raise ValueError(f"a record of {size} bytes in a channel of {self.capacity}")
        if self._used + size > self.capacity:
            return False
        frame = seal_frame(kind, session, self._sequence, payload)
        self._sequence += size
        chance = self._random.random
        if chance() < self._faults.drop:
            return True
        if chance() < self._faults.corrupt:
            frame = self._flip(frame)
        for _ in range(2 if chance() < self._faults.duplicate else 1):
            self._used += size
            if chance() < self._faults.delay:
                self._held.append((self._random.randint(1, self._faults.max_delay), frame))
            else:
                self._queue.append(frame)
        return True

    def drain(self, max_bytes: int) -> list[Record]:
        self._queue.extend(frame for turns, frame in self._held if turns == 0)
        self._held = [(turns - 1, frame) for turns, frame in self._held if turns > 0]
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

    def drain_merged(self, max_bytes: int, kind: int, size: int) -> list[MergedRecord]:
        """As `drain`: nothing is merged."""
        return [(*record, 1) for record in self.drain(max_bytes)]

    def _flip(self, frame: bytes) -> bytes:
        damaged = bytearray(frame)
        damaged[self._random.randrange(len(frame))] ^= 1 << self._random.randrange(8)
        return bytes(damaged)


@dataclass(slots=True)
class _Link:
    """What the control block is to the shared memory."""

    commands: Channel
    reports: Channel
    random: random.Random
    sleep: Callable[[float], None]
    session: int = 0
    heartbeat: int = 0
    open: bool = True


class InProcessTargetEnd(TargetEnd):
    """TargetEnd without a process boundary. ``commands`` and ``reports`` are its channels, to inject faults
    into."""

    def __init__(self, link: _Link) -> None:
        super().__init__(link.commands, link.reports)
        self.commands = link.commands
        self.reports = link.reports
        self._link = link

    @property
    def session(self) -> int:
        return self._link.session

    @property
    def heartbeat(self) -> int:
        return self._link.heartbeat

    def attach(self) -> InProcessWorkerEnd:
        """Attach a new worker, which takes over from the present one."""
        if self._closed:
            raise RuntimeError("the target has closed")
        return InProcessWorkerEnd(self._link)

    def close(self) -> None:
        self._closed = True
        self._link.open = False
        self._link.session = 0


class InProcessWorkerEnd(WorkerEnd):
    """WorkerEnd without a process boundary."""

    def __init__(self, link: _Link) -> None:
        session = new_session(link.session, link.random.getrandbits)
        super().__init__(session, link.commands, link.reports, link.sleep)
        self._link = link
        link.commands.skip()
        link.session = session

    @property
    def superseded(self) -> bool:
        return self._link.session != self._session

    def target_alive(self) -> bool:
        return self._link.open

    def beat(self) -> None:
        if not self.superseded:
            self._link.heartbeat += 1

    def _give_up(self) -> None:
        if not self.superseded:
            self._link.session = 0

    def close(self) -> None:
        self._give_up()


def in_process_pair(
    *,
    capacity: int = 4 << 20,
    commands: Faults = _NO_FAULTS,
    reports: Faults = _NO_FAULTS,
    seed: int = 0,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[InProcessTargetEnd, InProcessWorkerEnd]:
    """Two attached ends. ``capacity``: bytes of each direction; ``sleep``: what the worker's ``wait`` naps
    with.

    A further worker comes from ``target.attach()``; faults are changed by ``target.commands.inject`` and
    ``target.reports.inject``.
    """
    link = _Link(
        Channel(capacity, commands, 2 * seed),
        Channel(capacity, reports, 2 * seed + 1),
        random.Random(seed),
        sleep,
    )
    target = InProcessTargetEnd(link)
    return target, target.attach()
