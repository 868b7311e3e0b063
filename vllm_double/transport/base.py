"""The channel between the target's process and the draft worker, as each side has it: two rings and a few words.

Nobody ever blocks on the other side. A full, damaged or deserted transport means "no drafts", never an error.
A side belongs to one thread at a time.
"""

from __future__ import annotations

import mmap
import secrets
import time
from collections.abc import Callable
from typing import Final

from vllm_double.transport.messages import (
    NODE_DTYPE,
    NODES,
    Command,
    Commits,
    Dropped,
    MessageError,
    NodeArray,
    Nodes,
    Report,
    WorkerStats,
    decode_commands,
    decode_reports,
    encode,
    warm_up,
)
from vllm_double.transport.ring import INDEX_BYTES, RingConsumer, RingProducer

__all__ = ["AttachError", "DraftChannel", "Region", "TargetChannel", "stamp"]

_RECEIVE_BYTES: Final = 1 << 20
_SHORTEST_NAP_S: Final = 50e-6
_LONGEST_NAP_S: Final = 1e-3
_LONGEST_NAP_SHARE: Final = 0.1  # of a wait, where that is more

CONTROL_BYTES: Final = 4096
_LINE_WORDS: Final = 8
# Indices of 8-byte words. The first line is written once, by the target.
COMMAND_BYTES_WORD: Final = 4
REPORT_BYTES_WORD: Final = 5
SESSION_WORD: Final = _LINE_WORDS  # by the worker; zeroed by the target when it closes
HEARTBEAT_WORD: Final = 2 * _LINE_WORDS  # by the worker


class AttachError(RuntimeError):
    """The address names no target of this protocol that is alive."""


class Region:
    """The memory of both sides: a page with the control block, the ring of commands, the ring of reports.

    Words of the control block stand in cache lines by who writes them.
    """

    def __init__(self, memory: mmap.mmap | bytearray) -> None:
        """``memory``: `size` bytes, zeroed before their first use."""
        self._memory = memory
        self._view = memoryview(memory)
        self.words = self._view[:CONTROL_BYTES].cast("Q")
        self._parts = [self._view, self.words]

    def rings(self) -> tuple[memoryview, memoryview]:
        """Commands and reports, of the sizes in the control block."""
        command_bytes, report_bytes = self.words[COMMAND_BYTES_WORD], self.words[REPORT_BYTES_WORD]
        commands = self._view[CONTROL_BYTES : CONTROL_BYTES + INDEX_BYTES + command_bytes]
        reports_at = CONTROL_BYTES + _align(INDEX_BYTES + command_bytes)
        reports = self._view[reports_at : reports_at + INDEX_BYTES + report_bytes]
        self._parts += [commands, reports]
        return commands, reports

    @staticmethod
    def size(command_bytes: int, report_bytes: int) -> int:
        """Bytes, for rings of these sizes."""
        return CONTROL_BYTES + _align(INDEX_BYTES + command_bytes) + _align(INDEX_BYTES + report_bytes)

    def close(self) -> None:
        """Give mapped memory back, when no ring uses it any more."""
        for part in reversed(self._parts):
            part.release()
        if isinstance(self._memory, mmap.mmap):
            self._memory.close()


