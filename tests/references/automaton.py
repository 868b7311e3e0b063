"""Whether the arena's arrays are those of the texts: by definition, slowly."""

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_double.retrieval import ContextRetriever, HistoryRetriever
from vllm_double.retrieval.suffix_automaton.arena import NONE, Arena
from vllm_double.retrieval.suffix_automaton.automaton_steps import ROOT, SEPARATOR

__all__ = ["check_automaton", "check_context", "check_history", "owned"]


def owned(arena: Arena, slot: int) -> tuple[Any, npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[np.int32], list[int]]:
    """Header, states, transitions and table of an automaton, and the text of its range."""
    automaton, arrays = arena.arrays.automata[slot], arena.arrays
    start, stop = int(automaton["start"]), int(automaton["start"] + automaton["capacity"])
    double = slice(2 * start, 2 * stop)
    return automaton, arrays.states[double], arrays.edges[start:stop], arrays.table[double], arrays.text[start:stop].tolist()


def check_automaton(arena: Arena, slot: int, tokens: list[int]) -> None:
    """Raise AssertionError unless the automaton is that of a text. O(n * max_match)."""
    automaton, all_states, _, _, _ = owned(arena, slot)
    depth, num_tokens, num_states = int(automaton["max_match"]) + 1, int(automaton["num_tokens"]), int(automaton["num_states"])
    states = all_states[:num_states]
    text = np.array(tokens, np.int32)
    assert num_tokens == len(text) <= automaton["capacity"]
    assert num_states <= max(2 * num_tokens, 1)
    moves = _transitions(arena, slot)
    separators = np.flatnonzero(text == SEPARATOR)
    bounds = [0, *(separators + 1).tolist()]
    bounds += [num_tokens] if bounds[-1] < num_tokens else []
    longest, shortest = [0] * num_states, [depth] * num_states
    shortest[ROOT] = 0
    counts, ends = [0] * num_states, [0] * num_states
    for begin, stop in itertools.pairwise(bounds):
        for start in range(begin, stop):
            state = ROOT
            for length, token in enumerate(text[start : min(start + depth, stop)].tolist(), 1):
                state = moves[state][token]
                longest[state] = max(longest[state], length)
                shortest[state] = min(shortest[state], length)
        for end in range(begin + 1, stop + 1):
            state = ROOT
            for token in text[max(begin, end - depth) : end].tolist():
                state = moves[state][token]
            while state != ROOT:
                counts[state] += 1
                ends[state] = end
                state = int(states[state]["link"])
    for state, row in enumerate(states[1:], 1):
        assert row["count"] == counts[state] > 0, "an occurrence is not counted"
        assert row["end"] == ends[state], "end is the last occurrence"
        assert row["length"] == longest[state], "length is that of the longest substring"
        assert longest[row["link"]] + 1 == shortest[state], "the link leads to the next shorter substrings"
        assert all(states[target]["token"] == token for token, target in moves[state].items())
        if shortest[state] == depth:
            continue  # too long for a context: what it leads to is neither kept up to date nor read
        followers = sum(counts[target] for target in moves[state].values())
        expected = 0 if row["token"] == SEPARATOR else counts[state] - (ends[state] == num_tokens)
        assert followers == expected, "a transition is missing"
        best = max(moves[state].values(), key=lambda target: (counts[target], ends[target]), default=NONE)
        assert row["best"] == best, "best is the most frequent, then the latest"
    length = int(automaton["window_length"])
    since_separator = num_tokens - (int(separators[-1]) + 1 if len(separators) else 0)
    assert length == min(since_separator, depth - 1)
    state = ROOT
    for token in text[num_tokens - length :].tolist():
        state = moves[state][token]
    assert automaton["window"] == state, "the window is the state of the last tokens"


def _transitions(arena: Arena, slot: int) -> list[dict[int, int]]:
    """For each state the target of each token."""
    automaton, states, edges, table, _ = owned(arena, slot)
    num_edges = int(automaton["num_edges"])
    assert num_edges <= max(int(automaton["num_tokens"]) - 1, 0), "more transitions than there is room for"
    moves: list[dict[int, int]] = []
    found = 0
    for first, edge in states[: automaton["num_states"]][["first", "edges"]].tolist():
        state = len(moves)
        moves.append({} if first == NONE else {int(states[first]["token"]): first})
        while edge != NONE:
            source, token, target, following = edges[edge].tolist()
            assert source == state
            assert token not in moves[state], "two transitions for one token"
            moves[state][token] = target
            edge = following
            found += 1
    assert found == num_edges == np.count_nonzero(table)
    return moves


