"""Retrieval from what the target answered to earlier requests of the same tenant."""

from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_double.retrieval.array_source import ArraySource, with_room
from vllm_double.retrieval.base import Found, Queries, Tokens
from vllm_double.retrieval.history_steps import MAX_GENERATIONS, Past, Readers, history_steps
from vllm_double.retrieval.suffix_automaton.arena import NONE, SPARE, Arena
from vllm_double.retrieval.suffix_automaton.automaton_steps import SEPARATOR

__all__ = ["HistoryRetriever"]

# Room of a tenant's first generation, and what any is charged at least: otherwise a tenant for each request had no bound.
_SMALLEST = 1 << 8
_GROWTH = 16
# A generation is never larger than a quarter: a tenant that has the whole history for itself loses a quarter of it at a time.
_SHARE = 4
_SHORTEST_TEXT = 2
_CLEANED = 512  # tokens that are indexed in the time that a slice of released memory takes


@dataclass(slots=True, eq=False)
class _Tenant:
    """A partition. ``number``: its row. ``num_users``: requests and waiting texts. ``owner``: whose quota it is charged to."""

    name: str | None
    owner: str | None
    number: int
    num_users: int = 0
    generations: "deque[_Generation]" = field(default_factory=deque)
    """Newest first."""


@dataclass(slots=True, eq=False)
class _Generation:
    """Texts that are forgotten together. ``slot``: its automaton. ``least`` tokens are charged in any case."""

    tenant: _Tenant
    slot: int
    serial: int
    capacity: int
    least: int
    num_tokens: int = 0

    @property
    def charge(self) -> int:
        """Tokens that it counts for."""
        return max(self.num_tokens, self.least)


class _Text(NamedTuple):
    """A finished output that waits: where it lies in the text of its request, whose slot is closed when it is indexed."""

    tenant: _Tenant
    slot: int
    start: int
    stop: int


