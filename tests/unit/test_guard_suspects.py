"""Whose drafts an exception costs: those of the request at which rounds fail, and what a broken source knew."""

from typing import Any

import pytest

from tests.unit.test_guard import FIRST_S, MOST_S, Guarded, failing
from tests.unit.test_proposer import Ticks
from vllm_double.retrieval import ContextRetriever, HistoryRetriever
from vllm_double.retrieval.base import Source
from vllm_double.target.batch import Batch
from vllm_double.target.proposer import Proposer


@pytest.mark.parametrize("num_others", [0, 1, 6])
def test_a_request_at_which_rounds_fail_goes_without_drafts_and_the_others_soon_have_theirs(
    monkeypatch: pytest.MonkeyPatch, num_others: int
) -> None:
    world = Guarded()
    commit, inner = world.inner._commit, world.inner

    def poisoned(batch: Batch) -> Any:
        slot = inner._slots.get("poison")
        if "poison" in batch.request_ids and slot is not None and inner.table.params[slot].use_drafts:
            raise RuntimeError("something of ours")
        return commit(batch)

    monkeypatch.setattr(inner, "_commit", poisoned)
    prompts = {name: [index + 1, 5] for index, name in enumerate(["poison", *map(str, range(num_others))])}
    for name, prompt in prompts.items():
        world.admit(name, prompt)
    world.step()
    assert world.guarded.breaker.paused_s == FIRST_S
    world.now += FIRST_S
    world.run(12)
    assert world.guarded.breaker.state == "closed", "it opened for everybody again"
    assert world.guarded.counters.failures <= 2 + num_others.bit_length()
    assert not world.chains["poison"] and len(world.worker.frontier) == num_others
    assert not num_others or any(world.chains.values())
    world.check_texts(prompts)


def test_an_exception_that_does_not_come_again_costs_no_request_its_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Guarded()
    prompts = {f"r{index}": [index + 1, 5] for index in range(5)}
    for name, prompt in prompts.items():
        world.admit(name, prompt)
    with monkeypatch.context() as patch:
        patch.setattr(world.inner, "_commit", failing())
        world.step()
    world.now += FIRST_S
    world.run(8)
    assert world.inner.num_requests == len(world.worker.frontier) == 5 and world.guarded.counters.failures == 1
    world.check_texts(prompts)


@pytest.mark.parametrize("call", ["start", "extend_many", "lookup_many", "work"])
def test_sources_are_made_anew_if_one_of_them_raised_and_else_kept(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    world = Guarded(worker=False)
    made: list[list[Source]] = []

    def sources() -> list[Source]:
        made.append([ContextRetriever(), HistoryRetriever(1000, share_unnamed=True)])
        return made[-1]

    world.protect(Proposer(8, None, sources(), Ticks(), renew_sources=sources))
    world.admit("r", [1, 5])
    world.step()
    with monkeypatch.context() as patch:
        patch.setattr(world.inner, "_commit", failing())
        world.step()
    world.now += FIRST_S
    world.step()
    assert world.guarded.counters.failures == 1 and world.inner.lookups.sources == made[0]
    with monkeypatch.context() as patch:
        patch.setattr(made[0][1], call, failing())
        world.admit("s", [2, 5])
        world.step()
    assert world.guarded.counters.failures == 2 and world.inner.lookups.sources == made[1]
    world.now += MOST_S
    world.run(3)
    assert made[1][0].requests["live"].sum() == 2 and not made[0][0].requests["live"][2:].any()  # type: ignore[attr-defined]
    assert world.guarded.counters.failures == 2
