"""The round, without vLLM, Ray, network or clock: a scripted target, a fake draft engine, the in-process logs."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.draft_view import check_integrity, trees
from tests.fakes.engine import FakeEngine, hashed_logits
from tests.faults import Faults, faulty_pair
from vllm_double.draft.frontier import FrontierLimits
from vllm_double.draft.worker import DraftWorker
from vllm_double.retrieval import ContextRetriever, HistoryRetriever
from vllm_double.retrieval.base import Found, Queries, Source
from vllm_double.retrieval.datastore.build import build
from vllm_double.retrieval.sources import Sources
from vllm_double.target.proposer import Proposer, RequestParams, Row
from vllm_double.transport.base import DraftChannel
from vllm_double.transport.inprocess import InProcessTargetChannel, in_process_pair
from vllm_double.transport.messages import Admit

VOCAB = 24
PARAMS = RequestParams(temperature=0.0, max_length=200, stop_token_ids=frozenset())


class Ticks:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self._count = itertools.count()

    def __call__(self) -> float:
        return next(self._count) * 1e-6


class World:
    """A greedy target over hashed logits; the draft sees the same logits with noise, so that it is often right."""

    def __init__(
        self, *, turns: int = 12, retrieval: bool = False, worker: bool = True, k: int = 8, noise: float = 1.0,
        pair: tuple[InProcessTargetChannel, DraftChannel] | None = None,
    ) -> None:  # fmt: skip
        self.target_end, self.worker_end = pair or in_process_pair(capacity=1 << 20)
        target, other = hashed_logits(VOCAB, seed=1, spread=6.0), hashed_logits(VOCAB, seed=2)
        self.target = target

        def draft(context: Sequence[int]) -> np.ndarray:
            return target(context) + noise * other(context)

        self.draft, self.k = draft, k
        self.worker = self.make_worker()
        retrievers: list[Source] = [ContextRetriever()] if retrieval else []
        self.proposer = Proposer(k, self.target_end if worker else None, retrievers, Ticks())
        self.turns = turns
        self.texts: dict[str, list[int]] = {}
        self.chains: dict[str, list[int]] = {}
        self.steps = 0

    def make_worker(self) -> DraftWorker:
        engine = FakeEngine(self.draft, vocab_size=VOCAB, num_pages=600, page_size=4, max_length=400)
        return DraftWorker(engine, self.worker_end, FrontierLimits(self.k), Ticks())

    def restart_worker(self) -> None:
        self.worker_end = self.target_end.attach()
        self.worker = self.make_worker()

    def admit(self, name: str, prompt: list[int], params: RequestParams = PARAMS) -> None:
        self.texts[name], self.chains[name] = list(prompt), []
        self.proposer.admit(name, np.array(prompt, np.int32), params)

    def step(self, names: Sequence[str] | None = None, verify: int | None = None) -> None:
        """One target forward over the rows; ``verify`` cuts the chains as the scheduler may."""
        if self.worker_end.superseded and self.turns:
            self.restart_worker()
        for _ in range(self.turns):
            self.worker.turn()
        check_integrity(self.worker.frontier)
        names = list(self.texts) if names is None else list(names)
        rows = []
        for name in names:
            text, chain = self.texts[name], self.chains[name][:verify]
            sampled: list[int] = []
            for token in [*chain, None]:
                best = int(np.argmax(self.target([*text, *sampled])))
                sampled.append(best)
                if best != token:
                    break
            text.extend(sampled)
            rows.append(Row(name, np.array(text, np.int32), len(sampled), chain))
        self.index()
        for name, chain in zip(names, self.proposer.propose(rows), strict=True):
            self.chains[name] = chain
        self.proposer.check_integrity()
        self.steps += 1

    def index(self) -> None:
        """What a thread does while the target computes."""
        self.proposer.index(2048)

    def greedy(self, prompt: list[int], length: int) -> list[int]:
        text = list(prompt)
        while len(text) < length:
            text.append(int(np.argmax(self.target(text))))
        return text


def test_the_text_is_the_targets_own_and_drafts_make_it_come_sooner() -> None:
    world = World()
    for index in range(4):
        world.admit(f"r{index}", [index + 1, 5])
    for _ in range(15):
        world.step()
    for index in range(4):
        text = world.texts[f"r{index}"]
        assert text == world.greedy([index + 1, 5], len(text))
    counters = world.proposer.counters
    assert counters.committed_tokens / counters.rows > 1.8
    assert counters.hits / counters.lookups > 0.5


def test_without_a_worker_nothing_is_proposed_and_nothing_breaks() -> None:
    world = World(turns=0)
    world.worker_end.close()
    world.admit("r", [1, 2])
    for _ in range(5):
        world.step()
        assert world.chains["r"] == []
    assert world.proposer.counters.rounds_without_worker == 5


def test_retrieval_alone_drafts_repeated_text() -> None:
    world = World(worker=False, retrieval=True)
    period = [3, 4, 5, 6, 7]
    world.target = lambda context: np.eye(VOCAB)[period[(period.index(context[-1]) + 1) % 5]]
    world.admit("r", period * 3)
    world.step()
    world.step()
    assert len(world.chains["r"]) >= 4
    world.step()
    assert world.proposer.counters.accepted["context"] >= 4


def test_chains_are_clipped_to_what_the_text_may_still_get() -> None:
    world = World(worker=False, retrieval=True)
    period = [3, 4, 5, 6, 7]
    world.target = lambda context: np.eye(VOCAB)[period[(period.index(context[-1]) + 1) % 5]]
    world.admit("r", period * 3, RequestParams(0.0, 20, frozenset()))
    while len(world.texts["r"]) < 20:
        room = 20 - len(world.texts["r"])
        assert len(world.chains["r"]) <= max(room - 1, 0)
        world.step()
    assert len(world.texts["r"]) == 20 and world.chains["r"] == []


def test_nothing_is_proposed_behind_a_stop_token() -> None:
    world = World(worker=False, retrieval=True)
    world.admit("r", [3, 4, 0, 5, 3, 4, 0, 5, 3], RequestParams(0.0, 200, frozenset({0})))
    world.target = lambda context: np.eye(VOCAB)[{3: 4, 4: 0, 0: 5, 5: 3}[context[-1]]]
    world.step()
    assert world.chains["r"] in ([], [0])
    world.step()
    assert world.chains["r"] == []


def test_chains_that_the_scheduler_cuts_are_counted_as_verified_only_so_far() -> None:
    world = World()
    world.admit("r", [1, 5])
    for _ in range(10):
        world.step(verify=1)
    counters = world.proposer.counters
    assert 0 < counters.offered["draft"] <= 10
    assert world.texts["r"] == world.greedy([1, 5], len(world.texts["r"]))


def test_drafts_that_nobody_proposed_are_not_counted_as_ours() -> None:
    world = World(turns=0)
    world.admit("r", [1, 5])
    text = np.array([1, 5, 7], np.int32)
    world.proposer.propose([Row("r", text, 1, [-1, -1, -1])])
    assert world.proposer.counters.offered == {}


def test_an_unscheduled_row_goes_on_where_it_was() -> None:
    world = World()
    world.admit("a", [1, 5])
    world.admit("b", [2, 5])
    for index in range(12):
        world.step(["a"] if index % 3 else ["a", "b"])
    for name, prompt in (("a", [1, 5]), ("b", [2, 5])):
        assert world.texts[name] == world.greedy(prompt, len(world.texts[name]))


def test_a_text_that_shrank_is_admitted_again() -> None:
    world = World()
    world.admit("r", [1, 5])
    for _ in range(5):
        world.step()
    del world.texts["r"][4:]
    world.chains["r"] = []
    for _ in range(8):
        world.step()
    assert world.proposer.counters.rewinds == 1
    assert world.texts["r"] == world.greedy([1, 5], len(world.texts["r"]))
    assert world.proposer.counters.accepted["draft"] > 0


def test_a_request_that_came_back_under_its_id_starts_afresh() -> None:
    world = World()
    world.admit("r", [1, 5])
    world.step()
    world.admit("r", [2, 6, 7])
    for _ in range(6):
        world.step()
    assert world.texts["r"] == world.greedy([2, 6, 7], len(world.texts["r"]))
    for _ in range(2):
        world.worker.turn()
    assert len(world.worker.frontier) == 1


def test_finished_requests_leave_nothing_with_the_worker() -> None:
    world = World()
    world.admit("r", [1, 5])
    world.step()
    world.proposer.finish("r")
    world.proposer.finish("never seen")
    world.worker.turn()
    assert len(world.worker.frontier) == 0
    assert world.worker.frontier._pool.num_free == 599


def test_a_new_worker_gets_all_live_requests_and_drafts_come_back() -> None:
    world = World()
    world.admit("r", [1, 5])
    for _ in range(3):
        world.step()
    old = world.worker
    world.restart_worker()
    assert world.worker is not old
    accepted = world.proposer.counters.accepted["draft"]
    for _ in range(6):
        world.step()
    assert world.proposer.counters.resynchronisations == 1
    assert type(world.proposer.counters.resynchronisations) is int, "it goes into JSON"
    assert world.proposer.counters.accepted["draft"] > accepted
    assert world.texts["r"] == world.greedy([1, 5], len(world.texts["r"]))


@pytest.mark.parametrize("fault", ["drop", "duplicate", "delay", "corrupt"])
def test_lost_late_and_repeated_records_never_change_the_text(fault: str) -> None:
    world = World(pair=faulty_pair(capacity=1 << 20, commands=Faults(**{fault: 0.3}), reports=Faults(**{fault: 0.3})))
    for index in range(3):
        world.admit(f"r{index}", [index + 1, 5])
    for _ in range(20):
        world.step()
    for index in range(3):
        text = world.texts[f"r{index}"]
        assert text == world.greedy([index + 1, 5], len(text))


def test_a_full_log_means_no_drafts_and_a_later_admission() -> None:
    world = World(turns=0)
    world.target_end, world.worker_end = in_process_pair(capacity=2048)
    world.proposer = Proposer(8, world.target_end, [], Ticks())
    for index in range(8):
        world.admit(f"r{index}", [index + 1] * 60)
    for _ in range(6):
        world.step()
    world.worker = DraftWorker(
        FakeEngine(
            hashed_logits(VOCAB, seed=1, spread=6.0),
            vocab_size=VOCAB,
            num_pages=600,
            page_size=4,
            max_length=400,
        ),
        world.worker_end,
        FrontierLimits(8),
        Ticks(),
    )
    world.turns = 12
    for _ in range(12):
        world.step()
    assert world.proposer.counters.accepted["draft"] > 0
    for index in range(8):
        text = world.texts[f"r{index}"]
        assert text == world.greedy([index + 1] * 60, len(text))


def test_requests_that_declined_drafts_get_none_and_reach_no_worker() -> None:
    world = World(retrieval=True)
    world.admit("r", [1, 5] * 6, RequestParams(0.8, 200, frozenset(), use_drafts=False))
    for _ in range(5):
        world.step()
        assert world.chains["r"] == []
    assert len(world.worker.frontier) == 0
    world.proposer.finish("r")


def test_chains_fade_while_drafts_do_not_pay_and_come_back_when_they_do() -> None:
    """By what is learnt of the draft and of the step's cost, chains fade to nothing, and come back."""
    world = World(turns=10)
    is_right = False

    def draft(context: Sequence[int]) -> np.ndarray:
        """So sure of one token that it is drafted; of four others, which are drafted too, one is the target's."""
        target = int(np.argmax(world.target(context)))
        probs = np.full(VOCAB, 1e-6)
        probs[[(target + place) % VOCAB for place in (0, 1, 3, 5)]] = 0.3 / 4
        probs[target if is_right else (target + 2) % VOCAB] = 0.7
        return np.log(probs)

    world.draft = draft
    world.worker = world.make_worker()
    for num_tokens in range(5, 65):
        world.proposer.step_cost.observe(num_tokens, 1 + 0.3 * num_tokens)
    for index in range(3):
        world.admit(f"r{index}", [index + 1, 5], RequestParams(0.0, 400, frozenset()))
    proposed = []
    for number in range(100):
        is_right = number >= 50
        world.step()
        proposed.append(sum(map(len, world.chains.values())))
    assert max(proposed[:5]) > 0, "the draft is taken at its word before anything is learnt"
    assert proposed[40:50] == [0] * 10
    assert min(proposed[-10:]) > 0


