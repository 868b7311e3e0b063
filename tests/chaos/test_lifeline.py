"""A killed launcher takes its engine along: real processes, no vLLM."""

import os
import select
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from vllm_double.hosting import process_care
from vllm_double.hosting.process_care import wait_for_end

LAUNCHER = """
    import os, subprocess, sys, time
    engine = '''
    import multiprocessing, os, signal, sys, time
    from vllm_double.hosting import process_care
    if {stubborn}:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    process_care._GRACE_S = 0.2
    if {without_descriptors}:
        def refuse(pid):
            raise PermissionError
        os.pidfd_open = refuse
    def worker():
        process_care.end_with({launcher})
        print("engine", os.getppid(), "worker", os.getpid(), flush=True)
        time.sleep(60)
    multiprocessing.get_context("fork").Process(target=worker, daemon=True).start()
    time.sleep(60)
    '''
    import textwrap
    filled = textwrap.dedent(engine).format(launcher=os.getpid(), stubborn=sys.argv[1], without_descriptors=sys.argv[2])
    subprocess.run([sys.executable, "-c", filled])
"""


def test_engine_processes_lie_between_worker_and_launcher() -> None:
    parents = {40: 30, 30: 20, 20: 10, 10: 1, 1: 0}

    def parent_of(pid: int) -> int:
        return parents.get(pid, 0)

    assert process_care.engine_processes(20, 40, parent_of) == [40, 30, 20]
    assert process_care.engine_processes(30, 40, parent_of) == [40, 30]
    assert process_care.engine_processes(40, 40, parent_of) == [], "the engine runs in the launcher itself"
    assert process_care.engine_processes(77, 40, parent_of) == [], "the launcher is on another machine"
    assert process_care.engine_processes(10, 99, parent_of) == []


def test_parent_and_end_of_processes() -> None:
    assert process_care.parent(os.getpid()) == os.getppid()
    assert process_care.parent(2**22 + 1) == 0
    assert process_care.is_gone(2**22 + 1)
    assert not wait_for_end(os.getpid(), 0.01)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert child.pid in process_care.children(os.getpid()) and os.getpid() not in process_care.children(child.pid)
    assert child.stdin is not None
    child.stdin.close()
    assert wait_for_end(child.pid, 20), "ended, though nobody has waited for it"
    assert process_care.is_gone(child.pid) and child.pid not in process_care.children(os.getpid())
    child.wait()
    assert wait_for_end(child.pid)


def test_nothing_is_watched_in_the_launcher_itself() -> None:
    assert process_care.end_with(os.getpid()) == []


@pytest.mark.parametrize("stubborn", [False, True])
@pytest.mark.parametrize("without_descriptors", [False, True])
def test_the_engine_ends_with_its_launcher(stubborn: bool, without_descriptors: bool) -> None:
    command = [sys.executable, "-c", textwrap.dedent(LAUNCHER), str(stubborn), str(without_descriptors)]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    with launcher.stdout:
        words = launcher.stdout.readline().split()
    engine, worker = int(words[1]), int(words[3])
    ended = os.pidfd_open(engine)
    try:
        assert Path(f"/proc/{engine}").exists()
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.wait()
        assert select.select([ended], [], [], 20)[0], "the engine outlives its launcher"
    finally:
        os.close(ended)
        for pid in (engine, worker):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
