"""The switch and the circuit breaker around the round, in the same world as the round's own tests."""

import logging
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.references.automaton import check_context
from tests.unit.test_proposer import PARAMS, VOCAB, Ticks, World
from vllm_double.operations.circuit_breaker import CircuitBreaker
from vllm_double.retrieval import ContextRetriever, HistoryRetriever
from vllm_double.retrieval.base import Source
from vllm_double.target import draft_health
from vllm_double.target import guarded_proposer as guard
from vllm_double.target.batch import Batch, Row
from vllm_double.target.draft_health import DraftHealth
from vllm_double.target.guarded_proposer import GuardedProposer
from vllm_double.target.proposer import Proposer, RequestParams
from vllm_double.target.stats import Counters

FIRST_S, MOST_S = 1.0, 8.0


class Guarded(World):
    """World whose proposer is guarded. ``now``: the breaker's clock."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.now = 0.0
        self.inner: Proposer
        self.protect(self.proposer)

    def protect(self, proposer: Proposer) -> None:
        self.inner = proposer
        self.guarded = GuardedProposer(proposer, CircuitBreaker(lambda: self.now, FIRST_S, MOST_S))
        self.proposer = self.guarded  # type: ignore[assignment]

    def switch(self, enabled: bool) -> None:
        self.guarded.switch(enabled, "somebody", "")

    def index(self) -> None:
        while self.guarded.index():
            pass

    def run(self, rounds: int) -> None:
        for _ in range(rounds):
            self.step()

    def accepted(self, source: str = "draft") -> int:
        return self.guarded.counters.accepted.get(source, 0)

    def check_texts(self, prompts: dict[str, list[int]]) -> None:
        for name, prompt in prompts.items():
            assert self.texts[name] == self.greedy(prompt, len(self.texts[name]))


def failing(times: int = 1) -> Callable[..., Any]:
    """Raises so many times when called, then returns no chains."""
    left = [times]

    def propose(batch: Batch, *_: Any) -> list[list[int]]:
        if left[0]:
            left[0] -= 1
            raise RuntimeError("something of ours")
        return [[] for _ in batch.request_ids]

    return propose


def periodic(world: World, period: list[int]) -> None:
    world.target = lambda context: np.eye(VOCAB)[period[(period.index(context[-1]) + 1) % len(period)]]


# ---- the switch -------------------------------------------------------------------------------------------------


def test_switched_off_the_worker_holds_no_requests_and_is_sent_nothing() -> None:
    world = Guarded()
    prompts = {f"r{index}": [index + 1, 5] for index in range(3)}
    for name, prompt in prompts.items():
        world.admit(name, prompt)
    world.run(4)
    assert any(world.chains.values()) and len(world.worker.frontier) == 3
    world.switch(False)
    world.step()
    assert not any(world.chains.values())
    world.worker.turn()
    assert len(world.worker.frontier) == 0 and world.worker.frontier._pool.num_free == 599
    sent = world.target_end._commands._head
    world.admit("new", [9, 5])
    world.run(3)
    world.guarded.finish("new")
    assert world.target_end._commands._head == sent and not any(world.chains.values())
    world.check_texts(prompts)


def test_switched_on_again_requests_in_flight_get_drafts() -> None:
    world = Guarded()
    world.admit("r", [1, 5])
    world.run(4)
    world.switch(False)
    world.run(4)
    world.admit("came while it was off", [2, 5])
    world.run(2)
    accepted = world.accepted()
    world.switch(True)
    world.run(8)
    assert world.accepted() > accepted and len(world.worker.frontier) == 2
    assert world.guarded.counters.rewinds == 0, "they are admitted with what their texts were before the step"
    world.check_texts({"r": [1, 5], "came while it was off": [2, 5]})


def test_what_was_committed_while_it_was_off_is_in_the_index_afterwards() -> None:
    period = [3, 4, 5, 6, 7]
    world = Guarded(worker=False, retrieval=True)
    periodic(world, period)
    world.admit("r", [7])
    world.switch(False)
    world.run(12)
    assert world.chains["r"] == [] and world.texts["r"][1:11] == period * 2
    world.switch(True)
    world.step()
    assert world.chains["r"][:4] == [*period, *period][3:7]


def test_switched_off_sources_are_left_alone() -> None:
    calls: list[str] = []

    class Noting(ContextRetriever):
        def __getattribute__(self, name: str) -> Any:
            if name in ("start", "extend_many", "lookup_many", "stop", "work"):
                calls.append(name)
            return super().__getattribute__(name)

    world = Guarded(worker=False)
    world.protect(Proposer(8, None, [Noting()], Ticks()))
    world.admit("r", [1, 5])
    world.run(2)
    assert {"start", "extend_many", "lookup_many", "work"} <= set(calls)
    world.switch(False)
    world.step()
    assert calls[-1] == "stop"
    calls.clear()
    world.admit("s", [2, 5])
    world.run(5)
    world.guarded.finish("r")
    world.guarded.finish("s")
    assert calls == []


def test_requests_that_ended_while_it_was_off_do_not_come_back() -> None:
    world = Guarded()
    world.admit("r", [1, 5])
    world.run(2)
    world.switch(False)
    world.step()
    world.guarded.finish("r")
    world.guarded.finish("never seen")
    del world.texts["r"]
    world.admit("s", [2, 5])
    world.switch(True)
    world.run(2)
    assert world.inner.num_requests == 1 and len(world.worker.frontier) == 1
    world.guarded.finish("s")
    world.index()
    world.worker.turn()
    assert len(world.worker.frontier) == 0 and world.inner.num_requests == len(world.guarded._live)


def test_a_request_that_declined_drafts_gets_none_after_the_switch() -> None:
    world = Guarded(retrieval=True)
    world.admit("r", [1, 5] * 6, RequestParams(0.0, 200, frozenset(), use_drafts=False))
    world.switch(False)
    world.run(2)
    world.switch(True)
    for _ in range(4):
        world.step()
        assert world.chains["r"] == []
    assert len(world.worker.frontier) == 0


def test_long_texts_are_admitted_again_over_several_rounds() -> None:
    world = Guarded(worker=False, turns=0)
    proposer = world.guarded
    text = np.ones(40_000, np.int32)
    names = [f"r{index}" for index in range(5)]
    world.switch(False)
    for name in names:
        proposer.admit(name, text[:-1], RequestParams(0.0, 50_000, frozenset()))
    rows = [Row(name, text, 1, ()) for name in names]
    proposer.propose(rows)
    world.switch(True)
    awake = []
    for _ in range(3):
        proposer.propose(rows)
        awake.append(world.inner.num_requests)
    assert awake == [2, 4, 5]


def test_a_worker_whose_log_was_full_learns_later_that_drafting_is_off() -> None:
    world = Guarded()
    for index in range(3):
        world.admit(f"r{index}", [index + 1, 5])
    world.run(2)
    assert len(world.worker.frontier) == 3
    send = world.target_end.send
    world.target_end.send = lambda command: False  # type: ignore[method-assign]
    world.switch(False)
    world.run(2)
    assert len(world.worker.frontier) == 3
    world.target_end.send = send  # type: ignore[method-assign]
    world.run(2)
    assert len(world.worker.frontier) == 0


def test_each_switch_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    world = Guarded()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            world.guarded.switch(False, "ada (process 7)", "ticket 12")
        for _ in range(2):
            world.guarded.switch(True, "ada (process 8)", "")
    assert caplog.messages == [
        "Drafting was switched off by ada (process 7): ticket 12.",
        "Drafting was switched on by ada (process 8).",
    ]


# ---- the breaker ------------------------------------------------------------------------------------------------


def test_an_exception_ends_in_the_guard_and_drafts_come_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = Guarded(retrieval=True)
    world.admit("r", [1, 5])
    world.run(3)
    caplog.set_level(logging.INFO)
    with monkeypatch.context() as patch:
        patch.setattr(world.inner, "propose", failing())
        world.step()
    (record,) = caplog.records
    assert record.exc_info is not None and "something of ours" in caplog.text and "again in 1 s" in record.message
    assert world.guarded.counters.failures == 1 and world.guarded.breaker.paused_s == FIRST_S
    world.now += FIRST_S / 2
    world.run(3)
    assert world.chains["r"] == [] and len(world.worker.frontier) == 0
    accepted = world.accepted()
    world.now += FIRST_S / 2
    caplog.clear()
    world.run(8)
    assert world.guarded.breaker.state == "closed" and world.accepted() > accepted
    assert caplog.messages == ["Drafting is tried again, having paused after an exception."]
    world.check_texts({"r": [1, 5]})


def test_failures_at_every_trial_lengthen_the_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Guarded()
    world.admit("r", [1, 5])
    monkeypatch.setattr(world.inner, "propose", failing(7))  # at the second one the request is suspected, in vain
    pauses = []
    for _ in range(6):
        world.run(2)
        pauses.append(world.guarded.breaker.paused_s)
        world.now += pauses[-1]
    assert pauses == [1, 2, 4, 8, 8, 8]
    world.step()
    assert world.guarded.breaker.state == "closed" and world.guarded.counters.failures == 7


def test_an_exception_outside_the_round_ends_in_the_guard_too(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Guarded(retrieval=True)

    def fail(*args: Any) -> None:
        raise RuntimeError("something of ours")

    for name, call in (
        ("admit", lambda: world.admit("r", [1, 5])),
        ("finish", lambda: world.guarded.finish("r")),
        ("forget_history", world.guarded.forget_history),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(world.inner, name, fail)
            call()
            world.index()
        assert world.guarded.breaker.state == "open"
        world.now += MOST_S
        if name == "admit":
            world.run(4)
            assert world.accepted() > 0
    assert world.guarded.counters.failures == 3 and world.inner.num_requests == len(world.guarded._live)


def test_a_request_whose_admission_failed_when_it_was_sent_is_released() -> None:
    world = Guarded()
    send = world.target_end.send

    def fail(command: Any) -> bool:
        world.target_end.send = send  # type: ignore[method-assign]
        send(command)
        raise RuntimeError("something of ours")

    world.target_end.send = fail  # type: ignore[method-assign]
    world.admit("r", [1, 5])
    world.index()
    assert world.guarded.counters.failures == 1
    world.worker.turn()
    assert world.worker.frontier.counters["prefix_cache_queries"] == 2 and len(world.worker.frontier) == 0


def test_an_id_that_comes_again_has_its_new_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Guarded(retrieval=True)
    world.admit("r", [1, 5] * 6)
    with monkeypatch.context() as patch:
        patch.setattr(world.inner, "admit", failing())
        world.admit("r", [1, 5] * 6, RequestParams(0.0, 200, frozenset(), use_drafts=False))
        world.index()
    world.now += FIRST_S
    for _ in range(4):
        world.step()
        assert world.chains["r"] == []
    assert world.inner.num_requests == 1


def test_the_breaker_does_not_turn_a_switch_on(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Guarded()
    world.admit("r", [1, 5])
    with monkeypatch.context() as patch:
        patch.setattr(world.inner, "propose", failing())
        world.step()
    world.switch(False)
    world.now += MOST_S
    world.run(3)
    assert world.chains["r"] == [] and world.guarded.breaker.state == "half-open"
    world.switch(True)
    world.run(6)
    assert world.guarded.breaker.state == "closed" and world.accepted() > 0


def test_drafting_that_costs_more_than_it_gives_pauses(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is ever drafted, and a round takes as long as the target's forward."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(guard, "_JUDGED_ROUNDS", 10)
    world = Guarded(worker=False)
    world.guarded.step_cost.observe(1, 1e-6)
    world.admit("r", [1, 5])
    pauses = []
    for _ in range(3):
        world.run(9)
        assert world.guarded.breaker.paused_s == 0 and world.inner.num_requests == 1
        world.run(30)
        pauses.append(world.guarded.breaker.paused_s)
        assert world.inner.num_requests == 0
        world.now += pauses[-1]
    assert pauses == [1, 2, 4] and world.guarded.counters.losses == 3 and world.guarded.counters.failures == 0
    assert caplog.messages[:2] == [
        "Drafts cost more than they give here; they are tried again in 1 s",
        "Drafting is tried again, having paused because drafts cost more than they gave.",
    ]


def test_drafting_that_pays_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_JUDGED_ROUNDS", 10)
    world = Guarded()
    for num_tokens in range(1, 30):
        world.guarded.step_cost.observe(num_tokens, 1 + 0.01 * num_tokens)
    for index in range(3):
        world.admit(f"r{index}", [index + 1, 5], RequestParams(0.0, 400, frozenset()))
    world.run(35)
    assert world.guarded.counters.rounds == 35 and world.guarded.counters.losses == 0


def test_an_interrupt_passes_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Guarded()

    def interrupt(*_: object) -> None:
        raise SystemExit

    monkeypatch.setattr(world.inner, "propose", interrupt)
    world.admit("r", [1, 5])
    with pytest.raises(SystemExit):
        world.step()


class Chaos:
    """Makes calls fail by chance, before or after they have done their work."""

    def __init__(self, seed: int, chance: float) -> None:
        self.random = random.Random(seed)
        self.chance = chance
        self.failures = 0

    def disturb(self, owner: object, name: str, before: bool = True) -> None:
        call = getattr(owner, name)

        def disturbed(*args: Any, **kwargs: Any) -> Any:
            fails = self.random.random() < self.chance
            self.failures += fails
            if fails and before and self.random.random() < 0.5:
                raise RuntimeError(f"before {name}")
            result = call(*args, **kwargs)
            if fails:
                raise RuntimeError(f"after {name}")
            return result

        setattr(owner, name, disturbed)


@pytest.mark.parametrize("seed", range(12))
def test_exceptions_anywhere_in_the_proposer_leak_nothing_and_drafting_comes_back(seed: int) -> None:
    world = Guarded(turns=4)
    chaos = Chaos(seed, 0.004)
    sources: list[Source] = [ContextRetriever(), HistoryRetriever(1000, share_unnamed=True)]
    inner = Proposer(8, world.target_end, sources, Ticks())
    for source in sources:
        for name in ("start", "extend_many", "lookup_many", "work"):
            chaos.disturb(source, name)
        chaos.disturb(source, "stop", before=False)
    chaos.disturb(world.target_end, "send")
    chaos.disturb(world.target_end, "drain")
    chaos.disturb(inner, "_find_paths")
    chaos.disturb(inner, "_commit")
    world.protect(inner)
    prompts: dict[str, list[int]] = {}
    for number in range(150):
        if len(prompts) < 5 and chaos.random.random() < 0.4:
            name = f"r{number}"
            prompts[name] = [number % VOCAB, 5]
            world.admit(name, prompts[name], RequestParams(0.0, 300, frozenset()))
        for name in [name for name in prompts if len(world.texts[name]) > 120 or chaos.random.random() < 0.03]:
            world.check_texts({name: prompts.pop(name)})
            world.guarded.finish(name)
            del world.texts[name]
        if chaos.random.random() < 0.05:
            world.switch(chaos.random.random() < 0.7)
        world.now += chaos.random.expovariate(0.25)
        world.step([name for name in prompts if chaos.random.random() < 0.9])
    assert world.guarded.counters.failures > 1 and world.guarded.counters.rounds > 10
    chaos.chance = 0.0
    world.switch(True)
    world.now += MOST_S
    for name in ("u", "v"):
        prompts[name] = [7, 5]
        world.admit(name, prompts[name])
    accepted = world.accepted()
    world.run(8)
    world.check_texts(prompts)
    assert world.accepted() > accepted
    assert world.inner.num_requests == len(world.guarded._live) == len(prompts)
    num_drafted = sum(params.use_drafts for params in world.guarded._live.values())
    assert len(world.worker.frontier) == num_drafted >= 2
    for source in sources:
        assert source.requests["live"].sum() == num_drafted
    for name in prompts:
        world.guarded.finish(name)
    world.index()
    world.worker.turn()
    assert len(world.worker.frontier) == 0 and world.worker.frontier._pool.num_free == 599
    assert not any(source.requests["live"].any() for source in sources)


def test_a_state_that_an_exception_left_behind_is_not_used_again() -> None:
    """The context's index is emptied in the middle of a round; what is retrieved afterwards comes from a new one."""
    period = [3, 4, 5, 6, 7]
    world = Guarded(worker=False)
    retriever = ContextRetriever()
    world.protect(Proposer(8, None, [retriever], Ticks()))
    periodic(world, period)
    world.admit("r", period * 3, PARAMS)
    world.run(2)
    lost = retriever.requests["slot"][retriever.requests["live"]].tolist()
    retriever.requests["live"] = False
    world.step()
    assert world.guarded.counters.failures == 1 and world.chains["r"] == []
    world.now += FIRST_S
    world.step()
    assert len(world.chains["r"]) >= 4
    check_context(retriever, lost)


