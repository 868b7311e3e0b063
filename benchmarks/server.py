"""One `vllm serve` process: started in its own process group, watched until healthy, ended for certain."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType

import psutil

from benchmarks.machine import has_cuda, preload

__all__ = ["MARK", "Server", "ServerConfig", "ServerError", "exit_on_sigterm"]

MARK = "DOUBLE_BENCH_ID"  # in the environment of whatever a server starts, however detached
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # opened before any fork


class ServerError(RuntimeError):
    """A server did not start, did not answer, or did not go away."""


@dataclass(frozen=True)
class ServerConfig:
    """What `vllm serve` is called with.

    ``speculative`` is the value of --speculative-config, ``threads`` that of VLLM_CPU_OMP_THREADS_BIND (None:
    not set), ``cores`` all that the server and whatever it starts may use.
    """

    target: Path
    cores: tuple[int, ...]
    speculative: dict[str, object] | None = None
    threads: str | None = None
    dtype: str = "float32"
    max_model_len: int = 2048
    max_num_seqs: int = 16
    compile: bool = False
    kv_cache_gib: int = 1
    extra: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def command(self, port: int) -> list[str]:
        """The command line, without core pinning."""
        vllm = Path(sys.executable).with_name("vllm")
        command = [str(vllm), "serve", str(self.target), "--served-model-name", "target"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", self.dtype]
        command += ["--max-model-len", str(self.max_model_len), "--max-num-seqs", str(self.max_num_seqs)]
        command += ["--disable-uvicorn-access-log"]
        if not self.compile:
            command.append("--enforce-eager")
        if self.speculative is not None:
            command += ["--speculative-config", json.dumps(self.speculative)]
        return [*command, *self.extra]

    def variables(self) -> dict[str, str]:
        """What is added to the environment, alike for all arms but for the thread split."""
        added = {
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_SERVER_DEV_MODE": "1",  # POST /reset_prefix_cache: cold caches in every round
            "VLLM_LOGGING_LEVEL": "INFO",
        }
        if not has_cuda():
            added |= {"LD_PRELOAD": preload(), "VLLM_CPU_KVCACHE_SPACE": str(self.kv_cache_gib)}
            if self.threads is not None:
                added["VLLM_CPU_OMP_THREADS_BIND"] = self.threads
        return added | self.environment


def exit_on_sigterm() -> None:
    """Makes SIGTERM end this process as an exception does: its servers and temporary folders go too."""

    def leave(signum: int, frame: FrameType | None) -> None:
        sys.exit(128 + signum)

    signal.signal(signal.SIGTERM, leave)


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def family(leader: int, identity: str, known: set[psutil.Process]) -> set[psutil.Process]:
    """All living processes of a server: its session, its mark, what was known before, and their descendants.

    One sign alone is not enough: process titles overwrite the environment, daemons leave the session, and
    orphans lose their parent.
    """
    found = {process for process in known if _alive(process)}
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader or process.environ().get(MARK) == identity:
                found.add(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            continue
    for process in list(found):
        try:
            found.update(process.children(recursive=True))
        except psutil.NoSuchProcess:
            continue
    return {process for process in found if _alive(process)}


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _end_with_parent() -> None:
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Server:
    """A running `vllm serve`; a context manager that ends it, and everything that it started, on exit."""

    def __init__(self, name: str, config: ServerConfig, log_folder: Path) -> None:
        """Starts the process; ``wait_healthy`` waits until it answers. The log lies in ``log_folder``."""
        self.name = name
        self.config = config
        self.identity = uuid.uuid4().hex
        self._known: set[psutil.Process] = set()
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        log_folder.mkdir(parents=True, exist_ok=True)
        self.log = log_folder / f"{name.replace(' ', '-')}.log"
        command = config.command(self.port)
        pin = shutil.which("taskset")
        if pin is not None:
            command = [pin, "-c", ",".join(map(str, config.cores)), *command]
        environment = os.environ | config.variables() | {MARK: self.identity}
        if config.threads is None:
            environment.pop("VLLM_CPU_OMP_THREADS_BIND", None)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def wait_healthy(self, deadline_s: float = 600.0) -> float:
        """Waits for /health; returns the seconds waited. ServerError with the log's end if it never comes."""
        start = time.monotonic()
        while time.monotonic() - start < deadline_s:
            if self._process.poll() is not None:
                raise ServerError(f"{self.name} exited with {self._process.returncode} at start:\n{self.tail()}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return time.monotonic() - start
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise ServerError(f"{self.name} was not healthy within {deadline_s:.0f} s:\n{self.tail()}")

    def metrics(self) -> str:
        """The text of /metrics."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            return bytes(answer.read()).decode()

    def reset_caches(self) -> None:
        """Empties the prefix cache, so that a round does not profit from the one before."""
        request = urllib.request.Request(f"{self.url}/reset_prefix_cache", method="POST")
        with urllib.request.urlopen(request, timeout=30):
            return

    def tail(self, lines: int = 40) -> str:
        """The last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def processes(self) -> set[psutil.Process]:
        """All living processes that the server consists of."""
        self._known = family(self._process.pid, self.identity, self._known)
        return self._known

    def cpu_seconds(self) -> float:
        """Processor time used so far by everything that the server consists of."""
        total = 0.0
        for process in self.processes():
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system
        return total

    def resident_bytes(self) -> int:
        """Memory of everything that the server consists of; pages that two processes share count twice."""
        total = 0
        for process in self.processes():
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return total

    @property
    def pid(self) -> int:
        """The API server's process."""
        return self._process.pid

    def reap(self) -> None:
        """Take note of the API server's end, so that it does not stay a zombie."""
        self._process.poll()

    def stop(self, grace_s: float = 20.0) -> None:
        """SIGTERM to the server, SIGKILL to what is left after the grace; ServerError if that fails."""
        self.processes()
        if self._process.poll() is None:
            self._process.terminate()
        for process in self._wait_gone(grace_s):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        left = self._wait_gone(10.0)
        if left:
            raise ServerError(f"{self.name} left processes behind: {sorted(process.pid for process in left)}")

    def _wait_gone(self, seconds: float) -> set[psutil.Process]:
        """Waits until none of the server's processes runs; returns those that do when the time is up."""
        end = time.monotonic() + seconds
        while True:
            self._process.poll()
            left = self.processes()
            if not left or time.monotonic() > end:
                return left
            time.sleep(0.1)
