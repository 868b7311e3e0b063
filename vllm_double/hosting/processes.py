"""Sessions of processes and their runtime folder: what must be gone after the end, however violent it was.

Ray gives each actor a process group of its own but leaves the session alone, so the host's session names
every process that it has started, orphans included.
"""

from __future__ import annotations

import fcntl
import os
import signal
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from shutil import rmtree

__all__ = [
    "RuntimeFolder",
    "children",
    "is_gone",
    "kill_session",
    "note_process",
    "note_segments",
    "parent",
    "remove_openmp_marks",
    "remove_runtime",
    "remove_segments",
    "remove_stale",
    "session_members",
]

_PREFIX = "vllm-double-ray-"
_LONGEST = 38  # Ray's sockets below it must fit into the 107 characters of a socket's path.
_NOTE = "process-"
_SEGMENTS = "segments-"
_DEAD = (b"Z", b"X")  # states of the dead that nobody has waited for


def _stat(pid: int) -> tuple[bytes, int, int]:
    """(state, parent, session) of a process; as of a dead one where there is none."""
    try:
        state, above, _, session = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[:4]
    except (OSError, ValueError):
        return b"X", 0, 0
    return state, int(above), int(session)


def _living() -> Iterator[tuple[int, int, int]]:
    """(process, parent, session) of all processes, without the dead that nobody has waited for."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            state, above, session = _stat(int(folder.name))
            if state not in _DEAD:
                yield int(folder.name), above, session


def parent(pid: int) -> int:
    """The parent's process id; 0 where there is none, or no such process."""
    return _stat(pid)[1]


def children(pid: int) -> list[int]:
    """Process ids of a process's living children."""
    return [child for child, above, _ in _living() if above == pid]


def is_gone(pid: int) -> bool:
    """Whether the process has ended, waited for or not."""
    return _stat(pid)[0] in _DEAD


def session_members(session: int) -> list[int]:
    """Process ids of a session's living members."""
    return [pid for pid, _, leader in _living() if leader == session]


def kill_session(session: int, spare: Collection[int] = (), timeout_s: float = 3.0) -> bool:
    """SIGKILL for all of a session but ``spare``, repeated until none is left; False if some outlive that."""
    deadline = time.monotonic() + timeout_s
    while left := [pid for pid in session_members(session) if pid not in spare]:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def note_process(folder: str) -> None:
    """Leaves word in the runtime folder that this process may use OpenMP, for :func:`remove_runtime`."""
    try:
        Path(folder, f"{_NOTE}{os.getpid()}").touch()
    except OSError:
        pass  # A cluster of another user: not ours to clean up.


def remove_openmp_marks(pids: Iterable[int]) -> None:
    """Removes the /dev/shm entries that Intel's OpenMP leaves behind in killed processes; spares the living."""
    for pid in pids:
        if is_gone(pid):
            Path(f"/dev/shm/__KMP_REGISTERED_LIB_{pid}_{os.getuid()}").unlink(missing_ok=True)


def note_segments(folder: str) -> None:
    """Leaves word in the runtime folder which shared-memory segments this process maps: vLLM's ranks leave theirs."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    names = {line[line.index("/dev/shm/") :] for line in lines if "/dev/shm/" in line and not line.endswith("(deleted)")}
    try:
        Path(folder, f"{_SEGMENTS}{os.getpid()}").write_text("\n".join(sorted(names)))
    except OSError:
        pass  # as above


def remove_segments(folder: str) -> None:
    """Removes the segments that are noted there of processes that are gone."""
    for note in Path(folder).glob(f"{_SEGMENTS}*"):
        if is_gone(int(note.name.removeprefix(_SEGMENTS))):
            with suppress(FileNotFoundError):  # somebody else cleans up at the same time
                for name in note.read_text().splitlines():
                    Path(name).unlink(missing_ok=True)
                note.unlink()


def remove_runtime(folder: str) -> None:
    """Removes the folder, and the OpenMP marks and shared-memory segments of the processes that are noted there."""
    remove_segments(folder)
    remove_openmp_marks(int(note.name.removeprefix(_NOTE)) for note in Path(folder).glob(f"{_NOTE}*"))
    rmtree(folder, ignore_errors=True)


def remove_stale(base: str) -> None:
    """Removes this user's runtime folders whose owners were all killed at once and could not do it."""
    for folder in Path(base).glob(f"{_PREFIX}*"):
        try:
            if folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # Somebody lives.
        else:
            remove_runtime(str(folder))
        finally:
            os.close(lock)


class RuntimeFolder:
    """A private folder for Ray's sockets and logs, locked as long as one of its owners lives.

    A lock and not a process id tells whether an owner lives: containers that share /tmp do not share process
    ids.
    """

    def __init__(self) -> None:
        base = tempfile.gettempdir()
        if len(base) + len(_PREFIX) + 9 > _LONGEST:
            base = "/tmp"
        remove_stale(base)
        self.path = tempfile.mkdtemp(prefix=_PREFIX, dir=base)
        self.lock = os.open(Path(self.path, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self.lock, fcntl.LOCK_SH)

    def remove(self) -> None:
        """May be called twice, and after another owner has removed the folder."""
        remove_runtime(self.path)
        if self.lock >= 0:
            lock, self.lock = self.lock, -1
            os.close(lock)