def test_a_reset_of_the_prefix_cache_stops_at_the_guard() -> None:
    world = Guarded()
    world.guarded.reset_prefix_cache()
    assert world.inner.link._epoch == 1


def test_a_request_that_cannot_be_admitted_goes_without_drafts_and_others_do_not() -> None:
    world = Guarded()
    admit = world.inner.admit

    def refuse(name: str, tokens: Any, params: Any) -> None:
        if name == "poison" and params.use_drafts:
            raise RuntimeError("something of ours")
        admit(name, tokens, params)

    world.inner.admit = refuse  # type: ignore[method-assign]
    world.admit("r", [1, 5])
    world.run(3)
    world.admit("poison", [2, 5])
    for _ in range(2):
        world.step()
        assert not any(world.chains.values())
        world.now += MOST_S
    accepted = world.accepted()
    world.run(6)
    assert world.accepted() > accepted and world.guarded.counters.failures == 2
    assert not world.chains["poison"]
    world.check_texts({"r": [1, 5], "poison": [2, 5]})


def test_a_draft_that_is_never_right_is_named_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(guard, "_JUDGED_ROUNDS", 16)
    monkeypatch.setattr(draft_health, "_JUDGED_TOKENS", 32)  # a request whose drafts are of no use soon gets none for a while
    world = Guarded()
    target = world.target
    world.worker._engine._next_token = lambda context: -target(context)  # type: ignore[attr-defined]
    for name in "abcdef":
        world.admit(name, [ord(name) % VOCAB, 5])
    world.run(64)
    assert world.guarded.draft_health.is_useless
    (said,) = [record for record in caplog.records if "of no use" in record.message]
    assert said.levelno == logging.WARNING and "right for 0 of the last" in said.message
    world.worker._engine._next_token = target  # type: ignore[attr-defined]
    for name in "uvwxyz":
        world.admit(name, [ord(name) % VOCAB, 5])
    world.run(48)
    assert not world.guarded.draft_health.is_useless


