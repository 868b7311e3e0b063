"""How the engine core waits for its workers, on vLLM's own condition and its sockets."""

import os
import pickle
import time
from collections.abc import Iterator

import pytest
import zmq
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

from vllm_double.integration import engine_core, speculative_config
from vllm_double.integration.speculative_config import DoubleSpeculativeConfig


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SpinCondition, "wait", SpinCondition.wait)  # put back afterwards
    engine_core.wait_asleep()


@pytest.fixture
def ends() -> Iterator[tuple[SpinCondition, SpinCondition]]:
    context = zmq.Context()
    address = f"inproc://double-{os.getpid()}"
    writer = SpinCondition(is_reader=False, context=context, notify_address=address)
    reader = SpinCondition(is_reader=True, context=context, notify_address=address)
    yield writer, reader
    context.destroy(linger=0)


def test_a_busy_reader_sleeps_instead_of_spinning(patched: None, ends: tuple[SpinCondition, SpinCondition]) -> None:
    _, reader = ends
    reader.record_read()
    started = time.perf_counter()
    for _ in range(20):
        reader.wait()
    assert time.perf_counter() - started >= 0.018, "each wait is a millisecond when nothing is announced"
    assert reader.busy_loop_s == 1


def test_an_announcement_ends_the_wait(patched: None, ends: tuple[SpinCondition, SpinCondition]) -> None:
    writer, reader = ends
    reader.last_read = time.monotonic() + 1e6
    reader.local_notify_socket.poll(100)
    for _ in range(20):
        writer.notify()
        assert reader.local_notify_socket.poll(10_000)
        started = time.perf_counter()
        reader.wait()
        assert not reader.local_notify_socket.poll(0), "it was taken"
        assert time.perf_counter() - started < 10


def test_an_idle_reader_waits_as_before(patched: None, ends: tuple[SpinCondition, SpinCondition]) -> None:
    _, reader = ends
    reader.last_read = time.monotonic() - 10
    started = time.perf_counter()
    reader.wait(timeout_ms=30)
    assert time.perf_counter() - started >= 0.029


def test_patching_twice_is_patching_once(patched: None) -> None:
    once = SpinCondition.wait
    engine_core.wait_asleep()
    assert SpinCondition.wait is once


@pytest.mark.parametrize(
    ("cores", "launcher", "expected"), [("some", os.getppid(), 1), (None, os.getppid(), 0), ("some", os.getpid(), 0)]
)
def test_only_an_engine_core_beside_a_draft_on_the_cpu_is_changed(
    monkeypatch: pytest.MonkeyPatch, cores: str | None, launcher: int, expected: int
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(speculative_config, "wait_asleep", lambda: calls.append(1))
    config = object.__new__(DoubleSpeculativeConfig)
    config.__dict__.update(cores=cores, launcher=launcher)
    received = pickle.loads(pickle.dumps(config))
    assert received.launcher == launcher
    assert len(calls) == expected
