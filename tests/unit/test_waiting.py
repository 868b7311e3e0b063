"""When the target waits for the draft, and for how long: the rule by itself, and in the round."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from tests.fakes.engine import FakeEngine, hashed_logits
from vllm_double.draft.frontier import FrontierLimits
from vllm_double.draft.worker import DraftWorker
from vllm_double.planning.script import Script, Times
from vllm_double.planning.world import simulate
from vllm_double.target._round_steps import observe
from vllm_double.target.proposer import Proposer, RequestParams, Row
from vllm_double.target.waiting import Prospects, Rates, WaitRule
from vllm_double.transport.inprocess import in_process_pair

VOCAB, STEP_S, TARGET_S = 24, 0.001, 0.016


def observe_token(rule: WaitRule, accepted: bool) -> None:
    """As the commit does if the draft's first token behind a miss was the target's, or not."""
    observe(rule.means.accepted, 0, float(accepted))
    observe(rule.means.accepted_after_miss, 0, float(accepted))


def rule(accepted: float = 0.7, step_s: float = STEP_S) -> WaitRule:
    """One that has seen how often the draft is right after a miss."""
    made = WaitRule()
    made.step_s = step_s
    for place in range(400):
        observe_token(made, place * accepted % 1 < accepted)
    return made


def missed(*acceptances: float) -> Prospects:
    """Of rows for which nothing was prepared."""
    return Prospects(np.array(acceptances), np.array(acceptances), np.ones(len(acceptances), np.bool_))


def after_paths(*accept_probs: float, acceptance: float = 0.7) -> Prospects:
    """Of rows with something to verify."""
    num = len(accept_probs)
    return Prospects(np.array(accept_probs) * acceptance, np.full(num, acceptance), np.zeros(num, np.bool_))


def test_it_waits_if_the_draft_is_quick_and_often_right() -> None:
    prospects = rule(0.7).prospects(np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(1))
    assert prospects.accept_probs[0] == pytest.approx(0.7, abs=0.1) and prospects.are_missed.all()
    assert rule(0.7).pays_to_begin(prospects, Rates(100.0, 0.0))
    assert not rule(0.7).pays_to_begin(missed(0.1), Rates(1000.0, 0.0))
    assert not rule(0.7, step_s=0.02).pays_to_begin(missed(0.7), Rates(100.0, 0.0))


def test_it_waits_for_nobody_of_whom_nothing_is_known() -> None:
    assert not rule(step_s=0.0).pays_to_begin(missed(0.9), Rates(1.0, 0.0))
    assert not rule().pays_to_begin(missed(), Rates(1.0, 0.0))


def test_what_a_token_costs_to_verify_is_taken_off_what_it_brings() -> None:
    assert rule().pays_to_begin(missed(0.5), Rates(100.0, 0.001))
    assert not rule().pays_to_begin(missed(0.5), Rates(100.0, 0.0045))


def test_it_goes_on_while_the_next_token_is_worth_a_step() -> None:
    assert rule().pays_to_go_on(missed(0.2), Rates(100.0, 0.0))
    assert not rule().pays_to_go_on(missed(0.09), Rates(100.0, 0.0))
    assert rule().pays_to_go_on(missed(0.09, 0.09), Rates(100.0, 0.0))


def test_a_forward_that_verifies_nothing_is_preferred_if_the_next_outcome_is_then_prepared() -> None:
    either, rates = rule(0.5), Rates(150.0, 0.0)
    assert either.pays_to_begin(missed(0.5), rates)
    for _ in range(200):
        observe(either.means.hits_after_nothing, 0, 1.0)
        observe(either.means.hits_after_wait, 0, 0.0)
        observe(either.means.hits_after_chain, 0, 0.0)
        observe(either.means.tokens_of_hit, 0, 4.0)
    assert not either.pays_to_begin(missed(0.5), rates)


def test_it_waits_behind_a_short_path_too_while_the_path_is_likely() -> None:
    quick = rule(0.7)
    prospects = quick.prospects(np.zeros(2, np.int32), np.array([0, 2], np.int32), np.array([0.0, 0.5]))
    assert prospects.accept_probs.tolist() == pytest.approx([0.7, 0.35], abs=0.1)
    assert prospects.are_missed.tolist() == [True, False]
    assert quick.pays_to_begin(after_paths(0.9), Rates(100.0, 0.0))
    assert not quick.pays_to_begin(after_paths(0.1), Rates(100.0, 0.0))
    # Behind a path nothing is lost that a forward without one would have prepared.
    for _ in range(200):
        observe(quick.means.hits_after_nothing, 0, 1.0)
        observe(quick.means.hits_after_chain, 0, 0.0)
        observe(quick.means.tokens_of_hit, 0, 4.0)
    assert quick.pays_to_begin(after_paths(0.9), Rates(100.0, 0.0)) and not quick.pays_to_begin(missed(0.63), Rates(100.0, 0.0))


def test_a_token_that_is_not_worth_its_verification_is_not_waited_for() -> None:
    prospects = after_paths(0.9, 0.2)
    worth_it = rule().pay_to_verify(prospects, Rates(100.0, 0.002))
    assert worth_it.tolist() == [True, False] and len(prospects.only(worth_it).accept_probs) == 1


def test_waits_that_took_long_are_forgotten_in_time() -> None:
    slow = rule(0.5)
    for _ in range(200):
        slow.observe_first(0.05)
    assert not slow.pays_to_begin(missed(0.5), Rates(100.0, 0.0))
    rounds = next(
        n for n in itertools.count(1) if not slow.observe_no_wait() and slow.pays_to_begin(missed(0.5), Rates(100.0, 0.0))
    )
    assert 10 < rounds < 1000


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
    for _ in range(100):
        observe_token(world.proposer.waiting.rule, True)


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
