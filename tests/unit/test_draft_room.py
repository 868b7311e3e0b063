"""Texts that the draft cannot read, and requests for which it has no room."""

from collections.abc import Callable

import numpy as np
import pytest

from tests.draft_view import trees
from tests.fakes.engine import FakeEngine
from tests.property.test_frontier import admit, commit, make, turn
from tests.unit.test_proposer import VOCAB, Ticks, World
from vllm_double.draft.frontier import FrontierLimits
from vllm_double.draft.worker import DraftWorker
from vllm_double.target.proposer import RequestParams
from vllm_double.transport.inprocess import in_process_pair

LONG = RequestParams(0.0, 6000, frozenset())


class Small(World):
    """World whose draft reads, and has room for, little."""

    def __init__(self, num_pages: int = 600, max_length: int = 400, **settings: object) -> None:
        self.num_pages, self.max_length = num_pages, max_length
        super().__init__(**settings)  # type: ignore[arg-type]

    def make_worker(self) -> DraftWorker:
        engine = FakeEngine(self.draft, vocab_size=VOCAB, num_pages=self.num_pages, page_size=4, max_length=self.max_length)
        return DraftWorker(engine, self.worker_end, FrontierLimits(self.k), Ticks())

    @property
    def num_sent(self) -> int:
        """Bytes of commands so far."""
        return self.target_end._commands._head


def test_a_prompt_that_the_draft_cannot_read_is_not_sent() -> None:
    world = Small(max_length=40)
    world.admit("short", [1, 5])
    world.step()
    world.proposer.finish("short")
    del world.texts["short"]
    world.step()
    sent = world.num_sent
    world.admit("long", [2, 5] * 20)
    for _ in range(5):
        world.step()
    assert world.num_sent == sent and world.proposer.counters.texts_too_long == 1


def test_nothing_more_is_sent_of_a_text_that_has_grown_longer_than_the_draft_can_read() -> None:
    world = Small(max_length=40)
    world.admit("r", [1, 5])
    while len(world.texts["r"]) < 60:
        world.step()
    world.worker.turn()
    sent = world.num_sent
    for _ in range(5):
        world.step()
    assert world.num_sent == sent and len(world.worker.frontier) == 0
    assert world.texts["r"] == world.greedy([1, 5], len(world.texts["r"]))


def test_a_text_longer_than_half_the_channel_is_not_sent_again_and_again() -> None:
    world = Small(pair=in_process_pair(capacity=1 << 15), max_length=6000)
    world.turns = 0
    world.admit("r", [1, 5] * 2500, LONG)
    for _ in range(3):
        world.step()
    assert world.num_sent == 0 and world.proposer.counters.texts_too_long == 1


def test_a_text_within_half_the_channel_arrives() -> None:
    world = Small(pair=in_process_pair(capacity=1 << 15), max_length=6000, num_pages=1500)
    world.admit("r", [1, 5] * 2000, LONG)
    for _ in range(6):
        world.step()
    assert world.proposer.counters.accepted["draft"] > 0


@pytest.mark.parametrize("useful", [1, 2])
def test_of_texts_for_which_there_is_no_room_the_least_useful_goes(useful: int) -> None:
    engine, frontier = make(num_pages=12, page_size=4, children_per_node=4)
    for handle in (1, 2):
        admit(frontier, handle, [handle] * 13)
    for _ in range(3):
        turn(engine, frontier)
    for handle in (1, 2):
        root = trees(frontier)[handle].root
        assert root is not None
        is_child = set(root.children)
        token = next(token for token in range(12) if (token in is_child) == (handle == useful))
        commit(frontier, handle, 13, [token])
    admit(frontier, 3, [3] * 13)
    for _ in range(6):
        turn(engine, frontier)
    assert set(trees(frontier)) == {useful, 3} and frontier.dropped == {3 - useful}
    assert frontier.counters["requests_evicted"] == 1
    assert all(tree.root is not None and tree.root.children for tree in trees(frontier).values()), "no tree is lost"


def test_a_request_that_was_dropped_is_sent_nothing_and_is_admitted_again_after_a_pause() -> None:
    world = Small(num_pages=16, turns=6)
    world.proposer.table.tries.limits["first_pause"] = 12  # type: ignore[attr-defined]
    prompts = {f"r{index}": [index + 1] * 9 for index in range(5)}
    for name, prompt in prompts.items():
        world.admit(name, prompt)
    for _ in range(3):
        world.step()
    frontier = world.worker.frontier
    assert frontier.counters["requests_evicted"] > 0 and not frontier.dropped
    assert frontier.counters["late_commands"] <= frontier.counters["requests_evicted"], "it is talked to in vain"
    evicted = [name for name in prompts if not _session(world, name)]
    assert evicted
    for name in [name for name in prompts if name != evicted[0]]:
        world.proposer.finish(name)
        del world.texts[name]
    for _ in range(20):
        world.step()
    assert _session(world, evicted[0]) and len(frontier) == 1
    assert world.proposer.counters.resynchronisations > 0
    assert world.texts[evicted[0]] == world.greedy(prompts[evicted[0]], len(world.texts[evicted[0]]))


def _session(world: World, name: str) -> int:
    return int(world.proposer.table.tries.requests["session"][world.proposer._slots[name]])


def test_a_worker_that_does_not_know_a_request_says_so() -> None:
    """Its report may have been lost with a full log."""
    world = Small()
    world.admit("r", [1, 5])
    world.step()
    (request,) = world.worker.frontier._requests.values()
    world.worker.frontier._release(request)
    world.step()
    world.step()
    assert _session(world, "r") == 0 and len(world.worker.frontier) == 0


def test_numbers_that_only_a_client_would_think_of_cost_nobody_drafts() -> None:
    world = Small()
    world.admit("r", [1, 5])
    make_params: list[Callable[[], RequestParams]] = [
        lambda: RequestParams(0.0, 200, frozenset({2**40, -5, 3})),
        lambda: RequestParams(1.0, 200, frozenset(), top_k=2**40),
        lambda: RequestParams(float("nan"), 200, frozenset()),
        lambda: RequestParams(float("inf"), 200, frozenset()),
        lambda: RequestParams(1.0, 2**70, frozenset(), top_p=0.0),
        lambda: RequestParams(1.0, 200, frozenset(), min_p=7.0),
    ]
    for number, params in enumerate(make_params):
        world.proposer.admit(f"odd {number}", np.array([2, 5], np.int32), params())
    world.step(["r"])
    world.step(["r"])
    assert world.chains["r"] and world.proposer.num_requests == 1 + len(make_params)
