"""When the target waits for the draft, and for how long: the rule by itself, and in the round."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.engine import FakeEngine, hashed_logits
from vllm_double.draft.frontier import FrontierLimits
from vllm_double.draft.worker import DraftWorker
from vllm_double.planning.script import Script, Times
from vllm_double.planning.world import simulate
from vllm_double.target.batch import Live
from vllm_double.target.means import Means, observe
from vllm_double.target.proposer import Proposer, RequestParams, Row
from vllm_double.target.round_calls import calls
from vllm_double.target.speculation_trie import Tries
from vllm_double.transport.inprocess import in_process_pair

VOCAB, STEP_S, TARGET_S = 24, 0.001, 0.016


class Rule:
    """The compiled rule for live rows of which each is told by its path's accept probability (0.0: it has no path), and by how
    often the draft's next token is accepted there."""

    def __init__(self, step_s: float = STEP_S) -> None:
        self.means, self.step_s = Means.empty(), step_s
        self.calls = calls()

    def _world(self, rows: Sequence[tuple[float, float]], tokens_per_s: float, price: float) -> tuple[Any, ...]:
        num = len(rows)
        tries, live = Tries.empty(max(num, 1), 4, 64, 64), Live.empty(max(num, 1), 4, 1)
        live.summary[0] = num
        for one, (accept_prob, acceptance) in enumerate(rows):
            request = tries.requests[one]
            request["session"], request["has_drafted"], request["temperature"] = 7, True, one
            live.slots[one], live.limits[one], live.path_lengths[one] = one, 4, accept_prob > 0.0
            live.paths["accept_prob"][one, 0] = accept_prob
            for sums in (self.means.accepted, self.means.accepted_after_miss):
                sums[one] = acceptance * 1e9, 1e9
        # One token a step, whose time is such that so many are decoded in a second, and one more costs so many of them.
        per_token = price / tokens_per_s
        return tries, live, max(num, 1) / tokens_per_s - per_token * num, per_token

    def awaited(self, *rows: tuple[float, float], tokens_per_s: float, price: float = 0.0) -> list[int]:
        tries, live, fixed, per_token = self._world(rows, tokens_per_s, price)
        chosen = np.zeros(max(len(rows), 1), np.int32)
        num = self.calls.choose_awaited(tries, live, self.means, 7, self.step_s, fixed, per_token, chosen)
        return chosen[:num].tolist()

    def next_worth(self, *rows: tuple[float, float], price: float = 0.0) -> float:
        tries, live, *_ = self._world(rows, 100.0, price)
        return self.calls.next_worth(tries, live, self.means, np.arange(len(rows), dtype=np.int32), price)

    def pays(self, *rows: tuple[float, float], tokens_per_s: float, price: float = 0.0) -> bool:
        return bool(self.awaited(*rows, tokens_per_s=tokens_per_s, price=price))


def missed(acceptance: float) -> tuple[float, float]:
    """A row for which nothing was prepared."""
    return 0.0, acceptance


def after_path(accept_prob: float, acceptance: float = 0.7) -> tuple[float, float]:
    """A row with something to verify."""
    return accept_prob, acceptance


def test_it_waits_if_the_draft_is_quick_and_often_right() -> None:
    assert Rule().awaited(missed(0.7), tokens_per_s=100.0) == [0]
    assert not Rule().pays(missed(0.1), tokens_per_s=1000.0)
    assert not Rule(step_s=0.02).pays(missed(0.7), tokens_per_s=100.0)


def test_what_is_believed_of_the_draft_is_learnt_by_temperature_and_apart_for_misses() -> None:
    rule = Rule()
    tries, live, *_ = rule._world([missed(0.5), missed(0.5), after_path(1.0)], 100.0, 0.0)
    for name in ("accepted", "accepted_after_miss"):
        getattr(rule.means, name)[:] = 0.0, 0.0
    rule.means.accepted[1], rule.means.accepted_after_miss[1] = (8.0, 8.0), (0.0, 8.0)
    worths = [rule.calls.next_worth(tries, live, rule.means, np.array([one], np.int32), 0.0) for one in range(3)]
    # A guess of 0.5 that counts 8 times; then 8 of 8, so 0.75; after misses 0 of 8 beside that guess.
    assert worths == pytest.approx([0.5, 0.375, 0.5])


def test_it_waits_for_nobody_of_whom_nothing_is_known() -> None:
    assert not Rule(step_s=0.0).pays(missed(0.9), tokens_per_s=1.0)
    assert not Rule().pays(tokens_per_s=1.0)


@pytest.mark.parametrize(
    "change", [{"session": 0}, {"session": 8}, {"has_drafted": False}, {"pause": 3}, {"chain": 4}], ids=str
)
def test_it_waits_for_nobody_who_cannot_draft(change: dict[str, int]) -> None:
    rule = Rule()
    tries, live, fixed, per_token = rule._world([missed(0.9)], 100.0, 0.0)
    for name, number in change.items():
        if name == "chain":
            live.path_lengths[0], live.paths["accept_prob"][0] = number, 1.0  # as long as it may be
        else:
            tries.requests[name][0] = number
    chosen = np.zeros(1, np.int32)
    assert rule.calls.choose_awaited(tries, live, rule.means, 7, STEP_S, fixed, per_token, chosen) == 0


