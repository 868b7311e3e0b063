"""The scripted world against what is known in closed form, and the drafting loop in it."""

import numpy as np
import pytest

from vllm_double.planning.script import NUM_LISTED, Script, Tables, Times, texts
from vllm_double.planning.world import Outcome, ScriptedRetriever, SimulatedClock, simulate


def run(script: Script, cost_ratio: float, *, num_tokens: int = 300, **settings: float) -> Outcome:
    return simulate(script, Times(target=1e-3 * cost_ratio, draft=1e-3), num_tokens=num_tokens, **settings)  # type: ignore[arg-type]


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
    assert full.speedup > 1.1 * one.speedup  # which waits more often


def test_retrieval_of_repeated_text_makes_the_loop_faster() -> None:
    plain = run(Script(0.5), 4.0)
    copied = run(Script(0.5, copied=0.5, copy_length=20.0), 4.0)
    assert copied.speedup > 1.3 * plain.speedup


def test_one_path_with_retrieval_exceeds_pearls_cap() -> None:
    """Double (2601.05524) lifts the cap C to C (1 + AMT): the draft reads what is retrieved in one forward."""
    found = run(Script(1.0, copied=0.7, copy_length=20.0), 3.0, children_per_node=1, nodes_per_iteration=8)
    assert found.speedup > 1.5 * 3.0


def test_a_gap_between_steps_costs_its_time() -> None:
    def seconds_of_a_step(gap: float) -> float:
        found = simulate(Script(0.5), Times(8e-3, 1e-3, gap=gap), num_tokens=150, may_wait=False)
        return 8e-3 * 149 / found.speedup / found.rounds

    assert seconds_of_a_step(0.0) == pytest.approx(8e-3)
    assert seconds_of_a_step(2e-3) == pytest.approx(10e-3, rel=0.01)


def test_chains_are_shorter_if_verified_tokens_cost() -> None:
    free = simulate(Script(0.65), Times(8e-3, 1e-3), num_tokens=200)
    dear = simulate(Script(0.65), Times(8e-3, 1e-3, token=1.6e-3), num_tokens=200)
    assert dear.chain_length < 0.8 * free.chain_length
    assert dear.speedup < 0.9 * free.speedup


def test_a_batch_shares_the_draft() -> None:
    alone, together = run(Script(0.65), 8.0, num_tokens=150), run(Script(0.65), 8.0, num_tokens=150, batch=8)
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


def test_one_token_is_drafted_as_many_are() -> None:
    """Scalars go through the same hash as arrays, and siblings are distinct."""
    tables = Tables(Script(0.6, seed=3))
    tokens = np.arange(50, dtype=np.uint64) * np.uint64(99991)
    many, probs = tables.children(tokens, NUM_LISTED)
    assert all(len(set(line)) == NUM_LISTED for line in many.tolist())
    assert (np.diff(probs, axis=1) <= 0).all() and (probs.sum(axis=1) <= 1.0001).all()
    agreed = [tables.target(int(token)) in line for token, line in zip(tokens, many.tolist(), strict=True)]
    assert np.mean(agreed) > 0.7


@pytest.mark.parametrize(("copied", "copy_length"), [(0.3, 12.0), (0.8, 5.0), (0.4, 1.0)])
def test_the_copied_share_is_the_scripts(copied: float, copy_length: float) -> None:
    [text] = texts(Tables(Script(0.5, copied=copied, copy_length=copy_length)), 1, 20_000)
    assert np.mean(np.array(text.copied) > 0) == pytest.approx(copied, abs=0.02)


def test_texts_follow_the_tables() -> None:
    tables = Tables(Script(0.6, copied=0.3))
    first, second = texts(tables, 2, 300)
    assert first.tokens[0] != second.tokens[0]
    for text in (first, second):
        for place in range(1, 299):
            before = int(text.tokens[place - 1])
            listed = tables.children(np.array([before], np.uint64), NUM_LISTED)[0][0].tolist()
            assert text.tokens[place] == tables.target(before)
            rank = text.ranks[place]
            assert (listed[rank] == text.tokens[place]) if rank < NUM_LISTED else (text.tokens[place] not in listed)
            agreed = next(count for count in range(300) if place + count >= 299 or text.ranks[place + count] > 0)
            assert text.agreed[place] == agreed


def test_retrieval_knows_the_copied_run_alone() -> None:
    tables = Tables(Script(0.5, copied=0.5, copy_length=6.0))
    [text] = texts(tables, 1, 400)
    retriever = ScriptedRetriever(tables)
    retriever.start(1, text.tokens[:1], None)
    num_known = 0
    for place in range(1, 300):
        known = text.copied[place]
        for start in range(max(1, place - 3), place + 1):  # the same from the text's end and through a tail
            asked = ScriptedRetriever(tables)
            asked.start(1, text.tokens[:start], None)
            found = asked.lookup(1, text.tokens[start:place].tolist(), 10)
            assert (found is None) == (known == 0)
            if found is not None:
                right = min(known, 10)
                assert found.tokens[:right] == text.tokens[place : place + right].tolist()
                assert known >= 10 or (len(found.tokens) == 10 and found.tokens[right] != text.tokens[place + right])
                num_known += 1
        retriever.extend(1, text.tokens[place : place + 1].tolist())
        assert (retriever.lookup(1, [], 4) is None) == (text.copied[place + 1] == 0)
    assert num_known > 200


@pytest.mark.parametrize(
    "wrong",
    [{"acceptance": 0.0}, {"acceptance": 1.5}, {"acceptance": 0.5, "copied": 1.0}, {"acceptance": 0.5, "copied": 0.95}],
)
def test_an_impossible_script_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"acceptance|copied"):
        Script(**wrong)
