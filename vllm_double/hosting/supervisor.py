"""Keeps the draft's host running, from inside the target's vLLM worker.

The worker imports neither Ray nor torch for this. It only starts a process, reads its output and ends it, so a failure of the
host cannot reach it. Who ends whom: see ``process_care``.
"""

from __future__ import annotations

import atexit
import json
import logging
import multiprocessing.util
import os
import re
import secrets
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Protocol

from vllm_double.hosting.back_off import BackOff
from vllm_double.hosting.cores import format_cores
from vllm_double.hosting.host import MARK
from vllm_double.hosting.process_care import ProcessWatch, RuntimeFolder, kill_session, wait_for_end, wait_for_one
from vllm_double.hosting.settings import DraftSettings

__all__ = ["DraftSupervisor", "HostProcess", "State", "child_environment"]

logger = logging.getLogger(__name__)

State = Literal["starting", "up", "down", "failed", "stopped"]  # failed: the draft cannot work here, and is given up
OnLine = Callable[[str], None]

# Both together are less than vLLM's engine core waits for its workers to exit: 5 s.
_STOP_S = 3.0
_JOIN_S = 1.0
_LEVEL = re.compile(r"\b(WARNING|ERROR|CRITICAL|FATAL)\b")

_RAY_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    # Bind to loopback: Ray replaces a given 127.0.0.1 by the machine's address unless it believes itself on
    # a desktop.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Ray would hide the GPUs from an actor that asks for none.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray's workers are nice by 15. vLLM's engine core spins (sched_yield) on the draft's core while the target computes,
    # and a nice draft would hardly run beside it.
    "RAY_worker_niceness": "0",
    # vLLM fills the memory on purpose; Ray would kill the actor for it.
    "RAY_memory_monitor_refresh_ms": "0",
    # Polling and statistics: without these, idle daemons take twice the CPU time.
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_debug_dump_period_milliseconds": "0",
    "RAY_raylet_report_resources_period_milliseconds": "1000",
    "RAY_gcs_pull_resource_loads_period_milliseconds": "10000",
    "RAY_report_worker_backlog_interval_ms": "10000",
    "RAY_io_context_monitor_probe_interval_ms": "60000",
    "RAY_io_context_event_loop_lag_collection_interval_ms": "60000",
    "RAY_ray_syncer_message_refresh_interval_ms": "60000",
    "RAY_local_fs_monitor_interval_ms": "60000",
}


class Host(Protocol):
    """A started host."""

    def wait(self, on_line: OnLine) -> None:
        """Hands over its output line by line until it has ended."""

    def stop(self, timeout_s: float) -> None:
        """Ends it and everything that it has started. May be called from another thread while ``wait`` runs."""


class DraftSupervisor:
    """Starts the host, restarts it with back-off, counts, and ends it with this process.

    One daemon thread does everything.

    Args:
        address: of the target's side of the transport.
        spawn: starts a host; by default a HostProcess.
        clock: seconds, monotone.
        pause: waits so many seconds or until ``stop`` is called; whether it was.
    """

    def __init__(
        self,
        settings: DraftSettings,
        address: str,
        *,
        spawn: Callable[[DraftSettings, str], Host] | None = None,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], bool] | None = None,
    ) -> None:
        self.starts = 0
        self.workers_up = 0  # draft workers that came up so far, of all hosts
        self.state: State = "starting"
        self.actor_pid: int | None = None
        self._last_up: int | None = None
        self._settings = settings
        self._address = address
        self._spawn = spawn or HostProcess
        self._clock = clock
        self._stopping = threading.Event()
        self._pause = pause or self._stopping.wait
        self._host: Host | None = None
        self._is_explained = False  # the host has reported why it ends
        self._recent: deque[str] = deque(maxlen=30)
        self._owner = os.getpid()
        self._thread = threading.Thread(target=self._watch, name="vllm-double-supervisor", daemon=True)
        self._thread.start()
        # vLLM's workers leave by SystemExit. Forked multiprocessing children never run atexit, but do run finalizers.
        atexit.register(self.stop)
        self._finalizer = multiprocessing.util.Finalize(None, self.stop, exitpriority=10)

    @property
    def restarts(self) -> int:
        """How often a draft worker came up again."""
        return max(0, self.workers_up - 1)

    def stop(self) -> None:
        """Ends the host and all its processes; a slow end goes on without us. Safe to call twice, and in a forked child."""
        if os.getpid() != self._owner or self.state == "stopped":
            return
        self._stopping.set()
        if (host := self._host) is not None:
            host.stop(_STOP_S)
        self._thread.join(_JOIN_S)
        self.state = "stopped"
        atexit.unregister(self.stop)
        self._finalizer.cancel()

    def _watch(self) -> None:
        back_off = BackOff()
        where = f"draft on {self._settings.double.draft_device}"
        if self._settings.draft_cores is not None:
            where += f", cores {format_cores(self._settings.draft_cores)}"
        if self._settings.target_cores:
            where += f"; target on cores {self._settings.target_cores}"
        logger.info("Starting the draft worker's host: %s.", where)
        while not self._stopping.is_set():
            started, earlier = self._clock(), self.workers_up
            self._run_once()
            if self._stopping.is_set() or self.state == "failed":
                return
            self.state = "down"
            wait_s = back_off.after(self._clock() - started, self.workers_up > earlier)
            logger.warning("The draft's host ended. There are no drafts until it is started again in %.0f s.", wait_s)
            if self._recent and not self._is_explained:
                logger.warning("Its last lines were:\n%s", "\n".join(self._recent))
            if self._pause(wait_s):
                return
            self.state = "starting"

    def _run_once(self) -> None:
        self.starts += 1
        self._recent.clear()
        self._is_explained = False
        try:
            host = self._host = self._spawn(self._settings, self._address)
        except (OSError, ValueError) as error:
            logger.warning("The draft's host cannot be started: %s.", error)
            return
        try:
            if self._stopping.is_set():  # stop() may have looked for a host just before there was one
                host.stop(_STOP_S)
            host.wait(self._on_line)
        except Exception:
            logger.exception("The draft's host cannot be watched; it is ended")
            host.stop(_STOP_S)

    def _on_line(self, line: str) -> None:
        if not line.startswith(MARK):
            self._recent.append(line)
            found = _LEVEL.search(line[:80])
            logger.log(getattr(logging, found[1]) if found else logging.DEBUG, "(draft) %s", line)
            return
        values: dict[str, Any] = json.loads(line[len(MARK) :])
        if values["text"]:
            logger.log(getattr(logging, values["level"]), "(draft) %s", values["text"])
        self._is_explained = values.get("is_last", False)
        state, pid = values.get("state"), values.get("actor_pid")
        if pid is not None:
            self.actor_pid = pid
            if state == "up" and pid != self._last_up:
                self._last_up = pid
                self.workers_up += 1
        if state is not None and not self._stopping.is_set():
            self.state = state if state in ("up", "down", "failed") else "starting"