def test_what_a_token_costs_to_verify_is_taken_off_what_it_brings() -> None:
    assert Rule().pays(missed(0.5), tokens_per_s=100.0, price=0.1)
    assert not Rule().pays(missed(0.5), tokens_per_s=100.0, price=0.45)


def test_the_next_token_is_worth_what_it_brings_to_all_rows() -> None:
    assert Rule().next_worth(missed(0.2)) == pytest.approx(0.2)
    assert Rule().next_worth(missed(0.2), after_path(0.5, 0.5), price=0.1) == pytest.approx(0.1 + 0.15)
    assert Rule().next_worth(missed(0.09), price=0.1) == 0.0


def test_a_forward_that_verifies_nothing_is_preferred_if_the_next_outcome_is_then_prepared() -> None:
    rule = Rule()
    assert rule.pays(missed(0.5), tokens_per_s=150.0)
    for _ in range(200):
        observe(rule.means.hits_after_nothing, 1.0)
        observe(rule.means.hits_after_wait, 0.0)
        observe(rule.means.hits_after_chain, 0.0)
        observe(rule.means.tokens_of_hit, 4.0)
    assert not rule.pays(missed(0.5), tokens_per_s=150.0)


def test_it_waits_behind_a_short_path_too_while_the_path_is_likely() -> None:
    rule = Rule()
    assert rule.pays(after_path(0.9), tokens_per_s=100.0)
    assert not rule.pays(after_path(0.1), tokens_per_s=100.0)
    # Behind a path nothing is lost that a forward without one would have prepared.
    for _ in range(200):
        observe(rule.means.hits_after_nothing, 1.0)
        observe(rule.means.hits_after_chain, 0.0)
        observe(rule.means.tokens_of_hit, 4.0)
    assert rule.pays(after_path(0.9), tokens_per_s=100.0) and not rule.pays(missed(0.63), tokens_per_s=100.0)


def test_a_token_that_is_not_worth_its_verification_is_not_waited_for() -> None:
    assert Rule().awaited(after_path(0.9), after_path(0.2), tokens_per_s=100.0, price=0.2) == [0]


def test_waits_that_took_long_are_forgotten_in_time() -> None:
    rule = Rule()
    for _ in range(200):
        observe(rule.means.first_s, 0.05)
    assert not rule.pays(missed(0.5), tokens_per_s=100.0)
    rounds = next(n for n in itertools.count(1) if rule.pays(missed(0.5), tokens_per_s=100.0))
    assert 10 < rounds < 1000


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.05, 0.5, 0.95]), st.floats(0.01, 0.99)), max_size=4),
    st.floats(10, 2000), st.floats(0, 0.5), st.floats(1e-4, 0.02),
    st.lists(st.floats(0, 1), min_size=3, max_size=3), st.floats(1, 6),
)  # fmt: skip
def test_the_rule_is_that_of_its_twin(
    rows: list[tuple[float, float]], tokens_per_s: float, price: float, step_s: float, hits: list[float], tokens: float
) -> None:
    """Written as it is explained, with a list in the place of a sum."""
    rule = Rule(step_s)
    for sums, number in zip((rule.means.hits_after_nothing, rule.means.hits_after_chain), hits, strict=False):
        sums[0] = number * 1e9, 1e9
    rule.means.hits_after_wait[0], rule.means.tokens_of_hit[0] = (hits[2] * 1e9, 1e9), (tokens * 1e9, 1e9)
    nexts = [(path or 1.0) * acceptance for path, acceptance in rows]
    worthy = [one for one in range(len(rows)) if nexts[one] > price]
    gains = [
        sum(max(nexts[one] * rows[one][1] ** step - price, 0.0) for one in worthy)
        - tokens_per_s * step_s * (1.5 if step == 0 else 1)
        for step in range(8)
    ]
    ends = next((step for step in range(8) if gains[step] + (0.5 if step == 0 else 0) * tokens_per_s * step_s <= 0), 7)
    best = max(0.0, *itertools.accumulate(gains[: ends + 1]))
    num_missed = sum(rows[one][0] == 0.0 for one in worthy)
    charge = max(hits[0] - hits[2], 0.0) * max((tokens - 1) * num_missed - best, 0.0)
    if abs(best - charge) > 1e-6 and all(abs(one - price) > 1e-6 for one in nexts):
        assert rule.awaited(*rows, tokens_per_s=tokens_per_s, price=price) == (worthy if best > charge else [])


def always_right(means: Means) -> None:
    """As the commit notes if the draft's first tokens behind misses were the target's."""
    for _ in range(100):
        observe(means.accepted[:1], 1.0)
        observe(means.accepted_after_miss[:1], 1.0)


