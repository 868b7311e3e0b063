"""What a test of both sides puts in place of the real things: it does as they do, and keeps account in whole texts.

All token ids are below 256, so that a text is ``bytes``, and to have been said behind a text is to be in a set of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tests.fakes.engine import FakeEngine
from tests.faults import Queue, QueueTargetChannel
from tests.references.automaton import check_context, check_history
from vllm_double.draft.engine.base import Row
from vllm_double.retrieval import ContextRetriever, HistoryRetriever
from vllm_double.retrieval.base import Continuation, Source, Tokens
from vllm_double.transport.messages import (
    NODE_DTYPE,
    NODES,
    Admit,
    Command,
    Commit,
    Commits,
    Dropped,
    Release,
    Report,
    decode_commands,
    encode,
)  # fmt: skip
from vllm_double.transport.ring import Record

__all__ = ["Kept", "Wire", "WitnessChannel", "WitnessEngine", "WitnessRetriever"]


class WitnessEngine(FakeEngine):
    """A draft whose answer depends on all of the context. ``contexts``: what each answer of the last forward stands behind."""

    def __init__(self, vocab_size: int, num_pages: int, page_size: int, max_length: int) -> None:
        table = np.random.default_rng(0).normal(scale=2.5, size=(61, vocab_size))
        super().__init__(
            lambda context: table[zlib.crc32(bytes(context)) % 61],
            vocab_size=vocab_size,
            num_pages=num_pages,
            page_size=page_size,
            max_length=max_length,
        )
        self.contexts: list[bytes] = []

    def forward(self, rows: Sequence[Row], num_children: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """See DraftEngine.forward."""
        self.contexts = []
        return super().forward(rows, num_children)

    def _best(
        self, context: Sequence[int], row: Row, num_children: int
    ) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
        self.contexts.append(bytes(context))
        return super()._best(context, row, num_children)


class Kept(NamedTuple):
    """An output that a source was told to keep: tokens ``start`` to ``start + len(tokens)`` of the text of ``key``."""

    key: int
    start: int
    tokens: bytes


class WitnessRetriever(Source):
    """The context or the history, each of whose answers must stand in a text that the asker may see.

    found: by key, texts with a token behind them that was retrieved there. texts, tenants: of the running requests, by key.
    kept: by tenant. These are the texts that *may* be found: the source gives up old ones.
    """

    def __init__(self, source: Source) -> None:
        self.name = source.name
        self.found: dict[int, set[bytes]] = {}
        self.texts: dict[int, bytearray] = {}
        self.tenants: dict[int, str | None] = {}
        self.kept: dict[str | None, list[Kept]] = {}
        self._source = source
        self._starts: dict[int, int] = {}  # where the output begins that will be kept

    def start(self, key: int, tokens: Tokens, tenant: str | None) -> None:
        """See Source."""
        self._source.start(key, tokens, tenant)
        self.texts[key], self.tenants[key], self.found[key] = bytearray(tokens.tolist()), tenant, set()
        self._starts[key] = len(tokens)

    def work(self, budget_tokens: int) -> None:
        """See Source."""
        self._source.work(budget_tokens)

    def extend(self, key: int, tokens: Sequence[int]) -> None:
        """See Source."""
        self._source.extend(key, tokens)
        self.texts[key].extend(tokens)

    def lookup(self, key: int, tail: Sequence[int], max_tokens: int) -> Continuation | None:
        """See Source."""
        found = self._source.lookup(key, tail, max_tokens)
        if found is None:
            return None
        assert 0 < len(found.tokens) <= max_tokens and found.match_length > 0
        context = bytes(self.texts[key]) + bytes(tail)
        if self.name == "context":
            searched = [bytes(self.texts[key])]
        else:
            searched = [kept.tokens for kept in self.kept.get(self.tenants[key], ())]
        for token in found.tokens:
            words = context[-found.match_length :] + bytes([token])
            assert any(words in text for text in searched), f"{words!r} is in no text of {self.name} for {self.tenants[key]!r}"
            context += bytes([token])
            self.found[key].add(context)
        return found

    def stop(self, key: int, keep: bool) -> None:
        """See Source."""
        self._source.stop(key, keep)
        text, tenant, start = self.texts.pop(key), self.tenants.pop(key), self._starts.pop(key)
        del self.found[key]
        if keep and tenant is not None:
            self.kept.setdefault(tenant, []).append(Kept(key, start, bytes(text[start:])))

    def forget(self) -> None:
        """See Source."""
        self._source.forget()
        if self.name == "context":
            return
        self.kept.clear()
        for key, text in self.texts.items():
            self._starts[key] = len(text)
            self.found[key].clear()

    def check_integrity(self) -> None:
        """Assert that the source is sound."""
        if isinstance(self._source, ContextRetriever):
            check_context(self._source)
        elif isinstance(self._source, HistoryRetriever):
            check_history(self._source)


class Wire(Queue):
    """A Queue of which single records can be taken out and put back elsewhere, later or twice.

    on_push: called with the payload of each Nodes record, on_drain: with session and payload of each that is delivered.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.late: list[bytes] = []
        self.on_push: Callable[[npt.NDArray[np.void]], None] = lambda nodes: None
        self.on_drain: Callable[[int, npt.NDArray[np.void]], None] = lambda session, nodes: None

    def __len__(self) -> int:
        return len(self._queue)

    def take(self, place: int) -> bytes:
        """Take out one record."""
        frame = self._queue[place]
        del self._queue[place]
        self._used -= len(frame)
        return frame

    def put(self, place: int, frame: bytes) -> None:
        """Put a record before the one at ``place``."""
        self._queue.insert(place, frame)
        self._used += len(frame)

    def push(self, kind: int, session: int, payload: bytes) -> bool:
        """See Queue."""
        if kind == NODES:
            self.on_push(np.frombuffer(payload, NODE_DTYPE))
        return super().push(kind, session, payload)

    def drain(self, max_bytes: int, kind: int = -1, size: int = 1) -> list[Record]:
        """See Queue."""
        records = super().drain(max_bytes)
        for found_kind, session, payload in records:
            if found_kind == NODES:
                self.on_drain(session, np.frombuffer(payload, NODE_DTYPE))
        return records


