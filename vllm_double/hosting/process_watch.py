"""Whether a process, not merely its number, is still there."""

from __future__ import annotations

import os
import select
import time
from typing import Final

__all__ = ["ProcessWatch", "wait_for_end"]

_LOOK_EVERY_S = 0.5  # where there is no pidfd to wait on


class ProcessWatch:
    """Watches one process of this host. Raises OSError if there is none with this number.

    A zombie counts as dead. A process that later gets the same number is never mistaken for it.
    """

    def __init__(self, pid: int) -> None:
        self._poll: select.poll | None = None
        try:
            self._fd = os.pidfd_open(pid)
        except ProcessLookupError:
            raise
        except OSError:
            # Sandboxes and old seccomp filters refuse pidfds. An open file of /proc stays with its process as
            # well.
            self._fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        else:
            self._poll = select.poll()
            self._poll.register(self._fd, select.POLLIN)
        self._closed = False
        self.pid: Final = pid

    def alive(self) -> bool:
        """False once the process has ended, or the watch is closed. About 1 us."""
        if self._closed:
            return False
        if self._poll is not None:
            return not self._poll.poll(0)
        try:
            stat = os.pread(self._fd, 4096, 0)
        except OSError:
            return False
        # The name, in brackets, may itself hold brackets and blanks; the state follows the last one.
        return stat.rpartition(b")")[2].strip()[:1] not in (b"", b"Z", b"X")

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the process has ended, or until the time is up (None: never); whether it has ended."""
        if self._poll is not None and not self._closed:
            return bool(self._poll.poll(None if timeout_s is None else 1000 * timeout_s))
        deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        while self.alive():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(_LOOK_EVERY_S, left))
        return True

    def close(self) -> None:
        """Give the descriptor back. May be called twice."""
        if not self._closed:
            self._closed = True
            os.close(self._fd)


def wait_for_end(pid: int, timeout_s: float | None = None) -> bool:
    """ProcessWatch.wait for a process that may be gone already. Raises OSError where it cannot be watched, which is no end."""
    try:
        watch = ProcessWatch(pid)
    except (ProcessLookupError, FileNotFoundError):
        return True
    try:
        return watch.wait(timeout_s)
    finally:
        watch.close()
