"""Both ends in one process, for tests and for the simulated world. Every record goes through the wire code and the rings."""

from __future__ import annotations

import time
from collections.abc import Callable

from vllm_double.transport.base import Region, TargetEnd, WorkerEnd

__all__ = ["InProcessTargetEnd", "in_process_pair"]


class InProcessTargetEnd(TargetEnd):
    """TargetEnd without a process boundary. ``capacity``: bytes of each ring; ``sleep``: what workers' ``wait`` naps with."""

    def __init__(self, capacity: int, sleep: Callable[[float], None]) -> None:
        super().__init__(Region(bytearray(Region.size(capacity, capacity))), capacity, capacity)
        self._sleep = sleep

    def attach(self) -> WorkerEnd:
        """Attach a new worker, which takes over from the present one."""
        return WorkerEnd(self._region, self._sleep)


def in_process_pair(
    *, capacity: int = 4 << 20, sleep: Callable[[float], None] = time.sleep
) -> tuple[InProcessTargetEnd, WorkerEnd]:
    """Two attached ends, see InProcessTargetEnd."""
    target = InProcessTargetEnd(capacity, sleep)
    return target, target.attach()
