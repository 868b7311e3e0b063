import numpy as np
import pytest

from tests.faults import Faults, faulty_pair, inject
from vllm_double.transport.messages import NODE_DTYPE, Commit, Release, WorkerStats


def commit(handle):
    return Commit(handle, 0, np.array([handle], np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))


def nodes(*handles):
    records = np.zeros(len(handles), NODE_DTYPE)
    records["handle"] = handles
    return records


def handles(reports):
    return [handle for report in reports for handle in report.records["handle"].tolist()]


def run(num=200, **arguments):
    """Handles that arrive when ``num`` records are published, each followed by a drain; ten more drains."""
    target, worker = faulty_pair(**arguments)
    got = []
    for number in range(num):
        assert worker.publish(nodes(number))
        got += handles(target.drain(1 << 20))
    for _ in range(10):
        got += handles(target.drain(1 << 20))
    return got


def test_without_faults_everything_arrives_in_order():
    assert run() == list(range(200))
    target, worker = faulty_pair()
    for number in range(5):
        assert target.send(commit(number))
    assert target.send(Release(9))
    *commits, release = worker.receive()
    assert [command.handle for command in commits] == list(range(5))
    assert [command.tokens.tolist() for command in commits] == [[number] for number in range(5)]
    assert release == Release(9)
    assert worker.report(WorkerStats({"a": 1.0}))
    assert target.drain(1 << 20) == [WorkerStats({"a": 1.0})]


def test_messages_are_copies_as_they_are_between_processes():
    target, worker = faulty_pair()
    records = nodes(1)
    worker.publish(records)
    records["handle"] = 2
    assert handles(target.drain(1 << 20)) == [1]


@pytest.mark.parametrize("chance", [0.3, 1.0])
def test_dropped_records_do_not_arrive_and_the_sender_does_not_know(chance):
    got = run(reports=Faults(drop=chance))
    assert len(got) == 0 if chance == 1 else 100 < len(got) < 180
    assert got == sorted(set(got))


def test_duplicated_records_come_twice():
    got = run(reports=Faults(duplicate=1.0))
    assert got == sorted(2 * list(range(200)))


def test_delayed_records_are_overtaken_and_arrive_in_the_end():
    got = run(reports=Faults(delay=0.5, max_delay=4))
    assert got != sorted(got)
    assert sorted(got) == list(range(200))
    assert all(abs(place - number) <= 5 for place, number in enumerate(got))


def test_delay_counts_drains():
    target, worker = faulty_pair(reports=Faults(delay=1.0, max_delay=1))
    worker.publish(nodes(1))
    assert handles(target.drain(1 << 20)) == []
    assert handles(target.drain(1 << 20)) == [1]


def test_corrupt_records_are_skipped_and_nothing_wrong_arrives():
    got = run(num=2000, reports=Faults(corrupt=0.3))
    assert got == sorted(set(got))
    assert 450 < 2000 - len(got) < 750


def test_a_corrupt_command_ends_the_session_as_over_shared_memory():
    target, worker = faulty_pair(commands=Faults(corrupt=1.0))
    target.send(commit(1))
    assert worker.receive() == []
    assert worker.superseded
    assert target.session == 0
    inject(target.commands, Faults())
    successor = target.attach()
    target.send(commit(2))
    assert [command.handle for command in successor.receive()] == [2]


def test_the_same_seed_gives_the_same_faults():
    faults = Faults(drop=0.2, duplicate=0.2, delay=0.3, corrupt=0.1)
    first = run(reports=faults, seed=3)
    assert run(reports=faults, seed=3) == first
    assert run(reports=faults, seed=4) != first


def test_faults_can_be_changed_on_the_way():
    target, worker = faulty_pair()
    worker.publish(nodes(1))
    inject(target.reports, Faults(drop=1.0))
    worker.publish(nodes(2))
    inject(target.reports, Faults())
    worker.publish(nodes(3))
    assert handles(target.drain(1 << 20)) == [1, 3]


@pytest.mark.parametrize("bad", [{"drop": -0.1}, {"corrupt": 1.1}, {"delay": float("nan")}, {"max_delay": 0}])
def test_impossible_faults_are_refused(bad):
    with pytest.raises(ValueError, match=r"no probability|at least 1"):
        Faults(**bad)


def test_a_full_channel_refuses_and_has_room_again_after_a_drain():
    target, worker = faulty_pair(capacity=500)
    sent = 0
    while worker.publish(nodes(sent)):
        sent += 1
    assert sent == 500 // (24 + NODE_DTYPE.itemsize)
    assert handles(target.drain(1 << 20)) == list(range(sent))
    assert worker.publish(nodes(1))
    with pytest.raises(ValueError, match="in a ring of 500"):
        worker.publish(nodes(*range(10)))


def test_drain_is_bounded_but_never_stuck():
    target, worker = faulty_pair()
    for number in range(10):
        worker.publish(nodes(number))
    assert handles(target.drain(0)) == [0]
    assert handles(target.drain(3 * (24 + NODE_DTYPE.itemsize))) == [1, 2, 3]
    assert handles(target.drain(1 << 20)) == [4, 5, 6, 7, 8, 9]


def test_a_new_worker_supersedes_the_old_one_and_gets_nothing_of_it():
    target, old = faulty_pair()
    target.send(commit(1))
    old.publish(nodes(1))
    session = target.session
    new = target.attach()
    assert target.session not in (0, session)
    assert old.superseded
    assert not old.publish(nodes(2))
    assert new.receive() == []
    new.publish(nodes(3))
    assert handles(target.drain(1 << 20)) == [3]
    old.close()
    assert not new.superseded
    beats = target.heartbeat
    old.beat()
    assert target.heartbeat == beats
    new.beat()
    assert target.heartbeat == beats + 1
    new.close()
    assert target.session == 0
    assert not target.send(commit(2))


def test_closing_the_target_sends_the_worker_away():
    target, worker = faulty_pair()
    target.close()
    target.close()
    assert worker.superseded
    assert not target.send(commit(1))
    assert target.drain(1 << 20) == []


def test_waiting_uses_the_given_sleep_and_no_clock():
    naps = []
    target, worker = faulty_pair(sleep=naps.append)
    worker.wait(5.0)
    assert sum(naps) == pytest.approx(5.0)
    naps.clear()
    target.send(commit(1))
    worker.wait(5.0)
    assert naps == []