class HistoryRetriever(ArraySource):
    """Continues a request with what followed the same words in outputs of earlier requests of its tenant.

    An output is indexed when its request stops: tokens that the target gave, nothing of the prompt. A request without a tenant
    neither reads nor leaves anything, unless ``share_unnamed``: then all of these are one tenant's. Tenants never see each
    other's texts, because the time that an answer takes would tell what they are.

    A tenant's texts lie in generations. A text goes to the newest one, which is closed when it is full; the first has room for
    256 tokens (or its first text), later ones for 16 times their predecessor's, up to a quarter of ``max_tokens``. While all
    generations of all tenants together hold more than ``max_tokens``, each counted as 256 at least, the one that has waited
    longest for another text is given up, whole; so it is if the arena is full. Texts longer than a generation keep their end.

    The part of a tenant's name before the first "/" is its owner. An owner has a quota, ``tenant_share`` of ``max_tokens``: if
    some have more, generations of theirs are given up first. So nobody who invents names takes more than a quota from others.

    A lookup answers from one generation: that in which the longest suffix of text + tail, of at most ``max_match`` tokens,
    occurs; of equally long ones the newest. There it is `ContextRetriever`'s lookup over texts that each end with a separator:
    contexts do not reach across it, it counts as a token that followed, and a continuation ends where it followed most often.
    tests/references/retrieval.py has the same in a few obvious lines.

    A request has a cursor in each generation. It stays valid when texts are added, to this generation or to another.
    A request that finds the arena full neither reads nor leaves anything. Costs: benchmarks/retrieval_bench.py.
    """

    name = "history"

    def __init__(
        self, max_tokens: int, max_match: int = 32, *, share_unnamed: bool = False, arena: Arena | None = None,
        tenant_share: float = 0.5,
    ) -> None:  # fmt: skip
        """Room for ``max_tokens`` tokens of all tenants. Call `sources.warm_up` before the first start."""
        if max_tokens < 1 or max_match < 1:
            raise ValueError(f"max_tokens and max_match must be at least 1, not {max_tokens} and {max_match}")
        self.max_tokens = max_tokens
        self.max_match = max_match
        self.arena = arena or Arena()
        self.num_unindexed = 0
        """Requests and outputs that found no room."""
        self.num_tokens = 0
        """Tokens that are indexed, a separator for each text among them."""
        self._share_unnamed = share_unnamed
        self._largest = max(2, max_tokens // _SHARE)
        self._steps = history_steps()
        self.rows = Readers.empty(16)
        self.past = Past.empty(16)
        self._tenants: dict[str | None, _Tenant] = {}
        self._users: dict[int, _Tenant] = {}  # by key
        self._free_numbers: list[int] = []
        # By serial; the one that has waited longest for another text comes first.
        self._generations: OrderedDict[int, _Generation] = OrderedDict()
        self._waiting: deque[_Text] = deque()
        # The text that is being indexed: its generation, and how much of it is done.
        self._current: tuple[_Generation, _Text, int] | None = None
        self._charge = 0  # of all generations
        self._quota = tenant_share * max_tokens
        self._charges: Counter[str | None] = Counter()  # by owner
        self._over: set[str | None] = set()  # owners with more than the quota
        self._last_serial = 0

    # ---- requests ---------------------------------------------------------------------------------------------

    def start(self, key: int, tokens: Tokens, tenant: str | None = None) -> None:
        """Begin a request with its prompt, int32 [n]. ValueError: the key is in use, or one of its last tokens is negative."""
        last = tokens[-self.max_match :]
        self._begin(key, last)
        slot, number = NONE, 0
        if tenant is not None or self._share_unnamed:
            slot = self.arena.open(max(_SMALLEST, 1 << (len(last) + 1).bit_length()), self.max_match)
            self.num_unindexed += slot == NONE
        if slot != NONE:
            automaton = self.arena.arrays.automata[slot]
            start = automaton["start"]
            self.arena.arrays.text[start : start + len(last)] = last
            automaton["length"] = len(last)
            user = self._users[key] = self._tenant(tenant)
            user.num_users += 1
            number = user.number
        self.requests[key] = (True, slot, number, len(last))
        self.rows.cursors[key]["serial"] = 0

    def extend_many(self, keys: npt.NDArray[np.int32], tokens: Tokens, starts: npt.NDArray[np.int32]) -> None:
        """See Source. KeyError: unknown key, and nothing is appended."""
        while (row := self._steps.extend(self.arena.arrays, self.rows, keys, tokens, starts)) != NONE:
            if row < 0:
                raise KeyError(int(keys[-2 - row]))
            self._enlarge(int(keys[row]), int(starts[row + 1] - starts[row]))

    def stop(self, key: int, keep: bool) -> None:
        """End the request; later ones may be offered its output if ``keep``. KeyError: unknown key."""
        self._end(key)
        slot = int(self.requests["slot"][key])
        if slot == NONE:
            return
        tenant = self._users.pop(key)
        automaton = self.arena.arrays.automata[slot]
        length, output = int(automaton["length"]), int(self.requests["output"][key])
        if keep and length - output >= _SHORTEST_TEXT:
            self.arena.arrays.text[int(automaton["start"]) + length] = SEPARATOR
            self._waiting.append(_Text(tenant, slot, max(output, length + 1 - self._largest), length + 1))
        else:
            self._leave(tenant, slot)

    def _look_up(self, queries: Queries, found: Found, evidence: npt.NDArray[Any]) -> int:
        return self._steps.lookup(self.arena.arrays, self.rows, self.past, queries, found, evidence)

    def _enlarge(self, key: int, num_tokens: int) -> None:
        """Move a text to a larger range, with room for so many tokens more and a separator."""
        slot, arena = int(self.requests["slot"][key]), self.arena
        automaton = arena.arrays.automata[slot]
        start, length = int(automaton["start"]), int(automaton["length"])
        capacity = 1 << (length + num_tokens + 1).bit_length()
        moved = arena.allocate(capacity)
        if moved == NONE:
            self._leave(self._users.pop(key), slot)
            self.requests["slot"][key] = NONE
            self.num_unindexed += 1
            return
        arena.arrays.text[moved : moved + length] = arena.arrays.text[start : start + length]
        arena.release(start, int(automaton["capacity"]))
        automaton["start"], automaton["capacity"] = moved, capacity

    # ---- tenants ----------------------------------------------------------------------------------------------

    def _tenant(self, name: str | None) -> _Tenant:
        """The partition of this name, a new one unless it is known."""
        tenant = self._tenants.get(name)
        if tenant is None:
            number = self._free_numbers.pop() if self._free_numbers else len(self._tenants)
            past = self.past
            self.past = past._replace(tenants=with_room(past.tenants, number), generations=with_room(past.generations, number))
            self.past.tenants[number] = (0, 0)
            self._tenants[name] = tenant = _Tenant(name, name and name.partition("/")[0], number)
        return tenant

    def _leave(self, tenant: _Tenant, slot: int) -> None:
        """A request or a waiting text ends."""
        self.arena.close(slot)
        tenant.num_users -= 1
        self._drop_unused(tenant)

    def _drop_unused(self, tenant: _Tenant) -> None:
        if not tenant.num_users and not tenant.generations:
            del self._tenants[tenant.name]
            self._free_numbers.append(tenant.number)

    # ---- the index --------------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Tokens that wait for `work`."""
        current = self._current[1].stop - self._current[2] if self._current is not None else 0
        return current + sum(text.stop - text.start for text in self._waiting)

    def work(self, budget_tokens: int) -> None:
        """Index at most ``budget_tokens`` tokens of outputs, oldest request first."""
        num_slices = max(1, budget_tokens // _CLEANED)
        while budget_tokens > 0:
            if self._current is None:
                if not self._waiting:
                    break
                text = self._waiting.popleft()
                room = self._room_for(text.tenant, text.stop - text.start)
                if room is None:
                    self._leave(text.tenant, text.slot)
                    self.num_unindexed += 1
                    continue
                self._current = (room, text, text.start)
            generation, text, start = self._current
            stop = min(text.stop, start + budget_tokens)
            self._steps.fill(self.arena.arrays, generation.slot, text.slot, start, stop)
            before = generation.charge
            generation.num_tokens += stop - start
            self._count(generation.tenant.owner, generation.charge - before)
            self.num_tokens += stop - start
            budget_tokens -= stop - start
            self._current = (generation, text, stop)
            if stop == text.stop:
                self._end_text()
            while self._charge > self.max_tokens:
                self._evict(self._least_wanted())
        self.arena.clean(num_slices)
        key = NONE
        while (key := self._steps.crowded(self.arena.arrays, self.requests, key + 1, SPARE)) != NONE:
            self._enlarge(key, SPARE)

    def _end_text(self) -> None:
        """The current text is indexed, or given up."""
        if self._current is not None:
            self._leave(self._current[1].tenant, self._current[1].slot)
            self._current = None

    def forget(self) -> None:
        """Drop all texts, those of running requests too: the weights changed."""
        while self._waiting:
            text = self._waiting.popleft()
            self._leave(text.tenant, text.slot)
        while self._generations:
            self._evict(next(iter(self._generations.values())))
        requests = self.requests
        for key in np.flatnonzero(requests["live"] & (requests["slot"] != NONE)).tolist():
            requests["output"][key] = self.arena.arrays.automata["length"][requests["slot"][key]]

    def _room_for(self, tenant: _Tenant, num_tokens: int) -> _Generation | None:
        """The tenant's newest generation, or a new one if that has no room for so many tokens; None: the arena has none."""
        capacity = least = min(_SMALLEST, self._largest)
        if tenant.generations:
            newest = tenant.generations[0]
            if newest.num_tokens + num_tokens <= newest.capacity:
                self._generations.move_to_end(newest.serial)
                return newest
            capacity = min(_GROWTH * newest.capacity, self._largest)
        if capacity < num_tokens:
            capacity = min(1 << num_tokens.bit_length(), self._largest)
        if len(tenant.generations) == MAX_GENERATIONS:
            self._evict(tenant.generations[-1])
        while (slot := self.arena.open(1 << (capacity - 1).bit_length(), self.max_match)) == NONE:
            if not self._generations:
                return None
            self._evict(self._least_wanted())
        self._last_serial += 1
        generation = _Generation(tenant, slot, self._last_serial, capacity, least)
        tenant.generations.appendleft(generation)
        self._generations[generation.serial] = generation
        self._count(tenant.owner, generation.charge)
        row = self.past.tenants[tenant.number]
        row["newest"] = (row["newest"] + 1) % MAX_GENERATIONS
        row["num_generations"] += 1
        self.past.generations[tenant.number, row["newest"]] = slot
        return generation

    def _count(self, owner: str | None, num_tokens: int) -> None:
        """So many tokens more are charged to an owner."""
        self._charge += num_tokens
        self._charges[owner] += num_tokens
        if self._charges[owner] > self._quota:
            self._over.add(owner)
        else:
            self._over.discard(owner)
        if not self._charges[owner]:
            del self._charges[owner]

    def _least_wanted(self) -> _Generation:
        """The generation that has waited longest for another text; of owners with more than their quota, if there are any."""
        return next(one for one in self._generations.values() if not self._over or one.tenant.owner in self._over)

    def _evict(self, generation: _Generation) -> None:
        """Give up a generation, the oldest of its tenant's."""
        del self._generations[generation.serial]
        self.num_tokens -= generation.num_tokens
        tenant = generation.tenant
        self._count(tenant.owner, -generation.charge)
        tenant.generations.pop()
        self.past.tenants["num_generations"][tenant.number] -= 1
        self.arena.close(generation.slot)
        if self._current is not None and self._current[0] is generation:
            self._end_text()
        self._drop_unused(tenant)
