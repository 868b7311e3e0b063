"""The arena of speculation tries against a slow twin of dictionaries, which tries every path."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.references.trie import Edge, PathToken, TwinCalibration, TwinTrie
from vllm_double.prefix_hash import mix, seed
from vllm_double.retrieval.base import Found
from vllm_double.retrieval.bundle import Indexes
from vllm_double.target.batch import Batch, Live, Row
from vllm_double.target.calibration import NUM_BUCKETS, Tables
from vllm_double.target.means import Means
from vllm_double.target.request_table import RequestParams, RequestTable
from vllm_double.target.round_calls import calls
from vllm_double.target.speculation_trie import Search, Tries
from vllm_double.target.stats import Counters
from vllm_double.transport.messages import NODE_DTYPE

K = 6
SESSION = 1
NUM_SOURCES = 3
CONTEXT, DATASTORE = 1, 2


class Arena:
    """The compiled calls, for single requests. ``texts``: by slot."""

    def __init__(self, num_nodes: int = 1 << 10) -> None:
        self.table = RequestTable(K)
        self.table.tries = Tries.empty(64, K, num_nodes, num_nodes)
        self.calls, self.tables, self.search = calls(), Tables.prior(NUM_SOURCES), Search.empty(K)
        self.counters, self.means = Counters(("draft", "context", "datastore")), Means.empty()
        self.live = Live.empty(1, K, 8)
        self.texts: dict[int, list[int]] = {}

    @property
    def counts(self) -> Counters:
        return self.counters

    def admit(self, length: int = 0, temperature: float = 0.0) -> int:
        slot = self.table.add(RequestParams(temperature, 10_000, frozenset()), length)
        request = self.table.tries.requests[slot]
        request["handle"], request["session"] = request["key"], SESSION
        self.texts[slot] = [99] * length
        return slot

    def finish(self, slot: int) -> None:
        self.table.remove(slot)
        del self.texts[slot]

    def root(self, slot: int) -> int:
        return int(self.table.tries.requests["root_hash"][slot])

    def file(self, slot: int, prefix_hash: int, position: int, tokens: list[int], probs: list[float]) -> None:
        nodes = np.zeros(1, NODE_DTYPE)
        nodes["handle"], nodes["prefix_hash"] = self.table.tries.requests["handle"][slot], prefix_hash
        nodes["position"], nodes["count"] = position, len(tokens)
        nodes["tokens"][0, : len(tokens)], nodes["probs"][0, : len(tokens)] = tokens, probs
        self.calls.file_nodes(self.table.tries, self.counters.tally, nodes)

    def _rows(self, slot: int, num_new: int) -> Batch:
        batch = Batch.of([Row("", np.array(self.texts[slot], np.int32), num_new, ())])
        batch.rows.slots[0] = slot
        return batch

    def commit(self, slot: int, *tokens: int) -> None:
        self.texts[slot].extend(tokens)
        rows = self._rows(slot, len(tokens)).rows
        tally = self.counters.tally
        self.calls.commit(self.table.tries, self.tables, tally, self.means, rows, self.live, SESSION, Indexes.empty())

    def best_path(
        self, slot: int, limit: int, found: list[tuple[int, list[int], list[float]]] | None = None, floor: float = 0.0
    ) -> list[PathToken]:
        """found: (source, tokens, beliefs), which are inserted behind the root first."""
        found = found or []
        sources = np.array([source for source, _, _ in found], np.int32)
        shape = (len(found), 1, K)
        answers = Found(np.zeros(shape[:2], np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32))
        for place, (_, tokens, beliefs) in enumerate(found):
            answers.lengths[place, 0] = len(tokens)
            answers.tokens[place, 0, : len(tokens)], answers.beliefs[place, 0, : len(tokens)] = tokens, beliefs
        live = self.live
        live.slots[0], live.rows[0], live.limits[0] = slot, 0, limit
        picked = np.zeros(1, np.int32)
        self.calls.find_paths(
            self.table.tries, self.tables, self.search, self._rows(slot, 0).rows, live, picked, floor, answers, sources
        )
        path = live.paths[0, : live.path_lengths[0]]
        return [PathToken(int(step["token"]), *step[["prob", "source", "accept_prob"]].item()) for step in path]


def hash_of(root: int, path: list[int]) -> int:
    for token in path:
        root = mix(root, token)
    return root


def tokens_of(path: list[PathToken]) -> list[int]:
    return [step.token for step in path]


@pytest.fixture
def arena() -> Arena:
    return Arena()


def test_the_deeper_way_beats_a_likelier_first_token_with_nothing_behind_it(arena: Arena) -> None:
    slot = arena.admit()
    root = arena.root(slot)
    arena.file(slot, root, 0, [1, 2], [0.5, 0.4])
    arena.file(slot, hash_of(root, [2]), 1, [3], [0.9])
    arena.file(slot, hash_of(root, [2, 3]), 2, [4], [0.9])
    assert tokens_of(arena.best_path(slot, K)) == [2, 3, 4]
    assert tokens_of(arena.best_path(slot, 1)) == [1]


def test_records_may_come_in_any_order(arena: Arena) -> None:
    slot = arena.admit()
    root = arena.root(slot)
    arena.file(slot, hash_of(root, [1, 2]), 2, [3], [0.9])
    arena.file(slot, hash_of(root, [1]), 1, [2], [0.9])
    assert arena.best_path(slot, K) == []
    arena.file(slot, root, 0, [1], [0.9])
    assert tokens_of(arena.best_path(slot, K)) == [1, 2, 3]
    arena.table.check_integrity()


def test_a_late_record_for_a_committed_place_is_dropped_and_one_behind_it_is_used(arena: Arena) -> None:
    slot = arena.admit()
    root = arena.root(slot)
    arena.commit(slot, 7)
    arena.file(slot, root, 0, [1], [0.9])
    assert arena.counts.late_nodes == 1 and arena.best_path(slot, K) == []
    arena.file(slot, hash_of(root, [7]), 1, [8], [0.9])
    assert arena.best_path(slot, 3)[0].token == 8
    arena.table.check_integrity()


def test_records_of_an_earlier_admission_and_of_nobody_are_dropped(arena: Arena) -> None:
    slot = arena.admit()
    nodes = np.zeros(3, NODE_DTYPE)
    handle = int(arena.table.tries.requests["handle"][slot])
    nodes["handle"] = [handle - (1 << 20), 1 << 63, (1 << 64) - 1]
    nodes["prefix_hash"], nodes["count"] = arena.root(slot), 1
    arena.calls.file_nodes(arena.table.tries, arena.counters.tally, nodes)
    assert arena.counts.late_nodes == 3 and arena.best_path(slot, K) == []


def test_what_a_worker_lists_outside_the_vocabulary_and_behind_it_is_dropped(arena: Arena) -> None:
    slot = arena.admit()
    arena.table.tries.limits["vocab_size"] = 50
    for token in (-1, 50):
        arena.file(slot, arena.root(slot), 0, [7, token, 8], [0.4, 0.9, 0.9])
        assert tokens_of(arena.best_path(slot, K)) == [7]
        arena.file(slot, arena.root(slot), 0, [token], [0.9])
        assert arena.best_path(slot, K) == []


def test_if_sources_agree_the_better_probability_counts(arena: Arena) -> None:
    slot = arena.admit()
    arena.file(slot, arena.root(slot), 0, [1, 2], [0.3, 0.2])
    path = arena.best_path(slot, K, [(CONTEXT, [1, 5], [0.82, 0.72])])
    assert [(step.token, step.source) for step in path] == [(1, CONTEXT), (5, CONTEXT)]
    assert path[1].accept_prob == pytest.approx(0.825 * 0.725)
    arena.commit(slot, 1)
    trials = arena.tables.trials[:, 0] - 20
    learnt = {(int(s), int(b)): int(trials[s, b]) for s, b in zip(*np.nonzero(trials), strict=True)}
    bucket = int(np.float32(0.2) * NUM_BUCKETS)
    assert learnt == {(0, int(np.float32(0.3) * NUM_BUCKETS)): 1, (0, bucket): 1, (CONTEXT, 16): 1}


def test_of_two_sources_that_agree_the_surer_one_counts(arena: Arena) -> None:
    beliefs = {CONTEXT: 0.8, DATASTORE: 0.2}
    for sources in ((CONTEXT, DATASTORE), (DATASTORE, CONTEXT)):
        slot = arena.admit()
        (step,) = arena.best_path(slot, K, [(source, [1], [beliefs[source]]) for source in sources])
        assert (step.prob, step.source) == (pytest.approx(0.825), CONTEXT)
        arena.table.check_integrity()


class Both:
    """The arena and its twin, told the same."""

    def __init__(self, num_nodes: int = 1 << 10) -> None:
        self.arena = Arena(num_nodes)
        self.calibration = TwinCalibration()
        self.twins: dict[int, TwinTrie] = {}

    def admit(self, length: int, temperature: float) -> None:
        slot = self.arena.admit(length, temperature)
        bucket = int(self.arena.table.tries.requests["temperature"][slot])
        root = seed(int(self.arena.table.tries.requests["key"][slot]))
        self.twins[slot] = TwinTrie(root, length, self.calibration, bucket)

    def file(self, slot: int, path: list[int], offset: int, tokens: list[int], probs: list[float]) -> None:
        """Behind a path from the root, or from before it (offset < 0), where all is late."""
        twin = self.twins[slot]
        where = hash_of(twin.root_hash, path), twin.position + len(path) + offset
        if where[1] >= 0:
            self.arena.file(slot, *where, tokens, probs)
            twin.file(*where, tokens, [float(np.float32(prob)) for prob in probs])

    def best_path(self, slot: int, limit: int, found: list[tuple[int, list[int], list[float]]]) -> None:
        twin = self.twins[slot]
        for source, tokens, beliefs in found:
            path, accept_prob = [], 1.0
            for token, belief in zip(tokens[:limit], beliefs, strict=False):
                belief = float(np.float32(belief))
                prob = self.calibration.prob(source, twin._temperature, belief)
                accept_prob *= prob
                if accept_prob < 0.01:
                    break
                path.append(Edge(token, prob, source, belief))
            twin.insert(twin.root_hash, twin.position, path)
        got, wanted = self.arena.best_path(slot, limit, found), twin.best_path(limit)
        assert [(step.token, step.source) for step in got] == [(step.token, step.source) for step in wanted]
        assert [step.accept_prob for step in got] == pytest.approx([step.accept_prob for step in wanted])

    def commit(self, slot: int, tokens: list[int]) -> None:
        hits = self.arena.counts.hits
        self.arena.commit(slot, *tokens)
        for token in tokens:
            self.twins[slot].commit(token)
        assert self.arena.counts.hits - hits == self.twins[slot].has_hit
        for (source, temperature, bucket), trials in self.calibration.trials.items():
            assert self.arena.tables.trials[source, temperature, bucket] == pytest.approx(trials)
            assert self.arena.tables.hits[source, temperature, bucket] == pytest.approx(
                self.calibration.hits[source, temperature, bucket]
            )

    def check(self) -> None:
        self.arena.table.check_integrity()
        pool = self.arena.table.tries.pool[0]
        num_nodes = sum(twin.num_nodes for twin in self.twins.values())
        assert len(self.arena.table.tries.nodes) - pool["num_free_nodes"] == num_nodes


def distinct(rng: random.Random, most: int) -> list[float]:
    """Falling probabilities of different buckets: of equal ones either way is right."""
    return [(bucket + 0.5) / NUM_BUCKETS for bucket in sorted(rng.sample(range(NUM_BUCKETS), most), reverse=True)]


@settings(deadline=None, max_examples=150)
@given(rng=st.randoms(use_true_random=False), num_steps=st.integers(5, 60))
def test_arena_and_twin_say_the_same_of_several_requests(rng: random.Random, num_steps: int) -> None:
    both = Both()
    for _ in range(num_steps):
        slot = rng.choice(list(both.twins)) if both.twins else None
        action = rng.random()
        if slot is None or (action < 0.1 and len(both.twins) < 4):
            both.admit(rng.randint(0, 3), rng.choice([0.0, 1.0]))
        elif action < 0.55:
            is_late = rng.random() < 0.1
            path = [rng.randint(1, 3) for _ in range(0 if is_late else rng.randint(0, 4))]
            tokens = rng.sample([1, 2, 3], rng.randint(1, 3))
            both.file(slot, path, -rng.randint(1, 3) if is_late else 0, tokens, distinct(rng, len(tokens)))
        elif action < 0.8:
            found = [
                (source, [rng.randint(1, 3) for _ in range(length)], [rng.uniform(0.05, 0.99) for _ in range(length)])
                for source in (CONTEXT, DATASTORE)
                if (length := rng.randint(0, 4))
            ]
            both.best_path(slot, rng.randint(0, 6), found)
        elif action < 0.95:
            both.commit(slot, [rng.randint(1, 3) for _ in range(rng.randint(1, 3))])
        elif action < 0.97:
            both.arena.calls.forget_retrieved(both.arena.table.tries)
            for twin in both.twins.values():
                twin.forget_inserted()
        else:
            both.arena.finish(slot)
            del both.twins[slot]
        both.check()


@pytest.mark.parametrize("number", range(20))
def test_a_full_arena_drops_the_nodes_furthest_behind_their_roots_and_counts_them(number: int) -> None:
    rng, arena = random.Random(number), Arena(num_nodes=32)
    slots = [arena.admit() for _ in range(3)]
    for _ in range(60):
        slot = rng.choice(slots)
        path = [rng.randint(1, 9) for _ in range(rng.randint(0, 5))]
        arena.file(slot, hash_of(arena.root(slot), path), len(path), [1, 2], [0.6, 0.3])
        if rng.random() < 0.3:
            arena.best_path(slot, 4, [(CONTEXT, [rng.randint(1, 9) for _ in range(4)], [0.9] * 4)])
        arena.table.check_integrity()
    depths = np.zeros(6, int)
    for slot in slots:
        for place in range(6):
            node = arena.table.tries.at_position[slot, place]
            while node != -1:
                depths[place] += 1
                node = arena.table.tries.nodes["next_at_position"][node]
    assert arena.table.tries.pool["nodes_evicted"][0] > 0
    assert depths[0] > 0, "what is verified next is the last to go"


def test_slots_are_used_again_and_the_table_grows(arena: Arena) -> None:
    slots = [arena.admit() for _ in range(100)]
    assert len(set(slots)) == 100
    for slot in slots[::2]:
        arena.finish(slot)
    arena.table.check_integrity()
    assert {arena.admit() for _ in range(50)} == set(slots[::2])
    assert len(arena.table.tries.requests) == 128
    arena.table.check_integrity()


def test_stop_tokens_of_very_many_different_requests_find_room() -> None:
    table = RequestTable(K)
    rng = random.Random(0)
    slots: list[int] = []
    for number in range(300):
        stops = frozenset(rng.sample(range(5000), rng.choice([1, 3, 400])))
        slots.append(table.add(RequestParams(0.0, 100, stops), 1))
        if number % 3:
            table.remove(slots.pop(rng.randrange(len(slots))))
        if number % 20 == 0:
            table.check_integrity()
    assert len(table.tries.stops) < 1 << 17


@settings(deadline=None, max_examples=150)
@given(rng=st.randoms(use_true_random=False), room=st.integers(0, 6))
def test_best_path_is_worth_as_much_as_the_best_of_all_paths_between_rivals(rng: random.Random, room: int) -> None:
    both = Both()
    both.admit(0, 0.0)
    (slot,) = both.twins
    world: dict[tuple[int, ...], list[tuple[int, float]]] = {}
    _grow(rng, (), world, 4)
    nodes = list(world.items())
    rng.shuffle(nodes)
    for path, children in nodes:
        both.file(slot, list(path), 0, [token for token, _ in children], [p for _, p in children])
    both.check()
    got, wanted = both.arena.best_path(slot, room), both.twins[slot].best_path(room)
    assert len(got) <= room
    assert sum(step.accept_prob for step in got) == pytest.approx(sum(step.accept_prob for step in wanted))
    for token in tokens_of(got)[:2]:
        both.commit(slot, [token])
        both.check()


def _grow(rng: random.Random, path: tuple[int, ...], world: dict[tuple[int, ...], list[tuple[int, float]]], left: int) -> None:
    if left == 0 or (path and rng.random() < 0.4):
        return
    probs = sorted((rng.uniform(0.05, 0.9) for _ in range(rng.randint(1, 3))), reverse=True)
    world[path] = [(10 * len(path) + index, p) for index, p in enumerate(probs)]
    for token, _ in world[path]:
        _grow(rng, (*path, token), world, left - 1)
