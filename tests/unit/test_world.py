"""The scripted world against what is known in closed form, and the drafting loop in it."""

import numpy as np
import pytest

from tests.world import Outcome, Script, SimulatedClock, Tables, Times, simulate


def run(script: Script, cost_ratio: float, *, num_tokens: int = 600, **settings: float) -> Outcome:
    times = Times(target=cost_ratio, draft=1.0, token=0.0, draft_token=0.0)
    return simulate(script, times, num_tokens=num_tokens, **settings)  # type: ignore[arg-type]


def test_events_happen_while_the_clock_passes_their_time() -> None:
    clock, seen = SimulatedClock(), []

    def event() -> None:
        seen.append(clock())
        if len(seen) < 3:
            clock.at(clock() + 2.0, event)

    clock.at(1.0, event)
    clock.advance(0.5)
    assert seen == []
    clock.advance(3.0)
    assert seen == [1.0, 3.0] and clock() == 3.5
    clock.advance(5.0)
    assert seen == [1.0, 3.0, 5.0] and clock() == 8.5


@pytest.mark.parametrize("cost_ratio", [2.0, 4.0, 8.0])
def test_one_path_of_a_draft_that_is_always_right_is_as_fast_as_the_draft(cost_ratio: float) -> None:
    """PEARL's cap (2408.11850): the speed-up is at most the cost ratio C, and is C where everything is accepted."""
    found = run(Script(1.0), cost_ratio, children_per_node=1, nodes_per_iteration=1)
    assert found.speedup == pytest.approx(cost_ratio, rel=0.05)
    assert found.speedup <= cost_ratio
    assert found.hit_rate > 0.97


def test_without_drafts_in_time_there_is_no_speed_up() -> None:
    found = run(Script(0.7), 0.01, num_tokens=100)
    assert found.tokens_per_forward == pytest.approx(1.0, abs=0.05)
    assert found.speedup == pytest.approx(1.0, abs=0.05)


def test_prepared_outcomes_are_hit_more_often_than_one_path() -> None:
    script = Script(0.65, tail=0.5)
    one = run(script, 16.0, num_tokens=300, children_per_node=1, nodes_per_iteration=1)
    full = run(script, 16.0, num_tokens=300)
    assert full.hit_rate > one.hit_rate + 0.15
    assert full.speedup > 1.15 * one.speedup


def test_what_repeats_is_retrieved() -> None:
    plain = run(Script(0.5), 4.0)
    copied = run(Script(0.5, copied=0.5, copy_length=20.0), 4.0)
    assert copied.speedup > 1.3 * plain.speedup


def test_a_batch_shares_the_draft() -> None:
    alone, together = run(Script(0.65), 8.0, num_tokens=300), run(Script(0.65), 8.0, num_tokens=300, batch=8)
    assert together.tokens_per_forward < alone.tokens_per_forward
    assert together.hit_rate > 0.3


def test_the_same_script_gives_the_same_outcome() -> None:
    assert run(Script(0.6, copied=0.2), 8.0, num_tokens=200) == run(Script(0.6, copied=0.2), 8.0, num_tokens=200)


@pytest.mark.parametrize(("acceptance", "tail"), [(0.65, 0.3), (0.5, 0.5)])
def test_the_draft_is_as_right_as_it_says(acceptance: float, tail: float) -> None:
    tables = Tables(Script(acceptance, tail=tail))
    token, hits, said, listed = 1, 0, 0.0, 0
    for _ in range(4000):
        children, probs = tables.children(np.array([token], np.uint64), 32)
        token = tables.target(token)
        hits += children[0, 0] == token
        said += probs[0, 0]
        listed += token in children[0]
    assert hits / 4000 == pytest.approx(said / 4000, abs=0.03)
    assert listed / 4000 == pytest.approx(1 - (1 - acceptance) * 32**-tail, abs=0.04)


@pytest.mark.parametrize("wrong", [{"acceptance": 0.0}, {"acceptance": 1.5}, {"acceptance": 0.5, "copied": 1.0}])
def test_an_impossible_script_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"acceptance|copied"):
        Script(**wrong)
