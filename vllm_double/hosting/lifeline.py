"""Ends the engine when the process that launched it is gone.

vLLM's engine core does not notice that its API server was killed: it would keep its memory, its cores and the draft worker for
ever. Workers end with their engine core by themselves.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress

from vllm_double.hosting.process_watch import wait_for_end
from vllm_double.hosting.processes import is_gone, parent

__all__ = ["engine_processes", "hold"]

_logger = logging.getLogger(__name__)

_GRACE_S = 5.0


def engine_processes(launcher: int, pid: int, parent_of: Callable[[int], int] = parent) -> list[int]:
    """``pid`` and its ancestors up to the launcher, the launcher last; [] where it does not descend from the launcher."""
    found = [pid]
    while found[-1] > 1:
        found.append(parent_of(found[-1]))
        if found[-1] == launcher:
            return found
    return []


def hold(launcher: int) -> list[int]:
    """Watch ``launcher`` in a daemon thread; on its death SIGTERM, then SIGKILL, for the engine to which this process belongs.

    Returns the engine's processes, or [] with nothing to watch: the engine runs in the launcher itself, or on another machine.
    """
    chain = engine_processes(launcher, os.getpid())
    if chain:
        threading.Thread(target=_watch, args=(launcher, chain[-2]), name="vllm-double-lifeline", daemon=True).start()
    return chain


def _watch(launcher: int, engine: int) -> None:
    wait_for_end(launcher)
    if is_gone(engine):
        return
    _logger.warning("The process that launched this engine (%d) is gone: the engine (%d) ends.", launcher, engine)
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.kill(engine, number)
        if wait_for_end(engine, _GRACE_S):
            return
