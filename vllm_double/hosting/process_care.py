"""Who starts, watches and ends whom. What must be gone after the end of a server, however violent it was, goes here.

    API server -- engine core -- worker (the target)     host     guard -- driver -- Ray's daemons -- actor

==================  ========================  ================================================================================
ends                noticed by                what follows
==================  ========================  ================================================================================
API server          worker (`end_with`)       SIGTERM, then SIGKILL for the engine core; vLLM ends its workers
engine core         vLLM                      the workers end
worker              host, guard               both kill what is left of the host's session and remove its folder
host                guard, supervisor         the guard does the same; the supervisor, the worker's thread, starts another host
guard               host, kernel              the kernel kills the driver; the host does the same and ends
driver              guard                     the guard does the same and ends, and so does the host
Ray's daemon        driver                    the driver ends
actor               driver                    another actor is started
orderly stop        supervisor                SIGTERM for the host, which does the same
==================  ========================  ================================================================================

Two clean up, so that either may be killed together with the target. They are nobody's children: vLLM's API server kills all
its descendants at once when it is told to stop, with a warning about each. Neither runs Ray, which takes down its process if it
fails. Ray gives each actor a process group but leaves the session alone, so the session names all processes of ours, orphans
included. If everything is killed at the same moment, only the folder stays. The next start on this machine removes it, as
nobody holds its lock.

What a process has in shared memory it unlinks itself as soon as all others have attached (`unlink_shared_memory`).
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import select
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from shutil import rmtree
from typing import Final

__all__ = [
    "LONGEST_TURN_S",
    "ProcessWatch",
    "RuntimeFolder",
    "adopt_orphans",
    "children",
    "die_with_parent",
    "end_with",
    "is_gone",
    "kill_session",
    "parent",
    "reap",
    "remove_openmp_marks",
    "session_members",
    "unlink_shared_memory",
    "wait_for_end",
    "wait_for_one",
]

_logger = logging.getLogger(__name__)

LONGEST_TURN_S = 300.0
"""Of a drafting loop: kernels that are compiled in one take less. One that stands still for longer is started again."""
_LOOK_EVERY_S = 0.5  # if there is no pidfd to wait on
_GRACE_S = 5.0  # between SIGTERM and SIGKILL
_DEAD = (b"Z", b"X", b"")  # states of processes that have ended
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


# ---- looking at processes -------------------------------------------------------------------------------------


def _fields(stat: bytes) -> tuple[bytes, int, int]:
    """(state, parent, session) from the text of /proc/PID/stat. The name, in brackets, may itself hold brackets and blanks."""
    try:
        state, above, _, session = stat.rpartition(b")")[2].split()[:4]
    except ValueError:
        return b"", 0, 0
    return state, int(above), int(session)


def _stat(pid: int) -> tuple[bytes, int, int]:
    """(state, parent, session) of a process; (b"", 0, 0) if there is none."""
    try:
        return _fields(Path(f"/proc/{pid}/stat").read_bytes())
    except OSError:
        return b"", 0, 0


def _living() -> dict[int, tuple[int, int]]:
    """{process: (parent, session)} of all processes that have not ended."""
    everything = {int(folder.name): _stat(int(folder.name)) for folder in Path("/proc").iterdir() if folder.name.isdigit()}
    return {pid: (above, session) for pid, (state, above, session) in everything.items() if state not in _DEAD}


def parent(pid: int) -> int:
    """The parent's process id; 0 if there is none, or no such process."""
    return _stat(pid)[1]


def children(pid: int) -> list[int]:
    """Process ids of a process's living children."""
    return [child for child, (above, _) in _living().items() if above == pid]


def is_gone(pid: int) -> bool:
    """Whether the process has ended, reaped or not."""
    return _stat(pid)[0] in _DEAD


def session_members(session: int) -> list[int]:
    """Process ids of a session's living members."""
    return [pid for pid, (_, leader) in _living().items() if leader == session]


class ProcessWatch:
    """Watches one process of this host. Raises OSError if there is none with this number.

    A zombie counts as ended. A process that later gets the same number is never mistaken for it.
    """

    def __init__(self, pid: int) -> None:
        self.pid: Final = pid
        self.has_pidfd = True
        try:
            self._fd = os.pidfd_open(pid)
        except ProcessLookupError:
            raise
        except OSError:
            # Sandboxes and old seccomp filters refuse pidfds. An open file of /proc stays with its process as well.
            self.has_pidfd = False
            self._fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        self._closed = False

    def fileno(self) -> int:
        """A descriptor that is readable when the process has ended, if ``has_pidfd``."""
        return self._fd

    def alive(self) -> bool:
        """False once the process has ended, or the watch is closed. About 1 us."""
        if self._closed:
            return False
        if self.has_pidfd:
            poll = select.poll()
            poll.register(self._fd, select.POLLIN)
            return not poll.poll(0)
        try:
            return _fields(os.pread(self._fd, 4096, 0))[0] not in _DEAD
        except OSError:
            return False

    def close(self) -> None:
        """Give the descriptor back. May be called twice."""
        if not self._closed:
            self._closed = True
            os.close(self._fd)