def test_a_draft_that_brings_nothing_beside_retrieval_pauses_and_is_tried_again() -> None:
    world = World(retrieval=True)
    period = [3, 4, 5, 6, 7]
    is_periodic = True

    def target(context: Sequence[int]) -> np.ndarray:
        return 9 * np.eye(VOCAB)[period[len(context) % 5] if is_periodic else (context[-1] * 7 + context[-2] + 1) % VOCAB]

    world.target = target
    world.draft = lambda context: np.roll(target(context), 1) if is_periodic else target(context)
    world.worker = world.make_worker()
    world.admit("r", period * 3, RequestParams(0.0, 400, frozenset()))
    counters = world.proposer.counters
    while counters.draft_pauses == 0:
        world.step()
    text = world.texts["r"]
    began = len(text)
    assert began - 15 >= 64, "it is judged by so many tokens"
    assert counters.accepted.keys() == {"context"}
    (request,) = trees(world.worker.frontier).values()
    known = request.length
    for _ in range(6):
        world.step()
        assert request.length == known, "the worker is told nothing"
    assert world.worker.turn() is False, "it has no work left"
    while request.length == known:
        world.step()
    assert len(text) - began >= 256 > len(text) - began - 18
    is_periodic = False
    while "draft" not in counters.accepted:
        world.step()
    assert request.tokens == text[: request.length] and len(text) < 400
    assert counters.draft_pauses == 1


