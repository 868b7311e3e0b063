"""The engine core leaves the draft's core to the draft while the target computes.

vLLM's engine core waits for its workers by ``sched_yield`` in a loop, for a second after the last message: a kernel that gives
equal shares hands it half of a core that the draft needs, and the engine core has no core of its own on a small CPU host.
"""

import functools
import time
from typing import Any

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

__all__ = ["wait_asleep"]

_MARK = "_vllm_double_wrapped"
_LOOK_EVERY_MS = 1  # a notification can be lost: then the message is seen so much later


def wait_asleep() -> None:
    """Have this process wait for messages on the socket that announces them, from the first moment. Once per process."""
    original = SpinCondition.wait
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def wait(self: Any, timeout_ms: int | None = None) -> None:
        if time.monotonic() > self.last_read + self.busy_loop_s:
            original(self, timeout_ms=timeout_ms)
            return
        busy_loop_s, self.busy_loop_s = self.busy_loop_s, float("-inf")
        try:
            original(self, timeout_ms=_LOOK_EVERY_MS)
        finally:
            self.busy_loop_s = busy_loop_s

    setattr(wait, _MARK, True)
    SpinCondition.wait = wait