def wait_for_one(watches: Sequence[ProcessWatch], timeout_s: float | None = None, readable: int | None = None) -> bool:
    """Wait until one of the processes has ended (True), or until the time is up or there is something to read (False)."""
    poll = select.poll()
    for watch in watches:
        if watch.has_pidfd:
            poll.register(watch, select.POLLIN)
    if readable is not None:
        poll.register(readable, select.POLLIN)
    look_every_s = float("inf") if all(watch.has_pidfd for watch in watches) else _LOOK_EVERY_S
    deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
    while all(watch.alive() for watch in watches):
        wait_s = min(look_every_s, deadline - time.monotonic())
        if wait_s <= 0:
            return False
        ready = poll.poll(1000 * wait_s if wait_s < float("inf") else None)
        if any(descriptor == readable for descriptor, _ in ready):
            return False
    return True


def wait_for_end(pid: int, timeout_s: float | None = None) -> bool:
    """Wait until a process has ended that may be gone already; False if the time is up before.

    Raises OSError if it cannot be watched, which is no end.
    """
    try:
        watch = ProcessWatch(pid)
    except (ProcessLookupError, FileNotFoundError):
        return True
    try:
        return wait_for_one([watch], timeout_s)
    finally:
        watch.close()


# ---- ending processes -----------------------------------------------------------------------------------------


def kill_session(session: int, spare: Collection[int] = (), timeout_s: float = 3.0) -> None:
    """SIGKILL for all of a session but ``spare``, repeated until none is left or the time is up."""
    killed: set[int] = set()
    deadline = time.monotonic() + timeout_s
    while (left := [pid for pid in session_members(session) if pid not in spare]) and time.monotonic() < deadline:
        killed.update(left)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    remove_openmp_marks(killed)


def reap() -> set[int]:
    """Process ids of the children that have ended since the last call."""
    ended: set[int] = set()
    with suppress(ChildProcessError):
        while pid := os.waitpid(-1, os.WNOHANG)[0]:
            ended.add(pid)
    return ended


def die_with_parent(parent_pid: int) -> bool:
    """Have the kernel kill this process when its parent's thread ends; False if the parent has ended already."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    return os.getppid() == parent_pid


def adopt_orphans() -> None:
    """Have the kernel make this process the parent of its descendants' orphans, so that they can be reaped."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def engine_processes(launcher: int, pid: int, parent_of: Callable[[int], int] = parent) -> list[int]:
    """``pid`` and its ancestors up to the launcher, the launcher last; [] if it does not descend from the launcher."""
    found = [pid]
    while found[-1] > 1:
        found.append(parent_of(found[-1]))
        if found[-1] == launcher:
            return found
    return []


def end_with(launcher: int) -> list[int]:
    """End the engine of this process when the launcher has ended: vLLM's engine core does not notice that, and would go on.

    Returns the engine's processes, or [] if nothing is watched: the engine runs in the launcher itself, or on another machine.
    """
    chain = engine_processes(launcher, os.getpid())
    if chain:
        threading.Thread(target=_end_after, args=(launcher, chain[-2]), name="vllm-double-launcher", daemon=True).start()
    return chain


def _end_after(launcher: int, engine: int) -> None:
    wait_for_end(launcher)
    if is_gone(engine):
        return
    _logger.warning("The process that launched this engine (%d) has ended. The engine (%d) ends, too.", launcher, engine)
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.kill(engine, number)
        if wait_for_end(engine, _GRACE_S):
            return


# ---- what processes leave on the machine ----------------------------------------------------------------------


def _openmp_mark(pid: int) -> Path:
    """What Intel's OpenMP leaves in shared memory if its process is killed."""
    return Path(f"/dev/shm/__KMP_REGISTERED_LIB_{pid}_{os.getuid()}")


def remove_openmp_marks(pids: Iterable[int]) -> None:
    """Remove the OpenMP marks of those of the processes that have ended."""
    for pid in pids:
        if is_gone(pid):
            _openmp_mark(pid).unlink(missing_ok=True)


def unlink_shared_memory() -> None:
    """Unlink all that this process has mapped from /dev/shm: it stays usable, and nothing is left behind whoever dies.

    To be called if all others have attached: vLLM's ranks have when they are loaded.
    """
    lines = Path("/proc/self/maps").read_text().splitlines()
    names = {line[line.index("/dev/shm/") :] for line in lines if "/dev/shm/" in line and not line.endswith("(deleted)")}
    for path in (_openmp_mark(os.getpid()), *map(Path, names)):
        path.unlink(missing_ok=True)


class RuntimeFolder:
    """A private folder for Ray's sockets and logs, locked as long as one of its owners lives.

    A lock and not a process id tells whether an owner lives: containers that share /tmp do not share process ids.
    """

    _PREFIX = "vllm-double-ray-"
    _LONGEST = 38  # Ray's sockets below it must fit into the 107 characters of a socket's path.

    def __init__(self) -> None:
        base = tempfile.gettempdir()
        if len(base) + len(self._PREFIX) + 9 > self._LONGEST:
            base = "/tmp"
        self.remove_stale(base)
        self.path = tempfile.mkdtemp(prefix=self._PREFIX, dir=base)
        self.lock = os.open(Path(self.path, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self.lock, fcntl.LOCK_SH)

    def remove(self) -> None:
        """May be called twice, and after another owner has removed the folder."""
        rmtree(self.path, ignore_errors=True)
        if self.lock >= 0:
            lock, self.lock = self.lock, -1
            os.close(lock)

    @classmethod
    def remove_stale(cls, base: str) -> None:
        """Remove this user's runtime folders whose owners were all killed at once."""
        for folder in Path(base).glob(f"{cls._PREFIX}*"):
            try:
                if folder.stat().st_uid != os.getuid():
                    continue
                lock = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
            except OSError:
                continue
            with suppress(OSError):  # somebody holds it
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                rmtree(folder, ignore_errors=True)
            os.close(lock)