def test_a_draft_that_is_of_use_does_not_pause() -> None:
    world = World(retrieval=True)
    world.admit("r", [1, 5], RequestParams(0.0, 400, frozenset()))
    while len(world.texts["r"]) < 390:
        world.step()
    assert world.proposer.counters.draft_pauses == 0


@pytest.mark.parametrize("was_there", [False, True])
def test_a_draft_that_is_not_there_is_not_judged(was_there: bool) -> None:
    world = World(retrieval=True, turns=12 * was_there)
    period = [3, 4, 5, 6, 7]
    world.target = lambda context: np.eye(VOCAB)[period[len(context) % 5]]
    world.draft = lambda context: np.eye(VOCAB)[1]
    world.worker = world.make_worker()
    world.admit("r", period * 3, RequestParams(0.0, 400, frozenset()))
    for _ in range(3):
        world.step()
    (slot,) = world.proposer._slots.values()
    assert world.proposer.table.tries.requests["has_drafted"][slot] == was_there
    world.turns = 0
    if was_there:
        world.worker_end.close()
    while len(world.texts["r"]) < 390:
        world.step()
    assert world.proposer.counters.draft_pauses == 0


def test_a_prompt_longer_than_one_command_arrives_whole() -> None:
    world = World(turns=200)
    prompt = [1 + index % 20 for index in range(9000)]
    engine = FakeEngine(lambda context: np.eye(VOCAB)[3] * 9, vocab_size=VOCAB, num_pages=700, page_size=16, max_length=10000)
    world.worker = DraftWorker(engine, world.worker_end, FrontierLimits(8), Ticks())
    world.target = lambda context: np.eye(VOCAB)[3]
    world.admit("r", prompt, RequestParams(0.0, 9900, frozenset()))
    world.step()
    world.step()
    assert world.chains["r"] == [3] * 8


