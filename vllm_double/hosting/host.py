"""``python -m vllm_double.hosting.host``: host, guard and driver, which own everything of ours outside the target.

Host and guard wait for the end of the target, of the driver or of each other, and then leave nothing behind. They import next
to nothing. The driver, the guard's child, runs Ray and keeps the draft's actor alive. Who ends whom: see ``process_care``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Any, NoReturn

from vllm_double.hosting.back_off import BackOff
from vllm_double.hosting.process_care import (
    ProcessWatch,
    adopt_orphans,
    die_with_parent,
    kill_session,
    reap,
    remove_openmp_marks,
    session_members,
    wait_for_end,
    wait_for_one,
)

__all__ = ["MARK", "report"]

MARK = "@vllm-double "
"""Starts the lines of the host's output that are JSON for the supervisor; other lines are somebody's log."""

_GRACE_S = 1.5
_LINGER_S = 12.0  # in which an engine that is told to stop should have ended
_REAP_EVERY_S = 5.0
_MOST_ALIKE = 3  # builds that fail for one reason, if it is unknown whether the next one would


def report(level: str, text: str = "", **values: object) -> None:
    """Send a line to the supervisor: a message for the server's log, and values such as ``state``."""
    line = MARK + json.dumps({"level": level, "text": text, **values}) + "\n"
    try:
        os.write(1, line.encode())
    except OSError:
        pass  # The target has ended, and with it the reader.


def main() -> None:
    """Starts the host, which first prints its process id, and ends.

    Reads {"settings", "cores", "engine_pids", "is_gentle", "address", "target_pid", "runtime_dir"} from stdin.
    """
    request: dict[str, Any] = json.load(sys.stdin)
    if os.getsid(0) != os.getpid():
        raise SystemExit("The host must be started in a session of its own, by DraftSupervisor.")
    target = ProcessWatch(request["target_pid"])
    if os.getppid() == target.pid and os.fork() == 0:  # else the number is another process's by now
        _run_and_exit("double-host", lambda: _host(request, target))


def _host(request: dict[str, Any], target: ProcessWatch) -> None:
    os.write(1, f"{os.getpid()}\n".encode())
    if request["cores"] is not None:
        _bind(request["cores"])
    guard: ProcessWatch | None = None
    try:
        guard = ProcessWatch(_start_guard(request))
        wait_for_one([target, guard])
    finally:  # after SIGTERM, too
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        spared = {os.getpid()}
        if guard is not None and guard.alive():
            spared.add(guard.pid)
            with suppress(ProcessLookupError):
                os.kill(guard.pid, signal.SIGTERM)
            deadline = time.monotonic() + 2 * _GRACE_S
            while guard.alive() and set(session_members(os.getsid(0))) - spared and time.monotonic() < deadline:
                time.sleep(0.01)
        kill_session(os.getsid(0), spared)
        rmtree(request["runtime_dir"], ignore_errors=True)


def _guard(request: dict[str, Any], host_pid: int) -> None:
    """Waits for the end of the target, the host or the driver, or for SIGTERM, and leaves nothing behind."""
    has_failed, driver = False, None
    try:
        target, host = ProcessWatch(request["target_pid"]), ProcessWatch(host_pid)
        adopt_orphans()
        driver = ProcessWatch(_fork_driver(request))
        while not wait_for_one([target, host, driver], _REAP_EVERY_S):
            reap()  # Ray's orphans
        has_failed = not driver.alive()
    finally:  # after SIGTERM, too
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if request["is_gentle"] and driver is not None:
            # In somebody else's cluster the actor is not in our session: the driver takes it back.
            with suppress(ProcessLookupError):
                os.kill(driver.pid, signal.SIGTERM)
            wait_for_one([driver], _GRACE_S)
        kill_session(os.getsid(0), spare=(os.getpid(), host_pid))
        reap()
        rmtree(request["runtime_dir"], ignore_errors=True)
        if not has_failed:  # else another guard will look after the engine
            _follow_engine(request["engine_pids"])


