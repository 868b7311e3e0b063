"""The transport between two processes of one host: one anonymous memory file.

The target makes the file (``memfd_create``) and never gives it a name: the worker opens it as the target's
open file, ``/proc/<pid>/fd/<fd>``. Whoever dies, and however, nothing is left behind, because there never was
anything to unlink.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import stat
from typing import Final

from vllm_double.transport.base import (
    COMMAND_BYTES_WORD,
    CONTROL_BYTES,
    REPORT_BYTES_WORD,
    AttachError,
    DraftChannel,
    Region,
    TargetChannel,
)

__all__ = ["PROTOCOL_VERSION", "SharedDraftChannel", "SharedTargetChannel"]

PROTOCOL_VERSION: Final = 5
"""Raised with every change of the control block, the rings or the messages."""

_MAGIC: Final = int.from_bytes(b"vlldoubl", "little")
_SMALLEST_RING: Final = 4096

# Words of the control block beside those of `base`. Magic and version never move.
_MAGIC_WORD: Final = 0
_VERSION_WORD: Final = 1
_TOKEN_WORD: Final = 2
_PID_WORD: Final = 3


class SharedTargetChannel(TargetChannel):
    """TargetChannel on shared memory. ``address`` is what a worker of the same host and user attaches to."""

    def __init__(self, command_bytes: int = 4 << 20, report_bytes: int = 4 << 20) -> None:
        """Make the memory; sizes of the rings in bytes. Raises OSError, ValueError."""
        if min(command_bytes, report_bytes) < _SMALLEST_RING:
            raise ValueError(f"a ring has at least {_SMALLEST_RING} bytes")
        self._fd = os.memfd_create("vllm-double", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            size = Region.size(command_bytes, report_bytes)
            os.ftruncate(self._fd, size)
            # No other process can shrink the file under our feet, which would be a SIGBUS here.
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, seals)
            region = Region(mmap.mmap(self._fd, size))
        except BaseException:
            os.close(self._fd)
            raise
        super().__init__(region, command_bytes, report_bytes)
        token, pid = secrets.randbits(64), os.getpid()
        self._words[_VERSION_WORD] = PROTOCOL_VERSION
        self._words[_TOKEN_WORD], self._words[_PID_WORD] = token, pid
        self._words[_MAGIC_WORD] = _MAGIC  # the last one: whoever sees it may attach
        self.address: Final = f"{pid}:{self._fd}:{token:016x}"

    def close(self) -> None:
        """See TargetChannel."""
        if self._closed:
            return
        self._words[_MAGIC_WORD] = 0
        super().close()
        self._commands.close()
        self._reports.close()
        self._region.close()
        os.close(self._fd)


class SharedDraftChannel(DraftChannel):
    """DraftChannel on shared memory."""

    @classmethod
    def attach(cls, address: str) -> SharedDraftChannel:
        """Attach to the target with this address. Raises AttachError."""
        try:
            fields = zip(address.split(":"), (10, 10, 16), strict=True)
            pid, fd, token = (int(field, base) for field, base in fields)
        except ValueError:
            raise AttachError(f"{address!r} is no address of a target") from None
        try:
            return cls(_open_region(pid, fd, token))
        except (OSError, ValueError) as error:
            raise AttachError(f"cannot attach to the target {address}: {error}") from error

    def close(self) -> None:
        """See DraftChannel."""
        if self._closed:
            return
        super().close()
        self._commands.close()
        self._reports.close()
        self._region.close()


def _open_region(pid: int, fd: int, token: int) -> Region:
    """Map the target's file. Raises OSError, or ValueError for a file that is not what the address says."""
    # Whatever stands behind a stale address, opening it must neither hang nor change anything.
    file = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_size < CONTROL_BYTES:
            raise ValueError("not our memory")
        region = Region(mmap.mmap(file, status.st_size))
    finally:
        os.close(file)
    words = region.words
    try:
        if words[_MAGIC_WORD] != _MAGIC:
            raise ValueError("not our memory, or closed")
        if words[_VERSION_WORD] != PROTOCOL_VERSION:
            raise ValueError(f"it speaks protocol {words[_VERSION_WORD]}, this is {PROTOCOL_VERSION}")
        if words[_TOKEN_WORD] != token or words[_PID_WORD] != pid:
            raise ValueError("another target than the address names")
        if Region.size(words[COMMAND_BYTES_WORD], words[REPORT_BYTES_WORD]) != status.st_size:
            raise ValueError("the sizes of the rings do not fit")
    except BaseException:
        region.close()
        raise
    return region