def _commit(proposer: Proposer, text: list[int], token: int) -> list[int]:
    """One token of the target's, without drafts verified; the next chain."""
    text.append(token)
    proposer.index(2048)
    return proposer.propose([Row("r", np.array(text, np.int32), 1, ())])[0]


def test_what_the_target_refused_is_not_offered_again_at_the_same_place() -> None:
    proposer = Proposer(8, None, [ContextRetriever()], Ticks())
    block = [5, 6, 7, 8, 9, 10, 11, 12, 13]
    text = [*block, 14, *block, 14, *block, 14, 3, *block]
    proposer.admit("r", np.array(text[:-1], np.int32), PARAMS)
    assert _commit(proposer, text[:-1], block[-1])[:1] == [14]
    _commit(proposer, text, 2)  # the target says 2, not 14
    chain: list[int] = []
    for token in block[:-1]:
        chain = _commit(proposer, text, token)
    assert chain[:2] == [13], "14 was refused behind these words"
    assert _commit(proposer, text, block[-1]) == []
    _commit(proposer, text, 14)  # and now the target says 14
    for token in block[:-1]:
        chain = _commit(proposer, text, token)
    assert chain[:2] == [13, 14], "it was right since"


def test_an_answer_is_offered_to_its_tenants_next_request_only() -> None:
    answer = [3, 5, 7, 9, 11, 13, 15, 17, 19, 21]
    world = World(worker=False)
    world.proposer = Proposer(8, None, [HistoryRetriever(1000)], Ticks())
    world.target = lambda context: np.eye(VOCAB)[answer[(answer.index(context[-1]) + 1) % 10] if context[-1] in answer else 3]
    for tenant, is_offered in (("a", False), ("b", False), ("a", True), (None, False)):
        params = RequestParams(0.0, 200, frozenset(), tenant=tenant)
        world.admit("r", [1, 2], params)
        before = world.proposer.counters.offered.get("history", 0)
        for _ in range(12):
            world.step()
        offered = world.proposer.counters.offered.get("history", 0) - before
        assert (offered > 0) == is_offered
        world.proposer.finish("r")
        world.texts.clear()
        world.proposer.index(2048)
    world.proposer.forget_history()
    before = world.proposer.counters.offered["history"]
    world.admit("r", [1, 2], RequestParams(0.0, 200, frozenset(), tenant="a"))
    for _ in range(12):
        world.step()
    assert world.proposer.counters.offered["history"] == before