class WitnessChannel(QueueTargetChannel):
    """The target's end, and what the attached worker was told.

    room: commands that are still taken, all where None. refused: whether one was not, since this was set to False.
    texts, chains: by handle, of the requests that the worker should know. admitted: handles that it ever knew.
    num_resets: of the draft's prefix cache. epochs: by handle, their number when the worker was told of the request.
    outdated: by handle, how much of the text was told before the target's weights changed.
    """

    commands: Wire
    reports: Wire

    def __init__(self, commands: Wire, reports: Wire) -> None:
        super().__init__(commands, reports, lambda seconds: None)
        self.room: int | None = None
        self.refused = False
        self.admitted: set[int] = set()
        self.num_resets = 0
        self.epochs: dict[int, int] = {}
        self.outdated: dict[int, int] = {}
        self._told_session = 0
        self._texts: dict[int, bytearray] = {}
        self._chains: dict[int, list[int]] = {}

    @property
    def texts(self) -> dict[int, bytearray]:
        """By handle; empty while no worker is attached, or one that was not told anything."""
        return self._texts if self.session == self._told_session else {}

    @property
    def chains(self) -> dict[int, list[int]]:
        """By handle."""
        return self._chains if self.session == self._told_session else {}

    def send(self, command: Command | Commits) -> bool:
        """See TargetChannel."""
        if self.room == 0 or not super().send(command):
            self.refused = True
            return False
        if self.room is not None:
            self.room -= 1
        if self.session != self._told_session:
            self._told_session, self._texts, self._chains, self.outdated = self.session, {}, {}, {}
        if isinstance(command, Admit):
            assert command.handle not in self.admitted, "a handle came back"
            self.admitted.add(command.handle)
            self.epochs[command.handle] = self.num_resets
            self._texts[command.handle], self._chains[command.handle] = bytearray(command.tokens.tolist()), []
        elif isinstance(command, Commit | Commits):
            for commit in decode_commands(*encode(command)):
                assert isinstance(commit, Commit)
                text = self._texts[commit.handle]
                assert commit.keep == len(text)
                text.extend(commit.tokens.tolist())
                self._chains[commit.handle] = commit.chain.tolist()
        elif isinstance(command, Release):
            self._texts.pop(command.handle, None)
            self._chains.pop(command.handle, None)
        return True

    def drain(self, max_bytes: int) -> list[Report]:
        """See TargetChannel."""
        reports = super().drain(max_bytes)
        for report in reports:
            for handle in report.handles if isinstance(report, Dropped) else ():
                self._texts.pop(handle, None)
                self._chains.pop(handle, None)
        return reports

    def outdate(self) -> None:
        """The target's weights changed."""
        self.outdated = {handle: len(text) for handle, text in self.texts.items()}
