"""History retrieval against a scan of the generations that should be there."""

from collections import Counter
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.property.test_retrieval_properties import BOUNDS, STREAMS
from tests.references.automaton import check_automaton, check_history
from tests.references.retrieval import recall
from vllm_double.retrieval import HistoryRetriever, history
from vllm_double.retrieval.history_steps import history_steps
from vllm_double.retrieval.suffix_automaton.arena import Arena
from vllm_double.retrieval.suffix_automaton.automaton_steps import SEPARATOR

TENANTS = st.sampled_from(["a", "b", None])


class Twin:
    """Generations as plain lists; the one that got its latest text first comes first."""

    def __init__(self, max_tokens: int, smallest: int) -> None:
        self.max_tokens = max_tokens
        self.largest = max(2, max_tokens // 4)
        self.smallest = min(smallest, self.largest)
        self.generations: list[tuple[str | None, int, list[int]]] = []
        self.waiting: list[tuple[str | None, list[int]]] = []
        self.current: tuple[list[int], list[int]] | None = None  # a generation, and what of a text is still to come

    def add(self, tenant: str | None, output: list[int]) -> None:
        self.waiting.append((tenant, [*output[-(self.largest - 1) :], SEPARATOR]))

    def work(self, budget_tokens: int) -> None:
        while budget_tokens > 0 and (self.current is not None or self.waiting):
            if self.current is None:
                tenant, text = self.waiting.pop(0)
                self.current = self.room_for(tenant, len(text)), text
            held, rest = self.current
            held += rest[:budget_tokens]
            self.current = (held, rest[budget_tokens:]) if len(rest) > budget_tokens else None
            budget_tokens -= len(rest)
            while sum(self.charges().values()) > self.max_tokens:
                over = {name for name, charge in self.charges().items() if charge > self.max_tokens / 2}
                place = next(i for i, (name, _, _) in enumerate(self.generations) if not over or name in over)
                _, _, dropped = self.generations.pop(place)
                if self.current is not None and self.current[0] is dropped:
                    self.current = None

    def charges(self) -> Counter[str | None]:
        charges: Counter[str | None] = Counter()
        for tenant, _, held in self.generations:
            charges[tenant] += max(len(held), self.smallest)
        return charges

    def room_for(self, tenant: str | None, num_tokens: int) -> list[int]:
        own = [(capacity, held) for name, capacity, held in self.generations if name == tenant]
        if own and len(own[-1][1]) + num_tokens <= own[-1][0]:
            capacity, held = own[-1]
            self.generations = [one for one in self.generations if one[2] is not held]
        else:
            capacity = min(16 * own[-1][0], self.largest) if own else self.smallest
            if capacity < num_tokens:
                capacity = min(1 << num_tokens.bit_length(), self.largest)
            held = []
        self.generations.append((tenant, capacity, held))
        return held

    def of(self, tenant: str | None) -> list[list[int]]:
        return [held for name, _, held in reversed(self.generations) if name == tenant]


@pytest.fixture(autouse=True)
def _small_generations() -> Iterator[None]:
    with mock.patch.object(history, "_SMALLEST", 16):
        yield


@given(st.lists(st.tuples(TENANTS, STREAMS), min_size=1, max_size=8), BOUNDS, st.integers(40, 300), st.data())
@settings(max_examples=300, deadline=None)
def test_a_lookup_equals_a_scan(
    texts: list[tuple[str | None, list[int]]], max_match: int, max_tokens: int, data: st.DataObject
) -> None:
    retriever = HistoryRetriever(max_tokens, max_match, share_unnamed=True)
    twin = Twin(max_tokens, 16)
    running = {tenant: key for key, tenant in enumerate(["a", "b", None])}
    written: dict[str | None, list[int]] = {}
    for tenant, key in running.items():
        prompt = data.draw(st.lists(st.integers(0, 4), max_size=5), "prompt")
        retriever.start(key, np.array(prompt, np.int32), tenant)
        written[tenant] = prompt
    for key, (tenant, output) in enumerate(texts, 10):
        retriever.start(key, np.array([0, 1, 2], np.int32), tenant)
        cut = data.draw(st.integers(0, len(output)), "cut")
        retriever.extend(key, output[:cut])
        retriever.extend(key, output[cut:])
        retriever.stop(key, keep=True)
        if len(output) >= 2:
            twin.add(tenant, output)
        budget = data.draw(st.integers(1, 60), "budget")  # often too small for the text, which then waits beside the next one
        retriever.work(budget)
        twin.work(budget)
        check_history(retriever)
        assert retriever.num_waiting == sum(len(text) for _, text in twin.waiting) + len(
            twin.current[1] if twin.current else []
        )
        for reader, running_key in running.items():
            more = data.draw(st.lists(st.integers(0, 4), max_size=4), "more")
            tail = data.draw(st.lists(st.integers(0, 4), max_size=3), "tail")
            retriever.extend(running_key, more)
            written[reader] += more
            # Contexts begin in the last max_match tokens of the text, all of which are known.
            context = written[reader][-max_match:] + tail
            assert retriever.lookup(running_key, tail, 20) == recall(twin.of(reader), context, 20, max_match)


@given(st.lists(STREAMS, max_size=6), BOUNDS)
@settings(max_examples=300, deadline=None)
def test_the_automaton_of_many_texts_is_that_of_its_definition(texts: list[list[int]], max_match: int) -> None:
    tokens = np.array([token for text in texts for token in (*text, SEPARATOR)], np.int32)
    arena = Arena(1 << 20)
    generation, text = (arena.open(1 << max(1, len(tokens).bit_length()), max_match) for _ in range(2))
    start = arena.arrays.automata["start"][text]
    arena.arrays.text[start : start + len(tokens)] = tokens
    history_steps().fill(arena.arrays, generation, text, 0, len(tokens))
    check_automaton(arena, generation, tokens.tolist())


def _answered(retriever: HistoryRetriever, key: int, tenant: str | None, output: list[int]) -> None:
    retriever.start(key, np.array([1], np.int32), tenant)
    retriever.extend(key, output)
    retriever.stop(key, keep=True)
    retriever.work(1 << 20)


SECRET = list(range(100, 130))


@pytest.mark.parametrize("reader", ["b", None])
def test_a_tenant_is_offered_only_what_it_was_answered(reader: str | None) -> None:
    retriever = HistoryRetriever(4096)
    _answered(retriever, 0, "a", SECRET)
    for tenant, expected in ((reader, None), ("a", SECRET[8:20])):
        retriever.start(1, np.array(SECRET[:4], np.int32), tenant)
        retriever.extend(1, SECRET[4:8])
        found = retriever.lookup(1, (), 12)
        assert (found.tokens if found is not None else None) == expected
        retriever.stop(1, keep=False)


def test_requests_without_a_tenant_share_no_history_unasked() -> None:
    retriever = HistoryRetriever(4096)
    _answered(retriever, 0, None, SECRET)
    assert retriever.num_tokens == 0
    retriever.start(1, np.array(SECRET[:8], np.int32), None)
    assert retriever.lookup(1, (), 4) is None


def test_a_text_that_is_not_to_be_kept_is_not_offered() -> None:
    retriever = HistoryRetriever(4096)
    retriever.start(0, np.array([1], np.int32), "a")
    retriever.extend(0, SECRET)
    retriever.stop(0, keep=False)
    retriever.work(1 << 20)
    assert retriever.num_tokens == 0


def test_forgetting_leaves_nothing_to_read() -> None:
    retriever = HistoryRetriever(4096)
    _answered(retriever, 0, "a", SECRET)
    retriever.start(1, np.array(SECRET[:4], np.int32), "a")
    retriever.extend(1, SECRET[4:8])
    assert retriever.lookup(1, (), 4) is not None
    retriever.start(2, np.array([1], np.int32), "a")
    retriever.extend(2, SECRET)
    retriever.forget()
    check_history(retriever)
    assert retriever.lookup(1, (), 4) is None
    retriever.stop(2, keep=True)
    retriever.work(1 << 20)
    assert retriever.num_tokens == 0, "what was answered before the weights changed was indexed after it"


def test_a_tenant_for_every_request_costs_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_SMALLEST", 256)
    retriever = HistoryRetriever(1 << 14)
    for key in range(300):
        _answered(retriever, key, f"tenant {key}", [7, 8, 9])
        check_history(retriever)
    reserved = len(retriever.arena.arrays.text) - retriever.arena.num_free
    assert reserved <= 2 << 14


def test_older_texts_go_before_a_quiet_tenants() -> None:
    retriever = HistoryRetriever(400)
    _answered(retriever, 0, "quiet", [1, 2, 3, 4, 5])
    for key in range(1, 45):
        tenant, first = ("quiet", 200) if key == 38 else ("busy", 1000 + 10 * key)
        _answered(retriever, key, tenant, list(range(first, first + 9)))
    retriever.start(98, np.array([1010, 1011], np.int32), "busy")
    retriever.start(99, np.array([200, 201, 202], np.int32), "quiet")
    assert retriever.lookup(98, (), 4) is None
    assert retriever.lookup(99, (), 4) is not None


def test_the_oldest_texts_go_first() -> None:
    retriever = HistoryRetriever(64)
    for key in range(30):
        _answered(retriever, key, "a", [1000 + 10 * key + step for step in range(9)])
        check_history(retriever)
    retriever.start(99, np.array([5], np.int32), "a")
    found = [retriever.lookup(99, [1000 + 10 * key], 8) is not None for key in range(30)]
    assert found[-1] and not found[0] and found == sorted(found)


def test_whoever_invents_tenants_takes_no_more_than_a_quota_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_SMALLEST", 16)
    retriever = HistoryRetriever(400, share_unnamed=True)
    known = {"salted/a": 100, "other/a": 200, None: 300}
    for key, (tenant, first) in enumerate(known.items()):
        _answered(retriever, key, tenant, list(range(first, first + 30)))
    for key in range(10, 500):
        _answered(retriever, key, f"/invented {key}", [7, 8, 9])
        check_history(retriever)
    for key, (tenant, first) in enumerate(known.items()):
        retriever.start(key, np.array([first, first + 1], np.int32), tenant)
        assert retriever.lookup(key, (), 4) is not None, tenant


def test_a_tenant_that_is_alone_has_the_whole_history() -> None:
    retriever = HistoryRetriever(400)
    for key in range(60):
        _answered(retriever, key, "a", list(range(1000 + 10 * key, 1009 + 10 * key)))
    assert 300 <= retriever.num_tokens <= 400
