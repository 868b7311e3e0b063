"""The speculation trie against a slow twin that enumerates every path."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_double.prefix_hash import mix, seed
from vllm_double.target.calibration import NUM_BUCKETS
from vllm_double.target.speculation_trie import Edge, SpeculationTrie

# A fine line: what the source says is what the target does, up to the width of a bucket.
CURVE = [(bucket + 0.5) / NUM_BUCKETS for bucket in range(NUM_BUCKETS + 1)]


def chance(raw: float) -> float:
    return CURVE[int(raw * NUM_BUCKETS)]


def trie(position: int = 0) -> SpeculationTrie:
    return SpeculationTrie(seed(1), position, CURVE)


def hash_of(path: list[int]) -> int:
    value = seed(1)
    for token in path:
        value = mix(value, token)
    return value


def test_the_deeper_way_beats_a_likelier_first_token_with_nothing_behind_it() -> None:
    t = trie()
    t.insert(seed(1), 0, [1, 2], [0.5, 0.4])
    t.insert(hash_of([2]), 1, [3], [0.9])
    t.insert(hash_of([2, 3]), 2, [4], [0.9])
    assert [step.token for step in t.best_path(8)] == [2, 3, 4]
    assert [step.token for step in t.best_path(1)] == [1]


def test_records_may_come_in_any_order() -> None:
    t = trie()
    t.insert(hash_of([1, 2]), 2, [3], [0.9])
    t.insert(hash_of([1]), 1, [2], [0.9])
    assert t.best_path(8) == []
    t.insert(seed(1), 0, [1], [0.9])
    assert [step.token for step in t.best_path(8)] == [1, 2, 3]
    t.check_integrity()


def test_a_late_record_for_a_committed_place_is_dropped_and_one_behind_it_is_used() -> None:
    t = trie()
    t.commit(7)
    t.insert(seed(1), 0, [1], [0.9])
    assert len(t) == 0
    t.insert(hash_of([7]), 1, [8], [0.9])
    assert t.has_hit and t.best_path(3)[0].token == 8


def test_where_sources_agree_the_better_chance_counts() -> None:
    t = trie()
    t.insert(seed(1), 0, [1, 2], [0.3, 0.2])
    t.graft(seed(1), 0, [Edge(1, 0.8, "context", 0.8), Edge(5, 0.7, "context", 0.7)])
    path = t.best_path(8)
    assert [(step.token, step.source) for step in path] == [(1, "context"), (5, "context")]
    assert path[1].reach == pytest.approx(0.56)
    assert t.examples() == [("draft", 0.3, 1), ("draft", 0.2, 2), ("context", 0.8, 1)]


def test_of_two_sources_that_agree_the_weaker_counts() -> None:
    for sources in (("context", "datastore"), ("datastore", "context")):
        t = trie()
        for source in sources:
            t.graft(seed(1), 0, [Edge(1, 0.8 if source == "context" else 0.2, source, 0.5)])
        (step,) = t.best_path(8)
        assert (step.prob, step.source) == (0.8, "context")
        assert t.examples() == [(source, 0.5, 1) for source in sources]
        t.check_integrity()


@settings(deadline=None, max_examples=150)
@given(rng=st.randoms(use_true_random=False), room=st.integers(0, 6))
def test_best_path_is_worth_as_much_as_the_best_of_all_paths_between_rivals(rng: random.Random, room: int) -> None:
    t = trie()
    world: dict[tuple[int, ...], list[tuple[int, float]]] = {}
    _grow(rng, (), world, 4)
    nodes = list(world.items())
    rng.shuffle(nodes)
    for path, children in nodes:
        t.insert(hash_of(list(path)), len(path), [token for token, _ in children], [p for _, p in children])
    t.check_integrity()

    def best(path: tuple[int, ...], left: int) -> float:
        children = world.get(path, [])
        if left == 0 or not children:
            return 0.0
        ways = [(chance(p), token) for token, p in children]
        floor = 0.3 * ways[0][0]
        return max(p * (1 + best((*path, token), left - 1)) for p, token in ways[:3] if p >= floor)

    found = t.best_path(room)
    assert len(found) <= room
    assert sum(step.reach for step in found) == pytest.approx(best((), room))
    for token in [step.token for step in found][:2]:
        t.commit(token)
        t.check_integrity()


def _grow(
    rng: random.Random,
    path: tuple[int, ...],
    world: dict[tuple[int, ...], list[tuple[int, float]]],
    left: int,
) -> None:
    if left == 0 or (path and rng.random() < 0.4):
        return
    probs = sorted((rng.uniform(0.05, 0.9) for _ in range(rng.randint(1, 3))), reverse=True)
    world[path] = [(10 * len(path) + index, p) for index, p in enumerate(probs)]
    for token, _ in world[path]:
        _grow(rng, (*path, token), world, left - 1)