def check_arena(arena: Arena, slots: list[int]) -> None:
    """Raise AssertionError unless these automata and what is free make up the arena, and what is free is zero."""
    assert len(set(slots)) == len(slots)
    ranges = [(int(arena.arrays.automata["start"][slot]), int(arena.arrays.automata["capacity"][slot])) for slot in slots]
    grown = [slot for slot in slots if arena.arrays.automata["grown_capacity"][slot]]
    ranges += [tuple(arena.arrays.automata[["grown_start", "grown_capacity"]][slot].tolist()) for slot in grown]
    free = [(start, capacity) for capacity, starts in arena._free.items() for start in starts]
    ranges += [(start, capacity) for start, _, capacity in arena._released] + free
    ranges.sort()
    assert all(start % capacity == 0 for start, capacity in ranges)
    assert [start + capacity for start, capacity in ranges] == [*(start for start, _ in ranges[1:]), len(arena.arrays.text)]
    for start, capacity in free:
        if capacity < 1 << 16:
            assert not arena.arrays.table[2 * start : 2 * (start + capacity)].any(), "a free part of the table is not zero"


def check_context(retriever: ContextRetriever, others: list[int] | None = None) -> None:
    """Raise AssertionError if queue, texts and automata contradict each other; others: automata that have another owner."""
    automata, requests = retriever.arrays.automata, retriever.requests
    live = np.flatnonzero(requests["live"] & (requests["slot"] != NONE)).tolist()
    queued, key = [], int(retriever.queues["first"][0])
    while key != NONE:
        queued.append(key)
        key = int(requests["next"][key])
    assert len(set(queued)) == len(queued) and set(queued) == set(np.flatnonzero(requests["is_queued"]).tolist())
    slots = {key: int(requests["slot"][key]) for key in live}
    waiting = {key for key, slot in slots.items() if automata["num_tokens"][slot] < automata["length"][slot]}
    moving = {key for key, slot in slots.items() if automata["grown_capacity"][slot]}
    assert waiting | moving <= set(queued), "the queue holds all requests with waiting tokens"
    for key, slot in slots.items():
        text = retriever.text(key).tolist()
        assert len(text) == automata["length"][slot]
        check_automaton(retriever.arena, slot, text[: int(automata["num_tokens"][slot])])
    check_arena(retriever.arena, [*slots.values(), *(others or [])])


def check_history(retriever: HistoryRetriever, others: list[int] | None = None) -> None:
    """Raise AssertionError if generations, tenants and counts contradict each other, or the arena holds more than these."""
    tenants = list(retriever._tenants.values())
    held = [generation for tenant in tenants for generation in tenant.generations]
    assert {id(g) for g in held} == {id(g) for g in retriever._generations.values()}
    assert retriever.num_tokens == sum(generation.num_tokens for generation in held)
    assert retriever._charge == sum(generation.charge for generation in held) <= retriever.max_tokens
    numbers = [tenant.number for tenant in tenants]
    assert sorted(numbers + retriever._free_numbers) == list(range(len(numbers) + len(retriever._free_numbers)))
    past, requests, automata = retriever.past, retriever.requests, retriever.arena.arrays.automata
    for tenant in tenants:
        serials = [generation.serial for generation in tenant.generations]
        assert (serials or tenant.num_users) and serials == sorted(serials, reverse=True)
        assert serials == [serial for serial in reversed(retriever._generations) if serial in serials], "order of eviction"
        assert all(generation.tenant is tenant for generation in tenant.generations)
        newest, num_generations = past.tenants[tenant.number].tolist()
        rows = np.roll(past.generations[tenant.number][::-1], newest + 1)[:num_generations]
        assert rows.tolist() == [generation.slot for generation in tenant.generations]
        assert [int(automata["num_tokens"][g.slot]) for g in tenant.generations] == [g.num_tokens for g in tenant.generations]
    waiting = [text.slot for text in retriever._waiting]
    waiting += [retriever._current[1].slot] if retriever._current else []
    live = requests["slot"][requests["live"] & (requests["slot"] != NONE)].tolist()
    assert sum(tenant.num_users for tenant in tenants) == len(waiting) + len(live)
    check_arena(retriever.arena, [generation.slot for generation in held] + waiting + live + (others or []))
