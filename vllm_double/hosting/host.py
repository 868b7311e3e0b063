"""``python -m vllm_double.hosting.host``: the process that owns Ray and everything of ours outside the target.

Three processes, because the one that cleans up must not be the one that Ray can take down:

- the guard leads a session of its own, imports next to nothing, and waits for the end of the target, of the
  driver, or a SIGTERM; then it kills every process of its session and removes the runtime folder;
- the driver, its forked child, runs Ray and keeps the draft actor alive. Ray's daemons die with it, it with
  the guard;
- the deputy does the guard's last work if the guard is killed. So does the supervisor in the target, but vLLM's API server
  kills all its descendants at once when it is told to stop: the deputy is nobody's child.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from vllm_double.hosting.back_off import BackOff
from vllm_double.hosting.process_watch import wait_for_end
from vllm_double.hosting.processes import kill_session, remove_openmp_marks, remove_runtime

__all__ = [
    "EXIT_CONFIG",
    "EXIT_LOST",
    "EXIT_UNREACHABLE",
    "MARK",
    "HostSettings",
    "say",
]

MARK = "@vllm-double "
"""Starts the lines of the host's output that are JSON for the supervisor; other lines are somebody's log."""

EXIT_CONFIG = 2
"""The settings cannot work on this machine."""
EXIT_UNREACHABLE = 3
"""The Ray cluster at ``ray_address`` does not answer."""
EXIT_LOST = 4
"""One of Ray's daemons has gone, and with it the cluster."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_GRACE_S = 1.5
_LINGER_S = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSettings:
    """What the host needs to know; crosses the process boundary as JSON."""

    worker: dict[str, Any] = field(default_factory=dict)
    """Goes to the factory, which also gets ``address``."""
    factory: str = "vllm_double.draft.build:build"
    """``module:function``, called in the actor with one dict; returns an object with ``run(should_stop)``."""
    device: str = "cpu"
    """For the log only; the factory's settings decide."""
    draft_cores: tuple[int, ...] | None = None
    """Cores of everything of ours outside the target; None leaves the inherited binding alone."""
    target_cores: str = ""
    """For the log only."""
    visible_devices: str | None = None
    """The draft's CUDA_VISIBLE_DEVICES, one for each of several ranks; None keeps the target's."""
    num_ranks: int = 1
    """Devices that share the draft model, or equal parts of ``draft_cores``; an actor to each."""
    ray_address: str | None = None
    """``host:port`` of a cluster that spans this machine; None starts an embedded Ray."""
    ray_num_cpus: float = 1.0
    engine_pids: tuple[int, ...] = ()
    """The engine's processes, after whose end nothing of them should be left either."""
    start_timeout_s: float = 120.0
    """An actor that has not answered after so many seconds is given up."""
    require: bool = False
    """Whether the supervisor's constructor waits for Ray and raises when it cannot be had."""

    def cores_of(self, rank: int) -> tuple[int, ...] | None:
        """The rank's part of ``draft_cores``."""
        if self.draft_cores is None:
            return None
        each = len(self.draft_cores) // self.num_ranks
        return self.draft_cores[rank * each : (rank + 1) * each]

    def devices_of(self, rank: int) -> str | None:
        """The rank's CUDA_VISIBLE_DEVICES."""
        if not self.visible_devices or self.num_ranks == 1:
            return self.visible_devices
        return self.visible_devices.split(",")[rank]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> HostSettings:
        values = json.loads(text)
        values["engine_pids"] = tuple(values["engine_pids"])
        if values["draft_cores"] is not None:
            values["draft_cores"] = tuple(values["draft_cores"])
        return cls(**values)


def say(level: str, text: str = "", **values: object) -> None:
    """One line to the supervisor: a message for the server's log, and values such as ``state``."""
    line = MARK + json.dumps({"level": level, "text": text, **values}) + "\n"
    try:
        os.write(1, line.encode())
    except OSError:
        pass  # The target is gone, and with it the reader.