def test_new_weights_clear_what_was_found_for_the_chains_to_come() -> None:
    proposer = Proposer(8, None, [HistoryRetriever(1000)], Ticks())
    params = RequestParams(0.0, 200, frozenset(), tenant="a")
    answer = list(range(3, 20))
    for is_outdated in (False, True):
        text = [1, 2]
        proposer.admit("r", np.array(text, np.int32), params)
        for token in answer[:4]:
            chain = _commit(proposer, text, token)
        if is_outdated:
            assert chain == answer[4:12]
            proposer.forget_history()
            proposer.check_integrity()
        for token in answer[4:]:
            assert _commit(proposer, text, token) == []
            proposer.check_integrity()
        proposer.finish("r")
        proposer.index(2048)


def test_new_weights_clear_the_workers_history_too() -> None:
    world = World()
    worker_side = HistoryRetriever(1000, share_unnamed=True)
    engine = FakeEngine(world.draft, vocab_size=VOCAB, num_pages=600, page_size=4, max_length=400)
    world.worker = DraftWorker(engine, world.worker_end, FrontierLimits(8), Ticks(), [worker_side])
    world.admit("r", [1, 5])
    for _ in range(6):
        world.step()
    world.proposer.finish("r")
    for _ in range(3):
        world.worker.turn()
    assert worker_side.num_tokens > 5
    world.proposer.forget_history()
    world.proposer.propose([])
    world.worker.turn()
    assert worker_side.num_tokens == 0


@pytest.mark.parametrize(("call", "num_hits"), [(None, 20), ("reset_prefix_cache", 0), ("forget_history", 0)])
def test_a_reset_and_new_weights_take_what_the_draft_read_before(call: str | None, num_hits: int) -> None:
    world = World()
    world.admit("r", [index % 7 for index in range(21)])
    world.step()
    world.proposer.finish("r")
    world.texts.clear()
    if call is not None:
        getattr(world.proposer, call)()
    world.admit("s", [index % 7 for index in range(21)])
    world.step()
    assert world.worker.frontier.counters["prefix_cache_hits"] == num_hits
    world.admit("t", [index % 7 for index in range(21)])
    world.step()
    assert world.worker.frontier.counters["prefix_cache_hits"] == num_hits + 20, "and finds what it has read since"


