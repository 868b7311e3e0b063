"""The requests that the target's side knows: slots of the arena, which are used again."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import partial

import numpy as np

from vllm_double.prefix_hash import seed
from vllm_double.target._round_steps import SLOT_BITS
from vllm_double.target.calibration import temperature_bucket
from vllm_double.target.round_calls import calls
from vllm_double.target.speculation_trie import Tries, check_integrity

__all__ = ["RequestParams", "RequestTable"]

_NUM_SLOTS = 64  # at first
_NUM_NODES = 1 << 16
_NUM_EDGES = 1 << 16
_MOST = 2**31 - 1


@dataclass(frozen=True, slots=True)
class RequestParams:
    """What of a request matters to drafting.

    temperature: 0 is greedy. max_length: tokens of prompt and output together that the text can have at most.
    stop_token_ids: tokens after which nothing counts. tenant: whose earlier texts the request may be offered; None: it named
    nobody. use_drafts: False if drafts were declined. use_worker: False if the draft model cannot read the prompt.
    seed: of the noise that tokens are drawn with, int64. top_k (0: off), top_p, min_p: what they are drawn from.

    Whatever a client says, it fits the arrays and records that it goes into: numbers are cut to what makes no difference, and
    one that nobody can draw by gets no drafts.
    """

    temperature: float
    max_length: int
    stop_token_ids: frozenset[int]
    tenant: str | None = None
    use_drafts: bool = True
    use_worker: bool = True
    seed: int = 0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        set_field = partial(object.__setattr__, self)
        set_field("max_length", min(self.max_length, _MOST))
        set_field("stop_token_ids", frozenset(token for token in self.stop_token_ids if 0 <= token <= _MOST))
        set_field("top_k", self.top_k if 0 <= self.top_k <= _MOST else 0)
        if not (0.0 <= self.temperature < math.inf and 0.0 < self.top_p <= 1.0 and 0.0 <= self.min_p <= 1.0):
            set_field("temperature", 0.0)
            set_field("top_p", 1.0)
            set_field("min_p", 0.0)
            set_field("use_drafts", False)


class RequestTable:
    """Live requests by slot, with their tries. ``tries`` is another one after `add`: hold no reference to it."""

    def __init__(self, max_chain: int, vocab_size: int = sys.maxsize) -> None:
        """max_chain: tokens of the longest chain."""
        self.max_chain = max_chain
        self._vocab_size = vocab_size
        self._serial = 0
        self._calls = calls()
        self.clear()

    def clear(self) -> None:
        """Forget everything, sound or not."""
        least = 1 << (4 * self.max_chain).bit_length()  # a path must find room
        num_nodes, num_edges = max(_NUM_NODES, least), max(_NUM_EDGES, least)
        self.tries = Tries.empty(_NUM_SLOTS, self.max_chain, num_nodes, num_edges, self._vocab_size)
        self.params: dict[int, RequestParams] = {}
        self._free = list(range(_NUM_SLOTS - 1, -1, -1))
        self._stops: dict[frozenset[int], tuple[int, int]] = {}  # sets that stand in ``tries.stops``, and where
        self._stops_end = 0

    def __len__(self) -> int:
        return len(self.params)

    def add(self, params: RequestParams, length: int) -> int:
        """A request enters with a text of ``length`` tokens; its slot."""
        if not self._free:
            num_slots = len(self.tries.requests)
            self.tries = self.tries.grown()
            self._free = list(range(2 * num_slots - 1, num_slots - 1, -1))
        slot = self._free.pop()
        self.params[slot] = params
        self.tries.requests[slot] = np.zeros((), self.tries.requests.dtype)
        request = self.tries.requests[slot]
        request["key"] = key = self.new_number(slot)
        request["max_length"] = min(params.max_length, 1 << 40)
        request["temperature"], request["seed"] = temperature_bucket(params.temperature), params.seed
        request["use_drafts"], request["use_worker"] = params.use_drafts, params.use_worker
        request["next_pause"] = self.tries.limits["first_pause"][0]
        request["stops_start"], request["stops_end"] = self._hold(params.stop_token_ids)
        self.restart(slot, key, length)
        return slot

    def remove(self, slot: int) -> None:
        """A request leaves."""
        self._calls.drop_request(self.tries, slot)
        self.tries.requests["key"][slot] = self.tries.requests["session"][slot] = 0
        del self.params[slot]
        self._free.append(slot)

    def restart(self, slot: int, number: int, length: int) -> None:
        """Begin the trie anew behind a text of ``length`` tokens. number: what names its nodes, the same on both sides."""
        self._calls.drop_request(self.tries, slot)
        request = self.tries.requests[slot]
        request["root_hash"], request["length"] = seed(number), length

    def new_number(self, slot: int) -> int:
        """A number that was never given before, and tells the slot."""
        self._serial += 1
        return (self._serial << SLOT_BITS) | slot

    def _hold(self, stops: frozenset[int]) -> tuple[int, int]:
        """Where a set of stop tokens stands; equal sets stand once."""
        if stops not in self._stops:
            array = self.tries.stops
            if self._stops_end + len(stops) > len(array):
                self._make_room(len(stops))
                array = self.tries.stops
            start, self._stops_end = self._stops_end, self._stops_end + len(stops)
            array[start : self._stops_end] = sorted(stops)
            self._stops[stops] = start, self._stops_end
        return self._stops[stops]

    def _make_room(self, num_stops: int) -> None:
        """Only the sets of live requests stay."""
        held = {params.stop_token_ids for params in self.params.values()}
        self._stops, self._stops_end = {}, 0
        num_held = sum(map(len, held))
        size = max(len(self.tries.stops), 1 << (2 * (num_held + num_stops)).bit_length())
        self.tries = self.tries._replace(stops=np.zeros(size, np.int32))
        for slot, params in self.params.items():
            request = self.tries.requests[slot]
            request["stops_start"], request["stops_end"] = self._hold(params.stop_token_ids)

    def check_integrity(self) -> None:
        """Assert that the arena is sound and that slots are either free or taken. Slow: for tests."""
        check_integrity(self.tries)
        requests = self.tries.requests
        assert set(np.flatnonzero(requests["key"]).tolist()) == set(self.params)
        assert sorted([*self._free, *self.params]) == list(range(len(requests)))
        for slot, params in self.params.items():
            start, end = requests[["stops_start", "stops_end"]][slot]
            assert frozenset(self.tries.stops[start:end].tolist()) == params.stop_token_ids