def _follow_engine(pids: Collection[int]) -> None:
    """Clean up after the engine's processes, if they end soon."""
    deadline = time.monotonic() + _LINGER_S
    for pid in pids:
        wait_for_end(pid, max(0.0, deadline - time.monotonic()))
    remove_openmp_marks(pids)


def _bind(cores: Iterable[int]) -> None:
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        report("WARNING", f"The draft cannot be bound to its cores: {error}.")


def _start_guard(request: dict[str, Any]) -> int:
    """Starts the guard, which has no parent of ours; returns its process id."""
    host, (read, write) = os.getpid(), os.pipe()
    between = os.fork()
    if between == 0:
        guard = os.fork()
        if guard == 0:
            os.close(write)
            _run_and_exit("double-guard", lambda: _guard(request, host))
        os.write(write, str(guard).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(between, 0)
    guard = int(os.read(read, 32))
    os.close(read)
    return guard


def _fork_driver(request: dict[str, Any]) -> int:
    """Starts the driver; returns its process id."""
    guard = os.getpid()
    driver = os.fork()
    if driver == 0:
        _run_and_exit("double-driver", lambda: _drive(request) if die_with_parent(guard) else None)
    return driver


def _be(name: str) -> None:
    """name: for ``ps``, at most 15 characters."""
    Path("/proc/self/comm").write_text(name)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run_and_exit(name: str, run: Callable[[], None]) -> NoReturn:
    """What a forked child does instead of its parent's work."""
    try:
        _be(name)
        run()
    except SystemExit:
        pass
    except BaseException as error:  # The boundary of the process: nothing may unwind into the parent's code.
        report("ERROR", f"The draft's host failed: {type(error).__name__}: {error}")
    finally:
        os._exit(0)


def _drive(request: dict[str, Any]) -> None:
    """Starts Ray, then actor after actor until this process is killed. Returns if Ray cannot go on, and reports why."""
    from vllm_double.hosting import actor
    from vllm_double.hosting.settings import DraftSettings

    try:
        cluster = actor.Cluster.connect(DraftSettings.from_json(request["settings"]), request["runtime_dir"])
    except actor.UnreachableError as error:
        report("ERROR", str(error), is_last=True)
        return
    except (ImportError, ValueError) as error:
        values = {"state": "failed"} if isinstance(error, ImportError) else {}
        report("ERROR", f"Ray cannot be started for the draft: {error}", is_last=True, **values)
        return
    back_off = BackOff()
    reasons: list[str] = []  # why builds failed, one after another
    try:
        while True:
            started = time.monotonic()
            states: set[str] = set()
            try:
                reason = cluster.run_actor(
                    request["address"], request["target_pid"], request["runtime_dir"], partial(_report_state, states)
                )
                reasons.clear()
            except actor.ClusterLostError as error:
                report("WARNING", str(error), is_last=True)
                return
            except actor.BuildError as error:
                reason = str(error)
                reasons.append(reason)
                if error.is_final or (error.is_final is None and reasons[-_MOST_ALIKE:] == [reason] * _MOST_ALIKE):
                    text = f"The draft model cannot work here and is given up: {reason}. Retrieval alone drafts."
                    report("ERROR", text, state="failed", is_last=True)
                    return
            wait_s = back_off.after(time.monotonic() - started, "up" in states)
            text = f"The draft actor ended: {reason}. It is started again in {wait_s:.0f} s."
            report("WARNING", text, state="down")
            time.sleep(wait_s)
    finally:
        cluster.close()


def _report_state(states: set[str], state: str, pid: int) -> None:
    states.add(state)
    level = "INFO" if state == "up" else "DEBUG"
    report(level, f"The draft actor is {state} (process {pid}).", state=state, actor_pid=pid)


if __name__ == "__main__":
    main()
