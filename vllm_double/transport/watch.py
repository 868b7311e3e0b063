"""Whether a process, not merely its number, is still there."""

from __future__ import annotations

import os
import select
from typing import Final

__all__ = ["ProcessWatch"]


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

    def close(self) -> None:
        """Give the descriptor back. May be called twice."""
        if not self._closed:
            self._closed = True
            os.close(self._fd)