def test_every_source_forgets_history_when_the_weights_change() -> None:
    class Remembering(ContextRetriever):
        forgot = 0

        def forget(self) -> None:
            self.forgot += 1

    retrievers = [Remembering(), Remembering()]
    proposer = Proposer(8, None, retrievers, Ticks())
    proposer.admit("r", np.array([1, 5], np.int32), PARAMS)
    proposer.forget_history()
    assert [retriever.forgot for retriever in retrievers] == [1, 1]
    proposer.propose([Row("r", np.array([1, 5, 7], np.int32), 1, [])])
    proposer.check_integrity()


@pytest.mark.parametrize("tenant", [None, "a"])
def test_requests_with_and_without_a_tenant_reach_the_worker(tenant: str | None) -> None:
    world = World()
    world.admit("r", [1, 5], RequestParams(0.0, 200, frozenset(), tenant=tenant))
    world.step()
    assert len(world.worker.frontier) == 1


SECRET = [20, 21, 22, 23, 19, 18, 17, 16, 15]


def secretive(side: str, sources: Callable[[], list[Source]]) -> World:
    """A target that says the secret over and over, a draft that knows nothing of it, and sources on one side."""
    world = World()

    def target(context: Sequence[int]) -> np.ndarray:
        return 9 * np.eye(VOCAB)[SECRET[(SECRET.index(context[-1]) + 1) % 9] if context[-1] in SECRET else 20]

    def draft(context: Sequence[int]) -> np.ndarray:
        return np.where(np.arange(VOCAB) < 12, 3.0, -9.0).astype(np.float32)

    engine = FakeEngine(draft, vocab_size=VOCAB, num_pages=600, page_size=4, max_length=400)
    read = sources() if side == "draft" else []
    world.worker = DraftWorker(engine, world.worker_end, FrontierLimits(8, children_per_node=4), Ticks(), read)
    world.proposer = Proposer(8, world.target_end, sources() if side == "target" else [], Ticks())
    world.target = target
    return world


def offered(world: World, reader: str | None) -> tuple[bool, bool]:
    """Whether a request that begins as the secret does is offered the rest: to the target, to the draft."""
    world.admit("s", [1, 2, *SECRET[:3]], RequestParams(0.0, 200, frozenset(), tenant=reader))
    world.texts["s"] = [1, 2, *SECRET[:4]]
    world.proposer.index(2048)
    chain = world.proposer.propose([Row("s", np.array(world.texts["s"], np.int32), 1, ())])[0]
    for _ in range(8):
        world.worker.turn()
    (request,) = trees(world.worker.frontier).values()
    read = set()
    stack = [request.root]
    while stack:
        node = stack.pop()
        assert node is not None
        read |= node.children.keys()
        stack.extend(node.children.values())
    rest = set(SECRET[4:])
    return not rest.isdisjoint(chain), not rest.isdisjoint(read)


@pytest.mark.parametrize("side", ["target", "draft"])
@pytest.mark.parametrize(
    ("share", "owner", "reader", "is_offered"),
    [
        (False, "a", "a", True),
        (False, "a", "b", False),
        (False, "a", None, False),
        (False, None, None, False),
        (True, None, None, True),
        (True, "a", None, False),
        (True, None, "a", False),
        (True, "a", "b", False),
    ],
)
def test_a_secret_is_offered_to_its_own_tenant_alone(
    share: bool, owner: str | None, reader: str | None, is_offered: bool, side: str
) -> None:
    world = secretive(side, Sources(history_tokens=1000, share_history=share).open)
    world.admit("r", [1, 2], RequestParams(0.0, 200, frozenset(), tenant=owner))
    for _ in range(12):
        world.step()
    world.proposer.finish("r")
    world.texts.clear()
    world.step()
    assert offered(world, reader) == (is_offered and side == "target", is_offered)


