"""The host with a real Ray and a worker without a model."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.chaos import Process, wait_for
from tests.chaos.targets import Target, beating
from vllm_double.config import DoubleConfig

pytestmark = pytest.mark.integration
START_S = 180.0


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """Started where a folder is called like what the worker imports."""
    cwd = tmp_path_factory.mktemp("cwd")
    (cwd / "numpy").mkdir()
    (cwd / "numpy" / "__init__.py").write_text("raise ImportError('the one of the working directory')")
    target = Target(cwd)
    try:
        target.wait_for(beating, START_S)
        yield target
    finally:
        target.end()


def ours(target: Target) -> list[Process]:
    return [process for process in target.run.processes() if process.pid != target.process.pid]


def test_everything_outside_the_target_stays_on_the_draft_cores(target: Target) -> None:
    last_core = max(os.sched_getaffinity(0))
    elsewhere = {
        (process.role, thread.name): os.sched_getaffinity(int(thread.name))
        for process in ours(target)
        for thread in Path(f"/proc/{process.pid}/task").iterdir()
        if os.sched_getaffinity(int(thread.name)) != {last_core}
    }
    assert not elsewhere
    assert os.sched_getaffinity(target.process.pid) == os.sched_getaffinity(0)


def test_ray_listens_on_loopback_only(target: Target) -> None:
    sockets = set()
    for process in ours(target):
        for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
            try:
                sockets.add(str(descriptor.readlink()))
            except OSError:
                continue
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                addresses.add(fields[1].rpartition(":")[0])
    loopback = {
        "0100007F",  # 127.0.0.1
        "0000000000000000FFFF00000100007F",  # ::ffff:127.0.0.1
        "00000000000000000000000001000000",  # ::1
    }
    assert addresses, "no listening socket was found; this test shows nothing"
    assert addresses <= loopback


def test_only_this_user_can_enter_the_runtime_folder(target: Target) -> None:
    folders = [path for path in target.left_behind() if path.count("/") == 2 and "vllm-double-ray-" in path]
    assert len(folders) == 1
    assert Path(folders[0]).stat().st_mode & 0o077 == 0


def test_ray_starts_no_daemon_that_one_actor_does_not_need(target: Target) -> None:
    assert sorted(process.role for process in ours(target)) == sorted(
        ["host", "guard", "driver", "gcs", "raylet", "agent", "agent", "actor"]
    )


@pytest.mark.parametrize(
    ("factory", "why", "num_restarts"),
    [("refuse", "the draft model is not there", 0), ("fail", "RuntimeError: nobody knows why", 2)],
)
def test_a_worker_that_can_never_be_built_is_given_up_with_one_sentence(factory: str, why: str, num_restarts: int) -> None:
    target = Target(factory=f"chaos_factory:{factory}")
    try:
        target.wait_for(lambda seen: seen["state"] == "failed", START_S)
        wait_for(lambda: not ours(target), START_S, lambda: "".join(target.log))
        sentence = f"The draft model cannot work here and is given up: {why}. Retrieval alone drafts."
        assert sum(sentence in line for line in target.log) == 1
        assert sum("started again" in line for line in target.log) == num_restarts
        assert target.process.poll() is None and target.seen["starts"] == 1
    finally:
        target.end()


def test_a_worker_that_may_be_built_later_says_why_and_is_tried_again() -> None:
    target = Target(factory="chaos_factory:cannot_reach")
    try:
        reason = "The draft actor ended: ConnectionError: the hub is away. It is started again in 4 s."
        wait_for(lambda: any(reason in line for line in target.log), START_S, lambda: "".join(target.log))
        assert target.process.poll() is None
    finally:
        target.end()


def test_a_worker_whose_loop_stands_still_is_ended_and_another_one_started() -> None:
    target = Target(factory="chaos_factory:stand_still")
    try:
        first = target.wait_for(lambda seen: seen["state"] == "up", START_S)["actor_pid"]
        target.wait_for(lambda seen: seen["state"] == "up" and seen["actor_pid"] != first, START_S)
        sentence = "The draft actor ended: its loop has stood still for 300 s. It is started again in"
        assert any(sentence in line for line in target.log)
        assert target.process.poll() is None and target.seen["starts"] == 1
    finally:
        target.end()


def test_a_cluster_that_is_not_there_is_named_in_one_sentence_and_tried_again() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        target = Target(double=DoubleConfig(ray_address=address))
        try:
            sentence = re.compile(f"ERROR .*The Ray cluster at {address} cannot be used: .*refused")
            target.wait_for(lambda seen: seen["starts"] > 1, START_S)
            wait_for(lambda: any(map(sentence.search, target.log)), START_S, lambda: "".join(target.log))
            assert "Its last lines were" not in "".join(target.log), "the host has said why"
        finally:
            target.end()
