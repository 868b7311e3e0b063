"""A draft model on several devices: one rank leads, the others repeat its forwards on their part of the weights.

The leader has the frontier, the pages and the transport. It sends each call of its engine to the followers first, over sockets
in the runtime folder. A follower returns when its leader is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_double.draft.engine.base import Batch, DraftEngine

__all__ = ["Follower", "LeadingEngine", "Meeting"]

_LOOK_EVERY_S = 1.0


class Meeting:
    """Where the ranks of one draft worker find each other. The leader makes it before its engine, which waits for all
    ranks; the others connect when their engines are loaded.
    """

    def __init__(self, path: str, rank: int, num_ranks: int) -> None:
        """path: of a socket, in a folder that is this user's alone."""
        self.rank = rank
        self.num_ranks = num_ranks
        self.file = f"{path}.store"  # by which torch brings the ranks together
        self._path = path
        self._listener = Listener(path, "AF_UNIX", backlog=num_ranks) if rank == 0 and num_ranks > 1 else None

    def lead(self, engine: DraftEngine) -> LeadingEngine:
        """Of the first rank; returns when all others are there."""
        assert self._listener is not None, "only the first of several ranks leads"
        with self._listener:
            return LeadingEngine(engine, [self._listener.accept() for _ in range(self.num_ranks - 1)])

    def follow(self, engine: DraftEngine) -> Follower:
        """Of any other rank."""
        return Follower(engine, Client(self._path, "AF_UNIX"))


class LeadingEngine:
    """A DraftEngine whose every call is repeated by all followers."""

    def __init__(self, engine: DraftEngine, followers: Sequence[Connection[Any, Any]]) -> None:
        self._engine = engine
        self._followers = followers
        self.page_size, self.num_pages = engine.page_size, engine.num_pages
        self.max_length, self.vocab_size = engine.max_length, engine.vocab_size

    def forward(self, batch: Batch, num_children: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """See DraftEngine.forward. OSError: a follower is gone."""
        self._send("forward", batch, num_children)
        return self._engine.forward(batch, num_children)

    def copy_slots(self, triples: Sequence[tuple[int, int, int]]) -> None:
        """See DraftEngine.copy_slots. OSError: a follower is gone."""
        self._send("copy_slots", triples)
        self._engine.copy_slots(triples)

    def _send(self, *call: Any) -> None:
        for follower in self._followers:
            follower.send(call)


class Follower:
    """Repeats the leader's calls; only the leader uses the results."""

    def __init__(self, engine: DraftEngine, leader: Connection[Any, Any]) -> None:
        self._engine = engine
        self._leader = leader

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Returns when the leader is gone."""
        while not should_stop():
            if not self._leader.poll(_LOOK_EVERY_S):
                continue
            try:
                call, *arguments = self._leader.recv()
            except (EOFError, ConnectionResetError):
                return
            if call == "forward":
                self._engine.forward(*arguments)
            else:
                self._engine.copy_slots(*arguments)
