"""What the actor runs in these tests: a worker that attaches, beats, and loads no model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from multiprocessing import resource_tracker, shared_memory

from vllm_double.hosting import process_care
from vllm_double.hosting.settings import DraftSettings
from vllm_double.transport.shared import SharedDraftChannel


class BeatingWorker:
    def __init__(self, channel: SharedDraftChannel) -> None:
        self._channel = channel

    def run(self, should_stop: Callable[[], bool]) -> None:
        while not should_stop() and not self._channel.superseded:
            self._channel.beat()
            self._channel.receive()
            self._channel.wait(0.001)


def build(settings: DraftSettings, address: str, rank: int, rendezvous: str) -> BeatingWorker:
    return BeatingWorker(SharedDraftChannel.attach(address))


def build_with_openmp(settings: DraftSettings, address: str, rank: int, rendezvous: str) -> BeatingWorker:
    """As a real worker does, leaves an entry of Intel's OpenMP in /dev/shm where torch brings that
    library.
    """
    import torch

    torch.ones(512, 512) @ torch.ones(512, 512)
    return build(settings, address, rank, rendezvous)


class StandingWorker(BeatingWorker):
    """Its loop turns a few times, and then never again."""

    def run(self, should_stop: Callable[[], bool]) -> None:
        for _ in range(3):
            should_stop()
            self._channel.beat()
        threading.Event().wait()


def stand_still(settings: DraftSettings, address: str, rank: int, rendezvous: str) -> BeatingWorker:
    process_care.LONGEST_TURN_S = 0.5
    return StandingWorker(SharedDraftChannel.attach(address))


def refuse(settings: DraftSettings, address: str, rank: int, rendezvous: str) -> BeatingWorker:
    raise ValueError("the draft model is not there")


def fail(settings: DraftSettings, address: str, rank: int, rendezvous: str) -> BeatingWorker:
    raise RuntimeError("nobody knows why")


def cannot_reach(settings: DraftSettings, address: str, rank: int, rendezvous: str) -> BeatingWorker:
    raise ConnectionError("the hub is away")


class WaitingFollower:
    """A rank that leads nothing: it maps a segment of shared memory, as vLLM's ranks do, and waits."""

    def __init__(self) -> None:
        self._segment = shared_memory.SharedMemory(create=True, size=4096)
        resource_tracker.unregister(self._segment._name, "shared_memory")  # type: ignore[attr-defined]  # nobody cleans up

    def run(self, should_stop: Callable[[], bool]) -> None:
        while not should_stop():
            time.sleep(0.05)


def build_rank(settings: DraftSettings, address: str, rank: int, rendezvous: str) -> BeatingWorker | WaitingFollower:
    return build(settings, address, rank, rendezvous) if rank == 0 else WaitingFollower()
