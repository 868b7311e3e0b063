"""Finding, killing and counting the processes of one run, and what it leaves on the machine.

A run is named by a token in the environment of its first process (``VLLM_DOUBLE_RUN``), which all
descendants inherit. Some of Ray's processes overwrite their environment with their title, so the sessions of
our hosts are followed too.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

MARKER = "VLLM_DOUBLE_RUN"
_ROLES = {
    "gcs/gcs_server": "gcs",
    "raylet/raylet": "raylet",
    "ray::DraftActor": "actor",
    "ray::DashboardAgent": "agent",
    "ray::RuntimeEnvAgent": "agent",
    "VLLM::EngineCore": "engine",
    "VLLM::Worker": "worker",
}
T = TypeVar("T")


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    session: int
    started: int
    name: str
    command: str

    @property
    def role(self) -> str:
        if self.name.startswith("double-"):
            return self.name.removeprefix("double-")
        return next((role for part, role in _ROLES.items() if part in self.command), "other")

    def alive(self) -> bool:
        now = _read(self.pid)
        return now is not None and now.started == self.started


def _read(pid: int) -> Process | None:
    """None for a process that is gone or a zombie."""
    try:
        head, _, tail = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return None
    fields = tail.split()
    if fields[0] in (b"Z", b"X"):
        return None
    name = head.partition(b"(")[2].decode(errors="replace")
    words = command.replace(b"\0", b" ").decode(errors="replace").strip()
    return Process(pid, int(fields[1]), int(fields[3]), int(fields[19]), name, words)


def all_processes() -> list[Process]:
    found = (_read(int(path.name)) for path in Path("/proc").iterdir() if path.name.isdigit())
    return [process for process in found if process is not None]


@dataclass
class Run:
    """All processes of one run; remembers the sessions of its hosts, so that orphans are found as well."""

    token: str
    sessions: set[int] = field(default_factory=set)

    def processes(self) -> list[Process]:
        everything = all_processes()
        marked = {process.pid for process in everything if self._is_marked(process.pid)}
        self.sessions |= {p.session for p in everything if p.pid in marked and p.name.startswith("double-")}
        return [p for p in everything if p.pid in marked or p.session in self.sessions]

    def by_role(self, role: str) -> list[Process]:
        return [process for process in self.processes() if process.role == role]

    def kill(self, role: str, number: int = signal.SIGKILL) -> Process:
        """Signals the one process of this role and returns it."""
        found = self.by_role(role)
        assert len(found) == 1, f"{len(found)} processes are {role!r}: {self.processes()}"
        os.kill(found[0].pid, number)
        return found[0]

    def wait_until_gone(self, timeout_s: float, spare: Iterable[int] = ()) -> None:
        kept = set(spare)
        left = [p for p in self.processes() if p.pid not in kept]

        def gone() -> bool:
            left[:] = [p for p in self.processes() if p.pid not in kept]
            return not left

        wait_for(gone, timeout_s, lambda: f"still there: {left}")

    def end(self) -> None:
        """Kills whatever is left; for the end of a test."""
        for process in self.processes():
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def _is_marked(self, pid: int) -> bool:
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False
        return f"{MARKER}={self.token}".encode() in environment.split(b"\0")


def wait_for(look: Callable[[], T], timeout_s: float, explain: Callable[[], str] = str) -> T:
    """The first true value of ``look``; AssertionError after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not (value := look()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s; {explain()}"
        time.sleep(0.02)
    return value


def possessions(processes: Iterable[Process]) -> set[str]:
    """What these processes could leave behind: their runtime folders, and their entries of /dev/shm.

    OpenMP's entries name their process; others are counted if a process has them mapped or open.
    """
    found = set()
    for process in processes:
        folder = Path("/proc", str(process.pid))
        found |= {str(path) for path in Path("/dev/shm").glob(f"__KMP_REGISTERED_LIB_{process.pid}_*")}
        try:
            paths = {line.split(maxsplit=5)[-1] for line in (folder / "maps").read_text().splitlines()}
            paths |= {str(descriptor.readlink()) for descriptor in (folder / "fd").iterdir()}
        except OSError:
            continue
        found |= {path for path in paths if path.startswith("/dev/shm/") and not path.endswith("(deleted)")}
        found |= {str(Path(path).parent) for path in paths if "/vllm-double-ray-" in path and path.endswith("/lock")}
    return found


def still_there(paths: Iterable[str]) -> set[str]:
    """Those of the paths that exist, and the sockets below them that somebody still holds."""
    folders = tuple(f"{path}/" for path in paths)
    sockets = {line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()}
    return {path for path in paths if Path(path).exists()} | {path for path in sockets if path.startswith(folders)}


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