@pytest.mark.parametrize("side", ["target", "draft"])
def test_a_datastore_is_read_by_both_sides(side: str, tmp_path: Path) -> None:
    build(tmp_path / "store", [np.array([5, 6, 7], np.int32), np.array(SECRET, np.int32)], VOCAB, bytes(32))
    store = (str(tmp_path / "store"), bytes(32).hex())
    world = secretive(side, Sources(context=False, datastores=(store,)).open)
    assert offered(world, None) == (side == "target", True)


class Faint(ContextRetriever):
    """Says the same as the context, and is hardly sure of it."""

    name = "faint"

    def lookup_many(self, queries: Queries, found: Found) -> None:
        super().lookup_many(queries, found)
        found.beliefs[...] *= 0.02


def test_a_faint_source_that_agrees_does_not_spoil_a_sure_one() -> None:
    text, chains = np.array([3, 4, 5, 6, 7] * 4, np.int32), []
    for sources in ([ContextRetriever()], [ContextRetriever(), Faint()]):
        proposer = Proposer(8, None, sources, Ticks())
        proposer.admit("r", text[:-1], PARAMS)
        proposer.index(2048)
        chains += proposer.propose([Row("r", text, 1, ())])
    assert chains[0] and chains[0] == chains[1]


def test_history_ends_with_a_stop_token() -> None:
    past = HistoryRetriever(1000)
    proposer = Proposer(8, None, [past], Ticks())
    params = RequestParams(0.0, 200, frozenset({0}), tenant="a")
    proposer.admit("r", np.array([1, 2], np.int32), params)
    proposer.propose([Row("r", np.array([1, 2, 3, 4, 0, 7, 8], np.int32), 5, ())])
    proposer.propose([Row("r", np.array([1, 2, 3, 4, 0, 7, 8, 9], np.int32), 1, ())])
    proposer.finish("r")
    proposer.index(2048)
    assert past.num_tokens == 4, "3, 4, 0 and a separator"


