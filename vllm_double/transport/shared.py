"""The transport between two processes of one host: two rings in one anonymous memory file.

The target makes the file (``memfd_create``) and never gives it a name: the worker opens it as the target's
open file, ``/proc/<pid>/fd/<fd>``. Whoever dies, and however, nothing is left behind, because there never was
anything to unlink.

Layout: a page with the control block, the ring of commands, the ring of reports. Words of the control block
stand in cache lines by who writes them.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import stat
from typing import Final

from vllm_double.hosting.process_care import ProcessWatch
from vllm_double.transport.base import AttachError, TargetEnd, WorkerEnd, new_session
from vllm_double.transport.ring import INDEX_BYTES, RingConsumer, RingProducer

__all__ = ["PROTOCOL_VERSION", "SharedTargetEnd", "SharedWorkerEnd"]

PROTOCOL_VERSION: Final = 4
"""Raised with every change of the control block, the rings or the messages."""

_MAGIC: Final = int.from_bytes(b"vlldoubl", "little")
_CONTROL_BYTES: Final = 4096
_LINE_WORDS: Final = 8
_SMALLEST_RING: Final = 4096

# Indices of 8-byte words. The first line is written once, by the target; magic and version never move.
_MAGIC_WORD: Final = 0
_VERSION_WORD: Final = 1
_TOKEN_WORD: Final = 2
_PID_WORD: Final = 3
_COMMAND_BYTES_WORD: Final = 4
_PATH_BYTES_WORD: Final = 5
_SESSION_WORD: Final = _LINE_WORDS  # by the worker; zeroed by the target when it closes
_HEARTBEAT_WORD: Final = 2 * _LINE_WORDS  # by the worker


def _align(size: int) -> int:
    return -(-size // 64) * 64


class _Region:
    """The mapped file and its parts, for either end."""

    def __init__(self, fd: int, size: int) -> None:
        self._map = mmap.mmap(fd, size)
        self._view = memoryview(self._map)
        self.words = self._view[:_CONTROL_BYTES].cast("Q")
        self._parts = [self._view, self.words]

    def rings(self, command_bytes: int, path_bytes: int) -> tuple[memoryview, memoryview]:
        paths_at = _CONTROL_BYTES + _align(INDEX_BYTES + command_bytes)
        commands = self._view[_CONTROL_BYTES : _CONTROL_BYTES + INDEX_BYTES + command_bytes]
        paths = self._view[paths_at : paths_at + INDEX_BYTES + path_bytes]
        self._parts += [commands, paths]
        return commands, paths

    @staticmethod
    def size(command_bytes: int, path_bytes: int) -> int:
        return _CONTROL_BYTES + _align(INDEX_BYTES + command_bytes) + _align(INDEX_BYTES + path_bytes)

    def close(self) -> None:
        for part in reversed(self._parts):
            part.release()
        self._map.close()


class SharedTargetEnd(TargetEnd):
    """TargetEnd on shared memory. ``address`` is what a worker of the same host and user attaches to."""

    def __init__(self, command_bytes: int, path_bytes: int) -> None:
        if min(command_bytes, path_bytes) < _SMALLEST_RING:
            raise ValueError(f"a ring has at least {_SMALLEST_RING} bytes")
        self._fd = os.memfd_create("vllm-double", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            size = _Region.size(command_bytes, path_bytes)
            os.ftruncate(self._fd, size)
            # No other process can shrink the file under our feet, which would be a SIGBUS here.
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, seals)
            self._region = _Region(self._fd, size)
        except BaseException:
            os.close(self._fd)
            raise
        self._words = self._region.words
        self._command_ring, self._path_ring = self._open_rings(command_bytes, path_bytes)
        super().__init__(self._command_ring, self._path_ring)
        token = secrets.randbits(64)
        pid = os.getpid()
        for word, value in (
            (_VERSION_WORD, PROTOCOL_VERSION),
            (_TOKEN_WORD, token),
            (_PID_WORD, pid),
            (_COMMAND_BYTES_WORD, command_bytes),
            (_PATH_BYTES_WORD, path_bytes),
            (_SESSION_WORD, 0),
            (_MAGIC_WORD, _MAGIC),
        ):
            self._words[word] = value
        self.address: Final = f"{pid}:{self._fd}:{token:016x}"

    @classmethod
    def create(cls, command_bytes: int = 4 << 20, path_bytes: int = 4 << 20) -> SharedTargetEnd:
        """Make the memory; sizes of the rings in bytes. Raises OSError, ValueError."""
        return cls(command_bytes, path_bytes)

    def _open_rings(self, command_bytes: int, path_bytes: int) -> tuple[RingProducer, RingConsumer]:
        commands, paths = self._region.rings(command_bytes, path_bytes)
        return RingProducer(commands), RingConsumer(paths)

    @property
    def session(self) -> int:
        return 0 if self._closed else self._words[_SESSION_WORD]

    @property
    def heartbeat(self) -> int:
        return 0 if self._closed else self._words[_HEARTBEAT_WORD]

    def close(self) -> None:
        if self._closed:
            return
        self._words[_MAGIC_WORD] = 0
        self._words[_SESSION_WORD] = 0
        self._closed = True
        self._command_ring.close()
        self._path_ring.close()
        self._region.close()
        os.close(self._fd)


class SharedWorkerEnd(WorkerEnd):
    """WorkerEnd on shared memory. Made by ``attach``, which takes over from whoever was attached."""

    def __init__(self, region: _Region, watch: ProcessWatch) -> None:
        words = region.words
        commands, paths = region.rings(words[_COMMAND_BYTES_WORD], words[_PATH_BYTES_WORD])
        self._command_ring = RingConsumer(commands)
        self._path_ring = RingProducer(paths)
        # First this, then the session: what is said to the new session must not be skipped. Commands that
        # slip in between carry an older stamp.
        self._command_ring.skip()
        super().__init__(new_session(words[_SESSION_WORD]), self._command_ring, self._path_ring)
        self._region = region
        self._words = words
        self._watch = watch
        self._closed = False
        words[_SESSION_WORD] = self._session

    @classmethod
    def attach(cls, address: str) -> SharedWorkerEnd:
        """Attach to the target with this address. Raises AttachError."""
        try:
            fields = zip(address.split(":"), (10, 10, 16), strict=True)
            pid, fd, token = (int(field, base) for field, base in fields)
        except ValueError:
            raise AttachError(f"{address!r} is no address of a target") from None
        try:
            # Before the file is opened: the right token in it then proves that the watch is on the right
            # process.
            watch = ProcessWatch(pid)
        except (OSError, OverflowError) as error:
            raise AttachError(f"the target {address} is not there: {error}") from error
        try:
            region = _open_region(pid, fd, token)
        except (OSError, ValueError) as error:
            watch.close()
            raise AttachError(f"cannot attach to the target {address}: {error}") from error
        return cls(region, watch)

    @property
    def superseded(self) -> bool:
        return self._closed or self._words[_SESSION_WORD] != self._session

    def target_alive(self) -> bool:
        return self._watch.alive()

    def beat(self) -> None:
        # Not of a superseded worker: it would make a stopped successor look alive.
        if not self.superseded:
            self._words[_HEARTBEAT_WORD] = (self._words[_HEARTBEAT_WORD] + 1) & 0xFFFF_FFFF_FFFF_FFFF

    def _give_up(self) -> None:
        # Not atomic. If a successor attaches between the two accesses it finds itself superseded and is
        # started again.
        if not self.superseded:
            self._words[_SESSION_WORD] = 0

    def close(self) -> None:
        if self._closed:
            return
        self._give_up()
        self._closed = True
        self._command_ring.close()
        self._path_ring.close()
        self._region.close()
        self._watch.close()


def _open_region(pid: int, fd: int, token: int) -> _Region:
    """Map the target's file. Raises OSError, or ValueError for a file that is not what the address says."""
    # Whatever stands behind a stale address, opening it must neither hang nor change anything.
    file = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_size < _CONTROL_BYTES:
            raise ValueError("not our memory")
        region = _Region(file, status.st_size)
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
        if _Region.size(words[_COMMAND_BYTES_WORD], words[_PATH_BYTES_WORD]) != status.st_size:
            raise ValueError("the sizes of the rings do not fit")
    except BaseException:
        region.close()
        raise
    return region
