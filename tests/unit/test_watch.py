import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from vllm_double.hosting import process_care
from vllm_double.hosting.process_care import ProcessWatch, wait_for_end


@pytest.fixture(params=["pidfd", "stat"])
def watch_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "stat":

        def refused(pid: int, flags: int = 0) -> int:
            raise OSError(errno.ENOSYS, "no pidfds in this sandbox")

        monkeypatch.setattr(os, "pidfd_open", refused)
        monkeypatch.setattr(process_care, "_LOOK_EVERY_S", 0.01)
    return str(request.param)


@pytest.fixture
def start(processes: list[subprocess.Popen[Any]]) -> Callable[[], subprocess.Popen[bytes]]:
    """Starts processes that end when their standard input does."""

    def start() -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
        processes.append(process)
        return process

    return start


def gone(start: Callable[[], subprocess.Popen[bytes]]) -> int:
    process = start()
    process.communicate()
    return process.pid


def test_a_watched_process_is_alive_until_it_ends(watch_kind, start):
    process = start()
    watched = ProcessWatch(process.pid)
    assert watched.has_pidfd == (watch_kind == "pidfd")
    assert watched.alive()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not watched.alive(), "a zombie counts as dead"
    process.communicate()
    assert not watched.alive()
    watched.close()
    watched.close()
    assert not watched.alive()


def test_a_process_that_is_not_there_cannot_be_watched(watch_kind, start):
    with pytest.raises(OSError, match=r"No such (process|file)"):
        ProcessWatch(gone(start))


def test_the_end_of_a_process_is_waited_for(watch_kind, start):
    process = start()
    assert not wait_for_end(process.pid, 0)
    assert not wait_for_end(process.pid, 0.02)
    ended = []
    waiting = threading.Thread(target=lambda: ended.append(wait_for_end(process.pid)))
    waiting.start()
    process.kill()
    waiting.join(20)
    assert ended == [True]
    assert wait_for_end(process.pid, 0), "a zombie counts as ended"
    process.communicate()
    assert wait_for_end(process.pid)


def test_a_process_that_is_not_there_has_ended(watch_kind, start):
    assert wait_for_end(gone(start))


def test_a_process_that_cannot_be_watched_has_not_ended(monkeypatch, start):
    def refused(*args: object) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    process = start()
    monkeypatch.setattr(os, "pidfd_open", refused)
    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(OSError, match="too many"):
        wait_for_end(process.pid)