@pytest.mark.parametrize(("num_right", "is_useless"), [(25, True), (26, False)])
def test_one_word_in_twenty_is_of_some_use(num_right: int, is_useless: bool) -> None:
    counters, health = Counters(), DraftHealth()
    counters.tally.counts["draft_first_examples"], counters.tally.counts["draft_first_accepted"] = 511, 0
    health.judge(counters)
    assert not health.is_useless, "too little is known"
    counters.tally.counts["draft_first_examples"], counters.tally.counts["draft_first_accepted"] = 512, num_right
    health.judge(counters)
    assert health.is_useless is is_useless


def test_logits_that_are_not_finite_are_named_once_and_forgotten_with_their_worker(caplog: pytest.LogCaptureFixture) -> None:
    counters, health = Counters(), DraftHealth()

    def judge(num_answers: int, num_broken: int, num_examples: int) -> bool:
        counters.worker = {"nodes_published": float(num_answers), "answers_not_finite": float(num_broken)}
        counters.tally.counts["draft_first_examples"] = num_examples
        health.judge(counters)
        return health.is_useless

    assert not judge(1000, 1, 0), "one prompt that overflows is no broken model"
    assert judge(2000, 900, 100) and judge(3000, 1900, 1000)
    (said,) = caplog.records
    assert said.levelno == logging.WARNING and "not finite" in said.message
    counters.tally.counts["draft_first_accepted"] = 300
    assert not judge(500, 0, 1600), "a new worker, which is sound; lists of the old one do not count"
    assert len(caplog.records) == 1