class HostProcess:
    """The real host: a session of its own, settings through stdin, one pipe for everything that it prints."""

    def __init__(self, settings: DraftSettings, address: str) -> None:
        self._folder = RuntimeFolder()
        request = {
            "settings": settings.to_json(),
            "address": address,
            "cores": settings.draft_cores,
            "engine_pids": settings.engine_pids,
            "is_gentle": settings.double.ray_address is not None,
            "target_pid": os.getpid(),
            "runtime_dir": self._folder.path,
        }
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm_double.hosting.host"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(self._folder.lock,),
                env=child_environment(os.environ, settings),
                bufsize=0,
            )
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            with suppress(OSError), self._process.stdin as stdin:  # if it ended at once, its output says why
                stdin.write(json.dumps(request).encode())
            # Its child goes on, so that it is nobody's: vLLM kills and lists what descends from its processes.
            self._said = self._process.stdout.readline()
            has_started = self._said.strip().isdigit()
            self._watch = ProcessWatch(int(self._said) if has_started else self._process.pid)
        except OSError:
            self._folder.remove()
            raise
        if has_started:
            self._said = b""
            self._process.wait()
        self._stdout = self._process.stdout
        os.set_blocking(self._stdout.fileno(), False)

    def wait(self, on_line: OnLine) -> None:
        rest, has_ended = self._said, False
        try:
            # The end of the output would not do: whoever the host has started may hold the pipe for longer.
            while not has_ended:
                has_ended = wait_for_one([self._watch], readable=self._stdout.fileno())
                *lines, rest = (rest + self._read()).split(b"\n")
                for line in lines:
                    on_line(line.decode(errors="replace"))
        finally:
            self._stdout.close()
            self._watch.close()
            self._clean_up()

    def stop(self, timeout_s: float) -> None:
        if not self._watch.alive():
            return
        with suppress(OSError):  # it has just ended
            os.kill(self._watch.pid, signal.SIGTERM)
            wait_for_end(self._watch.pid, timeout_s)  # host and guard finish without us, if they are slow

    def _read(self) -> bytes:
        try:
            return os.read(self._stdout.fileno(), 1 << 16)
        except BlockingIOError:
            return b""

    def _clean_up(self) -> None:
        """What host and guard have done, unless they were killed."""
        self._process.wait()
        if Path(self._folder.path).exists():
            kill_session(self._process.pid)
        self._folder.remove()


def child_environment(inherited: Mapping[str, str], settings: DraftSettings) -> dict[str, str]:
    """The host's environment: the target's, without what binds the target's threads and what a parent Ray has left."""
    bindings = ("KMP_", "GOMP_", "OMP_", "VLLM_CPU_OMP_")
    drop = bindings if settings.double.ray_address is not None else (*bindings, "RAY_")
    environment = {name: value for name, value in inherited.items() if not name.startswith(drop)}
    if settings.draft_cores is not None:
        environment["OMP_NUM_THREADS"] = str(len(settings.draft_cores))
    if settings.visible_devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = settings.visible_devices
    if settings.double.ray_address is None:
        environment |= _RAY_QUIET | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    # The server's working directory may hold a folder called ray or vllm.
    environment["PYTHONSAFEPATH"] = "1"
    root = str(Path(__file__).resolve().parents[2])
    if root not in sysconfig.get_paths().values():
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, inherited.get("PYTHONPATH")]))
    return environment