@pytest.mark.parametrize("stops", [False, True], ids=["by length", "by a stop token"])
@pytest.mark.parametrize("is_full", [False, True], ids=["", "without room to say how"])
def test_the_drafts_history_has_the_end_of_an_answer_if_there_was_room_to_send_it(
    stops: bool, is_full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, past = World(), HistoryRetriever(1000, share_unnamed=True)
    engine = FakeEngine(world.draft, vocab_size=VOCAB, num_pages=600, page_size=4, max_length=400)
    world.worker = DraftWorker(engine, world.worker_end, FrontierLimits(8), Ticks(), [past])
    text = [1, 5]
    while len(text) < 12:
        text.append(int(np.argmax(world.target(text))))
    stop = next(token for token in text[6:] if text.index(token) >= 6)
    if stops:
        del text[text.index(stop) + 1 :]
    world.admit("r", [1, 5], RequestParams(0.0, 12, frozenset({stop} if stops else ())))
    request, send = world.proposer.table.tries.requests[world.proposer._slots["r"]], world.target_end.send
    if is_full:
        monkeypatch.setattr(world.target_end, "send", lambda command: not request["finished"] and send(command))
    while not request["finished"]:
        before = len(world.texts["r"])
        world.step()
    monkeypatch.undo()
    iterations = world.worker._counters["iterations"]
    for _ in range(3):
        world.worker.turn()
    # A worker that was not told goes on with what was likely before.
    assert is_full or world.worker._counters["iterations"] == iterations, "it drafts behind the end"
    world.proposer.finish("r")
    for _ in range(3):
        world.worker.turn()
    assert past.num_tokens == (before if is_full else len(text)) - 2 + 1, "the answer and a separator"


def test_the_draft_is_sent_the_end_of_an_answer_for_which_it_pauses() -> None:
    world, past = World(), HistoryRetriever(1000, share_unnamed=True)
    engine = FakeEngine(world.draft, vocab_size=VOCAB, num_pages=600, page_size=4, max_length=400)
    world.worker = DraftWorker(engine, world.worker_end, FrontierLimits(8), Ticks(), [past])
    world.admit("r", [1, 5], RequestParams(0.0, 12, frozenset()))
    world.step()
    request = world.proposer.table.tries.requests[world.proposer._slots["r"]]
    request["pause"] = 1000
    while not request["finished"]:
        world.step()
    world.proposer.finish("r")
    for _ in range(3):
        world.worker.turn()
    assert past.num_tokens == 10 + 1, "the answer and a separator"


def test_a_long_prompt_is_indexed_in_slices_and_not_in_the_round() -> None:
    context = ContextRetriever()
    proposer = Proposer(8, None, [context], Ticks())
    proposer.admit("r", np.arange(10_000, dtype=np.int32), RequestParams(0.0, 20_000, frozenset()))
    proposer.propose([])
    assert context.num_waiting == 10_000
    proposer.index(64)
    assert context.num_waiting == 10_000 - 64


def test_a_request_with_very_many_stop_tokens_has_drafts() -> None:
    world = World()
    world.admit("r", [1, 5], RequestParams(0.0, 200, frozenset(range(VOCAB, 100_000))))
    world.step()
    world.step()
    assert len(world.worker.frontier) == 1 and world.chains["r"]


def test_ids_beyond_the_vocabulary_are_not_offered() -> None:
    proposer = Proposer(8, None, [ContextRetriever()], Ticks(), vocab_size=20)
    text = np.array([1, 2, 3, 4, 900, 901, 1, 2, 3], np.int32)
    proposer.admit("r", text[:-1], PARAMS)
    proposer.index(2048)
    assert proposer.propose([Row("r", text, 1, ())]) == [[4]]


def test_a_worker_that_comes_in_the_middle_of_an_admission_gets_the_request() -> None:
    world = World()
    send = world.target_end.send
    world.admit("r", [1, 5])
    world.step()
    world.restart_worker()
    sent: list[object] = []

    def interrupted(command: object) -> bool:
        sent.append(command)
        if isinstance(command, Admit) and len(sent) == 1:
            world.restart_worker()
        return send(command)  # type: ignore[arg-type]

    world.target_end.send = interrupted  # type: ignore[method-assign, assignment]
    for _ in range(6):
        world.step()
    assert len(world.worker.frontier) == 1 and world.chains["r"]


class Heard:
    """A worker's end that only listens."""

    def __init__(self) -> None:
        self.target, self._worker = in_process_pair(capacity=1 << 20)

    def admissions(self) -> list[Admit]:
        return [command for command in self._worker.receive() if isinstance(command, Admit)]


def test_the_worker_is_sent_what_the_target_draws_from() -> None:
    heard = Heard()
    proposer = Proposer(4, heard.target, [], Ticks())
    params = replace(PARAMS, temperature=0.7, seed=-(1 << 63), top_k=40, top_p=0.95, min_p=0.05)
    proposer.admit("r", np.array([1, 2], np.int32), params)
    (admission,) = heard.admissions()
    names = ("temperature", "seed", "top_k", "top_p", "min_p")
    assert [getattr(admission, name) for name in names] == [getattr(params, name) for name in names]


def test_first_and_listed_tokens_of_the_draft_are_counted() -> None:
    world = World(noise=0.0, turns=20)
    world.admit("r", [3, 5])
    for _ in range(10):
        world.step()
    counters = world.proposer.counters
    assert counters.draft_first_examples > 15
    assert counters.draft_first_accepted == counters.draft_listed_accepted == counters.draft_first_examples

    wrong = World(turns=20)
    wrong.draft = lambda context: -wrong.target(context)
    wrong.worker = wrong.make_worker()
    wrong.admit("r", [3, 5])
    for _ in range(10):
        wrong.step()
    counters = wrong.proposer.counters
    assert counters.draft_first_examples > 5 and counters.draft_first_accepted == 0
    assert counters.draft_listed_accepted == 0