class World:
    """A target of 16 ms steps, a draft of 1 ms, and a clock that only they move; the draft is right, or wrong on purpose."""

    def __init__(self, may_wait: bool = True, prepares: bool = False) -> None:
        self.now = 0.0
        self.target_end, self.worker_end = in_process_pair(capacity=1 << 20)
        self.model = hashed_logits(VOCAB, seed=1, spread=6.0)
        engine = FakeEngine(self.model, vocab_size=VOCAB, num_pages=600, page_size=4, max_length=400)
        self.worker = DraftWorker(engine, self.worker_end, FrontierLimits(8), lambda: self.now)
        self.proposer = Proposer(8, self.target_end, [], lambda: self.now, may_wait=may_wait)
        self.proposer.step_cost.observe(1, TARGET_S)
        self.prepares, self.turns_while_waiting = prepares, True
        self.texts: dict[str, list[int]] = {}
        self.longest_round = 0.0
        self.naps = 0

    def admit(self, name: str, temperature: float = 0.0) -> None:
        self.texts[name] = [len(self.texts) + 1, 5]
        params = RequestParams(temperature, 300, frozenset())
        self.proposer.admit(name, np.array(self.texts[name], np.int32), params)

    def nap(self) -> None:
        self.naps += 1
        self.now += STEP_S / 10
        if self.turns_while_waiting and self.naps % 10 == 0:
            self.turn()

    def turn(self) -> None:
        self.worker.turn()
        self.worker._step_seconds = STEP_S

    def step(self, turns: int = 3, drafted: Callable[[list[int]], int] | None = None) -> dict[str, list[int]]:
        """A forward that goes where nobody prepared for (unless ``prepares``), and the round behind it."""
        for _ in range(turns):
            self.turn()
        self.now += TARGET_S
        rows = []
        for name, text in self.texts.items():
            best = int(np.argmax(self.model(text)))
            text.append(best if self.prepares else int(np.argmin(self.model(text))))
            rows.append(Row(name, np.array(text, np.int32), 1, []))
        began = self.now
        chains = self.proposer.propose(rows, self.nap)
        self.longest_round = max(self.longest_round, self.now - began)
        return dict(zip(self.texts, chains, strict=True))


def warm(world: World, names: Sequence[str] = ("a",)) -> None:
    """The worker has drafted for all, has reported, and was right."""
    for name in names:
        world.admit(name)
    world.prepares = True
    for _ in range(30):
        world.worker._last_report = float("-inf")
        world.step()
    world.prepares = False
    always_right(world.proposer.waiting.means)


def test_after_an_outcome_that_was_not_prepared_the_target_waits_for_the_drafts_tokens() -> None:
    world = World()
    warm(world)
    waits = world.proposer.counters.waits
    chains = world.step()
    counters = world.proposer.counters
    assert counters.waits == waits + 1 and counters.waits_missed == 0
    assert len(chains["a"]) >= 1 and chains["a"][0] == int(np.argmax(world.model(world.texts["a"])))
    assert counters.wait_seconds > 0


def test_a_target_that_may_not_wait_goes_on_at_once() -> None:
    world = World(may_wait=False)
    warm(world)
    assert world.step() == {"a": []} and world.naps == 0 and world.proposer.counters.waits == 0


def test_what_was_prepared_is_not_waited_for() -> None:
    world = World()
    warm(world)
    world.prepares, waits = True, world.proposer.counters.waits
    world.step(turns=8)
    assert world.proposer.counters.waits == waits


def test_a_worker_that_has_stopped_is_waited_for_once_and_no_longer_than_two_of_its_steps() -> None:
    world = World()
    warm(world)
    world.turns_while_waiting = False
    waits, missed = world.proposer.counters.waits, world.proposer.counters.waits_missed
    world.longest_round = 0.0
    for _ in range(5):
        assert world.step(turns=0) == {"a": []}
    counters = world.proposer.counters
    assert (counters.waits - waits, counters.waits_missed - missed) == (1, 1)
    assert world.longest_round <= 2 * STEP_S
    world.turns_while_waiting = True
    world.step()
    assert counters.waits == waits + 2, "it is waited for again when it draws breath"


def test_a_worker_that_reads_a_prompt_is_not_waited_for() -> None:
    world = World()
    warm(world)
    waits = world.proposer.counters.waits
    world.proposer.admit("new", np.arange(20, dtype=np.int32), RequestParams(0.0, 300, frozenset()))
    world.step(turns=0)
    assert world.proposer.counters.waits == waits


def test_all_rows_that_have_nothing_share_one_wait() -> None:
    world = World()
    warm(world, ("a", "b"))
    waits = world.proposer.counters.waits
    chains = world.step()
    assert world.proposer.counters.waits == waits + 1
    assert all(chains.values())


@pytest.mark.parametrize(("cost_ratio", "gains"), [(4, 0.98), (16, 1.04), (64, 1.04)])
def test_waiting_makes_the_scripted_world_faster_and_never_much_slower(cost_ratio: int, gains: float) -> None:
    times = Times(cost_ratio * 1e-3, 1e-3, cost_ratio * 3e-5, 5e-5, 1e-3)
    waiting, not_waiting = (simulate(Script(0.65), times, num_tokens=300, may_wait=wait) for wait in (True, False))
    assert waiting.speedup >= gains * not_waiting.speedup
    assert not_waiting.waits == 0
