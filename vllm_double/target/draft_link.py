"""The worker protocol, as the target speaks it: admit, commit, release.

A worker's session knows a request under a handle, which is new at each admission: records of an earlier one cannot be mistaken.
Nobody waits for the worker, and nothing that it does, or does not do, ends a request: what finds no room in the channel is
released and admitted again, whole, when there is room; a new session is sent all requests again. What is longer than the draft
can read, or than the channel has room for, is not sent at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from vllm_double.target._round_steps import SLOT_BITS
from vllm_double.target.batch import Batch
from vllm_double.target.request_table import RequestTable
from vllm_double.target.round_calls import calls
from vllm_double.target.stats import Counters
from vllm_double.transport import messages
from vllm_double.transport.base import TargetChannel
from vllm_double.transport.messages import Admit, Commit, Commits, Dropped, Forget, NodeArray, Nodes, Release

__all__ = ["DraftLink"]

_ADMIT_TOKENS_PER_COMMAND = 8192
_ADMIT_TOKENS_PER_ROUND = 65536
_DRAIN_BYTES_PER_ROUND = 1 << 20
_MAX_STOPS = 1024  # that are sent: what the worker drafts behind others is of no use, and harmless
_COMMIT_WORDS = 1 << 16  # of one record

Ints = npt.NDArray[np.int32]


class DraftLink:
    """The target's end of a channel to a draft worker; ``channel`` None: there never is one."""

    def __init__(self, channel: TargetChannel | None, table: RequestTable, counters: Counters) -> None:
        self._channel = channel
        self._table = table
        self._counters = counters
        self._calls = calls()
        self._handles: set[int] = set()  # that a worker may know
        self._unsent: list[Release | Forget] = []  # for lack of room
        self._admit_budget = _ADMIT_TOKENS_PER_ROUND
        self._epoch = 0  # of the draft's prefix cache
        self._words = np.zeros(_COMMIT_WORDS, np.uint32)
        self._floats = self._words.view(np.float32)
        self._unknown = np.zeros(1, np.int32)
        self._longest = channel.longest_text if channel is not None else 0

    @property
    def session(self) -> int:
        """Of the worker that is connected; 0: none is."""
        return self._channel.session if self._channel is not None else 0

    @property
    def heartbeat(self) -> int:
        """A counter that the worker raises at every turn of its loop."""
        return self._channel.heartbeat if self._channel is not None else 0

    @property
    def is_there(self) -> bool:
        """Whether there is a channel."""
        return self._channel is not None

    def begin_round(self) -> None:
        """A round begins: its budgets are whole again."""
        self._admit_budget = _ADMIT_TOKENS_PER_ROUND
        self._counters.rounds_without_worker += self._channel is not None and self._channel.session == 0

    def receive(self) -> Iterator[NodeArray]:
        """What the worker has drafted since the last call."""
        if self._channel is None:
            return
        for report in self._channel.drain(_DRAIN_BYTES_PER_ROUND):
            if isinstance(report, Nodes):
                yield report.records
            elif isinstance(report, Dropped):
                self._drop(report.handles)
            else:
                self._counters.worker = report.values
                self._longest = int(min(self._channel.longest_text, report.values.get("max_length", self._longest)))

    def _drop(self, handles: Iterable[int]) -> None:
        """The worker has forgotten these requests, for lack of room: they are admitted again after as long a pause as after
        drafts that were of no use."""
        requests, limits = self._table.tries.requests, self._table.tries.limits[0]
        for handle in self._handles.intersection(handles):
            request = requests[handle & ((1 << SLOT_BITS) - 1)]
            self._handles.discard(handle)
            request["session"], request["pause"] = 0, request["next_pause"]
            request["next_pause"] = min(2 * request["next_pause"], limits["longest_pause"])

    # ---- requests ---------------------------------------------------------------------------------------------

    def admit(self, slot: int, tokens: npt.NDArray[np.int32]) -> None:
        """Admit a request with its text, if a worker is there and the round's budget allows it; chunk by chunk."""
        channel, params = self._channel, self._table.params[slot]
        if channel is None or not params.use_worker or self._admit_budget < 0:
            return
        session = channel.session
        if session == 0:
            return
        request = self._table.tries.requests[slot]
        if len(tokens) >= self._longest:
            request["use_worker"] = False  # texts only grow
            self._counters.texts_too_long += 1
            return
        self._admit_budget -= len(tokens)
        self._counters.resynchronisations += int(request["handle"] != 0)
        request["handle"] = handle = self._table.new_number(slot)
        chunk = _ADMIT_TOKENS_PER_COMMAND
        self._handles.add(handle)  # from now on the worker may know it
        sent = channel.send(
            Admit(
                handle,
                len(tokens),
                tokens[:chunk],
                params.temperature,
                params.max_length,
                tuple(itertools.islice(params.stop_token_ids, _MAX_STOPS)),
                params.tenant or "",
                self._epoch,
                params.seed,
                params.top_k,
                params.top_p,
                params.min_p,
            )
        )
        if not sent or channel.session != session:
            self._handles.discard(handle)
            if sent:  # another worker came meanwhile: which of the two was it sent to?
                self._unsent.append(Release(handle, keep=False))
            return
        request["session"], request["num_sent"], request["has_drafted"] = session, len(tokens), False
        for start in range(chunk, len(tokens), chunk):
            if not channel.send(Commit.of(handle, start, tokens[start : start + chunk])):
                self.release(slot)
                return
        self._table.restart(slot, handle, len(tokens))

    def release(self, slot: int, keep: bool = False) -> None:
        """Have the worker forget the request, now or when there is room to send that. keep: see `Release`."""
        if self._channel is None:
            return
        request = self._table.tries.requests[slot]
        session, handle = int(request["session"]), int(request["handle"])
        if session != 0:
            self._handles.discard(handle)
            if session == self._channel.session:
                self._unsent.append(Release(handle, keep))
            request["session"] = 0
        self.flush()

    def release_all(self) -> None:
        """Have the worker forget all requests, sound or not."""
        self._unsent.extend(Release(handle, keep=False) for handle in self._handles)
        self._handles = set()
        self.flush()

    def forget_history(self) -> None:
        """The target's weights changed: the draft's side offers nothing of what the target said before."""
        if Forget() not in self._unsent:  # some load weights one by one
            self._unsent.append(Forget())
        self.reset_prefix_cache()

    def reset_prefix_cache(self) -> None:
        """What the draft has read so far is not found by requests that are admitted to it from now on."""
        self._epoch += 1

    def flush(self) -> None:
        """Send what there was no room for."""
        while self._unsent and self._channel is not None and self._channel.send(self._unsent[0]):
            del self._unsent[0]

    # ---- commits ----------------------------------------------------------------------------------------------

    def send_commits(self, batch: Batch, rows: Ints, slots: Ints, waits: bool = False) -> None:
        """Send what was committed and which chains are being verified; requests that the worker does not know are admitted.

        rows: of the batch, int32 [n]; slots: of their requests. waits: the target waits for what follows.
        """
        if self.session == 0:  # whoever knew these requests is gone
            for slot in slots[self._table.tries.requests["session"][slots] != 0].tolist():
                self.release(slot)
            return
        for index in self._pack(batch, rows, slots, batch.rows.lengths, waits, True):
            slot = int(slots[index])
            self.release(slot)
            self.admit(slot, batch.text(int(rows[index])))
            if self._table.tries.requests["session"][slot] != 0:
                place = slice(index, index + 1)
                self._pack(batch, rows[place], slots[place], batch.rows.lengths, waits, True)

    def send_ends(self, batch: Batch, rows: Ints, slots: Ints, ends: Ints) -> None:
        """Send where texts end (``ends``: by row) to the history of the draft's side, which goes without for lack of room."""
        if self.session != 0:
            self._pack(batch, rows, slots, ends, False, False)

    def _pack(self, batch: Batch, rows: Ints, slots: Ints, ends: Ints, waits: bool, is_needed: bool) -> list[int]:
        """Send commits up to ``ends``, by row of the batch, in one record; returns which requests the worker does not know.

        is_needed: requests whose commit finds no room are released, to be admitted again when there is room.
        """
        assert self._channel is not None
        unknown: list[int] = []
        if len(rows) > len(self._unknown):
            self._unknown = np.zeros(2 * len(rows), np.int32)
        start, session = 0, self._channel.session
        while start < len(rows):
            num_done, num_words, num_unknown = self._calls.pack_commits(
                self._table.tries, batch.rows, rows[start:], slots[start:], ends, session, waits,
                messages.MAX_TOKENS, self._longest, self._words, self._floats, self._unknown,
            )  # fmt: skip
            missing = self._unknown[:num_unknown].tolist()
            unknown.extend(start + index for index in missing)
            if num_words and not self._channel.send(Commits(self._words[:num_words].tobytes())) and is_needed:
                for index in set(range(num_done)).difference(missing):
                    self.release(int(slots[start + index]))
            start += num_done
        return unknown

    def check_integrity(self) -> None:
        """Assert that every handle leads to its request."""
        requests = self._table.tries.requests
        assert {int(handle) for handle in requests["handle"][requests["session"] != 0]} == self._handles
