"""Both ends in one process, for tests and for the simulated world. Every record goes through the wire code and its checksum."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from vllm_double.transport.base import TargetEnd, WorkerEnd, new_session
from vllm_double.transport.ring import HEADER_BYTES, MergedRecord, Record, open_frame, seal_frame

__all__ = ["Channel", "InProcessTargetEnd", "InProcessWorkerEnd", "Link", "in_process_pair"]


class Channel:
    """One direction: a ring's producer and consumer in one, on a deque of sealed records.

    ``capacity``: bytes, counted as a ring counts them.
    """

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
        """Drop whatever is on its way."""
        self._queue.clear()
        self._used = 0

    def push(self, kind: int, session: int, payload: bytes) -> bool:
        size = HEADER_BYTES + len(payload)
        if size > self.capacity:
            raise ValueError(f"a record of {size} bytes in a channel of {self.capacity}")
        if self._used + size > self.capacity:
            return False
        self._deliver(seal_frame(kind, session, self._sequence, payload))
        self._sequence += size
        return True

    def _deliver(self, frame: bytes) -> None:
        self._used += len(frame)
        self._queue.append(frame)

    def drain(self, max_bytes: int) -> list[Record]:
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


@dataclass(slots=True)
class Link:
    """What the control block is to the shared memory."""

    commands: Channel
    reports: Channel
    random: random.Random
    sleep: Callable[[float], None]
    session: int = 0
    heartbeat: int = 0
    open: bool = True


class InProcessTargetEnd(TargetEnd):
    """TargetEnd without a process boundary. ``commands`` and ``reports`` are its channels."""

    def __init__(self, link: Link) -> None:
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

    def __init__(self, link: Link) -> None:
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
    *, capacity: int = 4 << 20, sleep: Callable[[float], None] = time.sleep
) -> tuple[InProcessTargetEnd, InProcessWorkerEnd]:
    """Two attached ends. ``capacity``: bytes of each direction; ``sleep``: what the worker's ``wait`` naps with.

    A further worker comes from ``target.attach()``.
    """
    target = InProcessTargetEnd(Link(Channel(capacity), Channel(capacity), random.Random(0), sleep))
    return target, target.attach()
