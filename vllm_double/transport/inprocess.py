"""Both sides of a channel in one process, for tests and for the simulated world. Records go through wire code and rings."""

from __future__ import annotations

import time
from collections.abc import Callable

from vllm_double.transport.base import DraftChannel, Region, TargetChannel

__all__ = ["InProcessTargetChannel", "in_process_pair"]


class InProcessTargetChannel(TargetChannel):
    """Without a process boundary. ``capacity``: bytes of each ring; ``sleep``: what workers' ``wait`` naps with."""

    def __init__(self, capacity: int, sleep: Callable[[float], None]) -> None:
        super().__init__(Region(bytearray(Region.size(capacity, capacity))), capacity, capacity)
        self._sleep = sleep

    def attach(self) -> DraftChannel:
        """Attach a new worker, which takes over from the present one."""
        return DraftChannel(self._region, self._sleep)


def in_process_pair(
    *, capacity: int = 4 << 20, sleep: Callable[[float], None] = time.sleep
) -> tuple[InProcessTargetChannel, DraftChannel]:
    """Two attached sides, see InProcessTargetChannel."""
    target = InProcessTargetChannel(capacity, sleep)
    return target, target.attach()
