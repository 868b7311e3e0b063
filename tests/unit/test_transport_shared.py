import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from vllm_double.transport import base, shared
from vllm_double.transport.base import AttachError
from vllm_double.transport.messages import NODE_DTYPE, Commit, Nodes, Release, WorkerStats
from vllm_double.transport.shared import SharedDraftChannel, SharedTargetChannel

ROOT = str(Path(__file__).resolve().parents[2])
PRELUDE = """
import os, sys
import numpy as np
from vllm_double.transport.messages import MAX_CHILDREN, NODE_DTYPE
from vllm_double.transport.shared import SharedTargetChannel, SharedDraftChannel
def node(number):
    records = np.zeros(1 + number % 3, NODE_DTYPE)
    records["handle"] = number
    records["prefix_hash"] = number * 2654435761
    records["count"] = MAX_CHILDREN
    records["tokens"] = number % 1000
    records["probs"] = 0.5
    return records
"""


@pytest.fixture
def start(processes):
    """Starts Python processes with the transport imported."""

    def start(script, *args):
        source = PRELUDE + textwrap.dedent(script)
        process = subprocess.Popen(
            [sys.executable, "-c", source, *args],
            env={**os.environ, "PYTHONPATH": ROOT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    return start


@pytest.fixture
def target():
    end = SharedTargetChannel(1 << 16, 1 << 16)
    yield end
    end.close()


@pytest.fixture
def attach(target):
    ends = []

    def attach():
        ends.append(SharedDraftChannel.attach(target.address))
        return ends[-1]

    yield attach
    for end in ends:
        end.close()


def commit(handle=1):
    return Commit(handle, 2, np.array([1, 2], np.int32), np.array([3], np.int32), np.array([0.5], np.float32))


def nodes(*handles):
    records = np.zeros(len(handles), NODE_DTYPE)
    records["handle"] = handles
    return records


def handles(messages):
    return [handle for message in messages for handle in message.records["handle"].tolist()]


def test_both_directions_carry_messages(target, attach):
    worker = attach()
    assert target.send(commit(5))
    assert target.send(Release(6))
    first, second = worker.receive()
    assert (first.handle, second) == (5, Release(6))
    assert worker.receive() == []
    assert worker.publish(nodes(7, 8))
    assert worker.report(WorkerStats({"rows": 3.0}))
    assert worker.publish(nodes(9))
    drawn, stats = target.drain(1 << 20)
    assert isinstance(drawn, Nodes)
    assert handles([drawn]) == [7, 8, 9]
    assert stats == WorkerStats({"rows": 3.0})


def test_without_a_worker_nothing_is_sent_and_nothing_comes(target):
    assert target.session == 0
    assert not target.send(commit())
    assert target.drain(1 << 20) == []


def test_a_full_ring_refuses_without_blocking(target, attach):
    worker = attach()
    sent = 0
    while target.send(commit(sent)):
        sent += 1
    assert [command.handle for command in worker.receive()] == list(range(sent))
    assert target.send(commit())


def test_drain_is_bounded(target, attach):
    worker = attach()
    for number in range(100):
        worker.publish(nodes(number))
    got = []
    while drawn := target.drain(1000):
        assert 1 <= len(drawn[0].records) <= 1000 // NODE_DTYPE.itemsize
        got += handles(drawn)
    assert got == list(range(100))


def test_every_attachment_has_its_own_session(target, attach):
    sessions = []
    for _ in range(20):
        worker = attach()
        sessions.append(target.session)
        worker.close()
        assert target.session == 0
    assert 0 not in sessions
    assert len({session & 0xFFFF_FFFF for session in sessions}) == 20


def test_a_new_worker_supersedes_the_old_one(target, attach):
    old = attach()
    new = attach()
    assert old.superseded
    assert not new.superseded
    beats = target.heartbeat
    old.beat()
    assert target.heartbeat == beats
    assert not old.publish(nodes(1))
    assert not old.report(WorkerStats({}))
    assert target.send(commit(3))
    assert old.receive() == []
    assert [command.handle for command in new.receive()] == [3]
    session = target.session
    old.close()
    assert target.session == session
    assert not new.superseded


def test_commands_to_an_earlier_worker_do_not_reach_the_next(target, attach):
    old = attach()
    target.send(commit(1))
    old.close()
    new = attach()
    assert new.receive() == []
    target.send(commit(2))
    assert [command.handle for command in new.receive()] == [2]


def test_commands_that_slip_in_while_a_worker_attaches_are_stale(target, attach, monkeypatch):
    old = attach()
    draw = base.new_session

    def sent_meanwhile(previous):
        target.send(commit(1))
        return draw(previous)

    monkeypatch.setattr(base, "new_session", sent_meanwhile)
    new = attach()
    assert old.superseded
    target.send(commit(2))
    assert [command.handle for command in new.receive()] == [2]


def test_records_of_an_earlier_worker_are_discarded(target, attach):
    old = attach()
    old.publish(nodes(1))
    old.report(WorkerStats({"a": 1.0}))
    new = attach()
    new.publish(nodes(2))
    assert handles(target.drain(1 << 20)) == [2]
    new.publish(nodes(3))
    new.close()
    assert target.drain(1 << 20) == []


def test_heartbeat_moves_with_every_beat_and_across_workers(target, attach):
    seen = [target.heartbeat]
    for _ in range(3):
        worker = attach()
        for _ in range(2):
            worker.beat()
            seen.append(target.heartbeat)
    assert len(set(seen)) == len(seen)


def test_closing_the_target_sends_the_worker_away(target, attach):
    worker = attach()
    address = target.address
    target.close()
    target.close()
    assert worker.superseded
    assert worker.receive() == []
    assert not worker.publish(nodes(1))
    worker.wait(10)
    assert (target.session, target.heartbeat) == (0, 0)
    assert not target.send(commit())
    assert target.drain(1 << 20) == []
    with pytest.raises(AttachError):
        SharedDraftChannel.attach(address)


def test_a_closed_worker_end_does_nothing(target, attach):
    worker = attach()
    worker.close()
    worker.close()
    assert worker.superseded
    assert worker.receive() == []
    assert not worker.publish(nodes(1))
    worker.beat()
    worker.wait(10)


def test_a_damaged_command_ends_the_session(target, attach):
    worker = attach()
    target.send(commit(1))
    worker._commands._data[30] ^= 1
    assert worker.receive() == []
    assert worker.superseded
    assert target.session == 0
    successor = attach()
    target.send(commit(2))
    assert [command.handle for command in successor.receive()] == [2]


def test_a_sound_record_that_is_no_command_ends_the_session(target, attach):
    worker = attach()
    target._commands.push(99, target.session & 0xFFFF_FFFF, b"?")
    assert worker.receive() == []
    assert worker.superseded


def test_a_damaged_report_is_skipped(target, attach):
    worker = attach()
    worker.publish(nodes(1))
    target._reports._data[40] ^= 1
    assert target.drain(1 << 20) == []
    worker._reports.push(99, target.session & 0xFFFF_FFFF, b"?")
    worker.publish(nodes(2))
    assert handles(target.drain(1 << 20)) == [2]


@pytest.mark.parametrize("address", ["", "1", "1:2", "a:b:c", "1:2:3:4", "-1:2:3", "99999999999999999999:1:2"])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(AttachError):
        SharedDraftChannel.attach(address)


def test_another_token_is_refused(target):
    pid, fd, token = target.address.split(":")
    with pytest.raises(AttachError, match="another target"):
        SharedDraftChannel.attach(f"{pid}:{fd}:{int(token, 16) ^ 1:x}")
    assert target.session == 0


@pytest.mark.parametrize(
    ("word", "value", "sentence"),
    [
        (shared._MAGIC_WORD, 1, "not our memory"),
        (shared._VERSION_WORD, shared.PROTOCOL_VERSION + 1, "speaks protocol"),
        (shared._PID_WORD, 1, "another target"),
        (base.REPORT_BYTES_WORD, 1 << 40, "sizes"),
        (base.COMMAND_BYTES_WORD, 2**64 - 1, "sizes"),
    ],
)
def test_a_control_block_that_does_not_fit_is_refused(target, word, value, sentence):
    target._words[word] = value
    with pytest.raises(AttachError, match=sentence):
        SharedDraftChannel.attach(target.address)


def test_a_descriptor_of_something_else_is_refused_and_not_waited_for(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    small = tmp_path / "small"
    small.write_bytes(b"x")
    reader, writer = os.pipe()
    descriptors = [reader, writer, os.open(fifo, os.O_RDONLY | os.O_NONBLOCK), os.open(small, os.O_RDWR)]
    try:
        for fd in descriptors:
            with pytest.raises(AttachError):
                SharedDraftChannel.attach(f"{os.getpid()}:{fd}:1")
    finally:
        for fd in descriptors:
            os.close(fd)


@pytest.mark.parametrize("sizes", [(0, 1 << 16), (1 << 16, 4095), (-1, -1)])
def test_rings_too_small_to_be_useful_are_refused(sizes):
    with pytest.raises(ValueError, match="at least"):
        SharedTargetChannel(*sizes)


def test_nobody_can_cut_the_memory_under_the_other(target):
    with pytest.raises(PermissionError):
        os.ftruncate(target._fd, 0)


def descriptors():
    return set(os.listdir("/proc/self/fd"))  # noqa: PTH208


def mappings():
    return Path("/proc/self/maps").read_text().splitlines()


def test_the_memory_has_no_name_and_closing_leaves_nothing():
    before, open_before = mappings(), descriptors()
    target = SharedTargetChannel(12_345, 54_321)
    worker = SharedDraftChannel.attach(target.address)
    assert target.send(commit())
    assert len(worker.receive()) == 1
    ours = [line for line in mappings() if "vllm-double" in line]
    assert len(ours) == 2
    assert all("/memfd:vllm-double (deleted)" in line for line in ours)
    assert not [line for line in mappings() if "/dev/shm" in line and line not in before]
    target.close()
    worker.close()
    assert not [line for line in mappings() if "vllm-double" in line]
    assert descriptors() == open_before


def test_failed_attachments_leave_nothing(target):
    pid, fd, token = target.address.split(":")
    before = descriptors()
    for address in (f"{pid}:{fd}:1", f"{pid}:99999:{token}", f"{pid}:{fd}"):
        with pytest.raises(AttachError):
            SharedDraftChannel.attach(address)
    assert descriptors() == before
    assert len([line for line in mappings() if "vllm-double" in line]) == 1


def test_100000_records_of_another_process_arrive_unharmed_and_in_order(target, start):
    num = 100_000
    worker = start(
        """
        worker = SharedDraftChannel.attach(sys.argv[1])
        for number in range(int(sys.argv[2])):
            records = node(number)
            while not worker.publish(records):
                os.sched_yield()
        sys.stdin.read()  # attached until the target has everything
        """,
        target.address,
        str(num),
    )
    expected = 0
    deadline = time.monotonic() + 120
    num_bytes = 0
    while expected < num and time.monotonic() < deadline:
        for message in target.drain(1 << 14):
            num_bytes += message.records.nbytes
            records = message.records
            first = np.flatnonzero(np.diff(records["handle"].astype(np.int64), prepend=-1))
            numbers = records["handle"][first].astype(np.int64)
            np.testing.assert_array_equal(numbers, np.arange(expected, expected + len(numbers)))
            np.testing.assert_array_equal(np.diff(first, append=len(records)), 1 + numbers % 3)
            np.testing.assert_array_equal(records["prefix_hash"], records["handle"] * np.uint64(2654435761))
            np.testing.assert_array_equal(records["tokens"][:, -1], records["handle"].astype(np.int64) % 1000)
            expected += len(numbers)
    worker.communicate()
    assert expected == num
    assert worker.returncode == 0
    assert num_bytes > 100 * (1 << 16)


def test_commands_to_another_process_are_answered_one_by_one(target, start):
    worker = start(
        """
        worker = SharedDraftChannel.attach(sys.argv[1])
        while not worker.superseded:
            worker.wait(0.1)
            for command in worker.receive():
                records = np.zeros(1, NODE_DTYPE)
                records["handle"] = command.handle
                records["position"] = command.keep
                while not worker.publish(records):
                    os.sched_yield()
        """,
        target.address,
    )
    answers = []
    sent = 0
    deadline = time.monotonic() + 120
    while len(answers) < 20_000 and time.monotonic() < deadline:
        if sent < 20_000 and target.send(Commit(sent, sent, *[commit().tokens] * 2, np.zeros(2, np.float32))):
            sent += 1
        answers += handles(target.drain(1 << 14))
    assert answers == list(range(20_000))
    target.close()
    worker.communicate()
    assert worker.returncode == 0


def test_killed_workers_leave_nothing_but_whole_records(target, start):
    sessions = set()
    for _ in range(4):
        worker = start(
            """
            worker = SharedDraftChannel.attach(sys.argv[1])
            number = 0
            while True:
                worker.beat()
                number += worker.publish(node(number))
            """,
            target.address,
        )
        seen = 0
        deadline = time.monotonic() + 60
        while seen < 3000 and time.monotonic() < deadline:
            for message in target.drain(1 << 14):
                assert (message.records["prefix_hash"] == message.records["handle"] * np.uint64(2654435761)).all()
                seen += len(message.records)
        worker.kill()
        worker.communicate()
        assert seen >= 3000
        assert target.heartbeat > 0
        sessions.add(target.session)
    assert len(sessions) == 4


def test_what_an_orphaned_worker_holds_is_the_last_of_it(start):
    process = start(
        """
        target = SharedTargetChannel()
        print(target.address, flush=True)
        sys.stdin.read()
        """
    )
    worker = SharedDraftChannel.attach(process.stdout.readline().strip())
    process.kill()
    process.communicate()
    assert worker.publish(nodes(1)), "its memory stays until the worker leaves"
    worker.close()
    assert not [line for line in mappings() if "vllm-double" in line]


def test_the_address_of_a_dead_target_is_refused(start):
    process = start("print(SharedTargetChannel().address)")
    address = process.communicate()[0].strip()
    with pytest.raises(AttachError, match="cannot attach"):
        SharedDraftChannel.attach(address)


def test_waiting_returns_at_once_when_a_command_is_there(target, attach):
    worker = attach()
    naps = []
    worker._sleep = naps.append
    target.send(commit())
    worker.wait(10)
    assert naps == []


def test_waiting_naps_at_most_a_tenth_of_the_wait_and_no_longer_than_asked(target, attach):
    worker = attach()
    naps = []
    worker._sleep = naps.append
    worker.wait(0.02)
    assert sum(naps) == pytest.approx(0.02)
    assert max(naps) <= 2e-3
    assert len(naps) < 20, "an idle worker must not burn its core"
    naps.clear()
    worker.wait(0.02)
    assert len(naps) <= 11, "naps stay long while nothing comes"
    naps.clear()
    worker.wait(0.001)
    assert naps == [0.001]
    target.send(commit())
    worker.receive()
    naps.clear()
    worker.wait(0.02)
    assert naps[0] <= 1e-4, "after a command the next one is looked for quickly"


def test_waiting_ends_early_when_a_command_comes(target, attach):
    worker = attach()
    naps = []

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == 3:
            target.send(commit())

    worker._sleep = nap
    worker.wait(10)
    assert len(naps) == 3
