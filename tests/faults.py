"""Channels with the faults that a test asks for.

Faults are drawn from a seeded generator, so a failing run can be repeated. The shared memory loses nothing but by damage, and
never reorders: faults other than ``corrupt`` show that the two ends would bear a worse transport.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vllm_double.transport.inprocess import Channel, InProcessTargetEnd, InProcessWorkerEnd, Link
from vllm_double.transport.ring import Record

__all__ = ["Faults", "FaultyChannel", "faulty_pair", "inject"]


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


class FaultyChannel(Channel):
    """A Channel with faults, which `inject` changes for the records still to come."""

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

    def drain(self, max_bytes: int) -> list[Record]:
        self._queue.extend(frame for turns, frame in self._held if turns == 0)
        self._held = [(turns - 1, frame) for turns, frame in self._held if turns > 0]
        return super().drain(max_bytes)


def inject(channel: Channel, faults: Faults) -> None:
    """Replace the faults for the records still to come."""
    assert isinstance(channel, FaultyChannel)
    channel.faults = faults


def faulty_pair(
    *,
    capacity: int = 4 << 20,
    commands: Faults = _NO_FAULTS,
    reports: Faults = _NO_FAULTS,
    seed: int = 0,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[InProcessTargetEnd, InProcessWorkerEnd]:
    """As `in_process_pair`, with faults in either direction."""
    link = Link(
        FaultyChannel(capacity, commands, 2 * seed), FaultyChannel(capacity, reports, 2 * seed + 1), random.Random(seed), sleep
    )
    target = InProcessTargetEnd(link)
    return target, target.attach()