def _name_process(name: str) -> None:
    """What ``ps`` and ``top`` show; at most 15 characters."""
    Path("/proc/self/comm").write_text(name)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _pidfd(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends; None where the kernel or a sandbox refuses
    it.
    """
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def _reap() -> dict[int, int]:
    """Exit codes by process id of the children that have ended; orphans of Ray come to the guard as well."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if not pid:
            return ended
        ended[pid] = os.waitstatus_to_exitcode(status)


class _Guard:
    """Waits for the end of the target or of the driver, and leaves nothing behind."""

    def __init__(self, target_pid: int, runtime_dir: str) -> None:
        self._target_pid = target_pid
        self._runtime_dir = runtime_dir
        self._told_to_stop = False
        self._wake, wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        signal.set_wakeup_fd(wake_writer)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._told_to_stop = True

    def target_gone(self) -> bool:
        return os.getppid() != self._target_pid

    def wait(self, driver_pid: int) -> int | None:
        """The driver's exit code, or None if it has to be ended."""
        poll = select.poll()
        watched = [self._wake, _pidfd(self._target_pid), _pidfd(driver_pid)]
        for descriptor in watched:
            if descriptor is not None:
                poll.register(descriptor, select.POLLIN)
        timeout_ms = 500 if None in watched else 5000
        while not self._told_to_stop and not self.target_gone():
            if driver_pid in (ended := _reap()):
                return ended[driver_pid]
            poll.poll(timeout_ms)
        return None

    def clean_up(self) -> None:
        kill_session(os.getpid(), spare=(os.getpid(),))
        _reap()
        remove_runtime(self._runtime_dir)


def _bind(cores: Iterable[int] | None) -> None:
    if cores is None:
        return
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        say("WARNING", f"The draft cannot be bound to its cores: {error}.")


def drive(settings: HostSettings, address: str, target_pid: int, runtime_dir: str) -> int:
    """The driver: starts Ray, then actor after actor until it is killed. Returns an exit code if Ray cannot
    go on.
    """
    from vllm_double.hosting import actor

    try:
        cluster = actor.Cluster.connect(settings, runtime_dir)
    except actor.UnreachableError as error:
        say("ERROR", str(error), reason=str(error))
        return EXIT_UNREACHABLE
    except (ImportError, ValueError) as error:
        sentence = f"Ray cannot be started for the draft: {error}"
        say("ERROR", sentence, reason=sentence)
        return EXIT_CONFIG
    say("INFO", connected=True)
    back_off = BackOff()
    try:
        while True:
            started = time.monotonic()
            states: set[str] = set()
            try:
                reason = cluster.run_actor(address, target_pid, runtime_dir, partial(_report_state, states))
            except actor.ClusterLostError as error:
                say("WARNING", str(error))
                return EXIT_LOST
            wait_s = back_off.after(time.monotonic() - started, "up" in states)
            text = f"The draft actor ended: {reason}. It is started again in {wait_s:.0f} s."
            say("WARNING", text, state="down")
            time.sleep(wait_s)
    finally:
        cluster.close()


def stand_by(guard_pid: int, runtime_dir: str, engine_pids: Collection[int]) -> int:
    """The deputy: waits for the guard's death and cleans up, also after the engine if that ends soon."""
    wait_for_end(guard_pid)
    kill_session(guard_pid)
    remove_runtime(runtime_dir)
    deadline = time.monotonic() + _LINGER_S
    for pid in engine_pids:
        wait_for_end(pid, max(0.0, deadline - time.monotonic()))
    remove_openmp_marks(engine_pids)
    return 0


def _report_state(states: set[str], state: str, pid: int) -> None:
    states.add(state)
    level = "INFO" if state == "up" else "DEBUG"
    say(level, f"The draft actor is {state} (process {pid}).", state=state, actor_pid=pid)


def _fork(name: str, run: Callable[[], int]) -> int:
    """Runs ``run`` in a child that is killed when this process dies; returns the child's pid."""
    guard_pid = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        orphan = os.getppid() != guard_pid
    except BaseException:
        os._exit(1)
    return _become(name, (lambda: 1) if orphan else run)


def _detach(name: str, run: Callable[[], int]) -> None:
    """Runs ``run`` in a process with a session of its own that is no descendant of this one."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
    except BaseException:
        os._exit(1)
    _become(name, run)


def _become(name: str, run: Callable[[], int]) -> NoReturn:
    """What a forked child does instead of the guard's work."""
    code = 1
    try:
        _name_process(name)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        code = run()
    except SystemExit:
        code = 0
    except BaseException as error:  # The boundary of the process: nothing may unwind into the guard's code.
        say("ERROR", f"The draft's host failed: {type(error).__name__}: {error}")
    finally:
        os._exit(code)


def main() -> int:
    """Reads {"settings", "address", "target_pid", "runtime_dir"} from stdin; returns the driver's exit code."""
    request = json.load(sys.stdin)
    settings = HostSettings.from_json(request["settings"])
    target_pid, runtime_dir = int(request["target_pid"]), str(request["runtime_dir"])
    if os.getsid(0) != os.getpid():
        raise SystemExit("The host must lead a session of its own; it is started by DraftSupervisor.")
    _name_process("double-guard")
    guard = _Guard(target_pid, runtime_dir)
    _bind(settings.draft_cores)
    guard_pid = os.getpid()
    # Before orphans begin to come to the guard.
    _detach("double-deputy", lambda: stand_by(guard_pid, runtime_dir, settings.engine_pids))
    # SIGTERM and not SIGKILL: the guard is the one that has to clean up when the target is killed.
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    code: int | None = 0
    try:
        if not guard.target_gone():
            address = str(request["address"])
            driver = _fork("double-driver", lambda: drive(settings, address, target_pid, runtime_dir))
            code = guard.wait(driver)
            if code is None and settings.ray_address is not None:
                _end_gently(driver)
    finally:
        guard.clean_up()
    return 0 if code is None else code if code >= 0 else EXIT_LOST


def _end_gently(driver: int) -> None:
    """In somebody else's cluster the actor is not in our session: the driver takes it back."""
    os.kill(driver, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_S
    while driver not in _reap() and time.monotonic() < deadline:
        time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main())