def _align(size: int) -> int:
    return -(-size // 64) * 64


def stamp(session: int) -> int:
    """What a record carries of its session: the low 32 bits."""
    return session & 0xFFFF_FFFF


def new_session(previous: int) -> int:
    """A random 64-bit session that neither is 0 nor shares its stamp with the previous one."""
    while True:
        session = secrets.randbits(64)
        if stamp(session) not in (0, stamp(previous)):
            return session


class TargetChannel:
    """The target's side: a producer of commands and a consumer of reports. What was sent to an earlier session is lost to the
    next one. ``_closed`` guards everything that is mapped."""

    def __init__(self, region: Region, command_bytes: int, report_bytes: int) -> None:
        warm_up()
        self._region, self._words = region, region.words
        self._words[COMMAND_BYTES_WORD], self._words[REPORT_BYTES_WORD] = command_bytes, report_bytes
        commands, reports = region.rings()
        self._commands = RingProducer(commands)
        self._reports = RingConsumer(reports)
        self._closed = False

    @property
    def session(self) -> int:
        """0 while no worker is attached; another value after each attachment."""
        return 0 if self._closed else self._words[SESSION_WORD]

    @property
    def heartbeat(self) -> int:
        """A counter that the worker raises at every turn of its loop."""
        return 0 if self._closed else self._words[HEARTBEAT_WORD]

    @property
    def longest_text(self) -> int:
        """Tokens that are sent whole without fail: half of what there is room for."""
        return self._commands.capacity // 8

    def close(self) -> None:
        """Send the worker away and give everything back. May be called twice."""
        if not self._closed:
            self._words[SESSION_WORD] = 0
            self._closed = True

    def send(self, command: Command | Commits) -> bool:
        """Write a command. False: no worker, or no room; nothing was written. Raises MessageError (caller's mistake)."""
        session = self.session
        if not session:
            return False
        return _push(self._commands, session, command)

    def drain(self, max_bytes: int) -> list[Report]:
        """What the attached worker published, at most so many bytes of it (but at least one record).

        All nodes come first, in one Nodes message. Damaged and stale records are skipped.
        """
        if self._closed:
            return []
        records = self._reports.drain(max_bytes, NODES, NODE_DTYPE.itemsize)
        # Read after the records: a worker takes its session before it writes its first one.
        # Without a worker it is 0, which no record carries.
        current = stamp(self.session)
        fresh = [(kind, payload) for kind, of, payload in records if of == current]
        return decode_reports(fresh) if fresh else []


class DraftChannel:
    """The worker's side: a consumer of commands and a producer of reports. It takes over from whoever was attached."""

    def __init__(self, region: Region, sleep: Callable[[float], None] = time.sleep) -> None:
        self._region, self._words = region, region.words
        commands, reports = region.rings()
        self._commands = RingConsumer(commands)
        self._reports = RingProducer(reports)
        self._sleep = sleep
        self._nap_s = _SHORTEST_NAP_S
        self._closed = False
        # First this, then the session: what is said to the new session must not be skipped. Commands that
        # slip in between carry an older stamp.
        self._commands.skip()
        self._session: Final = new_session(self._words[SESSION_WORD])
        self._words[SESSION_WORD] = self._session

    @property
    def superseded(self) -> bool:
        """The worker must stop: another worker attached, the target closed, a command was lost."""
        return self._closed or self._words[SESSION_WORD] != self._session

    def beat(self) -> None:
        """Raise the heartbeat."""
        # Not of a superseded worker: it would make a stopped successor look alive.
        if not self.superseded:
            self._words[HEARTBEAT_WORD] = (self._words[HEARTBEAT_WORD] + 1) & 0xFFFF_FFFF_FFFF_FFFF

    def close(self) -> None:
        """Detach: the target sees session 0, unless another worker has taken over. May be called twice."""
        self._give_up()
        self._closed = True

    def _give_up(self) -> None:
        # Not atomic. If a successor attaches between the two accesses it finds itself superseded and is
        # started again.
        if not self.superseded:
            self._words[SESSION_WORD] = 0

    def receive(self) -> list[Command]:
        """The commands that have come in, in order.

        A damaged command cannot be made up for, so it ends the session (``superseded``): with the next one the target admits
        everything anew.
        """
        if self.superseded:
            return []
        records = self._commands.drain(_RECEIVE_BYTES)
        current = stamp(self._session)
        commands: list[Command] = []
        is_damaged = self._commands.corrupt > 0
        for kind, of, payload in records:
            if of == current:
                try:
                    commands.extend(decode_commands(kind, payload))
                except MessageError:
                    is_damaged = True
        if is_damaged:
            self._give_up()
            return []
        if commands:
            self._nap_s = _SHORTEST_NAP_S
        return commands

    def publish(self, records: NodeArray) -> bool:
        """Write nodes (NODE_DTYPE [n]) as one record. False: no room or superseded; nothing was written."""
        return self._write(Nodes(records))

    def report(self, news: WorkerStats | Dropped) -> bool:
        """Write statistics, or which requests are not known any more; as ``publish``."""
        return self._write(news)

    def _write(self, message: Report) -> bool:
        return not self.superseded and _push(self._reports, self._session, message)

    def wait(self, timeout_s: float) -> None:
        """Idle in naps of at most 1 ms, or a tenth of the timeout if that is more, until a command is there, the channel is
        superseded, or the naps add up."""
        # Polling, because "sleep unless the head moved" can lose the wake-up. Naps grow while nothing
        # happens, over many calls too: quick answers to a busy target, two hundred cheap looks a second for an idle one, whose
        # first request reads a prompt for longer than a nap.
        left, longest = timeout_s, max(_LONGEST_NAP_S, _LONGEST_NAP_SHARE * timeout_s)
        while left > 0 and not self.superseded and not self._commands.pending:
            nap = min(self._nap_s, left)
            self._sleep(nap)
            left -= nap
            self._nap_s = min(2 * self._nap_s, longest)


def _push(producer: RingProducer, session: int, message: Command | Commits | Report) -> bool:
    kind, payload = encode(message)
    return producer.push(kind, stamp(session), payload)
