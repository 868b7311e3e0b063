"""The two ends of the data plane between the target's process and the draft worker.

Nobody ever blocks on the other side. A full, damaged or deserted transport means "no drafts", never an error.
An end belongs to one thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from vllm_double.transport.messages import Command, NodeArray, Report, WorkerStats

__all__ = ["AttachError", "TargetEnd", "TransportStats", "WorkerEnd"]


class AttachError(RuntimeError):
    """The address names no target of this protocol that is alive."""


@dataclass(slots=True)
class TransportStats:
    """Records since this end was made.

    ``sent``; ``full``: refused for lack of room; ``drained``: delivered to the caller; ``corrupt``: damaged
    records or indices that were skipped; ``stale``: dropped because they were written under another session.
    """

    sent: int = 0
    full: int = 0
    drained: int = 0
    corrupt: int = 0
    stale: int = 0


class TargetEnd(Protocol):
    """The target's end. Everything that was said to an earlier session is lost to the next one."""

    @property
    def session(self) -> int:
        """0 while no worker is attached; another value after each attachment."""

    @property
    def heartbeat(self) -> int:
        """A counter that the worker raises at every turn of its loop."""

    @property
    def stats(self) -> TransportStats:
        """Counters of this end."""

    def send(self, command: Command) -> bool:
        """Write a command. False: no worker, or no room; nothing was written. Raises MessageError (caller's
        mistake)."""

    def drain(self, max_bytes: int) -> list[Report]:
        """What the attached worker published, at most so many bytes of it (but at least one record).

        All nodes come first, in one Nodes message. Damaged and stale records are counted and skipped.
        """

    def close(self) -> None:
        """Send the worker away and give everything back. May be called twice."""


class WorkerEnd(Protocol):
    """The worker's end."""

    @property
    def superseded(self) -> bool:
        """This end is over and the worker must stop: another worker attached, the target closed, a command
        was lost."""

    @property
    def stats(self) -> TransportStats:
        """Counters of this end."""

    def target_alive(self) -> bool:
        """Whether the target's process still runs. An orphan must leave."""

    def receive(self) -> list[Command]:
        """The commands that have come in, in order.

        A damaged command cannot be made up for, so it ends the session (``superseded``): with the next one
        the target admits everything anew.
        """

    def publish(self, records: NodeArray) -> bool:
        """Write nodes (NODE_DTYPE [n]) as one record. False: no room or superseded; nothing was written."""

    def report(self, stats: WorkerStats) -> bool:
        """Write statistics; as ``publish``."""

    def beat(self) -> None:
        """Raise the heartbeat."""

    def wait(self, timeout_s: float) -> None:
        """Idle in naps of at most 1 ms, or a tenth of the timeout if that is more, until a command is there, the end is
        superseded, or the naps add up."""

    def close(self) -> None:
        """Detach: the target sees session 0, unless another worker has taken over. May be called twice."""
